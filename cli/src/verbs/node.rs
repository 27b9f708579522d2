//! `ambit node`.

use super::Session;
use crate::args::{Node, Selected};
use crate::ask;
use crate::cell::{Cell, request_id, seconds};
use crate::context::read_bounded;
use crate::output::{Answer, Form, Table, pretty};
use crate::when::utc;
use ambit_model::{Code, NodeId, Refusal};
use ambit_proto::v1;
use serde_json::{Value, json};
use std::path::Path;

/// A shorter prefix of a node id could be a slip of the hand.
const PREFIX_DIGITS_MIN: usize = 8;
/// A list of a hundred thousand EKs with their names.
const CSV_BYTES_MAX: u64 = 16 * 1024 * 1024;
/// EKs in one call.
const EKS_PER_CALL: usize = 5_000;

pub(super) async fn run(session: &Session, verb: Node) -> Result<Answer, Refusal> {
    match verb {
        Node::Token { cluster, ttl } => token(session, cluster, seconds(ttl)?).await,
        Node::Allow { cluster, nodes, csv } => allow(session, cluster, nodes, csv.as_deref()).await,
        Node::Disallow { cluster, nodes } => disallow(session, cluster, nodes).await,
        Node::List => {
            let cell = session.cell()?;
            let reply = ask!(cell, NodeAttestation.list_nodes(v1::ListNodesRequest {}))?;
            Ok(Answer::ok(table(&reply.nodes).render(session.form)))
        }
        Node::Explain { id } => explain(session, id.as_deref()).await,
        Node::Attest { id, at } => attest(session, &id, at.as_deref()).await,
        Node::Result(claimed) => super::result::run(session, claimed).await,
        Node::Ban(selected) => {
            let (cell, banner, request) = selection(session, selected).await?;
            changed(session, banner, ask!(cell, NodeAttestation.ban_node(request))?)
        }
        Node::Unban(selected) => {
            let (cell, banner, request) = selection(session, selected).await?;
            changed(session, banner, ask!(cell, NodeAttestation.unban_node(request))?)
        }
        Node::Quarantine(selected) => {
            let (cell, banner, request) = selection(session, selected).await?;
            changed(session, banner, ask!(cell, NodeAttestation.quarantine_node(request))?)
        }
        Node::Release(selected) => {
            let (cell, banner, request) = selection(session, selected).await?;
            changed(session, banner, ask!(cell, NodeAttestation.release_node(request))?)
        }
        Node::Evict(selected) => {
            let (cell, banner, request) = selection(session, selected).await?;
            changed(session, banner, ask!(cell, NodeAttestation.evict_node(request))?)
        }
    }
}

async fn selection(session: &Session, selected: Selected) -> Result<(Cell, String, v1::NodeSelection), Refusal> {
    let (cell, banner) = session.cell_to_change()?;
    let mut ids = Vec::new();
    for id in &selected.ids {
        ids.push(full_id(&cell, id).await?);
    }
    let cluster = selected.cluster.unwrap_or_default();
    Ok((cell, banner, v1::NodeSelection { request_id: request_id()?, ids, cluster }))
}

fn changed(session: &Session, banner: String, reply: v1::ListNodesResponse) -> Result<Answer, Refusal> {
    let table = table(&reply.nodes);
    let text = if reply.nodes.len() == 1 { table.render_one(session.form) } else { table.render(session.form) };
    Ok(Answer::ok(text).note(banner))
}

async fn attest(session: &Session, id: &str, at: Option<&str>) -> Result<Answer, Refusal> {
    let cell = session.cell()?;
    let at_ms = at.map_or(Ok(0), instant)?;
    let request = v1::AttestationAtRequest { id: full_id(&cell, id).await?, at_ms };
    let reply = ask!(cell, NodeAttestation.attestation_at(request))?;
    const COLUMNS: &[&str] = &[
        "node",
        "state",
        "code",
        "policy",
        "since",
        "until",
        "verdicts",
        "diverged",
        "expected",
        "found",
        "evidence",
        "evidence_kept",
    ];
    let mut table = Table::new("verdict", COLUMNS);
    let policy =
        if reply.policy.is_empty() { String::new() } else { format!("{}@{}", reply.policy, reply.policy_version) };
    table.row(vec![
        json!(reply.node),
        json!(reply.state),
        json!(reply.code),
        json!(policy),
        json!(utc(reply.since_ms)),
        json!(utc(reply.until_ms)),
        json!(reply.verdicts),
        json!(reply.diverged),
        json!(reply.expected),
        json!(reply.found),
        json!(reply.evidence_sha256),
        json!(reply.evidence_kept),
    ]);
    Ok(Answer::ok(table.render_one(session.form)))
}

