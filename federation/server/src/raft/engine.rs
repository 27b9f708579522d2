//! One replica, sans thread and sans clock: requests, time and peers' messages in; messages and answers out.
//!
//! The driver gives it a thread, a queue and the network; the simulator gives it a virtual clock, a network and a disk with
//! faults. Both run this very code. After an error it is not to be used again: a replica in doubt restarts from disk.

use super::changes::Changes;
use super::clock::{Clocks, Now, TermClock};
use super::core::{self, Input, Outgoing, RaftCore, Rejected, Work};
pub use super::machine::Fatal;
use super::machine::Machine;
use super::metrics::Metrics;
use super::reads::Reads;
use super::status::{Role, Status};
use super::waiters::{RequestKey, Ticket, Waiters};
use super::{Options, StartError};
use crate::store::audit::AuditFiles;
use crate::store::{Change, Disk, Log, StoreError};
use ambit_model::{RaftIndex, ReplicaId, Stamp};
use ambit_state::{LogEntry, State};
use bytes::Bytes;
use raft::StateRole;
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};
use tokio::sync::{oneshot, watch};

/// A snapshot on its way for longer is taken for lost.
const SNAPSHOT_IN_FLIGHT_MAX: Duration = Duration::from_secs(10);
/// How often a leader compares its clock with the others'.
const COMPARE_EVERY: Duration = Duration::from_secs(1);
/// Parked proposals wait for a new leader to apply earlier terms; as many as a follower may hold anyway.
const PARKED_MAX: usize = 1024;

/// What a replica is asked.
pub enum Request {
    /// The entry's stamp is filled in by the leader. Answers once appended.
    Propose(Box<LogEntry>, oneshot::Sender<Result<u64, Rejected>>),
    /// Answers once appended.
    Change(Change, u64, oneshot::Sender<Result<u64, Rejected>>),
    /// Answers the index at which the state is as new as this call.
    Read(oneshot::Sender<u64>),
    /// From a peer: its messages, and its clock when it sent them.
    Frame {
        /// The authenticated sender.
        from: u64,
        /// How often its store was opened.
        incarnation: u64,
        /// Its time of day.
        clock: Stamp,
        /// Raft's own messages.
        messages: Vec<Bytes>,
    },
    /// About a peer, or raft's own business.
    Core(Input),
    /// Answers index and digest.
    Snapshot(oneshot::Sender<(u64, [u8; 32])>),
    /// Ends the driver's thread.
    Stop,
}

/// What callers share with the engine.
pub struct Shared {
    /// As applied.
    pub state: Arc<RwLock<State>>,
    /// What changed lately.
    pub changes: Arc<Changes>,
    /// Who waits for what.
    pub(super) waiters: Waiters,
    /// Counters.
    pub metrics: Metrics,
    /// How often the store was opened.
    pub incarnation: u64,
    /// Records of the audit log; none on a disk without files.
    pub audit: Option<AuditFiles>,
}

impl Shared {
    /// Registers for the outcome of a request, before the request leaves.
    pub fn wait_for(&self, request: RequestKey) -> Ticket {
        self.waiters.register(request)
    }
}

/// What the engine publishes.
pub struct Published {
    /// Its view.
    pub status: watch::Receiver<Status>,
    /// The applied index.
    pub applied: watch::Receiver<u64>,
}

/// A proposal that waits for its new leader, and who asks.
type Parked = (Box<LogEntry>, oneshot::Sender<Result<u64, Rejected>>);

/// Waits for a snapshot: its index, and the state's digest there.
type SnapshotCaller = oneshot::Sender<(u64, [u8; 32])>;

