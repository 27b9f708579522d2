//! Which endpoints are avoided: drives [`crate::outlier`] with what connections find out and with probes, and tells the kernel.
//!
//! A probe makes a tunnel as the caller that found the trouble, and where it was the workload that did not answer, opens a
//! connection to it too. It carries no byte.

use crate::compile::Unhealthy;
use crate::denials::Lane;
use crate::hbone::{self, Dial, Dialed, Door, Mode, Origin, TunnelError};
use crate::kernel::KernelHandle;
use crate::metrics::METRICS;
use crate::native::{self, Answer, Open, Reason};
use crate::netns::Annex;
use crate::outlier::{Change, Evidence, Key, Outliers};
use crate::plane::Plane;
use crate::said::Said;
use crate::{pool, sni};
use ambit_model::SpiffeId;
use ambit_model::policy::Endpoint;
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::ops::Bound;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tokio::time::timeout;

/// Fail-back comes within this and one handshake.
const PROBE_EVERY: Duration = Duration::from_millis(500);
/// Probes in flight at once: a dead cluster must not become a storm of handshakes.
const PROBES_MAX: usize = 32;

/// What failed, and as whom to try it again.
#[derive(Clone, Debug)]
struct Suspect {
    endpoint: Endpoint,
    source: SpiffeId,
}

/// An install that began before a change may end after it and bring the health of before; none takes longer.
const RETELL_FOR: Duration = Duration::from_secs(10);

#[derive(Debug)]
struct List {
    /// Times in it are since then.
    begun: Instant,
    outliers: Outliers,
    /// Whom to probe: those that are out.
    suspects: BTreeMap<Key, Suspect>,
    /// When the health of an address last changed: until [`RETELL_FOR`] after that the kernel is told again.
    changed: BTreeMap<IpAddr, Instant>,
}

impl List {
    /// What became of it is done, and told.
    fn heard(&mut self, key: Key, evidence: Evidence, suspect: Suspect) -> Change {
        let change = self.outliers.heard(key, evidence, self.begun.elapsed());
        match change {
            Change::Out => {
                tracing::warn!(
                    endpoint = %key.0, port = key.1, node = %suspect.endpoint.node_address, why = evidence.as_str(),
                    "endpoint avoided"
                );
                METRICS.ejected.inc([evidence.as_str()]);
                self.suspects.insert(key, suspect);
            }
            Change::Back => {
                tracing::info!(endpoint = %key.0, port = key.1, "endpoint in use again");
                self.suspects.remove(&key);
            }
            Change::None => {
                // It may have moved since.
                if let Some(known) = self.suspects.get_mut(&key).filter(|_| evidence != Evidence::Good) {
                    *known = suspect;
                }
                return change;
            }
        }
        self.changed.insert(key.0, Instant::now());
        change
    }
}

/// The list. Cloning shares.
#[derive(Clone, Debug)]
pub struct Health {
    list: Arc<Mutex<List>>,
    kernel: Option<KernelHandle>,
    denials: Lane,
}

/// One that is avoided, as operators are shown it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Avoided {
    /// Where it listens.
    pub address: IpAddr,
    /// Where it was turned away; 0: no tunnel leads to it, whatever the port.
    pub port: u16,
    /// Who it is.
    pub spiffe_id: String,
    /// See [`Evidence::as_str`].
    pub why: &'static str,
    /// For so long, milliseconds.
    pub for_ms: u64,
    /// How often lately.
    pub times: u32,
    /// It is used again once it was good for so long, milliseconds.
    pub good_for_ms: u64,
}

impl Health {
    /// A list that tells the kernel's services, but of nodes that are denied.
    pub fn new(kernel: Option<KernelHandle>, denials: Lane) -> Self {
        METRICS.unhealthy.set([], 0.0);
        let (outliers, suspects, changed) = Default::default();
        let list = List { begun: Instant::now(), outliers, suspects, changed };
        Self { list: Arc::new(Mutex::new(list)), kernel, denials }
    }

    /// What to avoid.
    pub fn avoided(&self) -> Unhealthy {
        self.lock().outliers.unhealthy()
    }

    /// The addresses of these.
    pub fn unhealthy(&self) -> BTreeSet<IpAddr> {
        self.lock().outliers.out().map(|((address, _), _)| *address).collect()
    }

