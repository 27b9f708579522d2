//! The state machine by its invariants: exactly once, deterministic, restorable, tokens once, issuance fenced.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

mod common;

use ambit_model::policy::{Action, Endpoint, Order, Peers, Policy, Service};
use ambit_model::record::{Head, Kind, Record};
use ambit_model::{Code, Generation, RaftIndex, Refusal, Revision, Stamp, TrustDomain};
use ambit_state::command::{Admission, LeafRequest, NodeVerb, Nodes};
use ambit_state::objects::*;
use ambit_state::{Command, LogEntry, Reply, State};
use common::{Cell, admission, cluster, code, entry, node, pending};
use std::net::Ipv4Addr;

#[test]
fn a_request_has_its_effect_once_and_its_id_is_not_reused() {
    let mut west = Cell::founded("west");
    let create = Command::CreateEntries(vec![entry("db", "west")]);
    let first = west.at(1_000_000, 7, create.clone()).unwrap();
    let revision = west.state.cell().unwrap().revision;
    assert_eq!(west.at(1_000_001, 7, create).unwrap(), first);
    assert_eq!(west.state.cell().unwrap().revision, revision, "the repeat changed nothing");
    assert_eq!(code(west.at(1_000_002, 7, Command::Tick)), Code::RequestIdReused);
}

#[test]
fn a_join_token_admits_one_node_and_a_nonce_one_admission() {
    let mut west = Cell::founded("west");
    let token = TokenRow { scope: TokenScope::Node(cluster("west")), expires: Stamp(2_000_000), used: false };
    west.run(Command::CreateToken([5; 32], token)).unwrap();
    let nobody = admission(&west, 1, 1, None);
    assert_eq!(code(west.run(Command::AdmitNode(nobody))), Code::EkNotExpected);
    let first = admission(&west, 1, 1, Some([5; 32]));
    assert!(matches!(west.run(Command::AdmitNode(first.clone())), Ok(Reply::Admitted(Generation(1), _))));
    assert_eq!(code(west.run(Command::AdmitNode(first))), Code::NonceConsumed);
    let second = admission(&west, 2, 2, Some([5; 32]));
    assert_eq!(code(west.run(Command::AdmitNode(second))), Code::JoinTokenUsed);
    assert_eq!(west.state.nodes().count(), 1);
    // The same node comes again without a token, with later counters and a higher generation.
    let again = admission(&west, 1, 3, None);
    assert!(matches!(west.run(Command::AdmitNode(again)), Ok(Reply::Admitted(Generation(2), _))));
    let back = Admission { nonce: [9; 32], ..admission(&west, 1, 2, None) };
    assert_eq!(code(west.run(Command::AdmitNode(back))), Code::ClockStepBack);
    let late = admission(&west, 1, 8, None);
    assert_eq!(code(west.at(1_060_001, 0, Command::AdmitNode(late))), Code::TicketExpired);
}

#[test]
fn a_changed_endorsement_makes_a_judgement_stale() {
    let mut west = Cell::founded("west");
    west.run(Command::AllowEk(cluster("west"), vec![node(1)])).unwrap();
    let a = admission(&west, 1, 1, None);
    let remove = vec![common::sha256(common::ROOT)];
    west.run(Command::PutEkRoots { cluster: cluster("west"), add: vec![], remove }).unwrap();
    assert_eq!(code(west.run(Command::AdmitNode(a.clone()))), Code::StaleAppraisal);
    let add = vec![(common::ROOT.to_vec(), "lab".to_owned())];
    west.run(Command::PutEkRoots { cluster: cluster("west"), add, remove: vec![] }).unwrap();
    assert!(west.run(Command::AdmitNode(a)).is_ok(), "what it was judged by stands again");
}

