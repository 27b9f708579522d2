//! I18 of callers outside of the mesh: whom the kernel lets in by its address is whom the policies let in, for generated policies and
//! real connections to a pod's wire. As `verdicts.rs`. An allowed one ends at the agent's listener in the annex, any other is refused
//! by the pod's kernel.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

#[allow(dead_code, reason = "the kernel crate's own tests use the rest")]
#[path = "../../ebpf/tests/kernel/support.rs"]
mod node;

#[allow(dead_code, reason = "callers in the mesh use the rest")]
#[path = "support/callers.rs"]
mod dialling;

use ambit_agent::compile;
use ambit_agent::netns::{Annex, Netns, NetnsThread};
use ambit_agent::pods::Pod;
use ambit_agent::view::View;
use ambit_ebpf::{Kernel, Local};
use ambit_model::policy::closed_at;
use ambit_model::{Moment, SpiffeId, Stamp};
use ambit_proto::v1;
use dialling::{Numbers, uri};
use node::{Node, POD, Worker, in_netns, netns_of, run};
use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

const SETS: usize = 100;
const CONNECTIONS: usize = 1_000;
/// Who the pod is, in turn.
const PODS: [&str; 3] = ["west/web", "west/team/a", "west/team/b/c"];
const TARGETS: [&str; 6] = ["west/*", "west/team/*", "west/web", "west/team/a", "west/team/b/*", "west/elsewhere"];
const RANGES: [&str; 14] = [
    "0.0.0.0/0",
    "128.0.0.0/1",
    "10.0.0.0/8",
    "10.1.0.0/16",
    "10.1.2.0/23",
    "10.1.2.0/24",
    "10.1.2.3/32",
    "10.1.3.0/24",
    "10.2.0.0/15",
    "192.0.2.0/24",
    "192.0.2.128/25",
    "169.0.0.0/8",
    "168.0.0.0/5",
    "8.8.8.8/32",
];
const ADDRESSES: [&str; 17] = [
    "10.1.2.3",
    "10.1.2.4",
    "10.1.3.4",
    "10.1.4.4",
    "10.2.0.1",
    "10.3.255.255",
    "11.0.0.1",
    "192.0.2.1",
    "192.0.2.200",
    "169.1.1.1",
    "169.254.1.1",
    "8.8.8.8",
    "223.255.255.1",
    // A workload's, a service's, one that is of the mesh, and one of this node's own.
    "10.70.101.1",
    "10.1.6.6",
    "10.1.7.7",
    "10.1.8.8",
];
const CLAIMED: &str = "10.1.7.7";
const OWN: &str = "10.1.8.8";
const PORTS: [u16; 8] = [1, 22, 80, 443, 8080, 65_535, 15_001, 15_006];
const ALLOW: v1::Action = v1::Action::Allow;
const NOW: Moment = Moment { committed: Stamp(1), latest: Stamp(5) };

/// Reads `address:port` words a line, and answers each with A (connected), D (refused) or the error's name.
const CLIENT: &str = r#"
def one(where):
    source, port = where.split(':')
    s = socket.socket(); s.settimeout(3)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0)); s.setsockopt(socket.IPPROTO_IP, 24, 1)
    s.bind((source, 0))
    try: s.connect(('10.99.0.1', int(port))); return 'A'
    except ConnectionRefusedError: return 'D'
    except OSError as e: return errno.errorcode.get(e.errno, type(e).__name__)
    finally: s.close()
for line in sys.stdin: print(' '.join(map(one, line.split())), flush=True)
"#;

fn some<T: Copy + Ord>(numbers: &mut Numbers, list: &[T], most: usize) -> BTreeSet<T> {
    let count = 1 + numbers.below(most);
    (0..count).map(|_| numbers.of(list)).collect()
}

