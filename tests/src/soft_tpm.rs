//! A TPM in software, as far as an enrolment and its rounds need one: an EK that opens credentials, an AK that quotes.
//! Written from the TPM 2.0 specification, not from the verifier: what it makes, real TPMs make.

pub mod maker;

use ambit_lab::tpm;
use ambit_verify::Public;
use anyhow::{Context, Result, ensure};
use aws_lc_rs::agreement::{self, ECDH_P256, ECDH_P384, UnparsedPublicKey};
use aws_lc_rs::cipher::{AES_128, AES_256, DecryptingKey, DecryptionContext, UnboundCipherKey};
use aws_lc_rs::encoding::{AsDer, PublicKeyX509Der};
use aws_lc_rs::iv::FixedLength;
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::{KeySize, OAEP_SHA256_MGF1SHA256, OaepPrivateDecryptingKey, PrivateDecryptingKey};
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _};
use aws_lc_rs::{digest, hmac};
use maker::Maker;
use std::sync::LazyLock;
use std::time::Instant;

/// PolicySecret(TPM_RH_ENDORSEMENT), SHA-256: the policy of the EK templates L-1 and L-2 (TCG EK Credential Profile).
const POLICY_SHA256: &str = "837197674484b3f81a90cc8d46a5d724fd52d76e06520b64f2a1da1b331469aa";
/// The policy of the template H-3 (P-384): PolicyOR, SHA-384.
const POLICY_SHA384: &str =
    "b26e7d28d11a50bc53d882bcf5fd3a1a074148bb35d3b4e4cb1c0ad9bde419cacb47ba09699646150f9fc000f3f80e12";
/// fixedTPM, fixedParent, sensitiveDataOrigin, userWithAuth, restricted, sign.
const AK_ATTRIBUTES: u32 = 0x0005_0072;
/// TPM_RH_ENDORSEMENT.
const HIERARCHY: [u8; 4] = [0x40, 0, 0, 0x0b];
/// PCRs 0-10 and 14.
const MASK: u32 = 0x47ff;

/// The quoted PCRs of the golden boot, SHA-256.
pub static PCRS: LazyLock<Vec<(u32, Vec<u8>)>> = LazyLock::new(|| {
    let all = (0u32..).zip(tpm::golden_pcrs(ambit_lab::tpm_wire::Bank::Sha256));
    all.filter(|(n, _)| MASK >> n & 1 == 1).collect()
});
static SELECTED: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let values: Vec<u8> = PCRS.iter().flat_map(|(_, value)| value.clone()).collect();
    sha256(&[&values])
});
static STARTED: LazyLock<Instant> = LazyLock::new(Instant::now);

/// The kind of an EK.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EkKind {
    Rsa2048,
    P256,
    P384,
}

enum EkKey {
    Rsa(Box<OaepPrivateDecryptingKey>),
    Ec(agreement::PrivateKey, Vec<u8>),
}

/// EK, AK, and the EK's certificate.
pub struct SoftTpm {
    kind: EkKind,
    ek: EkKey,
    ak: EcdsaKeyPair,
    pub ek_public: Vec<u8>,
    pub ak_public: Vec<u8>,
    pub ek_certificate: Vec<u8>,
    pub node: [u8; 32],
    pub ak_name: Vec<u8>,
    qualified_signer: Vec<u8>,
}

/// A quote, as it travels.
pub struct Quoted {
    pub attest: Vec<u8>,
    pub signature: Vec<u8>,
}