#[test]
fn no_leaf_for_a_banned_unknown_or_foreign_node_and_none_past_its_bounds() {
    let mut west = Cell::founded("west");
    west.run(Command::AllowEk(cluster("west"), vec![node(1)])).unwrap();
    west.run(Command::CreateEntries(vec![entry("db", "west")])).unwrap();
    let ask = |n: u8, authority: &str, id: &str| Command::Issue {
        node: node(n),
        generation: Generation(1),
        authority: authority.into(),
        leaves: vec![LeafRequest { entry: id.parse().unwrap(), key_hash: [3; 32] }],
    };
    assert_eq!(code(west.run(ask(1, "a1", "db"))), Code::NodeUnknown);
    let a = admission(&west, 1, 1, None);
    west.run(Command::AdmitNode(a)).unwrap();
    let Ok(Reply::Leaves(leaves)) = west.run(ask(1, "a1", "db")) else { panic!("leaves") };
    let leaf = leaves[0].as_ref().unwrap();
    assert!(leaf.lifetime.not_after <= Stamp(1_000_000).plus_ms(ambit_state::UNATTESTED_MAX_MS));
    assert!(leaf.lifetime.not_before.plus_ms(60_000) >= Stamp(1_000_000));
    assert_eq!(code(west.run(ask(1, "other", "db"))), Code::AuthorityMismatch);
    let Ok(Reply::Leaves(none)) = west.run(ask(1, "a1", "nope")) else { panic!("leaves") };
    assert_eq!(none[0].as_ref().unwrap_err().code, Code::EntryNotOnNode);
    let late = 1_000_000 + ambit_state::UNATTESTED_MAX_MS;
    assert_eq!(code(west.at(late, 0, ask(1, "a1", "db"))), Code::NodeUntrusted);
    west.run(Command::SetNodes(NodeVerb::Ban, Nodes::Ids(vec![node(1)]))).unwrap();
    assert_eq!(code(west.run(ask(1, "a1", "db"))), Code::NodeBanned);
}

#[test]
fn export_import_and_replay_give_the_same_digest() {
    let mut west = Cell::founded("west");
    west.run(Command::AllowEk(cluster("west"), vec![node(1), node(2)])).unwrap();
    west.run(Command::CreateEntries(vec![entry("db", "west"), entry("web", "west")])).unwrap();
    west.run(Command::DeleteEntries(vec!["web".parse().unwrap()])).unwrap();
    let restored = State::import(west.state.export()).unwrap();
    assert_eq!(restored.digest(), west.state.digest());
    assert_eq!(restored.applied(), west.state.applied());
    let mut replayed = State::new();
    for (i, entry) in west.log.iter().enumerate() {
        replayed.apply(RaftIndex(i as u64 + 1), entry);
    }
    assert_eq!(replayed.digest(), west.state.digest());
    west.run(Command::DeleteEntries(vec!["db".parse().unwrap()])).unwrap();
    assert_ne!(replayed.digest(), west.state.digest());
}

fn policy(name: &str, target: &str) -> Policy {
    Policy {
        name: name.parse().unwrap(),
        target: Peers::Id(target.parse().unwrap()),
        action: Action::Allow,
        from: vec![Peers::Domain("east".parse().unwrap())],
        ports: vec![80],
        extras: Default::default(),
    }
}

