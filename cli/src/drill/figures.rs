//! From samples to figures. Pure: the same samples give the same figures here and wherever a report is checked.

use super::spec::{Drill, Steady};
use crate::duration::Millis;
use ambit_model::{Code, Refusal};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

/// One outcome seen by a probe.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Sample {
    /// When it was known, milliseconds since the drill began.
    pub t_ms: u64,
    /// Whether it was good.
    pub ok: bool,
    /// Who answered; empty where nobody did or nobody says.
    pub by: String,
}

impl fmt::Display for Sample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.t_ms, if self.ok { "ok" } else { "fail" })?;
        if self.by.is_empty() { Ok(()) } else { write!(f, " {}", self.by) }
    }
}
impl FromStr for Sample {
    type Err = Refusal;
    fn from_str(s: &str) -> Result<Self, Refusal> {
        let bad = || Refusal::new(Code::DrillReportInvalid, "a sample: milliseconds, ok or fail, who answered", s);
        let mut words = s.splitn(3, ' ');
        let t_ms = words.next().and_then(|w| w.parse().ok()).ok_or_else(bad)?;
        let ok = match words.next() {
            Some("ok") => true,
            Some("fail") => false,
            _ => return Err(bad()),
        };
        Ok(Sample { t_ms, ok, by: words.next().unwrap_or_default().to_owned() })
    }
}
impl TryFrom<String> for Sample {
    type Error = Refusal;
    fn try_from(s: String) -> Result<Self, Refusal> {
        s.parse()
    }
}
impl From<Sample> for String {
    fn from(s: Sample) -> String {
        s.to_string()
    }
}

/// When what happened, milliseconds since the drill began.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Marks {
    /// Just before the fault was ordered.
    pub injected_ms: u64,
    /// Just before the healing was ordered.
    pub healed_ms: u64,
    /// When the steady state held again after the healing.
    pub steady_ms: Option<u64>,
    /// When the probes were stopped.
    pub ended_ms: u64,
}

/// What one probe saw. A figure that could not be measured is absent, never zero.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProbeFigures {
    /// The longest time between two successes from the last one before the fault until the healing; absent where no
    /// success was seen before the fault, or none after the outage. It never flatters: a pause of the machine that is
    /// longer than the outage counts as the outage.
    pub rto_ms: Option<u64>,
    /// All samples.
    pub samples: u64,
    /// Failures before the fault.
    pub failed_before: u64,
    /// Failures from the fault to the end.
    pub failed: u64,
    /// Who answered before the fault, during it and after the healing, with counts.
    pub answered: [BTreeMap<String, u64>; 3],
    /// From the healing to the first success answered by whom it was answered before the fault; absent where nobody
    /// else ever answered meanwhile, or the first never came back.
    pub failback_ms: Option<u64>,
}

/// The figures of one probe. The samples may come in any order.
pub fn probe(samples: &[Sample], marks: Marks) -> ProbeFigures {
    let mut sorted: Vec<&Sample> = samples.iter().collect();
    sorted.sort_by_key(|s| s.t_ms);
    let mut answered = [BTreeMap::new(), BTreeMap::new(), BTreeMap::new()];
    for s in sorted.iter().filter(|s| s.ok && !s.by.is_empty()) {
        *answered[stage(s, marks)].entry(s.by.clone()).or_insert(0) += 1;
    }
    let count = |after: bool| sorted.iter().filter(|s| !s.ok && (stage(s, marks) > 0) == after).count() as u64;
    ProbeFigures {
        rto_ms: rto(&sorted, marks),
        samples: samples.len() as u64,
        failed_before: count(false),
        failed: count(true),
        failback_ms: failback(&sorted, marks, &answered),
        answered,
    }
}

/// 0 before the fault, 1 during it, 2 after the healing began.
fn stage(sample: &Sample, marks: Marks) -> usize {
    usize::from(sample.t_ms > marks.injected_ms) + usize::from(sample.t_ms > marks.healed_ms)
}

