//! The time as this node may believe it: its own clock, but never below the highest stamp a leader has sent (I15).

use ambit_model::{Moment, Stamp};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

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
        self.heard_ns.store(boot_ns().max(1), Ordering::Relaxed);
    }
    /// A replica speaks, who knows what its leader wrote until then: it is the cell's word where that is new. One that hears its
    /// leader no more goes on speaking.
    pub fn beat(&self, committed: Stamp) {
        // Those of a former release do not tell it.
        if committed.0 == 0 || self.committed_ms.fetch_max(committed.0, Ordering::Relaxed) < committed.0 {
            self.heard();
        }
    }
    /// Since the cell's last word; none before the first. Time in which the machine sleeps counts, and what its owner does to its
    /// clock does not (I12).
    pub fn age(&self) -> Option<Duration> {
        match self.heard_ns.load(Ordering::Relaxed) {
            0 => None,
            heard => Some(Duration::from_nanos(boot_ns().saturating_sub(heard))),
        }
    }
}

/// A kernel without that clock knows no age: then nothing is new.
fn boot_ns() -> u64 {
    ambit_ebpf::boot_time().map_or(u64::MAX, |since| u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
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
        clock.beat(Stamp(1_000));
        let grown = || {
            std::thread::sleep(Duration::from_millis(20));
            clock.age().unwrap() >= Duration::from_millis(20)
        };
        assert!(grown());
        clock.beat(Stamp(1_000));
        assert!(grown(), "nothing new");
        clock.beat(Stamp(999));
        assert!(grown(), "older");
        let before = clock.age().unwrap();
        clock.beat(Stamp(1_001));
        assert!(clock.age().unwrap() < before);
    }
}
