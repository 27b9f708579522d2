//! `ambit drill list` and `ambit drill plan`: what there is, and what one would do here and now. Nothing is harmed.

use super::{cells, describe, names};
use crate::args::DrillPlan;
use crate::context::read_bounded;
use crate::drill::guard;
use crate::drill::lab::Lab;
use crate::drill::spec::{Drill, FILE_BYTES_MAX};
use crate::exit::{Exit, file_refusal};
use crate::output::{Answer, Form, Table, pretty};
use crate::verbs::Session;
use ambit_model::Refusal;
use serde_json::json;
use std::path::{Path, PathBuf};

/// Files of a folder that are looked at.
const FILES_MAX: usize = 1_000;

/// Every drill of a folder, also those that cannot be read: each with why.
pub(super) fn list(form: Form, folder: &Path) -> Result<Answer, Refusal> {
    let entries = std::fs::read_dir(folder).map_err(|e| file_refusal(folder, &e))?;
    let is_yaml = |path: &PathBuf| path.extension().is_some_and(|e| e == "yaml" || e == "yml");
    let mut files: Vec<PathBuf> = entries.flatten().map(|e| e.path()).filter(is_yaml).take(FILES_MAX).collect();
    files.sort();
    let mut table = Table::new("drill", &["drill", "owner", "harms", "fault", "longest", "file"]);
    let mut notes = Vec::new();
    for file in files {
        let drill = read_bounded(&file, FILE_BYTES_MAX).and_then(|text| text.parse::<Drill>());
        match drill {
            Ok(drill) => {
                let fault = drill.fault().map(|(fault, ..)| fault.to_string()).unwrap_or_default();
                let (harms, longest) = (names(&drill.clusters), drill.length().to_string());
                let file = file.display().to_string();
                table.row(vec![
                    json!(drill.name.as_str()),
                    json!(drill.owner),
                    json!(harms),
                    json!(fault),
                    json!(longest),
                    json!(file),
                ]);
            }
            Err(refusal) => notes.push(format!("{}: {refusal}", file.display())),
        }
    }
    let exit = if notes.is_empty() { Exit::Ok } else { Exit::Usage };
    let mut answer = Answer::ok(table.render(form)).ending(exit);
    answer.notes = notes;
    Ok(answer)
}

/// Whether it would run now, and what it would touch.
pub(super) async fn plan(session: &Session, options: DrillPlan) -> Result<Answer, Refusal> {
    let drill: Drill = read_bounded(&options.file, FILE_BYTES_MAX)?.parse()?;
    let lab = Lab::here(options.lab)?;
    let known = cells(session, &drill, &lab, &options.cells)?;
    let mut held = Vec::new();
    for precondition in &drill.preconditions {
        held.push(guard::one(precondition, &known).await);
    }
    // The lock is let go at once: a plan keeps no drill from running.
    held.push(lab.lock().map(|_held| format!("no other drill in lab {}", lab.name())));
    let order = match drill.fault() {
        Some((fault, ..)) => guard::order(fault, &known).await,
        None => Ok(None),
    };
    let target = order.map(|order| order.map(|order| format!("{} {}", order.action, order.target)));
    let would = held.iter().all(Result::is_ok) && target.is_ok();
    let exit = if would { Exit::Ok } else { Exit::Drift };
    if session.form == Form::Json {
        let conditions: Vec<_> = held
            .iter()
            .map(|held| match held {
                Ok(what) => json!({"holds": true, "what": what}),
                Err(refusal) => json!({"holds": false, "expected": refusal.expected, "found": refusal.found}),
            })
            .collect();
        let touches = target.as_ref().ok().cloned().flatten();
        let plan =
            json!({"drill": drill.name.as_str(), "would_run": would, "conditions": conditions, "touches": touches});
        return Ok(Answer::ok(pretty(&plan)).ending(exit));
    }
    let mut out = describe(&drill);
    match &target {
        Ok(Some(target)) => out.push_str(&format!("  touches now: {target}\n")),
        Ok(None) => {}
        Err(refusal) => out.push_str(&format!("  touches: not known ({refusal})\n")),
    }
    for held in &held {
        match held {
            Ok(what) => out.push_str(&format!("  holds: {what}\n")),
            Err(refusal) => out.push_str(&format!("  fails: expected {}, found {}\n", refusal.expected, refusal.found)),
        }
    }
    out.push_str(if would { "it would run" } else { "it would be refused (exit 5)" });
    Ok(Answer::ok(out).ending(exit))
}
