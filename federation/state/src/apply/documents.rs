//! Policies, services, groups and egress of this cell: changed all at once or not at all, and every change remembered.

use super::{At, addresses, cell_row, egress, export, payload, touch};
use crate::command::{DocumentKind, DocumentsChange, Reply};
use crate::objects::{DocumentChange, DocumentsRow, Owned, StoredDocument};
use crate::resolve::{self, Resolver};
use crate::state::State;
use ambit_model::policy::{Action, Peers, Policy, Service};
use ambit_model::record::Kind;
use ambit_model::{Code, ObjectName, Refusal, Revision, TrustDomain};
use ambit_policy::Document;
use std::collections::{BTreeMap, BTreeSet};

/// Bounds on what one cell holds; past them a write is refused, never memory exhausted (I17).
pub(super) const POLICIES_MAX: usize = 50_000;
pub(super) const SERVICES_MAX: usize = 10_000;
const GROUPS_MAX: usize = 1_000;
/// Changes remembered, and documents in them: enough to go back a few days, small beside the policies themselves.
const CHANGES_MAX: usize = 200;
const CHANGED_MAX: usize = 20_000;
/// Bytes of what is remembered: one document may be half a megabyte, and a snapshot holds 128 MiB.
const CHANGED_BYTES_MAX: u64 = 16 << 20;

/// Whether documents could be changed so.
pub(crate) fn check(s: &State, asked: &DocumentsChange) -> Result<(), Refusal> {
    let own = cell_row(s)?.trust_domain;
    if let Some(over) = asked.over.filter(|over| *over != s.document_revision()) {
        let found = format!("revision {}", s.document_revision().0);
        return Err(Refusal::new(Code::StaleRevision, format!("documents as of revision {}", over.0), found));
    }
    asked.delete.iter().try_for_each(|(kind, name)| is_there(s, &own, *kind, name))?;
    check_room(s, &own, asked)?;
    check_written(s, &own, asked)
}

/// Documents as they were right after a change.
pub(super) fn rollback(
    s: &mut State,
    at: At,
    to: Revision,
    over: Option<Revision>,
    (by, note): (&str, &str),
) -> Result<Reply, Refusal> {
    let change_back = s.change_back(to)?;
    let notes = [change_back.note.as_str(), note].into_iter().filter(|text| !text.is_empty());
    let note = notes.collect::<Vec<_>>().join("; ");
    change(s, at, &DocumentsChange { over, by: by.to_owned(), note, ..change_back })
}

/// Writes and deletes documents: every one is checked before the first is touched.
pub(super) fn change(s: &mut State, at: At, asked: &DocumentsChange) -> Result<Reply, Refusal> {
    check(s, asked)?;
    let own = cell_row(s)?.trust_domain;
    let mut done = Vec::new();
    let mut changes = Vec::new();
    for (kind, name) in &asked.delete {
        changes.push(write(s, at, &own, &asked.by, *kind, name, None)?);
        done.push(true);
    }
    let policies = asked.policies.iter().cloned().map(StoredDocument::Policy);
    let services = asked.services.iter().cloned().map(StoredDocument::Service);
    let groups = asked.groups.iter().cloned().map(StoredDocument::Group);
    let egress = asked.egress.iter().cloned().map(StoredDocument::Egress);
    for document in groups.chain(policies).chain(services).chain(egress) {
        let (kind, name) = (document.kind(), document.name().clone());
        let change = write(s, at, &own, &asked.by, kind, &name, Some(document))?;
        done.push(change.before != change.after);
        changes.push(change);
    }
    changes.retain(|change| change.before != change.after);
    if !changes.is_empty() {
        touch(s, at);
        remember(s, at, (&asked.by, &asked.note), changes)?;
    }
    // Policies first, then services, as they were always answered; then egress, and last groups.
    done.rotate_left(asked.delete.len() + asked.groups.len());
    Ok(Reply::Documents(done, cell_row(s)?.export_seq))
}

