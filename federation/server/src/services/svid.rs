//! SVIDs and bundles. Commit first, then sign; the CSR carries a key and nothing else.

use super::{OrStatus, request_id};
use crate::authorise::{Client, Role, actor};
use crate::replica::issuing::Asker;
use crate::replica::{Replica, jwt};
use ambit_identity::{Csr, JwtKey, issue, issue_jwt};
use ambit_model::{Audience, Code, EntryId, JwtAuthority, Refusal, SpiffeId, TrustDomain};
use ambit_proto::convert::{dns_names, jwt_ttl, svid_ttl};
use ambit_proto::status::to_status;
use ambit_proto::v1;
use ambit_state::command::LeafRequest;
use ambit_state::{Applied, Command, JwtIssuance, Subject};
use sha2::{Digest as _, Sha256};
use std::time::Instant;
use tonic::{Request, Response, Status};

/// Leaves in one request: more than a node has workloads.
const BATCH_MAX: usize = 256;
/// Signatures that are verified or made on the thread that serves: they take less than to put another one to work twice.
const AT_ONCE_MAX: usize = 2;
const LIST_MAX: usize = 10_000;
/// A downstream authority lasts so long where nothing else is asked for.
const DOWNSTREAM_MS: u64 = 24 * 3_600_000;

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
        let count = m.items.len();
        // Nothing is committed that would not be signed.
        self.0.may_sign().or_status()?;
        self.within_budget(Asker::Node(node), count)?;
        let asked = self.off_thread(count, move || asked(m.items)).await.and_then(|asked| asked).or_status()?;
        let leaves = asked.iter().map(|one| one.leaf.clone()).collect();
        let authority = self.0.issuer().authority().to_owned();
        let id = signed_here(id, &authority);
        let command = Command::Issue { node, generation, authority, leaves };
        let applied = self.0.propose(actor.client, id, command).await.or_status()?;
        let issuances = applied.into_issuances().or_status()?;
        let signer = Svids(self.0.clone());
        let sign = move || {
            let both = asked.into_iter().zip(issuances);
            both.map(|(one, committed)| signer.leaf(one.leaf.entry.to_string(), committed, &one.csr)).collect()
        };
        let results: Vec<v1::X509svidResult> = self.off_thread(count, sign).await.or_status()?;
        // The call is answered, and yet some of it may be refused.
        for refused in results.iter().filter_map(|one| Code::from_text(&one.code)) {
            self.0.refusals().note_denied(&actor.name, "/ambit.v1.Svid/BatchNewX509SVID", refused);
        }
        Ok(Response::new(v1::BatchNewX509svidResponse { results }))
    }

    async fn new_jwtsvid(
        &self,
        request: Request<v1::NewJwtsvidRequest>,
    ) -> Result<Response<v1::NewJwtsvidResponse>, Status> {
        let actor = actor(&request)?;
        let Role::Node(node, generation) = actor.role else {
            return Err(Refusal::new(Code::PermissionDenied, "a node", actor.name)).or_status();
        };
        let m = request.into_inner();
        let id = request_id(&m.request_id)?;
        let (entry, audience): (EntryId, _) = (m.entry_id.parse().or_status()?, Audience::new(m.audience).or_status()?);
        self.0.may_sign().or_status()?;
        self.within_budget(Asker::Node(node), 1)?;
        let command = |kid, audience_sha256| {
            let entry = entry.clone();
            Command::IssueJwt { node, generation, kid, entry, audience_sha256 }
        };
        let token = self.token(actor.client, id, &audience, command).await;
        token.map(Response::new).map_err(|r| r.for_node()).or_status()
    }

    async fn mint_x509svid(
        &self,
        request: Request<v1::MintX509svidRequest>,
    ) -> Result<Response<v1::MintX509svidResponse>, Status> {
        let (actor, m) = (actor(&request)?, request.into_inner());
        self.within_budget(Asker::Minter(actor.client.id), 1)?;
        let csr = Csr::parse(&m.csr).or_status()?;
        let authority = self.0.issuer().authority().to_owned();
        let id = signed_here(request_id(&m.request_id)?, &authority);
        let command = Command::MintX509 {
            spiffe_id: m.spiffe_id.parse().or_status()?,
            dns_names: dns_names(&m.dns_names).or_status()?,
            ttl: svid_ttl(m.ttl_seconds).or_status()?,
            key_hash: csr.spki_sha256(),
            authority,
            by: actor.name,
        };
        let applied = self.0.propose(actor.client, id, command).await.or_status()?;
        let (chain_der, not_after_ms) = one_leaf(&self.0, applied, &csr).or_status()?;
        Ok(Response::new(v1::MintX509svidResponse { chain_der, not_after_ms }))
    }

    async fn mint_jwtsvid(
        &self,
        request: Request<v1::MintJwtsvidRequest>,
    ) -> Result<Response<v1::NewJwtsvidResponse>, Status> {
        let (actor, m) = (actor(&request)?, request.into_inner());
        self.within_budget(Asker::Minter(actor.client.id), 1)?;
        let id = request_id(&m.request_id)?;
        let audience = Audience::new(m.audience).or_status()?;
        let (minted_for, ttl): (SpiffeId, _) = (m.spiffe_id.parse().or_status()?, jwt_ttl(m.ttl_seconds).or_status()?);
        let command = |kid, audience_sha256| {
            let (spiffe_id, by) = (minted_for.clone(), actor.name.clone());
            Command::MintJwt { spiffe_id, audience_sha256, ttl, kid, by }
        };
        self.token(actor.client, id, &audience, command).await.map(Response::new).or_status()
    }

    async fn new_intermediate_ca(
        &self,
        request: Request<v1::NewIntermediateCaRequest>,
    ) -> Result<Response<v1::NewIntermediateCaResponse>, Status> {
        let actor = actor(&request)?;
        let Role::Downstream(issuer) = actor.role else {
            return Err(Refusal::new(Code::PermissionDenied, "an issuer of a cluster", actor.name)).or_status();
        };
        let m = request.into_inner();
        let id = request_id(&m.request_id)?;
        self.within_budget(Asker::Node(issuer.node), 1)?;
        let csr = Csr::parse(&m.csr).or_status()?;
        let lifetime_ms = match m.lifetime_seconds {
            0 => DOWNSTREAM_MS,
            seconds => u64::from(seconds) * 1_000,
        };
        let signed = self.0.downstream_of(actor.client, id, &issuer, &csr, lifetime_ms).await;
        signed.map(Response::new).map_err(|r| r.for_node()).or_status()
    }

    async fn renew_admin(
        &self,
        request: Request<v1::RenewAdminRequest>,
    ) -> Result<Response<v1::RenewAdminResponse>, Status> {
        let actor = actor(&request)?;
        let Role::Admin(name, _) = actor.role else {
            return Err(Refusal::new(Code::PermissionDenied, "an administrator", actor.name)).or_status();
        };
        self.within_budget(Asker::Admin(actor.client.id), 1)?;
        let m = request.into_inner();
        let csr = Csr::parse(&m.csr).or_status()?;
        let authority = self.0.issuer().authority().to_owned();
        let id = signed_here(request_id(&m.request_id)?, &authority);
        let own = |_| Refusal::new(Code::PermissionDenied, "an administrator below /ambit/admin/", name.as_str());
        let admin = name.parse().map_err(own).or_status()?;
        let command = Command::CertifyAdmin { admin, key_hash: csr.spki_sha256(), authority };
        let applied = self.0.propose(actor.client, id, command).await.or_status()?;
        let (chain_der, not_after_ms) = one_leaf(&self.0, applied, &csr).or_status()?;
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
        let issued = self.0.read(|s| {
            let mut all: Vec<v1::Issued> = s.issued().rev().take(limit).map(issued_message).collect();
            all.extend(s.minted_tokens().rev().take(limit).map(token_message));
            all.sort_by_key(|one| std::cmp::Reverse(one.index));
            all.truncate(limit);
            all
        });
        Ok(Response::new(v1::ListIssuedResponse { issued: issued.await.or_status()? }))
    }
}

