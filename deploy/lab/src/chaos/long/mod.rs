//! The long run: faults drawn from a seed against one cell of three replicas, under clients whose every operation is
//! kept, and what the histories prove.

mod act;
mod clients;
pub(in crate::chaos) mod draw;
mod observe;
mod verdict;

use super::load::Load;
use crate::cell::Cell;
use crate::demo::{Say, in_a_lab};
use crate::lab::{Lab, LabError};
use crate::topology::Spec;
use act::Stage;
use ambit_model::{Refusal, refusal::Code};
use clients::Clients;
use draw::{Act, Then};
use std::time::{Duration, Instant};
use verdict::Verdict;

const SITE: &str = "west";
/// The replica with a small disk of its own.
const SMALL_DISK: &str = "west-r2";
/// As small as holds a replica through an hour of writes, MiB.
const SMALL_DISK_MIB: u64 = 512;
/// How long the cell may take to be whole again, on two loaded cores.
const WHOLE_MAX: Duration = Duration::from_secs(40);
/// Before the first fault every register has been written, and after the last one read.
const QUIET: Duration = Duration::from_secs(1);

/// What the user asked for.
pub struct Options<'a> {
    /// The lab's name.
    pub name: &'a str,
    /// Single kills to make.
    pub kills: u32,
    /// What the faults are drawn from.
    pub seed: u64,
    /// No fault begins after this.
    pub limit: Duration,
}

/// A kill of a leader.
#[derive(Clone, Copy)]
struct LeaderKill {
    /// When it was gone, in milliseconds of the ledger's clock.
    at_ms: u64,
    /// Whether the two others followed it closely before: else the cell waits for the one that catches up.
    whole: bool,
}

/// Runs it in a lab of its own.
pub fn run(options: &Options<'_>) -> Result<(), LabError> {
    let say = Say::new();
    say.title("Chaos: faults at random against one cell, every operation of its clients kept");
    let (kills, seed, minutes) = (options.kills, options.seed, options.limit.as_secs() / 60);
    say.step(&format!("the same faults again: cargo xtask chaos --kills {kills} --seed {seed} --minutes {minutes}"));
    let spec = Spec::standard(options.name, 1, 0, 3)?;
    let verdict = in_a_lab(&spec, &say, |lab| {
        say.chapter("One cell of three replicas, one of them on a small disk");
        lab.make_small_disk(SMALL_DISK, SMALL_DISK_MIB)?;
        let cell = lab.form_cell(SITE)?;
        lab.register_cluster(SITE)?;
        let run = Run::start(lab, &cell, &say, options)?;
        let done = run.steps(options);
        run.verdict(done)
    })?;
    println!("{}", verdict.line());
    verdict.judge()
}

struct Run<'a> {
    lab: &'a Lab,
    cell: &'a Cell,
    say: &'a Say,
    seed: u64,
    load: Load,
    clients: Clients,
}

/// What became of the steps.
#[derive(Default)]
struct Done {
    kills: u32,
    leader_kills: Vec<LeaderKill>,
    /// Whether the step before was followed by a whole cell.
    whole: bool,
    /// Why they ended early.
    failed: Option<LabError>,
}

impl<'a> Run<'a> {
    fn start(lab: &'a Lab, cell: &'a Cell, say: &'a Say, options: &Options<'_>) -> Result<Run<'a>, LabError> {
        let load = Load::start(lab, cell)?;
        let clients = Clients::start(lab, cell, options.seed, Instant::now())?;
        let run = Run { lab, cell, say, seed: options.seed, load, clients };
        run.whole()?;
        std::thread::sleep(QUIET);
        say.good("the cell is whole; registers are written and read through all replicas, entries are created");
        Ok(run)
    }

    fn steps(&self, options: &Options<'_>) -> Done {
        let mut done = Done { whole: true, ..Done::default() };
        self.say.chapter(&format!("Faults of seed {}", options.seed));
        let deadline = Instant::now() + options.limit;
        let steps = draw::steps(options.seed, options.kills);
        let ended = steps.iter().try_for_each(|(act, then)| {
            if Instant::now() > deadline {
                let expected = format!("all faults within {} minutes", options.limit.as_secs() / 60);
                return Err(Refusal::new(Code::Unavailable, expected, format!("{} kills by then", done.kills)).into());
            }
            self.step(*act, *then, &mut done)
        });
        done.failed = ended.and_then(|()| self.whole().map(drop)).err();
        std::thread::sleep(QUIET);
        done
    }

    fn step(&self, act: Act, then: Then, done: &mut Done) -> Result<(), LabError> {
        if !self.clients.run() || !self.load.runs() {
            return Err(Refusal::new(Code::Internal, "clients that run to the end", "they ended early").into());
        }
        let begun = Instant::now();
        let stage = Stage { lab: self.lab, clients: &self.clients, clock: self.load.clock() };
        let what = stage.play(act, done)?;
        let healed = Instant::now();
        done.whole = then == Then::Whole;
        let whole = match then {
            Then::Whole => format!("whole after {:.1} s", self.whole()?.as_secs_f64()),
            Then::After(ms) => {
                std::thread::sleep(Duration::from_millis(ms));
                "next at once".to_owned()
            }
        };
        let took = healed.duration_since(begun).as_secs_f64();
        self.say.step(&format!("{:>3} kills  {what}: {took:.1} s, {whole}", done.kills));
        Ok(())
    }

    /// Waits until every replica follows the leader closely; how long that took.
    fn whole(&self) -> Result<Duration, LabError> {
        let since = Instant::now();
        loop {
            let state = self.clients.views().whole(self.cell.addresses.len(), since);
            match state {
                Ok(()) => return Ok(since.elapsed()),
                Err(found) if since.elapsed() > WHOLE_MAX => {
                    let expected = format!("a whole cell within {} s", WHOLE_MAX.as_secs());
                    return Err(Refusal::new(Code::Unavailable, expected, found).into());
                }
                Err(_) if !self.clients.run() => return Ok(since.elapsed()),
                Err(_) => std::thread::sleep(Duration::from_millis(30)),
            }
        }
    }

    fn verdict(self, done: Done) -> Result<Verdict, LabError> {
        self.say.chapter("What came of it");
        let (seen, views) = self.clients.stop()?;
        let ledger = self.load.ledger();
        let issued = verdict::issued(self.lab, SITE);
        verdict::reach(self.lab, self.say, self.seed, verdict::Found { done, seen, views, ledger, issued })
    }
}
