//! Authorities of the cell under external roots: a key requested, its certificate imported, the next one after it.

use super::authority::LIFETIME_MS_MIN;
use super::root::{Kept, insert, rotatable};
use super::{At, act, cell_row, root, touch};
use crate::authorities::{RootId, RootRow, authority_of, root_id};
use crate::command::{Command, Reply};
use crate::committed::PreparedRoot;
use crate::external::{ExternalImport, ExternalRequest, ExternalRow, Judged, judge, may_sign};
use crate::state::State;
use ambit_model::bundle::RootState;
use ambit_model::{Act, Code, Refusal, Stamp};
use std::collections::BTreeMap;

/// A request names a subject, a trust domain of at most 255 bytes and a P-256 key.
const CSR_BYTES_MAX: usize = 2 * 1024;
/// Authorities of one root at once. With 30 days each there are two; more were imported in haste.
const PER_ROOT_MAX: usize = 16;
/// As denials: the clocks that judge differ.
const SKEW_MS: u64 = crate::ISSUER_MARGIN_MS;

pub(super) fn request(
    s: &mut State,
    at: At,
    csr: &[u8],
    key_hash: &[u8; 32],
    wrapped: &BTreeMap<u64, Vec<u8>>,
) -> Result<Reply, Refusal> {
    cell_row(s)?;
    if let Some(open) = s.external_request() {
        let found = format!("that for {}", hex::encode(open.key_hash));
        return Err(Refusal::new(Code::AlreadyExists, "no open request for an external certificate", found));
    }
    if csr.is_empty() || csr.len() > CSR_BYTES_MAX {
        let expected = format!("a request of at most {CSR_BYTES_MAX} bytes");
        return Err(Refusal::new(Code::BadRequest, expected, format!("{} bytes", csr.len())));
    }
    root::wrapped_to_all(s, wrapped)?;
    let row = ExternalRequest { csr: csr.to_vec(), key_hash: *key_hash, wrapped: wrapped.clone(), made: at.stamp };
    s.external_requests.put(&mut s.journal, 0, row);
    Ok(Reply::Done)
}

pub(super) fn withdraw(s: &mut State, key_hash: &[u8; 32]) -> Result<Reply, Refusal> {
    let open = s.external_request().filter(|open| open.key_hash == *key_hash);
    open.map(drop).ok_or_else(no_request)?;
    s.external_requests.remove(&mut s.journal, &0);
    Ok(Reply::Done)
}

fn no_request() -> Refusal {
    Refusal::new(Code::NotFound, "an open request for an external certificate (ambit trust external csr)", "none")
}

/// One entry: the request is spent, and what was certified is the authority of its root from here on.
pub(super) fn import(s: &mut State, at: At, import: &ExternalImport) -> Result<Reply, Refusal> {
    let id = root_id(&import.root);
    let known = |s: &State| s.externals.iter().any(|(_, row)| row.chain.first() == import.chain.first());
    if known(s) {
        let found = "one that was imported before";
        return Err(Refusal::new(Code::AlreadyExists, "a certificate for the open request", found));
    }
    let key_hash = s.external_request().map(|open| open.key_hash).ok_or_else(no_request)?;
    let judged = judge(&cell_row(s)?.trust_domain, &import.chain, &import.root, &key_hash, at.stamp)?;
    root::wrapped_to_all(s, &import.wrapped)?;
    match s.roots().remove(&id) {
        Some(row) if s.external(&id).is_some() && row.state == RootState::Active => {
            next(s, at, import, &judged, id, row)
        }
        Some(row) if s.external(&id).is_some() && row.state == RootState::Prepared => {
            instead(s, at, import, &judged, id, row)
        }
        Some(row) if row.state == RootState::Revoked && was_external(s, &id) => first(s, at, import, &judged, id),
        Some(row) => Err(root::wrong("a new root, or the active or prepared external one", &id, &row)),
        None => first(s, at, import, &judged, id),
    }
}

/// Whether this root's key was never here: whoever could sign by it then is outside still, and is asked for anew. As far back
/// as acts are remembered.
fn was_external(s: &State, id: &RootId) -> bool {
    s.acts.iter().any(|(_, row)| matches!(&row.act, Act::ImportRoot(root, _) if root == id))
}

/// The first authority under a root that is new here, or that was external and given up: the root is prepared, and in every
/// bundle.
fn first(s: &mut State, at: At, import: &ExternalImport, judged: &Judged, id: RootId) -> Result<Reply, Refusal> {
    let cell = cell_row(s)?;
    rotatable(s, &import.root, was_external(s, &id))?;
    let act = Act::ImportRoot(id, judged.key_hash());
    let approved = act::approve(s, at, &act, import.approved.as_ref())?;
    act::remember(s, at, &act, approved, &import.by);
    let active = root_id(&cell.root_der);
    insert(s, at, Kept { id, der: &import.root, wrapped: &import.wrapped })?;
    keep(s, at, import, judged, id);
    let serial = super::issue::serial(cell.epoch, at, 0);
    Ok(Reply::Root(Box::new(PreparedRoot { root: id, active, serial, stamp: at.stamp })))
}

/// The next authority under the active root: it signs from here on. Nobody has to hear of it before.
fn next(
    s: &mut State,
    at: At,
    import: &ExternalImport,
    judged: &Judged,
    id: RootId,
    row: RootRow,
) -> Result<Reply, Refusal> {
    let none = || Refusal::new(Code::BadRequest, "the record keys, certified by the new authority", "none");
    let keys = import.keys.clone().ok_or_else(none)?;
    may_sign(judged.lifetime(), at.stamp)?;
    replace(s, at, import, judged, id, row)?;
    s.key_set.put(&mut s.journal, 0, keys);
    touch(s, at);
    Ok(Reply::Done)
}

