//! Dialing tunnels, and HBONE: HTTP/2 CONNECT streams inside mutual TLS. One such tunnel carries many connections of one
//! pair of workloads; a native one ([`crate::native`]) carries one at a time.
//!
//! Knows nothing of policy: who may open a stream is decided by [`crate::inbound`], where to by [`crate::outbound`].

use crate::native;
use crate::netns::Annex;
use crate::said::Said;
use crate::secure::{self, Bytestream, Secured};
use crate::shown::{Now, Shown};
use crate::silence;
use ambit_identity::svid::Presented;
use ambit_identity::{Trust, Usage};
use ambit_model::{NodeId, SpiffeId};
use bytes::Bytes;
use futures::FutureExt;
use h2::client::SendRequest;
use h2::{Ping, PingPong, RecvStream, SendStream};
use http::{Method, Request, StatusCode, Version};
use nix::sys::socket::{setsockopt, sockopt};
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::Notify;
use tokio::time::timeout;

/// The registered HBONE port.
pub const PORT: u16 = 15008;
/// TCP, TLS and HTTP/2 preface together; a failover must fit twice into its target of 5 s.
pub const DIAL_MAX: Duration = Duration::from_millis(1500);
/// The same at a pod's address. It is tried where nothing listens at the node's, which one of our own agents that is dead looks
/// like too, and then nothing answers.
pub const POD_DIAL_MAX: Duration = Duration::from_millis(500);
/// From CONNECT to its answer, which includes the far agent's connect to the pod ([`POD_CONNECT_MAX`]).
pub const ANSWER_MAX: Duration = Duration::from_millis(2500);
/// A pod on the far agent's own machine answers in microseconds or is stuck.
pub const POD_CONNECT_MAX: Duration = Duration::from_millis(1000);
/// Connections in one tunnel; the next one opens another tunnel.
pub const STREAMS_MAX: usize = 100;
/// Requests of one tunnel that are served at once: a caller counts a stream as ended a little before we do.
pub const REQUESTS_MAX: usize = STREAMS_MAX + 28;
/// Headers of a request, in bytes as HTTP/2 counts them: ours have 300. Frames that go on beyond it end the tunnel.
const HEADER_BYTES_MAX: u32 = 16 * 1024;
/// Requests that were reset before they were looked at; one more ends the tunnel (CVE-2023-44487).
const RESETS_MAX: usize = 32;
/// Requests that we reset for what was wrong with them, and remember; one more ends the tunnel (CVE-2025-8671).
const ERRORS_MAX: usize = 256;
/// Bytes in flight per connection: 256 KiB fills 1 Gbit/s at 2 ms.
const STREAM_WINDOW: u32 = 256 * 1024;
/// Bytes in flight per tunnel.
const TUNNEL_WINDOW: u32 = 1024 * 1024;
/// A peer that was killed sends no RST: only silence tells.
const PING_EVERY: Duration = Duration::from_millis(500);
/// An answer to a ping takes a round trip; on a loaded machine, a scheduling delay more.
pub const PONG_MAX: Duration = Duration::from_millis(1000);
/// The same of a caller: it may be a small program that reads now and then. That its machine is gone the kernel finds out
/// sooner (`silence.rs`).
pub const CALLER_PONG_MAX: Duration = Duration::from_secs(10);
/// An unused tunnel is closed after this.
const IDLE_MAX: Duration = Duration::from_secs(60);
/// The receiver closes an unused native tunnel after this: later than the caller does, so that a caller hardly ever uses
/// one that is being closed.
pub const NATIVE_IDLE_MAX: Duration = Duration::from_secs(90);

