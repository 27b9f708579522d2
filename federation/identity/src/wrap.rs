//! Wrapping keys to replicas: ephemeral P-256 ECDH, HKDF-SHA-256, AES-256-GCM. Never in plain in log or snapshot.
//!
//! Who wraps does not know whether the private half of the replica's key is in a file ([`WrapKey`]) or in a TPM, which does
//! the agreement ([`agreed_with`], [`unwrap_agreed`]).

use crate::keys::internal;
use ambit_model::{Code, Refusal};
use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, RandomizedNonceKey, UnboundKey};
use aws_lc_rs::agreement::{ECDH_P256, EphemeralPrivateKey, PrivateKey, UnparsedPublicKey, agree, agree_ephemeral};
use aws_lc_rs::encoding::{AsDer, EcPrivateKeyRfc5915Der};
use aws_lc_rs::hkdf::{HKDF_SHA256, Salt};
use aws_lc_rs::rand::SystemRandom;
use zeroize::Zeroizing;

/// What a sealed text is for: one that was sealed for another use opens no more than a changed one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// A key for one replica, under what both ends agreed on.
    Key,
    /// The ticket of a node that enrols.
    Ticket,
    /// The session of a cell that registers as a peer.
    Peering,
    /// The private key of a JWT authority, for one replica.
    JwtAuthority,
    /// A recovery share of a root's key, for its holder.
    RootShare,
}

impl Purpose {
    fn context(self) -> &'static [u8] {
        match self {
            Purpose::Key => b"ambit/wrap/v1",
            Purpose::Ticket => b"ambit/ticket/v1",
            Purpose::Peering => b"ambit/peering/v1",
            Purpose::JwtAuthority => b"ambit/jwt-authority/v1",
            Purpose::RootShare => b"ambit/root-share/v1",
        }
    }
}

/// Bytes of an uncompressed P-256 point.
pub const POINT: usize = 65;

/// A key to which others wrap, in memory.
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
    /// Opens what [`wrap`] wrapped to this key.
    pub fn unwrap(&self, wrapped: &[u8]) -> Result<Zeroizing<Vec<u8>>, Refusal> {
        self.unwrap_for(Purpose::Key, wrapped)
    }
    /// Opens what [`wrap_for`] wrapped to this key for this purpose.
    pub fn unwrap_for(&self, purpose: Purpose, wrapped: &[u8]) -> Result<Zeroizing<Vec<u8>>, Refusal> {
        let point = agreed_with(wrapped)?;
        let agreed = agree(&self.key, UnparsedPublicKey::new(&ECDH_P256, point), other_key(), |shared| {
            Ok(Zeroizing::new(shared.to_vec()))
        })?;
        unwrap_agreed(purpose, wrapped, &agreed)
    }
}

fn other_key() -> Refusal {
    Refusal::new(Code::Internal, "a key wrapped to this replica", "another")
}

/// The point to agree with, for whoever does that elsewhere.
pub fn agreed_with(wrapped: &[u8]) -> Result<&[u8; POINT], Refusal> {
    wrapped.first_chunk().ok_or_else(other_key)
}

/// Opens what [`wrap_for`] wrapped, by the x coordinate (32 bytes) that the holder of the private half and
/// [`agreed_with`] came to.
pub fn unwrap_agreed(purpose: Purpose, wrapped: &[u8], agreed: &[u8]) -> Result<Zeroizing<Vec<u8>>, Refusal> {
    let (point, sealed) = wrapped.split_first_chunk::<POINT>().ok_or_else(other_key)?;
    let key = derive(agreed, point)?;
    open(&key, purpose, sealed).map_err(|_| other_key())
}

/// Wraps a ticket key to the holder of `public`.
pub fn wrap(public: &[u8], secret: &[u8]) -> Result<Vec<u8>, Refusal> {
    wrap_for(Purpose::Key, public, secret)
}

