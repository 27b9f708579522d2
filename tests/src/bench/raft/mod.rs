//! `cargo xtask bench raft`: a cell of ours beside etcd, three members each on this machine, in turn.
//!
//! Both write to the same disk and sync each write; both run with the same timers; the same clients speak to both over as
//! many warm connections, spread over all members. etcd runs twice: with mutual TLS as ours, which is what is compared,
//! and in plaintext beside it.

mod etcd;
mod load;
mod ours;
mod outage;

use super::cpu;
use super::table::{Table, Target};
use crate::process::Started;
use anyhow::{Context, Result, ensure};
use etcd::Etcd;
use load::{Client, Outcome, Verb};
use ours::Ours;
use outage::Loss;
use std::time::Duration;

const MEMBERS: usize = 3;
const ELECTION_MS: u64 = 300;
const HEARTBEAT_MS: u64 = 50;
/// etcd's value, and the message of our entry.
const VALUE_BYTES: usize = 256;
/// Connections, however many clients share them.
const CONNECTIONS: usize = 16;
/// Pairs; the figures are medians of them.
const ROUNDS: usize = 3;
const WARM_UP: u64 = 1_000;
/// Clients at once, writes and reads of a round. All writes together make more than 100,000 Raft entries.
const LOADS: [(usize, u64, u64); 3] = [(1, 1_500, 2_000), (100, 12_000, 12_000), (1_000, 20_000, 20_000)];
const KILLS: usize = 30;
/// A stopped leader says nothing: only the election timers count, the same in both.
const STOPS: usize = 10;
const RESTARTS: usize = 5;
const RAFT_ENTRIES_MIN: u64 = 100_000;

/// A replicated store under test. Members are numbered from 1.
trait System {
    type Client: Client;
    /// A new connection to a member.
    async fn connect(&self, member: usize) -> Result<Self::Client>;
    /// Who leads, once those who run agree on it.
    async fn leader(&self) -> Result<usize>;
    /// `kill -9`.
    fn kill(&mut self, member: usize) -> Result<()>;
    /// Starts a killed member again.
    fn restart(&mut self, member: usize) -> Result<()>;
    /// The process of a member.
    fn process(&mut self, member: usize) -> Result<&mut Started>;
}

/// A system, its warm connections, and what was written to it.
struct Subject<S: System> {
    system: S,
    connections: Vec<S::Client>,
    written: u64,
}

impl<S: System> Subject<S> {
    async fn new(system: S) -> Result<Self> {
        let mut connections = Vec::new();
        for n in 0..CONNECTIONS {
            connections.push(system.connect(n % MEMBERS + 1).await?);
        }
        let mut subject = Subject { system, connections, written: 0 };
        subject.put(CONNECTIONS, WARM_UP).await?;
        subject.get(CONNECTIONS, WARM_UP).await?;
        Ok(subject)
    }

    async fn put(&mut self, clients: usize, count: u64) -> Result<Outcome> {
        let verb = Verb::Put { first: self.written };
        self.written += count;
        self.run(verb, clients, count).await
    }
    async fn get(&mut self, clients: usize, count: u64) -> Result<Outcome> {
        self.run(Verb::Get { of: self.written }, clients, count).await
    }

    async fn run(&mut self, verb: Verb, clients: usize, count: u64) -> Result<Outcome> {
        if clients > 1 {
            return load::run(&mut self.system, &self.connections, verb, clients, count).await;
        }
        // One client is at the leader, in both systems: what forwarding costs would be chance otherwise.
        let mut client = self.system.connect(self.system.leader().await?).await?;
        client.get(0).await?;
        load::run(&mut self.system, &[client], verb, clients, count).await
    }

    /// The largest member, MB.
    fn resident_mb(&mut self) -> Result<f64> {
        let mut all = Vec::new();
        for member in 1..=MEMBERS {
            all.push(self.system.process(member)?.resident()?);
        }
        Ok(all.into_iter().max().context("a member")? as f64 / 1e6)
    }
}

/// Outcomes of one load, by round, in each of the three.
#[derive(Default)]
struct Measured {
    ours: Vec<Outcome>,
    etcd: Vec<Outcome>,
    plain: Vec<Outcome>,
}

impl Measured {
    /// Medians of one figure.
    fn medians(&self, of: impl Fn(&Outcome) -> f64) -> [f64; 3] {
        [&self.ours, &self.etcd, &self.plain].map(|all| median(all.iter().map(&of).collect()))
    }
}

struct Bench {
    ours: Subject<Ours>,
    etcd: Subject<Etcd>,
    plain: Subject<Etcd>,
}

