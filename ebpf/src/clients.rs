//! Who calls, told to the kernel before the last leg connects: what a workload's `accept()` and `getpeername()` then say.

use crate::error::KernelError;
use crate::kernel::Kernel;
use crate::layout::{Address6, ClientKey, Layout, RawClient};
use libbpf_rs::{ErrorKind, MapCore, MapFlags};
use std::net::{IpAddr, SocketAddr};

/// `CLIENT_FRESH_NS` of client.h: what was written longer ago is shown to nobody.
const FRESH_NS: u64 = 2_000_000_000;

/// The agent's socket in a pod's namespace, before it connects to this port of the pod's own address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leg {
    /// The namespace's cookie.
    pub netns: u64,
    /// What the socket is bound to, in 127.0.0.0/8; its port is known.
    pub from: SocketAddr,
    /// The workload's port.
    pub port: u16,
}

impl Leg {
    fn key(&self) -> Vec<u8> {
        let (leg_address, leg_port) = (mapped(self.from.ip()), self.from.port());
        ClientKey { netns_cookie: self.netns, leg_address, leg_port, pod_port: self.port, pad: 0 }.to_bytes()
    }
}

impl Kernel {
    /// Has the workload that accepts this leg within two seconds be told `client` for who calls. False where there is no room:
    /// then it is told the leg's own address.
    pub fn tell_client(&self, leg: &Leg, client: SocketAddr) -> Result<bool, KernelError> {
        let written_ns = crate::sys::boot_time_ns().map_err(|e| KernelError::io("read the boot clock", e))?;
        let (address, port) = (mapped(client.ip()), client.port());
        let value = RawClient { address, written_ns, port, pad: [0; 3] }.to_bytes();
        match self.maps().clients.update(&leg.key(), &value, MapFlags::ANY) {
            Ok(()) => Ok(true),
            Err(e) if e.kind() == ErrorKind::TooBig => Ok(false),
            Err(e) => Err(KernelError::bpf("write map clients", e)),
        }
    }

    /// Nothing is to be told of this leg, whatever was written of one before it. Absent is fine.
    pub fn forget_client(&self, leg: &Leg) -> Result<(), KernelError> {
        match self.maps().clients.delete(&leg.key()) {
            Err(e) if e.kind() != ErrorKind::NotFound => Err(KernelError::bpf("write map clients", e)),
            _ => Ok(()),
        }
    }

    /// Removes what no workload took, since what listens there is not governed or never answered, and says how many: every few
    /// seconds is often enough.
    pub fn sweep_clients(&self) -> Result<usize, KernelError> {
        let now = crate::sys::boot_time_ns().map_err(|e| KernelError::io("read the boot clock", e))?;
        let map = &self.maps().clients;
        let keys: Vec<Vec<u8>> = map.keys().take(map.max_entries() as usize).collect();
        let mut removed = 0;
        for key in keys {
            let value = map.lookup(&key, MapFlags::ANY).map_err(|e| KernelError::bpf("read map clients", e))?;
            let Some(client) = value.as_deref().and_then(RawClient::from_bytes) else { continue };
            if now.saturating_sub(client.written_ns) >= FRESH_NS && map.delete(&key).is_ok() {
                removed += 1;
            }
        }
        Ok(removed)
    }
}

fn mapped(ip: IpAddr) -> Address6 {
    match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
        IpAddr::V6(ip) => ip.octets(),
    }
}
