//! The Raft log and hard state on raft-engine: one synced write per batch, verified whole at every open.

use super::disk::hard_after;
use super::mark::{MarkFile, Position};
use super::{FlushReceipt, Log, Membership, StoreError, caught, io, panic_text, sync_dir, tail};
use raft::eraftpb::{Entry, HardState, Snapshot};
use raft_engine::env::{DefaultFileSystem, FileSystem};
use raft_engine::{Command, Config, Engine, LogBatch, MessageExt, ReadableSize, RecoveryMode};
use std::collections::VecDeque;
use std::fs::{File, TryLockError};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// raft-engine holds many groups; a replica has one.
const GROUP: u64 = 1;
const REPLICA: &[u8] = b"replica";
const FORMAT: &[u8] = b"format";
/// Of what the log holds, of the mark beside it, and of their names. 0.1 began with 1.
const FORMAT_NOW: u64 = 1;
const INCARNATION: &[u8] = b"incarnation";
const HARD: &[u8] = b"hard";
const BASE: &[u8] = b"base";
/// Entries kept in memory, so that what was just appended is replicated and applied without reading the disk.
const RECENT_ENTRIES: usize = 4096;
/// As above, by size.
const RECENT_BYTES: usize = 8 * 1024 * 1024;
/// How long another's lock is waited for before the store is called another's.
const LOCK_WAIT: Duration = Duration::from_secs(1);

struct Codec;
impl MessageExt for Codec {
    type Entry = Entry;
    fn index(e: &Entry) -> u64 {
        e.index
    }
}

/// What must be on disk before the messages of its batch leave.
#[derive(Debug, Default)]
pub struct Batch {
    /// Rising number; the receipt names it.
    pub number: u64,
    /// To append; they replace what is at or after the first of them.
    pub entries: Vec<Entry>,
    /// Term, vote and commit, if any changed.
    pub hard_state: Option<HardState>,
    /// False only where nothing but the commit index changed: that need not be on disk.
    pub must_sync: bool,
}

/// The log ends at least here: index and term of the last entry that was compacted away or replaced by a snapshot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Base {
    /// Index.
    pub index: u64,
    /// Term there.
    pub term: u64,
}

/// How long syncs took, for the metrics page.
#[derive(Clone, Copy, Debug, Default)]
pub struct SyncTime {
    /// How many.
    pub count: u64,
    /// Together.
    pub total: Duration,
}

/// When raft-engine begins a new file, and from which size of all files on it gives back those that hold nothing.
#[derive(Clone, Copy)]
pub(super) struct Sizes {
    pub(super) file: ReadableSize,
    pub(super) purge: ReadableSize,
}

const SIZES: Sizes = Sizes { file: ReadableSize::mb(16), purge: ReadableSize::mb(64) };

/// The log, open. Owned by the driver thread; [`raft::Storage`] is how raft-rs reads it.
pub struct LogStore<F: FileSystem = DefaultFileSystem> {
    engine: Arc<Engine<F>>,
    mark: MarkFile<F>,
    _lock: File,
    incarnation: u64,
    hard: HardState,
    /// Whether `hard` changed since it was written.
    hard_changed: bool,
    membership: Membership,
    base: Base,
    last: Base,
    /// First index of each run of equal terms.
    terms: VecDeque<Base>,
    recent: VecDeque<Entry>,
    recent_bytes: usize,
    sync_time: SyncTime,
    offer: Offer,
}

impl LogStore {
    /// Creates the log of `replica`, empty. Refuses where there is one.
    pub fn create(data_dir: &Path, replica: u64) -> Result<(), StoreError> {
        Self::create_on(Arc::new(DefaultFileSystem), SIZES, data_dir, replica)
    }

    /// Opens and verifies every record. The incarnation rises by one, durably, before this returns.
    pub fn open(data_dir: &Path, replica: u64) -> Result<Self, StoreError> {
        Self::open_on(Arc::new(DefaultFileSystem), SIZES, data_dir, replica)
    }
}

