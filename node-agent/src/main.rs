//! `ambit-agent run --config FILE`.

use ambit_agent::config::Config;
use ambit_agent::{agent, telemetry};
use anyhow::Context;
use clap::{Parser, Subcommand};
use std::path::PathBuf;
use std::process::ExitCode;
use tokio::signal::unix::{SignalKind, signal};

/// Two: one for the decision loop while another carries; more would cost memory and gain nothing on small nodes.
const WORKERS: usize = 2;

#[derive(Parser)]
#[command(name = "ambit-agent", version, about = "The node agent of Ambit")]
struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Enrols this node and serves its workloads until told to stop.
    Run {
        /// The configuration (TOML).
        #[arg(long)]
        config: PathBuf,
    },
}

fn main() -> ExitCode {
    let Verb::Run { config } = Args::parse().verb;
    telemetry::start_logging();
    match run(&config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // For whoever started us, whatever the log's form: the code first, then what to do.
            eprintln!("ambit-agent: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(path: &std::path::Path) -> anyhow::Result<()> {
    let config = Config::read(path)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .max_blocking_threads(4)
        .enable_all()
        .build()
        .context("no runtime")?;
    runtime.block_on(async {
        let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let stop = async move {
            tokio::select! {
                _ = term.recv() => {}
                _ = int.recv() => {}
            }
        };
        Ok(agent::run(config, stop).await?)
    })
}
