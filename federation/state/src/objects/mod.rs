//! Rows of the tables: what a cell remembers.

use crate::command::DocumentKind;
use ambit_model::policy::{Egress, Endpoint, Group, Policy, Service};
use ambit_model::{
    Act, AdminRole, ClusterId, Entry, JwtAuthority, NumericIdentity, ObjectName, RaftIndex, Revision, SpiffeId, Stamp,
    TrustDomain,
};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};

mod node;

pub use node::{
    AkFacts, BootPcrs, Counters, DenialRow, EkDenyRow, EkFacts, ImaPoint, NodeRow, NodeState, PolicyRef, Standing,
    VerdictRow,
};

/// The cell itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CellRow {
    /// Its own trust domain.
    pub trust_domain: TrustDomain,
    /// Authority epoch; rises with restore, recover and failover.
    pub epoch: u64,
    /// The root certificate, DER.
    pub root_der: Vec<u8>,
    /// `file`, the only form there is: shown as unsealed.
    pub root_form: String,
    /// Bundle sequence: epoch << 40 | counter.
    pub bundle_sequence: u64,
    /// The number the next new identity gets.
    pub next_identity: u32,
    /// Last change of anything a slice is made of.
    pub revision: Revision,
    /// Rises when EK roots, the allow-list or denials change; an admission names the one it was judged under.
    pub endorsement_revision: Revision,
    /// Rises when an appraisal policy changes; verdicts name the one they were judged under.
    pub policy_revision: Revision,
    /// Sequence and hash of the last exported record.
    pub export_seq: u64,
    /// See `export_seq`.
    pub export_hash: [u8; 32],
}

impl CellRow {
    /// A cell at its founding: the first epoch, a root whose key lies in a file, nothing changed and nothing exported yet.
    pub fn founded(trust_domain: TrustDomain, root_der: Vec<u8>) -> Self {
        Self {
            trust_domain,
            epoch: 1,
            root_der,
            root_form: "file".into(),
            bundle_sequence: 1 << 40 | 1,
            next_identity: NumericIdentity::FIRST.0,
            revision: Revision(0),
            endorsement_revision: Revision(0),
            policy_revision: Revision(0),
            export_seq: 0,
            export_hash: [0; 32],
        }
    }
}

/// Why a cell began anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Cause {
    /// From a backup, on an empty machine.
    Restored,
    /// From what one replica still had, after the majority was lost for good.
    Recovered,
}

/// The beginning of an incarnation of the cell after its first: the audit trail of restore and recover.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IncarnationRow {
    /// Why.
    pub cause: Cause,
    /// When. A verdict from before says nothing of a node any more.
    pub began: Stamp,
    /// The last index that came along.
    pub from_index: RaftIndex,
    /// `State::digest` there.
    pub from_digest: [u8; 32],
    /// The one replica that it began with.
    pub replica: u64,
    /// Replicas that are of this cell no more.
    pub given_up: Vec<u64>,
}

/// A replica of the cell.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// `ip:port` of its gRPC listener.
    pub address: String,
    /// Subject key identifier (hex) of its intermediate.
    pub authority: String,
    /// When that intermediate ends.
    pub authority_not_after: Stamp,
    /// P-256 public point to which ticket keys are wrapped.
    pub wrap_key: Vec<u8>,
    /// Ed25519 public key with which it signs heads and reports.
    pub record_key: [u8; 32],
}

/// A one-time token, stored by its SHA-256 only.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenRow {
    /// What it opens.
    pub scope: TokenScope,
    /// No longer valid after.
    pub expires: Stamp,
    /// Burnt.
    pub used: bool,
}

/// What a one-time token opens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TokenScope {
    /// One node into this cluster.
    Node(ClusterId),
    /// The replica with this number at this address.
    Replica(u64, String),
    /// A peer cell: its trust domain and the fingerprint the operator expects.
    Peer(TrustDomain, [u8; 32]),
}

/// The root-certified list of record keys.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeySetRow {
    /// The statement's bytes.
    pub statement: Vec<u8>,
    /// The root's signature over them.
    pub signature: Vec<u8>,
}

impl KeySetRow {
    /// SHA-256 of the statement.
    pub fn sha256(&self) -> [u8; 32] {
        Sha256::digest(&self.statement).into()
    }
}

/// A ticket key, wrapped to each replica. Never in plain in log or snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TicketKeyRow {
    /// When it was made.
    pub made: Stamp,
    /// Replica number -> wrapped key.
    pub wrapped: BTreeMap<u64, Vec<u8>>,
}

