//! The second round trip: ticket, activation, quote, logs.

use super::{Counters, Denial, NodeEvidence, Verified, logs};
use crate::appraisal::{CompiledPolicy, Endorsement};
use crate::certify::{KeyHome, Proven};
use crate::ek::{EkDenyRule, deny};
use crate::hash::sha256;
use crate::public::{AttestationKey, EndorsementKey, Public};
use crate::quote::{self, Quote, Quoted};
use crate::signature::AkVerifier;
use crate::ticket::TicketBody;
use crate::transcript::{self, Transcript};
use crate::{BOOT_LOG_BYTES_MAX, IMA_LOG_BYTES_MAX, csr};
use ambit_model::{ClusterId, Code, NodeId, Refusal, Revision, Stamp};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Length and SHA-256 of a log, stated (and covered by the HMAC) before any of its bytes are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogExtent {
    /// Bytes.
    pub len: u64,
    /// SHA-256 of the bytes.
    pub sha256: [u8; 32],
}

impl LogExtent {
    /// The extent of `log`.
    pub fn of(log: &[u8]) -> LogExtent {
        LogExtent { len: log.len() as u64, sha256: sha256(log) }
    }
}

/// The first frame of `Evidence`, as it came off the wire.
#[derive(Clone, Debug)]
pub struct EvidenceHeader {
    /// HMAC-SHA-256 under the activated secret over [`Transcript`].
    pub hmac: Vec<u8>,
    /// PKCS#10 request (DER) for the node's SVID key.
    pub csr: Vec<u8>,
    /// TPMS_ATTEST.
    pub quote: Vec<u8>,
    /// TPMT_SIGNATURE.
    pub signature: Vec<u8>,
    /// Index and value of each PCR quoted, ascending.
    pub pcrs: Vec<(u32, Vec<u8>)>,
    /// Extent of the boot log.
    pub boot_log: LogExtent,
    /// Extent of the IMA log.
    pub ima_log: LogExtent,
    /// TPMT_PUBLIC of the EK, as in `Begin`.
    pub ek_public: Vec<u8>,
    /// TPMT_PUBLIC of the AK, as in `Begin`.
    pub ak_public: Vec<u8>,
    /// Where the SVID key is, with the proof.
    pub svid_key: KeyHome,
}

/// What the caller needs of a session even where the evidence fails: a failure after a good HMAC consumes the nonce.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    /// The cluster.
    pub cluster: ClusterId,
    /// The node.
    pub node: NodeId,
    /// The nonce to consume.
    pub nonce: [u8; 32],
    /// Until when it is remembered.
    pub deadline: Stamp,
    /// SHA-256 of the join token shown in `Begin`, if one was.
    pub join_token: Option<[u8; 32]>,
    /// The revision of roots, allow-list and deny-list that the EK was judged under.
    pub endorsement_revision: Revision,
    /// The revision of appraisal policies at the beginning. What the logs show is judged by those of the end.
    pub policy_revision: Revision,
}

/// An AK proved to live in the TPM of the endorsed EK: only that TPM could open the secret that the HMAC shows.
#[derive(Debug)]
pub struct ActivatedAk {
    ticket: TicketBody,
    ticket_sha256: [u8; 32],
    header: EvidenceHeader,
    ak: AkVerifier,
    ak_name: Vec<u8>,
    qualified_signer: Vec<u8>,
    evidence_sha256: [u8; 32],
}

