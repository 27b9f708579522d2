//! The sending end: takes a captured connection, finds out where it was going, and carries it there in a tunnel.
//!
//! The kernel has allowed it already. What cannot be traced back, proved or reached ends in a reset, never in a
//! connection by another way.

use crate::carriers::Carriers;
use crate::clock::Clock;
use crate::compile;
use crate::course::Course;
use crate::denials::{Denials, Lane};
use crate::egress::WayOut;
use crate::hbone::{self, Door, TunnelError};
use crate::health::{self, Health};
use crate::kernel::KernelHandle;
use crate::metrics::METRICS;
use crate::native::{self, Answer, Begun, Open, Reason};
use crate::netns::Annex;
use crate::plane::{LocalPod, Plane};
use crate::pool::{Key, Lease, NativeLease, Pool, Totals};
use crate::pump::{self, End};
use crate::record::{Record, flag};
use crate::records;
use crate::said::{Said, Start};
use crate::shown::Now;
use ambit_model::policy::Endpoint;
use bytes::Bytes;
use h2::{RecvStream, SendStream};
use std::net::{SocketAddr, SocketAddrV4};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// Captured connections at once, over all pods.
const FLOWS_MAX: usize = 16 * 1024;
/// Tunnels that are tried one after another where each turns out to have been left by the far agent just then.
const LEFT_MAX: usize = 3;
/// How often idle tunnels are looked after.
const SWEEP_EVERY: Duration = Duration::from_secs(5);

