//! The receiving end of tunnels: proves who calls, decides again, and connects to the pod.
//!
//! The far node is not relied on: its verdict is worth nothing here. What cannot be proved is refused.

use crate::carriers::Carriers;
use crate::clock::Clock;
use crate::denials::{Denials, Lane};
use crate::hbone::{self, NATIVE_IDLE_MAX, POD_CONNECT_MAX};
use crate::metrics::METRICS;
use crate::native::{self, Open, Reason};
use crate::netns::NetnsThread;
use crate::plane::{LocalPod, Plane};
use crate::record::{Record, flag};
use crate::secure::{self, Bytestream, Secured};
use crate::view::View;
use crate::{pump, tls};
use ambit_identity::{NodeBinding, PeerSvid};
use ambit_model::{Code, Moment, Refusal, SpiffeId};
use ambit_policy::Verdict;
use bytes::Bytes;
use h2::RecvStream;
use h2::server::SendResponse;
use http::{Method, Request, Response, StatusCode};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::timeout;

/// Tunnels at once; each is a TLS session, and an HBONE one its windows.
const TUNNELS_MAX: usize = 4096;
/// Connections at once, over all tunnels.
const FLOWS_MAX: usize = 16 * 1024;
/// From accept to a finished handshake: silence and garbage hold a place no longer than this.
const HANDSHAKE_MAX: Duration = Duration::from_secs(3);

/// The listener's parts. Cloning shares.
#[derive(Clone, Debug)]
pub struct Inbound {
    plane: watch::Receiver<Option<Arc<Plane>>>,
    denials: Lane,
    netns: NetnsThread,
    clock: Arc<Clock>,
    tunnels: Arc<Semaphore>,
    flows: Arc<Semaphore>,
}

/// A proven caller, where it calls from and the identity it called.
#[derive(Clone, Debug)]
struct Call {
    peer: Arc<PeerSvid>,
    from: IpAddr,
    to: SpiffeId,
}

impl Inbound {
    /// An inbound side that follows `plane` and `denials`.
    pub fn new(
        plane: watch::Receiver<Option<Arc<Plane>>>,
        denials: Lane,
        netns: NetnsThread,
        clock: Arc<Clock>,
    ) -> Self {
        let (tunnels, flows) = (Arc::new(Semaphore::new(TUNNELS_MAX)), Arc::new(Semaphore::new(FLOWS_MAX)));
        Self { plane, denials, netns, clock, tunnels, flows }
    }

    /// Accepts tunnels on threads that carry, each of which has one of `listeners` (they share an address). For ever, unless
    /// one of them cannot be served.
    pub async fn serve_on(self, carriers: &Carriers, listeners: Vec<std::net::TcpListener>) -> std::io::Result<()> {
        let serve = |(n, listener): (usize, std::net::TcpListener)| {
            let this = self.clone();
            carriers.handle(n).spawn(async move { this.serve(TcpListener::from_std(listener)?).await })
        };
        let all: Vec<_> = listeners.into_iter().enumerate().map(serve).collect();
        let (ended, ..) = futures::future::select_all(all).await;
        ended.map_err(std::io::Error::other)?
    }

