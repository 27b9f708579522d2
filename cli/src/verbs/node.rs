//! `ambit node`.

use super::Session;
use crate::args::Node;
use crate::ask;
use crate::cell::{Cell, request_id, seconds};
use crate::output::{Answer, Form, Table, pretty};
use crate::when::utc;
use ambit_model::{Code, NodeId, Refusal};
use ambit_proto::v1;
use serde_json::{Value, json};

/// A shorter prefix of a node id could be a slip of the hand.
const PREFIX_DIGITS_MIN: usize = 8;

pub(super) async fn run(session: &Session, verb: Node) -> Result<Answer, Refusal> {
    match verb {
        Node::Token { cluster, ttl } => token(session, cluster, seconds(ttl)?).await,
        Node::Allow { cluster, nodes } => allow(session, cluster, nodes).await,
        Node::List => {
            let cell = session.cell()?;
            let reply = ask!(cell, NodeAttestation.list_nodes(v1::ListNodesRequest {}))?;
            Ok(Answer::ok(table(&reply.nodes).render(session.form)))
        }
        Node::Explain { id } => explain(session, id.as_deref()).await,
        Node::Ban { id } => {
            let (cell, banner) = session.cell_to_change()?;
            let request = v1::NodeRef { request_id: request_id()?, id: full_id(&cell, &id).await? };
            let node = ask!(cell, NodeAttestation.ban_node(request))?;
            Ok(Answer::ok(table(&[node]).render_one(session.form)).note(banner))
        }
        Node::Evict { id } => {
            let (cell, banner) = session.cell_to_change()?;
            let request = v1::NodeRef { request_id: request_id()?, id: full_id(&cell, &id).await? };
            let node = ask!(cell, NodeAttestation.evict_node(request))?;
            Ok(Answer::ok(table(&[node]).render_one(session.form)).note(banner))
        }
    }
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

async fn allow(session: &Session, cluster: String, nodes: Vec<String>) -> Result<Answer, Refusal> {
    for node in &nodes {
        node.parse::<NodeId>()?;
    }
    let (cell, banner) = session.cell_to_change()?;
    let request = v1::AllowEkRequest { request_id: request_id()?, cluster, node_ids: nodes };
    let reply = ask!(cell, NodeAttestation.allow_ek(request))?;
    let text = match session.form {
        Form::Table => format!("{} EKs allowed", reply.allowed),
        Form::Json => pretty(&json!({"allowed": reply.allowed})),
    };
    Ok(Answer::ok(text).note(banner))
}

/// The one node whose id starts with `prefix`. A full id is passed on: the cell may know denials of a node that it
/// never admitted.
async fn full_id(cell: &Cell, prefix: &str) -> Result<String, Refusal> {
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

async fn explain(session: &Session, id: Option<&str>) -> Result<Answer, Refusal> {
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
            json!(n.state),
            json!(n.generation),
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
