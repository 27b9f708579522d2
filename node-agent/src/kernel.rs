//! The kernel side in the agent's words. Every error is a refusal; none ever means "go on".

use crate::balance;
use crate::compile::{self, DENIED_NODE, Unhealthy};
use crate::denials::Denials;
use crate::netns::Netns;
use crate::outbound::{Captured, Goal};
use crate::view::View;
use ambit_ebpf::{
    Annex, Capacity, Direct, Drift, Event, Flow, Kernel, KernelError, Leg, LetIn, Local, Options, Place, Tables,
    boot_time,
};
use ambit_model::{Code, NumericIdentity, Refusal};
use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};
use std::time::Duration;

/// Looks at a pod's devices, where they change while they are looked at.
const LOOKS_MAX: usize = 3;

/// Decisions allowed, and decisions refused by reason.
pub type Totals = (u64, Vec<(&'static str, u64)>);

/// Events and flows for which there was no room, and connections around the mesh that were ended.
pub type Losses = [(&'static str, u64); 3];
/// A map, its entries now, and the most that it takes.
pub type Room = (&'static str, u32, u32);

/// How a pod's packets may leave it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WaysOut {
    /// By wires that are all guarded.
    Guarded,
    /// By wires that are all guarded now; one was not.
    Mended,
    /// Also in a way that nobody guards: the pod must be nobody.
    Open(Refusal),
}

/// The right to write a node's tables: of all processes one has it.
#[derive(Debug)]
pub struct Writer(#[allow(dead_code, reason = "held")] std::fs::File);

impl Writer {
    /// Takes it, by the lock of a file in the agent's own folder.
    ///
    /// # Errors
    /// [`Code::AgentRunning`] where another process has it.
    pub fn take(data_dir: &Path) -> Result<Self, Refusal> {
        let path = data_dir.join("kernel.lock");
        let trouble = |e: std::io::Error| Refusal::new(Code::ConfigInvalid, "a writable 'data_dir'", e.to_string());
        // Whoever may open it may lock it, and keep every agent out.
        let options = std::fs::OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path);
        let file = options.map_err(trouble)?;
        match file.try_lock() {
            Ok(()) => Ok(Self(file)),
            Err(std::fs::TryLockError::WouldBlock) => {
                let expected = "nobody else who writes this node's tables";
                Err(Refusal::new(Code::AgentRunning, expected, format!("{} is locked", path.display())))
            }
            Err(std::fs::TryLockError::Error(e)) => Err(trouble(e)),
        }
    }
}

/// The handle. Cloning shares.
#[derive(Clone)]
pub struct KernelHandle(Arc<Held>);

struct Held {
    kernel: Kernel,
    options: Options,
    data_dir: PathBuf,
    /// None while another agent writes the tables, or is about to.
    writer: RwLock<Option<Writer>>,
}

/// The kernel, to be written to for as long as this lives.
struct Writing<'a>(&'a Kernel, #[allow(dead_code, reason = "held")] RwLockReadGuard<'a, Option<Writer>>);

impl std::ops::Deref for Writing<'_> {
    type Target = Kernel;
    fn deref(&self) -> &Kernel {
        self.0
    }
}

impl Held {
    fn write(&self) -> Result<Writing<'_>, Refusal> {
        self.try_write().ok_or_else(|| {
            let expected = "the kernel's tables as this agent's to write";
            Refusal::new(Code::Unavailable, expected, "another agent takes over")
        })
    }
    fn try_write(&self) -> Option<Writing<'_>> {
        let writer = self.writer.read().unwrap_or_else(PoisonError::into_inner);
        writer.is_some().then_some(Writing(&self.kernel, writer))
    }
}

impl std::fmt::Debug for KernelHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("KernelHandle")
    }
}

fn refusal(error: &KernelError) -> Refusal {
    let code = Code::from_text(error.code()).unwrap_or(Code::Internal);
    Refusal::new(code, "a kernel side that works", chain(error))
}

/// An error with its causes, on one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut out = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        out = format!("{out}: {cause}");
        next = cause.source();
    }
    out
}

