//! Clients of the cell, from the operator's namespace: they write numbers to a few registers and read them, have
//! certificates issued, and ask the replicas how they are.
//!
//! A register is a policy of the cell; its value is part of the one identity in its `from`. Applying a policy replaces
//! it, and listing policies is a linearizable read of all registers at once.

use super::draw::Draw;
use super::observe::Views;
use crate::cell::Cell;
use crate::chaos::linear::{Did, Op};
use crate::lab::{Lab, LabError};
use crate::net;
use ambit::ask_at;
use ambit::cell::request_id;
use ambit::context::Context;
use ambit_identity::SvidKey;
use ambit_identity::keys::certificates_from_pem;
use ambit_identity::svid::verify_pinned;
use ambit_model::refusal::{Class, Code};
use ambit_model::{Refusal, Stamp};
use ambit_proto::v1;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

/// Registers; few, so that clients meet.
pub(super) const REGISTERS: u64 = 5;
/// Clients of the registers.
const CLIENTS: u64 = 10;
/// One request to one replica. Longer than an election, shorter than most faults.
const ATTEMPT_MAX: Duration = Duration::from_secs(1);
/// How often a patient client sends a write.
const ATTEMPTS_MAX: u64 = 8;
/// Between the attempts of one write.
const RETRY_AFTER: Duration = Duration::from_millis(60);
/// Operations kept, all registers together: an hour at full speed, and 300 MB.
const OPS_MAX: usize = 6_000_000;
/// Certificates are asked for this often, and each replica how it is.
const ISSUE_EVERY: Duration = Duration::from_millis(250);
const LOOK_EVERY: Duration = Duration::from_millis(60);
/// A replica that does not say how it is by then does not say it.
const LOOK_MAX: Duration = Duration::from_millis(400);
/// Surprises told; the first of them matter.
const SURPRISES_MAX: usize = 20;

/// Running clients.
pub(super) struct Clients {
    stop: watch::Sender<bool>,
    thread: JoinHandle<Result<(), LabError>>,
    job: Arc<Job>,
}

/// What they saw.
#[derive(Default)]
pub(super) struct Seen {
    /// By register.
    pub(super) ops: BTreeMap<u64, Vec<Op>>,
    /// Writes that were acknowledged.
    pub(super) acknowledged: u64,
    /// Writes of which nobody knows.
    pub(super) unanswered: u64,
    /// Acknowledged requests that were sent once more.
    pub(super) repeated: u64,
    /// Lists that were answered.
    pub(super) lists: u64,
    /// Serial numbers of certificates, each under its authority.
    pub(super) leaves: Vec<(String, String)>,
    /// Answers that no fault explains.
    pub(super) surprises: Vec<String>,
    full: bool,
}

struct Job {
    begun: Instant,
    site: String,
    seed: u64,
    addresses: Vec<SocketAddr>,
    fingerprint: [u8; 32],
    root: PathBuf,
    next: Mutex<BTreeMap<u64, u64>>,
    seen: Mutex<Seen>,
    views: Mutex<Views>,
}

impl Clients {
    /// Starts them. Times are counted from `begun`.
    pub(super) fn start(lab: &Lab, cell: &Cell, seed: u64, begun: Instant) -> Result<Clients, LabError> {
        let context = Context::read(&cell.context())?;
        let job = Arc::new(Job {
            begun,
            site: cell.site.clone(),
            seed,
            addresses: context.addresses.clone(),
            fingerprint: context.fingerprint,
            root: cell.root(),
            next: Mutex::default(),
            seen: Mutex::default(),
            views: Mutex::default(),
        });
        let (stop, stopped) = watch::channel(false);
        let (operator, shared) = (lab.operator().netns, job.clone());
        let thread = std::thread::spawn(move || {
            let work = move || -> Result<(), Refusal> {
                // One thread, so that every socket is made in the operator's namespace.
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
                let runtime = runtime.map_err(|e| Refusal::new(Code::Internal, "a runtime", e.to_string()))?;
                let open = |limit| ambit::cell::Cell::open(context.clone(), limit);
                runtime.block_on(all(shared, open(ATTEMPT_MAX)?, open(LOOK_MAX)?, stopped))
            };
            Ok(net::inside(&operator, work)??)
        });
        Ok(Clients { stop, thread, job })
    }
    /// What the replicas say.
    pub(super) fn views(&self) -> MutexGuard<'_, Views> {
        lock(&self.job.views)
    }
    /// Whether they still run and have room for more.
    pub(super) fn run(&self) -> bool {
        !self.thread.is_finished() && !lock(&self.job.seen).full
    }
    /// Stops them and gives what they saw.
    pub(super) fn stop(self) -> Result<(Seen, Views), LabError> {
        // They have ended by themselves only where they could not start, which they tell.
        let _ = self.stop.send(true);
        let panicked = || Refusal::new(Code::Internal, "what clients saw", "their thread panicked");
        self.thread.join().map_err(|_| panicked())??;
        Ok((std::mem::take(&mut *lock(&self.job.seen)), std::mem::take(&mut *lock(&self.job.views))))
    }
}

