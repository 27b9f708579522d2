//! Appraisal policies, as operators write, stage, test and learn them; and the blobs that go with them.

use super::{OrStatus, request_id};
use crate::authorise::{Role, actor};
use crate::replica::Replica;
use crate::replica::blobs::{self, Keep};
use crate::replica::policies::lists_of;
use ambit_model::appraisal::AppraisalPolicy;
use ambit_model::{Code, NodeId, ObjectName, Refusal, Stamp};
use ambit_proto::v1;
use ambit_state::objects::{AppraisalPolicyRow, NodeState, PolicyVersion};
use ambit_state::{Command, State};
use ambit_verify::KeptEvidence;
use std::pin::Pin;
use std::sync::Arc;
use tokio_stream::Stream;
use tonic::{Request, Response, Status, Streaming};

/// Documents are written by people.
const YAML_BYTES_MAX: usize = 1024 * 1024;

pub(crate) struct Appraisals(pub(crate) Replica);

type Chunks = Pin<Box<dyn Stream<Item = Result<v1::BlobChunk, Status>> + Send>>;

#[tonic::async_trait]
impl v1::appraisal_server::Appraisal for Appraisals {
    type GetBlobStream = Chunks;

    async fn apply_appraisal_policy(
        &self,
        request: Request<v1::ApplyAppraisalPolicyRequest>,
    ) -> Result<Response<v1::AppraisalPolicyMessage>, Status> {
        let actor = actor(&request)?;
        let m = request.into_inner();
        let id = request_id(&m.request_id)?;
        let policy = parse(&m.yaml).or_status()?;
        // A policy that cannot be compiled here judges nobody: it is refused now, not at the next enrolment.
        self.0.fetch_named(&policy).await.or_status()?;
        self.0.compile(&policy).or_status()?;
        let name = policy.name.clone();
        let content = PolicyVersion {
            version: 0,
            sha256: policy.sha256(),
            canonical: policy.encode().or_status()?,
            clusters: policy.clusters.clone(),
        };
        let command =
            Command::PutAppraisalPolicy { name: name.clone(), content, staged: m.staged, by: actor.name.clone() };
        self.0.propose(actor.client, id, command).await.or_status()?.outcome.or_status()?;
        self.one(&name).or_status()
    }

    async fn delete_appraisal_policy(
        &self,
        request: Request<v1::AppraisalPolicyRef>,
    ) -> Result<Response<v1::AppraisalPolicyMessage>, Status> {
        let (actor, m) = (actor(&request)?, request.into_inner());
        let id = request_id(&m.request_id)?;
        let name: ObjectName = m.name.parse().or_status()?;
        let before = self.0.local(|s| find(s, &name).map(|row| message(s, &name, row)));
        let command = Command::DeleteAppraisalPolicy(name);
        self.0.propose(actor.client, id, command).await.or_status()?.outcome.or_status()?;
        Ok(Response::new(before.unwrap_or_default()))
    }

    async fn list_appraisal_policies(
        &self,
        request: Request<v1::ListAppraisalPoliciesRequest>,
    ) -> Result<Response<v1::ListAppraisalPoliciesResponse>, Status> {
        let reach = actor(&request)?.client.reach;
        let wanted = request.into_inner().name;
        let policies = self.0.read(|s| {
            let rows = s.appraisal_policies().filter(|(name, _)| wanted.is_empty() || name.as_str() == wanted);
            let rows = rows.filter(|(_, row)| row.current.clusters.iter().any(|cluster| reach.has(cluster)));
            rows.map(|(name, row)| message(s, name, row)).collect::<Vec<_>>()
        });
        let policies = policies.await.or_status()?;
        if policies.is_empty() && !wanted.is_empty() {
            return Err(Refusal::new(Code::NotFound, "an appraisal policy of this cell", wanted)).or_status();
        }
        Ok(Response::new(v1::ListAppraisalPoliciesResponse { policies }))
    }

    async fn promote_appraisal_policy(
        &self,
        request: Request<v1::AppraisalPolicyRef>,
    ) -> Result<Response<v1::AppraisalPolicyMessage>, Status> {
        let (actor, m) = (actor(&request)?, request.into_inner());
        let id = request_id(&m.request_id)?;
        let name: ObjectName = m.name.parse().or_status()?;
        let command = Command::PromoteAppraisalPolicy(name.clone());
        self.0.propose(actor.client, id, command).await.or_status()?.outcome.or_status()?;
        self.one(&name).or_status()
    }

