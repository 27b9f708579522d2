//! Real replicas on bad disks: tables destroyed under a running one, bits flipped in a stopped one's log, no space, no
//! sync, no writing, and a disk that takes seconds. Whatever happens, no acknowledged write is missing and no answer is wrong.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says that it failed by panicking")]

use ambit_model::refusal::Class;
use ambit_proto::status::from_status;
use ambit_proto::v1;
use ambit_proto::v1::cluster_registry_client::ClusterRegistryClient;
use ambit_proto::v1::entry_registry_client::EntryRegistryClient;
use ambit_proto::v1::membership_client::MembershipClient;
use ambit_tests::cell::{Cell, fresh};
use ambit_tests::operator::within;
use ambit_tests::process::{Started, binary, must_run, run};
use sha2::{Digest, Sha256};
use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A cell of three, a cluster in it, and the names of all entries that were acknowledged.
struct Ledger {
    cell: Cell,
    written: BTreeSet<String>,
}

impl Ledger {
    async fn new() -> Ledger {
        Ledger::of(Cell::start("west", 3).await.unwrap()).await
    }

    async fn of(cell: Cell) -> Ledger {
        let request = v1::RegisterClusterRequest { request_id: fresh(), name: "west".into(), ..Default::default() };
        let call = |channel| {
            let request = request.clone();
            async move { ClusterRegistryClient::new(channel).register_cluster(request).await }
        };
        cell.insist(call).await.unwrap();
        Ledger { cell, written: BTreeSet::new() }
    }

    fn batch(&self, entries: usize) -> v1::BatchCreateEntryRequest {
        let entries = (0..entries).map(|_| {
            // Names that do not compress: what is written is what the disk must hold.
            let id = format!("e{}", hex::encode(&Sha256::digest(fresh())[..24]));
            v1::Entry {
                spiffe_id: format!("spiffe://west/{id}"),
                id,
                cluster: "west".into(),
                selectors: vec!["unix:uid:1000".into()],
                ..Default::default()
            }
        });
        v1::BatchCreateEntryRequest { request_id: fresh(), entries: entries.collect() }
    }

    /// Writes through whichever replica takes it.
    async fn write(&mut self, entries: usize) {
        let request = self.batch(entries);
        let call = |channel| {
            let request = request.clone();
            async move { EntryRegistryClient::new(channel).batch_create_entry(request).await }
        };
        let answer = self.cell.insist(call).await.unwrap();
        assert!(answer.results.iter().all(|r| r.code == "ok"), "{answer:?}");
        self.written.extend(request.entries.into_iter().map(|e| e.id));
    }

    /// Entries that come and go: they fill the log and not the state.
    async fn churn(&mut self, entries: usize) {
        let before = self.written.clone();
        self.write(entries).await;
        let gone = self.written.difference(&before);
        let items = gone.map(|id| v1::EntryRemoval { id: id.clone(), expected_revision: 0 }).collect();
        let request = v1::BatchDeleteEntryRequest { request_id: fresh(), items };
        let call = |channel| {
            let request = request.clone();
            async move { EntryRegistryClient::new(channel).batch_delete_entry(request).await }
        };
        self.cell.insist(call).await.unwrap();
        self.written = before;
    }

    /// What a replica answers, if it does.
    async fn asked(&self, replica: usize) -> Option<BTreeSet<String>> {
        let mut client = EntryRegistryClient::new(self.cell.admin(replica).await.ok()?);
        match client.list_entries(v1::ListEntriesRequest::default()).await {
            Ok(answer) => Some(answer.into_inner().entries.into_iter().map(|e| e.id).collect()),
            Err(status) => {
                let refusal = from_status(&status);
                assert_eq!(refusal.code.class(), Class::Unavailable, "{refusal}");
                None
            }
        }
    }

    /// Asks every running replica until it answers: each must show all that was acknowledged.
    async fn check(&self) {
        for replica in self.cell.running() {
            let shown = within(&format!("an answer of replica {replica}"), async || self.asked(replica).await).await;
            assert!(shown.is_superset(&self.written), "replica {replica} lost {:?}", self.written.difference(&shown));
        }
    }

    /// Waits until all replicas that run are at one index, where their states must be one.
    async fn agree(&self) {
        let level = |all: &[v1::StatusResponse]| all.iter().all(|s| s.applied_index == all[0].applied_index);
        let same = |all: &[v1::StatusResponse]| all.iter().all(|s| s.digest == all[0].digest);
        self.cell.wait_for("one index, one digest", |all| level(all) && same(all)).await.unwrap();
    }

    fn data(&self, replica: usize) -> PathBuf {
        self.cell.seat_of(replica).unwrap().data.clone()
    }

