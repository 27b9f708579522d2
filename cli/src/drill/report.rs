//! The report of a drill, and how anyone checks it without a cell.
//!
//! The seal covers SHA-256 over a context and the report's compact JSON. The file must be, byte for byte, what this
//! program writes for what it reads: what a person sees in it is what was sealed.

use super::figures::{Figures, Marks, Objective, Sample, Seen, figures, judge};
use super::ledger::Write;
use super::spec::Drill;
use ambit_identity::KeySet;
use ambit_model::{Code, Refusal, TrustDomain};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Bytes of a report: a half-hour drill at 1 ms stays below.
pub const REPORT_BYTES_MAX: u64 = 256 << 20;
const CONTEXT: &[u8] = b"ambit/drill-report/v1\n";
const FORMAT: &str = "ambit-drill-report/1";

/// Everything that was seen, and what was made of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Report {
    /// `ambit-drill-report/1`.
    pub format: String,
    /// The drill's name.
    pub drill: String,
    /// Distinguishes runs; part of the names of the entries written.
    pub run: String,
    /// `passed`, `missed`, or `aborted: why`.
    pub outcome: String,
    /// The file that was run, and its SHA-256.
    pub spec: String,
    /// Hexadecimal.
    pub spec_sha256: String,
    /// This program's version, and what each cell said of itself.
    pub versions: Vec<String>,
    /// Milliseconds since the Unix epoch; every other time counts from here.
    pub started_ms: u64,
    /// Load average when it ended (1, 5 and 15 minutes), as the kernel prints it.
    pub load_average: String,
    /// When the fault and its healing were ordered.
    pub marks: Option<Marks>,
    /// What happened.
    pub timeline: Vec<Event>,
    /// What was promised, and what came of it.
    pub objectives: Vec<Objective>,
    /// What the samples and the ledger gave.
    pub figures: Figures,
    /// The caller's samples: milliseconds, ok or fail, who answered.
    pub caller: Vec<Sample>,
    /// Those of the caller outside of the scope; left out where there is none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub outside: Vec<Sample>,
    /// The writer's samples: milliseconds, ok or fail; one per attempt.
    pub writer: Vec<Sample>,
    /// The writer's ledger: number, sent, acknowledged, attempts, times listed afterwards.
    pub ledger: Vec<Write>,
}

/// One line of the timeline.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Event {
    /// Milliseconds since the drill began.
    pub t_ms: u64,
    /// What.
    pub what: String,
}

impl Report {
    /// The form that this program writes.
    pub fn format() -> String {
        FORMAT.to_owned()
    }
    /// What the seal covers.
    pub fn sha256(&self) -> Result<[u8; 32], Refusal> {
        let json =
            serde_json::to_vec(self).map_err(|e| Refusal::new(Code::Internal, "a report as JSON", e.to_string()))?;
        Ok(Sha256::new().chain_update(CONTEXT).chain_update(json).finalize().into())
    }
    /// The figures that the raw samples and the ledger give.
    pub fn recomputed(&self) -> Figures {
        let seen = Seen { writer: &self.writer, caller: &self.caller, outside: &self.outside, writes: &self.ledger };
        figures(&seen, self.marks)
    }
}

/// A cell's word that it committed this report's digest. Everything binary is hexadecimal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Seal {
    /// The cell's statement about the digest.
    pub statement: String,
    /// A record key's signature over it.
    pub signature: String,
    /// The root-certified list of record keys.
    pub key_set_statement: String,
    /// The root's signature over that.
    pub key_set_signature: String,
    /// The root certificate, DER.
    pub root: String,
    /// Its trust domain.
    pub trust_domain: TrustDomain,
}

/// What lies in the file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SealedReport {
    /// The report.
    pub report: Report,
    /// The first cell's seal; none where no cell could be reached, and then it verifies nowhere.
    pub seal: Option<Seal>,
    /// Of further cells; left out where there are none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub further: Vec<Seal>,
}

/// A cell that sealed a report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sealer {
    /// Its trust domain.
    pub trust_domain: TrustDomain,
    /// SHA-256 of its root certificate.
    pub fingerprint: [u8; 32],
    /// When it committed the report, milliseconds since the Unix epoch.
    pub sealed_ms: u64,
    /// Where in its log.
    pub index: u64,
}

/// Whose word a report is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verified {
    /// Those whose fingerprints were given, in the order of the seals.
    pub sealers: Vec<Sealer>,
    /// Those whose seals fit roots that nobody vouches for here.
    pub unknown: Vec<Sealer>,
    /// The report.
    pub report: Report,
}

