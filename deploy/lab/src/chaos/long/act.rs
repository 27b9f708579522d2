//! Steps, done: to whom, on which process or link, and back again. Every fault has a lease of the lab beside it, and
//! ends even where this process does.

use super::clients::Clients;
use super::draw::{Act, Part, Who};
use super::observe::Views;
use super::{Done, LeaderKill, SITE, SMALL_DISK};
use crate::fault::Fault;
use crate::lab::{Lab, LabError};
use ambit::drill::watch::Clock;
use ambit_model::{Refusal, refusal::Code};
use nix::sys::signal::Signal;
use std::time::{Duration, Instant};

/// A fault left behind by a run that failed ends by itself.
const LEASE: Duration = Duration::from_secs(60);
/// How long to wait for a leader where a step needs one.
const SEEN_MAX: Duration = Duration::from_secs(20);
/// How long a replica may take to end when it is asked to.
const END_MAX: Duration = Duration::from_secs(15);
/// Replicas of the cell, all with a machine of their own.
const REPLICAS: usize = 3;
/// The first machine keeps the root's key, so it is never replaced.
const ROOT_KEEPER: usize = 0;

/// Where steps are played.
pub(super) struct Stage<'a> {
    pub(super) lab: &'a Lab,
    pub(super) clients: &'a Clients,
    pub(super) clock: Clock,
}

