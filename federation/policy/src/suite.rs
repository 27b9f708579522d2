//! Tests of policies, written beside them: what must be allowed and what denied.

use crate::document::Document;
use crate::parse::{placed, refuse_costly_structure};
use crate::scalar::{Instant, Listed, Port, Text};
use crate::set::{PolicySet, Verdict};
use ambit_model::policy::{Peers, Policy};
use ambit_model::{Code, Moment, ObjectName, Refusal, SpiffeId, Stamp, TrustDomain};
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;

/// Cases of one suite.
const CASES_MAX: usize = 10_000;
/// Ports of one case.
const CASE_PORTS_MAX: usize = 64;
/// Identities that a named set of a suite stands for.
const MEMBERS_MAX: usize = 1_000;

/// One `kind: PolicyTest` document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Suite {
    /// Its name.
    pub name: ObjectName,
    /// The time at which it asks; the reader's, where it names none.
    pub at: Option<Stamp>,
    /// Whom `cluster:`, `group:` and `labels:` stand for in it: offline nobody else can tell.
    pub sets: BTreeMap<Peers, BTreeSet<SpiffeId>>,
    /// What it asks.
    pub cases: Vec<Case>,
}

/// One connection and what is to become of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Case {
    /// The caller.
    pub source: SpiffeId,
    /// The target.
    pub destination: SpiffeId,
    /// On each of these ports.
    pub ports: Vec<u16>,
    /// Whether it shall be allowed.
    pub allowed: bool,
}

/// A case that came out otherwise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CaseFailure {
    /// Which case of the suite, from 1.
    pub number: usize,
    /// The case.
    pub case: Case,
    /// On which port.
    pub port: u16,
    /// What came out.
    pub verdict: Verdict,
}

impl fmt::Display for CaseFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (wanted, case) = (if self.case.allowed { "allow" } else { "deny" }, &self.case);
        let rule = self.verdict.rule.as_ref().map_or_else(String::new, |rule| format!(" ({rule})"));
        write!(f, "case {}: expected {wanted}, found {}{rule}: ", self.number, self.verdict.reason)?;
        write!(f, "{} -> {}:{}", case.source, case.destination, self.port)
    }
}

impl Suite {
    /// Runs the cases against the documents, each written by the trust domain that may. Every trust domain that they name
    /// is known. `now` is the reader's clock.
    ///
    /// # Errors
    /// [`Code::PolicyMalformed`] where a document comes twice or names a set that the suite does not say who is in,
    /// [`Code::PolicyUnenforceable`] where no cell would take one: nothing that came out would be so in a cell.
    pub fn run(&self, documents: &[Document], now: Stamp) -> Result<Vec<CaseFailure>, Refusal> {
        self.check(documents)?;
        let known = documents.iter().flat_map(Document::trust_domains).collect();
        let mut set = PolicySet::new(known);
        for document in documents {
            if let Document::Policy(policy) = document {
                set.insert(writer(policy), self.resolved(policy, documents));
            }
        }
        let index = set.compile();
        let now = Moment::at(self.at.unwrap_or(now));
        let mut failures = Vec::new();
        for (at, case) in self.cases.iter().enumerate() {
            for port in &case.ports {
                let verdict = index.evaluate(&case.source, &case.destination, *port, now);
                if verdict.allowed != case.allowed {
                    failures.push(CaseFailure { number: at + 1, case: case.clone(), port: *port, verdict });
                }
            }
        }
        Ok(failures)
    }

    fn check(&self, documents: &[Document]) -> Result<(), Refusal> {
        let malformed = |expected: String, found: String| Refusal::new(Code::PolicyMalformed, expected, found);
        let mut seen = BTreeSet::new();
        for document in documents {
            crate::check_enforceable(document)?;
            if !seen.insert((document.kind(), document.name())) {
                let found = format!("{} {} twice", document.kind(), document.name());
                return Err(malformed("each kind and name once in all files".into(), found));
            }
            let Document::Policy(policy) = document else { continue };
            let resolved = self.resolved(policy, documents);
            if let Some(set) = resolved.from.iter().chain([&resolved.target]).find(|set| set.is_named()) {
                let expected = match set {
                    Peers::Group(..) => format!("a document of {set} in the files"),
                    _ => format!("who is in it, in 'sets' of PolicyTest {}", self.name),
                };
                return Err(malformed(expected, format!("policy {}: {set}", policy.name)));
            }
        }
        Ok(())
    }

