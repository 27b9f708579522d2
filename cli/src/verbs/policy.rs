//! `ambit policy` and `ambit explain`.

use super::Session;
use crate::args::{Explain, Policy};
use crate::ask;
use crate::cell::request_id;
use crate::context::read_bounded;
use crate::exit::Exit;
use crate::output::{Answer, Form, Table, counted, pretty};
use ambit_model::Refusal;
use ambit_proto::v1;
use serde_json::{Value, json};
use std::path::Path;
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// How often `status --wait` asks; a policy takes a few hundred milliseconds to reach the kernels.
const WAIT_STEP: Duration = Duration::from_millis(50);

pub(super) async fn run(session: &Session, verb: Policy) -> Result<Answer, Refusal> {
    match verb {
        Policy::Lint { file } => lint(session.form, &file),
        Policy::Apply { file } => apply(session, &file).await,
        Policy::Delete { name, kind } => {
            let (cell, banner) = session.cell_to_change()?;
            let kind = if kind == "service" { "Service" } else { "Policy" }.to_owned();
            let request = v1::DeletePolicyRequest { request_id: request_id()?, kind, name };
            let reply = ask!(cell, PolicyRegistry.delete(request))?;
            Ok(applied(session.form, &reply).note(banner))
        }
        Policy::List => list(session).await,
        Policy::Status { wait } => status(session, wait).await,
        Policy::Explain(question) => explain(session, question).await,
    }
}

fn document_bytes(file: &Path) -> Result<String, Refusal> {
    read_bounded(file, ambit_policy::BYTES_MAX as u64)
}

fn lint(form: Form, file: &Path) -> Result<Answer, Refusal> {
    let documents = ambit_policy::parse(&document_bytes(file)?)?;
    let mut table = Table::new("object", &["kind", "name", "trust_domains"]);
    for document in &documents {
        let domains: Vec<String> = document.trust_domains().iter().map(ToString::to_string).collect();
        table.row(vec![json!(document.kind()), json!(document.name().as_str()), json!(domains)]);
    }
    Ok(Answer::ok(table.render(form)))
}

async fn apply(session: &Session, file: &Path) -> Result<Answer, Refusal> {
    let yaml = document_bytes(file)?;
    // What the cell would refuse anyway is refused here, without a request.
    ambit_policy::parse(&yaml)?;
    let (cell, banner) = session.cell_to_change()?;
    let request = v1::ApplyRequest { request_id: request_id()?, yaml };
    let reply = ask!(cell, PolicyRegistry.apply(request))?;
    Ok(applied(session.form, &reply).note(banner))
}

fn applied(form: Form, reply: &v1::ApplyResponse) -> Answer {
    let mut notes = Vec::new();
    for o in reply.objects.iter().filter(|o| !o.unresolved.is_empty()) {
        let kind = o.kind.to_lowercase();
        notes.push(format!(
            "warning: {kind} {} names {}, for which no peer vouches: that part matches nothing until one does",
            o.name,
            o.unresolved.join(", ")
        ));
    }
    let text = match form {
        Form::Json => {
            let object = |o: &v1::Applied| json!({"kind": o.kind, "name": o.name, "changed": o.changed, "unresolved": o.unresolved});
            pretty(&json!({
                "revision": reply.revision,
                "export_seq": reply.export_seq,
                "objects": reply.objects.iter().map(object).collect::<Vec<Value>>(),
            }))
        }
        Form::Table => {
            let line = |o: &v1::Applied| {
                format!("{} {}: {}\n", o.kind.to_lowercase(), o.name, if o.changed { "changed" } else { "unchanged" })
            };
            let mut text: String = reply.objects.iter().map(line).collect();
            text.push_str(&format!("{}, revision {}", counted(reply.objects.len(), "object"), reply.revision));
            text
        }
    };
    let mut answer = Answer::ok(text);
    answer.notes = notes;
    answer
}

async fn list(session: &Session) -> Result<Answer, Refusal> {
    let cell = session.cell()?;
    let reply = ask!(cell, PolicyRegistry.list(v1::ListPoliciesRequest {}))?;
    const COLUMNS: &[&str] =
        &["kind", "origin", "name", "action", "from", "target", "ports", "state", "written_by", "revision"];
    let mut table = Table::new("object", COLUMNS);
    for p in &reply.policies {
        let action = if p.action() == v1::Action::Deny { "deny" } else { "allow" };
        let state = if p.resolved { "resolved" } else { "unresolved" };
        table.row(vec![
            json!("policy"),
            json!(p.origin),
            json!(p.name),
            json!(action),
            json!(p.from),
            json!(p.target),
            json!(p.ports),
            json!(state),
            json!(p.written_by),
            json!(p.revision),
        ]);
    }
    for s in &reply.services {
        let target = format!("{}:{}", s.address, s.port);
        table.row(vec![
            json!("service"),
            json!(s.origin),
            json!(s.name),
            json!(null),
            json!(s.backends),
            json!(target),
            json!([s.port]),
            json!(null),
            json!(null),
            json!(null),
        ]);
    }
    Ok(Answer::ok(table.render(session.form)))
}

