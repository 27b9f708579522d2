//! TPM2_Certify of the SVID key (TPM 2.0 Part 3, 18.2): where a node keeps the key that its certificate is for.
//!
//! The AK says "my TPM holds the object of this name". The name is a digest of the public area, so the area is sent too,
//! its name computed from it, and its key compared with the key of the certificate request.

use crate::attest::Certified;
use crate::public::Public;
use crate::signature::{AkVerifier, Signature};
use ambit_model::{Code, Refusal};

/// Where the private half of the SVID key is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeyHome {
    /// In the agent's memory: the certificate is short-lived instead.
    InMemory,
    /// In the node's TPM, which says so itself.
    InTpm {
        /// TPMT_PUBLIC of the SVID key.
        public: Vec<u8>,
        /// TPMS_ATTEST of TPM2_Certify by the AK, over the session's qualifying data.
        attest: Vec<u8>,
        /// TPMT_SIGNATURE of the AK over it.
        signature: Vec<u8>,
    },
}

impl KeyHome {
    /// From the three fields of the wire: all empty, or none.
    pub fn from_wire(public: Vec<u8>, attest: Vec<u8>, signature: Vec<u8>) -> Result<KeyHome, Refusal> {
        match (public.is_empty(), attest.is_empty(), signature.is_empty()) {
            (true, true, true) => Ok(KeyHome::InMemory),
            (false, false, false) => Ok(KeyHome::InTpm { public, attest, signature }),
            _ => {
                Err(Refusal::new(Code::EvidenceMalformed, "public area, certification and signature", "a part of them"))
            }
        }
    }

    /// The three fields of the wire.
    pub fn to_wire(&self) -> (Vec<u8>, Vec<u8>, Vec<u8>) {
        match self {
            KeyHome::InMemory => Default::default(),
            KeyHome::InTpm { public, attest, signature } => (public.clone(), attest.clone(), signature.clone()),
        }
    }

    /// Whether the key of `csr_spki` is in the TPM of `ak`; a claim that does not hold is refused, never ignored.
    pub(crate) fn judge(
        &self,
        ak: &AkVerifier,
        signer: &[u8],
        extra_data: &[u8; 32],
        csr_spki: &[u8],
    ) -> Result<bool, Refusal> {
        let KeyHome::InTpm { public, attest, signature } = self else { return Ok(false) };
        let refuse = |expected: &str, found: &str| Err(Refusal::new(Code::KeyNotCertified, expected, found));
        let public =
            Public::parse(public).map_err(|e| e.refuse(Code::KeyNotCertified, "TPMT_PUBLIC of the SVID key"))?;
        if public.spki_der() != csr_spki {
            return refuse("the public area of the CSR's key", "one of another key");
        }
        if !public.is_confined_signer() {
            let found = format!("attributes {:#010x}, name by {}", public.attributes(), public.name_alg());
            return refuse("a key made in the TPM that never leaves it, signs and does nothing else", &found);
        }
        let signature = Signature::parse(signature).map_err(|e| e.refuse(Code::KeyNotCertified, "TPMT_SIGNATURE"))?;
        let inner = |r: Refusal| Refusal { code: Code::KeyNotCertified, ..r };
        ak.verify(&signature, attest).map_err(inner)?;
        let certified = Certified::parse(attest).map_err(inner)?;
        if certified.head.qualified_signer != signer {
            return refuse("a certification by the AK under the endorsed EK", "another qualified signer");
        }
        if certified.head.extra_data != extra_data {
            return refuse("a certification over this session's qualifying data", "other extraData");
        }
        if certified.name != public.name() {
            return refuse("a certification of the name of the public area sent", "another name");
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests;
