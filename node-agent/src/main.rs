//! `ambit-agent run --config FILE`, `ambit-agent check`, `ambit-agent fetch`.

use ambit_agent::config::Config;
use ambit_agent::{agent, telemetry};
use anyhow::Context;
use clap::{Parser, Subcommand};
use std::path::PathBuf;
use std::process::ExitCode;
use zeroizing_alloc::ZeroAlloc;

/// What is freed is wiped: keys of workloads pass through buffers of libraries that do not.
#[global_allocator]
static ALLOCATOR: ZeroAlloc<std::alloc::System> = ZeroAlloc(std::alloc::System);

/// Two: one for the decision loop while another carries; more would cost memory and gain nothing on small nodes.
const WORKERS: usize = 2;
/// More than all connections and tunnels that are bounded elsewhere.
const DESCRIPTORS_MAX: u64 = 65_536;

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
        /// Takes over from the agent that serves this node, which drains; without one it starts as usual
        #[arg(long)]
        take_over: bool,
    },
    /// Tells what this machine's kernel can do, and what is lost where it cannot; fails where the agent could not run.
    Check {
        /// The node's mesh cgroup: names its processes that hold CAP_NET_RAW or CAP_NET_ADMIN
        #[arg(long, value_name = "CGROUP")]
        mesh: Option<PathBuf>,
    },
    /// Fetches the caller's X.509-SVID over the Workload API, as `spire-agent api fetch x509 -write` does.
    Fetch {
        /// The Workload API's socket.
        #[arg(long)]
        socket: PathBuf,
        /// Folder for svid.pem, svid.key and bundle.pem.
        #[arg(long)]
        out: PathBuf,
    },
}

/// Keys are in this process: it leaves no core, and of other users only root looks into it (prctl(2), PR_SET_DUMPABLE).
fn guard_memory() -> anyhow::Result<()> {
    use rustix::process::{DumpableBehavior, set_dumpable_behavior};
    set_dumpable_behavior(DumpableBehavior::NotDumpable).context("this process cannot keep its memory to itself")
}

fn main() -> ExitCode {
    let outcome = match Args::parse().verb {
        Verb::Run { config, take_over } => {
            telemetry::start_logging();
            run(&config, take_over)
        }
        Verb::Check { mesh } => checked(mesh.as_deref()),
        Verb::Fetch { socket, out } => fetched(&socket, &out),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // For whoever started us, whatever the log's form: the code first, then what to do.
            eprintln!("ambit-agent: {}", told(&error));
            ExitCode::FAILURE
        }
    }
}

/// The error with its causes, none told twice.
fn told(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

fn checked(mesh: Option<&std::path::Path>) -> anyhow::Result<()> {
    use std::io::Write;
    anyhow::ensure!(
        nix::unistd::geteuid().is_root(),
        "[needs_root] run it as root: features are found by loading programs"
    );
    let (text, runs) = ambit_agent::check::told(&ambit_agent::check::features());
    write!(std::io::stdout(), "{text}").context("writing to stdout")?;
    if let Some(mesh) = mesh {
        let found = ambit_agent::privileged::holders(mesh);
        let found = found.with_context(|| format!("[config_invalid] {} is no cgroup to look into", mesh.display()))?;
        write!(std::io::stdout(), "{}", ambit_agent::privileged::told(&found)).context("writing to stdout")?;
    }
    anyhow::ensure!(runs, "[kernel_feature_missing] this kernel lacks what the agent needs: see above");
    Ok(())
}

fn fetched(socket: &std::path::Path, out: &std::path::Path) -> anyhow::Result<()> {
    use std::io::Write;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("no runtime")?;
    let id = runtime.block_on(ambit_agent::fetch::fetch(socket, out))?;
    writeln!(std::io::stdout(), "{id}").context("writing to stdout")
}

/// Each connection of a workload holds three descriptors and each of its streams one, each tunnel one; the usual soft limit
/// is 1024.
fn raise_descriptors() -> anyhow::Result<()> {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).context("the limit of descriptors")?;
    setrlimit(Resource::RLIMIT_NOFILE, hard.min(DESCRIPTORS_MAX), hard).context("the limit of descriptors")
}

fn run(path: &std::path::Path, take_over: bool) -> anyhow::Result<()> {
    guard_memory()?;
    let config = Config::read(path)?;
    raise_descriptors()?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .max_blocking_threads(4)
        .enable_all()
        .build()
        .context("no runtime")?;
    runtime.block_on(async {
        let stop = agent::Stop::listen().context("signals cannot be listened to")?;
        Ok(agent::run(config, take_over, stop).await?)
    })
}
