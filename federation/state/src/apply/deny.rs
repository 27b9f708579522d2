//! Revoking SVIDs: by identity, one by one, and with the entry that they were issued under.

use super::{At, cell_row, export, issue, objects, payload, touch};
use crate::command::{IdVerb, Presence, Reply};
use crate::committed::{Issuance, Subject};
use crate::state::State;
use ambit_model::record::Kind;
use ambit_model::{Code, Entry, EntryId, IdDenial, LeafDenial, Refusal, SpiffeId, Stamp};
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

/// Denials of each kind that this cell makes; each goes to every agent (I17).
const ID_DENIALS_MAX: usize = 20_000;
const LEAF_DENIALS_MAX: usize = 20_000;
/// Leaves of one entry that are refused one by one, where another entry gives the same identity; if there are more, all of
/// that identity so far are.
const LEAVES_PER_ENTRY_MAX: usize = 256;
/// After this no leaf that is issued now can be valid on any clock of the mesh.
const LEAF_MS_MAX: u64 = crate::UNATTESTED_MAX_MS + crate::ISSUER_MARGIN_MS;
/// DER allows 20 bytes (RFC 5280 section 4.1.2.2).
const SERIAL_BYTES_MAX: usize = 20;

pub(super) fn id(s: &mut State, at: At, id: &SpiffeId, verb: IdVerb) -> Result<Reply, Refusal> {
    let own = cell_row(s)?.trust_domain;
    let known = s.id_denials.get(&(own.clone(), id.clone())).copied();
    if verb == IdVerb::Lift && !known.is_some_and(|denial| denial.barred) {
        return Err(Refusal::new(Code::NotFound, "an identity that this cell denies", id.as_str()));
    }
    if id.path().starts_with("/ambit/replica/") {
        let expected = "an identity that is not a replica's (ambit raft remove)";
        return Err(Refusal::new(Code::BadRequest, expected, id.as_str()));
    }
    room(s.id_denials.len(), ID_DENIALS_MAX, known.is_some())?;
    let barred = match verb {
        IdVerb::Bar => true,
        IdVerb::Lift => false,
        IdVerb::Revoke => known.is_some_and(|denial| denial.barred),
    };
    deny_id(s, at, id, barred)?;
    if verb != IdVerb::Lift {
        drop_endpoints(s, at, &BTreeSet::from([id.clone()]));
    }
    touch(s, at);
    Ok(Reply::Done)
}

fn room(held: usize, max: usize, known: bool) -> Result<(), Refusal> {
    if held < max || known {
        return Ok(());
    }
    Err(Refusal::new(Code::Busy, format!("at most {max} denials"), "one more"))
}

/// Everything issued for the identity up to this entry is refused. The denial is exported before anything that follows.
fn deny_id(s: &mut State, at: At, id: &SpiffeId, barred: bool) -> Result<(), Refusal> {
    let cell = cell_row(s)?;
    let (up_to, until) = (issue::serial(cell.epoch, at, u32::MAX), at.stamp.plus_ms(LEAF_MS_MAX));
    let new = IdDenial { up_to, barred, since: at.stamp, until };
    let key = (cell.trust_domain.clone(), id.clone());
    let row = s.id_denials.get(&key).map_or(new, |known| known.then(new));
    s.id_denials.put(&mut s.journal, key, row);
    if id.trust_domain() == cell.trust_domain {
        export(s, Kind::IdDenial, id.to_string(), payload(&row)?);
    }
    Ok(())
}

pub(super) fn leaf(s: &mut State, at: At, authority: &str, serial: &[u8]) -> Result<Reply, Refusal> {
    if serial.is_empty() || serial.len() > SERIAL_BYTES_MAX {
        let expected = format!("a serial of 1-{SERIAL_BYTES_MAX} bytes");
        return Err(Refusal::new(Code::BadRequest, expected, serial.len().to_string()));
    }
    let of_replica = s.members().find(|(_, m)| m.authority == authority).map(|(_, m)| m.authority_not_after);
    let known = s.issued().find(|leaf| leaf.serial == serial && leaf.authority == authority);
    // What is on record ends when its record says; what is not, with its issuer.
    let until = known.map(|leaf| leaf.lifetime.not_after).or(of_replica).ok_or_else(|| {
        Refusal::new(Code::AuthorityMismatch, "an issuing authority of this cell", authority.to_owned())
    })?;
    deny_leaf(s, at, authority, serial, until.plus_ms(crate::ISSUER_MARGIN_MS))?;
    touch(s, at);
    Ok(Reply::Done)
}

fn deny_leaf(s: &mut State, at: At, authority: &str, serial: &[u8], until: Stamp) -> Result<(), Refusal> {
    let own = cell_row(s)?.trust_domain;
    let key = (own, authority.to_owned(), serial.to_vec());
    room(s.leaf_denials.len(), LEAF_DENIALS_MAX, s.leaf_denials.contains(&key))?;
    let row = LeafDenial { since: at.stamp, until };
    s.leaf_denials.put(&mut s.journal, key, row);
    export(s, Kind::LeafDenial, format!("{authority}/{}", hex::encode(serial)), payload(&row)?);
    Ok(())
}

