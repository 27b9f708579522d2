//! The agent's one decision loop: pods that are here, the view that the cell sent, the SVIDs that are held; from these
//! it makes the kernel's tables and the plane that carries traffic, whole, each time one of them changes.

mod direct;
mod drift;
mod guards;

use crate::cgroup::MeshRoot;
use crate::clock::Clock;
use crate::compile;
use crate::course::Course;
use crate::denials::Lane;
use crate::egress;
use crate::health::Health;
use crate::issued::{Issued, Known};
use crate::kernel::KernelHandle;
use crate::metrics::METRICS;
use crate::netns::NetnsThread;
use crate::outbound::Outbound;
use crate::plane::{Credentials, LocalPod, Plane};
use crate::pods::{Pod, Pods, Unusable};
use crate::seen::Seen;
use crate::takeover::Ask;
use crate::view::{View, Workload};
use ambit_ebpf::{DeviceNews, Tables};
use ambit_identity::{SharedTrust, Trust, TrustStore};
use ambit_model::policy::Endpoint;
use ambit_model::{Code, EntryId, Generation, Moment, NodeId, Refusal, Revision};
use guards::{FormerCgroup, Guarded};
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, TcpListener};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, watch};

/// How soon a pod is noticed.
const POLL_EVERY: Duration = Duration::from_millis(100);
/// Turns of the loop between two looks at direct connections, where nothing else asks for one.
const DIRECT_EVERY: u32 = 10;

/// After a start, what was reported before stands until every pod that is here has its SVID, or was refused one; but no
/// longer than this.
const SETTLE_MAX: Duration = Duration::from_secs(5);

/// What became of the newest view.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Which one.
    pub revision: Revision,
    /// The digest of what was read back from the kernel, or why it is not there.
    pub result: Result<[u8; 32], Refusal>,
}

/// Where the loop gets its facts and tells what it did.
#[derive(Debug)]
pub struct Wires {
    /// The newest view from the cell.
    pub desired: watch::Receiver<Option<Arc<View>>>,
    /// What became of it.
    pub outcome: watch::Sender<Option<Outcome>>,
    /// The workloads that run here and can be reached; none until that is known after a start.
    pub endpoints: watch::Sender<Option<Vec<Endpoint>>>,
    /// For tunnels.
    pub plane: watch::Sender<Option<Arc<Plane>>>,
    /// Who called whom directly.
    pub seen: Seen,
    /// This node and its admission, for endpoint reports.
    pub node: watch::Receiver<Option<(NodeId, Generation)>>,
}

/// The loop's parts.
#[derive(Debug)]
pub struct Control {
    /// Where pod files are.
    pub pods_dir: PathBuf,
    /// The node's mesh cgroup.
    pub cgroup_root: PathBuf,
    /// Where tunnels to this node end, and where its own come from.
    pub node_address: Ipv4Addr,
    /// The kernel side.
    pub kernel: KernelHandle,
    /// For capture listeners.
    pub netns: NetnsThread,
    /// Shared state.
    pub issued: Issued,
    /// Whom to trust.
    pub trust: SharedTrust,
    /// Whom to refuse.
    pub denials: Lane,
    /// Avoided endpoints.
    pub health: Health,
    /// What captured connections are handed to.
    pub outbound: Outbound,
    /// By which policies end.
    pub clock: Arc<Clock>,
    /// Who came before, and who comes after.
    pub hands: Hands,
    /// Its wires.
    pub wires: Wires,
}

/// What the loop has of other agents of this node.
#[derive(Debug)]
pub struct Hands {
    /// Sockets of pods that the former agent handed over, each with the network namespace that it was in. Those of pods that
    /// are not here go when what is here is known.
    pub captures: BTreeMap<(String, (u64, u64)), TcpListener>,
    /// What is asked by whom a successor calls.
    pub asks: mpsc::Receiver<Ask>,
    /// When it drains, sockets are let go.
    pub course: Course,
}

impl Default for Hands {
    /// Of an agent before and after which there is none.
    fn default() -> Self {
        Self { captures: BTreeMap::new(), asks: mpsc::channel(1).1, course: Course::default() }
    }
}

