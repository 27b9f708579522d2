//! `ambit-lab`: the one-machine lab from the command line.

use ambit_lab::fault::Fault;
use ambit_lab::lab::chain;
use ambit_lab::{
    Lab, LabError, Place, Spec, down, gate, guardian, load, measurer, preflight, probe, process, relay, streams,
};
use ambit_model::refusal::Class;
use clap::{Parser, Subcommand, ValueEnum};
use std::net::SocketAddrV4;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

mod status;

/// Room for the log of a cell that drills write to, and soon full.
const SMALL_DISK_MIB: u64 = 96;

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
        /// Also form the cells, register the clusters and start the agents
        #[arg(long)]
        cells: bool,
        /// A small disk for a replica (`west-r3`), which the drill disk-full fills; repeat for more
        #[arg(long, value_name = "REPLICA")]
        small_disk: Vec<String>,
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
        /// A process (`west-r1`, `west-n1-agent`), a machine, a site, `router`; a cut also takes `west:east`, and `west-r1>west-r2` for one way
        target: String,
        /// When the fault reverts by itself, as 60s or 1500ms
        #[arg(long, default_value = "60s", value_parser = duration)]
        lease: Duration,
    },
    /// Call a service from inside a pod at a fixed rate; one line of JSON per call
    Probe {
        #[command(flatten)]
        lab: Name,
        /// `east-n1-web`
        #[arg(long)]
        pod: String,
        /// Address and port
        #[arg(long)]
        target: SocketAddrV4,
        #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=60_000))]
        interval_ms: u64,
    },
    /// (internal) The probe, once it is inside the pod
    #[command(hide = true)]
    ProbeInside {
        target: SocketAddrV4,
        interval_ms: u64,
        /// The user to become
        uid: Option<u32>,
    },
    /// (internal) Many streams of the Workload API, once it is inside the pod
    #[command(hide = true)]
    StreamsInside { socket: PathBuf, count: usize },
    /// (internal) What the dataplane benchmark loads, once it is in its place
    #[command(hide = true)]
    LoadServer,
    /// (internal) The load, once it is in its place
    #[command(hide = true)]
    Load { kind: load::Kind, to: SocketAddrV4, clients: usize, ms: u64 },
    /// (internal) A relay that only copies, from each first address here to its second in a namespace
    #[command(hide = true)]
    BareRelay {
        namespace: String,
        #[arg(required = true, value_parser = pair)]
        pairs: Vec<(SocketAddrV4, SocketAddrV4)>,
    },
    /// Show the main job: two attested clusters, a call, a denial, a policy change, two drills
    Demo {
        #[command(flatten)]
        lab: Name,
        /// Write every figure of the closing table to this file
        #[arg(long)]
        json: Option<PathBuf>,
        /// Leave the lab running and print commands to explore it
        #[arg(long)]
        keep: bool,
        /// Copy the logs of all its processes to this folder, before the lab is taken down
        #[arg(long)]
        logs: Option<PathBuf>,
    },
    /// Run the drills of deploy/drills, or these, in a lab of its own; every report is verified
    Drills {
        /// As their files are named
        drills: Vec<String>,
        /// Keep every report here, and a page of it
        #[arg(long, value_name = "FOLDER")]
        reports: Option<PathBuf>,
        /// The lab's name
        #[arg(long = "name", visible_alias = "lab", default_value = "drills")]
        name: String,
    },
    /// Boot a node as a machine of its own, under QEMU, and show that an altered file costs it its standing
    Vm {
        /// The lab's name
        #[arg(long = "name", visible_alias = "lab", default_value = "vm")]
        name: String,
        /// Folder of the unpacked Debian packages that `cargo xtask vm` fetches
        #[arg(long)]
        debian: PathBuf,
    },
    /// Kill processes of a lab of its own under clients that write and read, and judge what they saw
    Chaos {
        /// Each kind of process once, under writes and calls
        #[arg(long, required_unless_present_any = ["kills", "outage", "node"], conflicts_with_all = ["kills", "seed", "minutes"])]
        smoke: bool,
        /// Tables swapped, agents killed and upgraded, under load
        #[arg(long, conflicts_with_all = ["smoke", "outage", "kills", "seed", "minutes"])]
        node: bool,
        /// The same in less than a minute
        #[arg(long, requires = "node")]
        brief: bool,
        /// No node hears its cell for so many minutes
        #[arg(long, conflicts_with_all = ["smoke", "kills", "seed", "minutes"],
              value_parser = clap::value_parser!(u64).range(1..=50))]
        outage: Option<u64>,
        /// So many kills of replicas, and other faults, at random
        #[arg(long, value_parser = clap::value_parser!(u32).range(1..=10_000))]
        kills: Option<u32>,
        /// What the faults are drawn from; another each time
        #[arg(long)]
        seed: Option<u64>,
        /// No fault begins after so many minutes
        #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..=60))]
        minutes: u64,
        /// The lab's name
        #[arg(long = "name", visible_alias = "lab", default_value = "chaos")]
        name: String,
    },
    /// (internal) Take a lab down when the process that brought it up is gone
    #[command(hide = true)]
    Guardian {
        #[command(flatten)]
        lab: Name,
        #[arg(long)]
        parent: i32,
    },
    /// Measure whole processes in a lab of their own
    Bench {
        /// What to measure
        #[arg(value_parser = ["memory", "revoke", "deny", "streams", "dataplane", "failover"])]
        name: String,
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
    #[arg(long = "name", visible_alias = "lab", default_value = "demo")]
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
    /// Leave no space on the small disk of a replica (up --small-disk)
    Fill,
    /// Ban the node of a machine
    Ban,
    /// Run a file on a machine that no policy knows
    Alter,
    /// End every fault on the target
    Restore,
    /// Start dead processes again
    Restart,
}

