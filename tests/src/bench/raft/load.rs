//! Clients in a closed loop: each sends its next request when the last is answered.

use super::System;
use crate::bench::cpu;
use anyhow::{Context, Result, bail, ensure};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::task::JoinSet;
use tonic::Status;

/// A request that fails is sent again so often, under the same name, and all of it counts as its latency.
const ATTEMPTS_MAX: u32 = 200;
const RETRY_AFTER: Duration = Duration::from_millis(5);

/// A connection to one member. Clones share it.
pub(super) trait Client: Clone + Send + 'static {
    /// Writes object `n`; the same object again is no second write.
    fn put(&mut self, n: u64) -> impl Future<Output = Result<(), Status>> + Send;
    /// Reads object `n`, linearizably.
    fn get(&mut self, n: u64) -> impl Future<Output = Result<(), Status>> + Send;
}

/// What the clients do.
#[derive(Clone, Copy, Debug)]
pub(super) enum Verb {
    /// Objects from this one on, each once.
    Put { first: u64 },
    /// Any of the first so many objects.
    Get { of: u64 },
}

/// How one run went.
#[derive(Clone, Copy, Debug)]
pub(super) struct Outcome {
    pub(super) per_second: f64,
    pub(super) p50_ms: f64,
    pub(super) p99_ms: f64,
    /// CPU time of all members together, microseconds an operation.
    pub(super) cpu_us: f64,
    /// The same of the clients, which are this process.
    pub(super) clients_us: f64,
    pub(super) retries: u64,
}

/// Runs `operations` by `at_once` clients over these connections, and measures the members meanwhile.
pub(super) async fn run<S: System>(
    system: &mut S,
    connections: &[S::Client],
    verb: Verb,
    at_once: usize,
    operations: u64,
) -> Result<Outcome> {
    let (next, retries) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let (spent, clients_spent) = (members_cpu(system)?, cpu::of_process(std::process::id())?);
    let started = Instant::now();
    let mut clients = JoinSet::new();
    for number in 0..at_once {
        let connection = connections.get(number % connections.len()).context("a connection")?.clone();
        let counts = (next.clone(), retries.clone());
        clients.spawn(client(connection, verb, operations, counts));
    }
    let mut latencies = Vec::with_capacity(usize::try_from(operations)?);
    while let Some(done) = clients.join_next().await {
        latencies.extend(done??);
    }
    let elapsed = started.elapsed().as_secs_f64();
    let spent = members_cpu(system)?.saturating_sub(spent);
    let clients_spent = cpu::of_process(std::process::id())?.saturating_sub(clients_spent);
    let each_us = |spent: Duration| spent.as_secs_f64() * 1e6 / operations as f64;
    ensure!(latencies.len() as u64 == operations, "{} of {operations} operations", latencies.len());
    latencies.sort_unstable();
    Ok(Outcome {
        per_second: operations as f64 / elapsed,
        p50_ms: quantile_ms(&latencies, 50)?,
        p99_ms: quantile_ms(&latencies, 99)?,
        cpu_us: each_us(spent),
        clients_us: each_us(clients_spent),
        retries: retries.load(Ordering::Relaxed),
    })
}

async fn client(
    mut connection: impl Client,
    verb: Verb,
    operations: u64,
    (next, retries): (Arc<AtomicU64>, Arc<AtomicU64>),
) -> Result<Vec<Duration>> {
    let mut latencies = Vec::new();
    loop {
        let n = next.fetch_add(1, Ordering::Relaxed);
        if n >= operations {
            return Ok(latencies);
        }
        let (started, mut attempts) = (Instant::now(), 0);
        loop {
            let answer = match verb {
                Verb::Put { first } => connection.put(first + n).await,
                Verb::Get { of } => connection.get(scattered(n) % of).await,
            };
            let Err(status) = answer else { break };
            attempts += 1;
            retries.fetch_add(1, Ordering::Relaxed);
            if attempts == ATTEMPTS_MAX {
                bail!("{verb:?}, operation {n}: {status:?}");
            }
            tokio::time::sleep(RETRY_AFTER).await;
        }
        latencies.push(started.elapsed());
    }
}

/// SplitMix64: the same objects in the same order for everybody.
fn scattered(n: u64) -> u64 {
    let mut z = n.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn members_cpu<S: System>(system: &mut S) -> Result<Duration> {
    (1..=super::MEMBERS).map(|n| cpu::of_process(system.process(n)?.id())).sum()
}

/// Of sorted latencies.
pub(super) fn quantile_ms(sorted: &[Duration], percent: usize) -> Result<f64> {
    let at = (sorted.len() * percent / 100).min(sorted.len().saturating_sub(1));
    Ok(sorted.get(at).context("a latency")?.as_secs_f64() * 1e3)
}
