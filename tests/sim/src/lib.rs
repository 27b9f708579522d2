//! The simulator: replicas of the real code on a virtual clock, network and disk, under faults drawn from a seed, beside
//! an oracle that judges the invariants of design.md section 9.
//!
//! A seed is a run: the same to the last event, on any machine. It runs no socket, no thread and no real clock.
#![forbid(unsafe_code)]

mod card;
mod client;
mod cosigning;
mod dice;
mod faults;
mod federation;
mod grants;
mod host;
mod lies;
mod load;
mod network;
mod oracle;
mod peering;
mod plan;
mod queue;
mod recovery;
mod requests;
mod run;
mod tally;
mod template;
mod turn;
mod world;

pub use card::made as cards_made;
pub use run::{Counts, Failure, ONE_CELL, Outcome, Simulator};
