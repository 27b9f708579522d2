//! From a change to what all agents hold: a cell of three real replicas, and simulated agents over real gRPC, each with its
//! own certificate, connection and signatures, which check every digest and acknowledge.
//!
//! The cell has 100 entries and 10 policies for each agent, 100,000 and 10,000 at most. One agent, the large one, may run
//! all those entries, and all policies speak of them. The others, the fleet, run one workload on every node, of which a hundred
//! policies speak. What changes is one of these, so that all of them have to hear of it, the large one too.

use super::fleet::{Bench, REPLICAS, descriptors, tpms};
use super::machine::Enrolled;
use super::proxy::Proxy;
use super::stream::{self, Acked, Counts};
use super::table::{Table, Target};
use crate::cell::{Cell, fresh};
use crate::soft_tpm::maker::{CaKind, Maker};
use ambit_proto::resources::Held;
use ambit_proto::v1;
use ambit_proto::v1::entry_registry_client::EntryRegistryClient;
use ambit_proto::v1::policy_registry_client::PolicyRegistryClient;
use anyhow::{Context, Result, ensure};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tonic::transport::Channel;

const ENTRIES_MAX: usize = 100_000;
const POLICIES_MAX: usize = 10_000;
/// Of them, those that speak of what the fleet runs.
const OF_FLEET: usize = 100;
/// In one request.
const BATCH: usize = 1_000;
/// The longest that a cell gives: rounds are not what is measured.
const INTERVAL_S: u32 = 60;
/// Changes, or as many as there is time for.
const CHANGES: u32 = 100;
const CHANGING_MAX: Duration = Duration::from_secs(60);
/// Until everybody heard of one change; beyond, nobody would call it propagation.
const PATIENCE: Duration = Duration::from_secs(300);
const LOOK: Duration = Duration::from_millis(1);
/// Between two changes.
const PAUSE: Duration = Duration::from_millis(200);

/// Which agents are counted at.
const COUNTED: [&str; 2] = ["an agent of the fleet", "the large agent"];

/// All figures.
pub(super) async fn run(table: &mut Table, nodes: usize) -> Result<()> {
    descriptors()?;
    let (entries, policies) = ((100 * nodes).min(ENTRIES_MAX), (10 * nodes).min(POLICIES_MAX));
    table.head(&format!("A cell of three replicas, {nodes} agents, {entries} entries, {policies} policies"));
    let maker = Arc::new(Maker::new(CaKind::P256)?);
    let cell = Cell::start("west", REPLICAS).await?;
    let leader = cell.leader().await?;
    let mut bench = Bench { cell, leader };
    bench.register("fleet", INTERVAL_S, &maker).await?;
    bench.register("large", INTERVAL_S, &maker).await?;
    let fleet = bench.enrol("fleet", tpms(nodes, &maker)?, &maker).await?;
    let large = bench.enrol("large", tpms(1, &maker)?, &maker).await?;
    let started = Instant::now();
    load(&bench, entries, policies).await?;
    table.floor("entries and policies written, wall clock", started.elapsed().as_secs_f64(), "s");
    let large = large.into_iter().next().context("the large node")?;
    sync(table, &bench, large.clone()).await?;
    let agents = Agents::connect(table, &bench, fleet, large).await?;
    changes(table, &mut bench, agents, nodes).await
}

async fn load(bench: &Bench, entries: usize, policies: usize) -> Result<()> {
    let entry = |id: String, cluster: &str| v1::Entry {
        spiffe_id: format!("spiffe://west/{id}"),
        cluster: cluster.to_owned(),
        selectors: vec![format!("cgroup:{id}")],
        id,
        ..v1::Entry::default()
    };
    let mut all: Vec<v1::Entry> = (0..entries).map(|n| entry(format!("w{n}"), "large")).collect();
    all.push(entry("daemon".into(), "fleet"));
    for batch in all.chunks(BATCH) {
        let request = v1::BatchCreateEntryRequest { request_id: fresh(), entries: batch.to_vec() };
        let call = |channel| {
            let request = request.clone();
            async move { EntryRegistryClient::new(channel).batch_create_entry(request).await }
        };
        let results = bench.cell.insist(call).await?.results;
        ensure!(results.iter().all(|one| one.code == "ok"), "an entry was refused: {results:?}");
    }
    let numbers: Vec<usize> = (0..policies).collect();
    for batch in numbers.chunks(BATCH) {
        apply(bench, batch.iter().map(|n| policy(*n, entries, 80)).collect()).await?;
    }
    Ok(())
}

