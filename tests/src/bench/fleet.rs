//! A fleet against a cell of three real replicas: enrolled over gRPC, then attesting every 30 s over one stream a node,
//! each with its own certificate, connection and signatures. What is measured is the replicas' CPU time.

use super::cpu;
use super::machine::{self, Doors, Enrolled};
use super::stream::{self, Counts};
use super::table::{Table, Target};
use crate::cell::{Cell, fresh};
use crate::machine::{apply_policy, golden_policy, put_list};
use crate::soft_tpm::maker::{CaKind, Maker};
use crate::soft_tpm::{EkKind, SoftTpm};
use ambit_model::NodeId;
use ambit_proto::resources::Held;
use ambit_proto::v1;
use ambit_proto::v1::node_attestation_client::NodeAttestationClient;
use anyhow::{Context, Result, ensure};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::task::JoinSet;

pub(super) const REPLICAS: usize = 3;
/// One connection a node here, a third of them at each replica, and room.
const DESCRIPTORS: u64 = 65_536;
/// Streams of the cohort that is measured idle: enrolled quickly enough that none is asked for a quote meanwhile.
const IDLE_NODES: usize = 3_000;
const IDLE_INTERVAL_S: u32 = 60;
const INTERVAL_S: u32 = 30;
/// The first quote is wanted after 48 s at the earliest.
const IDLE_UNTIL: Duration = Duration::from_secs(46);
const EMPTY_WINDOW: Duration = Duration::from_secs(8);
/// Two intervals.
const WINDOW: Duration = Duration::from_secs(60);
/// Enrolments and handshakes under way.
const AT_ONCE: usize = 24;
/// Node ids in one call.
const ALLOW_MAX: usize = 5_000;
const NODES_BYTES_MAX: usize = 64 * 1024 * 1024;

/// The cell and who its leader is.
pub(super) struct Bench {
    pub(super) cell: Cell,
    pub(super) leader: usize,
}

/// All figures of this part.
pub(super) async fn run(table: &mut Table, nodes: usize) -> Result<()> {
    descriptors()?;
    table.head("A cell of three replicas, release processes, mutual TLS on loopback");
    let maker = Arc::new(Maker::new(CaKind::P256)?);
    let cell = Cell::start("west", REPLICAS).await?;
    let leader = cell.leader().await?;
    let mut bench = Bench { cell, leader };
    for (cluster, interval) in [("idle", IDLE_INTERVAL_S), ("fleet", INTERVAL_S)] {
        bench.register(cluster, interval, &maker).await?;
    }
    let empty = bench.share(EMPTY_WINDOW).await?;
    table.floor("leader without nodes", empty.leader, "% of a core");
    let idle = idle(table, &mut bench, &maker, &empty).await?;
    let fleet = enrol(table, &mut bench, &maker, nodes).await?;
    attest(table, &mut bench, fleet, &idle, &empty).await
}

pub(super) fn descriptors() -> Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    // Only root raises the hard limit; without it a smaller fleet still runs. The replicas inherit it.
    setrlimit(Resource::RLIMIT_NOFILE, DESCRIPTORS, DESCRIPTORS.max(hard))
        .or_else(|_| setrlimit(Resource::RLIMIT_NOFILE, hard, hard))?;
    Ok(())
}

/// CPU time of the leader and of all three, in percent of a core.
#[derive(Clone, Copy)]
struct Share {
    leader: f64,
    all: f64,
}

impl Bench {
    pub(super) async fn register(&self, cluster: &str, attest_interval_s: u32, maker: &Maker) -> Result<()> {
        let request = v1::RegisterClusterRequest {
            request_id: fresh(),
            name: cluster.to_owned(),
            ek_root_classes: vec!["lab".to_owned()],
            ek_roots_der: vec![maker.root.clone()],
            attest_interval_s,
        };
        let call = |channel| {
            let request = request.clone();
            async move { v1::cluster_registry_client::ClusterRegistryClient::new(channel).register_cluster(request).await }
        };
        self.cell.insist(call).await?;
        let (yaml, list) = golden_policy(cluster, cluster)?;
        put_list(&self.cell, &list).await?;
        apply_policy(&self.cell, &yaml, false).await?;
        Ok(())
    }

    async fn allow(&self, cluster: &str, tpms: &[Arc<SoftTpm>]) -> Result<()> {
        for part in tpms.chunks(ALLOW_MAX) {
            let node_ids = part.iter().map(|tpm| NodeId(tpm.node).to_string()).collect();
            let request = v1::AllowEkRequest { request_id: fresh(), cluster: cluster.to_owned(), node_ids };
            let call = |channel| {
                let request = request.clone();
                async move { NodeAttestationClient::new(channel).allow_ek(request).await }
            };
            self.cell.insist(call).await?;
        }
        Ok(())
    }

