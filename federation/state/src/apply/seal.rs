//! Replicas attested, and the root sealed to their TPMs.

use super::{At, cell_row, external, node, root};
use crate::authorities::{RootId, RootRow};
use crate::command::{Command, Reply};
use crate::objects::{EkFacts, JwtAuthorityRow, Member, TokenRow, TokenScope};
use crate::sealing::{
    AttestedReplica, REPLICAS, ReplicaDenial, ReplicaVerdict, SEALED, Seal, SharesRow, replicas_cluster,
};
use crate::state::State;
use ambit_model::bundle::RootState;
use ambit_model::{ClusterId, Code, NodeId, ObjectName, Refusal, Stamp};
use std::collections::{BTreeMap, BTreeSet};

fn unattested(found: impl Into<String>) -> Refusal {
    Refusal::new(Code::ReplicaUnattested, "a replica whose attested TPM certified its wrap key", found)
}

/// One entry: nonce consumed, verdict kept, and from here on it is wrapped to the key in the TPM. The allow-list of
/// [`REPLICAS`] is the operator's approval of the machine; a token says which number and address it may join with.
pub(super) fn attest(s: &mut State, at: At, v: &ReplicaVerdict) -> Result<Reply, Refusal> {
    let cell = cell_row(s)?;
    if at.stamp > v.deadline {
        return Err(Refusal::new(Code::TicketExpired, "an answer before the deadline", "a later one"));
    }
    if s.nonces.contains(&v.nonce) {
        return Err(Refusal::new(Code::NonceConsumed, "a nonce used once", "one consumed before"));
    }
    let judged = (v.endorsement_revision, v.attested.policy_revision);
    if (cell.endorsement_revision, cell.policy_revision) != judged {
        let now = format!("revisions {} and {}", cell.endorsement_revision, cell.policy_revision);
        return Err(Refusal::new(Code::StaleAppraisal, now, format!("{} and {}", judged.0, judged.1)));
    }
    let new = &v.attested;
    speaks_for(s, at, v)?;
    if !s.ek_allowed(&replicas_cluster()?, &new.ek) {
        let expected = format!("an EK on the allow-list of cluster {REPLICAS}");
        return Err(Refusal::new(Code::EkNotExpected, expected, new.ek.to_string()));
    }
    if new.policy.name.as_str() != REPLICAS {
        let expected = format!("the appraisal policy {REPLICAS}");
        return Err(Refusal::new(Code::AppraisalPolicyMissing, expected, new.policy.name.as_str()));
    }
    if let Some((other, before)) = s.attested_ek(&new.ek) {
        if other != v.replica {
            let expected = "a TPM that is no other replica's";
            return Err(Refusal::new(Code::AlreadyExists, expected, format!("that of replica {other}")));
        }
        if new.counters <= before.counters {
            let (then, now) = (format!("counters after {:?}", before.counters), format!("{:?}", new.counters));
            return Err(Refusal::new(Code::ClockStepBack, then, now));
        }
    }
    let changed = s.member(v.replica).cloned().filter(|member| member.wrap_key != new.wrap_key);
    if changed.is_some() && s.is_sealed() && opens_alone(s, v.replica) {
        let expected = "another replica that opens what was wrapped to the former key";
        return Err(Refusal::new(Code::SealIncomplete, expected, format!("replica {} alone", v.replica)));
    }
    s.nonces.put(&mut s.journal, v.nonce, v.deadline);
    let row = AttestedReplica { stamp: at.stamp, stands: true, ..new.clone() };
    s.attested_replicas.put(&mut s.journal, v.replica, row);
    if let Some(mut member) = changed {
        member.wrap_key.clone_from(&new.wrap_key);
        s.members.put(&mut s.journal, v.replica, member);
        unwrap(s, v.replica);
    }
    Ok(Reply::Done)
}

fn alone(wrapped: &BTreeMap<u64, Vec<u8>>, replica: u64) -> bool {
    wrapped.len() == 1 && wrapped.contains_key(&replica)
}

/// Whether something is wrapped to this replica and to no other.
fn opens_alone(s: &State, replica: u64) -> bool {
    let roots = s.roots.iter().map(|(_, row)| &row.wrapped);
    let request = s.external_request().map(|open| &open.wrapped);
    let jwt = s.jwt_authorities().map(|row| &row.wrapped);
    roots.chain(jwt).chain(request).any(|wrapped| alone(wrapped, replica))
}

