//! A group that begins anew with one voter, on a state that was read whole: from a snapshot, or from what a stopped replica
//! holds. Snapshot and log say everything; the tables are not asked.

use super::core::{Content, ordered};
use super::{Options, StartError};
use crate::store::log::LogStore;
use crate::store::snapshot::{self, Header, Snapshot, SnapshotDir};
use crate::store::{Disk, Folder, Log, Membership, Snapshots, StoreError, io, sync_dir};
use ambit_model::{RaftIndex, ReplicaId};
use ambit_state::audit::AuditEntry;
use ambit_state::{LogEntry, State};
use raft::{GetEntriesContext, Storage};
use std::fs;
use std::path::{Path, PathBuf};

/// Entries read at once.
const PAGE: u64 = 1024;
/// The parts of a store, the log first: without it there is no store, and a replica does not start.
const PARTS: [&str; 4] = ["log", "log.mark", "snapshot", "tables"];
/// A new store that is not yet in its place.
const STAGE: &str = "rebased";

/// A state, where in the log it stands, and whose.
pub struct Whole {
    /// Every row of it was checked against the digest that it was written with.
    pub state: State,
    /// Term of the last entry in it.
    pub term: u64,
    /// Members there.
    pub membership: Membership,
}

/// What a stopped replica holds.
pub struct Survey {
    /// With all entries of the log applied, also those that it did not know to be committed: a majority that is gone may
    /// have acknowledged them.
    pub whole: Whole,
    /// The highest index that it knew to be committed.
    pub commit: u64,
    /// The last index of its log.
    pub last: u64,
    /// Records of the audit log that these entries made.
    pub audited: Vec<AuditEntry>,
}

impl Whole {
    /// The state of a snapshot, if it is the very state that its digest is of.
    pub fn of(snapshot: Snapshot) -> Result<Whole, StoreError> {
        let Header { index, term, membership, digest, .. } = snapshot.header;
        let state =
            State::import(snapshot.rows).map_err(|r| StoreError::damaged("the snapshot's rows", r.to_string()))?;
        if state.digest() != digest {
            let found = format!("digest {}, where {} was written", hex::encode(state.digest()), hex::encode(digest));
            return Err(StoreError::damaged("the snapshot's rows", found));
        }
        if state.applied() != RaftIndex(index) {
            let found = format!("a state of {}, where {index} was written", state.applied());
            return Err(StoreError::damaged("the snapshot's rows", found));
        }
        Ok(Whole { state, term, membership })
    }
}

/// Reads the whole store of a replica that does not run. Any damage is an error: nobody begins anew on half a state.
pub fn survey(options: &Options) -> Result<Survey, StartError> {
    let log = LogStore::open(&options.data_dir, options.id.0)?;
    let mut whole = match SnapshotDir::open(&options.data_dir)?.load()? {
        Some(snapshot) => Whole::of(snapshot)?,
        None if log.base().index == 0 => Whole { state: State::new(), term: 0, membership: Membership::default() },
        None => return Err(StoreError::damaged("the snapshot", "none, and the log does not begin at 1").into()),
    };
    let index = whole.state.applied().0;
    if index < log.base().index {
        let found = format!("it is of {index}, the log begins after {}", log.base().index);
        return Err(StoreError::damaged("the snapshot", found).into());
    }
    // Behind a leader's snapshot that came last there may be a log that it replaced.
    let last =
        if index > log.base().index && log.term_at(index) != Some(whole.term) { index } else { log.last().index };
    let audited = replay(&log, &mut whole, last)?;
    Ok(Survey { whole, commit: log.commit().max(index), last, audited })
}

