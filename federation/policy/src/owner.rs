//! Who may write what: a cell speaks only for its own identities, and may narrow what others allow, never widen it.

use crate::document::Document;
use ambit_model::policy::{Action, Policy};
use ambit_model::{Code, Refusal, TrustDomain};

/// Checks that `origin` may write the document.
///
/// A policy may be written by the trust domain of its target; a deny policy also by the trust domain of all its
/// callers (narrowing). A service may be written by a trust domain that has a backend in it: its address only
/// chooses among backends, and each connection is still judged by the policies of the backend chosen.
///
/// # Errors
/// [`Code::NotOwner`].
pub fn check_owner(document: &Document, origin: &TrustDomain) -> Result<(), Refusal> {
    let expected = match document {
        Document::Policy(policy) if speaks_for(origin, policy) => return Ok(()),
        Document::Policy(policy) => match policy.action {
            Action::Allow => format!("a target in {origin} (only the target's own trust domain may allow)"),
            Action::Deny | Action::Audit => format!("a target in {origin}, or callers that all are in {origin}"),
        },
        // A name for others: it grants nothing by itself, and policies that use it are judged by who is in it.
        Document::Group(_) => return Ok(()),
        Document::Egress(egress) if egress.from.iter().all(|set| set.trust_domain() == *origin) => return Ok(()),
        Document::Egress(_) => format!("callers that all are in {origin}"),
        Document::Service(service) if service.backends.iter().any(|b| b.trust_domain() == *origin) => return Ok(()),
        Document::Service(_) => format!("at least one backend in {origin}"),
    };
    let domains: Vec<_> = document.trust_domains().into_iter().map(String::from).collect();
    let found = format!("{} {} about {}", document.kind(), document.name(), domains.join(", "));
    Err(Refusal::new(Code::NotOwner, expected, found))
}

/// The rule itself. Evaluation asks it again, so that a record which slipped past a peer's check decides nothing.
pub(crate) fn speaks_for(origin: &TrustDomain, policy: &Policy) -> bool {
    let own_target = policy.target.trust_domain() == *origin;
    let narrows = policy.action != Action::Allow
        && policy.extras.unmeshed.is_empty()
        && policy.from.iter().all(|set| set.trust_domain() == *origin);
    own_target || (narrows && !policy.from.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parse;

    fn check(owner: &str, spec: &str) -> Result<(), Code> {
        let text = format!("{{kind: Policy, metadata: {{name: p}}, spec: {spec}}}");
        let [document] = parse(&text).unwrap().try_into().unwrap();
        check_owner(&document, &owner.parse().unwrap()).map_err(|refusal| refusal.code)
    }

    #[test]
    fn a_cell_speaks_for_its_own_identities() {
        let allow = "{target: spiffe://west/db, action: allow, from: [spiffe://east/web]}";
        let deny = "{target: spiffe://west/db, action: deny, from: [spiffe://east/web]}";
        let mixed = "{target: spiffe://west/db, action: deny, from: [spiffe://east/web, spiffe://north/web]}";
        for (owner, spec, want) in [
            ("west", allow, Ok(())),
            ("west", deny, Ok(())),
            ("east", allow, Err(Code::NotOwner)),
            ("east", deny, Ok(())),
            ("east", mixed, Err(Code::NotOwner)),
            ("north", deny, Err(Code::NotOwner)),
        ] {
            assert_eq!(check(owner, spec), want, "{owner}: {spec}");
        }
    }

    #[test]
    fn a_service_needs_a_backend_of_its_writer() {
        let text = "{kind: Service, metadata: {name: s}, spec: {address: 10.96.0.1, port: 80, \
                    backends: [spiffe://west/a, spiffe://east/a]}}";
        let [document] = parse(text).unwrap().try_into().unwrap();
        for (owner, good) in [("west", true), ("east", true), ("north", false)] {
            assert_eq!(check_owner(&document, &owner.parse().unwrap()).is_ok(), good, "{owner}");
        }
    }
}
