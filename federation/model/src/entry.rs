//! Entries: which workload, recognised how, gets which SPIFFE ID on which nodes.

use crate::id::{ClusterId, NodeId, ObjectName, SpiffeId};
use crate::refusal::{Code, Refusal};
use crate::time::SvidTtl;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

/// The operator's name of an entry, unique in its cell.
pub type EntryId = ObjectName;

/// What a workload is recognised by. All selectors of an entry must hold (SPIFFE: subset match).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Selector {
    /// `unix:uid:<n>`: the effective uid of the process.
    UnixUid(u32),
    /// `unix:gid:<n>`: the effective gid of the process.
    UnixGid(u32),
    /// `cgroup:<name>`: the last component of the workload's cgroup below the node's `mesh` cgroup.
    Cgroup(String),
}

impl FromStr for Selector {
    type Err = Refusal;
    fn from_str(s: &str) -> Result<Self, Refusal> {
        let bad = || Refusal::new(Code::BadRequest, "a selector unix:uid:<n>, unix:gid:<n> or cgroup:<name>", s);
        match s.split_once(':').ok_or_else(bad)? {
            ("unix", rest) => match rest.split_once(':').ok_or_else(bad)? {
                ("uid", n) => n.parse().map(Self::UnixUid).map_err(|_| bad()),
                ("gid", n) => n.parse().map(Self::UnixGid).map_err(|_| bad()),
                _ => Err(bad()),
            },
            ("cgroup", name) => {
                let ok = !name.is_empty()
                    && name.len() <= 128
                    && !name.starts_with('.')
                    && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'));
                if ok { Ok(Self::Cgroup(name.to_owned())) } else { Err(bad()) }
            }
            _ => Err(bad()),
        }
    }
}
impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnixUid(n) => write!(f, "unix:uid:{n}"),
            Self::UnixGid(n) => write!(f, "unix:gid:{n}"),
            Self::Cgroup(name) => write!(f, "cgroup:{name}"),
        }
    }
}
impl TryFrom<String> for Selector {
    type Error = Refusal;
    fn try_from(s: String) -> Result<Self, Refusal> {
        s.parse()
    }
}
impl From<Selector> for String {
    fn from(s: Selector) -> String {
        s.to_string()
    }
}

/// Registration of a workload.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Its name in the cell.
    pub id: EntryId,
    /// The identity given.
    pub spiffe_id: SpiffeId,
    /// Whose nodes may run it.
    pub cluster: ClusterId,
    /// The nodes that may run it; empty means every admitted node of the cluster.
    pub nodes: BTreeSet<NodeId>,
    /// All must hold; never empty.
    pub selectors: BTreeSet<Selector>,
    /// Longest lifetime of an SVID of this entry.
    pub ttl: SvidTtl,
    /// Trust domains whose bundles the workload receives beside its own.
    pub federates_with: BTreeSet<crate::id::TrustDomain>,
}

impl Entry {
    /// Whether `node` of `cluster` may run this workload.
    pub fn may_run_on(&self, cluster: &ClusterId, node: &NodeId) -> bool {
        self.cluster == *cluster && (self.nodes.is_empty() || self.nodes.contains(node))
    }
    /// Whether a process with the `found` selectors is this workload.
    pub fn recognises(&self, found: &BTreeSet<Selector>) -> bool {
        !self.selectors.is_empty() && self.selectors.is_subset(found)
    }
}
