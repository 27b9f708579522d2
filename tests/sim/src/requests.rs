//! Requests under way: those who wait at a replica, those sent on to the leader, and the clients who ask.

use crate::client::{Asker, Op, OpId, Wish};
use crate::host::{Condition, Forwarded, Host, Process, Proposal, Reading, Step};
use crate::oracle::Violation;
use crate::plan::{MS, Micros, SECOND};
use crate::queue::Event;
use crate::world::{DEADLINE, THINK_MAX, World};
use ambit_model::Stamp;
use ambit_state::{Applied, Command, LogEntry};
use ambitd::raft::engine::Request;
use tokio::sync::oneshot::error::TryRecvError;

/// Tries of a client before it gives up; what became of the request then is open for ever.
const TRIES_MAX: u32 = 12;

impl World {
    /// Those who wait at a replica.
    pub(crate) fn attend(&mut self, id: u64) -> Result<(), Violation> {
        self.proposals(id)?;
        self.reads(id)?;
        self.forwarded_answers(id);
        self.peering(id)
    }

    fn process(&mut self, id: u64) -> Option<(u64, &mut Process)> {
        let host = self.hosts.get_mut(&id)?;
        Some((host.life, host.process.as_mut()?))
    }

    fn proposals(&mut self, id: u64) -> Result<(), Violation> {
        let now = self.now;
        let Some((life, process)) = self.process(id) else { return Ok(()) };
        if process.proposals.is_empty() {
            return Ok(());
        }
        let status = process.status();
        let (mut done, mut forward) = (Vec::new(), Vec::new());
        let mut proposals = std::mem::take(&mut process.proposals);
        proposals.retain_mut(|proposal| match advance(proposal, process, &status, now) {
            Progress::Waits => true,
            Progress::Forward(to) => {
                forward.push((to, proposal.op, proposal.entry.clone()));
                true
            }
            Progress::Done(outcome) => {
                done.push((proposal.op, outcome));
                false
            }
        });
        process.proposals = proposals;
        for (to, op, entry) in forward {
            for arrives in self.network.arrivals(id, to, now) {
                let entry = Box::new(entry.clone());
                self.at(arrives, Event::Forward { to, from: id, life, op, entry });
            }
        }
        for (op, outcome) in done {
            if let Some(applied) = &outcome {
                self.history.acknowledged(op, applied.index.0, &applied.outcome)?;
            }
            match (op.asker, outcome) {
                (Asker::Client(_), Some(_)) => self.finished(op),
                (Asker::Client(_), None) => self.failed(op),
                (Asker::Replica(_), outcome) => self.own_done(id, op, outcome.map(|applied| applied.outcome)),
            }
        }
        Ok(())
    }

    fn reads(&mut self, id: u64) -> Result<(), Violation> {
        let now = self.now;
        let Some((_, process)) = self.process(id) else { return Ok(()) };
        let (mut read, applied) = (Vec::new(), process.applied());
        process.reads.retain_mut(|reading| match reading.answer.try_recv() {
            Ok(_) => {
                read.push((reading.op, true));
                false
            }
            Err(TryRecvError::Empty) if now < reading.deadline => true,
            Err(_) => {
                read.push((reading.op, false));
                false
            }
        });
        for (op, answered) in read {
            if !answered {
                self.failed(op);
                continue;
            }
            if let Some(Wish::Read { after }) = self.wish(op) {
                self.history.read(id, after, applied)?;
                self.tally.reads += 1;
            }
            self.finished(op);
        }
        Ok(())
    }

    fn forwarded_answers(&mut self, id: u64) {
        let now = self.now;
        let Some((_, process)) = self.process(id) else { return };
        let mut answers = Vec::new();
        process.forwarded.retain_mut(|waiting| match waiting.answer.try_recv() {
            Ok(outcome) => {
                answers.push((waiting.from, waiting.life, waiting.op, outcome.map_err(drop)));
                false
            }
            Err(TryRecvError::Empty) => true,
            Err(_) => false,
        });
        for (to, life, op, outcome) in answers {
            for arrives in self.network.arrivals(id, to, now) {
                self.at(arrives, Event::Answer { to, life, op, outcome });
            }
        }
    }

    pub(crate) fn forwarded(&mut self, to: u64, from: u64, life: u64, op: OpId, entry: Box<LogEntry>) {
        let (tell, answer) = tokio::sync::oneshot::channel();
        let Some(process) = self.hosts.get_mut(&to).and_then(|host| host.process.as_mut()) else { return };
        process.forwarded.push(Forwarded { from, life, op, answer });
        self.give(to, Request::Propose(entry, tell));
    }

    pub(crate) fn answered(&mut self, to: u64, life: u64, op: OpId, outcome: Result<u64, ()>) {
        let now = self.now;
        let Some(host) = self.hosts.get_mut(&to).filter(|host| host.life == life) else { return };
        let Some(process) = &mut host.process else { return };
        for proposal in process.proposals.iter_mut().filter(|p| p.op == op) {
            if matches!(proposal.step, Step::Remote { .. }) {
                proposal.step = match outcome {
                    Ok(term) => Step::Appended { term, until: now + SECOND },
                    Err(()) => Step::Later { until: now + 25 * MS },
                };
            }
        }
    }

    fn wish(&self, op: OpId) -> Option<Wish> {
        let Asker::Client(n) = op.asker else { return None };
        let known = self.clients.get(n)?.op.as_ref().filter(|known| known.id == op)?;
        Some(known.wish.clone())
    }

    fn finished(&mut self, op: OpId) {
        let Asker::Client(n) = op.asker else { return };
        let Some(client) = self.clients.get_mut(n) else { return };
        if client.op.as_ref().is_some_and(|known| known.id == op) {
            client.op = None;
            let think = self.dice.below(THINK_MAX);
            self.at(self.now + think, Event::Client(n));
        }
    }

