//! Who calls, by address: what a workload is shown for its client, and how far the caller's node is believed in that.
//!
//! Nothing is decided by it here, but a workload may: so a node speaks for callers that it runs, and names no
//! address that this node knows for somebody else's, nor one from which callers come that have no identity. Of other addresses of
//! the mesh, of which this node does not know whose they are, and of those of nobody, its word counts.

use super::judge::{Call, binding, is_its_endpoint};
use crate::plane::Plane;
use ambit_model::policy::closed_at;
use ambit_model::{NodeId, SpiffeId};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};

/// What is known of a connection's client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Client {
    /// It calls from there.
    At(SocketAddrV4),
    /// Nobody said.
    Unsaid,
    /// What was said may not be said by that node.
    Disbelieved(SocketAddrV4),
}

impl Client {
    /// What the workload is shown for it; none where it sees the last leg.
    pub(super) fn shown(self) -> Option<SocketAddr> {
        match self {
            Self::At(at) => Some(at.into()),
            Self::Unsaid | Self::Disbelieved(_) => None,
        }
    }
}

/// The client of a connection of a caller that is [at home](super::judge::at_home), of which `said` is the other end's word.
pub(super) fn client(plane: &Plane, call: &Call, said: Option<SocketAddrV4>) -> Client {
    let (IpAddr::V4(from), Ok(bound)) = (call.from.to_canonical(), binding(call)) else { return Client::Unsaid };
    let home = plane.view.callers.get(&(call.peer.id().trust_domain(), bound.node));
    if home.is_some_and(|home| home.is_home_of(bound.generation, call.from)) {
        return by_node(plane, (call.peer.id(), bound.node, from), said);
    }
    if is_its_endpoint(&plane.view, call, bound.node) {
        return by_itself(SocketAddrV4::new(from, call.from_port), said);
    }
    Client::Unsaid
}

/// A tunnel from the workload's own address, as of somebody else's agent: that is what is proved, whatever is said. Of which of
/// its ports the connection is, it may say.
fn by_itself(from: SocketAddrV4, said: Option<SocketAddrV4>) -> Client {
    let said = said.filter(|said| said.ip() == from.ip() && said.port() != 0);
    Client::At(said.unwrap_or(from))
}

/// A tunnel from the address of the node that runs the caller: it may give the caller an address that is known here for that
/// very workload's on that very node, or that is nobody's here, which is its word alone.
fn by_node(plane: &Plane, caller: (&SpiffeId, NodeId, Ipv4Addr), said: Option<SocketAddrV4>) -> Client {
    match said {
        None => Client::Unsaid,
        Some(said) if may_name(plane, caller, said) => Client::At(said),
        Some(said) => Client::Disbelieved(said),
    }
}

fn may_name(plane: &Plane, (id, node, at): (&SpiffeId, NodeId, Ipv4Addr), said: SocketAddrV4) -> bool {
    let address = said.ip();
    if said.port() == 0 || closed_at(IpAddr::V4(*address)).is_some() {
        return false;
    }
    match (plane.view.endpoints.get(&IpAddr::V4(*address)), plane.pods.get(&IpAddr::V4(*address))) {
        // Nor one from which callers come in by their address alone: the workload could not tell them apart.
        (None, None) => {
            !plane.no_clients.contains(address) && (!lets_in(plane, *address) || plane.view.claims(*address))
        }
        // Of a pod of this node that node can be this one only, which its address tells.
        (endpoint, pod) => {
            endpoint.is_none_or(|e| e.node == node && e.spiffe_id == *id)
                && pod.is_none_or(|pod| pod.id() == id && at == plane.address)
        }
    }
}