/// Why a stream was not opened.
#[derive(Debug, thiserror::Error)]
pub enum TunnelError {
    /// TCP to the node failed.
    #[error("node {node} cannot be reached")]
    Unreachable {
        /// The node.
        node: SocketAddr,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// TLS or HTTP/2 was not agreed.
    #[error("handshake with {node} failed")]
    Handshake {
        /// The node.
        node: SocketAddr,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The SVID at the other end was not issued through the endpoint's node: a downstream authority's, or a copy.
    #[error("the SVID of {id} at {node} is bound to {found}, not to node {expected}")]
    OtherNode {
        /// Where.
        node: SocketAddr,
        /// Of whom.
        id: SpiffeId,
        /// The node that runs the endpoint.
        expected: NodeId,
        /// What the SVID says.
        found: String,
    },
    /// No answer in time.
    #[error("no answer in time")]
    Timeout,
    /// The tunnel ended while we waited.
    #[error("the tunnel broke")]
    Broken(#[source] std::io::Error),
    /// The far agent is ending, and has taken nothing of this connection: another tunnel leads to who comes after it.
    #[error("the agent at the other end is ending")]
    Left,
    /// The far agent said no: 401 by policy (403, where it is one of Envoy's), 503 where its pod does not answer, 400 where it
    /// is asked for an address that is not the workload's.
    #[error("refused with {0}")]
    Refused(StatusCode),
    /// The workload itself broke off. What it was sent may have been read.
    #[error("the workload broke off")]
    Reset,
    /// Too many tunnels to one peer.
    #[error("too many connections to one peer")]
    Busy,
    /// Its node is denied, or ours is.
    #[error("the node at the other end is denied")]
    NodeDenied,
    /// What it showed was revoked.
    #[error("the SVID at the other end was revoked")]
    SvidRevoked,
    /// We have nothing to show: no SVID for the caller.
    #[error("no SVID for the calling workload")]
    NoSvid,
}

impl TunnelError {
    /// Whether the tunnel itself failed, so that the endpoint should be avoided until a probe succeeds.
    pub fn is_tunnel(&self) -> bool {
        matches!(
            self,
            Self::Unreachable { .. }
                | Self::Handshake { .. }
                | Self::OtherNode { .. }
                | Self::Timeout
                | Self::Broken(_)
        )
    }
    /// Whether nothing listens there: the node is up, and no agent of ours is.
    pub fn is_refused_port(&self) -> bool {
        matches!(self, Self::Unreachable { source, .. } if source.kind() == std::io::ErrorKind::ConnectionRefused)
    }
    /// Whether another endpoint may succeed where this one failed. A refusal by policy stands.
    pub fn is_retryable(&self) -> bool {
        self.is_tunnel()
            || matches!(self, Self::NodeDenied | Self::SvidRevoked | Self::Left)
            || matches!(self, Self::Refused(code) if !is_denial(*code))
    }
    /// A label for figures.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Unreachable { .. } => "unreachable",
            Self::Handshake { .. } => "handshake",
            Self::OtherNode { .. } => "other_node",
            Self::Timeout => "timeout",
            Self::Broken(_) => "broken",
            Self::Left => "left",
            Self::Refused(code) if is_denial(*code) => "denied",
            Self::Refused(_) => "refused",
            Self::Reset => "reset",
            Self::Busy => "busy",
            Self::NodeDenied => "node_untrusted",
            Self::SvidRevoked => "svid_revoked",
            Self::NoSvid => "no_svid",
        }
    }
    /// Why, where it was this agent that would not go there: all else is that it could not, or that the far end would not.
    pub fn own_refusal(&self) -> Option<&'static str> {
        matches!(self, Self::NodeDenied | Self::SvidRevoked | Self::NoSvid).then(|| self.reason())
    }
}

/// Whether a peer says by it that its policy refuses: ztunnel and we by 401, Envoy's rules by 403.
pub fn is_denial(code: StatusCode) -> bool {
    matches!(code, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN)
}

/// What a tunnel's users and its driver share.
#[derive(Debug, Default)]
pub struct Shared {
    closed: AtomicBool,
    streams: AtomicUsize,
    /// Told once, to the driver: everything in the tunnel ends now.
    cut: Notify,
}

/// An open tunnel of one pair of workloads.
#[derive(Clone, Debug)]
pub struct Tunnel {
    requests: SendRequest<Bytes>,
    shared: Arc<Shared>,
    /// What the far end showed.
    peer: Arc<Far>,
}

/// The far end of a tunnel.
#[derive(Debug)]
pub struct Far {
    /// What it showed.
    pub presented: Presented,
    shown: Shown,
}

impl Far {
    /// Whether a connection may begin on what it showed.
    pub fn is_good(&self, now: &Now) -> bool {
        self.shown.still(now).is_ok()
    }
}

/// One connection's place in a tunnel; gives it back when dropped.
#[derive(Debug)]
pub struct Lease {
    tunnel: Tunnel,
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.tunnel.shared.streams.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A native tunnel that carries nothing now.
#[derive(Debug)]
pub struct Native {
    /// The connection.
    pub secured: Secured,
    /// What the far end showed.
    pub peer: Arc<Far>,
}

/// Where tunnels to a workload end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Door {
    /// At its node's address, as our own agents dial: the server name tells which workload is meant.
    Node,
    /// At its own address, as Istio's agents do: that tells it. HBONE only.
    Pod,
}

/// Where a tunnel comes from.
#[derive(Clone, Debug)]
pub enum Origin {
    /// This node's registered address.
    Node(Ipv4Addr),
    /// The calling pod's address, by a socket in the annex.
    Pod(Ipv4Addr, Annex),
}

/// Whom to dial, and as who.
#[derive(Debug)]
pub struct Dial {
    /// Where it comes from, and which door it is to.
    pub from: Origin,
    /// Where it ends.
    pub node: SocketAddr,
    /// The node that is expected there: of the callee's SVIDs only one issued through it will do.
    pub holder: NodeId,
    /// Selects the callee at its node's door.
    pub name: ServerName<'static>,
    /// Accepts exactly the callee's SPIFFE ID.
    pub config: Arc<ClientConfig>,
    /// The bundles by which it does, as of now.
    pub trust: Arc<Trust>,
}

