//! The writer probe: one new entry this often, each under one request id, sent again until it is acknowledged.

use super::figures::Sample;
use super::ledger::{Write, entry_name};
use super::spec::Writer;
use super::watch::{Clock, Samples};
use crate::cell::{Cell, request_id};
use crate::{ask, ask_at};
use ambit_model::{Code, Refusal};
use ambit_proto::v1;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};

/// Writes under way at once. An outage fills this and no more; ticks without room are skipped, never queued (I17).
const IN_FLIGHT_MAX: usize = 64;
/// A replica that says nothing for this long is passed over.
const ATTEMPT_TIMEOUT: Duration = Duration::from_millis(400);
/// Between attempts of one write, doubled up to the second. All writes under way together still ask every 10 ms or so.
const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_millis(250);
/// After the end of the probe a write under way gets this long to learn its fate.
const GRACE: Duration = Duration::from_secs(5);
/// Entries deleted by one request.
const DELETE_BATCH: usize = 500;
/// No agent may run these entries, so no agent is burdened with them.
const NO_NODE: &str = "0000000000000000000000000000000000000000000000000000000000000000";

/// A running probe.
pub struct Running {
    stop: watch::Sender<bool>,
    generator: JoinHandle<Vec<Write>>,
}

/// Starts the probe. `run` distinguishes this drill's entries from all others.
pub async fn start(
    cell: Cell,
    writer: &Writer,
    run: String,
    clock: Clock,
    samples: Samples,
) -> Result<Running, Refusal> {
    let cluster = own_cluster(&cell).await?;
    let (stop, stopped) = watch::channel(false);
    let job = Job { cell, run, cluster, clock, samples, stopped };
    let generator = tokio::spawn(generate(Arc::new(job), writer.every.duration()));
    Ok(Running { stop, generator })
}

impl Running {
    /// Stops sending, waits for the writes under way and gives the ledger, in order.
    pub async fn stop(self) -> Vec<Write> {
        // No receiver is left only where the generator is gone, and then the ledger is empty.
        let _ = self.stop.send(true);
        self.generator.await.unwrap_or_default()
    }
}

/// Everything that a write needs.
struct Job {
    cell: Cell,
    run: String,
    cluster: String,
    clock: Clock,
    samples: Samples,
    stopped: watch::Receiver<bool>,
}

async fn own_cluster(cell: &Cell) -> Result<String, Refusal> {
    let own = cell.context().trust_domain.to_string();
    let clusters = ask!(cell, ClusterRegistry.list_clusters(v1::ListClustersRequest {}))?.clusters;
    let cluster = clusters.into_iter().find(|c| c.trust_domain == own);
    cluster
        .map(|c| c.name)
        .ok_or_else(|| Refusal::new(Code::DrillGuard, format!("a cluster whose home is {own}"), "none"))
}

async fn generate(job: Arc<Job>, every: Duration) -> Vec<Write> {
    let room = Arc::new(Semaphore::new(IN_FLIGHT_MAX));
    let ledger = Arc::new(Mutex::new(Vec::new()));
    let mut ticks = interval(every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let mut stopped = job.stopped.clone();
    let mut number = 0;
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            _ = stopped.wait_for(|s| *s) => break,
        }
        match room.clone().try_acquire_owned() {
            Ok(permit) => {
                tokio::spawn(write(job.clone(), number, permit, ledger.clone()));
                number += 1;
            }
            Err(_full) => job.samples.push(Sample { t_ms: job.clock.ms(), ok: false, by: String::new() }),
        }
    }
    // All permits back: every write under way has written its line.
    let _ = timeout(GRACE + ATTEMPT_TIMEOUT, room.acquire_many(IN_FLIGHT_MAX as u32)).await;
    let mut writes: Vec<Write> = std::mem::take(&mut *ledger.lock().unwrap_or_else(PoisonError::into_inner));
    writes.sort_by_key(|w| w.number);
    writes
}

