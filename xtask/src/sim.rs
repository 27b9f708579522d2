//! The simulator: built in release, then run in place of this process; and with faults planted, each of which it must find.

use crate::{Stop, cargo};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::Command;

/// Within so many seeds every planted fault must be found.
const SEEDS_MAX: &str = "1000";

/// `cargo xtask sim ...`: the simulator's own arguments, exit code and last line.
pub(crate) fn run(args: &[&str]) -> Result<(), Stop> {
    cargo::cargo(&["build", "--release", "--locked", "-p", "ambit-sim"])?;
    let sim = cargo::root()?.join("target/release/ambit-sim");
    let error = Command::new(&sim).args(args).exec();
    Err(Stop::Failed(format!("{}: {error}", sim.display())))
}

/// Every planted fault, by name: found, or not. The build has a folder of its own, so that nothing else is ever made of it.
pub(crate) fn mutants() -> Result<(), Stop> {
    let sim = build()?;
    let listed = Command::new(&sim).arg("--list-mutants").output();
    let listed = listed.map_err(|e| Stop::Failed(format!("{}: {e}", sim.display())))?;
    let text = String::from_utf8_lossy(&listed.stdout).into_owned();
    let (mut all, mut caught) = (0, 0);
    for (name, what) in text.lines().filter_map(|line| line.split_once(' ')) {
        all += 1;
        let hunt = Command::new(&sim).args(["--mutant", name, "--seeds", SEEDS_MAX]).output();
        let hunt = hunt.map_err(|e| Stop::Failed(format!("{}: {e}", sim.display())))?;
        let said = String::from_utf8_lossy(&hunt.stdout).into_owned();
        let last = said.lines().last().unwrap_or("it said nothing").to_owned();
        caught += usize::from(hunt.status.success());
        println!("{name} ({what}): {last}");
    }
    println!("not yet: old root dropped at once (no root rotates in the simulator: tests/tests/rotation.rs)");
    println!("{all} mutants, {caught} caught");
    if all > 0 && caught == all { Ok(()) } else { Err(Stop::Failed(String::new())) }
}

fn build() -> Result<PathBuf, Stop> {
    let target = cargo::root()?.join("target/planted");
    let status = Command::new("cargo")
        .args(["build", "--release", "--locked", "-p", "ambit-sim"])
        .env("CARGO_TARGET_DIR", &target)
        .env("RUSTFLAGS", "--cfg ambit_mutant")
        .current_dir(cargo::root()?)
        .status();
    match status {
        Ok(status) if status.success() => Ok(target.join("release/ambit-sim")),
        Ok(status) => Err(Stop::Failed(format!("the build with planted faults: {status}"))),
        Err(e) => Err(Stop::Failed(format!("cargo: {e}"))),
    }
}
