//! The audit log's records: made by every replica the same, counted in the state, and of everything that was committed.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test says that it failed by panicking")]

mod common;

use ambit_audit::record::Outcome;
use ambit_audit::{Frontier, Record, leaf_hash};
use ambit_model::{Code, RaftIndex, Stamp};
use ambit_state::audit::{AuditEntry, CosignedRow, Turn, WitnessAsk};
use ambit_state::command::LeafRequest;
use ambit_state::objects::{DenialRow, TokenRow, TokenScope};
use ambit_state::{Command, LogEntry, NodeVerb, Nodes, State};
use common::*;

fn admitted() -> (Cell, Vec<AuditEntry>) {
    let mut cell = Cell::founded("west");
    cell.run(Command::BeginAudit).unwrap();
    cell.run(Command::AllowEk(cluster("west"), vec![node(1)])).unwrap();
    let admission = admission(&cell, 1, 1, None);
    cell.run(Command::AdmitNode(admission)).unwrap();
    cell.run(Command::CreateEntries(vec![entry("web", "west"), entry("db", "west")])).unwrap();
    let leaves = ["web", "absent"].map(|id| LeafRequest { entry: id.parse().unwrap(), key_hash: [4; 32] });
    let generation = cell.state.node(&node(1)).unwrap().generation;
    let issue = Command::Issue { node: node(1), generation, authority: "a1".into(), leaves: leaves.into() };
    cell.at(1_000_100, 7, issue.clone()).unwrap();
    // Asked again, answered from memory: nothing is issued, nothing is recorded.
    cell.at(1_000_200, 7, issue).unwrap();
    cell.run(Command::SetNodes(NodeVerb::Ban, Nodes::Ids(vec![node(1)]))).unwrap();
    assert_eq!(code(cell.run(Command::SetNodes(NodeVerb::Ban, Nodes::Ids(vec![node(9)])))), Code::NotFound);
    let audited = cell.state.take_audited();
    (cell, audited)
}

fn records(audited: &[AuditEntry]) -> Vec<Record> {
    audited.iter().map(|entry| Record::decode(&entry.bytes).unwrap()).collect()
}

#[test]
fn what_was_committed_is_recorded() {
    let (cell, audited) = admitted();
    let said: Vec<String> = records(&audited)
        .into_iter()
        .map(|r| format!("{} {} {} {}", r.act, r.object, r.outcome.as_str(), r.code).trim_end().to_owned())
        .collect();
    let node = node(1);
    assert_eq!(
        said,
        [
            "audit.begin west/ambit/audit/1 done".to_owned(),
            format!("ek.allow {node} done"),
            format!("node.admit {node} done"),
            format!("svid.issue spiffe://west/ambit/node/{node} done"),
            "entry.create web done".to_owned(),
            "entry.create db done".to_owned(),
            "svid.issue spiffe://west/web done".to_owned(),
            "svid.issue entry absent refused entry_not_on_node".to_owned(),
            format!("node.ban {node} done"),
            format!("node.ban {} refused not_found", common::node(9)),
        ]
    );
    let row = cell.state.audit().unwrap();
    assert_eq!(row.frontier.size(), audited.len() as u64);
    let mut frontier = Frontier::default();
    for (n, entry) in (0..).zip(&audited) {
        assert_eq!((entry.n, entry.leaf), (n, leaf_hash(&entry.bytes)));
        frontier.push(entry.leaf);
    }
    assert_eq!(row.frontier, frontier);
    // Another root is another form (`FORM`): a replica of a former release makes this one.
    assert_eq!(hex::encode(frontier.root()), "2a2a5da99b46f5db5530d4c7752acacd3929649647219bb079cb9b25339a93ec");
    let leaf = &records(&audited)[6];
    let issued = cell.state.issued().find(|i| i.spiffe_id.as_str() == "spiffe://west/web").unwrap();
    assert_eq!(leaf.facts["serial"], hex::encode(issued.serial));
    assert_eq!((leaf.index, leaf.at, leaf.stamp_ms), (issued.index.0, 0, 1_000_100));
}

