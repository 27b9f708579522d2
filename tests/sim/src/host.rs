//! A machine with one replica: its clocks, its disk, its process when it runs, and who waits there.

use crate::client::OpId;
use crate::peering::Peers;
use crate::plan::{MS, Micros, SECOND};
use ambit_model::{ReplicaId, Stamp};
use ambit_state::LogEntry;
use ambitd::raft::core::Rejected;
use ambitd::raft::engine::{Engine, Published, Request, Shared};
use ambitd::raft::waiters::Ticket;
use ambitd::raft::{Now, Options, Role, StartError, Status};
use ambitd::store::model::ModelDisk;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::oneshot;

/// True time at the start of a run, milliseconds since the Unix epoch.
pub(crate) const EPOCH_MS: u64 = 1_795_000_000_000;
/// As production: election timeouts of 300 ms, heartbeats of 50 ms, ticks of a fifth of one.
pub(crate) const TICK: Micros = 10 * MS;
/// Requests that wait for a replica; the driver's queue holds as many.
pub(crate) const INBOX_MAX: usize = 4096;

/// What a machine is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Condition {
    Up,
    /// Its process died; it is started again.
    Down,
    /// Its disk is lost or damaged: it must not come back under this number.
    Ruined,
    /// Taken out of the cell.
    Removed,
}

pub(crate) struct Host {
    pub(crate) id: u64,
    pub(crate) condition: Condition,
    pub(crate) disk: ModelDisk,
    pub(crate) process: Option<Process>,
    /// Rises with each start and end: what was meant for an earlier life does not arrive.
    pub(crate) life: u64,
    pub(crate) busy_until: Micros,
    pub(crate) paused_until: Micros,
    /// When it runs next; events set for another time are void.
    pub(crate) run_at: Option<Micros>,
    /// Part of its disk is damaged that it may do without, or not.
    pub(crate) may_refuse: bool,
    pub(crate) clock: Clock,
}

/// A machine's clocks, which may be wrong in their own ways.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock {
    origin: Instant,
    pub(crate) off_ms: i64,
    pub(crate) drift_ppm: i64,
}

impl Clock {
    pub(crate) fn new(origin: Instant) -> Clock {
        Clock { origin, off_ms: 0, drift_ppm: 0 }
    }

    /// True microseconds as this machine counts them.
    pub(crate) fn counted(&self, at: Micros) -> Micros {
        let drift = i128::from(at) * i128::from(self.drift_ppm) / 1_000_000;
        u64::try_from(i128::from(at) + drift).unwrap_or(at)
    }

    pub(crate) fn read(&self, at: Micros) -> Now {
        let counted = self.counted(at);
        let wall = (EPOCH_MS + counted / MS).saturating_add_signed(self.off_ms);
        Now { boot: self.origin + Duration::from_micros(counted), wall: Stamp(wall) }
    }
}

/// A running replica.
pub(crate) struct Process {
    pub(crate) engine: Engine<ModelDisk>,
    pub(crate) shared: Arc<Shared>,
    published: Published,
    pub(crate) inbox: VecDeque<Request>,
    /// By its own count.
    pub(crate) next_tick: Micros,
    pub(crate) next_second: Micros,
    pub(crate) proposals: Vec<Proposal>,
    pub(crate) reads: Vec<Reading>,
    pub(crate) forwarded: Vec<Forwarded>,
    pub(crate) peers: Peers,
    /// Applied entries that the oracle has seen.
    pub(crate) seen: u64,
    /// The term that it was in when it was looked at.
    pub(crate) term: u64,
}

impl Process {
    pub(crate) fn start(id: u64, disk: &ModelDisk, seed: u64, snapshots: (u64, u64)) -> Result<Process, StartError> {
        let mut options = Options::new(ReplicaId(id), std::path::PathBuf::new());
        (options.seed, options.snapshot_after_entries, options.keep_entries) = (seed, snapshots.0, snapshots.1);
        let engine = Engine::open(options, disk)?;
        let (shared, published) = (engine.shared().clone(), engine.published());
        let seen = *published.applied.borrow();
        Ok(Process {
            engine,
            shared,
            published,
            inbox: VecDeque::new(),
            next_tick: 0,
            next_second: 0,
            proposals: Vec::new(),
            reads: Vec::new(),
            forwarded: Vec::new(),
            peers: Peers::default(),
            seen,
            term: 0,
        })
    }

    pub(crate) fn status(&self) -> Status {
        self.published.status.borrow().clone()
    }

    pub(crate) fn current_term(&self) -> u64 {
        self.published.status.borrow().term
    }

    pub(crate) fn leads(&self) -> bool {
        self.published.status.borrow().role == Role::Leader
    }

    pub(crate) fn applied(&self) -> u64 {
        *self.published.applied.borrow()
    }

    /// Requests whose callers wait here.
    pub(crate) fn waiting(&self) -> Vec<OpId> {
        self.proposals.iter().map(|p| p.op).chain(self.reads.iter().map(|r| r.op)).collect()
    }

    /// False where the queue is full (I17).
    pub(crate) fn push(&mut self, request: Request) -> bool {
        let room = self.inbox.len() < INBOX_MAX;
        if room {
            self.inbox.push_back(request);
        }
        room
    }

    /// Ticks that are due, as the driver counts them: after a stall, two at most are made up for.
    pub(crate) fn tick(&mut self, counted: Micros) {
        if self.next_tick == 0 {
            self.next_tick = counted + TICK;
            self.next_second = counted + SECOND;
        }
        let mut caught_up = 0;
        while counted >= self.next_tick {
            if caught_up == 2 {
                self.next_tick = counted;
                break;
            }
            self.engine.tick();
            self.next_tick += TICK;
            caught_up += 1;
        }
    }
}

/// A request on its way into the log, as `raft::Cell::propose` carries it.
pub(crate) struct Proposal {
    pub(crate) op: OpId,
    pub(crate) entry: LogEntry,
    pub(crate) ticket: Ticket,
    pub(crate) deadline: Micros,
    pub(crate) step: Step,
}

pub(crate) enum Step {
    Ask,
    Asked(oneshot::Receiver<Result<u64, Rejected>>),
    Remote { until: Micros },
    Appended { term: u64, until: Micros },
    Later { until: Micros },
}

/// A linearizable read that waits for its quorum.
pub(crate) struct Reading {
    pub(crate) op: OpId,
    pub(crate) answer: oneshot::Receiver<u64>,
    pub(crate) deadline: Micros,
}

/// A proposal that another replica sent here.
pub(crate) struct Forwarded {
    pub(crate) from: u64,
    pub(crate) life: u64,
    pub(crate) op: OpId,
    pub(crate) answer: oneshot::Receiver<Result<u64, Rejected>>,
}