impl KernelHandle {
    /// Attaches to the node's mesh cgroup, or takes over what a former agent pinned. Who writes the tables has the lock in
    /// `data_dir`.
    pub fn open(cgroup_root: &Path, pin_dir: &Path, data_dir: &Path) -> Result<Self, Refusal> {
        let writer = RwLock::new(Some(Writer::take(data_dir)?));
        let options = Options {
            cgroup_root: PathBuf::from(cgroup_root),
            pin_dir: PathBuf::from(pin_dir),
            capacity: Capacity::default(),
        };
        let kernel = Kernel::open(&options).map_err(|e| refusal(&e))?;
        Ok(Self(Arc::new(Held { kernel, options, data_dir: data_dir.to_owned(), writer })))
    }

    /// Writes nothing from here on, and lets another process do so. Waits for what is being written.
    pub async fn park(&self) {
        let held = self.0.clone();
        let park = move || drop(held.writer.write().unwrap_or_else(PoisonError::into_inner).take());
        // It ends with the runtime alone.
        let _ = tokio::task::spawn_blocking(park).await;
    }

    /// Writes again, and puts this agent's own programs in force. What is in the tables may be another's.
    ///
    /// # Errors
    /// [`Code::AgentRunning`] while another process may write.
    pub async fn resume(&self) -> Result<(), Refusal> {
        let held = self.0.clone();
        let resume = move || {
            let mut writer = held.writer.write().unwrap_or_else(PoisonError::into_inner);
            let taken = Writer::take(&held.data_dir)?;
            Kernel::open(&held.options).map_err(|e| refusal(&e))?;
            *writer = Some(taken);
            Ok(())
        };
        let done = tokio::task::spawn_blocking(resume).await;
        done.map_err(|e| Refusal::new(Code::Internal, "tables taken back", e.to_string()))?
    }

    /// Whether this process writes the tables.
    pub fn is_writer(&self) -> bool {
        self.0.try_write().is_some()
    }

    /// Puts tables in force and returns the digest of what was read back. Waits for running programs: tens of ms.
    pub async fn install(&self, tables: Arc<Tables>) -> Result<[u8; 32], Refusal> {
        let kernel = self.0.clone();
        let done = tokio::task::spawn_blocking(move || kernel.write()?.install(&tables).map_err(|e| refusal(&e)));
        done.await.map_err(|e| Refusal::new(Code::Internal, "an install that ends", e.to_string()))?
    }

    /// Makes nobody's the endpoints at `addresses`, in the tables in force and without an install; says how many there
    /// were. Waits for an install that is under way.
    pub async fn withdraw(&self, addresses: Vec<IpAddr>) -> Result<usize, Refusal> {
        let kernel = self.0.clone();
        let relabel = move || kernel.write()?.relabel(&addresses, DENIED_NODE.0).map_err(|e| refusal(&e));
        let done = tokio::task::spawn_blocking(relabel).await;
        done.map_err(|e| Refusal::new(Code::Internal, "a withdrawal that ends", e.to_string()))?
    }

    /// The tables in force that somebody else changed. Waits for an install that is under way.
    pub async fn drift(&self) -> Result<Vec<Drift>, Refusal> {
        let held = self.0.clone();
        let done = tokio::task::spawn_blocking(move || held.write()?.drift().map_err(|e| refusal(&e))).await;
        done.map_err(|e| Refusal::new(Code::Internal, "a comparison that ends", e.to_string()))?
    }

    /// Whom the kernel takes which cgroup for.
    pub fn enrolled(&self) -> Result<HashMap<u64, u32>, Refusal> {
        self.0.kernel.workloads().map_err(|e| refusal(&e))
    }

    /// Pods that are guarded from now on turn HBONE at their addresses off into the agent's annex.
    pub fn use_annex(&self, annex: &Annex) {
        self.0.kernel.use_annex(annex);
    }

    /// Gives `listener` every caller that the tables let in by its address, for as long as what is returned lives.
    pub fn let_in(&self, annex: &Annex, listener: impl AsFd) -> Result<LetIn, Refusal> {
        self.0.kernel.let_in(annex, listener.as_fd()).map_err(|e| refusal(&e))
    }

    /// Says who a cgroup is.
    pub fn enrol(&self, cgroup_id: u64, number: u32) -> Result<(), Refusal> {
        self.0.write()?.set_workload(cgroup_id, number).map_err(|e| refusal(&e))
    }