/// A point in time, or how long ago.
pub(super) fn instant(text: &str) -> Result<u64, Refusal> {
    if let Ok(ago) = text.parse::<crate::duration::Millis>() {
        return Ok(crate::when::now_ms().saturating_sub(u64::try_from(ago.duration().as_millis()).unwrap_or(u64::MAX)));
    }
    crate::when::parse_utc(text)
        .ok_or_else(|| Refusal::new(Code::BadRequest, "2026-11-23T14:03:26Z, or how long ago such as 90s or 2h", text))
}

async fn token(session: &Session, cluster: String, ttl_seconds: u32) -> Result<Answer, Refusal> {
    let (cell, banner) = session.cell_to_change()?;
    let request = v1::CreateJoinTokenRequest { request_id: request_id()?, cluster, ttl_seconds };
    let reply = ask!(cell, NodeAttestation.create_join_token(request))?;
    let text = match session.form {
        Form::Table => reply.token,
        Form::Json => pretty(&json!({"token": reply.token})),
    };
    Ok(Answer::ok(text).note(banner))
}

async fn allow(
    session: &Session,
    cluster: String,
    mut nodes: Vec<String>,
    csv: Option<&Path>,
) -> Result<Answer, Refusal> {
    for node in &nodes {
        node.parse::<NodeId>()?;
    }
    if let Some(file) = csv {
        let text = read_bounded(file, CSV_BYTES_MAX)?;
        nodes.extend(ambit_verify::ek::list::parse(&text)?.into_iter().map(|(node, _)| node.to_string()));
    }
    let (cell, banner) = session.cell_to_change()?;
    let mut allowed = 0;
    for some in nodes.chunks(EKS_PER_CALL) {
        let request =
            v1::AllowEkRequest { request_id: request_id()?, cluster: cluster.clone(), node_ids: some.to_vec() };
        allowed += ask!(cell, NodeAttestation.allow_ek(request))?.allowed;
    }
    Ok(counted_eks(session, banner, "allowed", allowed))
}

async fn disallow(session: &Session, cluster: String, nodes: Vec<String>) -> Result<Answer, Refusal> {
    for node in &nodes {
        node.parse::<NodeId>()?;
    }
    let (cell, banner) = session.cell_to_change()?;
    let request = v1::AllowEkRequest { request_id: request_id()?, cluster, node_ids: nodes };
    let reply = ask!(cell, NodeAttestation.disallow_ek(request))?;
    Ok(counted_eks(session, banner, "disallowed", reply.allowed))
}

fn counted_eks(session: &Session, banner: String, done: &str, count: u32) -> Answer {
    let text = match session.form {
        Form::Table => format!("{count} EKs {done}"),
        Form::Json => pretty(&json!({done: count})),
    };
    Answer::ok(text).note(banner)
}

/// The one node whose id starts with `prefix`. A full id is passed on: the cell may know denials of a node that it
/// never admitted.
pub(super) async fn full_id(cell: &Cell, prefix: &str) -> Result<String, Refusal> {
    if prefix.parse::<NodeId>().is_ok() {
        return Ok(prefix.to_owned());
    }
    if prefix.len() < PREFIX_DIGITS_MIN {
        return Err(Refusal::new(Code::BadRequest, "a node id, or its first 8 digits or more", prefix));
    }
    let reply = ask!(cell, NodeAttestation.list_nodes(v1::ListNodesRequest {}))?;
    let mut fitting = reply.nodes.into_iter().filter(|n| n.id.starts_with(prefix)).map(|n| n.id);
    match (fitting.next(), fitting.next()) {
        (Some(id), None) => Ok(id),
        (None, _) => Err(Refusal::new(Code::NotFound, "a node of this cell", prefix)),
        (Some(_), Some(_)) => {
            Err(Refusal::new(Code::BadRequest, "the start of one node id", format!("{prefix}, of several")))
        }
    }
}