/// What was wrapped to a replica's former key is wrapped to the new one, by whoever opens it. What it opens alone stays: that
/// is in no sealed cell, and until then it keeps the file with its former key.
fn unwrap(s: &mut State, replica: u64) {
    let held = |wrapped: &BTreeMap<u64, Vec<u8>>| wrapped.contains_key(&replica) && !alone(wrapped, replica);
    for (id, mut row) in s.roots.iter().map(|(id, row)| (*id, row.clone())).collect::<Vec<_>>() {
        if held(&row.wrapped) {
            row.wrapped.remove(&replica);
            s.roots.put(&mut s.journal, id, row);
        }
    }
    for (n, mut row) in s.jwt_authorities.iter().map(|(n, row)| (*n, row.clone())).collect::<Vec<_>>() {
        if held(&row.wrapped) {
            row.wrapped.remove(&replica);
            s.jwt_authorities.put(&mut s.journal, n, row);
        }
    }
    // Whoever else opens the request imports what comes of it, and wraps that to all.
    if s.external_request().is_some_and(|open| held(&open.wrapped)) {
        external::unwrap_from(s, replica);
    }
    // Of these there is a new one as soon as a replica lacks one.
    for (n, mut row) in s.ticket_keys.iter().map(|(n, row)| (*n, row.clone())).collect::<Vec<_>>() {
        if row.wrapped.remove(&replica).is_some() {
            s.ticket_keys.put(&mut s.journal, n, row);
        }
    }
}

/// Who has a token may speak for the replica that it is for, until there is one with that number.
fn speaks_for(s: &State, at: At, v: &ReplicaVerdict) -> Result<(), Refusal> {
    let Some(token) = &v.attested.token else {
        let none = || Refusal::new(Code::NotFound, "a replica of this cell", v.replica.to_string());
        return s.member(v.replica).map(drop).ok_or_else(none);
    };
    if s.member(v.replica).is_some() {
        let found = format!("replica {}, which is one already", v.replica);
        return Err(Refusal::new(Code::AlreadyExists, "a replica that is to join", found));
    }
    let row = s.token(token).filter(|row| !row.used && row.expires >= at.stamp);
    match row.map(|row| &row.scope) {
        Some(TokenScope::Replica(replica, _)) if *replica == v.replica => Ok(()),
        _ => Err(Refusal::new(Code::JoinTokenInvalid, "an unused token of this replica", "another")),
    }
}

/// Whether a machine may join with this number: any, or only the one that was attested, by the same token, with the same TLS
/// key, under the policies of now.
pub(super) fn may_join(s: &State, replica: u64, token: &[u8; 32], tls_key_hash: &[u8; 32]) -> Result<(), Refusal> {
    if !s.attested_only() {
        return Ok(());
    }
    let none = || unattested(format!("replica {replica}, which was not attested"));
    let row = s.attested_replica(replica).ok_or_else(none)?;
    if row.token != Some(*token) || row.tls_key_hash != *tls_key_hash {
        return Err(unattested(format!("replica {replica}, attested with another token or TLS key")));
    }
    let now = cell_row(s)?.policy_revision;
    if row.policy_revision != now {
        let found = format!("revision {}: attest again", row.policy_revision);
        return Err(Refusal::new(Code::StaleAppraisal, format!("a replica attested at revision {now}"), found));
    }
    Ok(())
}

/// What another machine proved, with another token or key, says nothing of the one that joins.
pub(super) fn joins(s: &mut State, replica: u64, token: &[u8; 32], tls_key_hash: &[u8; 32]) {
    let of_another = |row: &AttestedReplica| row.token != Some(*token) || row.tls_key_hash != *tls_key_hash;
    if s.attested_replicas.get(&replica).is_some_and(of_another) {
        s.attested_replicas.remove(&mut s.journal, &replica);
    }
}

/// What is recorded of a replica has the keys that its TPM vouched for, where there must be some.
pub(super) fn may_be_member(s: &State, replica: u64, member: &Member) -> Result<(), Refusal> {
    if !s.attested_only() {
        return Ok(());
    }
    let admitted = s.admissions.get(&replica).map(|admission| admission.tls_key_hash);
    // Another token of its number may have been attested with since it was admitted.
    let same = s.members.contains(&replica) || admitted == s.attested_replica(replica).map(|row| row.tls_key_hash);
    if !same || !s.wraps_to_tpm(replica, member) {
        return Err(unattested(format!("replica {replica} with another key")));
    }
    Ok(())
}

