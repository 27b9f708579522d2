//! The disk that a guest boots from: Debian's signed shim, grub and kernel, and an initial root file system that holds
//! the agent, the programs that make it a node, and nothing that differs from run to run.

use crate::lab::{LabError, make_folder, write_file};
use crate::preflight::{self, own_binary};
use crate::tool;
use ambit_model::{Refusal, refusal::Code};
use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

const INIT: &str = include_str!("../../../vm/node-init.sh");
/// A program that is measured when it runs, and that the drill alters.
pub(super) const MEASURED: &str = "/usr/bin/greet";
const MEASURED_TEXT: &str = "#!/bin/busybox sh\necho hello\n";
/// `rootfstype=ramfs`: the tcb policy measures no tmpfs, which an initial root file system else is. `panic=-1`: a guest
/// that dies shall end its QEMU.
const CMDLINE: &str = "console=ttyS0 rootfstype=ramfs ima_policy=tcb ima_hash=sha256 panic=-1";
/// Drivers that Debian's cloud kernel has as modules, in the order of loading.
const MODULES: [&str; 9] = [
    "virtio_ring",
    "virtio",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "failover",
    "net_failover",
    "virtio_net",
    "veth",
];
/// Where the multiarch libraries go; what is loaded by name at run time is listed, what is linked is asked of `ldd`.
const LIBRARIES: &str = "lib/x86_64-linux-gnu";
const LOADED_BY_NAME: [&str; 2] = ["libtss2-tcti-device.so.0", "libgcc_s.so.1"];
/// What busybox does by half only: namespaces by name, a pod's user, and a client (its own looks up names by libraries
/// that a static program cannot load).
const FULL_PROGRAMS: [&str; 3] = ["ip", "setpriv", "curl"];
/// Room for kernel and root file system, in bytes.
const DISK_BYTES: u64 = 96 << 20;

/// Builds the disk in `folder` out of unpacked Debian packages in `debian`; returns its path.
pub(super) fn build(lab: &str, debian: &Path, folder: &Path) -> Result<PathBuf, LabError> {
    let tree = folder.join("tree");
    make_folder(&tree)?;
    fill(lab, debian, &tree)?;
    let initrd = folder.join("initrd");
    let pack = "cd \"$1\" && find . -exec touch -h -d @0 {} + && find . | LC_ALL=C sort | \
                cpio -o -H newc --quiet --reproducible | gzip -n1 > \"$2\"";
    tool::run(lab, "sh", &["-ec", pack, "pack", &text(&tree), &text(&initrd)], "")?;
    std::fs::remove_dir_all(&tree).map_err(|source| LabError::Io { path: tree, source })?;
    let config = folder.join("grub.cfg");
    write_file(&config, format!("linux /vmlinuz {CMDLINE}\ninitrd /initrd\nboot\n").as_bytes())?;
    disk(lab, debian, folder, &[("vmlinuz", &kernel(debian)?), ("initrd", &initrd), ("EFI/debian/grub.cfg", &config)])
}

fn fill(lab: &str, debian: &Path, tree: &Path) -> Result<(), LabError> {
    program(&tree.join("init"), INIT.as_bytes())?;
    program(&tree.join(MEASURED.trim_start_matches('/')), MEASURED_TEXT.as_bytes())?;
    copy(&debian.join("bin/busybox"), &tree.join("bin/busybox"))?;
    let agent = tree.join("bin/ambit-agent");
    copy(&own_binary("ambit-agent")?, &agent)?;
    // Symbols are half of it, and the guest hashes every byte before it runs the program.
    tool::run(lab, "strip", &[&text(&agent)], "")?;
    let mut linked = linked(lab, &agent)?;
    for name in FULL_PROGRAMS {
        let missing = || Refusal::new(Code::NotFound, format!("{name} (package {})", tool::package(name)), "none");
        let found = preflight::find(name).ok_or_else(missing)?;
        copy(&found, &tree.join("sbin").join(name))?;
        linked.extend(self::linked(lab, &found)?);
    }
    linked.extend(LOADED_BY_NAME.map(|name| Path::new("/").join(LIBRARIES).join(name)));
    for library in linked {
        copy(&library, &tree.join(library.strip_prefix("/").unwrap_or(&library)))?;
    }
    let modules = tree.join("lib/modules");
    for module in MODULES {
        let file = format!("{module}.ko");
        let found = find(&debian.join("lib/modules"), &file);
        let found = found.ok_or_else(|| Refusal::new(Code::NotFound, file.clone(), "not in the kernel's package"))?;
        copy(&found, &modules.join(&file))?;
    }
    write_file(&modules.join("order"), (MODULES.join("\n") + "\n").as_bytes())
}

