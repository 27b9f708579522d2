//! What a replica needs of its disk, as traits: files in production, a model with faults in the simulator.
//!
//! The contract: what [`Log::persist`] gave a receipt for, what [`Snapshots::write`] returned from, is there after any crash;
//! everything else may be lost, wholly or in part. Damage is an error at open or at reading, never other contents.

use super::audit::AuditFiles;
use super::log::{Base, Batch, LogStore, SyncTime};
use super::snapshot::{Snapshot, SnapshotDir};
use super::tables::{Applied, Stored, Tables};
use super::{FlushReceipt, Membership, StoreError, io};
use ambit_audit::Frontier;
use ambit_state::TableWrite;
use ambit_state::audit::AuditEntry;
use bytes::Bytes;
use raft::Storage;
use raft::eraftpb::{self, HardState};
use std::path::PathBuf;

/// The Raft log and hard state. Raft reads it through [`Storage`].
pub trait Log: Storage {
    /// How often this store was opened; a peer drops frames of an older one.
    fn incarnation(&self) -> u64;
    /// Where the log begins.
    fn base(&self) -> Base;
    /// Last index and its term.
    fn last(&self) -> Base;
    /// The term at `index`, if the log still knows it.
    fn term_at(&self, index: u64) -> Option<u64>;
    /// What raft starts from; set once, before the node is made. What was applied had been committed, also where the
    /// commit index on disk lags (it is not synced on its own).
    fn start_from(&mut self, applied: u64, membership: Membership);
    /// Appends and syncs. The receipt opens the messages that waited. An error leaves the log in doubt: the caller must
    /// stop the process, never retry (the kernel may have dropped the pages).
    fn persist(&mut self, work: Batch) -> Result<FlushReceipt, StoreError>;
    /// Throws the log away and begins it after a snapshot that is on disk already.
    fn install(&mut self, base: Base) -> Result<(), StoreError>;
    /// Drops entries up to and with `index`; a snapshot at or after it must be on disk.
    fn compact(&mut self, index: u64) -> Result<(), StoreError>;
    /// A snapshot for followers that need one, until [`Log::withdraw`].
    fn offer(&self, snapshot: eraftpb::Snapshot);
    /// Frees the offered snapshot.
    fn withdraw(&self);
    /// Whether raft asked for a snapshot that is not there; asking clears it.
    fn snapshot_wanted(&self) -> bool;
    /// Syncs so far.
    fn sync_time(&self) -> SyncTime;
}

/// The hard state of a log that begins after a snapshot at `base`.
pub(super) fn hard_after(hard: &HardState, base: Base) -> HardState {
    let mut hard = hard.clone();
    hard.commit = hard.commit.max(base.index);
    if hard.term < base.term {
        // No vote was ever given in a term that this store had not written down.
        hard.term = base.term;
        hard.vote = 0;
    }
    hard
}

/// The state's rows; rebuildable, never trusted.
pub trait Rows {
    /// Drops what is there and starts empty, keeping the old rows for a look.
    fn move_aside(&mut self) -> Result<(), StoreError>;
    /// Replaces everything by `rows`. The position comes last, so that a half-done replacement is seen as damage.
    fn replace(&mut self, applied: &Applied, rows: impl IntoIterator<Item = TableWrite>);
    /// Takes in what changed. It is written with the position, in one step, once it is worth it or at a checkpoint. A failure
    /// costs the rows, not the replica: they are left behind and rebuilt at the next start.
    fn write(&mut self, applied: &Applied, writes: Vec<TableWrite>);
    /// Asks for what was written to be kept. It returns before that is done; nothing relies on it.
    fn checkpoint(&mut self);
    /// A last checkpoint, written when this returns.
    fn close(&mut self);
    /// Whether so much is overridden, where the state has so many rows, that [`Rows::replace`] is due.
    fn is_bloated(&self, rows: usize) -> bool;
}

/// A snapshot on its way to the disk.
pub trait Writing {
    /// Whether [`Writing::wait`] would return at once.
    fn is_done(&self) -> bool;
    /// Returns once it is on disk.
    fn wait(self) -> Result<(), StoreError>;
}

