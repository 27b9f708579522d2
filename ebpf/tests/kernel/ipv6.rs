//! Native IPv6 of a pod, with real programs, sockets, cgroups and namespaces.

use crate::support::{Node, at, in_netns, netns_of, run, try_accept};
use ambit_ebpf::{
    AGENT_NET, Action, CAPTURE_PORT, Event, Kernel, OriginalDestination, Reason, Service, ServiceEndpoint, Tables,
    Tier, Verdict, VerdictKey, netns_cookie,
};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn6, bind, connect, setsockopt, socket, sockopt};
use std::io::{Read, Write};
use std::net::{Ipv6Addr, SocketAddr, SocketAddrV6, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

const CLIENT: u32 = 300;
const ALLOWED: u32 = 301;
const DENIED: u32 = 302;
const LEASE: Duration = Duration::from_secs(600);
const POD6: &str = "fd99::1";

fn v6(text: &str) -> Ipv6Addr {
    text.parse().unwrap()
}

fn socket_address(text: &str) -> SocketAddrV6 {
    text.parse().unwrap()
}

fn tables() -> Tables {
    let verdict =
        |destination, port, action| (VerdictKey { source: CLIENT, destination, port }, Verdict { action, rule: 7 });
    Tables {
        verdicts: vec![
            verdict(ALLOWED, 8080, Action::Allow),
            verdict(DENIED, 0, Action::Allow),
            verdict(DENIED, 8080, Action::Deny),
        ],
        endpoints: vec![([10, 1, 0, 1].into(), ALLOWED)],
        endpoints6: vec![(v6("fd00::1"), ALLOWED), (v6("fd00::2"), DENIED)],
        ..Tables::default()
    }
}

/// The pod has an IPv6 address, and is attached with it.
fn attach(node: &Node, kernel: &Kernel) -> TcpListener {
    run(&format!("nsenter --net=/proc/{}/ns/net ip addr add {POD6}/64 dev eth0 nodad", node.pod.id()));
    run(&format!("nsenter --net=/proc/{}/ns/net ip addr add fd99::2/64 dev eth0 nodad", node.outside.id()));
    node.attach_both(kernel, v6(POD6))
}

fn node() -> (Node, Kernel, TcpListener) {
    let node = Node::new();
    let kernel = Kernel::open(&node.options()).unwrap();
    kernel.install(&tables()).unwrap();
    kernel.set_workload(node.cgroup("client"), CLIENT).unwrap();
    kernel.renew_lease(LEASE).unwrap();
    let listener = attach(&node, &kernel);
    (node, kernel, listener)
}

/// Who comes, comes at once; on a machine that is emulated and busy, a moment later.
const COMES_MAX: Duration = Duration::from_secs(10);

fn goal(kernel: &Kernel, listener: &TcpListener) -> (TcpStream, Option<OriginalDestination<SocketAddr>>) {
    let (stream, peer) = try_accept(listener, COMES_MAX).expect("nobody came to the listener");
    let (SocketAddr::V6(peer), SocketAddr::V6(local)) = (peer, stream.local_addr().unwrap()) else { panic!("IPv4") };
    let cookie = netns_cookie(listener).unwrap();
    let found = kernel.original_destination6(cookie, peer, local);
    assert_eq!(kernel.original_destination6(cookie, peer, local), None, "a record is taken once");
    (stream, found)
}

fn events(kernel: &Kernel) -> Vec<Event> {
    let mut found = Vec::new();
    kernel.drain_events(&mut |event| found.push(event)).unwrap();
    found
}

/// V6ONLY and v6-bound sockets are captured too, and see their own addresses; v4-mapped ones come to the same listener.
#[test]
fn an_allowed_connection_is_captured_and_both_ends_look_as_they_would() {
    let (node, kernel, listener) = node();
    let kinds = [
        ("pass", "plain"),
        ("s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)", "V6ONLY"),
        ("s.bind(('fd99::1', 0))", "bound"),
        ("s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1); s.bind(('fd99::1', 4242))", "bound, V6ONLY"),
    ];
    for (prepare, kind) in kinds {
        let script = format!(
            "s = socket.socket(socket.AF_INET6)\ntry: {prepare}\nexcept OSError as e: print(e)\n\
             print(outcome(s, ('fd00::1', 8080)), s.getsockname()[0])\ns.sendall(b'hi'); print(s.recv(2))"
        );
        let child = node.spawn("client", &script);
        let (mut stream, found) = goal(&kernel, &listener);
        let asked = socket_address("[fd00::1]:8080").into();
        assert_eq!(found, Some(OriginalDestination { asked, endpoint: asked, identity: ALLOWED }), "{kind}");
        let mut said = [0; 2];
        stream.read_exact(&mut said).unwrap();
        stream.write_all(b"yo").unwrap();
        let seen = crate::support::text(child.wait_with_output().unwrap());
        assert_eq!(seen, "ok fd00::1:8080 fd99::1\nb'yo'", "{kind}");
        assert_eq!(&said, b"hi");
    }
    // The same listener has IPv4, plain and mapped.
    for host in ["10.1.0.1", "::ffff:10.1.0.1"] {
        assert_eq!(node.python("client", &format!("print(tcp('{host}', 8080))")), format!("ok {host}:8080"));
        let (stream, peer) = try_accept(&listener, Duration::from_secs(2)).unwrap();
        let v4 = |address: SocketAddr| match (address.ip().to_canonical(), address.port()) {
            (std::net::IpAddr::V4(ip), port) => std::net::SocketAddrV4::new(ip, port),
            other => panic!("{other:?}"),
        };
        let found =
            kernel.original_destination(netns_cookie(&listener).unwrap(), v4(peer), v4(stream.local_addr().unwrap()));
        assert_eq!(found.map(|found| found.asked), Some(at([10, 1, 0, 1], 8080)));
    }
    assert_eq!(kernel.room().unwrap().iter().find(|row| row.0 == "flows6").unwrap().1, 0);
    let counters = kernel.counters().unwrap();
    assert_eq!((counters.allowed, counters.direct), (6, 0));
}

#[test]
fn every_refusal_is_at_once_and_told_with_its_address() {
    let (node, kernel, _listener) = node();
    let agent = AGENT_NET.to_string();
    let dial = |host: &str, port: u16| node.python("client", &format!("print(tcp('{host}', {port}))"));
    let cases = [
        ("fd00::1", 8081, Reason::NoVerdict),
        ("fd00::2", 8080, Reason::PolicyDeny),
        ("fd00::9", 8080, Reason::UnknownDestination),
        ("2001:db8::1", 443, Reason::UnknownDestination),
        (agent.as_str(), CAPTURE_PORT, Reason::CaptureAddress),
        ("fd61:6d62:6974:0:1:2:3:4", 80, Reason::CaptureAddress),
    ];
    for (host, port, reason) in cases {
        assert_eq!(dial(host, port), "EPERM", "{host}:{port}");
        let told = events(&kernel);
        let found: Vec<_> = told.iter().map(|e| (e.reason, e.address.to_string(), e.source)).collect();
        assert_eq!(found, [(reason, format!("[{host}]:{port}"), CLIENT)]);
    }
    let udp = "s = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)\n\
               def send(to):\n  try: s.sendto(b'x', (to, 53)); return 'sent'\n  except OSError as e: return errno.errorcode[e.errno]\n\
               print(send('fd00::1'), send('fd61:6d62:6974::1'), send('::1'), outcome(s, ('fd00::1', 53)))";
    assert_eq!(node.python("client", udp), "EPERM EPERM sent EPERM");
    let reasons: Vec<Reason> = events(&kernel).iter().map(|event| event.reason).collect();
    assert_eq!(reasons, [Reason::NativeIpv6, Reason::CaptureAddress, Reason::NotTcp]);
    kernel.renew_lease(Duration::ZERO).unwrap();
    assert_eq!(dial("fd00::1", 8080), "EPERM");
    assert_eq!(events(&kernel).last().unwrap().reason, Reason::LeaseExpired);
}

#[test]
fn a_pods_own_loopback_is_its_own() {
    let (node, _kernel, _listener) = node();
    let script = "s = socket.socket(socket.AF_INET6); s.bind(('::1', 7000)); s.listen()\n\
                  print(tcp('::1', 7000))\nc = socket.socket(socket.AF_INET6); c.connect(('::1', 7000)); print(c.getsockname()[0])";
    assert_eq!(node.python("client", script), "ok ::1:7000\n::1");
}

/// Without an address of IPv6 of its own a pod calls nobody by it, and nothing is captured.
#[test]
fn a_pod_of_ipv4_is_as_it_was() {
    let (node, kernel, listener) = node();
    kernel.set_ipv6(node.pod_netns().as_fd(), listener.as_fd(), None).unwrap();
    assert_eq!(node.python("client", "print(tcp('fd00::1', 8080))"), "EPERM");
    assert_eq!(events(&kernel)[0].reason, Reason::NativeIpv6);
}

/// Nobody answers where the agent is gone, whoever listens there.
#[test]
fn without_an_agent_a_captured_connection_is_refused() {
    let (node, kernel, listener) = node();
    drop(listener);
    let script = "s = socket.socket(socket.AF_INET6); s.bind(('::', 15001)); s.listen()\nprint(tcp('fd00::1', 8080))";
    assert_eq!(node.python("client", script), "ECONNREFUSED");
    let absent = events(&kernel).into_iter().find(|event| event.reason == Reason::AgentAbsent).expect("it is told");
    assert_eq!(absent.address.port(), CAPTURE_PORT);
}

/// A last leg: bound, told, connected. Whoever is not told of gets nothing, from wherever it seems to come.
#[test]
fn only_the_leg_that_was_told_reaches_the_pods_server() {
    let (node, kernel, listener) = node();
    let server = node.in_pod(|| TcpListener::bind(("::", 9000)).unwrap());
    let cookie = netns_cookie(&listener).unwrap();
    let called = socket_address("[fd99::1]:9000");
    let leg = |host: u16| {
        node.in_pod(move || {
            let fd = socket(AddressFamily::Inet6, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
            setsockopt(&fd, sockopt::IpFreebind, &true).unwrap();
            let source = Ipv6Addr::from_bits(AGENT_NET.to_bits() | (0xffff << 32) | u128::from(host));
            bind(fd.as_raw_fd(), &SockaddrIn6::from(SocketAddrV6::new(source, 0, 0, 0))).unwrap();
            TcpStream::from(fd)
        })
    };
    let source = |leg: &TcpStream| match leg.local_addr().unwrap() {
        SocketAddr::V6(at) => at,
        SocketAddr::V4(_) => panic!("IPv4"),
    };
    let dial = |leg: &TcpStream| connect(leg.as_raw_fd(), &SockaddrIn6::from(called));
    let refused = Err(nix::errno::Errno::ECONNREFUSED);

    let good = leg(1);
    kernel.begin_leg(cookie, source(&good), called).unwrap();
    assert_eq!(dial(&good), Ok(()));
    kernel.end_leg(cookie, source(&good), called).unwrap();
    let (mut served, peer) = try_accept(&server, Duration::from_secs(2)).unwrap();
    assert_eq!(peer, good.local_addr().unwrap());
    (&good).write_all(b"x").unwrap();
    served.read_exact(&mut [0]).unwrap();

    assert_eq!(dial(&leg(2)), refused, "not told of");
    let other = leg(3);
    kernel.begin_leg(cookie, source(&other), socket_address("[fd99::1]:9001")).unwrap();
    assert_eq!(dial(&other), refused, "told of with another port");
    let other = leg(4);
    kernel.begin_leg(cookie + 1, source(&other), called).unwrap();
    assert_eq!(dial(&other), refused, "told of in another namespace");
    let other = leg(5);
    kernel.begin_leg(cookie, source(&other), called).unwrap();
    kernel.end_leg(cookie, source(&other), called).unwrap();
    assert_eq!(dial(&other), refused, "taken back");
    // From the wire, in clear; and a workload of the pod itself, at its own address.
    let outside =
        in_netns(netns_of(&node.outside), move || TcpStream::connect_timeout(&called.into(), Duration::from_secs(2)));
    assert_eq!(outside.unwrap_err().kind(), std::io::ErrorKind::ConnectionRefused);
    assert_eq!(node.python("client", "print(tcp('fd99::1', 9000))"), "EPERM");
    let told = events(&kernel);
    assert!(told.iter().any(|e| e.reason == Reason::PlainInbound && e.from == Some(v6("fd99::2").into())), "{told:?}");
    assert!(try_accept(&server, Duration::from_millis(100)).is_none());
}

#[test]
fn a_service_has_endpoints_of_both_families_and_those_of_a_denied_node_are_out_at_once() {
    let (node, kernel, listener) = node();
    let endpoint = |address: &str, identity, tier| ServiceEndpoint {
        address: address.parse().unwrap(),
        identity,
        tier,
        healthy: true,
    };
    let service: SocketAddr = "[fd10::1]:8080".parse().unwrap();
    let endpoints =
        vec![endpoint("[fd00::1]:8080", ALLOWED, Tier::Local), endpoint("10.1.0.1:8080", ALLOWED, Tier::Remote)];
    let with = Tables { services6: vec![Service { address: service, endpoints }], ..tables() };
    let digest = kernel.install(&with).unwrap();
    assert_ne!(digest, kernel.install(&tables()).unwrap());
    assert_eq!(kernel.install(&with).unwrap(), digest);
    let dial = || {
        assert_eq!(node.python("client", "print(tcp('fd10::1', 8080))"), "ok fd10::1:8080");
        let found = goal(&kernel, &listener).1.unwrap();
        assert_eq!((found.asked, found.identity), (service, ALLOWED));
        found.endpoint.to_string()
    };
    assert_eq!(dial(), "[fd00::1]:8080");
    kernel.set_service_health(service, socket_address("[fd00::1]:8080"), false).unwrap();
    assert_eq!(dial(), "10.1.0.1:8080");
    assert_eq!(kernel.relabel(&[v6("fd00::1")], 1).unwrap(), 1);
    assert_eq!(node.python("client", "print(tcp('fd00::1', 8080))"), "EPERM");
    assert_eq!(dial(), "10.1.0.1:8080");
    assert_eq!(kernel.relabel(&[[10, 1, 0, 1]], 1).unwrap(), 1);
    assert_eq!(node.python("client", "print(tcp('fd10::1', 8080))"), "ECONNREFUSED", "no healthy endpoint");
    assert_eq!(kernel.drift().unwrap(), []);
}
