//! A node as its cell and its peers see it, without a kernel: enrolled, on its stream, following bundles, and asking for
//! its workload's SVID and its own leaf anew when they are due or tainted. As the agent does, in a few lines.

use crate::agent::{Admitted, RoundLies};
use crate::cell::{Cell, fresh};
use crate::machine::{Lies, Machine, evidence};
use ambit_identity::tls::{Clients, certified, client_config, fixed, server_config};
use ambit_identity::{Expect, SharedTrust, SvidKey, Trust, TrustStore};
use ambit_model::bundle::{Bundle, Foreign, Own};
use ambit_model::{Refusal, SpiffeId, Stamp, TrustDomain};
use ambit_proto::status::from_status;
use ambit_proto::v1;
use ambit_proto::v1::agent_message::Body as Up;
use ambit_proto::v1::agent_stream_client::AgentStreamClient;
use ambit_proto::v1::server_message::Body as Down;
use ambit_proto::v1::svid_client::SvidClient;
use ambit_transport::Dialer;
use anyhow::{Context, Result, bail};
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::sign::CertifiedKey;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

/// How often it looks whether anything is due.
const LOOK: Duration = Duration::from_millis(100);
/// Before the next replica is tried.
const RETRY: Duration = Duration::from_millis(100);

/// A leaf and who signed it.
#[derive(Clone)]
struct Leaf {
    key: Arc<CertifiedKey>,
    authority: String,
    since_ms: u64,
    until_ms: u64,
}

impl Leaf {
    fn is_due(&self, tainted: &[String]) -> bool {
        tainted.contains(&self.authority) || now_ms() > self.since_ms + self.until_ms.saturating_sub(self.since_ms) / 2
    }
}

/// What it is and what it shows now.
#[derive(Default)]
struct Shown {
    svid: Option<Leaf>,
    /// Intermediates that signed any of its leaves, in their order.
    authorities: Vec<String>,
    issued: usize,
    refused: Vec<Refusal>,
}

/// A running node.
pub struct Node {
    /// Whom it trusts now.
    pub trust: SharedTrust,
    id: SpiffeId,
    shown: Arc<Mutex<Shown>>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Node {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Follower {
    machine: Machine,
    servers: Arc<Mutex<Vec<SocketAddr>>>,
    trust: SharedTrust,
    trust_domain: TrustDomain,
    cluster: String,
    token: String,
    entry: String,
    shown: Arc<Mutex<Shown>>,
}

/// What one stream has learnt.
#[derive(Default)]
struct Heard {
    bundles: Vec<v1::BundleSequence>,
    tainted: Vec<String>,
}

impl Node {
    /// Enrols the machine with this token and follows its cell from then on, with an SVID of this entry.
    pub fn start(cell: &Cell, machine: Machine, cluster: &str, token: String, entry: &str) -> Result<Node> {
        let trust = SharedTrust::new(Trust::Pinned(cell.trust_domain.clone(), cell.fingerprint));
        let shown: Arc<Mutex<Shown>> = Arc::default();
        let servers = (1..=cell.size()).map(|n| cell.address(n)).collect::<Result<_>>()?;
        let follower = Follower {
            machine,
            servers: Arc::new(Mutex::new(servers)),
            trust: trust.clone(),
            trust_domain: cell.trust_domain.clone(),
            cluster: cluster.to_owned(),
            token,
            entry: entry.to_owned(),
            shown: shown.clone(),
        };
        let id = cell.trust_domain.member(&format!("/{entry}"))?;
        let task = tokio::spawn(follower.run());
        Ok(Node { trust, id, shown, task })
    }

    /// Whether it has an SVID in time.
    pub fn is_ready(&self) -> bool {
        self.shown().svid.as_ref().is_some_and(|leaf| leaf.until_ms > now_ms())
    }
    /// How many SVIDs of its workload were issued to it, the intermediates that signed its leaves, and its cell's refusals.
    pub fn history(&self) -> (usize, Vec<String>, Vec<Refusal>) {
        let shown = self.shown();
        (shown.issued, shown.authorities.clone(), shown.refused.clone())
    }
    fn shown(&self) -> std::sync::MutexGuard<'_, Shown> {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner)
    }
    /// What it shows now, leaf first, as PEM.
    pub fn svid_pem(&self) -> Result<String> {
        let key = self.svid()?;
        Ok(ambit_identity::keys::certificates_to_pem(key.cert.iter().map(AsRef::as_ref)))
    }
    fn svid(&self) -> Result<Arc<CertifiedKey>> {
        Ok(self.shown().svid.as_ref().context("no SVID")?.key.clone())
    }

    /// One TLS handshake with another node, each as its workload and by its own bundles of this moment.
    pub async fn greet(&self, other: &Node) -> Result<()> {
        let client = client_config(self.trust.clone(), Expect::Id(other.id.clone()), Some(self.svid()?), &[b"h2"])?;
        let server = server_config(other.trust.clone(), Clients::Certified, fixed(other.svid()?), &[b"h2"])?;
        let (near, far) = tokio::io::duplex(64 * 1024);
        let connecting = tokio_rustls::TlsConnector::from(Arc::new(client));
        let accepting = tokio_rustls::TlsAcceptor::from(Arc::new(server));
        let name = ServerName::try_from("node.invalid")?;
        let (connected, accepted) = tokio::join!(connecting.connect(name, near), accepting.accept(far));
        let _near = connected.context("the caller")?;
        let far = accepted.context("the callee")?;
        let chain = far.get_ref().1.peer_certificates().context("a certificate")?;
        let caller = other.trust.current().verify(chain, Stamp(now_ms()))?;
        if *caller.id() != self.id {
            bail!("{} called as {}", self.id, caller.id());
        }
        Ok(())
    }
}

impl Follower {
    async fn run(self) {
        let mut at = 0;
        let mut me: Option<(Admitted, Leaf)> = None;
        loop {
            at += 1;
            let server = {
                let servers = self.servers.lock().unwrap_or_else(PoisonError::into_inner);
                servers.get(at % servers.len().max(1)).copied()
            };
            let Some(server) = server else { return };
            let ended = match &me {
                None => self.enrol(server).await.map(|admitted| me = Some(admitted)),
                Some((admitted, leaf)) => match self.follow(server, admitted, leaf).await {
                    // Its own leaf is due: enrolled again, with the old one in use until then.
                    Ok(()) => self.enrol(server).await.map(|admitted| me = Some(admitted)),
                    Err(e) => Err(e),
                },
            };
            if ended.is_err() {
                tokio::time::sleep(RETRY).await;
            }
        }
    }

