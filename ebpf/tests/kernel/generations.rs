//! Tables in force: swaps under load, what is refused, the digest; and the pins that outlive an agent.

use crate::support::{Node, at, try_accept};
use ambit_ebpf::{
    Action, Capacity, Drift, Kernel, KernelError, Options, Service, ServiceEndpoint, Tables, Tier, Verdict, VerdictKey,
};
use libbpf_rs::{Link, MapCore, MapFlags, MapHandle};
use std::io::Read;
use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

const CLIENT: u32 = 300;
const LEASE: Duration = Duration::from_secs(600);

fn verdict(destination: u32, action: Action) -> (VerdictKey, Verdict) {
    (VerdictKey { source: CLIENT, destination, port: 80 }, Verdict { action, rule: 1 })
}

/// Both generations allow 10.1.0.1 and deny 10.1.0.2, but under other identities: verdicts of one with endpoints of the
/// other would deny the first address or allow the second.
fn generation(odd: bool) -> Tables {
    let (open, shut) = if odd { (401, 400) } else { (400, 401) };
    let padding = (0..2000).map(|i| {
        (
            VerdictKey { source: 9000 + i, destination: 1, port: u16::from(odd) },
            Verdict { action: Action::Allow, rule: 2 },
        )
    });
    Tables {
        verdicts: [verdict(open, Action::Allow), verdict(shut, Action::Deny)].into_iter().chain(padding).collect(),
        endpoints: vec![(Ipv4Addr::new(10, 1, 0, 1), open), (Ipv4Addr::new(10, 1, 0, 2), shut)],
        services: vec![],
        ..Tables::default()
    }
}

#[test]
fn swaps_under_load_give_no_wrong_verdict() {
    let node = Node::new();
    let kernel = Kernel::open(&node.options()).unwrap();
    kernel.install(&generation(false)).unwrap();
    kernel.set_workload(node.cgroup("client"), CLIENT).unwrap();
    kernel.renew_lease(LEASE).unwrap();
    let listener = node.attach(&kernel);
    let script = "
right = wrong = 0
end = time.monotonic() + 3
while time.monotonic() < end or right + wrong < 600:
    for host, good in (('10.1.0.1', 0), ('10.1.0.2', errno.EPERM)):
        s = socket.socket()
        s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
        if s.connect_ex((host, 80)) == good: right += 1
        else: wrong += 1
        s.close()
print(right, wrong)";
    let mut load = node.spawn("client", script);
    let (done, installs) = (AtomicBool::new(false), AtomicU32::new(0));
    let mut slowest = Duration::ZERO;
    let counts = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                drop(try_accept(&listener, Duration::from_millis(20)));
            }
        });
        let installer = scope.spawn(|| {
            let mut slowest = Duration::ZERO;
            while !done.load(Ordering::Relaxed) {
                let start = Instant::now();
                kernel.install(&generation(installs.fetch_add(1, Ordering::Relaxed) % 2 == 0)).unwrap();
                slowest = slowest.max(start.elapsed());
            }
            slowest
        });
        let mut out = String::new();
        load.stdout.take().unwrap().read_to_string(&mut out).unwrap();
        assert!(load.wait().unwrap().success());
        done.store(true, Ordering::Relaxed);
        slowest = slowest.max(installer.join().unwrap());
        out
    });
    let numbers: Vec<u64> = counts.split_whitespace().map(|n| n.parse().unwrap()).collect();
    let swaps = installs.load(Ordering::Relaxed);
    println!("{} right, {} wrong over {swaps} swaps; slowest install {slowest:?}", numbers[0], numbers[1]);
    assert_eq!(numbers[1], 0, "wrong verdicts");
    assert!(numbers[0] > 500 && swaps > 4, "too little load to tell");
}

