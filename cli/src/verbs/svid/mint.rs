//! `ambit svid mint`: the key is made here and never leaves this machine.

use crate::args::SvidMint;
use crate::ask;
use crate::cell::{Cell, request_id, seconds};
use crate::output::{Answer, Form, Table, pretty};
use crate::verbs::Session;
use crate::when::utc;
use ambit_identity::SvidKey;
use ambit_identity::keys::certificates_to_pem;
use ambit_model::{Code, Refusal};
use ambit_proto::v1;
use serde_json::json;
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::Path;

pub(super) async fn run(session: &Session, options: SvidMint) -> Result<Answer, Refusal> {
    let (cell, banner) = session.cell_to_change()?;
    let answer = match &options.out {
        Some(folder) => certificate(session, &cell, &options, folder).await?,
        None => token(session, &cell, options).await?,
    };
    Ok(answer.note(banner))
}

async fn certificate(session: &Session, cell: &Cell, options: &SvidMint, folder: &Path) -> Result<Answer, Refusal> {
    let key = SvidKey::generate()?;
    let request = v1::MintX509svidRequest {
        request_id: request_id()?,
        spiffe_id: options.spiffe_id.to_string(),
        csr: key.csr()?,
        dns_names: options.dns_names.clone(),
        ttl_seconds: options.ttl.map(seconds).transpose()?.unwrap_or(0),
    };
    // What cannot be kept is not asked for: the certificate would be of a key that is lost.
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(|e| refused(folder, &e))?;
    write_new(&folder.join("svid.key"), key.pem().as_bytes())?;
    let minted = ask!(cell, Svid.mint_x509svid(request))?;
    let trust_domain = options.spiffe_id.trust_domain().to_string();
    let bundle = ask!(cell, BundleRegistry.get_bundle(v1::GetBundleRequest { trust_domain }))?;
    let pem = |all: &[Vec<u8>]| certificates_to_pem(all.iter().map(Vec::as_slice));
    write_new(&folder.join("svid.pem"), pem(&minted.chain_der).as_bytes())?;
    write_new(&folder.join("bundle.pem"), pem(&bundle.roots_der).as_bytes())?;
    let mut table = Table::new("svid", &["spiffe_id", "until", "folder"]);
    let until = utc(minted.not_after_ms);
    table.row(vec![json!(options.spiffe_id.as_str()), json!(until), json!(folder.display().to_string())]);
    Ok(Answer::ok(table.render(session.form)))
}

/// The token alone, so that it can be piped to whoever needs it.
async fn token(session: &Session, cell: &Cell, options: SvidMint) -> Result<Answer, Refusal> {
    let request = v1::MintJwtsvidRequest {
        request_id: request_id()?,
        spiffe_id: options.spiffe_id.to_string(),
        audience: options.audience,
        ttl_seconds: options.ttl.map(seconds).transpose()?.unwrap_or(0),
    };
    let minted = ask!(cell, Svid.mint_jwtsvid(request))?;
    Ok(Answer::ok(match session.form {
        Form::Table => minted.token,
        Form::Json => pretty(&json!({
            "token": minted.token, "spiffe_id": minted.spiffe_id, "until": utc(minted.expires_at_ms),
        })),
    }))
}

/// Never over a file that is there: it may be the only copy of a key.
fn write_new(path: &Path, bytes: &[u8]) -> Result<(), Refusal> {
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(|e| refused(path, &e))?;
    file.write_all(bytes).map_err(|e| refused(path, &e))
}

fn refused(path: &Path, e: &std::io::Error) -> Refusal {
    Refusal::new(Code::BadRequest, format!("a new file {}", path.display()), e.to_string())
}
