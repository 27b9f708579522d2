//! `ambit trust external`: the cell's authority under a root that somebody else keeps. Its key never leaves the cell, and the
//! root's key never comes near it.

use super::authorities::request;
use crate::args::{External, ImportExternal};
use crate::ask;
use crate::cell::request_id;
use crate::context::read_bounded;
use crate::exit::file_refusal;
use crate::output::{Answer, Form, Table, pretty};
use crate::verbs::Session;
use crate::verbs::approver::{Outcome, approved, or_proposal};
use crate::when::utc;
use ambit_identity::keys::{certificates_from_pem, csr_to_pem};
use ambit_identity::{fingerprint, profile};
use ambit_model::{Act, Code, Refusal};
use ambit_proto::v1;
use serde_json::json;
use sha2::{Digest, Sha256};
use std::io::Write;
use std::path::Path;

/// A chain in PEM, as CAs write it with the text of each certificate.
const FILE_BYTES_MAX: u64 = 256 * 1024;

pub(super) async fn run(session: &Session, verb: External) -> Result<Answer, Refusal> {
    match verb {
        External::Csr { out } => csr(session, out.as_deref()).await,
        External::Import(options) => import(session, options).await,
        External::Withdraw => withdraw(session).await,
    }
}

async fn csr(session: &Session, out: Option<&Path>) -> Result<Answer, Refusal> {
    let (cell, banner) = session.cell_to_change()?;
    let ask = v1::ExternalAuthorityRequest { request_id: request_id()? };
    let waiting = ask!(cell, LocalAuthority.request_external_authority(ask))?;
    let pem = csr_to_pem(&waiting.csr_der);
    if let Some(out) = out {
        // Never over another file; the same again is the same request.
        let there = out.exists() && std::fs::read(out).is_ok_and(|text| text == pem.as_bytes());
        if !there {
            let opened = std::fs::OpenOptions::new().write(true).create_new(true).open(out);
            let written = opened.and_then(|mut file| file.write_all(pem.as_bytes()).and_then(|()| file.sync_all()));
            written.map_err(|e| file_refusal(out, &e))?;
        }
    }
    let text = match (session.form, out) {
        (Form::Json, _) => pretty(&json!({"authority": waiting.authority, "made": utc(waiting.made_ms), "csr": pem})),
        (Form::Table, None) => pem,
        (Form::Table, Some(out)) => format!("request of authority {} in {}", waiting.authority, out.display()),
    };
    let hint = "have the CA sign it as a CA certificate for 30-90 days with the request's SAN, usages and pathLen 1; then \
                ambit trust external import";
    Ok(Answer::ok(text).note(hint).note(banner))
}

async fn withdraw(session: &Session) -> Result<Answer, Refusal> {
    let (cell, banner) = session.cell_to_change()?;
    let ask = v1::ExternalAuthorityRequest { request_id: request_id()? };
    let gone = ask!(cell, LocalAuthority.withdraw_external_authority(ask))?;
    let text = match session.form {
        Form::Json => pretty(&json!({"authority": gone.authority, "withdrawn": true})),
        Form::Table => format!("authority {} waits for no certificate any more: its key is forgotten", gone.authority),
    };
    Ok(Answer::ok(text).note(banner))
}

/// Certificates of a PEM file that holds nothing secret: a root's key has no business here.
fn certificates(file: &Path) -> Result<Vec<Vec<u8>>, Refusal> {
    let text = read_bounded(file, FILE_BYTES_MAX)?;
    if text.contains("PRIVATE KEY-----") {
        let expected = format!("certificates only in {}: keep the key where it was", file.display());
        return Err(Refusal::new(Code::BadRequest, expected, "a private key"));
    }
    Ok(certificates_from_pem(&text)?.into_iter().map(|der| der.to_vec()).collect())
}

async fn import(session: &Session, options: ImportExternal) -> Result<Answer, Refusal> {
    let (cell, banner) = session.cell_to_change()?;
    let roots = certificates(&options.root)?;
    let [root] = roots.as_slice() else {
        return Err(Refusal::new(Code::BadRequest, "one root certificate", roots.len().to_string()));
    };
    // Many CAs hand out a chain with the root at its end.
    let mut chain = certificates(&options.certificate)?;
    chain.retain(|der| der != root);
    let first = chain.first().ok_or_else(|| Refusal::new(Code::BadRequest, "a certificate beside the root", "none"))?;
    let key: [u8; 32] = Sha256::digest(profile::certificate(first)?.public_key().raw).into();
    let act = Act::ImportRoot(fingerprint(root), key);
    let ask = v1::ImportExternalAuthorityRequest {
        request_id: request_id()?,
        chain_der: chain,
        root_der: root.clone(),
        dry_run: options.dry_run,
        approved: approved(&cell, &act, &options.approvals.files)?,
    };
    let done = ask!(cell, LocalAuthority.import_external_authority(ask));
    let reply = match or_proposal(&cell, act, &options.approvals, done).await? {
        Outcome::Done(reply) => reply.state.unwrap_or_default(),
        Outcome::Proposed(answer) => return Ok(answer.note(banner)),
    };
    let id = hex::encode(fingerprint(root));
    let of = reply.roots.iter().find(|one| one.fingerprint == id).map(|one| one.state.clone()).unwrap_or_default();
    let signs = signs_under(&reply, &id);
    let text = match session.form {
        Form::Json => pretty(&json!({
            "root": id, "state": of, "authority": signs.authority, "not_after": utc(signs.not_after_ms),
            "done": !options.dry_run,
        })),
        Form::Table if options.dry_run => "it would be done: the certificates are as they must be".to_owned(),
        Form::Table => format!("root {id} is {of}: authority {} until {}", signs.authority, utc(signs.not_after_ms)),
    };
    let answer = Answer::ok(text).note(banner);
    Ok(match of.as_str() {
        "prepared" => answer.note("nothing is signed under it yet: ambit trust rotate goes on from here"),
        _ => answer,
    })
}

