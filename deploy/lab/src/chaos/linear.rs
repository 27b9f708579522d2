//! Whether the history of one register is linearizable: whether each operation can be given one instant between its
//! call and its answer such that every read shows the write before it. Pure.
//!
//! The search is Wing and Gong's, in Lowe's just-in-time form (Testing for Linearizability, 2017): events are taken in
//! order of time, and an operation is put in its place only when its answer demands it. What is remembered is the set
//! of states that are still possible, each a value and those operations under way that have had their effect. So memory
//! is bound by what is under way at once, not by the length of the history.
//!
//! A write without an answer may take effect at any time after its call, or never. One that nobody ever read can be left
//! out: whatever explains the history with it explains it without. One that was read had its effect before the first
//! answer that shows it. That is exact where no two writes have the same value; else such a write stays open to the end.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::Range;

/// Operations under way at once on one register: far more than clients.
const UNDER_WAY_MAX: usize = 64;
/// States that are possible at once. Past them the history is not judged, and that is told.
const STATES_MAX: usize = 1 << 18;

/// What was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Did {
    /// This value was written.
    Write(u64),
    /// This value was read; none where the register was not there yet.
    Read(Option<u64>),
}

/// One operation of one client. Times are of one clock; they may be wider than the truth, never narrower.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Op {
    /// Sent, microseconds.
    pub call_us: u64,
    /// Answered, microseconds. None of a write: nobody knows whether it took effect. None of a read: it says nothing.
    pub back_us: Option<u64>,
    /// By whom, for whoever reads an explanation.
    pub client: u32,
    /// What.
    pub did: Did,
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let did = match self.did {
            Did::Write(value) => format!("wrote {value}"),
            Did::Read(Some(value)) => format!("read  {value}"),
            Did::Read(None) => "read  nothing".to_owned(),
        };
        let seconds = |us: u64| format!("{}.{:06}", us / 1_000_000, us % 1_000_000);
        let back = self.back_us.map_or_else(|| "never answered".to_owned(), |us| format!("answered {}", seconds(us)));
        write!(f, "client {:<3} {did:<14} called {:>12}  {back}", self.client, seconds(self.call_us))
    }
}

/// The judgement of one history.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// There is such an order.
    Linearizable,
    /// There is none. These few operations show it by themselves, in order of their calls.
    Not(Vec<Op>),
    /// Too much was possible at once to tell.
    Undecided,
}

/// Judges the history of one register that is not there at first. The order of `ops` does not matter.
pub fn check(ops: &[Op]) -> Verdict {
    match search(ops) {
        Outcome::Ordered => Verdict::Linearizable,
        Outcome::TooMuch => Verdict::Undecided,
        Outcome::Stuck(at_us) => {
            // Whatever was called later has no part in it.
            let before: Vec<Op> = ops.iter().filter(|op| op.call_us <= at_us).copied().collect();
            Verdict::Not(shrink(before))
        }
    }
}

enum Outcome {
    Ordered,
    /// At this answer nothing was possible any more.
    Stuck(u64),
    TooMuch,
}

/// A value, and which of the operations under way (by place) have had their effect.
type Possible = (Option<u64>, u64);

#[derive(Clone, Copy)]
enum Event {
    Call(usize),
    Back(usize),
}

fn search(ops: &[Op]) -> Outcome {
    let ops = closed(ops);
    let mut events: Vec<(u64, bool, usize)> = Vec::with_capacity(ops.len() * 2);
    for (n, op) in ops.iter().enumerate() {
        events.push((op.call_us, false, n));
        events.extend(op.back_us.map(|back| (back, true, n)));
    }
    // At the same instant calls come first: operations that touch count as overlapping.
    events.sort_unstable();
    let mut under_way = UnderWay { places: [None; UNDER_WAY_MAX] };
    let mut possible: BTreeSet<Possible> = BTreeSet::from([(None, 0)]);
    for (at_us, back, n) in events {
        let event = if back { Event::Back(n) } else { Event::Call(n) };
        match event {
            Event::Call(n) => {
                if !under_way.enter(n, ops[n].did) {
                    return Outcome::TooMuch;
                }
                possible = possible.into_iter().map(|state| under_way.with_reads(state)).collect();
            }
            Event::Back(n) => {
                let Some(next) = under_way.answer(&possible, n) else { return Outcome::TooMuch };
                if next.is_empty() {
                    return Outcome::Stuck(at_us);
                }
                possible = next;
            }
        }
    }
    Outcome::Ordered
}