    /// Unavailable, or the connection broke: the client asks again elsewhere, under the same id.
    pub(crate) fn failed(&mut self, op: OpId) {
        let again = self.now + self.dice.between(10 * MS, 100 * MS);
        let Asker::Client(n) = op.asker else { return };
        if self.clients.get(n).is_some_and(|c| c.op.as_ref().is_some_and(|known| known.id == op)) {
            self.at(again, Event::Client(n));
        }
    }

    /// A client begins, or asks again.
    pub(crate) fn client(&mut self, n: usize) -> Result<(), Violation> {
        // Whoever was taken out is no longer among the addresses that clients hold.
        let here = |h: &&Host| h.process.is_some() && h.condition == Condition::Up;
        let up: Vec<u64> = self.hosts.values().filter(here).map(|h| h.id).collect();
        let Some(at) = self.dice.pick(&up).copied() else {
            self.at(self.now + 50 * MS, Event::Client(n));
            return Ok(());
        };
        let Some(client) = self.clients.get_mut(n) else { return Ok(()) };
        if client.op.is_none() {
            if self.quiet {
                return Ok(());
            }
            client.made += 1;
            let id = OpId { asker: Asker::Client(n), number: client.made };
            let wish = match self.dice.below(4) {
                0 => Wish::Read { after: self.history.newest_acknowledged },
                _ => {
                    let Some(process) = self.hosts.get(&at).and_then(|host| host.process.as_ref()) else {
                        return Ok(());
                    };
                    let state = process.shared.state.read().unwrap_or_else(std::sync::PoisonError::into_inner);
                    let command = self.load.command(&mut self.dice, &state);
                    Wish::Write(Box::new(command.map_err(|r| Violation::of("sim", r.to_string()))?))
                }
            };
            client.op = Some(Op { id, wish, tries: 0, at: (at, 0) });
        }
        self.ask(n, at)
    }

    /// A request enters the cell at a replica.
    pub(crate) fn propose(&mut self, at: u64, op: OpId, command: Command) {
        let deadline = self.now + DEADLINE;
        let Some(host) = self.hosts.get_mut(&at) else { return };
        let Some(process) = &mut host.process else { return };
        let (client, request) = (op.identity(), op.request());
        let entry = LogEntry { stamp: Stamp(0), client, request, command };
        let ticket = process.shared.wait_for((client, request, entry.command_sha256()));
        process.proposals.push(Proposal { op, entry, ticket, deadline, step: Step::Ask });
        let at_once = self.now.max(host.busy_until).max(host.paused_until);
        self.wake(at, at_once);
    }

    fn ask(&mut self, n: usize, at: u64) -> Result<(), Violation> {
        let Some(client) = self.clients.get_mut(n) else { return Ok(()) };
        let Some(op) = &mut client.op else { return Ok(()) };
        op.tries += 1;
        if op.tries > TRIES_MAX && !self.calm {
            client.op = None;
            self.at(self.now + THINK_MAX, Event::Client(n));
            return Ok(());
        }
        let Some(host) = self.hosts.get_mut(&at) else { return Ok(()) };
        op.at = (at, host.life);
        let (id, wish) = (op.id, op.wish.clone());
        let Some(process) = &mut host.process else { return Ok(()) };
        match wish {
            Wish::Write(command) => {
                self.propose(at, id, *command);
            }
            Wish::Read { .. } => {
                let (tell, answer) = tokio::sync::oneshot::channel();
                process.reads.push(Reading { op: id, answer, deadline: self.now + DEADLINE });
                self.give(at, Request::Read(tell));
            }
        }
        Ok(())
    }
}

enum Progress {
    Waits,
    Forward(u64),
    /// None where it is to be asked again.
    Done(Option<Box<Applied>>),
}

/// One step of `raft::Cell::propose`, by the virtual clock.
fn advance(proposal: &mut Proposal, process: &mut Process, status: &ambitd::raft::Status, now: Micros) -> Progress {
    if let Ok(applied) = proposal.ticket.receiver.try_recv() {
        return Progress::Done(Some(Box::new(applied)));
    }
    if now >= proposal.deadline {
        return Progress::Done(None);
    }
    let later = Step::Later { until: now + 25 * MS };
    match &mut proposal.step {
        Step::Later { until } | Step::Remote { until } if now < *until => Progress::Waits,
        Step::Remote { .. } => {
            proposal.step = later;
            Progress::Waits
        }
        Step::Appended { term, until } if now < *until && status.term <= *term => Progress::Waits,
        Step::Asked(answer) => {
            match answer.try_recv() {
                Ok(Ok(term)) => proposal.step = Step::Appended { term, until: now + SECOND },
                Ok(Err(ambitd::raft::core::Rejected::NotLeader(_))) => proposal.step = later,
                Err(TryRecvError::Empty) => {}
                Ok(Err(_)) | Err(_) => return Progress::Done(None),
            }
            Progress::Waits
        }
        Step::Ask | Step::Later { .. } | Step::Appended { .. } => match status.leader {
            Some(leader) if leader == status.id => {
                let (tell, answer) = tokio::sync::oneshot::channel();
                if !process.push(Request::Propose(Box::new(proposal.entry.clone()), tell)) {
                    return Progress::Done(None);
                }
                proposal.step = Step::Asked(answer);
                Progress::Waits
            }
            Some(leader) => {
                proposal.step = Step::Remote { until: now + 2 * SECOND };
                Progress::Forward(leader.0)
            }
            None => {
                proposal.step = later;
                Progress::Waits
            }
        },
    }
}
