//! Connections between two pods of this node, which go directly: who may, which there are, and their end.

use crate::error::KernelError;
use crate::kernel::Kernel;
use crate::layout::{self, CONFIG_ROOM, CONFIG_TOLD_NS, Field, Layout, RawLocal, RawStamp, StampKey};
use libbpf_rs::{MapCore, MapFlags};
use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::BorrowedFd;
use std::time::Duration;

/// `LOCAL_OPEN` of stamps.h.
const OPEN: u32 = 1;
/// `STAMP_LINGER_NS` of stamps.h: longer than that no program honours a closed one.
const LINGER: Duration = Duration::from_secs(60);
/// Of so many places one is kept free, for what begins while they are counted.
const SLACK: u32 = 16;
/// Stamps for which a look has room beyond those that were held a moment before.
const GROWTH: u32 = 4096;
/// TCP states of the kernel (include/net/tcp_states.h) that a socket leaves for CLOSE where both sides ended in order.
const IN_ORDER: [u32; 4] = [5, 6, 9, 11];
const SYN_SENT: u32 = 2;

/// Where a pod is on this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The cookie of its network namespace.
    pub netns: u64,
    /// The index of the node's end of its one wire.
    pub device: u32,
}

/// A pod of this node to and from which connections may go directly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Local {
    /// Its address.
    pub address: Ipv4Addr,
    /// Who it is.
    pub identity: u32,
    /// Where it is.
    pub place: Place,
    /// Whether new connections may go directly; those that are open do either way.
    pub open: bool,
}

impl Local {
    fn row(&self) -> (Vec<u8>, Vec<u8>) {
        let (flags, Place { netns, device }) = (if self.open { OPEN } else { 0 }, self.place);
        let raw = RawLocal { netns, identity: self.identity, device, flags, pad: 0 };
        (layout::address(self.address).to_vec(), raw.to_bytes())
    }
}

/// What goes directly, at an instant.
#[derive(Clone, Debug)]
pub struct Direct {
    /// When it was looked at before, by whatever agent, and when now, since boot: what began or ended between these is news.
    pub news: std::ops::Range<Duration>,
    /// The connections.
    pub flows: Vec<Flow>,
}

/// A connection that goes directly, or went so within the last minute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// Who called, by number.
    pub caller: u32,
    /// From where.
    pub from: SocketAddrV4,
    /// Who was called.
    pub called: u32,
    /// Where.
    pub to: SocketAddrV4,
    /// When it began, since boot.
    pub opened: Duration,
    /// When the caller's socket closed, since boot; none while it is open.
    pub closed: Option<Duration>,
    /// Bytes from the caller, as TCP counts what was acknowledged: its FIN is one, if it sent one. Known once it is closed.
    pub sent: u64,
    /// Bytes to the caller, likewise.
    pub received: u64,
    /// How it ended, once it is closed.
    pub ended: Ended,
}

/// How a connection ended, as the caller's kernel tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Both sides said that they were done.
    InOrder,
    /// One of the two broke off; which is not known.
    BrokenOff,
    /// It was never established.
    Unanswered,
}

impl Flow {
    fn of(raw: &RawStamp) -> Self {
        let at = |address: layout::Address, port| SocketAddrV4::new(Ipv4Addr::from(address), port);
        Self {
            caller: raw.caller,
            from: at(raw.caller_address, raw.caller_port),
            called: raw.called,
            to: at(raw.called_address, raw.called_port),
            opened: Duration::from_nanos(raw.opened_ns),
            closed: (raw.closed_ns != 0).then(|| Duration::from_nanos(raw.closed_ns)),
            // The SYN is acknowledged as a byte is.
            sent: raw.sent.saturating_sub(1),
            received: raw.received,
            ended: match raw.last_state {
                SYN_SENT => Ended::Unanswered,
                state if IN_ORDER.contains(&state) => Ended::InOrder,
                _ => Ended::BrokenOff,
            },
        }
    }
}

