//! What the programs tell: counters, and an event for each refusal.

use crate::error::KernelError;
use crate::kernel::Kernel;
use crate::layout::{CONFIG_SAMPLE, Layout, REASONS, RawEvent, RawEvent6};
use libbpf_rs::{MapCore, MapFlags, RingBufferBuilder};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

macro_rules! reasons {
    ($($(#[$m:meta])* $name:ident = $number:literal $text:literal;)*) => {
        /// Why a program refused, or that it did not. The numbers are those of `ambit.h`.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Reason { $($(#[$m])* $name = $number),* }

        impl Reason {
            /// All of them, in the order of their numbers.
            pub const ALL: &'static [Reason] = &[$(Reason::$name),*];
            /// Its name in metrics, logs and refusals.
            pub fn as_str(self) -> &'static str { match self { $(Self::$name => $text),* } }
            fn from_number(number: u32) -> Option<Self> { match number { $($number => Some(Self::$name),)* _ => None } }
        }
    };
}

reasons! {
    /// Allowed: one connection in so many is told, see [`Kernel::sample_allowed`].
    Allowed = 0 "allowed";
    /// The caller's cgroup is not enrolled.
    UnknownSource = 2 "unknown_source";
    /// The agent did not renew the lease in time.
    LeaseExpired = 3 "lease_expired";
    /// Nobody known is behind the address.
    UnknownDestination = 4 "unknown_destination";
    /// No policy speaks of this caller, callee and port.
    NoVerdict = 5 "no_verdict";
    /// A policy denies it.
    PolicyDeny = 6 "policy_deny";
    /// The service has no healthy endpoint (the application sees ECONNREFUSED).
    NoHealthyEndpoint = 7 "no_healthy_endpoint";
    /// Not TCP, beyond loopback.
    NotTcp = 8 "not_tcp";
    /// IPv6 that is not v4-mapped: where the pod has no such address, or of datagrams.
    NativeIpv6 = 9 "native_ipv6";
    /// The capture port was dialled on purpose.
    CaptureAddress = 10 "capture_address";
    /// The socket is bound to a device other than lo.
    BoundDevice = 11 "bound_device";
    /// Nothing was installed yet.
    NoTables = 12 "no_tables";
    /// The kernel had no memory to keep the flow.
    NoMemory = 13 "no_memory";
    /// A connection from outside, around the tunnel.
    PlainInbound = 14 "plain_inbound";
    /// A captured connection found no agent.
    AgentAbsent = 15 "agent_absent";
    /// The caller's network namespace is not attached: the capture address there could be anyone's.
    NoCapture = 16 "no_capture";
    /// A socket of a kind whose traffic no program sees (UDP-Lite, SCTP, ICMP, raw): it is not made.
    SocketKind = 19 "socket_kind";
    /// A packet on its way out of a pod by its wire, where nothing that is allowed goes.
    ClearOutbound = 20 "clear_outbound";
}

const ALLOWED: usize = 0;
const LOOPBACK: usize = 1;
const EVENT_LOST: usize = 17;
const FLOW_LOST: usize = 18;
const SOCKET_ENDED: usize = 21;
const DIRECT: usize = 22;

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Totals since the maps were made; they survive the agent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Connections allowed, captured or not.
    pub allowed: u64,
    /// Of these, such as went directly to a pod of this node.
    pub direct: u64,
    /// Connections and datagrams left alone because they stay in the pod's loopback.
    pub loopback: u64,
    /// Refusals by reason; every reason to refuse is there.
    pub denied: BTreeMap<Reason, u64>,
    /// Events that found the ring full.
    pub events_lost: u64,
    /// Flows that found their map full: the agent resets them, or their packets pass nowhere.
    pub flows_lost: u64,
    /// Connections around the mesh that were there before their pod was governed, and were ended.
    pub sockets_ended: u64,
}

/// One refusal, or one connection of the sample of those allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// Since boot, suspend included.
    pub time: Duration,
    /// The caller's cgroup; 0 for inbound, and where the kernel knows no socket of a packet.
    pub cgroup: u64,
    /// The caller's identity, 0 if unknown.
    pub source: u32,
    /// The callee's identity, 0 if not resolved.
    pub destination: u32,
    /// Of a packet (inbound, or out of a pod): where it came from (unspecified for IPv6 out of a pod).
    pub from: Option<IpAddr>,
    /// The address asked for (unspecified for IPv6 out of a pod). Of [`Reason::SocketKind`] unspecified, with the socket's IP
    /// protocol number for a port.
    pub address: SocketAddr,
    /// The rule of the verdict, 0 for none.
    pub rule: u32,
    /// Why.
    pub reason: Reason,
}

