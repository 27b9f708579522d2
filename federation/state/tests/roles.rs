//! Roles of administrators, and what those of one cluster may touch.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

mod common;

use ambit_model::policy::{Action, Policy, Service};
use ambit_model::{AdminRole, ClusterId, Code, Entry, EntryExtras, Extras, SpiffeId, Stamp};
use ambit_policy::Reason;
use ambit_state::command::Presence;
use ambit_state::objects::{PolicyVersion, TokenRow, TokenScope};
use ambit_state::{Command, DocumentsChange, NodeVerb, Nodes, RoleChange, State};
use common::{Cell, admission, cluster, code, entry, node};
use std::collections::BTreeSet;

fn roles(texts: &[&str]) -> BTreeSet<AdminRole> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

fn change(admin: &str, change: RoleChange) -> Command {
    Command::ChangeRoles { admin: admin.parse().unwrap(), change, by: "spiffe://west/ambit/admin/founder".into() }
}

fn certify(admin: &str) -> Command {
    Command::CertifyAdmin { admin: admin.parse().unwrap(), key_hash: [1; 32], authority: "a1".into() }
}

#[test]
fn the_founder_is_one_until_a_row_says_otherwise_and_the_last_one_stays() {
    let mut cell = Cell::founded("west");
    assert_eq!(cell.state.admin_roles("founder"), roles(&["federation-admin"]));
    assert!(cell.state.admin_roles("alice").is_empty() && cell.state.admin_roles("Founder").is_empty());
    let drop_founder = || change("founder", RoleChange::RevokeAll);
    assert_eq!(code(cell.run(drop_founder())), Code::LastAdmin);
    let grant = |admin: &str, texts: &[&str]| change(admin, RoleChange::Grant(roles(texts)));
    assert_eq!(code(cell.run(grant("alice", &["cluster-admin:north"]))), Code::NotFound);
    assert_eq!(code(cell.run(certify("alice"))), Code::PermissionDenied);
    cell.run(grant("alice", &["operator", "federation-admin"])).unwrap();
    cell.run(certify("alice")).unwrap();
    cell.run(drop_founder()).unwrap();
    assert!(cell.state.admin_roles("founder").is_empty());
    assert_eq!(code(cell.run(certify("founder"))), Code::PermissionDenied);
    let less = change("alice", RoleChange::Revoke(roles(&["federation-admin"])));
    assert_eq!(code(cell.run(less.clone())), Code::LastAdmin);
    cell.run(grant("founder", &["federation-admin"])).unwrap();
    cell.run(less).unwrap();
    assert_eq!(cell.state.admin_roles("alice"), roles(&["operator"]));
    let again = State::import(cell.state.export()).unwrap();
    assert_eq!((again.digest(), again.admin_roles("alice")), (cell.state.digest(), roles(&["operator"])));
}

/// A cell with two clusters, an entry of each, and a node of `west`, the administrator's own being `west`.
fn two_clusters() -> Cell {
    let mut cell = Cell::founded("west");
    cell.run(Command::RegisterCluster(cluster("east"), vec![(common::ROOT.to_vec(), "lab".into())], 10_000)).unwrap();
    let theirs = Entry { cluster: cluster("east"), ..entry("db", "west") };
    cell.run(Command::CreateEntries(vec![entry("web", "west"), theirs])).unwrap();
    for (n, of) in [(1, "west"), (2, "east")] {
        let token = TokenRow { scope: TokenScope::Node(cluster(of)), expires: Stamp(2_000_000), used: false };
        cell.run(Command::CreateToken([n; 32], token)).unwrap();
        let admission = admission(&cell, n, n, Some([n; 32]));
        cell.run(Command::AdmitNode(ambit_state::command::Admission { cluster: cluster(of), ..admission })).unwrap();
    }
    for name in ["east-db", "west-web"] {
        let target = if name == "east-db" { "spiffe://west/db" } else { "spiffe://west/web" };
        cell.run(documents(vec![policy(name, target)], vec![])).unwrap();
    }
    cell
}

