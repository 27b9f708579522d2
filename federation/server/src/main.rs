//! The command line of a federation replica.

#[cfg(ambit_mutant)]
compile_error!("faults are planted for the simulator only: no ambitd is built with them");

use ambit_identity::keys::csr_from_pem;
use ambit_model::{Code, ObjectName, Refusal, TrustDomain};
use ambitd::config::Config;
use ambitd::replica::{found, local, recover, restore, run};
use ambitd::services::parse_fingerprint;
use clap::{Parser, Subcommand};
use std::io::IsTerminal;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use zeroizing_alloc::ZeroAlloc;

/// Half of what a replica does between two syncs is to allocate what the next entry replaces: with the C library's
/// allocator that took a fifth more CPU time, and memory grew with every snapshot. What is freed is wiped: keys pass through
/// buffers of libraries that do not.
#[global_allocator]
static ALLOCATOR: ZeroAlloc<tikv_jemallocator::Jemalloc> = ZeroAlloc(tikv_jemallocator::Jemalloc);

/// Of what is read for `ambitd admin`; what is longer is cut and does not parse.
const FILE_BYTES_MAX: u64 = 16 * 1024;

/// A replica of an Ambit cell: Raft, identity, policy, federation.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Found a cell: root, first replica, administrator.
    Init {
        /// Configuration file (TOML).
        #[arg(long)]
        config: PathBuf,
        /// The trust domain of the cell.
        #[arg(long)]
        trust_domain: TrustDomain,
        /// This replica's number.
        #[arg(long, default_value_t = 1)]
        replica: u64,
        /// Folder for the administrator's context, certificate and key.
        #[arg(long)]
        admin_out: PathBuf,
    },
    /// Join a cell with a one-time token; `run` afterwards.
    Join {
        /// Configuration file (TOML).
        #[arg(long)]
        config: PathBuf,
        /// The trust domain of the cell.
        #[arg(long)]
        trust_domain: TrustDomain,
        /// This replica's number, as in the token.
        #[arg(long)]
        replica: u64,
        /// ip:port of the replica that keeps the root.
        #[arg(long)]
        via: SocketAddr,
        /// The root's fingerprint (64 hex digits), compared out of band.
        #[arg(long)]
        fingerprint: String,
        /// The token from `ambit raft add`.
        #[arg(long)]
        token: String,
    },
    /// Begin the cell anew on an empty machine, from a backup (`ambit raft snapshot --out`) and the root's key; `run`
    /// afterwards. What was lost since the backup stays lost.
    Restore {
        /// Configuration file (TOML).
        #[arg(long)]
        config: PathBuf,
        /// The backup.
        #[arg(long, value_name = "FILE")]
        snapshot: PathBuf,
        /// The trust domain of the cell.
        #[arg(long)]
        trust_domain: TrustDomain,
        /// The root's fingerprint (64 hex digits), from elsewhere than the backup.
        #[arg(long)]
        fingerprint: String,
        /// The root's private key, kept apart from backups: `identity/root.key` of the replica that kept the root.
        #[arg(long, value_name = "FILE", required_unless_present = "shares", conflicts_with = "shares")]
        root_key: Option<PathBuf>,
        /// Recovery shares of the root's key (`ambit trust shares`), each as its holder opened it, mode 0600.
        #[arg(long, value_name = "FILE", num_args = 1..)]
        shares: Vec<PathBuf>,
        /// This replica's number.
        #[arg(long, default_value_t = 1)]
        replica: u64,
        /// The highest epoch that the cell ever showed (`ambit raft status`), where that is not in what it begins with: it was
        /// restored or recovered since.
        #[arg(long, default_value_t = 0)]
        past_epoch: u64,
        /// Where the certificate of the cell's authority under an external root ended: what the CA made of its key once more, as
        /// for `ambit trust external import`.
        #[arg(long, value_name = "FILE")]
        external_certificate: Option<PathBuf>,
        /// Folder for the administrator's context, certificate and key.
        #[arg(long)]
        admin_out: PathBuf,
    },
    /// Let this stopped replica go on alone, where the majority of the cell is lost for good. Prints what it found, and
    /// does nothing without the last option; `run` afterwards.
    Recover {
        /// Configuration file (TOML).
        #[arg(long)]
        config: PathBuf,
        /// The numbers of all other replicas, which are given up with whatever only they acknowledged.
        #[arg(long = "i-accept-the-loss-of", value_name = "N,N", value_delimiter = ',')]
        accepted: Option<Vec<u64>>,
        /// The highest epoch that the cell ever showed (`ambit raft status`), where that is not in what it begins with: it was
        /// restored or recovered since.
        #[arg(long, default_value_t = 0)]
        past_epoch: u64,
        /// As of `restore`.
        #[arg(long, value_name = "FILE")]
        external_certificate: Option<PathBuf>,
    },
    /// What only a replica's own machine may ask.
    #[command(subcommand)]
    Admin(Admin),
    /// Serve.
    Run {
        /// Configuration file (TOML).
        #[arg(long)]
        config: PathBuf,
    },
}

