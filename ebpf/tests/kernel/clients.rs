//! Whom a workload sees that accepts the agent's last leg: the client that the agent told of, by accept(), getpeername() and
//! SO_PEERNAME alike; and never another connection's.

use crate::support::{Node, Worker, try_accept};
use ambit_ebpf::{Kernel, Leg, netns_cookie};
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

const LEG: Ipv4Addr = Ipv4Addr::new(127, 70, 1, 2);
const CLIENT: &str = "10.9.8.7:40123";
/// `CLIENT_FRESH_NS` of client.h, and a little more.
const STALE: Duration = Duration::from_millis(2100);

/// An unmodified server on IPv4, dual-stack and MPTCP listeners; each line is evaluated.
const SERVER: &str = r#"
import ctypes, os
def listening(family, at, port, protocol=0):
    s = socket.socket(family, socket.SOCK_STREAM, protocol)
    if family == socket.AF_INET6: s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    s.bind((at, port)); s.listen(); s.settimeout(2)
    return s
on = {8080: listening(socket.AF_INET, '0.0.0.0', 8080), 8081: listening(socket.AF_INET6, '::', 8081),
      8082: listening(socket.AF_INET, '0.0.0.0', 8082, 262)}
def shown(a): return f'{a[0]}:{a[1]}'
def peername(c):
    raw = c.getsockopt(socket.SOL_SOCKET, 28, 28 if c.family == socket.AF_INET6 else 16)
    host = raw[8:24] if len(raw) == 28 else raw[4:8]
    return f"{socket.inet_ntop(c.family, host)}:{struct.unpack('!H', raw[2:4])[0]}"
kept = []
def taken(port):
    c, peer = on[port].accept()
    kept.append(c)
    handed = socket.socket(fileno=os.dup(c.fileno()))
    return ' '.join({shown(peer), shown(c.getpeername()), shown(handed.getpeername()), peername(c)})
def again(n): return shown(kept[n].getpeername())
print('ready', flush=True)
for line in sys.stdin: print(eval(line), flush=True)
"#;

/// The agent's part: in the pod's namespace, outside of the mesh cgroup.
const AGENT: &str = r#"
legs = []
def bound(port=0):
    s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
    s.bind(('127.70.1.2', port)); s.settimeout(2); legs.append(s)
    return s.getsockname()[1]
def dial(port):
    try: legs[-1].connect(('10.99.0.1', port)); return 'ok'
    except OSError as e: return errno.errorcode[e.errno]
def end(): legs.pop().close(); return 'ok'
for line in sys.stdin: print(eval(line), flush=True)
"#;

struct Stage {
    server: Worker,
    agent: Worker,
    kernel: Kernel,
    netns: u64,
    _listener: std::net::TcpListener,
    node: Node,
}

fn says(worker: &mut Worker, what: &str) -> String {
    worker.ask(what);
    worker.answer()
}

impl Stage {
    fn set() -> Stage {
        let node = Node::new();
        let kernel = Kernel::open(&node.options()).unwrap();
        kernel.set_workload(node.cgroup("server"), 300).unwrap();
        kernel.renew_lease(Duration::from_secs(600)).unwrap();
        let listener = node.attach(&kernel);
        let inside = format!("/proc/{}/ns/net", node.pod.id());
        let mut server = node.worker("server", SERVER);
        assert_eq!(server.answer(), "ready");
        let agent = node.worker_in(&inside, None, AGENT);
        Stage { server, agent, kernel, netns: netns_cookie(&listener).unwrap(), _listener: listener, node }
    }

    /// Binds a leg to `from`, 0 for any port.
    fn leg(&mut self, from: u16, to: u16) -> Leg {
        let port = says(&mut self.agent, &format!("bound({from})")).parse().unwrap();
        Leg { netns: self.netns, from: (LEG, port).into(), port: to }
    }

    /// Connects the leg that was bound last: what the server sees.
    fn seen(&mut self, to: u16) -> String {
        assert_eq!(says(&mut self.agent, &format!("dial({to})")), "ok");
        says(&mut self.server, &format!("taken({to})"))
    }

    fn told(&mut self, to: u16) -> Leg {
        let leg = self.leg(0, to);
        assert!(self.kernel.tell_client(&leg, CLIENT.parse().unwrap()).unwrap());
        leg
    }
}

