//! Roots of the own trust domain: prepared, active, old, tainted, revoked, one at a time and never back. Who must have heard
//! of a step before the next is asked outside: acknowledgements are no part of the state.

use super::{At, authority, cell_row, export, payload, touch};
use crate::authorities::{RootId, RootRow, root_id};
use crate::command::Reply;
use crate::committed::PreparedRoot;
use crate::external::may_sign;
use crate::objects::KeySetRow;
use crate::state::State;
use ambit_model::act::ShareHolder;
use ambit_model::bundle::RootState;
use ambit_model::record::Kind;
use ambit_model::{Code, RaftIndex, Refusal};
use std::collections::{BTreeMap, BTreeSet};

/// A root with a P-256 key is some hundred bytes; larger ones come from elsewhere.
pub(super) const ROOT_BYTES_MAX: usize = 8 * 1024;
/// Revoked ones are remembered, so that none comes back: a root a month for twenty years.
const ROOTS_MAX: usize = 256;
/// More people than this keep no secret.
const HOLDERS_MAX: usize = 16;

fn hex(id: &RootId) -> String {
    id.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(super) fn wrong(expected: &str, id: &RootId, row: &RootRow) -> Refusal {
    Refusal::new(Code::RootState, expected, format!("{} is {}", hex(id), row.state.as_str()))
}

fn named(s: &State, id: &RootId) -> Result<RootRow, Refusal> {
    s.roots().remove(id).ok_or_else(|| Refusal::new(Code::NotFound, "a root of this trust domain", hex(id)))
}

/// The bundle changed: its sequence rises, peers are told, and every slice has it.
fn changed(s: &mut State, at: At) -> Result<Reply, Refusal> {
    let mut cell = cell_row(s)?;
    cell.bundle_sequence += 1;
    s.cell.put(&mut s.journal, 0, cell);
    export_bundle(s)?;
    touch(s, at);
    Ok(Reply::Done)
}

/// Tells peers of the bundle as it is.
pub(super) fn export_bundle(s: &mut State) -> Result<(), Refusal> {
    let none = || Refusal::new(Code::Unavailable, "a founded cell", "an empty one");
    let (td, bundle) = (cell_row(s)?.trust_domain.to_string(), s.bundle_record().ok_or_else(none)?);
    export(s, Kind::Bundle, td, payload(&bundle)?);
    Ok(())
}

/// The root that the cell was founded with gets its row once there is anything to say of it.
pub(super) fn keep_first(s: &mut State) {
    if s.roots.len() == 0
        && let Some(row) = s.first_root()
    {
        s.roots.put(&mut s.journal, root_id(&row.der), row);
    }
}

fn put(s: &mut State, at: At, id: &RootId, state: RootState, row: RootRow) {
    s.roots.put(&mut s.journal, *id, RootRow { state, since: at.stamp, ..row });
}

pub(super) fn wrap(s: &mut State, id: &RootId, wrapped: &BTreeMap<u64, Vec<u8>>) -> Result<Reply, Refusal> {
    let row = named(s, id)?;
    if row.state == RootState::Revoked {
        return Err(wrong("a root in the bundle", id, &row));
    }
    if let Some(stranger) = wrapped.keys().find(|replica| s.member(**replica).is_none()) {
        return Err(Refusal::new(Code::NotFound, "replicas of this cell", stranger.to_string()));
    }
    keep_first(s);
    let all = row.wrapped.into_iter().chain(wrapped.iter().map(|(n, key)| (*n, key.clone()))).collect();
    s.roots.put(&mut s.journal, *id, RootRow { wrapped: all, ..row });
    let mut cell = cell_row(s)?;
    if cell.root_form == "file" {
        cell.root_form = "wrapped to each replica".to_owned();
        s.cell.put(&mut s.journal, 0, cell);
    }
    Ok(Reply::Done)
}

/// A replica that is of this cell no more is not wrapped to. (What it opened before, it may know: rotate the root then.)
pub(super) fn unwrap_from(s: &mut State, replica: u64) {
    let held: Vec<_> =
        s.roots.iter().filter(|(_, row)| row.wrapped.contains_key(&replica)).map(|(id, _)| *id).collect();
    for id in held {
        if let Some(mut row) = s.roots.get(&id).cloned() {
            row.wrapped.remove(&replica);
            s.roots.put(&mut s.journal, id, row);
        }
    }
}

pub(super) fn prepare(s: &mut State, at: At, der: &[u8], wrapped: &BTreeMap<u64, Vec<u8>>) -> Result<Reply, Refusal> {
    let (cell, id) = (cell_row(s)?, root_id(der));
    let active = root_id(&cell.root_der);
    let again = s.roots().get(&id).is_some_and(|row| row.state == RootState::Prepared);
    if !again {
        rotatable(s, der, false)?;
        wrapped_to_all(s, wrapped)?;
        insert(s, at, Kept { id, der, wrapped })?;
    }
    let serial = super::issue::serial(cell.epoch, at, 0);
    Ok(Reply::Root(Box::new(PreparedRoot { root: id, active, serial, stamp: at.stamp })))
}

/// Whether this can be the next root: never had before, unless it `may_return`, and no other rotation under way.
pub(super) fn rotatable(s: &State, der: &[u8], may_return: bool) -> Result<(), Refusal> {
    let (roots, id) = (s.roots(), root_id(der));
    if let Some(row) = roots.get(&id)
        && !(may_return && row.state == RootState::Revoked)
    {
        return Err(wrong("a root that this trust domain never had", &id, row));
    }
    let open = |row: &&RootRow| !matches!(row.state, RootState::Active | RootState::Revoked);
    if let Some((other, row)) = roots.iter().find(|(_, row)| open(row)) {
        return Err(wrong("one rotation at a time: the last one's roots active or revoked", other, row));
    }
    if der.is_empty() || der.len() > ROOT_BYTES_MAX || roots.len() >= ROOTS_MAX {
        let expected = format!("a root of at most {ROOT_BYTES_MAX} bytes, of at most {ROOTS_MAX}");
        return Err(Refusal::new(Code::BadRequest, expected, format!("{} bytes", der.len())));
    }
    Ok(())
}

/// A key that each replica of now can open, and that one at least can.
pub(super) fn wrapped_to_all(s: &State, wrapped: &BTreeMap<u64, Vec<u8>>) -> Result<(), Refusal> {
    if let Some(missing) = s.wrap_keys().keys().find(|n| !wrapped.contains_key(n)) {
        let expected = "the key, wrapped to every replica";
        return Err(Refusal::new(Code::BadRequest, expected, format!("not to replica {missing}")));
    }
    if wrapped.is_empty() {
        return Err(Refusal::new(Code::ReplicaUnattested, "a replica that could open the root", "none"));
    }
    Ok(())
}

/// A root that is to be prepared.
pub(super) struct Kept<'a> {
    pub(super) id: RootId,
    pub(super) der: &'a [u8],
    /// The key that signs under it.
    pub(super) wrapped: &'a BTreeMap<u64, Vec<u8>>,
}

