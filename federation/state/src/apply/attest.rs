//! Whether a node is relied on: verdicts, distrust, lateness, and an operator's word.

use super::{At, cell_row, endorse, export, payload, touch};
use crate::command::{NodeVerb, Nodes, Reply, RoundVerdict, Seen};
use crate::objects::{AkFacts, DenialRow, NodeRow, NodeState, PolicyRef, Standing, VerdictRow};
use crate::state::State;
use ambit_model::record::Kind;
use ambit_model::{Code, Generation, NodeId, Refusal, Revision, Stamp};

/// Denials kept for operators; the audit log (issue H) keeps all.
const DENIALS_MAX: usize = 1_000;
/// Of these, of one node.
const DENIALS_PER_NODE_MAX: usize = 32;
/// Verdicts in one entry; a batch is what arrived while the last one was committed.
pub(crate) const VERDICTS_MAX: usize = 4_096;

/// Good verdicts of rounds. One that comes too late to count is refused on its own.
pub(super) fn verdicts(s: &mut State, at: At, verdicts: &[RoundVerdict]) -> Result<Reply, Refusal> {
    if verdicts.len() > VERDICTS_MAX {
        return Err(Refusal::new(Code::BadRequest, format!("at most {VERDICTS_MAX}"), verdicts.len().to_string()));
    }
    Ok(Reply::Items(verdicts.iter().map(|v| verdict(s, at, v)).collect()))
}

fn verdict(s: &mut State, at: At, v: &RoundVerdict) -> Result<(), Refusal> {
    // Hundreds of these come every second: nothing of the rows is copied that is not needed.
    let now = s.cell().map(|cell| cell.policy_revision);
    let now = now.ok_or_else(|| Refusal::new(Code::Unavailable, "a founded cell", "an empty one"))?;
    let row = admitted(s, &v.node, v.generation)?;
    let firmware_version = row.ek.firmware_version;
    if now != v.policy_revision {
        let then = v.policy_revision;
        return Err(Refusal::new(Code::StaleAppraisal, format!("policy revision {now}"), then.to_string()));
    }
    boot_known(s, &v.node, &v.seen)?;
    let before = s.standing(&v.node).map(|standing| standing.counters);
    if before.is_some_and(|then| v.seen.counters <= then) {
        return Err(Refusal::new(Code::ClockStepBack, format!("counters after {before:?}"), "older ones"));
    }
    if firmware_version != v.seen.firmware_version
        && let Some(mut row) = s.node(&v.node).cloned()
    {
        row.ek.firmware_version = v.seen.firmware_version;
        let denied = s.ek_denials().any(|(_, rule)| rule.denies(&row.ek));
        s.nodes.put(&mut s.journal, v.node, row);
        if denied {
            let (expected, found) = ("firmware that no rule denies", format!("{:#018x}", v.seen.firmware_version));
            let why = DenialRow {
                stamp: at.stamp,
                node: v.node,
                code: Code::EkDenied.to_string(),
                diverged: "the TPM's firmware".into(),
                expected: expected.into(),
                found: found.clone(),
            };
            keep_denial(s, at, &why);
            lose(s, at, &why, Code::EkDenied)?;
            endorse::changed(s, at);
            return Err(Refusal::new(Code::EkDenied, expected, found));
        }
    }
    stand(s, at, &v.node, v.generation, &v.seen)
}

/// The node if it is admitted and of this generation. What was said under the leaf of another admission says nothing of
/// this one, good or bad.
fn admitted<'a>(s: &'a State, id: &NodeId, generation: Generation) -> Result<&'a NodeRow, Refusal> {
    let row = s.node(id).ok_or_else(|| Refusal::new(Code::NodeUnknown, "an enrolled node", id.to_string()))?;
    if let Some(code) = row.state.bars_trust() {
        return Err(Refusal::new(code, "an admitted node", row.state.as_str()));
    }
    if generation > row.generation || s.denied(id).is_some_and(|denied| generation <= denied) {
        let expected = format!("generation {}", row.generation);
        return Err(Refusal::new(Code::NodeUntrusted, expected, generation.to_string()));
    }
    if generation != row.generation {
        let expected = format!("generation {}", row.generation);
        return Err(Refusal::new(Code::SvidUntrusted, expected, generation.to_string()));
    }
    Ok(row)
}

