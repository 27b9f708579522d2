//! A disk in memory with the faults of real ones, by the contract of [`super::disk`]: what the simulator runs replicas on.
//!
//! That real stores keep the contract is for tests on real files to show; this says what a replica must withstand.

use super::log::{Base, Batch, SyncTime};
use super::snapshot::{self, Snapshot};
use super::tables::{Applied, Stored};
use super::{Disk, FlushReceipt, Log, Membership, Rows, Snapshots, StoreError, Writing};
use ambit_state::TableWrite;
use bytes::Bytes;
use raft::eraftpb::{self, Entry, HardState};
use raft::{GetEntriesContext, RaftState, Storage, StorageError};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::rc::Rc;

/// Chance, as the disk asks for it: a number below the one given.
pub type Roll<'a> = &'a mut dyn FnMut(u64) -> u64;

/// What happens at the next write of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The process dies before anything reached the disk, or in a write that its checksum will cut.
    DieBefore,
    /// The process dies after all of it reached the disk and before anyone knows.
    DieAfter,
    /// The sync fails; what is on disk is in doubt.
    SyncError,
    /// No room, from now on until [`ModelDisk::make_good`].
    Full,
}

/// What may be wrong with a part of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Checksums of the log fail.
    Log,
    /// Checksums of the snapshot fail.
    Snapshot,
    /// Checksums of the rows fail.
    Rows,
}

/// One replica's disk; clones are the same disk. It outlives the process.
#[derive(Clone, Debug, Default)]
pub struct ModelDisk(Rc<RefCell<Inner>>);

#[derive(Debug, Default)]
struct Inner {
    replica: Option<u64>,
    incarnation: u64,
    base: Base,
    entries: VecDeque<Entry>,
    hard: HardState,
    /// Written without a sync: the last of them is the newest, and any number of them may be lost.
    unsynced: Vec<HardState>,
    snapshot: Option<Vec<u8>>,
    rows: Option<StoredRows>,
    /// What a power loss leaves of the rows at least, if anything.
    rows_kept: Option<StoredRows>,
    damaged: Vec<Part>,
    fault: Option<Fault>,
    full: bool,
    dead: bool,
    syncs: u64,
}

#[derive(Clone, Debug)]
struct StoredRows {
    applied: Applied,
    rows: BTreeMap<(u8, Vec<u8>), Vec<u8>>,
}

impl ModelDisk {
    /// Arms a fault for the next write of the log.
    pub fn arm(&self, fault: Fault) {
        self.0.borrow_mut().fault = Some(fault);
    }

    /// Ends [`Fault::Full`], and whatever is armed.
    pub fn make_good(&self) {
        let mut disk = self.0.borrow_mut();
        (disk.full, disk.fault) = (false, None);
    }

    /// Whether a fault ended the process that wrote: it must do nothing more.
    pub fn is_dead(&self) -> bool {
        self.0.borrow().dead
    }

    /// Damages a part, if it is there.
    pub fn damage(&self, part: Part) -> bool {
        let mut disk = self.0.borrow_mut();
        let there = match part {
            Part::Log => disk.replica.is_some(),
            Part::Snapshot => disk.snapshot.is_some(),
            Part::Rows => disk.rows.is_some(),
        };
        if there {
            disk.damaged.push(part);
        }
        there
    }

    /// Everything is gone.
    pub fn lose(&self) {
        *self.0.borrow_mut() = Inner::default();
    }

    /// The process and the machine's memory are gone: what was not synced is lost in part, as chance will have it.
    pub fn crash(&self, roll: Roll<'_>) {
        let mut disk = self.0.borrow_mut();
        (disk.fault, disk.dead) = (None, false);
        let kept = roll(disk.unsynced.len() as u64 + 1) as usize;
        if let Some(hard) = kept.checked_sub(1).and_then(|last| disk.unsynced.get(last)).cloned() {
            disk.hard = hard;
        }
        disk.unsynced.clear();
        match roll(4) {
            0 => {}
            1 => disk.rows = None,
            2 if disk.rows.is_some() => disk.damaged.push(Part::Rows),
            _ => disk.rows = disk.rows_kept.clone(),
        }
    }

    /// Syncs so far.
    pub fn syncs(&self) -> u64 {
        self.0.borrow().syncs
    }

    /// Another disk with the same contents.
    pub fn copied(&self) -> ModelDisk {
        let disk = self.0.borrow();
        ModelDisk(Rc::new(RefCell::new(Inner {
            replica: disk.replica,
            incarnation: disk.incarnation,
            base: disk.base,
            entries: disk.entries.clone(),
            hard: disk.hard.clone(),
            unsynced: disk.unsynced.clone(),
            snapshot: disk.snapshot.clone(),
            rows: disk.rows.clone(),
            rows_kept: disk.rows_kept.clone(),
            ..Inner::default()
        })))
    }

    /// How often the store was opened.
    pub fn incarnation(&self) -> u64 {
        self.0.borrow().incarnation
    }
}

fn place() -> PathBuf {
    PathBuf::from("the model disk")
}