/// The path by which an ELF file asks for each library, and the loader, as `ldd` prints them.
fn linked(lab: &str, program: &Path) -> Result<BTreeSet<PathBuf>, LabError> {
    let told = tool::run(lab, "ldd", &[&text(program)], "")?;
    let path = |line: &str| line.split_whitespace().find(|word| word.starts_with('/')).map(PathBuf::from);
    Ok(told.lines().filter_map(path).collect())
}

fn disk(lab: &str, debian: &Path, folder: &Path, files: &[(&str, &Path)]) -> Result<PathBuf, LabError> {
    let disk = folder.join("disk.img");
    let made = std::fs::File::create(&disk).and_then(|file| file.set_len(DISK_BYTES));
    made.map_err(|source| LabError::Io { path: disk.clone(), source })?;
    let image = text(&disk);
    tool::run(lab, "mformat", &["-i", &image, "-F", "-N", "a4b17000", "::"], "")?;
    tool::run(lab, "mmd", &["-i", &image, "::EFI", "::EFI/BOOT", "::EFI/debian"], "")?;
    let shim = debian.join("usr/lib/shim");
    // The path of removable media (UEFI 2.10, 3.5.1.1), which needs no boot entry.
    let signed = [
        ("EFI/BOOT/BOOTX64.EFI", shim.join("shimx64.efi.signed")),
        ("EFI/BOOT/mmx64.efi", shim.join("mmx64.efi.signed")),
        ("EFI/BOOT/grubx64.efi", debian.join("usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed")),
    ];
    for (name, file) in signed.iter().map(|(name, file)| (*name, file.as_path())).chain(files.iter().copied()) {
        tool::run(lab, "mcopy", &["-i", &image, &text(file), &format!("::{name}")], "")?;
    }
    Ok(disk)
}

fn kernel(debian: &Path) -> Result<PathBuf, LabError> {
    let boot = debian.join("boot");
    let mut files = std::fs::read_dir(&boot).map_err(|source| LabError::Io { path: boot.clone(), source })?.flatten();
    let found = files.find(|file| file.file_name().as_encoded_bytes().starts_with(b"vmlinuz-"));
    let missing = || Refusal::new(Code::NotFound, format!("a kernel in {}", boot.display()), "none").into();
    found.map(|file| file.path()).ok_or_else(missing)
}

fn find(folder: &Path, name: &str) -> Option<PathBuf> {
    let entries = std::fs::read_dir(folder).ok()?.flatten();
    entries
        .map(|entry| entry.path())
        .find_map(|path| if path.is_dir() { find(&path, name) } else { path.ends_with(name).then_some(path) })
}

fn program(path: &Path, bytes: &[u8]) -> Result<(), LabError> {
    path.parent().map_or(Ok(()), make_folder)?;
    write_file(path, bytes)?;
    let executable = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(path, executable).map_err(|source| LabError::Io { path: path.into(), source })
}

fn copy(from: &Path, to: &Path) -> Result<(), LabError> {
    to.parent().map_or(Ok(()), make_folder)?;
    std::fs::copy(from, to).map(drop).map_err(|source| LabError::Io { path: from.into(), source })
}

fn text(path: &Path) -> String {
    path.display().to_string()
}
