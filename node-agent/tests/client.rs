//! Whom an unmodified server sees for its client: two nodes with real kernel parts, pods in namespaces of their own, and real
//! tunnels between their agents. Needs root and fails without it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

#[allow(dead_code, reason = "other tests use the rest")]
#[path = "support/ground.rs"]
mod ground;
mod support;

use ambit_agent::hbone::{self, Dial, Dialed, Mode, Origin};
use ambit_agent::health;
use ambit_agent::metrics::METRICS;
use ambit_agent::native::{self, Answer, Open};
use ambit_agent::said::{Said, Start};
use ambit_agent::tls;
use ambit_proto::v1;
use ground::{Ground, Node, SOON};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::process::{ChildStdin, ChildStdout, Stdio};
use std::sync::Arc;
use support::{Cell, allow};
use tokio::net::TcpListener;
use tokio::time::timeout;

/// Of an IPv4 listener, and of one for both families.
const PORTS: [u16; 2] = [8080, 8081];
const SERVICE: Ipv4Addr = Ipv4Addr::new(10, 99, 7, 5);

/// A server that answers each connection with what accept() and getpeername() say of it.
const SERVER: &str = r#"
import socket, threading
def serve(s):
    while True:
        c, peer = s.accept()
        again = c.getpeername()
        c.sendall(f'{peer[0]}|{peer[1]}|{again[0]}|{again[1]}\n'.encode()); c.close()
both = socket.socket(socket.AF_INET6); both.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0); both.bind(('::', 8081)); both.listen()
for s in [socket.create_server(('0.0.0.0', 8080)), both]: threading.Thread(target=serve, args=(s,)).start()
print('ready', flush=True)
"#;

/// Calls whom it is told, and says from which address it did, and what it was answered.
const CALLER: &str = r#"
import socket, sys
def call(to, port):
    try:
        s = socket.create_connection((to, port), 5); own = s.getsockname()
        return f'{own[0]}|{own[1]} ' + s.makefile().readline().strip()
    except OSError as e: return type(e).__name__
print('ready', flush=True)
for line in sys.stdin: print(eval(line), flush=True)
"#;

