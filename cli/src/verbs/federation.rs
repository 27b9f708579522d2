//! `ambit federation`.

use super::Session;
use super::approver::{Outcome, approved, or_proposal};
use crate::args::{Approvals, Federation, FederationProfile, FederationPut};
use crate::ask;
use crate::cell::request_id;
use crate::context::read_bounded;
use crate::output::{Answer, Table};
use crate::when::utc;
use ambit_identity::bundle::{DOCUMENT_BYTES_MAX, roots};
use ambit_model::{Act, Refusal, TrustDomain};
use ambit_proto::v1;
use serde_json::json;
use std::path::Path;

pub(super) async fn run(session: &Session, verb: Federation) -> Result<Answer, Refusal> {
    match verb {
        Federation::List => {
            let cell = session.cell()?;
            let request = v1::ListFederationRelationshipsRequest {};
            let reply = ask!(cell, TrustDomainRegistry.list_federation_relationships(request))?;
            Ok(Answer::ok(table(&reply.relationships).render(session.form)))
        }
        Federation::Put(put) => write(session, put).await,
        Federation::Remove { trust_domain, approvals } => remove(session, trust_domain, &approvals).await,
        Federation::Refresh { trust_domain } => {
            let (cell, banner) = session.cell_to_change()?;
            let request = of(&trust_domain)?;
            let row = ask!(cell, TrustDomainRegistry.refresh_bundle(request))?;
            Ok(Answer::ok(table(&[row]).render_one(session.form)).note(banner))
        }
        Federation::Confirm { trust_domain, sha256 } => {
            let (cell, banner) = session.cell_to_change()?;
            let request =
                v1::ConfirmBundleRequest { request_id: request_id()?, trust_domain: trust_domain.to_string(), sha256 };
            let row = ask!(cell, TrustDomainRegistry.confirm_bundle(request))?;
            Ok(Answer::ok(table(&[row]).render_one(session.form)).note(banner))
        }
    }
}

async fn remove(session: &Session, td: TrustDomain, approvals: &Approvals) -> Result<Answer, Refusal> {
    let (cell, banner) = session.cell_to_change()?;
    let (request_id, trust_domain) = (request_id()?, td.to_string());
    let act = Act::RemoveTrustDomain(td);
    let approved = approved(&cell, &act, &approvals.files)?;
    let request = v1::DeleteFederationRelationshipRequest { request_id, trust_domain, approved };
    let done = ask!(cell, TrustDomainRegistry.delete_federation_relationship(request));
    Ok(match or_proposal(&cell, act, approvals, done).await? {
        Outcome::Done(row) => Answer::ok(table(&[row]).render_one(session.form)).note(banner),
        Outcome::Proposed(answer) => answer.note(banner),
    })
}

fn of(trust_domain: &TrustDomain) -> Result<v1::FederationRelationshipRef, Refusal> {
    Ok(v1::FederationRelationshipRef { request_id: request_id()?, trust_domain: trust_domain.to_string() })
}

async fn write(session: &Session, put: FederationPut) -> Result<Answer, Refusal> {
    let profile = match put.profile {
        FederationProfile::HttpsWeb => "https_web",
        FederationProfile::HttpsSpiffe => "https_spiffe",
    };
    let request = v1::FederationRelationship {
        request_id: request_id()?,
        trust_domain: put.trust_domain.to_string(),
        url: put.url,
        profile: profile.to_owned(),
        endpoint_spiffe_id: put.endpoint_spiffe_id.map(|id| id.to_string()).unwrap_or_default(),
        roots_der: put.bootstrap.as_deref().map(bootstrap).transpose()?.unwrap_or_default(),
        ..Default::default()
    };
    let (cell, banner) = session.cell_to_change()?;
    let row = ask!(cell, TrustDomainRegistry.put_federation_relationship(request))?;
    Ok(Answer::ok(table(&[row]).render_one(session.form)).note(banner))
}

/// Roots of a bundle document, or of a PEM file.
fn bootstrap(file: &Path) -> Result<Vec<Vec<u8>>, Refusal> {
    let text = read_bounded(file, DOCUMENT_BYTES_MAX as u64)?;
    if text.trim_start().starts_with('{') { roots(&text) } else { super::cluster::certificates(&text) }
}

fn table(rows: &[v1::FederationRelationship]) -> Table {
    const COLUMNS: &[&str] = &[
        "trust_domain",
        "profile",
        "url",
        "endpoint_spiffe_id",
        "roots",
        "jwt_keys",
        "sequence",
        "sha256",
        "refresh_hint_s",
        "taken",
        "trouble",
        "held_sha256",
    ];
    let mut table = Table::new("relationship", COLUMNS);
    for r in rows {
        let taken = if r.taken_ms == 0 { String::new() } else { utc(r.taken_ms) };
        table.row(vec![
            json!(r.trust_domain),
            json!(r.profile),
            json!(r.url),
            json!(r.endpoint_spiffe_id),
            json!(r.roots_der.len()),
            json!(r.jwt_authorities.len()),
            json!(r.sequence),
            json!(r.sha256),
            json!(r.refresh_hint_s),
            json!(taken),
            json!(r.trouble),
            json!(r.held_sha256),
        ]);
    }
    table
}
