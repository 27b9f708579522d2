//! Puts the components together and runs them. What one of them knows, the others learn over `watch` channels only.

mod annex;
mod cell;
mod lease;
mod sockets;

use crate::broker::{Broker, Gate, NodeIdentity};
use crate::carriers::Carriers;
use crate::config::Config;
use crate::contention::{self, Contention};
use crate::control::{self, Control, Hands};
use crate::course::Course;
use crate::enrol::NotEnrolled;
use crate::handover::Wire;
use crate::hbone::Door;
use crate::health::Health;
use crate::inbound::Inbound;
use crate::kernel::KernelHandle;
use crate::metrics::METRICS;
use crate::netns::NetnsThread;
use crate::outbound::Outbound;
use crate::staleness::LEASE;
use crate::svids::Issuance;
use crate::takeover::{self, Guest, Host, Sockets};
use crate::tokens::Tokens;
use crate::way_in::WayIn;
use crate::workload_api::{ServeError, WorkloadApi};
use crate::{hbone, telemetry};
use ambit_model::policy::Endpoint;
use ambit_model::{Code, Refusal};
use annex::AnnexPart;
use cell::Cell;
use lease::Lease;
use sockets::{Listeners, captures, start};
use std::future::Future;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tokio::net::{TcpListener, UnixListener};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

/// A new agent that has the kernel's tables and does not serve by then ends. The former one would end it a little later.
const TAKE_MAX: Duration = Duration::from_secs(25);
/// Far ends that were told that their tunnels end, and have not closed them yet.
const GOODBYE_MAX: Duration = Duration::from_secs(1);

/// The signals that end an agent: at the first it drains, at the second it ends at once.
#[derive(Debug)]
pub struct Stop {
    term: Signal,
    int: Signal,
}

