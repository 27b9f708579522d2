//! The handle that services hold: propose, read, look, change members.

use super::core::{Input, Rejected};
use super::driver::{self, Driver, Queue, QueueError};
use super::engine::{Engine, Published, Request, Shared};
use super::forward::Forwarder;
use super::peers::{Connections, Network};
use super::transport::{self, Outbox};
use super::waiters::Ticket;
use super::{Changes, Metrics, Options, StartError, Status, found};
use crate::store::Folder;
use crate::store::audit::AuditFiles;
use ambit_model::{Code, RaftIndex, Refusal, ReplicaId, Stamp};
use ambit_state::{Applied, Command, LogEntry, State};
use std::sync::{Arc, Mutex, PoisonError, RwLockReadGuard};
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot, watch};

/// An appended proposal that is not applied by then is proposed again under the same ids.
const RESUBMIT_AFTER: Duration = Duration::from_secs(1);
/// Without a leader, the next look comes with the next change of status, or after this.
const LEADER_WAIT: Duration = Duration::from_millis(25);

/// One replica of a cell. Cheap to clone; the last clone's drop stops the replica, [`Cell::shutdown`] waits for it.
#[derive(Clone)]
pub struct Cell(Arc<Inner>);

struct Inner {
    options: Options,
    queue: Queue,
    shared: Arc<Shared>,
    published: Published,
    connections: Connections,
    forwarder: Forwarder,
    permits: Arc<Semaphore>,
    thread: Mutex<Option<std::thread::JoinHandle<()>>>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        // A full queue is drained by a thread that then finds it disconnected.
        let _ = self.queue.push(Request::Stop);
    }
}

/// Why a proposal was not appended.
enum Unappended {
    /// There is, or may soon be, a leader elsewhere.
    Later,
    /// Asking again would not help.
    Final(Refusal),
}

impl Cell {
    /// Founds a cell of one voter, this replica, and opens it. Within a tokio runtime.
    pub fn bootstrap(options: Options, network: Network) -> Result<Self, StartError> {
        found(&options)?;
        Self::open(options, network)
    }

    /// Opens a store made by [`super::found`] or [`super::prepare_join`] and starts the replica. Within a tokio runtime.
    pub fn open(options: Options, network: Network) -> Result<Self, StartError> {
        let engine = Engine::open(options.clone(), &Folder(options.data_dir.clone()))?;
        let (shared, published) = (engine.shared().clone(), engine.published());
        let (queue, inbox) = driver::queue();
        let connections = Connections::new(network);
        let forwarder = Forwarder::new(connections.clone());
        let runtime = tokio::runtime::Handle::current();
        let outbox = Outbox::new(options.id, shared.incarnation, connections.clone(), queue.clone(), runtime);
        let thread = Driver::spawn(options.clone(), engine, inbox, outbox)?;
        let permits = Arc::new(Semaphore::new(options.proposals_max));
        let thread = Mutex::new(Some(thread));
        Ok(Self(Arc::new(Inner { options, queue, shared, published, connections, forwarder, permits, thread })))
    }

    /// Appends `command` through the leader, wherever it is, and waits until this replica has applied it. Tried again
    /// under the same ids across leader changes until the deadline; the state machine sees to it that it has its effect
    /// once (I10). A `request` of zeros is tried once.
    pub async fn propose(&self, client: [u8; 32], request: [u8; 16], command: Command) -> Result<Applied, Refusal> {
        let _permit = self.permit()?;
        let entry = LogEntry { stamp: Stamp(0), client, request, command };
        let mut ticket = self.0.shared.wait_for((client, request, entry.command_sha256()));
        match tokio::time::timeout(self.0.options.deadline, self.until_applied(&entry, &mut ticket)).await {
            Ok(outcome) => outcome,
            Err(_) => Err(self.no_quorum("the proposal was not applied here in time; it may be later")),
        }
    }

    async fn until_applied(&self, entry: &LogEntry, ticket: &mut Ticket) -> Result<Applied, Refusal> {
        let mut status = self.watch_status();
        let once = entry.request == [0; 16];
        loop {
            let wait = async {
                match self.append(entry).await {
                    Ok(term) => {
                        let lost = status.wait_for(|s| s.term > term);
                        let lost = tokio::time::timeout(RESUBMIT_AFTER, lost).await;
                        if matches!(lost, Ok(Err(_))) { Err(self.stopped()) } else { Ok(true) }
                    }
                    Err(Unappended::Final(refusal)) => Err(refusal),
                    Err(Unappended::Later) => {
                        let change = tokio::time::timeout(LEADER_WAIT, status.changed()).await;
                        if matches!(change, Ok(Err(_))) { Err(self.stopped()) } else { Ok(false) }
                    }
                }
            };
            tokio::select! {
                biased;
                applied = &mut ticket.receiver => return applied.map_err(|_| self.stopped()),
                again = wait => if again? && once {
                    return Err(self.no_quorum("the entry was appended and not applied in its term"));
                }
            }
        }
    }

    async fn append(&self, entry: &LogEntry) -> Result<u64, Unappended> {
        let (leader, me) = (self.status().leader, self.0.options.id);
        match leader {
            Some(leader) if leader == me => {
                let (answer, outcome) = oneshot::channel();
                self.push(Request::Propose(Box::new(entry.clone()), answer)).map_err(Unappended::Final)?;
                match outcome.await {
                    Ok(Ok(term)) => Ok(term),
                    Ok(Err(Rejected::NotLeader(_))) => Err(Unappended::Later),
                    Ok(Err(rejected)) => Err(Unappended::Final(self.refusal_of(rejected))),
                    Err(_) => Err(Unappended::Final(self.stopped())),
                }
            }
            Some(leader) => {
                let command = entry.encode().map_err(Unappended::Final)?;
                self.0.forwarder.propose(leader, command).await.map_err(|refusal| match refusal.code {
                    Code::Unavailable => Unappended::Later,
                    // It is this replica that the leader denies, not the caller, who is to go to another one.
                    Code::PermissionDenied => Unappended::Final(self.not_counted(leader)),
                    _ => Unappended::Final(refusal),
                })
            }
            None => Err(Unappended::Later),
        }
    }