/// A verdict that does not say what was booted must be on the boot that is known. Asked before anything changes.
pub(super) fn boot_known(s: &State, id: &NodeId, seen: &Seen) -> Result<(), Refusal> {
    let known = || s.standing(id).is_some_and(|b| b.boot_pcrs_sha256 == seen.boot_pcrs_sha256);
    if seen.pcrs.is_some() || known() {
        return Ok(());
    }
    Err(Refusal::new(Code::StaleAppraisal, "a verdict on the boot known, or the PCRs of another", "neither"))
}

/// Notes a good verdict: the standing always, a new stretch of history where boot or policy changed, and new slices
/// only where an entry with node selectors begins or ceases to fit: rounds of ten thousand nodes must not move them.
pub(super) fn stand(s: &mut State, at: At, id: &NodeId, generation: Generation, seen: &Seen) -> Result<(), Refusal> {
    let before = s.standing(id).cloned();
    let booted = seen.pcrs.as_ref().filter(|pcrs| s.boots.get(id) != Some(pcrs));
    let other = |b: &Standing| b.policy.name != seen.policy.name || booted.is_some();
    let fitting = before.as_ref().filter(|b| other(b)).map(|_| s.fitting_by_verdict(id));
    let same = before
        .as_ref()
        .filter(|b| b.policy == seen.policy && b.boot_pcrs_sha256 == seen.boot_pcrs_sha256)
        .filter(|_| s.verdicts(id).last().is_some_and(|v| v.generation == generation && v.until == Stamp(0)));
    let rounds = same.map_or(1, |b| b.rounds + 1);
    let trust = same.map_or(seen.trust, |b| b.trust.worse(seen.trust));
    if rounds == 1 {
        let row = stretch(s, at, id, Ok(seen.policy.clone()));
        begin(s, at, id, VerdictRow { evidence_sha256: seen.evidence_sha256, ..row });
    }
    let standing = Standing {
        verdict: at.stamp,
        led_ms: s.led_ms(),
        counters: seen.counters,
        ima: seen.ima.clone(),
        boot_pcrs_sha256: seen.boot_pcrs_sha256,
        boot_log_sha256: seen.boot_log_sha256,
        policy: seen.policy.clone(),
        trust,
        evidence_sha256: seen.evidence_sha256,
        evidence_depth: seen.evidence_depth,
        rounds,
    };
    s.standings.put(&mut s.journal, *id, standing);
    if let Some(pcrs) = booted.cloned() {
        s.boots.put(&mut s.journal, *id, pcrs);
    }
    if let Some(fitted) = fitting {
        let fits = s.fitting_by_verdict(id);
        if fits != fitted {
            super::objects::drop_unfit_endpoints(s, at, id)?;
            touch(s, at);
        }
    }
    Ok(())
}

/// A stretch that begins here, of the node's present generation.
fn stretch(s: &State, at: At, id: &NodeId, outcome: Result<PolicyRef, Code>) -> VerdictRow {
    VerdictRow {
        since: at.stamp,
        until: Stamp(0),
        generation: s.node(id).map(|n| n.generation).unwrap_or_default(),
        outcome,
        diverged: String::new(),
        expected: String::new(),
        found: String::new(),
        evidence_sha256: [0; 32],
        rounds: 0,
    }
}

/// Begins a stretch of the node's history and closes the one before.
fn begin(s: &mut State, at: At, id: &NodeId, row: VerdictRow) {
    let open = s.verdicts.from((*id, 0)).take_while(|((node, _), _)| node == id).last();
    if let Some((key, last)) = open.map(|(k, v)| (*k, v.clone()))
        && last.until == Stamp(0)
    {
        let standing = s.standing(id).filter(|_| last.outcome.is_ok());
        let (until, rounds) = standing.map_or((last.since, last.rounds), |b| (b.verdict, b.rounds));
        s.verdicts.put(&mut s.journal, key, VerdictRow { until, rounds, ..last });
    }
    s.verdicts.put(&mut s.journal, (*id, at.index.0), row);
    let kept: Vec<_> = s.verdicts.from((*id, 0)).take_while(|((node, _), _)| node == id).map(|(k, _)| *k).collect();
    for key in kept.iter().take(kept.len().saturating_sub(crate::VERDICTS_PER_NODE_MAX)) {
        s.verdicts.remove(&mut s.journal, key);
    }
}