fn is_there(s: &State, own: &TrustDomain, kind: DocumentKind, name: &ObjectName) -> Result<(), Refusal> {
    let key = (own.clone(), name.clone());
    let (there, what) = match kind {
        DocumentKind::Policy => (s.policies.contains(&key), "a policy of this cell"),
        DocumentKind::Service => (s.services.contains(&key), "a service of this cell"),
        DocumentKind::Group => (s.groups.contains(&key), "a group of this cell"),
        DocumentKind::Egress => (s.egress.contains(&key), "an egress document of this cell"),
    };
    if there { Ok(()) } else { Err(Refusal::new(Code::NotFound, what, name.as_str())) }
}

/// Only what is this cell's counts: peers have bounds of their own and never use up ours.
fn check_room(s: &State, own: &TrustDomain, asked: &DocumentsChange) -> Result<(), Refusal> {
    fn after<'a>(
        asked: &DocumentsChange,
        kind: DocumentKind,
        held: impl Iterator<Item = &'a ObjectName>,
        written: impl Iterator<Item = &'a ObjectName>,
    ) -> usize {
        let gone = |name: &&ObjectName| asked.delete.contains(&(kind, (*name).clone()));
        held.filter(|name| !gone(name)).chain(written).collect::<BTreeSet<_>>().len()
    }
    let services = s.services().filter(|((td, _), _)| td == own).map(|((_, name), _)| name);
    let groups = s.groups().filter(|((td, _), _)| td == own).map(|((_, name), _)| name);
    let services = after(asked, DocumentKind::Service, services, asked.services.iter().map(|service| &service.name));
    let groups = after(asked, DocumentKind::Group, groups, asked.groups.iter().map(|group| &group.name));
    let held = s.egress().map(|((_, name), _)| name);
    let egress = after(asked, DocumentKind::Egress, held, asked.egress.iter().map(|egress| &egress.name));
    let policies = s.own_policies_after(Some(asked)).count();
    if egress > egress::EGRESS_MAX {
        let expected = format!("at most {} egress documents", egress::EGRESS_MAX);
        return Err(Refusal::new(Code::Busy, expected, egress.to_string()));
    }
    if policies > POLICIES_MAX || services > SERVICES_MAX || groups > GROUPS_MAX {
        let expected = format!("at most {POLICIES_MAX} policies, {SERVICES_MAX} services and {GROUPS_MAX} groups");
        let found = format!("{policies}, {services} and {groups}");
        return Err(Refusal::new(Code::Busy, expected, found));
    }
    Ok(())
}

fn check_written(s: &State, own: &TrustDomain, asked: &DocumentsChange) -> Result<(), Refusal> {
    let deleted: BTreeSet<&ObjectName> =
        asked.delete.iter().filter(|(kind, _)| *kind == DocumentKind::Group).map(|(_, name)| name).collect();
    let mut groups: BTreeMap<ObjectName, Vec<Peers>> = s
        .groups()
        .filter(|((td, name), _)| td == own && !deleted.contains(name))
        .map(|((_, name), row)| (name.clone(), row.object.members.clone()))
        .collect();
    for group in &asked.groups {
        groups.insert(group.name.clone(), group.members.clone());
        group.members.iter().try_for_each(|set| check_set(s, own, set, &groups))?;
    }
    for policy in &asked.policies {
        check_policy(s, own, policy, &groups)?;
    }
    asked.egress.iter().try_for_each(|document| egress::check(s, own, document, &groups))?;
    // Policies that stay as they are must still find their groups, and still be theirs to write.
    if !asked.groups.is_empty() || !deleted.is_empty() {
        let written: BTreeSet<&ObjectName> = asked.policies.iter().map(|policy| &policy.name).collect();
        let gone = |name: &ObjectName| asked.delete.contains(&(DocumentKind::Policy, name.clone()));
        let staying = s.policies().filter(|((td, name), _)| td == own && !written.contains(name) && !gone(name));
        let using = staying.filter(|(_, row)| row.object.from.iter().any(|set| matches!(set, Peers::Group(..))));
        for (_, row) in using {
            check_policy(s, own, &row.object, &groups)?;
        }
        egress::check_staying(s, own, asked, &groups)?;
    }
    asked.services.iter().try_for_each(|service| check_service(s, own, asked, service))?;
    egress::check_room(s, asked)?;
    if asked.groups.is_empty() && !asked.policies.iter().any(resolve::has_named) {
        return Ok(());
    }
    let policies = s.own_policies_after(Some(asked)).map(|(_, policy)| policy);
    Resolver::new(s, Some(asked)).check_room(policies)
}

