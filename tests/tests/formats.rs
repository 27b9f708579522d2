//! What former releases wrote: log, snapshot and messages between replicas, as bytes in `tests/formats`. This release opens
//! them and comes to the state that was recorded with them (rolling upgrade, N-1).
//!
//! A change of a format adds a folder, and keeps the former one until no supported release writes it:
//! `AMBIT_WRITE_FORMATS=1 cargo test -p ambit-tests --test formats` writes that of this release.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says that it failed by panicking")]

use ambit_model::{ReplicaId, Stamp};
use ambit_proto::v1;
use ambit_proto::v1::membership_client::MembershipClient;
use ambit_state::{Command, LogEntry};
use ambit_tests::cell::{Cell, fresh};
use ambit_tests::machine::{Machine, register_cluster};
use ambit_tests::operator::{admit, create_entry, say, svid};
use ambit_tests::process::{Folder, must_run};
use ambit_tests::tpm::Maker;
use ambitd::raft::engine::{Engine, Request};
use ambitd::raft::{Now, Options, rebase};
use ambitd::store;
use prost::Message;
use std::path::{Path, PathBuf};

/// The release whose formats the newest folder holds.
const THIS: &str = "0.1";
/// What a replica's store is made of, but for its tables, which are rebuilt.
const PARTS: [&str; 3] = ["log", "log.mark", "snapshot"];
/// Ticks and exchanges within which two replicas agree.
const ROUNDS: usize = 2_000;

fn formats() -> PathBuf {
    ambit_tests::root().unwrap().join("tests/formats")
}

/// A store and where it stands.
#[derive(serde::Serialize, serde::Deserialize, PartialEq, Debug)]
struct Place {
    applied: u64,
    digest: String,
}

/// What was true of the bytes when they were written.
#[derive(serde::Serialize, serde::Deserialize, PartialEq, Debug)]
struct Facts {
    /// Replica 1, stopped last, from its snapshot and its log.
    last: Place,
    /// Replica 3, stopped before.
    early: Place,
    /// Replica 3 after the frames that replica 1 sent it.
    caught_up: Place,
    /// Commands in the forwarded proposal.
    proposed: usize,
}

fn copied(from: &Path, folder: &Folder, name: &str) -> PathBuf {
    let to = folder.path(name);
    must_run(&["cp", "-a", from.to_str().unwrap(), to.to_str().unwrap()]).unwrap();
    to
}

/// All that a stopped replica holds, applied.
fn survey(id: u64, data: &Path) -> Place {
    let whole = rebase::survey(&Options::new(ReplicaId(id), data.to_owned())).unwrap().whole;
    Place { applied: whole.state.applied().0, digest: hex::encode(whole.state.digest()) }
}

/// One replica's engine over a real folder, without a thread.
struct Replica {
    id: u64,
    engine: Engine<store::Folder>,
}

impl Replica {
    fn open(id: u64, data: &Path) -> Replica {
        let options = Options::new(ReplicaId(id), data.to_owned());
        Replica { id, engine: Engine::open(options, &store::Folder(data.to_owned())).unwrap() }
    }

    /// Works, and gives the frames for `to`.
    fn work(&mut self, to: u64) -> Vec<v1::RaftFrame> {
        let (from, incarnation) = (self.id, self.engine.shared().incarnation);
        let mut frames = Vec::new();
        let send = &mut |messages: Vec<ambitd::raft::core::Outgoing>| {
            let messages: Vec<_> = messages.into_iter().filter(|m| m.to == to).map(|m| m.bytes).collect();
            if !messages.is_empty() {
                frames.push(v1::RaftFrame { from, incarnation, messages, clock_ms: Now::read().wall.0 });
            }
        };
        self.engine.work(Now::read(), send).unwrap();
        frames
    }

    fn take(&mut self, frame: v1::RaftFrame) {
        let messages = frame.messages.into_iter().map(Into::into).collect();
        let v1::RaftFrame { from, incarnation, clock_ms, .. } = frame;
        self.engine.take(Request::Frame { from, incarnation, clock: Stamp(clock_ms), messages }, Now::read());
    }

    fn place(&self) -> Place {
        let state = self.engine.shared().state.read().unwrap();
        Place { applied: state.applied().0, digest: hex::encode(state.digest()) }
    }
}

fn read_frames(path: &Path) -> Vec<v1::RaftFrame> {
    let (bytes, mut frames) = (std::fs::read(path).unwrap(), Vec::new());
    let mut rest = bytes.as_slice();
    while !rest.is_empty() {
        frames.push(v1::RaftFrame::decode_length_delimited(&mut rest).unwrap());
    }
    frames
}

fn read_facts(folder: &Path) -> Facts {
    toml::from_str(&std::fs::read_to_string(folder.join("facts.toml")).unwrap()).unwrap()
}

/// This release opens what `release` holds, and comes to the state recorded with it.
fn opens(release: &Path) {
    let (facts, folder) = (read_facts(release), Folder::new().unwrap());
    for (id, name, place) in [(1, "replica-1", &facts.last), (3, "replica-3", &facts.early)] {
        let data = copied(&release.join(name), &folder, name);
        assert_eq!(&survey(id, &data), place, "{name} of {}", release.display());
    }
    // A leader of that release and a follower of this one.
    let mut follower = Replica::open(3, &folder.path("replica-3"));
    for frame in read_frames(&release.join("frames")) {
        follower.take(frame);
        let answers = follower.work(1);
        assert!(answers.iter().all(|answer| answer.from == 3));
    }
    assert_eq!(follower.place(), facts.caught_up, "{}", release.display());
    // A follower of that release and a leader of this one.
    let forwarded = std::fs::read(release.join("propose")).unwrap();
    let forwarded = v1::ProposeRequest::decode(forwarded.as_slice()).unwrap();
    assert_eq!(forwarded.commands.len(), facts.proposed);
    for command in forwarded.commands {
        LogEntry::decode(&command).unwrap();
    }
}

