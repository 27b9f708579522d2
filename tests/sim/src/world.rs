//! One cell: its machines, network, clients and faults on one virtual clock, and the oracle beside them.

use crate::client::{Client, OpId};
use crate::dice::Dice;
use crate::host::{Clock, Condition, Host, Process};
use crate::load::Load;
use crate::network::Network;
use crate::oracle::{History, Violation};
use crate::peering::Letter;
use crate::plan::{MS, Micros, Plan, SECOND};
use crate::queue::{Event, Queue};
use crate::tally::Tally;
use crate::template::Template;
use ambit_identity::RecordKey;
use ambit_model::TrustDomain;
use ambit_state::objects::KeySetRow;
use ambitd::raft::core::Input;
use ambitd::raft::engine::Request;
use ambitd::store::model::ModelDisk;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Instant;

/// As `raft::Options`: a proposal or barrier is answered within this, if only by `unavailable`.
pub(crate) const DEADLINE: Micros = 5 * SECOND;
/// Between the end of one request and the next of a client.
pub(crate) const THINK_MAX: Micros = 60 * MS;

pub(crate) struct World {
    pub(crate) plan: Plan,
    pub(crate) now: Micros,
    pub(crate) dice: Dice,
    pub(crate) hosts: BTreeMap<u64, Host>,
    pub(crate) network: Network,
    pub(crate) clients: Vec<Client>,
    pub(crate) load: Load,
    pub(crate) history: History,
    pub(crate) tally: Tally,
    /// Faults are over.
    pub(crate) calm: bool,
    /// Nobody asks any more.
    pub(crate) quiet: bool,
    /// The machine that the operator asked in last.
    pub(crate) invited: Option<u64>,
    /// The machine whose clock may be wrong.
    pub(crate) wrong_clock: Option<u64>,
    pub(crate) cell: TrustDomain,
    /// They sign what peers pull; none where the cell has no peers.
    pub(crate) record_keys: Vec<Rc<RecordKey>>,
    /// The key set that it begins anew with.
    pub(crate) anew: KeySetRow,
    pub(crate) begun_anew: bool,
    /// To other cells, and when they leave.
    pub(crate) outbox: Vec<(Micros, Letter)>,
    /// Requests that replicas made on their own account.
    pub(crate) own_requests: u64,
    pub(crate) terms: u64,
    origin: Instant,
    queue: Queue<Event>,
    trace: bool,
}

impl World {
    pub(crate) fn new(plan: Plan, template: &Template, trace: bool) -> Result<World, Violation> {
        let mut dice = Dice::new(plan.seed);
        let network = Network::new(&plan, dice.branch());
        let mut world = World {
            now: 0,
            network,
            hosts: BTreeMap::new(),
            clients: (0..plan.clients).map(|_| Client::new()).collect(),
            load: Load::new(&template.seat, !plan.outage),
            history: History::new(!template.record_keys.is_empty()),
            tally: Tally::default(),
            calm: false,
            quiet: false,
            invited: None,
            wrong_clock: None,
            cell: template.seat.name.clone(),
            record_keys: template.record_keys.clone(),
            anew: template.anew.clone(),
            begun_anew: false,
            outbox: Vec::new(),
            own_requests: 0,
            terms: 0,
            origin: Instant::now(),
            queue: Queue::new(),
            trace,
            dice,
            plan,
        };
        for (index, term, command) in &template.entries {
            world.history.applied(0, *index, *term, command.clone(), 0)?;
        }
        for (id, disk) in &template.disks {
            world.add_host(*id, disk.copied());
        }
        world.set_clocks();
        for n in 0..world.clients.len() {
            let at = world.dice.below(THINK_MAX);
            world.at(at, Event::Client(n));
        }
        world.schedule_faults();
        Ok(world)
    }

    /// At most one machine's clocks are wrong: then no stamp may be far off.
    fn set_clocks(&mut self) {
        let ids: Vec<u64> = self.hosts.keys().copied().collect();
        let (off, drift) = (self.plan.clock_off_ms, self.plan.drift_ppm);
        let (wrong, fast) = (self.dice.pick(&ids).copied(), self.dice.pick(&ids).copied());
        for (id, host) in &mut self.hosts {
            host.clock.off_ms = if Some(*id) == wrong { off } else { 0 };
            host.clock.drift_ppm = if Some(*id) == fast { drift } else { 0 };
        }
        self.wrong_clock = wrong;
        self.network.slow_down(&ids, self.plan.slow_link);
        self.history.stamps_lead_max_ms = crate::faults::stamps_lead_max_ms(&self.plan);
    }

    pub(crate) fn add_host(&mut self, id: u64, disk: ModelDisk) {
        let host = Host {
            id,
            condition: Condition::Down,
            disk,
            process: None,
            life: 0,
            busy_until: 0,
            paused_until: 0,
            run_at: None,
            may_refuse: false,
            clock: Clock::new(self.origin),
        };
        self.hosts.insert(id, host);
        self.at(self.now, Event::Start(id));
    }

    pub(crate) fn at(&mut self, at: Micros, event: Event) {
        self.queue.push(at.max(self.now), event);
    }

    pub(crate) fn say(&self, what: impl FnOnce() -> String) {
        if self.trace {
            println!("{:>12.3} ms  {}: {}", self.now as f64 / MS as f64, self.cell, what());
        }
    }

