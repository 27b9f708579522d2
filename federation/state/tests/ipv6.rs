//! Workloads and services with IPv6 addresses: what a cell holds of them, tells its nodes, and tells its peers.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

mod common;

use ambit_model::policy::{Action, Endpoint, Order, Policy, Service};
use ambit_model::record::{Head, Kind};
use ambit_model::{Address, Code, Generation, Stamp};
use ambit_state::{Command, Reply, State};
use common::{Cell, admission, cluster, code, entry, node, pending};
use std::net::Ipv4Addr;

fn west() -> Cell {
    let mut west = Cell::founded("west");
    west.run(Command::AllowEk(cluster("west"), vec![node(1), node(2)])).unwrap();
    west.run(Command::CreateEntries(vec![entry("db", "west")])).unwrap();
    for n in [1, 2] {
        let a = admission(&west, n, n, None);
        west.run(Command::AdmitNode(a)).unwrap();
    }
    west
}

fn endpoint(address: &str, n: u8) -> Endpoint {
    Endpoint {
        spiffe_id: "spiffe://west/db".parse().unwrap(),
        address: address.parse().unwrap(),
        cluster: cluster("west"),
        node_address: [10, 0, 0, n].into(),
        node: node(n),
        generation: Generation(1),
    }
}

fn report(cell: &mut Cell, n: u8, addresses: &[&str]) -> Vec<Option<Code>> {
    let endpoints = addresses.iter().map(|a| endpoint(a, n)).collect();
    let Ok(Reply::Items(items)) = cell.run(Command::ReportEndpoints(node(n), endpoints)) else { panic!("items") };
    items.into_iter().map(|item| item.err().map(|refusal| refusal.code)).collect()
}

fn held(cell: &Cell) -> Vec<String> {
    cell.state.endpoints().map(|(td, row)| format!("{td} {}", row.object.address)).collect()
}

fn serve(cell: &mut Cell, name: &str, address: &str) -> Result<Reply, ambit_model::Refusal> {
    let service = Service {
        name: name.parse().unwrap(),
        address: address.parse().unwrap(),
        port: 80,
        backends: vec!["spiffe://west/db".parse().unwrap()],
        order: Order::LocalFirst,
        weights: Vec::new(),
    };
    cell.run(Command::ApplyDocuments { policies: vec![], services: vec![service], by: "me".into() })
}

#[test]
fn a_workload_has_an_address_of_each_family_and_each_has_one_holder() {
    let mut west = west();
    assert_eq!(report(&mut west, 1, &["10.1.0.1", "fd00::1"]), [None, None]);
    assert_eq!(
        report(&mut west, 2, &["fd00::1", "fd00::2", "fd00::2"]),
        [Some(Code::AlreadyExists), None, Some(Code::AlreadyExists)]
    );
    assert_eq!(held(&west), ["west 10.1.0.1", "west fd00::1", "west fd00::2"]);
    assert_eq!(code(serve(&mut west, "s", "fd00::1")), Code::AlreadyExists);
    serve(&mut west, "s", "fd10::1").unwrap();
    assert_eq!(code(serve(&mut west, "t", "fd10::1")), Code::AlreadyExists);
    assert_eq!(report(&mut west, 2, &["fd10::1", "fd00::2"]), [Some(Code::AlreadyExists), None]);

    let restored = State::import(west.state.export()).unwrap();
    assert_eq!(
        (restored.digest(), held(&west)),
        (west.state.digest(), vec!["west 10.1.0.1".to_owned(), "west fd00::1".into(), "west fd00::2".into()])
    );
    let policy = Policy {
        name: "p".parse().unwrap(),
        target: "spiffe://west/db".parse().unwrap(),
        action: Action::Allow,
        from: vec!["spiffe://west/*".parse().unwrap()],
        ports: vec![],
        extras: Default::default(),
    };
    west.run(Command::ApplyDocuments { policies: vec![policy], services: vec![], by: "me".into() }).unwrap();
    let slice = west.state.slice(&node(2)).unwrap();
    let told: Vec<String> = slice.endpoints.iter().map(|e| e.address.to_string()).collect();
    assert_eq!((told, slice.services.len()), (["10.1.0.1", "fd00::1", "fd00::2"].map(str::to_owned).to_vec(), 1));
    // One that it does not report any more is nobody's.
    assert_eq!(report(&mut west, 1, &["10.1.0.1"]), [None]);
    assert_eq!(held(&west), ["west 10.1.0.1", "west fd00::2"]);
}

