//! What this node knows and holds now: the view and the SVIDs, for everyone who answers from it.

use crate::course::Course;
use crate::view::View;
use ambit_model::{EntryId, Generation, Refusal, SpiffeId, Stamp};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::watch;
use zeroize::Zeroizing;

/// One workload's certificate and key.
pub struct Svid {
    /// Who.
    pub id: SpiffeId,
    /// PKCS#8, DER. Made here, never stored, wiped when the last holder lets go.
    pub key_pkcs8: Zeroizing<Vec<u8>>,
    /// Leaf first, DER.
    pub chain_der: Vec<Vec<u8>>,
    /// Through which admission of this node it was issued: a denial of it is one of this certificate.
    pub generation: Generation,
    /// The intermediate that signed it (key identifier, hex).
    pub authority: String,
    /// When it arrived.
    pub since: Stamp,
    /// When it ends.
    pub not_after: Stamp,
}

impl fmt::Debug for Svid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Svid").field("id", &self.id).field("not_after", &self.not_after).finish_non_exhaustive()
    }
}

/// The state of every SVID wanted here; a denied one stands as its refusal.
pub type Svids = BTreeMap<EntryId, Result<Arc<Svid>, Refusal>>;

/// One consistent state. Cloning shares.
#[derive(Clone, Debug, Default)]
pub struct Known {
    /// None until the first slice.
    pub view: Option<Arc<View>>,
    /// SVIDs by entry.
    pub svids: Arc<Svids>,
}

/// The one place where the present state is published.
#[derive(Clone, Debug)]
pub struct Issued {
    state: Arc<watch::Sender<Known>>,
    wanted: Arc<watch::Sender<BTreeSet<EntryId>>>,
    asked: Arc<Mutex<BTreeMap<EntryId, usize>>>,
    pods: Arc<Mutex<BTreeSet<EntryId>>>,
    course: Course,
}

impl Default for Issued {
    fn default() -> Self {
        let (state, wanted) = (watch::Sender::new(Known::default()), watch::Sender::new(BTreeSet::new()));
        Self {
            state: Arc::new(state),
            wanted: Arc::new(wanted),
            asked: Arc::default(),
            pods: Arc::default(),
            course: Course::default(),
        }
    }
}

impl Issued {
    /// The same in this course: who follows it is told no more once that drains.
    pub fn in_course(self, course: Course) -> Self {
        Self { course, ..self }
    }
    /// The course.
    pub fn course(&self) -> &Course {
        &self.course
    }
    /// Follows the state.
    pub fn watch(&self) -> watch::Receiver<Known> {
        self.state.subscribe()
    }
    /// The state now.
    pub fn now(&self) -> Known {
        self.state.borrow().clone()
    }
    /// Publishes a new view.
    pub fn set_view(&self, view: Arc<View>) {
        self.state.send_modify(|k| k.view = Some(view));
    }
    /// Publishes a new set of SVIDs.
    pub fn set_svids(&self, svids: Svids) {
        self.state.send_modify(|k| k.svids = Arc::new(svids));
    }
    /// Follows the set of entries that somebody here needs an SVID of.
    pub fn wanted(&self) -> watch::Receiver<BTreeSet<EntryId>> {
        self.wanted.subscribe()
    }
    /// The entries of the pods that run now.
    pub fn set_pods(&self, entries: BTreeSet<EntryId>) {
        *lock(&self.pods) = entries;
        self.recount();
    }
    /// Exchanges one caller's interest for another.
    pub fn interest(&self, entries: BTreeSet<EntryId>, before: Interest) -> Interest {
        if before.entries == entries {
            return before;
        }
        for entry in &entries {
            *lock(&self.asked).entry(entry.clone()).or_default() += 1;
        }
        drop(before);
        self.recount();
        Interest { entries, of: Some(self.clone()) }
    }
    fn recount(&self) {
        let wanted: BTreeSet<EntryId> = lock(&self.asked).keys().chain(lock(&self.pods).iter()).cloned().collect();
        self.wanted.send_if_modified(|old| {
            let changed = *old != wanted;
            *old = wanted;
            changed
        });
    }
}

/// A caller's wish for SVIDs; ends with it.
#[derive(Debug)]
pub struct Interest {
    entries: BTreeSet<EntryId>,
    of: Option<Issued>,
}

impl Interest {
    /// No wish.
    pub fn none() -> Self {
        Self { entries: BTreeSet::new(), of: None }
    }
}

impl Drop for Interest {
    fn drop(&mut self) {
        let Some(of) = &self.of else { return };
        let mut asked = lock(&of.asked);
        for entry in &self.entries {
            if let Some(n) = asked.get_mut(entry) {
                *n -= 1;
                if *n == 0 {
                    asked.remove(entry);
                }
            }
        }
        drop(asked);
        of.recount();
    }
}

fn lock<T>(m: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_wanted_while_a_pod_or_a_caller_needs_it() {
        let issued = Issued::default();
        let set = |names: &[&str]| names.iter().map(|n| n.parse().unwrap()).collect::<BTreeSet<EntryId>>();
        let wanted = issued.wanted();
        issued.set_pods(set(&["web"]));
        let first = issued.interest(set(&["db"]), Interest::none());
        let second = issued.interest(set(&["db", "web"]), Interest::none());
        drop(first);
        assert_eq!(*wanted.borrow(), set(&["db", "web"]));
        let second = issued.interest(set(&["web"]), second);
        assert_eq!(*wanted.borrow(), set(&["web"]));
        issued.set_pods(set(&[]));
        assert_eq!(*wanted.borrow(), set(&["web"]));
        drop(second);
        assert!(wanted.borrow().is_empty());
    }
}
