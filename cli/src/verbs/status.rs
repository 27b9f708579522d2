//! `ambit status`: one screen.

use super::{Session, policy, raft};
use crate::ask;
use crate::output::{Answer, Form, Table, counted, pretty};
use crate::when::age;
use ambit_model::Refusal;
use ambit_proto::v1;
use serde_json::{Value, json};

pub(super) async fn status(session: &Session) -> Result<Answer, Refusal> {
    let cell = session.cell()?;
    let status = ask!(cell, Membership.status(v1::StatusRequest {}))?;
    let clusters = ask!(cell, ClusterRegistry.list_clusters(v1::ListClustersRequest {}))?.clusters;
    let peers = ask!(cell, ClusterRegistry.list_peers(v1::ListPeersRequest {}))?.peers;
    let nodes = ask!(cell, NodeAttestation.list_nodes(v1::ListNodesRequest {}))?.nodes;
    let fenced = ask!(cell, ClusterRegistry.list_standbys(v1::ListStandbysRequest {}))?.fenced;
    let agents = ask!(cell, PolicyRegistry.status(v1::PolicyStatusRequest::default()))?.agents;
    let drifting = agents.iter().filter(|a| !policy::in_step(a)).count();

    if session.form == Form::Json {
        let value = |table: Table| serde_json::from_str::<Value>(&table.render(Form::Json)).unwrap_or(Value::Null);
        return Ok(Answer::ok(pretty(&json!({
            "trust_domain": status.trust_domain, "fingerprint": status.fingerprint, "root_form": status.root_form,
            "leader": status.leader, "term": status.term, "revision": status.revision,
            "members": value(raft::members(&status)), "clusters": value(clusters_table(&clusters)),
            "peers": value(peers_table(&peers)), "nodes": nodes.len(), "agents": agents.len(), "drifting": drifting,
            "fenced": fenced,
        }))));
    }
    let mut out = format!(
        "cell {} · root {} ({}) · leader {} · term {} · revision {}\n\n",
        status.trust_domain,
        status.fingerprint.get(..16).unwrap_or(&status.fingerprint),
        status.root_form,
        if status.leader == 0 { "none".to_owned() } else { status.leader.to_string() },
        status.term,
        status.revision
    );
    for table in [raft::members(&status), clusters_table(&clusters), peers_table(&peers)] {
        out.push_str(&table.render(Form::Table));
        out.push_str("\n\n");
    }
    if !fenced.is_empty() {
        out.push_str(&format!("this cell signs nothing for its own trust domain: {fenced}\n\n"));
    }
    let admitted = nodes.iter().filter(|n| n.state == "admitted").count();
    out.push_str(&format!("{}, {admitted} admitted; ", counted(nodes.len(), "node")));
    out.push_str(&format!("{}, {drifting} drifting", counted(agents.len(), "agent")));
    Ok(Answer::ok(out))
}

fn clusters_table(clusters: &[v1::Cluster]) -> Table {
    let mut table = Table::new("cluster", &["cluster", "home", "state", "nodes"]);
    for c in clusters {
        table.row(vec![json!(c.name), json!(c.home), json!(c.state), json!(c.nodes)]);
    }
    table
}

fn peers_table(peers: &[v1::Peer]) -> Table {
    let mut table = Table::new("peer", &["peer", "state", "imported_seq", "age", "trouble"]);
    for p in peers {
        table.row(vec![
            json!(p.trust_domain),
            json!(p.state),
            json!(p.imported_seq),
            json!(age(p.age_ms)),
            json!(p.trouble),
        ]);
    }
    table
}
