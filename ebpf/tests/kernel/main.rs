//! The kernel side with real programs, sockets, cgroups and network namespaces. Needs root; fails, never skips, without.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test's helpers may panic as it may")]

mod clients;
mod connect;
mod generations;
mod inbound;
mod ipv6;
mod ranges;
#[allow(dead_code, reason = "the no-bypass suite and the benchmark use the rest")]
mod support;
