//! What this kernel can do, and what it costs where it cannot.

use crate::error::KernelError;
use libbpf_rs::libbpf_sys as sys;
use libbpf_rs::{MapType, ProgramType};

/// One thing that the programs use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Feature {
    /// What it is called in the kernel.
    pub name: &'static str,
    /// Whether this kernel has it.
    pub present: bool,
    /// What cannot be enforced without it. Everything here is required today.
    pub cost: &'static str,
}

type Check = fn() -> libbpf_rs::Result<bool>;

const FEATURES: [(&str, Check, &str); 11] = [
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
];

/// Asks the kernel. A question that it does not answer counts as absent.
pub fn probe() -> Vec<Feature> {
    FEATURES.iter().map(|(name, check, cost)| Feature { name, present: check().unwrap_or(false), cost }).collect()
}

/// Refuses a kernel that lacks one of them, by name and with what it costs.
pub(crate) fn require(features: Vec<Feature>) -> Result<(), KernelError> {
    match features.into_iter().find(|feature| !feature.present) {
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
            let features = FEATURES.iter().enumerate();
            features.map(|(at, (name, _, cost))| Feature { name, present: at != missing, cost }).collect::<Vec<_>>()
        };
        assert!(require(with(usize::MAX)).is_ok());
        for (at, (name, _, cost)) in FEATURES.iter().enumerate() {
            let error = require(with(at)).unwrap_err();
            assert_eq!(error.code(), "kernel_feature_missing");
            let said = error.to_string();
            assert!(said.contains(name) && said.contains(cost), "{said}");
        }
    }
}
