//! `ambit peer`.

use super::Session;
use super::approver::{Outcome, approved, or_proposal};
use crate::args::{Approvals, Peer};
use crate::ask;
use crate::cell::request_id;
use crate::context::fingerprint;
use crate::output::{Answer, Table};
use crate::when::age;
use ambit_model::{Act, Refusal, TrustDomain};
use ambit_proto::v1;
use serde_json::json;

pub(super) async fn run(session: &Session, verb: Peer) -> Result<Answer, Refusal> {
    match verb {
        Peer::Register { addresses, trust_domain, fingerprint: hex, token } => {
            fingerprint(&hex)?;
            let request = v1::RegisterPeerRequest {
                request_id: request_id()?,
                addresses: addresses.iter().map(ToString::to_string).collect(),
                trust_domain,
                fingerprint: hex,
                token,
            };
            let (cell, banner) = session.cell_to_change()?;
            let peer = ask!(cell, ClusterRegistry.register_peer(request))?;
            Ok(Answer::ok(table(&[peer]).render_one(session.form)).note(banner))
        }
        Peer::Approve { trust_domain, fingerprint: hex } => {
            fingerprint(&hex)?;
            let request = v1::ApprovePeerRequest { request_id: request_id()?, trust_domain, fingerprint: hex };
            let (cell, banner) = session.cell_to_change()?;
            let peer = ask!(cell, ClusterRegistry.approve_peer(request))?;
            Ok(Answer::ok(table(&[peer]).render_one(session.form)).note(banner))
        }
        Peer::Suspend { trust_domain } => {
            let request = v1::PeerRef { request_id: request_id()?, trust_domain: trust_domain.to_string() };
            let (cell, banner) = session.cell_to_change()?;
            let peer = ask!(cell, ClusterRegistry.suspend_peer(request))?;
            let back =
                format!("to believe it again: ambit peer approve {trust_domain} --fingerprint {}", peer.fingerprint);
            Ok(Answer::ok(table(&[peer]).render_one(session.form)).note(banner).note(back))
        }
        Peer::Remove { trust_domain, approvals } => remove(session, trust_domain, &approvals).await,
        Peer::List => {
            let cell = session.cell()?;
            let reply = ask!(cell, ClusterRegistry.list_peers(v1::ListPeersRequest {}))?;
            Ok(Answer::ok(table(&reply.peers).render(session.form)))
        }
    }
}

async fn remove(session: &Session, td: TrustDomain, approvals: &Approvals) -> Result<Answer, Refusal> {
    let (cell, banner) = session.cell_to_change()?;
    let (request_id, trust_domain) = (request_id()?, td.to_string());
    let act = Act::RemoveTrustDomain(td);
    let approved = approved(&cell, &act, &approvals.files)?;
    let request = v1::RemovePeerRequest { request_id, trust_domain, approved };
    let done = ask!(cell, ClusterRegistry.remove_peer(request));
    Ok(match or_proposal(&cell, act, approvals, done).await? {
        Outcome::Done(peer) => Answer::ok(table(&[peer]).render_one(session.form)).note(banner),
        Outcome::Proposed(answer) => answer.note(banner),
    })
}

fn table(peers: &[v1::Peer]) -> Table {
    const COLUMNS: &[&str] = &["trust_domain", "state", "fingerprint", "addresses", "imported_seq", "age", "trouble"];
    let mut table = Table::new("peer", COLUMNS);
    for p in peers {
        table.row(vec![
            json!(p.trust_domain),
            json!(p.state),
            json!(p.fingerprint),
            json!(p.addresses),
            json!(p.imported_seq),
            json!(age(p.age_ms)),
            json!(p.trouble),
        ]);
    }
    table
}