/// Forgets what covers no leaf that anybody can still take for valid. What is barred stays.
pub(super) fn forget(s: &mut State, now: Stamp) {
    s.id_denials.prune(&mut s.journal, |_, denial| !denial.barred && denial.until < now);
    s.leaf_denials.prune(&mut s.journal, |_, denial| denial.until < now);
}

pub(super) fn retire_entries(s: &mut State, at: At, ids: &[EntryId]) -> Result<Reply, Refusal> {
    let before: Vec<Entry> = ids.iter().filter_map(|id| s.entry(id)).map(|row| row.entry.clone()).collect();
    let reply = objects::delete_entries(s, at, ids)?;
    revoke(s, at, &before)?;
    Ok(reply)
}

pub(super) fn replace_entries(s: &mut State, at: At, entries: &[(Entry, Presence)]) -> Result<Reply, Refusal> {
    let before: BTreeMap<EntryId, Entry> = entries
        .iter()
        .filter_map(|(new, _)| s.entry(&new.id))
        .map(|row| (row.entry.id.clone(), row.entry.clone()))
        .collect();
    let reply = objects::put_entries(s, at, entries)?;
    let other = |was: &&Entry| {
        let is = s.entry(&was.id).map(|row| &row.entry);
        // Lifetimes, a hint, or whose bundles go along change nothing of who may have it or of what it says.
        let same = |is: &Entry| {
            let of = |entry: &Entry| (entry.spiffe_id.clone(), entry.cluster.clone(), entry.extras.dns_names.clone());
            of(is) == of(was) && is.nodes == was.nodes && is.selectors == was.selectors
        };
        !is.is_some_and(same)
    };
    let changed: Vec<Entry> = before.values().filter(other).cloned().collect();
    revoke(s, at, &changed)?;
    Ok(reply)
}

/// What was issued under these entries, which are gone or other by now, is refused; endpoints of their identities go where
/// no entry is left for them.
fn revoke(s: &mut State, at: At, former: &[Entry]) -> Result<(), Refusal> {
    if former.is_empty() {
        return Ok(());
    }
    let of: BTreeSet<&EntryId> = former.iter().map(|entry| &entry.id).collect();
    let ids: BTreeSet<SpiffeId> = former.iter().map(|entry| entry.spiffe_id.clone()).collect();
    let shared: BTreeSet<SpiffeId> = s
        .entries()
        .filter(|row| ids.contains(&row.entry.spiffe_id) && !of.contains(&row.entry.id))
        .map(|row| row.entry.spiffe_id.clone())
        .collect();
    let mut whole: BTreeSet<SpiffeId> = ids.difference(&shared).cloned().collect();
    let mut single: BTreeMap<SpiffeId, Vec<Issuance>> = BTreeMap::new();
    if !shared.is_empty() {
        let under = |leaf: &&Issuance| matches!(&leaf.subject, Subject::Workload(entry, _) if of.contains(entry));
        for leaf in s.issued().filter(under).filter(|leaf| shared.contains(&leaf.spiffe_id)) {
            single.entry(leaf.spiffe_id.clone()).or_default().push(leaf.clone());
        }
    }
    let room = LEAF_DENIALS_MAX.saturating_sub(s.leaf_denials.len());
    let too_many = single.values().map(Vec::len).sum::<usize>() > room;
    single.retain(|id, leaves| {
        let few = !too_many && leaves.len() <= LEAVES_PER_ENTRY_MAX;
        if !few {
            whole.insert(id.clone());
        }
        few
    });
    for id in &whole {
        let barred = s.barred(id);
        deny_id(s, at, id, barred)?;
    }
    for leaf in single.values().flatten() {
        deny_leaf(s, at, &leaf.authority, &leaf.serial, leaf.lifetime.not_after.plus_ms(crate::ISSUER_MARGIN_MS))?;
    }
    drop_endpoints(s, at, &ids);
    touch(s, at);
    Ok(())
}

/// Endpoints of these identities go from nodes that may not run them any more, whatever their agents say.
fn drop_endpoints(s: &mut State, at: At, ids: &BTreeSet<SpiffeId>) {
    let Some(own) = s.cell().map(|cell| cell.trust_domain.clone()) else { return };
    let left: Vec<Entry> =
        s.entries().filter(|row| ids.contains(&row.entry.spiffe_id)).map(|row| row.entry.clone()).collect();
    let gone: Vec<Ipv4Addr> = s
        .endpoints
        .from((own.clone(), Ipv4Addr::UNSPECIFIED))
        .take_while(|((origin, _), _)| *origin == own)
        .filter(|(_, row)| ids.contains(&row.object.spiffe_id))
        .filter(|(_, row)| {
            let of = |entry: &&Entry| entry.spiffe_id == row.object.spiffe_id;
            !left.iter().filter(of).any(|entry| s.fits(entry, &row.object.node))
        })
        .map(|((_, address), _)| *address)
        .collect();
    for address in gone {
        s.endpoints.remove(&mut s.journal, &(own.clone(), address));
        export(s, Kind::Endpoint, address.to_string(), Vec::new());
    }
    touch(s, at);
}
