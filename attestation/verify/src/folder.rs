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
use crate::{BOOT_LOG_BYTES_MAX, Endorsements, IMA_LOG_BYTES_MAX, IMA_PCR};
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

/// Names that mean something in a folder, beside `ek*.der`, the certificates of EKs.
const NAMES: [&str; 9] = [
    "quote.tpms_attest",
    "quote.tpmt_signature",
    "ak.tpmt_public",
    "ek.tpm2b_public",
    "binary_bios_measurements",
    IMA_NAMES[0],
    IMA_NAMES[1],
    "cmdline",
    "pcrs.sha256",
];
/// The IMA log, as the golden folders and as the kernel name it.
const IMA_NAMES: [&str; 2] = ["ima_binary_runtime_measurements", "binary_runtime_measurements"];

impl Folder {
    /// A folder of these files.
    pub fn new(files: BTreeMap<String, Vec<u8>>) -> Folder {
        Folder { files }
    }

    /// Whether a file of this name means something; others need not be read.
    pub fn means(name: &str) -> bool {
        NAMES.contains(&name) || name == "pcrs.sha384" || (name.starts_with("ek") && name.ends_with(".der"))
    }

    fn file(&self, name: &str) -> Option<&[u8]> {
        self.files.get(name).map(Vec::as_slice)
    }

    /// The boot log; empty if the machine handed over none.
    pub fn boot_log(&self) -> &[u8] {
        self.file("binary_bios_measurements").unwrap_or_default()
    }

    fn ima_log(&self) -> &[u8] {
        IMA_NAMES.iter().find_map(|name| self.file(name)).unwrap_or_default()
    }

    /// `/proc/cmdline`, which proves nothing by itself.
    pub fn cmdline(&self) -> Option<&str> {
        self.file("cmdline").and_then(|b| std::str::from_utf8(b).ok())
    }

    /// The PCRs of `bank` as the kernel or tpm2-tools showed them: an index and a value a line.
    fn pcr_file(&self, bank: Bank) -> Result<BTreeMap<u32, Vec<u8>>, Refusal> {
        let name = format!("pcrs.{}", bank.as_str());
        let text = self.file(&name).ok_or_else(|| incomplete(format!("a file {name}"), "none"))?;
        let read = |line: &str| {
            let (n, value) = line.split_once([' ', ':', '\t'])?;
            let value = hex::decode(value.trim()).ok()?;
            Some((n.trim().parse::<u32>().ok()?, value)).filter(|(n, v)| *n < 24 && v.len() == bank.hash().size())
        };
        let lines = || incomplete(format!("in {name}: a PCR's index and value a line, each once"), "another text");
        let text = std::str::from_utf8(text).map_err(|_| lines())?;
        let mut values = BTreeMap::new();
        for line in text.lines().filter(|l| !l.trim().is_empty()) {
            let (n, value) = read(line).ok_or_else(lines)?;
            if values.insert(n, value).is_some() {
                return Err(lines());
            }
        }
        let asked = (0..24u32).filter(|n| PCR_MASK & (1 << n) != 0);
        let missing: Vec<u32> = asked.filter(|n| !values.contains_key(n)).collect();
        if missing.is_empty() { Ok(values) } else { Err(incomplete(name, &format!("no PCRs {missing:?}"))) }
    }

    /// Judges everything but a policy: endorsement, quote, logs.
    ///
    /// # Errors
    /// [`Code::EvidenceMalformed`] for files that are missing or cannot be read, or the check that refused.
    pub fn judge(&self, ask: &Ask<'_>) -> Result<Judged, Denial> {
        let (checked, pcrs) = self.prove(ask)?;
        let logs = || {
            let boot = self.boot_facts(checked.bank, &pcrs)?;
            let mut files = Vec::new();
            let ima = self.ima_facts(checked.bank, &pcrs, &mut |e| files.extend(LearntFile::of(e)))?;
            Ok((boot, ima, files))
        };
        match logs() {
            Ok((boot, ima, files)) => Ok(Judged { checked, pcrs, boot, ima, files }),
            Err(denial) => Err(self.named_by(ask.reference, checked.bank, denial)),
        }
    }

    /// Judges the folder by `policies`, as the server judges a node of their clusters.
    pub fn appraise(&self, ask: &Ask<'_>, policies: &[Arc<CompiledPolicy>]) -> Outcome {
        let refused = |denial: Denial| Rejected { policy: None, findings: vec![denial] };
        let mut out =
            Outcome { checked: None, pcrs: BTreeMap::new(), boot: None, ima: None, verdict: Err(refused(unjudged())) };
        let (checked, pcrs) = match self.prove(ask) {
            Ok(proved) => proved,
            Err(denial) => {
                out.verdict = Err(refused(denial));
                return out;
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
        out
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
        fits(log, BOOT_LOG_BYTES_MAX, "a boot log of at most 2 MiB")?;
        bootlog::judge_any(log, bank.hash(), pcrs)
    }

    fn ima_facts(
        &self,
        bank: Bank,
        pcrs: &BTreeMap<u32, Vec<u8>>,
        each: &mut dyn FnMut(&ima::ImaEntry<'_>),
    ) -> Result<ImaFacts, Denial> {
        let quoted = pcrs.get(&IMA_PCR).map(Vec::as_slice).unwrap_or_default();
        let log = self.ima_log();
        fits(log, IMA_LOG_BYTES_MAX, "an IMA log of at most 64 MiB")?;
        ima::judge_each(log, bank.hash(), quoted, each)
    }
}

fn unjudged() -> Denial {
    Refusal::new(Code::EvidenceMalformed, "evidence", "none").into()
}

fn incomplete(expected: String, found: &str) -> Refusal {
    Refusal::new(Code::EvidenceMalformed, expected, found)
}

/// As the server, which refuses by the length stated before it reads.
fn fits(log: &[u8], max: u64, expected: &str) -> Result<(), Refusal> {
    let len = log.len() as u64;
    if len <= max {
        Ok(())
    } else {
        Err(Refusal::new(Code::EvidenceTooLarge, expected, format!("{len} bytes or more")))
    }
}

#[cfg(test)]
mod tests;
