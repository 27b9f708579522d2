//! Downstream authorities: who may have one, and what ends it; and administrators by their entry.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

mod common;

use ambit_model::record::Kind;
use ambit_model::{AdminRole, Code, Entry, EntryExtras, Extras, Generation, Selector, SpiffeId, Stamp};
use ambit_state::authorities::AuthorityState;
use ambit_state::command::{IdVerb, LeafRequest, NodeVerb, Nodes, Presence, RoleChange};
use ambit_state::{Command, Issuance, LogEntry, Reply, State};
use common::*;
use std::collections::BTreeSet;

const DAY_MS: u64 = 86_400_000;

fn marked(id: &str, change: fn(&mut EntryExtras)) -> Entry {
    let mut extras = EntryExtras::NONE;
    change(&mut extras);
    Entry { extras: Extras::new(extras).unwrap(), nodes: [node(1)].into(), ..entry(id, "west") }
}

/// One node and three entries, of which one is downstream and one admin.
fn cell() -> Cell {
    let mut cell = Cell::founded("west");
    cell.run(Command::AllowEk(cluster("west"), vec![node(1)])).unwrap();
    cell.run(Command::AdmitNode(admission(&cell, 1, 1, None))).unwrap();
    let entries =
        vec![entry("web", "west"), marked("site", |e| e.downstream = true), marked("ops", |e| e.admin = true)];
    let Reply::Items(done) = cell.run(Command::CreateEntries(entries)).unwrap() else { panic!("no items") };
    assert!(done.iter().all(Result::is_ok), "{done:?}");
    cell
}

fn leaf(cell: &mut Cell, id: &str) -> Issuance {
    let leaves = vec![LeafRequest { entry: id.parse().unwrap(), key_hash: [8; 32] }];
    let generation = cell.state.node(&node(1)).unwrap().generation;
    let issue = Command::Issue { node: node(1), generation, authority: "a1".into(), leaves };
    let Reply::Leaves(mut leaves) = cell.run(issue).unwrap() else { panic!("no leaves") };
    leaves.remove(0).unwrap()
}

fn ask(svid: &Issuance, key: u8) -> Command {
    let (node, generation) = svid.binding.unwrap();
    Command::NewDownstream { node, generation, serial: svid.serial, key_hash: [key; 32], lifetime_ms: DAY_MS }
}

fn name(key: u8) -> String {
    format!("{key:02x}").repeat(20)
}

fn is_denied(state: &State, key: u8) -> bool {
    state.denied_authorities().contains(&("west".parse().unwrap(), name(key)))
}

