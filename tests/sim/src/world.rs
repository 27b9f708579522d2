//! One run: machines, network, clients and faults on one virtual clock, and the oracle beside them.

use crate::client::{Client, Op, OpId, Wish};
use crate::dice::Dice;
use crate::host::{Clock, Condition, Host, Process, Proposal, Reading, Step};
use crate::load::Load;
use crate::network::Network;
use crate::oracle::{History, View, Violation};
use crate::plan::{MS, Micros, Plan, SECOND};
use crate::template::Template;
use ambit_model::Stamp;
use ambit_state::{Applied, Command, LogEntry};
use ambitd::raft::core::Input;
use ambitd::raft::engine::Request;
use ambitd::store::model::ModelDisk;
use bytes::Bytes;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::time::Instant;

/// As `raft::Options`: a proposal or barrier is answered within this, if only by `unavailable`.
pub(crate) const DEADLINE: Micros = 5 * SECOND;
/// Between the end of one request and the next of a client.
const THINK_MAX: Micros = 60 * MS;
/// Tries of a client before it gives up; what became of the request then is open for ever.
const TRIES_MAX: u32 = 12;
/// A run of the replica without a sync takes this long.
const RUN: Micros = 20;
/// From a lost frame to the news that its stream is broken.
const STREAM_BREAKS: Micros = 200 * MS;
/// Requests taken in before the next append, as in the driver.
const BATCH_MAX: usize = 1024;

/// What happens at a moment.
pub(crate) enum Event {
    Run(u64),
    Frame { to: u64, from: u64, incarnation: u64, clock: Stamp, messages: Vec<Bytes> },
    Forward { to: u64, from: u64, life: u64, op: OpId, entry: Box<LogEntry> },
    Answer { to: u64, life: u64, op: OpId, outcome: Result<u64, ()> },
    SnapshotLost { from: u64, to: u64 },
    Start(u64),
    Client(usize),
    Fault(crate::faults::Kind),
    Mend,
}

/// Ordered by time, then by when it was set: equal moments have one order.
struct Due(Micros, u64, Event);

impl PartialEq for Due {
    fn eq(&self, other: &Due) -> bool {
        (self.0, self.1) == (other.0, other.1)
    }
}
impl Eq for Due {}
impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Due) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Due {
    fn cmp(&self, other: &Due) -> std::cmp::Ordering {
        (self.0, self.1).cmp(&(other.0, other.1))
    }
}

