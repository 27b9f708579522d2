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

/// What is to be done next.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Step {
    /// A key that was to sign next leaves: who stole another may have it too.
    Drop(String),
    Prepare,
    Activate,
    Taint(String),
    Revoke(String),
}

/// `before`: the keys that were published when the rotation began. In the end none of them is.
fn next(state: &v1::JwtAuthorityState, before: &[String]) -> Option<Step> {
    let of = |wanted: &'static str| {
        state.authorities.iter().filter(move |key| key.state == wanted).map(|key| key.kid.clone())
    };
    let former = |wanted| of(wanted).find(|kid| before.contains(kid));
    let signs = former("active").map(|_| if of("prepared").next().is_some() { Step::Activate } else { Step::Prepare });
    former("prepared")
        .map(Step::Drop)
        .or(signs)
        .or_else(|| former("old").map(Step::Taint))
        .or_else(|| former("tainted").map(Step::Revoke))
}

fn published_now(state: &v1::JwtAuthorityState) -> Result<Vec<String>, Refusal> {
    if !state.authorities.iter().any(|key| key.state == "active") {
        let found = "none: the cell is starting";
        return Err(Refusal::new(Code::IssuerUnavailable, "a JWT authority that signs", found));
    }
    Ok(state.authorities.iter().filter(|key| key.state != "revoked").map(|key| key.kid.clone()).collect())
}

/// Replaces the keys that are published, whichever of them a thief may have. Where it is broken off, whoever begins again
/// replaces what is there then. Steps are told on standard error as they are done.
pub(super) async fn rotate(session: &Session, options: Options) -> Result<Answer, Refusal> {
    let (cell, banner) = session.cell_to_change()?;
    let first = state(&cell).await?;
    let before = published_now(&first)?;
    if options.dry_run {
        return plan(session, &cell, next(&first, &before), banner).await;
    }
    let mut steps = Steps::new();
    steps.say(&banner);
    while let Some(step) = next(&state(&cell).await?, &before) {
        match step {
            Step::Drop(kid) => {
                ask!(cell, LocalAuthority.revoke_jwt_authority(request(Some(kid.clone()), true, false)?))?;
                steps.say(&format!("dropped: {kid} was to sign next, and will not"));
            }
            Step::Prepare => {
                ask!(cell, LocalAuthority.prepare_jwt_authority(request(None, false, false)?))?;
                steps.say("prepared: a new JWT key is in the bundle");
            }
            Step::Activate => {
                wait(&mut steps, &cell, &options, "prepared").await?;
                let ask = request(None, options.without_acks, false)?;
                match ask!(cell, LocalAuthority.activate_jwt_authority(ask)) {
                    Err(refusal) if steps.joined_since(&refusal, &options) => {
                        tokio::time::sleep(LOOK).await;
                        continue;
                    }
                    done => drop(done?),
                }
                steps.say("activated: tokens are signed by the new key");
            }
            Step::Taint(kid) => {
                ask!(cell, LocalAuthority.taint_jwt_authority(request(Some(kid), false, false)?))?;
                steps.say("tainted: agents ask for new tokens in place of those by the former key");
            }
            Step::Revoke(kid) => {
                wait(&mut steps, &cell, &options, "active").await?;
                let ask = request(Some(kid), options.without_acks, false)?;
                match ask!(cell, LocalAuthority.revoke_jwt_authority(ask)) {
                    Err(refusal) if steps.joined_since(&refusal, &options) => {
                        tokio::time::sleep(LOOK).await;
                        continue;
                    }
                    done => drop(done?),
                }
                steps.say("revoked: the former key is out of the bundle, and its tokens are refused");
            }
        }
    }
    let active = state(&cell).await?.authorities.into_iter().find(|key| key.state == "active").unwrap_or_default();
    let text = match session.form {
        Form::Table => format!("JWT key: {}", active.kid),
        Form::Json => pretty(&json!({"kid": active.kid, "revoked": before, "steps": steps.done})),
    };
    Ok(Answer::ok(text)
        .note("outsiders who fetch the bundle or the OIDC keys believe the former ones until they do so again"))
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
        Some(Step::Drop(_)) => ("drop what was to sign next", Vec::new()),
        Some(Step::Taint(_)) => ("taint", Vec::new()),
        Some(Step::Revoke(kid)) => {
            let ask = request(Some(kid), false, true)?;
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
    fn none_of_the_keys_that_were_published_is_left_wherever_one_begins() {
        for keys in [
            &[("a", "active")][..],
            &[("z", "old"), ("a", "active")],
            &[("a", "active"), ("b", "prepared")],
            &[("y", "tainted"), ("z", "old"), ("a", "active"), ("b", "prepared")],
            &[("a", "tainted"), ("b", "active")],
        ] {
            let mut keys: Vec<(String, String)> = keys.iter().map(|(k, s)| ((*k).into(), (*s).into())).collect();
            let shown = |keys: &[(String, String)]| {
                state(&keys.iter().map(|(k, s)| (k.as_str(), s.as_str())).collect::<Vec<_>>())
            };
            let before = published_now(&shown(&keys)).unwrap();
            let put = |keys: &mut Vec<(String, String)>, from: &str, to: &str| {
                keys.iter_mut().filter(|(kid, state)| kid == from || state == from).for_each(|(_, s)| *s = to.into());
            };
            let mut steps = 0;
            // As the cell does it.
            while let Some(step) = next(&shown(&keys), &before) {
                match step {
                    Step::Drop(kid) | Step::Revoke(kid) => put(&mut keys, &kid, "revoked"),
                    Step::Taint(kid) => put(&mut keys, &kid, "tainted"),
                    Step::Prepare => keys.push(("new".into(), "prepared".into())),
                    Step::Activate => {
                        put(&mut keys, "active", "old");
                        put(&mut keys, "prepared", "active");
                    }
                }
                steps += 1;
                assert!(steps < 20, "{keys:?}");
            }
            assert_eq!(published_now(&shown(&keys)).unwrap(), ["new"], "{keys:?}");
        }
        assert!(published_now(&state(&[])).is_err());
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
