//! What somebody with `CAP_NET_ADMIN` in a pod's namespace may do to its devices, and what others may hang on them.

use crate::LEASE;
use crate::rig::{self, Rig, tables};
use crate::support::{Worker, end, namespace_holder, run};
use ambit_ebpf::{Hooks, Kernel, KernelError};
use std::os::fd::AsFd;
use std::process::Child;

/// A frame that no program on cgroups sees.
const FRAME: &str = "frame(0x0800, ip(17, udp()))";

pub(crate) fn governed(rig: &mut Rig) -> Kernel {
    let kernel = rig.open().unwrap();
    rig.govern(&kernel);
    kernel.set_workload(rig.node.cgroup("client"), rig::CLIENT).unwrap();
    kernel.install(&tables(rig::SERVER)).unwrap();
    kernel.renew_lease(LEASE).unwrap();
    kernel
}

pub(crate) fn inside(pid: u32, command: &str) {
    run(&format!("nsenter --net=/proc/{pid}/ns/net {command}"));
}

/// A namespace that goes with the test.
pub(crate) struct Elsewhere(Child);

impl Elsewhere {
    pub(crate) fn new() -> Self {
        Self(namespace_holder())
    }

    pub(crate) fn pid(&self) -> u32 {
        self.0.id()
    }

    pub(crate) fn netns(&self) -> std::fs::File {
        crate::support::netns_of(&self.0)
    }
}

impl Drop for Elsewhere {
    fn drop(&mut self) {
        end(&mut self.0);
    }
}

/// The pod's device goes from one namespace to another, and is set up there as it was.
fn move_wire(from: u32, to: u32) {
    inside(from, &format!("ip link set eth0 netns {to}"));
    inside(to, "ip addr add 10.99.0.1/24 dev eth0");
    inside(to, "ip link set eth0 up");
}

#[test]
fn a_wire_that_the_pod_took_elsewhere_stays_guarded_until_it_is_gone() {
    let mut rig = Rig::new();
    let (pod, elsewhere) = (rig.node.pod.id(), Elsewhere::new());
    move_wire(pod, elsewhere.pid());
    assert!(rig.sent(elsewhere.pid(), "CHILD000", FRAME) > 0, "the way is there before the pod is guarded");
    move_wire(elsewhere.pid(), pod);
    let kernel = governed(&mut rig);

    move_wire(pod, elsewhere.pid());
    rig.keep(&kernel);
    assert_eq!(rig.sent(elsewhere.pid(), "CHILD001", FRAME), 0, "from a child namespace");
    // As an agent does that starts now.
    assert_eq!(rig.guard(&kernel), 0);
    assert_eq!(rig.sent(elsewhere.pid(), "CHILD002", FRAME), 0, "from a child namespace, after a restart");
    // The pod ends, as its file and its cgroup say; who was moved to the child namespace lives on.
    rig.agent_dies();
    assert!(!rig.on_node(|| kernel.detach_pod("pod").unwrap()), "the wire is there");
    assert_eq!(kernel.pods().unwrap(), ["pod"], "what is still guarded is found again after a restart");
    assert_eq!(rig.sent(elsewhere.pid(), "CHILD003", FRAME), 0, "of a pod that was let go");
    drop(elsewhere);
    let gone = (0..100).any(|_| {
        std::thread::sleep(std::time::Duration::from_millis(50));
        rig.on_node(|| kernel.detach_pod("pod").unwrap())
    });
    assert!(gone && kernel.pods().unwrap().is_empty(), "the guard goes with the wire");
}

/// What is no veth to this node cannot be guarded, and keeps nothing else from being so.
#[test]
fn a_device_of_the_pods_own_opens_no_other() {
    for (device, make) in [
        ("x0", "ip link add x0 type veth peer name x1"),
        ("x0", "ip tuntap add x0 mode tap"),
        ("x0", "ip link add link eth0 name x0 type macvlan"),
        ("x0", "ip link add x0 type bridge"),
    ] {
        let mut rig = Rig::new();
        let pod = rig.node.pod.id();
        inside(pod, make);
        inside(pod, &format!("ip link set {device} up"));
        assert!(rig.sent(pod, "EXTRA000", FRAME) > 0, "{make}: the way is there before the pod is guarded");
        let kernel = rig.open().unwrap();
        let error = rig.guard_fails(&kernel);
        assert!(matches!(&error, KernelError::OpenDevice { device: found, .. } if found == device), "{make}: {error}");
        assert!(!rig.wires_are_guarded(&kernel), "{make} was not told");
        assert_eq!(rig.sent(pod, "EXTRA001", FRAME), 0, "{make}");
        inside(pod, &format!("ip link del {device}"));
        assert_eq!(rig.guard(&kernel), 1);
        assert!(rig.wires_are_guarded(&kernel));
    }
}

