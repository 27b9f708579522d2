//! Ranges of addresses, for what has no identity.

use crate::refusal::{Code, Refusal};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::str::FromStr;

/// `address/bits`, with no bit set behind the prefix (RFC 4632 3.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Cidr {
    address: IpAddr,
    bits: u8,
}

impl Cidr {
    /// The range of IPv4 addresses that it is, none where it is of IPv6: its first address, and at most 32 bits.
    pub fn v4(&self) -> Option<(Ipv4Addr, u8)> {
        match self.address {
            IpAddr::V4(address) => Some((address, self.bits.min(32))),
            IpAddr::V6(_) => None,
        }
    }

    /// Whether every address of `other` lies in the range.
    pub fn covers(&self, other: &Cidr) -> bool {
        self.bits <= other.bits && self.contains(other.address)
    }

    /// Whether the address lies in the range. What a socket of both families calls `::ffff:a.b.c.d` is IPv4.
    pub fn contains(&self, address: IpAddr) -> bool {
        match (self.address, address.to_canonical()) {
            (IpAddr::V4(_), IpAddr::V4(_)) | (IpAddr::V6(_), IpAddr::V6(_)) => {
                masked(address.to_canonical(), self.bits) == number(self.address)
            }
            (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => false,
        }
    }
}

/// The address as a number of 128 bits, from the left.
fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => u128::from(v4.to_bits()) << 96,
        IpAddr::V6(v6) => v6.to_bits(),
    }
}

fn masked(address: IpAddr, bits: u8) -> u128 {
    // A record of a peer may say more bits than there are: that is the address alone.
    let mask = u128::MAX.checked_shl(128_u32.saturating_sub(u32::from(bits))).unwrap_or(0);
    number(address) & mask
}

impl FromStr for Cidr {
    type Err = Refusal;
    fn from_str(s: &str) -> Result<Self, Refusal> {
        let bad = || Refusal::new(Code::BadRequest, "a range address/bits with no bit set behind the prefix", s);
        let (address, bits) = s.split_once('/').ok_or_else(bad)?;
        let address: IpAddr = address.parse().map_err(|_| bad())?;
        let written = |n: &u8| n.to_string() == bits;
        let bits: u8 = bits.parse().ok().filter(written).ok_or_else(bad)?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        // A v4-mapped range would be two ways to write one.
        let mapped = address.to_canonical() != address;
        if bits > most || mapped || masked(address, bits) != number(address) {
            return Err(bad());
        }
        Ok(Self { address, bits })
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.bits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_hold_their_addresses() {
        for (range, address, holds) in [
            ("10.0.0.0/8", "10.255.0.1", true),
            ("10.0.0.0/8", "11.0.0.0", false),
            ("10.0.0.0/8", "::ffff:10.1.2.3", true),
            ("0.0.0.0/0", "192.0.2.1", true),
            ("0.0.0.0/0", "2001:db8::1", false),
            ("192.0.2.1/32", "192.0.2.1", true),
            ("192.0.2.1/32", "192.0.2.0", false),
            ("2001:db8::/32", "2001:db8:1::1", true),
            ("::/0", "10.0.0.1", false),
            ("::/0", "fe80::1", true),
        ] {
            assert_eq!(range.parse::<Cidr>().unwrap().contains(address.parse().unwrap()), holds, "{range} {address}");
        }
        for (address, bits, other) in [("10.0.0.1", 33, "10.0.0.2"), ("10.0.0.1", 255, "10.0.0.2"), ("::1", 129, "::2")]
        {
            let range = Cidr { address: address.parse().unwrap(), bits };
            let read = postcard::from_bytes::<Cidr>(&postcard::to_stdvec(&range).unwrap()).unwrap();
            assert!(read.contains(range.address) && !read.contains(other.parse().unwrap()), "{read}");
        }
        for text in ["10.0.0.1/8", "10.0.0.0/33", "10.0.0.0", "10.0.0.0/08", "::ffff:10.0.0.0/104", "x/1", "::/129"] {
            assert!(text.parse::<Cidr>().is_err(), "{text}");
        }
    }
}
