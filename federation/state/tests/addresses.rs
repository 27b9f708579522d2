//! From where tunnels of nodes come: what a node registers, who gets to know of it, and what a peer may say of it.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

mod common;

use ambit_model::policy::{Action, NodeAddress, Peers, Policy};
use ambit_model::record::{Head, Kind, Record};
use ambit_model::{Code, Entry, Generation, Refusal, Revision, Stamp, TrustDomain};
use ambit_state::command::{NodeVerb, Nodes};
use ambit_state::{Command, Reply, State};
use common::{Cell, admission, cluster, code, entry, node, pending};

/// West with three admitted nodes: `db` may run on the first, `web` on the second, nothing on the third.
fn west() -> Cell {
    let mut west = Cell::founded("west");
    west.run(Command::AllowEk(cluster("west"), (1..=3).map(node).collect())).unwrap();
    let on = |n, id| Entry { nodes: [node(n)].into(), ..entry(id, "west") };
    west.run(Command::CreateEntries(vec![on(1, "db"), on(2, "web")])).unwrap();
    for n in 1..=3 {
        admit(&mut west, n, n);
    }
    west
}
fn admit(west: &mut Cell, n: u8, nonce: u8) {
    let a = admission(west, n, nonce, None);
    west.run(Command::AdmitNode(a)).unwrap();
}
fn register(west: &mut Cell, n: u8, generation: u64, address: &str) -> Result<Reply, Refusal> {
    west.run(Command::RegisterAddress(node(n), Generation(generation), address.parse().unwrap()))
}
fn allow(west: &mut Cell, from: &str) {
    let policy = Policy {
        name: "to-db".parse().unwrap(),
        target: "spiffe://west/db".parse().unwrap(),
        action: Action::Allow,
        from: vec![from.parse::<Peers>().unwrap()],
        ports: vec![],
        extras: Default::default(),
    };
    west.run(Command::ApplyDocuments { policies: vec![policy], services: vec![], by: "me".into() }).unwrap();
}
/// Whose address is in the slice of node `n`: trust domain, first digits of the node, address, generation.
fn callers(cell: &Cell, n: u8) -> Vec<String> {
    let slice = cell.state.slice(&node(n)).unwrap();
    let text = |((td, node), row): (&(TrustDomain, _), &NodeAddress)| {
        let node: &ambit_model::NodeId = node;
        format!("{td} {} {} {}", node.0[0], row.address, row.since)
    };
    slice.callers.iter().map(text).collect()
}
fn moved(cell: &Cell) -> (Revision, u64) {
    let cell = cell.state.cell().unwrap();
    (cell.revision, cell.export_seq)
}

#[test]
fn a_slice_names_the_nodes_that_may_run_who_may_call_and_no_others() {
    let mut west = west();
    for n in 1..=3 {
        register(&mut west, n, 1, &format!("10.0.0.{n}")).unwrap();
    }
    assert_eq!(callers(&west, 1), [""; 0], "no policy");
    allow(&mut west, "spiffe://west/web");
    assert_eq!(callers(&west, 1), ["west 2 10.0.0.2 1"]);
    assert_eq!(callers(&west, 2), [""; 0], "nobody may call what runs there");
    assert_eq!(callers(&west, 3), [""; 0]);
    allow(&mut west, "spiffe://west/*");
    assert_eq!(callers(&west, 1), ["west 1 10.0.0.1 1", "west 2 10.0.0.2 1"], "the third may run nothing");
    // An entry for every node, which another one is alike.
    west.run(Command::CreateEntries(vec![entry("any", "west"), entry("more", "west")])).unwrap();
    assert_eq!(callers(&west, 1).len(), 3);
    allow(&mut west, "spiffe://west/none");
    assert_eq!(callers(&west, 1), [""; 0]);
    let ek = Entry {
        selectors: [entry("none", "west").selectors[0].clone(), format!("tpm:ek_hash:{}", node(3)).parse().unwrap()]
            .into(),
        ..entry("none", "west")
    };
    west.run(Command::CreateEntries(vec![ek])).unwrap();
    assert_eq!(callers(&west, 1), ["west 3 10.0.0.3 1"]);
}

