//! Raft's messages between replicas: one ordered gRPC stream per peer, and proposals forwarded to the leader.
//!
//! Bytes only: nothing here reads a raft message. Raft sends again what is lost, so queues are short and drop when full;
//! the core is told, and treats the peer as one to probe.

use super::cell::Cell;
use super::clock::Now;
use super::core::{Input, Outgoing, Rejected};
use super::driver::{Queue, QueueError};
use super::engine::Request;
use super::forward::PROPOSALS_MAX;
use super::metrics::Metrics;
use super::peers::Connections;
use crate::store::Change;
use ambit_model::{Code, Refusal, ReplicaId, Stamp};
use ambit_proto::status::{from_status, to_status};
use ambit_proto::v1::member_change::Step;
use ambit_proto::v1::raft_client::RaftClient;
use ambit_proto::v1::raft_server::{self, RaftServer};
use ambit_proto::v1::{MemberChange, ProposeOutcome, ProposeRequest, ProposeResponse, RaftAck, RaftFrame};
use ambit_state::LogEntry;
use futures::StreamExt;
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tonic::{Response, Status, Streaming};

/// Frames that wait for one peer.
const FRAMES_MAX: usize = 64;
/// Messages of a Ready share a frame up to here; one message may be larger (a snapshot).
const FRAME_BYTES: usize = 4 * 1024 * 1024;
/// The largest message either side takes: a snapshot and its envelope.
const MESSAGE_BYTES_MAX: usize = crate::store::snapshot::SNAPSHOT_BYTES_MAX + 1024 * 1024;
/// Messages in one frame, against a peer gone mad.
const FRAME_MESSAGES_MAX: usize = 4096;
/// Between attempts to reach a peer: short, because a returning peer waits for it.
const BACKOFF: std::ops::RangeInclusive<Duration> = Duration::from_millis(20)..=Duration::from_millis(200);
/// How long an incoming frame waits for room in the queue before its stream is refused.
const ROOM_WAIT: Duration = Duration::from_millis(200);
/// The leader answers a forwarded proposal once it is appended, which is at once.
const FORWARD_TIMEOUT: Duration = Duration::from_secs(2);

/// Maps what the TLS layer proved about a caller to its replica id. A caller that is no replica is refused.
pub type Authorise = Arc<dyn Fn(&tonic::Extensions) -> Result<ReplicaId, Refusal> + Send + Sync>;

/// The `Raft` service of this replica, for the lead's router. Only other replicas may reach it.
pub fn service(cell: Cell, authorise: Authorise) -> RaftServer<RaftService> {
    RaftServer::new(RaftService { cell, authorise })
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX)
}

/// The driver's way out. Owned by its thread; one task per peer carries the frames.
pub(super) struct Outbox {
    from: ReplicaId,
    incarnation: u64,
    connections: Connections,
    queue: Queue,
    runtime: tokio::runtime::Handle,
    peers: HashMap<u64, mpsc::Sender<RaftFrame>>,
}

impl Outbox {
    pub(super) fn new(
        from: ReplicaId,
        incarnation: u64,
        connections: Connections,
        queue: Queue,
        runtime: tokio::runtime::Handle,
    ) -> Self {
        Self { from, incarnation, connections, queue, runtime, peers: HashMap::new() }
    }

    /// Queues all messages, in order per peer. Never waits.
    pub(super) fn send(&mut self, messages: Vec<Outgoing>, metrics: &Metrics) {
        let mut by_peer: BTreeMap<u64, Vec<Outgoing>> = BTreeMap::new();
        for message in messages {
            by_peer.entry(message.to).or_default().push(message);
        }
        for (to, messages) in by_peer {
            let snapshot = messages.iter().any(|m| m.snapshot);
            let mut lost = false;
            for part in frames(messages) {
                let clock_ms = Now::read().wall.0;
                let frame = RaftFrame { from: self.from.0, incarnation: self.incarnation, messages: part, clock_ms };
                lost |= self.peer(to).try_send(frame).is_err();
            }
            if lost {
                metrics.frame_dropped();
                report(&self.queue, to, snapshot);
            }
        }
    }

