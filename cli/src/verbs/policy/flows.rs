//! Who called whom.

use super::super::Session;
use crate::ask;
use crate::duration::Millis;
use crate::output::{Answer, Form, Table, counted, pretty};
use crate::when::utc;
use ambit_model::Refusal;
use ambit_proto::v1;
use serde_json::{Value, json};

/// As long as what was seen is kept.
const DAY_MS: u64 = 24 * 3600 * 1000;

/// `ambit policy flows`.
pub(super) async fn flows(session: &Session, limit: u32) -> Result<Answer, Refusal> {
    let reply = ask!(session.cell()?, PolicyRegistry.flows(v1::FlowsRequest { local_only: false, limit }))?;
    let shown = if session.form == Form::Json {
        let flow = |flow: &v1::SeenFlow| {
            let mut row = row(flow);
            row["rule"] = json!(flow.rule);
            row
        };
        let flows: Vec<Value> = reply.flows.iter().map(flow).collect();
        pretty(&json!({
            "flows": flows, "surplus": reply.surplus, "left_out": reply.left_out, "silent": reply.silent,
            "remembered_ms": reply.remembered_ms, "connections": reply.connections, "ruled": reply.ruled,
        }))
    } else {
        seen_table(session.form, &reply.flows)
    };
    let mut answer = Answer::ok(shown);
    if reply.connections > 0 {
        answer = answer.note(coverage(reply.ruled, reply.connections));
    }
    if reply.surplus > 0 {
        answer = answer.note(format!("{} older ones are not shown (--limit)", reply.surplus));
    }
    let missing = missing(reply.left_out, &reply.silent, DAY_MS.saturating_sub(reply.remembered_ms));
    Ok(if missing.is_empty() { answer } else { answer.note(missing) })
}

/// How much of what was seen policies speak of, allowing or denying it.
fn coverage(ruled: u64, connections: u64) -> String {
    // Rounded down: all is said of all only.
    let permille = u128::from(ruled) * 1000 / u128::from(connections.max(1));
    let all = counted(usize::try_from(connections).unwrap_or(usize::MAX), "connection");
    format!(
        "of {all} policies speak of {ruled} ({}.{} %); `-` is refused because none does",
        permille / 10,
        permille % 10
    )
}

/// What is not known of what was seen; `unknown_ms` of the time in question no replica remembers in full.
pub(super) fn missing(left_out: u64, silent: &[u64], unknown_ms: u64) -> String {
    let mut words = Vec::new();
    // Less than a minute of a day is no gap.
    if unknown_ms > 60_000 {
        let unknown = Millis(unknown_ms / 60_000 * 60_000);
        words.push(format!("of the first {unknown} of that time a replica knows nothing: it was started since"));
    }
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

/// What became of them, and by what they would be judged now.
fn seen_table(form: Form, flows: &[v1::SeenFlow]) -> String {
    let columns = &["source", "destination", "port", "verdict", "times", "last", "rule"];
    let mut table = Table::new("flow", columns);
    for flow in flows {
        let mut cells = cells(flow);
        cells.push(json!(if flow.rule.is_empty() { "-" } else { &flow.rule }));
        table.row(cells);
    }
    table.render(form)
}

fn cells(flow: &v1::SeenFlow) -> Vec<Value> {
    let verdict = if flow.allowed { "allowed" } else { "denied" };
    vec![
        json!(flow.source),
        json!(flow.destination),
        json!(flow.port),
        json!(verdict),
        json!(flow.times),
        json!(utc(flow.last_ms)),
    ]
}

/// One below the other, with what would become of them.
pub(super) fn table(form: Form, flows: &[v1::SeenFlow]) -> String {
    let mut table = Table::new("flow", &["source", "destination", "port", "judged", "times", "last"]);
    flows.iter().for_each(|flow| table.row(cells(flow)));
    table.render(form)
}

/// What becomes of connections that were seen.
pub(super) fn flips_text(plan: &v1::PlanResponse) -> String {
    let of = |count: u64| counted(usize::try_from(count).unwrap_or(usize::MAX), "flow");
    let missing = missing(plan.seen_left_out, &plan.seen_silent, 0);
    let missing = if missing.is_empty() { missing } else { format!(" ({missing})") };
    format!("of {} seen in the last day, {} would be judged otherwise{missing}", of(plan.seen_all), plan.seen_flips)
}
