//! A new agent takes over from the one that serves: it gets the listening sockets, so that no connect is refused meanwhile,
//! then the right to write the kernel's tables, and only when it is ready does the other one drain.
//!
//! ```text
//! new -> old  hello        who I am, and the layout of the maps that I know
//! old -> new  welcome      from here on the old one neither enrols nor streams: a node has one admission and one stream
//! new -> old  slices       what the cell says, for as long as the old one carries anything: it follows that
//! new -> old  give         I am admitted and hold a slice
//! old -> new  sockets...   the kernel's tables are not mine any more; here is where connections come in
//! new -> old  serving      my programs and tables are in force, my workloads have their SVIDs: drain
//! old -> new  drained      the connections that I carried: how many ended, and how many I cut
//! ```
//!
//! Until `serving` the old one accepts and carries as before. Whatever goes wrong before it (another protocol, another
//! layout, a program that the verifier refuses, silence, death) leaves the old one in its place: it ends the new one, takes
//! the tables back and puts its own programs and rows in force. Never: two processes that write the kernel's tables.

use crate::handover::{Frame, Wire};
use crate::kernel::KernelHandle;
use crate::metrics::METRICS;
use ambit_model::{Code, Refusal};
use ambit_proto::v1;
use ambit_proto::v1::server_message::Body as Down;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use prost::Message;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Mutex, mpsc, oneshot, watch};
use tokio::time::timeout;

/// What both must speak. It changes with the meaning of what is said here, and of the sockets that are handed over.
const PROTOCOL: u32 = 1;
/// For each word that needs nothing but the other process.
const WORD_MAX: Duration = Duration::from_secs(5);
/// From welcome to give: an enrolment by a slow TPM, with a cell that changes its leader.
const PREPARE_MAX: Duration = Duration::from_secs(120);
/// From the sockets to serving: programs, tables, and an SVID for each workload. The kernel's lease is twice as long.
const TAKE_MAX: Duration = Duration::from_secs(30);
/// For a new agent that does not serve to end by itself.
const END_MAX: Duration = Duration::from_millis(500);
/// How often is tried to have the tables back from a process that is being ended.
const BACK_EVERY: Duration = Duration::from_millis(50);
/// Sockets of pods, of threads that carry, and a few.
const SOCKETS_MAX: usize = 2048;

const SAID: u8 = 0;
const SLICE: u8 = 1;
const DENIALS: u8 = 2;

/// A listening socket, by what it is for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Socket {
    /// Tunnels of other nodes; one for each thread that carries, at one address.
    Tunnels(u16),
    /// The SPIFFE Workload API and SDS.
    Workload,
    /// The SPIFFE Broker API.
    Broker,
    /// Figures and health.
    Metrics,
    /// Successors.
    TakeOver,
    /// Captured connections of a pod.
    Capture {
        /// Whose.
        pod: String,
        /// Device and inode of its network namespace.
        netns: (u64, u64),
    },
}

/// Sockets by what they are for.
pub type Sockets = BTreeMap<Socket, OwnedFd>;

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
enum Said {
    Hello { protocol: u32, version: String, layout: String },
    Welcome { version: String },
    Refused { code: String, expected: String, found: String },
    Give,
    Socket(Socket),
    Given { sockets: usize },
    Serving,
    Drained { ended: u64, cut: u64 },
}

fn broken(error: io::Error) -> Refusal {
    Refusal::new(Code::TakeOverRefused, "a word of the other agent", error.to_string())
}

fn bad(expected: &str, found: impl Into<String>) -> Refusal {
    Refusal::new(Code::TakeOverRefused, expected, found)
}

async fn say(wire: &Wire, said: &Said) -> Result<(), Refusal> {
    let text = serde_json::to_vec(said).map_err(|e| bad("a word", e.to_string()))?;
    timeout(WORD_MAX, wire.send(SAID, &text, None)).await.map_err(|e| broken(e.into()))?.map_err(broken)
}

