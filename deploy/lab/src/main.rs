//! `ambit-lab`: the one-machine lab from the command line.

use ambit_lab::fault::Fault;
use ambit_lab::lab::chain;
use ambit_lab::{Lab, LabError, Spec, down, gate, measurer, process};
use ambit_model::refusal::Class;
use clap::{Parser, Subcommand, ValueEnum};
use std::net::SocketAddrV4;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

mod status;

/// The one-machine lab: clusters of network namespaces with software TPMs at a real boot's state.
#[derive(Parser)]
#[command(name = "ambit-lab", version)]
struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Build a lab: network, TPMs, measurers
    Up {
        /// Clusters, each a site with a cell of its own
        #[arg(long, default_value_t = 2)]
        clusters: u8,
        /// Nodes of each cluster
        #[arg(long, default_value_t = 2)]
        nodes: u8,
        /// Federation replicas of each cell: 1, 3 or 5
        #[arg(long, default_value_t = 3)]
        replicas: u8,
        #[command(flatten)]
        lab: Name,
    },
    /// Remove every trace of a lab, also of one that was killed
    Down {
        #[command(flatten)]
        lab: Name,
    },
    /// Show machines, processes, links and faults
    Status {
        #[command(flatten)]
        lab: Name,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Run a command in the namespace of a machine, pod, site, the router or the operator
    Exec {
        #[command(flatten)]
        lab: Name,
        /// `west-n1`, `west-n1-api`, `router`, `operator`, …
        place: String,
        /// The command
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Inject a fault that reverts by its own lease, or end one
    Inject {
        #[command(flatten)]
        lab: Name,
        action: Action,
        /// A process (`west-r1`, `west-n1-agent`), a machine, a site, `router`; a cut also takes `west:east`
        target: String,
        /// When the fault reverts by itself, in seconds
        #[arg(long, default_value = "60s", value_parser = seconds)]
        lease: Duration,
    },
    /// (internal) Stand in for IMA on a node
    #[command(hide = true)]
    Measurer {
        #[arg(long)]
        folder: PathBuf,
        #[arg(long)]
        ima_log: PathBuf,
        #[arg(long, default_value_t = gate::loopback(gate::PORT))]
        tpm: SocketAddrV4,
    },
    /// (internal) Let clients take turns at an swtpm
    #[command(hide = true)]
    TpmGate {
        #[arg(long, default_value_t = gate::loopback(gate::PORT))]
        listen: SocketAddrV4,
        #[arg(long, default_value_t = gate::loopback(gate::SWTPM_PORT))]
        swtpm: SocketAddrV4,
    },
    /// (internal) Revert a fault when its lease ends
    #[command(hide = true)]
    LeaseKeeper {
        #[command(flatten)]
        lab: Name,
        #[arg(long)]
        lease: String,
    },
}

#[derive(clap::Args)]
struct Name {
    /// The lab's name
    #[arg(long = "name", default_value = "demo")]
    name: String,
}

#[derive(Clone, Copy, ValueEnum)]
enum Action {
    /// SIGKILL; the router is killed by its links
    Kill,
    /// SIGSTOP
    Pause,
    /// Take a link down
    Cut,
    /// End every fault on the target
    Restore,
    /// Start dead processes again
    Restart,
}

fn seconds(text: &str) -> Result<Duration, String> {
    let digits = text.strip_suffix('s').unwrap_or(text);
    digits.parse().map(Duration::from_secs).map_err(|_| "a number of seconds, such as 60s".into())
}

fn main() -> ExitCode {
    match run(Args::parse().verb) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {}", chain(&error));
            // ops.md: 4 = denied, 1 = failed.
            ExitCode::from(match &error {
                LabError::Refused(refusal) if refusal.code.class() == Class::Denied => 4,
                _ => 1,
            })
        }
    }
}

fn run(verb: Verb) -> Result<ExitCode, LabError> {
    match verb {
        Verb::Up { clusters, nodes, replicas, lab } => up(&Spec::standard(&lab.name, clusters, nodes, replicas)?)?,
        Verb::Down { lab } => {
            let removed = down::down(&lab.name)?;
            eprintln!("lab {} is gone: {removed}", lab.name);
        }
        Verb::Status { lab, json } => return status::show(&Lab::open(&lab.name)?, json),
        Verb::Exec { lab, place, command } => return Err(exec(&Lab::open(&lab.name)?, &place, &command)),
        Verb::Inject { lab, action, target, lease } => inject(&Lab::open(&lab.name)?, action, &target, lease)?,
        Verb::Measurer { folder, ima_log, tpm } => measurer::Measurer::new(folder, ima_log, tpm)?.run(),
        Verb::TpmGate { listen, swtpm } => {
            let failed = |source| LabError::Io { path: PathBuf::from(listen.to_string()), source };
            gate::serve(listen, swtpm).map_err(failed)?;
        }
        Verb::LeaseKeeper { lab, lease } => Lab::open(&lab.name)?.keep_lease(&lease)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn up(spec: &Spec) -> Result<(), LabError> {
    let start = Instant::now();
    let lab = Lab::up(spec, &|line| eprintln!("  {line}"))?;
    eprintln!("lab {} is up after {:.1} s; try: ambit-lab status", lab.name(), start.elapsed().as_secs_f32());
    Ok(())
}

/// Becomes the command; returns only if that fails.
fn exec(lab: &Lab, place: &str, argv: &[String]) -> LabError {
    let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
    let place = match lab.place(place) {
        Ok(place) => place,
        Err(error) => return error,
    };
    match process::command(lab.name(), &lab.launch(&place, &argv, Path::new("/dev/null"))) {
        Ok(mut command) => {
            let program = argv.first().copied().unwrap_or_default().to_owned();
            process::ProcessError::Start { program, source: command.exec() }.into()
        }
        Err(error) => error.into(),
    }
}

fn inject(lab: &Lab, action: Action, target: &str, lease: Duration) -> Result<(), LabError> {
    let fault = match action {
        Action::Kill => Fault::Kill,
        Action::Pause => Fault::Pause,
        Action::Cut => Fault::Cut,
        Action::Restart => {
            lab.start_again(target)?;
            eprintln!("{target} runs");
            return Ok(());
        }
        Action::Restore => {
            eprintln!("{} faults on {target} ended", lab.restore(target)?);
            return Ok(());
        }
    };
    lab.inject(fault, target, lease)?;
    eprintln!("{fault:?} {target}: reverts by itself in {} s; try: ambit-lab inject restore {target}", lease.as_secs());
    Ok(())
}
