//! Two pods of one node: the agent says that they may speak directly, carries nothing of it, tells of it, and ends it when it is
//! denied. Their wires lead nowhere but to the packet programs. Needs root and fails without it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

#[allow(dead_code, reason = "other tests use the rest")]
#[path = "support/ground.rs"]
mod ground;
mod support;

use ambit_agent::denials::Denials;
use ambit_agent::metrics::METRICS;
use ambit_agent::staleness::Worth;
use ambit_agent::view::View;
use ambit_identity::svid::Presented;
use ambit_model::Revision;
use ambit_proto::v1;
use ground::{Ground, Node, SOON, ip};
use rustls_pki_types::CertificateDer;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::Ipv4Addr;
use std::process::{ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use support::told::Told;
use support::{Cell, allow};
use tokio::net::TcpListener;

const PORT: u16 = 8080;
/// From a word of the cell to the end of what is open: issue 6.
const CUT_MAX: Duration = Duration::from_millis(500);

/// Answers each line with what the expression gives.
const WORKLOAD: &str = r#"
import errno, os, socket, sys, threading, time
def told(e): return errno.errorcode.get(e.errno, 'timed out') if e.errno else 'timed out'
peers = []
def sender(c):
    # Who sends, by the kernel's table of sockets: getpeername() is told who calls, whoever carries it.
    own = str(os.fstat(c.fileno()).st_ino)
    for line in open('/proc/self/net/tcp'):
        words = line.split()
        if words[9] == own: return socket.inet_ntoa(bytes.fromhex(words[2][:8])[::-1])
def serve(at):
    listening = socket.create_server((at, 8080))
    def echo(c):
        try:
            while data := c.recv(65536): c.sendall(data)
        except OSError: pass
        c.close()
    def accept():
        while True:
            c, _ = listening.accept(); peers.append(sender(c))
            threading.Thread(target=echo, args=(c,), daemon=True).start()
    threading.Thread(target=accept, daemon=True).start()
    return 'ok'
def dial(to):
    global s
    s = socket.socket(); s.settimeout(2)
    try: s.connect((to, 8080)); return 'ok'
    except OSError as e: return told(e)
def say(bytes):
    try:
        s.sendall(bytes); got = b''
        while len(got) < len(bytes):
            more = s.recv(65536)
            if not more: return 'ended'
            got += more
        return 'ok'
    except OSError as e: return told(e)
def until_cut():
    end = time.time() + 5
    while time.time() < end and say(b'x' * 64) == 'ok': time.sleep(0.001)
    return time.time_ns() // 1000
def close(): s.close(); return 'ok'
for line in sys.stdin: print(eval(line), flush=True)
"#;

struct Workload {
    lines: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Workload {
    fn start(ground: &mut Ground, pod: &str, pid: u32) -> Workload {
        let mut command = ground.command(pod, pid, &["python3", "-c", WORKLOAD]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let parts = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        ground.children.push(child);
        Workload { lines: parts.0, answers: parts.1 }
    }

    fn ask(&mut self, what: &str) {
        writeln!(self.lines, "{what}").unwrap();
    }

    fn answer(&mut self) -> String {
        let mut line = String::new();
        self.answers.read_line(&mut line).unwrap();
        line.trim().to_owned()
    }

    fn says(&mut self, what: &str) -> String {
        self.ask(what);
        self.answer()
    }
}

/// `web` may call `db`, of the same node.
struct Stage {
    ground: Ground,
    cell: Cell,
    entries: [v1::Entry; 2],
    at: [Ipv4Addr; 2],
    web: Workload,
    db: Workload,
    revision: u64,
    /// Who is in which network namespace.
    pids: [u32; 2],
}

impl Stage {
    fn set(third: u8) -> Stage {
        let (mut ground, mut cell) = (Ground::make(), Cell::founded("west", 1));
        let entries = ["web", "db"].map(|name| cell.entry(name, &[&format!("cgroup:{name}")], &[]));
        let at = [11, 12].map(|last| Ipv4Addr::new(10, 200, third, last));
        let pids = [ground.pod("web", at[0]), ground.pod("db", at[1])];
        for (pid, at) in pids.iter().zip(at) {
            ip(*pid, &format!("addr del {at}/32 dev lo"));
            ip(*pid, &format!("addr add {at}/24 dev eth0"));
            // The node's end, which is joined with nothing.
            let up = ["link", "set", &format!("at{pid}"), "up"].map(str::to_owned);
            assert!(Command::new("ip").args(up).status().unwrap().success());
        }
        let (web, mut db) = (Workload::start(&mut ground, "web", pids[0]), Workload::start(&mut ground, "db", pids[1]));
        assert_eq!(db.says(&format!("serve('{}')", at[1])), "ok");
        Stage { ground, cell, entries, at, web, db, revision: 0, pids }
    }

    fn view(&mut self, allowed: bool) -> Arc<View> {
        self.revision += 1;
        let cell = &self.cell;
        let policy = allow("db", "spiffe://west/db", "spiffe://west/web", &[PORT]);
        let number = |name, number| v1::NumericIdentity { spiffe_id: cell.id(name), number };
        cell.view(v1::Slice {
            entries: self.entries.to_vec(),
            identities: vec![number("web", 256), number("db", 257)],
            endpoints: vec![v1::Endpoint {
                spiffe_id: cell.id("db"),
                address: self.at[1].to_string(),
                cluster: "west".into(),
                node_address: "127.0.0.1".into(),
                node: cell.node().to_string(),
                generation: 1,
            }],
            policies: if allowed { vec![policy] } else { vec![] },
            callers: vec![v1::NodeAddress {
                trust_domain: "west".into(),
                node: cell.node().to_string(),
                generation: 1,
                address: "127.0.0.1".into(),
            }],
            ..cell.slice(self.revision, &[])
        })
    }

    async fn start(&self) -> Node {
        Node::start(&self.ground, &self.cell, TcpListener::bind("127.0.0.1:0").await.unwrap()).await
    }

    /// New SVIDs for both, as `svids` keeps them; gives web's serial and who signed it.
    fn give_svids(&mut self, node: &Node) -> Presented {
        let svids: BTreeMap<_, _> = ["web", "db"].map(|e| (e.parse().unwrap(), Ok(self.cell.svid(e)))).into();
        let web = svids[&"web".parse().unwrap()].as_ref().unwrap();
        let chain: Vec<_> = web.chain_der.iter().cloned().map(CertificateDer::from).collect();
        node.issued.set_svids(svids);
        Presented::of(&chain).unwrap()
    }

    /// Dials until a connection goes directly, as `db` sees by who calls; those before went through the agent.
    fn dial_directly(&mut self) {
        let (web, db) = (self.at[0].to_string(), self.at[1].to_string());
        let begun = Instant::now();
        loop {
            let said = [format!("dial('{db}')"), "say(b'hello')".to_owned()].map(|what| self.web.says(&what));
            if said == ["ok", "ok"] && self.db.says("peers[-1]") == web {
                return;
            }
            assert!(begun.elapsed() < SOON, "no connection went directly: {said:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Has the open connection used all the time, does `act`, and gives the time until it was cut.
    async fn cut_by(&mut self, act: impl AsyncFnOnce(&mut Stage)) -> Duration {
        self.web.ask("until_cut()");
        std::thread::sleep(Duration::from_millis(50));
        let begun = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_micros();
        act(self).await;
        let at: u128 = self.web.answer().parse().unwrap();
        Duration::from_micros(u64::try_from(at.checked_sub(begun).expect("cut before")).unwrap())
    }
}

/// Figures are the process's: held by whoever counts what the agent carried, or has it carry anything.
static CARRIED: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

fn count(direction: &'static str) -> f64 {
    METRICS.connections.value([direction, "ok"])
}

async fn until(what: &str, holds: impl Fn() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < SOON, "never {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pods_of_a_node_speak_directly_until_they_are_denied() {
    let told = Told::begin();
    let _alone = CARRIED.lock().await;
    let mut stage = Stage::set(21);
    let mut node = stage.start().await;
    let open = stage.view(true);
    node.apply(open).await;
    // Without an SVID the agent carries nothing, and nothing goes past it.
    let to = stage.at[1];
    let _ = stage.web.says(&format!("dial('{to}')"));
    assert_ne!(stage.web.says("say(b'hello')"), "ok");
    assert_eq!(stage.db.says("peers"), "[]");
    let first = stage.give_svids(&node);
    stage.dial_directly();
    // Counted within a second.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert!(count("direct") >= 1.0);
    let (direct, inbound) = (count("direct"), count("inbound"));
    for _ in 0..20 {
        assert_eq!(stage.web.says(&format!("dial('{to}')")), "ok");
        assert_eq!(stage.web.says("say(b'direct')"), "ok");
        assert_eq!(stage.web.says("close()"), "ok");
    }
    until("all counted", || count("direct") >= direct + 20.0).await;
    assert_eq!((count("direct"), count("inbound")), (direct + 20.0, inbound), "the agent carried none of them");
    let is_told = |r: &&BTreeMap<&str, String>| r["direction"] == "\"direct\"" && r["sent"] == "7";
    let records = || told.0.lock().unwrap().iter().filter(is_told).cloned().collect::<Vec<_>>();
    until("told", || records().len() >= 20).await;
    let records = records();
    assert_eq!(records.len(), 20, "each once");
    let (r, at) = (&records[0], format!("{}:{PORT}", stage.at[1]));
    let words = ["source", "destination", "to", "flags", "received"].map(|field| r[field].as_str());
    assert_eq!(words, ["spiffe://west/web", "spiffe://west/db", &at, "\"-\"", "7"], "six bytes and a FIN each way");

    // A policy is withdrawn.
    stage.dial_directly();
    let shut = stage.view(false);
    let by_policy = stage
        .cut_by(async |_| {
            let _: Duration = node.apply(shut).await;
        })
        .await;
    assert_eq!(stage.web.says(&format!("dial('{to}')")), "EPERM");
    let cut = |r: &BTreeMap<&str, String>| r["direction"] == "\"direct\"" && r["flags"] == "\"UAEX\"";
    until("told", || told.0.lock().unwrap().iter().any(cut)).await;

    // An SVID is revoked that was replaced meanwhile: what began under it ends, and only that.
    let open = stage.view(true);
    node.apply(open).await;
    stage.dial_directly();
    let second = stage.give_svids(&node);
    let signed_by = first.above[0].clone();
    let deny = |presented: &Presented, revision: u64| {
        let leaf = v1::LeafDenial {
            trust_domain: "west".into(),
            authority: signed_by.clone(),
            serial: presented.serial.clone(),
        };
        Denials::parse(Revision(revision), &[], &[]).unwrap().with_svids(&[], &[leaf]).unwrap()
    };
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(stage.web.says("say(b'renewed')"), "ok");
    let list = deny(&first, stage.revision);
    let by_svid = stage.cut_by(async |_| assert!(node.denials.offer(list))).await;
    stage.dial_directly();
    let list = deny(&second, stage.revision);
    let by_own_svid = stage.cut_by(async |_| assert!(node.denials.offer(list))).await;
    let _ = stage.web.says(&format!("dial('{to}')"));
    assert_ne!(stage.web.says("say(b'hello')"), "ok", "not through the agent either");
    let peers = stage.db.says("len(peers)");
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(stage.db.says("len(peers)"), peers);

    // An identity is barred; this very node is put out.
    stage.give_svids(&node);
    stage.dial_directly();
    let id = v1::IdDenial { spiffe_id: stage.cell.id("web"), up_to: vec![0; 16], barred: true };
    let list = |ids: &[v1::IdDenial], revision| {
        Denials::parse(Revision(revision), &[], &[]).unwrap().with_svids(ids, &[]).unwrap()
    };
    let barred = list(&[id], stage.revision);
    let by_identity = stage.cut_by(async |_| assert!(node.denials.offer(barred))).await;
    assert!(node.denials.offer(list(&[], stage.revision)));
    stage.dial_directly();
    let by_node = stage.cut_by(async |_| node.denials.set_out(true)).await;
    node.denials.set_out(false);

    // The cell is not heard: what is open goes on and nothing begins directly, or nothing goes on.
    stage.dial_directly();
    node.denials.set_worth(Worth::Open);
    std::thread::sleep(Duration::from_millis(1_500));
    assert_eq!(stage.web.says("say(b'open')"), "ok");
    let _ = stage.web.says(&format!("dial('{to}')"));
    assert_ne!(stage.web.says("say(b'new')"), "ok", "not through the agent either");
    node.denials.set_worth(Worth::All);
    stage.dial_directly();
    let by_silence = stage.cut_by(async |_| assert!(node.denials.set_worth(Worth::Nothing))).await;
    node.denials.set_worth(Worth::All);

    // The pod's file goes: it is nobody.
    stage.dial_directly();
    let file = stage.ground.dir.join("pods/web.json");
    let by_pod = stage.cut_by(async |_| std::fs::remove_file(&file).unwrap()).await;
    println!(
        "open connection cut after: policy {by_policy:?}, replaced SVID {by_svid:?}, SVID {by_own_svid:?}, identity \
         {by_identity:?}, node {by_node:?}, silence {by_silence:?}, pod {by_pod:?}"
    );
    for took in [by_policy, by_svid, by_own_svid, by_identity, by_node, by_silence, by_pod] {
        assert!(took < CUT_MAX, "{took:?}");
    }
}

/// Routes may come after a pod is there. Until then the agent carries.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_goes_directly_once_it_has_a_way() {
    let _alone = CARRIED.lock().await;
    let mut stage = Stage::set(23);
    let (route, to) = (format!("10.200.23.0/24 dev eth0 src {}", stage.at[0]), stage.at[1]);
    ip(stage.pids[0], &format!("route del {route}"));
    let open = stage.view(true);
    let mut node = stage.start().await;
    node.apply(open).await;
    stage.give_svids(&node);
    let begun = Instant::now();
    loop {
        let said = [format!("dial('{to}')"), "say(b'hello')".to_owned()].map(|what| stage.web.says(&what));
        if said == ["ok", "ok"] {
            break;
        }
        assert!(begun.elapsed() < SOON, "not carried: {said:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(stage.db.says("peers[-1]").starts_with("127."), "{}", stage.db.says("peers[-1]"));
    ip(stage.pids[0], &format!("route add {route}"));
    tokio::task::block_in_place(|| stage.dial_directly());
}

/// What is open outlives the agent, is not touched by the next one, and is cut by it.
#[test]
fn a_new_agent_takes_over_what_goes_directly() {
    let mut stage = Stage::set(22);
    let to = stage.at[1];
    let runtime = || tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let first = runtime();
    let open = stage.view(true);
    first.block_on(async {
        let mut node = stage.start().await;
        node.apply(open).await;
        stage.give_svids(&node);
        tokio::task::block_in_place(|| stage.dial_directly());
    });
    first.shutdown_timeout(SOON);
    assert_eq!(stage.web.says("say(b'no agent')"), "ok");

    let second = runtime();
    let open = stage.view(true);
    let shut = stage.view(false);
    second.block_on(async {
        let mut node = stage.start().await;
        assert_eq!(stage.web.says("say(b'before its view')"), "ok");
        node.apply(open).await;
        tokio::time::sleep(Duration::from_millis(1500)).await;
        assert_eq!(stage.web.says("say(b'before its SVIDs')"), "ok");
        stage.give_svids(&node);
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert_eq!(stage.web.says("say(b'after')"), "ok");
        let took = stage
            .cut_by(async |_| {
                let _: Duration = node.apply(shut).await;
            })
            .await;
        assert!(took < CUT_MAX, "{took:?}");
        assert_eq!(stage.web.says(&format!("dial('{to}')")), "EPERM");
    });
    second.shutdown_timeout(SOON);
}