    /// Forgets every enrolled cgroup but `keep`: what a former agent left.
    pub fn keep_only(&self, keep: &dyn Fn(u64) -> bool) -> Result<(), Refusal> {
        self.enrolled()?.into_keys().filter(|id| !keep(*id)).try_for_each(|id| self.forget(id))
    }

    /// Forgets a cgroup: its processes may do nothing from now on.
    pub fn forget(&self, cgroup_id: u64) -> Result<(), Refusal> {
        self.0.write()?.remove_workload(cgroup_id).map_err(|e| refusal(&e))
    }

    /// Guards a pod's namespace and captures into `listener`: first the wires, so that nothing leaves in clear while the rest
    /// is put in place, and last the connections that were there before. What can be guarded is, also where not all can.
    pub fn attach(
        &self,
        name: &str,
        netns: BorrowedFd<'_>,
        (address, address6): (Ipv4Addr, Option<Ipv6Addr>),
        listener: impl AsFd,
    ) -> Result<WaysOut, Refusal> {
        let kernel = self.0.write()?;
        let wires = kernel.guard_wires(name, netns, address);
        let attached = kernel.attach_pod(name, netns, address, listener.as_fd());
        attached.and_then(|()| kernel.end_bypassing(netns)).map_err(|e| refusal(&e))?;
        // Without IPv6 it is the pod that it would be without the address: refused by it, and no worse.
        if let Err(error) = kernel.set_ipv6(netns, listener.as_fd(), address6) {
            tracing::error!(pod = name, error = %chain(&error), "no IPv6 for the pod");
            kernel.set_ipv6(netns, listener.as_fd(), None).map_err(|e| refusal(&e))?;
        }
        Ok(wires.map_or_else(|e| WaysOut::Open(refusal(&e)), |_| WaysOut::Guarded))
    }

    /// Puts the packet programs back where a wire of the pod lost them, as one that was made anew has none. What could not be
    /// told, as where a device went meanwhile, is asked again at once, a few times.
    pub fn keep_wires(&self, name: &str, netns: BorrowedFd<'_>, address: Ipv4Addr) -> WaysOut {
        let kernel = match self.0.write() {
            Ok(kernel) => kernel,
            Err(refusal) => return WaysOut::Open(refusal),
        };
        let look = || match kernel.wires_are_guarded(name, netns) {
            Ok(true) => Ok(WaysOut::Guarded),
            Ok(false) => kernel.guard_wires(name, netns, address).map(|_| WaysOut::Mended),
            Err(e) => Err(e),
        };
        let mut found = look();
        for _ in 1..LOOKS_MAX {
            if !matches!(found, Err(KernelError::Io { .. } | KernelError::Bpf { .. })) {
                break;
            }
            found = look();
        }
        found.unwrap_or_else(|e| WaysOut::Open(refusal(&e)))
    }

    /// Takes the guard off a pod's namespace: only for a pod that ended. False while one of its wires is still there: ask again.
    pub fn detach(&self, name: &str) -> Result<bool, Refusal> {
        self.0.write()?.detach_pod(name).map_err(|e| refusal(&e))
    }

    /// Whether the network namespace still lives that is guarded under this name.
    pub fn lives(&self, name: &str) -> Result<bool, Refusal> {
        self.0.kernel.pod_lives(name).map_err(|e| refusal(&e))
    }

    /// Pods that are attached.
    pub fn attached(&self) -> Result<Vec<String>, Refusal> {
        self.0.kernel.pods().map_err(|e| refusal(&e))
    }

    /// Where a pod is, for connections that go directly; none where that is not clear.
    pub fn place(&self, netns: BorrowedFd<'_>) -> Result<Option<Place>, Refusal> {
        self.0.kernel.place(netns).map_err(|e| refusal(&e))
    }

    /// Says between which pods connections may go directly. True where something else was said before.
    pub fn set_locals(&self, locals: &[Local]) -> Result<bool, Refusal> {
        self.0.write()?.set_locals(locals).map_err(|e| refusal(&e))
    }

    /// Lets no new connection go directly until it is said of which pods.
    pub fn close_direct(&self) -> Result<(), Refusal> {
        self.0.write()?.close_direct().map_err(|e| refusal(&e))
    }

    /// What goes directly, and what began and ended since the last look.
    pub fn direct_flows(&self) -> Result<Direct, Refusal> {
        self.0.write()?.direct_flows().map_err(|e| refusal(&e))
    }

