//! A node's kernel side under load, in every state of its agent: tables swapped, agents killed, agents upgraded. What may
//! pass passes, what may not does not, nothing is readable on the wire, and what it cost is counted by its cause.

mod flows;

use self::flows::{ECHO_PORT, End, Flow, Flows};
use super::calls::{Call, Calls, epoch_ms};
use super::{HEAL_MAX, LEASE, check};
use crate::cell::metrics;
use crate::demo::{Demo, PORT, Say, figures::Figures, in_a_lab};
use crate::fault::Fault;
use crate::lab::LabError;
use crate::topology::Spec;
use ambit_model::{Refusal, refusal::Code};
use nix::sys::signal::Signal;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// How often each probe calls.
const EVERY: Duration = Duration::from_millis(20);
/// How long a killed agent stays dead.
const DEAD: Duration = Duration::from_millis(300);
/// An upgrade: an enrolment, SVIDs, and a drain of [`crate::node::DRAIN_S`].
const UPGRADE_MAX: Duration = Duration::from_secs(40);
/// An end: a drain, and a moment.
const DRAINED_MAX: Duration = Duration::from_secs(crate::node::DRAIN_S + 3);
/// The outcome of a call that was on its way when something happened is known a second later at most.
const AFTER_MS: f64 = 1500.0;
/// Of two changes of policy, in which only the tables differ.
const SWAP_EVERY: Duration = Duration::from_millis(20);
/// Programs on the cgroup, and on each pod: its namespace, and both ways of its wire.
const PROGRAMS: usize = 10;
const PROGRAMS_PER_POD: usize = 3;
/// The agents on the way of what is carried.
const NODES: [&str; 2] = ["west-n1", "east-n1"];
/// How much of it.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Changes of policy, each of which swaps a generation of tables on the nodes that it concerns.
    pub swaps: usize,
    /// Agents killed.
    pub kills: usize,
    /// Agents upgraded.
    pub upgrades: usize,
}

impl Options {
    /// What the issue asks for.
    pub const FULL: Self = Self { swaps: 1000, kills: 20, upgrades: 5 };
    /// What runs with the tests.
    pub const BRIEF: Self = Self { swaps: 50, kills: 2, upgrades: 1 };

    /// What is done to agents, in turn: upgrades spread among the kills.
    fn causes(self) -> Vec<Cause> {
        let all = self.kills + self.upgrades;
        let is_upgrade = |n: usize| (n + 1) * self.upgrades / all > n * self.upgrades / all;
        (0..all).map(|n| if is_upgrade(n) { Cause::Upgraded } else { Cause::Killed }).collect()
    }
}

/// Runs it in a lab of its own.
pub fn run(name: &str, options: Options) -> Result<(), LabError> {
    let say = Say::new();
    let Options { swaps, kills, upgrades } = options;
    say.title(&format!("Node: {swaps} swaps, {kills} agents killed, {upgrades} upgraded, under load"));
    let spec = Spec::standard(name, 2, 2, 1)?;
    let verdict = in_a_lab(&spec, &say, |lab| {
        let mut demo = Demo::with_cells(lab, &say, Figures::default())?;
        demo.peer()?;
        demo.enrol_nodes()?;
        demo.start_workloads()?;
        Soak::start(&demo)?.run(options)
    })?;
    println!("{}", verdict.line());
    verdict.judge()
}

/// Why what was carried may be lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cause {
    Killed,
    Upgraded,
    /// By SIGTERM: it drains, and another one is started after it.
    Ended,
}

/// Something that was done, and when it was over.
#[derive(Clone, Copy, Debug)]
struct Event {
    cause: Cause,
    from_ms: f64,
    to_ms: f64,
}

/// Numbers by cause: of killed, upgraded and ended agents, and of none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct ByCause([usize; 4]);

impl ByCause {
    fn of(times: impl Iterator<Item = f64>, events: &[Event]) -> Self {
        let mut counted = Self::default();
        for t in times {
            let cause = events.iter().find(|e| (e.from_ms..e.to_ms).contains(&t)).map(|e| e.cause);
            let [killed, upgraded, ended, otherwise] = &mut counted.0;
            *match cause {
                Some(Cause::Killed) => killed,
                Some(Cause::Upgraded) => upgraded,
                Some(Cause::Ended) => ended,
                None => otherwise,
            } += 1;
        }
        counted
    }
    fn told(self) -> String {
        let [killed, upgraded, ended, otherwise] = self.0;
        format!("{killed} by kills, {upgraded} by upgrades, {ended} by an end, {otherwise} otherwise")
    }
}