#[test]
fn an_address_stands_until_another_is_registered_or_the_node_is_out() {
    let mut west = west();
    allow(&mut west, "spiffe://west/web");
    for bad in ["0.0.0.0", "224.0.0.1", "255.255.255.255"] {
        assert_eq!(code(register(&mut west, 2, 1, bad)), Code::BadRequest, "{bad}");
    }
    assert_eq!(code(register(&mut west, 9, 1, "10.0.0.2")), Code::NodeUntrusted, "a stranger");
    assert_eq!(code(register(&mut west, 2, 2, "10.0.0.2")), Code::SvidUntrusted, "of no admission");
    assert_eq!(callers(&west, 1), [""; 0]);
    register(&mut west, 2, 1, "10.0.0.2").unwrap();
    // Admissions are renewed all day: the same address moves nothing, and holds for leaves of both.
    admit(&mut west, 2, 12);
    let before = moved(&west);
    register(&mut west, 2, 2, "10.0.0.2").unwrap();
    assert_eq!(moved(&west), before);
    assert_eq!(callers(&west, 1), ["west 2 10.0.0.2 1"]);
    assert_eq!(code(register(&mut west, 2, 1, "10.0.0.9")), Code::SvidUntrusted, "the stream of a former admission");
    // Moved with the next start, while the stream of the former admission may still be open.
    admit(&mut west, 2, 14);
    assert_eq!(code(register(&mut west, 2, 2, "10.0.0.2")), Code::SvidUntrusted);
    register(&mut west, 2, 3, "10.0.0.9").unwrap();
    assert!(moved(&west) > before);
    assert_eq!(callers(&west, 1), ["west 2 10.0.0.9 3"], "leaves of the former admission are refused there");
    // Out, and in again: nothing of before comes back.
    west.run(Command::SetNodes(NodeVerb::Quarantine, Nodes::Ids(vec![node(2)]))).unwrap();
    assert_eq!(callers(&west, 1), [""; 0]);
    assert_eq!(code(register(&mut west, 2, 3, "10.0.0.9")), Code::NodeUntrusted);
    west.run(Command::SetNodes(NodeVerb::Release, Nodes::Ids(vec![node(2)]))).unwrap();
    admit(&mut west, 2, 15);
    assert_eq!(callers(&west, 1), [""; 0]);
    register(&mut west, 2, 4, "10.0.0.9").unwrap();
    assert_eq!(callers(&west, 1), ["west 2 10.0.0.9 4"]);
    // All of it is in a snapshot.
    let restored = State::import(west.state.export()).unwrap();
    assert_eq!((restored.digest(), restored.slice(&node(1))), (west.state.digest(), west.state.slice(&node(1))));
}

#[test]
fn an_admission_registers_one_address_whoever_comes_with_another() {
    let mut west = west();
    allow(&mut west, "spiffe://west/web");
    let known = |cell: &Cell, generation, address: &str| {
        cell.state.has_registered(&node(2), Generation(generation), address.parse().unwrap()).map_err(|r| r.code)
    };
    assert_eq!(known(&west, 1, "10.0.0.2"), Ok(false));
    register(&mut west, 2, 1, "10.0.0.2").unwrap();
    let refused = register(&mut west, 2, 1, "10.0.0.66");
    assert!(format!("{refused:?}").contains("10.0.0.2"), "{refused:?}");
    assert_eq!(code(refused), Code::NodeAddressMismatch, "a copy of its key");
    let (before, digest) = (moved(&west), west.state.digest());
    register(&mut west, 2, 1, "10.0.0.2").unwrap();
    assert_eq!(callers(&west, 1), ["west 2 10.0.0.2 1"]);
    // Renewed, with the same address: nobody hears of it, and the thief is no better off.
    admit(&mut west, 2, 12);
    assert_eq!(known(&west, 2, "10.0.0.2"), Ok(false), "what a former admission registered is not this one's word");
    let renewed = moved(&west);
    register(&mut west, 2, 2, "10.0.0.2").unwrap();
    assert_eq!(moved(&west), renewed);
    assert_ne!(west.state.digest(), digest);
    for generation in [1, 2] {
        let refused = code(register(&mut west, 2, generation, "10.0.0.66"));
        assert_eq!(refused, if generation == 1 { Code::SvidUntrusted } else { Code::NodeAddressMismatch });
    }
    assert_eq!(known(&west, 2, "10.0.0.2"), Ok(true));
    assert_eq!(known(&west, 2, "10.0.0.66"), Err(Code::NodeAddressMismatch), "without a commit");
    assert_eq!(known(&west, 3, "0.0.0.0"), Err(Code::BadRequest), "nor one for what is no address");
    let restored = State::import(west.state.export()).unwrap();
    let after = restored.has_registered(&node(2), Generation(2), "10.0.0.66".parse().unwrap());
    assert_eq!(after.map_err(|r| r.code), Err(Code::NodeAddressMismatch));
    assert!(moved(&west) >= before && callers(&west, 1) == ["west 2 10.0.0.2 1"]);
}

#[test]
fn a_node_that_may_run_nothing_moves_no_slice() {
    let mut west = west();
    let (revision, seq) = moved(&west);
    register(&mut west, 3, 1, "10.0.0.3").unwrap();
    assert_eq!(moved(&west), (revision, seq + 1), "peers hear of it, nodes need not");
}

/// West's peer `td`, which sends whatever it likes, well chained.
struct Peer(TrustDomain, u64, [u8; 32]);