fn io_error(what: &'static str, kind: std::io::ErrorKind) -> StoreError {
    StoreError::Io { what, path: place(), source: kind.into() }
}

impl Inner {
    fn is_damaged(&self, part: Part) -> bool {
        self.damaged.contains(&part)
    }

    fn repair(&mut self, part: Part) {
        self.damaged.retain(|damaged| *damaged != part);
    }

    /// What becomes of the next write. `Ok(true)` where it reaches the disk and the process dies all the same.
    fn strike(&mut self) -> Result<bool, StoreError> {
        let died = || io_error("the process died writing", std::io::ErrorKind::Interrupted);
        if self.dead {
            return Err(died());
        }
        let fault = self.fault.take();
        self.full |= fault == Some(Fault::Full);
        if self.full {
            self.dead = true;
            return Err(io_error("writing", std::io::ErrorKind::StorageFull));
        }
        match fault {
            Some(Fault::DieBefore) => {
                self.dead = true;
                Err(died())
            }
            Some(Fault::SyncError) => {
                self.dead = true;
                Err(io_error("syncing", std::io::ErrorKind::Other))
            }
            Some(Fault::DieAfter) => Ok(true),
            Some(Fault::Full) | None => Ok(false),
        }
    }

    fn done(&mut self, dies: bool) -> Result<(), StoreError> {
        self.syncs += 1;
        if dies {
            self.dead = true;
            return Err(io_error("the process died after writing", std::io::ErrorKind::Interrupted));
        }
        Ok(())
    }

    fn last(&self) -> Base {
        self.entries.back().map_or(self.base, |e| Base { index: e.index, term: e.term })
    }
}

impl Disk for ModelDisk {
    type Log = ModelLog;
    type Rows = ModelRows;
    type Snapshots = ModelSnapshots;

    fn refuse_existing(&self) -> Result<(), StoreError> {
        let disk = self.0.borrow();
        if disk.replica.is_some() || disk.rows.is_some() { Err(StoreError::Exists(place())) } else { Ok(()) }
    }

    fn create_log(&self, replica: u64) -> Result<(), StoreError> {
        let mut disk = self.0.borrow_mut();
        if disk.replica.is_some() {
            return Err(StoreError::Exists(place()));
        }
        disk.replica = Some(replica);
        Ok(())
    }

    fn open_log(&self, replica: u64) -> Result<ModelLog, StoreError> {
        let mut disk = self.0.borrow_mut();
        let found = disk.replica.ok_or_else(|| StoreError::Missing(place()))?;
        if found != replica {
            return Err(StoreError::OtherReplica { expected: replica, found });
        }
        if disk.is_damaged(Part::Log) {
            return Err(StoreError::damaged("the log", "a checksum that fails"));
        }
        let dies = disk.strike()?;
        disk.incarnation += 1;
        disk.done(dies)?;
        if disk.hard.commit > disk.last().index || disk.hard.term < disk.last().term {
            let found = format!("{:?}, and the log ends at {:?}", disk.hard, disk.last());
            return Err(StoreError::damaged("the log", found));
        }
        Ok(ModelLog {
            disk: self.clone(),
            incarnation: disk.incarnation,
            base: disk.base,
            entries: disk.entries.clone(),
            hard: disk.hard.clone(),
            compacted: VecDeque::new(),
            membership: Membership::default(),
            offer: RefCell::new(None),
            wanted: Cell::new(false),
        })
    }

    fn open_snapshots(&self) -> Result<ModelSnapshots, StoreError> {
        Ok(ModelSnapshots(self.clone()))
    }

    fn forget_snapshot(&self) -> Result<(), StoreError> {
        let mut disk = self.0.borrow_mut();
        disk.snapshot = None;
        disk.repair(Part::Snapshot);
        Ok(())
    }

    fn open_rows(&self, _expected: bool) -> Result<(ModelRows, Option<Stored>), StoreError> {
        let mut disk = self.0.borrow_mut();
        if disk.is_damaged(Part::Rows) {
            // Moved aside.
            disk.repair(Part::Rows);
            (disk.rows, disk.rows_kept) = (None, None);
        }
        let stored = disk.rows.as_ref().map(|stored| {
            let rows = stored.rows.iter().map(|((table, key), value)| TableWrite {
                table: *table,
                key: key.clone(),
                value: Some(value.clone()),
            });
            (stored.applied.clone(), rows.collect())
        });
        Ok((ModelRows(self.clone()), stored))
    }
}

/// The rows of a [`ModelDisk`].
#[derive(Debug)]
pub struct ModelRows(ModelDisk);

impl Rows for ModelRows {
    fn move_aside(&mut self) -> Result<(), StoreError> {
        let mut disk = self.0.0.borrow_mut();
        (disk.rows, disk.rows_kept) = (None, None);
        Ok(())
    }

    fn replace(&mut self, applied: &Applied, rows: impl IntoIterator<Item = TableWrite>) {
        self.0.0.borrow_mut().rows = None;
        self.write(applied, rows.into_iter().collect());
        self.checkpoint();
    }

