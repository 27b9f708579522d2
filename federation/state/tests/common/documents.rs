//! Documents of a cell, as tests write them.

use super::{Cell, cluster, entry};
use ambit_model::{Entry, EntryExtras, Extras, Refusal};
use ambit_policy::Document;
use ambit_state::{Command, DocumentKind, DocumentsChange, Reply};

/// Documents as an operator writes them, and what to delete.
pub(crate) fn change(yaml: &str, delete: &[(DocumentKind, &str)]) -> DocumentsChange {
    let delete = delete.iter().map(|(kind, name)| (*kind, name.parse().unwrap())).collect();
    let mut change = DocumentsChange { delete, by: "me".into(), ..DocumentsChange::default() };
    for document in ambit_policy::parse(yaml).unwrap() {
        match document {
            Document::Policy(policy) => change.policies.push(policy),
            Document::Service(service) => change.services.push(service),
            Document::Group(group) => change.groups.push(group),
            Document::Egress(egress) => change.egress.push(egress),
        }
    }
    change
}

/// What came of a change.
pub(crate) fn run(cell: &mut Cell, change: DocumentsChange) -> Result<Vec<bool>, Refusal> {
    match cell.run(Command::ChangeDocuments(Box::new(change)))? {
        Reply::Documents(done, _) => Ok(done),
        other => panic!("{other:?}"),
    }
}

/// The same of documents alone.
pub(crate) fn apply(cell: &mut Cell, yaml: &str) -> Result<Vec<bool>, Refusal> {
    run(cell, change(yaml, &[]))
}

/// An entry of that cluster with these labels.
pub(crate) fn named(id: &str, spiffe_id: &str, of: &str, labels: &[&str]) -> Entry {
    let labels = labels.iter().map(|text| ambit_model::policy::label(text).unwrap()).collect();
    let extras = Extras::new(EntryExtras { labels, ..EntryExtras::NONE }).unwrap();
    Entry { spiffe_id: spiffe_id.parse().unwrap(), cluster: cluster(of), extras, ..entry(id, "west") }
}
