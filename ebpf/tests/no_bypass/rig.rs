//! Three machines on one bridge: the pod, another pod of its node (`near`) and another machine (`far`). Both of those capture
//! what reaches them and listen in clear. The bridge stands for the node, whose side of the pod's veth is its port.

use crate::attempts::{ATTEMPTS, TOOLS};
use crate::support::{Node, POD, Worker, end, ends_sockets, has, in_netns, namespace_holder, netns_of, run};
use ambit_ebpf::{Action, Annex, Capacity, Kernel, KernelError, Local, Options, Tables, Verdict, VerdictKey};
use libbpf_rs::libbpf_sys::bpf_map_create_opts;
use libbpf_rs::{MapHandle, MapType};
use std::collections::BTreeMap;
use std::io::Read;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::process::{Child, Command};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

pub(crate) const FAR: &str = "10.99.0.2";
pub(crate) const NEAR: &str = "10.99.0.3";
pub(crate) const CLIENT: u32 = 300;
pub(crate) const SERVER: u32 = 301;
pub(crate) const OTHER: u32 = 302;
/// The server under another number, which may be called too.
pub(crate) const OTHER_NUMBER: u32 = 303;
const VERDICTS_MAX: u32 = 64;

/// A state of the agent in which everything is tried.
pub(crate) struct State {
    pub(crate) name: &'static str,
    /// What the one allowed connection is told.
    pub(crate) allowed: &'static str,
    pub(crate) governed: bool,
}

/// `CLIENT` may call `SERVER` but on 9090; the far machine's address is `behind`'s.
pub(crate) fn tables(behind: u32) -> Tables {
    let server = if behind == OTHER_NUMBER { OTHER_NUMBER } else { SERVER };
    let verdict =
        |port, action| (VerdictKey { source: CLIENT, destination: server, port }, Verdict { action, rule: 1 });
    let endpoint = |address: &str, identity| (address.parse().unwrap(), identity);
    Tables {
        verdicts: vec![verdict(0, Action::Allow), verdict(9090, Action::Deny)],
        endpoints: vec![endpoint(FAR, behind), endpoint(NEAR, server)],
        endpoints6: vec![("fd99::2".parse().unwrap(), behind), ("fd99::3".parse().unwrap(), server)],
        ..Tables::default()
    }
}

/// One verdict more than there is room for.
pub(crate) fn too_much() -> Tables {
    let verdict =
        |n| (VerdictKey { source: CLIENT, destination: 1000 + n, port: 1 }, Verdict { action: Action::Allow, rule: 1 });
    Tables { verdicts: (0..=VERDICTS_MAX).map(verdict).collect(), ..tables(SERVER) }
}

/// A map of maps as the audit wants it, but with verdicts of half their size.
pub(crate) fn pin_narrow_verdicts(pin: &Path) {
    let size = size_of::<bpf_map_create_opts>() as _;
    let opts = bpf_map_create_opts { sz: size, ..Default::default() };
    let inner = MapHandle::create(MapType::Hash, Some("narrow"), 12, 4, 1, &opts).unwrap();
    let opts = bpf_map_create_opts { sz: size, inner_map_fd: inner.as_fd().as_raw_fd() as u32, ..Default::default() };
    MapHandle::create(MapType::ArrayOfMaps, Some("verdicts"), 4, 4, 2, &opts).unwrap().pin(pin).unwrap();
}

/// Another machine: what it captured is asked line by line.
struct Machine {
    namespace: Child,
    capture: Option<Worker>,
}

impl Machine {
    fn namespace(&self) -> String {
        format!("/proc/{}/ns/net", self.namespace.id())
    }
}

/// Listens, reads, and keeps every frame that comes in; answers a line of marks with how many frames hold each.
const MACHINE: &str = r#"
import threading
frames = []
c = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
c.setsockopt(socket.SOL_SOCKET, 33, 64 << 20)
c.bind(('eth0', 3))
def capture():
    while True:
        frame, where = c.recvfrom(70000)
        if where[2] != 4: frames.append(frame)
def serve(port):
    s = socket.socket(socket.AF_INET6); s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try: s.bind(('::', port)); s.listen(128)
    except OSError: return
    held = []
    while True: held.append(s.accept()[0])
for act, args in ((capture, ()), (serve, (8080,)), (serve, (9090,)), (serve, (15008,))):
    threading.Thread(target=act, args=args, daemon=True).start()
