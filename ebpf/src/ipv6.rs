//! IPv6 of a pod, beside its IPv4: where captured connections lead in its namespace, where they wanted to go, and the agent's
//! last leg to it.

use crate::error::KernelError;
use crate::inbound::inode;
use crate::kernel::{Kernel, OriginalDestination};
use crate::layout::{Flow6, Flow6Key, Layout, LegKey, Namespace6};
use crate::netlink::{self, attribute};
use libbpf_rs::{ErrorKind, MapCore, MapFlags, MapHandle};
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

/// linux/rtnetlink.h.
const NLM_F_CREATE_REPLACE: u16 = 0x500;
const RTM_NEWROUTE: u16 = 24;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const AF_INET6: u8 = 10;
const TABLE_LOCAL: u8 = 255;
const RTPROT_STATIC: u8 = 4;
const LOCAL: u8 = 2;
const LOOPBACK: u32 = 1;

/// The /64 that stands for the agent in the namespace of a pod that has an IPv6 address, as in ipv6.h: captured connections go to
/// an address of it, and last legs come from one. No workload reaches it on purpose.
pub const AGENT_NET: Ipv6Addr = Ipv6Addr::new(0xfd61, 0x6d62, 0x6974, 0, 0, 0, 0, 0);
const AGENT_NET_BITS: u8 = 64;

/// No last leg is connected for longer than this; what an agent left behind that was killed is worth nothing after it.
const LEG_MAX: Duration = Duration::from_secs(30);

impl Kernel {
    /// Says what the IPv6 address is of a pod that is attached, or that it has none: from now on its workloads may be captured by
    /// IPv6, or not. In its namespace one route is added, of [`AGENT_NET`]/64 to lo. `listener` is its capture listener, which must
    /// take both families.
    pub fn set_ipv6(
        &self,
        netns: BorrowedFd<'_>,
        listener: BorrowedFd<'_>,
        address: Option<Ipv6Addr>,
    ) -> Result<(), KernelError> {
        let cookie = crate::sys::netns_cookie(listener).map_err(|e| KernelError::io("read a namespace cookie", e))?;
        let what = "route the agent's IPv6 addresses to lo in the pod's network namespace";
        if address.is_some() {
            within(netns, route).map_err(|e| KernelError::io(what, e))?;
        }
        let _change = self.lock();
        let namespaces = &self.maps().namespaces6;
        let Some(address) = address else { return delete(namespaces, &cookie.to_ne_bytes(), "namespaces6") };
        let value = Namespace6 { inode: inode(netns)?, address: address.octets() };
        put(namespaces, &cookie.to_ne_bytes(), &value.to_bytes(), "namespaces6")
    }

    /// [`Kernel::original_destination`] of a connection that was captured by IPv6. The endpoint may be one of IPv4: of a
    /// service, or of none.
    pub fn original_destination6(
        &self,
        netns_cookie: u64,
        client: SocketAddrV6,
        capture: SocketAddrV6,
    ) -> Option<OriginalDestination<SocketAddr>> {
        let key = Flow6Key {
            netns_cookie,
            client_address: client.ip().octets(),
            capture_address: capture.ip().octets(),
            client_port: client.port(),
            pad: [0; 3],
        };
        let mut value = [0; <Flow6 as crate::layout::Field>::SIZE];
        if !self.maps().flows6.lookup_into_and_delete(&key.to_bytes(), &mut value).unwrap_or(false) {
            return None;
        }
        let flow = Flow6::from_bytes(&value)?;
        let at = |address: [u8; 16], port| SocketAddr::new(IpAddr::from(address).to_canonical(), port);
        Some(OriginalDestination {
            asked: at(flow.asked_address, flow.asked_port),
            endpoint: at(flow.endpoint_address, flow.endpoint_port),
            identity: flow.identity,
        })
    }

    /// Lets the agent's socket in this namespace connect from `source`, an address of [`AGENT_NET`]/64 and a port that it is
    /// bound to, to `called`, the pod's. To be taken back with [`Kernel::end_leg`] once it is connected or failed.
    pub fn begin_leg(&self, netns_cookie: u64, source: SocketAddrV6, called: SocketAddrV6) -> Result<(), KernelError> {
        let now = crate::sys::boot_time_ns().map_err(|e| KernelError::io("read the boot clock", e))?;
        let until = now.saturating_add(u64::try_from(LEG_MAX.as_nanos()).unwrap_or(u64::MAX));
        put(&self.maps().legs, &leg_key(netns_cookie, source, called), &until.to_ne_bytes(), "legs")
    }