/// The replica.
pub struct Engine<D: Disk> {
    options: Options,
    core: RaftCore<D::Log>,
    machine: Machine<D>,
    shared: Arc<Shared>,
    status: watch::Sender<Status>,
    applied: watch::Sender<u64>,
    clock: Option<TermClock>,
    clocks: Clocks,
    /// As of the last look: this leader's term has its clock, or the clocks of a majority to begin it by.
    may_stamp: bool,
    /// When the last stamp was applied here.
    stamped: Option<Instant>,
    /// When this leader's clock was last compared with the others'.
    compared: Option<Instant>,
    parked: VecDeque<Parked>,
    /// Encoded, and appended together with whatever comes until the next write.
    batch: Vec<Vec<u8>>,
    asking: Vec<oneshot::Sender<Result<u64, Rejected>>>,
    reads: Reads,
    snapshots_sent: HashMap<u64, Instant>,
    /// Since when a snapshot is kept in memory for followers.
    offered: Option<Instant>,
    snapshot_asked: Vec<SnapshotCaller>,
    /// To be told once the snapshot with this digest is on disk.
    snapshot_told: Vec<(SnapshotCaller, [u8; 32])>,
}

/// Takes the messages for peers: before the disk was written, or after.
pub type Send<'a> = &'a mut dyn FnMut(Vec<Outgoing>);

/// A fifth of a heartbeat: timeouts are drawn in ticks, so a tick is the grain that keeps two campaigns apart.
pub fn tick_of(options: &Options) -> Duration {
    (options.heartbeat / 5).max(Duration::from_millis(1))
}

impl<D: Disk> Engine<D> {
    /// Opens the stores and makes the core.
    pub fn open(options: Options, disk: &D) -> Result<Self, StartError> {
        let tick = tick_of(&options);
        let ticks = |d: Duration| usize::try_from(d.as_millis() / tick.as_millis().max(1)).unwrap_or(usize::MAX);
        let (machine, log) = Machine::open(disk, options.id.0)?;
        let incarnation = log.incarnation();
        let config = core::Config {
            id: options.id.0,
            election_ticks: ticks(options.election_timeout),
            heartbeat_ticks: ticks(options.heartbeat),
            applied: machine.applied(),
            seed: options.seed ^ options.id.0.rotate_left(32) ^ incarnation,
        };
        let core = RaftCore::new(&config, log).map_err(|e| StartError::Config(e.to_string()))?;
        let (state, changes) = (machine.state().clone(), machine.changes().clone());
        let (waiters, metrics, audit) = (Waiters::default(), Metrics::default(), machine.audit());
        let shared = Shared { state, changes, waiters, metrics, incarnation, audit };
        let status = watch::Sender::new(status_of(&options, &core, &machine));
        let applied = watch::Sender::new(machine.applied());
        let reads = Reads::new(options.id.0, incarnation);
        let mut engine = Self {
            options,
            core,
            machine,
            shared: Arc::new(shared),
            status,
            applied,
            clock: None,
            clocks: Clocks::default(),
            may_stamp: false,
            stamped: None,
            compared: None,
            parked: VecDeque::new(),
            batch: Vec::new(),
            asking: Vec::new(),
            reads,
            snapshots_sent: HashMap::new(),
            offered: None,
            snapshot_asked: Vec::new(),
            snapshot_told: Vec::new(),
        };
        if engine.machine.membership().voters.iter().eq([&engine.options.id.0]) {
            // The only voter need not wait for anyone.
            let _ = engine.core.step(Input::Campaign);
        }
        Ok(engine)
    }

    /// What callers share with it.
    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Its log.
    pub fn log(&self) -> &D::Log {
        self.core.store()
    }

    /// What it tells about itself.
    pub fn published(&self) -> Published {
        Published { status: self.status.subscribe(), applied: self.applied.subscribe() }
    }

    /// Whether there is something to append at once: a leader that just caught up with its term has parked proposals.
    pub fn is_pressed(&self) -> bool {
        !self.parked.is_empty() && self.may_append()
    }

    /// One tick of raft's clock passed.
    pub fn tick(&mut self) {
        let _ = self.core.step(Input::Tick);
    }

    /// An orderly end: what is on its way to the disk is there when this returns.
    pub fn close(&mut self) -> Result<(), Fatal> {
        self.machine.close()
    }

