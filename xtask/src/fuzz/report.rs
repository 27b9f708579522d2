//! What libFuzzer says, read.

use std::fmt;
use std::path::Path;

/// Bytes of a finding, and characters of a line of its message, that are printed.
const SHOWN_MAX: usize = 256;

pub(super) const HEADER: &str = "target           executions    per s  coverage  corpus     RSS  verdict";

/// One line of the table.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Row {
    name: String,
    pub(super) executions: u64,
    per_second: u64,
    /// Places in the code that were reached.
    coverage: u64,
    /// Inputs that are kept, each for something that no other reaches.
    corpus: u64,
    rss_mib: u64,
    crashed: bool,
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Row { name, executions, per_second, coverage, corpus, rss_mib, crashed } = self;
        let verdict = match (crashed, executions) {
            (true, _) => "CRASH",
            (false, 0) => "NOT RUN",
            (false, _) => "ok",
        };
        write!(f, "{name:<16} {executions:>10} {per_second:>8} {coverage:>9} {corpus:>7} {rss_mib:>4}MiB  {verdict}")
    }
}

/// A finding.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Crash {
    /// The message of the panic, or libFuzzer's summary.
    pub(super) why: String,
    /// The input, as a file; none where the process ended by itself.
    input: Option<String>,
}

impl Crash {
    /// What to print: why, the input, and how to see it again.
    pub(super) fn text(&self, target: &str, engine: &Path) -> String {
        let Some(input) = &self.input else { return format!("  {}", self.why) };
        let bytes = std::fs::read(input).unwrap_or_default();
        let hex: String = bytes.iter().take(SHOWN_MAX).map(|byte| format!("{byte:02x}")).collect();
        let more = if bytes.len() > SHOWN_MAX { "..." } else { "" };
        let again = format!("AMBIT_FUZZ={target} {} {input}", engine.display());
        format!("  {}\n  input: {input} ({} bytes)\n  {hex}{more}\n  again: {again}", self.why, bytes.len())
    }
}

/// How the run of one target ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Outcome {
    pub(super) row: Row,
    pub(super) crash: Option<Crash>,
}

impl Outcome {
    /// Reads libFuzzer's log. Anything but exit code 0 is a crash, also where the log says nothing of one.
    pub(super) fn read(name: &str, log: &str, code: Option<i32>) -> Outcome {
        let mut row = Row { name: name.to_owned(), ..Row::default() };
        let (mut panic, mut summary, mut input) = (None, None, None);
        let mut lines = log.lines().peekable();
        while let Some(line) = lines.next() {
            if let Some((key, value)) = line.strip_prefix("stat::").and_then(|rest| rest.split_once(':')) {
                let value = value.trim().parse().unwrap_or(0);
                match key {
                    "number_of_executed_units" => row.executions = value,
                    "average_exec_per_sec" => row.per_second = value,
                    "peak_rss_mb" => row.rss_mib = value,
                    _ => {}
                }
            } else if line.starts_with('#') {
                progress(line, &mut row);
            } else if line.starts_with("thread ") && line.contains(" panicked at ") {
                panic = Some(message(&mut lines));
            } else if line.starts_with("SUMMARY: ") {
                summary = Some(line.to_owned());
            } else if let Some((_, path)) = line.split_once("Test unit written to ") {
                input = Some(path.trim().to_owned());
            }
        }
        let crash = (code != Some(0)).then(|| {
            let ended = format!("ended with {}", code.map_or("a signal".to_owned(), |n| n.to_string()));
            Crash { why: panic.or(summary).unwrap_or(ended), input }
        });
        row.crashed = crash.is_some();
        Outcome { row, crash }
    }
}

/// The lines of a panic's message: what follows is a backtrace, or a word on how to get one.
fn message<'a>(lines: &mut std::iter::Peekable<impl Iterator<Item = &'a str>>) -> String {
    let mut out = Vec::new();
    while let Some(line) = lines.next_if(|line| {
        !["stack backtrace:", "note:", "==", "SUMMARY:"].iter().any(|end| line.starts_with(end)) && !line.is_empty()
    }) {
        out.push(line.chars().take(SHOWN_MAX).collect::<String>());
    }
    out.join("\n  ")
}

/// `#1234  NEW    cov: 56 ft: 78 corp: 9/10Kb lim: 11 exec/s: 12 rss: 34Mb ...`
fn progress(line: &str, row: &mut Row) {
    let mut words = line.split_whitespace();
    let seen = words.next().and_then(|word| word.strip_prefix('#')).and_then(|n| n.parse().ok());
    // Where no statistics follow (it was killed), the last line of progress counts.
    row.executions = seen.unwrap_or(row.executions);
    while let Some(word) = words.next() {
        let mut number = || words.next().and_then(|w| w.split('/').next()).and_then(|n| n.parse().ok());
        match word {
            "cov:" => row.coverage = number().unwrap_or(row.coverage),
            "corp:" => row.corpus = number().unwrap_or(row.corpus),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "\
INFO: Seed: 1
#2\tINITED cov: 10 ft: 11 corp: 1/5b exec/s: 0 rss: 27Mb
#900\tREDUCE cov: 12 ft: 13 corp: 3/12b lim: 11 exec/s: 0 rss: 27Mb L: 6/6 MS: 1 EraseBytes-
#2798\tDONE   cov: 14 ft: 15 corp: 5/21b lim: 4096 exec/s: 2543701 rss: 27Mb
Done 2798 runs in 11 second(s)
stat::number_of_executed_units: 2798
stat::average_exec_per_sec:     254
stat::new_units_added:          4
stat::slowest_unit_time_sec:    0
stat::peak_rss_mb:              31
";

    #[test]
    fn a_good_run_is_read() {
        let outcome = Outcome::read("ticket", GOOD, Some(0));
        assert_eq!(outcome.crash, None);
        let line = "ticket                 2798      254        14       5   31MiB  ok";
        assert_eq!(outcome.row.to_string(), line);
    }

    #[test]
    fn a_crash_is_read_with_its_message_and_input() {
        let log = "\
#7\tpulse  cov: 1 ft: 1 corp: 1/1b exec/s: 0 rss: 1Mb

thread '<unnamed>' (77) panicked at attestation/verify/src/wire.rs:1:1:
index out of bounds:
  the len is 3 but the index is 3
stack backtrace:
   0: __rustc::rust_begin_unwind
==77== ERROR: libFuzzer: deadly signal
SUMMARY: libFuzzer: deadly signal
artifact_prefix='target/fuzz/findings/ticket/'; Test unit written to target/fuzz/findings/ticket/crash-abc
stat::number_of_executed_units: 8
";
        let outcome = Outcome::read("ticket", log, Some(77));
        let why = "index out of bounds:\n    the len is 3 but the index is 3".to_owned();
        assert_eq!(outcome.crash, Some(Crash { why, input: Some("target/fuzz/findings/ticket/crash-abc".into()) }));
        assert_eq!((outcome.row.executions, outcome.row.crashed), (8, true));
    }

    #[test]
    fn what_ends_badly_is_a_crash_whatever_it_says() {
        for (log, code, why) in [
            ("", None, "ended with a signal"),
            (GOOD, Some(1), "ended with 1"),
            ("SUMMARY: libFuzzer: timeout\n", Some(70), "SUMMARY: libFuzzer: timeout"),
        ] {
            assert_eq!(Outcome::read("x", log, code).crash.map(|crash| crash.why).as_deref(), Some(why));
        }
        assert_eq!(Outcome::read("x", "", Some(0)).row.executions, 0, "and this one proves nothing");
    }
}