/// Wraps `secret` to the holder of `public`; it opens for this purpose only.
pub fn wrap_for(purpose: Purpose, public: &[u8], secret: &[u8]) -> Result<Vec<u8>, Refusal> {
    let bad = || Refusal::new(Code::Internal, "a P-256 public point", "another");
    let mine = EphemeralPrivateKey::generate(&ECDH_P256, &SystemRandom::new()).map_err(|_| bad())?;
    let point = mine.compute_public_key().map_err(|_| bad())?.as_ref().to_vec();
    let key =
        agree_ephemeral(mine, UnparsedPublicKey::new(&ECDH_P256, public), bad(), |shared| derive(shared, &point))?;
    Ok([point, seal(&key, purpose, secret)?].concat())
}

fn derive(shared: &[u8], point: &[u8]) -> Result<Zeroizing<[u8; 32]>, Refusal> {
    let mut key = Zeroizing::new([0u8; 32]);
    Salt::new(HKDF_SHA256, point)
        .extract(shared)
        .expand(&[Purpose::Key.context()], &AES_256_GCM)
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
pub fn seal(key: &[u8; 32], purpose: Purpose, plain: &[u8]) -> Result<Vec<u8>, Refusal> {
    let key = RandomizedNonceKey::new(&AES_256_GCM, key).map_err(|e| internal("an AES key", e))?;
    let mut body = plain.to_vec();
    let nonce = key
        .seal_in_place_append_tag(Aad::from(purpose.context()), &mut body)
        .map_err(|e| internal("a sealed text", e))?;
    Ok([nonce.as_ref().as_slice(), &body].concat())
}

/// Opens what [`seal`] made for this purpose; one error for every reason.
pub fn open(key: &[u8; 32], purpose: Purpose, sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, Refusal> {
    let bad = || Refusal::new(Code::TicketInvalid, "a text sealed by this cell", "another");
    let (nonce, body) = sealed.split_at_checked(NONCE_LEN).ok_or_else(bad)?;
    let key = LessSafeKey::new(UnboundKey::new(&AES_256_GCM, key).map_err(|_| bad())?);
    let nonce = Nonce::try_assume_unique_for_key(nonce).map_err(|_| bad())?;
    let mut body = Zeroizing::new(body.to_vec());
    let len = key.open_in_place(nonce, Aad::from(purpose.context()), &mut body).map_err(|_| bad())?.len();
    body.truncate(len);
    Ok(body)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Prints each text that opens and must not as `wrong: WHAT`: `cargo xtask mutants` reads that.
    #[test]
    fn only_what_this_key_sealed_for_this_use_opens() {
        let (key, text) = ([1; 32], b"what a ticket says".as_slice());
        let sealed = seal(&key, Purpose::Ticket, text).unwrap();
        assert_eq!(open(&key, Purpose::Ticket, &sealed).unwrap().as_slice(), text);
        let changed = |at: usize| {
            let mut changed = sealed.clone();
            changed[at] ^= 1;
            changed
        };
        let rows: [(&str, [u8; 32], Purpose, Vec<u8>); 8] = [
            ("nonce of a sealed text changed", key, Purpose::Ticket, changed(0)),
            ("sealed text changed", key, Purpose::Ticket, changed(NONCE_LEN)),
            ("tag of a sealed text changed", key, Purpose::Ticket, changed(sealed.len() - 1)),
            ("sealed text cut", key, Purpose::Ticket, sealed[..sealed.len() - 1].to_vec()),
            ("sealed text of nothing", key, Purpose::Ticket, Vec::new()),
            ("sealed text of another key", [2; 32], Purpose::Ticket, sealed.clone()),
            ("peer's session shown as a ticket", key, Purpose::Ticket, seal(&key, Purpose::Peering, text).unwrap()),
            ("ticket shown as a peer's session", key, Purpose::Peering, sealed.clone()),
        ];
        let wrong: Vec<String> = rows
            .into_iter()
            .filter_map(|(what, key, purpose, sealed)| {
                let opened = open(&key, purpose, &sealed);
                let refused = opened.as_ref().is_err_and(|r| r.code == Code::TicketInvalid);
                (!refused).then(|| format!("wrong: {what}: {:?}", opened.map(|text| text.len())))
            })
            .collect();
        assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
    }

    #[test]
    fn two_seals_of_one_text_differ() {
        let [a, b] = [0, 1].map(|_| seal(&[1; 32], Purpose::Ticket, b"text").unwrap());
        assert!(a != b && a[..NONCE_LEN] != b[..NONCE_LEN]);
    }
}
