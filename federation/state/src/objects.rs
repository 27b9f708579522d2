//! Rows of the tables: what a cell remembers.

use ambit_model::policy::{Endpoint, Policy, Service};
use ambit_model::{ClusterId, Entry, Generation, NodeId, Revision, SpiffeId, Stamp, TrustDomain};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The cell itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CellRow {
    /// Its own trust domain.
    pub trust_domain: TrustDomain,
    /// Authority epoch; rises with restore, recover and failover.
    pub epoch: u64,
    /// The root certificate, DER.
    pub root_der: Vec<u8>,
    /// `file` (shown as unsealed); sealed and external follow with issue D.
    pub root_form: String,
    /// Bundle sequence: epoch << 40 | counter.
    pub bundle_sequence: u64,
    /// The number the next new identity gets.
    pub next_identity: u32,
    /// Last change of anything a slice is made of.
    pub revision: Revision,
    /// Rises when EK roots, the allow-list or denials change; an admission names the one it was judged under.
    pub endorsement_revision: Revision,
    /// Sequence and hash of the last exported record.
    pub export_seq: u64,
    /// See `export_seq`.
    pub export_hash: [u8; 32],
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
}

/// Whether a node is relied on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum NodeState {
    /// Admitted and in time.
    Admitted,
    /// Banned by an operator: it stays known and may not come back.
    Banned,
    /// Evicted by an operator: it may enrol again, with another AK too.
    Evicted,
}

/// TPM counters, compared lexicographically; the clock counts only where both others are equal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Counters {
    /// TPM Reset count.
    pub resets: u32,
    /// TPM Restart count.
    pub restarts: u32,
    /// TPM clock, milliseconds.
    pub clock: u64,
}

/// A node as the cell knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeRow {
    /// Its cluster.
    pub cluster: ClusterId,
    /// Rises with each admission.
    pub generation: Generation,
    /// See the type.
    pub state: NodeState,
    /// TPM name of its AK.
    pub ak_name: Vec<u8>,
    /// As of the last good verdict.
    pub counters: Counters,
    /// hardware, virtual, lab, or listed (allow-listed without a certificate).
    pub ek_class: String,
    /// When its evidence was last accepted.
    pub last_verdict: Stamp,
    /// EAR-shaped claims of the last verdict.
    pub claims: String,
    /// SHA-256 over the evidence judged.
    pub evidence_sha256: [u8; 32],
}

/// A refused enrolment, for operators.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DenialRow {
    /// When.
    pub stamp: Stamp,
    /// Which node.
    pub node: NodeId,
    /// Stable code.
    pub code: String,
    /// Where the logs diverged, if a good HMAC was seen.
    pub diverged: String,
    /// For operators only.
    pub expected: String,
    /// For operators only.
    pub found: String,
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
