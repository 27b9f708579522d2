//! Planted histories with known verdicts, and random ones against an oracle that tries every order.

use super::super::long::draw::Draw;
use super::*;

fn op(text: &str) -> Op {
    let words: Vec<&str> = text.split_whitespace().collect();
    let [client, did, value, call, back] = words[..] else { panic!("{text}") };
    let value: Option<u64> = (value != "-").then(|| value.parse().unwrap());
    let did = if did == "w" { Did::Write(value.unwrap()) } else { Did::Read(value) };
    let back_us = (back != "-").then(|| back.parse().unwrap());
    Op { client: client.parse().unwrap(), did, call_us: call.parse().unwrap(), back_us }
}

/// Client, w or r, value, call, answer.
fn history(text: &str) -> Vec<Op> {
    text.split(',').map(op).collect()
}

fn good(why: &str, text: &str) {
    assert_eq!(check(&history(text)), Verdict::Linearizable, "{why}");
}

fn bad(why: &str, text: &str, window: &str) {
    assert_eq!(check(&history(text)), Verdict::Not(history(window)), "{why}");
}

#[test]
fn what_may_be_is_accepted() {
    good("nothing", "1 r - 0 1");
    good("one after the other", "1 w 1 0 1, 2 r 1 2 3, 1 w 2 4 5, 2 r 2 6 7");
    good("a read during a write may see either", "1 w 1 0 10, 2 r - 1 2, 3 r 1 3 4");
    good("two writes at once, in the order that the reads tell", "1 w 1 0 10, 2 w 2 0 10, 3 r 2 11 12");
    good("operations that touch overlap", "1 w 1 0 5, 2 r - 5 6");
    good("a timed-out write that never took effect", "1 w 1 0 1, 2 w 2 2 -, 3 r 1 50 60, 3 r 1 70 80");
    good("a timed-out write that takes effect late", "1 w 1 0 1, 2 w 2 2 -, 3 r 1 50 60, 3 r 2 70 80, 1 r 2 90 91");
    good("and is overwritten", "1 w 1 0 1, 2 w 2 2 -, 3 r 2 3 4, 1 w 3 5 6, 3 r 3 7 8");
    good("a read without an answer says nothing", "1 w 1 0 1, 2 r - 2 -");
}

#[test]
fn planted_violations_are_found_and_shown_by_what_matters() {
    bad("a stale read", "1 w 1 0 1, 2 r 1 2 3, 1 w 2 4 5, 2 r 1 6 7, 2 r 2 8 9", "1 w 1 0 1, 1 w 2 4 5, 2 r 1 6 7");
    bad("a lost write", "1 w 1 0 1, 2 r - 2 3", "1 w 1 0 1, 2 r - 2 3");
    bad(
        "a write seen, then unseen",
        "1 w 1 0 1, 2 w 2 2 20, 3 r 2 3 4, 3 r 1 5 6, 3 r 1 7 8",
        "1 w 1 0 1, 2 w 2 2 20, 3 r 2 3 4, 3 r 1 5 6",
    );
    bad(
        "an effect that comes twice",
        "1 w 1 0 1, 3 r 1 2 3, 2 w 2 4 5, 3 r 2 6 7, 3 r 1 8 9, 3 r 1 10 11",
        "1 w 1 0 1, 2 w 2 4 5, 3 r 1 8 9",
    );
    bad(
        "a timed-out write that comes and goes",
        "1 w 1 0 1, 2 w 2 2 -, 3 r 2 3 4, 3 r 1 5 6",
        "1 w 1 0 1, 2 w 2 2 -, 3 r 2 3 4, 3 r 1 5 6",
    );
    bad("a value that nobody wrote", "1 w 1 0 1, 2 r 9 2 3", "2 r 9 2 3");
    bad("a value before it was written", "1 r 1 0 1, 2 w 1 2 3", "1 r 1 0 1");
    bad(
        "two readers that disagree on the order",
        "1 w 1 0 9, 2 w 2 0 9, 3 r 1 10 11, 4 r 2 12 13",
        "1 w 1 0 9, 2 w 2 0 9, 3 r 1 10 11, 4 r 2 12 13",
    );
}

