//! What was refused here, for operators: a row for each caller, method and code, and a line of the log. Both are bounded, so
//! that who is refused fills neither memory nor disk, and what is left out is counted: each refusal is in a row, in a
//! line, or in a count.

use crate::replica::wall_clock;
use ambit_model::Code;
use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

/// Rows kept of identified callers, and of strangers. Apart, so that strangers, who have as many addresses as they like,
/// never displace what an identity did.
const IDENTIFIED_MAX: usize = 2_048;
const STRANGERS_MAX: usize = 256;
/// The name of a method that is not ours comes from the caller.
const METHOD_BYTES_MAX: usize = 128;
/// The same caller, method and code is logged once in so long, with how often it was meanwhile.
const REPEAT_MS: u64 = 60_000;
/// Lines of the log: of identified callers enough that each may be refused every method each minute, and some at once; of
/// strangers about as much as a small disk bears for ever, 30 MiB a day.
const IDENTIFIED_LINES: Rate = Rate { per_second: 20, burst: 4_096 };
const STRANGERS_LINES: Rate = Rate { per_second: 1, burst: 512 };

/// Who was refused what, and why.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct RefusalKey {
    /// SPIFFE ID, or `anonymous` and the address.
    pub caller: String,
    /// The path called.
    pub method: String,
    /// The stable code.
    pub code: &'static str,
}

/// How often, and when. Times are this machine's, milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RefusalRow {
    /// How often.
    pub count: u64,
    /// First.
    pub first_ms: u64,
    /// Last.
    pub last_ms: u64,
}

struct Rate {
    per_second: u64,
    burst: u64,
}

/// Lines that may still be written.
#[derive(Default)]
struct Lines {
    used: u64,
    since_ms: u64,
}

impl Lines {
    fn take(&mut self, rate: &Rate, now_ms: u64) -> bool {
        let seconds = now_ms.saturating_sub(self.since_ms) / 1_000;
        if seconds > 0 {
            self.used = self.used.saturating_sub(seconds.saturating_mul(rate.per_second));
            self.since_ms = now_ms;
        }
        let free = self.used < rate.burst;
        self.used += u64::from(free);
        free
    }
}

/// A row, and what the log lacks of it.
struct Kept {
    row: RefusalRow,
    logged_ms: u64,
    unlogged: u64,
}

#[derive(Default)]
struct Callers {
    kept: BTreeMap<RefusalKey, Kept>,
    lines: Lines,
}

#[derive(Default)]
struct Rows {
    identified: Callers,
    strangers: Callers,
    by_code: BTreeMap<&'static str, u64>,
    left_out: LeftOut,
}

/// What is counted only.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LeftOut {
    /// Refusals without a line of their own.
    pub unlogged: u64,
    /// Refusals whose row gave way to a newer one.
    pub forgotten: u64,
}

/// The refusals of one replica since it started.
#[derive(Default)]
pub struct Refusals(Mutex<Rows>);

impl Refusals {
    /// Notes one. `stranger`: without a certificate.
    pub fn note(&self, caller: &str, stranger: bool, method: &str, code: Code, now_ms: u64) {
        let code = code.as_str();
        let method: String = method.chars().take(METHOD_BYTES_MAX).collect();
        let key = RefusalKey { caller: caller.to_owned(), method, code };
        let mut rows = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Rows { identified, strangers, by_code, left_out } = &mut *rows;
        *by_code.entry(code).or_default() += 1;
        let (callers, max, rate) = match stranger {
            true => (strangers, STRANGERS_MAX, STRANGERS_LINES),
            false => (identified, IDENTIFIED_MAX, IDENTIFIED_LINES),
        };
        let Callers { kept, lines } = callers;
        if !kept.contains_key(&key) && kept.len() >= max {
            let oldest = kept.iter().min_by_key(|(_, kept)| kept.row.last_ms).map(|(key, _)| key.clone());
            left_out.forgotten += oldest.and_then(|key| kept.remove(&key)).map_or(0, |kept| kept.row.count);
        }
        let first = RefusalRow { count: 0, first_ms: now_ms, last_ms: now_ms };
        let one = kept.entry(key.clone()).or_insert(Kept { row: first, logged_ms: 0, unlogged: 0 });
        (one.row.count, one.row.last_ms) = (one.row.count + 1, now_ms);
        let due = one.row.count == 1 || now_ms.saturating_sub(one.logged_ms) >= REPEAT_MS;
        if due && lines.take(&rate, now_ms) {
            let RefusalKey { caller, method, code } = &key;
            tracing::info!(caller, method, code, left_out = one.unlogged, "call refused");
            (one.logged_ms, one.unlogged) = (now_ms, 0);
        } else {
            one.unlogged += 1;
            left_out.unlogged += 1;
        }
    }

