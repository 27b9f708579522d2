//! What no implementation can go below: the bare operations of the library, beside our figures.

use super::cpu::Meter;
use super::table::Table;
use super::verifier::random;
use crate::soft_tpm::maker::{CaKind, Maker};
use crate::soft_tpm::{EkKind, SoftTpm};
use ambit_model::{Revision, Stamp};
use ambit_verify::{Bank, BeginInput, Endorsements, Entropy, Expected, PresentedEk, Terms};
use anyhow::Result;
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::KeySize;
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_ASN1, ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair as _, ParsedPublicKey,
    RSA_PKCS1_2048_8192_SHA256, RSA_PKCS1_SHA256, RsaKeyPair,
};
use zeroize::Zeroizing;

const COUNT: usize = 3_000;
const MESSAGE: &[u8] = &[0x5a; 145];

pub(super) fn run(table: &mut Table) -> Result<()> {
    table.head("The floor: bare operations of aws-lc-rs, in one thread");
    let rng = SystemRandom::new();
    let key = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &rng)?;
    let key = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, key.as_ref())?;
    let signature = key.sign(&rng, MESSAGE)?;
    let public = ParsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, key.public_key().as_ref())?;
    verification(table, "P-256", || Ok(public.verify_sig(MESSAGE, signature.as_ref())?))?;
    let key = RsaKeyPair::generate(KeySize::Rsa2048)?;
    let mut signature = vec![0; key.public_modulus_len()];
    key.sign(&RSA_PKCS1_SHA256, &rng, MESSAGE, &mut signature)?;
    let public = ParsedPublicKey::new(&RSA_PKCS1_2048_8192_SHA256, key.public_key().as_ref())?;
    verification(table, "RSA-2048", || Ok(public.verify_sig(MESSAGE, &signature)?))?;
    credentials(table, "RSA-2048", EkKind::Rsa2048)?;
    credentials(table, "P-384", EkKind::P384)
}

fn verification(table: &mut Table, name: &str, verify: impl Fn() -> Result<()>) -> Result<()> {
    let mut meter = Meter::default();
    for _ in 0..COUNT {
        meter.once(&verify)?;
    }
    table.floor(&format!("signature verified, {name}"), meter.micros(), "us");
    Ok(())
}

/// Make-credential with an EK that the operator listed: no certificate to judge.
fn credentials(table: &mut Table, name: &str, kind: EkKind) -> Result<()> {
    let tpm = SoftTpm::new(kind, &Maker::new(CaKind::P256)?)?;
    let none = Endorsements { roots: Vec::new(), intermediates: Vec::new(), denied: Vec::new() };
    let mut meter = Meter::default();
    for _ in 0..COUNT / 5 {
        let input = BeginInput {
            cluster: "bench".parse()?,
            ek_certificate: Vec::new(),
            ek_intermediates: Vec::new(),
            ek_public: tpm.ek_public.clone(),
            ak_public: tpm.ak_public.clone(),
            agent_nonce: vec![7; 32],
        };
        let endorsed = PresentedEk::parse(input)?.endorse(Expected::AllowListed, &none, Stamp(1))?;
        let entropy =
            Entropy { secret: Zeroizing::new(random()?), server_nonce: random()?, seed: Zeroizing::new(random()?) };
        let terms = Terms {
            bank: Bank::Sha256,
            pcr_mask: 0x47ff,
            ima_offset: 0,
            deadline: Stamp(2),
            endorsement_revision: Revision(0),
            policy_revision: Revision(0),
        };
        meter.once(|| Ok(endorsed.challenge(entropy, terms)?))?;
    }
    table.floor(&format!("make-credential alone, EK {name}"), meter.micros(), "us");
    Ok(())
}
