//! What the product promises of its history, judged from commands and outcomes by a model of its own.

use super::Violation;
use crate::client::OpId;
use ambit_model::{Generation, NodeId, Refusal, Stamp};
use ambit_state::{
    Command, Issuance, LogEntry, NodeVerb, Nodes, OwnedName, Reply, State, TableWrite, UNATTESTED_MAX_MS,
};
use std::collections::{BTreeMap, BTreeSet};

/// As design.md says (I6).
const NOT_BEFORE_SLACK_MS: u64 = 60_000;
/// The most that a leaf's lifetime may be: the ceiling of a TTL.
const LIFETIME_MAX_MS: u64 = 24 * 3_600_000;

/// The table that each entry changes: time and position.
const CLOCK: u8 = 1;

/// What operators and verdicts made of a node, as the oracle counts it.
#[derive(Clone, Copy, Debug)]
struct Node {
    generation: Generation,
    trusted: bool,
    verdict: Stamp,
}

/// A client's identity and its request id.
type Request = ([u8; 32], [u8; 16]);

#[derive(Default)]
pub(super) struct Promises {
    nodes: BTreeMap<NodeId, Node>,
    nonces: BTreeSet<[u8; 32]>,
    serials: BTreeMap<[u8; 16], u64>,
    /// What became of each request, at its first application.
    given: BTreeMap<Request, (u64, Result<Reply, Refusal>)>,
    policies: BTreeMap<OwnedName, u64>,
}

/// An entry as it was applied.
pub(super) struct Applied<'a> {
    pub(super) index: u64,
    pub(super) stamp: Stamp,
    pub(super) entry: &'a LogEntry,
    pub(super) outcome: &'a Result<Reply, Refusal>,
    /// The rows that it changed.
    pub(super) writes: &'a [TableWrite],
}

impl Promises {
    /// One entry was applied; `state` is after it.
    pub(super) fn judge(&mut self, applied: &Applied<'_>, state: &State) -> Result<(), Violation> {
        let Applied { index, stamp, entry, outcome, .. } = *applied;
        let repeated = self.repeated(applied)?;
        if let Ok(reply) = outcome
            && !repeated
        {
            self.effect(index, stamp, &entry.command, reply)?;
        }
        if let (Ok(Reply::Leaves(_)), Command::Issue { node, generation, .. }) = (outcome, &entry.command) {
            self.may_be_issued(index, stamp, node, *generation)?;
        }
        for (name, row) in state.policies() {
            match self.policies.get_mut(name) {
                Some(known) if row.revision.0 < *known => {
                    let found = format!("policy {} went from {known} to {} at {index}", name.1, row.revision);
                    return Err(Violation::of("I7", found));
                }
                Some(known) => *known = row.revision.0,
                None => drop(self.policies.insert(name.clone(), row.revision.0)),
            }
        }
        Ok(())
    }

    /// I10: a request has its effect once. A repetition moves the clock and nothing else, and is answered as before.
    fn repeated(&mut self, applied: &Applied<'_>) -> Result<bool, Violation> {
        let Applied { index, entry, outcome, writes, .. } = *applied;
        if entry.request == [0; 16] {
            return Ok(false);
        }
        let key = (entry.client, entry.request);
        let Some((first, before)) = self.given.get(&key) else {
            self.given.insert(key, (index, outcome.clone()));
            return Ok(false);
        };
        if let Some(write) = writes.iter().find(|write| write.table != CLOCK) {
            let found = format!("the request of {first} changed table {} again at {index}", write.table);
            return Err(Violation::of("I10", found));
        }
        if !same_answer(before, outcome) {
            return Err(Violation::of("I10", format!("the request of {first} was answered otherwise at {index}")));
        }
        Ok(true)
    }

