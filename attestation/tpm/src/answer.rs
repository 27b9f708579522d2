//! What a TPM's response code means for the operation that got it (TPM 2.0 Part 2, 6.6.3).

use std::time::Duration;
use tss_esapi::Error;
use tss_esapi::constants::response_code::Tss2ResponseCodeKind as Kind;

/// Pauses between attempts. libtss2 itself sends a command five times without any pause, so this is for a TPM that is
/// busy for longer: testing itself after power-on, or sparing its flash.
const PAUSE_FIRST: Duration = Duration::from_millis(20);
const PAUSE_MAX: Duration = Duration::from_millis(500);

/// What to do after an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// The same again after a pause, as long as there is time.
    Again,
    /// Leave the TPM alone.
    Rest,
    /// Empty its slots, then once more.
    Flush,
    /// Give up.
    Fail,
}

pub(crate) fn next(error: &Error) -> Next {
    match kind(error) {
        // Canceled is what the driver makes of a suspend in the middle of a command.
        Some(Kind::Retry | Kind::Yielded | Kind::Testing | Kind::NvRate | Kind::Canceled) => Next::Again,
        Some(Kind::Lockout) => Next::Rest,
        Some(Kind::ObjectMemory | Kind::ObjectHandles | Kind::SessionMemory | Kind::SessionHandles) => Next::Flush,
        _ => Next::Fail,
    }
}

/// Whether a wrapped key or a saved context is another TPM's, or of before its last reset (Part 1, 27.5 and 30).
pub(crate) fn is_foreign(error: &Error) -> bool {
    kind(error) == Some(Kind::Integrity)
}

/// The pause after `attempts` attempts.
pub(crate) fn pause(attempts: u32) -> Duration {
    PAUSE_FIRST.saturating_mul(1 << attempts.saturating_sub(1).min(5)).min(PAUSE_MAX)
}

fn kind(error: &Error) -> Option<Kind> {
    match error {
        Error::Tss2Error(code) => code.kind(),
        Error::WrapperError(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_bound() {
        let pauses: Vec<u128> = (1..=7).map(|n| pause(n).as_millis()).collect();
        assert_eq!(pauses, [20, 40, 80, 160, 320, 500, 500]);
        assert_eq!(pause(u32::MAX), PAUSE_MAX);
    }
}
