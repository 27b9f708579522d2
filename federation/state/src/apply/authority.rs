//! Intermediates of replicas: renewed by themselves, tainted and revoked by operators.

use super::{At, cell_row, downstream, export, payload, touch};
use crate::authorities::{AuthorityRow, AuthorityState, DownstreamRow, RootId, authority_of};
use crate::command::Reply;
use crate::committed::ReplicaAuthority;
use crate::external::LIFE_MS_MAX;
use crate::objects::Member;
use crate::state::State;
use ambit_model::record::Kind;
use ambit_model::{Code, Lifetime, Refusal, ReplicaId, Stamp};
use std::collections::BTreeMap;

/// As design.md has it: an intermediate lasts a week at most.
pub(super) const LIFETIME_MS_MAX: u64 = 7 * 24 * 3_600_000;
/// Below this nothing could be renewed in time; cells outside a lab are configured for a day at least.
pub(super) const LIFETIME_MS_MIN: u64 = 5_000;
/// Intermediates of one replica at once: it renews at half of the lifetime, so a third is already one that was lost on its way.
const PER_REPLICA_MAX: usize = 16;
/// Denials of intermediates that the cell has no record of; each goes to every agent (I17).
const UNKNOWN_MAX: usize = 256;
/// Denials are kept this long after the intermediate ended: the clocks that judge differ.
const DENIAL_SKEW_MS: u64 = crate::ISSUER_MARGIN_MS;

pub(super) fn renew(
    s: &mut State,
    at: At,
    replica: u64,
    key_hash: &[u8; 32],
    lifetime_ms: u64,
) -> Result<Reply, Refusal> {
    let cell = cell_row(s)?;
    let none = || Refusal::new(Code::NotFound, "a replica of this cell", replica.to_string());
    let member = s.member(replica).cloned().ok_or_else(none)?;
    if !(LIFETIME_MS_MIN..=LIFETIME_MS_MAX).contains(&lifetime_ms) {
        let expected = format!("a lifetime of {LIFETIME_MS_MIN}-{LIFETIME_MS_MAX} ms");
        return Err(Refusal::new(Code::BadRequest, expected, lifetime_ms.to_string()));
    }
    let id = authority_of(key_hash);
    if s.authority(&id).is_some() || s.downstream(&id).is_some() {
        return Err(Refusal::new(Code::AlreadyExists, "a new issuing key", id));
    }
    let held = s.authorities.iter().filter(|(_, row)| row.replica == replica && row.lifetime.not_after > at.stamp);
    if held.count() >= PER_REPLICA_MAX {
        let expected = format!("at most {PER_REPLICA_MAX} intermediates of a replica at once");
        return Err(Refusal::new(Code::Busy, expected, "one more"));
    }
    let none = || Refusal::new(Code::IssuerUnavailable, "an active root", "none");
    let (root, _) = s.active_root().ok_or_else(none)?;
    let lifetime = Lifetime {
        not_before: at.stamp.minus_ms(crate::NOT_BEFORE_SLACK_MS),
        not_after: super::external::bounded(s, at, at.stamp.plus_ms(lifetime_ms))?,
    };
    let serial = super::issue::serial(cell.epoch, at, 0);
    keep_row(s, &member.authority);
    let row = AuthorityRow { replica, root, serial, lifetime, state: AuthorityState::Active };
    s.authorities.put(&mut s.journal, id.clone(), row);
    let member = Member { authority: id, authority_not_after: lifetime.not_after, ..member };
    s.members.put(&mut s.journal, replica, member);
    let (replica, epoch, key_hash) = (ReplicaId(replica), cell.epoch, *key_hash);
    Ok(Reply::Authority(Box::new(ReplicaAuthority { replica, epoch, root, key_hash, serial, lifetime })))
}

/// What a replica joined with gets a row of its own before it is replaced or judged.
fn keep_row(s: &mut State, id: &str) {
    if !s.authorities.contains(&id.to_owned())
        && let Some(row) = s.authority(id)
    {
        s.authorities.put(&mut s.journal, id.to_owned(), row);
    }
}

fn named(s: &State, id: &str) -> Result<AuthorityRow, Refusal> {
    s.authority(id).ok_or_else(|| Refusal::new(Code::NotFound, "an intermediate of this cell, by name", id))
}

pub(super) fn taint(s: &mut State, at: At, id: &str) -> Result<Reply, Refusal> {
    if let Some(row) = s.downstream(id).cloned() {
        if row.state != AuthorityState::Active {
            return Err(Refusal::new(Code::RootState, "an active intermediate", row.state.as_str()));
        }
        s.downstreams.put(&mut s.journal, id.to_owned(), DownstreamRow { state: AuthorityState::Tainted, ..row });
        touch(s, at);
        return Ok(Reply::Done);
    }
    if let Some((root, _, signs)) = s.external_named(id) {
        return taint_external(s, at, root, signs);
    }
    let row = named(s, id)?;
    if row.state != AuthorityState::Active {
        return Err(Refusal::new(Code::RootState, "an active intermediate", row.state.as_str()));
    }
    s.authorities.put(&mut s.journal, id.to_owned(), AuthorityRow { state: AuthorityState::Tainted, ..row });
    touch(s, at);
    Ok(Reply::Done)
}

