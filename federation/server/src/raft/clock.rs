//! The leader's stamps, and what the other voters' clocks say of its own (I15).

use ambit_model::Stamp;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Both of a machine's clocks, read at once.
#[derive(Clone, Copy, Debug)]
pub struct Now {
    /// Runs evenly from the machine's start, whatever becomes of the other.
    pub boot: Instant,
    /// What the machine takes for the time of day.
    pub wall: Stamp,
}

impl Now {
    /// As they are.
    pub fn read() -> Now {
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Now { boot: Instant::now(), wall: Stamp(u64::try_from(wall.as_millis()).unwrap_or(u64::MAX)) }
    }
}

/// A clock that was not heard for longer is not counted.
const HEARD_MAX: Duration = Duration::from_secs(10);
/// A leader whose clock is further off the voters' median hands over.
const OFF_MAX_MS: i64 = 2_000;

/// The other voters' clocks, as their frames say; the way here makes them look slow by its length. They are carried on by this
/// machine's boot clock: its time of day may be set at any moment, and must not move what it heard of the others.
#[derive(Default)]
pub(super) struct Clocks {
    heard: BTreeMap<u64, Heard>,
}

struct Heard {
    theirs: Stamp,
    at: Instant,
}

impl Heard {
    fn age(&self, now: Now) -> Duration {
        now.boot.saturating_duration_since(self.at)
    }
    /// Theirs less ours, milliseconds.
    fn offset(&self, now: Now) -> i64 {
        let theirs = i128::from(self.theirs.0) + i128::try_from(self.age(now).as_millis()).unwrap_or(0);
        i64::try_from(theirs - i128::from(now.wall.0)).unwrap_or(i64::MAX)
    }
}

impl Clocks {
    pub(super) fn hear(&mut self, from: u64, theirs: Stamp, now: Now) {
        self.heard.insert(from, Heard { theirs, at: now.boot });
    }

    /// The offsets of the voters heard lately, our own among them, in order.
    fn offsets(&self, me: u64, voters: &BTreeSet<u64>, now: Now) -> Vec<(i64, u64)> {
        let lately = |h: &Heard| h.age(now) <= HEARD_MAX;
        let others = self.heard.iter().filter(|(id, heard)| **id != me && voters.contains(id) && lately(heard));
        let mut all: Vec<(i64, u64)> = others.map(|(id, heard)| (heard.offset(now), *id)).chain([(0, me)]).collect();
        all.sort_unstable();
        all
    }

    /// Whether enough voters' clocks are known, our own among them, that a wrong one cannot be alone.
    pub(super) fn is_majority(&self, me: u64, voters: &BTreeSet<u64>, now: Now) -> bool {
        self.offsets(me, voters, now).len() * 2 > voters.len()
    }

    /// The median of the voters' clocks; of an even number the lower, since a stamp that lags is made good later and one
    /// that leads never.
    pub(super) fn median(&self, me: u64, voters: &BTreeSet<u64>, now: Now) -> Stamp {
        let offsets = self.offsets(me, voters, now);
        let middle = offsets.len().saturating_sub(1) / 2;
        let offset = offsets.get(middle).map_or(0, |(offset, _)| *offset);
        Stamp(now.wall.0.saturating_add_signed(offset))
    }

    /// To whom a leader hands over whose clock, or whose stamps, are off the median, if enough are heard to tell.
    pub(super) fn successor(&self, me: u64, voters: &BTreeSet<u64>, stamp: Stamp, now: Now) -> Option<u64> {
        let offsets = self.offsets(me, voters, now);
        if offsets.len() < 3 {
            return None;
        }
        let (median, nearest) = offsets.get(offsets.len() / 2).copied()?;
        let lags = now.wall.0.saturating_add_signed(median) > stamp.0.saturating_add_signed(OFF_MAX_MS);
        let other = offsets.iter().map(|(_, id)| *id).find(|id| *id != me);
        match median.abs() > OFF_MAX_MS || lags {
            true if nearest != me => Some(nearest),
            true => other,
            false => None,
        }
    }
}

/// A leader's time: the median of the voters' clocks at the start of its term, then its own boot clock, so that a stepped
/// wall clock moves no deadline; never below the last stamp applied and the time that passed here since.
pub(super) struct TermClock {
    pub(super) term: u64,
    start: Stamp,
    since: Instant,
    last: Stamp,
}