async fn status(session: &Session, wait: bool) -> Result<Answer, Refusal> {
    let cell = session.cell()?;
    let deadline = Instant::now() + session.timeout;
    loop {
        let reply = ask!(cell, PolicyRegistry.status(v1::PolicyStatusRequest::default()))?;
        let drifting = reply.agents.iter().filter(|a| !in_step(a)).count();
        if drifting > 0 && wait && Instant::now() < deadline {
            sleep(WAIT_STEP).await;
            continue;
        }
        return Ok(status_answer(session.form, &reply, drifting));
    }
}

pub(crate) fn in_step(agent: &v1::AgentRevision) -> bool {
    agent.connected && agent.applied >= agent.desired
}

fn status_answer(form: Form, reply: &v1::PolicyStatusResponse, drifting: usize) -> Answer {
    let mut table = Table::new("agent", &["node", "desired", "applied", "connected", "state", "imported"]);
    for a in &reply.agents {
        let imported: Vec<String> = a.imported.iter().map(|i| format!("{}:{}", i.origin, i.seq)).collect();
        let state = if in_step(a) { "in step" } else { "drift" };
        table.row(vec![
            json!(a.node),
            json!(a.desired),
            json!(a.applied),
            json!(a.connected),
            json!(state),
            json!(imported),
        ]);
    }
    let answer = Answer::ok(table.render(form)).note(format!("cell at revision {}", reply.revision));
    if drifting == 0 {
        answer
    } else {
        let line = format!("drift: {drifting} of {} not at the revision they should hold", reply.agents.len());
        answer.note(line).note("  try: ambit check").ending(Exit::Drift)
    }
}

pub(super) async fn explain(session: &Session, question: Explain) -> Result<Answer, Refusal> {
    let cell = session.cell()?;
    let request = v1::ExplainRequest {
        source: question.source,
        destination: question.destination.name,
        port: u32::from(question.destination.port),
    };
    let reply = ask!(cell, PolicyRegistry.explain(request.clone()))?;
    Ok(Answer::ok(explanation(session.form, &request, &reply)))
}

/// The question is answered either way, so the program ends 0 for a denial too; scripts read `allowed`.
fn explanation(form: Form, asked: &v1::ExplainRequest, reply: &v1::ExplainResponse) -> String {
    if form == Form::Json {
        return pretty(&json!({
            "source": asked.source, "destination": asked.destination, "port": asked.port, "allowed": reply.allowed,
            "rule": reply.rule, "reason": reply.reason, "nearest": reply.nearest, "revision": reply.revision,
        }));
    }
    let verdict = if reply.allowed { "allowed" } else { "denied" };
    let mut out = format!("{verdict}: {} -> {}:{}", asked.source, asked.destination, asked.port);
    for (name, text) in [("rule", &reply.rule), ("reason", &reply.reason), ("nearest", &reply.nearest)] {
        if !text.is_empty() {
            out.push_str(&format!("\n  {:9} {text}", format!("{name}:")));
        }
    }
    out.push_str(&format!("\n  revision: {}", reply.revision));
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drift_ends_five_and_says_how_many() {
        let agent = |node: &str, applied, connected| v1::AgentRevision {
            node: node.into(),
            desired: 9,
            applied,
            connected,
            imported: vec![v1::ImportedSeq { origin: "east".into(), seq: 3 }],
            address: String::new(),
        };
        for (agents, exit) in [
            (vec![agent("aa", 9, true)], Exit::Ok),
            (vec![agent("aa", 9, true), agent("bb", 8, true)], Exit::Drift),
            (vec![agent("aa", 9, false)], Exit::Drift),
        ] {
            let drifting = agents.iter().filter(|a| !in_step(a)).count();
            let reply = v1::PolicyStatusResponse { revision: 9, agents, imported: vec![] };
            let answer = status_answer(Form::Table, &reply, drifting);
            assert_eq!(answer.exit, exit, "{}", answer.text);
        }
    }

    #[test]
    fn an_unresolved_trust_domain_is_named() {
        let object =
            v1::Applied { kind: "Policy".into(), name: "p".into(), changed: true, unresolved: vec!["mars".into()] };
        let answer = applied(Form::Table, &v1::ApplyResponse { objects: vec![object], revision: 4, export_seq: 2 });
        assert_eq!(answer.text, "policy p: changed\n1 object, revision 4");
        assert!(answer.notes[0].contains("names mars"), "{:?}", answer.notes);
    }

    #[test]
    fn an_explanation_reads_as_an_answer() {
        let asked = v1::ExplainRequest { source: "spiffe://w/a".into(), destination: "spiffe://e/b".into(), port: 80 };
        let reply = v1::ExplainResponse {
            allowed: false,
            reason: "no policy allows it".into(),
            revision: 3,
            ..Default::default()
        };
        assert_eq!(
            explanation(Form::Table, &asked, &reply),
            "denied: spiffe://w/a -> spiffe://e/b:80\n  reason:   no policy allows it\n  revision: 3"
        );
    }
}
