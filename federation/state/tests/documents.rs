//! Policies as documents: sets that the cell resolves, ends by committed time, groups, and what is remembered of changes.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

mod common;

use ambit_model::policy::Policy;
use ambit_model::record::{Head, Kind, Record};
use ambit_model::{Code, Refusal, Revision, Stamp, TrustDomain};
use ambit_state::objects::StoredDocument;
use ambit_state::{Command, DocumentKind, DocumentsChange, Reply, State};
use common::documents::{apply, change, named, run};
use common::{Cell, admission, cluster, code, node};
use std::str::FromStr;

const T: u64 = 1_000_000;

fn policy(name: &str, spec: &str) -> String {
    format!("---\nkind: Policy\nmetadata: {{name: {name}}}\nspec: {{target: spiffe://west/db, {spec}}}\n")
}

fn allowed(cell: &Cell, from: &str) -> bool {
    let (from, to) = (from.parse().unwrap(), "spiffe://west/db".parse().unwrap());
    cell.state.policy_set().evaluate(&from, &to, 80, cell.state.moment()).allowed
}

fn two_clusters() -> Cell {
    let mut west = Cell::founded("west");
    west.run(Command::RegisterCluster(cluster("prod"), vec![(common::ROOT.to_vec(), "lab".into())], 10_000)).unwrap();
    west.run(Command::CreateEntries(vec![
        named("db", "spiffe://west/db", "west", &["app=db"]),
        named("web", "spiffe://west/web", "prod", &["app=web", "tier=front"]),
        named("both-1", "spiffe://west/both", "prod", &["app=web"]),
        named("both-2", "spiffe://west/both", "west", &[]),
        named("other", "spiffe://west/other", "west", &["app=web"]),
    ]))
    .unwrap();
    west
}

#[test]
fn an_allow_means_who_is_in_a_set_for_sure_and_a_deny_whoever_is() {
    for (set, sure, perhaps) in [
        ("cluster:west/prod", &["web"][..], &["web", "both"][..]),
        ("labels:west/app=web", &["web", "other"], &["web", "both", "other"]),
        ("labels:west/app=web&tier=front", &["web"], &["web"]),
        ("labels:west/app=nobody", &[], &[]),
        ("group:west/ops", &["web", "other"], &["web", "both", "other"]),
    ] {
        let group = "kind: Group\nmetadata: {name: ops}\nspec: {members: ['cluster:west/prod', spiffe://west/other]}\n";
        let of = |cell: &Cell| {
            ["web", "both", "other"]
                .into_iter()
                .filter(|id| allowed(cell, &format!("spiffe://west/{id}")))
                .collect::<Vec<_>>()
        };
        let mut west = two_clusters();
        apply(&mut west, &format!("{group}{}", policy("a", &format!("action: allow, from: ['{set}']")))).unwrap();
        assert_eq!(of(&west), sure, "allow {set}");
        let mut west = two_clusters();
        let open = policy("open", "action: allow, from: [spiffe://west/*]");
        apply(&mut west, &format!("{group}{open}{}", policy("a", &format!("action: deny, from: ['{set}']")))).unwrap();
        let left: Vec<_> = ["web", "both", "other"].into_iter().filter(|id| !perhaps.contains(id)).collect();
        assert_eq!(of(&west), left, "deny {set}");
    }
    // Who joins is in, and who leaves is out, without a word about the policy.
    let mut west = two_clusters();
    apply(&mut west, &policy("a", "action: allow, from: ['cluster:west/prod']")).unwrap();
    let before = west.state.cell().unwrap().revision;
    west.run(Command::CreateEntries(vec![named("new", "spiffe://west/new", "prod", &[])])).unwrap();
    assert!(allowed(&west, "spiffe://west/new") && west.state.cell().unwrap().revision > before);
    west.run(Command::DeleteEntries(vec!["web".parse().unwrap(), "both-2".parse().unwrap()])).unwrap();
    assert!(!allowed(&west, "spiffe://west/web") && allowed(&west, "spiffe://west/both"));
}