#[derive(Default)]
struct State {
    pods: Pods,
    unusable: Vec<Unusable>,
    guarded: BTreeMap<String, Guarded>,
    /// Namespaces that stay guarded though no usable file speaks of them: processes may still run there. (No cgroup:
    /// a former agent left it.)
    left: BTreeMap<String, Option<FormerCgroup>>,
    /// Whose wires are looked at next, and how many more without delay.
    turn: usize,
    due: usize,
    /// Of the node's devices; where there is none, pods are looked at in turn all the same.
    news: Option<DeviceNews>,
    /// Why pods could not be guarded, as last told.
    unguarded: BTreeMap<String, Refusal>,
    view: Option<Arc<View>>,
    installed: Option<(Arc<Tables>, [u8; 32])>,
    judged: Judged,
    credentials: BTreeMap<EntryId, Arc<Credentials>>,
    reconciled: bool,
    direct: direct::Known,
    /// Another agent writes the kernel's tables: what is carried here goes on by what the cell says.
    parked: bool,
    /// When the first slice took effect, until what is here is reported.
    unsettled: Option<Instant>,
}

/// When what is in force was judged: policies end without a word from the cell.
#[derive(Default)]
struct Judged {
    /// The kernel's tables; those that it did not take are due until it does.
    kernel: Option<Moment>,
    /// What is open, each time that a plane is published.
    plane: Option<Moment>,
}

impl Judged {
    fn is_over(judged: Option<Moment>, view: Option<&View>, now: Moment) -> bool {
        let changes = |view: &View, at| view.rules.changes_between(at, now) || view.egress.changes_between(at, now);
        judged.zip(view).is_some_and(|(at, view)| changes(view, at))
    }
}

impl State {
    /// Pods that may be somebody: every way out of them is guarded.
    fn believed(&self) -> impl Iterator<Item = &Pod> {
        self.guarded.values().filter(|g| g.open.is_none()).map(|g| &g.pod)
    }

    fn count_refused(&self) {
        let open = self.guarded.len() - self.believed().count();
        METRICS.pods_refused.set(["open"], open as f64);
        METRICS.pods_refused.set(["unguarded"], self.unguarded.len() as f64);
        METRICS.pods_refused.set(["unusable"], self.unusable.len() as f64);
    }
}