    fn resolved(&self, policy: &Policy, documents: &[Document]) -> Policy {
        let one = |set: &Peers| match self.sets.get(set) {
            Some(ids) => Peers::Ids(set.trust_domain(), ids.clone()),
            None => set.clone(),
        };
        let groups = |set: &Peers| {
            let Peers::Group(_, name) = set else { return vec![one(set)] };
            let members = documents.iter().find_map(|document| match document {
                Document::Group(group) if group.name == *name => Some(&group.members),
                Document::Group(_) | Document::Policy(_) | Document::Service(_) | Document::Egress(_) => None,
            });
            members.map_or_else(|| vec![one(set)], |members| members.iter().map(one).collect())
        };
        let from = policy.from.iter().flat_map(groups).collect();
        Policy { target: one(&policy.target), from, ..policy.clone() }
    }
}

/// Whose cell would write it. A deny about callers of one trust domain is in force whoever of the two wrote it.
fn writer(policy: &Policy) -> TrustDomain {
    policy.target.trust_domain()
}

/// The suites of `text`, and its other documents, in order.
///
/// # Errors
/// As [`crate::parse`], of suites too.
pub fn parse_suite(text: &str) -> Result<(Vec<Document>, Vec<Suite>), Refusal> {
    if text.len() > crate::BYTES_MAX {
        let expected = format!("at most {} bytes", crate::BYTES_MAX);
        return Err(Refusal::new(Code::PolicyMalformed, expected, format!("{} bytes", text.len())));
    }
    refuse_costly_structure(text)?;
    let (mut rest, mut suites) = (String::new(), Vec::new());
    let (mut document, mut begin) = (String::new(), 0);
    for (at, line) in text.split_inclusive('\n').chain(["---"]).enumerate() {
        let ends = line.strip_prefix("---").is_some_and(|rest| rest.chars().next().is_none_or(char::is_whitespace));
        if !ends {
            document.push_str(line);
            continue;
        }
        // A refusal points at its line: what is left out leaves its lines behind.
        let found = serde_norway::from_str::<Option<Head>>(&document);
        if matches!(&found, Ok(Some(head)) if head.kind == "PolicyTest") {
            suites.push(suite(&format!("{}{document}", "\n".repeat(begin)))?);
            rest.extend(document.matches('\n'));
        } else {
            rest.push_str(&document);
        }
        // The last line may have no end of its own; what is added here is none of the text.
        if at < text.split_inclusive('\n').count() {
            rest.push_str(line);
        }
        document.clear();
        begin = at + 1;
    }
    Ok((crate::parse(&rest)?, suites))
}

fn suite(text: &str) -> Result<Suite, Refusal> {
    let malformed = |found: String| Refusal::new(Code::PolicyMalformed, "a well-formed PolicyTest document", found);
    let written: Written = serde_norway::from_str(text).map_err(|e| malformed(placed(&e)))?;
    let WrittenSpec { at, sets, cases } = written.spec;
    let sets = sets.into_iter().map(|(set, ids)| (set.0.0, ids.0.into_iter().map(|id| id.0).collect())).collect();
    let cases = cases.0.into_iter().map(|case| Case {
        source: case.from.0,
        destination: case.to.0,
        ports: case.ports.0.into_iter().map(|port| port.0).collect(),
        allowed: matches!(case.expect, Expect::Allow),
    });
    Ok(Suite { name: written.metadata.name.0, at: at.map(|at| at.0.0), sets, cases: cases.collect() })
}

#[derive(Deserialize)]
struct Head {
    kind: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    #[serde(rename = "kind")]
    _kind: String,
    metadata: WrittenMetadata,
    spec: WrittenSpec,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenMetadata {
    name: Text<ObjectName>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenSpec {
    at: Option<Text<Instant>>,
    #[serde(default)]
    sets: BTreeMap<Text<Named>, Listed<Text<SpiffeId>, MEMBERS_MAX>>,
    cases: Listed<WrittenCase, CASES_MAX>,
}

/// A set that only a cell can resolve.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Named(Peers);

impl FromStr for Named {
    type Err = Refusal;
    fn from_str(s: &str) -> Result<Self, Refusal> {
        match s.parse()? {
            set @ (Peers::Cluster(..) | Peers::Labelled(..)) => Ok(Self(set)),
            _ => Err(Refusal::new(Code::PolicyMalformed, "cluster:td/name or labels:td/key=value", s)),
        }
    }
}

#[derive(PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenCase {
    from: Text<SpiffeId>,
    to: Text<SpiffeId>,
    ports: Listed<Port, CASE_PORTS_MAX>,
    expect: Expect,
}

#[derive(PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Expect {
    Allow,
    Deny,
}
