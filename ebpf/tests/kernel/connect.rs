//! What a workload gets from connect(), with real programs, sockets, cgroups and namespaces.

use crate::support::{Node, accept, at, try_accept};
use ambit_ebpf::{
    Action, Counters, Event, Kernel, Reason, Service, ServiceEndpoint, Tables, Tier, Verdict, VerdictKey, netns_cookie,
};
use std::io::{Read, Write};
use std::net::Ipv4Addr;
use std::time::Duration;

const CLIENT: u32 = 300;
const ALLOWED: u32 = 301;
const DENIED: u32 = 302;
const UNNAMED: u32 = 303;
const LEASE: Duration = Duration::from_secs(600);

fn allow(source: u32, destination: u32, port: u16) -> (VerdictKey, Verdict) {
    (VerdictKey { source, destination, port }, Verdict { action: Action::Allow, rule: 7 })
}

fn deny(source: u32, destination: u32, port: u16) -> (VerdictKey, Verdict) {
    (VerdictKey { source, destination, port }, Verdict { action: Action::Deny, rule: 9 })
}

fn tables() -> Tables {
    Tables {
        verdicts: vec![
            allow(CLIENT, ALLOWED, 8080),
            allow(CLIENT, DENIED, 0),
            deny(CLIENT, DENIED, 8080),
            allow(CLIENT, UNNAMED, 9999),
        ],
        endpoints: vec![
            (Ipv4Addr::new(10, 1, 0, 1), ALLOWED),
            (Ipv4Addr::new(10, 1, 0, 2), DENIED),
            (Ipv4Addr::new(10, 1, 0, 3), UNNAMED),
        ],
        services: vec![],
        ..Tables::default()
    }
}

/// A node with the tables above in force and one enrolled workload, `client`.
fn node() -> (Node, Kernel) {
    let node = Node::new();
    let kernel = Kernel::open(&node.options()).unwrap();
    kernel.install(&tables()).unwrap();
    kernel.set_workload(node.cgroup("client"), CLIENT).unwrap();
    kernel.renew_lease(LEASE).unwrap();
    (node, kernel)
}

#[test]
fn an_allowed_connection_reaches_the_listener_and_knows_where_it_wanted_to_go() {
    let (node, kernel) = node();
    let listener = node.attach(&kernel);
    let asked = at([10, 1, 0, 1], 8080);
    for host in ["10.1.0.1", "::ffff:10.1.0.1"] {
        let seen = node.python("client", &format!("print(tcp('{host}', 8080))"));
        assert_eq!(seen, format!("ok {host}:8080"), "getpeername shows what was asked for");
        let (stream, client, capture) = accept(&listener);
        assert_eq!(capture.ip().octets()[0], 127);
        assert_ne!(*capture.ip(), Ipv4Addr::LOCALHOST, "one fixed address would have one range of ports");
        assert_eq!(capture.port(), ambit_ebpf::CAPTURE_PORT);
        let cookie = netns_cookie(&stream).unwrap();
        let found = kernel.original_destination(cookie, client, capture).expect("a record");
        assert_eq!((found.asked, found.endpoint, found.identity), (asked, asked, ALLOWED));
        assert_eq!(kernel.original_destination(cookie, client, capture), None, "a record is taken once");
        assert_eq!(kernel.original_destination(cookie + 1, client, capture), None);
    }
    assert_eq!(kernel.counters().unwrap().allowed, 2);
}

