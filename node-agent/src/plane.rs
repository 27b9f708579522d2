//! What carrying traffic needs, of one instant: the view, the pods that are somebody, and their credentials.

use crate::denials::{Denials, Lane};
use crate::issued::Svid;
use crate::netns::Netns;
use crate::sni;
use crate::view::{View, Workload};
use ambit_identity::SharedTrust;
use ambit_model::{Code, Refusal, SpiffeId};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, ServerConfig};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use tokio::sync::watch;

/// A workload that runs here, and its namespace.
#[derive(Clone, Debug)]
pub struct LocalPod {
    /// Which pod, and who it is.
    pub workload: Workload,
    /// Where its sockets live.
    pub netns: Netns,
}

impl LocalPod {
    /// Who it is.
    pub fn id(&self) -> &SpiffeId {
        &self.workload.entry.spiffe_id
    }
}

/// What one local identity shows in tunnels.
#[derive(Clone, Debug)]
pub struct Credentials {
    /// The identity.
    pub id: SpiffeId,
    /// As a server: shows the SVID, demands one of a known trust domain.
    pub server: Arc<ServerConfig>,
    svid: Arc<Svid>,
    key: Arc<CertifiedKey>,
    trust: SharedTrust,
}

impl Credentials {
    /// Prepares `svid` for use against `trust`.
    pub fn new(svid: Arc<Svid>, trust: SharedTrust) -> Result<Self, Refusal> {
        let key = crate::tls::certified_key(&svid)?;
        let server = Arc::new(crate::tls::server(key.clone(), trust.clone())?);
        Ok(Self { id: svid.id.clone(), server, svid, key, trust })
    }
    /// As a client that accepts `expected` and nobody else.
    pub fn client(&self, expected: &SpiffeId) -> Result<Arc<ClientConfig>, Refusal> {
        crate::tls::client(self.key.clone(), self.trust.clone(), expected).map(Arc::new)
    }
    /// The certificate behind them.
    pub fn svid(&self) -> &Arc<Svid> {
        &self.svid
    }
}

/// The whole, replaced on every change.
#[derive(Clone, Debug)]
pub struct Plane {
    /// The view in the kernel.
    pub view: Arc<View>,
    /// Enrolled pods by address, of either family.
    pub pods: BTreeMap<IpAddr, Arc<LocalPod>>,
    /// Credentials by identity.
    pub credentials: BTreeMap<SpiffeId, Arc<Credentials>>,
    /// The same by the name a dialer asks for.
    pub by_name: BTreeMap<String, Arc<Credentials>>,
    /// Whom to trust, by trust domain; always the newest bundles.
    pub trust: SharedTrust,
    /// Where this node's tunnels come from: what it registered.
    pub address: Ipv4Addr,
    /// Of services and of nodes: no workload calls from there, unless its node reported it there.
    pub no_clients: BTreeSet<Ipv4Addr>,
}

impl Plane {
    /// Puts the parts together.
    pub fn new(
        view: Arc<View>,
        pods: impl IntoIterator<Item = Arc<LocalPod>>,
        credentials: impl IntoIterator<Item = Arc<Credentials>>,
        trust: SharedTrust,
        address: Ipv4Addr,
    ) -> Self {
        let credentials: BTreeMap<_, _> = credentials.into_iter().map(|c| (c.id.clone(), c)).collect();
        let by_name = credentials.values().map(|c| (sni::server_name(&c.id), c.clone())).collect();
        let places = |p: Arc<LocalPod>| p.workload.pod.addresses().map(|at| (at.ip(), p.clone())).collect::<Vec<_>>();
        let pods = pods.into_iter().flat_map(places).collect();
        let nodes = view.callers.values().map(|home| IpAddr::V4(home.address));
        let nodes = nodes.chain(view.endpoints.values().map(|endpoint| IpAddr::V4(endpoint.node_address)));
        let services = view.services.iter().map(|service| service.address.ip());
        let v4 = |ip: IpAddr| if let IpAddr::V4(ip) = ip.to_canonical() { Some(ip) } else { None };
        let no_clients = nodes.chain(services).filter_map(v4).chain([address]).collect();
        Self { view, pods, credentials, by_name, trust, address, no_clients }
    }
    /// The credentials of `id`, or a refusal.
    pub fn credentials_of(&self, id: &SpiffeId) -> Result<&Arc<Credentials>, Refusal> {
        let none = || Refusal::new(Code::SvidUntrusted, format!("an SVID of {id}"), "none issued here");
        self.credentials.get(id).ok_or_else(none)
    }
}

/// What decides about connections, and that it changes.
#[derive(Debug)]
pub struct Follow {
    plane: watch::Receiver<Option<Arc<Plane>>>,
    denials: watch::Receiver<Arc<Denials>>,
}

impl Follow {
    /// Of these, from now on.
    pub fn of(plane: &watch::Receiver<Option<Arc<Plane>>>, denials: &Lane) -> Self {
        Self { plane: plane.clone(), denials: denials.watch() }
    }
    /// As it is now.
    pub fn now(&mut self) -> (Option<Arc<Plane>>, Arc<Denials>) {
        (self.plane.borrow_and_update().clone(), self.denials.borrow_and_update().clone())
    }
    /// Since [`Follow::now`]. Who is not followed any more has changed.
    pub fn has_changed(&self) -> bool {
        self.plane.has_changed().unwrap_or(true) || self.denials.has_changed().unwrap_or(true)
    }
    /// Waits until it changes.
    ///
    /// # Errors
    /// Who tells of it is gone.
    pub async fn changed(&mut self) -> Result<(), watch::error::RecvError> {
        tokio::select! {
            changed = self.plane.changed() => changed,
            changed = self.denials.changed() => changed,
        }
    }
}