fn rto(sorted: &[&Sample], marks: Marks) -> Option<u64> {
    let successes = sorted.iter().filter(|s| s.ok && s.t_ms <= marks.healed_ms).map(|s| s.t_ms);
    let (before, during): (Vec<u64>, Vec<u64>) = successes.partition(|t| *t <= marks.injected_ms);
    let mut last = *before.last()?;
    let mut longest = 0;
    for t in during {
        longest = longest.max(t - last);
        last = t;
    }
    // What is still failing at the end of the window has not recovered, however long that is.
    let tail = marks.healed_ms.saturating_sub(last);
    let failing = sorted.iter().any(|s| !s.ok && s.t_ms > last && s.t_ms <= marks.healed_ms);
    let lasting = if failing { FAILING_MS_MAX } else { SILENCE_MS_MAX };
    if tail > longest.max(lasting) { None } else { Some(longest) }
}

/// A failure so close to the end of the window does not tell an outage from a single bad call.
const FAILING_MS_MAX: u64 = 100;
/// A probe that is well succeeds many times in this time, though a machine under load may pause it.
const SILENCE_MS_MAX: u64 = 1000;

fn failback(sorted: &[&Sample], marks: Marks, answered: &[BTreeMap<String, u64>; 3]) -> Option<u64> {
    let home = answered[0].iter().max_by_key(|(_, n)| **n)?.0;
    let moved = answered[1].keys().any(|by| by != home);
    let back = sorted.iter().find(|s| s.ok && s.t_ms > marks.healed_ms && s.by == *home)?;
    moved.then(|| back.t_ms - marks.healed_ms)
}

/// Whether a steady state holds at `now_ms`. A window without samples, or not yet filled, is not steady.
pub fn steady(samples: &[Sample], state: &Steady, now_ms: u64) -> bool {
    let Some(from) = now_ms.checked_sub(state.window.0) else { return false };
    let (mut good, mut all) = (0u64, 0u64);
    // Samples arrive nearly in order; the slack covers those that were known late.
    for s in samples.iter().rev().take_while(|s| s.t_ms + SILENCE_MS_MAX >= from).filter(|s| s.t_ms >= from) {
        all += 1;
        good += u64::from(s.ok && state.by.as_ref().is_none_or(|by| s.by.starts_with(by.as_str())));
    }
    all >= SAMPLES_MIN && good * 100 >= all * u64::from(state.ok_percent)
}

/// Fewer samples than this in a window say nothing.
const SAMPLES_MIN: u64 = 5;

/// Since when a probe has had no success.
pub fn failing_since(samples: &[Sample]) -> u64 {
    samples.iter().rev().find(|s| s.ok).map_or(0, |s| s.t_ms)
}

/// One promise, and what came of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Objective {
    /// Which.
    pub name: String,
    /// What was promised.
    pub target: String,
    /// What was measured; `not measured` is never met.
    pub measured: String,
    /// Whether it was kept.
    pub met: bool,
}

/// What the probes and the ledger gave, as far as the drill had them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Figures {
    /// The writer's.
    pub writer: Option<ProbeFigures>,
    /// The caller's.
    pub caller: Option<ProbeFigures>,
    /// Of the caller outside of the scope; left out where there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outside: Option<ProbeFigures>,
    /// The ledger's.
    pub ledger: Option<super::ledger::LedgerFigures>,
}

/// What was seen.
#[derive(Clone, Copy, Debug)]
pub struct Seen<'a> {
    /// The writer's samples.
    pub writer: &'a [Sample],
    /// The caller's.
    pub caller: &'a [Sample],
    /// Of the caller outside of the scope.
    pub outside: &'a [Sample],
    /// The ledger.
    pub writes: &'a [super::ledger::Write],
}

/// What the samples and the ledger give. The report's check computes it again.
pub fn figures(seen: &Seen<'_>, marks: Option<Marks>) -> Figures {
    let Some(marks) = marks else { return Figures::default() };
    let of = |samples: &[Sample]| if samples.is_empty() { None } else { Some(probe(samples, marks)) };
    let ledger = if seen.writes.is_empty() { None } else { Some(super::ledger::figures(seen.writes)) };
    Figures { writer: of(seen.writer), caller: of(seen.caller), outside: of(seen.outside), ledger }
}

