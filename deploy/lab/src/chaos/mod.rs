//! The chaos smoke run: `kill -9` of each kind of process in turn, under writes and calls, and what came of them.
//!
//! It proves that no acknowledged write is lost or doubled, that no denied call passes at any time, and that allowed
//! calls flow again. Faults at random against a cell, and linearizability, are for the long run ([`long`]).

pub(crate) mod calls;
pub mod linear;
mod load;
pub mod long;
pub mod node;
pub mod outage;

use crate::demo::{Demo, Say, figures::Figures, in_a_lab};
use crate::fault::Fault;
use crate::lab::LabError;
use crate::topology::{Kind, Spec};
use ambit_model::{Refusal, refusal::Code};
use calls::{Calls, epoch_ms};
use load::Load;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// How often each probe calls.
const EVERY: Duration = Duration::from_millis(20);
/// How long an agent, a replica or the router stays dead.
const DEAD: Duration = Duration::from_millis(1500);
/// How long a TPM or a measurer stays dead: nothing calls them meanwhile, so there is nothing to wait for.
const DEAD_SHORT: Duration = Duration::from_millis(300);
/// Calls on their way when an agent dies may still be answered; afterwards none may be.
const DYING: Duration = Duration::from_millis(100);
/// A fault left behind by a run that failed ends by itself.
const LEASE: Duration = Duration::from_secs(60);
/// How long calls may take to flow again, and a cell to be whole again, on two loaded cores.
const HEAL_MAX: Duration = Duration::from_secs(20);
/// A replica that is further behind its leader still catches up, and must not be the majority's last hope.
const LAG_MAX: u64 = 200;
/// Of the calls that an idle machine would make: fewer mean that a probe did not do its work.
const CALLS_MIN_SHARE: f64 = 0.3;

/// One kill and what must hold of it.
struct Round {
    /// Processes killed together: a TPM and the gate before it are one part.
    targets: Vec<String>,
    dead: Duration,
    /// Without it calls cannot be carried, and must fail rather than pass some other way.
    carries: bool,
}

impl Round {
    fn name(&self, targets: &[String]) -> String {
        let found = targets.join(" and ");
        if self.targets == targets { found } else { format!("{found}, {}", self.targets.join(" and ")) }
    }
}

/// Runs it in a lab of its own.
pub fn run(name: &str) -> Result<(), LabError> {
    let say = Say::new();
    say.title("Chaos: each process killed in turn, under writes and calls");
    let spec = Spec::standard(name, 2, 2, 3)?;
    let (verdict, rounds) = in_a_lab(&spec, &say, |lab| {
        let mut demo = Demo::with_cells(lab, &say, Figures::default())?;
        demo.peer()?;
        demo.enrol_nodes()?;
        demo.start_workloads()?;
        Chaos::start(&demo)?.run()
    })?;
    println!("{}", verdict.line());
    rounds?;
    verdict.judge()
}

