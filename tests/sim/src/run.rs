//! Runs of seeds: a phase of faults, then a healed quorum that must make progress, then what must be true in the end.

use crate::card::PEERED;
use crate::federation::Federation;
use crate::grants;
use crate::host::{Condition, Process};
use crate::oracle::{ELSEWHERE, JUDGED, NOT_YET, Violation};
use crate::plan::{MS, Micros, Plan, SECOND};
use crate::queue::Event;
use crate::tally::Tally;
use crate::template::Template;
use crate::world::World;
use ambit_model::{Refusal, Stamp};
use ambit_state::{Command, LogEntry, State};
use ambitd::raft::engine::Request;
use std::fmt;
use std::sync::PoisonError;

/// A healed quorum acknowledges a write, and all of it agree, within this.
const PROGRESS_MAX: Micros = 12 * SECOND;
/// All cells hold the same of each within this: a pull that is lost is given up after 4 s.
const TOGETHER_MAX: Micros = 12 * SECOND;
/// Without a quorum: longer than a node may be late (15 min), so that only the leaderless time that is not counted saves it.
const OUTAGE: Micros = 1_000 * SECOND;
/// Honest nodes attest again within this.
const ATTEST_AGAIN: Micros = 30 * SECOND;

/// The kind of run that a core is to make so many of.
pub const ONE_CELL: &str = "one cell";

/// Makes runs.
pub struct Simulator {
    alone: Template,
    peered: Vec<Template>,
}

/// How a run ended well.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    tally: Tally,
    kind: &'static str,
}

impl Outcome {
    /// Hexadecimal digest of all that was decided and of what was counted: equal for equal runs.
    pub fn digest(&self) -> String {
        use sha2::Digest;
        let all = format!("{:?}", self.tally);
        hex::encode(sha2::Sha256::digest(all.as_bytes()))
    }
    /// What ran.
    pub fn kind(&self) -> &'static str {
        self.kind
    }
    /// Adds up.
    pub fn add_to(&self, sum: &mut Counts) {
        let t = &self.tally;
        for (slot, more) in [
            (&mut sum.acknowledged, t.acknowledged),
            (&mut sum.reads, t.reads),
            (&mut sum.quorums, t.quorums),
            (&mut sum.entries, t.entries),
            (&mut sum.crashes, t.crashes),
            (&mut sum.partitions, t.partitions),
            (&mut sum.pauses, t.pauses),
            (&mut sum.disk_faults, t.disk_faults),
            (&mut sum.ruined, t.ruined),
            (&mut sum.replaced, t.replaced),
            (&mut sum.elections, t.elections),
            (&mut sum.pulls, t.pulls),
            (&mut sum.imports, t.imports),
            (&mut sum.lies, t.lies),
        ] {
            *slot += more;
        }
    }
}

/// What many runs did.
#[derive(Clone, Debug, Default)]
pub struct Counts {
    acknowledged: u64,
    reads: u64,
    quorums: u64,
    entries: u64,
    crashes: u64,
    partitions: u64,
    pauses: u64,
    disk_faults: u64,
    ruined: u64,
    replaced: u64,
    elections: u64,
    pulls: u64,
    imports: u64,
    lies: u64,
}

impl Counts {
    /// Batches that one cell took from another.
    pub fn imports(&self) -> u64 {
        self.imports
    }
    /// Answers to pulls that were not what the origin said.
    pub fn lies(&self) -> u64 {
        self.lies
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} entries, {} acknowledged writes, {} linearizable reads; {} elections, {} crashes, {} partitions, {} pauses, \
             {} disk faults, {} disks ruined, {} replicas replaced; {} quorums of two went on; between cells {} pulls, {} imports, {} lies told",
            self.entries,
            self.acknowledged,
            self.reads,
            self.elections,
            self.crashes,
            self.partitions,
            self.pauses,
            self.disk_faults,
            self.ruined,
            self.replaced,
            self.quorums,
            self.pulls,
            self.imports,
            self.lies
        )
    }
}

/// A run in which something did not hold.
#[derive(Clone, Debug)]
pub struct Failure {
    /// The seed that shows it.
    pub seed: u64,
    /// What, by its number.
    pub violation: String,
    /// Which oracle: the invariant's number.
    pub invariant: &'static str,
    /// The options of the run.
    pub plan: String,
}

impl Simulator {
    /// Sets the cells up once.
    pub fn new() -> Result<Simulator, String> {
        let alone = Template::alone().map_err(|v| v.to_string())?;
        let peered = Template::peered(&PEERED).map_err(|v| v.to_string())?;
        Ok(Simulator { alone, peered })
    }

