//! TPMT_SIGNATURE (TPM 2.0 Part 2, 11.3.4), verified with an AK.

use crate::hash::HashAlg;
use crate::public::{AkScheme, AttestationKey, Key, padded};
use crate::wire::{Malformed, Reader};
use ambit_model::{Code, Refusal};
use aws_lc_rs::signature::{self as lc, ParsedPublicKey, RsaParameters, RsaPssSaltLength, RsaPublicKeyComponents};

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
}

/// An AK made ready to verify: its key is decoded and found valid once (a point is on its curve), so that a round pays
/// for the signature alone.
#[derive(Clone, Debug)]
pub(crate) struct AkVerifier {
    scheme: AkScheme,
    hash: HashAlg,
    /// Length of `r` and of `s`; 0 for RSA.
    coordinate_size: usize,
    key: ParsedPublicKey,
    /// The same key, for the other salt length that TPMs use with RSASSA-PSS; none for other schemes.
    key_long_salt: Option<ParsedPublicKey>,
}

impl AkVerifier {
    pub(crate) fn new(ak: &AttestationKey) -> Result<AkVerifier, Refusal> {
        let (scheme, hash) = (ak.scheme(), ak.scheme_hash());
        let invalid = |found: &str| Refusal::new(Code::EvidenceMalformed, "an AK whose public key is valid", found);
        let (keys, coordinate_size) = match ak.public().key() {
            Key::Rsa { modulus, exponent } => (rsa_keys(scheme, hash, modulus, *exponent), 0),
            Key::Ec { curve, .. } => {
                let algorithm = match hash {
                    HashAlg::Sha256 => &lc::ECDSA_P256_SHA256_FIXED,
                    HashAlg::Sha384 => &lc::ECDSA_P384_SHA384_FIXED,
                    HashAlg::Sha1 | HashAlg::Sha512 => return Err(invalid("a hash that does not fit the curve")),
                };
                let key = ParsedPublicKey::new(algorithm, ak.public().key_bits()).ok();
                (key.map(|key| (key, None)), curve.coordinate_size())
            }
        };
        let (key, key_long_salt) = keys.ok_or_else(|| invalid("no point of its curve, or no RSA key"))?;
        Ok(AkVerifier { scheme, hash, coordinate_size, key, key_long_salt })
    }

    /// The hash of the AK's scheme, which is also the one that a quote's PCR digest is made with.
    pub(crate) fn hash(&self) -> HashAlg {
        self.hash
    }

    /// Verifies `message` with exactly the scheme and hash that the AK's public area fixes: the signature does not
    /// choose its own algorithm.
    pub(crate) fn verify(&self, signature: &Signature, message: &[u8]) -> Result<(), Refusal> {
        let refuse = |expected: &str, found: String| Err(Refusal::new(Code::QuoteSignature, expected, found));
        if signature.scheme != Some(self.scheme) || signature.hash != Some(self.hash) {
            let expected = format!("{:?} with {}", self.scheme, self.hash);
            return refuse(&expected, format!("{:?} with {:?}", signature.scheme, signature.hash));
        }
        let good = match &signature.value {
            Value::Rsa(value) => match (self.key.verify_sig(message, value), &self.key_long_salt) {
                (Err(_), Some(other)) => other.verify_sig(message, value),
                (verdict, _) => verdict,
            },
            // r and s each in 1..n: the library's check (FIPS 186-5, 6.4.2). A high s is as good as a low one here:
            // nothing is named by a signature, and TPMs make both.
            Value::Ec { r, s } => {
                let n = self.coordinate_size;
                self.key.verify_sig(message, &[padded(r, n), padded(s, n)].concat())
            }
        };
        good.or_else(|_| refuse("a signature of the AK over the structure", "one that does not verify".into()))
    }
}

/// RSASSA-PSS: TPMs that follow FIPS 186-4 salt as long as the digest, those of earlier revisions as long as fits
/// (Part 1, B.7). The length is no secret and no choice that weakens the scheme, so both are taken.
fn rsa_keys(
    scheme: AkScheme,
    hash: HashAlg,
    modulus: &[u8],
    exponent: u32,
) -> Option<(ParsedPublicKey, Option<ParsedPublicKey>)> {
    const LONG: RsaPssSaltLength = RsaPssSaltLength::Max;
    let (parameters, long): (&'static RsaParameters, Option<&'static RsaParameters>) = match (scheme, hash) {
        (AkScheme::RsaSsa, HashAlg::Sha256) => (&lc::RSA_PKCS1_2048_8192_SHA256, None),
        (AkScheme::RsaSsa, HashAlg::Sha384) => (&lc::RSA_PKCS1_2048_8192_SHA384, None),
        (AkScheme::RsaSsa, HashAlg::Sha512) => (&lc::RSA_PKCS1_2048_8192_SHA512, None),
        (AkScheme::RsaPss, HashAlg::Sha256) => {
            (&lc::RSA_PSS_2048_8192_SHA256, Some(&const { lc::RSA_PSS_2048_8192_SHA256.with_pss_salt_length(LONG) }))
        }
        (AkScheme::RsaPss, HashAlg::Sha384) => {
            (&lc::RSA_PSS_2048_8192_SHA384, Some(&const { lc::RSA_PSS_2048_8192_SHA384.with_pss_salt_length(LONG) }))
        }
        (AkScheme::RsaPss, HashAlg::Sha512) => {
            (&lc::RSA_PSS_2048_8192_SHA512, Some(&const { lc::RSA_PSS_2048_8192_SHA512.with_pss_salt_length(LONG) }))
        }
        (AkScheme::Ecdsa, _) | (_, HashAlg::Sha1) => return None,
    };
    let [_, e @ ..] = exponent.to_be_bytes();
    let key = RsaPublicKeyComponents { n: modulus, e: e.as_slice() };
    let long = match long {
        Some(long) => Some(key.to_parsed_public_key(long).ok()?),
        None => None,
    };
    Some((key.to_parsed_public_key(parameters).ok()?, long))
}

#[cfg(test)]
mod tests;