    /// Accepts tunnels until the listener fails.
    pub async fn serve(self, listener: TcpListener) -> std::io::Result<()> {
        loop {
            let (tcp, from) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Out of descriptors, say: wait instead of spinning.
                    tracing::warn!(%error, "accept failed");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            };
            let Ok(place) = self.tunnels.clone().try_acquire_owned() else {
                METRICS.handshakes.inc(["failed", "busy"]);
                continue;
            };
            let this = self.clone();
            tokio::spawn(async move {
                if let Err(error) = this.tunnel(tcp, from).await {
                    tracing::debug!(%from, %error, "tunnel ended");
                }
                drop(place);
            });
        }
    }

    async fn tunnel(&self, tcp: TcpStream, from: SocketAddr) -> Result<(), Refusal> {
        // In a box: a tunnel that is open shall not hold the room that its handshake took.
        let shaking = Box::pin(self.handshake(tcp, from.ip()));
        let shaken = timeout(HANDSHAKE_MAX, shaking).await.unwrap_or_else(|_| {
            Err(("timeout", Refusal::new(Code::Unauthenticated, "a handshake within 3 s", "silence")))
        });
        let (secured, call) = shaken.map_err(|(reason, refusal)| {
            METRICS.handshakes.inc(["failed", reason]);
            refusal
        })?;
        METRICS.handshakes.inc(["ok", "none"]);
        tracing::debug!(%from, caller = %call.peer.id(), called = %call.to, "tunnel open");
        // A node that was put out keeps no tunnel, not even an idle one.
        let denied = self.denials.until(|denials| trusted(denials, &call).is_err());
        // Nor one whose node is elsewhere by now, or nowhere.
        let moved = self.moved(&call);
        let served = async {
            match secured.protocol.as_deref() {
                Some(native::ALPN) => self.serve_native(secured, &call).await,
                Some(_) | None => self.serve_hbone(secured, &call).await,
            }
        };
        tokio::select! {
            // What is carried ends first, with a reset on both sides, by the same word.
            biased;
            served = served => served,
            () = denied => trusted(&self.denials.now(), &call),
            refusal = moved => Err(refusal),
        }
    }

    async fn handshake(&self, mut tcp: TcpStream, from: IpAddr) -> Result<(Secured, Call), (&'static str, Refusal)> {
        let broken = |e: std::io::Error| ("tls", Refusal::new(Code::Unauthenticated, "a TLS handshake", e.to_string()));
        secure::tune(&tcp).map_err(broken)?;
        let (hello, name) = secure::hello(&mut tcp).await.map_err(broken)?;
        let plane = self.plane.borrow().clone();
        let called = plane.as_ref().and_then(|p| p.by_name.get(&name)).cloned().ok_or_else(|| {
            ("unknown_name", Refusal::new(Code::NotFound, "the name of a workload of this node", name))
        })?;
        let secured = secure::accept(tcp, hello, called.server.clone()).await.map_err(broken)?;
        let Some(plane) = plane.filter(|_| !secured.chain.is_empty()) else {
            return Err(("svid", Refusal::new(Code::Unauthenticated, "an X.509-SVID", "none")));
        };
        let peer = tls::peer(&secured.chain, &plane.trust, self.clock.now()).map_err(|r| ("svid", r))?;
        let call = Call { peer: Arc::new(peer), from, to: called.id.clone() };
        trusted(&self.denials.now(), &call).map_err(|r| (r.code.as_str(), r))?;
        at_home(&plane.view, &call).map_err(|r| {
            tracing::warn!(caller = %call.peer.id(), called = %call.to, refusal = %r, "tunnel refused");
            (r.code.as_str(), r)
        })?;
        Ok((secured, call))
    }

    async fn serve_hbone(&self, secured: Secured, call: &Call) -> Result<(), Refusal> {
        let http2 = |e: String| Refusal::new(Code::BadRequest, "HTTP/2 within 3 s", e);
        let shaken = timeout(HANDSHAKE_MAX, hbone::accept(Bytestream::new(secured))).await;
        let mut streams = shaken.map_err(|_| http2("silence".into()))?.map_err(|e| http2(e.to_string()))?;
        let quiet = hbone::silence(streams.ping_pong(), None);
        tokio::pin!(quiet);
        // What it carries ends with the tunnel, and that with its connection.
        loop {
            let next = tokio::select! {
                next = streams.accept() => next,
                () = &mut quiet => return Ok(()),
            };
            let Some(Ok((request, respond))) = next else { return Ok(()) };
            let (this, call) = (self.clone(), call.clone());
            tokio::spawn(async move { this.stream(call, request, respond).await });
        }
    }

    /// One connection after another, as long as each ends in order.
    async fn serve_native(&self, mut tunnel: Secured, call: &Call) -> Result<(), Refusal> {
        let mut wait = HANDSHAKE_MAX;
        loop {
            // The peer says nothing more, or has ended the tunnel: both are an end in order.
            let Ok(Ok(open)) = timeout(wait, native::asked(&mut tunnel)).await else { return Ok(()) };
            wait = NATIVE_IDLE_MAX;
            let refused = match open {
                Some(open) => match self.native(&mut tunnel, call, open).await {
                    Ok(true) => continue,
                    Ok(false) => return Ok(()),
                    Err(reason) => reason,
                },
                None => Reason::Malformed,
            };
            // Nobody there to hear it: as good.
            let _ = timeout(HANDSHAKE_MAX, native::refuse(&mut tunnel, refused)).await;
            return Ok(());
        }
    }

    /// Whether the tunnel can carry another connection.
    async fn native(&self, tunnel: &mut Secured, call: &Call, open: Open) -> Result<bool, Reason> {
        let record = Record::inbound(call.peer.id(), &call.to, open.to, open.trace.as_deref());
        let (mut pod, _open) = match self.connect(call, Ok(open.to)).await {
            Ok(connected) => connected,
            Err(no) => {
                record.refused(no.flag());
                return Err(no.into());
            }
        };
        let begun = async {
            pod.write_all(&open.first).await?;
            native::agree(tunnel, &pod, open.prompt).await
        };
        let cut = self.cut_once(call, open.to);
        let carried = match timeout(POD_CONNECT_MAX, begun).await {
            Ok(Ok(())) => native::carry(&mut pod, tunnel, Vec::new(), cut).await,
            // The caller waits for an answer, and what it sent first may be at the workload: no reason is true. It
            // sees the tunnel's end.
            Ok(Err(_)) | Err(_) => {
                let _ = pod.set_zero_linger();
                record.refused(flag::UPSTREAM_TERMINATED);
                return Ok(false);
            }
        };
        record.ended(&carried);
        Ok(carried.end == pump::End::Closed)
    }

    async fn stream(self, call: Call, request: Request<RecvStream>, mut respond: SendResponse<Bytes>) {
        let to = goal(&request);
        let shown = *to.as_ref().unwrap_or(&NOWHERE);
        let trace = request.headers().get("traceparent").and_then(|value| value.to_str().ok()).map(str::to_owned);
        let trace = trace.filter(|trace| native::is_trace(trace.as_bytes()));
        let record = Record::inbound(call.peer.id(), &call.to, shown, trace.as_deref());
        let (pod, _open) = match self.connect(&call, to).await {
            Ok(connected) => connected,
            Err(no) => {
                record.refused(no.flag());
                return answer(&mut respond, no.status());
            }
        };
        let mut ok = Response::new(());
        *ok.status_mut() = StatusCode::OK;
        let Ok(send) = respond.send_response(ok, false) else { return };
        let carried = pump::carry(pod, send, request.into_body(), Vec::new(), self.cut_once(&call, shown)).await;
        record.ended(&carried);
    }

    /// Judges and connects: of both modes the one way to a workload. What is returned counts as open.
    async fn connect(&self, call: &Call, to: Result<SocketAddrV4, Refusal>) -> Result<(TcpStream, Counted), No> {
        let place = self.flows.clone().try_acquire_owned().map_err(|_| No::Busy)?;
        let begun = Instant::now();
        let admitted = to.and_then(|to| self.admit(call, to).map(|pod| (pod, to)));
        METRICS.authz.observe(begun.elapsed());
        let (pod, to) = admitted.map_err(|refusal| {
            METRICS.connections.inc(["inbound", "denied"]);
            tracing::info!(caller = %call.peer.id(), called = %call.to, %refusal, "inbound refused");
            if refusal.code == Code::BadRequest { No::Malformed } else { No::Denied }
        })?;
        let failed = |no| {
            METRICS.connections.inc(["inbound", "failed"]);
            no
        };
        let tcp = match timeout(POD_CONNECT_MAX, self.last_leg(&pod, to, call)).await {
            Ok(Ok(tcp)) => tcp,
            Ok(Err(error)) => {
                tracing::debug!(%to, %error, "pod does not answer");
                return Err(failed(No::Unreachable));
            }
            Err(_) => return Err(failed(No::Timeout)),
        };
        METRICS.connections.inc(["inbound", "ok"]);
        METRICS.open.add(["inbound"], 1.0);
        Ok((tcp, Counted { _place: place }))
    }

    /// Returns once the connection may not go on.
    async fn cut_once(&self, call: &Call, to: SocketAddrV4) {
        let refusal = self.revoked(call, to).await;
        METRICS.cut.inc(["inbound"]);
        tracing::info!(caller = %call.peer.id(), called = %call.to, %refusal, "live connection cut");
    }

    /// The receiving node's own decision.
    fn admit(&self, call: &Call, to: SocketAddrV4) -> Result<Arc<LocalPod>, Refusal> {
        let plane = self.plane.borrow().clone();
        let plane = plane.ok_or_else(|| Refusal::new(Code::Unavailable, "a slice", "none yet"))?;
        // Not-here and not-yours look alike from outside.
        let pod =
            plane.pods.get(to.ip()).filter(|pod| *pod.id() == call.to).cloned().ok_or_else(|| {
                Refusal::new(Code::PolicyDenied, format!("an address of {}", call.to), to.to_string())
            })?;
        let verdict = judge(&plane, &self.denials.now(), call, to, self.clock.moment())?;
        if let Some(rule) = verdict.audited {
            METRICS.audited.inc(["inbound"]);
            tracing::info!(%rule, caller = %call.peer.id(), called = %call.to, port = to.port(), "audited: a deny would refuse it");
        }
        Ok(pod)
    }

    /// Returns the refusal once what was admitted would not be admitted any more.
    async fn revoked(&self, call: &Call, to: SocketAddrV4) -> Refusal {
        let (mut plane, mut denials) = (self.plane.clone(), self.denials.watch());
        loop {
            // At first too: something may have changed since the connection was admitted.
            let now = plane.borrow_and_update().clone();
            let denied = denials.borrow_and_update().clone();
            // An SVID that ran out does not end a connection that it began; being denied does, and so does policy.
            if let Some(Err(refusal)) = now.map(|p| permitted(&p, &denied, call, to, self.clock.moment())) {
                return refusal;
            }
            let changed = tokio::select! {
                changed = plane.changed() => changed,
                changed = denials.changed() => changed,
            };
            if changed.is_err() {
                return ending();
            }
        }
    }

    /// Returns the refusal once the caller's node is not where the tunnel comes from.
    async fn moved(&self, call: &Call) -> Refusal {
        let mut plane = self.plane.clone();
        loop {
            let now = plane.borrow_and_update().clone();
            if let Some(Err(refusal)) = now.map(|p| at_home(&p.view, call)) {
                return refusal;
            }
            if plane.changed().await.is_err() {
                return ending();
            }
        }
    }

    /// The socket is made in the pod's namespace and comes from 127/8, which only the agent can send from there;
    /// its goal is the pod's own address, so that services bound to loopback stay private.
    async fn last_leg(&self, pod: &LocalPod, to: SocketAddrV4, call: &Call) -> std::io::Result<TcpStream> {
        let source = SocketAddrV4::new(spread(call.peer.id(), to), 0);
        let socket = self.netns.socket(&pod.netns, source).await?;
        let tcp = socket.connect(SocketAddr::V4(to)).await?;
        tcp.set_nodelay(true)?;
        Ok(tcp)
    }
}

