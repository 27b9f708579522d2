//! Whole replicas in one process over loopback gRPC without TLS: each replica has an address of its own in 127.77/16, and
//! is known to the others by the address it connects from.

use super::*;
use crate::store::StoreError;
use ambit_model::{Code, RaftIndex, Refusal, ReplicaId};
use ambit_state::{Command, Reply};
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::server::TcpConnectInfo;
use tonic::transport::{Endpoint, Server};

static NEXT_NET: AtomicU8 = AtomicU8::new(1);

struct Replica {
    cell: Cell,
    server: tokio::task::JoinHandle<()>,
}

struct Lab {
    net: u8,
    dir: PathBuf,
    up: BTreeMap<u64, Replica>,
    addresses: Arc<Mutex<BTreeMap<u64, SocketAddr>>>,
    tune: fn(&mut Options),
}

impl Drop for Lab {
    fn drop(&mut self) {
        for (_, replica) in std::mem::take(&mut self.up) {
            replica.server.abort();
        }
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

const CLIENT: [u8; 32] = [7; 32];

fn request(n: u64) -> [u8; 16] {
    let mut id = [0xaa; 16];
    id[..8].copy_from_slice(&n.to_be_bytes());
    id
}

/// A command that leaves a row for each time it takes effect.
fn command(n: u64) -> Command {
    let mut sha256 = [0; 32];
    sha256[..8].copy_from_slice(&n.to_be_bytes());
    Command::SealReport("ledger".to_owned(), sha256)
}

impl Lab {
    fn new(name: &str, tune: fn(&mut Options)) -> Self {
        let _ = tracing_subscriber::fmt()
            .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
            .with_test_writer()
            .try_init();
        let net = NEXT_NET.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("ambit-cell-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir).unwrap();
        Self { net, dir, up: BTreeMap::new(), addresses: Arc::default(), tune }
    }

    fn data_dir(&self, id: u64) -> PathBuf {
        self.dir.join(id.to_string())
    }

    fn options(&self, id: u64) -> Options {
        let mut options = Options::new(ReplicaId(id), self.data_dir(id));
        (self.tune)(&mut options);
        options
    }

    fn ip(&self, id: u64) -> IpAddr {
        IpAddr::V4(Ipv4Addr::new(127, 77, self.net, id as u8))
    }

    fn network(&self, id: u64) -> Network {
        let addresses = self.addresses.clone();
        let local = self.ip(id);
        Network {
            directory: Arc::new(move |peer| addresses.lock().unwrap().get(&peer.0).copied()),
            channels: Arc::new(move |peer, address| {
                Box::pin(async move {
                    let endpoint = Endpoint::from_shared(format!("http://{address}"))
                        .unwrap()
                        .local_address(Some(local))
                        .connect_timeout(Duration::from_millis(500));
                    endpoint
                        .connect()
                        .await
                        .map_err(|e| Refusal::new(Code::Unavailable, format!("replica {peer}"), e.to_string()))
                })
            }),
        }
    }

    async fn start(&mut self, id: u64) {
        let cell = Cell::open(self.options(id), self.network(id)).unwrap();
        let listener = tokio::net::TcpListener::bind((self.ip(id), 0)).await.unwrap();
        self.addresses.lock().unwrap().insert(id, listener.local_addr().unwrap());
        let authorise: transport::Authorise = Arc::new(|extensions| {
            let ip = extensions.get::<TcpConnectInfo>().and_then(|i| i.remote_addr()).map(|a| a.ip());
            match ip {
                Some(IpAddr::V4(ip)) if ip.octets()[1] == 77 => Ok(ReplicaId(u64::from(ip.octets()[3]))),
                _ => Err(Refusal::new(Code::Unauthenticated, "a replica", format!("{ip:?}"))),
            }
        });
        let router = Server::builder().add_service(transport::service(cell.clone(), authorise));
        let server = tokio::spawn(async move {
            let _ = router.serve_with_incoming(TcpListenerStream::new(listener)).await;
        });
        self.up.insert(id, Replica { cell, server });
    }

    /// The process dies: its server with all connections, its thread.
    async fn stop(&mut self, id: u64) {
        let replica = self.up.remove(&id).unwrap();
        replica.server.abort();
        let _ = replica.server.await;
        replica.cell.shutdown().await;
    }

    /// A cell of replicas 1 to `n`, founded by 1 and joined by the others.
    async fn cell(name: &str, n: u64, tune: fn(&mut Options)) -> Self {
        let mut lab = Self::new(name, tune);
        found(&lab.options(1)).unwrap();
        lab.start(1).await;
        for id in 2..=n {
            lab.join(id).await;
        }
        lab
    }

    async fn join(&mut self, id: u64) {
        prepare_join(&self.options(id)).unwrap();
        self.start(id).await;
        let asked = self.up.values().next().unwrap().cell.clone();
        asked.add_learner(ReplicaId(id)).await.unwrap();
        asked.promote(ReplicaId(id)).await.unwrap();
    }

    fn at(&self, id: u64) -> &Cell {
        &self.up[&id].cell
    }

    async fn leader(&self) -> u64 {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            for (id, replica) in &self.up {
                if replica.cell.status().role == Role::Leader {
                    return *id;
                }
            }
            assert!(Instant::now() < deadline, "no leader: {:?}", self.statuses());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    fn statuses(&self) -> Vec<Status> {
        self.up.values().map(|r| r.cell.status()).collect()
    }

    /// Every replica, after a barrier: one history, and one digest at one index.
    async fn agreed(&self) -> (Vec<u64>, [u8; 32]) {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let mut views = Vec::new();
            for replica in self.up.values() {
                replica.cell.read_barrier().await.unwrap();
                let state = replica.cell.state();
                views.push((state.applied(), state.digest(), ledger(&state)));
            }
            if views.iter().all(|v| v.0 == views[0].0) {
                assert!(views.iter().all(|v| *v == views[0]), "one index, different states");
                return (views[0].2.clone(), views[0].1);
            }
            assert!(Instant::now() < deadline, "no agreement: {:?}", self.statuses());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

fn ledger(state: &ambit_state::State) -> Vec<u64> {
    state.reports().map(|r| u64::from_be_bytes(r.sha256[..8].try_into().unwrap())).collect()
}

async fn write(cell: &Cell, n: u64) -> RaftIndex {
    let applied = cell.propose(CLIENT, request(n), command(n)).await.unwrap();
    assert!(matches!(applied.outcome, Ok(Reply::Report(_))), "{:?}", applied.outcome);
    applied.index
}

fn quick(options: &mut Options) {
    options.deadline = Duration::from_secs(10);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_replica_takes_writes_and_all_agree() {
    let lab = Lab::cell("agree", 3, quick).await;
    let mut last = RaftIndex(0);
    for n in 1..=30 {
        let at = write(lab.at(n % 3 + 1), n).await;
        assert!(at > last, "index {at} after {last}");
        last = at;
        // I3: a read anywhere that starts after the acknowledgement sees it.
        let reader = lab.at((n + 1) % 3 + 1);
        assert!(reader.read_barrier().await.unwrap() >= at);
        assert!(ledger(&reader.state()).contains(&n));
    }
    let (rows, _) = lab.agreed().await;
    assert_eq!(rows.len(), 30);
    for replica in lab.up.values() {
        let metrics = replica.cell.metrics();
        assert!(metrics.fsync_total() > 0 && metrics.fsync_seconds_total() > 0.0 && metrics.term() > 0);
        assert!(metrics.applied_index() >= last.0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_writers_share_syncs_and_lose_nothing() {
    let lab = Lab::cell("group", 3, quick).await;
    let before = lab.at(1).metrics().fsync_total();
    let mut tasks = Vec::new();
    for n in 1..=300u64 {
        let cell = lab.at(n % 3 + 1).clone();
        tasks.push(tokio::spawn(async move { write(&cell, n).await }));
    }
    for task in tasks {
        task.await.unwrap();
    }
    let (mut rows, _) = lab.agreed().await;
    rows.sort_unstable();
    assert_eq!(rows, (1..=300).collect::<Vec<_>>());
    let syncs = lab.at(1).metrics().fsync_total() - before;
    assert!(syncs < 300, "{syncs} syncs for 300 concurrent writes: no group commit");
}

/// I1 and I10 across leader deaths: writers go on meanwhile, with the same ids until they are answered.
#[tokio::test(flavor = "multi_thread")]
async fn acknowledged_writes_survive_leaders_once_each() {
    let mut lab = Lab::cell("failover", 3, quick).await;
    let acked = Arc::new(Mutex::new(Vec::new()));
    for round in 0..3u64 {
        let leader = lab.leader().await;
        let writers: Vec<_> = lab
            .up
            .iter()
            .filter(|(id, _)| **id != leader)
            .map(|(id, replica)| {
                let (cell, acked, id) = (replica.cell.clone(), acked.clone(), *id);
                tokio::spawn(async move {
                    for n in 0..40u64 {
                        let n = round * 1000 + id * 100 + n;
                        // A refusal leaves the outcome open: the same ids again, until it is known.
                        while cell.propose(CLIENT, request(n), command(n)).await.is_err() {}
                        acked.lock().unwrap().push(n);
                    }
                })
            })
            .collect();
        tokio::time::sleep(Duration::from_millis(30)).await;
        let killed = Instant::now();
        lab.stop(leader).await;
        for writer in writers {
            writer.await.unwrap();
        }
        assert_ne!(lab.leader().await, leader);
        assert!(killed.elapsed() < Duration::from_secs(20));
        lab.start(leader).await;
    }
    let (mut rows, _) = lab.agreed().await;
    rows.sort_unstable();
    let mut acked = acked.lock().unwrap().clone();
    acked.sort_unstable();
    assert_eq!(rows, acked, "lost or doubled");
    assert_eq!(rows.len(), 3 * 2 * 40);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_repeated_after_a_leader_change_takes_effect_once() {
    let lab = Lab::cell("once", 3, quick).await;
    let first = lab.at(1).propose(CLIENT, request(5), command(5)).await.unwrap();
    let next = if lab.leader().await == 2 { 3 } else { 2 };
    lab.at(1).transfer_leader(ReplicaId(next)).await.unwrap();
    for id in 1..=3 {
        let again = lab.at(id).propose(CLIENT, request(5), command(5)).await.unwrap();
        assert_eq!(again.outcome, first.outcome);
    }
    // And at once from everywhere, several on the same replica.
    let tasks: Vec<_> = (0..12u64)
        .map(|n| {
            let cell = lab.at(n % 3 + 1).clone();
            tokio::spawn(async move { cell.propose(CLIENT, request(6), command(6)).await.unwrap().outcome })
        })
        .collect();
    let mut outcomes = Vec::new();
    for task in tasks {
        outcomes.push(task.await.unwrap());
    }
    assert!(outcomes.iter().all(|o| *o == outcomes[0]));
    assert_eq!(lab.agreed().await.0, vec![5, 6]);
    let other = lab.at(1).propose(CLIENT, request(6), command(7)).await.unwrap();
    assert_eq!(other.outcome.unwrap_err().code, Code::RequestIdReused);
}

#[tokio::test(flavor = "multi_thread")]
async fn leadership_moves_without_a_refusal() {
    let lab = Lab::cell("moves", 3, quick).await;
    let writers: Vec<_> = (1..=3u64)
        .map(|id| {
            let cell = lab.at(id).clone();
            tokio::spawn(async move {
                for n in 0..100 {
                    write(&cell, id * 1000 + n).await;
                }
            })
        })
        .collect();
    for to in [2, 3, 1, 2, 3, 1] {
        lab.at(to % 3 + 1).transfer_leader(ReplicaId(to)).await.unwrap();
    }
    for writer in writers {
        writer.await.unwrap();
    }
    assert_eq!(lab.agreed().await.0.len(), 300);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_whole_cell_restarts_with_its_state() {
    let mut lab = Lab::cell("restart", 3, quick).await;
    for n in 1..=20 {
        write(lab.at(1), n).await;
    }
    lab.agreed().await;
    for id in 1..=3 {
        lab.stop(id).await;
    }
    for id in 1..=3 {
        lab.start(id).await;
    }
    lab.leader().await;
    let (rows, _) = lab.agreed().await;
    assert_eq!(rows, (1..=20).collect::<Vec<_>>());
    write(lab.at(3), 21).await;
    assert_eq!(lab.agreed().await.0.len(), 21);
}

/// I13 and the tables' promise: flipped, cut or deleted, they cost a rebuild and never a row.
#[tokio::test(flavor = "multi_thread")]
async fn damaged_tables_are_rebuilt_to_the_same_digest() {
    let mut lab = Lab::cell("tables", 1, quick).await;
    for n in 1..=50 {
        write(lab.at(1), n).await;
    }
    lab.at(1).snapshot_now().await.unwrap();
    for n in 51..=80 {
        write(lab.at(1), n).await;
    }
    for damage in ["none", "block lost", "block altered", "flip", "cut", "delete"] {
        let before = state_view(lab.at(1));
        lab.stop(1).await;
        let tables = lab.data_dir(1).join("tables");
        for file in std::fs::read_dir(&tables).unwrap().map(|f| f.unwrap().path()).filter(|p| p.is_file()) {
            let mut bytes = std::fs::read(&file).unwrap();
            match damage {
                "flip" => bytes.iter_mut().skip(64).step_by(97).for_each(|b| *b ^= 0xff),
                "cut" => bytes.truncate(bytes.len() / 3),
                // Not of the files.
                _ => continue,
            }
            std::fs::write(&file, bytes).unwrap();
        }
        match damage {
            "block lost" | "block altered" => damage_one_block(&tables, damage == "block lost"),
            "delete" => std::fs::remove_dir_all(&tables).unwrap(),
            _ => {}
        }
        lab.start(1).await;
        lab.leader().await;
        lab.at(1).read_barrier().await.unwrap();
        let after = state_view(lab.at(1));
        assert_eq!(after.rows, before.rows, "rows after {damage}");
        // A restart adds one entry, a new term's empty one, which moves the clock's row: replaying it on the rows as they
        // were gives the very same state.
        assert_eq!(after.index.0, before.index.0 + 1, "{damage}");
        let mut replayed = ambit_state::State::import(before.export).unwrap();
        replayed.skip(after.index);
        assert_eq!(replayed.digest(), after.digest, "digest after {damage}");
        let aside = lab.data_dir(1).join("tables.damaged-1");
        // Of files cut short sled may make an older state without a word: then the snapshot is the newer one.
        assert!(aside.exists() == !matches!(damage, "none" | "delete") || damage == "cut", "{damage}");
        let _ = std::fs::remove_dir_all(aside);
    }
}

/// What sled would not notice: a block of rows that is gone, or one that is another.
fn damage_one_block(tables: &std::path::Path, lose: bool) {
    let db = sled::Config::new().path(tables).flush_every_ms(None).open().unwrap();
    let tree = db.open_tree("rows").unwrap();
    // The largest: of a small one all may be overridden by now, and then nothing is lost.
    let (key, mut value) = tree.iter().map(Result::unwrap).max_by_key(|(_, value)| value.len()).unwrap();
    if lose {
        tree.remove(key).unwrap();
    } else {
        let last = value.len() - 1;
        value[last] ^= 1;
        tree.insert(key, value).unwrap();
    }
    db.flush().unwrap();
}

struct View {
    index: RaftIndex,
    rows: Vec<u64>,
    digest: [u8; 32],
    export: Vec<ambit_state::TableWrite>,
}

fn state_view(cell: &Cell) -> View {
    let state = cell.state();
    View { index: state.applied(), rows: ledger(&state), digest: state.digest(), export: state.export() }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_log_or_snapshot_refuses_to_serve() {
    let mut lab = Lab::cell("refuse", 1, quick).await;
    for n in 1..=20 {
        write(lab.at(1), n).await;
    }
    lab.stop(1).await;
    let log = std::fs::read_dir(lab.data_dir(1).join("log"))
        .unwrap()
        .map(|f| f.unwrap().path())
        .find(|p| p.to_string_lossy().ends_with(".raftlog"))
        .unwrap();
    let good = std::fs::read(&log).unwrap();
    let mut bad = good.clone();
    let at = bad.iter().rposition(|b| *b != 0).unwrap() - 200;
    bad[at] ^= 1;
    std::fs::write(&log, &bad).unwrap();
    let refused = Cell::open(lab.options(1), lab.network(1)).err().unwrap();
    assert!(matches!(refused, StartError::Store(StoreError::Damaged { .. })), "{refused}");
    std::fs::write(&log, &good).unwrap();
    // Without tables the snapshot is the only beginning.
    std::fs::remove_dir_all(lab.data_dir(1).join("tables")).unwrap();
    let file = lab.data_dir(1).join("snapshot/current.snapshot");
    let mut bytes = std::fs::read(&file).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&file, &bytes).unwrap();
    let refused = Cell::open(lab.options(1), lab.network(1)).err().unwrap();
    assert!(matches!(refused, StartError::Store(StoreError::Damaged { .. })), "{refused}");
    // An emptied folder is not a new replica.
    std::fs::remove_dir_all(lab.data_dir(1)).unwrap();
    let refused = Cell::open(lab.options(1), lab.network(1)).err().unwrap();
    assert!(matches!(refused, StartError::Store(StoreError::Missing(_))), "{refused}");
}

fn short_log(options: &mut Options) {
    quick(options);
    options.snapshot_after_entries = 40;
    options.keep_entries = 5;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_late_joiner_and_a_long_absent_replica_come_back_by_snapshot() {
    let mut lab = Lab::cell("late", 3, short_log).await;
    lab.stop(3).await;
    for n in 1..=200 {
        write(lab.at(1), n).await;
    }
    assert!(lab.at(lab.leader().await).metrics().snapshots_total() >= 4);
    lab.start(3).await;
    lab.join(4).await;
    write(lab.at(4), 201).await;
    let (rows, _) = lab.agreed().await;
    assert_eq!(rows, (1..=201).collect::<Vec<_>>());
    assert!(lab.at(3).metrics().snapshots_total() >= 1, "3 came back without a snapshot");
    // What a snapshot brought survives a restart.
    lab.stop(4).await;
    lab.start(4).await;
    write(lab.at(4), 202).await;
    assert_eq!(lab.agreed().await.0.len(), 202);
}

/// The process ended after it had written a leader's snapshot and before it emptied the log for it.
#[tokio::test(flavor = "multi_thread")]
async fn a_half_done_install_is_finished_at_the_next_start() {
    let mut lab = Lab::cell("half", 3, short_log).await;
    write(lab.at(1), 1).await;
    lab.stop(3).await;
    for n in 2..=60 {
        write(lab.at(1), n).await;
    }
    let (index, _) = lab.at(1).snapshot_now().await.unwrap();
    let file = "snapshot/current.snapshot";
    std::fs::copy(lab.data_dir(1).join(file), lab.data_dir(3).join(file)).unwrap();
    lab.addresses.lock().unwrap().clear();
    let alone = Cell::open(lab.options(3), lab.network(3)).unwrap();
    assert_eq!(alone.status().applied, index);
    assert_eq!(ledger(&alone.state()).len(), 60);
    alone.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn members_come_and_go_one_at_a_time() {
    let mut lab = Lab::cell("members", 3, quick).await;
    write(lab.at(1), 1).await;
    // From a follower, and a leader removes itself.
    let leader = lab.leader().await;
    let follower = if leader == 1 { 2 } else { 1 };
    lab.at(follower).remove(ReplicaId(leader)).await.unwrap();
    let status = lab.at(follower).status();
    assert!(!status.voters.contains(&ReplicaId(leader)) && status.voters.len() == 2);
    write(lab.at(follower), 2).await;
    // I16: the removed one disturbs nobody, though it campaigns.
    let term = lab.at(follower).status().term;
    let _ = lab.at(leader).campaign().await;
    tokio::time::sleep(Duration::from_millis(900)).await;
    assert_eq!(lab.at(follower).status().term, term);
    lab.stop(leader).await;
    write(lab.at(follower), 3).await;
    // Done already is fine; the impossible is refused.
    lab.at(follower).remove(ReplicaId(leader)).await.unwrap();
    assert_eq!(lab.at(follower).promote(ReplicaId(9)).await.unwrap_err().code, Code::NotFound);
    assert_eq!(lab.at(follower).transfer_leader(ReplicaId(9)).await.unwrap_err().code, Code::BadRequest);
    // A learner that does not run gets no vote: the cell would stop.
    lab.at(follower).add_learner(ReplicaId(5)).await.unwrap();
    let promoted = tokio::time::timeout(Duration::from_secs(2), lab.at(follower).promote(ReplicaId(5))).await;
    assert!(promoted.is_err(), "promoted while absent: {promoted:?}");
    write(lab.at(follower), 4).await;
    lab.at(follower).remove(ReplicaId(5)).await.unwrap();
    assert_eq!(lab.agreed().await.0, vec![1, 2, 3, 4]);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_majority_nothing_is_acknowledged() {
    let mut lab = Lab::cell("minority", 3, |o| o.deadline = Duration::from_millis(1500)).await;
    write(lab.at(1), 1).await;
    lab.stop(2).await;
    lab.stop(3).await;
    let refused = lab.at(1).propose(CLIENT, request(2), command(2)).await.unwrap_err();
    assert_eq!(refused.code, Code::Unavailable, "{refused}");
    assert_eq!(lab.at(1).read_barrier().await.unwrap_err().code, Code::Unavailable);
    lab.start(2).await;
    lab.leader().await;
    write(lab.at(1), 2).await;
    assert_eq!(lab.agreed().await.0, vec![1, 2]);
}

#[tokio::test(flavor = "multi_thread")]
async fn overload_answers_busy_and_loses_nothing() {
    let lab = Lab::cell("busy", 1, |o| {
        quick(o);
        o.proposals_max = 4;
    })
    .await;
    let tasks: Vec<_> = (1..=200u64)
        .map(|n| {
            let cell = lab.at(1).clone();
            tokio::spawn(async move { (n, cell.propose(CLIENT, request(n), command(n)).await) })
        })
        .collect();
    let (mut done, mut busy) = (Vec::new(), 0);
    for task in tasks {
        match task.await.unwrap() {
            (n, Ok(_)) => done.push(n),
            (_, Err(refusal)) => {
                assert_eq!(refusal.code, Code::Busy, "{refusal}");
                busy += 1;
            }
        }
    }
    assert!(busy > 0 && !done.is_empty(), "{busy} busy, {} done", done.len());
    assert_eq!(lab.at(1).metrics().busy_total(), busy);
    done.sort_unstable();
    let mut rows = ledger(&lab.at(1).state());
    rows.sort_unstable();
    assert_eq!(rows, done);
}

/// The drill measures this properly; here only that elections run on the timeouts configured.
#[tokio::test(flavor = "multi_thread")]
async fn a_lost_leader_is_replaced_in_time() {
    let mut lab = Lab::cell("rto", 3, quick).await;
    let mut times = Vec::new();
    for round in 0..5u64 {
        let leader = lab.leader().await;
        let other = *lab.up.keys().find(|id| **id != leader).unwrap();
        lab.stop(leader).await;
        let stopped = Instant::now();
        write(lab.at(other), 10 + round).await;
        times.push(stopped.elapsed());
        lab.start(leader).await;
        write(lab.at(leader), 20 + round).await;
    }
    times.sort_unstable();
    assert!(times[2] < Duration::from_secs(2), "{times:?}");
}

const CRASH_DIR: &str = "AMBIT_TEST_CRASH_DIR";

/// I1 with a real SIGKILL, in the middle of appends, snapshots, compactions and table writes. The test runs itself as the
/// process to be killed.
#[test]
fn a_killed_process_loses_no_acknowledged_write() {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    if let Ok(dir) = std::env::var(CRASH_DIR) {
        runtime.block_on(write_until_killed(dir.into()));
        return;
    }
    let lab = Lab::new("kill", short_log);
    let options = lab.options(1);
    found(&options).unwrap();
    let mut acked = Vec::new();
    for round in 0..8usize {
        acked.extend(run_and_kill(&options.data_dir, 20 + 13 * round));
        let aside = options.data_dir.join("tables.damaged-1");
        let rows = runtime.block_on(async {
            let cell = Cell::open(options.clone(), lab.network(1)).unwrap();
            cell.read_barrier().await.unwrap();
            let rows = ledger(&cell.state());
            cell.shutdown().await;
            rows
        });
        assert!(rows.len() < 1000, "the state keeps no more than that many: write less");
        let distinct: std::collections::BTreeSet<_> = rows.iter().collect();
        assert_eq!(distinct.len(), rows.len(), "a write took effect twice");
        let lost: Vec<_> = acked.iter().filter(|n| !distinct.contains(n)).collect();
        assert!(lost.is_empty(), "lost after kill {round}: {lost:?}");
        assert!(!aside.exists(), "a kill is no damage, and must not cost the tables");
    }
    assert!(acked.len() > 100, "only {} writes before the kills", acked.len());
}

fn run_and_kill(data_dir: &std::path::Path, after: usize) -> Vec<u64> {
    use std::io::BufRead;
    let mut child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "raft::cell_tests::a_killed_process_loses_no_acknowledged_write", "--nocapture"])
        .env(CRASH_DIR, data_dir)
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut acked = Vec::new();
    let mut lines = std::io::BufReader::new(child.stdout.take().unwrap()).lines();
    while acked.len() < after {
        let line = lines.next().expect("the writer ended by itself").unwrap();
        acked.extend(line.strip_prefix("acked ").map(|n| n.parse::<u64>().unwrap()));
    }
    child.kill().unwrap();
    // What it still said before it died counts as well.
    let rest = lines.map_while(Result::ok);
    acked.extend(rest.filter_map(|l| l.strip_prefix("acked ").and_then(|n| n.parse::<u64>().ok())));
    child.wait().unwrap();
    acked
}

async fn write_until_killed(data_dir: PathBuf) {
    let mut options = Options::new(ReplicaId(1), data_dir);
    short_log(&mut options);
    let nowhere = Network {
        directory: Arc::new(|_| None),
        channels: Arc::new(|_, _| Box::pin(async { Err(Refusal::new(Code::Unavailable, "", "")) })),
    };
    let cell = Cell::open(options, nowhere).unwrap();
    cell.read_barrier().await.unwrap();
    let from = ledger(&cell.state()).into_iter().max().unwrap_or_default();
    let next = Arc::new(std::sync::atomic::AtomicU64::new(from + 1));
    let writers = (0..8).map(|_| {
        let (cell, next) = (cell.clone(), next.clone());
        async move {
            // Bounded, should no one come to kill this process.
            for _ in 0..100_000 {
                let n = next.fetch_add(1, Ordering::Relaxed);
                write(&cell, n).await;
                println!("acked {n}");
            }
        }
    });
    futures::future::join_all(writers).await;
}
