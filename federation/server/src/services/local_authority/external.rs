//! A root that somebody else keeps: the key that is to be certified outside, and what comes back.

use super::Authorities;
use crate::authorise::Actor;
use crate::replica::random;
use ambit_identity::external::request;
use ambit_identity::wrap::{Purpose, wrap};
use ambit_identity::{Root, SvidKey, fingerprint};
use ambit_model::{Code, Refusal};
use ambit_proto::{convert, v1};
use ambit_state::Command;
use ambit_state::external::{ExternalImport, ExternalRequest, ExternalRow, judge, may_sign};
use ambit_state::objects::KeySetRow;
use rustls_pki_types::CertificateDer;
use std::collections::BTreeMap;

/// An import is made anew so often when the key set, a wrap key or a replica came in between.
const TRIES: usize = 4;

pub(super) fn waiting(row: &ExternalRequest) -> v1::ExternalAuthority {
    let authority = hex::encode(&row.key_hash[..20]);
    v1::ExternalAuthority { authority, csr_der: row.csr.clone(), made_ms: row.made.0 }
}

pub(super) fn shown(row: &ExternalRow, signs: bool) -> v1::X509External {
    v1::X509External {
        authority: row.authority(),
        signs,
        not_before_ms: row.lifetime.not_before.0,
        not_after_ms: row.lifetime.not_after.0,
        imported_ms: row.imported.0,
        chain_der: row.chain.clone(),
    }
}

fn no_request() -> Refusal {
    Refusal::new(Code::NotFound, "an open request for an external certificate (ambit trust external csr)", "none")
}

impl Authorities {
    /// The open request, or a new one: its key is made here and kept by all replicas, as a root's is.
    pub(super) async fn request_external(&self, actor: &Actor) -> Result<v1::ExternalAuthority, Refusal> {
        if let Some(open) = self.0.read(|s| s.external_request().map(waiting)).await? {
            return Ok(open);
        }
        let key = SvidKey::generate()?;
        let (csr, key_hash) = (request(self.0.trust_domain(), &key)?, key.spki_sha256());
        let members = self.0.local(ambit_state::State::wrap_keys);
        let wrapped = wrap_to(&members, &key)?;
        let command = self.0.wrapped(members, Command::RequestExternal { csr, key_hash, wrapped });
        self.0.propose(actor.client.clone(), random()?, command).await?.outcome?;
        tracing::info!(by = actor.name, key = hex::encode(key_hash), "a key waits for its external certificate");
        self.0.local(|s| s.external_request().map(waiting)).ok_or_else(no_request)
    }

    /// Forgets the key of the open request.
    pub(super) async fn withdraw_external(&self, actor: Actor, id: [u8; 16]) -> Result<v1::ExternalAuthority, Refusal> {
        let open = self.0.read(|s| s.external_request().cloned()).await?.ok_or_else(no_request)?;
        let command = Command::WithdrawExternal(open.key_hash);
        self.0.propose(actor.client, id, command).await?.outcome?;
        Ok(waiting(&open))
    }

    /// Judges what was certified, and has the cell judge it again.
    pub(super) async fn import_external(
        &self,
        actor: Actor,
        m: v1::ImportExternalAuthorityRequest,
    ) -> Result<(), Refusal> {
        let open = self.0.read(|s| s.external_request().cloned()).await?.ok_or_else(no_request)?;
        let (chain, root_der) = (m.chain_der, m.root_der);
        let judged = judge(self.0.trust_domain(), &chain, &root_der, &open.key_hash, self.0.now())?;
        let approved = convert::approved(m.approved)?;
        let id = fingerprint(&root_der);
        // Opened before anything is committed: whoever cannot, commits nothing.
        let pkcs8 = self.opened(&open).await?;
        let active = self.0.active_root().await?;
        let is_next = fingerprint(active.der()) == id;
        if is_next {
            may_sign(judged.lifetime(), self.0.now())?;
        }
        // What no rule foresaw is found by signing under it, and nobody ever sees that.
        self.under(&chain, &root_der, &pkcs8)?.tried(self.0.now())?;
        if m.dry_run {
            return Ok(());
        }
        let mut tries = 0;
        let applied = loop {
            tries += 1;
            let members = self.0.local(ambit_state::State::wrap_keys);
            let authority = self.under(&chain, &root_der, &pkcs8)?;
            let wrapped = wrap_to(&members, authority.key())?;
            // A root that is merely prepared certifies the record keys when it is activated.
            let keys: Option<([u8; 32], KeySetRow)> = if is_next { Some(self.certify_keys(&authority)?) } else { None };
            let (replaced, keys) = keys.unzip();
            let import = ExternalImport {
                chain: chain.clone(),
                root: root_der.clone(),
                wrapped,
                keys,
                approved: approved.clone(),
                by: actor.name.clone(),
            };
            let command = self.0.wrapped(members, Command::ImportExternal(Box::new(import)));
            let command = match replaced {
                Some(replaced) => Command::OverKeySet(replaced, Box::new(command)),
                None => command,
            };
            let applied = self.0.propose(actor.client.clone(), random()?, command).await?;
            match &applied.outcome {
                Err(refusal) if refusal.code == Code::StaleRevision && tries < TRIES => {}
                Ok(_) | Err(_) => break applied,
            }
        };
        if is_next {
            applied.outcome?;
            tracing::info!(by = actor.name, root = hex::encode(id), "an external certificate is imported");
            return Ok(());
        }
        let committed = applied.into_root()?;
        tracing::info!(by = actor.name, root = hex::encode(id), "an external certificate is imported");
        self.0.check_clock()?;
        self.cross(&active, committed, root_der).await
    }

    fn under(&self, chain: &[Vec<u8>], root: &[u8], pkcs8: &[u8]) -> Result<Root, Refusal> {
        let above = chain.iter().cloned().map(CertificateDer::from).collect();
        Root::under(self.0.trust_domain(), root.to_vec().into(), above, SvidKey::from_pkcs8(pkcs8)?)
    }

    /// The key that waits, where this replica can open it.
    async fn opened(&self, open: &ExternalRequest) -> Result<zeroize::Zeroizing<Vec<u8>>, Refusal> {
        let mine = open.wrapped.get(&self.0.id()).ok_or_else(|| {
            let found = format!("replica {}, to which it is not wrapped", self.0.id());
            Refusal::new(Code::IssuerUnavailable, "a replica that can open the requested key", found)
        })?;
        self.0.keyring().unwrap_for(Purpose::Key, mine).await
    }
}

fn wrap_to(members: &BTreeMap<u64, Vec<u8>>, key: &SvidKey) -> Result<BTreeMap<u64, Vec<u8>>, Refusal> {
    let pkcs8 = key.pkcs8();
    members.iter().map(|(id, public)| Ok((*id, wrap(public, &pkcs8)?))).collect()
}
