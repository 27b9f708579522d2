//! SVIDs and bundles. Commit first, then sign; the CSR carries a key and nothing else.

use super::unbuilt::unbuilt;
use super::{OrStatus, request_id};
use crate::authorise::{Role, actor};
use crate::replica::Replica;
use ambit_identity::{Csr, issue};
use ambit_model::{Code, Refusal};
use ambit_proto::v1;
use ambit_state::Command;
use ambit_state::command::LeafRequest;
use sha2::{Digest as _, Sha256};
use tonic::{Request, Response, Status};

/// Leaves in one request: more than a node has workloads.
const BATCH_MAX: usize = 256;
const LIST_MAX: usize = 10_000;

pub(crate) struct Svids(pub(crate) Replica);

#[tonic::async_trait]
impl v1::svid_server::Svid for Svids {
    async fn batch_new_x509svid(
        &self,
        request: Request<v1::BatchNewX509svidRequest>,
    ) -> Result<Response<v1::BatchNewX509svidResponse>, Status> {
        let actor = actor(&request)?;
        let Role::Node(node, generation) = actor.role else {
            return Err(Refusal::new(Code::PermissionDenied, "a node", actor.name)).or_status();
        };
        let m = request.into_inner();
        let id = request_id(&m.request_id)?;
        if m.items.is_empty() || m.items.len() > BATCH_MAX {
            return Err(Refusal::new(Code::BadRequest, format!("1-{BATCH_MAX} items"), m.items.len().to_string()))
                .or_status();
        }
        let mut csrs = Vec::with_capacity(m.items.len());
        let mut leaves = Vec::with_capacity(m.items.len());
        for item in &m.items {
            let csr = Csr::parse(&item.csr).or_status()?;
            leaves.push(LeafRequest { entry: item.entry_id.parse().or_status()?, key_hash: csr.spki_sha256() });
            csrs.push(csr);
        }
        let authority = self.0.issuer().authority().to_owned();
        let id = signed_here(id, &authority);
        let command = Command::Issue { node, generation, authority, leaves };
        let applied = self.0.propose(actor.client, id, command).await.or_status()?;
        let issuances = applied.into_issuances().or_status()?;
        let results = m
            .items
            .into_iter()
            .zip(issuances.into_iter().zip(csrs))
            .map(|(item, (committed, csr))| self.leaf(item.entry_id, committed, &csr))
            .collect();
        Ok(Response::new(v1::BatchNewX509svidResponse { results }))
    }

    async fn new_jwtsvid(&self, _: Request<v1::Unbuilt>) -> Result<Response<v1::Unbuilt>, Status> {
        unbuilt("Svid.NewJWTSVID (issue D)")
    }
    async fn mint_x509svid(&self, _: Request<v1::Unbuilt>) -> Result<Response<v1::Unbuilt>, Status> {
        unbuilt("Svid.MintX509SVID (issue D)")
    }
    async fn new_intermediate_ca(&self, _: Request<v1::Unbuilt>) -> Result<Response<v1::Unbuilt>, Status> {
        unbuilt("Svid.NewIntermediateCA (issue D)")
    }

    async fn renew_admin(
        &self,
        request: Request<v1::RenewAdminRequest>,
    ) -> Result<Response<v1::RenewAdminResponse>, Status> {
        let actor = actor(&request)?;
        let Role::Admin(name) = actor.role else {
            return Err(Refusal::new(Code::PermissionDenied, "an administrator", actor.name)).or_status();
        };
        let m = request.into_inner();
        let csr = Csr::parse(&m.csr).or_status()?;
        let authority = self.0.issuer().authority().to_owned();
        let id = signed_here(request_id(&m.request_id)?, &authority);
        let command = Command::IssueAdmin { name, key_hash: csr.spki_sha256(), authority };
        let applied = self.0.propose(actor.client, id, command).await.or_status()?;
        let mut issuances = applied.into_issuances().or_status()?;
        let committed =
            issuances.pop().unwrap_or_else(|| Err(Refusal::new(Code::Internal, "one leaf", "none"))).or_status()?;
        let not_after_ms = committed.get().lifetime.not_after.0;
        self.0.check_clock().or_status()?;
        let issuer = self.0.issuing(&committed.get().authority).or_status()?;
        let chain = issue(committed, &csr, &issuer).or_status()?;
        let chain_der = chain.iter().map(|c| c.to_vec()).collect();
        Ok(Response::new(v1::RenewAdminResponse { chain_der, not_after_ms }))
    }

