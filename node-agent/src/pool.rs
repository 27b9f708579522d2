//! Open tunnels, kept per (caller, callee, node): never shared between two callers, so a stream's identity is the
//! tunnel's. Dialing holds a lock of that one peer only.

use crate::denials::Denials;
use crate::hbone::{self, Lease, Tunnel, TunnelError};
use crate::metrics::METRICS;
use ambit_model::{Generation, NodeId, SpiffeId};
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;
use tokio::sync::Mutex as AsyncMutex;

/// 32 tunnels of 100 connections: beyond it one caller gets `busy` instead of the node's memory.
const TUNNELS_PER_PEER_MAX: usize = 32;
/// Peers remembered before closed ones are swept.
const SWEEP_AT: usize = 256;

/// Whose tunnel, to whom, where.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    /// The calling workload.
    pub source: SpiffeId,
    /// The workload called.
    pub destination: SpiffeId,
    /// This node's registered address, where they come from.
    pub from: Ipv4Addr,
    /// Where tunnels to its node end.
    pub node: SocketAddr,
    /// The node that runs it, by its admission: what a denial names.
    pub holder: (NodeId, Generation),
    /// The credentials in use: a renewed SVID or a changed bundle starts new tunnels, the old ones run dry.
    pub credentials: u64,
}

#[derive(Debug, Default)]
struct Tunnels {
    open: Vec<Tunnel>,
    /// When dialing last failed: whoever queued behind that attempt fails with it instead of dialing in turn.
    failed: Option<Instant>,
}

type Peer = Arc<AsyncMutex<Tunnels>>;

/// The pool. Cloning shares.
#[derive(Clone, Debug, Default)]
pub struct Pool {
    peers: Arc<Mutex<BTreeMap<Key, Peer>>>,
}

impl Pool {
    /// A place in a tunnel to `key`; dials if there is none.
    pub async fn lease(
        &self,
        key: &Key,
        config: impl FnOnce() -> Result<(ServerName<'static>, Arc<ClientConfig>), TunnelError>,
    ) -> Result<Lease, TunnelError> {
        let peer = self.peer(key);
        let asked = Instant::now();
        let mut tunnels = peer.lock().await;
        tunnels.open.retain(Tunnel::is_open);
        if let Some(lease) = tunnels.open.iter().find_map(Tunnel::lease) {
            return Ok(lease);
        }
        if tunnels.failed.is_some_and(|at| at > asked) {
            return Err(TunnelError::Timeout);
        }
        if tunnels.open.len() >= TUNNELS_PER_PEER_MAX {
            return Err(TunnelError::Busy);
        }
        let (name, config) = config()?;
        let tunnel = dial(key.from, key.node, key.holder.0, name, config)
            .await
            .inspect_err(|_| tunnels.failed = Some(Instant::now()))?;
        let lease = tunnel.lease().ok_or(TunnelError::Busy)?;
        tunnels.open.push(tunnel);
        Ok(lease)
    }

    /// Cuts and forgets every tunnel to a node that is denied, and cuts those whose far end showed an SVID that was
    /// revoked since; says how many. A tunnel that is being dialed meanwhile is
    /// forgotten too: whoever dials it asks again before it is used.
    pub fn cut(&self, denials: &Denials) -> usize {
        let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        let mut cut = 0;
        peers.retain(|key, peer| {
            let (node, generation) = key.holder;
            if !denials.denies(&key.destination.trust_domain(), &node, generation) {
                if let Ok(tunnels) = peer.try_lock() {
                    let revoked = |t: &&Tunnel| t.is_open() && denials.denies_presented(t.peer());
                    tunnels.open.iter().filter(revoked).for_each(|t| {
                        t.cut();
                        cut += 1;
                    });
                }
                return true;
            }
            if let Ok(tunnels) = peer.try_lock() {
                tunnels.open.iter().filter(|t| t.is_open()).for_each(|t| {
                    t.cut();
                    cut += 1;
                });
            }
            false
        });
        cut
    }

    /// Tunnels open now; a peer that is being dialed counts as none.
    pub fn open(&self) -> usize {
        let peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        let count = |p: &Peer| p.try_lock().map_or(0, |t| t.open.iter().filter(|t| t.is_open()).count());
        peers.values().map(count).sum()
    }

    fn peer(&self, key: &Key) -> Peer {
        let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        if peers.len() >= SWEEP_AT {
            // A peer that somebody is dialing is locked, hence kept.
            peers.retain(|_, p| !p.try_lock().is_ok_and(|t| !t.open.iter().any(Tunnel::is_open)));
        }
        peers.entry(key.clone()).or_default().clone()
    }
}

/// Dials and counts the handshake.
pub async fn dial(
    from: Ipv4Addr,
    node: SocketAddr,
    holder: NodeId,
    name: ServerName<'static>,
    config: Arc<ClientConfig>,
) -> Result<Tunnel, TunnelError> {
    let dialed = hbone::dial(from, node, holder, name, config).await;
    match &dialed {
        Ok(_) => METRICS.handshakes.inc(["ok", "none"]),
        Err(error) => METRICS.handshakes.inc(["failed", error.reason()]),
    }
    dialed
}
