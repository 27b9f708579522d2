//! Generated policy sets and connections: the evaluator, its compiled form, slices and normal forms against a second
//! evaluator that is written from the words of the design, and against each other.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test says that it failed by panicking")]

mod draw;

use ambit_model::policy::{Action, Peers, Policy, PolicyExtras, Protocol};
use ambit_model::{Moment, SpiffeId, Stamp, TrustDomain};
use ambit_policy::{PolicySet, check_owner, normalised};
use draw::Draw;
use std::collections::BTreeSet;

const DOMAINS: &[&str] = &["west", "east", "north"];
const PATHS: &[&str] = &["/a", "/b", "/t/a", "/t/b", "/t/u/a", "/tt"];
const PORTS: &[u16] = &[22, 80, 443, 8080];
/// Before, at and after the ends that are drawn.
const TIMES: &[u64] = &[5, 10, 15, 20, 25];

fn identities() -> Vec<SpiffeId> {
    DOMAINS
        .iter()
        .flat_map(|td| PATHS.iter().map(move |path| format!("spiffe://{td}{path}").parse().unwrap()))
        .collect()
}

fn sets() -> Vec<Peers> {
    let of = |td: &str| {
        let texts = ["/a", "/b", "/t/a", "/t/*", "/t/u/*", "/*", "/*", "/*"].map(|path| format!("spiffe://{td}{path}"));
        let mut sets: Vec<Peers> = texts.iter().map(|text| text.parse().unwrap()).collect();
        sets.push(Peers::from_wire(&format!("ids:{td} /a /t/b")).unwrap());
        sets.push(Peers::from_wire(&format!("ids:{td}")).unwrap());
        sets
    };
    // One that nobody resolved.
    DOMAINS.iter().flat_map(|td| of(td)).chain(["cluster:west/prod".parse().unwrap()]).collect()
}

fn policy(draw: &mut Draw, number: u64, sets: &[Peers]) -> (TrustDomain, Policy) {
    let action = *draw.of(&[Action::Allow, Action::Allow, Action::Allow, Action::Allow, Action::Deny, Action::Audit]);
    let ports = if draw.next().is_multiple_of(3) { Vec::new() } else { draw.some(PORTS, 2) };
    let ends = if draw.next().is_multiple_of(3) { *draw.of(&[10, 20]) } else { u64::MAX };
    let protocols = draw.of(&[vec![Protocol::Tcp], vec![Protocol::Udp], vec![Protocol::Tcp, Protocol::Udp]]).clone();
    let protocols = if draw.next().is_multiple_of(8) { protocols } else { vec![Protocol::Tcp] };
    let extras = PolicyExtras { expires_at: Stamp(ends), protocols: protocols.into_iter().collect(), unmeshed: vec![] };
    let (target, from) = (draw.of(sets).clone(), draw.some(sets, 3));
    // Most are written by who may.
    let origin = if draw.next().is_multiple_of(5) { draw.of(DOMAINS).parse().unwrap() } else { target.trust_domain() };
    (origin, Policy { name: format!("p{number}").parse().unwrap(), target, action, from, ports, extras })
}

struct World {
    policies: Vec<(TrustDomain, Policy)>,
    known: BTreeSet<TrustDomain>,
    set: PolicySet,
}

fn world(draw: &mut Draw, sets: &[Peers]) -> World {
    let known: BTreeSet<TrustDomain> = draw
        .of(&[vec!["west", "east"], DOMAINS.to_vec(), DOMAINS.to_vec()])
        .iter()
        .map(|td| td.parse().unwrap())
        .collect();
    let count = draw.next() % 24;
    let policies: Vec<_> = (0..count).map(|n| policy(draw, n, sets)).collect();
    let mut set = PolicySet::new(known.clone());
    for (origin, policy) in &policies {
        set.insert(origin.clone(), policy.clone());
    }
    World { policies, known, set }
}

/// Written from the words of issue E and of the language's page, without the crate's own parts: deny wins, then allow, else
/// deny; a peer may narrow, never widen; an allow that names a trust domain nobody vouches for, or that is over by the
/// latest time, allows nothing; a deny or audit holds until committed time is past its end; sets nobody resolved close.
fn words(world: &World, src: &SpiffeId, dst: &SpiffeId, port: u16, now: Moment) -> (bool, bool) {
    let (mut allowed, mut denied, mut audited) = (false, false, false);
    for (origin, policy) in &world.policies {
        let allow = policy.action == Action::Allow;
        let says = |set: &Peers, id: &SpiffeId| {
            let text = set.to_string();
            let uri = id.as_str();
            if let Some(rest) = text.strip_prefix("ids:") {
                let mut words = rest.split(' ');
                let td = words.next().unwrap();
                words.any(|path| format!("spiffe://{td}{path}") == uri)
            } else if let Some(rest) = text.strip_prefix("cluster:") {
                !allow && uri.starts_with(&format!("spiffe://{}/", rest.split('/').next().unwrap()))
            } else if let Some(prefix) = text.strip_suffix('*') {
                uri.starts_with(prefix)
            } else {
                text == uri
            }
        };
        let may_write = may_write(origin, policy);
        let vouched = policy.from.iter().chain([&policy.target]).all(|set| world.known.contains(&set.trust_domain()));
        let time = if allow { now.latest } else { now.committed };
        let matches = may_write
            && (!allow || vouched)
            && time < policy.extras.expires_at
            && policy.extras.protocols.contains(&Protocol::Tcp)
            && says(&policy.target, dst)
            && policy.from.iter().any(|set| says(set, src))
            && (policy.ports.is_empty() || policy.ports.contains(&port));
        match policy.action {
            Action::Allow => allowed |= matches,
            Action::Deny => denied |= matches,
            Action::Audit => audited |= matches,
        }
    }
    let pass = allowed && !denied;
    (pass, pass && audited)
}

