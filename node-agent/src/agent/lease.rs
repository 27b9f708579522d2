//! Until when the kernel goes on judging: for a minute from the agent's last word, and no longer than the cell's last word is
//! good for. What the kernel refuses is told here too.

use super::Cell;
use crate::clock::Clock;
use crate::denials::Lane;
use crate::kernel::KernelHandle;
use crate::metrics::METRICS;
use crate::recent::{self, Id, ROWS_MAX};
use crate::seen::{End, Seen};
use crate::staleness::{FailMode, LEASE, Staleness, Worth};
use crate::view::View;
use ambit_ebpf::Reason;
use ambit_model::{Refusal, SpiffeId};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// How often the lease is renewed: of a minute's, sixty renewals may be lost.
const LEASE_EVERY: Duration = Duration::from_secs(1);
/// Closed flows that no agent took only come from agents that died.
const SWEEP_EVERY: u32 = 60;
/// The same for clients of which no workload was told: those are of seconds.
const CLIENTS_EVERY: u32 = 5;
/// Refusals of the kernel are told to the log this often.
const EVENTS_EVERY: Duration = Duration::from_secs(1);

/// Until when the kernel judges, and what it tells.
pub(super) struct Lease {
    kernel: KernelHandle,
    clock: Arc<Clock>,
    denials: Lane,
    rule: Staleness,
    desired: watch::Receiver<Option<Arc<View>>>,
    seen: Seen,
}

impl Lease {
    pub(super) fn new(kernel: &KernelHandle, cell: &Cell, rule: Staleness) -> Self {
        kernel.set_strict(rule.mode == FailMode::Strict);
        let (clock, denials, desired) = (cell.clock.clone(), cell.denials.clone(), cell.desired.clone());
        Self { kernel: kernel.clone(), clock, denials, rule, desired, seen: cell.seen.clone() }
    }

    /// Lets the kernel, and whoever carries, go on for as long as the cell's word is good.
    pub(super) fn keep(&self) -> Result<(), Refusal> {
        let age = self.clock.age();
        let Some(length) = self.rule.lease(age) else { return self.kernel.shorten_lease(LEASE) };
        // What an agent that was succeeded carries ends with its drain.
        if !self.kernel.renew_lease(length)? {
            return Ok(());
        }
        let worth = self.rule.worth(age);
        if self.denials.set_worth(worth) {
            let (mode, after_s) = (self.rule.mode, self.rule.after.0.as_secs());
            match worth {
                Worth::All => tracing::info!(%mode, "the cell is heard again: connections begin"),
                Worth::Open => {
                    tracing::error!(%mode, after_s, "the cell was not heard for too long: no connection begins")
                }
                Worth::Nothing => {
                    tracing::error!(%mode, after_s, "the cell was not heard for too long: connections end")
                }
            }
        }
        Ok(())
    }

    /// Tells refusals to the log meanwhile. A kernel that cannot be told is a reason to end: the lease then runs out.
    pub(super) async fn watch(mut self) -> Refusal {
        let (mut lease, mut events) = (tokio::time::interval(LEASE_EVERY), tokio::time::interval(EVENTS_EVERY));
        let mut renewals = 0u32;
        loop {
            let done = tokio::select! {
                _ = lease.tick() => {
                    renewals = renewals.wrapping_add(1);
                    let due = renewals.is_multiple_of(SWEEP_EVERY);
                    let swept = if due { self.kernel.sweep().map(|_| ()) } else { Ok(()) };
                    let swept = if renewals.is_multiple_of(CLIENTS_EVERY) {
                        swept.and_then(|()| self.kernel.sweep_clients())
                    } else {
                        swept
                    };
                    swept.and_then(|()| self.keep())
                }
                // After a start nothing is judged before the first slice, and then at once.
                Ok(()) = self.desired.changed() => self.keep(),
                _ = events.tick() => self.tell_refusals(),
            };
            if let Err(refusal) = done {
                METRICS.component.set(["kernel"], 0.0);
                return refusal;
            }
        }
    }

    /// What the kernel refused since the last look: to the log, and of policy to the cell.
    fn tell_refusals(&self) -> Result<(), Refusal> {
        let (mut by_policy, mut of_workloads) = (BTreeMap::<_, u64>::new(), VecDeque::new());
        self.kernel.events(&mut |event| {
            let reason = recent::reason_of(&event);
            // Of who is nobody here nothing is remembered.
            let id = (event.source != 0).then(|| Id::of_kernel(&event));
            let shown = id.map(tracing::field::display);
            tracing::debug!(reason, from = ?event.from, to = %event.address, cgroup = event.cgroup, id = shown, "refused");
            if matches!(event.reason, Reason::NoVerdict | Reason::PolicyDeny) {
                *by_policy.entry((event.source, event.destination, event.address.port())).or_default() += 1;
            }
            if let Some(id) = id.filter(|_| event.reason != Reason::Allowed) {
                of_workloads.push_back((id, event));
                if of_workloads.len() > ROWS_MAX {
                    of_workloads.pop_front();
                }
            }
        })?;
        let Some(view) = self.desired.borrow().clone().filter(|_| !of_workloads.is_empty()) else { return Ok(()) };
        let asked: BTreeSet<u32> =
            of_workloads.iter().flat_map(|(_, event)| [event.source, event.destination]).collect();
        let named = view.numbers.iter().filter(|(_, number)| asked.contains(&number.0));
        let named: BTreeMap<u32, &SpiffeId> = named.map(|(id, number)| (number.0, id)).collect();
        let (since_boot, now) = (self.kernel.boot_time()?, self.clock.moment());
        for (id, event) in &of_workloads {
            if let Some(source) = named.get(&event.source) {
                let ends = (*source, named.get(&event.destination).copied());
                self.seen.recent().note(recent::refused(*id, event, ends, &view, (now, since_boot)));
            }
        }
        for ((source, destination, port), times) in &by_policy {
            if let (Some(source), Some(destination)) = (named.get(source), named.get(destination)) {
                self.seen.saw_many(End::Calling, source, destination, (*port, false), *times);
            }
        }
        Ok(())
    }
}