fn duration(text: &str) -> Result<Duration, String> {
    let (digits, unit) = match text.strip_suffix("ms") {
        Some(digits) => (digits, Duration::from_millis as fn(u64) -> Duration),
        None => (text.strip_suffix('s').unwrap_or(text), Duration::from_secs as fn(u64) -> Duration),
    };
    digits.parse().map(unit).map_err(|_| "a time such as 60s or 1500ms".into())
}

fn pair(text: &str) -> Result<(SocketAddrV4, SocketAddrV4), String> {
    let (from, to) = text.split_once('>').ok_or("two addresses, as 127.0.0.1:1>10.0.0.1:2")?;
    let address = |text: &str| text.parse().map_err(|e| format!("{text}: {e}"));
    Ok((address(from)?, address(to)?))
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
        Verb::Up { clusters, nodes, replicas, cells, small_disk, lab } => {
            up(&Spec::standard(&lab.name, clusters, nodes, replicas)?, cells, &small_disk)?;
        }
        Verb::Down { lab } => {
            let removed = down::down(&lab.name)?;
            eprintln!("lab {} is gone: {removed}", lab.name);
        }
        Verb::Status { lab, json } => return status::show(&Lab::open(&lab.name)?, json),
        Verb::Exec { lab, place, command } => return Err(exec(&Lab::open(&lab.name)?, &place, &command)),
        Verb::Inject { lab, action, target, lease } => inject(&Lab::open(&lab.name)?, action, &target, lease)?,
        Verb::Probe { lab, pod, target, interval_ms } => {
            return Err(probe(&Lab::open(&lab.name)?, &pod, target, interval_ms));
        }
        Verb::ProbeInside { target, interval_ms, uid } => probe_inside(target, interval_ms, uid)?,
        Verb::StreamsInside { socket, count } => streams::run(&socket, count)?,
        Verb::LoadServer => load::serve().map_err(load_failed)?,
        Verb::Load { kind, to, clients, ms } => {
            load::run(kind, to, clients, Duration::from_millis(ms)).map_err(load_failed)?;
        }
        Verb::BareRelay { namespace, pairs } => relay::run(namespace, &pairs).map_err(load_failed)?,
        Verb::Demo { lab, json, keep, logs } => {
            let (json, logs) = (json.as_deref(), logs.as_deref());
            ambit_lab::demo::run(&ambit_lab::demo::Options { name: &lab.name, json, keep, logs })?;
        }
        Verb::Drills { drills, reports, name } => ambit_lab::library::run(&name, &drills, reports.as_deref())?,
        Verb::Vm { name, debian } => ambit_lab::vm::run(&ambit_lab::vm::Options { name: &name, debian: &debian })?,
        Verb::Chaos { outage: Some(minutes), name, .. } => {
            ambit_lab::chaos::outage::run(&name, Duration::from_secs(minutes * 60))?;
        }
        Verb::Chaos { node: true, brief, name, .. } => {
            let options = ambit_lab::chaos::node::Options::FULL;
            ambit_lab::chaos::node::run(&name, if brief { ambit_lab::chaos::node::Options::BRIEF } else { options })?;
        }
        Verb::Chaos { smoke: _, kills: None, name, .. } => ambit_lab::chaos::run(&name)?,
        Verb::Chaos { kills: Some(kills), seed, minutes, name, .. } => {
            let (seed, limit) = (seed.unwrap_or_else(any_seed), Duration::from_secs(minutes * 60));
            ambit_lab::chaos::long::run(&ambit_lab::chaos::long::Options { name: &name, kills, seed, limit })?;
        }
        Verb::Guardian { lab, parent } => guardian::guard(&lab.name, parent)?,
        Verb::Bench { name } => match name.as_str() {
            "revoke" => ambit_lab::bench::revoke()?,
            "deny" => ambit_lab::bench::deny()?,
            "streams" => ambit_lab::bench::streams()?,
            "dataplane" => ambit_lab::bench::dataplane()?,
            "failover" => ambit_lab::bench::failover()?,
            _ => ambit_lab::bench::memory()?,
        },
        Verb::Measurer { folder, ima_log, tpm } => measurer::Measurer::new(folder, ima_log, tpm)?.run(),
        Verb::TpmGate { listen, swtpm } => {
            let failed = |source| LabError::Io { path: PathBuf::from(listen.to_string()), source };
            gate::serve(listen, swtpm).map_err(failed)?;
        }
        Verb::LeaseKeeper { lab, lease } => Lab::open(&lab.name)?.keep_lease(&lease)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn load_failed(source: std::io::Error) -> LabError {
    LabError::Io { path: "load of the dataplane benchmark".into(), source }
}

/// Short enough to be typed again.
fn any_seed() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::from(now.subsec_nanos() ^ std::process::id())
}

