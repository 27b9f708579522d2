//! Points in time and ages as text. Cells speak milliseconds since the Unix epoch.

use std::time::{SystemTime, UNIX_EPOCH};

/// Now, in milliseconds since the Unix epoch; 0 on a clock before it.
pub fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map(|d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX)).unwrap_or(0)
}

pub use ambit_model::utc::{parse as parse_utc, text as utc};

/// An age in the largest unit that keeps two digits of meaning: `850ms`, `12s`, `5m`, `3h`, `9d`; cells say the
/// largest number for what never was.
pub fn age(ms: u64) -> String {
    match ms {
        0..1000 => format!("{ms}ms"),
        1000..120_000 => format!("{}s", ms / 1000),
        120_000..7_200_000 => format!("{}m", ms / 60_000),
        7_200_000..172_800_000 => format!("{}h", ms / 3_600_000),
        u64::MAX => "never".to_owned(),
        _ => format!("{}d", ms / 86_400_000),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_keep_two_digits_of_meaning() {
        assert_eq!([age(200_000_000), age(u64::MAX)], ["2d", "never"]);
        assert_eq!([age(5), age(12_000), age(300_000), age(10_000_000)], ["5ms", "12s", "5m", "2h"]);
    }
}
