//! Who is in the cell, and the rules of changing that: one replica at a time, each change on the version it was asked on.

use raft::eraftpb::ConfState;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// Voters and learners, as of an applied index.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Membership {
    /// Counts the changes that took effect; a change names the version it was asked on and is void on any other.
    pub version: u64,
    /// Replicas that vote.
    pub voters: BTreeSet<u64>,
    /// Replicas that receive the log and do not vote.
    pub learners: BTreeSet<u64>,
}

/// One step of membership.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Change {
    /// A new replica receives the log.
    AddLearner(u64),
    /// A learner gets a vote.
    Promote(u64),
    /// A replica leaves.
    Remove(u64),
}

impl Membership {
    /// The founder alone.
    pub fn of_founder(id: u64) -> Self {
        Self { version: 1, voters: BTreeSet::from([id]), learners: BTreeSet::new() }
    }

    /// Whether `change` holds already.
    pub fn satisfies(&self, change: Change) -> bool {
        match change {
            Change::AddLearner(id) => self.voters.contains(&id) || self.learners.contains(&id),
            Change::Promote(id) => self.voters.contains(&id),
            Change::Remove(id) => !self.voters.contains(&id) && !self.learners.contains(&id),
        }
    }

    /// Whether `change`, asked on `version`, may take effect now. Every replica decides alike.
    pub fn permits(&self, change: Change, version: u64) -> bool {
        self.version == version
            && match change {
                Change::AddLearner(id) => id != 0 && !self.satisfies(change),
                Change::Promote(id) => self.learners.contains(&id),
                Change::Remove(id) => !self.satisfies(change) && !self.voters.iter().eq([&id]),
            }
    }

    /// After `change`, where it is permitted, computed without raft: for a log that is read with no group to apply it.
    #[must_use]
    pub fn after(&self, change: Change, version: u64) -> Self {
        if !self.permits(change, version) {
            return self.clone();
        }
        let mut after = Self { version: self.version + 1, ..self.clone() };
        let (Change::AddLearner(id) | Change::Promote(id) | Change::Remove(id)) = change;
        after.voters.remove(&id);
        after.learners.remove(&id);
        match change {
            Change::AddLearner(id) => after.learners.insert(id),
            Change::Promote(id) => after.voters.insert(id),
            Change::Remove(_) => false,
        };
        after
    }

    /// Raft's form. Joint configurations are never used: one replica at a time keeps majorities overlapping (I16).
    pub fn conf_state(&self) -> ConfState {
        ConfState::from((
            self.voters.iter().copied().collect::<Vec<_>>(),
            self.learners.iter().copied().collect::<Vec<_>>(),
        ))
    }

    /// After a change took effect.
    #[must_use]
    pub fn changed_to(&self, conf: &ConfState) -> Self {
        Self {
            version: self.version + 1,
            voters: conf.voters.iter().copied().collect(),
            learners: conf.learners.iter().copied().collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_permitted_on_their_version_only() {
        let mut cell = Membership::of_founder(1);
        cell.learners.insert(2);
        for (change, version, permitted) in [
            (Change::AddLearner(3), 1, true),
            (Change::AddLearner(3), 0, false),
            (Change::AddLearner(2), 1, false),
            (Change::AddLearner(1), 1, false),
            (Change::AddLearner(0), 1, false),
            (Change::Promote(2), 1, true),
            (Change::Promote(3), 1, false),
            (Change::Promote(1), 1, false),
            (Change::Remove(1), 1, false),
            (Change::Remove(2), 1, true),
            (Change::Remove(9), 1, false),
        ] {
            assert_eq!(cell.permits(change, version), permitted, "{change:?} on {version}");
            let after = cell.after(change, version);
            assert_eq!(after.version, if permitted { 2 } else { 1 }, "{change:?} on {version}");
            assert_eq!(after.satisfies(change), permitted || cell.satisfies(change), "{change:?} on {version}");
        }
    }
}