    /// Takes one request in.
    pub fn take(&mut self, request: Request, now: Now) {
        match request {
            Request::Propose(entry, answer) => self.propose(entry, answer, now),
            Request::Change(change, version, answer) => {
                let outcome = if self.machine.membership().permits(change, version) {
                    self.core.step(Input::Change(change, version)).map(|()| self.core.term())
                } else {
                    Err(Rejected::Stale)
                };
                let _ = answer.send(outcome);
            }
            #[cfg(ambit_mutant)]
            Request::Read(caller) if ambit_state::mutant::is("read-without-quorum") => {
                let _ = caller.send(self.machine.applied());
            }
            Request::Read(caller) => self.reads.add(caller),
            Request::Frame { from, incarnation, clock, messages } => {
                if self.step(Input::Frame { from, incarnation, messages }) {
                    self.clocks.hear(from, clock, now);
                }
            }
            Request::Core(input) => drop(self.step(input)),
            Request::Snapshot(caller) => self.snapshot_asked.push(caller),
            Request::Stop => {}
        }
    }

    fn step(&mut self, input: Input) -> bool {
        match self.core.step(input) {
            Ok(()) => return true,
            Err(Rejected::OldIncarnation) => self.shared.metrics.frame_dropped(),
            Err(e) => tracing::debug!(reason = ?e, "raft input without effect"),
        }
        false
    }

    /// Appends with the leader's stamp. A new leader parks proposals until it has applied earlier terms, so that its
    /// stamps continue theirs, and until it knows the clocks of a majority.
    fn propose(&mut self, mut entry: Box<LogEntry>, answer: oneshot::Sender<Result<u64, Rejected>>, now: Now) {
        if self.core.role() != StateRole::Leader {
            let _ = answer.send(Err(Rejected::NotLeader(self.core.leader())));
            return;
        }
        self.look_at_clocks(now);
        if !self.may_append() {
            if self.parked.len() < PARKED_MAX {
                self.parked.push_back((entry, answer));
            } else {
                let _ = answer.send(Err(Rejected::Busy));
            }
            return;
        }
        let term = self.core.term();
        entry.stamp = self.stamp(term, now);
        match entry.encode() {
            Ok(bytes) => {
                self.batch.push(bytes);
                self.asking.push(answer);
            }
            Err(_) => drop(answer.send(Err(Rejected::Malformed))),
        }
    }

    /// Whether proposals are appended: earlier terms are applied, and there is a time to stamp them with.
    fn may_append(&self) -> bool {
        self.core.leads() && self.may_stamp
    }

    fn look_at_clocks(&mut self, now: Now) {
        let term = self.core.term();
        let begun = self.clock.as_ref().is_some_and(|clock| clock.term == term);
        let voters = &self.machine.membership().voters;
        self.may_stamp = begun || self.clocks.is_majority(self.options.id.0, voters, now);
    }

    /// Appends what was gathered: one message to each peer and one sync for all of it.
    fn append(&mut self) {
        if self.batch.is_empty() {
            return;
        }
        let (batch, term) = (std::mem::take(&mut self.batch), self.core.term());
        let appended = self.core.step(Input::Propose(batch)).map(|()| term);
        for answer in std::mem::take(&mut self.asking) {
            if appended.is_ok() {
                self.shared.metrics.proposal_appended();
            }
            // Whoever asked may have gone.
            let _ = answer.send(appended.clone());
        }
    }

    /// The stamp of now, by the clock that this leader's term began with.
    fn stamp(&mut self, term: u64, now: Now) -> Stamp {
        let running = self.clock.take().filter(|clock| clock.term == term);
        let mut clock = running.unwrap_or_else(|| self.start_clock(term, now));
        let stamp = clock.at(now);
        self.clock = Some(clock);
        stamp
    }

    fn start_clock(&self, term: u64, now: Now) -> TermClock {
        let last = self.shared.state.read().unwrap_or_else(PoisonError::into_inner).stamp();
        let passed = self.stamped.map_or(Duration::ZERO, |at| now.boot.saturating_duration_since(at));
        let floor = last.plus_ms(u64::try_from(passed.as_millis()).unwrap_or(0));
        let median = self.clocks.median(self.options.id.0, &self.machine.membership().voters, now);
        #[cfg(ambit_mutant)]
        let median = if ambit_state::mutant::is("stamp-of-own-wall") { now.wall } else { median };
        #[cfg(ambit_mutant)]
        let floor = if ambit_state::mutant::is("stamp-without-floor") { Stamp(0) } else { floor };
        TermClock::start(term, floor, median, now)
    }