    fn log(&self, replica: usize) -> String {
        std::fs::read_to_string(&self.cell.seat_of(replica).unwrap().log).unwrap()
    }

    async fn is_gone(&mut self, replica: usize) {
        let cell = &mut self.cell;
        within("the end of the process", async || (!cell.process(replica).unwrap().is_alive()).then_some(())).await;
        self.cell.kill(replica).unwrap();
    }

    /// Asks for an end, which writes the tables once more, and waits for it.
    async fn terminate(&mut self, replica: usize) {
        let id = self.cell.process(replica).unwrap().id().to_string();
        must_run(&["kill", "-TERM", &id]).unwrap();
        self.is_gone(replica).await;
    }

    /// What a replica says that must not start.
    fn refusal(&self, replica: usize) -> String {
        let (code, said) = self.ends(replica);
        assert_eq!(code, Some(1), "{said}");
        said
    }

    /// How a replica ends that cannot go on, and what it says: its exit code, none for one that aborted.
    fn ends(&self, replica: usize) -> (Option<i32>, String) {
        let (ambitd, seat) = (binary("ambitd").unwrap(), self.cell.seat_of(replica).unwrap());
        let argv = ["timeout", "20", ambitd.to_str().unwrap(), "run", "--config", seat.config.to_str().unwrap()];
        let out = run(&argv).unwrap();
        (out.status.code(), String::from_utf8_lossy(&out.stderr).into_owned())
    }

    /// A snapshot, and with it a checkpoint of the tables.
    async fn checkpoint(&self, replica: usize) {
        let channel = self.cell.admin(replica).await.unwrap();
        MembershipClient::new(channel).snapshot(v1::SnapshotRequest {}).await.unwrap();
    }

    async fn lead(&self, replica: usize) {
        let to = replica as u64;
        let call = |channel| async move {
            MembershipClient::new(channel).transfer_leader(v1::TransferLeaderRequest { to }).await
        };
        self.cell.insist(call).await.unwrap();
        self.cell.wait_for("the chosen leader", |all| all.iter().all(|s| s.leader == to)).await.unwrap();
    }

    /// Lets calls of a running replica's process fail or wait, as strace's `--inject` says, until the end of what it returns.
    async fn inject(&mut self, replica: usize, what: &str) -> Started {
        let id = self.cell.process(replica).unwrap().id().to_string();
        let (calls, out) = (what.split(':').next().unwrap().to_owned(), self.cell.file("strace"));
        let _ = std::fs::remove_file(&out);
        let (trace, inject) = (format!("--trace={calls}"), format!("--inject={what}"));
        let argv = ["strace", "--follow-forks", &trace, &inject, "--output", "/dev/null", "--attach", &id];
        let strace = Started::start(&argv, &out).unwrap();
        let attached = || std::fs::read_to_string(&out).unwrap_or_default().contains(" attached");
        within("strace at work", async || attached().then_some(())).await;
        strace
    }
}

fn files_in(folder: &Path) -> Vec<PathBuf> {
    let all = std::fs::read_dir(folder).unwrap().map(|f| f.unwrap().path());
    all.filter(|path| path.is_file()).collect()
}

/// The tables are never the only copy and never asked while a replica runs: it answers on and rightly, and begins anew
/// from snapshot and log.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tables_destroyed_under_a_running_replica_cost_a_rebuild_and_no_answer() {
    let mut ledger = Ledger::new().await;
    for (round, damage) in ["folder deleted", "files cut", "files overwritten"].into_iter().enumerate() {
        for gentle in [false, true] {
            let victim = (round + usize::from(gentle)) % 3 + 1;
            let what = format!("{damage} under replica {victim}, gentle end: {gentle}");
            ledger.write(50).await;
            let tables = ledger.data(victim).join("tables");
            match damage {
                "folder deleted" => std::fs::remove_dir_all(&tables).unwrap(),
                "files cut" => files_in(&tables).iter().for_each(|f| {
                    let file = std::fs::File::options().write(true).open(f).unwrap();
                    file.set_len(file.metadata().unwrap().len() / 2).unwrap();
                }),
                _ => files_in(&tables).iter().for_each(|f| {
                    let mut file = std::fs::File::options().write(true).open(f).unwrap();
                    file.write_all(&vec![0xa5; file.metadata().unwrap().len() as usize]).unwrap();
                }),
            }
            for _ in 0..5 {
                ledger.write(50).await;
                ledger.check().await;
            }
            // Twice: what became of one checkpoint shows at the next.
            ledger.checkpoint(victim).await;
            ledger.checkpoint(victim).await;
            ledger.check().await;
            assert!(ledger.cell.process(victim).unwrap().is_alive(), "{what}");
            assert!(ledger.log(victim).contains("tables failed") || damage != "folder deleted", "{what}");
            match gentle {
                true => ledger.terminate(victim).await,
                false => ledger.cell.kill(victim).unwrap(),
            }
            ledger.write(50).await;
            ledger.cell.restart(victim).unwrap();
            ledger.check().await;
            ledger.agree().await;
            assert!(ledger.log(victim).contains("moved aside") || damage == "folder deleted", "{what}");
            assert!(tables.exists(), "{what}: no tables were built");
        }
    }
}

