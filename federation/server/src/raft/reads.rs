//! Linearizable reads in batches: all who ask while nothing is on its way share one quorum round.
//!
//! raft drops a read silently when there is no leader, or none of its term committed yet (raft-rs, as etcd): each batch
//! has its own unique context and is asked again under a new one.

use std::collections::VecDeque;
use std::time::{Duration, Instant};
use tokio::sync::oneshot;

/// A batch without a confirmation is asked again after this: two heartbeats.
const RETRY_AFTER: Duration = Duration::from_millis(100);
/// Batches that wait for a quorum.
const BATCHES_MAX: usize = 1024;
/// Callers in one batch.
const CALLERS_MAX: usize = 4096;

type Caller = oneshot::Sender<u64>;

struct Batch {
    context: Vec<u8>,
    asked: Instant,
    /// Known once a quorum confirmed; then it waits for the state to get there.
    index: Option<u64>,
    callers: Vec<Caller>,
}

/// All reads of this replica that are not answered yet. A caller whose sender is dropped answers `busy`.
pub(super) struct Reads {
    replica: u64,
    incarnation: u64,
    made: u64,
    new: Vec<Caller>,
    batches: VecDeque<Batch>,
}

impl Reads {
    pub(super) fn new(replica: u64, incarnation: u64) -> Self {
        Self { replica, incarnation, made: 0, new: Vec::new(), batches: VecDeque::new() }
    }

    pub(super) fn add(&mut self, caller: Caller) {
        if self.new.len() < CALLERS_MAX {
            self.new.push(caller);
        }
    }

    /// The context of a batch to be confirmed, if anyone waits for one.
    pub(super) fn ask(&mut self, now: Instant) -> Option<Vec<u8>> {
        for batch in &mut self.batches {
            batch.callers.retain(|c| !c.is_closed());
        }
        self.batches.retain(|b| !b.callers.is_empty());
        let overdue = |b: &Batch| b.index.is_none() && now.duration_since(b.asked) >= RETRY_AFTER;
        while let Some(at) = self.batches.iter().position(overdue) {
            // A confirmation of its old context that still comes finds no batch.
            self.new.extend(self.batches.remove(at).into_iter().flat_map(|b| b.callers));
        }
        // While a round is on its way, who comes waits for the next: rounds of a few callers each would cost a quorum of
        // messages for every few.
        if self.new.is_empty() || self.batches.iter().any(|b| b.index.is_none()) {
            return None;
        }
        if self.batches.len() >= BATCHES_MAX {
            self.new.clear();
            return None;
        }
        self.made += 1;
        // Unique in the cell and across restarts: a leader keys its confirmations by it.
        let context = [self.replica, self.incarnation, self.made].map(u64::to_le_bytes).concat();
        let callers = std::mem::take(&mut self.new);
        self.batches.push_back(Batch { context: context.clone(), asked: now, index: None, callers });
        Some(context)
    }

    /// A quorum confirmed the leader at `index` after the batch was asked.
    pub(super) fn confirm(&mut self, context: &[u8], index: u64) {
        if let Some(batch) = self.batches.iter_mut().find(|b| b.context == context) {
            batch.index = Some(index);
        }
    }

    /// Answers all whose index the state has reached.
    pub(super) fn finish(&mut self, applied: u64) {
        let reached = |b: &Batch| b.index.is_some_and(|i| i <= applied);
        while let Some(at) = self.batches.iter().position(reached) {
            for caller in self.batches.remove(at).into_iter().flat_map(|b| b.callers) {
                let _ = caller.send(applied);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_read_is_asked_again_and_answered_once_the_state_is_there() {
        let mut reads = Reads::new(1, 1);
        let start = Instant::now();
        let (caller, mut answer) = oneshot::channel();
        reads.add(caller);
        let first = reads.ask(start).unwrap();
        assert_eq!(reads.ask(start + RETRY_AFTER / 2), None);
        let second = reads.ask(start + RETRY_AFTER).unwrap();
        assert_ne!(first, second);
        reads.confirm(&first, 3);
        reads.finish(9);
        assert!(answer.try_recv().is_err(), "answered by a context that was given up");
        reads.confirm(&second, 10);
        reads.finish(9);
        assert!(answer.try_recv().is_err(), "answered before the state was there");
        reads.finish(10);
        assert_eq!(answer.try_recv().unwrap(), 10);
    }

    #[test]
    fn callers_that_left_are_not_asked_for() {
        let mut reads = Reads::new(1, 1);
        let start = Instant::now();
        reads.add(oneshot::channel().0);
        reads.ask(start).unwrap();
        assert_eq!(reads.ask(start + RETRY_AFTER), None);
    }
}
