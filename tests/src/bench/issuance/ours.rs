//! Our side: nodes that were admitted, each with its own entries, ask three replicas for leaves over mutual TLS.

use super::super::fleet::{Bench, tpms};
use super::super::machine::Enrolled;
use crate::cell::{Cell, fresh};
use crate::soft_tpm::maker::{CaKind, Maker};
use ambit_identity::{SvidKey, TrustStore, verify_svid};
use ambit_model::bundle::{Bundle, Own};
use ambit_model::{NodeId, Stamp};
use ambit_proto::v1;
use ambit_proto::v1::bundle_registry_client::BundleRegistryClient;
use ambit_proto::v1::entry_registry_client::EntryRegistryClient;
use ambit_proto::v1::svid_client::SvidClient;
use ambit_transport::Identity;
use anyhow::{Context, Result, ensure};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::task::JoinSet;
use tonic::Code;
use tonic::transport::Channel;

pub(super) const REPLICAS: usize = 3;
pub(super) const NODES: usize = 100;
/// Workloads of one node.
const PER_NODE: usize = 1_000;
const CLUSTER: &str = "issuance";
const INTERVAL_S: u32 = 60;
/// Entries in one write.
const WRITE: usize = 1_000;
const PATIENCE: Duration = Duration::from_secs(60);
/// Load on two cores is no reason for an election.
const ELECTION_MS: u64 = 1_500;
const RETRY_AFTER: Duration = Duration::from_millis(5);

pub(super) struct Ours {
    pub(super) bench: Bench,
    nodes: Vec<Enrolled>,
    clients: Vec<SvidClient<Channel>>,
    /// Answers to rounds: without them the nodes would be late.
    _streams: JoinSet<Result<()>>,
    next: Arc<AtomicU64>,
}

impl Ours {
    /// A cell with its nodes; entries and connections follow.
    pub(super) async fn start() -> Result<Ours> {
        super::super::fleet::descriptors()?;
        let maker = Arc::new(Maker::new(CaKind::P256)?);
        let cell = Cell::patient("west", REPLICAS, ELECTION_MS).await?;
        let leader = cell.leader().await?;
        let bench = Bench { cell, leader };
        bench.register(CLUSTER, INTERVAL_S, &maker).await?;
        let nodes = bench.enrol(CLUSTER, tpms(NODES, &maker)?, &maker).await?;
        let next = Arc::new(AtomicU64::new(1));
        Ok(Ours { bench, nodes, clients: Vec::new(), _streams: JoinSet::new(), next })
    }

    /// A hundred thousand of them, a thousand for each node.
    pub(super) async fn create_entries(&self) -> Result<()> {
        for (n, node) in self.nodes.iter().enumerate() {
            let id = NodeId(node.tpm.node).to_string();
            let entry = |k: usize| v1::Entry {
                id: entry_name(n, k),
                spiffe_id: format!("spiffe://west/node-{n}/workload-{k}"),
                cluster: CLUSTER.to_owned(),
                nodes: vec![id.clone()],
                selectors: vec![format!("cgroup:workload-{k}")],
                ..Default::default()
            };
            let entries: Vec<v1::Entry> = (0..PER_NODE).map(entry).collect();
            for part in entries.chunks(WRITE) {
                let request = v1::BatchCreateEntryRequest { request_id: fresh(), entries: part.to_vec() };
                let call = |channel| {
                    let request = request.clone();
                    async move { EntryRegistryClient::new(channel).batch_create_entry(request).await }
                };
                let answer = self.bench.cell.insist(call).await?;
                ensure!(answer.results.iter().all(|r| r.code == "ok"), "an entry was refused");
            }
        }
        Ok(())
    }

    pub(super) fn entries() -> usize {
        NODES * PER_NODE
    }