#[test]
fn every_refusal_is_immediate_counted_and_told() {
    let (node, kernel) = node();
    let listener = node.attach(&kernel);
    let stranger = node.cgroup("stranger");
    let client = node.cgroup("client");
    let rows: [(&str, &str, &str, Option<Reason>); 16] = [
        ("client", "tcp('10.1.0.2', 8080)", "EPERM", Some(Reason::PolicyDeny)),
        ("client", "tcp('::ffff:10.1.0.2', 8080)", "EPERM", Some(Reason::PolicyDeny)),
        ("client", "tcp('10.1.0.3', 8080)", "EPERM", Some(Reason::NoVerdict)),
        ("client", "tcp('10.1.0.1', 8081)", "EPERM", Some(Reason::NoVerdict)),
        ("client", "tcp('10.1.0.9', 8080)", "EPERM", Some(Reason::UnknownDestination)),
        ("client", "tcp('0.0.0.0', 8080)", "EPERM", Some(Reason::UnknownDestination)),
        ("client", "tcp('2001:db8::1', 8080)", "EPERM", Some(Reason::NativeIpv6)),
        ("client", "tcp('::1', 8080)", "ECONNREFUSED", None),
        ("client", "tcp('127.0.0.1', 15001)", "EPERM", Some(Reason::CaptureAddress)),
        ("client", "tcp('127.7.7.7', 15001)", "EPERM", Some(Reason::CaptureAddress)),
        ("client", "udp_connect('10.1.0.1', 8080)", "EPERM", Some(Reason::NotTcp)),
        ("client", "udp_send('10.1.0.1', 53)", "EPERM", Some(Reason::NotTcp)),
        ("client", "udp_send('2001:db8::1', 53)", "EPERM", Some(Reason::NativeIpv6)),
        ("client", "on_device('eth0', '10.1.0.1', 8080)", "EPERM", Some(Reason::BoundDevice)),
        ("client", "udp_send('127.0.0.1', 53)", "ok", None),
        ("stranger", "tcp('127.0.0.1', 1)", "EPERM", Some(Reason::UnknownSource)),
    ];
    let helpers = r#"
def family(host): return socket.AF_INET6 if ':' in host else socket.AF_INET
def udp_connect(host, port):
    with socket.socket(family(host), socket.SOCK_DGRAM) as s: return outcome(s, (host, port))
def udp_send(host, port):
    with socket.socket(family(host), socket.SOCK_DGRAM) as s:
        try: s.sendto(b'x', (host, port)); return 'ok'
        except OSError as e: return errno.errorcode[e.errno]
def on_device(device, host, port):
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode()); return outcome(s, (host, port))
"#;
    for cgroup in ["client", "stranger"] {
        let mine: Vec<_> = rows.iter().filter(|row| row.0 == cgroup).collect();
        let calls: String = mine.iter().map(|row| format!("print({})\n", row.1)).collect();
        let answers = node.python(cgroup, &format!("{helpers}\n{calls}"));
        for (row, answer) in mine.iter().zip(answers.lines()) {
            assert_eq!(answer, row.2, "{}", row.1);
        }
        assert_eq!(answers.lines().count(), mine.len());
    }
    assert!(try_accept(&listener, Duration::from_millis(100)).is_none(), "a refused connection came through");

    let mut events: Vec<Event> = Vec::new();
    kernel.drain_events(&mut |event| events.push(event)).unwrap();
    let told: Vec<Reason> = events.iter().map(|event| event.reason).collect();
    let expected: Vec<Reason> = rows.iter().filter_map(|row| row.3).collect();
    assert_eq!(told, expected);
    assert_eq!((events[0].cgroup, events[0].source, events[0].destination), (client, CLIENT, DENIED));
    assert_eq!((events[0].address, events[0].rule), (at([10, 1, 0, 2], 8080).into(), 9));
    let last = events.last().unwrap();
    assert_eq!((last.cgroup, last.source), (stranger, 0));
    let Counters { denied, events_lost, loopback, .. } = kernel.counters().unwrap();
    assert_eq!(denied.values().sum::<u64>(), expected.len() as u64);
    assert_eq!((denied[&Reason::PolicyDeny], denied[&Reason::NativeIpv6], events_lost, loopback), (2, 2, 0, 2));
}

