//! Who called whom, as this node saw it since it last told its cell: what a change of policy would break is planned on it.
//!
//! Told are identities, a port and the verdict, once for all such calls; addresses and bytes are in records (`record.rs`).

use ambit_model::SpiffeId;
use ambit_proto::v1;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// Of callers and called, ports and verdicts, so many are told at once; of more it is told that there were.
pub const FLOWS_MAX: usize = 2_048;

type ByPort = BTreeMap<(u16, bool), u64>;

#[derive(Debug, Default)]
struct Table {
    by_pair: BTreeMap<SpiffeId, BTreeMap<SpiffeId, ByPort>>,
    flows: usize,
    left_out: u64,
}

/// Cloning shares.
#[derive(Clone, Debug, Default)]
pub struct Seen(Arc<Mutex<Table>>);

impl Seen {
    /// A connection was let through, or refused by policy.
    pub fn saw(&self, source: &SpiffeId, destination: &SpiffeId, port: u16, allowed: bool) {
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let known = table.by_pair.get_mut(source).and_then(|called| called.get_mut(destination));
        // Nearly all are of a pair that was seen before: they cost no copy of its names.
        if let Some(times) = known.and_then(|ports| ports.get_mut(&(port, allowed))) {
            *times = times.saturating_add(1);
            return;
        }
        if table.flows >= FLOWS_MAX {
            table.left_out = table.left_out.saturating_add(1);
            return;
        }
        table.flows += 1;
        let called = table.by_pair.entry(source.clone()).or_default();
        called.entry(destination.clone()).or_default().insert((port, allowed), 1);
    }

    /// What is to be told now, if anything; it is told once.
    pub fn take(&self) -> Option<v1::SeenFlows> {
        let table = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        let flows = table.by_pair.iter().flat_map(|(source, called)| {
            let of = move |(destination, ports): (&SpiffeId, &ByPort)| {
                let flow = |(&(port, allowed), &times): (&(u16, bool), &u64)| v1::SeenFlow {
                    source: source.to_string(),
                    destination: destination.to_string(),
                    port: port.into(),
                    allowed,
                    times,
                    last_ms: 0,
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
        for (port, allowed) in [(80, true), (80, false), (80, true), (81, true)] {
            seen.saw(&id("web"), &id("db"), port, allowed);
        }
        let told = seen.clone().take().unwrap();
        let rows: Vec<_> = told.flows.iter().map(|f| (f.source.as_str(), f.port, f.allowed, f.times)).collect();
        assert_eq!(
            rows,
            [
                ("spiffe://west/web", 80, false, 1),
                ("spiffe://west/web", 80, true, 2),
                ("spiffe://west/web", 81, true, 1)
            ]
        );
        assert_eq!((seen.take(), told.left_out), (None, 0));
        for port in 0..u16::try_from(FLOWS_MAX).unwrap() + 3 {
            seen.saw(&id("web"), &id("db"), port, true);
        }
        seen.saw(&id("web"), &id("db"), 0, true);
        let told = seen.take().unwrap();
        assert_eq!((told.flows.len(), told.left_out, told.flows[0].times), (FLOWS_MAX, 3, 2));
        seen.saw(&id("web"), &id("db"), 9, true);
        assert_eq!(seen.take().unwrap().flows.len(), 1, "there is room again");
    }
}
