//! The ports on which one identity may reach another, as the kernel's tables need them.

use crate::set::{PolicySet, speaks_of};
use ambit_model::SpiffeId;
use ambit_model::policy::{Action, Policy};
use std::collections::BTreeSet;

/// A set of destination TCP ports, exact: it holds a port if and only if [`PolicySet::evaluate`] allows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PortSet {
    /// Every port.
    All,
    /// These ports; empty where nothing is allowed.
    List(BTreeSet<u16>),
    /// Every port but these (never empty): allowed on all ports, denied on some.
    AllBut(BTreeSet<u16>),
}

impl PortSet {
    /// Whether the port is in the set.
    pub fn contains(&self, port: u16) -> bool {
        match self {
            Self::All => true,
            Self::List(ports) => ports.contains(&port),
            Self::AllBut(ports) => !ports.contains(&port),
        }
    }
    /// Whether no port is in the set.
    pub fn is_empty(&self) -> bool {
        matches!(self, Self::List(ports) if ports.is_empty())
    }
    fn nothing() -> Self {
        Self::List(BTreeSet::new())
    }
}

impl PolicySet {
    /// The ports of `dst` that `src` may connect to. The kernel's entries are compiled from it.
    pub fn ports(&self, src: &SpiffeId, dst: &SpiffeId) -> PortSet {
        let matching =
            |action| self.in_force().map(|(_, p)| p).filter(move |p| p.action == action && speaks_of(p, src, dst));
        let denied = match union(matching(Action::Deny)) {
            PortSet::All | PortSet::AllBut(_) => return PortSet::nothing(),
            PortSet::List(ports) => ports,
        };
        match union(matching(Action::Allow)) {
            PortSet::List(allowed) => PortSet::List(allowed.difference(&denied).copied().collect()),
            PortSet::All | PortSet::AllBut(_) if denied.is_empty() => PortSet::All,
            PortSet::All | PortSet::AllBut(_) => PortSet::AllBut(denied),
        }
    }
}

fn union<'a>(policies: impl Iterator<Item = &'a Policy>) -> PortSet {
    let mut ports = BTreeSet::new();
    for policy in policies {
        if policy.ports.is_empty() {
            return PortSet::All;
        }
        ports.extend(&policy.ports);
    }
    PortSet::List(ports)
}