#[test]
fn an_svid_of_a_downstream_entry_and_no_other_gets_an_authority_that_is_on_record_before_it_is_signed() {
    let mut cell = cell();
    let (site, web) = (leaf(&mut cell, "site"), leaf(&mut cell, "web"));
    let Reply::Downstream(one) = cell.run(ask(&site, 20)).unwrap() else { panic!("no authority") };
    assert_eq!((one.entry.as_str(), one.key_hash), ("site", [20; 32]));
    assert_eq!(one.lifetime.not_after, Stamp(1_000_000 + DAY_MS));
    assert!(one.serial > site.serial, "of the same order as leaves");
    let row = cell.state.downstream(&name(20)).unwrap();
    assert_eq!((row.node, row.generation, row.state), (node(1), Generation(1), AuthorityState::Active));
    let forged = Issuance { serial: [0x7f; 16], ..site.clone() };
    let elsewhere = Issuance { binding: Some((node(2), Generation(1))), ..site.clone() };
    let newer = Issuance { binding: Some((node(1), Generation(2))), ..site.clone() };
    let brief = |lifetime_ms| match ask(&site, 21) {
        Command::NewDownstream { node, generation, serial, key_hash, .. } => {
            Command::NewDownstream { node, generation, serial, key_hash, lifetime_ms }
        }
        other => other,
    };
    let renew = Command::RenewAuthority { replica: 1, key_hash: [20; 32], lifetime_ms: DAY_MS };
    for (what, command, refused) in [
        ("a workload", ask(&web, 21), Code::PermissionDenied),
        ("an SVID that is not on record", ask(&forged, 21), Code::PermissionDenied),
        ("another node", ask(&elsewhere, 21), Code::NodeUnknown),
        ("a generation that is not there yet", ask(&newer, 21), Code::NodeUntrusted),
        ("a key that has one", ask(&site, 20), Code::AlreadyExists),
        ("a replica with that key", renew, Code::AlreadyExists),
        ("for too long", brief(8 * DAY_MS), Code::BadRequest),
        ("for no time", brief(0), Code::BadRequest),
    ] {
        assert_eq!(code(cell.run(command)), refused, "{what}");
    }
    // It signs nothing for the cell itself.
    let leaves = vec![LeafRequest { entry: "web".parse().unwrap(), key_hash: [8; 32] }];
    let issue = Command::Issue { node: node(1), generation: Generation(1), authority: name(20), leaves };
    assert_eq!(code(cell.run(issue)), Code::AuthorityMismatch);
    // An SVID that ended asks for nothing more.
    assert_eq!(code(cell.at(1_000_000 + 3_600_000, 0, ask(&site, 21))), Code::NodeUntrusted);
    let again = State::import(cell.state.export()).unwrap();
    assert_eq!(again.digest(), cell.state.digest());
    assert!(again.downstream(&name(20)).is_some());
}

#[test]
fn authorities_of_an_entry_are_bounded_and_end_with_it() {
    let mut cell = cell();
    let site = leaf(&mut cell, "site");
    for key in 20..28 {
        cell.run(ask(&site, key)).unwrap();
    }
    assert_eq!(code(cell.run(ask(&site, 28))), Code::Busy);
    let brief = marked("brief", |e| (e.downstream, e.expires_at) = (true, Stamp(1_100_000)));
    cell.run(Command::CreateEntries(vec![brief])).unwrap();
    let brief = leaf(&mut cell, "brief");
    let Reply::Downstream(one) = cell.run(ask(&brief, 40)).unwrap() else { panic!("no authority") };
    assert_eq!(one.lifetime.not_after, Stamp(1_100_000));
    // Forgotten once no clock can take it for valid.
    cell.at(1_100_000 + 299_000, 0, Command::Tick).unwrap();
    assert!(cell.state.downstream(&name(40)).is_some() && is_denied(&cell.state, 40));
    cell.at(1_100_000 + 301_000, 0, Command::Tick).unwrap();
    assert!(cell.state.downstream(&name(40)).is_none() && !is_denied(&cell.state, 40));
}

#[test]
fn what_ends_its_foundation_revokes_it_here_and_at_peers() {
    let replace = |entry| Command::ReplaceEntries(vec![(entry, Presence::There)]);
    let nodes = |verb| Command::SetNodes(verb, Nodes::Ids(vec![node(1)]));
    let id = || "spiffe://west/site".parse::<SpiffeId>().unwrap();
    let elsewhere = Entry { nodes: [node(2)].into(), ..marked("site", |e| e.downstream = true) };
    for (what, command, ends) in [
        ("the entry is deleted", Command::RetireEntries(vec!["site".parse().unwrap()]), true),
        ("the entry is no longer downstream", replace(entry("site", "west")), true),
        ("the entry is another node's", replace(elsewhere), true),
        ("its node is banned", nodes(NodeVerb::Ban), true),
        ("its node is quarantined", nodes(NodeVerb::Quarantine), true),
        ("its node is evicted", nodes(NodeVerb::Evict), true),
        ("its identity is denied", Command::DenyId(id(), IdVerb::Bar), true),
        ("SVIDs of its identity so far are revoked", Command::DenyId(id(), IdVerb::Revoke), true),
        ("another entry is deleted", Command::RetireEntries(vec!["web".parse().unwrap()]), false),
        ("the entry has another hint", replace(marked("site", |e| (e.downstream, e.hint) = (true, "x".into()))), false),
        ("a tick", Command::Tick, false),
    ] {
        let mut cell = cell();
        let site = leaf(&mut cell, "site");
        cell.at(1_000_000, 7, ask(&site, 20)).unwrap();
        let before = cell.state.cell().unwrap().export_seq;
        cell.run(command).unwrap();
        assert_eq!(is_denied(&cell.state, 20), ends, "{what}");
        let denials = cell.state.slice(&node(1)).map(|slice| slice.authority_denials.len());
        assert!(denials.is_none_or(|n| n == usize::from(ends)), "{what}");
        let told: Vec<_> = cell.state.records_after(before).filter(|r| r.kind == Kind::AuthorityDenial).collect();
        assert_eq!(told.len(), usize::from(ends), "{what}");
        // Asked again under the same request id it is not signed after all.
        assert_eq!(cell.at(1_000_000, 7, ask(&site, 20)).is_err(), ends, "{what}");
        cell.run(Command::Tick).unwrap();
        let told = cell.state.records_after(before).filter(|r| r.kind == Kind::AuthorityDenial).count();
        assert_eq!(told, usize::from(ends), "{what}: told once");
    }
}

