//! The pods of the node: guarded as soon as they are found, before anybody knows who they are, and looked after from then on.

use super::direct::Way;
use super::{Control, State};
use crate::kernel::WaysOut;
use crate::metrics::METRICS;
use crate::netns::Netns;
use crate::plane::LocalPod;
use crate::pods::{self, Pod, Pods};
use crate::takeover::Socket;
use ambit_ebpf::{CAPTURE_PORT, DeviceNews, Place, netns_cookie};
use ambit_model::{Code, Refusal};
use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// Pods whose wires are looked at in one turn of the loop: each takes about a millisecond.
const LOOKS_MAX: usize = 16;

/// A pod whose namespace is guarded.
#[derive(Debug)]
pub(super) struct Guarded {
    pub(super) pod: Pod,
    pub(super) netns: Netns,
    capture: JoinHandle<()>,
    /// What captured connections come to, to be handed over; none once that is let go.
    listener: Option<TcpListener>,
    /// What capture runs as; it learns its identity when there is one.
    pub(super) identity: watch::Sender<Option<Arc<LocalPod>>>,
    pub(super) enrolled: Option<u32>,
    /// Why it is nobody until that is mended: something leads out of it where nothing can be stopped.
    pub(super) open: Option<Refusal>,
    /// Where connections from other pods of this node find it; none where that is not clear.
    pub(super) place: Option<Place>,
    /// Whether it has a way to other pods of this node, by their addresses.
    pub(super) ways: BTreeMap<Ipv4Addr, Way>,
}

impl Guarded {
    /// Nobody here takes connections any more, and none shall wait for it.
    pub(super) fn let_go(&mut self) {
        self.listener = None;
    }

    /// Its socket, for a successor.
    pub(super) fn handed(&self) -> Option<(Socket, OwnedFd)> {
        let listener = self.listener.as_ref()?.try_clone().ok()?;
        Some((Socket::Capture { pod: self.pod.name.clone(), netns: self.pod.netns_id }, listener.into()))
    }

    /// Takes note of how it may be left. True where who it is must change.
    fn tell(&mut self, ways: WaysOut) -> bool {
        let open = match ways {
            WaysOut::Guarded | WaysOut::Mended => None,
            WaysOut::Open(refusal) => Some(refusal),
        };
        if let Some(refusal) = open.as_ref().filter(|_| open != self.open) {
            tracing::error!(pod = %self.pod.name, %refusal, "a way out of the pod is open: it is denied");
        }
        let was_open = std::mem::replace(&mut self.open, open).is_some();
        was_open != self.open.is_some()
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        self.capture.abort();
    }
}

/// The cgroup of a pod that is believed no more: its directory and its id.
pub(super) type FormerCgroup = (PathBuf, u64);

impl Control {
    /// Scans the pods; guards new ones at once, before anybody knows who they are. True where something changed.
    pub(super) async fn look(&mut self, state: &mut State) -> bool {
        let (found, unusable) = match pods::scan(&self.pods_dir, &self.cgroup_root) {
            Ok(found) => found,
            Err(error) => {
                METRICS.component.set(["pods"], 0.0);
                tracing::debug!(%error, "pods not read");
                return false;
            }
        };
        METRICS.component.set(["pods"], 1.0);
        if unusable != state.unusable {
            for bad in &unusable {
                tracing::warn!(error = %bad, "pod stays denied");
            }
            state.unusable = unusable;
        }
        let mut changed = found != state.pods;
        if changed {
            self.disbelieve(state, &found).await;
        }
        state.unguarded.retain(|name, _| found.contains_key(name));
        for pod in found.values() {
            if !state.guarded.contains_key(&pod.name) {
                match self.guard(pod, state.guarded.len()).await {
                    Ok(guarded) => {
                        state.left.remove(&pod.name);
                        state.unguarded.remove(&pod.name);
                        state.guarded.insert(pod.name.clone(), guarded);
                        changed = true;
                    }
                    Err(refusal) if state.unguarded.get(&pod.name) != Some(&refusal) => {
                        tracing::warn!(pod = %pod.name, %refusal, "pod not guarded, stays denied");
                        state.unguarded.insert(pod.name.clone(), refusal);
                    }
                    Err(_) => {}
                }
            }
        }
        state.pods = found;
        self.detach_the_ended(state);
        changed
    }

