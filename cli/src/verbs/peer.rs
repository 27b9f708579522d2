//! `ambit peer`.

use super::Session;
use crate::args::Peer;
use crate::ask;
use crate::cell::request_id;
use crate::context::fingerprint;
use crate::output::{Answer, Table};
use crate::when::age;
use ambit_model::Refusal;
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
        Peer::List => {
            let cell = session.cell()?;
            let reply = ask!(cell, ClusterRegistry.list_peers(v1::ListPeersRequest {}))?;
            Ok(Answer::ok(table(&reply.peers).render(session.form)))
        }
    }
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