/// Where a captured connection was going.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Captured {
    /// The address that the application asked for: an endpoint's, or a service's.
    pub asked: SocketAddrV4,
    /// The endpoint that the kernel chose.
    pub endpoint: SocketAddrV4,
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
    way_out: WayOut,
    flows: Arc<Semaphore>,
    clock: Arc<Clock>,
    annex: Annex,
    port: u16,
    course: Course,
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
        Self { plane, denials, carriers, pools, health, way_out, flows, clock, annex, port, course }
    }

    /// The same in this course: connections are taken while it serves, and count in it while they are carried.
    pub fn in_course(self, course: Course) -> Self {
        Self { course, ..self }
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
            let captured = match (from, tcp.local_addr()) {
                (SocketAddr::V4(from), Ok(SocketAddr::V4(at))) => kernel.original_destination(cookie, from, at),
                _ => None,
            };
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
        let (start, mut first) = (Start::of(pod, port), Vec::new());
        let opened = match place {
            // Whoever breaks off already needs nothing.
            Ok(place) => match first_bytes(&mut tcp, &mut first).await {
                Ok(()) => {
                    // Dialing and shaking hands take room; a connection that is carried shall not hold it.
                    let opening = Box::pin(self.open(at, pod, captured, &mut first, &start));
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
                self.carry(pod, tcp, opened, first, captured, &start.trace).await;
            }
            Err(error) => {
                let denied = matches!(error.reason(), "denied" | "node_untrusted" | "svid_revoked");
                METRICS.connections.inc(["outbound", if denied { "denied" } else { "failed" }]);
                tracing::debug!(caller = %pod.id(), ?captured, %error, "outbound refused");
                let known = self.plane.borrow().clone();
                let known = known.as_ref().and_then(|plane| plane.view.endpoints.get(captured.endpoint.ip()));
                if let Some(endpoint) = known {
                    Record::outbound(pod.id(), &endpoint.spiffe_id, captured.asked, Some(&start.trace))
                        .refused(flag_of(&error));
                }
            }
        }
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

    /// Connects to the chosen endpoint; for a service, where that fails, to one other. What of `first` is sent with it is
    /// taken out.
    async fn open(
        &self,
        at: usize,
        pod: &LocalPod,
        captured: Captured,
        first: &mut Vec<u8>,
        start: &Start,
    ) -> Result<Opened, TunnelError> {
        let plane = self.plane.borrow().clone().ok_or(TunnelError::NoSvid)?;
        let gone = || TunnelError::Refused(http::StatusCode::NOT_FOUND);
        // What may have reached one endpoint is not sent to another: where there are others, bytes wait for the answer.
        let mut none = Vec::new();
        let first = if captured.asked == captured.endpoint { first } else { &mut none };
        let chosen = match plane.view.endpoints.get(captured.endpoint.ip()) {
            Some(endpoint) => {
                let to = SocketAddrV4::new(endpoint.address, captured.endpoint.port());
                self.open_at(self.pool(at), &plane, pod, endpoint, to, first, start).await
            }
            // The endpoint left the view between the kernel's choice and now.
            None => Err(gone()),
        };
        let error = match chosen {
            Ok(opened) => return Ok(opened),
            Err(error) if error.is_retryable() => error,
            Err(error) => return Err(error),
        };
        // No byte of the application has been sent yet: trying elsewhere repeats nothing.
        match self.other(&plane, pod, captured) {
            Some(endpoint) => {
                METRICS.retries.inc([error.reason()]);
                let to = SocketAddrV4::new(endpoint.address, captured.asked.port());
                self.open_at(self.pool(at), &plane, pod, endpoint, to, first, start).await
            }
            None => Err(error),
        }
    }

    #[allow(clippy::too_many_arguments, reason = "each is a fact of its own")]
    async fn open_at(
        &self,
        pool: &Pool,
        plane: &Plane,
        pod: &LocalPod,
        endpoint: &Endpoint,
        to: SocketAddrV4,
        first: &mut Vec<u8>,
        start: &Start,
    ) -> Result<Opened, TunnelError> {
        if self.denials.now().denies_endpoint(endpoint) {
            return Err(TunnelError::NodeDenied);
        }
        let node = self.key(plane, pod, endpoint, Door::Node)?;
        let opened = async {
            for _ in 0..LEFT_MAX {
                match self.open_by_either(pool, plane, pod, endpoint, &node, to, first, start).await {
                    // Those that ended with it are not tried one by one.
                    Err(TunnelError::Left) => pool.doubt(node.node, &TunnelError::Left),
                    other => return other,
                }
            }
            Err(TunnelError::Left)
        }
        .await;
        if let Err(error) = &opened
            && TunnelError::is_tunnel(error)
        {
            if matches!(error, TunnelError::OtherNode { .. }) {
                tracing::warn!(caller = %pod.id(), %error, "tunnel refused");
            }
            // What one of its tunnels found out, the idle ones of all threads need not find out one by one.
            self.pools.iter().for_each(|pool| pool.doubt(node.node, error));
            self.health.suspect(plane, endpoint, pod.id());
        }
        opened.map(|way| Opened { way, endpoint: endpoint.clone() })
    }

    /// By the door of its node, or by its own where no agent of ours is there.
    #[allow(clippy::too_many_arguments, reason = "each is a fact of its own")]
    async fn open_by_either(
        &self,
        pool: &Pool,
        plane: &Plane,
        pod: &LocalPod,
        endpoint: &Endpoint,
        at_node: &Key,
        to: SocketAddrV4,
        first: &mut Vec<u8>,
        start: &Start,
    ) -> Result<Way, TunnelError> {
        let at_pod = || self.key(plane, pod, endpoint, Door::Pod);
        // Who was found to be no agent of ours is not asked again each time.
        if !(pool.knows_pods() && pool.is_open(&at_pod()?)) {
            match self.open_by(pool, plane, pod, at_node, to, first, start).await {
                Err(error) if error.is_refused_port() => {}
                opened => return opened,
            }
        }
        let at_pod = at_pod()?;
        let opened = self.open_by(pool, plane, pod, &at_pod, to, first, start).await;
        if let Err(TunnelError::Left) = opened {
            pool.doubt(at_pod.node, &TunnelError::Left);
        }
        opened
    }

    /// By this door.
    #[allow(clippy::too_many_arguments, reason = "each is a fact of its own")]
    async fn open_by(
        &self,
        pool: &Pool,
        plane: &Plane,
        pod: &LocalPod,
        key: &Key,
        to: SocketAddrV4,
        first: &mut Vec<u8>,
        start: &Start,
    ) -> Result<Way, TunnelError> {
        let now = Now { trust: plane.trust.current(), at: self.clock.now() };
        let credentials = || health::credentials(plane, pod.id(), &key.destination);
        let lease = pool.lease(key, &now, &self.annex, credentials).await?;
        // It may have been dialed before the list came, or by a far end that has nothing newer to show.
        if self.denials.now().denies_presented(&lease.peer().presented) {
            lease.cut();
            return Err(TunnelError::SvidRevoked);
        }
        Ok(match lease {
            Lease::Native(lease) => open_native(lease, to, first, &start.trace).await?,
            Lease::Hbone(lease) => {
                let said = Said::of(pod.id(), &plane.view.cluster, start);
                let (send, recv) = lease.open(to, &said).await?;
                Way::Hbone { lease, send, recv }
            }
        })
    }

    fn key(&self, plane: &Plane, pod: &LocalPod, endpoint: &Endpoint, door: Door) -> Result<Key, TunnelError> {
        let own = plane.credentials_of(pod.id()).map_err(|_| TunnelError::NoSvid)?;
        let mut node = health::at(endpoint, door);
        node.set_port(self.port);
        let from = match door {
            Door::Node => plane.address,
            Door::Pod => pod.workload.pod.address,
        };
        Ok(Key {
            source: pod.id().clone(),
            destination: endpoint.spiffe_id.clone(),
            door,
            from,
            node,
            holder: (endpoint.node, endpoint.generation),
            credentials: own.svid().since.0,
        })
    }

    /// Another healthy endpoint of the service that was asked for, nearest first, that this caller may reach.
    fn other<'a>(&self, plane: &'a Plane, pod: &LocalPod, captured: Captured) -> Option<&'a Endpoint> {
        let view = &plane.view;
        let service = view.services.iter().find(|s| SocketAddrV4::new(s.address, s.port) == captured.asked)?;
        let (unhealthy, denials, now) = (self.health.unhealthy(), self.denials.now(), self.clock.moment());
        view.endpoints
            .values()
            .filter(|e| e.address != *captured.endpoint.ip() && !unhealthy.contains(&e.address))
            .filter(|e| !denials.denies_endpoint(e))
            .filter(|e| service.backends.iter().any(|b| b.contains(&e.spiffe_id)))
            .filter(|e| view.rules.evaluate(pod.id(), &e.spiffe_id, service.port, now).allowed)
            .min_by_key(|e| (compile::tier(view, service, e), e.address))
    }
}