/// Load and memory; and `outages` too, if they are asked for.
pub(super) async fn run(table: &mut Table, outages: bool) -> Result<()> {
    let version = etcd::version()?;
    let disk = disk()?;
    let mut bench = Bench {
        ours: Subject::new(Ours::start().await?).await?,
        etcd: Subject::new(Etcd::start(true).await?).await?,
        plain: Subject::new(Etcd::start(false).await?).await?,
    };
    table.head(&format!(
        "Ours and {version}: {MEMBERS} members each, {VALUE_BYTES} B, {disk}, timers {HEARTBEAT_MS}/{ELECTION_MS} ms"
    ));
    println!(
        "  clients over {CONNECTIONS} connections to all members (one client: to the leader); etcd with mutual TLS, as ours"
    );
    let (mut puts, mut gets) = ([(); 3].map(|()| Measured::default()), [(); 3].map(|()| Measured::default()));
    for round in 1..=ROUNDS {
        for (at, (clients, writes, reads)) in LOADS.into_iter().enumerate() {
            bench.one_load(puts.get_mut(at).context("a load")?, clients, writes, true).await?;
            bench.one_load(gets.get_mut(at).context("a load")?, clients, reads, false).await?;
        }
        eprintln!("round {round} of {ROUNDS} done, load average {}", cpu::load()?);
    }
    for (at, (clients, _, _)) in LOADS.into_iter().enumerate() {
        print(table, "put", clients, puts.get(at).context("a load")?);
    }
    for (at, (clients, _, _)) in LOADS.into_iter().enumerate() {
        print(table, "linearizable get", clients, gets.get(at).context("a load")?);
    }
    bench.memory(table)?;
    if outages {
        bench.restarts(table).await?;
        bench.failovers(table).await?;
    }
    Ok(())
}

impl Bench {
    async fn one_load(&mut self, into: &mut Measured, clients: usize, count: u64, write: bool) -> Result<()> {
        let spent = self.ours.counters()?;
        if write {
            into.ours.push(self.ours.put(clients, count).await?);
            into.etcd.push(self.etcd.put(clients, count).await?);
            into.plain.push(self.plain.put(clients, count).await?);
        } else {
            into.ours.push(self.ours.get(clients, count).await?);
            into.etcd.push(self.etcd.get(clients, count).await?);
            into.plain.push(self.plain.get(clients, count).await?);
        }
        let told = |o: Option<&Outcome>| {
            o.map_or(String::new(), |o| {
                format!(
                    "{:.0}/s p50 {:.2} p99 {:.1} ms, {:.0} us CPU, {} retries",
                    o.per_second, o.p50_ms, o.p99_ms, o.cpu_us, o.retries
                )
            })
        };
        let verb = if write { "put" } else { "get" };
        eprintln!("{verb}@{clients}: ours {}", told(into.ours.last()));
        eprintln!("{verb}@{clients}: etcd {}; plaintext {}", told(into.etcd.last()), told(into.plain.last()));
        eprintln!("  {}", self.ours.counters()?.since(&spent, count));
        Ok(())
    }

    fn memory(&mut self, table: &mut Table) -> Result<()> {
        let name = format!("resident memory of the largest member after {} writes", self.ours.written);
        let (ours, etcd, plain) = (self.ours.resident_mb()?, self.etcd.resident_mb()?, self.plain.resident_mb()?);
        table.ratio(&name, "MB", ours, &[("etcd", etcd), ("plaintext", plain)], Target::AtMost(0.6));
        Ok(())
    }

    async fn restarts(&mut self, table: &mut Table) -> Result<()> {
        let index = self.ours.system.last_index(1).await?;
        ensure!(index >= RAFT_ENTRIES_MIN, "only {index} Raft entries");
        let (mut ours, mut etcd) = (Vec::new(), Vec::new());
        for _ in 0..RESTARTS {
            ours.push(outage::restart(&mut self.ours.system).await?.as_secs_f64());
            etcd.push(outage::restart(&mut self.etcd.system).await?.as_secs_f64());
        }
        let slowest = ours.iter().copied().fold(0.0, f64::max);
        let (ours, etcd) = (median(ours), median(etcd));
        table.ratio(
            &format!("restart of a member with {index} Raft entries"),
            "s",
            ours,
            &[("etcd", etcd)],
            Target::None,
        );
        table.figure(&format!("  the slowest of {RESTARTS}"), slowest, "s", Target::AtMost(2.0));
        Ok(())
    }