#[test]
fn a_peer_is_heard_in_sequence_and_only_about_itself() {
    let (mut west, mut east) = (Cell::founded("west"), Cell::founded("east"));
    let documents = |p| Command::ApplyDocuments { policies: vec![p], services: vec![], by: "me".into() };
    west.run(documents(policy("ok", "spiffe://west/db"))).unwrap();
    assert_eq!(code(west.run(documents(policy("no", "spiffe://east/db")))), Code::NotOwner);
    let peer = pending();
    let td = "west".parse().unwrap();
    east.run(Command::PutPeer("west".parse().unwrap(), peer, None)).unwrap();
    let mut records: Vec<_> = west.state.records_after(0).cloned().collect();
    let head = Head {
        origin: "west".parse().unwrap(),
        epoch: 1,
        seq: records.len() as u64,
        hash: records.last().unwrap().hash(),
        stamp: Stamp(1),
        nonce: [0; 16],
    };
    let import = |r: &[_]| Command::Import(head.clone(), r.to_vec());
    assert_eq!(code(east.run(import(&records))), Code::PeerNotActive);
    assert_eq!(code(east.run(Command::ApprovePeer("west".parse().unwrap(), [8; 32]))), Code::FingerprintMismatch);
    east.run(Command::ApprovePeer("west".parse().unwrap(), [7; 32])).unwrap();
    assert_eq!(code(east.run(import(&records[1..]))), Code::RecordChainBroken, "a gap");
    let mut forged = records.clone();
    forged[0].payload = vec![1, 2, 3];
    assert_eq!(code(east.run(import(&forged))), Code::RecordChainBroken, "altered");
    east.run(import(&records)).unwrap();
    assert_eq!(east.state.policies().count(), 1);
    assert_eq!(east.state.peer(&td).unwrap().seq, head.seq);
    east.run(import(&records)).unwrap();
    // An overlapping import after a change of leader is no fault of the peer: the new part is taken.
    west.run(documents(policy("more", "spiffe://west/more"))).unwrap();
    let all: Vec<_> = west.state.records_after(0).cloned().collect();
    let head = Head { seq: all.len() as u64, hash: all.last().unwrap().hash(), ..head };
    east.run(Command::Import(head.clone(), all.clone())).unwrap();
    assert_eq!(east.state.peer(&td).unwrap().seq, head.seq);
    assert_eq!(east.state.policies().count(), 2);
    records = all;
    // A record in sequence about somebody else's identity moves the sequence and changes nothing.
    let mut more = records.pop().unwrap();
    (more.seq, more.prev_hash, more.kind, more.key) = (head.seq + 1, more.hash(), Kind::Endpoint, "10.0.0.1".into());
    let endpoint = Endpoint {
        spiffe_id: "spiffe://east/db".parse().unwrap(),
        address: "10.0.0.1".parse().unwrap(),
        cluster: cluster("west"),
        node_address: "10.0.0.2".parse().unwrap(),
        node: node(1),
        generation: Generation(1),
    };
    more.payload = postcard::to_stdvec(&endpoint).unwrap();
    let next = Head { seq: more.seq, hash: more.hash(), ..head };
    east.run(Command::Import(next, vec![more])).unwrap();
    assert_eq!(east.state.endpoints().count(), 0);
}

/// An active peer that sends whatever it likes, well chained.
struct Feed {
    td: &'static str,
    seq: u64,
    hash: [u8; 32],
}

impl Feed {
    fn of(td: &'static str, cell: &mut Cell) -> Feed {
        cell.run(Command::PutPeer(td.parse().unwrap(), pending(), None)).unwrap();
        cell.run(Command::ApprovePeer(td.parse().unwrap(), [7; 32])).unwrap();
        let mut feed = Feed { td, seq: 0, hash: [0; 32] };
        feed.send(cell, [(Kind::Cluster, td.to_owned(), vec![])]);
        feed
    }
    fn send(&mut self, cell: &mut Cell, objects: impl IntoIterator<Item = (Kind, String, Vec<u8>)>) {
        let origin: TrustDomain = self.td.parse().unwrap();
        let mut records = Vec::new();
        for (kind, key, payload) in objects {
            self.seq += 1;
            let (seq, prev_hash) = (self.seq, self.hash);
            let origin = origin.clone();
            let record = Record { origin, epoch: 1, seq, prev_hash, kind, key, payload };
            self.hash = record.hash();
            records.push(record);
        }
        let head = Head { origin, epoch: 1, seq: self.seq, hash: self.hash, stamp: Stamp(1), nonce: [0; 16] };
        cell.run(Command::Import(head, records)).unwrap();
    }
    fn endpoint(&mut self, cell: &mut Cell, key: &str, e: &Endpoint) {
        self.send(cell, [(Kind::Endpoint, key.to_owned(), postcard::to_stdvec(e).unwrap())]);
    }
}

