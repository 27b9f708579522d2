//! Enrolling nodes: two round trips, then one commit, then one signature (design.md section 3).

use super::{OrStatus, new_token, request_id, token_expiry, token_sha256};
use crate::authorise::actor;
use crate::replica::budget::Budget;
use crate::replica::{Replica, random, ticket};
use ambit_identity::{Csr, issue};
use ambit_model::{ClusterId, Code, NodeId, Refusal};
use ambit_proto::v1;
use ambit_state::command::Admission;
use ambit_state::objects::{Counters, DenialRow, NodeRow, NodeState, TokenRow, TokenScope};
use ambit_state::{Command, State};
use ambit_verify::{
    ActivatedAk, Bank, BeginInput, Denial, EkClass, EkRoot, Endorsements, Entropy, EvidenceHeader, Expected, KeyHome, LogExtent,
    NodeEvidence, PresentedEk, Terms, TicketBody, Verified,
};
use sha2::{Digest, Sha256};
use std::net::IpAddr;
use tonic::{Request, Response, Status, Streaming};
use zeroize::Zeroizing;

/// An answer takes a few TPM operations; a discrete TPM needs seconds for them.
const ANSWER_MS: u64 = 60_000;
/// Firmware and boot (0-7), grub and kernel (8, 9), IMA (10), shim (14).
const PCR_MASK: u32 = 0x47ff;
/// Verdicts are wanted again within half of this; the unattested maximum ends an SVID in any case.
const NEXT_DEADLINE_MS: u64 = ambit_state::UNATTESTED_MAX_MS;
/// A stranger's stream is not held open for nothing.
const FIRST_FRAME: std::time::Duration = std::time::Duration::from_secs(10);
const EKS_MAX: usize = 10_000;
const TOKEN_BYTES_MAX: usize = 256;

pub(crate) struct Nodes {
    replica: Replica,
    budget: Budget,
}

impl Nodes {
    pub(crate) fn new(replica: Replica) -> Self {
        Self { replica, budget: Budget::default() }
    }

    fn judge_begin(&self, m: v1::BeginRequest) -> Result<v1::Challenge, Refusal> {
        let cluster: ClusterId = m.cluster.parse()?;
        if m.join_token.len() > TOKEN_BYTES_MAX {
            return Err(Refusal::new(Code::JoinTokenInvalid, "a join token of this cell", "a longer text"));
        }
        let presented = PresentedEk::parse(BeginInput {
            cluster: cluster.clone(),
            ek_certificate: m.ek_certificate,
            ek_intermediates: m.ek_intermediates,
            ek_public: m.ek_public,
            ak_public: m.ak_public,
            agent_nonce: m.agent_nonce,
        })?;
        let node = presented.node();
        let now = self.replica.now();
        let (expected, endorsements, endorsement_revision) =
            self.replica.local(|s| expectation(s, &cluster, &node, &m.join_token))?;
        let endorsed = presented.endorse(expected, &endorsements, now)?;
        let entropy =
            Entropy { secret: Zeroizing::new(random()?), server_nonce: random()?, seed: Zeroizing::new(random()?) };
        let terms = Terms {
            bank: Bank::Sha256,
            pcr_mask: PCR_MASK,
            ima_offset: 0,
            deadline: now.plus_ms(ANSWER_MS),
            endorsement_revision,
            policy_revision: ambit_model::Revision(0),
        };
        let (challenge, body) = endorsed.challenge(entropy, terms)?;
        Ok(v1::Challenge {
            ticket: ticket::seal_ticket(&self.replica, &body.encode())?,
            server_nonce: challenge.server_nonce.to_vec(),
            credential_blob: challenge.credential_blob,
            encrypted_secret: challenge.encrypted_secret,
            bank: Bank::Sha256.as_str().to_owned(),
            pcr_mask: PCR_MASK,
            ima_offset: 0,
            deadline_ms: now.plus_ms(ANSWER_MS).0,
        })
    }

