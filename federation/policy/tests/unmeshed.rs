//! Callers outside of the mesh: the evaluator and its compiled form against the words of the language's page, and what a change
//! of their policies is told to change.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test says that it failed by panicking")]

mod draw;

use ambit_model::policy::{Action, Cidr, Policy, PolicyExtras, Protocol};
use ambit_model::{Moment, SpiffeId, Stamp, TrustDomain};
use ambit_policy::{Document, PolicySet, PortSet, check_owner, parse, unmeshed_flips};
use draw::Draw;
use std::net::{IpAddr, Ipv4Addr};

const TARGETS: &[&str] =
    &["spiffe://west/a", "spiffe://west/t/*", "spiffe://west/*", "spiffe://east/a", "cluster:west/c"];
const IDS: &[&str] = &["spiffe://west/a", "spiffe://west/t/b", "spiffe://east/a"];
const RANGES: &[&str] = &[
    "0.0.0.0/0",
    "10.0.0.0/8",
    "10.1.0.0/16",
    "10.1.2.0/24",
    "10.1.2.3/32",
    "192.0.2.0/24",
    "169.0.0.0/8",
    "2001:db8::/32",
];
const ADDRESSES: &[&str] =
    &["10.1.2.3", "10.1.2.4", "10.1.3.1", "10.2.0.1", "192.0.2.9", "169.254.1.1", "169.1.1.1", "127.0.0.1", "8.8.8.8"];
const PORTS: &[u16] = &[22, 80, 443];

fn policy(draw: &mut Draw, number: u64) -> (TrustDomain, Policy) {
    let action = *draw.of(&[Action::Allow, Action::Allow, Action::Allow, Action::Deny, Action::Audit]);
    let ports = if draw.next().is_multiple_of(3) { Vec::new() } else { draw.some(PORTS, 2) };
    let ends = if draw.next().is_multiple_of(3) { *draw.of(&[10, 20]) } else { u64::MAX };
    let unmeshed = draw.some(RANGES, 3).iter().map(|range| range.parse().unwrap()).collect();
    let extras = PolicyExtras { expires_at: Stamp(ends), protocols: [Protocol::Tcp].into(), unmeshed };
    let origin = draw.of(&["west", "west", "east"]).parse().unwrap();
    let (name, target) = (format!("p{number}").parse().unwrap(), draw.of(TARGETS).parse().unwrap());
    (origin, Policy { name, target, action, from: vec![], ports, extras })
}

/// Written from the words: deny wins, then an allow of the target's own cell, else deny; any range that holds the address counts,
/// however long; what is of a node or its link is open to nobody; an allow ends by the latest time, a deny by committed time.
fn words(policies: &[(TrustDomain, Policy)], from: Ipv4Addr, dst: &str, port: u16, now: Moment) -> (bool, bool) {
    let special = from.is_loopback() || from.is_link_local() || from.is_multicast() || from.octets()[0] == 0;
    let (mut allowed, mut denied, mut audited) = (false, false, false);
    for (origin, policy) in policies {
        let allow = policy.action == Action::Allow;
        let target = policy.target.to_string();
        let own = target.contains(&format!("//{origin}/")) || target.contains(&format!(":{origin}/"));
        let is_target = match target.strip_suffix('*') {
            Some(prefix) => dst.starts_with(prefix),
            None if target.starts_with("cluster:") => !allow && dst.starts_with("spiffe://west/"),
            None => target == dst,
        };
        let holds = |range: &Cidr| {
            let text = range.to_string();
            let (first, bits) = text.split_once('/').unwrap();
            let Ok(first) = first.parse::<Ipv4Addr>() else { return false };
            let size = 1_u64 << (32 - bits.parse::<u32>().unwrap());
            let first = u64::from(first.to_bits());
            (first..first + size).contains(&u64::from(from.to_bits()))
        };
        let time = if allow { now.latest } else { now.committed };
        let matches = own
            && is_target
            && time < policy.extras.expires_at
            && policy.extras.unmeshed.iter().any(holds)
            && (policy.ports.is_empty() || policy.ports.contains(&port));
        match policy.action {
            Action::Allow => allowed |= matches,
            Action::Deny => denied |= matches,
            Action::Audit => audited |= matches,
        }
    }
    let pass = allowed && !denied && !special;
    (pass, pass && audited)
}

