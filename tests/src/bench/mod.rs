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

/// One benchmark by name, with the number of nodes of its fleet.
pub async fn run(name: &str, nodes: usize) -> Result<()> {
    if name != "attest" {
        bail!("no benchmark '{name}': only attest");
    }
    let mut table = table::Table::default();
    verifier::run(&mut table)?;
    floor::run(&mut table)?;
    fleet::run(&mut table, nodes).await?;
    table.end(name)
}
