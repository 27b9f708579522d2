//! Places of tunnels: so many in all, and of these so many for one caller at one workload, that it keeps no other out.

use ambit_model::{Code, NodeId, Refusal, SpiffeId};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Tunnels of proven callers at once; each is a TLS session, and an HBONE one its windows.
const TUNNELS_MAX: usize = 4096;
/// Of these one caller's, on one node, to one workload: one of our agents has 64 native ones and 32 shared, and twice that for
/// as long as an SVID was renewed and connections go on under the one before.
const PAIR_MAX: usize = 256;

/// Who calls, from which node, and who is called.
pub(super) type Pair = (SpiffeId, NodeId, SpiffeId);

type Counts = Arc<Mutex<BTreeMap<Pair, usize>>>;

/// All places. Cloning shares.
#[derive(Clone, Debug)]
pub(super) struct Seats {
    all: Arc<Semaphore>,
    /// Pairs that have a tunnel.
    pairs: Counts,
}

/// One place, until dropped.
#[derive(Debug)]
pub(super) struct Seat {
    _all: OwnedSemaphorePermit,
    pairs: Counts,
    pair: Pair,
}

impl Seats {
    pub(super) fn new() -> Self {
        Self { all: Arc::new(Semaphore::new(TUNNELS_MAX)), pairs: Arc::default() }
    }

    /// How many are taken.
    pub(super) fn taken(&self) -> usize {
        TUNNELS_MAX.saturating_sub(self.all.available_permits())
    }

    pub(super) fn take(&self, pair: Pair) -> Result<Seat, Refusal> {
        let busy = |max: usize| Refusal::new(Code::Busy, format!("{max} tunnels"), "one more");
        let all = self.all.clone().try_acquire_owned().map_err(|_| busy(TUNNELS_MAX))?;
        let mut pairs = self.pairs.lock().unwrap_or_else(PoisonError::into_inner);
        let count = pairs.entry(pair.clone()).or_default();
        if *count >= PAIR_MAX {
            return Err(busy(PAIR_MAX));
        }
        *count += 1;
        Ok(Seat { _all: all, pairs: self.pairs.clone(), pair })
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut pairs = self.pairs.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = pairs.get_mut(&self.pair) {
            *count -= 1;
            if *count == 0 {
                pairs.remove(&self.pair);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_caller_takes_its_share_and_leaves_the_others_theirs() {
        let seats = Seats::new();
        let pair =
            |caller: &str, node: u8| (caller.parse().unwrap(), NodeId([node; 32]), "spiffe://east/db".parse().unwrap());
        let mut taken: Vec<Seat> = (0..PAIR_MAX).map(|_| seats.take(pair("spiffe://west/web", 1)).unwrap()).collect();
        assert_eq!(seats.take(pair("spiffe://west/web", 1)).unwrap_err().code, Code::Busy);
        // Refused is not taken; the same workload elsewhere, and another one, have shares of their own.
        let others = [pair("spiffe://west/web", 2), pair("spiffe://west/api", 1)].map(|pair| seats.take(pair).unwrap());
        assert_eq!(seats.all.available_permits(), TUNNELS_MAX - PAIR_MAX - 2);
        taken.pop();
        let again = seats.take(pair("spiffe://west/web", 1)).unwrap();
        drop((taken, others, again));
        assert!(seats.pairs.lock().unwrap().is_empty(), "nothing is kept of who has gone");
        assert_eq!(seats.all.available_permits(), TUNNELS_MAX);
    }
}
