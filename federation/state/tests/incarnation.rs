//! A cell that begins anew forgets no denial, issues nothing before fresh verdicts, and reuses no number.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use ambit_model::{Code, Generation, RaftIndex, Stamp};
use ambit_state::command::{LeafRequest, RoundVerdict};
use ambit_state::objects::*;
use ambit_state::{Beginning, Command, NodeVerb, Nodes, Reply, State};
use common::{Cell, admission, cluster, code, entry, node, seen};

const NOW: u64 = 1_000_000;
/// Restored two minutes later: longer than three intervals, within the hour of a verdict.
const LATER: u64 = NOW + 120_000;

fn member() -> Member {
    Member {
        address: "127.0.0.1:9".into(),
        authority: "a9".into(),
        authority_not_after: Stamp(1_000_000_000),
        wrap_key: vec![],
        record_key: [9; 32],
    }
}

fn beginning(cause: Cause) -> Beginning {
    Beginning { cause, replica: 1, member: member(), admit: None, past_epoch: 0, keys: None }
}

/// Three replicas, nodes 1 and 2 admitted, 2 banned, and something of everything that must not come back.
fn west() -> Cell {
    let mut west = Cell::founded("west");
    for n in 2..=3 {
        let token = [n as u8; 32];
        let scope = TokenScope::Replica(n, String::new());
        west.run(Command::CreateToken(token, TokenRow { scope, expires: Stamp(NOW * 2), used: false })).unwrap();
        let (issuer_key_hash, tls_key_hash) = ([1; 32], [2; 32]);
        west.run(Command::AdmitReplica { token, replica: n, issuer_key_hash, tls_key_hash }).unwrap();
        west.run(Command::PutMember(n, Member { authority: format!("a{n}"), ..member() }, KeySetRow::default()))
            .unwrap();
    }
    let scope = TokenScope::Node(cluster("west"));
    west.run(Command::CreateToken([77; 32], TokenRow { scope, expires: Stamp(NOW * 2), used: false })).unwrap();
    west.run(Command::RotateTicketKey([(1, vec![1])].into())).unwrap();
    west.run(Command::AllowEk(cluster("west"), vec![node(1), node(2)])).unwrap();
    west.run(Command::CreateEntries(vec![entry("db", "west")])).unwrap();
    for n in 1..=2 {
        let mut admission = admission(&west, n, n, None);
        admission.authority = "a2".into();
        west.run(Command::AdmitNode(admission)).unwrap();
    }
    west.run(Command::SetNodes(NodeVerb::Ban, Nodes::Ids(vec![node(2)]))).unwrap();
    west
}

/// The same state out of a snapshot, begun anew.
fn restored(west: &Cell, cause: Cause) -> Cell {
    let mut state = State::import(west.state.export()).unwrap();
    assert_eq!(state.digest(), west.state.digest());
    assert!(state.begin_incarnation(Stamp(LATER), beginning(cause)).unwrap().is_none());
    let index = state.applied().0;
    Cell { state, index, log: Vec::new() }
}

fn issue(n: u8, generation: u64) -> Command {
    let leaf = LeafRequest { entry: "db".parse().unwrap(), key_hash: [4; 32] };
    let generation = Generation(generation);
    Command::Issue { node: node(n), generation, authority: "a9".into(), leaves: vec![leaf] }
}

fn verdict(cell: &Cell, n: u8, clock: u64) -> Command {
    let policy_revision = cell.state.cell().unwrap().policy_revision;
    Command::PutVerdicts(vec![RoundVerdict {
        node: node(n),
        generation: Generation(1),
        policy_revision,
        seen: seen(clock),
    }])
}

#[test]
fn nothing_is_signed_for_a_node_before_its_own_fresh_verdict() {
    for cause in [Cause::Restored, Cause::Recovered] {
        let mut cell = restored(&west(), cause);
        assert_eq!(code(cell.at(LATER + 1, 0, issue(1, 1))), Code::NodeLate);
        assert!(cell.state.is_late(&node(1)));
        // Time without the cell is not the node's fault (I22).
        cell.at(LATER + 2, 0, Command::Tick).unwrap();
        assert_eq!(cell.state.node(&node(1)).unwrap().state, NodeState::Admitted);
        let round = verdict(&cell, 1, 50);
        assert_eq!(cell.at(LATER + 3, 0, round).unwrap(), Reply::Items(vec![Ok(())]));
        assert!(matches!(cell.at(LATER + 4, 0, issue(1, 1)).unwrap(), Reply::Leaves(l) if l[0].is_ok()));
    }
}

#[test]
fn a_verdict_of_the_very_millisecond_of_the_beginning_does_not_count() {
    let west = west();
    let mut state = State::import(west.state.export()).unwrap();
    state.begin_incarnation(Stamp(0), beginning(Cause::Restored)).unwrap();
    assert_eq!(state.stamp(), Stamp(NOW), "time does not go back");
    let index = state.applied().0;
    let mut cell = Cell { state, index, log: Vec::new() };
    assert_eq!(code(cell.at(NOW, 0, issue(1, 1))), Code::NodeLate);
}

