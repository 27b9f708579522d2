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
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Selector {
    /// `unix:uid:<n>`: the effective uid of the process.
    UnixUid(u32),
    /// `unix:gid:<n>`: the effective gid of the process.
    UnixGid(u32),
    /// `unix:supplementary_gid:<n>`: a supplementary group of the process.
    UnixSupplementaryGid(u32),
    /// `unix:path:<absolute path>`: the program that the process runs, as the node's own file system names it.
    UnixPath(String),
    /// `unix:sha256:<64 digits>`: the SHA-256 of that program's file.
    UnixSha256([u8; 32]),
    /// `cgroup:<name>`: the last component of the workload's cgroup below the node's `mesh` cgroup.
    Cgroup(String),
    /// `systemd:unit:<name>`: the unit of the system's service manager that the process belongs to.
    SystemdUnit(String),
    /// `container:id:<64 digits>`: the container that the process runs in.
    ContainerId([u8; 32]),
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

/// PATH_MAX of Linux.
const PATH_BYTES_MAX: usize = 4096;
/// UNIT_NAME_MAX of systemd.
const UNIT_BYTES_MAX: usize = 255;

impl Selector {
    /// Whether `text` is how it is written. Numbers were always read with a sign and leading zeros too, and what a log
    /// holds must be read again.
    fn is_written(&self, text: &str) -> bool {
        matches!(self, Self::UnixUid(_) | Self::UnixGid(_)) || self.to_string() == text
    }

    /// Whether it is judged of the node, by the cell, and not of a process, by the agent.
    pub fn is_of_node(&self) -> bool {
        match self {
            Self::UnixUid(_)
            | Self::UnixGid(_)
            | Self::UnixSupplementaryGid(_)
            | Self::UnixPath(_)
            | Self::UnixSha256(_)
            | Self::Cgroup(_)
            | Self::SystemdUnit(_)
            | Self::ContainerId(_) => false,
            Self::TpmEkHash(_) | Self::TpmPcr(..) | Self::TpmPolicy(_) => true,
        }
    }

    /// What follows `unix:`.
    fn of_unix(rest: &str) -> Option<Self> {
        match rest.split_once(':')? {
            ("uid", n) => n.parse().ok().map(Self::UnixUid),
            ("gid", n) => n.parse().ok().map(Self::UnixGid),
            ("supplementary_gid", n) => n.parse().ok().map(Self::UnixSupplementaryGid),
            ("path", path) => is_program_path(path).then(|| Self::UnixPath(path.to_owned())),
            ("sha256", digits) => sha256(digits).map(Self::UnixSha256),
            _ => None,
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
        const FORMS: &str = "a selector unix:uid:<n>, unix:gid:<n>, unix:supplementary_gid:<n>, \
                             unix:path:<absolute path>, unix:sha256:<64 digits>, cgroup:<name>, systemd:unit:<name>, \
                             container:id:<64 digits>, tpm:ek_hash:<64 digits>, \
                             tpm:pcr:<sha256|sha384>:<0-9|14>:<digits> or tpm:policy:<name>";
        let read = match s.split_once(':') {
            Some(("unix", rest)) => Self::of_unix(rest),
            Some(("cgroup", name)) => is_cgroup_name(name).then(|| Self::Cgroup(name.to_owned())),
            Some(("systemd", rest)) => rest
                .strip_prefix("unit:")
                .filter(|name| is_unit_name(name))
                .map(|name| Self::SystemdUnit(name.to_owned())),
            Some(("container", rest)) => rest.strip_prefix("id:").and_then(sha256).map(Self::ContainerId),
            Some(("tpm", rest)) => Self::of_tpm(rest),
            _ => None,
        };
        // One way to write each: an entry is found again by the text that it was created with.
        read.filter(|selector| selector.is_written(s)).ok_or_else(|| Refusal::new(Code::BadRequest, FORMS, s))
    }
}

/// A name below the `mesh` cgroup.
fn is_cgroup_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 128
        && !name.starts_with('.')
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'))
}

/// An absolute path as the kernel writes it: no empty part, none of `.` and `..`, nothing that a log would not show.
fn is_program_path(path: &str) -> bool {
    path.len() <= PATH_BYTES_MAX
        && !path.chars().any(char::is_control)
        && path.strip_prefix('/').is_some_and(|rest| rest.split('/').all(|part| !matches!(part, "" | "." | "..")))
}

/// A unit that processes belong to (systemd.unit(5)): slices only hold others.
pub fn is_unit_name(name: &str) -> bool {
    const KINDS: [&str; 5] = ["service", "scope", "socket", "mount", "swap"];
    let parts = name.rsplit_once('.').filter(|(stem, kind)| !stem.is_empty() && KINDS.contains(kind));
    name.len() <= UNIT_BYTES_MAX
        && parts.is_some()
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b':' | b'-' | b'_' | b'.' | b'\\' | b'@'))
}

