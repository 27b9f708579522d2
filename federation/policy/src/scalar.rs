//! Values inside a document. Each is checked while it is visited: an error raised there carries the value's own line
//! and column, one raised later only those of the mapping around it.

use ambit_model::policy::{Cidr, Peers};
use ambit_model::{Address, Code, Refusal, Stamp, utc};
use serde::de::{Deserialize, Deserializer, Error, SeqAccess, Unexpected, Visitor};
use std::fmt;
use std::marker::PhantomData;
use std::net::Ipv4Addr;
use std::str::FromStr;

/// A model type, parsed from its text by the model's own rules.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Text<T>(pub(crate) T);

impl<'de, T: FromStr<Err = Refusal>> Deserialize<'de> for Text<T> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct V<T>(PhantomData<T>);
        impl<T: FromStr<Err = Refusal>> Visitor<'_> for V<T> {
            type Value = Text<T>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string")
            }
            fn visit_str<E: Error>(self, text: &str) -> Result<Self::Value, E> {
                let told = |r: Refusal| E::custom(format_args!("expected {}, found '{}'", r.expected, r.found));
                text.parse().map(Text).map_err(told)
            }
        }
        d.deserialize_str(V(PhantomData))
    }
}

/// Of whom a policy speaks.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Caller {
    Meshed(Peers),
    Unmeshed(Cidr),
}

impl FromStr for Caller {
    type Err = Refusal;
    fn from_str(s: &str) -> Result<Self, Refusal> {
        match s.strip_prefix("cidr:") {
            Some(range) => range.parse().map(Self::Unmeshed),
            None => s.parse().map(Self::Meshed),
        }
    }
}

/// A set that is no group: what is protected, and who is in a group.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Member(pub(crate) Peers);

impl FromStr for Member {
    type Err = Refusal;
    fn from_str(s: &str) -> Result<Self, Refusal> {
        match s.parse()? {
            Peers::Group(..) => {
                Err(Refusal::new(Code::PolicyMalformed, "a set that is no group (groups are callers)", s))
            }
            set => Ok(Self(set)),
        }
    }
}

/// An instant in UTC, to the second.
pub(crate) struct Instant(pub(crate) Stamp);

impl FromStr for Instant {
    type Err = Refusal;
    fn from_str(s: &str) -> Result<Self, Refusal> {
        let expected = "an instant in UTC as 2026-12-31T23:59:59Z";
        let read = utc::parse(s).filter(|ms| *ms > 0);
        read.map(|ms| Self(Stamp(ms))).ok_or_else(|| Refusal::new(Code::PolicyMalformed, expected, s))
    }
}

/// 1 to `MAX` values as written, without repetition; where order means nothing, the caller sorts.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Listed<T, const MAX: usize>(pub(crate) Vec<T>);

impl<'de, T: Deserialize<'de> + Ord, const MAX: usize> Deserialize<'de> for Listed<T, MAX> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct V<T, const MAX: usize>(PhantomData<T>);
        impl<'de, T: Deserialize<'de> + Ord, const MAX: usize> Visitor<'de> for V<T, MAX> {
            type Value = Listed<T, MAX>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a list of 1-{MAX} values")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
                let mut values = Vec::new();
                let mut count = 0;
                while let Some(value) = seq.next_element()? {
                    count += 1;
                    if count > MAX {
                        return Err(A::Error::invalid_length(count, &self));
                    }
                    // Order is kept (a service's first backend means something); a repeat is not.
                    if !values.contains(&value) {
                        values.push(value);
                    }
                }
                if count == 0 {
                    return Err(A::Error::invalid_length(0, &self));
                }
                Ok(Listed(values))
            }
        }
        d.deserialize_seq(V(PhantomData))
    }
}

/// A TCP port that can be called: 1-65535.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Port(pub(crate) u16);

impl<'de> Deserialize<'de> for Port {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct V;
        impl Visitor<'_> for V {
            type Value = Port;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a port of 1-65535")
            }
            fn visit_u64<E: Error>(self, n: u64) -> Result<Self::Value, E> {
                match u16::try_from(n) {
                    Ok(port) if port > 0 => Ok(Port(port)),
                    Ok(_) | Err(_) => Err(E::invalid_value(Unexpected::Unsigned(n), &self)),
                }
            }
        }
        d.deserialize_u16(V)
    }
}

/// An address that can be called. Loopback cannot: captured connections go there.
pub(crate) struct UnicastAddress(pub(crate) Address);

impl<'de> Deserialize<'de> for UnicastAddress {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct V;
        impl Visitor<'_> for V {
            type Value = UnicastAddress;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a unicast address, IPv4 or IPv6, that is not loopback")
            }
            fn visit_str<E: Error>(self, text: &str) -> Result<Self::Value, E> {
                let bad = || E::invalid_value(Unexpected::Str(text), &self);
                let address: Address = text.parse().map_err(|_| bad())?;
                let nobody =
                    |ip: Ipv4Addr| ip.is_unspecified() || ip.is_loopback() || ip.is_multicast() || ip.is_broadcast();
                if address.v4().is_some_and(nobody) { Err(bad()) } else { Ok(UnicastAddress(address)) }
            }
        }
        d.deserialize_str(V)
    }
}
