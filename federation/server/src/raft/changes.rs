//! What changed lately, by object: so that who followed the state up to a revision, here or at another replica, is told
//! only what came after it.
//!
//! Kept in memory only, and bounded: a replica that just started, or a follower that fell too far behind, knows no more
//! than the state, and who follows is told all of it anew.

use ambit_state::ObjectKey;
use std::collections::{BTreeSet, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use tokio::sync::watch;

/// Changes remembered.
const CHANGES_MAX: usize = 16 * 1024;

/// The changes of one replica.
pub struct Changes {
    held: Mutex<Held>,
    noted: watch::Sender<u64>,
}

struct Held {
    /// Every change after this index is here.
    after: u64,
    upto: u64,
    keys: VecDeque<(u64, ObjectKey)>,
}

/// What came after a revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Since {
    /// These objects changed up to this index, each named once.
    Changed(u64, BTreeSet<ObjectKey>),
    /// Nobody here knows: the revision is too old, or of another history. The state is known up to this index.
    Forgotten(u64),
}

impl Changes {
    /// None so far of a state at `index`.
    pub(super) fn new(index: u64) -> Changes {
        let held = Held { after: index, upto: index, keys: VecDeque::new() };
        Changes { held: Mutex::new(held), noted: watch::Sender::new(index) }
    }

    /// Notes what the entries up to `upto` changed.
    pub(super) fn note(&self, upto: u64, keys: impl IntoIterator<Item = ObjectKey>) {
        let mut held = self.lock();
        held.upto = upto;
        held.keys.extend(keys.into_iter().map(|key| (upto, key)));
        while held.keys.len() > CHANGES_MAX
            && let Some((index, _)) = held.keys.pop_front()
        {
            // Others of the same index may be gone or not: none of it counts.
            held.after = index;
        }
        drop(held);
        self.noted.send_replace(upto);
    }

    /// The state was replaced by another at `index`.
    pub(super) fn forget(&self, index: u64) {
        *self.lock() = Held { after: index, upto: index, keys: VecDeque::new() };
        self.noted.send_replace(index);
    }

    /// What came after `revision`.
    pub fn since(&self, revision: u64) -> Since {
        let held = self.lock();
        if revision < held.after || revision > held.upto {
            return Since::Forgotten(held.upto);
        }
        let newer = held.keys.iter().rev().take_while(|(index, _)| *index > revision);
        Since::Changed(held.upto, newer.map(|(_, key)| key.clone()).collect())
    }

    /// The index up to which changes are noted.
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.noted.subscribe()
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(n: usize) -> ObjectKey {
        ObjectKey::Entry(format!("e{n}").parse().unwrap())
    }

    #[test]
    fn what_came_after_is_told_once_or_is_said_to_be_forgotten() {
        let changes = Changes::new(100);
        assert_eq!(changes.since(100), Since::Changed(100, BTreeSet::new()));
        changes.note(103, [key(1), key(2), key(1)]);
        changes.note(104, []);
        changes.note(110, [key(1)]);
        assert_eq!(changes.since(100), Since::Changed(110, [key(1), key(2)].into()));
        assert_eq!(changes.since(103), Since::Changed(110, [key(1)].into()));
        assert_eq!(changes.since(110), Since::Changed(110, BTreeSet::new()));
        // Before what is held, and of another history: a follower asks with what it was told elsewhere.
        for unknown in [0, 99, 111] {
            assert_eq!(changes.since(unknown), Since::Forgotten(110));
        }
        changes.forget(500);
        assert_eq!(changes.since(110), Since::Forgotten(500));
        assert_eq!(changes.since(500), Since::Changed(500, BTreeSet::new()));
    }

    #[test]
    fn the_oldest_go_and_with_them_all_of_their_index() {
        let changes = Changes::new(0);
        changes.note(1, (0..CHANGES_MAX).map(key));
        assert!(matches!(changes.since(0), Since::Changed(1, _)));
        changes.note(2, [key(0)]);
        assert_eq!(changes.since(0), Since::Forgotten(2));
        assert_eq!(changes.since(1), Since::Changed(2, [key(0)].into()));
        assert_eq!(changes.lock().keys.len(), CHANGES_MAX);
    }
}
