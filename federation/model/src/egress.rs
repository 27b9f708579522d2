//! Where workloads may connect to outside of the mesh.

use crate::cidr::Cidr;
use crate::id::{ObjectName, SpiffeId};
use crate::peers::Peers;
use crate::policy::Protocol;
use crate::time::{Moment, Stamp};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};

/// How what leaves the mesh travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Transport {
    /// As the workload wrote it, in clear text if it is: said where it is wanted, and nowhere by default.
    Passthrough,
}

impl Transport {
    /// As it is written.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Passthrough => "passthrough",
        }
    }
}

/// A document that lets callers connect to addresses outside of the mesh. It only ever allows: there is no deny to win over.
/// What the mesh knows is never reached by it (see [`Egress::allows`]).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
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
    /// Whether it lets `src` connect there. The caller makes sure that the mesh knows nobody at `to`: such an address is judged by
    /// policies, and reached in a tunnel or not at all.
    pub fn allows(&self, src: &SpiffeId, to: IpAddr, protocol: Protocol, port: u16, now: Moment) -> bool {
        !self.is_over(now)
            && self.from.iter().any(|set| set.contains(src))
            && self.to.iter().any(|range| range.contains(to))
            && closed_at(to).is_none()
            && self.protocols.contains(&protocol)
            && (self.ports.is_empty() || self.ports.contains(&port))
    }

    /// Whether it is over. It ends by the latest that it may be, as an allow does (I15).
    pub fn is_over(&self, now: Moment) -> bool {
        now.latest >= self.expires_at
    }
}

/// Ranges that no document opens, and why (RFC 6890, the registry of special addresses): what is there is of a node itself or of
/// its link. The agent connects in the node's name, so who reached them would speak to the node's own services, or to the
/// metadata service of its cloud, as the node.
pub const CLOSED_RANGES: [(Ipv4Addr, u8, &str); 5] = [
    (Ipv4Addr::new(0, 0, 0, 0), 8, "this host"),
    (Ipv4Addr::new(127, 0, 0, 0), 8, "loopback"),
    (Ipv4Addr::new(169, 254, 0, 0), 16, "link-local, where metadata services of clouds are"),
    (Ipv4Addr::new(224, 0, 0, 0), 4, "multicast"),
    (Ipv4Addr::new(240, 0, 0, 0), 4, "reserved, and broadcast"),
];

/// Why no document opens this address; none for one that may be opened.
pub fn closed_at(address: IpAddr) -> Option<&'static str> {
    let IpAddr::V4(address) = address.to_canonical() else { return None };
    closed_within(address, 32)
}

/// Why nothing of the range of so many bits is ever opened; of a wider one only what is closed in it is not.
pub fn closed_within(first: Ipv4Addr, bits: u8) -> Option<&'static str> {
    let holds = |(net, least, _): &&(Ipv4Addr, u8, &str)| {
        *least <= bits && (first.to_bits() ^ net.to_bits()) >> (32 - least) == 0
    };
    CLOSED_RANGES.iter().find(holds).map(|(_, _, why)| *why)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_of_the_node_is_closed_whatever_a_document_says() {
        let all = Egress {
            name: "all".parse().unwrap(),
            from: vec!["spiffe://west/*".parse().unwrap()],
            to: vec!["0.0.0.0/0".parse().unwrap(), "169.254.169.254/32".parse().unwrap()],
            ports: vec![],
            protocols: [Protocol::Tcp].into(),
            transport: Transport::Passthrough,
            expires_at: Stamp(9),
        };
        let src = "spiffe://west/web".parse().unwrap();
        let allows = |to: &str, now| all.allows(&src, to.parse().unwrap(), Protocol::Tcp, 80, Moment::at(Stamp(now)));
        for (to, open) in [
            ("1.0.0.0", true),
            ("0.255.255.255", false),
            ("0.0.0.0", false),
            ("126.255.255.255", true),
            ("127.0.0.1", false),
            ("::ffff:127.0.0.1", false),
            ("128.0.0.0", true),
            ("169.253.255.255", true),
            ("169.254.169.254", false),
            ("169.255.0.0", true),
            ("223.255.255.255", true),
            ("224.0.0.1", false),
            ("239.255.255.255", false),
            ("255.255.255.255", false),
            ("::ffff:192.0.2.1", true),
            ("2001:db8::1", false),
        ] {
            assert_eq!(allows(to, 1), open, "{to}");
        }
        assert!(allows("1.0.0.0", 8) && !allows("1.0.0.0", 9), "it ends");
    }

    /// Rows in stores: a change of these bytes is a change of format.
    #[test]
    fn stored_bytes_are_what_they_were() {
        let egress = Egress {
            name: "e".parse().unwrap(),
            from: vec!["spiffe://w/*".parse().unwrap()],
            to: vec!["10.0.0.0/8".parse().unwrap()],
            ports: vec![443],
            protocols: [Protocol::Tcp].into(),
            transport: Transport::Passthrough,
            expires_at: Stamp(300),
        };
        let bytes = postcard::to_stdvec(&egress).unwrap();
        assert_eq!(hex::encode(&bytes), "016501020177".to_owned() + "01000a0000000801bb03010000ac02");
        assert_eq!(postcard::from_bytes::<Egress>(&bytes).unwrap(), egress);
    }
}
