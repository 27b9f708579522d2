//! Benchmarks of real processes. Targets are printed, never asserted.
//!
//! `cargo xtask bench attest`: what attestation costs, as CPU time on one core. It plays the machines (keys in memory
//! instead of TPMs) and, in the first part, the server's services too; in the second part the server is a cell of real
//! processes. `cargo xtask bench raft`: a cell beside etcd. `cargo xtask bench issuance`: a cell beside cfssl.

mod cpu;
mod fleet;
mod floor;
mod issuance;
mod machine;
mod raft;
mod stream;
mod table;
mod verifier;

use anyhow::{Result, bail};

/// A benchmark by name: `raft`, `issuance` or `attest`, or one part of it; `nodes` make the fleet of `attest`.
pub async fn run(name: &str, nodes: usize) -> Result<()> {
    let mut table = table::Table::default();
    if matches!(name, "raft" | "raft-load") {
        raft::run(&mut table, name == "raft").await?;
        return table.end(name);
    }
    if name == "issuance" {
        issuance::run(&mut table).await?;
        return table.end(name);
    }
    if !matches!(name, "attest" | "attest-verifier" | "attest-fleet") {
        bail!("no benchmark '{name}': issuance, raft, raft-load, attest, attest-verifier, attest-fleet");
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