    /// Header, HMAC, quote; only then are the logs read, no more of them than the header states.
    async fn judge_evidence(
        &self,
        stream: &mut Streaming<v1::EvidenceRequest>,
        from: IpAddr,
    ) -> Result<Result<v1::Verdict, v1::Denied>, Status> {
        let first = tokio::time::timeout(FIRST_FRAME, stream.message()).await;
        let first =
            first.map_err(|_| Refusal::new(Code::EvidenceMalformed, "a header at once", "silence")).or_status()?;
        let header = match first?.and_then(|m| m.part) {
            Some(v1::evidence_request::Part::Header(header)) => header,
            _ => return Err(Refusal::new(Code::EvidenceMalformed, "a header first", "something else")).or_status(),
        };
        let ticket = header.ticket.clone();
        let csr_der = header.csr.clone();
        let opened = ticket::open_ticket(&self.replica, &ticket).and_then(|plain| {
            let body = TicketBody::decode(&plain)?;
            let header = evidence_header(header)?;
            let extents = (header.boot_log, header.ima_log);
            Ok((ActivatedAk::open(body, &ticket, header, self.replica.now())?, extents))
        });
        // Before a good HMAC only local counters move: nothing a stranger sends reaches the log.
        let (activated, (boot, ima)) = match opened {
            Ok(opened) => opened,
            Err(refusal) => {
                tracing::info!(%from, code = %refusal.code, "evidence refused before activation");
                return Ok(Err(denied(&refusal, None)));
            }
        };
        let session = activated.session();
        let judged = match activated.quote(&[]) {
            Err(refusal) => Err(Denial { refusal, diverged: None }),
            Ok(quote) => match read_logs(stream, boot, ima).await {
                // Cut short or overlong after a good HMAC: the nonce is spent like after any other bad evidence.
                Err(refusal) => Err(Denial { refusal, diverged: None }),
                Ok((boot_log, ima_log)) => {
                    let stored = self.replica.local(|s| s.node(&session.node).and_then(stored_counters));
                    // Replaying a large log takes milliseconds; it must not hold up other calls.
                    let judged = tokio::task::spawn_blocking(move || quote.appraise(&boot_log, &ima_log, stored)).await;
                    judged.map_err(|e| Status::internal(e.to_string()))?
                }
            },
        };
        match judged {
            Ok(verified) => match certifiable(&csr_der, &verified) {
                Ok(csr) => self.admit(verified, &csr).await.or_status(),
                Err(refusal) => self.deny(&session, Denial { refusal, diverged: None }).await.or_status(),
            },
            Err(denial) => self.deny(&session, denial).await.or_status(),
        }
    }

    /// A failure after a good HMAC consumes the nonce and is kept for operators.
    async fn deny(
        &self,
        session: &ambit_verify::Session,
        denial: Denial,
    ) -> Result<Result<v1::Verdict, v1::Denied>, Refusal> {
        let row = DenialRow {
            stamp: self.replica.now(),
            node: session.node,
            code: denial.refusal.code.to_string(),
            diverged: denial.diverged.clone().unwrap_or_default(),
            expected: denial.refusal.expected.clone(),
            found: denial.refusal.found.clone(),
        };
        let command = Command::DenyNode(session.nonce, session.deadline, row);
        if let Err(refusal) = self.propose_for(&session.node, command).await?.outcome {
            return Ok(Err(denied(&refusal, None)));
        }
        tracing::warn!(node = %session.node, code = %denial.refusal.code, diverged = denial.diverged, "enrolment denied");
        Ok(Err(denied(&denial.refusal, denial.diverged)))
    }

    /// Each arrival of evidence is a request of its own: that it serves once is the nonce's work, and a second arrival
    /// is told so.
    async fn propose_for(&self, node: &NodeId, command: Command) -> Result<ambit_state::Applied, Refusal> {
        self.replica.propose(Sha256::digest(node.0).into(), random()?, command).await
    }