fn understood(frame: &Frame) -> Result<Said, Refusal> {
    let said = (frame.kind == SAID).then(|| serde_json::from_slice(&frame.content).ok()).flatten();
    said.ok_or_else(|| bad("a word of this protocol", format!("frame of kind {}", frame.kind)))
}

/// Where successors call, in a folder of root's alone.
pub fn place(data_dir: &Path) -> PathBuf {
    data_dir.join("takeover").join("agent.sock")
}

/// Listens there.
pub fn listen(data_dir: &Path) -> io::Result<std::os::unix::net::UnixListener> {
    let path = place(data_dir);
    let folder = data_dir.join("takeover");
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder)?;
    std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(0o700))?;
    match std::fs::remove_file(&path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    std::os::unix::net::UnixListener::bind(path)
}

/// What an agent that serves needs to know of who comes after it. Cloning shares.
#[derive(Clone, Debug)]
pub struct Succession {
    present: watch::Receiver<bool>,
    heard: Arc<Mutex<mpsc::Receiver<Down>>>,
}

/// The other side of [`Succession`].
#[derive(Debug)]
pub struct Successor {
    present: watch::Sender<bool>,
    heard: mpsc::Sender<Down>,
}

impl Successor {
    /// Somebody is about to take over: from now on nothing is asked of the cell here.
    pub fn begin(&self) {
        self.present.send_replace(true);
    }
    /// Nobody is, any more.
    pub fn end(&self) {
        self.present.send_replace(false);
    }
    /// What the cell said to whoever takes over.
    ///
    /// # Errors
    /// Nobody hears it.
    pub async fn tell(&self, down: Down) -> Result<(), Refusal> {
        self.heard.send(down).await.map_err(|_| bad("a stream's end that hears", "none"))
    }
}

/// Both.
pub fn succession() -> (Successor, Succession) {
    let (present, is_present) = watch::channel(false);
    let (tell, heard) = mpsc::channel(4);
    let succession = Succession { present: is_present, heard: Arc::new(Mutex::new(heard)) };
    (Successor { present, heard: tell }, succession)
}

impl Default for Succession {
    /// Of one after which nobody comes.
    fn default() -> Self {
        succession().1
    }
}

impl Succession {
    /// Returns once another agent is about to take over.
    pub async fn begun(&self) {
        if self.present.clone().wait_for(|present| *present).await.is_err() {
            std::future::pending().await
        }
    }
    /// Returns once none is.
    pub async fn over(&self) {
        // A sender that is gone leaves the word that it said last: nobody, or that the successor serves.
        if self.present.clone().wait_for(|present| !*present).await.is_err() {
            std::future::pending().await
        }
    }
    /// The next word of the cell that the successor passes on.
    pub async fn heard(&self) -> Option<Down> {
        self.heard.lock().await.recv().await
    }
}

/// What a new agent passes on of what its cell says, the newest of each kind.
#[derive(Clone, Debug)]
pub struct Relay {
    slice: Arc<watch::Sender<Option<v1::Slice>>>,
    denials: Arc<watch::Sender<Option<v1::Denials>>>,
}

impl Relay {
    /// Passes a slice on, while somebody listens.
    pub fn slice(&self, slice: &v1::Slice) {
        if self.slice.receiver_count() > 0 {
            self.slice.send_replace(Some(slice.clone()));
        }
    }
    /// The same for whom to refuse.
    pub fn denials(&self, denials: &v1::Denials) {
        if self.denials.receiver_count() > 0 {
            self.denials.send_replace(Some(denials.clone()));
        }
    }
}

/// What the decision loop is asked by whom it serves.
#[derive(Debug)]
pub enum Ask {
    /// Write nothing to the kernel any more; the captured connections' sockets.
    Park(oneshot::Sender<Vec<(Socket, OwnedFd)>>),
    /// The kernel is yours again, and what is in it may be another's.
    Resume,
}

