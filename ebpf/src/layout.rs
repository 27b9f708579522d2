//! The structures of `bpf/ambit.h` in Rust, and the hash that tells one version's maps from another's.
//!
//! Values cross as bytes through `to_bytes` and `from_bytes`, so nothing here is unsafe. A structure with hidden padding
//! does not compile, and a test compares every field with the header.

use sha2::{Digest, Sha256};
use std::net::Ipv4Addr;

/// A value with one representation as bytes, the kernel's.
pub(crate) trait Field: Sized {
    const SIZE: usize;
    fn put(&self, out: &mut Vec<u8>);
    /// Reads itself from the front of `bytes` and moves past; `None` if they are too few.
    fn take(bytes: &mut &[u8]) -> Option<Self>;
}

macro_rules! integer_field {
    ($($t:ty),*) => {$(
        impl Field for $t {
            const SIZE: usize = size_of::<$t>();
            fn put(&self, out: &mut Vec<u8>) { out.extend_from_slice(&self.to_ne_bytes()); }
            fn take(bytes: &mut &[u8]) -> Option<Self> {
                let (head, rest) = bytes.split_first_chunk()?;
                *bytes = rest;
                Some(<$t>::from_ne_bytes(*head))
            }
        }
    )*};
}
integer_field!(u8, u16, u32, u64);

impl<T: Field, const N: usize> Field for [T; N] {
    const SIZE: usize = T::SIZE * N;
    fn put(&self, out: &mut Vec<u8>) {
        self.iter().for_each(|item| item.put(out));
    }
    fn take(bytes: &mut &[u8]) -> Option<Self> {
        let items: Option<Vec<T>> = (0..N).map(|_| T::take(bytes)).collect();
        items?.try_into().ok()
    }
}

/// A structure of `ambit.h`.
pub(crate) trait Layout: Field {
    /// Its name in C.
    const C_NAME: &'static str;
    /// Name and size of each field in order; without padding these are their places.
    const FIELDS: &'static [(&'static str, usize)];

    fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(Self::SIZE);
        self.put(&mut out);
        out
    }
    /// `None` if `bytes` is not exactly one of them.
    fn from_bytes(mut bytes: &[u8]) -> Option<Self> {
        let value = Self::take(&mut bytes)?;
        bytes.is_empty().then_some(value)
    }
}

macro_rules! layout {
    ($($(#[$m:meta])* struct $name:ident = $c:literal { $($field:ident: $t:ty),* $(,)? })*) => {$(
        $(#[$m])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
        pub(crate) struct $name { $(pub(crate) $field: $t),* }

        const _: () = assert!(size_of::<$name>() == 0 $(+ <$t as Field>::SIZE)*, "hidden padding");

        impl Field for $name {
            const SIZE: usize = size_of::<$name>();
            fn put(&self, out: &mut Vec<u8>) { $(self.$field.put(out);)* }
            fn take(bytes: &mut &[u8]) -> Option<Self> { Some(Self { $($field: Field::take(bytes)?),* }) }
        }

        impl Layout for $name {
            const C_NAME: &'static str = $c;
            const FIELDS: &'static [(&'static str, usize)] = &[$((stringify!($field), <$t as Field>::SIZE)),*];
        }
    )*};
}

/// An IPv4 address as the kernel keeps it: four bytes in network order.
pub(crate) type Address = [u8; 4];
/// The same of IPv6; where a table may have either, an IPv4 address is v4-mapped.
pub(crate) type Address6 = [u8; 16];

