//! The drill file, parsed strictly: what runs is what is written, and what is not understood does not run.

use super::file;
use crate::duration::Millis;
use ambit_model::policy::Peers;
use ambit_model::{ClusterId, Code, ObjectName, Refusal};
use serde::Deserialize;
use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

/// A drill file is a page or two.
pub const FILE_BYTES_MAX: u64 = 64 * 1024;
/// Phases of one drill; each takes time in front of people.
const PHASES_MAX: usize = 16;
/// A drill that runs longer is an outage. Leases and deadlines stay below it.
const LENGTH_MS_MAX: u64 = 30 * 60 * 1000;
/// Cells that seal one report.
const SEALS_MAX: usize = 8;
/// Probes as fast as the machine still answers honestly.
const EVERY_MS: std::ops::RangeInclusive<u64> = 1..=1000;

/// A drill, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Drill {
    /// Its name, also in the report and in the seal.
    pub name: ObjectName,
    /// Who answers for it.
    pub owner: String,
    /// What is believed before it runs.
    pub hypothesis: String,
    /// Clusters that may be harmed.
    pub clusters: Vec<ClusterId>,
    /// Clusters that must not be.
    pub protected: Vec<ClusterId>,
    /// What must hold before anything starts.
    pub preconditions: Vec<Precondition>,
    /// What must hold before the fault, and again after it is healed.
    pub steady: Vec<Steady>,
    /// Writes to a cell, each kept in the ledger.
    pub writer: Option<Writer>,
    /// Calls from a pod.
    pub caller: Option<Caller>,
    /// Calls that the fault must not touch: what lies outside of the scope.
    pub outside: Option<Caller>,
    /// In order; the first injects nothing, one injects, one heals.
    pub phases: Vec<Phase>,
    /// What ends it early.
    pub abort: Vec<Abort>,
    /// What is promised.
    pub objectives: Objectives,
    /// The cells that seal the report, one or more; never one that is harmed as a whole.
    pub seal_at: Vec<ClusterId>,
}

/// One condition before the start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Precondition {
    /// The cell keeps a majority when one more replica is lost.
    QuorumSurvives(ClusterId),
    /// A majority of the cell's voters answers.
    Quorum(ClusterId),
    /// Every peer of the cell is active and was heard within the time.
    PeersFresh(ClusterId, Millis),
    /// Every agent of the cell holds the revision it should.
    AgentsInStep(ClusterId),
}

/// Which probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Probe {
    /// The writer.
    Writer,
    /// The caller.
    Caller,
    /// The caller outside of the scope.
    Outside,
}

impl fmt::Display for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Probe::Writer => "writer",
            Probe::Caller => "caller",
            Probe::Outside => "outside",
        })
    }
}

/// In the last `window` at least `ok_percent` of the probe's samples were good (and, where named, answered by
/// somebody whose name starts with `by`).
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Steady {
    /// Which probe.
    pub probe: Probe,
    /// Whole percent.
    pub ok_percent: u8,
    /// The last so much time.
    pub window: Millis,
    /// The start of the answerer's name.
    pub by: Option<String>,
}

/// The writer probe.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Writer {
    /// The cell written to.
    pub cell: ClusterId,
    /// One new write this often.
    pub every: Millis,
}

/// The caller probe.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Caller {
    /// The lab's name of the pod that calls.
    pub pod: String,
    /// Address and port called.
    pub target: std::net::SocketAddrV4,
    /// One call this often.
    pub every: Millis,
}

/// One phase.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Phase {
    /// Its name.
    pub name: String,
    /// What happens when it begins.
    pub action: Action,
    /// How long it lasts at most.
    pub length: Millis,
    /// Whether it ends as soon as the steady state holds again.
    pub until_steady: bool,
}

/// What a phase does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Only watches.
    Watch,
    /// Injects a fault that reverts by itself when the lease ends.
    Inject(Fault, Millis),
    /// Reverts the fault now.
    Heal,
}

/// Whose processes a fault stops.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// The replica that leads the cell.
    LeaderOf(ClusterId),
    /// One process or machine of the lab, by its name (`west-r2`, `west-n1`, `west-n1-agent`).
    Member(ClusterId, String),
    /// Every replica and node of a site.
    Site(ClusterId),
}