/// Where nothing was asked for.
const NOWHERE: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0);

/// Where an HBONE request goes.
fn goal(request: &Request<RecvStream>) -> Result<SocketAddrV4, Refusal> {
    let bad = |found: String| Refusal::new(Code::BadRequest, "CONNECT <IPv4 address>:<port>", found);
    if request.method() != Method::CONNECT {
        return Err(bad(request.method().to_string()));
    }
    let authority = request.uri().authority().map(|a| a.as_str()).unwrap_or_default();
    authority.parse().map_err(|_| bad(authority.to_owned()))
}

/// A connection that counts as open until this is dropped.
struct Counted {
    _place: OwnedSemaphorePermit,
}

impl Drop for Counted {
    fn drop(&mut self) {
        METRICS.open.add(["inbound"], -1.0);
    }
}

/// Why a connection was not made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum No {
    Malformed,
    Denied,
    Unreachable,
    Timeout,
    Busy,
}

impl No {
    fn status(self) -> StatusCode {
        match self {
            Self::Malformed => StatusCode::BAD_REQUEST,
            Self::Denied => StatusCode::FORBIDDEN,
            Self::Unreachable => StatusCode::BAD_GATEWAY,
            Self::Timeout => StatusCode::GATEWAY_TIMEOUT,
            Self::Busy => StatusCode::SERVICE_UNAVAILABLE,
        }
    }
    fn flag(self) -> &'static str {
        match self {
            Self::Malformed => flag::PROTOCOL_ERROR,
            Self::Denied => flag::DENIED,
            Self::Unreachable | Self::Timeout => flag::UPSTREAM_FAILED,
            Self::Busy => flag::OVERFLOW,
        }
    }
}