    /// Ends connections that go directly, in the namespaces of both ends.
    pub async fn cut_direct(&self, flows: Vec<Flow>, ends: Vec<Netns>) -> Result<(), Refusal> {
        let held = self.0.clone();
        let cut = move || {
            let kernel = held.write()?;
            let cut = kernel.cut_direct(&flows).map_err(|e| refusal(&e));
            let ended: Vec<_> = ends.iter().map(|end| kernel.end_bypassing(end.as_fd())).collect();
            cut?;
            ended.into_iter().try_for_each(|end| end.map(drop).map_err(|e| refusal(&e)))
        };
        let done = tokio::task::spawn_blocking(cut).await;
        done.map_err(|e| Refusal::new(Code::Internal, "a cut that ends", e.to_string()))?
    }

    /// The time since boot, as the kernel dates direct connections.
    pub fn boot_time(&self) -> Result<Duration, Refusal> {
        boot_time().map_err(|e| Refusal::new(Code::Internal, "the boot clock", e.to_string()))
    }

    /// Lets the kernel go on judging for so long. While another agent writes the tables, that is its to do: false.
    pub fn renew_lease(&self, length: Duration) -> Result<bool, Refusal> {
        let Some(kernel) = self.0.try_write() else { return Ok(false) };
        kernel.renew_lease(length).map_err(|e| refusal(&e)).map(|()| true)
    }

    /// What a former agent let the kernel do for longer ends by then.
    pub fn shorten_lease(&self, length: Duration) -> Result<(), Refusal> {
        let Some(kernel) = self.0.try_write() else { return Ok(()) };
        kernel.shorten_lease(length).map_err(|e| refusal(&e))
    }

    /// Of pods that are guarded from now on, what goes directly stops where the lease is over.
    pub fn set_strict(&self, strict: bool) {
        self.0.kernel.set_strict(strict);
    }

    /// Where a captured connection was going; asked once, by whoever accepted it.
    pub fn original_destination(&self, cookie: u64, client: SocketAddr, capture: SocketAddr) -> Option<Goal> {
        let kernel = &self.0.kernel;
        // A listener of both families says an IPv4 address as a v4-mapped one.
        match (canonical(client), canonical(capture)) {
            (SocketAddr::V4(client), SocketAddr::V4(capture)) => {
                let found = kernel.original_destination(cookie, client, capture)?;
                Some(if found.identity >= NumericIdentity::END.0 {
                    Goal::Outside(found.asked)
                } else {
                    Goal::Mesh(Captured { asked: found.asked.into(), endpoint: found.endpoint.into() })
                })
            }
            (SocketAddr::V6(client), SocketAddr::V6(capture)) => {
                let found = kernel.original_destination6(cookie, client, capture)?;
                // No way out is of IPv6.
                (found.identity < NumericIdentity::END.0)
                    .then_some(Goal::Mesh(Captured { asked: found.asked, endpoint: found.endpoint }))
            }
            (SocketAddr::V4(_), SocketAddr::V6(_)) | (SocketAddr::V6(_), SocketAddr::V4(_)) => None,
        }
    }

    /// Lets a socket of the agent's in a pod's namespace connect to the pod by IPv6, until what this gives is dropped.
    ///
    /// # Errors
    /// The kernel takes no more of them.
    pub fn leg6(&self, cookie: u64, source: SocketAddrV6, called: SocketAddrV6) -> Result<Leg6, Refusal> {
        // Another agent may write the tables by now: what is open here goes on, and what comes for it is let in.
        self.0.kernel.begin_leg(cookie, source, called).map_err(|e| refusal(&e))?;
        Ok(Leg6 { held: self.0.clone(), cookie, source, called })
    }

    /// Has the workload that accepts this leg see `client` for who calls; false where it will see the leg. Also while another agent
    /// writes the tables: it is of a connection of this one's.
    pub fn tell_client(&self, leg: &Leg, client: SocketAddr) -> bool {
        let told = self.0.kernel.tell_client(leg, client);
        told.unwrap_or_else(|error| {
            tracing::debug!(error = %chain(&error), "a workload is not told of its client");
            false
        })
    }

