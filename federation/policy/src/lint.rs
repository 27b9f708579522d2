//! What is well-formed and yet hardly meant.

use crate::document::Document;
use ambit_model::policy::{Action, Egress, Peers, Policy};
use ambit_model::{ObjectName, Stamp, utc};
use std::fmt;

/// One thing to look at.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Finding {
    /// Kind and name of the document.
    pub object: (&'static str, ObjectName),
    /// What strikes, and what to do about it.
    pub text: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}: {}", self.object.0.to_lowercase(), self.object.1, self.text)
    }
}

/// Looks at the documents of one request. `now` is the reader's clock.
pub fn lint(documents: &[Document], now: Stamp) -> Vec<Finding> {
    let policies: Vec<&Policy> = documents
        .iter()
        .filter_map(|document| match document {
            Document::Policy(policy) => Some(policy),
            Document::Service(_) | Document::Group(_) | Document::Egress(_) => None,
        })
        .collect();
    let mut found: Vec<Finding> = policies.iter().flat_map(|policy| of_one(policy, &policies, now)).collect();
    for document in documents {
        if let Document::Egress(egress) = document {
            found.extend(of_egress(egress, now));
        }
    }
    found.sort();
    found
}

fn of_egress(egress: &Egress, now: Stamp) -> Vec<Finding> {
    let mut texts = Vec::new();
    if egress.expires_at <= now {
        texts.push(format!("it is over since {}: give it a later end, or none", utc::text(egress.expires_at.0)));
    }
    let ports = if egress.ports.is_empty() { " on every port" } else { "" };
    if let Some(wide) = egress.from.iter().find(|set| matches!(set, Peers::Domain(_))) {
        let td = wide.trust_domain();
        texts.push(format!("whoever gets an identity of {td} may connect{ports}: name the callers"));
    }
    if egress.to.iter().any(|range| range.v4().is_some_and(|(_, bits)| bits == 0)) {
        texts.push(format!("it opens every address that the mesh does not know{ports}: name ranges"));
    }
    let object = ("Egress", egress.name.clone());
    texts.into_iter().map(|text| Finding { object: object.clone(), text }).collect()
}

fn of_one(policy: &Policy, all: &[&Policy], now: Stamp) -> Vec<Finding> {
    let mut texts = Vec::new();
    if policy.extras.expires_at <= now {
        texts.push(format!("it is over since {}: give it a later end, or none", utc::text(policy.extras.expires_at.0)));
    }
    if policy.action == Action::Allow {
        if let Some(deny) = all.iter().find(|other| other.action == Action::Deny && speaks_of_all(other, policy)) {
            texts.push(format!("it never allows anything: policy {} denies all of it", deny.name));
        }
        if let Some(wide) = policy.from.iter().find(|set| matches!(set, Peers::Domain(_))) {
            let ports = if policy.ports.is_empty() { " on every port" } else { "" };
            texts
                .push(format!("whoever gets an identity of {} may call{ports}: name the callers", wide.trust_domain()));
        }
        if policy.extras.unmeshed.iter().any(|range| range.v4().is_some_and(|(_, bits)| bits == 0)) {
            let ports = if policy.ports.is_empty() { " on every port" } else { "" };
            texts.push(format!("whoever reaches the pod's network may call in clear text{ports}: name ranges"));
        }
    }
    let same = |other: &&&Policy| other.name < policy.name && other.action == policy.action;
    if let Some(wider) = all.iter().filter(same).find(|other| speaks_of_all(other, policy)) {
        texts.push(format!("it adds nothing to policy {}: delete one of them", wider.name));
    }
    let object = ("Policy", policy.name.clone());
    texts.into_iter().map(|text| Finding { object: object.clone(), text }).collect()
}

/// Whether `wide` speaks of every connection that `narrow` speaks of, as long as it does.
fn speaks_of_all(wide: &Policy, narrow: &Policy) -> bool {
    let covered = |set: &Peers| wide.from.iter().any(|other| other.covers(set));
    let ports = wide.ports.is_empty()
        || (!narrow.ports.is_empty() && narrow.ports.iter().all(|port| wide.ports.contains(port)));
    wide.target.covers(&narrow.target)
        && narrow.from.iter().all(covered)
        && narrow.extras.unmeshed.iter().all(|range| wide.extras.unmeshed.iter().any(|other| other.covers(range)))
        && ports
        && narrow.extras.protocols.is_subset(&wide.extras.protocols)
        && narrow.extras.expires_at <= wide.extras.expires_at
}
