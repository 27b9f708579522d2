//! `ambitd run`: opens the store, serves, and keeps house until told to stop.

use super::agents::Agents;
use super::files::{Card, Files};
use super::found::{raft_options, start_failed};
use super::keyring::Keyring;
use super::reports::Reports;
use super::verdicts::Verdicts;
use super::{Inner, Replica, authority, trust_of, upkeep};
use crate::config::Config;
use crate::raft::{Cell, Network, rebase};
use ambit_identity::tls::{Clients, Expect, SharedTrust, Trust, server_config};
use ambit_identity::{IssuingKey, fingerprint};
use ambit_model::{Code, Refusal, ReplicaId};
use ambit_transport::{Dialer, Identity};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, OnceLock};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tonic::transport::Channel;

/// Serves until `stop` turns true.
pub async fn run(config: &Config, mut stop: watch::Receiver<bool>) -> Result<(), Refusal> {
    let files = Files::create(&config.data_dir)?;
    if !files.exist() {
        let found = format!("none in {}", config.data_dir.display());
        return Err(Refusal::new(
            Code::ConfigInvalid,
            "a replica's identity (`ambitd init` or `ambitd join` first)",
            found,
        ));
    }
    files.guarded()?;
    let listener = listen(config.listen).await?;
    let metrics_listener = listen(config.metrics_listen).await?;
    let (verdicts, rounds) = Verdicts::new();
    let (reports, told) = Reports::new();
    let replica = open(config, &files, verdicts, reports).await?;
    let outside = match &config.bundle_endpoint {
        Some(at) => Some(crate::outside::Endpoint::open(at, &replica.inner.identity).await?),
        None => None,
    };
    tracing::info!(trust_domain = %replica.trust_domain(), replica = replica.id(), listen = %config.listen, "replica starts");
    let router = crate::services::router(&replica)?;
    let alpn: &[&[u8]] = &[b"h2"];
    let identity = replica.inner.identity.resolver();
    let server = server_config(replica.trust().clone(), Clients::MayBeAnonymous, identity, alpn)?;
    let mut stopping = stop.clone();
    let shutdown = async move {
        let _ = stopping.wait_for(|s| *s).await;
    };
    let chores = upkeep::spawn(&replica, rounds, told);
    let page = tokio::spawn(crate::metrics::serve(metrics_listener, replica.clone()));
    let local = tokio::spawn(super::local::serve(config.data_dir.clone(), replica.clone()));
    let outside = outside.map(|endpoint| tokio::spawn(endpoint.serve(replica.clone())));
    let served = tokio::select! {
        served = ambit_transport::serve(listener, server, replica.trust().clone(), router, shutdown) => {
            served.map_err(|e| Refusal::new(Code::Unavailable, "a serving replica", e.to_string()))
        }
        // Streams of agents have no end of their own: a replica that is told to stop does not wait for them.
        _ = async { let _ = stop.wait_for(|s| *s).await; tokio::time::sleep(std::time::Duration::from_millis(300)).await } => Ok(()),
    };
    chores.abort_all();
    page.abort();
    local.abort();
    if let Some(outside) = outside {
        outside.abort();
    }
    replica.cell().clone().shutdown().await;
    served
}

pub(crate) async fn listen(at: SocketAddr) -> Result<TcpListener, Refusal> {
    TcpListener::bind(at).await.map_err(|e| {
        Refusal::new(Code::ConfigInvalid, format!("an address that can be listened on, {at}"), e.to_string())
    })
}

