//! Appraisal: whether what a machine measured is what a policy lets it be (RFC 9334, appraisal of evidence).
//!
//! Default deny: each event that extended a policed PCR must be consumed by one rule of the policy, and the answer says
//! which consumed which. Nothing here is judged before the quote proved it: facts come from [`crate::bootlog`] and
//! entries from [`crate::ima`].

mod allow_list;
mod boot;
mod compiled;
mod ima;
mod learn;

pub use allow_list::{ALLOW_LIST_BYTES_MAX, AllowList};
pub use compiled::CompiledPolicy;
pub use ima::{BootAggregate, ImaAccepted, ImaAppraisal, ImaVerdict};
pub use learn::{Learnt, LearntFile, Source, learn};

use crate::bootlog::BootFacts;
use crate::chain::Denial;
use crate::ek::EkClass;
use crate::hash::Bank;
use ambit_model::appraisal::EndorsementClass;
use ambit_model::{Code, Refusal};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Findings kept of one policy: enough to mend it, bounded against a log made to fail.
pub(crate) const FINDINGS_MAX: usize = 64;

/// What is known of the EK when a policy is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endorsement {
    /// It was endorsed, by this class of root.
    Class(EkClass),
    /// Nobody asked. Only an offline appraisal may say so, and its answer repeats it.
    NotJudged,
}

impl From<EkClass> for EndorsementClass {
    fn from(class: EkClass) -> EndorsementClass {
        match class {
            EkClass::Hardware => EndorsementClass::Hardware,
            EkClass::Virtual => EndorsementClass::Virtual,
            EkClass::Lab => EndorsementClass::Lab,
            EkClass::Listed => EndorsementClass::Listed,
        }
    }
}

/// The events that one rule consumed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Consumed {
    /// The rule, as the policy's YAML names it.
    pub rule: String,
    /// Numbers of the events, ascending.
    pub events: Vec<usize>,
}

/// A boot that a policy accepts.
#[derive(Clone, Debug)]
pub struct Accepted {
    /// The first policy that accepts it.
    pub policy: Arc<CompiledPolicy>,
    /// Which of its rules consumed which events.
    pub consumed: Vec<Consumed>,
    /// Every policy that accepts it, in the order asked: what runs must please one of these.
    pub candidates: Vec<Arc<CompiledPolicy>>,
}

/// A refusal by the policy that came furthest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejected {
    /// Name, version and SHA-256 of that policy; none if there was no policy to ask.
    pub policy: Option<PolicyRef>,
    /// All that it found wrong, at most 64; the first is the headline.
    pub findings: Vec<Denial>,
}

/// Which policy an answer is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicyRef {
    /// Its name.
    pub name: String,
    /// Its version in the cell; 0 offline.
    pub version: u64,
    /// SHA-256 of its canonical form.
    pub sha256: [u8; 32],
}

impl Rejected {
    /// The first finding.
    pub fn headline(&self) -> Denial {
        self.findings.first().cloned().unwrap_or_else(|| no_policy().into())
    }
}

impl From<Rejected> for Denial {
    fn from(rejected: Rejected) -> Denial {
        rejected.headline()
    }
}

fn no_policy() -> Refusal {
    Refusal::new(Code::AppraisalPolicyMissing, "an appraisal policy of the node's cluster", "none")
}

/// Asks each of `policies` (those of the node's cluster) about the boot that `pcrs` of `bank` and `boot` show. The first
/// that accepts is the answer; otherwise what the one with the fewest findings says.
///
/// # Errors
/// [`Code::AppraisalPolicyMissing`] without a policy, else what the policy found.
pub fn appraise(
    policies: &[Arc<CompiledPolicy>],
    endorsement: Endorsement,
    pcrs: &BTreeMap<u32, Vec<u8>>,
    bank: Bank,
    boot: &BootFacts,
) -> Result<Accepted, Rejected> {
    let mut accepted: Option<(Arc<CompiledPolicy>, Vec<Consumed>)> = None;
    let mut candidates = Vec::new();
    let mut nearest: Option<Rejected> = None;
    for policy in policies {
        let judgement = policy.judge_boot(endorsement, pcrs, bank, boot);
        if judgement.findings.is_empty() {
            accepted.get_or_insert((policy.clone(), judgement.consumed));
            candidates.push(policy.clone());
        } else if nearest.as_ref().is_none_or(|n| judgement.findings.len() < n.findings.len()) {
            nearest = Some(Rejected { policy: Some(policy.reference()), findings: judgement.findings });
        }
    }
    match accepted {
        Some((policy, consumed)) => Ok(Accepted { policy, consumed, candidates }),
        None => Err(nearest.unwrap_or_else(|| Rejected { policy: None, findings: vec![no_policy().into()] })),
    }
}

#[cfg(test)]
mod tests;
