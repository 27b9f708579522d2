//! `ambit policy` and `ambit explain`.

mod connection;
mod explain;
mod flows;
mod offline;
mod plan;
mod questions;

pub(super) use explain::explain;

use super::Session;
use crate::args::{MaxFlips, Policy, Reached};
use crate::ask;
use crate::cell::{Cell, request_id};
use crate::exit::Exit;
use crate::output::{Answer, Form, Table, counted, pretty};
use crate::when::utc;
use ambit_model::{Code, Refusal};
use ambit_proto::v1;
use serde_json::{Value, json};
use std::path::Path;
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// How often `status --wait` asks; a policy takes a few hundred milliseconds to reach the kernels.
const WAIT_STEP: Duration = Duration::from_millis(50);
/// How often a change is planned anew because another one came between plan and change.
const PLANS_MAX: u32 = 5;

pub(super) async fn run(session: &Session, verb: Policy) -> Result<Answer, Refusal> {
    match verb {
        Policy::Lint { file } => offline::lint(session.form, &file),
        Policy::Test { file, policies } => offline::test(session.form, &file, &policies),
        Policy::Plan { file, delete, kind, rollback, reach } => {
            let request = match (file, delete, rollback) {
                (Some(file), _, _) => v1::PlanRequest { yaml: read(&file)?.0, ..Default::default() },
                (None, Some(name), _) => deletion(&kind, &name),
                (None, None, to) => v1::PlanRequest { rollback_to: to.unwrap_or_default(), ..Default::default() },
            };
            plan::plan(session, request, reach.max_flips).await
        }
        Policy::Apply { file, reach } => apply(session, &file, &reach).await,
        Policy::Delete { name, kind, reach } => {
            let (kind_word, to_delete) = (kind_word(&kind), deletion(&kind, &name));
            guarded(session, to_delete, &reach, async |cell, over, unlimited| {
                let (kind, name) = (kind_word.to_owned(), name.clone());
                let request = v1::DeletePolicyRequest { request_id: request_id()?, kind, name, over, unlimited };
                ask!(cell, PolicyRegistry.delete(request))
            })
            .await
        }
        Policy::Rollback { revision, reach } => {
            let back = v1::PlanRequest { rollback_to: revision, ..Default::default() };
            guarded(session, back, &reach, async |cell, over, unlimited| {
                let request = v1::RollbackRequest { request_id: request_id()?, revision, over, unlimited };
                ask!(cell, PolicyRegistry.rollback(request))
            })
            .await
        }
        Policy::List => list(session).await,
        Policy::Status { wait } => status(session, wait).await,
        Policy::WhoCan { destination } => questions::who_can(session, &destination).await,
        Policy::Flows { limit } => flows::flows(session, limit).await,
        Policy::Unused { within } => questions::unused(session, within).await,
        Policy::History { limit } => questions::history(session, limit).await,
        Policy::Explain(question) => explain(session, question).await,
    }
}

fn kind_word(kind: &str) -> &'static str {
    match kind {
        "service" => "Service",
        "group" => "Group",
        "egress" => "Egress",
        _ => "Policy",
    }
}

fn deletion(kind: &str, name: &str) -> v1::PlanRequest {
    let delete = vec![v1::DocumentName { kind: kind_word(kind).to_owned(), name: name.to_owned() }];
    v1::PlanRequest { delete, ..Default::default() }
}

/// A file of documents, checked, and what to say of it.
fn read(file: &Path) -> Result<(String, Vec<String>), Refusal> {
    let text = offline::text_of(file)?;
    // What the cell would refuse anyway is refused here, without a request.
    let documents = offline::documents_of(file, &text)?;
    documents.iter().try_for_each(ambit_policy::check_enforceable)?;
    Ok((text, offline::findings(&documents)))
}

async fn apply(session: &Session, file: &Path, reach: &Reached) -> Result<Answer, Refusal> {
    let (yaml, findings) = read(file)?;
    let wanted = v1::PlanRequest { yaml: yaml.clone(), ..Default::default() };
    // Nothing to apply is nothing to plan; the cell says so.
    let done = guarded(session, wanted, reach, async |cell, over, unlimited| {
        let request = v1::ApplyRequest { request_id: request_id()?, yaml: yaml.clone(), over, unlimited };
        ask!(cell, PolicyRegistry.apply(request))
    });
    let mut answer = done.await?;
    answer.notes.extend(findings);
    Ok(answer)
}