layout! {
    /// Who a cgroup is.
    struct Workload = "workload" { identity: u32, flags: u32 }
    /// A governed network namespace: its inode number, and the pod's address.
    struct Namespace = "namespace" { inode: u64, address: Address, pad: u32 }
    struct RawVerdictKey = "verdict_key" { source: u32, destination: u32, port: u16, pad: u16 }
    struct RawVerdict = "verdict" { action: u32, rule: u32 }
    struct RangeKey = "range_key" { bits: u32, address: Address }
    struct ServiceKey = "service_key" { address: Address, port: u16, pad: u16 }
    struct RawEndpoint = "service_endpoint" { address: Address, identity: u32, port: u16, tier: u8, healthy: u8 }
    struct RawService = "service" { count: u32, pad: u32, endpoints: [RawEndpoint; crate::MAX_SERVICE_ENDPOINTS] }
    struct FlowKey = "flow_key" {
        netns_cookie: u64, client_address: Address, capture_address: Address, client_port: u16, pad: [u16; 3],
    }
    struct Flow = "flow" {
        asked_address: Address, endpoint_address: Address, asked_port: u16, endpoint_port: u16, identity: u32,
        closed_ns: u64,
    }
    struct SocketFlow = "socket_flow" {
        flow: Flow, key: FlowKey, cgroup: u64, opened_ns: u64, source: u32, direct: u32,
    }
    struct RawLocal = "local" { netns: u64, identity: u32, device: u32, flags: u32, pad: u32 }
    struct StampKey = "stamp_key" { lower_address: Address, upper_address: Address, lower_port: u16, upper_port: u16 }
    struct RawStamp = "stamp" {
        caller_netns: u64, called_netns: u64, opened_ns: u64, closed_ns: u64, called_closed_ns: u64, sent: u64,
        received: u64, caller: u32, called: u32, caller_address: Address, called_address: Address, caller_port: u16,
        called_port: u16, last_state: u32,
    }
    struct ClientKey = "client_key" {
        netns_cookie: u64, leg_address: Address6, leg_port: u16, pod_port: u16, pad: u32,
    }
    struct RawClient = "client" { address: Address6, written_ns: u64, port: u16, pad: [u16; 3] }
    struct RawEvent = "event" {
        time_ns: u64, cgroup: u64, source: u32, destination: u32, source_address: Address, address: Address,
        port: u16, pad: u16, rule: u32, reason: u32, pad2: u32,
    }
    struct Namespace6 = "namespace6" { inode: u64, address: Address6 }
    struct Service6Key = "service6_key" { address: Address6, port: u16, pad: u16 }
    struct RawEndpoint6 = "service6_endpoint" { address: Address6, identity: u32, port: u16, tier: u8, healthy: u8 }
    struct RawService6 = "service6" { count: u32, pad: u32, endpoints: [RawEndpoint6; crate::MAX_SERVICE_ENDPOINTS] }
    struct Flow6Key = "flow6_key" {
        netns_cookie: u64, client_address: Address6, capture_address: Address6, client_port: u16, pad: [u16; 3],
    }
    struct Flow6 = "flow6" {
        asked_address: Address6, endpoint_address: Address6, asked_port: u16, endpoint_port: u16, identity: u32,
        closed_ns: u64,
    }
    struct SocketFlow6 = "socket_flow6" { flow: Flow6, key: Flow6Key }
    struct LegKey = "leg_key" {
        netns_cookie: u64, source_address: Address6, called_address: Address6, source_port: u16, called_port: u16, pad: u32,
    }
    struct RawEvent6 = "event6" { event: RawEvent, source_address: Address6, address: Address6 }
}

/// Places in the `config` map.
pub(crate) const CONFIG_LEASE_NS: u32 = 0;
pub(crate) const CONFIG_GENERATION: u32 = 1;
pub(crate) const CONFIG_SAMPLE: u32 = 2;
pub(crate) const CONFIG_ROOM: u32 = 3;
pub(crate) const CONFIG_TOLD_NS: u32 = 4;
/// Entries of `counters`: one for each reason of `ambit.h`.
pub(crate) const REASONS: u32 = 23;

pub(crate) fn address(ip: Ipv4Addr) -> Address {
    ip.octets()
}

/// Tells whether pinned maps can be used by this version: over the number of counters, the name, type and sizes of each map (`maps`, in a fixed
/// order) and the fields of each structure in them.
pub(crate) fn layout_hash(maps: &[(&str, u32, usize, usize)]) -> [u8; 32] {
    let mut hash = Sha256::new();
    hash.update(b"ambit-ebpf layout 1\n");
    // The number of counters is in no type or size below, and a counter too few would lose a reason.
    hash.update(format!("counters {REASONS}\n"));
    for (name, kind, key, value) in maps {
        hash.update(format!("map {name} {kind} {key} {value}\n"));
    }
    for (name, fields) in structs() {
        hash.update(format!("struct {name}"));
        for (field, size) in fields {
            hash.update(format!(" {field}:{size}"));
        }
        hash.update("\n");
    }
    hash.finalize().into()
}

type Fields = &'static [(&'static str, usize)];

