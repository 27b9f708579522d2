//! Node selectors: an entry is a node's only while the node's last verdict shows what the entry asks for.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

mod common;

use ambit_model::appraisal::PcrBank;
use ambit_model::policy::Endpoint;
use ambit_model::{Code, Entry, Generation, Revision, Selector, Stamp};
use ambit_state::command::{LeafRequest, NodeVerb, Nodes, RoundVerdict, Seen};
use ambit_state::objects::{BootPcrs, PolicyRef};
use ambit_state::{Command, Reply, State};
use common::{Cell, admission, cluster, code, entry, node, seen};

const T0: u64 = 1_000_000;
/// PCR 7 of the boot that the nodes enrol with.
const BOOTED: [u8; 32] = [7; 32];

fn asking(id: &str, selectors: &[String]) -> Entry {
    let own = entry(id, "west");
    let more = selectors.iter().map(|text| text.parse::<Selector>().unwrap());
    Entry { selectors: own.selectors.iter().cloned().chain(more).collect(), ..own }
}
fn pcr_7(value: [u8; 32]) -> String {
    format!("tpm:pcr:sha256:7:{}", hex::encode(value))
}
/// What a verdict sees of a machine with this PCR 7, accepted by this policy.
fn shown(clock: u64, policy: &str, pcr: [u8; 32]) -> Seen {
    let pcrs = BootPcrs { bank: PcrBank::Sha256, values: [(7, pcr.to_vec()), (4, vec![4; 32])].into() };
    let policy = PolicyRef { name: policy.parse().unwrap(), version: clock };
    Seen { pcrs: Some(pcrs), boot_pcrs_sha256: pcr, policy, ..seen(clock) }
}
/// West with nodes 1 and 2, and one entry for each way of asking.
fn west() -> Cell {
    let mut west = Cell::founded("west");
    west.run(Command::AllowEk(cluster("west"), vec![node(1), node(2)])).unwrap();
    let entries = vec![
        entry("plain", "west"),
        asking("ek", &[format!("tpm:ek_hash:{}", node(2))]),
        asking("boot", &[pcr_7(BOOTED)]),
        asking("policy", &["tpm:policy:servers".into()]),
        asking("both", &["tpm:policy:servers".into(), pcr_7(BOOTED)]),
        asking("bank", &[format!("tpm:pcr:sha384:7:{}", "07".repeat(48))]),
        asking("unquoted", &[format!("tpm:pcr:sha256:5:{}", "00".repeat(32))]),
    ];
    let count = entries.len();
    let made = west.run(Command::CreateEntries(entries)).unwrap();
    assert_eq!(made, Reply::Items(vec![Ok(()); count]));
    for n in [1, 2] {
        let mut a = admission(&west, n, n, None);
        a.seen = shown(u64::from(n), "servers", BOOTED);
        west.run(Command::AdmitNode(a)).unwrap();
    }
    west
}
fn verdict(cell: &mut Cell, n: u8, seen: Seen) {
    let policy_revision = cell.state.cell().unwrap().policy_revision;
    let verdict = RoundVerdict { node: node(n), generation: Generation(1), policy_revision, seen };
    assert_eq!(cell.run(Command::PutVerdicts(vec![verdict])).unwrap(), Reply::Items(vec![Ok(())]));
}
fn issue_command(n: u8, id: &str) -> Command {
    let leaf = LeafRequest { entry: id.parse().unwrap(), key_hash: [3; 32] };
    Command::Issue { node: node(n), generation: Generation(1), authority: "a1".into(), leaves: vec![leaf] }
}
fn issue(cell: &mut Cell, request: u8, n: u8, id: &str) -> Option<Code> {
    let Reply::Leaves(mut leaves) = cell.at(T0, request, issue_command(n, id)).unwrap() else { panic!("leaves") };
    leaves.remove(0).err().map(|refusal| refusal.code)
}
fn in_slice(state: &State, n: u8) -> Vec<String> {
    state.slice(&node(n)).unwrap().entries.iter().map(|e| e.id.to_string()).collect()
}
fn revision(cell: &Cell) -> Revision {
    cell.state.cell().unwrap().revision
}

/// Slice and issuance agree, for each entry and each verdict.
#[test]
fn an_entry_is_the_nodes_while_its_last_verdict_shows_what_is_asked() {
    let mut west = west();
    for (clock, policy, pcr, fitting) in [
        (10, "servers", BOOTED, &["boot", "both", "plain", "policy"][..]),
        (11, "desktops", BOOTED, &["boot", "plain"]),
        (12, "desktops", [8; 32], &["plain"]),
        (13, "servers", [8; 32], &["plain", "policy"]),
        (14, "servers", BOOTED, &["boot", "both", "plain", "policy"]),
    ] {
        verdict(&mut west, 1, shown(clock, policy, pcr));
        assert_eq!(in_slice(&west.state, 1), fitting, "{policy} {pcr:?}");
        for id in ["plain", "ek", "boot", "policy", "both", "bank", "unquoted"] {
            let expected = if fitting.contains(&id) { None } else { Some(Code::EntryNotOnNode) };
            assert_eq!(issue(&mut west, 0, 1, id), expected, "{id} under {policy} {pcr:?}");
        }
        assert_eq!(in_slice(&west.state, 2), ["boot", "both", "ek", "plain", "policy"], "the other node's own verdict");
    }
    let imported = State::import(west.state.export()).unwrap();
    assert_eq!(imported.digest(), west.state.digest());
    west.state = imported;
    verdict(&mut west, 1, shown(15, "desktops", BOOTED));
    assert_eq!(in_slice(&west.state, 1), ["boot", "plain"], "after a snapshot too");
}

