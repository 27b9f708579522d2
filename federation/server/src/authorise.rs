//! Who may call what: one static table, deny by default. Raw requests stop here, and every refusal is kept.

mod refused;
mod table;
mod trailers;

pub use refused::{LeftOut, RefusalKey, RefusalRow, Refusals, Standing};
pub use table::{METHODS, Who};

use crate::replica::wall_clock;
use ambit_identity::{Named, NodeBinding, PeerSvid};
use ambit_model::refusal::Class;
use ambit_model::{AdminRole, ClusterId, Code, Generation, NodeId, Refusal, Stamp, TrustDomain};
use ambit_proto::status::to_status;
use ambit_state::State;
use ambit_state::objects::PeerState;
use ambit_transport::Caller;
use futures::future::BoxFuture;
use sha2::{Digest, Sha256};
use std::collections::BTreeSet;
use std::net::IpAddr;
use std::ops::Deref;
use std::task::{Context, Poll};
use table::Admitted;
use tonic::body::Body;
use tower::{Layer, Service};

/// What a caller was found to be, from its verified certificate and the state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Role {
    /// No certificate.
    Anyone,
    /// An administrator of this trust domain: the name in the certificate, or the SPIFFE ID of an entry that is marked
    /// `admin`, and the roles that the cell agreed on.
    Admin(String, BTreeSet<AdminRole>),
    /// An admitted node, by the generation in its certificate.
    Node(NodeId, Generation),
    /// A replica of this cell.
    Replica(u64),
    /// A replica of an active peer.
    Peer(TrustDomain),
    /// The issuer of a cluster: who shows an SVID of an entry that is marked `downstream`.
    Downstream(Issuer),
}

/// The SVID that makes somebody a cluster's issuer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Issuer {
    /// Through which node it was issued.
    pub node: NodeId,
    /// Which of the node's admissions.
    pub generation: Generation,
    /// Of the SVID, by which the cell finds its entry.
    pub serial: [u8; 16],
}

/// How far a call may reach.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reach {
    /// The whole cell.
    Whole,
    /// What is of these clusters.
    Clusters(BTreeSet<ClusterId>),
}

impl Reach {
    /// Whether what is of this cluster is within it.
    pub fn has(&self, cluster: &ClusterId) -> bool {
        match self {
            Self::Whole => true,
            Self::Clusters(clusters) => clusters.contains(cluster),
        }
    }
    /// What is not within it is refused.
    pub fn check(&self, cluster: &ClusterId) -> Result<(), Refusal> {
        if self.has(cluster) {
            return Ok(());
        }
        let found = format!("cluster {cluster}");
        Err(Refusal::new(Code::PermissionDenied, "what is of the clusters that the caller administers", found))
    }
}

/// Who proposes. What it may reach goes along, and the state machine holds the command to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Client {
    /// SHA-256 of its identity: the namespace of its request ids.
    pub id: [u8; 32],
    /// How far its commands may reach.
    pub reach: Reach,
}

/// The cell's own doing, or a stranger's that has its own proof in the command.
impl From<[u8; 32]> for Client {
    fn from(id: [u8; 32]) -> Self {
        Self { id, reach: Reach::Whole }
    }
}

/// The caller that a method sees: a request extension.
#[derive(Clone, Debug)]
pub struct Actor {
    /// What it is.
    pub role: Role,
    /// As whom it proposes, and how far that may reach.
    pub client: Client,
    /// Its identity as text, for the record.
    pub name: String,
    /// Where it calls from.
    pub remote: IpAddr,
    /// When its certificate ends: a stream must not outlive it. None for a caller without one.
    pub until: Option<Stamp>,
    /// Its certificate, which may be revoked while a stream goes on. None for a caller without one.
    pub svid: Option<PeerSvid>,
}

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
    let (state, replica) = (state(), replica.and_then(|n| n.parse().ok()));
    if is_denied(&state, svid) {
        let found = format!("serial {} of {id}", hex::encode(svid.serial()));
        return Err(Refusal::new(Code::SvidRevoked, "an SVID that was not revoked", found));
    }
    if let Some(name) = id.path().strip_prefix("/ambit/admin/").filter(|_| !foreign) {
        let roles = state.admin_roles(name);
        if roles.is_empty() {
            let expected = "an administrator with a role (ambit admin grant)";
            return Err(Refusal::new(Code::PermissionDenied, expected, format!("{id}, who has none")));
        }
        return Ok(Role::Admin(name.to_owned(), roles));
    }
    if foreign {
        let active = state.peer(&id.trust_domain()).is_some_and(|p| p.state == PeerState::Active);
        return if active && replica.is_some() { Ok(Role::Peer(id.trust_domain())) } else { Err(nobody()) };
    }
    if let Some(n) = replica {
        // A removed replica keeps its certificate and loses its role; one that joins knows nobody before its first entry.
        let member = state.member(n).is_some() && state.speaks_for(svid.authority(), n);
        return if member || state.cell().is_none() { Ok(Role::Replica(n)) } else { Err(nobody()) };
    }
    let Some(binding) = svid.binding() else { return Err(nobody()) };
    let Some(node) = id.path().strip_prefix("/ambit/node/") else {
        return role_of_entry(svid, binding, &state).ok_or_else(nobody);
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

/// Whether an SVID that was verified some time ago is refused by now: by itself, by its identity, or by any authority that
/// it showed above it. Who stole the key of one high up signs with one that nobody knows the name of.
pub fn is_denied(state: &State, svid: &PeerSvid) -> bool {
    let origin = svid.id().trust_domain();
    state.svid_denied(svid.id(), svid.authority(), svid.serial())
        || svid.above().iter().any(|name| state.authority_denied(&origin, name))
}

/// What the entry of a workload's SVID makes of it, as things stand: nothing, for nearly all of them. The entry is found by
/// the record of the SVID, so that one that was minted, or that another entry gives to the same identity, is nobody's.
fn role_of_entry(svid: &PeerSvid, binding: NodeBinding, state: &State) -> Option<Role> {
    let (node, generation) = (binding.node, binding.generation);
    let entry = &state.entry_of_svid(svid.authority(), svid.serial(), (node, generation))?.entry;
    // An entry that was written before it had to name nodes gives nothing.
    if *svid.id() != entry.spiffe_id || entry.check_privileged().is_err() {
        return None;
    }
    if entry.extras.admin {
        let roles = state.id_admin_roles(svid.id());
        return (!roles.is_empty()).then(|| Role::Admin(svid.id().to_string(), roles));
    }
    let serial = svid.serial().try_into().ok()?;
    entry.extras.downstream.then_some(Role::Downstream(Issuer { node, generation, serial }))
}

/// Whether a replica whose intermediate this one has not heard of yet may speak of Raft with it: the root named it in this
/// epoch, and it is a member. Else a replica that was away while another renewed could never catch up: the entry that
/// tells of the renewal comes from that very replica. Whoever had its number before is heard of by all who know that it
/// has it: what the root signs was committed, before its removal was.
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
    // Another state than the role was refused by: something may have been denied in between.
    let stands = state.member(replica).is_some() && !is_denied(&state, svid);
    let is = unheard && stands && named == Named { replica, epoch };
    is.then_some(Role::Replica(replica))
}