    /// When something happens next.
    pub(crate) fn next(&self) -> Option<Micros> {
        self.queue.next()
    }

    /// The next event.
    pub(crate) fn step(&mut self) -> Result<(), Violation> {
        let Some((at, event)) = self.queue.pop() else { return Ok(()) };
        self.now = at;
        self.happen(event)
    }

    /// Until `end`, or until nothing more happens.
    pub(crate) fn run_until(&mut self, end: Micros) -> Result<(), Violation> {
        while self.next().is_some_and(|at| at <= end) {
            self.step()?;
        }
        self.now = end;
        Ok(())
    }

    fn happen(&mut self, event: Event) -> Result<(), Violation> {
        match event {
            Event::Run(id) => self.run(id)?,
            Event::Frame { to, from, incarnation, clock, messages } => {
                self.give(to, Request::Frame { from, incarnation, clock, messages });
            }
            Event::Forward { to, from, life, op, entry } => self.forwarded(to, from, life, op, entry),
            Event::Answer { to, life, op, outcome } => self.answered(to, life, op, outcome),
            Event::SnapshotLost { from, to } => {
                self.give(from, Request::Core(Input::Unreachable(to)));
                self.give(from, Request::Core(Input::SnapshotFailed(to)));
            }
            Event::Start(id) => self.start(id)?,
            Event::Client(n) => self.client(n)?,
            Event::Fault(kind) => self.fault(kind)?,
            Event::Mend => {
                self.network.mend();
                self.say(|| "the network is whole".into());
            }
            Event::Letter(letter) => self.letter(*letter)?,
            Event::CoSign { to, asked } => self.asked_to_sign(to, *asked),
            Event::CoSigned { to, said } => self.signed(to, *said),
        }
        Ok(())
    }

    /// Puts a request into a replica's queue; it runs as soon as it may.
    pub(crate) fn give(&mut self, id: u64, request: Request) {
        let Some(host) = self.hosts.get_mut(&id) else { return };
        let Some(process) = &mut host.process else { return };
        process.push(request);
        let at = self.now.max(host.busy_until).max(host.paused_until);
        self.wake(id, at);
    }

    pub(crate) fn wake(&mut self, id: u64, at: Micros) {
        let Some(host) = self.hosts.get_mut(&id) else { return };
        if host.run_at.is_none_or(|set| set > at) {
            host.run_at = Some(at);
            self.at(at, Event::Run(id));
        }
    }

    fn start(&mut self, id: u64) -> Result<(), Violation> {
        let snapshots = (self.plan.snapshot_after, self.plan.keep_entries);
        let Some(host) = self.hosts.get_mut(&id) else { return Ok(()) };
        if host.process.is_some() || host.condition == Condition::Removed {
            return Ok(());
        }
        match Process::start(id, &host.disk, self.plan.seed, snapshots) {
            Ok(_) if host.condition == Condition::Ruined => {
                Err(Violation::of("I14", format!("replica {id} started from a ruined disk")))
            }
            Ok(process) => {
                host.condition = Condition::Up;
                host.life += 1;
                (host.busy_until, host.paused_until, host.run_at) = (self.now, self.now, None);
                let applied = process.applied();
                host.process = Some(process);
                self.say(|| format!("replica {id} starts at {applied}"));
                self.look(id)?;
                self.wake(id, self.now);
                Ok(())
            }
            Err(e) => {
                let why =
                    format!("{e}: {}", std::error::Error::source(&e).map(ToString::to_string).unwrap_or_default());
                if host.disk.is_dead() {
                    // It died at opening; the next start may do better.
                    self.crash(id);
                } else if host.may_refuse {
                    host.condition = Condition::Ruined;
                } else if host.condition != Condition::Ruined {
                    return Err(Violation::of("L1", format!("replica {id} does not start from a good disk: {why}")));
                }
                self.say(|| format!("replica {id} refuses to start: {why}"));
                Ok(())
            }
        }
    }

    /// The process ends and what was in memory is gone; it is started again soon.
    pub(crate) fn crash(&mut self, id: u64) {
        let away = if self.calm { 20 * MS } else { self.dice.between(20 * MS, 1_500 * MS) };
        self.crash_for(id, self.now + away);
    }

    /// Every replica of the cell at once, as when a site loses its power.
    pub(crate) fn restart(&mut self) {
        let up: Vec<u64> = self.hosts.values().filter(|h| h.condition == Condition::Up).map(|h| h.id).collect();
        for id in up {
            self.crash(id);
        }
    }

    /// It is started again at `back`.
    pub(crate) fn crash_for(&mut self, id: u64, back: Micros) {
        let Some(host) = self.hosts.get_mut(&id) else { return };
        let lost = host.process.take();
        host.life += 1;
        host.run_at = None;
        let dice = &mut self.dice;
        host.disk.crash(&mut |sides| dice.below(sides));
        host.disk.make_good();
        if host.condition == Condition::Up {
            host.condition = Condition::Down;
        }
        self.tally.crashes += 1;
        self.say(|| format!("replica {id} is down"));
        self.at(back, Event::Start(id));
        // Whoever waited there sees the connection break.
        let waited: Vec<OpId> = lost.iter().flat_map(Process::waiting).collect();
        for op in waited {
            self.failed(op);
        }
    }
}
