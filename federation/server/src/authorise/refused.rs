//! What was refused here, for operators: a row for each caller, method and code, and a line of the log. Both are bounded, so
//! that who is refused fills neither memory nor disk, and what is left out is counted: each refusal is in a row, in a
//! line, or in a count.

use crate::replica::wall_clock;
use ambit_model::Code;
use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

/// What callers of a kind are given of rows and lines. Apart, so that strangers, who have as many addresses as they like, and
/// whoever came by many SVIDs that nothing here is for, never displace what an administrator, a node or a replica did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Who has a role.
    Role,
    /// A certificate, and no role.
    NoRole,
    /// No certificate.
    Stranger,
}

impl Standing {
    fn rows_max(self) -> usize {
        match self {
            Self::Role => 2_048,
            Self::NoRole => 512,
            Self::Stranger => 256,
        }
    }
    fn rate(self) -> Rate {
        match self {
            Self::Role => ROLE_LINES,
            Self::NoRole | Self::Stranger => OTHER_LINES,
        }
    }
}

/// The name of a method that is not ours comes from the caller.
const METHOD_BYTES_MAX: usize = 128;
/// The same caller, method and code is logged once in so long, with how often it was meanwhile.
const REPEAT_MS: u64 = 60_000;
/// Lines of the log: of those with a role enough that each may be refused every method each minute, and some at once; of
/// others about as much as a small disk bears for ever, 30 MiB a day.
const ROLE_LINES: Rate = Rate { per_second: 20, burst: 4_096 };
const OTHER_LINES: Rate = Rate { per_second: 1, burst: 512 };

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
    with_role: Callers,
    without: Callers,
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
    /// Notes one.
    pub fn note(&self, caller: &str, standing: Standing, method: &str, code: Code, now_ms: u64) {
        let code = code.as_str();
        let method: String = method.chars().take(METHOD_BYTES_MAX).collect();
        let key = RefusalKey { caller: caller.to_owned(), method, code };
        let mut rows = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Rows { with_role, without, strangers, by_code, left_out } = &mut *rows;
        *by_code.entry(code).or_default() += 1;
        let Callers { kept, lines } = match standing {
            Standing::Role => with_role,
            Standing::NoRole => without,
            Standing::Stranger => strangers,
        };
        if !kept.contains_key(&key) && kept.len() >= standing.rows_max() {
            let oldest = kept.iter().min_by_key(|(_, kept)| kept.row.last_ms).map(|(key, _)| key.clone());
            left_out.forgotten += oldest.and_then(|key| kept.remove(&key)).map_or(0, |kept| kept.row.count);
        }
        let first = RefusalRow { count: 0, first_ms: now_ms, last_ms: now_ms };
        let one = kept.entry(key.clone()).or_insert(Kept { row: first, logged_ms: 0, unlogged: 0 });
        (one.row.count, one.row.last_ms) = (one.row.count + 1, now_ms);
        let due = one.row.count == 1 || now_ms.saturating_sub(one.logged_ms) >= REPEAT_MS;
        if due && lines.take(&standing.rate(), now_ms) {
            let RefusalKey { caller, method, code } = &key;
            tracing::info!(caller, method, code, left_out = one.unlogged, "call refused");
            (one.logged_ms, one.unlogged) = (now_ms, 0);
        } else {
            one.unlogged += 1;
            left_out.unlogged += 1;
        }
    }

    /// Whether a line that says more of the refusal of a caller with a role may be written.
    pub fn may_log(&self, now_ms: u64) -> bool {
        let mut rows = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        rows.with_role.lines.take(&ROLE_LINES, now_ms)
    }

    /// Notes one of many items of a call that was answered, where it was refused to the caller, who has a role.
    pub fn note_denied(&self, caller: &str, method: &str, code: Code) {
        if super::audited(code) {
            self.note(caller, Standing::Role, method, code, wall_clock().0);
        }
    }

    /// All rows, newest first.
    pub fn rows(&self) -> Vec<(RefusalKey, RefusalRow)> {
        let rows = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = [&rows.with_role, &rows.without, &rows.strangers].into_iter().flat_map(|callers| &callers.kept);
        let mut all: Vec<_> = kept.map(|(key, kept)| (key.clone(), kept.row)).collect();
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
    fn each_is_counted_and_neither_strangers_nor_many_identities_displace_who_has_a_role() {
        let refusals = Refusals::default();
        let admin = "spiffe://west/ambit/admin/a";
        let many = |standing: Standing| standing.rows_max() as u64 + 50;
        refusals.note(admin, Standing::Role, "/m", Code::PermissionDenied, 1);
        for n in 0..many(Standing::Stranger) {
            let from = format!("anonymous 10.0.{}.{}", n / 200, n % 200);
            refusals.note(&from, Standing::Stranger, "/m", Code::Unauthenticated, 2 + n);
        }
        for n in 0..many(Standing::NoRole) {
            refusals.note(&format!("spiffe://west/w/{n}"), Standing::NoRole, "/m", Code::PermissionDenied, 2 + n);
        }
        refusals.note(admin, Standing::Role, "/m", Code::PermissionDenied, 900);
        let rows = refusals.rows();
        assert_eq!(rows.len(), Standing::Stranger.rows_max() + Standing::NoRole.rows_max() + 1);
        let (key, row) = &rows[0];
        assert_eq!((key.caller.as_str(), row.count, row.first_ms, row.last_ms), (admin, 2, 1, 900));
        for oldest in ["anonymous 10.0.0.0", "spiffe://west/w/0"] {
            assert!(!rows.iter().any(|(key, _)| key.caller == oldest), "{oldest} gave way");
        }
        let all = BTreeMap::from([
            ("permission_denied", 2 + many(Standing::NoRole)),
            ("unauthenticated", many(Standing::Stranger)),
        ]);
        assert_eq!(refusals.by_code(), all);
        assert_eq!(refusals.left_out().forgotten, 100);
    }

    /// So often, so many ms apart: lines, by what was not left out.
    fn logged(standing: Standing, callers: u64, times: u64, apart_ms: u64) -> u64 {
        let refusals = Refusals::default();
        let mut now = 1_000_000;
        for n in 0..times {
            refusals.note(&format!("c{}", n % callers), standing, "/m", Code::PermissionDenied, now);
            now += apart_ms;
        }
        times - refusals.left_out().unlogged
    }

    #[test]
    fn lines_of_the_log_are_bounded_and_the_rest_is_counted() {
        for (what, standing, callers, times, apart_ms, lines) in [
            ("each of many callers once", Standing::Role, 2_000, 2_000, 0, 2_000),
            ("one, all the time, for ten minutes", Standing::Role, 1, 60_000, 10, 10),
            ("one, each minute", Standing::Role, 1, 10, 60_000, 10),
            ("many SVIDs without a role at once", Standing::NoRole, 100_000, 100_000, 0, 512),
            ("strangers from everywhere at once", Standing::Stranger, 100_000, 100_000, 0, 512),
            ("strangers from everywhere, for a hundred seconds", Standing::Stranger, 100_000, 100_000, 1, 512 + 99),
        ] {
            assert_eq!(logged(standing, callers, times, apart_ms), lines, "{what}");
        }
    }
}
