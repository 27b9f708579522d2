//! How raft-rs reads the log.

use super::{Base, Codec, GROUP, LogStore};
use crate::store::Log;
use raft::eraftpb::{ConfState, Entry, Snapshot};
use raft::{GetEntriesContext, RaftState, Storage, StorageError};
use raft_engine::env::FileSystem;

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
        if low <= self.base.index {
            return Err(raft::Error::Store(StorageError::Compacted));
        }
        if high > self.last.index + 1 {
            return Err(raft::Error::Store(StorageError::Unavailable));
        }
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
        let missing = if index < self.base.index { StorageError::Compacted } else { StorageError::Unavailable };
        self.term_at(index).ok_or(raft::Error::Store(missing))
    }

    fn first_index(&self) -> raft::Result<u64> {
        Ok(self.base.index + 1)
    }

    fn last_index(&self) -> raft::Result<u64> {
        Ok(self.last.index)
    }

    fn snapshot(&self, request_index: u64, to: u64) -> raft::Result<Snapshot> {
        let usable = self.offer.borrow().as_ref().filter(|s| is_usable(s, request_index, self.base, to)).cloned();
        usable.ok_or_else(|| {
            self.wanted.set(true);
            raft::Error::Store(StorageError::SnapshotTemporarilyUnavailable)
        })
    }
}

/// Whether raft may send this snapshot to `to`. A receiver drops one whose members do not include it; entries after it must
/// still be in the log.
pub(in crate::store) fn is_usable(snapshot: &Snapshot, request_index: u64, base: Base, to: u64) -> bool {
    let meta = snapshot.get_metadata();
    let conf = meta.get_conf_state();
    meta.index >= request_index
        && meta.index >= base.index
        && (conf.voters.contains(&to) || conf.learners.contains(&to))
}
