//! The certificate request of a node: PKCS#10 (RFC 2986) with a P-256 key that signed it. Nothing else of it is used.

use ambit_model::{Code, Refusal};
use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey};
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::oid_registry::{OID_EC_P256, OID_KEY_TYPE_EC_PUBLIC_KEY, OID_SIG_ECDSA_WITH_SHA256};
use x509_parser::prelude::FromDer;

/// The SubjectPublicKeyInfo (DER) of the request, after its own signature (proof of possession) verified.
pub fn p256_spki(csr: &[u8]) -> Result<Vec<u8>, Refusal> {
    let bad = |found: &str| Refusal::new(Code::CsrMalformed, "a PKCS#10 request signed by its P-256 key", found);
    let (rest, request) = X509CertificationRequest::from_der(csr).map_err(|_| bad("no PKCS#10 DER"))?;
    if !rest.is_empty() {
        return Err(bad("trailing bytes"));
    }
    let info = &request.certification_request_info;
    let spki = &info.subject_pki;
    let curve = spki.algorithm.parameters.as_ref().and_then(|p| p.as_oid().ok());
    if spki.algorithm.algorithm != OID_KEY_TYPE_EC_PUBLIC_KEY || curve != Some(OID_EC_P256) {
        return Err(bad("another kind of key"));
    }
    if request.signature_algorithm.algorithm != OID_SIG_ECDSA_WITH_SHA256 {
        return Err(bad("another signature algorithm"));
    }
    UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, spki.subject_public_key.data.as_ref())
        .verify(info.raw, request.signature_value.data.as_ref())
        .map_err(|_| bad("a signature that does not verify"))?;
    Ok(spki.raw.to_vec())
}
