//! `ambit admin`.

use super::Session;
use super::renewal::renewed;
use crate::args::{Admin, Administrator};
use crate::cell::request_id;
use crate::context::read_bounded;
use crate::exit::file_refusal;
use crate::output::{Answer, Table};
use crate::pair::{Locked, Validity, write_private};
use crate::when::utc;
use crate::{ask, ask_at};
use ambit_identity::SvidKey;
use ambit_identity::keys::{certificates_from_pem, certificates_to_pem, csr_to_pem};
use ambit_model::{AdminRole, Code, ObjectName, Refusal};
use ambit_proto::v1;
use serde_json::json;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use zeroize::Zeroizing;

/// A key whose certificate is asked for elsewhere.
const REQUESTED: &str = "request.key";
/// A key or a chain is a few kilobytes of PEM.
const PEM_BYTES_MAX: u64 = 64 * 1024;

pub(super) async fn run(session: &Session, verb: Admin) -> Result<Answer, Refusal> {
    match verb {
        Admin::List => {
            let cell = session.cell()?;
            let reply = ask!(cell, Administrators.list_admins(v1::ListAdminsRequest {}))?;
            Ok(Answer::ok(table(&reply.admins).render(session.form)))
        }
        Admin::Grant { name, roles } => {
            let request = v1::ChangeRolesRequest { grant: texts(&roles), ..change(&name)? };
            changed(session, request).await
        }
        Admin::Revoke { name, roles, all } => {
            let request = v1::ChangeRolesRequest { revoke: texts(&roles), revoke_all: all, ..change(&name)? };
            changed(session, request).await
        }
        Admin::Issue { name, out } => issue(session, &name, &out).await,
        Admin::Renew => renew(session).await,
        Admin::Request => request(session),
        Admin::Install { certificate } => install(session, &certificate),
        Admin::Refusals => refusals(session).await,
    }
}

fn texts(roles: &[AdminRole]) -> Vec<String> {
    roles.iter().map(ToString::to_string).collect()
}

fn change(name: &Administrator) -> Result<v1::ChangeRolesRequest, Refusal> {
    Ok(v1::ChangeRolesRequest { request_id: request_id()?, name: name.to_string(), ..Default::default() })
}

async fn changed(session: &Session, request: v1::ChangeRolesRequest) -> Result<Answer, Refusal> {
    let (cell, banner) = session.cell_to_change()?;
    let admin = ask!(cell, Administrators.change_roles(request))?;
    Ok(Answer::ok(table(&[admin]).render_one(session.form)).note(banner))
}

fn table(admins: &[v1::Admin]) -> Table {
    let mut table = Table::new("admin", &["name", "roles", "changed", "changed_by", "break_glass"]);
    for a in admins {
        let changed = if a.changed_ms == 0 { String::new() } else { utc(a.changed_ms) };
        let glass = if a.break_glass_ms == 0 { String::new() } else { utc(a.break_glass_ms) + " " + &a.break_glass };
        table.row(vec![json!(a.name), json!(a.roles), json!(changed), json!(a.changed_by), json!(glass)]);
    }
    table
}

async fn issue(session: &Session, name: &ObjectName, out: &Path) -> Result<Answer, Refusal> {
    let (cell, banner) = session.cell_to_change()?;
    // Made before the cell is asked: where the key cannot be kept nothing is certified.
    std::fs::DirBuilder::new().mode(0o700).create(out).map_err(|e| file_refusal(out, &e))?;
    let key = SvidKey::generate()?;
    let request = v1::CertifyAdminRequest { request_id: request_id()?, name: name.to_string(), csr: key.csr()? };
    let reply = ask!(cell, Administrators.certify_admin(request))?;
    let context = cell.context();
    if ambit_identity::fingerprint(&reply.root_der) != context.fingerprint {
        let found = hex::encode(ambit_identity::fingerprint(&reply.root_der));
        return Err(Refusal::new(Code::FingerprintMismatch, hex::encode(context.fingerprint), found));
    }
    let text = json!({
        "trust_domain": context.trust_domain.as_str(),
        "fingerprint": hex::encode(context.fingerprint),
        "addresses": context.addresses.iter().map(ToString::to_string).collect::<Vec<_>>(),
    });
    write_private(&out.join("admin.key"), key.pem().as_bytes())?;
    write_private(&out.join("admin.pem"), pem(&reply.chain_der).as_bytes())?;
    write_private(&out.join("root.pem"), pem(&[reply.root_der]).as_bytes())?;
    write_private(&out.join("context.json"), text.to_string().as_bytes())?;
    Ok(Answer::ok(certified(session, name.as_str(), out, reply.not_after_ms)).note(banner))
}

