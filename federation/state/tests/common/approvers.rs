//! Approvers' keys, as people hold them. Signatures are OpenSSL's. Beside the other parts, as tests of other crates use those and have no
//! OpenSSL.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
#![allow(dead_code, reason = "each test file uses its part")]

use ambit_model::act::{Approval, ApproverCard, Proposal};
use openssl::pkey::{PKey, Private};
use openssl::sign::Signer;

pub(crate) struct Key(PKey<Private>);

impl Key {
    pub(crate) fn new() -> Key {
        Key(PKey::generate_ed25519().unwrap())
    }
    pub(crate) fn public(&self) -> [u8; 32] {
        self.0.raw_public_key().unwrap().try_into().unwrap()
    }
    pub(crate) fn sign(&self, message: &[u8]) -> Vec<u8> {
        Signer::new_without_digest(&self.0).unwrap().sign_oneshot_to_vec(message).unwrap()
    }
    pub(crate) fn card(&self) -> ApproverCard {
        ApproverCard { key: self.public(), proof: self.sign(&ApproverCard::proved(&self.public())) }
    }
    pub(crate) fn approve(&self, proposal: &Proposal) -> Approval {
        Approval { key: self.public(), signature: self.sign(&proposal.statement().unwrap()) }
    }
}
