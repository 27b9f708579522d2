//! Whether a node is relied on: verdicts, distrust, lateness, operators' words, endorsements that change.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

mod common;

use ambit_model::record::Kind;
use ambit_model::{Code, Generation, NodeId, Refusal, Revision, Stamp};
use ambit_state::command::{Against, LeafRequest, NodeVerb, Nodes, RoundVerdict, Seen};
use ambit_state::objects::*;
use ambit_state::{Command, LATE_MAX_MS, Reply};
use common::{Cell, admission, cluster, code, entry, node, seen, sha256};

const T0: u64 = 1_000_000;

/// West with nodes 1 and 2 admitted; 1 by the allow-list, 2 by a token.
fn west() -> Cell {
    let mut west = Cell::founded("west");
    west.run(Command::AllowEk(cluster("west"), vec![node(1)])).unwrap();
    west.run(Command::CreateEntries(vec![entry("db", "west")])).unwrap();
    let token = TokenRow { scope: TokenScope::Node(cluster("west")), expires: Stamp(2_000_000), used: false };
    west.run(Command::CreateToken([5; 32], token)).unwrap();
    for (n, token) in [(1, None), (2, Some([5; 32]))] {
        let mut a = admission(&west, n, n, token);
        a.ek.root_sha256 = Some(sha256(b"root"));
        a.ek.model = "M1".into();
        west.run(Command::AdmitNode(a)).unwrap();
    }
    west
}

fn round(cell: &Cell, n: u8, seen: Seen) -> Command {
    let policy_revision = cell.state.cell().unwrap().policy_revision;
    Command::PutVerdicts(vec![RoundVerdict { node: node(n), generation: Generation(1), policy_revision, seen }])
}
fn item(r: Result<Reply, Refusal>) -> Result<(), Refusal> {
    let Reply::Items(mut items) = r.unwrap() else { panic!("items") };
    items.remove(0)
}
fn denial(n: u8, code: Code) -> DenialRow {
    DenialRow {
        stamp: Stamp(0),
        node: node(n),
        code: code.to_string(),
        diverged: "IMA entry 7 (/usr/bin/x)".into(),
        expected: "listed".into(),
        found: "not listed".into(),
    }
}
fn issue(n: u8) -> Command {
    let leaf = LeafRequest { entry: "db".parse().unwrap(), key_hash: [3; 32] };
    Command::Issue { node: node(n), generation: Generation(1), authority: "a1".into(), leaves: vec![leaf] }
}
fn state(cell: &Cell, n: u8) -> NodeState {
    cell.state.node(&node(n)).unwrap().state
}
fn set(cell: &mut Cell, verb: NodeVerb, ids: &[u8]) -> Result<Reply, Refusal> {
    cell.run(Command::SetNodes(verb, Nodes::Ids(ids.iter().map(|n| node(*n)).collect())))
}
/// Ticks once a second from the present time on, as a leader does.
fn lead(cell: &mut Cell, ms: u64) {
    let from = cell.state.stamp().0;
    for s in 1..=ms / 1000 {
        cell.at(from + s * 1000, 0, Command::Tick).unwrap();
    }
}

#[test]
fn a_round_renews_the_verdict_and_only_moves_forward() {
    let mut west = west();
    let next = round(&west, 1, Seen { ima: ImaPoint { offset: 99, ..ImaPoint::default() }, ..seen(50) });
    item(west.at(T0 + 5_000, 0, next.clone())).unwrap();
    let standing = west.state.standing(&node(1)).unwrap().clone();
    assert_eq!((standing.verdict, standing.ima.offset, standing.rounds), (Stamp(T0 + 5_000), 99, 2));
    assert_eq!(item(west.at(T0 + 6_000, 0, next)).unwrap_err().code, Code::ClockStepBack, "the same quote twice");
    let back = round(&west, 1, seen(49));
    assert_eq!(item(west.run(back)).unwrap_err().code, Code::ClockStepBack);
    let reboot = Seen { counters: Counters { resets: 2, restarts: 0, clock: 1 }, ..seen(0) };
    let reboot = round(&west, 1, reboot);
    item(west.run(reboot)).unwrap();
    assert_eq!(item_code(&mut west, 9, 60), Code::NodeUnknown);
    // A verdict under policies that changed meanwhile does not count.
    let mut stale = round(&west, 2, seen(60));
    if let Command::PutVerdicts(v) = &mut stale {
        v[0].policy_revision = Revision(77);
    }
    assert_eq!(item(west.run(stale)).unwrap_err().code, Code::StaleAppraisal);
    // One that is refused takes no other with it.
    let (Command::PutVerdicts(mut bad), Command::PutVerdicts(good)) =
        (round(&west, 9, seen(1)), round(&west, 2, seen(61)))
    else {
        panic!("verdicts")
    };
    bad.extend(good);
    let Ok(Reply::Items(items)) = west.run(Command::PutVerdicts(bad)) else { panic!("items") };
    assert_eq!(items.iter().map(Result::is_ok).collect::<Vec<_>>(), [false, true]);
}

