//! The kernel half of a node: the C programs under `src/bpf`, their committed objects under `objects`, and a typed
//! handle on the maps and links they use.
//!
//! What it does: decides at `connect()` whether a workload may speak to an address, sends an allowed connection to the
//! agent's capture listener, and refuses plain inbound connections to a workload.
//!
//! What it must never do: let a connection pass because something is missing. An unknown cgroup, an unknown address, a
//! missing verdict, an empty table, a lease that ran out, a full map and a dead agent all end in a refusal. No libbpf
//! type leaves this crate, and building it needs no clang.
//!
//! Limits of this version: IPv4 TCP only (native IPv6 and UDP beyond loopback are refused; IP sockets of any other kind,
//! raw ones and UDP-Lite among them, cannot even be made in the mesh cgroup), `getsockname()` shows the capture address
//! and so does `getpeername()` of a multipath TCP socket. A workload needs a network namespace that the agent attached,
//! and is refused where it binds a socket to the pod's address before it connects. Not seen are sockets made before
//! their process entered the mesh cgroup, and those of families other than
//! `AF_INET` and `AF_INET6`: `AF_UNIX` and `AF_NETLINK` carry nothing between nodes; `AF_PACKET` needs `CAP_NET_RAW`,
//! `AF_XDP` `CAP_NET_RAW` too, and `AF_VSOCK`, `AF_TIPC` and the like a kernel module: keep those from workloads.

mod error;
mod event;
mod inbound;
mod install;
mod kernel;
mod layout;
mod objects;
mod pins;
mod probe;
mod sys;
mod tables;

pub use error::KernelError;
pub use event::{Counters, Event, Reason};
pub use kernel::{Capacity, Kernel, Options, OriginalDestination};
pub use objects::{BuiltObject, MANIFEST, OBJECTS};
pub use probe::{Feature, probe};
pub use sys::{cgroup_id, netns_cookie};
pub use tables::{Action, MAX_SERVICE_ENDPOINTS, Service, ServiceEndpoint, Tables, Tier, Verdict, VerdictKey};

/// TCP port, on every address of 127.0.0.0/8 in a workload's network namespace, behind which the agent's capture
/// listener stands. A workload cannot reach it on purpose.
pub const CAPTURE_PORT: u16 = 15001;
