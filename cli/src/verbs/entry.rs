//! `ambit entry`.

use super::Session;
use crate::args::{Entry, EntryCreate, EntryList};
use crate::ask;
use crate::cell::{Cell, request_id, seconds};
use crate::context::read_bounded;
use crate::duration::Millis;
use crate::exit::Exit;
use crate::output::{Answer, Table, counted};
use crate::when::{parse_utc, utc};
use ambit_model::{Code, Refusal};
use ambit_proto::v1;
use serde::Deserialize;
use serde_json::json;
use std::num::NonZeroU64;

/// Bytes of one entry file; as much as one policy request.
const FILE_BYTES_MAX: u64 = 1 << 20;

pub(super) async fn run(session: &Session, verb: Entry) -> Result<Answer, Refusal> {
    match verb {
        Entry::Create(written) => {
            let entries = entries_of(written)?;
            let (cell, banner) = session.cell_to_change()?;
            let request = v1::BatchCreateEntryRequest { request_id: request_id()?, entries };
            let reply = ask!(cell, EntryRegistry.batch_create_entry(request))?;
            Ok(statuses(session, &reply, "created").note(banner))
        }
        Entry::Delete(delete) => {
            let expected_revision = delete.expect_revision.map_or(0, NonZeroU64::get);
            if expected_revision != 0 && delete.ids.len() > 1 {
                let found = format!("{} ids", delete.ids.len());
                return Err(Refusal::new(Code::BadRequest, "one id with --expect-revision", found));
            }
            let items = delete.ids.into_iter().map(|id| v1::EntryRemoval { id, expected_revision }).collect();
            let (cell, banner) = session.cell_to_change()?;
            let request = v1::BatchDeleteEntryRequest { request_id: request_id()?, items };
            let reply = ask!(cell, EntryRegistry.batch_delete_entry(request))?;
            Ok(statuses(session, &reply, "deleted").note(banner))
        }
        Entry::Update(update) => {
            let (expected, create) = (update.expect_revision, update.create);
            let item = |entry| v1::EntryUpdate {
                entry: Some(entry),
                expected_revision: expected.map_or(0, NonZeroU64::get),
                create,
            };
            let items = entries_of(update.written)?.into_iter().map(item).collect();
            let (cell, banner) = session.cell_to_change()?;
            let request = v1::BatchUpdateEntryRequest { request_id: request_id()?, items };
            let reply = ask!(cell, EntryRegistry.batch_update_entry(request))?;
            Ok(statuses(session, &reply, "written").note(banner))
        }
        Entry::List(list) => {
            let cell = session.cell()?;
            let EntryList { cluster, spiffe_id, selectors, downstream, admin, federates_with } = list;
            let request = v1::ListEntriesRequest {
                cluster,
                spiffe_id,
                selectors,
                downstream,
                admin,
                federates_with,
                ..Default::default()
            };
            let entries = listed(&cell, request).await?;
            Ok(Answer::ok(table(&entries).render(session.form)))
        }
    }
}

/// All pages of a list.
pub(crate) async fn listed(cell: &Cell, mut request: v1::ListEntriesRequest) -> Result<Vec<v1::Entry>, Refusal> {
    let mut entries = Vec::new();
    loop {
        let reply = ask!(cell, EntryRegistry.list_entries(request.clone()))?;
        entries.extend(reply.entries);
        if reply.next_after_id.is_empty() {
            return Ok(entries);
        }
        request.after_id = reply.next_after_id;
    }
}

fn table(entries: &[v1::Entry]) -> Table {
    const COLUMNS: &[&str] = &[
        "id",
        "spiffe_id",
        "cluster",
        "selectors",
        "nodes",
        "ttl_seconds",
        "federates_with",
        "revision",
        "hint",
        "dns_names",
        "jwt_ttl_seconds",
        "expires_at",
        "downstream",
        "admin",
        "federates_with_groups",
        "labels",
    ];
    let mut table = Table::new("entry", COLUMNS);
    for e in entries {
        table.row(vec![
            json!(e.id),
            json!(e.spiffe_id),
            json!(e.cluster),
            json!(e.selectors),
            json!(e.nodes),
            json!(e.ttl_seconds),
            json!(e.federates_with),
            json!(e.revision),
            json!(e.hint),
            json!(e.dns_names),
            json!(e.jwt_ttl_seconds),
            json!(if e.expires_at_ms == 0 { String::new() } else { utc(e.expires_at_ms) }),
            json!(e.downstream),
            json!(e.admin),
            json!(e.federates_with_groups),
            json!(e.labels),
        ]);
    }
    table
}

