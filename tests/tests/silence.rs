//! A node that stops attesting, to the end: late in its own cell, then out, and denied in every cell that listens
//! (reference/tpm.md, section 10, case 47). Fifteen minutes of a leader's ticks are applied to the state machines of two
//! cells; from a denial in a cell's state to the deny in its nodes' kernels it is the way of every other denial, which
//! `cargo xtask bench revoke` measures.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says that it failed by panicking")]

#[path = "../../federation/state/tests/common/mod.rs"]
mod common;

use ambit_model::record::Head;
use ambit_model::{Code, Generation, Stamp};
use ambit_state::objects::NodeState;
use ambit_state::{Command, LATE_MAX_MS};
use ambit_tests::table::row;
use common::{Cell, admission, cluster, node, pending};

/// East hears what west has to say so far.
fn hears(east: &mut Cell, west: &Cell) {
    let after = east.state.peer(&"west".parse().unwrap()).unwrap().seq;
    let records: Vec<_> = west.state.records_after(after).cloned().collect();
    let Some(last) = records.last() else { return };
    let (origin, hash) = ("west".parse().unwrap(), last.hash());
    let head = Head { origin, epoch: 1, seq: last.seq, hash, stamp: Stamp(1), nonce: [0; 16] };
    east.run(Command::Import(head, records)).unwrap();
}

fn befriended(east: &mut Cell) {
    east.run(Command::PutPeer("west".parse().unwrap(), pending(), None)).unwrap();
    east.run(Command::ApprovePeer("west".parse().unwrap(), [7; 32])).unwrap();
}

#[test]
fn a_node_that_stops_attesting_is_denied_in_every_cell() {
    let (mut west, mut east) = (Cell::founded("west"), Cell::founded("east"));
    befriended(&mut east);
    // Node 1 of west falls silent after its enrolment; node 3 of east is who shall no longer be reached by it.
    west.run(Command::AllowEk(cluster("west"), vec![node(1)])).unwrap();
    let a = admission(&west, 1, 1, None);
    west.run(Command::AdmitNode(a)).unwrap();
    east.run(Command::RegisterCluster(cluster("west"), vec![], 10_000)).unwrap();
    east.run(Command::AllowEk(cluster("west"), vec![node(3)])).unwrap();
    let b = admission(&east, 3, 1, None);
    east.run(Command::AdmitNode(b)).unwrap();

    let silent = ("west".parse().unwrap(), node(1));
    let began = west.state.stamp().0;
    let mut denied_after = None;
    for second in 1..=LATE_MAX_MS / 1_000 + 2 {
        west.at(began + second * 1_000, 0, Command::Tick).unwrap();
        hears(&mut east, &west);
        let denials = east.state.slice(&node(3)).unwrap().denials;
        let denied = denials.iter().any(|(who, generation)| (who, generation) == (&silent, &Generation(1)));
        assert_eq!(denied, west.state.node(&node(1)).unwrap().state == NodeState::Untrusted(Code::NodeLate));
        if denied && denied_after.is_none() {
            denied_after = Some(second);
        }
    }
    assert_eq!(denied_after, Some(LATE_MAX_MS / 1_000 + 1), "seconds until each node of east denies it");
    row(47, "a node that stops attesting, after 15 min of ticks, in another cell's state", "node_late").unwrap();
}
