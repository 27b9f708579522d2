//! Offline appraisal: a folder of raw files judged as the server judges a node, in the same order.
//!
//! The names are those under `tests/golden/secureboot-grub`. Without a quote nothing ties the logs to a machine: such a
//! folder is judged against its own PCR file, and the answer says so.

mod quoted;
mod reference;
mod roots;

pub use roots::roots_of_pem;

use crate::appraisal::{
    Accepted, CompiledPolicy, Endorsement, ImaAccepted, ImaAppraisal, LearntFile, Rejected, appraise,
};
use crate::bootlog::{self, BootFacts};
use crate::chain::Denial;
use crate::ek::EkClass;
use crate::hash::Bank;
use crate::ima::{self, Checkpoint, ImaFacts};
use crate::{BOOT_LOG_BYTES_MAX, Endorsements, IMA_PCR};
use ambit_model::{Code, Refusal, Stamp};
use std::collections::BTreeMap;
use std::sync::Arc;

/// PCRs that the server asks for: 0-10 and 14.
pub const PCR_MASK: u32 = 0x47ff;

/// The files of one machine, by name.
#[derive(Clone, Debug, Default)]
pub struct Folder {
    files: BTreeMap<String, Vec<u8>>,
}

/// What shall be checked beside the logs.
#[derive(Default)]
pub struct Ask<'a> {
    /// The quote's qualifying data; none: not checked, and said.
    pub nonce: Option<Vec<u8>>,
    /// Roots of EK certificates; none: the EK is not endorsed, and said.
    pub endorsements: Option<&'a Endorsements>,
    /// The class that the roots stand for; none: a policy's rule about classes is not judged.
    pub class: Option<EkClass>,
    /// The time at which certificates must be valid.
    pub now: Stamp,
    /// A boot that diverging events are named by.
    pub reference: Option<&'a Folder>,
}

/// What was checked of the quote and the EK.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checked {
    /// Whether a quote proves the PCRs.
    pub quoted: bool,
    /// Whether the nonce was compared.
    pub nonce: bool,
    /// Whether the AK is known to be under the EK.
    pub signer: bool,
    /// Whether the EK's certificate chains to the roots given.
    pub endorsed: bool,
    /// The bank judged.
    pub bank: Bank,
}

/// What a folder's logs say, proved by its quote.
#[derive(Clone, Debug)]
pub struct Judged {
    /// What was checked.
    pub checked: Checked,
    /// The PCRs.
    pub pcrs: BTreeMap<u32, Vec<u8>>,
    /// What the boot log says.
    pub boot: BootFacts,
    /// What the IMA log says.
    pub ima: ImaFacts,
    /// Its entries, to learn from.
    pub files: Vec<LearntFile>,
}

/// An accepted folder.
#[derive(Clone, Debug)]
pub struct Believed {
    /// The policy that accepts the boot, and which rule consumed which event.
    pub boot: Accepted,
    /// What it says of what runs.
    pub ima: ImaAccepted,
}

/// The answer to an appraisal.
#[derive(Debug)]
pub struct Outcome {
    /// What was checked; none if that failed.
    pub checked: Option<Checked>,
    /// What the logs say, as far as they were believed.
    pub pcrs: BTreeMap<u32, Vec<u8>>,
    /// What the boot log says.
    pub boot: Option<BootFacts>,
    /// What the IMA log says.
    pub ima: Option<ImaFacts>,
    /// Whether a policy accepts.
    pub verdict: Result<Believed, Rejected>,
}

impl Folder {
    /// A folder of these files.
    ///
    /// # Errors
    /// [`Code::BadRequest`] if files are missing that belong together, or a PCR file cannot be read.
    pub fn new(files: BTreeMap<String, Vec<u8>>) -> Result<Folder, Refusal> {
        let folder = Folder { files };
        let parts = ["quote.tpms_attest", "quote.tpmt_signature", "ak.tpmt_public"];
        let missing: Vec<&str> = parts.into_iter().filter(|name| !folder.files.contains_key(*name)).collect();
        // The AK alone is no quote; a quote without its signature or key cannot be judged.
        let has_quote = parts.iter().take(2).any(|name| folder.files.contains_key(*name));
        if has_quote && !missing.is_empty() {
            return Err(bad_folder("a quote with its signature and AK", format!("no {}", missing.join(", "))));
        }
        Ok(folder)
    }