/// Records of the audit log are given back: as many as a log between two snapshots makes.
fn replay(log: &LogStore, whole: &mut Whole, last: u64) -> Result<Vec<AuditEntry>, StartError> {
    let mut audited = Vec::new();
    let mut next = whole.state.applied().0 + 1;
    while next <= last {
        let end = (next + PAGE).min(last + 1);
        let read = log.entries(next, end, None, GetEntriesContext::empty(false));
        let page = read.map_err(|e| StoreError::damaged("the log", format!("entries {next} to {end}: {e}")))?;
        for entry in ordered(page) {
            let index = RaftIndex(entry.index);
            match entry.content {
                Content::Command(bytes) => {
                    let entry = LogEntry::decode(&bytes).map_err(StartError::State)?;
                    let _answered_long_ago = whole.state.apply(index, &entry);
                }
                Content::Change(change, version) => {
                    whole.membership = whole.membership.after(change, version);
                    whole.state.skip(index);
                }
                Content::Empty => whole.state.skip(index),
            }
            (whole.term, next) = (entry.term, entry.index + 1);
        }
        whole.state.take_writes();
        audited.extend(whole.state.take_audited());
    }
    Ok(audited)
}

/// Creates the store of a group of one voter, `id`, that begins with this state. Refuses an existing store.
pub fn found_on(disk: &impl Disk, id: ReplicaId, whole: &Whole) -> Result<(), StartError> {
    disk.refuse_existing()?;
    let membership = Membership { version: whole.membership.version + 1, ..Membership::of_founder(id.0) };
    let header = Header {
        index: whole.state.applied().0,
        term: whole.term + 1,
        membership,
        digest: whole.state.digest(),
        chunks: 0,
    };
    let bytes = snapshot::encode(header, whole.state.export())?;
    disk.open_snapshots()?.write(&bytes)?;
    // The log's rename is the moment from which the store exists; it takes its beginning from the snapshot.
    Ok(disk.create_log(id.0)?)
}

/// Replaces the store in `data_dir` by one founded on `whole`, and keeps the old one in the folder it returns. It either
/// was not begun, or ends with [`finish`], or goes on with it after a crash.
pub fn refound(data_dir: &Path, id: ReplicaId, whole: &Whole, aside: &str) -> Result<PathBuf, StartError> {
    let (stage, unfinished) = (data_dir.join(STAGE), data_dir.join(format!("{STAGE}.new")));
    if unfinished.exists() {
        fs::remove_dir_all(&unfinished).map_err(io("removing folder", &unfinished))?;
    }
    let kept = data_dir.join(aside);
    if kept.exists() {
        return Err(StoreError::Exists(kept).into());
    }
    found_on(&Folder(unfinished.clone()), id, whole)?;
    let name = unfinished.join("aside");
    fs::write(&name, aside).map_err(io("writing", &name))?;
    fs::File::open(&name).and_then(|f| f.sync_all()).map_err(io("syncing", &name))?;
    sync_dir(&unfinished)?;
    // From here on the old store is no more what this replica goes on with.
    fs::rename(&unfinished, &stage).map_err(io("renaming folder", &stage))?;
    sync_dir(data_dir)?;
    finish(data_dir)?;
    Ok(kept)
}

/// Whether [`refound`] was cut off: then neither store is to be started.
pub fn unfinished(data_dir: &Path) -> bool {
    data_dir.join(STAGE).exists()
}

/// Puts a new store in its place where [`refound`] was cut off. Whether there was one.
pub fn finish(data_dir: &Path) -> Result<bool, StoreError> {
    let stage = data_dir.join(STAGE);
    if !stage.is_dir() {
        return Ok(false);
    }
    let name = stage.join("aside");
    let kept = data_dir.join(fs::read_to_string(&name).map_err(io("reading", &name))?);
    fs::create_dir_all(&kept).map_err(io("creating folder", &kept))?;
    let step = |from: PathBuf, to: PathBuf| -> Result<(), StoreError> {
        if from.exists() && !to.exists() { fs::rename(&from, &to).map_err(io("renaming", &to)) } else { Ok(()) }
    };
    // The old log goes first and the new one comes last: in between there is no store that would start.
    for part in PARTS {
        if stage.join("log").exists() {
            step(data_dir.join(part), kept.join(part))?;
        }
    }
    sync_dir(&kept)?;
    sync_dir(data_dir)?;
    for part in PARTS.iter().rev() {
        step(stage.join(part), data_dir.join(part))?;
        sync_dir(data_dir)?;
    }
    fs::remove_dir_all(&stage).map_err(io("removing folder", &stage))?;
    sync_dir(data_dir)?;
    Ok(true)
}

#[cfg(test)]
#[path = "rebase_tests.rs"]
mod tests;