fn item_code(cell: &mut Cell, n: u8, clock: u64) -> Code {
    let command = round(cell, n, seen(clock));
    item(cell.run(command)).unwrap_err().code
}

#[test]
fn what_is_said_under_the_leaf_of_an_older_admission_says_nothing_good_or_bad() {
    let mut west = west();
    let a = admission(&west, 1, 95, None);
    assert!(matches!(west.run(Command::AdmitNode(a)), Ok(Reply::Admitted(Generation(2), _))));
    let before = west.state.standing(&node(1)).cloned();
    let good = |generation| {
        let Command::PutVerdicts(mut v) = round(&west, 1, seen(960)) else { panic!("verdicts") };
        v[0].generation = Generation(generation);
        Command::PutVerdicts(v)
    };
    let (older, present) = (good(1), good(2));
    assert_eq!(item(west.run(older)).unwrap_err().code, Code::SvidUntrusted);
    let bad = Command::Distrust(Generation(1), Revision(0), denial(1, Code::ImaFileNotAllowed));
    assert_eq!(code(west.run(bad)), Code::SvidUntrusted);
    assert_eq!((west.state.standing(&node(1)).cloned(), state(&west, 1)), (before, NodeState::Admitted));
    item(west.run(present)).unwrap();
}

#[test]
fn a_round_failed_under_policies_that_changed_is_judged_again() {
    let mut west = west();
    let stale = Command::Distrust(Generation(1), Revision(77), denial(1, Code::ImaFileNotAllowed));
    assert_eq!(code(west.run(stale)), Code::StaleAppraisal);
    assert_eq!(state(&west, 1), NodeState::Admitted);
}

#[test]
fn a_failed_round_puts_the_node_out_everywhere_and_release_lets_it_come_again() {
    let mut west = west();
    let before = west.state.cell().unwrap().export_seq;
    assert_eq!(
        code(west.run(Command::Distrust(Generation(2), Revision(0), denial(1, Code::ImaFileNotAllowed)))),
        Code::NodeUntrusted
    );
    west.run(Command::Distrust(Generation(1), Revision(0), denial(1, Code::ImaFileNotAllowed))).unwrap();
    assert_eq!(state(&west, 1), NodeState::Untrusted(Code::ImaFileNotAllowed));
    let first = west.state.records_after(before).next().unwrap();
    assert_eq!(
        (first.kind, first.key.as_str()),
        (Kind::NodeDenial, node(1).to_string().as_str()),
        "the denial goes first"
    );
    assert_eq!(west.state.slice(&node(2)).unwrap().denials.len(), 1);
    assert_eq!(code(west.run(issue(1))), Code::NodeUntrusted);
    assert_eq!(item_code(&mut west, 1, 70), Code::NodeUntrusted);
    let again = |cell: &Cell, nonce| admission(cell, 1, nonce, None);
    let a = again(&west, 80);
    assert_eq!(
        code(west.run(Command::AdmitNode(a))),
        Code::NodeUntrusted,
        "good evidence alone does not bring it back"
    );
    assert_eq!(code(set(&mut west, NodeVerb::Release, &[2])), Code::BadRequest);
    set(&mut west, NodeVerb::Release, &[1]).unwrap();
    assert_eq!(code(west.run(issue(1))), Code::NodeUntrusted, "released is not admitted");
    let mut other_ak = again(&west, 81);
    other_ak.ak.name = vec![77];
    assert_eq!(code(west.run(Command::AdmitNode(other_ak))), Code::AkChanged);
    let a = again(&west, 82);
    assert!(matches!(west.run(Command::AdmitNode(a)), Ok(Reply::Admitted(Generation(2), _))));
    // What was certified before stays refused; what comes now is of the new generation.
    assert_eq!(code(west.run(issue(1))), Code::NodeUntrusted);
    let history: Vec<_> = west.state.verdicts(&node(1)).map(|v| v.outcome.clone().err()).collect();
    assert_eq!(history, [None, Some(Code::ImaFileNotAllowed), None]);
    assert!(west.state.verdicts(&node(1)).next().unwrap().until > Stamp(0));
}

