//! Callers outside of the mesh, let in by their address: from which addresses, to which pod and port, and in which state of the
//! agent what they send reaches anybody, and that it is never the pod's own socket.

use crate::annex::{SOON, accepted, marks_in, nobody_came, socket_in, squatter, there_and_back, with_annex};
use crate::rig::{self, FAR, NEAR, Rig};
use crate::support::{POD, in_netns, run};
use crate::wires::{Elsewhere, inside};
use ambit_ebpf::{Action, Annex, Kernel, LetIn, Range, Reason, Tables, Verdict, VerdictKey};
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::time::Duration;

/// Numbers that no workload has: of the range, and of what no policy opens.
const RANGE: u32 = 1 << 31;
const CLOSED: u32 = 2;
/// Nobody answered within half a second.
const DROPPED: ErrorKind = ErrorKind::TimedOut;
/// Another address of the far machine.
const BESIDE: &str = "10.99.0.77";
const THIRD: &str = "10.99.0.78";

fn range(first: &str, bits: u8, number: u32) -> Range {
    Range { first: first.parse().unwrap(), bits, number }
}

/// What the pod that is `rig::CLIENT` is open to, beside all that there is without: `port` 0 is every port.
fn open(callers: &[Range], verdicts: &[(u16, Action)]) -> Tables {
    let mut tables = rig::tables(rig::SERVER);
    let row = |(port, action): &(u16, Action)| {
        let key = VerdictKey { source: RANGE, destination: rig::CLIENT, port: *port };
        (key, Verdict { action: *action, rule: 1 })
    };
    tables.verdicts.extend(verdicts.iter().map(row));
    tables.callers = callers.to_vec();
    tables
}

fn network() -> Vec<Range> {
    // A longer range begins within it: what the mesh knows.
    vec![range("10.99.0.0", 24, RANGE), range(NEAR, 32, CLOSED)]
}

fn let_in(kernel: &Kernel, annex: &Annex) -> (TcpListener, LetIn) {
    let fd = socket_in(annex, Ipv4Addr::LOCALHOST, 0);
    nix::sys::socket::listen(&fd, nix::sys::socket::Backlog::new(16).unwrap()).unwrap();
    let held = kernel.let_in(annex, fd.as_fd()).unwrap();
    (TcpListener::from(fd), held)
}

/// From an address and port of a machine beyond the pod's wire.
fn dial(netns: u32, from: (&str, u16), port: u16) -> std::io::Result<TcpStream> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, bind, connect, setsockopt, socket, sockopt};
    use std::os::fd::AsRawFd;
    let from = SocketAddrV4::new(from.0.parse().unwrap(), from.1);
    let netns = File::open(format!("/proc/{netns}/ns/net")).unwrap();
    in_netns(netns, move || {
        let fd = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
        setsockopt(&fd, sockopt::ReuseAddr, &true)?;
        bind(fd.as_raw_fd(), &SockaddrIn::from(from))?;
        // Of connect(2), too.
        setsockopt(&fd, sockopt::SendTimeout, &nix::sys::time::TimeVal::new(0, 500_000))?;
        connect(fd.as_raw_fd(), &SockaddrIn::from(SocketAddrV4::new(POD, port))).map_err(|e| match e {
            nix::errno::Errno::EINPROGRESS => std::io::Error::from(DROPPED),
            other => other.into(),
        })?;
        let tcp = TcpStream::from(fd);
        tcp.set_read_timeout(Some(SOON))?;
        Ok(tcp)
    })
}

/// A machine of its own, whose ports are all free.
fn third(rig: &Rig) -> Elsewhere {
    let (third, node) = (Elsewhere::new(), rig.node.outside.id());
    run(&format!("ip link add third netns {node} type veth peer name eth0 netns {}", third.pid()));
    for words in ["ip link set third master br0", "ip link set third up"] {
        inside(node, words);
    }
    for words in [&format!("ip addr add {THIRD}/24 dev eth0"), "ip link set lo up", "ip link set eth0 up"] {
        inside(third.pid(), words);
    }
    third
}

fn refused(rig: &Rig, from: (&str, u16), port: u16) -> ErrorKind {
    dial(rig.far(), from, port).map(|tcp| panic!("{tcp:?}")).unwrap_err().kind()
}

/// The pod is the very pod that policies speak of, and so is the other one of its node.
fn somebody(rig: &Rig, kernel: &Kernel) {
    kernel.set_locals(&rig.locals(kernel, rig::SERVER, true)).unwrap();
}

/// How the caller's end is told.
fn ended((mut caller, _called): (TcpStream, TcpStream)) -> ErrorKind {
    // A packet of its own finds out.
    (0..20)
        .find_map(|_| {
            caller.write_all(b"x").err().or_else(|| {
                std::thread::sleep(Duration::from_millis(20));
                None
            })
        })
        .map_or_else(|| caller.read(&mut [0; 1]).map(|n| panic!("read {n}")).unwrap_err().kind(), |e| e.kind())
}

