//! `ambit-bench attest [NODES]`, `ambit-bench propagation [NODES]`, `ambit-bench raft` and `ambit-bench issuance`, started by `cargo xtask bench`.
#![forbid(unsafe_code)]

use anyhow::{Context, Result};

/// The fleets that issues B and E name.
const NODES: usize = 10_000;
const STREAMS: usize = 1_000;

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let name = args.first().context("usage: ambit-bench raft | issuance | attest [NODES] | propagation [NODES]")?;
    let default = if name == "propagation" { STREAMS } else { NODES };
    let nodes = args.get(1).map_or(Ok(default), |n| n.parse()).context("a number of nodes")?;
    ambit_tests::bench::run(name, nodes).await
}
