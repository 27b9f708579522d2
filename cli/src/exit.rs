//! Exit codes: one per class of failure, so that scripts need not read prose.

use ambit_model::refusal::Class;
use ambit_model::{Code, Refusal};
use std::process::ExitCode;

/// How the program ends. The numbers are documented in README.md and never change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Exit {
    /// 0: everything asked for holds.
    Ok = 0,
    /// 1: it was tried and failed.
    Failed = 1,
    /// 2: the command line or a file given with it is wrong.
    Usage = 2,
    /// 3: no replica answered.
    Unreachable = 3,
    /// 4: refused to this caller, or not believed.
    Denied = 4,
    /// 5: a guard tripped, or what is differs from what should be.
    Drift = 5,
}

impl Exit {
    /// The exit code for a refusal, by the class of its code.
    pub fn of(refusal: &Refusal) -> Exit {
        match refusal.code.class() {
            Class::Invalid => Exit::Usage,
            Class::Denied | Class::Unauthenticated => Exit::Denied,
            Class::Unavailable => Exit::Unreachable,
            Class::Precondition => Exit::Drift,
            Class::Missing | Class::Conflict | Class::Unimplemented => Exit::Failed,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit as u8)
    }
}

/// The two or three lines a person sees for a refusal: what, expected and found, what to do.
pub fn refusal_text(refusal: &Refusal) -> String {
    let mut out = format!("error[{}]", refusal.code);
    match (refusal.expected.is_empty(), refusal.found.is_empty()) {
        (true, true) => {}
        (true, false) => out.push_str(&format!(": found {}", refusal.found)),
        (false, true) => out.push_str(&format!(": expected {}", refusal.expected)),
        (false, false) => out.push_str(&format!(": expected {}, found {}", refusal.expected, refusal.found)),
    }
    out.push_str(&format!("\n  try: {}", refusal.code.remedy()));
    out
}

/// A refusal of a file that cannot be read or written.
pub fn file_refusal(path: &std::path::Path, error: &std::io::Error) -> Refusal {
    Refusal::new(Code::BadRequest, format!("a usable file {}", path.display()), error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_has_an_exit_and_a_next_step() {
        for code in Code::ALL {
            let refusal = Refusal::new(*code, "a", "b");
            assert_ne!(Exit::of(&refusal), Exit::Ok, "{code}");
            let text = refusal_text(&refusal);
            assert!(text.starts_with(&format!("error[{code}]: expected a, found b\n  try: ")), "{text}");
        }
    }

    #[test]
    fn classes_map_to_the_documented_numbers() {
        for (code, number) in [
            (Code::BadRequest, 2),
            (Code::Unavailable, 3),
            (Code::FingerprintMismatch, 4),
            (Code::DrillGuard, 5),
            (Code::NotFound, 1),
            (Code::Unimplemented, 1),
            (Code::DrillReportInvalid, 4),
        ] {
            assert_eq!(Exit::of(&Refusal::new(code, "", "")) as u8, number, "{code}");
        }
        assert_eq!(
            refusal_text(&Refusal::new(Code::NotFound, "", "")),
            "error[not_found]\n  try: list the objects and check the name"
        );
    }
}
