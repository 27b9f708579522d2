//! Several cells on one virtual clock, and what passes between them: late, lost, cut off, or a lie.

use crate::dice::Dice;
use crate::lies::Liar;
use crate::oracle::{Ledger, Violation};
use crate::peering::{Body, Letter};
use crate::plan::{Between, MS, Micros, Plan, SECOND};
use crate::queue::{Event, Queue};
use crate::template::Template;
use crate::world::World;
use ambit_model::{Code, Refusal, TrustDomain};
use std::collections::BTreeSet;

/// The least delay of a letter.
const DELAY_MIN: Micros = 200;
/// A letter that was lost on its way is sent again by the connection, or nobody hears of it.
const RESENT_AFTER: Micros = 250 * MS;
/// How often ages are looked at.
const SAMPLE_EVERY: Micros = 50 * MS;
/// An operator notices that an import stopped, and lets it go on, within this.
const APPROVE_EVERY: Micros = 400 * MS;
/// How long a link is cut, at most.
const CUT_MAX: Micros = 3 * SECOND;

/// A cell begins anew once somebody holds all that was decided.
const ANEW_RETRY: Micros = 50 * MS;

/// What happens between cells at a moment.
enum Act {
    Cut,
    Mend(usize, usize),
    Restart,
    Anew(usize),
    Sample,
    Approve,
}

pub(crate) struct Federation {
    pub(crate) worlds: Vec<World>,
    pub(crate) now: Micros,
    pub(crate) ledger: Ledger,
    between: Between,
    dice: Dice,
    queue: Queue<Act>,
    /// From, to: nothing passes.
    cut: BTreeSet<(usize, usize)>,
    liar: Liar,
    calm: bool,
}

impl Federation {
    pub(crate) fn new(plans: Vec<Plan>, templates: &[Template], trace: bool) -> Result<Federation, Violation> {
        let first = plans.first().and_then(|plan| Some((plan.seed, plan.between.clone()?)));
        let (seed, between) = first.ok_or_else(|| Violation::of("sim", "a plan for several cells"))?;
        let worlds = plans.into_iter().zip(templates).map(|(plan, template)| World::new(plan, template, trace));
        let mut dice = Dice::new(seed ^ 0x6c65_7474);
        let liar = Liar::new(templates, dice.branch())?;
        let mut all = Federation {
            worlds: worlds.collect::<Result<_, _>>()?,
            now: 0,
            ledger: Ledger::default(),
            between,
            dice,
            queue: Queue::new(),
            cut: BTreeSet::new(),
            liar,
            calm: false,
        };
        for n in 0..all.worlds.len() {
            all.gather(n)?;
        }
        let (cut, restart) = (all.between.cut_every, all.between.restart_every);
        all.schedule(cut, Act::Cut);
        all.schedule(restart, Act::Restart);
        if all.between.anew_at > 0 {
            let n = all.dice.below(all.worlds.len() as u64) as usize;
            all.queue.push(all.between.anew_at, Act::Anew(n));
        }
        all.queue.push(SAMPLE_EVERY, Act::Sample);
        all.queue.push(APPROVE_EVERY, Act::Approve);
        Ok(all)
    }

    fn schedule(&mut self, every: Micros, act: Act) {
        if every > 0 {
            let at = self.now + self.dice.between(every / 2, every * 3 / 2);
            self.queue.push(at, act);
        }
    }

    pub(crate) fn run_until(&mut self, end: Micros) -> Result<(), Violation> {
        loop {
            let worlds = self.worlds.iter().enumerate();
            let first = worlds.filter_map(|(n, world)| world.next().map(|at| (at, n))).min();
            let own = self.queue.next().filter(|own| first.is_none_or(|(at, _)| *own <= at));
            match (own, first) {
                (Some(at), _) if at <= end => {
                    self.now = at;
                    if let Some((_, act)) = self.queue.pop() {
                        self.act(act)?;
                    }
                }
                (None, Some((at, n))) if at <= end => {
                    self.now = at;
                    self.in_cell(n, World::step)?;
                    self.gather(n)?;
                }
                _ => break,
            }
        }
        self.now = end;
        self.worlds.iter_mut().for_each(|world| world.now = end);
        Ok(())
    }

    /// Something done in one cell; what is wrong there is told with the cell's name.
    pub(crate) fn in_cell<T>(
        &mut self,
        n: usize,
        what: impl FnOnce(&mut World) -> Result<T, Violation>,
    ) -> Result<T, Violation> {
        let Some(world) = self.worlds.get_mut(n) else { return Err(Violation::of("sim", format!("no cell {n}"))) };
        let name = world.cell.clone();
        what(world).map_err(|v| Violation::of(v.invariant, format!("in {name}: {}", v.text)))
    }

    /// What a cell decided that concerns others, and what it sends them.
    fn gather(&mut self, n: usize) -> Result<(), Violation> {
        let Some(world) = self.worlds.get_mut(n) else { return Ok(()) };
        if world.outbox.is_empty() && !world.history.has_news() {
            return Ok(());
        }
        let (name, letters, news) = (world.cell.clone(), std::mem::take(&mut world.outbox), world.history.news());
        for item in news {
            self.ledger.note(&name, item, self.now)?;
        }
        for (leaves, letter) in letters {
            self.send(n, leaves, letter);
        }
        Ok(())
    }

    fn number(&self, cell: &TrustDomain) -> Option<usize> {
        self.worlds.iter().position(|world| world.cell == *cell)
    }

