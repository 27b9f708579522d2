//! Roots and intermediates of the own trust domain and roots of peers: rows, and what follows from them.
//!
//! A cell that never rotated has no rows here: its one root stands in its own row, and its intermediates in those of its
//! replicas.

use crate::committed::ReplicaAdmission;
use crate::state::State;
use ambit_model::bundle::{BundleRecord, RootEntry, RootState};
use ambit_model::{EntryId, Generation, Lifetime, NodeId, RaftIndex, Stamp, TrustDomain};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};

/// A root's name: SHA-256 of its certificate, as operators compare it.
pub type RootId = [u8; 32];

/// A root of the own trust domain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RootRow {
    /// The certificate, DER; empty once revoked.
    pub der: Vec<u8>,
    /// Where it stands.
    pub state: RootState,
    /// Its key certified by the root before it, DER: for those who know only that one. Empty for a cell's first root.
    pub cross_der: Vec<u8>,
    /// Its key, wrapped to each replica's own key. Never in plain in log or snapshot.
    pub wrapped: BTreeMap<u64, Vec<u8>>,
    /// Since when it stands there.
    pub since: Stamp,
    /// Where it was activated: zero for a cell's first root, and the highest number for one that never was.
    pub activated: RaftIndex,
    /// The bundle's sequence from which on it is in it.
    pub sequence: u64,
}

/// Whether an intermediate may be relied on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum AuthorityState {
    /// It signs, or did and what it signed is valid.
    Active,
    /// It signs nothing more, and what it signed is issued anew.
    Tainted,
    /// Whatever it signed is refused.
    Revoked,
}

impl AuthorityState {
    /// As operators and the wire have it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Tainted => "tainted",
            Self::Revoked => "revoked",
        }
    }
}

/// A replica's intermediate. A replica has several while a former one is in time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuthorityRow {
    /// Whose.
    pub replica: u64,
    /// The root that signed it.
    pub root: RootId,
    /// Of the certificate.
    pub serial: [u8; 16],
    /// Of the certificate.
    pub lifetime: Lifetime,
    /// See the type.
    pub state: AuthorityState,
}

impl AuthorityRow {
    /// How long before the intermediate its leaves end: five minutes (I6), and less only for one of less than fifty, which
    /// no cell outside a lab has.
    pub fn margin_ms(&self) -> u64 {
        let life = self.lifetime.not_after.0.saturating_sub(self.lifetime.not_before.0);
        crate::ISSUER_MARGIN_MS.min(life / 10)
    }
}

/// A downstream authority: the intermediate of a cluster's own issuer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DownstreamRow {
    /// Under which entry it was given.
    pub entry: EntryId,
    /// Through which node its holder showed that it is of that entry.
    pub node: NodeId,
    /// Which of the node's admissions.
    pub generation: Generation,
    /// The SVID that asked for it, by its issuer and serial: whoever revokes that revokes this.
    pub asked_by: (String, [u8; 16]),
    /// The root that signed it.
    pub root: RootId,
    /// Of the certificate.
    pub serial: [u8; 16],
    /// Of the certificate.
    pub lifetime: Lifetime,
    /// See the type.
    pub state: AuthorityState,
}

/// The roots of a peer's trust domain.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerRoots {
    /// Those in its bundle.
    pub roots: Vec<RootEntry>,
    /// Those that were and are no more: they never come back.
    pub gone: Vec<RootId>,
}

/// SHA-256 of a root certificate.
pub(crate) fn root_id(der: &[u8]) -> RootId {
    Sha256::digest(der).into()
}

/// The name of the authority with this key: SHA-256 of its SPKI, the first 20 bytes, hex (its subject key identifier).
pub(crate) fn authority_of(key_hash: &[u8; 32]) -> String {
    key_hash[..20].iter().map(|byte| format!("{byte:02x}")).collect()
}

impl State {
    /// Every root that the trust domain ever had, by its id.
    pub fn roots(&self) -> BTreeMap<RootId, RootRow> {
        if self.roots.len() > 0 {
            return self.roots.iter().map(|(id, row)| (*id, row.clone())).collect();
        }
        let first = self.cell().map(|cell| (root_id(&cell.root_der), self.first_root()));
        first.into_iter().filter_map(|(id, row)| Some((id, row?))).collect()
    }

    /// The root that a cell was founded with, before there is a row for it.
    pub(crate) fn first_root(&self) -> Option<RootRow> {
        self.cell().map(|cell| RootRow {
            der: cell.root_der.clone(),
            state: RootState::Active,
            cross_der: Vec::new(),
            wrapped: BTreeMap::new(),
            since: Stamp(0),
            activated: RaftIndex(0),
            sequence: cell.bundle_sequence,
        })
    }

    /// The root that intermediates are signed under.
    pub fn active_root(&self) -> Option<(RootId, RootRow)> {
        self.roots().into_iter().find(|(_, row)| row.state == RootState::Active)
    }

    /// The bundle as peers are told of it.
    pub fn bundle_record(&self) -> Option<BundleRecord> {
        let sequence = self.cell()?.bundle_sequence;
        let mut roots: Vec<RootEntry> = self
            .roots()
            .into_values()
            .filter(|row| row.state != RootState::Revoked)
            .map(|row| RootEntry { der: row.der, state: row.state })
            .collect();
        roots.sort_by_key(|root| (root.state != RootState::Active, root.state));
        Some(BundleRecord { sequence, roots })
    }

