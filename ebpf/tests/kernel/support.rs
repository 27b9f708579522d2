//! A node of our own for one test: a mesh cgroup with workloads, a pin directory, and a pod's network namespace.
//! Everything is removed when the value is dropped, also after a panic.

use ambit_ebpf::{Capacity, Kernel, Options, cgroup_id};
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrIn6, bind, listen, setsockopt, socket, sockopt,
};
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// The pod's address, and one outside, at the two ends of a veth pair.
pub(crate) const POD: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 1);
pub(crate) const OUTSIDE: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 2);

/// Whether this kernel has a feature, by a part of its name: those that are optional are absent before some release.
pub(crate) fn has(feature: &str) -> bool {
    let all = ambit_ebpf::probe();
    all.iter().find(|f| f.name.contains(feature)).expect("a feature of that name").present
}

/// Whether connections that were there before can be ended (6.5).
pub(crate) fn ends_sockets() -> bool {
    has("bpf_sock_destroy")
}

static NEXT: AtomicU32 = AtomicU32::new(0);

pub(crate) struct Node {
    pub(crate) mesh: PathBuf,
    pub(crate) base: PathBuf,
    pub(crate) pins: PathBuf,
    pub(crate) pod: Child,
    pub(crate) outside: Child,
}

impl Node {
    pub(crate) fn new() -> Self {
        assert!(nix::unistd::geteuid().is_root(), "this test attaches programs to cgroups: run it as root");
        let name = format!("ambit-test-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let base = cgroup_mount().join(&name);
        let mesh = base.join("mesh");
        fs::create_dir_all(&mesh).unwrap();
        let node = Self {
            mesh,
            base,
            pins: Path::new("/sys/fs/bpf").join(&name),
            pod: namespace_holder(),
            outside: namespace_holder(),
        };
        run(&format!("ip link add eth0 netns {} type veth peer name eth0 netns {}", node.pod.id(), node.outside.id()));
        set_up(&node.pod, POD);
        set_up(&node.outside, OUTSIDE);
        node
    }

    /// The pod's namespace ends, and another takes its place (with loopback only).
    pub(crate) fn remake_pod(&mut self) {
        end(&mut self.pod);
        self.pod = namespace_holder();
        run(&format!("nsenter --net=/proc/{}/ns/net ip link set lo up", self.pod.id()));
        run(&format!("nsenter --net=/proc/{}/ns/net ip route add default dev lo", self.pod.id()));
    }

    /// The mesh cgroup is removed with all below it, and made anew.
    pub(crate) fn remake_mesh(&self) {
        remove_cgroups(&self.mesh).unwrap();
        fs::create_dir(&self.mesh).unwrap();
        // The kernel lets a removed cgroup go a moment later.
        std::thread::sleep(Duration::from_millis(300));
    }

    pub(crate) fn options(&self) -> Options {
        Options { cgroup_root: self.mesh.clone(), pin_dir: self.pins.clone(), capacity: Capacity::default() }
    }

    /// A child of the mesh cgroup; gives its id.
    pub(crate) fn cgroup(&self, name: &str) -> u64 {
        let path = self.mesh.join(name);
        fs::create_dir_all(&path).unwrap();
        cgroup_id(&path).unwrap()
    }

    pub(crate) fn pod_netns(&self) -> File {
        netns_of(&self.pod)
    }

    /// Runs `make` in the pod's namespace, on a thread of its own that ends with it.
    pub(crate) fn in_pod<T: Send + 'static>(&self, make: impl FnOnce() -> T + Send + 'static) -> T {
        in_netns(self.pod_netns(), make)
    }