/// The authority that signs under this root and no other: two external ones may be there at once.
fn signs_under(state: &v1::X509AuthorityState, root: &str) -> v1::X509External {
    let mut externals = state.roots.iter().filter(|one| one.fingerprint == root).flat_map(|one| &one.externals);
    externals.rfind(|one| one.signs).cloned().unwrap_or_default()
}

/// The cell's authorities under external roots, the one that signs last.
pub(super) fn table(state: &v1::X509AuthorityState) -> Table {
    const COLUMNS: &[&str] = &["authority", "root", "signs", "not_before", "not_after", "imported"];
    let mut table = Table::new("external", COLUMNS);
    for root in &state.roots {
        for one in &root.externals {
            table.row(vec![
                json!(one.authority),
                json!(root.fingerprint.get(..16)),
                json!(one.signs),
                json!(utc(one.not_before_ms)),
                json!(utc(one.not_after_ms)),
                json!(utc(one.imported_ms)),
            ]);
        }
    }
    table
}

/// What an operator should do about authorities under external roots, in good time: a third of their life is left then.
pub(super) fn findings(state: &v1::X509AuthorityState, now_ms: u64) -> Vec<String> {
    let mut out = Vec::new();
    let signing = state.roots.iter().flat_map(|root| root.externals.iter().filter(|one| one.signs));
    for one in signing {
        let life = one.not_after_ms.saturating_sub(one.not_before_ms);
        let left = one.not_after_ms.saturating_sub(now_ms);
        if left < life / 3 {
            let ends = utc(one.not_after_ms);
            out.push(format!(
                "the authority {} under an external root ends {ends}, and with it all that it signed: renew it (ambit \
                 trust external csr, then import)",
                one.authority
            ));
        }
    }
    if let Some(waiting) = &state.waiting {
        let since = utc(waiting.made_ms);
        out.push(format!("authority {} waits for its external certificate since {since}", waiting.authority));
    }
    out
}

/// A preparation of a root with a key in the cell, whatever root is active.
pub(super) fn own_root() -> Result<v1::X509AuthorityRequest, Refusal> {
    Ok(v1::X509AuthorityRequest { own_root: true, ..request(None, false, false)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_of_an_import_is_of_the_imported_root() {
        let root = |name: &str, authority: &str| {
            let one =
                |signs| v1::X509External { signs, authority: format!("{authority}{signs}"), ..Default::default() };
            v1::X509Root { fingerprint: name.into(), externals: vec![one(false), one(true)], ..Default::default() }
        };
        let state = v1::X509AuthorityState { roots: vec![root("r1", "a"), root("r2", "b")], ..Default::default() };
        let named = |root| signs_under(&state, root).authority;
        assert_eq!((named("r1"), named("r2"), named("r3")), ("atrue".into(), "btrue".into(), String::new()));
    }

    #[test]
    fn an_authority_is_found_when_a_third_of_its_life_is_left_and_only_the_one_that_signs() {
        const DAY_MS: u64 = 86_400_000;
        let one = |signs, left_days: u64| v1::X509External {
            signs,
            not_before_ms: 1_000 * DAY_MS + left_days * DAY_MS - 90 * DAY_MS,
            not_after_ms: 1_000 * DAY_MS + left_days * DAY_MS,
            ..Default::default()
        };
        for (externals, waiting, lines) in [
            (vec![one(true, 31)], false, 0),
            (vec![one(true, 29)], false, 1),
            (vec![one(true, 0)], false, 1),
            (vec![one(false, 1), one(true, 60)], false, 0),
            (vec![], true, 1),
            (vec![one(true, 29)], true, 2),
        ] {
            let root = v1::X509Root { state: "active".into(), externals, ..Default::default() };
            let waiting = waiting.then(v1::ExternalAuthority::default);
            let state = v1::X509AuthorityState { roots: vec![root], waiting, ..Default::default() };
            assert_eq!(findings(&state, 1_000 * DAY_MS).len(), lines, "{state:?}");
        }
    }
}
