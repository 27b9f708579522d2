//! What is asked of documents: policies, services and groups of this cell.

use ambit_model::policy::{Group, Policy, Service};
use ambit_model::{ObjectName, Revision};
use serde::{Deserialize, Serialize};

/// What becomes of documents.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
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
}

impl DocumentKind {
    /// As it is written.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Policy => "Policy",
            Self::Service => "Service",
            Self::Group => "Group",
        }
    }
}