/// The same history without what has no say, and with an end for each write whose end can be told.
fn closed(ops: &[Op]) -> Vec<Op> {
    let mut writes: BTreeMap<u64, usize> = BTreeMap::new();
    let mut first_read: BTreeMap<u64, u64> = BTreeMap::new();
    for op in ops {
        match (op.did, op.back_us) {
            (Did::Write(value), _) => *writes.entry(value).or_default() += 1,
            (Did::Read(Some(value)), Some(back)) => {
                let first = first_read.entry(value).or_insert(back);
                *first = back.min(*first);
            }
            (Did::Read(_), _) => {}
        }
    }
    let close = |op: &Op| match (op.did, op.back_us) {
        (Did::Read(_), None) => None,
        (Did::Write(value), None) if writes.get(&value) == Some(&1) => {
            // A read that ended before the call fails by itself.
            first_read.get(&value).map(|back| Op { back_us: Some(op.call_us.max(*back)), ..*op })
        }
        (Did::Write(_) | Did::Read(_), _) => Some(*op),
    };
    ops.iter().filter_map(close).collect()
}

/// The operations under way, each at a place of its own.
struct UnderWay {
    places: [Option<(usize, Did)>; UNDER_WAY_MAX],
}

impl UnderWay {
    fn enter(&mut self, n: usize, did: Did) -> bool {
        match self.places.iter_mut().find(|place| place.is_none()) {
            Some(place) => {
                *place = Some((n, did));
                true
            }
            None => false,
        }
    }
    /// A read that fits takes effect at once: it changes nothing, and waiting could only spoil it.
    fn with_reads(&self, (value, mut done): Possible) -> Possible {
        for (place, op) in self.places.iter().enumerate() {
            if matches!(op, Some((_, Did::Read(read))) if *read == value) {
                done |= 1 << place;
            }
        }
        (value, done)
    }
    /// All that is possible once operation `n` has had its effect, which then leaves. None where that is too much.
    fn answer(&mut self, possible: &BTreeSet<Possible>, n: usize) -> Option<BTreeSet<Possible>> {
        let own = self.places.iter().position(|op| matches!(op, Some((m, _)) if *m == n))?;
        let mut next = BTreeSet::new();
        let mut seen = possible.clone();
        let mut open: Vec<Possible> = possible.iter().copied().collect();
        while let Some((value, done)) = open.pop() {
            if done & (1 << own) != 0 {
                next.insert((value, done & !(1 << own)));
                continue;
            }
            for (place, op) in self.places.iter().enumerate() {
                let Some((_, Did::Write(written))) = op else { continue };
                if done & (1 << place) == 0 {
                    let state = self.with_reads((Some(*written), done | 1 << place));
                    if seen.insert(state) {
                        open.push(state);
                    }
                }
            }
            if seen.len() > STATES_MAX {
                return None;
            }
        }
        if let Some(place) = self.places.get_mut(own) {
            *place = None;
        }
        Some(next)
    }
}

/// Drops what the violation does not need, in halves, quarters and so on. Dropping a read, or a write that no read left
/// shows, never makes a good history bad, so what remains bad is so by itself.
fn shrink(mut ops: Vec<Op>) -> Vec<Op> {
    ops.sort_unstable();
    let mut size = ops.len().div_ceil(2);
    while size > 0 {
        let mut from = 0;
        while from < ops.len() {
            let left = without(&ops, from..(from + size).min(ops.len()));
            if matches!(search(&left), Outcome::Stuck(_)) {
                ops = left;
            } else {
                from += size;
            }
        }
        size = if size == 1 { 0 } else { size.div_ceil(2) };
    }
    ops
}

/// Without these operations, and without the reads that show a write among them.
fn without(ops: &[Op], dropped: Range<usize>) -> Vec<Op> {
    let gone: BTreeSet<Did> = ops.get(dropped.clone()).unwrap_or_default().iter().map(|op| op.did).collect();
    let shown = |op: &Op| match op.did {
        Did::Read(Some(value)) => !gone.contains(&Did::Write(value)),
        Did::Read(None) | Did::Write(_) => true,
    };
    let left = ops.iter().enumerate().filter(|(n, op)| !dropped.contains(n) && shown(op));
    left.map(|(_, op)| *op).collect()
}

#[cfg(test)]
#[path = "linear_tests.rs"]
mod tests;