/// The run: its load and its probes.
struct Chaos<'a> {
    demo: &'a Demo<'a>,
    load: Load,
    allowed: Calls,
    /// From a pod that may not, and from a machine past the mesh.
    denied: [(&'static str, Calls); 2],
}

/// What came of it.
#[derive(Debug, Default)]
struct Verdict {
    acknowledged: u64,
    lost: u64,
    duplicated: u64,
    denied_passed: usize,
}

impl Verdict {
    fn line(&self) -> String {
        format!(
            "{} acknowledged writes, {} lost, {} duplicated, {} denied calls passed",
            self.acknowledged, self.lost, self.duplicated, self.denied_passed
        )
    }
    fn judge(&self) -> Result<(), LabError> {
        let holds = self.acknowledged > 0 && self.lost == 0 && self.duplicated == 0 && self.denied_passed == 0;
        check(holds, "writes acknowledged and kept, each once, and no denied call passed", || self.line())
    }
}

impl<'a> Chaos<'a> {
    fn start(demo: &'a Demo<'a>) -> Result<Chaos<'a>, LabError> {
        demo.say.chapter("Load: a writer to west, calls that are allowed, calls that are not");
        let lab = &demo.lab;
        let db = SocketAddr::from((demo.pod("west-n1", "db")?.address, crate::demo::PORT));
        let allowed = Calls::start(lab, "east-n1-web", db, EVERY)?;
        let denied = [
            ("east/other, by policy", Calls::start(lab, "east-n1-other", db, EVERY)?),
            ("west-n2 itself, in clear past the mesh", Calls::start(lab, "west-n2", db, EVERY)?),
        ];
        let load = Load::start(lab, &demo.west)?;
        let chaos = Chaos { demo, load, allowed, denied };
        chaos.allowed.flow(0.0, HEAL_MAX, "allowed calls before the first kill")?;
        let deadline = Instant::now() + HEAL_MAX;
        while chaos.load.acknowledged() == 0 && chaos.load.runs() && Instant::now() < deadline {
            std::thread::sleep(EVERY);
        }
        check(chaos.load.acknowledged() > 0, "writes acknowledged before the first kill", || "none".into())?;
        demo.say.good("writes acknowledged, allowed calls answered, denied calls refused");
        Ok(chaos)
    }

    /// What came of it, and whether every round went as it must: the ledger is judged also where one did not.
    fn run(self) -> Result<(Verdict, Result<(), LabError>), LabError> {
        let begun = epoch_ms();
        let rounds = self.rounds();
        match (self.verdict((epoch_ms() - begun) / 1000.0), rounds) {
            (Ok(verdict), rounds) => Ok((verdict, rounds)),
            (Err(_), Err(first)) => Err(first),
            (Err(error), Ok(())) => Err(error),
        }
    }

    fn rounds(&self) -> Result<(), LabError> {
        let capture = self.demo.capture()?;
        for (title, rounds) in self.chapters() {
            self.demo.say.chapter(title);
            rounds.iter().try_for_each(|round| self.round(round))?;
        }
        self.demo.say.chapter("What came of it");
        self.demo.clear_control()?;
        self.demo.judge(capture)
    }

    /// West's leader is asked for when its turn comes, and dies once more than the others do.
    fn chapters(&self) -> Vec<(&'static str, Vec<Round>)> {
        let members = self.demo.lab.spec().members();
        let nodes: Vec<String> = members.iter().filter(|m| matches!(m.kind, Kind::Node(_))).map(|m| m.role()).collect();
        let one = |target: String, dead, carries| Round { targets: vec![target], dead, carries };
        let replicas = ["west-r1", "west-r2", "west-r3", LEADER, "east-r1"];
        let on_the_way = |node: &str| node == "west-n1" || node == "east-n1";
        vec![
            ("Replicas: each of west, its leader, one of east", {
                replicas.iter().map(|r| one((*r).to_owned(), DEAD, false)).collect()
            }),
            ("TPMs, each with the gate before it", {
                let pair = |m: String| vec![format!("{m}-swtpm"), format!("{m}-tpm-gate")];
                let targets = members.iter().map(|m| pair(m.role()));
                targets.map(|targets| Round { targets, dead: DEAD_SHORT, carries: false }).collect()
            }),
            ("Measurers", nodes.iter().map(|n| one(format!("{n}-measurer"), DEAD_SHORT, false)).collect()),
            ("Agents: the kernel goes on enforcing what they had set", {
                nodes.iter().map(|n| one(format!("{n}-agent"), DEAD, on_the_way(n))).collect()
            }),
            ("The router between the sites", vec![one("router".into(), DEAD, true)]),
        ]
    }

    fn round(&self, round: &Round) -> Result<(), LabError> {
        let (lab, say) = (&self.demo.lab, self.demo.say);
        let targets: Vec<String> = round.targets.iter().map(|t| self.resolve(t)).collect::<Result<_, _>>()?;
        targets.iter().try_for_each(|t| lab.inject(Fault::Kill, t, LEASE))?;
        let dead = epoch_ms();
        std::thread::sleep(round.dead);
        let healed = epoch_ms();
        let during = self.allowed.between(dead + DYING.as_secs_f64() * 1000.0, healed);
        let passed = during.iter().filter(|c| c.ok).count();
        for target in &targets {
            check(lab.restore(target)? == 1, "a kill to revert", || format!("none on {target}"))?;
        }
        let started = (epoch_ms() - healed) / 1000.0;
        self.whole(&targets)?;
        let flow = self.allowed.flow(healed, HEAL_MAX, &format!("allowed calls after {} is back", targets[0]))?;
        say.good(&format!(
            "{}: killed, {passed} of {} allowed calls passed meanwhile; runs after {started:.1} s, calls flow after \
             {:.1} s",
            round.name(&targets),
            during.len(),
            flow.as_secs_f64()
        ));
        check(!round.carries || passed == 0, "no allowed call passes while nothing can carry it", || {
            passed.to_string()
        })?;
        self.refused_so_far()
    }

    fn resolve(&self, target: &str) -> Result<String, LabError> {
        if target != LEADER {
            return Ok(target.to_owned());
        }
        let rows = self.replicas("west")?;
        let leader = rows.iter().filter_map(|r| r["leader"].as_u64()).find(|leader| *leader != 0);
        let leader = leader.ok_or_else(|| Refusal::new(Code::Unavailable, "a leader of west", "none"))?;
        Ok(format!("west-r{leader}"))
    }

    /// The next replica may die only when this one counts again; an agent is back when it says so.
    fn whole(&self, targets: &[String]) -> Result<(), LabError> {
        for target in targets {
            if let Some(node) = target.strip_suffix("-agent") {
                self.demo.lab.wait_enrolled(node, HEAL_MAX)?;
            }
        }
        let sites = ["west", "east"];
        sites
            .iter()
            .try_for_each(|site| crate::demo::wait(HEAL_MAX, "a whole cell", || self.cell_whole(site)).map(drop))
    }

    fn cell_whole(&self, site: &str) -> Result<bool, LabError> {
        // A cell that does not answer at all is not whole yet.
        let Ok(rows) = self.replicas(site) else { return Ok(false) };
        let leader = rows.first().and_then(|r| r["leader"].as_u64()).unwrap_or(0);
        let commit = rows.iter().filter_map(|r| r["commit"].as_u64()).max().unwrap_or(0);
        let good = |r: &serde_json::Value| {
            r["leader"].as_u64() == Some(leader) && r["applied"].as_u64().is_some_and(|a| a + LAG_MAX >= commit)
        };
        Ok(leader != 0 && !rows.is_empty() && rows.iter().all(good))
    }

    fn replicas(&self, site: &str) -> Result<Vec<serde_json::Value>, LabError> {
        let text = self.demo.lab.ambit(site, &["--output", "json", "raft", "status"])?;
        let rows = serde_json::from_str(&text);
        rows.map_err(|e| Refusal::new(Code::Internal, "replicas as JSON", format!("{e}: {text}")).into())
    }

    fn refused_so_far(&self) -> Result<(), LabError> {
        self.denied.iter().try_for_each(|(who, calls)| {
            let (_, passed) = calls.counts();
            check(passed == 0, "no denied call passes", || format!("{passed} of {who}"))
        })
    }

    fn verdict(self, seconds: f64) -> Result<Verdict, LabError> {
        let say = self.demo.say;
        let (made, answered) = self.allowed.counts();
        say.step(&format!("{answered} of {made} allowed calls answered"));
        let mut verdict = Verdict::default();
        let least = seconds / EVERY.as_secs_f64() * CALLS_MIN_SHARE;
        for (who, calls) in &self.denied {
            let (made, passed) = calls.counts();
            say.step(&format!("{passed} of {made} calls of {who} answered"));
            check(made as f64 >= least, "a probe that calls all the time", || format!("{made} calls of {who}"))?;
            verdict.denied_passed += passed;
        }
        let ((gap, at), wrote) = (self.load.longest_gap(), self.load.elapsed());
        let ledger = self.load.stop()?;
        say.step(&format!(
            "{} writes in {:.0} s, {} acknowledged, {} of them sent more than once; longest pause {gap:.1} s, at {at:.0} s",
            ledger.sent,
            wrote.as_secs_f64(),
            ledger.acked,
            ledger.repeated
        ));
        verdict.acknowledged = ledger.acked;
        verdict.lost = ledger.lost;
        verdict.duplicated = ledger.duplicated;
        Ok(verdict)
    }
}

/// Whoever leads west when its turn comes.
const LEADER: &str = "leader of west";

fn check(holds: bool, expected: &str, found: impl FnOnce() -> String) -> Result<(), LabError> {
    if holds { Ok(()) } else { Err(Refusal::new(Code::Internal, expected.to_owned(), found()).into()) }
}
