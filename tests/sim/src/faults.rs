//! What goes wrong, and what is made good: each kind at its own pace, all by the seed.

use crate::host::Condition;
use crate::oracle::Violation;
use crate::plan::{MS, Micros, Plan, SECOND, YEAR_MS};
use crate::queue::Event;
use crate::world::World;
use ambit_model::ReplicaId;
use ambitd::raft::core::Input;
use ambitd::raft::engine::Request;
use ambitd::raft::{Status, prepare_join_on};
use ambitd::store::Change;
use ambitd::store::model::{Fault, ModelDisk, Part};

/// How long a cut lasts, at most.
const CUT_MAX: Micros = 2 * SECOND;
/// A pause: longer than election timeouts.
const PAUSE_MAX: Micros = 1_500 * MS;
/// Now and then one lasts longer than a clock may be off: what was missed must not count as time.
const LONG: (Micros, Micros) = (3 * SECOND, 6 * SECOND);
const LONG_PER_MILLE: u64 = 120;
/// A clock that is off by less may be the median.
const STAMP_SLACK_MS: u64 = 2_500;

/// A kind of fault.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Kind {
    Partition,
    Crash,
    Pause,
    Disk,
    Transfer,
    Member,
    Ruin,
    /// Two campaign at once.
    Rivals,
    /// The one clock that is wrong is set to another time.
    Jump,
    /// This one, which has just voted or heard of a new term, dies and is back at once: its vote must be there again.
    Voter(u64),
    /// This one is told that the other is dead, rightly or not.
    Rumour(u64, u64),
}

/// How far a stamp may be ahead: with one clock of three wrong, the others decide.
pub(crate) fn stamps_lead_max_ms(plan: &Plan) -> u64 {
    let drift = plan.drift_ppm.unsigned_abs() * (plan.length / MS + 1_100_000) / 1_000_000;
    STAMP_SLACK_MS + drift
}

impl World {
    pub(crate) fn schedule_faults(&mut self) {
        use Kind::*;
        for kind in [Partition, Crash, Pause, Disk, Transfer, Member, Rivals, Jump] {
            self.schedule(kind);
        }
        if self.plan.ruin {
            let at = self.dice.between(self.plan.length / 4, self.plan.length * 3 / 4);
            self.at(at, Event::Fault(Kind::Ruin));
        }
    }

    fn schedule(&mut self, kind: Kind) {
        let every = match kind {
            Kind::Partition => self.plan.partition_every,
            Kind::Crash => self.plan.crash_every,
            Kind::Pause => self.plan.pause_every,
            Kind::Disk => self.plan.disk_every,
            Kind::Transfer => self.plan.transfer_every,
            Kind::Member => self.plan.member_every,
            Kind::Rivals => self.plan.rivals_every,
            Kind::Jump => self.plan.jump_every,
            Kind::Ruin | Kind::Voter(_) | Kind::Rumour(..) => 0,
        };
        if every > 0 {
            let at = self.now + self.dice.between(every / 2, every * 3 / 2);
            self.at(at, Event::Fault(kind));
        }
    }

    pub(crate) fn fault(&mut self, kind: Kind) -> Result<(), Violation> {
        // Members come and go also in calm: what was ruined is replaced.
        if self.calm && !matches!(kind, Kind::Member) {
            return Ok(());
        }
        match kind {
            Kind::Partition => self.partition(),
            Kind::Crash => {
                if let Some(id) = self.one_up() {
                    self.damage_what_can_be_rebuilt(id);
                    self.crash(id);
                }
            }
            Kind::Pause => {
                let (until, one) = (self.now + self.lasts(50 * MS, PAUSE_MAX), self.one_up());
                if let Some(host) = one.and_then(|id| self.hosts.get_mut(&id)) {
                    host.paused_until = until;
                    self.tally.pauses += 1;
                }
                self.say(|| format!("replica {one:?} pauses until {} ms", until / MS));
            }
            Kind::Disk => self.arm(),
            Kind::Transfer => {
                let to = self.one_up();
                let leader = self.leader().map(|status| status.id.0);
                if let (Some(to), Some(leader)) = (to, leader) {
                    self.give(leader, Request::Core(Input::Transfer(to)));
                }
            }
            Kind::Member => self.change_members()?,
            Kind::Ruin => self.ruin(),
            Kind::Rivals => {
                for one in [self.one_up(), self.one_up()].into_iter().flatten() {
                    self.give(one, Request::Core(Input::Campaign));
                }
            }
            Kind::Jump => self.jump(),
            Kind::Voter(id) => {
                if self.hosts.get(&id).is_some_and(|host| host.condition == Condition::Up) {
                    let back = self.now + self.dice.between(MS, 40 * MS);
                    self.crash_for(id, back);
                }
            }
            Kind::Rumour(id, dead) => self.give(id, Request::Core(Input::Gone(dead))),
        }
        self.schedule(kind);
        Ok(())
    }

