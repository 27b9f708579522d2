//! Running a drill: guard, probes, phases, abort, revert, ledger, seal.

use super::figures::{Marks, Seen, failing_since, figures, judge, steady};
use super::guard::{self, Cells, Order};
use super::lab::Lab;
use super::ledger::{self, Write};
use super::live::{Line, Live, since};
use super::mistake;
use super::report::{Report, SealedReport};
use super::spec::{Abort, Action, Drill, Fault, Phase, Probe};
use super::watch::{Clock, Samples, Timeline};
use super::{caller, seal, writer};
use crate::cell::request_id;
use crate::duration::Millis;
use ambit_model::{Code, Refusal};
use sha2::{Digest, Sha256};
use std::time::Duration;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::{Instant, sleep};

/// How often the phases look at the samples. Ends of phases are as exact as this; samples are not affected.
const LOOK: Duration = Duration::from_millis(20);
/// The ledger is compared when the cell answers again; after this long it counts as not compared.
const COMPARE_TIMEOUT: Duration = Duration::from_secs(30);

/// Runs the drill whose file is `spec`, and gives its report, sealed where the cell could be reached.
///
/// # Errors
/// `drill_guard` where the drill must not start; then nothing was harmed.
pub async fn run(spec: &str, lab: &Lab, cells: &Cells) -> Result<SealedReport, Refusal> {
    let drill: Drill = spec.parse()?;
    let _one_at_a_time = lab.lock()?;
    let held = guard::check(&drill, cells).await?;
    let mut run = Run::new(&drill, lab, cells)?;
    for condition in held {
        run.timeline.tell(format!("holds: {condition}"));
    }
    let probes = run.start_probes().await?;
    let (probes, outcome) = run.phases(probes).await;
    let ledger = run.stop_probes(probes).await;
    if let Err(Stop::Guard(refusal)) = outcome {
        return Err(refusal);
    }
    let report = run.report(spec, ledger, outcome.err())?;
    let mut seals = Vec::new();
    for name in &drill.seal_at {
        match seal::seal(guard::cell(cells, name)?, &report).await {
            Ok(seal) => seals.push(seal),
            Err(refusal) => eprintln!("{}", crate::exit::refusal_text(&refusal)),
        }
    }
    Ok(SealedReport::new(report, seals))
}

struct Run<'a> {
    drill: &'a Drill,
    lab: &'a Lab,
    cells: &'a Cells,
    id: String,
    clock: Clock,
    timeline: Timeline,
    writer: Samples,
    caller: Samples,
    outside: Samples,
    /// What was done, while it is not yet reverted.
    harmed: Option<Harm>,
    injected_ms: Option<u64>,
    healed_ms: Option<u64>,
    steady_ms: Option<u64>,
    ended_ms: u64,
    signals: [Signal; 2],
}

struct Probes {
    writer: Option<writer::Running>,
    caller: Option<caller::Running>,
    outside: Option<caller::Running>,
}

/// Who reverts the fault.
enum Harm {
    /// The lab.
    Lab(Order),
    /// The cell to which a policy was applied.
    Policy(mistake::Applied),
}

impl Harm {
    fn target(&self) -> &str {
        match self {
            Harm::Lab(order) => &order.target,
            Harm::Policy(applied) => applied.name(),
        }
    }
}

/// Why the phases did not come to their end.
enum Stop {
    /// Before anything was harmed.
    Guard(Refusal),
    /// Afterwards; the fault was reverted.
    Aborted(String),
}