fn policy(numbers: &mut Numbers, name: usize) -> v1::Policy {
    let ports = if numbers.below(3) == 0 { BTreeSet::new() } else { some(numbers, &PORTS, 3) };
    let action = numbers.of(&[ALLOW, ALLOW, ALLOW, ALLOW, ALLOW, ALLOW, v1::Action::Deny, v1::Action::Audit]);
    v1::Policy {
        origin: "west".into(),
        name: format!("p{name}"),
        target: uri(numbers.of(&TARGETS)),
        action: action as i32,
        unmeshed: some(numbers, &RANGES, 3).into_iter().map(str::to_owned).collect(),
        transport: if action == ALLOW { "passthrough".into() } else { String::new() },
        ports: ports.into_iter().map(u32::from).collect(),
        resolved: true,
        // Some are over, and some end just now.
        expires_at_ms: numbers.of(&[0, 0, 0, 100, 5, 4]),
        ..Default::default()
    }
}

fn slice(numbers: &mut Numbers) -> v1::Slice {
    let policies = 3 + numbers.below(14);
    let first = 256 + u32::try_from(numbers.below(1 << 20)).unwrap();
    v1::Slice {
        revision: 1,
        trust_domain: "west".into(),
        cluster: "west".into(),
        bundles: vec![v1::Bundle { trust_domain: "west".into(), sequence: 1, ..v1::Bundle::default() }],
        entries: PODS
            .iter()
            .enumerate()
            .map(|(n, id)| v1::Entry {
                id: format!("pod{n}"),
                spiffe_id: uri(id),
                cluster: "west".into(),
                selectors: vec![format!("cgroup:pod{n}")],
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
        identities: PODS
            .iter()
            .zip(first..)
            .map(|(id, number)| v1::NumericIdentity { spiffe_id: uri(id), number })
            .collect(),
        unmeshed: (0..policies).map(|name| policy(numbers, name)).collect(),
        claimed: vec![CLAIMED.into()],
        ..Default::default()
    }
}

/// The oracle: what the policies say, of an address that neither the mesh nor this node has, and of no port of the mesh's own.
fn expected(view: &View, from: Ipv4Addr, to: &SpiffeId, port: u16) -> bool {
    let known =
        view.endpoints.contains_key(&from.into()) || [CLAIMED, OWN, "10.1.6.6"].contains(&from.to_string().as_str());
    let ours = [15_001, 15_006, 15_008].contains(&port);
    !known && !ours && view.policies.evaluate_unmeshed(IpAddr::V4(from), to, port, NOW).allowed
}

#[derive(Default)]
struct Tally {
    pairs: usize,
    allowed: usize,
    closed: usize,
    different: Vec<String>,
}

fn round(set: usize, (kernel, node): (&Kernel, &Node), client: &mut Worker, tally: &mut Tally) {
    let mut numbers = Numbers(set as u64);
    let view = View::parse(slice(&mut numbers), &"west".parse().unwrap(), &"west".parse().unwrap()).unwrap();
    let name = format!("pod{}", numbers.below(PODS.len()));
    let pod = Pod {
        address6: None,
        name: name.clone(),
        cgroup: name,
        cgroup_id: 1,
        netns: "/run/netns/x".into(),
        netns_id: (1, 2),
        address: POD,
        uid: 0,
    };
    let workloads = view.workloads([&pod]);
    let workload = workloads.values().next().unwrap();
    let own = [OWN.parse().unwrap()].into();
    let tables = compile::all(&view, &view.denials, workloads.values(), &compile::Unhealthy::new(), &own, NOW);
    kernel.install(&tables).unwrap();
    let netns = node.pod_netns();
    let place = std::thread::scope(|scope| {
        let on_node = scope.spawn(|| {
            nix::sched::setns(netns_of(&node.outside), nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            kernel.place(netns.as_fd()).unwrap().unwrap()
        });
        on_node.join().unwrap()
    });
    kernel.set_locals(&[Local { address: POD, identity: workload.number.0, place, open: true }]).unwrap();
    let asked: Vec<(Ipv4Addr, u16)> =
        (0..CONNECTIONS).map(|_| (numbers.of(&ADDRESSES).parse().unwrap(), numbers.of(&PORTS))).collect();
    client.ask(&asked.iter().map(|(from, port)| format!("{from}:{port}")).collect::<Vec<_>>().join(" "));
    let answers = client.answer();
    let id = &workload.entry.spiffe_id;
    for ((from, port), answer) in asked.iter().zip(answers.split(' ')) {
        let allowed = expected(&view, *from, id, *port);
        tally.pairs += 1;
        tally.allowed += usize::from(allowed);
        tally.closed += usize::from(closed_at(IpAddr::V4(*from)).is_some());
        // What user space says of it again, of those that the mesh does not know.
        let again = !view.claims(*from) && view.rules.evaluate_unmeshed(*from, id, *port, NOW).allowed;
        let again = again && from.to_string() != OWN && *port != 15_001 && *port != 15_006;
        if answer != if allowed { "A" } else { "D" } || again != allowed {
            tally.different.push(format!("set {set}: {from} -> {id}:{port}: kernel {answer}, agent {again}"));
        }
    }
    assert_eq!(answers.split(' ').count(), asked.len());
}

#[test]
fn the_kernel_lets_in_whom_the_policies_let_in() {
    let node = Node::new();
    let (pod, outside) = (node.pod.id(), node.outside.id());
    run(&format!("nsenter --net=/proc/{pod}/ns/net ip route add default dev eth0"));
    run(&format!("nsenter --net=/proc/{outside}/ns/net sh -c 'echo 0 > /proc/sys/net/ipv4/conf/all/rp_filter'"));
    for address in ADDRESSES {
        run(&format!("nsenter --net=/proc/{outside}/ns/net ip addr add {address}/32 dev lo"));
    }
    let kernel = Kernel::open(&node.options()).unwrap();
    kernel.renew_lease(Duration::from_secs(3600)).unwrap();
    let made = in_netns(netns_of(&node.outside), || ambit_ebpf::Annex::make().unwrap());
    kernel.use_annex(&made);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let annex = Annex::new(NetnsThread::start().unwrap(), Netns::of(made.as_fd().try_clone_to_owned().unwrap()));
    let listener = runtime.block_on(annex.strangers(1)).unwrap().remove(0);
    let _let_in = kernel.let_in(&made, listener.as_fd()).unwrap();
    // The agent's part: whoever comes is counted, and let go.
    let came = Arc::new(AtomicUsize::new(0));
    let counts = came.clone();
    listener.set_nonblocking(false).unwrap();
    std::thread::spawn(move || {
        for _ in listener.incoming() {
            counts.fetch_add(1, Ordering::Relaxed);
        }
    });
    let netns = node.pod_netns();
    std::thread::scope(|scope| {
        let on_node = scope.spawn(|| {
            nix::sched::setns(netns_of(&node.outside), nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            assert_eq!(kernel.guard_wires("pod", netns.as_fd(), POD).unwrap(), 1);
        });
        on_node.join().unwrap();
    });
    let _capture = node.attach(&kernel);
    let mut client = node.worker_in(&format!("/proc/{outside}/ns/net"), None, CLIENT);
    let (start, mut tally) = (Instant::now(), Tally::default());
    (0..SETS).for_each(|set| round(set, (&kernel, &node), &mut client, &mut tally));
    let (pairs, allowed, differences) = (tally.pairs, tally.allowed, tally.different.len());
    println!(
        "{pairs} pairs of (policies, client address, port), {SETS} sets: {allowed} allowed, {} denied; {differences} \
         differences; {:.1} s",
        pairs - allowed,
        start.elapsed().as_secs_f64()
    );
    assert!(tally.different.is_empty(), "{:#?}", tally.different.iter().take(20).collect::<Vec<_>>());
    assert_eq!(pairs, SETS * CONNECTIONS);
    assert!(allowed * 8 > pairs && allowed * 8 < pairs * 7, "too one-sided to tell: {allowed} allowed");
    assert!(tally.closed > 1_000, "{}", tally.closed);
    // All of them came to the agent, and nobody else.
    let until = Instant::now() + Duration::from_secs(5);
    while came.load(Ordering::Relaxed) < allowed && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(came.load(Ordering::Relaxed) <= allowed, "{} of {allowed}", came.load(Ordering::Relaxed));
}
