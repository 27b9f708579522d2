//! Points in time as text. Cells speak milliseconds since the Unix epoch.

/// `2026-11-23T14:03:26Z`; empty for 0, which cells use for "never".
pub fn text(ms: u64) -> String {
    if ms == 0 {
        return String::new();
    }
    let seconds = ms / 1000;
    let (days, of_day) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil(days);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", of_day / 3600, of_day / 60 % 60, of_day % 60)
}

/// The instant in a text as [`text`] writes it.
pub fn parse(written: &str) -> Option<u64> {
    let (date, time) = written.strip_suffix('Z')?.split_once('T')?;
    let number = |s: &str, digits: usize| s.parse::<u64>().ok().filter(|_| s.len() == digits);
    let mut date = date.split('-');
    let (year, month, day) = (number(date.next()?, 4)?, number(date.next()?, 2)?, number(date.next()?, 2)?);
    let mut time = time.split(':');
    let (hour, minute, second) = (number(time.next()?, 2)?, number(time.next()?, 2)?, number(time.next()?, 2)?);
    if date.next().is_some() || time.next().is_some() || hour > 23 || minute > 59 || second > 59 || year < 1970 {
        return None;
    }
    // Days since the epoch by the inverse of `civil`, checked by going back: 31 February is no day.
    let shifted = if month <= 2 { year - 1 } else { year };
    let from_march = (month + 9) % 12;
    let of_year = (153 * from_march + 2) / 5 + day.checked_sub(1)?;
    let of_era = (shifted % 400) * 365 + (shifted % 400) / 4 - (shifted % 400) / 100 + of_year;
    let days = (shifted / 400 * 146_097 + of_era).checked_sub(719_468)?;
    let ms = (((days * 24 + hour) * 60 + minute) * 60 + second) * 1000;
    (ms == 0 || self::text(ms) == written).then_some(ms)
}

/// Year, month and day of a day counted from 1970-01-01 (the era method: 400-year cycles of 146 097 days).
fn civil(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let era = shifted / 146_097;
    let of_era = shifted % 146_097;
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    (year_of_era + era * 400 + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_written_instant_is_read_back_and_no_other_text() {
        for ms in [1_000, 951_782_400_000, 1_795_442_606_000, 4_102_444_800_000, 1_709_164_800_000] {
            assert_eq!(parse(&text(ms)), Some(ms));
        }
        for written in
            ["", "2026-11-23", "2026-11-23T14:03:26", "2026-02-30T00:00:00Z", "2026-11-23T24:00:00Z", "1-1-1T1:1:1Z"]
        {
            assert_eq!(parse(written), None, "{written}");
        }
        for (ms, written) in [
            (0, ""),
            (1000, "1970-01-01T00:00:01Z"),
            (951_782_400_000, "2000-02-29T00:00:00Z"),
            (1_709_164_799_000, "2024-02-28T23:59:59Z"),
            (4_102_444_800_000, "2100-01-01T00:00:00Z"),
        ] {
            assert_eq!(text(ms), written, "{ms}");
        }
    }
}
