//! Bounds on what local callers hold open: so many in all, and so many of one user, so that none of them keeps the others
//! out. Root is every user's superior and bounded by the whole alone.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// Places of one kind. Cloning shares.
#[derive(Clone, Debug)]
pub struct Places {
    all_max: usize,
    user_max: usize,
    held: Arc<Mutex<Held>>,
}

#[derive(Debug, Default)]
struct Held {
    all: usize,
    /// A user who holds none has no row.
    by_user: BTreeMap<u32, usize>,
}

/// One of them, until it is dropped.
#[derive(Debug)]
pub struct Place {
    user: u32,
    of: Arc<Mutex<Held>>,
}

impl Places {
    /// `all_max` in all, `user_max` for each uid but root's.
    pub fn new(all_max: usize, user_max: usize) -> Self {
        Self { all_max, user_max, held: Arc::default() }
    }

    /// A place for `user`, if there is one.
    pub fn take(&self, user: u32) -> Option<Place> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let own = held.by_user.get(&user).copied().unwrap_or_default();
        if held.all >= self.all_max || (user != 0 && own >= self.user_max) {
            return None;
        }
        held.all += 1;
        held.by_user.insert(user, own + 1);
        Some(Place { user, of: self.held.clone() })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut held = self.of.lock().unwrap_or_else(PoisonError::into_inner);
        held.all -= 1;
        if let Some(own) = held.by_user.get_mut(&self.user) {
            *own -= 1;
            if *own == 0 {
                held.by_user.remove(&self.user);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_but_root_takes_more_than_a_share_and_nobody_more_than_there_is() {
        let places = Places::new(5, 2);
        let take = |user, n: usize| (0..n).filter_map(|_| places.take(user)).collect::<Vec<_>>();
        let (first, second) = (take(7, 9), take(8, 9));
        assert_eq!((first.len(), second.len()), (2, 2));
        let root = take(0, 9);
        assert_eq!((root.len(), take(9, 1).len()), (1, 0));
        drop(first);
        assert_eq!((take(8, 1).len(), take(7, 9).len()), (0, 2), "each gives its own back");
        let more = take(0, 9);
        assert_eq!(more.len(), 2);
        drop((second, root, more));
        assert_eq!(places.held.lock().unwrap().by_user.len(), 0);
    }
}
