//! Equal meaning, equal policy: what adds nothing is left out.

use ambit_model::policy::{Peers, Policy};

/// The policy with its callers, ports and ranges sorted, each once, and without callers that another of its sets covers.
/// It decides as the policy did.
#[must_use]
pub fn normalised(mut policy: Policy) -> Policy {
    policy.from.sort();
    policy.from.dedup();
    policy.ports.sort_unstable();
    policy.ports.dedup();
    policy.extras.unmeshed.sort();
    policy.extras.unmeshed.dedup();
    let all = policy.from.clone();
    // Of two that are not the same only one covers the other; and a policy that names an unknown trust domain still does,
    // since a set covers within its own only.
    policy.from.retain(|set| !all.iter().any(|other| other != set && covers(other, set)));
    policy
}

/// A set that a cell resolves stays, though its trust domain covers it: who reads the policy shall see that it was meant.
fn covers(wide: &Peers, narrow: &Peers) -> bool {
    !narrow.is_named() && wide.covers(narrow)
}
