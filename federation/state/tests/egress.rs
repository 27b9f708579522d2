//! Egress documents in a cell: who may write them, what nodes are told of them, when they end, and what is remembered.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

mod common;

use ambit_model::policy::{Endpoint, Protocol};
use ambit_model::{Code, Generation, Revision, Stamp};
use ambit_state::command::{NodeVerb, Nodes};
use ambit_state::objects::StoredDocument;
use ambit_state::{Command, DocumentKind, DocumentsChange, State};
use common::documents::{apply, change, named, run};
use common::{Cell, admission, cluster, code, node};

const T: u64 = 1_000_000;

fn egress(name: &str, from: &str, to: &str) -> String {
    format!(
        "---\nkind: Egress\nmetadata: {{name: {name}}}\nspec: {{from: ['{from}'], to: [{to}], transport: passthrough}}\n"
    )
}

/// Node 1 may run web and db, of which db has a label.
fn west() -> Cell {
    let mut west = Cell::founded("west");
    west.run(Command::AllowEk(cluster("west"), vec![node(1), node(2)])).unwrap();
    let admit = admission(&west, 1, 1, None);
    west.run(Command::AdmitNode(admit)).unwrap();
    let entries =
        vec![named("web", "spiffe://west/web", "west", &[]), named("db", "spiffe://west/db", "west", &["app=db"])];
    west.run(Command::CreateEntries(entries)).unwrap();
    west
}

fn told(cell: &Cell) -> Vec<String> {
    let texts = |s: ambit_state::Slice| s.egress.iter().map(ambit_policy::egress_text).collect();
    cell.state.slice(&node(1)).map(texts).unwrap()
}

fn opens(cell: &Cell, from: &str, to: &str) -> bool {
    let (src, now) = (format!("spiffe://west/{from}").parse().unwrap(), cell.state.moment());
    let slice = cell.state.slice(&node(1)).unwrap();
    slice.egress.iter().any(|e| e.allows(&src, to.parse().unwrap(), Protocol::Tcp, 443, now))
}

#[test]
fn sets_are_resolved_and_only_those_concerned_are_told() {
    let group = "kind: Group\nmetadata: {name: ops}\nspec: {members: [spiffe://west/web, 'labels:west/app=db']}\n";
    for (from, web, db) in [
        ("spiffe://west/web", true, false),
        ("spiffe://west/*", true, true),
        ("labels:west/app=db", false, true),
        ("cluster:west/west", true, true),
        ("group:west/ops", true, true),
        ("spiffe://west/other", false, false),
    ] {
        let mut west = west();
        let done = apply(&mut west, &format!("{group}{}", egress("e", from, "192.0.2.0/24"))).unwrap();
        assert_eq!(done, [true, true]);
        assert_eq!((opens(&west, "web", "192.0.2.7"), opens(&west, "db", "192.0.2.7")), (web, db), "{from}");
        assert!(!opens(&west, "web", "192.0.3.7"));
        assert_eq!(told(&west).len(), usize::from(web || db), "{from}: a node is told what a workload of it may use");
        // The entry that carries the label goes, and so does what it opened.
        west.run(Command::DeleteEntries(vec!["db".parse().unwrap()])).unwrap();
        assert!(!opens(&west, "db", "192.0.2.7") || from.starts_with("spiffe"), "{from}");
    }
}

