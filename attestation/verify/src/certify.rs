//! TPM2_Certify of the SVID key (TPM 2.0 Part 3, 18.2): where a node keeps the key that its certificate is for.
//!
//! The AK says "my TPM holds the object of this name". The name is a digest of the public area, so the area is sent too,
//! its name computed from it, and its key compared with the key of the certificate request.

use crate::attest::Certified;
use crate::public::Public;
use crate::signature::{AkVerifier, Signature};
use ambit_model::{Code, Refusal};

/// Where the private half of the SVID key is, and what else the TPM says that it holds.
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
    /// A replica's: the key of its request is in its memory, and in its TPM is the key to which the cell wraps.
    WrapKeyInTpm {
        /// TPMT_PUBLIC of the wrap key.
        public: Vec<u8>,
        /// TPMS_ATTEST of TPM2_Certify by the AK, over the session's qualifying data.
        attest: Vec<u8>,
        /// TPMT_SIGNATURE of the AK over it.
        signature: Vec<u8>,
    },
}

/// The three fields of the wire that prove where a key is.
pub type WireKey = (Vec<u8>, Vec<u8>, Vec<u8>);

/// What a claim was found to prove.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Proven {
    /// Nothing was claimed.
    Nothing,
    /// The TPM holds the key of the request.
    SvidKey,
    /// The TPM holds the key at this point, to which may be wrapped.
    WrapKey(Vec<u8>),
}

impl KeyHome {
    /// From the fields of the wire, of the SVID key and of a wrap key: of each all three or none, and never both.
    pub fn from_wire(svid: WireKey, wrap: WireKey) -> Result<KeyHome, Refusal> {
        let given = |(public, attest, signature): &WireKey| match (
            public.is_empty(),
            attest.is_empty(),
            signature.is_empty(),
        ) {
            (true, true, true) => Ok(false),
            (false, false, false) => Ok(true),
            _ => {
                Err(Refusal::new(Code::EvidenceMalformed, "public area, certification and signature", "a part of them"))
            }
        };
        match (given(&svid)?, given(&wrap)?) {
            (false, false) => Ok(KeyHome::InMemory),
            (true, false) => Ok(KeyHome::InTpm { public: svid.0, attest: svid.1, signature: svid.2 }),
            (false, true) => Ok(KeyHome::WrapKeyInTpm { public: wrap.0, attest: wrap.1, signature: wrap.2 }),
            (true, true) => Err(Refusal::new(Code::EvidenceMalformed, "an SVID key or a wrap key in the TPM", "both")),
        }
    }

    /// The fields of the wire: of the SVID key, and of a wrap key.
    pub fn to_wire(&self) -> (WireKey, WireKey) {
        match self {
            KeyHome::InMemory => Default::default(),
            KeyHome::InTpm { public, attest, signature } => {
                ((public.clone(), attest.clone(), signature.clone()), Default::default())
            }
            KeyHome::WrapKeyInTpm { public, attest, signature } => {
                (Default::default(), (public.clone(), attest.clone(), signature.clone()))
            }
        }
    }

    /// What of it the TPM of `ak` says too; a claim that does not hold is refused, never ignored.
    pub(crate) fn judge(
        &self,
        ak: &AkVerifier,
        signer: &[u8],
        extra_data: &[u8; 32],
        csr_spki: &[u8],
    ) -> Result<Proven, Refusal> {
        let refuse = |expected: &str, found: &str| Err(Refusal::new(Code::KeyNotCertified, expected, found));
        let (KeyHome::InTpm { public, attest, signature } | KeyHome::WrapKeyInTpm { public, attest, signature }) = self
        else {
            return Ok(Proven::Nothing);
        };
        let public = Public::parse(public).map_err(|e| e.refuse(Code::KeyNotCertified, "TPMT_PUBLIC of the key"))?;
        let found = format!("attributes {:#010x}, name by {}", public.attributes(), public.name_alg());
        let proven = if matches!(self, KeyHome::WrapKeyInTpm { .. }) {
            if !public.is_confined_to_agreement() {
                let expected = "a P-256 key made in the TPM that never leaves it, agrees on keys and does nothing else";
                return refuse(expected, &found);
            }
            Proven::WrapKey(public.key_bits())
        } else {
            if public.spki_der() != csr_spki {
                return refuse("the public area of the CSR's key", "one of another key");
            }
            if !public.is_confined_signer() {
                return refuse("a key made in the TPM that never leaves it, signs and does nothing else", &found);
            }
            Proven::SvidKey
        };
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
        Ok(proven)
    }
}

#[cfg(test)]
mod tests;
