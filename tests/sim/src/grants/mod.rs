//! Three cells under a grant: west, whose authority is granted to east, with core as witness or without one. Links are cut
//! each way, replicas pause, lag, restart and have clocks that drift, and people grant at the worst of times.
//!
//! The state machines, the lease, the wait and the fence are those of production; the oracle beside them knows only what
//! happened.

mod cell;
mod oracle;

use crate::dice::Dice;
use crate::host::EPOCH_MS;
use crate::oracle::Violation;
use crate::plan::{MS, Micros, SECOND};
use crate::queue::Queue;
use crate::tally::Tally;
use ambit_identity::ApproverKey;
use ambit_model::act::{Act, Approved, Proposal};
use ambit_model::grant::{FailoverGrant, SignedGrant};
use ambit_model::record::Record;
use ambit_model::{Refusal, SpiffeId, Stamp, SvidTtl, TrustDomain};
use ambit_state::grant::LeafFacts;
use ambit_state::lease::{Boot, Renewal};
use ambit_state::{Command, IdVerb, Issuance, Reply};
use cell::{Cell, FIRST};
use oracle::{Ledger, Made, Signed};
use sha2::{Digest as _, Sha256};

/// Made once for all, as the cards: they open nothing but simulated cells.
const APPROVERS: &str = include_str!("../../approvers.txt");
const NAMES: [&str; 3] = ["west", "east", "core"];
const HOME: usize = 0;
const HOLDER: usize = 1;
/// Of cells on this clock, how long things take.
const PULL_EVERY: Micros = 250 * MS;
const FOLLOW_EVERY: Micros = 40 * MS;
const SIGN_EVERY: Micros = 90 * MS;
const DELAY_MAX: Micros = 80 * MS;
const CUT_MAX: Micros = 12 * SECOND;
/// A leaf's time in these runs, seconds; the shortest there is.
const TTL_S: u32 = SvidTtl::FLOOR_S;

/// The options of one run.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    seed: u64,
    length: Micros,
    /// None: approvers vouch, and say the truth.
    lease_ms: Option<u64>,
    cut_every: Micros,
    pause_every: Micros,
    restart_every: Micros,
    grant_every: Micros,
    /// What is committed is signed this much later, at most.
    slow_sign: Micros,
    /// Of a grant, seconds.
    lasts_s: u64,
}

impl Plan {
    pub(crate) fn of(seed: u64, length: Micros) -> Plan {
        let mut dice = Dice::new(seed ^ 0x6772_616e);
        let d = &mut dice;
        let witnessed = d.per_mille(800);
        Plan {
            seed,
            // A lease and a wait have to run out in it.
            length: length * 40,
            lease_ms: witnessed.then(|| d.between(4, 9) * 1_000),
            cut_every: d.between(800, 6_000) * MS,
            pause_every: d.between(500, 5_000) * MS,
            restart_every: d.between(2_000, 20_000) * MS,
            grant_every: d.between(5_000, 60_000) * MS,
            slow_sign: if d.per_mille(500) { d.between(1, 12) * SECOND } else { 50 * MS },
            lasts_s: d.between(5, 60),
        }
    }
}

impl std::fmt::Display for Plan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let vouch = self.lease_ms.map_or("approvers vouch".to_owned(), |ms| format!("a lease of {ms} ms"));
        write!(
            f,
            "three cells and a grant, {} s, {vouch}; every (ms): cut {}, pause {}, restart {}, grant {}; signed up to {} ms \
             after its entry; grants for {} s",
            self.length / SECOND,
            self.cut_every / MS,
            self.pause_every / MS,
            self.restart_every / MS,
            self.grant_every / MS,
            self.slow_sign / MS,
            self.lasts_s
        )
    }
}

enum Event {
    /// Importer, origin.
    Pull(usize, usize),
    /// Origin, importer: after which record.
    Asked(usize, usize, u64),
    Told(usize, Vec<Record>),
    Follow(usize, usize),
    /// A home's replica asks a granter.
    Lease(usize),
    AskedLease {
        replica: usize,
        life: u64,
        granter: usize,
        nonce: [u8; 16],
        epoch: u64,
    },
    Renewed {
        replica: usize,
        life: u64,
        renewal: Renewal,
    },
    /// Cell, replica.
    Commit(usize, usize),
    Sign(Box<Committed>),
    Judge,
    Ban,
    Grant,
    Release,
    TakeBack,
    Cut,
    Mend(usize, usize),
    Pause,
    Restart,
    Leader,
}

