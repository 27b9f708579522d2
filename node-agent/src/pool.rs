//! Open tunnels, kept per (caller, callee, node): never shared between two callers, so a connection's identity is the
//! tunnel's. Native ones are leased to one connection each; what is beyond them, and what goes to nodes that do not speak
//! the native mode, shares HBONE tunnels. Dialing those holds a lock of that one peer only.

use crate::denials::Denials;
use crate::hbone::{self, Dialed, Native, Tunnel, TunnelError};
use crate::metrics::METRICS;
use ambit_identity::svid::Presented;
use ambit_model::{Generation, NodeId, SpiffeId};
use nix::sys::socket::{MsgFlags, recv};
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::Mutex as AsyncMutex;

/// 32 tunnels of 100 connections: beyond it one caller gets `busy` instead of the node's memory.
const TUNNELS_PER_PEER_MAX: usize = 32;
/// Native tunnels of one peer, leased and idle. A connection beyond them costs a stream of a shared tunnel, which weighs a
/// few KiB less than a TLS session of its own.
const NATIVE_PER_PEER_MAX: usize = 64;
/// Idle native tunnels that are kept warm.
const WARM_MAX: usize = 16;
/// An unused native tunnel is closed after this; the far end would after [`hbone::NATIVE_IDLE_MAX`].
const WARM_FOR: Duration = Duration::from_secs(60);
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

/// Tunnels to one peer.
#[derive(Debug, Default)]
struct Peer {
    /// Idle native tunnels, and since when; the last used one is used next.
    warm: Mutex<Vec<(Native, Instant)>>,
    /// Native tunnels that are dialed or leased.
    leased: AtomicUsize,
    /// It speaks HBONE only.
    foreign: AtomicBool,
    /// Cut: what comes back is closed.
    gone: AtomicBool,
    shared: AsyncMutex<Tunnels>,
}

impl Peer {
    fn warm(&self) -> MutexGuard<'_, Vec<(Native, Instant)>> {
        self.warm.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An idle tunnel that is alive.
    fn take(&self) -> Option<Native> {
        let mut warm = self.warm();
        std::iter::from_fn(|| warm.pop()).map(|(native, _)| native).find(is_alive)
    }

    /// Closes idle tunnels that `keep` does not want; says how many.
    fn thin(&self, keep: impl Fn(&(Native, Instant)) -> bool) -> usize {
        let mut warm = self.warm();
        let before = warm.len();
        warm.retain(keep);
        before - warm.len()
    }

    fn is_used(&self) -> bool {
        self.leased.load(Ordering::Relaxed) > 0
            || !self.warm().is_empty()
            // One that somebody is dialing is locked, hence used.
            || !self.shared.try_lock().is_ok_and(|t| !t.open.iter().any(Tunnel::is_open))
    }

    /// A place for one more native tunnel, if there is one.
    fn place(self: &Arc<Self>) -> Option<Place> {
        let more = |n| (n < NATIVE_PER_PEER_MAX).then_some(n + 1);
        let taken = self.leased.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
        taken.ok().map(|_| Place(self.clone()))
    }
}

/// An idle tunnel says nothing: whatever is there to read is its end.
fn is_alive(native: &Native) -> bool {
    let look = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    native.secured.opener.is_empty()
        && recv(native.secured.tcp.as_raw_fd(), &mut [0], look) == Err(nix::errno::Errno::EAGAIN)
}

