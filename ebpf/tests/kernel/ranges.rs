//! Addresses outside of the mesh: the longest range that holds one stands for it, and what the mesh knows is in no range.

use crate::support::{Node, accept, at, try_accept};
use ambit_ebpf::{Action, Kernel, KernelError, Range, Reason, Tables, Verdict, VerdictKey, netns_cookie};
use std::net::Ipv4Addr;
use std::time::Duration;

const CLIENT: u32 = 300;
const KNOWN: u32 = 301;
/// No workload has such numbers.
const WIDE: u32 = 1 << 31;
const NARROW: u32 = WIDE + 1;
const CLOSED: u32 = 2;

fn range(first: [u8; 4], bits: u8, number: u32) -> Range {
    Range { first: Ipv4Addr::from(first), bits, number }
}

fn tables() -> Tables {
    let allow = |destination, port| {
        (VerdictKey { source: CLIENT, destination, port }, Verdict { action: Action::Allow, rule: 0 })
    };
    Tables {
        verdicts: vec![allow(WIDE, 80), allow(NARROW, 443), allow(KNOWN, 22)],
        endpoints: vec![(Ipv4Addr::new(10, 1, 0, 9), KNOWN)],
        services: vec![],
        callers: vec![],
        ranges: vec![
            range([10, 0, 0, 0], 8, WIDE),
            range([10, 1, 0, 0], 16, NARROW),
            range([10, 2, 3, 4], 32, CLOSED),
            range([192, 0, 2, 1], 32, WIDE),
        ],
        ..Tables::default()
    }
}

fn node(tables: &Tables) -> (Node, Kernel) {
    let node = Node::new();
    let kernel = Kernel::open(&node.options()).unwrap();
    kernel.install(tables).unwrap();
    kernel.set_workload(node.cgroup("client"), CLIENT).unwrap();
    kernel.set_workload(node.cgroup("other"), CLIENT + 9).unwrap();
    kernel.renew_lease(Duration::from_secs(600)).unwrap();
    (node, kernel)
}

#[test]
fn the_longest_range_decides_by_port_and_an_endpoint_wins_over_all() {
    let (node, kernel) = node(&tables());
    let listener = node.attach(&kernel);
    for (host, port, number) in [
        // The wide one.
        ("10.0.0.1", 80, Some(WIDE)),
        ("10.0.0.1", 443, None),
        ("10.255.255.255", 80, Some(WIDE)),
        ("::ffff:10.0.0.1", 80, Some(WIDE)),
        // The narrow one in it, which does not say of port 80.
        ("10.1.2.3", 443, Some(NARROW)),
        ("10.1.2.3", 80, None),
        // A workload there: neither range speaks of it.
        ("10.1.0.9", 443, None),
        ("10.1.0.9", 80, None),
        ("10.1.0.9", 22, Some(KNOWN)),
        // One address of a range, closed.
        ("10.2.3.4", 80, None),
        ("10.2.3.5", 80, Some(WIDE)),
        // A range of one address, and none.
        ("192.0.2.1", 80, Some(WIDE)),
        ("192.0.2.2", 80, None),
        ("11.0.0.1", 80, None),
    ] {
        let seen = node.python("client", &format!("print(tcp('{host}', {port}))"));
        let Some(number) = number else {
            assert_eq!(seen, "EPERM", "{host} {port}");
            continue;
        };
        assert_eq!(seen, format!("ok {host}:{port}"), "getpeername shows what was asked for");
        let (stream, client, capture) = accept(&listener);
        assert_eq!((capture.ip().octets()[0], capture.port()), (127, ambit_ebpf::CAPTURE_PORT));
        let found = kernel.original_destination(netns_cookie(&stream).unwrap(), client, capture).expect("a record");
        let asked = format!("{}:{port}", host.trim_start_matches("::ffff:")).parse().unwrap();
        assert_eq!((found.asked, found.endpoint, found.identity), (asked, asked, number), "{host} {port}");
    }
    assert_eq!(node.connect("other", at([10, 0, 0, 1], 80)), "EPERM", "no verdict speaks of it");
    assert!(try_accept(&listener, Duration::from_millis(100)).is_none(), "a refused connection came through");
    let mut reasons = std::collections::BTreeSet::new();
    kernel.drain_events(&mut |event| reasons.extend([event.reason])).unwrap();
    assert_eq!(reasons, [Reason::NoVerdict, Reason::UnknownDestination].into());
}

#[test]
fn ranges_are_swapped_with_all_else_and_read_back() {
    let (node, kernel) = node(&tables());
    let _listener = node.attach(&kernel);
    let (open, to) = ("ok 10.0.0.1:80", at([10, 0, 0, 1], 80));
    assert_eq!(node.connect("client", to), open);
    let first = kernel.install(&tables()).unwrap();
    assert_eq!(kernel.install(&tables()).unwrap(), first, "equal tables, equal digests");
    let without = Tables { ranges: vec![], ..tables() };
    assert_ne!(kernel.install(&without).unwrap(), first);
    assert_eq!(node.connect("client", to), "EPERM");
    assert_ne!(kernel.install(&tables()).unwrap(), kernel.install(&without).unwrap());
    kernel.install(&tables()).unwrap();
    // What is not a range is taken by nobody, and the tables stay as they were.
    for bad in [
        range([10, 0, 0, 1], 8, WIDE),
        range([10, 0, 0, 0], 33, WIDE),
        range([1, 0, 0, 0], 0, WIDE),
        range([11, 0, 0, 0], 8, 0),
        range([10, 0, 0, 0], 8, NARROW),
    ] {
        let spoilt = Tables { ranges: [tables().ranges, vec![bad]].concat(), ..tables() };
        assert!(matches!(kernel.install(&spoilt), Err(KernelError::BadTables(_))), "{bad:?}");
    }
    let many = (0..65_537_u32).map(|n| Range { first: Ipv4Addr::from_bits(n), bits: 32, number: WIDE }).collect();
    let full = kernel.install(&Tables { ranges: many, ..tables() });
    assert!(matches!(full, Err(KernelError::MapFull { map: "ranges", capacity: 65_536, needed: 65_537 })), "{full:?}");
    assert_eq!(node.connect("client", to), open);
    assert!(kernel.room().unwrap().contains(&("ranges", 4, 65_536)));
    // All of them at once, and everything: the widest range there is.
    let many = (0..65_535_u32).map(|n| Range { first: Ipv4Addr::from_bits(n << 8), bits: 24, number: CLOSED });
    let ranges = many.chain([range([0, 0, 0, 0], 0, WIDE)]).collect();
    kernel.install(&Tables { ranges, endpoints: vec![], ..tables() }).unwrap();
    assert_eq!(node.connect("client", to), open);
    assert_eq!(node.connect("client", at([0, 200, 1, 1], 80)), "EPERM");
}