impl From<No> for Reason {
    fn from(no: No) -> Self {
        match no {
            No::Malformed => Self::Malformed,
            No::Denied => Self::Denied,
            No::Unreachable => Self::Unreachable,
            No::Timeout => Self::Timeout,
            No::Busy => Self::Busy,
        }
    }
}

/// May this caller speak to that port of this workload now?
fn judge(plane: &Plane, denials: &Denials, call: &Call, to: SocketAddrV4, now: Moment) -> Result<Verdict, Refusal> {
    if call.peer.not_after() < now.latest {
        let found = format!("ended at {} ms", call.peer.not_after().0);
        return Err(Refusal::new(Code::SvidUntrusted, "an SVID in time", found));
    }
    permitted(plane, denials, call, to, now)
}

/// The same of a connection that is open already: all of it but the end of the SVID.
fn permitted(plane: &Plane, denials: &Denials, call: &Call, to: SocketAddrV4, now: Moment) -> Result<Verdict, Refusal> {
    trusted(denials, call)?;
    at_home(&plane.view, call)?;
    let verdict = plane.view.rules.evaluate(call.peer.id(), &call.to, to.port(), now);
    if verdict.allowed {
        return Ok(verdict);
    }
    let found = format!("{} to {} port {}: {}", call.peer.id(), call.to, to.port(), verdict.reason);
    Err(Refusal::new(Code::PolicyDenied, "an allowed connection", found))
}