/// A device that was taken elsewhere before anybody saw it cannot be found: a pod without any is nobody.
#[test]
fn a_pod_without_a_wire_is_told() {
    let rig = Rig::new();
    let elsewhere = Elsewhere::new();
    move_wire(rig.node.pod.id(), elsewhere.pid());
    let kernel = rig.open().unwrap();
    let error = rig.guard_fails(&kernel);
    assert!(matches!(error, KernelError::NoWire(_)), "{error}");
    assert!(!rig.wires_are_guarded(&kernel));
}

/// Two veths may bear the same pair of numbers, in other namespaces: one is the pod's own, the other somebody else's.
#[test]
fn a_number_of_a_device_is_nobodys_name() {
    let rig = Rig::new();
    let (pod, node, elsewhere) = (rig.node.pod.id(), rig.node.outside.id(), Elsewhere::new());
    let make = |netns: u32, name: &str, index: u32, peer: u32, peer_index: u32| {
        let peer = format!("peer name {name}p index {peer_index} netns {peer}");
        inside(netns, &format!("ip link add {name} index {index} type veth {peer}"));
    };
    make(node, "victim", 77, rig.near(), 88);
    make(pod, "x0", 88, elsewhere.pid(), 77);
    inside(pod, "ip link set x0 up");
    let kernel = rig.open().unwrap();
    let error = rig.guard_fails(&kernel);
    assert!(matches!(&error, KernelError::OpenDevice { device, .. } if device == "x0"), "{error}");
    let pins: Vec<_> = std::fs::read_dir(rig.node.pins.join("pods/pod")).unwrap().flatten().collect();
    assert_eq!(pins.len(), 2, "one link each way, on the pod's own veth: {pins:?}");
}

/// Somebody else's program on the node's side, which lets everything pass; it goes when the worker ends.
fn pass_all(rig: &Rig) -> Worker {
    let node = format!("/proc/{}/ns/net", rig.node.outside.id());
    let mut worker = rig.node.worker_in(&node, None, PASS_ALL);
    assert_eq!(worker.answer(), "attached");
    worker
}

/// bpf(2): `return TCX_PASS`, attached by BPF_LINK_CREATE with BPF_F_BEFORE, each way.
const PASS_ALL: &str = r#"
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
number = {'x86_64': 321, 'aarch64': 280}[os.uname().machine]
def bpf(command, attr):
    buffer = ctypes.create_string_buffer(attr, 128)
    found = libc.syscall(number, command, buffer, 128)
    if found < 0: raise OSError(ctypes.get_errno(), 'bpf')
    return found
program = ctypes.create_string_buffer(bytes([0xb7, 0, 0, 0, 0, 0, 0, 0, 0x95, 0, 0, 0, 0, 0, 0, 0]))
licence = ctypes.create_string_buffer(b'GPL')
links = []
for direction in (46, 47):
    load = struct.pack('=IIQQIIQII16sII', 3, 2, ctypes.addressof(program), ctypes.addressof(licence), 0, 0, 0, 0, 0, b'pass', 0, direction)
    links.append(bpf(28, struct.pack('=IIII', bpf(5, load), socket.if_nametoindex('eth0'), direction, 8)))
print('attached', flush=True)
sys.stdin.read()
"#;