#[test]
fn equal_tables_have_equal_digests_and_bad_ones_change_nothing() {
    let node = Node::new();
    let capacity =
        Capacity { workloads: 2, verdicts: 3000, endpoints: 2, services: 1, ranges: 1, flows: 64, stamps: 64 };
    let kernel = Kernel::open(&Options { capacity, ..node.options() }).unwrap();
    let good = generation(false);
    let digest = kernel.install(&good).unwrap();
    let mut turned = good.clone();
    turned.verdicts.reverse();
    assert_eq!(kernel.install(&turned).unwrap(), digest);
    assert_ne!(kernel.install(&generation(true)).unwrap(), digest);
    assert_ne!(kernel.install(&Tables::default()).unwrap(), digest, "empty tables are tables");
    assert_eq!(kernel.install(&good).unwrap(), digest);

    let mut full = good.clone();
    full.endpoints.push((Ipv4Addr::new(10, 1, 0, 3), 400));
    let error = kernel.install(&full).unwrap_err();
    assert!(matches!(error, KernelError::MapFull { map: "endpoints", capacity: 2, needed: 3 }), "{error}");
    assert_eq!(error.code(), "map_full");
    let full6 = |n: u16| (std::net::Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, n), 400);
    let full = Tables { endpoints6: (1..4).map(full6).collect(), ..good.clone() };
    let error = kernel.install(&full).unwrap_err();
    assert!(matches!(error, KernelError::MapFull { map: "endpoints6", capacity: 2, needed: 3 }), "{error}");
    let six = Tables { endpoints6: vec![full6(1)], ..good.clone() };
    assert_ne!(kernel.install(&six).unwrap(), digest);
    assert_eq!(kernel.install(&good).unwrap(), digest);
    let mapped = (Ipv4Addr::new(10, 1, 0, 1).to_ipv6_mapped(), 400);
    let mapped = Tables { endpoints6: vec![mapped], ..good.clone() };
    assert!(matches!(kernel.install(&mapped), Err(KernelError::BadTables(_))));
    let mut twice = good.clone();
    twice.verdicts.push(verdict(400, Action::Deny));
    assert!(matches!(kernel.install(&twice), Err(KernelError::BadTables(_))));
    let mut nobody = good.clone();
    nobody.endpoints[0].1 = 0;
    assert!(matches!(kernel.install(&nobody), Err(KernelError::BadTables(_))));
    let endpoint = ServiceEndpoint { address: at([10, 1, 0, 1], 1), identity: 1, tier: Tier::Local, healthy: true };
    let wide = Service { address: at([10, 2, 0, 1], 1), endpoints: vec![endpoint; 9] };
    assert!(matches!(kernel.install(&Tables { services: vec![wide], ..good }), Err(KernelError::BadTables(_))));

    kernel.set_workload(1, CLIENT).unwrap();
    kernel.set_workload(2, CLIENT).unwrap();
    kernel.set_workload(2, CLIENT + 1).unwrap();
    let error = kernel.set_workload(3, CLIENT).unwrap_err();
    assert!(matches!(error, KernelError::MapFull { map: "workloads", .. }), "{error}");
    assert!(kernel.set_workload(1, 0).is_err());
    let room = kernel.room().unwrap();
    assert_eq!(room[..2], [("verdicts", 2002, 3000), ("endpoints", 2, 2)]);
    assert_eq!(room[2..5], [("services", 1, 1), ("ranges", 1, 1), ("callers", 1, 1)]);
    assert_eq!(room[5..8], [("workloads", 2, 2), ("flows", 0, 64), ("stamps", 0, 64)]);
    assert_eq!(room[8..10], [("endpoints6", 1, 2), ("services6", 1, 1)]);
    assert_eq!(room[10..], [("flows6", 0, 64), ("legs", 0, 64)]);
}

/// Of the two generations that in force.
fn in_force(node: &Node, map: &str) -> MapHandle {
    let pinned = |name: &str| MapHandle::from_pinned_path(node.pins.join("maps").join(name)).unwrap();
    let at = |map: MapHandle, key: &[u8]| map.lookup(key, MapFlags::ANY).unwrap().unwrap();
    let live = at(pinned("config"), &1u32.to_ne_bytes());
    let id = at(pinned(map), &live[..4]);
    MapHandle::from_map_id(u32::from_ne_bytes(id.try_into().unwrap())).unwrap()
}

