//! The cell itself: founding, replicas, tokens, clusters, ticks.

use super::{At, cell_row, export, payload, touch};
use crate::command::{Command, Reply};
use crate::committed::{ReplicaAdmission, SealedReport};
use crate::objects::{CellRow, ClusterRow, KeySetRow, Member, TicketKeyRow, TokenRow, TokenScope};
use crate::state::State;
use ambit_model::record::Kind;
use ambit_model::{ClusterId, Code, Lifetime, Refusal, ReplicaId, Revision};
use std::collections::BTreeMap;

/// What a replica joins with lasts this long; from then on it renews by itself, as its configuration says.
pub(super) const REPLICA_MS: u64 = 7 * 24 * 3_600_000;
/// Tokens, spent or not, are forgotten this long after they end, so that "used" can still be told from "unknown".
const TOKEN_KEEP_MS: u64 = 3_600_000;
/// Ticket keys kept: the sealing one and the one before, whose tickets may still be open.
const TICKET_KEYS: usize = 2;
const REPORTS_MAX: usize = 1_000;

pub(super) fn found(
    s: &mut State,
    row: &CellRow,
    id: u64,
    member: &Member,
    keys: &KeySetRow,
) -> Result<Reply, Refusal> {
    if s.cell().is_some() {
        return Err(Refusal::new(Code::AlreadyExists, "an empty cell", "a founded one"));
    }
    s.cell.put(&mut s.journal, 0, row.clone());
    s.members.put(&mut s.journal, id, member.clone());
    s.key_set.put(&mut s.journal, 0, keys.clone());
    Ok(Reply::Done)
}

pub(super) fn tick(s: &mut State, at: At) -> Result<Reply, Refusal> {
    let now = at.stamp;
    s.nonces.prune(&mut s.journal, |_, deadline| *deadline < now);
    s.tokens.prune(&mut s.journal, |_, t| t.expires.plus_ms(TOKEN_KEEP_MS) < now);
    super::issue::forget(s, now);
    super::deny::forget(s, now);
    super::attest::late(s, at)?;
    super::jwt::tick(s, at)?;
    super::objects::expire(s, at)?;
    super::authority::forget(s, now);
    super::external::forget(s, now);
    super::seal::forget(s, now);
    super::egress::forget(s, at);
    super::grant::forget(s, now);
    super::standby::forget(s, now);
    // Stamps never go backwards, so neither do those of the requests.
    while let Some((_, key)) = s.dedupe_by_age.pop_front_if(|(stamp, _)| stamp.plus_ms(crate::DEDUPE_MS) < now) {
        s.dedupe.remove(&mut s.journal, &key);
    }
    Ok(Reply::Done)
}

pub(super) fn create_token(s: &mut State, sha256: &[u8; 32], row: &TokenRow) -> Result<Reply, Refusal> {
    if let TokenScope::Node(cluster) = &row.scope
        && !s.clusters.contains(cluster)
    {
        return Err(Refusal::new(Code::NotFound, "a cluster of this cell", cluster.as_str()));
    }
    s.tokens.put(&mut s.journal, *sha256, row.clone());
    Ok(Reply::Done)
}

/// Burns a token whose scope is accepted by `fits`, or says why not. The caller has made all other checks before.
pub(super) fn burn(
    s: &mut State,
    at: At,
    sha256: &[u8; 32],
    invalid: Code,
    used: Code,
    fits: impl Fn(&TokenScope) -> bool,
) -> Result<(), Refusal> {
    let row = s.tokens.get(sha256).filter(|t| fits(&t.scope) && t.expires >= at.stamp).cloned();
    let Some(mut row) = row else {
        return Err(Refusal::new(invalid, "a known, unexpired token of this scope", "another"));
    };
    if row.used {
        return Err(Refusal::new(used, "an unused token", "one that was used"));
    }
    row.used = true;
    s.tokens.put(&mut s.journal, *sha256, row);
    Ok(())
}

pub(super) fn admit_replica(
    s: &mut State,
    at: At,
    token: &[u8; 32],
    replica: u64,
    issuer_key_hash: &[u8; 32],
    tls_key_hash: &[u8; 32],
) -> Result<Reply, Refusal> {
    let cell = cell_row(s)?;
    if s.members.contains(&replica) {
        return Err(Refusal::new(Code::AlreadyExists, "a replica number not in use", replica.to_string()));
    }
    super::seal::may_join(s, replica, token, tls_key_hash)?;
    let not_after = super::external::bounded(s, at, at.stamp.plus_ms(REPLICA_MS))?;
    burn(
        s,
        at,
        token,
        Code::JoinTokenInvalid,
        Code::JoinTokenUsed,
        |scope| matches!(scope, TokenScope::Replica(n, _) if *n == replica),
    )?;
    super::seal::joins(s, replica, token, tls_key_hash);
    let admission = ReplicaAdmission {
        replica: ReplicaId(replica),
        issuer_key_hash: *issuer_key_hash,
        tls_key_hash: *tls_key_hash,
        serial: super::issue::serial(cell.epoch, at, 0),
        lifetime: Lifetime { not_before: at.stamp.minus_ms(crate::NOT_BEFORE_SLACK_MS), not_after },
    };
    s.admissions.put(&mut s.journal, replica, admission.clone());
    Ok(Reply::Replica(Box::new(admission)))
}

