//! The logs under a quote, judged the same at enrolment and in rounds: replay before meaning, boot before IMA.

use super::Denial;
use crate::IMA_PCR;
use crate::appraisal::{CompiledPolicy, Consumed, Endorsement, ImaAppraisal, appraise};
use crate::bootlog::{self, BootFacts};
use crate::hash::Bank;
use crate::ima::{Checkpoint, Replay};
use ambit_model::{Code, Refusal};
use std::collections::BTreeMap;
use std::sync::Arc;

/// What accepted a machine, and on what grounds.
#[derive(Clone, Debug)]
pub struct Appraised {
    /// The policy, as one of those asked.
    pub policy: Arc<CompiledPolicy>,
    /// Where it stands among those asked.
    pub position: usize,
    /// Which of its rules consumed which events of the boot log; empty where the boot was appraised in a round before.
    pub consumed: Vec<Consumed>,
    /// How far the IMA log was judged.
    pub ima: Checkpoint,
    /// Whether the policy has rules about what runs.
    pub ima_judged: bool,
    /// IMA entries of this evidence that a list allows.
    pub ima_listed: u64,
    /// IMA entries of this evidence that only an exception of the policy lets pass.
    pub ima_excepted: u64,
    /// Violations that this evidence records.
    pub ima_violations: usize,
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
        if Arc::ptr_eq(&appraised.policy, &accepted.policy) {
            appraised.consumed = accepted.consumed;
        } else {
            let only = [appraised.policy.clone()];
            appraised.consumed = appraise(&only, self.endorsement, self.pcrs, self.bank, &facts)?.consumed;
        }
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
            policy: accepted.policy,
            consumed: Vec::new(),
            ima,
            ima_judged: accepted.is_judged,
            ima_listed: accepted.listed,
            ima_excepted: accepted.excepted,
            ima_violations: violations,
        })
    }
}
