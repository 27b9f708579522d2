//! What `ambit-lab` does, started from here: build first, then become it.

use crate::{Stop, cargo, deps};
use std::os::unix::process::CommandExt;
use std::process::Command;

/// The whole way through on this machine. Its options are checked here too: a typing mistake should not cost a build.
pub(crate) fn demo(options: &[&str]) -> Result<(), Stop> {
    let mut rest = options.iter();
    while let Some(option) = rest.next() {
        let takes_file = match *option {
            "--keep" => false,
            "--json" | "--logs" => true,
            other => return Err(Stop::Usage(format!("'{other}' is not an option of demo"))),
        };
        if takes_file && rest.next().is_none_or(|file| file.starts_with('-')) {
            return Err(Stop::Usage(format!("{option} wants a path")));
        }
    }
    deps::install(deps::Say::Missing)?;
    run(&[&["demo"], options].concat())
}

/// Faults in a lab of its own. The options are checked here too, as the demo's are.
pub(crate) fn chaos(options: &[&str]) -> Result<(), Stop> {
    let wrong = |what: String| {
        Err(Stop::Usage(format!("{what}: chaos takes --smoke, --node [--brief], --outage MINUTES, or --kills N")))
    };
    match options {
        ["--smoke"] | ["--node"] | ["--node", "--brief"] => {}
        ["--outage", minutes] if minutes.parse::<u64>().is_ok() => {}
        ["--kills", rest @ ..] => {
            let (values, names): (Vec<_>, Vec<_>) = rest.iter().enumerate().partition(|(n, _)| n % 2 == 0);
            if let Some((_, name)) = names.iter().find(|(_, name)| !["--seed", "--minutes"].contains(name)) {
                return wrong(format!("'{name}' is not an option of chaos"));
            }
            if values.len() != names.len() + 1 || values.iter().any(|(_, value)| value.parse::<u64>().is_err()) {
                return wrong("each option wants a number".into());
            }
        }
        _ => return wrong(format!("'{}'", options.join(" "))),
    }
    deps::install(deps::Say::Missing)?;
    run(&[&["chaos"], options].concat())
}

/// Builds every binary (the lab starts them) and replaces this process by `ambit-lab` with `args`, so that a
/// terminal's interrupt, the exit code and the last line are the lab's own.
pub(crate) fn run(args: &[&str]) -> Result<(), Stop> {
    cargo::build_binaries()?;
    let lab = cargo::binary("ambit-lab")?;
    let error = Command::new(&lab).args(args).exec();
    Err(Stop::Failed(format!("{}: {error}", lab.display())))
}

/// A benchmark of whole processes: release builds, then the release lab in place of this process.
pub(crate) fn bench(name: &str) -> Result<(), Stop> {
    deps::install(deps::Say::Missing)?;
    let packages = ["-p", "ambitd", "-p", "ambit-agent", "-p", "ambit", "-p", "ambit-lab"];
    cargo::cargo(&[&["build", "--release", "--locked"], &packages[..]].concat())?;
    let lab = cargo::root()?.join("target/release/ambit-lab");
    let error = Command::new(&lab).args(["bench", name]).exec();
    Err(Stop::Failed(format!("{}: {error}", lab.display())))
}

/// What a part of one crate costs, in release: an example of it, `bench_NAME`.
pub(crate) fn bench_of(package: &str, example: &str) -> Result<(), Stop> {
    cargo::cargo(&["build", "--release", "--locked", "-p", package, "--example", example])?;
    let bench = cargo::root()?.join("target/release/examples").join(example);
    let error = Command::new(&bench).exec();
    Err(Stop::Failed(format!("{}: {error}", bench.display())))
}

/// What attestation costs, or a cell beside etcd: release builds, then the benchmark in place of this process. It has its
/// own machines and cells, and needs no lab.
pub(crate) fn bench_cell(args: &[&str]) -> Result<(), Stop> {
    deps::install(deps::Say::Missing)?;
    cargo::cargo(&["build", "--release", "--locked", "-p", "ambitd", "-p", "ambit-tests", "--bins"])?;
    let bench = cargo::root()?.join("target/release/ambit-bench");
    let error = Command::new(&bench).args(args).exec();
    Err(Stop::Failed(format!("{}: {error}", bench.display())))
}

/// What a decision costs in the kernel: a benchmark of one crate, with namespaces and a cgroup of its own.
pub(crate) fn bench_kernel() -> Result<(), Stop> {
    deps::install(deps::Say::Missing)?;
    cargo::cargo(&["bench", "--locked", "-p", "ambit-ebpf", "--bench", "kernel"])
}