    fn file(&self, name: &str) -> Option<&[u8]> {
        self.files.get(name).map(Vec::as_slice)
    }

    /// The boot log; empty if the machine handed over none.
    pub fn boot_log(&self) -> &[u8] {
        self.file("binary_bios_measurements").unwrap_or_default()
    }

    fn ima_log(&self) -> &[u8] {
        let names = ["ima_binary_runtime_measurements", "binary_runtime_measurements"];
        names.iter().find_map(|name| self.file(name)).unwrap_or_default()
    }

    /// `/proc/cmdline`, which proves nothing by itself.
    pub fn cmdline(&self) -> Option<&str> {
        self.file("cmdline").and_then(|b| std::str::from_utf8(b).ok())
    }

    /// The PCRs of `bank` as the kernel or tpm2-tools showed them: an index and a value a line.
    fn pcr_file(&self, bank: Bank) -> Result<BTreeMap<u32, Vec<u8>>, Refusal> {
        let name = format!("pcrs.{}", bank.as_str());
        let text = self.file(&name).ok_or_else(|| bad_folder(&format!("a file {name}"), "none".to_owned()))?;
        let read = |line: &str| {
            let (n, value) = line.split_once([' ', ':', '\t'])?;
            let value = hex::decode(value.trim()).ok()?;
            Some((n.trim().parse::<u32>().ok()?, value)).filter(|(n, v)| *n < 24 && v.len() == bank.hash().size())
        };
        let text = std::str::from_utf8(text).map_err(|_| bad_folder(&name, "no text".to_owned()))?;
        let lines = text.lines().filter(|l| !l.trim().is_empty());
        let values: Option<BTreeMap<u32, Vec<u8>>> = lines.map(read).collect();
        let values =
            values.ok_or_else(|| bad_folder("a PCR's index and value a line", format!("another text in {name}")))?;
        let asked = (0..24u32).filter(|n| PCR_MASK & (1 << n) != 0);
        let missing: Vec<u32> = asked.filter(|n| !values.contains_key(n)).collect();
        if missing.is_empty() { Ok(values) } else { Err(bad_folder(&name, format!("no PCRs {missing:?}"))) }
    }

    /// Judges everything but a policy: endorsement, quote, logs.
    ///
    /// # Errors
    /// The outer one for a folder that cannot be judged, the inner one for evidence that is refused.
    pub fn judge(&self, ask: &Ask<'_>) -> Result<Result<Judged, Denial>, Refusal> {
        let (checked, pcrs) = match self.prove(ask)? {
            Ok(proved) => proved,
            Err(denial) => return Ok(Err(denial)),
        };
        let logs = || {
            let boot = self.boot_facts(checked.bank, &pcrs)?;
            let mut files = Vec::new();
            let ima = self.ima_facts(checked.bank, &pcrs, &mut |e| files.extend(LearntFile::of(e)))?;
            Ok((boot, ima, files))
        };
        Ok(match logs() {
            Ok((boot, ima, files)) => Ok(Judged { checked, pcrs, boot, ima, files }),
            Err(denial) => Err(self.named_by(ask.reference, checked.bank, denial)),
        })
    }