/// Makes a change whose plan is below the limit, over exactly what it was planned over. Without a limit it is made at once: in
/// an emergency neither a plan that takes long nor somebody else's change comes between.
async fn guarded(
    session: &Session,
    wanted: v1::PlanRequest,
    reach: &Reached,
    change: impl AsyncFn(&Cell, Option<u64>, bool) -> Result<v1::ApplyResponse, Refusal>,
) -> Result<Answer, Refusal> {
    let (cell, banner) = session.cell_to_change()?;
    let MaxFlips::Pairs(flips_max) = reach.max_flips else {
        return Ok(applied(session.form, &change(&cell, None, true).await?).note(banner));
    };
    let empty = wanted.delete.is_empty() && wanted.rollback_to == 0 && wanted.yaml.trim().is_empty();
    let mut plans = 0;
    loop {
        let plan = if empty { v1::PlanResponse::default() } else { plan::planned(&cell, wanted.clone()).await? };
        plan::within(&plan, flips_max)?;
        plans += 1;
        match change(&cell, Some(plan.over).filter(|_| !empty), false).await {
            // Somebody else's change came first: what this one does is another thing now.
            Err(refusal) if refusal.code == Code::StaleRevision && plans < PLANS_MAX => continue,
            done => {
                let answer = applied(session.form, &done?).note(banner);
                return Ok(if plan.flips.is_empty() { answer } else { answer.note(plan::summary(&plan)) });
            }
        }
    }
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

/// As documents write it.
pub(crate) fn action(p: &v1::Policy) -> &'static str {
    match p.action() {
        v1::Action::Allow => "allow",
        v1::Action::Deny => "deny",
        v1::Action::Audit => "audit",
        v1::Action::Unspecified => "unknown",
    }
}

fn ends(p: &v1::Policy) -> String {
    if p.expires_at_ms == 0 { String::new() } else { utc(p.expires_at_ms) }
}

/// Callers as documents write them: sets of identities, or ranges of addresses.
pub(crate) fn callers(p: &v1::Policy) -> Vec<String> {
    p.from.iter().cloned().chain(p.unmeshed.iter().map(|range| format!("cidr:{range}"))).collect()
}

/// One policy as JSON.
fn policy_row(p: &v1::Policy) -> Value {
    json!({
        "origin": p.origin, "name": p.name, "action": action(p), "from": callers(p), "target": p.target, "ports": p.ports,
        "protocols": p.protocols, "transport": p.transport, "expires": ends(p), "written_by": p.written_by, "revision": p.revision,
    })
}

/// One egress document as JSON.
pub(crate) fn egress_row(e: &v1::Egress) -> Value {
    let expires = if e.expires_at_ms == 0 { String::new() } else { utc(e.expires_at_ms) };
    json!({
        "name": e.name, "from": e.from, "to": e.to, "ports": e.ports, "protocols": e.protocols, "transport": e.transport,
        "expires": expires, "written_by": e.written_by, "revision": e.revision,
    })
}

async fn list(session: &Session) -> Result<Answer, Refusal> {
    let cell = session.cell()?;
    let reply = ask!(cell, PolicyRegistry.list(v1::ListPoliciesRequest {}))?;
    const COLUMNS: &[&str] =
        &["kind", "origin", "name", "action", "from", "target", "ports", "state", "expires", "written_by", "revision"];
    let mut table = Table::new("object", COLUMNS);
    for p in &reply.policies {
        let over = p.expires_at_ms != 0 && p.expires_at_ms <= crate::when::now_ms();
        let state = match (over, p.resolved) {
            (true, _) => "over",
            (false, true) => "resolved",
            (false, false) => "unresolved",
        };
        table.row(vec![
            json!("policy"),
            json!(p.origin),
            json!(p.name),
            json!(if p.transport.is_empty() {
                action(p).to_owned()
            } else {
                format!("{}, {}", action(p), p.transport)
            }),
            json!(callers(p)),
            json!(p.target),
            json!(p.ports),
            json!(state),
            json!(ends(p)),
            json!(p.written_by),
            json!(p.revision),
        ]);
    }
    let null = || json!(null);
    for s in &reply.services {
        let target = match s.address.parse::<std::net::Ipv6Addr>() {
            Ok(address) => format!("[{address}]:{}", s.port),
            Err(_) => format!("{}:{}", s.address, s.port),
        };
        let (origin, name, backends, ports) = (json!(s.origin), json!(s.name), json!(s.backends), json!([s.port]));
        table.row(vec![
            json!("service"),
            origin,
            name,
            null(),
            backends,
            json!(target),
            ports,
            null(),
            null(),
            null(),
            null(),
        ]);
    }
    for e in &reply.egress {
        let over = e.expires_at_ms != 0 && e.expires_at_ms <= crate::when::now_ms();
        let expires = if e.expires_at_ms == 0 { String::new() } else { utc(e.expires_at_ms) };
        table.row(vec![
            json!("egress"),
            null(),
            json!(e.name),
            json!(e.transport),
            json!(e.from),
            json!(e.to),
            json!(e.ports),
            json!(if over { "over" } else { "resolved" }),
            json!(expires),
            json!(e.written_by),
            json!(e.revision),
        ]);
    }
    for g in &reply.groups {
        let (origin, name, members) = (json!(g.origin), json!(g.name), json!(g.members));
        let (by, revision) = (json!(g.written_by), json!(g.revision));
        table.row(vec![json!("group"), origin, name, null(), members, null(), null(), null(), null(), by, revision]);
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
    let mut table = Table::new("agent", &["node", "desired", "applied", "connected", "state", "imported", "refused"]);
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
            json!(a.refused),
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
            ..Default::default()
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
}