fn policy(name: &str, target: &str) -> Policy {
    let from = vec!["spiffe://west/*".parse().unwrap()];
    Policy {
        name: name.parse().unwrap(),
        target: target.parse().unwrap(),
        action: Action::Allow,
        from,
        ports: Default::default(),
        extras: Default::default(),
    }
}

fn service(name: &str, backends: &[&str]) -> Service {
    Service {
        name: name.parse().unwrap(),
        address: "10.96.0.1".parse().unwrap(),
        port: 80,
        backends: backends.iter().map(|b| b.parse().unwrap()).collect(),
        order: Default::default(),
        weights: Vec::new(),
    }
}

fn documents(policies: Vec<Policy>, services: Vec<Service>) -> Command {
    Command::ApplyDocuments { policies, services, by: "me".into() }
}

fn appraisal(name: &str, clusters: &[&str]) -> Command {
    let clusters: BTreeSet<ClusterId> = clusters.iter().map(|c| cluster(c)).collect();
    let content = PolicyVersion { version: 0, sha256: [1; 32], canonical: vec![1], clusters };
    Command::PutAppraisalPolicy { name: name.parse().unwrap(), content, staged: false, by: "me".into() }
}

fn named(id: &str, spiffe_id: &str) -> Entry {
    let spiffe_id: SpiffeId = spiffe_id.parse().unwrap();
    Entry { spiffe_id, ..entry(id, "west") }
}

