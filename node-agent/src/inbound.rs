//! The receiving end of tunnels: proves who calls, decides again, and connects to the pod.
//!
//! The far node is not relied on: its verdict is worth nothing here. What cannot be proved is refused.

use crate::clock::Clock;
use crate::denials::{Denials, Lane};
use crate::hbone::{self, POD_CONNECT_MAX};
use crate::metrics::METRICS;
use crate::netns::NetnsThread;
use crate::plane::{LocalPod, Plane};
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
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::time::timeout;

/// Tunnels at once; each is a TLS session and its windows.
const TUNNELS_MAX: usize = 1024;
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
        let _ = tcp.set_nodelay(true);
        let shaken = timeout(HANDSHAKE_MAX, self.handshake(tcp, from.ip())).await.unwrap_or_else(|_| {
            Err(("timeout", Refusal::new(Code::Unauthenticated, "a handshake within 3 s", "silence")))
        });
        let (mut streams, call) = shaken.map_err(|(reason, refusal)| {
            METRICS.handshakes.inc(["failed", reason]);
            refusal
        })?;
        METRICS.handshakes.inc(["ok", "none"]);
        tracing::debug!(%from, caller = %call.peer.id(), called = %call.to, "tunnel open");
        let quiet = hbone::silence(streams.ping_pong(), None);
        // A node that was put out keeps no tunnel, not even an idle one.
        let denied = self.denials.until(|denials| trusted(denials, &call).is_err());
        // Nor one whose node is elsewhere by now, or nowhere.
        let moved = self.moved(&call);
        tokio::pin!(quiet, denied, moved);
        loop {
            let next = tokio::select! {
                next = streams.accept() => next,
                () = &mut quiet => return Ok(()),
                () = &mut denied => return trusted(&self.denials.now(), &call),
                refusal = &mut moved => return Err(refusal),
            };
            let Some(Ok((request, respond))) = next else { return Ok(()) };
            let (this, call) = (self.clone(), call.clone());
            tokio::spawn(async move { this.stream(call, request, respond).await });
        }
    }

    async fn handshake(
        &self,
        tcp: TcpStream,
        from: IpAddr,
    ) -> Result<
        (h2::server::Connection<tokio_rustls::server::TlsStream<TcpStream>, Bytes>, Call),
        (&'static str, Refusal),
    > {
        let broken = |e: std::io::Error| ("tls", Refusal::new(Code::Unauthenticated, "a TLS handshake", e.to_string()));
        let start = tokio_rustls::LazyConfigAcceptor::new(Default::default(), tcp).await.map_err(broken)?;
        let name = start.client_hello().server_name().unwrap_or_default().to_owned();
        let plane = self.plane.borrow().clone();
        let called = plane.as_ref().and_then(|p| p.by_name.get(&name)).cloned().ok_or_else(|| {
            ("unknown_name", Refusal::new(Code::NotFound, "the name of a workload of this node", name))
        })?;
        let stream = start.into_stream(called.server.clone()).await.map_err(broken)?;
        let (Some(chain), Some(plane)) = (stream.get_ref().1.peer_certificates(), plane) else {
            return Err(("svid", Refusal::new(Code::Unauthenticated, "an X.509-SVID", "none")));
        };
        let peer = tls::peer(chain, &plane.trust, self.clock.now()).map_err(|r| ("svid", r))?;
        let call = Call { peer: Arc::new(peer), from, to: called.id.clone() };
        trusted(&self.denials.now(), &call).map_err(|r| (r.code.as_str(), r))?;
        at_home(&plane.view, &call).map_err(|r| {
            tracing::warn!(caller = %call.peer.id(), called = %call.to, refusal = %r, "tunnel refused");
            (r.code.as_str(), r)
        })?;
        let h2 = hbone::accept(stream)
            .await
            .map_err(|e| ("http2", Refusal::new(Code::BadRequest, "HTTP/2", e.to_string())))?;
        Ok((h2, call))
    }

    async fn stream(self, call: Call, request: Request<RecvStream>, mut respond: SendResponse<Bytes>) {
        let Ok(_place) = self.flows.clone().try_acquire_owned() else {
            return answer(&mut respond, StatusCode::SERVICE_UNAVAILABLE);
        };
        let begun = Instant::now();
        let admitted = self.admit(&call, &request);
        METRICS.authz.observe(begun.elapsed());
        let (pod, to) = match admitted {
            Ok(admitted) => admitted,
            Err(refusal) => {
                METRICS.connections.inc(["inbound", "denied"]);
                tracing::info!(caller = %call.peer.id(), called = %call.to, %refusal, "inbound refused");
                let malformed = refusal.code == Code::BadRequest;
                return answer(&mut respond, if malformed { StatusCode::BAD_REQUEST } else { StatusCode::FORBIDDEN });
            }
        };
        let tcp = match timeout(POD_CONNECT_MAX, self.last_leg(&pod, to, &call)).await {
            Ok(Ok(tcp)) => tcp,
            Ok(Err(error)) => {
                METRICS.connections.inc(["inbound", "failed"]);
                tracing::debug!(%to, %error, "pod does not answer");
                return answer(&mut respond, StatusCode::BAD_GATEWAY);
            }
            Err(_) => {
                METRICS.connections.inc(["inbound", "failed"]);
                return answer(&mut respond, StatusCode::GATEWAY_TIMEOUT);
            }
        };
        let mut ok = Response::new(());
        *ok.status_mut() = StatusCode::OK;
        let Ok(send) = respond.send_response(ok, false) else { return };
        METRICS.connections.inc(["inbound", "ok"]);
        METRICS.open.add(["inbound"], 1.0);
        let cut = async {
            let refusal = self.revoked(&call, to).await;
            METRICS.cut.inc(["inbound"]);
            tracing::info!(caller = %call.peer.id(), called = %call.to, %refusal, "live connection cut");
        };
        pump::carry(tcp, send, request.into_body(), cut).await;
        METRICS.open.add(["inbound"], -1.0);
    }

    /// The receiving node's own decision.
    fn admit(&self, call: &Call, request: &Request<RecvStream>) -> Result<(Arc<LocalPod>, SocketAddrV4), Refusal> {
        let bad = |found: String| Refusal::new(Code::BadRequest, "CONNECT <IPv4 address>:<port>", found);
        if request.method() != Method::CONNECT {
            return Err(bad(request.method().to_string()));
        }
        let authority = request.uri().authority().map(|a| a.as_str()).unwrap_or_default();
        let to: SocketAddrV4 = authority.parse().map_err(|_| bad(authority.to_owned()))?;
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
        Ok((pod, to))
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
    if denials.denies_authority(&call.peer.id().trust_domain(), call.peer.authority()) {
        let found = call.peer.authority();
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
