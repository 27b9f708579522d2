//! A cell's part in peering: its leader pulls from other cells, and its replicas answer theirs, as `replica::upkeep` and the
//! peer link do. What is asked, answered and believed is decided by `ambitd::replica::pull`.

use crate::client::{Asker, OpId};
use crate::cosigning::{Judging, Serve, Serving};
use crate::host::Condition;
use crate::oracle::{Lie, Violation, judge_answer};
use crate::plan::{MS, Micros};
use crate::world::{DEADLINE, World};
use ambit_model::{Code, Refusal, TrustDomain};
use ambit_state::objects::PeerState;
use ambit_state::{Command, Reply};
use ambitd::raft::engine::Request;
use ambitd::replica::cosign::Floors;
use ambitd::replica::pull::{self, Answer, Ask, Heard, Untaken};
use std::collections::BTreeMap;
use std::sync::PoisonError;
use std::time::{Duration, Instant};
use tokio::sync::oneshot;

/// How often a leader looks whom to pull from.
const LOOK_EVERY: Micros = 100 * MS;
/// A connection that is refused says so within this.
const REFUSED_AFTER: Micros = MS;

/// Where an answer is waited for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Back {
    host: u64,
    life: u64,
    pull: u64,
}

/// From cell to cell.
#[derive(Clone, Debug)]
pub(crate) struct Letter {
    pub(crate) from: TrustDomain,
    pub(crate) to: TrustDomain,
    pub(crate) body: Body,
}

#[derive(Clone, Debug)]
pub(crate) enum Body {
    /// `at` counts through the addresses of the asked.
    Ask { back: Back, at: usize, after: u64, nonce: [u8; 16], limit: u32 },
    /// What the receiver cannot know: whether it is a lie.
    Answer { back: Back, answer: Result<Answer, Refusal>, lie: Option<Lie> },
}

/// A replica's memory of its peers: gone with the process.
#[derive(Default)]
pub(crate) struct Peers {
    pulls: BTreeMap<TrustDomain, Pull>,
    pub(crate) serving: Vec<Serving>,
    pub(crate) judging: Vec<Judging>,
    pub(crate) floors: Floors,
    look_at: Micros,
    pub(crate) heard: Heard,
}

struct Pull {
    number: u64,
    /// Which address is asked next.
    at: usize,
    step: Step,
}

enum Step {
    Rest { until: Micros },
    Asked { ask: Box<Ask>, sent: Instant, until: Micros },
    Importing { op: OpId, sent: Instant, is_the_end: bool },
    Stopping { op: OpId },
}

pub(crate) fn micros(of: Duration) -> Micros {
    u64::try_from(of.as_micros()).unwrap_or(u64::MAX)
}

pub(crate) fn away(found: &str) -> Refusal {
    Refusal::new(Code::Unavailable, "an answer from the peer", found)
}

impl World {
    pub(crate) fn post(&mut self, to: &TrustDomain, leaves: Micros, body: Body) {
        self.outbox.push((leaves, Letter { from: self.cell.clone(), to: to.clone(), body }));
    }

    /// A letter from another cell arrived.
    pub(crate) fn letter(&mut self, letter: Letter) -> Result<(), Violation> {
        match letter.body {
            Body::Ask { back, at, after, nonce, limit } => {
                self.own_requests += 1;
                let (to, number) = (letter.from.clone(), self.own_requests);
                let serving = |step| Serving { to, back, after, nonce, limit, number, step };
                let inside = |c: Condition| matches!(c, Condition::Up | Condition::Down);
                let all: Vec<u64> = self.hosts.values().filter(|h| inside(h.condition)).map(|h| h.id).collect();
                let asked = all.get(at % all.len().max(1)).and_then(|id| self.hosts.get_mut(id));
                let Some((id, process)) = asked.and_then(|host| Some((host.id, host.process.as_mut()?))) else {
                    let refused = Body::Answer { back, answer: Err(away("a refused connection")), lie: None };
                    self.post(&letter.from, self.now + REFUSED_AFTER, refused);
                    return Ok(());
                };
                let (tell, answer) = oneshot::channel();
                let until = self.now + DEADLINE;
                process.peers.serving.push(serving(Serve::Barrier { answer, until }));
                self.give(id, Request::Read(tell));
                Ok(())
            }
            Body::Answer { back, answer, lie } => self.pulled(&letter.from, back, answer, lie),
        }
    }