/// What came of it.
#[derive(Debug, Default)]
struct Verdict {
    done: Done,
    verdicts: usize,
    wrong: usize,
    in_clear: usize,
    unanswered: ByCause,
    flows: usize,
    lost: ByCause,
    seconds: f64,
}

/// What was done.
#[derive(Debug, Default)]
struct Done {
    changes: usize,
    generations: f64,
    programs: usize,
    kills: usize,
    upgrades: usize,
    /// Connections of agents that drained: ended, and cut.
    drained: [f64; 2],
}

impl Verdict {
    fn line(&self) -> String {
        let Done { changes, generations, programs, kills, upgrades, drained: [ended, cut] } = self.done;
        format!(
            "{changes} changes of policy ({generations} generations swapped, {programs} programs replaced), {kills} kill -9, \
             {upgrades} upgrades, 1 end in {:.0} s: {} verdicts, {} wrong, {} bytes in clear; calls unanswered: {}; flows lost: {} \
             (of {}; agents that drained saw {ended} end and cut {cut})",
            self.seconds,
            self.verdicts,
            self.wrong,
            self.in_clear,
            self.unanswered.told(),
            self.lost.told(),
            self.flows
        )
    }
    fn judge(&self) -> Result<(), LabError> {
        check(self.wrong == 0 && self.verdicts > 100, "verdicts, none of them wrong", || self.line())?;
        check(self.in_clear == 0, "nothing in clear", || self.line())?;
        let [.., calls] = self.unanswered.0;
        let [.., flows] = self.lost.0;
        check(calls == 0 && flows == 0, "nothing lost while no agent is killed or upgraded", || self.line())
    }
}

struct Soak<'a> {
    demo: &'a Demo<'a>,
    allowed: Calls,
    /// From a pod that may not: the kernel must say so.
    denied: Calls,
    /// From a machine past the mesh.
    outside: Calls,
    flows: Flows,
}

