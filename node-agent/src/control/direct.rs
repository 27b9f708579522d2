//! Connections between two pods of this node go from one to the other, and no agent carries them. So it is here that they
//! end when they may no longer be, and that they are told of: who may speak directly is said to the kernel, and what does
//! is looked at, every second and whenever something changed.
//!
//! A pod speaks directly while its SVID would be accepted by whoever it called through the agent: SVIDs and denials mean the
//! same on both ways. What may not go directly goes through the agent, and is judged there.

use super::{Control, State};
use crate::denials::Denials;
use crate::lines::Lines;
use crate::metrics::METRICS;
use crate::netns::Netns;
use crate::plane::{Credentials, LocalPod};
use crate::recent::{self, Id, Place, Row};
use crate::record;
use crate::seen::{self, Seen};
use crate::shown::{Now, Shown};
use crate::view::View;
use ambit_ebpf::{Direct, Ended, Flow, Local};
use ambit_identity::Usage;
use ambit_identity::svid::Presented;
use ambit_model::{Moment, NumericIdentity, Refusal, SpiffeId};
use rustls_pki_types::CertificateDer;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, UdpSocket};
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

/// SVIDs of one identity that are remembered: a connection ends with the one under which it began.
const SVIDS_MAX: usize = 16;

/// A pod that has no way to another is asked again after this: routes come when a pod's own work is done.
const TRY_AGAIN: Duration = Duration::from_secs(5);

/// From one pod to another, by the first one's routes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    Found,
    None { tried: Instant },
}

/// What of it is remembered.
#[derive(Default)]
pub(super) struct Known {
    /// As last said to the kernel.
    locals: Option<Vec<Local>>,
    /// SVIDs of who runs here, oldest first, with the time, since boot, from which each was the newest.
    svids: BTreeMap<SpiffeId, Vec<Held>>,
    /// Namespaces of the pods of the last look: of one that is a pod no more, sockets are still to be ended. No longer than that,
    /// for a descriptor keeps its namespace alive.
    ends: BTreeMap<Ipv4Addr, Netns>,
    /// Of connections that an audit policy matched; all of them are counted.
    audited: Lines,
}

struct Held {
    since: Duration,
    presented: Presented,
    shown: Shown,
    /// Which: no key outlives its use for being remembered here.
    credentials: Weak<Credentials>,
}

impl Held {
    fn is_of(&self, credentials: &Arc<Credentials>) -> bool {
        std::ptr::eq(self.credentials.as_ptr(), Arc::as_ptr(credentials))
    }
}

/// What a decision about a connection rests on.
struct Facts<'a> {
    view: &'a View,
    denials: &'a Denials,
    at: Moment,
    pods: BTreeMap<Ipv4Addr, Arc<LocalPod>>,
}

impl Control {
    /// Says who may speak directly, tells of what did, and ends what may no longer be. Not before the first view is in the
    /// kernel: until then what a former agent said stands, as a successor's does from when it may write.
    pub(super) async fn keep_direct(&self, state: &mut State) {
        let Some(view) = state.view.clone().filter(|_| !state.parked) else { return };
        if let Err(refusal) = self.look_at_direct(state, &view).await {
            METRICS.component.set(["kernel"], 0.0);
            let locals = state.direct.locals.take().unwrap_or_default();
            let closed: Vec<Local> = locals.into_iter().map(|local| Local { open: false, ..local }).collect();
            let open = self.kernel.set_locals(&closed).err();
            tracing::error!(%refusal, ?open, "direct connections not looked at: no new one is begun");
        }
    }

    async fn look_at_direct(&self, state: &mut State, view: &View) -> Result<(), Refusal> {
        self.find_ways(state).await;
        let denials = self.denials.now();
        let pods = state.guarded.values().filter_map(|g| g.identity.borrow().clone());
        let pods = pods.map(|pod| (pod.workload.pod.address, pod)).collect();
        let facts = Facts { view, denials: &denials, at: self.clock.moment(), pods };
        self.remember_svids(state, &facts)?;
        let locals = self.locals(state, &facts);
        if self.kernel.set_locals(&locals)? && state.direct.locals.as_ref() == Some(&locals) {
            tracing::error!(map = "locals", "others changed who may speak directly: it is told anew");
        }
        state.direct.locals = Some(locals);
        let direct = self.kernel.direct_flows()?;
        state.direct.tell(&direct, &facts, &self.wires.seen);
        let refused: Vec<Flow> = direct
            .flows
            .into_iter()
            .filter(|flow| flow.closed.is_none() && !state.direct.permits(flow, &facts))
            .collect();
        let ends = facts.pods.iter().map(|(at, pod)| (*at, pod.netns.clone())).collect();
        let former = std::mem::replace(&mut state.direct.ends, ends);
        if refused.is_empty() { Ok(()) } else { self.cut(refused, &facts, &former).await }
    }

