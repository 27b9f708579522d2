//! The audit log as the cell agrees on it: how many records there are and the right edge of their tree. The records
//! themselves are effects: every replica makes the same ones where it applies the entries, and keeps them beside the state.

use crate::committed::Committed;
use crate::state::State;
use ambit_audit::tree::Frontier;
use ambit_audit::{Checkpoint, Hash, verify_consistency};
use ambit_model::{Code, Refusal, Stamp, TrustDomain};
use serde::{Deserialize, Serialize};

/// The log of the cell's incarnation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditRow {
    /// By which rules records are made: 1.
    pub form: u8,
    /// Of which incarnation: a new one has a log of its own.
    pub epoch: u64,
    /// Size and right edge.
    pub frontier: Frontier,
    /// The log of the incarnation before, as far as it came along: epoch, size, root.
    pub before: Option<(u64, u64, Hash)>,
}

/// What this cell cosigned of a peer's log last.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WitnessedRow {
    /// Entries.
    pub size: u64,
    /// Root.
    pub root: Hash,
    /// When it was committed.
    pub stamp: Stamp,
    /// Why the last one shown was refused; empty while they follow from each other.
    pub trouble: String,
}

/// What a peer asks this cell to cosign.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WitnessAsk {
    /// Whose log; its signature over the checkpoint was verified.
    pub peer: TrustDomain,
    /// The incarnation that the log is of.
    pub epoch: u64,
    /// The size that the proof begins at.
    pub old: u64,
    /// Entries.
    pub size: u64,
    /// Root.
    pub root: Hash,
    /// From `old` to `size`.
    pub proof: Vec<Hash>,
}

/// A head of this cell's log that a peer cosigned.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CosignedRow {
    /// Of which incarnation's log.
    pub epoch: u64,
    /// Entries.
    pub size: u64,
    /// Root.
    pub root: Hash,
    /// The signature line (C2SP signed-note), verified before it was committed.
    pub line: String,
}

/// One record, in the order of the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuditEntry {
    /// Of which incarnation's log.
    pub epoch: u64,
    /// Its place there, from 0.
    pub n: u64,
    /// [`ambit_audit::leaf_hash`] of it.
    pub leaf: Hash,
    /// [`ambit_audit::Record`], encoded.
    pub bytes: Vec<u8>,
}

/// The name of the audit log of a cell's incarnation: origin of its checkpoints, and the name of the keys that sign them.
pub fn origin(td: &TrustDomain, epoch: u64) -> String {
    format!("{td}/ambit/audit/{epoch}")
}

impl WitnessedRow {
    /// Whether what a peer shows follows from what was cosigned last.
    ///
    /// # Errors
    /// [`Code::AuditUnwitnessed`].
    pub fn is_followed_by(&self, ask: &WitnessAsk) -> Result<(), Refusal> {
        if ask.size < self.size {
            let expected = format!("at least {} entries", self.size);
            return Err(Refusal::new(Code::AuditUnwitnessed, expected, ask.size.to_string()));
        }
        verify_consistency(self.size, ask.size, &self.root, &ask.root, &ask.proof)
            .map_err(|refusal| Refusal { code: Code::AuditUnwitnessed, ..refusal })
    }
}

/// What is to be done where a peer shows the head of its log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// It is told to prove from this size on.
    From(u64),
    /// It was committed before: it is cosigned again.
    Known,
    /// It is committed, then cosigned or refused.
    Commit,
}

impl State {
    /// What a peer's question is worth: nobody makes entries here by asking again, and which incarnation of a peer is its last
    /// is what a majority of it said, not the replica that asks.
    ///
    /// # Errors
    /// [`Code::StaleRevision`] for the log of another incarnation, [`Code::AuditUnwitnessed`] for a head that does not follow and
    /// is known not to.
    pub fn witness_turn(&self, ask: &WitnessAsk) -> Result<Turn, Refusal> {
        let epoch = self.peer(&ask.peer).map_or(0, |peer| peer.epoch);
        if ask.epoch != epoch {
            let expected = format!("the log of incarnation {epoch}");
            return Err(Refusal::new(Code::StaleRevision, expected, ask.epoch.to_string()));
        }
        let last = self.witnessed_row(&ask.peer, epoch);
        if ask.old != last.size && ask.size >= last.size {
            return Ok(Turn::From(last.size));
        }
        if !last.trouble.is_empty() {
            last.is_followed_by(ask)?;
        } else if ask.size > 0 && (ask.size, ask.root) == (last.size, last.root) {
            return Ok(Turn::Known);
        }
        Ok(Turn::Commit)
    }
    /// What was cosigned last of a peer's log; an empty one where nothing was.
    pub fn witnessed_row(&self, peer: &TrustDomain, epoch: u64) -> WitnessedRow {
        let none = || WitnessedRow { root: ambit_audit::tree::empty_root(), ..WitnessedRow::default() };
        self.witnessed.get(&(peer.clone(), epoch)).cloned().unwrap_or_else(none)
    }
    /// The audit log of this incarnation; none before it was begun.
    pub fn audit(&self) -> Option<&AuditRow> {
        let epoch = self.cell()?.epoch;
        self.audit.get(&0).filter(|row| row.epoch == epoch)
    }
    /// Whether an incarnation began after one that had an audit log: then it is to have one too.
    pub fn audit_is_due(&self) -> bool {
        self.audit().is_none() && self.audit.get(&0).is_some()
    }
    /// The head of the audit log: what a record key may sign.
    pub fn audit_head(&self) -> Option<Committed<Checkpoint>> {
        let (cell, row) = (self.cell()?, self.audit()?);
        let (size, root) = (row.frontier.size(), row.frontier.root());
        Some(Committed::new(Checkpoint { origin: origin(&cell.trust_domain, row.epoch), size, root }))
    }
    /// The head of a peer's log that was committed here last: what a record key may cosign.
    pub fn witnessed_head(&self, peer: &TrustDomain, epoch: u64) -> Option<Committed<Checkpoint>> {
        let row = self.witnessed.get(&(peer.clone(), epoch)).filter(|row| row.trouble.is_empty())?;
        Some(Committed::new(Checkpoint { origin: origin(peer, epoch), size: row.size, root: row.root }))
    }
    /// Heads of the log of this incarnation that peers cosigned, by peer. Any record key may sign them again: they were
    /// committed.
    pub fn cosigned(&self) -> impl Iterator<Item = (&TrustDomain, &CosignedRow, Committed<Checkpoint>)> {
        let now = self.audit().map(|row| row.epoch).zip(self.cell().map(|cell| &cell.trust_domain));
        self.cosigned.iter().filter_map(move |(td, row)| {
            let (_, own) = now.filter(|(epoch, _)| *epoch == row.epoch)?;
            let head = Checkpoint { origin: origin(own, row.epoch), size: row.size, root: row.root };
            Some((td, row, Committed::new(head)))
        })
    }
    /// What this cell cosigned: whose log, of which incarnation.
    pub fn witnessed(&self) -> impl Iterator<Item = (&(TrustDomain, u64), &WitnessedRow)> {
        self.witnessed.iter()
    }
    /// The records made since the last call; whoever applies entries keeps them.
    pub fn take_audited(&mut self) -> Vec<AuditEntry> {
        std::mem::take(&mut self.audited)
    }
}
