//! Questions about policies: why, who may call, and which decide nothing.

use super::flows::{self, Judged, Known};
use super::policy::{all_agents, message};
use crate::replica::Replica;
use crate::replica::seen::KEPT_MS;
use ambit_model::policy::{Action, Peers, Policy};
use ambit_model::{Code, Moment, Refusal, Revision, SpiffeId, Stamp, TrustDomain, utc};
use ambit_policy::{Explanation, PolicySet, PortSet, RuleRef, known_in, unknown_domains};
use ambit_proto::v1;
use ambit_state::objects::PolicyRow;
use ambit_state::{DocumentsChange, OwnedName, State};
use std::collections::{BTreeMap, BTreeSet};

/// Callers that an answer lists.
const CALLERS_MAX: usize = 10_000;
/// Stored bytes of the changes in one answer; a message is 4 MiB at most.
const HISTORY_BYTES_MAX: u64 = 2 << 20;
/// How far the asker's clock may be ahead of the cell's time, which moves once a second, milliseconds.
const AHEAD_MS_MAX: u64 = 5_000;

/// A connection that is asked about.
pub(super) struct Asked {
    /// None where nothing but an address names the caller.
    pub(super) source: Option<SpiffeId>,
    pub(super) destination: SpiffeId,
    pub(super) port: u16,
    /// When; none for now.
    pub(super) at: Option<Stamp>,
}

/// What was there when the question was asked. Answering it takes up to a second: not under the lock of the state, nor in the way
/// of other calls.
pub(super) struct Ground {
    pub(super) set: PolicySet,
    pub(super) now: Moment,
    rows: BTreeMap<OwnedName, PolicyRow>,
    known: BTreeSet<SpiffeId>,
    domains: BTreeSet<TrustDomain>,
}

impl Ground {
    /// With the rows of the policies in the set.
    fn of(s: &State, set: PolicySet, now: Moment, known: BTreeSet<SpiffeId>) -> Ground {
        let names = set.iter().map(|(origin, policy)| (origin.clone(), policy.name.clone()));
        let rows = names.filter_map(|name| s.policy(&name).cloned().map(|row| (name, row))).collect();
        Ground { set, now, rows, known, domains: s.known_domains() }
    }
}

pub(super) async fn aside<T: Send + 'static>(answer: impl FnOnce() -> T + Send + 'static) -> Result<T, Refusal> {
    let done = tokio::task::spawn_blocking(answer).await;
    done.map_err(|e| Refusal::new(Code::Internal, "an answer about policies", e.to_string()))
}

/// Which of `nodes` and of all agents hold what was said, and when the rule behind it was written.
pub(super) async fn with_agents(
    replica: &Replica,
    mut answer: v1::ExplainResponse,
    nodes: BTreeSet<String>,
) -> v1::ExplainResponse {
    let revision = answer.revision;
    if answer.written_revision > 0 {
        let at = Revision(answer.written_revision);
        let when = |s: &State| s.document_changes().find(|(revision, _)| *revision == at).map(|(_, row)| row.stamp.0);
        answer.written_ms = replica.local(when).unwrap_or_default();
    }
    let mut agents = all_agents(replica).await;
    for agent in agents.values_mut() {
        agent.desired = revision;
    }
    answer.agents_all = u32::try_from(agents.len()).unwrap_or(u32::MAX);
    let in_step = |a: &&v1::AgentRevision| a.connected && a.applied >= a.desired;
    answer.agents_in_step = u32::try_from(agents.values().filter(in_step).count()).unwrap_or(u32::MAX);
    let absent = |node: String| v1::AgentRevision { node, desired: revision, ..Default::default() };
    answer.agents = nodes.into_iter().map(|node| agents.remove(&node).unwrap_or_else(|| absent(node))).collect();
    answer
}

/// The verdict, what is behind it, and whether the nodes at both ends hold it.
pub(super) async fn explain(replica: &Replica, asked: Asked) -> Result<v1::ExplainResponse, Refusal> {
    let (ground, ends, nodes) = replica.read(|s| asked_of(s, &asked)).await??;
    let v1::ExplainResponse { revision, source, destination, .. } = ends;
    let explained = aside(move || told(&ground, &asked)).await?;
    let answer = v1::ExplainResponse { revision, source, destination, ..explained };
    Ok(with_agents(replica, answer, nodes).await)
}

/// What the state says of it: the policies, and both ends.
pub(super) fn asked_of(s: &State, asked: &Asked) -> Result<(Ground, v1::ExplainResponse, BTreeSet<String>), Refusal> {
    let (set, now) = match asked.at {
        None => (s.policies_to(&asked.destination), s.moment()),
        Some(at) => set_at(s, at, &asked.destination)?,
    };
    let (source, from) = asked.source.as_ref().map(|source| party(s, source)).unzip();
    let (destination, to) = party(s, &asked.destination);
    let answer = v1::ExplainResponse {
        revision: s.cell().map(|c| c.revision.0).unwrap_or_default(),
        source,
        destination: Some(destination),
        ..Default::default()
    };
    let nodes = from.unwrap_or_default().union(&to).cloned().collect();
    Ok((Ground::of(s, set, now, BTreeSet::new()), answer, nodes))
}

