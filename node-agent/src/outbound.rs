//! The sending end: takes a captured connection, finds out where it was going, and carries it there in a tunnel.
//!
//! The kernel has allowed it already. What cannot be traced back, proved or reached ends in a reset, never in a
//! connection by another way.

use crate::clock::Clock;
use crate::denials::{Denials, Lane};
use crate::hbone::{Lease, TunnelError};
use crate::health::{self, Health};
use crate::kernel::KernelHandle;
use crate::metrics::METRICS;
use crate::plane::{LocalPod, Plane};
use crate::pool::{Key, Pool};
use crate::{compile, pump};
use ambit_model::policy::Endpoint;
use bytes::Bytes;
use h2::{RecvStream, SendStream};
use std::net::{SocketAddr, SocketAddrV4};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};

/// Captured connections at once, over all pods.
const FLOWS_MAX: usize = 16 * 1024;

/// Where a captured connection was going.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Captured {
    /// The address that the application asked for: an endpoint's, or a service's.
    pub asked: SocketAddrV4,
    /// The endpoint that the kernel chose.
    pub endpoint: SocketAddrV4,
}

/// The parts. Cloning shares.
#[derive(Clone, Debug)]
pub struct Outbound {
    plane: watch::Receiver<Option<Arc<Plane>>>,
    denials: Lane,
    pool: Pool,
    health: Health,
    flows: Arc<Semaphore>,
    clock: Arc<Clock>,
    port: u16,
}

impl Outbound {
    /// An outbound side that follows `plane` and `denials` and reaches nodes on `port` (15008 but in tests).
    pub fn new(
        plane: watch::Receiver<Option<Arc<Plane>>>,
        denials: Lane,
        health: Health,
        clock: Arc<Clock>,
        port: u16,
    ) -> Self {
        Self { plane, denials, pool: Pool::default(), health, flows: Arc::new(Semaphore::new(FLOWS_MAX)), clock, port }
    }

    /// Cuts tunnels to nodes as they are denied, until the process ends.
    pub async fn cut_denied(self) {
        let mut denials = self.denials.watch();
        while denials.changed().await.is_ok() {
            let now = denials.borrow_and_update().clone();
            let tunnels = self.pool.cut(&now);
            if tunnels > 0 {
                tracing::info!(tunnels, revision = now.revision().0, "tunnels to denied nodes cut");
            }
        }
    }

    /// Tunnels open now.
    pub fn tunnels(&self) -> usize {
        self.pool.open()
    }

    /// Serves the capture listener of one pod until dropped. `who` says whose pod it is, once that is known.
    pub async fn serve(
        self,
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
                reset(&tcp);
                continue;
            };
            let this = self.clone();
            tokio::spawn(async move { this.take(&pod, tcp, captured).await });
        }
    }

    /// Carries one captured connection of `pod`. Without a record of where it was going, it is reset.
    pub async fn take(&self, pod: &LocalPod, tcp: TcpStream, captured: Option<Captured>) {
        let begun = Instant::now();
        let _ = tcp.set_nodelay(true);
        let place = self.flows.clone().try_acquire_owned();
        let opened = match (captured, place) {
            (Some(captured), Ok(place)) => self.open(pod, captured).await.map(|o| (o, place)),
            (None, _) => {
                METRICS.connections.inc(["outbound", "unknown"]);
                return reset(&tcp);
            }
            (Some(_), Err(_)) => Err(TunnelError::Busy),
        };
        match opened {
            Ok((Opened { lease, send, recv, endpoint }, _place)) => {
                METRICS.connections.inc(["outbound", "ok"]);
                METRICS.setup.observe(begun.elapsed());
                METRICS.open.add(["outbound"], 1.0);
                let cut = async {
                    let refused =
                        |now: &Arc<Denials>| now.denies_endpoint(&endpoint) || now.denies_presented(lease.peer());
                    self.denials.until(refused).await;
                    METRICS.cut.inc(["outbound"]);
                    tracing::info!(caller = %pod.id(), called = %endpoint.spiffe_id, node = %endpoint.node, "live connection cut");
                };
                pump::carry(tcp, send, recv, cut).await;
                METRICS.open.add(["outbound"], -1.0);
            }
            Err(error) => {
                METRICS.connections.inc([
                    "outbound",
                    if matches!(error.reason(), "denied" | "node_untrusted" | "svid_revoked") {
                        "denied"
                    } else {
                        "failed"
                    },
                ]);
                tracing::debug!(caller = %pod.id(), ?captured, %error, "outbound refused");
                reset(&tcp);
            }
        }
    }

    /// Opens a stream to the chosen endpoint; for a service, where that fails, to one other.
    async fn open(&self, pod: &LocalPod, captured: Captured) -> Result<Opened, TunnelError> {
        let plane = self.plane.borrow().clone().ok_or(TunnelError::NoSvid)?;
        let gone = || TunnelError::Refused(http::StatusCode::NOT_FOUND);
        let first = match plane.view.endpoints.get(captured.endpoint.ip()) {
            Some(endpoint) => self.open_at(&plane, pod, endpoint, captured.endpoint.port()).await,
            // The endpoint left the view between the kernel's choice and now.
            None => Err(gone()),
        };
        let error = match first {
            Ok(opened) => return Ok(opened),
            Err(error) if error.is_retryable() => error,
            Err(error) => return Err(error),
        };
        // No byte of the application has been read yet: trying elsewhere repeats nothing.
        match self.other(&plane, pod, captured) {
            Some(endpoint) => {
                METRICS.retries.inc([error.reason()]);
                self.open_at(&plane, pod, endpoint, captured.asked.port()).await
            }
            None => Err(error),
        }
    }

    async fn open_at(
        &self,
        plane: &Plane,
        pod: &LocalPod,
        endpoint: &Endpoint,
        port: u16,
    ) -> Result<Opened, TunnelError> {
        if self.denials.now().denies_endpoint(endpoint) {
            return Err(TunnelError::NodeDenied);
        }
        let mut node = health::node(endpoint);
        node.set_port(self.port);
        let own = plane.credentials_of(pod.id()).map_err(|_| TunnelError::NoSvid)?;
        let key = Key {
            source: pod.id().clone(),
            destination: endpoint.spiffe_id.clone(),
            from: plane.address,
            node,
            holder: (endpoint.node, endpoint.generation),
            credentials: own.svid().since.0,
        };
        let opened = async {
            let lease = self.pool.lease(&key, || health::credentials(plane, pod.id(), &endpoint.spiffe_id)).await?;
            // It may have been dialed before the list came, or by a far end that has nothing newer to show.
            if self.denials.now().denies_presented(lease.peer()) {
                lease.cut();
                return Err(TunnelError::SvidRevoked);
            }
            let (send, recv) = lease.open(SocketAddrV4::new(endpoint.address, port)).await?;
            Ok(Opened { lease, send, recv, endpoint: endpoint.clone() })
        }
        .await;
        if let Err(error) = &opened
            && TunnelError::is_tunnel(error)
        {
            if matches!(error, TunnelError::OtherNode { .. }) {
                tracing::warn!(caller = %pod.id(), %error, "tunnel refused");
            }
            self.health.suspect(plane, endpoint, pod.id());
        }
        opened
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

/// An open stream, and to whom.
struct Opened {
    lease: Lease,
    send: SendStream<Bytes>,
    recv: RecvStream,
    endpoint: Endpoint,
}

/// The application sees a reset, as it would from a remote refusal.
fn reset(tcp: &TcpStream) {
    let _ = tcp.set_zero_linger();
}