    /// All that is avoided, and why.
    pub fn shown(&self) -> Vec<Avoided> {
        let list = self.lock();
        let now = list.begun.elapsed();
        let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let row = |(key, known): (&Key, &crate::outlier::Known)| {
            let (why, since) = known.out?;
            let spiffe_id = list.suspects.get(key)?.endpoint.spiffe_id.to_string();
            let (for_ms, good_for_ms) = (ms(now.saturating_sub(since)), ms(known.good_for()));
            Some(Avoided {
                address: key.0,
                port: key.1,
                spiffe_id,
                why: why.as_str(),
                for_ms,
                times: known.times,
                good_for_ms,
            })
        };
        list.outliers.out().filter_map(row).collect()
    }

    /// What a connection of `source` to this port of the endpoint found out.
    pub fn found(&self, plane: &Plane, endpoint: &Endpoint, source: &SpiffeId, port: u16, evidence: Evidence) {
        let address = endpoint.address.ip();
        let keys = match evidence {
            // It says both.
            Evidence::Good => [Some(0), Some(port)],
            Evidence::NoTunnel => [Some(0), None],
            // Of silence nobody knows whose it is: of the tunnel, or of the workload at this port.
            Evidence::Silent | Evidence::TurnedAway => [Some(port), None],
        };
        let mut list = self.lock();
        if evidence == Evidence::Good && list.outliers.is_empty() {
            return;
        }
        let suspect = || Suspect { endpoint: endpoint.clone(), source: source.clone() };
        let changes = keys.into_iter().flatten().map(|port| list.heard((address, port), evidence, suspect()));
        if changes.collect::<Vec<_>>().iter().any(|change| *change != Change::None) {
            self.tell(&list, plane, address);
        }
    }

    /// Makes the kernel's view of what changed lately that of the list.
    fn retell(&self, plane: &Plane) {
        let mut list = self.lock();
        list.changed.retain(|_, at| at.elapsed() < RETELL_FOR);
        for address in list.changed.keys() {
            self.tell(&list, plane, *address);
        }
    }

    /// Probes suspects until the process ends.
    pub async fn probe(self, plane: watch::Receiver<Option<Arc<Plane>>>, denials: Lane, annex: Annex) {
        let mut tick = tokio::time::interval(PROBE_EVERY);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut last = (IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);
        loop {
            tick.tick().await;
            let Some(plane) = plane.borrow().clone() else { continue };
            self.retell(&plane);
            let suspects = next_round(&self.lock().suspects, last);
            last = suspects.last().map_or(last, |(key, _)| *key);
            let probes =
                suspects.into_iter().map(|(key, suspect)| self.probe_one(&plane, &denials, &annex, key, suspect));
            futures::future::join_all(probes).await;
        }
    }

    async fn probe_one(&self, plane: &Plane, denials: &Lane, annex: &Annex, key: Key, suspect: Suspect) {
        // An endpoint that left the view, or moved, needs no health; neither does one that nobody here can or may call.
        let known = plane.view.endpoints.get(&key.0) == Some(&suspect.endpoint)
            && !denials.now().denies_endpoint(&suspect.endpoint);
        if !known {
            let mut list = self.lock();
            list.outliers.forget(key);
            list.suspects.remove(&key);
            list.changed.insert(key.0, Instant::now());
            return self.tell(&list, plane, key.0);
        }
        let evidence = answers(plane, &suspect, key, annex).await;
        let mut list = self.lock();
        if list.suspects.contains_key(&key) && list.heard(key, evidence, suspect) != Change::None {
            self.tell(&list, plane, key.0);
        }
    }