/// Counts a native tunnel as leased; given back when dropped.
#[derive(Debug)]
struct Place(Arc<Peer>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.leased.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A native tunnel, for one connection.
#[derive(Debug)]
pub struct NativeLease {
    /// The tunnel.
    pub native: Native,
    place: Place,
}

impl NativeLease {
    /// The connection ended in both directions: the tunnel is free for the next one.
    pub fn give_back(self) {
        let peer = &self.place.0;
        let mut warm = peer.warm();
        // Asked under the lock: whoever cuts the peer says so before it empties the list.
        if warm.len() < WARM_MAX && !peer.gone.load(Ordering::Relaxed) {
            warm.push((self.native, Instant::now()));
        }
    }
}

/// A place in a tunnel.
#[derive(Debug)]
pub enum Lease {
    /// A tunnel of its own.
    Native(Box<NativeLease>),
    /// A stream of a shared one.
    Hbone(hbone::Lease),
}

impl Lease {
    /// What the far end of the tunnel showed.
    pub fn peer(&self) -> &Arc<Presented> {
        match self {
            Self::Native(lease) => &lease.native.peer,
            Self::Hbone(lease) => lease.peer(),
        }
    }
    /// Ends the whole tunnel.
    pub fn cut(self) {
        match self {
            Self::Native(_) => {}
            Self::Hbone(lease) => lease.cut(),
        }
    }
}

/// The pool. Cloning shares.
#[derive(Clone, Debug, Default)]
pub struct Pool {
    peers: Arc<Mutex<BTreeMap<Key, Arc<Peer>>>>,
}

impl Pool {
    /// A place in a tunnel to `key`; dials if there is none.
    pub async fn lease(
        &self,
        key: &Key,
        config: impl FnOnce() -> Result<(ServerName<'static>, Arc<ClientConfig>), TunnelError>,
    ) -> Result<Lease, TunnelError> {
        let peer = self.peer(key);
        let place = if peer.foreign.load(Ordering::Relaxed) { None } else { peer.place() };
        let Some(place) = place else {
            let (name, config) = config()?;
            return share(&peer, key, name, config).await.map(Lease::Hbone);
        };
        if let Some(native) = peer.take() {
            return Ok(Lease::Native(Box::new(NativeLease { native, place })));
        }
        let (name, config) = config()?;
        match dial_any(key, name, config).await? {
            Dialed::Native(native) => Ok(Lease::Native(Box::new(NativeLease { native: *native, place }))),
            Dialed::Hbone(tunnel) => {
                peer.foreign.store(true, Ordering::Relaxed);
                let lease = tunnel.lease().ok_or(TunnelError::Busy)?;
                peer.shared.lock().await.open.push(tunnel);
                Ok(Lease::Hbone(lease))
            }
        }
    }

    /// Cuts and forgets every tunnel to a node that is denied, and cuts those whose far end showed an SVID that was
    /// revoked since; says how many. A tunnel that is being dialed or carries a connection is forgotten too: whoever has
    /// it asks again before it is used, and follows the list while it is.
    pub fn cut(&self, denials: &Denials) -> usize {
        let mut cut = 0;
        self.lock().retain(|key, peer| {
            let (node, generation) = key.holder;
            let denied = denials.denies(&key.destination.trust_domain(), &node, generation);
            if denied {
                peer.gone.store(true, Ordering::Relaxed);
            }
            let revoked = |peer: &Presented| denied || denials.denies_presented(peer);
            cut += peer.thin(|(native, _)| !revoked(&native.peer));
            if let Ok(tunnels) = peer.shared.try_lock() {
                tunnels.open.iter().filter(|t| t.is_open() && revoked(t.peer())).for_each(|t| {
                    t.cut();
                    cut += 1;
                });
            }
            !denied
        });
        cut
    }

    /// Closes native tunnels that were idle too long, or ended.
    pub fn sweep(&self) {
        for peer in self.lock().values() {
            peer.thin(|(native, since)| since.elapsed() < WARM_FOR && is_alive(native));
        }
    }

    /// Tunnels open now; a peer that is being dialed counts as none.
    pub fn open(&self) -> usize {
        let count = |peer: &Arc<Peer>| {
            peer.thin(|(native, _)| is_alive(native));
            let shared = peer.shared.try_lock().map_or(0, |t| t.open.iter().filter(|t| t.is_open()).count());
            peer.leased.load(Ordering::Relaxed) + peer.warm().len() + shared
        };
        self.lock().values().map(count).sum()
    }

    fn peer(&self, key: &Key) -> Arc<Peer> {
        let mut peers = self.lock();
        if let Some(peer) = peers.get(key) {
            return peer.clone();
        }
        if peers.len() >= SWEEP_AT {
            peers.retain(|_, peer| peer.is_used());
        }
        peers.entry(key.clone()).or_default().clone()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Key, Arc<Peer>>> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A stream's place in a shared tunnel; dials if none has one.
async fn share(
    peer: &Peer,
    key: &Key,
    name: ServerName<'static>,
    config: Arc<ClientConfig>,
) -> Result<hbone::Lease, TunnelError> {
    let asked = Instant::now();
    let mut tunnels = peer.shared.lock().await;
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
    let tunnel = dial(key.from, key.node, key.holder.0, name, config)
        .await
        .inspect_err(|_| tunnels.failed = Some(Instant::now()))?;
    let lease = tunnel.lease().ok_or(TunnelError::Busy)?;
    tunnels.open.push(tunnel);
    Ok(lease)
}

async fn dial_any(key: &Key, name: ServerName<'static>, config: Arc<ClientConfig>) -> Result<Dialed, TunnelError> {
    counted(hbone::dial_any(key.from, key.node, key.holder.0, name, config).await)
}

/// Dials and counts the handshake.
pub async fn dial(
    from: Ipv4Addr,
    node: SocketAddr,
    holder: NodeId,
    name: ServerName<'static>,
    config: Arc<ClientConfig>,
) -> Result<Tunnel, TunnelError> {
    counted(hbone::dial(from, node, holder, name, config).await)
}

fn counted<T>(dialed: Result<T, TunnelError>) -> Result<T, TunnelError> {
    match &dialed {
        Ok(_) => METRICS.handshakes.inc(["ok", "none"]),
        Err(error) => METRICS.handshakes.inc(["failed", error.reason()]),
    }
    dialed
}