impl ActivatedAk {
    /// Takes the answer to a challenge. `body` is what the AEAD opened from `ticket`; `header` is the first frame.
    /// Order: sizes, ticket and deadline, keys, HMAC (constant time). A refusal from here consumes nothing.
    pub fn open(body: TicketBody, ticket: &[u8], header: EvidenceHeader, now: Stamp) -> Result<ActivatedAk, Refusal> {
        sizes(&header)?;
        if now > body.deadline {
            return Err(Refusal::new(
                Code::TicketExpired,
                format!("an answer by {}", body.deadline.0),
                format!("one at {}", now.0),
            ));
        }
        if sha256(&header.ek_public) != body.ek_public_sha256 || sha256(&header.ak_public) != body.ak_public_sha256 {
            return Err(Refusal::new(Code::TicketInvalid, "the EK and the AK of Begin", "another public area"));
        }
        let ticket_sha256 = sha256(ticket);
        let transcript = Transcript {
            ticket_sha256,
            csr: &header.csr,
            quote: &header.quote,
            signature: &header.signature,
            pcrs: &header.pcrs,
            boot_log: header.boot_log,
            ima_log: header.ima_log,
            svid_key: &header.svid_key,
        };
        if !transcript.verify(&body.secret, &header.hmac) {
            return Err(Refusal::new(Code::ActivationFailed, "an HMAC under the activated secret", "another HMAC"));
        }
        let evidence_sha256 = transcript.evidence_sha256(&header.ek_public, &header.ak_public);
        let malformed = |e: crate::wire::Malformed| e.refuse(Code::EvidenceMalformed, "TPMT_PUBLIC");
        let ek = EndorsementKey::new(Public::parse(&header.ek_public).map_err(malformed)?)?;
        let ak = AttestationKey::new(Public::parse(&header.ak_public).map_err(malformed)?)?;
        let (ak_name, qualified_signer) = (ak.public().name(), ek.qualify(ak.public()));
        let ak = AkVerifier::new(&ak)?;
        Ok(ActivatedAk { ticket: body, ticket_sha256, header, ak, ak_name, qualified_signer, evidence_sha256 })
    }

    /// What stays to be done whatever comes of the evidence.
    pub fn session(&self) -> Session {
        Session {
            cluster: self.ticket.cluster.clone(),
            node: self.ticket.node,
            nonce: self.ticket.server_nonce,
            deadline: self.ticket.deadline,
            join_token: self.ticket.backing.join_token,
            endorsement_revision: self.ticket.endorsement_revision,
            policy_revision: self.ticket.policy_revision,
        }
    }

    /// Judges the CSR, the quote and what else the AK signed, in the order of design.md section 3; then the deny-list
    /// once more, now that the firmware is known. A refusal from here consumes the nonce.
    pub fn quote(self, denied: &[EkDenyRule]) -> Result<FreshQuote, Refusal> {
        let csr_spki = csr::p256_spki(&self.header.csr)?;
        let extra_data = transcript::qualifying_data(&transcript::Binding {
            agent_nonce: &self.ticket.agent_nonce,
            server_nonce: &self.ticket.server_nonce,
            ticket_sha256: &self.ticket_sha256,
            csr_spki: &csr_spki,
            cluster: &self.ticket.cluster,
            ak_name: &self.ak_name,
        });
        let quote = Quote {
            attest: &self.header.quote,
            signature: &self.header.signature,
            pcrs: &self.header.pcrs,
            signer: &self.qualified_signer,
            extra_data,
            bank: self.ticket.bank,
            pcr_mask: self.ticket.pcr_mask,
        };
        let quoted = quote.judge(&self.ak)?;
        deny::after_quote(denied, &self.ticket.backing.make, quoted.head.firmware_version)?;
        let key = &self.header.svid_key;
        let proven = key.judge(&self.ak, &self.qualified_signer, &extra_data, &csr_spki)?;
        Ok(FreshQuote { activated: self, csr_spki, proven, quoted })
    }
}

fn sizes(header: &EvidenceHeader) -> Result<(), Refusal> {
    let objects: [(&str, &[u8]); 6] = [
        ("HMAC", &header.hmac),
        ("CSR", &header.csr),
        ("quote", &header.quote),
        ("signature", &header.signature),
        ("EK public", &header.ek_public),
        ("AK public", &header.ak_public),
    ];
    quote::sizes(&objects, &header.pcrs)?;
    if let KeyHome::InTpm { public, attest, signature } | KeyHome::WrapKeyInTpm { public, attest, signature } =
        &header.svid_key
    {
        quote::sizes(&[("key", public), ("certification", attest), ("its signature", signature)], &[])?;
    }
    if header.boot_log.len > BOOT_LOG_BYTES_MAX {
        return Err(quote::too_large("boot log", header.boot_log.len));
    }
    if header.ima_log.len > IMA_LOG_BYTES_MAX {
        return Err(quote::too_large("IMA log", header.ima_log.len));
    }
    Ok(())
}