/// The agent that serves, as its successors meet it.
#[derive(Debug)]
pub struct Host {
    /// What it hands over, beside the sockets of pods.
    pub sockets: Sockets,
    /// Whose tables it writes.
    pub kernel: KernelHandle,
    /// The decision loop.
    pub control: mpsc::Sender<Ask>,
    /// Whom it tells of successors.
    pub successor: Successor,
}

impl Host {
    /// Meets successors until one serves; returns that one's wire, which goes on telling what the cell says.
    pub async fn meet(&self, listener: UnixListener) -> Wire {
        loop {
            let Ok((stream, _)) = listener.accept().await else {
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            };
            let wire = Wire::new(stream);
            match self.hand_over(&wire).await {
                Ok(()) => return wire,
                Err(refusal) => {
                    tracing::warn!(%refusal, "another agent did not take over; this one goes on");
                    let Refusal { code, expected, found, .. } = refusal;
                    let refused = Said::Refused { code: code.as_str().into(), expected, found };
                    // It may be gone.
                    let _ = say(&wire, &refused).await;
                }
            }
        }
    }

    /// After it serves: what the cell says is heard for as long as this one lives.
    pub async fn listen(&self, wire: &Wire) {
        let said = async {
            loop {
                self.pass(wire.next().await.map_err(broken)?).await?;
            }
        };
        let ended: Result<(), Refusal> = said.await;
        tracing::debug!(error = ?ended, "the successor says no more");
    }

    /// Says what became of the connections that it carried; the successor counts them.
    pub async fn drained(&self, wire: &Wire, ended: u64, cut: u64) {
        // Who is gone counts nothing.
        let _ = say(wire, &Said::Drained { ended, cut }).await;
    }

    async fn hand_over(&self, wire: &Wire) -> Result<(), Refusal> {
        let (uid, pid) = wire.peer().map_err(broken)?;
        let own = nix::unistd::geteuid();
        if uid != own.as_raw() {
            return Err(bad("an agent of the same user", format!("uid {uid}")));
        }
        let process = pid.and_then(rustix::process::Pid::from_raw).ok_or_else(|| bad("a process", "none"))?;
        let process = rustix::process::pidfd_open(process, rustix::process::PidfdFlags::empty());
        let process = process.map_err(|e| broken(e.into()))?;
        let first = timeout(WORD_MAX, wire.next()).await.map_err(|e| broken(e.into()))?.map_err(broken)?;
        let version = check_hello(&understood(&first.ok_or_else(|| bad("hello", "its end"))?)?)?;
        tracing::info!(pid, version, "another agent takes over");
        say(wire, &Said::Welcome { version: env!("CARGO_PKG_VERSION").into() }).await?;
        self.successor.begin();
        let done = self.prepared(wire, &process).await;
        if done.is_err() {
            self.successor.end();
        }
        done
    }

    async fn prepared(&self, wire: &Wire, process: &OwnedFd) -> Result<(), Refusal> {
        let late = |what: &str, max: Duration| bad(what, format!("none within {} s", max.as_secs()));
        let give = timeout(PREPARE_MAX, self.until(wire, Said::Give)).await;
        give.map_err(|_| late("an agent that is admitted and holds a slice", PREPARE_MAX))??;
        let taken = async {
            self.give(wire).await?;
            let serving = timeout(TAKE_MAX, self.until(wire, Said::Serving)).await;
            serving.map_err(|_| late("an agent that serves", TAKE_MAX))?
        };
        let taken = taken.await;
        if taken.is_err() {
            self.take_back(process).await;
        }
        taken
    }

    async fn give(&self, wire: &Wire) -> Result<(), Refusal> {
        let (reply, captures) = oneshot::channel();
        let gone = || bad("a decision loop", "none");
        self.control.send(Ask::Park(reply)).await.map_err(|_| gone())?;
        let captures = captures.await.map_err(|_| gone())?;
        self.kernel.park().await;
        let own = self.sockets.iter();
        let all = own.chain(captures.iter().map(|(socket, fd)| (socket, fd)));
        let mut sockets = 0;
        for (socket, fd) in all {
            let text = serde_json::to_vec(&Said::Socket(socket.clone())).map_err(|e| bad("a word", e.to_string()))?;
            let sent = timeout(WORD_MAX, wire.send(SAID, &text, Some(fd.as_fd()))).await;
            sent.map_err(|e| broken(e.into()))?.map_err(broken)?;
            sockets += 1;
        }
        say(wire, &Said::Given { sockets }).await
    }