#[test]
fn a_ban_holds_and_what_was_spent_or_sealed_is_void() {
    let west = west();
    let mut cell = restored(&west, Cause::Restored);
    assert_eq!(cell.state.node(&node(2)).unwrap().state, NodeState::Banned);
    assert_eq!(cell.state.denied(&node(2)), Some(Generation(1)));
    let mut again = admission(&cell, 2, 99, None);
    (again.authority, again.deadline) = ("a9".into(), Stamp(LATER * 2));
    assert_eq!(code(cell.at(LATER + 1, 0, Command::AdmitNode(again))), Code::NodeBanned);
    assert_eq!(code(cell.at(LATER + 1, 0, issue(2, 1))), Code::NodeBanned);
    assert_eq!(cell.state.ticket_keys().count(), 0);
    assert!(west.state.token(&[77; 32]).is_some() && cell.state.token(&[77; 32]).is_none());
    // An intermediate of the lost incarnation signs nothing.
    let mut stolen = issue(1, 1);
    if let Command::Issue { authority, .. } = &mut stolen {
        *authority = "a2".into();
    }
    let round = verdict(&cell, 1, 50);
    cell.at(LATER + 2, 0, round).unwrap();
    assert_eq!(code(cell.at(LATER + 3, 0, stolen)), Code::AuthorityMismatch);
}

#[test]
fn every_count_goes_on_far_above_and_the_trail_says_why() {
    let west = west();
    let cell = restored(&west, Cause::Recovered);
    let (before, after) = (west.state.cell().unwrap(), cell.state.cell().unwrap());
    assert_eq!((before.epoch, after.epoch), (1, 2));
    assert_eq!(cell.state.applied(), RaftIndex(1 << 40));
    assert_eq!(after.revision.0, 1 << 40);
    assert_eq!(after.bundle_sequence, 2 << 40 | 1);
    assert!(after.next_identity > before.next_identity + 1_000_000);
    assert_eq!(cell.state.members().map(|(id, m)| (id, m.authority.as_str())).collect::<Vec<_>>(), [(1, "a9")]);
    let trail: Vec<_> = cell.state.incarnations().map(|(epoch, row)| (epoch, row.clone())).collect();
    let row = IncarnationRow {
        cause: Cause::Recovered,
        began: Stamp(LATER),
        from_index: west.state.applied(),
        from_digest: west.state.digest(),
        replica: 1,
        given_up: vec![2, 3],
    };
    assert_eq!(trail, [(2, row)]);
    // The chain of records goes on: a peer that imported no more than came along takes the new epoch with it.
    let last = cell.state.records_after(before.export_seq).collect::<Vec<_>>();
    assert_eq!(
        last.iter().map(|r| (r.epoch, r.seq, r.prev_hash)).collect::<Vec<_>>(),
        [(2, before.export_seq + 1, before.export_hash)]
    );
    // And again from there.
    let third = restored(&cell, Cause::Restored);
    assert_eq!((third.state.cell().unwrap().epoch, third.state.applied()), (3, RaftIndex(2 << 40)));
    // A backup of the first incarnation does not know of the second.
    let mut elsewhere = State::import(west.state.export()).unwrap();
    let aware = Beginning { past_epoch: 2, ..beginning(Cause::Restored) };
    elsewhere.begin_incarnation(Stamp(LATER), aware).unwrap();
    assert_eq!((elsewhere.cell().unwrap().epoch, elsewhere.applied()), (3, RaftIndex(2 << 40)));
    let absurd = Beginning { past_epoch: u64::MAX - 1, ..beginning(Cause::Restored) };
    let digest = elsewhere.digest();
    assert_eq!(code(elsewhere.begin_incarnation(Stamp(LATER), absurd)), Code::BadRequest);
    assert_eq!(elsewhere.digest(), digest, "a refusal changes nothing");
    let back = State::import(third.state.export()).unwrap();
    assert_eq!((back.digest(), back.incarnations().count()), (third.state.digest(), 2));
}

#[test]
fn an_admission_gets_a_generation_that_no_lost_one_can_have() {
    let west = west();
    let mut cell = restored(&west, Cause::Restored);
    let mut again = admission(&cell, 1, 60, None);
    (again.authority, again.deadline) = ("a9".into(), Stamp(LATER * 2));
    match cell.at(LATER + 1, 0, Command::AdmitNode(again)).unwrap() {
        Reply::Admitted(generation, issuance) => {
            assert_eq!(generation, Generation((1 << 32) + 1));
            // Epoch, index, position: no serial of before.
            assert_eq!(issuance.serial[..4], (0x4000_0002u32).to_be_bytes());
        }
        other => assert_eq!(format!("{other:?}"), "an admission"),
    }
}

#[test]
fn a_new_intermediate_needs_the_keys_that_were_admitted() {
    let mut state = State::import(west().state.export()).unwrap();
    let begin = Beginning { admit: Some(([5; 32], [6; 32])), ..beginning(Cause::Restored) };
    let admission = state.begin_incarnation(Stamp(LATER), begin).unwrap().unwrap();
    assert_eq!((admission.get().issuer_key_hash, admission.get().tls_key_hash), ([5; 32], [6; 32]));
    assert_eq!(state.member(1).unwrap().authority_not_after, admission.get().lifetime.not_after);
    // What was wrapped to its former keys it cannot open: it is wrapped to again. The key set before names lost keys.
    let mut west = west();
    let root = ambit_state::Command::WrapRoot(*west.state.roots().keys().next().unwrap(), [(1, vec![1])].into());
    west.run(root).unwrap();
    let keys = KeySetRow { statement: vec![9], signature: vec![9] };
    for (admit, opens) in [(None, vec![1]), (Some(([5; 32], [6; 32])), vec![])] {
        let mut state = State::import(west.state.export()).unwrap();
        let begin = Beginning { admit, keys: Some(keys.clone()), ..beginning(Cause::Restored) };
        state.begin_incarnation(Stamp(LATER), begin).unwrap();
        assert_eq!(state.roots().into_values().next().unwrap().wrapped.into_keys().collect::<Vec<_>>(), opens);
    }
    assert_eq!(code(State::new().begin_incarnation(Stamp(1), beginning(Cause::Restored))), Code::Unavailable);
}
