//! What must hold before the lab touches anything: root, and the tools.

use crate::tool::package;
use ambit_model::{Refusal, refusal::Code};
use std::path::{Path, PathBuf};

/// The programs the lab itself runs.
const TOOLS: [&str; 4] = ["ip", "swtpm", "swtpm_setup", "swtpm_localca"];

/// Refuses anyone but root: namespaces, cgroups and BPF pins need it.
pub fn root() -> Result<(), Refusal> {
    let uid = nix::unistd::geteuid();
    if uid.is_root() {
        return Ok(());
    }
    Err(Refusal::new(Code::NeedsRoot, "uid 0, for namespaces, cgroups and BPF pins", format!("uid {uid}")))
}

/// Refuses a machine that lacks a program, naming its package.
pub fn tools() -> Result<(), Refusal> {
    let missing: Vec<String> = TOOLS
        .iter()
        .filter(|tool| find(tool).is_none())
        .map(|tool| format!("{tool} (package {})", package(tool)))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let expected = "the lab's tools on PATH; install them with `cargo xtask deps`";
    Err(Refusal::new(Code::NotFound, expected, format!("missing: {}", missing.join(", "))))
}

/// The program of this name on PATH, or in the folders that root's PATH often lacks.
pub fn find(tool: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|folder| folder.join(tool))
        .find(|file| file.is_file())
}

/// One of our own binaries, beside the running one (`ambitd`, `ambit-agent`, `ambit`, `ambit-lab`).
pub fn own_binary(name: &str) -> Result<PathBuf, Refusal> {
    let missing = |at: String| Refusal::new(Code::NotFound, format!("{name} beside the running program"), at);
    let running = std::env::current_exe().map_err(|e| missing(e.to_string()))?;
    let mut folder = running.parent().unwrap_or(Path::new("/"));
    // A test runs from target/<profile>/deps, one below the binaries.
    if folder.ends_with("deps") {
        folder = folder.parent().unwrap_or(folder);
    }
    let file = folder.join(name);
    if file.is_file() { Ok(file) } else { Err(missing(format!("no {}", file.display()))) }
}
