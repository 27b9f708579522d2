//! The replicated state machine: (state, command) -> state, outcome, table writes.
//!
//! Pure and deterministic: it never does IO, never reads a clock (time is the leader's stamp in the entry, I15), never
//! draws randomness and never iterates over an unordered map. The server and the simulator run this very code.
#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod apply;
pub mod audit;
pub mod authorities;
mod callers;
pub mod command;
pub mod committed;
mod denied;
mod documents;
mod egress;
pub mod external;
mod fit;
pub mod grant;
pub mod lease;
#[cfg(ambit_mutant)]
pub mod mutant;
pub mod objects;
mod read;
mod resolve;
mod result;
mod roles;
pub mod routing;
mod rules;
pub mod sealing;
pub mod slice;
pub mod slicing;
mod state;
mod table;
mod watched;

pub use apply::jwt::{JWT_PUBLISHED_MIN_MS, JWT_PUBLISHED_MS, JWT_SIGNS_MS, JwtDue};
pub use apply::{Beginning, ENDPOINTS_PER_NODE_MAX, NODE_REPORTS_MAX};
pub use command::{
    Command, DocumentKind, DocumentsChange, FetchedBundle, IdVerb, LogEntry, NodeVerb, Nodes, Reply, RoleChange,
};
pub use committed::{Committed, Issuance, JwtIssuance, RevokedLeaves, Subject};
pub use denied::SvidDenials;
pub use roles::FOUNDER;
pub use slice::{Bundles, Slice};
pub use state::{Applied, OwnedName, State};
pub use table::{Row, TableWrite};
pub use watched::{ObjectKey, ObjectKind};

/// An SVID is never valid longer than this after the last good verdict on its node (I6), milliseconds.
pub const UNATTESTED_MAX_MS: u64 = 3_600_000;
/// A leaf ends at least this long before its issuer does (I6), milliseconds.
pub const ISSUER_MARGIN_MS: u64 = 300_000;
/// How far before the entry's stamp a leaf becomes valid (I6 allows 60 s), milliseconds.
pub const NOT_BEFORE_SLACK_MS: u64 = 30_000;
/// A longer step between two entries was time without a leader (it writes one a second), milliseconds.
pub const UNLED_STEP_MS: u64 = 3_000;
/// A node without a verdict for so many intervals of its cluster is late.
pub const LATE_INTERVALS: u64 = 3;
/// A late node is untrusted after this, milliseconds.
pub const LATE_MAX_MS: u64 = 15 * 60_000;
/// How often nodes attest where a cluster says nothing, milliseconds.
pub const ATTEST_INTERVAL_MS: u64 = 30_000;
/// Stretches of verdicts remembered of one node.
pub const VERDICTS_PER_NODE_MAX: usize = 32;
/// Outcomes of requests are remembered this long, milliseconds; a client gives up retrying well before.
pub const DEDUPE_MS: u64 = 600_000;
