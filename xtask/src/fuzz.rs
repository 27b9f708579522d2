//! Coverage-guided fuzzing of the parsers: `ambit-fuzz-engine` (attestation/verify/fuzz), built with the compiler's
//! coverage instrumentation, one process for each target.

mod report;

use crate::{Stop, cargo};
use report::{Outcome, Row};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Host of the compiler. Named, so that the flags below reach no build script and no macro.
const HOST: &str = "x86_64-unknown-linux-gnu";
/// What libFuzzer needs, all of it in stable rustc: counters, a table of places, comparisons. And what release builds
/// leave out: assertions, and arithmetic that does not wrap.
const FLAGS: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1 -Cdebug-assertions -Coverflow-checks";
/// Corpora, dictionaries and the engine's sources.
const CRATE: &str = "attestation/verify/fuzz";
/// Builds, logs, findings and what mutation collected: apart from all other builds.
const OUT: &str = "target/fuzz";
/// Seconds for each target, however many there are.
const SECONDS_MIN: u64 = 3;
/// Processes at once.
const JOBS: usize = 2;
/// Seconds that one input may take, MiB that one process may take.
const LIMITS: [&str; 2] = ["-timeout=5", "-rss_limit_mb=512"];
/// Seconds in which the planted fault must be found; it takes one.
const CANARY_SECONDS: u64 = 20;

/// Longest input that is added to a committed corpus, in bytes; longer ones are cut.
const MERGED_MAX: usize = 4096;

/// What to do.
pub(crate) struct Options<'a> {
    seconds: u64,
    target: Option<&'a str>,
    merge: bool,
}

impl<'a> Options<'a> {
    /// `--seconds N [--target NAME] [--merge]`, in any order.
    pub(crate) fn parse(args: &[&'a str]) -> Result<Self, Stop> {
        let mut options = Options { seconds: 0, target: None, merge: false };
        let mut rest = args.iter();
        while let Some(option) = rest.next() {
            let mut value = || rest.next().copied().ok_or_else(|| Stop::Usage(format!("{option} wants a value")));
            match *option {
                "--seconds" => {
                    let n = value()?;
                    options.seconds = n.parse().map_err(|_| Stop::Usage(format!("--seconds {n}: not a number")))?;
                }
                "--target" => options.target = Some(value()?),
                "--merge" => options.merge = true,
                other => return Err(Stop::Usage(format!("'{other}' is not an option of fuzz"))),
            }
        }
        if options.seconds == 0 {
            return Err(Stop::Usage("--seconds N: for all targets together, each of them gets 3 at least".into()));
        }
        Ok(options)
    }
}

/// A target, as the engine names it.
struct Target {
    name: String,
    len_max: usize,
}

/// The last line is always the counts, also where it stopped early: then nothing was proven, and it fails.
pub(crate) fn run(args: &[&str]) -> Result<(), Stop> {
    let options = Options::parse(args)?;
    let mut rows = Vec::new();
    let mut crashes = 0;
    let outcome = fuzz(&options, &mut rows, &mut crashes);
    if let Err(Stop::Failed(why)) = &outcome {
        eprintln!("xtask: {why}");
    }
    let executions: u64 = rows.iter().map(|row: &Row| row.executions).sum();
    println!("{executions} executions, {crashes} crashes");
    let proven = !rows.is_empty() && rows.iter().all(|row| row.executions > 0);
    match outcome {
        Ok(()) if crashes == 0 && proven => Ok(()),
        Err(usage @ Stop::Usage(_)) => Err(usage),
        Ok(()) | Err(Stop::Failed(_)) => Err(Stop::Failed(String::new())),
    }
}

fn fuzz(options: &Options<'_>, rows: &mut Vec<Row>, crashes: &mut usize) -> Result<(), Stop> {
    let engine = build()?;
    let targets = targets(&engine, options.target)?;
    canary(&engine)?;
    *crashes += growth(&engine, options.target)?;
    let share = options.seconds.saturating_mul(JOBS.min(targets.len()) as u64) / targets.len() as u64;
    let seconds = share.max(SECONDS_MIN);
    eprintln!("xtask: {} targets, {seconds} s each, {JOBS} at once", targets.len());
    let (next, done) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..JOBS {
            scope.spawn(|| {
                while let Some(target) = targets.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let outcome = drive(&engine, target, seconds);
                    done.lock().unwrap_or_else(|e| e.into_inner()).push((target.name.clone(), outcome));
                }
            });
        }
    });
    let mut outcomes = done.into_inner().unwrap_or_else(|e| e.into_inner());
    outcomes.sort_by_key(|(name, _)| targets.iter().position(|target| target.name == *name));
    println!("{}", report::HEADER);
    for (name, outcome) in outcomes {
        let outcome = outcome?;
        println!("{}", outcome.row);
        if let Some(crash) = &outcome.crash {
            *crashes += 1;
            println!("{}", crash.text(&name, &engine));
        }
        rows.push(outcome.row);
    }
    if options.merge && *crashes == 0 {
        for target in &targets {
            merge(&engine, target)?;
        }
    }
    Ok(())
}

/// Builds the engine: a minute or four at first, then seconds.
fn build() -> Result<PathBuf, Stop> {
    let args = ["build", "--release", "--locked", "-p", "ambit-fuzz", "--features", "engine"];
    let place = ["--target", HOST, "--target-dir", OUT];
    let status = cargo::command("cargo", &[&args[..], &place[..]].concat())?.env("RUSTFLAGS", FLAGS).status();
    match status {
        Ok(status) if status.success() => Ok(cargo::root()?.join(OUT).join(HOST).join("release/ambit-fuzz-engine")),
        Ok(status) => Err(Stop::Failed(format!("building the engine: {status}"))),
        Err(e) => Err(Stop::Failed(format!("cargo: {e}"))),
    }
}