pub(super) async fn explain(session: &Session, id: Option<&str>) -> Result<Answer, Refusal> {
    let cell = session.cell()?;
    let id = match id {
        Some(id) => full_id(&cell, id).await?,
        None => String::new(),
    };
    let reply = ask!(cell, NodeAttestation.explain_node(v1::ExplainNodeRequest { id: id.clone() }))?;
    Ok(Answer::ok(explanation(session.form, &reply)))
}

fn explanation(form: Form, reply: &v1::ExplainNodeResponse) -> String {
    if form == Form::Json {
        let denials: Vec<Value> = reply.denials.iter().map(denial_json).collect();
        let result: Value = serde_json::from_str(&reply.attestation_result_json).unwrap_or(Value::Null);
        let node = reply.node.as_ref().map(|n| table(std::slice::from_ref(n)).render_one(Form::Json));
        let node: Value = node.and_then(|n| serde_json::from_str(&n).ok()).unwrap_or(Value::Null);
        return pretty(&json!({"node": node, "denials": denials, "attestation_result": result}));
    }
    let mut out = match &reply.node {
        Some(node) => table(std::slice::from_ref(node)).render_one(Form::Table),
        None => "not admitted".to_owned(),
    };
    if !reply.attestation_result_json.is_empty() {
        out.push_str("\nattestation result: ");
        out.push_str(&reply.attestation_result_json);
    }
    for d in &reply.denials {
        out.push_str(&format!("\n\n{} denied [{}]\n  node:     {}", utc(d.stamp_ms), d.code, d.node));
        for (name, text) in
            [("diverged", &d.diverged), ("expected", &d.expected), ("found", &d.found), ("try", &d.remedy)]
        {
            if !text.is_empty() {
                out.push_str(&format!("\n  {:9} {text}", format!("{name}:")));
            }
        }
    }
    out.push_str(&format!("\n\n{}", crate::output::counted(reply.denials.len(), "denial")));
    out
}

fn denial_json(d: &v1::DenialRecord) -> Value {
    json!({"at": utc(d.stamp_ms), "code": d.code, "diverged": d.diverged, "expected": d.expected, "found": d.found,
           "remedy": d.remedy})
}

pub(super) fn table(nodes: &[v1::Node]) -> Table {
    const COLUMNS: &[&str] = &[
        "id",
        "cluster",
        "state",
        "generation",
        "code",
        "policy",
        "ek_class",
        "address",
        "last_verdict",
        "applied_revision",
        "connected",
    ];
    let mut table = Table::new("node", COLUMNS);
    for n in nodes {
        table.row(vec![
            json!(n.id),
            json!(n.cluster),
            json!(if n.late { "late" } else { n.state.as_str() }),
            json!(n.generation),
            json!(n.code),
            json!(n.policy),
            json!(n.ek_class),
            json!(n.address),
            json!(utc(n.last_verdict_ms)),
            json!(n.applied_revision),
            json!(n.connected),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_denial_shows_what_an_operator_needs() {
        let denial = v1::DenialRecord {
            stamp_ms: 1_000_000,
            node: "aa".into(),
            code: "boot_log_event_altered".into(),
            diverged: "event 17 in PCR 4".into(),
            expected: "a1b2".into(),
            found: "c3d4".into(),
            remedy: "investigate".into(),
        };
        let reply =
            v1::ExplainNodeResponse { node: None, denials: vec![denial], attestation_result_json: String::new() };
        assert_eq!(
            explanation(Form::Table, &reply),
            "not admitted\n\n1970-01-01T00:16:40Z denied [boot_log_event_altered]\n  node:     aa\n  \
             diverged: event 17 in PCR 4\n  expected: a1b2\n  found:    c3d4\n  try:      investigate\n\n1 denial"
        );
        let value: Value = serde_json::from_str(&explanation(Form::Json, &reply)).unwrap();
        assert_eq!(value["denials"][0]["found"], "c3d4");
    }
}
