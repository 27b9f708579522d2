//! `cargo xtask vm`: what it needs beyond the other verbs, then `ambit-lab vm`.

use crate::{Stop, cargo, deps, lab};
use std::path::Path;

/// Installed for this verb only: the other verbs run without an emulator.
const PACKAGES: &[(&str, &str)] = &[
    ("qemu-system-x86", "the machine; no KVM needed"),
    ("ovmf", "its firmware, with Secure Boot keys enrolled"),
    ("mtools", "makes its disk"),
    ("cpio", "makes its initial root file system"),
];
/// Unpacked below target/vm and never installed: a signed boot chain must not touch this machine's own.
const UNPACKED: [&str; 4] = ["shim-signed", "shim-helpers-amd64-signed", "grub-efi-amd64-signed", "busybox-static"];
/// Depends on the kernel's package of the day.
const KERNEL: &str = "linux-image-cloud-amd64";

/// Real IMA and a real TPM driver, in a guest (root).
pub(crate) fn run() -> Result<(), Stop> {
    deps::install(deps::Say::Missing)?;
    deps::install_these(PACKAGES, deps::Say::Missing)?;
    let folder = cargo::root()?.join("target/vm");
    let debian = folder.join("debian");
    // Renamed when whole, so that an interrupted run is no half of one.
    if !debian.exists() {
        let half = folder.join("debian.half");
        unpack(&folder.join("packages"), &half)?;
        std::fs::rename(&half, &debian).map_err(|e| Stop::Failed(format!("{}: {e}", debian.display())))?;
    }
    lab::run(&["vm", "--debian", &debian.display().to_string()])
}

fn unpack(packages: &Path, root: &Path) -> Result<(), Stop> {
    let make = |folder: &Path| {
        // What an interrupted run left may be cut short.
        let _ = std::fs::remove_dir_all(folder);
        std::fs::create_dir_all(folder).map_err(|e| Stop::Failed(format!("{}: {e}", folder.display())))
    };
    make(packages)?;
    make(root)?;
    let kernel = cargo::output("apt-cache", &["depends", "--important", KERNEL])?;
    let kernel = kernel.lines().find_map(|line| line.trim().strip_prefix("Depends: ")).map(str::to_owned);
    let kernel = kernel.ok_or_else(|| Stop::Failed(format!("{KERNEL} depends on no kernel; apt-get update?")))?;
    let names = UNPACKED.iter().copied().chain([kernel.as_str()]).collect::<Vec<_>>().join(" ");
    // apt-get download writes where it is started. Root fetches: apt's own user may not write there.
    let script = format!(
        "cd \"$1\" && apt-get -o APT::Sandbox::User=root download {names} && for p in *.deb; do dpkg-deb -x \"$p\" \"$2\"; done"
    );
    let (packages, root) = (packages.display().to_string(), root.display().to_string());
    cargo::program("sh", &["-ec", &script, "unpack", &packages, &root])
}
