//! Entries, policies, services and endpoints of this cell.

use super::{At, addresses, cell_row, export, payload, touch};
use crate::command::{Presence, Reply};
use crate::objects::{EntryRow, NodeState, Owned};
use crate::state::State;
use ambit_model::policy::Endpoint;
use ambit_model::record::Kind;
use ambit_model::{Address, Code, Entry, EntryId, NodeId, Refusal, Revision, SpiffeId, TrustDomain};
use std::collections::BTreeSet;

/// Bounds on what one cell holds; past them a write is refused, never memory exhausted (I17).
const ENTRIES_MAX: usize = 200_000;
/// Endpoints that one node may report; more than pods fit on a node.
pub const ENDPOINTS_PER_NODE_MAX: usize = 1_000;

pub(super) fn create_entries(s: &mut State, at: At, entries: &[Entry]) -> Result<Reply, Refusal> {
    let absent = |s: &State, entry: &Entry| {
        let refusal = || Refusal::new(Code::AlreadyExists, "an entry id not in use", entry.id.as_str());
        if s.entries.contains(&entry.id) { Err(refusal()) } else { Ok(()) }
    };
    write_entries(s, at, entries.iter().map(|entry| (entry, absent)))
}

pub(super) fn put_entries(s: &mut State, at: At, entries: &[(Entry, Presence)]) -> Result<Reply, Refusal> {
    let found = |presence: Presence| move |s: &State, entry: &Entry| is_as(s, &entry.id, presence);
    write_entries(s, at, entries.iter().map(|(entry, presence)| (entry, found(*presence))))
}

/// Whether the entry is as it must be for a write over it.
pub(super) fn is_as(s: &State, id: &EntryId, presence: Presence) -> Result<(), Refusal> {
    match (presence, s.entries.get(id)) {
        (Presence::Whatever, _) | (Presence::There, Some(_)) => Ok(()),
        (Presence::At(revision), Some(row)) if row.revision == revision => Ok(()),
        (Presence::At(revision), Some(row)) => {
            Err(Refusal::new(Code::StaleRevision, format!("revision {revision}"), row.revision.to_string()))
        }
        (_, None) => Err(Refusal::new(Code::NotFound, "an entry of this cell", id.as_str())),
    }
}

/// Each entry that may stand, and that the check of what is there lets pass, is written.
fn write_entries<'a, F>(
    s: &mut State,
    at: At,
    entries: impl ExactSizeIterator<Item = (&'a Entry, F)>,
) -> Result<Reply, Refusal>
where
    F: Fn(&State, &Entry) -> Result<(), Refusal>,
{
    let mut cell = cell_row(s)?;
    let mut out = Vec::with_capacity(entries.len());
    let mut changed = false;
    for (entry, there) in entries {
        let result = there(s, entry).and_then(|()| check_entry(s, &cell.trust_domain, entry));
        if result.is_ok() {
            if !s.identities.contains(&entry.spiffe_id) {
                s.identities.put(&mut s.journal, entry.spiffe_id.clone(), cell.next_identity);
                cell.next_identity += 1;
            }
            if let Some(before) = s.entries.get(&entry.id).map(|row| row.entry.clone()) {
                s.index_entry(&before, false);
            }
            let row = EntryRow { entry: entry.clone(), revision: Revision(at.index.0) };
            s.entries.put(&mut s.journal, entry.id.clone(), row);
            s.index_entry(entry, true);
            changed = true;
        }
        out.push(result);
    }
    if changed {
        // Once for all that changed in it, as `touch` and `number` would.
        cell.revision = Revision(at.index.0);
        s.cell.put(&mut s.journal, 0, cell);
    }
    Ok(Reply::Items(out))
}

fn check_entry(s: &State, own: &TrustDomain, entry: &Entry) -> Result<(), Refusal> {
    if s.entries.len() >= ENTRIES_MAX && !s.entries.contains(&entry.id) {
        return Err(Refusal::new(Code::Busy, format!("at most {ENTRIES_MAX} entries"), "one more"));
    }
    if entry.spiffe_id.trust_domain() != *own || entry.spiffe_id.path().starts_with("/ambit/") {
        let expected = format!("an identity of {own} outside /ambit/");
        return Err(Refusal::new(Code::NotOwner, expected, entry.spiffe_id.as_str()));
    }
    if !s.clusters.contains(&entry.cluster) {
        return Err(Refusal::new(Code::NotFound, "a cluster of this cell", entry.cluster.as_str()));
    }
    if entry.extras.expires_at <= s.stamp() {
        let found = format!("{} ms, which is over", entry.extras.expires_at.0);
        return Err(Refusal::new(Code::BadRequest, "an end that is still to come", found));
    }
    // A node is no workload: by its TPM alone every process on it would be meant, and none is recognised.
    if !entry.names_a_workload() {
        let expected = "a selector of the workload (unix:uid, unix:gid or cgroup) beside those of its node";
        return Err(Refusal::new(Code::BadRequest, expected, "none"));
    }
    entry.check_privileged()
}

/// Each with its own outcome.
pub(super) fn delete(s: &mut State, at: At, ids: &[EntryId]) -> Vec<Result<(), Refusal>> {
    let mut out = Vec::with_capacity(ids.len());
    for id in ids {
        out.push(match s.entries.remove(&mut s.journal, id) {
            Some(row) => {
                s.index_entry(&row.entry, false);
                Ok(())
            }
            None => Err(Refusal::new(Code::NotFound, "an entry of this cell", id.as_str())),
        });
    }
    if out.iter().any(Result::is_ok) {
        touch(s, at);
    }
    out
}