    /// One turn of a replica's chores towards its peers.
    pub(crate) fn peering(&mut self, id: u64) -> Result<(), Violation> {
        if !self.record_keys.is_empty() {
            self.serve(id)?;
            self.pull(id);
        }
        Ok(())
    }

    /// The leader pulls from every active peer, one pull at a time each.
    fn pull(&mut self, id: u64) {
        let now = self.now;
        let limit = self.plan.between.as_ref().map_or(pull::LIMIT, |b| b.pull_limit);
        let Some(host) = self.hosts.get_mut(&id) else { return };
        let (life, boot) = (host.life, host.clock.read(now).boot);
        let Some(process) = &mut host.process else { return };
        if !process.leads() {
            process.peers.pulls.clear();
            process.peers.look_at = 0;
            return;
        }
        let shared = process.shared.clone();
        let peers = &mut process.peers;
        let due = |step: &Step| match step {
            Step::Rest { until } | Step::Asked { until, .. } => now >= *until,
            Step::Importing { .. } | Step::Stopping { .. } => false,
        };
        if now < peers.look_at && !peers.pulls.values().any(|pull| due(&pull.step)) {
            return;
        }
        let state = shared.state.read().unwrap_or_else(PoisonError::into_inner);
        if now >= peers.look_at {
            peers.look_at = now + LOOK_EVERY;
            let is_active = |td: &TrustDomain| state.peer(td).is_some_and(|p| p.state == PeerState::Active);
            peers.pulls.retain(|td, _| is_active(td));
            for (td, _) in state.peers().filter(|(td, _)| is_active(td)) {
                let begin = || Pull { number: 0, at: 0, step: Step::Rest { until: now } };
                peers.pulls.entry(td.clone()).or_insert_with(begin);
            }
        }
        let mut letters = Vec::new();
        for (td, pull) in peers.pulls.iter_mut().filter(|(_, pull)| due(&pull.step)) {
            if matches!(pull.step, Step::Asked { .. }) {
                pull.at += 1;
                pull.step = Step::Rest { until: now + micros(pull::RETRY) };
                continue;
            }
            self.own_requests += 1;
            pull.number = self.own_requests;
            let Some(ask) = Ask::new(&state, td.clone(), self.dice.bytes(), limit) else { continue };
            let back = Back { host: id, life, pull: pull.number };
            let body = Body::Ask { back, at: pull.at, after: ask.after_seq(), nonce: ask.nonce(), limit: ask.limit() };
            pull.step = Step::Asked { ask: Box::new(ask), sent: boot, until: now + micros(pull::TIMEOUT) };
            letters.push((td.clone(), body));
        }
        drop(state);
        for (to, body) in letters {
            self.post(&to, now, body);
        }
    }

    fn pull_of(&mut self, id: u64, td: &TrustDomain) -> Option<&mut Pull> {
        self.hosts.get_mut(&id)?.process.as_mut()?.peers.pulls.get_mut(td)
    }

    /// An answer came back: it is verified, and what is new is proposed.
    fn pulled(
        &mut self,
        td: &TrustDomain,
        back: Back,
        answer: Result<Answer, Refusal>,
        lie: Option<Lie>,
    ) -> Result<(), Violation> {
        if self.hosts.get(&back.host).is_none_or(|host| host.life != back.life) {
            return Ok(());
        }
        let now = self.now;
        let Some(pull) = self.pull_of(back.host, td).filter(|pull| pull.number == back.pull) else { return Ok(()) };
        let Step::Asked { ask, sent, .. } = &pull.step else { return Ok(()) };
        let sent = *sent;
        let verified = answer.map_err(Untaken::Answer).and_then(|answer| ask.verify(&answer));
        self.tally.pulls += 1;
        if let Some(lie) = lie {
            self.tally.lies += 1;
            self.say(|| format!("replica {} is told a lie of {td}: {lie:?}: {:?}", back.host, verified.as_ref().err()));
        }
        judge_answer(td, lie, verified.as_ref().err().map(|r| (r.refusal(), pull::stop(td, r).is_some())))?;
        let mut batch = match verified {
            Ok(batch) => batch,
            Err(untaken) => {
                self.pull_failed(back.host, td, &untaken);
                return Ok(());
            }
        };
        if let Some(learned) = batch.learned() {
            // What came along comes again.
            let op = self.own(back.host, learned);
            if let Some(pull) = self.pull_of(back.host, td) {
                pull.step = Step::Importing { op, sent, is_the_end: false };
            }
            self.wake(back.host, now);
            return Ok(());
        }
        let is_the_end = batch.is_the_end();
        match batch.into_import() {
            Some(import) => {
                let op = self.own(back.host, import);
                if let Some(pull) = self.pull_of(back.host, td) {
                    pull.step = Step::Importing { op, sent, is_the_end };
                }
            }
            None => self.pull_succeeded(back.host, td, is_the_end.then_some(sent)),
        }
        self.wake(back.host, now);
        Ok(())
    }

