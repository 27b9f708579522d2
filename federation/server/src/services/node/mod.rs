//! Nodes: enrolling them, what operators say of them, and what makes their TPMs ours.

mod endorse;
mod enrol;
mod history;
mod operate;
mod replica;

use super::{OrStatus, new_token, request_id, token_expiry};
use crate::authorise::actor;
use crate::replica::Replica;
use crate::replica::budget::Budget;
use ambit_model::Code;
use ambit_proto::v1;
use ambit_state::objects::{TokenRow, TokenScope};
use ambit_state::{Command, NodeVerb};
use enrol::Enrolment;
use tonic::{Request, Response, Status, Streaming};

pub(crate) struct Nodes {
    replica: Replica,
    enrolment: Enrolment,
}

impl Nodes {
    pub(crate) fn new(replica: Replica) -> Self {
        let enrolment = Enrolment { replica: replica.clone(), budget: Budget::default() };
        Self { replica, enrolment }
    }
}

#[tonic::async_trait]
impl v1::node_attestation_server::NodeAttestation for Nodes {
    async fn begin(&self, request: Request<v1::BeginRequest>) -> Result<Response<v1::BeginResponse>, Status> {
        let from = actor(&request)?.remote;
        self.enrolment.budget.take(from).or_status()?;
        let result = match self.enrolment.begin(request.into_inner()).await.or_status()? {
            Ok(challenge) => v1::begin_response::Result::Challenge(challenge),
            Err(refusal) if refusal.code.class() == ambit_model::refusal::Class::Unavailable => {
                return Err(refusal).or_status();
            }
            Err(refusal) => {
                tracing::info!(%from, code = %refusal.code, "enrolment refused at its beginning");
                v1::begin_response::Result::Denied(enrol::denied(&refusal, None))
            }
        };
        Ok(Response::new(v1::BeginResponse { result: Some(result) }))
    }

    async fn evidence(
        &self,
        request: Request<Streaming<v1::EvidenceRequest>>,
    ) -> Result<Response<v1::EvidenceResponse>, Status> {
        let actor = actor(&request)?;
        let (from, role) = (actor.remote, actor.role);
        self.enrolment.budget.take(from).or_status()?;
        let mut stream = request.into_inner();
        let result = match self.enrolment.evidence(&mut stream, from, role).await? {
            Ok(verdict) => v1::evidence_response::Result::Verdict(verdict),
            Err(denied) => v1::evidence_response::Result::Denied(denied),
        };
        Ok(Response::new(v1::EvidenceResponse { result: Some(result) }))
    }

    async fn create_join_token(
        &self,
        request: Request<v1::CreateJoinTokenRequest>,
    ) -> Result<Response<v1::CreateJoinTokenResponse>, Status> {
        let actor = actor(&request)?;
        let m = request.into_inner();
        let id = request_id(&m.request_id)?;
        let (token, sha256) = new_token("join").or_status()?;
        let scope = TokenScope::Node(m.cluster.parse().or_status()?);
        let row = TokenRow { scope, expires: token_expiry(&self.replica, m.ttl_seconds).or_status()?, used: false };
        let applied = self.replica.propose(actor.client, id, Command::CreateToken(sha256, row)).await.or_status()?;
        applied.outcome.or_status()?;
        Ok(Response::new(v1::CreateJoinTokenResponse { token }))
    }

    async fn allow_ek(&self, request: Request<v1::AllowEkRequest>) -> Result<Response<v1::AllowEkResponse>, Status> {
        self.change_allow_list(request, Command::AllowEk).await
    }
    async fn disallow_ek(&self, request: Request<v1::AllowEkRequest>) -> Result<Response<v1::AllowEkResponse>, Status> {
        self.change_allow_list(request, Command::DisallowEk).await
    }
    async fn put_ek_roots(
        &self,
        request: Request<v1::PutEkRootsRequest>,
    ) -> Result<Response<v1::EndorsementsResponse>, Status> {
        self.change_roots(request).await
    }
    async fn put_ek_deny(
        &self,
        request: Request<v1::PutEkDenyRequest>,
    ) -> Result<Response<v1::EndorsementsResponse>, Status> {
        self.change_deny_list(request).await
    }
    async fn list_endorsements(
        &self,
        request: Request<v1::ListEndorsementsRequest>,
    ) -> Result<Response<v1::EndorsementsResponse>, Status> {
        let reach = actor(&request)?.client.reach;
        let cluster = request.into_inner().cluster;
        if !cluster.is_empty() {
            reach.check(&cluster.parse().or_status()?).or_status()?;
        }
        self.endorsements(&cluster).await.or_status().map(Response::new)
    }

