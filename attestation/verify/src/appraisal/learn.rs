//! A policy from one machine's facts: it accepts this boot and machines that boot the same way.
//!
//! It is as general as it can be without trusting more: Secure Boot variables, authorities and images by what they
//! contain, commands by their text, and golden values only where the log explains nothing better. What differs between
//! two machines of one kind (PCR 1: boot order and hardware; PCR 5: the disk's partitions) is left unpoliced, and said.

use super::boot::describe;
use super::compiled::stub_digests;
use crate::EkClass;
use crate::bootlog::{BootFacts, Fact, Measured, SecureBootVariable, SignatureEntry};
use crate::hash::{Bank, sha256};
use crate::ima::{ImaEntry, ImaForm};
use ambit_model::appraisal::{
    AppraisalPolicy, Digests, HexDigest, ImaFile, ImaRules, KeyVariable, POLICED_PCRS, PcrBank,
};
use ambit_model::{ClusterId, ObjectName};
use std::collections::{BTreeMap, BTreeSet};

/// Files written into the policy itself where no list was asked for.
const INLINE_FILES_MAX: usize = 500;

/// One entry of the IMA log, to learn from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LearntFile {
    pub(super) algorithm: String,
    pub(super) digest: Vec<u8>,
    path: String,
    violation: bool,
}

impl LearntFile {
    /// What `entry` teaches; nothing if it is the boot aggregate, which is checked against the PCRs instead.
    pub fn of(entry: &ImaEntry<'_>) -> Option<LearntFile> {
        (entry.path != b"boot_aggregate").then(|| LearntFile {
            algorithm: entry.algorithm.to_owned(),
            digest: entry.digest.to_vec(),
            path: entry.path_text(),
            violation: entry.violation,
        })
    }
}

/// What to learn from.
pub struct Source<'a> {
    /// The policy's name.
    pub name: ObjectName,
    /// The clusters it shall govern.
    pub clusters: BTreeSet<ClusterId>,
    /// What vouches for the machine's TPM, if that is known.
    pub class: Option<EkClass>,
    /// The bank judged.
    pub bank: Bank,
    /// Its PCRs.
    pub pcrs: &'a BTreeMap<u32, Vec<u8>>,
    /// What the boot log says.
    pub boot: &'a BootFacts,
    /// `/proc/cmdline`, believed only if the EFI stub's digest proves it.
    pub cmdline: Option<&'a str>,
    /// Entries of the IMA log.
    pub ima: &'a [LearntFile],
    /// How IMA extended PCR 10.
    pub ima_form: ImaForm,
    /// Whether the files shall stand in a list of their own.
    pub separate_list: bool,
}

/// A learnt policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Learnt {
    /// The policy.
    pub policy: AppraisalPolicy,
    /// Remarks, by the value (as it is written) or the field that they explain.
    pub comments: BTreeMap<String, String>,
    /// The text of the allow-list that the policy names, if one was asked for.
    pub allow_list: Option<String>,
    /// What of the machine the policy will refuse.
    pub warnings: Vec<String>,
}

/// Learns a policy.
pub fn learn(source: &Source<'_>) -> Learnt {
    let mut learner = Learner {
        policy: AppraisalPolicy::new(source.name.clone(), source.clusters.clone()),
        comments: BTreeMap::new(),
        allow_list: None,
        warnings: Vec::new(),
        source,
    };
    if let Some(class) = source.class {
        learner.policy.endorsement = BTreeSet::from([class.into()]);
    }
    learner.policy.secure_boot_any = source.boot.secure_boot != Some(true);
    if source.boot.has_log {
        learner.boot();
    } else {
        learner.without_log();
    }
    learner.ima();
    let Learner { policy, comments, allow_list, warnings, .. } = learner;
    Learnt { policy, comments, allow_list, warnings }
}

struct Learner<'a> {
    source: &'a Source<'a>,
    policy: AppraisalPolicy,
    comments: BTreeMap<String, String>,
    allow_list: Option<String>,
    warnings: Vec<String>,
}

