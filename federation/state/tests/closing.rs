//! What a peer's records cannot do to slices, and what a set means that the cell cannot tell.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

mod common;

use ambit_model::policy::{Action, Group, NodeAddress, Peers, Policy, PolicyExtras, Service};
use ambit_model::record::{Head, Kind, Record};
use ambit_model::{Act, Code, Entry, Generation, IdDenial, Refusal, Stamp, TrustDomain};
use ambit_policy::{Document, PORTS_MAX};
use ambit_state::{Command, DocumentsChange};
use common::{Cell, admission, cluster, code, entry, node};

/// `west` with an admitted node that runs `db`, `web` in its cluster `prod`, and an approved peer `east`.
fn west() -> Cell {
    let mut west = Cell::founded("west");
    west.run(Command::RegisterCluster(cluster("prod"), vec![(common::ROOT.to_vec(), "lab".into())], 10_000)).unwrap();
    west.run(Command::AllowEk(cluster("west"), vec![node(1)])).unwrap();
    let admit = admission(&west, 1, 1, None);
    west.run(Command::AdmitNode(admit)).unwrap();
    let web = Entry { cluster: cluster("prod"), ..entry("web", "west") };
    west.run(Command::CreateEntries(vec![entry("db", "west"), web])).unwrap();
    west.run(Command::PutPeer("east".parse().unwrap(), common::pending(), None)).unwrap();
    west.run(Command::ApprovePeer("east".parse().unwrap(), [7; 32])).unwrap();
    west
}

/// Takes records of `east`, whatever they say: (kind, key, payload).
fn import(west: &mut Cell, records: Vec<(Kind, String, Vec<u8>)>) {
    let origin: TrustDomain = "east".parse().unwrap();
    let (_, peer) = west.state.peers().find(|(td, _)| **td == origin).unwrap();
    let (mut seq, mut prev_hash, mut out) = (peer.seq, peer.hash, Vec::new());
    for (kind, key, payload) in records {
        seq += 1;
        let record = Record { origin: origin.clone(), epoch: 1, seq, prev_hash, kind, key, payload };
        prev_hash = record.hash();
        out.push(record);
    }
    let head = Head { origin, epoch: 1, seq, hash: prev_hash, stamp: Stamp(1), nonce: [0; 16] };
    west.run(Command::Import(head, out)).unwrap();
}

fn of<T: serde::Serialize>(kind: Kind, key: &str, object: &T) -> (Kind, String, Vec<u8>) {
    (kind, key.to_owned(), postcard::to_stdvec(object).unwrap())
}

fn endpoint(id: &str, of: &str, last: u8) -> (Kind, String, Vec<u8>) {
    let row = common::endpoint_of_east(id, of, last);
    (Kind::Endpoint, row.address.to_string(), postcard::to_stdvec(&row).unwrap())
}

fn set(text: &str) -> Peers {
    text.parse().unwrap()
}

fn deny(name: &str, target: Peers, from: Vec<Peers>, ports: Vec<u16>) -> Policy {
    Policy { name: name.parse().unwrap(), target, action: Action::Deny, from, ports, extras: Default::default() }
}

fn apply(west: &mut Cell, yaml: &str) -> Result<(), Refusal> {
    let mut change = DocumentsChange { by: "me".into(), ..DocumentsChange::default() };
    for document in ambit_policy::parse(yaml).unwrap() {
        match document {
            Document::Policy(policy) => change.policies.push(policy),
            Document::Group(group) => change.groups.push(group),
            other => panic!("{other:?}"),
        }
    }
    west.run(Command::ChangeDocuments(Box::new(change))).map(drop)
}

fn policy(name: &str, target: &str, action: &str, from: &str) -> String {
    format!(
        "---\nkind: Policy\nmetadata: {{name: {name}}}\nspec: {{target: '{target}', action: {action}, from: ['{from}']}}\n"
    )
}