    /// What is due by time rather than by a message.
    pub fn housekeeping(&mut self, now: Now) {
        self.look_at_clocks(now);
        if !self.parked.is_empty() && (self.may_append() || self.core.role() != StateRole::Leader) {
            for (entry, answer) in std::mem::take(&mut self.parked) {
                self.propose(entry, answer, now);
            }
        }
        if let Some(context) = self.reads.ask(now.boot) {
            let _ = self.core.step(Input::ReadIndex(context));
        }
        self.watch_snapshots(now.boot);
        self.compare_clocks(now);
    }

    /// A leader whose clock is off the others' hands over.
    fn compare_clocks(&mut self, now: Now) {
        let recently = self.compared.is_some_and(|at| now.boot.saturating_duration_since(at) < COMPARE_EVERY);
        if recently || !self.may_append() {
            return;
        }
        self.compared = Some(now.boot);
        let term = self.core.term();
        let stamp = self.stamp(term, now);
        let voters = &self.machine.membership().voters;
        if let Some(to) = self.clocks.successor(self.options.id.0, voters, stamp, now) {
            tracing::warn!(to, "this leader's clock or its stamps are off the voters' median: handing over");
            let _ = self.core.step(Input::Transfer(to));
        }
    }

    fn watch_snapshots(&mut self, now: Instant) {
        let awaiting = self.core.awaiting_snapshot();
        self.snapshots_sent.retain(|peer, _| awaiting.contains(peer));
        for peer in awaiting {
            let sent = *self.snapshots_sent.entry(peer).or_insert(now);
            if now.duration_since(sent) >= SNAPSHOT_IN_FLIGHT_MAX {
                self.snapshots_sent.remove(&peer);
                let _ = self.core.step(Input::SnapshotFailed(peer));
            }
        }
        if self.snapshots_sent.is_empty()
            && self.offered.is_some_and(|at| now.duration_since(at) >= SNAPSHOT_IN_FLIGHT_MAX)
        {
            self.core.store().withdraw();
            self.offered = None;
        }
    }

    /// Does all that is to be done: sends, writes, applies, answers.
    pub fn work(&mut self, now: Now, send: Send<'_>) -> Result<(), Fatal> {
        self.append();
        while let Some(work) = self.core.ready() {
            self.perform(work, now, send)?;
        }
        self.reads.finish(self.machine.applied());
        self.snapshots(now)?;
        self.publish();
        Ok(())
    }

    fn perform(&mut self, work: Work, now: Now, send: Send<'_>) -> Result<(), Fatal> {
        let Work { send: early, install, batch, after_flush, apply, reads } = work;
        self.send(early, now, send);
        if let Some((base, bytes)) = install {
            self.machine.install(base, &bytes, self.core.store_mut())?;
            // Its stamp is of now at the earliest: the time that passed since the last one applied here is in it already.
            self.stamped = Some(now.boot);
            // Whoever follows the state must not wait for the next entry.
            self.applied.send_replace(self.machine.applied());
            self.shared.metrics.snapshot_made();
        }
        #[cfg(ambit_mutant)]
        let after_flush = if ambit_state::mutant::is("ack-before-sync") {
            self.send(after_flush.leaked(), now, send);
            crate::store::AfterFlush::new(Vec::new(), batch.number)
        } else {
            after_flush
        };
        for (context, index) in reads {
            self.reads.confirm(&context, index);
        }
        // Durable here already: who waits for these need not wait for the sync of those that follow.
        self.apply(apply, now)?;
        self.reads.finish(self.machine.applied());
        let receipt = self.core.store_mut().persist(batch)?;
        match after_flush.open(&receipt) {
            Ok(messages) => self.send(messages, now, send),
            Err(_) => tracing::error!("a receipt of another batch: acknowledgements withheld"),
        }
        let released = self.core.persisted(&receipt);
        self.send(released.send, now, send);
        self.apply(released.apply, now)?;
        self.core.applied(self.machine.applied());
        Ok(())
    }

