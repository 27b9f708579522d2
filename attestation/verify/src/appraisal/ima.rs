//! What runs: each IMA entry judged by the policies that accepted the boot.

use super::{CompiledPolicy, FINDINGS_MAX, Rejected, no_policy};
use crate::chain::Denial;
use crate::hash::Bank;
use crate::ima::{Checkpoint, ImaEntry, ImaForm};
use ambit_model::{Code, Refusal};
use std::collections::BTreeMap;
use std::sync::Arc;

/// The name of IMA's first entry (security/integrity/ima/ima_init.c).
const BOOT_AGGREGATE: &[u8] = b"boot_aggregate";

/// What IMA's first entry must be: a digest over the PCRs of the boot it belongs to (ima_crypto.c,
/// ima_calc_boot_aggregate_tfm: PCRs 0-7, and from Linux 5.8 also 8 and 9).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootAggregate {
    bank: Bank,
    values: Vec<Vec<u8>>,
}

impl BootAggregate {
    /// From the quoted PCRs of `bank`. Without all of PCRs 0-9 nothing can be said.
    pub fn of(bank: Bank, pcrs: &BTreeMap<u32, Vec<u8>>) -> BootAggregate {
        let over = |last: u32| {
            let parts: Option<Vec<&[u8]>> = (0..=last).map(|n| pcrs.get(&n).map(Vec::as_slice)).collect();
            parts.map(|parts| bank.hash().digest(&parts))
        };
        BootAggregate { bank, values: [over(7), over(9)].into_iter().flatten().collect() }
    }

    /// Whether the entry can be of this boot. One in another bank's hash cannot be compared.
    fn admits(&self, entry: &ImaEntry<'_>) -> bool {
        if entry.algorithm != self.bank.as_str() || self.values.is_empty() {
            return entry.number == 1;
        }
        self.values.iter().any(|v| v == entry.digest)
    }
}

/// How an entry passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImaVerdict {
    /// The policy has no rules about what runs.
    NotJudged,
    /// The boot aggregate, or a file that a list allows.
    Listed,
    /// A path that the policy excepts, or a violation that it tolerates.
    Excepted,
}

impl CompiledPolicy {
    /// Judges one entry, which the caller's replay shows to be covered by a quote.
    ///
    /// # Errors
    /// [`Code::ImaViolation`], [`Code::ImaWeakDigest`], [`Code::ImaFileNotAllowed`]; [`Code::ImaLogMismatch`] for the
    /// aggregate of another boot.
    pub fn judge_ima_entry(&self, entry: &ImaEntry<'_>, boot: &BootAggregate) -> Result<ImaVerdict, Denial> {
        let Some(rules) = &self.policy.ima else { return Ok(ImaVerdict::NotJudged) };
        let deny = |code, expected: &str, found: String| {
            let place = entry.place();
            Err(Denial::at(Refusal::new(code, format!("{place}: {expected}"), found), place))
        };
        let digest = || format!("{}:{}", entry.algorithm, hex::encode(entry.digest));
        // PCR 10 holds ones for a violation whatever its path says: no list and no exception may read that path.
        if entry.violation {
            return match rules.violations_tolerated {
                true => Ok(ImaVerdict::Excepted),
                false => deny(Code::ImaViolation, "no violation", "a file changed while it was measured".to_owned()),
            };
        }
        if entry.path == BOOT_AGGREGATE {
            return if boot.admits(entry) {
                Ok(ImaVerdict::Listed)
            } else {
                deny(Code::ImaLogMismatch, "the aggregate of the quoted PCRs 0-9", digest())
            };
        }
        let path = entry.path_text();
        // A verity digest is of a tree of blocks: no list of file digests speaks of it.
        let strong = matches!(entry.algorithm, "sha256" | "sha384" | "sha512");
        if strong && self.lists().any(|list| list.contains(entry.digest, &path)) {
            return Ok(ImaVerdict::Listed);
        }
        if self.exceptions.iter().any(|e| e.is_match(&path)) {
            return Ok(ImaVerdict::Excepted);
        }
        if matches!(entry.algorithm, "sha1" | "md5") {
            deny(Code::ImaWeakDigest, "a SHA-256, SHA-384 or SHA-512 digest", digest())
        } else {
            deny(Code::ImaFileNotAllowed, "a digest that an allow-list holds for this path", digest())
        }
    }