fn newest_log(data: &Path) -> PathBuf {
    let logs = files_in(&data.join("log")).into_iter();
    logs.filter(|path| path.extension().is_some_and(|e| e == "raftlog")).max().unwrap()
}

/// Behind the last record damage is a torn write: cut, and the rest comes from the others. Before it, it is a refusal that
/// says what to do, which works; the cell serves on, and the refusal itself changed nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bits_flipped_in_a_stopped_replicas_log_are_cut_or_refused() {
    let mut ledger = Ledger::new().await;
    ledger.write(50).await;
    ledger.terminate(3).await;
    ledger.write(50).await;
    let log = newest_log(&ledger.data(3));
    let good = std::fs::read(&log).unwrap();

    // What was being written when the machine died: the beginning of a record, with bits flipped.
    let torn: Vec<u8> = good[good.len() - 300..].iter().map(|byte| byte ^ 0x10).collect();
    std::fs::write(&log, [good.clone(), torn].concat()).unwrap();
    ledger.cell.restart(3).unwrap();
    ledger.check().await;
    ledger.agree().await;
    ledger.terminate(3).await;

    let good = std::fs::read(&log).unwrap();
    for at in [good.len() / 3, good.len() - 40] {
        let mut bad = good.clone();
        bad[at] ^= 1;
        std::fs::write(&log, bad).unwrap();
        let said = ledger.refusal(3);
        for word in ["error[store_damaged]", "remove this replica", "try: "] {
            assert!(said.contains(word), "no {word} in {said}");
        }
        ledger.write(50).await;
        ledger.check().await;
    }
    std::fs::write(&log, &good).unwrap();
    ledger.cell.restart(3).unwrap();
    ledger.check().await;
    ledger.agree().await;
    ledger.terminate(3).await;

    leave_and_join_anew(&mut ledger).await;
}

/// As the refusal says: the replica leaves, and joins under a new number with an empty folder.
async fn leave_and_join_anew(ledger: &mut Ledger) {
    let remove = |channel| async move {
        let request = v1::RemoveVoterRequest { request_id: fresh(), replica: 3 };
        MembershipClient::new(channel).remove_voter(request).await
    };
    ledger.cell.insist(remove).await.unwrap();
    let seat = ledger.cell.seat("r4").unwrap();
    let token = ledger.cell.replica_token(4, seat.listen).await.unwrap();
    let joined = ledger.cell.join(&seat, 4, &hex::encode(ledger.cell.fingerprint), &token).unwrap();
    assert!(joined.status.success(), "{}", String::from_utf8_lossy(&joined.stderr));
    let _new = seat.start().unwrap();
    let all_vote = |s: &v1::StatusResponse| {
        let voters: Vec<_> = s.members.iter().filter(|m| m.voter).map(|m| m.id).collect();
        voters == [1, 2, 4]
    };
    ledger.cell.wait_for("1, 2 and 4 vote", |all| all.iter().all(all_vote)).await.unwrap();
    // Its vote and its disk count: without it there is no majority now.
    ledger.cell.kill(2).unwrap();
    ledger.write(10).await;
    ledger.check().await;
}

/// Linux reports a failed sync once and forgets the pages, so that the process must not go on. The leader is the victim:
/// what it acknowledged is on the others.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sync_that_fails_ends_the_process() {
    let mut ledger = Ledger::new().await;
    ledger.write(10).await;
    ledger.lead(2).await;
    let strace = ledger.inject(2, "fdatasync:error=EIO").await;
    ledger.write(10).await;
    ledger.is_gone(2).await;
    drop(strace);
    assert!(ledger.log(2).contains("the process ends"), "{}", ledger.log(2));
    ledger.check().await;
    ledger.cell.restart(2).unwrap();
    ledger.write(10).await;
    ledger.check().await;
    ledger.agree().await;
}

