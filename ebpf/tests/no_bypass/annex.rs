//! HBONE at a pod's address: it is the agent's in its annex, whole and alone, and nobody's where there is no agent.

use crate::rig::{FAR, Rig};
use crate::support::{POD, Worker, in_netns, run};
use crate::wires::{governed, inside};
use ambit_ebpf::{Annex, Kernel, Reason};
use nix::sys::socket::{SockaddrIn, bind, connect, setsockopt, sockopt};
use std::fs::File;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

const HBONE: u16 = 15008;
/// The node, on the bridge: what comes out of the annex is routed by it.
pub(crate) const NODE: &str = "10.99.0.254";
pub(crate) const SOON: Duration = Duration::from_secs(3);
const MARK: &[u8] = b"sealed by the agent and by nobody else";

/// A socket in the annex on `at`, an address that is only there.
pub(crate) fn socket_in(annex: &Annex, at: Ipv4Addr, port: u16) -> std::os::fd::OwnedFd {
    in_netns(File::from(annex.as_fd().try_clone_to_owned().unwrap()), move || {
        use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
        let fd = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
        setsockopt(&fd, sockopt::IpTransparent, &true).unwrap();
        setsockopt(&fd, sockopt::ReuseAddr, &true).unwrap();
        bind(fd.as_raw_fd(), &SockaddrIn::from(std::net::SocketAddrV4::new(at, port))).unwrap();
        fd
    })
}

fn listen_in(annex: &Annex) -> TcpListener {
    let fd = socket_in(annex, Ipv4Addr::UNSPECIFIED, HBONE);
    nix::sys::socket::listen(&fd, nix::sys::socket::Backlog::new(16).unwrap()).unwrap();
    TcpListener::from(fd)
}

pub(crate) fn accepted(listener: &TcpListener) -> TcpStream {
    listener.set_nonblocking(true).unwrap();
    let until = std::time::Instant::now() + SOON;
    loop {
        match listener.accept() {
            Ok((tcp, _)) => {
                tcp.set_nonblocking(false).unwrap();
                tcp.set_read_timeout(Some(SOON)).unwrap();
                return tcp;
            }
            Err(_) if std::time::Instant::now() < until => std::thread::sleep(Duration::from_millis(5)),
            Err(e) => panic!("nobody came: {e}"),
        }
    }
}

fn from_far(rig: &Rig, wait: Duration) -> std::io::Result<TcpStream> {
    let far = File::open(format!("/proc/{}/ns/net", rig.far())).unwrap();
    in_netns(far, move || TcpStream::connect_timeout(&(POD, HBONE).into(), wait))
}

pub(crate) fn there_and_back(a: &TcpStream, b: &TcpStream) {
    for (mut from, to) in [(a, b), (b, a)] {
        // More than a segment, so that offloads are met; the mark is in it often.
        let sent = MARK.repeat(4000);
        let (mut reader, bytes) = (to.try_clone().unwrap(), sent.len());
        let reading = std::thread::spawn(move || {
            let mut got = vec![0; bytes];
            reader.read_exact(&mut got).map(|()| got)
        });
        from.write_all(&sent).unwrap();
        assert!(reading.join().unwrap().unwrap() == sent);
    }
}

pub(crate) fn marks_in(pod: &mut Worker) -> usize {
    pod.ask("sealed");
    pod.answer().parse().unwrap()
}

/// A listener of a workload on the agent's port, on every address of the pod.
pub(crate) fn squatter(rig: &Rig) -> TcpListener {
    rig.node.listen_in_pod(Ipv4Addr::UNSPECIFIED, HBONE)
}

pub(crate) fn nobody_came(squatter: &TcpListener) -> bool {
    squatter.set_nonblocking(true).unwrap();
    squatter.accept().is_err()
}

