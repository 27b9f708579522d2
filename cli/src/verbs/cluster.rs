//! `ambit cluster`.

use super::{Session, standby};
use crate::args::{Cluster, EkRoot, LateWord, Node, Selected};
use crate::ask;
use crate::cell::{request_id, seconds};
use crate::context::{fingerprint, read_bounded};
use crate::output::{Answer, Form, Table, pretty};
use crate::when::age;
use ambit_identity::keys::certificates_from_pem;
use ambit_model::{Code, Refusal};
use ambit_proto::v1;
use serde_json::json;

/// A root certificate is a few kilobytes of PEM.
const ROOT_BYTES_MAX: u64 = 256 * 1024;

pub(super) async fn run(session: &Session, verb: Cluster) -> Result<Answer, Refusal> {
    match verb {
        Cluster::Register { name, ek_roots, attest_every, region } => {
            let registered = register(session, name.clone(), &ek_roots, seconds(attest_every)?).await?;
            if region.is_empty() {
                return Ok(registered);
            }
            super::traffic::region(session, name, region, String::new()).await
        }
        Cluster::Endorsements { name, csv } => endorsements(session, name, csv).await,
        Cluster::EkRoots { name, add, remove } => ek_roots(session, name, &add, remove).await,
        Cluster::EkDeny { name, manufacturer, model, firmware_below, reason, remove } => {
            let rule = v1::EkDenyRule { name, manufacturer, model, firmware_below, reason };
            ek_deny(session, rule, remove).await
        }
        Cluster::List => list(session).await,
        Cluster::Token { trust_domain, fingerprint, ttl } => {
            token(session, trust_domain, &fingerprint, seconds(ttl)?).await
        }
        Cluster::Region { name, region, none: _, note } => {
            super::traffic::region(session, name, region.unwrap_or_default(), note.note).await
        }
        Cluster::Show { name } => super::traffic::show(session, name).await,
        Cluster::Drain { name, note } => super::traffic::drain(session, name, note.note, true).await,
        Cluster::Undrain { name, note } => super::traffic::drain(session, name, note.note, false).await,
        Cluster::FailOver { calls, to, note } => super::traffic::fail_over(session, calls, to, note.note).await,
        Cluster::FailBack { calls, note } => super::traffic::fail_back(session, calls, note.note).await,
        Cluster::Evict { name, confirm } => evict(session, name, &confirm).await,
        Cluster::Standby(verb) => standby::run(session, verb).await,
        Cluster::Grant { home, lasts, approvals } => standby::grant(session, home, lasts, &approvals).await,
        Cluster::Release { home } => standby::release(session, home).await,
        Cluster::TakeBack => standby::take_back(session).await,
        Cluster::Late { origin, seq, what } => standby::late(session, origin, seq, what == LateWord::Keep).await,
    }
}

async fn register(
    session: &Session,
    name: String,
    ek_roots: &[EkRoot],
    attest_interval_s: u32,
) -> Result<Answer, Refusal> {
    let mut request =
        v1::RegisterClusterRequest { request_id: request_id()?, name, attest_interval_s, ..Default::default() };
    for root in ek_roots {
        for der in certificates(&read_bounded(&root.file, ROOT_BYTES_MAX)?)? {
            request.ek_roots_der.push(der);
            request.ek_root_classes.push(root.class.clone());
        }
    }
    let (cell, banner) = session.cell_to_change()?;
    let cluster = ask!(cell, ClusterRegistry.register_cluster(request))?;
    Ok(Answer::ok(table(&[cluster]).render_one(session.form)).note(banner))
}

/// Every certificate in a PEM text; none is an error.
pub(super) fn certificates(pem: &str) -> Result<Vec<Vec<u8>>, Refusal> {
    let bad = |found: String| Refusal::new(Code::BadRequest, "certificates in PEM form", found);
    match certificates_from_pem(pem) {
        Ok(ders) if !ders.is_empty() => Ok(ders.into_iter().map(|der| der.to_vec()).collect()),
        Ok(_) => Err(bad("none".to_owned())),
        Err(refusal) => Err(bad(refusal.found)),
    }
}

async fn list(session: &Session) -> Result<Answer, Refusal> {
    let cell = session.cell()?;
    let reply = ask!(cell, ClusterRegistry.list_clusters(v1::ListClustersRequest {}))?;
    Ok(Answer::ok(table(&reply.clusters).render(session.form)))
}

