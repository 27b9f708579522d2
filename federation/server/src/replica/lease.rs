//! The lease that this replica signs under, where its cell has a witness: asked for of standby and witness, and looked at as
//! the last step before each signature.

use super::{Replica, random};
use ambit_identity::tls::Expect;
use ambit_model::grant::{Naming, Vouch};
use ambit_model::{Code, Refusal, TrustDomain};
use ambit_proto::status::from_status;
use ambit_proto::v1;
use ambit_state::lease::{Boot, Lease, Renewal};
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::PoisonError;
use std::time::Duration;
use tokio::task::JoinSet;
use tonic::transport::Channel;

/// How soon a naming is noticed.
const LOOK: Duration = Duration::from_millis(250);
/// A lease is asked for so many times in its term: half of the questions may be lost.
const ASKS_PER_TERM: u64 = 8;
/// Longer than this nobody waits to ask, however long the term is.
const ASK_MS_MAX: u64 = 5_000;

/// Milliseconds since this machine booted, its sleep counted (CLOCK_BOOTTIME). Only drivers ask it.
pub fn boot() -> Boot {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let part = |n: i64| u64::try_from(n).unwrap_or(0);
    Boot(part(time.tv_sec).saturating_mul(1_000).saturating_add(part(time.tv_nsec) / 1_000_000))
}

impl Replica {
    fn with_lease<T>(&self, f: impl FnOnce(&mut Lease) -> T) -> T {
        f(&mut self.inner.lease.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether this replica may sign for its trust domain at this very moment: no grant fences it, and its lease is in time.
    ///
    /// # Errors
    /// [`Code::EpochFenced`], [`Code::LeaseEnded`].
    pub fn may_sign(&self) -> Result<(), Refusal> {
        let (namings, epoch, fenced) = self.local(|s| (s.namings(), s.cell().map_or(0, |c| c.epoch), s.fenced()));
        fenced.map_or(Ok(()), Err)?;
        self.with_lease(|lease| lease.may_sign(&namings, epoch, boot()))
    }

    /// Signs, if it may: asked as the last step before the signature, and again before that leaves, as this process may
    /// have slept in between.
    pub fn sign<T>(&self, signature: impl FnOnce() -> Result<T, Refusal>) -> Result<T, Refusal> {
        self.may_sign()?;
        let signed = signature()?;
        self.may_sign()?;
        Ok(signed)
    }

    /// For people: how long this replica may sign still.
    pub fn lease_text(&self) -> String {
        let (namings, epoch) = self.local(|s| (s.namings(), s.cell().map_or(0, |c| c.epoch)));
        let now = boot();
        let left = |naming: &Naming| {
            let until = self.with_lease(|lease| lease.until(naming, epoch));
            until.map_or(0, |until| until.0.saturating_sub(now.0))
        };
        match namings.iter().filter(|naming| naming.witness().is_some()).map(left).min() {
            None => "none needed".to_owned(),
            Some(0) => "ended: this replica signs nothing".to_owned(),
            Some(ms) => format!("{ms} ms left"),
        }
    }
}

/// Asks as long as this replica runs. Each replica has a lease of its own, counted by its own clock.
pub async fn keep(replica: Replica) {
    let mut asked: JoinSet<()> = JoinSet::new();
    loop {
        let namings = replica.local(ambit_state::State::namings);
        let term = namings.iter().filter_map(lease_ms).min();
        let Some(term) = term else {
            tokio::time::sleep(LOOK).await;
            continue;
        };
        let granters: BTreeSet<TrustDomain> = namings
            .iter()
            .filter_map(|naming| Some([naming.standby.clone(), naming.witness()?.clone()]))
            .flatten()
            .collect();
        let every = Duration::from_millis((term / ASKS_PER_TERM).min(ASK_MS_MAX));
        for granter in granters {
            let replica = replica.clone();
            asked.spawn(async move {
                // A granter that is slow is asked again all the same.
                let asked = tokio::time::timeout(every * 2, ask(&replica, &granter)).await;
                if let Ok(Err(refusal)) = asked {
                    tracing::debug!(%granter, %refusal, "lease not renewed");
                }
            });
        }
        tokio::time::sleep(every).await;
        while asked.try_join_next().is_some() {}
    }
}

fn lease_ms(naming: &Naming) -> Option<u64> {
    match &naming.vouch {
        Vouch::Approvers => None,
        Vouch::Witness { lease_ms, .. } => Some(*lease_ms),
    }
}

/// One question, at the first address that answers. The lease is counted from when it left.
async fn ask(replica: &Replica, granter: &TrustDomain) -> Result<(), Refusal> {
    let epoch = replica.local(|s| s.cell().map_or(0, |c| c.epoch));
    let mut last = Refusal::new(Code::Unavailable, "an address of the granter", "none");
    for address in replica.local(|s| s.peer(granter).map(|p| p.addresses.clone()).unwrap_or_default()) {
        let nonce: [u8; 16] = random()?;
        let call = async {
            let mut link = v1::peer_link_client::PeerLinkClient::new(dial(replica, granter, &address).await?);
            replica.with_lease(|lease| lease.ask(granter, nonce, epoch, boot()));
            let request = v1::RenewLeaseRequest { nonce: nonce.to_vec(), epoch };
            link.renew_lease(request).await.map_err(|s| from_status(&s)).map(tonic::Response::into_inner)
        };
        match call.await {
            Ok(answer) => {
                let nonce = answer.nonce.as_slice().try_into();
                let nonce =
                    nonce.map_err(|_| Refusal::new(Code::BadRequest, "the nonce of the question", "another"))?;
                let renewal =
                    Renewal { granter: granter.clone(), nonce, epoch: answer.epoch, lease_ms: answer.lease_ms };
                replica.with_lease(|lease| lease.renewed(&renewal));
                return Ok(());
            }
            Err(refusal) => last = refusal,
        }
    }
    Err(last)
}

/// A connection to a replica of a peer.
pub(super) async fn dial(replica: &Replica, peer: &TrustDomain, address: &str) -> Result<Channel, Refusal> {
    let at: SocketAddr = address.parse().map_err(|_| Refusal::new(Code::BadRequest, "ip:port", address))?;
    replica.dialer().channel(at, Expect::ReplicaOf(peer.clone())).await
}
