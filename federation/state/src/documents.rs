//! What is asked of documents: policies, services, groups and egress of this cell.

mod stored;

use ambit_model::policy::{Egress, Group, Policy, Service};
use ambit_model::{ObjectName, Revision};
use serde::{Deserialize, Serialize};

/// What becomes of documents. Its stored form is in `stored`: one without egress is stored as it always was.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DocumentsChange {
    /// Policies to write.
    pub policies: Vec<Policy>,
    /// Services to write.
    pub services: Vec<Service>,
    /// Groups to write.
    pub groups: Vec<Group>,
    /// What to delete.
    pub delete: Vec<(DocumentKind, ObjectName)>,
    /// Who asked.
    pub by: String,
    /// Why, in a few words; empty for a plain change.
    pub note: String,
    /// Refused where the newest change of documents is another one ([`crate::State::document_revision`]): who judged by what
    /// was there shall not change what came meanwhile.
    pub over: Option<Revision>,
    /// Egress documents to write.
    pub egress: Vec<Egress>,
}

/// Which kind of document.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum DocumentKind {
    /// `kind: Policy`.
    Policy,
    /// `kind: Service`.
    Service,
    /// `kind: Group`.
    Group,
    /// `kind: Egress`.
    Egress,
}

impl DocumentKind {
    /// All of them.
    pub const ALL: [DocumentKind; 4] = [Self::Policy, Self::Service, Self::Group, Self::Egress];

    /// As it is written.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Policy => "Policy",
            Self::Service => "Service",
            Self::Group => "Group",
            Self::Egress => "Egress",
        }
    }
}
