//! Nodes: who they are, what their TPMs said, and how they were judged.

use ambit_model::appraisal::PcrBank;
use ambit_model::{ClusterId, Code, Generation, NodeId, ObjectName, Stamp, TrustVector};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Whether a node is relied on. Late is no state of its own: it follows from the last verdict ([`crate::State::is_late`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum NodeState {
    /// Admitted, and no verdict since was bad.
    Admitted,
    /// Banned by an operator: it stays known and may not come back.
    Banned,
    /// Evicted by an operator: it may enrol again, with another AK too.
    Evicted,
    /// Its evidence failed, with this code; or, with `node_late`, it gave none for too long.
    Untrusted(Code),
    /// Put aside by an operator, until released.
    Quarantined,
    /// Was out and was let in again by an operator: it may enrol as a new generation, with the AK it had.
    Released,
}

impl NodeState {
    /// The refusal that a node in this state gets instead of an admission; none where fresh evidence may admit it.
    pub fn bars_enrolment(self) -> Option<Code> {
        match self {
            NodeState::Banned => Some(Code::NodeBanned),
            NodeState::Quarantined => Some(Code::NodeQuarantined),
            NodeState::Untrusted(Code::NodeLate) => None,
            NodeState::Untrusted(_) => Some(Code::NodeUntrusted),
            NodeState::Admitted | NodeState::Evicted | NodeState::Released => None,
        }
    }
    /// Why a node in this state is not relied on; none where it is.
    pub fn bars_trust(self) -> Option<Code> {
        match self {
            NodeState::Admitted => None,
            NodeState::Banned => Some(Code::NodeBanned),
            NodeState::Quarantined => Some(Code::NodeQuarantined),
            NodeState::Untrusted(Code::NodeLate) => Some(Code::NodeLate),
            NodeState::Evicted | NodeState::Untrusted(_) | NodeState::Released => Some(Code::NodeUntrusted),
        }
    }
    /// As operators read it.
    pub fn as_str(self) -> &'static str {
        match self {
            NodeState::Admitted => "admitted",
            NodeState::Banned => "banned",
            NodeState::Evicted => "evicted",
            NodeState::Untrusted(_) => "untrusted",
            NodeState::Quarantined => "quarantined",
            NodeState::Released => "released",
        }
    }
}

/// TPM counters, compared lexicographically; the clock counts only where both others are equal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Counters {
    /// TPM Reset count.
    pub resets: u32,
    /// TPM Restart count.
    pub restarts: u32,
    /// TPM clock, milliseconds.
    pub clock: u64,
}

/// What is known of a node's TPM: what endorsements are matched against, again when they change.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EkFacts {
    /// hardware, virtual, lab, or listed (allow-listed without a certificate).
    pub class: String,
    /// SHA-256 of the root certificate that the EK chains to; none for a listed EK.
    pub root_sha256: Option<[u8; 32]>,
    /// TCG vendor id from the certificate, `id:` and 8 digits; empty where there is none.
    pub manufacturer: String,
    /// TPM model from the certificate; empty where there is none.
    pub model: String,
    /// Whether the certificate names a maker in a way that could not be read: then every rule about makers matches.
    pub unreadable: bool,
    /// The TPM's firmware version as last quoted.
    pub firmware_version: u64,
    /// Whether it is here because the allow-list names it: then taking it off the list puts it out.
    pub by_allow_list: bool,
}

/// The AK of a node and what its quotes must show.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AkFacts {
    /// TPM name.
    pub name: Vec<u8>,
    /// TPMT_PUBLIC.
    pub public: Vec<u8>,
    /// Its qualified name under its EK.
    pub qualified_signer: Vec<u8>,
}

/// A point in a node's IMA log, from which the next round goes on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImaPoint {
    /// Bytes before it.
    pub offset: u64,
    /// Entries before it.
    pub entries: u64,
    /// PCR 10 there.
    pub pcr: Vec<u8>,
    /// How the kernel extends: the verifier's word for it.
    pub form: String,
}

/// What a machine booted, as its TPM has it: PCRs 0-9 and 14.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootPcrs {
    /// The bank quoted.
    pub bank: PcrBank,
    /// Values by PCR.
    pub values: BTreeMap<u8, Vec<u8>>,
}