fn check_policy(
    s: &State,
    own: &TrustDomain,
    policy: &Policy,
    groups: &BTreeMap<ObjectName, Vec<Peers>>,
) -> Result<(), Refusal> {
    ambit_policy::check_enforceable(&Document::Policy(policy.clone()))?;
    let told = |r: Refusal| Refusal::new(r.code, r.expected, format!("policy {}: {}", policy.name, r.found));
    policy.from.iter().chain([&policy.target]).try_for_each(|set| check_set(s, own, set, groups)).map_err(told)?;
    let from = members_of(&policy.from, groups);
    let labelled = from.iter().chain([&policy.target]).any(|set| matches!(set, Peers::Labelled(..)));
    if let Some(other) = from.iter().chain([&policy.target]).find(|set| labelled && set.trust_domain() != *own) {
        // Labels stay in their cell: a peer could enforce neither end of it.
        let expected = format!("with labels, identities of {own} only (peers do not know its labels)");
        return Err(told(Refusal::new(Code::PolicyUnenforceable, expected, other.to_string())));
    }
    check_callers(own, policy, &from).map_err(told)?;
    ambit_policy::check_owner(&Document::Policy(Policy { from, ..policy.clone() }), own)
}

/// The sets, and in the place of a group its members: whose callers it names is whose they are, not whose the group is.
pub(super) fn members_of(sets: &[Peers], groups: &BTreeMap<ObjectName, Vec<Peers>>) -> Vec<Peers> {
    let named = |set: &Peers| match set {
        Peers::Group(_, name) => groups.get(name).cloned().unwrap_or_default(),
        Peers::Id(_)
        | Peers::Below(..)
        | Peers::Domain(_)
        | Peers::Cluster(..)
        | Peers::Labelled(..)
        | Peers::Ids(..) => vec![set.clone()],
    };
    sets.iter().flat_map(named).collect()
}

/// Whoever judges by a deny must be able to tell who is denied. Who runs in a cluster only its own cell knows before it runs,
/// so callers are denied by cluster where both ends are of that cell.
fn check_callers(own: &TrustDomain, policy: &Policy, from: &[Peers]) -> Result<(), Refusal> {
    let by_cluster = from.iter().find(|set| matches!(set, Peers::Cluster(..)));
    let Some(set) = by_cluster.filter(|_| policy.action != Action::Allow) else { return Ok(()) };
    let td = set.trust_domain();
    if td == *own && policy.target.trust_domain() == *own {
        return Ok(());
    }
    let expected = format!(
        "callers of a deny or audit as spiffe://{td}/path, spiffe://{td}/prefix/* or spiffe://{td}/* (who is in {set} only its \
         own cell knows before they run)"
    );
    Err(Refusal::new(Code::PolicyUnenforceable, expected, set.to_string()))
}