impl<F: FileSystem> LogStore<F> {
    pub(super) fn create_on(files: Arc<F>, sizes: Sizes, data_dir: &Path, replica: u64) -> Result<(), StoreError> {
        let dir = data_dir.join("log");
        if dir.exists() {
            return Err(StoreError::Exists(data_dir.to_owned()));
        }
        std::fs::create_dir_all(data_dir).map_err(io("creating folder", data_dir))?;
        // Built beside and renamed, so that a half-made store is never taken for one.
        let (temp, mark) = (data_dir.join("log.new"), data_dir.join("log.mark"));
        for stale in [&temp, &mark] {
            if stale.is_dir() {
                std::fs::remove_dir_all(stale).map_err(io("removing folder", stale))?;
            } else if stale.exists() {
                std::fs::remove_file(stale).map_err(io("removing file", stale))?;
            }
        }
        let engine = open_engine(files.clone(), sizes, &temp)?;
        let mut batch = LogBatch::default();
        put_u64(&mut batch, FORMAT, FORMAT_NOW)?;
        put_u64(&mut batch, REPLICA, replica)?;
        put_u64(&mut batch, INCARNATION, 0)?;
        engine.write(&mut batch, true).map_err(engine_error("writing the new log"))?;
        drop(engine);
        MarkFile::create(files.as_ref(), &mark)?;
        sync_dir(&temp)?;
        std::fs::rename(&temp, &dir).map_err(io("renaming the new log", &dir))?;
        sync_dir(data_dir)
    }

    pub(super) fn open_on(files: Arc<F>, sizes: Sizes, data_dir: &Path, replica: u64) -> Result<Self, StoreError> {
        let dir = data_dir.join("log");
        if !dir.is_dir() {
            return Err(StoreError::Missing(data_dir.to_owned()));
        }
        let lock = lock(data_dir)?;
        let (mark, position) = MarkFile::open(files.as_ref(), &data_dir.join("log.mark"))?;
        tail::check(files.as_ref(), &dir)?;
        let engine = caught("the log", || open_engine(files, sizes, &dir))?;
        let mut store = caught("the log", move || Self::read(engine, mark, lock, replica))?;
        if !store.position().covers(&position) {
            let found = format!("the log ends at {:?}, but {position:?} was synced", store.position());
            return Err(StoreError::damaged("the log", found));
        }
        store.incarnation += 1;
        let mut batch = LogBatch::default();
        put_u64(&mut batch, INCARNATION, store.incarnation)?;
        store.write(&mut batch)?;
        Ok(store)
    }

    fn read(engine: Engine<F>, mark: MarkFile<F>, lock: File, replica: u64) -> Result<Self, StoreError> {
        match get_u64(&engine, FORMAT)?.ok_or_else(|| StoreError::damaged("the log", "no format"))? {
            FORMAT_NOW => {}
            found => return Err(StoreError::Newer { what: "the log", found, known: FORMAT_NOW }),
        }
        let found = get_u64(&engine, REPLICA)?.ok_or_else(|| StoreError::damaged("the log", "no replica number"))?;
        if found != replica {
            return Err(StoreError::OtherReplica { expected: replica, found });
        }
        let incarnation =
            get_u64(&engine, INCARNATION)?.ok_or_else(|| StoreError::damaged("the log", "no incarnation"))?;
        let hard = engine.get_message(GROUP, HARD).map_err(engine_error("reading the hard state"))?.unwrap_or_default();
        let base = match engine.get(GROUP, BASE) {
            Some(bytes) => Base::decode(&bytes)?,
            None => Base::default(),
        };
        let mut store = Self {
            engine: Arc::new(engine),
            mark,
            _lock: lock,
            incarnation,
            hard,
            hard_changed: false,
            membership: Membership::default(),
            base,
            last: base,
            terms: VecDeque::new(),
            recent: VecDeque::new(),
            recent_bytes: 0,
            sync_time: SyncTime::default(),
            offer: Offer::default(),
        };
        store.verify()?;
        Ok(store)
    }

