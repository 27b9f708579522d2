//! Enrolling nodes: two round trips, then one commit, then one signature (design.md section 3).

use super::replica;
use crate::authorise::Role;
use crate::replica::budget::Budget;
use crate::replica::evidence::Body;
use crate::replica::work::Lane;
use crate::replica::{Replica, random, ticket};
use crate::services::logs::read_logs;
use crate::services::rounds::PCR_MASK;
use crate::services::{OrStatus, token_sha256};
use ambit_identity::wrap::Purpose;
use ambit_identity::{Csr, issue};
use ambit_model::{ClusterId, Code, NodeId, Refusal, Revision};
use ambit_proto::v1;
use ambit_state::command::{Admission, Against, Seen};
use ambit_state::objects::{AkFacts, DenialRow, EkFacts, NodeState, PolicyRef, TokenScope};
use ambit_state::sealing::REPLICAS;
use ambit_state::{Command, State};
use ambit_verify::{
    ActivatedAk, Bank, BeginInput, Denial, EkClass, EkDenyRule, EkMake, EkRoot, Endorsements, Entropy, EvidenceHeader,
    Expected, FreshQuote, KeyHome, LogExtent, NodeEvidence, PresentedEk, Session, Terms, TicketBody, Verified,
};
use sha2::{Digest, Sha256};
use std::net::IpAddr;
use std::time::Duration;
use tonic::{Status, Streaming};
use zeroize::Zeroizing;

/// An answer takes a few TPM operations; a discrete TPM needs seconds for them.
const ANSWER_MS: u64 = 60_000;
/// Verdicts are wanted again within half of this; the unattested maximum ends an SVID in any case.
const NEXT_DEADLINE_MS: u64 = ambit_state::UNATTESTED_MAX_MS;
/// A stranger's stream is not held open for nothing.
const FIRST_FRAME: Duration = Duration::from_secs(10);
const TOKEN_BYTES_MAX: usize = 256;

/// Begin and Evidence.
pub(super) struct Enrolment {
    pub(super) replica: Replica,
    pub(super) budget: Budget,
}

impl Enrolment {
    /// The first round trip. The inner refusal is a denial, told by its code.
    pub(super) async fn begin(&self, m: v1::BeginRequest) -> Result<Result<v1::Challenge, Refusal>, Refusal> {
        match self.judge_begin(m.clone()).await {
            Err(r) if super::maybe_behind(r.code) => {
                self.replica.cell().read_barrier().await?;
                Ok(self.judge_begin(m).await)
            }
            judged => Ok(judged),
        }
    }