/// Which links a fault cuts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Link {
    /// All of a machine of the lab.
    Member(ClusterId, String),
    /// Between a site and all others; within it nothing is cut.
    Site(ClusterId),
    /// Between two sites.
    Sites(ClusterId, ClusterId),
    /// What the first of two machines of a site sends to the second.
    OneWay(ClusterId, String, String),
}

/// A fault.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// `kill -9`.
    Kill(Target),
    /// SIGSTOP: it holds what it held and says nothing.
    Pause(Target),
    /// A link is down.
    Cut(Link),
    /// No space left on the small disk of a replica.
    Fill(ClusterId, String),
    /// The node of this machine is banned.
    Ban(ClusterId, String),
    /// A file that no policy knows runs on this machine: its measured state is not what was approved.
    Alter(ClusterId, String),
    /// A policy that denies, as somebody might apply by mistake.
    Deny(Denial),
}

/// The policy of [`Fault::Deny`]: it ends by itself, with the lease, in every kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Denial {
    /// The cell that it is applied to.
    pub cell: ClusterId,
    /// Whom it protects.
    pub target: Peers,
    /// From whom.
    pub from: Peers,
}

impl Fault {
    /// Whom it harms.
    pub fn clusters(&self) -> Vec<&ClusterId> {
        match self {
            Fault::Kill(Target::LeaderOf(c) | Target::Member(c, _) | Target::Site(c))
            | Fault::Pause(Target::LeaderOf(c) | Target::Member(c, _) | Target::Site(c))
            | Fault::Cut(Link::Member(c, _) | Link::Site(c) | Link::OneWay(c, ..))
            | Fault::Fill(c, _)
            | Fault::Ban(c, _)
            | Fault::Alter(c, _)
            | Fault::Deny(Denial { cell: c, .. }) => vec![c],
            Fault::Cut(Link::Sites(a, b)) => vec![a, b],
        }
    }
    /// The site that cannot answer meanwhile, where it is a whole one.
    pub fn silences(&self) -> Option<&ClusterId> {
        match self {
            Fault::Kill(Target::Site(c)) | Fault::Pause(Target::Site(c)) => Some(c),
            _ => None,
        }
    }
    /// The cell that must be asked to inject it.
    pub fn asks(&self) -> Option<&ClusterId> {
        match self {
            Fault::Kill(Target::LeaderOf(c))
            | Fault::Pause(Target::LeaderOf(c))
            | Fault::Deny(Denial { cell: c, .. }) => Some(c),
            _ => None,
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Target::LeaderOf(c) => write!(f, "the leader of {c}"),
            Target::Member(_, role) => f.write_str(role),
            Target::Site(c) => write!(f, "all of {c}, replicas and nodes"),
        }
    }
}

impl fmt::Display for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Link::Member(_, role) => write!(f, "{role} from everybody"),
            Link::Site(c) => write!(f, "{c} from all other sites"),
            Link::Sites(a, b) => write!(f, "{a} from {b}"),
            Link::OneWay(_, from, to) => write!(f, "{to} from what {from} sends"),
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::Kill(target) => write!(f, "kill -9 of {target}"),
            Fault::Pause(target) => write!(f, "pause of {target}"),
            Fault::Cut(link) => write!(f, "cut of {link}"),
            Fault::Fill(_, role) => write!(f, "no space left on the disk of {role}"),
            Fault::Ban(_, role) => write!(f, "ban of {role}"),
            Fault::Alter(_, role) => write!(f, "a file altered on {role}"),
            Fault::Deny(d) => write!(f, "a policy of {} that denies {} to {}", d.cell, d.target, d.from),
        }
    }
}

/// What ends a drill early; the fault is reverted at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Abort {
    /// The probe had no success for so long.
    FailingFor(Probe, Millis),
    /// The whole drill takes longer.
    Longer(Millis),
}

/// What is promised; at least one thing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Objectives {
    /// Recovery time of each probe named.
    #[serde(default)]
    pub rto: Rto,
    /// Acknowledged writes that are gone afterwards, at most.
    pub acked_writes_lost: Option<u64>,
    /// Writes that took effect twice, at most.
    pub duplicated_writes: Option<u64>,
    /// Calls that failed from the fault to the end, at most.
    pub failed_calls: Option<u64>,
    /// From the healing to the first call answered as before the fault.
    pub failback: Option<Millis>,
    /// Calls outside of the scope that failed from the fault to the end, at most.
    pub outside_failed_calls: Option<u64>,
}