#[test]
fn it_goes_with_the_svid_that_asked_for_it_and_with_that_ones_issuer() {
    let run_all = |cell: &mut Cell, commands: Vec<Command>| {
        commands.into_iter().for_each(|command| drop(cell.run(command).unwrap()));
    };
    let renew = |key| Command::RenewAuthority { replica: 1, key_hash: [key; 32], lifetime_ms: DAY_MS };
    let mut cell = cell();
    let (one, two) = (leaf(&mut cell, "site"), leaf(&mut cell, "site"));
    run_all(&mut cell, vec![ask(&one, 20), ask(&two, 21)]);
    run_all(&mut cell, vec![Command::DenyLeaf("a1".into(), one.serial.to_vec())]);
    assert!(is_denied(&cell.state, 20) && !is_denied(&cell.state, 21), "of the other SVID");
    run_all(&mut cell, vec![renew(5), Command::TaintAuthority("a1".into())]);
    assert!(!is_denied(&cell.state, 21), "tainted is not revoked");
    let again = State::import(cell.state.export()).unwrap();
    assert_eq!(again.downstream(&name(21)).unwrap().asked_by, ("a1".to_owned(), two.serial));
    run_all(&mut cell, vec![Command::RevokeAuthority("a1".into())]);
    assert!(is_denied(&cell.state, 21));
}

#[test]
fn one_that_was_revoked_takes_no_place() {
    let mut cell = cell();
    let site = leaf(&mut cell, "site");
    for key in 20..28 {
        cell.run(ask(&site, key)).unwrap();
    }
    assert_eq!(code(cell.run(ask(&site, 28))), Code::Busy);
    cell.run(Command::TaintAuthority(name(20))).unwrap();
    assert_eq!(code(cell.run(ask(&site, 28))), Code::Busy, "tainted is in time");
    cell.run(Command::RevokeAuthority(name(20))).unwrap();
    cell.run(ask(&site, 28)).unwrap();
    assert_eq!(code(cell.run(ask(&site, 29))), Code::Busy);
}

#[test]
fn operators_taint_it_and_revoke_it() {
    let mut cell = cell();
    let site = leaf(&mut cell, "site");
    cell.run(ask(&site, 20)).unwrap();
    assert_eq!(code(cell.run(Command::RevokeAuthority(name(20)))), Code::RootState);
    cell.run(Command::TaintAuthority(name(20))).unwrap();
    assert_eq!(cell.state.downstream(&name(20)).unwrap().state, AuthorityState::Tainted);
    assert!(!is_denied(&cell.state, 20));
    assert_eq!(code(cell.run(Command::TaintAuthority(name(20)))), Code::RootState);
    cell.run(Command::RevokeAuthority(name(20))).unwrap();
    assert!(is_denied(&cell.state, 20));
    let site: SpiffeId = "spiffe://west/site/web".parse().unwrap();
    assert!(cell.state.svid_denied(&site, &name(20), &[1]));
}

