//! Who called whom, gathered from all replicas: a node tells it to the one where its stream ends.

use crate::replica::Replica;
use crate::replica::seen::{Flow, Times, merge, read};
use ambit_model::Stamp;
use ambit_proto::v1;
use std::collections::BTreeMap;
use std::time::Duration;

/// Flows of one answer, of a kilobyte at most and a hundred bytes as a rule.
const ANSWER_MAX: usize = 16_384;
/// A replica that does not answer by then is told as silent.
const ASKED_FOR: Duration = Duration::from_secs(1);

/// What is known.
#[derive(Debug, Default)]
pub(super) struct Known {
    pub(super) flows: BTreeMap<Flow, Times>,
    left_out: u64,
    silent: Vec<u64>,
}

/// What nodes told this replica.
pub(super) fn here(replica: &Replica) -> Known {
    let (flows, left_out) = replica.seen().all(replica.now());
    Known { flows, left_out, silent: vec![] }
}

/// What nodes told this replica and the others.
pub(super) async fn everywhere(replica: &Replica) -> Known {
    let mut known = here(replica);
    let others = replica.others();
    let asked = others.iter().map(|(id, address)| async move { (*id, ask(replica, *id, address).await) });
    for (id, answer) in futures::future::join_all(asked).await {
        let Some(answer) = answer else {
            known.silent.push(id);
            continue;
        };
        known.left_out = known.left_out.saturating_add(answer.left_out);
        for flow in answer.flows {
            let last = Stamp(flow.last_ms);
            if let Ok((flow, times)) = read(flow) {
                merge(&mut known.flows, flow, Times { times, last });
            }
        }
    }
    known
}

async fn ask(replica: &Replica, id: u64, address: &str) -> Option<v1::FlowsResponse> {
    let ask = async {
        let channel = replica.dial_replica(id, address).await.ok()?;
        let client = v1::policy_registry_client::PolicyRegistryClient::new(channel);
        let mut client = client.max_decoding_message_size(32 << 20);
        client.flows(v1::FlowsRequest { local_only: true, limit: 0 }).await.ok()
    };
    tokio::time::timeout(ASKED_FOR, ask).await.ok().flatten().map(tonic::Response::into_inner)
}

/// Those of them, newest first, as many as asked for and as one answer holds.
pub(super) fn answer(known: Known, limit: u32) -> v1::FlowsResponse {
    let limit = if limit == 0 { ANSWER_MAX } else { ANSWER_MAX.min(limit as usize) };
    let surplus = known.flows.len().saturating_sub(limit) as u64;
    v1::FlowsResponse {
        flows: newest(known.flows.into_iter().collect(), limit),
        left_out: known.left_out.saturating_add(surplus),
        silent: known.silent,
    }
}

/// The newest, in words.
pub(super) fn newest(mut flows: Vec<(Flow, Times)>, limit: usize) -> Vec<v1::SeenFlow> {
    flows.sort_by(|(a, a_times), (b, b_times)| b_times.last.cmp(&a_times.last).then_with(|| a.cmp(b)));
    let told = flows.into_iter().take(limit).map(|(flow, Times { times, last })| v1::SeenFlow {
        source: flow.source.to_string(),
        destination: flow.destination.to_string(),
        port: flow.port.into(),
        allowed: flow.allowed,
        times,
        last_ms: last.0,
    });
    told.collect()
}
