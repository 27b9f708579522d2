//! `ambit apply`: SPIRE's objects as entries and relationships. All are read before the first is sent.

use super::Session;
use crate::args::Apply;
use crate::ask;
use crate::cell::request_id;
use crate::context::read_bounded;
use crate::exit::Exit;
use crate::output::{Answer, Table};
use crate::spire;
use ambit_model::Refusal;
use ambit_proto::v1;
use serde_json::json;

const FILE_BYTES_MAX: u64 = 4 << 20;

pub(super) async fn run(session: &Session, apply: Apply) -> Result<Answer, Refusal> {
    let objects = spire::read(&read_bounded(&apply.file, FILE_BYTES_MAX)?, apply.cluster.as_ref())?;
    let mut table = Table::new("object", &["kind", "name", "status", "message"]);
    if apply.dry_run {
        for e in &objects.entries {
            table.row(vec![json!("entry"), json!(e.id), json!("readable"), json!("")]);
        }
        for r in &objects.relationships {
            table.row(vec![json!("relationship"), json!(r.trust_domain), json!("readable"), json!("")]);
        }
        return Ok(Answer::ok(table.render(session.form)));
    }
    let (cell, banner) = session.cell_to_change()?;
    let mut exit = Exit::Ok;
    for row in objects.relationships {
        let request = v1::FederationRelationship { request_id: request_id()?, ..row };
        let name = request.trust_domain.clone();
        // Each by itself, as entries are: what was written is told, whatever became of the rest.
        let (code, message) = match ask!(cell, TrustDomainRegistry.put_federation_relationship(request)) {
            Ok(_) => ("ok", String::new()),
            Err(refusal) => (refusal.code.as_str(), refusal.to_string()),
        };
        if code != "ok" {
            exit = Exit::Failed;
        }
        table.row(vec![json!("relationship"), json!(name), json!(code), json!(message)]);
    }
    if !objects.entries.is_empty() {
        let item = |entry| v1::EntryUpdate { entry: Some(entry), expected_revision: 0, create: true };
        let items = objects.entries.into_iter().map(item).collect();
        let request = v1::BatchUpdateEntryRequest { request_id: request_id()?, items };
        for status in ask!(cell, EntryRegistry.batch_update_entry(request))?.results {
            if status.code != "ok" {
                exit = Exit::Failed;
            }
            table.row(vec![json!("entry"), json!(status.id), json!(status.code), json!(status.message)]);
        }
    }
    Ok(Answer::ok(table.render(session.form)).note(banner).ending(exit))
}