#[test]
fn what_nobody_could_enforce_or_is_not_ours_is_refused_whole() {
    let mut west = west();
    let good = egress("good", "spiffe://west/web", "192.0.2.0/24");
    for (text, want) in [
        (egress("e", "spiffe://east/web", "192.0.2.0/24"), Code::NotOwner),
        (egress("e", "group:west/nobody", "192.0.2.0/24"), Code::NotFound),
        (egress("e", "group:east/ops", "192.0.2.0/24"), Code::NotFound),
        (egress("e", "cluster:west/nowhere", "192.0.2.0/24"), Code::NotFound),
        (egress("e", "labels:east/app=db", "192.0.2.0/24"), Code::PolicyUnenforceable),
        (egress("e", "spiffe://west/web", "'2001:db8::/32'"), Code::PolicyUnenforceable),
        (egress("e", "spiffe://west/web", "127.0.0.1/32"), Code::PolicyUnenforceable),
        (
            egress("e", "spiffe://west/web", "10.0.0.0/8").replace("transport", "protocols: [udp], transport"),
            Code::PolicyUnenforceable,
        ),
        (
            "kind: Group\nmetadata: {name: g}\nspec: {members: [spiffe://east/web]}\n".to_owned()
                + &egress("e", "group:west/g", "192.0.2.0/24"),
            Code::NotOwner,
        ),
    ] {
        assert_eq!(code(apply(&mut west, &format!("{text}{good}"))), want, "{text}");
    }
    assert_eq!(west.state.egress().count() + west.state.groups().count(), 0, "nothing of a refused set stays");
    // A group that it uses stays there, and what it becomes is judged with it.
    let group = "kind: Group\nmetadata: {name: g}\nspec: {members: [spiffe://west/web]}\n";
    apply(&mut west, &format!("{group}{}", egress("e", "group:west/g", "192.0.2.0/24"))).unwrap();
    assert_eq!(code(run(&mut west, change("", &[(DocumentKind::Group, "g")]))), Code::NotFound);
    assert_eq!(code(apply(&mut west, &group.replace("spiffe://west/web", "spiffe://east/web"))), Code::NotOwner);
    run(&mut west, change("", &[(DocumentKind::Egress, "e"), (DocumentKind::Group, "g")])).unwrap();
    assert_eq!(code(run(&mut west, change("", &[(DocumentKind::Egress, "e")]))), Code::NotFound);
    let all: String = (0..1_001).map(|n| egress(&format!("e{n}"), "spiffe://west/web", "192.0.2.0/24")).collect();
    let mut many = DocumentsChange::default();
    for (n, text) in all.split("---\n").filter(|text| !text.is_empty()).enumerate() {
        assert!(n < 1_001);
        many.egress.extend(change(text, &[]).egress);
    }
    assert_eq!(code(run(&mut west, many)), Code::Busy);
}

#[test]
fn what_the_mesh_knows_is_told_with_the_ranges_that_hold_it() {
    let mut west = west();
    let admit = admission(&west, 2, 2, None);
    west.run(Command::AdmitNode(admit)).unwrap();
    let endpoint = |id: &str, address: [u8; 4]| Endpoint {
        spiffe_id: format!("spiffe://west/{id}").parse().unwrap(),
        address: address.into(),
        cluster: cluster("west"),
        node_address: [10, 0, 0, 2].into(),
        node: node(2),
        generation: Generation(1),
    };
    let meshed =
        |cell: &Cell| cell.state.slice(&node(1)).unwrap().meshed.iter().map(ToString::to_string).collect::<Vec<_>>();
    let report = vec![endpoint("db", [10, 1, 0, 7]), endpoint("db", [10, 2, 0, 7])];
    west.run(Command::ReportEndpoints(node(2), report)).unwrap();
    assert!(meshed(&west).is_empty(), "nobody goes out");
    // No policy lets anybody here reach db in a tunnel; so much the less in clear.
    apply(&mut west, &egress("e", "spiffe://west/web", "10.1.0.0/16")).unwrap();
    assert_eq!(meshed(&west), ["10.1.0.7"]);
    let service =
        "kind: Service\nmetadata: {name: s}\nspec: {address: 10.96.0.1, port: 80, backends: ['spiffe://west/db']}\n";
    apply(&mut west, &format!("{service}{}", egress("all", "spiffe://west/web", "0.0.0.0/0"))).unwrap();
    assert_eq!(meshed(&west), ["10.1.0.7", "10.2.0.7", "10.96.0.1"]);
    // Who was there a moment ago may be there still; who was put out is, and in clear is worse than in a tunnel.
    west.run(Command::ReportEndpoints(node(2), vec![endpoint("db", [10, 2, 0, 7])])).unwrap();
    assert_eq!(meshed(&west), ["10.1.0.7", "10.2.0.7", "10.96.0.1"]);
    west.run(Command::SetNodes(NodeVerb::Ban, Nodes::Ids(vec![node(2)]))).unwrap();
    assert_eq!(meshed(&west), ["10.1.0.7", "10.2.0.7", "10.96.0.1"]);
    west.state = State::import(west.state.export()).unwrap();
    assert_eq!(meshed(&west), ["10.1.0.7", "10.2.0.7", "10.96.0.1"], "also after a restart");
    // So is a service that is no more, for a while.
    run(&mut west, change("", &[(DocumentKind::Service, "s")])).unwrap();
    assert_eq!(meshed(&west), ["10.1.0.7", "10.2.0.7", "10.96.0.1"]);
    // An hour later the first is outside; the second was put out, which lasts.
    let revision = west.state.cell().unwrap().revision;
    west.at(T + 3_700_000, 0, Command::Tick).unwrap();
    assert_eq!(meshed(&west), ["10.2.0.7"]);
    assert!(west.state.cell().unwrap().revision > revision, "nodes are told");
}

