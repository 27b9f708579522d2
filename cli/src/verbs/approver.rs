//! `ambit approver`, and what the verbs that take approvals have in common: without any they print the
//! proposal that is to be signed.

use super::Session;
use crate::args::{Approvals, Approver};
use crate::ask;
use crate::cell::{Cell, request_id};
use crate::context::read_bounded;
use crate::exit::{Exit, file_refusal, refusal_text};
use crate::output::{Answer, Table};
use crate::when::utc;
use ambit_identity::ApproverKey;
use ambit_identity::approver::{gather, proposal_text, propose};
use ambit_model::{Act, Code, Refusal, Stamp};
use ambit_proto::convert::approved_message;
use ambit_proto::v1;
use serde_json::json;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// A proposal, an approval or a key is a few hundred bytes.
pub(super) const FILE_BYTES_MAX: u64 = 16 * 1024;

pub(super) async fn run(session: &Session, verb: Approver) -> Result<Answer, Refusal> {
    match verb {
        Approver::Keygen { out } => keygen(&out),
        Approver::Add { name, public, approvals } => {
            let (cell, banner) = session.cell_to_change()?;
            let act = Act::AddApprover(name.clone(), public.clone());
            let (request_id, approved) = (request_id()?, approved(&cell, &act, &approvals.files)?);
            let request =
                v1::AddApproverRequest { request_id, name: name.to_string(), public: public.to_string(), approved };
            let done = ask!(cell, Administrators.add_approver(request));
            changed(session, &cell, act, &approvals, done).await.map(|answer| answer.note(banner))
        }
        Approver::Remove { name, approvals } => {
            let (cell, banner) = session.cell_to_change()?;
            let act = Act::RemoveApprover(name.clone());
            let (request_id, approved) = (request_id()?, approved(&cell, &act, &approvals.files)?);
            let request = v1::RemoveApproverRequest { request_id, name: name.to_string(), approved };
            let done = ask!(cell, Administrators.remove_approver(request));
            changed(session, &cell, act, &approvals, done).await.map(|answer| answer.note(banner))
        }
        Approver::List => {
            let cell = session.cell()?;
            let all = ask!(cell, Administrators.list_approvers(v1::ListApproversRequest {}))?;
            Ok(Answer::ok(approvers(&all).render(session.form)))
        }
        Approver::Acts => {
            let cell = session.cell()?;
            let all = ask!(cell, Administrators.list_approvers(v1::ListApproversRequest {}))?;
            Ok(Answer::ok(acts(&all).render(session.form)))
        }
    }
}

fn keygen(out: &Path) -> Result<Answer, Refusal> {
    let key = ApproverKey::generate()?;
    // Never over another key: what it approved so far would be nobody's to approve again.
    let opened = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(out);
    let written = opened.and_then(|mut file| {
        file.write_all(key.pem().map_err(std::io::Error::other)?.as_bytes()).and_then(|()| file.sync_all())
    });
    written.map_err(|e| file_refusal(out, &e))?;
    let hint = "hand this out; keep the file where only you can read it, and on no machine of the cell";
    Ok(Answer::ok(key.card().to_string()).note(hint))
}

/// What approvers signed of this act; none where no file was given.
pub(super) fn approved(cell: &Cell, act: &Act, files: &[PathBuf]) -> Result<Option<v1::Approved>, Refusal> {
    let read = |file: &PathBuf| Ok((file.display().to_string(), read_bounded(file, FILE_BYTES_MAX)?));
    let files = files.iter().map(read).collect::<Result<Vec<_>, Refusal>>()?;
    Ok(gather(&cell.context().trust_domain, act, &files)?.as_ref().map(approved_message))
}

/// How an act ended.
pub(super) enum Outcome<T> {
    /// It is done.
    Done(T),
    /// It takes approvals, and nobody was asked yet: the proposal.
    Proposed(Answer),
}

/// The cell's word, or the proposal where it wants approvals and none were given.
pub(super) async fn or_proposal<T>(
    cell: &Cell,
    act: Act,
    given: &Approvals,
    done: Result<T, Refusal>,
) -> Result<Outcome<T>, Refusal> {
    match done {
        Ok(done) => Ok(Outcome::Done(done)),
        Err(refusal) if refusal.code == Code::ApprovalMissing && given.files.is_empty() => {
            let status = ask!(cell, Membership.status(v1::StatusRequest {}))?;
            let own = cell.context().trust_domain.clone();
            let proposal = propose(own, status.epoch, Stamp(status.stamp_ms), act)?;
            let answer = Answer::ok(proposal_text(&proposal)?).note(refusal_text(&refusal));
            Ok(Outcome::Proposed(answer.ending(Exit::of(&refusal))))
        }
        Err(refusal) => Err(refusal),
    }
}

async fn changed(
    session: &Session,
    cell: &Cell,
    act: Act,
    given: &Approvals,
    done: Result<v1::ListApproversResponse, Refusal>,
) -> Result<Answer, Refusal> {
    let all = match or_proposal(cell, act, given, done).await? {
        Outcome::Done(all) => all,
        Outcome::Proposed(answer) => return Ok(answer),
    };
    let answer = Answer::ok(approvers(&all).render(session.form));
    Ok(match all.approvers.len() {
        1 => answer.note("one approver alone: no root can be revoked until there is a second"),
        2 => answer.note("two approvers: where one key is lost no root can be revoked any more; add a third"),
        _ => answer,
    })
}

fn approvers(all: &v1::ListApproversResponse) -> Table {
    let mut table = Table::new("approver", &["name", "key", "added", "added_by"]);
    for a in &all.approvers {
        table.row(vec![json!(a.name), json!(hex::encode(&a.key)), json!(utc(a.added_ms)), json!(a.added_by)]);
    }
    table
}

fn acts(all: &v1::ListApproversResponse) -> Table {
    let mut table = Table::new("act", &["index", "at", "event", "act", "by", "approved_by"]);
    for a in &all.acts {
        let (at, by) = (utc(a.at_ms), &a.approved_by);
        table.row(vec![json!(a.index), json!(at), json!(a.event), json!(a.act), json!(a.by), json!(by)]);
    }
    table
}
