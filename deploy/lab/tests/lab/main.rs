//! The lab with its real parts: namespaces, swtpm, cgroups. These tests need root and say so.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod clean_up;
mod faults;
mod support;
mod tpms;
mod unprivileged;