    async fn list_nodes(
        &self,
        request: Request<v1::ListNodesRequest>,
    ) -> Result<Response<v1::ListNodesResponse>, Status> {
        let reach = actor(&request)?.client.reach;
        self.list(&reach).await.or_status().map(Response::new)
    }
    async fn explain_node(
        &self,
        request: Request<v1::ExplainNodeRequest>,
    ) -> Result<Response<v1::ExplainNodeResponse>, Status> {
        let reach = actor(&request)?.client.reach;
        self.explain(&request.into_inner().id, &reach).await.or_status().map(Response::new)
    }
    async fn attestation_at(
        &self,
        request: Request<v1::AttestationAtRequest>,
    ) -> Result<Response<v1::AttestationAtResponse>, Status> {
        let reach = actor(&request)?.client.reach;
        let m = request.into_inner();
        self.within(&reach, &m.id).await.or_status()?;
        self.at(&m.id, m.at_ms).await.or_status().map(Response::new)
    }

    async fn attestation_result(
        &self,
        request: Request<v1::AttestationResultRequest>,
    ) -> Result<Response<v1::AttestationResultResponse>, Status> {
        let reach = actor(&request)?.client.reach;
        let id = request.into_inner().id;
        self.within(&reach, &id).await.or_status()?;
        self.result(&id).await.or_status().map(Response::new)
    }

    async fn ban_node(&self, request: Request<v1::NodeSelection>) -> Result<Response<v1::ListNodesResponse>, Status> {
        self.say(request, NodeVerb::Ban).await
    }
    async fn unban_node(&self, request: Request<v1::NodeSelection>) -> Result<Response<v1::ListNodesResponse>, Status> {
        self.say(request, NodeVerb::Unban).await
    }
    async fn evict_node(&self, request: Request<v1::NodeSelection>) -> Result<Response<v1::ListNodesResponse>, Status> {
        self.say(request, NodeVerb::Evict).await
    }
    async fn quarantine_node(
        &self,
        request: Request<v1::NodeSelection>,
    ) -> Result<Response<v1::ListNodesResponse>, Status> {
        self.say(request, NodeVerb::Quarantine).await
    }
    async fn release_node(
        &self,
        request: Request<v1::NodeSelection>,
    ) -> Result<Response<v1::ListNodesResponse>, Status> {
        self.say(request, NodeVerb::Release).await
    }
}

/// What may be answered otherwise after a read barrier: this replica may not have applied yet what an operator wrote
/// through another a moment ago.
fn maybe_behind(code: Code) -> bool {
    matches!(
        code,
        Code::EkNotExpected
            | Code::JoinTokenInvalid
            | Code::NotFound
            | Code::AppraisalPolicyMissing
            | Code::NodeUntrusted
            | Code::NodeQuarantined
            | Code::NodeBanned
    )
}

/// Counters as the verifier compares them.
pub(crate) fn counters(standing: &ambit_state::objects::Standing) -> ambit_verify::Counters {
    verifier_counters(&standing.counters)
}

/// Counters as the verifier reads them.
pub(crate) fn verifier_counters(c: &ambit_state::objects::Counters) -> ambit_verify::Counters {
    ambit_verify::Counters { reset: c.resets, restart: c.restarts, clock_ms: c.clock, safe: false }
}

/// A point in an IMA log as the cell keeps it.
pub(crate) fn point(c: &ambit_verify::ima::Checkpoint) -> ambit_state::objects::ImaPoint {
    let (offset, entries, pcr) = (c.offset, c.entries, c.pcr.clone());
    ambit_state::objects::ImaPoint { offset, entries, pcr, form: c.form.as_str().to_owned() }
}

/// The boot's PCRs as the cell keeps them, among those quoted.
pub(crate) fn boot_pcrs(
    bank: ambit_verify::Bank,
    quoted: &std::collections::BTreeMap<u32, Vec<u8>>,
) -> ambit_state::objects::BootPcrs {
    let bank = match bank {
        ambit_verify::Bank::Sha256 => ambit_model::appraisal::PcrBank::Sha256,
        ambit_verify::Bank::Sha384 => ambit_model::appraisal::PcrBank::Sha384,
    };
    let boot = quoted.iter().filter(|(n, _)| ambit_model::entry::is_boot_pcr(**n));
    let values = boot.filter_map(|(n, value)| Some((u8::try_from(*n).ok()?, value.clone()))).collect();
    ambit_state::objects::BootPcrs { bank, values }
}

/// The same as the verifier goes on from it.
pub(crate) fn checkpoint(
    standing: &ambit_state::objects::Standing,
) -> Result<ambit_verify::ima::Checkpoint, ambit_model::Refusal> {
    let p = &standing.ima;
    let unknown = || ambit_model::Refusal::new(Code::Internal, "a known way of extending PCR 10", p.form.clone());
    let form = ambit_verify::ima::ImaForm::from_text(&p.form).ok_or_else(unknown)?;
    Ok(ambit_verify::ima::Checkpoint { offset: p.offset, entries: p.entries, pcr: p.pcr.clone(), form })
}

/// Counters as the cell keeps them.
pub(crate) fn stored(c: &ambit_verify::Counters) -> ambit_state::objects::Counters {
    ambit_state::objects::Counters { resets: c.reset, restarts: c.restart, clock: c.clock_ms }
}