    fn one_up(&mut self) -> Option<u64> {
        let up: Vec<u64> = self.hosts.values().filter(|h| h.condition == Condition::Up).map(|h| h.id).collect();
        self.dice.pick(&up).copied()
    }

    /// The one that says so in the highest term.
    pub(crate) fn leader(&self) -> Option<Status> {
        let processes = self.hosts.values().filter_map(|host| host.process.as_ref());
        processes.filter(|p| p.leads()).map(|p| p.status()).max_by_key(|status| status.term)
    }

    fn partition(&mut self) {
        let members: Vec<u64> =
            self.hosts.values().filter(|h| h.condition != Condition::Removed).map(|h| h.id).collect();
        let how = self.network.cut(&members);
        self.tally.partitions += 1;
        let until = self.now + self.lasts(100 * MS, CUT_MAX);
        self.say(|| format!("the network is cut, {how}, until {} ms", until / MS));
        self.at(until, Event::Mend);
    }

    fn lasts(&mut self, min: Micros, max: Micros) -> Micros {
        let (min, max) = if self.dice.per_mille(LONG_PER_MILLE) { LONG } else { (min, max) };
        self.dice.between(min, max)
    }

    fn jump(&mut self) {
        let off = match self.dice.below(5) {
            0 => 0,
            1 => YEAR_MS,
            2 => -YEAR_MS,
            _ => self.dice.between(0, 20_000) as i64 - 10_000,
        };
        let Some(host) = self.wrong_clock.and_then(|id| self.hosts.get_mut(&id)) else { return };
        host.clock.off_ms = off;
        self.say(|| format!("the clock of replica {:?} is set to {off:+} ms", self.wrong_clock));
    }

    fn arm(&mut self) {
        let fault = match self.dice.below(12) {
            0..=2 => Fault::DieBefore,
            3..=4 => Fault::DieAfter,
            5 => Fault::SyncError,
            6 => Fault::Full,
            7 => Fault::LostRename,
            8..=9 => Fault::Torn { sector: 512, kept: self.dice.next() | self.dice.next() },
            _ => Fault::Torn { sector: 4_096, kept: self.dice.next() | self.dice.next() },
        };
        let one = self.one_up();
        if let Some(host) = one.and_then(|id| self.hosts.get(&id)) {
            host.disk.arm(fault);
        }
        self.say(|| format!("at replica {one:?}'s next write: {fault:?}"));
    }

    /// A term that is new to a replica: now and then it dies within milliseconds of having voted, or somebody spreads that
    /// another is dead.
    pub(crate) fn new_term(&mut self, id: u64) {
        if self.calm || self.plan.rivals_every == 0 {
            return;
        }
        if self.dice.per_mille(150) {
            let at = self.now + self.dice.between(MS, 8 * MS);
            self.at(at, Event::Fault(Kind::Voter(id)));
        }
        if self.dice.per_mille(150)
            && let Some(dead) = self.one_up()
        {
            let at = self.now + self.dice.between(MS, 300 * MS);
            self.at(at, Event::Fault(Kind::Rumour(id, dead)));
        }
    }

    /// Rows can always be rebuilt; nothing depends on them.
    fn damage_what_can_be_rebuilt(&mut self, id: u64) {
        if self.dice.per_mille(200)
            && let Some(host) = self.hosts.get(&id)
        {
            host.disk.damage(Part::Rows);
        }
    }

