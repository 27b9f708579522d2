//! Connections between two pods of one node: they go directly, by stamp, and nothing else does. Prints its table.

use crate::LEASE;
use crate::rig::{self, CLIENT, FAR, NEAR, OTHER, Rig, SERVER, tables};
use crate::support::{POD, Worker, ends_sockets, in_netns, run};
use crate::wires::{Elsewhere, inside};
use ambit_ebpf::{Capacity, Direct, Ended, Kernel, Local, Options, Reason};
use libbpf_rs::{MapCore, MapFlags, MapHandle};
use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

/// A governed server of the other pod: echoes, and answers questions about whom it saw.
const SERVE: &str = r#"
import threading
peers, ended = [], []
listening = socket.create_server(('0.0.0.0', 7070), backlog=128)
def echo(c):
    try:
        while data := c.recv(65536): c.sendall(data)
        ended.append('in order')
    except OSError as e: ended.append(errno.errorcode[e.errno])
    c.close()
def serve():
    while True:
        c, peer = listening.accept(); peers.append('%s:%d' % peer)
        threading.Thread(target=echo, args=(c,), daemon=True).start()
threading.Thread(target=serve, daemon=True).start()
print('ready', flush=True)
for line in sys.stdin: print(eval(line), flush=True)
"#;

/// Who calls; asked by expression. Each connection is kept under a name.
const CALL: &str = r#"
s = {}
def told(e): return errno.errorcode.get(e.errno, 'timed out') if e.errno else 'timed out'
def dial(name, port=7070, to=None, bind=None, family=socket.AF_INET, timeout=0.7):
    c = s[name] = socket.socket(family); c.settimeout(timeout)
    try:
        if bind: c.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1); c.bind(bind)
        c.connect((to or NEAR, port))
        return 'ok'
    except OSError as e: return told(e)
def ends(name): return '%s:%d %s:%d' % (s[name].getsockname()[:2] + s[name].getpeername()[:2])
def port(name): return s[name].getsockname()[1]
def say(name, mark, timeout=0.7):
    c = s[name]; c.settimeout(timeout)
    try:
        c.sendall(mark)
        got = b''
        while len(got) < len(mark):
            more = c.recv(65536)
            if not more: return 'ended'
            got += more
        return 'ok' if got == mark else 'other bytes'
    except OSError as e: return told(e)
def close(name): s.pop(name).close(); return 'ok'
def many(n):
    out = {}
    for i in range(n):
        r = dial('x'); r = say('x', b'many') if r == 'ok' else r; close('x')
        out[r] = out.get(r, 0) + 1
    return out
def fastopen(name, mark):
    c = s[name] = socket.socket()
    for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
        c.setsockopt(socket.SOL_SOCKET, option, struct.pack('ll', 1, 0))
    try:
        c.sendto(mark, 0x20000000, (NEAR, 7070)); return c.recv(100) == mark and 'ok'
    except OSError as e: return told(e)
def deferred(name):
    c = s[name] = socket.socket(); c.settimeout(0.7)
    c.setsockopt(socket.IPPROTO_TCP, 30, 1) # TCP_FASTOPEN_CONNECT: the SYN waits for the first bytes
    try: c.connect((NEAR, 7070)); return 'ok'
    except OSError as e: return told(e)
for line in sys.stdin: print(eval(line), flush=True)
"#;

fn ask(worker: &mut Worker, what: &str) -> String {
    worker.ask(what);
    worker.answer()
}

struct Pair {
    // Whoever lives in its cgroups ends before the node does.
    client: Worker,
    server: Worker,
    kernel: Kernel,
    rig: Rig,
    rows: Vec<(String, String)>,
}