/// A version of an appraisal policy.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PolicyRef {
    /// The policy's name.
    pub name: ObjectName,
    /// Rises with each change of the policy of this name.
    pub version: u64,
}

impl std::fmt::Display for PolicyRef {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}@{}", self.name, self.version)
    }
}

/// A node as the cell knows it: what changes with an admission or an operator's word.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeRow {
    /// Its cluster.
    pub cluster: ClusterId,
    /// Rises with each admission.
    pub generation: Generation,
    /// See the type.
    pub state: NodeState,
    /// Its AK.
    pub ak: AkFacts,
    /// Its TPM.
    pub ek: EkFacts,
    /// EAR-shaped claims of the last enrolment.
    pub claims: String,
}

impl NodeRow {
    /// Whether the cell still knows it: eviction forgets a node, and no ban after it brings it back to mind.
    pub fn is_known(&self) -> bool {
        self.state != NodeState::Evicted && !self.ak.name.is_empty()
    }
}

/// A node's standing: what changes with every verdict, kept small because it changes often.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Standing {
    /// When the last good verdict was committed.
    pub verdict: Stamp,
    /// The same on the clock that stands still while there is no leader: deadlines run on it (I22).
    pub led_ms: u64,
    /// As last quoted.
    pub counters: Counters,
    /// How far the IMA log was judged.
    pub ima: ImaPoint,
    /// SHA-256 over the boot's PCRs (which change with a boot, and have a table of their own): while they are the same, so is the boot.
    pub boot_pcrs_sha256: [u8; 32],
    /// SHA-256 of the boot log that led to them.
    pub boot_log_sha256: [u8; 32],
    /// What accepted it.
    pub policy: PolicyRef,
    /// What is claimed of it: the worst that was seen of this boot under this policy.
    pub trust: TrustVector,
    /// SHA-256 of the body of the evidence judged last.
    pub evidence_sha256: [u8; 32],
    /// Bodies that it adds to, back to the last whole one.
    pub evidence_depth: u32,
    /// Good verdicts since the last change of boot or policy.
    pub rounds: u64,
}

/// A stretch of equal verdicts on a node: why it was trusted then, or not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerdictRow {
    /// First verdict of the stretch.
    pub since: Stamp,
    /// Last verdict of the stretch; zero while it is the present one (then the node's standing says).
    pub until: Stamp,
    /// Which admission.
    pub generation: Generation,
    /// What accepted it, or why it was refused.
    pub outcome: Result<PolicyRef, Code>,
    /// Where it diverged; empty where it was accepted.
    pub diverged: String,
    /// For operators only.
    pub expected: String,
    /// For operators only.
    pub found: String,
    /// SHA-256 over the evidence of the first verdict.
    pub evidence_sha256: [u8; 32],
    /// Good verdicts counted in it, once it is past.
    pub rounds: u64,
}

/// A manufacturer, model or firmware that is not accepted, whatever vouches for it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EkDenyRow {
    /// TCG vendor id (`id:` and 8 digits), or empty for any.
    pub manufacturer: String,
    /// Exact model, or empty for any.
    pub model: String,
    /// Firmware versions below this are refused; the highest value refuses all.
    pub firmware_below: u64,
    /// Why, for operators.
    pub reason: String,
}

impl EkDenyRow {
    /// Whether a TPM with these facts is refused by this rule.
    pub fn denies(&self, ek: &EkFacts) -> bool {
        let matches = |rule: &str, fact: &str| rule.is_empty() || rule == fact || ek.unreadable;
        matches(&self.manufacturer, &ek.manufacturer)
            && matches(&self.model, &ek.model)
            && ek.firmware_version < self.firmware_below
    }
}

/// A refused enrolment, for operators.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DenialRow {
    /// When.
    pub stamp: Stamp,
    /// Which node.
    pub node: NodeId,
    /// Stable code.
    pub code: String,
    /// Where the logs diverged, if a good HMAC was seen.
    pub diverged: String,
    /// For operators only.
    pub expected: String,
    /// For operators only.
    pub found: String,
}
