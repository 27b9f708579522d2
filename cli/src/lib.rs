//! `ambit`: the command line of a cell, and the drill engine behind `ambit drill`.
//!
//! It asks cells over gRPC and prints their answers. Never: deciding what a cell should decide, keeping state of its
//! own besides the administrator's context, or touching the kernel. Faults are injected by `ambit-lab`, not here.
#![forbid(unsafe_code)]

pub mod args;
pub mod cell;
pub mod context;
pub mod drill;
pub mod duration;
pub mod excerpt;
pub mod exit;
pub mod output;
pub mod pair;
pub mod spire;
pub mod verbs;
pub mod when;