/// Of an authority under an external root that another replaced: whatever is under its intermediates is issued anew.
fn taint_external(s: &mut State, at: At, root: RootId, signs: bool) -> Result<Reply, Refusal> {
    if signs {
        let expected = "an authority that another replaced: import the next first";
        return Err(Refusal::new(Code::RootState, expected, "the one that signs"));
    }
    let rows = s.authorities().into_iter();
    let replaced = rows.filter(|(_, row)| row.root == root && !s.is_under_last(row)).collect::<Vec<_>>();
    for (id, row) in replaced.into_iter().filter(|(_, row)| row.state == AuthorityState::Active) {
        s.authorities.put(&mut s.journal, id, AuthorityRow { state: AuthorityState::Tainted, ..row });
    }
    let replaced = |row: &DownstreamRow| row.root == root && s.is_replaced(&root, &row.serial);
    let active = |row: &DownstreamRow| row.state == AuthorityState::Active && replaced(row);
    let given: Vec<_> =
        s.downstreams().filter(|(_, row)| active(row)).map(|(id, row)| (id.clone(), row.clone())).collect();
    for (id, row) in given {
        s.downstreams.put(&mut s.journal, id, DownstreamRow { state: AuthorityState::Tainted, ..row });
    }
    touch(s, at);
    Ok(Reply::Done)
}

/// What a replica that goes signed with.
pub(super) fn taint_all_of(s: &mut State, at: At, replica: u64) {
    let active = |row: &AuthorityRow| row.replica == replica && row.state == AuthorityState::Active;
    for (id, row) in s.authorities().into_iter().filter(|(_, row)| active(row)) {
        s.authorities.put(&mut s.journal, id, AuthorityRow { state: AuthorityState::Tainted, ..row });
        touch(s, at);
    }
}

pub(super) fn revoke(s: &mut State, at: At, id: &str) -> Result<Reply, Refusal> {
    if let Some(row) = s.downstream(id) {
        if row.state != AuthorityState::Tainted {
            return Err(Refusal::new(Code::RootState, "a tainted intermediate", row.state.as_str()));
        }
        downstream::revoke(s, at, id)?;
        return Ok(Reply::Done);
    }
    if let Some((root, row, signs)) = s.external_named(id) {
        let until = row.lifetime.not_after;
        revocable_external(s, id, root, signs)?;
        revoke_all(s, at, &under_external(s, id))?;
        deny(s, at, id, until)?;
        return Ok(Reply::Done);
    }
    let row = named(s, id)?;
    if row.state != AuthorityState::Tainted {
        return Err(Refusal::new(Code::RootState, "a tainted intermediate", row.state.as_str()));
    }
    // A replica that is here and tainted renews within a second; one that does not is lost, and is to be removed.
    if let Some((replica, _)) = s.members().find(|(_, m)| m.authority == id) {
        let found = format!("replica {replica} has none but it");
        return Err(Refusal::new(Code::AuthorityInUse, "an intermediate that no replica signs with", found));
    }
    let until = row.lifetime.not_after;
    s.authorities.put(&mut s.journal, id.to_owned(), AuthorityRow { state: AuthorityState::Revoked, ..row });
    deny(s, at, id, until)?;
    Ok(Reply::Done)
}

/// No replica signs under an authority that is to be revoked, and what was signed under it was issued anew.
fn revocable_external(s: &State, id: &str, root: RootId, signs: bool) -> Result<(), Refusal> {
    let under = |authority: &str| s.authority(authority).is_some_and(|a| a.root == root && !s.is_under_last(&a));
    if let Some((replica, _)) = s.members().find(|(_, m)| signs || under(&m.authority)) {
        let found = format!("replica {replica} is under it, or under no later one yet");
        let expected = "an authority that another replaced, for all replicas";
        return Err(Refusal::new(Code::AuthorityInUse, expected, found));
    }
    let Under { intermediates, downstreams } = under_external(s, id);
    let intermediates = intermediates.into_iter().map(|(name, row)| (name, row.state));
    let mut all = intermediates.chain(downstreams.into_iter().map(|(name, row)| (name, row.state)));
    if let Some((name, _)) = all.find(|(_, state)| *state == AuthorityState::Active) {
        let found = format!("one with {name} under it, which is active");
        return Err(Refusal::new(Code::RootState, "a tainted authority (ambit trust taint)", found));
    }
    Ok(())
}

