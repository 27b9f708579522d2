//! Relationships with foreign trust domains that are no cells.

use super::unbuilt::unbuilt;
use super::{OrStatus, parse_fingerprint, request_id};
use crate::authorise::actor;
use crate::replica::{Replica, federate};
use ambit_model::{Act, Code, Refusal, SpiffeId, TrustDomain};
use ambit_proto::{convert, v1};
use ambit_state::objects::{EndpointProfile, RelationshipRow};
use ambit_state::{Command, State};
use tonic::{Request, Response, Status};

pub(crate) struct TrustDomains(pub(crate) Replica);

#[tonic::async_trait]
impl v1::trust_domain_registry_server::TrustDomainRegistry for TrustDomains {
    async fn list_federation_relationships(
        &self,
        _: Request<v1::ListFederationRelationshipsRequest>,
    ) -> Result<Response<v1::ListFederationRelationshipsResponse>, Status> {
        let read = |s: &State| s.relationships().map(|(td, row)| message(s, td, row)).collect();
        let relationships = self.0.read(read).await.or_status()?;
        Ok(Response::new(v1::ListFederationRelationshipsResponse { relationships }))
    }

    async fn create_federation_group(&self, _: Request<v1::Unbuilt>) -> Result<Response<v1::Unbuilt>, Status> {
        unbuilt("TrustDomainRegistry.CreateFederationGroup (issue F)")
    }

    async fn put_federation_relationship(
        &self,
        request: Request<v1::FederationRelationship>,
    ) -> Result<Response<v1::FederationRelationship>, Status> {
        let actor = actor(&request)?;
        let m = request.into_inner();
        let id = request_id(&m.request_id)?;
        let td: TrustDomain = m.trust_domain.parse().or_status()?;
        let profile = profile(&m, &td).or_status()?;
        federate::Place::parse(&m.url).or_status()?;
        for der in &m.roots_der {
            ambit_identity::profile::certificate(der).or_status()?;
        }
        let command = Command::PutRelationship(td.clone(), m.url, profile, m.roots_der, actor.name);
        self.0.propose(actor.client, id, command).await.or_status()?.outcome.or_status()?;
        self.one(&td).or_status()
    }

    async fn delete_federation_relationship(
        &self,
        request: Request<v1::DeleteFederationRelationshipRequest>,
    ) -> Result<Response<v1::FederationRelationship>, Status> {
        let (actor, m) = (actor(&request)?, request.into_inner());
        let id = request_id(&m.request_id)?;
        let td: TrustDomain = m.trust_domain.parse().or_status()?;
        let before = self.one(&td);
        let approved = convert::approved(m.approved).or_status()?;
        let command = Command::Act { act: Act::RemoveTrustDomain(td), approved, by: actor.name };
        self.0.propose(actor.client, id, command).await.or_status()?.outcome.or_status()?;
        before.or_status()
    }

    async fn refresh_bundle(
        &self,
        request: Request<v1::FederationRelationshipRef>,
    ) -> Result<Response<v1::FederationRelationship>, Status> {
        let m = request.into_inner();
        let td: TrustDomain = m.trust_domain.parse().or_status()?;
        if let Some(channel) = self.0.leader_channel().await.or_status()? {
            let mut leader = v1::trust_domain_registry_client::TrustDomainRegistryClient::new(channel);
            return leader.refresh_bundle(m).await;
        }
        self.0.cell().read_barrier().await.or_status()?;
        federate::refresh(&self.0, &td).await.or_status()?;
        self.one(&td).or_status()
    }

    async fn confirm_bundle(
        &self,
        request: Request<v1::ConfirmBundleRequest>,
    ) -> Result<Response<v1::FederationRelationship>, Status> {
        let (actor, m) = (actor(&request)?, request.into_inner());
        let id = request_id(&m.request_id)?;
        let td: TrustDomain = m.trust_domain.parse().or_status()?;
        let command = Command::ConfirmBundle(td.clone(), parse_fingerprint(&m.sha256).or_status()?);
        self.0.propose(actor.client, id, command).await.or_status()?.outcome.or_status()?;
        self.one(&td).or_status()
    }
}

impl TrustDomains {
    fn one(&self, td: &TrustDomain) -> Result<Response<v1::FederationRelationship>, Refusal> {
        let found = self.0.local(|s| s.relationships().find(|(of, _)| *of == td).map(|(td, row)| message(s, td, row)));
        found.map(Response::new).ok_or_else(|| Refusal::new(Code::NotFound, "a federation relationship", td.as_str()))
    }
}

/// Trust domain, URL, profile and endpoint identity are each said; none follows from another.
fn profile(m: &v1::FederationRelationship, td: &TrustDomain) -> Result<EndpointProfile, Refusal> {
    let bad = |expected: &str, found: &str| Refusal::new(Code::BadRequest, expected, found);
    match (m.profile.as_str(), m.endpoint_spiffe_id.as_str()) {
        ("https_web", "") => Ok(EndpointProfile::HttpsWeb),
        ("https_web", id) => Err(bad("no endpoint SPIFFE ID with https_web", id)),
        ("https_spiffe", "") => Err(bad("an endpoint SPIFFE ID with https_spiffe", "none")),
        ("https_spiffe", id) => {
            let id: SpiffeId = id.parse()?;
            // The bundle that verifies it is the one that is fetched; that of a third trust domain is another relationship.
            if id.trust_domain() != *td {
                return Err(bad(&format!("an endpoint of {td}"), id.as_str()));
            }
            Ok(EndpointProfile::HttpsSpiffe(id))
        }
        (other, _) => Err(bad("profile https_web or https_spiffe", other)),
    }
}

fn message(s: &State, td: &TrustDomain, row: &RelationshipRow) -> v1::FederationRelationship {
    let (profile, endpoint_spiffe_id) = match &row.profile {
        EndpointProfile::HttpsWeb => ("https_web", String::new()),
        EndpointProfile::HttpsSpiffe(id) => ("https_spiffe", id.to_string()),
    };
    v1::FederationRelationship {
        request_id: Vec::new(),
        trust_domain: td.to_string(),
        url: row.url.clone(),
        profile: profile.to_owned(),
        endpoint_spiffe_id,
        roots_der: row.roots.clone(),
        sequence: row.sequence.unwrap_or_default(),
        sha256: if row.taken.0 == 0 { String::new() } else { hex::encode(row.sha256) },
        refresh_hint_s: row.refresh_hint_s,
        taken_ms: row.taken.0,
        trouble: row.trouble.clone(),
        held_sha256: row.held.map(|(_, sha256)| hex::encode(sha256)).unwrap_or_default(),
        written_by: row.written_by.clone(),
        jwt_authorities: s.peer_jwt(td).iter().map(Into::into).collect(),
    }
}