/// The application's view stays true at both ends of its socket, and whatever it bound before.
#[test]
fn a_captured_socket_shows_the_pods_address_and_may_be_bound_to_it() {
    let (node, kernel) = node();
    let listener = node.attach(&kernel);
    let _server = node.listen_in_pod(Ipv4Addr::LOCALHOST, 8080);
    let script = "
def ends(host, family, bind=None, port=0):
    s = socket.socket(family)
    if bind: s.bind((bind, port))
    s.settimeout(2); s.connect((host, 8080))
    print(s.getsockname()[0], s.getpeername()[0]); s.close()
ends('10.1.0.1', socket.AF_INET)
ends('::ffff:10.1.0.1', socket.AF_INET6)
ends('10.1.0.1', socket.AF_INET, '10.99.0.1', 4568)
ends('10.1.0.1', socket.AF_INET, '0.0.0.0', 4569)
ends('127.0.0.1', socket.AF_INET)";
    let shown = node.python("client", script);
    let (pod, mapped) = ("10.99.0.1 10.1.0.1", "::ffff:10.99.0.1 ::ffff:10.1.0.1");
    assert_eq!(shown.lines().collect::<Vec<_>>(), [pod, mapped, pod, pod, "127.0.0.1 127.0.0.1"]);
    for _ in 0..4 {
        let (stream, client, capture) = accept(&listener);
        let found = kernel.original_destination(netns_cookie(&stream).unwrap(), client, capture);
        assert_eq!(found.map(|f| f.asked), Some(at([10, 1, 0, 1], 8080)), "{client}");
    }
}

#[test]
fn allowed_connections_are_told_as_often_as_asked() {
    let (node, kernel) = node();
    let _listener = node.attach(&kernel);
    let told = |one_in: u32, calls: usize| {
        kernel.sample_allowed(one_in).unwrap();
        node.python("client", &format!("for _ in range({calls}): tcp('10.1.0.1', 8080)"));
        let mut events: Vec<Event> = Vec::new();
        kernel.drain_events(&mut |event| events.push(event)).unwrap();
        assert!(events.iter().all(|e| e.reason == Reason::Allowed && e.source == CLIENT && e.destination == ALLOWED));
        assert!(events.iter().all(|e| e.rule == 7 && e.address == at([10, 1, 0, 1], 8080).into()));
        events.len()
    };
    assert_eq!((told(0, 20), told(1, 20)), (0, 20));
    // No more: nobody accepts, and the listener's queue has 128 places.
    let some = told(4, 80);
    assert!((5..=45).contains(&some), "{some} of 80, about 20 expected");
    let Counters { allowed, denied, .. } = kernel.counters().unwrap();
    assert_eq!((allowed, denied.values().sum::<u64>()), (120, 0));
    assert!(!denied.contains_key(&Reason::Allowed));
}