async fn open(config: &Config, files: &Files, verdicts: Verdicts, reports: Reports) -> Result<Replica, Refusal> {
    let (card, keyring) = (files.card()?, Keyring::open(config, files).await?);
    let (issuer, tls_key, root_der) = (files.issuer()?, files.tls()?, files.root_der()?);
    // The root goes along, for those who know only its fingerprint. Once there is a state it says which roots go along.
    let roots = vec![root_der.clone()];
    let leaf = |issuer: &_| authority::leaf_of(issuer, card.replica, &card.trust_domain, &tls_key, roots.clone());
    let (issuer, tls) = match leaf(&issuer) {
        Err(refusal) if refusal.code == Code::IssuerUnavailable => {
            let again = begin_again(config, files, &card, &keyring).await?;
            let tls = leaf(&again)?;
            (again, tls)
        }
        tls => (issuer, tls?),
    };
    let trust = SharedTrust::new(Trust::Pinned(card.trust_domain.clone(), fingerprint(&root_der)));
    let identity = Identity::new(Some(tls));
    let dialer = Dialer::new(trust.clone(), identity.clone());
    let late: Arc<OnceLock<Cell>> = Arc::default();
    let network = network(&card, &dialer, &late);
    if rebase::unfinished(&config.data_dir) {
        let expected = "a recovery that was finished (`ambitd recover` goes on with it)";
        return Err(Refusal::new(Code::ConfigInvalid, expected, "one that was cut off"));
    }
    let cell = Cell::open(raft_options(config, card.replica)?, network).map_err(start_failed)?;
    let _ = late.set(cell.clone());
    // One look at a time: a second would wait for a writer that waits for the first.
    let known = {
        let state = cell.state();
        state.cell().map(|_| (state.bundles(), state.denied_authorities(), state.fences()))
    };
    if let Some((bundles, denied, fences)) = known {
        trust.replace(trust_of(bundles, denied, fences, &card.trust_domain)?);
    }
    let inner = Inner {
        cell,
        trust_domain: card.trust_domain,
        id: card.replica,
        told: card.members,
        address: config.listen.to_string(),
        data_dir: config.data_dir.clone(),
        issuers: authority::Issuers::new(issuer),
        lifetime_ms: config.authority.lifetime_s.saturating_mul(1000),
        files: files.clone(),
        identity,
        record: files.record()?,
        keyring,
        logs: super::attest::Logs::of(config),
        trust,
        dialer,
        agents: Agents::default(),
        seen: super::seen::Seen::default(),
        findings: super::findings::Findings::default(),
        remembered: super::cuts::Remembered::default(),
        board: super::cuts::Board::default(),
        blobs: super::blobs::Blobs::open(config.data_dir.join("blobs"))?,
        work: super::work::Work::start()?,
        verdicts,
        reports,
        ticket_keys: super::ticket::OpenKeys::default(),
        oidc_issuer: config.bundle_endpoint.as_ref().and_then(|at| at.oidc_issuer.clone()),
        jwt_keys: super::jwt::OpenJwtKeys::default(),
        issuance_budgets: super::issuing::Budgets::default(),
        policies: super::policies::Policies::default(),
        revision: watch::Sender::new(0),
        propagation: super::propagation::Propagation::default(),
        refusals: crate::authorise::Refusals::default(),
        fetcher: super::federate::Fetcher::new(config.web_roots.clone()),
        heard: Mutex::new(super::pull::Heard::default()),
        floors: Mutex::new(super::cosign::Floors::default()),
        peers_hold: Mutex::default(),
        lease: Mutex::default(),
    };
    Ok(Replica { inner: Arc::new(inner) })
}

/// What its store says of the root is all in its log, of which nothing is applied before others are heard.
async fn begin_again(config: &Config, files: &Files, card: &Card, keyring: &Keyring) -> Result<IssuingKey, Refusal> {
    let survey = rebase::survey(&raft_options(config, card.replica)?).map_err(start_failed)?;
    authority::begin_again(files, card, keyring, &survey.whole.state).await
}

/// Addresses from replicated state, else from what `join` was told; connections as this replica to that replica.
fn network(card: &Card, dialer: &Dialer, late: &Arc<OnceLock<Cell>>) -> Network {
    let (known, late) = (card.members.clone(), late.clone());
    let directory = move |id: ReplicaId| {
        let replicated = late.get().and_then(|cell| cell.state().member(id.0).map(|m| m.address.clone()));
        let told = || known.iter().find(|(n, _)| *n == id.0).map(|(_, a)| a.clone());
        replicated.or_else(told)?.parse().ok()
    };
    let (dialer, td) = (dialer.clone(), card.trust_domain.clone());
    let channels =
        move |id: ReplicaId, at: SocketAddr| -> futures::future::BoxFuture<'static, Result<Channel, Refusal>> {
            let (dialer, td) = (dialer.clone(), td.clone());
            Box::pin(async move {
                let id = td.member(&format!("/ambit/replica/{id}"))?;
                dialer.channel(at, Expect::Id(id)).await
            })
        };
    Network { directory: Arc::new(directory), channels: Arc::new(channels) }
}

impl Replica {
    /// Fingerprint of the own root.
    pub fn fingerprint(&self) -> [u8; 32] {
        self.local(|s| s.cell().map(|c| fingerprint(&c.root_der)).unwrap_or_default())
    }

    /// A channel to another replica of this cell.
    pub async fn dial_replica(&self, id: u64, address: &str) -> Result<Channel, Refusal> {
        let at: SocketAddr =
            address.parse().map_err(|_| Refusal::new(Code::Internal, "a member's ip:port", address.to_owned()))?;
        let id = self.trust_domain().member(&format!("/ambit/replica/{id}"))?;
        self.dialer().channel(at, Expect::Id(id)).await
    }

    /// A channel to the leader, or none where this replica leads.
    pub async fn leader_channel(&self) -> Result<Option<Channel>, Refusal> {
        let leader = self.cell().status().leader.ok_or_else(|| Refusal::new(Code::Unavailable, "a leader", "none"))?;
        if leader.0 == self.id() {
            return Ok(None);
        }
        let address = self.local(|s| s.member(leader.0).map(|m| m.address.clone()));
        let address = address.ok_or_else(|| Refusal::new(Code::Unavailable, "the leader's address", "unknown"))?;
        self.dial_replica(leader.0, &address).await.map(Some)
    }
}