/// What a run did, for its summary and its digest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) acknowledged: u64,
    pub(crate) reads: u64,
    pub(crate) entries: u64,
    pub(crate) crashes: u64,
    pub(crate) partitions: u64,
    pub(crate) pauses: u64,
    pub(crate) disk_faults: u64,
    pub(crate) ruined: u64,
    pub(crate) replaced: u64,
    pub(crate) elections: u64,
    /// Of the history's last state.
    pub(crate) digest: [u8; 32],
}

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
    /// The machine that the operator asked in last.
    pub(crate) invited: Option<u64>,
    origin: Instant,
    queue: BinaryHeap<Reverse<Due>>,
    set: u64,
    terms: u64,
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
            load: Load::new(),
            history: History::new(),
            tally: Tally::default(),
            calm: false,
            invited: None,
            origin: Instant::now(),
            queue: BinaryHeap::new(),
            set: 0,
            terms: 0,
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
            clock: Clock::new(self.origin),
        };
        self.hosts.insert(id, host);
        self.at(self.now, Event::Start(id));
    }

    pub(crate) fn at(&mut self, at: Micros, event: Event) {
        self.set += 1;
        self.queue.push(Reverse(Due(at.max(self.now), self.set, event)));
    }

    pub(crate) fn say(&self, what: impl FnOnce() -> String) {
        if self.trace {
            println!("{:>12.3} ms  {}", self.now as f64 / MS as f64, what());
        }
    }

    /// Until `end`, or until nothing more happens.
    pub(crate) fn run_until(&mut self, end: Micros) -> Result<(), Violation> {
        while self.queue.peek().is_some_and(|Reverse(due)| due.0 <= end) {
            let Some(Reverse(Due(at, _, event))) = self.queue.pop() else { break };
            self.now = at;
            self.happen(event)?;
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
        let waited = lost.into_iter().flat_map(|p| {
            let reads = p.reads.into_iter().map(|r| r.op);
            p.proposals.into_iter().map(|p| p.op).chain(reads).collect::<Vec<_>>()
        });
        for op in waited.collect::<Vec<_>>() {
            self.failed(op);
        }
    }

    fn run(&mut self, id: u64) -> Result<(), Violation> {
        let Some(host) = self.hosts.get_mut(&id) else { return Ok(()) };
        if host.run_at != Some(self.now) {
            return Ok(());
        }
        host.run_at = None;
        let free = host.busy_until.max(host.paused_until);
        if free > self.now {
            self.wake(id, free);
            return Ok(());
        }
        let Some(process) = &mut host.process else { return Ok(()) };
        let (clock, counted) = (host.clock.read(self.now), host.clock.counted(self.now));
        for _ in 0..BATCH_MAX {
            let Some(request) = process.inbox.pop_front() else { break };
            process.engine.take(request, clock);
        }
        process.tick(counted);
        if counted >= process.next_second {
            process.next_second = counted + SECOND;
            if process.leads() {
                let tick = LogEntry { stamp: Stamp(0), client: [0; 32], request: [0; 16], command: Command::Tick };
                process.engine.take(Request::Propose(Box::new(tick), tokio::sync::oneshot::channel().0), clock);
            }
        }
        process.engine.housekeeping(clock);
        let (syncs_before, disk) = (host.disk.syncs(), host.disk.clone());
        let mut sent = Vec::new();
        let outcome = process.engine.work(clock, &mut |messages| {
            let after = disk.syncs() - syncs_before;
            sent.extend(messages.into_iter().map(|message| (after, message)));
        });
        let sync = self.dice.between(100, self.plan.sync_max.max(101));
        let sync = if self.calm { 100 } else { sync };
        host.busy_until = self.now + RUN + (disk.syncs() - syncs_before) * sync;
        let (incarnation, next_tick) = (process.shared.incarnation, self.now + crate::host::TICK);
        let pressed = process.engine.is_pressed() || !process.inbox.is_empty();
        let again = if pressed { host.busy_until } else { next_tick.max(host.busy_until) };
        self.send((id, incarnation, clock.wall), sync, sent);
        self.look(id)?;
        if outcome.is_err() || disk.is_dead() {
            if let Err(fatal) = &outcome
                && !disk.is_dead()
            {
                return Err(Violation::of("L1", format!("replica {id} cannot go on: {fatal}")));
            }
            self.tally.disk_faults += 1;
            self.crash(id);
            return Ok(());
        }
        self.attend(id)?;
        self.wake(id, again);
        // Whoever waited may have asked for more at once.
        if let Some(host) = self.hosts.get(&id)
            && host.process.as_ref().is_some_and(|p| !p.inbox.is_empty())
        {
            self.wake(id, host.busy_until);
        }
        Ok(())
    }

    /// Messages to one peer that leave together travel in one frame; what waits for the disk leaves after its syncs.
    fn send(
        &mut self,
        (from, incarnation, clock): (u64, u64, Stamp),
        sync: Micros,
        sent: Vec<(u64, ambitd::raft::core::Outgoing)>,
    ) {
        let mut frames: BTreeMap<(u64, u64), (Vec<Bytes>, bool)> = BTreeMap::new();
        for (after, message) in sent {
            let (messages, snapshot) = frames.entry((after, message.to)).or_default();
            messages.push(message.bytes.into());
            *snapshot |= message.snapshot;
        }
        for ((after, to), (messages, snapshot)) in frames {
            let leaves = self.now + RUN + after * sync;
            let arrivals = self.network.arrivals(from, to, leaves);
            if arrivals.is_empty() && snapshot {
                // The courier's stream breaks where a frame is lost, and it says that a snapshot may have been among them.
                self.at(leaves + STREAM_BREAKS, Event::SnapshotLost { from, to });
            }
            for arrives in arrivals {
                let messages = messages.clone();
                self.at(arrives, Event::Frame { to, from, incarnation, clock, messages });
            }
        }
    }

    /// The oracle sees what a replica applied and shows.
    fn look(&mut self, id: u64) -> Result<(), Violation> {
        let Some(process) = self.hosts.get_mut(&id).and_then(|host| host.process.as_mut()) else { return Ok(()) };
        let applied = process.applied();
        for index in process.seen + 1..=applied {
            // What is no more in the log came by a snapshot, or was applied and compacted at once.
            if let Some((term, command)) = process.engine.log().command(index) {
                self.history.applied(id, index, term, command, self.now)?;
            }
        }
        process.seen = applied;
        let status = process.status();
        let is_new = std::mem::replace(&mut process.term, status.term) != status.term;
        let digest = process.shared.state.read().map(|state| state.digest()).unwrap_or_default();
        let leads_in = process.leads().then_some(status.term);
        if let Some(term) = leads_in
            && term > self.terms
        {
            self.terms = term;
            self.tally.elections += 1;
        }
        if is_new {
            self.new_term(id);
        }
        let shown = self.history.shows(&View { host: id, applied, digest, leads_in });
        if shown.is_err()
            && let Some(process) = self.hosts.get(&id).and_then(|host| host.process.as_ref())
            && let Ok(state) = process.shared.state.read()
        {
            self.say(|| format!("replica {id}'s state: {}", self.history.difference(&state)));
        }
        shown
    }

    /// Those who wait at a replica.
    fn attend(&mut self, id: u64) -> Result<(), Violation> {
        let now = self.now;
        let Some(host) = self.hosts.get_mut(&id) else { return Ok(()) };
        let life = host.life;
        let Some(process) = &mut host.process else { return Ok(()) };
        let status = process.status();
        let (mut done, mut forward, mut answers) = (Vec::new(), Vec::new(), Vec::new());
        let mut proposals = std::mem::take(&mut process.proposals);
        proposals.retain_mut(|proposal| match advance(proposal, process, &status, now) {
            Progress::Waits => true,
            Progress::Forward(to) => {
                forward.push((to, proposal.op, proposal.entry.clone()));
                true
            }
            Progress::Done(outcome) => {
                done.push((proposal.op, outcome));
                false
            }
        });
        process.proposals = proposals;
        let mut read = Vec::new();
        process.reads.retain_mut(|reading| match reading.answer.try_recv() {
            Ok(_) => {
                read.push((reading.op, true));
                false
            }
            Err(tokio::sync::oneshot::error::TryRecvError::Empty) if now < reading.deadline => true,
            Err(_) => {
                read.push((reading.op, false));
                false
            }
        });
        process.forwarded.retain_mut(|waiting| match waiting.answer.try_recv() {
            Ok(outcome) => {
                answers.push((waiting.from, waiting.life, waiting.op, outcome.map_err(drop)));
                false
            }
            Err(tokio::sync::oneshot::error::TryRecvError::Empty) => true,
            Err(_) => false,
        });
        let applied = process.applied();
        for (to, op, entry) in forward {
            for arrives in self.network.arrivals(id, to, now) {
                let entry = Box::new(entry.clone());
                self.at(arrives, Event::Forward { to, from: id, life, op, entry });
            }
        }
        for (to, life, op, outcome) in answers {
            for arrives in self.network.arrivals(id, to, now) {
                self.at(arrives, Event::Answer { to, life, op, outcome });
            }
        }
        for (op, outcome) in done {
            match outcome {
                Some(applied) => {
                    let index = applied.index.0;
                    self.history.acknowledged(op.client, op.number, index, &applied.outcome)?;
                    self.finished(op);
                }
                None => self.failed(op),
            }
        }
        for (op, answered) in read {
            if !answered {
                self.failed(op);
                continue;
            }
            if let Some(Wish::Read { after }) = self.wish(op) {
                self.history.read(id, after, applied)?;
                self.tally.reads += 1;
            }
            self.finished(op);
        }
        Ok(())
    }

    fn forwarded(&mut self, to: u64, from: u64, life: u64, op: OpId, entry: Box<LogEntry>) {
        let (tell, answer) = tokio::sync::oneshot::channel();
        let Some(process) = self.hosts.get_mut(&to).and_then(|host| host.process.as_mut()) else { return };
        process.forwarded.push(crate::host::Forwarded { from, life, op, answer });
        self.give(to, Request::Propose(entry, tell));
    }

    fn answered(&mut self, to: u64, life: u64, op: OpId, outcome: Result<u64, ()>) {
        let now = self.now;
        let Some(host) = self.hosts.get_mut(&to).filter(|host| host.life == life) else { return };
        let Some(process) = &mut host.process else { return };
        for proposal in process.proposals.iter_mut().filter(|p| p.op == op) {
            if matches!(proposal.step, Step::Remote { .. }) {
                proposal.step = match outcome {
                    Ok(term) => Step::Appended { term, until: now + SECOND },
                    Err(()) => Step::Later { until: now + 25 * MS },
                };
            }
        }
    }

    /// Every admitted node's round is judged once a second, through the leader, as its verdict queue hands them in.
    pub(crate) fn attest_until(&mut self, end: Micros) -> Result<(), Violation> {
        while self.now < end {
            if let Some(leader) = self.leader().map(|status| status.id.0)
                && let Some(process) = self.hosts.get(&leader).and_then(|host| host.process.as_ref())
            {
                let shared = process.shared.clone();
                let state = shared.state.read().unwrap_or_else(std::sync::PoisonError::into_inner);
                for at in 0..usize::from(crate::load::NODES) {
                    let command = self.load.round(at, &state);
                    let entry = LogEntry { stamp: Stamp(0), client: [0; 32], request: [0; 16], command };
                    self.give(leader, Request::Propose(Box::new(entry), tokio::sync::oneshot::channel().0));
                }
            }
            self.run_until((self.now + SECOND).min(end))?;
        }
        Ok(())
    }

    fn wish(&self, op: OpId) -> Option<Wish> {
        let known = self.clients.get(op.client)?.op.as_ref().filter(|known| known.id == op)?;
        Some(known.wish.clone())
    }

    fn finished(&mut self, op: OpId) {
        let Some(client) = self.clients.get_mut(op.client) else { return };
        if client.op.as_ref().is_some_and(|known| known.id == op) {
            client.op = None;
            let think = self.dice.below(THINK_MAX);
            self.at(self.now + think, Event::Client(op.client));
        }
    }

    /// Unavailable, or the connection broke: the client asks again elsewhere, under the same id.
    fn failed(&mut self, op: OpId) {
        let again = self.now + self.dice.between(10 * MS, 100 * MS);
        if self.clients.get(op.client).is_some_and(|c| c.op.as_ref().is_some_and(|known| known.id == op)) {
            self.at(again, Event::Client(op.client));
        }
    }

    /// A client begins, or asks again.
    fn client(&mut self, n: usize) -> Result<(), Violation> {
        // Whoever was taken out is no longer among the addresses that clients hold.
        let here = |h: &&Host| h.process.is_some() && h.condition == Condition::Up;
        let up: Vec<u64> = self.hosts.values().filter(here).map(|h| h.id).collect();
        let Some(at) = self.dice.pick(&up).copied() else {
            self.at(self.now + 50 * MS, Event::Client(n));
            return Ok(());
        };
        let Some(client) = self.clients.get_mut(n) else { return Ok(()) };
        if client.op.is_none() {
            client.made += 1;
            let id = OpId { client: n, number: client.made };
            let wish = match self.dice.below(4) {
                0 => Wish::Read { after: self.history.newest_acknowledged },
                _ => {
                    let Some(process) = self.hosts.get(&at).and_then(|host| host.process.as_ref()) else {
                        return Ok(());
                    };
                    let state = process.shared.state.read().unwrap_or_else(std::sync::PoisonError::into_inner);
                    let command = self.load.command(&mut self.dice, &state);
                    Wish::Write(Box::new(command.map_err(|r| Violation::of("sim", r.to_string()))?))
                }
            };
            client.op = Some(Op { id, wish, tries: 0, at: (at, 0) });
        }
        self.ask(n, at)
    }

    fn ask(&mut self, n: usize, at: u64) -> Result<(), Violation> {
        let Some(client) = self.clients.get_mut(n) else { return Ok(()) };
        let Some(op) = &mut client.op else { return Ok(()) };
        op.tries += 1;
        if op.tries > TRIES_MAX && !self.calm {
            client.op = None;
            self.at(self.now + THINK_MAX, Event::Client(n));
            return Ok(());
        }
        let Some(host) = self.hosts.get_mut(&at) else { return Ok(()) };
        op.at = (at, host.life);
        let (id, wish) = (op.id, op.wish.clone());
        let Some(process) = &mut host.process else { return Ok(()) };
        match wish {
            Wish::Write(command) => {
                let (identity, request) = (Client::identity(id.client), Client::request(id.number));
                let ticket = process.shared.wait_for((identity, request));
                let entry = LogEntry { stamp: Stamp(0), client: identity, request, command: *command };
                let deadline = self.now + DEADLINE;
                process.proposals.push(Proposal { op: id, entry, ticket, deadline, step: Step::Ask });
                let at_once = self.now.max(host.busy_until).max(host.paused_until);
                self.wake(at, at_once);
            }
            Wish::Read { .. } => {
                let (tell, answer) = tokio::sync::oneshot::channel();
                process.reads.push(Reading { op: id, answer, deadline: self.now + DEADLINE });
                self.give(at, Request::Read(tell));
            }
        }
        Ok(())
    }
}

