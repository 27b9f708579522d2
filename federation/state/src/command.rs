//! Commands: the only ways the state changes. Their encoding is versioned; a log entry is never reinterpreted.

use crate::audit::{CosignedRow, WitnessAsk};
use crate::committed::{
    DownstreamAuthority, Issuance, JwtIssuance, PreparedRoot, ReplicaAdmission, ReplicaAuthority, SealedReport,
    StandbyAuthority,
};
pub use crate::documents::{DocumentKind, DocumentsChange};
use crate::external::ExternalImport;
use crate::objects::{
    AkFacts, BootPcrs, CellRow, Counters, DenialRow, EkDenyRow, EkFacts, EndpointProfile, ImaPoint, KeySetRow, Member,
    PeerRow, PolicyRef, PolicyVersion, TokenRow,
};
use crate::sealing::{ReplicaDenial, ReplicaVerdict, Seal};
use ambit_model::grant::SignedGrant;
use ambit_model::policy::{Endpoint, Policy, Service};
use ambit_model::record::{Head, Record};
use ambit_model::{
    Act, AdminRole, Approved, ClusterId, Code, DnsName, Entry, EntryId, Generation, JwtAuthority, JwtTtl, NodeId,
    ObjectName, Refusal, Revision, SpiffeId, Stamp, SvidTtl, TrustDomain, TrustVector,
};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

/// First byte of every encoded entry.
pub const ENTRY_VERSION: u8 = 2;

/// Most commands fit: a vector that grows byte by byte is moved half a dozen times on the way.
pub(crate) const COMMAND_BYTES: usize = 512;

/// What one log entry carries.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogEntry {
    /// The leader's time (I15).
    pub stamp: Stamp,
    /// SHA-256 of the caller's identity: request ids are the caller's own.
    pub client: [u8; 32],
    /// The caller's request id (I10). Zeros where no retry can happen (ticks).
    pub request: [u8; 16],
    /// What to do.
    pub command: Command,
}

impl LogEntry {
    /// Version byte and postcard.
    pub fn encode(&self) -> Result<Vec<u8>, Refusal> {
        let mut bytes = Vec::with_capacity(COMMAND_BYTES);
        bytes.push(ENTRY_VERSION);
        postcard::to_extend(self, bytes)
            .map_err(|e| Refusal::new(Code::Internal, "a command that encodes", e.to_string()))
    }
    /// SHA-256 of the command, by which a request id that comes with another command is told; zeros where the request has
    /// no id.
    pub fn command_sha256(&self) -> [u8; 32] {
        if self.request == [0; 16] {
            return [0; 32];
        }
        // An unencodable command cannot have come out of the log.
        let bytes = postcard::to_extend(&self.command, Vec::with_capacity(COMMAND_BYTES)).unwrap_or_default();
        Sha256::digest(bytes).into()
    }
    /// Strict: another version or trailing bytes are refused.
    pub fn decode(bytes: &[u8]) -> Result<Self, Refusal> {
        let bad =
            |found: String| Refusal::new(Code::Internal, format!("a log entry of version {ENTRY_VERSION}"), found);
        match bytes.split_first() {
            Some((&ENTRY_VERSION, rest)) => match postcard::take_from_bytes(rest) {
                Ok((entry, [])) => Ok(entry),
                Ok((_, more)) => Err(bad(format!("{} trailing bytes", more.len()))),
                Err(e) => Err(bad(e.to_string())),
            },
            Some((v, _)) => Err(bad(format!("version {v}"))),
            None => Err(bad("nothing".to_owned())),
        }
    }
}

/// A leaf asked for by a node for one of its workloads.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeafRequest {
    /// Under which entry.
    pub entry: EntryId,
    /// SHA-256 of the key's SPKI.
    pub key_hash: [u8; 32],
}

/// Evidence that was verified, as it is admitted. Made by the server from `Verified<NodeEvidence>` only.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Admission {
    /// Who.
    pub node: NodeId,
    /// Into which cluster.
    pub cluster: ClusterId,
    /// The server's nonce, consumed here.
    pub nonce: [u8; 32],
    /// The ticket's deadline.
    pub deadline: Stamp,
    /// SHA-256 of the join token, or none for an allow-listed EK.
    pub join_token: Option<[u8; 32]>,
    /// Judged under.
    pub endorsement_revision: Revision,
    /// Judged under.
    pub policy_revision: Revision,
    /// Its AK.
    pub ak: AkFacts,
    /// Its TPM.
    pub ek: EkFacts,
    /// What the quote and the logs showed.
    pub seen: Seen,
    /// SHA-256 of the SPKI of the node's key.
    pub key_hash: [u8; 32],
    /// The intermediate that will sign.
    pub authority: String,
    /// EAR-shaped claims.
    pub claims: String,
}

