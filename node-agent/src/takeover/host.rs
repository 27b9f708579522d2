//! The side of the agent that serves.

use super::{
    DENIALS, Heard, OUT, PREPARE_MAX, PROTOCOL, SAID, SLICE, Said, Socket, Sockets, Successor, TAKE_MAX, WORD_MAX, bad,
    broken, say, understood,
};
use crate::handover::{Frame, Wire};
use crate::kernel::KernelHandle;
use ambit_model::Refusal;
use ambit_proto::v1;
use ambit_proto::v1::server_message::Body as Down;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use prost::Message;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};
use tokio::net::UnixListener;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;

/// For a new agent that does not serve to end by itself.
const END_MAX: Duration = Duration::from_millis(500);
/// How often is tried to have the tables back from a process that is being ended.
const BACK_EVERY: Duration = Duration::from_millis(50);

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
    /// Told each time that one did not take over, and all is as it was before.
    pub undone: watch::Sender<()>,
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
                    self.undone.send_replace(());
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
        let heard = match frame.kind {
            SLICE => Heard::Cell(Box::new(Down::Slice(v1::Slice::decode(&frame.content[..]).map_err(malformed)?))),
            DENIALS => {
                Heard::Cell(Box::new(Down::Denials(v1::Denials::decode(&frame.content[..]).map_err(malformed)?)))
            }
            OUT => Heard::Out(frame.content != [0]),
            kind => return Err(bad("a word of this protocol", format!("frame of kind {kind}"))),
        };
        self.successor.tell(heard).await
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