    pub(super) fn spent(&mut self) -> Result<Vec<Duration>> {
        (1..=REPLICAS).map(|n| cpu::of_process(self.cell.process(n)?.id())).collect()
    }

    async fn share(&mut self, window: Duration) -> Result<Share> {
        let (before, started) = (self.spent()?, Instant::now());
        tokio::time::sleep(window).await;
        let (after, wall) = (self.spent()?, started.elapsed());
        ensure!(self.cell.leader().await? == self.leader, "the leader changed during the measurement");
        let spent: Vec<f64> = after.iter().zip(&before).map(|(a, b)| a.saturating_sub(*b).as_secs_f64()).collect();
        let percent = |seconds: f64| 100.0 * seconds / wall.as_secs_f64();
        let leader = spent.get(self.leader - 1).copied().context("the leader")?;
        Ok(Share { leader: percent(leader), all: percent(spent.iter().sum()) })
    }

    fn resident(&mut self) -> Result<u64> {
        let leader = self.leader;
        self.cell.process(leader)?.resident()
    }

    /// Enrols all of `tpms`, spread over the replicas; what each may show from then on.
    pub(super) async fn enrol(
        &self,
        cluster: &str,
        tpms: Vec<Arc<SoftTpm>>,
        maker: &Arc<Maker>,
    ) -> Result<Vec<Enrolled>> {
        self.allow(cluster, &tpms).await?;
        let doors = Arc::new(Doors::open(&self.cell, tpms.len()).await?);
        let (mut tasks, mut done) = (JoinSet::new(), Vec::new());
        for (n, tpm) in tpms.into_iter().enumerate() {
            if tasks.len() >= AT_ONCE {
                done.push(tasks.join_next().await.context("a task")???);
            }
            let (doors, maker, cluster) = (doors.clone(), maker.clone(), cluster.to_owned());
            tasks.spawn(async move { machine::enrol(&doors, n, &cluster, tpm, &maker).await });
        }
        while let Some(one) = tasks.join_next().await {
            done.push(one??);
        }
        Ok(done)
    }

    /// Opens the stream of every node, at one replica after the other.
    pub(super) async fn connect(&self, nodes: Vec<Enrolled>, counts: &Arc<Counts>) -> Result<JoinSet<Result<()>>> {
        let mut streams = JoinSet::new();
        let mut opening: JoinSet<Result<stream::Open>> = JoinSet::new();
        for (n, node) in nodes.into_iter().enumerate() {
            if opening.len() >= AT_ONCE {
                streams.spawn(opening.join_next().await.context("a task")???.run(counts.clone()));
            }
            let at = self.cell.address(n % REPLICAS + 1)?;
            let whom = (self.cell.trust_domain.clone(), self.cell.fingerprint);
            opening.spawn(stream::open((n, node), at, whom, Held::default()));
        }
        while let Some(one) = opening.join_next().await {
            streams.spawn(one??.run(counts.clone()));
        }
        Ok(streams)
    }
}

pub(super) fn tpms(count: usize, maker: &Maker) -> Result<Vec<Arc<SoftTpm>>> {
    (0..count).map(|_| SoftTpm::new(EkKind::P256, maker).map(Arc::new)).collect()
}

/// Streams on which nothing happens: heartbeats and keep-alives.
async fn idle(table: &mut Table, bench: &mut Bench, maker: &Arc<Maker>, empty: &Share) -> Result<Share> {
    let tpms = tpms(IDLE_NODES, maker)?;
    let started = Instant::now();
    let nodes = bench.enrol("idle", tpms, maker).await?;
    let counts = Arc::new(Counts::default());
    let streams = bench.connect(nodes, &counts).await?;
    tokio::time::sleep(Duration::from_secs(3)).await;
    let left = IDLE_UNTIL.saturating_sub(started.elapsed());
    ensure!(left >= Duration::from_secs(5), "this machine is too slow to open {IDLE_NODES} streams in time");
    let share = bench.share(left).await?;
    ensure!(counts.answers() == 0, "an idle stream was asked for a quote");
    drop(streams);
    let here = IDLE_NODES as f64 / REPLICAS as f64;
    let per_stream = |total: f64, none: f64, streams: f64| (total - none).max(0.0) / streams;
    let each = Share {
        leader: per_stream(share.leader, empty.leader, here),
        all: per_stream(share.all, empty.all, IDLE_NODES as f64),
    };
    table.floor("an idle stream, per second at its replica", each.leader * 1e4, "us");
    Ok(each)
}