pub(super) fn put_member(s: &mut State, id: u64, member: &Member, keys: &KeySetRow) -> Result<Reply, Refusal> {
    if !s.admissions.contains(&id) && !s.members.contains(&id) {
        return Err(Refusal::new(Code::NotFound, "an admitted replica", id.to_string()));
    }
    super::seal::may_be_member(s, id, member)?;
    s.members.put(&mut s.journal, id, member.clone());
    s.key_set.put(&mut s.journal, 0, keys.clone());
    Ok(Reply::Done)
}

pub(super) fn over_key_set(s: &mut State, at: At, replaced: &[u8; 32], command: &Command) -> Result<Reply, Refusal> {
    let now = s.key_set().cloned().unwrap_or_default().sha256();
    if now != *replaced {
        let found = format!("{}: the same once more", hex::encode(now));
        return Err(Refusal::new(Code::StaleRevision, format!("key set {}", hex::encode(replaced)), found));
    }
    super::within(s, at, command)
}

/// Whatever the replica signed is issued anew: its keys are nobody's any more, or somebody else's.
pub(super) fn remove_member(s: &mut State, at: At, id: u64) -> Result<Reply, Refusal> {
    if !s.members.contains(&id) {
        // Its number may be promised to another already.
        return Err(Refusal::new(Code::NotFound, "a replica of this cell", id.to_string()));
    }
    super::authority::taint_all_of(s, at, id);
    s.admissions.remove(&mut s.journal, &id);
    super::root::unwrap_from(s, id);
    super::external::unwrap_from(s, id);
    s.attested_replicas.remove(&mut s.journal, &id);
    s.members.remove(&mut s.journal, &id);
    super::jwt::without(s, at, id)?;
    Ok(Reply::Done)
}

pub(super) fn rotate_ticket_key(s: &mut State, at: At, wrapped: &BTreeMap<u64, Vec<u8>>) -> Result<Reply, Refusal> {
    s.ticket_keys.put(&mut s.journal, at.index.0, TicketKeyRow { made: at.stamp, wrapped: wrapped.clone() });
    while s.ticket_keys.len() > TICKET_KEYS {
        let Some(oldest) = s.ticket_keys.iter().next().map(|(k, _)| *k) else { break };
        s.ticket_keys.remove(&mut s.journal, &oldest);
    }
    Ok(Reply::Done)
}

pub(super) fn register_cluster(
    s: &mut State,
    at: At,
    id: &ClusterId,
    roots: &[(Vec<u8>, String)],
    attest_interval_ms: u64,
) -> Result<Reply, Refusal> {
    if s.clusters.contains(id) {
        return Err(Refusal::new(Code::AlreadyExists, "a cluster name not in use", id.as_str()));
    }
    let mut cell = cell_row(s)?;
    cell.endorsement_revision = Revision(at.index.0);
    s.cell.put(&mut s.journal, 0, cell.clone());
    s.clusters.put(&mut s.journal, id.clone(), ClusterRow { ek_roots: roots.to_vec(), attest_interval_ms });
    // A peer that claimed the name gives way, with what it showed under it: no cell keeps another from a name.
    if s.foreign_clusters.remove(&mut s.journal, id).is_some() {
        let own = cell.trust_domain.clone();
        s.endpoints.prune(&mut s.journal, |(td, _), row| *td != own && row.object.cluster == *id);
    }
    export(s, Kind::Cluster, id.to_string(), payload(&cell.trust_domain)?);
    touch(s, at);
    Ok(Reply::Done)
}

pub(super) fn seal_report(s: &mut State, at: At, drill: &str, sha256: [u8; 32]) -> Result<Reply, Refusal> {
    let report = SealedReport { drill: drill.to_owned(), sha256, stamp: at.stamp, index: at.index };
    s.reports.put(&mut s.journal, at.index.0, report.clone());
    while s.reports.len() > REPORTS_MAX {
        let Some(oldest) = s.reports.iter().next().map(|(k, _)| *k) else { break };
        s.reports.remove(&mut s.journal, &oldest);
    }
    Ok(Reply::Report(Box::new(report)))
}
