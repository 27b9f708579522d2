//! `ambit-sim`: seeds in, violations out. `cargo xtask sim` builds and runs it.

use ambit_sim::{Counts, Failure, ONE_CELL, Simulator};
use std::collections::{BTreeMap, BTreeSet};
use std::process::ExitCode;
use std::time::Duration;

/// As in `ambitd`: replicas allocate much.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// What is wanted.
struct Wanted {
    seeds: u64,
    from: u64,
    seconds: u64,
    /// One seed, with a trace.
    replay: bool,
    /// A fault to plant; the run ends well once it is found.
    mutant: Option<String>,
    /// Only name the faults that can be planted.
    list: bool,
    /// Only make the cells' cards anew.
    cards: bool,
}

fn wanted(args: impl Iterator<Item = String>) -> Result<Wanted, String> {
    let mut wanted = Wanted { seeds: 100, from: 1, seconds: 5, replay: false, mutant: None, list: false, cards: false };
    let mut args = args;
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--seeds" => wanted.seeds = number(&arg, args.next())?,
            "--from" => wanted.from = number(&arg, args.next())?,
            "--seconds" => wanted.seconds = number(&arg, args.next())?,
            "--seed" => (wanted.from, wanted.seeds, wanted.replay) = (number(&arg, args.next())?, 1, true),
            "--mutant" => wanted.mutant = Some(args.next().ok_or("--mutant needs a name")?),
            "--list-mutants" => wanted.list = true,
            "--make-cards" => wanted.cards = true,
            other => {
                let known = "--seeds, --from, --seconds, --seed, --mutant, --list-mutants or --make-cards";
                return Err(format!("'{other}': expected {known}"));
            }
        }
    }
    Ok(wanted)
}

fn number(of: &str, text: Option<String>) -> Result<u64, String> {
    let text = text.ok_or_else(|| format!("{of} needs a number"))?;
    text.parse().map_err(|_| format!("{of}: '{text}' is no number"))
}

/// Faults that this build can plant: name and what is wrong.
fn mutants() -> Vec<(&'static str, &'static str, &'static str)> {
    #[cfg(ambit_mutant)]
    return ambit_state::mutant::ALL.to_vec();
    #[cfg(not(ambit_mutant))]
    Vec::new()
}

fn plant(name: &str) -> bool {
    #[cfg(ambit_mutant)]
    return ambit_state::mutant::plant(name);
    #[cfg(not(ambit_mutant))]
    {
        let _ = name;
        false
    }
}

fn main() -> ExitCode {
    let wanted = match wanted(std::env::args().skip(1)) {
        Ok(wanted) => wanted,
        Err(text) => {
            eprintln!("{text}");
            return ExitCode::from(2);
        }
    };
    if wanted.list {
        for (name, oracles, what) in mutants() {
            println!("{name} {what} [{oracles}]");
        }
        return ExitCode::SUCCESS;
    }
    if wanted.cards {
        return match ambit_sim::cards_made() {
            Ok(lines) => {
                print!("{lines}");
                ExitCode::SUCCESS
            }
            Err(refusal) => {
                eprintln!("{refusal}");
                ExitCode::from(1)
            }
        };
    }
    if let Some(name) = &wanted.mutant
        && !plant(name)
    {
        eprintln!("'{name}' cannot be planted in this build: `cargo xtask sim --mutants` makes one that can");
        return ExitCode::from(2);
    }
    if wanted.replay && std::env::var_os("RUST_LOG").is_some() {
        // What the replicas themselves say, between the lines of the trace.
        tracing_subscriber::fmt()
            .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
            .without_time()
            .init();
    }
    let simulator = match Simulator::new() {
        Ok(simulator) => simulator,
        Err(text) => {
            eprintln!("{text}");
            return ExitCode::from(1);
        }
    };
    hunt(&simulator, &wanted)
}

/// Seeds of one cell that a core is to make a second.
const SPEED: f64 = 100.0;

/// Runs of a kind: how many, and how long they had a core.
type Speed = BTreeMap<&'static str, (u64, Duration)>;

/// Seed after seed; with a fault planted, until it is found.
fn hunt(simulator: &Simulator, wanted: &Wanted) -> ExitCode {
    let (mut counts, mut failures) = (Counts::default(), Vec::<Failure>::new());
    let (mut digest, mut speed) = (String::new(), Speed::new());
    let mut others = BTreeSet::new();
    for seed in wanted.from..wanted.from + wanted.seeds {
        let began = on_core();
        match simulator.run(seed, wanted.seconds, wanted.replay) {
            Ok(outcome) => {
                let (seeds, took) = speed.entry(outcome.kind()).or_default();
                (*seeds, *took) = (*seeds + 1, *took + on_core().saturating_sub(began));
                outcome.add_to(&mut counts);
                digest = chain(&digest, &outcome.digest());
            }
            Err(failure) => {
                if let Some(name) = &wanted.mutant {
                    // Another oracle, or raft's own panic, may see it first: that is not what shows that this one would.
                    let of = mutants().into_iter().find(|(known, ..)| known == name).map_or("", |(_, of, _)| of);
                    if !of.split(' ').any(|one| one == failure.invariant) {
                        others.insert(failure.invariant);
                        continue;
                    }
                    println!("caught by {} at seed {}: {}", failure.invariant, failure.seed, failure.violation);
                    return ExitCode::SUCCESS;
                }
                println!("seed {}: {}", failure.seed, failure.violation);
                println!("  {}", failure.plan);
                println!("  again, with a trace: cargo xtask sim --seed {} --seconds {}", failure.seed, wanted.seconds);
                failures.push(failure);
            }
        }
    }
    summary(&counts, &speed, &digest, wanted.seconds);
    if wanted.mutant.is_some() {
        println!("not caught in {} seeds by the oracle that should; by others: {others:?}", wanted.seeds);
        return ExitCode::from(1);
    }
    println!("{} seeds, {} violations", wanted.seeds, failures.len());
    if failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(1) }
}

fn summary(counts: &Counts, speed: &Speed, digest: &str, seconds: u64) {
    let [judged, elsewhere, not_yet] = Simulator::scope();
    println!("{counts}");
    println!("judged: {judged}");
    println!("{elsewhere}");
    println!("{not_yet}");
    for (what, (seeds, took)) in speed {
        let each = *seeds as f64 / took.as_secs_f64().max(0.001);
        let target = match *what {
            ONE_CELL if each >= SPEED => format!(", target {SPEED}: met"),
            ONE_CELL => format!(", target {SPEED}: missed"),
            _ => String::new(),
        };
        println!("{what}: {seeds} seeds of {seconds} s, {each:.0} a second of one core{target}");
    }
    println!("digest {}", digest.get(..16).unwrap_or("none"));
}

/// Time that this thread had a core, as Linux counts it: what others do on the machine does not make a seed slower.
fn on_core() -> Duration {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    Duration::from_nanos(text.split(' ').next().and_then(|n| n.parse().ok()).unwrap_or(0))
}

/// One digest for all runs, in order.
fn chain(before: &str, next: &str) -> String {
    use sha2::Digest;
    hex::encode(sha2::Sha256::digest(format!("{before}{next}").as_bytes()))
}
