//! Who called whom.

use super::super::Session;
use crate::ask;
use crate::output::{Answer, Form, Table, counted, pretty};
use crate::when::utc;
use ambit_model::Refusal;
use ambit_proto::v1;
use serde_json::{Value, json};

/// `ambit policy flows`.
pub(super) async fn flows(session: &Session, limit: u32) -> Result<Answer, Refusal> {
    let reply = ask!(session.cell()?, PolicyRegistry.flows(v1::FlowsRequest { local_only: false, limit }))?;
    let shown = if session.form == Form::Json {
        let flows: Vec<Value> = reply.flows.iter().map(row).collect();
        pretty(&json!({"flows": flows, "surplus": reply.surplus, "left_out": reply.left_out, "silent": reply.silent}))
    } else {
        table(session.form, &reply.flows, SEEN)
    };
    let mut answer = Answer::ok(shown);
    if reply.surplus > 0 {
        answer = answer.note(format!("{} older ones are not shown (--limit)", reply.surplus));
    }
    let missing = missing(reply.left_out, &reply.silent);
    Ok(if missing.is_empty() { answer } else { answer.note(missing) })
}

/// What is not known of what was seen.
fn missing(left_out: u64, silent: &[u64]) -> String {
    let mut words = Vec::new();
    if left_out > 0 {
        words.push(format!("there was no room to tell of {left_out} connections"));
    }
    if !silent.is_empty() {
        let silent: Vec<String> = silent.iter().map(ToString::to_string).collect();
        words.push(format!("what nodes told replica {} is missing: no answer", silent.join(", ")));
    }
    words.join("; ")
}

/// One as JSON.
pub(super) fn row(flow: &v1::SeenFlow) -> Value {
    json!({
        "source": flow.source, "destination": flow.destination, "port": flow.port, "allowed": flow.allowed,
        "times": flow.times, "last": utc(flow.last_ms),
    })
}

/// What became of them.
pub(super) const SEEN: &[&str] = &["source", "destination", "port", "verdict", "times", "last"];
/// What would become of them.
pub(super) const JUDGED: &[&str] = &["source", "destination", "port", "judged", "times", "last"];

/// One below the other.
pub(super) fn table(form: Form, flows: &[v1::SeenFlow], columns: &'static [&'static str]) -> String {
    let mut table = Table::new("flow", columns);
    for flow in flows {
        let verdict = if flow.allowed { "allowed" } else { "denied" };
        let (port, times) = (json!(flow.port), json!(flow.times));
        table.row(vec![
            json!(flow.source),
            json!(flow.destination),
            port,
            json!(verdict),
            times,
            json!(utc(flow.last_ms)),
        ]);
    }
    table.render(form)
}

/// What becomes of connections that were seen.
pub(super) fn flips_text(plan: &v1::PlanResponse) -> String {
    let of = |count: u64| counted(usize::try_from(count).unwrap_or(usize::MAX), "flow");
    let missing = missing(plan.seen_left_out, &plan.seen_silent);
    let missing = if missing.is_empty() { missing } else { format!(" ({missing})") };
    format!("of {} seen in the last day, {} would be judged otherwise{missing}", of(plan.seen_all), plan.seen_flips)
}
