//! `ambit attest policy` verbs that talk to a cell.

use super::{read, read_lists, read_policy};
use crate::args::LearnPolicy;
use crate::ask;
use crate::cell::{Cell, request_id};
use crate::exit::{Exit, file_refusal};
use crate::output::{Answer, Table};
use crate::verbs::Session;
use crate::verbs::node::{full_id, instant};
use ambit_model::Refusal;
use ambit_policy::appraisal::to_yaml;
use ambit_proto::v1;
use serde_json::json;
use std::path::{Path, PathBuf};

/// Pieces in which an object is sent.
const CHUNK_BYTES: usize = 256 * 1024;

/// Sends the allow-lists, then the policy that names them.
pub(super) async fn apply(session: &Session, file: &Path, lists: &[PathBuf], staged: bool) -> Result<Answer, Refusal> {
    let yaml = to_yaml(&read_policy(file)?);
    let (cell, banner) = session.cell_to_change()?;
    send_lists(&cell, lists).await?;
    let request = v1::ApplyAppraisalPolicyRequest { request_id: request_id()?, yaml, staged };
    let policy = ask!(cell, Appraisal.apply_appraisal_policy(request))?;
    Ok(Answer::ok(table(&[policy]).render_one(session.form)).note(banner))
}

async fn send_lists(cell: &Cell, files: &[PathBuf]) -> Result<(), Refusal> {
    // Read and judged before anything is sent.
    read_lists(files)?;
    for file in files {
        let first = v1::BlobChunk { bytes: Vec::new(), keep: "allow-list".to_owned() };
        let bytes = read(file)?;
        let rest = bytes.chunks(CHUNK_BYTES).map(|c| v1::BlobChunk { bytes: c.to_vec(), keep: String::new() });
        let chunks = Chunks(std::iter::once(first).chain(rest).collect());
        ask!(cell, Appraisal.put_blob(chunks))?;
    }
    Ok(())
}

/// Chunks that can be sent again where a replica does not answer.
#[derive(Clone)]
struct Chunks(Vec<v1::BlobChunk>);

impl tonic::IntoStreamingRequest for Chunks {
    type Stream = tokio_stream::Iter<std::vec::IntoIter<v1::BlobChunk>>;
    type Message = v1::BlobChunk;
    fn into_streaming_request(self) -> tonic::Request<Self::Stream> {
        tonic::Request::new(tokio_stream::iter(self.0))
    }
}

pub(super) async fn list(session: &Session) -> Result<Answer, Refusal> {
    let cell = session.cell()?;
    let request = v1::ListAppraisalPoliciesRequest { name: String::new() };
    let reply = ask!(cell, Appraisal.list_appraisal_policies(request))?;
    Ok(Answer::ok(table(&reply.policies).render(session.form)))
}

pub(super) async fn show(session: &Session, name: String) -> Result<Answer, Refusal> {
    let cell = session.cell()?;
    let reply = ask!(cell, Appraisal.list_appraisal_policies(v1::ListAppraisalPoliciesRequest { name }))?;
    Ok(Answer::ok(reply.policies.first().map(|p| p.yaml.clone()).unwrap_or_default()))
}

pub(super) async fn promote(session: &Session, name: String) -> Result<Answer, Refusal> {
    let (cell, banner) = session.cell_to_change()?;
    let request = v1::AppraisalPolicyRef { request_id: request_id()?, name };
    let policy = ask!(cell, Appraisal.promote_appraisal_policy(request))?;
    Ok(Answer::ok(table(&[policy]).render_one(session.form)).note(banner))
}

pub(super) async fn delete(session: &Session, name: String) -> Result<Answer, Refusal> {
    let (cell, banner) = session.cell_to_change()?;
    let request = v1::AppraisalPolicyRef { request_id: request_id()?, name };
    let policy = ask!(cell, Appraisal.delete_appraisal_policy(request))?;
    Ok(Answer::ok(format!("policy {} removed", policy.name)).note(banner))
}

/// What the policy would say of the nodes' kept evidence. Nothing is changed, but the lists go to the cell.
pub(super) async fn test(
    session: &Session,
    file: &Path,
    lists: &[PathBuf],
    node: Option<&str>,
    at: Option<&str>,
) -> Result<Answer, Refusal> {
    let yaml = to_yaml(&read_policy(file)?);
    let cell = session.cell()?;
    send_lists(&cell, lists).await?;
    let node = match node {
        Some(prefix) => full_id(&cell, prefix).await?,
        None => String::new(),
    };
    let request = v1::TestAppraisalPolicyRequest { yaml, node, at_ms: at.map_or(Ok(0), instant)? };
    let reply = ask!(cell, Appraisal.test_appraisal_policy(request))?;
    const COLUMNS: &[&str] = &["node", "cluster", "verdict", "code", "diverged", "expected", "found"];
    let mut table = Table::new("node", COLUMNS);
    for n in &reply.nodes {
        let cells = [&n.node, &n.cluster, &n.verdict, &n.code, &n.diverged, &n.expected, &n.found];
        table.row(cells.into_iter().map(|c| json!(c)).collect());
    }
    let all = reply.nodes.iter().all(|n| n.verdict == "accepted");
    let answer = Answer::ok(table.render(session.form));
    Ok(if all { answer } else { answer.ending(Exit::Drift) })
}

/// A policy from a node's kept evidence.
pub(super) async fn learn(session: &Session, node: &str, options: &LearnPolicy) -> Result<Answer, Refusal> {
    let cell = session.cell()?;
    let request = v1::LearnAppraisalPolicyRequest { node: full_id(&cell, node).await?, name: options.name.clone() };
    let reply = ask!(cell, Appraisal.learn_appraisal_policy(request))?;
    match (&options.ima_list, reply.ima_list.is_empty()) {
        (Some(file), false) => std::fs::write(file, &reply.ima_list).map_err(|e| file_refusal(file, &e))?,
        (None, false) => {
            let expected = "--ima-list OUT: the files that were measured stand in a list of their own";
            return Err(Refusal::new(ambit_model::Code::BadRequest, expected, "none"));
        }
        (_, true) => {}
    }
    Ok(Answer::ok(reply.yaml))
}

fn table(policies: &[v1::AppraisalPolicyMessage]) -> Table {
    const COLUMNS: &[&str] =
        &["name", "version", "clusters", "nodes", "previous_version", "nodes_on_previous", "sha256"];
    let mut table = Table::new("policy", COLUMNS);
    for p in policies {
        let previous = if p.previous_version == 0 { json!("") } else { json!(p.previous_version) };
        let resting = if p.previous_version == 0 { json!("") } else { json!(p.nodes_on_previous) };
        table.row(vec![
            json!(p.name),
            json!(p.version),
            json!(p.clusters),
            json!(p.nodes),
            previous,
            resting,
            json!(p.sha256),
        ]);
    }
    table
}