async fn all(
    job: Arc<Job>,
    cell: ambit::cell::Cell,
    looking: ambit::cell::Cell,
    mut stopped: watch::Receiver<bool>,
) -> Result<(), Refusal> {
    let root = std::fs::read_to_string(&job.root)
        .map_err(|e| Refusal::new(Code::Internal, "the cell's root certificate", e.to_string()))?;
    let root = certificates_from_pem(&root)?.into_iter().map(|c| c.to_vec()).collect();
    let mut tasks = JoinSet::new();
    for client in 0..CLIENTS {
        tasks.spawn(register_client(job.clone(), cell.clone(), client, stopped.clone()));
    }
    tasks.spawn(issue(job.clone(), cell, root, stopped.clone()));
    for at in 0..job.addresses.len() {
        tasks.spawn(look(job.clone(), looking.clone(), at, stopped.clone()));
    }
    // Dropped without a word: whoever watched has failed.
    let _ = stopped.wait_for(|stop| *stop).await;
    while tasks.join_next().await.is_some() {}
    Ok(())
}

async fn register_client(job: Arc<Job>, cell: ambit::cell::Cell, client: u64, stopped: watch::Receiver<bool>) {
    let mut draw = Draw::new(job.seed ^ ((client + 1) << 32));
    while !*stopped.borrow() {
        if draw.chance(1, 2) {
            write(&job, &cell, client, &mut draw).await;
        } else {
            read(&job, &cell, client, &mut draw).await;
        }
        sleep(Duration::from_millis(draw.between(2, 20))).await;
    }
}

/// One write under one request id, at one replica after the other, until it is answered or given up.
async fn write(job: &Job, cell: &ambit::cell::Cell, client: u64, draw: &mut Draw) {
    let register = draw.below(REGISTERS);
    let value = job.number(register);
    let Ok(request_id) = request_id() else { return };
    let request = v1::ApplyRequest { request_id, yaml: document(&job.site, register, value), ..Default::default() };
    // Some give up while the request is on its way: nobody knows then whether it takes effect, and when.
    let (attempts, limit) = match draw.chance(1, 12) {
        true => (1, Duration::from_millis(draw.between(1, 120))),
        false => (draw.between(2, ATTEMPTS_MAX), ATTEMPT_MAX),
    };
    let first = draw.below(job.addresses.len() as u64);
    let (call_us, mut back_us) = (job.now_us(), None);
    for attempt in 0..attempts {
        let sent = apply(job, cell, first + attempt, &request);
        match timeout(limit, sent).await {
            Ok(Ok(())) => {
                back_us = Some(job.now_us());
                break;
            }
            Ok(Err(refusal)) if job.explained(&refusal) => sleep(RETRY_AFTER).await,
            Ok(Err(_)) => break,
            Err(_elapsed) => {}
        }
    }
    let client = u32::try_from(client).unwrap_or_default();
    job.record(register, Op { call_us, back_us, client, did: Did::Write(value) });
    if back_us.is_some() && draw.chance(1, 8) {
        // What was answered comes once more, when other values may stand there: it must have no effect (I10).
        sleep(Duration::from_millis(draw.below(400))).await;
        match apply(job, cell, draw.below(job.addresses.len() as u64), &request).await {
            Ok(()) => job.seen().repeated += 1,
            Err(refusal) => {
                job.explained(&refusal);
            }
        }
    }
}

async fn apply(job: &Job, cell: &ambit::cell::Cell, at: u64, request: &v1::ApplyRequest) -> Result<(), Refusal> {
    let at = job.addresses[at as usize % job.addresses.len()];
    let answer = ask_at!(cell, at, PolicyRegistry.apply(request.clone()));
    answer.map(drop)
}

/// A list shows every register at one instant: a read of each.
async fn read(job: &Job, cell: &ambit::cell::Cell, client: u64, draw: &mut Draw) {
    let at = job.addresses[draw.below(job.addresses.len() as u64) as usize];
    let call_us = job.now_us();
    let listed = match ask_at!(cell, at, PolicyRegistry.list(v1::ListPoliciesRequest {})) {
        Ok(listed) => listed,
        Err(refusal) => {
            job.explained(&refusal);
            return;
        }
    };
    let (back_us, client) = (Some(job.now_us()), u32::try_from(client).unwrap_or_default());
    let values: BTreeMap<u64, u64> = listed.policies.iter().filter_map(register_of).collect();
    if values.len() != listed.policies.len() {
        job.surprise(format!("a list with other policies: {:?}", listed.policies));
    }
    job.seen().lists += 1;
    for register in 0..REGISTERS {
        job.record(register, Op { call_us, back_us, client, did: Did::Read(values.get(&register).copied()) });
    }
}