    async fn admit(
        &self,
        evidence: Verified<NodeEvidence>,
        csr: &Csr,
    ) -> Result<Result<v1::Verdict, v1::Denied>, Refusal> {
        let now = self.replica.now();
        let claims = evidence.claims_json(now);
        let (node, cluster) = (evidence.node, evidence.cluster.clone());
        let command = Command::AdmitNode(admission(&self.replica, &evidence, csr, claims.clone()));
        let applied = self.propose_for(&node, command).await?;
        if let Err(refusal) = &applied.outcome {
            return Ok(Err(denied(refusal, None)));
        }
        let mut issuances = applied.into_issuances()?;
        let committed = issuances.pop().unwrap_or_else(|| Err(Refusal::new(Code::Internal, "one leaf", "none")))?;
        let generation = committed.get().binding.map(|(_, g)| g.0).unwrap_or_default();
        self.replica.check_clock()?;
        let chain = issue(committed, csr, self.replica.issuer())?;
        tracing::info!(%node, %cluster, generation, "node admitted");
        let bundle = self.replica.local(|s| {
            s.cell().map(|c| v1::Bundle {
                trust_domain: c.trust_domain.to_string(),
                sequence: c.bundle_sequence,
                roots_der: vec![c.root_der.clone()],
            })
        });
        Ok(Ok(v1::Verdict {
            svid_chain_der: chain.iter().map(|c| c.to_vec()).collect(),
            bundle,
            attestation_result_json: claims,
            next_deadline_ms: now.plus_ms(NEXT_DEADLINE_MS).0,
            node_id: node.to_string(),
            generation,
        }))
    }
}

fn admission(replica: &Replica, e: &Verified<NodeEvidence>, csr: &Csr, claims: String) -> Admission {
    Admission {
        node: e.node,
        cluster: e.cluster.clone(),
        nonce: e.nonce,
        deadline: e.deadline,
        join_token: e.join_token,
        endorsement_revision: e.endorsement_revision,
        ak_name: e.ak_name.clone(),
        counters: Counters { resets: e.counters.reset, restarts: e.counters.restart, clock: e.counters.clock_ms },
        ek_class: e.ek_class.as_str().to_owned(),
        key_hash: csr.spki_sha256(),
        authority: replica.issuer().authority().to_owned(),
        claims,
        evidence_sha256: e.evidence_sha256,
    }
}

fn stored_counters(row: &NodeRow) -> Option<ambit_verify::Counters> {
    let c = row.counters;
    // An evicted node starts anew.
    (row.state == NodeState::Admitted).then_some(ambit_verify::Counters {
        reset: c.resets,
        restart: c.restarts,
        clock_ms: c.clock,
        safe: false,
    })
}

/// Why this cluster would take this EK, its EK roots, and the revision of both.
fn expectation(
    s: &State,
    cluster: &ClusterId,
    node: &NodeId,
    token: &str,
) -> Result<(Expected, Endorsements, ambit_model::Revision), Refusal> {
    let cell = s.cell().ok_or_else(|| Refusal::new(Code::Unavailable, "a founded cell", "an empty one"))?;
    let row =
        s.cluster(cluster).ok_or_else(|| Refusal::new(Code::NotFound, "a cluster of this cell", cluster.as_str()))?;
    let roots = row
        .ek_roots
        .iter()
        .filter_map(|(der, class)| Some(EkRoot { der: der.clone(), class: EkClass::from_text(class)? }))
        .collect();
    let endorsements = Endorsements { roots, intermediates: Vec::new(), denied: Vec::new() };
    let known = s.node(node).is_some_and(|n| n.state == NodeState::Admitted && n.cluster == *cluster);
    let expected = if known || s.ek_allowed(cluster, node) {
        Expected::AllowListed
    } else if token.is_empty() {
        Expected::Nobody
    } else {
        let sha256 = token_sha256(token);
        match s.token(&sha256) {
            Some(t) if t.scope == TokenScope::Node(cluster.clone()) && t.used => {
                return Err(Refusal::new(Code::JoinTokenUsed, "an unused join token", "one that was used"));
            }
            Some(t) if t.scope == TokenScope::Node(cluster.clone()) && t.expires >= s.stamp() => {
                Expected::JoinToken(sha256)
            }
            Some(_) | None => {
                return Err(Refusal::new(
                    Code::JoinTokenInvalid,
                    "a known, unexpired join token of this cluster",
                    "another",
                ));
            }
        }
    };
    Ok((expected, endorsements, cell.endorsement_revision))
}