    /// Of a leg that came to nothing.
    pub fn forget_client(&self, leg: &Leg) {
        // What stays grows old and is swept.
        drop(self.0.kernel.forget_client(leg));
    }

    /// Drops what no workload took.
    pub fn sweep_clients(&self) -> Result<(), Refusal> {
        let Some(kernel) = self.0.try_write() else { return Ok(()) };
        kernel.sweep_clients().map(drop).map_err(|e| refusal(&e))
    }

    /// Tells every service with an endpoint at `address` which of its endpoints may be chosen: one that is avoided makes
    /// others be used. A service that is not in the kernel (any more) needs no telling: the next install brings the whole health.
    pub fn set_health(&self, view: &View, denials: &Denials, address: IpAddr, unhealthy: &Unhealthy) {
        let (Some(endpoint), Some(kernel)) = (view.endpoints.get(&address), self.0.try_write()) else { return };
        for service in view.services.iter().filter(|s| s.backends.iter().any(|b| b.contains(&endpoint.spiffe_id))) {
            let behind = compile::behind(view, denials, service);
            let choosable = balance::choosable(&behind, |e| unhealthy.avoids(e.address.ip(), service.port));
            for ip in behind.iter().map(|one| one.endpoint.address.ip()) {
                let (at, to) = (service.address.at(service.port), SocketAddr::new(ip, service.port));
                if let Err(error) = kernel.set_service_health(at, to, choosable.contains(&ip)) {
                    tracing::debug!(service = %at, endpoint = %to, error = %chain(&error), "health not told");
                }
            }
        }
    }

    /// Refusals since the last call, oldest first, to `take`. They are told to the agent that writes the tables.
    pub fn events(&self, take: &mut dyn FnMut(Event)) -> Result<(), Refusal> {
        let Some(kernel) = self.0.try_write() else { return Ok(()) };
        kernel.drain_events(take).map_err(|e| refusal(&e))
    }

    /// Totals: allowed, and refused by reason.
    pub fn totals(&self) -> Result<Totals, Refusal> {
        let counters = self.0.kernel.counters().map_err(|e| refusal(&e))?;
        Ok((counters.allowed, counters.denied.iter().map(|(r, n)| (r.as_str(), *n)).collect()))
    }

    /// What was lost or ended, by what it was; and how full each map is: its name, its entries, the most that it takes.
    pub fn losses(&self) -> Result<(Losses, Vec<Room>), Refusal> {
        let counters = self.0.kernel.counters().map_err(|e| refusal(&e))?;
        let lost = [
            ("event_lost", counters.events_lost),
            ("flow_lost", counters.flows_lost),
            ("socket_ended", counters.sockets_ended),
        ];
        Ok((lost, self.0.kernel.room().map_err(|e| refusal(&e))?.into()))
    }

    /// Drops records that no agent took.
    pub fn sweep(&self) -> Result<usize, Refusal> {
        let Some(kernel) = self.0.try_write() else { return Ok(0) };
        kernel.sweep_closed_flows(Duration::from_secs(60)).map_err(|e| refusal(&e))
    }
}

/// The agent's last leg to a pod, by IPv6, while it is being connected.
pub struct Leg6 {
    held: Arc<Held>,
    cookie: u64,
    source: SocketAddrV6,
    called: SocketAddrV6,
}

impl Drop for Leg6 {
    fn drop(&mut self) {
        if let Err(error) = self.held.kernel.end_leg(self.cookie, self.source, self.called) {
            // It is over in half a minute by itself.
            tracing::debug!(error = %chain(&error), "leg not taken back");
        }
    }
}

fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_all_processes_one_writes_the_tables() {
        let dir = std::env::temp_dir().join(format!("ambit-agent-writer-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let first = Writer::take(&dir).unwrap();
        let mode = std::fs::metadata(dir.join("kernel.lock")).unwrap().permissions();
        assert_eq!(std::os::unix::fs::PermissionsExt::mode(&mode) & 0o777, 0o600, "nobody else's to lock");
        assert_eq!(Writer::take(&dir).unwrap_err().code, Code::AgentRunning);
        drop(first);
        drop(Writer::take(&dir).unwrap());
        std::fs::remove_dir_all(&dir).unwrap();
        assert_eq!(Writer::take(&dir).unwrap_err().code, Code::ConfigInvalid);
    }
}
