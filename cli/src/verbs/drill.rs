//! `ambit drill`.

mod plan;
mod repeat;
mod watch;

use super::Session;
use crate::args::{Drill as DrillVerb, DrillRun, Report as ReportVerb};
use crate::ask;
use crate::cell::Cell;
use crate::context::{Context, read_bounded};
use crate::drill::guard::Cells;
use crate::drill::html;
use crate::drill::lab::Lab;
use crate::drill::report::{REPORT_BYTES_MAX, SealedReport, Sealer, Verified, verify};
use crate::drill::spec::{Action, Drill, FILE_BYTES_MAX};
use crate::exit::{Exit, file_refusal};
use crate::output::{Answer, Form, Table, pretty};
use crate::when::utc;
use ambit_model::{ClusterId, Refusal};
use ambit_proto::v1;
use serde_json::json;
use std::path::{Path, PathBuf};

pub(super) async fn run(session: &Session, verb: DrillVerb) -> Result<Answer, Refusal> {
    match verb {
        DrillVerb::List { folder } => plan::list(session.form, &folder),
        DrillVerb::Validate { file } => validate(session.form, &file),
        DrillVerb::Plan(options) => plan::plan(session, options).await,
        DrillVerb::Watch { lab } => watch::watch(session.form, &Lab::here(lab)?).await,
        DrillVerb::Abort { lab } => watch::abort(&Lab::here(lab)?).await,
        DrillVerb::Run(options) => run_drill(session, options).await,
        DrillVerb::Report(ReportVerb::Verify { file, root, fingerprint: hex }) => {
            verify_report(session.form, &file, &root, &hex)
        }
        DrillVerb::Report(ReportVerb::Html { file, out }) => page(&file, out),
        DrillVerb::Report(ReportVerb::List) => {
            let cell = session.cell()?;
            let reply = ask!(cell, Drill.list_reports(v1::ListReportsRequest {}))?;
            let mut table = Table::new("report", &["drill", "sealed", "index", "sha256"]);
            for r in &reply.reports {
                table.row(vec![json!(r.drill), json!(utc(r.stamp_ms)), json!(r.index), json!(r.report_sha256)]);
            }
            Ok(Answer::ok(table.render(session.form)))
        }
    }
}

fn validate(form: Form, file: &Path) -> Result<Answer, Refusal> {
    let drill: Drill = read_bounded(file, FILE_BYTES_MAX)?.parse()?;
    let fault = drill.fault().map(|(fault, lease, _)| (fault.to_string(), lease.to_string())).unwrap_or_default();
    if form == Form::Json {
        return Ok(Answer::ok(pretty(&json!({
            "drill": drill.name.as_str(), "owner": drill.owner, "hypothesis": drill.hypothesis,
            "fault": fault.0, "lease": fault.1, "longest_ms": drill.length().0,
            "harms": drill.clusters.iter().map(|c| c.as_str()).collect::<Vec<_>>(),
            "protects": drill.protected.iter().map(|c| c.as_str()).collect::<Vec<_>>(),
            "cells": drill.cells().iter().map(|c| c.as_str()).collect::<Vec<_>>(),
        }))));
    }
    Ok(Answer::ok(describe(&drill) + "1 drill, valid"))
}

/// What the file says, in lines.
fn describe(drill: &Drill) -> String {
    let fault = drill.fault().map(|(fault, ..)| fault.to_string()).unwrap_or_default();
    let mut out = format!("drill {} ({}): {}\n", drill.name, drill.owner, drill.hypothesis);
    out.push_str(&format!("  harms: {fault}; at most {} in all; seals at {}\n", drill.length(), names(&drill.seal_at)));
    if let Some(w) = &drill.writer {
        out.push_str(&format!("  writes to {} every {}, each kept in a ledger\n", w.cell, w.every));
    }
    for (c, where_to) in
        drill.caller.iter().map(|c| (c, "")).chain(drill.outside.iter().map(|c| (c, ", outside of the scope")))
    {
        out.push_str(&format!("  calls {} from {} every {}{where_to}\n", c.target, c.pod, c.every));
    }
    for p in &drill.phases {
        let does = match &p.action {
            Action::Watch => "watch".to_owned(),
            Action::Inject(fault, lease) => format!("{fault}, reverted by itself after {lease}"),
            Action::Heal => "bring everything back".to_owned(),
        };
        let until = if p.until_steady { "until steady, at most" } else { "for" };
        out.push_str(&format!("  phase {}: {does}; {until} {}\n", p.name, p.length));
    }
    out
}