/// Another authority under a root that is prepared and could not be activated with the one that it has.
fn instead(
    s: &mut State,
    at: At,
    import: &ExternalImport,
    judged: &Judged,
    id: RootId,
    row: RootRow,
) -> Result<Reply, Refusal> {
    let cell = cell_row(s)?;
    replace(s, at, import, judged, id, row)?;
    let serial = super::issue::serial(cell.epoch, at, 0);
    Ok(Reply::Root(Box::new(PreparedRoot { root: id, active: root_id(&cell.root_der), serial, stamp: at.stamp })))
}

/// The root's key from here on is that of what was certified.
fn replace(
    s: &mut State,
    at: At,
    import: &ExternalImport,
    judged: &Judged,
    id: RootId,
    row: RootRow,
) -> Result<(), Refusal> {
    if s.externals_of(&id).count() >= PER_ROOT_MAX {
        let expected = format!("at most {PER_ROOT_MAX} authorities of a root in time");
        return Err(Refusal::new(Code::Busy, expected, "one more"));
    }
    s.roots.put(&mut s.journal, id, RootRow { wrapped: import.wrapped.clone(), ..row });
    keep(s, at, import, judged, id);
    // Shares of the former key open what signs no more.
    let mut sealing = s.sealing();
    if sealing.shares.remove(&id).is_some() {
        s.sealing.put(&mut s.journal, 0, sealing);
    }
    Ok(())
}

/// What was made with the key of this authority under the root, and says so.
pub(super) fn over_authority(
    s: &mut State,
    at: At,
    (root, key_hash): (&RootId, &[u8; 32]),
    command: &Command,
) -> Result<Reply, Refusal> {
    let now = s.external(root).map(|row| row.key_hash);
    if now != Some(*key_hash) {
        let found = now.map_or("none".to_owned(), |now| authority_of(&now));
        let expected = format!("authority {} under the root", authority_of(key_hash));
        return Err(Refusal::new(Code::StaleRevision, expected, format!("{found}: the same once more")));
    }
    super::within(s, at, command)
}

fn keep(s: &mut State, at: At, import: &ExternalImport, judged: &Judged, id: RootId) {
    let (chain, key_hash, lifetime) = (import.chain.clone(), judged.key_hash(), judged.lifetime());
    let row = ExternalRow { chain, key_hash, lifetime, imported: at.stamp };
    s.externals.put(&mut s.journal, (id, at.index.0), row);
    s.external_requests.remove(&mut s.journal, &0);
}

impl State {
    /// The authority under the active external root, certified anew while the cell stands still: one that ended lets no replica
    /// speak, so that nothing can be imported. Like the beginning of an incarnation, which follows at once, no command; by
    /// the rules of every import, but for the key that the cell has already.
    ///
    /// # Errors
    /// [`Code::NotFound`] where no external root is active, and those of [`judge`].
    pub fn certify_anew(&mut self, chain: Vec<Vec<u8>>, now: Stamp) -> Result<(), Refusal> {
        let none = || Refusal::new(Code::NotFound, "an active external root", "none");
        let (id, root) = self.active_root().ok_or_else(none)?;
        let key_hash = self.external(&id).ok_or_else(none)?.key_hash;
        let now = now.max(self.stamp());
        let judged = judge(&cell_row(self)?.trust_domain, &chain, &root.der, &key_hash, now)?;
        may_sign(judged.lifetime(), now)?;
        let row = ExternalRow { chain, key_hash, lifetime: judged.lifetime(), imported: now };
        // Above every index so far; those to come are far above it.
        let index = self.applied().0.saturating_add(1);
        self.externals.put(&mut self.journal, (id, index), row);
        Ok(())
    }
}

/// The end of what is to be signed, no later than that of the authority that signs it.
pub(super) fn bounded(s: &State, at: At, not_after: Stamp) -> Result<Stamp, Refusal> {
    let Some(ends) = s.authority_ends() else { return Ok(not_after) };
    if ends < at.stamp.plus_ms(LIFETIME_MS_MIN) {
        let expected = "an authority under the external root with time left (ambit trust external csr)";
        return Err(Refusal::new(Code::IssuerUnavailable, expected, format!("one that ends at {} (ms)", ends.0)));
    }
    Ok(not_after.min(ends))
}

/// Forgets authorities that ended, but for the last of each root.
pub(super) fn forget(s: &mut State, now: Stamp) {
    let all: Vec<((RootId, u64), Stamp)> =
        s.externals.iter().map(|(key, row)| (*key, row.lifetime.not_after)).collect();
    for ((root, index), _) in all.iter().filter(|(_, ends)| ends.plus_ms(SKEW_MS) < now) {
        if s.externals_of(root).last().is_some_and(|(last, _)| last != *index) {
            s.externals.remove(&mut s.journal, &(*root, *index));
        }
    }
}

/// A replica that is of this cell no more, or has another wrap key, opens no request.
pub(super) fn unwrap_from(s: &mut State, replica: u64) {
    if let Some(mut row) = s.external_request().cloned()
        && row.wrapped.remove(&replica).is_some()
    {
        s.external_requests.put(&mut s.journal, 0, row);
    }
}

/// Of a lost incarnation's request only what goes on can be opened.
pub(super) fn begin_anew(s: &mut State, goes_on: Option<u64>) {
    let Some(mut row) = s.external_request().cloned() else { return };
    row.wrapped.retain(|replica, _| Some(*replica) == goes_on);
    if row.wrapped.is_empty() {
        s.external_requests.remove(&mut s.journal, &0);
    } else {
        s.external_requests.put(&mut s.journal, 0, row);
    }
}
