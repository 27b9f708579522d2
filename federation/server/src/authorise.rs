//! Who may call what: one static table, deny by default. Raw requests stop here.

use crate::replica::wall_clock;
use ambit_identity::{Named, PeerSvid};
use ambit_model::{Code, Generation, NodeId, Refusal, Stamp, TrustDomain};
use ambit_proto::status::to_status;
use ambit_state::State;
use ambit_state::authorities::AuthorityState;
use ambit_state::objects::PeerState;
use ambit_transport::Caller;
use sha2::{Digest, Sha256};
use std::net::IpAddr;
use std::ops::Deref;
use std::task::{Context, Poll};
use tonic::body::Body;
use tower::{Layer, Service};

/// What a caller was found to be, from its verified certificate and the state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Role {
    /// No certificate.
    Anyone,
    /// An administrator of this trust domain.
    Admin(String),
    /// An admitted node, by the generation in its certificate.
    Node(NodeId, Generation),
    /// A replica of this cell.
    Replica(u64),
    /// A replica of an active peer.
    Peer(TrustDomain),
}

/// The caller that a method sees: a request extension.
#[derive(Clone, Debug)]
pub struct Actor {
    /// What it is.
    pub role: Role,
    /// SHA-256 of its identity: the namespace of its request ids.
    pub client: [u8; 32],
    /// Its identity as text, for the record.
    pub name: String,
    /// Where it calls from.
    pub remote: IpAddr,
    /// When its certificate ends: a stream must not outlive it. None for a caller without one.
    pub until: Option<Stamp>,
}

/// Kinds of caller a method admits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    /// Without a certificate too.
    Anyone,
    /// Administrators.
    Admin,
    /// Administrators, and replicas of the cell on their behalf.
    AdminOrReplica,
    /// Nodes.
    Node,
    /// Replicas of this cell.
    Replica,
    /// Replicas of active peers.
    Peer,
}

