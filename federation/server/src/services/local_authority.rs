//! The trust domain's roots, the replicas' intermediates and the JWT authorities: state, and the steps of a rotation.
//!
//! Who must have acknowledged what before a step is asked of all replicas here; whether the step itself is possible is
//! decided where it is applied.

mod external;
mod holders;
mod jwt;
mod seal;

use super::{OrStatus, request_id};
use crate::authorise::actor;
use crate::replica::seal::over_authority;
use crate::replica::{Replica, random};
use ambit_identity::{KeySet, Root, SvidKey, fingerprint};
use ambit_model::bundle::RootState;
use ambit_model::{Act, Approved, Code, Refusal};
use ambit_proto::{convert, v1};
use ambit_state::authorities::{RootId, RootRow};
use ambit_state::committed::PreparedRoot;
use ambit_state::objects::KeySetRow;
use ambit_state::{Command, Committed, State};
use holders::Survey;
use rustls_pki_types::CertificateDer;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use tonic::{Request, Response, Status};

pub(crate) struct Authorities(pub(crate) Replica);

/// What an operator named: a root by its fingerprint, an intermediate by its key identifier, or a JWT authority by its kid.
enum Named {
    Root(RootId),
    Intermediate(String),
    Jwt(String),
}

/// A write as it came: whose, under which id, and how.
struct Asked {
    client: crate::authorise::Client,
    by: String,
    id: [u8; 16],
    approved: Option<Approved>,
    m: v1::X509AuthorityRequest,
}

impl Asked {
    fn parse<M>(request: Request<M>, read: fn(M) -> v1::X509AuthorityRequest) -> Result<Asked, Status> {
        let actor = actor(&request)?;
        let mut m = read(request.into_inner());
        let approved = convert::approved(m.approved.take()).or_status()?;
        Ok(Asked { client: actor.client, by: actor.name, id: request_id(&m.request_id)?, approved, m })
    }

    /// A further request id of the same request: some steps take two entries.
    fn then(&self, step: &str) -> [u8; 16] {
        let mut id = [0; 16];
        let digest = Sha256::new().chain_update(self.id).chain_update(step).finalize();
        id.iter_mut().zip(digest).for_each(|(to, from)| *to = from);
        id
    }

    /// What was named, by the form of the name; none where nothing was.
    fn name(&self) -> Result<Option<Named>, Refusal> {
        let text = self.m.authority.as_str();
        let is_hex = text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        match text.len() {
            0 => Ok(None),
            32 if is_hex => Ok(Some(Named::Jwt(text.to_owned()))),
            40 if is_hex => Ok(Some(Named::Intermediate(text.to_owned()))),
            64 if is_hex => Ok(Some(Named::Root(super::parse_fingerprint(text)?))),
            _ => {
                let expected =
                    "a root's fingerprint (64 hex digits), an intermediate's key identifier (40) or a key's kid (32)";
                Err(Refusal::new(Code::BadRequest, expected, text))
            }
        }
    }

    /// What is meant of roots and intermediates: what was named, or the one root in that state.
    fn named(&self, s: &State, state: RootState) -> Result<Named, Refusal> {
        if let Some(named) = self.name()? {
            return Ok(named);
        }
        let one = s.roots().into_iter().find(|(_, row)| row.state == state).map(|(id, _)| Named::Root(id));
        one.ok_or_else(|| Refusal::new(Code::RootState, format!("a root that is {}", state.as_str()), "none"))
    }

    /// Refuses where somebody is missing whom the caller means to wait for.
    fn waits(&self, code: Code, expected: &str, missing: &[String]) -> Result<(), Refusal> {
        if missing.is_empty() || self.m.without_acks || self.m.dry_run {
            return Ok(());
        }
        Err(Refusal::new(code, expected, missing.join(", ")))
    }
}

#[tonic::async_trait]
impl v1::local_authority_server::LocalAuthority for Authorities {
    async fn get_x509_authority_state(
        &self,
        request: Request<v1::X509AuthorityStateRequest>,
    ) -> Result<Response<v1::X509AuthorityState>, Status> {
        if request.into_inner().local_only {
            let holders = holders::here(&self.0);
            return Ok(Response::new(v1::X509AuthorityState { holders, ..Default::default() }));
        }
        Ok(Response::new(self.state().await.or_status()?))
    }

    async fn share_root(
        &self,
        request: Request<v1::ShareRootRequest>,
    ) -> Result<Response<v1::ShareRootResponse>, Status> {
        let actor = actor(&request)?;
        let m = request.into_inner();
        let id = request_id(&m.request_id)?;
        self.share(actor, id, m).await.or_status().map(Response::new)
    }