    async fn test_appraisal_policy(
        &self,
        request: Request<v1::TestAppraisalPolicyRequest>,
    ) -> Result<Response<v1::TestAppraisalPolicyResponse>, Status> {
        let m = request.into_inner();
        let policy = parse(&m.yaml).or_status()?;
        self.0.fetch_named(&policy).await.or_status()?;
        let compiled = Arc::new(self.0.compile(&policy).or_status()?);
        let only: Option<NodeId> = if m.node.is_empty() { None } else { Some(m.node.parse().or_status()?) };
        let kept = self.0.read(|s| evidence_of(s, &policy, only.as_ref(), m.at_ms)).await.or_status()?;
        if let (Some(node), true) = (only, kept.is_empty()) {
            return Err(Refusal::new(Code::NotFound, "a node with evidence then", node.to_string())).or_status();
        }
        let mut nodes = Vec::new();
        for (node, cluster, sha256) in kept {
            nodes.push(self.test(compiled.clone(), node, cluster, sha256).await);
        }
        Ok(Response::new(v1::TestAppraisalPolicyResponse { nodes }))
    }

    async fn learn_appraisal_policy(
        &self,
        request: Request<v1::LearnAppraisalPolicyRequest>,
    ) -> Result<Response<v1::LearnAppraisalPolicyResponse>, Status> {
        let m = request.into_inner();
        let node: NodeId = m.node.parse().or_status()?;
        let name: ObjectName = m.name.parse().or_status()?;
        let found = self.0.read(|s| Some((s.standing(&node)?.evidence_sha256, s.node(&node)?.cluster.clone()))).await;
        let (sha256, cluster) = found
            .or_status()?
            .ok_or_else(|| Refusal::new(Code::NotFound, "a node that enrolled", node.to_string()))
            .or_status()?;
        let evidence = self.kept(&sha256).await.or_status()?;
        let learnt = self.0.work().run(move || evidence.learn(&name, &cluster)).await.or_status()?;
        let learnt = learnt.map_err(|denial| denial.refusal).or_status()?;
        let yaml = ambit_policy::appraisal::to_yaml_with(&learnt.policy, &learnt.comments);
        let ima_list = learnt.allow_list.unwrap_or_default().into_bytes();
        Ok(Response::new(v1::LearnAppraisalPolicyResponse { yaml, ima_list }))
    }

    /// From operators: allow-lists, to be copied to a majority. From replicas: whatever they copy.
    async fn put_blob(&self, request: Request<Streaming<v1::BlobChunk>>) -> Result<Response<v1::BlobRef>, Status> {
        let actor = actor(&request)?;
        let (keep, bytes) = blobs::collect(request.into_inner()).await.or_status()?;
        let len = bytes.len() as u64;
        let sha256 = match (&actor.role, keep) {
            (Role::Replica(_), _) => self.0.blobs().put(keep, &bytes).or_status()?,
            (_, Keep::Evidence) => {
                return Err(Refusal::new(Code::PermissionDenied, "an allow-list", "evidence")).or_status();
            }
            (_, Keep::AllowList) => {
                ambit_verify::appraisal::AllowList::parse(&bytes).or_status()?;
                let (sha256, copies) = self.0.put_blob(keep, bytes).await.or_status()?;
                let replicas = 1 + self.0.others().len();
                if copies * 2 <= replicas {
                    let expected = format!("copies on a majority of {replicas} replicas");
                    return Err(Refusal::new(Code::Unavailable, expected, copies.to_string())).or_status();
                }
                sha256
            }
        };
        Ok(Response::new(v1::BlobRef { sha256: hex::encode(sha256), bytes: len }))
    }

    async fn get_blob(&self, request: Request<v1::BlobRef>) -> Result<Response<Chunks>, Status> {
        let actor = actor(&request)?;
        let sha256 = super::parse_fingerprint(&request.into_inner().sha256).or_status()?;
        // A replica that asks gets what is here; nobody asks in a circle.
        let bytes = match actor.role {
            Role::Replica(_) => self.0.blobs().get(&sha256),
            _ => self.0.find_blob(&sha256).await.ok(),
        };
        let missing = || Refusal::new(Code::BlobMissing, "an object that is kept here", hex::encode(sha256));
        let bytes = bytes.ok_or_else(missing).or_status()?;
        let keep = if self.0.blobs().is_list(&sha256) { Keep::AllowList } else { Keep::Evidence };
        let chunks = blobs::chunks(keep, &bytes);
        Ok(Response::new(Box::pin(tokio_stream::iter(chunks.into_iter().map(Ok)))))
    }
}

impl Appraisals {
    fn one(&self, name: &ObjectName) -> Result<Response<v1::AppraisalPolicyMessage>, Refusal> {
        let found = self.0.local(|s| find(s, name).map(|row| message(s, name, row)));
        found.map(Response::new).ok_or_else(|| Refusal::new(Code::Internal, "the policy written", name.to_string()))
    }

