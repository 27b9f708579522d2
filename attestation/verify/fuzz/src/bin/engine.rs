//! libFuzzer around the targets. Built and started by `cargo xtask fuzz`.
#![no_main]

use ambit_fuzz::engine;

libfuzzer_sys::fuzz_target!(init: engine::begin(), |input: &[u8]| engine::one(input));