fn allowed(west: &Cell, from: &str, to: &str) -> bool {
    let (from, to) = (format!("spiffe://{from}").parse().unwrap(), format!("spiffe://{to}").parse().unwrap());
    let verdict = west.state.policy_set().evaluate(&from, &to, 80, west.state.moment());
    if to.to_string() == "spiffe://west/db" {
        let mut slice = ambit_policy::PolicySet::new(west.state.known_domains());
        for (origin, policy) in west.state.slice(&node(1)).unwrap().policies {
            slice.insert(origin, policy);
        }
        assert_eq!(slice.evaluate(&from, &to, 80, west.state.moment()).allowed, verdict.allowed, "its slice differs");
    }
    verdict.allowed
}

/// What an agent refuses a slice for.
fn cannot_be_told(west: &Cell) -> Vec<String> {
    let slice = west.state.slice(&node(1)).unwrap();
    let told = |set: &Peers| Peers::from_wire(&set.to_string()).is_ok_and(|read| read == *set);
    let policies = slice.policies.iter().filter(|(_, p)| {
        !p.from.iter().chain([&p.target]).all(told)
            || p.from.is_empty()
            || !p.extras.unmeshed.is_empty()
            || p.ports.contains(&0)
            || p.ports.len() > PORTS_MAX
    });
    let services = slice.services.iter().filter(|(_, s)| s.port == 0 || !s.backends.iter().all(told));
    policies.map(|(_, p)| format!("{p:?}")).chain(services.map(|(_, s)| format!("{s:?}"))).collect()
}

#[test]
fn no_record_of_a_peer_keeps_a_slice_from_being_told() {
    let ranges = || PolicyExtras { unmeshed: vec!["10.0.0.0/8".parse().unwrap()], ..PolicyExtras::default() };
    let east = |path: &str| Peers::Below("east".parse().unwrap(), path.into());
    let all = || set("spiffe://west/*");
    for (name, wrote) in [
        ("labels", deny("p", all(), vec![set("labels:east/app=web")], vec![])),
        ("a group that is not there", deny("p", all(), vec![set("group:east/nowhere")], vec![])),
        ("a group as target", deny("p", set("group:west/ops"), vec![set("spiffe://east/*")], vec![])),
        ("labels as target", deny("p", set("labels:east/a=b"), vec![set("spiffe://east/web")], vec![])),
        ("a cluster of nobody", deny("p", all(), vec![set("cluster:east/prod")], vec![])),
        ("no prefix", deny("p", all(), vec![east("/a b"), set("spiffe://east/web")], vec![])),
        ("port 0", deny("p", all(), vec![set("spiffe://east/web")], vec![0])),
        ("many ports", deny("p", all(), vec![set("spiffe://east/web")], (1..1_000).collect())),
        ("many callers", deny("p", all(), (0..1_000).map(|n| set(&format!("spiffe://east/web{n}"))).collect(), vec![])),
        ("another name", deny("q", all(), vec![set("spiffe://east/web")], vec![])),
        ("ranges of its own", Policy { extras: ranges(), ..deny("p", set("spiffe://east/x"), vec![all()], vec![]) }),
    ] {
        let mut west = west();
        let open = policy("open", "spiffe://west/db", "allow", "spiffe://east/*");
        apply(&mut west, &open).unwrap();
        assert!(allowed(&west, "east/web", "west/db"));
        import(&mut west, vec![of(Kind::Policy, "p", &wrote)]);
        assert_eq!(cannot_be_told(&west), [] as [String; 0], "{name}");
        // What it cannot mean for sure it means as a whole, of its own callers and of nobody else's.
        let hit = !["labels as target", "ranges of its own"].contains(&name);
        assert_eq!(allowed(&west, "east/web", "west/db"), !hit, "{name}");
        apply(&mut west, &policy("own", "spiffe://west/db", "allow", "spiffe://west/*")).unwrap();
        assert!(allowed(&west, "west/web", "west/db"), "{name}");
    }
}

