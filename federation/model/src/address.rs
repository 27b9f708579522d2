//! Where somebody of the mesh can be called: an IPv4 address, or an IPv6 one that stands for one host alone.

use crate::refusal::{Code, Refusal};
use serde::de::{Error as _, SeqAccess, Visitor};
use serde::ser::SerializeTuple as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

/// Said in the place of an IPv4 address where the sixteen bytes of an IPv6 one follow: IPv4's broadcast, where nobody listens.
const SIXTEEN_FOLLOW: [u8; 4] = [0xff; 4];

/// The first /64 of `fd61:6d62:6974::/48` ("ambit"): within each pod it stands for the agent, and nobody can be called there.
pub const AGENT_NET: Ipv6Addr = Ipv6Addr::new(0xfd61, 0x6d62, 0x6974, 0, 0, 0, 0, 0);

/// An address of a workload or a service. Stored as ever where it is of IPv4: four bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Address(IpAddr);

impl Address {
    /// Before every other, to look through a table.
    pub const FIRST: Self = Self(IpAddr::V4(Ipv4Addr::UNSPECIFIED));

    /// As the standard library has it.
    pub fn ip(self) -> IpAddr {
        self.0
    }
    /// None for IPv6.
    pub fn v4(self) -> Option<Ipv4Addr> {
        match self.0 {
            IpAddr::V4(address) => Some(address),
            IpAddr::V6(_) => None,
        }
    }
    /// None for IPv4.
    pub fn v6(self) -> Option<Ipv6Addr> {
        match self.0 {
            IpAddr::V4(_) => None,
            IpAddr::V6(address) => Some(address),
        }
    }
    /// With a port.
    pub fn at(self, port: u16) -> SocketAddr {
        SocketAddr::new(self.0, port)
    }
}

impl From<Ipv4Addr> for Address {
    fn from(address: Ipv4Addr) -> Self {
        Self(IpAddr::V4(address))
    }
}

impl From<[u8; 4]> for Address {
    fn from(octets: [u8; 4]) -> Self {
        Ipv4Addr::from(octets).into()
    }
}

impl TryFrom<Ipv6Addr> for Address {
    type Error = Refusal;
    fn try_from(address: Ipv6Addr) -> Result<Self, Refusal> {
        let [first, ..] = address.segments();
        // Those that are another way to write an IPv4 one, those of no host or of many, and those of one link only (RFC 4291
        // 2.4 and 2.5.5; site-local, RFC 3879).
        let is_v4 = address.to_ipv4().is_some();
        let of_link = first & 0xff80 == 0xfe80;
        if is_v4 || of_link || address.is_multicast() || address.is_unspecified() || address.is_loopback() {
            let expected = "a global or unique local IPv6 address (not v4-mapped, loopback, link-local or multicast)";
            return Err(Refusal::new(Code::BadRequest, expected, address.to_string()));
        }
        if address.segments().get(..4) == AGENT_NET.segments().get(..4) {
            let expected = format!("an IPv6 address outside of {AGENT_NET}/64, which is the agent's in each pod");
            return Err(Refusal::new(Code::BadRequest, expected, address.to_string()));
        }
        Ok(Self(IpAddr::V6(address)))
    }
}

impl TryFrom<IpAddr> for Address {
    type Error = Refusal;
    fn try_from(address: IpAddr) -> Result<Self, Refusal> {
        match address {
            IpAddr::V4(address) if address.is_broadcast() => {
                Err(Refusal::new(Code::BadRequest, "the IPv4 address of a host", address.to_string()))
            }
            IpAddr::V4(address) => Ok(address.into()),
            IpAddr::V6(address) => address.try_into(),
        }
    }
}

