//! Standby intermediates: signed by a home's root in peace, held by each replica of its standby, and believed by nobody
//! without a live grant.

use super::authority::Above;
use super::{Replica, random, wall_clock};
use crate::authorise::Client;
use ambit_identity::keys::certificates_to_pem;
use ambit_identity::{Csr, IssuingKey, SvidKey};
use ambit_model::{Code, Refusal, TrustDomain};
use ambit_proto::status::from_status;
use ambit_proto::v1;
use ambit_state::Command;
use rustls_pki_types::CertificateDer;
use std::path::PathBuf;
use std::time::Duration;
use zeroize::Zeroizing;

/// A naming is seen, and an intermediate renewed, within this.
const LOOK: Duration = Duration::from_secs(1);
/// A home that does not answer is asked again after this.
const RETRY: Duration = Duration::from_secs(5);
const ANSWER_MAX: Duration = Duration::from_secs(5);

impl Replica {
    /// Commits and signs an intermediate for a replica of this cell's standby, which asked for itself.
    pub async fn certify_standby(
        &self,
        client: Client,
        request: [u8; 16],
        (holder, replica): (TrustDomain, u64),
        csr: &Csr,
    ) -> Result<(CertificateDer<'static>, Above), Refusal> {
        // Before anything is committed: whoever cannot sign commits nothing.
        drop(self.active_root().await?);
        self.may_sign()?;
        let command = Command::CertifyStandby { holder, replica, key_hash: csr.spki_sha256() };
        let committed = self.propose(client, request, command).await?.into_standby()?;
        self.check_clock()?;
        let root = self.open_root(&committed.get().root).await?;
        let intermediate = self.sign(|| root.standby(&committed, csr))?;
        let authority = ambit_identity::authority::authority_id(csr);
        tracing::info!(holder = %committed.get().holder, replica, authority, "standby's intermediate signed");
        Ok((intermediate, self.above(&root)))
    }

    fn standby_file(&self, home: &TrustDomain) -> PathBuf {
        self.inner.files.dir().join(format!("standby-{home}.pem"))
    }

    /// The intermediate of this replica for a home, with its key; none where it has none that can be read.
    pub fn standby_key(&self, home: &TrustDomain) -> Option<IssuingKey> {
        let path = self.standby_file(home);
        if !path.exists() {
            return None;
        }
        let read = || {
            let text = Zeroizing::new(super::files::private(&path)?);
            let text = std::str::from_utf8(&text).map_err(|e| super::files::failed("a PEM file", &path, e))?;
            let mut upper = ambit_identity::keys::certificates_from_pem(text)?.into_iter();
            let first = upper.next().ok_or_else(|| super::files::failed("an intermediate in", &path, "none"))?;
            Ok::<_, Refusal>(IssuingKey::new(SvidKey::from_pem(text)?, first)?.under(upper.collect()))
        };
        read().inspect_err(|refusal| tracing::warn!(%home, %refusal, "standby's intermediate not read")).ok()
    }
}

/// Sees to it that this replica has an intermediate of every home that names its cell, with half of its life left at least.
pub async fn keep(replica: Replica) {
    loop {
        let own = replica.trust_domain().clone();
        let homes: Vec<TrustDomain> = replica.local(|s| {
            let names = s.standbys().filter(|(_, row)| row.naming.as_ref().is_some_and(|n| n.standby == own));
            names.map(|(home, _)| home.clone()).collect()
        });
        let mut wait = LOOK;
        for home in homes {
            if let Err(refusal) = keep_of(&replica, &home).await {
                tracing::debug!(%home, %refusal, "no standby's intermediate yet");
                wait = RETRY;
            }
        }
        tokio::time::sleep(wait).await;
    }
}

async fn keep_of(replica: &Replica, home: &TrustDomain) -> Result<(), Refusal> {
    let denied = |key: &IssuingKey| {
        let name = (home.clone(), key.authority().to_owned());
        replica.local(|s| s.denied_authorities().contains(&name))
    };
    let is_good = |key: &IssuingKey| {
        let life = key.lifetime();
        let half = life.not_before.0 + life.not_after.0.saturating_sub(life.not_before.0) / 2;
        wall_clock().0 < half && !denied(key)
    };
    if replica.standby_key(home).as_ref().is_some_and(is_good) {
        return Ok(());
    }
    let mut last = Refusal::new(Code::Unavailable, "an address of the home", "none");
    for address in replica.local(|s| s.peer(home).map(|p| p.addresses.clone()).unwrap_or_default()) {
        match tokio::time::timeout(ANSWER_MAX, ask(replica, home, &address)).await {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(refusal)) => last = refusal,
            Err(_) => last = Refusal::new(Code::Unavailable, "an answer", format!("{address} is silent")),
        }
    }
    Err(last)
}

async fn ask(replica: &Replica, home: &TrustDomain, address: &str) -> Result<(), Refusal> {
    let key = SvidKey::generate()?;
    let request =
        v1::CertifyStandbyRequest { request_id: random::<16>()?.to_vec(), replica: replica.id(), csr: key.csr()? };
    let channel = super::lease::dial(replica, home, address).await?;
    let mut link = v1::peer_link_client::PeerLinkClient::new(channel);
    let answer = link.certify_standby(request).await.map_err(|s| from_status(&s))?.into_inner();
    let intermediate = CertificateDer::from(answer.intermediate_der);
    of_this_cell(&intermediate, replica.trust_domain())?;
    let above = answer.above_der.into_iter().map(CertificateDer::from).collect();
    // Another key's certificate is refused here.
    let issuer = IssuingKey::new(key, intermediate)?.under(above);
    let certificates = certificates_to_pem(issuer.upper().iter().map(AsRef::as_ref));
    let text = Zeroizing::new(format!("{}{certificates}", *issuer.key().pem()));
    let path = replica.standby_file(home);
    super::files::write_private(&path, text.as_bytes())?;
    tracing::info!(%home, authority = issuer.authority(), until_ms = issuer.not_after().0, "standby's intermediate held");
    Ok(())
}

/// One without the mark would be believed without a grant: it is not kept.
fn of_this_cell(intermediate: &CertificateDer<'_>, own: &TrustDomain) -> Result<(), Refusal> {
    let cert = ambit_identity::profile::certificate(intermediate)?;
    let marked = ambit_identity::profile::standby_of(&cert);
    match marked {
        Ok(Some(holder)) if holder == *own => Ok(()),
        other => Err(Refusal::new(Code::SvidMalformed, format!("a standby mark of {own}"), format!("{other:?}"))),
    }
}
