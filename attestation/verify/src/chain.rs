//! The chain of proofs. Each type is made only by consuming the one before it.
//!
//! | step | made by | proves |
//! |---|---|---|
//! | [`PresentedEk`] | [`PresentedEk::parse`] | the public areas are well formed and the AK is one that cannot lie |
//! | [`EndorsedEk`] | [`PresentedEk::endorse`] | a trusted maker vouches for the EK and this cluster expects it |
//! | [`ActivatedAk`] | [`ActivatedAk::open`] | the TPM that holds the EK holds the AK, and it answered in time |
//! | [`FreshQuote`] | [`ActivatedAk::quote`] | the AK quoted exactly these PCRs for this session and this CSR key |
//! | [`Verified`] | [`FreshQuote::appraise`] | the logs lead to those PCRs and no event of them was altered |
//!
//! No `Verified` without an appraisal, outside of this crate or in any other module of it:
//!
//! ```compile_fail,E0423
//! fn forge(evidence: ambit_verify::NodeEvidence) -> ambit_verify::Verified<ambit_verify::NodeEvidence> {
//!     ambit_verify::Verified(evidence)
//! }
//! ```
//!
//! No `FreshQuote` from anything but an `ActivatedAk`, which is consumed by it:
//!
//! ```compile_fail,E0599
//! fn skip(ek: ambit_verify::EndorsedEk) {
//!     let _ = ek.quote(&[]);
//! }
//! ```
//! ```compile_fail,E0382
//! fn twice(ak: ambit_verify::ActivatedAk) {
//!     let _ = ak.quote(&[]);
//!     let _ = ak.quote(&[]);
//! }
//! ```
//!
//! And no copy of a proof:
//!
//! ```compile_fail,E0277
//! fn copy(v: &ambit_verify::Verified<ambit_verify::NodeEvidence>) {
//!     let _ = <ambit_verify::Verified<ambit_verify::NodeEvidence> as Clone>::clone(v);
//! }
//! ```

mod begin;
mod evidence;
mod kept;
mod known;
mod logs;

pub(crate) use begin::Backing;
pub use begin::{BeginInput, Challenge, EndorsedEk, Entropy, Expected, PresentedEk, Terms};
pub use evidence::{ActivatedAk, EvidenceHeader, FreshQuote, LogExtent, Session};
pub use kept::KeptEvidence;
pub use known::{Before, RoundEvidence, RoundLogs};
pub use logs::Appraised;

use crate::bootlog::BootFacts;
use crate::ek::{EkClass, EkMake};
use crate::hash::Bank;
use ambit_model::{ClusterId, Code, NodeId, Refusal, Revision};
use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::fmt;
use std::ops::Deref;

/// Something this crate verified. No constructor, no `Clone`, no way to decode one from bytes.
#[derive(Debug)]
pub struct Verified<T>(T);

impl<T> Deref for Verified<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.0
    }
}

/// What a verified quote and its logs say about a node at one instant.
#[derive(Clone, Debug)]
pub struct NodeEvidence {
    /// SHA-256 of the EK's SubjectPublicKeyInfo.
    pub node: NodeId,
    /// The cluster it enrols in.
    pub cluster: ClusterId,
    /// What vouches for the EK.
    pub ek_class: EkClass,
    /// SHA-256 of the root certificate that the EK's chains to; none for an EK without one.
    pub ek_root_sha256: Option<[u8; 32]>,
    /// Who made the TPM.
    pub ek_make: EkMake,
    /// SHA-256 of the EK's TPMT_PUBLIC.
    pub ek_public_sha256: [u8; 32],
    /// TPMT_PUBLIC of the AK, as sent: with it, its name and its qualified name, rounds are judged.
    pub ak_public: Vec<u8>,
    /// The AK's name: algorithm identifier, then digest (TPM 2.0 Part 1, section 16).
    pub ak_name: Vec<u8>,
    /// The AK's qualified name, which tells that it is under the endorsed EK.
    pub qualified_signer: Vec<u8>,
    /// SubjectPublicKeyInfo (DER) of the one key that this evidence may certify.
    pub csr_spki: Vec<u8>,
    /// Whether the TPM certified that it holds the private half of that key.
    pub svid_key_in_tpm: bool,
    /// The P-256 point (uncompressed) of a replica's wrap key that the TPM certified to hold; none where none was shown.
    pub wrap_key: Option<Vec<u8>>,
    /// The server's nonce, to be consumed by the entry that admits the node.
    pub nonce: [u8; 32],
    /// Until when the consumed nonce is remembered, and the deadline the answer kept.
    pub deadline: ambit_model::Stamp,
    /// The bank quoted.
    pub bank: Bank,
    /// The quoted PCRs, exactly those asked for.
    pub pcrs: BTreeMap<u32, Vec<u8>>,
    /// SHA-256 over the quoted PCRs 0-9 and 14 with their indices, to know this boot again in rounds.
    pub boot_pcrs_sha256: [u8; 32],
    /// The TPM's clock and counters at the quote.
    pub counters: Counters,
    /// The TPM's firmware version, as it reports it.
    pub firmware_version: u64,
    /// What the boot log says, where it is authenticated by the quote.
    pub boot: BootFacts,
    /// What accepted the machine, and on what grounds.
    pub appraised: Appraised,
    /// SHA-256 of the join token to burn, if the EK was expected because of one.
    pub join_token: Option<[u8; 32]>,
    /// The revision of roots, allow-list and deny-list that the EK was judged under.
    pub endorsement_revision: Revision,
    /// The revision of appraisal policies that it was judged under.
    pub policy_revision: Revision,
    /// SHA-256 over all that was judged: the name of the evidence in the audit log.
    pub evidence_sha256: [u8; 32],
}

