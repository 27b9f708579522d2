//! Roots and intermediates as they stand, and single steps of a rotation.

use super::{external, jwt};
use crate::args::Approvals;
use crate::ask;
use crate::cell::{Cell, request_id};
use crate::context::fingerprint;
use crate::exit::Exit;
use crate::output::{Answer, Form, Table, pretty};
use crate::verbs::Session;
use crate::verbs::approver::{Outcome, approved, or_proposal};
use crate::when::{now_ms, utc};
use ambit_model::{Act, Code, Refusal};
use ambit_proto::v1;
use serde_json::{Value, json};

/// The longest that an intermediate lasts. When the one began that a cell was founded with no row says.
const WEEK_MS: u64 = 7 * 24 * 3_600_000;

/// What is there now.
pub(super) async fn state(cell: &Cell) -> Result<v1::X509AuthorityState, Refusal> {
    ask!(cell, LocalAuthority.get_x509_authority_state(v1::X509AuthorityStateRequest { local_only: false }))
}

/// A request as the options have it.
pub(super) fn request(
    authority: Option<String>,
    without_acks: bool,
    dry_run: bool,
) -> Result<v1::X509AuthorityRequest, Refusal> {
    let authority = authority.unwrap_or_default();
    let request_id = request_id()?;
    Ok(v1::X509AuthorityRequest { request_id, authority, without_acks, dry_run, ..Default::default() })
}

/// `ambit trust check`: ends 5 where something is under way or wrong.
pub(super) async fn check(session: &Session) -> Result<Answer, Refusal> {
    let cell = session.cell()?;
    let (state, keys) = (state(&cell).await?, jwt::state(&cell).await?);
    let approvers = ask!(cell, Membership.status(v1::StatusRequest {}))?.approvers;
    let mut findings = findings(&state, now_ms());
    findings.extend(external::findings(&state, now_ms()));
    findings.extend(jwt::findings(&keys));
    if approvers == 1 {
        findings.push("one approver alone: no root can be revoked until there is a second (ambit approver add)".into());
    }
    // A cell may mean to have none: nothing is wrong, and yet it should be known.
    let weakness = (approvers == 0)
        .then_some("weakness: no approvers: any federation-admin alone can revoke a root (ambit approver add)");
    let text = match session.form {
        Form::Json => pretty(&json!({
            "sequence": state.sequence,
            "roots": values(&roots(&state)),
            "intermediates": values(&intermediates(&state)),
            "downstreams": values(&downstreams(&state)),
            "externals": values(&external::table(&state)),
            "approvers": approvers,
            "jwt_authorities": values(&jwt::table(&keys)),
            "findings": findings,
        })),
        Form::Table => {
            let given = (!state.downstreams.is_empty()).then(|| downstreams(&state));
            let outside = state.roots.iter().any(|root| !root.externals.is_empty()).then(|| external::table(&state));
            let tables = [roots(&state), intermediates(&state)].into_iter().chain(outside).chain(given);
            let tables = tables.chain([jwt::table(&keys)]);
            tables.map(|table| table.render(Form::Table)).collect::<Vec<_>>().join("\n\n")
        }
    };
    let lines = findings.iter().map(String::as_str).chain(weakness);
    let answer = lines.fold(Answer::ok(text), Answer::note);
    Ok(if findings.is_empty() { answer } else { answer.ending(Exit::Drift) })
}

/// Roots and intermediates for programs, as far as who asks may read them: a bundle is shown to every administrator.
pub(super) async fn standing(cell: &Cell) -> Result<Vec<(String, Value)>, Refusal> {
    match state(cell).await {
        Ok(state) => Ok(vec![
            ("roots".to_owned(), values(&roots(&state))),
            ("intermediates".to_owned(), values(&intermediates(&state))),
            ("externals".to_owned(), values(&external::table(&state))),
        ]),
        Err(refusal) if refusal.code == Code::PermissionDenied => Ok(Vec::new()),
        Err(refusal) => Err(refusal),
    }
}

pub(super) fn values(table: &Table) -> Value {
    serde_json::from_str(&table.render(Form::Json)).unwrap_or_default()
}

