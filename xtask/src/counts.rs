//! Sums the result lines of the test harness.

use std::fmt;

/// Tests that passed, failed and were skipped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
    pub(crate) skipped: u64,
}

impl Counts {
    /// Adds `line` if it is a result line:
    /// `test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 2 filtered out; finished in 0.00s`.
    pub(crate) fn add(&mut self, line: &str) {
        let Some((_, numbers)) = line.strip_prefix("test result: ").and_then(|rest| rest.split_once(". ")) else {
            return;
        };
        for part in numbers.split("; ") {
            let Some((n, what)) = part.split_once(' ') else { continue };
            let Ok(n) = n.parse::<u64>() else { continue };
            match what {
                "passed" => self.passed += n,
                "failed" => self.failed += n,
                // A test that was filtered out did not run either.
                "ignored" | "filtered out" => self.skipped += n,
                _ => {}
            }
        }
    }

    /// Whether a run with these counts proves something and nothing against it.
    pub(crate) fn is_good(&self, skipping_fails: bool) -> bool {
        self.passed > 0 && self.failed == 0 && (self.skipped == 0 || !skipping_fails)
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn result_lines_are_summed_and_nothing_else() {
        let mut counts = Counts::default();
        for line in [
            "running 4 tests",
            "test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s",
            "test a::b ... ok",
            "test result: FAILED. 7 passed; 2 failed; 0 ignored; 0 measured; 5 filtered out; finished in 2.23s",
            "test result: strange",
            "a test printed: test result: ok. 9 passed; 9 failed",
            "",
        ] {
            counts.add(line);
        }
        assert_eq!(counts.to_string(), "10 passed, 2 failed, 6 skipped");
    }

    #[test]
    fn only_a_run_that_proves_something_is_good() {
        let counts = |passed, failed, skipped| Counts { passed, failed, skipped };
        for (run, by_hand, in_ci) in [
            (counts(1, 0, 0), true, true),
            (counts(0, 0, 0), false, false),
            (counts(9, 1, 0), false, false),
            (counts(9, 0, 1), true, false),
        ] {
            assert_eq!((run.is_good(false), run.is_good(true)), (by_hand, in_ci), "{run}");
        }
    }
}
