//! `ambit admin`.

use super::Session;
use crate::args::{Admin, Administrator};
use crate::cell::request_id;
use crate::exit::file_refusal;
use crate::output::{Answer, Table};
use crate::when::utc;
use crate::{ask, ask_at};
use ambit_identity::SvidKey;
use ambit_identity::keys::certificates_to_pem;
use ambit_model::{AdminRole, Code, ObjectName, Refusal};
use ambit_proto::v1;
use serde_json::json;
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

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
    let mut table = Table::new("admin", &["name", "roles", "changed", "changed_by"]);
    for a in admins {
        let changed = if a.changed_ms == 0 { String::new() } else { utc(a.changed_ms) };
        table.row(vec![json!(a.name), json!(a.roles), json!(changed), json!(a.changed_by)]);
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

/// Key and certificate belong together, so both are written aside before either takes the place of the old one.
async fn renew(session: &Session) -> Result<Answer, Refusal> {
    let (cell, banner) = session.cell_to_change()?;
    let key = SvidKey::generate()?;
    let request = v1::RenewAdminRequest { request_id: request_id()?, csr: key.csr()? };
    let reply = ask!(cell, Svid.renew_admin(request))?;
    let folder = &cell.context().folder;
    let (new_key, new_pem) = (folder.join("admin.key.new"), folder.join("admin.pem.new"));
    write_private(&new_key, key.pem().as_bytes())?;
    write_private(&new_pem, pem(&reply.chain_der).as_bytes())?;
    for (new, name) in [(&new_key, "admin.key"), (&new_pem, "admin.pem")] {
        std::fs::rename(new, folder.join(name)).map_err(|e| file_refusal(new, &e))?;
    }
    Ok(Answer::ok(certified(session, "self", folder, reply.not_after_ms)).note(banner))
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
    let (mut table, mut silent) = (Table::new("refusal", columns), Vec::new());
    for address in &cell.context().addresses {
        let reply = match ask_at!(cell, *address, Audit.list_refusals(v1::ListRefusalsRequest {})) {
            Ok(reply) => reply,
            Err(refusal) if refusal.code == Code::Unavailable => {
                silent.push(format!("{address} did not answer; what it refused is not shown"));
                continue;
            }
            Err(refusal) => return Err(refusal),
        };
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
    Ok(silent.into_iter().fold(Answer::ok(table.render(session.form)), Answer::note))
}

fn pem(chain_der: &[Vec<u8>]) -> String {
    certificates_to_pem(chain_der.iter().map(Vec::as_slice))
}

/// Writes a new file of mode 0600.
fn write_private(path: &Path, bytes: &[u8]) -> Result<(), Refusal> {
    let opened = std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path);
    let mut file = opened.map_err(|e| file_refusal(path, &e))?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(|e| file_refusal(path, &e))
}
