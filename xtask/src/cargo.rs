//! Where the repository is, and programs run in it.

use crate::Stop;
use std::path::PathBuf;
use std::process::Command;

/// The repository's root: cargo tells the folder of this crate to what it runs.
pub(crate) fn root() -> Result<PathBuf, Stop> {
    let here = std::env::var_os("CARGO_MANIFEST_DIR").map(PathBuf::from);
    let root = here.and_then(|xtask| xtask.parent().map(PathBuf::from));
    root.ok_or_else(|| Stop::Failed("start it as `cargo xtask` inside the repository".into()))
}

/// A binary of the workspace: it lies beside this one.
pub(crate) fn binary(name: &str) -> Result<PathBuf, Stop> {
    let me = std::env::current_exe().map_err(|e| Stop::Failed(format!("where am I: {e}")))?;
    Ok(me.with_file_name(name))
}

/// A command at the repository's root, announced on stderr.
pub(crate) fn command(program: &str, args: &[&str]) -> Result<Command, Stop> {
    eprintln!("xtask: {program} {}", args.join(" "));
    let mut command = Command::new(program);
    command.args(args).current_dir(root()?);
    if is_ci() {
        // An incremental cache is never read again there, and costs a third of the disk.
        command.env("CARGO_INCREMENTAL", "0");
    }
    Ok(command)
}

/// Runs a program to its end; anything but 0 is a failure.
pub(crate) fn program(program: &str, args: &[&str]) -> Result<(), Stop> {
    let status = command(program, args)?.status();
    match status {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(Stop::Failed(format!("{program} {}: {status}", args.join(" ")))),
        Err(e) => Err(Stop::Failed(format!("{program}: {e}"))),
    }
}

/// Runs a program to its end and returns what it printed; anything but 0 is a failure.
pub(crate) fn output(program: &str, args: &[&str]) -> Result<String, Stop> {
    match command(program, args)?.output() {
        Ok(output) if output.status.success() => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        Ok(output) => {
            Err(Stop::Failed(format!("{program}: {} {}", output.status, String::from_utf8_lossy(&output.stderr))))
        }
        Err(e) => Err(Stop::Failed(format!("{program}: {e}"))),
    }
}

/// Runs cargo.
pub(crate) fn cargo(args: &[&str]) -> Result<(), Stop> {
    program("cargo", args)
}

/// Builds every binary of the workspace in the one profile that tests, lab and demo share.
pub(crate) fn build_binaries() -> Result<(), Stop> {
    cargo(&["build", "--workspace", "--bins"])
}

/// Whether this runs in continuous integration, where a skipped test is a failed run.
pub(crate) fn is_ci() -> bool {
    std::env::var("CI").is_ok_and(|ci| ci == "true" || ci == "1")
}
