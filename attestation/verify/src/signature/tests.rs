use super::*;
use crate::public::Public;
use crate::testdata::{AkKind, SoftwareAk, ecdsa_signature, rsa_public, table_row, tpm2b};
use aws_lc_rs::rsa::KeySize;

const MESSAGE: &[u8] = b"what a TPM attests";

/// The order of P-256 (FIPS 186-5 by way of SP 800-186, 3.2.1.3).
const ORDER: &str = "ffffffff00000000ffffffffffffffffbce6faada7179e84f3b9cac2fc632551";

fn verifier(public: &[u8]) -> Result<AkVerifier, Refusal> {
    AkVerifier::new(&AttestationKey::new(Public::parse(public).unwrap())?)
}

fn verify(ak: &AkVerifier, signature: &[u8], message: &[u8]) -> Result<(), Code> {
    ak.verify(&Signature::parse(signature).map_err(|_| Code::EvidenceMalformed)?, message).map_err(|r| r.code)
}

#[test]
fn each_kind_of_ak_verifies_its_own_and_nothing_else() {
    use KeySize::{Rsa2048, Rsa3072};
    let kinds = [AkKind::P256, AkKind::P384, AkKind::RsaSsa(Rsa2048), AkKind::RsaSsa(Rsa3072)];
    let kinds = kinds.into_iter().chain([AkKind::RsaPss(Rsa2048), AkKind::RsaPssLong(Rsa2048)]);
    for kind in kinds {
        let ak = SoftwareAk::new(kind);
        let known = verifier(&ak.public).unwrap();
        let good = ak.sign(MESSAGE);
        assert_eq!(verify(&known, &good, MESSAGE), Ok(()), "{kind:?}");
        assert_eq!(verify(&known, &good, b"something else"), Err(Code::QuoteSignature), "{kind:?}");
        // Under the name of every other scheme and hash.
        for scheme in [0x14, 0x16, 0x18] {
            for hash in [0x04, 0x0b, 0x0c, 0x0d, 0x12] {
                let mut relabelled = good.clone();
                (relabelled[1], relabelled[3]) = (scheme, hash);
                if relabelled != good {
                    assert!(verify(&known, &relabelled, MESSAGE).is_err(), "{kind:?} as {scheme:#x} with {hash:#x}");
                }
            }
        }
        for n in 0..good.len() {
            assert!(verify(&known, &good[..n], MESSAGE).is_err(), "{kind:?} cut to {n}");
        }
        assert!(verify(&known, &[good.as_slice(), &[0]].concat(), MESSAGE).is_err(), "{kind:?} and more");
    }
}

/// `ORDER` - s, and s + `ORDER`, digit by digit.
fn with_order(s: &[u8], subtract: bool) -> Vec<u8> {
    let order = hex::decode(ORDER).unwrap();
    let mut carry = 0i32;
    let mut out: Vec<u8> = (0..32)
        .rev()
        .map(|n| {
            let (order, s) = (i32::from(order[n]), i32::from(s[n]));
            let sum = if subtract { order - s } else { order + s } + carry;
            carry = sum.div_euclid(256);
            sum.rem_euclid(256) as u8
        })
        .collect();
    out.push(carry as u8);
    out.reverse();
    out
}