    /// What is judged, what is judged elsewhere, and what is not yet.
    pub fn scope() -> [&'static str; 3] {
        [JUDGED, ELSEWHERE, NOT_YET]
    }

    /// One run; with a trace, printed as it happens.
    pub fn run(&self, seed: u64, seconds: u64, trace: bool) -> Result<Outcome, Failure> {
        let length = seconds * SECOND;
        if Plan::is_of_a_grant(seed) {
            return under_a_grant(seed, length, trace);
        }
        let plans: Vec<Plan> = if Plan::is_of_several(seed) {
            (0..PEERED.len() as u64).map(|n| Plan::of_cell(seed, n, length)).collect()
        } else {
            vec![Plan::of(seed, length)]
        };
        let text = told(&plans);
        if trace {
            println!("seed {seed}: {text}");
        }
        let kind = if plans.len() > 1 { "three cells" } else { ONE_CELL };
        let failed =
            |v: Violation| Failure { seed, violation: v.to_string(), invariant: v.invariant, plan: text.clone() };
        // Where production aborts, so does the replica here: raft-rs panics when what it was told cannot be.
        let went = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.go(plans, length, trace)));
        let went = went.unwrap_or_else(|panic| Err(Violation::of("raft", panic_text(panic.as_ref()))));
        went.map(|tally| Outcome { tally, kind }).map_err(failed)
    }

    fn go(&self, mut plans: Vec<Plan>, length: Micros, trace: bool) -> Result<Tally, Violation> {
        if plans.len() > 1 {
            return several(Federation::new(plans, &self.peered, trace)?, length);
        }
        let plan = plans.pop().ok_or_else(|| Violation::of("sim", "no plan"))?;
        one(World::new(plan, &self.alone, trace)?, length)
    }
}

fn told(plans: &[Plan]) -> String {
    let between = plans.first().and_then(|plan| plan.between.as_ref()).map(ToString::to_string);
    between.into_iter().chain(plans.iter().map(ToString::to_string)).collect::<Vec<_>>().join("\n  ")
}

fn under_a_grant(seed: u64, length: Micros, trace: bool) -> Result<Outcome, Failure> {
    let plan = grants::Plan::of(seed, length);
    let text = plan.to_string();
    if trace {
        println!("seed {seed}: {text}");
    }
    let went = grants::run(plan, trace);
    let kind = "three cells and a grant";
    went.map(|tally| Outcome { tally, kind }).map_err(|v| Failure {
        seed,
        violation: v.to_string(),
        invariant: v.invariant,
        plan: text,
    })
}

/// A cell alone.
fn one(mut world: World, length: Micros) -> Result<Tally, Violation> {
    let outage = world.plan.outage;
    if outage {
        world.run_until(length / 2)?;
        world.lose_quorum(OUTAGE)?;
    }
    let end = world.now + length;
    while world.now < end {
        world.run_until((world.now + 200 * MS).min(end))?;
        world.retire();
    }
    world.heal()?;
    if outage {
        world.attest_until(world.now + ATTEST_AGAIN)?;
        world.history.nobody_is_out()?;
    }
    Ok(world.ended())
}

/// Cells that import from each other.
fn several(mut all: Federation, length: Micros) -> Result<Tally, Violation> {
    let end = all.now + length;
    while all.now < end {
        all.run_until((all.now + 200 * MS).min(end))?;
        all.worlds.iter_mut().for_each(World::retire);
    }
    alone_each(&mut all)?;
    together(&mut all)?;
    let mut sum = Tally::default();
    for world in all.worlds {
        sum.add(&world.ended());
    }
    Ok(sum)
}

/// I11, first half: each cell is whole and hears no other; it acknowledges writes and issues all the same.
fn alone_each(all: &mut Federation) -> Result<(), Violation> {
    all.isolate(true);
    all.worlds.iter_mut().for_each(World::calm_down);
    let reached = |world: &World| (world.history.newest_acknowledged, world.history.leaves);
    let before: Vec<(u64, u64)> = all.worlds.iter().map(reached).collect();
    let stands = |world: &World, (written, leaves): (u64, u64)| {
        world.agreed() && reached(world).0 > written && reached(world).1 > leaves
    };
    let until = all.now + PROGRESS_MAX;
    while all.now < until {
        for n in 0..all.worlds.len() {
            all.in_cell(n, World::want_leaf)?;
        }
        all.run_until(all.now + 100 * MS)?;
        if all.worlds.iter().zip(&before).all(|(world, before)| stands(world, *before)) {
            return Ok(());
        }
    }
    let stuck: Vec<String> = all
        .worlds
        .iter()
        .zip(&before)
        .filter(|(w, before)| !stands(w, **before))
        .map(|(w, before)| {
            format!("{} (writes and leaves {:?}, before {before:?}; {})", w.cell, reached(w), w.standing())
        })
        .collect();
    let found = format!("cut from all others, no progress in {} s: {}", PROGRESS_MAX / SECOND, stuck.join("; "));
    Err(Violation::of("I11", found))
}