impl Control {
    /// Runs until the process ends.
    pub async fn run(mut self) {
        let news = DeviceNews::open().inspect_err(|error| tracing::warn!(%error, "no news of devices")).ok();
        let mut state = State { left: self.found_guarded(), news, ..State::default() };
        let course = self.hands.course.clone();
        let mut holds = true;
        let (mut known, mut denials) = (self.issued.watch(), self.denials.watch());
        // What is said to be in force is so for the pods that are here already.
        self.look(&mut state).await;
        let mut tick = tokio::time::interval(POLL_EVERY);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut compare = tokio::time::interval(drift::COMPARE_EVERY);
        compare.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut turns = 0u32;
        loop {
            let mut due = true;
            tokio::select! {
                biased;
                // First: who is refused now must not wait for anything else.
                changed = denials.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    denials.mark_unchanged();
                    self.withdraw(&mut state).await;
                    // What is open between pods of this node is ended before the install, which takes tens of ms.
                    self.keep_direct(&mut state).await;
                    self.reconcile(&mut state).await;
                }
                Some(ask) = self.hands.asks.recv() => self.answer(ask, &mut state).await,
                () = course.draining(), if holds => {
                    holds = false;
                    state.guarded.values_mut().for_each(Guarded::let_go);
                }
                _ = tick.tick() => {
                    let changed = !state.parked && (self.look(&mut state).await | self.look_at_wires(&mut state));
                    state.count_refused();
                    let over = Judged::is_over(state.judged.kernel, state.view.as_deref(), self.clock.moment());
                    if changed || over {
                        self.reconcile(&mut state).await;
                    }
                    turns = turns.wrapping_add(1);
                    due = changed || over || turns.is_multiple_of(DIRECT_EVERY);
                    if state.unsettled.is_some_and(|since| since.elapsed() >= SETTLE_MAX) {
                        self.publish(&mut state, &self.issued.now());
                    }
                    // What is open must not stay so because the kernel takes no tables.
                    if Judged::is_over(state.judged.plane, state.view.as_deref(), self.clock.moment()) {
                        self.publish(&mut state, &self.issued.now());
                    }
                }
                _ = compare.tick() => if self.drifted(&mut state).await {
                    self.reconcile(&mut state).await;
                },
                changed = self.wires.desired.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    self.reconcile(&mut state).await;
                }
                changed = known.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let now = known.borrow_and_update().clone();
                    self.publish(&mut state, &now);
                }
                // A new admission: endpoints are reported under it from now on.
                Ok(()) = self.wires.node.changed() => self.publish(&mut state, &self.issued.now()),
            }
            if due {
                self.keep_direct(&mut state).await;
            }
        }
    }

    /// What a successor needs, and what is to be done where it failed.
    async fn answer(&mut self, ask: Ask, state: &mut State) {
        match ask {
            Ask::Park(reply) => {
                state.parked = true;
                // Who asked has gone: then it is undone soon.
                let _ = reply.send(state.guarded.values().filter_map(Guarded::handed).collect());
            }
            Ask::Resume => {
                state.parked = false;
                self.guard_again(state);
                state.installed = None;
                self.reconcile(state).await;
            }
        }
    }

    /// Takes the endpoints of denied nodes out of the tables in force, in about a millisecond; the install that follows
    /// takes tens.
    async fn withdraw(&self, state: &mut State) {
        let Some(view) = state.view.as_ref().filter(|_| !state.parked) else { return };
        let denials = self.denials.now();
        let denied = view.endpoints.values().filter(|e| denials.denies_endpoint(e));
        let denied: Vec<IpAddr> = denied.map(|e| e.address.ip()).collect();
        if denied.is_empty() {
            return;
        }
        // What is in the kernel is no longer what was installed.
        state.installed = None;
        let (revision, begun) = (denials.revision().0, Instant::now());
        match self.kernel.withdraw(denied).await {
            Ok(endpoints) => {
                let took_us = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX);
                tracing::info!(revision, endpoints, took_us, "denied in the kernel");
            }
            Err(refusal) => tracing::error!(revision, %refusal, "denials wait for the next install"),
        }
    }

    /// Brings kernel and plane to the newest view and pods.
    async fn reconcile(&mut self, state: &mut State) {
        let desired = self.wires.desired.borrow_and_update().clone();
        let Some(view) = desired else { return };
        if state.parked {
            return self.follow(state, view);
        }
        let begun = Instant::now();
        let workloads = view.workloads(state.believed());
        let now = self.clock.moment();
        let result = self.install(state, &view, &workloads, now).await;
        METRICS.component.set(["kernel"], f64::from(u8::from(result.is_ok())));
        match &result {
            Ok(_) => {
                METRICS.apply.inc(["ok", "none"]);
                METRICS.apply_time.observe(begun.elapsed());
                METRICS.revision.set(["applied"], view.revision.0 as f64);
            }
            Err(refusal) => {
                METRICS.apply.inc(["failed", refusal.code.as_str()]);
                tracing::error!(revision = view.revision.0, %refusal, "slice not applied; the former one stays in force");
            }
        }
        let outcome = Outcome { revision: view.revision, result };
        if outcome.result.is_ok() {
            self.replace_trust(&view);
            if state.view.is_none() {
                state.unsettled = Some(Instant::now());
            }
            state.view = Some(view.clone());
            state.judged.kernel = Some(now);
            self.issued.set_pods(view.entries_of_pods(state.believed()));
            self.issued.set_view(view);
            self.publish(state, &self.issued.now());
        }
        self.wires.outcome.send_replace(Some(outcome));
    }

    /// The kernel is another agent's: what is open here is judged by the new view all the same.
    fn follow(&mut self, state: &mut State, view: Arc<View>) {
        self.replace_trust(&view);
        let workloads = view.workloads(state.believed());
        for guarded in state.guarded.values().filter(|guarded| !workloads.contains_key(&guarded.pod.name)) {
            guarded.identity.send_replace(None);
        }
        state.judged.kernel = Some(self.clock.moment());
        state.view = Some(view);
        self.publish(state, &self.issued.now());
    }

    async fn install(
        &self,
        state: &mut State,
        view: &View,
        workloads: &BTreeMap<String, Workload>,
        now: Moment,
    ) -> Result<[u8; 32], Refusal> {
        let (denials, unhealthy) = (self.denials.now(), self.health.avoided());
        let own = egress::own_addresses();
        let tables = compile::all(view, &denials, workloads.values(), &unhealthy, &own, now);
        let tables = Arc::new(tables);
        let digest = match &state.installed {
            Some((installed, digest)) if *installed == tables => *digest,
            _ => {
                let digest = self.kernel.install(tables.clone()).await?;
                METRICS.generations.inc([]);
                state.installed = Some((tables, digest));
                digest
            }
        };
        self.enrol(state, workloads)?;
        if !state.reconciled {
            self.forget_the_former(state)?;
            state.reconciled = true;
        }
        Ok(digest)
    }

    /// Tells the kernel who the guarded pods are. A pod that is nobody now is forgotten.
    fn enrol(&self, state: &mut State, workloads: &BTreeMap<String, Workload>) -> Result<(), Refusal> {
        for guarded in state.guarded.values_mut() {
            let workload = workloads.get(&guarded.pod.name);
            let number = workload.map(|w| w.number.0);
            if number != guarded.enrolled {
                match number {
                    Some(number) => self.kernel.enrol(guarded.pod.cgroup_id, number)?,
                    None => self.kernel.forget(guarded.pod.cgroup_id)?,
                }
                guarded.enrolled = number;
            }
            let pod = workload.map(|w| Arc::new(LocalPod { workload: w.clone(), netns: guarded.netns.clone() }));
            guarded.identity.send_replace(pod);
        }
        Ok(())
    }

    /// After the first view: cgroups that a former agent left and that are no pods any more.
    fn forget_the_former(&self, state: &State) -> Result<(), Refusal> {
        let mine = |id| state.guarded.values().any(|g| g.enrolled.is_some() && g.pod.cgroup_id == id);
        self.kernel.keep_only(&mine)
    }

    fn replace_trust(&self, view: &View) {
        match trust_of(view) {
            Ok(store) => self.trust.replace(Trust::Bundles(store)),
            Err(refusal) => tracing::error!(%refusal, "bundles not taken; the former ones stay in use"),
        }
    }

    /// Publishes the plane and what the cell should know of it.
    fn publish(&mut self, state: &mut State, known: &Known) {
        let Some(view) = state.view.clone() else { return };
        state.judged.plane = Some(self.clock.moment());
        self.renew_credentials(state, known);
        let pods: Vec<Arc<LocalPod>> = state.guarded.values().filter_map(|g| g.identity.borrow().clone()).collect();
        let held = |pod: &LocalPod| state.credentials.contains_key(&pod.workload.entry.id);
        let node = *self.wires.node.borrow();
        let places =
            pods.iter().filter(|pod| held(pod)).flat_map(|pod| pod.workload.pod.addresses().map(move |at| (pod, at)));
        let endpoints = places.filter_map(|(pod, address)| {
            let (node, generation) = node?;
            Some(Endpoint {
                spiffe_id: pod.id().clone(),
                address,
                cluster: view.cluster.clone(),
                node_address: self.node_address,
                node,
                generation,
            })
        });
        let endpoints: Vec<Endpoint> = endpoints.collect();
        let settled = |since: Instant| {
            let asked = pods.iter().all(|pod| known.svids.contains_key(&pod.workload.entry.id));
            // While another agent serves, that one has them: what is late here ends in this one's end.
            asked || (since.elapsed() >= SETTLE_MAX && !self.hands.course.is_waiting())
        };
        if state.unsettled.is_none_or(settled) {
            if state.unsettled.take().is_some() {
                self.hands.captures.clear();
            }
            self.wires.endpoints.send_if_modified(|old| {
                let changed = old.as_ref() != Some(&endpoints);
                *old = Some(endpoints);
                changed
            });
        }
        let credentials = state.credentials.values().cloned();
        let plane = Plane::new(view, pods, credentials, self.trust.clone(), self.node_address);
        self.wires.plane.send_replace(Some(Arc::new(plane)));
    }

    fn renew_credentials(&self, state: &mut State, known: &Known) {
        let mut credentials = BTreeMap::new();
        for (entry, svid) in known.svids.iter() {
            let Ok(svid) = svid else { continue };
            let former = state.credentials.get(entry).filter(|c| Arc::ptr_eq(c.svid(), svid)).cloned();
            match former.map_or_else(|| Credentials::new(svid.clone(), self.trust.clone()).map(Arc::new), Ok) {
                Ok(made) => drop(credentials.insert(entry.clone(), made)),
                Err(refusal) => tracing::error!(%refusal, entry = %entry, "SVID not usable for tunnels"),
            }
        }
        state.credentials = credentials;
    }
}