#[test]
fn two_records_are_two_policies_whatever_they_call_themselves() {
    let mut west = west();
    apply(&mut west, &policy("open", "spiffe://west/db", "allow", "spiffe://east/*")).unwrap();
    let of_web = deny("p", set("spiffe://west/*"), vec![set("spiffe://east/web")], vec![]);
    let of_ops = deny("p", set("spiffe://west/*"), vec![set("spiffe://east/ops")], vec![]);
    import(&mut west, vec![of(Kind::Policy, "a", &of_web), of(Kind::Policy, "b", &of_ops)]);
    for (from, want) in [("east/web", false), ("east/ops", false), ("east/other", true)] {
        assert_eq!(allowed(&west, from, "west/db"), want, "{from}");
    }
    let slice = west.state.slice(&node(1)).unwrap();
    let names: Vec<_> = slice.policies.iter().map(|(td, p)| format!("{td}/{}", p.name)).collect();
    assert_eq!(names, ["east/a", "east/b", "west/open"]);
}

#[test]
fn a_peers_groups_and_services_are_told_or_left_out() {
    let mut west = west();
    apply(&mut west, &policy("open", "spiffe://west/db", "allow", "spiffe://east/*")).unwrap();
    let allow =
        Policy { action: Action::Allow, ..deny("back", set("spiffe://east/*"), vec![set("spiffe://west/*")], vec![]) };
    let group = |members| Group { name: "g".parse().unwrap(), members };
    let of_group = deny("p", set("spiffe://west/*"), vec![set("group:east/g")], vec![]);
    let service = Service {
        name: "s".parse().unwrap(),
        address: [10, 96, 0, 1].into(),
        port: 0,
        backends: vec![set("spiffe://east/*")],
        order: Default::default(),
        weights: Vec::new(),
    };
    let bad = Peers::Below("east".parse().unwrap(), "nothing".into());
    import(
        &mut west,
        vec![
            (Kind::Cluster, "ost".into(), vec![1]),
            endpoint("db", "ost", 1),
            of(Kind::Policy, "back", &allow),
            of(Kind::Group, "g", &group(vec![])),
            of(Kind::Policy, "p", &of_group),
            of(Kind::Service, "s", &service),
        ],
    );
    assert_eq!(cannot_be_told(&west), [] as [String; 0]);
    assert!(allowed(&west, "east/web", "west/db"), "nobody is in the group");
    import(&mut west, vec![of(Kind::Group, "g", &group(vec![bad.clone()]))]);
    assert_eq!(cannot_be_told(&west), [] as [String; 0]);
    assert!(!allowed(&west, "east/web", "west/db"), "somebody may be");
    for (port, backends, there) in [
        (80, vec![set("spiffe://east/*"), bad], 0),
        (80, vec![set("cluster:east/ost")], 0),
        (80, service.backends.clone(), 1),
    ] {
        import(&mut west, vec![of(Kind::Service, "s", &Service { port, backends, ..service.clone() })]);
        assert_eq!(west.state.slice(&node(1)).unwrap().services.len(), there);
    }
}

/// Ten thousand policies of a peer, each as long as may be, are more than a slice.
#[test]
fn a_peers_policies_take_a_bounded_part_of_a_slice() {
    let mut west = west();
    apply(&mut west, &policy("open", "spiffe://west/db", "allow", "spiffe://east/*")).unwrap();
    let long = |n: usize| set(&format!("spiffe://east/{}{n}", "x".repeat(1_900)));
    let from: Vec<Peers> = (0..256).map(long).collect();
    let wrote = |n: usize| {
        of(Kind::Policy, &format!("p{n}"), &deny(&format!("p{n}"), set("spiffe://west/*"), from.clone(), vec![]))
    };
    import(&mut west, (0..30).map(wrote).collect());
    let slice = west.state.slice(&node(1)).unwrap();
    let bytes: usize = slice.policies.iter().flat_map(|(_, p)| &p.from).map(|set| set.to_string().len()).sum();
    assert!(slice.policies.len() == 31 && bytes < 2 << 20, "{} policies, {bytes} bytes", slice.policies.len());
    assert!(!allowed(&west, "east/web", "west/db"), "what does not fit denies all of its own");
}

