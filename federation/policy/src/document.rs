//! One document, after parsing.

use ambit_model::policy::{Cidr, Group, Peers, Policy, Protocol, Service};
use ambit_model::{Moment, ObjectName, SpiffeId, Stamp, TrustDomain};
use std::collections::BTreeSet;
use std::net::IpAddr;

/// What one YAML document says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Document {
    /// `kind: Policy`.
    Policy(Policy),
    /// `kind: Service`.
    Service(Service),
    /// `kind: Group`.
    Group(Group),
    /// `kind: Egress`.
    Egress(Egress),
}

/// How what leaves the mesh travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// As the workload wrote it, in clear text if it is: said where it is wanted, and nowhere by default.
    Passthrough,
}

/// Where workloads may connect to outside of the mesh. Nothing enforces it yet: see [`crate::check_enforceable`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Egress {
    /// Its name, unique within its origin.
    pub name: ObjectName,
    /// Which callers it speaks of; never empty.
    pub from: Vec<Peers>,
    /// Where they may connect to; never empty.
    pub to: Vec<Cidr>,
    /// Destination ports; empty means every port.
    pub ports: Vec<u16>,
    /// Of which protocols it speaks; never empty.
    pub protocols: BTreeSet<Protocol>,
    /// How.
    pub transport: Transport,
    /// From then on it allows nothing.
    pub expires_at: Stamp,
}

impl Egress {
    /// Whether it lets `src` connect there.
    pub fn allows(&self, src: &SpiffeId, to: IpAddr, protocol: Protocol, port: u16, now: Moment) -> bool {
        now.latest < self.expires_at
            && self.from.iter().any(|set| set.contains(src))
            && self.to.iter().any(|range| range.contains(to))
            && self.protocols.contains(&protocol)
            && (self.ports.is_empty() || self.ports.contains(&port))
    }
}

impl Document {
    /// The `kind` as written.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Policy(_) => "Policy",
            Self::Service(_) => "Service",
            Self::Group(_) => "Group",
            Self::Egress(_) => "Egress",
        }
    }
    /// The name, unique within kind and origin.
    pub fn name(&self) -> &ObjectName {
        match self {
            Self::Policy(p) => &p.name,
            Self::Service(s) => &s.name,
            Self::Group(g) => &g.name,
            Self::Egress(e) => &e.name,
        }
    }
    /// Every trust domain that the document names.
    pub fn trust_domains(&self) -> BTreeSet<TrustDomain> {
        match self {
            Self::Policy(p) => p.from.iter().chain([&p.target]).map(|set| set.trust_domain()).collect(),
            Self::Service(s) => s.backends.iter().map(|set| set.trust_domain()).collect(),
            Self::Group(g) => g.members.iter().map(|set| set.trust_domain()).collect(),
            Self::Egress(e) => e.from.iter().map(|set| set.trust_domain()).collect(),
        }
    }
}
