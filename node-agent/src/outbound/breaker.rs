//! A circuit breaker for each endpoint: so many connections are being opened to one at once, over all threads. What hangs holds
//! up nobody who could go elsewhere.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

/// Connections being opened to one endpoint. Opened ones do not count: of these tunnels have their bounds.
pub(super) const OPENING_MAX: usize = 1_024;

/// Endpoints to which connections are being opened, and how many. Cloning shares.
#[derive(Clone, Debug, Default)]
pub(super) struct Breaker(Arc<Mutex<BTreeMap<IpAddr, usize>>>);

/// One of them, until dropped.
#[derive(Debug)]
pub(super) struct Attempt {
    all: Breaker,
    address: IpAddr,
}

impl Breaker {
    /// None where there are enough.
    pub(super) fn attempt(&self, address: IpAddr) -> Option<Attempt> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = all.entry(address).or_default();
        if *count >= OPENING_MAX {
            return None;
        }
        *count += 1;
        Some(Attempt { all: self.clone(), address })
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        let mut all = self.all.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = all.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                all.remove(&self.address);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_endpoint_that_hangs_takes_no_place_of_another_and_all_come_back() {
        let (breaker, [a, b]) = (Breaker::default(), ["10.0.0.1", "10.0.0.2"].map(|ip| ip.parse::<IpAddr>().unwrap()));
        let mut held: Vec<_> = (0..OPENING_MAX).map(|_| breaker.attempt(a).unwrap()).collect();
        assert!(breaker.attempt(a).is_none() && breaker.attempt(b).is_some());
        held.pop();
        assert!(breaker.attempt(a).is_some());
        drop(held);
        assert!(breaker.0.lock().unwrap().is_empty(), "nothing is kept of who is not being called");
    }
}
