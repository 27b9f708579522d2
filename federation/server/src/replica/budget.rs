//! Budgets for strangers, taken before any cryptography: enrolment must not be an amplifier.

use ambit_model::{Code, Refusal};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// Calls a second that one address may make, and how many at once. A node needs two.
const PER_ADDRESS: (f64, f64) = (20.0, 200.0);
/// Calls a second from all addresses together: half a core of make-credential with P-384 EKs.
const GLOBAL: (f64, f64) = (300.0, 1_000.0);
/// Addresses remembered; past it the fullest buckets are forgotten, which only favours strangers.
const ADDRESSES_MAX: usize = 10_000;

struct Bucket {
    tokens: f64,
    at: Instant,
}

impl Bucket {
    fn full(burst: f64, at: Instant) -> Self {
        Self { tokens: burst, at }
    }
    fn take(&mut self, (rate, burst): (f64, f64), now: Instant) -> bool {
        self.tokens = (self.tokens + now.duration_since(self.at).as_secs_f64() * rate).min(burst);
        self.at = now;
        let granted = self.tokens >= 1.0;
        if granted {
            self.tokens -= 1.0;
        }
        granted
    }
}

/// The budgets of one replica.
pub struct Budget {
    state: Mutex<(Bucket, BTreeMap<IpAddr, Bucket>)>,
}

impl Default for Budget {
    fn default() -> Self {
        Self { state: Mutex::new((Bucket::full(GLOBAL.1, Instant::now()), BTreeMap::new())) }
    }
}

impl Budget {
    /// Takes one call of `from`, or answers `busy`.
    pub fn take(&self, from: IpAddr) -> Result<(), Refusal> {
        let now = Instant::now();
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let (global, by_address) = &mut *state;
        if by_address.len() >= ADDRESSES_MAX {
            by_address.retain(|_, b| now.duration_since(b.at).as_secs() < 10);
        }
        let own = by_address.entry(from).or_insert_with(|| Bucket::full(PER_ADDRESS.1, now));
        if own.take(PER_ADDRESS, now) && global.take(GLOBAL, now) {
            return Ok(());
        }
        Err(Refusal::new(Code::Busy, format!("at most {} calls a second from one address", PER_ADDRESS.0), "more"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_is_held_back_and_another_is_not() {
        let budget = Budget::default();
        let (loud, quiet) = ("10.0.0.1".parse().unwrap(), "10.0.0.2".parse().unwrap());
        let refused = (0..400).filter(|_| budget.take(loud).is_err()).count();
        assert!(refused >= 150, "{refused}");
        assert!(budget.take(quiet).is_ok());
    }
}
