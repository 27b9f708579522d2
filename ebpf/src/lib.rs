//! The kernel half of a node: the C programs under `src/bpf`, their committed objects under `objects`, and a typed
//! handle on the maps and links they use.
//!
//! What it does: decides at `connect()` whether a workload may speak to an address, sends an allowed connection to the
//! agent's capture listener, or lets it go directly to a pod of this node, and refuses plain inbound connections to a workload.
//!
//! What it must never do: let a connection pass because something is missing. An unknown cgroup, an unknown address, a
//! missing verdict, an empty table, a lease that ran out, a full map and a dead agent all end in a refusal. No libbpf
//! type leaves this crate, and building it needs no clang.
//!
//! Limits of this version: TCP only (UDP beyond loopback is refused, and IPv6 of who has no such address; IP sockets of any other kind,
//! raw ones and UDP-Lite among them, cannot even be made in the mesh cgroup). `getpeername()` of a multipath TCP socket
//! that calls shows the capture address; an accepted socket shows the client that the agent told of, else the agent's 127.x.y.z, as it
//! does where its listener was made outside of the cgroup. A workload needs a network namespace that the
//! agent attached. Programs on cgroups do not see sockets made before or outside, nor families other than `AF_INET` and
//! `AF_INET6`: their packets are dropped on the node's side of the pod's veth, where nothing that is allowed goes. A pod
//! with another way out than veths to this node cannot be guarded there: it must be nobody. TCP to or from port 15008 of a
//! pod's address (HBONE) turns off to the agent's annex before it reaches the pod, and is dropped where there is none; so does what
//! the tables let in by the caller's address.

mod annex;
mod callers;
mod clients;
mod direct;
mod drift;
mod error;
mod event;
mod hook;
mod inbound;
mod install;
mod ipv6;
mod kernel;
mod layout;
mod netlink;
mod objects;
mod outbound;
mod pins;
mod probe;
mod sys;
mod tables;
mod wire;

pub use annex::Annex;
pub use callers::LetIn;
pub use clients::Leg;
pub use direct::{Direct, Ended, Flow, Local, Place};
pub use drift::Drift;
pub use error::KernelError;
pub use event::{Counters, Event, Reason};
pub use hook::Hooks;
pub use ipv6::AGENT_NET;
pub use kernel::{Capacity, Kernel, Options, OriginalDestination};
pub use netlink::DeviceNews;
pub use objects::{BuiltObject, DECIDE, MANIFEST, OBJECTS};
pub use pins::{map_layout, programs};
pub use probe::{Feature, probe};
pub use sys::{boot_time, cgroup_id, netns_cookie};
pub use tables::{Action, MAX_SERVICE_ENDPOINTS, Range, Service, ServiceEndpoint, Tables, Tier, Verdict, VerdictKey};

/// TCP port, on every address of 127.0.0.0/8 in a workload's network namespace, behind which the agent's capture
/// listener stands. A workload cannot reach it on purpose.
pub const CAPTURE_PORT: u16 = 15001;