/// An open connection to an endpoint, and how it is carried.
struct Opened {
    way: Way,
    endpoint: Endpoint,
}

enum Way {
    /// `sent`: bytes that went with OPEN.
    Native {
        lease: Box<NativeLease>,
        sent: u64,
    },
    Hbone {
        lease: hbone::Lease,
        send: SendStream<Bytes>,
        recv: RecvStream,
    },
}

async fn open_native(
    mut lease: Box<NativeLease>,
    to: SocketAddrV4,
    first: &mut Vec<u8>,
    trace: &str,
) -> Result<Way, TunnelError> {
    // A first read that filled its room has more behind it; none may mean that the workload speaks first.
    let prompt = first.is_empty() || first.len() == native::FIRST_MAX;
    let sent = first.len() as u64;
    let open = Open { to, prompt, trace: Some(trace.to_owned()), first: std::mem::take(first) };
    let answer = timeout(hbone::ANSWER_MAX, native::open(&mut lease.native().secured, &open)).await;
    match answer.map_err(|_| TunnelError::Timeout)?.map_err(TunnelError::Broken)? {
        Answer::Opened => Ok(Way::Native { lease, sent }),
        Answer::Left => {
            *first = open.first;
            Err(TunnelError::Left)
        }
        Answer::Refused(reason) => {
            // The far end closes the tunnel of whoever makes no sense.
            if reason != Reason::Malformed {
                lease.give_back();
            }
            Err(if reason == Reason::Reset { TunnelError::Reset } else { TunnelError::Refused(reason.status()) })
        }
    }
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