impl SealedReport {
    /// With the seals of as many cells as could be reached.
    pub fn new(report: Report, seals: Vec<Seal>) -> SealedReport {
        let mut seals = seals.into_iter();
        SealedReport { report, seal: seals.next(), further: seals.collect() }
    }
    /// How many cells sealed it.
    pub fn seals(&self) -> usize {
        usize::from(self.seal.is_some()) + self.further.len()
    }
    /// The file's text.
    pub fn text(&self) -> Result<String, Refusal> {
        serde_json::to_string_pretty(self)
            .map(|t| t + "\n")
            .map_err(|e| Refusal::new(Code::Internal, "a report as JSON", e.to_string()))
    }
}

/// Checks a report's text against fingerprints that were learnt elsewhere: every one of them must have sealed it, and every
/// seal in it must be good. Errors: `drill_report_invalid`.
pub fn verify(text: &str, fingerprints: &[[u8; 32]]) -> Result<Verified, Refusal> {
    let sealed: SealedReport =
        serde_json::from_str(text).map_err(|e| bad("a report of this program", e.to_string()))?;
    if sealed.text()? != text {
        return Err(bad("the file exactly as it was written", "other bytes"));
    }
    let SealedReport { report, seal, further } = sealed;
    let first = seal.ok_or_else(|| bad("a sealed report", "no seal"))?;
    let (mut sealers, mut unknown) = (Vec::new(), Vec::new());
    for seal in std::iter::once(first).chain(further) {
        let sealer = sealer(&seal, &report)?;
        let vouched = fingerprints.contains(&sealer.fingerprint);
        if vouched { &mut sealers } else { &mut unknown }.push(sealer);
    }
    for expected in fingerprints {
        if !sealers.iter().any(|s| s.fingerprint == *expected) {
            let found: Vec<String> = unknown.iter().chain(&sealers).map(|s| hex::encode(s.fingerprint)).collect();
            return Err(bad(
                format!("a seal under root {}", hex::encode(expected)),
                format!("root {}", found.join(", ")),
            ));
        }
    }
    if sealers.is_empty() {
        return Err(bad("a fingerprint to check the seal by", "none"));
    }
    agrees_with_itself(&report)?;
    Ok(Verified { sealers, unknown, report })
}

fn sealer(seal: &Seal, report: &Report) -> Result<Sealer, Refusal> {
    let root = unhex(&seal.root)?;
    let keys =
        KeySet::verify(&seal.trust_domain, &root, &unhex(&seal.key_set_statement)?, &unhex(&seal.key_set_signature)?)
            .map_err(|r| bad(r.expected, r.found))?;
    let statement = keys.verify_report(&unhex(&seal.statement)?, &unhex(&seal.signature)?)?;
    let digest = report.sha256()?;
    if statement.sha256 != digest || statement.drill != report.drill {
        let expected = format!("the report {} of drill {}", hex::encode(statement.sha256), statement.drill);
        return Err(bad(expected, format!("{} of drill {}", hex::encode(digest), report.drill)));
    }
    Ok(Sealer {
        trust_domain: seal.trust_domain.clone(),
        fingerprint: ambit_identity::fingerprint(&root),
        sealed_ms: statement.stamp_ms,
        index: statement.index,
    })
}

/// The figures follow from the samples, the objectives from the figures, the digest from the file that was run.
fn agrees_with_itself(report: &Report) -> Result<(), Refusal> {
    if report.format != FORMAT {
        return Err(bad(FORMAT, report.format.as_str()));
    }
    if report.spec_sha256 != hex::encode(Sha256::digest(&report.spec)) {
        return Err(bad("the digest of the drill's file", report.spec_sha256.as_str()));
    }
    let drill: Drill = report.spec.parse().map_err(|r: Refusal| bad("a drill's file in the report", r.to_string()))?;
    let figures = report.recomputed();
    if figures != report.figures {
        return Err(bad("figures that follow from the samples", "others"));
    }
    if judge(&drill, report.marks, &figures) != report.objectives {
        return Err(bad("objectives that follow from the figures", "others"));
    }
    let all_met = report.objectives.iter().all(|o| o.met);
    if report.outcome == "passed" && !all_met {
        return Err(bad("the outcome that follows from the objectives", report.outcome.as_str()));
    }
    Ok(())
}

fn bad(expected: impl Into<String>, found: impl Into<String>) -> Refusal {
    Refusal::new(Code::DrillReportInvalid, expected, found)
}

fn unhex(text: &str) -> Result<Vec<u8>, Refusal> {
    hex::decode(text).map_err(|_| bad("hexadecimal digits in the seal", "others"))
}

#[cfg(test)]
#[path = "report_tests.rs"]
mod tests;