    fn close(&mut self) {
        self.checkpoint();
    }

    fn is_bloated(&self, _rows: usize) -> bool {
        false
    }

    fn write(&mut self, applied: &Applied, writes: Vec<TableWrite>) {
        let mut disk = self.0.0.borrow_mut();
        let stored = disk.rows.get_or_insert_with(|| StoredRows { applied: applied.clone(), rows: BTreeMap::new() });
        stored.applied = applied.clone();
        for write in writes {
            match write.value {
                Some(value) => stored.rows.insert((write.table, write.key), value),
                None => stored.rows.remove(&(write.table, write.key)),
            };
        }
    }

    fn checkpoint(&mut self) {
        let mut disk = self.0.0.borrow_mut();
        disk.rows_kept = disk.rows.clone();
    }
}

/// The snapshot of a [`ModelDisk`].
#[derive(Debug)]
pub struct ModelSnapshots(ModelDisk);

/// A snapshot that is written when it is waited for: until then a crash loses it.
#[derive(Debug)]
pub struct ModelWriting {
    disk: ModelDisk,
    bytes: Bytes,
    /// How often it was asked about.
    asked: Cell<u32>,
}

/// Questions until a snapshot is on disk.
const ASKED_MAX: u32 = 3;

impl Writing for ModelWriting {
    fn is_done(&self) -> bool {
        self.asked.set(self.asked.get() + 1);
        self.asked.get() > ASKED_MAX
    }
    fn wait(self) -> Result<(), StoreError> {
        ModelSnapshots(self.disk).write(&self.bytes)
    }
}

impl Snapshots for ModelSnapshots {
    type Writing = ModelWriting;

    fn begin(&self, bytes: Bytes) -> Result<ModelWriting, StoreError> {
        Ok(ModelWriting { disk: self.0.clone(), bytes, asked: Cell::new(0) })
    }

    fn load(&self) -> Result<Option<Snapshot>, StoreError> {
        let disk = self.0.0.borrow();
        if disk.is_damaged(Part::Snapshot) {
            return Err(StoreError::damaged("the snapshot", "a checksum that fails"));
        }
        disk.snapshot.as_deref().map(snapshot::decode).transpose()
    }

    fn write(&self, bytes: &[u8]) -> Result<(), StoreError> {
        let mut disk = self.0.0.borrow_mut();
        // Interrupted, the old one stays: the rename is what replaces it.
        let dies = disk.strike()?;
        disk.snapshot = Some(bytes.to_vec());
        disk.repair(Part::Snapshot);
        disk.done(dies)
    }
}

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
    offer: RefCell<Option<eraftpb::Snapshot>>,
    wanted: Cell<bool>,
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

impl ModelLog {
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
            let dies = if nothing { false } else { disk.strike()? };
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
            if work.must_sync || dies {
                disk.done(dies)?;
            }
        }
        append(&mut self.entries, &work.entries);
        if let Some(hard) = work.hard_state {
            self.hard = hard;
        }
        Ok(FlushReceipt::of(work.number))
    }

    fn install(&mut self, base: Base) -> Result<(), StoreError> {
        let mut hard = self.hard.clone();
        hard.commit = hard.commit.max(base.index);
        if hard.term < base.term {
            // No vote was ever given in a term that this store had not written down.
            hard.term = base.term;
            hard.vote = 0;
        }
        let mut disk = self.disk.0.borrow_mut();
        let dies = disk.strike()?;
        (disk.base, disk.hard) = (base, hard.clone());
        disk.entries.clear();
        disk.unsynced.clear();
        disk.done(dies)?;
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
        let dies = disk.strike()?;
        disk.base = base;
        while disk.entries.front().is_some_and(|e| e.index <= index) {
            disk.entries.pop_front();
        }
        disk.done(dies)?;
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
        self.wanted.set(false);
        *self.offer.borrow_mut() = Some(snapshot);
    }
    fn withdraw(&self) {
        *self.offer.borrow_mut() = None;
    }
    fn snapshot_wanted(&self) -> bool {
        self.wanted.take()
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
        if low <= self.base.index {
            return Err(raft::Error::Store(StorageError::Compacted));
        }
        if high > self.last().index + 1 {
            return Err(raft::Error::Store(StorageError::Unavailable));
        }
        let from = usize::try_from(low - self.base.index - 1).unwrap_or(usize::MAX);
        let count = usize::try_from(high - low).unwrap_or(usize::MAX);
        let mut out: Vec<Entry> = self.entries.iter().skip(from).take(count).cloned().collect();
        raft::util::limit_size(&mut out, max_size.into());
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
        Ok(self.last().index)
    }

    fn snapshot(&self, request_index: u64, to: u64) -> raft::Result<eraftpb::Snapshot> {
        let usable =
            self.offer.borrow().as_ref().filter(|s| super::log::is_usable(s, request_index, self.base, to)).cloned();
        usable.ok_or_else(|| {
            self.wanted.set(true);
            raft::Error::Store(StorageError::SnapshotTemporarilyUnavailable)
        })
    }
}