/// What a good verdict saw, at enrolment or in a round.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// As quoted.
    pub counters: Counters,
    /// As quoted.
    pub firmware_version: u64,
    /// How far the IMA log was judged.
    pub ima: ImaPoint,
    /// The boot's PCRs; none for the boot that the last verdict saw, by the digest below: most rounds say nothing new of it.
    pub pcrs: Option<BootPcrs>,
    /// SHA-256 over the boot's PCRs.
    pub boot_pcrs_sha256: [u8; 32],
    /// SHA-256 of the boot log that led to them.
    pub boot_log_sha256: [u8; 32],
    /// What accepted it.
    pub policy: PolicyRef,
    /// What is claimed of it.
    pub trust: TrustVector,
    /// SHA-256 of the evidence's body.
    pub evidence_sha256: [u8; 32],
    /// Bodies that it adds to, back to the last whole one.
    pub evidence_depth: u32,
}

/// A good verdict of a re-attestation round. Made by the server from a proof of the verifier only.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoundVerdict {
    /// Who.
    pub node: NodeId,
    /// Of which admission; a verdict on another counts for nothing.
    pub generation: Generation,
    /// Judged under.
    pub policy_revision: Revision,
    /// What was seen.
    pub seen: Seen,
}

/// Which nodes an operator's verb means.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Nodes {
    /// These.
    Ids(Vec<NodeId>),
    /// All of a cluster.
    Cluster(ClusterId),
}

/// What bad evidence at an enrolment speaks against: an admission, under the rules that judged it. After a newer admission,
/// or by other rules, it may be good.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Against {
    /// The admission in force when the evidence was judged.
    pub generation: Generation,
    /// The appraisal policies that judged.
    pub policy_revision: Revision,
    /// The endorsements that judged.
    pub endorsement_revision: Revision,
}