#[test]
fn what_a_range_opens_is_the_agents_and_nothing_else_is_open() {
    let (rig, kernel) = with_annex();
    inside(rig.far(), &format!("ip addr add {BESIDE}/24 dev eth0"));
    inside(rig.node.pod.id(), "ip link set eth0 promisc on");
    let third = third(&rig);
    let (listener, _held) = let_in(&kernel, rig.annex());
    let mut pod = rig.capture_in_pod();
    let own = rig.node.listen_in_pod(Ipv4Addr::UNSPECIFIED, 8443);
    somebody(&rig, &kernel);

    // Without a range, or a verdict about it, all is as it was.
    for tables in [open(&[], &[(8443, Action::Allow)]), open(&network(), &[])] {
        kernel.install(&tables).unwrap();
        assert_eq!(refused(&rig, (FAR, 0), 8443), ErrorKind::ConnectionRefused);
    }
    kernel.install(&open(&network(), &[(8443, Action::Allow)])).unwrap();
    let caller = dial(rig.far(), (FAR, 0), 8443).unwrap();
    let called = accepted(&listener);
    assert_eq!(called.local_addr().unwrap(), SocketAddr::from((POD, 8443)), "it tells which pod and port are meant");
    assert_eq!(called.peer_addr().unwrap(), caller.local_addr().unwrap(), "and who calls");
    there_and_back(&caller, &called);
    assert!(nobody_came(&own), "it is not the pod's to answer");
    assert_eq!(marks_in(&mut pod), 0, "frames that the pod saw");

    // Another port, and ports of the mesh itself.
    assert_eq!(refused(&rig, (FAR, 0), 8444), ErrorKind::ConnectionRefused);
    kernel.install(&open(&network(), &[(0, Action::Allow), (8444, Action::Deny)])).unwrap();
    for port in [8444, 15001, 15006] {
        assert_eq!(refused(&rig, (FAR, 0), port), ErrorKind::ConnectionRefused, "{port}");
        // What comes from HBONE's port goes to the annex anyway: there it is judged as well.
        assert_eq!(dial(third.pid(), (THIRD, 15_008), port).unwrap_err().kind(), DROPPED, "{port}");
    }
    assert_eq!(refused(&rig, (FAR, 0), 15_008), DROPPED, "HBONE's, and no listener is there");
    drop(dial(rig.far(), (FAR, 0), 9999).unwrap());
    drop(accepted(&listener));
    drop(dial(third.pid(), (THIRD, 15_008), 9999).unwrap());
    drop(accepted(&listener));

    // Another address: of nobody's range, or one that the mesh knows.
    kernel.install(&open(&[range(FAR, 32, RANGE)], &[(8443, Action::Allow)])).unwrap();
    drop(dial(rig.far(), (FAR, 0), 8443).unwrap());
    drop(accepted(&listener));
    assert_eq!(refused(&rig, (BESIDE, 0), 8443), ErrorKind::ConnectionRefused);
    kernel.install(&open(&[range(FAR, 32, CLOSED), range("10.99.0.0", 24, RANGE)], &[(8443, Action::Allow)])).unwrap();
    assert_eq!(refused(&rig, (FAR, 0), 8443), ErrorKind::ConnectionRefused);
    drop(dial(rig.far(), (BESIDE, 0), 8443).unwrap());
    drop(accepted(&listener));

    // The other pod of this node, under its own address and under the far machine's.
    kernel.install(&open(&[range("10.99.0.0", 24, RANGE)], &[(8443, Action::Allow)])).unwrap();
    assert_eq!(dial(rig.near(), (NEAR, 0), 8443).unwrap_err().kind(), DROPPED, "forged: dropped");
    listener.set_nonblocking(true).unwrap();
    assert!(listener.accept().is_err() && nobody_came(&own), "nobody else came");
    assert_eq!(marks_in(&mut pod), 0);
}

