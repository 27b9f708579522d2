//! Open tunnels, kept per (caller, callee, node): never shared between two callers, so a connection's identity is the
//! tunnel's. Native ones are leased to one connection each; what is beyond them, and what goes to nodes that do not speak
//! the native mode, shares HBONE tunnels. Dialing those holds a lock of that one peer only.
//!
//! Each thread that carries has a pool of its own; how much all of them may have of one peer is counted together.

use crate::denials::Denials;
use crate::hbone::{self, Dial, Dialed, Door, Far, Mode, Native, Origin, Tunnel, TunnelError};
use crate::metrics::METRICS;
use crate::netns::Annex;
use crate::shown::Now;
use ambit_identity::svid::Presented;
use ambit_model::{Generation, NodeId, SpiffeId};
use nix::sys::socket::{MsgFlags, recv};
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};
use tokio::sync::Mutex as AsyncMutex;

/// 32 tunnels of 100 connections: beyond it one caller gets `busy` instead of the node's memory.
const TUNNELS_PER_PEER_MAX: usize = 32;
/// Native tunnels of one peer, leased and idle. A connection beyond them costs a stream of a shared tunnel, which weighs a
/// few KiB less than a TLS session of its own.
const NATIVE_PER_PEER_MAX: usize = 64;
/// Idle native tunnels that one thread keeps warm.
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
    /// Which door they are to.
    pub door: Door,
    /// Where they come from: this node's registered address, or the caller's.
    pub from: Ipv4Addr,
    /// Where they end.
    pub node: SocketAddr,
    /// The node that runs it, by its admission: what a denial names.
    pub holder: (NodeId, Generation),
    /// The credentials in use: a renewed SVID or a changed bundle starts new tunnels, the old ones run dry.
    pub credentials: u64,
}

/// One of a number that is bounded; given back when dropped.
#[derive(Debug)]
struct Place(Arc<AtomicUsize>);

impl Place {
    fn take(count: &Arc<AtomicUsize>, max: usize) -> Option<Self> {
        let more = |n| (n < max).then_some(n + 1);
        count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok().map(|_| Self(count.clone()))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// How many tunnels to one peer the threads have together.
#[derive(Debug, Default)]
struct Total {
    native: Arc<AtomicUsize>,
    shared: Arc<AtomicUsize>,
}

/// The totals of all peers, for the pools of all threads. Asked where a thread first meets a peer, and not again.
#[derive(Clone, Debug, Default)]
pub struct Totals(Arc<Mutex<BTreeMap<Key, Weak<Total>>>>);

impl Totals {
    fn of(&self, key: &Key) -> Arc<Total> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(total) = all.get(key).and_then(Weak::upgrade) {
            return total;
        }
        if all.len() >= SWEEP_AT {
            all.retain(|_, total| total.strong_count() > 0);
        }
        let total = Arc::new(Total::default());
        all.insert(key.clone(), Arc::downgrade(&total));
        total
    }
}

#[derive(Debug, Default)]
struct Tunnels {
    open: Vec<(Tunnel, Place)>,
    /// When dialing last failed: whoever queued behind that attempt fails with it instead of dialing in turn.
    failed: Option<Instant>,
}

impl Tunnels {
    fn lease(&mut self, now: &Now) -> Option<hbone::Lease> {
        self.open.retain(|(tunnel, _)| tunnel.is_open());
        self.open.iter().filter(|(tunnel, _)| tunnel.peer().is_good(now)).find_map(|(tunnel, _)| tunnel.lease())
    }

