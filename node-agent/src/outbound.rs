//! The sending end: takes a captured connection, finds out where it was going, and carries it there in a tunnel.
//!
//! The kernel has allowed it already. What cannot be traced back, proved or reached ends in a reset, never in a
//! connection by another way.

mod breaker;
mod open;

use self::breaker::Breaker;
use self::open::{Opened, Opening, Way};
use crate::budget::Retries;
use crate::carriers::Carriers;
use crate::clock::Clock;
use crate::course::Course;
use crate::denials::{Denials, Lane};
use crate::egress::WayOut;
use crate::hbone::{self, TunnelError};
use crate::health::Health;
use crate::kernel::KernelHandle;
use crate::metrics::METRICS;
use crate::native::{self, Begun};
use crate::netns::Annex;
use crate::plane::{LocalPod, Plane};
use crate::pool::{Pool, Totals};
use crate::pump::{self, End};
use crate::recent;
use crate::record::{Judged, Record, flag};
use crate::records;
use crate::said::Start;
use crate::seen::{self, Seen};
use ambit_model::policy::Endpoint;
use std::net::{SocketAddr, SocketAddrV4};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// Captured connections at once, over all pods.
const FLOWS_MAX: usize = 16 * 1024;
/// How often idle tunnels are looked after.
const SWEEP_EVERY: Duration = Duration::from_secs(5);

/// Where a captured connection was going.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Captured {
    /// The address that the application asked for: an endpoint's, or a service's.
    pub asked: SocketAddr,
    /// The endpoint that the kernel chose.
    pub endpoint: SocketAddr,
}

/// Where the kernel let a captured connection go: what it took for outside is never a tunnel's, nor the other way round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Goal {
    /// A workload.
    Mesh(Captured),
    /// An address outside of the mesh.
    Outside(SocketAddrV4),
}

/// The parts. Cloning shares.
#[derive(Clone, Debug)]
pub struct Outbound {
    plane: watch::Receiver<Option<Arc<Plane>>>,
    denials: Lane,
    carriers: Carriers,
    /// One for each thread that carries.
    pools: Arc<[Pool]>,
    health: Health,
    breaker: Breaker,
    retries: Arc<Mutex<Retries>>,
    way_out: WayOut,
    flows: Arc<Semaphore>,
    clock: Arc<Clock>,
    annex: Annex,
    port: u16,
    course: Course,
    seen: Seen,
}

impl Outbound {
    /// An outbound side that follows `plane` and `denials` and reaches nodes on `port` (15008 but in tests), carrying on
    /// the runtime that this is called on.
    pub fn new(
        plane: watch::Receiver<Option<Arc<Plane>>>,
        denials: Lane,
        health: Health,
        clock: Arc<Clock>,
        annex: Annex,
        port: u16,
    ) -> Self {
        Self::on(Carriers::here(), plane, denials, health, clock, annex, port)
    }

    /// The same, carrying on `carriers`.
    pub fn on(
        carriers: Carriers,
        plane: watch::Receiver<Option<Arc<Plane>>>,
        denials: Lane,
        health: Health,
        clock: Arc<Clock>,
        annex: Annex,
        port: u16,
    ) -> Self {
        let totals = Totals::default();
        let pools = (0..carriers.count()).map(|_| Pool::new(totals.clone())).collect();
        let way_out = WayOut::new(plane.clone(), denials.clone(), clock.clone(), port);
        let (flows, course) = (Arc::new(Semaphore::new(FLOWS_MAX)), Course::default());
        let (seen, breaker) = (Seen::default(), Breaker::default());
        let retries = Arc::new(Mutex::new(Retries::new(since_begun())));
        Self {
            plane,
            denials,
            carriers,
            pools,
            health,
            breaker,
            retries,
            way_out,
            flows,
            clock,
            annex,
            port,
            course,
            seen,
        }
    }

    /// The same in this course: connections are taken while it serves, and count in it while they are carried.
    pub fn in_course(self, course: Course) -> Self {
        Self { course, ..self }
    }

    /// The same, telling there who called whom.
    pub fn seen_by(self, seen: Seen) -> Self {
        Self { seen, ..self }
    }

    /// Serves the capture listener of the pod that is the `nth` here, on a thread that carries, until the task is ended.
    pub fn capture(
        &self,
        nth: usize,
        who: watch::Receiver<Option<Arc<LocalPod>>>,
        listener: std::net::TcpListener,
        cookie: u64,
        kernel: KernelHandle,
    ) -> JoinHandle<()> {
        let (this, own) = (self.clone(), nth % self.carriers.count());
        self.carriers.handle(own).spawn(async move {
            match TcpListener::from_std(listener) {
                Ok(listener) => {
                    let course = this.course.clone();
                    course.while_serving(this.serve(own, who, listener, cookie, kernel)).await;
                }
                Err(error) => tracing::error!(%error, "capture listener not served; the pod stays cut off"),
            }
        })
    }