    /// A replica commits something on its own account.
    fn own(&mut self, id: u64, command: Command) -> OpId {
        self.own_requests += 1;
        let op = OpId { asker: Asker::Replica(id), number: self.own_requests };
        self.propose(id, op, command);
        op
    }

    /// What a replica committed on its own account was answered; none where it is not known what became of it.
    pub(crate) fn own_done(&mut self, id: u64, op: OpId, outcome: Option<Result<Reply, Refusal>>) {
        let Some(process) = self.hosts.get_mut(&id).and_then(|host| host.process.as_mut()) else { return };
        let waits = |pull: &Pull| match pull.step {
            Step::Importing { op: waits, .. } | Step::Stopping { op: waits } => waits == op,
            Step::Rest { .. } | Step::Asked { .. } => false,
        };
        let found = process.peers.pulls.iter().find(|(_, pull)| waits(pull));
        let Some((td, step)) = found.map(|(td, pull)| (td.clone(), &pull.step)) else { return };
        match (step, outcome) {
            (Step::Importing { sent, is_the_end, .. }, Some(Ok(_))) => {
                let sent = is_the_end.then_some(*sent);
                self.tally.imports += 1;
                self.pull_succeeded(id, &td, sent);
            }
            (Step::Importing { .. }, Some(Err(refusal))) => self.pull_failed(id, &td, &Untaken::Origin(refusal)),
            (Step::Importing { .. }, None) => self.pull_failed(id, &td, &Untaken::Answer(away("silence"))),
            // It is looked at again whether the peer is active still.
            _ => drop(process.peers.pulls.remove(&td)),
        }
    }

    fn pull_succeeded(&mut self, id: u64, td: &TrustDomain, sent: Option<Instant>) {
        let now = self.now;
        let Some(process) = self.hosts.get_mut(&id).and_then(|host| host.process.as_mut()) else { return };
        if let Some(sent) = sent {
            process.peers.heard.note(td, sent);
        }
        if let Some(pull) = process.peers.pulls.get_mut(td) {
            pull.step = Step::Rest { until: now };
        }
        self.wake(id, now);
    }

    fn pull_failed(&mut self, id: u64, td: &TrustDomain, untaken: &Untaken) {
        let rest = Step::Rest { until: self.now + micros(pull::RETRY) };
        let step = match pull::stop(td, untaken) {
            Some(stop) => {
                self.say(|| format!("replica {id} stops the import from {td}: {}", untaken.refusal()));
                Step::Stopping { op: self.own(id, stop) }
            }
            None => rest,
        };
        if let Some(pull) = self.pull_of(id, td) {
            pull.at += 1;
            pull.step = step;
        }
    }

    /// The operator looked into what stopped the import from a peer, and lets it go on.
    pub(crate) fn approve_stopped(&mut self) {
        let Some(leader) = self.leader().map(|status| status.id.0) else { return };
        let Some(process) = self.hosts.get(&leader).and_then(|host| host.process.as_ref()) else { return };
        let shared = process.shared.clone();
        let state = shared.state.read().unwrap_or_else(PoisonError::into_inner);
        let stopped = state.peers().filter(|(_, p)| p.state == PeerState::Stopped);
        let all: Vec<Command> = stopped.map(|(td, p)| Command::ApprovePeer(td.clone(), p.fingerprint)).collect();
        drop(state);
        for approve in all {
            self.own(leader, approve);
        }
    }
}
