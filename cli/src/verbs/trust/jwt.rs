//! JWT authorities as they stand, and their rotation at an operator's word.

use super::rotate::{LOOK, Options, Steps};
use crate::ask;
use crate::cell::{Cell, request_id};
use crate::output::{Answer, Form, Table, pretty};
use crate::verbs::Session;
use crate::when::utc;
use ambit_model::{Code, Refusal};
use ambit_proto::v1;
use serde_json::json;
use std::time::Instant;

/// Whether this names a JWT authority: roots have 64 hexadecimal digits, intermediates 40.
pub(super) fn is_kid(authority: &str) -> bool {
    authority.len() == 32
}

pub(super) async fn state(cell: &Cell) -> Result<v1::JwtAuthorityState, Refusal> {
    ask!(cell, LocalAuthority.get_jwt_authority_state(v1::JwtAuthorityStateRequest {}))
}

fn request(authority: Option<String>, without_acks: bool, dry_run: bool) -> Result<v1::JwtAuthorityRequest, Refusal> {
    let authority = authority.unwrap_or_default();
    Ok(v1::JwtAuthorityRequest { request_id: request_id()?, authority, without_acks, dry_run })
}

/// A bundle's keys. Of a foreign one it is not told which of them signs.
pub(super) fn published(bundle: &v1::Bundle) -> Table {
    let mut table = Table::new("jwt authority", &["kid", "state", "not_after"]);
    for key in &bundle.jwt_authorities {
        let state = if key.state.is_empty() { "published" } else { &key.state };
        table.row(vec![json!(key.kid), json!(state), json!(utc(key.not_after_ms))]);
    }
    table
}

/// All that is known of the own keys.
pub(super) fn table(state: &v1::JwtAuthorityState) -> Table {
    const COLUMNS: &[&str] =
        &["kid", "state", "made", "leaves", "not_after", "acknowledged", "missing", "opened_by", "minted"];
    let mut table = Table::new("jwt authority", COLUMNS);
    for key in &state.authorities {
        table.row(vec![
            json!(key.kid),
            json!(key.state),
            json!(utc(key.made_ms)),
            json!(if key.leaves_ms == 0 { String::new() } else { utc(key.leaves_ms) }),
            json!(utc(key.not_after_ms)),
            json!(format!("{}/{}", key.acked, key.of)),
            json!(key.missing),
            json!(key.opened_by),
            json!(key.minted),
        ]);
    }
    table
}

/// What an operator should know of. A prepared key and an old one are the course of things: both go on by time.
pub(super) fn findings(state: &v1::JwtAuthorityState) -> Vec<String> {
    let mut out = Vec::new();
    for key in &state.authorities {
        match key.state.as_str() {
            "active" if !key.missing.is_empty() => {
                out.push(format!("JWT key {} is not held by {}", key.kid, key.missing.join(", ")));
            }
            "tainted" => out.push(format!("JWT key {} is tainted: revoke it", key.kid)),
            _ => {}
        }
    }
    out
}

/// `ambit trust taint KID`.
pub(super) async fn taint(session: &Session, kid: String, dry_run: bool) -> Result<Answer, Refusal> {
    let (cell, banner) = session.cell_to_change()?;
    let reply = ask!(cell, LocalAuthority.taint_jwt_authority(request(Some(kid.clone()), false, dry_run)?))?;
    Ok(super::authorities::changed(session, &reply.missing, format!("{kid} is tainted"), dry_run).note(banner))
}

/// `ambit trust revoke KID`.
pub(super) async fn revoke(
    session: &Session,
    kid: String,
    without_acks: bool,
    dry_run: bool,
) -> Result<Answer, Refusal> {
    let (cell, banner) = session.cell_to_change()?;
    let reply = ask!(cell, LocalAuthority.revoke_jwt_authority(request(Some(kid.clone()), without_acks, dry_run)?))?;
    Ok(super::authorities::changed(session, &reply.missing, format!("{kid} is revoked"), dry_run).note(banner))
}

