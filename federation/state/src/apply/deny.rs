//! Revoking SVIDs: by identity, one by one, and with the entry that they were issued under.

use super::{At, cell_row, export, issue, objects, payload, touch};
use crate::command::{Command, IdVerb, Presence, Reply};
use crate::committed::{Issuance, Subject};
use crate::state::State;
use ambit_model::record::Kind;
use ambit_model::{
    Address, ClusterId, Code, Entry, EntryId, IdDenial, LeafDenial, ObjectName, Refusal, SpiffeId, Stamp, TrustDomain,
    serial_number,
};
use std::collections::{BTreeMap, BTreeSet};

/// Denials of each kind that this cell makes; each goes to every agent (I17). Peers have bounds of their own.
const ID_DENIALS_MAX: usize = 20_000;
const LEAF_DENIALS_MAX: usize = 20_000;
/// Of each those that are kept for who administers the whole cell: no cluster's administrator leaves it without any.
const RESERVED: usize = 2_000;
/// Leaves of one entry that are refused one by one, where another entry gives the same identity; if there are more, all of
/// that identity so far are.
const LEAVES_PER_ENTRY_MAX: usize = 256;
/// Below it are the identities of administrators.
const ADMIN_PATH: &str = "/ambit/admin/";
/// DER allows 20 bytes (RFC 5280 section 4.1.2.2).
pub(super) const SERIAL_BYTES_MAX: usize = 20;

/// After this no leaf that is issued to the identity now can be valid on any clock of the mesh.
fn leaf_ms_max(id: &SpiffeId) -> u64 {
    let longest = if is_admin(id) { issue::ADMIN_MS } else { crate::UNATTESTED_MAX_MS };
    longest + crate::ISSUER_MARGIN_MS
}

fn is_admin(id: &SpiffeId) -> bool {
    id.path().starts_with(ADMIN_PATH)
}

pub(super) fn id(s: &mut State, at: At, id: &SpiffeId, verb: IdVerb) -> Result<Reply, Refusal> {
    let own = cell_row(s)?.trust_domain;
    let known = s.id_denials.get(&(own.clone(), id.clone())).copied();
    if verb == IdVerb::Revoke && id.trust_domain() != own {
        // Whose serials tell nothing here of when they were issued.
        let expected = format!("an identity of {own}, or one that is barred (ambit deny id)");
        return Err(Refusal::new(Code::NotOwner, expected, id.as_str()));
    }
    if verb == IdVerb::Lift && !known.is_some_and(|denial| denial.barred) {
        return Err(Refusal::new(Code::NotFound, "an identity that this cell denies", id.as_str()));
    }
    if id.path().starts_with("/ambit/replica/") {
        let expected = "an identity that is not a replica's (ambit raft remove)";
        return Err(Refusal::new(Code::BadRequest, expected, id.as_str()));
    }
    let admin = id.path().strip_prefix(ADMIN_PATH).filter(|_| id.trust_domain() == own);
    if verb != IdVerb::Lift && admin.is_some_and(|name| s.is_last_federation_admin(name)) {
        let expected = "another federation-admin (ambit admin grant) before the last one is denied";
        return Err(Refusal::new(Code::LastAdmin, expected, id.as_str()));
    }
    room(s, &own, &BTreeSet::from([id.clone()]), 0)?;
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

/// An administrator whom a restore makes anew is not kept out by what was said of the former; what that one had is.
pub(super) fn readmit(s: &mut State, admin: &ObjectName) -> Result<(), Refusal> {
    let id = cell_row(s)?.trust_domain.member(&format!("{ADMIN_PATH}{admin}"))?;
    let key = (id.trust_domain(), id);
    if let Some(known) = s.id_denials.get(&key).copied() {
        let row = IdDenial { barred: false, ..known };
        s.id_denials.put(&mut s.journal, key.clone(), row);
        export(s, Kind::IdDenial, key.1.to_string(), payload(&row)?);
    }
    Ok(())
}

/// Refused unless there is room for denials of these identities, and for some more than those.
fn room(s: &State, own: &TrustDomain, ids: &BTreeSet<SpiffeId>, reserved: usize) -> Result<(), Refusal> {
    if s.id_denials.len() + ids.len() <= ID_DENIALS_MAX - reserved {
        // With peers' and all: no need to count.
        return Ok(());
    }
    let held = s.id_denials.iter().filter(|((origin, _), _)| origin == own).count();
    let more = ids.iter().filter(|id| !s.id_denials.contains(&(own.clone(), (*id).clone()))).count();
    let max = ID_DENIALS_MAX - reserved;
    if more == 0 || held + more <= max {
        return Ok(());
    }
    let found = format!("{held}, and {more} more (ambit deny list)");
    Err(Refusal::new(Code::Busy, format!("at most {max} denied identities at once"), found))
}

/// Room as an administrator of some clusters has it: that of all clusters together, and of each its share, so that none
/// leaves the others without any. Gives whose shares the identities take, which are known before they are denied only.
pub(super) fn room_within(s: &State, command: &Command) -> Result<BTreeMap<SpiffeId, ClusterId>, Refusal> {
    let of_entry = |id: &EntryId| s.entry(id).map(|row| (row.entry.spiffe_id.clone(), row.entry.cluster.clone()));
    let shares: BTreeMap<SpiffeId, ClusterId> = match command {
        Command::DenyId(id, _) => cluster_of(s, id).map(|cluster| (id.clone(), cluster)).into_iter().collect(),
        Command::RetireEntries(ids) => ids.iter().filter_map(of_entry).collect(),
        Command::RemoveEntries(items) => items.iter().filter_map(|(id, _)| of_entry(id)).collect(),
        Command::ReplaceEntries(entries) => entries.iter().filter_map(|(entry, _)| of_entry(&entry.id)).collect(),
        _ => return Ok(BTreeMap::new()),
    };
    let own = cell_row(s)?.trust_domain;
    room(s, &own, &shares.keys().cloned().collect(), RESERVED)?;
    let max = (ID_DENIALS_MAX - RESERVED) / s.clusters.len().max(1);
    for cluster in shares.values().collect::<BTreeSet<_>>() {
        let new = |id: &SpiffeId| !s.id_denials.contains(&(own.clone(), id.clone()));
        let more = shares.iter().filter(|(id, of)| *of == cluster && new(id)).count();
        let held = s.id_shares.iter().filter(|(_, of)| *of == cluster).count();
        if more > 0 && held + more > max {
            let found = format!("{held}, and {more} more (ambit deny list)");
            return Err(Refusal::new(
                Code::Busy,
                format!("at most {max} denied identities of cluster {cluster}"),
                found,
            ));
        }
    }
    Ok(shares)
}

/// Whose an identity is that somebody of a cluster may deny: by its path, else by an entry that gives it.
fn cluster_of(s: &State, id: &SpiffeId) -> Option<ClusterId> {
    match id.path().strip_prefix("/cluster/") {
        Some(rest) => rest.split('/').next()?.parse().ok(),
        None => s.entries_of(id).next().map(|row| row.entry.cluster.clone()),
    }
}

/// Notes whose shares these take, of which not all need have been denied, nor by this command first.
pub(super) fn charge(s: &mut State, shares: BTreeMap<SpiffeId, ClusterId>) {
    let Some(own) = s.cell().map(|cell| cell.trust_domain.clone()) else { return };
    for (id, cluster) in shares {
        if s.id_denials.contains(&(own.clone(), id.clone())) && !s.id_shares.contains(&id) {
            s.id_shares.put(&mut s.journal, id, cluster);
        }
    }
}

/// The identities that these entries give now.
fn identities<'a>(s: &State, entries: impl Iterator<Item = &'a EntryId>) -> BTreeSet<SpiffeId> {
    entries.filter_map(|id| s.entry(id)).map(|row| row.entry.spiffe_id.clone()).collect()
}

