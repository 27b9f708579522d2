//! A cell of three as operators set it up, made once by the real code; every run begins with copies of its disks.

use crate::card::Card;
use crate::host::{Clock, Process, TICK};
use crate::load::Load;
use crate::oracle::Violation;
use crate::plan::{MS, Micros};
use ambit_identity::RecordKey;
use ambit_model::{Refusal, ReplicaId, Stamp, TrustDomain};
use ambit_state::LogEntry;
use ambit_state::objects::{KeySetRow, PeerRow};
use ambitd::raft::engine::Request;
use ambitd::raft::{found_on, prepare_join_on};
use ambitd::store::Change;
use ambitd::store::model::ModelDisk;
use bytes::Bytes;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Instant;

/// Replicas of the cell.
pub(crate) const REPLICAS: u64 = 3;
/// Virtual time that the set-up may take.
const SETUP_MAX: Micros = 60_000 * MS;
/// No snapshot but the joiners', so that every entry can be read at the end.
const SNAPSHOTS: (u64, u64) = (1_000_000, 1_000_000);

/// Which cell it is.
#[derive(Clone, Debug)]
pub(crate) struct Seat {
    pub(crate) name: TrustDomain,
    /// Counts the cells of a run: machines of two cells are never the same.
    pub(crate) number: u8,
}

pub(crate) struct Template {
    pub(crate) seat: Seat,
    /// With which its replicas sign what peers pull; none where the cell has no peers.
    pub(crate) record_keys: Vec<Rc<RecordKey>>,
    /// The key set that it begins anew with.
    pub(crate) anew: KeySetRow,
    /// The one that it has.
    pub(crate) key_set: KeySetRow,
    /// What a forger shows in this cell's name.
    pub(crate) forged: Option<Rc<Card>>,
    pub(crate) disks: Vec<(u64, ModelDisk)>,
    /// Index, term and command of every entry after the founding.
    pub(crate) entries: Vec<(u64, u64, Option<Bytes>)>,
}

struct Setup {
    processes: BTreeMap<u64, Process>,
    clock: Clock,
    now: Micros,
}

impl Template {
    /// A cell alone.
    pub(crate) fn alone() -> Result<Template, Violation> {
        let name = "west".parse().map_err(|r: Refusal| Violation::of("set-up", r.to_string()))?;
        Template::make(Seat { name, number: 0 }, None, Vec::new())
    }

    /// Cells that know each other.
    pub(crate) fn peered(names: &[&str]) -> Result<Vec<Template>, Violation> {
        let wrong = |r: Refusal| Violation::of("set-up", r.to_string());
        let cards: Vec<Card> =
            names.iter().map(|name| Card::of(name, "own")).collect::<Result<_, _>>().map_err(wrong)?;
        let each = cards.iter().enumerate().map(|(n, card)| {
            let others = cards.iter().enumerate().filter(|(other, _)| *other != n);
            let peers = others.map(|(_, card)| (card.name.clone(), card.row())).collect();
            let seat = Seat { name: card.name.clone(), number: u8::try_from(n).unwrap_or(u8::MAX) };
            Template::make(seat, Some(card), peers)
        });
        each.collect()
    }