    fn leaf(&self, chain_der: &[Vec<u8>], key: &SvidKey) -> Result<Leaf> {
        let chain: Vec<CertificateDer<'static>> = chain_der.iter().cloned().map(Into::into).collect();
        let peer = self.trust.current().verify(&chain, Stamp(now_ms()))?;
        let authority = peer.authority().to_owned();
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        if !shown.authorities.contains(&authority) {
            shown.authorities.push(authority.clone());
        }
        Ok(Leaf { key: certified(chain, key)?, authority, since_ms: now_ms(), until_ms: peer.not_after().0 })
    }

    async fn enrol(&self, server: SocketAddr) -> Result<(Admitted, Leaf)> {
        let dialer = Dialer::new(self.trust.clone(), Default::default());
        let channel = dialer.channel(server, Expect::ReplicaOf(self.trust_domain.clone())).await?;
        let begun = match self.machine.begin(channel.clone(), &self.cluster, &self.token).await? {
            Ok(begun) => begun,
            Err(denied) => bail!("{denied:?}"),
        };
        let answer = self.machine.answer(&begun, &Lies::default()).await?;
        let verdict = match evidence(channel, &answer.frames).await? {
            Ok(verdict) => verdict,
            Err(denied) => bail!("{denied:?}"),
        };
        let bundle = verdict.bundle.clone().unwrap_or_default();
        if matches!(*self.trust.current(), Trust::Pinned(..)) {
            self.believe(&[bundle])?;
        }
        let leaf = self.leaf(&verdict.svid_chain_der, &answer.key)?;
        Ok((Admitted::by(&verdict, &answer, &self.cluster)?, leaf))
    }

    fn believe(&self, bundles: &[v1::Bundle]) -> Result<()> {
        let own = bundles.iter().find(|b| b.trust_domain == self.trust_domain.as_str()).context("the own bundle")?;
        let mut store =
            TrustStore::new(&Bundle::<Own>::new(self.trust_domain.clone(), own.sequence, own.roots_der.clone()))?;
        for b in bundles.iter().filter(|b| b.trust_domain != own.trust_domain) {
            store.add_foreign(&Bundle::<Foreign>::new(b.trust_domain.parse()?, b.sequence, b.roots_der.clone()))?;
        }
        self.trust.replace(Trust::Bundles(store));
        Ok(())
    }