/// Is the caller's node one that its cell trusts now, and its SVID one that was not revoked?
fn trusted(denials: &Denials, call: &Call) -> Result<(), Refusal> {
    let binding = binding(call)?;
    if let Some(found) = denials.denied_above(&call.peer) {
        return Err(Refusal::new(Code::SvidRevoked, "an intermediate that is not revoked", found));
    }
    // A cell speaks for its own nodes only: what a peer denies is nothing against a caller of another trust domain.
    if denials.denies(&call.peer.id().trust_domain(), &binding.node, binding.generation) {
        return Err(Refusal::new(Code::NodeUntrusted, "a trusted node", binding.node.to_string()));
    }
    let peer = &call.peer;
    if denials.denies_svid(peer.id(), peer.authority(), peer.serial()) {
        return Err(Refusal::new(Code::SvidRevoked, "an SVID that was not revoked", peer.id().as_str()));
    }
    Ok(())
}

/// Does the tunnel come from where the caller's node is? A key that was copied to another node does not bring that along.
fn at_home(view: &View, call: &Call) -> Result<(), Refusal> {
    let NodeBinding { node, generation, .. } = binding(call)?;
    let known = view.callers.get(&(call.peer.id().trust_domain(), node));
    if known.is_some_and(|home| home.is_home_of(generation, call.from)) {
        return Ok(());
    }
    let expected = match known {
        Some(home) => format!("{}, where node {node} is since its generation {}", home.address, home.since),
        None => format!("node {node} among those whose workloads may call here"),
    };
    let found = format!("{}, with an SVID of its generation {generation}", call.from.to_canonical());
    Err(Refusal::new(Code::NodeAddressMismatch, expected, found))
}

/// The node that the caller's SVID was issued through.
fn binding(call: &Call) -> Result<NodeBinding, Refusal> {
    // Callers outside the mesh lack the binding; no policy can name such a caller yet, so they are refused.
    call.peer.binding().ok_or_else(|| Refusal::new(Code::SvidUntrusted, "an SVID bound to a node", "none"))
}

fn ending() -> Refusal {
    Refusal::new(Code::Unavailable, "a running agent", "it is ending")
}

/// One of 127.64.0.0/10 by hash: one address alone would have 28,000 ports for all callers of a pod.
fn spread(caller: &SpiffeId, to: SocketAddrV4) -> Ipv4Addr {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let mut h = DefaultHasher::new();
    (caller, to).hash(&mut h);
    let [_, _, _, _, _, a, b, c] = h.finish().to_be_bytes();
    // Neither .0 nor .255, and at least 64 in the second place: away from what applications use on loopback.
    Ipv4Addr::new(127, 64 + (a & 0x3f), b, 1 + c % 254)
}

fn answer(respond: &mut SendResponse<Bytes>, status: StatusCode) {
    let mut response = Response::new(());
    *response.status_mut() = status;
    // The caller may be gone; then nobody needs the answer.
    let _ = respond.send_response(response, true);
}
