//! Wrapping ticket keys to replicas: ephemeral P-256 ECDH, HKDF-SHA-256, AES-256-GCM. Never in plain in log or snapshot.

use crate::keys::internal;
use ambit_model::{Code, Refusal};
use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, RandomizedNonceKey, UnboundKey};
use aws_lc_rs::agreement::{ECDH_P256, EphemeralPrivateKey, PrivateKey, UnparsedPublicKey, agree, agree_ephemeral};
use aws_lc_rs::encoding::{AsDer, EcPrivateKeyRfc5915Der};
use aws_lc_rs::hkdf::{HKDF_SHA256, Salt};
use aws_lc_rs::rand::SystemRandom;
use zeroize::Zeroizing;

const CONTEXT: &[u8] = b"ambit/wrap/v1";
const POINT: usize = 65;

/// A replica's key to which others wrap.
pub struct WrapKey {
    key: PrivateKey,
}

impl WrapKey {
    /// A fresh key.
    pub fn generate() -> Result<Self, Refusal> {
        Ok(Self { key: PrivateKey::generate(&ECDH_P256).map_err(|e| internal("a wrap key", e))? })
    }
    /// From its file (RFC 5915 DER).
    pub fn from_der(der: &[u8]) -> Result<Self, Refusal> {
        Ok(Self { key: PrivateKey::from_private_key_der(&ECDH_P256, der).map_err(|e| internal("a wrap key", e))? })
    }
    /// For its file.
    pub fn der(&self) -> Result<Zeroizing<Vec<u8>>, Refusal> {
        let der: EcPrivateKeyRfc5915Der<'_> = self.key.as_der().map_err(|e| internal("a wrap key", e))?;
        Ok(Zeroizing::new(der.as_ref().to_vec()))
    }
    /// The public point, 65 bytes.
    pub fn public(&self) -> Result<Vec<u8>, Refusal> {
        Ok(self.key.compute_public_key().map_err(|e| internal("a wrap key", e))?.as_ref().to_vec())
    }
    /// Opens what was wrapped to this key.
    pub fn unwrap(&self, wrapped: &[u8]) -> Result<Zeroizing<Vec<u8>>, Refusal> {
        let bad = || Refusal::new(Code::Internal, "a key wrapped to this replica", "another");
        let (point, sealed) = wrapped.split_at_checked(POINT).ok_or_else(bad)?;
        let key = agree(&self.key, UnparsedPublicKey::new(&ECDH_P256, point), bad(), |shared| derive(shared, point))?;
        open(&key, sealed).map_err(|_| bad())
    }
}

/// Wraps `secret` to the holder of `public`.
pub fn wrap(public: &[u8], secret: &[u8]) -> Result<Vec<u8>, Refusal> {
    let bad = || Refusal::new(Code::Internal, "a P-256 public point", "another");
    let mine = EphemeralPrivateKey::generate(&ECDH_P256, &SystemRandom::new()).map_err(|_| bad())?;
    let point = mine.compute_public_key().map_err(|_| bad())?.as_ref().to_vec();
    let key =
        agree_ephemeral(mine, UnparsedPublicKey::new(&ECDH_P256, public), bad(), |shared| derive(shared, &point))?;
    Ok([point, seal(&key, secret)?].concat())
}

fn derive(shared: &[u8], point: &[u8]) -> Result<Zeroizing<[u8; 32]>, Refusal> {
    let mut key = Zeroizing::new([0u8; 32]);
    Salt::new(HKDF_SHA256, point)
        .extract(shared)
        .expand(&[CONTEXT], &AES_256_GCM)
        .and_then(|okm| okm_fill(okm, key.as_mut()))
        .map_err(|e| internal("a derived key", e))?;
    Ok(key)
}

fn okm_fill(
    okm: aws_lc_rs::hkdf::Okm<'_, &'static aws_lc_rs::aead::Algorithm>,
    out: &mut [u8],
) -> Result<(), aws_lc_rs::error::Unspecified> {
    okm.fill(out)
}

/// AES-256-GCM under a random nonce, which goes in front.
pub fn seal(key: &[u8; 32], plain: &[u8]) -> Result<Vec<u8>, Refusal> {
    let key = RandomizedNonceKey::new(&AES_256_GCM, key).map_err(|e| internal("an AES key", e))?;
    let mut body = plain.to_vec();
    let nonce =
        key.seal_in_place_append_tag(Aad::from(CONTEXT), &mut body).map_err(|e| internal("a sealed text", e))?;
    Ok([nonce.as_ref().as_slice(), &body].concat())
}

/// Opens what [`seal`] made; one error for every reason.
pub fn open(key: &[u8; 32], sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, Refusal> {
    let bad = || Refusal::new(Code::TicketInvalid, "a text sealed by this cell", "another");
    let (nonce, body) = sealed.split_at_checked(NONCE_LEN).ok_or_else(bad)?;
    let key = LessSafeKey::new(UnboundKey::new(&AES_256_GCM, key).map_err(|_| bad())?);
    let nonce = Nonce::try_assume_unique_for_key(nonce).map_err(|_| bad())?;
    let mut body = Zeroizing::new(body.to_vec());
    let len = key.open_in_place(nonce, Aad::from(CONTEXT), &mut body).map_err(|_| bad())?.len();
    body.truncate(len);
    Ok(body)
}
