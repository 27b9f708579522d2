//! A new agent takes over from the one that serves: it gets the listening sockets, so that no connect is refused meanwhile,
//! then the right to write the kernel's tables, and only when it is ready does the other one drain.
//!
//! ```text
//! new -> old  hello        who I am, and the layout of the maps that I know
//! old -> new  welcome      from here on the old one does not enrol, and keeps its stream until the new one has its own
//! new -> old  slices       what the cell says, for as long as the old one carries anything: it follows that, as does whether
//!                          the node was put out
//! new -> old  give         I am admitted and hold a slice
//! old -> new  sockets...   the kernel's tables are not mine any more; here is where connections come in
//! new -> old  serving      my programs and tables are in force, my workloads have their SVIDs: drain
//! old -> new  drained      the connections that I carried: how many ended, and how many I cut
//! ```
//!
//! Until `serving` the old one accepts and carries as before. Whatever goes wrong before it (another protocol, another
//! layout, a program that the verifier refuses, silence, death) leaves the old one in its place: it ends the new one, takes
//! the tables back and puts its own programs and rows in force. Never: two processes that write the kernel's tables.

mod guest;
mod host;
mod succession;

pub use self::guest::{Guest, Relay, call, is_served};
pub use self::host::{Ask, Host};
pub use self::succession::{Heard, Succession, Successor, succession};
use crate::handover::{Frame, Wire};
use ambit_model::{Code, Refusal};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::time::timeout;

/// What both must speak. It changes with the meaning of what is said here, and of the sockets that are handed over.
const PROTOCOL: u32 = 2;
/// For each word that needs nothing but the other process.
const WORD_MAX: Duration = Duration::from_secs(5);
/// From welcome to give: an enrolment by a slow TPM, with a cell that changes its leader.
const PREPARE_MAX: Duration = Duration::from_secs(120);
/// From the sockets to serving: programs, tables, and an SVID for each workload. The kernel's lease is twice as long.
const TAKE_MAX: Duration = Duration::from_secs(30);

const SAID: u8 = 0;
const SLICE: u8 = 1;
const DENIALS: u8 = 2;
const OUT: u8 = 3;

/// A listening socket, or where some are, by what it is for.
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
    /// The annex: not a socket, but the network namespace that the next two are in, with all that is open in it.
    Annex,
    /// Tunnels at pods' addresses; one for each thread that carries.
    AtPods(u16),
    /// Callers outside of the mesh, by address; likewise.
    Strangers(u16),
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