#[test]
fn a_peers_cluster_is_what_runs_there() {
    let mut west = Cell::founded("west");
    west.run(Command::PutPeer("east".parse().unwrap(), common::pending(), None)).unwrap();
    west.run(Command::ApprovePeer("east".parse().unwrap(), [7; 32])).unwrap();
    apply(&mut west, &policy("a", "action: allow, from: ['cluster:east/prod']")).unwrap();
    assert!(!allowed(&west, "spiffe://east/web"), "nobody runs there yet");
    let rows = [("web", "prod", 1), ("both", "prod", 2), ("both", "east", 3)];
    let rows = rows.map(|(id, of, last)| common::endpoint_of_east(id, of, last));
    let (origin, mut records, mut prev_hash) = (TrustDomain::from_str("east").unwrap(), Vec::new(), [0; 32]);
    let clusters = ["prod", "east"].map(|name| (Kind::Cluster, name.to_owned(), vec![1]));
    let endpoints = rows.iter().map(|row| (Kind::Endpoint, row.address.to_string(), postcard::to_stdvec(row).unwrap()));
    for ((kind, key, payload), seq) in clusters.into_iter().chain(endpoints).zip(1..) {
        let record = Record { origin: origin.clone(), epoch: 1, seq, prev_hash, kind, key, payload };
        prev_hash = record.hash();
        records.push(record);
    }
    let head = Head { origin, epoch: 1, seq: 5, hash: prev_hash, stamp: Stamp(1), nonce: [0; 16] };
    west.run(Command::Import(head, records)).unwrap();
    assert!(allowed(&west, "spiffe://east/web"));
    assert!(!allowed(&west, "spiffe://east/both"), "it runs elsewhere too");
}

#[test]
fn slices_hold_what_a_set_is_and_not_its_name() {
    let mut west = two_clusters();
    west.run(Command::AllowEk(cluster("west"), vec![node(1)])).unwrap();
    let admit = admission(&west, 1, 1, None);
    west.run(Command::AdmitNode(admit)).unwrap();
    apply(&mut west, &policy("a", "action: allow, from: ['cluster:west/prod'], expires: 1970-01-01T00:33:20Z"))
        .unwrap();
    let slice = west.state.slice(&node(1)).unwrap();
    assert_eq!(slice.policies[0].1.from[0].to_string(), "ids:west /web");
    assert_eq!(slice.policies[0].1.extras.expires_at, Stamp(2_000_000));
}

#[test]
fn a_policy_ends_by_committed_time_and_once() {
    let mut west = two_clusters();
    // 1,500 s after the epoch; the cell stands at 1,000 s.
    let end = "expires: 1970-01-01T00:25:00Z";
    let open = policy("open", &format!("action: allow, from: [spiffe://west/web], {end}"));
    apply(&mut west, &open).unwrap();
    let written = west.state.cell().unwrap().revision;
    west.at(1_499_999, 0, Command::Tick).unwrap();
    assert!(allowed(&west, "spiffe://west/web"));
    assert_eq!(west.state.cell().unwrap().revision, written, "nothing ended yet");
    let copy = State::import(west.state.export()).unwrap();
    west.at(1_500_000, 0, Command::Tick).unwrap();
    assert!(!allowed(&west, "spiffe://west/web"));
    let ended = west.state.cell().unwrap().revision;
    assert!(ended > written, "slices are made anew");
    west.at(1_500_001, 0, Command::Tick).unwrap();
    assert_eq!(west.state.cell().unwrap().revision, ended);
    // A replica that was restored before the end comes to the same state.
    let mut copy = Cell { state: copy, ..west };
    let at = copy.state.applied().0;
    for (i, entry) in copy.log.clone().iter().enumerate().skip(usize::try_from(at).unwrap()) {
        copy.state.apply(ambit_model::RaftIndex(i as u64 + 1), entry);
    }
    assert_eq!(copy.state.cell().unwrap().revision, ended);
}

