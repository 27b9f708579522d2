//! The state's part of the order of checks (design.md section 3): what one entry admits or counts, and what it refuses.
//! Each row satisfies every check but the one it is about; `checks.txt` names the rows that fail without that check.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

mod common;

use ambit_model::{Code, Generation, Refusal, Revision, Stamp};
use ambit_state::command::{Admission, NodeVerb, Nodes, RoundVerdict};
use ambit_state::objects::*;
use ambit_state::{Command, Reply};
use common::{Cell, admission, cluster, node, seen};

/// SHA-256 of tokens, by what is the matter with them.
const UNUSED: [u8; 32] = [51; 32];
const USED: [u8; 32] = [52; 32];
const EAST: [u8; 32] = [53; 32];
const OLD: [u8; 32] = [54; 32];
const REPLICA: [u8; 32] = [55; 32];

/// West, whose nodes 1 (by the allow-list) and 2 (by a token) are in.
fn west() -> Cell {
    let mut west = Cell::founded("west");
    west.run(Command::RegisterCluster(cluster("east"), vec![], 10_000)).unwrap();
    west.run(Command::AllowEk(cluster("west"), vec![node(1)])).unwrap();
    let of = |name| TokenScope::Node(cluster(name));
    for (sha256, scope, expires) in [
        (UNUSED, of("west"), 2_000_000),
        (USED, of("west"), 2_000_000),
        (EAST, of("east"), 2_000_000),
        (OLD, of("west"), 1_000_001),
        (REPLICA, TokenScope::Replica(3, "127.0.0.1:3".into()), 2_000_000),
    ] {
        west.run(Command::CreateToken(sha256, TokenRow { scope, expires: Stamp(expires), used: false })).unwrap();
    }
    for (n, token) in [(1, None), (2, Some(USED))] {
        let mut a = admission(&west, n, n, token);
        a.ek.firmware_version = 7;
        west.run(Command::AdmitNode(a)).unwrap();
    }
    west
}

