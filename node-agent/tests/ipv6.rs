//! Pods with an IPv6 address beside their IPv4 one: pod files, the real kernel part, capture, tunnel, last leg, and unmodified
//! programs as workloads. Needs root and fails without it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

#[allow(dead_code, reason = "other tests use the rest")]
#[path = "support/ground.rs"]
mod ground;

use ambit_agent::denials::Denials;
use ambit_agent::view::View;
use ambit_model::Revision;
use ambit_proto::v1;
use ground::{Ground, Node, SOON};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::process::{ChildStdin, ChildStdout, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use support::told::Told;
use support::{Cell, allow};
use tokio::net::TcpListener;
use tokio::time::timeout;

const PORT: u16 = 8080;
const WEB4: Ipv4Addr = Ipv4Addr::new(10, 200, 6, 11);
const DB4: Ipv4Addr = Ipv4Addr::new(10, 200, 6, 12);
const WEB6: Ipv6Addr = Ipv6Addr::new(0xfd06, 0, 0, 0, 0, 0, 0, 0x11);
const DB6: Ipv6Addr = Ipv6Addr::new(0xfd06, 0, 0, 0, 0, 0, 0, 0x12);
/// The service `db` by its IPv6 address, and the one of a workload that has none.
const SERVICE6: &str = "fd96::1";
const OLD6: &str = "fd96::2";

/// Answers each line with what the expression gives. A server is one socket of both families, as most are.
const WORKLOAD: &str = r#"
import errno, socket, sys, threading, time
threading.excepthook = lambda _: None
def serve(at):
    listening = socket.create_server((at, 8080), family=socket.AF_INET6 if ':' in at else socket.AF_INET, dualstack_ipv6=at == '::')
    def echo(c):
        try:
            while data := c.recv(65536): c.sendall(data)
            c.sendall(b'bye')
        except OSError: pass
        c.close()
    def accept():
        while True: threading.Thread(target=echo, args=(listening.accept()[0],), daemon=True).start()
    threading.Thread(target=accept, daemon=True).start()
    return 'ok'
def dial(to, kind=''):
    global s
    s = socket.socket(socket.AF_INET6 if ':' in to else socket.AF_INET); s.settimeout(3)
    if 'only' in kind: s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    if 'bound' in kind: s.bind((OWN6, 0))
    began = time.monotonic()
    try: s.connect((to, 8080))
    except OSError as e: return (errno.errorcode.get(e.errno, str(e)) if e.errno else 'timed out') + (' late' if time.monotonic() - began > 1 else '')
    return f'{s.getsockname()[0]} {s.getpeername()[0]} {s.getpeername()[1]}'
def say(n):
    try:
        threading.Thread(target=s.sendall, args=(b'x' * n,)).start()
        got = 0
        while got < n:
            more = s.recv(65536)
            # Whichever of the two threads comes first is told that it was reset.
            if not more: return 'broken off'
            got += len(more)
        return str(got)
    except ConnectionResetError: return 'broken off'
    except OSError as e: return errno.errorcode.get(e.errno, 'timed out') if e.errno else 'timed out'
def half_close():
    s.shutdown(socket.SHUT_WR); got = b''
    while more := s.recv(100): got += more
    return got.decode()
print('ready', flush=True)
for line in sys.stdin: print(eval(line), flush=True)
"#;

struct Workload {
    lines: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Workload {
    fn start(ground: &mut Ground, pod: &str, pid: u32, own: &str) -> Workload {
        let script = format!("OWN6 = '{own}'\n{WORKLOAD}");
        let mut command = ground.command(pod, pid, &["python3", "-u", "-c", &script]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (lines, answers) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        ground.children.push(child);
        let mut workload = Workload { lines, answers };
        assert_eq!(workload.answer(), "ready");
        workload
    }
    fn answer(&mut self) -> String {
        let mut line = String::new();
        assert_ne!(self.answers.read_line(&mut line).unwrap(), 0, "the workload ended");
        line.trim().to_owned()
    }
    fn ask(&mut self, expression: &str) -> String {
        writeln!(self.lines, "{expression}").unwrap();
        tokio::task::block_in_place(|| self.answer())
    }
}

/// `web` is on the first node, `db` on the last: one, or two with cgroups, pins and kernel parts of their own.
struct Stage {
    // Before the grounds that they stand on.
    nodes: Vec<Node>,
    cell: Cell,
    grounds: Vec<Ground>,
    web: Workload,
    db: Workload,
    revision: u64,
    entries: Vec<v1::Entry>,
}

impl Stage {
    async fn set(n: u8, nodes: u8) -> Stage {
        let mut cell = Cell::founded("west", n);
        let entries = ["web", "db", "old"].map(|name| cell.entry(name, &[&format!("cgroup:{name}")], &[])).to_vec();
        let mut grounds: Vec<Ground> = (0..nodes).map(|_| Ground::make()).collect();
        let web_pid = grounds.first_mut().unwrap().pod6("web", WEB4, WEB6);
        let db_pid = grounds.last_mut().unwrap().pod6("db", DB4, DB6);
        let (mut started, mut port) = (Vec::new(), 0);
        for (ground, host) in grounds.iter().zip(1..) {
            let hbone = TcpListener::bind((Ipv4Addr::new(127, 0, 0, host), port)).await.unwrap();
            port = hbone.local_addr().unwrap().port();
            started.push(Node::start(ground, &cell, hbone).await);
        }
        let web = Workload::start(grounds.first_mut().unwrap(), "web", web_pid, &WEB6.to_string());
        let mut db = Workload::start(grounds.last_mut().unwrap(), "db", db_pid, &DB6.to_string());
        assert_eq!(db.ask("serve('::')"), "ok");
        Stage { nodes: started, cell, grounds, web, db, revision: 0, entries }
    }
    fn endpoint(&self, id: &str, address: IpAddr) -> v1::Endpoint {
        v1::Endpoint {
            spiffe_id: self.cell.id(id),
            address: address.to_string(),
            cluster: "west".into(),
            node_address: format!("127.0.0.{}", self.nodes.len()),
            node: self.cell.node().to_string(),
            generation: 1,
        }
    }
    fn view(&mut self, policies: &[v1::Policy]) -> Arc<View> {
        self.revision += 1;
        let service = |name: &str, address: &str, backend| v1::Service {
            origin: "west".into(),
            name: name.into(),
            address: address.into(),
            port: u32::from(PORT),
            backends: vec![self.cell.id(backend)],
            order: "local-first".into(),
            weights: vec![],
        };
        let number = |(id, number): (&str, u32)| v1::NumericIdentity { spiffe_id: self.cell.id(id), number };
        self.cell.view(v1::Slice {
            entries: self.entries.clone(),
            identities: [("web", 256), ("db", 257), ("old", 258)].map(number).to_vec(),
            endpoints: vec![
                self.endpoint("db", DB4.into()),
                self.endpoint("db", DB6.into()),
                // A workload that has no IPv6 address, at the server's IPv4 one: nobody else is here.
                self.endpoint("old", Ipv4Addr::new(10, 200, 6, 13).into()),
            ],
            services: vec![service("db", SERVICE6, "db"), service("old", OLD6, "old")],
            policies: policies.to_vec(),
            callers: vec![v1::NodeAddress {
                trust_domain: "west".into(),
                node: self.cell.node().to_string(),
                generation: 1,
                address: "127.0.0.1".into(),
            }],
            ..self.cell.slice(self.revision, &[])
        })
    }
    async fn apply(&mut self, policies: &[v1::Policy]) {
        let view = self.view(policies);
        for node in &mut self.nodes {
            node.apply(view.clone()).await;
        }
    }
    fn open(&self) -> v1::Policy {
        allow("db", "spiffe://west/db", "spiffe://west/web", &[PORT])
    }
    /// Waits until so many addresses are reported by the last node.
    async fn reported(&mut self, count: usize) -> Vec<String> {
        let reported = self.nodes.last_mut().unwrap().reported(|all| all.len() == count);
        let reported = timeout(SOON, reported).await.expect("endpoints").unwrap();
        reported.iter().map(|e| e.address.to_string()).collect()
    }
    fn svids(&mut self, names: &[&str]) {
        let svids: BTreeMap<_, _> = names.iter().map(|e| (e.parse().unwrap(), Ok(self.cell.svid(e)))).collect();
        self.nodes.iter().for_each(|node| node.issued.set_svids(svids.clone()));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn programs_of_two_nodes_call_each_other_by_ipv6_under_the_same_policy() {
    let told = Told::begin();
    calls(61, 2, &told).await;
    // Pods of one node go through the agent as well.
    told.0.lock().unwrap().clear();
    calls(64, 1, &told).await;
}

async fn calls(n: u8, nodes: u8, told: &Told) {
    let mut stage = Stage::set(n, nodes).await;
    let dial = format!("dial('{DB6}')");
    assert_eq!(stage.web.ask(&dial), "EPERM", "nobody yet");
    stage.apply(&[]).await;
    stage.svids(&["web", "db"]);
    let reported = stage.reported(if nodes == 1 { 4 } else { 2 }).await;
    assert!(
        reported.ends_with(&[DB4.to_string(), DB6.to_string()])
            || reported.starts_with(&[DB4.to_string(), DB6.to_string()]),
        "{reported:?}"
    );
    assert_eq!(stage.web.ask(&dial), "EPERM", "no policy");

    stage.apply(&[stage.open()]).await;
    for kind in ["", "only", "bound", "only bound"] {
        assert_eq!(stage.web.ask(&format!("dial('{DB6}', '{kind}')")), format!("{WEB6} {DB6} {PORT}"), "{kind}");
        assert_eq!(stage.web.ask("say(5)"), "5", "{kind}");
        assert_eq!(stage.web.ask("say(3000000)"), "3000000", "{kind}");
        assert_eq!(stage.web.ask("half_close()"), "bye", "{kind}");
    }
    let sent = "3000005".to_owned();
    let to = format!("[{DB6}]:{PORT}");
    let began = Instant::now();
    for direction in ["outbound", "inbound"] {
        let is_one = |r: &&BTreeMap<&str, String>| {
            r["direction"].trim_matches('"') == direction && r["to"] == to && r["sent"] == sent
        };
        while told.0.lock().unwrap().iter().filter(is_one).count() != 4 {
            assert!(began.elapsed() < SOON, "{direction}: {:?}", told.0.lock().unwrap());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    // By IPv4, to the same server and through the same listener of both families.
    for host in [DB4.to_string(), format!("::ffff:{DB4}")] {
        let own = if host.contains(':') { format!("::ffff:{WEB4}") } else { WEB4.to_string() };
        assert_eq!(stage.web.ask(&format!("dial('{host}')")), format!("{own} {host} {PORT}"));
        assert_eq!(stage.web.ask("say(5)"), "5", "{host}");
    }
    assert_eq!(stage.web.ask(&format!("dial('{SERVICE6}')")), format!("{WEB6} {SERVICE6} {PORT}"), "by its service");
    assert_eq!(stage.web.ask("say(100000)"), "100000");
    assert_eq!(stage.db.ask(&format!("dial('{WEB6}')")), "EPERM", "not the other way");
    assert_eq!(stage.db.ask(&format!("dial('{DB6}')")), "EPERM", "not itself: no policy");
    assert_eq!(stage.db.ask("dial('::1')"), format!("::1 ::1 {PORT}"), "its own loopback");
    let outside = std::net::TcpStream::connect_timeout(&(DB6, PORT).into(), Duration::from_millis(500));
    assert!(outside.is_err(), "in clear");

    // What is open ends with its policy, and nothing new begins.
    assert_eq!(stage.web.ask(&dial), format!("{WEB6} {DB6} {PORT}"));
    assert_eq!(stage.web.ask("say(5)"), "5");
    stage.apply(&[]).await;
    assert_eq!(stage.web.ask("say(5)"), "broken off", "cut");
    assert_eq!(stage.web.ask(&dial), "EPERM", "the policy is gone");
}

/// A service's IPv6 address is served by IPv4 where its workload has no other.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_of_ipv6_is_served_by_a_workload_of_ipv4() {
    let mut stage = Stage::set(62, 2).await;
    let pid = stage.grounds[1].pod("old", Ipv4Addr::new(10, 200, 6, 13));
    let mut old = Workload::start(&mut stage.grounds[1], "old", pid, "");
    assert_eq!(old.ask("serve('0.0.0.0')"), "ok");
    stage.apply(&[allow("old", "spiffe://west/old", "spiffe://west/web", &[PORT])]).await;
    stage.svids(&["web", "db", "old"]);
    stage.reported(3).await;
    assert_eq!(stage.web.ask(&format!("dial('{OLD6}')")), format!("{WEB6} {OLD6} {PORT}"));
    assert_eq!(stage.web.ask("say(70000)"), "70000");
    assert_eq!(old.ask(&format!("dial('{SERVICE6}')")), "EPERM", "who has no address of IPv6 calls nobody by it");
}

/// A denied node's endpoints are out of the kernel at once, before any install; and open connections end.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn denials_and_a_dead_agent_refuse_at_once() {
    let mut stage = Stage::set(63, 2).await;
    stage.apply(&[stage.open()]).await;
    stage.svids(&["web", "db"]);
    stage.reported(2).await;
    let dial = format!("dial('{DB6}')");
    assert_eq!(stage.web.ask(&dial), format!("{WEB6} {DB6} {PORT}"));
    assert_eq!(stage.web.ask("say(5)"), "5");

    let denied = v1::NodeDenial { trust_domain: "west".into(), node: stage.cell.node().to_string(), generation: 1 };
    let begun = Instant::now();
    let offer = |stage: &Stage, revision: u64, denied: &[v1::NodeDenial]| {
        let list = |_: &Node| Denials::parse(Revision(revision), denied, &[]).unwrap();
        stage.nodes.iter().for_each(|node| assert!(node.denials.offer(list(node))));
    };
    offer(&stage, stage.revision + 1, &[denied]);
    assert_eq!(stage.web.ask("say(5)"), "broken off", "cut");
    while stage.web.ask(&dial) != "EPERM" {
        assert!(begun.elapsed() < SOON, "never denied");
    }
    println!("denied in the kernel and cut after {:?}", begun.elapsed());
    let revision = stage.revision + 2;
    offer(&stage, revision, &[]);
    stage.revision = revision;
    stage.apply(&[stage.open()]).await;
    assert_eq!(stage.web.ask(&dial), format!("{WEB6} {DB6} {PORT}"), "trusted again");

    // Its listener is gone with it: what the kernel would let pass finds nobody, whoever listens there.
    stage.nodes.clear();
    tokio::time::sleep(Duration::from_millis(300)).await;
    let begun = Instant::now();
    while stage.web.ask(&dial) != "ECONNREFUSED" {
        assert!(begun.elapsed() < SOON, "never refused");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
