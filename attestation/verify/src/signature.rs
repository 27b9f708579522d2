//! TPMT_SIGNATURE (TPM 2.0 Part 2, 11.3.4), verified with an AK.

use crate::hash::HashAlg;
use crate::public::{AkScheme, AttestationKey, Key, padded};
use crate::wire::{Malformed, Reader};
use ambit_model::{Code, Refusal};
use aws_lc_rs::signature::{self as lc, RsaPublicKeyComponents, UnparsedPublicKey};

/// A parsed signature.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Signature {
    scheme: Option<AkScheme>,
    hash: Option<HashAlg>,
    value: Value,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Value {
    Rsa(Vec<u8>),
    Ec { r: Vec<u8>, s: Vec<u8> },
}

impl Signature {
    pub(crate) fn parse(bytes: &[u8]) -> Result<Signature, Malformed> {
        let mut r = Reader::new(bytes);
        let alg = r.u16("sigAlg")?;
        let scheme = AkScheme::from_alg(alg);
        let hash = HashAlg::from_id(r.u16("hash")?);
        let value = match scheme {
            Some(AkScheme::RsaSsa | AkScheme::RsaPss) => Value::Rsa(r.tpm2b(512, "signature")?.to_vec()),
            Some(AkScheme::Ecdsa) => {
                Value::Ec { r: r.tpm2b(66, "signatureR")?.to_vec(), s: r.tpm2b(66, "signatureS")?.to_vec() }
            }
            None => return Err(Malformed::new("sigAlg", 0)),
        };
        r.end("bytes after the signature")?;
        Ok(Signature { scheme, hash, value })
    }

    /// Verifies `message` with exactly the scheme and hash that the AK's public area fixes: the signature does not
    /// choose its own algorithm.
    pub(crate) fn verify(&self, ak: &AttestationKey, message: &[u8]) -> Result<(), Refusal> {
        let refuse = |expected: &str, found: String| Err(Refusal::new(Code::QuoteSignature, expected, found));
        if self.scheme != Some(ak.scheme()) || self.hash != Some(ak.scheme_hash()) {
            let expected = format!("{:?} with {}", ak.scheme(), ak.scheme_hash());
            return refuse(&expected, format!("{:?} with {:?}", self.scheme, self.hash));
        }
        let good = match (ak.public().key(), &self.value) {
            (Key::Rsa { modulus, exponent }, Value::Rsa(value)) => {
                let parameters = match (ak.scheme(), ak.scheme_hash()) {
                    (AkScheme::RsaSsa, HashAlg::Sha256) => &lc::RSA_PKCS1_2048_8192_SHA256,
                    (AkScheme::RsaSsa, HashAlg::Sha384) => &lc::RSA_PKCS1_2048_8192_SHA384,
                    (AkScheme::RsaSsa, HashAlg::Sha512) => &lc::RSA_PKCS1_2048_8192_SHA512,
                    (AkScheme::RsaPss, HashAlg::Sha256) => &lc::RSA_PSS_2048_8192_SHA256,
                    (AkScheme::RsaPss, HashAlg::Sha384) => &lc::RSA_PSS_2048_8192_SHA384,
                    (AkScheme::RsaPss, HashAlg::Sha512) => &lc::RSA_PSS_2048_8192_SHA512,
                    _ => return refuse("an RSA scheme with SHA-2", "another".into()),
                };
                let [_, e @ ..] = exponent.to_be_bytes();
                RsaPublicKeyComponents { n: modulus.as_slice(), e: e.as_slice() }
                    .verify(parameters, message, value)
                    .is_ok()
            }
            (Key::Ec { curve, .. }, Value::Ec { r, s }) => {
                let n = curve.coordinate_size();
                let parameters = match ak.scheme_hash() {
                    HashAlg::Sha256 => &lc::ECDSA_P256_SHA256_FIXED,
                    HashAlg::Sha384 => &lc::ECDSA_P384_SHA384_FIXED,
                    _ => return refuse("ECDSA with the curve's hash", "another".into()),
                };
                let fixed = [padded(r, n), padded(s, n)].concat();
                let point = ak.public().key_bits();
                UnparsedPublicKey::new(parameters, point).verify(message, &fixed).is_ok()
            }
            _ => false,
        };
        if good { Ok(()) } else { refuse("a signature of the AK over the quote", "one that does not verify".into()) }
    }
}