    /// Cuts tunnels to nodes as they are denied, and closes idle ones, until the process ends.
    pub async fn cut_denied(self) {
        let mut denials = self.denials.watch();
        let mut tick = tokio::time::interval(SWEEP_EVERY);
        let mut left = false;
        loop {
            tokio::select! {
                () = self.course.draining(), if !left => {
                    left = true;
                    self.pools.iter().for_each(Pool::leave);
                    continue;
                }
                changed = denials.changed() => if changed.is_err() {
                    return;
                },
                _ = tick.tick() => {
                    self.pools.iter().for_each(Pool::sweep);
                    continue;
                }
            }
            let now = denials.borrow_and_update().clone();
            let tunnels: usize = self.pools.iter().map(|pool| pool.cut(&now)).sum();
            if tunnels > 0 {
                tracing::info!(tunnels, revision = now.revision().0, "tunnels to denied nodes cut");
            }
        }
    }

    /// A connection to a service begins, which may be tried elsewhere.
    fn begun(&self) {
        self.retries.lock().unwrap_or_else(PoisonError::into_inner).begun();
    }

    /// Whether the budget has a second attempt left.
    fn may_retry(&self) -> bool {
        self.retries.lock().unwrap_or_else(PoisonError::into_inner).take(since_begun())
    }

    fn pool(&self, at: usize) -> &Pool {
        // There is one for each thread.
        &self.pools[at]
    }

    /// Tunnels open now.
    pub fn tunnels(&self) -> usize {
        self.pools.iter().map(Pool::open).sum()
    }

    /// Serves the capture listener of one pod until dropped. `who` says whose pod it is, once that is known.
    async fn serve(
        self,
        own: usize,
        who: watch::Receiver<Option<Arc<LocalPod>>>,
        listener: TcpListener,
        cookie: u64,
        kernel: KernelHandle,
    ) {
        loop {
            let (tcp, from) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "accept failed");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            };
            let captured = tcp.local_addr().ok().and_then(|at| kernel.original_destination(cookie, from, at));
            let Some(pod) = who.borrow().clone() else {
                let _ = pump::break_off_unless_ended(&tcp);
                continue;
            };
            let (this, flow, (at, carried)) = (self.clone(), self.course.flow(), self.carriers.choose(own));
            if at == own {
                tokio::spawn(async move {
                    this.take_goal(at, &pod, tcp, from.port(), captured).await;
                    drop((carried, flow));
                });
                continue;
            }
            // It leaves this thread's poller for the other one's.
            let Ok(tcp) = tcp.into_std() else { continue };
            self.carriers.handle(at).spawn(async move {
                if let Ok(tcp) = TcpStream::from_std(tcp) {
                    this.take_goal(at, &pod, tcp, from.port(), captured).await;
                }
                drop((carried, flow));
            });
        }
    }

    async fn take_goal(&self, at: usize, pod: &LocalPod, tcp: TcpStream, port: u16, goal: Option<Goal>) {
        match goal {
            Some(Goal::Outside(to)) => Box::pin(self.way_out.carry(pod, tcp, to)).await,
            Some(Goal::Mesh(captured)) => self.take_on(at, pod, tcp, port, Some(captured)).await,
            None => self.take_on(at, pod, tcp, port, None).await,
        }
    }

    /// Carries one captured connection of `pod`. Without a record of where it was going, it is reset.
    pub async fn take(&self, pod: &LocalPod, tcp: TcpStream, captured: Option<Captured>) {
        let _flow = self.course.flow();
        let port = tcp.peer_addr().map_or(0, |from| from.port());
        self.take_on(0, pod, tcp, port, captured).await;
    }

    async fn take_on(&self, at: usize, pod: &LocalPod, mut tcp: TcpStream, port: u16, captured: Option<Captured>) {
        let begun = Instant::now();
        let _ = tcp.set_nodelay(true);
        let _ = pump::break_off_unless_ended(&tcp);
        let place = self.flows.clone().try_acquire_owned();
        let Some(captured) = captured else {
            METRICS.connections.inc(["outbound", "unknown"]);
            return;
        };
        let (start, mut first) = (Start::of(pod, port, captured.asked), Vec::new());
        let opened = match place {
            // Whoever breaks off already needs nothing.
            Ok(place) => match first_bytes(&mut tcp, &mut first).await {
                Ok(()) => {
                    // Dialing and shaking hands take room; a connection that is carried shall not hold it.
                    let opening = Box::pin(async {
                        Opening::new(self, self.pool(at), pod, &start)?.open(captured, &mut first).await
                    });
                    opening.await.map(|opened| (opened, place))
                }
                Err(_) => return,
            },
            Err(_) => Err(TunnelError::Busy),
        };
        match opened {
            Ok((opened, _place)) => {
                METRICS.connections.inc(["outbound", "ok"]);
                METRICS.setup.observe(begun.elapsed());
                self.seen.saw(seen::End::Calling, pod.id(), &opened.endpoint.spiffe_id, captured.endpoint.port(), true);
                self.carry(pod, tcp, opened, first, captured, &start.trace).await;
            }
            Err(error) => {
                let denied = matches!(error.reason(), "denied" | "node_untrusted" | "svid_revoked");
                METRICS.connections.inc(["outbound", if denied { "denied" } else { "failed" }]);
                tracing::debug!(caller = %pod.id(), ?captured, %error, "outbound refused");
                let known = self.plane.borrow().clone();
                let known = known.as_ref().and_then(|plane| plane.view.endpoints.get(&captured.endpoint.ip()));
                if let Some(endpoint) = known {
                    let record = Record::outbound(pod.id(), &endpoint.spiffe_id, captured.asked, Some(&start.trace));
                    self.judged(&record, pod, endpoint, captured, error.own_refusal());
                    record.refused(flag_of(&error));
                }
            }
        }
    }

    /// The kernel let it through; by which rule, this agent tells as of now. `refused` is why it did not let it through itself.
    fn judged(
        &self,
        record: &Record<'_>,
        pod: &LocalPod,
        endpoint: &Endpoint,
        captured: Captured,
        refused: Option<&'static str>,
    ) {
        let Some(plane) = self.plane.borrow().clone() else { return };
        let (view, port) = (&plane.view, captured.endpoint.port());
        let words = match refused {
            Some(reason) => (String::new(), reason.to_owned()),
            None => {
                let verdict = view.rules.evaluate(pod.id(), &endpoint.spiffe_id, port, self.clock.moment());
                if verdict.allowed { recent::words(&verdict) } else { Default::default() }
            }
        };
        let judged = Judged { at: self.clock.now(), revision: view.revision, allowed: refused.is_none(), words };
        record.judged(self.seen.recent(), port, judged);
    }

    /// Until its end. `first` is what was read of it and not sent yet.
    async fn carry(
        &self,
        pod: &LocalPod,
        mut tcp: TcpStream,
        opened: Opened,
        first: Vec<u8>,
        captured: Captured,
        trace: &str,
    ) {
        let Opened { way, endpoint } = opened;
        let record = Record::outbound(pod.id(), &endpoint.spiffe_id, captured.asked, Some(trace));
        self.judged(&record, pod, &endpoint, captured, None);
        let peer = match &way {
            Way::Native { lease, .. } => lease.peer().clone(),
            Way::Hbone { lease, .. } => lease.peer().clone(),
        };
        let cut = async {
            let refused = |now: &Arc<Denials>| now.denies_endpoint(&endpoint) || now.denies_presented(&peer.presented);
            self.denials.until(refused).await;
            METRICS.cut.inc(["outbound"]);
            tracing::info!(caller = %pod.id(), called = %endpoint.spiffe_id, node = %endpoint.node, "live connection cut");
        };
        METRICS.open.add(["outbound"], 1.0);
        let carried = match way {
            Way::Native { mut lease, sent } => {
                let begun = Begun { up: first, sent, ..Begun::default() };
                let carried = native::carry(&mut tcp, &mut lease.native().secured, begun, cut).await;
                if carried.end == End::Closed {
                    lease.give_back();
                }
                carried
            }
            Way::Hbone { lease: _lease, send, recv } => pump::carry(tcp, send, recv, first, cut).await,
        };
        METRICS.open.add(["outbound"], -1.0);
        record.ended(&carried);
    }
}