/// The table. A method that is not in it is refused to everybody.
pub const METHODS: &[(&str, Who)] = &[
    ("/ambit.v1.NodeAttestation/Begin", Who::Anyone),
    ("/ambit.v1.NodeAttestation/Evidence", Who::Anyone),
    ("/ambit.v1.NodeAttestation/CreateJoinToken", Who::Admin),
    ("/ambit.v1.NodeAttestation/AllowEk", Who::Admin),
    ("/ambit.v1.NodeAttestation/ListNodes", Who::Admin),
    ("/ambit.v1.NodeAttestation/ExplainNode", Who::Admin),
    ("/ambit.v1.NodeAttestation/BanNode", Who::Admin),
    ("/ambit.v1.NodeAttestation/EvictNode", Who::Admin),
    ("/ambit.v1.NodeAttestation/UnbanNode", Who::Admin),
    ("/ambit.v1.NodeAttestation/QuarantineNode", Who::Admin),
    ("/ambit.v1.NodeAttestation/ReleaseNode", Who::Admin),
    ("/ambit.v1.NodeAttestation/AttestationAt", Who::Admin),
    ("/ambit.v1.NodeAttestation/AttestationResult", Who::Admin),
    ("/ambit.v1.NodeAttestation/PutEkRoots", Who::Admin),
    ("/ambit.v1.NodeAttestation/DisallowEk", Who::Admin),
    ("/ambit.v1.NodeAttestation/PutEkDeny", Who::Admin),
    ("/ambit.v1.NodeAttestation/ListEndorsements", Who::Admin),
    ("/ambit.v1.Appraisal/ApplyAppraisalPolicy", Who::Admin),
    ("/ambit.v1.Appraisal/DeleteAppraisalPolicy", Who::Admin),
    ("/ambit.v1.Appraisal/ListAppraisalPolicies", Who::Admin),
    ("/ambit.v1.Appraisal/PromoteAppraisalPolicy", Who::Admin),
    ("/ambit.v1.Appraisal/TestAppraisalPolicy", Who::Admin),
    ("/ambit.v1.Appraisal/LearnAppraisalPolicy", Who::Admin),
    ("/ambit.v1.Appraisal/PutBlob", Who::AdminOrReplica),
    ("/ambit.v1.Appraisal/GetBlob", Who::AdminOrReplica),
    ("/ambit.v1.ClusterRegistry/RegisterCluster", Who::Admin),
    ("/ambit.v1.ClusterRegistry/ListClusters", Who::AdminOrReplica),
    ("/ambit.v1.ClusterRegistry/CreateClusterToken", Who::Admin),
    ("/ambit.v1.ClusterRegistry/RegisterPeer", Who::Admin),
    ("/ambit.v1.ClusterRegistry/ApprovePeer", Who::Admin),
    ("/ambit.v1.ClusterRegistry/ListPeers", Who::AdminOrReplica),
    ("/ambit.v1.ClusterRegistry/SuspendPeer", Who::Admin),
    ("/ambit.v1.ClusterRegistry/RemovePeer", Who::Admin),
    ("/ambit.v1.PeerLink/Hello", Who::Anyone),
    ("/ambit.v1.PeerLink/Prove", Who::Anyone),
    ("/ambit.v1.PeerLink/Pull", Who::Peer),
    ("/ambit.v1.EntryRegistry/BatchCreateEntry", Who::Admin),
    ("/ambit.v1.EntryRegistry/BatchUpdateEntry", Who::Admin),
    ("/ambit.v1.EntryRegistry/BatchDeleteEntry", Who::Admin),
    ("/ambit.v1.EntryRegistry/ListEntries", Who::Admin),
    ("/ambit.v1.EntryRegistry/GetEntry", Who::Admin),
    ("/ambit.v1.Svid/BatchNewX509SVID", Who::Node),
    ("/ambit.v1.Svid/NewJWTSVID", Who::Node),
    ("/ambit.v1.Svid/MintX509SVID", Who::Admin),
    ("/ambit.v1.Svid/NewIntermediateCA", Who::Admin),
    ("/ambit.v1.Svid/RenewAdmin", Who::Admin),
    ("/ambit.v1.Svid/ListIssued", Who::Admin),
    ("/ambit.v1.BundleRegistry/GetBundle", Who::Admin),
    ("/ambit.v1.BundleRegistry/ListBundles", Who::Admin),
    ("/ambit.v1.LocalAuthority/GetX509AuthorityState", Who::AdminOrReplica),
    ("/ambit.v1.LocalAuthority/PrepareX509Authority", Who::Admin),
    ("/ambit.v1.LocalAuthority/ActivateX509Authority", Who::Admin),
    ("/ambit.v1.LocalAuthority/TaintX509Authority", Who::Admin),
    ("/ambit.v1.LocalAuthority/RevokeX509Authority", Who::Admin),
    ("/ambit.v1.TrustDomainRegistry/ListFederationRelationships", Who::Admin),
    ("/ambit.v1.TrustDomainRegistry/CreateFederationGroup", Who::Admin),
    ("/ambit.v1.PolicyRegistry/Apply", Who::Admin),
    ("/ambit.v1.PolicyRegistry/Delete", Who::Admin),
    ("/ambit.v1.PolicyRegistry/List", Who::Admin),
    ("/ambit.v1.PolicyRegistry/Explain", Who::Admin),
    ("/ambit.v1.PolicyRegistry/Status", Who::AdminOrReplica),
    ("/ambit.v1.Watch/Watch", Who::Admin),
    ("/ambit.v1.AgentStream/Sync", Who::Node),
    ("/ambit.v1.Membership/Status", Who::AdminOrReplica),
    ("/ambit.v1.Membership/CreateReplicaToken", Who::Admin),
    ("/ambit.v1.Membership/ReplicaJoin", Who::Anyone),
    ("/ambit.v1.Membership/Promote", Who::AdminOrReplica),
    ("/ambit.v1.Membership/TransferLeader", Who::Admin),
    ("/ambit.v1.Membership/RemoveVoter", Who::Admin),
    ("/ambit.v1.Membership/Snapshot", Who::Admin),
    ("/ambit.v1.Membership/Backup", Who::Admin),
    ("/ambit.v1.Membership/RenewAuthority", Who::Replica),
    ("/ambit.v1.Raft/Exchange", Who::Replica),
    ("/ambit.v1.Raft/Propose", Who::Replica),
    ("/ambit.v1.Drill/SealReport", Who::Admin),
    ("/ambit.v1.Drill/ListReports", Who::Admin),
    ("/ambit.v1.Drill/RunDrill", Who::Admin),
    ("/ambit.v1.Audit/WatchAudit", Who::Admin),
    ("/ambit.v1.Audit/VerifyChain", Who::Admin),
    ("/grpc.health.v1.Health/Check", Who::Anyone),
    ("/grpc.health.v1.Health/Watch", Who::Anyone),
    ("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", Who::Admin),
];

