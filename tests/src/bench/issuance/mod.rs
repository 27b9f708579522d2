//! `cargo xtask bench issuance`: a cell of three replicas beside cfssl, on this machine, in turn.
//!
//! Ours commits each leaf's record at three replicas and speaks gRPC over mutual TLS; cfssl is one process without any
//! consensus, over HTTP in plaintext. What is compared is certificates per second of CPU time, that of all replicas together.

mod cfssl;
mod ours;

use super::cpu::{self, Meter};
use super::table::{Table, Target};
use ambit_identity::Csr;
use anyhow::{Context, Result, ensure};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_ASN1, ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair as _, UnparsedPublicKey,
};
use cfssl::Cfssl;
use ours::{Asker, Ours};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tokio::task::JoinSet;

/// Rounds of each load; the figures are medians of them.
const ROUNDS: usize = 3;
const BATCH: usize = 32;
/// Batches under way at once, each of another node.
const BATCHES_AT_ONCE: usize = 16;
const CONNECTIONS: usize = 32;
/// Certificates in a round.
const IN_BATCHES: usize = 25_600;
const ONE_BY_ONE: usize = 9_600;
const CSRS: usize = 1_024;
const HALF_LOAD_FOR: Duration = Duration::from_secs(15);
const RESTARTS: usize = 3;
const FLOOR_COUNT: usize = 3_000;

/// How one load went.
struct Outcome {
    per_cpu_second: f64,
    per_second: f64,
    p99_ms: f64,
}

pub(super) async fn run(table: &mut Table) -> Result<()> {
    let version = cfssl::version()?;
    let csrs = Arc::new(ours::csrs(CSRS)?);
    floor(table, &csrs)?;
    let mut ours = Ours::start().await?;
    restarts(table, &mut ours).await?;
    ours.connect().await?;
    ours.judge(&csrs).await?;
    let theirs = Cfssl::start().await?;
    let pems = Arc::new(csrs.iter().map(|der| pem(der)).collect::<Vec<String>>());
    table.head(&format!("Ours (3 replicas, mutual TLS, committed) and {version} (one process, HTTP): P-256"));
    let (mut batches, mut singles, mut cfssls) = (Vec::new(), Vec::new(), Vec::new());
    for round in 1..=ROUNDS {
        let in_batches = ours.asker(BATCH, ours::NODES, &csrs);
        batches.push(load(&mut ours, &in_batches, BATCHES_AT_ONCE, IN_BATCHES).await?);
        let one_by_one = ours.asker(1, CONNECTIONS, &csrs);
        singles.push(load(&mut ours, &one_by_one, CONNECTIONS, ONE_BY_ONE).await?);
        cfssls.push(cfssl_load(&theirs, &pems).await?);
        eprintln!("round {round} of {ROUNDS} done, load average {}", cpu::load()?);
    }
    print(table, &batches, &singles, &cfssls);
    drop(theirs);
    half_load(table, &ours, &csrs, median(&batches, |o| o.per_second)).await?;
    again(table, &mut ours, &csrs).await
}

fn print(table: &mut Table, batches: &[Outcome], singles: &[Outcome], cfssls: &[Outcome]) {
    let cpu = |all: &[Outcome]| median(all, |o| o.per_cpu_second);
    let theirs = cpu(cfssls);
    table.figure("certificates per CPU-second, in batches of 32", cpu(batches), "/CPU-s", Target::AtLeast(5_000.0));
    table.floor("  per second of the clock, the clients on the same cores", median(batches, |o| o.per_second), "/s");
    table.floor("  p99 of a batch at full load", median(batches, |o| o.p99_ms), "ms");
    let name = format!("certificates per CPU-second, one by one, {CONNECTIONS} connections");
    table.ratio(&name, "/CPUs", cpu(singles), &[("cfssl", theirs)], Target::AtLeast(1.0));
    let wall = |all: &[Outcome]| median(all, |o| o.per_second);
    table.ratio("  per second of the clock", "/s", wall(singles), &[("cfssl", wall(cfssls))], Target::None);
    let p99 = |all: &[Outcome]| median(all, |o| o.p99_ms);
    table.ratio("  p99 at full load", "ms", p99(singles), &[("cfssl", p99(cfssls))], Target::None);
}

