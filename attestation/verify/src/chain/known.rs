//! What a round's quote means for a node that was admitted: counters, boot, IMA log (design.md section 3).

use super::logs::{Appraised, Quoted};
use super::{Counters, Denial, Step, Verified};
use crate::appraisal::{CompiledPolicy, Endorsement};
use crate::claims::trust_vector;
use crate::ek::EkClass;
use crate::hash::Bank;
use crate::ima::Checkpoint;
use crate::round::FreshRound;
use ambit_model::{Code, Generation, NodeId, Refusal, TrustVector};
use std::collections::BTreeMap;
use std::sync::Arc;

/// What the cell keeps of a node's last good verdict.
#[derive(Clone, Debug)]
pub struct Before {
    /// As quoted then.
    pub counters: Counters,
    /// SHA-256 over the boot's PCRs.
    pub boot_pcrs_sha256: [u8; 32],
    /// How far the IMA log was judged.
    pub ima: Checkpoint,
    /// What accepted it.
    pub policy: Arc<CompiledPolicy>,
}

/// The logs of a round.
#[derive(Clone, Copy, Debug)]
pub enum RoundLogs<'a> {
    /// Both from their beginnings.
    Whole {
        /// The boot log.
        boot_log: &'a [u8],
        /// The IMA log.
        ima_log: &'a [u8],
    },
    /// The IMA log from where it was judged last; nothing of the boot, which must be the one known.
    Grown {
        /// The IMA log from there.
        ima_log: &'a [u8],
    },
}

/// What a good round says of a node at one instant.
#[derive(Clone, Debug)]
pub struct RoundEvidence {
    /// The node.
    pub node: NodeId,
    /// Its generation.
    pub generation: Generation,
    /// As quoted.
    pub counters: Counters,
    /// As quoted.
    pub firmware_version: u64,
    /// The bank quoted.
    pub bank: Bank,
    /// The quoted PCRs, exactly those asked for.
    pub pcrs: BTreeMap<u32, Vec<u8>>,
    /// SHA-256 over the boot's PCRs.
    pub boot_pcrs_sha256: [u8; 32],
    /// What is claimed of the machine; of files, what this round's part of the log shows.
    pub trust: TrustVector,
    /// What accepted it.
    pub appraised: Appraised,
}

impl FreshRound {
    /// Judges what was quoted. `boot_log_missing` where the TPM did not run on from the last round (it was reset, or
    /// resumed with PCRs that may have begun anew) or the boot's PCRs are others: then the whole logs are wanted.
    ///
    /// # Errors
    /// [`Code::TpmStateForked`] for counters that step back; what the replays and the policies find.
    pub fn appraise(
        self,
        before: &Before,
        class: EkClass,
        logs: RoundLogs<'_>,
        policies: &[Arc<CompiledPolicy>],
    ) -> Result<Verified<RoundEvidence>, Denial> {
        let counters = self.counters();
        let ran_on = counters.step_from(&before.counters)? == Step::Ran;
        let boot_pcrs_sha256 = self.boot_pcrs_sha256();
        let endorsement = Endorsement::Class(class);
        let quoted = Quoted { pcrs: self.pcrs(), bank: self.bank(), endorsement };
        let appraised = match logs {
            RoundLogs::Whole { boot_log, ima_log } => quoted.whole(boot_log, ima_log, policies)?.1,
            // Of a boot not seen before nothing is taken for known, whatever its PCRs are.
            RoundLogs::Grown { .. } if !ran_on || boot_pcrs_sha256 != before.boot_pcrs_sha256 => {
                let refusal = Refusal::new(Code::BootLogMissing, "the log of this boot", "another boot");
                return Err(Denial::at(refusal, "the boot's PCRs"));
            }
            RoundLogs::Grown { ima_log } => {
                quoted.ima(before.ima.clone(), ima_log, std::slice::from_ref(&before.policy), policies)?
            }
        };
        Ok(Verified(RoundEvidence {
            node: self.node(),
            generation: self.generation(),
            counters,
            firmware_version: self.firmware_version(),
            bank: self.bank(),
            pcrs: self.pcrs().clone(),
            boot_pcrs_sha256,
            trust: trust_vector(Some(class), Some((&appraised.boot, &appraised.ima))),
            appraised,
        }))
    }
}