    /// The wires of one pod, in turn; of many, after news of the node's devices: a veth that was made anew has no packet
    /// program. True where who one of them is must change.
    pub(super) fn look_at_wires(&self, state: &mut State) -> bool {
        if state.news.as_ref().is_some_and(DeviceNews::came) {
            state.due = state.guarded.len();
        }
        let pods = state.due.clamp(1, LOOKS_MAX);
        state.due = state.due.saturating_sub(pods);
        let mut changed = false;
        for _ in 0..pods {
            state.turn = state.turn.wrapping_add(1);
            let at = state.turn.checked_rem(state.guarded.len()).unwrap_or_default();
            changed |= state.guarded.values_mut().nth(at).is_some_and(|guarded| self.look_at(guarded));
        }
        // Who is nobody for it does not wait as long as the others.
        let open = state.guarded.values().filter(|g| g.open.is_some()).count();
        let at = state.turn.checked_rem(open).unwrap_or_default();
        let mut open = state.guarded.values_mut().filter(|g| g.open.is_some());
        changed | open.nth(at).is_some_and(|guarded| self.look_at(guarded))
    }

    fn look_at(&self, guarded: &mut Guarded) -> bool {
        let ways = self.kernel.keep_wires(&guarded.pod.name, guarded.netns.as_fd(), guarded.pod.address);
        if ways == WaysOut::Mended {
            tracing::warn!(pod = %guarded.pod.name, "a wire of the pod was open, and is guarded again");
        }
        let changed = guarded.tell(ways.clone());
        if changed || ways == WaysOut::Mended {
            let place = self.place(&guarded.pod, &guarded.netns);
            guarded.ways.clear();
            return std::mem::replace(&mut guarded.place, place) != place || changed;
        }
        changed
    }

    /// Takes their identity from guarded pods of which the files say something else now, or nothing. The guard on the
    /// namespace stays: a bad file must not open a running pod to plain inbound.
    async fn disbelieve(&self, state: &mut State, found: &Pods) {
        let differs = |g: &&Guarded| found.get(&g.pod.name) != Some(&g.pod);
        let names: Vec<String> = state.guarded.values().filter(differs).map(|g| g.pod.name.clone()).collect();
        for name in names {
            let Some(mut guarded) = state.guarded.remove(&name) else { continue };
            if let Err(refusal) = self.kernel.forget(guarded.pod.cgroup_id) {
                tracing::error!(pod = name, %refusal, "pod not denied");
            }
            match found.get(&name).filter(|pod| pod.stands_where(&guarded.pod)) {
                Some(pod) => {
                    guarded.pod = pod.clone();
                    guarded.enrolled = None;
                    state.guarded.insert(name, guarded);
                }
                None => {
                    // Its descriptors would keep the namespace alive for ever; and whoever guards it anew needs the port.
                    guarded.let_go();
                    guarded.capture.abort();
                    let _ = (&mut guarded.capture).await;
                    let cgroup = (self.cgroup_root.join(&guarded.pod.cgroup), guarded.pod.cgroup_id);
                    state.left.insert(name, Some(cgroup));
                }
            }
        }
    }

    /// What a former agent guarded.
    pub(super) fn found_guarded(&self) -> BTreeMap<String, Option<FormerCgroup>> {
        match self.kernel.attached() {
            Ok(names) => names.into_iter().map(|name| (name, None)).collect(),
            Err(refusal) => {
                tracing::error!(%refusal, "guards of a former agent not found; they stay");
                BTreeMap::new()
            }
        }
    }

    /// Takes the guard off namespaces of pods that ended: the namespace is gone, or both file and cgroup are. A wire that
    /// is still there stays guarded, and its pod on the list.
    fn detach_the_ended(&self, state: &mut State) {
        let State { left, pods, unusable, .. } = state;
        left.retain(|name, cgroup| {
            let has_file = pods.contains_key(name) || unusable.iter().any(|bad| bad.name == *name);
            let over = !has_file && cgroup.as_ref().is_some_and(is_gone);
            let ended = if over { Ok(true) } else { self.kernel.lives(name).map(|lives| !lives) };
            match ended.and_then(|ended| if ended { self.kernel.detach(name) } else { Ok(false) }) {
                Ok(detached) => !detached,
                Err(refusal) => {
                    tracing::debug!(pod = %name, %refusal, "pod not released");
                    true
                }
            }
        });
    }