    async fn seal_root(&self, request: Request<v1::SealRootRequest>) -> Result<Response<v1::SealRootResponse>, Status> {
        let actor = actor(&request)?;
        let m = request.into_inner();
        request_id(&m.request_id)?;
        self.seal(actor, m.dry_run).await.or_status().map(Response::new)
    }

    async fn request_external_authority(
        &self,
        request: Request<v1::ExternalAuthorityRequest>,
    ) -> Result<Response<v1::ExternalAuthority>, Status> {
        let actor = actor(&request)?;
        request_id(&request.into_inner().request_id)?;
        self.request_external(&actor).await.or_status().map(Response::new)
    }

    async fn withdraw_external_authority(
        &self,
        request: Request<v1::ExternalAuthorityRequest>,
    ) -> Result<Response<v1::ExternalAuthority>, Status> {
        let actor = actor(&request)?;
        let id = request_id(&request.into_inner().request_id)?;
        self.withdraw_external(actor, id).await.or_status().map(Response::new)
    }

    async fn import_external_authority(
        &self,
        request: Request<v1::ImportExternalAuthorityRequest>,
    ) -> Result<Response<v1::X509AuthorityResponse>, Status> {
        let actor = actor(&request)?;
        let m = request.into_inner();
        request_id(&m.request_id)?;
        self.import_external(actor, m).await.or_status()?;
        self.answer(Vec::new()).await
    }

    async fn prepare_x509_authority(
        &self,
        request: Request<v1::X509AuthorityRequest>,
    ) -> Result<Response<v1::X509AuthorityResponse>, Status> {
        let asked = Asked::parse(request, |m| m)?;
        self.prepare(&asked).await.or_status()?;
        self.answer(Vec::new()).await
    }

    async fn activate_x509_authority(
        &self,
        request: Request<v1::X509AuthorityRequest>,
    ) -> Result<Response<v1::X509AuthorityResponse>, Status> {
        let asked = Asked::parse(request, |m| m)?;
        let missing = self.activate(&asked).await.or_status()?;
        self.answer(missing).await
    }

    async fn taint_x509_authority(
        &self,
        request: Request<v1::X509AuthorityRequest>,
    ) -> Result<Response<v1::X509AuthorityResponse>, Status> {
        let asked = Asked::parse(request, |m| m)?;
        self.taint(&asked).await.or_status()?;
        self.answer(Vec::new()).await
    }

    async fn revoke_x509_authority(
        &self,
        request: Request<v1::X509AuthorityRequest>,
    ) -> Result<Response<v1::X509AuthorityResponse>, Status> {
        let asked = Asked::parse(request, |m| m)?;
        let missing = self.revoke(&asked).await.or_status()?;
        self.answer(missing).await
    }

    async fn get_jwt_authority_state(
        &self,
        _: Request<v1::JwtAuthorityStateRequest>,
    ) -> Result<Response<v1::JwtAuthorityState>, Status> {
        Ok(Response::new(self.jwt_state().await.or_status()?))
    }

    async fn prepare_jwt_authority(
        &self,
        request: Request<v1::JwtAuthorityRequest>,
    ) -> Result<Response<v1::JwtAuthorityResponse>, Status> {
        let asked = Asked::parse(request, jwt::as_x509)?;
        self.jwt_prepare(&asked).await.or_status()?;
        self.jwt_answer(Vec::new()).await.or_status()
    }

    async fn activate_jwt_authority(
        &self,
        request: Request<v1::JwtAuthorityRequest>,
    ) -> Result<Response<v1::JwtAuthorityResponse>, Status> {
        let asked = Asked::parse(request, jwt::as_x509)?;
        let missing = self.jwt_activate(&asked).await.or_status()?;
        self.jwt_answer(missing).await.or_status()
    }

    async fn taint_jwt_authority(
        &self,
        request: Request<v1::JwtAuthorityRequest>,
    ) -> Result<Response<v1::JwtAuthorityResponse>, Status> {
        let asked = Asked::parse(request, jwt::as_x509)?;
        self.jwt_taint(&asked).await.or_status()?;
        self.jwt_answer(Vec::new()).await.or_status()
    }

    async fn revoke_jwt_authority(
        &self,
        request: Request<v1::JwtAuthorityRequest>,
    ) -> Result<Response<v1::JwtAuthorityResponse>, Status> {
        let asked = Asked::parse(request, jwt::as_x509)?;
        let missing = self.jwt_revoke(&asked).await.or_status()?;
        self.jwt_answer(missing).await.or_status()
    }
}

impl Authorities {
    async fn answer(&self, missing: Vec<String>) -> Result<Response<v1::X509AuthorityResponse>, Status> {
        let state = Some(self.state().await.or_status()?);
        Ok(Response::new(v1::X509AuthorityResponse { state, missing }))
    }

    async fn state(&self) -> Result<v1::X509AuthorityState, Refusal> {
        let survey = Survey::of(&self.0).await?;
        self.0.read(|s| survey.state(s)).await
    }

