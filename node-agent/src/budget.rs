//! How many connections may be tried on a second endpoint, and how many a caller may open. Pure: time is an argument.
//!
//! Without the first a cluster that is lost is called at many times the load that it was lost under, once it comes back; without
//! the second one caller keeps a workload from all others.

use std::time::Duration;

/// Tokens that come with time and are taken one by one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bucket {
    tokens: f64,
    per_s: f64,
    most: f64,
    at: Duration,
}

impl Bucket {
    /// A full one of `most`, into which `per_s` come each second.
    pub fn new(per_s: f64, most: f64, now: Duration) -> Self {
        Self { tokens: most, per_s, most, at: now }
    }

    /// Takes one, if there is one.
    pub fn take(&mut self, now: Duration) -> bool {
        self.put(now.saturating_sub(self.at).as_secs_f64() * self.per_s);
        // Time that goes back brings nothing, and is not waited for.
        self.at = self.at.max(now);
        if self.tokens < 1.0 {
            return false;
        }
        self.tokens -= 1.0;
        true
    }

    fn put(&mut self, tokens: f64) {
        self.tokens = (self.tokens + tokens).min(self.most);
    }

    /// Whether it would be full by now: who is not remembered has a full one.
    pub fn is_full(&self, now: Duration) -> bool {
        self.tokens + now.saturating_sub(self.at).as_secs_f64() * self.per_s >= self.most
    }
}

/// Second attempts for each connection to a service.
const RETRIES_PER_CONNECTION: f64 = 0.2;
/// Second attempts in each second, whatever else.
const RETRIES_PER_S: f64 = 20.0;
/// As many may come at once: a cluster that is lost takes all connections with it that are being opened then.
const RETRIES_AT_ONCE: f64 = 200.0;

/// The budget of second attempts.
#[derive(Clone, Copy, Debug)]
pub struct Retries(Bucket);

impl Retries {
    /// A full one.
    pub fn new(now: Duration) -> Self {
        Self(Bucket::new(RETRIES_PER_S, RETRIES_AT_ONCE, now))
    }
    /// A connection begins.
    pub fn begun(&mut self) {
        self.0.put(RETRIES_PER_CONNECTION);
    }
    /// Whether it may be tried elsewhere.
    pub fn take(&mut self, now: Duration) -> bool {
        self.0.take(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn retries_are_a_fifth_of_connections_and_a_floor() {
        let (mut budget, mut retried) = (Retries::new(Duration::ZERO), 0);
        // Every connection wants one; 5,000 a second for ten seconds.
        for n in 0..50_000_u32 {
            budget.begun();
            retried += u32::from(budget.take(SECOND * n / 5_000));
        }
        let most = 0.2 * 50_000.0 + 10.0 * RETRIES_PER_S + RETRIES_AT_ONCE;
        assert!(f64::from(retried) <= most && f64::from(retried) > most - 50.0, "{retried} of {most}");
        // Where hardly anything is called, the floor is there.
        let mut quiet = Retries::new(Duration::ZERO);
        while quiet.take(Duration::ZERO) {}
        assert!(quiet.take(SECOND));
    }

    #[test]
    fn a_bucket_gives_no_more_than_came_whatever_time_does() {
        for seed in 1..500_u64 {
            let (mut bucket, mut state, mut given) = (Bucket::new(10.0, 5.0, Duration::ZERO), seed, 0.0);
            let mut latest = Duration::ZERO;
            for _ in 0..300 {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                // It goes back now and then.
                let now = Duration::from_millis((state >> 40) % 20_000);
                latest = latest.max(now);
                given += f64::from(u8::from(bucket.take(now)));
                assert!(given <= 5.0 + 10.0 * latest.as_secs_f64() + 1e-6, "{seed}");
                assert!(bucket.tokens >= 0.0 && bucket.tokens <= 5.0, "{seed}");
            }
            assert!(bucket.is_full(latest + SECOND));
        }
    }
}
