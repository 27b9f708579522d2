//! Policies after parsing: what may speak to what. The YAML form and its meaning are `ambit-policy`'s.

use crate::address::Address;
use crate::id::{ClusterId, ObjectName, SpiffeId};
use crate::refusal::{Code, Refusal};
use crate::time::{Moment, Stamp};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};

pub use crate::cidr::Cidr;
pub use crate::egress::{CLOSED_RANGES, Egress, Transport, closed_at, closed_within};
pub use crate::peers::{Labels, Peers, label};

/// What a policy does when it matches. Deny wins over allow; without an allow the answer is deny.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Action {
    /// Let the connection pass.
    Allow,
    /// Refuse the connection, whatever else allows it.
    Deny,
    /// Record that the connection would be refused, were this a deny; it changes no verdict.
    Audit,
}

impl Action {
    /// As it is written.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Allow => "allow",
            Self::Deny => "deny",
            Self::Audit => "audit",
        }
    }
}

/// How a connection travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl std::str::FromStr for Protocol {
    type Err = Refusal;
    fn from_str(s: &str) -> Result<Self, Refusal> {
        match s {
            "tcp" => Ok(Self::Tcp),
            "udp" => Ok(Self::Udp),
            other => Err(Refusal::new(Code::BadRequest, "protocol tcp or udp", other)),
        }
    }
}

impl Protocol {
    /// As it is written.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }
}

/// What most policies leave as it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyExtras {
    /// From then on it decides nothing; without end for most.
    pub expires_at: Stamp,
    /// Of which protocols it speaks; never empty.
    pub protocols: BTreeSet<Protocol>,
    /// Callers outside of the mesh, whom nothing but an address names. A policy that allows them says `transport: passthrough`
    /// where it is written: there is no other way for them, so nothing more of it is kept.
    pub unmeshed: Vec<Cidr>,
}

impl Default for PolicyExtras {
    fn default() -> Self {
        Self { expires_at: Stamp(u64::MAX), protocols: [Protocol::Tcp].into(), unmeshed: Vec::new() }
    }
}

/// A normalised policy. Written by one cell (its origin); only that cell changes it.
/// Its stored form is in `stored`: one that says nothing of the extras is stored as it always was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Its name, unique within its origin.
    pub name: ObjectName,
    /// Which workloads it protects (the destination of a connection).
    pub target: Peers,
    /// What it does.
    pub action: Action,
    /// Which callers it speaks of; never empty, but where it speaks of unmeshed ones.
    pub from: Vec<Peers>,
    /// Destination ports; empty means every port.
    pub ports: Vec<u16>,
    /// What most policies leave as it is.
    pub extras: PolicyExtras,
}

impl Policy {
    /// How those travel whom it lets in: nothing to say of callers in the mesh, who come in tunnels.
    pub fn transport(&self) -> Option<Transport> {
        (self.action == Action::Allow && !self.extras.unmeshed.is_empty()).then_some(Transport::Passthrough)
    }

    /// Whether it is over. An allow ends by the latest that it may be, a deny by the earliest (I15): who does not know the
    /// time for sure closes early and opens late.
    pub fn is_over(&self, now: Moment) -> bool {
        let by = match self.action {
            Action::Allow => now.latest,
            Action::Deny | Action::Audit => now.committed,
        };
        by >= self.extras.expires_at
    }
}

/// Sets of identities under one name, which policies of the same cell use. It allows nothing by itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Group {
    /// Its name, unique within its origin.
    pub name: ObjectName,
    /// Who is in it; no groups; never empty.
    pub members: Vec<Peers>,
}

/// Which healthy endpoint of a service is chosen first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Order {
    /// Those in the caller's own cluster, then those in its region, then the others.
    #[default]
    LocalFirst,
    /// Those of the first backend named, wherever they are, then the others by distance: a primary and its stand-ins.
    FirstBackend,
}

impl Order {
    /// As it is written: `local-first` or `first-backend`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::LocalFirst => "local-first",
            Self::FirstBackend => "first-backend",
        }
    }
}

impl std::str::FromStr for Order {
    type Err = Refusal;
    fn from_str(s: &str) -> Result<Self, Refusal> {
        match s {
            "local-first" => Ok(Self::LocalFirst),
            "first-backend" => Ok(Self::FirstBackend),
            other => Err(Refusal::new(Code::BadRequest, "order local-first or first-backend", other)),
        }
    }
}

/// A virtual service: one address in front of endpoints in several clusters.
/// Its stored form is in `stored_service`: one without weights is stored as it always was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Its name, unique within its origin.
    pub name: ObjectName,
    /// The virtual address that workloads call.
    pub address: Address,
    /// The TCP port of the virtual address and of every endpoint.
    pub port: u16,
    /// Whose endpoints serve it, in any cluster.
    pub backends: Vec<Peers>,
    /// Which healthy endpoint is chosen first.
    pub order: Order,
    /// Of connections that may go to several backends, how many of all go to each; 0: none, it is drained. As many as there are
    /// backends, not all 0; or none: each endpoint like any other.
    pub weights: Vec<u32>,
}

/// The most that a weight may be.
pub const WEIGHT_MAX: u32 = 1_000;

impl Service {
    /// Whether its weights are as they may be.
    pub fn is_weighted_well(&self) -> bool {
        let all = self.weights.len() == self.backends.len() && self.weights.iter().any(|weight| *weight > 0);
        self.weights.is_empty() || (all && self.weights.iter().all(|weight| *weight <= WEIGHT_MAX))
    }
}

/// Where tunnels of a node come from: the address that it registered on its attested stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct NodeAddress {
    /// The one address. What else the machine has counts for nothing.
    pub address: Ipv4Addr,
    /// The admission under which it was registered first: it holds for leaves of this one and of later ones.
    pub since: crate::id::Generation,
}

impl NodeAddress {
    /// Whether a leaf of this generation of the node may come from there. What a listener of both families calls
    /// `::ffff:a.b.c.d` is the same address (RFC 4291 2.5.5.2).
    pub fn is_home_of(&self, generation: crate::id::Generation, from: IpAddr) -> bool {
        self.since <= generation && from.to_canonical() == IpAddr::V4(self.address)
    }
}

/// Where an enrolled workload listens.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Endpoint {
    /// Who answers there.
    pub spiffe_id: SpiffeId,
    /// The workload's own address, or one of the two that it has.
    pub address: Address,
    /// The cluster that it runs in.
    pub cluster: ClusterId,
    /// Where tunnels to it end: the node's address (the HBONE port is 15008).
    pub node_address: Ipv4Addr,
    /// The node that runs it.
    pub node: crate::id::NodeId,
    /// The node's generation when it was reported.
    pub generation: crate::id::Generation,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::Generation;

    #[test]
    fn a_leaf_comes_from_its_home_by_either_form_and_from_nowhere_else() {
        let home = NodeAddress { address: Ipv4Addr::new(10, 0, 0, 2), since: Generation(3) };
        for (generation, from, good) in [
            (3, "10.0.0.2", true),
            (4, "10.0.0.2", true),
            (2, "10.0.0.2", false),
            (3, "::ffff:10.0.0.2", true),
            (3, "10.0.0.3", false),
            (3, "::ffff:10.0.0.3", false),
            // Neither the compatible form of old nor a translated one is the address (RFC 4291 2.5.5.1, RFC 6052).
            (3, "::10.0.0.2", false),
            (3, "64:ff9b::10.0.0.2", false),
            (3, "2001:db8::2", false),
        ] {
            assert_eq!(home.is_home_of(Generation(generation), from.parse().unwrap()), good, "{generation} {from}");
        }
    }
}
