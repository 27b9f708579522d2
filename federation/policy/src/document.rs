//! One document, after parsing.

use ambit_model::policy::{Egress, Group, Policy, Service};
use ambit_model::{ObjectName, TrustDomain};
use std::collections::BTreeSet;

/// What one YAML document says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Document {
    /// `kind: Policy`.
    Policy(Policy),
    /// `kind: Service`.
    Service(Service),
    /// `kind: Group`.
    Group(Group),
    /// `kind: Egress`.
    Egress(Egress),
}

impl Document {
    /// The `kind` as written.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Policy(_) => "Policy",
            Self::Service(_) => "Service",
            Self::Group(_) => "Group",
            Self::Egress(_) => "Egress",
        }
    }
    /// The name, unique within kind and origin.
    pub fn name(&self) -> &ObjectName {
        match self {
            Self::Policy(p) => &p.name,
            Self::Service(s) => &s.name,
            Self::Group(g) => &g.name,
            Self::Egress(e) => &e.name,
        }
    }
    /// Every trust domain that the document names.
    pub fn trust_domains(&self) -> BTreeSet<TrustDomain> {
        match self {
            Self::Policy(p) => p.from.iter().chain([&p.target]).map(|set| set.trust_domain()).collect(),
            Self::Service(s) => s.backends.iter().map(|set| set.trust_domain()).collect(),
            Self::Group(g) => g.members.iter().map(|set| set.trust_domain()).collect(),
            Self::Egress(e) => e.from.iter().map(|set| set.trust_domain()).collect(),
        }
    }
}