async fn run_drill(session: &Session, options: DrillRun) -> Result<Answer, Refusal> {
    let spec = read_bounded(&options.file, FILE_BYTES_MAX)?;
    let drill: Drill = spec.parse()?;
    let lab = Lab::here(options.lab)?;
    let cells = cells(session, &drill, &lab, &options.cells)?;
    for cell in cells.values() {
        eprintln!("{}", cell.context().banner());
    }
    let file = options.report.unwrap_or_else(|| PathBuf::from(format!("drill-{}.json", drill.name)));
    let (mut reports, mut worst) = (Vec::new(), Exit::Ok);
    for run in 1..=options.repeat {
        let file = if options.repeat == 1 { file.clone() } else { numbered(&file, run) };
        let sealed = one_run(&spec, &lab, &cells, &file).await?;
        let good = sealed.report.outcome == "passed" && sealed.seals() == drill.seal_at.len();
        worst = worst.max(if good { Exit::Ok } else { Exit::Failed });
        if options.repeat == 1 {
            let text = format!("{}\n{}", objectives(session.form, &sealed), last_line(&sealed, &file));
            return Ok(Answer::ok(text).ending(worst));
        }
        eprintln!("{}", last_line(&sealed, &file));
        reports.push(sealed.report);
    }
    let passed = reports.iter().filter(|r| r.outcome == "passed").count();
    let mut answer = Answer::ok(repeat::rows(session.form, &reports)).ending(worst);
    if session.form == Form::Table {
        answer.text.push_str(&format!("\ndrill {}: {passed} of {} runs passed", drill.name, reports.len()));
    }
    Ok(answer)
}

/// `name.json` becomes `name.3.json`.
fn numbered(file: &Path, run: u16) -> PathBuf {
    let extension = file.extension().map_or_else(|| "json".to_owned(), |e| e.to_string_lossy().into_owned());
    file.with_extension(format!("{run}.{extension}"))
}

async fn one_run(spec: &str, lab: &Lab, cells: &Cells, file: &Path) -> Result<SealedReport, Refusal> {
    // A path that cannot be written must be known before anything is killed.
    std::fs::write(file, "").map_err(|e| file_refusal(file, &e))?;
    match crate::drill::run::run(spec, lab, cells).await {
        Ok(sealed) => {
            std::fs::write(file, sealed.text()?).map_err(|e| file_refusal(file, &e))?;
            Ok(sealed)
        }
        Err(refusal) => {
            // Nothing was measured; an empty file would look like a report.
            let _ = std::fs::remove_file(file);
            Err(refusal)
        }
    }
}

/// Every cell that the drill names: the session's own, those named, and what the lab has of the rest.
fn cells(session: &Session, drill: &Drill, lab: &Lab, named: &[PathBuf]) -> Result<Cells, Refusal> {
    let mut contexts = Vec::new();
    for file in named {
        contexts.push(Context::read(file)?);
    }
    let explicit = session.context.is_some() || std::env::var_os("AMBIT_CONTEXT").is_some();
    if explicit {
        contexts.push(Context::find(session.context.as_deref())?);
    }
    for name in drill.cells() {
        let file = lab.context(name.as_str());
        if contexts.iter().all(|c| c.trust_domain.as_str() != name.as_str()) && file.is_file() {
            contexts.push(Context::read(&file)?);
        }
    }
    contexts
        .into_iter()
        .filter(|c| drill.cells().iter().any(|name| name.as_str() == c.trust_domain.as_str()))
        .map(|c| Ok((c.trust_domain.to_string(), Cell::open(c, session.timeout)?)))
        .collect()
}

