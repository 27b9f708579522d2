//! The lab's cgroups in the cgroup2 tree, and its pin folders in bpffs.
//!
//! `<cgroup2>/ambit-lab-<lab>/<member>/…`: a node has `mesh/<pod>` for workloads, `agent` for its agent (outside the
//! mesh, exempt by cgroup) and `tpm`; a replica has `server` and `tpm`; `lab` holds the lab's own processes.

use crate::process::ProcessId;
use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Where bpffs belongs.
const BPFFS: &str = "/sys/fs/bpf";

/// What can go wrong with a cgroup.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// No cgroup2 mount.
    #[error("no cgroup2 file system in /proc/mounts")]
    NoTree,
    /// A file or folder of it.
    #[error("cgroup {path}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// bpffs could not be mounted.
    #[error("bpffs could not be mounted on {BPFFS}")]
    Bpffs(#[source] nix::Error),
}

/// The cgroup2 mount point.
pub fn tree() -> Result<PathBuf, CgroupError> {
    mount_point("cgroup2").ok_or(CgroupError::NoTree)
}

/// The top cgroup of a lab.
pub fn top(lab: &str) -> Result<PathBuf, CgroupError> {
    Ok(tree()?.join(format!("ambit-lab-{lab}")))
}

/// Makes a cgroup with its parents.
pub fn create(path: &Path) -> Result<(), CgroupError> {
    std::fs::create_dir_all(path).map_err(|source| CgroupError::Io { path: path.into(), source })
}

/// `cgroup.procs`, open for a child to write itself in.
pub fn open_procs(path: &Path) -> Result<File, CgroupError> {
    let path = path.join("cgroup.procs");
    OpenOptions::new().write(true).open(&path).map_err(|source| CgroupError::Io { path, source })
}

/// Every process in a cgroup and below it.
pub fn processes(path: &Path) -> Vec<ProcessId> {
    let text = std::fs::read_to_string(path.join("cgroup.procs")).unwrap_or_default();
    let own = text.lines().filter_map(|line| ProcessId::of(line.parse().ok()?));
    own.chain(children(path).iter().flat_map(|c| processes(c))).collect()
}

/// Removes a cgroup and those below it; they must be empty or emptying.
pub fn remove(path: &Path) -> Result<(), CgroupError> {
    for child in children(path) {
        remove(&child)?;
    }
    // A killed process leaves its cgroup a moment after it is gone from sight.
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        match std::fs::remove_dir(path) {
            Ok(()) => return Ok(()),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(source) if Instant::now() > deadline => return Err(CgroupError::Io { path: path.into(), source }),
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

fn children(path: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(path) else { return Vec::new() };
    entries.flatten().map(|e| e.path()).filter(|p| p.is_dir()).collect()
}

/// The folder of a lab's pins. It exists once [`mount_bpffs`] and a node made it.
pub fn pins(lab: &str) -> PathBuf {
    PathBuf::from(BPFFS).join(format!("ambit-lab-{lab}"))
}

/// Mounts bpffs if nobody has; it stays, as it is the machine's and not the lab's.
pub fn mount_bpffs() -> Result<(), CgroupError> {
    if mount_point("bpf").is_some() {
        return Ok(());
    }
    let flags = nix::mount::MsFlags::MS_NOSUID | nix::mount::MsFlags::MS_NODEV | nix::mount::MsFlags::MS_NOEXEC;
    nix::mount::mount(Some("bpf"), BPFFS, Some("bpf"), flags, None::<&str>).map_err(CgroupError::Bpffs)
}

fn mount_point(kind: &str) -> Option<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/mounts").ok()?;
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ');
        let (_, point, found) = (fields.next()?, fields.next()?, fields.next()?);
        (found == kind && (kind != "bpf" || point == BPFFS)).then(|| PathBuf::from(point))
    })
}