/// 64 digits, lower case.
fn sha256(digits: &str) -> Option<[u8; 32]> {
    let mut out = [0; 32];
    hex::decode_to_slice(digits, &mut out).ok().map(|()| out)
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnixUid(n) => write!(f, "unix:uid:{n}"),
            Self::UnixGid(n) => write!(f, "unix:gid:{n}"),
            Self::UnixSupplementaryGid(n) => write!(f, "unix:supplementary_gid:{n}"),
            Self::UnixPath(path) => write!(f, "unix:path:{path}"),
            Self::UnixSha256(digest) => write!(f, "unix:sha256:{}", hex::encode(digest)),
            Self::Cgroup(name) => write!(f, "cgroup:{name}"),
            Self::SystemdUnit(name) => write!(f, "systemd:unit:{name}"),
            Self::ContainerId(id) => write!(f, "container:id:{}", hex::encode(id)),
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
crate::text::serde_as_text!(Selector);

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
    /// Refused where it gives more than a workload has to nodes that it does not name. Which nodes a cluster has, and what
    /// they must show, its own administrator decides (join tokens, allow-lists, appraisal policies): an entry that fits
    /// any of them would be theirs to take.
    pub fn check_privileged(&self) -> Result<(), Refusal> {
        let named = !self.nodes.is_empty() || self.selectors.iter().any(|one| matches!(one, Selector::TpmEkHash(_)));
        if named || !self.extras.is_privileged() { Ok(()) } else { Err(nodes_unnamed()) }
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

/// An entry marked `admin` or `downstream` that fits whatever node its cluster has.
pub fn nodes_unnamed() -> Refusal {
    let expected = "an entry marked admin or downstream to name its nodes (their ids, or a selector tpm:ek_hash)";
    Refusal::new(Code::BadRequest, expected, "every node of its cluster")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selectors_are_written_as_they_are_read_and_in_one_way_only() {
        let (sha256, sha384) = ("ab".repeat(32), "ab".repeat(48));
        for (text, of_node) in [
            ("unix:uid:1000".to_owned(), Some(false)),
            ("unix:supplementary_gid:27".to_owned(), Some(false)),
            ("unix:path:/usr/bin/nginx".to_owned(), Some(false)),
            ("unix:path:/opt/a program:1/x.y".to_owned(), Some(false)),
            (format!("unix:sha256:{sha256}"), Some(false)),
            ("cgroup:web.a-b_1".to_owned(), Some(false)),
            ("systemd:unit:nginx.service".to_owned(), Some(false)),
            ("systemd:unit:getty@tty1.service".to_owned(), Some(false)),
            (r"systemd:unit:dev-disk\x2dby.swap".to_owned(), Some(false)),
            (format!("container:id:{sha256}"), Some(false)),
            ("unix:supplementary_gid:027".to_owned(), None),
            ("unix:supplementary_gid:-1".to_owned(), None),
            ("unix:path:usr/bin/nginx".to_owned(), None),
            ("unix:path:/".to_owned(), None),
            ("unix:path:/usr//bin".to_owned(), None),
            ("unix:path:/usr/bin/".to_owned(), None),
            ("unix:path:/usr/../bin/x".to_owned(), None),
            ("unix:path:/usr/bin/x\n".to_owned(), None),
            (format!("unix:path:/{}", "a/".repeat(2048)), None),
            (format!("unix:sha256:{}", sha256.to_uppercase()), None),
            (format!("unix:sha256:{sha384}"), None),
            ("systemd:unit:nginx".to_owned(), None),
            ("systemd:unit:system.slice".to_owned(), None),
            ("systemd:unit:.service".to_owned(), None),
            ("systemd:unit:a/b.service".to_owned(), None),
            ("systemd:id:nginx.service".to_owned(), None),
            (format!("systemd:unit:{}.service", "a".repeat(255)), None),
            (format!("container:id:{}", &sha256[..12]), None),
            (format!("container:id:{}", sha256.to_uppercase()), None),
            (format!("container:{sha256}"), None),
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