print('ready', flush=True)
k = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP)
for line in sys.stdin:
    if line.startswith('knock'):
        # Its checksum is wrong: the pod's kernel does not answer, so what may answer it is still open.
        _, pod, here, there = line.split()
        k.sendto(struct.pack('!HHIIBBHHH', int(here), int(there), 7, 0, 0x50, 2, 1000, 0, 0), (pod, 0))
        print('knocked', flush=True)
        continue
    time.sleep(0.2)
    seen = list(frames)
    print(' '.join(str(sum(mark.encode() in frame for frame in seen)) for mark in line.split()), flush=True)
"#;

pub(crate) struct Rig {
    agent: Option<Agent>,
    /// Of the other pod of the node, where that is governed.
    near_agent: Option<Agent>,
    /// Where the agent would speak HBONE; goes with it.
    annex: Option<Annex>,
    before: Vec<(&'static str, Worker)>,
    machines: Vec<Machine>,
    turn: usize,
    pub(crate) node: Node,
}

impl Rig {
    pub(crate) fn new() -> Self {
        let node = Node::new();
        let on_node = format!("nsenter --net=/proc/{}/ns/net", node.outside.id());
        run(&format!("{on_node} ip addr flush dev eth0"));
        run(&format!("{on_node} ip link add br0 type bridge"));
        run(&format!("{on_node} ip link set eth0 master br0"));
        run(&format!("{on_node} ip link set br0 up"));
        let mut rig =
            Self { agent: None, near_agent: None, annex: None, before: vec![], machines: vec![], turn: 0, node };
        rig.address_pod();
        for (name, address, six) in [("far", FAR, "fd99::2"), ("near", NEAR, "fd99::3")] {
            let mut machine = Machine { namespace: namespace_holder(), capture: None };
            let inside = format!("nsenter --net={}", machine.namespace());
            run(&format!(
                "ip link add {name} netns {} type veth peer name eth0 netns {}",
                rig.node.outside.id(),
                machine.namespace.id()
            ));
            run(&format!("{on_node} ip link set {name} master br0 && {on_node} ip link set {name} up"));
            run(&format!("{inside} ip link set lo up && {inside} ip addr add {address}/24 dev eth0"));
            run(&format!("{inside} ip addr add {six}/64 dev eth0 nodad && {inside} ip link set eth0 up"));
            let mut capture = rig.node.worker_in(&machine.namespace(), None, MACHINE);
            assert_eq!(capture.answer(), "ready");
            machine.capture = Some(capture);
            rig.machines.push(machine);
        }
        rig.node.in_pod(|| std::fs::write("/proc/sys/net/ipv4/ping_group_range", "0 2147483647").unwrap());
        rig
    }

    /// What `Node` does not give its pod.
    fn address_pod(&self) {
        let inside = format!("nsenter --net=/proc/{}/ns/net", self.node.pod.id());
        run(&format!("{inside} ip addr add fd99::1/64 dev eth0 nodad"));
        run(&format!("{inside} ip route add default dev eth0"));
    }

    /// The pod's veth goes, and another of the same name and address comes.
    pub(crate) fn remake_wire(&self) {
        let (pod, outside) = (self.node.pod.id(), self.node.outside.id());
        run(&format!("nsenter --net=/proc/{pod}/ns/net ip link del eth0"));
        run(&format!("ip link add eth0 netns {pod} type veth peer name eth0 netns {outside}"));
        run(&format!("nsenter --net=/proc/{outside}/ns/net ip link set eth0 master br0"));
        run(&format!("nsenter --net=/proc/{outside}/ns/net ip link set eth0 up"));
        run(&format!("nsenter --net=/proc/{pod}/ns/net ip addr add {POD}/24 dev eth0"));
        run(&format!("nsenter --net=/proc/{pod}/ns/net ip link set eth0 up"));
        self.address_pod();
    }

    pub(crate) fn options(&self) -> Options {
        let capacity = Capacity { verdicts: VERDICTS_MAX, ..Capacity::default() };
        Options { capacity, ..self.node.options() }
    }

    pub(crate) fn open(&self) -> Result<Kernel, KernelError> {
        Kernel::open(&self.options())
    }

    /// Whether packet programs hang by links here (6.6).
    pub(crate) fn has_links() -> bool {
        has("tcx, 6.6")
    }