#[test]
fn what_others_changed_in_the_tables_in_force_is_named() {
    let node = Node::new();
    let kernel = Kernel::open(&node.options()).unwrap();
    assert_eq!(kernel.drift().unwrap(), [], "nothing was put there yet");
    let (first, second) = (Ipv4Addr::new(10, 1, 0, 1), Ipv4Addr::new(10, 1, 0, 2));
    let to = at([10, 1, 0, 1], 80);
    let endpoint = ServiceEndpoint { address: to, identity: 400, tier: Tier::Local, healthy: true };
    let service = Service { address: at([10, 2, 0, 1], 80), endpoints: vec![endpoint] };
    let six = Service { address: "[fd10::1]:80".parse().unwrap(), endpoints: vec![] };
    let endpoints6 = vec![("fd00::1".parse().unwrap(), 400)];
    let services = vec![service.clone()];
    let tables = Tables { services, endpoints6, services6: vec![six], ..generation(false) };
    kernel.install(&tables).unwrap();
    assert_eq!(kernel.drift().unwrap(), []);

    let drifted = |map, expected, found| assert_eq!(kernel.drift().unwrap(), [Drift { map, expected, found }]);
    let endpoints = in_force(&node, "endpoints");
    endpoints.update(&second.octets(), &400u32.to_ne_bytes(), MapFlags::ANY).unwrap();
    drifted("endpoints", 2, 2);
    endpoints.delete(&second.octets()).unwrap();
    drifted("endpoints", 2, 1);
    // What the agent itself changes is no drift, and hides none.
    kernel.set_service_health(service.address, to, false).unwrap();
    assert_eq!(kernel.relabel(&[first, second], 1).unwrap(), 1);
    drifted("endpoints", 2, 1);
    endpoints.update(&second.octets(), &401u32.to_ne_bytes(), MapFlags::ANY).unwrap();
    assert_eq!(kernel.drift().unwrap(), []);

    let open = VerdictKey { source: CLIENT, destination: 401, port: 80 };
    let key = [open.source.to_ne_bytes(), open.destination.to_ne_bytes(), [80, 0, 0, 0]].concat();
    in_force(&node, "verdicts").update(&key, &[1, 0, 0, 0, 0, 0, 0, 0], MapFlags::EXIST).unwrap();
    drifted("verdicts", 2002, 2002);
    in_force(&node, "services").delete(&[10, 2, 0, 1, 80, 0, 0, 0]).unwrap();
    assert_eq!(kernel.drift().unwrap().len(), 2);
    let first6: std::net::Ipv6Addr = "fd00::1".parse().unwrap();
    in_force(&node, "endpoints6").update(&first6.octets(), &401u32.to_ne_bytes(), MapFlags::EXIST).unwrap();
    assert_eq!(kernel.drift().unwrap().len(), 3);
    let service6 = in_force(&node, "services6");
    service6.delete(&service6.keys().next().unwrap()).unwrap();
    assert_eq!(kernel.drift().unwrap().len(), 4);
    kernel.install(&tables).unwrap();
    assert_eq!(kernel.drift().unwrap(), []);
    // The other generation, which is in force no more.
    let config = MapHandle::from_pinned_path(node.pins.join("maps/config")).unwrap();
    let live = config.lookup(&1u32.to_ne_bytes(), MapFlags::ANY).unwrap().unwrap();
    config.update(&1u32.to_ne_bytes(), &u64::from(live[0] == 0).to_ne_bytes(), MapFlags::ANY).unwrap();
    assert!(!kernel.drift().unwrap().is_empty());
}

#[test]
fn a_full_capacity_of_verdicts_installs_and_is_compared() {
    let node = Node::new();
    let kernel = Kernel::open(&node.options()).unwrap();
    let many = (0..100_000u32).map(|i| {
        (
            VerdictKey { source: 256 + i % 1000, destination: 256 + i / 1000, port: 443 },
            Verdict { action: Action::Allow, rule: i },
        )
    });
    let tables = Tables { verdicts: many.collect(), ..Tables::default() };
    let start = Instant::now();
    kernel.install(&tables).unwrap();
    println!("100,000 verdicts in force after {:?}", start.elapsed());
    let start = Instant::now();
    assert_eq!(kernel.drift().unwrap(), []);
    println!("compared in {:?}", start.elapsed());
}

#[test]
fn a_second_agent_takes_over_the_same_links_with_new_programs() {
    let node = Node::new();
    let links = [
        "sock_create",
        "connect4",
        "connect6",
        "sendmsg4",
        "sendmsg6",
        "getpeername4",
        "getpeername6",
        "getsockname4",
        "getsockname6",
        "sockops",
    ];
    let ids = || links.map(|name| Link::open(node.pins.join("links").join(name)).unwrap().info().unwrap());
    drop(Kernel::open(&node.options()).unwrap());
    let first = ids();
    for _ in 0..5 {
        drop(Kernel::open(&node.options()).unwrap());
    }
    let last = ids();
    for (before, after) in first.iter().zip(&last) {
        assert_eq!(before.id, after.id, "the link itself stays");
        assert_ne!(before.prog_id, after.prog_id, "its program is new");
    }
    // A link that is missing is made again.
    std::fs::remove_file(node.pins.join("links/connect6")).unwrap();
    drop(Kernel::open(&node.options()).unwrap());
    ids();
}