/// Single leaves that may still be denied.
fn leaves_left(s: &State, own: &TrustDomain) -> usize {
    let of_own = s.leaf_denials.from((own.clone(), String::new(), Vec::new())).take_while(|((td, _, _), _)| td == own);
    LEAF_DENIALS_MAX.saturating_sub(of_own.count())
}

/// Everything issued for the identity up to this entry is refused. The denial is exported before anything that follows.
fn deny_id(s: &mut State, at: At, id: &SpiffeId, barred: bool) -> Result<(), Refusal> {
    let cell = cell_row(s)?;
    let (up_to, until) = (issue::serial(cell.epoch, at, u32::MAX), at.stamp.plus_ms(leaf_ms_max(id)));
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
    let serial = serial_number(serial);
    if serial.is_empty() || serial.len() > SERIAL_BYTES_MAX {
        let expected = format!("a serial of 1-{SERIAL_BYTES_MAX} bytes");
        return Err(Refusal::new(Code::BadRequest, expected, serial.len().to_string()));
    }
    let own = cell_row(s)?.trust_domain;
    let known = s.leaf_denials.contains(&(own.clone(), authority.to_owned(), serial.to_vec()));
    if !known && s.leaf_denials.len() >= LEAF_DENIALS_MAX && leaves_left(s, &own) == 0 {
        return Err(Refusal::new(Code::Busy, format!("at most {LEAF_DENIALS_MAX} denied leaves at once"), "one more"));
    }
    let of_replica = s.authority(authority).map(|row| row.lifetime.not_after);
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
    let row = LeafDenial { since: at.stamp, until };
    s.leaf_denials.put(&mut s.journal, key, row);
    export(s, Kind::LeafDenial, format!("{authority}/{}", hex::encode(serial)), payload(&row)?);
    Ok(())
}