fn endpoint(td: &str, address: &str, n: u8) -> Endpoint {
    Endpoint {
        spiffe_id: format!("spiffe://{td}/db").parse().unwrap(),
        address: address.parse().unwrap(),
        cluster: cluster(td),
        node_address: "10.0.0.2".parse().unwrap(),
        node: node(n),
        generation: Generation(1),
    }
}
/// West with nodes 1 and 2, which may run `db`.
fn west_with_nodes() -> Cell {
    let mut west = Cell::founded("west");
    west.run(Command::AllowEk(cluster("west"), vec![node(1), node(2)])).unwrap();
    west.run(Command::CreateEntries(vec![entry("db", "west")])).unwrap();
    for n in [1, 2] {
        let a = admission(&west, n, n, None);
        west.run(Command::AdmitNode(a)).unwrap();
    }
    west
}
/// Origin and address of every endpoint known.
fn held(cell: &Cell) -> Vec<String> {
    cell.state.endpoints().map(|(td, row)| format!("{td} {}", row.object.address)).collect()
}

#[test]
fn a_peers_endpoint_is_taken_only_under_its_own_cluster_key_and_free_address() {
    let mut west = west_with_nodes();
    let (mut east, mut north) = (Feed::of("east", &mut west), Feed::of("north", &mut west));
    west.run(Command::ReportEndpoints(node(1), vec![endpoint("west", "10.1.0.1", 1)])).unwrap();
    east.endpoint(&mut west, "10.1.0.9", &endpoint("east", "10.1.0.8", 7));
    east.endpoint(&mut west, "10.1.0.8", &Endpoint { cluster: cluster("west"), ..endpoint("east", "10.1.0.8", 7) });
    east.endpoint(&mut west, "10.1.0.8", &Endpoint { cluster: cluster("north"), ..endpoint("east", "10.1.0.8", 7) });
    east.endpoint(&mut west, "10.1.0.8", &Endpoint { cluster: cluster("nowhere"), ..endpoint("east", "10.1.0.8", 7) });
    east.endpoint(&mut west, "10.1.0.1", &endpoint("east", "10.1.0.1", 7));
    assert_eq!(held(&west), ["west 10.1.0.1"]);
    east.endpoint(&mut west, "10.2.0.1", &endpoint("east", "10.2.0.1", 7));
    north.endpoint(&mut west, "10.2.0.1", &endpoint("north", "10.2.0.1", 7));
    // Neither does claiming its cluster's name help.
    north.send(&mut west, [(Kind::Cluster, "east".to_owned(), vec![])]);
    north.endpoint(&mut west, "10.3.0.1", &Endpoint { cluster: cluster("east"), ..endpoint("north", "10.3.0.1", 7) });
    assert_eq!(held(&west), ["east 10.2.0.1", "west 10.1.0.1"]);
    // What a peer claimed first gives way to a workload of this cell.
    west.run(Command::ReportEndpoints(node(1), vec![endpoint("west", "10.2.0.1", 1)])).unwrap();
    assert_eq!(held(&west), ["west 10.2.0.1"]);
}

#[test]
fn a_peers_endpoint_that_names_our_node_is_neither_ours_nor_shown_to_it() {
    let mut west = west_with_nodes();
    // One origin on either side of ours in the order of names.
    for (td, address) in [("east", "10.2.0.1"), ("zone", "10.3.0.1")] {
        Feed::of(td, &mut west).endpoint(&mut west, address, &endpoint(td, address, 1));
    }
    west.run(Command::ReportEndpoints(node(1), vec![endpoint("west", "10.1.0.1", 1)])).unwrap();
    let exported = west.state.cell().unwrap().export_seq;
    let slice = west.state.slice(&node(1)).unwrap();
    assert_eq!(slice.endpoints, [endpoint("west", "10.1.0.1", 1)]);
    west.run(Command::ReportEndpoints(node(1), vec![endpoint("west", "10.1.0.1", 1)])).unwrap();
    assert_eq!(west.state.cell().unwrap().export_seq, exported, "nothing of ours changed");
    assert_eq!(held(&west), ["east 10.2.0.1", "west 10.1.0.1", "zone 10.3.0.1"]);
}

