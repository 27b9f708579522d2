//! The time as this node may believe it: its own clock, but never below the highest stamp a leader has sent (I15).

use ambit_model::{Moment, Stamp};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// A replica that is further behind its own clock says what was so once.
const BEHIND_MS_MAX: u64 = 30_000;

/// A cheap, shared clock.
#[derive(Debug, Default)]
pub struct Clock {
    floor_ms: AtomicU64,
    /// When the cell was last heard, since boot; 0 if it never was.
    heard_ns: AtomicU64,
    /// What its leader had written then.
    committed_ms: AtomicU64,
}

impl Clock {
    /// Now, in milliseconds since the Unix epoch.
    pub fn now(&self) -> Stamp {
        let own = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis());
        Stamp(u64::try_from(own).unwrap_or(u64::MAX).max(self.floor_ms.load(Ordering::Relaxed)))
    }
    /// Between which instants now is: what the cell gave ends by the own clock too, where that is later.
    pub fn moment(&self) -> Moment {
        Moment { committed: Stamp(self.floor_ms.load(Ordering::Relaxed)), latest: self.now() }
    }
    /// Takes note of a leader's stamp: a clock set back by its owner revives no expired certificate.
    pub fn seen(&self, stamp: Stamp) {
        self.floor_ms.fetch_max(stamp.0, Ordering::Relaxed);
    }
    /// The cell speaks.
    pub fn heard(&self) {
        // Without that clock nothing is new.
        self.heard_ns.store(boot_ns().map_or(1, |now| now.max(1)), Ordering::Relaxed);
    }
    /// A replica speaks at `now`, by its own clock, who knows what its leader wrote until then: it is the cell's word where that is
    /// new, and not older than what a replica would sign by (I15). One that hears its leader no more goes on speaking. Returns
    /// whether it is.
    pub fn beat(&self, committed: Stamp, now: Stamp) -> bool {
        // Those of a former release do not tell it.
        let is_new = committed.0 == 0 || self.committed_ms.fetch_max(committed.0, Ordering::Relaxed) < committed.0;
        let is_word = is_new && (committed.0 == 0 || now.0.saturating_sub(committed.0) <= BEHIND_MS_MAX);
        if is_word {
            self.heard();
        }
        is_word
    }
    /// Since the cell's last word; none before the first. Time in which the machine sleeps counts, and what its owner does to its
    /// clock does not (I12).
    pub fn age(&self) -> Option<Duration> {
        match self.heard_ns.load(Ordering::Relaxed) {
            0 => None,
            heard => Some(boot_ns().map_or(Duration::MAX, |now| Duration::from_nanos(now.saturating_sub(heard)))),
        }
    }
}

fn boot_ns() -> Option<u64> {
    u64::try_from(ambit_ebpf::boot_time().ok()?.as_nanos()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_highest_stamp_is_a_floor() {
        let clock = Clock::default();
        let now = clock.now();
        clock.seen(Stamp(now.0 + 3_600_000));
        clock.seen(Stamp(5));
        assert!(clock.now().0 >= now.0 + 3_600_000);
    }

    #[test]
    fn a_replica_that_hears_no_leader_is_not_the_cells_word() {
        let clock = Clock::default();
        assert_eq!(clock.age(), None);
        let now = Stamp(1_000 + BEHIND_MS_MAX);
        assert!(clock.beat(Stamp(1_000), now));
        let grown = || {
            std::thread::sleep(Duration::from_millis(20));
            clock.age().unwrap() >= Duration::from_millis(20)
        };
        assert!(grown());
        assert!(!clock.beat(Stamp(1_000), now) && grown(), "nothing new");
        assert!(!clock.beat(Stamp(999), now) && grown(), "older");
        assert!(!clock.beat(Stamp(1_001), Stamp(now.0 + 2)) && grown(), "new, and long ago");
        let before = clock.age().unwrap();
        assert!(clock.beat(Stamp(1_002), now));
        assert!(clock.age().unwrap() < before);
    }
}