#[test]
fn a_deny_of_callers_that_cannot_be_told_denies_all_of_their_trust_domain() {
    let mut west = west();
    apply(&mut west, &policy("open", "spiffe://west/db", "allow", "spiffe://east/*")).unwrap();
    // One that a peer wrote before it was refused, or that it lies about: who runs in its cluster is not known before it runs.
    let wrote = deny("p", set("spiffe://west/*"), vec![set("cluster:east/prod")], vec![]);
    import(&mut west, vec![of(Kind::Policy, "p", &wrote)]);
    assert!(!allowed(&west, "east/web", "west/db"), "nobody is known to run there, and somebody may");
    import(&mut west, vec![(Kind::Cluster, "ost".into(), vec![1]), endpoint("web", "ost", 1)]);
    assert!(!allowed(&west, "east/web", "west/db"));
    // As a target it is who can be called, which is known.
    let mut west = self::west();
    let allow =
        Policy { action: Action::Allow, ..deny("a", set("spiffe://east/*"), vec![set("spiffe://west/*")], vec![]) };
    let rows = vec![
        (Kind::Cluster, "ost".into(), vec![1]),
        (Kind::Cluster, "sued".into(), vec![1]),
        endpoint("web", "ost", 1),
        endpoint("db", "sued", 2),
        of(Kind::Policy, "a", &allow),
    ];
    import(&mut west, rows);
    apply(&mut west, &policy("d", "cluster:east/ost", "deny", "spiffe://west/*")).unwrap();
    assert_eq!((allowed(&west, "west/db", "east/web"), allowed(&west, "west/db", "east/db")), (false, true));
}

#[test]
fn a_deny_that_could_not_be_told_for_sure_is_refused_when_it_is_written() {
    let group = "---\nkind: Group\nmetadata: {name: g}\nspec: {members: ['cluster:east/prod']}\n";
    for (yaml, want) in [
        (policy("p", "spiffe://west/db", "deny", "cluster:east/prod"), Some(Code::PolicyUnenforceable)),
        (policy("p", "spiffe://west/db", "audit", "cluster:east/prod"), Some(Code::PolicyUnenforceable)),
        (policy("p", "spiffe://east/db", "deny", "cluster:west/prod"), Some(Code::PolicyUnenforceable)),
        (
            format!("{group}{}", policy("p", "spiffe://west/db", "deny", "group:west/g")),
            Some(Code::PolicyUnenforceable),
        ),
        (policy("p", "spiffe://west/db", "allow", "cluster:east/prod"), None),
        (policy("p", "spiffe://west/db", "deny", "cluster:west/prod"), None),
        (policy("p", "cluster:east/ost", "deny", "spiffe://west/*"), None),
        (policy("p", "cluster:west/prod", "deny", "spiffe://east/*"), None),
    ] {
        let mut west = west();
        let found = apply(&mut west, &yaml);
        assert_eq!(found.as_ref().err().map(|r| r.code), want, "{yaml}: {found:?}");
        // It says what to write instead.
        if let Err(refusal) = found {
            assert!(refusal.expected.contains("spiffe://"), "{refusal}");
        }
    }
    // A group that a deny uses cannot become one either.
    let mut west = west();
    let own = group.replace("cluster:east/prod", "spiffe://east/web");
    apply(&mut west, &format!("{own}{}", policy("p", "spiffe://west/db", "deny", "group:west/g"))).unwrap();
    assert_eq!(code(apply(&mut west, group)), Code::PolicyUnenforceable);
}