/// What is committed and to be signed.
struct Committed {
    cell: usize,
    replica: usize,
    /// Of the replica, and its clock, when it was proposed.
    life: u64,
    proposed: Boot,
    issuance: Issuance,
}

pub(crate) struct World {
    plan: Plan,
    now: Micros,
    dice: Dice,
    queue: Queue<Event>,
    cells: Vec<Cell>,
    keys: Vec<ApproverKey>,
    ledger: Ledger,
    cut: std::collections::BTreeSet<(usize, usize)>,
    /// The intermediate that the home signs with.
    authority: String,
    /// The home is down, as approvers know, until then.
    down_until: Micros,
    nonce: u64,
    calm: bool,
    tally: Tally,
    trace: bool,
}

fn broken(what: &str) -> impl Fn(Refusal) -> Violation + '_ {
    move |refusal| Violation::of("sim", format!("{what}: {refusal}"))
}

/// One run, to its end.
pub(crate) fn run(plan: Plan, trace: bool) -> Result<Tally, Violation> {
    let mut world = World::new(plan, trace)?;
    world.until(world.plan.length)?;
    world.heal()?;
    world.ended()
}

impl World {
    fn new(plan: Plan, trace: bool) -> Result<World, Violation> {
        let mut dice = Dice::new(plan.seed ^ 0x6c65_6173);
        let founded = |name: &str, dice: &mut Dice| {
            let others: Vec<&str> = NAMES.into_iter().filter(|other| *other != name).collect();
            Cell::founded(name, &others, dice)
        };
        let cells = NAMES.iter().map(|name| founded(name, &mut dice)).collect::<Result<_, _>>()?;
        let pem = |body: &str| format!("-----BEGIN PRIVATE KEY-----\n{body}\n-----END PRIVATE KEY-----\n");
        let keys = APPROVERS.lines().map(|body| ApproverKey::from_pem(&pem(body)));
        let mut world = World {
            now: 0,
            queue: Queue::new(),
            cells,
            keys: keys.collect::<Result<_, _>>().map_err(broken("approvers"))?,
            ledger: Ledger { witnessed: plan.lease_ms.is_some(), ..Ledger::default() },
            cut: std::collections::BTreeSet::new(),
            authority: FIRST.to_owned(),
            down_until: 0,
            nonce: 0,
            calm: false,
            tally: Tally::default(),
            trace,
            dice,
            plan,
        };
        world.name_standby()?;
        world.begin();
        Ok(world)
    }

    fn name_standby(&mut self) -> Result<(), Violation> {
        let by = "spiffe://west/ambit/admin/founder";
        for (n, name) in ["alice", "bob"].into_iter().enumerate() {
            let name = name.parse().map_err(broken("a name"))?;
            let Some(card) = self.keys.get(n).map(ApproverKey::card) else { continue };
            let act = Act::AddApprover(name, card);
            self.approved_act(act, if n == 0 { &[] } else { &[0] }, by)?;
        }
        let naming = match self.plan.lease_ms {
            Some(ms) => format!("east with witness core and lease {} s", ms / 1_000),
            None => "east".to_owned(),
        };
        self.approved_act(Act::NameStandby(naming.parse().map_err(broken("a naming"))?), &[0, 1], by)
    }

    fn approved_act(&mut self, act: Act, signers: &[usize], by: &str) -> Result<(), Violation> {
        let signed = self.signed(act.clone(), signers)?;
        let Proposal { epoch, expires, nonce, .. } = signed.proposal;
        let approved = (!signers.is_empty()).then_some(Approved { epoch, expires, nonce, approvals: signed.approvals });
        let now = self.now;
        let Some(home) = self.cells.get_mut(HOME) else { return Ok(()) };
        home.commit(now, Command::Act { act, approved, by: by.to_owned() }).map(drop).map_err(broken("an act"))
    }