    fn put(&mut self, tunnel: Tunnel, place: Place) -> Result<Lease, TunnelError> {
        let lease = tunnel.lease().ok_or(TunnelError::Busy)?;
        self.open.push((tunnel, place));
        Ok(Lease::Hbone(lease))
    }
}

/// Tunnels of one thread to one peer.
#[derive(Debug)]
struct Peer {
    /// Idle native tunnels, and since when; the last used one is used next.
    warm: Mutex<Vec<(Held, Instant)>>,
    /// Native tunnels of this thread that are dialed, leased or warm.
    here: Arc<AtomicUsize>,
    total: Arc<Total>,
    /// Whether it speaks the native mode, once that is known.
    native: Mutex<Option<bool>>,
    /// Cut: what comes back is closed.
    gone: AtomicBool,
    shared: AsyncMutex<Tunnels>,
}

impl Peer {
    fn new(total: Arc<Total>, door: Door) -> Self {
        Self {
            warm: Mutex::default(),
            here: Arc::default(),
            total,
            native: Mutex::new((door == Door::Pod).then_some(false)),
            gone: AtomicBool::new(false),
            shared: AsyncMutex::default(),
        }
    }

    fn warm(&self) -> MutexGuard<'_, Vec<(Held, Instant)>> {
        self.warm.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An idle tunnel that is alive, and good for another connection. Those that are not are closed.
    fn take(self: &Arc<Self>, now: &Now) -> Option<Lease> {
        let mut warm = self.warm();
        let usable = |held: &Held| is_alive(&held.native) && held.native.peer.is_good(now);
        let held = std::iter::from_fn(|| warm.pop()).map(|(held, _)| held).find(usable)?;
        Some(self.lease(held))
    }

    fn lease(self: &Arc<Self>, held: Held) -> Lease {
        Lease::Native(Box::new(NativeLease { held, peer: self.clone() }))
    }

    /// Closes idle tunnels that `keep` does not want; says how many.
    fn thin(&self, keep: impl Fn(&Native, Instant) -> bool) -> usize {
        let mut warm = self.warm();
        let before = warm.len();
        warm.retain(|(held, since)| keep(&held.native, *since));
        before - warm.len()
    }

    fn is_used(&self) -> bool {
        self.here.load(Ordering::Relaxed) > 0
            // One that somebody is dialing is locked, hence used.
            || !self.shared.try_lock().is_ok_and(|t| !t.open.iter().any(|(tunnel, _)| tunnel.is_open()))
    }

    /// A place for one more native tunnel, if there is one.
    fn places(&self) -> Option<[Place; 2]> {
        let all = Place::take(&self.total.native, NATIVE_PER_PEER_MAX)?;
        Some([all, Place::take(&self.here, usize::MAX)?])
    }

    /// A place for one more shared tunnel.
    fn shared_place(&self) -> Result<Place, TunnelError> {
        Place::take(&self.total.shared, TUNNELS_PER_PEER_MAX).ok_or(TunnelError::Busy)
    }

    /// None where nobody has asked yet.
    fn speaks_native(&self) -> Option<bool> {
        *self.native.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn learn(&self, native: bool) {
        *self.native.lock().unwrap_or_else(PoisonError::into_inner) = Some(native);
    }
}

/// An idle tunnel says nothing: whatever is there to read is its end, or left over from a connection that has ended, and
/// would be taken for the next one's.
fn is_alive(native: &Native) -> bool {
    let look = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    native.secured.opener.is_empty()
        && recv(native.secured.tcp.as_raw_fd(), &mut [0], look) == Err(nix::errno::Errno::EAGAIN)
}

/// A native tunnel, and its places.
#[derive(Debug)]
struct Held {
    native: Native,
    _places: [Place; 2],
}

/// A native tunnel, for one connection.
#[derive(Debug)]
pub struct NativeLease {
    held: Held,
    peer: Arc<Peer>,
}

impl NativeLease {
    /// What the far end of the tunnel showed.
    pub fn peer(&self) -> &Arc<Far> {
        &self.held.native.peer
    }

    /// The tunnel.
    pub fn native(&mut self) -> &mut Native {
        &mut self.held.native
    }

