//! I20, judged by what really happened: who signed what at which moment, who granted what, and who was told. Nothing here
//! asks the code that is judged, but for its verdict on one leaf.

use crate::oracle::Violation;
use crate::plan::Micros;
use ambit_model::{Code, Refusal, SpiffeId, Stamp, TrustDomain};

/// A leaf of the home's trust domain, as somebody signed it.
#[derive(Clone, Debug)]
pub(super) struct Signed {
    pub(super) id: SpiffeId,
    /// By the home itself, or by the holder.
    pub(super) by_home: bool,
    pub(super) epoch: u64,
    /// Of its entry.
    pub(super) stamp: Stamp,
    pub(super) not_before: Stamp,
    pub(super) not_after: Stamp,
    pub(super) at: Micros,
}

/// A grant that people made, good or not.
#[derive(Clone, Debug)]
pub(super) struct Made {
    pub(super) epoch: u64,
    pub(super) begins: Stamp,
    pub(super) ends: Stamp,
    /// Different people who signed.
    pub(super) people: usize,
    /// Of the holder's record that tells it; none while it was not taken.
    pub(super) told_at: Option<u64>,
}

#[derive(Default)]
pub(super) struct Ledger {
    pub(super) signed: Vec<Signed>,
    pub(super) made: Vec<Made>,
    pub(super) bans: Vec<SpiffeId>,
    /// The home signs under a lease.
    pub(super) witnessed: bool,
}

impl Ledger {
    /// With a witness there is never a signature of an earlier epoch after one of a later: not for a moment do two issue.
    pub(super) fn sign(&mut self, leaf: Signed) -> Result<(), Violation> {
        let later = self.signed.iter().filter(|_| self.witnessed).find(|other| other.epoch > leaf.epoch);
        if let Some(later) = later {
            let found = format!(
                "epoch {} signed {} ms after epoch {} did first, for one trust domain",
                leaf.epoch,
                leaf.at.saturating_sub(later.at) / 1_000,
                later.epoch
            );
            return Err(Violation::of("I20", found));
        }
        self.signed.push(leaf);
        Ok(())
    }

    /// A cell took a grant: two people signed it.
    pub(super) fn taken(&self, cell: &TrustDomain, epoch: u64) -> Result<(), Violation> {
        match self.made.iter().find(|made| made.epoch == epoch && made.told_at.is_some()) {
            Some(made) if made.people >= 2 => Ok(()),
            Some(made) => {
                Err(Violation::of("I20", format!("{cell} took a grant of {} person, of epoch {epoch}", made.people)))
            }
            None => Err(Violation::of("I20", format!("{cell} took a grant of epoch {epoch} that nobody made"))),
        }
    }

    /// Who was told of all grants up to this record of the holder: what it must say of this leaf, and what it said.
    pub(super) fn judged(
        &self,
        who: &TrustDomain,
        told: u64,
        now: Stamp,
        leaf: &Signed,
        verdict: &Result<(), Refusal>,
    ) -> Result<(), Violation> {
        let knows = |made: &&Made| made.told_at.is_some_and(|at| at <= told);
        let after = |made: &&Made| leaf.stamp >= made.begins;
        let older = self.made.iter().filter(knows).filter(after).find(|made| leaf.epoch < made.epoch);
        // A holder that had not heard that the home was back may have been granted the home's own epoch: who had heard takes no
        // such grant, and who had not takes no such leaf.
        let same = self.made.iter().filter(knows).filter(after).any(|made| leaf.epoch == made.epoch);
        let wrong = |what: &str| Violation::of("I20", format!("{who} {what}: {leaf:?}, {verdict:?}"));
        if leaf.by_home {
            return match (older, verdict) {
                (Some(_), Ok(())) => Err(wrong("knows a grant and accepts an older epoch's leaf issued after it")),
                // A second is what times in certificates are rounded to.
                (None, Err(_)) if !same && !self.near(leaf) => {
                    Err(wrong("refuses a leaf of the home that no grant fences"))
                }
                _ => Ok(()),
            };
        }
        let last = self.made.iter().filter(knows).max_by_key(|made| made.epoch);
        let live = last.is_some_and(|made| made.epoch == leaf.epoch && made.begins <= now && now < made.ends);
        match verdict {
            Ok(()) if !live => Err(wrong("accepts a standby's leaf without a live grant that it knows")),
            // It may have been given back; that is told by another record.
            Err(refusal) if live && refusal.code != Code::StandbyUngranted => Err(wrong("refuses the holder")),
            _ => Ok(()),
        }
    }

    fn near(&self, leaf: &Signed) -> bool {
        self.made.iter().any(|made| leaf.stamp.0.abs_diff(made.begins.0) < 1_000)
    }

    /// In the end every cell that hears the home refuses all whom it banned, whatever epoch that was in.
    pub(super) fn bans_are_held(&self, who: &TrustDomain, held: &[SpiffeId]) -> Result<(), Violation> {
        match self.bans.iter().find(|banned| !held.contains(banned)) {
            None => Ok(()),
            Some(lost) => Err(Violation::of("I20", format!("{who} lost the ban of {lost}"))),
        }
    }
}
