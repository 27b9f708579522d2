//! The leader's stamps. Median of the voters' clocks and stepping down when off it (I15) are not built yet.

use ambit_model::Stamp;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// A leader's time: wall clock at the start of its term, then its monotonic clock, so that a stepped wall clock moves no
/// deadline; never below the last stamp applied (I15, in part).
pub(super) struct TermClock {
    pub(super) term: u64,
    start: Stamp,
    since: Instant,
    last: Stamp,
}

impl TermClock {
    pub(super) fn start(term: u64, floor: Stamp) -> Self {
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let start = floor.max(Stamp(u64::try_from(wall.as_millis()).unwrap_or(u64::MAX)));
        Self { term, start, since: Instant::now(), last: start }
    }
    pub(super) fn now(&mut self) -> Stamp {
        let elapsed = u64::try_from(self.since.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last = self.last.max(self.start.plus_ms(elapsed));
        self.last
    }
}
