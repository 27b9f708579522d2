//! I18 of what is outside of the mesh: what the kernel answers to `connect()` is what the documents say, for generated documents
//! and connections. As `verdicts.rs`, which says what is real here: an allowed connection ends at the empty capture slot.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

#[allow(dead_code, reason = "the kernel crate's own tests use the rest")]
#[path = "../../ebpf/tests/kernel/support.rs"]
mod node;

#[path = "support/callers.rs"]
mod dialling;

use ambit_agent::compile;
use ambit_agent::view::View;
use ambit_ebpf::Kernel;
use ambit_model::policy::{Protocol, closed_at};
use ambit_model::{Moment, SpiffeId, Stamp};
use ambit_proto::v1;
use dialling::{Caller, Numbers, callers, uri};
use node::Node;
use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

const SETS: usize = 60;
/// Of each set and each caller.
const CONNECTIONS: usize = 150;
const CALLERS: [&str; 4] = ["west/web", "west/team/a", "west/team/b/c", "west/lone"];
const FROM: [&str; 7] =
    ["west/*", "west/team/*", "west/web", "west/team/a", "west/team/b/*", "west/lone", "west/elsewhere"];
const RANGES: [&str; 16] = [
    "0.0.0.0/0",
    "128.0.0.0/1",
    "10.0.0.0/8",
    "10.1.0.0/16",
    "10.1.2.0/23",
    "10.1.2.0/24",
    "10.1.2.3/32",
    "10.1.3.0/24",
    "10.2.0.0/15",
    "10.70.0.0/16",
    "192.0.2.0/24",
    "192.0.2.128/25",
    "169.0.0.0/8",
    "168.0.0.0/5",
    "8.8.8.8/32",
    "192.0.0.0/2",
];
const ADDRESSES: [&str; 23] = [
    "10.1.2.3",
    "10.1.2.4",
    "10.1.3.4",
    "10.1.4.4",
    "10.2.0.1",
    "10.3.255.255",
    "10.4.0.0",
    "11.0.0.1",
    "192.0.2.1",
    "192.0.2.200",
    "192.0.3.1",
    "169.1.1.1",
    "169.254.169.254",
    "8.8.8.8",
    "8.8.8.9",
    "223.255.255.255",
    "224.0.0.1",
    "255.255.255.255",
    "0.0.0.0",
    // A workload's, a service's, one of a workload that nobody here may reach, and this node's own.
    "10.70.101.1",
    "10.1.6.6",
    "10.1.7.7",
    "10.1.8.8",
];
const MESHED: &str = "10.1.7.7";
const OWN: &str = "10.1.8.8";
const PORTS: [u16; 6] = [1, 22, 80, 443, 8080, 65_535];

fn some<T: Copy + Ord>(numbers: &mut Numbers, list: &[T], most: usize) -> BTreeSet<T> {
    let count = 1 + numbers.below(most);
    (0..count).map(|_| numbers.of(list)).collect()
}

fn document(numbers: &mut Numbers, name: usize) -> v1::Egress {
    let ports = if numbers.below(4) == 0 { BTreeSet::new() } else { some(numbers, &PORTS, 3) };
    v1::Egress {
        name: format!("e{name}"),
        from: some(numbers, &FROM, 2).into_iter().map(uri).collect(),
        to: some(numbers, &RANGES, 3).into_iter().map(str::to_owned).collect(),
        ports: ports.into_iter().map(u32::from).collect(),
        protocols: vec!["tcp".into()],
        transport: "passthrough".into(),
        // Some are over, and some end just now.
        expires_at_ms: numbers.of(&[0, 0, 0, 100, 5, 4]),
        ..Default::default()
    }
}

const NOW: Moment = Moment { committed: Stamp(1), latest: Stamp(5) };