/// A round failed. What was said of another generation than the present one says nothing of this one.
pub(super) fn distrust(
    s: &mut State,
    at: At,
    generation: Generation,
    policy_revision: Revision,
    row: &DenialRow,
) -> Result<Reply, Refusal> {
    admitted(s, &row.node, generation)?;
    // What an older policy refuses a newer one may accept: the node is judged again.
    let now = cell_row(s)?.policy_revision;
    if now != policy_revision {
        return Err(Refusal::new(Code::StaleAppraisal, format!("policy revision {now}"), policy_revision.to_string()));
    }
    let code = code(row)?;
    keep_denial(s, at, row);
    lose(s, at, row, code)?;
    endorse::changed(s, at);
    Ok(Reply::Done)
}

pub(super) fn code(row: &DenialRow) -> Result<Code, Refusal> {
    Code::from_text(&row.code).ok_or_else(|| Refusal::new(Code::BadRequest, "a known code", row.code.clone()))
}

/// Part of a denial comes from the node: a path may be as long as a megabyte.
const TEXT_CHARS_MAX: usize = 512;

fn bounded(row: &DenialRow) -> DenialRow {
    let cut = |text: &str| text.chars().take(TEXT_CHARS_MAX).collect::<String>();
    DenialRow { diverged: cut(&row.diverged), expected: cut(&row.expected), found: cut(&row.found), ..row.clone() }
}

pub(super) fn keep_denial(s: &mut State, at: At, row: &DenialRow) {
    // One node that fails again and again must not make the cell forget why others were refused.
    let own: Vec<u64> = s.denials.iter().filter(|(_, d)| d.node == row.node).map(|(k, _)| *k).collect();
    for oldest in own.iter().take((own.len() + 1).saturating_sub(DENIALS_PER_NODE_MAX)) {
        s.denials.remove(&mut s.journal, oldest);
    }
    s.denials.put(&mut s.journal, at.index.0, DenialRow { stamp: at.stamp, ..bounded(row) });
    while s.denials.len() > DENIALS_MAX {
        let Some(oldest) = s.denials.iter().next().map(|(k, _)| *k) else { break };
        s.denials.remove(&mut s.journal, &oldest);
    }
}

/// The node is untrusted with this code, and its history says why.
pub(super) fn lose(s: &mut State, at: At, why: &DenialRow, code: Code) -> Result<(), Refusal> {
    let why = bounded(why);
    let row = VerdictRow {
        diverged: why.diverged.clone(),
        expected: why.expected.clone(),
        found: why.found.clone(),
        ..stretch(s, at, &why.node, Err(code))
    };
    begin(s, at, &why.node, row);
    out(s, at, &why.node, NodeState::Untrusted(code))
}

/// Nodes without a verdict for too long, in time with a leader.
pub(super) fn late(s: &mut State, at: At) -> Result<(), Refusal> {
    let now = s.led_ms();
    let silent: Vec<NodeId> = s
        .standings
        .iter()
        .filter(|(_, standing)| now.saturating_sub(standing.led_ms) > crate::LATE_MAX_MS)
        .map(|(id, _)| *id)
        .filter(|id| s.node(id).is_some_and(|n| n.state == NodeState::Admitted))
        .collect();
    for node in silent {
        let row = DenialRow {
            stamp: at.stamp,
            node,
            code: Code::NodeLate.to_string(),
            diverged: String::new(),
            expected: format!("a verdict within {} s", crate::LATE_MAX_MS / 1000),
            found: "none: the node does not answer".into(),
        };
        keep_denial(s, at, &row);
        lose(s, at, &row, Code::NodeLate)?;
        endorse::changed(s, at);
    }
    Ok(())
}