#[test]
fn what_could_not_be_enforced_or_found_is_not_taken() {
    let group = "---\nkind: Group\nmetadata: {name: ops}\nspec: {members: [spiffe://east/ops]}\n";
    let mut west = two_clusters();
    for (yaml, want) in [
        (policy("p", "action: audit, from: ['cidr:2001:db8::/32']"), Code::PolicyUnenforceable),
        (policy("p", "action: allow, from: [spiffe://west/web], protocols: [udp]"), Code::PolicyUnenforceable),
        (policy("p", "action: allow, from: ['cluster:west/nowhere']"), Code::NotFound),
        (policy("p", "action: allow, from: ['group:west/nobody']"), Code::NotFound),
        (policy("p", "action: allow, from: ['group:east/ops']"), Code::NotFound),
        (policy("p", "action: allow, from: ['labels:east/app=web']"), Code::PolicyUnenforceable),
        (policy("p", "action: allow, from: ['labels:west/app=web', spiffe://east/a]"), Code::PolicyUnenforceable),
        // Whose callers they are says who is in the group.
        (
            format!("{group}{}", policy("p", "action: deny, from: ['group:west/ops']").replace("west/db", "east/db")),
            Code::NotOwner,
        ),
    ] {
        assert_eq!(code(run(&mut west, change(&yaml, &[]))), want, "{yaml}");
    }
    assert_eq!(west.state.policies().count() + west.state.groups().count(), 0, "nothing of a refused set stays");
    // A group that a policy uses stays there, and what it becomes is judged with the policy.
    let uses = policy("p", "action: deny, from: ['group:west/ops']").replace("spiffe://west/db", "spiffe://east/db");
    let own = group.replace("spiffe://east/ops", "spiffe://west/web");
    apply(&mut west, &format!("{own}{uses}")).unwrap();
    assert_eq!(code(run(&mut west, change("", &[(DocumentKind::Group, "ops")]))), Code::NotFound);
    assert_eq!(code(run(&mut west, change(group, &[]))), Code::NotOwner);
    run(&mut west, change("", &[(DocumentKind::Group, "ops"), (DocumentKind::Policy, "p")])).unwrap();
    assert_eq!(code(run(&mut west, change("", &[(DocumentKind::Policy, "p")]))), Code::NotFound);
}

fn stored(cell: &Cell, name: &str) -> Option<Policy> {
    match cell.state.document(DocumentKind::Policy, &name.parse().unwrap()) {
        Some(StoredDocument::Policy(policy)) => Some(policy),
        Some(other) => panic!("{other:?}"),
        None => None,
    }
}

#[test]
fn changes_are_remembered_and_can_be_undone() {
    let mut west = two_clusters();
    let port =
        |name: &str, port: u16| policy(name, &format!("action: allow, from: [spiffe://west/web], ports: [{port}]"));
    assert_eq!(apply(&mut west, &port("a", 1)).unwrap(), [true]);
    let first = west.state.document_revision();
    assert_eq!(apply(&mut west, &port("a", 1)).unwrap(), [false]);
    assert_eq!(west.state.document_revision(), first, "what changes nothing is not remembered");
    apply(&mut west, &format!("{}{}", port("a", 2), port("b", 1))).unwrap();
    let second = west.state.document_revision();
    run(&mut west, change("", &[(DocumentKind::Policy, "a")])).unwrap();
    let rows: Vec<_> =
        west.state.document_changes().map(|(at, row)| (at, row.by.as_str(), row.changes.len())).collect();
    let third = west.state.document_revision();
    assert_eq!(rows, [(first, "me", 1), (second, "me", 2), (third, "me", 1)]);
    // As it was after the first: `a` on port 1, and no `b`.
    let were = west.state.documents_at(first).unwrap();
    let names: Vec<_> = were.iter().map(|((_, name), was)| (name.as_str(), was.is_some())).collect();
    assert_eq!(names, [("a", true), ("b", false)]);
    assert_eq!(west.state.documents_at(third).unwrap().len(), 0);
    assert!(west.state.documents_at(Revision(third.0 + 1)).is_none(), "no such change");
    let mut back = DocumentsChange { note: "rollback".into(), over: Some(second), ..DocumentsChange::default() };
    for ((kind, name), was) in were {
        match was {
            Some(StoredDocument::Policy(policy)) => back.policies.push(policy),
            Some(other) => panic!("{other:?}"),
            None => back.delete.push((kind, name)),
        }
    }
    assert_eq!(code(run(&mut west, back.clone())), Code::StaleRevision);
    run(&mut west, DocumentsChange { over: Some(third), ..back }).unwrap();
    assert_eq!((stored(&west, "a").unwrap().ports, stored(&west, "b")), (vec![1], None));
    let again = State::import(west.state.export()).unwrap();
    assert_eq!(again.digest(), west.state.digest());
    assert_eq!(again.document_revision(), west.state.document_revision());
}

