//! Downstream authorities: intermediates of clusters' own issuers, given to whoever shows an SVID of an entry that says so.
//! They last no longer than what they were given for: whatever ends the entry, or puts the node out, revokes them.

use super::authority::{LIFETIME_MS_MAX, LIFETIME_MS_MIN, deny};
use super::{At, cell_row, external, issue};
use crate::authorities::{AuthorityState, DownstreamRow, authority_of};
use crate::command::Reply;
use crate::committed::{DownstreamAuthority, Issuance, Subject};
use crate::objects::EntryRow;
use crate::state::State;
use ambit_model::{Code, EntryId, Generation, Lifetime, NodeId, Refusal};

/// At once in a cell; each is one issuer of one cluster.
const DOWNSTREAMS_MAX: usize = 256;
/// Of one entry at once: it is renewed at half of its life, so more were lost on their way.
const PER_ENTRY_MAX: usize = 8;
/// Rows, with those that were revoked: each of these is a denial, of which a peer takes a thousand from a cell (I17).
const ROWS_MAX: usize = 512;

/// What was asked for, and by which SVID.
pub(super) struct Asked<'a> {
    pub(super) node: &'a NodeId,
    pub(super) generation: Generation,
    pub(super) serial: &'a [u8; 16],
    pub(super) key_hash: &'a [u8; 32],
    pub(super) lifetime_ms: u64,
}

pub(super) fn new(s: &mut State, at: At, asked: &Asked<'_>) -> Result<Reply, Refusal> {
    let epoch = cell_row(s)?.epoch;
    // I4, I5: the node as it stands at this index, and the SVID on record, of an entry that still says so.
    issue::trusted_node(s, at, asked.node, asked.generation)?;
    let none = || Refusal::new(Code::PermissionDenied, "an SVID of an entry that is marked downstream", "another");
    let leaf = s.issued.get(asked.serial).filter(|leaf| leaf.binding == Some((*asked.node, asked.generation)));
    let leaf = leaf.filter(|leaf| leaf.lifetime.not_after > at.stamp).ok_or_else(none)?;
    if s.svid_denied(&leaf.spiffe_id, &leaf.authority, &leaf.serial) {
        return Err(Refusal::new(Code::SvidRevoked, "an SVID that was not revoked", leaf.spiffe_id.as_str()));
    }
    let entry = s.entry_of(leaf).filter(|row| row.entry.extras.downstream).ok_or_else(none)?;
    entry.entry.check_privileged()?;
    let (entry, ends) = (entry.entry.id.clone(), entry.entry.extras.expires_at);
    let asked_by = (leaf.authority.clone(), leaf.serial);
    if !(LIFETIME_MS_MIN..=LIFETIME_MS_MAX).contains(&asked.lifetime_ms) {
        let expected = format!("a lifetime of {LIFETIME_MS_MIN}-{LIFETIME_MS_MAX} ms");
        return Err(Refusal::new(Code::BadRequest, expected, asked.lifetime_ms.to_string()));
    }
    let id = authority_of(asked.key_hash);
    if s.authority(&id).is_some() || s.downstream(&id).is_some() {
        return Err(Refusal::new(Code::AlreadyExists, "a new issuing key", id));
    }
    room(s, at, &entry)?;
    let no_root = || Refusal::new(Code::IssuerUnavailable, "an active root", "none");
    let (root, _) = s.active_root().ok_or_else(no_root)?;
    let not_before = at.stamp.minus_ms(crate::NOT_BEFORE_SLACK_MS);
    let lifetime =
        Lifetime { not_before, not_after: external::bounded(s, at, at.stamp.plus_ms(asked.lifetime_ms))?.min(ends) };
    let serial = issue::serial(epoch, at, 0);
    let (node, generation, state) = (*asked.node, asked.generation, AuthorityState::Active);
    let row = DownstreamRow { entry: entry.clone(), node, generation, asked_by, root, serial, lifetime, state };
    s.downstreams.put(&mut s.journal, id, row);
    let key_hash = *asked.key_hash;
    Ok(Reply::Downstream(Box::new(DownstreamAuthority { entry, root, key_hash, serial, lifetime })))
}

fn room(s: &State, at: At, entry: &EntryId) -> Result<(), Refusal> {
    // What was revoked takes nobody's place. Its row is bounded apart, as it stays until its lifetime ends.
    let in_time = |row: &DownstreamRow| row.lifetime.not_after > at.stamp && row.state != AuthorityState::Revoked;
    let live = || s.downstreams().filter(|(_, row)| in_time(row));
    let (all, of_entry) = (live().count(), live().filter(|(_, row)| row.entry == *entry).count());
    if all < DOWNSTREAMS_MAX && of_entry < PER_ENTRY_MAX && s.downstreams.len() < ROWS_MAX {
        return Ok(());
    }
    let expected = format!("at most {DOWNSTREAMS_MAX} downstream authorities, {PER_ENTRY_MAX} of an entry");
    Err(Refusal::new(Code::Busy, expected, format!("{all}, {of_entry} of {entry}")))
}

/// Revokes those whose entry is gone or for somebody else by now, whose SVID was revoked, or whose node is out.
pub(super) fn end_unfounded(s: &mut State, at: At) -> Result<(), Refusal> {
    if s.downstreams.len() == 0 {
        return Ok(());
    }
    let ended: Vec<String> = s
        .downstreams()
        .filter(|(_, row)| row.state != AuthorityState::Revoked && !is_founded(s, row))
        .map(|(id, _)| id.clone())
        .collect();
    ended.iter().try_for_each(|id| revoke(s, at, id))
}

/// Whether it is still given for something.
pub(super) fn is_founded(s: &State, row: &DownstreamRow) -> bool {
    let entry = s.entry(&row.entry).filter(|e| e.entry.extras.downstream && s.fits(&e.entry, &row.node));
    let node = s.node(&row.node).filter(|node| node.state.bars_trust().is_none());
    // Whatever revokes the SVID that asked for it: the identity so far, the leaf alone, or its issuer.
    let (issuer, serial) = &row.asked_by;
    let revoked = |e: &EntryRow| s.svid_denied(&e.entry.spiffe_id, issuer, serial);
    entry.is_some_and(|e| !revoked(e))
        && node.is_some()
        && s.denied(&row.node).is_none_or(|denied| row.generation > denied)
}

pub(super) fn revoke(s: &mut State, at: At, id: &str) -> Result<(), Refusal> {
    let Some(row) = s.downstream(id).cloned() else { return Ok(()) };
    let until = row.lifetime.not_after;
    s.downstreams.put(&mut s.journal, id.to_owned(), DownstreamRow { state: AuthorityState::Revoked, ..row });
    deny(s, at, id, until)
}

impl State {
    /// The entry that a leaf on record was issued under, as far as it is there and still fits the node.
    pub(crate) fn entry_of(&self, leaf: &Issuance) -> Option<&EntryRow> {
        let (node, _) = leaf.binding.as_ref()?;
        let id = match &leaf.subject {
            Subject::Workload(id, _) | Subject::NamedWorkload(id, _, _) => id,
            Subject::Node | Subject::Admin | Subject::BreakGlass(_) | Subject::Minted(..) => return None,
        };
        let row = self.entry(id)?;
        (row.entry.spiffe_id == leaf.spiffe_id && self.fits(&row.entry, node)).then_some(row)
    }
}