    /// Under the list's lock, so that what the kernel hears last is what the list says last.
    fn tell(&self, list: &List, plane: &Plane, address: IpAddr) {
        METRICS.unhealthy.set([], list.suspects.len() as f64);
        if let Some(kernel) = &self.kernel {
            kernel.set_health(&plane.view, &self.denials.now(), address, &list.outliers.unhealthy());
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, List> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether a tunnel opens, by the node's door or, where nothing listens there, by the workload's; and whether the workload
/// answers, where it is that which was in doubt.
async fn answers(plane: &Plane, Suspect { endpoint, source }: &Suspect, key: Key, annex: &Annex) -> Evidence {
    // Who is not here any more needs no health of anybody.
    let Ok(from) = pod_of(plane, source) else { return Evidence::Good };
    for (door, from) in [(Door::Node, Origin::Node(plane.address)), (Door::Pod, Origin::Pod(from, annex.clone()))] {
        let Some(node) = at(endpoint, door) else { continue };
        let Ok((name, config)) = credentials(plane, source, &endpoint.spiffe_id) else { return Evidence::Good };
        let (holder, trust) = (endpoint.node, plane.trust.current());
        match pool::dial(Dial { from, node, holder, name, config, trust }, Mode::Any).await {
            Err(error) if error.is_refused_port() => {}
            Err(_) => return Evidence::NoTunnel,
            Ok(_) if key.1 == 0 => return Evidence::Good,
            Ok(dialed) => {
                let opened = timeout(hbone::ANSWER_MAX, opens(dialed, endpoint.address.at(key.1))).await;
                return if opened.unwrap_or(false) { Evidence::Good } else { Evidence::TurnedAway };
            }
        }
    }
    Evidence::NoTunnel
}

/// Whether the workload answers at its port. A refusal by policy is an answer.
async fn opens(dialed: Dialed, to: SocketAddr) -> bool {
    match dialed {
        Dialed::Native(mut native) => {
            let open = Open { to, prompt: true, trace: None, from: None, first: Vec::new() };
            let answer = native::open(&mut native.secured, &open).await;
            matches!(answer, Ok(Answer::Opened | Answer::Refused(Reason::Denied | Reason::Busy)))
        }
        Dialed::Hbone(tunnel) => match tunnel.lease() {
            Some(lease) => match lease.open(to, &Said::default()).await {
                Ok(_) => true,
                Err(error) => matches!(error, TunnelError::Refused(code) if hbone::is_denial(code)),
            },
            None => false,
        },
    }
}

/// The IPv4 address of a pod here that is `id`.
fn pod_of(plane: &Plane, id: &SpiffeId) -> Result<Ipv4Addr, TunnelError> {
    let pod = plane.pods.values().find(|pod| pod.id() == id);
    pod.map(|pod| pod.workload.pod.address).ok_or(TunnelError::NoSvid)
}

/// The suspects after `last`, going round: the lowest addresses must not be probed for ever while the others wait.
fn next_round(suspects: &BTreeMap<Key, Suspect>, last: Key) -> Vec<(Key, Suspect)> {
    let after = suspects.range((Bound::Excluded(last), Bound::Unbounded));
    after.chain(suspects.range(..=last)).take(PROBES_MAX).map(|(key, suspect)| (*key, suspect.clone())).collect()
}

/// Where tunnels to `endpoint` end; none where there is no such door: HBONE is not spoken at pods' IPv6 addresses.
pub fn at(endpoint: &Endpoint, door: Door) -> Option<SocketAddr> {
    let address = match door {
        Door::Node => endpoint.node_address,
        Door::Pod => endpoint.address.v4()?,
    };
    Some(SocketAddr::from((address, hbone::PORT)))
}

/// What `source` shows and asks for when it calls `destination`.
pub fn credentials(
    plane: &Plane,
    source: &SpiffeId,
    destination: &SpiffeId,
) -> Result<(ServerName<'static>, Arc<ClientConfig>), TunnelError> {
    let own = plane.credentials_of(source).map_err(|_| TunnelError::NoSvid)?;
    let config = own.client(destination).map_err(|_| TunnelError::NoSvid)?;
    let name = ServerName::try_from(sni::server_name(destination)).map_err(|_| TunnelError::NoSvid)?;
    Ok((name, config))
}

#[cfg(test)]
mod tests {
    use super::*;
    use ambit_model::{Generation, NodeId};

    #[test]
    fn every_suspect_has_its_turn() {
        let suspect = |n: u8| {
            let endpoint = Endpoint {
                spiffe_id: "spiffe://east/db".parse().unwrap(),
                address: Ipv4Addr::new(10, 72, 101, n).into(),
                cluster: "east".parse().unwrap(),
                node_address: Ipv4Addr::new(10, 72, 0, 21),
                node: NodeId([1; 32]),
                generation: Generation(1),
            };
            ((endpoint.address.ip(), 80), Suspect { endpoint, source: "spiffe://west/web".parse().unwrap() })
        };
        let addresses = |round: &[(Key, Suspect)]| round.iter().map(|(key, _)| key.0).collect::<Vec<_>>();
        let all: BTreeMap<_, _> = (0..80).map(suspect).collect();
        let (mut last, mut probed) = ((IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0), BTreeSet::new());
        for _ in 0..3 {
            let round = next_round(&all, last);
            assert_eq!(round.len(), PROBES_MAX);
            last = round.last().unwrap().0;
            probed.extend(addresses(&round));
        }
        assert_eq!(probed.len(), all.len(), "three rounds of 32 are all 80");
        let few: BTreeMap<_, _> = (0..3).map(suspect).collect();
        let round = next_round(&few, (IpAddr::V4(Ipv4Addr::new(10, 72, 101, 1)), 80));
        assert_eq!(
            addresses(&round).iter().map(ToString::to_string).collect::<Vec<_>>(),
            ["10.72.101.2", "10.72.101.0", "10.72.101.1"],
            "each once"
        );
        assert!(next_round(&BTreeMap::new(), last).is_empty());
    }
}