/// What `connect` and `sendmsg` programs never see must not exist: UDP-Lite sent in clear text around them.
#[test]
fn only_tcp_and_udp_sockets_can_be_made() {
    let (node, kernel) = node();
    let _listener = node.attach(&kernel);
    let stranger = node.cgroup("stranger");
    // Otherwise the kernel refuses a ping socket before it asks any program.
    node.in_pod(|| std::fs::write("/proc/sys/net/ipv4/ping_group_range", "0 2147483647").unwrap());
    let kinds = [
        ("AF_INET, SOCK_DGRAM", 136, "EPERM"),
        ("AF_INET6, SOCK_DGRAM", 136, "EPERM"),
        ("AF_INET, SOCK_DGRAM", 1, "EPERM"),
        ("AF_INET6, SOCK_DGRAM", 58, "EPERM"),
        ("AF_INET, SOCK_RAW", 1, "EPERM"),
        ("AF_INET, SOCK_RAW", 6, "EPERM"),
        ("AF_INET, SOCK_RAW", 255, "EPERM"),
        ("AF_INET6, SOCK_RAW", 58, "EPERM"),
        ("AF_INET, SOCK_STREAM", 0, "ok"),
        ("AF_INET6, SOCK_STREAM", 6, "ok"),
        ("AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC", 0, "ok"),
        ("AF_INET, SOCK_DGRAM", 0, "ok"),
        ("AF_INET6, SOCK_DGRAM", 17, "ok"),
        ("AF_UNIX, SOCK_DGRAM", 0, "ok"),
        ("AF_NETLINK, SOCK_RAW", 0, "ok"),
    ];
    // Of these the kernel may have no module; where it has, it asks the program.
    let modules = [
        ("AF_INET, SOCK_STREAM", 132, "EPERM"),
        ("AF_INET, SOCK_SEQPACKET", 132, "EPERM"),
        ("AF_INET, SOCK_DGRAM", 115, "EPERM"),
        ("AF_INET, SOCK_STREAM", 262, "ok"),
    ];
    let calls: String =
        kinds.iter().chain(&modules).map(|(kind, protocol, _)| format!("print(made({kind}, {protocol}))\n")).collect();
    let script = format!("{MADE}\n{calls}");
    let mut refused = Vec::new();
    for cgroup in ["client", "stranger"] {
        let answers = node.python(cgroup, &script);
        assert_eq!(answers.lines().count(), kinds.len() + modules.len());
        for (row, (answer, (kind, protocol, expected))) in answers.lines().zip(kinds.iter().chain(&modules)).enumerate()
        {
            let absent = row >= kinds.len() && ["EPROTONOSUPPORT", "ESOCKTNOSUPPORT"].contains(&answer);
            assert!(absent || answer == *expected, "{kind}, {protocol}: {answer}");
            refused.extend((answer == "EPERM").then_some(*protocol));
        }
    }
    let mut events: Vec<Event> = Vec::new();
    kernel.drain_events(&mut |event| events.push(event)).unwrap();
    assert!(events.iter().all(|event| event.reason == Reason::SocketKind), "{events:?}");
    assert_eq!(events.iter().map(|event| event.address.port()).collect::<Vec<_>>(), refused);
    assert_eq!((events[0].cgroup, events[0].source), (node.cgroup("client"), CLIENT));
    assert_eq!(events.last().map(|event| (event.cgroup, event.source)), Some((stranger, 0)));
    assert_eq!(kernel.counters().unwrap().denied[&Reason::SocketKind], refused.len() as u64);

    // The program is pinned like the others: no agent, no such socket either.
    drop(kernel);
    assert_eq!(node.python("client", &format!("{MADE}\nprint(made(AF_INET, SOCK_DGRAM, 136))")), "EPERM");
}

const MADE: &str = r#"
from socket import *
import socket
def made(*kind):
    try: socket.socket(*kind).close(); return 'ok'
    except OSError as e: return errno.errorcode[e.errno]
"#;

#[test]
fn a_socket_used_again_forgets_its_first_attempt() {
    let (node, kernel) = node();
    drop(node.attach(&kernel));
    let _server = node.listen_in_pod(Ipv4Addr::LOCALHOST, 8080);
    // Blocking: a timeout would make the first call end as "in progress", and the second one only collect its failure.
    let script = "
s = socket.socket()
print(errno.errorcode[s.connect_ex(('10.1.0.1', 8080))])
s.connect(('127.0.0.1', 8080))
print(s.getpeername()[0])";
    assert_eq!(node.python("client", script), "ECONNREFUSED\n127.0.0.1");
}

/// The kernel lets two connections share a source port if their destinations differ, and ours differ by design.
#[test]
fn two_flows_with_one_source_port_are_told_apart() {
    let (node, kernel) = node();
    let listener = node.attach(&kernel);
    let mut more = tables();
    more.endpoints.push((Ipv4Addr::new(10, 1, 0, 4), ALLOWED));
    kernel.install(&more).unwrap();
    node.python(
        "client",
        "
held = []
for host in ('10.1.0.1', '10.1.0.4'):
    s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    s.bind(('127.0.0.1', 4567)); s.connect((host, 8080)); held.append(s)",
    );
    let mut asked = Vec::new();
    for _ in 0..2 {
        let (stream, client, capture) = accept(&listener);
        assert_eq!(client, at([127, 0, 0, 1], 4567));
        let found = kernel.original_destination(netns_cookie(&stream).unwrap(), client, capture);
        asked.push(found.expect("a record each").asked);
    }
    assert_eq!(asked, [at([10, 1, 0, 1], 8080), at([10, 1, 0, 4], 8080)]);
}