/// The cell names whom it knows, and gives the hash of the others' names.
#[test]
fn actors_are_named() {
    let mut cell = Cell::founded("west");
    cell.run(Command::BeginAudit).unwrap();
    cell.state.take_audited();
    let mut by = |name: &str| {
        cell.index += 1;
        let row = TokenRow { scope: TokenScope::Node(cluster("west")), expires: Stamp(2_000_000), used: false };
        let command = Command::CreateToken([cell.index as u8; 32], row);
        let entry = LogEntry { stamp: Stamp(1_000_000), client: sha256(name.as_bytes()), request: [0; 16], command };
        cell.state.apply(RaftIndex(cell.index), &entry).outcome.unwrap();
        records(&cell.state.take_audited())[0].actor.clone()
    };
    assert_eq!(by("spiffe://west/ambit/admin/founder"), "spiffe://west/ambit/admin/founder");
    assert_eq!(by("replica 3"), "spiffe://west/ambit/replica/3");
    let hash = format!("sha256:{}", hex::encode(sha256(b"anonymous 10.0.0.1")));
    assert_eq!(by("anonymous 10.0.0.1"), hash);
}

/// I13: a state that was applied, one that was applied again, and one that began with a snapshot on the way.
#[test]
fn every_replica_comes_to_the_same_log() {
    let (cell, audited) = admitted();
    let replay = |from: Option<usize>| {
        let (mut state, mut made) = (State::new(), Vec::new());
        for (index, entry) in (1..).zip(&cell.log) {
            state.apply(RaftIndex(index), entry);
            made.extend(state.take_audited());
            if from == Some(index as usize) {
                state = State::import(state.export()).unwrap();
            }
        }
        (state, made)
    };
    for from in std::iter::once(None).chain((1..=cell.log.len()).map(Some)) {
        let (state, made) = replay(from);
        assert_eq!(state.digest(), cell.state.digest(), "{from:?}");
        assert_eq!(made, audited, "{from:?}");
    }
}

/// However many records there are, the state holds the right edge of their tree and nothing of them.
#[test]
fn the_state_does_not_grow_with_the_log() {
    let (mut cell, _) = admitted();
    let bytes = |state: &State| state.export().iter().filter_map(|w| w.value.as_ref()).map(Vec::len).sum::<usize>();
    let (rows, before) = (cell.state.row_count(), bytes(&cell.state));
    for _ in 0..2_000 {
        let _ = cell.run(Command::SetNodes(NodeVerb::Ban, Nodes::Ids(vec![node(9)])));
    }
    assert_eq!(cell.state.take_audited().len(), 2_000);
    assert_eq!(cell.state.row_count(), rows);
    assert!(bytes(&cell.state) < before + 400, "{before}");
}

/// Replicas of one cell are upgraded one by one: nothing is recorded before the cell agrees to begin.
#[test]
fn a_log_begins_where_the_cell_says() {
    let mut cell = Cell::founded("west");
    assert!(cell.state.audit_head().is_none() && !cell.state.audit_is_due());
    assert!(cell.state.take_audited().is_empty());
    cell.run(Command::BeginAudit).unwrap();
    assert_eq!(code(cell.run(Command::BeginAudit)), Code::AlreadyExists);
    assert_eq!(cell.state.audit_head().unwrap().get().origin, "west/ambit/audit/1");
    assert_eq!(records(&cell.state.take_audited()).len(), 2);
}

/// What time brings about is recorded as the cell's own doing.
#[test]
fn denials_by_time_are_recorded() {
    let (mut cell, _) = admitted();
    cell.run(Command::SetNodes(NodeVerb::Unban, Nodes::Ids(vec![node(1)]))).unwrap();
    let admission = admission(&cell, 1, 9, None);
    cell.run(Command::AdmitNode(admission)).unwrap();
    cell.state.take_audited();
    let mut stamp = 1_000_000;
    while cell.state.audit().unwrap().frontier.size() < 20 && stamp < 4_000_000 {
        stamp += 1_000;
        cell.at(stamp, 0, Command::Tick).unwrap();
        if let Some(record) = records(&cell.state.take_audited()).first() {
            assert_eq!((record.act.as_str(), record.actor.as_str()), ("node.distrust", "cell"));
            assert_eq!((record.code.as_str(), record.outcome), ("node_late", Outcome::Done));
            return;
        }
    }
    panic!("no record");
}