impl PartialEq<Ipv4Addr> for Address {
    fn eq(&self, other: &Ipv4Addr) -> bool {
        self.0 == *other
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for Address {
    type Err = Refusal;
    fn from_str(text: &str) -> Result<Self, Refusal> {
        let bad = |_| Refusal::new(Code::BadRequest, "an IPv4 or IPv6 address", text);
        let address: IpAddr = text.parse().map_err(bad)?;
        // One address has one name (RFC 5952).
        if address.to_string() != text {
            return Err(Refusal::new(Code::BadRequest, format!("{address}, as it is written"), text));
        }
        address.try_into()
    }
}

impl Serialize for Address {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0 {
            _ if serializer.is_human_readable() => serializer.collect_str(&self.0),
            // It would be read as the beginning of an IPv6 one.
            IpAddr::V4(address) if address.octets() == SIXTEEN_FOLLOW => {
                Err(serde::ser::Error::custom("IPv4's broadcast is nobody's address"))
            }
            IpAddr::V4(address) => address.serialize(serializer),
            IpAddr::V6(address) => {
                let mut out = serializer.serialize_tuple(20)?;
                for byte in SIXTEEN_FOLLOW.iter().chain(&address.octets()) {
                    out.serialize_element(byte)?;
                }
                out.end()
            }
        }
    }
}

impl<'de> Deserialize<'de> for Address {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if deserializer.is_human_readable() {
            return String::deserialize(deserializer)?.parse().map_err(D::Error::custom);
        }
        deserializer.deserialize_tuple(20, Stored)
    }
}

struct Stored;

impl<'de> Visitor<'de> for Stored {
    type Value = Address;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an address as it is stored")
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Address, A::Error> {
        let first = bytes::<4, A>(&mut seq)?;
        if first != SIXTEEN_FOLLOW {
            return Ok(Ipv4Addr::from(first).into());
        }
        Ipv6Addr::from(bytes::<16, A>(&mut seq)?).try_into().map_err(A::Error::custom)
    }
}

fn bytes<'de, const N: usize, A: SeqAccess<'de>>(seq: &mut A) -> Result<[u8; N], A::Error> {
    let mut out = [0; N];
    for (at, byte) in out.iter_mut().enumerate() {
        *byte = seq.next_element()?.ok_or_else(|| A::Error::invalid_length(at, &"an address as it is stored"))?;
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ipv6_address_of_one_host_is_one_and_has_one_name() {
        for good in ["10.0.0.1", "fd00::1", "2001:db8::a:1", "fd61:6d62:6974:1::1"] {
            assert_eq!(good.parse::<Address>().unwrap().to_string(), good);
        }
        for bad in [
            "",
            "10.0.0",
            "255.255.255.255",
            "::",
            "::1",
            "::ffff:10.0.0.1",
            "::10.0.0.1",
            "fe80::1",
            "fec0::1",
            "ff02::1",
            "FD00::1",
            "fd00:0::1",
            "fd00::0001",
            "[fd00::1]",
            "fd00::1%eth0",
            "fd61:6d62:6974::5",
        ] {
            assert_eq!(bad.parse::<Address>().unwrap_err().code, Code::BadRequest, "{bad}");
        }
    }

    #[test]
    fn of_ipv4_it_is_stored_as_ever_and_of_ipv6_as_no_former_release_reads_it() {
        let stored = |text: &str| postcard::to_stdvec(&("k", text.parse::<Address>().unwrap(), "after")).unwrap();
        let v4 = stored("10.1.2.3");
        assert_eq!(v4, postcard::to_stdvec(&("k", Ipv4Addr::new(10, 1, 2, 3), "after")).unwrap());
        assert_eq!(hex::encode(stored("fd00::1")), "016bfffffffffd000000000000000000000000000001056166746572");
        for text in ["10.1.2.3", "fd00::1"] {
            let read: (String, Address, String) = postcard::from_bytes(&stored(text)).unwrap();
            assert_eq!((read.1.to_string().as_str(), read.2.as_str()), (text, "after"));
        }
        let mapped = [&SIXTEEN_FOLLOW[..], &Ipv4Addr::new(10, 0, 0, 1).to_ipv6_mapped().octets()].concat();
        assert!(postcard::from_bytes::<Address>(&mapped).is_err());
        assert!(postcard::from_bytes::<Address>(&SIXTEEN_FOLLOW).is_err());
        assert!(postcard::to_stdvec(&Address::from(SIXTEEN_FOLLOW)).is_err(), "it would be read as another");
        let order: Vec<Address> = ["10.0.0.1", "255.0.0.1", "fd00::1"].map(|text| text.parse().unwrap()).into();
        assert!(order.is_sorted() && Address::FIRST < order[0]);
    }
}