impl SoftTpm {
    pub fn new(kind: EkKind, maker: &Maker) -> Result<SoftTpm> {
        let (ek, ek_public) = match kind {
            EkKind::Rsa2048 => rsa_ek()?,
            EkKind::P256 | EkKind::P384 => ec_ek(kind)?,
        };
        let document = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &SystemRandom::new())?;
        let ak = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, document.as_ref())?;
        let point = ak.public_key().as_ref().get(1..).context("a point")?;
        let (x, y) = point.split_at(32);
        let scheme = [0, 0, 0x00, 0x10, 0x00, 0x18, 0x00, 0x0b, 0x00, 0x03, 0x00, 0x10];
        let ak_public =
            [&[0x00, 0x23, 0x00, 0x0b][..], &AK_ATTRIBUTES.to_be_bytes(), &scheme, &tpm2b(x), &tpm2b(y)].concat();
        let spki = ambit_verify::parsers::public(&ek_public)?.spki_der();
        let node = digest32(&[&spki]);
        let ek_certificate = maker.certify(&spki)?;
        let ek_name = Public::name_of(&ek_public)?;
        let ak_name = Public::name_of(&ak_public)?;
        // QN of a primary: H(handle of its hierarchy || name); of its child: H(QN || name). Part 1, section 16.
        let primary = match kind {
            EkKind::Rsa2048 | EkKind::P256 => [&[0x00, 0x0b][..], &sha256(&[&HIERARCHY, &ek_name])].concat(),
            EkKind::P384 => [&[0x00, 0x0c][..], hash(&digest::SHA384, &[&HIERARCHY, &ek_name]).as_slice()].concat(),
        };
        let qualified_signer = [&[0x00, 0x0b][..], &sha256(&[&primary, &ak_name])].concat();
        Ok(SoftTpm { kind, ek, ak, ek_public, ak_public, ek_certificate, node, ak_name, qualified_signer })
    }

    /// TPM2_Quote over [`PCRS`].
    pub fn quote(&self, extra_data: &[u8]) -> Result<Quoted> {
        let clock_ms = u64::try_from(STARTED.elapsed().as_millis())? + 1_000;
        let mut attest = vec![0xff, 0x54, 0x43, 0x47, 0x80, 0x18];
        attest.extend(tpm2b(&self.qualified_signer));
        attest.extend(tpm2b(extra_data));
        attest.extend(clock_ms.to_be_bytes());
        attest.extend([0, 0, 0, 5, 0, 0, 0, 2, 1]);
        attest.extend(0x2019_0802_0016_3636u64.to_be_bytes());
        attest.extend([0, 0, 0, 1, 0x00, 0x0b, 3, 0xff, 0x47, 0x00]);
        attest.extend(tpm2b(&SELECTED));
        let signed = self.ak.sign(&SystemRandom::new(), &attest)?;
        let (r, s) = signed.as_ref().split_at(32);
        let signature = [&[0x00, 0x18, 0x00, 0x0b][..], &tpm2b(r), &tpm2b(s)].concat();
        Ok(Quoted { attest, signature })
    }

    /// TPM2_ActivateCredential.
    pub fn activate(&self, credential_blob: &[u8], encrypted_secret: &[u8]) -> Result<Vec<u8>> {
        let seed = self.seed(unwrap2b(encrypted_secret)?.0)?;
        let inner = unwrap2b(credential_blob)?.0;
        let (integrity, identity) = unwrap2b(inner)?;
        let hmac_key = self.kdf_a(&seed, b"INTEGRITY\0", &[], self.digest_size());
        let own = hmac::sign(&hmac::Key::new(self.hmac(), &hmac_key), &[identity, &self.ak_name].concat());
        ensure!(own.as_ref() == integrity, "the credential is not for this AK");
        let (algorithm, bytes) = if self.kind == EkKind::P384 { (&AES_256, 32) } else { (&AES_128, 16) };
        let key = self.kdf_a(&seed, b"STORAGE\0", &self.ak_name, bytes);
        let key = DecryptingKey::cfb128(UnboundCipherKey::new(algorithm, &key)?)?;
        let mut plain = identity.to_vec();
        key.decrypt(&mut plain, DecryptionContext::Iv128(FixedLength::from([0u8; 16])))?;
        Ok(unwrap2b(&plain)?.0.to_vec())
    }

    fn seed(&self, encrypted: &[u8]) -> Result<Vec<u8>> {
        match &self.ek {
            EkKey::Rsa(key) => {
                let mut out = vec![0; key.min_output_size()];
                let seed = key.decrypt(&OAEP_SHA256_MGF1SHA256, encrypted, &mut out, Some(b"IDENTITY\0"))?;
                Ok(seed.to_vec())
            }
            EkKey::Ec(key, x) => {
                let (peer_x, rest) = unwrap2b(encrypted)?;
                let (peer_y, _) = unwrap2b(rest)?;
                let (curve, algorithm) = match self.kind {
                    EkKind::P384 => (&ECDH_P384, &digest::SHA384),
                    EkKind::Rsa2048 | EkKind::P256 => (&ECDH_P256, &digest::SHA256),
                };
                let peer = UnparsedPublicKey::new(curve, [&[4u8], peer_x, peer_y].concat());
                let failed = anyhow::anyhow!("no shared secret");
                agreement::agree(key, peer, failed, |z| {
                    // KDFe, one round: counter, Z, use, PartyU (ephemeral), PartyV (EK). Part 1, 11.4.10.3.
                    Ok(hash(algorithm, &[&[0, 0, 0, 1], z, b"IDENTITY\0", peer_x, x]))
                })
            }
        }
    }

    fn digest_size(&self) -> usize {
        if self.kind == EkKind::P384 { 48 } else { 32 }
    }
    fn hmac(&self) -> hmac::Algorithm {
        if self.kind == EkKind::P384 { hmac::HMAC_SHA384 } else { hmac::HMAC_SHA256 }
    }

    /// KDFa for at most one digest: counter, label, context, bits (Part 1, 11.4.10.2).
    fn kdf_a(&self, seed: &[u8], label: &[u8], context: &[u8], bytes: usize) -> Vec<u8> {
        let bits = u32::try_from(bytes * 8).unwrap_or(u32::MAX).to_be_bytes();
        let input = [&[0, 0, 0, 1], label, context, &bits].concat();
        let mut out = hmac::sign(&hmac::Key::new(self.hmac(), seed), &input).as_ref().to_vec();
        out.truncate(bytes);
        out
    }
}