    /// Reads every entry: checksums, no gap, terms that never fall, a commit index that the log holds.
    fn verify(&mut self) -> Result<(), StoreError> {
        let bad = |found: String| StoreError::damaged("the log", found);
        if let (Some(first), Some(last)) = (self.engine.first_index(GROUP), self.engine.last_index(GROUP))
            && last > self.base.index
        {
            if first > self.base.index + 1 {
                return Err(bad(format!("entries {} to {} are missing", self.base.index + 1, first - 1)));
            }
            let mut next = self.base.index + 1;
            while next <= last {
                let mut part = Vec::new();
                let end = (next + 1024).min(last + 1);
                self.engine
                    .fetch_entries_to::<Codec>(GROUP, next, end, None, &mut part)
                    .map_err(|e| bad(format!("entries {next} to {end}: {e}")))?;
                for entry in part {
                    if entry.index != next || entry.term < self.last.term {
                        return Err(bad(format!("entry {} of term {} at {next}", entry.index, entry.term)));
                    }
                    self.remember(entry);
                    next += 1;
                }
            }
        }
        if self.hard.commit > self.last.index {
            return Err(bad(format!("entry {} was committed, the log ends at {}", self.hard.commit, self.last.index)));
        }
        if self.hard.term < self.last.term {
            return Err(bad(format!("an entry of term {} in term {}", self.last.term, self.hard.term)));
        }
        Ok(())
    }

    /// The highest index known here to be on a majority.
    pub fn commit(&self) -> u64 {
        self.hard.commit.max(self.base.index)
    }

    /// Always synced: then all but the last record are known to be on disk, and [`tail`] can tell damage from a torn write.
    fn write(&mut self, batch: &mut LogBatch) -> Result<(), StoreError> {
        let start = Instant::now();
        self.ask("writing the log", |engine| engine.write(batch, true))?;
        self.sync_time.count += 1;
        self.sync_time.total += start.elapsed();
        Ok(())
    }

    /// raft-engine gives an error for a failed write and panics where a sync fails. After either the files are in doubt, and
    /// it must not touch them again: dropping it would cut and sync them.
    fn ask<T>(
        &self,
        what: &'static str,
        act: impl FnOnce(&Engine<F>) -> raft_engine::Result<T>,
    ) -> Result<T, StoreError> {
        let outcome = match catch_unwind(AssertUnwindSafe(|| act(&self.engine))) {
            Ok(outcome) => outcome.map_err(engine_error(what)),
            Err(panic) => {
                let source = std::io::Error::other(panic_text(&*panic));
                Err(StoreError::Io { what, path: "log".into(), source })
            }
        };
        if outcome.is_err() {
            std::mem::forget(self.engine.clone());
        }
        outcome
    }

    fn put_hard(&mut self, batch: &mut LogBatch) -> Result<(), StoreError> {
        if std::mem::take(&mut self.hard_changed) {
            batch.put_message(GROUP, HARD.to_vec(), &self.hard).map_err(engine_error("encoding the hard state"))?;
        }
        Ok(())
    }

    fn position(&self) -> Position {
        Position { term: self.hard.term, vote: self.hard.vote, last_term: self.last.term, last_index: self.last.index }
    }

    fn write_mark(&mut self) -> Result<(), StoreError> {
        let position = self.position();
        self.mark.write(&position).map_err(|source| StoreError::Io {
            what: "writing mark",
            path: "log.mark".into(),
            source,
        })
    }

    fn remember(&mut self, entry: Entry) {
        if self.terms.back().is_none_or(|run| run.term != entry.term) {
            self.terms.push_back(Base { index: entry.index, term: entry.term });
        }
        self.last = Base { index: entry.index, term: entry.term };
        self.recent_bytes += entry.data.len();
        self.recent.push_back(entry);
        while self.recent.len() > RECENT_ENTRIES || self.recent_bytes > RECENT_BYTES {
            self.drop_oldest();
        }
    }

