//! One node whole, but for its cell, in a network namespace of its own, and a plain server outside of the mesh: a workload reaches
//! it by an egress document, in clear text and by the agent alone, and loses it with the document. Needs root.
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
use ambit_agent::netns::{Annex, Netns, NetnsThread};
use ambit_agent::outbound::Outbound;
use ambit_agent::plane::Plane;
use ambit_agent::staleness::Worth;
use ambit_agent::view::View;
use ambit_identity::{SharedTrust, Trust, TrustStore};
use ambit_model::{Generation, Revision};
use ambit_proto::v1;
use nix::sched::{CloneFlags, unshare};
use node::{Worker, run};
use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use support::local::Folder;
use support::{Cell, now};
use tokio::sync::watch;
use tokio::time::timeout;

const SOON: Duration = Duration::from_secs(10);

/// Answers lines of a connection: `echo` with what it reads until the end, `keep` with a greeting and silence, `reset`.
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
        c.sendall(data + b' from ' + who[0].encode()); c.close()
    elif first == b'reset ':
        c.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0)); c.close()
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

/// A workload: connects, and says how that went.
const WORKLOAD: &str = r#"
kept = []
def dial(where):
    host, port = where.split(':')
    s = socket.socket(); s.settimeout(10); s.connect((host, int(port))); return s
def echo(where, size):
    s = dial(where); peer = s.getpeername()[0]; s.sendall(b'echo  ' + b'x' * size); s.shutdown(socket.SHUT_WR); data = b''
    while True:
        got = s.recv(65536)
        if not got: break
        data += got
    return f'{data.count(b"x")} {data[size:].decode().strip()} peer {peer}'
def reset(where):
    s = dial(where); s.sendall(b'reset '); return 'end' if not s.recv(1) else 'data'
def keep(where):
    s = dial(where); s.sendall(b'keep  '); hi = s.recv(2).decode(); kept.append(s); return hi
def drop():
    s = kept.pop(); s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0)); s.close(); return 'dropped'
def ended():
    s = kept.pop(); s.settimeout(10); begun = time.monotonic()
    try: end = 'end' if not s.recv(1) else 'data'
    except ConnectionResetError: end = 'reset'
    return f'{end} {time.time()}'
for line in sys.stdin:
    try: print(eval(line), flush=True)
    except OSError as e: print(errno.errorcode.get(e.errno, repr(e)), flush=True)
"#;

struct Agent {
    desired: watch::Sender<Option<Arc<View>>>,
    outcome: watch::Receiver<Option<Outcome>>,
    plane: watch::Receiver<Option<Arc<Plane>>>,
    issued: Issued,
    denials: Lane,
}

