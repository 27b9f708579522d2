//! What the program around libFuzzer does: it is told by one environment variable, since the command line is
//! libFuzzer's.

use crate::{SOON, TARGETS, Target, Verdict, growth, guard};
use std::process::exit;
use std::sync::OnceLock;

/// `list`, `growth`, `growth TARGET`, `canary` or the name of a target.
pub const VARIABLE: &str = "AMBIT_FUZZ";

/// A planted fault: it shows that this engine, so built, finds what is there to find.
static CANARY: Target = Target { name: "canary", len_max: 64, cpu: SOON, heap: |_| 0, run: canary, shapes: &[] };

static CHOSEN: OnceLock<&'static Target> = OnceLock::new();

/// Reads [`VARIABLE`]. Returns only where a target is to be driven.
pub fn begin() {
    let told = std::env::var(VARIABLE).unwrap_or_default();
    match told.split_once(' ').map_or((told.as_str(), None), |(verb, rest)| (verb, Some(rest))) {
        ("list", None) => list(),
        ("growth", only) => report_growth(only),
        (name, None) => match TARGETS.iter().chain([&CANARY]).find(|target| target.name == name) {
            Some(target) => drop(CHOSEN.set(target)),
            None => wrong(&told),
        },
        (_, Some(_)) => wrong(&told),
    }
}

/// Runs the chosen target within its bounds.
pub fn one(input: &[u8]) {
    let target = CHOSEN.get().expect("begin() chose a target");
    guard::run(target, input);
}

fn wrong(told: &str) -> ! {
    let names: Vec<_> = TARGETS.iter().map(|target| target.name).collect();
    eprintln!("{VARIABLE}='{told}': it may be list, growth, canary, or one of {}", names.join(" "));
    exit(2)
}

fn list() -> ! {
    for target in TARGETS {
        println!("{} {}", target.name, target.len_max);
    }
    exit(0)
}

fn report_growth(only: Option<&str>) -> ! {
    println!("{:<16} {:<44} {:>9} {:>10} {:>6} {:>9}", "target", "shape", "bytes", "CPU", "x4", "heap");
    let mut bad = 0;
    for g in growth::all(only) {
        let verdict = if g.is_good() { "" } else { "  TOO MUCH FOR ITS INPUT" };
        let ms = format!("{:.3} ms", g.took.as_secs_f64() * 1e3);
        let kib = format!("{} KiB", g.held / 1024);
        println!("{:<16} {:<44} {:>9} {ms:>10} {:>6.1} {kib:>9}{verdict}", g.target, g.shape, g.bytes, g.times);
        bad += i32::from(!g.is_good());
    }
    exit(bad.min(100))
}

/// Found by coverage only: guessing needs 2^40 attempts.
fn canary(input: &[u8]) -> Verdict {
    for (n, byte) in b"ambit".iter().enumerate() {
        if input.get(n) != Some(byte) {
            return Verdict::Refused;
        }
    }
    panic!("the canary is found, as it must be")
}