/// Recovery time objectives, by probe.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rto {
    /// The writer's.
    pub writer: Option<Millis>,
    /// The caller's.
    pub caller: Option<Millis>,
}

impl FromStr for Drill {
    type Err = Refusal;
    fn from_str(text: &str) -> Result<Drill, Refusal> {
        checked(file::read(text)?)
    }
}

impl Drill {
    /// The fault of the drill, its lease and the phase it stands in.
    pub fn fault(&self) -> Option<(&Fault, Millis, usize)> {
        self.phases.iter().enumerate().find_map(|(at, p)| match &p.action {
            Action::Inject(fault, lease) => Some((fault, *lease, at)),
            Action::Watch | Action::Heal => None,
        })
    }

    /// Every cell that the drill speaks to.
    pub fn cells(&self) -> BTreeSet<ClusterId> {
        let mut cells: BTreeSet<ClusterId> = self.seal_at.iter().cloned().collect();
        cells.extend(self.writer.iter().map(|w| w.cell.clone()));
        for p in &self.preconditions {
            match p {
                Precondition::QuorumSurvives(c)
                | Precondition::Quorum(c)
                | Precondition::PeersFresh(c, _)
                | Precondition::AgentsInStep(c) => cells.insert(c.clone()),
            };
        }
        cells.extend(self.fault().and_then(|(fault, ..)| fault.asks()).cloned());
        cells
    }

    /// From the healing to the end, at most.
    pub fn healing_time(&self) -> Millis {
        let heal = self.phases.iter().position(|p| p.action == Action::Heal).unwrap_or(0);
        Millis(self.phases.iter().skip(heal).map(|p| p.length.0).sum())
    }

    /// At most so long, by its phases.
    pub fn length(&self) -> Millis {
        Millis(self.phases.iter().map(|p| p.length.0).sum())
    }
}

pub(super) fn bad(expected: impl Into<String>, found: impl Into<String>) -> Refusal {
    Refusal::new(Code::ConfigInvalid, expected, found)
}

fn checked(drill: Drill) -> Result<Drill, Refusal> {
    check_phases(&drill)?;
    check_scope(&drill)?;
    check_probes(&drill)?;
    check_times(&drill)?;
    check_seals(&drill)?;
    Ok(drill)
}

fn check_phases(drill: &Drill) -> Result<(), Refusal> {
    let count = |f: fn(&Action) -> bool| drill.phases.iter().filter(|p| f(&p.action)).count();
    let place = |f: fn(&Action) -> bool| drill.phases.iter().position(|p| f(&p.action));
    let injects = |a: &Action| matches!(a, Action::Inject(..));
    let heals = |a: &Action| matches!(a, Action::Heal);
    let in_order = match (place(injects), place(heals)) {
        (Some(inject), Some(heal)) => 0 < inject && inject < heal,
        _ => false,
    };
    if drill.phases.len() > PHASES_MAX || count(injects) != 1 || count(heals) != 1 || !in_order {
        let found = format!("{} phases, {} inject, {} heal", drill.phases.len(), count(injects), count(heals));
        return Err(bad("a baseline phase, then one that injects, then one that heals", found));
    }
    let names: BTreeSet<&str> = drill.phases.iter().map(|p| p.name.as_str()).collect();
    if names.len() != drill.phases.len() {
        return Err(bad("each phase with a name of its own", "one twice"));
    }
    Ok(())
}

/// The blast radius: what is harmed lies in scope, is not protected, and does not seal its own report.
fn check_scope(drill: &Drill) -> Result<(), Refusal> {
    let Some((fault, ..)) = drill.fault() else { return Ok(()) };
    let refused = |expected: String| Err(Refusal::new(Code::DrillGuard, expected, fault.to_string()));
    if !fault.clusters().iter().all(|c| drill.clusters.contains(c)) {
        return refused(format!("a fault within scope.clusters {:?}", names(&drill.clusters)));
    }
    if fault.clusters().iter().any(|c| drill.protected.contains(c)) {
        return refused(format!("no fault in scope.protected {:?}", names(&drill.protected)));
    }
    if drill.seal_at.iter().any(|cell| fault.silences() == Some(cell)) {
        return refused("a report sealed at cells that survive".to_owned());
    }
    Ok(())
}