    /// Processes that connect now, and send whenever they are asked.
    pub(crate) fn connect_before(&mut self) {
        let script = format!(
            "s = socket.create_connection(('{FAR}', 9090), 2)\nprint('ready', flush=True)\nfor line in sys.stdin:\n    \
             try: s.sendall(line.strip().encode()); print('ok', flush=True)\n    \
             except OSError as e: print(errno.errorcode.get(e.errno, e), flush=True)"
        );
        self.node.cgroup("client");
        for (actor, cgroup) in [("before", None), ("before-client", Some("client"))] {
            let pod = format!("/proc/{}/ns/net", self.node.pod.id());
            let mut worker = self.node.worker_in(&pod, cgroup, &script);
            assert_eq!(worker.answer(), "ready");
            self.before.push((actor, worker));
        }
    }

    /// As the agent does: the wire first, then the namespace, then what was there before.
    pub(crate) fn govern(&mut self, kernel: &Kernel) {
        let annex = self.annex.take().unwrap_or_else(|| self.on_node(|| Annex::make().unwrap()));
        kernel.use_annex(&annex);
        self.annex = Some(annex);
        assert_eq!(self.guard(kernel), 1);
        self.attach_only(kernel);
        assert_eq!(kernel.end_bypassing(self.node.pod_netns().as_fd()).unwrap(), ends_sockets());
    }

    pub(crate) fn attach_only(&mut self, kernel: &Kernel) {
        drop(self.agent.take());
        self.agent = Some(Agent::start(self.node.attach_both(kernel, "fd99::1".parse().unwrap())));
    }

    /// How many wires of the pod are guarded now.
    pub(crate) fn guard(&self, kernel: &Kernel) -> usize {
        let pod = self.node.pod_netns();
        self.on_node(|| kernel.guard_wires("pod", pod.as_fd(), POD).unwrap())
    }

    /// The same where it ends in an error.
    pub(crate) fn guard_fails(&self, kernel: &Kernel) -> KernelError {
        let pod = self.node.pod_netns();
        self.on_node(|| kernel.guard_wires("pod", pod.as_fd(), POD).unwrap_err())
    }

    pub(crate) fn wires_are_guarded(&self, kernel: &Kernel) -> bool {
        let pod = self.node.pod_netns();
        self.on_node(|| kernel.wires_are_guarded("pod", pod.as_fd()).unwrap())
    }

    /// The other pod of the node is governed too.
    pub(crate) fn govern_near(&mut self, kernel: &Kernel) {
        let address: Ipv4Addr = NEAR.parse().unwrap();
        let netns = netns_of(&self.machines[1].namespace);
        assert_eq!(self.on_node(|| kernel.guard_wires("near", netns.as_fd(), address).unwrap()), 1);
        let listener = in_netns(netns.try_clone().unwrap(), || TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap());
        kernel.attach_pod("near", netns.as_fd(), address, listener.as_fd()).unwrap();
        self.near_agent = Some(Agent::start(listener));
        assert_eq!(kernel.end_bypassing(netns.as_fd()).unwrap(), ends_sockets());
    }

    /// Both pods of the node, as they are now.
    pub(crate) fn locals(&self, kernel: &Kernel, near: u32, open: bool) -> [Local; 2] {
        let (pod_netns, near_netns) = (self.node.pod_netns(), self.near_netns());
        let place = |netns: &std::fs::File| self.on_node(|| kernel.place(netns.as_fd()).unwrap().unwrap());
        let local = |address, identity, place| Local { address, identity, place, open };
        let near_at: Ipv4Addr = NEAR.parse().unwrap();
        [local(POD, CLIENT, place(&pod_netns)), local(near_at, near, place(&near_netns))]
    }

    pub(crate) fn near_netns(&self) -> std::fs::File {
        netns_of(&self.machines[1].namespace)
    }

    /// Connections that the agents of both pods have taken so far; waits for as many as are expected.
    pub(crate) fn carried(&self, expected: usize) -> usize {
        let taken = || {
            let agents = self.agent.iter().chain(&self.near_agent);
            agents.map(|agent| agent.taken.load(Ordering::Relaxed)).sum()
        };
        let waits = (0..60).take_while(|n| *n == 0 || taken() < expected);
        waits.for_each(|_| std::thread::sleep(Duration::from_millis(50)));
        taken()
    }

    pub(crate) fn agent_dies(&mut self) {
        drop(self.annex.take());
        drop(self.agent.take());
        drop(self.near_agent.take());
    }

    pub(crate) fn annex(&self) -> &Annex {
        self.annex.as_ref().expect("an agent")
    }