async fn renew(session: &Session) -> Result<Answer, Refusal> {
    let (cell, banner) = session.cell_to_change()?;
    let folder = &cell.context().folder;
    let not_after_ms = renewed(&cell, &Locked::wait(folder)?).await?;
    Ok(Answer::ok(certified(session, "self", folder, not_after_ms)).note(banner))
}

/// The request for a key that waits in the folder for its certificate. The same again is the same key: an approver may have
/// signed for it.
fn request(session: &Session) -> Result<Answer, Refusal> {
    let context = session.context()?;
    let locked = Locked::wait(&context.folder)?;
    let file = context.folder.join(REQUESTED);
    let key = if file.exists() {
        SvidKey::from_pem(&Zeroizing::new(read_bounded(&file, PEM_BYTES_MAX)?))?
    } else {
        let key = SvidKey::generate()?;
        locked.replace(REQUESTED, key.pem().as_bytes())?;
        key
    };
    let hint = "give this to ambitd admin break-glass on a replica; its key stays here until ambit admin install";
    Ok(Answer::ok(csr_to_pem(&key.csr()?).trim_end()).note(hint))
}

/// Puts a certificate for the key of [`request`] in its place.
fn install(session: &Session, file: &Path) -> Result<Answer, Refusal> {
    let context = session.context()?;
    let chain = certificates_from_pem(&read_bounded(file, PEM_BYTES_MAX)?)?;
    let locked = Locked::wait(&context.folder)?;
    let requested = context.folder.join(REQUESTED);
    let key = SvidKey::from_pem(&Zeroizing::new(read_bounded(&requested, PEM_BYTES_MAX)?))?;
    locked.install(&chain, &key)?;
    std::fs::remove_file(&requested).map_err(|e| file_refusal(&requested, &e))?;
    let not_after_ms = Validity::of(&chain)?.not_after_ms;
    Ok(Answer::ok(certified(session, "self", &context.folder, not_after_ms)).note(context.banner()))
}

fn certified(session: &Session, name: &str, folder: &Path, not_after_ms: u64) -> String {
    let mut table = Table::new("certificate", &["name", "context", "not_after"]);
    let context = folder.join("context.json").display().to_string();
    table.row(vec![json!(name), json!(context), json!(utc(not_after_ms))]);
    table.render_one(session.form)
}

async fn refusals(session: &Session) -> Result<Answer, Refusal> {
    let cell = session.cell()?;
    let columns: &[&str] = &["caller", "method", "code", "count", "first", "last", "replica"];
    let (mut table, mut notes) = (Table::new("refusal", columns), Vec::new());
    for address in &cell.context().addresses {
        let reply = match ask_at!(cell, *address, Audit.list_refusals(v1::ListRefusalsRequest {})) {
            Ok(reply) => reply,
            Err(refusal) if refusal.code == Code::Unavailable => {
                notes.push(format!("{address} did not answer; what it refused is not shown"));
                continue;
            }
            Err(refusal) => return Err(refusal),
        };
        if reply.unlogged + reply.forgotten > 0 {
            let v1::ListRefusalsResponse { replica, unlogged, forgotten, .. } = &reply;
            let left_out = format!("{unlogged} refusals without a line in its log, {forgotten} without a row");
            notes.push(format!("replica {replica}: {left_out}"));
        }
        for r in reply.refused {
            let (first, last) = (utc(r.first_ms), utc(r.last_ms));
            table.row(vec![
                json!(r.caller),
                json!(r.method),
                json!(r.code),
                json!(r.count),
                json!(first),
                json!(last),
                json!(reply.replica),
            ]);
        }
    }
    Ok(notes.into_iter().fold(Answer::ok(table.render(session.form)), Answer::note))
}

fn pem(chain_der: &[Vec<u8>]) -> String {
    certificates_to_pem(chain_der.iter().map(Vec::as_slice))
}