/// I11, second half: cells hear each other again; once nobody writes any more, all hold the same of each.
fn together(all: &mut Federation) -> Result<(), Violation> {
    all.isolate(false);
    all.worlds.iter_mut().for_each(|world| world.quiet = true);
    let until = all.now + TOGETHER_MAX;
    let mut differs = String::new();
    while all.now < until {
        all.run_until(all.now + 100 * MS)?;
        match all.agreed() {
            Ok(()) => return Ok(()),
            Err(why) => differs = why,
        }
    }
    Err(Violation::of("I11", format!("{} s after healing: {differs}", TOGETHER_MAX / SECOND)))
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    let text = text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()));
    format!("a replica panicked: {}", text.unwrap_or_else(|| "without a word".into()))
}

impl World {
    /// Two of three are gone for a long time; nodes attested just before.
    fn lose_quorum(&mut self, length: Micros) -> Result<(), Violation> {
        self.attest_until(self.now + 3 * SECOND)?;
        if self.history.admitted() == 0 {
            return Err(Violation::of("sim", "an outage without nodes shows nothing of them"));
        }
        let leader = self.leader().map(|status| status.id.0);
        let members: Vec<u64> = self.hosts.values().filter(|h| h.condition == Condition::Up).map(|h| h.id).collect();
        let gone: Vec<u64> = members.into_iter().filter(|id| Some(*id) != leader).take(2).collect();
        let (until, asleep) = (self.now + length, self.dice.below(2) == 0);
        self.say(|| format!("replicas {gone:?} are gone for {} s, asleep: {asleep}", length / SECOND));
        for id in gone {
            match self.hosts.get_mut(&id) {
                // Longer than any ticket lives.
                Some(host) if asleep => host.paused_until = until,
                _ => self.crash_for(id, until),
            }
        }
        self.run_until(until)
    }

    /// Every admitted node's round is judged once a second, through the leader, as its verdict queue hands them in.
    fn attest_until(&mut self, end: Micros) -> Result<(), Violation> {
        while self.now < end {
            for at in 0..usize::from(crate::load::NODES) {
                self.through_leader(|world, state| Ok(world.load.round(at, state)))?;
            }
            self.run_until((self.now + SECOND).min(end))?;
        }
        Ok(())
    }

    /// An operator and a machine go on until there is a leaf.
    fn want_leaf(&mut self) -> Result<(), Violation> {
        self.through_leader(|world, state| world.load.towards_leaf(&mut world.dice, state))
    }

    /// A command made of what the leader shows, if there is one; nobody waits for its outcome.
    fn through_leader(
        &mut self,
        command: impl FnOnce(&mut World, &State) -> Result<Command, Refusal>,
    ) -> Result<(), Violation> {
        let Some(leader) = self.leader().map(|status| status.id.0) else { return Ok(()) };
        let process = self.hosts.get(&leader).and_then(|host| host.process.as_ref());
        let Some(shared) = process.map(|process| process.shared.clone()) else { return Ok(()) };
        let state = shared.state.read().unwrap_or_else(PoisonError::into_inner);
        let command = command(self, &state).map_err(|r| Violation::of("sim", r.to_string()))?;
        drop(state);
        let entry = LogEntry { stamp: Stamp(0), client: [0; 32], request: [0; 16], command };
        self.give(leader, Request::Propose(Box::new(entry), tokio::sync::oneshot::channel().0));
        Ok(())
    }

    /// Faults end, and every machine is whole again.
    fn calm_down(&mut self) {
        self.calm = true;
        self.network.calm();
        self.say(|| "faults are over".into());
        self.make_whole(None);
    }