/// Nothing of people's texts, nor what evidence showed, is in the log.
#[test]
fn what_is_not_said() {
    let (mut cell, _) = admitted();
    let row = DenialRow {
        stamp: Stamp(0),
        node: node(3),
        code: "ima_violation".into(),
        diverged: "secret-path".into(),
        expected: "secret-expected".into(),
        found: "secret-found".into(),
    };
    let deny = Command::DenyNode { nonce: [8; 32], deadline: Stamp(1_060_000), row, distrust: None };
    cell.run(deny).unwrap();
    cell.run(Command::StopPeer("east".parse().unwrap(), "secret".into())).ok();
    let audited = cell.state.take_audited();
    let text: String = audited.iter().map(|entry| String::from_utf8_lossy(&entry.bytes).into_owned()).collect();
    assert!(text.contains("node.refuse") && text.contains("ima_violation"), "{text}");
    assert!(!text.contains("secret"), "{text}");
}

fn tree(leaves: &[u8]) -> Vec<Vec<u8>> {
    leaves.iter().map(|leaf| vec![*leaf]).collect()
}

/// Hashes computed from entries each time.
struct Naive<'a>(&'a [Vec<u8>]);
impl ambit_audit::Nodes for Naive<'_> {
    type Error = ();
    fn node(&self, level: u32, index: u64) -> Result<[u8; 32], ()> {
        let mut frontier = Frontier::default();
        let (from, to) = ((index << level) as usize, ((index + 1) << level) as usize);
        self.0.get(from..to).ok_or(())?.iter().for_each(|entry| frontier.push(leaf_hash(entry)));
        Ok(frontier.root())
    }
}

fn ask(log: &[Vec<u8>], old: u64) -> Command {
    let size = log.len() as u64;
    let root = ambit_audit::proof::root(&Naive(log), size).unwrap();
    let proof = if old == 0 { vec![] } else { ambit_audit::consistency(&Naive(log), old, size).unwrap() };
    Command::Witness(Box::new(WitnessAsk { peer: "east".parse().unwrap(), epoch: 1, old, size, root, proof }))
}

/// What a witness commits before it cosigns: heads that follow from each other, and no other.
#[test]
fn a_witness_takes_what_follows_and_nothing_else() {
    let mut cell = Cell::founded("west");
    let east = "east".parse().unwrap();
    let log = tree(&[1, 2, 3, 4, 5, 6, 7]);
    assert_eq!(code(cell.run(ask(&log[..3], 0))), Code::NotFound, "no peer");
    cell.run(Command::PutPeer("east".parse().unwrap(), pending(), None)).unwrap();
    cell.run(ask(&log[..3], 0)).unwrap();
    cell.run(ask(&log[..5], 3)).unwrap();
    let trouble = |cell: &Cell| cell.state.witnessed().next().unwrap().1.trouble.clone();
    let head = cell.state.witnessed_head(&east, 1).unwrap();
    assert_eq!((head.get().size, trouble(&cell)), (5, String::new()));
    // Somebody was first: nothing is wrong.
    assert_eq!(code(cell.run(ask(&log[..6], 3))), Code::StaleRevision);
    assert_eq!(trouble(&cell), "");
    // A rollback, another tree of the same size, and one that grew from another.
    assert_eq!(code(cell.run(ask(&log[..4], 4))), Code::AuditUnwitnessed);
    assert!(!trouble(&cell).is_empty() && cell.state.witnessed_head(&east, 1).is_none());
    let other = tree(&[1, 2, 9, 4, 5, 6, 7]);
    assert_eq!(code(cell.run(ask(&other[..5], 5))), Code::AuditUnwitnessed);
    assert_eq!(code(cell.run(ask(&other, 5))), Code::AuditUnwitnessed);
    assert!(trouble(&cell).contains("expected"), "{}", trouble(&cell));
    let row = cell.state.witnessed().next().unwrap().1;
    assert_eq!(row.size, 5, "what was cosigned stays");
    // The log itself goes on.
    cell.run(ask(&log, 5)).unwrap();
    assert_eq!(trouble(&cell), "");
    // A lost incarnation's log is heard no more.
    let Command::Witness(again) = ask(&log, 0) else { unreachable!() };
    cell.run(Command::Witness(Box::new(WitnessAsk { epoch: 2, ..*again.clone() }))).unwrap();
    assert_eq!(code(cell.run(Command::Witness(Box::new(WitnessAsk { old: 7, ..*again })))), Code::AuditUnwitnessed);
}