    /// Nothing more may begin on it. Absent is fine.
    pub fn end_leg(&self, netns_cookie: u64, source: SocketAddrV6, called: SocketAddrV6) -> Result<(), KernelError> {
        delete(&self.maps().legs, &leg_key(netns_cookie, source, called), "legs")
    }

    /// Removes what agents left behind that were killed: legs whose time is over, and flows that closed longer ago than that;
    /// says how many.
    pub(crate) fn sweep_ipv6(&self, now: u64, age: u64) -> Result<usize, KernelError> {
        let is_over = |value: &[u8]| value.first_chunk().is_some_and(|until| u64::from_ne_bytes(*until) <= now);
        let has_closed = |value: &[u8]| {
            Flow6::from_bytes(value).is_some_and(|f| f.closed_ns != 0 && now.saturating_sub(f.closed_ns) >= age)
        };
        Ok(sweep(&self.maps().legs, "legs", is_over)? + sweep(&self.maps().flows6, "flows6", has_closed)?)
    }
}

fn sweep(map: &MapHandle, name: &str, over: impl Fn(&[u8]) -> bool) -> Result<usize, KernelError> {
    let keys: Vec<Vec<u8>> = map.keys().take(map.max_entries() as usize).collect();
    let mut removed = 0;
    for key in keys {
        let value = map.lookup(&key, MapFlags::ANY).map_err(|e| KernelError::bpf(format!("read map {name}"), e))?;
        if value.is_some_and(|value| over(&value)) && map.delete(&key).is_ok() {
            removed += 1;
        }
    }
    Ok(removed)
}

fn leg_key(netns_cookie: u64, source: SocketAddrV6, called: SocketAddrV6) -> Vec<u8> {
    let key = LegKey {
        netns_cookie,
        source_address: source.ip().octets(),
        called_address: called.ip().octets(),
        source_port: source.port(),
        called_port: called.port(),
        pad: 0,
    };
    key.to_bytes()
}

fn put(map: &MapHandle, key: &[u8], value: &[u8], name: &'static str) -> Result<(), KernelError> {
    map.update(key, value, MapFlags::ANY).map_err(|e| {
        if e.kind() == ErrorKind::TooBig {
            let capacity = map.max_entries();
            return KernelError::MapFull { map: name, capacity, needed: capacity as usize + 1 };
        }
        KernelError::bpf(format!("write map {name}"), e)
    })
}

fn delete(map: &MapHandle, key: &[u8], name: &str) -> Result<(), KernelError> {
    match map.delete(key) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(KernelError::bpf(format!("write map {name}"), e)),
        _ => Ok(()),
    }
}

/// On a thread of its own in that namespace.
fn within(netns: BorrowedFd<'_>, act: fn() -> io::Result<()>) -> io::Result<()> {
    std::thread::scope(|scope| {
        let done = scope.spawn(|| {
            crate::sys::enter_netns(netns.as_fd())?;
            act()
        });
        done.join().unwrap_or_else(|_| Err(io::Error::other("the thread inside ended")))
    })
}

/// In place of one that is there.
fn route() -> io::Result<()> {
    let mut body = vec![AF_INET6, AGENT_NET_BITS, 0, 0, TABLE_LOCAL, RTPROT_STATIC, 0, LOCAL, 0, 0, 0, 0];
    body.extend(attribute(RTA_DST, &AGENT_NET.octets()));
    body.extend(attribute(RTA_OIF, &LOOPBACK.to_ne_bytes()));
    netlink::change(RTM_NEWROUTE, NLM_F_CREATE_REPLACE, &body)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_network_is_that_of_the_header() {
        let header = include_str!("bpf/ipv6.h");
        let octets = AGENT_NET.octets();
        for (n, word) in octets.chunks(4).take(2).enumerate() {
            let word: String = word.iter().map(|byte| format!("{byte:02x}")).collect();
            assert!(header.contains(&format!("#define AGENT_NET_{n} htonl(0x{word})")), "{word}");
        }
    }
}
