//! Puts the components together and runs them. What one of them knows, the others learn over `watch` channels only.

use crate::broker::{Broker, Gate, NodeIdentity};
use crate::carriers::Carriers;
use crate::clock::Clock;
use crate::compile::DENIED_NODE;
use crate::config::Config;
use crate::control::{self, Control};
use crate::denials::Lane;
use crate::enrol::{self, NotEnrolled};
use crate::hbone::Door;
use crate::health::Health;
use crate::inbound::Inbound;
use crate::issued::Issued;
use crate::kernel::{KernelHandle, LEASE_EVERY, chain};
use crate::membership::Membership;
use crate::metrics::METRICS;
use crate::netns::{Annex, Netns, NetnsThread};
use crate::outbound::Outbound;
use crate::reattest::{Rounds, Turn};
use crate::session::{self, Session};
use crate::svids::Issuance;
use crate::tokens::Tokens;
use crate::workload_api::{ServeError, WorkloadApi};
use crate::{hbone, telemetry};
use ambit_identity::{SharedTrust, Trust};
use ambit_model::{Code, Refusal};
use ambit_tpm::{Attester, Options};
use std::future::Future;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpSocket, UnixListener};
use tokio::sync::watch;

/// Closed flows that no agent took only come from agents that died.
const SWEEP_EVERY: u32 = 12;
/// Tunnels that wait for accept, on each thread.
const BACKLOG: u32 = 1024;
/// Refusals of the kernel are told to the log this often.
const EVENTS_EVERY: Duration = Duration::from_secs(1);