fn service(td: &str, name: &str, address: &str) -> Service {
    Service {
        name: name.parse().unwrap(),
        address: address.parse().unwrap(),
        port: 80,
        backends: vec![Peers::Domain(td.parse().unwrap())],
        order: Order::LocalFirst,
        weights: Vec::new(),
    }
}
fn serve(cell: &mut Cell, s: Service) -> Result<Reply, Refusal> {
    cell.run(Command::ApplyDocuments { policies: vec![], services: vec![s], by: "me".into() })
}
fn services(cell: &Cell) -> Vec<String> {
    cell.state.services().map(|((td, _), row)| format!("{td} {}", row.object.address)).collect()
}
/// What became of each endpoint that the node reported.
fn report(cell: &mut Cell, n: u8, addresses: &[&str]) -> Vec<Option<Code>> {
    let endpoints = addresses.iter().map(|a| endpoint("west", a, n)).collect();
    let Ok(Reply::Items(items)) = cell.run(Command::ReportEndpoints(node(n), endpoints)) else { panic!("items") };
    items.into_iter().map(|i| i.err().map(|r| r.code)).collect()
}

#[test]
fn a_service_takes_no_workloads_address_and_a_workload_no_services() {
    let mut west = west_with_nodes();
    let mut east = Feed::of("east", &mut west);
    report(&mut west, 1, &["10.1.0.1"]);
    east.endpoint(&mut west, "10.2.0.1", &endpoint("east", "10.2.0.1", 7));
    for address in ["10.1.0.1", "10.2.0.1"] {
        assert_eq!(code(serve(&mut west, service("west", "s", address))), Code::AlreadyExists);
        let object = postcard::to_stdvec(&service("east", "s", address)).unwrap();
        east.send(&mut west, [(Kind::Service, "s".to_owned(), object)]);
    }
    assert_eq!(services(&west), [""; 0]);
    serve(&mut west, service("west", "s", "10.9.0.1")).unwrap();
    assert_eq!(report(&mut west, 1, &["10.1.0.1", "10.9.0.1"]), [None, Some(Code::AlreadyExists)]);
    east.endpoint(&mut west, "10.9.0.1", &endpoint("east", "10.9.0.1", 7));
    assert_eq!(held(&west), ["east 10.2.0.1", "west 10.1.0.1"]);
    // A peer that put a service where a workload of this cell comes to stand gives way.
    let object = postcard::to_stdvec(&service("east", "t", "10.1.0.2")).unwrap();
    east.send(&mut west, [(Kind::Service, "t".to_owned(), object)]);
    assert_eq!(services(&west), ["east 10.1.0.2", "west 10.9.0.1"]);
    assert_eq!(report(&mut west, 1, &["10.1.0.2"]), [None]);
    assert_eq!(services(&west), ["west 10.9.0.1"]);
}