#[test]
fn it_ends_with_the_range_the_lease_the_pod_and_the_agent() {
    let (mut rig, kernel) = with_annex();
    let (listener, held) = let_in(&kernel, rig.annex());
    let own = squatter(&rig);
    let tables = open(&network(), &[(8443, Action::Allow)]);
    kernel.install(&tables).unwrap();
    let pair = || {
        let caller = dial(rig.far(), (FAR, 0), 8443).unwrap();
        let called = accepted(&listener);
        there_and_back(&caller, &called);
        (caller, called)
    };
    // Nobody has said yet who the pod is.
    kernel.set_locals(&[]).unwrap();
    assert_eq!(refused(&rig, (FAR, 0), 8443), ErrorKind::ConnectionRefused);
    // Nor is it who had its address before.
    let mut former = rig.locals(&kernel, rig::SERVER, true);
    former[0].place.netns += 1;
    kernel.set_locals(&former).unwrap();
    assert_eq!(refused(&rig, (FAR, 0), 8443), ErrorKind::ConnectionRefused);
    somebody(&rig, &kernel);
    let (caller, called) = pair();
    kernel.set_locals(&[]).unwrap();
    assert_eq!(ended((caller, called)), ErrorKind::ConnectionReset, "the pod is nobody");
    somebody(&rig, &kernel);

    // What was open is not carried on by the kernel, whatever the agent does: its packets reach the pod, which knows nothing of it.
    let (caller, called) = pair();
    kernel.install(&open(&network(), &[])).unwrap();
    assert_eq!(ended((caller, called)), ErrorKind::ConnectionReset, "withdrawn");
    assert_eq!(refused(&rig, (FAR, 0), 8443), ErrorKind::ConnectionRefused);
    kernel.install(&tables).unwrap();
    let (caller, called) = pair();
    kernel.shorten_lease(Duration::ZERO).unwrap();
    assert_eq!(refused(&rig, (FAR, 0), 8443), ErrorKind::ConnectionRefused, "the lease is over: none begins");
    there_and_back(&caller, &called);
    // Nor by what looks as if it had begun before; and nobody answers.
    let acknowledges = "frame(0x0800, ip(6, segment(4000, 8443)))";
    rig.send_in(&[("sealed".to_owned(), acknowledges)]);
    kernel.set_strict(true);
    rig.guard(&kernel);
    assert_eq!(ended((caller, called)), ErrorKind::ConnectionReset, "of a strict node what is open ends too");
    kernel.set_strict(false);
    rig.guard(&kernel);
    kernel.renew_lease(crate::LEASE).unwrap();
    drop(pair());

    // The agent lets go of its listener, or is dead: nobody answers for it.
    drop(held);
    drop(listener);
    assert_eq!(refused(&rig, (FAR, 0), 8443), DROPPED);
    let device = rig.annex().device().to_owned();
    rig.agent_dies();
    let gone = |rig: &Rig| !rig.on_node(|| std::path::Path::new(&format!("/proc/sys/net/ipv4/conf/{device}")).exists());
    assert!((0..100).any(|_| {
        std::thread::sleep(Duration::from_millis(30));
        gone(&rig)
    }));
    assert_eq!(refused(&rig, (FAR, 0), 8443), DROPPED, "dropped");
    assert!(nobody_came(&own));
    // One that starts, and has no annex yet.
    let starting = rig.open().unwrap();
    rig.guard(&starting);
    assert_eq!(refused(&rig, (FAR, 0), 8443), DROPPED);
    assert!(kernel.counters().unwrap().denied[&Reason::AgentAbsent] > 0, "told");
    // The next one.
    rig.govern(&starting);
    somebody(&rig, &starting);
    let (listener, _held) = let_in(&starting, rig.annex());
    let caller = dial(rig.far(), (FAR, 0), 8443).unwrap();
    there_and_back(&caller, &accepted(&listener));
}

/// An agent that takes over goes on in the annex of the one before: what is open there stays open.
#[test]
fn an_annex_is_taken_over_with_all_that_is_open_in_it() {
    let (rig, kernel) = with_annex();
    let (listener, held) = let_in(&kernel, rig.annex());
    somebody(&rig, &kernel);
    kernel.install(&open(&network(), &[(8443, Action::Allow)])).unwrap();
    let caller = dial(rig.far(), (FAR, 0), 8443).unwrap();
    let called = accepted(&listener);
    let taken = rig.annex().as_fd().try_clone_to_owned().unwrap();
    let taken = rig.on_node(|| Annex::of(taken).unwrap());
    assert_eq!((taken.index(), taken.device()), (rig.annex().index(), rig.annex().device()));
    let next = rig.open().unwrap();
    next.use_annex(&taken);
    rig.guard(&next);
    let (later, _next) = let_in(&next, &taken);
    drop((listener, held));
    there_and_back(&caller, &called);
    let other = dial(rig.far(), (FAR, 0), 8443).unwrap();
    there_and_back(&other, &accepted(&later));
}

/// The tables are swapped with all else, read back, and looked at like the others.
#[test]
fn ranges_of_callers_are_read_back_and_drift_is_seen() {
    let (_rig, kernel) = with_annex();
    let tables = open(&network(), &[(8443, Action::Allow)]);
    let digest = kernel.install(&tables).unwrap();
    assert_eq!(kernel.install(&tables).unwrap(), digest);
    assert_ne!(kernel.install(&open(&network()[..1], &[(8443, Action::Allow)])).unwrap(), digest);
    assert!(kernel.drift().unwrap().is_empty());
    for bad in [range("10.99.0.1", 24, RANGE), range("10.99.0.0", 24, 0), range("10.0.0.0", 33, RANGE)] {
        let refused = kernel.install(&open(&[bad], &[]));
        assert!(matches!(refused, Err(ambit_ebpf::KernelError::BadTables(_))), "{refused:?}");
    }
}