/// What a certificate makes of its holder, as of `state`, which is asked for only where it matters: a lock on it waits
/// for what is being applied. A verified certificate of no known role gets nothing.
pub fn role_of<S: Deref<Target = State>>(
    svid: Option<&PeerSvid>,
    own: &TrustDomain,
    state: impl FnOnce() -> S,
) -> Result<Role, Refusal> {
    let Some(svid) = svid else { return Ok(Role::Anyone) };
    let id = svid.id();
    let nobody = || Refusal::new(Code::PermissionDenied, "an admin, node, replica or peer", id.as_str());
    let (foreign, replica) = (id.trust_domain() != *own, id.path().strip_prefix("/ambit/replica/"));
    if let Some(name) = id.path().strip_prefix("/ambit/admin/").filter(|_| !foreign) {
        return Ok(Role::Admin(name.to_owned()));
    }
    let (state, replica) = (state(), replica.and_then(|n| n.parse().ok()));
    if foreign {
        let active = state.peer(&id.trust_domain()).is_some_and(|p| p.state == PeerState::Active);
        return if active && replica.is_some() { Ok(Role::Peer(id.trust_domain())) } else { Err(nobody()) };
    }
    if let Some(n) = replica {
        // A removed replica keeps its certificate and loses its role; one that joins knows nobody before its first entry.
        let member = state.member(n).is_some() && speaks_for(&state, svid, n);
        return if member || state.cell().is_none() { Ok(Role::Replica(n)) } else { Err(nobody()) };
    }
    let (Some(node), Some(binding)) = (id.path().strip_prefix("/ambit/node/"), svid.binding()) else {
        return Err(nobody());
    };
    let node: NodeId = node.parse()?;
    let row = state.node(&node).ok_or_else(|| Refusal::new(Code::NodeUnknown, "an enrolled node", node.to_string()))?;
    if binding.node != node {
        return Err(Refusal::new(Code::NodeUntrusted, "a certificate of this node", binding.node.to_string()));
    }
    if let Some(code) = row.state.bars_trust() {
        return Err(Refusal::new(code, "an admitted node", row.state.as_str()));
    }
    // A node that was put out and let in again starts anew: what was certified before stays refused.
    if state.denied(&node).is_some_and(|denied| binding.generation <= denied) {
        let expected = format!("generation {}", row.generation);
        return Err(Refusal::new(Code::NodeUntrusted, expected, binding.generation.to_string()));
    }
    Ok(Role::Node(node, binding.generation))
}

/// Whether the replica's leaf is under an intermediate of its own that is not revoked.
fn speaks_for(state: &State, svid: &PeerSvid, replica: u64) -> bool {
    state.authority(svid.authority()).is_some_and(|row| row.replica == replica && row.state != AuthorityState::Revoked)
}

/// Whether a replica whose intermediate this one has not heard of yet may speak of Raft with it: the root named it in this
/// epoch, and it is a member. Else a replica that was away while another renewed could never catch up: the entry that
/// tells of the renewal comes from that very replica.
fn renewed_unheard<S: Deref<Target = State>>(
    svid: &PeerSvid,
    own: &TrustDomain,
    state: impl FnOnce() -> S,
) -> Option<Role> {
    let named = svid.issuer().filter(|_| svid.id().trust_domain() == *own)?;
    let replica: u64 = svid.id().path().strip_prefix("/ambit/replica/")?.parse().ok()?;
    let state = state();
    let epoch = state.cell().map(|cell| cell.epoch)?;
    let unheard = state.authority(svid.authority()).is_none();
    let is = unheard && named == Named { replica, epoch } && state.member(replica).is_some();
    is.then_some(Role::Replica(replica))
}

