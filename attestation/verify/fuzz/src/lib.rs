//! Fuzz targets for the parsers of strangers' bytes, and what every target must hold: it answers, within a bound of
//! heap and of time that the input's length gives, and what it accepts is what an independent oracle accepts too.
//!
//! The targets are plain functions. `cargo xtask fuzz` drives them with libFuzzer (feature `engine`, instrumented) and
//! measures how their time grows ([`growth`]); `cargo test` runs each over its committed corpus. This crate is never
//! part of a product, and it must never be lenient: a finding is a panic.
#![warn(missing_docs)]
#![allow(
    clippy::panic,
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a target says that it found something by panicking"
)]

pub mod engine;
mod golden;
pub mod growth;
pub mod guard;
mod heap;
mod logs;
mod targets;

pub use targets::TARGETS;

use std::time::Duration;

/// Processor time of a request that is answered soon.
const SOON: Duration = Duration::from_millis(50);

/// What a parser said. A target that only ever gives one of the two tests little.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It took the input, and the oracle agreed.
    Accepted,
    /// It refused the input.
    Refused,
}

impl<T, E> From<&Result<T, E>> for Verdict {
    fn from(result: &Result<T, E>) -> Self {
        if result.is_ok() { Verdict::Accepted } else { Verdict::Refused }
    }
}

/// A parser under test.
pub struct Target {
    /// Its name: the folder of its corpus.
    pub name: &'static str,
    /// Longest input that mutation makes, in bytes: long enough for every branch, short enough for speed.
    pub len_max: usize,
    /// Processor time that one run may take, instrumented, whatever the input; 1 s for each MiB of it comes on top.
    pub cpu: Duration,
    /// Bytes of heap that one run may hold at once, by the input's length.
    pub heap: fn(usize) -> usize,
    /// Parses, consults the oracle, and panics where they differ.
    pub run: fn(&[u8]) -> Verdict,
    /// Inputs by which growth is measured.
    pub shapes: &'static [Shape],
}

/// A family of inputs, one of each length.
pub struct Shape {
    /// What is in them.
    pub name: &'static str,
    /// Bytes of the largest one: the parser's own limit, wherever that can be run in seconds.
    pub bytes: usize,
    /// The input of about this many bytes.
    pub make: fn(usize) -> Vec<u8>,
}
