//! Evidence that was judged before and kept: asked again, or under another policy. What it says was proved once, when its
//! quote was fresh; here nothing is proved, so that nothing made here admits anybody.

use super::Denial;
use super::logs::{Appraised, Quoted};
use crate::appraisal::{CompiledPolicy, Endorsement, Learnt, LearntFile, Source, learn};
use crate::bootlog;
use crate::ek::EkClass;
use crate::hash::Bank;
use crate::ima::{Checkpoint, Replay};
use crate::{IMA_PCR, ima::ImaForm};
use ambit_model::{ClusterId, Code, ObjectName, Refusal};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Kept evidence of one node.
#[derive(Clone, Debug)]
pub struct KeptEvidence {
    class: EkClass,
    bank: Bank,
    pcrs: BTreeMap<u32, Vec<u8>>,
    boot_log: Vec<u8>,
    ima_log: Vec<u8>,
}

impl KeptEvidence {
    /// From its stored parts; `class` and `bank` by their names.
    pub fn new(
        class: &str,
        bank: &str,
        pcrs: BTreeMap<u32, Vec<u8>>,
        boot_log: Vec<u8>,
        ima_log: Vec<u8>,
    ) -> Result<KeptEvidence, Refusal> {
        let unknown =
            |what: &str, found: &str| Refusal::new(Code::BlobMissing, format!("evidence of a known {what}"), found);
        Ok(KeptEvidence {
            class: EkClass::from_text(class).ok_or_else(|| unknown("EK class", class))?,
            bank: Bank::from_text(bank).ok_or_else(|| unknown("bank", bank))?,
            pcrs,
            boot_log,
            ima_log,
        })
    }

    /// What these policies say of it.
    pub fn appraise(&self, policies: &[Arc<CompiledPolicy>]) -> Result<Appraised, Denial> {
        let quoted = Quoted { pcrs: &self.pcrs, bank: self.bank, endorsement: Endorsement::Class(self.class) };
        quoted.whole(&self.boot_log, &self.ima_log, policies).map(|(_, appraised)| appraised)
    }

    /// A policy that accepts exactly this machine as it was.
    pub fn learn(&self, name: &ObjectName, cluster: &ClusterId) -> Result<Learnt, Denial> {
        let boot = bootlog::judge_any(&self.boot_log, self.bank.hash(), &self.pcrs)?;
        let mut files = Vec::new();
        let mut form = ImaForm::Nothing;
        if let Some(quoted) = self.pcrs.get(&IMA_PCR) {
            let mut replay = Replay::resume(self.bank.hash(), quoted, Checkpoint::start(self.bank.hash()));
            replay.push(&self.ima_log, &mut |entry| files.extend(LearntFile::of(entry)))?;
            form = replay.finish()?.0.form;
        }
        Ok(learn(&Source {
            name: name.clone(),
            clusters: BTreeSet::from([cluster.clone()]),
            class: Some(self.class),
            bank: self.bank,
            pcrs: &self.pcrs,
            boot: &boot,
            cmdline: None,
            ima: &files,
            ima_form: form,
            separate_list: true,
        }))
    }
}