#[test]
fn one_endpoint_refused_leaves_the_others_and_nodes_that_are_out_hold_nothing() {
    let mut west = west_with_nodes();
    assert_eq!(report(&mut west, 1, &["10.1.0.1"]), [None]);
    assert_eq!(
        report(&mut west, 2, &["10.1.0.1", "10.1.0.2", "10.1.0.2"]),
        [Some(Code::AlreadyExists), None, Some(Code::AlreadyExists)]
    );
    let other = Endpoint { spiffe_id: "spiffe://west/other".parse().unwrap(), ..endpoint("west", "10.1.0.3", 2) };
    let both = Command::ReportEndpoints(node(2), vec![other, endpoint("west", "10.1.0.4", 2)]);
    let Ok(Reply::Items(items)) = west.run(both) else { panic!("items") };
    assert_eq!(items[0].as_ref().unwrap_err().code, Code::EntryNotOnNode);
    assert_eq!(held(&west), ["west 10.1.0.1", "west 10.1.0.4"]);
    west.run(Command::SetNodes(NodeVerb::Evict, Nodes::Ids(vec![node(1)]))).unwrap();
    assert_eq!(report(&mut west, 2, &["10.1.0.1"]), [None]);
    assert_eq!(held(&west), ["west 10.1.0.1"]);
}

#[test]
fn a_denial_is_its_origins_word_about_its_own_node() {
    let mut west = west_with_nodes();
    let mut east = Feed::of("east", &mut west);
    let denial = (Kind::NodeDenial, node(1).to_string(), postcard::to_stdvec(&Generation(u64::MAX)).unwrap());
    east.send(&mut west, [denial]);
    west.run(Command::SetNodes(NodeVerb::Evict, Nodes::Ids(vec![node(2)]))).unwrap();
    let denials = west.state.slice(&node(1)).unwrap().denials;
    let shown: Vec<_> = denials.iter().map(|((td, id), to)| (td.as_str(), *id, *to)).collect();
    assert_eq!(shown, [("east", node(1), Generation(u64::MAX)), ("west", node(2), Generation(1))]);
}

#[test]
fn a_peer_is_held_to_its_bounds_and_removing_makes_room() {
    let mut west = Cell::founded("west");
    let mut east = Feed::of("east", &mut west);
    let object = |n: u32| {
        let s = service("east", &format!("s{n}"), &Ipv4Addr::from(0x0a09_0000 + n).to_string());
        (Kind::Service, s.name.to_string(), postcard::to_stdvec(&s).unwrap())
    };
    east.send(&mut west, (0..1000).map(object));
    east.send(&mut west, (1000..1002).map(object));
    assert_eq!(services(&west).len(), 1000);
    assert_eq!(west.state.peer(&"east".parse().unwrap()).unwrap().seq, east.seq, "what is ignored is behind us");
    east.send(&mut west, [(Kind::Service, "s7".to_owned(), vec![]), object(1000), object(1001)]);
    assert_eq!(services(&west).len(), 1000);
    // One cluster came with the peering.
    east.send(&mut west, (0..1000).map(|n| (Kind::Cluster, format!("c{n}"), vec![])));
    assert_eq!(west.state.foreign_clusters().count(), 1000);
    // Our own have their own room.
    serve(&mut west, service("west", "ours", "10.8.0.1")).unwrap();
}

#[test]
fn a_clusters_name_is_ours_whatever_a_peer_claimed() {
    let mut west = Cell::founded("west");
    let mut east = Feed::of("east", &mut west);
    let prod = |address| Endpoint { cluster: cluster("prod"), ..endpoint("east", address, 7) };
    east.send(&mut west, [(Kind::Cluster, "prod".to_owned(), vec![])]);
    east.endpoint(&mut west, "10.2.0.1", &prod("10.2.0.1"));
    east.endpoint(&mut west, "10.2.0.2", &endpoint("east", "10.2.0.2", 7));
    west.run(Command::RegisterCluster(cluster("prod"), vec![], 10_000)).unwrap();
    assert_eq!(code(west.run(Command::RegisterCluster(cluster("prod"), vec![], 10_000))), Code::AlreadyExists);
    east.send(&mut west, [(Kind::Cluster, "prod".to_owned(), vec![])]);
    east.endpoint(&mut west, "10.2.0.3", &prod("10.2.0.3"));
    assert_eq!(west.state.foreign_clusters().map(|(id, _)| id.as_str()).collect::<Vec<_>>(), ["east"]);
    assert_eq!(held(&west), ["east 10.2.0.2"]);
}

