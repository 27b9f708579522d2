//! HTTPS for strangers: handshakes and connections are bounded in number and in time, from one address and from all.

use axum::Router;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use rustls::ServerConfig;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;

/// Connections at once. An answer is a few kilobytes, and who fetches a bundle comes every few minutes.
const CONNECTIONS_MAX: usize = 256;
/// Of these from one address: a proxy, or a site behind one address.
const PER_ADDRESS_MAX: usize = 32;
const HANDSHAKE_MAX: Duration = Duration::from_secs(5);
/// From the first byte of a request to the last of its head.
const HEAD_MAX: Duration = Duration::from_secs(5);
/// A connection is for a handful of requests: then it ends, however slowly it is read.
const CONNECTION_MAX: Duration = Duration::from_secs(30);
/// Request heads are a few hundred bytes.
const HEAD_BYTES_MAX: usize = 16 * 1024;

/// Open connections by address; an address without one has no row.
#[derive(Clone, Default)]
struct ByAddress(Arc<Mutex<BTreeMap<IpAddr, usize>>>);

/// One connection's place, until it is dropped.
struct Place(ByAddress, IpAddr);

impl ByAddress {
    fn enter(&self, from: IpAddr) -> Option<Place> {
        let mut rows = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = rows.entry(from).or_default();
        if *count >= PER_ADDRESS_MAX {
            return None;
        }
        *count += 1;
        Some(Place(self.clone(), from))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut rows = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = rows.get_mut(&self.1) {
            *count -= 1;
            if *count == 0 {
                rows.remove(&self.1);
            }
        }
    }
}

pub(super) async fn serve(listener: TcpListener, tls: ServerConfig, router: Router) {
    let acceptor = TlsAcceptor::from(Arc::new(tls));
    let (places, by_address) = (Arc::new(Semaphore::new(CONNECTIONS_MAX)), ByAddress::default());
    while let Ok(place) = places.clone().acquire_owned().await {
        let Ok((tcp, from)) = listener.accept().await else {
            // Out of descriptors, most likely: wait for some to close.
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        let Some(own) = by_address.enter(from.ip()) else {
            tracing::debug!(%from, "too many connections from one address");
            continue;
        };
        let (acceptor, router) = (acceptor.clone(), router.clone());
        tokio::spawn(async move {
            match tokio::time::timeout(CONNECTION_MAX, connection(acceptor, tcp, router)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::debug!(%from, %error, "connection from outside"),
                Err(_) => tracing::debug!(%from, "connection from outside held too long"),
            }
            drop((place, own));
        });
    }
}

async fn connection(
    acceptor: TlsAcceptor,
    tcp: TcpStream,
    router: Router,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    tcp.set_nodelay(true)?;
    let stream = tokio::time::timeout(HANDSHAKE_MAX, acceptor.accept(tcp)).await??;
    let mut http = auto::Builder::new(TokioExecutor::new()).http1_only();
    http.http1().timer(TokioTimer::new()).header_read_timeout(HEAD_MAX).max_buf_size(HEAD_BYTES_MAX);
    http.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router)).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_has_its_share_and_gives_it_back() {
        let (rows, a, b) = (ByAddress::default(), "10.0.0.1".parse().unwrap(), "10.0.0.2".parse().unwrap());
        let mut held: Vec<_> = (0..PER_ADDRESS_MAX).map(|_| rows.enter(a).unwrap()).collect();
        assert!(rows.enter(a).is_none() && rows.enter(b).is_some());
        held.pop();
        assert!(rows.enter(a).is_some());
        drop(held);
        assert!(rows.0.lock().unwrap().is_empty());
    }
}
