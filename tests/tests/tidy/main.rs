//! Checks of the repository itself: who may depend on whom, and that what the documents say is there.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test says that it failed by panicking")]

mod commands;
mod edges;
mod identity;
mod sources;
