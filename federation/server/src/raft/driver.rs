//! The one thread that owns core, log and state. Everything else talks to it through one bounded queue.
//!
//! Group commit: whatever was queued while the last sync ran goes into the next append. Any failure to write, and any
//! panic, ends the process: a replica in doubt restarts from disk, it does not go on.

use super::clock::TermClock;
use super::core::{Input, Outgoing, RaftCore, Rejected, Work};
use super::machine::{Fatal, Machine};
use super::metrics::Metrics;
use super::reads::Reads;
use super::status::{Role, Status};
use super::transport::Outbox;
use super::waiters::Waiters;
use super::{Options, StartError, core};
use crate::store::log::LogStore;
use crate::store::{Change, StoreError};
use ambit_model::{RaftIndex, ReplicaId};
use ambit_state::{LogEntry, State};
use raft::StateRole;
use std::collections::{HashMap, VecDeque};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};
use tokio::sync::{oneshot, watch};

/// Requests in the queue. Proposals are bounded well below by their permits, so that raft's own messages find room.
const QUEUE_MAX: usize = 4096;
/// Requests taken in before the next append.
const BATCH_MAX: usize = 1024;
/// Ticks made up for after a stall; more would turn a pause of this process into an election.
const TICKS_CAUGHT_UP_MAX: u32 = 2;
/// A snapshot on its way for longer is taken for lost.
const SNAPSHOT_IN_FLIGHT_MAX: Duration = Duration::from_secs(10);
/// Parked proposals wait for a new leader to apply earlier terms; as many as a follower may hold anyway.
const PARKED_MAX: usize = 1024;

/// What the thread is asked.
pub(super) enum Request {
    /// The entry's stamp is filled in by the leader. Answers once appended.
    Propose(Box<LogEntry>, oneshot::Sender<Result<u64, Rejected>>),
    /// Answers once appended.
    Change(Change, u64, oneshot::Sender<Result<u64, Rejected>>),
    /// Answers the index at which the state is as new as this call.
    Read(oneshot::Sender<u64>),
    /// From a peer, or about one.
    Core(Input),
    /// Answers index and digest.
    Snapshot(SnapshotCaller),
    /// Ends the thread.
    Stop,
}

/// The sending side of the queue.
#[derive(Clone)]
pub(super) struct Queue(SyncSender<Request>);

/// Why a request did not get into the queue.
pub(super) enum QueueError {
    Full,
    Stopped,
}

impl Queue {
    pub(super) fn push(&self, request: Request) -> Result<(), QueueError> {
        self.0.try_send(request).map_err(|e| match e {
            TrySendError::Full(_) => QueueError::Full,
            TrySendError::Disconnected(_) => QueueError::Stopped,
        })
    }
    /// Waits for room; only for [`Request::Stop`].
    pub(super) fn push_last(&self, request: Request) {
        let _ = self.0.send(request);
    }
}

/// What callers share with the thread.
pub(super) struct Shared {
    pub(super) state: Arc<RwLock<State>>,
    pub(super) waiters: Waiters,
    pub(super) metrics: Metrics,
    pub(super) incarnation: u64,
}

/// What the thread publishes.
pub(super) struct Published {
    pub(super) status: watch::Receiver<Status>,
    pub(super) applied: watch::Receiver<u64>,
}

pub(super) fn queue() -> (Queue, Receiver<Request>) {
    let (sender, receiver) = std::sync::mpsc::sync_channel(QUEUE_MAX);
    (Queue(sender), receiver)
}

/// Who wants a snapshot, and to hear its index and digest.
type SnapshotCaller = oneshot::Sender<(u64, [u8; 32])>;
/// A proposal that waits for its new leader, and who asks.
type Parked = (Box<LogEntry>, oneshot::Sender<Result<u64, Rejected>>);

pub(super) struct Driver {
    options: Options,
    core: RaftCore<LogStore>,
    machine: Machine,
    shared: Arc<Shared>,
    outbox: Outbox,
    inbox: Receiver<Request>,
    status: watch::Sender<Status>,
    applied: watch::Sender<u64>,
    clock: Option<TermClock>,
    parked: VecDeque<Parked>,
    reads: Reads,
    snapshots_sent: HashMap<u64, Instant>,
    /// Since when a snapshot is kept in memory for followers.
    offered: Option<Instant>,
    snapshot_asked: Vec<SnapshotCaller>,
    /// To be told once the snapshot with this digest is on disk.
    snapshot_told: Vec<(SnapshotCaller, [u8; 32])>,
}

/// Opens the stores and makes the core; the thread starts with [`Driver::spawn`].
pub(super) struct Opened {
    core: RaftCore<LogStore>,
    machine: Machine,
    pub(super) shared: Arc<Shared>,
}

