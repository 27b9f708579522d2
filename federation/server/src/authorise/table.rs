//! The table: who may call which method. What is not in it is refused to everybody.

use super::Role;
use ambit_model::AdminRole;

/// Kinds of caller a method admits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    /// Without a certificate too.
    Anyone,
    /// Federation-admins.
    Admin,
    /// Federation-admins, and replicas of the cell on their behalf.
    AdminOrReplica,
    /// Nodes.
    Node,
    /// Replicas of this cell.
    Replica,
    /// Replicas of active peers.
    Peer,
    /// Issuers of clusters, by an entry that is marked `downstream`.
    Downstream,
    /// Administrators of whatever role: what each must know of the cell, or does for himself.
    AnyAdmin,
    /// The same, and replicas of the cell on their behalf.
    AnyAdminOrReplica,
    /// Who reads: federation-admins and operators.
    Reader,
    /// The same, and replicas of the cell on their behalf.
    ReaderOrReplica,
    /// Who reads, and administrators of clusters, who read of their own clusters only where it is said of clusters.
    ClusterReader,
    /// The same, and replicas of the cell on their behalf.
    ClusterReaderOrReplica,
    /// Federation-admins, and administrators of clusters within theirs.
    ClusterAdmin,
    /// The same, and replicas of the cell on their behalf.
    ClusterAdminOrReplica,
    /// Auditors and federation-admins.
    Auditor,
    /// Auditors and who reads.
    AuditReader,
    /// Auditors and federation-admins, and replicas of the cell, which keep the same records.
    AuditorOrReplica,
}

/// What an administrator's roles make of him for one method.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Admitted {
    /// He may not call it.
    No,
    /// Within the clusters that he administers.
    Within,
    /// Wholly.
    Yes,
}

impl Who {
    /// Whether one role admits to a method of this kind, and how far.
    fn by_role(self, role: &AdminRole) -> Admitted {
        use AdminRole::{Auditor, ClusterAdmin, FederationAdmin, Operator};
        match (self, role) {
            (Who::Node | Who::Replica | Who::Peer | Who::Downstream, _) => Admitted::No,
            (Who::Anyone | Who::AnyAdmin | Who::AnyAdminOrReplica, _) | (_, FederationAdmin) => Admitted::Yes,
            (
                Who::Reader
                | Who::ReaderOrReplica
                | Who::ClusterReader
                | Who::ClusterReaderOrReplica
                | Who::AuditReader,
                Operator,
            ) => Admitted::Yes,
            (Who::Auditor | Who::AuditReader | Who::AuditorOrReplica, Auditor) => Admitted::Yes,
            (
                Who::ClusterReader | Who::ClusterReaderOrReplica | Who::ClusterAdmin | Who::ClusterAdminOrReplica,
                ClusterAdmin(_),
            ) => Admitted::Within,
            (_, Operator | Auditor | ClusterAdmin(_)) => Admitted::No,
        }
    }

    /// Whether the caller may call a method of this kind.
    pub(super) fn admits(self, role: &Role) -> Admitted {
        let or_no = |yes: bool| if yes { Admitted::Yes } else { Admitted::No };
        match role {
            Role::Anyone => or_no(self == Who::Anyone),
            Role::Node(..) => or_no(matches!(self, Who::Anyone | Who::Node)),
            Role::Peer(_) => or_no(matches!(self, Who::Anyone | Who::Peer)),
            Role::Downstream(_) => or_no(matches!(self, Who::Anyone | Who::Downstream)),
            Role::Replica(_) => or_no(matches!(
                self,
                Who::Anyone
                    | Who::Replica
                    | Who::AdminOrReplica
                    | Who::AuditorOrReplica
                    | Who::AnyAdminOrReplica
                    | Who::ReaderOrReplica
                    | Who::ClusterReaderOrReplica
                    | Who::ClusterAdminOrReplica
            )),
            Role::Admin(_, roles) => {
                let all: Vec<Admitted> = roles.iter().map(|role| self.by_role(role)).collect();
                [Admitted::Yes, Admitted::Within].into_iter().find(|one| all.contains(one)).unwrap_or(Admitted::No)
            }
        }
    }
}