impl Event {
    /// `None` for bytes that this version did not write.
    fn parse(bytes: &[u8]) -> Option<Self> {
        let (raw, from, to) = match RawEvent6::from_bytes(bytes) {
            Some(raw) => (raw.event, IpAddr::from(raw.source_address), IpAddr::from(raw.address)),
            None => {
                let raw = RawEvent::from_bytes(bytes)?;
                (raw, IpAddr::from(raw.source_address), IpAddr::from(raw.address))
            }
        };
        let reason = Reason::from_number(raw.reason)?;
        Some(Self {
            time: Duration::from_nanos(raw.time_ns),
            cgroup: raw.cgroup,
            source: raw.source,
            destination: raw.destination,
            from: matches!(reason, Reason::PlainInbound | Reason::ClearOutbound).then_some(from),
            address: SocketAddr::new(to, raw.port),
            rule: raw.rule,
            reason,
        })
    }
}

/// Events that one look at the ring takes: more than it holds.
pub(crate) const EVENTS_MAX: u32 = 8_192;

impl Kernel {
    /// Reads all counters.
    pub fn counters(&self) -> Result<Counters, KernelError> {
        let mut totals = [0u64; REASONS as usize];
        for (index, total) in (0u32..).zip(totals.iter_mut()) {
            let per_cpu = self
                .maps()
                .counters
                .lookup_percpu(&index.to_ne_bytes(), MapFlags::ANY)
                .map_err(|e| KernelError::bpf("read map counters", e))?
                .unwrap_or_default();
            *total = per_cpu
                .iter()
                .filter_map(|value| Some(u64::from_ne_bytes(*value.first_chunk()?)))
                .fold(0, u64::wrapping_add);
        }
        let refusals = Reason::ALL.iter().filter(|reason| **reason != Reason::Allowed);
        let denied = refusals.filter_map(|r| Some((*r, *totals.get(*r as usize)?))).collect();
        Ok(Counters {
            allowed: totals[ALLOWED],
            direct: totals[DIRECT],
            loopback: totals[LOOPBACK],
            denied,
            events_lost: totals[EVENT_LOST],
            flows_lost: totals[FLOW_LOST],
            sockets_ended: totals[SOCKET_ENDED],
        })
    }

    /// Has one in `one_in` allowed connections told as an event, each where that is 1, none where it is 0.
    pub fn sample_allowed(&self, one_in: u32) -> Result<(), KernelError> {
        self.set_config(CONFIG_SAMPLE, u64::from(one_in))
    }

    /// Hands waiting events to `take`, oldest first, 8,192 at most: workloads may make them faster than they are taken. The
    /// ring holds about 4,600; programs wake nobody, so call this on a timer (100 ms is plenty). One caller at a time.
    pub fn drain_events(&self, take: &mut dyn FnMut(Event)) -> Result<(), KernelError> {
        let taken = Cell::new(0);
        let mut builder = RingBufferBuilder::new();
        builder
            .add(&self.maps().events, |bytes| {
                taken.set(taken.get() + 1);
                if let Some(event) = Event::parse(bytes) {
                    take(event);
                }
                // What is negative ends it behind this event (libbpf's ringbuf_process_ring).
                if taken.get() < EVENTS_MAX { 0 } else { -1 }
            })
            .map_err(|e| KernelError::bpf("open map events", e))?;
        let ring = builder.build().map_err(|e| KernelError::bpf("open map events", e))?;
        match ring.consume() {
            Err(e) if taken.get() < EVENTS_MAX => Err(KernelError::bpf("read map events", e)),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_the_header() {
        let header = include_str!("bpf/ambit.h");
        for reason in Reason::ALL {
            let line = format!("{} = {},", reason.as_str().to_uppercase(), *reason as u32);
            assert!(header.contains(&line), "ambit.h lacks `{line}`");
            assert_eq!(Reason::from_number(*reason as u32), Some(*reason));
        }
        assert!(header.contains(&format!("REASONS = {REASONS},")));
        assert!(header.contains(&format!("#define CAPTURE_PORT {}", crate::CAPTURE_PORT)));
        assert!(header.contains(&format!("#define SERVICE_ENDPOINTS {}", crate::MAX_SERVICE_ENDPOINTS)));
        assert_eq!(Event::parse(&[0xff; 48]), None);
    }
}
