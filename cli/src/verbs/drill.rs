//! `ambit drill`.

use super::Session;
use crate::args::{Drill as DrillVerb, DrillRun, Report as ReportVerb};
use crate::ask;
use crate::cell::Cell;
use crate::context::{Context, read_bounded};
use crate::drill::guard::Cells;
use crate::drill::lab::Lab;
use crate::drill::report::{REPORT_BYTES_MAX, SealedReport, Verified, verify};
use crate::drill::spec::{Action, Drill, FILE_BYTES_MAX};
use crate::exit::{Exit, file_refusal};
use crate::output::{Answer, Form, Table, pretty};
use crate::when::utc;
use ambit_model::Refusal;
use ambit_proto::v1;
use serde_json::json;
use std::path::{Path, PathBuf};

pub(super) async fn run(session: &Session, verb: DrillVerb) -> Result<Answer, Refusal> {
    match verb {
        DrillVerb::Validate { file } => validate(session.form, &file),
        DrillVerb::Run(options) => run_drill(session, options).await,
        DrillVerb::Report(ReportVerb::Verify { file, root, fingerprint: hex }) => {
            verify_report(session.form, &file, root.as_deref(), hex.as_deref())
        }
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
    let mut out = format!("drill {} ({}): {}\n", drill.name, drill.owner, drill.hypothesis);
    out.push_str(&format!("  harms: {}; at most {} in all; seals at {}\n", fault.0, drill.length(), drill.seal_at));
    if let Some(w) = &drill.writer {
        out.push_str(&format!("  writes to {} every {}, each kept in a ledger\n", w.cell, w.every));
    }
    if let Some(c) = &drill.caller {
        out.push_str(&format!("  calls {} from {} every {}\n", c.target, c.pod, c.every));
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
    out.push_str("1 drill, valid");
    Ok(Answer::ok(out))
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
    // A path that cannot be written must be known before anything is killed.
    std::fs::write(&file, "").map_err(|e| file_refusal(&file, &e))?;
    let sealed = match crate::drill::run::run(&spec, &lab, &cells).await {
        Ok(sealed) => sealed,
        Err(refusal) => {
            // Nothing was measured; an empty file would look like a report.
            let _ = std::fs::remove_file(&file);
            return Err(refusal);
        }
    };
    std::fs::write(&file, sealed.text()?).map_err(|e| file_refusal(&file, &e))?;
    let exit = if sealed.report.outcome == "passed" && sealed.seal.is_some() { Exit::Ok } else { Exit::Failed };
    let text = format!("{}\n{}", objectives(session.form, &sealed), last_line(&sealed, &file));
    Ok(Answer::ok(text).ending(exit))
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
        if sealed.seal.is_some() { "yes" } else { "no" },
        file.display(),
    )
}

fn verify_report(form: Form, file: &Path, root: Option<&Path>, hex: Option<&str>) -> Result<Answer, Refusal> {
    let expected = super::trust::pinned(root, hex)?;
    let v = verify(&read_bounded(file, REPORT_BYTES_MAX)?, &expected)?;
    Ok(Answer::ok(verdict(form, &v)))
}

fn verdict(form: Form, v: &Verified) -> String {
    let fingerprint = hex::encode(v.fingerprint);
    match form {
        Form::Json => pretty(&json!({
            "trust_domain": v.trust_domain.as_str(), "fingerprint": fingerprint, "sealed": utc(v.sealed_ms), "index": v.index,
            "drill": v.report.drill, "outcome": v.report.outcome, "objectives": v.report.objectives,
        })),
        Form::Table => format!(
            "signed by {}, root {fingerprint}\n  sealed: {} at index {}\n  drill: {} of {}, {}\n  figures: follow from {} samples and {} writes",
            v.trust_domain,
            utc(v.sealed_ms),
            v.index,
            v.report.drill,
            utc(v.report.started_ms),
            v.report.outcome,
            v.report.caller.len() + v.report.writer.len(),
            v.report.ledger.len(),
        ),
    }
}
