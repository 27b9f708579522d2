//! Proof that something was committed and applied. No commit, no certificate (I5, design.md section 2).

use ambit_model::{DnsName, EntryId, Generation, Lifetime, NodeId, ObjectName, RaftIndex, Revision, SpiffeId};
use serde::{Deserialize, Serialize};

/// A `T` that the state machine applied from a committed entry. Only `apply` makes one; it is used once.
///
/// ```compile_fail,E0451
/// use ambit_state::{Committed, Issuance};
/// fn forge(inner: Issuance) -> Committed<Issuance> { Committed { inner } }
/// ```
/// ```compile_fail,E0599
/// use ambit_state::{Committed, Issuance};
/// fn twice(one: &Committed<Issuance>) -> Committed<Issuance> { Committed::clone(one) }
/// ```
#[derive(Debug)]
pub struct Committed<T> {
    inner: T,
}

impl<T> Committed<T> {
    pub(crate) fn new(inner: T) -> Self {
        Self { inner }
    }
    /// What was committed.
    pub fn get(&self) -> &T {
        &self.inner
    }
}

/// For whom a leaf is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Subject {
    /// The node itself.
    Node,
    /// A workload by its entry at a revision.
    Workload(EntryId, Revision),
    /// An administrator.
    Admin,
    /// A workload by its entry at a revision, with DNS names beside its SPIFFE ID.
    NamedWorkload(EntryId, Revision, Vec<DnsName>),
    /// Whoever an administrator, by this name, minted it for, with these DNS names.
    Minted(String, Vec<DnsName>),
    /// An administrator, by a replica itself under the word of these approvers.
    BreakGlass(Vec<ObjectName>),
}

impl Subject {
    /// The subject of a leaf under an entry.
    pub(crate) fn workload(row: &crate::objects::EntryRow) -> Subject {
        let (id, names) = (row.entry.id.clone(), row.entry.extras.dns_names.clone());
        match names.is_empty() {
            true => Subject::Workload(id, row.revision),
            false => Subject::NamedWorkload(id, row.revision, names),
        }
    }
    /// DNS names that the leaf carries beside its SPIFFE ID.
    pub fn dns_names(&self) -> &[DnsName] {
        match self {
            Subject::NamedWorkload(_, _, names) | Subject::Minted(_, names) => names,
            Subject::Node | Subject::Workload(..) | Subject::Admin | Subject::BreakGlass(_) => &[],
        }
    }
    /// As operators read it.
    pub fn text(&self) -> String {
        match self {
            Subject::Node => "node".to_owned(),
            Subject::Admin => "administrator".to_owned(),
            Subject::Workload(id, revision) | Subject::NamedWorkload(id, revision, _) => {
                format!("entry {id}@{revision}")
            }
            Subject::Minted(by, _) => format!("minted by {by}"),
            Subject::BreakGlass(approvers) => {
                let names: Vec<&str> = approvers.iter().map(ObjectName::as_str).collect();
                format!("administrator, break_glass approved by {}", names.join(", "))
            }
        }
    }
}

/// The compact record of one leaf, many to a log entry. The leaf itself never enters the log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Issuance {
    /// Subject key identifier (hex) of the intermediate that must sign it; another authority refuses.
    pub authority: String,
    /// 16 bytes: epoch, log index, position. Unique for ever, across failover (I6).
    pub serial: [u8; 16],
    /// The identity certified.
    pub spiffe_id: SpiffeId,
    /// For whom.
    pub subject: Subject,
    /// Through which admission of which node; none for an administrator.
    pub binding: Option<(NodeId, Generation)>,
    /// The authority's epoch.
    pub epoch: u64,
    /// SHA-256 of the key's SubjectPublicKeyInfo (DER).
    pub key_hash: [u8; 32],
    /// From when to when.
    pub lifetime: Lifetime,
    /// Where it was committed.
    pub index: RaftIndex,
}

/// The record of one JWT-SVID: what may be signed. The token itself never enters the log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JwtIssuance {
    /// The authority that must sign it; another refuses.
    pub kid: String,
    /// 16 bytes: epoch, log index, position. Unique for ever, across failover, and among certificates too (I6).
    pub jti: [u8; 16],
    /// The identity that it speaks for.
    pub spiffe_id: SpiffeId,
    /// For whom.
    pub subject: Subject,
    /// Through which admission of which node; none for one that an administrator minted.
    pub binding: Option<(NodeId, Generation)>,
    /// [`ambit_model::Audience::sha256`] of those whom it is for.
    pub audience_sha256: [u8; 32],
    /// When it was committed.
    pub stamp: ambit_model::Stamp,
    /// When it ends.
    pub not_after: ambit_model::Stamp,
    /// Where it was committed.
    pub index: RaftIndex,
}

