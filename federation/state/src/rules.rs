//! Policies as they decide: sets that have names resolved to who is in them now, and what is over left out.
//!
//! Who is in a cluster, or has labels, says the cell from its own entries; of a peer's clusters it says it from the endpoints
//! that the peer exported. An identity may have several entries: an allow means it only where all of them fit, whatever
//! narrows where one does. What the cell cannot tell closes (`resolve.rs`).

use crate::command::{DocumentKind, DocumentsChange};
use crate::objects::{DocumentsRow, GroupRow, StoredDocument};
use crate::resolve::Resolver;
use crate::state::{OwnedName, State};
use ambit_model::policy::Policy;
use ambit_model::{Code, Moment, ObjectName, Refusal, Revision, SpiffeId, Stamp};
use ambit_policy::PolicySet;
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

    /// Those of them that speak of calls to `destination`: what decides about these, and what could.
    pub fn policies_to(&self, destination: &SpiffeId) -> PolicySet {
        self.resolved_where(None, |policy| policy.target.contains(destination))
    }

    /// The same as it would be after a change.
    pub fn policies_to_after(&self, destination: &SpiffeId, change: &DocumentsChange) -> PolicySet {
        self.resolved_where(Some(change), |policy| policy.target.contains(destination))
    }

    /// All policies as they would be after a change.
    pub fn policy_set_after(&self, change: &DocumentsChange) -> PolicySet {
        self.resolved_where(Some(change), |_| true)
    }

    /// Policies of this cell as they would be after a change, by name.
    pub(crate) fn own_policies_after<'a>(
        &'a self,
        change: Option<&'a DocumentsChange>,
    ) -> impl Iterator<Item = (&'a ObjectName, &'a Policy)> {
        let written: BTreeMap<_, _> =
            change.iter().flat_map(|change| &change.policies).map(|policy| (&policy.name, policy)).collect();
        let deleted = change.iter().flat_map(|change| &change.delete);
        let deleted = deleted.filter(|(kind, _)| *kind == DocumentKind::Policy).map(|(_, name)| name);
        let gone: BTreeSet<&ObjectName> = written.keys().copied().chain(deleted).collect();
        let own = self.cell().map(|cell| &cell.trust_domain);
        let held = self.policies().filter(move |((origin, name), _)| Some(origin) == own && !gone.contains(name));
        held.map(|((_, name), row)| (name, &row.object)).chain(written)
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
                Some(StoredDocument::Egress(egress)) => back.egress.push(egress),
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
        self.resolved_where(None, wanted)
    }

    /// This cell's policies first: what fits is theirs before any peer's.
    fn resolved_where(&self, change: Option<&DocumentsChange>, wanted: impl Fn(&Policy) -> bool) -> PolicySet {
        let mut set = PolicySet::new(self.known_domains());
        let Some(own) = self.cell().map(|cell| &cell.trust_domain) else { return set };
        let resolver = Resolver::new(self, change);
        let ours = self.own_policies_after(change).map(|(name, policy)| (own, name, policy));
        let theirs = self.policies().filter(|((origin, _), _)| origin != own);
        for (origin, name, policy) in ours.chain(theirs.map(|((origin, name), row)| (origin, name, &row.object))) {
            if let Some(policy) = resolver.policy(origin, name, policy).filter(|policy| wanted(policy)) {
                set.insert(origin.clone(), policy.into_owned());
            }
        }
        set
    }

    /// Groups of this cell and its peers.
    pub fn groups(&self) -> impl Iterator<Item = (&OwnedName, &GroupRow)> {
        self.groups.iter()
    }

    /// One of them.
    pub fn group(&self, name: &OwnedName) -> Option<&GroupRow> {
        self.groups.get(name)
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
            DocumentKind::Egress => self.egress.get(&key).map(|row| StoredDocument::Egress(row.object.clone())),
        }
    }

    /// Identities that this cell knows: those that it gives, and those that are reported to run at peers.
    pub fn known_identities(&self) -> BTreeSet<SpiffeId> {
        let given = self.giving.keys().cloned();
        given.chain(self.endpoints().map(|(_, row)| row.object.spiffe_id.clone())).collect()
    }

    /// Whether a policy or egress document ends after the one stamp and not after the other: what nodes need is another then.
    pub(crate) fn policy_ends_in(&self, after: Stamp, until: Stamp) -> bool {
        let between = (Bound::Excluded(after), Bound::Included(until));
        let ends = |of: &BTreeMap<Stamp, BTreeSet<OwnedName>>| of.range(between).next().is_some();
        after < until && (ends(&self.policy_ends) || ends(&self.egress_ends))
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
        index_end(&mut self.policy_ends, key, end, present);
    }

    pub(crate) fn index_egress_end(&mut self, key: &OwnedName, end: Stamp, present: bool) {
        index_end(&mut self.egress_ends, key, end, present);
    }
}

fn index_end(ends: &mut BTreeMap<Stamp, BTreeSet<OwnedName>>, key: &OwnedName, end: Stamp, present: bool) {
    if end == Stamp(u64::MAX) {
        return;
    }
    let names = ends.entry(end).or_default();
    let _ = if present { names.insert(key.clone()) } else { names.remove(key) };
    if names.is_empty() {
        ends.remove(&end);
    }
}
