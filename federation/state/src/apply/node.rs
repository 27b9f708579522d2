//! Admitting nodes: who may come, and who was refused.

use super::{At, attest, cell::burn, cell_row, endorse, incarnation, issue};
use crate::command::{Admission, Against, Reply};
use crate::objects::{DenialRow, NodeRow, NodeState, TokenScope};
use crate::state::State;
use ambit_model::{Code, Generation, NodeId, Refusal, Stamp};

/// One entry: nonce consumed, token burnt, node admitted, issuance recorded (I5). Refuses before its first change.
pub(super) fn admit(s: &mut State, at: At, a: &Admission) -> Result<Reply, Refusal> {
    let cell = cell_row(s)?;
    super::seal::not_of_replicas(&a.cluster)?;
    if at.stamp > a.deadline {
        return Err(Refusal::new(Code::TicketExpired, "an answer before the deadline", "a later one"));
    }
    if s.nonces.contains(&a.nonce) {
        return Err(Refusal::new(Code::NonceConsumed, "a nonce used once", "one consumed before"));
    }
    if cell.endorsement_revision != a.endorsement_revision {
        endorse::stands_still(s, a)?;
    }
    if cell.policy_revision != a.policy_revision {
        let (now, then) = (cell.policy_revision, a.policy_revision);
        return Err(Refusal::new(Code::StaleAppraisal, format!("policy revision {now}"), then.to_string()));
    }
    if !s.clusters.contains(&a.cluster) {
        return Err(Refusal::new(Code::NotFound, "a cluster of this cell", a.cluster.as_str()));
    }
    attest::boot_known(s, &a.node, &a.seen)?;
    let before = s.node(&a.node).cloned();
    let generation = next_generation(s, a, before.as_ref())?;
    let leaf = issue::node_leaf(s, at, &a.node, generation, &a.authority, a.key_hash)?;
    expected(s, at, a, before.as_ref())?;

    s.nonces.put(&mut s.journal, a.nonce, a.deadline);
    #[cfg(ambit_mutant)]
    if crate::mutant::is("nonce-kept") {
        s.nonces.remove(&mut s.journal, &a.nonce);
    }
    let listed = s.ek_allowed(&a.cluster, &a.node);
    let row = NodeRow {
        cluster: a.cluster.clone(),
        generation,
        state: NodeState::Admitted,
        ak: a.ak.clone(),
        ek: crate::objects::EkFacts { by_allow_list: listed, ..a.ek.clone() },
        claims: a.claims.clone(),
    };
    s.nodes.put(&mut s.journal, a.node, row);
    attest::stand(s, at, &a.node, generation, &a.seen)?;
    issue::keep(s, &leaf);
    // No slice but the node's own depends on this (or `stand` saw that one does), and it gets that with its
    // stream: ten thousand others need not look.
    Ok(Reply::Admitted(generation, Box::new(leaf)))
}

/// A known EK keeps its cluster and AK and never goes back in time; another AK needs `evict` first.
fn next_generation(s: &State, a: &Admission, before: Option<&NodeRow>) -> Result<Generation, Refusal> {
    // What a lost incarnation admitted and nobody remembers has numbers below.
    let denied = s.denied(&a.node).unwrap_or_default().max(incarnation::generations_before(s));
    let Some(row) = before else { return Ok(Generation(denied.0 + 1)) };
    if let Some(code) = row.state.bars_enrolment() {
        return Err(Refusal::new(code, "a node that may enrol", row.state.as_str()));
    }
    if !row.is_known() {
        return Ok(Generation(row.generation.0.max(denied.0) + 1));
    }
    if row.cluster != a.cluster {
        return Err(Refusal::new(Code::AlreadyExists, row.cluster.to_string(), a.cluster.to_string()));
    }
    if row.ak.name != a.ak.name {
        return Err(Refusal::new(Code::AkChanged, "the AK this EK enrolled with", "another"));
    }
    if let Some(then) = s.standing(&a.node).map(|standing| standing.counters)
        && a.seen.counters <= then
    {
        let now = a.seen.counters;
        return Err(Refusal::new(Code::ClockStepBack, format!("counters after {then:?}"), format!("{now:?}")));
    }
    Ok(Generation(row.generation.0.max(denied.0) + 1))
}

/// An EK is expected because it is on the allow-list, joined by a token before, or carries an unused one, burnt here. Who
/// was on the list and is no longer is a stranger. Who joined came with a certificate, and comes again with one.
fn expected(s: &mut State, at: At, a: &Admission, before: Option<&NodeRow>) -> Result<(), Refusal> {
    if s.ek_allowed(&a.cluster, &a.node) {
        return Ok(());
    }
    if before.is_some_and(|n| n.is_known() && !n.ek.by_allow_list) {
        let found = "no EK certificate";
        let refusal = || Refusal::new(Code::EkChainUntrusted, "an EK certificate, as when the node joined", found);
        return a.ek.root_sha256.map(drop).ok_or_else(refusal);
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

/// A nonce is spent and the reason kept. Where it speaks against a node that is in, the node is out at once.
pub(super) fn deny(
    s: &mut State,
    at: At,
    nonce: &[u8; 32],
    deadline: Stamp,
    row: &DenialRow,
    distrust: Option<Against>,
) -> Result<Reply, Refusal> {
    if s.nonces.contains(nonce) {
        return Err(Refusal::new(Code::NonceConsumed, "a nonce used once", "one consumed before"));
    }
    let code = attest::code(row)?;
    if deadline >= at.stamp {
        s.nonces.put(&mut s.journal, *nonce, deadline);
    }
    attest::keep_denial(s, at, row);
    let in_force = |judged: &Against| {
        s.cell().is_some_and(|cell| {
            cell.policy_revision == judged.policy_revision && cell.endorsement_revision == judged.endorsement_revision
        }) && s.node(&row.node).is_some_and(|n| n.state == NodeState::Admitted && n.generation == judged.generation)
    };
    if distrust.as_ref().is_some_and(in_force) {
        attest::lose(s, at, row, code)?;
        endorse::changed(s, at);
    }
    Ok(Reply::Done)
}

impl State {
    /// The generation up to which this cell itself refuses the node's leaves.
    pub fn denied(&self, id: &NodeId) -> Option<Generation> {
        let td = self.cell()?.trust_domain.clone();
        self.node_denials.get(&(td, *id)).copied()
    }
}
