//! I18: what the kernel answers to `connect()` is what `evaluate` says, for generated policy sets and connections.
//!
//! Nothing stands in for anything: slices are parsed and compiled by the agent's own code, installed into the real maps, and
//! each connection is a real `connect()` by a process in a mesh cgroup. No agent listens, so that one that the kernel
//! allows ends as ECONNREFUSED at the empty capture slot, and one that it denies as EPERM.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

#[allow(dead_code, reason = "the kernel crate's own tests use the rest")]
#[path = "../../ebpf/tests/kernel/support.rs"]
mod node;

#[path = "support/callers.rs"]
mod dialling;

use ambit_agent::compile;
use ambit_agent::view::View;
use ambit_ebpf::Kernel;
use ambit_model::{Moment, SpiffeId, Stamp};
use ambit_proto::v1;
use dialling::{Caller, Numbers, callers, uri};
use node::Node;
use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv6Addr};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

const SETS: usize = 100;
/// Of each set and each caller.
const CONNECTIONS: usize = 250;
const CALLERS: [&str; 4] = ["west/web", "west/team/a", "west/team/b/c", "west/lone"];
/// Who is called: with the last number of its address and the node that runs it. `north` is a peer that nobody knows.
const CALLED: [(&str, u8, u8); 10] = [
    ("west/db", 1, 1),
    ("west/team/a", 2, 1),
    ("west/team/b/c", 3, 2),
    ("west/web", 4, 2),
    ("east/db", 5, 3),
    ("east/team/a", 6, 3),
    ("east/team/z", 7, 4),
    ("east/web", 8, 4),
    ("north/db", 9, 5),
    ("west/unnumbered", 10, 1),
];
/// Nobody is at this one.
const EMPTY: u8 = 99;
const DENIED_NODE: u8 = 4;
const PORTS: [u16; 7] = [1, 22, 80, 443, 8080, 50_051, 65_535];
const PATTERNS: [&str; 12] = [
    "west/*",
    "east/*",
    "north/*",
    "west/team/*",
    "east/team/*",
    "west/db",
    "east/db",
    "west/web",
    "east/web",
    "west/team/a",
    "west/team/b/*",
    "west/lone",
];

fn policy(numbers: &mut Numbers, name: usize) -> v1::Policy {
    let target = numbers.of(&PATTERNS);
    // Most are written by who may: the target's own cell allows, the target's or a caller's denies.
    let own = target.split('/').next().unwrap_or_default();
    let origin = if numbers.below(6) == 0 { numbers.of(&["west", "east"]) } else { own };
    let count = 1 + numbers.below(4);
    let from: BTreeSet<String> = (0..count).map(|_| uri(numbers.of(&PATTERNS))).collect();
    // None is every port.
    let listed = numbers.below(2) * (1 + numbers.below(4));
    let ports: BTreeSet<u32> = (0..listed).map(|_| u32::from(numbers.of(&PORTS))).collect();
    let action = if numbers.below(6) == 0 { v1::Action::Deny } else { v1::Action::Allow };
    v1::Policy {
        origin: origin.into(),
        name: format!("p{name}"),
        target: uri(target),
        action: action as i32,
        from: from.into_iter().collect(),
        ports: ports.into_iter().collect(),
        resolved: true,
        ..Default::default()
    }
}

fn slice(numbers: &mut Numbers) -> v1::Slice {
    let bundle = |td: &str| v1::Bundle { trust_domain: td.into(), sequence: 1, ..v1::Bundle::default() };
    let policies = 4 + numbers.below(24);
    // Nobody is called by the same number twice: what an earlier set said of it must not linger.
    let first = 256 + u32::try_from(numbers.below(1 << 20)).unwrap();
    let named: BTreeSet<&str> = CALLERS.into_iter().chain(CALLED.map(|c| c.0)).collect();
    let named = named.into_iter().filter(|id| *id != "west/unnumbered");
    v1::Slice {
        revision: 1,
        trust_domain: "west".into(),
        cluster: "west".into(),
        bundles: vec![bundle("west"), bundle("east")],
        entries: CALLERS.iter().enumerate().map(|(n, id)| entry(n, id)).collect(),
        policies: (0..policies).map(|name| policy(numbers, name)).collect(),
        endpoints: CALLED.iter().flat_map(|(id, last, node)| both(*last).map(|at| endpoint(id, at, *node))).collect(),
        identities: named.zip(first..).map(|(id, number)| v1::NumericIdentity { spiffe_id: uri(id), number }).collect(),
        denials: vec![v1::NodeDenial {
            trust_domain: "east".into(),
            node: hex::encode([DENIED_NODE; 32]),
            generation: 1,
        }],
        ..Default::default()
    }
}

