//! `ambit trust` and `ambit identity`.

mod authorities;
mod external;
mod jwt;
mod rotate;
mod seal;

use super::Session;
use crate::args::{Identity, Trust};
use crate::ask;
use crate::context::{fingerprint, read_bounded};
use crate::output::{Answer, Form, Table, pretty};
use crate::when::utc;
use ambit_identity::keys::certificates_to_pem;
use ambit_model::{Code, Refusal};
use ambit_proto::v1;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::path::Path;

/// A root certificate with its PEM lines; no key is longer than RSA's.
const ROOT_BYTES_MAX: u64 = 64 * 1024;

pub(super) async fn trust(session: &Session, verb: Trust) -> Result<Answer, Refusal> {
    match verb {
        Trust::Show { trust_domain, pem } => show(session, trust_domain, pem).await,
        Trust::Check => authorities::check(session).await,
        Trust::Seal { dry_run } => seal::seal(session, dry_run).await,
        Trust::Shares(options) => seal::shares(session, options).await,
        Trust::HolderKey { out } => seal::holder_key(&out),
        Trust::OpenShare(options) => seal::open_share(&options),
        Trust::Taint { authority, dry_run } if jwt::is_kid(&authority) => jwt::taint(session, authority, dry_run).await,
        Trust::Taint { authority, dry_run } => authorities::taint(session, authority, dry_run).await,
        Trust::Revoke { authority, without_acks, dry_run, unknown: false, approvals } if jwt::is_kid(&authority) => {
            authorities::takes_none(&approvals, &authority)?;
            jwt::revoke(session, authority, without_acks, dry_run).await
        }
        Trust::Revoke { authority, without_acks, dry_run, unknown, approvals } => {
            let request = authorities::request(Some(authority), without_acks, dry_run)?;
            authorities::revoke(session, v1::X509AuthorityRequest { unknown, ..request }, &approvals).await
        }
        Trust::External(verb) => external::run(session, verb).await,
        Trust::Rotate { jwt, wait, without_acks, dry_run, own } => {
            let options = rotate::Options { wait: wait.duration(), without_acks, dry_run, own };
            if jwt { jwt::rotate(session, options).await } else { rotate::rotate(session, options).await }
        }
    }
}

async fn show(session: &Session, trust_domain: Option<String>, pem: bool) -> Result<Answer, Refusal> {
    let cell = session.cell()?;
    let own = cell.context().trust_domain.to_string();
    let trust_domain = trust_domain.unwrap_or_else(|| own.clone());
    let bundle = ask!(cell, BundleRegistry.get_bundle(v1::GetBundleRequest { trust_domain: trust_domain.clone() }))?;
    if pem {
        let text = certificates_to_pem(bundle.roots_der.iter().map(Vec::as_slice));
        return Ok(Answer::ok(match session.form {
            Form::Table => text,
            Form::Json => pretty(&json!({"trust_domain": bundle.trust_domain, "roots_pem": text})),
        }));
    }
    let (fingerprint, form, approvers) = if trust_domain == own {
        let status = ask!(cell, Membership.status(v1::StatusRequest {}))?;
        (status.fingerprint, status.root_form, json!(status.approvers))
    } else {
        let peers = ask!(cell, ClusterRegistry.list_peers(v1::ListPeersRequest {}))?.peers;
        let peer = peers.into_iter().find(|p| p.trust_domain == trust_domain).unwrap_or_default();
        (peer.fingerprint, String::new(), Value::Null)
    };
    const COLUMNS: &[&str] = &["trust_domain", "fingerprint", "root_form", "approvers", "sequence", "roots_sha256"];
    let mut table = Table::new("bundle", COLUMNS);
    table.row(vec![
        json!(bundle.trust_domain),
        json!(fingerprint),
        json!(form),
        approvers,
        json!(bundle.sequence),
        json!(bundle.roots_der.iter().map(|der| hex::encode(Sha256::digest(der))).collect::<Vec<_>>()),
    ]);
    let keys = jwt::published(&bundle);
    // Who may not read what stands above the replicas is shown the bundle alone.
    let standing = match trust_domain == own {
        true => authorities::state(&cell).await.ok(),
        false => None,
    };
    let standing = standing.unwrap_or_default();
    let externals = external::table(&standing);
    let notes = external::findings(&standing, crate::when::now_ms());
    let answer = Answer::ok(match session.form {
        Form::Table => {
            let some = standing.roots.iter().any(|root| !root.externals.is_empty());
            let externals = some.then(|| externals.render(Form::Table));
            let tables = [Some(table.render_one(Form::Table)), externals, Some(keys.render(Form::Table))];
            tables.into_iter().flatten().collect::<Vec<_>>().join("\n\n")
        }
        Form::Json => {
            let mut one = table.value_of_one();
            one.insert("jwt_authorities".to_owned(), authorities::values(&keys));
            if trust_domain == own {
                one.extend(authorities::standing(&cell).await?);
            }
            pretty(&one.into())
        }
    });
    Ok(notes.into_iter().fold(answer, Answer::note))
}

/// The root that the operator trusts, by file or fingerprint: whatever came with what is to be checked is not asked.
pub(super) fn pinned(root: Option<&Path>, hex: Option<&str>) -> Result<[u8; 32], Refusal> {
    match (root, hex) {
        (Some(root), _) => {
            let ders = super::cluster::certificates(&read_bounded(root, ROOT_BYTES_MAX)?)?;
            match ders.as_slice() {
                [one] => Ok(ambit_identity::fingerprint(one)),
                more => Err(Refusal::new(Code::BadRequest, "one root certificate", more.len().to_string())),
            }
        }
        (None, Some(hex)) => fingerprint(hex),
        (None, None) => Err(Refusal::new(Code::BadRequest, "--root or --fingerprint", "neither")),
    }
}

pub(super) async fn identity(session: &Session, verb: Identity) -> Result<Answer, Refusal> {
    let Identity::List { limit } = verb;
    let cell = session.cell()?;
    let reply = ask!(cell, Svid.list_issued(v1::ListIssuedRequest { limit }))?;
    const COLUMNS: &[&str] =
        &["spiffe_id", "serial", "node", "generation", "authority", "not_before", "not_after", "index"];
    let mut table = Table::new("identity", COLUMNS);
    for i in &reply.issued {
        table.row(vec![
            json!(i.spiffe_id),
            json!(i.serial),
            json!(i.node),
            json!(i.generation),
            json!(i.authority),
            json!(utc(i.not_before_ms)),
            json!(utc(i.not_after_ms)),
            json!(i.index),
        ]);
    }
    Ok(Answer::ok(table.render(session.form)))
}