    fn lists(&self) -> impl Iterator<Item = &super::AllowList> {
        self.allow_lists.iter().map(Arc::as_ref).chain([&self.own_files])
    }
}

/// What an accepted IMA log said.
#[derive(Clone, Debug)]
pub struct ImaAccepted {
    /// The first policy that accepts all of it.
    pub policy: Arc<CompiledPolicy>,
    /// Whether that policy has rules about what runs.
    pub is_judged: bool,
    /// Entries that a list allows.
    pub listed: u64,
    /// Entries that only an exception of the policy lets pass.
    pub excepted: u64,
}

struct Candidate {
    policy: Arc<CompiledPolicy>,
    findings: Vec<Denial>,
    listed: u64,
    excepted: u64,
}

/// The judgement of a log under way, entry by entry, by every policy that may accept it.
pub struct ImaAppraisal {
    boot: BootAggregate,
    candidates: Vec<Candidate>,
}

impl ImaAppraisal {
    /// A judgement by `policies`, which all accept the boot whose PCRs are `pcrs`.
    pub fn new(policies: &[Arc<CompiledPolicy>], bank: Bank, pcrs: &BTreeMap<u32, Vec<u8>>) -> ImaAppraisal {
        let candidate = |policy: &Arc<CompiledPolicy>| Candidate {
            policy: policy.clone(),
            findings: Vec::new(),
            listed: 0,
            excepted: 0,
        };
        ImaAppraisal { boot: BootAggregate::of(bank, pcrs), candidates: policies.iter().map(candidate).collect() }
    }

    /// Judges the next entry. Nothing is said before [`ImaAppraisal::finish`], since only then a quote covers it.
    pub fn entry(&mut self, entry: &ImaEntry<'_>) {
        for candidate in &mut self.candidates {
            match candidate.policy.judge_ima_entry(entry, &self.boot) {
                Ok(ImaVerdict::NotJudged) => {}
                Ok(ImaVerdict::Listed) => candidate.listed = candidate.listed.saturating_add(1),
                Ok(ImaVerdict::Excepted) => candidate.excepted = candidate.excepted.saturating_add(1),
                Err(denial) if candidate.findings.len() < FINDINGS_MAX => candidate.findings.push(denial),
                Err(_) => {}
            }
        }
    }

    /// The answer, once a replay of the same entries ended at `end`.
    ///
    /// # Errors
    /// What the policy with the fewest findings found; [`Code::AppraisalPolicyMissing`] without any.
    pub fn finish(self, end: &Checkpoint) -> Result<ImaAccepted, Rejected> {
        let mut nearest: Option<Rejected> = None;
        for mut candidate in self.candidates {
            let is_judged = candidate.policy.policy.ima.is_some();
            if let Some(wrong) = whole_log(end).filter(|_| is_judged) {
                candidate.findings.insert(0, wrong.into());
            }
            let Candidate { policy, findings, listed, excepted } = candidate;
            if findings.is_empty() {
                return Ok(ImaAccepted { policy, is_judged, listed, excepted });
            }
            if nearest.as_ref().is_none_or(|n| findings.len() < n.findings.len()) {
                nearest = Some(Rejected { policy: Some(policy.reference()), findings });
            }
        }
        Err(nearest.unwrap_or_else(|| Rejected { policy: None, findings: vec![no_policy().into()] }))
    }
}

/// What is wrong with a log as a whole. IMA without a policy measures its boot aggregate and nothing more.
fn whole_log(end: &Checkpoint) -> Option<Refusal> {
    if end.entries <= 1 {
        let found = format!("{} entries: nothing that runs is measured", end.entries);
        return Some(Refusal::new(Code::ImaLogMissing, "an IMA log", found));
    }
    if end.form == ImaForm::PaddedSha1 {
        let found = "this bank holds padded SHA-1 digests";
        return Some(Refusal::new(Code::ImaWeakDigest, "PCR 10 extended in the hash of its bank", found));
    }
    None
}
