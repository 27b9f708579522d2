//! Policies and services: documents in, revisions out, and who holds which revision.

use super::plan::{Wanted, change_of, kind_of, plan};
use super::{OrStatus, connection, egress, flows, request_id, unmeshed, who};
use crate::authorise::actor;
use crate::replica::Replica;
use ambit_model::{Address, Code, ObjectName, Refusal, Revision, SpiffeId, Stamp, TrustDomain};
use ambit_policy::{Document, unknown_domains};
use ambit_proto::convert::{group_message, policy_message, service_message};
use ambit_proto::v1;
use ambit_state::objects::{GroupRow, PolicyRow};
use ambit_state::{Command, DocumentsChange, OwnedName, Reply, State};
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
        let known = self.0.local(State::known_domains);
        // The state answers for policies, then for services, then for egress, then for groups.
        let order = |document: &Document| match document {
            Document::Policy(_) => 0,
            Document::Service(_) => 1,
            Document::Egress(_) => 2,
            Document::Group(_) => 3,
        };
        let mut objects: Vec<(u8, v1::Applied)> = documents
            .iter()
            .map(|document| {
                let unresolved = document.trust_domains().difference(&known).map(ToString::to_string).collect();
                let (kind, name) = (document.kind().to_owned(), document.name().to_string());
                (order(document), v1::Applied { kind, name, changed: false, unresolved })
            })
            .collect();
        objects.sort_by_key(|(order, _)| *order);
        let mut objects: Vec<v1::Applied> = objects.into_iter().map(|(_, object)| object).collect();
        let over = m.over.map(Revision);
        let note = note_of(m.unlimited);
        let change = DocumentsChange { over, note, ..change_of(documents, actor.name).or_status()? };
        let command = Command::ChangeDocuments(Box::new(change));
        let (changed, revision, export_seq) = self.change(actor.client, id, command).await.or_status()?;
        for (object, changed) in objects.iter_mut().zip(changed) {
            object.changed = changed;
        }
        Ok(Response::new(v1::ApplyResponse { objects, revision, export_seq }))
    }

    async fn delete(&self, request: Request<v1::DeletePolicyRequest>) -> Result<Response<v1::ApplyResponse>, Status> {
        let actor = actor(&request)?;
        let m = request.into_inner();
        let id = request_id(&m.request_id)?;
        let delete = vec![(kind_of(&m.kind).or_status()?, m.name.parse::<ObjectName>().or_status()?)];
        let (by, over) = (actor.name, m.over.map(Revision));
        let change = DocumentsChange { delete, by, over, note: note_of(m.unlimited), ..DocumentsChange::default() };
        let command = Command::ChangeDocuments(Box::new(change));
        let (_, revision, export_seq) = self.change(actor.client, id, command).await.or_status()?;
        let object = v1::Applied { kind: m.kind, name: m.name, changed: true, unresolved: Vec::new() };
        Ok(Response::new(v1::ApplyResponse { objects: vec![object], revision, export_seq }))
    }

    async fn rollback(&self, request: Request<v1::RollbackRequest>) -> Result<Response<v1::ApplyResponse>, Status> {
        let actor = actor(&request)?;
        let m = request.into_inner();
        let id = request_id(&m.request_id)?;
        let (to, over, by) = (Revision(m.revision), m.over.map(Revision), actor.name);
        let command = Command::RollbackDocuments { to, over, by, note: note_of(m.unlimited) };
        let (_, revision, export_seq) = self.change(actor.client, id, command).await.or_status()?;
        // What it did is what is remembered of it; nothing where nothing was another.
        let done = |s: &State| {
            let row = s.document_changes().find(|(at, _)| at.0 == revision).map(|(_, row)| row.changes.clone());
            row.unwrap_or_default()
        };
        let objects = self.0.local(done).into_iter().map(|change| {
            let (kind, name) = (change.kind.as_str().to_owned(), change.name.to_string());
            v1::Applied { kind, name, changed: true, unresolved: Vec::new() }
        });
        Ok(Response::new(v1::ApplyResponse { objects: objects.collect(), revision, export_seq }))
    }

    async fn plan(&self, request: Request<v1::PlanRequest>) -> Result<Response<v1::PlanResponse>, Status> {
        let actor = actor(&request)?;
        let m = request.into_inner();
        let wanted = match (m.yaml.is_empty(), m.delete.is_empty(), m.rollback_to) {
            (true, true, to) if to > 0 => Wanted::Back(Revision(to)),
            (false, true, 0) => {
                Wanted::Change(change_of(ambit_policy::parse(&m.yaml).or_status()?, actor.name).or_status()?)
            }
            (true, false, 0) => {
                let named = m.delete.iter().map(|d| Ok((kind_of(&d.kind)?, d.name.parse()?)));
                let delete = named.collect::<Result<_, Refusal>>().or_status()?;
                Wanted::Change(DocumentsChange { delete, ..DocumentsChange::default() })
            }
            _ => {
                let found = "none or several";
                let expected = "one of: documents, names to delete, a revision to go back to";
                return Err(Refusal::new(Code::BadRequest, expected, found)).or_status();
            }
        };
        plan(&self.0, wanted).await.or_status().map(Response::new)
    }

    async fn who_can(&self, request: Request<v1::WhoCanRequest>) -> Result<Response<v1::WhoCanResponse>, Status> {
        let m = request.into_inner();
        let port = if m.port == 0 { None } else { Some(port_of(m.port).or_status()?) };
        if let Ok(address) = m.destination.parse::<Address>() {
            return egress::who_can(&self.0, address, port).await.or_status().map(Response::new);
        }
        let destination: SpiffeId = m.destination.parse().or_status()?;
        who::who_can(&self.0, destination, port).await.or_status().map(Response::new)
    }

    async fn unused(&self, request: Request<v1::UnusedRequest>) -> Result<Response<v1::UnusedResponse>, Status> {
        who::unused(&self.0, request.into_inner().within_ms).await.or_status().map(Response::new)
    }

    async fn history(&self, request: Request<v1::HistoryRequest>) -> Result<Response<v1::HistoryResponse>, Status> {
        let limit = usize::try_from(request.into_inner().limit).unwrap_or(usize::MAX);
        self.0
            .read(|s| who::history(s, if limit == 0 { usize::MAX } else { limit }))
            .await
            .or_status()
            .map(Response::new)
    }

    async fn list(&self, _: Request<v1::ListPoliciesRequest>) -> Result<Response<v1::ListPoliciesResponse>, Status> {
        self.0.read(listing).await.or_status().map(Response::new)
    }

    async fn explain(&self, request: Request<v1::ExplainRequest>) -> Result<Response<v1::ExplainResponse>, Status> {
        let m = request.into_inner();
        let (port, at) = (port_of(m.port).or_status()?, Some(Stamp(m.at_ms)).filter(|at| at.0 > 0));
        if let Some(from) = unmeshed::address(&m.source).or_status()? {
            let asked = who::Asked { source: None, destination: m.destination.parse().or_status()?, port, at };
            return unmeshed::explain(&self.0, from, asked).await.or_status().map(Response::new);
        }
        let src: SpiffeId = m.source.parse().or_status()?;
        let dst: SpiffeId = match m.destination.parse::<Address>() {
            Err(_) => m.destination.parse().or_status()?,
            Ok(address) => match egress::explain(&self.0, (&src, address, port), at).await.or_status()? {
                egress::Told::Outside(answer) => return Ok(Response::new(*answer)),
                egress::Told::Inside(id) => id,
            },
        };
        let asked = who::Asked { source: Some(src), destination: dst, port, at };
        who::explain(&self.0, asked).await.or_status().map(Response::new)
    }

    async fn flows(&self, request: Request<v1::FlowsRequest>) -> Result<Response<v1::FlowsResponse>, Status> {
        flows::answer(&self.0, request.into_inner()).await.or_status().map(Response::new)
    }

    async fn connection(
        &self,
        request: Request<v1::ConnectionRequest>,
    ) -> Result<Response<v1::ConnectionResponse>, Status> {
        connection::answer(&self.0, request.into_inner()).await.or_status().map(Response::new)
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

/// What the history says of a change beside what it changed.
fn note_of(unlimited: bool) -> String {
    if unlimited { "without a limit of flips".to_owned() } else { String::new() }
}

fn port_of(port: u32) -> Result<u16, Refusal> {
    let read = u16::try_from(port).ok().filter(|port| *port > 0);
    read.ok_or_else(|| Refusal::new(Code::BadRequest, "a port of 1-65535", port.to_string()))
}

fn listing(s: &State) -> v1::ListPoliciesResponse {
    let known = s.known_domains();
    let policies = s.policies().map(|(name, row)| message(name, row, &known)).collect();
    let services = s.services().map(|((origin, _), row)| service_message(origin, &row.object)).collect();
    let endpoints = s.endpoints().map(|(_, row)| (&row.object).into()).collect();
    let groups = s.groups().map(|(name, row)| group(name, row));
    let egress = s.egress().map(|(_, row)| egress::message(row));
    v1::ListPoliciesResponse { policies, services, endpoints, groups: groups.collect(), egress: egress.collect() }
}

/// One group.
pub(super) fn group((origin, _): &OwnedName, row: &GroupRow) -> v1::Group {
    v1::Group { written_by: row.written_by.clone(), revision: row.revision.0, ..group_message(origin, &row.object) }
}

/// One policy, resolved by the trust domains known; whatever a peer's record calls it, it has the name of its record.
pub(super) fn message((origin, name): &OwnedName, row: &PolicyRow, known: &BTreeSet<TrustDomain>) -> v1::Policy {
    v1::Policy {
        name: name.to_string(),
        resolved: unknown_domains(&row.object, known).is_empty(),
        written_by: row.written_by.clone(),
        revision: row.revision.0,
        ..policy_message(origin, &row.object)
    }
}

impl Policies {
    /// What changed, at which revision, and how far that is exported.
    async fn change(
        &self,
        client: crate::authorise::Client,
        id: [u8; 16],
        command: Command,
    ) -> Result<(Vec<bool>, u64, u64), Refusal> {
        let applied = self.0.propose(client, id, command).await?;
        let revision = applied.index.0;
        match applied.outcome? {
            Reply::Documents(changed, export_seq) => Ok((changed, revision, export_seq)),
            _ => Err(Refusal::new(Code::Internal, "documents", "another outcome")),
        }
    }

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
                refused: a.refused,
                map_digest: a.map_digest,
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
