//! The node agent's user space: enrols the machine by its TPM, holds the SVIDs of the workloads that run here, tells the
//! kernel who may speak to whom, and carries what the kernel lets through in tunnels between nodes.
//!
//! It must never let a connection pass because something is missing (no slice, no SVID, no record, no answer: refused),
//! never write a workload's key to disk, never act on a slice older than the one in force, and never decide for a
//! caller by anything but its proved identity. Deciding is in pure modules (`compile`, `view`, `sni`, `svids::renew_at`);
//! everything else carries.
#![warn(missing_docs)]

pub mod agent;
pub mod answers;
pub mod authority;
pub mod backoff;
pub mod balance;
pub mod broker;
pub mod budget;
pub mod caller;
pub mod carriers;
pub mod cgroup;
pub mod check;
pub mod clock;
pub mod compile;
pub mod config;
pub mod contention;
pub mod control;
pub mod course;
pub mod denials;
pub mod egress;
pub mod enrol;
pub mod fetch;
pub mod follow;
pub mod handover;
pub mod hbone;
pub mod health;
pub mod inbound;
pub mod issued;
pub mod jwt;
pub mod kernel;
pub mod legs;
pub mod lines;
pub mod logs;
pub mod membership;
pub mod metrics;
pub mod native;
pub mod netns;
pub mod node_key;
pub mod outbound;
pub mod outbox;
pub mod outlier;
pub mod places;
pub mod plane;
pub mod pods;
pub mod pool;
pub mod privileged;
pub mod process;
pub mod pump;
pub mod reattest;
pub mod recent;
pub mod record;
pub mod records;
pub mod said;
pub mod sds;
pub mod secure;
pub mod seen;
pub mod session;
pub mod shown;
pub mod silence;
pub mod sni;
pub mod staleness;
pub mod state;
pub mod svids;
pub mod takeover;
pub mod telemetry;
pub mod tls;
pub mod tokens;
pub mod view;
pub mod way_in;
pub mod workload_api;
pub mod xds;
