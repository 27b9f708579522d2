//! The replicated state and everything it is rebuilt from: opening, applying, snapshots.

use super::StartError;
use super::changes::Changes;
use super::core::{Content, Ordered, RaftCore};
use crate::store::audit::AuditFiles;
use crate::store::log::Base;
use crate::store::snapshot::{self, Header};
use crate::store::tables;
use crate::store::{Bodies, Disk, Log, Membership, Rows, Snapshots, StoreError, Writing};
use ambit_model::{RaftIndex, Refusal};
use ambit_state::{Applied, LogEntry, State};
use raft::eraftpb;
use std::sync::{Arc, PoisonError, RwLock, RwLockWriteGuard};

/// Applied entries between two checkpoints of the tables: bounds what a restart replays from the log.
const CHECKPOINT_ENTRIES: u64 = 5_000;

/// What must stop the process: going on would serve or persist something wrong.
#[derive(Debug, thiserror::Error)]
pub enum Fatal {
    /// See the error.
    #[error("the store failed")]
    Store(#[from] StoreError),
    /// A later version's, or damage that every checksum missed.
    #[error("entry {index} is not readable by this version: {refusal}")]
    Entry {
        /// Where.
        index: u64,
        /// Why not.
        refusal: Refusal,
    },
    /// It contradicts itself or its message.
    #[error("the leader's snapshot: {0}")]
    Snapshot(String),
}

/// Owned by the engine; readers share the state through the lock.
pub(super) struct Machine<D: Disk> {
    state: Arc<RwLock<State>>,
    tables: D::Rows,
    snapshots: D::Snapshots,
    bodies: D::Bodies,
    membership: Membership,
    applied: u64,
    snapshot_index: u64,
    checkpoint_index: u64,
    writing: Option<Begun<D>>,
    changes: Arc<Changes>,
}

/// A snapshot on its way to the disk: its sync takes longer than a leader may be silent.
struct Begun<D: Disk> {
    index: u64,
    writing: <D::Snapshots as Snapshots>::Writing,
}

/// See [`super::found`].
pub(super) fn found(disk: &impl Disk, replica: u64) -> Result<(), StartError> {
    disk.refuse_existing()?;
    let mut state = State::new();
    // Index 1 is the founding itself, so that every later replica begins with a snapshot that names its members.
    state.skip(RaftIndex(1));
    let header =
        Header { index: 1, term: 1, membership: Membership::of_founder(replica), digest: state.digest(), chunks: 0 };
    let bytes = snapshot::encode(header, state.rows())?;
    disk.open_snapshots()?.write(&bytes)?;
    // The log is the moment from which the store exists.
    Ok(disk.create_log(replica)?)
}

/// See [`super::prepare_join`].
pub(super) fn prepare_join(disk: &impl Disk, replica: u64) -> Result<(), StartError> {
    disk.refuse_existing()?;
    disk.forget_snapshot()?;
    Ok(disk.create_log(replica)?)
}

/// A state and where it stands.
struct Start {
    state: State,
    membership: Membership,
    index: u64,
    from_tables: bool,
}

impl<D: Disk> Machine<D> {
    /// Opens log, snapshot and tables, and starts from the newest state that all checks agree on. What follows it in the
    /// log is applied again by raft itself.
    pub(super) fn open(disk: &D, replica: u64) -> Result<(Self, D::Log), StartError> {
        let mut log = disk.open_log(replica)?;
        let snapshots = disk.open_snapshots()?;
        let snapshot = snapshots.load();
        if let Ok(Some(found)) = &snapshot {
            let base = Base { index: found.header.index, term: found.header.term };
            if base.index > log.base().index && log.term_at(base.index) != Some(base.term) {
                // The process ended between writing a leader's snapshot and emptying the log for it.
                log.install(base)?;
            }
        }
        let (mut tables, rows) = disk.open_rows(log.base().index > 0)?;
        let stored = match rows {
            Some((applied, rows)) => match from_tables(applied, rows) {
                Ok(start) => Some(start),
                Err(e) => {
                    tracing::warn!(error = %e, "tables damaged: moved aside, rebuilding from snapshot and log");
                    tables.move_aside()?;
                    None
                }
            },
            None => None,
        };
        let snapshot_index = snapshot.as_ref().ok().and_then(Option::as_ref).map_or(0, |s| s.header.index);
        let bodies = disk.open_bodies();
        let start = choose(&log, stored, snapshot, &|state| lacks(&bodies, state))?;
        if lacks(&bodies, &start.state) {
            tracing::warn!("records of the audit log are missing here: they are taken from another replica");
        }
        if start.index > log.last().index {
            let found = format!("the state is at {}, the log ends at {}", start.index, log.last().index);
            return Err(StoreError::damaged("the log", found).into());
        }
        if !start.from_tables && start.index > 0 {
            tables.replace(&position(&start.state, &start.membership, start.index), start.state.rows());
        }
        #[cfg(ambit_mutant)]
        let start = if ambit_state::mutant::is("snapshot-without-suffix") {
            Start { index: log.last().index, ..start }
        } else {
            start
        };
        log.start_from(start.index, start.membership.clone());
        let machine = Self {
            state: Arc::new(RwLock::new(start.state)),
            tables,
            snapshots,
            bodies,
            membership: start.membership,
            applied: start.index,
            snapshot_index,
            checkpoint_index: start.index,
            writing: None,
            changes: Arc::new(Changes::new(start.index)),
        };
        Ok((machine, log))
    }

