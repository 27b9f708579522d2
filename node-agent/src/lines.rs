//! How many lines of one kind are logged: what a caller can bring about at will must not fill the disk.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

/// Lines a second of one kind.
const LINES_MAX: u32 = 10;
const SECOND: Duration = Duration::from_secs(1);

/// The lines of one kind.
#[derive(Debug, Default)]
pub struct Lines(Mutex<Told>);

#[derive(Debug, Default)]
struct Told {
    /// The second that runs.
    since: Option<Instant>,
    lines: u32,
    left_out: u64,
}

impl Lines {
    /// Whether a line may be written, and how many were left out since the last one.
    pub fn next(&self, now: Instant) -> Option<u64> {
        let mut told = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if told.since.is_none_or(|since| now.saturating_duration_since(since) >= SECOND) {
            (told.since, told.lines) = (Some(now), 0);
        }
        if told.lines >= LINES_MAX {
            told.left_out += 1;
            return None;
        }
        told.lines += 1;
        Some(std::mem::take(&mut told.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ten_lines_a_second_and_how_many_there_would_have_been() {
        let (lines, begun) = (Lines::default(), Instant::now());
        let told: Vec<_> = (0..1_000).filter_map(|n| lines.next(begun + Duration::from_micros(n * 900))).collect();
        assert_eq!(told, [0; 10]);
        assert_eq!(lines.next(begun + SECOND), Some(990));
        assert_eq!(lines.next(begun + SECOND), Some(0));
    }
}
