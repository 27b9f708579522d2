//! A node of our own for one test: cgroups, pods' namespaces and files; and the parts of the agent that need no cell.

use crate::support::Cell;
use ambit_agent::clock::Clock;
use ambit_agent::control::{Control, Hands, Outcome, Wires};
use ambit_agent::denials::Lane;
use ambit_agent::hbone::{Door, PORT as PORT_HBONE};
use ambit_agent::health::Health;
use ambit_agent::inbound::Inbound;
use ambit_agent::issued::Issued;
use ambit_agent::kernel::KernelHandle;
use ambit_agent::netns::{Annex, Netns, NetnsThread};
use ambit_agent::outbound::Outbound;
use ambit_agent::plane::Plane;
use ambit_agent::view::View;
use ambit_identity::{SharedTrust, Trust, TrustStore};
use ambit_model::Generation;
use ambit_model::policy::Endpoint;
use std::collections::BTreeSet;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::time::timeout;

pub(crate) const SOON: Duration = Duration::from_secs(10);

/// iproute2 in a pod's namespace.
pub(crate) fn ip(pid: u32, words: &str) {
    let enter = [format!("--net=/proc/{pid}/ns/net"), "ip".to_owned()];
    let status = Command::new("nsenter").args(enter).args(words.split(' ')).status().unwrap();
    assert!(status.success(), "{words}");
}

/// A veth between a pod's namespace and this one.
pub(crate) fn veth(pid: u32) {
    let add = format!("link add at{pid} type veth peer name eth0 netns {pid}");
    assert!(Command::new("ip").args(add.split(' ')).status().unwrap().success(), "{add}");
}

/// What the test puts on the machine, and takes away again, also after a panic.
pub(crate) struct Ground {
    pub(crate) base: PathBuf,
    pub(crate) pins: PathBuf,
    pub(crate) dir: PathBuf,
    pub(crate) children: Vec<Child>,
}