impl Pair {
    /// Both pods are governed, `CLIENT` may call `SERVER` but on 9090, and both may speak directly.
    fn governed(mut rig: Rig, options: &Options) -> Pair {
        let kernel = Kernel::open(options).unwrap();
        rig.govern(&kernel);
        rig.govern_near(&kernel);
        kernel.install(&tables(SERVER)).unwrap();
        for (name, identity) in [("client", CLIENT), ("server", SERVER)] {
            kernel.set_workload(rig.node.cgroup(name), identity).unwrap();
        }
        kernel.renew_lease(LEASE).unwrap();
        let near = format!("/proc/{}/ns/net", rig.near());
        let mut server = rig.node.worker_in(&near, Some("server"), SERVE);
        assert_eq!(server.answer(), "ready");
        let client = rig.node.worker("client", &format!("NEAR, FAR = '{NEAR}', '{FAR}'\n{CALL}"));
        let mut pair = Pair { rig, kernel, client, server, rows: vec![] };
        pair.say_locals(SERVER, true);
        pair.flows();
        pair
    }

    fn say_locals(&mut self, near: u32, open: bool) {
        let locals = self.locals(near, open);
        self.kernel.set_locals(&locals).unwrap();
        assert!(!self.kernel.set_locals(&locals).unwrap(), "nobody said anything else meanwhile");
    }

    fn locals(&self, near: u32, open: bool) -> [Local; 2] {
        self.rig.locals(&self.kernel, near, open)
    }

    fn flows(&self) -> Direct {
        self.kernel.direct_flows().unwrap()
    }

    fn call(&mut self, what: &str) -> String {
        ask(&mut self.client, what)
    }

    /// How many connections the server has accepted.
    fn accepted(&mut self) -> usize {
        std::thread::sleep(Duration::from_millis(50));
        ask(&mut self.server, "len(peers)").parse().unwrap()
    }

    /// What somebody outside the mesh in the pod of this process does: frames with `mark` at the far machine and the other pod.
    fn forged(&mut self, from: u32, mark: &str, act: &str) -> [usize; 2] {
        self.rig.sent(from, mark, act);
        self.rig.seen_at(mark)
    }

    fn row(&mut self, name: &str, told: impl Into<String>, expected: &str) {
        let told = told.into();
        assert_eq!(told, expected, "{name}");
        self.rows.push((name.to_owned(), told));
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        self.rows.iter().for_each(|(name, told)| println!("{name:62} {told}"));
    }
}

fn segment(from: u16, to: u16, flags: u8, after: &str) -> String {
    format!("struct.pack('!HHIIBBHHH', {from}, {to}, 1, 1, 0x50, {flags}, 1000, 0, 0) + {after}")
}

/// What is forged in the tuple of a connection from `port`, of the pod, to the other pod.
fn forgeries(port: u16, far_mac: &str) -> Vec<(&'static str, String)> {
    let data = segment(port, 7070, 0x18, "MARK");
    let syn = segment(port, 7070, 2, "MARK");
    vec![
        ("forged: a packet socket", format!("frame(0x0800, ip(6, {data}, to=NEAR))")),
        (
            "forged: a packet socket, to the far machine's MAC",
            format!("frame(0x0800, ip(6, {data}, to=NEAR), to={far_mac})"),
        ),
        ("forged: a raw TCP socket", format!("raw(6, NEAR, {data})")),
        ("forged: a SYN with bytes", format!("frame(0x0800, ip(6, {syn}, to=NEAR))")),
        ("forged: a fragment", format!("frame(0x0800, ip(6, {data}, to=NEAR, fragment=0x2000))")),
    ]
}

