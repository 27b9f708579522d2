//! Whole drills against a cell in this process: what they measure, when they refuse, and that they always revert.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends")]

mod cell;

use ambit::cell::Cell;
use ambit::context::Context;
use ambit::drill::guard::Cells;
use ambit::drill::lab::Lab;
use ambit::drill::report::{SealedReport, verify};
use ambit::drill::run::run;
use ambit_model::{Code, Refusal};
use cell::FakeCell;
use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

/// Stands in for ambit-lab: an outage is a file in the cell's folder, and every order is noted.
const LAB: &str = r#"#!/bin/sh
cd "$(dirname "$0")"
echo "$*" >> orders
case "$1 $2" in
  "inject kill") touch killed; [ -e lasting ] || { (sleep 0.6; rm -f killed) >/dev/null 2>&1 & } ;;
  "inject restart") [ -e stuck ] && exit 1; rm -f killed ;;
  "probe "*) while :; do
      if [ -e killed ]; then by=east-n1-api; else by=west-n1-api; fi
      echo "{\"t_ms\":$(date +%s%3N),\"ok\":true,\"by\":\"$by\"}"; sleep 0.01
    done ;;
esac
"#;

const DRILL: &str = r#"
apiVersion: ambit/v1
kind: Drill
metadata: {name: short, owner: tests}
spec:
  hypothesis: "a short outage is measured"
  scope: {clusters: [west]}
  preconditions: [{quorumSurvives: west}]
  steadyState: [{probe: writer, okPercent: 100, window: 400ms}]
  probes:
    writer: {cell: west, every: 10ms}
  phases:
    - {name: baseline, for: 3s, until: steady}
    - {name: break, inject: {kill: leader-of west}, lease: 60s, for: 1800ms}
    - {name: heal, heal: all, for: 5s, until: steady}
  abort: [{probe: writer, failingFor: 10s}, {longer: 1m}]
  objectives: {rto: {writer: 1500ms}, ackedWritesLost: 0, duplicatedWrites: 0}
  report: {sealAt: west}
"#;

struct Stage {
    cell: FakeCell,
    lab: Lab,
    cells: Cells,
}

async fn stage(name: &str) -> Stage {
    let cell = FakeCell::start(name).await;
    let program = cell.folder.join("fake-lab");
    std::fs::write(&program, LAB).unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o700)).unwrap();
    let lab = Lab::new(program, "demo".into(), cell.folder.clone());
    let west = Cell::open(Context::read(&cell.context()).unwrap(), Duration::from_secs(3)).unwrap();
    Stage { cells: BTreeMap::from([("west".to_owned(), west)]), lab, cell }
}

impl Stage {
    async fn run(&self, spec: &str) -> Result<SealedReport, Refusal> {
        run(spec, &self.lab, &self.cells).await
    }
    fn touch(&self, name: &str) {
        std::fs::write(self.cell.folder.join(name), "").unwrap();
    }
    /// What the lab was told to do.
    fn orders(&self) -> String {
        let orders = std::fs::read_to_string(self.cell.folder.join("orders")).unwrap_or_default();
        let word = |line: &str| line.split(' ').nth(1).unwrap_or_default().to_owned() + ",";
        orders.lines().filter(|l| l.starts_with("inject")).map(word).collect()
    }
    fn harmed(&self) -> bool {
        self.cell.folder.join("killed").exists()
    }
}