/// Entries that ended go. Nothing was issued under them since.
pub(super) fn expire(s: &mut State, at: At) -> Result<(), Refusal> {
    let ended: Vec<EntryId> =
        s.expiring.iter().take_while(|(end, _)| *end <= at.stamp).map(|(_, id)| id.clone()).collect();
    delete(s, at, &ended);
    Ok(())
}

/// Numbers are handed out in log order and never twice.
pub(super) fn number(s: &mut State, id: &SpiffeId) {
    if s.identities.contains(id) {
        return;
    }
    if let Some(mut cell) = s.cell().cloned() {
        s.identities.put(&mut s.journal, id.clone(), cell.next_identity);
        cell.next_identity += 1;
        s.cell.put(&mut s.journal, 0, cell);
    }
}

/// Each endpoint with its own outcome: one that may not be there does not take the others along.
pub(super) fn report_endpoints(
    s: &mut State,
    at: At,
    id: &NodeId,
    reported: &[Endpoint],
) -> Result<Vec<Result<(), Refusal>>, Refusal> {
    let Some(node) = s.node(id).filter(|n| n.state == NodeState::Admitted).cloned() else {
        return Err(Refusal::new(Code::NodeUntrusted, "an admitted node", id.to_string()));
    };
    if reported.len() > ENDPOINTS_PER_NODE_MAX {
        let expected = format!("at most {ENDPOINTS_PER_NODE_MAX} endpoints a node");
        return Err(Refusal::new(Code::Busy, expected, reported.len().to_string()));
    }
    let own = cell_row(s)?.trust_domain;
    let (mut mine, mut out) = (Vec::<Endpoint>::new(), Vec::with_capacity(reported.len()));
    let mut seen = BTreeSet::new();
    for endpoint in reported {
        let result = if !s.may_run(&endpoint.spiffe_id, id) {
            let found = endpoint.spiffe_id.as_str();
            Err(Refusal::new(Code::EntryNotOnNode, "an identity this node may run", found))
        } else if !seen.insert(endpoint.address) {
            Err(Refusal::new(Code::AlreadyExists, "each address once", endpoint.address.to_string()))
        } else {
            free_for(s, &own, id, endpoint.address)
        };
        if result.is_ok() {
            let (cluster, generation) = (node.cluster.clone(), node.generation);
            mine.push(Endpoint { cluster, node: *id, generation, ..endpoint.clone() });
        }
        out.push(result);
    }
    replace_endpoints(s, at, id, &mine)?;
    Ok(out)
}

/// A verdict took entries from the node: their endpoints on it go too, whatever its agent says of them.
pub(super) fn drop_unfit_endpoints(s: &mut State, at: At, id: &NodeId) -> Result<(), Refusal> {
    let own = cell_row(s)?.trust_domain;
    let mine = s.endpoints().filter(|(origin, row)| **origin == own && row.object.node == *id);
    let kept: Vec<Endpoint> = mine.map(|(_, row)| row.object.clone()).filter(|e| s.may_run(&e.spiffe_id, id)).collect();
    replace_endpoints(s, at, id, &kept)
}

/// An address is another's while an admitted node or a service of this cell holds it.
fn free_for(s: &State, own: &TrustDomain, id: &NodeId, address: Address) -> Result<(), Refusal> {
    let holder = s.endpoints.get(&(own.clone(), address)).map(|row| row.object.node).filter(|node| node != id);
    if let Some(node) = holder.filter(|node| s.node(node).is_some_and(|n| n.state == NodeState::Admitted)) {
        let found = format!("{address} is on node {node}");
        return Err(Refusal::new(Code::AlreadyExists, "an address of this node", found));
    }
    if let Some((origin, name)) = addresses::service_at(s, address).filter(|(origin, _)| origin == own) {
        let found = format!("{address} is service {name} of {origin}");
        return Err(Refusal::new(Code::AlreadyExists, "an address of this node", found));
    }
    Ok(())
}

/// The node's endpoints become exactly these; only differences are written and exported.
pub(super) fn replace_endpoints(s: &mut State, at: At, id: &NodeId, wanted: &[Endpoint]) -> Result<(), Refusal> {
    let own = cell_row(s)?.trust_domain;
    // A peer's rows may name any node: whose a row is says its key, never the object in it.
    let gone: Vec<Address> = s
        .endpoints
        .from((own.clone(), Address::FIRST))
        .take_while(|((origin, _), _)| *origin == own)
        .filter(|(_, row)| row.object.node == *id)
        .map(|((_, address), _)| *address)
        .filter(|address| !wanted.iter().any(|e| e.address == *address))
        .collect();
    let mut changed = !gone.is_empty();
    // The denial goes first: whose node it is, is known here.
    let put_out = s.node(id).is_some_and(|row| s.denied(id) == Some(row.generation));
    s.leave(at.stamp, gone.iter().copied(), put_out);
    for address in gone {
        s.endpoints.remove(&mut s.journal, &(own.clone(), address));
        export(s, Kind::Endpoint, address.to_string(), Vec::new());
    }
    for endpoint in wanted {
        let key = (own.clone(), endpoint.address);
        // A new generation alone moves nothing: denials name generations, endpoints only say where.
        let same = s.endpoints.get(&key).is_some_and(|row| {
            let mut known = row.object.clone();
            known.generation = endpoint.generation;
            known == *endpoint
        });
        if same {
            continue;
        }
        changed = true;
        addresses::free_of_peers(s, &own, endpoint.address);
        let row = Owned { object: endpoint.clone(), revision: Revision(at.index.0), written_by: id.to_string() };
        s.endpoints.put(&mut s.journal, key, row);
        export(s, Kind::Endpoint, endpoint.address.to_string(), payload(endpoint)?);
    }
    if changed {
        touch(s, at);
    }
    Ok(())
}