    async fn cut(
        &self,
        flows: Vec<Flow>,
        facts: &Facts<'_>,
        former: &BTreeMap<Ipv4Addr, Netns>,
    ) -> Result<(), Refusal> {
        let begun = Instant::now();
        let names = names(&flows, facts);
        let ends: BTreeSet<Ipv4Addr> = flows.iter().flat_map(|flow| [*flow.from.ip(), *flow.to.ip()]).collect();
        let now = |at: &Ipv4Addr| facts.pods.get(at).map(|pod| pod.netns.clone());
        let netns: Vec<Netns> = ends.iter().filter_map(|at| now(at).or_else(|| former.get(at).cloned())).collect();
        self.kernel.cut_direct(flows.clone(), netns).await?;
        let took_us = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX);
        for flow in &flows {
            METRICS.cut.inc(["direct"]);
            if let (Some(caller), Some(called)) = (names.get(&flow.caller), names.get(&flow.called)) {
                tracing::info!(%caller, %called, port = flow.to.port(), took_us, "direct connection cut");
                record::direct(id_of(flow), caller, called, flow.to.into(), record::flag::DENIED, None, Duration::ZERO);
            }
        }
        Ok(())
    }

    /// Finds out which pods have a way to which others: through the agent they need none.
    async fn find_ways(&self, state: &mut State) {
        let all: BTreeSet<Ipv4Addr> =
            state.guarded.values().filter(|g| g.place.is_some()).map(|g| g.pod.address).collect();
        for guarded in state.guarded.values_mut() {
            let own = guarded.pod.address;
            guarded.ways.retain(|to, _| all.contains(to));
            // Of those without a way one stands for all: what opens one opens the others as a rule.
            let is_over = |way: &Way| matches!(way, Way::None { tried } if tried.elapsed() >= TRY_AGAIN);
            let again = guarded.ways.iter().find(|(_, way)| is_over(way)).map(|(to, _)| *to);
            let new = all.iter().filter(|to| !guarded.ways.contains_key(to)).copied();
            let due: Vec<Ipv4Addr> = new.chain(again).collect();
            if due.is_empty() {
                continue;
            }
            let none = Way::None { tried: Instant::now() };
            let untried: Vec<_> = due.iter().map(|to| (*to, none)).collect();
            let found = move |to| if has_way(own, to) { Way::Found } else { none };
            let try_all = move || Ok(due.into_iter().map(|to| (to, found(to))).collect::<Vec<_>>());
            guarded.ways.extend(self.netns.run(&guarded.netns, try_all).await.unwrap_or(untried));
            if again.is_some_and(|to| guarded.ways.get(&to) == Some(&Way::Found)) {
                guarded.ways.retain(|_, way| *way == Way::Found);
            }
        }
    }

    /// Pods between which connections may go directly: those that are somebody, to which one wire leads, and from which all
    /// others can be reached.
    fn locals(&self, state: &State, facts: &Facts<'_>) -> Vec<Local> {
        let trust = self.trust.current();
        let now = Now { trust, at: facts.at.latest };
        let locals = state.guarded.values().filter(|g| g.open.is_none()).filter_map(|guarded| {
            let pod = guarded.identity.borrow().clone()?;
            // Two entries may give one identity.
            let is_current =
                |held: &&Held| state.credentials.get(&pod.workload.entry.id).is_some_and(|own| held.is_of(own));
            let held = state.direct.svids.get(pod.id()).and_then(|all| all.iter().rev().find(is_current));
            let open = !facts.denials.is_out()
                && !facts.denials.is_stale()
                && guarded.ways.values().all(|way| *way == Way::Found)
                && held.is_some_and(|held| {
                    held.shown.still(&now).is_ok() && !facts.denials.denies_presented(&held.presented)
                });
            let (identity, address) = (pod.workload.number.0, guarded.pod.address);
            Some(Local { address, identity, place: guarded.place?, open })
        });
        locals.collect()
    }

    /// Takes note of new SVIDs.
    fn remember_svids(&self, state: &mut State, facts: &Facts<'_>) -> Result<(), Refusal> {
        let State { credentials, direct, .. } = state;
        for credentials in credentials.values() {
            let held = direct.svids.entry(credentials.id.clone()).or_default();
            if held.iter().any(|held| held.is_of(credentials)) {
                continue;
            }
            let since = self.kernel.boot_time()?;
            let chain: Vec<_> = credentials.svid().chain_der.iter().cloned().map(CertificateDer::from).collect();
            let Some(presented) = Presented::of(&chain) else { continue };
            let shown = Shown::unverified(chain, Usage::Client, presented.not_after);
            held.push(Held { since, presented, shown, credentials: Arc::downgrade(credentials) });
            let surplus = held.len().saturating_sub(SVIDS_MAX);
            held.drain(..surplus);
        }
        direct.svids.retain(|id, _| facts.pods.values().any(|pod| pod.id() == id));
        Ok(())
    }
}