    /// One of three may lose its disk, or what was synced to it: it must never vote again under its number (I14).
    fn ruin(&mut self) {
        // Of two or one, none can be spared.
        if self.leader().is_none_or(|status| status.voters.len() < 3) {
            return;
        }
        let Some(id) = self.one_up() else { return };
        self.crash(id);
        let Some(host) = self.hosts.get_mut(&id) else { return };
        self.tally.ruined += 1;
        let how = match self.dice.below(3) {
            0 => {
                host.condition = Condition::Ruined;
                host.disk.lose();
                "is lost"
            }
            1 => {
                host.condition = Condition::Ruined;
                host.disk.damage(Part::Log);
                "has bit flips in its log"
            }
            _ => {
                // Its rows may stand in; if they are gone too, it must refuse.
                host.may_refuse = host.disk.damage(Part::Snapshot);
                "has bit flips in its snapshot"
            }
        };
        self.say(|| format!("the disk of replica {id} {how}"));
    }

    /// An operator's next step: promote who joined, add where one lacks, take out who is ruined or simply another.
    fn change_members(&mut self) -> Result<(), Violation> {
        let Some(status) = self.leader() else { return Ok(()) };
        let (voters, learners) = (status.voters.len(), status.learners.clone());
        let is_ruined = |id: &ReplicaId| self.hosts.get(&id.0).is_some_and(|h| h.condition == Condition::Ruined);
        let change = if let Some(id) = learners.first() {
            if is_ruined(id) { Change::Remove(id.0) } else { Change::Promote(id.0) }
        } else if let Some(ruined) = status.voters.iter().copied().find(is_ruined) {
            Change::Remove(ruined.0)
        } else if voters < 3 {
            Change::AddLearner(self.invite(&status)?)
        } else {
            let all_up = self.hosts.values().filter(|h| h.condition == Condition::Up).count() >= 3;
            // Now and then the leader itself, which must end to lead once that is applied.
            let leader = status.leader.filter(|_| self.dice.per_mille(250));
            let other = status.voters.iter().copied().find(|id| Some(id.0) != status.leader.map(|l| l.0));
            let other = leader.or(other);
            // While a disk may be ruined, nobody is taken out for nothing: that would leave no quorum.
            match other.filter(|_| all_up && !self.calm && !self.plan.ruin) {
                Some(id) => Change::Remove(id.0),
                None => return Ok(()),
            }
        };
        self.say(|| format!("the operator asks: {change:?}, on version {}", status.membership_version));
        let answer = tokio::sync::oneshot::channel().0;
        self.give(status.id.0, Request::Change(change, status.membership_version, answer));
        Ok(())
    }

    /// A new machine, or the one that was asked in before and is not in yet.
    fn invite(&mut self, status: &Status) -> Result<u64, Violation> {
        let waits = |id: &u64| self.hosts.get(id).is_some_and(|h| h.condition != Condition::Ruined);
        let is_in = |id: &u64| status.voters.iter().chain(&status.learners).any(|member| member.0 == *id);
        if let Some(id) = self.invited.filter(|id| waits(id) && !is_in(id)) {
            return Ok(id);
        }
        let id = self.hosts.keys().max().copied().unwrap_or_default() + 1;
        let disk = ModelDisk::default();
        prepare_join_on(&disk, ReplicaId(id)).map_err(|e| Violation::of("sim", e.to_string()))?;
        self.add_host(id, disk);
        self.tally.replaced += 1;
        self.invited = Some(id);
        Ok(id)
    }

    /// Machines whose replica is out of the cell, by the history's own leader, are switched off.
    pub(crate) fn retire(&mut self) {
        let Some(status) = self.leader() else { return };
        let inside = |id: u64| status.voters.contains(&ReplicaId(id)) || status.learners.contains(&ReplicaId(id));
        let out: Vec<u64> = self.hosts.keys().copied().filter(|id| !inside(*id) && self.invited != Some(*id)).collect();
        for id in out {
            let Some(host) = self.hosts.get_mut(&id) else { continue };
            if host.condition == Condition::Up || host.condition == Condition::Ruined {
                host.condition = Condition::Removed;
            }
        }
    }
}
