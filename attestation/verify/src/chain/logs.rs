//! The logs under a quote, judged the same at enrolment and in rounds: replay before meaning, boot before IMA.

use super::Denial;
use crate::IMA_PCR;
use crate::appraisal::{Accepted, CompiledPolicy, Endorsement, ImaAccepted, ImaAppraisal, appraise};
use crate::bootlog::{self, BootFacts};
use crate::hash::Bank;
use crate::ima::{Checkpoint, Replay};
use ambit_model::{Code, Refusal};
use std::collections::BTreeMap;
use std::sync::Arc;

/// What accepted a machine, and on what grounds.
#[derive(Clone, Debug)]
pub struct Appraised {
    /// Where the policy stands among those asked.
    pub position: usize,
    /// The policy, and which of its rules consumed which events; no events where the boot was appraised before.
    pub boot: Accepted,
    /// What it says of what runs, as far as this evidence shows it.
    pub ima: ImaAccepted,
    /// How far the IMA log was judged.
    pub checkpoint: Checkpoint,
    /// Violations that this evidence records.
    pub violations: usize,
}

/// What a quote covers, beside its logs.
pub(super) struct Quoted<'a> {
    pub(super) pcrs: &'a BTreeMap<u32, Vec<u8>>,
    pub(super) bank: Bank,
    pub(super) endorsement: Endorsement,
}

impl Quoted<'_> {
    /// Judges both logs from their beginnings by the first policy that accepts all of both.
    pub(super) fn whole(
        &self,
        boot_log: &[u8],
        ima_log: &[u8],
        policies: &[Arc<CompiledPolicy>],
    ) -> Result<(BootFacts, Appraised), Denial> {
        let facts = bootlog::judge_any(boot_log, self.bank.hash(), self.pcrs)?;
        let accepted = appraise(policies, self.endorsement, self.pcrs, self.bank, &facts)?;
        let start = Checkpoint::start(self.bank.hash());
        let mut appraised = self.ima(start, ima_log, &accepted.candidates, policies)?;
        appraised.boot = if Arc::ptr_eq(&appraised.ima.policy, &accepted.policy) {
            accepted
        } else {
            let only = [appraised.ima.policy.clone()];
            appraise(&only, self.endorsement, self.pcrs, self.bank, &facts)?
        };
        Ok((facts, appraised))
    }

    /// Judges an IMA log from a checkpoint on by those of `candidates` that accepted the boot.
    pub(super) fn ima(
        &self,
        from: Checkpoint,
        log: &[u8],
        candidates: &[Arc<CompiledPolicy>],
        asked: &[Arc<CompiledPolicy>],
    ) -> Result<Appraised, Denial> {
        let mut appraisal = ImaAppraisal::new(candidates, self.bank, self.pcrs);
        let (ima, violations) = match self.pcrs.get(&IMA_PCR) {
            None => (from, 0),
            Some(quoted) => {
                let mut replay = Replay::resume(self.bank.hash(), quoted, from);
                replay.push(log, &mut |entry| appraisal.entry(entry))?;
                replay.finish()?
            }
        };
        let accepted = appraisal.finish(&ima)?;
        let position = asked.iter().position(|p| Arc::ptr_eq(p, &accepted.policy));
        let none = || Refusal::new(Code::Internal, "a policy that was asked", "another");
        Ok(Appraised {
            position: position.ok_or_else(none)?,
            boot: Accepted { policy: accepted.policy.clone(), consumed: Vec::new(), candidates: Vec::new() },
            ima: accepted,
            checkpoint: ima,
            violations,
        })
    }
}
