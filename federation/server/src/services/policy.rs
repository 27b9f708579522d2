//! Policies and services: documents in, revisions out, and who holds which revision.

use super::{OrStatus, request_id};
use crate::authorise::actor;
use crate::replica::Replica;
use ambit_model::{Code, ObjectName, Refusal, SpiffeId, TrustDomain};
use ambit_policy::{Document, unknown_domains};
use ambit_proto::convert::{policy_message, service_message};
use ambit_proto::v1;
use ambit_state::objects::PolicyRow;
use ambit_state::{Command, OwnedName, Reply, State};
use std::collections::{BTreeMap, BTreeSet};
use tonic::{Request, Response, Status};

pub(crate) struct Policies(pub(crate) Replica);

/// Agents by node, of every replica that answers within a second: a stream ends at one of them.
pub(crate) async fn all_agents(replica: &Replica) -> BTreeMap<String, v1::AgentRevision> {
    let this = Policies(replica.clone());
    let mut agents = this.local_agents();
    let members: Vec<(u64, String)> = replica.local(|s| s.members().map(|(id, m)| (id, m.address.clone())).collect());
    let others = members.iter().filter(|(id, _)| *id != replica.id());
    for found in futures::future::join_all(others.map(|(id, address)| this.remote_agents(*id, address))).await {
        agents.extend(found);
    }
    agents
}

#[tonic::async_trait]
impl v1::policy_registry_server::PolicyRegistry for Policies {
    async fn apply(&self, request: Request<v1::ApplyRequest>) -> Result<Response<v1::ApplyResponse>, Status> {
        let actor = actor(&request)?;
        let m = request.into_inner();
        let id = request_id(&m.request_id)?;
        let documents = ambit_policy::parse(&m.yaml).or_status()?;
        let (mut policies, mut services, mut objects) = (Vec::new(), Vec::new(), Vec::new());
        let known = self.0.local(State::known_domains);
        for document in documents {
            let unresolved = document.trust_domains().difference(&known).map(ToString::to_string).collect();
            let row = v1::Applied {
                kind: document.kind().to_owned(),
                name: document.name().to_string(),
                changed: false,
                unresolved,
            };
            match document {
                Document::Policy(p) => {
                    objects.insert(policies.len(), row);
                    policies.push(p);
                }
                Document::Service(s) => {
                    objects.push(row);
                    services.push(s);
                }
            }
        }
        let command = Command::ApplyDocuments { policies, services, by: actor.name };
        let applied = self.0.propose(actor.client, id, command).await.or_status()?;
        let revision = applied.index.0;
        let Reply::Documents(changed, export_seq) = applied.outcome.or_status()? else {
            return Err(Refusal::new(Code::Internal, "documents", "another outcome")).or_status();
        };
        for (object, changed) in objects.iter_mut().zip(changed) {
            object.changed = changed;
        }
        Ok(Response::new(v1::ApplyResponse { objects, revision, export_seq }))
    }

    async fn delete(&self, request: Request<v1::DeletePolicyRequest>) -> Result<Response<v1::ApplyResponse>, Status> {
        let actor = actor(&request)?;
        let m = request.into_inner();
        let id = request_id(&m.request_id)?;
        let name: ObjectName = m.name.parse().or_status()?;
        let command = match m.kind.as_str() {
            "Policy" => Command::DeletePolicy(name),
            "Service" => Command::DeleteService(name),
            other => return Err(Refusal::new(Code::BadRequest, "kind Policy or Service", other)).or_status(),
        };
        let applied = self.0.propose(actor.client, id, command).await.or_status()?;
        let revision = applied.index.0;
        let Reply::Documents(_, export_seq) = applied.outcome.or_status()? else {
            return Err(Refusal::new(Code::Internal, "documents", "another outcome")).or_status();
        };
        let object = v1::Applied { kind: m.kind, name: m.name, changed: true, unresolved: Vec::new() };
        Ok(Response::new(v1::ApplyResponse { objects: vec![object], revision, export_seq }))
    }

    async fn list(&self, _: Request<v1::ListPoliciesRequest>) -> Result<Response<v1::ListPoliciesResponse>, Status> {
        self.0.read(listing).await.or_status().map(Response::new)
    }

