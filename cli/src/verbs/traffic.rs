//! `ambit cluster`: where calls to services go.

use super::Session;
use crate::args::Calls;
use crate::ask;
use crate::cell::request_id;
use crate::output::{Answer, Form, Table, pretty};
use crate::when::utc;
use ambit_model::{Code, Refusal};
use ambit_proto::v1;
use serde_json::{Value, json};

pub(super) async fn region(
    session: &Session,
    cluster: String,
    region: String,
    note: String,
) -> Result<Answer, Refusal> {
    let (cell, banner) = session.cell_to_change()?;
    let request = v1::SetRegionRequest { request_id: request_id()?, cluster, region, note };
    let reply = ask!(cell, Traffic.set_region(request))?;
    Ok(Answer::ok(shown(session.form, &reply)).note(banner))
}

pub(super) async fn show(session: &Session, cluster: String) -> Result<Answer, Refusal> {
    let cell = session.cell()?;
    let reply = ask!(cell, Traffic.show_cluster(v1::ShowClusterRequest { cluster }))?;
    Ok(Answer::ok(shown(session.form, &reply)))
}

pub(super) async fn drain(session: &Session, cluster: String, note: String, drained: bool) -> Result<Answer, Refusal> {
    let (cell, banner) = session.cell_to_change()?;
    let request = v1::ClusterWord { request_id: request_id()?, cluster, note };
    let reply = if drained {
        ask!(cell, Traffic.drain_cluster(request))?
    } else {
        ask!(cell, Traffic.undrain_cluster(request))?
    };
    Ok(Answer::ok(shown(session.form, &reply)).note(banner))
}

pub(super) async fn fail_over(session: &Session, calls: Calls, to: String, note: String) -> Result<Answer, Refusal> {
    let (services, from, all) = meant(calls)?;
    let (cell, banner) = session.cell_to_change()?;
    let request = v1::FailOverRequest { request_id: request_id()?, services, all, from, to, note };
    let reply = ask!(cell, Traffic.fail_over(request))?;
    Ok(Answer::ok(shown(session.form, &reply)).note(banner))
}

pub(super) async fn fail_back(session: &Session, calls: Calls, note: String) -> Result<Answer, Refusal> {
    let (services, from, all) = meant(calls)?;
    let (cell, banner) = session.cell_to_change()?;
    let request = v1::FailBackRequest { request_id: request_id()?, services, all, from, note };
    let reply = ask!(cell, Traffic.fail_back(request))?;
    Ok(Answer::ok(shown(session.form, &reply)).note(banner))
}

/// Services by name, and the cluster; or the cluster alone.
fn meant(Calls { of, all }: Calls) -> Result<(Vec<String>, String, bool), Refusal> {
    match (all, of.as_slice()) {
        (true, [from]) => Ok((Vec::new(), from.clone(), true)),
        (false, [service, from]) => Ok((vec![service.clone()], from.clone(), false)),
        (_, words) => {
            Err(Refusal::new(Code::BadRequest, "a service and a cluster, or --all and a cluster", words.join(" ")))
        }
    }
}

fn shown(form: Form, reply: &v1::ClusterTraffic) -> String {
    let mut one = Table::new("cluster", &["name", "trust_domain", "region", "drained"]);
    one.row(vec![json!(reply.cluster), json!(reply.trust_domain), json!(reply.region), json!(reply.drained)]);
    const COLUMNS: &[&str] =
        &["what", "in_force", "service", "to", "said_by", "everywhere", "version", "by", "when", "note"];
    let mut words = Table::new("word", COLUMNS);
    for word in &reply.words {
        words.row(vec![
            json!(word.kind),
            json!(word.in_force),
            json!(word.service),
            json!(word.to),
            json!(word.said_by),
            json!(word.everywhere),
            json!(word.version),
            json!(word.by),
            json!(utc(word.stamp_ms)),
            json!(word.note),
        ]);
    }
    match form {
        Form::Table if reply.words.is_empty() => one.render_one(form),
        Form::Table => format!("{}\n\n{}", one.render_one(form), words.render(form)),
        Form::Json => {
            let mut object = one.value_of_one();
            let list: Value = serde_json::from_str(&words.render(form)).unwrap_or_default();
            object.insert("words".into(), list);
            pretty(&Value::Object(object))
        }
    }
}
