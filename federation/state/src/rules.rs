//! Policies as they decide: sets that have names resolved to who is in them now, and what is over left out.
//!
//! Who is in a cluster, or has labels, says the cell from its own entries; of a peer's clusters it says it from the endpoints
//! that the peer exported. An identity may have several entries: an allow means it only where all of them fit, whatever
//! narrows where one does.

use crate::command::{DocumentKind, DocumentsChange};
use crate::objects::{DocumentsRow, GroupRow, StoredDocument};
use crate::state::{OwnedName, State};
use ambit_model::policy::{Action, Labels, Peers, Policy};
use ambit_model::{ClusterId, Code, Entry, Moment, ObjectName, Refusal, Revision, SpiffeId, Stamp, TrustDomain};
use ambit_policy::PolicySet;
use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;

impl State {
    /// Now, as far as this cell has agreed on it.
    pub fn moment(&self) -> Moment {
        Moment::at(self.stamp())
    }

    /// All policies as one set to evaluate.
    pub fn policy_set(&self) -> PolicySet {
        self.policies_where(|_| true)
    }

    /// The same as it would be after a change.
    pub fn policy_set_after(&self, change: &DocumentsChange) -> PolicySet {
        let mut set = PolicySet::new(self.known_domains());
        let Some(own) = self.cell().map(|cell| cell.trust_domain.clone()) else { return set };
        let resolver = Resolver { state: self, change: Some(change), known: RefCell::default() };
        for ((origin, _), row) in self.policies() {
            set.insert(origin.clone(), resolver.policy(&row.object).into_owned());
        }
        for (_, name) in change.delete.iter().filter(|(kind, _)| *kind == DocumentKind::Policy) {
            set.remove(&own, name);
        }
        for policy in &change.policies {
            set.insert(own.clone(), resolver.policy(policy).into_owned());
        }
        set
    }

    /// Whether the documents could be changed so.
    ///
    /// # Errors
    /// As the command would be refused.
    pub fn check_documents(&self, change: &DocumentsChange) -> Result<(), Refusal> {
        crate::apply::check_documents(self, change)
    }

    /// The change that makes documents what they were right after `to`.
    ///
    /// # Errors
    /// [`Code::NotFound`] where that change is not remembered.
    pub fn change_back(&self, to: Revision) -> Result<DocumentsChange, Refusal> {
        let unknown = || {
            let oldest = self.document_changes().next().map_or(0, |(at, _)| at.0);
            let expected =
                format!("a revision that changed documents, {oldest} at the earliest (ambit policy history)");
            Refusal::new(Code::NotFound, expected, to.0.to_string())
        };
        let mut back = DocumentsChange { note: format!("rollback to {}", to.0), ..DocumentsChange::default() };
        for ((kind, name), was) in self.documents_at(to).ok_or_else(unknown)? {
            match was {
                Some(StoredDocument::Policy(policy)) => back.policies.push(policy),
                Some(StoredDocument::Service(service)) => back.services.push(service),
                Some(StoredDocument::Group(group)) => back.groups.push(group),
                None => back.delete.push((kind, name)),
            }
        }
        Ok(back)
    }

    /// Those that can decide now for a connection of one of `local`.
    pub(crate) fn policies_for(&self, local: &BTreeSet<SpiffeId>) -> PolicySet {
        let now = self.moment();
        self.policies_where(|policy| !policy.is_over(now) && ambit_policy::concerns(policy, local)).slice(local, now)
    }

    fn policies_where(&self, wanted: impl Fn(&Policy) -> bool) -> PolicySet {
        let mut set = PolicySet::new(self.known_domains());
        let resolver = Resolver { state: self, change: None, known: RefCell::default() };
        for ((origin, _), row) in self.policies() {
            let policy = resolver.policy(&row.object);
            if wanted(&policy) {
                set.insert(origin.clone(), policy.into_owned());
            }
        }
        set
    }

    /// The policy as it decides now.
    pub fn resolved(&self, policy: &Policy) -> Policy {
        Resolver { state: self, change: None, known: RefCell::default() }.policy(policy).into_owned()
    }

