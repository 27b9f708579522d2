//! Keys that sign somewhere else, such as inside a TPM: this process has a handle and never the key.

use crate::keys::request;
use ambit_model::Refusal;
use rcgen::{PKCS_ECDSA_P256_SHA256, PublicKeyData, SigningKey};
use rustls::pki_types::CertificateDer;
use rustls::sign::{CertifiedKey, Signer};
use rustls::{SignatureAlgorithm, SignatureScheme};
use sha2::{Digest, Sha256};
use std::sync::{Arc, OnceLock};

/// A P-256 key that is not here.
pub trait RemoteKey: std::fmt::Debug + Send + Sync {
    /// Its point, uncompressed (SEC 1, 2.3.3).
    fn point(&self) -> &[u8; 65];
    /// ECDSA signature (DER, RFC 3279 2.2.3) over a SHA-256 digest. It may block its thread for as long as the key's
    /// holder takes.
    fn sign(&self, digest: [u8; 32]) -> Result<Vec<u8>, Refusal>;
}

/// A PKCS#10 request with this key and nothing else. Blocks as the key does.
pub fn csr(key: &dyn RemoteKey) -> Result<Vec<u8>, Refusal> {
    let requesting = Requesting { key, refused: OnceLock::new() };
    let made = request(&requesting);
    // rcgen's error cannot say why.
    match requesting.refused.into_inner() {
        Some(refusal) => Err(refusal),
        None => made,
    }
}

/// Pairs a chain (leaf first) with its key for rustls. A handshake blocks as the key does, and fails if it cannot sign.
pub fn certified(chain: Vec<CertificateDer<'static>>, key: Arc<dyn RemoteKey>) -> Arc<CertifiedKey> {
    Arc::new(CertifiedKey::new(chain, Arc::new(Handle(key))))
}

struct Requesting<'a> {
    key: &'a dyn RemoteKey,
    refused: OnceLock<Refusal>,
}

impl PublicKeyData for Requesting<'_> {
    fn der_bytes(&self) -> &[u8] {
        self.key.point()
    }
    fn algorithm(&self) -> &'static rcgen::SignatureAlgorithm {
        &PKCS_ECDSA_P256_SHA256
    }
}

impl SigningKey for Requesting<'_> {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        self.key.sign(Sha256::digest(message).into()).map_err(|refusal| {
            self.refused.get_or_init(|| refusal);
            rcgen::Error::RemoteKeyError
        })
    }
}

#[derive(Clone, Debug)]
struct Handle(Arc<dyn RemoteKey>);

impl rustls::sign::SigningKey for Handle {
    fn choose_scheme(&self, offered: &[SignatureScheme]) -> Option<Box<dyn Signer>> {
        offered.contains(&SignatureScheme::ECDSA_NISTP256_SHA256).then(|| Box::new(self.clone()) as Box<dyn Signer>)
    }
    fn algorithm(&self) -> SignatureAlgorithm {
        SignatureAlgorithm::ECDSA
    }
}

impl Signer for Handle {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rustls::Error> {
        self.0.sign(Sha256::digest(message).into()).map_err(|refusal| rustls::Error::General(refusal.to_string()))
    }
    fn scheme(&self) -> SignatureScheme {
        SignatureScheme::ECDSA_NISTP256_SHA256
    }
}