fn up(spec: &Spec, cells: bool, small_disks: &[String]) -> Result<(), LabError> {
    let start = Instant::now();
    let tell = |line: &str| eprintln!("  {line}");
    let lab = Lab::up(spec, &tell)?;
    small_disks.iter().try_for_each(|role| lab.make_small_disk(role, SMALL_DISK_MIB))?;
    if cells {
        lab.form_all(&tell)?;
    }
    eprintln!("lab {} is up after {:.1} s; try: ambit-lab status", lab.name(), start.elapsed().as_secs_f32());
    Ok(())
}

fn exec(lab: &Lab, place: &str, argv: &[String]) -> LabError {
    let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
    match lab.place(place) {
        Ok(place) => become_command(lab, &place, &argv),
        Err(error) => error,
    }
}

/// The probe enters the pod as root and takes the pod's user itself: its file may lie where that user cannot read.
fn probe(lab: &Lab, pod: &str, target: SocketAddrV4, interval_ms: u64) -> LabError {
    let inside = || -> Result<LabError, LabError> {
        let mut place = lab.place(pod)?;
        let program = preflight::own_binary("ambit-lab")?.display().to_string();
        let (target, interval) = (target.to_string(), interval_ms.to_string());
        let uid = place.uid.take().map(|uid| uid.to_string());
        let mut argv = vec![program.as_str(), "probe-inside", &target, &interval];
        argv.extend(uid.as_deref());
        Ok(become_command(lab, &place, &argv))
    };
    inside().unwrap_or_else(|error| error)
}

fn probe_inside(target: SocketAddrV4, interval_ms: u64, uid: Option<u32>) -> Result<(), LabError> {
    let failed = |source: std::io::Error| LabError::Io { path: PathBuf::from(target.to_string()), source };
    if let Some(uid) = uid {
        nix::unistd::setgroups(&[])
            .and_then(|()| nix::unistd::setgid(uid.into()))
            .and_then(|()| nix::unistd::setuid(uid.into()))
            .map_err(|e| failed(e.into()))?;
    }
    probe::run(target, Duration::from_millis(interval_ms)).map_err(failed)
}

/// Becomes the command; returns only if that fails.
fn become_command(lab: &Lab, place: &Place, argv: &[&str]) -> LabError {
    match process::command(lab.name(), &lab.launch(place, argv, Path::new("/dev/null"))) {
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
        Action::Fill => Fault::Fill,
        Action::Ban => Fault::Ban,
        Action::Alter => Fault::Alter,
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