fn issue(n: u8, count: usize) -> Command {
    let leaf = LeafRequest { entry: "db".parse().unwrap(), key_hash: [3; 32] };
    let (node, leaves) = (node(n), vec![leaf; count]);
    Command::Issue { node, generation: Generation(1), authority: "a1".into(), leaves }
}

#[test]
fn a_node_that_asks_without_end_is_told_to_wait_and_no_other_is() {
    let mut west = west_with_nodes();
    let refused = |reply: Result<Reply, Refusal>| {
        let Ok(Reply::Leaves(leaves)) = reply else { panic!("leaves") };
        leaves.into_iter().filter(|l| l.as_ref().is_err_and(|r| r.code == Code::Busy)).count()
    };
    // The node's own leaf, of its admission, counts as well.
    assert_eq!(refused(west.run(issue(1, 4094))), 0);
    assert_eq!(refused(west.run(issue(1, 3))), 2);
    assert_eq!(refused(west.run(issue(2, 1))), 0);
    // A restored replica decides alike.
    let mut restored = State::import(west.state.export()).unwrap();
    let entry = LogEntry { stamp: Stamp(1_000_000), client: [9; 32], request: [0; 16], command: issue(1, 1) };
    assert_eq!(refused(restored.apply(RaftIndex(west.index + 1), &entry).outcome), 1);
    assert_eq!(refused(west.run(issue(1, 1))), 1);
    assert_eq!(restored.digest(), west.state.digest());
    // Ended ones make room, before and after a tick forgets them.
    let again = |n: u8, nonce: u8, cell: &Cell, deadline| Admission {
        deadline: Stamp(deadline),
        ..admission(cell, n, nonce, None)
    };
    let after = ambit_state::UNATTESTED_MAX_MS + 1;
    for (nonce, now) in [(11, 1_000_000 + after), (12, 1_000_000 + 2 * after)] {
        let a = again(1, nonce, &west, now);
        west.at(now, 0, Command::AdmitNode(a)).unwrap();
        assert_eq!(refused(west.at(now, 0, issue(1, 4095))), 0);
        assert_eq!(refused(west.at(now, 0, issue(1, 1))), 1);
        west.at(now, 0, Command::Tick).unwrap();
    }
}

#[test]
fn leaves_answered_once_are_not_answered_again_to_a_node_that_is_out_by_now() {
    let mut west = west_with_nodes();
    let first = west.at(1_000_000, 5, issue(1, 1)).unwrap();
    assert_eq!(west.at(1_000_001, 5, issue(1, 1)).unwrap(), first);
    west.run(Command::SetNodes(NodeVerb::Ban, Nodes::Ids(vec![node(1)]))).unwrap();
    assert_eq!(code(west.at(1_000_002, 5, issue(1, 1))), Code::NodeBanned);
}

#[test]
fn objects_are_paged_in_the_order_of_their_keys_and_named_by_their_writes() {
    use ambit_state::{ObjectKey, ObjectKind};
    let mut west = west_with_nodes();
    west.state.take_writes();
    west.run(Command::CreateEntries(vec![entry("a", "west"), entry("web", "west")])).unwrap();
    let documents = |p| Command::ApplyDocuments { policies: vec![p], services: vec![], by: "me".into() };
    west.run(documents(policy("ok", "spiffe://west/db"))).unwrap();
    serve(&mut west, service("west", "db", "240.0.0.1")).unwrap();
    let written: Vec<ObjectKey> = west.state.take_writes().iter().filter_map(|w| west.state.object_key(w)).collect();
    let entry = |id: &str| ObjectKey::Entry(id.parse().unwrap());
    let named = |name: &str| ("west".parse().unwrap(), name.parse().unwrap());
    let changed = [entry("a"), entry("web"), ObjectKey::Policy(named("ok")), ObjectKey::Service(named("db"))];
    assert_eq!(written, changed);

    let all = [
        ObjectKey::Node(node(1)),
        ObjectKey::Node(node(2)),
        entry("a"),
        entry("db"),
        entry("web"),
        ObjectKey::Service(named("db")),
        ObjectKey::Policy(named("ok")),
    ];
    for size in 1..=8 {
        let (mut paged, mut after) = (Vec::new(), None);
        loop {
            let page = west.state.objects_after(after.as_ref(), &ObjectKind::ALL, size);
            assert!(page.len() <= size);
            let Some(last) = page.last().cloned() else { break };
            paged.extend(page);
            after = Some(last);
        }
        assert_eq!(paged, all, "pages of {size}");
    }
    assert_eq!(west.state.objects_after(None, &[ObjectKind::Service], 9), [ObjectKey::Service(named("db"))]);
    assert_eq!(west.state.objects_after(Some(&all[5]), &[ObjectKind::Entry], 9), []);
}