fn policy(n: usize, entries: usize, port: u16) -> String {
    let target = if n < OF_FLEET { "daemon".to_owned() } else { format!("w{}", (n * 7) % entries) };
    let (from, name) = (n % entries, format!("p{n}"));
    format!(
        "---\nkind: Policy\nmetadata: {{name: {name}}}\nspec: {{target: spiffe://west/{target}, action: allow, \
         from: [spiffe://west/w{from}], ports: [{port}]}}\n"
    )
}

async fn apply(bench: &Bench, yaml: String) -> Result<u64> {
    let request = v1::ApplyRequest { request_id: fresh(), yaml, over: None, unlimited: true };
    let call = |channel: Channel| {
        let request = request.clone();
        async move { PolicyRegistryClient::new(channel).apply(request).await }
    };
    Ok(bench.cell.insist(call).await?.revision)
}

/// The large agent alone: from dialling until it holds everything; and again, with what it holds.
async fn sync(table: &mut Table, bench: &Bench, large: Enrolled) -> Result<()> {
    // Something that nobody holds yet, and a revision of which everything must be.
    let revision = apply(bench, policy(0, 100, 81)).await?;
    let (mut held, counts) = (Held::default(), Counts::default());
    for (again, name) in [(false, "everything"), (true, "once more, with what it holds")] {
        let proxy = Proxy::start(bench.cell.address(bench.leader)?).await?;
        let started = Instant::now();
        let whom = (bench.cell.trust_domain.clone(), bench.cell.fingerprint);
        let open = stream::open((0, large.clone()), proxy.at, whom, held).await?;
        let following = open.until(&counts, revision);
        held = tokio::time::timeout(PATIENCE, following).await.context("the large agent waits for its slice")??;
        let seconds = started.elapsed().as_secs_f64();
        let target = if again { Target::None } else { Target::AtMost(1.0) };
        table.figure(&format!("the large agent is sent {name}"), seconds, "s", target);
        table.floor("  bytes on the wire, handshake and all", proxy.bytes() as f64 / 1024.0, "KiB");
        if !again && !held.set().is_empty() {
            table.floor("  resources that it holds", held.set().len() as f64, "");
        }
    }
    Ok(())
}

/// Open streams: of the fleet, and of the large agent as the last.
struct Agents {
    count: usize,
    counts: Arc<Counts>,
    /// Beside the first agent of the fleet and the large one.
    proxies: [Proxy; 2],
    tasks: tokio::task::JoinSet<Result<()>>,
}

impl Agents {
    async fn connect(table: &mut Table, bench: &Bench, fleet: Vec<Enrolled>, large: Enrolled) -> Result<Agents> {
        let (count, counts, started) = (fleet.len() + 1, Arc::new(Counts::default()), Instant::now());
        let mut fleet = fleet.into_iter();
        let first = fleet.next().context("a fleet")?;
        let proxies = [Proxy::start(bench.cell.address(1)?).await?, Proxy::start(bench.cell.address(2)?).await?];
        let whom = || (bench.cell.trust_domain.clone(), bench.cell.fingerprint);
        let numbered = [(count - 2, first), (count - 1, large)];
        let mut tasks = bench.connect(fleet.collect(), &counts).await?;
        for (proxy, node) in proxies.iter().zip(numbered) {
            let open = stream::open(node, proxy.at, whom(), Held::default()).await?;
            tasks.spawn(open.run(counts.clone()));
        }
        let mut agents = Agents { count, counts, proxies, tasks };
        agents.all_hold(1).await.context("the first slices")?;
        let seconds = started.elapsed().as_secs_f64();
        table.floor(&format!("{count} streams opened, everybody holds what it needs"), seconds, "s");
        Ok(agents)
    }