    pub(super) fn state(&self) -> &Arc<RwLock<State>> {
        &self.state
    }
    pub(super) fn changes(&self) -> &Arc<Changes> {
        &self.changes
    }
    pub(super) fn audit(&self) -> Option<AuditFiles> {
        self.bodies.files()
    }
    pub(super) fn membership(&self) -> &Membership {
        &self.membership
    }
    pub(super) fn applied(&self) -> u64 {
        self.applied
    }
    pub(super) fn snapshot_index(&self) -> u64 {
        self.snapshot_index
    }

    /// Applies entries in order; the outcomes are for whoever waits here. [`Machine::store_writes`] comes after.
    pub(super) fn apply(&mut self, entries: Vec<Ordered>, core: &mut RaftCore<D::Log>) -> Result<Vec<Applied>, Fatal> {
        let mut outcomes = Vec::new();
        let shared = self.state.clone();
        let mut state = write_lock(&shared);
        for entry in entries {
            if entry.index <= self.applied {
                continue;
            }
            let index = RaftIndex(entry.index);
            match entry.content {
                Content::Command(bytes) => {
                    let entry = LogEntry::decode(&bytes).map_err(|refusal| Fatal::Entry { index: index.0, refusal })?;
                    outcomes.push(state.apply(index, &entry));
                }
                Content::Change(change, version) => {
                    if self.membership.permits(change, version)
                        && let Some(after) = core.apply_change(change, &self.membership)
                    {
                        tracing::info!(?change, voters = ?after.voters, learners = ?after.learners, "membership changed");
                        self.membership = after;
                    }
                    state.skip(index);
                }
                Content::Empty => state.skip(index),
            }
            self.applied = entry.index;
        }
        Ok(outcomes)
    }

    /// Tells the tables, and who follows, what changed. Records of the audit log go first: tables that say that there are
    /// more than there are would be taken for a reason not to make them again.
    pub(super) fn store_writes(&mut self) -> Result<(), Fatal> {
        let audited = write_lock(&self.state).take_audited();
        self.bodies.append(audited)?;
        let (writes, changed, position) = {
            let mut state = write_lock(&self.state);
            let writes = state.take_writes();
            let changed: Vec<_> = writes.iter().filter_map(|write| state.object_key(write)).collect();
            (writes, changed, position(&state, &self.membership, self.applied))
        };
        self.changes.note(self.applied, changed);
        self.tables.write(&position, writes);
        if self.applied.saturating_sub(self.checkpoint_index) >= CHECKPOINT_ENTRIES {
            self.checkpoint();
        }
        Ok(())
    }