    fn signed(&mut self, act: Act, signers: &[usize]) -> Result<SignedGrant, Violation> {
        self.nonce += 1;
        let mut nonce = [0; 16];
        nonce[..8].copy_from_slice(&self.nonce.to_be_bytes());
        let trust_domain: TrustDomain = NAMES[HOME].parse().map_err(broken("a name"))?;
        let expires = Stamp(EPOCH_MS + self.now / 1_000 + 3_600_000);
        let proposal = Proposal { trust_domain, epoch: 1, expires, nonce, act };
        let word = signers.iter().filter_map(|n| self.keys.get(*n)).map(|key| key.approve(&proposal));
        let approvals = word.collect::<Result<_, _>>().map_err(broken("an approval"))?;
        Ok(SignedGrant { proposal, approvals })
    }

    fn begin(&mut self) {
        for cell in 0..self.cells.len() {
            for other in (0..self.cells.len()).filter(|other| *other != cell) {
                self.soon(PULL_EVERY, Event::Pull(cell, other));
            }
            for replica in 0..self.cells.get(cell).map_or(0, |c| c.replicas.len()) {
                self.soon(FOLLOW_EVERY, Event::Follow(cell, replica));
                if cell == HOME {
                    self.soon(PULL_EVERY, Event::Lease(replica));
                }
                if cell == HOME || cell == HOLDER {
                    self.soon(SIGN_EVERY, Event::Commit(cell, replica));
                }
            }
        }
        self.soon(SIGN_EVERY, Event::Judge);
        self.soon(2 * SECOND, Event::Ban);
        self.soon(self.plan.grant_every, Event::Grant);
        self.soon(SECOND, Event::TakeBack);
        self.soon(30 * SECOND, Event::Release);
        self.soon(self.plan.cut_every, Event::Cut);
        self.soon(self.plan.pause_every, Event::Pause);
        self.soon(self.plan.restart_every, Event::Restart);
        self.soon(3 * SECOND, Event::Leader);
    }

    fn soon(&mut self, about: Micros, event: Event) {
        let at = self.now + self.dice.between(about / 2, about * 3 / 2);
        self.queue.push(at, event);
    }

    fn say(&self, what: impl FnOnce() -> String) {
        if self.trace {
            println!("{:>12.3} ms  {}", self.now as f64 / MS as f64, what());
        }
    }

    fn until(&mut self, end: Micros) -> Result<(), Violation> {
        while self.queue.next().is_some_and(|at| at <= end) {
            let Some((at, event)) = self.queue.pop() else { break };
            self.now = at;
            self.happen(event)?;
        }
        self.now = end;
        Ok(())
    }

    fn hears(&self, from: usize, to: usize) -> bool {
        let down = |n: usize| n == HOME && self.now < self.down_until;
        !self.cut.contains(&(from, to)) && !down(from) && !down(to)
    }

    fn later(&mut self, event: Event) {
        let at = self.now + self.dice.between(MS, DELAY_MAX);
        self.queue.push(at, event);
    }

    fn happen(&mut self, event: Event) -> Result<(), Violation> {
        match event {
            Event::Pull(to, from) => {
                let origin = self.cells.get(from).map(|cell| cell.name.clone());
                let known = self.cells.get(to).zip(origin).and_then(|(cell, td)| Some(cell.truth.peer(&td)?.seq));
                if let Some(after) = known.filter(|_| self.hears(to, from)) {
                    self.later(Event::Asked(from, to, after));
                }
                self.soon(PULL_EVERY, Event::Pull(to, from));
            }
            Event::Asked(from, to, after) => {
                let records = self.cells.get(from).map(|cell| cell.tell(after)).unwrap_or_default();
                if self.hears(from, to) && !records.is_empty() {
                    self.later(Event::Told(to, records));
                }
            }
            Event::Told(to, records) => self.told(to, records)?,
            Event::Follow(cell, replica) => {
                let entries = if self.calm { usize::MAX } else { self.dice.below(5) as usize };
                let now = self.now;
                if let Some(cell) = self.cells.get_mut(cell).filter(|c| is_awake(c, replica, now)) {
                    cell.follow(replica, entries, now);
                }
                self.soon(FOLLOW_EVERY, Event::Follow(cell, replica));
            }
            Event::Lease(replica) => self.ask_lease(replica),
            Event::AskedLease { replica, life, granter, nonce, epoch } => {
                self.asked_lease(replica, life, granter, nonce, epoch);
            }
            Event::Renewed { replica, life, renewal } => {
                let home = self.cells.get_mut(HOME).and_then(|home| home.replicas.get_mut(replica));
                if let Some(home) = home.filter(|home| home.life == life) {
                    home.lease.renewed(&renewal);
                }
            }
            Event::Commit(cell, replica) => {
                if cell == HOME {
                    self.commit_at_home(replica)
                } else {
                    self.commit_at_holder(replica)
                }
                self.soon(SIGN_EVERY, Event::Commit(cell, replica));
            }
            Event::Sign(committed) => self.sign(*committed)?,
            Event::Judge => {
                self.judge()?;
                self.soon(SIGN_EVERY, Event::Judge);
            }
            other => self.trouble(other)?,
        }
        Ok(())
    }

