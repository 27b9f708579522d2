//! What a replica knows about its place in the cell.

use ambit_model::{RaftIndex, ReplicaId};

/// What this replica is at the moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Follows a leader, or waits for one.
    Follower,
    /// Asks for votes.
    Candidate,
    /// Orders the log.
    Leader,
    /// Receives the log without a vote.
    Learner,
}

/// A view from one replica; only a [`super::Cell::read_barrier`] makes it current.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// This replica.
    pub id: ReplicaId,
    /// Whom it follows.
    pub leader: Option<ReplicaId>,
    /// Raft's term.
    pub term: u64,
    /// Known to be on a majority.
    pub commit: RaftIndex,
    /// In the state.
    pub applied: RaftIndex,
    /// What it is.
    pub role: Role,
    /// Replicas with a vote, as applied here.
    pub voters: Vec<ReplicaId>,
    /// Replicas without, as applied here.
    pub learners: Vec<ReplicaId>,
    /// Counts membership changes.
    pub membership_version: u64,
}