    fn make(seat: Seat, card: Option<&Card>, peers: Vec<(TrustDomain, PeerRow)>) -> Result<Template, Violation> {
        let wrong = |what: String| Violation::of("set-up", what);
        let disks: Vec<(u64, ModelDisk)> = (1..=REPLICAS).map(|id| (id, ModelDisk::default())).collect();
        let mut setup = Setup { processes: BTreeMap::new(), clock: Clock::new(Instant::now()), now: 0 };
        for (id, disk) in &disks {
            let made = if *id == 1 { found_on(disk, ReplicaId(*id)) } else { prepare_join_on(disk, ReplicaId(*id)) };
            made.map_err(|e| wrong(e.to_string()))?;
            let process = Process::start(*id, disk, 0, SNAPSHOTS).map_err(|e| wrong(e.to_string()))?;
            setup.processes.insert(*id, process);
        }
        setup.until("the founder leads", |s| s.founder().is_some_and(Process::leads))?;
        for (n, command) in Load::setup(&seat, card, peers).map_err(|r| wrong(r.to_string()))?.into_iter().enumerate() {
            let before = setup.founder().map_or(0, Process::applied);
            let request = [u8::try_from(n + 1).unwrap_or(u8::MAX); 16];
            let entry = LogEntry { stamp: Stamp(0), client: [0xee; 32], request, command };
            setup.give(Request::Propose(Box::new(entry), tokio::sync::oneshot::channel().0));
            setup.until("a command of the set-up", |s| s.founder().is_some_and(|p| p.applied() > before))?;
        }
        for id in 2..=REPLICAS {
            for change in [Change::AddLearner(id), Change::Promote(id)] {
                setup.change(change)?;
            }
        }
        let end = setup.founder().map_or(0, Process::applied);
        setup.until("all agree", |s| s.processes.values().all(|p| p.applied() >= end))?;
        let end = setup.founder().map_or(0, Process::applied);
        let entry = |index| {
            let held = setup.founder().and_then(|p| p.engine.log().command(index));
            held.map(|(term, command)| (index, term, command)).ok_or_else(|| wrong(format!("no entry {index}")))
        };
        let entries = (2..=end).map(entry).collect::<Result<_, _>>()?;
        for process in setup.processes.values_mut() {
            process.engine.close().map_err(|e| wrong(e.to_string()))?;
        }
        let forged = card.map(|card| Card::of(card.name.as_str(), "forged").map(Rc::new)).transpose();
        let forged = forged.map_err(|r| wrong(r.to_string()))?;
        let sets = card.map(|card| (card.keys.clone(), card.anew.clone(), card.key_set.clone()));
        let (record_keys, anew, key_set) = sets.unwrap_or_default();
        Ok(Template { seat, record_keys, anew, key_set, forged, disks, entries })
    }
}

impl Setup {
    fn founder(&self) -> Option<&Process> {
        self.processes.get(&1)
    }

    fn give(&mut self, request: Request) {
        if let Some(founder) = self.processes.get_mut(&1) {
            founder.push(request);
        }
    }

    /// Asked until it shows: a learner that is behind is not promoted at once.
    fn change(&mut self, change: Change) -> Result<(), Violation> {
        for _ in 0..100 {
            let Some(version) = self.founder().map(|p| p.status().membership_version) else { break };
            self.give(Request::Change(change, version, tokio::sync::oneshot::channel().0));
            let until = self.now + 200 * MS;
            while self.now < until {
                self.step()?;
            }
            if self.founder().is_some_and(|p| p.status().membership_version > version) {
                return Ok(());
            }
        }
        Err(Violation::of("set-up", format!("{change:?} did not take effect")))
    }

    fn until(&mut self, what: &str, holds: impl Fn(&Setup) -> bool) -> Result<(), Violation> {
        while !holds(self) {
            if self.now > SETUP_MAX {
                return Err(Violation::of("set-up", format!("{what}: not in time")));
            }
            self.step()?;
        }
        Ok(())
    }

    fn step(&mut self) -> Result<(), Violation> {
        self.now += TICK;
        let (clock, counted) = (self.clock.read(self.now), self.clock.counted(self.now));
        let mut sent = Vec::new();
        for (id, process) in &mut self.processes {
            while let Some(request) = process.inbox.pop_front() {
                process.engine.take(request, clock);
            }
            process.tick(counted);
            process.engine.housekeeping(clock);
            let incarnation = process.shared.incarnation;
            let worked = process.engine.work(clock, &mut |messages| {
                sent.extend(messages.into_iter().map(|message| (*id, incarnation, message)));
            });
            worked.map_err(|e| Violation::of("set-up", e.to_string()))?;
        }
        for (from, incarnation, message) in sent {
            if let Some(process) = self.processes.get_mut(&message.to) {
                let messages = vec![message.bytes.into()];
                process.push(Request::Frame { from, incarnation, clock: clock.wall, messages });
            }
        }
        Ok(())
    }
}
