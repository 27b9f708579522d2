//! `ambit cluster standby`, and the verbs of a lost cell's authority: granted, given back, taken back.

use super::Session;
use super::approver::{FILE_BYTES_MAX, Outcome, approved, or_proposal};
use crate::args::{Approvals, Standby};
use crate::ask;
use crate::cell::request_id;
use crate::context::read_bounded;
use crate::duration::Millis;
use crate::exit::Exit;
use crate::output::{Answer, Form, Table, pretty};
use crate::when::utc;
use ambit_identity::approver::{gather, proposal_text, propose, read_approval};
use ambit_model::grant::{FailoverGrant, LEASE_MS_MAX, Naming, Vouch};
use ambit_model::{Act, Code, Refusal, Stamp, TrustDomain};
use ambit_proto::convert::approved_message;
use ambit_proto::v1;
use serde_json::{Value, json};

pub(super) async fn run(session: &Session, verb: Standby) -> Result<Answer, Refusal> {
    match verb {
        Standby::Set { standby, witness, lease, approvals } => {
            let lease_ms = lease.map_or(LEASE_MS_MAX, |lease| lease.0);
            let vouch = witness.map_or(Vouch::Approvers, |cell| Vouch::Witness { cell, lease_ms });
            name(session, Act::NameStandby(Naming { standby, vouch }), &approvals).await
        }
        Standby::Remove { approvals } => name(session, Act::RemoveStandby, &approvals).await,
        Standby::Show => {
            let cell = session.cell()?;
            let all = ask!(cell, ClusterRegistry.list_standbys(v1::ListStandbysRequest {}))?;
            Ok(Answer::ok(shown(session.form, &all)))
        }
    }
}

async fn name(session: &Session, act: Act, approvals: &Approvals) -> Result<Answer, Refusal> {
    let (cell, banner) = session.cell_to_change()?;
    let naming = match &act {
        Act::NameStandby(naming) => naming.to_string(),
        _ => String::new(),
    };
    let request = v1::NameStandbyRequest {
        request_id: request_id()?,
        naming,
        approved: approved(&cell, &act, &approvals.files)?,
    };
    let done = ask!(cell, ClusterRegistry.name_standby(request));
    Ok(match or_proposal(&cell, act, approvals, done).await? {
        Outcome::Done(all) => Answer::ok(shown(session.form, &all)).note(banner),
        Outcome::Proposed(answer) => answer.note(banner),
    })
}

/// At the holder. Without approvals: the proposal that two approvers of the home are to sign.
pub(super) async fn grant(
    session: &Session,
    home: TrustDomain,
    lasts: Option<Millis>,
    approvals: &Approvals,
) -> Result<Answer, Refusal> {
    let (cell, banner) = session.cell_to_change()?;
    let Some(first) = approvals.files.first() else {
        let lasts = lasts.ok_or_else(|| Refusal::new(Code::BadRequest, "--for TIME, or --approval FILE", "neither"))?;
        let all = ask!(cell, ClusterRegistry.list_standbys(v1::ListStandbysRequest {}))?;
        let known = all.standbys.iter().find(|s| s.home == home.as_str() && !s.naming.is_empty());
        let expected = "a home that names a standby (ambit cluster standby show)";
        let known = known.ok_or_else(|| Refusal::new(Code::StandbyUnknown, expected, home.as_str()))?;
        let begins = Stamp(all.stamp_ms / 1_000 * 1_000);
        let (holder, epoch) = (cell.context().trust_domain.clone(), known.epoch + 1);
        let grant = FailoverGrant { home: home.clone(), holder, epoch, begins, ends: begins.plus_ms(lasts.0) };
        grant.check()?;
        let proposal = propose(home.clone(), known.epoch, Stamp(all.stamp_ms), Act::FailOver(grant))?;
        let refusal = Refusal::new(Code::ApprovalMissing, format!("two approvers of {home}"), "none asked yet");
        let how = format!("they sign it with: ambit approve FILE --trust-domain {home} --epoch {}", known.epoch);
        let answer = Answer::ok(proposal_text(&proposal)?).note(banner).note(how);
        return Ok(answer.ending(Exit::of(&refusal)));
    };
    // What they signed says from when until when.
    let (proposal, _) = read_approval(&read_bounded(first, FILE_BYTES_MAX)?)?;
    let read = |file: &std::path::PathBuf| Ok((file.display().to_string(), read_bounded(file, FILE_BYTES_MAX)?));
    let files = approvals.files.iter().map(read).collect::<Result<Vec<_>, Refusal>>()?;
    let approved = gather(&home, &proposal.act, &files)?.as_ref().map(approved_message);
    let request = v1::CommitGrantRequest { request_id: request_id()?, act: proposal.act.to_string(), approved };
    let all = ask!(cell, ClusterRegistry.commit_grant(request))?;
    Ok(Answer::ok(shown(session.form, &all)).note(banner))
}