    /// Whether a line that says more of an identified caller's refusal may be written.
    pub fn may_log(&self, now_ms: u64) -> bool {
        let mut rows = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        rows.identified.lines.take(&IDENTIFIED_LINES, now_ms)
    }

    /// Notes one of many items of a call that was answered, where it was refused to the caller.
    pub fn note_denied(&self, caller: &str, method: &str, code: Code) {
        if super::audited(code) {
            self.note(caller, false, method, code, wall_clock().0);
        }
    }

    /// All rows, newest first.
    pub fn rows(&self) -> Vec<(RefusalKey, RefusalRow)> {
        let rows = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let both = rows.identified.kept.iter().chain(&rows.strangers.kept);
        let mut all: Vec<_> = both.map(|(key, kept)| (key.clone(), kept.row)).collect();
        all.sort_by_key(|(_, row)| std::cmp::Reverse(row.last_ms));
        all
    }

    /// How many there were, by code.
    pub fn by_code(&self) -> BTreeMap<&'static str, u64> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).by_code.clone()
    }

    /// How many are counted only.
    pub fn left_out(&self) -> LeftOut {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).left_out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_is_counted_and_strangers_displace_nobody_who_is_known() {
        let refusals = Refusals::default();
        refusals.note("spiffe://west/ambit/admin/a", false, "/m", Code::PermissionDenied, 1);
        for n in 0..STRANGERS_MAX as u64 + 50 {
            refusals.note(&format!("anonymous 10.0.{}.{}", n / 200, n % 200), true, "/m", Code::Unauthenticated, 2 + n);
        }
        refusals.note("spiffe://west/ambit/admin/a", false, "/m", Code::PermissionDenied, 900);
        let rows = refusals.rows();
        assert_eq!(rows.len(), STRANGERS_MAX + 1);
        let (key, row) = &rows[0];
        assert_eq!(
            (key.caller.as_str(), row.count, row.first_ms, row.last_ms),
            ("spiffe://west/ambit/admin/a", 2, 1, 900)
        );
        assert!(!rows.iter().any(|(key, _)| key.caller == "anonymous 10.0.0.0"), "the oldest gave way");
        let all = STRANGERS_MAX as u64 + 50;
        assert_eq!(refusals.by_code(), BTreeMap::from([("permission_denied", 2), ("unauthenticated", all)]));
        assert_eq!(refusals.left_out().forgotten, 50);
    }

    /// So often, so many ms apart: lines, by what was not left out.
    fn logged(stranger: bool, callers: u64, times: u64, apart_ms: u64) -> u64 {
        let refusals = Refusals::default();
        let mut now = 1_000_000;
        for n in 0..times {
            refusals.note(&format!("c{}", n % callers), stranger, "/m", Code::PermissionDenied, now);
            now += apart_ms;
        }
        times - refusals.left_out().unlogged
    }

    #[test]
    fn lines_of_the_log_are_bounded_and_the_rest_is_counted() {
        for (what, stranger, callers, times, apart_ms, lines) in [
            ("each of many callers once", false, 2_000, 2_000, 0, 2_000),
            ("one, all the time, for ten minutes", false, 1, 60_000, 10, 10),
            ("one, each minute", false, 1, 10, 60_000, 10),
            ("strangers from everywhere at once", true, 100_000, 100_000, 0, 512),
            ("strangers from everywhere, for a hundred seconds", true, 100_000, 100_000, 1, 512 + 99),
        ] {
            assert_eq!(logged(stranger, callers, times, apart_ms), lines, "{what}");
        }
    }
}
