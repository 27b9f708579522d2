//! Waiting between attempts: exponential, capped, with full jitter so that a thousand agents do not return as one.

use std::time::Duration;

/// The state of one series of attempts.
#[derive(Clone, Debug)]
pub struct Backoff {
    base: Duration,
    cap: Duration,
    failures: u32,
}

impl Backoff {
    /// The n-th wait is drawn from half to the whole of `base * 2^n`, at most `cap`.
    pub fn new(base: Duration, cap: Duration) -> Self {
        Self { base, cap, failures: 0 }
    }
    /// The next wait. `random` is any number.
    pub fn next(&mut self, random: u64) -> Duration {
        let whole = self.base.saturating_mul(1 << self.failures.min(16)).min(self.cap);
        self.failures = self.failures.saturating_add(1);
        let half_us = u64::try_from(whole.as_micros() / 2).unwrap_or(u64::MAX / 2);
        Duration::from_micros(half_us + random % (half_us + 1))
    }
    /// After success.
    pub fn reset(&mut self) {
        self.failures = 0;
    }
}

/// A random number from the system's generator; 0 if it has none, which costs the jitter and nothing else.
pub fn random() -> u64 {
    let mut bytes = [0u8; 8];
    match aws_lc_rs::rand::fill(&mut bytes) {
        Ok(()) => u64::from_le_bytes(bytes),
        Err(_) => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_the_cap_and_start_over() {
        let mut b = Backoff::new(Duration::from_millis(100), Duration::from_secs(2));
        for (random, ms) in [(0, 50), (u64::MAX, 100), (0, 200), (0, 400), (0, 800), (0, 1000), (0, 1000)] {
            let wait = b.next(random);
            assert!(wait >= Duration::from_millis(ms) && wait <= Duration::from_millis(ms * 2), "{wait:?} for {ms}");
        }
        b.reset();
        assert_eq!(b.next(0), Duration::from_millis(50));
    }
}
