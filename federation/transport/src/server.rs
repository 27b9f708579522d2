//! Serving gRPC over mutual TLS.

use crate::coalesced::Coalesced;
use ambit_identity::svid::PeerSvid;
use ambit_identity::tls::SharedTrust;
use ambit_model::{Refusal, Stamp};
use rustls::ServerConfig;
use std::collections::BTreeMap;
use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::body::Body;
use tonic::service::Routes;
use tonic::transport::server::{Connected, Router};
use tower::{Layer, Service};

/// Slow handshakes are cut, so that they cannot hold their places (Keylime CVE-2023-38200).
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Handshakes under way at once; more wait in the listener's backlog.
const HANDSHAKES_MAX: usize = 256;
/// Of these from one address; further ones are closed at once. A handshake takes milliseconds, so a whole site behind
/// one address needs fewer, and one address that leaves them half-open holds up nobody else.
const HANDSHAKES_PER_ADDRESS_MAX: usize = 64;

/// Open connections without a certificate: enrolments are short. Kept apart from the others, so that strangers who hold
/// theirs open keep no replica, agent or operator out.
const ANONYMOUS_MAX: usize = 512;
/// Open connections of identified callers: every node of a large cluster, several times over.
const IDENTIFIED_MAX: usize = 16_384;

/// Who is at the far end of a connection: a request extension.
#[derive(Clone, Debug)]
pub struct Caller {
    /// The verified SVID, or none for a client without a certificate.
    pub svid: Option<PeerSvid>,
    /// Where it comes from.
    pub remote: SocketAddr,
}

/// An accepted, verified stream.
struct Accepted {
    stream: Coalesced<TlsStream<TcpStream>>,
    caller: Caller,
    /// Held while the connection is open.
    _place: OwnedSemaphorePermit,
}

impl Connected for Accepted {
    type ConnectInfo = Caller;
    fn connect_info(&self) -> Caller {
        self.caller.clone()
    }
}
impl AsyncRead for Accepted {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}
impl AsyncWrite for Accepted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// Serves `router` on `listener` until `shutdown`. The [`Caller`] is an extension of every request.
pub async fn serve<L>(
    listener: TcpListener,
    config: ServerConfig,
    trust: SharedTrust,
    router: Router<L>,
    shutdown: impl Future<Output = ()>,
) -> Result<(), tonic::transport::Error>
where
    L: Layer<Routes>,
    L::Service: Service<http::Request<Body>, Response = http::Response<Body>> + Clone + Send + 'static,
    <L::Service as Service<http::Request<Body>>>::Future: Send,
    <L::Service as Service<http::Request<Body>>>::Error: Into<Box<dyn std::error::Error + Send + Sync>> + Send,
{
    // Handshakes are done aside and handed over here; the bound is the number of connections not yet taken in.
    let (ready, accepted) = mpsc::channel::<Result<Accepted, std::io::Error>>(HANDSHAKES_MAX);
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let accepting = async move {
        let places = Arc::new(Semaphore::new(HANDSHAKES_MAX));
        let underway = Underway::default();
        let open = Open::new(ANONYMOUS_MAX, IDENTIFIED_MAX);
        while let Ok(place) = places.clone().acquire_owned().await {
            let Ok((tcp, remote)) = listener.accept().await else {
                // Out of descriptors, most likely: wait for some to close.
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            };
            let Some(turn) = underway.enter(remote.ip()) else {
                tracing::debug!(%remote, "too many handshakes under way from one address");
                continue;
            };
            let (acceptor, trust, ready, open) = (acceptor.clone(), trust.clone(), ready.clone(), open.clone());
            tokio::spawn(async move {
                match tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake(acceptor, trust, open, tcp, remote)).await {
                    Ok(Ok(stream)) => drop(ready.send(Ok(stream)).await),
                    Ok(Err(error)) => tracing::debug!(%remote, %error, "handshake refused"),
                    Err(_) => tracing::debug!(%remote, "handshake too slow"),
                }
                drop((turn, place));
            });
        }
    };
    let serving = router.serve_with_incoming_shutdown(ReceiverStream::new(accepted), shutdown);
    tokio::select! {
        biased;
        served = serving => served,
        () = accepting => Ok(()),
    }
}

/// Places for open connections.
#[derive(Clone)]
struct Open {
    anonymous: Arc<Semaphore>,
    identified: Arc<Semaphore>,
}

impl Open {
    fn new(anonymous: usize, identified: usize) -> Self {
        Self { anonymous: Arc::new(Semaphore::new(anonymous)), identified: Arc::new(Semaphore::new(identified)) }
    }
    fn place(&self, identified: bool) -> Option<OwnedSemaphorePermit> {
        let places = if identified { &self.identified } else { &self.anonymous };
        places.clone().try_acquire_owned().ok()
    }
}

/// Handshakes under way by address; an address without one has no row.
#[derive(Clone, Default)]
struct Underway {
    by_address: Arc<Mutex<BTreeMap<IpAddr, usize>>>,
}

/// One of them, until it is dropped.
struct Turn {
    all: Underway,
    from: IpAddr,
}

impl Underway {
    fn enter(&self, from: IpAddr) -> Option<Turn> {
        let mut rows = self.by_address.lock().unwrap_or_else(PoisonError::into_inner);
        let count = rows.entry(from).or_default();
        if *count >= HANDSHAKES_PER_ADDRESS_MAX {
            return None;
        }
        *count += 1;
        Some(Turn { all: self.clone(), from })
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut rows = self.all.by_address.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = rows.get_mut(&self.from) {
            *count -= 1;
            if *count == 0 {
                rows.remove(&self.from);
            }
        }
    }
}

async fn handshake(
    acceptor: TlsAcceptor,
    trust: SharedTrust,
    open: Open,
    tcp: TcpStream,
    remote: SocketAddr,
) -> Result<Accepted, std::io::Error> {
    crate::alive::watch(&tcp)?;
    let stream = acceptor.accept(tcp).await?;
    let svid = match stream.get_ref().1.peer_certificates() {
        None => None,
        Some(chain) => Some(trust.current().verify(chain, now()).map_err(|r: Refusal| std::io::Error::other(r))?),
    };
    let place = open.place(svid.is_some()).ok_or_else(|| std::io::Error::other("too many open connections"))?;
    Ok(Accepted { stream: Coalesced::new(stream), caller: Caller { svid, remote }, _place: place })
}

fn now() -> Stamp {
    Stamp(SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strangers_take_no_place_of_the_identified_and_give_theirs_back() {
        let open = Open::new(1, 1);
        let held = open.place(false);
        assert!(held.is_some() && open.place(false).is_none());
        assert!(open.place(true).is_some());
        drop(held);
        assert!(open.place(false).is_some());
    }
}
