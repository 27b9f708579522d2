//! How long changes of documents take from this replica's state into the kernels of nodes.
//!
//! Counted is, per node whose stream ends here, the time from when a change of this cell's documents was applied on this
//! replica until the node acknowledged it: in its kernel, and read back. An acknowledgement that covers several changes
//! counts once, for the newest of them. Which changes one is the news of, [`Feed`](super::cuts::Feed) says:
//!
//! - a change that leaves what the node needs as it was is nothing to it, and is not counted;
//! - a node that comes back having been told of a change, here or elsewhere, is not counted for it again;
//! - a node that was away while a change was made is counted with all of its absence, as long as this replica was there
//!   when the change was applied and the agent still holds what it held;
//! - what an agent is given that holds nothing yet is a start, and no propagation: one just started, and at the beginning of
//!   each stream one of a former release.
//!
//! Not seen here: a node that stays away, whose agent's own page says so (`ambit_agent_cell_age_seconds`, and its
//! `ambit_policy_revision` beside the replicas'), and a change that was sent on one stream and is acknowledged on no other.

use std::collections::VecDeque;
use std::ops::RangeInclusive;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Changes whose instants are kept; 24 bytes each. A node that is further behind is told, and counted for, newer ones.
const CHANGES_MAX: usize = 1_024;

/// Upper bounds of the buckets, seconds. A change should take half a second, and must not take 30.
pub const BOUNDS_S: [f64; 13] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];

/// What was counted so far.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Counted {
    /// In each bucket of [`BOUNDS_S`] alone, and last in none of them.
    pub buckets: [u64; BOUNDS_S.len() + 1],
    /// Of all times.
    pub sum: Duration,
}

impl Counted {
    fn add(&mut self, took: Duration) {
        let bucket = BOUNDS_S.iter().position(|bound| took.as_secs_f64() <= *bound).unwrap_or(BOUNDS_S.len());
        if let Some(count) = self.buckets.get_mut(bucket) {
            *count += 1;
        }
        self.sum = self.sum.saturating_add(took);
    }
}

/// See the module.
#[derive(Debug, Default)]
pub struct Propagation(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    /// The newest revision of documents; none before any was seen.
    newest: Option<u64>,
    /// When the last ones were applied here, oldest first.
    changes: VecDeque<(u64, Instant)>,
    counted: Counted,
}

impl Propagation {
    /// The documents are of this revision since `now`. What the first call says was so before, for who knows how long.
    pub fn applied(&self, revision: u64, now: Instant) {
        let mut known = self.lock();
        let before = known.newest;
        known.newest = before.max(Some(revision));
        if before.is_none_or(|before| revision <= before) {
            return;
        }
        if known.changes.len() == CHANGES_MAX {
            known.changes.pop_front();
        }
        known.changes.push_back((revision, now));
    }

    /// One node has what is new of these revisions in its kernel. Returns what was counted for it.
    pub fn acknowledged(&self, news: &RangeInclusive<u64>, now: Instant) -> Option<Duration> {
        let mut known = self.lock();
        let newest = known.changes.partition_point(|(revision, _)| revision <= news.end()).checked_sub(1)?;
        let (_, at) = known.changes.get(newest).filter(|(revision, _)| news.contains(revision))?;
        let took = now.saturating_duration_since(*at);
        known.counted.add(took);
        Some(took)
    }

    /// What was counted so far.
    pub fn counted(&self) -> Counted {
        self.lock().counted.clone()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Applied, (revision, ms); acknowledged, (news, ms), and what is counted for it, ms.
    fn check(applied: &[(u64, u64)], acknowledged: &[(RangeInclusive<u64>, u64, Option<u64>)]) -> Counted {
        let (it, start) = (Propagation::default(), Instant::now());
        for (revision, ms) in applied {
            it.applied(*revision, start + Duration::from_millis(*ms));
        }
        for (news, ms, want) in acknowledged {
            let took = it.acknowledged(news, start + Duration::from_millis(*ms));
            assert_eq!(took, want.map(Duration::from_millis), "{news:?} at {ms} ms");
        }
        it.counted()
    }

    #[test]
    fn each_acknowledgement_counts_once_for_the_newest_change_that_it_is_the_news_of() {
        let changes = [(3, 0), (10, 1_000), (12, 2_000), (20, 5_000)];
        let counted = check(
            &changes,
            &[
                (4..=10, 1_004, Some(4)),
                // Two in one: the newer counts. The numbers between are of other changes than of documents.
                (4..=15, 2_030, Some(30)),
                (13..=19, 4_000, None),
                (16..=25, 125_000, Some(120_000)),
                (21..=30, 126_000, None),
                // What there was when this replica began.
                (1..=9, 126_000, None),
            ],
        );
        assert_eq!(counted.buckets, [1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
        assert_eq!(counted.sum, Duration::from_millis(120_034));
    }

    #[test]
    fn a_revision_said_again_or_from_before_moves_no_instant() {
        check(&[(3, 0), (10, 1_000), (10, 9_000), (5, 9_000)], &[(4..=10, 9_500, Some(8_500))]);
        check(&[(3, 0)], &[(1..=3, 1, None)]);
        check(&[], &[(1..=3, 1, None)]);
    }

    #[test]
    fn the_oldest_instants_go() {
        let max = CHANGES_MAX as u64;
        let applied: Vec<_> = (0..=max + 1).map(|n| (n, n)).collect();
        check(&applied, &[(0..=1, max, None), (0..=2, max, Some(max - 2)), (0..=max + 9, max + 4, Some(3))]);
    }
}
