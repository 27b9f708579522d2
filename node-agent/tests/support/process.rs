//! Agents as processes of their own, on a node with a software TPM and the kernel's own part; the cell is the test's.

use super::Cell;
use super::replica::{Replica, Stream};
use super::tpm::Swtpm;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tokio::time::timeout;

const SOON: Duration = Duration::from_secs(20);

/// A node, and what it leaves on the machine.
pub(crate) struct Node {
    pub(crate) tpm: Swtpm,
    pub(crate) base: PathBuf,
    pub(crate) pins: PathBuf,
    pub(crate) config: String,
    pub(crate) hbone: SocketAddr,
    pub(crate) metrics: SocketAddr,
    pub(crate) replica: Replica,
    pub(crate) streams: mpsc::Receiver<Stream>,
}

pub(crate) fn free() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

impl Node {
    pub(crate) async fn make() -> Node {
        assert!(nix::unistd::geteuid().is_root(), "this test attaches programs to cgroups: run it as root");
        let mounts = std::fs::read_to_string("/proc/mounts").unwrap();
        let mount = mounts.lines().find(|l| l.split(' ').nth(2) == Some("cgroup2")).expect("a cgroup2 mount");
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("ambit-takeover-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let base = Path::new(mount.split(' ').nth(1).unwrap()).join(&name);
        std::fs::create_dir_all(base.join("mesh")).unwrap();
        let tpm = Swtpm::start();
        std::fs::create_dir_all(tpm.file("pods")).unwrap();
        let (replica, streams) = Replica::start(Cell::founded("west", 1), tpm.dir.clone()).await;
        let root = replica.with_cell(|cell| ambit_identity::fingerprint(&cell.bundle().roots_der[0]));
        let (hbone, metrics) = (free(), free());
        let pins = Path::new("/sys/fs/bpf").join(&name);
        let at = |name: &str| tpm.file(name).display().to_string();
        let config = format!(
            "cluster = 'west'\ntrust_domain = 'west'\nfingerprint = '{}'\nservers = ['{}']\nnode_address = '127.0.0.1'\n\
             tcti = '{}'\nboot_log = '{}'\nima_log = '{}'\nmetrics_listen = '{metrics}'\nhbone_listen = '{hbone}'\n\
             cgroup_root = '{}'\npin_dir = '{}'\ndata_dir = '{}'\npods_dir = '{}'\nworkload_socket = '{}'\n\
             drain_max_s = 2\n",
            hex::encode(root),
            replica.address,
            tpm.tcti(),
            at("boot_log"),
            at("ima_log"),
            base.join("mesh").display(),
            pins.display(),
            tpm.state().display(),
            at("pods"),
            at("workload.sock"),
        );
        Node { tpm, base, pins, config, hbone, metrics, replica, streams }
    }

    pub(crate) fn agent(&self, name: &str, config: &str, options: &[&str]) -> Agent {
        let path = self.tpm.file(&format!("{name}.toml"));
        std::fs::write(&path, config).unwrap();
        let log = std::fs::File::create(self.tpm.file(name)).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_ambit-agent"))
            .args(["run", "--config"])
            .arg(path)
            .args(options)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        Agent { child, log: self.tpm.file(name) }
    }

    /// An agent that serves, with a slice of revision 1, and its stream.
    pub(crate) async fn served(&mut self, name: &str, config: &str) -> (Agent, Stream) {
        let serving = self.agent(name, config, &[]);
        let stream = self.stream().await;
        self.slice(&stream, 1).await;
        ready(self).await;
        (serving, stream)
    }

    /// The next stream of an agent, with a slice in which nobody runs here.
    pub(crate) async fn stream(&mut self) -> Stream {
        let stream = timeout(SOON, self.streams.recv()).await.expect("a stream").unwrap();
        stream.beat().await;
        stream
    }

    pub(crate) async fn slice(&self, stream: &Stream, revision: u64) {
        let slice = self.replica.with_cell(|cell| cell.slice(revision, &[]));
        stream.send(ambit_proto::v1::server_message::Body::Slice(slice)).await;
    }

    /// The ids of the programs that are attached.
    pub(crate) fn programs(&self) -> Vec<u32> {
        let found = ambit_ebpf::programs(&self.pins).unwrap();
        assert_eq!(found.len(), 10, "every program is attached");
        found
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        drop(ambit_ebpf::Kernel::remove(&self.pins));
        drop(std::fs::remove_dir(self.base.join("mesh")));
        drop(std::fs::remove_dir(&self.base));
    }
}

pub(crate) struct Agent {
    pub(crate) child: Child,
    pub(crate) log: PathBuf,
}

impl Agent {
    pub(crate) fn said(&self, what: &str) -> bool {
        std::fs::read_to_string(&self.log).unwrap().contains(what)
    }
    pub(crate) async fn says(&self, what: &str) {
        let until = Instant::now() + SOON;
        while !self.said(what) {
            assert!(Instant::now() < until, "never {what}: {}", std::fs::read_to_string(&self.log).unwrap());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
    pub(crate) fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(i32::try_from(self.child.id()).unwrap()), signal).unwrap();
    }
    pub(crate) fn runs(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }
    /// Its exit code.
    pub(crate) async fn ended(&mut self) -> Option<i32> {
        let until = Instant::now() + SOON;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            assert!(Instant::now() < until, "it does not end: {}", std::fs::read_to_string(&self.log).unwrap());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

pub(crate) async fn ready(node: &Node) {
    page(node, "/readyz", |page| page.ends_with("\nready\n")).await;
}

/// The agent that serves has this slice in the kernel.
pub(crate) async fn applied(node: &Node, revision: u64) {
    let line = format!("ambit_policy_revision{{state=\"applied\"}} {revision}\n");
    page(node, "/metrics", |page| page.contains(&line)).await;
}

pub(crate) async fn page(node: &Node, path: &str, good: impl Fn(&str) -> bool) {
    let until = Instant::now() + SOON;
    loop {
        let page = (|| {
            let mut stream = TcpStream::connect(node.metrics)?;
            write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer).map(|_| answer)
        })();
        if page.as_ref().is_ok_and(|page: &String| good(page)) {
            return;
        }
        assert!(Instant::now() < until, "{path}: {page:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
