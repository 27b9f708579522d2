//! What operators ask and say of nodes.

use super::Nodes;
use crate::authorise::{Reach, actor};
use crate::services::{OrStatus, policy, request_id};
use ambit_model::{Code, NodeId, Refusal};
use ambit_proto::v1;
use ambit_state::objects::{DenialRow, NodeRow, NodeState};
use ambit_state::{Command, NodeVerb, Nodes as Selected, State};
use std::collections::BTreeMap;
use tonic::{Request, Response, Status};

/// Nodes named in one call.
const NODES_MAX: usize = 10_000;

/// Agents by node id, as every replica of the cell tells.
type Agents = BTreeMap<String, v1::AgentRevision>;

impl Nodes {
    pub(super) async fn list(&self, reach: &Reach) -> Result<v1::ListNodesResponse, Refusal> {
        let agents = policy::all_agents(&self.replica).await;
        let read = |s: &State| {
            let nodes = s.nodes().filter(|(_, n)| reach.has(&n.cluster));
            nodes.map(|(id, n)| message(s, &agents, id, n)).collect()
        };
        Ok(v1::ListNodesResponse { nodes: self.replica.read(read).await? })
    }

    /// Whether a node may be asked of. Who was never admitted is of no cluster, and the whole cell's matter.
    pub(super) async fn within(&self, reach: &Reach, id: &str) -> Result<(), Refusal> {
        let id: NodeId = id.parse()?;
        match self.replica.read(|s| s.node(&id).map(|n| n.cluster.clone())).await? {
            Some(cluster) => reach.check(&cluster),
            None if *reach == Reach::Whole => Ok(()),
            None => {
                Err(Refusal::new(Code::NotFound, "a node of the clusters that the caller administers", id.to_string()))
            }
        }
    }

    /// Of one node: its standing and its denials. Without an id: every denial kept.
    pub(super) async fn explain(&self, id: &str, reach: &Reach) -> Result<v1::ExplainNodeResponse, Refusal> {
        if id.is_empty() {
            let of = |s: &State, d: &DenialRow| s.node(&d.node).is_some_and(|n| reach.has(&n.cluster));
            let read = |s: &State| {
                let denials = s.denials().filter(|(_, d)| *reach == Reach::Whole || of(s, d));
                denials.map(|(_, d)| denial_message(d)).collect()
            };
            let denials = self.replica.read(read).await?;
            return Ok(v1::ExplainNodeResponse { node: None, denials, attestation_result_json: String::new() });
        }
        self.within(reach, id).await?;
        let id: NodeId = id.parse()?;
        let agents = policy::all_agents(&self.replica).await;
        let answer = self.replica.read(|s| explanation(s, &agents, &id)).await?;
        if answer.node.is_none() && answer.denials.is_empty() {
            return Err(Refusal::new(Code::NotFound, "a node that enrolled or was denied", id.to_string()));
        }
        Ok(answer)
    }

    /// A verb about nodes. Answers with the nodes as they are afterwards.
    pub(super) async fn say(
        &self,
        request: Request<v1::NodeSelection>,
        verb: NodeVerb,
    ) -> Result<Response<v1::ListNodesResponse>, Status> {
        let actor = actor(&request)?;
        let m = request.into_inner();
        let request = request_id(&m.request_id)?;
        let selected = selection(&m).or_status()?;
        let before: BTreeMap<NodeId, NodeState> =
            self.replica.local(|s| s.nodes().map(|(id, n)| (*id, n.state)).collect());
        let command = Command::SetNodes(verb, selected.clone());
        self.replica.propose(actor.client, request, command).await.or_status()?.outcome.or_status()?;
        let agents = policy::all_agents(&self.replica).await;
        let touched = |id: &NodeId, row: &NodeRow| match &selected {
            Selected::Ids(ids) => ids.contains(id),
            Selected::Cluster(_) => before.get(id) != Some(&row.state),
        };
        let nodes = self
            .replica
            .local(|s| s.nodes().filter(|(id, n)| touched(id, n)).map(|(id, n)| message(s, &agents, id, n)).collect());
        Ok(Response::new(v1::ListNodesResponse { nodes }))
    }
}

fn selection(m: &v1::NodeSelection) -> Result<Selected, Refusal> {
    match (m.ids.as_slice(), m.cluster.as_str()) {
        ([], "") => Err(Refusal::new(Code::BadRequest, "node ids or a cluster", "neither")),
        ([], cluster) => Ok(Selected::Cluster(cluster.parse()?)),
        (ids, "") if ids.len() <= NODES_MAX => {
            Ok(Selected::Ids(ids.iter().map(|id| id.parse()).collect::<Result<_, _>>()?))
        }
        (ids, "") => Err(Refusal::new(Code::BadRequest, format!("at most {NODES_MAX} ids"), ids.len().to_string())),
        _ => Err(Refusal::new(Code::BadRequest, "node ids or a cluster", "both")),
    }
}

pub(super) fn message(s: &State, agents: &Agents, id: &NodeId, n: &NodeRow) -> v1::Node {
    let agent = agents.get(&id.to_string());
    let standing = s.standing(id);
    v1::Node {
        id: id.to_string(),
        cluster: n.cluster.to_string(),
        generation: n.generation.0,
        state: n.state.as_str().to_owned(),
        ek_class: n.ek.class.clone(),
        address: agent.map(|a| a.address.clone()).unwrap_or_default(),
        last_verdict_ms: standing.map(|s| s.verdict.0).unwrap_or_default(),
        resets: standing.map(|s| u64::from(s.counters.resets)).unwrap_or_default(),
        restarts: standing.map(|s| u64::from(s.counters.restarts)).unwrap_or_default(),
        applied_revision: agent.map(|a| a.applied).unwrap_or_default(),
        connected: agent.is_some_and(|a| a.connected),
        policy: standing.map(|s| s.policy.to_string()).unwrap_or_default(),
        code: match n.state {
            NodeState::Untrusted(code) => code.to_string(),
            _ => String::new(),
        },
        late: n.state == NodeState::Admitted && s.is_late(id),
    }
}

fn denial_message(d: &DenialRow) -> v1::DenialRecord {
    v1::DenialRecord {
        stamp_ms: d.stamp.0,
        node: d.node.to_string(),
        code: d.code.clone(),
        diverged: d.diverged.clone(),
        expected: d.expected.clone(),
        found: d.found.clone(),
        remedy: Code::from_text(&d.code).map(Code::remedy).unwrap_or_default().to_owned(),
    }
}

fn explanation(s: &State, agents: &Agents, id: &NodeId) -> v1::ExplainNodeResponse {
    let denials = s.denials().filter(|(_, d)| d.node == *id).map(|(_, d)| denial_message(d));
    let row = s.node(id);
    v1::ExplainNodeResponse {
        node: row.map(|n| message(s, agents, id, n)),
        denials: denials.collect(),
        attestation_result_json: row.map(|n| n.claims.clone()).unwrap_or_default(),
    }
}
