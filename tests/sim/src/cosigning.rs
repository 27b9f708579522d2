//! Answers to other cells' pulls, and how the replicas of a cell sign them: as `replica::cosign` does it over the network. What
//! is signed and what is enough is decided there, and by `replica::pull`.
//!
//! One replica of a cell may be a thief's: it asks the others to sign what nobody decided, or hides what was, and tells it
//! whatever they say.

use crate::host::Condition;
use crate::oracle::{Lie, Violation};
use crate::peering::{Back, Body, away, micros};
use crate::plan::Micros;
use crate::world::{DEADLINE, World};
use ambit_identity::majority::{majority, signers};
use ambit_identity::record::Listed;
use ambit_identity::{CoSignature, RecordKey};
use ambit_model::record::{Claim, Head, Kind, Record};
use ambit_model::{Refusal, TrustDomain};
use ambit_state::State;
use ambitd::raft::engine::Request;
use ambitd::replica::cosign::{Verdict, judge};
use ambitd::replica::pull::{self, Answer, Page};
use std::collections::BTreeSet;
use std::rc::Rc;
use std::sync::PoisonError;
use tokio::sync::oneshot;
use tokio::sync::oneshot::error::TryRecvError;

/// As in production.
const ROUNDS: usize = 3;
const ANSWER_MAX: Micros = crate::plan::SECOND;

/// A pull that is being answered.
pub(crate) struct Serving {
    pub(crate) to: TrustDomain,
    pub(crate) back: Back,
    pub(crate) after: u64,
    pub(crate) nonce: [u8; 16],
    pub(crate) limit: u32,
    pub(crate) number: u64,
    pub(crate) step: Serve,
}

pub(crate) enum Serve {
    Barrier { answer: oneshot::Receiver<u64>, until: Micros },
    News { until: Micros },
    Signing(Box<Signing>),
}

/// What is to be told, and who signed it so far.
pub(crate) struct Signing {
    what: What,
    signatures: Vec<CoSignature>,
    waits: BTreeSet<u64>,
    floor: u64,
    rounds: usize,
    until: Micros,
}

enum What {
    Page(Page),
    Theft(Theft),
}

/// What the thief is about to tell.
struct Theft {
    lie: Lie,
    claim: Claim,
    voters: Vec<[u8; 32]>,
    answer: Answer,
}

/// A question between replicas: whose, and of which of its answers.
#[derive(Clone)]
pub(crate) struct Asked {
    from: u64,
    life: u64,
    number: u64,
    claim: Claim,
}

/// A voter's part, waiting for its quorum.
pub(crate) struct Judging {
    asked: Asked,
    answer: oneshot::Receiver<u64>,
    until: Micros,
}

/// What a voter said.
#[derive(Clone)]
pub(crate) struct Said {
    by: u64,
    life: u64,
    number: u64,
    outcome: Result<(Verdict, [u8; 32], Vec<u8>), Refusal>,
}

impl What {
    fn claim(&self) -> &Claim {
        match self {
            What::Page(page) => page.claim(),
            What::Theft(theft) => &theft.claim,
        }
    }
    fn named(&self, key: &[u8; 32], signature: Vec<u8>) -> Option<CoSignature> {
        match self {
            What::Page(page) => page.named(key, signature),
            What::Theft(theft) => {
                let at = theft.voters.iter().position(|voter| voter == key)?;
                Some(CoSignature { key_index: u32::try_from(at).ok()?, signature })
            }
        }
    }
    fn is_enough(&self, signatures: &[CoSignature]) -> bool {
        let (signed, wanted) = match self {
            What::Page(page) => page.count(signatures),
            What::Theft(theft) => {
                (signers(&theft.voters, &theft.claim.signed_bytes(), signatures), majority(theft.voters.len()))
            }
        };
        signed >= wanted
    }
}