#[test]
fn bad_evidence_at_enrolment_speaks_against_the_admitted_node_only_where_it_is_the_machines() {
    let altered = NodeState::Untrusted(Code::BootLogEventAltered);
    let now = Against {
        generation: Generation(1),
        policy_revision: Revision(0),
        endorsement_revision: west().state.cell().unwrap().endorsement_revision,
    };
    let others = [
        Against { policy_revision: Revision(77), ..now },
        Against { endorsement_revision: Revision(77), ..now },
        Against { generation: Generation(0), ..now },
        Against { generation: Generation(2), ..now },
    ];
    let no_matter = others.map(Some).into_iter().chain([None]).map(|other| (other, NodeState::Admitted));
    for (distrust, expected) in no_matter.chain([(Some(now), altered)]) {
        let mut west = west();
        let row = denial(1, Code::BootLogEventAltered);
        west.run(Command::DenyNode { nonce: [9; 32], deadline: Stamp(T0 + 1), row, distrust }).unwrap();
        assert_eq!(state(&west, 1), expected);
        assert_eq!(west.state.denials().count(), 1);
    }
}

#[test]
fn operators_words_are_symmetric_and_all_or_none() {
    let mut west = west();
    set(&mut west, NodeVerb::Quarantine, &[1]).unwrap();
    assert_eq!(code(west.run(issue(1))), Code::NodeQuarantined);
    let a = admission(&west, 1, 90, None);
    assert_eq!(code(west.run(Command::AdmitNode(a))), Code::NodeQuarantined);
    set(&mut west, NodeVerb::Release, &[1]).unwrap();
    set(&mut west, NodeVerb::Ban, &[1]).unwrap();
    let a = admission(&west, 1, 91, None);
    assert_eq!(code(west.run(Command::AdmitNode(a))), Code::NodeBanned);
    assert_eq!(code(set(&mut west, NodeVerb::Quarantine, &[1])), Code::BadRequest);
    assert_eq!(code(set(&mut west, NodeVerb::Unban, &[1, 2])), Code::BadRequest, "2 is not banned");
    assert_eq!(state(&west, 1), NodeState::Banned, "nothing is half-applied");
    assert_eq!(code(set(&mut west, NodeVerb::Unban, &[1, 9])), Code::NotFound);
    set(&mut west, NodeVerb::Unban, &[1]).unwrap();
    let a = admission(&west, 1, 92, None);
    assert!(matches!(west.run(Command::AdmitNode(a)), Ok(Reply::Admitted(Generation(2), _))));
    // Of a whole cluster the verb means those it can be said of.
    let all = |verb| Command::SetNodes(verb, Nodes::Cluster(cluster("west")));
    let Ok(Reply::Items(two)) = west.run(all(NodeVerb::Quarantine)) else { panic!("items") };
    assert_eq!(two.len(), 2);
    let Ok(Reply::Items(none)) = west.run(all(NodeVerb::Unban)) else { panic!("items") };
    assert!(none.is_empty());
}