fn names(clusters: &[ClusterId]) -> Vec<&str> {
    clusters.iter().map(ClusterId::as_str).collect()
}

fn check_probes(drill: &Drill) -> Result<(), Refusal> {
    let (writer, caller) = (drill.writer.is_some(), drill.caller.is_some());
    let o = &drill.objectives;
    let of_writer = o.rto.writer.is_some() || o.acked_writes_lost.is_some() || o.duplicated_writes.is_some();
    let of_caller = o.rto.caller.is_some() || o.failed_calls.is_some() || o.failback.is_some();
    let of_outside = o.outside_failed_calls.is_some();
    if !of_writer && !of_caller && !of_outside {
        return Err(bad("at least one objective", "none"));
    }
    let named = |probe| {
        drill.steady.iter().any(|s| s.probe == probe)
            || drill.abort.iter().any(|a| matches!(a, Abort::FailingFor(p, _) if *p == probe))
    };
    if (of_writer || named(Probe::Writer)) && !writer {
        return Err(bad("probes.writer, which the drill speaks of", "none"));
    }
    if (of_caller || named(Probe::Caller)) && !caller {
        return Err(bad("probes.caller, which the drill speaks of", "none"));
    }
    if (of_outside || named(Probe::Outside)) && drill.outside.is_none() {
        return Err(bad("probes.outside, which the drill speaks of", "none"));
    }
    let unwatched = |probe| !drill.steady.iter().any(|s| s.probe == probe);
    let outside = drill.outside.is_some();
    if (writer && unwatched(Probe::Writer))
        || (caller && unwatched(Probe::Caller))
        || (outside && unwatched(Probe::Outside))
    {
        return Err(bad("a steadyState for each probe", "a probe without one"));
    }
    if let Some(s) = drill.steady.iter().find(|s| s.ok_percent == 0 || s.ok_percent > 100) {
        return Err(bad("okPercent of 1-100", s.ok_percent.to_string()));
    }
    for caller in drill.caller.iter().chain(&drill.outside) {
        let plain = !caller.pod.is_empty() && caller.pod.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
        if !plain || caller.pod.starts_with('-') {
            return Err(bad("a pod's name of a-z A-Z 0-9 -", caller.pod.as_str()));
        }
    }
    Ok(())
}

fn check_seals(drill: &Drill) -> Result<(), Refusal> {
    let distinct: BTreeSet<&ClusterId> = drill.seal_at.iter().collect();
    if drill.seal_at.is_empty() || drill.seal_at.len() > SEALS_MAX || distinct.len() != drill.seal_at.len() {
        return Err(bad(format!("sealAt of 1-{SEALS_MAX} cells, each once"), format!("{:?}", names(&drill.seal_at))));
    }
    Ok(())
}

fn check_times(drill: &Drill) -> Result<(), Refusal> {
    if drill.length().0 > LENGTH_MS_MAX {
        return Err(bad(format!("at most {} in all", Millis(LENGTH_MS_MAX)), drill.length().to_string()));
    }
    for every in drill.writer.iter().map(|w| w.every).chain(drill.caller.iter().chain(&drill.outside).map(|c| c.every))
    {
        if !EVERY_MS.contains(&every.0) {
            return Err(bad("a probe every 1ms to 1s", every.to_string()));
        }
    }
    if let Some((_, lease, at)) = drill.fault() {
        let heal = drill.phases.iter().position(|p| p.action == Action::Heal).unwrap_or(at);
        let harmed: u64 = drill.phases[at..heal].iter().map(|p| p.length.0).sum();
        // A lease that ends first would revert the fault in the middle of what is measured.
        if lease.0 <= harmed || lease.0 > LENGTH_MS_MAX || !lease.0.is_multiple_of(1000) {
            let expected = format!("a lease in whole seconds, longer than the {} until the healing", Millis(harmed));
            return Err(bad(expected, lease.to_string()));
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "spec_tests.rs"]
mod tests;