/// Where nothing governs the capture address, whoever listens there would get the application's bytes.
#[test]
fn in_a_namespace_that_is_not_attached_nothing_is_captured() {
    let (node, kernel) = node();
    let squatter = node.listen_in_pod(Ipv4Addr::UNSPECIFIED, ambit_ebpf::CAPTURE_PORT);
    let to = at([10, 1, 0, 1], 8080);
    assert_eq!(node.connect("client", to), "EPERM");
    let listener = node.attach(&kernel);
    assert!(node.connect("client", to).starts_with("ok"));
    drop(accept(&listener));
    assert!(kernel.detach_pod("pod").unwrap());
    assert_eq!(node.connect("client", to), "EPERM");
    assert_eq!(kernel.counters().unwrap().denied[&Reason::NoCapture], 2);
    assert!(try_accept(&squatter, Duration::from_millis(50)).is_none());
}

#[test]
fn a_removed_workload_and_an_unknown_cgroup_may_do_nothing() {
    let (node, kernel) = node();
    let _listener = node.attach(&kernel);
    let id = node.cgroup("client");
    assert!(node.connect("client", at([10, 1, 0, 1], 8080)).starts_with("ok"));
    kernel.remove_workload(id).unwrap();
    kernel.remove_workload(id).unwrap();
    assert_eq!(node.connect("client", at([10, 1, 0, 1], 8080)), "EPERM");
}

#[test]
fn bytes_flow_and_a_flow_that_closed_before_accept_is_still_known() {
    let (node, kernel) = node();
    let listener = node.attach(&kernel);
    // Sends, closes and is gone before anyone accepts: the agent must still learn where it wanted to go.
    node.python("client", "s = socket.create_connection(('10.1.0.1', 8080)); s.sendall(b'fire and forget'); s.close()");
    let (mut stream, client, capture) = accept(&listener);
    stream.set_nonblocking(false).unwrap();
    let found = kernel.original_destination(netns_cookie(&stream).unwrap(), client, capture);
    assert_eq!(found.map(|f| f.asked), Some(at([10, 1, 0, 1], 8080)));
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    assert_eq!(text, "fire and forget");
    drop(stream.write_all(b"nobody reads this"));

    node.python("client", "s = socket.create_connection(('10.1.0.1', 8080)); s.close()");
    let untaken = accept(&listener);
    assert_eq!(kernel.sweep_closed_flows(Duration::from_secs(60)).unwrap(), 0, "too young");
    assert_eq!(kernel.sweep_closed_flows(Duration::ZERO).unwrap(), 1);
    drop(untaken);
}

#[test]
fn a_lease_that_ran_out_refuses_and_a_new_one_allows() {
    let (node, kernel) = node();
    let _listener = node.attach(&kernel);
    let to = at([10, 1, 0, 1], 8080);
    kernel.renew_lease(Duration::ZERO).unwrap();
    assert_eq!(node.connect("client", to), "EPERM");
    assert_eq!(kernel.counters().unwrap().denied[&Reason::LeaseExpired], 1);
    let server = node.listen_in_pod(Ipv4Addr::LOCALHOST, 8080);
    assert!(node.connect("client", at([127, 0, 0, 1], 8080)).starts_with("ok"), "loopback needs no lease");
    drop(server);
    kernel.renew_lease(LEASE).unwrap();
    assert!(node.connect("client", to).starts_with("ok"));
}

#[test]
fn before_the_first_install_everything_is_refused() {
    let node = Node::new();
    let kernel = Kernel::open(&node.options()).unwrap();
    kernel.set_workload(node.cgroup("client"), CLIENT).unwrap();
    assert_eq!(node.connect("client", at([10, 1, 0, 1], 8080)), "EPERM");
    kernel.renew_lease(LEASE).unwrap();
    assert_eq!(node.connect("client", at([10, 1, 0, 1], 8080)), "EPERM");
    let denied = kernel.counters().unwrap().denied;
    assert_eq!((denied[&Reason::LeaseExpired], denied[&Reason::NoTables]), (1, 1));
}