/// The only ways the state changes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(clippy::large_enum_variant, reason = "commands are encoded at once, never kept")]
pub enum Command {
    /// First entry of a cell.
    FoundCell(CellRow, u64, Member, KeySetRow),
    /// One a second from the leader: deadlines and retention run on it.
    Tick,
    /// A one-time token by its SHA-256.
    CreateToken([u8; 32], TokenRow),
    /// Burns a replica token and reserves the replica's place.
    AdmitReplica {
        /// SHA-256 of the token.
        token: [u8; 32],
        /// Its number.
        replica: u64,
        /// SHA-256 of SPKI of the issuing key.
        issuer_key_hash: [u8; 32],
        /// SHA-256 of SPKI of the TLS key.
        tls_key_hash: [u8; 32],
    },
    /// Records a replica whose intermediate was signed, with the new key set.
    PutMember(u64, Member, KeySetRow),
    /// Forgets a removed replica.
    RemoveMember(u64),
    /// A new ticket key, wrapped to each replica.
    RotateTicketKey(BTreeMap<u64, Vec<u8>>),
    /// Registers a cluster with its EK roots (DER, class) and how often its nodes attest, milliseconds.
    RegisterCluster(ClusterId, Vec<(Vec<u8>, String)>, u64),
    /// Puts EKs on a cluster's allow-list.
    AllowEk(ClusterId, Vec<NodeId>),
    /// Admits a node: consumes the nonce, burns the token, records the issuance. One entry (I5).
    AdmitNode(Admission),
    /// A failure after a good HMAC: consumes the nonce and keeps the reason for operators.
    DenyNode {
        /// Consumed.
        nonce: [u8; 32],
        /// Until when it is remembered.
        deadline: Stamp,
        /// The reason.
        row: DenialRow,
        /// What it speaks against, if its own TPM showed another state than the node was admitted with.
        distrust: Option<Against>,
    },
    /// An operator's word about nodes: all of them or none.
    SetNodes(NodeVerb, Nodes),
    /// Entries, each with its own outcome.
    CreateEntries(Vec<Entry>),
    /// See `CreateEntries`.
    DeleteEntries(Vec<EntryId>),
    /// Leaves for workloads of one node.
    Issue {
        /// On whose stream.
        node: NodeId,
        /// The generation in the caller's certificate.
        generation: Generation,
        /// The intermediate that will sign.
        authority: String,
        /// What for.
        leaves: Vec<LeafRequest>,
    },
    /// A fresh certificate for an administrator who holds one.
    IssueAdmin {
        /// The name after /ambit/admin/.
        name: String,
        /// SHA-256 of the key's SPKI.
        key_hash: [u8; 32],
        /// The intermediate that will sign.
        authority: String,
    },
    /// All or none. As of 0.1, of which replicas hold it in their logs; [`Command::ChangeDocuments`] came after.
    ApplyDocuments {
        /// Policies to write.
        policies: Vec<Policy>,
        /// Services to write.
        services: Vec<Service>,
        /// Who asked.
        by: String,
    },
    /// Removes a policy of this cell. See [`Command::ApplyDocuments`].
    DeletePolicy(ObjectName),
    /// Removes a service of this cell. See [`Command::ApplyDocuments`].
    DeleteService(ObjectName),
    /// The full set of a node's endpoints. Replicas send it in [`Command::NodeReports`] now.
    ReportEndpoints(NodeId, Vec<Endpoint>),
    /// A peer whose possession was proved; burns the token where one was needed.
    PutPeer(TrustDomain, PeerRow, Option<[u8; 32]>),
    /// The operator confirms the fingerprint.
    ApprovePeer(TrustDomain, [u8; 32]),
    /// Records under a verified head.
    Import(Head, Vec<Record>),
    /// What a peer sent did not chain.
    StopPeer(TrustDomain, String),
    /// A drill's report.
    SealReport(String, [u8; 32]),
    /// Good verdicts of rounds, many at once, each with its own outcome.
    PutVerdicts(Vec<RoundVerdict>),
    /// A round failed, as judged under this policy revision: the node of this generation is untrusted at once.
    Distrust(Generation, Revision, DenialRow),
    /// Takes EKs off a cluster's allow-list; nodes that were here because of it are out.
    DisallowEk(ClusterId, Vec<NodeId>),
    /// Adds EK roots (DER, class) to a cluster and removes others by SHA-256; nodes under a removed root are out.
    PutEkRoots {
        /// Which cluster.
        cluster: ClusterId,
        /// DER and class.
        add: Vec<(Vec<u8>, String)>,
        /// SHA-256 of the DER.
        remove: Vec<[u8; 32]>,
    },
    /// Writes and removes rules of the deny-list, by name; nodes that a new rule denies are out.
    PutEkDeny(Vec<(ObjectName, EkDenyRow)>, Vec<ObjectName>),
    /// Writes an appraisal policy; staged: what it was before is accepted too until it is promoted.
    PutAppraisalPolicy {
        /// Its name.
        name: ObjectName,
        /// Content; the version is set here.
        content: PolicyVersion,
        /// Keep what it was.
        staged: bool,
        /// Who asked.
        by: String,
    },
    /// Ends a staged roll-out.
    PromoteAppraisalPolicy(ObjectName),
    /// Removes an appraisal policy.
    DeleteAppraisalPolicy(ObjectName),
    /// Writes entries over what they are, each with its own outcome.
    PutEntries(Vec<(Entry, Presence)>),
    /// A new JWT authority: SubjectPublicKeyInfo (DER), and its private key wrapped to each replica.
    PutJwtAuthority(Vec<u8>, BTreeMap<u64, Vec<u8>>),
    /// A JWT authority, wrapped to further replicas.
    WrapJwtAuthority(String, BTreeMap<u64, Vec<u8>>),
    /// A token for a workload of one node.
    IssueJwt {
        /// On whose certificate.
        node: NodeId,
        /// The generation in it.
        generation: Generation,
        /// The authority that will sign.
        kid: String,
        /// Under which entry.
        entry: EntryId,
        /// [`ambit_model::Audience::sha256`].
        audience_sha256: [u8; 32],
    },
    /// Changes the roles of an administrator.
    ChangeRoles {
        /// The name after /ambit/admin/.
        admin: ObjectName,
        /// How.
        change: RoleChange,
        /// Who asked.
        by: String,
    },
    /// A certificate for an administrator who holds a role.
    CertifyAdmin {
        /// The name after /ambit/admin/.
        admin: ObjectName,
        /// SHA-256 of the key's SPKI.
        key_hash: [u8; 32],
        /// The intermediate that will sign.
        authority: String,
    },
    /// What an administrator of these clusters asks, refused where it touches anything of another.
    Within(BTreeSet<ClusterId>, Box<Command>),
    /// A certificate that an administrator mints.
    MintX509 {
        /// For whom.
        spiffe_id: SpiffeId,
        /// Beside the SPIFFE ID.
        dns_names: Vec<DnsName>,
        /// How long at most.
        ttl: SvidTtl,
        /// SHA-256 of the key's SPKI.
        key_hash: [u8; 32],
        /// The intermediate that will sign.
        authority: String,
        /// The administrator.
        by: String,
    },
    /// A token that an administrator mints.
    MintJwt {
        /// For whom.
        spiffe_id: SpiffeId,
        /// [`ambit_model::Audience::sha256`].
        audience_sha256: [u8; 32],
        /// How long at most.
        ttl: JwtTtl,
        /// The authority that will sign.
        kid: String,
        /// The administrator.
        by: String,
    },
    /// Revokes SVIDs of an identity.
    DenyId(SpiffeId, IdVerb),
    /// Revokes one leaf, by the authority's key identifier (hex) and the serial.
    DenyLeaf(String, Vec<u8>),
    /// Deletes entries, each with its own outcome; what was issued under them is revoked.
    RetireEntries(Vec<EntryId>),
    /// Writes entries over what they are, each with its own outcome; where one is not for all that it was for, what was
    /// issued under it is revoked.
    ReplaceEntries(Vec<(Entry, Presence)>),
    /// Writes the relationship with a foreign trust domain: URL, profile, bootstrap roots (DER), and who asked.
    PutRelationship(TrustDomain, String, EndpointProfile, Vec<Vec<u8>>, String),
    /// Ends it: its bundle goes too.
    RemoveRelationship(TrustDomain),
    /// A bundle fetched from the URL that the relationship had then.
    TakeBundle(TrustDomain, FetchedBundle),
    /// An operator says that the empty bundle with this SHA-256 is meant.
    ConfirmBundle(TrustDomain, [u8; 32]),
    /// A replica's next intermediate, for a key that it just made. Its own commit type (I5).
    RenewAuthority {
        /// Which replica.
        replica: u64,
        /// SHA-256 of SPKI of the issuing key.
        key_hash: [u8; 32],
        /// How long it is valid, milliseconds.
        lifetime_ms: u64,
    },
    /// Root (SHA-256) -> its key, wrapped to further replicas.
    WrapRoot([u8; 32], BTreeMap<u64, Vec<u8>>),
    /// A root (DER) that is to be the next, with its key wrapped to each replica. The same again answers the same.
    PrepareRoot(Vec<u8>, BTreeMap<u64, Vec<u8>>),
    /// The prepared root's key, certified by the active one (DER).
    CrossSignRoot([u8; 32], Vec<u8>),
    /// The prepared root becomes the active one, which certified this key set; the active one becomes old.
    ActivateRoot([u8; 32], KeySetRow),
    /// Whatever is under the old root is to be issued anew.
    TaintRoot([u8; 32]),
    /// A tainted or merely prepared root leaves the bundle; refused in a cell with approvers ([`Command::Act`]).
    RevokeRoot([u8; 32]),
    /// An intermediate signs nothing more, and whatever it signed is to be issued anew.
    TaintAuthority(String),
    /// Whatever a tainted intermediate signed is refused.
    RevokeAuthority(String),
    /// What brings another key set, refused where the one in force is not the one that it was made from
    /// ([`KeySetRow::sha256`]) any more: a replica that joins while a root is activated is in the one that comes after.
    OverKeySet([u8; 32], Box<Command>),
    /// An act, with the approvals that it takes.
    Act {
        /// What.
        act: Act,
        /// None where nobody was asked.
        approved: Option<Approved>,
        /// The administrator.
        by: String,
    },
    /// The prepared JWT authority, by its kid, signs from here on; the one that signed is old.
    ActivateJwtAuthority(String),
    /// Tokens of an old JWT authority are to be asked for anew.
    TaintJwtAuthority(String),
    /// A tainted or merely prepared JWT authority leaves the bundle: its tokens are refused.
    RevokeJwtAuthority(String),
    /// A certificate for an administrator, asked of a replica by who has its machine, under an approver's word
    /// ([`Act::BreakGlass`]). Its own commit type (I5).
    BreakGlass {
        /// The name after /ambit/admin/.
        admin: ObjectName,
        /// SHA-256 of the key's SPKI.
        key_hash: [u8; 32],
        /// The intermediate that will sign.
        authority: String,
        /// Which replica was asked.
        replica: u64,
        /// Who approved it.
        approved: Approved,
    },
    /// What was fetched from a foreign trust domain's endpoint, with its keys of JWT-SVIDs.
    TakeBundleWithKeys(TrustDomain, FetchedBundle, Vec<JwtAuthority>),
    /// Where tunnels of a node come from, as it says on the stream of this admission. Replicas send it in
    /// [`Command::NodeReports`] now.
    RegisterAddress(NodeId, Generation, Ipv4Addr),
    /// A downstream authority for whoever shows an SVID of this entry. Its own commit type (I5).
    NewDownstream {
        /// Through which node the SVID was issued.
        node: NodeId,
        /// The generation in it.
        generation: Generation,
        /// Of the SVID, which is on record.
        serial: [u8; 16],
        /// SHA-256 of SPKI of the key to be certified.
        key_hash: [u8; 32],
        /// How long it is valid at most, milliseconds.
        lifetime_ms: u64,
    },
    /// Changes the roles of whoever shows an SVID of this identity, of an entry that is marked `admin`.
    ChangeIdRoles {
        /// The identity.
        id: SpiffeId,
        /// How.
        change: RoleChange,
        /// Who asked.
        by: String,
    },
    /// A replica's TPM proved what it booted and that it holds the replica's wrap key. Its own commit type (I5).
    AttestReplica(Box<ReplicaVerdict>),
    /// Whether no replica joins any more that was not attested.
    AttestedReplicasOnly(bool),
    /// The keys of roots and JWT authorities, wrapped to the TPMs of all replicas and to nothing else.
    SealRoots(Box<Seal>),
    /// What wraps a secret to replicas, refused where one of these (replica -> wrap key) is not the replica's any more, and,
    /// where the root is sealed, where it is in no attested TPM.
    WrappedTo(BTreeMap<u64, Vec<u8>>, Box<Command>),
    /// A replica's own TPM showed another state than is accepted: it is attested no more.
    DenyReplica(Box<ReplicaDenial>),
    /// A key for the cell's authority under an external root waits for its certificate.
    RequestExternal {
        /// PKCS#10, DER.
        csr: Vec<u8>,
        /// SHA-256 of SPKI of the key.
        key_hash: [u8; 32],
        /// The key, wrapped to each replica.
        wrapped: BTreeMap<u64, Vec<u8>>,
    },
    /// The key with this SHA-256 (of its SPKI) waits no more, and is forgotten.
    WithdrawExternal([u8; 32]),
    /// What was certified outside: the next authority under the active root, or a prepared root with its first.
    ImportExternal(Box<ExternalImport>),
    /// Documents written and deleted in one: all or none.
    ChangeDocuments(Box<DocumentsChange>),
    /// Documents become what they were right after a change that is remembered.
    RollbackDocuments {
        /// Which change.
        to: Revision,
        /// As [`DocumentsChange::over`].
        over: Option<Revision>,
        /// Who asked.
        by: String,
        /// As [`DocumentsChange::note`], beside where it goes back to.
        note: String,
    },
    /// Refuses an intermediate by its key identifier (40 hexadecimal digits) of which there is no row, for the longest lifetime
    /// that one may have.
    DenyAuthority(String),
    /// What was made with the key of the authority (SHA-256 of its SPKI) under this external root, refused where another one
    /// signs under it by now: wrapped or split, its key would stand for that of the other.
    OverAuthority([u8; 32], [u8; 32], Box<Command>),
    /// As [`Command::RetireEntries`], each only where it is as it must be. One that is not there is refused.
    RemoveEntries(Vec<(EntryId, Presence)>),
    /// What nodes said on their streams, many at once, each with its own outcome, in this order.
    NodeReports(Vec<NodeReport>),
    /// Nobody of this peer is believed until it is approved again; with who says so.
    SuspendPeer(TrustDomain, String),
    /// The audit log of this incarnation begins: from here on every replica makes its records.
    BeginAudit,
    /// Somebody took records of the audit log out of the cell.
    NoteExport {
        /// Which records.
        what: String,
        /// Who asked.
        by: String,
    },
    /// The head of a peer's audit log that this cell is to cosign.
    Witness(Box<WitnessAsk>),
    /// This peer cosigned a head of this cell's audit log.
    TakeCosignature(TrustDomain, CosignedRow),
    /// Where connections to services go.
    Route(Box<crate::routing::RouteChange>),
    /// A lost cell's authority, granted to this one by the home's approvers; with who commits it.
    FailOver(Box<SignedGrant>, String),
    /// Gives a home's authority back before the grant's end; with who says so.
    ReleaseGrant(TrustDomain, String),
    /// This cell takes its authority back after a grant; with who says so.
    TakeBack(String),
    /// What becomes of a record of a fenced epoch.
    JudgeLate {
        /// Whose.
        origin: TrustDomain,
        /// Which.
        seq: u64,
        /// Taken after all, or dropped.
        keep: bool,
        /// Who says so.
        by: String,
    },
    /// An intermediate for a replica of the cell's standby, in peace. Its own commit type (I5).
    CertifyStandby {
        /// The standby's trust domain.
        holder: TrustDomain,
        /// Which of its replicas.
        replica: u64,
        /// SHA-256 of SPKI of its key.
        key_hash: [u8; 32],
    },
}

