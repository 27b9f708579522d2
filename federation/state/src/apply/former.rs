//! Commands on documents that replicas of 0.1 made, done as they did them, to the byte: a replica that finds them in its log
//! after an upgrade, and one that had them in its snapshot, come to one state.

use super::documents::{POLICIES_MAX, SERVICES_MAX, in_use, remember, write};
use super::{At, addresses, cell_row, touch};
use crate::command::{DocumentKind, Reply};
use crate::objects::{DocumentChange, StoredDocument};
use crate::state::State;
use ambit_model::policy::{Policy, Service};
use ambit_model::{Code, ObjectName, Refusal};
use ambit_policy::{Document, check_owner};

/// All documents or none: every one is checked before the first is written.
pub(super) fn apply_documents(
    s: &mut State,
    at: At,
    policies: &[Policy],
    services: &[Service],
    by: &str,
) -> Result<Reply, Refusal> {
    let own = cell_row(s)?.trust_domain;
    policies.iter().try_for_each(|policy| check_owner(&Document::Policy(policy.clone()), &own))?;
    for service in services {
        check_owner(&Document::Service(service.clone()), &own)?;
        let other = |(origin, name): &(_, _)| *origin != own || *name != service.name;
        let taken = s.services().find(|(key, row)| row.object.address == service.address && other(key));
        if let Some(((origin, name), _)) = taken {
            return Err(in_use(service.address, &format!("{name} of {origin}")));
        }
        if let Some(origin) = addresses::endpoint_origin(s, service.address) {
            return Err(in_use(service.address, &format!("a workload of {origin}")));
        }
    }
    let held = s.policies().filter(|((td, _), _)| *td == own).count();
    let served = s.services().filter(|((td, _), _)| *td == own).count();
    if held + policies.len() > POLICIES_MAX || served + services.len() > SERVICES_MAX {
        let expected = format!("at most {POLICIES_MAX} policies and {SERVICES_MAX} services");
        return Err(Refusal::new(Code::Busy, expected, "more"));
    }
    let policies = policies.iter().cloned().map(StoredDocument::Policy);
    let services = services.iter().cloned().map(StoredDocument::Service);
    let mut changes = Vec::new();
    for document in policies.chain(services) {
        let (kind, name) = (document.kind(), document.name().clone());
        changes.push(write(s, at, &own, by, kind, &name, Some(document))?);
    }
    done(s, at, by, changes)
}

/// One document of this cell.
pub(super) fn delete(s: &mut State, at: At, kind: DocumentKind, name: &ObjectName) -> Result<Reply, Refusal> {
    let own = cell_row(s)?.trust_domain;
    if s.document(kind, name).is_none() {
        let expected = format!("a {} of this cell", kind.as_str().to_lowercase());
        return Err(Refusal::new(Code::NotFound, expected, name.as_str()));
    }
    let change = write(s, at, &own, "", kind, name, None)?;
    done(s, at, "", vec![change])
}

/// 0.1 remembered no changes. Where one is remembered every replica is of a later release, for 0.1 stops at such a command;
/// then these are remembered too, or going back would leave them out.
fn done(s: &mut State, at: At, by: &str, mut changes: Vec<DocumentChange>) -> Result<Reply, Refusal> {
    let changed: Vec<bool> = changes.iter().map(|change| change.before != change.after).collect();
    changes.retain(|change| change.before != change.after);
    if !changes.is_empty() {
        touch(s, at);
        if s.document_changes.len() > 0 {
            remember(s, at, (by, ""), changes)?;
        }
    }
    Ok(Reply::Documents(changed, cell_row(s)?.export_seq))
}