    pub(crate) fn agent_returns(&mut self, kernel: &Kernel) {
        self.govern(kernel);
    }

    /// As the agent does with each pod in turn.
    pub(crate) fn keep(&self, kernel: &Kernel) {
        let pod = self.node.pod_netns();
        self.on_node(|| {
            if !kernel.wires_are_guarded("pod", pod.as_fd()).unwrap() {
                drop(kernel.guard_wires("pod", pod.as_fd(), POD));
            }
        });
    }

    /// One of [`TOOLS`], from outside the mesh: how many frames with `mark` were seen.
    pub(crate) fn sent(&mut self, namespace: u32, mark: &str, act: &str) -> usize {
        let names = format!("FAR, FAR6, NEAR, POD, POD6 = '{FAR}', 'fd99::2', '{NEAR}', '{POD}', 'fd99::1'");
        self.act(namespace, &names, &[(mark.to_owned(), act)]);
        self.seen(mark)
    }

    /// Several of them from the far machine, to the pod. Each has a mark of its own.
    pub(crate) fn send_in(&self, acts: &[(String, &str)]) {
        let names = format!("FAR, FAR6, POD, POD6 = '{POD}', 'fd99::1', '{FAR}', 'fd99::2'");
        self.act(self.far(), &names, acts);
    }

    fn act(&self, namespace: u32, names: &str, acts: &[(String, &str)]) {
        let calls: String = acts.iter().map(|(mark, act)| format!("print(attempt({mark:?}, {act:?}))\n")).collect();
        let script = format!("{names}\n{TOOLS}\n{calls}");
        self.node.python_in(&format!("/proc/{namespace}/ns/net"), None, &script);
    }

    /// The far machine sends a SYN of sequence number 7, to which the pod's kernel gives no answer.
    pub(crate) fn knock(&mut self, from: u16, to: u16) {
        let far = self.machines[0].capture.as_mut().unwrap();
        far.ask(&format!("knock {POD} {from} {to}"));
        assert_eq!(far.answer(), "knocked");
    }

    /// The namespace of the far machine.
    pub(crate) fn far(&self) -> u32 {
        self.machines[0].namespace.id()
    }

    /// Its MAC address, as Python bytes.
    pub(crate) fn far_mac(&self) -> String {
        let mac = in_netns(netns_of(&self.machines[0].namespace), || {
            let shown = Command::new("ip").args(["-o", "link", "show", "eth0"]).output().unwrap();
            String::from_utf8(shown.stdout).unwrap()
        });
        let mac = mac.split("link/ether ").nth(1).and_then(|rest| rest.split(' ').next()).unwrap();
        format!("bytes.fromhex('{}')", mac.replace(':', ""))
    }

    /// Captures in the pod what comes in by its wire, and is asked as the other machines are.
    pub(crate) fn capture_in_pod(&self) -> Worker {
        let mut capture = self.node.worker_in(&format!("/proc/{}/ns/net", self.node.pod.id()), None, MACHINE);
        assert_eq!(capture.answer(), "ready");
        capture
    }

    /// The namespace of the other pod of this node.
    pub(crate) fn near(&self) -> u32 {
        self.machines[1].namespace.id()
    }

