//! Certificate requests: a proven P-256 key and nothing else. Anything else in a request is refused, not ignored.

use ambit_model::{Code, Refusal};
use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey};
use sha2::{Digest, Sha256};
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::prelude::FromDer;

/// A request is this small; a larger one carries something it should not.
const CSR_MAX_BYTES: usize = 1024;

/// A request whose signature proved possession of its key.
#[derive(Debug)]
pub struct Csr {
    spki: Vec<u8>,
}

impl Csr {
    /// Parses and proves. Errors: `csr_malformed`.
    pub fn parse(der: &[u8]) -> Result<Self, Refusal> {
        let bad = |found: &str| {
            Refusal::new(Code::CsrMalformed, "a PKCS#10 request with a P-256 key and nothing else", found)
        };
        if der.len() > CSR_MAX_BYTES {
            return Err(bad("more than 1024 bytes"));
        }
        let (rest, csr) = X509CertificationRequest::from_der(der).map_err(|_| bad("another structure"))?;
        let info = &csr.certification_request_info;
        if !rest.is_empty() {
            return Err(bad("trailing bytes"));
        }
        if info.subject.iter().next().is_some() {
            return Err(bad("a subject"));
        }
        if info.iter_attributes().next().is_some() {
            return Err(bad("attributes"));
        }
        let key = info.subject_pki.subject_public_key.data.as_ref();
        // RFC 5480: id-ecPublicKey with secp256r1, an uncompressed point of 65 bytes.
        let p256 = info.subject_pki.algorithm.algorithm.to_id_string() == "1.2.840.10045.2.1"
            && info
                .subject_pki
                .algorithm
                .parameters
                .as_ref()
                .and_then(|p| p.as_oid().ok())
                .is_some_and(|o| o.to_id_string() == "1.2.840.10045.3.1.7")
            && key.len() == 65;
        if !p256 {
            return Err(bad("another kind of key"));
        }
        // RFC 5758, 3.2: what it says it is signed with must be what it is verified with.
        if csr.signature_algorithm.algorithm.to_id_string() != "1.2.840.10045.4.3.2" {
            return Err(bad("another signature algorithm"));
        }
        UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, key)
            .verify(info.raw, csr.signature_value.data.as_ref())
            .map_err(|_| bad("a signature that does not verify"))?;
        Ok(Self { spki: info.subject_pki.raw.to_vec() })
    }
    /// SHA-256 of the SubjectPublicKeyInfo (DER).
    pub fn spki_sha256(&self) -> [u8; 32] {
        Sha256::digest(&self.spki).into()
    }
    /// The SubjectPublicKeyInfo (DER).
    pub fn spki(&self) -> &[u8] {
        &self.spki
    }
}