impl Peer {
    fn of(td: &str, west: &mut Cell) -> Peer {
        let td: TrustDomain = td.parse().unwrap();
        west.run(Command::PutPeer(td.clone(), pending(), None)).unwrap();
        west.run(Command::ApprovePeer(td.clone(), [7; 32])).unwrap();
        Peer(td, 0, [0; 32])
    }
    fn says(&mut self, west: &mut Cell, key: &str, payload: Vec<u8>) -> Result<Reply, Refusal> {
        let Peer(origin, seq, prev_hash) = self;
        let (origin, kind, key) = (origin.clone(), Kind::NodeAddress, key.to_owned());
        let record =
            Record { origin: origin.clone(), epoch: 1, seq: *seq + 1, prev_hash: *prev_hash, kind, key, payload };
        let head = Head { origin, epoch: 1, seq: record.seq, hash: record.hash(), stamp: Stamp(1), nonce: [0; 16] };
        let taken = west.run(Command::Import(head.clone(), vec![record]));
        if taken.is_ok() {
            (self.1, self.2) = (head.seq, head.hash);
        }
        taken
    }
}

fn at(address: &str) -> Vec<u8> {
    postcard::to_stdvec(&NodeAddress { address: address.parse().unwrap(), since: Generation(4) }).unwrap()
}

#[test]
fn a_peer_speaks_of_its_own_nodes_and_is_heard_where_its_identities_may_call() {
    let mut west = west();
    for n in 1..=2 {
        register(&mut west, n, 1, &format!("10.0.0.{n}")).unwrap();
    }
    allow(&mut west, "spiffe://west/web");
    let mut east = Peer::of("east", &mut west);
    east.says(&mut west, &node(7).to_string(), at("10.2.0.7")).unwrap();
    // Of a node of ours it says it of its own leaves only.
    east.says(&mut west, &node(2).to_string(), at("10.2.0.2")).unwrap();
    assert_eq!(callers(&west, 1), ["west 2 10.0.0.2 1"], "no identity of east may call");
    allow(&mut west, "spiffe://east/web");
    assert_eq!(callers(&west, 1), ["east 2 10.2.0.2 4", "east 7 10.2.0.7 4"]);
    assert_eq!(west.state.node_address(&node(2)).unwrap().address, "10.0.0.2".parse::<std::net::Ipv4Addr>().unwrap());
    east.says(&mut west, &node(7).to_string(), at("10.2.0.8")).unwrap();
    east.says(&mut west, &node(2).to_string(), vec![]).unwrap();
    assert_eq!(callers(&west, 1), ["east 7 10.2.0.8 4"], "moved, and gone");
    east.says(&mut west, &node(7).to_string(), at("0.0.0.0")).unwrap();
    assert_eq!(callers(&west, 1), [""; 0], "no machine's address is none");
    for (key, payload) in [("no node", at("10.2.0.7")), (&*node(7).to_string(), vec![1])] {
        assert!(east.says(&mut west, key, payload).is_err(), "{key}");
    }
}

#[test]
fn what_one_cell_registers_another_imports() {
    let mut west = west();
    let mut north = Cell::founded("north");
    north.run(Command::PutPeer("west".parse().unwrap(), pending(), None)).unwrap();
    north.run(Command::ApprovePeer("west".parse().unwrap(), [7; 32])).unwrap();
    register(&mut west, 2, 1, "10.0.0.2").unwrap();
    register(&mut west, 3, 1, "10.0.0.3").unwrap();
    west.run(Command::SetNodes(NodeVerb::Ban, Nodes::Ids(vec![node(3)]))).unwrap();
    let records: Vec<Record> = west.state.records_after(0).cloned().collect();
    let last = records.last().unwrap();
    let head = Head {
        origin: "west".parse().unwrap(),
        epoch: 1,
        seq: last.seq,
        hash: last.hash(),
        stamp: Stamp(1),
        nonce: [0; 16],
    };
    north.run(Command::Import(head, records)).unwrap();
    let rows = |cell: &Cell| cell.state.node_addresses().map(|(key, row)| (key.clone(), *row)).collect::<Vec<_>>();
    assert_eq!(rows(&north), rows(&west));
    assert_eq!(rows(&west).len(), 1, "one that is banned is nowhere");
    // And nobody of the outside: no policy about addresses lets it in, here or at the peer.
    let banned = std::net::Ipv4Addr::new(10, 0, 0, 3);
    assert!(west.state.left_until(banned).is_some() && north.state.left_until(banned).is_some());
    admit(&mut west, 2, 9);
    register(&mut west, 2, 2, "10.0.0.9").unwrap();
    assert!(west.state.left_until([10, 0, 0, 2].into()) < west.state.left_until(banned), "who moved is gone sooner");
    assert!(west.state.left_until([10, 0, 0, 2].into()).is_some());
}