/// Who was attested to join and did not in the time of his token is attested no more.
pub(super) fn forget(s: &mut State, now: Stamp) {
    // A token that was used is that of a replica on its way in.
    let over = |row: &TokenRow| row.expires < now && !row.used;
    let ended = |token: Option<&[u8; 32]>| token.and_then(|token| s.token(token)).is_none_or(over);
    let late: Vec<u64> = s
        .attested_replicas
        .iter()
        .filter(|(id, row)| !s.members.contains(id) && ended(row.token.as_ref()))
        .map(|(id, _)| *id)
        .collect();
    for id in late {
        s.attested_replicas.remove(&mut s.journal, &id);
    }
}

/// Refused while a replica would not be let in again.
pub(super) fn attested_only(s: &mut State, only: bool) -> Result<Reply, Refusal> {
    cell_row(s)?;
    if only && let Some(id) = s.unattested().first() {
        return Err(unattested(format!("replica {id}, which was not attested")));
    }
    if !only && s.is_sealed() {
        let expected = "attested replicas only, as long as the root is sealed to their TPMs";
        return Err(Refusal::new(Code::SealIncomplete, expected, "any replica"));
    }
    let row = crate::sealing::SealingRow { attested_only: only, ..s.sealing() };
    s.sealing.put(&mut s.journal, 0, row);
    Ok(Reply::Done)
}

/// Recovery shares of a root were made, as its approvers said.
pub(super) fn shared(s: &mut State, at: At, id: &RootId, threshold: u8, holders: &[ObjectName]) {
    let mut row = s.sealing();
    row.shares.insert(*id, SharesRow { threshold, holders: holders.to_vec(), made: at.stamp });
    s.sealing.put(&mut s.journal, 0, row);
}

/// Keeps the key of each root and JWT authority for the attested keys of all replicas, and for nothing else.
pub(super) fn seal(s: &mut State, seal: &Seal) -> Result<Reply, Refusal> {
    let mut cell = cell_row(s)?;
    if let Some(lack) = s.seal_lacks().into_iter().next() {
        return Err(Refusal::new(Code::SealIncomplete, "every replica attested and every root with shares", lack));
    }
    let members: BTreeMap<u64, Vec<u8>> = s.members().map(|(id, m)| (id, m.wrap_key.clone())).collect();
    if seal.to != members {
        return Err(Refusal::new(Code::StaleRevision, "the wrap keys of the replicas of now", "others"));
    }
    let roots: BTreeMap<RootId, RootRow> =
        s.roots().into_iter().filter(|(_, row)| row.state != RootState::Revoked).collect();
    let jwt: Vec<(u64, JwtAuthorityRow)> = s
        .jwt_authorities
        .iter()
        .filter(|(_, row)| !row.wrapped.is_empty())
        .map(|(index, row)| (*index, row.clone()))
        .collect();
    let kids: BTreeSet<&String> = jwt.iter().map(|(_, row)| &row.kid).collect();
    let whole = |wrapped: &BTreeMap<u64, Vec<u8>>| wrapped.keys().eq(members.keys());
    let all = seal.roots.keys().eq(roots.keys())
        && seal.jwt.keys().collect::<BTreeSet<_>>() == kids
        && seal.roots.values().chain(seal.jwt.values()).all(whole);
    if !all {
        return Err(Refusal::new(Code::StaleRevision, "every key of now, wrapped to every replica", "others"));
    }
    root::keep_first(s);
    for (id, row) in roots {
        let wrapped = seal.roots.get(&id).cloned().unwrap_or_default();
        s.roots.put(&mut s.journal, id, RootRow { wrapped, ..row });
    }
    for (index, row) in jwt {
        let wrapped = seal.jwt.get(&row.kid).cloned().unwrap_or_default();
        s.jwt_authorities.put(&mut s.journal, index, JwtAuthorityRow { wrapped, ..row });
    }
    SEALED.clone_into(&mut cell.root_form);
    s.cell.put(&mut s.journal, 0, cell);
    Ok(Reply::Done)
}