/// Whom to trust. A foreign bundle that cannot be used is left out: nobody of that trust domain is taken for who it says, and
/// the others, and what is denied, are not held up.
fn trust_of(view: &View) -> Result<TrustStore, Refusal> {
    let mut store = TrustStore::new(&view.own)?;
    for bundle in &view.foreign {
        if let Err(refusal) = store.add_foreign(bundle) {
            tracing::error!(trust_domain = %bundle.trust_domain(), %refusal, "foreign bundle not taken");
        }
    }
    store.deny_authorities(view.denials.authorities().iter().cloned());
    Ok(store)
}

/// Checks, before anything is attached, that the configured cgroup is one.
pub fn mesh_root(cgroup_root: &std::path::Path) -> Result<MeshRoot, Refusal> {
    MeshRoot::find(cgroup_root)
        .map_err(|e| Refusal::new(Code::ConfigInvalid, "'cgroup_root' on a cgroup2 mount", e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::tests::{slice, view};
    use ambit_identity::{Csr, IssuingKey, Root, SvidKey, verify_svid};
    use ambit_model::{Lifetime, Stamp, TrustDomain};
    use ambit_proto::v1;

    #[test]
    fn a_foreign_bundle_that_cannot_be_used_holds_up_neither_roots_nor_denials() {
        let (now, west): (_, TrustDomain) = (Stamp(1_800_000_000_000), "west".parse().unwrap());
        let lifetime = Lifetime { not_before: now.minus_ms(60_000), not_after: now.plus_ms(60_000) };
        let root = Root::create(&west, now, [1; 16]).unwrap();
        let (key, leaf) = (SvidKey::generate().unwrap(), SvidKey::generate().unwrap());
        let csr = |key: &SvidKey| Csr::parse(&key.csr().unwrap()).unwrap();
        let intermediate = root.found(1, &csr(&key), lifetime).unwrap();
        let issuer = IssuingKey::new(key, intermediate).unwrap();
        let chain = issuer.replica_leaf(1, &west, lifetime, &csr(&leaf)).unwrap();
        let authority = v1::AuthorityDenial { trust_domain: "west".into(), authority: issuer.authority().into() };
        for (denied, good) in [(vec![], true), (vec![authority], false)] {
            let mut slice = v1::Slice { authority_denials: denied, ..slice() };
            slice.bundles[0].roots_der = vec![root.der().to_vec()];
            slice.bundles[1].roots_der = vec![b"no certificate".to_vec()];
            slice.bundles.push(v1::Bundle { trust_domain: "north".into(), ..slice.bundles[0].clone() });
            let trust = trust_of(&view(slice).unwrap()).unwrap();
            assert_eq!(trust.domains().map(TrustDomain::as_str).collect::<Vec<_>>(), ["north", "west"]);
            assert_eq!(verify_svid(&chain, &trust, now).is_ok(), good);
        }
    }
}