/// Whether a policy speaks of callers from there that have no identity.
fn lets_in(plane: &Plane, address: Ipv4Addr) -> bool {
    let first = |bits: u8| address.to_bits() & u32::MAX.checked_shl(32 - u32::from(bits)).unwrap_or(0);
    plane.view.rules.prefixes().any(|(at, bits)| first(bits) == at.to_bits())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netns::Netns;
    use crate::plane::LocalPod;
    use crate::view::{self, Workload};
    use ambit_identity::{SharedTrust, Trust, TrustStore};
    use ambit_proto::v1;
    use std::path::Path;
    use std::sync::Arc;

    const HERE: Ipv4Addr = Ipv4Addr::new(10, 70, 0, 2);
    const THERE: Ipv4Addr = Ipv4Addr::new(10, 70, 0, 1);

    /// A node of west with `web` at 10.71.101.11, which knows two workloads elsewhere, a service and two nodes.
    fn plane() -> Plane {
        let endpoint = |id: &str, address: &str, node: &str| v1::Endpoint {
            spiffe_id: id.into(),
            address: address.into(),
            cluster: "west".into(),
            node_address: "10.70.0.3".into(),
            node: node.repeat(32),
            generation: 1,
        };
        let view = Arc::new(
            view::tests::view(v1::Slice {
                endpoints: vec![
                    endpoint("spiffe://west/api", "10.71.1.1", "aa"),
                    endpoint("spiffe://west/api", "10.71.1.2", "bb"),
                    endpoint("spiffe://west/other", "10.71.1.3", "aa"),
                ],
                services: vec![v1::Service {
                    origin: "west".into(),
                    name: "db".into(),
                    address: "10.99.7.1".into(),
                    port: 80,
                    backends: vec!["spiffe://west/web".into()],
                    order: "local-first".into(),
                    weights: vec![],
                }],
                callers: vec![v1::NodeAddress {
                    trust_domain: "west".into(),
                    node: "aa".repeat(32),
                    generation: 1,
                    address: THERE.to_string(),
                }],
                unmeshed: vec![v1::Policy {
                    origin: "west".into(),
                    name: "clients".into(),
                    target: "spiffe://west/web".into(),
                    action: v1::Action::Allow.into(),
                    unmeshed: vec!["198.51.100.0/24".into()],
                    transport: "passthrough".into(),
                    resolved: true,
                    ..v1::Policy::default()
                }],
                claimed: vec!["198.51.100.9".into()],
                ..view::tests::slice()
            })
            .unwrap(),
        );
        let pod = view::tests::pod("web", 1000, 11);
        let entry = view.entry_of(&pod.selectors()).unwrap().clone();
        let number = view.numbers[&entry.spiffe_id];
        let netns = Netns::open(Path::new("/proc/self/ns/net")).unwrap();
        let pod = Arc::new(LocalPod { workload: Workload { pod, entry, number }, netns });
        let trust = SharedTrust::new(Trust::Bundles(TrustStore::new(&view.own).unwrap()));
        Plane::new(view, [pod], [], trust, HERE)
    }

    #[test]
    fn a_node_names_its_own_callers_and_nobody_else() {
        let plane = plane();
        let (api, web) = ("spiffe://west/api", "spiffe://west/web");
        for (who, at, said, believed) in [
            // Known here, as exactly this workload on exactly this node.
            (api, THERE, "10.71.1.1:40000", true),
            (api, THERE, "10.71.1.2:40000", false),
            (api, THERE, "10.71.1.3:40000", false),
            (web, THERE, "10.71.1.1:40000", false),
            // Of this node's own: by this node, of that workload.
            (web, HERE, "10.71.101.11:40000", true),
            (web, THERE, "10.71.101.11:40000", false),
            (api, HERE, "10.71.101.11:40000", false),
            // Known for something else: a service, the nodes.
            (api, THERE, "10.99.7.1:40000", false),
            (api, THERE, "10.70.0.1:40000", false),
            (api, THERE, "10.70.0.2:40000", false),
            (api, THERE, "10.70.0.3:40000", false),
            // Nobody's here: that node's word.
            (api, THERE, "10.71.9.9:40000", true),
            (api, THERE, "192.0.2.7:1", true),
            // From there callers come that have no identity; who is of the mesh there is somebody's.
            (api, THERE, "198.51.100.7:40000", false),
            (api, THERE, "198.51.100.9:40000", true),
            (api, THERE, "10.71.9.9:0", false),
            // No workload's.
            (api, THERE, "127.0.0.1:40000", false),
            (api, THERE, "127.70.1.2:40000", false),
            (api, THERE, "0.0.0.0:40000", false),
            (api, THERE, "169.254.169.254:80", false),
            (api, THERE, "224.0.0.1:40000", false),
            (api, THERE, "240.0.0.1:40000", false),
            (api, THERE, "255.255.255.255:40000", false),
        ] {
            let said: SocketAddrV4 = said.parse().unwrap();
            let expected = if believed { Client::At(said) } else { Client::Disbelieved(said) };
            let caller = who.parse().unwrap();
            assert_eq!(by_node(&plane, (&caller, NodeId([0xaa; 32]), at), Some(said)), expected, "{who} {at} {said}");
        }
        let caller = api.parse().unwrap();
        assert_eq!(by_node(&plane, (&caller, NodeId([0xaa; 32]), THERE), None), Client::Unsaid);
    }

    #[test]
    fn who_calls_from_its_own_address_is_there_whatever_it_says() {
        let from = "10.71.1.1:33000".parse().unwrap();
        for (said, at) in [
            (None, "10.71.1.1:33000"),
            (Some("10.71.1.1:40000"), "10.71.1.1:40000"),
            (Some("10.71.1.1:0"), "10.71.1.1:33000"),
            (Some("10.71.1.2:40000"), "10.71.1.1:33000"),
            (Some("127.0.0.1:1"), "10.71.1.1:33000"),
        ] {
            let said = said.map(|said| said.parse().unwrap());
            assert_eq!(by_itself(from, said), Client::At(at.parse().unwrap()), "{said:?}");
        }
    }
}
