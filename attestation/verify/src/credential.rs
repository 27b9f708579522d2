//! TPM2_MakeCredential in software (TPM 2.0 Part 1, section 24; KDFa and KDFe: Part 1, 11.4.10).
//!
//! Only the TPM that holds the EK's private part can open it, and it opens it only for the object with that very name.

use crate::hash::HashAlg;
use crate::public::{Curve, EndorsementKey, Key};
use crate::wire::put_tpm2b;
use ambit_model::{Code, Refusal};
use aws_lc_rs::agreement::{self, PrivateKey, UnparsedPublicKey};
use aws_lc_rs::cipher::{AES_128, AES_256, EncryptingKey, EncryptionContext, UnboundCipherKey};
use aws_lc_rs::iv::FixedLength;
use aws_lc_rs::rsa::{
    OAEP_SHA256_MGF1SHA256, OAEP_SHA384_MGF1SHA384, OAEP_SHA512_MGF1SHA512, OaepPublicEncryptingKey,
    PublicEncryptingKey,
};
use zeroize::Zeroizing;

const IDENTITY: &[u8] = b"IDENTITY\0";
const STORAGE: &[u8] = b"STORAGE\0";
const INTEGRITY: &[u8] = b"INTEGRITY\0";

pub(crate) struct Credential {
    /// TPM2B_ID_OBJECT.
    pub(crate) id_object: Vec<u8>,
    /// TPM2B_ENCRYPTED_SECRET.
    pub(crate) encrypted_secret: Vec<u8>,
}

/// A credential for `secret`, for the TPM of `ek` and its object named `name`.
pub(crate) fn make(ek: &EndorsementKey, name: &[u8], secret: &[u8], entropy: &[u8; 64]) -> Result<Credential, Refusal> {
    protect(ek, name, secret, entropy)
        .ok_or_else(|| Refusal::new(Code::EkMalformed, "an EK that a credential can be made for", "an unusable key"))
}

fn protect(ek: &EndorsementKey, name: &[u8], secret: &[u8], entropy: &[u8; 64]) -> Option<Credential> {
    let hash = ek.public().name_alg();
    let (seed, encrypted) = match ek.public().key() {
        Key::Rsa { .. } => wrap_rsa(ek, hash, entropy)?,
        Key::Ec { curve, x, y } => wrap_ec(*curve, hash, x, y)?,
    };
    let symmetric = kdf_a(hash, &seed, STORAGE, name, ek.symmetric_bytes())?;
    let mut identity = Zeroizing::new(Vec::new());
    put_tpm2b(&mut identity, secret)?;
    aes_cfb(&symmetric, &mut identity)?;
    let integrity_key = kdf_a(hash, &seed, INTEGRITY, &[], hash.size())?;
    let integrity = hash.hmac(&integrity_key, &[&identity, name])?;
    let mut inner = Vec::new();
    put_tpm2b(&mut inner, &integrity)?;
    inner.extend_from_slice(&identity);
    let mut id_object = Vec::new();
    put_tpm2b(&mut id_object, &inner)?;
    let mut encrypted_secret = Vec::new();
    put_tpm2b(&mut encrypted_secret, &encrypted)?;
    Some(Credential { id_object, encrypted_secret })
}

/// RSA: the seed is as long as the name algorithm's digest and travels under OAEP with that hash (Part 1, B.10.4).
fn wrap_rsa(ek: &EndorsementKey, hash: HashAlg, entropy: &[u8; 64]) -> Option<(Zeroizing<Vec<u8>>, Vec<u8>)> {
    let seed = Zeroizing::new(entropy.get(..hash.size())?.to_vec());
    let algorithm = match hash {
        HashAlg::Sha1 => return None,
        HashAlg::Sha256 => &OAEP_SHA256_MGF1SHA256,
        HashAlg::Sha384 => &OAEP_SHA384_MGF1SHA384,
        HashAlg::Sha512 => &OAEP_SHA512_MGF1SHA512,
    };
    let key = PublicEncryptingKey::from_der(&ek.public().spki_der()).ok()?;
    let key = OaepPublicEncryptingKey::new(key).ok()?;
    let mut out = vec![0; key.ciphertext_size()];
    let n = key.encrypt(algorithm, &seed, &mut out, Some(IDENTITY)).ok()?.len();
    out.truncate(n);
    Some((seed, out))
}

/// ECC: an ephemeral key agrees with the EK; the seed is KDFe over the shared x coordinate (Part 1, C.6.3 and C.6.1).
fn wrap_ec(curve: Curve, hash: HashAlg, x: &[u8], y: &[u8]) -> Option<(Zeroizing<Vec<u8>>, Vec<u8>)> {
    let algorithm = match curve {
        Curve::P256 => &agreement::ECDH_P256,
        Curve::P384 => &agreement::ECDH_P384,
        Curve::Other(_) => return None,
    };
    let ephemeral = PrivateKey::generate(algorithm).ok()?;
    let public = ephemeral.compute_public_key().ok()?;
    // Uncompressed point: 4, x, y.
    let n = curve.coordinate_size();
    let (own_x, own_y) = public.as_ref().get(1..)?.split_at_checked(n)?;
    let peer = UnparsedPublicKey::new(algorithm, [&[4u8], x, y].concat());
    let seed = agreement::agree(&ephemeral, &peer, (), |z| {
        // KDFe: H(counter || Z || use || PartyU || PartyV); one round gives all of a seed as long as the digest.
        Ok(Zeroizing::new(hash.digest(&[&1u32.to_be_bytes(), z, IDENTITY, own_x, x])))
    })
    .ok()?;
    let mut point = Vec::new();
    put_tpm2b(&mut point, own_x)?;
    put_tpm2b(&mut point, own_y)?;
    Some((seed, point))
}

/// KDFa: counter mode of SP 800-108 with HMAC. `label` carries its terminating zero.
fn kdf_a(hash: HashAlg, key: &[u8], label: &[u8], context: &[u8], bytes: usize) -> Option<Zeroizing<Vec<u8>>> {
    let bits = u32::try_from(bytes.checked_mul(8)?).ok()?.to_be_bytes();
    let mut out = Zeroizing::new(Vec::with_capacity(bytes));
    let mut counter = 1u32;
    while out.len() < bytes {
        out.extend(hash.hmac(key, &[&counter.to_be_bytes(), label, context, &bits])?);
        counter = counter.checked_add(1)?;
    }
    out.truncate(bytes);
    Some(out)
}

/// AES in CFB-128 with a zero IV: the key is fresh for each credential (Part 1, 24.4).
fn aes_cfb(key: &[u8], bytes: &mut [u8]) -> Option<()> {
    let algorithm = if key.len() == 32 { &AES_256 } else { &AES_128 };
    let key = EncryptingKey::cfb128(UnboundCipherKey::new(algorithm, key).ok()?).ok()?;
    let zero = EncryptionContext::Iv128(FixedLength::from([0u8; 16]));
    key.less_safe_encrypt(bytes, zero).ok()?;
    Some(())
}
