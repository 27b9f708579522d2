//! Entries: which workload, recognised how, gets which SPIFFE ID on which nodes.

use crate::appraisal::PcrBank;
use crate::extras::Extras;
use crate::id::{ClusterId, NodeId, ObjectName, SpiffeId};
use crate::refusal::{Code, Refusal};
use crate::time::SvidTtl;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

/// The operator's name of an entry, unique in its cell.
pub type EntryId = ObjectName;

/// What a workload is recognised by, and what its node must have shown. All selectors of an entry must hold (SPIFFE:
/// subset match): those of the workload are judged by the agent, those of the node (`tpm:`) by the cell.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Selector {
    /// `unix:uid:<n>`: the effective uid of the process.
    UnixUid(u32),
    /// `unix:gid:<n>`: the effective gid of the process.
    UnixGid(u32),
    /// `cgroup:<name>`: the last component of the workload's cgroup below the node's `mesh` cgroup.
    Cgroup(String),
    /// `tpm:ek_hash:<64 digits>`: the node whose EK public key (SPKI DER) has this SHA-256; it is the node id.
    TpmEkHash(NodeId),
    /// `tpm:pcr:<bank>:<n>:<digits>`: the value of a PCR of the boot, 0-9 or 14, at the node's last verdict. Not of
    /// PCR 10, which moves with every file that is measured.
    TpmPcr(PcrBank, u8, Vec<u8>),
    /// `tpm:policy:<name>`: the appraisal policy that accepted the node at its last verdict, in whatever version.
    TpmPolicy(ObjectName),
}

/// Whether a PCR tells what was booted: those of firmware and boot loader, and MokList's.
pub fn is_boot_pcr(n: u32) -> bool {
    matches!(n, 0..=9 | 14)
}

impl Selector {
    /// Whether it is judged of the node, by the cell, and not of a process, by the agent.
    pub fn is_of_node(&self) -> bool {
        match self {
            Self::UnixUid(_) | Self::UnixGid(_) | Self::Cgroup(_) => false,
            Self::TpmEkHash(_) | Self::TpmPcr(..) | Self::TpmPolicy(_) => true,
        }
    }

    /// What follows `tpm:`.
    fn of_tpm(rest: &str) -> Option<Self> {
        match rest.split_once(':')? {
            ("ek_hash", id) => id.parse().ok().map(Self::TpmEkHash),
            ("policy", name) => name.parse().ok().map(Self::TpmPolicy),
            ("pcr", pcr) => {
                let (bank, numbered) = pcr.split_once(':')?;
                let (n, digits) = numbered.split_once(':')?;
                let (bank, n, value) = (bank.parse::<PcrBank>().ok()?, n.parse().ok()?, hex::decode(digits).ok()?);
                (is_boot_pcr(u32::from(n)) && value.len() == bank.size()).then_some(Self::TpmPcr(bank, n, value))
            }
            _ => None,
        }
    }
}

