//! cargo-deny over all dependencies.

use crate::{Stop, cargo};
use std::process::{Command, Stdio};

/// Licences, bans and sources. Advisories are left out: their database lives on no package registry, and a check
/// that cannot be repeated everywhere proves nothing here. See `deny.toml`.
pub(crate) fn run() -> Result<(), Stop> {
    let has = Command::new("cargo").args(["deny", "--version"]).stdout(Stdio::null()).stderr(Stdio::null()).status();
    if !has.is_ok_and(|status| status.success()) {
        cargo::cargo(&["install", "cargo-deny", "--locked"])?;
    }
    cargo::cargo(&["deny", "check", "licenses", "bans", "sources"])
}