/// A cluster served by this cell.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterRow {
    /// EK roots: DER and class (hardware, virtual, lab). None is built in.
    pub ek_roots: Vec<(Vec<u8>, String)>,
    /// How often its nodes are asked for a quote, milliseconds.
    pub attest_interval_ms: u64,
}

/// One version of an appraisal policy's content. The state machine does not read it: verdicts are reached outside.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyVersion {
    /// Rises by one with each change.
    pub version: u64,
    /// SHA-256 of the canonical form.
    pub sha256: [u8; 32],
    /// The canonical form.
    pub canonical: Vec<u8>,
    /// The clusters whose nodes it may accept.
    pub clusters: BTreeSet<ClusterId>,
}

/// An appraisal policy by name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AppraisalPolicyRow {
    /// What is wanted.
    pub current: PolicyVersion,
    /// What is accepted too, until the roll-out is promoted.
    pub previous: Option<PolicyVersion>,
    /// Who wrote it.
    pub written_by: String,
}

/// An entry with the revision that wrote it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EntryRow {
    /// The entry.
    pub entry: Entry,
    /// Who may expect which version.
    pub revision: Revision,
}

/// An object of some origin (this cell or a peer).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owned<T> {
    /// The object.
    pub object: T,
    /// This cell's index that wrote or imported it.
    pub revision: Revision,
    /// Who wrote it.
    pub written_by: String,
}

/// Rows of policies.
pub type PolicyRow = Owned<Policy>;
/// Rows of services.
pub type ServiceRow = Owned<Service>;
/// Rows of groups.
pub type GroupRow = Owned<Group>;
/// Rows of egress documents.
pub type EgressRow = Owned<Egress>;

/// A document as it is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum StoredDocument {
    /// `kind: Policy`.
    Policy(Policy),
    /// `kind: Service`.
    Service(Service),
    /// `kind: Group`.
    Group(Group),
    /// `kind: Egress`.
    Egress(Egress),
}

impl StoredDocument {
    /// Which kind it is.
    pub fn kind(&self) -> DocumentKind {
        match self {
            Self::Policy(_) => DocumentKind::Policy,
            Self::Service(_) => DocumentKind::Service,
            Self::Group(_) => DocumentKind::Group,
            Self::Egress(_) => DocumentKind::Egress,
        }
    }
    /// Its name.
    pub fn name(&self) -> &ObjectName {
        match self {
            Self::Policy(policy) => &policy.name,
            Self::Service(service) => &service.name,
            Self::Group(group) => &group.name,
            Self::Egress(egress) => &egress.name,
        }
    }
}

/// What one change did to one document of this cell.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DocumentChange {
    /// Which kind.
    pub kind: DocumentKind,
    /// Its name.
    pub name: ObjectName,
    /// What was there.
    pub before: Option<StoredDocument>,
    /// What is there since.
    pub after: Option<StoredDocument>,
}

/// One change of documents, as it is remembered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DocumentsRow {
    /// When.
    pub stamp: Stamp,
    /// Who asked.
    pub by: String,
    /// Why, where it was no plain change.
    pub note: String,
    /// What it changed; empty where that was too large to be remembered.
    pub changes: Vec<DocumentChange>,
    /// Of `changes`, as stored.
    pub bytes: u64,
}
/// Rows of endpoints.
pub type EndpointRow = Owned<Endpoint>;

/// How far trust in a peer has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum PeerState {
    /// Possession proved; the operator has not approved yet.
    Pending,
    /// Records are pulled and relied on.
    Active,
    /// Its records no longer chain; nothing more is imported.
    Stopped,
    /// An operator believes it no more, for now.
    Suspended,
}

impl PeerState {
    /// Whether what its roots certified is believed. News is taken of an active one only.
    pub fn is_believed(self) -> bool {
        match self {
            Self::Active | Self::Stopped => true,
            Self::Pending | Self::Suspended => false,
        }
    }
}

/// A peer cell.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerRow {
    /// See the type.
    pub state: PeerState,
    /// Covers root and key set (SHA-256).
    pub fingerprint: [u8; 32],
    /// Where its replicas answer.
    pub addresses: Vec<String>,
    /// Its root, DER.
    pub root_der: Vec<u8>,
    /// Its bundle's sequence.
    pub bundle_sequence: u64,
    /// Its record keys.
    pub key_set: KeySetRow,
    /// Its epoch as imported.
    pub epoch: u64,
    /// Last imported sequence.
    pub seq: u64,
    /// Hash of the last imported record.
    pub hash: [u8; 32],
    /// Code of what stopped it, or empty.
    pub trouble: String,
}

/// A cluster of a peer, as its records name it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForeignCluster {
    /// Whose.
    pub origin: TrustDomain,
}