/// Sets are told by name of everybody in them: what does not fit a slice is refused when it is written, with the figure, and
/// closes where the set grew afterwards.
#[test]
fn what_policies_name_by_sets_is_bounded() {
    let mut west = west();
    let many = |from: u32, count: u32| {
        let one = |n: u32| Entry {
            cluster: cluster("prod"),
            spiffe_id: format!("spiffe://west/{}/{n}", "y".repeat(1_000)).parse().unwrap(),
            ..entry(&format!("e{n}"), "west")
        };
        Command::CreateEntries((from..from + count).map(one).collect())
    };
    west.run(many(0, 2_000)).unwrap();
    let of_prod = |name: &str, action: &str| policy(name, "spiffe://west/db", action, "cluster:west/prod");
    let four = ["a", "b", "c", "d"].map(|name| of_prod(name, "allow")).concat();
    apply(&mut west, &four).unwrap();
    let refusal = apply(&mut west, &of_prod("e", "allow")).unwrap_err();
    assert_eq!(refusal.code, Code::Busy);
    assert!(refusal.expected.contains("at most 8388608 bytes"), "{refusal}");
    assert!(refusal.found.contains("bytes, 20") && refusal.found.contains("cluster:west/prod"), "{refusal}");
    apply(&mut west, &policy("plain", "spiffe://west/db", "allow", "spiffe://west/ops")).unwrap();
    // Grown: the last ones close, an allow for all, a deny for its trust domain.
    let path = format!("west/{}/1", "y".repeat(1_000));
    let bytes = |west: &Cell| -> usize {
        let slice = west.state.slice(&node(1)).unwrap();
        slice.policies.iter().flat_map(|(_, p)| &p.from).map(|set| set.to_string().len()).sum()
    };
    west.run(many(2_000, 1_000)).unwrap();
    assert!(bytes(&west) < 9 << 20, "{}", bytes(&west));
    assert!(allowed(&west, &path, "west/db") && allowed(&west, "west/ops", "west/db"));
    west.run(many(3_000, 6_000)).unwrap();
    assert!(bytes(&west) < 1 << 20);
    assert!(!allowed(&west, &path, "west/db") && allowed(&west, "west/ops", "west/db"));
}

/// `east` may call `db`, denied one of its own, and runs a workload; `db` is told all of it.
fn with_news_of_east(west: &mut Cell) {
    apply(west, &policy("open", "spiffe://west/db", "allow", "spiffe://east/*")).unwrap();
    let narrows = deny("narrow", set("spiffe://west/db"), vec![set("spiffe://east/odd")], vec![]);
    let out =
        Policy { action: Action::Allow, ..deny("out", set("spiffe://east/*"), vec![set("spiffe://west/db")], vec![]) };
    let service = Service {
        name: "shop".parse().unwrap(),
        address: [10, 9, 0, 99].into(),
        port: 80,
        backends: vec![set("spiffe://east/shop")],
        order: Default::default(),
        weights: Vec::new(),
    };
    let denial = IdDenial { up_to: [9; 16], barred: false, since: Stamp(1), until: Stamp(u64::MAX) };
    let home = NodeAddress { address: [10, 9, 1, 1].into(), since: Generation(1) };
    let news = vec![
        of(Kind::Cluster, "edge", &()),
        endpoint("shop", "edge", 7),
        of(Kind::Policy, "narrow", &narrows),
        of(Kind::Policy, "out", &out),
        of(Kind::Service, "shop", &service),
        of(Kind::IdDenial, "spiffe://east/thief", &denial),
        of(Kind::NodeAddress, &node(1).to_string(), &home),
    ];
    import(west, news);
}

/// What nodes hold of `east`: its bundle, endpoints, services, policies, and denials of it.
fn told_of_east(west: &Cell) -> [usize; 5] {
    let slice = west.state.slice(&node(1)).unwrap();
    let east: TrustDomain = "east".parse().unwrap();
    [
        slice.bundles.keys().filter(|td| **td == east).count(),
        slice.endpoints.iter().filter(|e| e.spiffe_id.trust_domain() == east).count(),
        slice.services.iter().filter(|(td, _)| *td == east).count(),
        slice.policies.iter().filter(|(td, _)| *td == east).count(),
        west.state.id_denials().filter(|((td, _), _)| *td == east).count(),
    ]
}