    /// Ends the other process, which writes the kernel's tables or might, and has them back.
    async fn take_back(&self, process: &OwnedFd) {
        // It may be ending by itself, and shall say why; a pidfd can be read from then on.
        let given = Instant::now();
        while given.elapsed() < END_MAX
            && poll(&mut [PollFd::new(process.as_fd(), PollFlags::POLLIN)], PollTimeout::ZERO) == Ok(0)
        {
            tokio::time::sleep(BACK_EVERY).await;
        }
        let _ = rustix::process::pidfd_send_signal(process, rustix::process::Signal::KILL);
        while let Err(refusal) = self.kernel.resume().await {
            tracing::warn!(%refusal, "the kernel's tables are not this agent's yet");
            tokio::time::sleep(BACK_EVERY).await;
        }
        let _ = self.control.send(Ask::Resume).await;
    }

    async fn until(&self, wire: &Wire, wanted: Said) -> Result<(), Refusal> {
        loop {
            let frame = wire.next().await.map_err(broken)?;
            if frame.as_ref().is_some_and(|frame| frame.kind == SAID) {
                let frame = frame.ok_or_else(|| bad("a word", "none"))?;
                return match understood(&frame)? {
                    said if said == wanted => Ok(()),
                    Said::Refused { code, expected, found } => Err(bad(&expected, format!("{found} ({code})"))),
                    _ => Err(bad("the next word of this protocol", "another")),
                };
            }
            self.pass(frame).await?;
        }
    }

    async fn pass(&self, frame: Option<Frame>) -> Result<(), Refusal> {
        let frame = frame.ok_or_else(|| bad("an agent that lives", "its end"))?;
        let malformed = |e: prost::DecodeError| bad("a message of the cell", e.to_string());
        let down = match frame.kind {
            SLICE => Down::Slice(v1::Slice::decode(&frame.content[..]).map_err(malformed)?),
            DENIALS => Down::Denials(v1::Denials::decode(&frame.content[..]).map_err(malformed)?),
            kind => return Err(bad("a word of this protocol", format!("frame of kind {kind}"))),
        };
        self.successor.tell(down).await
    }
}

/// Its version, where it may take over.
fn check_hello(said: &Said) -> Result<String, Refusal> {
    let Said::Hello { protocol, version, layout } = said else { return Err(bad("hello", "another word")) };
    if *protocol != PROTOCOL {
        return Err(bad(&format!("protocol {PROTOCOL} of taking over"), protocol.to_string()));
    }
    let own = hex::encode(ambit_ebpf::map_layout());
    if *layout != own {
        return Err(bad(&format!("maps of layout {own}: end this agent, and remove the pins"), layout.as_str()));
    }
    Ok(version.chars().take(64).collect())
}

/// A new agent, as it meets the one that serves.
#[derive(Debug)]
pub struct Guest {
    wire: Arc<Wire>,
}

/// Whether an agent serves this node.
pub async fn is_served(data_dir: &Path) -> bool {
    UnixStream::connect(place(data_dir)).await.is_ok()
}

/// Calls the agent that serves this node; none where none does.
///
/// # Errors
/// It refuses: [`Code::TakeOverRefused`].
pub async fn call(data_dir: &Path) -> Result<Option<Guest>, Refusal> {
    let layout = hex::encode(ambit_ebpf::map_layout());
    call_as(data_dir, PROTOCOL, layout).await
}