    /// Groups of this cell and its peers.
    pub fn groups(&self) -> impl Iterator<Item = (&OwnedName, &GroupRow)> {
        self.groups.iter()
    }

    /// Changes of documents of this cell that are remembered, by revision.
    pub fn document_changes(&self) -> impl DoubleEndedIterator<Item = (Revision, &DocumentsRow)> {
        self.document_changes.iter().map(|(index, row)| (Revision(*index), row))
    }

    /// The newest change of documents of this cell.
    pub fn document_revision(&self) -> Revision {
        self.document_changes().next_back().map_or(Revision(0), |(revision, _)| revision)
    }

    /// What documents were right after `revision`, as far as they are others now: none where that is not remembered.
    pub fn documents_at(
        &self,
        revision: Revision,
    ) -> Option<BTreeMap<(DocumentKind, ObjectName), Option<StoredDocument>>> {
        self.document_changes.get(&revision.0)?;
        let mut were = BTreeMap::new();
        for (_, row) in self.document_changes().rev().take_while(|(at, _)| *at > revision) {
            for change in row.changes.iter().rev() {
                were.insert((change.kind, change.name.clone()), change.before.clone());
            }
        }
        let now = |(kind, name): &(DocumentKind, ObjectName)| self.document(*kind, name);
        were.retain(|key, was| *was != now(key));
        Some(were)
    }

    /// A document of this cell.
    pub fn document(&self, kind: DocumentKind, name: &ObjectName) -> Option<StoredDocument> {
        let key = (self.cell()?.trust_domain.clone(), name.clone());
        match kind {
            DocumentKind::Policy => self.policies.get(&key).map(|row| StoredDocument::Policy(row.object.clone())),
            DocumentKind::Service => self.services.get(&key).map(|row| StoredDocument::Service(row.object.clone())),
            DocumentKind::Group => self.groups.get(&key).map(|row| StoredDocument::Group(row.object.clone())),
        }
    }

    /// Identities that this cell knows: those that it gives, and those that are reported to run at peers.
    pub fn known_identities(&self) -> BTreeSet<SpiffeId> {
        let given = self.giving.keys().cloned();
        given.chain(self.endpoints().map(|(_, row)| row.object.spiffe_id.clone())).collect()
    }

    /// Whether a policy ends after the one stamp and not after the other: what nodes need is another then.
    pub(crate) fn policy_ends_in(&self, after: Stamp, until: Stamp) -> bool {
        let between = (Bound::Excluded(after), Bound::Included(until));
        after < until && self.policy_ends.range(between).next().is_some()
    }

    /// Changes a policy's row and keeps [`State::policy_ends`] in step.
    pub(crate) fn reindex_policy(&mut self, key: &OwnedName, change: impl FnOnce(&mut State)) {
        let end = |s: &State| s.policies.get(key).map(|row| row.object.extras.expires_at);
        if let Some(end) = end(self) {
            self.index_policy_end(key, end, false);
        }
        change(self);
        if let Some(end) = end(self) {
            self.index_policy_end(key, end, true);
        }
    }

    pub(crate) fn index_policy_end(&mut self, key: &OwnedName, end: Stamp, present: bool) {
        if end == Stamp(u64::MAX) {
            return;
        }
        let names = self.policy_ends.entry(end).or_default();
        let _ = if present { names.insert(key.clone()) } else { names.remove(key) };
        if names.is_empty() {
            self.policy_ends.remove(&end);
        }
    }
}

/// Finds who is in a set, each set once.
struct Resolver<'a> {
    state: &'a State,
    /// A change that was not made.
    change: Option<&'a DocumentsChange>,
    /// By set, and by whether one entry that fits is enough.
    known: RefCell<BTreeMap<(Peers, bool), Found>>,
}

/// Who is in a set; none where this cell cannot tell.
type Found = Option<BTreeSet<SpiffeId>>;