struct Program {
    lines: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Program {
    fn start(ground: &mut Ground, pod: &str, pid: u32, script: &str) -> Program {
        let mut command = ground.command(pod, pid, &["python3", "-c", script]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (lines, answers) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        ground.children.push(child);
        let mut program = Program { lines, answers };
        assert_eq!(program.answer(), "ready");
        program
    }
    fn answer(&mut self) -> String {
        let mut line = String::new();
        assert!(self.answers.read_line(&mut line).unwrap() > 0, "the program ended");
        line.trim().to_owned()
    }
    /// Its own address and port, and what the server saw, twice.
    fn calls(&mut self, to: Ipv4Addr, port: u16) -> (String, String, String) {
        writeln!(self.lines, "call('{to}', {port})").unwrap();
        let said = self.answer();
        let (own, seen) = said.split_once(' ').unwrap_or_else(|| panic!("{said}"));
        let words: Vec<&str> = seen.split('|').collect();
        let [accepted, accepted_port, named, named_port] = words[..] else { panic!("{said}") };
        (own.to_owned(), format!("{accepted}|{accepted_port}"), format!("{named}|{named_port}"))
    }
}

/// West's `web` on one node; east's `db`, and its `near`, on another.
struct Stage {
    web: Program,
    near: Program,
    db_at: Ipv4Addr,
    near_at: Ipv4Addr,
    web_at: Ipv4Addr,
    west_node: Node,
    east_node: Node,
    west: Cell,
    east: Cell,
    homes: [Ipv4Addr; 2],
    port: u16,
    _grounds: [Ground; 2],
}

impl Stage {
    async fn set(n: u8) -> Stage {
        let (mut west_ground, mut east_ground) = (Ground::make(), Ground::make());
        let (mut west, mut east) = (Cell::founded("west", 1), Cell::founded("east", 2));
        let homes = [1, 2].map(|node| Ipv4Addr::new(127, 0, 90 + node, n));
        let [web_at, db_at, near_at] = [11, 12, 13].map(|last| Ipv4Addr::new(10, 201, n, last));
        let web_entry = west.entry("web", &["cgroup:web"], &[]);
        let east_entries = ["db", "near"].map(|name| east.entry(name, &[&format!("cgroup:{name}")], &[]));
        let web_pid = west_ground.pod("web", web_at);
        let (db_pid, near_pid) = (east_ground.pod("db", db_at), east_ground.pod("near", near_at));
        let _server = Program::start(&mut east_ground, "db", db_pid, SERVER);
        let web = Program::start(&mut west_ground, "web", web_pid, CALLER);
        let near = Program::start(&mut east_ground, "near", near_pid, CALLER);
        let hbone = TcpListener::bind((homes[1], 0)).await.unwrap();
        let port = hbone.local_addr().unwrap().port();
        let mut east_node = Node::start(&east_ground, &east, hbone).await;
        let hbone = TcpListener::bind((homes[0], port)).await.unwrap();
        let mut west_node = Node::start(&west_ground, &west, hbone).await;

        let number = |id: String, number| v1::NumericIdentity { spiffe_id: id, number };
        let db = v1::Endpoint {
            spiffe_id: east.id("db"),
            address: db_at.to_string(),
            cluster: "east".into(),
            node_address: homes[1].to_string(),
            node: east.node().to_string(),
            generation: 1,
        };
        let caller = |cell: &Cell, home: Ipv4Addr| v1::NodeAddress {
            trust_domain: cell.td.to_string(),
            node: cell.node().to_string(),
            generation: 1,
            address: home.to_string(),
        };
        let policies = vec![
            allow("web", "spiffe://east/db", "spiffe://west/web", &PORTS),
            allow("near", "spiffe://east/db", "spiffe://east/near", &PORTS),
        ];
        let services = PORTS.map(|port| v1::Service {
            origin: "east".into(),
            name: format!("db-{port}"),
            address: SERVICE.to_string(),
            port: u32::from(port),
            backends: vec![east.id("db")],
            order: "local-first".into(),
            weights: vec![],
        });
        let (w, e) = (
            v1::Slice {
                entries: vec![web_entry],
                identities: vec![number(west.id("web"), 256), number(east.id("db"), 257)],
                endpoints: vec![db.clone()],
                policies: policies.clone(),
                services: services.to_vec(),
                ..west.slice(1, &[&east])
            },
            v1::Slice {
                entries: east_entries.to_vec(),
                identities: vec![number(west.id("web"), 256), number(east.id("db"), 257), number(east.id("near"), 258)],
                // A workload elsewhere that db may call.
                endpoints: vec![
                    db.clone(),
                    v1::Endpoint { spiffe_id: east.id("near"), address: "10.201.77.1".into(), ..db },
                ],
                policies,
                services: services.to_vec(),
                callers: vec![caller(&west, homes[0]), caller(&east, homes[1])],
                ..east.slice(1, &[&west])
            },
        );
        let (w, e) = (west.view(w), east.view(e));
        west_node.issued.set_svids(BTreeMap::from([("web".parse().unwrap(), Ok(west.svid("web")))]));
        east_node
            .issued
            .set_svids(BTreeMap::from(["db", "near"].map(|entry| (entry.parse().unwrap(), Ok(east.svid(entry))))));
        west_node.apply(w).await;
        east_node.apply(e).await;
        west_node.carries(&[web_at]).await;
        east_node.carries(&[db_at, near_at]).await;
        let _grounds = [west_ground, east_ground];
        Stage { web, near, db_at, near_at, web_at, west_node, east_node, west, east, homes, port, _grounds }
    }

    /// A tunnel to db's node in web's name, from web's node, which is offered these ways to speak.
    async fn dial(&self, alpn: &[&[u8]]) -> Dialed {
        let plane = self.west_node.plane.borrow().clone().unwrap();
        let (web, db) = (self.west.id("web").parse().unwrap(), self.east.id("db").parse().unwrap());
        let (name, mut config) = health::credentials(&plane, &web, &db).unwrap();
        Arc::make_mut(&mut config).alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
        let node = SocketAddr::from((self.homes[1], self.port));
        let (holder, trust) = (self.east.node(), plane.trust.current());
        let dial = Dial { from: Origin::Node(self.homes[0]), node, holder, name, config, trust };
        hbone::dial(dial, Mode::Any).await.unwrap()
    }

    /// What db sees of a connection that web's agent, gone wrong, says begins there.
    async fn seen(&self, alpn: &[&[u8]], said: Option<SocketAddrV4>) -> String {
        let to = SocketAddrV4::new(self.db_at, PORTS[0]);
        let bytes = match self.dial(alpn).await {
            Dialed::Native(mut tunnel) => {
                let open = Open { to: to.into(), prompt: false, trace: None, from: said, first: vec![] };
                let answer = timeout(SOON, native::open(&mut tunnel.secured, &open)).await.unwrap().unwrap();
                assert_eq!(answer, Answer::Opened);
                native_bytes(&mut tunnel.secured).await
            }
            Dialed::Hbone(tunnel) => {
                let start = said.map(|from| Start { trace: String::new(), from: Some(from) });
                let (web, cluster) = (self.west.id("web").parse().unwrap(), "west".parse().unwrap());
                let said = start.map_or_else(Said::default, |start| Said::of(&web, &cluster, &start));
                let lease = tunnel.lease().unwrap();
                let (_send, mut recv) = lease.open(to, &said).await.unwrap();
                timeout(SOON, recv.data()).await.unwrap().unwrap().unwrap().to_vec()
            }
        };
        let line = String::from_utf8(bytes).unwrap();
        let words: Vec<&str> = line.trim().split('|').collect();
        assert_eq!((words[0], words[1]), (words[2], words[3]), "accept() and getpeername() agree");
        format!("{}:{}", words[0], words[1])
    }
}

/// The connection's first DATA frame.
async fn native_bytes(tunnel: &mut ambit_agent::secure::Secured) -> Vec<u8> {
    use tokio::io::AsyncReadExt;
    loop {
        if let Some(at) = tunnel.opener.next_record().unwrap() {
            let frame = tunnel.opener.bytes()[at].to_vec();
            assert_eq!(frame[0], 3, "DATA");
            return frame[1..].to_vec();
        }
        let read = timeout(SOON, tunnel.tcp.read(tunnel.opener.room())).await.unwrap().unwrap();
        assert!(read > 0, "the tunnel ended");
        tunnel.opener.filled(read);
    }
}

fn count(result: &'static str) -> f64 {
    METRICS.clients.value([result])
}

/// Figures are the process's.
static COUNTED: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_sees_who_calls_from_another_node_and_by_its_service_from_its_own() {
    let _alone = COUNTED.lock().await;
    let mut stage = Stage::set(51).await;
    let figures = || ["shown", "disbelieved", "no_room"].map(count);
    let before = figures();
    for round in 0..20 {
        for port in PORTS {
            let mapped = if port == PORTS[0] { "" } else { "::ffff:" };
            for to in [stage.db_at, SERVICE] {
                let (own, accepted, named) = stage.web.calls(to, port);
                assert!(own.starts_with(&format!("{}|", stage.web_at)), "{own}");
                let expected = format!("{mapped}{own}");
                assert_eq!((&accepted, &named), (&expected, &expected), "round {round}, {to}:{port}");
            }
            // The agent carries what goes by a service's address, also within a node.
            let (own, accepted, named) = stage.near.calls(SERVICE, port);
            assert!(own.starts_with(&format!("{}|", stage.near_at)), "{own}");
            let expected = format!("{mapped}{own}");
            assert_eq!((&accepted, &named), (&expected, &expected), "round {round}, near, port {port}");
        }
    }
    let [shown, disbelieved, no_room] = before;
    assert_eq!(figures(), [shown + 120.0, disbelieved, no_room]);
    stage.east_node.kernel.sweep_clients().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lying_node_is_not_believed_and_older_agents_are_served_as_ever() {
    let _alone = COUNTED.lock().await;
    let stage = Stage::set(52).await;
    const NEW: &[&[u8]] = &[native::ALPN];
    const FORMER: &[&[u8]] = &[native::ALPN_BEFORE, tls::HBONE];
    const HBONE: &[&[u8]] = &[tls::HBONE];
    let web = SocketAddrV4::new(stage.web_at, 41_001);
    // What it may say: nobody's address here.
    for way in [NEW, HBONE] {
        assert_eq!(stage.seen(way, Some(web)).await, web.to_string());
    }
    let lies = [
        SocketAddrV4::new("10.201.77.1".parse().unwrap(), 41_001),
        SocketAddrV4::new(stage.db_at, 41_001),
        SocketAddrV4::new(stage.near_at, 41_001),
        SocketAddrV4::new(SERVICE, 41_001),
        SocketAddrV4::new(stage.homes[0], 41_001),
        SocketAddrV4::new(Ipv4Addr::LOCALHOST, 41_001),
        SocketAddrV4::new(stage.web_at, 0),
    ];
    for way in [NEW, HBONE] {
        for lie in lies {
            let before = count("disbelieved");
            let seen = stage.seen(way, Some(lie)).await;
            assert!(seen.starts_with("127."), "{lie}: {seen}");
            assert_eq!(count("disbelieved"), before + 1.0, "{lie}");
        }
    }
    // Who says nothing: an agent of before, which does not know the field and is not sent one, and one that does not tell.
    for (way, said) in [(FORMER, Some(web)), (NEW, None), (HBONE, None)] {
        let before = count("unsaid");
        let seen = stage.seen(way, said).await;
        assert!(seen.starts_with("127."), "{seen}");
        assert_eq!(count("unsaid"), before + 1.0);
    }
}
