//! Nodes: who may come, who came, who is out.

use super::{At, cell::burn, cell_row, export, issue, payload, touch};
use crate::command::{Admission, Reply};
use crate::objects::{DenialRow, NodeRow, NodeState, TokenScope};
use crate::state::State;
use ambit_model::record::Kind;
use ambit_model::{ClusterId, Code, Generation, NodeId, Refusal, Revision, Stamp};

/// Denials kept for operators; the audit log (issue H) keeps all.
const DENIALS_MAX: usize = 1_000;

pub(super) fn allow_ek(s: &mut State, at: At, cluster: &ClusterId, nodes: &[NodeId]) -> Result<Reply, Refusal> {
    if !s.clusters.contains(cluster) {
        return Err(Refusal::new(Code::NotFound, "a cluster of this cell", cluster.as_str()));
    }
    for node in nodes {
        s.allowed_eks.put(&mut s.journal, (cluster.clone(), *node), true);
    }
    endorsements_changed(s, at);
    Ok(Reply::Done)
}

/// One entry: nonce consumed, token burnt, node admitted, issuance recorded (I5). Refuses before its first change.
pub(super) fn admit(s: &mut State, at: At, a: &Admission) -> Result<Reply, Refusal> {
    let cell = cell_row(s)?;
    if at.stamp > a.deadline {
        return Err(Refusal::new(Code::TicketExpired, "an answer before the deadline", "a later one"));
    }
    if s.nonces.contains(&a.nonce) {
        return Err(Refusal::new(Code::NonceConsumed, "a nonce used once", "one consumed before"));
    }
    if cell.endorsement_revision != a.endorsement_revision {
        let (now, then) = (cell.endorsement_revision, a.endorsement_revision);
        return Err(Refusal::new(Code::StaleAppraisal, format!("endorsement revision {now}"), then.to_string()));
    }
    if !s.clusters.contains(&a.cluster) {
        return Err(Refusal::new(Code::NotFound, "a cluster of this cell", a.cluster.as_str()));
    }
    let before = s.node(&a.node).cloned();
    let generation = next_generation(s, a, before.as_ref())?;
    let leaf = issue::node_leaf(s, at, &a.node, generation, &a.authority, a.key_hash)?;
    expected(s, at, a, before.as_ref())?;

    s.nonces.put(&mut s.journal, a.nonce, a.deadline);
    let row = NodeRow {
        cluster: a.cluster.clone(),
        generation,
        state: NodeState::Admitted,
        ak_name: a.ak_name.clone(),
        counters: a.counters,
        ek_class: a.ek_class.clone(),
        last_verdict: at.stamp,
        claims: a.claims.clone(),
        evidence_sha256: a.evidence_sha256,
    };
    s.nodes.put(&mut s.journal, a.node, row);
    issue::keep(s, &leaf);
    touch(s, at);
    Ok(Reply::Admitted(generation, leaf))
}

/// A known EK keeps its cluster and AK and never goes back in time; another AK needs `evict` first.
fn next_generation(s: &State, a: &Admission, before: Option<&NodeRow>) -> Result<Generation, Refusal> {
    let denied = s.denied(&a.node).unwrap_or(Generation(0));
    let Some(row) = before else { return Ok(Generation(denied.0 + 1)) };
    match row.state {
        NodeState::Banned => return Err(Refusal::new(Code::NodeUntrusted, "a node that is not banned", "banned")),
        NodeState::Evicted => return Ok(Generation(row.generation.0.max(denied.0) + 1)),
        NodeState::Admitted => {}
    }
    if row.cluster != a.cluster {
        return Err(Refusal::new(Code::AlreadyExists, row.cluster.to_string(), a.cluster.to_string()));
    }
    if row.ak_name != a.ak_name {
        return Err(Refusal::new(
            Code::AlreadyExists,
            "the AK this EK enrolled with (or `node evict` first)",
            "another",
        ));
    }
    if a.counters <= row.counters {
        let (then, now) = (row.counters, a.counters);
        return Err(Refusal::new(Code::ClockStepBack, format!("counters after {then:?}"), format!("{now:?}")));
    }
    Ok(Generation(row.generation.0.max(denied.0) + 1))
}

/// An EK is expected because it is on the allow-list, was admitted before, or carries an unused token, burnt here.
fn expected(s: &mut State, at: At, a: &Admission, before: Option<&NodeRow>) -> Result<(), Refusal> {
    let known = before.is_some_and(|n| n.state == NodeState::Admitted);
    if known || s.ek_allowed(&a.cluster, &a.node) {
        return Ok(());
    }
    match &a.join_token {
        Some(sha256) => burn(
            s,
            at,
            sha256,
            Code::JoinTokenInvalid,
            Code::JoinTokenUsed,
            |scope| matches!(scope, TokenScope::Node(cluster) if *cluster == a.cluster),
        ),
        None => Err(Refusal::new(Code::EkNotExpected, "an allow-listed EK or a join token", "neither")),
    }
}

pub(super) fn deny(
    s: &mut State,
    at: At,
    nonce: &[u8; 32],
    deadline: Stamp,
    row: &DenialRow,
) -> Result<Reply, Refusal> {
    if s.nonces.contains(nonce) {
        return Err(Refusal::new(Code::NonceConsumed, "a nonce used once", "one consumed before"));
    }
    if deadline >= at.stamp {
        s.nonces.put(&mut s.journal, *nonce, deadline);
    }
    s.denials.put(&mut s.journal, at.index.0, DenialRow { stamp: at.stamp, ..row.clone() });
    while s.denials.len() > DENIALS_MAX {
        let Some(oldest) = s.denials.iter().next().map(|(k, _)| *k) else { break };
        s.denials.remove(&mut s.journal, &oldest);
    }
    Ok(Reply::Done)
}

pub(super) fn ban(s: &mut State, at: At, id: &NodeId) -> Result<Reply, Refusal> {
    out(s, at, id, NodeState::Banned)
}

pub(super) fn evict(s: &mut State, at: At, id: &NodeId) -> Result<Reply, Refusal> {
    out(s, at, id, NodeState::Evicted)
}

/// The node's leaves up to its present generation are refused everywhere; its endpoints are gone.
fn out(s: &mut State, at: At, id: &NodeId, state: NodeState) -> Result<Reply, Refusal> {
    let Some(mut row) = s.node(id).cloned() else {
        return Err(Refusal::new(Code::NotFound, "a node of this cell", id.to_string()));
    };
    let cell = cell_row(s)?;
    row.state = state;
    let generation = row.generation;
    s.nodes.put(&mut s.journal, *id, row);
    s.node_denials.put(&mut s.journal, (cell.trust_domain, *id), generation);
    export(s, Kind::NodeDenial, id.to_string(), payload(&generation)?);
    super::objects::replace_endpoints(s, at, id, &[])?;
    endorsements_changed(s, at);
    touch(s, at);
    Ok(Reply::Done)
}

fn endorsements_changed(s: &mut State, at: At) {
    if let Some(mut row) = s.cell().cloned() {
        row.endorsement_revision = Revision(at.index.0);
        s.cell.put(&mut s.journal, 0, row);
    }
}

impl State {
    /// The generation up to which this cell itself refuses the node's leaves.
    pub fn denied(&self, id: &NodeId) -> Option<Generation> {
        let td = self.cell()?.trust_domain.clone();
        self.node_denials.get(&(td, *id)).copied()
    }
}
