//! Keys to which others wrap, inside the TPM: OpenSSL agrees on the same, and the verifier believes where they are.

use crate::attester;
use crate::common::Swtpm;
use crate::nothing_is_loaded;
use ambit_tpm::{AkKind, EkChoice, EkKind};
use ambit_verify::Public;

/// TPMA_OBJECT: fixedTPM, fixedParent, sensitiveDataOrigin, userWithAuth, decrypt; neither restricted nor sign.
const ATTRIBUTES: u32 = 1 << 1 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 17;
/// DER of a P-256 SubjectPublicKeyInfo up to its point (RFC 5480 2).
const SPKI_HEAD: &str = "3059301306072a8648ce3d020106082a8648ce3d030107034200";

fn openssl(tpm: &Swtpm, args: &[&str]) {
    let out = std::process::Command::new("openssl").args(args).current_dir(tpm.file("")).output().unwrap();
    assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
}

fn bytes(hex: &str) -> Vec<u8> {
    (0..hex.len() / 2).map(|at| u8::from_str_radix(&hex[2 * at..2 * at + 2], 16).unwrap()).collect()
}

/// A key pair of OpenSSL's: its point, as it is at the end of the public key's DER.
fn ephemeral(tpm: &Swtpm) -> [u8; 65] {
    openssl(tpm, &["ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", "eph.pem"]);
    openssl(tpm, &["pkey", "-in", "eph.pem", "-pubout", "-outform", "DER", "-out", "eph.der"]);
    let der = tpm.read("eph.der");
    der[der.len() - 65..].try_into().unwrap()
}

#[tokio::test]
async fn the_tpm_and_openssl_agree_on_the_same() {
    let tpm = Swtpm::start();
    for ek in [EkChoice::Auto, EkChoice::Fixed(EkKind::EccP384)] {
        let key = attester(&tpm, ek, AkKind::EccP256).create_wrap_key().await.unwrap();
        tpm.write("wrap.der", &[bytes(SPKI_HEAD), key.point().to_vec()].concat());
        for _ in 0..3 {
            let point = ephemeral(&tpm);
            openssl(
                &tpm,
                &[
                    "pkeyutl",
                    "-derive",
                    "-inkey",
                    "eph.pem",
                    "-peerkey",
                    "wrap.der",
                    "-peerform",
                    "DER",
                    "-out",
                    "agreed",
                ],
            );
            assert_eq!(key.agree(point).await.unwrap().as_slice(), tpm.read("agreed"));
            // A point that is not on the curve teaches nobody anything of the key.
            let mut off = point;
            off[64] ^= 1;
            key.agree(off).await.unwrap_err();
        }
    }
    nothing_is_loaded(&tpm);
}

#[tokio::test]
async fn the_key_is_kept_outlives_a_reset_and_opens_in_no_other_tpm() {
    let mut tpm = Swtpm::start();
    let attester = attester(&tpm, EkChoice::Auto, AkKind::EccP256);
    let key = attester.create_wrap_key().await.unwrap();
    let (point, saved) = (ephemeral(&tpm), key.saved().unwrap());
    let agreed = key.agree(point).await.unwrap();
    tpm.reset();
    let again = attester.wrap_key(&saved).unwrap();
    assert_eq!(again.point(), key.point());
    assert_eq!(again.agree(point).await.unwrap(), agreed);
    for damaged in [&saved[1..], &saved[..saved.len() - 1], b""] {
        assert!(attester.wrap_key(damaged).is_err());
    }
    tpm.tool("tpm2_changeeps", &[]);
    again.agree(point).await.unwrap_err();
}

#[tokio::test]
async fn the_ak_certifies_a_key_that_agrees_and_does_nothing_else() {
    let tpm = Swtpm::start();
    let attester = attester(&tpm, EkChoice::Auto, AkKind::EccP256);
    let certified = attester.create_wrap_key().await.unwrap().certify([0xc4; 32]).await.unwrap();
    assert_eq!(certified.public[4..8], ATTRIBUTES.to_be_bytes());
    let contains = |part: &[u8]| certified.attest.windows(part.len()).any(|window| window == part);
    assert!(contains(&[&[0, 32][..], &[0xc4; 32]].concat()), "the qualifying data");
    assert!(contains(&Public::name_of(&certified.public).unwrap()), "the key's name");
    nothing_is_loaded(&tpm);
}