pub(crate) fn with_annex() -> (Rig, Kernel) {
    let mut rig = Rig::new();
    run(&format!("nsenter --net=/proc/{}/ns/net ip addr add {NODE}/24 dev br0", rig.node.outside.id()));
    let kernel = governed(&mut rig);
    // As set, whatever a new device has on this machine.
    let conf = |name: &str| format!("/proc/sys/net/ipv4/conf/{}/{name}", rig.annex().device());
    let read = |name: &str| rig.on_node(|| std::fs::read_to_string(conf(name)).unwrap());
    assert_eq!((read("forwarding").trim(), read("rp_filter").trim()), ("1", "0"));
    assert!(!rig.on_node(|| rig.annex().is_refused_by_the_node()));
    (rig, kernel)
}

#[test]
fn hbone_at_a_pods_address_is_the_agents_both_ways_and_the_pod_sees_none_of_it() {
    let (rig, _kernel) = with_annex();
    let (listener, squatter, mut pod) = (listen_in(rig.annex()), squatter(&rig), rig.capture_in_pod());
    // Whatever it does to its devices.
    inside(rig.node.pod.id(), "ip link set eth0 promisc on");

    let caller = from_far(&rig, SOON).unwrap();
    let called = accepted(&listener);
    assert_eq!(called.local_addr().unwrap(), SocketAddr::from((POD, HBONE)), "it tells which pod is meant");
    assert_eq!(called.peer_addr().unwrap().ip(), FAR.parse::<IpAddr>().unwrap(), "and who calls");
    there_and_back(&caller, &called);

    // And from the pod's address to that port of another.
    let there = rig.on_node(|| TcpListener::bind((NODE, HBONE)).unwrap());
    let fd = socket_in(rig.annex(), POD, 0);
    let to = std::net::SocketAddrV4::new(NODE.parse().unwrap(), HBONE);
    connect(fd.as_raw_fd(), &SockaddrIn::from(to)).unwrap();
    let calling = TcpStream::from(fd);
    calling.set_read_timeout(Some(SOON)).unwrap();
    let answering = accepted(&there);
    assert_eq!(answering.peer_addr().unwrap().ip(), IpAddr::V4(POD));
    there_and_back(&calling, &answering);

    assert_eq!(marks_in(&mut pod), 0, "frames that the pod saw");
    assert!(nobody_came(&squatter), "it is not the pod's to answer");
}

#[test]
fn where_the_agent_is_dead_nobody_answers_and_nothing_comes_in() {
    let (mut rig, kernel) = with_annex();
    let (squatter, mut pod) = (squatter(&rig), rig.capture_in_pod());
    let device = rig.annex().device().to_owned();
    let up = |rig: &Rig| rig.on_node(|| std::path::Path::new(&format!("/proc/sys/net/ipv4/conf/{device}")).exists());
    assert!(up(&rig));
    rig.agent_dies();
    // Namespaces end a moment later.
    assert!((0..100).any(|_| {
        std::thread::sleep(Duration::from_millis(30));
        !up(&rig)
    }));
    let wait = Duration::from_millis(500);
    assert_eq!(from_far(&rig, wait).unwrap_err().kind(), std::io::ErrorKind::TimedOut);
    // Clear text that no handshake came before, to and from that port.
    for ports in ["15008, 4000", "4000, 15008"] {
        rig.send_in(&[("sealed".to_owned(), &format!("frame(0x0800, ip(6, segment({ports})))"))]);
    }
    assert_eq!(marks_in(&mut pod), 0);
    assert!(nobody_came(&squatter));

    // An agent that starts, and has no annex yet.
    let starting = rig.open().unwrap();
    rig.guard(&starting);
    assert_eq!(from_far(&rig, wait).unwrap_err().kind(), std::io::ErrorKind::TimedOut);
    assert!(kernel.counters().unwrap().denied[&Reason::AgentAbsent] > 0, "told");
    assert!(nobody_came(&squatter));

    // The next agent's annex takes over where the pod is guarded anew.
    rig.govern(&starting);
    let listener = listen_in(rig.annex());
    let caller = from_far(&rig, SOON).unwrap();
    there_and_back(&caller, &accepted(&listener));
    assert!(nobody_came(&squatter));
}