/// A set that is resolved by this cell must be there to be resolved.
pub(super) fn check_set(
    s: &State,
    own: &TrustDomain,
    set: &Peers,
    groups: &BTreeMap<ObjectName, Vec<Peers>>,
) -> Result<(), Refusal> {
    match set {
        Peers::Group(td, name) if td != own || !groups.contains_key(name) => {
            Err(Refusal::new(Code::NotFound, format!("a group of {own}"), set.to_string()))
        }
        Peers::Labelled(td, _) if td != own => {
            Err(Refusal::new(Code::PolicyUnenforceable, format!("labels of {own}"), set.to_string()))
        }
        Peers::Cluster(td, name) if td == own && !s.clusters.contains(name) => {
            Err(Refusal::new(Code::NotFound, "a cluster of this cell", set.to_string()))
        }
        // Only a cell says it, to its agents.
        Peers::Ids(..) => Err(Refusal::new(Code::BadRequest, "a set as documents write it", set.to_string())),
        Peers::Id(_)
        | Peers::Below(..)
        | Peers::Domain(_)
        | Peers::Cluster(..)
        | Peers::Group(..)
        | Peers::Labelled(..) => Ok(()),
    }
}

/// Judged by what is there after the change: what it deletes, or moves elsewhere, is in nobody's way.
fn check_service(s: &State, own: &TrustDomain, asked: &DocumentsChange, service: &Service) -> Result<(), Refusal> {
    let deleted = |name: &ObjectName| asked.delete.iter().any(|gone| *gone == (DocumentKind::Service, name.clone()));
    let written = |name: &ObjectName| asked.services.iter().any(|other| other.name == *name);
    let staying = s.services().filter(|((origin, name), _)| origin != own || !(deleted(name) || written(name)));
    let staying = staying.map(|((origin, name), row)| (origin, name, row.object.address));
    let others = asked.services.iter().map(|other| (own, &other.name, other.address));
    let others = others.filter(|(_, name, _)| **name != service.name);
    let taken = staying.chain(others).find(|(_, _, address)| *address == service.address);
    if let Some((origin, name, _)) = taken {
        return Err(in_use(service.address, &format!("{name} of {origin}")));
    }
    check_backends(service, own)?;
    // At a workload's address it would get the calls meant for the workload.
    match addresses::endpoint_origin(s, service.address) {
        Some(origin) => Err(in_use(service.address, &format!("a workload of {origin}"))),
        None => Ok(()),
    }
}

pub(super) fn in_use(address: ambit_model::Address, by: &str) -> Refusal {
    Refusal::new(Code::AlreadyExists, "a virtual address not in use", format!("{address} is {by}"))
}

fn check_backends(service: &Service, own: &TrustDomain) -> Result<(), Refusal> {
    ambit_policy::check_owner(&Document::Service(service.clone()), own)?;
    match service.backends.iter().find(|set| set.is_named() || matches!(set, Peers::Ids(..))) {
        Some(set) => {
            let expected = "backends as spiffe://td/path, spiffe://td/prefix/* or spiffe://td/*";
            Err(Refusal::new(Code::PolicyUnenforceable, expected, format!("service {}: {set}", service.name)))
        }
        None => Ok(()),
    }
}