/// What may be spoken in a tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// What both ends prefer.
    Any,
    /// HBONE.
    Hbone,
}

/// What a node that was dialed speaks.
#[derive(Debug)]
pub enum Dialed {
    /// The native mode, as our own agents.
    Native(Box<Native>),
    /// HBONE.
    Hbone(Tunnel),
}

/// Opens a tunnel.
pub async fn dial(dial: Dial, mode: Mode) -> Result<Dialed, TunnelError> {
    let (node, wait) = match &dial.from {
        Origin::Node(_) => (dial.node, DIAL_MAX),
        Origin::Pod(..) => (dial.node, POD_DIAL_MAX),
    };
    let dialing = async {
        let (secured, peer) = connect(dial, mode).await?;
        if native::is_native(secured.protocol.as_deref()) {
            return Ok(Dialed::Native(Box::new(Native { secured, peer })));
        }
        shared(secured, peer, node).await.map(Dialed::Hbone)
    };
    timeout(wait, dialing).await.map_err(|_| TunnelError::Timeout)?
}

async fn connect(dial: Dial, mode: Mode) -> Result<(Secured, Arc<Far>), TunnelError> {
    let Dial { from, node, holder, mut name, mut config, trust } = dial;
    let at_pod = matches!(from, Origin::Pod(..));
    if mode == Mode::Hbone || at_pod {
        Arc::make_mut(&mut config).alpn_protocols = vec![crate::tls::HBONE.to_vec()];
    }
    if at_pod {
        // As Istio's agents: an address is no name, so none is asked for (RFC 6066, section 3).
        name = ServerName::from(node.ip());
    }
    let tcp = match &from {
        Origin::Node(from) => reach(*from, node).await,
        Origin::Pod(from, annex) => from_pod(*from, annex, node).await,
    };
    let tcp = tcp.map_err(|source| TunnelError::Unreachable { node, source })?;
    let shake = |source| TunnelError::Handshake { node, source };
    silence::tune(&tcp).map_err(shake)?;
    let mut secured = secure::connect(tcp, config, name).await.map_err(shake)?;
    let presented = Presented::of(&secured.chain).ok_or_else(|| shake(std::io::Error::other("no SVID")))?;
    // Of which admission is not asked: a pod that starts under a new one is shown by the SVID that is held already. An
    // admission that ended badly is denied, and so is what was issued under it.
    if presented.binding.is_none_or(|bound| bound.node != holder) {
        let found = presented.binding.map_or_else(|| "no node".to_owned(), |bound| format!("node {}", bound.node));
        return Err(TunnelError::OtherNode { node, id: presented.id, expected: holder, found });
    }
    let shown = Shown::new(std::mem::take(&mut secured.chain), Usage::Server, presented.not_after, &trust);
    Ok((secured, Arc::new(Far { presented, shown })))
}

/// A tunnel that connections share.
async fn shared(secured: Secured, peer: Arc<Far>, node: SocketAddr) -> Result<Tunnel, TunnelError> {
    let (requests, mut connection) = h2::client::Builder::new()
        .enable_push(false)
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(TUNNEL_WINDOW)
        .max_send_buffer_size(STREAM_WINDOW as usize)
        .handshake::<_, Bytes>(Bytestream::new(secured))
        .await
        .map_err(|e| TunnelError::Handshake { node, source: std::io::Error::other(e) })?;
    let shared = Arc::new(Shared::default());
    let ping = connection.ping_pong();
    let tunnel = Tunnel { requests, shared: shared.clone(), peer };
    tokio::spawn(async move {
        tokio::select! {
            end = connection => if let Err(error) = end { tracing::debug!(%node, %error, "tunnel ended") },
            () = silence(ping, PONG_MAX, Some(shared.clone())) => tracing::debug!(%node, "tunnel closed"),
            () = shared.cut.notified() => tracing::debug!(%node, "tunnel cut"),
        }
        shared.closed.store(true, Ordering::Relaxed);
    });
    Ok(tunnel)
}

/// A request that the far end's GOAWAY leaves out was not and will not be processed (RFC 9113, section 6.8).
fn broken(error: h2::Error) -> TunnelError {
    if error.is_go_away() && error.is_remote() && error.reason() == Some(h2::Reason::NO_ERROR) {
        return TunnelError::Left;
    }
    TunnelError::Broken(std::io::Error::other(error))
}