    /// Judges the folder by `policies`, as the server judges a node of their clusters.
    ///
    /// # Errors
    /// [`Code::BadRequest`] for a folder that cannot be judged.
    pub fn appraise(&self, ask: &Ask<'_>, policies: &[Arc<CompiledPolicy>]) -> Result<Outcome, Refusal> {
        let refused = |denial: Denial| Rejected { policy: None, findings: vec![denial] };
        let mut out =
            Outcome { checked: None, pcrs: BTreeMap::new(), boot: None, ima: None, verdict: Err(refused(unjudged())) };
        let (checked, pcrs) = match self.prove(ask)? {
            Ok(proved) => proved,
            Err(denial) => {
                out.verdict = Err(refused(denial));
                return Ok(out);
            }
        };
        let bank = checked.bank;
        let endorsement = match ask.class.filter(|_| checked.endorsed) {
            Some(class) => Endorsement::Class(class),
            None => Endorsement::NotJudged,
        };
        out.checked = Some(checked);
        out.pcrs.clone_from(&pcrs);
        out.verdict = match self.boot_facts(bank, &pcrs) {
            Err(denial) => Err(refused(denial)),
            Ok(boot) => {
                let boot = out.boot.insert(boot);
                let accepted = appraise(policies, endorsement, &pcrs, bank, boot);
                self.appraise_ima(accepted, policies, &pcrs, bank, &mut out.ima)
            }
        };
        if let Err(rejected) = &mut out.verdict {
            for finding in &mut rejected.findings {
                *finding = self.named_by(ask.reference, bank, finding.clone());
            }
        }
        Ok(out)
    }

    /// Judges what runs by the policies that accept the boot; where none does, by the one that came nearest, so that
    /// its findings are complete.
    fn appraise_ima(
        &self,
        boot: Result<Accepted, Rejected>,
        policies: &[Arc<CompiledPolicy>],
        pcrs: &BTreeMap<u32, Vec<u8>>,
        bank: Bank,
        facts: &mut Option<ImaFacts>,
    ) -> Result<Believed, Rejected> {
        let nearest =
            |r: &Rejected| policies.iter().filter(|p| Some(p.reference()) == r.policy).take(1).cloned().collect();
        let candidates: Vec<_> = match &boot {
            Ok(accepted) => accepted.candidates.clone(),
            Err(rejected) => nearest(rejected),
        };
        let mut appraisal = ImaAppraisal::new(&candidates, bank, pcrs);
        let ima = match self.ima_facts(bank, pcrs, &mut |e| appraisal.entry(e)) {
            Err(denial) => Err(Rejected { policy: None, findings: vec![denial] }),
            Ok(seen) => {
                let end = Checkpoint {
                    offset: seen.bytes,
                    entries: seen.entries as u64,
                    pcr: pcrs.get(&IMA_PCR).cloned().unwrap_or_default(),
                    form: seen.form,
                };
                *facts = Some(seen);
                appraisal.finish(&end)
            }
        };
        match (boot, ima) {
            (Ok(boot), Ok(ima)) => Ok(Believed { boot, ima }),
            (Ok(_), Err(ima)) => Err(ima),
            (Err(mut boot), Ok(_)) => Err({
                boot.findings.truncate(crate::appraisal::FINDINGS_MAX);
                boot
            }),
            (Err(mut boot), Err(ima)) => {
                // Without a policy there is nothing that the IMA part could add.
                if boot.policy.is_some() {
                    boot.findings.extend(ima.findings);
                }
                Err(boot)
            }
        }
    }

    fn boot_facts(&self, bank: Bank, pcrs: &BTreeMap<u32, Vec<u8>>) -> Result<BootFacts, Denial> {
        let log = self.boot_log();
        if log.len() as u64 > BOOT_LOG_BYTES_MAX {
            return Err(
                Refusal::new(Code::EvidenceTooLarge, "a boot log of at most 2 MiB", log.len().to_string()).into()
            );
        }
        bootlog::judge_any(log, bank.hash(), pcrs)
    }

    fn ima_facts(
        &self,
        bank: Bank,
        pcrs: &BTreeMap<u32, Vec<u8>>,
        each: &mut dyn FnMut(&ima::ImaEntry<'_>),
    ) -> Result<ImaFacts, Denial> {
        let quoted = pcrs.get(&IMA_PCR).map(Vec::as_slice).unwrap_or_default();
        ima::judge_each(self.ima_log(), bank.hash(), quoted, each)
    }
}

fn unjudged() -> Denial {
    Refusal::new(Code::EvidenceMalformed, "evidence", "none").into()
}

fn bad_folder(expected: &str, found: String) -> Refusal {
    Refusal::new(Code::BadRequest, expected, found)
}

#[cfg(test)]
mod tests;
