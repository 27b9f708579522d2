//! Who called whom, gathered from all replicas: a node tells it to the one where its stream ends.

use crate::replica::Replica;
use crate::replica::seen::{Flow, Times, merge, read};
use ambit_model::{Code, Moment, Refusal, Stamp};
use ambit_policy::{Index, RuleRef};
use ambit_proto::v1;
use ambit_state::State;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::LazyLock;
use std::time::Duration;
use tokio::sync::Semaphore;

/// Bytes of one answer's flows.
const ANSWER_BYTES_MAX: usize = 24 << 20;
/// What another replica's answer may have, with what gRPC adds.
const MESSAGE_BYTES_MAX: usize = 32 << 20;
/// A flow beside its names, on the wire at most.
const ROW_BYTES: usize = 64;
/// A replica that does not answer by then is told as silent.
const ASKED_FOR: Duration = Duration::from_secs(1);

/// Pieces of work at once. Nobody has a place while he waits for another replica, who may wait for one here.
static AT_ONCE: LazyLock<Semaphore> = LazyLock::new(|| Semaphore::new(4));

/// What is known.
#[derive(Debug, Default)]
pub(super) struct Known {
    pub(super) flows: BTreeMap<Flow, Times>,
    /// Connections that there was no room for somewhere.
    pub(super) left_out: u64,
    /// Replicas that did not answer.
    pub(super) silent: Vec<u64>,
    /// For how long each of those that answered remembers, milliseconds.
    pub(super) remembered_ms: u64,
}

/// How policies as they are now judge what was seen.
pub(super) struct Judged {
    /// By which each flow is judged, in words; of some there is none.
    rules: BTreeMap<Flow, String>,
    /// All of these.
    pub(super) deciding: BTreeSet<RuleRef>,
    /// What was seen, in connections.
    pub(super) connections: u64,
    /// Of them, those of which a policy speaks.
    ruled: u64,
}

impl Judged {
    pub(super) fn of<'a>(seen: impl Iterator<Item = (&'a Flow, &'a Times)>, index: &Index, now: Moment) -> Self {
        let mut judged = Self { rules: BTreeMap::new(), deciding: BTreeSet::new(), connections: 0, ruled: 0 };
        for (flow, times) in seen {
            judged.connections = judged.connections.saturating_add(times.times());
            let verdict = index.evaluate(&flow.source, &flow.destination, flow.port, now);
            judged.deciding.extend(verdict.audited);
            let Some(rule) = verdict.rule else { continue };
            judged.ruled = judged.ruled.saturating_add(times.times());
            judged.rules.insert(flow.clone(), rule.to_string());
            judged.deciding.insert(rule);
        }
        judged
    }
}

/// What nodes told this replica.
pub(super) async fn here(replica: &Replica) -> Result<Known, Refusal> {
    let (seen, now) = (replica.seen().clone(), replica.now());
    let remembered_ms = seen.remembers_ms();
    let (flows, left_out) = aside(move || seen.all(now)).await?;
    Ok(Known { flows, left_out, silent: vec![], remembered_ms })
}

/// What nodes told this replica and the others.
pub(super) async fn everywhere(replica: &Replica) -> Result<Known, Refusal> {
    let others = replica.others();
    let asked = others.iter().map(|(id, address)| async move { (*id, ask(replica, *id, address).await) });
    let (mut known, answers) =
        futures::future::try_join(here(replica), async { Ok(futures::future::join_all(asked).await) }).await?;
    let join = move || {
        for (id, answer) in answers {
            let Some(answer) = answer else {
                known.silent.push(id);
                continue;
            };
            known.left_out = known.left_out.saturating_add(answer.left_out);
            known.remembered_ms = known.remembered_ms.min(answer.remembered_ms);
            for flow in answer.flows {
                let last = Stamp(flow.last_ms);
                if let Ok((flow, times)) = read(flow, last) {
                    merge(&mut known.flows, flow, times);
                }
            }
        }
        known
    };
    aside(join).await
}

async fn ask(replica: &Replica, id: u64, address: &str) -> Option<v1::FlowsResponse> {
    let ask = async {
        let channel = replica.dial_replica(id, address).await.ok()?;
        let client = v1::policy_registry_client::PolicyRegistryClient::new(channel);
        let mut client = client.max_decoding_message_size(MESSAGE_BYTES_MAX);
        client.flows(v1::FlowsRequest { local_only: true, limit: 0 }).await.ok()
    };
    tokio::time::timeout(ASKED_FOR, ask).await.ok().flatten().map(tonic::Response::into_inner)
}

/// An answer: for another replica, with what each end saw apart, or joined, and judged by policies as this replica has them.
pub(super) async fn answer(replica: &Replica, m: v1::FlowsRequest) -> Result<v1::FlowsResponse, Refusal> {
    if m.local_only {
        let known = here(replica).await?;
        return aside(move || told(known, m)).await;
    }
    let known = everywhere(replica).await?;
    let (policies, now) = replica.local(|s: &State| (s.policy_set(), s.moment()));
    aside(move || {
        let judged = Judged::of(known.flows.iter(), &policies.compile(), now);
        let mut answer = told(known, m);
        for row in &mut answer.flows {
            let flow = read(row.clone(), Stamp(row.last_ms)).ok().and_then(|(flow, _)| judged.rules.get(&flow));
            row.rule = flow.cloned().unwrap_or_default();
        }
        v1::FlowsResponse { connections: judged.connections, ruled: judged.ruled, ..answer }
    })
    .await
}

fn told(known: Known, m: v1::FlowsRequest) -> v1::FlowsResponse {
    let limit = if m.limit == 0 { usize::MAX } else { m.limit as usize };
    let Known { left_out, silent, remembered_ms, .. } = known;
    let (flows, surplus) = newest(known.flows, limit, m.local_only);
    v1::FlowsResponse { flows, left_out, silent, surplus, remembered_ms, ..Default::default() }
}

/// The newest, in words, and how many more there are. `apart`: what each end saw is a row of its own.
pub(super) fn newest(flows: BTreeMap<Flow, Times>, limit: usize, apart: bool) -> (Vec<v1::SeenFlow>, u64) {
    let mut flows: Vec<(Flow, Times)> = flows.into_iter().collect();
    flows.sort_by(|(a, a_times), (b, b_times)| b_times.last.cmp(&a_times.last).then_with(|| a.cmp(b)));
    let (mut told, mut bytes, mut taken) = (Vec::new(), 0, 0);
    for (flow, times) in flows.iter().take(limit) {
        let row = |times_seen, called| v1::SeenFlow {
            source: flow.source.to_string(),
            destination: flow.destination.to_string(),
            port: flow.port.into(),
            allowed: flow.allowed,
            times: times_seen,
            last_ms: times.last.0,
            called,
            rule: String::new(),
        };
        bytes += 2 * (flow.source.as_str().len() + flow.destination.as_str().len() + ROW_BYTES);
        if bytes > ANSWER_BYTES_MAX {
            break;
        }
        taken += 1;
        match times.ends {
            [calling, called] if apart => {
                told.extend((calling > 0).then(|| row(calling, false)));
                told.extend((called > 0).then(|| row(called, true)));
            }
            _ => told.push(row(times.times(), false)),
        }
    }
    (told, (flows.len() - taken) as u64)
}

/// Beside the threads that carry calls.
pub(super) async fn aside<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Refusal> {
    let closed = |e: tokio::sync::AcquireError| Refusal::new(Code::Internal, "a place to work in", e.to_string());
    let _place = AT_ONCE.acquire().await.map_err(closed)?;
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|e| Refusal::new(Code::Internal, "flows", e.to_string()))
}