    /// SIGKILL of a follower; the time from its start to its first linearizable read of the last entry.
    pub(super) async fn restart(&mut self) -> Result<Duration> {
        let leader = self.bench.cell.leader().await?;
        let member = leader % REPLICAS + 1;
        self.bench.cell.kill(member)?;
        tokio::time::sleep(Duration::from_millis(500)).await;
        let started = Instant::now();
        self.bench.cell.restart(member)?;
        let last = v1::GetEntryRequest { id: entry_name(NODES - 1, PER_NODE - 1) };
        loop {
            let read = async {
                let mut client = EntryRegistryClient::new(self.bench.cell.admin(member).await?);
                anyhow::Ok(client.get_entry(last.clone()).await?)
            };
            if let Ok(Ok(_)) = tokio::time::timeout(Duration::from_secs(1), read).await {
                return Ok(started.elapsed());
            }
            ensure!(started.elapsed() < PATIENCE, "replica {member} does not answer within {PATIENCE:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Opens every node's stream and its connection, at one replica after the other.
    pub(super) async fn connect(&mut self) -> Result<()> {
        self._streams = self.bench.connect(self.nodes.clone(), &Arc::default()).await?;
        for (n, node) in self.nodes.iter().enumerate() {
            let identity = Identity::new(Some(node.identity.clone()));
            let channel = self.bench.cell.channel_as(identity, n % REPLICAS + 1).await?;
            self.clients.push(SvidClient::new(channel));
        }
        Ok(())
    }

    /// Has `batch` leaves signed for one node after the other.
    pub(super) fn asker(&self, batch: usize, connections: usize, csrs: &Arc<Vec<Vec<u8>>>) -> Asker {
        let clients = self.clients.iter().take(connections).cloned().collect();
        Asker {
            clients: Arc::new(clients),
            batch,
            csrs: csrs.clone(),
            next: self.next.clone(),
            retries: Arc::default(),
        }
    }

    /// One chain that was issued, judged by the bundle that the cell publishes.
    pub(super) async fn judge(&self, csrs: &Arc<Vec<Vec<u8>>>) -> Result<()> {
        let request = v1::GetBundleRequest { trust_domain: "west".into() };
        let call = |channel| {
            let request = request.clone();
            async move { BundleRegistryClient::new(channel).get_bundle(request).await }
        };
        let bundle = self.bench.cell.insist(call).await?;
        let trust = TrustStore::new(&Bundle::<Own>::new("west".parse()?, bundle.sequence, bundle.roots_der))?;
        let chain = self.asker(1, 1, csrs).ask().await?.pop().context("a chain")?;
        let chain: Vec<_> = chain.into_iter().map(Into::into).collect();
        let now = Stamp(u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis())?);
        let svid = verify_svid(&chain, &trust, now)?;
        ensure!(svid.id().as_str().starts_with("spiffe://west/node-0/"), "{}", svid.id().as_str());
        Ok(())
    }
}

fn entry_name(node: usize, workload: usize) -> String {
    format!("n{node}-w{workload}")
}

/// Requests, each for a node's next workloads and under an id of its own.
#[derive(Clone)]
pub(super) struct Asker {
    clients: Arc<Vec<SvidClient<Channel>>>,
    batch: usize,
    csrs: Arc<Vec<Vec<u8>>>,
    next: Arc<AtomicU64>,
    /// Requests that were sent again.
    pub(super) retries: Arc<AtomicU64>,
}

impl Asker {
    /// The chains of one request; all of them were signed.
    pub(super) async fn ask(&self) -> Result<Vec<Vec<Vec<u8>>>> {
        let n = self.next.fetch_add(1, Ordering::Relaxed);
        let (turn, nodes) = (usize::try_from(n)?, self.clients.len());
        let node = turn % nodes;
        let item = |k: usize| v1::NewX509svid {
            entry_id: entry_name(node, (turn / nodes * self.batch + k) % PER_NODE),
            csr: self.csrs.get((turn * self.batch + k) % self.csrs.len()).cloned().unwrap_or_default(),
        };
        let items = (0..self.batch).map(item).collect();
        let request = v1::BatchNewX509svidRequest { request_id: [[0xff; 8], n.to_be_bytes()].concat(), items };
        let mut client = self.clients.get(node).context("a connection")?.clone();
        let until = Instant::now() + PATIENCE;
        let results = loop {
            match client.batch_new_x509svid(request.clone()).await {
                Ok(answer) => break answer.into_inner().results,
                // The same request again has its effect once; all of it counts as its latency.
                Err(status) if status.code() == Code::Unavailable && Instant::now() < until => {
                    self.retries.fetch_add(1, Ordering::Relaxed);
                    tokio::time::sleep(RETRY_AFTER).await;
                }
                Err(status) => return Err(status.into()),
            }
        };
        ensure!(results.len() == self.batch, "{} results", results.len());
        for result in &results {
            ensure!(result.code == "ok" && result.chain_der.len() >= 2, "{}: {}", result.code, result.message);
        }
        Ok(results.into_iter().map(|result| result.chain_der).collect())
    }
}

/// Requests of as many keys; each is verified as often as it is sent.
pub(super) fn csrs(count: usize) -> Result<Vec<Vec<u8>>> {
    (0..count).map(|_| Ok(SvidKey::generate()?.csr()?)).collect()
}