#[test]
fn numbers_out_of_range_are_no_ecdsa_signature() {
    let ak = SoftwareAk::p256();
    let known = verifier(&ak.public).unwrap();
    let bare = ak.sign_bare(MESSAGE);
    let (r, s) = bare.split_at(32);
    let order = hex::decode(ORDER).unwrap();
    let pair = |r: &[u8], s: &[u8]| [&[0x00, 0x18, 0x00, 0x0b][..], &tpm2b(r), &tpm2b(s)].concat();
    for (what, signature) in [
        ("r = 0", pair(&[0; 32], s)),
        ("s = 0", pair(r, &[0; 32])),
        ("both 0", pair(&[0; 32], &[0; 32])),
        ("both empty", pair(&[], &[])),
        ("r = n", pair(&order, s)),
        ("s = n", pair(r, &order)),
        ("r + n", pair(&with_order(r, false), s)),
        ("s + n", pair(r, &with_order(s, false))),
        ("r all ones", pair(&[0xff; 32], s)),
        ("swapped", pair(s, r)),
        ("66 octets", pair(&[[0; 34].as_slice(), r].concat(), s)),
    ] {
        assert_eq!(verify(&known, &signature, MESSAGE), Err(Code::QuoteSignature), "{what}");
        table_row(20, &format!("ECDSA signature: {what}"), "quote_signature");
    }
    // The other of the two values of s that verify: TPMs make both, and nothing is named by a signature.
    assert_eq!(verify(&known, &pair(r, &with_order(s, true)[1..]), MESSAGE), Ok(()));
    table_row(20, "ECDSA signature: high s", "accepted");
    // A TPM may leave out leading zeros.
    let short = (0u32..).map(|n| [MESSAGE, &n.to_be_bytes()].concat()).find_map(|m| {
        let bare = ak.sign_bare(&m);
        (bare[0] == 0).then(|| (pair(&bare[1..32], &bare[32..]), m))
    });
    let (signature, message) = short.unwrap();
    assert_eq!(verify(&known, &signature, &message), Ok(()));
    assert_eq!(verify(&known, &ecdsa_signature(&bare), MESSAGE), Ok(()));
}

#[test]
fn keys_that_are_none_are_refused() {
    let ak = SoftwareAk::p256();
    let rsa = SoftwareAk::new(AkKind::RsaSsa(KeySize::Rsa2048));
    let modulus = &rsa.public[rsa.public.len() - 256..];
    let code = |public: &[u8]| match Public::parse(public) {
        Err(_) => Code::EvidenceMalformed,
        Ok(_) => verifier(public).map(|_| ()).unwrap_err().code,
    };
    let changed = |public: &[u8], at: usize, byte: u8| {
        let mut public = public.to_vec();
        public[at] = byte;
        public
    };
    let last = |public: &[u8]| public.len() - 1;
    let odd = ak.public[last(&ak.public)] ^ 1;
    assert_eq!(code(&changed(&ak.public, last(&ak.public), odd)), Code::EvidenceMalformed, "not on the curve");
    let origin = [&ak.public[..20], &tpm2b(&[0; 32]), &tpm2b(&[0; 32])].concat();
    assert_eq!(code(&origin), Code::EvidenceMalformed, "no point at all");
    let beyond = [&ak.public[..20], &tpm2b(&[0xff; 32]), &tpm2b(&[0xff; 32])].concat();
    assert_eq!(code(&beyond), Code::EvidenceMalformed, "coordinates beyond the field");
    let p384_on_p256 = changed(&ak.public, 17, 0x04);
    assert_eq!(code(&p384_on_p256), Code::AkWeak, "the hash of P-256 on P-384");

    let even = modulus[255] & !1;
    assert_eq!(code(&changed(&rsa.public, last(&rsa.public), even)), Code::EvidenceMalformed, "an even modulus");
    assert_eq!(code(&rsa_public(0x0005_0072, 0x14, &[&modulus[..127], &[1]].concat())), Code::AkWeak, "1024 bits");
    for exponent in [1u32, 2, 3, 65536, 65539, u32::MAX] {
        let mut public = rsa.public.clone();
        let at = public.len() - 256 - 2 - 4;
        public[at..at + 4].copy_from_slice(&exponent.to_be_bytes());
        assert_eq!(code(&public), Code::EvidenceMalformed, "exponent {exponent}");
    }
    let at = rsa.public.len() - 256 - 2 - 6;
    assert_eq!(code(&changed(&rsa.public, at, 0x07)), Code::EvidenceMalformed, "bits that are not the modulus's");
    assert_eq!(code(&changed(&rsa.public, rsa.public.len() - 256, 0x7f)), Code::EvidenceMalformed, "2047 bits");
}
