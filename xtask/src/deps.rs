//! Debian packages, by name. Nothing else is ever downloaded.

use crate::{Stop, cargo};
use std::process::Command;

/// Package and what needs it.
const PACKAGES: &[(&str, &str)] = &[
    ("gcc", "linker, and C parts of crates"),
    ("g++", "cargo xtask fuzz: libFuzzer is C++"),
    ("libc6-dev", "headers and start files of the C library; every link needs them"),
    ("make", "libbpf's own build"),
    ("pkg-config", "finds the libraries below at build time"),
    ("protobuf-compiler", "protoc: our .proto files and raft's"),
    ("libprotobuf-dev", "google/protobuf/*.proto, which the Workload API imports"),
    ("libssl-dev", "openssl crate: PKI off the hot path, EK certificate quirks"),
    ("libelf-dev", "libbpf: reads the compiled kernel programs"),
    ("zlib1g-dev", "libbpf: compressed debug sections"),
    ("clang-19", "cargo xtask build-bpf: C to BPF"),
    ("llvm-19", "cargo xtask build-bpf: strips the objects"),
    ("libtss2-dev", "TPM software stack that the attester uses"),
    ("libtss2-tcti-device0", "the stack's way to /dev/tpmrm0"),
    ("libtss2-tcti-swtpm0", "the stack's way to swtpm"),
    ("libtss2-tcti-tabrmd0", "the stack's way to tpm2-abrmd"),
    ("tpm2-abrmd", "a TPM behind the access broker, in a test"),
    ("dbus", "the bus that tpm2-abrmd answers on"),
    ("swtpm", "software TPM: one for each lab node"),
    ("swtpm-tools", "makes swtpm state with an EK certificate"),
    ("gnutls-bin", "certtool: swtpm-tools' manufacturer CA"),
    ("tpm2-tools", "an independent check of our quotes"),
    ("iproute2", "network namespaces, bridges and routes of the lab"),
    ("nftables", "cuts links in the lab"),
    ("tcpdump", "shows that the link between sites carries no plaintext"),
    ("util-linux", "nsenter, unshare, mount"),
    ("strace", "counts the system calls by which a store makes its files durable, and lets one fail"),
    ("procps", "ps and sysctl"),
    ("curl", "an unmodified client in the demo"),
    ("nginx-light", "an unmodified server in the demo"),
    ("python3", "another unmodified server in the demo"),
    ("openssl", "checks issued certificates from outside"),
    ("git", "tidy tests: which files are part of the project"),
    ("prometheus", "promtool: checks every metrics endpoint"),
    ("etcd-server", "cargo xtask bench raft: what our figures stand beside"),
    ("python3-jwt", "PyJWT: judges our JWT-SVIDs"),
    ("golang-cfssl", "cargo xtask bench issuance: what our figures stand beside"),
];

/// How much to print.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Say {
    /// Every package and why.
    All,
    /// Only what is missing.
    Missing,
}

/// Installs what is missing. Needs root only then.
pub(crate) fn install(say: Say) -> Result<(), Stop> {
    install_these(PACKAGES, say)
}

/// The same for another list.
pub(crate) fn install_these(packages: &[(&'static str, &str)], say: Say) -> Result<(), Stop> {
    let mut missing = Vec::new();
    for (package, why) in packages {
        let installed = is_installed(package)?;
        if !installed {
            missing.push(*package);
        }
        if say == Say::All || !installed {
            println!("{:<10} {package:<22} {why}", if installed { "installed" } else { "missing" });
        }
    }
    if missing.is_empty() {
        if say == Say::All {
            println!("{} packages, all installed", packages.len());
        }
        return Ok(());
    }
    if !is_root() {
        let what = missing.join(" ");
        return Err(Stop::Failed(format!("{} packages are missing; as root: apt-get install {what}", missing.len())));
    }
    if std::path::Path::new("/run/systemd/system").exists() && missing.iter().any(|p| starts_a_service(p)) {
        println!("note: packaging starts the services nginx, prometheus and etcd; Ambit needs only their programs");
    }
    apt_get(&["update"])?;
    apt_get(&[&["install", "--yes", "--no-install-recommends"], missing.as_slice()].concat())
}

fn starts_a_service(package: &str) -> bool {
    matches!(package, "nginx-light" | "prometheus" | "etcd-server")
}

fn apt_get(args: &[&str]) -> Result<(), Stop> {
    // Seconds to wait for another apt: a first boot's own updates take minutes.
    let lock = ["-o", "DPkg::Lock::Timeout=400"];
    let args = [lock.as_slice(), args].concat();
    let mut command = cargo::command("apt-get", &args)?;
    // RUNLEVEL=1 keeps invoke-rc.d from starting the services that some of these packages bring.
    let status = command.env("DEBIAN_FRONTEND", "noninteractive").env("RUNLEVEL", "1").status();
    match status {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(Stop::Failed(format!("apt-get {}: {status}", args.join(" ")))),
        Err(e) => Err(Stop::Failed(format!("apt-get: {e}"))),
    }
}

fn is_installed(package: &str) -> Result<bool, Stop> {
    let out = Command::new("dpkg-query").args(["--show", "--showformat=${db:Status-Status}", package]).output();
    match out {
        Ok(out) => Ok(out.status.success() && out.stdout == b"installed"),
        Err(e) => {
            let names: Vec<_> = PACKAGES.iter().map(|(name, _)| *name).collect();
            let all = names.join(" ");
            Err(Stop::Failed(format!("dpkg-query: {e}; this is made for Debian 12; elsewhere, install: {all}")))
        }
    }
}

/// Whether the effective user is root, as the kernel tells it.
fn is_root() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let uids = status.lines().find_map(|line| line.strip_prefix("Uid:"));
    uids.and_then(|line| line.split_whitespace().nth(1)) == Some("0")
}
