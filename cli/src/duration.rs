//! Durations as people write them: a whole number and a unit, `10ms`, `3s`, `2m`, `1h`.

use ambit_model::{Code, Refusal};
use serde::Deserialize;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// A length of time in whole milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
pub struct Millis(pub u64);

/// Nothing here runs longer than a day; a longer value is a typing error.
const MILLIS_MAX: u64 = 24 * 3600 * 1000;

impl Millis {
    /// As the standard type.
    pub fn duration(self) -> Duration {
        Duration::from_millis(self.0)
    }
}

impl FromStr for Millis {
    type Err = Refusal;
    fn from_str(s: &str) -> Result<Self, Refusal> {
        let bad = || Refusal::new(Code::BadRequest, "a whole number with a unit ms, s, m or h, at most 24h", s);
        let digits = s.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = s.split_at(digits);
        let number: u64 = number.parse().map_err(|_| bad())?;
        let factor = match unit {
            "ms" => 1,
            "s" => 1000,
            "m" => 60_000,
            "h" => 3_600_000,
            _ => return Err(bad()),
        };
        match number.checked_mul(factor) {
            Some(ms) if ms <= MILLIS_MAX => Ok(Millis(ms)),
            _ => Err(bad()),
        }
    }
}
impl TryFrom<String> for Millis {
    type Error = Refusal;
    fn try_from(s: String) -> Result<Self, Refusal> {
        s.parse()
    }
}
impl fmt::Display for Millis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0 => f.write_str("0s"),
            ms if ms % 3_600_000 == 0 => write!(f, "{}h", ms / 3_600_000),
            ms if ms % 60_000 == 0 => write!(f, "{}m", ms / 60_000),
            ms if ms % 1000 == 0 => write!(f, "{}s", ms / 1000),
            ms => write!(f, "{ms}ms"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_read_and_nonsense_refused() {
        for (text, ms) in [("10ms", 10), ("3s", 3000), ("2m", 120_000), ("24h", MILLIS_MAX), ("0s", 0)] {
            let read: Millis = text.parse().unwrap();
            assert_eq!(read.0, ms, "{text}");
        }
        assert_eq!(Millis(3000).to_string(), "3s");
        assert_eq!(Millis(1500).to_string(), "1500ms");
        for text in ["", "3", "s", "1.5s", "-1s", "3 s", "25h", "99999999999999999999s", "3d"] {
            assert!(text.parse::<Millis>().is_err(), "{text:?}");
        }
    }
}
