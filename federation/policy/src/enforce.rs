//! What no kernel of this release enforces is refused before it is agreed on.

use crate::document::Document;
use ambit_model::policy::{Action, Protocol};
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
            if let Some(range) = policy.extras.unmeshed.first() {
                return refuse(
                    "callers with an identity: the kernel has no table of ranges yet",
                    format!("cidr:{range}"),
                );
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
            let expected = "no Egress: the kernel has no table of ranges yet, and lets nothing leave the mesh";
            let to: Vec<String> = egress.to.iter().map(ToString::to_string).collect();
            refuse(expected, format!("transport: passthrough to {}", to.join(", ")))
        }
        Document::Service(_) | Document::Group(_) => Ok(()),
    }
}
