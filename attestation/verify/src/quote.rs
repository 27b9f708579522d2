//! One quote against all that it must equal: the part that enrolment and rounds share (design.md section 3, the order
//! of checks from the signature to the PCR digest).

use crate::attest::{Attest, Head};
use crate::hash::{Bank, sha256_of};
use crate::signature::{AkVerifier, Signature};
use crate::{BOOT_PCR_MASK, OBJECT_BYTES_MAX};
use ambit_model::{Code, Refusal};
use std::collections::BTreeMap;

const BOOT_PCRS_CONTEXT: &[u8] = b"ambit/boot-pcrs/v1";

/// A quote as sent, and all that it must equal.
pub(crate) struct Quote<'a> {
    pub(crate) attest: &'a [u8],
    pub(crate) signature: &'a [u8],
    pub(crate) pcrs: &'a [(u32, Vec<u8>)],
    pub(crate) signer: &'a [u8],
    pub(crate) extra_data: [u8; 32],
    pub(crate) bank: Bank,
    pub(crate) pcr_mask: u32,
}

impl Quote<'_> {
    pub(crate) fn judge(&self, ak: &AkVerifier) -> Result<Quoted, Refusal> {
        let signature =
            Signature::parse(self.signature).map_err(|e| e.refuse(Code::EvidenceMalformed, "TPMT_SIGNATURE"))?;
        ak.verify(&signature, self.attest)?;
        let attest = Attest::parse(self.attest)?;
        if attest.head.qualified_signer != self.signer {
            return Err(Refusal::new(
                Code::QuoteSigner,
                format!("qualified signer {}", hex::encode(self.signer)),
                hex::encode(&attest.head.qualified_signer),
            ));
        }
        if attest.head.extra_data != self.extra_data {
            return Err(Refusal::new(
                Code::QuoteNonce,
                format!("extraData {}", hex::encode(self.extra_data)),
                hex::encode(&attest.head.extra_data),
            ));
        }
        attest.selects_exactly(self.bank, self.pcr_mask)?;
        let pcrs = self.values()?;
        let concatenated = pcrs.values().map(Vec::as_slice).collect::<Vec<_>>();
        let digest = ak.hash().digest(&concatenated);
        if attest.pcr_digest != digest {
            return Err(Refusal::new(
                Code::QuotePcrDigest,
                format!("values whose digest is {}", hex::encode(&attest.pcr_digest)),
                hex::encode(digest),
            ));
        }
        Ok(Quoted { head: attest.head, bank: self.bank, pcrs })
    }

    /// The values sent, if they are exactly the PCRs asked for, ascending, each as long as the bank's digest.
    fn values(&self) -> Result<BTreeMap<u32, Vec<u8>>, Refusal> {
        let asked = (0..24u32).filter(|n| self.pcr_mask & (1 << n) != 0);
        let sent = self.pcrs.iter().map(|(n, _)| *n);
        if !asked.eq(sent) || self.pcrs.iter().any(|(_, v)| v.len() != self.bank.hash().size()) {
            return Err(Refusal::new(
                Code::QuotePcrDigest,
                format!("{} values of the PCRs in mask {:#08x}, ascending", self.bank.as_str(), self.pcr_mask),
                format!("values of PCRs {:?}", self.pcrs.iter().map(|(n, _)| *n).collect::<Vec<_>>()),
            ));
        }
        Ok(self.pcrs.iter().cloned().collect())
    }
}

/// What a quote that passed every check says.
#[derive(Debug)]
pub(crate) struct Quoted {
    pub(crate) head: Head,
    pub(crate) bank: Bank,
    pub(crate) pcrs: BTreeMap<u32, Vec<u8>>,
}

impl Quoted {
    /// SHA-256 over bank, index and value of each quoted PCR that a boot log accounts for (0-9 and 14): equal exactly
    /// where the same PCRs were quoted and the machine booted the same, so that a boot is known again without its log.
    pub(crate) fn boot_pcrs_sha256(&self) -> [u8; 32] {
        let bank = self.bank.hash().id().to_be_bytes();
        let mut parts = vec![BOOT_PCRS_CONTEXT.to_vec(), bank.to_vec()];
        for (index, value) in self.pcrs.iter().filter(|(n, _)| BOOT_PCR_MASK & (1 << **n) != 0) {
            parts.push(index.to_be_bytes().to_vec());
            parts.push(value.clone());
        }
        sha256_of(&parts.iter().map(Vec::as_slice).collect::<Vec<_>>())
    }
}

/// Refuses structures that are larger than any TPM makes, before anything of them is read.
pub(crate) fn sizes(objects: &[(&str, &[u8])], pcrs: &[(u32, Vec<u8>)]) -> Result<(), Refusal> {
    for (what, object) in objects {
        if object.len() > OBJECT_BYTES_MAX {
            return Err(too_large(what, object.len() as u64));
        }
    }
    // 24 PCRs of at most 64 bytes.
    if pcrs.len() > 24 || pcrs.iter().any(|(_, v)| v.len() > 64) {
        return Err(too_large("PCR values", pcrs.len() as u64));
    }
    Ok(())
}

pub(crate) fn too_large(what: &str, n: u64) -> Refusal {
    Refusal::new(Code::EvidenceTooLarge, format!("{what} within its limit"), n.to_string())
}