/// The TPM's clock and counters in a quote (TPMS_CLOCK_INFO).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counters {
    /// TPM resets since manufacture: rises with each boot.
    pub reset: u32,
    /// TPM restarts or resumes since the last reset.
    pub restart: u32,
    /// Milliseconds of power-on time.
    pub clock_ms: u64,
    /// Whether the clock surely never showed a later value before.
    pub safe: bool,
}

impl Counters {
    /// Whether `self` may follow `stored` on one TPM: both counts lexicographically, the clock only when both are
    /// equal (after a crash clock and restart count may go back while the reset count rises: honest).
    pub fn may_follow(&self, stored: &Counters) -> bool {
        let (now, then) = ((self.reset, self.restart), (stored.reset, stored.restart));
        now > then || (now == then && self.clock_ms >= stored.clock_ms)
    }

    /// What happened on one TPM between two rounds, `last` being the earlier. A step back, or the same instant twice,
    /// shows that two machines hold the state of this TPM: no TPM makes two quotes within one of its milliseconds.
    pub fn step_from(&self, last: &Counters) -> Result<Step, Refusal> {
        let forked = || Err(Refusal::new(Code::TpmStateForked, format!("counters after {last}"), self.to_string()));
        match (self.reset.cmp(&last.reset), self.restart.cmp(&last.restart), self.clock_ms.cmp(&last.clock_ms)) {
            (Ordering::Greater, _, _) => Ok(Step::Rebooted),
            (Ordering::Equal, Ordering::Greater, _) => Ok(Step::Resumed),
            (Ordering::Equal, Ordering::Equal, Ordering::Greater) => Ok(Step::Ran),
            (Ordering::Less, _, _) | (Ordering::Equal, Ordering::Less, _) | (Ordering::Equal, Ordering::Equal, _) => {
                forked()
            }
        }
    }
}

/// What a TPM did since its last round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// It ran on, without a reset.
    Ran,
    /// It was suspended and restarted without a reset (TPM Resume or TPM Restart; after the latter PCRs begin anew).
    Resumed,
    /// It was reset: the machine booted.
    Rebooted,
}

impl fmt::Display for Counters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "resets {}, restarts {}, clock {} ms", self.reset, self.restart, self.clock_ms)
    }
}

/// A refusal after a good HMAC: with where the evidence diverged, which the node may be told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Denial {
    /// Code, expected and found. The last two are for operators only.
    pub refusal: Refusal,
    /// The place: an event, a PCR or an IMA entry; never what was expected there.
    pub diverged: Option<String>,
}

impl Denial {
    pub(crate) fn at(refusal: Refusal, place: impl Into<String>) -> Denial {
        Denial { refusal, diverged: Some(place.into()) }
    }
}

impl From<Refusal> for Denial {
    fn from(refusal: Refusal) -> Self {
        Denial { refusal, diverged: None }
    }
}

#[cfg(test)]
mod tests;