fn told(ground: &Ground, asked: &Asked) -> v1::ExplainResponse {
    let Some(source) = &asked.source else { return v1::ExplainResponse::default() };
    told_of(ground, asked, &ground.set.explain(source, &asked.destination, asked.port, ground.now))
}

/// A verdict, with who wrote the policy behind it, and how whom it lets in travels.
pub(super) fn told_of(ground: &Ground, asked: &Asked, e: &Explanation) -> v1::ExplainResponse {
    let Ground { set, rows, .. } = ground;
    let row = e.verdict.rule.as_ref().and_then(|r| rows.get(&(r.origin.clone(), r.name.clone())));
    // Who wrote the rule that is there now did not write the one that was there then.
    let row = row.filter(|_| asked.at.is_none());
    let policy = e.verdict.rule.as_ref().and_then(|r| set.get(&r.origin, &r.name));
    let ends = policy.map(|p| p.extras.expires_at.0);
    let transport = policy.and_then(Policy::transport).filter(|_| e.verdict.allowed);
    let text = |rule: &Option<RuleRef>| rule.as_ref().map(ToString::to_string).unwrap_or_default();
    v1::ExplainResponse {
        allowed: e.verdict.allowed,
        rule: text(&e.verdict.rule),
        reason: e.verdict.reason.to_string(),
        nearest: e.nearest.as_ref().map(ToString::to_string).unwrap_or_default(),
        written_by: row.map(|row| row.written_by.clone()).unwrap_or_default(),
        written_revision: row.map_or(0, |row| row.revision.0),
        expires_at_ms: ends.filter(|end| *end != u64::MAX).unwrap_or_default(),
        audited: text(&e.verdict.audited),
        transport: transport.map(|transport| transport.as_str().to_owned()).unwrap_or_default(),
        ..Default::default()
    }
}

/// The policies as they were then. Those of peers, and who was in a set, are as they are now: that is not remembered.
fn set_at(s: &State, at: Stamp, destination: &SpiffeId) -> Result<(PolicySet, Moment), Refusal> {
    let (change, now) = change_to(s, at)?;
    Ok((s.policies_to_after(destination, &change), now))
}

/// The change that makes documents what they were then.
pub(super) fn change_to(s: &State, at: Stamp) -> Result<(DocumentsChange, Moment), Refusal> {
    if at > s.stamp().plus_ms(AHEAD_MS_MAX) {
        let expected = format!("a time up to now, {}: nobody knows what will be changed", utc::text(s.stamp().0));
        return Err(Refusal::new(Code::BadRequest, expected, utc::text(at.0)));
    }
    let last = s.document_changes().take_while(|(_, row)| row.stamp <= at).last();
    let change = match (last, s.document_changes().next()) {
        (Some((revision, _)), _) => s.change_back(revision)?,
        (None, None) => DocumentsChange::default(),
        (None, Some((_, oldest))) => {
            let expected = format!("a time since {}", utc::text(oldest.stamp.0));
            return Err(Refusal::new(Code::NotFound, expected, utc::text(at.0)));
        }
    };
    Ok((change, Moment::at(at.min(s.stamp()))))
}