async fn call_as(data_dir: &Path, protocol: u32, layout: String) -> Result<Option<Guest>, Refusal> {
    let path = place(data_dir);
    let stream = match UnixStream::connect(&path).await {
        Ok(stream) => stream,
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => return Ok(None),
        Err(e) => return Err(broken(e)),
    };
    let wire = Arc::new(Wire::new(stream));
    say(&wire, &Said::Hello { protocol, version: env!("CARGO_PKG_VERSION").into(), layout }).await?;
    // It may meet another one just now.
    let answer = timeout(PREPARE_MAX + TAKE_MAX, wire.next()).await.map_err(|e| broken(e.into()))?.map_err(broken)?;
    match answer.as_ref().map(understood).transpose()? {
        Some(Said::Welcome { version }) => {
            tracing::info!(version, "taking over from the agent that serves");
            Ok(Some(Guest { wire }))
        }
        Some(Said::Refused { code, expected, found }) => Err(bad(&expected, format!("{found} ({code})"))),
        Some(_) => Err(bad("welcome", "another word")),
        None => Err(bad("welcome", "its end: it is ending; start this agent again once it has")),
    }
}

impl Guest {
    /// Passes on what the cell says, until the other one has ended.
    pub fn relay(&self) -> Relay {
        let (slice, mut slices) = watch::channel(None::<v1::Slice>);
        let (denial, mut denials) = watch::channel(None::<v1::Denials>);
        let wire = self.wire.clone();
        tokio::spawn(async move {
            loop {
                let (kind, content) = tokio::select! {
                    // Whom to refuse comes first.
                    biased;
                    Ok(()) = denials.changed() => (DENIALS, denials.borrow_and_update().as_ref().map(Message::encode_to_vec)),
                    Ok(()) = slices.changed() => (SLICE, slices.borrow_and_update().as_ref().map(Message::encode_to_vec)),
                    else => return,
                };
                // It has ended: nobody follows any more.
                if wire.send(kind, &content.unwrap_or_default(), None).await.is_err() {
                    return;
                }
            }
        });
        Relay { slice: Arc::new(slice), denials: Arc::new(denial) }
    }

    /// Asks for the sockets; from the answer on the kernel's tables are this process's to write. One that has died gives what
    /// it gave.
    ///
    /// # Errors
    /// It refuses, or says what makes no sense.
    pub async fn give(&self) -> Result<Sockets, Refusal> {
        let mut sockets = Sockets::new();
        if say(&self.wire, &Said::Give).await.is_err() {
            tracing::warn!("the former agent was gone before it handed anything over");
            return Ok(sockets);
        }
        loop {
            let frame = timeout(TAKE_MAX, self.wire.next()).await.map_err(|e| broken(e.into()))?;
            let Ok(Some(mut frame)) = frame else {
                tracing::warn!(sockets = sockets.len(), "the former agent died while it handed over");
                return Ok(sockets);
            };
            match (understood(&frame)?, frame.descriptor.take()) {
                (Said::Socket(socket), Some(fd)) if sockets.len() < SOCKETS_MAX => drop(sockets.insert(socket, fd)),
                (Said::Given { sockets: given }, None) if given == sockets.len() => return Ok(sockets),
                (Said::Refused { code, expected, found }, _) => {
                    return Err(bad(&expected, format!("{found} ({code})")));
                }
                (said, _) => return Err(bad("a socket, or that these were all", format!("{said:?}"))),
            }
        }
    }

    /// Says that this one serves: the other drains. One that is gone need not hear it.
    pub async fn serving(&self) {
        if say(&self.wire, &Said::Serving).await.is_err() {
            tracing::warn!("the former agent was gone before this one served");
        }
    }

    /// Waits for what became of the connections of the former agent, and counts them.
    pub async fn drained(&self) {
        let said = self.wire.next().await.ok().flatten().as_ref().map(understood);
        match said {
            Some(Ok(Said::Drained { ended, cut })) => {
                METRICS.drained.add(["ended"], ended as f64);
                METRICS.drained.add(["cut"], cut as f64);
                tracing::info!(ended, cut, "the former agent has drained");
            }
            said => {
                tracing::warn!(?said, "the former agent ended without a word; what it carried is lost and not counted")
            }
        }
    }
}
