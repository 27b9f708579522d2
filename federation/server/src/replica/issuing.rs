//! Budgets of issuance, taken before a request's signature is checked: a node that asks without end waits, and nobody else.

use ambit_model::{Code, NodeId, Refusal};
use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What one node may have signed a second, and at once: all leaves that a node may have ([`ambit_state`] bounds them) in
/// one go, and again all of them in twenty seconds. At 0.2 ms each a node that loops takes a twentieth of a core.
const PER_NODE: Rate = Rate { per_second: 200.0, burst: 4_096.0 };
/// What one administrator may have certified: a leaf lasts for hours, and its row in the state as long.
const PER_ADMIN: Rate = Rate { per_second: 0.1, burst: 256.0 };
/// What one administrator may mint for others: at most an hour each, so that there are at most 36,000 of them at once.
const PER_MINTER: Rate = Rate { per_second: 20.0, burst: 1_024.0 };
/// All nodes at one replica: above what two cores can sign, so that only a burst of everybody is smoothed.
const GLOBAL: Rate = Rate { per_second: 20_000.0, burst: 40_000.0 };
/// A request costs an entry of the log, whatever is in it: as much as a leaf.
const PER_REQUEST: f64 = 1.0;
/// Askers remembered; those whose bucket is full again are forgotten first.
const ASKERS_MAX: usize = 20_000;

#[derive(Clone, Copy)]
struct Rate {
    per_second: f64,
    burst: f64,
}

struct Bucket {
    tokens: f64,
    at: Instant,
}

impl Bucket {
    fn full(rate: Rate, at: Instant) -> Bucket {
        Bucket { tokens: rate.burst, at }
    }
    fn fill(&mut self, rate: Rate, now: Instant) {
        let more = now.saturating_duration_since(self.at).as_secs_f64() * rate.per_second;
        (self.tokens, self.at) = ((self.tokens + more).min(rate.burst), now);
    }
    /// How long until `cost` is there; none where it is.
    fn wait(&self, rate: Rate, cost: f64) -> Option<Duration> {
        (self.tokens < cost).then(|| Duration::from_secs_f64((cost - self.tokens) / rate.per_second))
    }
}

/// Who has a budget of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Asker {
    /// A node, for its workloads.
    Node(NodeId),
    /// An administrator, by SHA-256 of the identity.
    Admin([u8; 32]),
    /// The same, for those whom no node speaks for.
    Minter([u8; 32]),
}

impl Asker {
    fn rate(self) -> Rate {
        match self {
            Self::Node(_) => PER_NODE,
            Self::Admin(_) => PER_ADMIN,
            Self::Minter(_) => PER_MINTER,
        }
    }
}

/// A request that came too early.
#[derive(Debug)]
pub struct TooEarly {
    /// What its sender is told.
    pub refusal: Refusal,
    /// When it may come again.
    pub after: Duration,
}

/// The budgets of one replica.
pub struct Budgets {
    state: Mutex<(Bucket, BTreeMap<Asker, Bucket>)>,
}

impl Default for Budgets {
    fn default() -> Self {
        Self { state: Mutex::new((Bucket::full(GLOBAL, Instant::now()), BTreeMap::new())) }
    }
}

impl Budgets {
    /// Takes a request for so many leaves or tokens, or says when to come again. Nothing is taken then.
    pub fn take(&self, asker: Asker, count: usize, now: Instant) -> Result<(), TooEarly> {
        let cost = count as f64 + PER_REQUEST;
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let (global, askers) = &mut *state;
        if askers.len() >= ASKERS_MAX {
            askers.retain(|asker, bucket| {
                bucket.fill(asker.rate(), now);
                bucket.tokens < asker.rate().burst
            });
        }
        let rate = asker.rate();
        let own = askers.entry(asker).or_insert_with(|| Bucket::full(rate, now));
        own.fill(rate, now);
        global.fill(GLOBAL, now);
        let early = |rate: Rate, whose: &str, after: Duration| {
            let expected = format!("at most {} SVIDs a second {whose}", rate.per_second);
            Err(TooEarly { refusal: Refusal::new(Code::Busy, expected, "more"), after })
        };
        if let Some(after) = own.wait(rate, cost) {
            return early(rate, "of one caller", after);
        }
        if let Some(after) = global.wait(GLOBAL, cost) {
            return early(GLOBAL, "at one replica", after);
        }
        own.tokens -= cost;
        global.tokens -= cost;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOUD: Asker = Asker::Node(NodeId([1; 32]));
    const QUIET: Asker = Asker::Node(NodeId([2; 32]));

    #[test]
    fn an_administrator_that_loops_makes_few_rows() {
        let (budgets, start) = (Budgets::default(), Instant::now());
        let granted = (0..3_600).filter(|s| {
            let now = start + Duration::from_secs(*s);
            budgets.take(Asker::Admin([1; 32]), 1, now).is_ok()
        });
        // An hour of it; each costs two.
        assert!((128 + 179..=128 + 181).contains(&granted.count()));
        budgets.take(Asker::Admin([2; 32]), 1, start).unwrap();
        // What they mint for others is counted by itself.
        let minted = (0..1_000).filter(|_| budgets.take(Asker::Minter([1; 32]), 1, start).is_ok());
        assert_eq!(minted.count(), 512);
    }

    #[test]
    fn a_node_that_loops_waits_and_a_quiet_one_does_not() {
        let (budgets, start) = (Budgets::default(), Instant::now());
        // Ten seconds of a loop, a thousand requests each second.
        let mut granted = 0;
        for ms in 0..10_000 {
            let now = start + Duration::from_millis(ms);
            granted += usize::from(budgets.take(LOUD, 1, now).is_ok());
            if ms % 1_000 == 0 {
                budgets.take(QUIET, 32, now).unwrap();
            }
        }
        // Each costs two: the burst, and then two hundred a second.
        assert!((2_048 + 990..=2_048 + 1_010).contains(&granted), "{granted}");
    }

    #[test]
    fn who_comes_when_it_was_told_is_served() {
        let (budgets, now) = (Budgets::default(), Instant::now());
        budgets.take(LOUD, 4_095, now).unwrap();
        let early = budgets.take(LOUD, 99, now).unwrap_err();
        assert_eq!((early.refusal.code, early.after), (Code::Busy, Duration::from_millis(500)));
        assert!(budgets.take(LOUD, 99, now + early.after - Duration::from_millis(1)).is_err());
        budgets.take(LOUD, 99, now + early.after).unwrap();
    }

    #[test]
    fn all_nodes_together_are_bounded_and_so_is_what_is_remembered_of_them() {
        let (budgets, now) = (Budgets::default(), Instant::now());
        let node = |n: u32| {
            let mut id = [0; 32];
            id[..4].copy_from_slice(&n.to_be_bytes());
            Asker::Node(NodeId(id))
        };
        let granted = (0..ASKERS_MAX as u32).filter(|n| budgets.take(node(*n), 3, now).is_ok()).count();
        assert_eq!(granted, 10_000);
        let later = now + Duration::from_secs(60);
        budgets.take(node(u32::MAX), 1, later).unwrap();
        assert_eq!(budgets.state.lock().unwrap().1.len(), 1);
    }
}