/// What goes wrong: in the cell meanwhile, or in the command. The command is judged at this stamp.
type Row<T> = (&'static str, Code, fn(&mut Cell, &mut T) -> u64);

/// Node 1 comes again.
const ADMISSIONS: &[Row<Admission>] = &[
    ("admitted after the ticket's deadline", Code::TicketExpired, |_, a| a.deadline.0 + 1),
    ("nonce consumed before", Code::NonceConsumed, |_, a| {
        a.nonce = [1; 32];
        NOW
    }),
    ("judged by a root that is gone", Code::StaleAppraisal, |west, _| {
        let remove = vec![common::sha256(common::ROOT)];
        west.run(Command::PutEkRoots { cluster: cluster("west"), add: vec![], remove }).unwrap();
        NOW
    }),
    ("judged by a root of another class", Code::StaleAppraisal, |west, _| {
        let add = vec![(common::ROOT.to_vec(), "virtual".into())];
        west.run(Command::PutEkRoots { cluster: cluster("west"), add, remove: vec![] }).unwrap();
        NOW
    }),
    ("judged without a certificate by a list that it is off", Code::StaleAppraisal, |west, a| {
        a.ek.root_sha256 = None;
        west.run(Command::DisallowEk(cluster("west"), vec![node(1)])).unwrap();
        NOW
    }),
    ("judged before a rule denied its maker", Code::StaleAppraisal, |west, a| {
        a.ek.model = "M1".into();
        let (manufacturer, reason) = (String::new(), "old".into());
        let rule = EkDenyRow { manufacturer, model: "M1".into(), firmware_below: u64::MAX, reason };
        west.run(Command::PutEkDeny(vec![("old".parse().unwrap(), rule)], vec![])).unwrap();
        NOW
    }),
    ("off the list that it came by", Code::EkNotExpected, |west, a| {
        out(west, a, NodeVerb::Quarantine);
        west.run(Command::DisallowEk(cluster("west"), vec![node(1)])).unwrap();
        out(west, a, NodeVerb::Release)
    }),
    ("joined by a token, and now without a certificate", Code::EkChainUntrusted, |_, a| {
        (a.node, a.ak.name, a.ek.root_sha256) = (node(2), vec![2], None);
        NOW
    }),
    ("evicted, banned and unbanned, and never expected since", Code::EkNotExpected, |west, a| {
        (a.node, a.ak.name) = (node(2), vec![2]);
        for verb in [NodeVerb::Evict, NodeVerb::Ban, NodeVerb::Unban] {
            west.run(Command::SetNodes(verb, Nodes::Ids(vec![node(2)]))).unwrap();
        }
        NOW
    }),
    ("judged under appraisal policies that changed", Code::StaleAppraisal, |_, a| {
        a.policy_revision = Revision(77);
        NOW
    }),
    ("cluster that is not the cell's", Code::NotFound, |_, a| {
        a.cluster = cluster("north");
        NOW
    }),
    ("verdict that says nothing of an unknown boot", Code::StaleAppraisal, |_, a| {
        a.seen.pcrs = None;
        a.seen.boot_pcrs_sha256 = [9; 32];
        NOW
    }),
    ("node in quarantine", Code::NodeQuarantined, |west, a| out(west, a, NodeVerb::Quarantine)),
    ("banned node", Code::NodeBanned, |west, a| out(west, a, NodeVerb::Ban)),
    ("node of another cluster", Code::AlreadyExists, |_, a| {
        a.cluster = cluster("east");
        NOW
    }),
    ("another AK of the EK", Code::AkChanged, |_, a| {
        a.ak.name = vec![99];
        NOW
    }),
    ("counters that stood still", Code::ClockStepBack, |_, a| {
        a.seen.counters = seen(1).counters;
        NOW
    }),
    ("counters before the last", Code::ClockStepBack, |_, a| {
        a.seen.counters = Counters { clock: 1_000_000, resets: 0, ..a.seen.counters };
        NOW
    }),
    ("stranger without a token", Code::EkNotExpected, |_, a| stranger(a, None)),
    ("stranger with a token nobody made", Code::JoinTokenInvalid, |_, a| stranger(a, Some([66; 32]))),
    ("stranger with a used token", Code::JoinTokenUsed, |_, a| stranger(a, Some(USED))),
    ("stranger with another cluster's token", Code::JoinTokenInvalid, |_, a| stranger(a, Some(EAST))),
    ("stranger with a replica's token", Code::JoinTokenInvalid, |_, a| stranger(a, Some(REPLICA))),
    ("stranger with a token past its time", Code::JoinTokenInvalid, |_, a| stranger(a, Some(OLD))),
];

const NOW: u64 = 1_000_002;

fn out(west: &mut Cell, a: &mut Admission, verb: NodeVerb) -> u64 {
    west.run(Command::SetNodes(verb, Nodes::Ids(vec![node(1)]))).unwrap();
    // What refuses must be the state of the node, not that this moved the revision.
    a.endorsement_revision = west.state.cell().unwrap().endorsement_revision;
    NOW
}

fn stranger(a: &mut Admission, token: Option<[u8; 32]>) -> u64 {
    (a.node, a.ak.name, a.join_token) = (node(9), vec![9], token);
    NOW
}

/// A round of node 1.
const ROUNDS: &[Row<RoundVerdict>] = &[
    ("round of a node nobody knows", Code::NodeUnknown, |_, v| {
        v.node = node(9);
        NOW
    }),
    ("round of an untrusted node", Code::NodeQuarantined, |west, _| {
        west.run(Command::SetNodes(NodeVerb::Quarantine, Nodes::Ids(vec![node(1)]))).unwrap();
        NOW
    }),
    ("round under an older admission's leaf", Code::SvidUntrusted, |west, _| {
        let a = Admission { seen: seen(40), ..admission(west, 1, 91, None) };
        west.run(Command::AdmitNode(a)).unwrap();
        NOW
    }),
    ("round of an admission to come", Code::NodeUntrusted, |_, v| {
        v.generation = Generation(2);
        NOW
    }),
    ("round judged under policies that changed", Code::StaleAppraisal, |_, v| {
        v.policy_revision = Revision(77);
        NOW
    }),
    ("round that says nothing of an unknown boot", Code::StaleAppraisal, |_, v| {
        v.seen.pcrs = None;
        v.seen.boot_pcrs_sha256 = [9; 32];
        NOW
    }),
    ("round with the very counters of the last", Code::ClockStepBack, |_, v| {
        v.seen.counters = seen(1).counters;
        NOW
    }),
    ("round of firmware that a rule denies", Code::EkDenied, |west, v| {
        let (any, reason) = (String::new(), "old".into());
        let rule = EkDenyRow { manufacturer: any.clone(), model: any, firmware_below: 5, reason };
        west.run(Command::PutEkDeny(vec![("old".parse().unwrap(), rule)], vec![])).unwrap();
        v.seen.firmware_version = 4;
        assert!(west.state.node(&node(1)).unwrap().state == NodeState::Admitted, "7 is not below 5");
        NOW
    }),
];

fn round(west: &Cell) -> RoundVerdict {
    let policy_revision = west.state.cell().unwrap().policy_revision;
    RoundVerdict { node: node(1), generation: Generation(1), policy_revision, seen: seen(90) }
}

/// A line `wrong: WHAT: ...` for each row that is not refused by its code, or changes what a refusal must not.
fn wrong<T>(
    rows: &[Row<T>],
    attempt: fn(&Cell) -> T,
    run: fn(&mut Cell, u64, T) -> Result<(), Refusal>,
) -> Vec<String> {
    let mut wrong = Vec::new();
    for (what, code, change) in rows {
        let mut west = west();
        let mut command = attempt(&west);
        let stamp = change(&mut west, &mut command);
        let before = west.state.node(&node(9)).cloned();
        match run(&mut west, stamp, command) {
            Err(refusal) if refusal.code == *code && west.state.node(&node(9)) == before.as_ref() => {}
            other => wrong.push(format!("wrong: {what}: {other:?}")),
        }
    }
    wrong
}

fn admit(west: &mut Cell, stamp: u64, a: Admission) -> Result<(), Refusal> {
    west.at(stamp, 0, Command::AdmitNode(a)).map(drop)
}

fn count(west: &mut Cell, stamp: u64, verdict: RoundVerdict) -> Result<(), Refusal> {
    match west.at(stamp, 0, Command::PutVerdicts(vec![verdict]))? {
        Reply::Items(mut items) => items.remove(0),
        other => panic!("{other:?}"),
    }
}

#[test]
fn each_admission_that_must_not_be_has_its_code() {
    let wrong = wrong(ADMISSIONS, |west| admission(west, 1, 90, None), admit);
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn each_round_that_must_not_count_has_its_code() {
    let wrong = wrong(ROUNDS, round, count);
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn what_the_rows_change_is_good_unchanged() {
    let mut west = west();
    let verdict = round(&west);
    count(&mut west, NOW, verdict).unwrap();
    let again = Admission { seen: seen(91), ..admission(&west, 1, 92, None) };
    admit(&mut west, NOW, again).unwrap();
    let mut token = admission(&west, 9, 93, None);
    stranger(&mut token, Some(UNUSED));
    admit(&mut west, NOW, token).unwrap();
    // Who joined comes again with its certificate alone, and what changes for others makes nobody begin anew.
    let begun = admission(&west, 2, 94, None);
    west.run(Command::AllowEk(cluster("west"), vec![node(7)])).unwrap();
    admit(&mut west, NOW, begun).unwrap();
    // Evicted, it may come with another AK and a token.
    west.run(Command::SetNodes(NodeVerb::Evict, Nodes::Ids(vec![node(2)]))).unwrap();
    let fresh = Admission { ak: AkFacts { name: vec![22], ..AkFacts::default() }, ..admission(&west, 2, 95, None) };
    assert_eq!(admit(&mut west, NOW, fresh.clone()).unwrap_err().code, Code::EkNotExpected);
    let token = TokenRow { scope: TokenScope::Node(cluster("west")), expires: Stamp(2_000_000), used: false };
    west.run(Command::CreateToken([77; 32], token)).unwrap();
    admit(&mut west, NOW, Admission { join_token: Some([77; 32]), nonce: [96; 32], ..fresh }).unwrap();
}

/// One node that fails again and again does not make the cell forget why others were refused.
#[test]
fn denials_of_one_node_have_a_share() {
    let mut west = west();
    let denial = |n: u8, k: u8| Command::DenyNode {
        nonce: [k; 32],
        deadline: Stamp(1_060_000),
        row: DenialRow {
            stamp: Stamp(0),
            node: node(n),
            code: Code::QuoteNonce.to_string(),
            diverged: String::new(),
            expected: String::new(),
            found: k.to_string(),
        },
        distrust: None,
    };
    west.run(denial(3, 99)).unwrap();
    for k in 100..200 {
        west.run(denial(1, k)).unwrap();
    }
    let of = |n: u8| {
        west.state.denials().filter(|(_, d)| d.node == node(n)).map(|(_, d)| d.found.clone()).collect::<Vec<_>>()
    };
    assert_eq!(of(3), ["99"]);
    assert_eq!((of(1).len(), of(1).last().cloned()), (32, Some("199".to_owned())));
}

/// One entry consumes the nonce, burns the token and admits; one that is refused does none of it.
#[test]
fn admitting_is_all_or_nothing() {
    let mut west = west();
    let mut a = admission(&west, 9, 93, None);
    stranger(&mut a, Some(UNUSED));
    let stale = Admission { policy_revision: Revision(77), ..a.clone() };
    assert_eq!(admit(&mut west, NOW, stale).unwrap_err().code, Code::StaleAppraisal);
    admit(&mut west, NOW, a.clone()).unwrap();
    assert_eq!(admit(&mut west, NOW, a.clone()).unwrap_err().code, Code::NonceConsumed);
    let second = Admission { node: node(10), nonce: [94; 32], ..a };
    assert_eq!(admit(&mut west, NOW, second).unwrap_err().code, Code::JoinTokenUsed);
}