fn rsa_ek() -> Result<(EkKey, Vec<u8>)> {
    let key = PrivateDecryptingKey::generate(KeySize::Rsa2048)?;
    let spki = AsDer::<PublicKeyX509Der<'_>>::as_der(&key.public_key())?;
    // RSAPublicKey ends in the modulus and an exponent of 2 + 3 bytes.
    let der = spki.as_ref();
    let modulus = der.len().checked_sub(5 + 256).and_then(|at| der.get(at..at + 256)).context("a modulus")?;
    let fixed = [0x00, 0x06, 0x00, 0x80, 0x00, 0x43, 0x00, 0x10, 0x08, 0x00, 0, 0, 0, 0];
    let public = [&template(0x0001, 0x000b, 0x0003_00b2, POLICY_SHA256)?[..], &fixed, &tpm2b(modulus)].concat();
    Ok((EkKey::Rsa(Box::new(OaepPrivateDecryptingKey::new(key)?)), public))
}

fn ec_ek(kind: EkKind) -> Result<(EkKey, Vec<u8>)> {
    let (curve, head, fixed) = match kind {
        EkKind::P384 => (
            &ECDH_P384,
            template(0x0023, 0x000c, 0x0003_00f2, POLICY_SHA384)?,
            [0x00, 0x06, 0x01, 0x00, 0x00, 0x43, 0x00, 0x10, 0x00, 0x04, 0x00, 0x10],
        ),
        EkKind::Rsa2048 | EkKind::P256 => (
            &ECDH_P256,
            template(0x0023, 0x000b, 0x0003_00b2, POLICY_SHA256)?,
            [0x00, 0x06, 0x00, 0x80, 0x00, 0x43, 0x00, 0x10, 0x00, 0x03, 0x00, 0x10],
        ),
    };
    let key = agreement::PrivateKey::generate(curve)?;
    let public = key.compute_public_key()?;
    let point = public.as_ref().get(1..).context("a point")?;
    let (x, y) = point.split_at(point.len() / 2);
    let area = [&head[..], &fixed, &tpm2b(x), &tpm2b(y)].concat();
    Ok((EkKey::Ec(key, x.to_vec()), area))
}

/// Type, name algorithm, attributes and policy of a public area.
fn template(kind: u16, name_alg: u16, attributes: u32, policy: &str) -> Result<Vec<u8>> {
    let policy = tpm2b(&hex::decode(policy)?);
    Ok([&kind.to_be_bytes()[..], &name_alg.to_be_bytes(), &attributes.to_be_bytes(), &policy].concat())
}

pub fn tpm2b(bytes: &[u8]) -> Vec<u8> {
    [&u16::try_from(bytes.len()).unwrap_or(u16::MAX).to_be_bytes()[..], bytes].concat()
}

/// The content of a TPM2B, and what follows it.
fn unwrap2b(bytes: &[u8]) -> Result<(&[u8], &[u8])> {
    let (len, rest) = bytes.split_first_chunk::<2>().context("a size")?;
    rest.split_at_checked(usize::from(u16::from_be_bytes(*len))).context("as many bytes as the size says")
}

fn hash(algorithm: &'static digest::Algorithm, parts: &[&[u8]]) -> Vec<u8> {
    let mut context = digest::Context::new(algorithm);
    parts.iter().for_each(|part| context.update(part));
    context.finish().as_ref().to_vec()
}
fn sha256(parts: &[&[u8]]) -> Vec<u8> {
    hash(&digest::SHA256, parts)
}
fn digest32(parts: &[&[u8]]) -> [u8; 32] {
    let mut out = [0; 32];
    out.copy_from_slice(&sha256(parts));
    out
}
