//! `ambit audit`: the log of everything that the cell committed.

mod prove;
mod verify;

use super::Session;
use crate::args::{Audit, AuditSearch};
use crate::cell::{Cell, request_id};
use crate::exit::file_refusal;
use crate::output::{Answer, Form, Table};
use crate::when::{now_ms, parse_utc, utc};
use crate::{ask, client};
use ambit_audit::{Note, Record, leaf_hash, ocsf};
use ambit_model::{Code, Refusal};
use ambit_proto::status::from_status;
use ambit_proto::v1;
use serde_json::json;
use std::io::Write;
use std::path::Path;
use tonic::Streaming;

pub(super) async fn run(session: &Session, verb: Audit) -> Result<Answer, Refusal> {
    match verb {
        Audit::Status => status(session).await,
        Audit::Search(search) => stream(session, &search, false).await,
        Audit::Tail(search) => stream(session, &search, true).await,
        Audit::Verify(options) => verify::run(session, &options).await,
        Audit::Prove(options) => prove::run(session, &options).await,
        Audit::Export { search, out } => export(session, &search, &out).await,
        Audit::Begin => begin(session).await,
    }
}

async fn begin(session: &Session) -> Result<Answer, Refusal> {
    let (cell, banner) = session.cell_to_change()?;
    let head = ask!(cell, Audit.begin_audit(v1::BeginAuditRequest { request_id: request_id()? }))?;
    let note = Note::parse(&head.checkpoint)?;
    Ok(Answer::ok(format!("audit log {} begun", note.checkpoint.origin)).note(banner))
}

async fn status(session: &Session) -> Result<Answer, Refusal> {
    let cell = session.cell()?;
    let mut table = Table::new("replica", &["replica", "records", "head", "root", "cosigned_by"]);
    let (mut notes, mut last) = (Vec::new(), None);
    for address in cell.context().addresses.clone() {
        let head = match verify::head_at(&cell, address).await {
            Ok(head) => head,
            Err(refusal) if refusal.code == Code::AuditNotBegun => return Err(refusal),
            Err(refusal) => {
                notes.push(format!("{address}: {refusal}"));
                continue;
            }
        };
        let Note { checkpoint, .. } = Note::parse(&head.checkpoint)?;
        let size = |note: &str| Note::parse(note).map_or(0, |note| note.checkpoint.size);
        let by = head.cosigned.iter().map(|c| format!("{}@{}", c.trust_domain, size(&c.note)));
        let by: Vec<String> = by.collect();
        table.row(vec![
            json!(head.replica),
            json!(head.have),
            json!(checkpoint.size),
            json!(hex::encode(checkpoint.root)),
            json!(by),
        ]);
        last = Some(head);
    }
    let Some(head) = last else {
        return Err(Refusal::new(Code::Unavailable, "a replica that answers", notes.join("; ")));
    };
    let mut troubled = false;
    for log in head.witnessed {
        let root = hex::encode(&log.root);
        let line = match log.trouble.is_empty() {
            true => format!("cosigned here: {} at {} records, {root}, {}", log.origin, log.size, utc(log.stamp_ms)),
            false => {
                format!("ALARM: {} does not follow from {} records, {root}: {}", log.origin, log.size, log.trouble)
            }
        };
        troubled |= !log.trouble.is_empty();
        notes.push(line);
    }
    let mut answer = Answer::ok(table.render(session.form));
    answer.notes = notes;
    Ok(if troubled { answer.ending(crate::exit::Exit::Drift) } else { answer })
}

/// A time as people write it: how long ago, or when.
fn at(text: &str) -> Result<u64, Refusal> {
    if let Some(ms) = parse_utc(text) {
        return Ok(ms);
    }
    let ago: crate::duration::Millis = text.parse().map_err(|_| {
        Refusal::new(Code::BadRequest, "how long ago (at most 24h), or a time as 2026-11-23T14:03:26Z", text)
    })?;
    Ok(now_ms().saturating_sub(ago.0))
}

fn request(search: &AuditSearch, follow: bool) -> Result<v1::WatchAuditRequest, Refusal> {
    Ok(v1::WatchAuditRequest {
        from: search.from,
        follow,
        actor: search.actor.clone(),
        act: search.act.clone(),
        object: search.object.clone(),
        since_ms: search.since.as_deref().map_or(Ok(0), at)?,
        until_ms: search.until.as_deref().map_or(Ok(0), at)?,
        outcome: search.outcome.clone().unwrap_or_default(),
        code: search.code.clone(),
    })
}