    /// After this, [`Cell::state`] shows every write acknowledged before the call (I3). One quorum round, shared by all
    /// who ask meanwhile.
    pub async fn read_barrier(&self) -> Result<RaftIndex, Refusal> {
        let (caller, index) = oneshot::channel();
        self.push(Request::Read(caller))?;
        match tokio::time::timeout(self.0.options.deadline, index).await {
            Ok(Ok(index)) => Ok(RaftIndex(index)),
            Ok(Err(_)) if self.0.published.applied.has_changed().is_err() => Err(self.stopped()),
            Ok(Err(_)) => Err(self.busy()),
            Err(_) => Err(self.no_quorum("no leader confirmed the read in time")),
        }
    }

    /// The state as applied here. Writers wait meanwhile: copy what is needed and let go; never across an await.
    pub fn state(&self) -> RwLockReadGuard<'_, State> {
        self.0.shared.state.read().unwrap_or_else(PoisonError::into_inner)
    }
    /// Records of the audit log that this replica has.
    pub fn audit(&self) -> Result<&AuditFiles, Refusal> {
        let none = || Refusal::new(Code::Unavailable, "a replica that keeps the audit log", "one without files");
        self.0.shared.audit.as_ref().ok_or_else(none)
    }
    /// What changed here lately.
    pub fn changes(&self) -> &Changes {
        &self.0.shared.changes
    }
    /// This replica's view.
    pub fn status(&self) -> Status {
        self.0.published.status.borrow().clone()
    }
    /// [`Cell::status`], and when it changes.
    pub fn watch_status(&self) -> watch::Receiver<Status> {
        self.0.published.status.clone()
    }
    /// The applied index, and when it rises.
    pub fn watch_applied(&self) -> watch::Receiver<u64> {
        self.0.published.applied.clone()
    }
    /// Counters for the metrics page.
    pub fn metrics(&self) -> &Metrics {
        &self.0.shared.metrics
    }

    /// Writes a snapshot now. Its index and the state's digest there.
    pub async fn snapshot_now(&self) -> Result<(RaftIndex, [u8; 32]), Refusal> {
        let (caller, made) = oneshot::channel();
        self.push(Request::Snapshot(caller))?;
        match made.await {
            Ok((index, digest)) => Ok((RaftIndex(index), digest)),
            Err(_) => Err(Refusal::new(Code::Unavailable, "a replica with a state", "nothing applied yet")),
        }
    }

    /// Tries to lead now, if it may vote.
    pub async fn campaign(&self) -> Result<(), Refusal> {
        self.push(Request::Core(Input::Campaign))
    }

    /// Stops the replica and waits for its thread; other clones answer `unavailable` from then on.
    pub async fn shutdown(self) {
        let thread = self.0.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        let queue = self.0.queue.clone();
        let joined = tokio::task::spawn_blocking(move || {
            queue.push_last(Request::Stop);
            thread.map(std::thread::JoinHandle::join)
        });
        // The thread aborts the process rather than panic.
        let _ = joined.await;
    }

    pub(super) fn options(&self) -> &Options {
        &self.0.options
    }
    /// The connection to another replica that Raft's messages take too.
    pub async fn channel_to(&self, replica: ReplicaId) -> Result<tonic::transport::Channel, Refusal> {
        self.connections().channel(replica).await
    }
    /// What is sent from now on goes over new connections; streams and calls under way go on over theirs.
    pub fn reconnect(&self) {
        self.0.connections.forget_all();
    }
    pub(super) fn connections(&self) -> &Connections {
        &self.0.connections
    }
    pub(super) fn queue(&self) -> &Queue {
        &self.0.queue
    }
    pub(super) fn push(&self, request: Request) -> Result<(), Refusal> {
        self.0.queue.push(request).map_err(|e| match e {
            QueueError::Full => self.busy(),
            QueueError::Stopped => self.stopped(),
        })
    }
    pub(super) fn permit(&self) -> Result<OwnedSemaphorePermit, Refusal> {
        self.0.permits.clone().try_acquire_owned().map_err(|_| self.busy())
    }
    pub(super) fn refusal_of(&self, rejected: Rejected) -> Refusal {
        if rejected == Rejected::Busy {
            self.0.shared.metrics.busy_answered();
        }
        transport::refusal_of(rejected, self.0.options.id)
    }
    pub(super) fn busy(&self) -> Refusal {
        self.0.shared.metrics.busy_answered();
        let found = format!("replica {} with a full queue", self.0.options.id);
        Refusal::new(Code::Busy, "room in the queue", found)
    }
    pub(super) fn stopped(&self) -> Refusal {
        let found = format!("replica {}, which is stopping", self.0.options.id);
        Refusal::new(Code::Unavailable, "a running replica", found)
    }
    fn not_counted(&self, leader: ReplicaId) -> Refusal {
        let found = format!("replica {}, which replica {leader}, the leader, does not count as one", self.0.options.id);
        Refusal::new(Code::Unavailable, "a replica of the cell", found)
    }
    pub(super) fn no_quorum(&self, what: &str) -> Refusal {
        let status = self.status();
        let leader = status.leader.map_or("no leader".to_owned(), |l| format!("replica {l} as leader"));
        let found = format!("{what} (replica {} sees {leader} in term {})", status.id, status.term);
        Refusal::new(Code::Unavailable, "a majority of replicas", found)
    }
}
