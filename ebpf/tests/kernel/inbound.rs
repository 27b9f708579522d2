//! What reaches a pod, and what happens when the agent is gone.

use crate::support::{Node, OUTSIDE, POD, accept, at, ends_sockets, try_accept};
use ambit_ebpf::{Action, Counters, Event, Kernel, KernelError, Reason, Tables, Verdict, VerdictKey, netns_cookie};
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::time::Duration;

const CLIENT: u32 = 300;
const SERVER: u32 = 301;
const LEASE: Duration = Duration::from_secs(600);

/// A workload that may call the outside address on every port.
fn node() -> (Node, Kernel) {
    let node = Node::new();
    let kernel = Kernel::open(&node.options()).unwrap();
    let key = VerdictKey { source: CLIENT, destination: SERVER, port: 0 };
    kernel
        .install(&Tables {
            verdicts: vec![(key, Verdict { action: Action::Allow, rule: 1 })],
            endpoints: vec![(OUTSIDE, SERVER)],
            services: vec![],
            ..Tables::default()
        })
        .unwrap();
    kernel.set_workload(node.cgroup("client"), CLIENT).unwrap();
    kernel.renew_lease(LEASE).unwrap();
    (node, kernel)
}

fn dial(to: SocketAddr) -> Result<TcpStream, ErrorKind> {
    TcpStream::connect_timeout(&to, Duration::from_secs(2)).map_err(|e| e.kind())
}

#[test]
fn plain_inbound_is_refused_the_last_leg_passes_and_loopback_is_the_pods_own() {
    let (node, kernel) = node();
    let server = node.listen_in_pod(Ipv4Addr::UNSPECIFIED, 8080);
    let to = SocketAddr::from((POD, 8080));
    assert!(node.outside(move || dial(to).is_ok()), "the way is there before the pod is attached");
    drop(accept(&server));

    let _listener = node.attach(&kernel);
    // On a loaded machine the end of the connection before may come in only now.
    std::thread::sleep(Duration::from_millis(50));
    kernel.drain_events(&mut |_| {}).unwrap();
    assert_eq!(node.outside(move || dial(to).err()), Some(ErrorKind::ConnectionRefused));
    assert!(try_accept(&server, Duration::from_millis(50)).is_none());
    let mut events: Vec<Event> = Vec::new();
    kernel.drain_events(&mut |event| events.push(event)).unwrap();
    assert_eq!(events.len(), 1, "{events:?}");
    assert_eq!((events[0].reason, events[0].from), (Reason::PlainInbound, Some(OUTSIDE.into())));
    assert_eq!(events[0].address, at(POD.octets(), 8080).into());

    // The agent's last leg, as the agent makes it: a socket in the pod's namespace, source 127.x.y.z.
    let script = |source: &str| {
        format!(
            "import socket\ns = socket.socket(); s.bind(('{source}', 0)); s.settimeout(2)\n\
                 try: s.connect(('{POD}', 8080)); s.sendall(b'hello'); print('ok')\nexcept OSError as e: print(type(e).__name__)"
        )
    };
    let agent = |source: &'static str| {
        let script = script(source);
        node.in_pod(move || {
            crate::support::text(std::process::Command::new("python3").arg("-c").arg(script).output().unwrap())
        })
    };
    assert_eq!(agent("127.44.5.6"), "ok");
    let (mut stream, peer, _) = accept(&server);
    assert_eq!(peer.ip().octets(), [127, 44, 5, 6]);
    stream.set_nonblocking(false).unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    assert_eq!(text, "hello");
    assert_eq!(agent(POD_TEXT), "ConnectionRefusedError", "only 127.x.y.z is the last leg");

    assert_eq!(node.connect("client", at([127, 0, 0, 1], 8080)), "ok 127.0.0.1:8080");
    let (_, peer, local) = accept(&server);
    assert_eq!((peer.ip().octets(), local), ([127, 0, 0, 1], at([127, 0, 0, 1], 8080)));
}