impl Resolver<'_> {
    fn policy<'p>(&self, policy: &'p Policy) -> Cow<'p, Policy> {
        if !policy.from.iter().chain([&policy.target]).any(Peers::is_named) {
            return Cow::Borrowed(policy);
        }
        let narrows = policy.action != Action::Allow;
        let from = policy.from.iter().flat_map(|set| self.sets(set, narrows)).collect();
        Cow::Owned(Policy { target: self.set(&policy.target, narrows), from, ..policy.clone() })
    }

    /// A caller's set; a group is its members. One that is not there stays as it is: it allows nobody and denies everybody.
    fn sets(&self, set: &Peers, narrows: bool) -> Vec<Peers> {
        let Peers::Group(td, name) = set else { return vec![self.set(set, narrows)] };
        match self.members(td, name) {
            Some(members) => members.iter().map(|member| self.set(member, narrows)).collect(),
            None => vec![set.clone()],
        }
    }

    fn members(&self, td: &TrustDomain, name: &ObjectName) -> Option<&[Peers]> {
        let own = self.state.cell().is_some_and(|cell| cell.trust_domain == *td);
        if let Some(change) = self.change.filter(|_| own) {
            if let Some(group) = change.groups.iter().find(|group| group.name == *name) {
                return Some(&group.members);
            }
            if change.delete.contains(&(DocumentKind::Group, name.clone())) {
                return None;
            }
        }
        self.state.groups.get(&(td.clone(), name.clone())).map(|row| row.object.members.as_slice())
    }

    fn set(&self, set: &Peers, narrows: bool) -> Peers {
        if !set.is_named() {
            return set.clone();
        }
        let key = (set.clone(), narrows);
        let known = self.known.borrow().get(&key).cloned();
        let ids = known.unwrap_or_else(|| {
            let found = self.find(set, narrows);
            self.known.borrow_mut().insert(key, found.clone());
            found
        });
        ids.map_or_else(|| set.clone(), |ids| Peers::Ids(set.trust_domain(), ids))
    }

    fn find(&self, set: &Peers, narrows: bool) -> Found {
        let own = self.state.cell().map(|cell| &cell.trust_domain)?;
        match set {
            Peers::Cluster(td, cluster) if td == own => Some(self.of_entries(narrows, |e| e.cluster == *cluster)),
            Peers::Cluster(td, cluster) => Some(self.of_endpoints(td, cluster, narrows)),
            Peers::Labelled(td, labels) if td == own => Some(self.of_entries(narrows, |e| has(e, labels))),
            // A peer's labels are its own affair, and a group is resolved above.
            Peers::Labelled(..) | Peers::Group(..) => None,
            Peers::Id(_) | Peers::Below(..) | Peers::Domain(_) | Peers::Ids(..) => None,
        }
    }

    fn of_entries(&self, narrows: bool, fits: impl Fn(&Entry) -> bool) -> BTreeSet<SpiffeId> {
        let is_in = |id: &&SpiffeId| {
            let mut given =
                self.state.entries_of(id).map(|row| &row.entry).filter(|e| self.state.is_given(e)).peekable();
            given.peek().is_some() && if narrows { given.any(&fits) } else { given.all(&fits) }
        };
        self.state.giving.keys().filter(is_in).cloned().collect()
    }

    fn of_endpoints(&self, td: &TrustDomain, cluster: &ClusterId, narrows: bool) -> BTreeSet<SpiffeId> {
        let (mut within, mut elsewhere) = (BTreeSet::new(), BTreeSet::new());
        let from = (td.clone(), std::net::Ipv4Addr::UNSPECIFIED);
        let rows = self.state.endpoints.range((Bound::Included(from), Bound::Unbounded));
        for (_, row) in rows.take_while(|((origin, _), _)| origin == td) {
            let place = if row.object.cluster == *cluster { &mut within } else { &mut elsewhere };
            place.insert(row.object.spiffe_id.clone());
        }
        if narrows { within } else { within.difference(&elsewhere).cloned().collect() }
    }
}

fn has(entry: &Entry, labels: &Labels) -> bool {
    labels.iter().all(|(key, value)| entry.extras.labels.get(key) == Some(value))
}
