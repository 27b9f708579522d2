//! SVID keys inside the TPM, judged by OpenSSL and tpm2-tools.

use crate::attester;
use crate::common::Swtpm;
use crate::nothing_is_loaded;
use ambit_tpm::{AkKind, EkChoice, EkKind, TpmKey};
use ambit_verify::Public;
use ambit_verify::csr::p256_spki;
use ambit_verify::hash::sha256;
use rcgen::{CertificateParams, PKCS_ECDSA_P256_SHA256, PublicKeyData, SignatureAlgorithm, SigningKey};

/// The key as rcgen (and, alike, a TLS stack) wants it.
struct Hook(TpmKey);

impl PublicKeyData for Hook {
    fn der_bytes(&self) -> &[u8] {
        self.0.point()
    }
    fn algorithm(&self) -> &'static SignatureAlgorithm {
        &PKCS_ECDSA_P256_SHA256
    }
}

impl SigningKey for Hook {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        self.0.sign_blocking(sha256(message)).map_err(|_| rcgen::Error::RemoteKeyError)
    }
}

fn openssl(tpm: &Swtpm, args: &[&str]) -> bool {
    let out = std::process::Command::new("openssl").args(args).current_dir(tpm.file("")).output().unwrap();
    println!("{args:?}: {}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    out.status.success()
}

#[tokio::test]
async fn a_key_signs_requests_and_messages_without_leaving_the_tpm() {
    let tpm = Swtpm::start();
    let attester = attester(&tpm, EkChoice::Auto, AkKind::EccP256);
    let key = attester.create_key().await.unwrap();
    let other = attester.create_key().await.unwrap();
    assert_ne!(key.point(), other.point(), "each is a key of its own");
    tpm.write("spki.der", &key.spki_der());
    tpm.write("message", b"hello");
    for _ in 0..3 {
        tpm.write("signature", &key.sign(sha256(b"hello")).await.unwrap());
        let verify = ["dgst", "-sha256", "-verify", "spki.der", "-keyform", "DER", "-signature", "signature"];
        assert!(openssl(&tpm, &[&verify[..], &["message"]].concat()));
        tpm.write("signature", &other.sign(sha256(b"hello")).await.unwrap());
        assert!(!openssl(&tpm, &[&verify[..], &["message"]].concat()), "another key's signature");
    }
    // A certificate request, signed by a caller that cannot await.
    let spki = key.spki_der();
    let csr = tokio::task::spawn_blocking(move || {
        CertificateParams::new(vec![]).unwrap().serialize_request(&Hook(key)).unwrap().der().to_vec()
    });
    let csr = csr.await.unwrap();
    tpm.write("csr.der", &csr);
    assert!(openssl(&tpm, &["req", "-inform", "DER", "-in", "csr.der", "-noout", "-verify"]));
    assert_eq!(p256_spki(&csr).unwrap(), spki);
    nothing_is_loaded(&tpm);
}

/// TPMA_OBJECT: fixedTPM, fixedParent, sensitiveDataOrigin, userWithAuth, sign; neither restricted nor decrypt.
const ATTRIBUTES: u32 = 1 << 1 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 18;

#[tokio::test]
async fn the_ak_certifies_the_key() {
    let tpm = Swtpm::start();
    for (ek, ak) in [
        (EkChoice::Auto, AkKind::EccP256),
        (EkChoice::Fixed(EkKind::EccP384), AkKind::Rsa2048Ssa),
        (EkChoice::Fixed(EkKind::EccP384), AkKind::EccP256),
    ] {
        let attester = attester(&tpm, ek, ak);
        let identity = attester.identity().await.unwrap();
        let key = attester.create_key().await.unwrap();
        let certified = key.certify([0xc4; 32]).await.unwrap();
        assert_eq!(certified.public, key.public());
        assert_eq!(certified.public[4..8], ATTRIBUTES.to_be_bytes());
        // TPMS_ATTEST (Part 2, 10.12.12): magic, TPM_ST_ATTEST_CERTIFY, qualifiedSigner, extraData, ... name, QN.
        let attest = &certified.attest;
        assert_eq!(attest[..6], [0xff, 0x54, 0x43, 0x47, 0x80, 0x17]);
        let contains = |part: &[u8]| attest.windows(part.len()).any(|window| window == part);
        assert!(contains(&[&[0, 32][..], &[0xc4; 32]].concat()), "the qualifying data");
        assert!(contains(&Public::name_of(&certified.public).unwrap()), "the key's name");
        let public = [(identity.ak_public.len() as u16).to_be_bytes().to_vec(), identity.ak_public].concat();
        tpm.write("ak.pub", &public);
        tpm.write("attest", attest);
        tpm.write("signature", &certified.signature);
        tpm.tool("tpm2_loadexternal", &["-Q", "-C", "n", "-u", "ak.pub", "-c", "ak.ctx"]);
        tpm.tool("tpm2_flushcontext", &["-t"]);
        let verify = |message: &str| {
            let args = ["-c", "ak.ctx", "-g", "sha256", "-m", message, "-s", "signature"];
            let done = tpm.try_tool("tpm2_verifysignature", &args).status.success();
            tpm.tool("tpm2_flushcontext", &["-t"]);
            done
        };
        assert!(verify("attest"), "{ek:?} {ak:?}");
        assert!(!verify("ak.pub"));
    }
    nothing_is_loaded(&tpm);
}

/// Keys of two attesters in one test TPM do not mix, and another TPM does not take them.
#[tokio::test]
async fn a_key_outlives_a_reset_but_not_its_tpm() {
    let mut tpm = Swtpm::start();
    let attester = attester(&tpm, EkChoice::Auto, AkKind::EccP256);
    let key = attester.create_key().await.unwrap();
    key.sign([1; 32]).await.unwrap();
    tpm.reset();
    key.sign([1; 32]).await.unwrap();
    key.certify([0; 32]).await.unwrap();
    tpm.tool("tpm2_changeeps", &[]);
    key.sign([1; 32]).await.unwrap_err();
}