/// Issue E's words for who may write a policy: the cell of its target, and one that narrows also the cell of all its callers.
/// Read off the texts, not by the crate's own parts.
fn may_write(origin: &TrustDomain, policy: &Policy) -> bool {
    let mine = |set: &Peers| {
        let text = set.to_string();
        let rest = text.strip_prefix("spiffe://").or_else(|| text.split_once(':').map(|(_, rest)| rest)).unwrap();
        rest.split(['/', ' ']).next() == Some(origin.as_str())
    };
    mine(&policy.target) || (policy.action != Action::Allow && policy.from.iter().all(mine))
}

/// 100,000 generated pairs of a policy set and a connection.
#[test]
fn evaluate_says_what_the_words_say_and_the_index_what_evaluate_says() {
    let (ids, sets) = (identities(), sets());
    let (mut pairs, mut allowed, mut audited, mut by_time) = (0, 0, 0, 0);
    for seed in 1.. {
        if pairs >= 100_000 {
            break;
        }
        let mut draw = Draw(seed);
        let world = world(&mut draw, &sets);
        let index = world.set.compile();
        for _ in 0..50 {
            let (src, dst, port) = (draw.of(&ids), draw.of(&ids), *draw.of(PORTS));
            let committed = *draw.of(TIMES);
            let now = Moment { committed: Stamp(committed), latest: Stamp(committed.max(*draw.of(TIMES))) };
            let verdict = world.set.evaluate(src, dst, port, now);
            let said = (verdict.allowed, verdict.audited.is_some());
            assert_eq!(said, words(&world, src, dst, port, now), "seed {seed}: {src} -> {dst}:{port} {now:?}");
            assert_eq!(index.evaluate(src, dst, port, now), verdict, "seed {seed}: {src} -> {dst}:{port} {now:?}");
            let ports = index.ports(src, dst, now);
            assert_eq!(ports, world.set.ports(src, dst, now), "seed {seed}: {src} -> {dst} {now:?}");
            assert_eq!(ports.contains(port), verdict.allowed, "seed {seed}: {src} -> {dst}:{port} {now:?}");
            let later = Moment { committed: Stamp(30), latest: Stamp(30) };
            if index.ports(src, dst, later) != ports {
                by_time += 1;
                assert!(index.changes_between(now, later), "seed {seed}: {src} -> {dst} {now:?}");
            }
            pairs += 1;
            allowed += u32::from(verdict.allowed);
            audited += u32::from(verdict.audited.is_some());
        }
    }
    println!("{pairs} pairs, {allowed} allowed, {audited} audited, {by_time} that time changes, 0 differences");
    // A generator that never allows, audits or ends anything would prove nothing.
    assert!(allowed > 5_000 && audited > 200 && by_time > 500, "{allowed} {audited} {by_time}");
}

#[test]
fn slices_and_normal_forms_keep_verdicts() {
    let (ids, sets) = (identities(), sets());
    let mut allowed = 0;
    for seed in 1..=400 {
        let mut draw = Draw(seed);
        let world = world(&mut draw, &sets);
        let committed = *draw.of(TIMES);
        let now = Moment { committed: Stamp(committed), latest: Stamp(committed.max(*draw.of(TIMES))) };
        let local: BTreeSet<SpiffeId> = draw.some(&ids, 2).into_iter().collect();
        let slice = world.set.slice(&local, now);
        let mut normal = PolicySet::new(world.known.clone());
        for (origin, policy) in &world.policies {
            let short = normalised(policy.clone());
            assert_eq!(normalised(short.clone()), short, "seed {seed}");
            normal.insert(origin.clone(), short);
        }
        for src in &ids {
            for dst in &ids {
                let port = *draw.of(PORTS);
                let verdict = world.set.evaluate(src, dst, port, now);
                assert_eq!(normal.evaluate(src, dst, port, now), verdict, "seed {seed}: {src} -> {dst}:{port}");
                if local.contains(src) || local.contains(dst) {
                    allowed += u32::from(verdict.allowed);
                    assert_eq!(slice.evaluate(src, dst, port, now), verdict, "seed {seed}: {src} -> {dst}:{port}");
                }
            }
        }
    }
    assert!(allowed > 200, "{allowed}");
}

/// Who may not write a policy decides nothing by it, whatever slipped past the check of documents.
#[test]
fn the_owner_of_a_document_is_the_owner_of_its_verdict() {
    let (ids, sets) = (identities(), sets());
    let (mut refused, mut decided) = (0, 0);
    for seed in 1..=20_000 {
        let mut draw = Draw(seed);
        let (origin, policy) = policy(&mut draw, 0, &sets);
        let mut set = PolicySet::new(DOMAINS.iter().map(|td| td.parse().unwrap()).collect());
        set.insert(origin.clone(), policy.clone());
        let may = may_write(&origin, &policy);
        let (src, dst) = (draw.of(&ids), draw.of(&ids));
        let verdict = set.evaluate(src, dst, *draw.of(PORTS), Moment::at(Stamp(1)));
        assert!(may || verdict.rule.is_none(), "seed {seed}: {origin} decides by {policy:?}");
        assert_eq!(check_owner(&ambit_policy::Document::Policy(policy), &origin).is_ok(), may, "seed {seed}");
        (refused, decided) = (refused + u32::from(!may), decided + u32::from(verdict.rule.is_some()));
    }
    // Where nobody is refused, or nothing decides, nothing is proved.
    assert!(refused > 1_000 && decided > 200, "{refused} {decided}");
}