/// A leader whose disk takes seconds is replaced, since it writes before it speaks; what it answers meanwhile is right or
/// `unavailable`. As a follower it delays nobody.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_on_a_slow_disk_is_replaced() {
    let mut ledger = Ledger::new().await;
    ledger.write(10).await;
    ledger.lead(2).await;
    let strace = ledger.inject(2, "fdatasync:delay_exit=3000000").await;
    for _ in 0..10 {
        ledger.write(10).await;
        for replica in [1, 3] {
            let shown = within("an answer", async || ledger.asked(replica).await).await;
            assert!(shown.is_superset(&ledger.written));
        }
        if let Ok(Some(shown)) = tokio::time::timeout(Duration::from_millis(200), ledger.asked(2)).await {
            assert!(shown.is_superset(&ledger.written), "a stale answer");
        }
    }
    assert_ne!(ledger.cell.status(1).await.unwrap().leader, 2);
    drop(strace);
    ledger.check().await;
    ledger.agree().await;
}

const IN_NAMESPACE: &str = "AMBIT_TEST_OWN_MOUNTS";

/// Runs the test again as a process with mounts of its own, which end with it. Whether this is that process.
fn with_own_mounts(test: &str) -> bool {
    if std::env::var_os(IN_NAMESPACE).is_some() {
        return true;
    }
    let me = std::env::current_exe().unwrap();
    let mut command = std::process::Command::new("unshare");
    command.args(["--mount", "--propagation", "private"]).arg(me).args(["--exact", test, "--nocapture"]);
    let out = command.env(IN_NAMESPACE, "1").output().unwrap();
    let said = [out.stdout, out.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
    assert!(out.status.success() && said.contains("1 passed"), "{said}");
    false
}

/// A tmpfs; its mount point can be removed again once this ends.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn at(folder: PathBuf) -> SmallDisk {
        std::fs::create_dir(&folder).unwrap();
        // Room for what a cell writes here, the audit log too, which is never cut.
        must_run(&["mount", "-t", "tmpfs", "-o", "size=64m,mode=0700", "tmpfs", folder.to_str().unwrap()]).unwrap();
        SmallDisk(folder)
    }

    fn remount(&self, how: &str) {
        must_run(&["mount", "-o", &format!("remount,{how}"), self.0.to_str().unwrap()]).unwrap();
    }

    /// To the last byte.
    fn fill(&self) {
        let path = self.0.join("ballast");
        let mut ballast = std::fs::File::options().create(true).append(true).open(path).unwrap();
        for block in [vec![1; 1 << 20], vec![1; 4096]] {
            while ballast.write_all(&block).is_ok() {}
        }
    }

    fn empty(&self) {
        std::fs::remove_file(self.0.join("ballast")).unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = must_run(&["umount", "--lazy", self.0.to_str().unwrap()]);
    }
}

/// Without space the leader ends, and does not start while there is none; the others serve on. With space it comes back
/// with all that it had. A disk that is only read is refused alike and not called damaged.
#[test]
fn a_full_or_read_only_disk_costs_its_replica_until_it_has_space() {
    if !with_own_mounts("a_full_or_read_only_disk_costs_its_replica_until_it_has_space") {
        return;
    }
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        let mut ledger = Ledger::of(Cell::start("west", 2).await.unwrap()).await;
        let disk = SmallDisk::at(ledger.cell.file("r3"));
        ledger.cell.add(3).await.unwrap();
        ledger.write(10).await;
        ledger.lead(3).await;
        disk.fill();
        // The log has some space of its own set aside.
        let mut writes = 0;
        while ledger.cell.process(3).unwrap().is_alive() {
            assert!(writes < 500, "a full disk went unnoticed: {:?}", ledger.cell.status(3).await);
            ledger.churn(200).await;
            writes += 1;
        }
        ledger.is_gone(3).await;
        ledger.check().await;
        let refused = |ledger: &Ledger, word: &str| {
            let said = ledger.refusal(3);
            assert!(said.contains("error[store_unusable]") && said.contains(word), "no {word} in {said}");
        };
        disk.fill();
        // With the last page it may open its log, and ends at the first write that finds none.
        match ledger.ends(3) {
            (None, said) => assert!(said.contains("the process ends"), "{said}"),
            (code, said) => {
                assert!(
                    code == Some(1) && said.contains("error[store_unusable]") && said.contains("nospace"),
                    "{said}"
                );
            }
        }
        ledger.write(10).await;
        disk.empty();
        ledger.cell.restart(3).unwrap();
        ledger.write(10).await;
        ledger.check().await;
        ledger.agree().await;

        ledger.cell.kill(3).unwrap();
        disk.remount("ro");
        refused(&ledger, "read-only");
        ledger.write(10).await;
        disk.remount("rw");
        ledger.cell.restart(3).unwrap();
        ledger.check().await;
        ledger.agree().await;
    });
}