    /// One stream, until it breaks (an error) or the node's own leaf is due.
    async fn follow(&self, server: SocketAddr, me: &Admitted, leaf: &Leaf) -> Result<()> {
        let dialer = Dialer::new(self.trust.clone(), me.identity.clone());
        let channel = dialer.channel(server, Expect::ReplicaOf(self.trust_domain.clone())).await?;
        let (up, queue) = mpsc::channel(64);
        let hello = v1::Subscribe { node_address: "127.0.0.1".to_owned(), ..v1::Subscribe::default() };
        say(&up, Up::Subscribe(hello)).await?;
        let mut down = AgentStreamClient::new(channel.clone()).sync(ReceiverStream::new(queue)).await?.into_inner();
        let mut heard = Heard::default();
        let mut told = None;
        let mut every = tokio::time::interval(LOOK);
        loop {
            tokio::select! {
                message = down.message() => match message?.context("an open stream")?.body {
                    Some(Down::Slice(slice)) => {
                        self.believe(&slice.bundles)?;
                        let sequence = |b: &v1::Bundle| v1::BundleSequence { trust_domain: b.trust_domain.clone(), sequence: b.sequence };
                        heard = Heard { bundles: slice.bundles.iter().map(sequence).collect(), tainted: slice.tainted_authorities };
                    }
                    Some(Down::Quote(request)) => {
                        for body in self.machine.round(me, &request, &RoundLies::default()).await? {
                            say(&up, body).await?;
                        }
                    }
                    _ => {}
                },
                _ = every.tick() => {
                    if leaf.is_due(&heard.tainted) {
                        return Ok(());
                    }
                    self.renew(&channel, &heard).await?;
                }
            }
            let holding = self.holding(leaf, &heard);
            if told.as_ref() != Some(&holding) {
                say(&up, Up::Holding(holding.clone())).await?;
                told = Some(holding);
            }
        }
    }

    fn holding(&self, leaf: &Leaf, heard: &Heard) -> v1::Holding {
        let svid = self.shown.lock().unwrap_or_else(PoisonError::into_inner).svid.as_ref().map(|s| s.authority.clone());
        let authorities = svid.into_iter().chain([leaf.authority.clone()]).collect();
        v1::Holding { bundles: heard.bundles.clone(), authorities }
    }

    async fn renew(&self, channel: &Channel, heard: &Heard) -> Result<()> {
        let due = {
            let shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
            shown.svid.as_ref().is_none_or(|leaf| leaf.is_due(&heard.tainted))
        };
        if !due {
            return Ok(());
        }
        let key = SvidKey::generate()?;
        let items = vec![v1::NewX509svid { entry_id: self.entry.clone(), csr: key.csr()? }];
        let request = v1::BatchNewX509svidRequest { request_id: fresh(), items };
        let answer = SvidClient::new(channel.clone()).batch_new_x509svid(request).await;
        let results = answer.map_err(|s| from_status(&s)).map(|a| a.into_inner().results);
        let result = match results {
            Ok(results) => results.into_iter().next().context("a result")?,
            Err(refusal) => {
                self.shown.lock().unwrap_or_else(PoisonError::into_inner).refused.push(refusal.clone());
                return Err(refusal.into());
            }
        };
        if result.code != "ok" {
            let code = ambit_model::Code::from_text(&result.code).unwrap_or(ambit_model::Code::Internal);
            let refusal = Refusal::new(code, "an SVID", result.message);
            self.shown.lock().unwrap_or_else(PoisonError::into_inner).refused.push(refusal);
            return Ok(());
        }
        let leaf = self.leaf(&result.chain_der, &key)?;
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        (shown.svid, shown.issued) = (Some(leaf), shown.issued + 1);
        Ok(())
    }
}

async fn say(up: &mpsc::Sender<v1::AgentMessage>, body: Up) -> Result<()> {
    up.send(v1::AgentMessage { body: Some(body) }).await.context("an open stream")
}

fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64)
}

/// Handshakes one after the other, both ways, until told to stop.
pub struct Greetings {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicUsize>,
    task: tokio::task::JoinHandle<Vec<String>>,
}

impl Greetings {
    /// Begins with these pairs, caller and callee.
    pub fn start(pairs: Vec<(Arc<Node>, Arc<Node>)>) -> Greetings {
        let (stop, done): (Arc<AtomicBool>, Arc<AtomicUsize>) = Default::default();
        let (stopped, counted) = (stop.clone(), done.clone());
        let task = tokio::spawn(async move {
            let mut failed = Vec::new();
            while !stopped.load(Ordering::Relaxed) {
                for (caller, callee) in &pairs {
                    match caller.greet(callee).await {
                        Ok(()) => drop(counted.fetch_add(1, Ordering::Relaxed)),
                        Err(e) => failed.push(format!("{e:#}")),
                    }
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            }
            failed
        });
        Greetings { stop, done, task }
    }
    /// Ends them: how many succeeded, and how each other failed.
    pub async fn end(self) -> (usize, Vec<String>) {
        self.stop.store(true, Ordering::Relaxed);
        (self.done.load(Ordering::Relaxed), self.task.await.unwrap_or_else(|e| vec![e.to_string()]))
    }
}