impl Learner<'_> {
    fn without_log(&mut self) {
        self.policy.boot_log_optional = true;
        self.comment("bootLog", "the firmware hands over none: only golden values can tell");
        let judged: Vec<u32> = POLICED_PCRS.into_iter().collect();
        for pcr in judged {
            self.golden(pcr);
        }
    }

    fn boot(&mut self) {
        let measured: Vec<&Measured> = self.source.boot.measured.iter().collect();
        let mut whole = BTreeSet::new();
        for event in measured {
            if self.is_machines_own(event) {
                self.policy.unpoliced.insert(event.pcr);
            } else if !self.event(event) {
                whole.insert(event.pcr);
            }
        }
        for pcr in whole {
            if !self.policy.unpoliced.contains(&pcr) {
                self.golden(pcr);
            }
        }
        for pcr in self.policy.unpoliced.clone() {
            let why = match pcr {
                1 => "boot order, hardware and settings of this very machine",
                5 => "the partition table of this very machine",
                _ => "the maker's data of this very machine",
            };
            self.comment(&format!("unpoliced.{pcr}"), why);
        }
    }

    /// What no two machines share, and what decides nothing about which code runs.
    fn is_machines_own(&self, event: &Measured) -> bool {
        let explained = matches!(event.fact, Fact::Separator | Fact::Action(_));
        matches!(event.pcr, 1 | 5 | 6) && !explained
    }

    /// Adds what lets `event` pass; false if only a golden value can.
    fn event(&mut self, event: &Measured) -> bool {
        match &event.fact {
            Fact::Separator | Fact::SecureBoot(_) => {}
            Fact::Action(_) if matches!(event.pcr, 4 | 5) => {}
            Fact::Keys { variable, entries } => self.keys(*variable, entries),
            Fact::SbatLevel(level) => {
                self.policy.sbat_level = Some(level.clone());
            }
            Fact::Authority { variable, entry } => {
                self.entry_comment(entry, variable);
                self.policy.authorities.get_or_insert_default().extend(HexDigest::new(entry.sha256));
            }
            Fact::Image { label } if event.pcr == 4 => {
                let images = self.policy.images.get_or_insert_default();
                images.extend(HexDigest::new(event.digest.clone()));
                self.comment(&hex::encode(&event.digest), if label.is_empty() { "loaded from memory" } else { label });
            }
            Fact::File { label } => {
                self.policy.files.get_or_insert_default().extend(HexDigest::new(event.digest.clone()));
                self.comment(&hex::encode(&event.digest), label);
            }
            Fact::Mok { label } => {
                self.policy.mok.get_or_insert_default().extend(HexDigest::new(event.digest.clone()));
                self.comment(&hex::encode(&event.digest), label);
            }
            Fact::GrubCommand(text) => {
                self.policy.grub_commands.get_or_insert_default().insert(regex::escape(text));
            }
            Fact::CommandLine(text) => {
                self.policy.command_line.get_or_insert_default().exact.insert(text.clone());
            }
            Fact::LoadOptions => self.load_options(event),
            // Beside events that rules explain, one that none does is better named than hidden in a golden value.
            Fact::Action(_) | Fact::Variable { .. } | Fact::Image { .. } | Fact::Opaque => {
                let mixed = matches!(event.pcr, 4 | 7 | 8 | 9 | 14);
                if mixed {
                    self.named(event, &describe(event));
                }
                return mixed;
            }
        }
        true
    }

    fn named(&mut self, event: &Measured, why: &str) {
        self.policy.events.entry(event.pcr).or_default().extend(HexDigest::new(event.digest.clone()));
        self.comment(&hex::encode(&event.digest), why);
    }

    fn keys(&mut self, variable: SecureBootVariable, entries: &[SignatureEntry]) {
        let key = match variable {
            SecureBootVariable::Pk => Some(KeyVariable::Pk),
            SecureBootVariable::Kek => Some(KeyVariable::Kek),
            SecureBootVariable::Db => Some(KeyVariable::Db),
            SecureBootVariable::Dbx => None,
        };
        let digests: Digests = entries.iter().filter_map(|e| HexDigest::new(e.sha256)).collect();
        match key {
            Some(key) => {
                entries.iter().for_each(|e| self.entry_comment(e, variable.as_str()));
                self.policy.keys.insert(key, digests);
            }
            None => self.policy.dbx_includes = Some(digests),
        }
    }

    /// The stub's log holds no text: `/proc/cmdline` is one if its digest is the one measured.
    fn load_options(&mut self, event: &Measured) {
        let shown = self.source.cmdline.map(|c| c.trim_end_matches('\n'));
        match shown.filter(|text| stub_digests(text).contains(&event.digest)) {
            Some(text) => {
                self.policy.command_line.get_or_insert_default().exact.insert(text.to_owned());
            }
            None => self.named(event, "the kernel's load options, whose text is not known"),
        }
    }

    fn golden(&mut self, pcr: u32) {
        let bank = match self.source.bank {
            Bank::Sha256 => PcrBank::Sha256,
            Bank::Sha384 => PcrBank::Sha384,
        };
        if let Some(value) = self.source.pcrs.get(&pcr).and_then(|v| HexDigest::new(v.clone())) {
            self.policy.pcrs.entry(bank).or_default().entry(pcr).or_default().insert(value);
        }
    }

    fn ima(&mut self) {
        if self.source.ima.is_empty() {
            self.comment("ima", "nothing that runs is measured on this machine, so nothing of it is judged");
            return;
        }
        if self.source.ima_form == ImaForm::PaddedSha1 {
            self.comment("ima", "not judged: this bank holds padded SHA-1; quote the sha256 bank");
            return;
        }
        let mut rules = ImaRules::default();
        let mut weak = 0usize;
        for file in self.source.ima {
            if file.violation {
                rules.violations_tolerated = true;
                self.comment("ima.violations", &format!("{} changed while it was measured", file.path));
                continue;
            }
            let digest = HexDigest::new(file.digest.clone());
            let strong = matches!(file.algorithm.as_str(), "sha256" | "sha384" | "sha512");
            match digest {
                Some(digest) if strong => {
                    rules.files.insert(ImaFile { digest, path: Some(file.path.clone()) });
                }
                // No list may hold it, and an exception would let any file of that path pass.
                _ => weak = weak.saturating_add(1),
            }
        }
        if weak > 0 {
            let warning = format!(
                "{weak} files are measured with a weak hash and will be refused: boot with ima_hash=sha256, then learn again"
            );
            self.comment("ima", &warning);
            self.warnings.push(warning);
        }
        if self.source.separate_list || rules.files.len() > INLINE_FILES_MAX {
            let line = |f: &ImaFile| format!("{} {}\n", f.digest, f.path.as_deref().unwrap_or("*"));
            let text: String = rules.files.iter().map(line).collect();
            rules.allow_lists.insert(sha256(text.as_bytes()));
            rules.files.clear();
            self.allow_list = Some(text);
        }
        self.policy.ima = Some(rules);
    }

    fn entry_comment(&mut self, entry: &SignatureEntry, variable: &str) {
        let text = entry.subject.clone().unwrap_or_else(|| variable.to_owned());
        self.comment(&hex::encode(entry.sha256), &text);
    }

    fn comment(&mut self, at: &str, text: &str) {
        self.comments.entry(at.to_owned()).or_insert_with(|| text.to_owned());
    }
}