    /// What people and faults do.
    fn trouble(&mut self, event: Event) -> Result<(), Violation> {
        match event {
            Event::Mend(a, b) => drop(self.cut.remove(&(a, b))),
            Event::TakeBack => {
                self.take_back();
                self.soon(SECOND, Event::TakeBack);
            }
            _ if self.calm => {}
            Event::Ban => {
                self.ban()?;
                self.soon(2 * SECOND, Event::Ban);
            }
            Event::Grant => {
                self.grant()?;
                self.soon(self.plan.grant_every, Event::Grant);
            }
            Event::Release => {
                let (now, home) = (self.now, NAMES[HOME].parse().map_err(broken("a name"))?);
                if let Some(cell) = self.cells.get_mut(HOLDER) {
                    // Refused where it holds nothing.
                    drop(cell.commit(now, Command::ReleaseGrant(home, "me".into())));
                }
                self.soon(30 * SECOND, Event::Release);
            }
            Event::Cut => {
                self.tally.partitions += 1;
                let (a, step) = (self.dice.below(3) as usize, self.dice.between(1, 3) as usize);
                let (b, until) = ((a + step) % 3, self.now + self.dice.between(500 * MS, CUT_MAX));
                let ways: &[(usize, usize)] = if self.dice.below(3) == 0 { &[(a, b)] } else { &[(a, b), (b, a)] };
                for (from, to) in ways {
                    self.cut.insert((*from, *to));
                    self.queue.push(until, Event::Mend(*from, *to));
                }
                self.soon(self.plan.cut_every, Event::Cut);
            }
            Event::Pause => {
                let (cell, replica) = (self.dice.below(3) as usize, self.dice.below(2) as usize);
                let until = self.now + self.dice.between(100 * MS, 20 * SECOND);
                if let Some(replica) = self.cells.get_mut(cell).and_then(|c| c.replicas.get_mut(replica)) {
                    replica.paused_until = until;
                    self.tally.pauses += 1;
                }
                self.soon(self.plan.pause_every, Event::Pause);
            }
            Event::Restart => {
                let (cell, replica) = (self.dice.below(3) as usize, self.dice.below(2) as usize);
                if let Some(cell) = self.cells.get_mut(cell) {
                    cell.restart(replica);
                    self.tally.crashes += 1;
                }
                self.soon(self.plan.restart_every, Event::Restart);
            }
            Event::Leader => {
                let n = self.dice.below(3) as usize;
                if let Some(cell) = self.cells.get_mut(n) {
                    cell.another_leads(&mut self.dice);
                    self.tally.elections += 1;
                }
                self.soon(3 * SECOND, Event::Leader);
            }
            _ => {}
        }
        Ok(())
    }

    fn told(&mut self, to: usize, records: Vec<Record>) -> Result<(), Violation> {
        self.tally.pulls += 1;
        let now = self.now;
        let Some(cell) = self.cells.get_mut(to) else { return Ok(()) };
        let before = cell.truth.grants().count();
        cell.import(now, records).map_err(broken("an import"))?;
        self.tally.imports += 1;
        if cell.truth.grants().count() != before {
            let (name, epochs) = (cell.name.clone(), cell.truth.grants().map(|((_, epoch), _)| *epoch));
            epochs.collect::<Vec<_>>().into_iter().try_for_each(|epoch| self.ledger.taken(&name, epoch))?;
            self.say(|| format!("{name} takes a grant"));
        }
        Ok(())
    }