    fn peer(&mut self, to: u64) -> &mpsc::Sender<RaftFrame> {
        self.peers.entry(to).or_insert_with(|| {
            let (sender, frames) = mpsc::channel(FRAMES_MAX);
            let courier =
                Courier { peer: ReplicaId(to), connections: self.connections.clone(), queue: self.queue.clone() };
            // Ends when the outbox, and with it the sender, is dropped.
            self.runtime.spawn(courier.run(frames));
            sender
        })
    }
}

fn frames(messages: Vec<Outgoing>) -> Vec<Vec<Vec<u8>>> {
    let (mut out, mut part, mut size) = (Vec::new(), Vec::new(), 0);
    for message in messages {
        if !part.is_empty() && (size + message.bytes.len() > FRAME_BYTES || part.len() == FRAME_MESSAGES_MAX) {
            out.push(std::mem::take(&mut part));
            size = 0;
        }
        size += message.bytes.len();
        part.push(message.bytes);
    }
    if !part.is_empty() {
        out.push(part);
    }
    out
}

fn report(queue: &Queue, peer: u64, snapshot: bool) {
    // A full queue means that raft hears of the peer's silence by itself, later.
    let _ = queue.push(Request::Core(Input::Unreachable(peer)));
    if snapshot {
        let _ = queue.push(Request::Core(Input::SnapshotFailed(peer)));
    }
}

/// Carries frames to one peer.
struct Courier {
    peer: ReplicaId,
    connections: Connections,
    queue: Queue,
}

/// The driver's queue for one peer: read by the connection itself, for each task on the way would cost every frame a
/// wake-up.
type Frames = Arc<Mutex<mpsc::Receiver<RaftFrame>>>;

fn lock(frames: &Frames) -> MutexGuard<'_, mpsc::Receiver<RaftFrame>> {
    frames.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Courier {
    /// Ends when this replica stops.
    async fn run(self, frames: mpsc::Receiver<RaftFrame>) {
        let frames: Frames = Arc::new(Mutex::new(frames));
        let mut backoff = *BACKOFF.start();
        while let Some(first) = futures::future::poll_fn(|cx| lock(&frames).poll_recv(cx)).await {
            let started = tokio::time::Instant::now();
            let why = self.stream(first, &frames).await;
            if lock(&frames).is_closed() {
                return;
            }
            tracing::debug!(peer = %self.peer, reason = %why, "stream to replica ended");
            self.connections.forget(self.peer);
            // Whether a snapshot was among what got lost is not known here: raft ignores the report if not.
            report(&self.queue, self.peer.0, true);
            let gone = self.tell_if_gone().await;
            backoff =
                if started.elapsed() > *BACKOFF.end() { *BACKOFF.start() } else { (backoff * 2).min(*BACKOFF.end()) };
            tokio::time::sleep(backoff).await;
            if !gone {
                // A process that is being ended may close its connections before it stops listening.
                self.tell_if_gone().await;
            }
            // Stale by now, and raft sends again.
            while lock(&frames).try_recv().is_ok() {}
        }
    }

    /// Whether the peer's process is known to be dead; then the core hears of it.
    async fn tell_if_gone(&self) -> bool {
        let gone = self.connections.is_refused(self.peer).await;
        if gone {
            let _ = self.queue.push(Request::Core(Input::Gone(self.peer.0)));
        }
        gone
    }

    /// Sends until the peer or the way to it fails; why it did.
    async fn stream(&self, first: RaftFrame, frames: &Frames) -> Refusal {
        let channel = match self.connections.channel(self.peer).await {
            Ok(channel) => channel,
            Err(refusal) => return refusal,
        };
        let mut client = RaftClient::new(channel).max_encoding_message_size(MESSAGE_BYTES_MAX);
        let over = Arc::new(AtomicBool::new(false));
        let more = {
            let (frames, over) = (frames.clone(), over.clone());
            // A connection may keep what it sends from longer than the call: by then the frames are another's.
            futures::stream::poll_fn(move |cx| match over.load(Ordering::Acquire) {
                true => Poll::Ready(None),
                false => lock(&frames).poll_recv(cx),
            })
        };
        let ended = client.exchange(futures::stream::iter([first]).chain(more)).await;
        over.store(true, Ordering::Release);
        match ended {
            Ok(_) => Refusal::new(Code::Unavailable, "a stream that stays open", "the replica ended it"),
            Err(status) => from_status(&status),
        }
    }
}

