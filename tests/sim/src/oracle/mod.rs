//! What must hold, whatever fails: one history, and what this product promises about it. Cited by number (design.md
//! section 9).

mod history;
mod peers;
mod promises;

pub(crate) use history::{History, View};
pub(crate) use peers::{Ledger, Lie, News, judge_answer};

use std::fmt;

/// An invariant that did not hold.
#[derive(Clone, Debug)]
pub(crate) struct Violation {
    /// Its number.
    pub(crate) invariant: &'static str,
    /// What was seen.
    pub(crate) text: String,
}

impl Violation {
    pub(crate) fn of(invariant: &'static str, text: impl Into<String>) -> Violation {
        Violation { invariant, text: text.into() }
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.invariant, self.text)
    }
}

/// Invariants that are judged in every run.
pub(crate) const JUDGED: &str = "I1 I2 I3 I4 (revocation) I5 I6 I7 (replicas) I10 I13 I15 I22, and progress of a healed \
     quorum (L1, L2); in runs of three cells also I9 I11 I12; in runs of three cells and a grant I20";
/// Invariants that runs only pass through; what judges them are tests of their own.
pub(crate) const ELSEWHERE: &str = "judged by tests, not here: I4 at lateness (ambit-state), I14 on the real raft-engine \
     (ambitd, store::fault_tests; tests/disks.rs), I16 (ambitd, members_come_and_go_one_at_a_time; chaos), I17 (ambitd, \
     overload_answers_busy_and_loses_nothing)";
/// Invariants, or parts of them, whose feature does not stand yet.
pub(crate) const NOT_YET: &str =
    "not yet: I7 and I11 at agents, I8: no root rotates in it (tests/tests/rotation.rs), I11 with a witness";
