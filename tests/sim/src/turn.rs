//! One turn of a replica: what came in, what is due, what it writes, sends and shows.

use crate::oracle::{View, Violation};
use crate::plan::MS;
use crate::plan::{Micros, SECOND};
use crate::queue::Event;
use crate::world::World;
use ambit_model::Stamp;
use ambit_state::{Command, LogEntry};
use ambitd::raft::engine::Request;
use bytes::Bytes;
use std::collections::BTreeMap;

/// A run of the replica without a sync takes this long.
const RUN: Micros = 20;
/// From a lost frame to the news that its stream is broken.
const STREAM_BREAKS: Micros = 200 * MS;
/// Requests taken in before the next append, as in the driver.
const BATCH_MAX: usize = 1024;

impl World {
    pub(crate) fn run(&mut self, id: u64) -> Result<(), Violation> {
        let Some(host) = self.hosts.get_mut(&id) else { return Ok(()) };
        if host.run_at != Some(self.now) {
            return Ok(());
        }
        host.run_at = None;
        let free = host.busy_until.max(host.paused_until);
        if free > self.now {
            self.wake(id, free);
            return Ok(());
        }
        let Some(process) = &mut host.process else { return Ok(()) };
        let (clock, counted) = (host.clock.read(self.now), host.clock.counted(self.now));
        for _ in 0..BATCH_MAX {
            let Some(request) = process.inbox.pop_front() else { break };
            process.engine.take(request, clock);
        }
        process.tick(counted);
        if counted >= process.next_second {
            process.next_second = counted + SECOND;
            if process.leads() {
                let tick = LogEntry { stamp: Stamp(0), client: [0; 32], request: [0; 16], command: Command::Tick };
                process.engine.take(Request::Propose(Box::new(tick), tokio::sync::oneshot::channel().0), clock);
            }
        }
        process.engine.housekeeping(clock);
        let (syncs_before, disk) = (host.disk.syncs(), host.disk.clone());
        let mut sent = Vec::new();
        let outcome = process.engine.work(clock, &mut |messages| {
            let after = disk.syncs() - syncs_before;
            sent.extend(messages.into_iter().map(|message| (after, message)));
        });
        let sync = self.dice.between(100, self.plan.sync_max.max(101));
        let sync = if self.calm { 100 } else { sync };
        host.busy_until = self.now + RUN + (disk.syncs() - syncs_before) * sync;
        let (incarnation, next_tick) = (process.shared.incarnation, self.now + crate::host::TICK);
        let pressed = process.engine.is_pressed() || !process.inbox.is_empty();
        let again = if pressed { host.busy_until } else { next_tick.max(host.busy_until) };
        self.send((id, incarnation, clock.wall), sync, sent);
        self.look(id)?;
        if outcome.is_err() || disk.is_dead() {
            if let Err(fatal) = &outcome
                && !disk.is_dead()
            {
                return Err(Violation::of("L1", format!("replica {id} cannot go on: {fatal}")));
            }
            self.tally.disk_faults += 1;
            self.crash(id);
            return Ok(());
        }
        self.attend(id)?;
        self.wake(id, again);
        // Whoever waited may have asked for more at once.
        if let Some(host) = self.hosts.get(&id)
            && host.process.as_ref().is_some_and(|p| !p.inbox.is_empty())
        {
            self.wake(id, host.busy_until);
        }
        Ok(())
    }

    /// Messages to one peer that leave together travel in one frame; what waits for the disk leaves after its syncs.
    fn send(
        &mut self,
        (from, incarnation, clock): (u64, u64, Stamp),
        sync: Micros,
        sent: Vec<(u64, ambitd::raft::core::Outgoing)>,
    ) {
        let mut frames: BTreeMap<(u64, u64), (Vec<Bytes>, bool)> = BTreeMap::new();
        for (after, message) in sent {
            let (messages, snapshot) = frames.entry((after, message.to)).or_default();
            messages.push(message.bytes.into());
            *snapshot |= message.snapshot;
        }
        for ((after, to), (messages, snapshot)) in frames {
            let leaves = self.now + RUN + after * sync;
            let arrivals = self.network.arrivals(from, to, leaves);
            if arrivals.is_empty() && snapshot {
                // The courier's stream breaks where a frame is lost, and it says that a snapshot may have been among them.
                self.at(leaves + STREAM_BREAKS, Event::SnapshotLost { from, to });
            }
            for arrives in arrivals {
                let messages = messages.clone();
                self.at(arrives, Event::Frame { to, from, incarnation, clock, messages });
            }
        }
    }

    /// The oracle sees what a replica applied and shows.
    pub(crate) fn look(&mut self, id: u64) -> Result<(), Violation> {
        let Some(process) = self.hosts.get_mut(&id).and_then(|host| host.process.as_mut()) else { return Ok(()) };
        let applied = process.applied();
        // A replica that joins a cell which began anew leaps over what was before.
        let first = process.seen.max(self.history.first()) + 1;
        for index in first..=applied {
            // What is no more in the log came by a snapshot, or was applied and compacted at once.
            if let Some((term, command)) = process.engine.log().command(index) {
                self.history.applied(id, index, term, command, self.now)?;
            }
        }
        process.seen = applied;
        let (term, leads) = (process.current_term(), process.leads());
        let is_new = std::mem::replace(&mut process.term, term) != term;
        let digest = process.shared.state.read().map(|state| state.digest()).unwrap_or_default();
        let leads_in = leads.then_some(term);
        if let Some(term) = leads_in
            && term > self.terms
        {
            self.terms = term;
            self.tally.elections += 1;
        }
        if is_new {
            self.new_term(id);
        }
        let shown = self.history.shows(&View { host: id, applied, digest, leads_in });
        if shown.is_err()
            && let Some(process) = self.hosts.get(&id).and_then(|host| host.process.as_ref())
            && let Ok(state) = process.shared.state.read()
        {
            self.say(|| format!("replica {id}'s state: {}", self.history.difference(&state)));
        }
        shown
    }
}