    async fn kept(&self, sha256: &[u8; 32]) -> Result<KeptEvidence, Refusal> {
        let body = self.0.evidence(sha256).await?;
        KeptEvidence::new(&body.ek_class, &body.bank, body.pcrs, body.boot_log, body.ima_log)
    }

    /// What the policy says of one node's kept evidence.
    async fn test(
        &self,
        policy: Arc<ambit_verify::appraisal::CompiledPolicy>,
        node: NodeId,
        cluster: String,
        sha256: [u8; 32],
    ) -> v1::TestedNode {
        let judged = match self.kept(&sha256).await {
            Ok(evidence) => self.0.work().run(move || evidence.appraise(&[policy])).await,
            Err(refusal) => Err(refusal),
        };
        let mut out = v1::TestedNode {
            node: node.to_string(),
            cluster,
            evidence_sha256: hex::encode(sha256),
            ..Default::default()
        };
        match judged {
            Err(refusal) => {
                out.verdict = "unknown".into();
                (out.code, out.expected, out.found) = (refusal.code.to_string(), refusal.expected, refusal.found);
            }
            Ok(Ok(_)) => out.verdict = "accepted".into(),
            Ok(Err(denial)) => {
                out.verdict = "denied".into();
                out.code = denial.refusal.code.to_string();
                out.diverged = denial.diverged.unwrap_or_default();
                (out.expected, out.found) = (denial.refusal.expected, denial.refusal.found);
            }
        }
        out
    }
}

impl Replica {
    /// Has the allow-lists that a policy names, if any replica has them.
    async fn fetch_named(&self, policy: &AppraisalPolicy) -> Result<(), Refusal> {
        for sha256 in lists_of(policy) {
            if let Err(refusal) = self.find_blob(&sha256).await {
                return Err(Refusal::new(Code::AllowListMissing, hex::encode(sha256), refusal.found));
            }
        }
        Ok(())
    }
}

fn parse(yaml: &str) -> Result<AppraisalPolicy, Refusal> {
    if yaml.len() > YAML_BYTES_MAX {
        let expected = format!("a document of at most {YAML_BYTES_MAX} bytes");
        return Err(Refusal::new(Code::AppraisalPolicyMalformed, expected, yaml.len().to_string()));
    }
    ambit_policy::parse_appraisal(yaml)
}

fn find<'a>(s: &'a State, name: &ObjectName) -> Option<&'a AppraisalPolicyRow> {
    s.appraisal_policies().find(|(n, _)| *n == name).map(|(_, row)| row)
}

fn message(s: &State, name: &ObjectName, row: &AppraisalPolicyRow) -> v1::AppraisalPolicyMessage {
    let resting_on = |version: u64| {
        let standing =
            |id: &NodeId| s.standing(id).is_some_and(|st| st.policy.name == *name && st.policy.version == version);
        s.nodes().filter(|(id, n)| n.state == NodeState::Admitted && standing(id)).count() as u32
    };
    let previous = row.previous.as_ref();
    v1::AppraisalPolicyMessage {
        name: name.to_string(),
        yaml: AppraisalPolicy::decode(&row.current.canonical)
            .map(|p| ambit_policy::appraisal::to_yaml(&p))
            .unwrap_or_default(),
        sha256: hex::encode(row.current.sha256),
        version: row.current.version,
        clusters: row.current.clusters.iter().map(ToString::to_string).collect(),
        previous_version: previous.map(|p| p.version).unwrap_or_default(),
        nodes: resting_on(row.current.version),
        nodes_on_previous: previous.map(|p| resting_on(p.version)).unwrap_or_default(),
    }
}

/// Node, cluster and evidence of the nodes that a policy would govern, now or at an instant.
fn evidence_of(
    s: &State,
    policy: &AppraisalPolicy,
    only: Option<&NodeId>,
    at_ms: u64,
) -> Vec<(NodeId, String, [u8; 32])> {
    let wanted = |id: &NodeId, cluster: &ambit_model::ClusterId| match only {
        Some(node) => node == id,
        None => policy.clusters.contains(cluster),
    };
    let of = |id: &NodeId| match at_ms {
        0 => s.standing(id).map(|st| st.evidence_sha256),
        at => s.verdicts(id).filter(|v| v.since <= Stamp(at) && v.outcome.is_ok()).last().map(|v| v.evidence_sha256),
    };
    let nodes = s.nodes().filter(|(id, n)| wanted(id, &n.cluster));
    nodes.filter_map(|(id, n)| Some((*id, n.cluster.to_string(), of(id)?))).collect()
}