/// What one node says of itself on its stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum NodeReport {
    /// As [`Command::RegisterAddress`].
    Address(NodeId, Generation, Ipv4Addr),
    /// As [`Command::ReportEndpoints`].
    Endpoints(NodeId, Vec<Endpoint>),
}

/// What came of one report: per endpoint done, or why not; of an address nothing more is said.
pub type Reported = Result<Vec<Result<(), Refusal>>, Refusal>;

/// A foreign bundle, read strictly.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FetchedBundle {
    /// Where it came from.
    pub url: String,
    /// `spiffe_sequence`, where it had one.
    pub sequence: Option<u64>,
    /// `spiffe_refresh_hint`, seconds.
    pub refresh_hint_s: u64,
    /// Root certificates, DER.
    pub roots: Vec<Vec<u8>>,
    /// SHA-256 of the document.
    pub sha256: [u8; 32],
}

/// What an operator says of the SVIDs of an identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum IdVerb {
    /// Those issued so far are refused; new ones may be had.
    Revoke,
    /// All are refused, and none is issued, until it is lifted.
    Bar,
    /// New ones may be had again; those issued before stay refused.
    Lift,
}

/// What becomes of an administrator's roles.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RoleChange {
    /// These are added.
    Grant(BTreeSet<AdminRole>),
    /// These are taken away.
    Revoke(BTreeSet<AdminRole>),
    /// All are taken away.
    RevokeAll,
}

