//! The cell's Raft group: a sans-IO core, the engine around it, the thread that drives it, and the cheap handle the services
//! hold.
//!
//! raft-rs and protobuf types stop at this module and `store`. Nothing here decides about identity or policy: that is
//! `ambit_state`, applied in log order by the one driver thread.

mod cell;
mod changes;
mod clock;
pub mod core;
mod driver;
pub mod engine;
mod forward;
mod machine;
mod membership;
mod metrics;
mod peers;
mod reads;
pub mod rebase;
mod status;
pub mod transport;
pub mod waiters;

pub use cell::Cell;
pub use changes::{Changes, Since};
pub use clock::Now;
pub use metrics::Metrics;
pub use peers::{ChannelFactory, Network, PeerDirectory};
pub use status::{Role, Status};

use crate::store::{Disk, Folder, StoreError};
use ambit_model::ReplicaId;
use std::path::PathBuf;
use std::time::Duration;

/// How one replica runs. Everything has a bound; [`Options::new`] gives the defaults.
#[derive(Clone, Debug)]
pub struct Options {
    /// This replica, 1 or greater.
    pub id: ReplicaId,
    /// Holds `log/`, `tables/` and `snapshot/`.
    pub data_dir: PathBuf,
    /// A follower campaigns after one to two of these without a leader.
    pub election_timeout: Duration,
    /// How often a leader speaks when idle.
    pub heartbeat: Duration,
    /// Proposals waiting at once on this replica, its own and forwarded ones; above it `busy` (I17).
    pub proposals_max: usize,
    /// Applied entries past the last snapshot that make a new one.
    pub snapshot_after_entries: u64,
    /// Entries kept behind a snapshot for slow followers.
    pub keep_entries: u64,
    /// A proposal or barrier is answered within this, if only by `unavailable`.
    pub deadline: Duration,
    /// Seed of the election timeouts; mixed with id and incarnation.
    pub seed: u64,
}

impl Options {
    /// The defaults: 300 ms elections, 50 ms heartbeats, 1,024 proposals, snapshots after 100,000 entries
    /// (as etcd) keeping 10,000.
    pub fn new(id: ReplicaId, data_dir: PathBuf) -> Self {
        Self {
            id,
            data_dir,
            election_timeout: Duration::from_millis(300),
            heartbeat: Duration::from_millis(50),
            proposals_max: 1024,
            snapshot_after_entries: 100_000,
            keep_entries: 10_000,
            deadline: Duration::from_secs(5),
            seed: 0,
        }
    }
}

/// Why a replica cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The durable data does not permit it; see the variant. A damaged store never serves and never votes (I14).
    #[error("the replica's store")]
    Store(#[from] StoreError),
    /// The state in the snapshot does not import.
    #[error("the state machine refused its own snapshot: {0}")]
    State(ambit_model::Refusal),
    /// The configuration contradicts itself.
    #[error("raft configuration: {0}")]
    Config(String),
    /// The driver thread.
    #[error("starting the driver thread")]
    Thread(#[source] std::io::Error),
}

/// Creates the store of the first replica of a new cell: one voter, itself, and an empty state. Refuses an existing store.
pub fn found(options: &Options) -> Result<(), StartError> {
    found_on(&Folder(options.data_dir.clone()), options.id)
}

/// Creates the empty store of a replica that joins an existing cell: it has no vote and no members until the leader sends
/// its snapshot. Refuses an existing store, so that a replica that lost its disk is not mistaken for a new one (I14).
pub fn prepare_join(options: &Options) -> Result<(), StartError> {
    prepare_join_on(&Folder(options.data_dir.clone()), options.id)
}

/// [`found`], on any disk.
pub fn found_on(disk: &impl Disk, id: ReplicaId) -> Result<(), StartError> {
    machine::found(disk, id.0)
}

/// [`prepare_join`], on any disk.
pub fn prepare_join_on(disk: &impl Disk, id: ReplicaId) -> Result<(), StartError> {
    machine::prepare_join(disk, id.0)
}

#[cfg(test)]
mod cell_tests;
#[cfg(test)]
mod engine_tests;
