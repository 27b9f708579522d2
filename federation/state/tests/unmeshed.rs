//! Policies whose callers are outside of the mesh, in a cell: who may write them, and what nodes are told with them.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

mod common;

use ambit_model::policy::Endpoint;
use ambit_model::{Code, Generation};
use ambit_policy::PolicySet;
use ambit_state::{Command, DocumentKind, State};
use common::documents::{apply, change, named, run};
use common::{Cell, admission, cluster, code, node};
use std::net::IpAddr;

const T: u64 = 1_000_000;

fn policy(name: &str, target: &str, ranges: &str) -> String {
    format!(
        "---\nkind: Policy\nmetadata: {{name: {name}}}\nspec: {{target: '{target}', action: allow, from: [{ranges}], ports: \
         [443], transport: passthrough}}\n"
    )
}

/// Node 1 may run web and db, of which db has a label; node 2 is another one.
fn west() -> Cell {
    let mut west = Cell::founded("west");
    west.run(Command::AllowEk(cluster("west"), vec![node(1), node(2)])).unwrap();
    for n in 1..=2 {
        let admit = admission(&west, n, n, None);
        west.run(Command::AdmitNode(admit)).unwrap();
    }
    let entries =
        vec![named("web", "spiffe://west/web", "west", &[]), named("db", "spiffe://west/db", "west", &["app=db"])];
    west.run(Command::CreateEntries(entries)).unwrap();
    west
}

fn lets_in(cell: &Cell, from: &str, to: &str) -> bool {
    let slice = cell.state.slice(&node(1)).unwrap();
    let mut set = PolicySet::new(slice.bundles.keys().cloned().collect());
    for (origin, policy) in slice.policies {
        set.insert(origin, policy);
    }
    let (from, to): (IpAddr, _) = (from.parse().unwrap(), format!("spiffe://west/{to}").parse().unwrap());
    set.evaluate_unmeshed(from, &to, 443, cell.state.moment()).allowed
}

fn claimed(cell: &Cell) -> Vec<String> {
    cell.state.slice(&node(1)).unwrap().claimed.iter().map(ToString::to_string).collect()
}

#[test]
fn targets_are_resolved_and_only_their_nodes_are_told() {
    for (target, web, db) in [
        ("spiffe://west/web", true, false),
        ("spiffe://west/*", true, true),
        ("labels:west/app=db", false, true),
        ("cluster:west/west", true, true),
        ("spiffe://west/other", false, false),
    ] {
        let mut west = west();
        apply(&mut west, &policy("p", target, "'cidr:192.0.2.0/24'")).unwrap();
        let found = (lets_in(&west, "192.0.2.7", "web"), lets_in(&west, "192.0.2.7", "db"));
        assert_eq!(found, (web, db), "{target}");
        assert!(!lets_in(&west, "192.0.3.7", "web"));
        assert_eq!(west.state.slice(&node(1)).unwrap().policies.len(), usize::from(web || db), "{target}");
        // Whom a policy lets in by address has no identity to call with.
        assert!(west.state.slice(&node(1)).unwrap().callers.is_empty());
    }
    let mut west = west();
    for (text, want) in [
        (policy("p", "spiffe://east/web", "'cidr:192.0.2.0/24'"), Code::NotOwner),
        (policy("p", "spiffe://west/web", "'cidr:2001:db8::/32'"), Code::PolicyUnenforceable),
        (policy("p", "spiffe://west/web", "'cidr:127.0.0.1/32'"), Code::PolicyUnenforceable),
        (policy("p", "cluster:west/nowhere", "'cidr:192.0.2.0/24'"), Code::NotFound),
    ] {
        assert_eq!(code(apply(&mut west, &text)), want, "{text}");
    }
}

#[test]
fn what_is_of_the_mesh_is_told_with_the_ranges_that_hold_it() {
    let mut west = west();
    let endpoint = |address: [u8; 4]| Endpoint {
        spiffe_id: "spiffe://west/db".parse().unwrap(),
        address: address.into(),
        cluster: cluster("west"),
        node_address: [10, 0, 0, 2].into(),
        node: node(2),
        generation: Generation(1),
    };
    west.run(Command::ReportEndpoints(node(2), vec![endpoint([10, 1, 0, 7]), endpoint([10, 2, 0, 7])])).unwrap();
    west.run(Command::RegisterAddress(node(2), Generation(1), [10, 0, 0, 2].into())).unwrap();
    assert!(claimed(&west).is_empty(), "nobody comes in");
    apply(&mut west, &policy("p", "spiffe://west/web", "'cidr:10.1.0.0/16'")).unwrap();
    assert_eq!(claimed(&west), ["10.1.0.7"]);
    let service =
        "kind: Service\nmetadata: {name: s}\nspec: {address: 10.96.0.1, port: 80, backends: ['spiffe://west/db']}\n";
    apply(&mut west, &format!("{service}{}", policy("q", "spiffe://west/web", "'cidr:0.0.0.0/0'"))).unwrap();
    assert_eq!(claimed(&west), ["10.0.0.2", "10.1.0.7", "10.2.0.7", "10.96.0.1"]);
    // Egress may be to a node.
    assert!(west.state.slice(&node(1)).unwrap().meshed.is_empty());
    // Who was there a moment ago may be there still.
    west.run(Command::ReportEndpoints(node(2), vec![endpoint([10, 2, 0, 7])])).unwrap();
    assert_eq!(claimed(&west), ["10.0.0.2", "10.1.0.7", "10.2.0.7", "10.96.0.1"]);
    west.state = State::import(west.state.export()).unwrap();
    let revision = west.state.cell().unwrap().revision;
    west.at(T + 3_700_000, 0, Command::Tick).unwrap();
    assert_eq!(claimed(&west), ["10.0.0.2", "10.2.0.7", "10.96.0.1"]);
    assert!(west.state.cell().unwrap().revision > revision, "nodes are told");
    // A policy that only narrows opens nothing, and needs no such list.
    run(&mut west, change("", &[(DocumentKind::Policy, "p"), (DocumentKind::Policy, "q")])).unwrap();
    let deny = "kind: Policy\nmetadata: {name: d}\nspec: {target: spiffe://west/web, action: deny, from: ['cidr:0.0.0.0/0']}\n";
    apply(&mut west, deny).unwrap();
    assert!(claimed(&west).is_empty() && !lets_in(&west, "192.0.2.7", "web"));
}
