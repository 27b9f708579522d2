//! TPMS_ATTEST (TPM 2.0 Part 2, 10.12.12): what a TPM signs about itself.

use crate::chain::Counters;
use crate::hash::Bank;
use crate::wire::{Malformed, Reader};
use ambit_model::{Code, Refusal};

/// TPM_GENERATED_VALUE: a restricted key never signs caller's bytes that begin with it (Part 1, 31.3).
const MAGIC: u32 = 0xff54_4347;
/// TPM_ST_ATTEST_CERTIFY.
const CERTIFY: u16 = 0x8017;
/// TPM_ST_ATTEST_QUOTE.
const QUOTE: u16 = 0x8018;
/// A name: algorithm identifier and the longest digest.
const NAME_BYTES_MAX: usize = 66;
/// TPM2B_DATA: as long as the longest digest with its algorithm.
const DATA_BYTES_MAX: usize = 66;
/// Selections read; one is accepted.
const SELECTIONS_MAX: u32 = 16;

/// What every TPMS_ATTEST says, whatever it attests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Head {
    pub(crate) qualified_signer: Vec<u8>,
    pub(crate) extra_data: Vec<u8>,
    pub(crate) counters: Counters,
    pub(crate) firmware_version: u64,
}

/// A parsed quote.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attest {
    pub(crate) head: Head,
    pub(crate) selections: Vec<(u16, Vec<u8>)>,
    pub(crate) pcr_digest: Vec<u8>,
}

impl Attest {
    /// Parses the whole of `bytes`: magic first, then type, then the rest.
    pub fn parse(bytes: &[u8]) -> Result<Attest, Refusal> {
        let mut r = Reader::new(bytes);
        kind(&mut r, QUOTE)?;
        Self::rest(&mut r).map_err(malformed)
    }

    fn rest(r: &mut Reader<'_>) -> Result<Attest, Malformed> {
        let head = head(r)?;
        let at = r.at();
        let count = r.u32("selection count")?;
        if count > SELECTIONS_MAX {
            return Err(Malformed::new("selection count", at));
        }
        let mut selections = Vec::new();
        for _ in 0..count {
            let alg = r.u16("selection hash")?;
            let n = usize::from(r.u8("sizeofSelect")?);
            selections.push((alg, r.take(n, "pcrSelect")?.to_vec()));
        }
        let pcr_digest = r.tpm2b(64, "pcrDigest")?.to_vec();
        r.end("bytes after the quote")?;
        Ok(Attest { head, selections, pcr_digest })
    }

    /// Refuses any selection but exactly `bank` and `mask`, in the one form that TPMs of the PC Client profile give
    /// (three octets). An empty selection, a second bank or one PCR more is not this quote.
    pub(crate) fn selects_exactly(&self, bank: Bank, mask: u32) -> Result<(), Refusal> {
        let [b0, b1, b2, _] = mask.to_le_bytes();
        let exact = (bank.hash().id(), vec![b0, b1, b2]);
        if self.selections.as_slice() == [exact] {
            return Ok(());
        }
        let found = self.selections.iter().map(|(alg, s)| format!("{alg:#06x}:{}", hex::encode(s))).collect::<Vec<_>>();
        let expected = format!("{:#06x}:{}", bank.hash().id(), hex::encode([b0, b1, b2]));
        Err(Refusal::new(
            Code::QuoteSelection,
            expected,
            if found.is_empty() { "none".into() } else { found.join(" ") },
        ))
    }
}

/// A parsed TPM2_Certify: a TPM says that it holds the object of this name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certified {
    pub(crate) head: Head,
    pub(crate) name: Vec<u8>,
}

impl Certified {
    /// Parses the whole of `bytes`: magic first, then type, then the rest.
    pub fn parse(bytes: &[u8]) -> Result<Certified, Refusal> {
        let mut r = Reader::new(bytes);
        kind(&mut r, CERTIFY)?;
        Self::rest(&mut r).map_err(malformed)
    }

    fn rest(r: &mut Reader<'_>) -> Result<Certified, Malformed> {
        let head = head(r)?;
        let name = r.tpm2b(NAME_BYTES_MAX, "name")?.to_vec();
        // The qualified name tells under which parent the object lives, which is the attester's choice.
        r.tpm2b(NAME_BYTES_MAX, "qualifiedName")?;
        r.end("bytes after the certification")?;
        Ok(Certified { head, name })
    }
}

fn malformed(e: Malformed) -> Refusal {
    e.refuse(Code::EvidenceMalformed, "TPMS_ATTEST")
}

/// Magic and type: each its own code, as no other field means anything without them.
fn kind(r: &mut Reader<'_>, expected: u16) -> Result<(), Refusal> {
    let magic = r.u32("magic").map_err(malformed)?;
    if magic != MAGIC {
        return Err(Refusal::new(Code::QuoteMagic, format!("magic {MAGIC:#010x}"), format!("{magic:#010x}")));
    }
    let kind = r.u16("type").map_err(malformed)?;
    if kind != expected {
        return Err(Refusal::new(Code::QuoteType, format!("type {expected:#06x}"), format!("{kind:#06x}")));
    }
    Ok(())
}

fn head(r: &mut Reader<'_>) -> Result<Head, Malformed> {
    let qualified_signer = r.tpm2b(NAME_BYTES_MAX, "qualifiedSigner")?.to_vec();
    let extra_data = r.tpm2b(DATA_BYTES_MAX, "extraData")?.to_vec();
    let clock_ms = r.u64("clock")?;
    let reset = r.u32("resetCount")?;
    let restart = r.u32("restartCount")?;
    let at = r.at();
    let safe = match r.u8("safe")? {
        0 => false,
        1 => true,
        _ => return Err(Malformed::new("safe", at)),
    };
    let firmware_version = r.u64("firmwareVersion")?;
    let counters = Counters { reset, restart, clock_ms, safe };
    Ok(Head { qualified_signer, extra_data, counters, firmware_version })
}