fn service(name: &str, address: &str) -> String {
    let spec = format!("{{address: {address}, port: 80, backends: [spiffe://west/web]}}");
    format!("---\nkind: Service\nmetadata: {{name: {name}}}\nspec: {spec}\n")
}

fn rollback(cell: &mut Cell, to: Revision) -> Result<Reply, Refusal> {
    cell.run(Command::RollbackDocuments { to, over: None, by: "me".into(), note: "in a hurry".into() })
}

#[test]
fn services_are_judged_by_what_is_there_after_the_change() {
    let mut west = two_clusters();
    let two = |a: &str, b: &str| format!("{}{}", service("a", a), service("b", b));
    apply(&mut west, &two("10.96.0.1", "10.96.0.2")).unwrap();
    let first = west.state.document_revision();
    assert_eq!(code(apply(&mut west, &service("c", "10.96.0.1"))), Code::AlreadyExists);
    assert_eq!(code(apply(&mut west, &two("10.96.0.3", "10.96.0.3"))), Code::AlreadyExists, "one address for both");
    // They change places, and back.
    apply(&mut west, &two("10.96.0.2", "10.96.0.1")).unwrap();
    rollback(&mut west, first).unwrap();
    // One takes the place of another, and back.
    run(&mut west, change(&service("c", "10.96.0.1"), &[(DocumentKind::Service, "a")])).unwrap();
    rollback(&mut west, first).unwrap();
    let held: Vec<_> = west.state.services().map(|((_, name), row)| format!("{name} {}", row.object.address)).collect();
    assert_eq!(held, ["a 10.96.0.1", "b 10.96.0.2"]);
    let notes: Vec<_> = west.state.document_changes().map(|(_, row)| row.note.clone()).collect();
    assert_eq!(notes[2], format!("rollback to {}; in a hurry", first.0), "{notes:?}");
}

#[test]
fn what_is_remembered_is_bounded_in_bytes() {
    let mut west = two_clusters();
    let from = |n: usize| format!("spiffe://west/{}{n}", "x".repeat(2_000));
    // Half a megabyte each.
    let large = |name: &str, port: u16| Policy {
        from: (0..256).map(|n| from(n).parse().unwrap()).collect(),
        ports: vec![port],
        ..match &change(&policy(name, "action: deny, from: [spiffe://west/web]"), &[]).policies[..] {
            [policy] => policy.clone(),
            other => panic!("{other:?}"),
        }
    };
    let writing = |policies| DocumentsChange { policies, ..DocumentsChange::default() };
    let held = |cell: &Cell| -> usize {
        cell.state.document_changes().map(|(_, row)| postcard::to_stdvec(row).unwrap().len()).sum()
    };
    for n in 0..40 {
        run(&mut west, writing(vec![large(&format!("p{n}"), 1)])).unwrap();
    }
    assert!(held(&west) < 17 << 20, "{}", held(&west));
    let count = west.state.document_changes().count();
    assert!((25..40).contains(&count), "{count}");
    // One that is too large alone is known to have been, and nothing before it can be come back to.
    let before = west.state.document_revision();
    run(&mut west, writing((0..40).map(|n| large(&format!("p{n}"), 2)).collect())).unwrap();
    assert_eq!((held(&west) < 1_000, west.state.document_changes().count()), (true, 1));
    let newest = west.state.document_revision();
    assert!(newest > before && code(rollback(&mut west, before)) == Code::NotFound);
    let note = west.state.document_changes().next().unwrap().1.note.clone();
    assert!(note.starts_with("40 documents of ") && note.ends_with("too large to be remembered"), "{note}");
    run(&mut west, writing(vec![large("p1", 3)])).unwrap();
    rollback(&mut west, newest).unwrap();
    assert_eq!(stored(&west, "p1").unwrap().ports, [2]);
}

