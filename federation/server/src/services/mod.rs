//! gRPC services: messages in, commands proposed, messages out. No decision is taken here that the state does not take.

mod admin;
mod agent;
mod appraisal;
mod approvers;
mod audit;
mod cluster;
mod connection;
mod drill;
mod egress;
mod entry;
mod flows;
mod local_authority;
mod logs;
mod membership;
mod node;
mod peer_link;
mod plan;
mod policy;
mod relationship;
mod revocation;
mod rounds;
mod standby;
mod svid;
mod traffic;
mod unbuilt;
mod unmeshed;
mod watch;
mod who;

pub(crate) use membership::REPLICA_MAX;
pub(crate) use svid::one_leaf;

use crate::authorise::AuthoriseLayer;
use crate::replica::Replica;
use ambit_model::{Code, Refusal};
use ambit_proto::status::to_status;
use ambit_proto::v1;
use std::time::Duration;
use tonic::transport::server::Router;

/// Requests are small; only evidence is streamed, in chunks below this.
const MESSAGE_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Streams and calls at once on one connection.
const STREAMS_MAX: u32 = 1_024;

/// A client of which nothing was heard for this long is pinged: its process may hang. Above the longest interval between
/// two rounds of an agent, which so are all that is needed there; a machine that is gone is noticed by the kernel.
const PING_AFTER: Duration = Duration::from_secs(61);
const PING_TIMEOUT: Duration = Duration::from_secs(10);

/// All services of a replica behind the authorisation table.
pub fn router(
    replica: &Replica,
) -> Result<Router<tower::layer::util::Stack<AuthoriseLayer, tower::layer::util::Identity>>, Refusal> {
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(ambit_proto::AMBIT_DESCRIPTORS)
        .build_v1()
        .map_err(|e| Refusal::new(Code::Internal, "descriptors", e.to_string()))?;
    let (_, health) = tonic_health::server::health_reporter();
    let raft = {
        let authorise = std::sync::Arc::new(|extensions: &tonic::Extensions| {
            match extensions.get::<crate::authorise::Actor>().map(|a| a.role.clone()) {
                Some(crate::authorise::Role::Replica(n)) => Ok(ambit_model::ReplicaId(n)),
                _ => Err(Refusal::new(Code::PermissionDenied, "a replica of this cell", "another caller")),
            }
        });
        crate::raft::transport::service(replica.cell().clone(), authorise)
    };
    let r = || replica.clone();
    let limit = MESSAGE_BYTES_MAX;
    Ok(tonic::transport::Server::builder()
        .http2_keepalive_interval(Some(PING_AFTER))
        .http2_keepalive_timeout(Some(PING_TIMEOUT))
        .max_concurrent_streams(Some(STREAMS_MAX))
        .layer(AuthoriseLayer::new(replica.clone()))
        .add_service(health)
        .add_service(reflection)
        .add_service(raft)
        .add_service(v1::membership_server::MembershipServer::new(membership::Membership(r())))
        .add_service(v1::cluster_registry_server::ClusterRegistryServer::new(cluster::Clusters(r())))
        .add_service(v1::peer_link_server::PeerLinkServer::new(peer_link::PeerLink(r())))
        .add_service(v1::co_signer_server::CoSignerServer::new(peer_link::CoSigner(r())))
        .add_service(
            v1::node_attestation_server::NodeAttestationServer::new(node::Nodes::new(r()))
                .max_decoding_message_size(limit),
        )
        .add_service(v1::appraisal_server::AppraisalServer::new(appraisal::Appraisals(r())))
        .add_service(v1::entry_registry_server::EntryRegistryServer::new(entry::Entries(r())))
        .add_service(v1::svid_server::SvidServer::new(svid::Svids(r())))
        .add_service(v1::bundle_registry_server::BundleRegistryServer::new(svid::Bundles(r())))
        .add_service(v1::policy_registry_server::PolicyRegistryServer::new(policy::Policies(r())))
        .add_service(v1::agent_stream_server::AgentStreamServer::new(agent::Streams(r())))
        .add_service(v1::watch_server::WatchServer::new(watch::Watches::new(r())))
        .add_service(v1::drill_server::DrillServer::new(drill::Drills(r())))
        .add_service(v1::audit_server::AuditServer::new(audit::Audit(r())))
        .add_service(v1::revocation_server::RevocationServer::new(revocation::Revocations(r())))
        .add_service(v1::administrators_server::AdministratorsServer::new(admin::Administrators(r())))
        .add_service(v1::local_authority_server::LocalAuthorityServer::new(local_authority::Authorities(r())))
        .add_service(v1::trust_domain_registry_server::TrustDomainRegistryServer::new(relationship::TrustDomains(r())))
        .add_service(v1::traffic_server::TrafficServer::new(traffic::Traffic(r()))))
}

/// The caller's request id: 16 bytes, not all zero.
pub(crate) fn request_id(bytes: &[u8]) -> Result<[u8; 16], tonic::Status> {
    match <[u8; 16]>::try_from(bytes) {
        Ok(id) if id != [0; 16] => Ok(id),
        _ => Err(to_status(&Refusal::new(
            Code::BadRequest,
            "a request id of 16 random bytes",
            format!("{} bytes", bytes.len()),
        ))),
    }
}

/// Refusals become statuses at this edge.
pub(crate) trait OrStatus<T> {
    /// `Err(refusal)` as a status that carries it whole.
    fn or_status(self) -> Result<T, tonic::Status>;
}
impl<T> OrStatus<T> for Result<T, Refusal> {
    fn or_status(self) -> Result<T, tonic::Status> {
        self.map_err(|r| to_status(&r))
    }
}

/// A one-time token: what the operator gets, and the SHA-256 that the cell keeps.
pub(crate) fn new_token(prefix: &str) -> Result<(String, [u8; 32]), Refusal> {
    let token = format!("{prefix}-{}", hex::encode(crate::replica::random::<20>()?));
    let sha256 = token_sha256(&token);
    Ok((token, sha256))
}

/// The SHA-256 that the cell keeps of a token.
pub(crate) fn token_sha256(token: &str) -> [u8; 32] {
    use sha2::{Digest, Sha256};
    Sha256::digest(token).into()
}

/// A fingerprint as operators write it.
pub fn parse_fingerprint(text: &str) -> Result<[u8; 32], Refusal> {
    let mut out = [0u8; 32];
    hex::decode_to_slice(text, &mut out)
        .map_err(|_| Refusal::new(Code::BadRequest, "a fingerprint of 64 hexadecimal digits", text))?;
    Ok(out)
}

/// When a token of `ttl_s` seconds (0: an hour; at most a day) ends.
pub(crate) fn token_expiry(replica: &Replica, ttl_s: u32) -> Result<ambit_model::Stamp, Refusal> {
    let ttl = if ttl_s == 0 { 3_600 } else { ttl_s };
    if ttl > 86_400 {
        return Err(Refusal::new(Code::BadRequest, "a token that lives at most 86400 seconds", ttl.to_string()));
    }
    Ok(replica.now().plus_ms(u64::from(ttl) * 1_000))
}
