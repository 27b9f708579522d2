//! May they? The receiving node's decision, by what it holds at an instant.

use crate::denials::Denials;
use crate::hbone::Door;
use crate::plane::{Credentials, Plane};
use crate::shown::{Now, Shown};
use crate::staleness::stale;
use crate::view::View;
use ambit_identity::{NodeBinding, PeerSvid};
use ambit_model::{Code, Moment, NodeId, Refusal, SpiffeId};
use ambit_policy::Verdict;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use tokio::net::TcpStream;

/// Where a tunnel ends here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum At {
    /// At the node's address: the server name tells the workload.
    Node,
    /// At the address of a workload.
    Pod(Ipv4Addr),
}

impl At {
    pub(super) fn of(door: Door, tcp: &TcpStream) -> std::io::Result<Self> {
        match (door, tcp.local_addr()?.ip().to_canonical()) {
            (Door::Node, _) => Ok(Self::Node),
            (Door::Pod, IpAddr::V4(address)) => Ok(Self::Pod(address)),
            (Door::Pod, IpAddr::V6(_)) => Err(std::io::Error::other("a tunnel to an IPv6 address")),
        }
    }
    /// Who is called.
    pub(super) fn called<'a>(&self, plane: &'a Plane, name: &str) -> Option<&'a Arc<Credentials>> {
        match self {
            Self::Node => plane.by_name.get(name),
            Self::Pod(address) => plane.credentials.get(plane.pods.get(&IpAddr::V4(*address))?.id()),
        }
    }
    /// Whether a connection may be to this address.
    pub(super) fn is(&self, to: IpAddr) -> bool {
        match self {
            Self::Node => true,
            Self::Pod(address) => IpAddr::V4(*address) == to,
        }
    }
}

/// A proven caller, where it calls from and the identity it called.
#[derive(Clone, Debug)]
pub(super) struct Call {
    pub(super) peer: Arc<PeerSvid>,
    pub(super) shown: Arc<Shown>,
    pub(super) from: IpAddr,
    pub(super) from_port: u16,
    pub(super) at: At,
    pub(super) to: SpiffeId,
}

/// May this caller speak to that port of this workload now?
pub(super) fn judge(
    plane: &Plane,
    denials: &Denials,
    call: &Call,
    to: SocketAddr,
    now: Moment,
) -> Result<Verdict, Refusal> {
    call.shown.still(&Now { trust: plane.trust.current(), at: now.latest })?;
    if denials.is_stale() {
        return Err(stale());
    }
    permitted(plane, denials, call, to, now)
}

/// The same of a connection that is open already: all of it but the end of the SVID, and its bundle's.
pub(super) fn permitted(
    plane: &Plane,
    denials: &Denials,
    call: &Call,
    to: SocketAddr,
    now: Moment,
) -> Result<Verdict, Refusal> {
    trusted(denials, call)?;
    at_home(&plane.view, call)?;
    let verdict = plane.view.rules.evaluate(call.peer.id(), &call.to, to.port(), now);
    if verdict.allowed {
        return Ok(verdict);
    }
    let found = format!("{} to {} port {}: {}", call.peer.id(), call.to, to.port(), verdict.reason);
    Err(Refusal::new(Code::PolicyDenied, "an allowed connection", found))
}

/// Is the caller's node one that its cell trusts now, and its SVID one that was not revoked?
pub(super) fn trusted(denials: &Denials, call: &Call) -> Result<(), Refusal> {
    let binding = binding(call)?;
    if let Some(found) = denials.denied_above(&call.peer) {
        return Err(Refusal::new(Code::SvidRevoked, "an intermediate that is not revoked", found));
    }
    // A cell speaks for its own nodes only: what a peer denies is nothing against a caller of another trust domain.
    if !denials.is_out() && denials.ends_all() {
        return Err(stale());
    }
    if denials.denies(&call.peer.id().trust_domain(), &binding.node, binding.generation) {
        return Err(Refusal::new(Code::NodeUntrusted, "a trusted node", binding.node.to_string()));
    }
    let peer = &call.peer;
    if denials.denies_svid(peer.id(), peer.authority(), peer.serial()) {
        return Err(Refusal::new(Code::SvidRevoked, "an SVID that was not revoked", peer.id().as_str()));
    }
    Ok(())
}

/// Does the tunnel come from where the caller is? A key that was copied to another node does not bring that along. Our own
/// agents call from their node's address; Istio's from the workload's, which its node reported as its endpoint on the same
/// attested stream: that will do for this workload, as far as this node's slice tells its endpoints.
pub(super) fn at_home(view: &View, call: &Call) -> Result<(), Refusal> {
    let NodeBinding { node, generation, .. } = binding(call)?;
    let known = view.callers.get(&(call.peer.id().trust_domain(), node));
    if known.is_some_and(|home| home.is_home_of(generation, call.from)) {
        return Ok(());
    }
    if known.is_some_and(|home| home.since <= generation) && is_its_endpoint(view, call, node) {
        return Ok(());
    }
    let expected = match known {
        Some(home) => format!("{}, where node {node} is since its generation {}", home.address, home.since),
        None => format!("node {node} among those whose workloads may call here"),
    };
    let found = format!("{}, with an SVID of its generation {generation}", call.from.to_canonical());
    Err(Refusal::new(Code::NodeAddressMismatch, expected, found))
}

/// Whether the caller's node reported this very workload at that address.
pub(super) fn is_its_endpoint(view: &View, call: &Call, node: NodeId) -> bool {
    let from = call.from.to_canonical();
    view.endpoints.get(&from).is_some_and(|endpoint| endpoint.node == node && endpoint.spiffe_id == *call.peer.id())
}

/// The node that the caller's SVID was issued through.
pub(super) fn binding(call: &Call) -> Result<NodeBinding, Refusal> {
    // Callers outside the mesh lack the binding; no policy can name such a caller yet, so they are refused.
    call.peer.binding().ok_or_else(|| Refusal::new(Code::SvidUntrusted, "an SVID bound to a node", "none"))
}
