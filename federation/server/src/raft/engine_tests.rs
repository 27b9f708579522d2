//! Three engines on one virtual clock and on disks in memory: what needs a minute of time, without one.

use super::clock::Now;
use super::core::Input;
use super::engine::{Engine, Request};
use super::{Options, Role};
use crate::store::model::ModelDisk;
use crate::store::snapshot::{self, Header};
use crate::store::{Disk, Membership, Snapshots};
use ambit_model::{RaftIndex, ReplicaId, Stamp};
use ambit_state::{Command, LogEntry, State};
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};
use tokio::sync::oneshot;

const EPOCH: Stamp = Stamp(1_795_000_000_000);
const STEP: Duration = Duration::from_millis(10);

struct Three {
    engines: BTreeMap<u64, Engine<ModelDisk>>,
    origin: Instant,
    passed: Duration,
    /// Hears nobody and is not heard.
    cut: Option<u64>,
}

impl Three {
    fn new() -> Three {
        let mut engines = BTreeMap::new();
        for id in 1..=3 {
            let disk = ModelDisk::default();
            let mut state = State::new();
            state.skip(RaftIndex(1));
            let membership = Membership { version: 1, voters: BTreeSet::from([1, 2, 3]), learners: BTreeSet::new() };
            let header = Header { index: 1, term: 1, membership, digest: state.digest(), chunks: 0 };
            let bytes = snapshot::encode(header, state.rows()).unwrap();
            disk.open_snapshots().unwrap().write(&bytes).unwrap();
            disk.create_log(id).unwrap();
            let options = Options { keep_entries: 0, seed: 7, ..Options::new(ReplicaId(id), Default::default()) };
            engines.insert(id, Engine::open(options, &disk).unwrap());
        }
        Three { engines, origin: Instant::now(), passed: Duration::ZERO, cut: None }
    }

    fn now(&self) -> Now {
        Now { boot: self.origin + self.passed, wall: EPOCH.plus_ms(self.passed.as_millis() as u64) }
    }

    fn run(&mut self, how_long: Duration) {
        let until = self.passed + how_long;
        while self.passed < until {
            self.passed += STEP;
            let now = self.now();
            let mut sent = Vec::new();
            for (id, engine) in &mut self.engines {
                engine.tick();
                engine.housekeeping(now);
                let incarnation = engine.shared().incarnation;
                engine.work(now, &mut |all| sent.extend(all.into_iter().map(|m| (*id, incarnation, m)))).unwrap();
            }
            for (from, incarnation, message) in sent {
                if self.cut.is_some_and(|cut| cut == from || cut == message.to) {
                    continue;
                }
                let frame = Request::Frame { from, incarnation, clock: now.wall, messages: vec![message.bytes.into()] };
                self.engines.get_mut(&message.to).unwrap().take(frame, now);
            }
        }
    }

    fn leader(&self) -> u64 {
        let leads = |e: &Engine<ModelDisk>| e.published().status.borrow().role == Role::Leader;
        let leaders = self.engines.iter().filter(|(id, e)| Some(**id) != self.cut && leads(e));
        leaders.map(|(id, _)| *id).next().unwrap()
    }

    fn ask(&mut self, id: u64, request: Request) {
        let now = self.now();
        self.engines.get_mut(&id).unwrap().take(request, now);
    }

    fn tick_of_the_cell(&mut self) {
        let entry = LogEntry { stamp: Stamp(0), client: [0; 32], request: [0; 16], command: Command::Tick };
        self.ask(self.leader(), Request::Propose(Box::new(entry), oneshot::channel().0));
        self.run(Duration::from_millis(500));
    }

    fn stamp(&self, id: u64) -> Stamp {
        self.engines[&id].shared().state.read().unwrap().stamp()
    }
}

/// I15. A follower comes back after a minute, is brought up to date by a snapshot, and leads before another entry comes: the
/// minute is in the snapshot's stamp, and must not be added to it.
#[test]
fn a_leader_that_came_back_by_a_snapshot_adds_no_time() {
    let mut three = Three::new();
    three.run(Duration::from_secs(3));
    three.tick_of_the_cell();
    let away = three.engines.keys().copied().find(|id| *id != three.leader()).unwrap();
    three.cut = Some(away);
    for _ in 0..60 {
        three.tick_of_the_cell();
        three.run(Duration::from_millis(500));
    }
    // All of the log that it missed is gone.
    three.ask(three.leader(), Request::Snapshot(oneshot::channel().0));
    three.run(Duration::from_secs(1));
    three.cut = None;
    three.run(Duration::from_secs(3));
    assert_eq!(three.stamp(away), three.stamp(three.leader()), "it is up to date");
    assert!(three.engines[&away].log().command(3).is_none(), "by a snapshot");
    three.ask(three.leader(), Request::Core(Input::Transfer(away)));
    three.run(Duration::from_secs(2));
    assert_eq!(three.leader(), away);
    three.tick_of_the_cell();
    let (stamp, truth) = (three.stamp(away), three.now().wall);
    assert!(stamp > EPOCH.plus_ms(60_000) && stamp <= truth.plus_ms(2_000), "{stamp:?}, where it is {truth:?}");
}