/// What is to be done next, by the state alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Prepare,
    Activate,
    Taint,
    Revoke,
}

/// `began_with`: the key that signed when the rotation began. It alone is replaced: another that is old went by time. None
/// of its name, and nothing is left to be done.
fn next(state: &v1::JwtAuthorityState, began_with: &str) -> Option<Step> {
    let is = |kid: &str, wanted: &str| state.authorities.iter().any(|key| key.kid == kid && key.state == wanted);
    let prepared = state.authorities.iter().any(|key| key.state == "prepared");
    match () {
        () if is(began_with, "active") && prepared => Some(Step::Activate),
        () if is(began_with, "active") => Some(Step::Prepare),
        () if is(began_with, "old") => Some(Step::Taint),
        () if is(began_with, "tainted") => Some(Step::Revoke),
        () => None,
    }
}

/// The key to replace: one whose replacement was broken off after it was tainted, else the one that signs.
fn outgoing(state: &v1::JwtAuthorityState) -> Result<String, Refusal> {
    let of = |wanted: &str| state.authorities.iter().find(|key| key.state == wanted).map(|key| key.kid.clone());
    of("tainted").or_else(|| of("active")).ok_or_else(|| {
        Refusal::new(Code::IssuerUnavailable, "a JWT authority that signs", "none: the cell is starting")
    })
}

/// Replaces the key that signs, from the preparation of the next one to its own revocation. Steps are told on standard
/// error as they are done.
pub(super) async fn rotate(session: &Session, options: Options) -> Result<Answer, Refusal> {
    let (cell, banner) = session.cell_to_change()?;
    let first = state(&cell).await?;
    let former = outgoing(&first)?;
    if options.dry_run {
        return plan(session, &cell, next(&first, &former), banner).await;
    }
    let mut steps = Steps::new();
    steps.say(&banner);
    loop {
        match next(&state(&cell).await?, &former) {
            Some(Step::Prepare) => {
                ask!(cell, LocalAuthority.prepare_jwt_authority(request(None, false, false)?))?;
                steps.say("prepared: a new JWT key is in the bundle");
            }
            Some(Step::Activate) => {
                wait(&mut steps, &cell, &options, "prepared").await?;
                ask!(cell, LocalAuthority.activate_jwt_authority(request(None, options.without_acks, false)?))?;
                steps.say("activated: tokens are signed by the new key");
            }
            Some(Step::Taint) => {
                ask!(cell, LocalAuthority.taint_jwt_authority(request(Some(former.clone()), false, false)?))?;
                steps.say("tainted: agents ask for new tokens in place of those by the former key");
            }
            Some(Step::Revoke) => {
                wait(&mut steps, &cell, &options, "active").await?;
                let ask = request(Some(former.clone()), options.without_acks, false)?;
                ask!(cell, LocalAuthority.revoke_jwt_authority(ask))?;
                steps.say("revoked: the former key is out of the bundle, and its tokens are refused");
            }
            None => break,
        }
    }
    let active = state(&cell).await?.authorities.into_iter().find(|key| key.state == "active").unwrap_or_default();
    let text = match session.form {
        Form::Table => format!("JWT key: {}", active.kid),
        Form::Json => pretty(&json!({"kid": active.kid, "revoked": former, "steps": steps.done})),
    };
    Ok(Answer::ok(text)
        .note("outsiders who fetch the bundle or the OIDC keys believe the former one until they do so again"))
}