/// Whoever governs a namespace anew ends what goes around the mesh there, not what the agent carries.
#[test]
fn the_last_leg_survives_when_bypassing_connections_are_ended() {
    let (node, kernel) = node();
    let server = node.listen_in_pod(Ipv4Addr::UNSPECIFIED, 8080);
    let inside = format!("/proc/{}/ns/net", node.pod.id());
    let dial = |bind: &str| {
        let script = format!(
            "s = socket.socket(); s.bind(('{bind}', 0)); s.connect(('{POD}', 8080)); print('ready', flush=True)\n\
             for line in sys.stdin:\n    try: s.sendall(b'x'); print('ok', flush=True)\n    \
             except OSError as e: print(errno.errorcode[e.errno], flush=True)"
        );
        let mut worker = node.worker_in(&inside, None, &script);
        assert_eq!(worker.answer(), "ready");
        (worker, accept(&server))
    };
    let (mut around, _around) = dial(POD_TEXT);
    let _listener = node.attach(&kernel);
    let (mut leg, _leg) = dial("127.44.5.6");
    let ends = kernel.end_bypassing(node.pod_netns().as_fd()).unwrap();
    assert_eq!(ends, ends_sockets());
    leg.ask("send");
    assert_eq!(leg.answer(), "ok");
    if !ends {
        println!("this kernel ends no sockets");
        return;
    }
    // Both ends of the other are here: which of them is ended first says what it is told.
    around.ask("send");
    let told = around.answer();
    assert!(["ECONNABORTED", "ECONNRESET"].contains(&told.as_str()), "{told}");
    assert!((1..=2).contains(&kernel.counters().unwrap().sockets_ended));
}

const POD_TEXT: &str = "10.99.0.1";

#[test]
fn ipv6_from_outside_does_not_reach_the_pod() {
    let (node, kernel) = node();
    node.in_pod(|| crate::support::run("ip addr add fd99::1/64 dev eth0 nodad"));
    node.outside(|| crate::support::run("ip addr add fd99::2/64 dev eth0 nodad"));
    let server = node.in_pod(|| std::net::TcpListener::bind("[::]:8080").unwrap());
    let to: SocketAddr = "[fd99::1]:8080".parse().unwrap();
    assert!(node.outside(move || dial(to).is_ok()), "the way is there before the pod is attached");
    drop(try_accept(&server, Duration::from_secs(1)));
    let _listener = node.attach(&kernel);
    assert_eq!(node.outside(move || dial(to).err()), Some(ErrorKind::ConnectionRefused));
    // A dual-stack listener is reached by IPv4 too, and governed all the same.
    assert_eq!(node.outside(move || dial(SocketAddr::from((POD, 8080))).err()), Some(ErrorKind::ConnectionRefused));
    assert!(try_accept(&server, Duration::from_millis(50)).is_none());
}

/// What a lab or a node finds after the pod, or its whole cgroup tree, was made anew while no agent ran.
#[test]
fn pins_of_a_namespace_or_cgroup_that_is_gone_are_replaced() {
    let (mut node, kernel) = node();
    let listener = node.attach(&kernel);
    drop((listener, kernel));
    node.remake_pod();
    node.remake_mesh();
    let kernel = Kernel::open(&node.options()).unwrap();
    kernel.set_workload(node.cgroup("client"), CLIENT).unwrap();
    assert_eq!(node.connect("client", at([10, 9, 9, 9], 1)), "EPERM", "attached to the new cgroup");
    let listener = node.attach(&kernel);
    assert!(node.connect("client", at(OUTSIDE.octets(), 8080)).starts_with("ok"));
    drop(accept(&listener));
}

#[test]
fn udp_from_outside_does_not_reach_the_pod() {
    let (node, kernel) = node();
    let _listener = node.attach(&kernel);
    let socket = node.in_pod(|| std::net::UdpSocket::bind(("0.0.0.0", 5353)).unwrap());
    socket.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    node.outside(|| {
        let out = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
        out.send_to(b"x", (POD, 5353)).unwrap();
    });
    assert!(socket.recv_from(&mut [0; 8]).is_err());
    node.in_pod(|| {
        let out = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        out.send_to(b"x", ("127.0.0.1", 5353)).unwrap();
    });
    assert!(socket.recv_from(&mut [0; 8]).is_ok());
}