#[test]
fn peers_are_told_of_them_under_their_own_keys() {
    let (mut west, mut east) = (west(), Cell::founded("east"));
    report(&mut west, 1, &["10.1.0.1", "fd00::1"]);
    serve(&mut west, "s", "fd10::1").unwrap();
    let keys: Vec<_> =
        west.state.records_after(0).filter(|r| r.kind == Kind::Endpoint).map(|r| r.key.clone()).collect();
    assert_eq!(keys, ["10.1.0.1", "fd00::1"]);
    east.run(Command::PutPeer("west".parse().unwrap(), pending(), None)).unwrap();
    east.run(Command::ApprovePeer("west".parse().unwrap(), [7; 32])).unwrap();
    let records: Vec<_> = west.state.records_after(0).cloned().collect();
    let head = |records: &[ambit_model::record::Record]| Head {
        origin: "west".parse().unwrap(),
        epoch: 1,
        seq: records.len() as u64,
        hash: records.last().unwrap().hash(),
        stamp: Stamp(1),
        nonce: [0; 16],
    };
    east.run(Command::Import(head(&records), records.clone())).unwrap();
    assert_eq!(held(&east), ["west 10.1.0.1", "west fd00::1"]);
    assert_eq!(east.state.services().next().unwrap().1.object.address.to_string(), "fd10::1");

    // Under another form of it, or one that is no address of one host, nothing is taken.
    for key in ["FD00::9", "fd00:0::9", "fe80::9", "::ffff:10.0.0.9", "fd61:6d62:6974::9"] {
        let mut more = records.clone();
        let mut last = records.last().unwrap().clone();
        (last.seq, last.prev_hash, last.kind, last.key) = (last.seq + 1, last.hash(), Kind::Endpoint, key.into());
        last.payload = postcard::to_stdvec(&endpoint("fd00::9", 1)).unwrap();
        more.push(last);
        assert_eq!(code(east.run(Command::Import(head(&more), more))), Code::RecordChainBroken, "{key}");
    }
    assert_eq!(held(&east).len(), 2);
}

/// As release 0.1 had it.
#[derive(serde::Serialize)]
struct Former {
    spiffe_id: String,
    address: Ipv4Addr,
    cluster: String,
    node_address: Ipv4Addr,
    node: ambit_model::NodeId,
    generation: Generation,
}

#[test]
fn endpoints_of_ipv4_are_stored_as_they_were_and_those_of_ipv6_no_former_release_takes_for_others() {
    let former = Former {
        spiffe_id: "spiffe://west/db".into(),
        address: [10, 1, 0, 1].into(),
        cluster: "west".into(),
        node_address: [10, 0, 0, 1].into(),
        node: node(1),
        generation: Generation(1),
    };
    let now = endpoint("10.1.0.1", 1);
    assert_eq!(postcard::to_stdvec(&now).unwrap(), postcard::to_stdvec(&former).unwrap());
    let key = |address: Address| postcard::to_stdvec(&("west", address)).unwrap();
    assert_eq!(key(now.address), postcard::to_stdvec(&("west", former.address)).unwrap());
    let six = postcard::to_stdvec(&endpoint("fd00::1", 1)).unwrap();
    assert_eq!(postcard::from_bytes::<Endpoint>(&six).unwrap(), endpoint("fd00::1", 1));
    assert_eq!(six.len(), postcard::to_stdvec(&former).unwrap().len() + 16);
}
