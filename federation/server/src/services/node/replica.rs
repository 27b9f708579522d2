//! Replicas, attested by the same exchange as nodes: what is committed of them is another.

use super::enrol::{Accepted, Enrolment, denied};
use crate::authorise::Role;
use crate::services::token_sha256;
use ambit_model::{Code, Refusal, Revision};
use ambit_proto::v1;
use ambit_state::Command;
use ambit_state::objects::TokenScope;
use ambit_state::sealing::{AttestedReplica, ReplicaDenial, ReplicaVerdict};
use ambit_verify::{Denial, NodeEvidence, Session, Verified};

/// Whose evidence it is: of a replica of the cell, by its certificate, or of one that is to join, by its token.
pub(super) struct Whose {
    replica: u64,
    token: Option<[u8; 32]>,
}

/// What is committed of good evidence. It must have shown a wrap key: that is what it is for.
pub(super) fn verdict(
    whose: Whose,
    evidence: &Verified<NodeEvidence>,
    accepted: &Accepted,
) -> Result<ReplicaVerdict, Refusal> {
    let none = || Refusal::new(Code::KeyNotCertified, "a wrap key that the TPM certifies", "none");
    let wrap_key = evidence.wrap_key.clone().ok_or_else(none)?;
    Ok(ReplicaVerdict {
        replica: whose.replica,
        nonce: evidence.nonce,
        deadline: evidence.deadline,
        endorsement_revision: evidence.endorsement_revision,
        attested: AttestedReplica {
            ek: evidence.node,
            ak_name: evidence.ak_name.clone(),
            wrap_key,
            tls_key_hash: ambit_verify::hash::sha256(&evidence.csr_spki),
            token: whose.token,
            policy_revision: evidence.policy_revision,
            ek_root_sha256: evidence.ek_root_sha256,
            ek_class: evidence.ek_class.as_str().to_owned(),
            manufacturer: evidence.ek_make.manufacturer().to_owned(),
            model: evidence.ek_make.model().to_owned(),
            firmware_version: evidence.firmware_version,
            counters: super::stored(&evidence.counters),
            policy: accepted.policy.clone(),
            evidence_sha256: [0; 32],
            stamp: Default::default(),
            stands: false,
        },
    })
}

impl Enrolment {
    /// A certificate says more than a token.
    pub(super) fn replica_of(&self, role: &Role, join_token: &str) -> Result<Whose, Refusal> {
        if let Role::Replica(replica) = role {
            return Ok(Whose { replica: *replica, token: None });
        }
        let token = token_sha256(join_token);
        match self.replica.local(|s| s.token(&token).map(|row| row.scope.clone())) {
            Some(TokenScope::Replica(replica, _)) => Ok(Whose { replica, token: Some(token) }),
            _ => Err(Refusal::new(Code::JoinTokenInvalid, "a token of a replica that is to join", "another")),
        }
    }

    /// Bad evidence of a replica's own TPM, or shown by a replica: it is attested no more. What merely did not hold together
    /// changes nothing.
    pub(super) async fn deny_replica(
        &self,
        session: &Session,
        denial: Denial,
        role: &Role,
        policy_revision: Revision,
    ) -> Result<Result<v1::Verdict, v1::Denied>, Refusal> {
        let replica = if let Role::Replica(replica) = role { Some(*replica) } else { None };
        let of_tpm = self.replica.local(|s| s.attested_ek(&session.node).map(|(id, _)| id));
        if !self.speaks_against(session, &denial) || replica.or(of_tpm).is_none() {
            return self.deny(session, denial, None).await;
        }
        let code = denial.refusal.code;
        let denied_replica = ReplicaDenial {
            nonce: session.nonce,
            deadline: session.deadline,
            row: self.denial_row(session, &denial, code),
            replica,
            endorsement_revision: session.endorsement_revision,
            policy_revision,
        };
        let command = Command::DenyReplica(Box::new(denied_replica));
        if let Err(refusal) = self.propose_for(&session.node, command).await?.outcome {
            return Ok(Err(denied(&refusal, None)));
        }
        let diverged = denial.diverged.clone();
        tracing::warn!(?replica, ?of_tpm, ek = %session.node, %code, diverged, "replica attested no more: bad evidence");
        Ok(Err(denied(&denial.refusal, denial.diverged)))
    }

    /// Nothing is signed: the verdict is what a join, a renewal of what is wrapped, and the seal of the root rest on.
    pub(super) async fn attest_replica(
        &self,
        evidence: &Verified<NodeEvidence>,
        accepted: &Accepted,
        mut verdict: ReplicaVerdict,
    ) -> Result<Result<v1::Verdict, v1::Denied>, Refusal> {
        let now = self.replica.now();
        verdict.attested.evidence_sha256 = self.replica.keep_evidence(&accepted.body).await?;
        let number = verdict.replica;
        let command = Command::AttestReplica(Box::new(verdict));
        if let Err(refusal) = self.propose_for(&evidence.node, command).await?.outcome {
            tracing::warn!(replica = number, ek = %evidence.node, %refusal, "replica not attested");
            return Ok(Err(denied(&refusal, None)));
        }
        tracing::info!(replica = number, ek = %evidence.node, "replica attested");
        Ok(Ok(v1::Verdict {
            attestation_result_json: evidence.claims_json(now),
            node_id: evidence.node.to_string(),
            ..v1::Verdict::default()
        }))
    }
}