impl Stop {
    /// Listens to SIGTERM and SIGINT.
    ///
    /// # Errors
    /// Signals cannot be listened to.
    pub fn listen() -> std::io::Result<Self> {
        Ok(Self { term: signal(SignalKind::terminate())?, int: signal(SignalKind::interrupt())? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.term.recv() => {}
            _ = self.int.recv() => {}
        }
    }
}

/// For the word of a part that ended, after those that lived by it.
const WORD_MAX: Duration = Duration::from_millis(200);

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

/// Runs the agent until it is told to stop, or another one serves, and has drained. What is pinned in the kernel goes on
/// enforcing afterwards. With `take_over` an agent that serves this node is one to take over from, else a refusal.
pub async fn run(config: Config, take_over: bool, mut stop: Stop) -> Result<(), AgentError> {
    for component in ["kernel", "enrolment", "stream", "inbound", "pods", "workload_api"] {
        METRICS.component.set([component], 0.0);
    }
    if !nix::unistd::geteuid().is_root() {
        return Err(Refusal::new(Code::NeedsRoot, "root", format!("uid {}", nix::unistd::geteuid())).into());
    }
    let mesh = control::mesh_root(&config.cgroup_root)?;
    std::fs::create_dir_all(&config.data_dir).map_err(|e| start("a writable 'data_dir'", e))?;
    let former = former(&config, take_over).await?;
    let course = if former.is_some() { Course::waiting() } else { Course::default() };
    let (outcome, outcome_rx) = watch::channel(None);
    let (endpoints, endpoints_rx) = watch::channel(None);
    let (mut cell, successor) = Cell::new(&config, &course, former.as_ref(), outcome_rx, endpoints_rx.clone())?;
    // With the cell first where another agent serves meanwhile, with the kernel first where none does.
    let mut handed = Sockets::new();
    if let Some(former) = &former {
        cell.start();
        handed = tokio::select! {
            handed = cell.prepared(former) => handed?,
            () = stop.next() => return Ok(()),
        };
    }
    let kernel = tokio::select! {
        kernel = opened(&config, former.is_some()) => kernel?,
        error = cell.ended(), if former.is_some() => return Err(error),
        () = stop.next() => return Ok(()),
    };
    if former.is_none() {
        // What was said before may be old, and nothing is judged here before there is a slice.
        kernel.close_direct()?;
    }
    let lease = Lease::new(&kernel, &cell, config.staleness());
    lease.keep()?;
    let carriers = Carriers::start().map_err(|e| start("threads that carry", e))?;
    let netns = NetnsThread::start().map_err(|e| start("a thread for namespaces", e))?;
    // Before any pod is guarded; it goes with this process.
    let AnnexPart { annex, at_pods, strangers, again: in_annex, let_in: _let_in } =
        AnnexPart::open(&kernel, &netns, carriers.count(), &mut handed).await?;
    let listeners = Listeners::open(&config, carriers.count(), &mut handed)?;
    let mut again = listeners.again().map_err(|e| start("descriptors to spare", e))?;
    again.extend(in_annex);
    let Locals { tunnels, workload, broker: broker_socket, metrics, takeover } =
        Locals::of(listeners).map_err(|e| start("sockets of this runtime", e))?;
    cell.start();

    let (clock, denials, issued) = (cell.clock.clone(), cell.denials.clone(), cell.issued.clone());
    let pages = if former.is_some() { Course::waiting() } else { Course::default() };
    let health = Health::new(Some(kernel.clone()), denials.clone());
    let metrics = telemetry::serve(
        metrics,
        kernel.clone(),
        issued.clone(),
        clock.clone(),
        config.staleness(),
        health.clone(),
        [course.clone(), pages.clone()],
    );
    let (plane, plane_rx) = watch::channel(None);
    let issuance = Issuance {
        issued: issued.clone(),
        trust: cell.trust.clone(),
        clock: clock.clone(),
        denials: denials.clone(),
        node: cell.node.clone(),
        channel: cell.channel.clone(),
    };
    let tokens = Tokens::new(cell.channel.clone(), clock.clone());
    let gate = Gate {
        brokers: Arc::new(config.brokers.clone()),
        trust: cell.trust.clone(),
        clock: clock.clone(),
        denials: denials.clone(),
        node: cell.node.clone(),
    };
    let broker = Broker::new(issued.clone(), tokens.clone(), Arc::new(mesh.clone()), gate);
    let broker = serve_brokers(broker, broker_socket, NodeIdentity(cell.enrolled.clone()), &course);
    let outbound = Outbound::on(
        carriers.clone(),
        plane_rx.clone(),
        denials.clone(),
        health.clone(),
        clock.clone(),
        annex.clone(),
        hbone::PORT,
    );
    let outbound = outbound.in_course(course.clone()).seen_by(cell.seen.clone());
    let (ask, asks) = mpsc::channel(1);
    let control = Control {
        pods_dir: config.pods_dir.clone(),
        cgroup_root: config.cgroup_root.clone(),
        node_address: config.node_address,
        kernel: kernel.clone(),
        netns: netns.clone(),
        issued: issued.clone(),
        trust: cell.trust.clone(),
        denials: denials.clone(),
        health: health.clone(),
        outbound: outbound.clone(),
        clock: clock.clone(),
        hands: Hands { captures: captures(handed), asks, course: course.clone() },
        wires: control::Wires {
            desired: cell.desired.clone(),
            outcome,
            endpoints,
            plane,
            seen: cell.seen.clone(),
            node: cell.node.clone(),
        },
    };
    let way_in = WayIn::new(plane_rx.clone(), denials.clone(), netns.clone(), clock.clone());
    let way_in = way_in.by_kernel(kernel.clone()).in_course(course.clone());
    let inbound = Inbound::new(plane_rx.clone(), denials.clone(), netns, clock).in_course(course.clone());
    let inbound = inbound.limited_to(config.caller_connects_per_s_max.0);
    let inbound = inbound.by_kernel(kernel.clone()).seen_by(cell.seen.clone());
    METRICS.component.set(["inbound"], 1.0);
    METRICS.component.set(["workload_api"], 1.0);
    tracing::info!(cluster = %config.cluster, hbone = %config.hbone_listen, "agent started");
    let mut host =
        Host { sockets: again, kernel: kernel.clone(), control: ask, successor, undone: watch::Sender::new(()) };
    let (tunnels_in, locals) = (inbound.clone(), Local::default());
    let pressure = Contention::of(Path::new(contention::PRESSURE));
    let components = async {
        let ended = tokio::select! {
            biased;
            error = cell.ended() => return Err(error),
            e = never("issuance", tokio::spawn(issuance.run())) => e,
            e = never("control", tokio::spawn(control.run())) => e,
            e = never("health", tokio::spawn(health.probe(plane_rx, denials, annex))) => e,
            e = never("denials", tokio::spawn(outbound.cut_denied())) => e,
            e = inbound.clone().serve_on(&carriers, Door::Node, tunnels) => Err(ended("inbound", e)),
            e = inbound.serve_on(&carriers, Door::Pod, at_pods) => Err(ended("inbound at pods", e)),
            e = way_in.serve_on(&carriers, strangers) => Err(ended("callers by address", e)),
            e = locals.serve(&course, WorkloadApi::new(issued, tokens).serve(workload, mesh)) => Err(ended("workload api", e)),
            e = locals.serve(&course, broker) => Err(ended("broker api", e)),
            e = locals.serve(&pages, metrics) => Err(ended("metrics", e)),
            e = lease.watch() => Err(e.into()),
            e = never("contention", tokio::spawn(contention::watch(pressure))) => e,
        };
        // What the cell's parts hold ends with them, a moment before their own word of why.
        tokio::time::timeout(WORD_MAX, cell.ended()).await.map_or(ended, Err)
    };
    tokio::pin!(components);
    let serving = serve_in_turn(former, endpoints_rx, [&course, &pages]);
    let successor = {
        let mut undone = host.undone.subscribe();
        let met = course.while_serving(host.meet(takeover));
        tokio::pin!(met);
        let successor = tokio::select! {
            e = &mut components => return e,
            late = serving => return Err(late.into()),
            wire = &mut met => Some(wire),
            () = stop.next() => None,
        };
        undone.mark_unchanged();
        match successor {
            // Who has the tables by now is waited for: it hears the cell, and passes that on.
            None if !host.kernel.is_writer() => tokio::select! {
                e = &mut components => return e,
                wire = &mut met => Some(wire),
                // What was undone is whole again: the tables are this agent's.
                Ok(()) = undone.changed() => None,
                () = stop.next() => None,
            },
            met => met,
        }
    };
    // Whoever was about to take over, and has nothing yet, is left alone: this one hears the cell again while it drains.
    if successor.is_none() && host.kernel.is_writer() {
        host.successor.end();
    }
    // Nobody shall wait in the backlog of what nobody here serves any more.
    host.sockets.clear();
    course.drain();
    if successor.is_some() {
        pages.drain();
    }
    let begun = course.flows();
    tracing::info!(
        flows = begun,
        within_s = config.drain_max_s.0.as_secs(),
        handed_over = successor.is_some(),
        "draining"
    );
    let cut = tokio::select! {
        e = &mut components => return e,
        () = drained([&course, &pages], &tunnels_in, &locals) => 0,
        () = tokio::time::sleep(config.drain_max_s.0) => course.flows(),
        () = stop.next() => course.flows(),
        () = follow(&host, successor.as_ref()) => course.flows(),
    };
    let drained = begun.saturating_sub(cut);
    tracing::info!(drained, cut, "agent ended");
    if let Some(successor) = &successor {
        host.drained(successor, drained as u64, cut as u64).await;
    }
    Ok(())
}

/// The agent that serves this node, to take over from.
async fn former(config: &Config, take_over: bool) -> Result<Option<Guest>, Refusal> {
    if take_over {
        return takeover::call(&config.data_dir).await;
    }
    if takeover::is_served(&config.data_dir).await {
        let found = format!("one that answers at {}", takeover::place(&config.data_dir).display());
        return Err(Refusal::new(Code::AgentRunning, "no other agent of this 'data_dir'", found));
    }
    Ok(None)
}

/// The kernel's tables, to be written by this process: of a former agent that ends instead of handing them over, once it has
/// ended.
async fn opened(config: &Config, after_another: bool) -> Result<KernelHandle, Refusal> {
    let begun = Instant::now();
    loop {
        match KernelHandle::open(&config.cgroup_root, &config.pin_dir, &config.data_dir) {
            Err(refusal)
                if after_another
                    && refusal.code == Code::AgentRunning
                    && begun.elapsed() < config.drain_max_s.0 + TAKE_MAX =>
            {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            opened => return opened,
        }
    }
}

/// After a former agent: serves once what is here is in the kernel and has its SVIDs, and tells it. Returns only where that
/// does not come about.
async fn serve_in_turn(
    former: Option<Guest>,
    mut endpoints: watch::Receiver<Option<Vec<Endpoint>>>,
    courses: [&Course; 2],
) -> Refusal {
    let Some(former) = former else { return std::future::pending().await };
    if !matches!(tokio::time::timeout(TAKE_MAX, endpoints.wait_for(Option::is_some)).await, Ok(Ok(_))) {
        let found = format!("not within {} s", TAKE_MAX.as_secs());
        return Refusal::new(Code::TakeOverRefused, "tables in the kernel and SVIDs for what runs here", found);
    }
    courses.into_iter().for_each(Course::serve);
    former.serving().await;
    tracing::info!("this agent serves; the former one drains");
    former.drained().await;
    std::future::pending().await
}

/// Returns when nothing is carried any more, whoever had a tunnel to here has let go of it, and whoever asked here has its
/// answer.
async fn drained([course, pages]: [&Course; 2], inbound: &Inbound, locals: &Local) {
    course.idle().await;
    pages.drain();
    let left = Instant::now();
    while (inbound.tunnels() > 0 || locals.answer()) && left.elapsed() < GOODBYE_MAX {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// What is carried follows what the successor hears of the cell. Where that one says no more, nobody tells of denials here:
/// returns once that was so for as long as the kernel goes on without an agent.
async fn follow(host: &Host, successor: Option<&Wire>) {
    let Some(successor) = successor else { return std::future::pending().await };
    host.listen(successor).await;
    tracing::warn!(within_s = LEASE.as_secs(), "the agent after this one says no more: what is carried ends");
    tokio::time::sleep(LEASE).await;
}

/// The sockets, on this runtime.
struct Locals {
    tunnels: Vec<std::net::TcpListener>,
    workload: UnixListener,
    broker: Option<UnixListener>,
    metrics: TcpListener,
    takeover: UnixListener,
}

impl Locals {
    fn of(all: Listeners) -> std::io::Result<Self> {
        Ok(Self {
            tunnels: all.tunnels,
            workload: UnixListener::from_std(all.workload)?,
            broker: all.broker.map(UnixListener::from_std).transpose()?,
            metrics: TcpListener::from_std(all.metrics)?,
            takeover: UnixListener::from_std(all.takeover)?,
        })
    }
}

fn ended<E: std::fmt::Display>(component: &'static str, result: Result<(), E>) -> AgentError {
    AgentError::Ended { component, why: result.err().map_or("returned".to_owned(), |e| e.to_string()) }
}

async fn never(component: &'static str, task: JoinHandle<()>) -> Result<(), AgentError> {
    Err(ended(component, task.await))
}

/// Services of this machine alone, each of which ends in order when its course drains.
#[derive(Debug, Default)]
struct Local(AtomicUsize);

impl Local {
    /// Returns where one ends otherwise.
    async fn serve<E>(&self, course: &Course, serves: impl Future<Output = Result<(), E>>) -> Result<(), E> {
        course.serving().await;
        self.0.fetch_add(1, Ordering::Relaxed);
        let result = serves.await;
        if course.is_draining() && result.is_ok() {
            self.0.fetch_sub(1, Ordering::Relaxed);
            std::future::pending().await
        }
        result
    }

    /// Whether one of them may still answer somebody.
    fn answer(&self) -> bool {
        self.0.load(Ordering::Relaxed) > 0
    }
}

/// Until it drains where there is no socket.
async fn serve_brokers(
    broker: Broker,
    socket: Option<UnixListener>,
    identity: NodeIdentity,
    course: &Course,
) -> Result<(), ServeError> {
    match socket {
        Some(socket) => broker.serve(socket, Arc::new(identity)).await,
        None => {
            course.draining().await;
            Ok(())
        }
    }
}
