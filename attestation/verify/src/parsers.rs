//! The parsers one by one, for the fuzz targets: what the product reaches only through [`crate::chain`], behind checks
//! (an HMAC, a signature) that no mutated input would pass. What these return proves nothing about anyone.

use crate::bootlog::{self, BootFacts};
use crate::chain::Denial;
use crate::hash::{Bank, HashAlg};
use crate::ima::{self, ImaFacts};
use crate::public::Public;
use crate::signature::Signature;
use ambit_model::{Code, Refusal};
use std::collections::BTreeMap;

/// TPMT_PUBLIC.
pub fn public(bytes: &[u8]) -> Result<Public, Refusal> {
    Public::parse(bytes).map_err(|e| e.refuse(Code::EvidenceMalformed, "TPMT_PUBLIC"))
}

/// TPMT_SIGNATURE.
pub fn signature(bytes: &[u8]) -> Result<Signature, Refusal> {
    Signature::parse(bytes).map_err(|e| e.refuse(Code::EvidenceMalformed, "TPMT_SIGNATURE"))
}

/// A TCG2 boot log against the PCRs of the bank of `hash`.
pub fn boot_log(bytes: &[u8], hash: HashAlg, pcrs: &BTreeMap<u32, Vec<u8>>) -> Result<BootFacts, Denial> {
    bootlog::judge(bytes, hash, pcrs)
}

/// An IMA log from the machine's start against PCR 10 of `bank`.
pub fn ima_log(bytes: &[u8], bank: Bank, quoted: &[u8]) -> Result<ImaFacts, Denial> {
    ima::judge(bytes, bank, quoted)
}