    async fn list_issued(
        &self,
        request: Request<v1::ListIssuedRequest>,
    ) -> Result<Response<v1::ListIssuedResponse>, Status> {
        let limit = match request.into_inner().limit as usize {
            0 => LIST_MAX,
            n => n.min(LIST_MAX),
        };
        let issued = self.0.read(|s| s.issued().rev().take(limit).map(issued_message).collect()).await.or_status()?;
        Ok(Response::new(v1::ListIssuedResponse { issued }))
    }
}

/// A leaf committed for one replica can be signed by no other. The same request at another replica is therefore another
/// one: whoever retries there gets a leaf, and what the first replica committed is signed by nobody.
fn signed_here(request: [u8; 16], authority: &str) -> [u8; 16] {
    let mut id = [0u8; 16];
    let digest = Sha256::new().chain_update(request).chain_update(authority).finalize();
    id.iter_mut().zip(digest).for_each(|(to, from)| *to = from);
    id
}

impl Svids {
    fn leaf(
        &self,
        entry_id: String,
        committed: Result<ambit_state::Committed<ambit_state::Issuance>, Refusal>,
        csr: &Csr,
    ) -> v1::X509svidResult {
        let signed = committed.and_then(|c| {
            let not_after_ms = c.get().lifetime.not_after.0;
            self.0.check_clock()?;
            let issuer = self.0.issuing(&c.get().authority)?;
            Ok((issue(c, csr, &issuer)?, not_after_ms))
        });
        match signed {
            Ok((chain, not_after_ms)) => v1::X509svidResult {
                entry_id,
                code: "ok".into(),
                message: String::new(),
                chain_der: chain.iter().map(|c| c.to_vec()).collect(),
                not_after_ms,
            },
            Err(r) => v1::X509svidResult {
                entry_id,
                code: r.code.to_string(),
                message: r.for_node().to_string(),
                chain_der: Vec::new(),
                not_after_ms: 0,
            },
        }
    }
}

fn issued_message(i: &ambit_state::Issuance) -> v1::Issued {
    v1::Issued {
        spiffe_id: i.spiffe_id.to_string(),
        node: i.binding.map(|(n, _)| n.to_string()).unwrap_or_default(),
        generation: i.binding.map(|(_, g)| g.0).unwrap_or_default(),
        serial: hex::encode(i.serial),
        authority: i.authority.clone(),
        not_before_ms: i.lifetime.not_before.0,
        not_after_ms: i.lifetime.not_after.0,
        index: i.index.0,
    }
}

pub(crate) struct Bundles(pub(crate) Replica);

impl Bundles {
    async fn all(&self) -> Result<Vec<v1::Bundle>, Refusal> {
        self.0
            .read(|s| {
                s.bundles()
                    .into_iter()
                    .map(|(td, (sequence, roots_der))| v1::Bundle { trust_domain: td.to_string(), sequence, roots_der })
                    .collect()
            })
            .await
    }
}

#[tonic::async_trait]
impl v1::bundle_registry_server::BundleRegistry for Bundles {
    async fn get_bundle(&self, request: Request<v1::GetBundleRequest>) -> Result<Response<v1::Bundle>, Status> {
        let td = request.into_inner().trust_domain;
        let found = self.all().await.or_status()?.into_iter().find(|b| b.trust_domain == td);
        found
            .map(Response::new)
            .ok_or_else(|| Refusal::new(Code::TrustDomainUnknown, "a trust domain with a bundle here", td))
            .or_status()
    }
    async fn list_bundles(
        &self,
        _: Request<v1::ListBundlesRequest>,
    ) -> Result<Response<v1::ListBundlesResponse>, Status> {
        Ok(Response::new(v1::ListBundlesResponse { bundles: self.all().await.or_status()? }))
    }
}