#[test]
fn what_former_releases_wrote_is_opened_and_is_the_same_state() {
    let releases: Vec<_> = std::fs::read_dir(formats()).unwrap().map(|release| release.unwrap().path()).collect();
    assert!(releases.iter().any(|release| release.ends_with(THIS)), "no bytes of release {THIS}");
    releases.iter().for_each(|release| opens(release));
}

/// What real replicas of a real cell with a real TPM write now can be read later; where it is asked for, it becomes the
/// folder of this release.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_this_release_writes_can_be_kept() {
    let folder = Folder::new().unwrap();
    let release = match std::env::var_os("AMBIT_WRITE_FORMATS") {
        Some(_) => formats().join(THIS),
        None => folder.path(THIS),
    };
    // In a checkout of an unreleased version it may be written again.
    let _ = std::fs::remove_dir_all(&release);
    std::fs::create_dir_all(&release).unwrap();
    write(&release).await;
    opens(&release);
}

async fn write(release: &Path) {
    let folder = Folder::new().unwrap();
    live(release).await;
    let mut facts = Facts {
        last: survey(1, &copied(&release.join("replica-1"), &folder, "last")),
        early: survey(3, &copied(&release.join("replica-3"), &folder, "early")),
        caught_up: Place { applied: 0, digest: String::new() },
        proposed: 0,
    };
    let mut leader = Replica::open(1, &copied(&release.join("replica-1"), &folder, "leader"));
    let mut follower = Replica::open(3, &copied(&release.join("replica-3"), &folder, "follower"));
    let mut bytes = Vec::new();
    for _ in 0..ROUNDS {
        leader.engine.tick();
        for frame in leader.work(3) {
            bytes.extend(frame.encode_length_delimited_to_vec());
            follower.take(frame);
            follower.work(1).into_iter().for_each(|answer| leader.take(answer));
        }
        if follower.place().applied > facts.last.applied && follower.place() == leader.place() {
            break;
        }
    }
    assert_eq!(follower.place(), leader.place());
    facts.caught_up = follower.place();
    assert!(facts.caught_up.applied > facts.early.applied + 10, "{facts:?}");
    let command = |n: u8| {
        let command = Command::SealReport(format!("drill-{n}"), [n; 32]);
        LogEntry { stamp: Stamp(0), client: [1; 32], request: [n; 16], command }.encode().unwrap()
    };
    let commands: Vec<_> = (1..=3).map(command).collect();
    facts.proposed = commands.len();
    std::fs::write(release.join("frames"), bytes).unwrap();
    std::fs::write(release.join("propose"), v1::ProposeRequest { commands, change: None }.encode_to_vec()).unwrap();
    std::fs::write(release.join("facts.toml"), toml::to_string(&facts).unwrap()).unwrap();
    println!("{facts:?}");
}

/// A cell's life: a third and a second replica join, a machine is admitted, entries, an SVID, a ban, a snapshot, a report. The
/// third replica stops before half of that.
async fn live(release: &Path) {
    let maker = Maker::new().unwrap();
    let mut cell = Cell::start("west", 3).await.unwrap();
    let machine = Machine::new(&maker, "m1").await.unwrap();
    register_cluster(&cell, "west", &maker).await.unwrap();
    create_entry(&cell, "web", "west").await.unwrap();
    keep(&mut cell, 3, &release.join("replica-3")).await;
    let me = admit(&cell, &machine, "west").await.unwrap();
    assert_eq!(svid(&cell, &me, "web").await.unwrap(), "ok");
    let mut operator = MembershipClient::new(cell.admin(1).await.unwrap());
    operator.snapshot(v1::SnapshotRequest {}).await.unwrap();
    for n in 0..10 {
        create_entry(&cell, &format!("entry-{n}"), "west").await.unwrap();
    }
    say(&cell, "ban", &[machine.node()]).await.unwrap();
    let request =
        v1::SealReportRequest { request_id: fresh(), drill: "leader-loss".into(), report_sha256: vec![7; 32] };
    let report = |channel| {
        let request = request.clone();
        async move { v1::drill_client::DrillClient::new(channel).seal_report(request).await }
    };
    cell.insist(report).await.unwrap();
    keep(&mut cell, 1, &release.join("replica-1")).await;
}

/// Ends a replica in order and keeps its store.
async fn keep(cell: &mut Cell, number: usize, to: &Path) {
    let id = cell.process(number).unwrap().id().to_string();
    must_run(&["kill", "-TERM", &id]).unwrap();
    while cell.process(number).unwrap().is_alive() {
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    cell.kill(number).unwrap();
    std::fs::create_dir_all(to).unwrap();
    for part in PARTS {
        let from = cell.seat_of(number).unwrap().data.join(part);
        must_run(&["cp", "-r", from.to_str().unwrap(), to.to_str().unwrap()]).unwrap();
    }
    let _ = std::fs::remove_file(to.join("log/LOCK"));
}