impl FromStr for Selector {
    type Err = Refusal;
    fn from_str(s: &str) -> Result<Self, Refusal> {
        const FORMS: &str = "a selector unix:uid:<n>, unix:gid:<n>, cgroup:<name>, tpm:ek_hash:<64 digits>, \
                             tpm:pcr:<sha256|sha384>:<0-9|14>:<digits> or tpm:policy:<name>";
        let bad = || Refusal::new(Code::BadRequest, FORMS, s);
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
            // One way to write each: an entry is found again by the text that it was created with.
            ("tpm", rest) => Self::of_tpm(rest).filter(|selector| selector.to_string() == s).ok_or_else(bad),
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
            Self::TpmEkHash(id) => write!(f, "tpm:ek_hash:{id}"),
            Self::TpmPcr(bank, n, value) => write!(f, "tpm:pcr:{}:{n}:{}", bank.as_str(), hex::encode(value)),
            Self::TpmPolicy(name) => write!(f, "tpm:policy:{name}"),
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

/// A set of selectors, sorted. An entry has two or three, and a cell a hundred thousand entries: a tree for each would
/// take more memory than all the rest of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Vec<Selector>")]
pub struct Selectors(Box<[Selector]>);

impl From<Vec<Selector>> for Selectors {
    fn from(mut all: Vec<Selector>) -> Self {
        all.sort_unstable();
        all.dedup();
        Self(all.into())
    }
}
impl<const N: usize> From<[Selector; N]> for Selectors {
    fn from(all: [Selector; N]) -> Self {
        Vec::from(all).into()
    }
}
impl FromIterator<Selector> for Selectors {
    fn from_iter<I: IntoIterator<Item = Selector>>(all: I) -> Self {
        all.into_iter().collect::<Vec<_>>().into()
    }
}
impl std::ops::Deref for Selectors {
    type Target = [Selector];
    fn deref(&self) -> &[Selector] {
        &self.0
    }
}

/// Registration of a workload.
/// Its stored form is in [`crate::extras`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its name in the cell.
    pub id: EntryId,
    /// The identity given.
    pub spiffe_id: SpiffeId,
    /// Whose nodes may run it.
    pub cluster: ClusterId,
    /// The nodes that may run it; empty means every admitted node of the cluster.
    pub nodes: BTreeSet<NodeId>,
    /// All must hold; at least one is of the workload.
    pub selectors: Selectors,
    /// Longest lifetime of an SVID of this entry.
    pub ttl: SvidTtl,
    /// Trust domains whose bundles the workload receives beside its own.
    pub federates_with: BTreeSet<crate::id::TrustDomain>,
    /// What most entries leave as it is.
    pub extras: Extras,
}

impl Entry {
    /// The selectors that are judged of the node.
    pub fn node_selectors(&self) -> impl Iterator<Item = &Selector> {
        self.selectors.iter().filter(|selector| selector.is_of_node())
    }
    /// Whether a process can be told to be this workload at all.
    pub fn names_a_workload(&self) -> bool {
        self.selectors.iter().any(|selector| !selector.is_of_node())
    }
    /// Whether `node` of `cluster` may run this workload, as far as the entry names nodes; what its node selectors say
    /// is for who knows the node's last verdict.
    pub fn may_run_on(&self, cluster: &ClusterId, node: &NodeId) -> bool {
        self.cluster == *cluster && (self.nodes.is_empty() || self.nodes.contains(node))
    }
    /// Whether a process with the `found` selectors is this workload. The selectors of the node are not asked again:
    /// the cell gives an entry to nodes that fit it only.
    pub fn recognises(&self, found: &BTreeSet<Selector>) -> bool {
        self.names_a_workload() && self.selectors.iter().all(|one| one.is_of_node() || found.contains(one))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selectors_are_written_as_they_are_read_and_in_one_way_only() {
        let (sha256, sha384) = ("ab".repeat(32), "ab".repeat(48));
        for (text, of_node) in [
            ("unix:uid:1000".to_owned(), Some(false)),
            ("cgroup:web.a-b_1".to_owned(), Some(false)),
            (format!("tpm:ek_hash:{sha256}"), Some(true)),
            (format!("tpm:pcr:sha256:7:{sha256}"), Some(true)),
            (format!("tpm:pcr:sha256:14:{sha256}"), Some(true)),
            (format!("tpm:pcr:sha384:0:{sha384}"), Some(true)),
            ("tpm:policy:servers".to_owned(), Some(true)),
            (format!("tpm:ek_hash:{}", sha256.to_uppercase()), None),
            (format!("tpm:ek_hash:{}", &sha256[2..]), None),
            (format!("tpm:ek_hash:{sha256}:"), None),
            (format!("tpm:pcr:sha256:07:{sha256}"), None),
            (format!("tpm:pcr:sha256:+7:{sha256}"), None),
            (format!("tpm:pcr:sha256:7:{}", sha256.to_uppercase()), None),
            (format!("tpm:pcr:sha256:7:{sha384}"), None),
            (format!("tpm:pcr:sha384:7:{sha256}"), None),
            (format!("tpm:pcr:sha1:7:{}", "ab".repeat(20)), None),
            (format!("tpm:pcr:SHA256:7:{sha256}"), None),
            (format!("tpm:pcr:sha256:10:{sha256}"), None),
            (format!("tpm:pcr:sha256:11:{sha256}"), None),
            (format!("tpm:pcr:sha256:256:{sha256}"), None),
            (format!("tpm:pcr:7:{sha256}"), None),
            ("tpm:policy:".to_owned(), None),
            ("tpm:policy:a b".to_owned(), None),
            ("tpm:policy".to_owned(), None),
            ("tpm:model:x".to_owned(), None),
            (" tpm:policy:a".to_owned(), None),
        ] {
            let read = text.parse::<Selector>().ok();
            assert_eq!(read.as_ref().map(Selector::is_of_node), of_node, "{text}");
            assert!(read.is_none_or(|selector| selector.to_string() == text), "{text}");
        }
    }

    #[test]
    fn a_workload_is_recognised_by_its_own_selectors_and_needs_one() {
        let set = |texts: &[&str]| texts.iter().map(|t| t.parse().unwrap()).collect::<BTreeSet<Selector>>();
        let found = set(&["unix:uid:1000", "cgroup:web"]);
        for (selectors, recognised) in [
            (&["unix:uid:1000"][..], true),
            (&["unix:uid:1000", "tpm:policy:servers"], true),
            (&["unix:uid:1001", "tpm:policy:servers"], false),
            (&["tpm:policy:servers"], false),
            (&[], false),
        ] {
            let entry = Entry {
                id: "web".parse().unwrap(),
                spiffe_id: "spiffe://west/web".parse().unwrap(),
                cluster: "west".parse().unwrap(),
                nodes: BTreeSet::new(),
                selectors: set(selectors).into_iter().collect(),
                ttl: SvidTtl::DEFAULT,
                federates_with: BTreeSet::new(),
                extras: Extras::default(),
            };
            assert_eq!(entry.recognises(&found), recognised, "{selectors:?}");
        }
    }
}
