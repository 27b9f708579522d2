//! The time as this node may believe it: its own clock, but never below the highest stamp a leader has sent (I15).

use ambit_model::{Moment, Stamp};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

/// A cheap, shared clock.
#[derive(Debug, Default)]
pub struct Clock {
    floor_ms: AtomicU64,
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
}