/// The table.
pub const METHODS: &[(&str, Who)] = &[
    ("/ambit.v1.NodeAttestation/Begin", Who::Anyone),
    ("/ambit.v1.NodeAttestation/Evidence", Who::Anyone),
    ("/ambit.v1.NodeAttestation/CreateJoinToken", Who::ClusterAdmin),
    ("/ambit.v1.NodeAttestation/AllowEk", Who::ClusterAdmin),
    ("/ambit.v1.NodeAttestation/ListNodes", Who::ClusterReader),
    ("/ambit.v1.NodeAttestation/ExplainNode", Who::ClusterReader),
    ("/ambit.v1.NodeAttestation/BanNode", Who::ClusterAdmin),
    ("/ambit.v1.NodeAttestation/EvictNode", Who::ClusterAdmin),
    ("/ambit.v1.NodeAttestation/UnbanNode", Who::ClusterAdmin),
    ("/ambit.v1.NodeAttestation/QuarantineNode", Who::ClusterAdmin),
    ("/ambit.v1.NodeAttestation/ReleaseNode", Who::ClusterAdmin),
    ("/ambit.v1.NodeAttestation/AttestationAt", Who::ClusterReader),
    ("/ambit.v1.NodeAttestation/AttestationResult", Who::ClusterReader),
    ("/ambit.v1.NodeAttestation/PutEkRoots", Who::Admin),
    ("/ambit.v1.NodeAttestation/DisallowEk", Who::ClusterAdmin),
    ("/ambit.v1.NodeAttestation/PutEkDeny", Who::Admin),
    ("/ambit.v1.NodeAttestation/ListEndorsements", Who::ClusterReader),
    ("/ambit.v1.Appraisal/ApplyAppraisalPolicy", Who::ClusterAdmin),
    ("/ambit.v1.Appraisal/DeleteAppraisalPolicy", Who::ClusterAdmin),
    ("/ambit.v1.Appraisal/ListAppraisalPolicies", Who::ClusterReader),
    ("/ambit.v1.Appraisal/PromoteAppraisalPolicy", Who::ClusterAdmin),
    ("/ambit.v1.Appraisal/TestAppraisalPolicy", Who::Reader),
    ("/ambit.v1.Appraisal/LearnAppraisalPolicy", Who::Reader),
    // Allow-lists go by their SHA-256: nobody changes another's.
    ("/ambit.v1.Appraisal/PutBlob", Who::ClusterAdminOrReplica),
    ("/ambit.v1.Appraisal/GetBlob", Who::ReaderOrReplica),
    ("/ambit.v1.ClusterRegistry/RegisterCluster", Who::Admin),
    ("/ambit.v1.ClusterRegistry/ListClusters", Who::AnyAdminOrReplica),
    ("/ambit.v1.ClusterRegistry/CreateClusterToken", Who::Admin),
    ("/ambit.v1.ClusterRegistry/RegisterPeer", Who::Admin),
    ("/ambit.v1.ClusterRegistry/ApprovePeer", Who::Admin),
    ("/ambit.v1.ClusterRegistry/ListPeers", Who::AnyAdminOrReplica),
    ("/ambit.v1.ClusterRegistry/SuspendPeer", Who::Admin),
    ("/ambit.v1.ClusterRegistry/RemovePeer", Who::Admin),
    ("/ambit.v1.ClusterRegistry/ListStandbys", Who::AnyAdminOrReplica),
    ("/ambit.v1.ClusterRegistry/NameStandby", Who::Admin),
    ("/ambit.v1.ClusterRegistry/CommitGrant", Who::Admin),
    ("/ambit.v1.ClusterRegistry/ReleaseGrant", Who::Admin),
    ("/ambit.v1.ClusterRegistry/TakeBack", Who::Admin),
    ("/ambit.v1.ClusterRegistry/JudgeLate", Who::Admin),
    ("/ambit.v1.PeerLink/Hello", Who::Anyone),
    ("/ambit.v1.PeerLink/Prove", Who::Anyone),
    ("/ambit.v1.PeerLink/Pull", Who::Peer),
    ("/ambit.v1.PeerLink/RenewLease", Who::Peer),
    ("/ambit.v1.PeerLink/CertifyStandby", Who::Peer),
    ("/ambit.v1.EntryRegistry/BatchCreateEntry", Who::ClusterAdmin),
    ("/ambit.v1.EntryRegistry/BatchUpdateEntry", Who::ClusterAdmin),
    ("/ambit.v1.EntryRegistry/BatchDeleteEntry", Who::ClusterAdmin),
    ("/ambit.v1.EntryRegistry/ListEntries", Who::ClusterReader),
    ("/ambit.v1.EntryRegistry/GetEntry", Who::ClusterReader),
    ("/ambit.v1.Svid/BatchNewX509SVID", Who::Node),
    ("/ambit.v1.Svid/NewJWTSVID", Who::Node),
    ("/ambit.v1.Svid/MintX509SVID", Who::Admin),
    ("/ambit.v1.Svid/NewIntermediateCA", Who::Downstream),
    ("/ambit.v1.Svid/MintJWTSVID", Who::Admin),
    ("/ambit.v1.Svid/RenewAdmin", Who::AnyAdmin),
    ("/ambit.v1.Svid/ListIssued", Who::AuditReader),
    ("/ambit.v1.BundleRegistry/GetBundle", Who::AnyAdmin),
    ("/ambit.v1.BundleRegistry/ListBundles", Who::AnyAdmin),
    ("/ambit.v1.LocalAuthority/GetX509AuthorityState", Who::ReaderOrReplica),
    ("/ambit.v1.LocalAuthority/PrepareX509Authority", Who::Admin),
    ("/ambit.v1.LocalAuthority/ActivateX509Authority", Who::Admin),
    ("/ambit.v1.LocalAuthority/TaintX509Authority", Who::Admin),
    ("/ambit.v1.LocalAuthority/RevokeX509Authority", Who::Admin),
    ("/ambit.v1.LocalAuthority/GetJWTAuthorityState", Who::Reader),
    ("/ambit.v1.LocalAuthority/PrepareJWTAuthority", Who::Admin),
    ("/ambit.v1.LocalAuthority/ActivateJWTAuthority", Who::Admin),
    ("/ambit.v1.LocalAuthority/TaintJWTAuthority", Who::Admin),
    ("/ambit.v1.LocalAuthority/RevokeJWTAuthority", Who::Admin),
    ("/ambit.v1.LocalAuthority/ShareRoot", Who::Admin),
    ("/ambit.v1.LocalAuthority/SealRoot", Who::Admin),
    ("/ambit.v1.LocalAuthority/RequestExternalAuthority", Who::Admin),
    ("/ambit.v1.LocalAuthority/WithdrawExternalAuthority", Who::Admin),
    ("/ambit.v1.LocalAuthority/ImportExternalAuthority", Who::Admin),
    ("/ambit.v1.TrustDomainRegistry/ListFederationRelationships", Who::Reader),
    ("/ambit.v1.TrustDomainRegistry/CreateFederationGroup", Who::Admin),
    ("/ambit.v1.TrustDomainRegistry/PutFederationRelationship", Who::Admin),
    ("/ambit.v1.TrustDomainRegistry/DeleteFederationRelationship", Who::Admin),
    ("/ambit.v1.TrustDomainRegistry/RefreshBundle", Who::AdminOrReplica),
    ("/ambit.v1.TrustDomainRegistry/ConfirmBundle", Who::Admin),
    ("/ambit.v1.PolicyRegistry/Apply", Who::ClusterAdmin),
    ("/ambit.v1.PolicyRegistry/Delete", Who::ClusterAdmin),
    // Who may speak to whom concerns both ends, whichever cluster they are of.
    ("/ambit.v1.PolicyRegistry/List", Who::ClusterReader),
    ("/ambit.v1.PolicyRegistry/Explain", Who::ClusterReader),
    ("/ambit.v1.PolicyRegistry/Plan", Who::ClusterReader),
    ("/ambit.v1.PolicyRegistry/WhoCan", Who::ClusterReader),
    ("/ambit.v1.PolicyRegistry/Unused", Who::ClusterReader),
    ("/ambit.v1.PolicyRegistry/History", Who::ClusterReader),
    ("/ambit.v1.PolicyRegistry/Rollback", Who::Admin),
    ("/ambit.v1.PolicyRegistry/Flows", Who::ReaderOrReplica),
    ("/ambit.v1.PolicyRegistry/Connection", Who::ReaderOrReplica),
    ("/ambit.v1.PolicyRegistry/Status", Who::ClusterReaderOrReplica),
    ("/ambit.v1.Watch/Watch", Who::Reader),
    ("/ambit.v1.AgentStream/Sync", Who::Node),
    ("/ambit.v1.Membership/Status", Who::AnyAdminOrReplica),
    ("/ambit.v1.Membership/CreateReplicaToken", Who::Admin),
    ("/ambit.v1.Membership/ReplicaJoin", Who::Anyone),
    ("/ambit.v1.Membership/Promote", Who::AdminOrReplica),
    ("/ambit.v1.Membership/TransferLeader", Who::Admin),
    ("/ambit.v1.Membership/RemoveVoter", Who::Admin),
    ("/ambit.v1.Membership/Snapshot", Who::Admin),
    ("/ambit.v1.Membership/Backup", Who::Admin),
    ("/ambit.v1.Raft/Exchange", Who::Replica),
    ("/ambit.v1.Raft/Propose", Who::Replica),
    ("/ambit.v1.Drill/SealReport", Who::Admin),
    ("/ambit.v1.Drill/ListReports", Who::AuditReader),
    ("/ambit.v1.Drill/RunDrill", Who::Admin),
    ("/ambit.v1.Audit/WatchAudit", Who::Auditor),
    ("/ambit.v1.Audit/AuditHead", Who::AuditorOrReplica),
    ("/ambit.v1.Audit/ReadAudit", Who::AuditorOrReplica),
    ("/ambit.v1.Audit/ProveAudit", Who::Auditor),
    ("/ambit.v1.Audit/BeginAudit", Who::Admin),
    ("/ambit.v1.Audit/NoteAuditExport", Who::Auditor),
    ("/ambit.v1.PeerLink/CosignAudit", Who::Peer),
    ("/ambit.v1.Audit/ListRefusals", Who::AuditReader),
    ("/ambit.v1.Administrators/ListAdmins", Who::AuditReader),
    ("/ambit.v1.Administrators/ChangeRoles", Who::Admin),
    ("/ambit.v1.Administrators/CertifyAdmin", Who::Admin),
    ("/ambit.v1.Administrators/ListApprovers", Who::AuditReader),
    ("/ambit.v1.Administrators/AddApprover", Who::Admin),
    ("/ambit.v1.Administrators/RemoveApprover", Who::Admin),
    ("/ambit.v1.Revocation/DenyId", Who::ClusterAdmin),
    ("/ambit.v1.Revocation/DenySvid", Who::Admin),
    ("/ambit.v1.Revocation/ListDenials", Who::AuditReader),
    ("/ambit.v1.Revocation/GetCrl", Who::ReaderOrReplica),
    ("/ambit.v1.Membership/RenewAuthority", Who::Replica),
    ("/ambit.v1.Membership/RequireAttestedReplicas", Who::Admin),
    ("/ambit.v1.CoSigner/CoSign", Who::Replica),
    ("/ambit.v1.Traffic/SetRegion", Who::ClusterAdmin),
    ("/ambit.v1.Traffic/DrainCluster", Who::ClusterAdmin),
    ("/ambit.v1.Traffic/UndrainCluster", Who::ClusterAdmin),
    ("/ambit.v1.Traffic/FailOver", Who::Admin),
    ("/ambit.v1.Traffic/FailBack", Who::Admin),
    ("/ambit.v1.Traffic/ShowCluster", Who::AnyAdmin),
    ("/grpc.health.v1.Health/Check", Who::Anyone),
    ("/grpc.health.v1.Health/Watch", Who::Anyone),
    ("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", Who::AnyAdmin),
];