/// With route_localnet, which is the pod's own to set, the kernel takes packets to and from 127/8 off the wire.
#[test]
fn loopback_addresses_from_the_wire_do_not_reach_the_pod() {
    let (node, kernel) = node();
    node.in_pod(|| {
        for name in ["all/route_localnet", "eth0/route_localnet"] {
            std::fs::write(format!("/proc/sys/net/ipv4/conf/{name}"), "1").unwrap();
        }
        for name in ["all/rp_filter", "eth0/rp_filter"] {
            std::fs::write(format!("/proc/sys/net/ipv4/conf/{name}"), "0").unwrap();
        }
    });
    let socket = node.in_pod(|| std::net::UdpSocket::bind(("0.0.0.0", 5353)).unwrap());
    socket.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    let mac = node.in_pod(|| {
        let shown = std::process::Command::new("ip").args(["-o", "link", "show", "eth0"]).output().unwrap();
        let shown = String::from_utf8(shown.stdout).unwrap();
        shown.split("link/ether ").nth(1).unwrap().split(' ').next().unwrap().to_owned()
    });
    let frame = |from: &'static str, to: &'static str, protocol: u8, port: u16| {
        let script = format!("{FRAME}\nframe('{mac}', '{from}', '{to}', {protocol}, {port})");
        node.outside(move || {
            let python = std::process::Command::new("python3").args(["-c", &script]).output().unwrap();
            assert!(python.status.success(), "{}", String::from_utf8_lossy(&python.stderr));
        });
    };
    let outside = "10.99.0.2";
    let datagrams = [(outside, "127.0.0.1"), ("127.9.9.9", "127.0.0.1"), ("127.9.9.9", "10.99.0.1")];
    for (from, to) in datagrams {
        frame(from, to, 17, 5353);
        assert!(socket.recv_from(&mut [0; 8]).is_ok(), "{from} to {to}: the way is there before the pod is attached");
    }
    let listener = node.attach(&kernel);
    for (from, to) in datagrams {
        frame(from, to, 17, 5353);
        assert!(socket.recv_from(&mut [0; 8]).is_err(), "{from} to {to} reached the pod");
    }
    for from in [outside, "127.9.9.9"] {
        frame(from, "127.3.3.3", 6, ambit_ebpf::CAPTURE_PORT);
    }
    assert!(try_accept(&listener, Duration::from_millis(50)).is_none());
    // (Answers of the pod to itself, about what was refused, may be refused as well.)
    let Counters { denied, .. } = kernel.counters().unwrap();
    assert!(denied[&Reason::PlainInbound] >= 5 && denied[&Reason::AgentAbsent] == 0, "{denied:?}");

    // On lo, but not between loopback addresses.
    node.in_pod(|| {
        let out = std::net::UdpSocket::bind((POD, 0)).unwrap();
        out.send_to(b"x", ("127.0.0.1", 5353)).unwrap();
    });
    assert!(socket.recv_from(&mut [0; 8]).is_err());
}