    /// The connection ended in both directions: the tunnel is free for the next one.
    pub fn give_back(self) {
        let mut warm = self.peer.warm();
        // Asked under the lock: whoever cuts the peer says so before it empties the list.
        if warm.len() < WARM_MAX && !self.peer.gone.load(Ordering::Relaxed) {
            warm.push((self.held, Instant::now()));
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
    pub fn peer(&self) -> &Arc<Far> {
        match self {
            Self::Native(lease) => lease.peer(),
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

/// The pool of one thread. Cloning shares.
#[derive(Clone, Debug)]
pub struct Pool {
    peers: Arc<Mutex<BTreeMap<Key, Arc<Peer>>>>,
    /// Whether a workload was ever dialed at its own address.
    pods: Arc<AtomicBool>,
    totals: Totals,
}

impl Pool {
    /// An empty one, which shares the bounds of all that have these `totals`.
    pub fn new(totals: Totals) -> Self {
        Self { peers: Arc::default(), pods: Arc::default(), totals }
    }

    /// A place in a tunnel to `key`; dials if there is none, with what `config` says.
    pub async fn lease(
        &self,
        key: &Key,
        now: &Now,
        annex: &Annex,
        config: impl Fn() -> Result<(ServerName<'static>, Arc<ClientConfig>), TunnelError>,
    ) -> Result<Lease, TunnelError> {
        let (peer, asked) = (self.peer(key), Instant::now());
        let dial = async |mode| {
            let (name, config) = config()?;
            let from = match key.door {
                Door::Node => Origin::Node(key.from),
                Door::Pod => Origin::Pod(key.from, annex.clone()),
            };
            let (node, holder, trust) = (key.node, key.holder.0, now.trust.clone());
            dial(Dial { from, node, holder, name, config, trust }, mode).await
        };
        loop {
            if let Some(lease) = peer.take(now) {
                return Ok(lease);
            }
            let native = peer.speaks_native();
            if native == Some(true)
                && let Some(places) = peer.places()
            {
                return match dial(Mode::Any).await? {
                    Dialed::Native(native) => Ok(peer.lease(Held { native: *native, _places: places })),
                    Dialed::Hbone(tunnel) => {
                        peer.learn(false);
                        let place = peer.shared_place()?;
                        peer.shared.lock().await.put(tunnel, place)
                    }
                };
            }
            let mut tunnels = peer.shared.lock().await;
            if native.is_none() && peer.speaks_native() == Some(true) {
                continue;
            }
            if let Some(lease) = tunnels.lease(now) {
                return Ok(Lease::Hbone(lease));
            }
            if tunnels.failed.is_some_and(|at| at > asked) {
                return Err(TunnelError::Timeout);
            }
            let place = peer.shared_place()?;
            // One connection finds out what the node speaks, and the others wait for it: were it HBONE, each of them would
            // open a tunnel that has room for all.
            let places = native.is_none().then(|| peer.places()).flatten();
            let mode = if places.is_some() { Mode::Any } else { Mode::Hbone };
            let dialed = dial(mode).await.inspect_err(|_| tunnels.failed = Some(Instant::now()))?;
            return match (dialed, places) {
                (Dialed::Native(native), Some(places)) => {
                    peer.learn(true);
                    Ok(peer.lease(Held { native: *native, _places: places }))
                }
                (Dialed::Hbone(tunnel), places) => {
                    if places.is_some() {
                        peer.learn(false);
                    }
                    tunnels.put(tunnel, place)
                }
                // It was not offered: the handshake would have failed.
                (Dialed::Native(_), None) => Err(TunnelError::Busy),
            };
        }
    }

    /// Whether a tunnel to a workload's own address may be open: asked first, since it costs nothing.
    pub fn knows_pods(&self) -> bool {
        self.pods.load(Ordering::Relaxed)
    }

    /// Whether a shared tunnel to `key` is open.
    pub fn is_open(&self, key: &Key) -> bool {
        let peer = self.lock().get(key).cloned();
        // One that somebody is dialing is as good as open: whoever comes waits for it.
        peer.is_some_and(|peer| peer.is_used())
    }

    /// Closes idle tunnels to `node`, whose answer did not come: all of them, or those that have ended where it did end one.
    pub fn doubt(&self, node: SocketAddr, error: &TunnelError) {
        let silent = matches!(error, TunnelError::Timeout | TunnelError::Unreachable { .. });
        for (_, peer) in self.lock().iter().filter(|(key, _)| key.node == node) {
            peer.thin(|native, _| !silent && is_alive(native));
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
            cut += peer.thin(|native, _| !revoked(&native.peer.presented));
            if let Ok(tunnels) = peer.shared.try_lock() {
                let open = tunnels.open.iter().map(|(tunnel, _)| tunnel);
                open.filter(|t| t.is_open() && revoked(&t.peer().presented)).for_each(|t| {
                    t.cut();
                    cut += 1;
                });
            }
            !denied
        });
        cut
    }

    /// Closes idle native tunnels, and from now on each as its connection ends: nothing more is opened from here.
    pub fn leave(&self) {
        for peer in self.lock().values() {
            peer.gone.store(true, Ordering::Relaxed);
            peer.thin(|_, _| false);
        }
    }

    /// Closes native tunnels that were idle too long, or ended; and gives back the places of shared ones that did.
    pub fn sweep(&self) {
        for peer in self.lock().values() {
            peer.thin(|native, since| since.elapsed() < WARM_FOR && is_alive(native));
            if let Ok(mut tunnels) = peer.shared.try_lock() {
                tunnels.open.retain(|(tunnel, _)| tunnel.is_open());
            }
        }
    }

    /// Tunnels open now; a peer that is being dialed counts as none.
    pub fn open(&self) -> usize {
        let count = |peer: &Arc<Peer>| {
            peer.thin(|native, _| is_alive(native));
            let shared = peer.shared.try_lock().map_or(0, |t| t.open.iter().filter(|(t, _)| t.is_open()).count());
            peer.here.load(Ordering::Relaxed) + shared
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
        if key.door == Door::Pod {
            self.pods.store(true, Ordering::Relaxed);
        }
        peers.entry(key.clone()).or_insert_with(|| Arc::new(Peer::new(self.totals.of(key), key.door))).clone()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Key, Arc<Peer>>> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Dials, and counts the handshake.
pub async fn dial(dial: Dial, mode: Mode) -> Result<Dialed, TunnelError> {
    let dialed = hbone::dial(dial, mode).await;
    match &dialed {
        Ok(_) => METRICS.handshakes.inc(["ok", "none"]),
        Err(error) => METRICS.handshakes.inc(["failed", error.reason()]),
    }
    dialed
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(n: u64) -> Key {
        Key {
            source: "spiffe://west/web".parse().unwrap(),
            destination: "spiffe://east/db".parse().unwrap(),
            door: Door::Node,
            from: Ipv4Addr::LOCALHOST,
            node: "127.0.0.2:15008".parse().unwrap(),
            holder: (NodeId([1; 32]), Generation(1)),
            credentials: n,
        }
    }

    #[test]
    fn places_are_bounded_and_come_back() {
        let count = Arc::default();
        let mut places: Vec<_> = (0..3).map(|_| Place::take(&count, 3)).collect();
        assert!(places.iter().all(Option::is_some) && Place::take(&count, 3).is_none());
        places.pop();
        assert!(Place::take(&count, 3).is_some());
        places.clear();
        assert_eq!(count.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn pools_of_one_process_count_a_peer_together_and_each_peer_for_itself() {
        let totals = Totals::default();
        let pools = [Pool::new(totals.clone()), Pool::new(totals.clone())];
        let [one, two] = pools.each_ref().map(|pool| pool.peer(&key(1)));
        let taken: Vec<_> = std::iter::from_fn(|| one.places()).collect();
        assert_eq!(taken.len(), NATIVE_PER_PEER_MAX);
        assert!(two.places().is_none() && pools[1].peer(&key(2)).places().is_some());
        assert!(one.is_used() && !two.is_used());
        drop(taken);
        assert!(two.places().is_some());
        // Whoever is counted by nobody any more is forgotten, and nobody else.
        drop((one, two, pools));
        let kept = totals.of(&key(0));
        (1..2 * SWEEP_AT as u64).for_each(|n| drop(totals.of(&key(n))));
        assert!(totals.0.lock().unwrap().len() <= SWEEP_AT);
        assert!(Arc::ptr_eq(&kept, &totals.of(&key(0))));
    }
}