/// What an operator should know of: pure, so that every combination can be tested.
pub(super) fn findings(state: &v1::X509AuthorityState, now_ms: u64) -> Vec<String> {
    let mut out = Vec::new();
    for root in &state.roots {
        let missing = root.missing.join(", ");
        let using = root.using.join(", ");
        let name = root.fingerprint.get(..16).unwrap_or(&root.fingerprint);
        match root.state.as_str() {
            "prepared" if missing.is_empty() => out.push(format!("root {name}.. is held by all: activate it")),
            "prepared" | "active" if !missing.is_empty() => {
                out.push(format!("root {name}.. is not held by {missing}"));
            }
            "old" => out.push(format!("root {name}.. is old: taint it, then revoke it")),
            "tainted" if using.is_empty() => {
                out.push(format!("root {name}.. is tainted and nothing is under it: revoke it"))
            }
            "tainted" => out.push(format!("root {name}.. is tainted, and under it are {using}")),
            _ => {}
        }
    }
    for one in state.intermediates.iter().filter(|i| i.current) {
        let life = one.not_after_ms.saturating_sub(one.not_before_ms).min(WEEK_MS);
        let left = one.not_after_ms.saturating_sub(now_ms);
        // It is renewed at half of its life, a tenth later at the latest.
        if left < life / 3 {
            out.push(format!(
                "the intermediate of replica {} ends {} and was not renewed",
                one.replica,
                utc(one.not_after_ms)
            ));
        }
        if one.state == "tainted" {
            out.push(format!("replica {} has a tainted intermediate and no other", one.replica));
        }
    }
    out
}

fn roots(state: &v1::X509AuthorityState) -> Table {
    const COLUMNS: &[&str] = &["root", "state", "since", "acknowledged", "missing", "in_use_by", "opened_by"];
    let mut table = Table::new("root", COLUMNS);
    for root in &state.roots {
        let ratio = format!("{}/{}", root.used_by, root.users);
        let in_use = match root.state.as_str() {
            "old" | "tainted" if root.used_by > 0 => format!("{ratio}: {}", root.using.join(",")),
            _ => ratio,
        };
        table.row(vec![
            json!(root.fingerprint),
            json!(root.state),
            json!(if root.since_ms == 0 { "founded".to_owned() } else { utc(root.since_ms) }),
            json!(format!("{}/{}", root.acked, root.of)),
            json!(root.missing),
            json!(in_use),
            json!(root.opened_by),
        ]);
    }
    table
}

fn intermediates(state: &v1::X509AuthorityState) -> Table {
    const COLUMNS: &[&str] = &["authority", "replica", "root", "state", "current", "not_after", "in_use_by"];
    let mut table = Table::new("intermediate", COLUMNS);
    for one in &state.intermediates {
        table.row(vec![
            json!(one.authority),
            json!(one.replica),
            json!(one.root.get(..16)),
            json!(one.state),
            json!(one.current),
            json!(utc(one.not_after_ms)),
            json!(format!("{}/{}", one.used_by, one.users)),
        ]);
    }
    table
}

/// What was given to clusters' own issuers: `trust taint` and `trust revoke` take them by name.
fn downstreams(state: &v1::X509AuthorityState) -> Table {
    const COLUMNS: &[&str] = &["authority", "entry", "node", "generation", "root", "state", "not_after"];
    let mut table = Table::new("downstream", COLUMNS);
    for one in &state.downstreams {
        table.row(vec![
            json!(one.authority),
            json!(one.entry),
            json!(one.node),
            json!(one.generation),
            json!(one.root.get(..16)),
            json!(one.state),
            json!(utc(one.not_after_ms)),
        ]);
    }
    table
}

/// `ambit trust taint AUTHORITY`.
pub(super) async fn taint(session: &Session, authority: String, dry_run: bool) -> Result<Answer, Refusal> {
    let (cell, banner) = session.cell_to_change()?;
    let reply = ask!(cell, LocalAuthority.taint_x509_authority(request(Some(authority.clone()), false, dry_run)?))?;
    Ok(changed(session, &reply.missing, format!("{authority} is tainted"), dry_run).note(banner))
}

