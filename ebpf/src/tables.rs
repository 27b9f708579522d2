//! What the agent installs: verdicts, who is behind an address, and services. Plain data, parsed before it gets here.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4};

/// Endpoints per service: the connect program looks at each, and eight keep it short for the verifier.
pub const MAX_SERVICE_ENDPOINTS: usize = 8;

/// Whom a verdict is about. Numeric identities are the federation's; 0 is never one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VerdictKey {
    /// The caller.
    pub source: u32,
    /// The workload called.
    pub destination: u32,
    /// The endpoint's TCP port (not a service's), or 0 for every port.
    pub port: u16,
}

/// What a verdict says. Deny wins over allow where the exact port and "every port" differ; no verdict denies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Action {
    /// Refuse with EPERM.
    Deny,
    /// Carry it.
    Allow,
}

/// A verdict and the rule it comes from, for events.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Verdict {
    /// Pass or refuse.
    pub action: Action,
    /// A number that the agent can turn back into a policy; 0 for none.
    pub rule: u32,
}

/// How far away an endpoint is: all healthy endpoints of a nearer tier are used before any of the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Tier {
    /// Of the caller's own cluster.
    Local,
    /// Of another cluster.
    Remote,
}

/// One endpoint of a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceEndpoint<A = SocketAddrV4> {
    /// Where it listens.
    pub address: A,
    /// Its numeric identity.
    pub identity: u32,
    /// Its distance.
    pub tier: Tier,
    /// Whether it may be chosen; see also `Kernel::set_service_health`.
    pub healthy: bool,
}

/// A virtual address and port, and the endpoints one of which is chosen when a workload connects to it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Service<A = SocketAddrV4> {
    /// The virtual IP and port that applications use.
    pub address: A,
    /// At most [`MAX_SERVICE_ENDPOINTS`].
    pub endpoints: Vec<ServiceEndpoint<A>>,
}

/// A range of addresses outside of the mesh, and the number that stands for it in verdicts: one that no workload has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Range {
    /// Its first address.
    pub first: Ipv4Addr,
    /// Bits of its prefix, at most 32.
    pub bits: u8,
    /// The number.
    pub number: u32,
}

/// Everything that is swapped in as one generation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tables {
    /// Verdicts by caller, callee and port.
    pub verdicts: Vec<(VerdictKey, Verdict)>,
    /// Who is behind an address. An address that is not here, and in no range, is refused.
    pub endpoints: Vec<(Ipv4Addr, u32)>,
    /// Services, looked up before `endpoints`.
    pub services: Vec<Service>,
    /// Who is behind an IPv6 address.
    pub endpoints6: Vec<(Ipv6Addr, u32)>,
    /// Services with an IPv6 address, and endpoints of either family.
    pub services6: Vec<Service<SocketAddr>>,
    /// Ranges, of which the longest that holds it stands for an address that is neither.
    pub ranges: Vec<Range>,
    /// Ranges of callers, of which the longest that holds it stands for an address from which a packet comes to a pod in clear.
    /// Verdicts have its number as their source.
    pub callers: Vec<Range>,
}
