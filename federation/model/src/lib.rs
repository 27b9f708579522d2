//! The words of Ambit as types: identities, clusters, nodes, entries, policies, bundles, time and refusals.
//!
//! Pure: this crate never does IO, never reads a clock, never draws randomness and depends on no other Ambit crate.
//! Everything is parsed strictly at the edge and never normalised afterwards.
#![forbid(unsafe_code)]
#![warn(missing_docs)]

pub mod act;
mod address;
pub mod appraisal;
pub mod backup;
pub mod bundle;
mod cidr;
pub mod denial;
mod egress;
pub mod entry;
pub mod extras;
pub mod grant;
pub mod id;
pub mod jwt;
mod peers;
pub mod policy;
pub mod record;
pub mod refusal;
pub mod role;
pub mod routing;
mod stored;
mod stored_service;
mod text;
pub mod time;
pub mod trust;
pub mod utc;

pub use act::{Act, Approval, Approved, ApproverCard, Proposal};
pub use address::{AGENT_NET, Address};
pub use appraisal::AppraisalPolicy;
pub use bundle::{Bundle, Foreign, Own};
pub use denial::{IdDenial, LeafDenial, Serial, serial_number};
pub use entry::{Entry, EntryId, Selector, Selectors};
pub use extras::{DnsName, EntryExtras, Extras};
pub use grant::{FailoverGrant, Naming, Seen, SignedGrant, Vouch};
pub use id::{
    ClusterId, Generation, NodeId, NumericIdentity, ObjectName, RaftIndex, ReplicaId, Revision, SpiffeId, TrustDomain,
};
pub use jwt::{Audience, JwtAuthority, JwtTtl};
pub use policy::{
    Action, Cidr, Egress, Endpoint, Group, Labels, Order, Peers, Policy, PolicyExtras, Protocol, Service,
};
pub use refusal::{Code, Refusal};
pub use role::AdminRole;
pub use routing::{Place, Routing, ServiceName, Traits};
pub use time::{Lifetime, Moment, Stamp, SvidTtl};
pub use trust::TrustVector;
