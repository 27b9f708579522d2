//! The one-machine lab: clusters of network namespaces, each node with a software TPM brought to a real boot's state.
//!
//! What it does: namespaces, links that can be cut, one swtpm per machine at golden PCRs, a measurer that stands in
//! for the kernel's IMA, cgroups, processes, faults that revert by their own lease, and a clean-up that works after
//! any death of the lab itself.
//!
//! What it must never do: touch a process, namespace, cgroup or pin that is not its own (its own carry the lab's name
//! or marker); claim that a lab TPM is hardware (its manufacturer's root is of class `lab`); use `ip netns exec`,
//! which hides the cgroup2 and bpf mounts.

pub mod bench;
pub mod boot_log;
pub mod cell;
pub mod cgroup;
pub mod chaos;
pub mod demo;
mod disk;
pub mod down;
pub mod fault;
pub mod gate;
pub mod guardian;
pub mod ima;
pub mod lab;
pub mod library;
pub mod load;
pub mod lock;
pub mod measurer;
pub mod net;
pub mod node;
pub mod preflight;
pub mod probe;
pub mod process;
pub mod relay;
pub mod state;
pub mod streams;
pub mod tool;
pub mod topology;
pub mod tpm;
pub mod tpm_wire;
pub mod up;
pub mod vm;
pub mod workload;

pub use cell::Cell;
pub use lab::{Lab, LabError, Place};
pub use state::{Pod, Ready};
pub use topology::{Member, Spec};
