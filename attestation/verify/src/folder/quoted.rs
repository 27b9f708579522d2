//! The quote and the EK of a folder, checked in the order of design.md section 3.

use super::{Ask, Checked, Folder, PCR_MASK, incomplete};
use crate::attest::Attest;
use crate::chain::Denial;
use crate::hash::Bank;
use crate::public::{AttestationKey, EndorsementKey, Public};
use crate::signature::{AkVerifier, Signature};
use crate::wire::Reader;
use crate::{Endorsements, ek};
use ambit_model::{Code, Refusal, Stamp};
use std::collections::BTreeMap;

type Proved = (Checked, BTreeMap<u32, Vec<u8>>);

impl Folder {
    /// What the quote proves; without one, what the PCR file says.
    pub(super) fn prove(&self, ask: &Ask<'_>) -> Result<Proved, Denial> {
        let endorsed = self.endorsed(ask)?;
        let parts = ["quote.tpms_attest", "quote.tpmt_signature", "ak.tpmt_public"].map(|name| (name, self.file(name)));
        let [(_, attest), (_, signature), (_, ak)] = parts;
        // The AK alone is no quote; a quote without its signature or key cannot be judged.
        if attest.is_none() && signature.is_none() {
            if ask.nonce.is_some() {
                return Err(Refusal::new(Code::QuoteMissing, "a quote to compare the nonce with", "none").into());
            }
            let checked = Checked { quoted: false, nonce: false, signer: false, endorsed, bank: Bank::Sha256 };
            return Ok((checked, self.asked(Bank::Sha256)?));
        }
        let (Some(attest), Some(signature), Some(ak)) = (attest, signature, ak) else {
            let missing: Vec<&str> = parts.iter().filter(|(_, file)| file.is_none()).map(|(name, _)| *name).collect();
            let expected = "a quote with its signature and AK".to_owned();
            return Err(incomplete(expected, &format!("no {}", missing.join(", "))).into());
        };
        let (attest, ak, signer) = self.verified(attest, signature, ak)?;
        if let Some(nonce) = &ask.nonce
            && *nonce != attest.head.extra_data
        {
            let (expected, found) = (format!("extraData {}", hex::encode(nonce)), hex::encode(&attest.head.extra_data));
            return Err(Refusal::new(Code::QuoteNonce, expected, found).into());
        }
        let bank = match [Bank::Sha256, Bank::Sha384].map(|b| attest.selects_exactly(b, PCR_MASK)) {
            [Ok(()), _] => Bank::Sha256,
            [_, Ok(())] => Bank::Sha384,
            [Err(refusal), Err(_)] => return Err(refusal.into()),
        };
        let pcrs = self.asked(bank)?;
        let values = pcrs.values().map(Vec::as_slice).collect::<Vec<_>>();
        let digest = ak.scheme_hash().digest(&values);
        if attest.pcr_digest != digest {
            let expected = format!("values whose digest is {}", hex::encode(&attest.pcr_digest));
            return Err(Refusal::new(Code::QuotePcrDigest, expected, hex::encode(digest)).into());
        }
        Ok((Checked { quoted: true, nonce: ask.nonce.is_some(), signer, endorsed, bank }, pcrs))
    }

    /// The values of exactly the PCRs that the server asks for.
    fn asked(&self, bank: Bank) -> Result<BTreeMap<u32, Vec<u8>>, Refusal> {
        let mut pcrs = self.pcr_file(bank)?;
        pcrs.retain(|n, _| PCR_MASK & (1 << n) != 0);
        Ok(pcrs)
    }

    /// The quote, signed by the AK, and by the AK under this folder's EK if it holds one.
    fn verified(&self, attest: &[u8], signature: &[u8], ak: &[u8]) -> Result<(Attest, AttestationKey, bool), Refusal> {
        let ak = Public::parse(ak).map_err(|e| e.refuse(Code::EvidenceMalformed, "TPMT_PUBLIC of the AK"))?;
        let ak = AttestationKey::new(ak)?;
        let signature = Signature::parse(signature).map_err(|e| e.refuse(Code::EvidenceMalformed, "TPMT_SIGNATURE"))?;
        AkVerifier::new(&ak)?.verify(&signature, attest)?;
        let attest = Attest::parse(attest)?;
        let Some(ek) = self.ek()? else { return Ok((attest, ak, false)) };
        let signer = ek.qualify(ak.public());
        if attest.head.qualified_signer != signer {
            let expected = format!("qualified signer {}", hex::encode(signer));
            return Err(Refusal::new(Code::QuoteSigner, expected, hex::encode(&attest.head.qualified_signer)));
        }
        Ok((attest, ak, true))
    }

    /// The EK: a TPM2B_PUBLIC, as tpm2-tools writes it.
    fn ek(&self) -> Result<Option<EndorsementKey>, Refusal> {
        let Some(bytes) = self.file("ek.tpm2b_public") else { return Ok(None) };
        let malformed = |e: crate::wire::Malformed| e.refuse(Code::EkMalformed, "TPM2B_PUBLIC of the EK");
        let mut r = Reader::new(bytes);
        let inner = r.tpm2b(bytes.len(), "size").map_err(malformed)?;
        r.end("bytes after the public area").map_err(malformed)?;
        EndorsementKey::new(Public::parse(inner).map_err(malformed)?).map(Some)
    }

    /// Whether a certificate in the folder endorses its EK; false if nobody asked.
    fn endorsed(&self, ask: &Ask<'_>) -> Result<bool, Refusal> {
        let Some(endorsements) = ask.endorsements else { return Ok(false) };
        let ek = self.ek()?.ok_or_else(|| incomplete("ek.tpm2b_public, to judge it by the roots".into(), "none"))?;
        let certificates = self.files.iter().filter(|(name, _)| name.starts_with("ek") && name.ends_with(".der"));
        let mut refused: Option<Refusal> = None;
        for (_, certificate) in certificates {
            match judge(certificate, ek.public(), endorsements, ask.now) {
                Ok(()) => return Ok(true),
                // A certificate of the TPM's other EK says less than one of this EK that is refused.
                Err(e) if refused.as_ref().is_none_or(|r| r.code == Code::EkMismatch) => refused = Some(e),
                Err(_) => {}
            }
        }
        let none = || incomplete("an EK certificate (ek-*.nv.der), to judge it by the roots".into(), "none");
        Err(refused.unwrap_or_else(none))
    }
}

fn judge(certificate: &[u8], ek: &Public, endorsements: &Endorsements, now: Stamp) -> Result<(), Refusal> {
    ek::judge(certificate, &[], ek, endorsements, now).map(|_| ())
}
