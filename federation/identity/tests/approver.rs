//! Approvers' keys and files; OpenSSL reads the keys and judges the signatures.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use ambit_identity::ApproverKey;
use ambit_identity::approver::{approval_text, proposal_text, read_approval, read_proposal};
use ambit_model::act::{Act, ApproverCard, Proposal};
use ambit_model::{Code, Stamp};
use openssl::pkey::{Id, PKey};
use openssl::sign::Verifier;

fn proposal() -> Proposal {
    let act = Act::RevokeRoot([0xab; 32]);
    Proposal { trust_domain: "west".parse().unwrap(), epoch: 2, expires: Stamp(99), nonce: [7; 16], act }
}

fn signed(key: &[u8; 32], message: &[u8], signature: &[u8]) -> bool {
    let key = PKey::public_key_from_raw_bytes(key, Id::ED25519).unwrap();
    Verifier::new_without_digest(&key).unwrap().verify_oneshot(signature, message).unwrap()
}

#[test]
fn a_key_is_openssls_too_and_signs_what_is_to_be_signed() {
    let key = ApproverKey::generate().unwrap();
    let openssl = PKey::private_key_from_pem(key.pem().unwrap().as_bytes()).unwrap();
    assert_eq!(openssl.raw_public_key().unwrap(), key.card().key);
    let card: ApproverCard = key.card().to_string().parse().unwrap();
    assert!(signed(&card.key, &[&b"ambit/approver/v1\0"[..], &card.key].concat(), &card.proof));
    let approval = key.approve(&proposal()).unwrap();
    assert!(signed(&approval.key, &proposal().statement().unwrap(), &approval.signature));
    // And the other way round.
    let theirs = PKey::generate_ed25519().unwrap();
    let pem = String::from_utf8(theirs.private_key_to_pem_pkcs8().unwrap()).unwrap();
    assert_eq!(ApproverKey::from_pem(&pem).unwrap().card().key.to_vec(), theirs.raw_public_key().unwrap());
    let p256 = openssl::ec::EcKey::generate(
        &openssl::ec::EcGroup::from_curve_name(openssl::nid::Nid::X9_62_PRIME256V1).unwrap(),
    );
    let p256 = PKey::from_ec_key(p256.unwrap()).unwrap().private_key_to_pem_pkcs8().unwrap();
    for bad in ["", "x", &pem[1..], &pem.replace("PRIVATE", "PUBLIC"), &String::from_utf8(p256).unwrap()] {
        assert_eq!(ApproverKey::from_pem(bad).err().map(|r| r.code), Some(Code::BadRequest), "{bad}");
    }
}

#[test]
fn files_are_read_as_they_are_written_and_strictly() {
    let key = ApproverKey::generate().unwrap();
    let approval = key.approve(&proposal()).unwrap();
    let (asked, said) = (proposal_text(&proposal()).unwrap(), approval_text(&proposal(), &approval).unwrap());
    assert_eq!(read_proposal(&asked).unwrap(), proposal());
    assert_eq!(read_approval(&said).unwrap(), (proposal(), approval));
    assert!(asked.contains(&format!("\"act\": \"revoke root {}\"", "ab".repeat(32))), "{asked}");
    for (what, text) in [
        ("nothing", String::new()),
        ("another act", asked.replace("revoke root", "revoke  root")),
        ("a field more", asked.replacen('{', "{\"note\": \"just a test\",", 1)),
        ("a field twice", asked.replacen('{', "{\"epoch\": 2,", 1)),
        ("a short nonce", asked.replace("0707\"", "07\"")),
        ("an approval", said.clone()),
    ] {
        assert_eq!(read_proposal(&text).map_err(|r| r.code), Err(Code::BadRequest), "{what}");
    }
    for (what, text) in [
        ("a proposal", asked.clone()),
        ("no key", said.replace("\"key\"", "\"clef\"")),
        ("a short signature", said.replace("\"signature\": \"", "\"signature\": \"0")),
    ] {
        assert_eq!(read_approval(&text).map_err(|r| r.code), Err(Code::BadRequest), "{what}");
    }
}
