//! Egress documents of this cell: who may write what, and where they are kept. Peers hear nothing of them.

use super::documents::{check_set, members_of};
use super::{At, touch};
use crate::command::{DocumentKind, DocumentsChange};
use crate::objects::EgressRow;
use crate::resolve::Resolver;
use crate::state::{OwnedName, State};
use ambit_model::policy::{Egress, Peers};
use ambit_model::{ObjectName, Refusal, TrustDomain};
use ambit_policy::Document;
use std::collections::BTreeMap;

/// Of one cell: with all the ranges of each they fit the kernel's table of ranges on every node.
pub(super) const EGRESS_MAX: usize = 1_000;

/// Whether a kernel would enforce it, its sets are there, and its callers are ours.
pub(super) fn check(
    s: &State,
    own: &TrustDomain,
    egress: &Egress,
    groups: &BTreeMap<ObjectName, Vec<Peers>>,
) -> Result<(), Refusal> {
    ambit_policy::check_enforceable(&Document::Egress(egress.clone()))?;
    let told = |r: Refusal| Refusal::new(r.code, r.expected, format!("egress {}: {}", egress.name, r.found));
    egress.from.iter().try_for_each(|set| check_set(s, own, set, groups)).map_err(told)?;
    let from = members_of(&egress.from, groups);
    ambit_policy::check_owner(&Document::Egress(Egress { from, ..egress.clone() }), own)
}

/// Those that stay as they are must still find their groups, and these must still be of callers of ours.
pub(super) fn check_staying(
    s: &State,
    own: &TrustDomain,
    asked: &DocumentsChange,
    groups: &BTreeMap<ObjectName, Vec<Peers>>,
) -> Result<(), Refusal> {
    let written = |name: &ObjectName| asked.egress.iter().any(|egress| egress.name == *name);
    let gone = |name: &ObjectName| asked.delete.contains(&(DocumentKind::Egress, name.clone()));
    let staying = s.egress().filter(|((_, name), _)| !written(name) && !gone(name)).map(|(_, row)| &row.object);
    let using = |egress: &&Egress| egress.from.iter().any(|set| matches!(set, Peers::Group(..)));
    staying.filter(using).try_for_each(|egress| check(s, own, egress, groups))
}

/// Whether agents can be told all that they name.
pub(super) fn check_room(s: &State, asked: &DocumentsChange) -> Result<(), Refusal> {
    let named = asked.egress.iter().any(|egress| egress.from.iter().any(Peers::is_named));
    if !named && asked.groups.is_empty() {
        return Ok(());
    }
    Resolver::new(s, Some(asked)).check_egress_room(s.own_egress_after(Some(asked)))
}

/// Addresses that were left long ago are outside from now on, and nodes that may let somebody out, or in by address, are told.
pub(super) fn forget(s: &mut State, at: At) {
    let by_address = |s: &State| s.policies().any(|(_, row)| !row.object.extras.unmeshed.is_empty());
    if s.forget_left(at.stamp) && (s.egress().next().is_some() || by_address(s)) {
        touch(s, at);
    }
}

/// Puts it in the place of what is there.
pub(super) fn put(s: &mut State, key: &OwnedName, row: Option<EgressRow>) {
    if let Some(end) = s.egress.get(key).map(|row| row.object.expires_at) {
        s.index_egress_end(key, end, false);
    }
    match row {
        Some(row) => {
            s.index_egress_end(key, row.object.expires_at, true);
            s.egress.put(&mut s.journal, key.clone(), row);
        }
        None => drop(s.egress.remove(&mut s.journal, key)),
    }
}