/// Since the first that was carried.
fn since_begun() -> Duration {
    static BEGUN: LazyLock<Instant> = LazyLock::new(Instant::now);
    BEGUN.elapsed()
}

/// What the application says at once. An end of what it says is found again by whoever carries.
async fn first_bytes(tcp: &mut TcpStream, first: &mut Vec<u8>) -> std::io::Result<()> {
    if timeout(native::FIRST_WAIT, tcp.readable()).await.is_ok() {
        let mut buffer = records::buffer();
        let read = tcp.try_read(buffer.get_mut(..native::FIRST_MAX).unwrap_or_default());
        let read = read.map(|n| first.extend_from_slice(buffer.get(..n).unwrap_or_default()));
        records::keep(buffer);
        match read {
            Err(e) if e.kind() != std::io::ErrorKind::WouldBlock => return Err(e),
            _ => {}
        }
    }
    Ok(())
}

fn flag_of(error: &TunnelError) -> &'static str {
    match error {
        TunnelError::Busy => flag::OVERFLOW,
        TunnelError::Reset => flag::UPSTREAM_TERMINATED,
        TunnelError::NodeDenied | TunnelError::SvidRevoked | TunnelError::NoSvid => flag::DENIED,
        TunnelError::Refused(code) if hbone::is_denial(*code) => flag::DENIED,
        TunnelError::Refused(http::StatusCode::NOT_FOUND) => flag::NO_ROUTE,
        TunnelError::Unreachable { .. }
        | TunnelError::Handshake { .. }
        | TunnelError::OtherNode { .. }
        | TunnelError::Timeout
        | TunnelError::Broken(_)
        | TunnelError::Left
        | TunnelError::Refused(_) => flag::UPSTREAM_FAILED,
    }
}