#[test]
fn a_service_prefers_local_endpoints_turns_among_equals_and_fails_over() {
    let (node, kernel) = node();
    let listener = node.attach(&kernel);
    let vip = at([10, 200, 0, 1], 80);
    let (near1, near2, far) = (at([10, 1, 1, 1], 8080), at([10, 1, 1, 2], 8080), at([10, 2, 1, 1], 8080));
    let endpoint = |address, tier| ServiceEndpoint { address, identity: ALLOWED, tier, healthy: true };
    kernel
        .install(&Tables {
            services: vec![Service {
                address: vip,
                endpoints: vec![
                    endpoint(far, Tier::Remote),
                    endpoint(near1, Tier::Local),
                    endpoint(near2, Tier::Local),
                ],
            }],
            ..tables()
        })
        .unwrap();
    let call = |times: usize| {
        let seen = node.python("client", &format!("for _ in range({times}): print(tcp('10.200.0.1', 80))"));
        assert!(seen.lines().all(|line| line == "ok 10.200.0.1:80"), "{seen}");
        let mut chosen = std::collections::BTreeMap::new();
        for _ in 0..times {
            let (stream, client, capture) = accept(&listener);
            let found = kernel.original_destination(netns_cookie(&stream).unwrap(), client, capture).unwrap();
            assert_eq!(found.asked, vip);
            *chosen.entry(found.endpoint).or_insert(0usize) += 1;
        }
        chosen.into_keys().collect::<Vec<_>>()
    };
    assert_eq!(call(40), [near1, near2], "both of the near tier, none of the far one");
    kernel.set_service_health(vip, near1, false).unwrap();
    assert_eq!(call(10), [near2]);
    kernel.set_service_health(vip, near2, false).unwrap();
    assert_eq!(call(10), [far]);
    kernel.set_service_health(vip, far, false).unwrap();
    assert_eq!(node.connect("client", vip), "ECONNREFUSED");
    kernel.set_service_health(vip, near1, true).unwrap();
    assert_eq!(call(10), [near1]);
    assert!(kernel.set_service_health(vip, at([10, 9, 9, 9], 1), true).is_err());
}

#[test]
fn relabelled_endpoints_are_refused_at_once_also_behind_their_service() {
    let (node, kernel) = node();
    let _listener = node.attach(&kernel);
    let (vip, good, bad) = (at([10, 200, 0, 1], 80), at([10, 1, 1, 1], 8080), at([10, 1, 1, 2], 8080));
    let endpoint = |address| ServiceEndpoint { address, identity: ALLOWED, tier: Tier::Local, healthy: true };
    let with = |endpoints: Vec<ServiceEndpoint>| Tables {
        endpoints: vec![(*good.ip(), ALLOWED), (*bad.ip(), ALLOWED)],
        services: vec![Service { address: vip, endpoints }],
        ..tables()
    };
    let nobody = 1;
    assert_eq!(kernel.relabel(&[*bad.ip()], nobody).unwrap(), 0, "not in the tables in force");
    kernel.install(&with(vec![endpoint(bad)])).unwrap();
    for to in [bad, vip] {
        assert_eq!(node.connect("client", to), format!("ok {to}"));
    }
    let elsewhere = Ipv4Addr::new(10, 9, 9, 9);
    assert_eq!(kernel.relabel(&[*bad.ip(), elsewhere], nobody).unwrap(), 1);
    assert_eq!(node.connect("client", bad), "EPERM");
    assert_eq!(node.connect("client", vip), "ECONNREFUSED", "the service's only endpoint");
    // Found healthy by somebody who did not hear of it: still nobody's.
    kernel.set_service_health(vip, bad, true).unwrap();
    assert_eq!(node.connect("client", vip), "EPERM");
    assert_eq!(node.connect("client", good), format!("ok {good}"));
    assert!(kernel.relabel(&[*good.ip()], 0).is_err());
    kernel.install(&with(vec![endpoint(bad)])).unwrap();
    assert_eq!(node.connect("client", bad), format!("ok {bad}"), "an install brings its own rows");
}