#[test]
fn it_ends_by_committed_time_and_comes_back_by_a_rollback() {
    let mut west = west();
    let ends = |ms: u64| {
        let mut change = change(&egress("e", "spiffe://west/web", "192.0.2.0/24"), &[]);
        change.egress[0].expires_at = Stamp(ms);
        Command::ChangeDocuments(Box::new(change))
    };
    west.at(T, 0, ends(T + 5_000)).unwrap();
    let (written, revision) = (west.state.document_revision(), west.state.cell().unwrap().revision);
    west.at(T + 4_999, 0, Command::Tick).unwrap();
    assert_eq!((told(&west).len(), west.state.cell().unwrap().revision), (1, revision));
    west.at(T + 5_000, 0, Command::Tick).unwrap();
    assert!(told(&west).is_empty() && west.state.cell().unwrap().revision > revision, "nodes are told");
    // As after a restart: the ends are known again.
    west.at(T + 6_000, 0, ends(T + 9_000)).unwrap();
    west.state = State::import(west.state.export()).unwrap();
    let revision = west.state.cell().unwrap().revision;
    west.at(T + 9_000, 0, Command::Tick).unwrap();
    assert!(west.state.cell().unwrap().revision > revision);
    // One that is deleted ends nobody's time.
    run(&mut west, change("", &[(DocumentKind::Egress, "e")])).unwrap();
    assert_eq!(west.state.egress().count(), 0);
    let back = Command::RollbackDocuments { to: written, over: None, by: "me".into(), note: String::new() };
    west.run(back).unwrap();
    let found = west.state.document(DocumentKind::Egress, &"e".parse().unwrap());
    assert!(matches!(found, Some(StoredDocument::Egress(ref e)) if e.expires_at == Stamp(T + 5_000)), "{found:?}");
}

#[test]
fn peers_hear_nothing_of_it() {
    let mut west = west();
    let before = west.state.cell().unwrap().export_seq;
    apply(&mut west, &egress("e", "spiffe://west/web", "192.0.2.0/24")).unwrap();
    run(&mut west, change("", &[(DocumentKind::Egress, "e")])).unwrap();
    assert_eq!(west.state.cell().unwrap().export_seq, before);
}

#[test]
fn an_administrator_of_a_cluster_opens_the_way_out_to_its_own() {
    let mut west = west();
    west.run(Command::RegisterCluster(cluster("prod"), vec![(common::ROOT.to_vec(), "lab".into())], 10_000)).unwrap();
    west.run(Command::CreateEntries(vec![named("shop", "spiffe://west/shop", "prod", &[])])).unwrap();
    let mut within = |change: DocumentsChange| {
        west.run(Command::Within([cluster("prod")].into(), Box::new(Command::ChangeDocuments(Box::new(change)))))
            .map(drop)
    };
    for (from, good) in [
        ("spiffe://west/shop", true),
        ("cluster:west/prod", true),
        ("spiffe://west/web", false),
        ("spiffe://west/*", false),
        ("cluster:west/west", false),
        ("labels:west/app=db", false),
    ] {
        let asked = within(change(&egress(if good { "e" } else { "x" }, from, "192.0.2.0/24"), &[]));
        assert_eq!(asked.map_err(|r| r.code), if good { Ok(()) } else { Err(Code::PermissionDenied) }, "{from}");
    }
    west.run(Command::ChangeDocuments(Box::new(change(&egress("cells", "spiffe://west/*", "192.0.2.0/24"), &[]))))
        .unwrap();
    let mut within = |change: DocumentsChange| {
        west.run(Command::Within([cluster("prod")].into(), Box::new(Command::ChangeDocuments(Box::new(change)))))
            .map(drop)
    };
    assert_eq!(code(within(change("", &[(DocumentKind::Egress, "cells")]))), Code::PermissionDenied);
    assert_eq!(
        code(within(change(&egress("cells", "spiffe://west/shop", "192.0.2.0/24"), &[]))),
        Code::PermissionDenied
    );
    within(change("", &[(DocumentKind::Egress, "e")])).unwrap();
}

/// A change of these bytes is a change of format. One without egress is stored as `tests/documents.rs` says.
#[test]
fn stored_bytes_are_what_they_were() {
    let hex = |bytes: Vec<u8>| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    for (over, want) in [
        (None, "4d00000000026d650010010165010201770100c00002001800010000ffffffffffffffffff01"),
        (Some(Revision(300)), "4d00000000026d650011ac02010165010201770100c00002001800010000ffffffffffffffffff01"),
    ] {
        let asked = DocumentsChange { over, ..change(&egress("e", "spiffe://w/*", "192.0.2.0/24"), &[]) };
        let command = Command::ChangeDocuments(Box::new(asked));
        let bytes = postcard::to_stdvec(&command).unwrap();
        assert_eq!(postcard::from_bytes::<Command>(&bytes).unwrap(), command);
        assert_eq!(hex(bytes), want);
    }
}