impl TermClock {
    pub(super) fn start(term: u64, floor: Stamp, median: Stamp, now: Now) -> Self {
        let start = floor.max(median);
        Self { term, start, since: now.boot, last: start }
    }
    pub(super) fn at(&mut self, now: Now) -> Stamp {
        let elapsed = now.boot.saturating_duration_since(self.since).as_millis();
        let elapsed = u64::try_from(elapsed).unwrap_or(u64::MAX);
        self.last = self.last.max(self.start.plus_ms(elapsed));
        self.last
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heard(clocks: &[(u64, i64)], now: Now) -> Clocks {
        let mut all = Clocks::default();
        for (id, offset) in clocks {
            all.hear(*id, Stamp(now.wall.0.saturating_add_signed(*offset)), now);
        }
        all
    }

    #[test]
    fn one_wrong_clock_of_three_moves_nothing() {
        const YEAR: i64 = 31_536_000_000;
        let now = Now { boot: Instant::now(), wall: Stamp(1_795_000_000_000) };
        let voters = BTreeSet::from([1, 2, 3]);
        for (others, offset, successor) in [
            (&[(2, 5), (3, -5)][..], 0, None),
            (&[(2, YEAR), (3, 1)], 1, None),
            (&[(2, -YEAR), (3, 1)], 0, None),
            // Our own is the wrong one.
            (&[(2, YEAR), (3, YEAR + 1)], YEAR, Some(2)),
            (&[(2, -YEAR), (3, 2 - YEAR)], 2 - YEAR, Some(3)),
            // Of two nobody can say which; the lower does no harm.
            (&[(2, YEAR)], 0, None),
            (&[(2, -YEAR)], -YEAR, None),
            (&[], 0, None),
            // No voter.
            (&[(9, YEAR), (8, YEAR)], 0, None),
        ] {
            let clocks = heard(others, now);
            assert_eq!(clocks.median(1, &voters, now), Stamp(now.wall.0.saturating_add_signed(offset)), "{others:?}");
            let median = clocks.median(1, &voters, now);
            assert_eq!(clocks.successor(1, &voters, median, now), successor, "{others:?}");
        }
        let good = heard(&[(2, 0), (3, 0)], now);
        assert_eq!(good.successor(1, &voters, now.wall.minus_ms(1_000), now), None);
        assert_eq!(good.successor(1, &voters, now.wall.minus_ms(3_000), now), Some(2), "stamps that lag");
        let later = Now { boot: now.boot + HEARD_MAX * 2, ..now };
        assert_eq!(heard(&[(2, YEAR), (3, YEAR)], now).median(1, &voters, later), now.wall, "heard too long ago");
    }

    /// Found by the simulator: what was heard had been kept as a difference to the clock that was then set.
    #[test]
    fn a_clock_that_is_set_moves_nothing_either() {
        const YEAR: u64 = 31_536_000_000;
        let now = Now { boot: Instant::now(), wall: Stamp(1_795_000_000_000) };
        let voters = BTreeSet::from([1, 2, 3]);
        let clocks = heard(&[(2, 0), (3, 5)], now);
        for wall in [now.wall.plus_ms(YEAR), now.wall.minus_ms(YEAR)] {
            let set = Now { boot: now.boot + Duration::from_millis(100), wall };
            let median = clocks.median(1, &voters, set);
            assert!(median.0.abs_diff(now.wall.0 + 100) <= 5, "{median:?}");
            assert!(clocks.successor(1, &voters, median, set).is_some());
        }
    }

    /// Found by the simulator: elected by one that was then taken out, a leader of two had heard no clock but its own.
    #[test]
    fn of_two_voters_one_clock_is_not_enough() {
        let now = Now { boot: Instant::now(), wall: Stamp(1_795_000_000_000) };
        for (others, voters, enough) in [
            (&[(9, 0)][..], &[1, 2][..], false),
            (&[(2, 0)], &[1, 2], true),
            (&[], &[1], true),
            (&[], &[1, 2, 3], false),
            (&[(2, 0)], &[1, 2, 3], true),
            (&[(2, 0)], &[1, 2, 3, 4, 5], false),
        ] {
            let voters = voters.iter().copied().collect();
            assert_eq!(heard(others, now).is_majority(1, &voters, now), enough, "{others:?} of {voters:?}");
        }
    }

    #[test]
    fn a_terms_time_runs_by_the_boot_clock_and_never_falls_below_its_floor() {
        let now = Now { boot: Instant::now(), wall: Stamp(1_000) };
        let mut clock = TermClock::start(3, Stamp(5_000), Stamp(1_000), now);
        let stepped = Now { boot: now.boot + Duration::from_millis(7), wall: Stamp(9_000_000) };
        assert_eq!((clock.at(now), clock.at(stepped)), (Stamp(5_000), Stamp(5_007)));
    }
}