#[test]
fn between_pods_of_a_node_what_is_stamped_passes_and_nothing_else() {
    let mut rig = Rig::new();
    let (pod, far_mac) = (rig.node.pod.id(), rig.far_mac());
    for (n, (name, act)) in forgeries(4000, &far_mac).iter().enumerate() {
        assert!(rig.sent(pod, &format!("CONTROL{n}"), act) > 0, "{name} is not seen where nothing is governed");
    }
    let options = rig.options();
    let mut pair = Pair::governed(rig, &options);
    let far = pair.rig.far();

    let told = pair.call("dial('a')");
    pair.row("an allowed connection", told, "ok");
    let told = pair.call("say('a', b'DIRECT00')");
    pair.row("  its bytes are echoed", told, "ok");
    let ends = pair.call("ends('a')");
    let port: u16 = pair.call("port('a')").parse().unwrap();
    pair.row("  as the caller sees its ends", ends, &format!("{POD}:{port} {NEAR}:7070"));
    let peer = ask(&mut pair.server, "peers[-1]");
    pair.row("  as the called one sees the caller", peer, &format!("{POD}:{port}"));
    let carried = pair.rig.carried(0);
    pair.row("  agents carried", carried.to_string(), "0");
    let seen = format!("{:?}", pair.rig.seen_at("DIRECT00"));
    pair.row("  frames at the far machine, at the other pod", seen, "[0, 1]");
    let counters = pair.kernel.counters().unwrap();
    assert_eq!((counters.direct, counters.allowed), (1, 1));
    let flows = pair.flows();
    let [flow] = flows.flows.as_slice() else { panic!("{flows:?}") };
    assert_eq!((flow.caller, flow.called, flow.closed), (CLIENT, SERVER, None));
    assert!(flow.from == std::net::SocketAddrV4::new(POD, port) && flows.news.contains(&flow.opened));

    for (n, (name, act)) in forgeries(port, &far_mac).into_iter().enumerate() {
        let seen = pair.forged(pod, &format!("FORGED0{n}"), &act);
        pair.row(name, format!("{seen:?}"), "[0, 0]");
    }
    let act = format!("frame(0x0800, ip(6, {}, source='{POD}', to=NEAR))", segment(port, 7070, 0x18, "MARK"));
    let from_far = act.replace("NEAR", &format!("'{NEAR}'"));
    let seen = pair.forged(far, "FORGEDFA", &from_far);
    pair.row("forged: by the far machine, as the caller", format!("{seen:?}"), "[0, 0]");
    let mut in_pod = pair.rig.capture_in_pod();
    let near = pair.rig.near();
    let back =
        |to: &str| format!("frame(0x0800, ip(6, {}, source='{NEAR}', to='{to}'))", segment(7070, port, 0x18, "MARK"));
    pair.forged(near, "FORGEDBK", &back("10.99.0.1"));
    let seen = ask(&mut in_pod, "FORGEDBK");
    pair.row("forged: in the other pod, as the called one", seen, "0");
    let told = pair.call("say('a', b'DIRECT01')");
    pair.row("  the connection goes on", told, "ok");

    let script = format!("print(attempt('OUTSIDER', \"stream(('{NEAR}', 7070))\"))");
    let names = format!("FAR, POD, POD6 = '{FAR}', '{POD}', 'fd99::1'\n{}", crate::attempts::TOOLS);
    let path = format!("/proc/{pod}/ns/net");
    let told = pair.rig.node.python_in(&path, None, &format!("{names}\n{script}"));
    pair.row("an unstamped SYN, from outside the mesh", told, "timed out");
    let accepted = pair.accepted();
    assert_eq!(accepted, 1);
    let told = pair.call("dial('d', port=9090)");
    pair.row("a denied port", told, "EPERM");
    let start = Instant::now();
    let told = pair.call("dial('c', port=7071, timeout=3)");
    pair.row("a port where nobody listens", told, "ECONNREFUSED");
    assert!(start.elapsed() < Duration::from_secs(1));
    let told =
        pair.call("dial('m', to='::ffff:' + NEAR, family=socket.AF_INET6)") + " " + &pair.call("say('m', b'mapped')");
    pair.row("v4-mapped", told, "ok ok");
    let told = pair.call("fastopen('f', b'fast')");
    pair.row("TCP Fast Open", told, "ok");
    let told = pair.call("dial('b', bind=('10.99.0.1', 0))") + " " + &pair.call("say('b', b'bound')");
    pair.row("bound to the pod's own address", told, "ok ok");
    assert_eq!(pair.rig.carried(0), 0);
    let told = pair.call("dial('l', bind=('127.0.0.1', 0))");
    pair.row("bound to loopback: through the agent", told, "ok");
    assert_eq!((pair.rig.carried(1), pair.accepted()), (1, 4));

    // A stamp that is closed lets no new connection through, though its last packets pass.
    let told = pair.call("dial('o')") + " " + &pair.call("say('o', b'once')");
    let old: u16 = pair.call("port('o')").parse().unwrap();
    pair.call("s['o'].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))");
    let told = told + " " + &pair.call("close('o')");
    pair.row("a connection that is reset", told, "ok ok ok");
    let before = pair.accepted();
    let script = format!("print(attempt('OUTSIDER', \"stream(('{NEAR}', 7070), bind=('{POD}', {old}))\"))");
    let told = pair.rig.node.python_in(&path, None, &format!("{names}\n{script}"));
    pair.row("its ports, used again from outside the mesh", told, "timed out");
    assert_eq!(pair.accepted(), before);
    let told = pair.call(&format!("dial('o', bind=('{POD}', {old}))")) + " " + &pair.call("say('o', b'twice')");
    pair.row("its ports, used again by the workload", told, "ok ok");

    pair.kernel.drain_events(&mut |_| {}).unwrap();
    let told = pair.call("many(300)");
    pair.row("300 connections, one after the other", told, "{'ok': 300}");
    std::thread::sleep(Duration::from_millis(300));
    // (Of IPv6 the pod's kernel says something now and then.)
    let mut dropped = 0;
    let of_tcp = |event: &ambit_ebpf::Event| event.reason == Reason::ClearOutbound && event.address.port() != 0;
    pair.kernel.drain_events(&mut |event| dropped += usize::from(of_tcp(&event))).unwrap();
    assert_eq!(dropped, 0, "last packets were dropped");
    let (mut in_order, until) = (0, Instant::now() + Duration::from_secs(20));
    while in_order < 300 && Instant::now() < until {
        let flows = pair.flows();
        let ended = flows.flows.iter().filter(|f| f.closed.is_some_and(|at| flows.news.contains(&at)));
        in_order += ended.filter(|f| f.ended == Ended::InOrder && (f.sent, f.received) == (5, 5)).count();
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(in_order, 300, "each is told once, four bytes and a FIN each way");
    let flows = pair.flows();
    let ended = flows.flows.iter().filter(|f| f.closed.is_some_and(|at| flows.news.contains(&at))).count();
    assert!(ended == 0 && flows.flows.len() < 20, "told twice, or not forgotten: {ended}, {}", flows.flows.len());
    assert_eq!(pair.rig.seen_at("many")[0], 0);
}

#[test]
fn a_direct_connection_ends_when_it_is_denied_and_when_an_end_is_gone() {
    let rig = Rig::new();
    let options = rig.options();
    let mut pair = Pair::governed(rig, &options);
    let told = pair.call("dial('a')") + " " + &pair.call("say('a', b'CUT00000')");
    pair.row("before", told, "ok ok");

    // What the agent does: judges what is there by the new tables, takes the stamps away, ends the sockets.
    pair.kernel.install(&ambit_ebpf::Tables { verdicts: vec![], ..tables(SERVER) }).unwrap();
    let start = Instant::now();
    let flows = pair.flows().flows;
    pair.kernel.cut_direct(&flows).unwrap();
    let told = pair.call("say('a', b'CUT00001', 0.3)");
    pair.row("its stamp taken away", told, "timed out");
    assert_eq!(pair.rig.seen_at("CUT00001"), [0, 0]);
    let (pod, near) = (pair.rig.node.pod_netns(), pair.rig.near_netns());
    let start = start.max(Instant::now());
    for netns in [&pod, &near] {
        assert_eq!(pair.kernel.end_bypassing(netns.as_fd()).unwrap(), ends_sockets());
    }
    // Before Linux 6.5 they are left to their timeouts.
    if ends_sockets() {
        let told = pair.call("say('a', b'CUT00002')");
        let took = start.elapsed();
        pair.row("its sockets ended", told, "ECONNABORTED");
        // The agent is held to 500 ms; this loads the program anew for each end, on a machine that may be busy.
        assert!(took < Duration::from_secs(3), "{took:?}");
        std::thread::sleep(Duration::from_millis(50));
        let told = ask(&mut pair.server, "ended");
        pair.row("  at the other end", told, "['ECONNABORTED']");
    }
    let told = pair.call("dial('n')");
    pair.row("a new one", told, "EPERM");
    pair.kernel.install(&tables(SERVER)).unwrap();

    // With TCP Fast Open without a cookie connect() sends nothing yet.
    pair.rig.node.in_pod(|| std::fs::write("/proc/sys/net/ipv4/tcp_fastopen", "5").unwrap());
    let told = pair.call("deferred('e')") + " " + &pair.call("say('e', b'EARLY000')");
    pair.row("connected early, allowed until its first bytes", told, "ok ok");
    let told = pair.call("deferred('e')");
    pair.row("connected early, denied meanwhile", told, "ok");
    pair.kernel.install(&ambit_ebpf::Tables { verdicts: vec![], ..tables(SERVER) }).unwrap();
    let told = pair.call("say('e', b'EARLY001')");
    pair.row("  its first bytes", told, "timed out");
    assert_eq!(pair.rig.seen_at("EARLY001"), [0, 0]);
    pair.kernel.install(&tables(SERVER)).unwrap();

    // Closed for new ones: what is open goes on, new ones go through the agent.
    let told = pair.call("dial('a')") + " " + &pair.call("say('a', b'OPEN0000')");
    pair.row("allowed again", told, "ok ok");
    pair.say_locals(SERVER, false);
    let told = pair.call("say('a', b'OPEN0001')") + " " + &pair.call("dial('n')");
    pair.row("no new ones: the open one, a new one", told, "ok ok");
    assert_eq!(pair.rig.carried(1), 1, "the new one went through the agent");
    assert_eq!(pair.kernel.end_bypassing(pod.as_fd()).unwrap(), ends_sockets());
    let told = pair.call("say('a', b'OPEN0002')");
    pair.row("  what is stamped outlives a new guard", told, "ok");

    // Another is said to be there than the tables say.
    pair.say_locals(OTHER, true);
    let told = pair.call("dial('n')");
    pair.row("another identity at the address: through the agent", told, "ok");
    assert_eq!(pair.rig.carried(2), 2);
    pair.say_locals(SERVER, true);

    let told = pair.call("say('a', b'GONE0000')");
    pair.row("before its end is gone", told, "ok");
    let ours = pair.locals(SERVER, true)[0];
    pair.kernel.set_locals(&[ours]).unwrap();
    let told = pair.call("say('a', b'GONE0001', 0.3)");
    pair.row("the called one is no pod of the node any more", told, "timed out");
    assert_eq!(pair.rig.seen_at("GONE0001"), [0, 0]);
    let told = pair.call("dial('n')");
    pair.row("  a new one: through the agent", told, "ok");
    assert_eq!(pair.rig.carried(3), 3);
}

/// The address of a pod that ended, at another one: what was stamped for the first is nothing to the second.
#[test]
fn a_reused_address_inherits_no_stamp() {
    let rig = Rig::new();
    let options = rig.options();
    let mut pair = Pair::governed(rig, &options);
    let told = pair.call("dial('a')") + " " + &pair.call("say('a', b'REUSE000')");
    pair.row("before", told, "ok ok");
    let port: u16 = pair.call("port('a')").parse().unwrap();
    let node = pair.rig.node.outside.id();
    inside(node, "ip link del near");
    let again = Elsewhere::new();
    run(&format!("ip link add near netns {node} type veth peer name eth0 netns {}", again.pid()));
    inside(node, "ip link set near master br0");
    inside(node, "ip link set near up");
    for command in ["ip link set lo up", &format!("ip addr add {NEAR}/24 dev eth0"), "ip link set eth0 up"] {
        inside(again.pid(), command);
    }
    let (netns, address): (_, Ipv4Addr) = (again.netns(), NEAR.parse().unwrap());
    assert_eq!(pair.rig.on_node(|| pair.kernel.guard_wires("again", netns.as_fd(), address).unwrap()), 1);
    let listener = in_netns(netns.try_clone().unwrap(), || TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap());
    pair.kernel.attach_pod("again", netns.as_fd(), address, listener.as_fd()).unwrap();
    let place = pair.rig.on_node(|| pair.kernel.place(netns.as_fd()).unwrap().unwrap());
    let ours = pair.locals_of_pod();
    pair.kernel.set_locals(&[ours, Local { address, identity: SERVER, place, open: true }]).unwrap();

    let path = format!("/proc/{}/ns/net", again.pid());
    let capture = "frames = []\nc = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)); c.bind(('eth0', 3)); \
                   c.settimeout(0.5)\nprint('ready', flush=True)\nsys.stdin.readline()\ntry:\n    while True: frames.append(c.recv(70000))\n\
                   except OSError: pass\nprint(sum(b'REUSE001' in f for f in frames), flush=True)";
    let mut capture = pair.rig.node.worker_in(&path, None, capture);
    assert_eq!(capture.answer(), "ready");
    let told = pair.call("say('a', b'REUSE001', 0.3)");
    pair.row("the open connection", told, "timed out");
    let seen = ask(&mut capture, "count");
    pair.row("  its bytes at the new pod", seen, "0");
    // A bare segment of the tuple, from the new pod: its numbers are bytes of choice.
    let mut in_pod = pair.rig.capture_in_pod();
    let bare = format!("struct.pack('!HH', 7070, {port}) + MARK + struct.pack('!BBHHH', 0x50, 0x10, 1000, 0, 0)");
    pair.rig.sent(again.pid(), "REUSEbar", &format!("frame(0x0800, ip(6, {bare}, source='{NEAR}', to='{POD}'))"));
    let seen = ask(&mut in_pod, "REUSEbar");
    pair.row("a bare segment of it from the new pod", seen, "0");

    let mut server = pair.rig.node.worker_in(&path, Some("server"), SERVE);
    assert_eq!(server.answer(), "ready");
    let told = pair.call("dial('n')") + " " + &pair.call("say('n', b'fresh')");
    pair.row("a new connection to the new pod", told, "ok ok");
    drop((server, capture));
}

impl Pair {
    fn locals_of_pod(&self) -> Local {
        let netns = self.rig.node.pod_netns();
        let place = self.rig.on_node(|| self.kernel.place(netns.as_fd()).unwrap().unwrap());
        Local { address: POD, identity: CLIENT, place, open: true }
    }
}

/// As many as fit go directly; the rest goes through the agent, and nothing passes without a stamp.
#[test]
fn a_full_map_sends_the_rest_through_the_agent() {
    let rig = Rig::new();
    let options = Options { capacity: Capacity { stamps: 32, ..rig.options().capacity }, ..rig.options() };
    let mut pair = Pair::governed(rig, &options);
    for n in 0..40 {
        assert_eq!(pair.call(&format!("dial({n})")), "ok");
    }
    let (direct, carried, accepted) = (pair.kernel.counters().unwrap().direct, pair.rig.carried(10), pair.accepted());
    pair.row("of 40 connections directly, and through the agent", format!("{direct} {carried}"), "30 10");
    assert_eq!(accepted, 30);
    let told = pair.call("say(0, b'first')") + " " + &pair.call("say(29, b'last')");
    pair.row("  the direct ones go on", told, "ok ok");
    for n in 0..10 {
        pair.call(&format!("close({n})"));
    }
    std::thread::sleep(Duration::from_millis(100));
    pair.flows();
    let told = pair.call("dial('x')") + " " + &pair.call("say('x', b'room')");
    pair.row("  after some have ended", told, "ok ok");
    assert_eq!(pair.rig.carried(10), 10);
}

/// Where it is strict, what is open stops with the lease too, in both directions, and goes on with the next one.
#[test]
fn strict_stops_what_is_open_while_nobody_is_heard() {
    let rig = Rig::new();
    let options = rig.options();
    let mut pair = Pair::governed(rig, &options);
    let told = pair.call("dial('a')") + " " + &pair.call("say('a', b'STRICT00')");
    pair.row("before", told, "ok ok");
    pair.kernel.renew_lease(Duration::ZERO).unwrap();
    let told = pair.call("say('a', b'STRICT01')") + " " + &pair.call("dial('n')");
    pair.row("not strict, lease over: the open one, a new one", told, "ok EPERM");
    pair.kernel.set_strict(true);
    pair.rig.govern(&pair.kernel);
    pair.rig.govern_near(&pair.kernel);
    let told = pair.call("say('a', b'STRICT02')");
    pair.row("strict: the open one", told, "timed out");
    pair.kernel.renew_lease(LEASE).unwrap();
    // The first that comes is the answer to what was held back.
    let told = pair.call("say('a', b'STRICT03', timeout=5)");
    pair.row("the lease renewed: the open one", told, "other bytes");
    for mark in ["STRICT00", "STRICT01", "STRICT02", "STRICT03"] {
        assert_eq!(pair.rig.seen_at(mark)[0], 0);
    }
}

/// However many there are, each is looked at: what a look misses is cut by nobody.
#[test]
fn every_one_of_very_many_is_looked_at() {
    let rig = Rig::new();
    let kernel = rig.open().unwrap();
    let stamps = MapHandle::from_pinned_path(rig.node.pins.join("maps/stamps")).unwrap();
    const MANY: u32 = 30_000;
    for n in 0..MANY {
        let key = [&[10, 0, 0, 1, 10, 0, 0, 2][..], &n.to_ne_bytes()].concat();
        let mut value = [0; 80];
        value[16..24].copy_from_slice(&u64::from(n + 1).to_ne_bytes());
        stamps.update(&key, &value, MapFlags::ANY).unwrap();
    }
    for look in ["first", "second"] {
        assert_eq!(kernel.direct_flows().unwrap().flows.len(), MANY as usize, "{look} look");
    }
}

/// Without an agent, what is open goes on, and new ones are judged by the kernel while the lease lasts.
#[test]
fn a_dead_agent_ends_no_direct_connection_and_opens_no_door() {
    let rig = Rig::new();
    let options = rig.options();
    let mut pair = Pair::governed(rig, &options);
    let told = pair.call("dial('a')") + " " + &pair.call("say('a', b'DEAD0000')");
    pair.row("before", told, "ok ok");
    pair.rig.agent_dies();
    let told =
        pair.call("say('a', b'DEAD0001')") + " " + &pair.call("dial('n')") + " " + &pair.call("say('n', b'new')");
    pair.row("agent dead: the open one, a new one", told, "ok ok ok");
    let told = pair.call("dial('d', port=9090)") + " " + &pair.call("dial('f', port=8080, to=FAR)");
    pair.row("  a denied one, one to another node", told, "EPERM ECONNREFUSED");
    pair.kernel.renew_lease(Duration::ZERO).unwrap();
    let told = pair.call("say('a', b'DEAD0002')") + " " + &pair.call("dial('n')");
    pair.row("lease over: the open one, a new one", told, "ok EPERM");
    // A new agent: programs replaced, guards renewed.
    pair.kernel = rig::Rig::open(&pair.rig).unwrap();
    let kernel = Kernel::open(&options).unwrap();
    pair.rig.agent_returns(&kernel);
    pair.rig.govern_near(&kernel);
    let told = pair.call("say('a', b'DEAD0003')");
    pair.row("a new agent: the open one", told, "ok");
    for mark in ["DEAD0001", "DEAD0002", "DEAD0003"] {
        assert_eq!(pair.rig.seen_at(mark)[0], 0);
    }
}