impl Theft {
    /// Records that nobody decided, or silence on those that were.
    fn plan(state: &State, serving: &Serving, forges: bool) -> Option<Theft> {
        let cell = state.cell()?;
        let key_set = state.key_set_for(&[])?.clone();
        let mut records: Vec<Record> = Vec::new();
        let lie = if forges {
            records.extend(state.records_after(serving.after).take(serving.limit as usize).cloned());
            let end = records.last().map_or((cell.export_seq, cell.export_hash), |r| (r.seq, r.hash()));
            let forged = Record {
                origin: cell.trust_domain.clone(),
                epoch: cell.epoch,
                seq: end.0 + 1,
                prev_hash: end.1,
                kind: Kind::NodeDenial,
                key: hex::encode([0xfd; 32]),
                payload: vec![1],
            };
            records.push(forged);
            Lie::Stolen
        } else {
            Lie::Hidden
        };
        let hidden = state.records_after(serving.after).next().map(|next| (serving.after, next.prev_hash));
        let (seq, hash) = records.last().map(|r| (r.seq, r.hash())).or(hidden)?;
        let (origin, epoch) = (cell.trust_domain.clone(), cell.epoch);
        let head = Head { origin, epoch, seq, hash, stamp: state.stamp(), nonce: serving.nonce };
        let bytes = |what: &Record| postcard::to_stdvec(what).ok();
        let records = records.iter().map(bytes).collect::<Option<_>>()?;
        let claim = Claim { head, is_the_end: true };
        let answer = Answer {
            head: postcard::to_stdvec(&claim.head).ok()?,
            claim: postcard::to_stdvec(&claim).ok()?,
            signature: CoSignature { key_index: 0, signature: Vec::new() },
            signatures: Vec::new(),
            key_set,
            records,
        };
        let voters = Listed::read(&answer.key_set.statement)?.voters;
        Some(Theft { lie, claim, voters, answer })
    }
}

impl World {
    /// A replica's record key. Machines that came later have the key of one that went; after a new beginning all have one.
    pub(crate) fn key_of(&self, id: u64) -> Option<Rc<RecordKey>> {
        let at = if self.begun_anew { 0 } else { (id.saturating_sub(1) % 3) as usize };
        self.record_keys.get(at).cloned()
    }

    /// Whether a replica's keys were stolen, with all that it may ask: at most one key of a cell that has three.
    fn is_stolen(&self, id: u64) -> bool {
        let lies = self.plan.between.as_ref().is_some_and(|between| between.lies_per_mille > 0);
        lies && !self.calm && !self.begun_anew && id % 3 == 2
    }

    /// One turn of what a replica tells other cells.
    pub(crate) fn serve(&mut self, id: u64) -> Result<(), Violation> {
        let (now, Some(key)) = (self.now, self.key_of(id)) else { return Ok(()) };
        self.judge_asked(id, &key);
        let lies = self.plan.between.as_ref().map_or(0, |between| between.lies_per_mille);
        let is_stolen = self.is_stolen(id) && self.dice.per_mille(lies);
        let forges = is_stolen && self.dice.below(2) == 0;
        let Some(process) = self.hosts.get_mut(&id).and_then(|host| host.process.as_mut()) else { return Ok(()) };
        if process.peers.serving.is_empty() {
            return Ok(());
        }
        let mut all = std::mem::take(&mut process.peers.serving);
        let shared = process.shared.clone();
        let state = shared.state.read().unwrap_or_else(PoisonError::into_inner);
        let (mut ready, mut asks) = (Vec::new(), Vec::new());
        all.retain_mut(|serving| {
            if let Some(done) = waited(serving, now) {
                ready.push((serving.to.clone(), serving.back, Err(done), None));
                return false;
            }
            if let Serve::News { until } = serving.step
                && (now >= until || pull::has_news(&state, serving.after))
            {
                let theft = if is_stolen { Theft::plan(&state, serving, forges) } else { None };
                let what = theft.map(What::Theft).map_or_else(
                    || Page::read(&state, serving.after, serving.nonce, serving.limit, &[]).map(What::Page),
                    Ok,
                );
                match what {
                    Ok(what) => serving.step = Serve::Signing(Box::new(Signing::begin(what, &key, 1))),
                    Err(refusal) => {
                        ready.push((serving.to.clone(), serving.back, Err(refusal), None));
                        return false;
                    }
                }
            }
            let Serve::Signing(signing) = &mut serving.step else { return true };
            if signing.waits.is_empty() && signing.until == 0 {
                signing.until = now + ANSWER_MAX;
                asks.push((serving.number, signing.what.claim().clone()));
                return true;
            }
            let over = signing.waits.is_empty() || now >= signing.until;
            if !signing.what.is_enough(&signing.signatures) && !over {
                return true;
            }
            if let What::Page(_) = signing.what
                && !signing.what.is_enough(&signing.signatures)
                && signing.floor > 0
                && signing.rounds < ROUNDS
                && pull::has_news(&state, signing.floor - 1)
                && let Ok(page) = Page::read(&state, serving.after, serving.nonce, serving.limit, &[])
            {
                **signing = Signing::begin(What::Page(page), &key, signing.rounds + 1);
                signing.until = now + ANSWER_MAX;
                asks.push((serving.number, signing.what.claim().clone()));
                return true;
            }
            let signatures = std::mem::take(&mut signing.signatures);
            let (answer, lie) = match &mut signing.what {
                What::Page(page) => (page.clone().into_answer(&key, signatures), None),
                What::Theft(theft) => (Ok(Answer { signatures, ..theft.answer.clone() }), Some(theft.lie)),
            };
            ready.push((serving.to.clone(), serving.back, answer, lie));
            false
        });
        drop(state);
        process.peers.serving = all;
        for (number, claim) in asks {
            self.ask_others(id, number, claim);
        }
        for (to, back, answer, lie) in ready {
            self.post(&to, now, Body::Answer { back, answer, lie });
        }
        Ok(())
    }