/// The remembered outcome of a request (I10).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DedupeRow {
    /// When it was applied.
    pub stamp: Stamp,
    /// SHA-256 of the command, so that a reused id for another request is refused.
    pub command_sha256: [u8; 32],
    /// What was answered.
    pub outcome: Result<crate::Reply, ambit_model::Refusal>,
}

/// An identity's number.
pub type IdentityRow = (SpiffeId, u32);

/// Where a JWT authority is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum JwtAuthorityState {
    /// Published, signs nothing yet.
    Prepared,
    /// Signs.
    Active,
    /// Signs nothing more; its last tokens may still be valid.
    Old,
    /// An operator says that whatever it signed is to be signed anew.
    Tainted,
    /// An operator says that whatever it signed is refused: it is published no more.
    Revoked,
}

impl JwtAuthorityState {
    /// As operators read it.
    pub fn as_str(self) -> &'static str {
        match self {
            JwtAuthorityState::Prepared => "prepared",
            JwtAuthorityState::Active => "active",
            JwtAuthorityState::Old => "old",
            JwtAuthorityState::Tainted => "tainted",
            JwtAuthorityState::Revoked => "revoked",
        }
    }
}

/// A key of the trust domain that signs JWT-SVIDs. It has no chain, so it is shared by the replicas: its private part is
/// wrapped to each of them, never in plain in log, snapshot or backup.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JwtAuthorityRow {
    /// Its name.
    pub kid: String,
    /// SubjectPublicKeyInfo, DER; empty once revoked.
    pub spki_der: Vec<u8>,
    /// See the type.
    pub state: JwtAuthorityState,
    /// When it was made, and published.
    pub made: Stamp,
    /// When the next one is to sign instead, or did at an operator's word; without end while it is prepared.
    pub leaves: Stamp,
    /// No token of it is valid after.
    pub not_after: Stamp,
    /// Replica number -> wrapped private key; none once it is old.
    pub wrapped: BTreeMap<u64, Vec<u8>>,
}

/// The keys of JWT-SVIDs in a trust domain's bundle: what peers are told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JwtKeys {
    /// Of the bundle that they came with.
    pub sequence: u64,
    /// All of them.
    pub authorities: Vec<JwtAuthority>,
}

/// What an administrator may do, by the name in the certificate. Without a row nobody is one, but for the founder.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AdminRow {
    /// None: everything was taken away.
    pub roles: BTreeSet<AdminRole>,
    /// Who changed it last.
    pub changed_by: String,
    /// When.
    pub changed: Stamp,
}

/// Whoever is asked before an act that no administrator does alone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApproverRow {
    /// Ed25519.
    pub key: [u8; 32],
    /// When.
    pub added: Stamp,
    /// The administrator.
    pub added_by: String,
}

/// An act that takes approvers, as it was done: what was approved for it is good for nothing more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ActRow {
    /// What.
    pub act: Act,
    /// The administrator.
    pub by: String,
    /// Nobody, where the cell had no approvers.
    pub approved_by: Vec<ObjectName>,
    /// When.
    pub stamp: Stamp,
    /// SHA-256 of what was signed; zeros where nothing was.
    pub statement: [u8; 32],
    /// The end of what was signed.
    pub expires: Stamp,
}

/// How a bundle endpoint is authenticated (SPIFFE_Federation.md section 5.2).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum EndpointProfile {
    /// By the web's authorities.
    HttpsWeb,
    /// By an SVID of this identity, verified with the bundle that is known.
    HttpsSpiffe(SpiffeId),
}

/// A foreign trust domain that is no cell of ours: where its bundle is, and what it was when it was last taken. URL, profile and
/// trust domain are each said by an operator, never inferred from one another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RelationshipRow {
    /// https, as configured.
    pub url: String,
    /// See the type.
    pub profile: EndpointProfile,
    /// Root certificates, DER: the bootstrap bundle, or the last one taken. None: everything is revoked, or nothing is known.
    pub roots: Vec<Vec<u8>>,
    /// `spiffe_sequence` of the last one taken, where it had one.
    pub sequence: Option<u64>,
    /// SHA-256 of the last one taken; zeros where none was.
    pub sha256: [u8; 32],
    /// When it said that it wants to be asked again, seconds.
    pub refresh_hint_s: u64,
    /// When the last one was taken; zero where none was.
    pub taken: Stamp,
    /// An empty bundle that waits for an operator's word.
    pub held: Option<(Option<u64>, [u8; 32])>,
    /// Why the last one offered was not taken; empty where it was.
    pub trouble: String,
    /// Who wrote the relationship.
    pub written_by: String,
}