    pub(crate) fn outside<T: Send + 'static>(&self, make: impl FnOnce() -> T + Send + 'static) -> T {
        in_netns(netns_of(&self.outside), make)
    }

    pub(crate) fn listen_in_pod(&self, address: Ipv4Addr, port: u16) -> TcpListener {
        self.in_pod(move || TcpListener::bind((address, port)).unwrap())
    }

    /// As the agent's capture listener of a pod with addresses of both families.
    pub(crate) fn listen_to_both(&self) -> TcpListener {
        self.in_pod(|| {
            let fd = socket(AddressFamily::Inet6, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
            setsockopt(&fd, sockopt::Ipv6V6Only, &false).unwrap();
            let at = SocketAddrV6::new(Ipv4Addr::LOCALHOST.to_ipv6_mapped(), 0, 0, 0);
            bind(fd.as_raw_fd(), &SockaddrIn6::from(at)).unwrap();
            listen(&fd, Backlog::new(128).unwrap()).unwrap();
            TcpListener::from(fd)
        })
    }

    /// Attaches the pod with such a listener, and this IPv6 address.
    pub(crate) fn attach_both(&self, kernel: &Kernel, address: Ipv6Addr) -> TcpListener {
        let (listener, netns) = (self.listen_to_both(), self.pod_netns());
        kernel.attach_pod("pod", netns.as_fd(), POD, listener.as_fd()).unwrap();
        kernel.set_ipv6(netns.as_fd(), listener.as_fd(), Some(address)).unwrap();
        listener
    }

    /// Attaches the pod with a capture listener of ours.
    pub(crate) fn attach(&self, kernel: &Kernel) -> TcpListener {
        let listener = self.listen_in_pod(Ipv4Addr::LOCALHOST, 0);
        kernel.attach_pod("pod", self.pod_netns().as_fd(), POD, listener.as_fd()).unwrap();
        listener
    }

    /// A Python program that lives in a cgroup of the mesh and in the pod's namespace.
    pub(crate) fn spawn(&self, cgroup: &str, script: &str) -> Child {
        self.command(cgroup, script).stdout(Stdio::piped()).spawn().unwrap()
    }

    /// The same, asked line by line.
    pub(crate) fn worker(&self, cgroup: &str, script: &str) -> Worker {
        self.worker_in(&self.pod_path(), Some(cgroup), script)
    }

    /// A worker in any network namespace; without a cgroup of the mesh it is beside it, not below.
    pub(crate) fn worker_in(&self, netns: &str, cgroup: Option<&str>, script: &str) -> Worker {
        let mut command = self.command_in(netns, cgroup, script);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (lines, answers) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        Worker { child, lines: Some(lines), answers }
    }

    pub(crate) fn python(&self, cgroup: &str, script: &str) -> String {
        text(self.command(cgroup, script).output().unwrap())
    }

    pub(crate) fn python_in(&self, netns: &str, cgroup: Option<&str>, script: &str) -> String {
        text(self.command_in(netns, cgroup, script).output().unwrap())
    }

    fn pod_path(&self) -> String {
        format!("/proc/{}/ns/net", self.pod.id())
    }

    fn command(&self, cgroup: &str, script: &str) -> Command {
        self.command_in(&self.pod_path(), Some(cgroup), script)
    }

    fn command_in(&self, netns: &str, cgroup: Option<&str>, script: &str) -> Command {
        let cgroup = cgroup.map_or(self.base.clone(), |name| self.mesh.join(name));
        let mut command = Command::new("sh");
        command
            .args(["-c", "echo $$ > \"$0/cgroup.procs\" && exec nsenter --net=\"$1\" python3 -c \"$2\""])
            .arg(cgroup)
            .arg(netns)
            .arg(format!("{PRELUDE}\n{script}"))
            .stdin(Stdio::null());
        command
    }

    /// One TCP connect by a workload: `ok <peer>` or the name of the error.
    pub(crate) fn connect(&self, cgroup: &str, address: SocketAddrV4) -> String {
        self.python(cgroup, &format!("print(tcp('{}', {}))", address.ip(), address.port()))
    }
}

/// A workload that answers each line that it reads with one line.
pub(crate) struct Worker {
    child: Child,
    lines: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Worker {
    pub(crate) fn ask(&mut self, line: &str) {
        writeln!(self.lines.as_mut().unwrap(), "{line}").unwrap();
    }

    pub(crate) fn answer(&mut self) -> String {
        let mut line = String::new();
        assert_ne!(self.answers.read_line(&mut line).unwrap(), 0, "the workload ended");
        line.trim().to_owned()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        drop(self.lines.take());
        end(&mut self.child);
    }
}

/// `tcp` gives the outcome of one connect and how the application sees its peer; denials must come at once.
const PRELUDE: &str = r#"
import errno, socket, struct, sys, time
def outcome(s, to):
    s.settimeout(5)
    start = time.monotonic()
    try:
        s.connect(to)
    except OSError as e:
        took = time.monotonic() - start
        name = errno.errorcode.get(e.errno, repr(e))
        return name if took < 1 else name + ' late'
    peer = s.getpeername()
    return f'ok {peer[0]}:{peer[1]}'
def tcp(host, port):
    with socket.socket(socket.AF_INET6 if ':' in host else socket.AF_INET, socket.SOCK_STREAM) as s:
        return outcome(s, (host, port))
"#;

pub(crate) fn text(output: Output) -> String {
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "a workload failed: {out}\n{err}");
    out.trim().to_owned()
}