#[test]
fn an_entry_is_written_over_only_as_it_is_expected_to_be() {
    use ambit_state::command::Presence;
    let mut west = west_with_nodes();
    let written = |cell: &Cell, id: &str| cell.state.entry(&id.parse().unwrap()).unwrap().clone();
    let outcomes = |reply: Result<Reply, Refusal>| {
        let Ok(Reply::Items(items)) = reply else { panic!("items") };
        items.into_iter().map(|item| item.err().map(|r| r.code)).collect::<Vec<_>>()
    };
    let first = written(&west, "db");
    let changed = ambit_model::Entry { ttl: 120.try_into().unwrap(), ..first.entry.clone() };
    let stranger = entry("new", "west");
    let foreign = ambit_model::Entry { spiffe_id: "spiffe://east/db".parse().unwrap(), ..first.entry.clone() };
    let put = Command::PutEntries(vec![
        (changed.clone(), Presence::At(Revision(first.revision.0 + 1))),
        (changed.clone(), Presence::At(first.revision)),
        (stranger.clone(), Presence::There),
        (stranger.clone(), Presence::At(Revision(1))),
        (stranger.clone(), Presence::Whatever),
        (foreign, Presence::Whatever),
    ]);
    let refused = |code| Some(code);
    assert_eq!(
        outcomes(west.at(1_000_001, 8, put.clone())),
        [
            refused(Code::StaleRevision),
            None,
            refused(Code::NotFound),
            refused(Code::NotFound),
            None,
            refused(Code::NotOwner)
        ]
    );
    let second = written(&west, "db");
    assert_eq!((second.entry, second.revision > first.revision), (changed.clone(), true));
    assert_eq!(west.state.cell().unwrap().revision, second.revision, "nodes are told");
    // The same request again is answered as before; a new one on the old revision is not.
    assert_eq!(outcomes(west.at(1_000_002, 8, put))[1], None);
    assert_eq!(written(&west, "db").revision, second.revision);
    let late = Command::PutEntries(vec![(changed, Presence::At(first.revision))]);
    assert_eq!(outcomes(west.run(late)), [refused(Code::StaleRevision)]);
    // What is in memory only follows: the state loaded from its rows is the same.
    let mut bound = written(&west, "db").entry;
    let plain = bound.selectors.clone();
    let more = ["tpm:policy:servers".parse().unwrap()];
    bound.selectors = plain.iter().cloned().chain(more).collect();
    west.run(Command::PutEntries(vec![(bound.clone(), Presence::There)])).unwrap();
    bound.selectors = plain;
    west.run(Command::PutEntries(vec![(bound, Presence::There)])).unwrap();
    let loaded = State::import(west.state.export()).unwrap();
    assert_eq!(loaded.digest(), west.state.digest());
    let fitting = |s: &State| s.slice(&node(1)).unwrap().entries.len();
    assert_eq!(fitting(&loaded), fitting(&west.state));
}