/// One line per item; the worst item decides how the program ends.
fn statuses(session: &Session, reply: &v1::BatchEntryResponse, done: &str) -> Answer {
    let mut table = Table::new("entry", &["id", "status", "revision"]);
    let mut notes = Vec::new();
    let mut exit = Exit::Ok;
    for item in &reply.results {
        let good = item.code == "ok";
        table.row(vec![json!(item.id), json!(if good { done } else { &item.code }), json!(reply.revision)]);
        if !good {
            let code = Code::from_text(&item.code).unwrap_or(Code::Internal);
            exit = exit.max(Exit::of(&Refusal::new(code, "", "")));
            // The message is the refusal as one line; its code and remedy are not said twice.
            let message = item.message.strip_prefix(&format!("{code}: ")).unwrap_or(&item.message);
            let message = message.strip_suffix(&format!("; try: {}", code.remedy())).unwrap_or(message);
            notes.push(format!("error[{}]: {}: {message}\n  try: {}", item.code, item.id, code.remedy()));
        }
    }
    let mut answer = Answer::ok(table.render(session.form)).ending(exit);
    answer.notes = notes;
    answer
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    #[serde(rename = "kind")]
    _kind: EntryKind,
    metadata: Metadata,
    spec: Spec,
}

#[derive(Deserialize)]
enum EntryKind {
    Entry,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Metadata {
    name: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Spec {
    spiffe_id: String,
    cluster: String,
    selectors: Vec<String>,
    #[serde(default)]
    nodes: Vec<String>,
    ttl: Option<Millis>,
    #[serde(default)]
    federates_with: Vec<String>,
    #[serde(default)]
    hint: String,
    #[serde(default)]
    dns_names: Vec<String>,
    jwt_ttl: Option<Millis>,
    expires_at: Option<String>,
    #[serde(default)]
    downstream: bool,
    #[serde(default)]
    admin: bool,
    #[serde(default)]
    federates_with_groups: Vec<String>,
    #[serde(default)]
    labels: Vec<String>,
}

fn instant(text: &str) -> Result<u64, Refusal> {
    parse_utc(text).ok_or_else(|| Refusal::new(Code::BadRequest, "a time as 2026-11-23T14:03:26Z", text))
}

fn entries_of(written: EntryCreate) -> Result<Vec<v1::Entry>, Refusal> {
    let entries = match &written.file {
        Some(file) => documents(&read_bounded(file, FILE_BYTES_MAX)?)?,
        None => vec![v1::Entry {
            id: written.id.unwrap_or_default(),
            spiffe_id: written.spiffe_id.unwrap_or_default(),
            cluster: written.cluster.unwrap_or_default(),
            nodes: written.nodes,
            selectors: written.selectors,
            ttl_seconds: written.ttl.map(seconds).transpose()?.unwrap_or(0),
            federates_with: written.federates_with,
            hint: written.hint,
            dns_names: written.dns_names,
            jwt_ttl_seconds: written.jwt_ttl.map(seconds).transpose()?.unwrap_or(0),
            expires_at_ms: written.expires_at.as_deref().map(instant).transpose()?.unwrap_or(0),
            revision: 0,
            downstream: written.downstream,
            admin: written.admin,
            federates_with_groups: written.federates_with_groups,
            labels: written.labels,
        }],
    };
    // Refused here already, where the place is known; the cell checks again.
    for entry in &entries {
        ambit_model::Entry::try_from(entry)
            .map_err(|r| Refusal::new(r.code, r.expected, format!("{} in entry '{}'", r.found, entry.id)))?;
    }
    Ok(entries)
}

fn documents(text: &str) -> Result<Vec<v1::Entry>, Refusal> {
    let mut entries = Vec::new();
    for document in serde_norway::Deserializer::from_str(text) {
        let read = Option::<Written>::deserialize(document).map_err(|e| {
            Refusal::new(Code::BadRequest, "documents of kind Entry with metadata.name and spec", e.to_string())
        })?;
        let Some(Written { metadata, spec, .. }) = read else { continue };
        entries.push(v1::Entry {
            id: metadata.name,
            spiffe_id: spec.spiffe_id,
            cluster: spec.cluster,
            nodes: spec.nodes,
            selectors: spec.selectors,
            ttl_seconds: spec.ttl.map(seconds).transpose()?.unwrap_or(0),
            federates_with: spec.federates_with,
            hint: spec.hint,
            dns_names: spec.dns_names,
            jwt_ttl_seconds: spec.jwt_ttl.map(seconds).transpose()?.unwrap_or(0),
            expires_at_ms: spec.expires_at.as_deref().map(instant).transpose()?.unwrap_or(0),
            revision: 0,
            downstream: spec.downstream,
            admin: spec.admin,
            federates_with_groups: spec.federates_with_groups,
            labels: spec.labels,
        });
    }
    if entries.is_empty() {
        return Err(Refusal::new(Code::BadRequest, "at least one document of kind Entry", counted(0, "document")));
    }
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_are_read_strictly() {
        let good = "kind: Entry\nmetadata: {name: web}\nspec:\n  spiffeId: spiffe://west/web\n  cluster: west\n  \
                    selectors: [\"unix:uid:1000\"]\n  ttl: 2m\n---\n# nothing\n---\nkind: Entry\nmetadata: {name: db}\n\
                    spec: {spiffeId: spiffe://west/db, cluster: west, selectors: [\"cgroup:db\"], downstream: true, \
                    federatesWithGroups: [partners]}\n";
        let entries = documents(good).unwrap();
        assert_eq!((entries.len(), entries[0].ttl_seconds, entries[1].id.as_str()), (2, 120, "db"));
        assert_eq!((entries[0].downstream, entries[1].downstream, entries[1].admin), (false, true, false));
        assert_eq!(entries[1].federates_with_groups, ["partners"]);
        for bad in [
            "",
            "kind: Policy\nmetadata: {name: web}\nspec: {spiffeId: a, cluster: b, selectors: []}",
            "kind: Entry\nmetadata: {name: web, x: y}\nspec: {spiffeId: a, cluster: b, selectors: []}",
            "kind: Entry\nmetadata: {name: web}\nspec: {spiffeId: a, cluster: b, selectors: [], ports: [1]}",
            "{",
        ] {
            assert_eq!(documents(bad).unwrap_err().code, Code::BadRequest, "{bad}");
        }
    }

    #[test]
    fn the_worst_item_decides_the_end() {
        let (form, timeout) = (crate::output::Form::Table, std::time::Duration::ZERO);
        let session = Session { context: None, form, timeout, opened: Default::default() };
        let item = |id: &str, code: &str| v1::EntryStatus { id: id.into(), code: code.into(), message: "m".into() };
        let results = vec![item("a", "ok"), item("b", "already_exists"), item("c", "permission_denied")];
        let answer = statuses(&session, &v1::BatchEntryResponse { results, revision: 7 }, "created");
        assert_eq!(answer.exit, Exit::Denied);
        let refusal = Refusal::new(Code::AlreadyExists, "an id not in use", "b").to_string();
        let results = vec![v1::EntryStatus { id: "b".into(), code: "already_exists".into(), message: refusal }];
        let one = statuses(&session, &v1::BatchEntryResponse { results, revision: 7 }, "created");
        assert_eq!(
            one.notes,
            [
                "error[already_exists]: b: expected an id not in use, found b\n  try: choose another name, or update the object"
            ]
        );
        assert!(
            answer.text.starts_with("ID  STATUS             REVISION\na   created            7\n"),
            "{}",
            answer.text
        );
    }
}