#[test]
fn a_pin_that_is_not_what_it_should_be_is_named() {
    let node = Node::new();
    let open = || Kernel::open(&node.options());
    drop(open().unwrap());
    let named = |expect: &str| match open() {
        Err(error) => assert!(error.to_string().contains(expect), "{error} does not name {expect}"),
        Ok(_) => panic!("opened in spite of {expect}"),
    };
    let programs = || ambit_ebpf::programs(&node.pins).unwrap();
    let in_force = programs();
    let other = Options { cgroup_root: node.mesh.join("..").canonicalize().unwrap(), ..node.options() };
    assert!(matches!(Kernel::open(&other), Err(KernelError::PinUnexpected { .. })), "links of another cgroup");
    let small = Options { capacity: Capacity { flows: 1, ..Capacity::default() }, ..node.options() };
    assert!(matches!(Kernel::open(&small), Err(KernelError::PinUnexpected { .. })));

    // The last of the links is another program's: none of those before it is touched.
    let (last, third) = (node.pins.join("links/sockops"), node.pins.join("links/connect6"));
    let kept = node.pins.join("links/kept");
    std::fs::rename(&last, &kept).unwrap();
    std::fs::rename(&third, &last).unwrap();
    named("links/sockops");
    std::fs::rename(&last, &third).unwrap();
    std::fs::rename(&kept, &last).unwrap();
    assert_eq!(programs(), in_force, "what was in force is");

    let config = node.pins.join("maps/config");
    std::fs::remove_file(&config).unwrap();
    named("maps/config");
    let mut wrong = MapHandle::from_pinned_path(node.pins.join("maps/flows")).unwrap();
    wrong.pin(&config).unwrap();
    named("maps/config");
    Kernel::remove(&node.pins).unwrap();
    drop(open().unwrap());

    // Another layout: no map of it is touched.
    let layout = node.pins.join("maps/layout");
    let map = MapHandle::from_pinned_path(&layout).unwrap();
    libbpf_rs::MapCore::update(&map, &0u32.to_ne_bytes(), &[7; 32], libbpf_rs::MapFlags::ANY).unwrap();
    named("layout 0707070707070707");

    let elsewhere = Options { pin_dir: std::env::temp_dir().join("ambit-test-pins"), ..node.options() };
    assert!(matches!(Kernel::open(&elsewhere), Err(KernelError::PinUnexpected { .. })), "not on bpffs");
    let nowhere = Options { cgroup_root: std::env::temp_dir(), ..node.options() };
    assert!(matches!(Kernel::open(&nowhere), Err(KernelError::NotCgroup { .. })));
}

#[test]
fn removing_the_pins_detaches() {
    let node = Node::new();
    let _server = node.listen_in_pod(Ipv4Addr::LOCALHOST, 8080);
    node.cgroup("client");
    let to = at([127, 0, 0, 1], 8080);
    drop(Kernel::open(&node.options()).unwrap());
    assert_eq!(node.connect("client", to), "EPERM");
    Kernel::remove(&node.pins).unwrap();
    Kernel::remove(&node.pins).unwrap();
    assert!(node.connect("client", to).starts_with("ok"));
    drop(Kernel::open(&node.options()).unwrap());
    assert_eq!(node.connect("client", to), "EPERM");
    std::fs::remove_dir_all(&node.pins).unwrap();
    std::thread::sleep(Duration::from_millis(200));
    assert!(node.connect("client", to).starts_with("ok"), "a plain rm -r detaches too");
}

#[test]
fn this_kernel_has_what_is_needed() {
    // Of what is optional the newest came with 6.6.
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split(['.', '-']).map(|n| n.parse::<u32>().unwrap_or_default());
    let is_new = (numbers.next(), numbers.next()) >= (Some(6), Some(6));
    for feature in ambit_ebpf::probe() {
        println!("{}: {}", feature.name, if feature.present { "present" } else { "absent" });
        assert!(feature.present || !feature.required && !is_new, "{}: {}", feature.name, feature.cost);
    }
}