fn met(sealed: &SealedReport) -> String {
    sealed.report.objectives.iter().map(|o| format!("{}{} ", if o.met { "" } else { "!" }, o.name)).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_outage_is_measured_sealed_and_checked_offline() {
    let stage = stage("passes").await;
    let sealed = stage.run(DRILL).await.unwrap();
    let figures = &sealed.report.figures;
    assert_eq!(sealed.report.outcome, "passed", "{:?} {:?}", sealed.report.objectives, sealed.report.timeline);
    let rto_ms = figures.writer.as_ref().unwrap().rto_ms.unwrap();
    assert!((500..1500).contains(&rto_ms), "the outage lasted 600 ms, measured {rto_ms}");
    let ledger = figures.ledger.as_ref().unwrap();
    assert!(ledger.acked > 80 && ledger.lost == 0 && ledger.duplicated == 0 && ledger.repeated > 0, "{ledger:?}");
    assert_eq!(stage.cell.entries(), 0, "the drill's entries are deleted");
    assert_eq!(stage.orders(), "kill,restart,");

    let text = sealed.text().unwrap();
    let fingerprint = ambit::context::fingerprint(&stage.cell.fingerprint).unwrap();
    assert_eq!(verify(&text, &[fingerprint]).unwrap().sealers[0].trust_domain.as_str(), "west");
    let altered = text.replacen("passed", "missed", 1);
    assert_eq!(verify(&altered, &[fingerprint]).unwrap_err().code, Code::DrillReportInvalid);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_write_is_found() {
    let stage = stage("loses").await;
    stage.cell.shared.lose.lock().unwrap().push("-7".into());
    let sealed = stage.run(DRILL).await.unwrap();
    assert_eq!((sealed.report.outcome.as_str(), sealed.report.figures.ledger.as_ref().unwrap().lost), ("missed", 1));
    assert!(met(&sealed).contains("!ackedWritesLost"), "{}", met(&sealed));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_harmed_where_the_guard_refuses() {
    let stage = stage("guard").await;
    *stage.cell.shared.replicas_answering.lock().unwrap() = vec![1, 2];
    let refusal = stage.run(DRILL).await.unwrap_err();
    assert_eq!((refusal.code, refusal.expected.as_str()), (Code::DrillGuard, "at least 3 voters of west that answer"));
    // A whole cell, whose writes have not been good for long enough: the steady state is never met.
    *stage.cell.shared.replicas_answering.lock().unwrap() = vec![1, 2, 3];
    let unsteady = DRILL.replace("window: 400ms", "window: 20s");
    let refusal = stage.run(&unsteady).await.unwrap_err();
    assert_eq!((refusal.code, refusal.expected.as_str()), (Code::DrillGuard, "the steady state before the fault"));
    // Another drill runs already.
    let _held = stage.lab.lock().unwrap();
    assert_eq!(stage.run(DRILL).await.unwrap_err().expected, "no other drill in lab demo");
    assert_eq!((stage.orders().as_str(), stage.cell.entries()), ("", 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_abort_reverts_at_once() {
    let stage = stage("abort").await;
    stage.touch("lasting");
    let sealed = stage.run(&DRILL.replace("failingFor: 10s", "failingFor: 500ms")).await.unwrap();
    assert!(sealed.report.outcome.starts_with("aborted: the writer had no success for"), "{}", sealed.report.outcome);
    assert!(!stage.harmed());
    assert_eq!(stage.orders(), "kill,restart,");
    assert!(sealed.seal.is_some() && met(&sealed).contains("!rto.writer"), "{}", met(&sealed));
    assert_eq!(sealed.report.figures.ledger.as_ref().unwrap().lost, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn callers_that_move_and_come_back_are_seen() {
    let stage = stage("caller").await;
    stage.touch("lasting");
    let spec = DRILL
        .replace("kill: leader-of west", "kill: west-n1")
        .replace(
            "writer: {cell: west, every: 10ms}",
            "caller: {pod: east-n1-web, target: \"10.96.0.10:8080\", every: 10ms}",
        )
        .replace(
            "probe: writer, okPercent: 100, window: 400ms",
            "probe: caller, okPercent: 90, window: 400ms, by: west",
        )
        .replace("probe: writer", "probe: caller")
        .replace(
            "{rto: {writer: 1500ms}, ackedWritesLost: 0, duplicatedWrites: 0}",
            "{rto: {caller: 1s}, failback: 2s, failedCalls: 0}",
        );
    let sealed = stage.run(&spec).await.unwrap();
    assert_eq!(sealed.report.outcome, "passed", "{:?}", sealed.report.objectives);
    let caller = sealed.report.figures.caller.as_ref().unwrap();
    let names = |at: usize| caller.answered[at].keys().map(String::as_str).collect::<Vec<_>>().join(",");
    assert_eq!(names(0), "west-n1-api");
    assert!(names(1).starts_with("east-n1-api"), "{}", names(1));
    assert!(caller.failback_ms.unwrap() < 2000);
}
