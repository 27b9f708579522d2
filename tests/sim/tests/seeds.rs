//! A few seeds of the simulator at every test run; thousands are `cargo xtask sim`.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test says that it failed by panicking")]

use ambit_sim::{Counts, Simulator};

const SECONDS: u64 = 3;

#[test]
fn forty_seeds_hold_every_invariant_that_is_judged() {
    let simulator = Simulator::new().unwrap();
    let mut counts = Counts::default();
    for seed in 1..=40 {
        match simulator.run(seed, SECONDS, false) {
            Ok(outcome) => outcome.add_to(&mut counts),
            Err(failure) => panic!("seed {}: {} ({})", failure.seed, failure.violation, failure.plan),
        }
    }
    println!("{counts}");
    assert!(counts.imports() > 0 && counts.lies() > 0, "some of the runs are of several cells");
}

#[test]
fn a_seed_is_one_run() {
    let simulator = Simulator::new().unwrap();
    let digests = |seed| {
        [0; 2].map(|_| simulator.run(seed, SECONDS, false).map(|outcome| outcome.digest()).map_err(|f| f.violation))
    };
    let mut seen = std::collections::BTreeSet::new();
    for seed in [1, 2, 3, 8] {
        let [first, again] = digests(seed);
        assert_eq!(first, again, "seed {seed}");
        assert!(seen.insert(first.unwrap()), "another seed is another run");
    }
}

/// Cells that know each other, one of which begins anew: its root, and every signature, is in the entries.
const BETWEEN_CELLS: &str = "24";

#[test]
fn a_seed_is_the_same_run_in_another_process() {
    let digest = || {
        let out = std::process::Command::new(env!("CARGO_BIN_EXE_ambit-sim"))
            .args(["--seed", BETWEEN_CELLS])
            .output()
            .unwrap();
        let text = String::from_utf8(out.stdout).unwrap();
        assert!(text.contains("begins anew") && text.contains("1 seeds, 0 violations"), "{text}");
        text.lines().find(|line| line.starts_with("digest ")).unwrap().to_owned()
    };
    assert_eq!(digest(), digest());
}