/// A leaf committed for one replica can be signed by no other. The same request at another replica is therefore another
/// one: whoever retries there gets a leaf, and what the first replica committed is signed by nobody.
pub(super) fn signed_here(request: [u8; 16], authority: &str) -> [u8; 16] {
    let mut id = [0u8; 16];
    let digest = Sha256::new().chain_update(request).chain_update(authority).finalize();
    id.iter_mut().zip(digest).for_each(|(to, from)| *to = from);
    id
}

/// A leaf asked for, with the key that it is for.
struct Asked {
    leaf: LeafRequest,
    csr: Csr,
}

/// Reads the requests of a batch and verifies their signatures; one that is bad refuses the batch.
fn asked(items: Vec<v1::NewX509svid>) -> Result<Vec<Asked>, Refusal> {
    let read = |item: v1::NewX509svid| {
        let csr = Csr::parse(&item.csr)?;
        Ok(Asked { leaf: LeafRequest { entry: item.entry_id.parse()?, key_hash: csr.spki_sha256() }, csr })
    };
    items.into_iter().map(read).collect()
}

impl Svids {
    /// A batch's signatures take milliseconds: they are made and verified where nothing else waits for the thread. A few
    /// are done at once.
    async fn off_thread<T: Send + 'static>(
        &self,
        count: usize,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Refusal> {
        if count <= AT_ONCE_MAX { Ok(work()) } else { self.0.work().run(work).await }
    }

