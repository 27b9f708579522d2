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

/// A request taken apart: what is signed, the key in it, and the signature.
struct Request<'a> {
    info: &'a [u8],
    spki: &'a [u8],
    point: &'a [u8],
    signature: &'a [u8],
}

/// The CertificationRequestInfo of such a request up to its key: version 0, no subject (RFC 2986 4.1).
const INFO_HEAD: &[u8] = &[0x30, 0x62, 0x02, 0x01, 0x00, 0x30, 0x00];
const INFO_LEN: usize = 100;
/// No attributes.
const INFO_TAIL: &[u8] = &[0xa0, 0x00];
/// A P-256 key up to its point (RFC 5480 2).
const SPKI_HEAD: &[u8] = &[
    0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce,
    0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00,
];
/// ecdsa-with-SHA256, then the BIT STRING.
const SIGNATURE_HEAD: &[u8] = &[0x30, 0x0a, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x02, 0x03];

/// The one form that DER has for a request with a P-256 key and nothing else (X.690 11): whatever is read in another way
/// by somebody else is not read here. None for any other bytes.
fn plain(der: &[u8]) -> Option<Request<'_>> {
    let (length, rest) = der.strip_prefix(&[0x30, 0x81])?.split_first()?;
    if usize::from(*length) != rest.len() || *length < 0x80 {
        return None;
    }
    let (info, rest) = rest.split_at_checked(INFO_LEN)?;
    let spki = info.strip_prefix(INFO_HEAD)?.strip_suffix(INFO_TAIL)?;
    let point = spki.strip_prefix(SPKI_HEAD)?;
    let (length, bits) = rest.strip_prefix(SIGNATURE_HEAD)?.split_first()?;
    let signature = bits.strip_prefix(&[0])?;
    let whole = usize::from(*length) == bits.len() && *length < 0x80;
    whole.then_some(Request { info, spki, point, signature })
}

fn bad(found: &str) -> Refusal {
    Refusal::new(Code::CsrMalformed, "a PKCS#10 request with a P-256 key and nothing else", found)
}

/// What is wrong with a request of another form, as far as a general parser can tell.
fn fault(der: &[u8]) -> Refusal {
    let Ok((rest, csr)) = X509CertificationRequest::from_der(der) else { return bad("another structure") };
    let info = &csr.certification_request_info;
    // RFC 5480: id-ecPublicKey with secp256r1. RFC 5758, 3.2: what it says it is signed with is what it is verified with.
    let key = &info.subject_pki.algorithm;
    let curve = key.parameters.as_ref().and_then(|p| p.as_oid().ok()).map(|oid| oid.to_id_string());
    let p256 = key.algorithm.to_id_string() == "1.2.840.10045.2.1"
        && curve.as_deref() == Some("1.2.840.10045.3.1.7")
        && info.subject_pki.subject_public_key.data.len() == 65;
    bad(match () {
        () if !rest.is_empty() => "trailing bytes",
        () if info.subject.iter().next().is_some() => "a subject",
        () if info.iter_attributes().next().is_some() => "attributes",
        () if !p256 => "another kind of key",
        () if csr.signature_algorithm.algorithm.to_id_string() != "1.2.840.10045.4.3.2" => {
            "another signature algorithm"
        }
        () => "another encoding",
    })
}

impl Csr {
    /// Parses and proves. Errors: `csr_malformed`.
    pub fn parse(der: &[u8]) -> Result<Self, Refusal> {
        if der.len() > CSR_MAX_BYTES {
            return Err(bad("more than 1024 bytes"));
        }
        let request = plain(der).ok_or_else(|| fault(der))?;
        UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, request.point)
            .verify(request.info, request.signature)
            .map_err(|_| bad("a signature that does not verify"))?;
        Ok(Self { spki: request.spki.to_vec() })
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::SvidKey;

    #[test]
    fn there_is_one_form_and_no_changed_byte_passes() {
        for _ in 0..20 {
            let key = SvidKey::generate().unwrap();
            assert_eq!(Csr::parse(&key.csr().unwrap()).unwrap().spki_sha256(), key.spki_sha256());
        }
        let der = SvidKey::generate().unwrap().csr().unwrap();
        for at in 0..der.len() {
            for bit in 0..8 {
                let mut changed = der.clone();
                changed[at] ^= 1 << bit;
                let refused = Csr::parse(&changed).is_err_and(|r| r.code == Code::CsrMalformed);
                assert!(refused, "byte {at} of {}, bit {bit}: {}", der.len(), hex::encode(&changed));
            }
        }
        for length in 0..der.len() {
            assert!(Csr::parse(&der[..length]).is_err(), "{length}");
        }
        assert!(Csr::parse(&[der.as_slice(), &[0]].concat()).is_err());
    }
}
