//! Drills: a declarative file, faults that end by themselves, outside probes, a ledger of acknowledged writes, and a
//! report that anyone can check offline.
//!
//! `file`, `spec`, `figures`, `ledger`, `report` and `html` are pure. `run`, `writer`, `caller`, `guard`, `lab` and
//! `mistake` and `live` act.

pub mod caller;
pub mod figures;
mod file;
pub mod guard;
pub mod html;
pub mod lab;
pub mod ledger;
pub mod live;
mod mistake;
pub mod report;
pub mod run;
pub mod seal;
pub mod spec;
pub mod watch;
pub mod writer;
