//! One node whole, but for its cell, in a network namespace of its own, and a plain client outside of the mesh: it reaches a
//! workload's port where a policy says so of its address, in clear text and by the agent alone, and loses it with the policy.
//! Needs root.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

#[allow(dead_code, reason = "the kernel crate's own tests use the rest")]
#[path = "../../ebpf/tests/kernel/support.rs"]
mod node;
mod support;

use ambit_agent::clock::Clock;
use ambit_agent::control::{Control, Hands, Outcome, Wires};
use ambit_agent::denials::{Denials, Lane};
use ambit_agent::health::Health;
use ambit_agent::issued::Issued;
use ambit_agent::kernel::KernelHandle;
use ambit_agent::metrics::METRICS;
use ambit_agent::netns::{Annex, Netns, NetnsThread};
use ambit_agent::outbound::Outbound;
use ambit_agent::plane::Plane;
use ambit_agent::staleness::Worth;
use ambit_agent::view::View;
use ambit_agent::way_in::WayIn;
use ambit_identity::{SharedTrust, Trust, TrustStore};
use ambit_model::{Generation, Revision};
use ambit_proto::v1;
use nix::sched::{CloneFlags, unshare};
use node::{Worker, run};
use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use support::local::Folder;
use support::told::Told;
use support::{Cell, now};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::time::timeout;

const SOON: Duration = Duration::from_secs(10);
const MOST: Duration = Duration::from_secs(1);

/// A workload. Answers a connection: `echo` with what it reads until the end, `keep` with a greeting and silence.
const SERVER: &str = r#"
import threading
def serve(host, port):
    s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1); s.bind((host, port)); s.listen(50)
    while True:
        c, who = s.accept()
        threading.Thread(target=talk, args=(c, who), daemon=True).start()
def talk(c, who):
    first = c.recv(6)
    if first == b'echo  ':
        data = b''
        while True:
            got = c.recv(65536)
            if not got: break
            data += got
        c.sendall(data + (' at ' + c.getsockname()[0] + ' from ' + who[0]).encode()); c.close()
    else:
        c.sendall(b'hi')
        try: end = 'end' if not c.recv(1) else 'data'
        except ConnectionResetError: end = 'reset'
        print(end, flush=True)
for where in sys.stdin.readline().split():
    host, port = where.split(':')
    threading.Thread(target=serve, args=(host, int(port)), daemon=True).start()
time.sleep(0.2); print('ready', flush=True)
time.sleep(600)
"#;

/// A client outside: connects from one of its addresses, and says how that went.
const CLIENT: &str = r#"
kept = []
def dial(port, source):
    s = socket.socket(); s.settimeout(3); s.bind((source, 0)); s.connect(('10.99.0.1', port)); return s
def echo(port, size, source='10.231.0.2'):
    s = dial(port, source); s.sendall(b'echo  ' + b'x' * size); s.shutdown(socket.SHUT_WR); data = b''
    while True:
        got = s.recv(65536)
        if not got: break
        data += got
    return f'{data.count(b"x")} {data[size:].decode().strip()}'
def keep(port, source='10.231.0.2'):
    s = dial(port, source); s.sendall(b'keep  '); hi = s.recv(2).decode(); kept.append(s); return hi or 'end'
def drop():
    s = kept.pop(); s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0)); s.close(); return 'dropped'
def ended():
    s = kept.pop(); s.settimeout(10)
    try: end = 'end' if not s.recv(1) else 'data'
    except ConnectionResetError: end = 'reset'
    return f'{end} {time.time()}'
for line in sys.stdin:
    try: print(eval(line), flush=True)
    except OSError as e: print(errno.errorcode.get(e.errno, type(e).__name__), flush=True)
"#;

/// Frames that hold bytes of a payload, as somebody in the pod sees them who listens on its wire.
const CAPTURE: &str = r#"
import threading
frames = []
c = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)); c.bind(('eth0', 3))
def capture():
    while True: frames.append(c.recv(70000))