/// A replica's place in the cell, committed before its intermediate is signed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaAdmission {
    /// Which replica.
    pub replica: ambit_model::ReplicaId,
    /// SHA-256 of the SPKI of its issuing key.
    pub issuer_key_hash: [u8; 32],
    /// SHA-256 of the SPKI of its TLS key.
    pub tls_key_hash: [u8; 32],
    /// Serial of the intermediate; the TLS leaf's differs in its last byte.
    pub serial: [u8; 16],
    /// How long both are valid.
    pub lifetime: Lifetime,
}

/// A replica's next intermediate, committed before it is signed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaAuthority {
    /// Which replica.
    pub replica: ambit_model::ReplicaId,
    /// The cell's epoch.
    pub epoch: u64,
    /// SHA-256 of the root that must sign it.
    pub root: [u8; 32],
    /// SHA-256 of the SPKI of its issuing key.
    pub key_hash: [u8; 32],
    /// Of the intermediate.
    pub serial: [u8; 16],
    /// Of the intermediate.
    pub lifetime: Lifetime,
}

/// An intermediate for a replica of the cell's standby, in peace. It signs nothing that is believed without a live grant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StandbyAuthority {
    /// The standby's trust domain.
    pub holder: ambit_model::TrustDomain,
    /// Which of its replicas.
    pub replica: u64,
    /// SHA-256 of the root that must sign it.
    pub root: [u8; 32],
    /// SHA-256 of the SPKI of its key.
    pub key_hash: [u8; 32],
    /// Of the certificate.
    pub serial: [u8; 16],
    /// Of the certificate.
    pub lifetime: Lifetime,
}

/// A downstream authority, committed before it is signed: the intermediate of a cluster's own issuer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DownstreamAuthority {
    /// Under which entry.
    pub entry: EntryId,
    /// SHA-256 of the root that must sign it.
    pub root: [u8; 32],
    /// SHA-256 of the SPKI of its key.
    pub key_hash: [u8; 32],
    /// Of the certificate.
    pub serial: [u8; 16],
    /// Of the certificate.
    pub lifetime: Lifetime,
}

/// A root that was committed as the trust domain's next: the present one may certify its key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PreparedRoot {
    /// SHA-256 of the certificate.
    pub root: [u8; 32],
    /// SHA-256 of the certificate of the root that must sign.
    pub active: [u8; 32],
    /// Of the certificate over its key.
    pub serial: [u8; 16],
    /// When it was committed.
    pub stamp: ambit_model::Stamp,
}

/// A digest that a record key may sign: of a drill's report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SealedReport {
    /// The drill's name.
    pub drill: String,
    /// SHA-256 of the report's bytes.
    pub sha256: [u8; 32],
    /// When it was committed.
    pub stamp: ambit_model::Stamp,
    /// Where it was committed.
    pub index: RaftIndex,
}

/// A node as it stands: what a record key may sign as its attestation result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeResult {
    /// The cell that says it.
    pub trust_domain: ambit_model::TrustDomain,
    /// Who.
    pub node: NodeId,
    /// What admission and operators made of it.
    pub row: crate::objects::NodeRow,
    /// Its last good verdict.
    pub standing: crate::objects::Standing,
    /// The PCRs of its boot.
    pub boot: crate::objects::BootPcrs,
    /// Whether verdicts are overdue.
    pub late: bool,
    /// SHA-256 of the accepting policy's canonical form; none where the cell keeps that version no more.
    pub policy_sha256: Option<[u8; 32]>,
    /// The cell's time.
    pub stamp: ambit_model::Stamp,
    /// As of which entry.
    pub index: RaftIndex,
}

/// What a CRL of one authority says: the leaves that it issued, that have not ended, and that the cell refuses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RevokedLeaves {
    /// Subject key identifier (hex) of the authority.
    pub authority: String,
    /// The cell's revision: grows with each change of who is refused.
    pub revision: Revision,
    /// The cell's time.
    pub stamp: ambit_model::Stamp,
    /// Serial, and since when it is refused.
    pub leaves: Vec<(Vec<u8>, ambit_model::Stamp)>,
}