/// A quote by the activated AK over exactly the PCRs asked for, fresh for this session and this CSR key.
#[derive(Debug)]
pub struct FreshQuote {
    activated: ActivatedAk,
    csr_spki: Vec<u8>,
    proven: Proven,
    quoted: Quoted,
}

impl FreshQuote {
    /// The quoted PCRs, exactly those asked for.
    pub fn pcrs(&self) -> &BTreeMap<u32, Vec<u8>> {
        &self.quoted.pcrs
    }
    /// TPMS_ATTEST and TPMT_SIGNATURE, as sent: to be kept.
    pub fn raw(&self) -> (&[u8], &[u8]) {
        (&self.activated.header.quote, &self.activated.header.signature)
    }

    /// Judges counters and logs, by the first of `policies` that accepts all: those of the cluster at revision `under`,
    /// which need not be the one it began at. `stored` are the counters of this EK's last verdict, none at its first.
    pub fn appraise(
        self,
        boot_log: &[u8],
        ima_log: &[u8],
        stored: Option<Counters>,
        policies: &[Arc<CompiledPolicy>],
        under: Revision,
    ) -> Result<Verified<NodeEvidence>, Denial> {
        let ActivatedAk { ticket, header, ak_name, qualified_signer, evidence_sha256, .. } = self.activated;
        let boot_pcrs_sha256 = self.quoted.boot_pcrs_sha256();
        let Quoted { head, pcrs, .. } = self.quoted;
        for (what, log, extent) in [("boot log", boot_log, header.boot_log), ("IMA log", ima_log, header.ima_log)] {
            if LogExtent::of(log) != extent {
                let expected = format!("the {what} that the header states");
                return Err(Refusal::new(Code::EvidenceMalformed, expected, "other bytes").into());
            }
        }
        let counters = head.counters;
        if let Some(stored) = stored
            && !counters.may_follow(&stored)
        {
            return Err(
                Refusal::new(Code::ClockStepBack, format!("no step back from {stored}"), counters.to_string()).into()
            );
        }
        if ticket.ima_offset != 0 {
            return Err(Refusal::new(Code::TicketInvalid, "logs from their beginnings", "an IMA offset").into());
        }
        let endorsement = Endorsement::Class(ticket.backing.class);
        let quoted = logs::Quoted { pcrs: &pcrs, bank: ticket.bank, endorsement };
        let (boot, appraised) = quoted.whole(boot_log, ima_log, policies)?;
        Ok(Verified(NodeEvidence {
            node: ticket.node,
            cluster: ticket.cluster,
            ek_class: ticket.backing.class,
            ek_root_sha256: ticket.backing.root_sha256,
            ek_make: ticket.backing.make,
            ek_public_sha256: ticket.ek_public_sha256,
            ak_public: header.ak_public,
            ak_name,
            qualified_signer,
            csr_spki: self.csr_spki,
            svid_key_in_tpm: self.proven == Proven::SvidKey,
            wrap_key: match self.proven {
                Proven::WrapKey(point) => Some(point),
                Proven::Nothing | Proven::SvidKey => None,
            },
            nonce: ticket.server_nonce,
            deadline: ticket.deadline,
            bank: ticket.bank,
            pcrs,
            boot_pcrs_sha256,
            counters,
            firmware_version: head.firmware_version,
            boot,
            appraised,
            join_token: ticket.backing.join_token,
            endorsement_revision: ticket.endorsement_revision,
            policy_revision: under,
            evidence_sha256,
        }))
    }
}