fn structs() -> [(&'static str, Fields); 26] {
    [
        (Workload::C_NAME, Workload::FIELDS),
        (Namespace::C_NAME, Namespace::FIELDS),
        (RawVerdictKey::C_NAME, RawVerdictKey::FIELDS),
        (RawVerdict::C_NAME, RawVerdict::FIELDS),
        (RangeKey::C_NAME, RangeKey::FIELDS),
        (ServiceKey::C_NAME, ServiceKey::FIELDS),
        (RawEndpoint::C_NAME, RawEndpoint::FIELDS),
        (RawService::C_NAME, RawService::FIELDS),
        (FlowKey::C_NAME, FlowKey::FIELDS),
        (Flow::C_NAME, Flow::FIELDS),
        (SocketFlow::C_NAME, SocketFlow::FIELDS),
        (RawLocal::C_NAME, RawLocal::FIELDS),
        (StampKey::C_NAME, StampKey::FIELDS),
        (RawStamp::C_NAME, RawStamp::FIELDS),
        (RawEvent::C_NAME, RawEvent::FIELDS),
        (ClientKey::C_NAME, ClientKey::FIELDS),
        (RawClient::C_NAME, RawClient::FIELDS),
        (Namespace6::C_NAME, Namespace6::FIELDS),
        (Service6Key::C_NAME, Service6Key::FIELDS),
        (RawEndpoint6::C_NAME, RawEndpoint6::FIELDS),
        (RawService6::C_NAME, RawService6::FIELDS),
        (Flow6Key::C_NAME, Flow6Key::FIELDS),
        (Flow6::C_NAME, Flow6::FIELDS),
        (SocketFlow6::C_NAME, SocketFlow6::FIELDS),
        (LegKey::C_NAME, LegKey::FIELDS),
        (RawEvent6::C_NAME, RawEvent6::FIELDS),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_those_of_the_header() {
        let sizes = [
            (Workload::SIZE, 8),
            (Namespace::SIZE, 16),
            (RawVerdictKey::SIZE, 12),
            (RawVerdict::SIZE, 8),
            (RangeKey::SIZE, 8),
            (ServiceKey::SIZE, 8),
            (RawEndpoint::SIZE, 12),
            (RawService::SIZE, 104),
            (FlowKey::SIZE, 24),
            (Flow::SIZE, 24),
            (SocketFlow::SIZE, 72),
            (RawLocal::SIZE, 24),
            (StampKey::SIZE, 12),
            (RawStamp::SIZE, 80),
            (RawEvent::SIZE, 48),
            (ClientKey::SIZE, 32),
            (RawClient::SIZE, 32),
            (Service6Key::SIZE, 20),
            (RawService6::SIZE, 200),
            (SocketFlow6::SIZE, 96),
            (LegKey::SIZE, 48),
            (RawEvent6::SIZE, 80),
        ];
        sizes.iter().for_each(|(ours, header)| assert_eq!(ours, header));
    }

    #[test]
    fn bytes_come_back_and_wrong_lengths_do_not() {
        let key = RawVerdictKey { source: 256, destination: 257, port: 80, pad: 0 };
        let bytes = key.to_bytes();
        assert_eq!(RawVerdictKey::from_bytes(&bytes), Some(key));
        assert_eq!(RawVerdictKey::from_bytes(&bytes[1..]), None);
        assert_eq!(RawVerdictKey::from_bytes(&[bytes.clone(), vec![0]].concat()), None);
    }

    /// Fields of `struct name` in the header: name and size.
    fn in_header(name: &str) -> Vec<(String, usize)> {
        let header = concat!(
            include_str!("bpf/ambit.h"),
            include_str!("bpf/stamps.h"),
            include_str!("bpf/client.h"),
            include_str!("bpf/ipv6.h")
        );
        let start = header.find(&format!("\nstruct {name} {{\n")).unwrap_or_else(|| panic!("no struct {name}"));
        let body = header[start..].lines().skip(2).take_while(|line| *line != "};");
        body.map(|line| {
            let (declaration, _) = line.split_once(';').unwrap();
            let (kind, field) = declaration.trim().rsplit_once(' ').unwrap();
            let (field, count) = match field.split_once('[') {
                None => (field, 1),
                Some((field, "SERVICE_ENDPOINTS]")) => (field, crate::MAX_SERVICE_ENDPOINTS),
                Some((field, count)) => (field, count.trim_end_matches(']').parse().unwrap()),
            };
            let size = match kind {
                "u8" => 1,
                "u16" => 2,
                "u32" => 4,
                "u64" => 8,
                other => in_header(other.strip_prefix("struct ").unwrap()).iter().map(|field| field.1).sum(),
            };
            (field.to_owned(), size * count)
        })
        .collect()
    }

    /// `build-objects.sh --check` ties the objects to the header, and this ties the header to us.
    #[test]
    fn fields_are_those_of_the_header() {
        let check = |name: &str, ours: &[(&str, usize)]| {
            let ours: Vec<_> = ours.iter().map(|(field, size)| ((*field).to_owned(), *size)).collect();
            assert_eq!(in_header(name), ours, "struct {name}");
        };
        structs().into_iter().for_each(|(name, fields)| check(name, fields));
    }
}