    fn apply(&mut self, entries: Vec<core::Ordered>, now: Now) -> Result<(), Fatal> {
        if entries.is_empty() {
            return Ok(());
        }
        let stamp = |shared: &Shared| shared.state.read().unwrap_or_else(PoisonError::into_inner).stamp();
        let before = stamp(&self.shared);
        let outcomes = self.machine.apply(entries, &mut self.core)?;
        if stamp(&self.shared) != before {
            self.stamped = Some(now.boot);
        }
        self.applied.send_replace(self.machine.applied());
        for outcome in outcomes {
            self.shared.waiters.complete(outcome);
        }
        self.machine.store_writes()?;
        Ok(())
    }

    /// Begins a snapshot where one is due, asked for, or needed by a follower; once it is on disk, drops what no one needs
    /// of the log and tells who asked.
    fn snapshots(&mut self, now: Now) -> Result<(), Fatal> {
        if let Some(index) = self.machine.snapshot_written()? {
            self.core.store_mut().compact(index.saturating_sub(self.options.keep_entries))?;
            for (caller, digest) in std::mem::take(&mut self.snapshot_told) {
                let _ = caller.send((index, digest));
            }
        }
        if self.machine.is_writing() {
            return Ok(());
        }
        let wanted = self.core.store().snapshot_wanted();
        let due =
            self.machine.applied().saturating_sub(self.machine.snapshot_index()) >= self.options.snapshot_after_entries;
        if !wanted && !due && self.snapshot_asked.is_empty() {
            return Ok(());
        }
        let applied = self.machine.applied();
        let Some(term) = self.core.store().term_at(applied).filter(|_| applied > 0) else {
            self.snapshot_asked.clear();
            return Ok(());
        };
        let (snapshot, digest) = match self.machine.snapshot(term) {
            Ok(made) => made,
            Err(Fatal::Store(e @ StoreError::TooLarge { .. })) => {
                // The log goes on growing, which is better than no replica at all.
                tracing::error!(error = %e, "no snapshot: the log is kept whole");
                self.machine.defer_snapshot();
                self.snapshot_asked.clear();
                return Ok(());
            }
            Err(fatal) => return Err(fatal),
        };
        self.shared.metrics.snapshot_made();
        if wanted {
            self.core.store().offer(snapshot);
            self.offered = Some(now.boot);
        }
        self.snapshot_told.extend(std::mem::take(&mut self.snapshot_asked).into_iter().map(|caller| (caller, digest)));
        Ok(())
    }

    fn send(&mut self, messages: Vec<Outgoing>, now: Now, send: Send<'_>) {
        for message in &messages {
            if message.snapshot {
                self.snapshots_sent.insert(message.to, now.boot);
            }
        }
        if !messages.is_empty() {
            send(messages);
        }
    }

    fn publish(&mut self) {
        let status = status_of(&self.options, &self.core, &self.machine);
        let metrics = &self.shared.metrics;
        metrics.set_position(status.term, status.commit.0, status.applied.0, status.leader.map_or(0, |l| l.0));
        metrics.set_syncs(self.core.store().sync_time());
        let changed = |old: &mut Status| {
            // Every proposal that waits watches this: waking them all for each batch would cost more than the batch.
            let differs = !old.is_as(&status);
            *old = status;
            differs
        };
        self.status.send_if_modified(changed);
    }
}

fn status_of<D: Disk>(options: &Options, core: &RaftCore<D::Log>, machine: &Machine<D>) -> Status {
    let membership = machine.membership();
    let role = match core.role() {
        StateRole::Leader => Role::Leader,
        StateRole::Candidate | StateRole::PreCandidate => Role::Candidate,
        StateRole::Follower if membership.voters.contains(&options.id.0) => Role::Follower,
        StateRole::Follower => Role::Learner,
    };
    Status {
        id: options.id,
        leader: core.leader().map(ReplicaId),
        term: core.term(),
        commit: RaftIndex(core.commit()),
        applied: RaftIndex(machine.applied()),
        role,
        voters: membership.voters.iter().copied().map(ReplicaId).collect(),
        learners: membership.learners.iter().copied().map(ReplicaId).collect(),
        membership_version: membership.version,
    }
}