fn table(clusters: &[v1::Cluster]) -> Table {
    const COLUMNS: &[&str] =
        &["name", "trust_domain", "home", "state", "nodes", "fingerprint", "age", "region", "drained"];
    let mut table = Table::new("cluster", COLUMNS);
    for c in clusters {
        table.row(vec![
            json!(c.name),
            json!(c.trust_domain),
            json!(c.home),
            json!(c.state),
            json!(c.nodes),
            json!(c.fingerprint),
            json!(age(c.age_ms)),
            json!(c.region),
            json!(c.drained),
        ]);
    }
    table
}

/// All of its nodes, or none. Whoever repeats the name means it.
async fn evict(session: &Session, cluster: String, confirm: &str) -> Result<Answer, Refusal> {
    if confirm != cluster {
        let expected = format!("--confirm {cluster}: all of its nodes lose their certificates at once");
        return Err(Refusal::new(Code::BadRequest, expected, confirm));
    }
    let selected = Selected { ids: Vec::new(), cluster: Some(cluster) };
    super::node::run(session, Node::Evict(selected)).await
}

async fn endorsements(session: &Session, cluster: String, csv: bool) -> Result<Answer, Refusal> {
    let cell = session.cell()?;
    let reply = ask!(cell, NodeAttestation.list_endorsements(v1::ListEndorsementsRequest { cluster }))?;
    if csv {
        let lines: Vec<String> = std::iter::once("node".to_owned()).chain(reply.allowed).collect();
        return Ok(Answer::ok(lines.join("\n")));
    }
    Ok(Answer::ok(shown(session.form, &reply)))
}

async fn ek_roots(
    session: &Session,
    cluster: String,
    add: &[EkRoot],
    remove_sha256: Vec<String>,
) -> Result<Answer, Refusal> {
    let mut request = v1::PutEkRootsRequest { request_id: request_id()?, cluster, add: vec![], remove_sha256 };
    for root in add {
        let class = &root.class;
        let ders = certificates(&read_bounded(&root.file, ROOT_BYTES_MAX)?)?;
        request.add.extend(ders.into_iter().map(|der| v1::EkRootMessage { der, class: class.clone() }));
    }
    let (cell, banner) = session.cell_to_change()?;
    let reply = ask!(cell, NodeAttestation.put_ek_roots(request))?;
    Ok(Answer::ok(shown(session.form, &reply)).note(banner))
}

async fn ek_deny(session: &Session, rule: v1::EkDenyRule, remove: bool) -> Result<Answer, Refusal> {
    let (add, remove) = if remove { (vec![], vec![rule.name]) } else { (vec![rule], vec![]) };
    let (cell, banner) = session.cell_to_change()?;
    let request = v1::PutEkDenyRequest { request_id: request_id()?, add, remove };
    let reply = ask!(cell, NodeAttestation.put_ek_deny(request))?;
    Ok(Answer::ok(shown(session.form, &reply)).note(banner))
}

/// Roots, allow-list and deny-list as rows of one table.
fn shown(form: Form, reply: &v1::EndorsementsResponse) -> String {
    let mut table = Table::new("endorsement", &["kind", "name", "what"]);
    for root in &reply.roots {
        table.row(vec![
            json!("ek-root"),
            json!(hex::encode(ambit_identity::fingerprint(&root.der))),
            json!(root.class),
        ]);
    }
    for node in &reply.allowed {
        table.row(vec![json!("allowed"), json!(node), json!("")]);
    }
    for rule in &reply.denied {
        let below = if rule.firmware_below.is_empty() { "every firmware" } else { &rule.firmware_below };
        let what = format!("{} {} below {below}: {}", rule.manufacturer, rule.model, rule.reason);
        table.row(vec![json!("ek-deny"), json!(rule.name), json!(what.trim())]);
    }
    table.render(form)
}

async fn token(session: &Session, trust_domain: String, hex: &str, ttl_seconds: u32) -> Result<Answer, Refusal> {
    fingerprint(hex)?;
    let request = v1::CreateClusterTokenRequest {
        request_id: request_id()?,
        trust_domain,
        fingerprint: hex.to_owned(),
        ttl_seconds,
    };
    let (cell, banner) = session.cell_to_change()?;
    let reply = ask!(cell, ClusterRegistry.create_cluster_token(request))?;
    let text = match session.form {
        Form::Table => reply.token,
        Form::Json => pretty(&json!({"token": reply.token, "fingerprint": reply.fingerprint})),
    };
    Ok(Answer::ok(text)
        .note(banner)
        .note(format!("this cell's fingerprint, for the other side: {}", reply.fingerprint)))
}