pub(super) fn open(options: &Options) -> Result<Opened, StartError> {
    let tick = tick_of(options);
    let ticks = |d: Duration| usize::try_from(d.as_millis() / tick.as_millis().max(1)).unwrap_or(usize::MAX);
    let (machine, log) = Machine::open(options)?;
    let incarnation = log.incarnation();
    let config = core::Config {
        id: options.id.0,
        election_ticks: ticks(options.election_timeout),
        heartbeat_ticks: ticks(options.heartbeat),
        applied: machine.applied(),
        seed: options.seed ^ options.id.0.rotate_left(32) ^ incarnation,
    };
    let core = RaftCore::new(&config, log).map_err(|e| StartError::Config(e.to_string()))?;
    let state = machine.state().clone();
    let shared = Shared { state, waiters: Waiters::default(), metrics: Metrics::default(), incarnation };
    Ok(Opened { core, machine, shared: Arc::new(shared) })
}

/// A fifth of a heartbeat: timeouts are drawn in ticks, so a tick is the grain that keeps two campaigns apart.
fn tick_of(options: &Options) -> Duration {
    (options.heartbeat / 5).max(Duration::from_millis(1))
}

impl Driver {
    pub(super) fn spawn(
        options: Options,
        opened: Opened,
        inbox: Receiver<Request>,
        outbox: Outbox,
    ) -> Result<(std::thread::JoinHandle<()>, Published), StartError> {
        let Opened { core, machine, shared } = opened;
        let status = watch::Sender::new(status_of(&options, &core, &machine));
        let applied = watch::Sender::new(machine.applied());
        let published = Published { status: status.subscribe(), applied: applied.subscribe() };
        let name = format!("raft-{}", options.id);
        let reads = Reads::new(options.id.0, shared.incarnation);
        let driver = Self {
            options,
            core,
            machine,
            shared,
            outbox,
            inbox,
            status,
            applied,
            clock: None,
            parked: VecDeque::new(),
            reads,
            snapshots_sent: HashMap::new(),
            offered: None,
            snapshot_asked: Vec::new(),
            snapshot_told: Vec::new(),
        };
        let run = move || {
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| driver.run()));
            match outcome {
                Ok(Ok(())) => return,
                Ok(Err(fatal)) => {
                    tracing::error!(error = &fatal as &dyn std::error::Error, "raft cannot go on: the process ends");
                }
                Err(_) => tracing::error!("raft panicked: the process ends"),
            }
            std::process::abort();
        };
        let thread = std::thread::Builder::new().name(name).spawn(run).map_err(StartError::Thread)?;
        Ok((thread, published))
    }

    fn run(mut self) -> Result<(), Fatal> {
        let tick = tick_of(&self.options);
        if self.machine.membership().voters.iter().eq([&self.options.id.0]) {
            // The only voter need not wait for anyone.
            let _ = self.core.step(Input::Campaign);
        }
        let mut next_tick = Instant::now() + tick;
        loop {
            self.work()?;
            // A leader that just caught up with its term has parked proposals to append at once.
            let parked = !self.parked.is_empty() && self.core.leads();
            let wait = if parked { Duration::ZERO } else { next_tick.saturating_duration_since(Instant::now()) };
            match self.inbox.recv_timeout(wait) {
                Ok(Request::Stop) | Err(RecvTimeoutError::Disconnected) => break,
                Ok(request) => self.take(request),
                Err(RecvTimeoutError::Timeout) => {}
            }
            for _ in 1..BATCH_MAX {
                match self.inbox.try_recv() {
                    Ok(Request::Stop) => return self.stop(),
                    Ok(request) => self.take(request),
                    Err(_) => break,
                }
            }
            // After the queue: a stalled process hears its leader's heartbeats before it counts the time without them.
            let mut caught_up = 0;
            while Instant::now() >= next_tick {
                if caught_up == TICKS_CAUGHT_UP_MAX {
                    next_tick = Instant::now();
                    break;
                }
                let _ = self.core.step(Input::Tick);
                next_tick += tick;
                caught_up += 1;
            }
            self.housekeeping();
        }
        self.stop()
    }

    fn stop(self) -> Result<(), Fatal> {
        self.machine.close()
    }

    fn take(&mut self, request: Request) {
        match request {
            Request::Propose(entry, answer) => self.propose(entry, answer),
            Request::Change(change, version, answer) => {
                let outcome = if self.machine.membership().permits(change, version) {
                    self.core.step(Input::Change(change, version)).map(|()| self.core.term())
                } else {
                    Err(Rejected::Stale)
                };
                let _ = answer.send(outcome);
            }
            Request::Read(caller) => self.reads.add(caller),
            Request::Core(input) => match self.core.step(input) {
                Ok(()) => {}
                Err(Rejected::OldIncarnation) => self.shared.metrics.frame_dropped(),
                Err(e) => tracing::debug!(reason = ?e, "raft input without effect"),
            },
            Request::Snapshot(caller) => self.snapshot_asked.push(caller),
            Request::Stop => {}
        }
    }

    /// Appends with the leader's stamp. A new leader parks proposals until it has applied earlier terms, so that its
    /// stamps continue theirs.
    fn propose(&mut self, mut entry: Box<LogEntry>, answer: oneshot::Sender<Result<u64, Rejected>>) {
        if self.core.role() != StateRole::Leader {
            let _ = answer.send(Err(Rejected::NotLeader(self.core.leader())));
            return;
        }
        if !self.core.leads() {
            if self.parked.len() < PARKED_MAX {
                self.parked.push_back((entry, answer));
            } else {
                let _ = answer.send(Err(Rejected::Busy));
            }
            return;
        }
        let term = self.core.term();
        entry.stamp = self.clock(term).now();
        let outcome = match entry.encode() {
            Ok(bytes) => self.core.step(Input::Propose(bytes)).map(|()| term),
            Err(_) => Err(Rejected::Malformed),
        };
        if outcome.is_ok() {
            self.shared.metrics.proposal_appended();
        }
        let _ = answer.send(outcome);
    }

    fn clock(&mut self, term: u64) -> &mut TermClock {
        if self.clock.as_ref().is_some_and(|c| c.term != term) {
            self.clock = None;
        }
        let state = &self.shared.state;
        self.clock.get_or_insert_with(|| {
            let floor = state.read().unwrap_or_else(PoisonError::into_inner).stamp();
            TermClock::start(term, floor)
        })
    }

    /// What is due by time rather than by a message.
    fn housekeeping(&mut self) {
        if !self.parked.is_empty() && (self.core.leads() || self.core.role() != StateRole::Leader) {
            for (entry, answer) in std::mem::take(&mut self.parked) {
                self.propose(entry, answer);
            }
        }
        let now = Instant::now();
        if let Some(context) = self.reads.ask(now) {
            let _ = self.core.step(Input::ReadIndex(context));
        }
        self.watch_snapshots(now);
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

    fn work(&mut self) -> Result<(), Fatal> {
        while let Some(work) = self.core.ready() {
            self.perform(work)?;
        }
        self.reads.finish(self.machine.applied());
        self.snapshots()?;
        self.publish();
        Ok(())
    }

    fn perform(&mut self, work: Work) -> Result<(), Fatal> {
        self.send(work.send);
        if let Some((base, bytes)) = work.install {
            self.machine.install(base, &bytes, self.core.store_mut())?;
            self.shared.metrics.snapshot_made();
        }
        for (context, index) in work.reads {
            self.reads.confirm(&context, index);
        }
        // Durable here already: who waits for these need not wait for the sync of those that follow.
        self.apply(work.apply)?;
        self.reads.finish(self.machine.applied());
        let receipt = self.core.store_mut().persist(work.batch)?;
        match work.after_flush.open(&receipt) {
            Ok(messages) => self.send(messages),
            Err(_) => tracing::error!("a receipt of another batch: acknowledgements withheld"),
        }
        let released = self.core.persisted(&receipt);
        self.send(released.send);
        self.apply(released.apply)?;
        self.core.applied(self.machine.applied());
        Ok(())
    }

    fn apply(&mut self, entries: Vec<core::Ordered>) -> Result<(), Fatal> {
        if entries.is_empty() {
            return Ok(());
        }
        let outcomes = self.machine.apply(entries, &mut self.core)?;
        self.applied.send_replace(self.machine.applied());
        for outcome in outcomes {
            self.shared.waiters.complete(outcome);
        }
        self.machine.store_writes();
        Ok(())
    }

    /// Begins a snapshot where one is due, asked for, or needed by a follower; once it is on disk, drops what no one needs
    /// of the log and tells who asked.
    fn snapshots(&mut self) -> Result<(), Fatal> {
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
            self.offered = Some(Instant::now());
        }
        self.snapshot_told.extend(std::mem::take(&mut self.snapshot_asked).into_iter().map(|caller| (caller, digest)));
        Ok(())
    }

    fn send(&mut self, messages: Vec<Outgoing>) {
        for message in &messages {
            if message.snapshot {
                self.snapshots_sent.insert(message.to, Instant::now());
            }
        }
        if !messages.is_empty() {
            self.outbox.send(messages, &self.shared.metrics);
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

fn status_of(options: &Options, core: &RaftCore<LogStore>, machine: &Machine) -> Status {
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
