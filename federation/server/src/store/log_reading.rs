//! How raft-rs reads the log.

use super::{Base, Codec, GROUP, LogStore};
use crate::store::Log;
use raft::eraftpb::{ConfState, Entry, Snapshot};
use raft::{GetEntriesContext, RaftState, Storage, StorageError};
use raft_engine::env::FileSystem;
use std::cell::{Cell, RefCell};

impl<F: FileSystem> Storage for LogStore<F> {
    fn initial_state(&self) -> raft::Result<RaftState> {
        let conf: ConfState = self.membership.conf_state();
        Ok(RaftState { hard_state: self.hard.clone(), conf_state: conf })
    }

    fn entries(
        &self,
        low: u64,
        high: u64,
        max_size: impl Into<Option<u64>>,
        _context: GetEntriesContext,
    ) -> raft::Result<Vec<Entry>> {
        held(self.base, self.last, low, high)?;
        let max_size = max_size.into();
        let mut out = match self.recent.front() {
            Some(front) if front.index <= low => {
                let from = (low - front.index) as usize;
                self.recent.iter().skip(from).take((high - low) as usize).cloned().collect()
            }
            _ => {
                let mut out = Vec::new();
                self.engine
                    .fetch_entries_to::<Codec>(GROUP, low, high, max_size.map(|m| m as usize), &mut out)
                    .map_err(|e| raft::Error::Store(StorageError::Other(e.into())))?;
                out
            }
        };
        raft::util::limit_size(&mut out, max_size);
        Ok(out)
    }

    fn term(&self, index: u64) -> raft::Result<u64> {
        self.term_at(index).ok_or_else(|| no_term(self.base, index))
    }

    fn first_index(&self) -> raft::Result<u64> {
        Ok(self.base.index + 1)
    }

    fn last_index(&self) -> raft::Result<u64> {
        Ok(self.last.index)
    }

    fn snapshot(&self, request_index: u64, to: u64) -> raft::Result<Snapshot> {
        self.offer.to(request_index, self.base, to)
    }
}

/// Refuses a reach of entries that the log does not hold whole; `high` is not in it.
pub(in crate::store) fn held(base: Base, last: Base, low: u64, high: u64) -> raft::Result<()> {
    if low <= base.index {
        return Err(raft::Error::Store(StorageError::Compacted));
    }
    if high > last.index + 1 {
        return Err(raft::Error::Store(StorageError::Unavailable));
    }
    Ok(())
}

/// Why the log knows no term at `index`.
pub(in crate::store) fn no_term(base: Base, index: u64) -> raft::Error {
    raft::Error::Store(if index < base.index { StorageError::Compacted } else { StorageError::Unavailable })
}

/// The snapshot for followers, while one is offered, and whether raft asked in vain.
#[derive(Debug, Default)]
pub(in crate::store) struct Offer {
    snapshot: RefCell<Option<Snapshot>>,
    wanted: Cell<bool>,
}

impl Offer {
    pub(in crate::store) fn make(&self, snapshot: Snapshot) {
        self.wanted.set(false);
        *self.snapshot.borrow_mut() = Some(snapshot);
    }
    pub(in crate::store) fn withdraw(&self) {
        *self.snapshot.borrow_mut() = None;
    }
    /// Asking clears it.
    pub(in crate::store) fn was_wanted(&self) -> bool {
        self.wanted.take()
    }
    pub(in crate::store) fn to(&self, request_index: u64, base: Base, to: u64) -> raft::Result<Snapshot> {
        let usable = self.snapshot.borrow().as_ref().filter(|s| is_usable(s, request_index, base, to)).cloned();
        usable.ok_or_else(|| {
            self.wanted.set(true);
            raft::Error::Store(StorageError::SnapshotTemporarilyUnavailable)
        })
    }
}

/// Whether raft may send this snapshot to `to`. A receiver drops one whose members do not include it; entries after it must
/// still be in the log.
fn is_usable(snapshot: &Snapshot, request_index: u64, base: Base, to: u64) -> bool {
    let meta = snapshot.get_metadata();
    let conf = meta.get_conf_state();
    meta.index >= request_index
        && meta.index >= base.index
        && (conf.voters.contains(&to) || conf.learners.contains(&to))
}