/// What an entry must be for a write over it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Presence {
    /// There, or not.
    Whatever,
    /// There, whatever it says.
    There,
    /// There, and as this revision wrote it.
    At(Revision),
}

/// What an operator says of nodes. Each has its opposite but `Evict`, which lets the node come back by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum NodeVerb {
    /// Out for good.
    Ban,
    /// Ends a ban.
    Unban,
    /// Out until released.
    Quarantine,
    /// Ends a quarantine or a distrust.
    Release,
    /// Forgotten but for its generation.
    Evict,
}

/// What a command answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// Done.
    Done,
    /// Per item: done, or why not.
    Items(Vec<Result<(), Refusal>>),
    /// Leaves to sign, or why not, per item.
    Leaves(Vec<Result<Issuance, Refusal>>),
    /// A node was admitted; its leaf is to be signed.
    Admitted(Generation, Box<Issuance>),
    /// A replica was admitted.
    Replica(Box<ReplicaAdmission>),
    /// Documents: for each whether it changed anything, and the export sequence after.
    Documents(Vec<bool>, u64),
    /// A report was sealed.
    Report(Box<SealedReport>),
    /// A token to sign.
    Token(Box<JwtIssuance>),
    /// A replica's next intermediate is to be signed.
    Authority(Box<ReplicaAuthority>),
    /// A root was prepared, and is to be certified by the active one.
    Root(Box<PreparedRoot>),
    /// A downstream authority is to be signed.
    Downstream(Box<DownstreamAuthority>),
    /// Per report.
    Reports(Vec<Reported>),
    /// A standby's intermediate is to be signed.
    Standby(Box<StandbyAuthority>),
}
