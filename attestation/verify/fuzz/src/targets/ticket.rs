//! The plain text of a ticket.

use crate::{SOON, Target, Verdict};
use ambit_verify::TicketBody;

/// A ticket body, as it comes out of its seal.
pub(super) const TICKET: Target =
    Target { name: "ticket", len_max: 512, cpu: SOON, heap: |n| 8 * 1024 + 64 * n, run: ticket, shapes: &[] };

fn ticket(input: &[u8]) -> Verdict {
    let decoded = TicketBody::decode(input);
    if let Ok(body) = &decoded {
        assert_eq!(body.encode().as_slice(), input, "two encodings of one body");
        let shown = format!("{body:?}");
        assert!(!shown.contains("secret"), "the secret is shown");
    }
    Verdict::from(&decoded)
}
