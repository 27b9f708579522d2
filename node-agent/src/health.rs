//! Which endpoints are avoided: those whose tunnel failed, until a probe opens one again.

use crate::compile::Unhealthy;
use crate::denials::Lane;
use crate::hbone::{self, Dial, Door, Mode, Origin, TunnelError};
use crate::kernel::KernelHandle;
use crate::metrics::METRICS;
use crate::netns::Annex;
use crate::plane::Plane;
use crate::{pool, sni};
use ambit_model::SpiffeId;
use ambit_model::policy::Endpoint;
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::ops::Bound;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::watch;

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

#[derive(Debug, Default)]
struct List {
    suspects: BTreeMap<IpAddr, Suspect>,
    /// When the health of an address last changed: until [`RETELL_FOR`] after that the kernel is told again.
    changed: BTreeMap<IpAddr, Instant>,
}

/// The list. Cloning shares.
#[derive(Clone, Debug)]
pub struct Health {
    list: Arc<Mutex<List>>,
    kernel: Option<KernelHandle>,
    denials: Lane,
}

impl Health {
    /// A list that tells the kernel's services.
    pub fn new(kernel: Option<KernelHandle>, denials: Lane) -> Self {
        METRICS.unhealthy.set([], 0.0);
        Self { list: Arc::default(), kernel, denials }
    }

    /// The addresses to avoid.
    pub fn unhealthy(&self) -> Unhealthy {
        self.lock().suspects.keys().copied().collect()
    }

    /// Avoid `endpoint`: the tunnel that `source` needs to it failed.
    pub fn suspect(&self, plane: &Plane, endpoint: &Endpoint, source: &SpiffeId) {
        let suspect = Suspect { endpoint: endpoint.clone(), source: source.clone() };
        let mut list = self.lock();
        let address = endpoint.address.ip();
        if list.suspects.insert(address, suspect).is_none() {
            tracing::warn!(endpoint = %address, node = %endpoint.node_address, "endpoint avoided: tunnel failed");
            list.changed.insert(address, Instant::now());
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
        let mut last = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
        loop {
            tick.tick().await;
            let Some(plane) = plane.borrow().clone() else { continue };
            self.retell(&plane);
            let suspects = next_round(&self.lock().suspects, last);
            last = suspects.last().map_or(last, |suspect| suspect.endpoint.address.ip());
            let probes = suspects.into_iter().map(|suspect| self.probe_one(&plane, &denials, &annex, suspect));
            futures::future::join_all(probes).await;
        }
    }

    async fn probe_one(&self, plane: &Plane, denials: &Lane, annex: &Annex, suspect: Suspect) {
        let address = suspect.endpoint.address.ip();
        // An endpoint that left the view, or moved, needs no health; neither does one that nobody here can or may call.
        let known = plane.view.endpoints.get(&address) == Some(&suspect.endpoint)
            && !denials.now().denies_endpoint(&suspect.endpoint);
        let answers = !known || answers(plane, &suspect, annex).await;
        let mut list = self.lock();
        if answers && list.suspects.remove(&address).is_some() {
            tracing::info!(endpoint = %address, "endpoint in use again");
            list.changed.insert(address, Instant::now());
            self.tell(&list, plane, address);
        }
    }

    /// Under the list's lock, so that what the kernel hears last is what the list says last.
    fn tell(&self, list: &List, plane: &Plane, address: IpAddr) {
        METRICS.unhealthy.set([], list.suspects.len() as f64);
        if let Some(kernel) = &self.kernel {
            let unhealthy: Unhealthy = list.suspects.keys().copied().collect();
            kernel.set_health(&plane.view, &self.denials.now(), address, &unhealthy);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, List> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether a tunnel opens, by the node's door or, where nothing listens there, by the workload's.
async fn answers(plane: &Plane, Suspect { endpoint, source }: &Suspect, annex: &Annex) -> bool {
    // Who is not here any more needs no health of anybody.
    let Ok(from) = pod_of(plane, source) else { return true };
    for (door, from) in [(Door::Node, Origin::Node(plane.address)), (Door::Pod, Origin::Pod(from, annex.clone()))] {
        let Some(node) = at(endpoint, door) else { continue };
        let Ok((name, config)) = credentials(plane, source, &endpoint.spiffe_id) else { return true };
        let (holder, trust) = (endpoint.node, plane.trust.current());
        match pool::dial(Dial { from, node, holder, name, config, trust }, Mode::Any).await {
            Err(error) if error.is_refused_port() => {}
            dialed => return dialed.is_ok(),
        }
    }
    false
}

/// The IPv4 address of a pod here that is `id`.
fn pod_of(plane: &Plane, id: &SpiffeId) -> Result<Ipv4Addr, TunnelError> {
    let pod = plane.pods.values().find(|pod| pod.id() == id);
    pod.map(|pod| pod.workload.pod.address).ok_or(TunnelError::NoSvid)
}

/// The suspects after `last`, going round: the lowest addresses must not be probed for ever while the others wait.
fn next_round(suspects: &BTreeMap<IpAddr, Suspect>, last: IpAddr) -> Vec<Suspect> {
    let after = suspects.range((Bound::Excluded(last), Bound::Unbounded));
    after.chain(suspects.range(..=last)).take(PROBES_MAX).map(|(_, suspect)| suspect.clone()).collect()
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
            (endpoint.address.ip(), Suspect { endpoint, source: "spiffe://west/web".parse().unwrap() })
        };
        let addresses = |round: &[Suspect]| round.iter().map(|s| s.endpoint.address.ip()).collect::<Vec<_>>();
        let all: BTreeMap<_, _> = (0..80).map(suspect).collect();
        let (mut last, mut probed) = (IpAddr::V4(Ipv4Addr::UNSPECIFIED), std::collections::BTreeSet::new());
        for _ in 0..3 {
            let round = next_round(&all, last);
            assert_eq!(round.len(), PROBES_MAX);
            last = round.last().unwrap().endpoint.address.ip();
            probed.extend(addresses(&round));
        }
        assert_eq!(probed.len(), all.len(), "three rounds of 32 are all 80");
        let few: BTreeMap<_, _> = (0..3).map(suspect).collect();
        let round = next_round(&few, IpAddr::V4(Ipv4Addr::new(10, 72, 101, 1)));
        assert_eq!(
            addresses(&round).iter().map(ToString::to_string).collect::<Vec<_>>(),
            ["10.72.101.2", "10.72.101.0", "10.72.101.1"],
            "each once"
        );
        assert!(next_round(&BTreeMap::new(), last).is_empty());
    }
}
