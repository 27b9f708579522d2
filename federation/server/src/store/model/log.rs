//! The log: what the process knows of it, beside what is on disk.

use super::ModelDisk;
use super::fault::{Target, Written};
use crate::store::disk::hard_after;
use crate::store::log::{Base, Batch, Offer, SyncTime, held, no_term};
use crate::store::{FlushReceipt, Log, Membership, StoreError};
use bytes::Bytes;
use raft::eraftpb::{self, Entry, HardState};
use raft::{GetEntriesContext, RaftState, Storage};
use std::collections::VecDeque;

/// The log of a [`ModelDisk`], open: what the process knows beside what is on disk.
#[derive(Debug)]
pub struct ModelLog {
    disk: ModelDisk,
    incarnation: u64,
    base: Base,
    entries: VecDeque<Entry>,
    hard: HardState,
    /// What this process compacted away, for whoever watches it: an entry may be applied and compacted at once.
    compacted: VecDeque<Entry>,
    membership: Membership,
    offer: Offer,
}

/// Compacted entries that can still be watched.
const COMPACTED_MAX: usize = 4_096;

fn append(log: &mut VecDeque<Entry>, entries: &[Entry]) {
    if let Some(first) = entries.first() {
        while log.back().is_some_and(|e| e.index >= first.index) {
            log.pop_back();
        }
    }
    log.extend(entries.iter().cloned());
}

/// What an entry takes beside its command, about.
const ENTRY_BYTES: usize = 32;
/// What a hard state or a base takes, about.
const HARD_BYTES: usize = 64;

impl ModelLog {
    pub(super) fn new(
        disk: ModelDisk,
        incarnation: u64,
        base: Base,
        entries: VecDeque<Entry>,
        hard: HardState,
    ) -> Self {
        Self {
            disk,
            incarnation,
            base,
            entries,
            hard,
            compacted: VecDeque::new(),
            membership: Membership::default(),
            offer: Offer::default(),
        }
    }

    /// Term and command of an entry, also of one compacted lately; no command where it is raft's own.
    pub fn command(&self, index: u64) -> Option<(u64, Option<Bytes>)> {
        let entry = self.entry(index).or_else(|| self.compacted.iter().rev().find(|e| e.index == index))?;
        let is_command = entry.get_entry_type() == eraftpb::EntryType::EntryNormal && !entry.data.is_empty();
        Some((entry.term, is_command.then(|| entry.data.clone())))
    }

    fn entry(&self, index: u64) -> Option<&Entry> {
        let at = index.checked_sub(self.base.index + 1)?;
        self.entries.get(usize::try_from(at).ok()?)
    }
}

impl Log for ModelLog {
    fn incarnation(&self) -> u64 {
        self.incarnation
    }
    fn base(&self) -> Base {
        self.base
    }
    fn last(&self) -> Base {
        self.entries.back().map_or(self.base, |e| Base { index: e.index, term: e.term })
    }
    fn term_at(&self, index: u64) -> Option<u64> {
        if index == self.base.index { Some(self.base.term) } else { self.entry(index).map(|e| e.term) }
    }
    fn start_from(&mut self, applied: u64, membership: Membership) {
        self.membership = membership;
        self.hard.commit = self.hard.commit.max(applied);
    }

    fn persist(&mut self, work: Batch) -> Result<FlushReceipt, StoreError> {
        {
            let mut disk = self.disk.0.borrow_mut();
            let nothing = work.entries.is_empty() && work.hard_state.is_none();
            let bytes = HARD_BYTES + work.entries.iter().map(|e| ENTRY_BYTES + e.data.len()).sum::<usize>();
            let written = if nothing { Written::Well } else { disk.strike(Target::Log, bytes)? };
            append(&mut disk.entries, &work.entries);
            if let Some(hard) = &work.hard_state {
                if work.must_sync {
                    disk.hard = hard.clone();
                    disk.unsynced.clear();
                } else {
                    disk.unsynced.push(hard.clone());
                }
            } else if work.must_sync
                && let Some(hard) = disk.unsynced.pop()
            {
                disk.hard = hard;
                disk.unsynced.clear();
            }
            if work.must_sync || written != Written::Well {
                disk.done(written)?;
            }
        }
        append(&mut self.entries, &work.entries);
        if let Some(hard) = work.hard_state {
            self.hard = hard;
        }
        Ok(FlushReceipt::of(work.number))
    }

    fn install(&mut self, base: Base) -> Result<(), StoreError> {
        let hard = hard_after(&self.hard, base);
        let mut disk = self.disk.0.borrow_mut();
        let written = disk.strike(Target::Log, HARD_BYTES)?;
        (disk.base, disk.hard) = (base, hard.clone());
        disk.entries.clear();
        disk.unsynced.clear();
        disk.done(written)?;
        (self.base, self.hard) = (base, hard);
        self.entries.clear();
        Ok(())
    }

    fn compact(&mut self, index: u64) -> Result<(), StoreError> {
        if index <= self.base.index || index > self.last().index {
            return Ok(());
        }
        let base = Base { index, term: self.term_at(index).unwrap_or_default() };
        let mut disk = self.disk.0.borrow_mut();
        let written = disk.strike(Target::Log, HARD_BYTES)?;
        disk.base = base;
        while disk.entries.front().is_some_and(|e| e.index <= index) {
            disk.entries.pop_front();
        }
        disk.done(written)?;
        self.base = base;
        while self.entries.front().is_some_and(|e| e.index <= index) {
            self.compacted.extend(self.entries.pop_front());
        }
        while self.compacted.len() > COMPACTED_MAX {
            self.compacted.pop_front();
        }
        Ok(())
    }

    fn offer(&self, snapshot: eraftpb::Snapshot) {
        self.offer.make(snapshot);
    }
    fn withdraw(&self) {
        self.offer.withdraw();
    }
    fn snapshot_wanted(&self) -> bool {
        self.offer.was_wanted()
    }
    fn sync_time(&self) -> SyncTime {
        SyncTime::default()
    }
}

impl Storage for ModelLog {
    fn initial_state(&self) -> raft::Result<RaftState> {
        Ok(RaftState { hard_state: self.hard.clone(), conf_state: self.membership.conf_state() })
    }

    fn entries(
        &self,
        low: u64,
        high: u64,
        max_size: impl Into<Option<u64>>,
        _context: GetEntriesContext,
    ) -> raft::Result<Vec<Entry>> {
        held(self.base, self.last(), low, high)?;
        let from = usize::try_from(low - self.base.index - 1).unwrap_or(usize::MAX);
        let count = usize::try_from(high - low).unwrap_or(usize::MAX);
        let mut out: Vec<Entry> = self.entries.iter().skip(from).take(count).cloned().collect();
        raft::util::limit_size(&mut out, max_size.into());
        Ok(out)
    }

    fn term(&self, index: u64) -> raft::Result<u64> {
        self.term_at(index).ok_or_else(|| no_term(self.base, index))
    }

    fn first_index(&self) -> raft::Result<u64> {
        Ok(self.base.index + 1)
    }

    fn last_index(&self) -> raft::Result<u64> {
        Ok(self.last().index)
    }

    fn snapshot(&self, request_index: u64, to: u64) -> raft::Result<eraftpb::Snapshot> {
        self.offer.to(request_index, self.base, to)
    }
}