impl Kernel {
    /// Where a pod is, for [`Local`]: none where not exactly one wire leads to it. Call it in the namespace where the node's
    /// end is.
    pub fn place(&self, netns: BorrowedFd<'_>) -> Result<Option<Place>, KernelError> {
        let ways = crate::wire::ways_out(netns)?;
        let one = match ways.wires.as_slice() {
            [wire] if ways.open.is_none() => Some(Place { netns: ways.netns, device: wire.index }),
            _ => None,
        };
        Ok(one)
    }

    /// Says of which pods connections may go directly, and of no others: each guarded ([`Kernel::guard_wires`] and
    /// [`Kernel::attach_pod`]), and who it is said to be. What goes to or from a pod that is no longer among them stops. True
    /// where something else was said before.
    pub fn set_locals(&self, locals: &[Local]) -> Result<bool, KernelError> {
        let _change = self.lock();
        let map = &self.maps().locals;
        let failed = |e| KernelError::bpf("write map locals", e);
        let wanted: BTreeMap<Vec<u8>, Vec<u8>> = locals.iter().map(Local::row).collect();
        if wanted.len() > map.max_entries() as usize {
            return Err(KernelError::MapFull { map: "locals", capacity: map.max_entries(), needed: wanted.len() });
        }
        let found = map.lookup_batch(map.max_entries(), MapFlags::ANY, MapFlags::ANY);
        let found: BTreeMap<Vec<u8>, Vec<u8>> = found.map_err(|e| KernelError::bpf("read map locals", e))?.collect();
        for gone in found.keys().filter(|key| !wanted.contains_key(*key)) {
            map.delete(gone).map_err(failed)?;
        }
        for (key, value) in wanted.iter().filter(|(key, value)| found.get(*key) != Some(*value)) {
            map.update(key, value, MapFlags::ANY).map_err(failed)?;
        }
        Ok(found != wanted)
    }

    /// All connections that go directly, and that ended within the last minute. Lets as many more go directly as there is
    /// room for, and forgets those of which no packet can come any more: call it every second or so.
    pub fn direct_flows(&self) -> Result<Direct, KernelError> {
        let now = crate::sys::boot_time_ns().map_err(|e| KernelError::io("read the boot clock", e))?;
        let before = self.config(CONFIG_TOLD_NS)?;
        let rows = self.stamps()?;
        let mut stays = 0;
        for (key, raw) in &rows {
            // What closed since `now` is news next time.
            let is_closed = raw.closed_ns != 0 && raw.closed_ns < now;
            let is_over = is_closed
                && (raw.called_closed_ns != 0 || now.saturating_sub(raw.closed_ns) > LINGER.as_nanos() as u64);
            if !(is_over && self.forget(key, raw.opened_ns)?) {
                stays += 1;
            }
        }
        let capacity = self.maps().stamps.max_entries();
        let room = i64::from(capacity) - i64::from(capacity / SLACK) - stays;
        self.set_config(CONFIG_ROOM, room.max(0) as u64)?;
        self.set_config(CONFIG_TOLD_NS, now)?;
        let news = Duration::from_nanos(before)..Duration::from_nanos(now);
        Ok(Direct { news, flows: rows.iter().map(|(_, raw)| Flow::of(raw)).collect() })
    }

    /// Takes the stamps of these connections away: none of their packets passes any more. Their sockets are ended by
    /// [`Kernel::end_bypassing`] at both ends.
    pub fn cut_direct(&self, flows: &[Flow]) -> Result<(), KernelError> {
        // One that fails keeps no other.
        let forget = |flow: &Flow| self.forget(&stamp_key(flow.from, flow.to), flow.opened.as_nanos() as u64);
        let all: Vec<_> = flows.iter().map(forget).collect();
        all.into_iter().try_for_each(|one| one.map(drop))
    }