    async fn judge_begin(&self, m: v1::BeginRequest) -> Result<v1::Challenge, Refusal> {
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
        let policy_revision = self.replica.governing(&cluster)?.revision;
        let entropy =
            Entropy { secret: Zeroizing::new(random()?), server_nonce: random()?, seed: Zeroizing::new(random()?) };
        let terms = Terms {
            bank: Bank::Sha256,
            pcr_mask: PCR_MASK,
            ima_offset: 0,
            deadline: now.plus_ms(ANSWER_MS),
            endorsement_revision,
            policy_revision,
        };
        // The chain of a certificate and a credential for P-384 cost milliseconds.
        let made = self.replica.work().run(move || {
            let endorsed = presented.endorse(expected, &endorsements, now)?;
            let quirks = endorsed.quirks().to_vec();
            endorsed.challenge(entropy, terms).map(|made| (made, quirks))
        });
        let ((challenge, body), quirks) = made.await??;
        if !quirks.is_empty() {
            tracing::info!(%node, ?quirks, "EK certificate read with indulgence");
        }
        Ok(v1::Challenge {
            ticket: ticket::seal_ticket(&self.replica, Purpose::Ticket, &body.encode()).await?,
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
    pub(super) async fn evidence(
        &self,
        stream: &mut Streaming<v1::EvidenceRequest>,
        from: IpAddr,
        role: Role,
    ) -> Result<Result<v1::Verdict, v1::Denied>, Status> {
        let first = tokio::time::timeout(FIRST_FRAME, stream.message()).await;
        let first =
            first.map_err(|_| Refusal::new(Code::EvidenceMalformed, "a header at once", "silence")).or_status()?;
        let header = match first?.and_then(|m| m.part) {
            Some(v1::evidence_request::Part::Header(header)) => header,
            _ => return Err(Refusal::new(Code::EvidenceMalformed, "a header first", "something else")).or_status(),
        };
        let ticket = header.ticket.clone();
        let (csr_der, join_token) = (header.csr.clone(), header.join_token.clone());
        let opened = ticket::open_ticket(&self.replica, Purpose::Ticket, &ticket).await.and_then(|plain| {
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
        // What another cluster's policy says of a machine is nothing that its own has said.
        let generation = self
            .replica
            .local(|s| s.node(&session.node).filter(|n| n.cluster == session.cluster).map(|n| n.generation));
        let denied_rules = self.replica.local(deny_rules).or_status()?;
        let judged = match activated.quote(&denied_rules) {
            Err(refusal) => Judged::Denied(refusal.into(), session.policy_revision),
            Ok(quote) => self.judge_logs(stream, quote, &session, (boot, ima)).await.or_status()?,
        };
        match judged {
            Judged::Good(good) if session.cluster.as_str() == REPLICAS => {
                let who = self.replica_of(&role, &join_token);
                match who.and_then(|who| replica::verdict(who, &good.0, &good.1)) {
                    Ok(verdict) => self.attest_replica(&good.0, &good.1, verdict).await.or_status(),
                    Err(refusal) => self.deny(&session, refusal.into(), None).await.or_status(),
                }
            }
            Judged::Good(good) => match certifiable(&csr_der, &good.0) {
                Ok(csr) => self.admit(&good.0, &csr, &good.1).await.or_status(),
                Err(refusal) => self.deny(&session, refusal.into(), None).await.or_status(),
            },
            Judged::Broken(refusal) => self.deny(&session, refusal.into(), None).await.or_status(),
            Judged::Denied(denial, policy_revision) if session.cluster.as_str() == REPLICAS => {
                self.deny_replica(&session, denial, &role, policy_revision).await.or_status()
            }
            Judged::Denied(denial, policy_revision) => {
                let against = |generation| Against {
                    generation,
                    policy_revision,
                    endorsement_revision: session.endorsement_revision,
                };
                let distrust = generation.filter(|_| self.speaks_against(&session, &denial)).map(against);
                self.deny(&session, denial, distrust).await.or_status()
            }
        }
    }

    /// Reads the logs and judges all.
    async fn judge_logs(
        &self,
        stream: &mut Streaming<v1::EvidenceRequest>,
        quote: FreshQuote,
        session: &Session,
        (boot, ima): (LogExtent, LogExtent),
    ) -> Result<Judged, Refusal> {
        let mut room = self.replica.work().log_room(Lane::Enrolment);
        let (boot_log, ima_log) =
            match read_logs(stream, (boot, ima), &mut room, Duration::from_millis(ANSWER_MS)).await {
                Ok(logs) => logs,
                Err(refusal) if refusal.code == Code::Busy => return Err(refusal),
                // Cut short or overlong after a good HMAC: the nonce is spent like after any other bad evidence, but a
                // broken connection says nothing about the machine.
                Err(refusal) => return Ok(Judged::Broken(refusal)),
            };
        let stored = self.replica.local(|s| {
            if session.cluster.as_str() == REPLICAS {
                return s.attested_ek(&session.node).map(|(_, row)| super::verifier_counters(&row.counters));
            }
            let evicted = s.node(&session.node).is_none_or(|n| n.state == NodeState::Evicted);
            s.standing(&session.node).filter(|_| !evicted).map(super::counters)
        });
        // By the policies of now, whatever they were when the node began: the entry names their revision.
        let governing = self.replica.governing(&session.cluster)?;
        let mut body = Body {
            node: session.node,
            before: None,
            ek_class: String::new(),
            bank: Bank::Sha256.as_str().to_owned(),
            ak_public: Vec::new(),
            quote: quote.raw().0.to_vec(),
            signature: quote.raw().1.to_vec(),
            pcrs: quote.pcrs().clone(),
            boot_log,
            ima_offset: 0,
            ima_log,
        };
        // Replaying a large log takes milliseconds; it must not hold up other calls.
        let judged = self.replica.work().run(move || {
            let verified =
                quote.appraise(&body.boot_log, &body.ima_log, stored, &governing.compiled, governing.revision);
            if let Ok(v) = &verified {
                body.ek_class = v.ek_class.as_str().to_owned();
                body.ak_public = v.ak_public.clone();
                body.cut(v.appraised.checkpoint.offset);
            }
            (verified, body, governing)
        });
        let (verified, body, governing) = judged.await?;
        Ok(match verified {
            Ok(verified) => match governing.versions.get(verified.appraised.position) {
                Some((policy, _)) => {
                    let accepted = Accepted { body, policy: policy.clone() };
                    Judged::Good(Box::new((verified, accepted)))
                }
                None => return Err(Refusal::new(Code::Internal, "a policy that governs", "none")),
            },
            Err(denial) => Judged::Denied(denial, governing.revision),
        })
    }

    /// Whether a denial speaks against the node as it was admitted: its own TPM shows another state. A clock behind one
    /// that was committed after this challenge was made does not: two honest quotes may overtake each other.
    pub(super) fn speaks_against(&self, session: &Session, denial: &Denial) -> bool {
        match denial.refusal.code {
            Code::ClockStepBack => {
                let made = session.deadline.minus_ms(ANSWER_MS);
                self.replica.local(|s| match session.cluster.as_str() {
                    REPLICAS => s.attested_ek(&session.node).is_some_and(|(_, row)| row.stamp < made),
                    _ => s.standing(&session.node).is_some_and(|st| st.verdict < made),
                })
            }
            Code::StaleAppraisal | Code::Internal | Code::Busy | Code::Unavailable => false,
            Code::EvidenceMalformed | Code::CsrMalformed | Code::EvidenceTooLarge | Code::KeyNotCertified => false,
            _ => true,
        }
    }

    /// A failure after a good HMAC consumes the nonce and is kept for operators.
    pub(super) async fn deny(
        &self,
        session: &Session,
        denial: Denial,
        distrust: Option<Against>,
    ) -> Result<Result<v1::Verdict, v1::Denied>, Refusal> {
        let forked = distrust.is_some() && denial.refusal.code == Code::ClockStepBack;
        let code = if forked { Code::TpmStateForked } else { denial.refusal.code };
        let row = self.denial_row(session, &denial, code);
        let command = Command::DenyNode { nonce: session.nonce, deadline: session.deadline, row, distrust };
        if let Err(refusal) = self.propose_for(&session.node, command).await?.outcome {
            return Ok(Err(denied(&refusal, None)));
        }
        tracing::warn!(node = %session.node, %code, diverged = denial.diverged, "enrolment denied");
        Ok(Err(denied(&Refusal { code, ..denial.refusal }, denial.diverged)))
    }

    pub(super) fn denial_row(&self, session: &Session, denial: &Denial, code: Code) -> DenialRow {
        DenialRow {
            stamp: self.replica.now(),
            node: session.node,
            code: code.to_string(),
            diverged: denial.diverged.clone().unwrap_or_default(),
            expected: denial.refusal.expected.clone(),
            found: denial.refusal.found.clone(),
        }
    }

    /// Each arrival of evidence is a request of its own: that it serves once is the nonce's work, and a second arrival
    /// is told so.
    pub(super) async fn propose_for(&self, node: &NodeId, command: Command) -> Result<ambit_state::Applied, Refusal> {
        self.replica.propose(<[u8; 32]>::from(Sha256::digest(node.0)), random()?, command).await
    }

    async fn admit(
        &self,
        evidence: &Verified<NodeEvidence>,
        csr: &Csr,
        accepted: &Accepted,
    ) -> Result<Result<v1::Verdict, v1::Denied>, Refusal> {
        let now = self.replica.now();
        let claims = evidence.claims_json(now);
        let (node, cluster) = (evidence.node, evidence.cluster.clone());
        // Nothing is committed that would not be signed.
        self.replica.may_sign()?;
        let evidence_sha256 = self.replica.keep_evidence(&accepted.body).await?;
        let command =
            Command::AdmitNode(admission(&self.replica, evidence, csr, claims.clone(), accepted, evidence_sha256));
        let applied = self.propose_for(&node, command).await?;
        if let Err(refusal) = &applied.outcome {
            return Ok(Err(denied(refusal, None)));
        }
        let mut issuances = applied.into_issuances()?;
        let committed = issuances.pop().unwrap_or_else(|| Err(Refusal::new(Code::Internal, "one leaf", "none")))?;
        let generation = committed.get().binding.map(|(_, g)| g.0).unwrap_or_default();
        self.replica.check_clock()?;
        let issuer = self.replica.issuing(&committed.get().authority)?;
        let chain = self.replica.sign(|| issue(committed, csr, &issuer))?;
        tracing::info!(%node, %cluster, generation, "node admitted");
        let own = self.replica.trust_domain();
        let bundle = self.replica.local(|s| s.bundles().remove(own)).map(|(sequence, roots_der)| v1::Bundle {
            trust_domain: own.to_string(),
            sequence,
            roots_der,
            ..v1::Bundle::default()
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

/// What came of the second round trip.
enum Judged {
    Good(Box<(Verified<NodeEvidence>, Accepted)>),
    /// The evidence itself is bad, by the policies of this revision.
    Denied(Denial, Revision),
    /// It never came whole.
    Broken(Refusal),
}

/// What accepted the evidence, and the evidence to keep.
pub(super) struct Accepted {
    pub(super) body: Body,
    pub(super) policy: PolicyRef,
}

fn admission(
    replica: &Replica,
    e: &Verified<NodeEvidence>,
    csr: &Csr,
    claims: String,
    accepted: &Accepted,
    evidence_sha256: [u8; 32],
) -> Admission {
    Admission {
        node: e.node,
        cluster: e.cluster.clone(),
        nonce: e.nonce,
        deadline: e.deadline,
        join_token: e.join_token,
        endorsement_revision: e.endorsement_revision,
        policy_revision: e.policy_revision,
        ak: AkFacts {
            name: e.ak_name.clone(),
            public: e.ak_public.clone(),
            qualified_signer: e.qualified_signer.clone(),
        },
        ek: EkFacts {
            class: e.ek_class.as_str().to_owned(),
            root_sha256: e.ek_root_sha256,
            manufacturer: e.ek_make.manufacturer().to_owned(),
            model: e.ek_make.model().to_owned(),
            unreadable: e.ek_make == EkMake::Unreadable,
            firmware_version: e.firmware_version,
            by_allow_list: false,
        },
        seen: Seen {
            counters: super::stored(&e.counters),
            firmware_version: e.firmware_version,
            ima: super::point(&e.appraised.checkpoint),
            pcrs: Some(super::boot_pcrs(e.bank, &e.pcrs)),
            boot_pcrs_sha256: e.boot_pcrs_sha256,
            boot_log_sha256: ambit_verify::hash::sha256(&accepted.body.boot_log),
            policy: accepted.policy.clone(),
            trust: e.trust_vector(),
            evidence_sha256,
            evidence_depth: 0,
        },
        key_hash: csr.spki_sha256(),
        authority: replica.issuer().authority().to_owned(),
        claims,
    }
}

/// The deny-list as the verifier reads it.
fn deny_rules(s: &State) -> Result<Vec<EkDenyRule>, Refusal> {
    s.ek_denials()
        .map(|(name, r)| EkDenyRule::new(name.as_str(), &r.manufacturer, &r.model, r.firmware_below))
        .collect()
}

/// Why this cluster would take this EK, its EK roots, and the revision of both.
fn expectation(
    s: &State,
    cluster: &ClusterId,
    node: &NodeId,
    token: &str,
) -> Result<(Expected, Endorsements, Revision), Refusal> {
    let cell = s.cell().ok_or_else(|| Refusal::new(Code::Unavailable, "a founded cell", "an empty one"))?;
    let row =
        s.cluster(cluster).ok_or_else(|| Refusal::new(Code::NotFound, "a cluster of this cell", cluster.as_str()))?;
    let roots = row
        .ek_roots
        .iter()
        .filter_map(|(der, class)| Some(EkRoot { der: der.clone(), class: EkClass::from_text(class)? }))
        .collect();
    let endorsements = Endorsements { roots, intermediates: Vec::new(), denied: deny_rules(s)? };
    let row = s.node(node);
    if let Some(code) = row.and_then(|n| n.state.bars_enrolment()) {
        return Err(Refusal::new(code, "a node that may enrol", "one that is out"));
    }
    let joined = row.is_some_and(|n| n.is_known() && n.cluster == *cluster && !n.ek.by_allow_list);
    let expected = if s.ek_allowed(cluster, node) {
        Expected::AllowListed
    } else if token.is_empty() {
        if joined { Expected::Joined } else { Expected::Nobody }
    } else if joined && s.token(&token_sha256(token)).is_none_or(|t| t.used) {
        // An agent goes on sending the token that it joined by.
        Expected::Joined
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
        svid_key: KeyHome::from_wire(
            (h.svid_public, h.svid_certify, h.svid_certify_signature),
            (h.wrap_public, h.wrap_certify, h.wrap_certify_signature),
        )?,
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

pub(super) fn denied(refusal: &Refusal, diverged: Option<String>) -> v1::Denied {
    let told = refusal.for_node();
    v1::Denied {
        code: told.code.to_string(),
        remedy: told.code.remedy().to_owned(),
        diverged: diverged.unwrap_or_default(),
    }
}
