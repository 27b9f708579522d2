//! Runs of seeds: a phase of faults, then a healed quorum that must make progress, then what must be true in the end.

use crate::host::Condition;
use crate::oracle::{JUDGED, NOT_YET, Violation};
use crate::plan::{MS, Micros, Plan, SECOND};
use crate::template::Template;
use crate::world::{Event, Tally, World};
use std::fmt;

/// A healed quorum acknowledges a write, and all of it agree, within this.
const PROGRESS_MAX: Micros = 12 * SECOND;
/// Without a quorum: longer than a node may be late (15 min), so that only the leaderless time that is not counted saves it.
const OUTAGE: Micros = 1_000 * SECOND;
/// Honest nodes attest again within this.
const ATTEST_AGAIN: Micros = 30 * SECOND;

/// Makes runs.
pub struct Simulator {
    template: Template,
}

/// How a run ended well.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    tally: Tally,
}

impl Outcome {
    /// Hexadecimal digest of all that was decided and of what was counted: equal for equal runs.
    pub fn digest(&self) -> String {
        use sha2::Digest;
        let all = format!("{:?}", self.tally);
        hex::encode(sha2::Sha256::digest(all.as_bytes()))
    }
    /// Adds up.
    pub fn add_to(&self, sum: &mut Counts) {
        let t = &self.tally;
        for (slot, more) in [
            (&mut sum.acknowledged, t.acknowledged),
            (&mut sum.reads, t.reads),
            (&mut sum.entries, t.entries),
            (&mut sum.crashes, t.crashes),
            (&mut sum.partitions, t.partitions),
            (&mut sum.pauses, t.pauses),
            (&mut sum.disk_faults, t.disk_faults),
            (&mut sum.ruined, t.ruined),
            (&mut sum.replaced, t.replaced),
            (&mut sum.elections, t.elections),
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
    entries: u64,
    crashes: u64,
    partitions: u64,
    pauses: u64,
    disk_faults: u64,
    ruined: u64,
    replaced: u64,
    elections: u64,
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} entries, {} acknowledged writes, {} linearizable reads; {} elections, {} crashes, {} partitions, {} pauses, \
             {} disk faults, {} disks ruined, {} replicas replaced",
            self.entries,
            self.acknowledged,
            self.reads,
            self.elections,
            self.crashes,
            self.partitions,
            self.pauses,
            self.disk_faults,
            self.ruined,
            self.replaced
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
    /// Sets a cell up once.
    pub fn new() -> Result<Simulator, String> {
        Template::make().map(|template| Simulator { template }).map_err(|v| v.to_string())
    }

    /// What is judged, and what is not yet.
    pub fn scope() -> (&'static str, &'static str) {
        (JUDGED, NOT_YET)
    }

    /// One run; with a trace, printed as it happens.
    pub fn run(&self, seed: u64, seconds: u64, trace: bool) -> Result<Outcome, Failure> {
        let plan = Plan::of(seed, seconds * SECOND);
        let text = plan.to_string();
        if trace {
            println!("seed {seed}: {text}");
        }
        let failed =
            |v: Violation| Failure { seed, violation: v.to_string(), invariant: v.invariant, plan: text.clone() };
        // Where production aborts, so does the replica here: raft-rs panics when what it was told cannot be.
        let went = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.go(plan, trace)));
        let went = went.unwrap_or_else(|panic| Err(Violation::of("raft", panic_text(panic.as_ref()))));
        went.map(|tally| Outcome { tally }).map_err(failed)
    }

    fn go(&self, plan: Plan, trace: bool) -> Result<Tally, Violation> {
        let (length, outage) = (plan.length, plan.outage);
        let mut world = World::new(plan, &self.template, trace)?;
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
        world.tally.acknowledged = world.history.acknowledged;
        world.tally.entries = world.history.end();
        world.tally.digest = world.history.state().digest();
        Ok(world.tally)
    }
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
        let leader = self.leader().map(|status| status.id.0);
        let members: Vec<u64> = self.hosts.values().filter(|h| h.condition == Condition::Up).map(|h| h.id).collect();
        let gone: Vec<u64> = members.into_iter().filter(|id| Some(*id) != leader).take(2).collect();
        self.say(|| format!("replicas {gone:?} are gone for {} s", length / SECOND));
        let until = self.now + length;
        for id in gone {
            self.crash_for(id, until);
        }
        self.run_until(until)
    }

    /// Faults end; a quorum of voters is whole, the rest stays as it is.
    fn heal(&mut self) -> Result<(), Violation> {
        self.calm = true;
        self.network.calm();
        self.say(|| "faults are over".into());
        let ids: Vec<u64> = self.hosts.keys().copied().collect();
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
        let (began, before) = (self.now, self.history.newest_acknowledged);
        while self.now < began + PROGRESS_MAX {
            self.run_until(self.now + 100 * MS)?;
            if self.history.newest_acknowledged > before && self.agreed() {
                return Ok(());
            }
        }
        let leader = self.leader().map(|status| status.id.0);
        let at: Vec<(u64, u64)> =
            self.hosts.values().filter_map(|h| Some((h.id, h.process.as_ref()?.applied()))).collect();
        let found =
            format!("no progress in {} s after healing: leader {leader:?}, applied {at:?}", PROGRESS_MAX / SECOND);
        Err(Violation::of("L1", found))
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
}
