//! What this kernel can do, and what it costs where it cannot.

use crate::error::KernelError;
use crate::hook::Hooks;
use crate::objects::{SOCKETS, VETH};
use crate::pins::WIRES;
use libbpf_rs::libbpf_sys as sys;
use libbpf_rs::{MapType, ProgramType};

/// One thing that the programs use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Feature {
    /// What it is called in the kernel.
    pub name: &'static str,
    /// Whether this kernel has it.
    pub present: bool,
    /// Whether nothing runs without it.
    pub required: bool,
    /// What is lost without it.
    pub cost: &'static str,
}

/// The kernel gives `lo` this index in every network namespace.
const LOOPBACK: u32 = 1;

type Check = fn() -> libbpf_rs::Result<bool>;

const REQUIRED: [(&str, Check, &str); 12] = [
    (
        "cgroup socket creation programs (BPF_PROG_TYPE_CGROUP_SOCK)",
        || ProgramType::CgroupSock.is_supported(),
        "UDP-Lite, SCTP, ICMP and raw sockets send in clear past every other program",
    ),
    (
        "cgroup connect programs (BPF_PROG_TYPE_CGROUP_SOCK_ADDR)",
        || ProgramType::CgroupSockAddr.is_supported(),
        "no connection can be judged or captured: nothing is enforced",
    ),
    (
        "bpf_set_retval in connect programs (5.18)",
        || ProgramType::CgroupSockAddr.is_helper_supported(sys::BPF_FUNC_set_retval),
        "a service without a healthy endpoint cannot answer ECONNREFUSED",
    ),
    (
        "socket storage in connect programs",
        || ProgramType::CgroupSockAddr.is_helper_supported(sys::BPF_FUNC_sk_storage_get),
        "the original destination of a captured connection is lost",
    ),
    (
        "network namespace cookie in connect programs (5.8)",
        || ProgramType::CgroupSockAddr.is_helper_supported(sys::BPF_FUNC_get_netns_cookie),
        "a connection could be captured where no agent listens",
    ),
    (
        "sockops programs",
        || ProgramType::SockOps.is_supported(),
        "the agent cannot learn where a captured connection wanted to go",
    ),
    (
        "network namespace cookie in sockops (5.15)",
        || ProgramType::SockOps.is_helper_supported(sys::BPF_FUNC_get_netns_cookie),
        "flows of two pods with equal addresses cannot be told apart",
    ),
    (
        "sk_lookup programs (5.9)",
        || ProgramType::SkLookup.is_supported(),
        "captured connections find no agent, and plain inbound connections are not refused",
    ),
    ("sockmap", || MapType::Sockmap.is_supported(), "captured connections find no agent"),
    (
        "map of maps",
        || MapType::ArrayOfMaps.is_supported(),
        "tables cannot be swapped in one step: a half-installed policy would show",
    ),
    ("BPF ring buffer (5.8)", || MapType::RingBuf.is_supported(), "refusals are counted but not told"),
    (
        "packet programs on devices (tcx, or cls_bpf with clsact)",
        || Ok(has_tcx() || hangs(Hooks::Clsact)),
        "packet sockets, and sockets made outside or before the mesh, send in clear past every other program",
    ),
];

const OPTIONAL: [(&str, Check, &str); 2] = [
    (
        "bpf_sock_destroy in TCP iterators (6.5)",
        || {
            let loaded = crate::kernel::open_object(&SOCKETS);
            Ok(loaded.and_then(|object| crate::kernel::load_object(object, &SOCKETS)).is_ok())
        },
        "connections that were there before their pod was governed hang, their packets dropped, and are not ended at once",
    ),
    (
        "packet programs on devices by link (tcx, 6.6)",
        || Ok(has_tcx()),
        "the guard of a pod's veth is a filter (clsact): whoever administers the node can put another one before it",
    ),
];

/// Whether packet programs can hang by links.
pub(crate) fn has_tcx() -> bool {
    hangs(Hooks::Tcx)
}

/// The packet program itself, on a loopback device where nothing else is, in a namespace of its own.
fn hangs(hooks: Hooks) -> bool {
    let attached = move || {
        crate::sys::leave_netns().ok()?;
        let object = crate::kernel::load_object(crate::kernel::open_object(&VETH).ok()?, &VETH).ok()?;
        let program = object.progs_mut().find(|p| p.name() == WIRES[0].name)?;
        match hooks {
            Hooks::Tcx => crate::sys::attach_tcx(&program, LOOPBACK).map(drop).ok(),
            Hooks::Clsact => crate::hook::attach(&program, LOOPBACK, &WIRES[0]).ok(),
        }
    };
    std::thread::spawn(move || attached().is_some()).join().unwrap_or(false)
}

/// Asks the kernel. A question that it does not answer counts as absent.
pub fn probe() -> Vec<Feature> {
    let asked = |required: bool| {
        move |(name, check, cost): &(&'static str, Check, &'static str)| Feature {
            name,
            present: check().unwrap_or(false),
            required,
            cost,
        }
    };
    REQUIRED.iter().map(asked(true)).chain(OPTIONAL.iter().map(asked(false))).collect()
}

/// Refuses a kernel that lacks one that is required, by name and with what it costs.
pub(crate) fn require(features: Vec<Feature>) -> Result<(), KernelError> {
    match features.into_iter().find(|feature| feature.required && !feature.present) {
        Some(feature) => Err(KernelError::FeatureMissing { feature: feature.name, cost: feature.cost }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_missing_feature_is_named_with_what_it_costs() {
        let with = |missing: usize| {
            let features = REQUIRED.iter().chain(&OPTIONAL).enumerate();
            let feature = |(at, (name, _, cost)): (usize, &(&'static str, Check, &'static str))| Feature {
                name,
                present: at != missing,
                required: at < REQUIRED.len(),
                cost,
            };
            features.map(feature).collect::<Vec<_>>()
        };
        assert!(require(with(usize::MAX)).is_ok() && require(with(REQUIRED.len())).is_ok());
        for (at, (name, _, cost)) in REQUIRED.iter().enumerate() {
            let error = require(with(at)).unwrap_err();
            assert_eq!(error.code(), "kernel_feature_missing");
            let said = error.to_string();
            assert!(said.contains(name) && said.contains(cost), "{said}");
        }
    }
}