/// Whatever an administrator of one cluster asks is done as anybody else's, or touches another cluster and is refused whole.
#[test]
fn an_administrator_of_a_cluster_touches_nothing_of_another() {
    let token = |scope| Command::CreateToken([9; 32], TokenRow { scope, expires: Stamp(9_000_000), used: false });
    let own = |id: &str| entry(id, "west");
    let theirs = |id: &str| Entry { cluster: cluster("east"), ..entry(id, "west") };
    let put = |e: Entry| Command::PutEntries(vec![(e, Presence::Whatever)]);
    let delete = |ids: &[&str]| Command::DeleteEntries(ids.iter().map(|id| id.parse().unwrap()).collect());
    let say = |nodes: Nodes| Command::SetNodes(NodeVerb::Ban, nodes);
    let (policies, services) = (|p: Policy| documents(vec![p], vec![]), |s: Service| documents(vec![], vec![s]));
    let bar = |id: &str| Command::DenyId(id.parse().unwrap(), ambit_state::IdVerb::Bar);
    let held: ambit_model::ObjectName = "held".parse().unwrap();
    for (what, command, allowed) in [
        ("own entry", Command::CreateEntries(vec![own("a")]), true),
        ("entry of another cluster", Command::CreateEntries(vec![theirs("a")]), false),
        ("own beside another's", Command::CreateEntries(vec![own("a"), theirs("b")]), false),
        ("own entry with another's identity", Command::CreateEntries(vec![named("a", "spiffe://west/db")]), false),
        ("identity named after us", Command::CreateEntries(vec![named("a", "spiffe://west/cluster/west/a")]), true),
        (
            "identity named after another",
            Command::CreateEntries(vec![named("a", "spiffe://west/cluster/east/a")]),
            false,
        ),
        (
            "identity named after nobody's beginning",
            Command::CreateEntries(vec![named("a", "spiffe://west/cluster/westend/a")]),
            false,
        ),
        ("own entry written over", put(own("web")), true),
        ("another's entry taken over", put(own("db")), false),
        ("another's entry taken over for an own identity", put(named("db", "spiffe://west/web")), false),
        ("own entry handed over", put(theirs("web")), false),
        ("own entry deleted", delete(&["web"]), true),
        ("another's deleted", delete(&["web", "db"]), false),
        ("own node", say(Nodes::Ids(vec![node(1)])), true),
        ("another's node", say(Nodes::Ids(vec![node(1), node(2)])), false),
        ("own cluster's nodes", say(Nodes::Cluster(cluster("west"))), true),
        ("another cluster's nodes", say(Nodes::Cluster(cluster("east"))), false),
        ("own join token", token(TokenScope::Node(cluster("west"))), true),
        ("another's join token", token(TokenScope::Node(cluster("east"))), false),
        ("a replica's token", token(TokenScope::Replica(2, "127.0.0.1:1".into())), false),
        ("a peer's token", token(TokenScope::Peer("north".parse().unwrap(), [1; 32])), false),
        ("own allow-list", Command::AllowEk(cluster("west"), vec![node(7)]), true),
        ("another's allow-list", Command::AllowEk(cluster("east"), vec![node(7)]), false),
        ("another's node on the own allow-list", Command::AllowEk(cluster("west"), vec![node(2)]), false),
        ("own allow-list, less", Command::DisallowEk(cluster("west"), vec![node(7)]), true),
        ("policy about an own identity", policies(policy("p", "spiffe://west/web")), true),
        ("policy about another's", policies(policy("p", "spiffe://west/db")), false),
        ("policy about nobody's identity", policies(policy("p", "spiffe://west/ghost")), false),
        ("policy about all", policies(policy("p", "spiffe://west/*")), false),
        ("policy about those below our name", policies(policy("p", "spiffe://west/cluster/west/*")), true),
        ("policy about those below another's", policies(policy("p", "spiffe://west/cluster/east/*")), false),
        ("own policy's name, another's policy", policies(policy("east-db", "spiffe://west/web")), false),
        ("own policy deleted", Command::DeletePolicy("west-web".parse().unwrap()), true),
        ("another's policy deleted", Command::DeletePolicy("east-db".parse().unwrap()), false),
        ("own service", services(service("s", &["spiffe://west/web"])), true),
        ("service with another's backend", services(service("s", &["spiffe://west/web", "spiffe://west/db"])), false),
        ("service of another trust domain", services(service("s", &["spiffe://west/web", "spiffe://north/a"])), false),
        (
            "service of another trust domain that has our name",
            services(service("s", &["spiffe://west/web", "spiffe://north/cluster/west/a"])),
            false,
        ),
        (
            "service of all of another trust domain below our name",
            services(service("s", &["spiffe://west/web", "spiffe://north/cluster/west/*"])),
            false,
        ),
        ("denial of an own identity", bar("spiffe://west/web"), true),
        ("denial of another's", bar("spiffe://west/db"), false),
        ("denial of another trust domain's that has our name", bar("spiffe://north/cluster/west/a"), false),
        ("denial of an administrator", bar("spiffe://west/ambit/admin/founder"), false),
        ("own appraisal policy", appraisal("mine", &["west"]), true),
        ("appraisal policy of both", appraisal("mine", &["west", "east"]), false),
        ("another's appraisal policy", appraisal("held", &["west"]), false),
        ("another's appraisal policy deleted", Command::DeleteAppraisalPolicy(held.clone()), false),
        ("another's appraisal policy promoted", Command::PromoteAppraisalPolicy(held.clone()), false),
        ("a cluster", Command::RegisterCluster(cluster("south"), vec![], 10_000), false),
        ("EK roots", Command::PutEkRoots { cluster: cluster("west"), add: vec![], remove: vec![] }, false),
        ("the deny-list", Command::PutEkDeny(vec![], vec![]), false),
        ("roles", change("me", RoleChange::Grant(roles(&["federation-admin"]))), false),
        ("a certificate", certify("founder"), false),
        ("a peer", Command::ApprovePeer("north".parse().unwrap(), [1; 32]), false),
        ("a replica", Command::RemoveMember(1), false),
        (
            "a wrapped wish",
            Command::Within([cluster("east")].into(), Box::new(Command::DeleteEntries(vec!["db".parse().unwrap()]))),
            false,
        ),
    ] {
        let mut cell = two_clusters();
        cell.run(appraisal("held", &["east"])).unwrap();
        let ours = BTreeSet::from([cluster("west")]);
        let before = bare(&cell.state);
        let outcome = cell.run(Command::Within(ours, Box::new(command)));
        let refused = outcome.as_ref().err().map(|refusal| refusal.code);
        assert_eq!(refused.is_none(), allowed, "{what}: {outcome:?}");
        if !allowed {
            assert_eq!(refused, Some(Code::PermissionDenied), "{what}");
            assert_eq!(bare(&cell.state), before, "{what} left something behind");
        }
    }
}