/// The root is prepared: in the bundle, and nothing is signed under it yet.
pub(super) fn insert(s: &mut State, at: At, Kept { id, der, wrapped }: Kept<'_>) -> Result<(), Refusal> {
    let cell = cell_row(s)?;
    keep_first(s);
    let row = RootRow {
        der: der.to_vec(),
        state: RootState::Prepared,
        cross_der: Vec::new(),
        wrapped: wrapped.clone(),
        since: at.stamp,
        activated: RaftIndex(u64::MAX),
        sequence: cell.bundle_sequence + 1,
    };
    s.roots.put(&mut s.journal, id, row);
    changed(s, at).map(drop)
}

pub(super) fn cross_sign(s: &mut State, id: &RootId, der: &[u8]) -> Result<Reply, Refusal> {
    let row = named(s, id)?;
    if row.state != RootState::Prepared {
        return Err(wrong("a prepared root", id, &row));
    }
    if der.is_empty() || der.len() > ROOT_BYTES_MAX {
        return Err(Refusal::new(Code::BadRequest, "a certificate", format!("{} bytes", der.len())));
    }
    s.roots.put(&mut s.journal, *id, RootRow { cross_der: der.to_vec(), ..row });
    Ok(Reply::Done)
}

pub(super) fn activate(s: &mut State, at: At, id: &RootId, keys: &KeySetRow) -> Result<Reply, Refusal> {
    let row = named(s, id)?;
    if row.state != RootState::Prepared {
        return Err(wrong("a prepared root", id, &row));
    }
    let Some((former, former_row)) = s.active_root() else {
        return Err(Refusal::new(Code::Internal, "an active root", "none"));
    };
    // An external root's key is not here to certify anything.
    if row.cross_der.is_empty() && s.external(&former).is_none() {
        return Err(Refusal::new(Code::RootState, "a root certified by the active one", "not certified yet"));
    }
    // What the cell goes over to must last: nothing could renew a root that begins with an authority that ended.
    if let Some(external) = s.external(id) {
        may_sign(external.lifetime, at.stamp)?;
    }
    put(s, at, &former, RootState::Old, former_row);
    let mut cell = cell_row(s)?;
    cell.root_der.clone_from(&row.der);
    s.cell.put(&mut s.journal, 0, cell);
    put(s, at, id, RootState::Active, RootRow { activated: at.index, ..row });
    // Who has not heard of the new root yet verifies record keys by the former.
    if let Some(by_former) = s.key_set().cloned() {
        s.key_set.put(&mut s.journal, 1, by_former);
    }
    s.key_set.put(&mut s.journal, 0, keys.clone());
    changed(s, at)
}

