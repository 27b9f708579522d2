//! The list of targets.

mod boot;
mod certificates;
mod ima;
mod names;
mod policy;
mod ticket;
mod tpm;

use crate::Target;

/// Every target. A new parser of a stranger's bytes gets its row here, its seeds in `corpus`, and what it must hold.
pub const TARGETS: &[Target] = &[
    tpm::PUBLIC,
    tpm::ATTEST,
    tpm::CERTIFY,
    tpm::SIGNATURE,
    boot::LOG,
    boot::EVENTS,
    ima::LOG,
    ima::ENTRIES,
    certificates::EK,
    certificates::EK_CHAIN,
    certificates::CSR,
    ticket::TICKET,
    policy::POLICY,
    policy::APPRAISAL,
    policy::ALLOW_LIST,
    policy::EK_LIST,
    names::NAMES,
];
