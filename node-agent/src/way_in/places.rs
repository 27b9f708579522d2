//! Places of callers outside of the mesh: so many in all, and of these so many from one address, that it keeps no other out.
//! They are their own: who proves nothing takes no place of those who did.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, PoisonError};

/// Connections at once, over all pods: they hold two descriptors each.
const FLOWS_MAX: usize = 4096;
/// Of these from one address, which may be a load balancer's.
const SOURCE_MAX: usize = 1024;

/// All places. Cloning shares.
#[derive(Clone, Debug, Default)]
pub(super) struct Places(Arc<Mutex<Taken>>);

/// Sources that have one, and how many are taken.
#[derive(Debug, Default)]
struct Taken {
    all: usize,
    by_source: BTreeMap<Ipv4Addr, usize>,
}

/// One place, until dropped.
#[derive(Debug)]
pub(super) struct Place {
    places: Places,
    source: Ipv4Addr,
}

impl Places {
    /// None where there is none left.
    pub(super) fn take(&self, source: Ipv4Addr) -> Option<Place> {
        let mut taken = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let of_source = taken.by_source.get(&source).copied().unwrap_or_default();
        if taken.all >= FLOWS_MAX || of_source >= SOURCE_MAX {
            return None;
        }
        taken.all += 1;
        taken.by_source.insert(source, of_source + 1);
        Some(Place { places: self.clone(), source })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.0.lock().unwrap_or_else(PoisonError::into_inner);
        taken.all = taken.all.saturating_sub(1);
        if let Some(left) = taken.by_source.get_mut(&self.source) {
            *left = left.saturating_sub(1);
            if *left == 0 {
                taken.by_source.remove(&self.source);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_keeps_no_other_out_and_what_ends_gives_its_place_back() {
        let (places, at) = (Places::default(), |n: u8| Ipv4Addr::new(192, 0, 2, n));
        let mut all: Vec<Place> = (0..SOURCE_MAX).map(|_| places.take(at(1)).unwrap()).collect();
        assert!(places.take(at(1)).is_none());
        for n in 2..=4 {
            all.extend((0..SOURCE_MAX).map(|_| places.take(at(n)).unwrap()));
        }
        assert!(places.take(at(9)).is_none(), "all are taken");
        drop(all.pop());
        assert!(places.take(at(9)).is_some());
        drop(all);
        assert!(places.0.lock().unwrap().by_source.is_empty(), "who is gone is forgotten");
        assert!(places.take(at(1)).is_some());
    }
}