/// What was signed under something and is not revoked yet, by name.
struct Under {
    intermediates: Vec<(String, AuthorityRow)>,
    downstreams: Vec<(String, DownstreamRow)>,
}

fn under(s: &State, is_under: impl Fn(&RootId, &[u8; 16]) -> bool) -> Under {
    let live = |state: AuthorityState| state != AuthorityState::Revoked;
    let intermediates =
        s.authorities().into_iter().filter(|(_, row)| live(row.state) && is_under(&row.root, &row.serial));
    let downstreams = s.downstreams().filter(|(_, row)| live(row.state) && is_under(&row.root, &row.serial));
    let downstreams = downstreams.map(|(id, row)| (id.clone(), row.clone())).collect();
    Under { intermediates: intermediates.collect(), downstreams }
}

fn under_external(s: &State, id: &str) -> Under {
    under(s, |root, serial| s.external_over(root, serial).is_some_and(|row| row.authority() == id))
}

fn revoke_all(s: &mut State, at: At, all: &Under) -> Result<(), Refusal> {
    for (id, row) in &all.intermediates {
        let revoked = AuthorityRow { state: AuthorityState::Revoked, ..row.clone() };
        s.authorities.put(&mut s.journal, id.clone(), revoked);
        deny(s, at, id, row.lifetime.not_after)?;
    }
    all.downstreams.iter().try_for_each(|(id, _)| downstream::revoke(s, at, id))
}

/// Whatever hangs on a root that is gone. An authority under an external one may have signed what the cell knows nothing of:
/// the bundle ends that for whoever comes, and its name for who is connected.
pub(super) fn revoke_under(s: &mut State, at: At, root: &RootId) -> Result<(), Refusal> {
    let mut externals = BTreeMap::new();
    for (_, row) in s.externals_of(root) {
        let until: &mut Stamp = externals.entry(row.authority()).or_default();
        *until = row.lifetime.not_after.max(*until);
    }
    externals.iter().try_for_each(|(id, until)| deny(s, at, id, *until))?;
    revoke_all(s, at, &under(s, |of, _| of == root))
}

/// A cell that was restored knows nothing of what it gave after that backup. Whose such an intermediate is nobody can tell
/// any more, but it ends within the longest lifetime, and until then its name can be refused.
pub(super) fn deny_unknown(s: &mut State, at: At, id: &str) -> Result<Reply, Refusal> {
    if s.names_authority(id) {
        let expected = "an intermediate that the cell does not know, and that stands in no chain of all";
        return Err(Refusal::new(Code::RootState, expected, id));
    }
    if id.len() != 40 || !id.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
        return Err(Refusal::new(Code::NotFound, "an intermediate of this cell, or a key identifier (40 digits)", id));
    }
    let td = cell_row(s)?.trust_domain;
    let of_own = s.authority_denials.from((td.clone(), String::new())).take_while(|((origin, _), _)| *origin == td);
    let held = of_own.filter(|((_, of), _)| !s.names_authority(of)).count();
    if held >= UNKNOWN_MAX && !s.authority_denials.contains(&(td, id.to_owned())) {
        let expected = format!("at most {UNKNOWN_MAX} denials of intermediates that nothing is known of");
        return Err(Refusal::new(Code::Busy, expected, "one more"));
    }
    // What an outside CA signed lasts longer than whatever the cell signs.
    let outside = s.externals.len() > 0 || s.external_request().is_some();
    deny(s, at, id, at.stamp.plus_ms(if outside { LIFE_MS_MAX } else { LIFETIME_MS_MAX }))?;
    Ok(Reply::Done)
}

/// Whatever this intermediate signed is refused, here and at peers.
pub(super) fn deny(s: &mut State, at: At, id: &str, until: Stamp) -> Result<(), Refusal> {
    let key = (cell_row(s)?.trust_domain, id.to_owned());
    // A denial only grows.
    let until = s.authority_denials.get(&key).map_or(until, |before| until.max(*before));
    s.authority_denials.put(&mut s.journal, key, until);
    export(s, Kind::AuthorityDenial, id.to_owned(), payload(&until)?);
    touch(s, at);
    Ok(())
}

/// Forgets intermediates that no clock of the cell can still take for valid, and denials of such.
pub(super) fn forget(s: &mut State, now: Stamp) {
    let current: Vec<String> = s.members().map(|(_, m)| m.authority.clone()).collect();
    s.authorities
        .prune(&mut s.journal, |id, row| row.lifetime.not_after.plus_ms(DENIAL_SKEW_MS) < now && !current.contains(id));
    s.downstreams.prune(&mut s.journal, |_, row| row.lifetime.not_after.plus_ms(DENIAL_SKEW_MS) < now);
    s.authority_denials.prune(&mut s.journal, |_, until| until.plus_ms(DENIAL_SKEW_MS) < now);
}
