//! What no kernel of this release enforces is refused before it is agreed on.

use crate::document::Document;
use ambit_model::policy::{Action, Cidr, Protocol, closed_within};
use ambit_model::{Code, Refusal};

/// Checks that what the document says will hold, not only be kept: a rule that is accepted and not enforced is worse than
/// none.
///
/// # Errors
/// [`Code::PolicyUnenforceable`].
pub fn check_enforceable(document: &Document) -> Result<(), Refusal> {
    let refuse = |expected: &str, found: String| {
        let of = format!("{} {}", document.kind(), document.name());
        Err(Refusal::new(Code::PolicyUnenforceable, expected, format!("{of}: {found}")))
    };
    match document {
        Document::Policy(policy) => {
            // A deny of what nobody is let in from holds.
            let opens = policy.action != Action::Deny;
            if let Some(range) = policy.extras.unmeshed.iter().find(|range| opens && range.v4().is_none()) {
                let expected = "ranges of IPv4 (no pod may be spoken to over IPv6 from outside of the mesh)";
                return refuse(expected, format!("cidr:{range}"));
            }
            let closed = policy.extras.unmeshed.iter().find_map(|range| Some((range, closed(range)?)));
            if let Some((range, why)) = closed.filter(|_| opens) {
                let expected = "ranges that somebody beyond the node and its link calls from";
                return refuse(expected, format!("cidr:{range}, which is {why}"));
            }
            // UDP is refused for everybody, so a deny of it holds and an allow does not; and what is refused is not audited.
            let udp = policy.extras.protocols.contains(&Protocol::Udp);
            match policy.action {
                Action::Allow | Action::Audit if udp => {
                    let expected = "protocols: [tcp] (UDP has no tunnel, and is never carried in clear text)";
                    refuse(expected, format!("{} over udp", policy.action.as_str()))
                }
                Action::Allow | Action::Audit | Action::Deny => Ok(()),
            }
        }
        Document::Egress(egress) => {
            if egress.protocols.contains(&Protocol::Udp) {
                let expected = "protocols: [tcp] (the agent carries connections; nothing carries datagrams)";
                return refuse(expected, "egress over udp".to_owned());
            }
            if let Some(range) = egress.to.iter().find(|range| range.v4().is_none()) {
                let expected =
                    "ranges of IPv4 (a workload's IPv6 connections are refused as a whole: nothing judges them)";
                return refuse(expected, format!("egress to {range}"));
            }
            match egress.to.iter().find_map(|range| Some((range, closed(range)?))) {
                Some((range, why)) => {
                    let expected = "ranges beyond the node itself and its link (the agent connects in the node's name)";
                    refuse(expected, format!("egress to {range}, which is {why}"))
                }
                None => Ok(()),
            }
        }
        Document::Service(_) | Document::Group(_) => Ok(()),
    }
}

fn closed(range: &Cidr) -> Option<&'static str> {
    let (first, bits) = range.v4()?;
    closed_within(first, bits)
}
