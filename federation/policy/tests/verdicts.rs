//! Verdicts, explanations, port sets and slices, as tables; and slices and port sets against the whole set.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test says that it failed by panicking")]

mod draw;

use ambit_model::policy::{Action, Peers, Policy};
use ambit_model::{Moment, SpiffeId, Stamp, TrustDomain};
use ambit_policy::{Document, PolicySet, PortSet, parse};
use draw::Draw;
use std::collections::BTreeSet;

/// No policy of the tables here ends.
const NOW: Moment = Moment { committed: Stamp(1), latest: Stamp(1) };

fn id(short: &str) -> SpiffeId {
    format!("spiffe://{short}").parse().unwrap()
}

fn domains(names: &[&str]) -> BTreeSet<TrustDomain> {
    names.iter().map(|name| name.parse().unwrap()).collect()
}

/// Each line: `origin name action target from,from [ports]`, with identities without their scheme.
fn set(known: &[&str], lines: &str) -> PolicySet {
    let mut set = PolicySet::new(domains(known));
    for line in lines.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let words: Vec<_> = line.split_whitespace().collect();
        let [origin, name, action, target, from] = words[..5].try_into().unwrap();
        let from: Vec<_> = from.split(',').map(|f| format!("spiffe://{f}")).collect();
        let ports = words.get(5).map(|p| format!(", ports: [{p}]")).unwrap_or_default();
        let spec = format!("{{target: spiffe://{target}, action: {action}, from: [{}]{ports}}}", from.join(", "));
        let text = format!("{{kind: Policy, metadata: {{name: {name}}}, spec: {spec}}}");
        let documents = parse(&text).unwrap();
        let [Document::Policy(policy)] = documents.as_slice() else { panic!("{documents:?}") };
        set.insert(origin.parse().unwrap(), policy.clone());
    }
    set
}

fn told(set: &PolicySet, src: &str, dst: &str, port: u16) -> String {
    let verdict = set.evaluate(&id(src), &id(dst), port, NOW);
    let rule = verdict.rule.map(|rule| rule.to_string()).unwrap_or_else(|| "-".into());
    format!("{} {rule}", if verdict.allowed { "allow" } else { "deny" })
}

