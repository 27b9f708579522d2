//! `ambit-sim`: seeds in, violations out. `cargo xtask sim` builds and runs it.

use ambit_sim::{Counts, Failure, Simulator};
use std::process::ExitCode;
use std::time::Instant;

/// What is wanted.
struct Wanted {
    seeds: u64,
    from: u64,
    seconds: u64,
    /// One seed, with a trace.
    replay: bool,
    /// Ends with success once a violation is found: for planted faults.
    hunt: bool,
}

fn wanted(args: impl Iterator<Item = String>) -> Result<Wanted, String> {
    let mut wanted = Wanted { seeds: 100, from: 1, seconds: 5, replay: false, hunt: false };
    let mut args = args;
    while let Some(arg) = args.next() {
        let mut number = || -> Result<u64, String> {
            let text = args.next().ok_or_else(|| format!("{arg} needs a number"))?;
            text.parse().map_err(|_| format!("{arg}: '{text}' is no number"))
        };
        match arg.as_str() {
            "--seeds" => wanted.seeds = number()?,
            "--from" => wanted.from = number()?,
            "--seconds" => wanted.seconds = number()?,
            "--seed" => (wanted.from, wanted.seeds, wanted.replay) = (number()?, 1, true),
            "--hunt" => wanted.hunt = true,
            other => return Err(format!("'{other}': expected --seeds, --from, --seconds, --seed or --hunt")),
        }
    }
    Ok(wanted)
}

fn main() -> ExitCode {
    let wanted = match wanted(std::env::args().skip(1)) {
        Ok(wanted) => wanted,
        Err(text) => {
            eprintln!("{text}");
            return ExitCode::from(2);
        }
    };
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
    let (began, mut counts, mut failures) = (Instant::now(), Counts::default(), Vec::<Failure>::new());
    let mut digest = String::new();
    for seed in wanted.from..wanted.from + wanted.seeds {
        match simulator.run(seed, wanted.seconds, wanted.replay) {
            Ok(outcome) => {
                outcome.add_to(&mut counts);
                digest = chain(&digest, &outcome.digest());
            }
            Err(failure) => {
                println!("seed {}: {}", failure.seed, failure.violation);
                println!("  {}", failure.plan);
                println!("  again, with a trace: cargo xtask sim --seed {} --seconds {}", failure.seed, wanted.seconds);
                failures.push(failure);
                if wanted.hunt {
                    break;
                }
            }
        }
    }
    let seconds = began.elapsed().as_secs_f64();
    let (judged, not_yet) = Simulator::scope();
    println!("{counts}");
    println!("judged: {judged}; {not_yet}");
    let each = wanted.seeds as f64 / seconds.max(0.001);
    println!(
        "{each:.0} seeds of {} s a second on one core; digest {}",
        wanted.seconds,
        digest.get(..16).unwrap_or("none")
    );
    if wanted.hunt {
        return hunted(failures.first());
    }
    println!("{} seeds, {} violations", wanted.seeds, failures.len());
    if failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(1) }
}

fn hunted(found: Option<&Failure>) -> ExitCode {
    match found {
        Some(failure) => {
            println!("caught by {} at seed {}", failure.invariant, failure.seed);
            ExitCode::SUCCESS
        }
        None => {
            println!("not caught");
            ExitCode::from(1)
        }
    }
}

/// One digest for all runs, in order.
fn chain(before: &str, next: &str) -> String {
    use sha2::Digest;
    hex::encode(sha2::Sha256::digest(format!("{before}{next}").as_bytes()))
}