#[test]
fn a_peer_that_is_suspended_is_believed_nothing_and_one_that_is_approved_again_all() {
    let (mut west, east): (_, TrustDomain) = (west(), "east".parse().unwrap());
    with_news_of_east(&mut west);
    let before = told_of_east(&west);
    assert!(before.iter().all(|n| *n > 0), "{before:?}");
    assert!(allowed(&west, "east/web", "west/db") && !allowed(&west, "east/odd", "west/db"));
    let revision = west.state.cell().unwrap().revision;

    west.run(Command::SuspendPeer(east.clone(), "ann".into())).unwrap();
    assert!(west.state.cell().unwrap().revision > revision, "slices are made anew");
    assert!(!allowed(&west, "east/web", "west/db") && !allowed(&west, "west/db", "east/shop"));
    let [bundle, endpoints, services, policies, denials] = told_of_east(&west);
    assert_eq!((bundle, endpoints, services, denials), (0, 0, 0, before[4]));
    assert!(policies >= 1, "what it narrowed stays narrow");
    // Nothing is taken of it, and trouble with what was on its way changes nothing.
    let record = Record {
        origin: east.clone(),
        epoch: 1,
        seq: 99,
        prev_hash: [0; 32],
        kind: Kind::Cluster,
        key: "x".into(),
        payload: vec![],
    };
    let head = Head { origin: east.clone(), epoch: 1, seq: 99, hash: record.hash(), stamp: Stamp(1), nonce: [0; 16] };
    assert_eq!(code(west.run(Command::Import(head, vec![record]))), Code::PeerNotActive);
    west.run(Command::StopPeer(east.clone(), "x".into())).unwrap();
    assert_eq!(told_of_east(&west)[0], 0);
    // To be believed again it takes the fingerprint that was believed, and no registration.
    west.run(Command::PutPeer(east.clone(), common::pending(), None)).unwrap();
    assert_eq!(told_of_east(&west)[0], 0);
    assert_eq!(code(west.run(Command::ApprovePeer(east.clone(), [8; 32]))), Code::FingerprintMismatch);
    west.run(Command::ApprovePeer(east.clone(), [7; 32])).unwrap();
    assert_eq!(told_of_east(&west), before);
    assert!(allowed(&west, "east/web", "west/db"));
    assert_eq!(code(west.run(Command::SuspendPeer("north".parse().unwrap(), "ann".into()))), Code::NotFound);
}

#[test]
fn of_a_peer_that_is_removed_only_whom_it_denied_is_left() {
    let (mut west, east): (_, TrustDomain) = (west(), "east".parse().unwrap());
    with_news_of_east(&mut west);
    let before = told_of_east(&west);
    let denied = before[4];
    let remove =
        || Command::Act { act: Act::RemoveTrustDomain("east".parse().unwrap()), approved: None, by: "ann".into() };
    assert_eq!(code(west.run(remove())), Code::PeerActive);
    west.run(Command::SuspendPeer(east.clone(), "ann".into())).unwrap();
    west.run(remove()).unwrap();
    assert_eq!(told_of_east(&west), [0, 0, 0, 0, denied]);
    assert!(west.state.peer(&east).is_none() && west.state.foreign_clusters().next().is_none());
    assert!(west.state.policies().all(|((td, _), _)| *td != east));
    assert!(!allowed(&west, "east/web", "west/db"));
    // What went there in a tunnel goes nowhere in clear, and nobody comes from there by address: workload, service, node.
    for left in [[10, 9, 0, 7], [10, 9, 0, 99], [10, 9, 1, 1]] {
        assert!(west.state.left_until(left.into()).is_some(), "{left:?}");
    }
    assert_eq!(code(west.run(remove())), Code::NotFound);
    let again = ambit_state::State::import(west.state.export()).unwrap();
    assert_eq!(again.digest(), west.state.digest());
    // What a pull learnt of it that was under way is no approval, and no place in its chain.
    let state = ambit_state::objects::PeerState::Active;
    let learnt = ambit_state::objects::PeerRow { state, epoch: 9, seq: 9, hash: [9; 32], ..common::pending() };
    west.run(Command::PutPeer(east.clone(), learnt, None)).unwrap();
    assert_eq!(west.state.peer(&east), Some(&common::pending()));
    west.run(remove()).unwrap();
    // Registered again it begins anew, and is told from its first record.
    west.run(Command::PutPeer(east.clone(), common::pending(), None)).unwrap();
    west.run(Command::ApprovePeer(east.clone(), [7; 32])).unwrap();
    with_news_of_east(&mut west);
    assert_eq!(told_of_east(&west), before);
    // A pending one is nobody's loss.
    west.run(Command::PutPeer("north".parse().unwrap(), common::pending(), None)).unwrap();
    let north = Act::RemoveTrustDomain("north".parse().unwrap());
    west.run(Command::Act { act: north, approved: None, by: "ann".into() }).unwrap();
}