    /// Machines are made good, but for the one that stays as it is.
    fn make_whole(&mut self, but: Option<u64>) {
        let ids: Vec<u64> = self.hosts.keys().copied().filter(|id| Some(*id) != but).collect();
        for id in &ids {
            if let Some(host) = self.hosts.get_mut(id) {
                host.paused_until = self.now;
                host.disk.make_good();
                if host.condition == Condition::Down {
                    self.at(self.now, Event::Start(*id));
                } else if host.condition == Condition::Up {
                    let at = host.busy_until.max(self.now);
                    host.run_at = None;
                    self.wake(*id, at);
                }
            }
        }
    }

    /// Of three voters one stays dead, and two of them, with the network, are whole: they must go on, with writes and with
    /// reads.
    fn heal_a_quorum(&mut self) -> Result<(), Violation> {
        let Some(frozen) = self.one_to_spare() else { return Ok(()) };
        let members = self.members_agree();
        let until = self.now + PROGRESS_MAX;
        self.calm = true;
        self.network.calm();
        self.crash_for(frozen, until);
        self.say(|| format!("faults are over, but replica {frozen} stays dead"));
        self.make_whole(Some(frozen));
        let before = (self.history.newest_acknowledged, self.tally.reads);
        while self.now < until {
            self.run_until((self.now + 100 * MS).min(until))?;
            if self.history.newest_acknowledged > before.0 && self.tally.reads > before.1 {
                self.tally.quorums += 1;
                return Ok(());
            }
        }
        if self.members_agree() != members {
            // A change was on its way, perhaps of the very one: the two are no majority any more.
            return Ok(());
        }
        let reached = (self.history.newest_acknowledged, self.tally.reads);
        let found = format!(
            "two of three voters, no write and read in {} s: {before:?} to {reached:?}; {}",
            PROGRESS_MAX / SECOND,
            self.standing()
        );
        Err(Violation::of("L2", found))
    }

    /// One of three voters that all run and know the same members, if the other two can go on by themselves: no disk is
    /// ruined. Raft-rs takes a change for done where it is applied: until then the former majority counts.
    fn one_to_spare(&mut self) -> Option<u64> {
        let version = self.members_agree()?;
        let is_one = |p: &&Process| p.status().membership_version == version;
        let status = self.hosts.values().filter_map(|host| host.process.as_ref()).find(is_one)?.status();
        let voters: Vec<u64> = status.voters.iter().map(|voter| voter.0).collect();
        let good = |id: &u64| self.hosts.get(id).is_some_and(|h| h.condition == Condition::Up && !h.may_refuse);
        let stands =
            voters.len() == 3 && status.learners.is_empty() && self.invited.is_none() && voters.iter().all(good);
        if stands { self.dice.pick(&voters).copied() } else { None }
    }

    /// The version of the membership that every running replica knows, if it is one.
    fn members_agree(&self) -> Option<u64> {
        let mut versions =
            self.hosts.values().filter_map(|h| h.process.as_ref()).map(|p| p.status().membership_version);
        let first = versions.next()?;
        versions.all(|version| version == first).then_some(first)
    }

    /// A healed cell acknowledges writes again, and its voters agree.
    fn heal(&mut self) -> Result<(), Violation> {
        self.heal_a_quorum()?;
        self.calm_down();
        let (began, before) = (self.now, self.history.newest_acknowledged);
        while self.now < began + PROGRESS_MAX {
            self.run_until(self.now + 100 * MS)?;
            if self.history.newest_acknowledged > before && self.agreed() {
                return Ok(());
            }
        }
        let found = format!("no progress in {} s after healing: {}", PROGRESS_MAX / SECOND, self.standing());
        Err(Violation::of("L1", found))
    }

    fn standing(&self) -> String {
        let leader = self.leader().map(|status| status.id.0);
        let at: Vec<(u64, u64)> =
            self.hosts.values().filter_map(|h| Some((h.id, h.process.as_ref()?.applied()))).collect();
        format!("leader {leader:?}, applied {at:?}")
    }

    /// Every voter that runs is near the end of the history.
    fn agreed(&self) -> bool {
        let Some(status) = self.leader() else { return false };
        let end = self.history.end();
        let near = |id: u64| {
            let process = self.hosts.get(&id).and_then(|host| host.process.as_ref());
            process.is_none_or(|p| p.applied() + 50 >= end)
        };
        status.voters.iter().all(|voter| near(voter.0))
    }

    fn ended(mut self) -> Tally {
        self.tally.acknowledged = self.history.acknowledged;
        self.tally.entries = self.history.entries;
        self.tally.trail = self.history.trail();
        self.tally
    }
}