/// How far a call of a method reaches that admits its caller so.
fn reach(role: &Role, admitted: Admitted) -> Reach {
    match (admitted, role) {
        (Admitted::Within, Role::Admin(_, roles)) => {
            let clusters = roles.iter().filter_map(|role| match role {
                AdminRole::ClusterAdmin(cluster) => Some(cluster.clone()),
                AdminRole::FederationAdmin | AdminRole::Operator | AdminRole::Auditor => None,
            });
            Reach::Clusters(clusters.collect())
        }
        // What is not an administrator's is decided by the method itself: a node speaks for itself, and so on.
        (Admitted::Yes, _) => Reach::Whole,
        (Admitted::Within | Admitted::No, _) => Reach::Clusters(BTreeSet::new()),
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
    let admitted = who.admits(&role);
    if admitted == Admitted::No {
        let code = if role == Role::Anyone { Code::Unauthenticated } else { Code::PermissionDenied };
        return Err(Refusal::new(code, format!("{who:?} for {path}"), format!("{role:?}")));
    }
    let name = name_of(caller);
    let client = Client { id: Sha256::digest(&name).into(), reach: reach(&role, admitted) };
    Ok(Actor {
        role,
        client,
        name,
        remote: caller.remote.ip(),
        until: caller.svid.as_ref().map(PeerSvid::not_after),
        svid: caller.svid.clone(),
    })
}

/// The caller as text: its identity, or where it calls from.
fn name_of(caller: &Caller) -> String {
    caller.svid.as_ref().map_or_else(|| format!("anonymous {}", caller.remote.ip()), |s| s.id().to_string())
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
    type Future = BoxFuture<'static, Result<Self::Response, S::Error>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: http::Request<Body>) -> Self::Future {
        let caller = request.extensions().get::<Caller>().cloned();
        let (path, replica) = (request.uri().path().to_owned(), self.replica.clone());
        let decided =
            authorise(&path, caller.as_ref(), replica.trust_domain(), || replica.cell().state(), wall_clock());
        match decided {
            Ok(actor) => {
                request.extensions_mut().insert(actor);
                let inner = self.inner.call(request);
                Box::pin(async move {
                    let response = inner.await?;
                    // What a method itself refuses at once: its code stands in the head of an answer without a body.
                    let code = response.headers().get("ambit-code").and_then(|code| code.to_str().ok());
                    match code.and_then(Code::from_text) {
                        Some(code) => {
                            note(&replica, caller.as_ref(), &path, code);
                            Ok(response)
                        }
                        // A stream that was begun may end so still.
                        None => Ok(response.map(|body| {
                            trailers::watched(body, move |code| note(&replica, caller.as_ref(), &path, code))
                        })),
                    }
                })
            }
            Err(refusal) => {
                note(&replica, caller.as_ref(), &path, refusal.code);
                let status: tonic::Status = to_status(&refusal);
                Box::pin(futures::future::ready(Ok(status.into_http())))
            }
        }
    }
}

/// Whether it is about who asked, or whose word there was; what was wrong or came too early is no refusal of a caller.
fn audited(code: Code) -> bool {
    matches!(code.class(), Class::Denied | Class::Unauthenticated)
        || matches!(code, Code::ApprovalMissing | Code::NeedsSecondApprover | Code::LastAdmin)
}

/// Keeps what was refused to a caller.
fn note(replica: &crate::replica::Replica, caller: Option<&Caller>, path: &str, code: Code) {
    if !audited(code) {
        return;
    }
    let name = caller.map_or_else(|| "unknown".to_owned(), name_of);
    let standing = match caller.and_then(|caller| caller.svid.as_ref()) {
        None => Standing::Stranger,
        Some(svid) => match role_of(Some(svid), replica.trust_domain(), || replica.cell().state()) {
            Ok(_) => Standing::Role,
            Err(_) => Standing::NoRole,
        },
    };
    replica.refusals().note(&name, standing, path, code, wall_clock().0);
}
