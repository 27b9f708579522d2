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

/// A view from one replica; who watches it hears of leadership and members, not of every entry. Only a [`super::Cell::read_barrier`] makes it current.
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

impl Status {
    /// Whether both say the same of leadership and members; how far the log went is not looked at.
    pub(super) fn is_as(&self, other: &Status) -> bool {
        (self.id, self.leader, self.term, self.role, self.membership_version)
            == (other.id, other.leader, other.term, other.role, other.membership_version)
            && (&self.voters, &self.learners) == (&other.voters, &other.learners)
    }
}