impl Agent {
    /// The parts of the agent that need no cell, put together as `agent::run` does.
    fn start(mesh: PathBuf, pins: PathBuf, pods_dir: PathBuf, cell: &Cell) -> Agent {
        let kernel = KernelHandle::open(&mesh, &pins, &pods_dir).unwrap();
        kernel.renew_lease(ambit_agent::staleness::LEASE).unwrap();
        let view = cell.view(cell.slice(0, &[]));
        let trust = SharedTrust::new(Trust::Bundles(TrustStore::new(&view.own).unwrap()));
        let (desired, desired_rx) = watch::channel(None);
        let (outcome_tx, outcome) = watch::channel(None);
        let (endpoints, _) = watch::channel(None);
        let (plane_tx, plane) = watch::channel(None);
        let (_, node) = watch::channel(Some((cell.node(), Generation(1))));
        let (issued, denials, clock) = (Issued::default(), Lane::default(), Arc::new(Clock::default()));
        let health = Health::new(Some(kernel.clone()), denials.clone());
        let netns = NetnsThread::start().unwrap();
        let annex = Annex::new(netns.clone(), Netns::open(Path::new("/proc/self/ns/net")).unwrap());
        let control = Control {
            pods_dir,
            cgroup_root: mesh,
            node_address: Ipv4Addr::LOCALHOST,
            kernel,
            netns,
            issued: issued.clone(),
            trust,
            denials: denials.clone(),
            health: health.clone(),
            outbound: Outbound::new(plane.clone(), denials.clone(), health, clock.clone(), annex, 15008),
            clock,
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
        Agent { desired, outcome, plane, issued, denials }
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

const FAR: &str = "10.231.0.2:8080";
const MOST: Duration = Duration::from_secs(1);

#[test]
fn a_workload_reaches_what_is_outside_by_a_document_and_not_without() {
    // The whole node lives in a namespace of this thread, and of those that it starts.
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    run("ip link set lo up");
    let node = node::Node::new();
    let (pod, far) = (node.pod.id(), node.outside.id());
    run(&format!("nsenter --net=/proc/{pod}/ns/net ip link del eth0"));
    run(&format!("ip link add at_pod type veth peer name eth0 netns {pod} && ip link set at_pod up"));
    run(&format!("nsenter --net=/proc/{pod}/ns/net ip addr add {}/32 dev lo", node::POD));
    run(&format!("nsenter --net=/proc/{pod}/ns/net ip link set eth0 up"));
    run(&format!("ip link add far type veth peer name near netns {far}"));
    run("ip addr add 10.231.0.1/24 dev far && ip link set far up");
    for words in ["ip addr add 10.231.0.2/24 dev near", "ip addr add 10.231.0.3/24 dev near", "ip link set near up"] {
        run(&format!("nsenter --net=/proc/{far}/ns/net {words}"));
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(reaches(&node));
    runtime.shutdown_background();
}

async fn reaches(node: &node::Node) {
    let folder = Folder::new("way-out");
    node.cgroup("web");
    let netns = format!("/proc/{}/ns/net", node.pod.id());
    let file = serde_json::json!({"cgroup": "web", "netns": netns, "address": node::POD, "uid": 0});
    let file = folder.write("web.json", file.to_string());
    let mut cell = Cell::founded("west", 1);
    let web = cell.entry("web", &["cgroup:web"], &[]);
    let mut agent = Agent::start(node.mesh.clone(), node.pins.clone(), file.parent().unwrap().into(), &cell);
    let (far, here) = (format!("/proc/{}/ns/net", node.outside.id()), "/proc/thread-self/ns/net");
    let mut outside = node.worker_in(&far, None, SERVER);
    assert_eq!(
        said(&mut outside, "10.231.0.2:8080 10.231.0.2:8081 10.231.0.3:8080 10.231.0.2:15008 10.231.0.3:15008").await,
        "ready"
    );
    let mut own = node.worker_in(here, None, SERVER);
    assert_eq!(said(&mut own, "10.231.0.1:8080 0.0.0.0:8090").await, "ready");
    let mut workload = node.worker("web", WORKLOAD);
    let mut ask = async |what: &str| said(&mut workload, what).await;

    let egress = |name: &str, to: &str, ports: &[u32]| v1::Egress {
        name: name.into(),
        from: vec![cell.id("web")],
        to: vec![to.into()],
        ports: ports.to_vec(),
        protocols: vec!["tcp".into()],
        transport: "passthrough".into(),
        ..Default::default()
    };
    let slice = |revision: u64, egress: Vec<v1::Egress>| v1::Slice {
        entries: vec![web.clone()],
        identities: vec![v1::NumericIdentity { spiffe_id: cell.id("web"), number: 256 }],
        egress,
        // A node of the mesh is there: its agent is reached in a tunnel, not by this way.
        callers: vec![v1::NodeAddress {
            trust_domain: "west".into(),
            node: "cd".repeat(32),
            generation: 1,
            address: "10.231.0.3".into(),
        }],
        ..cell.slice(revision, &[])
    };
    let open = || vec![egress("far", "10.231.0.0/24", &[8080, 8090, 15_008])];
    let barred = v1::IdDenial { spiffe_id: cell.id("web"), up_to: vec![0; 16], barred: true };
    let views = [
        slice(1, vec![]),
        slice(2, open()),
        slice(3, vec![]),
        slice(4, open()),
        v1::Slice { meshed: vec!["10.231.0.3".into()], ..slice(5, open()) },
        slice(6, open()),
    ];
    let [none, opened, gone, again, meshed, last] = views.map(|s| cell.view(s));
    let svid = cell.svid("web");

    agent.apply(none).await;
    assert_eq!(ask(&format!("echo('{FAR}', 1)")).await, "EPERM", "no document");
    // Without an SVID nobody goes out, whatever the kernel says.
    agent.apply(opened.clone()).await;
    assert_eq!(ask(&format!("reset('{FAR}')")).await, "ECONNRESET");
    agent.issued.set_svids(BTreeMap::from([("web".parse().unwrap(), Ok(svid))]));
    let holds = |plane: &Option<Arc<Plane>>| plane.as_ref().is_some_and(|p| !p.credentials.is_empty());
    timeout(SOON, agent.plane.wait_for(holds)).await.expect("credentials").unwrap();

    let told = ask(&format!("echo('{FAR}', 3000000)")).await;
    assert_eq!(
        told, "3000000 from 10.231.0.1 peer 10.231.0.2",
        "carried whole, with half-close, from the node's address"
    );
    for (to, want) in [
        ("10.231.0.2:8081", "EPERM"),
        ("10.232.0.2:8080", "EPERM"),
        ("10.231.0.1:8080", "EPERM"),
        ("10.231.0.1:8090", "EPERM"),
        ("169.254.169.254:8080", "EPERM"),
        // Its own namespace's, where nothing listens; never the node's.
        ("127.0.0.1:8090", "ECONNREFUSED"),
        // Nobody is there: a captured connection begins, and ends.
        ("10.231.0.2:8090", "ECONNRESET"),
        ("10.231.0.3:15008", "ECONNRESET"),
        ("10.231.0.2:15008", "hi"),
    ] {
        assert_eq!(ask(&format!("keep('{to}')")).await, want, "{to}");
    }
    assert_eq!(ask(&format!("reset('{FAR}')")).await, "ECONNRESET", "a reset there is one here");
    assert_eq!(ask("drop()").await, "dropped");
    assert_eq!(tokio::task::block_in_place(|| outside.answer()), "reset", "and the other way");

    // An address that is this node's since the tables were made: the kernel does not know, the agent finds out.
    run("ip addr add 10.231.0.9/24 dev far");
    assert_eq!(ask("keep('10.231.0.9:8090')").await, "ECONNRESET");
    run("ip addr del 10.231.0.9/24 dev far");

    // The document goes, and with it what is open.
    assert_eq!(ask(&format!("keep('{FAR}')")).await, "hi");
    let begun = clock();
    agent.apply(gone).await;
    assert_eq!(ask(&format!("echo('{FAR}', 1)")).await, "EPERM", "the document is gone");
    let (end, took) = ended(&mut workload, begun).await;
    println!("document gone to connection cut: {} ms", took.as_millis());
    assert!(end == "reset" && took < MOST, "{end} {took:?}");
    assert_eq!(tokio::task::block_in_place(|| outside.answer()), "reset", "at the other end too");

    // The mesh comes to know somebody there: not in clear any more.
    agent.apply(again).await;
    assert_eq!(said(&mut workload, "keep('10.231.0.3:8080')").await, "hi");
    assert_eq!(said(&mut workload, &format!("keep('{FAR}')")).await, "hi");
    let begun = clock();
    agent.apply(meshed).await;
    assert_eq!(said(&mut workload, "keep('10.231.0.3:8080')").await, "EPERM");
    assert_eq!(said(&mut workload, &format!("echo('{FAR}', 5)")).await, "5 from 10.231.0.1 peer 10.231.0.2");
    // The other one goes on until its caller is denied, of which word comes ahead of slices.
    assert_eq!(said(&mut workload, "kept.insert(0, kept.pop())").await, "None");
    let (end, took) = ended(&mut workload, begun).await;
    assert!(end == "reset" && took < MOST, "{end} {took:?}");
    agent.apply(last).await;
    // A node whose cell was not heard for too long begins nothing, though its kernel took the SYN, and ends nothing unless it is
    // strict.
    agent.denials.set_worth(Worth::Open);
    assert_eq!(said(&mut workload, &format!("echo('{FAR}', 1)")).await, "ECONNRESET", "stale");
    agent.denials.set_worth(Worth::All);
    assert_eq!(said(&mut workload, &format!("keep('{FAR}')")).await, "hi");
    let begun = clock();
    agent.denials.set_worth(Worth::Nothing);
    let (end, took) = ended(&mut workload, begun).await;
    assert!(end == "reset" && took < MOST, "{end} {took:?}");
    agent.denials.set_worth(Worth::All);
    assert_eq!(said(&mut workload, &format!("keep('{FAR}')")).await, "hi");
    let begun = clock();
    let list = Denials::parse(Revision(7), &[], &[]).unwrap().with_svids(&[barred], &[]).unwrap();
    assert!(agent.denials.offer(list));
    let (end, took) = ended(&mut workload, begun).await;
    println!("caller denied to connection cut: {} ms", took.as_millis());
    assert!(end == "reset" && took < MOST, "{end} {took:?}");
    assert_eq!(said(&mut workload, &format!("keep('{FAR}')")).await, "ECONNRESET", "nor is a new one carried");
}