async fn write(job: Arc<Job>, number: u64, permit: OwnedSemaphorePermit, ledger: Arc<Mutex<Vec<Write>>>) {
    let mut line = Write { number, sent_ms: job.clock.ms(), acked_ms: None, attempts: 0, ran_again: false, listed: 0 };
    if let Ok(id) = request_id() {
        send_until_known(&job, id, &mut line).await;
    }
    ledger.lock().unwrap_or_else(PoisonError::into_inner).push(line);
    drop(permit);
}

async fn send_until_known(job: &Job, id: Vec<u8>, line: &mut Write) {
    let request = v1::BatchCreateEntryRequest { request_id: id, entries: vec![entry(job, line.number)] };
    let addresses = &job.cell.context().addresses;
    let mut grace_ends = None;
    let mut pause = PAUSE_MIN;
    loop {
        // Writes start at different replicas: any of them must accept one.
        let at = addresses[(line.number as usize + line.attempts as usize) % addresses.len()];
        line.attempts += 1;
        let outcome = attempt(job, at, request.clone()).await;
        let t_ms = job.clock.ms();
        job.samples.push(Sample { t_ms, ok: outcome.is_ok(), by: String::new() });
        match outcome {
            Ok(()) => {
                line.acked_ms = Some(t_ms);
                return;
            }
            // The same request, run a second time, finds its own entry (I10 broken). The write itself is there.
            Err(r) if r.code == Code::AlreadyExists => {
                line.ran_again = true;
                line.acked_ms = Some(t_ms);
                return;
            }
            Err(_) => {}
        }
        if *job.stopped.borrow() && Instant::now() > *grace_ends.get_or_insert(Instant::now() + GRACE) {
            return;
        }
        sleep(pause).await;
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

async fn attempt(job: &Job, at: SocketAddr, request: v1::BatchCreateEntryRequest) -> Result<(), Refusal> {
    let sent = async { ask_at!(job.cell, at, EntryRegistry.batch_create_entry(request.clone())) };
    let reply = match timeout(ATTEMPT_TIMEOUT, sent).await {
        Ok(reply) => reply?,
        Err(_elapsed) => return Err(Refusal::new(Code::Unavailable, "an answer in time", "none")),
    };
    match reply.results.as_slice() {
        [one] if one.code == "ok" => Ok(()),
        [one] => Err(Refusal::new(Code::from_text(&one.code).unwrap_or(Code::Internal), "", one.message.as_str())),
        _ => Err(Refusal::new(Code::Internal, "one result", reply.results.len().to_string())),
    }
}

fn entry(job: &Job, number: u64) -> v1::Entry {
    v1::Entry {
        id: entry_name(&job.run, number),
        // One identity for all: numbers of identities are never reused.
        spiffe_id: format!("spiffe://{}/drill/writer", job.cell.context().trust_domain),
        cluster: job.cluster.clone(),
        nodes: vec![NO_NODE.to_owned()],
        selectors: vec!["cgroup:drill".to_owned()],
        ttl_seconds: 0,
        federates_with: Vec::new(),
        ..v1::Entry::default()
    }
}

/// The ids of every entry of the cell.
pub async fn list(cell: &Cell) -> Result<Vec<String>, Refusal> {
    let entries = crate::verbs::entry::listed(cell, v1::ListEntriesRequest::default()).await?;
    Ok(entries.into_iter().map(|e| e.id).collect())
}

/// Deletes the entries of this run, whoever made them.
pub async fn clean_up(cell: &Cell, run: &str, listed: &[String]) -> Result<usize, Refusal> {
    let start = format!("drill-{run}-");
    let ours: Vec<String> = listed.iter().filter(|id| id.starts_with(&start)).cloned().collect();
    for ids in ours.chunks(DELETE_BATCH) {
        let items = ids.iter().map(|id| v1::EntryRemoval { id: id.clone(), expected_revision: 0 }).collect();
        let request = v1::BatchDeleteEntryRequest { request_id: request_id()?, items };
        ask!(cell, EntryRegistry.batch_delete_entry(request))?;
    }
    Ok(ours.len())
}