    fn effect(&mut self, index: u64, stamp: Stamp, command: &Command, reply: &Reply) -> Result<(), Violation> {
        match (command, reply) {
            (Command::AdmitNode(a), Reply::Admitted(generation, _)) => {
                if !self.nonces.insert(a.nonce) {
                    return Err(Violation::of("I5", format!("a nonce was admitted twice, again at {index}")));
                }
                if let Some(before) = self.nodes.get(&a.node)
                    && before.generation >= *generation
                {
                    let found = format!("node {} got generation {generation} again at {index}", a.node);
                    return Err(Violation::of("I5", found));
                }
                let node = Node { generation: *generation, trusted: true, verdict: stamp };
                self.nodes.insert(a.node, node);
            }
            (Command::PutVerdicts(verdicts), Reply::Items(items)) => {
                for verdict in verdicts.iter().zip(items).filter(|(_, item)| item.is_ok()).map(|(v, _)| v) {
                    if let Some(node) = self.nodes.get_mut(&verdict.node) {
                        node.verdict = stamp;
                    }
                }
            }
            (Command::SetNodes(verb, Nodes::Ids(ids)), _) => {
                for node in ids {
                    match verb {
                        NodeVerb::Ban | NodeVerb::Quarantine | NodeVerb::Evict => self.out(node),
                        // Trust comes back with an admission only.
                        NodeVerb::Unban | NodeVerb::Release => {}
                    }
                }
            }
            (Command::Distrust(_, _, row), _) => self.out(&row.node),
            _ => {}
        }
        self.leaves(index, stamp, reply)
    }

    /// Verdicts of before say nothing any more.
    pub(super) fn nodes_unseen(&mut self) {
        self.nodes.values_mut().for_each(|node| node.verdict = Stamp(0));
    }

    fn out(&mut self, node: &NodeId) {
        if let Some(node) = self.nodes.get_mut(node) {
            node.trusted = false;
        }
    }

    /// I6 for every leaf of a reply.
    fn leaves(&mut self, index: u64, stamp: Stamp, reply: &Reply) -> Result<(), Violation> {
        for leaf in leaves(&Ok(reply.clone())) {
            if let Some(before) = self.serials.insert(leaf.serial, index) {
                let found = format!("serial {} of {before} again at {index}", hex::encode(leaf.serial));
                return Err(Violation::of("I6", found));
            }
            let verdict = leaf.binding.as_ref().and_then(|(node, _)| self.nodes.get(node)).map(|node| node.verdict);
            let latest = verdict.map_or(u64::MAX, |verdict| verdict.0.saturating_add(UNATTESTED_MAX_MS));
            let (from, to) = (leaf.lifetime.not_before.0, leaf.lifetime.not_after.0);
            let holds = to <= latest && to <= stamp.0 + LIFETIME_MAX_MS && from + NOT_BEFORE_SLACK_MS >= stamp.0;
            if !holds {
                return Err(Violation::of("I6", format!("a leaf from {from} to {to} at {index}, stamp {}", stamp.0)));
            }
        }
        Ok(())
    }

    /// I4 and I5: only to a node that is in, of this admission, with a verdict in time.
    fn may_be_issued(&self, index: u64, stamp: Stamp, id: &NodeId, generation: Generation) -> Result<(), Violation> {
        let Some(node) = self.nodes.get(id) else {
            return Err(Violation::of("I5", format!("leaves for node {id}, which nobody admitted, at {index}")));
        };
        if !node.trusted || generation > node.generation {
            return Err(Violation::of("I4", format!("leaves for node {id}, which is out, at {index}")));
        }
        if node.verdict.0.saturating_add(UNATTESTED_MAX_MS) <= stamp.0 {
            return Err(Violation::of("I4", format!("leaves for node {id} without a verdict in time, at {index}")));
        }
        Ok(())
    }

    /// A client was answered: what it got is what the history gave to its request.
    pub(super) fn answered(&self, op: OpId, index: u64, outcome: &Result<Reply, Refusal>) -> Result<(), Violation> {
        match self.given.get(&(op.identity(), op.request())) {
            Some((_, given)) if same_answer(given, outcome) => Ok(()),
            _ => Err(Violation::of("I10", format!("{op} was told {outcome:?}, which {index} did not give"))),
        }
    }
}

/// Whether `later` answers the same request as `first`. Leaves may be fewer, or refused by now: none goes to a node that is
/// out meanwhile.
fn same_answer(first: &Result<Reply, Refusal>, later: &Result<Reply, Refusal>) -> bool {
    let (given, told) = (leaves(first), leaves(later));
    if given.is_empty() {
        return first == later;
    }
    let refused_or_leaves = matches!(later, Err(_) | Ok(Reply::Leaves(_) | Reply::Admitted(..)));
    refused_or_leaves && told.iter().all(|leaf| given.contains(leaf))
}

pub(super) fn leaves(outcome: &Result<Reply, Refusal>) -> Vec<Issuance> {
    match outcome {
        Ok(Reply::Leaves(items)) => items.iter().filter_map(|item| item.as_ref().ok()).cloned().collect(),
        Ok(Reply::Admitted(_, leaf)) => vec![leaf.as_ref().clone()],
        _ => Vec::new(),
    }
}
