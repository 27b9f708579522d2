//! `ambit deny` and `ambit svid revoke`.

use super::Session;
use crate::args::{Deny, SvidRevoke};
use crate::ask;
use crate::cell::request_id;
use crate::output::{Answer, Table};
use crate::when::utc;
use ambit_model::{Code, Refusal, SpiffeId};
use ambit_proto::v1;
use serde_json::json;

pub(super) async fn run(session: &Session, verb: Deny) -> Result<Answer, Refusal> {
    match verb {
        Deny::Id { id } => about(session, &id, "bar").await,
        Deny::Lift { id } => about(session, &id, "lift").await,
        Deny::List => {
            let cell = session.cell()?;
            let reply = ask!(cell, Revocation.list_denials(v1::ListDenialsRequest {}))?;
            Ok(Answer::ok(table(&reply.ids, &reply.svids).render(session.form)))
        }
    }
}

pub(super) async fn revoke(session: &Session, what: SvidRevoke) -> Result<Answer, Refusal> {
    match (what.id, what.authority, what.serial) {
        (Some(id), None, None) => about(session, &id, "revoke").await,
        (None, Some(authority), Some(serial)) => {
            let (cell, banner) = session.cell_to_change()?;
            let request = v1::DenySvidRequest { request_id: request_id()?, authority, serial };
            let svid = ask!(cell, Revocation.deny_svid(request))?;
            Ok(Answer::ok(table(&[], &[svid]).render_one(session.form)).note(banner))
        }
        _ => Err(Refusal::new(Code::BadRequest, "an identity, or --serial and --authority", "another choice")),
    }
}

async fn about(session: &Session, id: &SpiffeId, verb: &str) -> Result<Answer, Refusal> {
    let (cell, banner) = session.cell_to_change()?;
    let request = v1::DenyIdRequest { request_id: request_id()?, spiffe_id: id.to_string(), verb: verb.to_owned() };
    let denied = ask!(cell, Revocation.deny_id(request))?;
    Ok(Answer::ok(table(&[denied], &[]).render_one(session.form)).note(banner))
}

fn table(ids: &[v1::DeniedId], svids: &[v1::DeniedSvid]) -> Table {
    let mut table = Table::new("denial", &["subject", "refused", "since", "kept_until", "by"]);
    for d in ids {
        let (refused, until) = match d.barred {
            true => ("all, until it is lifted".to_owned(), String::new()),
            false => (format!("up to serial {}", d.up_to), utc(d.until_ms)),
        };
        table.row(vec![json!(d.spiffe_id), json!(refused), json!(utc(d.since_ms)), json!(until), json!(d.origin)]);
    }
    for d in svids {
        let subject = format!("{}/{}", d.authority, d.serial);
        let (since, until) = (utc(d.since_ms), utc(d.until_ms));
        table.row(vec![json!(subject), json!("this SVID"), json!(since), json!(until), json!(d.trust_domain)]);
    }
    table
}