    fn send(&mut self, from: usize, leaves: Micros, mut letter: Letter) {
        let Some(to) = self.number(&letter.to) else { return };
        if self.cut.contains(&(from, to)) {
            // A host that is away is silent; a network that is away may say so.
            if let Body::Ask { back, .. } = letter.body
                && self.dice.below(2) == 0
            {
                let refusal = Refusal::new(Code::Unavailable, "an answer from the peer", "no route");
                let body = Body::Answer { back, answer: Err(refusal), lie: None };
                let letter = Letter { from: letter.to, to: letter.from, body };
                self.deliver(from, leaves + DELAY_MIN, letter);
            }
            return;
        }
        let (late, lies) = if self.calm { (0, 0) } else { (self.between.loss_per_mille, self.between.lies_per_mille) };
        if let Body::Answer { answer: Ok(answer), lie: lie @ None, .. } = &mut letter.body {
            self.liar.remember((from, to), answer);
            if self.dice.per_mille(lies)
                && let Some((kind, told)) = self.liar.lie((from, to), answer)
            {
                (*lie, *answer) = (Some(kind), told);
            }
        }
        let mut arrives = leaves;
        if self.dice.per_mille(late) {
            arrives += RESENT_AFTER;
            if self.dice.below(4) == 0 {
                return;
            }
        }
        let longest = if self.calm { DELAY_MIN * 4 } else { self.between.delay_max };
        arrives += self.dice.between(DELAY_MIN, longest.max(DELAY_MIN + 1));
        self.deliver(to, arrives, letter);
    }

    fn deliver(&mut self, to: usize, at: Micros, letter: Letter) {
        if let Some(world) = self.worlds.get_mut(to) {
            world.at(at, Event::Letter(Box::new(letter)));
        }
    }

    fn act(&mut self, act: Act) -> Result<(), Violation> {
        match act {
            Act::Cut if !self.calm => {
                self.cut_one();
                self.schedule(self.between.cut_every, Act::Cut);
            }
            Act::Restart if !self.calm => {
                let n = self.dice.below(self.worlds.len() as u64) as usize;
                self.in_cell(n, |world| {
                    world.restart();
                    Ok(())
                })?;
                self.schedule(self.between.restart_every, Act::Restart);
            }
            Act::Anew(n) if !self.calm => {
                if self.in_cell(n, World::begin_anew)? {
                    let seq = self.worlds.get(n).and_then(|w| w.history.state().cell()).map_or(0, |c| c.export_seq);
                    self.liar.begun_anew(n, seq);
                    self.gather(n)?;
                } else {
                    self.queue.push(self.now + ANEW_RETRY, Act::Anew(n));
                }
            }
            Act::Cut | Act::Restart | Act::Anew(_) => {}
            Act::Mend(a, b) if !self.calm => {
                self.cut.remove(&(a, b));
                self.cut.remove(&(b, a));
            }
            Act::Mend(..) => {}
            Act::Sample => {
                self.ages()?;
                self.queue.push(self.now + SAMPLE_EVERY, Act::Sample);
            }
            Act::Approve => {
                for world in &mut self.worlds {
                    world.now = world.now.max(self.now);
                    world.approve_stopped();
                }
                self.queue.push(self.now + APPROVE_EVERY, Act::Approve);
            }
        }
        Ok(())
    }

    /// Two cells lose each other, or one does not hear the other.
    fn cut_one(&mut self) {
        let cells = self.worlds.len() as u64;
        let (a, step) = (self.dice.below(cells), self.dice.between(1, cells));
        let (a, b) = (a as usize, ((a + step) % cells) as usize);
        self.cut.insert((a, b));
        if self.dice.below(3) != 0 {
            self.cut.insert((b, a));
        }
        let until = self.now + self.dice.between(100 * MS, CUT_MAX);
        self.queue.push(until, Act::Mend(a, b));
    }

    /// No cell hears another (`true`), or all hear all.
    pub(crate) fn isolate(&mut self, isolated: bool) {
        self.calm = true;
        self.cut.clear();
        if isolated {
            let all = 0..self.worlds.len();
            self.cut.extend(all.clone().flat_map(|a| all.clone().filter(move |b| a != *b).map(move |b| (a, b))));
        }
    }

    /// I12: no replica shows what it knows of a peer as younger than it is.
    fn ages(&self) -> Result<(), Violation> {
        for world in &self.worlds {
            for host in world.hosts.values() {
                let Some(process) = &host.process else { continue };
                let state = process.shared.state.read().unwrap_or_else(std::sync::PoisonError::into_inner);
                for (td, peer) in state.peers() {
                    let Some(shown) = process.peers.heard.age(td, host.clock.read(self.now).boot) else { continue };
                    let truth = self.ledger.true_age(td, peer.seq, self.now);
                    // Its clock may count slowly; that is all that an age may be short of.
                    let slow = truth * host.clock.drift_ppm.unsigned_abs() / 1_000_000 + MS;
                    let shown = u64::try_from(shown.as_micros()).unwrap_or(u64::MAX);
                    if shown + slow < truth {
                        let (cell, id) = (&world.cell, host.id);
                        let found = format!(
                            "replica {id} of {cell} shows {td} as of {} ms ago, and lacks what is {} ms old",
                            shown / MS,
                            truth / MS
                        );
                        return Err(Violation::of("I12", found));
                    }
                }
            }
        }
        Ok(())
    }

    /// I9, I11: where every cell stands with every other; what differs, if anything.
    pub(crate) fn agreed(&self) -> Result<(), String> {
        let pairs = self.worlds.iter().flat_map(|a| self.worlds.iter().map(move |b| (a, b)));
        for (importer, origin) in pairs.filter(|(a, b)| a.cell != b.cell) {
            let (known, truth) = (importer.history.state(), origin.history.state());
            self.ledger.agree((&importer.cell, known), (&origin.cell, truth))?;
        }
        Ok(())
    }
}