    /// When each agent, by its number, first held the revision or a later one.
    async fn all_hold(&mut self, revision: u64) -> Result<Vec<Instant>> {
        let mut at: Vec<Option<Instant>> = vec![None; self.count];
        let (mut left, until) = (self.count, Instant::now() + PATIENCE);
        while left > 0 {
            for acked in self.counts.take_acks().into_iter().filter(|acked| acked.revision >= revision) {
                let Acked { agent, at: when, .. } = acked;
                let slot = at.get_mut(agent).context("a known agent")?;
                left -= usize::from(slot.is_none());
                slot.get_or_insert(when);
            }
            if let Some(ended) = self.tasks.try_join_next() {
                ended?.context("a stream ended")?;
            }
            ensure!(Instant::now() < until, "{left} of {} agents wait for revision {revision}", self.count);
            tokio::time::sleep(LOOK).await;
        }
        Ok(at.into_iter().flatten().collect())
    }

    fn bytes(&self) -> [u64; 2] {
        [self.proxies[0].bytes(), self.proxies[1].bytes()]
    }
}

/// One policy among all of them, changed again and again.
async fn changes(table: &mut Table, bench: &mut Bench, mut agents: Agents, nodes: usize) -> Result<()> {
    let (mut last, mut half, mut large, mut bytes) = (Vec::new(), Vec::new(), Vec::new(), [Vec::new(), Vec::new()]);
    let (before, started) = (bench.spent()?, Instant::now());
    for n in 0..CHANGES {
        if started.elapsed() > CHANGING_MAX {
            break;
        }
        tokio::time::sleep(PAUSE).await;
        let (weighed, begun) = (agents.bytes(), Instant::now());
        let revision = apply(bench, policy(1, 100, 1_000 + u16::try_from(n)?)).await?;
        let at = agents.all_hold(revision).await?;
        let (mut took, of_large): (Vec<f64>, f64) = {
            let mut ms: Vec<f64> =
                at.iter().map(|at| at.saturating_duration_since(begun).as_secs_f64() * 1e3).collect();
            let of_large = ms.pop().context("the large agent")?;
            (ms, of_large)
        };
        took.sort_by(f64::total_cmp);
        last.extend(took.last());
        half.extend(took.get(took.len() / 2));
        large.push(of_large);
        for ((of, now), before) in bytes.iter_mut().zip(agents.bytes()).zip(weighed) {
            of.push((now - before) as f64 / 1024.0);
        }
    }
    let spent: f64 = bench.spent()?.iter().zip(&before).map(|(a, b)| a.saturating_sub(*b).as_secs_f64()).sum();
    let count = last.len() as f64;
    table.floor("changes", count, "");
    let target = if nodes <= 1_000 { 300.0 } else { 2_000.0 };
    table.floor("change to the ACK of half of the fleet, median", part(&mut half, 0.5), "ms");
    table.floor(&format!("change to the last ACK of {nodes} agents, median"), part(&mut last, 0.5), "ms");
    table.figure(
        &format!("change to the last ACK of {nodes} agents, p99"),
        part(&mut last, 0.99),
        "ms",
        Target::AtMost(target),
    );
    table.floor("change to the ACK of the large agent, median", part(&mut large, 0.5), "ms");
    for (name, mut of) in COUNTED.into_iter().zip(bytes) {
        table.figure(
            &format!("a change on the wire to {name}, median"),
            part(&mut of, 0.5),
            "KiB",
            Target::AtMost(2.0),
        );
    }
    table.floor("CPU time of all replicas for a change, rounds included", spent * 1e3 / count, "ms");
    Ok(())
}

/// The value below which this part of all lies.
fn part(values: &mut [f64], part: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let at = (values.len() as f64 * part).ceil() as usize;
    values.get(at.clamp(1, values.len().max(1)) - 1).copied().unwrap_or(f64::NAN)
}
