//! Benchmarks of real processes. Targets are printed, never asserted.
//!
//! `cargo xtask bench attest`: what attestation costs, as CPU time on one core. It plays the machines (keys in memory
//! instead of TPMs) and, in the first part, the server's services too; in the second part the server is a cell of real
//! processes. `cargo xtask bench propagation`: from a change to what all agents hold. `cargo xtask bench raft`: a cell beside etcd. `cargo xtask bench issuance`: a cell beside cfssl.

mod cpu;
mod fleet;
mod floor;
mod issuance;
mod machine;
mod propagation;
mod proxy;
mod raft;
mod stream;
mod table;
mod verifier;

use anyhow::{Result, bail};

/// A benchmark by name: `raft`, `issuance`, `propagation` or `attest`, or one part of it; `nodes` make the fleet of `attest` and `propagation`.
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
    if name == "propagation" {
        propagation::run(&mut table, nodes).await?;
        return table.end(name);
    }
    if !matches!(name, "attest" | "attest-verifier" | "attest-fleet") {
        bail!("no benchmark '{name}': issuance, propagation, raft, raft-load, attest, attest-verifier, attest-fleet");
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