enum Progress {
    Waits,
    Forward(u64),
    /// None where it is to be asked again.
    Done(Option<Box<Applied>>),
}

/// One step of `raft::Cell::propose`, by the virtual clock.
fn advance(proposal: &mut Proposal, process: &mut Process, status: &ambitd::raft::Status, now: Micros) -> Progress {
    if let Ok(applied) = proposal.ticket.receiver.try_recv() {
        return Progress::Done(Some(Box::new(applied)));
    }
    if now >= proposal.deadline {
        return Progress::Done(None);
    }
    let later = Step::Later { until: now + 25 * MS };
    match &mut proposal.step {
        Step::Later { until } | Step::Remote { until } if now < *until => Progress::Waits,
        Step::Remote { .. } => {
            proposal.step = later;
            Progress::Waits
        }
        Step::Appended { term, until } if now < *until && status.term <= *term => Progress::Waits,
        Step::Asked(answer) => {
            match answer.try_recv() {
                Ok(Ok(term)) => proposal.step = Step::Appended { term, until: now + SECOND },
                Ok(Err(ambitd::raft::core::Rejected::NotLeader(_))) => proposal.step = later,
                Err(tokio::sync::oneshot::error::TryRecvError::Empty) => {}
                Ok(Err(_)) | Err(_) => return Progress::Done(None),
            }
            Progress::Waits
        }
        Step::Ask | Step::Later { .. } | Step::Appended { .. } => match status.leader {
            Some(leader) if leader == status.id => {
                let (tell, answer) = tokio::sync::oneshot::channel();
                if !process.push(Request::Propose(Box::new(proposal.entry.clone()), tell)) {
                    return Progress::Done(None);
                }
                proposal.step = Step::Asked(answer);
                Progress::Waits
            }
            Some(leader) => {
                proposal.step = Step::Remote { until: now + 2 * SECOND };
                Progress::Forward(leader.0)
            }
            None => {
                proposal.step = later;
                Progress::Waits
            }
        },
    }
}