/// `ambit trust revoke AUTHORITY`.
pub(super) async fn revoke(
    session: &Session,
    mut request: v1::X509AuthorityRequest,
    approvals: &Approvals,
) -> Result<Answer, Refusal> {
    let (cell, banner) = session.cell_to_change()?;
    let (authority, dry_run) = (request.authority.clone(), request.dry_run);
    // An intermediate is no root: it takes no approvals, and the cell says whether there is one of that name.
    let Ok(root) = fingerprint(&authority) else {
        takes_none(approvals, &authority)?;
        let reply = ask!(cell, LocalAuthority.revoke_x509_authority(request))?;
        return Ok(changed(session, &reply.missing, format!("{authority} is revoked"), dry_run).note(banner));
    };
    let act = Act::RevokeRoot(root);
    request.approved = approved(&cell, &act, &approvals.files)?;
    let done = ask!(cell, LocalAuthority.revoke_x509_authority(request));
    let reply = match or_proposal(&cell, act, approvals, done).await? {
        Outcome::Done(reply) => reply,
        Outcome::Proposed(answer) => return Ok(answer.note(banner)),
    };
    Ok(changed(session, &reply.missing, format!("{authority} is revoked"), dry_run).note(banner))
}

/// Refused where approvals are given for what takes none.
pub(super) fn takes_none(approvals: &Approvals, authority: &str) -> Result<(), Refusal> {
    let Some(file) = approvals.files.first() else { return Ok(()) };
    let found = format!("{} for {authority}", file.display());
    Err(Refusal::new(Code::BadRequest, "approvals of a root's revocation only", found))
}

pub(super) fn changed(session: &Session, missing: &[String], done: String, dry_run: bool) -> Answer {
    let what = match (dry_run, missing.is_empty()) {
        (false, _) => done,
        (true, true) => "it would be done: nobody is missing".to_owned(),
        (true, false) => format!("it would be refused: {}", missing.join(", ")),
    };
    Answer::ok(match session.form {
        Form::Table => what,
        Form::Json => pretty(&json!({"done": !dry_run, "missing": missing})),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root(state: &str, missing: &[&str], using: &[&str]) -> v1::X509Root {
        let names = |all: &[&str]| all.iter().map(|name| (*name).to_owned()).collect();
        v1::X509Root {
            fingerprint: "ab".repeat(32),
            state: state.into(),
            missing: names(missing),
            using: names(using),
            ..Default::default()
        }
    }

    #[test]
    fn what_is_under_way_or_wrong_is_found_and_nothing_else() {
        let of = |root| findings(&v1::X509AuthorityState { roots: vec![root], ..Default::default() }, 0);
        for (root, said) in [
            (root("active", &[], &["replica 1"]), None),
            (root("revoked", &[], &[]), None),
            (root("active", &["node a"], &[]), Some("not held by node a")),
            (root("prepared", &["peer east"], &[]), Some("not held by peer east")),
            (root("prepared", &[], &[]), Some("activate it")),
            (root("old", &[], &["node a"]), Some("taint it")),
            (root("tainted", &[], &["node a"]), Some("under it are node a")),
            (root("tainted", &[], &[]), Some("nothing is under it: revoke it")),
        ] {
            let found = of(root.clone());
            assert_eq!(found.len(), usize::from(said.is_some()), "{root:?}: {found:?}");
            assert!(found.iter().all(|line| line.contains(said.unwrap_or_default())), "{found:?}");
        }
        const NOW: u64 = 10 * WEEK_MS;
        let one = |state: &str, current, left_ms: u64| v1::X509Intermediate {
            state: state.into(),
            replica: 2,
            current,
            not_before_ms: NOW + left_ms - 900,
            not_after_ms: NOW + left_ms,
            ..Default::default()
        };
        let founded = |left_ms: u64| v1::X509Intermediate {
            not_before_ms: 0,
            not_after_ms: NOW + left_ms,
            ..one("active", true, 1)
        };
        for (one, lines) in [
            (founded(WEEK_MS - 1_000), 0),
            (founded(WEEK_MS / 3 - 1_000), 1),
            (one("active", true, 301), 0),
            (one("active", true, 299), 1),
            (one("active", false, 1), 0),
            (one("tainted", true, 600), 1),
            (one("tainted", false, 600), 0),
        ] {
            let state = v1::X509AuthorityState { intermediates: vec![one], ..Default::default() };
            assert_eq!(findings(&state, NOW).len(), lines, "{state:?}");
        }
        for (left_ms, lines) in [(WEEK_MS, 0), (WEEK_MS / 4, 1)] {
            let founded =
                v1::X509Intermediate { not_before_ms: 0, not_after_ms: 9 * WEEK_MS, ..one("active", true, 0) };
            let state = v1::X509AuthorityState { intermediates: vec![founded], ..Default::default() };
            assert_eq!(findings(&state, 9 * WEEK_MS - left_ms).len(), lines, "{left_ms} of the first week left");
        }
    }
}