#[test]
fn nobody_elses_program_passes_packets_by() {
    if !Rig::has_links() {
        println!(
            "this kernel has no links for packet programs: nobody can hang one before a filter of the first priority"
        );
        return;
    }
    let mut rig = Rig::new();
    let pod = rig.node.pod.id();
    let before = pass_all(&rig);
    let kernel = governed(&mut rig);
    assert_eq!(rig.sent(pod, "FIRST000", FRAME), 0, "past a program that was there before");

    let after = pass_all(&rig);
    assert!(rig.sent(pod, "FIRST001", FRAME) > 0, "a program before ours passes by: else this proves nothing");
    assert!(!rig.wires_are_guarded(&kernel), "not told");
    rig.keep(&kernel);
    assert!(rig.wires_are_guarded(&kernel));
    assert_eq!(rig.sent(pod, "FIRST002", FRAME), 0, "past a program that came later");
    let pins: Vec<_> = std::fs::read_dir(rig.node.pins.join("pods/pod")).unwrap().flatten().collect();
    assert_eq!(pins.len(), 4, "listener, link, and one each way: {pins:?}");
    drop((before, after));
}

/// As on kernels before 6.6.
#[test]
fn a_filter_guards_a_wire_as_a_link_does() {
    let mut rig = Rig::new();
    let (pod, node, elsewhere) = (rig.node.pod.id(), rig.node.outside.id(), Elsewhere::new());
    let open = |rig: &Rig| Kernel::open_with(&rig.options(), Hooks::Clsact).unwrap();
    assert!(rig.sent(pod, "FILTER00", FRAME) > 0, "the way is there before the pod is guarded");
    let kernel = open(&rig);
    assert!(!rig.wires_are_guarded(&kernel));
    assert_eq!(rig.guard(&kernel), 1);
    assert!(rig.wires_are_guarded(&kernel));
    assert_eq!(rig.sent(pod, "FILTER01", FRAME), 0);
    let pins = |rig: &Rig| std::fs::read_dir(rig.node.pins.join("pods/pod")).unwrap().count();
    assert_eq!(pins(&rig), 2, "a program each way");

    // The next agent takes its place in the same place.
    drop(kernel);
    let kernel = open(&rig);
    assert!(rig.wires_are_guarded(&kernel), "what a former agent hung there is known");
    assert_eq!(rig.guard(&kernel), 1);
    assert_eq!((pins(&rig), rig.sent(pod, "FILTER02", FRAME)), (2, 0));

    // Others take it off: it is told, and put back.
    inside(node, "tc filter del dev eth0 ingress pref 1");
    assert!(rig.sent(pod, "FILTER03", FRAME) > 0 && !rig.wires_are_guarded(&kernel));
    rig.keep(&kernel);
    assert!(rig.wires_are_guarded(&kernel));
    assert_eq!((pins(&rig), rig.sent(pod, "FILTER04", FRAME)), (2, 0));

    move_wire(pod, elsewhere.pid());
    rig.keep(&kernel);
    assert_eq!(rig.sent(elsewhere.pid(), "FILTER05", FRAME), 0, "from a child namespace");
    assert!(!rig.on_node(|| kernel.detach_pod("pod").unwrap()), "the wire is there");
    move_wire(elsewhere.pid(), pod);
    rig.on_node(|| Kernel::remove(&rig.node.pins).unwrap());
    assert!(rig.sent(pod, "FILTER06", FRAME) > 0, "removed with everything");
}

/// A pod's file may say another pod's namespace for a while, or a pod come again under another name: no guard takes the
/// other's place over and over, and what is guarded twice is let go once.
#[test]
fn a_wire_that_two_pods_claim_is_guarded_and_goes_with_the_last() {
    let mut rig = Rig::new();
    let pod = rig.node.pod.id();
    let kernel = governed(&mut rig);
    rig.on_node(|| kernel.guard_wires("other", rig.node.pod_netns().as_fd(), crate::support::POD).unwrap());
    assert!(rig.wires_are_guarded(&kernel), "a guard of ours before ours is no stranger's");
    assert!(rig.on_node(|| kernel.wires_are_guarded("other", rig.node.pod_netns().as_fd()).unwrap()));
    // A device has one first filter, that of who came last: it stays.
    let let_go = rig.on_node(|| kernel.detach_pod("other").unwrap());
    assert_eq!(let_go, Rig::has_links(), "the wire is guarded for the pod");
    assert_eq!(rig.on_node(|| kernel.detach_pod("pod").unwrap()), !let_go, "and for nobody else");
    rig.agent_dies();
    assert_eq!(rig.sent(pod, "TWICE000", FRAME), 0);
}