fn evidence_header(h: v1::EvidenceHeader) -> Result<EvidenceHeader, Refusal> {
    let sha256 = |bytes: &[u8]| {
        <[u8; 32]>::try_from(bytes)
            .map_err(|_| Refusal::new(Code::EvidenceMalformed, "a SHA-256 of 32 bytes", bytes.len().to_string()))
    };
    Ok(EvidenceHeader {
        boot_log: LogExtent { len: h.boot_log_len, sha256: sha256(&h.boot_log_sha256)? },
        ima_log: LogExtent { len: h.ima_log_len, sha256: sha256(&h.ima_log_sha256)? },
        hmac: h.hmac,
        csr: h.csr,
        quote: h.quote,
        signature: h.signature,
        pcrs: h.pcrs.into_iter().map(|p| (p.index, p.value)).collect(),
        ek_public: h.ek_public,
        ak_public: h.ak_public,
        svid_key: KeyHome::from_wire(h.svid_public, h.svid_certify, h.svid_certify_signature)?,
    })
}

/// The request's own key, if it is the one that the evidence was quoted over.
fn certifiable(csr_der: &[u8], evidence: &Verified<NodeEvidence>) -> Result<Csr, Refusal> {
    let csr = Csr::parse(csr_der)?;
    if csr.spki() != evidence.csr_spki {
        return Err(Refusal::new(Code::CsrMalformed, "the key quoted over", "another"));
    }
    Ok(csr)
}

/// Both logs, within the time that an answer has.
async fn read_logs(
    stream: &mut Streaming<v1::EvidenceRequest>,
    boot: LogExtent,
    ima: LogExtent,
) -> Result<(Vec<u8>, Vec<u8>), Refusal> {
    let both = async { Ok((read_exactly(stream, boot).await?, read_exactly(stream, ima).await?)) };
    let late = || Refusal::new(Code::EvidenceMalformed, "both logs before the deadline", "silence");
    tokio::time::timeout(std::time::Duration::from_millis(ANSWER_MS), both).await.map_err(|_| late())?
}

/// Reads one log of the stated length; chunks never straddle the two logs.
async fn read_exactly(stream: &mut Streaming<v1::EvidenceRequest>, extent: LogExtent) -> Result<Vec<u8>, Refusal> {
    let wanted = usize::try_from(extent.len).unwrap_or(usize::MAX);
    let mut log = Vec::new();
    while log.len() < wanted {
        match stream.message().await.ok().flatten().and_then(|m| m.part) {
            Some(v1::evidence_request::Part::Chunk(chunk))
                if !chunk.is_empty() && log.len() + chunk.len() <= wanted =>
            {
                log.extend(chunk);
            }
            _ => {
                let found = format!("{} bytes and then something else", log.len());
                return Err(Refusal::new(Code::EvidenceMalformed, format!("a log of {wanted} bytes"), found));
            }
        }
    }
    Ok(log)
}

fn denied(refusal: &Refusal, diverged: Option<String>) -> v1::Denied {
    let told = refusal.for_node();
    v1::Denied {
        code: told.code.to_string(),
        remedy: told.code.remedy().to_owned(),
        diverged: diverged.unwrap_or_default(),
    }
}

