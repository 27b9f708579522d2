//! A cell as grants see it: one log of entries, and replicas that have applied it so far, each with a clock of its own. That
//! the log is one is what the other runs judge.

use crate::dice::Dice;
use crate::host::EPOCH_MS;
use crate::oracle::Violation;
use crate::plan::Micros;
use ambit_model::record::{Head, Record};
use ambit_model::{RaftIndex, Refusal, Stamp, TrustDomain};
use ambit_state::lease::{Boot, Lease, Wait};
use ambit_state::objects::{CellRow, KeySetRow, Member, PeerRow, PeerState};
use ambit_state::{Command, LogEntry, Reply, State};

/// The intermediate that a cell is founded with.
pub(super) const FIRST: &str = "a1";
const REPLICAS: u64 = 2;
/// Records asked for at once.
const PULL_MAX: usize = 7;

/// One replica: what it applied, and what it knows by its own clock.
pub(super) struct Replica {
    pub(super) state: State,
    pub(super) applied: usize,
    pub(super) lease: Lease,
    pub(super) wait: Wait,
    booted: u64,
    drift_ppm: i64,
    /// Nothing happens here before.
    pub(super) paused_until: Micros,
    /// Changes with each start: what was under way before is gone.
    pub(super) life: u64,
}

impl Replica {
    fn new(dice: &mut Dice) -> Replica {
        Replica {
            state: State::new(),
            applied: 0,
            lease: Lease::default(),
            wait: Wait::default(),
            booted: dice.below(1_000_000_000),
            drift_ppm: dice.between(0, 100_000) as i64 - 50_000,
            paused_until: 0,
            life: 0,
        }
    }
    /// What its clock since boot shows.
    pub(super) fn boot(&self, now: Micros) -> Boot {
        let ms = (now as i64 + now as i64 / 1_000_000 * self.drift_ppm) / 1_000;
        Boot(self.booted + u64::try_from(ms).unwrap_or(0))
    }
}

pub(super) struct Cell {
    pub(super) name: TrustDomain,
    pub(super) log: Vec<LogEntry>,
    /// All of the log, applied.
    pub(super) truth: State,
    pub(super) replicas: Vec<Replica>,
    /// What the leader's clock is off by, milliseconds.
    off_ms: i64,
}

impl Cell {
    pub(super) fn founded(name: &str, others: &[&str], dice: &mut Dice) -> Result<Cell, Violation> {
        let broken = |r: Refusal| Violation::of("sim", format!("{name} is not founded: {r}"));
        let td: TrustDomain = name.parse().map_err(broken)?;
        let mut cell = Cell {
            name: td.clone(),
            log: Vec::new(),
            truth: State::new(),
            replicas: (0..REPLICAS).map(|_| Replica::new(dice)).collect(),
            off_ms: dice.between(0, 4_000) as i64 - 2_000,
        };
        let member = Member {
            address: "127.0.0.1:1".into(),
            authority: FIRST.into(),
            authority_not_after: Stamp(u64::MAX / 2),
            wrap_key: Vec::new(),
            record_key: [1; 32],
        };
        let row = CellRow::founded(td, name.as_bytes().to_vec());
        cell.commit(0, Command::FoundCell(row, 1, member, KeySetRow::default())).map_err(broken)?;
        for other in others {
            let other: TrustDomain = other.parse().map_err(broken)?;
            cell.commit(0, Command::PutPeer(other.clone(), pending(), None)).map_err(broken)?;
            cell.commit(0, Command::ApprovePeer(other, [7; 32])).map_err(broken)?;
        }
        Ok(cell)
    }

    /// The leader's time.
    pub(super) fn stamp(&self, now: Micros) -> Stamp {
        let ms = (now / 1_000) as i64 + self.off_ms;
        Stamp(EPOCH_MS.saturating_add_signed(ms))
    }

    /// Another leads, with another clock: as far as I15 lets it.
    pub(super) fn another_leads(&mut self, dice: &mut Dice) {
        self.off_ms = dice.between(0, 4_000) as i64 - 2_000;
    }

    /// One more entry; replicas follow in their time.
    pub(super) fn commit(&mut self, now: Micros, command: Command) -> Result<Reply, Refusal> {
        let entry = LogEntry { stamp: self.stamp(now), client: [9; 32], request: [0; 16], command };
        let entry = LogEntry::decode(&entry.encode()?)?;
        self.log.push(entry.clone());
        self.truth.apply(RaftIndex(self.log.len() as u64), &entry).outcome
    }

    /// A replica applies what it has not applied yet, some of it or all.
    pub(super) fn follow(&mut self, n: usize, entries: usize, now: Micros) {
        let Some(replica) = self.replicas.get_mut(n) else { return };
        for entry in self.log.iter().skip(replica.applied).take(entries) {
            replica.applied += 1;
            replica.state.apply(RaftIndex(replica.applied as u64), entry);
        }
        let boot = replica.boot(now);
        for (home, epoch) in replica.state.unrenewed() {
            replica.wait.see(&home, epoch, boot);
        }
    }

    /// Its memory goes: lease, wait and whatever was under way. The clock since boot does not stand still.
    pub(super) fn restart(&mut self, n: usize) {
        if let Some(replica) = self.replicas.get_mut(n) {
            (replica.lease, replica.wait) = (Lease::default(), Wait::default());
            replica.life += 1;
        }
    }

    /// What a peer is told that imported up to `after`.
    pub(super) fn tell(&self, after: u64) -> Vec<Record> {
        self.truth.records_after(after).take(PULL_MAX).cloned().collect()
    }

    /// Takes in what a peer told.
    pub(super) fn import(&mut self, now: Micros, records: Vec<Record>) -> Result<(), Refusal> {
        let Some(last) = records.last() else { return Ok(()) };
        let (origin, epoch, seq, hash) = (last.origin.clone(), last.epoch, last.seq, last.hash());
        let head = Head { origin, epoch, seq, hash, stamp: self.stamp(now), nonce: [0; 16] };
        self.commit(now, Command::Import(head, records)).map(drop)
    }
}

fn pending() -> PeerRow {
    PeerRow {
        state: PeerState::Pending,
        fingerprint: [7; 32],
        addresses: Vec::new(),
        root_der: vec![1],
        bundle_sequence: 1,
        key_set: KeySetRow::default(),
        epoch: 0,
        seq: 0,
        hash: [0; 32],
        trouble: String::new(),
    }
}