/// The newest snapshot.
pub trait Snapshots {
    /// See the trait.
    type Writing: Writing;
    /// Begins to replace it.
    fn begin(&self, bytes: Bytes) -> Result<Self::Writing, StoreError>;
    /// None where none was ever written. Damage is an error, never a shorter state.
    fn load(&self) -> Result<Option<Snapshot>, StoreError>;
    /// Replaces it in one durable step.
    fn write(&self, bytes: &[u8]) -> Result<(), StoreError>;
}

/// Records of the audit log. What was appended before [`Bodies::sync`] is there after any crash; of the rest, a part.
pub trait Bodies {
    /// Records of the incarnation's log.
    fn size(&self, epoch: u64) -> Result<u64, StoreError>;
    /// Appends them in order. Those that are there already change nothing; those after a gap wait until it is filled.
    fn append(&self, entries: Vec<AuditEntry>) -> Result<(), StoreError>;
    /// See the trait.
    fn sync(&self) -> Result<(), StoreError>;
    /// An error where there are as many records as the cell agreed on, and they are others.
    fn check(&self, epoch: u64, agreed: &Frontier) -> Result<(), StoreError>;
    /// The files, where there are any.
    fn files(&self) -> Option<AuditFiles>;
}

/// All of one replica's disk.
pub trait Disk {
    /// See the trait.
    type Log: Log;
    /// See the trait.
    type Rows: Rows;
    /// See the trait.
    type Snapshots: Snapshots;
    /// See the trait.
    type Bodies: Bodies;
    /// Refuses a disk that holds a store, or what is left of one.
    fn refuse_existing(&self) -> Result<(), StoreError>;
    /// Creates the log of `replica`, empty: from then on the store exists.
    fn create_log(&self, replica: u64) -> Result<(), StoreError>;
    /// Opens and verifies the log. The incarnation rises by one, durably, before this returns.
    fn open_log(&self, replica: u64) -> Result<Self::Log, StoreError>;
    /// The place of snapshots.
    fn open_snapshots(&self) -> Result<Self::Snapshots, StoreError>;
    /// Removes a snapshot that no log belongs to.
    fn forget_snapshot(&self) -> Result<(), StoreError>;
    /// Opens the rows and reads them. Whatever is wrong with them, or if there is nothing where a state was `expected`, the
    /// answer is `None`: rebuild.
    fn open_rows(&self, expected: bool) -> Result<(Self::Rows, Option<Stored>), StoreError>;
    /// The place of the audit log's records.
    fn open_bodies(&self) -> Self::Bodies;
}

/// A folder of files: `log/`, `tables/`, `snapshot/` and `audit/`.
#[derive(Clone, Debug)]
pub struct Folder(pub PathBuf);

impl Disk for Folder {
    type Log = LogStore;
    type Rows = Tables;
    type Snapshots = SnapshotDir;
    type Bodies = AuditFiles;

    fn refuse_existing(&self) -> Result<(), StoreError> {
        // Tables without a log are what is left of a replica that lost its disk in part: not a new one.
        let found = ["log", "tables"].iter().any(|part| self.0.join(part).exists());
        if found { Err(StoreError::Exists(self.0.clone())) } else { Ok(()) }
    }
    fn create_log(&self, replica: u64) -> Result<(), StoreError> {
        LogStore::create(&self.0, replica)
    }
    fn open_log(&self, replica: u64) -> Result<LogStore, StoreError> {
        LogStore::open(&self.0, replica)
    }
    fn open_snapshots(&self) -> Result<SnapshotDir, StoreError> {
        SnapshotDir::open(&self.0)
    }
    fn forget_snapshot(&self) -> Result<(), StoreError> {
        let stale = self.0.join("snapshot");
        if stale.exists() { std::fs::remove_dir_all(&stale).map_err(io("removing folder", &stale)) } else { Ok(()) }
    }
    fn open_rows(&self, expected: bool) -> Result<(Tables, Option<Stored>), StoreError> {
        Tables::open(&self.0, expected)
    }
    fn open_bodies(&self) -> AuditFiles {
        AuditFiles::at(&self.0)
    }
}