    fn ask_others(&mut self, id: u64, number: u64, claim: Claim) {
        let inside = |c: Condition| matches!(c, Condition::Up | Condition::Down);
        let others: Vec<u64> =
            self.hosts.values().filter(|h| inside(h.condition) && h.id != id).map(|h| h.id).collect();
        let Some(host) = self.hosts.get_mut(&id) else { return };
        let life = host.life;
        let Some(process) = &mut host.process else { return };
        for serving in process.peers.serving.iter_mut().filter(|serving| serving.number == number) {
            if let Serve::Signing(signing) = &mut serving.step {
                signing.waits = others.iter().copied().collect();
            }
        }
        let asked = Asked { from: id, life, number, claim };
        for to in others {
            for arrives in self.network.arrivals(id, to, self.now) {
                self.at(arrives, crate::queue::Event::CoSign { to, asked: Box::new(asked.clone()) });
            }
        }
        self.wake(id, self.now);
    }

    /// Another replica of the cell wants a signature.
    pub(crate) fn asked_to_sign(&mut self, to: u64, asked: Asked) {
        let until = self.now + DEADLINE;
        let Some(process) = self.hosts.get_mut(&to).and_then(|host| host.process.as_mut()) else { return };
        let (tell, answer) = oneshot::channel();
        process.peers.judging.push(Judging { asked, answer, until });
        self.give(to, Request::Read(tell));
    }

    fn judge_asked(&mut self, id: u64, key: &RecordKey) {
        let now = self.now;
        let Some(process) = self.hosts.get_mut(&id).and_then(|host| host.process.as_mut()) else { return };
        if process.peers.judging.is_empty() {
            return;
        }
        let shared = process.shared.clone();
        let state = shared.state.read().unwrap_or_else(PoisonError::into_inner);
        let (floors, mut said) = (&mut process.peers.floors, Vec::new());
        process.peers.judging.retain_mut(|judging| {
            let Asked { from, life, number, claim } = judging.asked.clone();
            let outcome = match judging.answer.try_recv() {
                Ok(_) => judge(&state, floors, &claim),
                Err(TryRecvError::Empty) if now < judging.until => return true,
                Err(_) => Err(away("no quorum")),
            };
            let outcome = outcome.map(|verdict| (verdict, key.public(), key.sign_claim(&claim)));
            said.push((from, Said { by: id, life, number, outcome }));
            false
        });
        drop(state);
        for (to, said) in said {
            for arrives in self.network.arrivals(id, to, now) {
                self.at(arrives, crate::queue::Event::CoSigned { to, said: Box::new(said.clone()) });
            }
        }
    }

    /// A voter answered.
    pub(crate) fn signed(&mut self, to: u64, said: Said) {
        let Some(host) = self.hosts.get_mut(&to).filter(|host| host.life == said.life) else { return };
        let Some(process) = &mut host.process else { return };
        for serving in process.peers.serving.iter_mut().filter(|serving| serving.number == said.number) {
            let Serve::Signing(signing) = &mut serving.step else { continue };
            signing.waits.remove(&said.by);
            match &said.outcome {
                Ok((Verdict::Sign, key, signature)) => {
                    signing.signatures.extend(signing.what.named(key, signature.clone()));
                }
                Ok((Verdict::GoOn(floor), ..)) => signing.floor = signing.floor.max(*floor),
                Err(_) => {}
            }
        }
        self.wake(to, self.now);
    }
}

impl Signing {
    fn begin(what: What, key: &RecordKey, rounds: usize) -> Signing {
        let own = what.named(&key.public(), key.sign_claim(what.claim()));
        Signing { signatures: own.into_iter().collect(), what, waits: BTreeSet::new(), floor: 0, rounds, until: 0 }
    }
}

/// Why it is told at once that there is no answer; none while there may be one.
fn waited(serving: &mut Serving, now: Micros) -> Option<Refusal> {
    if let Serve::Barrier { answer, until } = &mut serving.step {
        match answer.try_recv() {
            Ok(_) => serving.step = Serve::News { until: now + micros(pull::WAIT) },
            Err(TryRecvError::Empty) if now < *until => {}
            Err(_) => return Some(away("no quorum")),
        }
    }
    None
}
