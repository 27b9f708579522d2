//! Which signatures speak for a cell: more than half of its voters, each once. Every subset of up to seven voters.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test that cannot go on fails")]

use ambit_identity::record::Listed;
use ambit_identity::{CoSignature, KeySet, RecordKey, Root};
use ambit_model::{Code, Stamp, TrustDomain};
use serde::Serialize;

const SAID: &[u8] = b"what the cell says";

struct Fixture {
    td: TrustDomain,
    root: Root,
}

fn fixture(name: &str) -> Fixture {
    let td: TrustDomain = name.parse().unwrap();
    let root = Root::create(&td, Stamp(1_800_000_000_000), [1; 16]).unwrap();
    Fixture { td, root }
}

fn keys(count: usize) -> Vec<RecordKey> {
    (0..count).map(|_| RecordKey::generate().unwrap()).collect()
}

fn public(keys: &[RecordKey]) -> Vec<[u8; 32]> {
    keys.iter().map(RecordKey::public).collect()
}

/// `prove` signs whatever it is given, under its own context: so do these tests.
fn message() -> Vec<u8> {
    [b"ambit/possession/v1".as_slice(), SAID].concat()
}

fn by(key: &RecordKey, index: usize) -> CoSignature {
    CoSignature { key_index: u32::try_from(index).unwrap(), signature: key.prove(SAID) }
}

#[test]
fn more_than_half_of_the_voters_and_nobody_twice() {
    let f = fixture("west");
    let (mut held, mut refused) = (0, 0);
    for voters in 1..=7usize {
        let (keys, others) = (keys(voters), keys(2));
        let listed = Listed { voters: public(&keys), others: public(&others) };
        let (statement, signature) = KeySet::certify_listed(&f.root, &f.td, 1, listed.clone()).unwrap();
        let set = KeySet::verify(&f.td, f.root.der(), &statement, &signature).unwrap();
        assert_eq!((set.listed(), Listed::read(&statement)), (listed.clone(), Some(listed)));
        let stranger = RecordKey::generate().unwrap();
        for mask in 0u32..1 << voters {
            let signed: Vec<usize> = (0..voters).filter(|n| mask & 1 << n != 0).collect();
            let honest: Vec<CoSignature> = signed.iter().map(|n| by(&keys[*n], *n)).collect();
            // What must count for nothing: the first signer again, under every other index and its own; a stranger; who votes
            // not; a key past the end.
            let mut all: Vec<CoSignature> =
                signed.first().map(|n| (0..voters).map(|at| by(&keys[*n], at)).collect()).unwrap_or_default();
            all.extend((0..voters).map(|at| by(&stranger, at)));
            all.extend((0..2).map(|n| by(&others[n], voters + n)));
            all.push(by(&stranger, 4_000_000_000));
            all.extend(honest.clone());
            let expected = signed.len() * 2 > voters;
            for (what, signatures) in [("alone", honest), ("in a crowd", all)] {
                let outcome = set.verify_claim(&f.td, &message(), &signatures);
                assert_eq!(outcome.is_ok(), expected, "{what}: {signed:?} of {voters}: {outcome:?}");
                if let Err(refusal) = outcome {
                    assert_eq!(refusal.code, Code::RecordSignature);
                }
            }
            if expected { held += 1 } else { refused += 1 }
        }
    }
    println!("{held} majorities, {refused} minorities");
    assert!(held > 100 && refused > 100);
}

/// What 0.1 certified has no count: all of its keys are voters'. What follows it is read strictly.
#[test]
fn a_statement_of_an_earlier_release_wants_more_than_half_of_all_its_keys() {
    #[derive(Serialize)]
    struct Statement<'a>(&'a str, u64, &'a [[u8; 32]]);
    let all = [[1u8; 32], [2; 32], [3; 32]];
    let bytes = postcard::to_stdvec(&Statement("west", 4, &all)).unwrap();
    assert_eq!(Listed::read(&bytes), Some(Listed::of_voters(all.to_vec())));
    for (tail, voters) in [(&[1u8][..], Some(1)), (&[3], Some(3)), (&[0], None), (&[4], None), (&[2, 2], None)] {
        let read = Listed::read(&[&bytes, tail].concat());
        assert_eq!(read.map(|listed| listed.voters.len()), voters, "{tail:?}");
    }
    let f = fixture("west");
    assert!(KeySet::certify(&f.root, &f.td, 1, Vec::new()).is_err(), "a key set of nobody");
    // An earlier release reads as far as it knows.
    let (statement, _) = KeySet::certify(&f.root, &f.td, 4, all.to_vec()).unwrap();
    assert!(statement.starts_with(&bytes), "a statement that 0.1 cannot read");
}