fn objectives(form: Form, sealed: &SealedReport) -> String {
    let mut table = Table::new("objective", &["objective", "target", "measured", "met"]);
    for o in &sealed.report.objectives {
        table.row(vec![json!(o.name), json!(o.target), json!(o.measured), json!(o.met)]);
    }
    match form {
        Form::Table => table.render(form),
        // One line, so that the last line of the output stays the last line.
        Form::Json => json!(sealed.report.objectives).to_string(),
    }
}

/// Every figure in one line, `key=value`, `-` where nothing was measured.
fn last_line(sealed: &SealedReport, file: &Path) -> String {
    let f = &sealed.report.figures;
    let text = |n: Option<u64>| n.map_or_else(|| "-".to_owned(), |n| n.to_string());
    let (writer, caller, ledger) = (f.writer.as_ref(), f.caller.as_ref(), f.ledger.as_ref());
    format!(
        "drill {}: {}; rto_writer_ms={} rto_caller_ms={} acked={} lost={} duplicated={} failed_calls={} failback_ms={} sealed={} report={}",
        sealed.report.drill,
        sealed.report.outcome,
        text(writer.and_then(|w| w.rto_ms)),
        text(caller.and_then(|c| c.rto_ms)),
        text(ledger.map(|l| l.acked)),
        text(ledger.map(|l| l.lost)),
        text(ledger.map(|l| l.duplicated)),
        text(caller.map(|c| c.failed)),
        text(caller.and_then(|c| c.failback_ms)),
        if sealed.seals() > 0 { "yes" } else { "no" },
        file.display(),
    )
}

fn names(cells: &[ClusterId]) -> String {
    cells.iter().map(ClusterId::as_str).collect::<Vec<_>>().join(", ")
}

fn verify_report(form: Form, file: &Path, roots: &[PathBuf], hex: &[String]) -> Result<Answer, Refusal> {
    let by_root = roots.iter().map(|root| super::trust::pinned(Some(root), None));
    let by_hex = hex.iter().map(|hex| super::trust::pinned(None, Some(hex)));
    let expected = by_root.chain(by_hex).collect::<Result<Vec<_>, _>>()?;
    let v = verify(&read_bounded(file, REPORT_BYTES_MAX)?, &expected)?;
    Ok(Answer::ok(verdict(form, &v)))
}

fn page(file: &Path, out: Option<PathBuf>) -> Result<Answer, Refusal> {
    let page = html::page(&read_bounded(file, REPORT_BYTES_MAX)?)?;
    let out = out.unwrap_or_else(|| file.with_extension("html"));
    std::fs::write(&out, page).map_err(|e| file_refusal(&out, &e))?;
    Ok(Answer::ok(format!(
        "{}: what the report says; its seal is checked by: ambit drill report verify",
        out.display()
    )))
}

fn verdict(form: Form, v: &Verified) -> String {
    let sealed = |s: &Sealer, vouched: bool| {
        json!({
            "trust_domain": s.trust_domain.as_str(), "fingerprint": hex::encode(s.fingerprint), "sealed": utc(s.sealed_ms),
            "index": s.index, "vouched": vouched,
        })
    };
    let known = v.sealers.iter().map(|s| sealed(s, true));
    let seals: Vec<_> = known.chain(v.unknown.iter().map(|s| sealed(s, false))).collect();
    if form == Form::Json {
        return pretty(&json!({
            "seals": seals, "drill": v.report.drill, "outcome": v.report.outcome, "objectives": v.report.objectives,
        }));
    }
    let mut out = String::new();
    for s in &v.sealers {
        out.push_str(&format!("signed by {}, root {}\n", s.trust_domain, hex::encode(s.fingerprint)));
        out.push_str(&format!("  sealed: {} at index {}\n", utc(s.sealed_ms), s.index));
    }
    for s in &v.unknown {
        let root = hex::encode(s.fingerprint);
        out.push_str(&format!("also sealed under root {root}, which nobody vouches for here ({})\n", s.trust_domain));
    }
    out.push_str(&format!("  drill: {} of {}, {}\n", v.report.drill, utc(v.report.started_ms), v.report.outcome));
    let samples = v.report.caller.len() + v.report.outside.len() + v.report.writer.len();
    out.push_str(&format!("  figures: follow from {samples} samples and {} writes", v.report.ledger.len()));
    out
}