const TABLE: &str = "
    west db-web    allow west/db        east/web              8080
    west db-ops    allow west/db        west/ops/*
    west team      allow west/team/*    west/*                443,80
    west no-mallory deny west/*         east/mallory
    west gone      allow west/db        east/batch,north/x
    west gone-deny deny  west/db        west/ops/temp,north/x 22
    east stay-home deny  west/db        east/web              9090
    east widen     allow west/db        east/mallory,east/other
    east steal     deny  west/db        west/ops/a
    west all-web   allow west/web       east/*,west/*
";

#[test]
fn verdicts() {
    let set = set(&["west", "east"], TABLE);
    for (src, dst, port, want) in [
        ("east/web", "west/db", 8080, "allow west/db-web"),
        ("east/web", "west/db", 8081, "deny -"),
        // A deny of the caller's own cell narrows.
        ("east/web", "west/db", 9090, "deny east/stay-home"),
        // An allow of a cell that does not own the target does nothing; nor does a deny about callers not its own.
        ("east/other", "west/db", 8080, "deny -"),
        ("west/ops/a", "west/db", 22, "allow west/db-ops"),
        ("west/ops/a/b", "west/db", 1, "allow west/db-ops"),
        ("west/ops", "west/db", 1, "deny -"),
        ("west/opsx", "west/db", 1, "deny -"),
        // Deny wins, also where the deny names an unknown trust domain beside.
        ("west/ops/temp", "west/db", 22, "deny west/gone-deny"),
        ("west/ops/temp", "west/db", 23, "allow west/db-ops"),
        // An allow that names an unknown trust domain matches nothing, not even its known caller.
        ("east/batch", "west/db", 8080, "deny -"),
        ("north/x", "west/db", 8080, "deny -"),
        ("west/any", "west/team/a", 443, "allow west/team"),
        ("west/any", "west/team/a", 444, "deny -"),
        ("west/any", "west/team", 443, "deny -"),
        ("west/any", "west/teamster", 443, "deny -"),
        ("east/mallory", "west/web", 1, "deny west/no-mallory"),
        ("east/malloryx", "west/web", 1, "allow west/all-web"),
        ("westx/any", "west/web", 1, "deny -"),
        // Not symmetric, and nobody may call itself unasked.
        ("west/db", "east/web", 8080, "deny -"),
        ("west/db", "west/db", 8080, "deny -"),
    ] {
        assert_eq!(told(&set, src, dst, port), want, "{src} -> {dst}:{port}");
    }
}

#[test]
fn an_unknown_trust_domain_is_listed_and_matches_once_known() {
    let mut set = set(&["west", "east"], TABLE);
    let names = |set: &PolicySet| {
        let list = set.unresolved(set.known());
        list.iter().map(|u| format!("{} {:?}", u.rule, u.trust_domains)).collect::<Vec<_>>()
    };
    assert_eq!(names(&set), [r#"west/gone {TrustDomain("north")}"#, r#"west/gone-deny {TrustDomain("north")}"#]);
    set.set_known(domains(&["west", "east", "north"]));
    assert_eq!(names(&set), [] as [&str; 0]);
    assert_eq!(told(&set, "east/batch", "west/db", 8080), "allow west/gone");
    // A peer lost again closes what its arrival opened, and opens nothing.
    set.set_known(domains(&["west"]));
    assert_eq!(told(&set, "east/batch", "west/db", 8080), "deny -");
    assert_eq!(told(&set, "east/mallory", "west/web", 1), "deny west/no-mallory");
}

#[test]
fn explanations_name_the_nearest_rule() {
    let set = set(&["west", "east"], TABLE);
    for (src, dst, port, want) in [
        ("east/web", "west/db", 8080, "-"),
        ("east/web", "west/db", 8081, "west/db-web: it is for ports 8080"),
        ("east/mallory", "west/web", 1, "west/all-web: a deny policy wins over it"),
        ("east/batch", "west/db", 1, "west/gone: it names trust domains that are not known: north"),
        ("east/other", "west/db", 8080, "west/db-ops: it is for callers spiffe://west/ops/*"),
        ("west/a", "west/nobody", 1, "-"),
    ] {
        let explained = set.explain(&id(src), &id(dst), port, NOW);
        assert_eq!(explained.verdict, set.evaluate(&id(src), &id(dst), port, NOW));
        let nearest = explained.nearest.map(|near| near.to_string()).unwrap_or_else(|| "-".into());
        assert_eq!(nearest, want, "{src} -> {dst}:{port}");
    }
}

#[test]
fn port_sets() {
    let list = |ports: &[u16]| PortSet::List(ports.iter().copied().collect());
    let set = set(&["west", "east"], TABLE);
    for (src, dst, want) in [
        ("east/web", "west/db", list(&[8080])),
        ("west/ops/a", "west/db", PortSet::All),
        ("west/ops/temp", "west/db", PortSet::AllBut([22].into())),
        ("west/any", "west/team/a", list(&[80, 443])),
        ("east/mallory", "west/web", list(&[])),
        ("east/other", "west/db", list(&[])),
    ] {
        assert_eq!(set.ports(&id(src), &id(dst), NOW), want, "{src} -> {dst}");
    }
}

#[test]
fn a_slice_holds_what_concerns_the_node_and_no_more() {
    let set = set(&["west", "east"], TABLE);
    let names = |local: &[&str]| {
        let slice = set.slice(&local.iter().map(|l| id(l)).collect(), NOW);
        slice.iter().map(|(origin, p)| format!("{origin}/{}", p.name)).collect::<Vec<_>>()
    };
    assert_eq!(names(&[]), [] as [&str; 0]);
    assert_eq!(names(&["east/elsewhere"]), ["west/all-web"]);
    assert_eq!(names(&["east/web"]), ["east/stay-home", "west/all-web", "west/db-web"]);
}

/// Each line: `origin name action target from ports end`, sets as a cell tells them, ports `-` for all, the end in milliseconds
/// or `-`.
fn ending(lines: &str) -> PolicySet {
    let mut set = PolicySet::new(domains(&["west", "east"]));
    for line in lines.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let words: Vec<_> = line.split_whitespace().collect();
        let [origin, name, action, target, from, ports, end] = words.as_slice().try_into().unwrap();
        let peers = |text: &str| {
            let uri = if text.starts_with("ids:") { text.replace('+', " ") } else { format!("spiffe://{text}") };
            Peers::from_wire(&uri).unwrap()
        };
        let action = match action {
            "allow" => Action::Allow,
            "deny" => Action::Deny,
            "audit" => Action::Audit,
            other => panic!("{other}"),
        };
        let ports = if ports == "-" { vec![] } else { ports.split(',').map(|p| p.parse().unwrap()).collect() };
        let expires_at = if end == "-" { Stamp(u64::MAX) } else { Stamp(end.parse().unwrap()) };
        let extras = ambit_model::PolicyExtras { expires_at, ..Default::default() };
        let (name, target, from) = (name.parse().unwrap(), peers(target), vec![peers(from)]);
        set.insert(origin.parse().unwrap(), Policy { name, target, action, from, ports, extras });
    }
    set
}

#[test]
fn audits_ends_and_what_a_cell_resolved() {
    let set = ending(
        "
        west a-brief  allow west/db             ids:west+/web+/ops 80 20
        west b-ids    allow ids:west+/db+/cache west/ops           -  -
        west c-held   deny  west/db             ids:west+/ops      22 10
        west d-watch  audit west/db             west/*             80 20
        west e-watch  audit west/*              ids:west+/ops      -  -
        west f-nobody allow west/db             ids:west           -  -
        west g-lies   allow west/db             ids:west+/x        -  -
        east h-theirs audit west/db             west/ops           -  -
        east i-own    audit west/db             east/*             -  -
        ",
    );
    // Who asks, which port, committed time and the latest that it may be, what comes out and what is recorded.
    for (src, dst, port, committed, latest, want) in [
        ("web", "db", 80, 5, 5, "allow west/a-brief west/d-watch"),
        ("web", "db", 81, 5, 5, "deny - -"),
        // An allow is over by the latest that it may be, a deny and an audit by committed time.
        ("web", "db", 80, 5, 19, "allow west/a-brief west/d-watch"),
        ("web", "db", 80, 5, 20, "deny - -"),
        ("ops", "db", 80, 5, 5, "allow west/a-brief west/d-watch"),
        ("ops", "db", 80, 5, 20, "allow west/b-ids west/d-watch"),
        ("ops", "db", 80, 20, 20, "allow west/b-ids west/e-watch"),
        ("ops", "db", 22, 9, 99, "deny west/c-held -"),
        ("ops", "db", 22, 10, 10, "allow west/b-ids west/e-watch"),
        // A target that was resolved is those, and nobody else.
        ("ops", "cache", 1, 5, 5, "allow west/b-ids west/e-watch"),
        ("ops", "other", 1, 5, 5, "deny - -"),
        // What is denied is recorded by nobody, and an audit of whom it does not concern says nothing.
        ("web", "cache", 80, 5, 5, "deny - -"),
        ("x", "db", 1, 5, 5, "allow west/g-lies -"),
    ] {
        let now = Moment { committed: Stamp(committed), latest: Stamp(latest) };
        let (src, dst) = (id(&format!("west/{src}")), id(&format!("west/{dst}")));
        let told = |verdict: ambit_policy::Verdict| {
            let rule = |rule: Option<ambit_policy::RuleRef>| rule.map_or("-".into(), |rule| rule.to_string());
            let word = if verdict.allowed { "allow" } else { "deny" };
            format!("{word} {} {}", rule(verdict.rule), rule(verdict.audited))
        };
        assert_eq!(told(set.evaluate(&src, &dst, port, now)), want, "{src} -> {dst}:{port} at {committed}/{latest}");
        assert_eq!(told(set.compile().evaluate(&src, &dst, port, now)), want, "compiled: {src} -> {dst}:{port}");
        let slice = set.slice(&[src.clone()].into(), now);
        assert_eq!(told(slice.evaluate(&src, &dst, port, now)), want, "its slice: {src} -> {dst}:{port}");
    }
}

/// A record of a peer could hold any set, whatever documents may say.
#[test]
fn a_peer_speaks_for_no_other_by_a_set_that_lies_or_that_nobody_resolved() {
    let policy = |name: &str, action: Action, target: Peers, from: Peers| Policy {
        name: name.parse().unwrap(),
        target,
        action,
        from: vec![from],
        ports: vec![],
        extras: Default::default(),
    };
    let (east, west): (TrustDomain, TrustDomain) = ("east".parse().unwrap(), "west".parse().unwrap());
    let lying = Peers::Ids(east.clone(), [id("west/db"), id("west/web")].into());
    let unresolved = Peers::Group(east.clone(), "nowhere".parse().unwrap());
    let all = |td: &TrustDomain| Peers::Domain(td.clone());
    for (who, wrote, want) in [
        ("widens", policy("a", Action::Allow, lying.clone(), all(&west)), "deny -"),
        ("denies others", policy("b", Action::Deny, all(&west), lying), "allow west/open"),
        ("denies everybody", policy("c", Action::Deny, all(&west), unresolved), "allow west/open"),
    ] {
        let mut set = PolicySet::new(domains(&["west", "east"]));
        if want != "deny -" {
            set.insert(west.clone(), policy("open", Action::Allow, all(&west), all(&west)));
        }
        set.insert(east.clone(), wrote);
        assert_eq!(told(&set, "west/web", "west/db", 1), want, "{who}");
        let (web, db) = (id("west/web"), id("west/db"));
        assert_eq!(set.compile().evaluate(&web, &db, 1, NOW), set.evaluate(&web, &db, 1, NOW), "{who}");
    }
}

const IDS: &[&str] = &["west/a", "west/b", "west/t/a", "west/t/b", "east/a", "east/t/a", "north/a"];
const SETS: &[&str] = &["west/a", "west/b", "west/t/*", "west/*", "east/a", "east/t/*", "east/*", "north/a", "north/*"];
const PORTS: &[&str] = &["", "80", "443", "80,443", "22"];

fn drawn(draw: &mut Draw) -> PolicySet {
    let mut lines = String::new();
    for n in 0..draw.next() % 12 {
        let from: Vec<_> = (0..=draw.next() % 3).map(|_| *draw.of(SETS)).collect();
        let origin = *draw.of(&["west", "east", "north"]);
        let (action, target, ports) = (*draw.of(&["allow", "deny", "allow"]), *draw.of(SETS), *draw.of(PORTS));
        lines.push_str(&format!("{origin} p{n} {action} {target} {} {ports}\n", from.join(",")));
    }
    let known = *draw.of(&[&["west"][..], &["west", "east"], &["west", "east", "north"]]);
    set(known, &lines)
}

#[test]
fn slices_and_port_sets_agree_with_the_whole_set() {
    let (mut allowed, mut denied) = (0, 0);
    for seed in 1..=300 {
        let mut draw = Draw(seed);
        let whole = drawn(&mut draw);
        let local: BTreeSet<_> = (0..=draw.next() % 2).map(|_| id(draw.of::<&str>(IDS))).collect();
        let slice = whole.slice(&local, NOW);
        for src in IDS.iter().map(|s| id(s)) {
            for dst in IDS.iter().map(|s| id(s)) {
                let ports = whole.ports(&src, &dst, NOW);
                for port in [22, 80, 443, 1] {
                    let verdict = whole.evaluate(&src, &dst, port, NOW);
                    *(if verdict.allowed { &mut allowed } else { &mut denied }) += 1;
                    assert_eq!(ports.contains(port), verdict.allowed, "seed {seed}: {src} -> {dst}:{port} {ports:?}");
                    if local.contains(&src) || local.contains(&dst) {
                        assert_eq!(
                            slice.evaluate(&src, &dst, port, NOW),
                            verdict,
                            "seed {seed}: {src} -> {dst}:{port}"
                        );
                    }
                }
            }
        }
    }
    // A generator that never allows, or never denies, would prove nothing.
    assert!(allowed > 500 && denied > 500, "{allowed} allowed, {denied} denied");
}