#[test]
fn evaluate_says_what_the_words_say_and_the_index_what_evaluate_says() {
    let (mut pairs, mut allowed, mut audited, mut by_time) = (0, 0, 0, 0);
    for seed in 1.. {
        if pairs >= 100_000 {
            break;
        }
        let mut draw = Draw(seed);
        let count = draw.next() % 12;
        let policies: Vec<_> = (0..count).map(|n| policy(&mut draw, n)).collect();
        let mut set = PolicySet::new(["west", "east"].map(|td| td.parse().unwrap()).into());
        for (origin, policy) in &policies {
            set.insert(origin.clone(), policy.clone());
        }
        let index = set.compile();
        for _ in 0..50 {
            let (from, to, port): (Ipv4Addr, _, _) =
                (draw.of(ADDRESSES).parse().unwrap(), *draw.of(IDS), *draw.of(PORTS));
            let dst: SpiffeId = to.parse().unwrap();
            let committed = *draw.of(&[5, 10, 15, 20, 25]);
            let now = Moment { committed: Stamp(committed), latest: Stamp(committed + *draw.of(&[0, 0, 5])) };
            let verdict = set.evaluate_unmeshed(IpAddr::V4(from), &dst, port, now);
            let said = (verdict.allowed, verdict.audited.is_some());
            let what = format!("seed {seed}: {from} -> {dst}:{port} {now:?}");
            assert_eq!(said, words(&policies, from, to, port, now), "{what}");
            assert_eq!(index.evaluate_unmeshed(from, &dst, port, now), verdict, "{what}");
            let mapped = IpAddr::V6(from.to_ipv6_mapped());
            assert_eq!(set.evaluate_unmeshed(mapped, &dst, port, now), verdict, "{what}");
            // Nobody comes by address who is somebody, and the other way round.
            assert!(!set.evaluate(&dst, &dst, port, now).allowed && !index.evaluate(&dst, &dst, port, now).allowed);
            let ports = index.ports_unmeshed((from, 32), &dst, now);
            if ambit_model::policy::closed_at(IpAddr::V4(from)).is_none() {
                assert_eq!(ports.contains(port), verdict.allowed, "{what}");
            }
            let later = Moment::at(Stamp(30));
            if index.ports_unmeshed((from, 32), &dst, later) != ports {
                by_time += 1;
                assert!(index.changes_between(now, later), "{what}");
            }
            pairs += 1;
            allowed += u32::from(verdict.allowed);
            audited += u32::from(verdict.audited.is_some());
        }
    }
    println!("{pairs} pairs, {allowed} allowed, {audited} audited, {by_time} that time changes, 0 differences");
    assert!(allowed > 5_000 && audited > 200 && by_time > 500, "{allowed} {audited} {by_time}");
}

fn set(text: &str) -> PolicySet {
    let mut set = PolicySet::new(["west".parse().unwrap()].into());
    for document in parse(text).unwrap() {
        let Document::Policy(policy) = document else { panic!("{document:?}") };
        set.insert("west".parse().unwrap(), policy);
    }
    set
}

#[test]
fn a_change_is_told_by_range_and_target() {
    let known = ["a", "t/b"].map(|id| format!("spiffe://west/{id}").parse().unwrap()).into();
    let of = |spec: &str| format!("---\nkind: Policy\nmetadata: {{name: p{}}}\nspec: {{{spec}}}\n", spec.len());
    let wide =
        of("target: spiffe://west/*, action: allow, from: ['cidr:10.0.0.0/8'], ports: [80], transport: passthrough");
    let deny = of("target: spiffe://west/a, action: deny, from: ['cidr:10.1.0.0/16']");
    let told = |before: &str, after: &str| -> Vec<String> {
        let found = unmeshed_flips(&set(before), &set(after), &known, Moment::at(Stamp(1)));
        let text = |f: &ambit_policy::UnmeshedFlip| {
            format!("{}/{} {} {} {}", f.range.0, f.range.1, f.destination.path(), f.opened, f.closed)
        };
        found.pairs.iter().map(text).collect()
    };
    assert_eq!(told("", &wide), ["10.0.0.0/8 /a 80 none", "10.0.0.0/8 /t/b 80 none"]);
    assert_eq!(told(&wide, &format!("{wide}{deny}")), ["10.1.0.0/16 /a none 80"]);
    assert!(told(&wide, &wide).is_empty());
    // That it ends is a change as well.
    let ends = wide.replace("transport", "expires: 2030-01-01T00:00:00Z, transport");
    assert_eq!(told(&wide, &ends), ["10.0.0.0/8 /a none 80", "10.0.0.0/8 /t/b none 80"]);
}

#[test]
fn what_is_missing_is_said() {
    let all = set("kind: Policy\nmetadata: {name: p}\nspec: {target: spiffe://west/a, action: allow, from: \
                   ['cidr:10.0.0.0/8'], ports: [80], transport: passthrough}\n");
    let near = |from: &str, port| {
        let told = all.explain_unmeshed(
            from.parse().unwrap(),
            &"spiffe://west/a".parse().unwrap(),
            port,
            Moment::at(Stamp(1)),
        );
        told.nearest.map(|near| near.to_string())
    };
    assert_eq!(near("10.1.1.1", 80), None);
    assert_eq!(near("10.1.1.1", 81).as_deref(), Some("west/p: it is for ports 80"));
    assert_eq!(near("11.1.1.1", 80).as_deref(), Some("west/p: it is for addresses in 10.0.0.0/8"));
    // It is of no help to who has an identity.
    let id = "spiffe://west/a".parse().unwrap();
    assert_eq!(all.explain(&id, &id, 80, Moment::at(Stamp(1))).nearest, None);
    assert_eq!(
        all.compile().ports_unmeshed(("11.0.0.0".parse().unwrap(), 8), &id, Moment::at(Stamp(1))),
        PortSet::List([].into())
    );
}

/// A peer says nothing of who may come to our workloads by address, and we nothing of theirs.
#[test]
fn only_the_cell_of_the_target_speaks_of_ranges() {
    for action in ["allow", "deny", "audit"] {
        let clear = if action == "allow" { ", transport: passthrough" } else { "" };
        let text = format!(
            "kind: Policy\nmetadata: {{name: p}}\nspec: {{target: spiffe://west/a, action: {action}, from: \
             ['cidr:10.0.0.0/8']{clear}}}\n"
        );
        let [document] = parse(&text).unwrap().try_into().unwrap();
        for (owner, good) in [("west", true), ("east", false)] {
            assert_eq!(check_owner(&document, &owner.parse().unwrap()).is_ok(), good, "{owner} {action}");
        }
    }
}