/// An operator's word: about all the nodes named, or, where it cannot be said of one of them, about none.
pub(super) fn set_nodes(s: &mut State, at: At, verb: NodeVerb, nodes: &Nodes) -> Result<Reply, Refusal> {
    let named = |id: &NodeId| {
        let known = s.node(id).map(|n| (*id, n.state));
        known.ok_or_else(|| Refusal::new(Code::NotFound, "a node of this cell", id.to_string()))
    };
    let of_cluster = |state: &NodeState| next(verb, *state).is_ok();
    let chosen: Vec<(NodeId, NodeState)> = match nodes {
        Nodes::Ids(ids) => ids.iter().map(named).collect::<Result<_, _>>()?,
        Nodes::Cluster(cluster) if s.clusters.contains(cluster) => {
            let all = s.nodes().filter(|(_, n)| n.cluster == *cluster).map(|(id, n)| (*id, n.state));
            // Of a whole cluster the verb means those it can be said of.
            all.filter(|(_, state)| of_cluster(state)).collect()
        }
        Nodes::Cluster(cluster) => {
            return Err(Refusal::new(Code::NotFound, "a cluster of this cell", cluster.as_str()));
        }
    };
    let moves: Vec<(NodeId, NodeState, NodeState)> =
        chosen.into_iter().map(|(id, from)| Ok((id, from, next(verb, from)?))).collect::<Result<_, Refusal>>()?;
    let count = moves.len();
    for (id, from, to) in moves {
        if let (NodeState::Admitted, Some(code)) = (from, to.bars_trust()) {
            let found = format!("an operator's word: {}", to.as_str());
            let row = stretch(s, at, &id, Err(code));
            begin(s, at, &id, VerdictRow { found, ..row });
        }
        out(s, at, &id, to)?;
    }
    endorse::changed(s, at);
    Ok(Reply::Items(vec![Ok(()); count]))
}

/// What the verb makes of a node in this state.
fn next(verb: NodeVerb, state: NodeState) -> Result<NodeState, Refusal> {
    let wrong = |expected: &str| Err(Refusal::new(Code::BadRequest, expected, state.as_str()));
    match (verb, state) {
        (NodeVerb::Ban, _) => Ok(NodeState::Banned),
        // What forgets a node must not forget a ban.
        (NodeVerb::Evict, NodeState::Banned) => wrong("a node that is not banned (unban it first)"),
        (NodeVerb::Evict, _) => Ok(NodeState::Evicted),
        (NodeVerb::Unban, NodeState::Banned) => Ok(NodeState::Released),
        (NodeVerb::Unban, _) => wrong("a banned node"),
        // Out already, and for a reason that a quarantine and its end must not wipe away.
        (NodeVerb::Quarantine, NodeState::Banned | NodeState::Untrusted(_)) => {
            wrong("a node that is not banned or untrusted")
        }
        (NodeVerb::Quarantine, _) => Ok(NodeState::Quarantined),
        (NodeVerb::Release, NodeState::Quarantined | NodeState::Untrusted(_)) => Ok(NodeState::Released),
        (NodeVerb::Release, _) => wrong("a quarantined or untrusted node"),
    }
}

/// The node's leaves up to its present generation are refused everywhere; its endpoints are gone. The denial goes
/// before everything else that changes.
fn out(s: &mut State, at: At, id: &NodeId, state: NodeState) -> Result<(), Refusal> {
    let Some(mut row) = s.node(id).cloned() else {
        return Err(Refusal::new(Code::NotFound, "a node of this cell", id.to_string()));
    };
    let cell = cell_row(s)?;
    row.state = state;
    if state == NodeState::Evicted {
        // Forgotten, so that it may come afresh with another AK, if it is expected.
        row.ak = AkFacts::default();
    }
    let generation = row.generation;
    s.nodes.put(&mut s.journal, *id, row);
    super::audit::node_out(s, id, state);
    if s.denied(id) != Some(generation) {
        s.node_denials.put(&mut s.journal, (cell.trust_domain, *id), generation);
        export(s, Kind::NodeDenial, id.to_string(), payload(&generation)?);
    }
    super::objects::replace_endpoints(s, at, id, &[])?;
    super::node_address::forget(s, at, id)?;
    touch(s, at);
    Ok(())
}