    async fn explain(&self, request: Request<v1::ExplainRequest>) -> Result<Response<v1::ExplainResponse>, Status> {
        let m = request.into_inner();
        let (src, dst): (SpiffeId, SpiffeId) = (m.source.parse().or_status()?, m.destination.parse().or_status()?);
        let port = u16::try_from(m.port)
            .map_err(|_| Refusal::new(Code::BadRequest, "a port of 1-65535", m.port.to_string()))
            .or_status()?;
        let answer = self
            .0
            .read(|s| {
                let e = s.policy_set().explain(&src, &dst, port);
                v1::ExplainResponse {
                    allowed: e.verdict.allowed,
                    rule: e.verdict.rule.as_ref().map(ToString::to_string).unwrap_or_default(),
                    reason: e.verdict.reason.to_string(),
                    nearest: e.nearest.as_ref().map(ToString::to_string).unwrap_or_default(),
                    revision: s.cell().map(|c| c.revision.0).unwrap_or_default(),
                }
            })
            .await
            .or_status()?;
        Ok(Response::new(answer))
    }

    async fn status(
        &self,
        request: Request<v1::PolicyStatusRequest>,
    ) -> Result<Response<v1::PolicyStatusResponse>, Status> {
        let local_only = request.into_inner().local_only;
        let mut agents = if local_only { self.local_agents() } else { all_agents(&self.0).await };
        let (revision, imported, nodes) = self
            .0
            .read(|s| {
                let nodes: BTreeSet<String> = s
                    .nodes()
                    .filter(|(_, n)| n.state == ambit_state::objects::NodeState::Admitted)
                    .map(|(id, _)| id.to_string())
                    .collect();
                (s.cell().map(|c| c.revision.0).unwrap_or_default(), s.imported(), nodes)
            })
            .await
            .or_status()?;
        if !local_only {
            for id in nodes {
                agents.entry(id.clone()).or_insert(v1::AgentRevision { node: id, ..Default::default() });
            }
        }
        let mut agents: Vec<_> = agents.into_values().collect();
        for agent in &mut agents {
            agent.desired = revision;
        }
        let imported = imported.into_iter().map(|(td, seq)| v1::ImportedSeq { origin: td.to_string(), seq }).collect();
        Ok(Response::new(v1::PolicyStatusResponse { revision, agents, imported }))
    }
}

fn listing(s: &State) -> v1::ListPoliciesResponse {
    let known = s.known_domains();
    let policies = s.policies().map(|(name, row)| message(name, row, &known)).collect();
    let services = s.services().map(|((origin, _), row)| service_message(origin, &row.object)).collect();
    let endpoints = s.endpoints().map(|(_, row)| (&row.object).into()).collect();
    v1::ListPoliciesResponse { policies, services, endpoints }
}

/// One policy, resolved by the trust domains known.
pub(super) fn message((origin, _): &OwnedName, row: &PolicyRow, known: &BTreeSet<TrustDomain>) -> v1::Policy {
    v1::Policy {
        resolved: unknown_domains(&row.object, known).is_empty(),
        written_by: row.written_by.clone(),
        revision: row.revision.0,
        ..policy_message(origin, &row.object)
    }
}

impl Policies {
    fn local_agents(&self) -> BTreeMap<String, v1::AgentRevision> {
        let rows = self.0.agents().all().into_iter();
        rows.map(|(node, a)| {
            let imported = a.imported.into_iter().map(|(origin, seq)| v1::ImportedSeq { origin, seq }).collect();
            let row = v1::AgentRevision {
                node: node.to_string(),
                desired: 0,
                applied: a.applied,
                connected: true,
                imported,
                address: a.address,
            };
            (row.node.clone(), row)
        })
        .collect()
    }

    /// Agents of another replica; a replica that does not answer shows its agents as not connected.
    async fn remote_agents(&self, id: u64, address: &str) -> BTreeMap<String, v1::AgentRevision> {
        let ask = async {
            let channel = self.0.dial_replica(id, address).await?;
            let mut client = v1::policy_registry_client::PolicyRegistryClient::new(channel);
            let answer = client.status(v1::PolicyStatusRequest { local_only: true }).await;
            answer.map_err(|s| ambit_proto::status::from_status(&s))
        };
        match tokio::time::timeout(std::time::Duration::from_secs(1), ask).await {
            Ok(Ok(answer)) => answer.into_inner().agents.into_iter().map(|a| (a.node.clone(), a)).collect(),
            Ok(Err(_)) | Err(_) => BTreeMap::new(),
        }
    }
}