    async fn failovers(&mut self, table: &mut Table) -> Result<()> {
        let killed = ("failover, leader killed to next write", Loss::Killed, KILLS, Target::AtMost(0.9));
        let stopped = ("failover, leader stopped (SIGSTOP) to next write", Loss::Stopped, STOPS, Target::None);
        for (name, loss, times, target) in [killed, stopped] {
            let (mut ours, mut etcd) = (Vec::new(), Vec::new());
            for _ in 0..times {
                let took = outage::failover(&mut self.ours.system, loss, &mut self.ours.written).await?;
                ours.push(took.as_secs_f64() * 1e3);
                let took = outage::failover(&mut self.etcd.system, loss, &mut self.etcd.written).await?;
                etcd.push(took.as_secs_f64() * 1e3);
            }
            let max = |all: &[f64]| all.iter().copied().fold(0.0, f64::max);
            let (ours_max, etcd_max) = (max(&ours), max(&etcd));
            let name = format!("{name}, {times} times, p50");
            table.ratio(&name, "ms", median(ours), &[("etcd", median(etcd))], target);
            table.ratio("  max", "ms", ours_max, &[("etcd", etcd_max)], Target::None);
        }
        Ok(())
    }
}

/// What our three members counted, for the profile.
struct Counters {
    syncs: f64,
    sync_s: f64,
    cpu: Vec<Duration>,
}

impl Subject<Ours> {
    fn counters(&mut self) -> Result<Counters> {
        let mut sum = Counters { syncs: 0.0, sync_s: 0.0, cpu: Vec::new() };
        for member in 1..=MEMBERS {
            sum.syncs += self.system.metric(member, "ambit_raft_fsyncs_total")?;
            sum.sync_s += self.system.metric(member, "ambit_raft_fsync_seconds_total")?;
            sum.cpu.push(cpu::of_process(self.system.process(member)?.id())?);
        }
        Ok(sum)
    }
}

impl Counters {
    fn since(&self, before: &Counters, operations: u64) -> String {
        let syncs = self.syncs - before.syncs;
        let each = (self.sync_s - before.sync_s) * 1e6 / syncs.max(1.0);
        let cpu: Vec<String> = self
            .cpu
            .iter()
            .zip(&before.cpu)
            .map(|(a, b)| format!("{:.0}", a.saturating_sub(*b).as_secs_f64() * 1e6 / operations as f64))
            .collect();
        format!(
            "ours: {syncs:.0} syncs of {each:.0} us, {:.1} operations a member's sync, CPU by member {} us",
            operations as f64 * MEMBERS as f64 / syncs.max(1.0),
            cpu.join(" ")
        )
    }
}

fn print(table: &mut Table, verb: &str, clients: usize, measured: &Measured) {
    let name = format!("{verb}, {clients} client{}", if clients == 1 { "" } else { "s" });
    let write = verb == "put";
    let (rate, p99) = match (write, clients) {
        (true, 1) => (Target::AtLeast(1.2), Target::None),
        (true, 1_000) => (Target::AtLeast(2.0), Target::AtMost(0.6)),
        (_, 100) => (Target::AtLeast(1.5), Target::None),
        (_, _) => (Target::None, Target::None),
    };
    let mut row = |name: &str, unit, of: &dyn Fn(&Outcome) -> f64, target| {
        let [ours, etcd, plain] = measured.medians(of);
        table.ratio(name, unit, ours, &[("etcd", etcd), ("plaintext", plain)], target);
    };
    row(&name, "ops/s", &|o| o.per_second, rate);
    row("  p50", "ms", &|o| o.p50_ms, Target::None);
    row("  p99", "ms", &|o| o.p99_ms, p99);
    row("  CPU of all members, an operation", "us", &|o| o.cpu_us, Target::None);
    row("  CPU of the clients, an operation", "us", &|o| o.clients_us, Target::None);
}

fn median(mut all: Vec<f64>) -> f64 {
    all.sort_unstable_by(f64::total_cmp);
    all.get(all.len() / 2).copied().unwrap_or(f64::NAN)
}

/// The file system that both write to: in memory, a sync would cost neither of them anything.
fn disk() -> Result<String> {
    let folder = std::env::temp_dir();
    let kind = nix::sys::statfs::statfs(&folder)?.filesystem_type();
    ensure!(
        kind != nix::sys::statfs::TMPFS_MAGIC,
        "{} is in memory: set TMPDIR to a folder on a disk",
        folder.display()
    );
    let ext4 = kind == nix::sys::statfs::EXT4_SUPER_MAGIC;
    Ok(if ext4 { "ext4".to_owned() } else { format!("file system {kind:?}") })
}
