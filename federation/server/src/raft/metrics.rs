//! Counters for the metrics page, as `ambit_raft_*`. Written by the driver thread, read by anyone.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Numbers of one replica since its start; indices and term are gauges.
#[derive(Debug, Default)]
pub struct Metrics {
    term: AtomicU64,
    commit_index: AtomicU64,
    applied_index: AtomicU64,
    leader: AtomicU64,
    leader_changes: AtomicU64,
    fsyncs: AtomicU64,
    fsync_nanos: AtomicU64,
    proposals: AtomicU64,
    busy: AtomicU64,
    snapshots: AtomicU64,
    frames_dropped: AtomicU64,
}

macro_rules! readings {
    ($($(#[$m:meta])* $name:ident => $field:ident;)*) => {
        impl Metrics { $( $(#[$m])* pub fn $name(&self) -> u64 { self.$field.load(Relaxed) } )* }
    };
}
readings! {
    /// Gauge.
    term => term;
    /// Gauge.
    commit_index => commit_index;
    /// Gauge.
    applied_index => applied_index;
    /// Gauge: 0 where none is known.
    leader => leader;
    /// Counter: how often a new leader was seen.
    leader_changes_total => leader_changes;
    /// Counter: syncs of the log.
    fsync_total => fsyncs;
    /// Counter: proposals appended by this replica as leader.
    proposals_total => proposals;
    /// Counter: requests answered `busy`.
    busy_total => busy;
    /// Counter: snapshots made or installed.
    snapshots_total => snapshots;
    /// Counter: frames for or from peers that were dropped because a queue was full or the sender was an older incarnation.
    frames_dropped_total => frames_dropped;
}

impl Metrics {
    /// Counter: seconds spent in those syncs.
    pub fn fsync_seconds_total(&self) -> f64 {
        self.fsync_nanos.load(Relaxed) as f64 / 1e9
    }

    pub(super) fn set_position(&self, term: u64, commit: u64, applied: u64, leader: u64) {
        self.term.store(term, Relaxed);
        self.commit_index.store(commit, Relaxed);
        self.applied_index.store(applied, Relaxed);
        if self.leader.swap(leader, Relaxed) != leader && leader != 0 {
            self.leader_changes.fetch_add(1, Relaxed);
        }
    }
    pub(super) fn set_syncs(&self, time: crate::store::log::SyncTime) {
        self.fsyncs.store(time.count, Relaxed);
        self.fsync_nanos.store(u64::try_from(time.total.as_nanos()).unwrap_or(u64::MAX), Relaxed);
    }
    pub(super) fn proposal_appended(&self) {
        self.proposals.fetch_add(1, Relaxed);
    }
    pub(super) fn busy_answered(&self) {
        self.busy.fetch_add(1, Relaxed);
    }
    pub(super) fn snapshot_made(&self) {
        self.snapshots.fetch_add(1, Relaxed);
    }
    pub(super) fn frame_dropped(&self) {
        self.frames_dropped.fetch_add(1, Relaxed);
    }
}
