//! What may speak to what: policy documents parsed, owned, evaluated, explained and cut to what one node needs.
//!
//! [`PolicySet::evaluate`] is the oracle: the kernel's verdict must equal it for every connection (I18).
//! Pure: this crate never does IO, never reads a clock or the environment, and never decides by anything but
//! identity and port. A document that it does not fully understand is refused, never half-read.
#![forbid(unsafe_code)]
#![warn(missing_docs)]

pub mod appraisal;
mod backend;
mod document;
mod egress;
mod enforce;
mod explain;
mod flips;
mod index;
mod lint;
mod normal;
mod owner;
mod parse;
mod ports;
mod scalar;
mod set;
mod suite;
mod text;
mod unmeshed;

pub use appraisal::parse_appraisal;
pub use document::Document;
pub use egress::{EgressFlip, EgressFlips, EgressSet, Prefix, egress_flips};
pub use enforce::check_enforceable;
pub use explain::{Difference, Explanation, Nearest};
pub use flips::{Flip, Flips, PAIRS_MAX, flips, known_in};
pub use index::Index;
pub use lint::{Finding, lint};
pub use normal::normalised;
pub use owner::check_owner;
pub use parse::{BACKENDS_MAX, BYTES_MAX, DOCUMENTS_MAX, FROM_MAX, MEMBERS_MAX, PORTS_MAX, RANGES_MAX, parse};
pub use ports::PortSet;
pub use set::{PolicySet, Reason, RuleRef, Unresolved, Verdict, concerns, unknown_domains};
pub use suite::{Case, CaseFailure, Suite, parse_suite};
pub use text::{egress_text, group_text, policy_text, service_text};
pub use unmeshed::{UnmeshedFlip, UnmeshedFlips, unmeshed_flips};