    fn drop_oldest(&mut self) {
        if let Some(old) = self.recent.pop_front() {
            self.recent_bytes = self.recent_bytes.saturating_sub(old.data.len());
        }
    }

    fn forget_from(&mut self, index: u64) {
        while self.recent.back().is_some_and(|e| e.index >= index) {
            if let Some(old) = self.recent.pop_back() {
                self.recent_bytes = self.recent_bytes.saturating_sub(old.data.len());
            }
        }
        while self.terms.back().is_some_and(|run| run.index >= index) {
            self.terms.pop_back();
        }
    }
}

impl<F: FileSystem> Log for LogStore<F> {
    fn incarnation(&self) -> u64 {
        self.incarnation
    }
    fn base(&self) -> Base {
        self.base
    }
    fn last(&self) -> Base {
        self.last
    }
    fn sync_time(&self) -> SyncTime {
        self.sync_time
    }
    fn term_at(&self, index: u64) -> Option<u64> {
        if index == self.base.index {
            return Some(self.base.term);
        }
        if index < self.base.index || index > self.last.index {
            return None;
        }
        let run = self.terms.partition_point(|run| run.index <= index);
        run.checked_sub(1).and_then(|at| self.terms.get(at)).map(|run| run.term)
    }
    fn start_from(&mut self, applied: u64, membership: Membership) {
        self.membership = membership;
        self.hard.commit = self.hard.commit.max(applied);
    }
    fn persist(&mut self, work: Batch) -> Result<FlushReceipt, StoreError> {
        let Batch { number, entries, hard_state, must_sync } = work;
        if let Some(hard) = hard_state {
            (self.hard, self.hard_changed) = (hard, true);
        }
        if !must_sync && entries.is_empty() {
            // A commit index alone goes with the next batch. Whoever restarts without it learns it from the leader.
            return Ok(FlushReceipt::of(number));
        }
        let mut batch = LogBatch::default();
        if !entries.is_empty() {
            batch.add_entries::<Codec>(GROUP, &entries).map_err(engine_error("encoding entries"))?;
        }
        self.put_hard(&mut batch)?;
        if !batch.is_empty() {
            self.write(&mut batch)?;
        }
        if let Some(first) = entries.first() {
            self.forget_from(first.index);
        }
        for entry in entries {
            self.remember(entry);
        }
        self.write_mark()?;
        Ok(FlushReceipt::of(number))
    }
    fn install(&mut self, base: Base) -> Result<(), StoreError> {
        let hard = hard_after(&self.hard, base);
        let replica = get_u64(&self.engine, REPLICA)?.unwrap_or_default();
        let mut batch = LogBatch::default();
        batch.add_command(GROUP, Command::Clean);
        put_u64(&mut batch, FORMAT, FORMAT_NOW)?;
        put_u64(&mut batch, REPLICA, replica)?;
        put_u64(&mut batch, INCARNATION, self.incarnation)?;
        put(&mut batch, BASE, base.encode())?;
        (self.hard, self.hard_changed) = (hard, true);
        self.put_hard(&mut batch)?;
        self.write(&mut batch)?;
        self.forget_from(0);
        self.terms.clear();
        (self.base, self.last) = (base, base);
        self.write_mark()
    }
    fn compact(&mut self, index: u64) -> Result<(), StoreError> {
        if index <= self.base.index || index > self.last.index {
            return Ok(());
        }
        let term = self.term_at(index).unwrap_or_default();
        let base = Base { index, term };
        let mut batch = LogBatch::default();
        put(&mut batch, BASE, base.encode())?;
        self.put_hard(&mut batch)?;
        batch.add_command(GROUP, Command::Compact { index: index + 1 });
        self.write(&mut batch)?;
        self.base = base;
        while self.recent.front().is_some_and(|e| e.index <= index) {
            self.drop_oldest();
        }
        while self.terms.get(1).is_some_and(|run| run.index <= index + 1) {
            self.terms.pop_front();
        }
        self.ask("purging log files", |engine| engine.purge_expired_files().map(drop))
    }
    fn offer(&self, snapshot: Snapshot) {
        self.offer.make(snapshot);
    }
    fn withdraw(&self) {
        self.offer.withdraw();
    }
    fn snapshot_wanted(&self) -> bool {
        self.offer.was_wanted()
    }
}

