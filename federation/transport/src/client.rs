//! Dialing a cell.

use crate::coalesced::Coalesced;
use ambit_identity::tls::{Expect, SharedTrust, Trust, client_config};
use ambit_model::{Code, Refusal};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use rustls::server::ResolvesServerCert;
use rustls::sign::CertifiedKey;
use std::net::SocketAddr;
use std::sync::{Arc, RwLock};
use std::time::Duration;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::transport::{Channel, Endpoint, Uri};

/// A replica that does not complete a handshake in this time is as good as down.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// A far end whose process hangs is noticed within interval + timeout; one whose machine is gone much sooner, by the
/// kernel. Longer than the time between two heartbeats of an agent's stream, which so needs no pings.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(12);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(4);

/// The identity presented; replaced when it is renewed. None only before enrolment.
#[derive(Clone, Default)]
pub struct Identity {
    current: Arc<RwLock<Option<Arc<CertifiedKey>>>>,
}

impl Identity {
    /// Starts with `identity`.
    pub fn new(identity: Option<Arc<CertifiedKey>>) -> Self {
        Self { current: Arc::new(RwLock::new(identity)) }
    }
    /// A server's resolver that always presents what this is at that moment.
    pub fn resolver(&self) -> Arc<dyn ResolvesServerCert> {
        Arc::new(Presented(self.clone()))
    }
    /// Replaces it for new connections.
    pub fn replace(&self, identity: Arc<CertifiedKey>) {
        *self.current.write().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(identity);
    }
    /// What new connections present.
    pub fn current(&self) -> Option<Arc<CertifiedKey>> {
        self.current.read().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }
}

/// An identity as a server presents it; a server without one ends the handshake.
struct Presented(Identity);

impl std::fmt::Debug for Presented {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Presented")
    }
}

impl ResolvesServerCert for Presented {
    fn resolve(&self, _: rustls::server::ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.0.current()
    }
}

/// Makes channels. Cheap to clone.
#[derive(Clone)]
pub struct Dialer {
    trust: SharedTrust,
    identity: Identity,
}

impl Dialer {
    /// Verifies with `trust` and presents `identity`.
    pub fn new(trust: SharedTrust, identity: Identity) -> Self {
        Self { trust, identity }
    }

    /// A connected channel to `addr`, whose far end is `expect`. Errors: `fingerprint_mismatch` where another root than
    /// the pinned one answers; else `unavailable` with the reason.
    pub async fn channel(&self, addr: SocketAddr, expect: Expect) -> Result<Channel, Refusal> {
        let config = client_config(self.trust.clone(), expect, self.identity.current(), &[b"h2"])?;
        let tls = TlsConnector::from(Arc::new(config));
        let connect = move |_: Uri| {
            let tls = tls.clone();
            async move {
                let tcp = TcpStream::connect(addr).await?;
                crate::alive::watch(&tcp)?;
                let stream = tls.connect(ServerName::IpAddress(addr.ip().into()), tcp).await?;
                Ok::<_, std::io::Error>(TokioIo::new(Coalesced::new(stream)))
            }
        };
        let endpoint = Endpoint::from_shared(format!("http://{addr}"))
            .map_err(|e| Refusal::new(Code::BadRequest, "an address", e.to_string()))?
            .connect_timeout(CONNECT_TIMEOUT)
            .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
            .keep_alive_timeout(KEEPALIVE_TIMEOUT)
            .keep_alive_while_idle(true);
        let connected =
            tokio::time::timeout(CONNECT_TIMEOUT, endpoint.connect_with_connector(tower::service_fn(connect)));
        match connected.await {
            Ok(Ok(channel)) => Ok(channel),
            Ok(Err(e)) => Err(self.refused(addr, &chain(&e))),
            Err(_) => Err(Refusal::new(Code::Unavailable, format!("a cell replica at {addr}"), "no handshake in 3 s")),
        }
    }
}

impl Dialer {
    /// rustls tells of a root that is not the pinned one only by this; trying again would not help.
    fn refused(&self, addr: SocketAddr, reason: &str) -> Refusal {
        let trust = self.trust.current();
        match &*trust {
            Trust::Pinned(_, fingerprint) if reason.contains(WRONG_ROOT) => {
                let expected = fingerprint.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
                let found = format!("{addr}, whose chain does not end in that root");
                Refusal::new(Code::FingerprintMismatch, format!("a replica under the root {expected}"), found)
            }
            Trust::Pinned(..) | Trust::Bundles(_) => {
                Refusal::new(Code::Unavailable, format!("a cell replica at {addr}"), reason)
            }
        }
    }
}

/// rustls' words for a chain that does not end at the pinned root; tests with real handshakes hold it to them.
const WRONG_ROOT: &str = "invalid peer certificate: UnknownIssuer";

/// An error with its causes, once.
fn chain(error: &dyn std::error::Error) -> String {
    let mut out = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let text = cause.to_string();
        if !out.contains(&text) {
            out.push_str(": ");
            out.push_str(&text);
        }
        source = cause.source();
    }
    out
}