fn entry(n: usize, id: &str) -> v1::Entry {
    v1::Entry {
        id: format!("caller{n}"),
        spiffe_id: uri(id),
        cluster: "west".into(),
        selectors: vec![format!("cgroup:caller{n}")],
        ..Default::default()
    }
}

fn endpoint(id: &str, address: IpAddr, node: u8) -> v1::Endpoint {
    v1::Endpoint {
        spiffe_id: uri(id),
        address: address.to_string(),
        cluster: id.split('/').next().unwrap_or_default().into(),
        node_address: format!("10.70.0.{node}"),
        node: hex::encode([node; 32]),
        generation: 1,
    }
}

/// No policy of these ends.
const NOW: Moment = Moment { committed: Stamp(1), latest: Stamp(1) };

/// A workload has an address of each family.
fn both(last: u8) -> [IpAddr; 2] {
    [[10, 70, 101, last].into(), Ipv6Addr::new(0xfd70, 0, 0, 0, 0, 0, 0, last.into()).into()]
}

/// The oracle: `evaluate`, and what the agent must know of the callee to let anybody reach it.
fn expected(view: &View, source: &SpiffeId, to: IpAddr, port: u16) -> bool {
    let Some(endpoint) = view.endpoints.get(&to) else { return false };
    view.numbers.contains_key(&endpoint.spiffe_id)
        && !view.denials.denies_endpoint(endpoint)
        && view.policies.evaluate(source, &endpoint.spiffe_id, port, NOW).allowed
}

#[derive(Default)]
struct Tally {
    pairs: usize,
    allowed: usize,
    different: Vec<String>,
}

/// One policy set: every caller dials, and each answer is compared.
fn round(set: usize, kernel: &Kernel, callers: &mut [Caller], tally: &mut Tally) {
    let mut numbers = Numbers(set as u64);
    let domain = "west".parse().unwrap();
    let view = View::parse(slice(&mut numbers), &domain, &"west".parse().unwrap()).unwrap();
    let workloads = view.workloads(callers.iter().map(|c| &c.pod));
    assert_eq!(workloads.len(), CALLERS.len());
    let tables = compile::tables(&view, &view.denials, workloads.values(), &compile::Unhealthy::new(), NOW);
    kernel.install(&tables).unwrap();
    workloads.values().for_each(|w| kernel.set_workload(w.pod.cgroup_id, w.number.0).unwrap());

    let hosts: Vec<IpAddr> = CALLED.iter().map(|called| called.1).chain([EMPTY]).flat_map(both).collect();
    let asked: Vec<Vec<(IpAddr, u16)>> = callers
        .iter_mut()
        .map(|caller| {
            let asked: Vec<_> = (0..CONNECTIONS).map(|_| (numbers.of(&hosts), numbers.of(&PORTS))).collect();
            caller.ask(&asked);
            asked
        })
        .collect();
    for (caller, asked) in callers.iter_mut().zip(&asked) {
        let answers = caller.answers(asked.len());
        for ((to, port), answer) in asked.iter().zip(answers) {
            let allowed = expected(&view, &caller.id, *to, *port);
            tally.pairs += 1;
            tally.allowed += usize::from(allowed);
            if answer != if allowed { "A" } else { "D" } {
                let who = view.endpoints.get(to).map(|e| e.spiffe_id.to_string());
                tally.different.push(format!("set {set}: {} -> {who:?} port {port}: kernel {answer}", caller.id));
            }
        }
    }
}

#[test]
fn the_kernel_says_what_evaluate_says() {
    let node = Node::new();
    let kernel = Kernel::open(&node.options()).unwrap();
    kernel.renew_lease(Duration::from_secs(3600)).unwrap();
    let listener = node.attach(&kernel);
    node::run(&format!("nsenter --net=/proc/{}/ns/net ip addr add fd99::1/64 dev eth0 nodad", node.pod.id()));
    kernel.set_ipv6(node.pod_netns().as_fd(), listener.as_fd(), Some("fd99::1".parse().unwrap())).unwrap();
    drop(listener);
    let mut callers = callers(&node, &CALLERS);
    let (start, mut tally) = (Instant::now(), Tally::default());
    (0..SETS).for_each(|set| round(set, &kernel, &mut callers, &mut tally));
    drop(callers);
    let (pairs, allowed, differences) = (tally.pairs, tally.allowed, tally.different.len());
    println!(
        "{pairs} pairs of (policy set, connection), {SETS} sets: {allowed} allowed, {} denied; {differences} differences; {:.1} s",
        pairs - allowed,
        start.elapsed().as_secs_f64()
    );
    assert!(tally.different.is_empty(), "{:#?}", tally.different.iter().take(20).collect::<Vec<_>>());
    assert_eq!(pairs, 100_000);
    assert!(allowed * 8 > pairs && allowed * 8 < pairs * 7, "too one-sided to tell: {allowed} allowed");
}
