//! P-256 keys of SVIDs and authorities.

use ambit_model::{Code, Refusal};
use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256, PublicKeyData};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use sha2::{Digest, Sha256};

pub(crate) fn internal(expected: &str, e: impl std::fmt::Display) -> Refusal {
    Refusal::new(Code::Internal, expected, e.to_string())
}

/// SHA-256 of a root certificate (DER): what operators compare out of band.
pub fn fingerprint(root_der: &[u8]) -> [u8; 32] {
    Sha256::digest(root_der).into()
}

/// A P-256 key. Neither shown nor cloned; its bytes leave only by [`SvidKey::pkcs8`].
pub struct SvidKey {
    pub(crate) pair: KeyPair,
}

impl SvidKey {
    /// A fresh key.
    pub fn generate() -> Result<Self, Refusal> {
        let pair = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(|e| internal("a key", e))?;
        Ok(Self { pair })
    }
    /// The key in PKCS#8 DER.
    pub fn from_pkcs8(der: &[u8]) -> Result<Self, Refusal> {
        let pair =
            KeyPair::try_from(der).map_err(|e| Refusal::new(Code::BadRequest, "a PKCS#8 P-256 key", e.to_string()))?;
        Ok(Self { pair })
    }
    /// From PEM.
    pub fn from_pem(pem: &str) -> Result<Self, Refusal> {
        let pair = KeyPair::from_pem(pem)
            .map_err(|e| Refusal::new(Code::BadRequest, "a PKCS#8 P-256 key in PEM", e.to_string()))?;
        Ok(Self { pair })
    }
    /// PKCS#8 DER. The caller keeps it in a file of mode 0600 or hands it to the workload it belongs to.
    pub fn pkcs8(&self) -> zeroize::Zeroizing<Vec<u8>> {
        zeroize::Zeroizing::new(self.pair.serialize_der())
    }
    /// PKCS#8 PEM, for files.
    pub fn pem(&self) -> zeroize::Zeroizing<String> {
        zeroize::Zeroizing::new(self.pair.serialize_pem())
    }
    /// SHA-256 of the SubjectPublicKeyInfo (DER).
    pub fn spki_sha256(&self) -> [u8; 32] {
        Sha256::digest(self.pair.subject_public_key_info()).into()
    }
    /// A PKCS#10 request with this key and nothing else.
    pub fn csr(&self) -> Result<Vec<u8>, Refusal> {
        request(&self.pair)
    }
    pub(crate) fn private_der(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.pair.serialize_der()))
    }
}

/// A PKCS#10 request with this key and nothing else.
pub(crate) fn request(key: &impl rcgen::SigningKey) -> Result<Vec<u8>, Refusal> {
    let mut params = rcgen::CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    let csr = params.serialize_request(key).map_err(|e| internal("a CSR", e))?;
    Ok(csr.der().to_vec())
}

/// Certificates of a PEM file, in order.
pub fn certificates_from_pem(pem: &str) -> Result<Vec<CertificateDer<'static>>, Refusal> {
    use rustls_pki_types::pem::PemObject;
    let certs: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
    match certs {
        Ok(certs) if !certs.is_empty() => Ok(certs),
        Ok(_) => Err(Refusal::new(Code::BadRequest, "a PEM file with certificates", "none")),
        Err(e) => Err(Refusal::new(Code::BadRequest, "a PEM file with certificates", format!("{e:?}"))),
    }
}

/// The request of a PEM file that holds one, DER.
pub fn csr_from_pem(pem: &str) -> Result<Vec<u8>, Refusal> {
    use rustls_pki_types::CertificateSigningRequestDer;
    use rustls_pki_types::pem::PemObject;
    let read = CertificateSigningRequestDer::from_pem_slice(pem.as_bytes());
    let bad = |e| Refusal::new(Code::CsrMalformed, "a PKCS#10 request in PEM", format!("{e:?}"));
    Ok(read.map_err(bad)?.to_vec())
}

/// A request as PEM text.
pub fn csr_to_pem(der: &[u8]) -> String {
    pem("CERTIFICATE REQUEST", der)
}

/// Certificates as PEM text.
pub fn certificates_to_pem<'a>(chain: impl IntoIterator<Item = &'a [u8]>) -> String {
    chain.into_iter().map(|der| pem("CERTIFICATE", der)).collect()
}

/// RFC 7468.
fn pem(what: &str, der: &[u8]) -> String {
    use base64::Engine as _;
    let mut out = format!("-----BEGIN {what}-----\n");
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    let mut rest = text.as_str();
    while !rest.is_empty() {
        let (line, tail) = rest.split_at(rest.len().min(64));
        out.push_str(line);
        out.push('\n');
        rest = tail;
    }
    out.push_str(&format!("-----END {what}-----\n"));
    out
}
