//! `cargo xtask bench attest`: what attestation costs, as CPU time on one core. Targets are printed, never asserted.
//!
//! It plays the machines (keys in memory instead of TPMs) and, in the first part, the server's services too; in the
//! second part the server is a cell of real processes.

mod cpu;
mod fleet;
mod floor;
mod machine;
mod maker;
mod soft_tpm;
mod stream;
mod table;
mod verifier;

use anyhow::{Result, bail};

/// A benchmark by name, with the number of nodes of its fleet: `attest`, or one part of it.
pub async fn run(name: &str, nodes: usize) -> Result<()> {
    let mut table = table::Table::default();
    if !matches!(name, "attest" | "attest-verifier" | "attest-fleet") {
        bail!("no benchmark '{name}': attest, attest-verifier, attest-fleet");
    }
    if name != "attest-fleet" {
        verifier::run(&mut table)?;
        floor::run(&mut table)?;
    }
    if name != "attest-verifier" {
        fleet::run(&mut table, nodes).await?;
    }
    table.end(name)
}