/// Asks the leader to append what is in `request`: for each, the term in which it did.
pub(super) async fn forward(
    connections: &Connections,
    leader: ReplicaId,
    request: ProposeRequest,
) -> Result<Vec<Result<u64, Refusal>>, Refusal> {
    let asked = request.commands.len() + usize::from(request.change.is_some());
    let channel = connections.channel(leader).await?;
    let mut client = RaftClient::new(channel).max_encoding_message_size(MESSAGE_BYTES_MAX);
    let refusal = match tokio::time::timeout(FORWARD_TIMEOUT, client.propose(request)).await {
        Ok(Ok(answer)) => {
            let outcomes: Vec<_> = answer.into_inner().outcomes.into_iter().map(outcome_from_wire).collect();
            if outcomes.len() == asked {
                return Ok(outcomes);
            }
            Refusal::new(Code::Internal, format!("{asked} outcomes"), outcomes.len().to_string())
        }
        Ok(Err(status)) => {
            let refusal = from_status(&status);
            if status.metadata().is_empty() || refusal.code == Code::Unavailable {
                connections.forget(leader);
            }
            // The connection was opened under a leaf that ended since, or that the leader does not take: it says nothing
            // of what was asked.
            if matches!(refusal.code, Code::Unauthenticated | Code::PermissionDenied) {
                connections.forget(leader);
                return Err(Refusal::new(Code::Unavailable, "a connection that the leader takes", refusal.found));
            }
            refusal
        }
        Err(_) => {
            connections.forget(leader);
            Refusal::new(Code::Unavailable, "an answer from the leader", format!("replica {leader} is silent"))
        }
    };
    Err(refusal)
}

fn outcome_to_wire(outcome: Result<u64, Refusal>) -> ProposeOutcome {
    match outcome {
        Ok(term) => ProposeOutcome { term, ..ProposeOutcome::default() },
        Err(r) => ProposeOutcome { term: 0, code: r.code.as_str().to_owned(), expected: r.expected, found: r.found },
    }
}

fn outcome_from_wire(wire: ProposeOutcome) -> Result<u64, Refusal> {
    if wire.code.is_empty() {
        return Ok(wire.term);
    }
    Err(Refusal::new(Code::from_text(&wire.code).unwrap_or(Code::Internal), wire.expected, wire.found))
}

/// A change as it travels.
pub(super) fn change_to_wire(change: Change, version: u64) -> MemberChange {
    let step = match change {
        Change::AddLearner(id) => Step::AddLearner(id),
        Change::Promote(id) => Step::Promote(id),
        Change::Remove(id) => Step::Remove(id),
    };
    MemberChange { version, step: Some(step) }
}

fn change_from_wire(wire: &MemberChange) -> Result<Change, Refusal> {
    match wire.step {
        Some(Step::AddLearner(id)) => Ok(Change::AddLearner(id)),
        Some(Step::Promote(id)) => Ok(Change::Promote(id)),
        Some(Step::Remove(id)) => Ok(Change::Remove(id)),
        None => Err(Refusal::new(Code::BadRequest, "a step of membership", "none")),
    }
}

type Appended = Result<u64, Rejected>;
/// An answer to come, and the permit that is held until then.
type Asked = (oneshot::Receiver<Appended>, tokio::sync::OwnedSemaphorePermit);

/// Serves other replicas.
pub struct RaftService {
    cell: Cell,
    authorise: Authorise,
}

#[tonic::async_trait]
impl raft_server::Raft for RaftService {
    async fn exchange(&self, request: tonic::Request<Streaming<RaftFrame>>) -> Result<Response<RaftAck>, Status> {
        let peer = (self.authorise)(request.extensions()).map_err(|r| to_status(&r))?;
        let mut frames = request.into_inner();
        while let Some(frame) = frames.message().await? {
            let input = input_of(peer, frame).map_err(|r| to_status(&r))?;
            self.take(input).await.map_err(|r| to_status(&r))?;
        }
        Ok(Response::new(RaftAck {}))
    }

    async fn propose(&self, request: tonic::Request<ProposeRequest>) -> Result<Response<ProposeResponse>, Status> {
        (self.authorise)(request.extensions()).map_err(|r| to_status(&r))?;
        let outcomes = self.append(request.into_inner()).await.map_err(|r| to_status(&r))?;
        let outcomes = outcomes.into_iter().map(outcome_to_wire).collect();
        Ok(Response::new(ProposeResponse { leader: self.cell.status().id.0, outcomes }))
    }
}