#[test]
fn a_long_history_is_judged_fast_and_its_fault_shown_small() {
    let mut draw = Draw::new(7);
    let (mut ops, mut now, mut value) = (Vec::new(), 0, None);
    for n in 0..20_000u64 {
        // One instant of effect each, inside an interval that overlaps with those of its neighbours.
        now += 10;
        let client = u32::try_from(n % 6).unwrap();
        let (call_us, back_us) = (now - draw.below(25).min(now), Some(now + draw.below(25)));
        let did = if draw.below(2) == 0 { Did::Write(n) } else { Did::Read(value) };
        if let Did::Write(written) = did {
            value = Some(written);
        }
        ops.push(Op { call_us, back_us, client, did });
    }
    assert_eq!(check(&ops), Verdict::Linearizable);
    let read = ops.iter().rposition(|op| matches!(op.did, Did::Read(Some(n)) if n > 12_000)).unwrap();
    ops[read].did = Did::Read(ops.iter().take(9_000).rev().find_map(|op| match op.did {
        Did::Write(n) => Some(n),
        Did::Read(_) => None,
    }));
    let Verdict::Not(window) = check(&ops) else { panic!("a stale read among 20,000 goes unnoticed") };
    assert!(window.len() <= 4 && window.contains(&ops[read]), "{window:#?}");
}

#[test]
fn too_much_under_way_is_told_and_not_judged() {
    let text: Vec<String> = (0..70).map(|n| format!("{n} w {n} 0 9")).collect();
    assert_eq!(check(&history(&text.join(","))), Verdict::Undecided);
}

/// Tries every order of every choice of unanswered writes.
fn oracle(ops: &[Op], value: Option<u64>) -> bool {
    // Whoever goes first must not have been called after another's answer.
    let open: Vec<&Op> = ops.iter().filter(|op| !matches!((op.did, op.back_us), (Did::Read(_), None))).collect();
    if open.iter().all(|op| op.back_us.is_none()) {
        return true;
    }
    let first_back = open.iter().filter_map(|op| op.back_us).min().unwrap_or(u64::MAX);
    ops.iter().enumerate().any(|(n, op)| {
        let rest = || [&ops[..n], &ops[n + 1..]].concat();
        if op.call_us > first_back {
            return false;
        }
        match (op.did, op.back_us) {
            (Did::Write(written), _) => oracle(&rest(), Some(written)),
            (Did::Read(_), None) => false,
            (Did::Read(read), Some(_)) => read == value && oracle(&rest(), value),
        }
    })
}

#[test]
fn random_histories_are_judged_as_by_trying_every_order() {
    let (mut linearizable, mut not, mut with_unanswered) = (0, 0, 0);
    for seed in 0..30_000 {
        let mut draw = Draw::new(seed);
        let length = 2 + draw.below(6);
        let mut ops = Vec::new();
        for n in 0..length {
            let call_us = draw.below(14);
            let mut back_us = Some(call_us + 1 + draw.below(6));
            let did = if draw.below(2) == 0 {
                back_us = back_us.filter(|_| draw.below(3) > 0);
                // Now and then two writes of one value, which real clients never make.
                Did::Write(if draw.below(12) == 0 { 0 } else { n })
            } else {
                Did::Read(Some(draw.below(length + 1)).filter(|value| *value < length))
            };
            ops.push(Op { call_us, back_us, client: 0, did });
        }
        let expected = oracle(&ops, None);
        let found = check(&ops);
        match &found {
            Verdict::Linearizable => {
                linearizable += 1;
                with_unanswered += u32::from(ops.iter().any(|op| op.back_us.is_none()));
            }
            Verdict::Not(window) => {
                not += 1;
                assert!(!oracle(window, None), "seed {seed}: the window shows nothing: {window:#?}");
                assert!(window.iter().all(|op| ops.contains(op)), "seed {seed}");
            }
            Verdict::Undecided => panic!("seed {seed}"),
        }
        assert_eq!(found == Verdict::Linearizable, expected, "seed {seed}: {ops:#?}");
    }
    assert!(linearizable > 3_000 && not > 3_000 && with_unanswered > 1_000, "{linearizable} {not} {with_unanswered}");
}