#[test]
fn an_accepted_socket_shows_the_client_that_was_told_and_no_other_socket_does() {
    let mut stage = Stage::set();
    for (port, shown) in [(8080, CLIENT.to_owned()), (8081, format!("::ffff:{CLIENT}")), (8082, CLIENT.to_owned())] {
        let leg = stage.told(port);
        assert_eq!(stage.seen(port), shown, "port {port}");
        if port == 8080 {
            // Whoever has the socket, and whatever was told of others since.
            let other = Leg { from: (LEG, 1).into(), ..leg };
            assert!(stage.kernel.tell_client(&other, "10.9.8.9:9".parse().unwrap()).unwrap());
            assert_eq!(says(&mut stage.server, "again(0)"), CLIENT);
            stage.kernel.forget_client(&other).unwrap();
        }
        assert_eq!(says(&mut stage.agent, "end()"), "ok");
        // The same four addresses again, and nothing told.
        let again = stage.leg(leg.from.port(), port);
        assert_eq!(again, leg);
        let bare = if port == 8081 { format!("::ffff:{}", leg.from) } else { leg.from.to_string() };
        assert_eq!(stage.seen(port), bare, "port {port}");
    }
    // Told of another port: of another connection.
    let leg = stage.told(8081);
    assert_eq!(stage.seen(8080), leg.from.to_string());
    // Two at once, the later one first.
    let first = stage.told(8080);
    let second = stage.leg(0, 8080);
    assert!(stage.kernel.tell_client(&second, "10.9.8.8:1".parse().unwrap()).unwrap());
    assert_eq!(stage.seen(8080), "10.9.8.8:1");
    assert_eq!(says(&mut stage.agent, "legs.reverse()"), "None");
    stage.kernel.forget_client(&first).unwrap();
    stage.kernel.forget_client(&first).unwrap();
    let third = stage.told(8080);
    stage.kernel.forget_client(&third).unwrap();
    assert_eq!(stage.seen(8080), third.from.to_string(), "forgotten before it came to be");
    std::thread::sleep(STALE);
    assert_eq!(stage.kernel.sweep_clients().unwrap(), 1, "of all that were told, the one for another port is left");
}

#[test]
fn what_nobody_took_grows_old_and_is_swept() {
    let mut stage = Stage::set();
    // A listener that no program governs: it sees the leg, and what was told stays.
    let plain = stage.node.listen_in_pod(Ipv4Addr::UNSPECIFIED, 8090);
    let ungoverned = stage.told(8090);
    assert_eq!(says(&mut stage.agent, "dial(8090)"), "ok");
    let (_stream, peer) = try_accept(&plain, Duration::from_secs(2)).unwrap();
    assert_eq!(peer, ungoverned.from);
    // One that never was answered, and its address used again when that is over.
    let refused = stage.told(9999);
    assert_eq!(says(&mut stage.agent, "dial(9999)"), "ECONNREFUSED");
    let late = stage.told(8080);
    assert_eq!(stage.kernel.sweep_clients().unwrap(), 0, "not yet");
    std::thread::sleep(STALE);
    assert_eq!(stage.seen(8080), late.from.to_string(), "what was told is old");
    assert_eq!(stage.kernel.sweep_clients().unwrap(), 2, "{ungoverned:?} {refused:?}");
    assert_eq!(stage.kernel.sweep_clients().unwrap(), 0);
}

#[test]
fn a_full_map_costs_the_name_and_not_the_connection() {
    let mut stage = Stage::set();
    let other = |n: u16| Leg { netns: stage.netns, from: (LEG, n).into(), port: 1 };
    let client: SocketAddr = CLIENT.parse().unwrap();
    let room = (1..=u16::MAX).take_while(|n| stage.kernel.tell_client(&other(*n), client).unwrap()).count();
    assert_eq!(room, 16 * 1024);
    let leg = stage.leg(0, 8080);
    assert!(!stage.kernel.tell_client(&leg, client).unwrap());
    assert_eq!(stage.seen(8080), leg.from.to_string());
    std::thread::sleep(STALE);
    assert_eq!(stage.kernel.sweep_clients().unwrap(), room);
    stage.told(8080);
    assert_eq!(stage.seen(8080), CLIENT);
}

/// Under a flood, or where somebody sets it so, the kernel keeps nothing of a SYN: the last leg's handshake then too.
#[test]
fn syn_cookies_do_not_hide_the_client() {
    let mut stage = Stage::set();
    stage.node.in_pod(|| crate::support::run("echo 2 > /proc/sys/net/ipv4/tcp_syncookies"));
    for port in [8080, 8081] {
        stage.told(port);
        assert!(stage.seen(port).ends_with(CLIENT), "port {port}");
    }
    // So many SYNs were answered with one, and so many answers taken.
    let counted = stage.node.in_pod(|| std::fs::read_to_string("/proc/thread-self/net/netstat").unwrap());
    // A line of names, a line of numbers.
    let [names, numbers] = counted.lines().filter(|line| line.starts_with("TcpExt:")).collect::<Vec<_>>()[..] else {
        panic!("{counted}")
    };
    let first = |line: &str| line.split(' ').skip(1).take(2).map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(
        (first(names), first(numbers)),
        (["SyncookiesSent", "SyncookiesRecv"].map(String::from).into(), ["2", "2"].map(String::from).into())
    );
}
