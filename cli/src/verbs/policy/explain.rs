//! `ambit explain`: the verdict, what is behind it, and whether the nodes hold it.

use super::super::Session;
use super::{connection, in_step};
use crate::args::Explain;
use crate::ask;
use crate::output::{Answer, Form, counted, pretty};
use crate::when::{parse_utc, utc};
use ambit_model::{Code, Refusal};
use ambit_proto::v1;
use serde_json::{Value, json};

pub(in super::super) async fn explain(session: &Session, question: Explain) -> Result<Answer, Refusal> {
    let at = question.at.as_deref().map(|text| {
        let bad = || Refusal::new(Code::BadRequest, "a time as 2026-11-23T14:03:26Z", text);
        parse_utc(text).filter(|ms| *ms > 0).ok_or_else(bad)
    });
    let request = v1::ExplainRequest {
        source: question.source,
        destination: question.destination.name,
        port: u32::from(question.destination.port),
        at_ms: at.transpose()?.unwrap_or(0),
    };
    let cell = session.cell()?;
    let reply = ask!(cell, PolicyRegistry.explain(request.clone()))?;
    let judged = match &question.connection {
        None => None,
        Some(text) => {
            let asked = v1::ConnectionRequest {
                id: connection::id(text)?,
                source: request.source.clone(),
                destination: request.destination.clone(),
                port: request.port,
                local_only: false,
            };
            let found = ask!(cell, PolicyRegistry.connection(asked.clone()))?;
            Some((asked.id, found))
        }
    };
    Ok(Answer::ok(explanation(session.form, &request, &reply, judged.as_ref())))
}

/// A connection's id, and what nodes remember of it.
type Judged = (String, v1::ConnectionResponse);

/// The question is answered either way, so the program ends 0 for a denial too; scripts read `allowed`.
fn explanation(form: Form, asked: &v1::ExplainRequest, reply: &v1::ExplainResponse, judged: Option<&Judged>) -> String {
    if form == Form::Json {
        let mut json = json_of(asked, reply);
        if let (Some((id, found)), Some(fields)) = (judged, json.as_object_mut()) {
            fields.insert("connection".to_owned(), connection::json_of(id, found, reply));
        }
        return pretty(&json);
    }
    let verdict = if reply.allowed { "allowed" } else { "denied" };
    let mut out = format!("{verdict}: {} -> {}:{}", asked.source, asked.destination, asked.port);
    let lines = [
        ("at", if asked.at_ms == 0 { String::new() } else { utc(asked.at_ms) }),
        ("rule", rule(reply)),
        ("transport", transport(reply)),
        ("reason", reply.reason.clone()),
        ("audited", reply.audited.clone()),
        ("nearest", reply.nearest.clone()),
        ("source", reply.source.as_ref().map(party).unwrap_or_default()),
        ("target", reply.destination.as_ref().map(party).unwrap_or_default()),
        ("agents", if asked.at_ms == 0 { agents(reply) } else { String::new() }),
        ("revision", reply.revision.to_string()),
    ];
    for (name, text) in lines.iter().filter(|(_, text)| !text.is_empty()) {
        out.push_str(&format!("\n  {:10} {text}", format!("{name}:")));
    }
    if let Some((id, found)) = judged {
        out.push_str(&connection::text_of(id, found, reply));
    }
    out
}

/// Clear text is said in words wherever it is allowed.
fn transport(reply: &v1::ExplainResponse) -> String {
    match reply.transport.as_str() {
        "" => String::new(),
        transport => format!("{transport}: in clear text, carried by the agent"),
    }
}

fn rule(reply: &v1::ExplainResponse) -> String {
    let mut text = reply.rule.clone();
    if reply.written_revision > 0 {
        let by = if reply.written_by.is_empty() { "somebody" } else { reply.written_by.as_str() };
        text.push_str(&format!(", written by {by} at revision {}", reply.written_revision));
    }
    if reply.written_ms > 0 {
        text.push_str(&format!(", {}", utc(reply.written_ms)));
    }
    if reply.expires_at_ms > 0 {
        text.push_str(&format!(", until {}", utc(reply.expires_at_ms)));
    }
    text
}