/// Puts `after` in the place of what is there, and exports it where it is another; of egress peers hear nothing.
pub(super) fn write(
    s: &mut State,
    at: At,
    own: &TrustDomain,
    by: &str,
    kind: DocumentKind,
    name: &ObjectName,
    after: Option<StoredDocument>,
) -> Result<DocumentChange, Refusal> {
    let key = (own.clone(), name.clone());
    let before = match kind {
        DocumentKind::Policy => s.policies.get(&key).map(|row| StoredDocument::Policy(row.object.clone())),
        DocumentKind::Service => s.services.get(&key).map(|row| StoredDocument::Service(row.object.clone())),
        DocumentKind::Group => s.groups.get(&key).map(|row| StoredDocument::Group(row.object.clone())),
        DocumentKind::Egress => s.egress.get(&key).map(|row| StoredDocument::Egress(row.object.clone())),
    };
    if before == after {
        return Ok(DocumentChange { kind, name: name.clone(), before, after });
    }
    let address = |document: &Option<StoredDocument>| match document {
        Some(StoredDocument::Service(service)) => Some(service.address),
        _ => None,
    };
    if address(&before) != address(&after) {
        s.leave(at.stamp, address(&before), false);
    }
    let (revision, written_by) = (Revision(at.index.0), by.to_owned());
    let (record, bytes) = match (kind, &after) {
        (DocumentKind::Policy, None) => {
            s.reindex_policy(&key, |s| drop(s.policies.remove(&mut s.journal, &key)));
            (Kind::Policy, Vec::new())
        }
        (DocumentKind::Service, None) => {
            s.services.remove(&mut s.journal, &key);
            (Kind::Service, Vec::new())
        }
        (DocumentKind::Group, None) => {
            s.groups.remove(&mut s.journal, &key);
            (Kind::Group, Vec::new())
        }
        (DocumentKind::Egress, None) => {
            egress::put(s, &key, None);
            return Ok(DocumentChange { kind, name: name.clone(), before, after });
        }
        (_, Some(StoredDocument::Policy(policy))) => {
            let row = Owned { object: policy.clone(), revision, written_by };
            #[cfg(ambit_mutant)]
            let row = if crate::mutant::is("policy-version-of-document") {
                Owned { revision: Revision(policy.ports.first().map_or(0, |port| u64::from(*port % 7))), ..row }
            } else {
                row
            };
            s.reindex_policy(&key, |s| s.policies.put(&mut s.journal, key.clone(), row));
            (Kind::Policy, payload(policy)?)
        }
        (_, Some(StoredDocument::Service(service))) => {
            let row = Owned { object: service.clone(), revision, written_by };
            s.services.put(&mut s.journal, key, row);
            (Kind::Service, payload(service)?)
        }
        (_, Some(StoredDocument::Group(group))) => {
            let row = Owned { object: group.clone(), revision, written_by };
            s.groups.put(&mut s.journal, key, row);
            (Kind::Group, payload(group)?)
        }
        (_, Some(StoredDocument::Egress(egress))) => {
            egress::put(s, &key, Some(Owned { object: egress.clone(), revision, written_by }));
            return Ok(DocumentChange { kind, name: name.clone(), before, after });
        }
    };
    export(s, record, name.to_string(), bytes);
    Ok(DocumentChange { kind, name: name.clone(), before, after })
}

/// The oldest changes go where there is no room. The newest stays, since who changes documents names it: where it is too
/// large alone, it stays without its documents, and nothing before it can be come back to.
pub(super) fn remember(
    s: &mut State,
    at: At,
    (by, note): (&str, &str),
    changes: Vec<DocumentChange>,
) -> Result<(), Refusal> {
    let bytes = payload(&changes)?.len() as u64;
    let mut row = DocumentsRow { stamp: at.stamp, by: by.to_owned(), note: note.to_owned(), changes, bytes };
    if bytes > CHANGED_BYTES_MAX {
        let too_large = format!("{} documents of {bytes} bytes, too large to be remembered", row.changes.len());
        row.note = [row.note, too_large].into_iter().filter(|text| !text.is_empty()).collect::<Vec<_>>().join("; ");
        (row.changes, row.bytes) = (Vec::new(), 0);
        s.document_changes.prune(&mut s.journal, |_, _| true);
    }
    s.document_changes.put(&mut s.journal, at.index.0, row);
    loop {
        let rows = || s.document_changes.iter().map(|(_, row)| row);
        let (held, bytes): (usize, u64) =
            (rows().map(|row| row.changes.len()).sum(), rows().map(|row| row.bytes).sum());
        let count = s.document_changes.len();
        let full = count > CHANGES_MAX || held > CHANGED_MAX || bytes > CHANGED_BYTES_MAX;
        let oldest = s.document_changes.iter().next().map(|(index, _)| *index);
        let Some(oldest) = oldest.filter(|_| count > 1 && full) else { return Ok(()) };
        s.document_changes.remove(&mut s.journal, &oldest);
    }
}
