//! TPMT_SIGNATURE (TPM 2.0 Part 2, 11.3.4), verified with an AK.

use crate::hash::HashAlg;
use crate::public::{AkScheme, AttestationKey, Key, padded};
use crate::wire::{Malformed, Reader};
use ambit_model::{Code, Refusal};
use aws_lc_rs::signature::{self as lc, ParsedPublicKey, RsaParameters, RsaPublicKeyComponents};

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
}

impl AkVerifier {
    pub(crate) fn new(ak: &AttestationKey) -> Result<AkVerifier, Refusal> {
        let (scheme, hash) = (ak.scheme(), ak.scheme_hash());
        let invalid = |found: &str| Refusal::new(Code::EvidenceMalformed, "an AK whose public key is valid", found);
        let (key, coordinate_size) = match ak.public().key() {
            Key::Rsa { modulus, exponent } => {
                let parameters = rsa_parameters(scheme, hash).ok_or_else(|| invalid("another RSA scheme"))?;
                let [_, e @ ..] = exponent.to_be_bytes();
                let components = RsaPublicKeyComponents { n: modulus.as_slice(), e: e.as_slice() };
                (components.to_parsed_public_key(parameters).map_err(|_| invalid("no RSA key"))?, 0)
            }
            Key::Ec { curve, .. } => {
                let algorithm = match hash {
                    HashAlg::Sha256 => &lc::ECDSA_P256_SHA256_FIXED,
                    HashAlg::Sha384 => &lc::ECDSA_P384_SHA384_FIXED,
                    HashAlg::Sha1 | HashAlg::Sha512 => return Err(invalid("a hash that does not fit the curve")),
                };
                let point = ak.public().key_bits();
                let key = ParsedPublicKey::new(algorithm, point).map_err(|_| invalid("a point not on its curve"))?;
                (key, curve.coordinate_size())
            }
        };
        Ok(AkVerifier { scheme, hash, coordinate_size, key })
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
            Value::Rsa(value) => self.key.verify_sig(message, value),
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

/// TPMs of firmware that follows FIPS 186-4 make the salt as long as the digest (Part 1, B.7); no other length is taken.
fn rsa_parameters(scheme: AkScheme, hash: HashAlg) -> Option<&'static RsaParameters> {
    Some(match (scheme, hash) {
        (AkScheme::RsaSsa, HashAlg::Sha256) => &lc::RSA_PKCS1_2048_8192_SHA256,
        (AkScheme::RsaSsa, HashAlg::Sha384) => &lc::RSA_PKCS1_2048_8192_SHA384,
        (AkScheme::RsaSsa, HashAlg::Sha512) => &lc::RSA_PKCS1_2048_8192_SHA512,
        (AkScheme::RsaPss, HashAlg::Sha256) => &lc::RSA_PSS_2048_8192_SHA256,
        (AkScheme::RsaPss, HashAlg::Sha384) => &lc::RSA_PSS_2048_8192_SHA384,
        (AkScheme::RsaPss, HashAlg::Sha512) => &lc::RSA_PSS_2048_8192_SHA512,
        (AkScheme::Ecdsa, _) | (_, HashAlg::Sha1) => return None,
    })
}
