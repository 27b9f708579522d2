//! ambitd as a library: one replica of a cell. `main.rs` only reads the command line.
//!
//! Never here: decisions about identity or policy (`ambit-state`, `ambit-policy`), evidence checks (`ambit-verify`), or a
//! signature without a committed entry.
#![forbid(unsafe_code)]

pub mod authorise;
pub mod config;
pub mod metrics;
pub mod outside;
pub mod raft;
pub mod replica;
pub mod services;
pub mod store;
