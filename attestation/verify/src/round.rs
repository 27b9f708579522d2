//! Re-attestation: one quote in time, of a node that enrolled before (design.md section 3).
//!
//! | type | made by | proves |
//! |---|---|---|
//! | [`KnownNode`] | [`KnownNode::parse`] | nothing yet: the AK that a committed admission names, ready to verify |
//! | [`Round`] | [`Round::new`] | nothing yet: what one node was asked for, once |
//! | [`FreshRound`] | [`Round::quote`] | that node's AK quoted exactly these PCRs after the nonce was drawn |
//!
//! A round answers one question to one node, so its nonce cannot serve twice:
//!
//! ```compile_fail,E0382
//! fn twice(round: ambit_verify::Round, node: &ambit_verify::KnownNode, quote: ambit_verify::RoundQuote) {
//!     let _ = round.quote(node, quote.clone());
//!     let _ = round.quote(node, quote);
//! }
//! ```
//! ```compile_fail,E0599
//! fn copy(round: ambit_verify::Round) -> ambit_verify::Round {
//!     round.clone()
//! }
//! ```
//!
//! And nothing else makes a `FreshRound`, nor copies one:
//!
//! ```compile_fail,E0451
//! fn forge(node: ambit_model::NodeId) -> ambit_verify::FreshRound {
//!     ambit_verify::FreshRound { node, generation: ambit_model::Generation(1), quoted: todo!() }
//! }
//! ```
//! ```compile_fail,E0382
//! use ambit_verify::{Before, EkClass, FreshRound, RoundLogs};
//! fn twice(fresh: FreshRound, before: &Before, logs: RoundLogs<'_>) {
//!     let _ = fresh.appraise(before, EkClass::Lab, logs, &[]);
//!     let _ = fresh.appraise(before, EkClass::Lab, logs, &[]);
//! }
//! ```
//! ```compile_fail,E0599
//! fn copy(fresh: ambit_verify::FreshRound) -> ambit_verify::FreshRound {
//!     fresh.clone()
//! }
//! ```

use crate::chain::Counters;
use crate::hash::Bank;
use crate::public::{AttestationKey, Public};
use crate::quote::{self, Quote, Quoted};
use crate::signature::AkVerifier;
use crate::{PCR_MASK_ALL, transcript};
use ambit_model::{ClusterId, Code, Generation, NodeId, Refusal};
use std::collections::BTreeMap;

/// An admitted node, with its AK decoded once: made from what its admission committed, and kept by the server.
#[derive(Debug)]
pub struct KnownNode {
    node: NodeId,
    cluster: ClusterId,
    generation: Generation,
    ak_name: Vec<u8>,
    qualified_signer: Vec<u8>,
    ak: AkVerifier,
}

impl KnownNode {
    /// Reads the AK's TPMT_PUBLIC and judges it as enrolment does: what was committed under an older rule is refused.
    /// `qualified_signer` is [`crate::NodeEvidence::qualified_signer`] of the enrolment.
    pub fn parse(
        node: NodeId,
        cluster: ClusterId,
        generation: Generation,
        ak_public: &[u8],
        qualified_signer: Vec<u8>,
    ) -> Result<KnownNode, Refusal> {
        let public = Public::parse(ak_public).map_err(|e| e.refuse(Code::EvidenceMalformed, "AK TPMT_PUBLIC"))?;
        let ak_name = public.name();
        let ak = AkVerifier::new(&AttestationKey::new(public)?)?;
        Ok(KnownNode { node, cluster, generation, ak_name, qualified_signer, ak })
    }

    /// The node.
    pub fn node(&self) -> NodeId {
        self.node
    }

    /// The generation that this AK was admitted with.
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// The AK's name.
    pub fn ak_name(&self) -> &[u8] {
        &self.ak_name
    }
}

/// One question to one node. Kept by the replica that asked, in the state of the node's stream, and consumed by the answer.
#[derive(Debug)]
pub struct Round {
    nonce: [u8; 32],
    bank: Bank,
    pcr_mask: u32,
}

impl Round {
    /// A question with a nonce that the caller drew for it and uses for nothing else.
    pub fn new(nonce: [u8; 32], bank: Bank, pcr_mask: u32) -> Result<Round, Refusal> {
        if pcr_mask == 0 || pcr_mask & !PCR_MASK_ALL != 0 {
            return Err(Refusal::new(Code::BadRequest, "a mask of PCRs 0-23", format!("{pcr_mask:#x}")));
        }
        Ok(Round { nonce, bank, pcr_mask })
    }

    /// The nonce, to be sent.
    pub fn nonce(&self) -> [u8; 32] {
        self.nonce
    }

    /// The bank asked for.
    pub fn bank(&self) -> Bank {
        self.bank
    }

    /// The PCRs asked for; bit n is PCR n.
    pub fn pcr_mask(&self) -> u32 {
        self.pcr_mask
    }

    /// Judges the answer, in the order of enrolment. The nonce is gone whatever comes of it.
    pub fn quote(self, node: &KnownNode, answer: RoundQuote) -> Result<FreshRound, Refusal> {
        quote::sizes(&[("quote", &answer.quote), ("signature", &answer.signature)], &answer.pcrs)?;
        let quote = Quote {
            attest: &answer.quote,
            signature: &answer.signature,
            pcrs: &answer.pcrs,
            signer: &node.qualified_signer,
            extra_data: transcript::round_data(&self.nonce, &node.node, node.generation, &node.cluster, &node.ak_name),
            bank: self.bank,
            pcr_mask: self.pcr_mask,
        };
        let quoted = quote.judge(&node.ak)?;
        Ok(FreshRound { node: node.node, generation: node.generation, quoted })
    }
}

/// An answer, as it came off the wire.
#[derive(Clone, Debug)]
pub struct RoundQuote {
    /// TPMS_ATTEST.
    pub quote: Vec<u8>,
    /// TPMT_SIGNATURE.
    pub signature: Vec<u8>,
    /// Index and value of each PCR quoted, ascending.
    pub pcrs: Vec<(u32, Vec<u8>)>,
}

/// A quote made after its round began, by the AK of this node and generation. What it means for trust is judged from
/// here: counters ([`Counters::step_from`]), boot and IMA log.
#[derive(Debug)]
pub struct FreshRound {
    node: NodeId,
    generation: Generation,
    quoted: Quoted,
}

impl FreshRound {
    /// The node.
    pub fn node(&self) -> NodeId {
        self.node
    }

    /// Its generation.
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// The bank quoted.
    pub fn bank(&self) -> Bank {
        self.quoted.bank
    }

    /// The quoted PCRs, exactly those asked for.
    pub fn pcrs(&self) -> &BTreeMap<u32, Vec<u8>> {
        &self.quoted.pcrs
    }

    /// The TPM's clock and counters at the quote.
    pub fn counters(&self) -> Counters {
        self.quoted.head.counters
    }

    /// The TPM's firmware version, as it reports it.
    pub fn firmware_version(&self) -> u64 {
        self.quoted.head.firmware_version
    }

    /// SHA-256 over the quoted PCRs 0-9 and 14 with their indices: as [`crate::NodeEvidence::boot_pcrs_sha256`] of the
    /// enrolment while the machine has not booted into anything else.
    pub fn boot_pcrs_sha256(&self) -> [u8; 32] {
        self.quoted.boot_pcrs_sha256()
    }
}

#[cfg(test)]
mod tests;