threading.Thread(target=capture, daemon=True).start()
print('ready', flush=True)
for line in sys.stdin:
    time.sleep(0.2); print(sum(b'xxxxxxxx' in frame for frame in list(frames)), flush=True)
"#;

struct Agent {
    desired: watch::Sender<Option<Arc<View>>>,
    outcome: watch::Receiver<Option<Outcome>>,
    plane: watch::Receiver<Option<Arc<Plane>>>,
    issued: Issued,
    denials: Lane,
    kernel: KernelHandle,
    _held: (ambit_ebpf::LetIn, ambit_ebpf::Annex),
}

impl Agent {
    /// The parts of the agent that need no cell, put together as `agent::run` does.
    async fn start(mesh: PathBuf, pins: PathBuf, pods_dir: PathBuf, cell: &Cell) -> Agent {
        let kernel = KernelHandle::open(&mesh, &pins, &pods_dir).unwrap();
        kernel.renew_lease(ambit_agent::staleness::LEASE).unwrap();
        let netns = NetnsThread::start().unwrap();
        let made = ambit_ebpf::Annex::make().unwrap();
        let annex = Annex::new(netns.clone(), Netns::of(made.as_fd().try_clone_to_owned().unwrap()));
        kernel.use_annex(&made);
        let strangers = annex.strangers(1).await.unwrap().remove(0);
        let let_in = kernel.let_in(&made, &strangers).unwrap();
        let view = cell.view(cell.slice(0, &[]));
        let trust = SharedTrust::new(Trust::Bundles(TrustStore::new(&view.own).unwrap()));
        let (desired, desired_rx) = watch::channel(None);
        let (outcome_tx, outcome) = watch::channel(None);
        let (endpoints, _) = watch::channel(None);
        let (plane_tx, plane) = watch::channel(None);
        let (_, node) = watch::channel(Some((cell.node(), Generation(1))));
        let (issued, denials, clock) = (Issued::default(), Lane::default(), Arc::new(Clock::default()));
        let health = Health::new(Some(kernel.clone()), denials.clone());
        let control = Control {
            pods_dir,
            cgroup_root: mesh,
            node_address: Ipv4Addr::LOCALHOST,
            kernel: kernel.clone(),
            netns: netns.clone(),
            issued: issued.clone(),
            trust,
            denials: denials.clone(),
            health: health.clone(),
            outbound: Outbound::new(plane.clone(), denials.clone(), health, clock.clone(), annex, 15008),
            clock: clock.clone(),
            hands: Hands::default(),
            wires: Wires {
                desired: desired_rx,
                outcome: outcome_tx,
                endpoints,
                plane: plane_tx,
                seen: Default::default(),
                node,
            },
        };
        tokio::spawn(control.run());
        let way_in = WayIn::new(plane.clone(), denials.clone(), netns, clock).by_kernel(kernel.clone());
        tokio::spawn(way_in.serve(TcpListener::from_std(strangers).unwrap()));
        Agent { desired, outcome, plane, issued, denials, kernel, _held: (let_in, made) }
    }

    async fn apply(&mut self, view: Arc<View>) {
        let revision = view.revision;
        self.denials.offer(view.denials.clone());
        self.desired.send_replace(Some(view));
        let applied = self.outcome.wait_for(|o| o.as_ref().is_some_and(|o| o.revision == revision));
        let applied = timeout(SOON, applied).await.expect("an outcome").unwrap().clone().unwrap();
        applied.result.expect("in the kernel");
    }
}

async fn said(worker: &mut Worker, what: &str) -> String {
    // The agent's own threads go on meanwhile.
    tokio::task::block_in_place(|| {
        worker.ask(what);
        worker.answer()
    })
}

/// How a kept connection ended, and how long after `begun`.
async fn ended(worker: &mut Worker, begun: f64) -> (String, Duration) {
    let told = said(worker, "ended()").await;
    let (end, at) = told.split_once(' ').unwrap_or_else(|| panic!("{told}"));
    (end.to_owned(), Duration::from_secs_f64((at.parse::<f64>().unwrap() - begun).max(0.0)))
}

fn clock() -> f64 {
    now().0 as f64 / 1e3
}