impl<'a> Soak<'a> {
    fn start(demo: &'a Demo<'a>) -> Result<Soak<'a>, LabError> {
        demo.say.chapter("Load: calls that are allowed, calls that are not, flows that are kept");
        let lab = &demo.lab;
        demo.apply("west", "echo", &policy("echo", ECHO_PORT))?;
        let db = SocketAddr::from((demo.pod("west-n1", "db")?.address, PORT));
        let allowed = Calls::start(lab, "east-n1-web", db, EVERY)?;
        let denied = Calls::start(lab, "east-n1-other", db, EVERY)?;
        let outside = Calls::start(lab, "west-n2", db, EVERY)?;
        allowed.flow(0.0, HEAL_MAX, "allowed calls before anything is done")?;
        let flows = Flows::start(demo)?;
        let begun = || flows.now().iter().any(|flow| flow.end == End::Closed);
        crate::demo::wait(HEAL_MAX, "flows that are kept", || Ok(begun()))?;
        demo.say.good("allowed calls answered, flows kept, denied calls refused");
        Ok(Soak { demo, allowed, denied, outside, flows })
    }

    fn run(self, options: Options) -> Result<Verdict, LabError> {
        let say = self.demo.say;
        say.chapter("Swaps, kills and upgrades");
        let capture = self.demo.capture()?;
        let (begun, begun_ms) = (Instant::now(), epoch_ms());
        let (changes, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
        let mut done = Done::default();
        let mut events = Vec::new();
        let swapped = std::thread::scope(|scope| {
            let swapping = scope.spawn(|| self.swap(options.swaps, &changes, &stop));
            let acted = self.act(options, &changes, &mut done, &mut events);
            if acted.is_err() {
                stop.store(true, Ordering::Relaxed);
            }
            let panicked = || Refusal::new(Code::Internal, "changes of policy", "their thread panicked");
            let swapped = swapping.join().map_err(|_| panicked().into()).and_then(|swapped| swapped);
            acted.and(swapped)
        });
        swapped?;
        self.allowed.flow(epoch_ms(), HEAL_MAX, "allowed calls at the end")?;
        NODES.iter().try_for_each(|node| self.collect(node, &mut done))?;
        done.changes = changes.load(Ordering::Relaxed);
        say.chapter("What came of it");
        self.demo.clear_control()?;
        let in_clear = self.demo.on_the_wire(capture)?;
        self.verdict(done, &events, begun_ms, in_clear, begun.elapsed().as_secs_f64())
    }

    /// Changes ports at which nobody calls here, of a source on each of the two nodes, until there were so many changes.
    fn swap(&self, swaps: usize, changes: &AtomicUsize, stop: &AtomicBool) -> Result<(), LabError> {
        while changes.load(Ordering::Relaxed) < swaps && !stop.load(Ordering::Relaxed) {
            let n = changes.fetch_add(1, Ordering::Relaxed);
            let port = 9000 + u16::try_from(n % 2).unwrap_or(0);
            self.demo.apply("west", "swap", &format!("{}---\n{}", policy("swap", port), back(port)))?;
            std::thread::sleep(SWAP_EVERY);
        }
        Ok(())
    }

    /// Kills and upgrades, spread over the swaps, of the two agents on the way in turn.
    fn act(
        &self,
        options: Options,
        changes: &AtomicUsize,
        done: &mut Done,
        events: &mut Vec<Event>,
    ) -> Result<(), LabError> {
        let causes = options.causes();
        for (n, cause) in causes.iter().copied().enumerate() {
            while changes.load(Ordering::Relaxed) < options.swaps * n / causes.len() {
                std::thread::sleep(EVERY);
            }
            let node = if n % 2 == 0 { NODES[0] } else { NODES[1] };
            let pods = self.demo.lab.state()?.pods.iter().filter(|pod| pod.node == node).count();
            // With the process its figures go.
            self.collect(node, done)?;
            done.programs += PROGRAMS + PROGRAMS_PER_POD * pods;
            events.push(self.event(node, cause)?);
            match cause {
                Cause::Killed => done.kills += 1,
                Cause::Upgraded => done.upgrades += 1,
                Cause::Ended => {}
            }
        }
        self.collect(NODES[1], done)?;
        events.push(self.event(NODES[1], Cause::Ended)?);
        let (ended, cut) = self.drained(NODES[1])?;
        check(ended > 0.0 && cut > 0.0, "flows that end while it drains, and one that does not", || {
            format!("{ended} ended, {cut} cut")
        })?;
        done.drained = [done.drained[0] + ended, done.drained[1] + cut];
        Ok(())
    }

    fn event(&self, node: &str, cause: Cause) -> Result<Event, LabError> {
        let (lab, from_ms, agent) = (&self.demo.lab, epoch_ms(), format!("{node}-agent"));
        match cause {
            Cause::Killed => {
                lab.inject(Fault::Kill, &agent, LEASE)?;
                std::thread::sleep(DEAD);
                lab.restore(&agent)?;
            }
            Cause::Upgraded => lab.upgrade_agent(node, UPGRADE_MAX)?,
            Cause::Ended => {
                let process = lab.state()?.process(&agent).map(|process| process.id);
                let process = process.ok_or_else(|| Refusal::new(Code::Internal, "an agent", agent.clone()))?;
                process.signal(Signal::SIGTERM);
                crate::demo::wait(DRAINED_MAX, "an agent that has drained", || Ok(!process.alive()))?;
                lab.restart(&agent)?;
            }
        }
        lab.wait_enrolled(node, HEAL_MAX)?;
        let was = format!("{cause:?}").to_lowercase();
        let what = format!("allowed calls after {agent} was {was}");
        self.allowed.flow(epoch_ms(), HEAL_MAX, &what)?;
        let to_ms = epoch_ms() + AFTER_MS;
        let unanswered = self.allowed.between(from_ms, to_ms).iter().filter(|call| !call.ok).count();
        self.demo.say.good(&format!(
            "{agent} {was}: whole after {:.1} s, {unanswered} calls unanswered",
            (to_ms - AFTER_MS - from_ms) / 1000.0,
        ));
        // What is known of this one late is not to be counted for the next.
        std::thread::sleep(Duration::from_millis(AFTER_MS as u64));
        Ok(Event { cause, from_ms, to_ms })
    }

    fn verdict(
        self,
        done: Done,
        events: &[Event],
        begun_ms: f64,
        in_clear: usize,
        seconds: f64,
    ) -> Result<Verdict, LabError> {
        let all = |calls: &Calls| calls.between(begun_ms, f64::INFINITY);
        let (allowed, denied, outside) = (all(&self.allowed), all(&self.denied), all(&self.outside));
        let flows: Vec<Flow> = self.flows.now().into_iter().filter(|flow| flow.t_ms >= begun_ms).collect();
        let counted = |calls: &[Call], wrong: &dyn Fn(&Call) -> bool| calls.iter().filter(|call| wrong(call)).count();
        let bad_flows = flows.iter().filter(|flow| matches!(flow.end, End::Denied | End::Corrupt)).count();
        let wrong = counted(&allowed, &|call| call.refused)
            + counted(&denied, &|call| call.ok || !call.refused)
            + counted(&outside, &|call| call.ok)
            + bad_flows;
        let unanswered = allowed.iter().filter(|call| !call.ok && !call.refused).map(|call| call.t_ms);
        let lost = flows.iter().filter(|flow| flow.end == End::Lost).map(|flow| flow.t_ms);
        self.demo.say.step(&format!(
            "{} calls of who may, {} of who may not",
            allowed.len(),
            denied.len() + outside.len()
        ));
        Ok(Verdict {
            done,
            verdicts: allowed.len() + denied.len() + outside.len() + flows.len(),
            wrong,
            in_clear,
            unanswered: ByCause::of(unanswered, events),
            flows: flows.len(),
            lost: ByCause::of(lost, events),
            seconds,
        })
    }

    /// How many connections ended and were cut while a node's agent drained last, as its log says.
    fn drained(&self, node: &str) -> Result<(f64, f64), LabError> {
        let path = self.demo.lab.agent_log(node);
        let log = std::fs::read_to_string(&path).map_err(|source| LabError::Io { path, source })?;
        let lines = log.lines().rev().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
        let last = lines.into_iter().find(|line| line["message"] == "agent ended");
        let told = last.and_then(|line| Some((line["drained"].as_f64()?, line["cut"].as_f64()?)));
        told.ok_or_else(|| Refusal::new(Code::Internal, "the agent's line `agent ended`", "none").into())
    }

    /// Adds what a node's agent has counted since it started.
    fn collect(&self, node: &str, done: &mut Done) -> Result<(), LabError> {
        done.generations += self.figure(node, "ambit_kernel_generations_total")?;
        for (sum, result) in done.drained.iter_mut().zip(["ended", "cut"]) {
            *sum += self.figure(node, &format!("ambit_connections_drained_total{{result=\"{result}\"}}"))?;
        }
        Ok(())
    }

    /// A figure of a node's agent; 0 where it has none yet.
    fn figure(&self, node: &str, name: &str) -> Result<f64, LabError> {
        let member = self.demo.lab.spec().member(node).ok_or_else(|| Refusal::new(Code::Internal, "a node", node))?;
        let (_, page) = self.demo.lab.page(node, metrics(&member), "/metrics")?;
        let line = page.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok());
        Ok(line.unwrap_or_default())
    }
}

