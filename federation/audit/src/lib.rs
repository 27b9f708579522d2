//! The audit log of a cell, as far as it is arithmetic: an RFC 6962 Merkle tree, its proofs, its tiles (C2SP tlog-tiles), its
//! signed heads (C2SP signed-note, tlog-checkpoint, tlog-cosignature), what a record says, and how it is exported.
//!
//! Pure: it never does IO, never reads a clock, holds no key, and never puts a secret into a record: whoever makes one
//! gives it names, numbers and hashes (see [`record`]).
#![forbid(unsafe_code)]
#![warn(missing_docs)]

pub mod note;
pub mod ocsf;
pub mod proof;
pub mod proof_file;
pub mod record;
pub mod tile;
pub mod tree;

pub use note::{Checkpoint, Note, Verifier};
pub use proof::{Nodes, consistency, inclusion, verify_consistency, verify_inclusion};
pub use record::Record;
pub use tree::{Frontier, Hash, leaf_hash, node_hash};
