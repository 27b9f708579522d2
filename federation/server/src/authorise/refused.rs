//! What was refused here, for operators: a row for each caller, method and code, of bounded number. Nothing is sampled: each
//! refusal is counted and logged, and its row says how often and when.

use ambit_model::Code;
use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

/// Rows kept of identified callers, and of strangers. Apart, so that strangers, who have as many addresses as they like,
/// never displace what an identity did.
const IDENTIFIED_MAX: usize = 2_048;
const STRANGERS_MAX: usize = 256;
/// The name of a method that is not ours comes from the caller.
const METHOD_BYTES_MAX: usize = 128;

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

#[derive(Default)]
struct Rows {
    identified: BTreeMap<RefusalKey, RefusalRow>,
    strangers: BTreeMap<RefusalKey, RefusalRow>,
    by_code: BTreeMap<&'static str, u64>,
}

/// The refusals of one replica since it started.
#[derive(Default)]
pub struct Refusals(Mutex<Rows>);

impl Refusals {
    /// Notes one. `stranger`: without a certificate.
    pub fn note(&self, caller: &str, stranger: bool, method: &str, code: Code, now_ms: u64) {
        let code = code.as_str();
        tracing::info!(caller, method, code, "call refused");
        let method: String = method.chars().take(METHOD_BYTES_MAX).collect();
        let key = RefusalKey { caller: caller.to_owned(), method, code };
        let mut rows = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *rows.by_code.entry(code).or_default() += 1;
        let (kept, max) =
            if stranger { (&mut rows.strangers, STRANGERS_MAX) } else { (&mut rows.identified, IDENTIFIED_MAX) };
        if let Some(row) = kept.get_mut(&key) {
            (row.count, row.last_ms) = (row.count + 1, now_ms);
            return;
        }
        if kept.len() >= max {
            let oldest = kept.iter().min_by_key(|(_, row)| row.last_ms).map(|(key, _)| key.clone());
            oldest.map(|key| kept.remove(&key));
        }
        kept.insert(key, RefusalRow { count: 1, first_ms: now_ms, last_ms: now_ms });
    }

    /// All rows, newest first.
    pub fn rows(&self) -> Vec<(RefusalKey, RefusalRow)> {
        let rows = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut all: Vec<_> =
            rows.identified.iter().chain(&rows.strangers).map(|(key, row)| (key.clone(), *row)).collect();
        all.sort_by_key(|(_, row)| std::cmp::Reverse(row.last_ms));
        all
    }

    /// How many there were, by code.
    pub fn by_code(&self) -> BTreeMap<&'static str, u64> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).by_code.clone()
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
    }
}