#[tonic::async_trait]
impl v1::node_attestation_server::NodeAttestation for Nodes {
    async fn begin(&self, request: Request<v1::BeginRequest>) -> Result<Response<v1::BeginResponse>, Status> {
        let from = actor(&request)?.remote;
        self.budget.take(from).or_status()?;
        let m = request.into_inner();
        let judged = match self.judge_begin(m.clone()) {
            // This replica may not have applied yet what an operator wrote through another a moment ago.
            Err(r) if matches!(r.code, Code::EkNotExpected | Code::JoinTokenInvalid | Code::NotFound) => {
                self.replica.cell().read_barrier().await.or_status()?;
                self.judge_begin(m)
            }
            judged => judged,
        };
        let result = match judged {
            Ok(challenge) => v1::begin_response::Result::Challenge(challenge),
            Err(refusal) if refusal.code == Code::Unavailable => return Err(refusal).or_status(),
            Err(refusal) => {
                tracing::info!(%from, code = %refusal.code, "enrolment refused at its beginning");
                v1::begin_response::Result::Denied(denied(&refusal, None))
            }
        };
        Ok(Response::new(v1::BeginResponse { result: Some(result) }))
    }

    async fn evidence(
        &self,
        request: Request<Streaming<v1::EvidenceRequest>>,
    ) -> Result<Response<v1::EvidenceResponse>, Status> {
        let from = actor(&request)?.remote;
        self.budget.take(from).or_status()?;
        let mut stream = request.into_inner();
        let result = match self.judge_evidence(&mut stream, from).await? {
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
        self.replica
            .propose(actor.client, id, Command::CreateToken(sha256, row))
            .await
            .or_status()?
            .outcome
            .or_status()?;
        Ok(Response::new(v1::CreateJoinTokenResponse { token }))
    }

    async fn allow_ek(&self, request: Request<v1::AllowEkRequest>) -> Result<Response<v1::AllowEkResponse>, Status> {
        let actor = actor(&request)?;
        let m = request.into_inner();
        let id = request_id(&m.request_id)?;
        if m.node_ids.is_empty() || m.node_ids.len() > EKS_MAX {
            return Err(Refusal::new(Code::BadRequest, format!("1-{EKS_MAX} node ids"), m.node_ids.len().to_string()))
                .or_status();
        }
        let nodes: Vec<NodeId> = m.node_ids.iter().map(|n| n.parse()).collect::<Result<_, _>>().or_status()?;
        let allowed = nodes.len() as u32;
        let command = Command::AllowEk(m.cluster.parse().or_status()?, nodes);
        self.replica.propose(actor.client, id, command).await.or_status()?.outcome.or_status()?;
        Ok(Response::new(v1::AllowEkResponse { allowed }))
    }

    async fn list_nodes(&self, _: Request<v1::ListNodesRequest>) -> Result<Response<v1::ListNodesResponse>, Status> {
        let agents = super::policy::all_agents(&self.replica).await;
        let nodes =
            self.replica.read(|s| s.nodes().map(|(id, n)| message(&agents, id, n)).collect()).await.or_status()?;
        Ok(Response::new(v1::ListNodesResponse { nodes }))
    }

    async fn explain_node(
        &self,
        request: Request<v1::ExplainNodeRequest>,
    ) -> Result<Response<v1::ExplainNodeResponse>, Status> {
        let asked = request.into_inner().id;
        if asked.is_empty() {
            let denials =
                self.replica.read(|s| s.denials().map(|(_, d)| denial_message(d)).collect()).await.or_status()?;
            return Ok(Response::new(v1::ExplainNodeResponse {
                node: None,
                denials,
                attestation_result_json: String::new(),
            }));
        }
        let id: NodeId = asked.parse().or_status()?;
        let agents = super::policy::all_agents(&self.replica).await;
        let answer = self.replica.read(|s| Self::explanation(s, &agents, &id)).await.or_status()?;
        if answer.node.is_none() && answer.denials.is_empty() {
            return Err(Refusal::new(Code::NotFound, "a node that enrolled or was denied", id.to_string())).or_status();
        }
        Ok(Response::new(answer))
    }

    async fn ban_node(&self, request: Request<v1::NodeRef>) -> Result<Response<v1::Node>, Status> {
        self.put_out(request, Command::BanNode).await
    }
    async fn evict_node(&self, request: Request<v1::NodeRef>) -> Result<Response<v1::Node>, Status> {
        self.put_out(request, Command::EvictNode).await
    }
    async fn unban_node(&self, _: Request<v1::NodeRef>) -> Result<Response<v1::Node>, Status> {
        super::unbuilt::unbuilt("NodeAttestation.unban_node")
    }
    async fn quarantine_node(&self, _: Request<v1::NodeRef>) -> Result<Response<v1::Node>, Status> {
        super::unbuilt::unbuilt("NodeAttestation.quarantine_node")
    }
    async fn release_node(&self, _: Request<v1::NodeRef>) -> Result<Response<v1::Node>, Status> {
        super::unbuilt::unbuilt("NodeAttestation.release_node")
    }
    async fn attestation_at(
        &self,
        _: Request<v1::AttestationAtRequest>,
    ) -> Result<Response<v1::AttestationAtResponse>, Status> {
        super::unbuilt::unbuilt("NodeAttestation.attestation_at")
    }
    async fn put_ek_roots(
        &self,
        _: Request<v1::PutEkRootsRequest>,
    ) -> Result<Response<v1::EndorsementsResponse>, Status> {
        super::unbuilt::unbuilt("NodeAttestation.put_ek_roots")
    }
    async fn disallow_ek(&self, _: Request<v1::AllowEkRequest>) -> Result<Response<v1::AllowEkResponse>, Status> {
        super::unbuilt::unbuilt("NodeAttestation.disallow_ek")
    }
    async fn put_ek_deny(
        &self,
        _: Request<v1::PutEkDenyRequest>,
    ) -> Result<Response<v1::EndorsementsResponse>, Status> {
        super::unbuilt::unbuilt("NodeAttestation.put_ek_deny")
    }
    async fn list_endorsements(
        &self,
        _: Request<v1::ListEndorsementsRequest>,
    ) -> Result<Response<v1::EndorsementsResponse>, Status> {
        super::unbuilt::unbuilt("NodeAttestation.list_endorsements")
    }
}

/// Agents by node id, as every replica of the cell tells.
type Agents = std::collections::BTreeMap<String, v1::AgentRevision>;

fn message(agents: &Agents, id: &NodeId, n: &NodeRow) -> v1::Node {
    let agent = agents.get(&id.to_string());
    v1::Node {
        id: id.to_string(),
        cluster: n.cluster.to_string(),
        generation: n.generation.0,
        state: format!("{:?}", n.state).to_lowercase(),
        ek_class: n.ek_class.clone(),
        address: agent.map(|a| a.address.clone()).unwrap_or_default(),
        last_verdict_ms: n.last_verdict.0,
        resets: u64::from(n.counters.resets),
        restarts: u64::from(n.counters.restarts),
        applied_revision: agent.map(|a| a.applied).unwrap_or_default(),
        connected: agent.is_some_and(|a| a.connected),
        policy: String::new(),
        code: String::new(),
        late: false,
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

impl Nodes {
    async fn put_out(
        &self,
        request: Request<v1::NodeRef>,
        command: impl FnOnce(NodeId) -> Command,
    ) -> Result<Response<v1::Node>, Status> {
        let actor = actor(&request)?;
        let m = request.into_inner();
        let id: NodeId = m.id.parse().or_status()?;
        let request = request_id(&m.request_id)?;
        self.replica.propose(actor.client, request, command(id)).await.or_status()?.outcome.or_status()?;
        let agents = super::policy::all_agents(&self.replica).await;
        let node = self.replica.local(|s| s.node(&id).map(|n| message(&agents, &id, n)));
        node.map(Response::new).ok_or_else(|| Refusal::new(Code::NotFound, "a node", m.id)).or_status()
    }

    fn explanation(s: &State, agents: &Agents, id: &NodeId) -> v1::ExplainNodeResponse {
        let denials = s.denials().filter(|(_, d)| d.node == *id).map(|(_, d)| denial_message(d));
        let row = s.node(id);
        v1::ExplainNodeResponse {
            node: row.map(|n| message(agents, id, n)),
            denials: denials.collect(),
            attestation_result_json: row.map(|n| n.claims.clone()).unwrap_or_default(),
        }
    }
}
