//! The ledger: every write of the writer probe, whether it was acknowledged, and whether it is there afterwards. Pure.

use ambit_model::{Code, Refusal};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

/// One write, under one request id, however often it was sent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Write {
    /// Its number in this drill; part of the entry's name.
    pub number: u64,
    /// When it was first sent, milliseconds since the drill began.
    pub sent_ms: u64,
    /// When it was acknowledged.
    pub acked_ms: Option<u64>,
    /// How often it was sent.
    pub attempts: u32,
    /// Whether a repetition was answered `already_exists`: the cell had run the same request a second time.
    pub ran_again: bool,
    /// How often the entry was listed afterwards.
    pub listed: u32,
}

impl fmt::Display for Write {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let acked = self.acked_ms.map_or_else(|| "-".to_owned(), |t| t.to_string());
        let again = if self.ran_again { " again" } else { "" };
        write!(f, "{} {} {acked} {} {}{again}", self.number, self.sent_ms, self.attempts, self.listed)
    }
}
impl FromStr for Write {
    type Err = Refusal;
    fn from_str(s: &str) -> Result<Self, Refusal> {
        let bad = || Refusal::new(Code::DrillReportInvalid, "a write: number, sent, acked, attempts, listed", s);
        let words: Vec<&str> = s.split(' ').collect();
        let (words, ran_again) = match words.as_slice() {
            [head @ .., "again"] => (head.to_vec(), true),
            all => (all.to_vec(), false),
        };
        let [number, sent_ms, acked_ms, attempts, listed] = words.as_slice() else { return Err(bad()) };
        Ok(Write {
            number: number.parse().map_err(|_| bad())?,
            sent_ms: sent_ms.parse().map_err(|_| bad())?,
            acked_ms: if *acked_ms == "-" { None } else { Some(acked_ms.parse().map_err(|_| bad())?) },
            attempts: attempts.parse().map_err(|_| bad())?,
            ran_again,
            listed: listed.parse().map_err(|_| bad())?,
        })
    }
}
impl TryFrom<String> for Write {
    type Error = Refusal;
    fn try_from(s: String) -> Result<Self, Refusal> {
        s.parse()
    }
}
impl From<Write> for String {
    fn from(w: Write) -> String {
        w.to_string()
    }
}

/// The name of the entry that a write makes.
pub fn entry_name(run: &str, number: u64) -> String {
    format!("drill-{run}-{number}")
}

/// Marks how often each write's entry was listed after the drill.
pub fn reconcile(writes: &mut [Write], run: &str, listed: &[String]) {
    let mut counts: BTreeMap<&str, u32> = BTreeMap::new();
    for id in listed {
        *counts.entry(id.as_str()).or_insert(0) += 1;
    }
    for w in writes {
        w.listed = counts.get(entry_name(run, w.number).as_str()).copied().unwrap_or(0);
    }
}

/// What the ledger proves.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LedgerFigures {
    /// Writes sent.
    pub sent: u64,
    /// Writes acknowledged.
    pub acked: u64,
    /// Acknowledged, and gone.
    pub lost: u64,
    /// There twice, or run twice.
    pub duplicated: u64,
    /// Never acknowledged, yet there: allowed, the answer was lost and not the write.
    pub unacked_present: u64,
    /// Sent more than once before the acknowledgement.
    pub repeated: u64,
}

/// Counts the ledger.
pub fn figures(writes: &[Write]) -> LedgerFigures {
    let count = |f: fn(&Write) -> bool| writes.iter().filter(|w| f(w)).count() as u64;
    LedgerFigures {
        sent: writes.len() as u64,
        acked: count(|w| w.acked_ms.is_some()),
        lost: count(|w| w.acked_ms.is_some() && w.listed == 0),
        duplicated: count(|w| w.listed > 1 || w.ran_again),
        unacked_present: count(|w| w.acked_ms.is_none() && w.listed > 0),
        repeated: count(|w| w.attempts > 1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(number: u64, acked: bool) -> Write {
        Write {
            number,
            sent_ms: number * 10,
            acked_ms: acked.then_some(number * 10 + 3),
            attempts: 1,
            ran_again: false,
            listed: 0,
        }
    }

    #[test]
    fn lost_and_doubled_writes_are_found() {
        let mut writes = vec![write(0, true), write(1, true), write(2, false), write(3, false), write(4, true)];
        writes[4].attempts = 3;
        let listed: Vec<String> = [0, 2, 4, 4].map(|n| entry_name("ab", n)).into();
        let others = ["web".to_owned(), entry_name("cd", 1)];
        reconcile(&mut writes, "ab", &[listed, others.into()].concat());
        let expected = LedgerFigures { sent: 5, acked: 3, lost: 1, duplicated: 1, unacked_present: 1, repeated: 1 };
        assert_eq!(figures(&writes), expected);
        writes[0].ran_again = true;
        assert_eq!(figures(&writes).duplicated, 2);
    }

    #[test]
    fn a_clean_run_has_nothing_to_report() {
        let mut writes: Vec<Write> = (0..50).map(|n| write(n, true)).collect();
        let listed: Vec<String> = (0..50).map(|n| entry_name("ab", n)).collect();
        reconcile(&mut writes, "ab", &listed);
        assert_eq!(figures(&writes), LedgerFigures { sent: 50, acked: 50, ..Default::default() });
    }

    #[test]
    fn writes_read_back_from_their_text() {
        for text in ["7 70 73 1 1", "8 80 - 4 0", "9 90 99 2 1 again"] {
            assert_eq!(text.parse::<Write>().unwrap().to_string(), text);
        }
        for text in ["", "1 2 3", "1 2 x 4 5", "1 2 3 4 5 6", "1 2 3 4 5 twice"] {
            assert!(text.parse::<Write>().is_err(), "{text}");
        }
    }
}
