//! Format, lints and every test, ending in one line of counts.

use crate::counts::Counts;
use crate::{Stop, cargo, deps, interop, table};
use std::io::{BufRead, BufReader};
use std::process::{ExitStatus, Stdio};

/// The last line is always the counts, also where it stopped early: then nothing was proven, and it fails.
pub(crate) fn run() -> Result<(), Stop> {
    let mut counts = Counts::default();
    let outcome = checks().and_then(|()| tests(&mut counts));
    if let Err(Stop::Failed(why)) = &outcome {
        eprintln!("xtask: {why}");
    }
    let skipping_fails = cargo::is_ci();
    if counts.skipped > 0 && skipping_fails {
        eprintln!("xtask: tests were skipped, and CI accepts none");
    }
    println!("{counts}");
    let good = outcome.is_ok() && counts.is_good(skipping_fails);
    if good { Ok(()) } else { Err(Stop::Failed(String::new())) }
}

fn checks() -> Result<(), Stop> {
    deps::install(deps::Say::Missing)?;
    interop::install()?;
    cargo::cargo(&["fmt", "--all", "--check"])?;
    cargo::cargo(&["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"])?;
    // Tests start the real binaries.
    cargo::build_binaries()
}

/// One invocation for all, its output passed on line by line as it comes.
fn tests(counts: &mut Counts) -> Result<(), Stop> {
    table::clear()?;
    let args = ["test", "--workspace", "--no-fail-fast"];
    let mut child = cargo::command("cargo", &args)?
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|e| Stop::Failed(format!("cargo test: {e}")))?;
    if let Some(out) = child.stdout.take() {
        for line in BufReader::new(out).split(b'\n') {
            let line = line.map_err(|e| Stop::Failed(format!("reading what cargo test says: {e}")))?;
            let line = String::from_utf8_lossy(&line);
            println!("{line}");
            counts.add(&line);
        }
    }
    let status = child.wait().map_err(|e| Stop::Failed(format!("cargo test: {e}")))?;
    let without_a_row = table::print()?;
    let outcome = judge(status, counts);
    // A case that no test shows any more is a test that is gone.
    counts.failed += without_a_row;
    outcome
}

/// A test program that died before its result line shows only in cargo's status; it must not read as 0 failed.
fn judge(status: ExitStatus, counts: &mut Counts) -> Result<(), Stop> {
    if !status.success() && counts.failed == 0 {
        counts.failed = 1;
        return Err(Stop::Failed(format!(
            "a test did not build, or its program died ({status}); counted as one failed"
        )));
    }
    Ok(())
}