pub(super) async fn release(session: &Session, home: TrustDomain) -> Result<Answer, Refusal> {
    let (cell, banner) = session.cell_to_change()?;
    let request = v1::HomeRequest { request_id: request_id()?, home: home.to_string() };
    let all = ask!(cell, ClusterRegistry.release_grant(request))?;
    Ok(Answer::ok(shown(session.form, &all)).note(banner))
}

pub(super) async fn take_back(session: &Session) -> Result<Answer, Refusal> {
    let (cell, banner) = session.cell_to_change()?;
    let request = v1::HomeRequest { request_id: request_id()?, home: cell.context().trust_domain.to_string() };
    let all = ask!(cell, ClusterRegistry.take_back(request))?;
    Ok(Answer::ok(shown(session.form, &all)).note(banner))
}

pub(super) async fn late(session: &Session, origin: TrustDomain, seq: u64, keep: bool) -> Result<Answer, Refusal> {
    let (cell, banner) = session.cell_to_change()?;
    let request = v1::JudgeLateRequest { request_id: request_id()?, origin: origin.to_string(), seq, keep };
    let all = ask!(cell, ClusterRegistry.judge_late(request))?;
    Ok(Answer::ok(shown(session.form, &all)).note(banner))
}

fn shown(form: Form, all: &v1::ListStandbysResponse) -> String {
    let mut standbys = Table::new("standby", &["home", "named", "epoch", "settled"]);
    for s in &all.standbys {
        let named = match (s.naming.as_str(), s.former.as_str()) {
            ("", "") => "-".to_owned(),
            (naming, "") => naming.to_owned(),
            ("", former) => format!("- (formerly {former})"),
            (naming, former) => format!("{naming} (formerly {former})"),
        };
        standbys.row(vec![json!(s.home), json!(named), json!(s.epoch), json!(s.settled)]);
    }
    let mut grants = Table::new("grant", &["grant", "state", "seen", "by", "waits_for"]);
    for g in &all.grants {
        grants.row(vec![json!(g.act), json!(g.state), json!(utc(g.seen_ms)), json!(g.by), json!(g.why)]);
    }
    let mut keys = Table::new("standby intermediate", &["home", "holder", "authority", "until"]);
    for a in &all.authorities {
        keys.row(vec![json!(a.home), json!(a.holder), json!(a.authority), json!(utc(a.not_after_ms))]);
    }
    let mut late = Table::new("late record", &["origin", "seq", "epoch", "kind", "key"]);
    for r in &all.late {
        late.row(vec![json!(r.origin), json!(r.seq), json!(r.epoch), json!(r.kind), json!(r.key)]);
    }
    let tables = [standbys, grants, keys, late];
    if form == Form::Json {
        let [standbys, grants, keys, late] =
            tables.map(|table| serde_json::from_str::<Value>(&table.render(Form::Json)).unwrap_or(Value::Null));
        return pretty(&json!({
            "standbys": standbys, "grants": grants, "intermediates": keys, "late": late, "fenced": all.fenced,
            "lease": all.lease,
        }));
    }
    let mut out: Vec<String> = tables.iter().map(|table| table.render(Form::Table)).collect();
    out.push(format!("lease of this replica: {}", all.lease));
    if !all.fenced.is_empty() {
        out.push(format!("this cell signs nothing for its own trust domain: {}", all.fenced));
    }
    out.join("\n\n")
}