/// What a command wraps, where it wraps something to replicas.
fn wrapped_by(command: &Command) -> Option<&BTreeMap<u64, Vec<u8>>> {
    match command {
        Command::RotateTicketKey(wrapped)
        | Command::WrapRoot(_, wrapped)
        | Command::PrepareRoot(_, wrapped)
        | Command::PutJwtAuthority(_, wrapped)
        | Command::WrapJwtAuthority(_, wrapped)
        | Command::RequestExternal { wrapped, .. } => Some(wrapped),
        Command::ImportExternal(import) => Some(&import.wrapped),
        _ => None,
    }
}

/// Where the root is sealed nothing is wrapped to a key that is not named: it might be in a file, or in no TPM any more.
pub(super) fn says_to_which_keys(s: &State, command: &Command) -> Result<(), Refusal> {
    if !s.is_sealed() || wrapped_by(command).is_none() {
        return Ok(());
    }
    Err(Refusal::new(Code::ReplicaUnattested, "the attested wrap keys to which it is wrapped", "none named"))
}

/// Exactly those to which it is wrapped, as they are now.
pub(super) fn are_wrap_keys(s: &State, to: &BTreeMap<u64, Vec<u8>>, command: &Command) -> Result<(), Refusal> {
    if wrapped_by(command).is_none_or(|wrapped| !wrapped.keys().eq(to.keys())) {
        return Err(Refusal::new(Code::BadRequest, "something wrapped to these replicas", "something else"));
    }
    let known = s.wrap_keys();
    for (id, key) in to {
        let none = || Refusal::new(Code::NotFound, "replicas of this cell", id.to_string());
        if s.member(*id).ok_or_else(none)?.wrap_key != *key {
            let found = format!("another of replica {id}: the same once more");
            return Err(Refusal::new(Code::StaleRevision, "the wrap keys of the replicas of now", found));
        }
        if !known.contains_key(id) {
            return Err(unattested(format!("replica {id}")));
        }
    }
    Ok(())
}

/// Replicas whose TPM is expected no more are attested no more: the root is shown as unsealed until they are replaced.
pub(super) fn put_out(s: &mut State, gone: impl Fn(&NodeId, &EkFacts) -> bool) {
    let out: Vec<u64> =
        s.attested_replicas.iter().filter(|(_, row)| gone(&row.ek, &facts(row))).map(|(id, _)| *id).collect();
    for id in out {
        stands_no_more(s, id);
    }
}

fn stands_no_more(s: &mut State, id: u64) {
    if let Some(row) = s.attested_replicas.get(&id).cloned() {
        s.attested_replicas.put(&mut s.journal, id, AttestedReplica { stands: false, ..row });
    }
}

/// Bad evidence by the rules of now: whoever showed it, and whose TPM that is, is attested no more. What it can open already
/// it can open still.
pub(super) fn deny(s: &mut State, at: At, denial: &ReplicaDenial) -> Result<Reply, Refusal> {
    let cell = cell_row(s)?;
    let reply = node::deny(s, at, &denial.nonce, denial.deadline, &denial.row, None)?;
    if (cell.endorsement_revision, cell.policy_revision) == (denial.endorsement_revision, denial.policy_revision) {
        let out: Vec<u64> = s
            .attested_replicas
            .iter()
            .filter(|(id, row)| Some(**id) == denial.replica || row.ek == denial.row.node)
            .map(|(id, _)| *id)
            .collect();
        for id in out {
            stands_no_more(s, id);
        }
    }
    Ok(reply)
}

/// As rules of endorsement see it.
fn facts(row: &AttestedReplica) -> EkFacts {
    EkFacts {
        class: row.ek_class.clone(),
        root_sha256: row.ek_root_sha256,
        manufacturer: row.manufacturer.clone(),
        model: row.model.clone(),
        unreadable: false,
        firmware_version: row.firmware_version,
        by_allow_list: true,
    }
}

/// A machine of [`REPLICAS`] is a replica's, never a node.
pub(super) fn not_of_replicas(cluster: &ClusterId) -> Result<(), Refusal> {
    if cluster.as_str() == REPLICAS {
        let found = "a node in the cluster of the cell's replicas";
        return Err(Refusal::new(Code::PermissionDenied, "a cluster of nodes", found));
    }
    Ok(())
}