fn median(all: &[Outcome], of: impl Fn(&Outcome) -> f64) -> f64 {
    let mut all: Vec<f64> = all.iter().map(of).collect();
    all.sort_unstable_by(f64::total_cmp);
    all.get(all.len() / 2).copied().unwrap_or(f64::NAN)
}

/// What no issuer goes below: a request's signature verified and another made, by the library alone and as we read requests.
fn floor(table: &mut Table, csrs: &[Vec<u8>]) -> Result<()> {
    table.head("The floor, in one thread");
    let rng = SystemRandom::new();
    let key = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_ASN1_SIGNING)?;
    let message = [0x5a; 200];
    let signature = key.sign(&rng, &message)?;
    let public = UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, key.public_key().as_ref().to_vec());
    let (mut bare, mut reading) = (Meter::default(), Meter::default());
    for n in 0..FLOOR_COUNT {
        bare.once(|| {
            public.verify(&message, signature.as_ref())?;
            Ok(key.sign(&rng, &message)?)
        })?;
        let csr = csrs.get(n % csrs.len()).context("a request")?;
        reading.once(|| Ok(Csr::parse(csr)?))?;
    }
    table.floor("a P-256 signature verified and one made", bare.micros(), "us");
    table.floor("  that many certificates a CPU-second", bare.per_second(), "/CPU-s");
    table.floor("a request read and its signature verified", reading.micros(), "us");
    Ok(())
}

async fn restarts(table: &mut Table, ours: &mut Ours) -> Result<()> {
    table.head("A replica with 100,000 entries");
    let started = Instant::now();
    ours.create_entries().await?;
    table.floor(&format!("{} entries written, 1,000 a request", Ours::entries()), started.elapsed().as_secs_f64(), "s");
    let mut all = Vec::new();
    for _ in 0..RESTARTS {
        all.push(ours.restart().await?.as_secs_f64());
    }
    let slowest = all.iter().copied().fold(0.0, f64::max);
    let name = format!("killed and started again, to its first read, the slowest of {RESTARTS}");
    table.figure(&name, slowest, "s", Target::AtMost(3.0));
    Ok(())
}

/// `certificates` by `at_once` requests in a closed loop.
async fn load(ours: &mut Ours, asker: &Asker, at_once: usize, certificates: usize) -> Result<Outcome> {
    // Connections, caches and the replicas' timers in their stride.
    drive(asker, at_once, at_once).await?;
    let batch = asker.ask().await?.len();
    let (spent, started) = (ours.bench.spent()?, Instant::now());
    let latencies = drive(asker, at_once, certificates / batch).await?;
    let wall = started.elapsed().as_secs_f64();
    let each: Vec<f64> =
        ours.bench.spent()?.iter().zip(&spent).map(|(a, b)| a.saturating_sub(*b).as_secs_f64()).collect();
    let (made, cpu) = ((latencies.len() * batch) as f64, each.iter().sum::<f64>());
    let us: Vec<String> = each.iter().map(|s| format!("{:.0}", s * 1e6 / made)).collect();
    let (leader, retries) = (ours.bench.cell.leader().await?, asker.retries.load(Ordering::Relaxed));
    eprintln!(
        "ours, {batch} a request: {:.0}/CPU-s, {:.0}/s, CPU by replica {} us (leader {leader}), {retries} retries",
        made / cpu,
        made / wall,
        us.join(" "),
    );
    Ok(Outcome { per_cpu_second: made / cpu, per_second: made / wall, p99_ms: p99(latencies)? })
}

async fn drive(asker: &Asker, at_once: usize, requests: usize) -> Result<Vec<Duration>> {
    let (left, mut tasks) = (Arc::new(AtomicUsize::new(requests)), JoinSet::new());
    for _ in 0..at_once {
        let (left, asker) = (left.clone(), asker.clone());
        tasks.spawn(async move {
            let mut latencies = Vec::new();
            while left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1)).is_ok() {
                let asked = Instant::now();
                asker.ask().await?;
                latencies.push(asked.elapsed());
            }
            anyhow::Ok(latencies)
        });
    }
    let mut all = Vec::with_capacity(requests);
    while let Some(one) = tasks.join_next().await {
        all.extend(one??);
    }
    Ok(all)
}