/// A replica of 0.1 has no such table: what it did must come out the same here, to the byte.
#[test]
fn commands_of_a_former_release_are_done_as_it_did_them() {
    let mut west = two_clusters();
    let one = |spec: &str| change(&policy("a", spec), &[]).policies;
    let former = |policies, services| Command::ApplyDocuments { policies, services, by: "me".into() };
    west.run(former(one("action: allow, from: [spiffe://west/web]"), vec![])).unwrap();
    // As it judged services: by what was there before, and one request's not by each other.
    let both = change(&format!("{}{}", service("s", "10.96.0.1"), service("t", "10.96.0.1")), &[]).services;
    west.run(former(vec![], both)).unwrap();
    west.run(Command::DeleteService("t".parse().unwrap())).unwrap();
    let gone = west.run(Command::DeletePolicy("b".parse().unwrap())).unwrap_err();
    assert_eq!((gone.code, gone.expected.as_str()), (Code::NotFound, "a policy of this cell"));
    assert_eq!(west.state.document_changes().count(), 0, "0.1 remembers nothing");
    // Where a later release's command was, all replicas are of one; what is left out there would be lost in a rollback.
    apply(&mut west, &policy("b", "action: allow, from: [spiffe://west/web]")).unwrap();
    let first = west.state.document_revision();
    west.run(former(one("action: allow, from: [spiffe://west/web], ports: [1]"), vec![])).unwrap();
    west.run(Command::DeletePolicy("b".parse().unwrap())).unwrap();
    assert_eq!(west.state.document_changes().count(), 3);
    rollback(&mut west, first).unwrap();
    assert_eq!((stored(&west, "a").unwrap().ports, stored(&west, "b").is_some()), (vec![], true));
}

#[test]
fn what_is_remembered_is_bounded() {
    let mut west = two_clusters();
    for n in 0..250u16 {
        let spec = format!("action: allow, from: [spiffe://west/web], ports: [{}]", n + 1);
        west.at(T + u64::from(n), 0, Command::ChangeDocuments(Box::new(change(&policy("a", &spec), &[])))).unwrap();
    }
    assert_eq!(west.state.document_changes().count(), 200);
    let many: Vec<Policy> =
        (0..9_000).map(|n| Policy { name: format!("p{n}").parse().unwrap(), ..stored(&west, "a").unwrap() }).collect();
    for ports in [vec![1], vec![2], vec![3]] {
        let policies = many.iter().map(|policy| Policy { ports: ports.clone(), ..policy.clone() }).collect();
        run(&mut west, DocumentsChange { policies, ..DocumentsChange::default() }).unwrap();
    }
    assert_eq!(west.state.document_changes().count(), 2);
}

/// Rows in stores and commands in logs: a change of these bytes is a change of format, and takes a table or a command of its own.
#[test]
fn stored_bytes_are_what_they_were() {
    let hex = |bytes: Vec<u8>| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let asked = DocumentsChange {
        over: Some(Revision(300)),
        note: "n".into(),
        ..change(
            "kind: Group\nmetadata: {name: g}\nspec: {members: ['labels:west/a=1']}\n",
            &[(DocumentKind::Service, "s"), (DocumentKind::Policy, "p")],
        )
    };
    let back = Command::RollbackDocuments { to: Revision(7), over: None, by: "b".into(), note: "n".into() };
    let commands = [Command::ChangeDocuments(Box::new(asked.clone())), back];
    let commands = commands.map(|command| hex(postcard::to_stdvec(&command).unwrap()));
    assert_eq!(commands, ["4d000001016701050477657374010161013102010173000170026d65016e01ac02", "4e07000162016e"]);
    let mut west = two_clusters();
    run(&mut west, DocumentsChange { delete: vec![], over: None, ..asked }).unwrap();
    let (_, row) = west.state.document_changes().next().unwrap();
    assert_eq!(hex(postcard::to_stdvec(row).unwrap()), "c0843d026d65016e01020167000102016701050477657374010161013115");
    let (_, group) = west.state.groups().next().unwrap();
    assert_eq!(hex(postcard::to_stdvec(group).unwrap()), "016701050477657374010161013105026d65");
}