/// A peer writes nothing here by asking again, and invents no incarnation.
#[test]
fn what_a_witness_knows_is_not_committed_again() {
    let mut cell = Cell::founded("west");
    cell.run(Command::PutPeer("east".parse().unwrap(), pending(), None)).unwrap();
    cell.run(Command::ApprovePeer("east".parse().unwrap(), [7; 32])).unwrap();
    let first = ambit_model::record::Record {
        origin: "east".parse().unwrap(),
        epoch: 1,
        seq: 1,
        prev_hash: [0; 32],
        kind: ambit_model::record::Kind::Policy,
        key: "gone".into(),
        payload: Vec::new(),
    };
    let (origin, hash, nonce) = (first.origin.clone(), first.hash(), [0; 16]);
    let head = ambit_model::record::Head { origin, epoch: 1, seq: 1, hash, stamp: Stamp(1), nonce };
    cell.run(Command::Import(head, vec![first])).unwrap();
    let asked = |log: &[Vec<u8>], old| match ask(log, old) {
        Command::Witness(ask) => *ask,
        _ => unreachable!(),
    };
    let log = tree(&[1, 2, 3, 4, 5]);
    let turn = |cell: &Cell, ask: &WitnessAsk| cell.state.witness_turn(ask).map_err(|refusal| refusal.code);
    assert_eq!(turn(&cell, &asked(&log[..3], 0)), Ok(Turn::Commit));
    for epoch in [0, 2, u64::MAX] {
        let other = WitnessAsk { epoch, ..asked(&log[..3], 0) };
        assert_eq!(turn(&cell, &other), Err(Code::StaleRevision), "incarnation {epoch}");
    }
    cell.run(ask(&log[..3], 0)).unwrap();
    assert_eq!(turn(&cell, &asked(&log[..3], 3)), Ok(Turn::Known));
    assert_eq!(turn(&cell, &asked(&log, 0)), Ok(Turn::From(3)));
    assert_eq!(turn(&cell, &asked(&log, 3)), Ok(Turn::Commit));
    // A rollback is committed once, as an alarm; after that it is an answer.
    let back = asked(&log[..2], 2);
    assert_eq!(turn(&cell, &back), Ok(Turn::Commit));
    assert_eq!(code(cell.run(ask(&log[..2], 2))), Code::AuditUnwitnessed);
    assert_eq!(turn(&cell, &back), Err(Code::AuditUnwitnessed));
    assert_eq!(turn(&cell, &asked(&log, 3)), Ok(Turn::Commit), "what follows ends the alarm");
    // Who is removed leaves nothing behind.
    cell.run(Command::SuspendPeer("east".parse().unwrap(), "me".into())).unwrap();
    let act = ambit_model::Act::RemoveTrustDomain("east".parse().unwrap());
    cell.run(Command::Act { act, approved: None, by: "me".into() }).unwrap();
    assert_eq!(cell.state.witnessed().count(), 0);
}

/// Two cells that cosign each other do not do so for ever: it adds no record.
#[test]
fn cosigning_makes_no_records() {
    let mut cell = Cell::founded("west");
    cell.run(Command::BeginAudit).unwrap();
    cell.run(Command::PutPeer("east".parse().unwrap(), pending(), None)).unwrap();
    cell.state.take_audited();
    let log = tree(&[1, 2, 3]);
    cell.run(ask(&log, 0)).unwrap();
    let row = CosignedRow { epoch: 1, size: 1, root: [0; 32], line: "x".into() };
    cell.run(Command::TakeCosignature("east".parse().unwrap(), row.clone())).unwrap();
    assert!(cell.state.take_audited().is_empty());
    let future = CosignedRow { size: 99, ..row };
    assert_eq!(code(cell.run(Command::TakeCosignature("east".parse().unwrap(), future))), Code::StaleRevision);
    assert_eq!(code(cell.run(ask(&tree(&[9, 9, 9]), 3))), Code::AuditUnwitnessed);
    assert_eq!(records(&cell.state.take_audited())[0].act, "audit.cosign");
}