    fn place(&self, pod: &Pod, netns: &Netns) -> Option<Place> {
        let place = self.kernel.place(netns.as_fd());
        place.unwrap_or_else(|refusal| {
            tracing::warn!(pod = %pod.name, %refusal, "not found where the pod is: nothing goes to it directly");
            None
        })
    }

    /// Puts this agent's own programs back on every pod, after another one did not take over.
    pub(super) fn guard_again(&self, state: &mut State) {
        state.guarded.retain(|name, guarded| {
            // Who it is, is told anew with the tables.
            guarded.enrolled = None;
            let Some(listener) = &guarded.listener else { return true };
            match self.kernel.attach(name, guarded.netns.as_fd(), both(&guarded.pod), listener) {
                Ok(ways) => {
                    guarded.tell(ways);
                    true
                }
                // Then it is found and guarded as one that is new here.
                Err(refusal) => {
                    tracing::error!(pod = %name, %refusal, "pod not guarded anew");
                    false
                }
            }
        });
    }

    /// The capture listener of a pod: the former agent's, where that handed it over, since nobody else can listen there
    /// meanwhile.
    async fn capture(&mut self, pod: &Pod, netns: &Netns) -> std::io::Result<TcpListener> {
        // Of a pod that got an IPv6 address since, it takes IPv4 alone: calls by IPv6 are refused until the agent starts anew.
        if let Some(listener) = self.hands.captures.remove(&(pod.name.clone(), pod.netns_id)) {
            return Ok(listener);
        }
        let v4 = SocketAddr::from((Ipv4Addr::LOCALHOST, CAPTURE_PORT));
        if pod.address6.is_none() {
            return self.netns.listen(netns, v4).await;
        }
        // v4-mapped: bound to an address of IPv6 alone it would take no IPv4.
        let both = SocketAddr::from((Ipv4Addr::LOCALHOST.to_ipv6_mapped(), CAPTURE_PORT));
        match self.netns.listen(netns, both).await {
            // This node's kernel has no IPv6: the pod is guarded as one without.
            Err(e) if e.raw_os_error() == Some(libc::EAFNOSUPPORT) => self.netns.listen(netns, v4).await,
            listening => listening,
        }
    }

    /// Opens the pod's capture listener in its namespace and refuses plain inbound there.
    async fn guard(&mut self, pod: &Pod, nth: usize) -> Result<Guarded, Refusal> {
        let trouble =
            |e: std::io::Error| Refusal::new(Code::Internal, format!("a guard on pod {}", pod.name), e.to_string());
        let netns = Netns::open(&pod.netns).map_err(trouble)?;
        let listener = self.capture(pod, &netns).await.map_err(trouble)?;
        let cookie = netns_cookie(&listener).map_err(trouble)?;
        let ways = self.kernel.attach(&pod.name, netns.as_fd(), both(pod), &listener)?;
        let (identity, who) = watch::channel(None);
        let kept = Some(listener.try_clone().map_err(trouble)?);
        let capture = self.outbound.capture(nth, who, listener, cookie, self.kernel.clone());
        let place = self.place(pod, &netns);
        let mut guarded = Guarded {
            pod: pod.clone(),
            netns,
            capture,
            listener: kept,
            identity,
            enrolled: None,
            open: None,
            place,
            ways: BTreeMap::new(),
        };
        guarded.tell(ways);
        Ok(guarded)
    }
}

fn both(pod: &Pod) -> (Ipv4Addr, Option<Ipv6Addr>) {
    (pod.address, pod.address6)
}

/// A cgroup can be removed only when no process is left in it.
fn is_gone((path, id): &FormerCgroup) -> bool {
    use std::os::unix::fs::MetadataExt;
    match std::fs::metadata(path) {
        Ok(meta) => meta.ino() != *id,
        Err(error) => error.kind() == std::io::ErrorKind::NotFound,
    }
}