fn admits(who: Who, role: &Role) -> bool {
    match who {
        Who::Anyone => true,
        Who::Admin => matches!(role, Role::Admin(_)),
        Who::AdminOrReplica => matches!(role, Role::Admin(_) | Role::Replica(_)),
        Who::Node => matches!(role, Role::Node(..)),
        Who::Replica => matches!(role, Role::Replica(_)),
        Who::Peer => matches!(role, Role::Peer(_)),
    }
}

/// Decides one call.
pub fn authorise<S: Deref<Target = State>>(
    path: &str,
    caller: Option<&Caller>,
    own: &TrustDomain,
    state: impl Fn() -> S,
    now: Stamp,
) -> Result<Actor, Refusal> {
    let caller = caller.ok_or_else(|| Refusal::new(Code::Internal, "a connection with a known caller", "none"))?;
    let who = METHODS.iter().find(|(method, _)| *method == path).map(|(_, who)| *who);
    let Some(who) = who else {
        return Err(Refusal::new(Code::Unimplemented, "a method of this server", path));
    };
    // The handshake was at some time in the past; the certificate must hold now.
    if caller.svid.as_ref().is_some_and(|svid| svid.not_after() < now) {
        return Err(Refusal::new(
            Code::Unauthenticated,
            "a certificate in time",
            "one that ended: connect with a new one",
        ));
    }
    let role = match role_of(caller.svid.as_ref(), own, &state) {
        Err(refusal) if refusal.code == Code::PermissionDenied && path.starts_with("/ambit.v1.Raft/") => {
            caller.svid.as_ref().and_then(|svid| renewed_unheard(svid, own, &state)).ok_or(refusal)?
        }
        role => role?,
    };
    if !admits(who, &role) {
        let code = if role == Role::Anyone { Code::Unauthenticated } else { Code::PermissionDenied };
        return Err(Refusal::new(code, format!("{who:?} for {path}"), format!("{role:?}")));
    }
    let name = caller.svid.as_ref().map_or_else(|| format!("anonymous {}", caller.remote.ip()), |s| s.id().to_string());
    Ok(Actor {
        role,
        client: Sha256::digest(&name).into(),
        name,
        remote: caller.remote.ip(),
        until: caller.svid.as_ref().map(PeerSvid::not_after),
    })
}

/// The actor of a request; set by the layer for every request that reached a method.
pub fn actor<T>(request: &tonic::Request<T>) -> Result<Actor, tonic::Status> {
    request
        .extensions()
        .get::<Actor>()
        .cloned()
        .ok_or_else(|| to_status(&Refusal::new(Code::Internal, "an authorised request", "a raw one")))
}

/// Puts [`authorise`] in front of every service.
#[derive(Clone)]
pub struct AuthoriseLayer {
    replica: crate::replica::Replica,
}

impl AuthoriseLayer {
    /// Decides by this replica's applied state.
    pub fn new(replica: crate::replica::Replica) -> Self {
        Self { replica }
    }
}

impl<S> Layer<S> for AuthoriseLayer {
    type Service = Authorising<S>;
    fn layer(&self, inner: S) -> Authorising<S> {
        Authorising { inner, replica: self.replica.clone() }
    }
}

/// See [`AuthoriseLayer`].
#[derive(Clone)]
pub struct Authorising<S> {
    inner: S,
    replica: crate::replica::Replica,
}

impl<S> Service<http::Request<Body>> for Authorising<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>>,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = S::Error;
    type Future = futures::future::Either<futures::future::Ready<Result<Self::Response, Self::Error>>, S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: http::Request<Body>) -> Self::Future {
        let decided = {
            let caller = request.extensions().get::<Caller>();
            let own = self.replica.trust_domain();
            authorise(request.uri().path(), caller, own, || self.replica.cell().state(), wall_clock())
        };
        match decided {
            Ok(actor) => {
                request.extensions_mut().insert(actor);
                futures::future::Either::Right(self.inner.call(request))
            }
            Err(refusal) => {
                tracing::debug!(path = request.uri().path(), code = %refusal.code, "call refused");
                let status: tonic::Status = to_status(&refusal);
                futures::future::Either::Left(futures::future::ready(Ok(status.into_http())))
            }
        }
    }
}