/// Every promise of the drill against the figures. That the steady state returns is always promised, within the time
/// that the drill's phases give it after the healing.
pub fn judge(drill: &Drill, marks: Option<Marks>, figures: &Figures) -> Vec<Objective> {
    let promised = &drill.objectives;
    let writer = figures.writer.as_ref();
    let caller = figures.caller.as_ref();
    let ledger = figures.ledger.as_ref();
    let mut out = Vec::new();
    let mut time = |name: &str, target: Option<Millis>, measured: Option<u64>| {
        if let Some(target) = target {
            out.push(Objective {
                name: name.to_owned(),
                target: format!("<= {target}"),
                measured: measured.map_or_else(|| "not measured".to_owned(), |ms| format!("{ms}ms")),
                met: measured.is_some_and(|ms| ms <= target.0),
            });
        }
    };
    time("rto.writer", promised.rto.writer, writer.and_then(|w| w.rto_ms));
    time("rto.caller", promised.rto.caller, caller.and_then(|c| c.rto_ms));
    time("failback", promised.failback, caller.and_then(|c| c.failback_ms));
    let again = marks.and_then(|m| m.steady_ms?.checked_sub(m.healed_ms));
    time("steadyAgain", Some(drill.healing_time()), again);
    let mut number = |name: &str, target: Option<u64>, measured: Option<u64>| {
        if let Some(target) = target {
            out.push(Objective {
                name: name.to_owned(),
                target: format!("<= {target}"),
                measured: measured.map_or_else(|| "not measured".to_owned(), |n| n.to_string()),
                met: measured.is_some_and(|n| n <= target),
            });
        }
    };
    // No acknowledged write at all proves nothing about lost ones.
    let proven = ledger.filter(|l| l.acked > 0);
    number("ackedWritesLost", promised.acked_writes_lost, proven.map(|l| l.lost));
    number("duplicatedWrites", promised.duplicated_writes, proven.map(|l| l.duplicated));
    number("failedCalls", promised.failed_calls, caller.map(|c| c.failed));
    number("outsideFailedCalls", promised.outside_failed_calls, figures.outside.as_ref().map(|o| o.failed));
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const MARKS: Marks = Marks { injected_ms: 1000, healed_ms: 5000, steady_ms: Some(8000), ended_ms: 9000 };

    /// `from..to/step` good by `who`; a leading `!` for failures.
    fn samples(text: &str) -> Vec<Sample> {
        let mut out = Vec::new();
        for part in text.split_whitespace() {
            let (ok, part) = part.strip_prefix('!').map_or((true, part), |p| (false, p));
            let (range, by) = part.split_once('@').unwrap_or((part, ""));
            let (from, rest) = range.split_once("..").unwrap();
            let (to, step) = rest.split_once('/').unwrap();
            let (from, to, step): (u64, u64, usize) =
                (from.parse().unwrap(), to.parse().unwrap(), step.parse().unwrap());
            out.extend((from..to).step_by(step).map(|t_ms| Sample { t_ms, ok, by: by.to_owned() }));
        }
        out
    }

    #[test]
    fn recovery_time_is_the_longest_gap_after_the_fault() {
        for (text, rto) in [
            ("0..5000/10", Some(10)),
            ("0..1000/10 !1000..1800/10 1800..5000/10", Some(810)),
            // Answers already on their way when the leader died do not end the outage.
            ("0..1010/10 !1020..1800/10 1800..5000/10", Some(800)),
            ("0..1000/10 1100..1200/10 !1200..2200/10 2200..5000/10", Some(1010)),
            // Twice broken: the longer counts.
            ("0..1000/10 1500..2000/10 2900..5000/10", Some(910)),
            ("0..1000/10 !1000..5000/10", None),
            ("0..1000/10", None),
            ("!0..1000/10 1200..5000/10", None),
            ("0..1000/10 1500..3000/10 !3000..5000/10", None),
            // Cut short while still failing, however short that was.
            ("0..1000/10 1000..4500/10 !4500..5000/10", None),
            // One failure right at the end is no lasting outage.
            ("0..1000/10 1500..4990/10 !4990..5000/10", Some(510)),
            // Recovery only after healing is no recovery.
            ("0..1000/10 !1000..5000/10 5100..9000/10", None),
            ("", None),
        ] {
            assert_eq!(probe(&samples(text), MARKS).rto_ms, rto, "{text}");
        }
    }

    #[test]
    fn order_of_arrival_does_not_matter() {
        let mut mixed = samples("0..1000/10 !1000..1800/10 1800..5000/10");
        let figures = probe(&mixed, MARKS);
        mixed.reverse();
        assert_eq!(probe(&mixed, MARKS), figures);
    }

    #[test]
    fn failback_and_failures_are_counted_by_stage() {
        let text = "!0..20/10 20..1000/10@west !1001..1401/100 1500..6000/10@east !6000..6050/10 6100..9000/10@west";
        let figures = probe(&samples(text), MARKS);
        assert_eq!((figures.failed_before, figures.failed), (2, 9));
        assert_eq!(figures.failback_ms, Some(1100));
        assert_eq!(figures.rto_ms, Some(510));
        assert_eq!(figures.answered[1].keys().collect::<Vec<_>>(), ["east"]);
        let never_left = probe(&samples("0..9000/10@west"), MARKS);
        assert_eq!(never_left.failback_ms, None, "who never left cannot come back");
        let never_back = probe(&samples("0..1000/10@west 1500..9000/10@east"), MARKS);
        assert_eq!(never_back.failback_ms, None);
    }

    #[test]
    fn steady_needs_enough_good_samples_of_the_right_one() {
        let state = |ok_percent, by: Option<&str>| Steady {
            probe: super::super::spec::Probe::Caller,
            ok_percent,
            window: Millis(1000),
            by: by.map(str::to_owned),
        };
        let good = samples("0..2000/10@west-n1-api");
        assert!(steady(&good, &state(100, Some("west")), 2000));
        assert!(!steady(&good, &state(100, Some("east")), 2000));
        assert!(!steady(&good, &state(100, None), 900), "the window is not yet filled");
        assert!(!steady(&good, &state(100, None), 3500), "nothing seen lately");
        let one_bad = samples("0..1500/10 !1500..1510/10 1510..2000/10");
        assert!(!steady(&one_bad, &state(100, None), 2000));
        assert!(steady(&one_bad, &state(99, None), 2000));
        assert_eq!(failing_since(&samples("0..1500/10 !1500..1900/10")), 1490);
    }

    #[test]
    fn what_was_not_measured_is_not_met() {
        let mut drill: Drill = include_str!("../../../deploy/drills/cluster-loss.yaml").parse().unwrap();
        drill.objectives =
            super::super::spec::Objectives { acked_writes_lost: Some(0), failed_calls: Some(3), ..Default::default() };
        let rows = judge(&drill, None, &Figures::default());
        assert!(rows.len() == 3 && rows.iter().all(|r| !r.met && r.measured == "not measured"), "{rows:?}");
        let ledger = super::super::ledger::LedgerFigures { sent: 5, acked: 5, ..Default::default() };
        let caller = Some(probe(&samples("0..900/10 !1100..1140/10"), MARKS));
        let figures = Figures { ledger: Some(ledger), caller, ..Default::default() };
        let met: Vec<bool> = judge(&drill, Some(MARKS), &figures).iter().map(|r| r.met).collect();
        assert_eq!(met, [true, true, false], "steady again, nothing lost; four failed calls, three allowed");
        let never_steady = judge(&drill, Some(Marks { steady_ms: None, ..MARKS }), &figures);
        assert!(!never_steady[0].met, "{never_steady:?}");
    }

    #[test]
    fn samples_read_back_from_their_text() {
        for text in ["12 ok west-n1", "13 fail", "14 ok"] {
            assert_eq!(text.parse::<Sample>().unwrap().to_string(), text);
        }
        for text in ["", "x ok", "1", "1 maybe", "-1 ok"] {
            assert!(text.parse::<Sample>().is_err(), "{text}");
        }
    }
}