    /// A new root, in every bundle from the entry on, and certified by the active one for those who know only that.
    async fn prepare(&self, asked: &Asked) -> Result<(), Refusal> {
        let active = self.0.active_root().await?;
        let (prepared, mut members) = self.0.local(|s| {
            let prepared = s.roots().into_iter().find(|(_, row)| row.state == RootState::Prepared);
            (prepared, s.wrap_keys())
        });
        if prepared.is_none() && !active.above().is_empty() && !asked.m.own_root {
            let expected = "the next certificate under the external root, or a root of the cell's own by that name";
            return Err(Refusal::new(Code::ExternalRoot, expected, "neither"));
        }
        if asked.m.dry_run {
            return Ok(());
        }
        let (der, mut wrapped) = match prepared {
            // Prepared before and perhaps not certified: the same again ends what was begun.
            Some((_, RootRow { der, wrapped, .. })) => (der, wrapped),
            None => {
                let mut serial: [u8; 16] = random()?;
                serial[0] = 0x40 | (serial[0] & 0x3f);
                let root = Root::create(self.0.trust_domain(), self.0.now(), serial)?;
                (root.der().to_vec(), wrap_to(&members, root.key())?)
            }
        };
        members.retain(|id, _| wrapped.contains_key(id));
        wrapped.retain(|id, _| members.contains_key(id));
        self.put_prepared(&active, der, wrapped, members).await
    }

    /// Commits a prepared root, or that it is prepared, and certifies it.
    async fn put_prepared(
        &self,
        active: &Root,
        der: Vec<u8>,
        wrapped: BTreeMap<u64, Vec<u8>>,
        members: BTreeMap<u64, Vec<u8>>,
    ) -> Result<(), Refusal> {
        let command = Command::PrepareRoot(der.clone(), wrapped);
        let committed = self.0.propose_wrapped(members, command).await?.into_root()?;
        self.0.check_clock()?;
        self.cross(active, committed, der).await
    }

    /// A root that was prepared by a replica that fell before it certified it is certified now: nobody else would.
    async fn certify_prepared(&self, id: &RootId) -> Result<(), Refusal> {
        let (row, mut members) = self.0.local(|s| {
            let own = s.active_root().is_some_and(|(active, _)| s.external(&active).is_none());
            let row = s.roots().remove(id).filter(|row| own && lacks_certificate(row));
            (row, s.wrap_keys())
        });
        let Some(RootRow { der, mut wrapped, .. }) = row else { return Ok(()) };
        let active = self.0.active_root().await?;
        members.retain(|id, _| wrapped.contains_key(id));
        wrapped.retain(|id, _| members.contains_key(id));
        self.put_prepared(&active, der, wrapped, members).await
    }

    /// The prepared root's key certified by the active one, where that can: an external root's key is not here.
    async fn cross(&self, active: &Root, committed: Committed<PreparedRoot>, der: Vec<u8>) -> Result<(), Refusal> {
        let id = committed.get().root;
        if active.above().is_empty() {
            let cross = active.cross_sign(&committed, &CertificateDer::from(der))?;
            self.0.propose_own(Command::CrossSignRoot(id, cross.to_vec())).await?.outcome?;
        }
        tracing::info!(root = hex::encode(id), "root prepared");
        Ok(())
    }

    async fn activate(&self, asked: &Asked) -> Result<Vec<String>, Refusal> {
        let survey = Survey::of(&self.0).await?;
        let (id, missing) =
            self.0.read(|s| root_named(asked, s, RootState::Prepared, |id| survey.missing(s, id))).await??;
        asked.waits(Code::AcksMissing, "every replica, live node and active peer to hold the root", &missing)?;
        if asked.m.dry_run {
            return Ok(missing);
        }
        self.certify_prepared(&id).await?;
        // Nothing leads from such a root to the one before: who does not hold it would know nobody.
        if !missing.is_empty() && self.0.local(|s| s.roots().get(&id).is_some_and(|row| row.cross_der.is_empty())) {
            let expected = "everybody to hold the root that the active one cannot certify";
            return Err(Refusal::new(Code::ExternalRoot, expected, missing.join(", ")));
        }
        let root = self.0.open_root(&id).await?;
        let (replaced, keys) = self.certify_keys(&root)?;
        // By the authority that signs then: another may be imported while the root is prepared.
        let command = over_authority(&root, Command::ActivateRoot(id, keys));
        let command = Command::OverKeySet(replaced, Box::new(command));
        self.0.propose(asked.client.clone(), asked.then("activate"), command).await?.outcome?;
        tracing::info!(root = hex::encode(id), "root activated");
        Ok(missing)
    }

