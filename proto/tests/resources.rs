//! Any sequence of slices: what the agent's end holds is what the whole slice says, whatever is lost or comes twice.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test that cannot go on fails")]

use ambit_proto::resources::{Held, Item, Set, Taken};
use ambit_proto::v1::{self, Delta};
use std::sync::Arc;

/// A generator of its own, so that a failed run names its seed.
struct Draw(u64);

impl Draw {
    fn next(&mut self, below: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % below
    }

    /// Some of a few names, in order, each in one of a few versions.
    fn some<T>(&mut self, of: impl Fn(u64, u64) -> T) -> Vec<T> {
        let mut some = Vec::new();
        for n in 0..6 {
            if self.next(3) > 0 {
                some.push(of(n, self.next(3)));
            }
        }
        some
    }

    fn slice(&mut self) -> v1::Slice {
        let td = |n: u64| format!("td{n}");
        let id = |n: u64| format!("spiffe://west/w{n}");
        v1::Slice {
            trust_domain: "west".into(),
            cluster: td(self.next(2)),
            bundles: self.some(|n, v| v1::Bundle { trust_domain: td(n), sequence: v, ..Default::default() }),
            entries: self.some(|n, v| v1::Entry { id: td(n), hint: v.to_string(), ..Default::default() }),
            policies: self.some(|n, v| v1::Policy {
                origin: td(1),
                name: td(n),
                ports: vec![v as u32 + 1],
                ..Default::default()
            }),
            services: self.some(|n, v| v1::Service {
                origin: td(1),
                name: td(n),
                port: v as u32,
                ..Default::default()
            }),
            endpoints: self.some(|n, v| v1::Endpoint {
                spiffe_id: "spiffe://west/w".into(),
                address: format!("10.0.0.{n}"),
                generation: v,
                ..Default::default()
            }),
            identities: self.some(|n, v| v1::NumericIdentity { spiffe_id: id(n), number: 256 + v as u32 }),
            denials: self.some(|n, v| v1::NodeDenial { trust_domain: td(1), node: td(n), generation: v }),
            tainted_authorities: self.some(|n, _| td(n)),
            authority_denials: self.some(|n, _| v1::AuthorityDenial { trust_domain: td(1), authority: td(n) }),
            id_denials: self.some(|n, v| v1::IdDenial { spiffe_id: id(n), barred: v > 0, ..Default::default() }),
            leaf_denials: self.some(|n, _| v1::LeafDenial {
                trust_domain: td(1),
                authority: td(2),
                serial: vec![n as u8; 16],
            }),
            tainted_jwt_authorities: self.some(|n, _| td(n)),
            egress: self.some(|n, v| v1::Egress { name: td(n), ports: vec![v as u32 + 1], ..Default::default() }),
            meshed: self.some(|n, _| format!("10.0.1.{n}")),
            unmeshed: self.some(|n, v| v1::Policy { name: td(n), ports: vec![v as u32 + 1], ..Default::default() }),
            claimed: self.some(|n, _| format!("10.0.2.{n}")),
            callers: self.some(|n, v| v1::NodeAddress {
                trust_domain: td(1),
                node: td(n),
                generation: v,
                ..Default::default()
            }),
            ..Default::default()
        }
    }
}

fn at(slice: &v1::Slice, revision: u64) -> v1::Slice {
    v1::Slice { revision, ..slice.clone() }
}

#[test]
fn a_slice_is_its_resources_and_they_are_the_slice() {
    let mut draw = Draw(1);
    for _ in 0..200 {
        let slice = draw.slice();
        let set = Set::from(&slice);
        assert_eq!(set.slice(0, 0).unwrap(), slice);
        let other = draw.slice();
        let same = set.digest() == Set::from(&other).digest();
        assert_eq!(same, slice == other);
    }
}

#[test]
fn whatever_leads_from_one_slice_to_the_next_leaves_what_the_whole_slice_says() {
    for seed in 0..40 {
        let (mut draw, mut held, mut sent) = (Draw(seed), Held::default(), None::<Set>);
        for revision in 1..=30 {
            let slice = draw.slice();
            let set = Set::from(&slice);
            if let Some(before) = &sent
                && draw.next(2) == 0
            {
                let early = before.with_denials_of(&set);
                assert!(early.refuses_as(&set));
                for part in early.delta(Some(before), revision, 0) {
                    let taken = held.take(Delta { denials_only: true, ..part });
                    assert_eq!(taken, Ok(Taken::Denials), "seed {seed}");
                }
                let denials = held.set().denials(revision, 0).unwrap();
                assert_eq!((denials.denials, denials.id_denials), (slice.denials.clone(), slice.id_denials.clone()));
                sent = Some(early);
            }
            let parts = set.delta(sent.as_ref(), revision, 0);
            assert_eq!(parts.into_iter().map(|part| held.take(part)).last(), Some(Ok(Taken::All)), "seed {seed}");
            assert_eq!(held.set().slice(revision, 0).unwrap(), at(&slice, revision), "seed {seed}");
            sent = Some(set);
        }
    }
}

