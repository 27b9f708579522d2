//! `ambit-bench attest [NODES]`, `ambit-bench raft` and `ambit-bench issuance`, started by `cargo xtask bench`.
#![forbid(unsafe_code)]

use anyhow::{Context, Result};

/// The fleet that issue B names.
const NODES: usize = 10_000;

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let name = args.first().context("usage: ambit-bench raft | issuance | attest [NODES]")?;
    let nodes = args.get(1).map_or(Ok(NODES), |n| n.parse()).context("a number of nodes")?;
    ambit_tests::bench::run(name, nodes).await
}
