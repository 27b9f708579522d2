//! Two drills of the library, again and again, in one lab: how long the loss of a leader and of a whole cluster costs, as
//! distributions. What a drill measures, and that its report verifies, is the drill's; here its reports are counted.

use super::folder;
use crate::demo::{Say, in_a_lab};
use crate::lab::{Lab, LabError, make_folder, write_file};
use crate::library::{self, drill};
use crate::topology::Spec;
use ambit::drill::report::SealedReport;
use ambit_model::{Refusal, refusal::Code};

const LAB: &str = "failover";
const LEADERS: usize = 50;
const CLUSTERS: usize = 30;

/// What one run gave, milliseconds from the fault.
struct Trial {
    /// The longest time without a success.
    silent_ms: Option<u64>,
    /// Until the last failure before the healing.
    failing_ms: u64,
    lost: Option<u64>,
    duplicated: Option<u64>,
}

/// A row of the table.
struct Row {
    name: &'static str,
    values: Vec<f64>,
    /// At which share of the trials, and at most what; none where nothing is asked.
    target: Option<(f64, f64)>,
}

/// Runs them in a lab of its own and prints the figures.
///
/// # Errors
/// The lab or a drill failed; a missed target is none.
pub fn failover() -> Result<(), LabError> {
    let say = Say::new();
    let spec = Spec::standard(LAB, 2, 2, 3)?;
    let (leaders, clusters) = in_a_lab(&spec, &say, |lab| {
        let _demo = library::stage(lab, &say)?;
        Ok((trials(lab, &say, "leader-loss", LEADERS)?, trials(lab, &say, "cluster-loss", CLUSTERS)?))
    })?;
    // What was not measured is worse than anything that was.
    let number = |of: fn(&Trial) -> Option<u64>, trials: &[Trial]| -> Vec<f64> {
        trials.iter().map(|t| of(t).map_or(f64::INFINITY, |n| n as f64)).collect()
    };
    let leader = number(|t| t.silent_ms, &leaders);
    let rows = [
        Row {
            name: "leader lost, writes: longest silence, p50, ms",
            values: leader.clone(),
            target: Some((0.5, 500.0)),
        },
        Row { name: "leader lost, writes: longest silence, max, ms", values: leader, target: Some((1.0, 1000.0)) },
        Row {
            name: "leader lost: acknowledged writes lost",
            values: number(|t| t.lost, &leaders),
            target: Some((1.0, 0.0)),
        },
        Row {
            name: "leader lost: writes duplicated",
            values: number(|t| t.duplicated, &leaders),
            target: Some((1.0, 0.0)),
        },
        Row {
            name: "cluster lost, calls: longest silence, p50, ms",
            values: number(|t| t.silent_ms, &clusters),
            target: Some((0.5, 1000.0)),
        },
        Row {
            name: "cluster lost, calls: last failure, p99, ms",
            values: number(|t| Some(t.failing_ms), &clusters),
            target: Some((0.99, 2500.0)),
        },
        Row {
            name: "cluster lost: acknowledged writes lost",
            values: number(|t| t.lost, &clusters),
            target: Some((1.0, 0.0)),
        },
    ];
    print(&rows)
}

fn trials(lab: &Lab, say: &Say, name: &str, count: usize) -> Result<Vec<Trial>, LabError> {
    say.chapter(&format!("{count} times {name}"));
    (1..=count)
        .map(|n| {
            let ran = lab.drill(name, drill(name)?)?;
            let trial = read(&ran.report)?;
            let silent = trial.silent_ms.map_or_else(|| "not measured".to_owned(), |ms| format!("{ms} ms"));
            say.step(&format!("{n:2}: longest silence {silent}, last failure after {} ms", trial.failing_ms));
            Ok(trial)
        })
        .collect()
}

fn read(file: &std::path::Path) -> Result<Trial, LabError> {
    let text = std::fs::read(file).map_err(|source| LabError::Io { path: file.to_owned(), source })?;
    let sealed: SealedReport =
        serde_json::from_slice(&text).map_err(|e| Refusal::new(Code::DrillReportInvalid, "a report", e.to_string()))?;
    let report = sealed.report;
    let marks =
        report.marks.ok_or_else(|| Refusal::new(Code::DrillReportInvalid, "a fault and its healing", "none"))?;
    // A drill measures one of the two: the writer where there is no caller.
    let (figures, samples) = match &report.figures.caller {
        Some(caller) => (Some(caller), &report.caller),
        None => (report.figures.writer.as_ref(), &report.writer),
    };
    let within = |t_ms: u64| marks.injected_ms < t_ms && t_ms <= marks.healed_ms;
    let failed = samples.iter().filter(|s| !s.ok && within(s.t_ms)).map(|s| s.t_ms - marks.injected_ms);
    let ledger = report.figures.ledger.as_ref();
    Ok(Trial {
        silent_ms: figures.and_then(|f| f.rto_ms),
        failing_ms: failed.max().unwrap_or_default(),
        lost: ledger.map(|l| l.lost),
        duplicated: ledger.map(|l| l.duplicated),
    })
}

fn print(rows: &[Row]) -> Result<(), LabError> {
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load: String = load.split(' ').take(3).collect::<Vec<_>>().join(" ");
    let (mut met, mut all, mut json) = (0, 0, Vec::new());
    println!("{:50} {:>8} {:>8} {:>8}  target", "", "p50", "p99", "max");
    for row in rows {
        let mut sorted = row.values.clone();
        sorted.sort_by(f64::total_cmp);
        let at = |share: f64| {
            let rank = (share * sorted.len() as f64).ceil().max(1.0) as usize;
            sorted.get(rank.saturating_sub(1)).copied().unwrap_or(f64::INFINITY)
        };
        let verdict = row.target.map(|(share, most)| (at(share) <= most, most));
        all += u32::from(verdict.is_some());
        met += u32::from(verdict.is_some_and(|(good, _)| good));
        let word = verdict
            .map_or_else(String::new, |(good, most)| format!("<= {most:.0} {}", if good { "met" } else { "missed" }));
        println!("{:50} {:>8.0} {:>8.0} {:>8.0}  {word}", row.name, at(0.5), at(0.99), at(1.0));
        json.push(serde_json::json!({
            "name": row.name, "ours": at(row.target.map_or(0.5, |(share, _)| share)), "peer": null, "floor": null,
            "target": row.target.map(|(_, most)| most), "met": verdict.map(|(good, _)| good), "load_average": load, "trials": row.values,
        }));
    }
    println!("load average {load}; {LEADERS} leaders, {CLUSTERS} clusters, one machine");
    println!(
        "not built, so not measured: a standby's first SVID after a grant, the identity gap, imports a second, cost of a peer"
    );
    make_folder(&folder()?)?;
    write_file(&folder()?.join("failover.json"), format!("{:#}\n", serde_json::json!(json)).as_bytes())?;
    println!("{all} figures, {met} met");
    Ok(())
}
