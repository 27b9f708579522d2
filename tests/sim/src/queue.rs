//! What happens when: one order for all events.

use crate::client::OpId;
use crate::cosigning::{Asked, Said};
use crate::peering::Letter;
use crate::plan::Micros;
use ambit_model::Stamp;
use ambit_state::LogEntry;
use bytes::Bytes;
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// What happens at a moment.
pub(crate) enum Event {
    Run(u64),
    Frame { to: u64, from: u64, incarnation: u64, clock: Stamp, messages: Vec<Bytes> },
    Forward { to: u64, from: u64, life: u64, op: OpId, entry: Box<LogEntry> },
    Answer { to: u64, life: u64, op: OpId, outcome: Result<u64, ()> },
    SnapshotLost { from: u64, to: u64 },
    Start(u64),
    Client(usize),
    Fault(crate::faults::Kind),
    Mend,
    Letter(Box<Letter>),
    CoSign { to: u64, asked: Box<Asked> },
    CoSigned { to: u64, said: Box<Said> },
}

/// Ordered by time, then by when it was set: equal moments have one order.
struct Due<E>(Micros, u64, E);

impl<E> PartialEq for Due<E> {
    fn eq(&self, other: &Due<E>) -> bool {
        (self.0, self.1) == (other.0, other.1)
    }
}
impl<E> Eq for Due<E> {}
impl<E> PartialOrd for Due<E> {
    fn partial_cmp(&self, other: &Due<E>) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl<E> Ord for Due<E> {
    fn cmp(&self, other: &Due<E>) -> std::cmp::Ordering {
        (self.0, self.1).cmp(&(other.0, other.1))
    }
}

/// Events to come.
pub(crate) struct Queue<E> {
    heap: BinaryHeap<Reverse<Due<E>>>,
    set: u64,
}

impl<E> Queue<E> {
    pub(crate) fn new() -> Queue<E> {
        Queue { heap: BinaryHeap::new(), set: 0 }
    }
    pub(crate) fn push(&mut self, at: Micros, event: E) {
        self.set += 1;
        self.heap.push(Reverse(Due(at, self.set, event)));
    }
    /// When something happens next.
    pub(crate) fn next(&self) -> Option<Micros> {
        self.heap.peek().map(|Reverse(due)| due.0)
    }
    pub(crate) fn pop(&mut self) -> Option<(Micros, E)> {
        self.heap.pop().map(|Reverse(Due(at, _, event))| (at, event))
    }
}