/// It was given after the backup that the cell was restored from.
#[test]
fn one_that_nothing_is_known_of_is_revoked_by_name_for_as_long_as_it_may_last() {
    let mut cell = cell();
    for bad in ["", "a", &name(20)[1..], &name(0xab).to_uppercase(), &format!("{}00", name(20))] {
        assert_eq!(code(cell.run(Command::DenyAuthority(bad.into()))), Code::NotFound, "{bad}");
    }
    for unknown in [Command::TaintAuthority(name(20)), Command::RevokeAuthority(name(20))] {
        assert_eq!(code(cell.run(unknown)), Code::NotFound, "a slip of the pen is no revocation");
    }
    assert_eq!(code(cell.run(Command::DenyAuthority("a1".into()))), Code::RootState, "one that there is");
    let before = cell.state.cell().unwrap().export_seq;
    cell.run(Command::DenyAuthority(name(20))).unwrap();
    assert!(is_denied(&cell.state, 20));
    let told: Vec<_> = cell.state.records_after(before).map(|r| (r.kind, r.key.clone())).collect();
    assert_eq!(told, [(Kind::AuthorityDenial, name(20))]);
    assert!(cell.state.svid_denied(&"spiffe://west/site/web".parse().unwrap(), &name(20), &[1]));
    // Bounded, and the same one again is no further one.
    for n in 0..255u32 {
        cell.run(Command::DenyAuthority(format!("{n:040x}"))).unwrap();
    }
    assert_eq!(code(cell.run(Command::DenyAuthority(name(30)))), Code::Busy);
    cell.run(Command::DenyAuthority(name(20))).unwrap();
    cell.at(1_000_000 + 7 * DAY_MS + 300_000, 0, Command::Tick).unwrap();
    assert!(is_denied(&cell.state, 20));
    cell.at(1_000_000 + 7 * DAY_MS + 300_001, 0, Command::Tick).unwrap();
    assert!(!is_denied(&cell.state, 20));
}

#[test]
fn who_administers_by_an_entry_has_the_roles_of_its_identity_while_entry_and_node_stand() {
    let mut cell = cell();
    let (ops, id) = (leaf(&mut cell, "ops"), "spiffe://west/ops".parse::<SpiffeId>().unwrap());
    let grant = |id: &str| Command::ChangeIdRoles {
        id: id.parse().unwrap(),
        change: RoleChange::Grant(BTreeSet::from([AdminRole::Operator])),
        by: "founder".into(),
    };
    cell.run(grant("spiffe://west/ops")).unwrap();
    for foreign in ["spiffe://east/ops", "spiffe://west/ambit/admin/founder"] {
        assert_eq!(code(cell.run(grant(foreign))), Code::NotOwner, "{foreign}");
    }
    assert_eq!(cell.state.id_admin_roles(&id), BTreeSet::from([AdminRole::Operator]));
    let of = |state: &State| {
        state.entry_of_svid(&ops.authority, &ops.serial, ops.binding.unwrap()).map(|row| row.entry.id.to_string())
    };
    assert_eq!(of(&cell.state).as_deref(), Some("ops"));
    let state = &cell.state;
    assert!(state.entry_of_svid("a2", &ops.serial, ops.binding.unwrap()).is_none(), "of another authority");
    assert!(state.entry_of_svid("a1", &[1; 16], ops.binding.unwrap()).is_none(), "not on record");
    assert!(state.entry_of_svid("a1", &ops.serial, (node(2), Generation(1))).is_none(), "of another node");
    // Replayed with one step more, each ends it.
    let copy = |log: &[LogEntry]| {
        let mut state = State::new();
        for (n, entry) in log.iter().enumerate() {
            state.apply(ambit_model::RaftIndex(n as u64 + 1), entry);
        }
        state
    };
    let ban = Command::SetNodes(NodeVerb::Ban, Nodes::Ids(vec![node(1)]));
    let moved = Entry { nodes: [node(2)].into(), ..marked("ops", |e| e.admin = true) };
    let again = Command::AdmitNode(admission(&cell, 1, 2, None));
    for (what, command) in [
        ("the entry is deleted", Command::RetireEntries(vec!["ops".parse().unwrap()])),
        ("the entry is another node's", Command::ReplaceEntries(vec![(moved, Presence::There)])),
        ("its node is banned", ban),
        ("its node was admitted anew", again),
    ] {
        let mut state = copy(&cell.log);
        assert!(of(&state).is_some());
        let entry = LogEntry { stamp: Stamp(1_000_000), client: [9; 32], request: [0; 16], command };
        state.apply(ambit_model::RaftIndex(cell.index + 1), &entry).outcome.unwrap();
        assert!(of(&state).is_none(), "{what}");
    }
    let revoke = Command::ChangeIdRoles { id: id.clone(), change: RoleChange::RevokeAll, by: "founder".into() };
    cell.run(revoke).unwrap();
    assert_eq!((cell.state.id_admin_roles(&id).len(), cell.state.id_admins().count()), (0, 0));
}