    /// The record keys in force, certified by the next root, and the key set that they stand in.
    fn certify_keys(&self, root: &Root) -> Result<([u8; 32], KeySetRow), Refusal> {
        let td = self.0.trust_domain();
        let (row, (active, epoch)) = self.0.local(|s| {
            let cell = s.cell().map(|c| (c.root_der.clone(), c.epoch)).unwrap_or_default();
            (s.key_set().cloned().unwrap_or_default(), cell)
        });
        let known = KeySet::verify(td, &active, &row.statement, &row.signature)?;
        let seq = KeySet::seq_after(known.seq(), epoch);
        let (statement, signature) = KeySet::certify_listed(root, td, seq, known.listed())?;
        Ok((row.sha256(), KeySetRow { statement, signature }))
    }

    async fn taint(&self, asked: &Asked) -> Result<(), Refusal> {
        let named = self.0.read(|s| asked.named(s, RootState::Old)).await??;
        if asked.m.dry_run {
            return Ok(());
        }
        let command = match named {
            Named::Root(id) => Command::TaintRoot(id),
            Named::Intermediate(id) => Command::TaintAuthority(id),
            Named::Jwt(kid) => return Err(no_certificate(kid)),
        };
        self.0.propose(asked.client.clone(), asked.then("taint"), command).await?.outcome?;
        Ok(())
    }

    async fn revoke(&self, asked: &Asked) -> Result<Vec<String>, Refusal> {
        let survey = Survey::of(&self.0).await?;
        let decide = |s: &State| {
            Ok::<_, Refusal>(match asked.named(s, RootState::Tainted)? {
                Named::Root(id) => {
                    let (act, by) = (Act::RevokeRoot(id), asked.by.clone());
                    (Command::Act { act, approved: asked.approved.clone(), by }, survey.stranded(s, &id))
                }
                Named::Intermediate(id) if asked.m.unknown => (unknown(s, &id)?, Vec::new()),
                Named::Intermediate(id) if !s.has_row_of(&id) => {
                    let expected = "an intermediate of this cell, by name; one of before a restore with --unknown";
                    return Err(Refusal::new(Code::NotFound, expected, id));
                }
                Named::Intermediate(id) => (Command::RevokeAuthority(id.clone()), survey.under(s, &id)),
                Named::Jwt(kid) => return Err(no_certificate(kid)),
            })
        };
        let (command, missing) = self.0.read(decide).await??;
        asked.waits(
            Code::AuthorityInUse,
            "nobody who shows what is under it, and all to verify by another root",
            &missing,
        )?;
        if asked.m.dry_run {
            return Ok(missing);
        }
        self.0.propose(asked.client.clone(), asked.then("revoke"), command).await?.outcome?;
        Ok(missing)
    }
}

fn lacks_certificate(row: &RootRow) -> bool {
    row.state == RootState::Prepared && row.cross_der.is_empty()
}

fn root_named<T>(
    asked: &Asked,
    s: &State,
    state: RootState,
    then: impl FnOnce(&RootId) -> T,
) -> Result<(RootId, T), Refusal> {
    match asked.named(s, state)? {
        Named::Root(id) => Ok((id, then(&id))),
        Named::Intermediate(id) | Named::Jwt(id) => {
            Err(Refusal::new(Code::BadRequest, "a root's fingerprint (64 hex digits)", id))
        }
    }
}

/// Refuses an intermediate that nothing is known of. A root has such a name too, and stands in every chain.
fn unknown(s: &State, id: &str) -> Result<Command, Refusal> {
    for (root, row) in s.roots().into_iter().filter(|(_, row)| !row.der.is_empty()) {
        if ambit_identity::name_of(&row.der)? == id {
            let found = format!("that of root {}, which is revoked by its fingerprint", hex::encode(root));
            return Err(Refusal::new(Code::BadRequest, "the name of an intermediate", found));
        }
    }
    if s.names_authority(id) {
        let found = "one that it does, or that stands in every chain";
        return Err(Refusal::new(Code::RootState, "an intermediate that the cell does not know", found));
    }
    Ok(Command::DenyAuthority(id.to_owned()))
}

fn no_certificate(kid: String) -> Refusal {
    let expected = "a root's fingerprint (64 hex digits) or an intermediate's key identifier (40)";
    Refusal::new(Code::BadRequest, expected, kid)
}

fn wrap_to(members: &BTreeMap<u64, Vec<u8>>, key: &SvidKey) -> Result<BTreeMap<u64, Vec<u8>>, Refusal> {
    let pkcs8 = key.pkcs8();
    members.iter().map(|(id, public)| Ok((*id, ambit_identity::wrap::wrap(public, &pkcs8)?))).collect()
}

/// The name of a root, as operators compare it.
fn shown(der: &[u8]) -> String {
    hex::encode(fingerprint(der))
}