/// What the cell knows of one end, and which of its nodes run it.
pub(super) fn party(s: &State, id: &SpiffeId) -> (v1::Party, BTreeSet<String>) {
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
pub(super) async fn who_can(
    replica: &Replica,
    destination: SpiffeId,
    port: Option<u16>,
) -> Result<v1::WhoCanResponse, Refusal> {
    let ground = |s: &State| Ground::of(s, s.policies_to(&destination), s.moment(), s.known_identities());
    let ground = replica.read(ground).await?;
    aside(move || callers(&ground, &destination, port)).await
}

/// Of those known who may, with their ports, on this port or on any.
pub(super) fn allowed(
    known: &BTreeSet<SpiffeId>,
    port: Option<u16>,
    ports_of: impl Fn(&SpiffeId) -> PortSet,
) -> v1::WhoCanResponse {
    let mut answer = v1::WhoCanResponse::default();
    for source in known {
        let ports = ports_of(source);
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
    answer
}

fn callers(ground: &Ground, destination: &SpiffeId, port: Option<u16>) -> v1::WhoCanResponse {
    let Ground { set, now, rows, known, domains } = ground;
    let index = set.compile();
    let mut answer = allowed(known, port, |source| index.ports(source, destination, *now));
    // As they are written: what they were resolved to is what the callers are.
    let names = set.speaking_of(destination, port, *now).map(|(origin, p)| (origin.clone(), p.name.clone()));
    answer.rules = names.filter_map(|name| rows.get(&name).map(|row| message(&name, row, domains))).collect();
    answer
}

/// Policies that speak of no pair of known identities, and why; and if `within_ms` is not 0, those that decided nothing of what
/// was seen since.
pub(super) async fn unused(replica: &Replica, within_ms: u64) -> Result<v1::UnusedResponse, Refusal> {
    if within_ms > KEPT_MS {
        let expected = format!("at most {KEPT_MS} ms: what was seen is kept for a day");
        return Err(Refusal::new(Code::BadRequest, expected, within_ms.to_string()));
    }
    let ground = |s: &State| {
        let mut ground = Ground::of(s, s.policy_set(), s.moment(), s.known_identities());
        let decides = |(origin, name): &OwnedName| ground.set.get(origin, name).is_some();
        let idle = s.policies().filter(|(name, _)| !decides(name)).map(|(name, row)| (name.clone(), row.clone()));
        let idle: Vec<_> = idle.collect();
        ground.rows.extend(idle);
        ground
    };
    let outside = |s: &State| super::egress::unused(s, &s.known_identities());
    let (ground, egress) = (replica.read(ground).await?, replica.read(outside).await?);
    let seen = if within_ms == 0 { None } else { Some(flows::everywhere(replica).await?) };
    let since = Stamp(replica.now().0.saturating_sub(within_ms));
    let own = replica.trust_domain().clone();
    let answered = aside(move || {
        let mut answer = speaking_of_nobody(&ground);
        if let Some(known) = seen {
            add_idle(&mut answer, &ground, (known, &own), since);
        }
        answer
    });
    let mut answer = answered.await?;
    answer.policies.extend(egress);
    Ok(answer)
}

/// Adds policies of this cell by which nothing that was seen since would be judged, as policies are now: what others' say happens
/// elsewhere.
fn add_idle(answer: &mut v1::UnusedResponse, ground: &Ground, (known, own): (Known, &TrustDomain), since: Stamp) {
    let Ground { set, now, rows, .. } = ground;
    let seen = known.flows.iter().filter(|(_, times)| times.last >= since);
    let judged = Judged::of(seen, &set.compile(), *now);
    let named: BTreeSet<(String, String)> =
        answer.policies.iter().map(|p| (p.origin.clone(), p.name.clone())).collect();
    for ((origin, name), row) in rows {
        let rule = RuleRef { origin: origin.clone(), name: name.clone() };
        let is_counted = origin == own && row.object.extras.unmeshed.is_empty();
        if !is_counted || judged.deciding.contains(&rule) || named.contains(&(origin.to_string(), name.to_string())) {
            continue;
        }
        answer.policies.push(v1::UnusedPolicy {
            origin: origin.to_string(),
            name: name.to_string(),
            why: format!("it decides no connection seen since {}", utc::text(since.0)),
            revision: row.revision.0,
            written_by: row.written_by.clone(),
            kind: String::new(),
        });
    }
    answer.connections = judged.connections;
    (answer.left_out, answer.silent, answer.remembered_ms) = (known.left_out, known.silent, known.remembered_ms);
}

fn speaking_of_nobody(ground: &Ground) -> v1::UnusedResponse {
    let Ground { set, now, rows, known, domains } = ground;
    let mut answer = v1::UnusedResponse { policies_all: rows.len() as u64, ..Default::default() };
    for ((origin, name), row) in rows {
        let policy = set.get(origin, name).unwrap_or(&row.object);
        let any = |set: &Peers| known_in(known, set, policy.action).next().is_some();
        let unknown = unknown_domains(policy, domains);
        let why = if set.get(origin, name).is_none() {
            "nobody is in what it names, or no document could say it".to_owned()
        } else if policy.is_over(*now) {
            format!("it is over since {}", utc::text(policy.extras.expires_at.0))
        } else if policy.action == Action::Allow && !unknown.is_empty() {
            let names: Vec<String> = unknown.iter().map(ToString::to_string).collect();
            format!("no peer vouches for {}", names.join(", "))
        } else if !any(&policy.target) {
            format!("no known workload is {}", row.object.target)
        } else if !policy.from.iter().any(any) && policy.extras.unmeshed.is_empty() {
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
            kind: String::new(),
        });
    }
    answer
}

/// Changes of documents, newest first, as many as fit an answer.
pub(super) fn history(s: &State, limit: usize) -> v1::HistoryResponse {
    let (mut rows, mut bytes, mut cut_short) = (Vec::new(), 0, false);
    for (Revision(revision), row) in s.document_changes().rev().take(limit) {
        bytes += row.bytes;
        cut_short = bytes > HISTORY_BYTES_MAX && !rows.is_empty();
        if cut_short {
            break;
        }
        rows.push(v1::HistoryRow {
            revision,
            stamp_ms: row.stamp.0,
            by: row.by.clone(),
            note: row.note.clone(),
            documents: row.changes.iter().map(super::plan::document_message).collect(),
        });
    }
    v1::HistoryResponse { rows, cut_short }
}