impl RaftService {
    /// Waits a little for room: refusing a whole stream costs more than a moment of back-pressure.
    async fn take(&self, input: Frame) -> Result<(), Refusal> {
        let deadline = tokio::time::Instant::now() + ROOM_WAIT;
        loop {
            let Frame { from, incarnation, clock, messages } = input.clone();
            match self.cell.queue().push(Request::Frame { from, incarnation, clock, messages }) {
                Ok(()) => return Ok(()),
                Err(QueueError::Stopped) => return Err(self.cell.stopped()),
                Err(QueueError::Full) if tokio::time::Instant::now() >= deadline => return Err(self.cell.busy()),
                Err(QueueError::Full) => tokio::time::sleep(Duration::from_millis(2)).await,
            }
        }
    }

    /// Queues all of them before it waits for the first.
    async fn append(&self, request: ProposeRequest) -> Result<Vec<Result<u64, Refusal>>, Refusal> {
        if request.commands.len() > PROPOSALS_MAX {
            let found = request.commands.len().to_string();
            return Err(Refusal::new(Code::BadRequest, format!("at most {PROPOSALS_MAX} proposals in a call"), found));
        }
        let change = |wire: MemberChange| {
            let change = change_from_wire(&wire)?;
            self.ask(|answer| Request::Change(change, wire.version, answer))
        };
        let propose = |command: &Vec<u8>| {
            let entry = Box::new(LogEntry::decode(command)?);
            self.ask(|answer| Request::Propose(entry, answer))
        };
        let asked: Vec<_> = request.commands.iter().map(propose).chain(request.change.map(change)).collect();
        let mut outcomes = Vec::with_capacity(asked.len());
        for one in asked {
            outcomes.push(match one {
                Ok((outcome, _permit)) => match outcome.await {
                    Ok(outcome) => outcome.map_err(|rejected| self.cell.refusal_of(rejected)),
                    Err(_) => Err(self.cell.stopped()),
                },
                Err(refusal) => Err(refusal),
            });
        }
        Ok(outcomes)
    }

    fn ask(&self, request: impl FnOnce(oneshot::Sender<Appended>) -> Request) -> Result<Asked, Refusal> {
        let permit = self.cell.permit()?;
        let (answer, outcome) = oneshot::channel();
        self.cell.push(request(answer))?;
        Ok((outcome, permit))
    }
}

/// A frame whose sender is who it says.
#[derive(Clone)]
struct Frame {
    from: u64,
    incarnation: u64,
    clock: Stamp,
    messages: Vec<bytes::Bytes>,
}

fn input_of(peer: ReplicaId, frame: RaftFrame) -> Result<Frame, Refusal> {
    if frame.from != peer.0 {
        let found = format!("replica {} in a frame of replica {peer}", frame.from);
        return Err(Refusal::new(Code::PermissionDenied, "frames of the caller itself", found));
    }
    if frame.messages.len() > FRAME_MESSAGES_MAX {
        let found = frame.messages.len().to_string();
        return Err(Refusal::new(Code::BadRequest, format!("at most {FRAME_MESSAGES_MAX} messages in a frame"), found));
    }
    let messages = frame.messages.into_iter().map(bytes::Bytes::from).collect();
    Ok(Frame { from: frame.from, incarnation: frame.incarnation, clock: Stamp(frame.clock_ms), messages })
}

/// What the core's answer means to a caller.
pub(super) fn refusal_of(rejected: Rejected, id: ReplicaId) -> Refusal {
    match rejected {
        Rejected::NotLeader(leader) => {
            let found = match leader {
                Some(leader) => format!("replica {id}, which follows replica {leader}"),
                None => format!("replica {id}, which knows no leader"),
            };
            Refusal::new(Code::Unavailable, "the leader", found)
        }
        Rejected::Busy => Refusal::new(Code::Busy, "room for a proposal", "too much that is not committed yet"),
        Rejected::Stale => Refusal::new(Code::StaleRevision, "the membership it was asked on", "another one"),
        Rejected::Behind(lag) => {
            Refusal::new(Code::Unavailable, "a learner that has caught up", format!("{lag} entries to go"))
        }
        Rejected::Malformed | Rejected::OldIncarnation => {
            Refusal::new(Code::BadRequest, "something raft can take", "something else")
        }
    }
}