/// Lets east's web reach west's db at one more port.
fn policy(name: &str, port: u16) -> String {
    format!(
        "kind: Policy\nmetadata: {{name: {name}}}\n\
         spec: {{target: spiffe://west/db, action: allow, from: [spiffe://east/web], ports: [{port}]}}\n"
    )
}

/// The same for a source on west's node.
fn back(port: u16) -> String {
    format!(
        "kind: Policy\nmetadata: {{name: swap-back}}\n\
         spec: {{target: spiffe://west/shop, action: allow, from: [spiffe://west/db], ports: [{port}]}}\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_lost_is_counted_by_what_was_done_just_then() {
        let events = [(Cause::Killed, 100.0), (Cause::Upgraded, 200.0)].map(|(cause, from_ms)| Event {
            cause,
            from_ms,
            to_ms: from_ms + 50.0,
        });
        let counted = ByCause::of([99.0, 100.0, 149.0, 150.0, 210.0].into_iter(), &events);
        assert_eq!(counted.told(), "2 by kills, 1 by upgrades, 0 by an end, 2 otherwise");
        let causes = Options { swaps: 0, kills: 4, upgrades: 2 }.causes();
        let upgrades: Vec<usize> = (0..6).filter(|n| causes[*n] == Cause::Upgraded).collect();
        assert_eq!(upgrades, [2, 5]);
        assert_eq!(Options::FULL.causes().len(), 25);
    }
}