impl Base {
    fn encode(self) -> Vec<u8> {
        let mut out = self.index.to_le_bytes().to_vec();
        out.extend(self.term.to_le_bytes());
        out
    }
    fn decode(bytes: &[u8]) -> Result<Self, StoreError> {
        let bad = || StoreError::damaged("the log", "a base that is not two numbers");
        let (index, rest) = bytes.split_first_chunk::<8>().ok_or_else(bad)?;
        let term = <[u8; 8]>::try_from(rest).map_err(|_| bad())?;
        Ok(Self { index: u64::from_le_bytes(*index), term: u64::from_le_bytes(term) })
    }
}

fn open_engine<F: FileSystem>(files: Arc<F>, sizes: Sizes, dir: &Path) -> Result<Engine<F>, StoreError> {
    let config = Config {
        dir: dir.to_string_lossy().into_owned(),
        // A torn last record is cut; that nothing synced goes with it is what the mark and `tail` are for.
        recovery_mode: RecoveryMode::TolerateTailCorruption,
        // One: the machines of several threads merge across a gap that a snapshot left only by luck.
        recovery_threads: 1,
        target_file_size: sizes.file,
        purge_threshold: sizes.purge,
        ..Config::default()
    };
    Engine::open_with_file_system(config, files).map_err(|e| match e {
        raft_engine::Error::Io(_) | raft_engine::Error::Other(_) => engine_error("opening the log")(e),
        other => StoreError::damaged("the log", other.to_string()),
    })
}

/// raft-engine has a lock of its own, which comes too late: its files are looked at first. A lock outlives who took it for
/// moments: what it started holds a copy of every descriptor until it is another program (fork(2), flock(2)).
fn lock(data_dir: &Path) -> Result<File, StoreError> {
    let folder = File::open(data_dir).map_err(io("opening folder", data_dir))?;
    let patience = Instant::now() + LOCK_WAIT;
    loop {
        match folder.try_lock() {
            Ok(()) => return Ok(folder),
            Err(TryLockError::WouldBlock) if Instant::now() < patience => std::thread::sleep(LOCK_WAIT / 100),
            Err(TryLockError::WouldBlock) => return Err(StoreError::Locked(data_dir.to_owned())),
            Err(TryLockError::Error(e)) => return Err(io("locking folder", data_dir)(e)),
        }
    }
}

fn engine_error(what: &'static str) -> impl Fn(raft_engine::Error) -> StoreError {
    move |e| StoreError::Engine { what, source: Box::new(e) }
}

fn put(batch: &mut LogBatch, key: &[u8], value: Vec<u8>) -> Result<(), StoreError> {
    batch.put(GROUP, key.to_vec(), value).map_err(engine_error("encoding a value"))
}

fn put_u64(batch: &mut LogBatch, key: &[u8], value: u64) -> Result<(), StoreError> {
    put(batch, key, value.to_le_bytes().to_vec())
}

fn get_u64<F: FileSystem>(engine: &Engine<F>, key: &[u8]) -> Result<Option<u64>, StoreError> {
    match engine.get(GROUP, key) {
        Some(bytes) => <[u8; 8]>::try_from(bytes.as_slice())
            .map(|b| Some(u64::from_le_bytes(b)))
            .map_err(|_| StoreError::damaged("the log", "a number of another length")),
        None => Ok(None),
    }
}

#[path = "log_reading.rs"]
mod reading;
pub(super) use reading::{Offer, held, no_term};

#[cfg(test)]
#[path = "log_tests.rs"]
mod tests;