    pub(super) fn checkpoint(&mut self) {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        if self.tables.is_bloated(state.row_count()) {
            self.tables.replace(&position(&state, &self.membership, self.applied), state.rows());
        } else {
            self.tables.checkpoint();
        }
        self.checkpoint_index = self.applied;
    }

    /// No snapshot now; the next is due as if one had been made.
    pub(super) fn defer_snapshot(&mut self) {
        self.snapshot_index = self.applied;
    }

    /// Waits for what is on its way to the disk, then writes a last checkpoint.
    pub(super) fn close(&mut self) -> Result<(), Fatal> {
        self.wait_for_snapshot()?;
        self.bodies.sync()?;
        self.tables.close();
        Ok(())
    }

    /// Whether a snapshot is on its way to the disk.
    pub(super) fn is_writing(&self) -> bool {
        self.writing.is_some()
    }

    /// The index of a snapshot that has come to be on disk since the last call.
    pub(super) fn snapshot_written(&mut self) -> Result<Option<u64>, Fatal> {
        if self.writing.as_ref().is_some_and(|w| w.writing.is_done()) { self.wait_for_snapshot() } else { Ok(None) }
    }

    fn wait_for_snapshot(&mut self) -> Result<Option<u64>, Fatal> {
        let Some(Begun { index, writing }) = self.writing.take() else { return Ok(None) };
        writing.wait()?;
        Ok(Some(index))
    }

    /// Begins to write a snapshot of the state as applied; `term` is that of the last applied entry. None may be on its way.
    pub(super) fn snapshot(&mut self, term: u64) -> Result<(eraftpb::Snapshot, [u8; 32]), Fatal> {
        let (bytes, digest) = {
            let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
            let (digest, membership) = (state.digest(), self.membership.clone());
            let header = Header { index: self.applied, term, membership, digest, chunks: 0 };
            (snapshot::encode(header, state.rows())?, digest)
        };
        self.wait_for_snapshot()?;
        // Behind a snapshot the log of Raft is dropped, which could make these records again.
        self.bodies.sync()?;
        let bytes = bytes::Bytes::from(bytes);
        self.writing = Some(Begun { index: self.applied, writing: self.snapshots.begin(bytes.clone())? });
        self.snapshot_index = self.applied;
        self.checkpoint();
        let mut wire = eraftpb::Snapshot::default();
        wire.mut_metadata().index = self.applied;
        wire.mut_metadata().term = term;
        wire.mut_metadata().set_conf_state(self.membership.conf_state());
        wire.data = bytes;
        Ok((wire, digest))
    }

    /// Replaces the state by a leader's snapshot: file first, then the log's new beginning, then memory and tables.
    pub(super) fn install(&mut self, base: Base, bytes: &[u8], log: &mut D::Log) -> Result<(), Fatal> {
        let parsed = snapshot::decode(bytes)?;
        if (parsed.header.index, parsed.header.term) != (base.index, base.term) {
            return Err(Fatal::Snapshot(format!("is of {:?}, its message says {base:?}", parsed.header)));
        }
        let state = import(&parsed.header.digest, parsed.rows).map_err(|e| Fatal::Snapshot(e.to_string()))?;
        // An older one of our own must not come after it.
        self.wait_for_snapshot()?;
        self.snapshots.write(bytes)?;
        log.install(base)?;
        self.membership = parsed.header.membership;
        (self.applied, self.snapshot_index, self.checkpoint_index) = (base.index, base.index, base.index);
        self.tables.replace(&position(&state, &self.membership, base.index), state.rows());
        *write_lock(&self.state) = state;
        self.changes.forget(base.index);
        Ok(())
    }
}

fn write_lock(state: &RwLock<State>) -> RwLockWriteGuard<'_, State> {
    // Poison means that apply panicked; the driver aborts the process then, so no one sees that state.
    state.write().unwrap_or_else(PoisonError::into_inner)
}

