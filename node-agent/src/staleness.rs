//! What a node does by what it holds when its cell, or its agent, is not heard any more: for how long, and what ends then. Pure.

use ambit_model::{Code, Refusal};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::time::Duration;

/// Without the agent, new connections are judged for this long, then refused: long enough for an upgrade.
pub const LEASE: Duration = Duration::from_secs(60);

/// A replica tells every eight seconds what its leader wrote last, and a node leaves one that tells nothing new for half a
/// minute: less would end connections where nothing is wrong but a replica.
const AFTER_S_MIN: u64 = 60;
const AFTER_S_MAX: u64 = 30 * 24 * 3600;

/// What ends with the lease, and with [`StaleAfter`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "&'static str")]
pub enum FailMode {
    /// No connection begins; those that are open go on.
    #[default]
    Closed,
    /// No connection begins, and those that are open end.
    Strict,
    /// Nothing: what was in force last stays so.
    Static,
}

impl From<FailMode> for &'static str {
    fn from(mode: FailMode) -> Self {
        match mode {
            FailMode::Closed => "closed",
            FailMode::Strict => "strict",
            FailMode::Static => "static",
        }
    }
}

impl TryFrom<String> for FailMode {
    type Error = Refusal;
    fn try_from(s: String) -> Result<Self, Refusal> {
        let all = [Self::Closed, Self::Strict, Self::Static];
        let found = all.into_iter().find(|mode| <&str>::from(*mode) == s);
        found.ok_or_else(|| Refusal::new(Code::ConfigInvalid, "'fail_mode' as closed, strict or static", s))
    }
}

impl fmt::Display for FailMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str((*self).into())
    }
}

/// How old the cell's last word may be, in seconds; a day unless told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "u64")]
pub struct StaleAfter(pub Duration);

impl Default for StaleAfter {
    fn default() -> Self {
        Self(Duration::from_secs(24 * 3600))
    }
}

impl TryFrom<u64> for StaleAfter {
    type Error = Refusal;
    fn try_from(seconds: u64) -> Result<Self, Refusal> {
        if (AFTER_S_MIN..=AFTER_S_MAX).contains(&seconds) {
            return Ok(Self(Duration::from_secs(seconds)));
        }
        let expected = format!("'stale_after_s' of {AFTER_S_MIN}-{AFTER_S_MAX} seconds");
        Err(Refusal::new(Code::ConfigInvalid, expected, seconds.to_string()))
    }
}

/// What is held is good for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Worth {
    /// New connections, and those that are open.
    #[default]
    All,
    /// Those that are open.
    Open,
    /// None.
    Nothing,
}

/// A node's choice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Staleness {
    /// What ends.
    pub mode: FailMode,
    /// And when, without the cell.
    pub after: StaleAfter,
}

impl Staleness {
    /// For how long from now the kernel may judge without another word of the agent; `age` is that of the cell's last word,
    /// none before the first. None: as long as it was told before.
    pub fn lease(&self, age: Option<Duration>) -> Option<Duration> {
        match (self.mode, age) {
            (FailMode::Static, _) => Some(Duration::MAX),
            (_, None) => None,
            (_, Some(age)) => Some(self.after.0.saturating_sub(age).min(LEASE)),
        }
    }

    /// What is held is good for, where the cell's last word is of this age. Before the first there is nothing to act upon.
    pub fn worth(&self, age: Option<Duration>) -> Worth {
        if age.is_none_or(|age| age < self.after.0) {
            return Worth::All;
        }
        match self.mode {
            FailMode::Closed => Worth::Open,
            FailMode::Strict => Worth::Nothing,
            FailMode::Static => Worth::All,
        }
    }
}

/// Why nothing begins, or goes on, on a node whose cell was not heard for too long.
pub fn stale() -> Refusal {
    Refusal::new(Code::PolicyStale, "word of the cell within 'stale_after_s'", "none for longer")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lease_is_never_longer_than_the_cells_word_is_good_for() {
        let s = |s| Duration::from_secs(s);
        let of = |mode, after| Staleness { mode, after: StaleAfter(s(after)) };
        for (mode, age, lease, worth) in [
            (FailMode::Closed, None, None, Worth::All),
            (FailMode::Closed, Some(s(0)), Some(LEASE), Worth::All),
            (FailMode::Closed, Some(s(240)), Some(LEASE), Worth::All),
            (FailMode::Closed, Some(s(299)), Some(s(1)), Worth::All),
            (FailMode::Closed, Some(s(300)), Some(s(0)), Worth::Open),
            (FailMode::Strict, None, None, Worth::All),
            (FailMode::Strict, Some(s(250)), Some(s(50)), Worth::All),
            (FailMode::Strict, Some(s(9_000)), Some(s(0)), Worth::Nothing),
            (FailMode::Static, None, Some(Duration::MAX), Worth::All),
            (FailMode::Static, Some(s(9_000)), Some(Duration::MAX), Worth::All),
        ] {
            let found = of(mode, 300);
            assert_eq!((found.lease(age), found.worth(age)), (lease, worth), "{mode} {age:?}");
        }
        assert_eq!(Staleness::default(), of(FailMode::Closed, 86_400));
    }
}