    fn ask_lease(&mut self, replica: usize) {
        let now = self.now;
        self.soon(PULL_EVERY, Event::Lease(replica));
        for granter in [HOLDER, 2] {
            let nonce = self.dice.bytes();
            let hears = self.hears(HOME, granter);
            let name = self.cells.get(granter).map(|cell| cell.name.clone());
            let Some(home) = self.cells.get_mut(HOME).filter(|home| is_awake(home, replica, now)) else { return };
            let (Some(asker), Some(name)) = (home.replicas.get_mut(replica), name) else { return };
            let Some(epoch) = asker.state.cell().map(|cell| cell.epoch) else { return };
            let boot = asker.boot(now);
            asker.lease.ask(&name, nonce, epoch, boot);
            let life = asker.life;
            if hears {
                self.later(Event::AskedLease { replica, life, granter, nonce, epoch });
            }
        }
    }

    /// Of a state as new as the question: a granter reads behind a barrier.
    fn asked_lease(&mut self, replica: usize, life: u64, granter: usize, nonce: [u8; 16], epoch: u64) {
        let Some(cell) = self.cells.get(granter) else { return };
        let (Ok(home), name) = (NAMES[HOME].parse::<TrustDomain>(), cell.name.clone()) else { return };
        if let Ok(lease_ms) = cell.truth.renews(&home, epoch)
            && self.hears(granter, HOME)
        {
            self.tally.reads += 1;
            // An answer may be late; the lease is counted from the question.
            let at = self.now + self.dice.between(MS, 4 * SECOND);
            self.queue
                .push(at, Event::Renewed { replica, life, renewal: Renewal { granter: name, nonce, epoch, lease_ms } });
        }
    }

    fn signed_within(&mut self, cell: usize, replica: usize, issuance: Issuance) {
        let at = self.now + self.dice.between(MS, self.plan.slow_sign);
        let Some(signer) = self.cells.get(cell).and_then(|c| c.replicas.get(replica)) else { return };
        let (life, proposed) = (signer.life, signer.boot(self.now));
        self.queue.push(at, Event::Sign(Box::new(Committed { cell, replica, life, proposed, issuance })));
    }

    fn commit_at_home(&mut self, replica: usize) {
        let (now, authority) = (self.now, self.authority.clone());
        let number = self.dice.below(1_000);
        let is_down = now < self.down_until;
        let Some(home) = self.cells.get_mut(HOME).filter(|home| !is_down && is_awake(home, replica, now)) else {
            return;
        };
        let Some(asker) = home.replicas.get(replica) else { return };
        let namings = asker.state.namings();
        let Some(epoch) = asker.state.cell().map(|cell| cell.epoch) else { return };
        if asker.lease.check(&namings, epoch, asker.boot(now)).is_err() {
            return;
        }
        let (Ok(spiffe_id), Ok(ttl)) = (format!("spiffe://west/w{number}").parse(), SvidTtl::try_from(TTL_S)) else {
            return;
        };
        let by = "spiffe://west/ambit/admin/founder".to_owned();
        let mint = Command::MintX509 { spiffe_id, dns_names: Vec::new(), ttl, key_hash: [3; 32], authority, by };
        // Whoever leads commits it, if anybody has a lease still or not.
        if let Ok(Reply::Leaves(leaves)) = home.commit(now, mint)
            && let Some(Ok(issuance)) = leaves.into_iter().next()
        {
            self.signed_within(HOME, replica, issuance);
        }
    }

    /// What a holder's own entry for a home's workload will look like.
    fn commit_at_holder(&mut self, replica: usize) {
        let (now, number) = (self.now, self.dice.below(1_000));
        let Ok(home) = NAMES[HOME].parse::<TrustDomain>() else { return };
        let Some(cell) = self.cells.get_mut(HOLDER).filter(|cell| is_awake(cell, replica, now)) else { return };
        let Ok(_) = cell.commit(now, Command::Tick) else { return };
        let Ok((grant, _)) = cell.truth.holds(&home) else { return };
        let (epoch, ends, stamp) = (grant.epoch, grant.ends, cell.truth.stamp());
        let Ok(spiffe_id) = format!("spiffe://west/e{number}").parse() else { return };
        let issuance = Issuance {
            authority: "standby".into(),
            serial: [0; 16],
            spiffe_id,
            subject: ambit_state::Subject::Minted(String::new(), Vec::new()),
            binding: None,
            epoch,
            key_hash: [3; 32],
            lifetime: ambit_model::Lifetime {
                not_before: stamp.minus_ms(ambit_state::NOT_BEFORE_SLACK_MS),
                not_after: stamp.plus_ms(u64::from(TTL_S) * 1_000).min(ends),
            },
            index: cell.truth.applied(),
        };
        self.signed_within(HOLDER, replica, issuance);
    }

