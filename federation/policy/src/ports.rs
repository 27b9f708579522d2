//! The ports on which one identity may reach another, as the kernel's tables need them.

use crate::set::{PolicySet, speaks_of};
use ambit_model::policy::{Action, Policy, Protocol};
use ambit_model::{Moment, SpiffeId};
use std::collections::BTreeSet;
use std::fmt;

/// A set of destination TCP ports, exact: it holds a port if and only if [`PolicySet::evaluate`] allows it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
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
    /// What is left of the ports allowed when the ports denied are taken away.
    pub(crate) fn left_of(allowed: PortSet, denied: PortSet) -> PortSet {
        let denied = match denied {
            PortSet::All | PortSet::AllBut(_) => return PortSet::nothing(),
            PortSet::List(ports) => ports,
        };
        match allowed {
            PortSet::List(allowed) => PortSet::List(allowed.difference(&denied).copied().collect()),
            PortSet::All | PortSet::AllBut(_) if denied.is_empty() => PortSet::All,
            PortSet::All | PortSet::AllBut(_) => PortSet::AllBut(denied),
        }
    }
    /// The ports of this set that are not in `other`.
    #[must_use]
    pub fn without(&self, other: &PortSet) -> PortSet {
        let list =
            |ports: &BTreeSet<u16>| PortSet::List(ports.iter().copied().filter(|p| !other.contains(*p)).collect());
        match (self, other) {
            (PortSet::List(ports), _) => list(ports),
            (_, PortSet::All) => PortSet::nothing(),
            (PortSet::All, PortSet::List(taken)) if taken.is_empty() => PortSet::All,
            (PortSet::All, PortSet::List(taken)) => PortSet::AllBut(taken.clone()),
            (PortSet::AllBut(mine), PortSet::List(taken)) => PortSet::AllBut(mine.union(taken).copied().collect()),
            (PortSet::All, PortSet::AllBut(left)) => PortSet::List(left.clone()),
            (PortSet::AllBut(mine), PortSet::AllBut(left)) => PortSet::List(left.difference(mine).copied().collect()),
        }
    }
}

impl PolicySet {
    /// The TCP ports of `dst` that `src` may connect to: the oracle for [`crate::Index::ports`], of which the kernel's
    /// entries are compiled.
    pub fn ports(&self, src: &SpiffeId, dst: &SpiffeId, now: Moment) -> PortSet {
        let matching = |action| {
            let of_tcp = |p: &&Policy| p.extras.protocols.contains(&Protocol::Tcp);
            let in_force = self.in_force(now).map(|(_, p)| p).filter(of_tcp);
            union(in_force.filter(move |p| p.action == action && speaks_of(p, src, dst)))
        };
        PortSet::left_of(matching(Action::Allow), matching(Action::Deny))
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

/// `none`, `all`, `80, 443` or `all but 22`.
impl fmt::Display for PortSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ports = match self {
            Self::All => return f.write_str("all"),
            Self::List(ports) if ports.is_empty() => return f.write_str("none"),
            Self::List(ports) => ports,
            Self::AllBut(ports) => {
                f.write_str("all but ")?;
                ports
            }
        };
        for (at, port) in ports.iter().enumerate() {
            write!(f, "{}{port}", if at == 0 { "" } else { ", " })?;
        }
        Ok(())
    }
}