/// I22: what a cell without a leader could not judge is held against nobody.
#[test]
fn late_is_counted_in_time_with_a_leader_only() {
    let mut west = west();
    lead(&mut west, 30_000);
    assert!(west.run(issue(1)).is_ok());
    lead(&mut west, 1_000);
    assert_eq!(code(west.run(issue(1))), Code::NodeLate, "three intervals of 10 s and no verdict");
    assert_eq!(state(&west, 1), NodeState::Admitted);
    let next = round(&west, 1, seen(50));
    item(west.run(next)).unwrap();
    assert!(west.run(issue(1)).is_ok());
    // Ten minutes without a quorum, then the first entry of a new leader.
    let now = west.state.stamp().0;
    west.at(now + 600_000, 0, Command::Tick).unwrap();
    assert!(!west.state.is_late(&node(1)));
    lead(&mut west, 20_000);
    assert!([1, 2].iter().all(|n| state(&west, *n) == NodeState::Admitted));
    // Node 2 has been silent all along; 15 minutes of a cell that could have asked it are enough.
    let led = 31_000 + 20_000;
    lead(&mut west, LATE_MAX_MS - led);
    assert_eq!(state(&west, 2), NodeState::Admitted);
    lead(&mut west, 1_000);
    assert_eq!(state(&west, 2), NodeState::Untrusted(Code::NodeLate));
    assert_eq!(state(&west, 1), NodeState::Admitted, "its last verdict is younger");
    // It was only silent: good evidence alone brings it back.
    let mut a = admission(&west, 2, 100, None);
    a.deadline = west.state.stamp();
    assert!(matches!(west.run(Command::AdmitNode(a)), Ok(Reply::Admitted(Generation(2), _))));
}

#[test]
fn an_endorsement_taken_back_takes_its_nodes_out() {
    let rule = |model: &str, below: u64| EkDenyRow {
        manufacturer: String::new(),
        model: model.into(),
        firmware_below: below,
        reason: "CVE".into(),
    };
    let deny = |row| Command::PutEkDeny(vec![("bad".parse().unwrap(), row)], vec![]);
    let roots = |remove: &[u8]| Command::PutEkRoots {
        cluster: cluster("west"),
        add: vec![(b"root".to_vec(), "lab".into())],
        remove: if remove.is_empty() { vec![] } else { vec![sha256(remove)] },
    };
    let out = NodeState::Untrusted;
    let rows: Vec<(&str, Vec<Command>, [NodeState; 2])> = vec![
        (
            "off the allow-list: only who came by it",
            vec![Command::DisallowEk(cluster("west"), vec![node(1), node(2)])],
            [out(Code::EkNotExpected), NodeState::Admitted],
        ),
        ("a rule for another model", vec![deny(rule("M2", u64::MAX))], [NodeState::Admitted; 2]),
        ("a rule for older firmware", vec![deny(rule("M1", 0))], [NodeState::Admitted; 2]),
        ("a rule for this model", vec![deny(rule("M1", u64::MAX))], [out(Code::EkDenied); 2]),
        ("a rule for every model", vec![deny(rule("", u64::MAX))], [out(Code::EkDenied); 2]),
        ("another root added", vec![roots(b"")], [NodeState::Admitted; 2]),
    ];
    for (what, commands, expected) in rows {
        let mut west = west();
        for command in commands {
            west.run(command).unwrap_or_else(|e| panic!("{what}: {e}"));
        }
        assert_eq!([state(&west, 1), state(&west, 2)], expected, "{what}");
    }
    let mut west = west();
    west.run(roots(b"")).unwrap();
    assert_eq!(code(west.run(roots(b"other"))), Code::NotFound);
    let remove = Command::PutEkRoots { cluster: cluster("west"), add: vec![], remove: vec![sha256(b"root")] };
    west.run(remove).unwrap();
    assert_eq!(state(&west, 1), out(Code::EkChainUntrusted));
    assert_eq!(code(west.run(Command::PutEkDeny(vec![], vec!["no".parse().unwrap()]))), Code::NotFound);
}