/// Forgets what covers no leaf that anybody can still take for valid. What is barred stays.
pub(super) fn forget(s: &mut State, now: Stamp) {
    let before = s.id_denials.len();
    s.id_denials.prune(&mut s.journal, |_, denial| !denial.barred && denial.until < now);
    if s.id_denials.len() < before
        && let Some(own) = s.cell().map(|cell| cell.trust_domain.clone())
    {
        let denied = &s.id_denials;
        s.id_shares.prune(&mut s.journal, |id, _| !denied.contains(&(own.clone(), id.clone())));
    }
    s.leaf_denials.prune(&mut s.journal, |_, denial| denial.until < now);
}

pub(super) fn retire_entries(s: &mut State, at: At, ids: &[EntryId]) -> Result<Reply, Refusal> {
    let items: Vec<_> = ids.iter().map(|id| (id.clone(), Presence::There)).collect();
    remove_entries(s, at, &items)
}

pub(super) fn remove_entries(s: &mut State, at: At, items: &[(EntryId, Presence)]) -> Result<Reply, Refusal> {
    let mut out: Vec<_> = items.iter().map(|(id, presence)| objects::is_as(s, id, *presence)).collect();
    let going: Vec<EntryId> =
        items.iter().zip(&out).filter(|(_, is)| is.is_ok()).map(|((id, _), _)| id.clone()).collect();
    room(s, &cell_row(s)?.trust_domain, &identities(s, going.iter()), 0)?;
    let before: Vec<Entry> = going.iter().filter_map(|id| s.entry(id)).map(|row| row.entry.clone()).collect();
    let gone = objects::delete(s, at, &going);
    // One that is named twice is gone the second time.
    out.iter_mut().filter(|is| is.is_ok()).zip(gone).for_each(|(is, gone)| *is = gone);
    revoke(s, at, &before)?;
    Ok(Reply::Items(out))
}

pub(super) fn replace_entries(s: &mut State, at: At, entries: &[(Entry, Presence)]) -> Result<Reply, Refusal> {
    let former = identities(s, entries.iter().map(|(entry, _)| &entry.id));
    room(s, &cell_row(s)?.trust_domain, &former, 0)?;
    let before: BTreeMap<EntryId, Entry> = entries
        .iter()
        .filter_map(|(new, _)| s.entry(&new.id))
        .map(|row| (row.entry.id.clone(), row.entry.clone()))
        .collect();
    let reply = objects::put_entries(s, at, entries)?;
    let other = |was: &&Entry| {
        let is = s.entry(&was.id).map(|row| &row.entry);
        // Lifetimes, a hint, or whose bundles go along change nothing of who may have it or of what it says. An end that
        // comes earlier than it was to come does: what was issued may outlive it.
        let same = |is: &Entry| {
            let of = |entry: &Entry| (entry.spiffe_id.clone(), entry.cluster.clone(), entry.extras.dns_names.clone());
            let ends = is.extras.expires_at >= was.extras.expires_at;
            // Who was issued a workload's SVID becomes no administrator by it, nor an issuer.
            let gains = (is.extras.admin && !was.extras.admin) || (is.extras.downstream && !was.extras.downstream);
            ends && !gains && of(is) == of(was) && is.nodes == was.nodes && is.selectors == was.selectors
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
    let others = |id: &SpiffeId| s.entries_of(id).any(|row| !of.contains(&row.entry.id));
    let shared: BTreeSet<SpiffeId> = ids.iter().filter(|id| others(id)).cloned().collect();
    let mut whole: BTreeSet<SpiffeId> = ids.difference(&shared).cloned().collect();
    let mut single: BTreeMap<SpiffeId, Vec<Issuance>> = BTreeMap::new();
    if !shared.is_empty() {
        let under = |leaf: &&Issuance| match &leaf.subject {
            Subject::Workload(entry, _) | Subject::NamedWorkload(entry, _, _) => of.contains(entry),
            Subject::Node | Subject::Admin | Subject::BreakGlass(_) | Subject::Minted(..) => false,
        };
        for leaf in s.issued().filter(under).filter(|leaf| shared.contains(&leaf.spiffe_id)) {
            single.entry(leaf.spiffe_id.clone()).or_default().push(leaf.clone());
        }
    }
    // Some are left for leaves that an operator names.
    let left = leaves_left(s, &cell_row(s)?.trust_domain).saturating_sub(RESERVED);
    let too_many = single.values().map(Vec::len).sum::<usize>() > left;
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
    let gone: Vec<Address> = s
        .endpoints
        .from((own.clone(), Address::FIRST))
        .take_while(|((origin, _), _)| *origin == own)
        .filter(|(_, row)| ids.contains(&row.object.spiffe_id))
        .filter(|(_, row)| !s.entries_of(&row.object.spiffe_id).any(|e| s.fits(&e.entry, &row.object.node)))
        .map(|((_, address), _)| *address)
        .collect();
    s.leave(at.stamp, gone.iter().copied(), true);
    for address in gone {
        s.endpoints.remove(&mut s.journal, &(own.clone(), address));
        export(s, Kind::Endpoint, address.to_string(), Vec::new());
    }
    touch(s, at);
}