fn position(state: &State, membership: &Membership, index: u64) -> tables::Applied {
    tables::Applied { index, membership: membership.clone(), digest: state.digest() }
}

/// The state of these rows, if it is the very state that the digest is of.
fn import(digest: &[u8; 32], rows: Vec<ambit_state::TableWrite>) -> Result<State, StoreError> {
    let state = State::import(rows).map_err(|refusal| StoreError::damaged("the state's rows", refusal.to_string()))?;
    #[cfg(ambit_mutant)]
    if ambit_state::mutant::is("restore-forgets-denials") {
        return Ok(state);
    }
    if state.digest() == *digest {
        Ok(state)
    } else {
        Err(StoreError::damaged("the state's rows", "another digest than when they were written"))
    }
}

fn snapshot_start(s: snapshot::Snapshot) -> Result<Start, StoreError> {
    let state = import(&s.header.digest, s.rows)?;
    Ok(Start { state, membership: s.header.membership, index: s.header.index, from_tables: false })
}

fn from_tables(applied: tables::Applied, rows: Vec<ambit_state::TableWrite>) -> Result<Start, StoreError> {
    let state = import(&applied.digest, rows)?;
    Ok(Start { state, membership: applied.membership, index: applied.index, from_tables: true })
}

/// Whether records of the audit log are missing that this state counts. Those that were not synced and are others than it
/// counts are missing too.
fn lacks(bodies: &impl Bodies, state: &State) -> bool {
    let Some(row) = state.audit() else { return false };
    if let Err(e) = bodies.check(row.epoch, &row.frontier) {
        // It is no ground to stop: what the files say is refused by whoever verifies it, who is told which record it is.
        tracing::error!(error = %e, "the audit log's files were altered: see `ambit audit verify`");
    }
    bodies.size(row.epoch).is_ok_and(|size| size < row.frontier.size())
}

fn choose(
    log: &impl Log,
    stored: Option<Start>,
    snapshot: Result<Option<snapshot::Snapshot>, StoreError>,
    lacks: &dyn Fn(&State) -> bool,
) -> Result<Start, StoreError> {
    let floor = log.base().index;
    let newest_snapshot = snapshot.as_ref().ok().and_then(Option::as_ref).map_or(0, |s| s.header.index);
    if let Some(start) = stored
        && start.index >= floor.max(newest_snapshot)
    {
        if let Err(e) = &snapshot {
            tracing::error!(error = %e, "snapshot damaged: the tables stand in, a new one is due");
        }
        if !lacks(&start.state) {
            return Ok(start);
        }
        // Power went before the records were on disk: from an older state on the log makes them again. Where that lacks them
        // too, other replicas have them.
        return match snapshot {
            Ok(Some(s)) if s.header.index >= floor && s.header.index < start.index => {
                let older = snapshot_start(s)?;
                Ok(if lacks(&older.state) { start } else { older })
            }
            Ok(None) if floor == 0 => {
                Ok(Start { state: State::new(), membership: Membership::default(), index: 0, from_tables: false })
            }
            _ => Ok(start),
        };
    }
    match snapshot? {
        Some(s) if s.header.index >= floor => snapshot_start(s),
        Some(s) => Err(StoreError::damaged(
            "the snapshot",
            format!("it is of {}, the log begins after {floor}", s.header.index),
        )),
        None if floor == 0 => {
            Ok(Start { state: State::new(), membership: Membership::default(), index: 0, from_tables: false })
        }
        None => Err(StoreError::damaged("the snapshot", format!("none, and the log begins after {floor}"))),
    }
}