/// Refused while a replica signs under it: whatever it issued would be to be issued anew at once.
fn unused(s: &State, id: &RootId) -> Result<(), Refusal> {
    let under = |authority: &str| s.authority(authority).is_some_and(|row| row.root == *id);
    let replicas: Vec<u64> = s.members().filter(|(_, m)| under(&m.authority)).map(|(n, _)| n).collect();
    if replicas.is_empty() {
        return Ok(());
    }
    let found = format!("replicas {replicas:?} are: each renews within seconds, or is to be removed");
    Err(Refusal::new(Code::AuthorityInUse, "no replica under the root", found))
}

pub(super) fn taint(s: &mut State, at: At, id: &RootId) -> Result<Reply, Refusal> {
    let row = named(s, id)?;
    if row.state != RootState::Old {
        return Err(wrong("an old root", id, &row));
    }
    unused(s, id)?;
    put(s, at, id, RootState::Tainted, row);
    changed(s, at)
}

/// The root, where nothing speaks against its revocation.
pub(super) fn revocable(s: &State, id: &RootId) -> Result<RootRow, Refusal> {
    let row = named(s, id)?;
    if !matches!(row.state, RootState::Tainted | RootState::Prepared) {
        return Err(wrong("a tainted or a merely prepared root", id, &row));
    }
    unused(s, id)?;
    Ok(row)
}

pub(super) fn revoke(s: &mut State, at: At, id: &RootId) -> Result<Reply, Refusal> {
    let row = revocable(s, id)?;
    let gone = RootRow { der: Vec::new(), cross_der: Vec::new(), wrapped: BTreeMap::new(), ..row };
    put(s, at, id, RootState::Revoked, gone);
    s.key_set.remove(&mut s.journal, &1);
    // A connection that was begun under it knows nothing of bundles any more: by the names that the cell knows it is ended.
    authority::revoke_under(s, at, id)?;
    // An external one may come back: what it was before stays refused.
    s.externals.prune(&mut s.journal, |(of, _), _| of == id);
    changed(s, at)
}

/// Two holders or more, each once: a share that opens the root by itself would be a copy of its key.
pub(super) fn shareable(s: &State, id: &RootId, threshold: u8, holders: &[ShareHolder]) -> Result<(), Refusal> {
    let row = named(s, id)?;
    if row.state == RootState::Revoked {
        return Err(wrong("a root in the bundle", id, &row));
    }
    let (names, keys): (BTreeSet<_>, BTreeSet<_>) = holders.iter().map(|h| (&h.name, &h.key)).unzip();
    let all = usize::from(threshold) <= holders.len() && holders.len() <= HOLDERS_MAX;
    if threshold < 2 || !all || names.len() != holders.len() || keys.len() != holders.len() {
        let expected = format!("a threshold of 2 or more, and up to {HOLDERS_MAX} different holders");
        return Err(Refusal::new(Code::BadRequest, expected, format!("{threshold} of {}", holders.len())));
    }
    Ok(())
}