#[test]
fn a_policy_has_versions_and_a_staged_one_keeps_what_it_was() {
    let mut west = west();
    let put = |sha: u8, staged| Command::PutAppraisalPolicy {
        name: "servers".parse().unwrap(),
        content: PolicyVersion {
            version: 0,
            sha256: [sha; 32],
            canonical: vec![sha],
            clusters: [cluster("west")].into(),
        },
        staged,
        by: "me".into(),
    };
    let versions = |cell: &Cell| {
        let (_, row) = cell.state.appraisal_policies().next().unwrap();
        (row.current.version, row.previous.as_ref().map(|p| p.version))
    };
    let mut a = admission(&west, 1, 40, None);
    west.run(put(1, false)).unwrap();
    assert_eq!(code(west.run(Command::AdmitNode(a.clone()))), Code::StaleAppraisal);
    a.policy_revision = west.state.cell().unwrap().policy_revision;
    a.endorsement_revision = west.state.cell().unwrap().endorsement_revision;
    west.run(Command::AdmitNode(a)).unwrap();
    let revision = west.state.cell().unwrap().policy_revision;
    west.run(put(1, false)).unwrap();
    assert_eq!(west.state.cell().unwrap().policy_revision, revision, "the same again changes nothing");
    west.run(put(2, true)).unwrap();
    assert_eq!(versions(&west), (2, Some(1)));
    west.run(Command::PromoteAppraisalPolicy("servers".parse().unwrap())).unwrap();
    assert_eq!(versions(&west), (2, None));
    west.run(put(3, false)).unwrap();
    assert_eq!(versions(&west), (3, None));
    west.run(Command::DeleteAppraisalPolicy("servers".parse().unwrap())).unwrap();
    assert_eq!(code(west.run(Command::DeleteAppraisalPolicy("servers".parse().unwrap()))), Code::NotFound);
    let foreign = Command::PutAppraisalPolicy {
        name: "x".parse().unwrap(),
        content: PolicyVersion { version: 0, sha256: [1; 32], canonical: vec![], clusters: [cluster("east")].into() },
        staged: false,
        by: "me".into(),
    };
    assert_eq!(code(west.run(foreign)), Code::NotFound);
}

#[test]
fn a_verdict_that_does_not_say_what_was_booted_is_on_the_boot_known() {
    let mut west = west();
    let silent = |clock, boot| Seen { pcrs: None, boot_pcrs_sha256: boot, ..seen(clock) };
    let known = west.state.standing(&node(1)).unwrap().boot_pcrs_sha256;
    let same = round(&west, 1, silent(50, known));
    item(west.run(same)).unwrap();
    let digest = west.state.standing(&node(1)).cloned();
    let other = round(&west, 1, Seen { firmware_version: 99, ..silent(60, [8; 32]) });
    assert_eq!(item(west.run(other)).unwrap_err().code, Code::StaleAppraisal);
    assert_eq!(west.state.standing(&node(1)).cloned(), digest);
    assert_ne!(west.state.node(&node(1)).unwrap().ek.firmware_version, 99, "refused before the first change");
    // Nor does an admission: neither nonce nor node is there afterwards.
    let mut a = admission(&west, 1, 70, None);
    a.seen = silent(70, [8; 32]);
    assert_eq!(code(west.run(Command::AdmitNode(a.clone()))), Code::StaleAppraisal);
    a.seen = silent(70, known);
    assert!(west.run(Command::AdmitNode(a)).is_ok());
}

/// The issue's bound: 8 KiB per enrolled node, beyond evidence bodies and lists.
#[test]
fn a_node_costs_little() {
    let mut west = west();
    let before: usize = bytes(&west);
    let mut a = admission(&west, 3, 3, None);
    west.run(Command::AllowEk(cluster("west"), vec![node(3)])).unwrap();
    a.endorsement_revision = west.state.cell().unwrap().endorsement_revision;
    a.claims = "c".repeat(3_000);
    a.ak.public = vec![1; 300];
    west.run(Command::AdmitNode(a)).unwrap();
    // A stretch for every change of boot that is remembered.
    for n in 0..100u8 {
        let s = Seen { boot_pcrs_sha256: [n; 32], ..seen(1_000 + u64::from(n)) };
        let command = round(&west, 3, s);
        item(west.run(command)).unwrap();
    }
    assert_eq!(west.state.verdicts(&node(3)).count(), ambit_state::VERDICTS_PER_NODE_MAX);
    let grown = bytes(&west) - before;
    assert!(grown <= 8 * 1024, "{grown} bytes");
}

fn bytes(cell: &Cell) -> usize {
    cell.state.export().iter().map(|w| w.key.len() + w.value.as_ref().map_or(0, Vec::len)).sum()
}

#[test]
fn nobody_is_named_twice_by_ids() {
    let mut west = west();
    let twice = Command::SetNodes(NodeVerb::Ban, Nodes::Ids(vec![node(1), NodeId([1; 32])]));
    west.run(twice).unwrap();
    assert_eq!(state(&west, 1), NodeState::Banned);
}
