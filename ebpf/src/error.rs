//! Why an operation on the kernel side failed. Each variant names its subject; nothing was half-made visible.

use std::path::PathBuf;

/// An operation that failed.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The process lacks the rights to load and attach programs.
    #[error("needs root (CAP_BPF, CAP_NET_ADMIN and CAP_SYS_ADMIN)")]
    NeedsRoot,
    /// A kernel feature without which nothing can be enforced.
    #[error("this kernel lacks {feature}: {cost}")]
    FeatureMissing {
        /// What is missing.
        feature: &'static str,
        /// What cannot be done without it.
        cost: &'static str,
    },
    /// The tables, or one more workload, do not fit. The generation in force is unchanged.
    #[error("map `{map}` holds {capacity} entries, {needed} are needed")]
    MapFull {
        /// Which map.
        map: &'static str,
        /// Its capacity, in entries.
        capacity: u32,
        /// How many entries were asked for.
        needed: usize,
    },
    /// The tables contradict themselves (a duplicate key, identity 0, too many endpoints).
    #[error("tables are inconsistent: {0}")]
    BadTables(String),
    /// What was read back from the idle generation is not what was written; it was not put in force.
    #[error("map `{map}` read back differs from what was written")]
    ReadBack {
        /// Which map.
        map: &'static str,
    },
    /// The pins were made by a version with other map layouts.
    #[error("pins at {dir} have map layout {found}, this version has {expected}: drain the node, then remove them")]
    LayoutChanged {
        /// The pin directory.
        dir: PathBuf,
        /// This version's layout hash.
        expected: String,
        /// The one found.
        found: String,
    },
    /// A pin is missing, or is not what it should be.
    #[error("pin {path}: expected {expected}, found {found}")]
    PinUnexpected {
        /// The pin.
        path: PathBuf,
        /// What should be there.
        expected: String,
        /// What is there.
        found: String,
    },
    /// The cgroup directory is not a directory of a cgroup2 mount.
    #[error("{path} is not a cgroup2 directory")]
    NotCgroup {
        /// The path.
        path: PathBuf,
    },
    /// The socket given as a pod's capture listener is none.
    #[error("the socket given for pod `{0}` is not a TCP listener")]
    NotListener(String),
    /// A device of a pod by which packets leave that no program of ours could see.
    #[error("device {device} of the pod (kind `{kind}`) is no veth to this node: what leaves by it cannot be stopped")]
    OpenDevice {
        /// Its name in the pod.
        device: String,
        /// What the kernel calls its kind; empty for a physical one.
        kind: String,
    },
    /// A pod without a device that leads out: if it has one elsewhere, what leaves by that cannot be stopped.
    #[error("pod {0} has no veth to this node: one that is somewhere else could not be guarded")]
    NoWire(String),
    /// A pod name that cannot be a pin.
    #[error("pod name `{0}` is not 1-63 characters of a-z 0-9 -")]
    BadPodName(String),
    /// A service or endpoint that the tables in force do not have.
    #[error("the tables in force have no {0}")]
    NotInstalled(String),
    /// A system call.
    #[error("{what}")]
    Io {
        /// What was tried.
        what: String,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// libbpf or the kernel's bpf() refused.
    #[error("{what}: {detail}")]
    Bpf {
        /// What was tried, and on what.
        what: String,
        /// The loader's text, with the errno.
        detail: String,
    },
}

impl KernelError {
    /// The refusal code that an agent reports for this error, in the words of `ambit_model::Code`. Whatever is not
    /// known to be something else is `internal`: no error ever means "go on".
    pub fn code(&self) -> &'static str {
        match self {
            Self::NeedsRoot => "needs_root",
            Self::FeatureMissing { .. } => "kernel_feature_missing",
            Self::MapFull { .. } => "map_full",
            Self::BadTables(_) | Self::NotListener(_) | Self::BadPodName(_) => "bad_request",
            Self::OpenDevice { .. } | Self::NoWire(_) => "config_invalid",
            Self::NotCgroup { .. } => "config_invalid",
            Self::NotInstalled(_) => "not_found",
            Self::ReadBack { .. }
            | Self::LayoutChanged { .. }
            | Self::PinUnexpected { .. }
            | Self::Io { .. }
            | Self::Bpf { .. } => "internal",
        }
    }

    pub(crate) fn io(what: impl Into<String>, source: std::io::Error) -> Self {
        if source.raw_os_error() == Some(libc::EPERM) && !crate::sys::is_root() {
            return Self::NeedsRoot;
        }
        Self::Io { what: what.into(), source }
    }

    /// A committed object that lacks something this version needs.
    pub(crate) fn absent(object: &str, part: &str) -> Self {
        Self::Bpf { what: format!("use object {object}"), detail: format!("it has no {part}") }
    }

    pub(crate) fn bpf(what: impl Into<String>, source: libbpf_rs::Error) -> Self {
        if source.kind() == libbpf_rs::ErrorKind::PermissionDenied && !crate::sys::is_root() {
            return Self::NeedsRoot;
        }
        Self::Bpf { what: what.into(), detail: format!("{source:#}") }
    }
}