/// Enrols the fleet: CPU time of all three replicas together, and memory.
async fn enrol(table: &mut Table, bench: &mut Bench, maker: &Arc<Maker>, count: usize) -> Result<Vec<Enrolled>> {
    let tpms = tpms(count, maker)?;
    let (spent, resident, started) = (bench.spent()?, bench.resident()?, Instant::now());
    let nodes = bench.enrol("fleet", tpms, maker).await?;
    let wall = started.elapsed().as_secs_f64();
    // Evidence is copied in the background.
    tokio::time::sleep(Duration::from_secs(2)).await;
    let after = bench.spent()?;
    let each: Vec<f64> = after.iter().zip(&spent).map(|(a, b)| a.saturating_sub(*b).as_secs_f64()).collect();
    let total = each.iter().sum::<f64>() * 1e6 / count as f64;
    table.floor(&format!("{count} nodes (EK P-256) enrolled over gRPC, wall clock"), wall, "s");
    table.floor("CPU time of an enrolment, all three replicas together", total, "us");
    let grown = bench.resident()?.saturating_sub(resident) as f64 / 1024.0 / count as f64;
    table.figure("resident memory of the leader, growth per enrolled node", grown, "KiB", Target::AtMost(8.0));
    Ok(nodes)
}

/// The whole fleet attests.
async fn attest(table: &mut Table, bench: &mut Bench, nodes: Vec<Enrolled>, idle: &Share, empty: &Share) -> Result<()> {
    let (count, resident) = (nodes.len(), bench.resident()?);
    let counts = Arc::new(Counts::default());
    let started = Instant::now();
    let mut streams = bench.connect(nodes, &counts).await?;
    table.floor(&format!("{count} streams opened, wall clock"), started.elapsed().as_secs_f64(), "s");
    // Every node had its turn once, and what opening them all took is over.
    tokio::time::sleep(Duration::from_secs(u64::from(INTERVAL_S) + 5)).await;
    let grown = bench.resident()?.saturating_sub(resident) as f64 / 1024.0 / (count / REPLICAS).max(1) as f64;
    table.floor("resident memory of a replica, per open stream", grown, "KiB");
    let (before, window) = (counts.answers(), Instant::now());
    let share = bench.share(WINDOW).await?;
    let rounds = (counts.answers() - before) as f64 / window.elapsed().as_secs_f64();
    let mut lost = 0;
    while let Some(ended) = streams.try_join_next() {
        lost += 1;
        eprintln!("a stream ended: {ended:?}");
    }
    let fresh = bench.fresh().await?;
    let waiting = idle.leader * count as f64 / REPLICAS as f64;
    let part = share.leader - empty.leader - waiting;
    table.floor(&format!("rounds of {count} nodes"), rounds, "a second");
    table.figure(
        "nodes with a verdict within the last interval and 5 s",
        fresh as f64,
        "nodes",
        Target::AtLeast(count as f64),
    );
    table.figure("streams lost", f64::from(lost), "streams", Target::AtMost(0.0));
    let name = format!("leader, {count} nodes attest every {INTERVAL_S} s, all in all");
    table.figure(&name, share.leader, "% of a core", Target::AtMost(5.0));
    table.floor("  of it: raft and ticks, without nodes", empty.leader, "% of a core");
    table.floor("  of it: its idle streams", waiting, "% of a core");
    table.figure("  of it: re-attestation", part, "% of a core", Target::AtMost(5.0));
    let streams_all = idle.all * count as f64;
    let each = (share.all - empty.all - streams_all) * 1e4 / rounds.max(1.0);
    table.floor("a round end to end, all three replicas together", each, "us");
    drop(streams);
    Ok(())
}

impl Bench {
    /// Nodes of the fleet whose last verdict is as new as it must be.
    async fn fresh(&self) -> Result<usize> {
        let mut client =
            NodeAttestationClient::new(self.cell.admin(self.leader).await?).max_decoding_message_size(NODES_BYTES_MAX);
        let nodes = client.list_nodes(v1::ListNodesRequest {}).await?.into_inner().nodes;
        let now = u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis())?;
        let since = now.saturating_sub(u64::from(INTERVAL_S + 5) * 1_000);
        let good = |n: &&v1::Node| n.cluster == "fleet" && n.state == "admitted" && n.last_verdict_ms >= since;
        Ok(nodes.iter().filter(good).count())
    }
}
