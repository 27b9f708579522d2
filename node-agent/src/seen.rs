//! Who called whom, as this node saw it since it last told its cell: what a change of policy would break is planned on it.
//!
//! Told are identities, a port and the verdict, once for all such calls; addresses and bytes are in records (`record.rs`).

use crate::recent::Recent;
use ambit_model::SpiffeId;
use ambit_proto::v1;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// Of callers and called, ports and verdicts, so many are told at once; of more it is told that there were.
pub const FLOWS_MAX: usize = 2_048;

/// And so many bytes, of a message that may have four times as many.
const BYTES_MAX: usize = 1 << 20;
/// Beside its two names.
const ROW_BYTES: usize = 64;

/// Which end of a connection this node was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum End {
    /// The caller's.
    Calling,
    /// The called one's.
    Called,
}

type ByPort = BTreeMap<(u16, bool, End), u64>;

#[derive(Debug, Default)]
struct Table {
    by_pair: BTreeMap<SpiffeId, BTreeMap<SpiffeId, ByPort>>,
    /// Denied and allowed.
    flows: [usize; 2],
    bytes: [usize; 2],
    left_out: u64,
}

/// Cloning shares.
#[derive(Clone, Debug, Default)]
pub struct Seen(Arc<Mutex<Table>>, Recent);

impl Seen {
    /// The last ones, one by one.
    pub fn recent(&self) -> &Recent {
        &self.1
    }

    /// A connection was let through, or refused by policy.
    pub fn saw(&self, end: End, source: &SpiffeId, destination: &SpiffeId, port: u16, allowed: bool) {
        self.saw_many(end, source, destination, (port, allowed), 1);
    }

    /// The same of so many. A port of 0 is nobody's.
    pub fn saw_many(
        &self,
        end: End,
        source: &SpiffeId,
        destination: &SpiffeId,
        (port, allowed): (u16, bool),
        more: u64,
    ) {
        if port == 0 {
            return;
        }
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (port, allowed, end);
        let known = table.by_pair.get_mut(source).and_then(|called| called.get_mut(destination));
        // Nearly all are of a pair that was seen before: they cost no copy of its names.
        if let Some(times) = known.and_then(|ports| ports.get_mut(&key)) {
            *times = times.saturating_add(more);
            return;
        }
        // Who tries every port hides nobody who calls.
        let kind = usize::from(allowed);
        let bytes = source.as_str().len() + destination.as_str().len() + ROW_BYTES;
        if table.flows[kind] >= FLOWS_MAX / 2 || table.bytes[kind] + bytes > BYTES_MAX / 2 {
            table.left_out = table.left_out.saturating_add(more);
            return;
        }
        table.flows[kind] += 1;
        table.bytes[kind] += bytes;
        let called = table.by_pair.entry(source.clone()).or_default();
        called.entry(destination.clone()).or_default().insert(key, more);
    }

    /// What is to be told now, if anything; it is told once.
    pub fn take(&self) -> Option<v1::SeenFlows> {
        let table = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        let flows = table.by_pair.iter().flat_map(|(source, called)| {
            let of = move |(destination, ports): (&SpiffeId, &ByPort)| {
                let flow = |(&(port, allowed, end), &times): (&(u16, bool, End), &u64)| v1::SeenFlow {
                    source: source.to_string(),
                    destination: destination.to_string(),
                    port: port.into(),
                    allowed,
                    times,
                    last_ms: 0,
                    called: end == End::Called,
                    rule: String::new(),
                };
                ports.iter().map(flow).collect::<Vec<_>>()
            };
            called.iter().flat_map(of)
        });
        let told = v1::SeenFlows { flows: flows.collect(), left_out: table.left_out };
        (told != v1::SeenFlows::default()).then_some(told)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_is_told_once_with_how_often_it_was_and_no_more_than_there_is_room_for() {
        let (seen, id) = (Seen::default(), |name: &str| format!("spiffe://west/{name}").parse::<SpiffeId>().unwrap());
        assert_eq!(seen.take(), None);
        for (end, port, allowed) in [
            (End::Calling, 80, true),
            (End::Calling, 80, false),
            (End::Calling, 80, true),
            (End::Called, 80, true),
            (End::Calling, 0, true),
        ] {
            seen.saw(end, &id("web"), &id("db"), port, allowed);
        }
        let told = seen.clone().take().unwrap();
        let rows: Vec<_> = told.flows.iter().map(|f| (f.port, f.allowed, f.called, f.times)).collect();
        assert_eq!(rows, [(80, false, false, 1), (80, true, false, 2), (80, true, true, 1)]);
        assert_eq!((seen.take(), told.left_out), (None, 0));

        // Half of the room is for what is denied.
        let half = u16::try_from(FLOWS_MAX / 2).unwrap();
        (1..=half + 3).for_each(|port| seen.saw(End::Calling, &id("scan"), &id("db"), port, false));
        seen.saw(End::Calling, &id("scan"), &id("db"), 1, false);
        seen.saw(End::Calling, &id("web"), &id("db"), 80, true);
        let told = seen.take().unwrap();
        assert_eq!((told.flows.len(), told.left_out, told.flows[0].times), (usize::from(half) + 1, 3, 2));
        assert!(told.flows.iter().any(|flow| flow.source.ends_with("/web")));
        seen.saw(End::Calling, &id("web"), &id("db"), 9, true);
        assert_eq!(seen.take().unwrap().flows.len(), 1, "there is room again");

        // Of the longest names there is room for fewer.
        let long = id(&"a".repeat(2_000));
        (1..=half).for_each(|port| seen.saw(End::Called, &long, &long, port, true));
        let told = seen.take().unwrap();
        assert!(prost::Message::encoded_len(&told) < BYTES_MAX && told.left_out > 0, "{}", told.flows.len());
    }
}