async fn cfssl_load(theirs: &Cfssl, pems: &Arc<Vec<String>>) -> Result<Outcome> {
    let (left, mut tasks) = (Arc::new(AtomicUsize::new(ONE_BY_ONE)), JoinSet::new());
    let mut connections = Vec::new();
    for _ in 0..CONNECTIONS {
        let mut connection = theirs.connect().await?;
        connection.sign(pems.first().context("a request")?).await?;
        connections.push(connection);
    }
    let (spent, started) = (cpu::of_process(theirs.id())?, Instant::now());
    for mut connection in connections {
        let (left, pems) = (left.clone(), pems.clone());
        tasks.spawn(async move {
            let mut latencies = Vec::new();
            while let Ok(n) = left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1)) {
                let asked = Instant::now();
                connection.sign(pems.get(n % pems.len()).context("a request")?).await?;
                latencies.push(asked.elapsed());
            }
            anyhow::Ok(latencies)
        });
    }
    let mut latencies = Vec::new();
    while let Some(one) = tasks.join_next().await {
        latencies.extend(one??);
    }
    let (wall, spent) = (started.elapsed(), cpu::of_process(theirs.id())?.saturating_sub(spent));
    let made = latencies.len() as f64;
    let (per_cpu_second, per_second) = (made / spent.as_secs_f64(), made / wall.as_secs_f64());
    eprintln!("cfssl: {per_cpu_second:.0}/CPU-s, {per_second:.0}/s");
    Ok(Outcome { per_cpu_second, per_second, p99_ms: p99(latencies)? })
}

/// Requests at instants that do not wait for answers, at half of what the cell took; a late answer counts as late.
async fn half_load(table: &mut Table, ours: &Ours, csrs: &Arc<Vec<Vec<u8>>>, full: f64) -> Result<()> {
    let asker = ours.asker(BATCH, ours::NODES, csrs);
    let every = Duration::from_secs_f64(BATCH as f64 * 2.0 / full);
    let (mut tasks, mut latencies, started) = (JoinSet::new(), Vec::new(), tokio::time::Instant::now());
    let mut due = started;
    while started.elapsed() < HALF_LOAD_FOR {
        tokio::time::sleep_until(due).await;
        let (asker, asked) = (asker.clone(), due);
        tasks.spawn(async move {
            asker.ask().await?;
            anyhow::Ok(asked.elapsed())
        });
        due += every;
        while let Some(one) = tasks.try_join_next() {
            latencies.push(one??);
        }
    }
    while let Some(one) = tasks.join_next().await {
        latencies.push(one??);
    }
    let name = format!("p99 of a batch at half load ({:.0} certificates a second)", full / 2.0);
    table.figure(&name, p99(latencies)?, "ms", Target::AtMost(25.0));
    Ok(())
}

/// Every workload of every node gets a new leaf, as after a taint.
async fn again(table: &mut Table, ours: &mut Ours, csrs: &Arc<Vec<Vec<u8>>>) -> Result<()> {
    let (asker, started) = (ours.asker(BATCH, ours::NODES, csrs), Instant::now());
    let requests = Ours::entries().div_ceil(BATCH);
    drive(&asker, BATCHES_AT_ONCE, requests).await?;
    let name = format!("{} leaves issued anew, wall clock", requests * BATCH);
    table.figure(&name, started.elapsed().as_secs_f64(), "s", Target::AtMost(60.0));
    Ok(())
}

fn p99(mut latencies: Vec<Duration>) -> Result<f64> {
    ensure!(!latencies.is_empty(), "nothing was measured");
    latencies.sort_unstable();
    let at = (latencies.len() * 99 / 100).min(latencies.len() - 1);
    Ok(latencies.get(at).context("a latency")?.as_secs_f64() * 1e3)
}

fn pem(der: &[u8]) -> String {
    use base64::Engine as _;
    use std::fmt::Write as _;
    let encoded = base64::engine::general_purpose::STANDARD.encode(der);
    let mut out = "-----BEGIN CERTIFICATE REQUEST-----\n".to_owned();
    for line in encoded.as_bytes().chunks(64) {
        let _ = writeln!(out, "{}", String::from_utf8_lossy(line));
    }
    out + "-----END CERTIFICATE REQUEST-----\n"
}