async fn open(cell: &Cell, request: v1::WatchAuditRequest) -> Result<Streaming<v1::AuditRecord>, Refusal> {
    let ask = |channel| {
        let request = request.clone();
        async move { client!(Audit, channel).watch_audit(request).await }
    };
    cell.call(ask).await
}

/// A line for each record, as they are read: there may be millions. `--follow` goes on at another replica where one is lost.
async fn stream(session: &Session, search: &AuditSearch, follow: bool) -> Result<Answer, Refusal> {
    let cell = session.cell()?;
    let mut request = request(search, follow)?;
    if follow && search.from == 0 && search.since.is_none() {
        // What was there before is for `search`.
        let head = ask!(cell, Audit.audit_head(v1::AuditHeadRequest {}))?;
        request.from = Note::parse(&head.checkpoint)?.checkpoint.size;
    }
    let mut told = 0usize;
    loop {
        let mut records = open(&cell, request.clone()).await?;
        let broke = loop {
            match records.message().await {
                Ok(Some(record)) => {
                    request.from = record.n + 1;
                    told += 1;
                    if !line(session.form, &record) {
                        return Ok(Answer::ok(""));
                    }
                }
                Ok(None) => break None,
                Err(status) => break Some(from_status(&status)),
            }
        };
        match broke {
            None if !follow => return Ok(Answer::ok("").note(crate::output::counted(told, "record"))),
            Some(refusal) if !follow || refusal.code.class() != ambit_model::refusal::Class::Unavailable => {
                return Err(refusal);
            }
            _ => tokio::time::sleep(std::time::Duration::from_millis(200)).await,
        }
    }
}

/// Whether it could be written.
fn line(form: Form, record: &v1::AuditRecord) -> bool {
    let text = match (Record::decode(&record.record), form) {
        (Err(refusal), _) => format!("{:<8} unreadable: {refusal}", record.n),
        (Ok(_), Form::Json) => {
            let value: serde_json::Value = serde_json::from_slice(&record.record).unwrap_or_default();
            json!({ "n": record.n, "leaf_sha256": hex::encode(leaf_hash(&record.record)), "record": value }).to_string()
        }
        (Ok(r), Form::Table) => {
            let facts: Vec<String> = r.facts.iter().map(|(name, value)| format!("{name}={value}")).collect();
            let code = if r.code.is_empty() {
                r.outcome.as_str().to_owned()
            } else {
                format!("{} {}", r.outcome.as_str(), r.code)
            };
            let (n, at, actor) = (record.n, utc(r.stamp_ms), r.actor);
            format!("{n:<8} {at} {actor} {} {} {code} {}", r.act, r.object, facts.join(" ")).trim_end().to_owned()
        }
    };
    let mut out = std::io::stdout().lock();
    writeln!(out, "{text}").and_then(|()| out.flush()).is_ok()
}

/// Nobody takes records out without a record of it.
async fn export(session: &Session, search: &AuditSearch, out: &Path) -> Result<Answer, Refusal> {
    let cell = session.cell()?;
    let asked = [("actor", &search.actor), ("act", &search.act), ("object", &search.object), ("code", &search.code)];
    let asked: Vec<String> = asked.iter().filter(|(_, v)| !v.is_empty()).map(|(k, v)| format!("{k}={v}")).collect();
    let what = if asked.is_empty() { "all".to_owned() } else { asked.join(" ") };
    let what = what.chars().take(200).collect();
    let head = ask!(cell, Audit.note_audit_export(v1::NoteAuditExportRequest { request_id: request_id()?, what }))?;
    let origin = Note::parse(&head.checkpoint)?.checkpoint.origin;
    let mut file: Box<dyn Write + Send> = match out.to_str() {
        Some("-") => Box::new(std::io::stdout()),
        _ => Box::new(std::io::BufWriter::new(std::fs::File::create(out).map_err(|e| file_refusal(out, &e))?)),
    };
    let mut records = open(&cell, request(search, false)?).await?;
    let mut count = 0;
    while let Some(record) = records.message().await.map_err(|status| from_status(&status))? {
        let (read, leaf) = (Record::decode(&record.record)?, hex::encode(leaf_hash(&record.record)));
        let event = ocsf::event(&origin, record.n, &read, &leaf);
        writeln!(file, "{event}").map_err(|e| file_refusal(out, &e))?;
        count += 1;
    }
    file.flush().map_err(|e| file_refusal(out, &e))?;
    Ok(Answer::ok("").note(crate::output::counted(count, "record")))
}