fn slice(numbers: &mut Numbers) -> v1::Slice {
    let documents = 1 + numbers.below(8);
    let first = 256 + u32::try_from(numbers.below(1 << 20)).unwrap();
    v1::Slice {
        revision: 1,
        trust_domain: "west".into(),
        cluster: "west".into(),
        bundles: vec![v1::Bundle { trust_domain: "west".into(), sequence: 1, ..v1::Bundle::default() }],
        entries: CALLERS
            .iter()
            .enumerate()
            .map(|(n, id)| v1::Entry {
                id: format!("caller{n}"),
                spiffe_id: uri(id),
                cluster: "west".into(),
                selectors: vec![format!("cgroup:caller{n}")],
                ..Default::default()
            })
            .collect(),
        endpoints: vec![v1::Endpoint {
            spiffe_id: uri("west/web"),
            address: "10.70.101.1".into(),
            cluster: "west".into(),
            node_address: "10.70.0.1".into(),
            node: "ab".repeat(32),
            generation: 1,
        }],
        services: vec![v1::Service {
            origin: "west".into(),
            name: "s".into(),
            address: "10.1.6.6".into(),
            port: 80,
            backends: vec![uri("west/*")],
            order: "local-first".into(),
            weights: vec![],
        }],
        identities: CALLERS
            .iter()
            .zip(first..)
            .map(|(id, number)| v1::NumericIdentity { spiffe_id: uri(id), number })
            .collect(),
        egress: (0..documents).map(|name| document(numbers, name)).collect(),
        meshed: vec![MESHED.into()],
        ..Default::default()
    }
}

/// The oracle: any document that allows it, of an address that neither the mesh nor this node has.
fn expected(view: &View, source: &SpiffeId, to: Ipv4Addr, port: u16) -> bool {
    let known =
        view.endpoints.contains_key(&IpAddr::V4(to)) || [MESHED, OWN, "10.1.6.6"].contains(&to.to_string().as_str());
    !known && view.egress.iter().any(|egress| egress.allows(source, IpAddr::V4(to), Protocol::Tcp, port, NOW))
}

#[derive(Default)]
struct Tally {
    pairs: usize,
    allowed: usize,
    closed: usize,
    different: Vec<String>,
}

fn round(set: usize, kernel: &Kernel, callers: &mut [Caller], tally: &mut Tally) {
    let mut numbers = Numbers(set as u64);
    let view = View::parse(slice(&mut numbers), &"west".parse().unwrap(), &"west".parse().unwrap()).unwrap();
    let workloads = view.workloads(callers.iter().map(|c| &c.pod));
    let own = [OWN.parse().unwrap()].into();
    let tables = compile::all(&view, &view.denials, workloads.values(), &compile::Unhealthy::new(), &own, NOW);
    kernel.install(&tables).unwrap();
    workloads.values().for_each(|w| kernel.set_workload(w.pod.cgroup_id, w.number.0).unwrap());
    let asked: Vec<Vec<(Ipv4Addr, u16)>> = callers
        .iter_mut()
        .map(|caller| {
            let one = |_| (numbers.of(&ADDRESSES).parse().unwrap(), numbers.of(&PORTS));
            let asked: Vec<(Ipv4Addr, u16)> = (0..CONNECTIONS).map(one).collect();
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
            tally.closed += usize::from(closed_at(IpAddr::V4(*to)).is_some());
            // What user space says of it again, of those that the mesh does not know.
            let again = !view.knows(*to) && view.egress.evaluate(&caller.id, *to, *port, NOW).is_some();
            let again = again && to.to_string() != OWN;
            if answer != if allowed { "A" } else { "D" } || again != allowed {
                tally
                    .different
                    .push(format!("set {set}: {} -> {to}:{port}: kernel {answer}, agent {again}", caller.id));
            }
        }
    }
}

#[test]
fn the_kernel_says_what_the_documents_say() {
    let node = Node::new();
    let kernel = Kernel::open(&node.options()).unwrap();
    kernel.renew_lease(Duration::from_secs(3600)).unwrap();
    drop(node.attach(&kernel));
    let mut callers = callers(&node, &CALLERS);
    let (start, mut tally) = (Instant::now(), Tally::default());
    (0..SETS).for_each(|set| round(set, &kernel, &mut callers, &mut tally));
    drop(callers);
    let (pairs, allowed, differences) = (tally.pairs, tally.allowed, tally.different.len());
    println!(
        "{pairs} pairs of (egress documents, connection), {SETS} sets: {allowed} allowed, {} denied; {differences} differences; \
         {:.1} s",
        pairs - allowed,
        start.elapsed().as_secs_f64()
    );
    assert!(tally.different.is_empty(), "{:#?}", tally.different.iter().take(20).collect::<Vec<_>>());
    assert_eq!(pairs, 36_000);
    assert!(allowed * 8 > pairs && allowed * 8 < pairs * 7, "too one-sided to tell: {allowed} allowed");
    assert!(tally.closed > 1_000, "{}", tally.closed);
}
