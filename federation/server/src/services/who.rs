//! Questions about policies: why, who may call, and which decide nothing.

use super::policy::{all_agents, message};
use crate::replica::Replica;
use ambit_model::policy::{Action, Peers, Policy};
use ambit_model::{Code, Moment, Refusal, Revision, SpiffeId, Stamp, TrustDomain};
use ambit_policy::{PolicySet, PortSet, RuleRef, unknown_domains};
use ambit_proto::v1;
use ambit_state::{DocumentsChange, State};
use std::collections::{BTreeMap, BTreeSet};

/// Callers that an answer lists.
const CALLERS_MAX: usize = 10_000;

/// A connection that is asked about.
pub(super) struct Asked {
    pub(super) source: SpiffeId,
    pub(super) destination: SpiffeId,
    pub(super) port: u16,
    /// When; none for now.
    pub(super) at: Option<Stamp>,
}

/// The verdict, what is behind it, and whether the nodes at both ends hold it.
pub(super) async fn explain(replica: &Replica, asked: Asked) -> Result<v1::ExplainResponse, Refusal> {
    let (mut answer, nodes, revision) = replica.read(|s| told(s, &asked)).await??;
    let mut agents = all_agents(replica).await;
    for agent in agents.values_mut() {
        agent.desired = revision;
    }
    answer.agents_all = u32::try_from(agents.len()).unwrap_or(u32::MAX);
    let in_step = |a: &&v1::AgentRevision| a.connected && a.applied >= a.desired;
    answer.agents_in_step = u32::try_from(agents.values().filter(in_step).count()).unwrap_or(u32::MAX);
    let absent = |node: String| v1::AgentRevision { node, desired: revision, ..Default::default() };
    answer.agents = nodes.into_iter().map(|node| agents.remove(&node).unwrap_or_else(|| absent(node))).collect();
    Ok(answer)
}

fn told(s: &State, asked: &Asked) -> Result<(v1::ExplainResponse, BTreeSet<String>, u64), Refusal> {
    let (set, now) = match asked.at {
        None => (s.policy_set(), s.moment()),
        Some(at) => set_at(s, at)?,
    };
    let e = set.explain(&asked.source, &asked.destination, asked.port, now);
    let row = e.verdict.rule.as_ref().and_then(|r| s.policy(&(r.origin.clone(), r.name.clone())));
    let written = row.filter(|_| asked.at.is_none()).map(|row| row.revision);
    let when = written.and_then(|at| s.document_changes().find(|(revision, _)| *revision == at));
    let ends = e.verdict.rule.as_ref().and_then(|r| set.get(&r.origin, &r.name)).map(|p| p.extras.expires_at.0);
    let text = |rule: &Option<RuleRef>| rule.as_ref().map(ToString::to_string).unwrap_or_default();
    let (source, from) = party(s, &asked.source);
    let (destination, to) = party(s, &asked.destination);
    let revision = s.cell().map(|c| c.revision.0).unwrap_or_default();
    let answer = v1::ExplainResponse {
        allowed: e.verdict.allowed,
        rule: text(&e.verdict.rule),
        reason: e.verdict.reason.to_string(),
        nearest: e.nearest.as_ref().map(ToString::to_string).unwrap_or_default(),
        revision,
        written_by: row.filter(|_| written.is_some()).map(|row| row.written_by.clone()).unwrap_or_default(),
        written_revision: written.map_or(0, |at| at.0),
        written_ms: when.map_or(0, |(_, row)| row.stamp.0),
        expires_at_ms: ends.filter(|end| *end != u64::MAX).unwrap_or_default(),
        audited: text(&e.verdict.audited),
        source: Some(source),
        destination: Some(destination),
        ..Default::default()
    };
    Ok((answer, from.union(&to).cloned().collect(), revision))
}

/// The policies as they were then. Those of peers, and who was in a set, are as they are now: that is not remembered.
fn set_at(s: &State, at: Stamp) -> Result<(PolicySet, Moment), Refusal> {
    let last = s.document_changes().take_while(|(_, row)| row.stamp <= at).last();
    let change = match (last, s.document_changes().next()) {
        (Some((revision, _)), _) => s.change_back(revision)?,
        (None, None) => DocumentsChange::default(),
        (None, Some((_, oldest))) => {
            let expected = format!("a time since {}", ambit_model::utc::text(oldest.stamp.0));
            return Err(Refusal::new(Code::NotFound, expected, ambit_model::utc::text(at.0)));
        }
    };
    Ok((s.policy_set_after(&change), Moment::at(at.min(s.stamp()))))
}