    /// Lets no new connection go directly until [`Kernel::set_locals`] says of which pods: what a former agent said may be
    /// old. Those that are open go on.
    pub fn close_direct(&self) -> Result<(), KernelError> {
        let _change = self.lock();
        let map = &self.maps().locals;
        for key in map.keys().take(map.max_entries() as usize) {
            let found = map.lookup(&key, MapFlags::ANY).map_err(|e| KernelError::bpf("read map locals", e))?;
            if let Some(local) = found.as_deref().and_then(RawLocal::from_bytes) {
                let closed = RawLocal { flags: local.flags & !OPEN, ..local };
                map.update(&key, &closed.to_bytes(), MapFlags::ANY)
                    .map_err(|e| KernelError::bpf("write map locals", e))?;
            }
        }
        Ok(())
    }

    /// As of the last look, and what came since.
    pub(crate) fn stamps_held(&self) -> Result<u32, KernelError> {
        if self.config(CONFIG_TOLD_NS)? == 0 {
            return Ok(0);
        }
        // The programs count it down, and may meet at its end.
        let room = self.config(CONFIG_ROOM)?.cast_signed();
        let capacity = self.maps().stamps.max_entries();
        Ok(u32::try_from(i64::from(capacity - capacity / SLACK) - room).unwrap_or_default().min(capacity))
    }

    fn stamps(&self) -> Result<Vec<(StampKey, RawStamp)>, KernelError> {
        let map = &self.maps().stamps;
        // All in one batch: the kernel ends one early before a bucket that does not fit, and libbpf-rs takes a short one for
        // the last. Before the first look nobody knows how many there are.
        let whole = map.max_entries().saturating_add(1);
        let batch = match self.config(CONFIG_TOLD_NS)? {
            0 => whole,
            _ => self.stamps_held()?.saturating_mul(2).saturating_add(GROWTH).min(whole),
        };
        let rows = map
            .lookup_batch(batch, MapFlags::ANY, MapFlags::ANY)
            .map_err(|e| KernelError::bpf("read map stamps", e))?;
        let parsed = rows.filter_map(|(key, value)| Some((StampKey::from_bytes(&key)?, RawStamp::from_bytes(&value)?)));
        Ok(parsed.take(map.max_entries() as usize).collect())
    }

    /// Whether it was this very stamp: its ports may have been used again meanwhile.
    fn forget(&self, key: &StampKey, opened_ns: u64) -> Result<bool, KernelError> {
        let (map, key) = (&self.maps().stamps, key.to_bytes());
        // Looked at first: of one that is deleted for a moment a close in that moment would be lost.
        let there = map.lookup(&key, MapFlags::ANY).map_err(|e| KernelError::bpf("read map stamps", e))?;
        match there.as_deref().and_then(RawStamp::from_bytes) {
            None => return Ok(true),
            Some(raw) if raw.opened_ns != opened_ns => return Ok(false),
            Some(_) => {}
        }
        let mut bytes = [0; RawStamp::SIZE];
        let found = map.lookup_into_and_delete(&key, &mut bytes);
        if !found.map_err(|e| KernelError::bpf("write map stamps", e))? {
            return Ok(true);
        }
        match RawStamp::from_bytes(&bytes) {
            Some(raw) if raw.opened_ns != opened_ns => {
                // Of its packets one or two went nowhere meanwhile, and are sent again.
                map.update(&key, &bytes, MapFlags::NO_EXIST).map_err(|e| KernelError::bpf("write map stamps", e))?;
                Ok(false)
            }
            _ => Ok(true),
        }
    }
}

fn stamp_key(a: SocketAddrV4, b: SocketAddrV4) -> StampKey {
    // As the programs compare them: as numbers that were read in network order.
    let number = |at: SocketAddrV4| u32::from_ne_bytes(at.ip().octets());
    let (lower, upper) = if number(a) < number(b) { (a, b) } else { (b, a) };
    StampKey {
        lower_address: layout::address(*lower.ip()),
        upper_address: layout::address(*upper.ip()),
        lower_port: lower.port(),
        upper_port: upper.port(),
    }
}