/// The receiver takes this node's leaves from the registered address only, and a route may choose another of the machine's.
async fn reach(from: Ipv4Addr, node: SocketAddr) -> std::io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    // The port is chosen at connect: tunnels to different nodes share ports.
    setsockopt(&socket, sockopt::IpBindAddressNoPort, &true)?;
    match socket.bind((from, 0).into()) {
        // Behind a translation one to one the machine does not have the address itself. What arrives is judged there.
        Err(e) if e.kind() == std::io::ErrorKind::AddrNotAvailable => {}
        bound => bound?,
    }
    socket.connect(node).await
}

async fn from_pod(from: Ipv4Addr, annex: &Annex, node: SocketAddr) -> std::io::Result<TcpStream> {
    annex.socket(from).await?.connect(node).await
}

/// Returns once the peer has not answered for `pong_max` or, where `shared` is given, the tunnel has been idle too long.
pub async fn silence(ping: Option<PingPong>, pong_max: Duration, shared: Option<Arc<Shared>>) {
    let Some(mut ping) = ping else { return };
    let mut idle = Duration::ZERO;
    loop {
        tokio::time::sleep(PING_EVERY).await;
        match timeout(pong_max, ping.ping(Ping::opaque())).await {
            Ok(Ok(_)) => {}
            Ok(Err(_)) | Err(_) => return,
        }
        idle = if shared.as_ref().is_some_and(|s| s.streams.load(Ordering::Relaxed) == 0) {
            idle + PING_EVERY
        } else {
            Duration::ZERO
        };
        if idle >= IDLE_MAX {
            return;
        }
    }
}

impl Lease {
    /// What the far end of the tunnel showed.
    pub fn peer(&self) -> &Arc<Far> {
        &self.tunnel.peer
    }
    /// Ends the whole tunnel.
    pub fn cut(&self) {
        self.tunnel.cut();
    }
}

impl Tunnel {
    /// What the far end showed.
    pub fn peer(&self) -> &Far {
        &self.peer
    }
    /// Whether it can still be used.
    pub fn is_open(&self) -> bool {
        !self.shared.closed.load(Ordering::Relaxed)
    }
    /// Ends the tunnel and every connection in it.
    pub fn cut(&self) {
        self.shared.closed.store(true, Ordering::Relaxed);
        // Keeps its word for a driver that does not wait yet.
        self.shared.cut.notify_one();
    }
    /// Takes a place in the tunnel, if one is free and the far end takes requests.
    pub fn lease(&self) -> Option<Lease> {
        if matches!(self.requests.clone().ready().now_or_never(), Some(Err(_))) {
            return None;
        }
        let taken = self.shared.streams.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| {
            (n < STREAMS_MAX && self.is_open()).then_some(n + 1)
        });
        taken.ok().map(|_| Lease { tunnel: self.clone() })
    }
}

impl Lease {
    /// Asks the far agent to connect to `to`, an address of its pods.
    pub async fn open(
        &self,
        to: impl Into<SocketAddr>,
        said: &Said,
    ) -> Result<(SendStream<Bytes>, RecvStream), TunnelError> {
        let to = to.into();
        let ask = async {
            let request = said
                .write(Request::builder())
                .method(Method::CONNECT)
                .version(Version::HTTP_2)
                .uri(to.to_string())
                .body(())
                .map_err(|_| TunnelError::Refused(StatusCode::BAD_REQUEST))?;
            let mut requests = self.tunnel.requests.clone().ready().await.map_err(broken)?;
            let (answer, send) = requests.send_request(request, false).map_err(broken)?;
            let answer = answer.await.map_err(broken)?;
            match answer.status() {
                StatusCode::OK => Ok((send, answer.into_body())),
                code => Err(TunnelError::Refused(code)),
            }
        };
        timeout(ANSWER_MAX, ask).await.map_err(|_| TunnelError::Timeout)?
    }
}

/// The server's side of the HTTP/2 handshake, with the same bounds.
pub async fn accept<T: AsyncRead + AsyncWrite + Unpin>(io: T) -> Result<h2::server::Connection<T, Bytes>, h2::Error> {
    h2::server::Builder::new()
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(TUNNEL_WINDOW)
        .max_concurrent_streams(REQUESTS_MAX as u32)
        .max_send_buffer_size(STREAM_WINDOW as usize)
        .max_header_list_size(HEADER_BYTES_MAX)
        .max_pending_accept_reset_streams(RESETS_MAX)
        .max_local_error_reset_streams(Some(ERRORS_MAX))
        .handshake(io)
        .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_peer_answers_is_final_where_its_policy_refuses_and_only_there() {
        let cases =
            [(401, "denied"), (403, "denied"), (400, "refused"), (404, "refused"), (503, "refused"), (504, "refused")];
        for (code, reason) in cases {
            let error = TunnelError::Refused(StatusCode::from_u16(code).unwrap());
            assert_eq!((error.is_retryable(), error.reason()), (reason != "denied", reason), "{code}");
            assert!(!error.is_tunnel(), "the node is well");
        }
    }
}
