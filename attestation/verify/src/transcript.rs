//! What the HMAC and the quote are taken over. The agent makes these bytes and the verifier checks them, so both use
//! this one module (design.md section 3).

use crate::certify::KeyHome;
use crate::chain::LogExtent;
use crate::hash::{sha256, sha256_of};
use ambit_model::{ClusterId, Generation, NodeId};
use aws_lc_rs::hmac;

const QUOTE_CONTEXT: &[u8] = b"ambit/quote/v1\0";
const ROUND_CONTEXT: &[u8] = b"ambit/round/v1";
const HMAC_CONTEXT: &[u8] = b"ambit/evidence-hmac/v1\0";
const EVIDENCE_CONTEXT: &[u8] = b"ambit/evidence/v1\0";

/// What a quote is bound to: a relayed quote is worthless for any other key, cluster or session.
pub struct Binding<'a> {
    /// The nonce of `Begin`.
    pub agent_nonce: &'a [u8; 32],
    /// The nonce of the challenge.
    pub server_nonce: &'a [u8; 32],
    /// SHA-256 of the sealed ticket.
    pub ticket_sha256: &'a [u8; 32],
    /// SubjectPublicKeyInfo (DER) of the CSR; see [`crate::csr::p256_spki`].
    pub csr_spki: &'a [u8],
    /// The cluster.
    pub cluster: &'a ClusterId,
    /// The AK's name; see [`crate::Public::name`].
    pub ak_name: &'a [u8],
}

/// `qualifyingData` of TPM2_Quote. Every part but the cluster has a fixed length, and the cluster carries its own.
pub fn qualifying_data(b: &Binding<'_>) -> [u8; 32] {
    let cluster = b.cluster.as_str().as_bytes();
    sha256_of(&[
        QUOTE_CONTEXT,
        b.agent_nonce,
        b.server_nonce,
        b.ticket_sha256,
        &sha256(b.csr_spki),
        &(cluster.len() as u64).to_be_bytes(),
        cluster,
        &sha256(b.ak_name),
    ])
}

/// `qualifyingData` of TPM2_Quote in a round of re-attestation. A nonce alone would let one node answer for another, or
/// a generation for its successor. Every part but the cluster has a fixed length, and the cluster carries its own.
pub fn round_data(
    nonce: &[u8; 32],
    node: &NodeId,
    generation: Generation,
    cluster: &ClusterId,
    ak_name: &[u8],
) -> [u8; 32] {
    let cluster = cluster.as_str().as_bytes();
    // A cluster name has at most 63 bytes, by its grammar.
    let cluster_len = u8::try_from(cluster.len()).unwrap_or(u8::MAX);
    sha256_of(&[ROUND_CONTEXT, nonce, &node.0, &generation.0.to_be_bytes(), &[cluster_len], cluster, &sha256(ak_name)])
}

/// All that the header of `Evidence` says, but the HMAC itself and the two public areas (which the ticket holds).
pub struct Transcript<'a> {
    /// SHA-256 of the sealed ticket.
    pub ticket_sha256: [u8; 32],
    /// PKCS#10 DER.
    pub csr: &'a [u8],
    /// TPMS_ATTEST.
    pub quote: &'a [u8],
    /// TPMT_SIGNATURE.
    pub signature: &'a [u8],
    /// PCR indices and values, as sent.
    pub pcrs: &'a [(u32, Vec<u8>)],
    /// Extent of the boot log.
    pub boot_log: LogExtent,
    /// Extent of the IMA log.
    pub ima_log: LogExtent,
    /// Where the SVID key is, with the proof.
    pub svid_key: &'a KeyHome,
}

impl Transcript<'_> {
    /// The HMAC-SHA-256 of this transcript under the activated `secret`.
    pub fn hmac(&self, secret: &[u8]) -> [u8; 32] {
        let mut out = [0u8; 32];
        let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, secret), &self.bytes());
        for (to, from) in out.iter_mut().zip(tag.as_ref()) {
            *to = *from;
        }
        out
    }

    pub(crate) fn verify(&self, secret: &[u8; 32], tag: &[u8]) -> bool {
        hmac::verify(&hmac::Key::new(hmac::HMAC_SHA256, secret), &self.bytes(), tag).is_ok()
    }

    pub(crate) fn evidence_sha256(&self, ek_public: &[u8], ak_public: &[u8]) -> [u8; 32] {
        sha256_of(&[EVIDENCE_CONTEXT, &sha256(ek_public), &sha256(ak_public), &self.bytes()])
    }

    /// One encoding: every part of variable length is preceded by it.
    fn bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend_from_slice(HMAC_CONTEXT);
        out.extend_from_slice(&self.ticket_sha256);
        let mut put = |part: &[u8]| {
            out.extend_from_slice(&(part.len() as u64).to_be_bytes());
            out.extend_from_slice(part);
        };
        put(self.csr);
        put(self.quote);
        put(self.signature);
        put(&(self.pcrs.len() as u64).to_be_bytes());
        for (index, value) in self.pcrs {
            put(&index.to_be_bytes());
            put(value);
        }
        for log in [self.boot_log, self.ima_log] {
            put(&log.len.to_be_bytes());
            put(&log.sha256);
        }
        match self.svid_key {
            KeyHome::InMemory => put(&[0]),
            KeyHome::InTpm { public, attest, signature } => {
                put(&[1]);
                put(public);
                put(attest);
                put(signature);
            }
            KeyHome::WrapKeyInTpm { public, attest, signature } => {
                put(&[2]);
                put(public);
                put(attest);
                put(signature);
            }
        }
        out
    }
}