/// Why the agent ended.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// Something it needs to start is not there.
    #[error(transparent)]
    Start(#[from] Refusal),
    /// The cell denied this machine.
    #[error("the cell denied this node: {0}")]
    Denied(#[from] NotEnrolled),
    /// A component that must run for ever ended.
    #[error("{component} ended: {why}")]
    Ended {
        /// Which.
        component: &'static str,
        /// Why.
        why: String,
    },
}

/// Runs the agent until it is told to stop. What is pinned in the kernel goes on enforcing afterwards.
pub async fn run(config: Config, stop: impl Future<Output = ()>) -> Result<(), AgentError> {
    for component in ["kernel", "enrolment", "stream", "inbound", "pods", "workload_api"] {
        METRICS.component.set([component], 0.0);
    }
    if !nix::unistd::geteuid().is_root() {
        return Err(Refusal::new(Code::NeedsRoot, "root", format!("uid {}", nix::unistd::geteuid())).into());
    }
    let mesh = control::mesh_root(&config.cgroup_root)?;
    std::fs::create_dir_all(&config.data_dir).map_err(|e| start("a writable 'data_dir'", e))?;
    let clock = Arc::new(Clock::default());
    let kernel = KernelHandle::open(&config.cgroup_root, &config.pin_dir)?;
    kernel.renew_lease()?;
    let carriers = Carriers::start().map_err(|e| start("threads that carry", e))?;
    let hbone = listeners(config.hbone_listen, carriers.count()).map_err(|e| start("'hbone_listen' to be free", e))?;
    let socket = local_socket(&config.workload_socket, 0o777).map_err(|e| start("a usable 'workload_socket'", e))?;
    let broker_socket = config.broker_socket.as_deref().map(|path| local_socket(path, 0o600)).transpose();
    let broker_socket = broker_socket.map_err(|e| start("a usable 'broker_socket'", e))?;
    let netns = NetnsThread::start().map_err(|e| start("a thread for namespaces", e))?;
    // Before any pod is guarded; it goes with this process.
    let (annex, at_pods) = annex(&kernel, &netns, carriers.count()).await?;

    let trust = SharedTrust::new(Trust::Pinned(config.trust_domain.clone(), config.fingerprint.0));
    let tpm = Options::new(&config.tcti, &config.data_dir);
    let attester = Attester::start(Options { ek: config.tpm_ek.0, ak: config.tpm_ak.0, ..tpm }).map_err(enrol::tpm)?;
    let (turn, cluster) = (Turn::default(), config.cluster.clone());
    let (boot_log, ima_log) = (config.boot_log.clone(), config.ima_log.clone());
    let rounds = Rounds::new(attester.clone(), turn.clone(), cluster, boot_log, ima_log);
    let denials = Lane::default();
    let issued = Issued::default();
    let metrics = telemetry::serve(config.metrics_listen, kernel.clone(), issued.clone(), clock.clone());
    let (desired, desired_rx) = watch::channel(None);
    let (outcome, outcome_rx) = watch::channel(None);
    let (endpoints, endpoints_rx) = watch::channel(Vec::new());
    let (plane, plane_rx) = watch::channel(None);
    let (node, node_rx) = watch::channel(None);
    let (enrolled, enrolled_rx) = watch::channel(None);
    let (told, told_rx) = watch::channel(None);
    let (channel, channel_rx) = watch::channel(None);
    let health = Health::new(Some(kernel.clone()));

    let membership = Membership {
        config: config.clone(),
        attester,
        turn,
        clock: clock.clone(),
        trust: trust.clone(),
        denials: denials.clone(),
        enrolled,
        node,
        issued: issued.clone(),
        told: told_rx,
    };
    let session = Session {
        trust: trust.clone(),
        servers: config.servers.clone(),
        trust_domain: config.trust_domain.clone(),
        cluster: config.cluster.clone(),
        node_address: config.node_address,
        clock: clock.clone(),
        denials: denials.clone(),
        rounds,
        wires: session::Wires {
            enrolled: enrolled_rx.clone(),
            told: Arc::new(told),
            desired: Arc::new(desired),
            outcome: outcome_rx,
            endpoints: endpoints_rx,
            issued: issued.clone(),
            channel: Arc::new(channel),
        },
    };
    let issuance = Issuance {
        issued: issued.clone(),
        trust: trust.clone(),
        clock: clock.clone(),
        denials: denials.clone(),
        node: node_rx.clone(),
        channel: channel_rx.clone(),
    };
    let tokens = Tokens::new(channel_rx, clock.clone());
    let gate = Gate {
        brokers: Arc::new(config.brokers.clone()),
        trust: trust.clone(),
        clock: clock.clone(),
        denials: denials.clone(),
        node: node_rx.clone(),
    };
    let broker = Broker::new(issued.clone(), tokens.clone(), Arc::new(mesh.clone()), gate);
    let broker = serve_brokers(broker, broker_socket, NodeIdentity(enrolled_rx.clone()));
    let outbound = Outbound::on(
        carriers.clone(),
        plane_rx.clone(),
        denials.clone(),
        health.clone(),
        clock.clone(),
        annex.clone(),
        hbone::PORT,
    );
    let control = Control {
        pods_dir: config.pods_dir.clone(),
        cgroup_root: config.cgroup_root.clone(),
        node_address: config.node_address,
        kernel: kernel.clone(),
        netns: netns.clone(),
        issued: issued.clone(),
        trust,
        denials: denials.clone(),
        health: health.clone(),
        outbound: outbound.clone(),
        clock: clock.clone(),
        wires: control::Wires { desired: desired_rx, outcome, endpoints, plane, node: node_rx },
    };
    let inbound = Inbound::new(plane_rx.clone(), denials.clone(), netns, clock);
    METRICS.component.set(["inbound"], 1.0);
    METRICS.component.set(["workload_api"], 1.0);
    tracing::info!(cluster = %config.cluster, hbone = %config.hbone_listen, "agent started");
    let ended = |component| move |why: String| AgentError::Ended { component, why };
    let never = |component, task: tokio::task::JoinHandle<()>| async move {
        let why = task.await.err().map_or("returned".to_owned(), |e| e.to_string());
        Err(AgentError::Ended { component, why })
    };
    tokio::select! {
        () = stop => Ok(()),
        denied = membership.run() => Err(denied.into()),
        e = never("stream", tokio::spawn(session.run())) => e,
        e = never("issuance", tokio::spawn(issuance.run())) => e,
        e = never("control", tokio::spawn(control.run())) => e,
        e = never("health", tokio::spawn(health.probe(plane_rx, denials, annex))) => e,
        e = never("denials", tokio::spawn(outbound.cut_denied())) => e,
        e = inbound.clone().serve_on(&carriers, Door::Node, hbone) => Err(ended("inbound")(text(e))),
        e = inbound.serve_on(&carriers, Door::Pod, at_pods) => Err(ended("inbound at pods")(text(e))),
        e = WorkloadApi::new(issued, tokens).serve(socket, mesh) => Err(ended("workload api")(text(e))),
        e = broker => Err(ended("broker api")(text(e))),
        e = metrics => Err(ended("metrics")(text(e))),
        e = watch_kernel(kernel) => Err(e.into()),
    }
}

fn text<E: std::fmt::Display>(result: Result<(), E>) -> String {
    result.err().map_or("returned".to_owned(), |e| e.to_string())
}

fn start(expected: &str, error: std::io::Error) -> Refusal {
    Refusal::new(Code::ConfigInvalid, expected, error.to_string())
}

/// Renews the lease and tells refusals to the log. A kernel that cannot be told is a reason to end: the lease then runs
/// out and everything new is refused.
async fn watch_kernel(kernel: KernelHandle) -> Refusal {
    let (mut lease, mut events) = (tokio::time::interval(LEASE_EVERY), tokio::time::interval(EVENTS_EVERY));
    let mut renewals = 0u32;
    loop {
        let done = tokio::select! {
            _ = lease.tick() => {
                renewals = renewals.wrapping_add(1);
                let swept = if renewals.is_multiple_of(SWEEP_EVERY) { kernel.sweep().map(|_| ()) } else { Ok(()) };
                swept.and_then(|()| kernel.renew_lease())
            }
            _ = events.tick() => kernel.events(&mut |event| {
                // The kernel knows no such reason: to it, a denied node's endpoint is one that no verdict speaks of.
                let denied = event.destination == DENIED_NODE.0;
                let reason = if denied { Code::NodeUntrusted.as_str() } else { event.reason.as_str() };
                tracing::debug!(reason, from = ?event.from, to = %event.address, cgroup = event.cgroup, "refused");
            }),
        };
        if let Err(refusal) = done {
            METRICS.component.set(["kernel"], 0.0);
            return refusal;
        }
    }
}

/// The annex, and its listeners at pods' addresses.
async fn annex(
    kernel: &KernelHandle,
    netns: &NetnsThread,
    listeners: usize,
) -> Result<(Annex, Vec<std::net::TcpListener>), Refusal> {
    let made = ambit_ebpf::Annex::make().map_err(|e| Refusal::new(Code::Internal, "the agent's annex", chain(&e)))?;
    if made.is_refused_by_the_node() {
        let setting = "net.ipv4.conf.all.rp_filter = 1";
        tracing::warn!(setting, "HBONE at pods' addresses is dropped on this node; 2 or 0 let it pass");
    }
    kernel.use_annex(&made);
    tracing::info!(device = made.device(), "HBONE at pods' addresses");
    let annex = Annex::new(netns.clone(), Netns::of(made.into()));
    let listeners = annex.listeners(hbone::PORT, listeners).await.map_err(|e| start("HBONE in the annex", e))?;
    Ok((annex, listeners))
}

/// Listeners that share an address: the kernel spreads connections over them (SO_REUSEPORT), and nobody of another user
/// can join them.
fn listeners(at: std::net::SocketAddr, count: usize) -> std::io::Result<Vec<std::net::TcpListener>> {
    // Another agent could: an address that is in use is refused, as without sharing.
    drop(std::net::TcpListener::bind(at)?);
    let mut at = at;
    let mut all = Vec::with_capacity(count);
    for _ in 0..count {
        let socket = if at.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        socket.set_reuseaddr(true)?;
        socket.set_reuseport(true)?;
        socket.bind(at)?;
        let listener = socket.listen(BACKLOG)?;
        // The first one chooses the port where it is left open.
        at = listener.local_addr()?;
        all.push(listener.into_std()?);
    }
    Ok(all)
}

/// For ever where there is no socket.
async fn serve_brokers(broker: Broker, socket: Option<UnixListener>, identity: NodeIdentity) -> Result<(), ServeError> {
    match socket {
        Some(socket) => broker.serve(socket, Arc::new(identity)).await,
        None => std::future::pending().await,
    }
}

/// The Workload API's is for every workload: who may have what is decided by what the kernel says of the caller. The
/// Broker API's is for who runs as root, or is let to it by who does.
fn local_socket(path: &Path, mode: u32) -> std::io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)?;
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
    Ok(listener)
}