#[derive(Subcommand)]
enum Admin {
    /// Certify an administrator for 8 h, where none has a certificate left to ask with: asks the replica that runs here.
    /// Prints the proposal that an approver is to sign (`ambit approve`); with what he signed, the certificate.
    BreakGlass {
        /// Configuration file (TOML) of the replica that runs.
        #[arg(long)]
        config: PathBuf,
        /// The administrator, who has a role.
        name: ObjectName,
        /// The request for the key (PEM, `ambit admin request`).
        #[arg(long, value_name = "FILE")]
        csr: PathBuf,
        /// What an approver signed.
        #[arg(long = "approval", value_name = "FILE")]
        approvals: Vec<PathBuf>,
    },
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    logging();
    if let Err(error) = guard_memory() {
        eprintln!("error: this process cannot keep its memory to itself: {error}");
        return ExitCode::FAILURE;
    }
    // Two cores are the yardstick; Raft has a thread of its own.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let outcome = match runtime {
        Ok(runtime) => runtime.block_on(execute(cli.verb)),
        Err(e) => Err(Refusal::new(Code::Internal, "a runtime", e.to_string())),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(refusal) => {
            eprintln!(
                "error[{}]: expected {}, found {}\ntry: {}",
                refusal.code,
                refusal.expected,
                refusal.found,
                refusal.code.remedy()
            );
            ExitCode::FAILURE
        }
    }
}

/// Keys are in this process: it leaves no core, and of other users only root looks into it (prctl(2), PR_SET_DUMPABLE).
fn guard_memory() -> std::io::Result<()> {
    use rustix::process::{DumpableBehavior, set_dumpable_behavior};
    Ok(set_dumpable_behavior(DumpableBehavior::NotDumpable)?)
}

async fn execute(verb: Verb) -> Result<(), Refusal> {
    match verb {
        Verb::Init { config, trust_domain, replica, admin_out } => {
            let print = found::init(&Config::load(&config)?, &trust_domain, replica, &admin_out).await?;
            say(format_args!("root fingerprint: {}", hex::encode(print)))
        }
        Verb::Join { config, trust_domain, replica, via, fingerprint, token } => {
            let config = Config::load(&config)?;
            let print = parse_fingerprint(&fingerprint)?;
            let join = found::Join { trust_domain: &trust_domain, fingerprint: print, via, replica, token: &token };
            found::join(&config, &join).await
        }
        Verb::Restore {
            config,
            snapshot,
            trust_domain,
            fingerprint,
            root_key,
            shares,
            replica,
            past_epoch,
            external_certificate,
            admin_out,
        } => {
            let restored = restore::restore(
                &Config::load(&config)?,
                &restore::Restore {
                    trust_domain: &trust_domain,
                    fingerprint: parse_fingerprint(&fingerprint)?,
                    snapshot: &snapshot,
                    root_key: root_key.as_deref().map_or(restore::RootKey::Shares(&shares), restore::RootKey::File),
                    past_epoch,
                    replica,
                    external: external_certificate.as_deref(),
                    admin_out: &admin_out,
                },
            )
            .await?;
            say(format_args!("{restored}"))
        }
        Verb::Recover { config, accepted, past_epoch, external_certificate } => {
            let found = |findings: &recover::Findings| say(format_args!("{findings}\n"));
            let (config, external) = (Config::load(&config)?, external_certificate.as_deref());
            let recovered = recover::recover(&config, accepted.as_deref(), past_epoch, external, found).await?;
            say(format_args!("{recovered}"))
        }
        Verb::Admin(Admin::BreakGlass { config, name, csr, approvals }) => {
            break_glass(&Config::load(&config)?, name, &csr, &approvals).await
        }
        Verb::Run { config } => {
            let config = Config::load(&config)?;
            let (tell, stop) = watch::channel(false);
            let mut terminate = signal(SignalKind::terminate())
                .map_err(|e| Refusal::new(Code::Internal, "a signal handler", e.to_string()))?;
            tokio::spawn(async move {
                tokio::select! {
                    _ = terminate.recv() => {}
                    _ = tokio::signal::ctrl_c() => {}
                }
                let _ = tell.send(true);
            });
            run::run(&config, stop).await
        }
    }
}

async fn break_glass(config: &Config, admin: ObjectName, csr: &Path, files: &[PathBuf]) -> Result<(), Refusal> {
    let csr = csr_from_pem(&text(csr)?)?;
    let approvals = files.iter().map(|file| Ok((file.display().to_string(), text(file)?)));
    let approvals = approvals.collect::<Result<_, Refusal>>()?;
    match local::ask(&config.data_dir, &local::Asked { admin, csr, approvals }).await? {
        local::Answer::Proposal(text) => {
            eprintln!("an approver is to sign this (ambit approve); give what he signed with --approval");
            say(format_args!("{text}"))
        }
        local::Answer::Certified(pem) => {
            eprintln!("certified, and told in the cell's audit; put it in its place with ambit admin install");
            say(format_args!("{}", pem.trim_end()))
        }
        local::Answer::Refused(refusal) => Err(refusal),
    }
}

/// A request or an approval is a few hundred bytes.
fn text(file: &Path) -> Result<String, Refusal> {
    use std::io::Read;
    let mut text = String::new();
    let read = std::fs::File::open(file).and_then(|open| open.take(FILE_BYTES_MAX).read_to_string(&mut text));
    let usable =
        |e: std::io::Error| Refusal::new(Code::BadRequest, format!("a usable file {}", file.display()), e.to_string());
    read.map(|_| text).map_err(usable)
}

fn say(what: std::fmt::Arguments<'_>) -> Result<(), Refusal> {
    use std::io::Write;
    writeln!(std::io::stdout(), "{what}").map_err(|e| Refusal::new(Code::Internal, "a writable stdout", e.to_string()))
}

/// Text on a terminal, JSON otherwise.
fn logging() {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info,raft=warn,raft_engine=warn"));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    if std::io::stderr().is_terminal() {
        builder.init();
    } else {
        builder.json().init();
    }
}