#[test]
fn slices_move_only_where_a_verdict_changes_what_fits() {
    let mut west = west();
    let other_pcr = |clock, policy: &str, n: u8| {
        let mut seen = shown(clock, policy, BOOTED);
        seen.pcrs.as_mut().unwrap().values.insert(n, vec![99; 32]);
        seen.boot_pcrs_sha256 = [n; 32];
        seen
    };
    for (seen, moves, why) in [
        (shown(20, "servers", BOOTED), false, "another version of the policy"),
        (other_pcr(21, "servers", 4), false, "a PCR that no entry names"),
        (shown(22, "desktops", BOOTED), true, "another policy"),
        (shown(23, "laptops", BOOTED), false, "from one policy that no entry names to another"),
        (shown(24, "servers", BOOTED), true, "the policy that is named"),
        (shown(25, "servers", [8; 32]), true, "the PCR that is named"),
    ] {
        let before = revision(&west);
        verdict(&mut west, 1, seen);
        assert_eq!(revision(&west) != before, moves, "{why}");
    }
    // Nor where no entry asks: what was asked of entries that are gone is not looked at.
    let ids = ["ek", "boot", "policy", "both", "bank", "unquoted"].iter().map(|id| id.parse().unwrap()).collect();
    west.run(Command::DeleteEntries(ids)).unwrap();
    let before = revision(&west);
    verdict(&mut west, 1, shown(26, "desktops", BOOTED));
    let imported = State::import(west.state.export()).unwrap();
    west.state = imported;
    verdict(&mut west, 1, shown(27, "servers", BOOTED));
    assert_eq!(revision(&west), before);
}

#[test]
fn endpoints_are_of_entries_that_fit_and_go_with_them() {
    let mut west = west();
    let endpoint = |id: &str, address: &str| Endpoint {
        spiffe_id: format!("spiffe://west/{id}").parse().unwrap(),
        address: address.parse().unwrap(),
        cluster: cluster("west"),
        node_address: "127.0.0.1".parse().unwrap(),
        node: node(1),
        generation: Generation(1),
    };
    let all = vec![endpoint("plain", "10.0.0.1"), endpoint("policy", "10.0.0.2"), endpoint("ek", "10.0.0.3")];
    let Reply::Items(items) = west.run(Command::ReportEndpoints(node(1), all)).unwrap() else { panic!("items") };
    let codes: Vec<_> = items.into_iter().map(|item| item.err().map(|r| r.code)).collect();
    assert_eq!(codes, [None, None, Some(Code::EntryNotOnNode)]);
    verdict(&mut west, 1, shown(30, "desktops", BOOTED));
    let left: Vec<_> = west.state.endpoints().map(|(_, row)| row.object.address.to_string()).collect();
    assert_eq!(left, ["10.0.0.1"]);
}

#[test]
fn what_was_issued_is_not_answered_again_once_it_would_be_refused() {
    let mut west = west();
    assert_eq!(issue(&mut west, 41, 1, "policy"), None);
    assert_eq!(issue(&mut west, 41, 1, "policy"), None, "the same request is answered from memory");
    assert_eq!(issue(&mut west, 42, 1, "plain"), None);
    verdict(&mut west, 1, shown(40, "desktops", BOOTED));
    assert_eq!(issue(&mut west, 41, 1, "policy"), Some(Code::EntryNotOnNode));
    assert_eq!(issue(&mut west, 42, 1, "plain"), None);
}

#[test]
fn an_entry_needs_a_selector_of_the_workload() {
    let mut west = west();
    let mut only_node = asking("node", &["tpm:policy:servers".into()]);
    only_node.selectors = only_node.node_selectors().cloned().collect();
    let Reply::Items(mut items) = west.run(Command::CreateEntries(vec![only_node])).unwrap() else { panic!("items") };
    assert_eq!(code(items.remove(0)), Code::BadRequest);
}

#[test]
fn a_result_says_how_the_node_stands_now() {
    let mut west = west();
    assert_eq!(code(west.state.node_result(&node(9))), Code::NotFound);
    let result = west.state.node_result(&node(1)).unwrap();
    let r = result.get();
    assert_eq!((r.standing.verdict, r.late, r.policy_sha256, r.index.0), (Stamp(T0), false, None, west.index));
    west.run(Command::SetNodes(NodeVerb::Quarantine, Nodes::Ids(vec![node(1)]))).unwrap();
    assert_eq!(west.state.node_result(&node(1)).unwrap().get().row.state.as_str(), "quarantined");
    west.at(T0 + 31_000, 0, Command::Tick).unwrap();
    for s in 32..=70 {
        west.at(T0 + s * 1_000, 0, Command::Tick).unwrap();
    }
    assert!(west.state.node_result(&node(2)).unwrap().get().late);
}

#[test]
fn what_was_seen_once_of_a_boot_stays_claimed_until_the_next() {
    let mut west = west();
    let file_system = |cell: &Cell| cell.state.standing(&node(1)).unwrap().trust.file_system;
    for (clock, pcr, seen_now, claimed) in
        [(50, BOOTED, 2, 2), (51, BOOTED, 32, 32), (52, BOOTED, 2, 32), (53, [8; 32], 2, 2)]
    {
        let mut seen = shown(clock, "servers", pcr);
        (seen.trust.file_system, seen.policy.version) = (seen_now, 1);
        verdict(&mut west, 1, seen);
        assert_eq!(file_system(&west), claimed, "at {clock}");
    }
}