#[test]
fn only_who_administers_the_whole_cell_writes_such_entries() {
    let mut cell = cell();
    let within = |command| Command::Within([cluster("west")].into(), Box::new(command));
    let replace = |entry| Command::ReplaceEntries(vec![(entry, Presence::There)]);
    for (what, command, allowed) in [
        ("an entry", Command::CreateEntries(vec![entry("db", "west")]), true),
        ("an admin entry", Command::CreateEntries(vec![marked("x", |e| e.admin = true)]), false),
        ("a downstream entry", Command::CreateEntries(vec![marked("x", |e| e.downstream = true)]), false),
        ("an entry made admin", replace(marked("web", |e| e.admin = true)), false),
        ("other selectors of an admin entry", replace(entry("ops", "west")), false),
    ] {
        let outcome = cell.run(within(command));
        assert_eq!(outcome.err().map(|r| r.code), (!allowed).then_some(Code::PermissionDenied), "{what}");
    }
}

/// Else whoever admits nodes to the cluster would have its administrators and its issuers.
#[test]
fn such_an_entry_names_its_nodes() {
    let web = || "unix:uid:1000".parse::<Selector>().unwrap();
    let ek = || Selector::TpmEkHash(node(1));
    let policy = || "tpm:policy:servers".parse::<Selector>().unwrap();
    let marks: [fn(&mut EntryExtras); 3] = [|_| (), |e| e.admin = true, |e| e.downstream = true];
    for (what, nodes, selectors, named) in [
        ("no node", vec![], vec![web()], false),
        ("what a policy of the cluster's lets in", vec![], vec![web(), policy()], false),
        ("a node", vec![node(1)], vec![web()], true),
        ("a TPM", vec![], vec![web(), ek(), policy()], true),
    ] {
        for (n, mark) in marks.into_iter().enumerate() {
            let mut cell = cell();
            let selectors = selectors.clone().into();
            let one = Entry { nodes: nodes.iter().copied().collect(), selectors, ..marked("x", mark) };
            let over = Entry { id: "ops".parse().unwrap(), ..one.clone() };
            let put = |command| (command, (n > 0 && !named).then_some(Code::BadRequest));
            for (command, refused) in [
                put(Command::CreateEntries(vec![one])),
                put(Command::ReplaceEntries(vec![(over.clone(), Presence::There)])),
                put(Command::PutEntries(vec![(over, Presence::Whatever)])),
            ] {
                let Reply::Items(done) = cell.run(command).unwrap() else { panic!("no items") };
                assert_eq!(done[0].as_ref().err().map(|r| r.code), refused, "{what}, {n}");
            }
        }
    }
}