    /// Before any signature is checked.
    #[allow(clippy::result_large_err, reason = "a status is what the caller answers with")]
    fn within_budget(&self, asker: Asker, count: usize) -> Result<(), Status> {
        self.0.issuance_budgets().take(asker, count, Instant::now()).map_err(|early| {
            let mut status = to_status(&early.refusal);
            // gRPC A6: when a client that retries by itself is to come again.
            let after = early.after.as_millis().saturating_add(1).to_string();
            if let Ok(after) = after.parse() {
                status.metadata_mut().insert("grpc-retry-pushback-ms", after);
            }
            status
        })
    }

    /// Commits and signs a token. The key is every replica's, but a record is signed where it was proposed, or by nobody.
    /// Where another key signs since this replica looked, it looks once more.
    async fn token(
        &self,
        client: Client,
        request: [u8; 16],
        audience: &Audience,
        command: impl Fn(String, [u8; 32]) -> Command,
    ) -> Result<v1::NewJwtsvidResponse, Refusal> {
        let commit = async |key: &JwtKey| {
            let id = signed_here(request, &format!("{} at {}", key.kid(), self.0.id()));
            let command = command(key.kid().to_owned(), audience.sha256());
            self.0.propose(client.clone(), id, command).await?.into_token()
        };
        let mut key = jwt::signer(&self.0).await?;
        let mut committed = commit(&key).await;
        if committed.as_ref().is_err_and(|refusal| refusal.code == Code::AuthorityMismatch) {
            self.0.cell().read_barrier().await?;
            key = jwt::signer(&self.0).await?;
            committed = commit(&key).await;
        }
        let committed = committed?;
        self.0.check_clock()?;
        let (expires_at_ms, spiffe_id) = (committed.get().not_after.0, committed.get().spiffe_id.to_string());
        let token = self.0.sign(|| issue_jwt(committed, audience, self.0.oidc_issuer(), &key))?.to_string();
        Ok(v1::NewJwtsvidResponse { token, expires_at_ms, spiffe_id })
    }

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
            Ok((self.0.sign(|| issue(c, csr, &issuer))?, not_after_ms))
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
        kind: "x509".to_owned(),
        subject: i.subject.text(),
    }
}

fn token_message(i: &JwtIssuance) -> v1::Issued {
    v1::Issued {
        spiffe_id: i.spiffe_id.to_string(),
        serial: hex::encode(i.jti),
        authority: i.kid.clone(),
        not_before_ms: i.stamp.0,
        not_after_ms: i.not_after.0,
        index: i.index.0,
        kind: "jwt".to_owned(),
        subject: i.subject.text(),
        ..v1::Issued::default()
    }
}

pub(crate) struct Bundles(pub(crate) Replica);

impl Bundles {
    async fn all(&self) -> Result<Vec<v1::Bundle>, Refusal> {
        self.0
            .read(|s| {
                let jwt = s.jwt_bundles();
                let own = s.cell().map(|cell| &cell.trust_domain);
                let state = |kid: &str| {
                    let row = s.jwt_authorities().find(|row| row.kid == kid);
                    row.map(|row| row.state.as_str().to_owned()).unwrap_or_default()
                };
                let key = |td: &TrustDomain, key: &JwtAuthority| v1::JwtAuthority {
                    state: if Some(td) == own { state(&key.kid) } else { String::new() },
                    ..key.into()
                };
                let message = |(td, (sequence, roots_der)): (TrustDomain, (u64, Vec<Vec<u8>>))| v1::Bundle {
                    trust_domain: td.to_string(),
                    sequence,
                    roots_der,
                    jwt_authorities: jwt.get(&td).into_iter().flatten().map(|one| key(&td, one)).collect(),
                };
                s.bundles().into_iter().map(message).collect()
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

/// Signs the one leaf that was committed: the chain, and when it ends.
pub(crate) fn one_leaf(replica: &Replica, applied: Applied, csr: &Csr) -> Result<(Vec<Vec<u8>>, u64), Refusal> {
    let one = applied.into_issuances()?.pop();
    let committed = one.unwrap_or_else(|| Err(Refusal::new(Code::Internal, "one leaf", "none")))?;
    let not_after_ms = committed.get().lifetime.not_after.0;
    replica.check_clock()?;
    let issuer = replica.issuing(&committed.get().authority)?;
    // Administrators are certified whoever has the authority: somebody must take it back.
    let chain = match committed.get().subject {
        Subject::Admin | Subject::BreakGlass(_) => issue(committed, csr, &issuer)?,
        Subject::Node | Subject::Workload(..) | Subject::NamedWorkload(..) | Subject::Minted(..) => {
            replica.sign(|| issue(committed, csr, &issuer))?
        }
    };
    Ok((chain.iter().map(|c| c.to_vec()).collect(), not_after_ms))
}