/// Accepts one connection, or fails after two seconds.
pub(crate) fn accept(listener: &TcpListener) -> (TcpStream, SocketAddrV4, SocketAddrV4) {
    let (stream, peer) = try_accept(listener, Duration::from_secs(2)).expect("nobody came to the listener");
    let local = v4(stream.local_addr().unwrap());
    (stream, v4(peer), local)
}

pub(crate) fn try_accept(listener: &TcpListener, within: Duration) -> Option<(TcpStream, SocketAddr)> {
    listener.set_nonblocking(true).unwrap();
    let end = std::time::Instant::now() + within;
    loop {
        match listener.accept() {
            Ok(found) => return Some(found),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock && std::time::Instant::now() < end => {
                std::thread::sleep(Duration::from_millis(2));
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return None,
            Err(e) => panic!("accept: {e}"),
        }
    }
}

/// Resets a connection when it is closed, so that its port is free again.
pub(crate) fn close_at_once(stream: &TcpStream) {
    let now = nix::libc::linger { l_onoff: 1, l_linger: 0 };
    nix::sys::socket::setsockopt(stream, nix::sys::socket::sockopt::Linger, &now).unwrap();
}

pub(crate) fn v4(address: SocketAddr) -> SocketAddrV4 {
    match address {
        SocketAddr::V4(a) => a,
        SocketAddr::V6(a) => panic!("{a} is not IPv4"),
    }
}

pub(crate) fn at(ip: [u8; 4], port: u16) -> SocketAddrV4 {
    SocketAddrV4::new(Ipv4Addr::from(ip), port)
}

fn cgroup_mount() -> PathBuf {
    let mounts = fs::read_to_string("/proc/mounts").unwrap();
    let line = mounts.lines().find(|line| line.split(' ').nth(2) == Some("cgroup2")).expect("no cgroup2 mount");
    PathBuf::from(line.split(' ').nth(1).unwrap())
}

/// A process that holds a network namespace of its own; the namespace goes with it.
pub(crate) fn namespace_holder() -> Child {
    // A test may have a namespace of its own, which is not the process's.
    let ours = fs::read_link("/proc/thread-self/ns/net").unwrap();
    let mut child = Command::new("unshare").args(["--net", "sleep", "3600"]).spawn().unwrap();
    for _ in 0..500 {
        if fs::read_link(format!("/proc/{}/ns/net", child.id())).is_ok_and(|link| link != ours) {
            return child;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    end(&mut child);
    panic!("unshare made no network namespace");
}

pub(crate) fn netns_of(child: &Child) -> File {
    File::open(format!("/proc/{}/ns/net", child.id())).unwrap()
}

pub(crate) fn in_netns<T: Send + 'static>(netns: File, make: impl FnOnce() -> T + Send + 'static) -> T {
    let thread = std::thread::spawn(move || {
        setns(netns, CloneFlags::CLONE_NEWNET).unwrap();
        make()
    });
    thread.join().unwrap()
}

fn set_up(child: &Child, address: Ipv4Addr) {
    let enter = format!("nsenter --net=/proc/{}/ns/net", child.id());
    run(&format!("{enter} ip link set lo up"));
    run(&format!("{enter} ip addr add {address}/24 dev eth0"));
    run(&format!("{enter} ip link set eth0 up"));
}

/// A cgroup and its children; can be done only when the kernel has let go of their last process.
fn remove_cgroups(path: &Path) -> io::Result<()> {
    let mut last = Ok(());
    for _ in 0..100 {
        let children = fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path());
        children.filter(|path| path.is_dir()).for_each(|path| drop(fs::remove_dir(path)));
        last = fs::remove_dir(path);
        if last.is_ok() || !path.exists() {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    last
}

pub(crate) fn run(command: &str) {
    let status = Command::new("sh").args(["-c", command]).status().unwrap();
    assert!(status.success(), "{command}");
}

pub(crate) fn end(child: &mut Child) {
    drop(child.kill());
    drop(child.wait());
}

impl Drop for Node {
    fn drop(&mut self) {
        end(&mut self.pod);
        end(&mut self.outside);
        if let Err(e) = Kernel::remove(&self.pins) {
            eprintln!("left behind: {} ({e})", self.pins.display());
        }
        if let Err(e) = remove_cgroups(&self.mesh).and_then(|()| fs::remove_dir(&self.base)) {
            eprintln!("left behind: {} ({e})", self.base.display());
        }
    }
}