#[test]
fn a_client_outside_reaches_a_workload_by_a_policy_and_not_without() {
    // The whole node lives in a namespace of this thread, and of those that it starts.
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    run("ip link set lo up");
    let node = node::Node::new();
    let (pod, far) = (node.pod.id(), node.outside.id());
    run(&format!("nsenter --net=/proc/{pod}/ns/net ip link del eth0"));
    run(&format!("ip link add at_pod type veth peer name eth0 netns {pod} && ip link set at_pod up"));
    run(&format!("nsenter --net=/proc/{pod}/ns/net ip addr add {}/32 dev lo", node::POD));
    for words in ["ip link set eth0 up", "ip route add 10.231.0.1 dev eth0", "ip route add default via 10.231.0.1"] {
        run(&format!("nsenter --net=/proc/{pod}/ns/net {words}"));
    }
    run(&format!("ip link add far type veth peer name near netns {far}"));
    run("ip addr add 10.231.0.1/24 dev far && ip link set far up");
    run(&format!("ip route add {}/32 dev at_pod", node::POD));
    run("echo 1 > /proc/sys/net/ipv4/ip_forward && echo 0 > /proc/sys/net/ipv4/conf/all/rp_filter");
    for words in [
        "ip addr add 10.231.0.2/24 dev near",
        "ip addr add 10.231.0.3/24 dev near",
        "ip link set near up",
        "ip route add default via 10.231.0.1",
    ] {
        run(&format!("nsenter --net=/proc/{far}/ns/net {words}"));
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(reached(&node));
    runtime.shutdown_background();
}

async fn reached(node: &node::Node) {
    let (folder, told) = (Folder::new("way-in"), Told::begin());
    node.cgroup("web");
    let netns = format!("/proc/{}/ns/net", node.pod.id());
    let file = serde_json::json!({"cgroup": "web", "netns": netns, "address": node::POD, "uid": 0});
    let file = folder.write("web.json", file.to_string());
    let mut cell = Cell::founded("west", 1);
    let web = cell.entry("web", &["cgroup:web"], &[]);
    let mut agent = Agent::start(node.mesh.clone(), node.pins.clone(), file.parent().unwrap().into(), &cell).await;
    let far = format!("/proc/{}/ns/net", node.outside.id());
    let mut client = node.worker_in(&far, None, CLIENT);
    let mut server = node.worker("web", SERVER);
    // One is bound to loopback, and stays private.
    assert_eq!(said(&mut server, "0.0.0.0:8080 0.0.0.0:8081 127.0.0.1:8082 0.0.0.0:15006").await, "ready");
    let mut pod = node.worker_in(&netns, None, CAPTURE);
    assert_eq!(tokio::task::block_in_place(|| pod.answer()), "ready");

    let policy = |name: &str, action: v1::Action, ranges: &[&str], ports: &[u32]| v1::Policy {
        origin: "west".into(),
        name: name.into(),
        target: cell.id("web"),
        action: action as i32,
        unmeshed: ranges.iter().map(|range| (*range).to_owned()).collect(),
        transport: if action == v1::Action::Allow { "passthrough".into() } else { String::new() },
        ports: ports.to_vec(),
        resolved: true,
        ..Default::default()
    };
    let slice = |revision: u64, unmeshed: Vec<v1::Policy>| v1::Slice {
        entries: vec![web.clone()],
        identities: vec![v1::NumericIdentity { spiffe_id: cell.id("web"), number: 256 }],
        unmeshed,
        ..cell.slice(revision, &[])
    };
    let open = || vec![policy("clients", v1::Action::Allow, &["10.231.0.2/32"], &[8080, 8082, 8083])];
    let wide = || vec![policy("all", v1::Action::Allow, &["0.0.0.0/0"], &[])];
    let with = |more: v1::Policy| wide().into_iter().chain([more]).collect::<Vec<_>>();
    let barred = v1::IdDenial { spiffe_id: cell.id("web"), up_to: vec![0; 16], barred: true };
    let views = [
        slice(1, vec![]),
        slice(2, open()),
        slice(3, wide()),
        slice(4, with(policy("d", v1::Action::Deny, &["10.231.0.0/31", "10.231.0.2/32"], &[8080]))),
        slice(5, with(policy("audit", v1::Action::Audit, &["10.231.0.0/24"], &[8080]))),
        v1::Slice { claimed: vec!["10.231.0.2".into()], ..slice(6, wide()) },
        slice(7, wide()),
        slice(8, vec![]),
        slice(9, wide()),
    ];
    let [none, opened, all, denied, audited, claimed, again, gone, last] = views.map(|s| cell.view(s));
    let svid = cell.svid("web");

    agent.apply(none).await;
    assert_eq!(said(&mut client, "echo(8080, 1)").await, "ECONNREFUSED", "no policy");
    // Who has no SVID is called by nobody, whatever the kernel says.
    agent.apply(opened.clone()).await;
    let until = std::time::Instant::now() + SOON;
    while said(&mut client, "echo(8080, 1)").await != "ECONNRESET" {
        // Who the pod is, is said to the kernel a moment later.
        assert!(std::time::Instant::now() < until, "never let in by the kernel");
    }
    agent.issued.set_svids(BTreeMap::from([("web".parse().unwrap(), Ok(svid))]));
    let holds = |plane: &Option<Arc<Plane>>| plane.as_ref().is_some_and(|p| !p.credentials.is_empty());
    timeout(SOON, agent.plane.wait_for(holds)).await.expect("credentials").unwrap();

    told.0.lock().unwrap().clear();
    assert_eq!(
        said(&mut client, "echo(8080, 3000000)").await,
        "3000000 at 10.99.0.1 from 10.231.0.2",
        "carried whole, with half-close"
    );
    let record = timeout(SOON, async {
        loop {
            if let Some(record) = told.0.lock().unwrap().pop() {
                return record;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    let record = record.await.expect("a record");
    for (field, want) in [
        ("direction", "\"unmeshed\""),
        ("destination", "\"spiffe://west/web\""),
        ("to", "10.99.0.1:8080"),
        ("transport", "\"passthrough\""),
        ("rule", "\"west/clients\""),
        ("flags", "\"-\""),
        ("sent", "3000006"),
        ("received", "3000029"),
    ] {
        assert_eq!(record[field], want, "{field}");
    }
    assert!(record["source"].starts_with("10.231.0.2:"), "the client's own address: {record:?}");
    assert_eq!(said(&mut pod, "frames").await, "0", "nobody in the pod saw it on the wire");
    assert_eq!(METRICS.connections.value(["unmeshed", "ok"]), 1.0);

    for (ask, want) in [
        ("keep(8081)", "ECONNREFUSED"),
        ("keep(8080, '10.231.0.3')", "ECONNREFUSED"),
        // Open, and nobody is there.
        ("keep(8083)", "ECONNRESET"),
        ("keep(8082)", "ECONNRESET"),
    ] {
        assert_eq!(said(&mut client, ask).await, want, "{ask}");
    }
    assert_eq!(said(&mut client, "keep(8080)").await, "hi");
    assert_eq!(said(&mut client, "drop()").await, "dropped");
    assert_eq!(tokio::task::block_in_place(|| server.answer()), "reset", "a reset there is one here");

    // Every port is none of the mesh's; the node itself is no client.
    agent.apply(all).await;
    assert_eq!(said(&mut client, "keep(15006)").await, "ECONNREFUSED");
    assert_eq!(said(&mut client, "keep(15001)").await, "ECONNREFUSED");
    let mut own = node.worker_in("/proc/thread-self/ns/net", None, CLIENT);
    assert_eq!(said(&mut own, "keep(8080, '10.231.0.1')").await, "ECONNREFUSED");
    // An address that is this node's since the tables were made: the kernel does not know, the agent finds out.
    run("ip addr add 10.231.0.9/24 dev far");
    assert_ne!(said(&mut own, "keep(8080, '10.231.0.9')").await, "hi");
    run("ip addr del 10.231.0.9/24 dev far");

    // A deny wins, whichever range is longer, and ends what is open.
    for (next, why) in [(denied, "denied"), (claimed, "claimed"), (gone, "withdrawn")] {
        agent.apply(again_as(&again, next.revision.0 * 100)).await;
        assert_eq!(said(&mut client, "keep(8080)").await, "hi", "{why}");
        assert_eq!(said(&mut client, "keep(8080, '10.231.0.3')").await, "hi", "{why}");
        let begun = clock();
        agent.apply(again_as(&next, next.revision.0 * 100 + 1)).await;
        assert_eq!(said(&mut client, "keep(8080)").await, "ECONNREFUSED", "{why}");
        let other = said(&mut client, "keep(8080, '10.231.0.3')").await;
        assert_eq!(other, if why == "withdrawn" { "ECONNREFUSED" } else { "hi" }, "{why}");
        if why != "withdrawn" {
            assert_eq!(said(&mut client, "drop()").await, "dropped");
            assert_eq!(said(&mut client, "drop()").await, "dropped", "the other client's goes on");
            for _ in 0..2 {
                assert_eq!(tokio::task::block_in_place(|| server.answer()), "reset");
            }
        } else {
            let (end, took) = ended(&mut client, begun).await;
            assert!(end == "reset" && took < MOST, "{end} {took:?}");
            assert_eq!(tokio::task::block_in_place(|| server.answer()), "reset");
        }
        let (end, took) = ended(&mut client, begun).await;
        println!("{why} to connection cut: {} ms", took.as_millis());
        assert!(end == "reset" && took < MOST, "{why}: {end} {took:?}");
        assert_eq!(tokio::task::block_in_place(|| server.answer()), "reset", "at the other end too");
    }

    agent.apply(again_as(&audited, 900)).await;
    let before = METRICS.audited.value(["unmeshed"]);
    assert_eq!(said(&mut client, "echo(8080, 5)").await, "5 at 10.99.0.1 from 10.231.0.2");
    assert_eq!(METRICS.audited.value(["unmeshed"]), before + 1.0);

    // A node whose cell was not heard for too long begins nothing, though its kernel let the SYN in, and ends nothing unless strict.
    agent.apply(again_as(&last, 901)).await;
    assert_eq!(said(&mut client, "keep(8080)").await, "hi");
    agent.denials.set_worth(Worth::Open);
    assert_eq!(said(&mut client, "echo(8080, 1)").await, "ECONNRESET", "stale");
    let begun = clock();
    agent.denials.set_worth(Worth::Nothing);
    let (end, took) = ended(&mut client, begun).await;
    assert!(end == "reset" && took < MOST, "{end} {took:?}");
    assert_eq!(tokio::task::block_in_place(|| server.answer()), "reset");
    agent.denials.set_worth(Worth::All);
    // The lease ends: the kernel lets nobody in.
    assert_eq!(said(&mut client, "keep(8080)").await, "hi");
    agent.kernel.shorten_lease(Duration::ZERO).unwrap();
    assert_eq!(said(&mut client, "echo(8080, 1)").await, "ECONNREFUSED");
    agent.kernel.renew_lease(ambit_agent::staleness::LEASE).unwrap();
    let begun = clock();
    let list = Denials::parse(Revision(1_000), &[], &[]).unwrap().with_svids(&[barred], &[]).unwrap();
    assert!(agent.denials.offer(list));
    let (end, took) = ended(&mut client, begun).await;
    println!("the workload denied to connection cut: {} ms", took.as_millis());
    assert!(end == "reset" && took < MOST, "{end} {took:?}");
    assert_eq!(said(&mut client, "echo(8080, 1)").await, "ECONNRESET", "nor is a new one carried");
    assert!(METRICS.connections.value(["unmeshed", "denied"]) > 1.0 && METRICS.cut.value(["unmeshed"]) > 5.0);
}

/// The same under another revision.
fn again_as(view: &Arc<View>, revision: u64) -> Arc<View> {
    Arc::new(View { revision: Revision(revision), ..View::clone(view) })
}