fn document(site: &str, register: u64, value: u64) -> String {
    format!(
        "kind: Policy\nmetadata: {{name: chaos-{register}}}\nspec:\n  target: spiffe://{site}/chaos/{register}\n  \
         action: deny\n  from: [spiffe://{site}/chaos/value/{value}]\n"
    )
}

fn register_of(policy: &v1::Policy) -> Option<(u64, u64)> {
    let [from] = policy.from.as_slice() else { return None };
    let (_, value) = from.rsplit_once("/value/")?;
    Some((policy.name.strip_prefix("chaos-")?.parse().ok()?, value.parse().ok()?))
}

/// Has certificates issued for the administrator, by each replica under its own authority.
async fn issue(job: Arc<Job>, cell: ambit::cell::Cell, root: Vec<Vec<u8>>, stopped: watch::Receiver<bool>) {
    let mut draw = Draw::new(job.seed ^ 0xce47);
    while !*stopped.borrow() {
        match leaf(&job, &cell, &root, draw.below(job.addresses.len() as u64)).await {
            Ok(leaf) => job.seen().leaves.push(leaf),
            Err(refusal) => {
                job.explained(&refusal);
            }
        }
        sleep(ISSUE_EVERY).await;
    }
}

async fn leaf(job: &Job, cell: &ambit::cell::Cell, root: &[Vec<u8>], first: u64) -> Result<(String, String), Refusal> {
    let mut last = Refusal::new(Code::Unavailable, "a replica that issues", "none");
    for attempt in 0..job.addresses.len() {
        let at = job.addresses[(first as usize + attempt) % job.addresses.len()];
        // As an agent asks: each time a new request with a new key, since each replica signs under its own authority.
        let request = v1::RenewAdminRequest { request_id: request_id()?, csr: SvidKey::generate()?.csr()? };
        let mut chain = match ask_at!(cell, at, Svid.renew_admin(request.clone())) {
            Ok(reply) => reply.chain_der,
            Err(refusal) => {
                last = refusal;
                continue;
            }
        };
        if chain.last() != root.last() {
            chain.extend_from_slice(root);
        }
        let chain: Vec<_> = chain.into_iter().map(Into::into).collect();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let now = Stamp(u64::try_from(now.as_millis()).unwrap_or(u64::MAX));
        let peer = verify_pinned(&chain, &job.site.parse()?, &job.fingerprint, now)?;
        return Ok((peer.authority().to_owned(), hex::encode(peer.serial())));
    }
    Err(last)
}

async fn look(job: Arc<Job>, cell: ambit::cell::Cell, at: usize, stopped: watch::Receiver<bool>) {
    while !*stopped.borrow() {
        let asked = Instant::now();
        if let Ok(view) = ask_at!(cell, job.addresses[at], Membership.status(v1::StatusRequest {})) {
            lock(&job.views).take(at, asked, view);
        }
        sleep(LOOK_EVERY).await;
    }
}

impl Job {
    fn now_us(&self) -> u64 {
        u64::try_from(self.begun.elapsed().as_micros()).unwrap_or(u64::MAX)
    }
    /// No value is written twice to a register.
    fn number(&self, register: u64) -> u64 {
        let mut next = lock(&self.next);
        let next = next.entry(register).or_default();
        *next += 1;
        *next
    }
    fn seen(&self) -> MutexGuard<'_, Seen> {
        lock(&self.seen)
    }
    fn record(&self, register: u64, op: Op) {
        let mut seen = self.seen();
        seen.full = seen.ops.values().map(Vec::len).sum::<usize>() >= OPS_MAX;
        if matches!(op.did, Did::Write(_)) {
            if op.back_us.is_some() { seen.acknowledged += 1 } else { seen.unanswered += 1 }
        }
        seen.ops.entry(register).or_default().push(op);
    }
    /// Whether a fault explains this refusal. Any other is noted: clients ask for nothing that may be refused.
    fn explained(&self, refusal: &Refusal) -> bool {
        let explained = refusal.code.class() == Class::Unavailable;
        if !explained {
            self.surprise(refusal.to_string());
        }
        explained
    }
    fn surprise(&self, what: String) {
        let mut seen = self.seen();
        if seen.surprises.len() < SURPRISES_MAX && !seen.surprises.contains(&what) {
            seen.surprises.push(what);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