fn failed(what: &str, e: std::io::Error) -> Stop {
    Stop::Failed(format!("{what}: {e}"))
}

/// The engine, told what to do by its variable, at the repository's root.
fn command(engine: &Path, told: &str) -> Result<Command, Stop> {
    let mut command = Command::new(engine);
    // A backtrace of each finding; a proxy or seed of the environment is nobody's concern here.
    command.env("AMBIT_FUZZ", told).env("RUST_BACKTRACE", "1").current_dir(cargo::root()?).stdin(Stdio::null());
    Ok(command)
}

fn targets(engine: &Path, only: Option<&str>) -> Result<Vec<Target>, Stop> {
    let out = command(engine, "list")?.stderr(Stdio::null()).output().map_err(|e| failed("the engine", e))?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let pairs = text.lines().filter_map(|line| line.split_once(' '));
    let all = pairs.filter_map(|(name, max)| Some(Target { name: name.to_owned(), len_max: max.parse().ok()? }));
    let chosen: Vec<_> = all.filter(|target| only.is_none_or(|name| name == target.name)).collect();
    match only {
        Some(name) if chosen.is_empty() => Err(Stop::Usage(format!("--target {name}: one of\n{text}"))),
        None if chosen.is_empty() => Err(Stop::Failed("the engine lists no target".into())),
        Some(_) | None => Ok(chosen),
    }
}

fn folder(of: &str, target: &str) -> Result<PathBuf, Stop> {
    let folder = cargo::root()?.join(OUT).join(of).join(target);
    std::fs::create_dir_all(&folder).map_err(|e| failed(&folder.display().to_string(), e))?;
    Ok(folder)
}

/// A fault is planted in the engine, to be found by coverage only. Where it is not, finding nothing means nothing.
fn canary(engine: &Path) -> Result<(), Stop> {
    let findings = folder("findings", "canary")?;
    let out = command(engine, "canary")?
        .args(LIMITS)
        .arg(format!("-max_total_time={CANARY_SECONDS}"))
        .arg(format!("-artifact_prefix={}/", findings.display()))
        .stdout(Stdio::null())
        .output()
        .map_err(|e| failed("the engine", e))?;
    let log = String::from_utf8_lossy(&out.stderr);
    let outcome = Outcome::read("canary", &log, out.status.code());
    match &outcome.crash {
        Some(crash) if crash.why.contains("the canary is found") => {
            eprintln!("xtask: the planted fault was found in {} executions", outcome.row.executions);
            Ok(())
        }
        _ => Err(Stop::Failed(format!(
            "the planted fault was not found in {CANARY_SECONDS} s: this engine finds nothing"
        ))),
    }
}

/// Time and heap by the size of the input. The engine's exit code is the number of bad rows.
fn growth(engine: &Path, only: Option<&str>) -> Result<usize, Stop> {
    let told = only.map_or("growth".to_owned(), |name| format!("growth {name}"));
    let out = command(engine, &told)?.stderr(Stdio::piped()).stdout(Stdio::inherit()).output();
    let out = out.map_err(|e| failed("the engine", e))?;
    match out.status.code() {
        Some(bad @ 0..=100) if !String::from_utf8_lossy(&out.stderr).contains("panicked") => {
            Ok(usize::try_from(bad).unwrap_or(1))
        }
        _ => {
            eprintln!("{}", String::from_utf8_lossy(&out.stderr));
            println!("measuring growth ended with {}", out.status);
            Ok(1)
        }
    }
}

/// Mutates for so many seconds, from the committed corpus and from what earlier runs collected.
fn drive(engine: &Path, target: &Target, seconds: u64) -> Result<Outcome, Stop> {
    let name = &target.name;
    let collected = folder("collected", name)?;
    let findings = folder("findings", name)?;
    let committed = cargo::root()?.join(CRATE).join("corpus").join(name);
    let dictionary = cargo::root()?.join(CRATE).join("dictionaries").join(name);
    let mut command = command(engine, name)?;
    command
        .args(LIMITS)
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-max_len={}", target.len_max))
        .arg(format!("-artifact_prefix={}/", findings.display()))
        .args(["-print_final_stats=1", "-use_value_profile=1"]);
    if dictionary.exists() {
        command.arg(format!("-dict={}", dictionary.display()));
    }
    let out = command.arg(collected).arg(committed).stdout(Stdio::null()).output();
    let out = out.map_err(|e| failed(name, e))?;
    let log = folder("logs", name)?.join("stderr");
    std::fs::write(&log, &out.stderr).map_err(|e| failed(&log.display().to_string(), e))?;
    Ok(Outcome::read(name, &String::from_utf8_lossy(&out.stderr), out.status.code()))
}

/// Adds to the committed corpus the few collected inputs that reach code which nothing in it reaches.
fn merge(engine: &Path, target: &Target) -> Result<(), Stop> {
    let committed = cargo::root()?.join(CRATE).join("corpus").join(&target.name);
    let out = command(engine, &target.name)?
        .args(LIMITS)
        .args(["-set_cover_merge=1", "-use_counters=0", &format!("-max_len={}", target.len_max.min(MERGED_MAX))])
        .args([committed, folder("collected", &target.name)?])
        .stdout(Stdio::null())
        .output()
        .map_err(|e| failed("the engine", e))?;
    let log = String::from_utf8_lossy(&out.stderr);
    let said = log.lines().rfind(|line| line.starts_with("MERGE-OUTER:")).unwrap_or("no answer");
    eprintln!("xtask: {}: {said}", target.name);
    if out.status.success() { Ok(()) } else { Err(Stop::Failed(format!("merging {}: {}", target.name, out.status))) }
}
