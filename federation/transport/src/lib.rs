//! gRPC over mutual TLS between SPIFFE identities: how replicas, agents, peers and operators reach a cell.
//!
//! Never: decisions about what a caller may do (that is authorisation, in the server), or a connection whose far end
//! was not verified against `Expect`.
#![forbid(unsafe_code)]

mod alive;
mod client;
mod coalesced;
mod server;

pub use client::{Dialer, Identity};
pub use server::{Caller, serve};