    /// The last step. Before it: the lease or the wait, at this very moment, by this replica's own clock.
    fn sign(&mut self, committed: Committed) -> Result<(), Violation> {
        let (now, cell, by_home) = (self.now, committed.cell, committed.cell == HOME);
        let issuance = &committed.issuance;
        if by_home && now < self.down_until {
            return Ok(());
        }
        let Some(signer) = self.cells.get(cell).and_then(|c| c.replicas.get(committed.replica)) else { return Ok(()) };
        if signer.life != committed.life {
            return Ok(());
        }
        if now < signer.paused_until {
            // It goes on with the last step when it wakes, and not with the check before it.
            let at = signer.paused_until;
            self.queue.push(at, Event::Sign(Box::new(committed)));
            return Ok(());
        }
        let boot = signer.boot(now);
        let may = if by_home {
            signer.lease.may_sign(&signer.state.namings(), issuance.epoch, boot)
        } else {
            let home: TrustDomain = NAMES[HOME].parse().map_err(broken("a name"))?;
            signer.state.holds(&home).and_then(|(grant, vouch)| {
                let epoch = grant.epoch;
                signer.wait.may_sign((&home, epoch), vouch, committed.proposed, boot)
            })
        };
        let entry = issuance.index.0;
        // Nobody signs from an entry that he has not applied.
        if may.is_err() || (signer.applied as u64) < entry {
            return Ok(());
        }
        self.say(|| format!("{} signs {} in epoch {}", NAMES[cell], issuance.spiffe_id, issuance.epoch));
        self.tally.acknowledged += 1;
        self.ledger.sign(Signed {
            id: issuance.spiffe_id.clone(),
            by_home,
            epoch: issuance.epoch,
            stamp: issuance.lifetime.not_before.plus_ms(ambit_state::NOT_BEFORE_SLACK_MS),
            not_before: issuance.lifetime.not_before,
            not_after: issuance.lifetime.not_after,
            at: now,
        })
    }

    /// Somebody is shown a leaf that was signed, of late or some time ago.
    fn judge(&mut self) -> Result<(), Violation> {
        let n = self.dice.below(3) as usize;
        let from = self.ledger.signed.len().saturating_sub(60);
        let Some(leaf) = self.dice.pick(self.ledger.signed.get(from..).unwrap_or_default()).cloned() else {
            return Ok(());
        };
        let Some(cell) = self.cells.get(n) else { return Ok(()) };
        let holder: TrustDomain = NAMES[HOLDER].parse().map_err(broken("a name"))?;
        let told = match n {
            HOLDER => cell.truth.cell().map_or(0, |row| row.export_seq),
            _ => cell.truth.peer(&holder).map_or(0, |peer| peer.seq),
        };
        // As a certificate has it: whole seconds.
        let second = |stamp: Stamp| Stamp(stamp.0 / 1_000 * 1_000);
        let facts = LeafFacts {
            id: &leaf.id,
            epoch: if leaf.by_home { leaf.epoch } else { 0 },
            bound: Some(leaf.epoch),
            not_before: second(leaf.not_before),
            not_after: second(leaf.not_after),
            standby: (!leaf.by_home).then(|| holder.clone()),
        };
        let now = cell.stamp(self.now);
        let verdict = cell.truth.fences().judge(&facts, now);
        self.ledger.judged(&cell.name, told, now, &leaf, &verdict)
    }

