//! Recovery shares: any k of n open the root, fewer do not, and what is wrong with one is told by name.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

use ambit_identity::share::recover;
use ambit_identity::{Root, RootShare, ShareSet};
use ambit_model::{Code, Refusal, Stamp, TrustDomain};

const NOW: Stamp = Stamp(1_800_000_000_000);

fn td() -> TrustDomain {
    "west".parse().unwrap()
}
fn root(serial: u8) -> Root {
    Root::create(&td(), NOW, [serial; 16]).unwrap()
}
/// The texts of `of` shares, `threshold` of which open the root.
fn texts(root: &Root, threshold: u8, of: u8, set: u8) -> Vec<String> {
    let set = ShareSet::new(root, &td(), threshold, of, [set; 16]).unwrap();
    set.split(root).unwrap().iter().map(|share| share.text().unwrap().to_string()).collect()
}
fn opened(root: &Root, texts: &[&String]) -> Result<Vec<u8>, Refusal> {
    let shares = texts.iter().map(|text| RootShare::parse(text.as_bytes())).collect::<Result<Vec<_>, _>>()?;
    recover(&td(), root.der().clone(), Vec::new(), &shares).map(|root| root.key().pkcs8().to_vec())
}
fn found(outcome: Result<Vec<u8>, Refusal>) -> String {
    let refusal = outcome.unwrap_err();
    assert_eq!(refusal.code, Code::ShareInvalid, "{refusal}");
    refusal.found
}

#[test]
fn any_three_of_five_open_the_root_and_no_two_do() {
    let root = root(1);
    let texts = texts(&root, 3, 5, 1);
    let (mut opens, mut refused) = (0, 0);
    for mask in 0u32..32 {
        let some: Vec<&String> = (0..5).filter(|n| mask & 1 << n != 0).map(|n| &texts[n]).collect();
        if some.len() >= 3 {
            assert_eq!(opened(&root, &some).unwrap(), *root.key().pkcs8(), "{mask:05b}");
            opens += 1;
        } else {
            opened(&root, &some).unwrap_err();
            refused += 1;
        }
    }
    assert_eq!((opens, refused), (16, 16));
}

/// The threshold is not only a number in the text: with it changed and the checksum made to fit, two give no key.
#[test]
fn two_shares_of_three_say_nothing_of_the_key_whatever_they_claim() {
    let root = root(1);
    let texts = texts(&root, 3, 5, 1);
    let lied: Vec<String> =
        texts.iter().take(2).map(|text| with_sum(&text.replace("\"threshold\": 3", "\"threshold\": 2"))).collect();
    let found = found(opened(&root, &lied.iter().collect::<Vec<_>>()));
    assert!(found.contains("no key of this root"), "{found}");
    for text in &texts {
        assert!(!text.contains(&hex::encode(&*root.key().pkcs8())));
    }
}

/// The same text with the checksum that fits it, by this test's own reckoning.
fn with_sum(text: &str) -> String {
    use sha2::{Digest, Sha256};
    let value: serde_json::Value = serde_json::from_str(text).unwrap();
    let mut sum = Sha256::new();
    for field in ["form", "trust_domain", "root", "set", "share"] {
        let part = value[field].as_str().unwrap();
        sum.update((part.len() as u64).to_be_bytes());
        sum.update(part);
    }
    sum.update(["threshold", "of", "index"].map(|field| u8::try_from(value[field].as_u64().unwrap()).unwrap()));
    text.replace(value["checksum"].as_str().unwrap(), &hex::encode(sum.finalize()))
}

#[test]
fn what_is_wrong_with_a_share_is_told_by_name() {
    let (root, other) = (root(1), root(2));
    let (good, another, of_other) = (texts(&root, 2, 3, 1), texts(&root, 2, 3, 2), texts(&other, 2, 3, 1));
    let value: serde_json::Value = serde_json::from_str(&good[1]).unwrap();
    let share = value["share"].as_str().unwrap();
    let flipped = good[1].replace(share, &share.replacen(['0', '1', '2', '3'], "f", 1));
    assert_ne!(flipped, good[1]);
    for (what, second, expected) in [
        ("the same twice", good[0].clone(), "share 1 twice"),
        ("of another splitting", another[1].clone(), "share 2 was not"),
        ("of another root", of_other[1].clone(), "is of root"),
        ("damaged", flipped.clone(), "checksum"),
        ("damaged, and its checksum made to fit", with_sum(&flipped), "no key of this root"),
        ("cut", good[1][..good[1].len() - 9].to_owned(), "ends to be one"),
        ("another form", with_sum(&good[1].replace("share v1", "share v2")), "another form"),
        ("number 0", with_sum(&good[1].replace("\"index\": 2", "\"index\": 0")), "number 0 of 3"),
        ("number 4 of 3", with_sum(&good[1].replace("\"index\": 2", "\"index\": 4")), "number 4 of 3"),
        ("nothing", String::new(), "ends to be one"),
    ] {
        let found = found(opened(&root, &[&good[0], &second]));
        assert!(found.contains(expected), "{what}: {found}");
        assert!(!found.contains(share), "{what}");
    }
    assert!(found(opened(&root, &[&good[0]])).contains('1'));
    assert_eq!(opened(&root, &[&good[2], &good[0]]).unwrap(), *root.key().pkcs8());
}

#[test]
fn one_share_is_never_enough() {
    let root = root(1);
    for (threshold, of) in [(0, 3), (1, 3), (4, 3), (2, 17)] {
        let refusal = ShareSet::new(&root, &td(), threshold, of, [0; 16]).unwrap_err();
        assert_eq!(refusal.code, Code::BadRequest, "{threshold} of {of}");
    }
}