impl Ground {
    pub(crate) fn make() -> Ground {
        assert!(nix::unistd::geteuid().is_root(), "this test attaches programs to cgroups: run it as root");
        let mounts = std::fs::read_to_string("/proc/mounts").unwrap();
        let mount = mounts.lines().find(|l| l.split(' ').nth(2) == Some("cgroup2")).expect("a cgroup2 mount");
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("ambit-agent-test-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let base = Path::new(mount.split(' ').nth(1).unwrap()).join(&name);
        let dir = std::env::temp_dir().join(&name);
        std::fs::create_dir_all(base.join("mesh")).unwrap();
        std::fs::create_dir_all(dir.join("pods")).unwrap();
        Ground { base, pins: Path::new("/sys/fs/bpf").join(&name), dir, children: vec![] }
    }
    pub(crate) fn mesh(&self) -> PathBuf {
        self.base.join("mesh")
    }
    /// A namespace with a veth to here and its address on lo: what leaves it, leaves through the agent or not at all.
    pub(crate) fn pod(&mut self, name: &str, address: Ipv4Addr) -> u32 {
        self.pod_of(name, serde_json::json!({"address": address}))
    }
    /// The same with an IPv6 address too.
    pub(crate) fn pod6(&mut self, name: &str, address: Ipv4Addr, address6: Ipv6Addr) -> u32 {
        let pid = self.pod_of(name, serde_json::json!({"address": address, "address6": address6}));
        ip(pid, &format!("addr add {address6}/128 dev eth0 nodad"));
        pid
    }
    fn pod_of(&mut self, name: &str, mut file: serde_json::Value) -> u32 {
        std::fs::create_dir_all(self.mesh().join(name)).unwrap();
        let ours = std::fs::read_link("/proc/thread-self/ns/net").unwrap();
        let holder = Command::new("unshare").args(["--net", "sleep", "120"]).spawn().unwrap();
        let pid = holder.id();
        self.children.push(holder);
        let at = format!("/proc/{pid}/ns/net");
        while !std::fs::read_link(&at).is_ok_and(|link| link != ours) {
            std::thread::sleep(Duration::from_millis(5));
        }
        veth(pid);
        let address = file["address"].as_str().unwrap().to_owned();
        for set in ["link set lo up", "link set eth0 up", &format!("addr add {address}/32 dev lo")] {
            ip(pid, set);
        }
        file["cgroup"] = name.into();
        file["netns"] = at.into();
        file["uid"] = 0.into();
        std::fs::write(self.dir.join("pods").join(format!("{name}.json")), file.to_string()).unwrap();
        pid
    }
    /// The pins of the packet programs on the pod's wires: no two ever have the same number.
    pub(crate) fn wire_pins(&self, pod: &str) -> BTreeSet<u64> {
        let pins = std::fs::read_dir(self.pins.join("pods").join(pod)).into_iter().flatten().flatten();
        let wires = pins.filter(|pin| pin.file_name().to_string_lossy().starts_with("veth-"));
        wires.filter_map(|pin| Some(pin.metadata().ok()?.ino())).collect()
    }
    /// A program in the pod's cgroup and namespace.
    pub(crate) fn command(&self, pod: &str, pid: u32, program: &[&str]) -> Command {
        let mut command = Command::new("sh");
        command
            .args(["-c", "echo $$ > \"$0/cgroup.procs\" && ns=$1 && shift && exec nsenter --net=$ns \"$@\""])
            .arg(self.mesh().join(pod))
            .arg(format!("/proc/{pid}/ns/net"))
            .args(program)
            .stdin(Stdio::null());
        command
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        for child in &mut self.children {
            drop(child.kill());
            drop(child.wait());
        }
        // A loop that is told to end may be in the middle of guarding a pod.
        let mut gone = 0;
        for _ in 0..100 {
            gone = if self.pins.exists() { 0 } else { gone + 1 };
            if gone > 10 {
                break;
            }
            if let Err(error) = ambit_ebpf::Kernel::remove(&self.pins) {
                eprintln!("left behind: {} ({error})", self.pins.display());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        for _ in 0..100 {
            for pod in std::fs::read_dir(self.mesh()).into_iter().flatten().flatten() {
                drop(std::fs::remove_dir(pod.path()));
            }
            drop(std::fs::remove_dir(self.mesh()));
            if std::fs::remove_dir(&self.base).is_ok() {
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        drop(std::fs::remove_dir_all(&self.dir));
    }
}

pub(crate) struct Node {
    pub(crate) desired: watch::Sender<Option<Arc<View>>>,
    pub(crate) outcome: watch::Receiver<Option<Outcome>>,
    pub(crate) endpoints: watch::Receiver<Option<Vec<Endpoint>>>,
    pub(crate) plane: watch::Receiver<Option<Arc<Plane>>>,
    pub(crate) issued: Issued,
    pub(crate) kernel: KernelHandle,
    pub(crate) denials: Lane,
    pub(crate) clock: Arc<Clock>,
    control: tokio::task::JoinHandle<()>,
}

impl Drop for Node {
    fn drop(&mut self) {
        self.control.abort();
    }
}

impl Node {
    /// The parts of the agent that need no cell, put together as `agent::run` does.
    pub(crate) async fn start(ground: &Ground, cell: &Cell, hbone: TcpListener) -> Node {
        let port = hbone.local_addr().unwrap().port();
        let netns = NetnsThread::start().unwrap();
        let annex = Annex::new(netns.clone(), Netns::open(Path::new("/proc/self/ns/net")).unwrap());
        Self::put_together(ground, cell, (hbone, port), (netns, annex), |_| ()).await
    }
    /// The same with an annex, and HBONE's own port.
    pub(crate) async fn start_with_annex(ground: &Ground, cell: &Cell, hbone: TcpListener) -> Node {
        let (netns, made) = (NetnsThread::start().unwrap(), ambit_ebpf::Annex::make().unwrap());
        let annex = Annex::new(netns.clone(), Netns::of(made.as_fd().try_clone_to_owned().unwrap()));
        let at_pods = annex.listeners(PORT_HBONE, 1).await.unwrap().remove(0);
        let parts = (netns.clone(), annex);
        let at = (hbone, PORT_HBONE);
        let node = Self::put_together(ground, cell, at, parts, |kernel| kernel.use_annex(&made)).await;
        let inbound = Inbound::new(node.plane.clone(), node.denials.clone(), netns, node.clock.clone());
        let inbound = inbound.by_kernel(node.kernel.clone());
        tokio::spawn(inbound.serve_at(Door::Pod, TcpListener::from_std(at_pods).unwrap()));
        node
    }
    async fn put_together(
        ground: &Ground,
        cell: &Cell,
        (hbone, port): (TcpListener, u16),
        (netns, annex): (NetnsThread, Annex),
        prepare: impl FnOnce(&KernelHandle),
    ) -> Node {
        let kernel = KernelHandle::open(&ground.mesh(), &ground.pins, &ground.dir).unwrap();
        kernel.renew_lease(ambit_agent::staleness::LEASE).unwrap();
        prepare(&kernel);
        // Where its tunnels end they come from.
        let std::net::IpAddr::V4(node_address) = hbone.local_addr().unwrap().ip() else { panic!("a node of IPv6") };
        let view = cell.view(cell.slice(0, &[]));
        let trust = SharedTrust::new(Trust::Bundles(TrustStore::new(&view.own).unwrap()));
        let (desired, desired_rx) = watch::channel(None);
        let (outcome_tx, outcome) = watch::channel(None);
        let (endpoints_tx, endpoints) = watch::channel(None);
        let (plane, plane_rx) = watch::channel(None);
        let (_, node) = watch::channel(Some((cell.node(), Generation(1))));
        let denials = Lane::default();
        let (issued, health) = (Issued::default(), Health::new(Some(kernel.clone()), denials.clone()));
        let clock = Arc::new(Clock::default());
        let control = Control {
            pods_dir: ground.dir.join("pods"),
            cgroup_root: ground.mesh(),
            node_address,
            kernel: kernel.clone(),
            netns: netns.clone(),
            issued: issued.clone(),
            trust,
            denials: denials.clone(),
            health: health.clone(),
            outbound: Outbound::new(plane_rx.clone(), denials.clone(), health, clock.clone(), annex, port),
            clock: clock.clone(),
            hands: Hands::default(),
            wires: Wires {
                desired: desired_rx,
                outcome: outcome_tx,
                endpoints: endpoints_tx,
                plane,
                seen: Default::default(),
                node,
            },
        };
        let control = tokio::spawn(control.run());
        let traffic = plane_rx.clone();
        let inbound = Inbound::new(plane_rx, denials.clone(), netns, clock.clone()).by_kernel(kernel.clone());
        tokio::spawn(inbound.serve(hbone));
        Node { desired, outcome, endpoints, plane: traffic, issued, kernel, denials, clock, control }
    }
    /// Waits until traffic is carried for the pods at these addresses, and for no other.
    pub(crate) async fn carries(&mut self, wanted: &[Ipv4Addr]) {
        let is = |plane: &Option<Arc<Plane>>| {
            plane.as_ref().is_some_and(|p| p.pods.keys().filter(|at| at.is_ipv4()).eq(wanted))
        };
        timeout(SOON, self.plane.wait_for(is)).await.unwrap_or_else(|_| panic!("never {wanted:?}")).unwrap();
    }
    /// Waits until what is reported is like this.
    pub(crate) async fn reported(
        &mut self,
        is: impl Fn(&[Endpoint]) -> bool,
    ) -> Result<Vec<Endpoint>, watch::error::RecvError> {
        let reported = self.endpoints.wait_for(|all| all.as_deref().is_some_and(&is)).await?;
        Ok(reported.clone().unwrap_or_default())
    }
    /// Sends a slice and waits until it is in the kernel; gives the time that took.
    pub(crate) async fn apply(&mut self, view: Arc<View>) -> Duration {
        let (revision, begun) = (view.revision, Instant::now());
        self.denials.offer(view.denials.clone());
        self.desired.send_replace(Some(view));
        let applied = self.outcome.wait_for(|o| o.as_ref().is_some_and(|o| o.revision == revision));
        let applied = timeout(SOON, applied).await.expect("an outcome").unwrap().clone().unwrap();
        applied.result.expect("in the kernel");
        begun.elapsed()
    }
}