/// A frame with one UDP datagram or one TCP SYN, its addresses as nobody but a packet socket would write them.
const FRAME: &str = r#"
import socket, struct
def checksum(b):
    b += b'\0' * (len(b) % 2)
    n = sum(struct.unpack('!%dH' % (len(b) // 2), b))
    while n >> 16: n = (n & 0xffff) + (n >> 16)
    return ~n & 0xffff
def frame(mac, source, to, protocol, port):
    ends = socket.inet_aton(source) + socket.inet_aton(to)
    if protocol == 17: inner = struct.pack('!HHHH', 4000, port, 9, 0) + b'x'
    else:
        def tcp(sum): return struct.pack('!HHIIBBHHH', 4000, port, 1, 0, 0x50, 2, 65535, sum, 0)
        inner = tcp(checksum(ends + struct.pack('!BBH', 0, 6, 20) + tcp(0)))
    def ip(sum): return struct.pack('!BBHHHBBH', 0x45, 0, 20 + len(inner), 1, 0, 64, protocol, sum) + ends
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as s:
        s.bind(('eth0', 0))
        s.send(bytes.fromhex(mac.replace(':', '')) + bytes.fromhex('020000000001') + b'\x08\0' + ip(checksum(ip(0))) + inner)
"#;

#[test]
fn without_an_agent_connections_are_refused_never_plain_and_a_new_agent_takes_over() {
    let (node, kernel) = node();
    let real = node.outside(|| std::net::TcpListener::bind((OUTSIDE, 8080)).unwrap());
    let to = at(OUTSIDE.octets(), 8080);
    let listener = node.attach(&kernel);
    assert!(node.connect("client", to).starts_with("ok"));
    drop(accept(&listener));

    drop(listener);
    drop(kernel);
    assert_eq!(node.connect("client", to), "ECONNREFUSED", "captured, and nobody there");
    assert_eq!(node.connect("client", at([10, 1, 0, 9], 8080)), "EPERM", "verdicts hold without an agent");
    // Someone in the pod may try to be the agent: the slot stays empty.
    let squatter = node.listen_in_pod(Ipv4Addr::UNSPECIFIED, ambit_ebpf::CAPTURE_PORT);
    assert_eq!(node.connect("client", to), "ECONNREFUSED");
    assert!(try_accept(&squatter, Duration::from_millis(50)).is_none());
    assert!(try_accept(&real, Duration::from_millis(50)).is_none(), "plaintext reached the destination");
    drop(squatter);

    let kernel = Kernel::open(&node.options()).unwrap();
    assert_eq!(kernel.workloads().unwrap().into_values().collect::<Vec<_>>(), [CLIENT], "maps were taken over");
    assert_eq!(kernel.pods().unwrap(), ["pod"]);
    let listener = node.attach(&kernel);
    assert!(node.connect("client", to).starts_with("ok"));
    let (mut stream, client, capture) = accept(&listener);
    let found = kernel.original_destination(netns_cookie(&stream).unwrap(), client, capture).unwrap();
    assert_eq!((found.asked, found.identity), (to, SERVER));
    drop(stream.write_all(b"x"));
    assert_eq!(kernel.counters().unwrap().denied[&Reason::AgentAbsent], 2);
    assert!(try_accept(&real, Duration::from_millis(50)).is_none());
}

#[test]
fn a_pod_is_let_go_and_only_a_listener_takes_its_slot() {
    let (node, kernel) = node();
    let netns = node.pod_netns();
    let socket = node.in_pod(|| std::net::UdpSocket::bind("127.0.0.1:0").unwrap());
    let refused = kernel.attach_pod("pod", netns.as_fd(), POD, socket.as_fd());
    assert!(matches!(refused, Err(KernelError::NotListener(_))), "{refused:?}");
    let listener = node.listen_in_pod(Ipv4Addr::LOCALHOST, 0);
    let refused = kernel.attach_pod("../maps", netns.as_fd(), POD, listener.as_fd());
    assert!(matches!(refused, Err(KernelError::BadPodName(_))), "{refused:?}");

    kernel.attach_pod("pod", netns.as_fd(), POD, listener.as_fd()).unwrap();
    // The name belongs to that namespace as long as it lives.
    let elsewhere = std::fs::File::open("/proc/self/ns/net").unwrap();
    let refused = kernel.attach_pod("pod", elsewhere.as_fd(), POD, listener.as_fd());
    assert!(matches!(refused, Err(KernelError::PinUnexpected { .. })), "{refused:?}");

    assert!(kernel.detach_pod("pod").unwrap() && kernel.detach_pod("pod").unwrap());
    assert!(kernel.pods().unwrap().is_empty());
    let server = node.listen_in_pod(POD, 8080);
    let to = SocketAddr::from((POD, 8080));
    // The kernel lets a link go a moment after its pin.
    let reached = (0..40).any(|_| {
        std::thread::sleep(Duration::from_millis(50));
        node.outside(move || dial(to).is_ok())
    });
    assert!(reached, "the pod is governed no more");
    drop(server);
}
