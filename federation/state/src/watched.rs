//! The objects that can be followed as they change, by their keys.

use crate::state::{OwnedName, State};
use crate::table::{Table, TableWrite};
use ambit_model::{EntryId, NodeId};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::ops::Bound;

/// One object. The order is that in which all of them are told: what others refer to goes first.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ObjectKey {
    /// A node.
    Node(NodeId),
    /// An entry.
    Entry(EntryId),
    /// A service, of this cell or of a peer.
    Service(OwnedName),
    /// A group, of this cell or of a peer.
    Group(OwnedName),
    /// A policy, of this cell or of a peer.
    Policy(OwnedName),
    /// An egress document of this cell.
    Egress(OwnedName),
}

/// Kinds of objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ObjectKind {
    /// See [`ObjectKey::Node`].
    Node,
    /// See [`ObjectKey::Entry`].
    Entry,
    /// See [`ObjectKey::Service`].
    Service,
    /// See [`ObjectKey::Group`].
    Group,
    /// See [`ObjectKey::Policy`].
    Policy,
    /// See [`ObjectKey::Egress`].
    Egress,
}

impl ObjectKind {
    /// All, in the order of [`ObjectKey`].
    pub const ALL: [ObjectKind; 6] = [Self::Node, Self::Entry, Self::Service, Self::Group, Self::Policy, Self::Egress];

    /// As on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Node => "node",
            Self::Entry => "entry",
            Self::Service => "service",
            Self::Group => "group",
            Self::Policy => "policy",
            Self::Egress => "egress",
        }
    }
    /// See [`ObjectKind::as_str`].
    pub fn from_text(text: &str) -> Option<ObjectKind> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == text)
    }
}

impl ObjectKey {
    /// Its kind.
    pub fn kind(&self) -> ObjectKind {
        match self {
            Self::Node(_) => ObjectKind::Node,
            Self::Entry(_) => ObjectKind::Entry,
            Self::Service(_) => ObjectKind::Service,
            Self::Group(_) => ObjectKind::Group,
            Self::Policy(_) => ObjectKind::Policy,
            Self::Egress(_) => ObjectKind::Egress,
        }
    }
}

impl State {
    /// The object that this write is of, if it can be followed.
    pub fn object_key(&self, write: &TableWrite) -> Option<ObjectKey> {
        let entry = || self.entries.key_of(write).map(ObjectKey::Entry);
        let service = || self.services.key_of(write).map(ObjectKey::Service);
        let group = || self.groups.key_of(write).map(ObjectKey::Group);
        let policy = || self.policies.key_of(write).map(ObjectKey::Policy);
        let egress = || self.egress.key_of(write).map(ObjectKey::Egress);
        let node = self.nodes.key_of(write).map(ObjectKey::Node);
        node.or_else(entry).or_else(service).or_else(group).or_else(policy).or_else(egress)
    }

    /// The first `limit` objects after `after` of these kinds, in the order of their keys.
    pub fn objects_after(&self, after: Option<&ObjectKey>, kinds: &[ObjectKind], limit: usize) -> Vec<ObjectKey> {
        let mut out = Vec::new();
        let behind = |kind: &ObjectKind| after.is_none_or(|after| after.kind() <= *kind);
        for kind in ObjectKind::ALL.into_iter().filter(|kind| kinds.contains(kind)).filter(behind) {
            let left = limit.saturating_sub(out.len());
            out.extend(match (kind, after) {
                (ObjectKind::Node, Some(ObjectKey::Node(id))) => page(&self.nodes, Some(id), left, ObjectKey::Node),
                (ObjectKind::Node, _) => page(&self.nodes, None, left, ObjectKey::Node),
                (ObjectKind::Entry, Some(ObjectKey::Entry(id))) => {
                    page(&self.entries, Some(id), left, ObjectKey::Entry)
                }
                (ObjectKind::Entry, _) => page(&self.entries, None, left, ObjectKey::Entry),
                (ObjectKind::Service, Some(ObjectKey::Service(name))) => {
                    page(&self.services, Some(name), left, ObjectKey::Service)
                }
                (ObjectKind::Service, _) => page(&self.services, None, left, ObjectKey::Service),
                (ObjectKind::Group, Some(ObjectKey::Group(name))) => {
                    page(&self.groups, Some(name), left, ObjectKey::Group)
                }
                (ObjectKind::Group, _) => page(&self.groups, None, left, ObjectKey::Group),
                (ObjectKind::Policy, Some(ObjectKey::Policy(name))) => {
                    page(&self.policies, Some(name), left, ObjectKey::Policy)
                }
                (ObjectKind::Policy, _) => page(&self.policies, None, left, ObjectKey::Policy),
                (ObjectKind::Egress, Some(ObjectKey::Egress(name))) => {
                    page(&self.egress, Some(name), left, ObjectKey::Egress)
                }
                (ObjectKind::Egress, _) => page(&self.egress, None, left, ObjectKey::Egress),
            });
        }
        out
    }
}

fn page<K, V>(table: &Table<K, V>, after: Option<&K>, limit: usize, of: fn(K) -> ObjectKey) -> Vec<ObjectKey>
where
    K: Ord + Clone + Serialize + DeserializeOwned,
    V: Clone + Serialize + DeserializeOwned,
{
    let begin = after.map_or(Bound::Unbounded, |key| Bound::Excluded(key.clone()));
    table.keys((begin, Bound::Unbounded), limit).map(of).collect()
}