/// Policies of the whole cell deny by labels: who administers a cluster keeps them where they were put.
#[test]
fn an_administrator_of_a_cluster_sheds_no_labels() {
    let labelled = |id: &str, spiffe_id: &str, expires_at| {
        let labels = [ambit_model::policy::label("state=suspect").unwrap()].into();
        let extras = Extras::new(EntryExtras { labels, expires_at, ..EntryExtras::NONE }).unwrap();
        Entry { extras, ..named(id, spiffe_id) }
    };
    let never = EntryExtras::NONE.expires_at;
    let ours = "spiffe://west/suspect";
    let put = |e: Entry| Command::PutEntries(vec![(e, Presence::Whatever)]);
    let replace = |e: Entry| Command::ReplaceEntries(vec![(e, Presence::Whatever)]);
    for (what, command, allowed) in [
        ("deleted", Command::DeleteEntries(vec!["s".parse().unwrap()]), false),
        ("retired", Command::RetireEntries(vec!["web".parse().unwrap(), "s".parse().unwrap()]), false),
        ("without labels", put(named("s", ours)), false),
        ("of another identity", put(labelled("s", "spiffe://west/elsewhere", never)), false),
        ("of another identity, replaced", replace(labelled("s", "spiffe://west/elsewhere", never)), false),
        ("that ends soon", put(labelled("s", ours, Stamp(1_000_001))), false),
        ("as it is", put(labelled("s", ours, never)), true),
        (
            "on other processes",
            put(Entry { selectors: [ambit_model::Selector::UnixUid(7)].into(), ..labelled("s", ours, never) }),
            true,
        ),
        ("another one beside", Command::CreateEntries(vec![named("s2", ours)]), true),
    ] {
        let mut cell = two_clusters();
        cell.run(Command::CreateEntries(vec![labelled("s", ours, never)])).unwrap();
        let open = policy("open", "spiffe://west/web");
        let deny = Policy {
            action: Action::Deny,
            from: vec!["labels:west/state=suspect".parse().unwrap()],
            ..policy("suspects", "spiffe://west/web")
        };
        let change = DocumentsChange { policies: vec![open, deny], ..DocumentsChange::default() };
        cell.run(Command::ChangeDocuments(Box::new(change))).unwrap();
        let outcome = cell.run(Command::Within([cluster("west")].into(), Box::new(command)));
        assert_eq!(outcome.is_ok(), allowed, "{what}: {outcome:?}");
        let (from, to) = (ours.parse().unwrap(), "spiffe://west/web".parse().unwrap());
        let verdict = cell.state.policy_set().evaluate(&from, &to, 80, cell.state.moment());
        assert_eq!(verdict.reason, Reason::Denied, "{what}");
    }
}

/// A deny by cluster hits whoever has an entry in it, wherever else that identity runs.
#[test]
fn an_administrator_of_a_cluster_denies_calls_to_nobody_of_another() {
    let by_cluster = |action| Policy { action, ..policy("p", "cluster:west/west") };
    for (action, shared, allowed) in [
        (Action::Deny, false, true),
        (Action::Audit, false, true),
        (Action::Allow, true, true),
        (Action::Deny, true, false),
        (Action::Audit, true, false),
    ] {
        let mut cell = two_clusters();
        if shared {
            // The whole cell's operator gives an identity of `east` to a workload of `west` too.
            cell.run(Command::CreateEntries(vec![named("db-too", "spiffe://west/db")])).unwrap();
        }
        let change = DocumentsChange { policies: vec![by_cluster(action)], ..DocumentsChange::default() };
        let wish =
            Command::Within([cluster("west")].into(), Box::new(Command::ChangeDocuments(Box::new(change.clone()))));
        let outcome = cell.run(wish);
        assert_eq!(
            outcome.as_ref().err().map(|r| r.code),
            (!allowed).then_some(Code::PermissionDenied),
            "{action:?} {outcome:?}"
        );
        let both = [cluster("west"), cluster("east")].into();
        cell.run(Command::Within(both, Box::new(Command::ChangeDocuments(Box::new(change))))).unwrap();
    }
}

/// All rows but the clock's.
fn bare(state: &State) -> Vec<ambit_state::TableWrite> {
    state.rows().filter(|row| row.table != 1).collect()
}