/// What goes wrong on the way.
fn spoil(draw: &mut Draw, deltas: &mut Vec<Delta>) -> &'static str {
    let n = draw.next(deltas.len() as u64) as usize;
    match draw.next(6) {
        0 => drop(deltas.remove(n)),
        1 => deltas.insert(n, deltas[n].clone()),
        2 => deltas.rotate_left(1),
        3 => deltas[n].digest = vec![7; 32],
        4 => deltas[n].put.truncate(1),
        _ => return "nothing",
    }
    "something"
}

#[test]
fn what_is_lost_repeated_or_reordered_is_found_and_everything_sent_anew() {
    let mut found = 0;
    for seed in 0..300 {
        let mut draw = Draw(seed);
        let slices: Vec<v1::Slice> = (0..4).map(|_| draw.slice()).collect();
        let sets: Vec<Set> = slices.iter().map(Set::from).collect();
        let mut held = Held::default();
        let mut deltas = Vec::new();
        for (n, set) in sets.iter().enumerate() {
            deltas.extend(set.delta(n.checked_sub(1).map(|before| &sets[before]), n as u64 + 1, 0));
        }
        let spoilt = spoil(&mut draw, &mut deltas);
        let mut lost = false;
        for delta in deltas {
            let revision = delta.revision;
            match held.take(delta) {
                // What is in effect is always one of the slices, whole, and of its own revision.
                Ok(Taken::All) => {
                    let now = held.set().slice(revision, 0).unwrap();
                    assert_eq!(now, at(&slices[revision as usize - 1], revision), "seed {seed}");
                }
                Ok(_) => {}
                Err(_) => lost = true,
            }
        }
        found += usize::from(lost);
        assert!(!lost || spoilt == "something", "seed {seed}");
        // Everything, as the server sends it on the word that all is lost.
        for part in sets[3].delta(None, 4, 0) {
            held.take(part).unwrap();
        }
        assert_eq!(held.set(), &sets[3], "seed {seed}");
    }
    assert!(found > 100, "{found}");
}

#[test]
fn a_large_set_comes_in_parts_and_takes_effect_with_the_last() {
    let entry = |n: usize| v1::Entry { id: format!("e{n}"), hint: "x".repeat(1_000), ..Default::default() };
    let slice = v1::Slice { entries: (0..5_000).map(entry).collect(), ..Default::default() };
    let set = Set::from(&slice);
    let parts = set.delta(None, 3, 0);
    assert!(parts.len() > 4 && parts.iter().all(|part| part.put.len() < 1_200), "{}", parts.len());
    let mut held = Held::default();
    let (last, first) = parts.split_last().unwrap();
    for part in first {
        assert_eq!(held.take(part.clone()), Ok(Taken::Part));
        assert!(held.set().is_empty() && held.digest().is_empty());
    }
    assert_eq!(held.take(last.clone()), Ok(Taken::All));
    assert_eq!(held.set(), &set);
    // A stream that broke in the middle: the parts that came are of no use, and what was held is.
    let next =
        v1::Slice { entries: (0..4_000).map(|n| v1::Entry { hint: "y".repeat(1_000), ..entry(n) }).collect(), ..slice };
    let next = Set::from(&next);
    let parts = next.delta(Some(&set), 4, 0);
    assert_eq!(held.take(parts[0].clone()), Ok(Taken::Part));
    held.resume();
    assert_eq!(held.digest(), set.digest());
    for part in parts {
        held.take(part).unwrap();
    }
    assert_eq!(held.set(), &next);
    // A part of another delta in between.
    let parts = set.delta(Some(&next), 5, 0);
    held.take(parts[0].clone()).unwrap();
    assert!(held.take(Delta { revision: 6, ..parts[1].clone() }).is_err());
}

#[test]
fn nothing_older_is_taken_and_nothing_but_everything_once_all_is_lost() {
    let mut draw = Draw(9);
    let (a, b) = (Set::from(&draw.slice()), Set::from(&draw.slice()));
    let one = |set: &Set, base, revision| set.delta(base, revision, 0).remove(0);
    let mut held = Held::default();
    assert_eq!(held.take(one(&a, None, 5)), Ok(Taken::All));
    for base in [None, Some(&a)] {
        assert_eq!(held.take(one(&b, base, 4)), Ok(Taken::Dropped));
    }
    assert!(held.take(one(&a, Some(&b), 6)).is_err() && held.digest().is_empty());
    assert_eq!(held.take(one(&b, Some(&a), 6)), Ok(Taken::Dropped), "it is over what was lost");
    assert_eq!(held.take(one(&b, None, 4)), Ok(Taken::Dropped));
    assert_eq!((held.take(one(&b, None, 6)), held.set()), (Ok(Taken::All), &b));
    let entry = Item::entry(&v1::Entry { id: "z".into(), ..Default::default() });
    let more: Set = b.items().iter().cloned().chain([Arc::new(entry)]).collect();
    let delta = Delta { denials_only: true, ..one(&more, Some(&b), 7) };
    assert!(held.take(delta).is_err(), "an entry under the name of denials");
}