impl Stage<'_> {
    /// Does one step and undoes it; what was done to whom.
    pub(super) fn play(&self, act: Act, done: &mut Done) -> Result<String, LabError> {
        match act {
            Act::Kill { who, down_ms } => {
                let target = self.resolve(who)?;
                self.kill(&[target], down_ms, done)?;
                Ok(format!("{act} ({})", role(target)))
            }
            Act::NoQuorum { ms } => {
                let leader = self.resolve(Who::Leader)?;
                let other = (leader + 1) % REPLICAS;
                self.kill(&[leader, other], ms, done)?;
                Ok(format!("{act} ({}, {})", role(leader), role(other)))
            }
            Act::Restart { who } => {
                let target = self.resolve(who)?;
                self.end(target)?;
                self.lab.restart(&role(target))?;
                Ok(format!("{act} ({})", role(target)))
            }
            Act::Pause { who, ms } => {
                let target = role(self.resolve(who)?);
                self.during(Fault::Pause, std::slice::from_ref(&target), ms)?;
                Ok(format!("{act} ({target})"))
            }
            Act::Part { who, part, ms } => {
                let target = self.resolve(who)?;
                self.during(Fault::Cut, &cuts(target, part), ms)?;
                Ok(format!("{act} ({})", role(target)))
            }
            Act::Fill { ms } => {
                self.during(Fault::Fill, &[SMALL_DISK.to_owned()], ms)?;
                Ok(format!("{act} ({SMALL_DISK})"))
            }
            Act::Transfer { follower } => {
                let target = self.resolve(Who::Follower(follower))?;
                let number = self.number(target)?.to_string();
                // A leader may be lost on the way; then the cell elects one itself.
                let handed = self.lab.ambit(SITE, &["raft", "transfer", "--to", &number]);
                let how = if handed.is_ok() { "" } else { ", refused" };
                Ok(format!("{act} (to {}{how})", role(target)))
            }
            Act::Replace { follower, alive } => {
                let target = self.replaceable(follower)?;
                let (was, number) = (self.number(target)?, self.next_number()?);
                self.lab.replace_replica(&role(target), was, number, alive)?;
                done.kills += 1;
                Ok(format!("{act} ({}: replica {was} is replica {number} now)", role(target)))
            }
        }
    }

    fn kill(&self, targets: &[usize], down_ms: u64, done: &mut Done) -> Result<(), LabError> {
        let leader = self.clients.views().leader().map(|(at, _)| at);
        for target in targets {
            self.lab.inject(Fault::Kill, &role(*target), LEASE)?;
            self.clients.views().forget(*target);
            done.kills += 1;
        }
        if let ([target], Some(leader)) = (targets, leader)
            && *target == leader
        {
            done.leader_kills.push(LeaderKill { at_ms: self.clock.ms(), whole: done.whole });
        }
        std::thread::sleep(Duration::from_millis(down_ms));
        targets.iter().try_for_each(|target| self.lab.restore(&role(*target)).map(drop))
    }

    fn during(&self, fault: Fault, targets: &[String], ms: u64) -> Result<(), LabError> {
        let made = targets.iter().try_for_each(|target| self.lab.inject(fault, target, LEASE));
        if made.is_ok() {
            std::thread::sleep(Duration::from_millis(ms));
        }
        let ended = targets.iter().try_for_each(|target| self.lab.restore(target).map(drop));
        made.and(ended)
    }

    /// SIGTERM, as an upgrade of the program would send it.
    fn end(&self, target: usize) -> Result<(), LabError> {
        let name = role(target);
        let missing = || Refusal::new(Code::NotFound, "a replica of the lab", name.clone());
        let id = self.lab.state()?.process(&name).map(|p| p.id).ok_or_else(missing)?;
        id.signal(Signal::SIGTERM);
        let deadline = Instant::now() + END_MAX;
        while id.alive() {
            if Instant::now() > deadline {
                let expected = format!("{name} to end within {} s of SIGTERM", END_MAX.as_secs());
                return Err(Refusal::new(Code::Internal, expected, "it runs").into());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// The place of whoever is meant.
    fn resolve(&self, who: Who) -> Result<usize, LabError> {
        let leader = self.leader()?;
        Ok(match who {
            Who::Leader => leader,
            Who::Follower(n) => (leader + 1 + n as usize % 2) % REPLICAS,
        })
    }

    fn leader(&self) -> Result<usize, LabError> {
        self.seen("a leader", |views| views.leader().map(|(leader, _)| leader))
    }

    /// What the replicas say, once they do: one that was down a moment ago has not been asked yet.
    fn seen<T>(&self, what: &str, of: impl Fn(&Views) -> Option<T>) -> Result<T, LabError> {
        let deadline = Instant::now() + SEEN_MAX;
        loop {
            if let Some(found) = of(&self.clients.views()) {
                return Ok(found);
            }
            if Instant::now() > deadline {
                let expected = format!("{what} within {} s", SEEN_MAX.as_secs());
                return Err(Refusal::new(Code::Unavailable, expected, "none").into());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// A follower other than the root's keeper.
    fn replaceable(&self, follower: u64) -> Result<usize, LabError> {
        let target = self.resolve(Who::Follower(follower))?;
        if target == ROOT_KEEPER { self.resolve(Who::Follower(follower + 1)) } else { Ok(target) }
    }

    fn number(&self, at: usize) -> Result<u64, LabError> {
        self.seen(&format!("the number of {}", role(at)), |views| views.number(at))
    }

    /// One that no replica had before: those in use are the latest of their machines.
    fn next_number(&self) -> Result<u64, LabError> {
        let numbers: Result<Vec<u64>, LabError> = (0..REPLICAS).map(|at| self.number(at)).collect();
        Ok(numbers?.into_iter().max().unwrap_or_default() + 1)
    }
}

fn role(at: usize) -> String {
    format!("{SITE}-r{}", at + 1)
}

/// What is cut, as the lab names links.
fn cuts(target: usize, part: Part) -> Vec<String> {
    let own = role(target);
    let others: Vec<String> = (0..REPLICAS).filter(|at| *at != target).map(role).collect();
    let unheard = || others.iter().map(|other| format!("{own}>{other}"));
    let deaf = || others.iter().map(|other| format!("{other}>{own}"));
    match part {
        Part::Unplugged => vec![own],
        Part::Isolated => unheard().chain(deaf()).collect(),
        Part::Mute => unheard().collect(),
        Part::Deaf => deaf().collect(),
        Part::OneWay => unheard().take(1).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn partitions_are_the_links_they_say() {
        for (part, cut) in [
            (Part::Unplugged, "west-r2"),
            (Part::Isolated, "west-r2>west-r1 west-r2>west-r3 west-r1>west-r2 west-r3>west-r2"),
            (Part::Mute, "west-r2>west-r1 west-r2>west-r3"),
            (Part::Deaf, "west-r1>west-r2 west-r3>west-r2"),
            (Part::OneWay, "west-r2>west-r1"),
        ] {
            assert_eq!(cuts(1, part).join(" "), cut);
        }
    }
}
