//! The verifier of RFC 9334: judges a node's evidence (EK, AK, quote, boot log, IMA log) and says what it proves.
//!
//! It turns bytes that a stranger sent into `Verified<NodeEvidence>`, one proof at a time:
//! `PresentedEk -> EndorsedEk -> ActivatedAk -> FreshQuote -> Verified<NodeEvidence>` ([`chain`]). Each step consumes
//! the one before and no other way to make any of them exists.
//!
//! It must never do IO, read a clock, hold state between calls or talk to a TPM: time, entropy and endorsements are
//! arguments. (aws-lc draws the OAEP padding and the ephemeral ECDH key of a credential itself; no decision depends on
//! them.) It must never panic on bad input, never allocate by a length it has not checked, and never guess an encoding.
#![forbid(unsafe_code)]
#![warn(missing_docs)]
#![warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)]
#![cfg_attr(
    test,
    allow(clippy::indexing_slicing, clippy::arithmetic_side_effects, reason = "tests build inputs by hand")
)]

pub mod appraisal;
pub mod attest;
pub mod bootlog;
pub mod certify;
pub mod chain;
pub mod claims;
pub mod credential;
pub mod csr;
pub mod ek;
pub mod folder;
pub mod hash;
pub mod ima;
pub mod parsers;
pub mod public;
mod quote;
pub mod round;
pub mod signature;
#[cfg(test)]
mod testdata;
pub mod ticket;
pub mod transcript;
mod wire;

pub use certify::KeyHome;
pub use chain::{
    ActivatedAk, Appraised, Before, BeginInput, Challenge, Counters, Denial, EndorsedEk, Entropy, EvidenceHeader,
    Expected, FreshQuote, KeptEvidence, LogExtent, NodeEvidence, PresentedEk, RoundEvidence, RoundLogs, Session, Step,
    Terms, Verified,
};
pub use ek::{EkClass, EkDenyRule, EkMake, EkRoot, Endorsements, Quirk};
pub use hash::{Bank, HashAlg};
pub use public::{Public, node_id};
pub use round::{FreshRound, KnownNode, Round, RoundQuote};
pub use ticket::TicketBody;

/// The largest boot log read, in bytes: real ones are 20-200 KiB, so this is ten times the worst seen.
pub const BOOT_LOG_BYTES_MAX: u64 = 2 * 1024 * 1024;
/// The largest IMA log read, in bytes: about 400,000 entries.
pub const IMA_LOG_BYTES_MAX: u64 = 64 * 1024 * 1024;
/// Largest certificate, certificate request, public area or signature accepted, in bytes.
pub const OBJECT_BYTES_MAX: usize = 16 * 1024;
/// Most intermediates taken from one attester. Real EK chains have at most three, and the search for a path among
/// certificates of one name takes time by the factorial: eight cost 0.2 s for each root.
pub const INTERMEDIATES_MAX: usize = 4;
/// PCRs 0-23 of the PC Client profile: the bits a mask may have.
pub const PCR_MASK_ALL: u32 = 0x00ff_ffff;
/// The PCRs that a boot log accounts for: 0-9 and 14.
pub const BOOT_PCR_MASK: u32 = 0x43ff;
/// The PCR that IMA extends.
pub const IMA_PCR: u32 = 10;