    fn ban(&mut self) -> Result<(), Violation> {
        let now = self.now;
        if now < self.down_until {
            return Ok(());
        }
        let id: SpiffeId = format!("spiffe://west/b{}", self.ledger.bans.len()).parse().map_err(broken("an id"))?;
        if let Some(home) = self.cells.get_mut(HOME) {
            home.commit(now, Command::DenyId(id.clone(), IdVerb::Bar)).map_err(broken("a ban"))?;
            self.ledger.bans.push(id);
        }
        Ok(())
    }

    /// People grant: rightly, alone, one of them twice, or once more what they granted. Where no witness vouches, they do when
    /// the home is down indeed.
    fn grant(&mut self) -> Result<(), Violation> {
        let now = self.now;
        let Some(home) = NAMES[HOME].parse::<TrustDomain>().ok() else { return Ok(()) };
        let Some(cell) = self.cells.get(HOLDER) else { return Ok(()) };
        let (epoch, stamp) = (cell.truth.epoch_of(&home) + 1, cell.stamp(now));
        let begins = Stamp(stamp.0 / 1_000 * 1_000);
        let ends = begins.plus_ms(self.plan.lasts_s * 1_000);
        let grant = FailoverGrant { home, holder: cell.name.clone(), epoch, begins, ends };
        let signers: &[usize] = match self.dice.below(5) {
            0 => &[0],
            1 => &[1, 1],
            _ => &[0, 1],
        };
        let people = if signers == [0, 1] { 2 } else { 1 };
        if self.plan.lease_ms.is_none() && people == 2 {
            self.down_until = now + self.plan.lasts_s * SECOND / 2;
            let Some(home) = self.cells.get_mut(HOME) else { return Ok(()) };
            (0..home.replicas.len()).for_each(|n| home.restart(n));
        }
        let signed = self.signed(Act::FailOver(grant), signers)?;
        let Some(cell) = self.cells.get_mut(HOLDER) else { return Ok(()) };
        let outcome = cell.commit(now, Command::FailOver(Box::new(signed), "me".into()));
        let told_at = outcome.is_ok().then(|| cell.truth.cell().map_or(0, |row| row.export_seq));
        let name = cell.name.clone();
        self.say(|| format!("a grant of epoch {epoch} by {people}: {:?}", outcome.as_ref().err().map(|r| r.code)));
        self.ledger.made.push(Made { epoch, begins, ends, people, told_at });
        if told_at.is_some() {
            self.tally.lies += 1;
            self.ledger.taken(&name, epoch)?;
        }
        Ok(())
    }

    /// The home's operator takes its authority back as soon as it is let, and its replicas get new intermediates.
    fn take_back(&mut self) {
        let now = self.now;
        if now < self.down_until {
            return;
        }
        let Some(home) = self.cells.get_mut(HOME) else { return };
        if home.commit(now, Command::TakeBack("me".into())).is_ok() {
            let key_hash: [u8; 32] = self.dice.bytes();
            let renew = Command::RenewAuthority { replica: 1, key_hash, lifetime_ms: 3_600_000 };
            if home.commit(now, renew).is_ok() {
                self.authority = hex::encode(&key_hash[..20]);
                self.tally.replaced += 1;
                let epoch = home.truth.cell().map_or(0, |row| row.epoch);
                self.say(|| format!("west took its authority back, in epoch {epoch}"));
            }
        }
    }

    /// All hear all: soon everybody holds every ban.
    fn heal(&mut self) -> Result<(), Violation> {
        self.calm = true;
        self.cut.clear();
        self.down_until = 0;
        self.until(self.now + 6 * SECOND)
    }

    fn ended(mut self) -> Result<Tally, Violation> {
        let home: TrustDomain = NAMES[HOME].parse().map_err(broken("a name"))?;
        for cell in self.cells.iter().skip(1) {
            let held: Vec<SpiffeId> =
                cell.truth.id_denials().filter(|((of, _), _)| *of == home).map(|((_, id), _)| id.clone()).collect();
            self.ledger.bans_are_held(&cell.name, &held)?;
        }
        let mut trail = Sha256::new();
        for cell in &self.cells {
            self.tally.entries += cell.log.len() as u64;
            trail.update(cell.truth.digest());
        }
        self.tally.trail = trail.finalize().into();
        Ok(self.tally)
    }
}

fn is_awake(cell: &Cell, replica: usize, now: Micros) -> bool {
    cell.replicas.get(replica).is_some_and(|replica| replica.paused_until <= now)
}
