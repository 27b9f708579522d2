//! Which entries fit a node: those that name it and whose node selectors hold for its last verdict.

use crate::objects::EntryRow;
use crate::state::State;
use ambit_model::{Entry, EntryExtras, EntryId, NodeId, Selector, SpiffeId};
use std::collections::BTreeSet;

impl State {
    /// Whether the node may run this workload as things stand: slices, issuance and endpoints all go by it. An unknown
    /// node fits nothing; one without a verdict fits nothing that asks for what a verdict shows. A barred identity is run
    /// nowhere.
    pub fn fits(&self, entry: &Entry, id: &NodeId) -> bool {
        self.fits_there(entry, id) && self.is_given(entry)
    }

    /// The same but for the identity: whether the node is one that the entry means.
    pub(crate) fn fits_there(&self, entry: &Entry, id: &NodeId) -> bool {
        let named = self.node(id).is_some_and(|row| entry.may_run_on(&row.cluster, id));
        named && entry.node_selectors().all(|selector| self.shows(id, selector))
    }

    /// Whether its identity is given to anybody: it is not barred, and the entry has not ended.
    pub(crate) fn is_given(&self, entry: &Entry) -> bool {
        !self.barred(&entry.spiffe_id) && entry.extras.expires_at > self.stamp()
    }

    /// Whether a node selector holds. Those of a workload are not the cell's to judge.
    fn shows(&self, id: &NodeId, selector: &Selector) -> bool {
        let standing = self.standing(id);
        match selector {
            Selector::TpmEkHash(ek) => ek == id,
            Selector::TpmPcr(bank, n, value) => {
                self.boots.get(id).is_some_and(|boot| boot.bank == *bank && boot.values.get(n) == Some(value))
            }
            Selector::TpmPolicy(name) => standing.is_some_and(|s| s.policy.name == *name),
            Selector::UnixUid(_)
            | Selector::UnixGid(_)
            | Selector::UnixSupplementaryGid(_)
            | Selector::UnixPath(_)
            | Selector::UnixSha256(_)
            | Selector::Cgroup(_)
            | Selector::SystemdUnit(_)
            | Selector::ContainerId(_) => false,
        }
    }

    /// Of the entries with node selectors, those that fit the node: what a verdict may change.
    pub(crate) fn fitting_by_verdict(&self, id: &NodeId) -> BTreeSet<EntryId> {
        let asking = self.node(id).and_then(|row| self.asking.get(&row.cluster));
        let entries = asking.into_iter().flatten().filter_map(|entry| self.entry(entry));
        entries.filter(|row| self.fits(&row.entry, id)).map(|row| row.entry.id.clone()).collect()
    }

    /// Whether the node may run this identity as things stand.
    pub fn may_run(&self, id: &SpiffeId, node: &NodeId) -> bool {
        self.entries_of(id).any(|row| self.fits(&row.entry, node))
    }

    /// The entries that give this identity.
    pub(crate) fn entries_of(&self, id: &SpiffeId) -> impl Iterator<Item = &EntryRow> {
        self.giving.get(id).into_iter().flatten().filter_map(|entry| self.entry(entry))
    }

    /// Keeps [`State::giving`], [`State::asking`] and [`State::expiring`] in step with an entry that is there now, or was
    /// until now.
    pub(crate) fn index_entry(&mut self, entry: &Entry, present: bool) {
        let of_identity = self.giving.entry(entry.spiffe_id.clone()).or_default();
        if present {
            of_identity.insert(entry.id.clone());
        } else {
            of_identity.remove(&entry.id);
            if of_identity.is_empty() {
                self.giving.remove(&entry.spiffe_id);
            }
        }
        let expires_at = entry.extras.expires_at;
        if expires_at != EntryExtras::NONE.expires_at {
            let key = (expires_at, entry.id.clone());
            let _ = if present { self.expiring.insert(key) } else { self.expiring.remove(&key) };
        }
        if entry.node_selectors().next().is_none() {
            return;
        }
        let of_cluster = self.asking.entry(entry.cluster.clone()).or_default();
        if present {
            of_cluster.insert(entry.id.clone());
        } else {
            of_cluster.remove(&entry.id);
        }
    }
}