    /// The roots of a peer, DER, the active one first.
    pub fn peer_roots(&self, td: &TrustDomain) -> Vec<Vec<u8>> {
        match (self.peer_roots.get(td), self.peer(td)) {
            (Some(row), _) => row.roots.iter().map(|root| root.der.clone()).collect(),
            (None, Some(peer)) => vec![peer.root_der.clone()],
            (None, None) => Vec::new(),
        }
    }

    /// An intermediate of this cell by its name, of whatever state.
    pub fn authority(&self, id: &str) -> Option<AuthorityRow> {
        let row = self.authorities.get(&id.to_owned()).cloned();
        row.or_else(|| {
            let (replica, _) = self.members().find(|(_, m)| m.authority == id)?;
            self.first_authority(replica)
        })
    }

    /// Whether a leaf under this intermediate is the replica's own: it is not revoked, and was signed since the replica was
    /// admitted. Another may have had its number before, and what was signed for that one is nobody's.
    pub fn speaks_for(&self, authority: &str, replica: u64) -> bool {
        let admitted = self.admissions.get(&replica).map(|admission| admission.serial).unwrap_or_default();
        self.authority(authority)
            .is_some_and(|row| row.replica == replica && row.state != AuthorityState::Revoked && row.serial >= admitted)
    }

    /// The intermediate that a replica joined with, before there is a row for it.
    pub(crate) fn first_authority(&self, replica: u64) -> Option<AuthorityRow> {
        let not_after = self.member(replica)?.authority_not_after;
        let admission = self.admissions.get(&replica);
        let root = self.active_at(admission.map_or(RaftIndex(0), |a| index_of(&a.serial)))?;
        Some(AuthorityRow {
            replica,
            root,
            serial: admission.map(|a| a.serial).unwrap_or_default(),
            lifetime: admission.map_or(Lifetime { not_before: Stamp(0), not_after }, |a| a.lifetime),
            state: AuthorityState::Active,
        })
    }

    /// The root that is to sign the intermediate of a replica that was admitted.
    pub fn root_at(&self, admission: &ReplicaAdmission) -> Option<RootId> {
        self.active_at(index_of(&admission.serial))
    }

    fn active_at(&self, index: RaftIndex) -> Option<RootId> {
        if self.roots.len() == 0 {
            return self.cell().map(|cell| root_id(&cell.root_der));
        }
        let then = self.roots.iter().filter(|(_, row)| row.activated <= index);
        then.max_by_key(|(_, row)| row.activated).map(|(id, _)| *id)
    }

    /// All intermediates that may be in time, by name.
    pub fn authorities(&self) -> BTreeMap<String, AuthorityRow> {
        let joined = self.members().filter_map(|(id, m)| Some((m.authority.clone(), self.first_authority(id)?)));
        // A row says more than what a replica joined with.
        joined.chain(self.authorities.iter().map(|(id, row)| (id.clone(), row.clone()))).collect()
    }

    /// A downstream authority by its name, of whatever state.
    pub fn downstream(&self, id: &str) -> Option<&DownstreamRow> {
        self.downstreams.get(&id.to_owned())
    }

    /// Downstream authorities that may be in time, by name.
    pub fn downstreams(&self) -> impl Iterator<Item = (&String, &DownstreamRow)> {
        self.downstreams.iter()
    }

    /// Whether what this intermediate signed is to be issued anew: it is tainted, or its root is.
    pub fn is_tainted(&self, row: &AuthorityRow) -> bool {
        let root = self.roots.get(&row.root).map(|root| root.state);
        row.state != AuthorityState::Active || matches!(root, Some(RootState::Tainted | RootState::Revoked))
    }

    /// Intermediates of this cell whose leaves are to be issued anew.
    pub fn tainted_authorities(&self) -> BTreeSet<String> {
        let rows = self.authorities().into_iter();
        rows.filter(|(_, row)| self.is_tainted(row)).map(|(id, _)| id).collect()
    }

    /// Intermediates whose leaves are refused, each with the trust domain that says so, until when.
    pub fn authority_denials(&self) -> impl Iterator<Item = (&(TrustDomain, String), &Stamp)> {
        self.authority_denials.iter()
    }

    /// The same, without the times.
    pub fn denied_authorities(&self) -> BTreeSet<(TrustDomain, String)> {
        self.authority_denials.iter().map(|(key, _)| key.clone()).collect()
    }

    /// The key set that whoever knows these roots can verify: by the active root, or else by the one before it.
    pub fn key_set_for(&self, known: &[RootId]) -> Option<&crate::objects::KeySetRow> {
        let active = self.cell().map(|cell| root_id(&cell.root_der));
        let former = self.key_set.get(&1).filter(|_| !known.is_empty() && !active.is_some_and(|a| known.contains(&a)));
        former.or_else(|| self.key_set())
    }
}

/// The log's index in a serial number that [`crate::apply`] gave.
pub(crate) fn index_of(serial: &[u8; 16]) -> RaftIndex {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&serial[4..12]);
    RaftIndex(u64::from_be_bytes(bytes))
}