/// Waits until nobody is waited for at the key in that state.
async fn wait(steps: &mut Steps, cell: &Cell, options: &Options, wanted: &str) -> Result<(), Refusal> {
    let until = Instant::now() + options.wait;
    let mut told = None;
    loop {
        let now = state(cell).await?;
        let Some(found) = now.authorities.iter().find(|key| key.state == wanted) else {
            let expected = format!("a JWT authority that is {wanted}");
            return Err(Refusal::new(Code::RootState, expected, "none: somebody else rotates too"));
        };
        let late = Instant::now() > until;
        if found.missing.is_empty() || (options.without_acks && late) {
            return Ok(());
        }
        if late {
            let expected = format!("nobody to be waited for after {} s", options.wait.as_secs());
            return Err(Refusal::new(Code::AcksMissing, expected, found.missing.join(", ")));
        }
        if told.as_ref() != Some(&found.missing) {
            let names = found.missing.iter().take(4).cloned().collect::<Vec<_>>().join(", ");
            let (acked, of, waiting) = (found.acked, found.of, found.missing.len());
            steps.say(&format!("{wanted}: {acked}/{of} acknowledged, waiting for {waiting}: {names}"));
            told = Some(found.missing.clone());
        }
        tokio::time::sleep(LOOK).await;
    }
}

async fn plan(session: &Session, cell: &Cell, step: Option<Step>, banner: String) -> Result<Answer, Refusal> {
    let (word, missing) = match step {
        Some(Step::Prepare) => ("prepare", Vec::new()),
        Some(Step::Activate) => {
            let ask = request(None, false, true)?;
            ("activate", ask!(cell, LocalAuthority.activate_jwt_authority(ask))?.missing)
        }
        Some(Step::Taint) => ("taint", Vec::new()),
        Some(Step::Revoke) => {
            let ask = request(None, false, true)?;
            ("revoke", ask!(cell, LocalAuthority.revoke_jwt_authority(ask))?.missing)
        }
        None => ("nothing", Vec::new()),
    };
    let text = match session.form {
        Form::Table if missing.is_empty() => format!("next: {word}"),
        Form::Table => format!("next: {word}, once there are {}", missing.join(", ")),
        Form::Json => pretty(&json!({"next": word, "missing": missing})),
    };
    Ok(Answer::ok(text).note(banner))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(keys: &[(&str, &str)]) -> v1::JwtAuthorityState {
        let key = |(kid, state): &(&str, &str)| v1::JwtKey {
            kid: (*kid).to_owned(),
            state: (*state).to_owned(),
            ..Default::default()
        };
        v1::JwtAuthorityState { authorities: keys.iter().map(key).collect(), ..Default::default() }
    }

    #[test]
    fn the_key_that_signed_is_replaced_step_by_step_and_no_other() {
        for (keys, begin, step) in [
            (&[("a", "active")][..], "a", Some(Step::Prepare)),
            (&[("z", "old"), ("a", "active")], "a", Some(Step::Prepare)),
            (&[("z", "old"), ("a", "active"), ("b", "prepared")], "a", Some(Step::Activate)),
            (&[("z", "old"), ("a", "old"), ("b", "active")], "a", Some(Step::Taint)),
            (&[("z", "old"), ("a", "tainted"), ("b", "active")], "a", Some(Step::Revoke)),
            (&[("z", "old"), ("a", "revoked"), ("b", "active")], "a", None),
            (&[("z", "old"), ("b", "active")], "a", None),
        ] {
            assert_eq!(next(&state(keys), begin), step, "{keys:?}");
        }
        assert_eq!(outgoing(&state(&[("z", "old"), ("a", "active")])).ok().as_deref(), Some("a"));
        assert_eq!(outgoing(&state(&[("a", "tainted"), ("b", "active")])).ok().as_deref(), Some("a"));
        assert!(outgoing(&state(&[])).is_err());
    }

    #[test]
    fn what_goes_on_by_itself_is_no_finding() {
        for (one, missing, found) in [
            ("active", false, 0),
            ("active", true, 1),
            ("prepared", true, 0),
            ("old", false, 0),
            ("tainted", false, 1),
            ("revoked", false, 0),
        ] {
            let mut state = state(&[("a", one)]);
            state.authorities[0].missing = missing.then(|| "node x".to_owned()).into_iter().collect();
            assert_eq!(findings(&state).len(), found, "{one} {missing}");
        }
    }
}