impl<'a> Run<'a> {
    fn new(drill: &'a Drill, lab: &'a Lab, cells: &'a Cells) -> Result<Run<'a>, Refusal> {
        let clock = Clock::start();
        let id = hex::encode(&request_id()?[..4]);
        let live = Live::begin(lab.folder(), drill.name.as_str(), &id)?;
        let listen =
            |kind| signal(kind).map_err(|e| Refusal::new(Code::Internal, "a signal's listener", e.to_string()));
        Ok(Run {
            drill,
            lab,
            cells,
            id,
            clock,
            timeline: Timeline::new(clock, live),
            writer: Samples::default(),
            caller: Samples::default(),
            outside: Samples::default(),
            harmed: None,
            injected_ms: None,
            healed_ms: None,
            steady_ms: None,
            ended_ms: 0,
            signals: [listen(SignalKind::interrupt())?, listen(SignalKind::terminate())?],
        })
    }

    async fn start_probes(&mut self) -> Result<Probes, Refusal> {
        let mut probes = Probes { writer: None, caller: None, outside: None };
        if let Some(w) = &self.drill.writer {
            let cell = guard::cell(self.cells, &w.cell)?.clone();
            probes.writer = Some(writer::start(cell, w, self.id.clone(), self.clock, self.writer.clone()).await?);
        }
        let callers = [
            (&self.drill.caller, self.caller.clone(), &mut probes.caller),
            (&self.drill.outside, self.outside.clone(), &mut probes.outside),
        ];
        let mut failed = None;
        for (spec, samples, place) in callers {
            match spec.as_ref().map(|spec| caller::start(self.lab, spec, self.clock, samples)).transpose() {
                Ok(running) => *place = running,
                Err(refusal) => failed = Some(refusal),
            }
        }
        match failed {
            None => Ok(probes),
            Some(refusal) => {
                self.stop_probes(probes).await;
                Err(refusal)
            }
        }
    }

    /// Runs the phases. However they end, nothing stays harmed.
    async fn phases(&mut self, mut probes: Probes) -> (Probes, Result<(), Stop>) {
        let mut outcome = Ok(());
        for phase in &self.drill.phases {
            outcome = self.phase(phase, &mut probes).await;
            if outcome.is_err() {
                break;
            }
        }
        if let Err(Stop::Aborted(why)) = &outcome {
            self.timeline.tell(format!("aborted: {why}"));
        }
        if self.harmed.is_some() {
            // The lease reverts it too, should this fail.
            if let Err(Stop::Aborted(why)) = self.heal().await {
                self.timeline.tell(why);
            }
        }
        (probes, outcome)
    }

    async fn phase(&mut self, phase: &Phase, probes: &mut Probes) -> Result<(), Stop> {
        self.timeline.tell(format!("phase {}", phase.name));
        let begun = self.clock.ms();
        match &phase.action {
            Action::Watch => {}
            Action::Inject(fault, lease) => {
                if let Some(unsteady) = self.unsteady() {
                    let refusal = Refusal::new(Code::DrillGuard, "the steady state before the fault", unsteady);
                    return Err(Stop::Guard(refusal));
                }
                self.inject(fault, *lease).await?;
            }
            Action::Heal => self.heal().await?,
        }
        let end = begun + phase.length.0;
        while self.clock.ms() < end {
            self.look(probes).await?;
            if self.healed_ms.is_some() && self.steady_ms.is_none() && self.as_before().await {
                self.steady_ms = Some(self.clock.ms());
            }
            let steady = if self.healed_ms.is_some() { self.steady_ms.is_some() } else { self.unsteady().is_none() };
            if phase.until_steady && steady {
                self.timeline.tell("steady");
                break;
            }
        }
        Ok(())
    }

    /// Whether the probes are steady and every precondition holds again: a cell that serves, but could not bear the
    /// next loss, is not yet healed.
    async fn as_before(&self) -> bool {
        self.unsteady().is_none() && guard::check(self.drill, self.cells).await.is_ok()
    }

    /// What will be reverted is known before it is done.
    async fn inject(&mut self, fault: &Fault, lease: Millis) -> Result<(), Stop> {
        let order = guard::order(fault, self.cells).await.map_err(Stop::Guard)?;
        let done = match (order, fault) {
            (Some(order), _) => {
                self.timeline.tell(format!("inject {fault} ({}), lease {lease}", order.target));
                self.harmed = Some(Harm::Lab(order.clone()));
                self.injected_ms = Some(self.clock.ms());
                self.lab.inject(&order, lease).await
            }
            (None, Fault::Deny(denial)) => {
                let mistake = mistake::Mistake::new(denial, &self.id, lease);
                self.timeline.tell(format!("inject {fault} ({}), lease {lease}", mistake.name()));
                let cell = guard::cell(self.cells, &denial.cell).map_err(Stop::Guard)?;
                self.harmed = Some(Harm::Policy(mistake.applied(cell)));
                self.injected_ms = Some(self.clock.ms());
                mistake.apply(cell).await
            }
            (None, other) => Err(Refusal::new(Code::Internal, "a fault that somebody injects", other.to_string())),
        };
        done.map_err(|r| Stop::Aborted(r.to_string()))
    }

    async fn heal(&mut self) -> Result<(), Stop> {
        let Some(harm) = self.harmed.take() else { return Ok(()) };
        self.timeline.tell(format!("heal {}", harm.target()));
        self.healed_ms = Some(self.clock.ms());
        let reverted = match &harm {
            Harm::Lab(order) => self.lab.revert(order).await,
            Harm::Policy(applied) => applied.revert().await,
        };
        reverted.map_err(|r| Stop::Aborted(r.to_string()))
    }

    /// Waits a moment, and tells whether the drill must end.
    async fn look(&mut self, probes: &mut Probes) -> Result<(), Stop> {
        let [interrupt, terminate] = &mut self.signals;
        let called_off = tokio::select! {
            () = sleep(LOOK) => None,
            _ = interrupt.recv() => Some("the operator called it off"),
            _ = terminate.recv() => Some("the operator called it off"),
        };
        let now_ms = self.clock.ms();
        self.tell_second(now_ms);
        let why = called_off
            .map(str::to_owned)
            .or_else(|| self.timeline.live.called_off().map(|by| format!("{by} called it off")))
            .or_else(|| probes.caller.iter_mut().chain(&mut probes.outside).find_map(caller::Running::ended))
            .or_else(|| {
                [&self.writer, &self.caller, &self.outside]
                    .iter()
                    .any(|s| s.full())
                    .then(|| "more samples than can be kept".to_owned())
            })
            .or_else(|| self.drill.abort.iter().find_map(|a| self.met(a, now_ms)));
        why.map_or(Ok(()), |why| Err(Stop::Aborted(why)))
    }

    fn tell_second(&mut self, now_ms: u64) {
        let probes = [
            (Probe::Writer, self.drill.writer.is_some(), &self.writer),
            (Probe::Caller, self.drill.caller.is_some(), &self.caller),
            (Probe::Outside, self.drill.outside.is_some(), &self.outside),
        ];
        let there = probes.iter().filter(|(_, there, _)| *there);
        let count = |from_ms| {
            there.clone().map(|(probe, _, samples)| (probe.to_string(), samples.with(|s| since(s, from_ms)))).collect()
        };
        self.timeline.live.seen(now_ms, count);
    }

    fn met(&self, abort: &Abort, now_ms: u64) -> Option<String> {
        match abort {
            Abort::FailingFor(probe, time) => {
                let failing = now_ms.saturating_sub(self.samples(*probe).with(failing_since));
                (failing > time.0).then(|| format!("the {probe} had no success for {failing} ms"))
            }
            Abort::Longer(time) => (now_ms > time.0).then(|| format!("longer than {time}")),
        }
    }

    fn samples(&self, probe: Probe) -> &Samples {
        match probe {
            Probe::Writer => &self.writer,
            Probe::Caller => &self.caller,
            Probe::Outside => &self.outside,
        }
    }

    /// The first steady state that does not hold.
    fn unsteady(&self) -> Option<String> {
        let now_ms = self.clock.ms();
        let fails = |s: &&super::spec::Steady| !self.samples(s.probe).with(|samples| steady(samples, s, now_ms));
        self.drill.steady.iter().find(fails).map(|s| {
            let by = s.by.as_ref().map(|by| format!(" by {by}")).unwrap_or_default();
            format!("the {} not {} % good{by} over {}", s.probe, s.ok_percent, s.window)
        })
    }

    /// Ends the probes, compares the ledger with the cell and deletes what was written.
    async fn stop_probes(&mut self, probes: Probes) -> Vec<Write> {
        for caller in probes.caller.into_iter().chain(probes.outside) {
            caller.stop().await;
        }
        self.ended_ms = self.clock.ms();
        let (Some(running), Some(w)) = (probes.writer, &self.drill.writer) else { return Vec::new() };
        let mut writes = running.stop().await;
        let Ok(cell) = guard::cell(self.cells, &w.cell) else { return Vec::new() };
        let deadline = Instant::now() + COMPARE_TIMEOUT;
        loop {
            match writer::list(cell).await {
                Ok(listed) => {
                    ledger::reconcile(&mut writes, &self.id, &listed);
                    let deleted = writer::clean_up(cell, &self.id, &listed).await;
                    self.timeline.tell(match deleted {
                        Ok(n) => format!("ledger compared; {n} entries of the drill deleted"),
                        Err(r) => format!("ledger compared; entries drill-{}-* remain: {r}", self.id),
                    });
                    return writes;
                }
                Err(_) if Instant::now() < deadline => sleep(LOOK * 10).await,
                Err(refusal) => {
                    self.timeline.tell(format!("ledger not compared: {refusal}"));
                    return Vec::new();
                }
            }
        }
    }

    fn report(mut self, spec: &str, ledger: Vec<Write>, stop: Option<Stop>) -> Result<Report, Refusal> {
        let marks = match (self.injected_ms, self.healed_ms) {
            (Some(injected_ms), Some(healed_ms)) => {
                Some(Marks { injected_ms, healed_ms, steady_ms: self.steady_ms, ended_ms: self.ended_ms })
            }
            _ => None,
        };
        let (writer, caller, outside) = (self.writer.all(), self.caller.all(), self.outside.all());
        let figures = figures(&Seen { writer: &writer, caller: &caller, outside: &outside, writes: &ledger }, marks);
        let objectives = judge(self.drill, marks, &figures);
        let outcome = match stop {
            Some(Stop::Aborted(why)) => format!("aborted: {why}"),
            Some(Stop::Guard(refusal)) => return Err(refusal),
            None if objectives.iter().all(|o| o.met) => "passed".to_owned(),
            None => "missed".to_owned(),
        };
        self.timeline.live.tell(&Line::Ends { outcome: outcome.clone() });
        Ok(Report {
            format: Report::format(),
            drill: self.drill.name.to_string(),
            run: self.id,
            outcome,
            spec: spec.to_owned(),
            spec_sha256: hex::encode(Sha256::digest(spec)),
            versions: versions(),
            started_ms: self.clock.begun_ms,
            load_average: kernel_line("/proc/loadavg"),
            marks,
            timeline: self.timeline.into_events(),
            objectives,
            figures,
            caller,
            outside,
            writer,
            ledger,
        })
    }
}

fn versions() -> Vec<String> {
    vec![
        format!("ambit {}", env!("CARGO_PKG_VERSION")),
        format!("kernel {}", kernel_line("/proc/sys/kernel/osrelease")),
    ]
}

fn kernel_line(file: &str) -> String {
    std::fs::read_to_string(file).map(|t| t.trim().to_owned()).unwrap_or_else(|_| "unknown".to_owned())
}