    /// On a thread in the node's namespace.
    pub(crate) fn on_node<T: Send>(&self, act: impl FnOnce() -> T + Send) -> T {
        let netns = netns_of(&self.node.outside);
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                nix::sched::setns(netns, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
                act()
            });
            thread.join().unwrap()
        })
    }

    /// What the far machine is told when it comes in clear.
    pub(crate) fn refused_inbound(&self) -> String {
        let dial = || TcpStream::connect_timeout(&(POD, 8080).into(), Duration::from_secs(2));
        match in_netns(netns_of(&self.machines[0].namespace), dial) {
            Err(e) if e.kind() == std::io::ErrorKind::ConnectionRefused => "ECONNREFUSED".to_owned(),
            other => format!("{other:?}"),
        }
    }

    /// How many frames at the other machines held these bytes.
    pub(crate) fn seen(&mut self, mark: &str) -> usize {
        self.seen_at(mark).into_iter().sum()
    }

    /// The same, at the far machine and at the other pod.
    pub(crate) fn seen_at(&mut self, mark: &str) -> [usize; 2] {
        [0, 1].map(|n| {
            let capture: &mut Worker = self.machines[n].capture.as_mut().unwrap();
            capture.ask(mark);
            capture.answer().parse().unwrap()
        })
    }

    pub(crate) fn upgrade_all_the_time(&self) -> Upgrading {
        let (stop, done, options) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)), self.options());
        let (stops, counts) = (stop.clone(), done.clone());
        let thread = std::thread::spawn(move || {
            while !stops.load(Ordering::Relaxed) {
                drop(Kernel::open(&options).unwrap());
                counts.fetch_add(1, Ordering::Relaxed);
            }
        });
        Upgrading { stop, done, thread }
    }

    /// Makes every attempt once: what each was told, and how many frames held its bytes.
    pub(crate) fn try_all(&mut self, state: &str) -> BTreeMap<&'static str, (String, usize)> {
        self.turn += 1;
        // Eight bytes: what a TCP header without a payload could carry.
        let turn = self.turn;
        let mark = |n: usize| format!("L{turn:02}{n:02}{:03}", std::process::id() % 1000);
        // An accomplice outside, for the resets.
        self.knock(9090, 4000);
        let mut told = BTreeMap::new();
        for (actor, cgroup) in [("client", Some("client")), ("stranger", Some("stranger")), ("outsider", None)] {
            let mine: Vec<_> = ATTEMPTS.iter().enumerate().filter(|(_, a)| a.1 == actor).collect();
            let calls: String =
                mine.iter().map(|(n, a)| format!("print(attempt({:?}, {:?}))\n", mark(*n), a.3)).collect();
            let addresses = format!(
                "FAR, FAR6, NEAR, POD, POD6, MESH = '{FAR}', 'fd99::2', '{NEAR}', '{POD}', 'fd99::1', '{}'",
                self.node.mesh.display()
            );
            cgroup.map(|name| self.node.cgroup(name));
            let pod = format!("/proc/{}/ns/net", self.node.pod.id());
            let said = self.node.python_in(&pod, cgroup, &format!("{addresses}\n{TOOLS}\n{calls}"));
            assert_eq!(said.lines().count(), mine.len(), "state {state}, {actor}: {said}");
            told.extend(mine.iter().zip(said.lines()).map(|((_, a), line)| (a.0, line.to_owned())));
        }
        for (actor, worker) in &mut self.before {
            let (n, attempt) = ATTEMPTS.iter().enumerate().find(|(_, a)| a.1 == *actor).unwrap();
            worker.ask(&format!("L{:02}{n:02}{:03}", self.turn, std::process::id() % 1000));
            told.insert(attempt.0, worker.answer());
        }
        let marks: Vec<String> = (0..ATTEMPTS.len()).map(mark).collect();
        let mut seen = vec![0; ATTEMPTS.len()];
        for machine in &mut self.machines {
            let capture = machine.capture.as_mut().unwrap();
            capture.ask(&marks.join(" "));
            let counts = capture.answer();
            seen.iter_mut().zip(counts.split(' ')).for_each(|(sum, n)| *sum += n.parse::<usize>().unwrap());
        }
        let attempts = ATTEMPTS.iter().zip(seen);
        attempts.filter_map(|(a, seen)| Some((a.0, (told.remove(a.0)?, seen)))).collect()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.agent = None;
        self.near_agent = None;
        self.before.clear();
        for machine in &mut self.machines {
            machine.capture = None;
            end(&mut machine.namespace);
        }
    }
}

/// Stands for the agent: takes captured connections and reads them.
struct Agent {
    stop: Arc<AtomicBool>,
    taken: Arc<AtomicUsize>,
    thread: Option<JoinHandle<()>>,
}

impl Agent {
    fn start(listener: TcpListener) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let taken = Arc::new(AtomicUsize::new(0));
        let (stops, counts) = (stop.clone(), taken.clone());
        listener.set_nonblocking(true).unwrap();
        let thread = std::thread::spawn(move || {
            while !stops.load(Ordering::Relaxed) {
                match listener.accept() {
                    Ok((mut stream, _)) => {
                        counts.fetch_add(1, Ordering::Relaxed);
                        stream.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
                        drop(stream.read(&mut [0; 64]));
                    }
                    Err(_) => std::thread::sleep(Duration::from_millis(2)),
                }
            }
        });
        Self { stop, taken, thread: Some(thread) }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        drop(self.thread.take().map(JoinHandle::join));
    }
}

/// Agents that start one after the other.
pub(crate) struct Upgrading {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicUsize>,
    thread: JoinHandle<()>,
}

impl Upgrading {
    pub(crate) fn stop(self) -> usize {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap();
        self.done.load(Ordering::Relaxed)
    }
}