impl Known {
    /// Whether an open connection may go on: both ends are who they were, and neither they nor what they showed when it
    /// began is denied, and a policy allows it. An SVID that ran out does not end a connection that it began.
    fn permits(&self, flow: &Flow, facts: &Facts<'_>) -> bool {
        let end = |at: &Ipv4Addr, number: u32| {
            let pod = facts.pods.get(at).filter(|pod| pod.workload.number == NumericIdentity(number))?;
            let is_said = self.locals.iter().flatten().any(|l| l.address == *at && l.identity == number);
            is_said.then_some(pod)
        };
        let ends = (end(flow.from.ip(), flow.caller), end(flow.to.ip(), flow.called));
        let (Some(caller), Some(called)) = ends else { return false };
        let denied = |pod: &LocalPod| {
            let held = self.svids.get(pod.id()).into_iter().flatten();
            let began_under = held.filter(|held| held.since <= flow.opened).last();
            // Of what an agent before this one held nothing is known.
            began_under.map_or_else(
                || facts.denials.may_deny(pod.id()),
                |held| facts.denials.denies_presented(&held.presented),
            )
        };
        !facts.denials.ends_all()
            && !denied(caller)
            && !denied(called)
            && facts.view.rules.evaluate(caller.id(), called.id(), flow.to.port(), facts.at).allowed
    }

    /// Counts what began, and tells of what ended.
    fn tell(&self, direct: &Direct, facts: &Facts<'_>, seen: &Seen) {
        let names = names(&direct.flows, facts);
        let live = direct.flows.iter().filter(|flow| flow.closed.is_none()).count();
        METRICS.open.set(["direct"], live as f64);
        for flow in &direct.flows {
            let (Some(caller), Some(called)) = (names.get(&flow.caller), names.get(&flow.called)) else { continue };
            if direct.news.contains(&flow.opened) {
                let failed = flow.closed.is_some() && flow.ended == Ended::Unanswered;
                METRICS.connections.inc(["direct", if failed { "failed" } else { "ok" }]);
                if !failed {
                    seen.saw(seen::End::Calling, caller, called, flow.to.port(), true);
                }
                let verdict = facts.view.rules.evaluate(caller, called, flow.to.port(), facts.at);
                let (rule, reason) = if verdict.allowed { recent::words(&verdict) } else { Default::default() };
                seen.recent().note(Row {
                    id: id_of(flow),
                    place: Place::Direct,
                    at: facts.at.latest,
                    revision: facts.view.revision,
                    source: caller.clone(),
                    destination: Some(called.clone()),
                    to: flow.to.into(),
                    port: flow.to.port(),
                    allowed: true,
                    rule,
                    reason,
                    ended: OnceLock::new(),
                });
                if let Some(rule) = verdict.audited {
                    METRICS.audited.inc(["direct"]);
                    if let Some(left_out) = self.audited.next(Instant::now()) {
                        let port = flow.to.port();
                        tracing::info!(%rule, %caller, %called, port, left_out, "audited: a deny would refuse it");
                    }
                }
            }
            if let Some(closed) = flow.closed.filter(|closed| direct.news.contains(closed)) {
                let flags = match flow.ended {
                    Ended::InOrder => record::flag::NONE,
                    Ended::BrokenOff => record::flag::UPSTREAM_TERMINATED,
                    Ended::Unanswered => record::flag::UPSTREAM_FAILED,
                };
                let bytes = Some((flow.sent, flow.received));
                let took = closed.saturating_sub(flow.opened);
                record::direct(id_of(flow), caller, called, flow.to.into(), flags, bytes, took);
            }
        }
    }
}

/// The same whoever looks, and whenever.
fn id_of(flow: &Flow) -> Id {
    Id::of_kernel(&(flow.caller, flow.from, flow.called, flow.to, flow.opened))
}

/// In this thread's network namespace: whether what is sent there leaves under this address. Nothing is sent.
fn has_way(own: Ipv4Addr, to: Ipv4Addr) -> bool {
    let bound = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0));
    let source = bound.and_then(|socket| socket.connect((to, 9)).and_then(|()| socket.local_addr()));
    source.is_ok_and(|source| source.ip() == own)
}

/// The names behind the numbers in these connections, as far as they are known here.
fn names(flows: &[Flow], facts: &Facts<'_>) -> BTreeMap<u32, SpiffeId> {
    let numbers: BTreeSet<u32> = flows.iter().flat_map(|flow| [flow.caller, flow.called]).collect();
    if numbers.is_empty() {
        return BTreeMap::new();
    }
    let of_view = facts.view.numbers.iter().map(|(id, number)| (number.0, id.clone()));
    let of_pods = facts.pods.values().map(|pod| (pod.workload.number.0, pod.id().clone()));
    of_view.chain(of_pods).filter(|(number, _)| numbers.contains(number)).collect()
}