fn party(party: &v1::Party) -> String {
    if party.entries.is_empty() && party.nodes.is_empty() {
        return "not known here: no entry gives it, and nothing of it runs".to_owned();
    }
    let entries = if party.entries.is_empty() { "of a peer".to_owned() } else { party.entries.join(", ") };
    let running = if party.nodes.is_empty() { "runs nowhere".to_owned() } else { counted(party.nodes.len(), "node") };
    format!("{entries}; cluster {}; {running}; number {}", party.clusters.join(", "), party.number)
}

/// Whether the nodes that run either end hold what was said, and how many of all do.
fn agents(reply: &v1::ExplainResponse) -> String {
    let all = format!("{} of {} in step", reply.agents_in_step, reply.agents_all);
    let late: Vec<String> = reply.agents.iter().filter(|agent| !in_step(agent)).map(late).collect();
    match (reply.agents.is_empty(), late.is_empty()) {
        (true, _) => format!("{all}; none of them runs either end"),
        (false, true) => format!("{all}, with {} that run either end", reply.agents.len()),
        (false, false) => format!("{all}; not where it counts: {}", late.join("; ")),
    }
}

fn late(agent: &v1::AgentRevision) -> String {
    let node: String = agent.node.chars().take(12).collect();
    match (agent.connected, agent.refused.is_empty()) {
        (false, _) => format!("node {node} is not connected"),
        (true, true) => format!("node {node} holds revision {} of {}", agent.applied, agent.desired),
        (true, false) => format!("node {node} refused it: {}", agent.refused),
    }
}

fn json_of(asked: &v1::ExplainRequest, reply: &v1::ExplainResponse) -> Value {
    let party = |p: &Option<v1::Party>| {
        let p = p.clone().unwrap_or_default();
        json!({"entries": p.entries, "clusters": p.clusters, "nodes": p.nodes, "number": p.number})
    };
    let agent = |a: &v1::AgentRevision| {
        json!({
            "node": a.node, "desired": a.desired, "applied": a.applied, "connected": a.connected, "refused": a.refused,
            "in_step": in_step(a),
        })
    };
    json!({
        "source": asked.source, "destination": asked.destination, "port": asked.port, "at": utc(asked.at_ms),
        "transport": reply.transport, "allowed": reply.allowed, "rule": reply.rule, "reason": reply.reason, "nearest": reply.nearest,
        "audited": reply.audited, "revision": reply.revision, "written_by": reply.written_by,
        "written_revision": reply.written_revision, "written_at": utc(reply.written_ms),
        "expires": utc(reply.expires_at_ms), "source_known": party(&reply.source),
        "destination_known": party(&reply.destination), "agents_all": reply.agents_all,
        "agents_in_step": reply.agents_in_step, "agents": reply.agents.iter().map(agent).collect::<Vec<Value>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_explanation_reads_as_an_answer() {
        let asked = v1::ExplainRequest {
            source: "spiffe://w/a".into(),
            destination: "spiffe://e/b".into(),
            port: 80,
            at_ms: 0,
        };
        let known =
            v1::Party { entries: vec!["a".into()], clusters: vec!["w".into()], nodes: vec!["n".into()], number: 256 };
        let agent = |node: &str, applied| v1::AgentRevision {
            node: node.into(),
            desired: 9,
            applied,
            connected: true,
            ..Default::default()
        };
        let reply = v1::ExplainResponse {
            rule: "e/open".into(),
            reason: "denied by policy".into(),
            revision: 9,
            written_by: "ann".into(),
            written_revision: 7,
            written_ms: 1_795_442_606_000,
            source: Some(known),
            destination: Some(v1::Party::default()),
            agents: vec![agent("aa", 9), agent("bb", 8)],
            agents_all: 3,
            agents_in_step: 2,
            ..Default::default()
        };
        assert_eq!(
            explanation(Form::Table, &asked, &reply, None),
            "denied: spiffe://w/a -> spiffe://e/b:80\n  rule:      e/open, written by ann at revision 7, 2026-11-23T14:03:26Z\n  \
             reason:    denied by policy\n  source:    a; cluster w; 1 node; number 256\n  target:    not known here: no entry \
             gives it, and nothing of it runs\n  agents:    2 of 3 in step; not where it counts: node bb holds revision 8 of \
             9\n  revision:  9"
        );
    }
}