/// What the cell knows of one end, and which of its nodes run it.
fn party(s: &State, id: &SpiffeId) -> (v1::Party, BTreeSet<String>) {
    let entries: Vec<_> = s.entries_giving(id).collect();
    let running: Vec<_> = s.endpoints().map(|(_, row)| &row.object).filter(|e| e.spiffe_id == *id).collect();
    let own = s.cell().is_some_and(|cell| cell.trust_domain == id.trust_domain());
    let clusters: BTreeSet<String> = entries
        .iter()
        .map(|row| row.entry.cluster.to_string())
        .chain(running.iter().map(|e| e.cluster.to_string()))
        .collect();
    let nodes: BTreeSet<String> = running.iter().map(|e| e.node.to_string()).collect();
    let party = v1::Party {
        entries: entries.iter().map(|row| row.entry.id.to_string()).collect(),
        clusters: clusters.into_iter().collect(),
        nodes: nodes.iter().cloned().collect(),
        number: s.number_of(id).unwrap_or_default(),
    };
    (party, if own { nodes } else { BTreeSet::new() })
}

/// Who may call the workload, of those that are known, and by which policies anybody may.
pub(super) fn who_can(s: &State, destination: &SpiffeId, port: Option<u16>) -> v1::WhoCanResponse {
    let (set, now, known_domains) = (s.policy_set(), s.moment(), s.known_domains());
    let index = set.compile();
    let mut answer = v1::WhoCanResponse::default();
    for source in s.known_identities() {
        let ports = index.ports(&source, destination, now);
        if ports.is_empty() || port.is_some_and(|port| !ports.contains(port)) {
            continue;
        }
        if answer.callers.len() == CALLERS_MAX {
            answer.cut_short = true;
            break;
        }
        let ports = port.map_or_else(|| ports.to_string(), |port| PortSet::List([port].into()).to_string());
        answer.callers.push(v1::AllowedCaller { spiffe_id: source.to_string(), ports });
    }
    let speaks = |origin: &TrustDomain, written: &Policy| {
        let resolved = set.get(origin, &written.name).unwrap_or(written);
        let of_port = port.is_none_or(|port| written.ports.is_empty() || written.ports.contains(&port));
        resolved.target.contains(destination) && of_port && !written.is_over(now)
    };
    let rules = s.policies().filter(|((origin, _), row)| speaks(origin, &row.object));
    answer.rules = rules.map(|(name, row)| message(name, row, &known_domains)).collect();
    answer
}

/// Policies that speak of no pair of known identities, and why.
pub(super) fn unused(s: &State) -> v1::UnusedResponse {
    let (set, now, known, domains) = (s.policy_set(), s.moment(), s.known_identities(), s.known_domains());
    let mut seen: BTreeMap<Peers, bool> = BTreeMap::new();
    let mut answer = v1::UnusedResponse { policies_all: set.len() as u64, ..Default::default() };
    for ((origin, name), row) in s.policies() {
        let Some(policy) = set.get(origin, name) else { continue };
        let mut any = |set: &Peers| *seen.entry(set.clone()).or_insert_with(|| known.iter().any(|id| set.contains(id)));
        let unknown = unknown_domains(policy, &domains);
        let why = if policy.is_over(now) {
            format!("it is over since {}", ambit_model::utc::text(policy.extras.expires_at.0))
        } else if policy.action == Action::Allow && !unknown.is_empty() {
            let names: Vec<String> = unknown.iter().map(ToString::to_string).collect();
            format!("no peer vouches for {}", names.join(", "))
        } else if !any(&policy.target) {
            format!("no known workload is {}", row.object.target)
        } else if !policy.from.iter().any(&mut any) {
            "none of its callers is known".to_owned()
        } else {
            continue;
        };
        answer.policies.push(v1::UnusedPolicy {
            origin: origin.to_string(),
            name: name.to_string(),
            why,
            revision: row.revision.0,
            written_by: row.written_by.clone(),
        });
    }
    answer
}

/// Changes of documents, newest first.
pub(super) fn history(s: &State, limit: usize) -> v1::HistoryResponse {
    let rows = s.document_changes().rev().take(limit).map(|(Revision(revision), row)| v1::HistoryRow {
        revision,
        stamp_ms: row.stamp.0,
        by: row.by.clone(),
        note: row.note.clone(),
        documents: row.changes.iter().map(super::plan::document_message).collect(),
    });
    v1::HistoryResponse { rows: rows.collect() }
}
