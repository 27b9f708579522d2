//! A disk in memory with the faults of real ones, by the contract of [`super::disk`]: what the simulator runs replicas on.
//!
//! That real stores keep the contract is for tests on real files to show; this says what a replica must withstand.

mod bodies;
mod fault;
mod log;
mod rows;
mod snapshots;

pub use bodies::ModelBodies;
pub use fault::{Fault, Part};
pub use log::ModelLog;
pub use rows::ModelRows;
pub use snapshots::{ModelSnapshots, ModelWriting};

use super::log::Base;
use super::tables::{Applied, Stored};
use super::{Disk, StoreError};
use ambit_state::TableWrite;
use fault::Target;
use raft::eraftpb::{Entry, HardState};
use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::rc::Rc;

/// Chance, as the disk asks for it: a number below the one given.
pub type Roll<'a> = &'a mut dyn FnMut(u64) -> u64;

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
    /// Renamed into its place, and the folder is not synced.
    renamed: Option<Vec<u8>>,
    /// As of the last checkpoint: what a power loss leaves of the rows, if anything.
    rows: Option<StoredRows>,
    /// Written after it; the first few of these may be there too.
    rows_since: Vec<(Applied, Vec<TableWrite>)>,
    bodies: bodies::Stored,
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
            Part::Rows => disk.has_rows(),
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
        disk.bodies.crash();
        let kept = roll(disk.unsynced.len() as u64 + 1) as usize;
        if let Some(hard) = kept.checked_sub(1).and_then(|last| disk.unsynced.get(last)).cloned() {
            disk.hard = hard;
        }
        disk.unsynced.clear();
        if let Some(renamed) = disk.renamed.take().filter(|_| roll(2) == 0) {
            disk.snapshot = Some(renamed);
            disk.repair(Part::Snapshot);
        }
        match roll(4) {
            0 => disk.forget_rows(),
            1 if disk.has_rows() => disk.damaged.push(Part::Rows),
            _ => {
                let there = roll(disk.rows_since.len() as u64 + 1) as usize;
                disk.rows_since.truncate(there);
            }
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
            rows_since: disk.rows_since.clone(),
            bodies: disk.bodies.clone(),
            ..Inner::default()
        })))
    }

    /// How often the store was opened.
    pub fn incarnation(&self) -> u64 {
        self.0.borrow().incarnation
    }
}

/// What the log writes at an open.
const INCARNATION_BYTES: usize = 64;

fn place() -> PathBuf {
    PathBuf::from("the model disk")
}

impl Inner {
    fn is_damaged(&self, part: Part) -> bool {
        self.damaged.contains(&part)
    }

    fn repair(&mut self, part: Part) {
        self.damaged.retain(|damaged| *damaged != part);
    }

    fn has_rows(&self) -> bool {
        self.rows.is_some() || !self.rows_since.is_empty()
    }

    fn forget_rows(&mut self) {
        self.rows = None;
        self.rows_since.clear();
    }

    fn last(&self) -> Base {
        self.entries.back().map_or(self.base, |e| Base { index: e.index, term: e.term })
    }
}

impl Disk for ModelDisk {
    type Log = ModelLog;
    type Rows = ModelRows;
    type Snapshots = ModelSnapshots;
    type Bodies = ModelBodies;

    fn refuse_existing(&self) -> Result<(), StoreError> {
        let disk = self.0.borrow();
        if disk.replica.is_some() || disk.has_rows() { Err(StoreError::Exists(place())) } else { Ok(()) }
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
        let written = disk.strike(Target::Log, INCARNATION_BYTES)?;
        disk.incarnation += 1;
        disk.done(written)?;
        if disk.hard.commit > disk.last().index || disk.hard.term < disk.last().term {
            let found = format!("{:?}, and the log ends at {:?}", disk.hard, disk.last());
            return Err(StoreError::damaged("the log", found));
        }
        let (incarnation, base, entries, hard) = (disk.incarnation, disk.base, disk.entries.clone(), disk.hard.clone());
        Ok(ModelLog::new(self.clone(), incarnation, base, entries, hard))
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

    fn open_bodies(&self) -> ModelBodies {
        ModelBodies(self.clone())
    }

    fn open_rows(&self, _expected: bool) -> Result<(ModelRows, Option<Stored>), StoreError> {
        let mut disk = self.0.borrow_mut();
        if disk.is_damaged(Part::Rows) {
            // Moved aside.
            disk.repair(Part::Rows);
            disk.forget_rows();
        }
        let stored = StoredRows::after(disk.rows.clone(), disk.rows_since.iter().cloned());
        let stored = stored.map(|stored| {
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
