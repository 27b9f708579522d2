//! How many connections a caller opens to the workloads of this node: each identity so many a second, whichever node it calls
//! from. Beyond it the caller is told that we are busy, and may go elsewhere.

use crate::budget::Bucket;
use ambit_model::SpiffeId;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Callers remembered before those are forgotten that have opened little lately.
const SWEEP_AT: usize = 1_024;
/// Beyond it nobody who is not remembered gets in: a caller has an SVID and a policy, so there are never so many.
const CALLERS_MAX: usize = 65_536;

/// Connections of one caller in a second, where nothing else is told; as many may come at once.
pub const PER_S: u32 = 10_000;

/// Of all callers. Cloning shares.
#[derive(Clone, Debug)]
pub(super) struct Rates {
    per_s: f64,
    begun: Instant,
    callers: Arc<Mutex<BTreeMap<SpiffeId, Bucket>>>,
}

impl Rates {
    pub(super) fn of(per_s: u32) -> Self {
        Self { per_s: f64::from(per_s), begun: Instant::now(), callers: Arc::default() }
    }

    /// Whether one more connection of the caller is taken now.
    pub(super) fn take(&self, caller: &SpiffeId) -> bool {
        self.take_at(caller, self.begun.elapsed())
    }

    fn take_at(&self, caller: &SpiffeId, now: Duration) -> bool {
        let mut callers = self.callers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(bucket) = callers.get_mut(caller) {
            return bucket.take(now);
        }
        if callers.len() >= SWEEP_AT {
            callers.retain(|_, bucket| !bucket.is_full(now));
        }
        if callers.len() >= CALLERS_MAX {
            return false;
        }
        let mut bucket = Bucket::new(self.per_s, self.per_s, now);
        let taken = bucket.take(now);
        callers.insert(caller.clone(), bucket);
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_caller_is_held_to_its_rate_and_keeps_no_other_out() {
        let rates = Rates::of(100);
        let id = |n: u32| format!("spiffe://west/w{n}").parse::<SpiffeId>().unwrap();
        let taken = |caller: u32, tries: u32, ms: u64| {
            (0..tries).filter(|_| rates.take_at(&id(caller), Duration::from_millis(ms))).count()
        };
        assert_eq!(taken(1, 1_000, 0), 100);
        assert_eq!(taken(2, 50, 0), 50, "another's");
        assert_eq!(taken(1, 1_000, 100), 10);
        assert_eq!(taken(1, 1_000, 60_000), 100, "no more than a second's are saved up");
        // Who opens little is not remembered for ever.
        for n in 10..10_000 {
            assert_eq!(taken(n, 1, 120_000 + 20 * u64::from(n)), 1);
        }
        assert!(rates.callers.lock().unwrap().len() <= SWEEP_AT);
    }
}
