//! Policies after parsing: what may speak to what. The YAML form and its meaning are `ambit-policy`'s.

use crate::id::{ClusterId, ObjectName, SpiffeId, TrustDomain};
use crate::refusal::{Code, Refusal};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::str::FromStr;

/// What a policy does when it matches. Deny wins over allow; without an allow the answer is deny.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Action {
    /// Let the connection pass.
    Allow,
    /// Refuse the connection, whatever else allows it.
    Deny,
}

/// A set of SPIFFE identities.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Peers {
    /// Exactly one identity.
    Id(SpiffeId),
    /// `spiffe://td/prefix/*`: every identity of the trust domain below the path, which ends in `/`.
    Below(TrustDomain, String),
    /// `spiffe://td/*`: every identity of the trust domain.
    Domain(TrustDomain),
}

impl Peers {
    /// The trust domain that the set lies in; a set never spans two.
    pub fn trust_domain(&self) -> TrustDomain {
        match self {
            Self::Id(id) => id.trust_domain(),
            Self::Below(td, _) | Self::Domain(td) => td.clone(),
        }
    }
    /// Whether `id` is in the set.
    pub fn contains(&self, id: &SpiffeId) -> bool {
        match self {
            Self::Id(mine) => mine == id,
            Self::Below(td, path) => id.trust_domain() == *td && id.path().starts_with(path.as_str()),
            Self::Domain(td) => id.trust_domain() == *td,
        }
    }
}

/// `spiffe://td/path`, `spiffe://td/prefix/*` or `spiffe://td/*`.
impl FromStr for Peers {
    type Err = Refusal;
    fn from_str(s: &str) -> Result<Self, Refusal> {
        let Some(head) = s.strip_suffix("/*") else { return Ok(Self::Id(s.parse()?)) };
        let rest = head.strip_prefix("spiffe://").ok_or_else(|| {
            Refusal::new(Code::BadRequest, "spiffe://td/path, spiffe://td/prefix/* or spiffe://td/*", s)
        })?;
        match rest.split_once('/') {
            None => Ok(Self::Domain(rest.parse()?)),
            Some(_) => {
                let prefix: SpiffeId = head.parse()?;
                Ok(Self::Below(prefix.trust_domain(), format!("{}/", prefix.path())))
            }
        }
    }
}

impl fmt::Display for Peers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Id(id) => write!(f, "{id}"),
            Self::Below(td, path) => write!(f, "spiffe://{td}{path}*"),
            Self::Domain(td) => write!(f, "spiffe://{td}/*"),
        }
    }
}

/// A normalised policy. Written by one cell (its origin); only that cell changes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    /// Its name, unique within its origin.
    pub name: ObjectName,
    /// Which workloads it protects (the destination of a connection).
    pub target: Peers,
    /// What it does.
    pub action: Action,
    /// Which callers it speaks of; never empty.
    pub from: Vec<Peers>,
    /// Destination TCP ports; empty means every port.
    pub ports: Vec<u16>,
}

/// Which healthy endpoint of a service is chosen first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Order {
    /// Those in the caller's own cluster, then the others.
    #[default]
    LocalFirst,
    /// Those of the first backend named, wherever they are, then the others: a primary and its stand-ins.
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
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    /// Its name, unique within its origin.
    pub name: ObjectName,
    /// The virtual address that workloads call.
    pub address: Ipv4Addr,
    /// The TCP port of the virtual address and of every endpoint.
    pub port: u16,
    /// Whose endpoints serve it, in any cluster.
    pub backends: Vec<Peers>,
    /// Which healthy endpoint is chosen first.
    pub order: Order,
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
    /// The workload's own address.
    pub address: Ipv4Addr,
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
