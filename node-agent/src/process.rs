//! One process of this node, told apart from every other that had its number before or will have it later, and what the
//! kernel says of it: workload attestation.
//!
//! Never: a word about a process by its number alone. A pidfd says whether it lives, and its folder in `/proc` was opened
//! while it did; read through that folder, a successor of the same number is not found (proc(5)).

use crate::cgroup::{self, MeshRoot};
use ambit_model::Selector;
use aws_lc_rs::digest::{Context, SHA256};
use nix::fcntl::{AtFlags, OFlag, openat, readlinkat};
use nix::sys::stat::{Mode, fstatat};
use nix::sys::statfs::{FUSE_SUPER_MAGIC, NFS_SUPER_MAGIC, SMB_SUPER_MAGIC, fstatfs};
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::Semaphore;

/// `/proc/<pid>/status` lists every group: 65,536 (NGROUPS_MAX) of eleven characters at most.
const PROC_BYTES_MAX: u64 = 1024 * 1024;
/// The largest program that is hashed; the largest in use have a quarter of it.
const PROGRAM_BYTES_MAX: u64 = 512 * 1024 * 1024;
/// Read at once while hashing.
const HASH_CHUNK_BYTES: usize = 256 * 1024;
/// Programs hashed at once: hashing takes a whole core, and the others are the workloads'.
static HASHING: Semaphore = Semaphore::const_new(1);

/// A process.
#[derive(Debug)]
pub struct Process {
    pidfd: AsyncFd<OwnedFd>,
    /// `/proc/<pid>`, opened while it lived.
    folder: OwnedFd,
}

/// What the kernel says of a process at one moment.
#[derive(Debug)]
pub struct Facts {
    /// Effective uid.
    pub uid: u32,
    /// Effective gid.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// `/proc/<pid>/cgroup`.
    pub cgroup: String,
    /// The program, if it is the file that its path names on this node.
    pub program: Option<PathBuf>,
    run: Run,
}

/// One run of a program: from one execve(2) to the next, which gives the process another memory.
#[derive(Debug)]
struct Run {
    /// `/proc/<pid>/pagemap`, which stays that of the memory for which it was opened.
    memory: File,
    /// Device and inode of the program's file. Whoever shares its memory (clone(2), CLONE_VM) can leave that behind without
    /// an end; but while anybody uses it, nobody can write to the file.
    file: Option<(u64, u64)>,
}

impl Process {
    /// The process that has the number `pid` now, as this agent sees numbers.
    pub fn numbered(pid: i32) -> io::Result<Self> {
        use rustix::process::{Pid, PidfdFlags, pidfd_open};
        let number = Pid::from_raw(pid).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        Self::of(pidfd_open(number, PidfdFlags::empty())?, pid)
    }

    /// The process of `pidfd`, whose number is `pid`; an error if it has ended.
    pub fn of(pidfd: OwnedFd, pid: i32) -> io::Result<Self> {
        #[allow(
            deprecated,
            reason = "its successor is unsafe for types that may lie about their descriptor; OwnedFd does not"
        )]
        let pidfd = AsyncFd::with_interest(pidfd, Interest::READABLE)?;
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let folder = nix::fcntl::open(format!("/proc/{pid}").as_str(), flags, Mode::empty())?;
        let process = Self { pidfd, folder };
        // Only now is it sure that the folder is its own: until its end nobody else has the number.
        if process.has_ended() { Err(gone()) } else { Ok(process) }
    }

    /// Whether it is gone. Who holds its socket now is somebody else.
    pub fn has_ended(&self) -> bool {
        // A question that the kernel does not answer counts as the end.
        exited(self.pidfd.get_ref()).unwrap_or(true)
    }

    /// Waits until it is gone.
    pub async fn ended(&self) {
        while !self.has_ended() {
            // A pidfd becomes readable when its process ends (pidfd_open(2)).
            match self.pidfd.readable().await {
                Ok(_still_readable) if self.has_ended() => return,
                Ok(mut spurious) => spurious.clear_ready(),
                Err(_) => return,
            }
        }
    }

    /// What it is now.
    pub fn facts(&self) -> io::Result<Facts> {
        // First, so that nothing of what follows is of an earlier program, and asked last, so that nothing is of a later one.
        let run = Run { memory: self.open("pagemap")?, file: self.program_file() };
        let (uid, gid, groups) = self.ids()?;
        let cgroup = self.read("cgroup")?;
        let program = self.program().map(|(path, _)| path);
        let facts = Facts { uid, gid, groups, cgroup, program, run };
        if self.still_is(&facts) { Ok(facts) } else { Err(gone()) }
    }

    /// Whether it is what `facts` tell, that is runs what it ran, as whom it did and where. (The path of its program is not
    /// asked again: an upgrade replaces files of what runs on.) What was found before this was asked is of no other program
    /// and user.
    pub fn still_is(&self, facts: &Facts) -> bool {
        let ids =
            self.ids().is_ok_and(|(uid, gid, groups)| (uid, gid, &groups) == (facts.uid, facts.gid, &facts.groups));
        let cgroup = self.read("cgroup").is_ok_and(|cgroup| cgroup == facts.cgroup);
        ids && cgroup && self.program_file() == facts.run.file && facts.run.goes_on() && !self.has_ended()
    }

    fn ids(&self) -> io::Result<(u32, u32, Vec<u32>)> {
        let ids = ids(&self.read("status")?);
        ids.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "no ids in /proc/<pid>/status"))
    }

    fn program_file(&self) -> Option<(u64, u64)> {
        let file = fstatat(&self.folder, "exe", AtFlags::empty()).ok()?;
        Some((file.st_dev, file.st_ino))
    }

    /// SHA-256 of its program's file, if that is still `expected`. Nothing is remembered of it: what identifies a file
    /// (inode, size, times) does not identify its content, for its owner can set the times back. While a program runs
    /// the kernel lets nobody write to it (ETXTBSY).
    pub async fn program_sha256(self: std::sync::Arc<Self>, expected: PathBuf) -> Option<[u8; 32]> {
        let turn = HASHING.acquire().await.ok()?;
        let hashed = tokio::task::spawn_blocking(move || {
            let program = || self.program().filter(|(path, _)| *path == expected);
            let (_, file) = program()?;
            let digest = self.hash(&file)?;
            let same = program().is_some_and(|(_, now)| is_same(&file, &now).unwrap_or(false));
            (same && !self.has_ended()).then_some(digest)
        });
        let digest = hashed.await.ok().flatten();
        drop(turn);
        digest
    }

    fn hash(&self, mut file: &File) -> Option<[u8; 32]> {
        if file.metadata().ok()?.len() > PROGRAM_BYTES_MAX {
            return None;
        }
        let (mut context, mut chunk) = (Context::new(&SHA256), vec![0; HASH_CHUNK_BYTES]);
        // One more than fits: a file that grows meanwhile has no hash.
        for _ in 0..=PROGRAM_BYTES_MAX / HASH_CHUNK_BYTES as u64 {
            match file.read(&mut chunk).ok()? {
                0 => return context.finish().as_ref().try_into().ok(),
                n if !self.has_ended() => context.update(chunk.get(..n)?),
                _ => return None,
            }
        }
        None
    }

    /// The program that it runs and its path, if the file at that path on this node is the very same. A process in a mount
    /// namespace of its own may give its programs any path, and serve any content from a file system of its own making.
    fn program(&self) -> Option<(PathBuf, File)> {
        let path = PathBuf::from(readlinkat(self.folder.as_fd(), "exe").ok()?);
        let file = openat(self.folder.as_fd(), "exe", OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty()).ok()?;
        let kind = fstatfs(&file).ok()?.filesystem_type();
        let file = File::from(file);
        let served_by_others = [FUSE_SUPER_MAGIC, NFS_SUPER_MAGIC, SMB_SUPER_MAGIC].contains(&kind);
        let (ours, theirs) = (std::fs::symlink_metadata(&path).ok()?, file.metadata().ok()?);
        let same = (ours.dev(), ours.ino()) == (theirs.dev(), theirs.ino());
        (same && !served_by_others).then_some((path, file))
    }

    fn read(&self, name: &str) -> io::Result<String> {
        let mut text = String::new();
        self.open(name)?.take(PROC_BYTES_MAX).read_to_string(&mut text)?;
        Ok(text)
    }

    fn open(&self, name: &str) -> io::Result<File> {
        Ok(openat(self.folder.as_fd(), name, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())?.into())
    }
}

impl Run {
    /// Whether its memory is in use. Less than an entry cannot be read from it (EINVAL), nothing at all once nobody uses
    /// it; and neither answer waits for a lock of it, which its owner could hold.
    fn goes_on(&self) -> bool {
        self.memory.read_at(&mut [0], 0).is_err_and(|error| error.raw_os_error() == Some(libc::EINVAL))
    }
}

impl Facts {
    /// What it can be recognised by; of its program only the path (see [`Process::program_sha256`]).
    pub fn selectors(&self, mesh: &MeshRoot) -> BTreeSet<Selector> {
        let mut selectors = BTreeSet::from([Selector::UnixUid(self.uid), Selector::UnixGid(self.gid)]);
        selectors.extend(self.groups.iter().copied().map(Selector::UnixSupplementaryGid));
        selectors.extend(cgroup::selectors(&self.cgroup, mesh));
        // What the grammar cannot write recognises nobody.
        let path = self.program.as_ref().and_then(|path| path.to_str());
        selectors.extend(path.and_then(|path| format!("unix:path:{path}").parse().ok()));
        selectors
    }
}

fn gone() -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, "the process has ended")
}

fn exited(pidfd: &OwnedFd) -> io::Result<bool> {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    Ok(poll(&mut [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)], PollTimeout::ZERO)? > 0)
}

fn is_same(one: &File, other: &File) -> io::Result<bool> {
    let (one, other) = (one.metadata()?, other.metadata()?);
    Ok((one.dev(), one.ino()) == (other.dev(), other.ino()))
}

/// Effective uid and gid and the supplementary groups, from `/proc/<pid>/status` (proc(5)).
fn ids(status: &str) -> Option<(u32, u32, Vec<u32>)> {
    let numbers = |name: &str| -> Option<Vec<u32>> {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_ascii_whitespace().map(|n| n.parse().ok()).collect()
    };
    // Real, effective, saved, file system.
    Some((*numbers("Uid:")?.get(1)?, *numbers("Gid:")?.get(1)?, numbers("Groups:")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_the_effective_ones() {
        let status = "Name:\tGroups: 9\nUmask:\t0022\nUid:\t0\t1000\t1001\t1002\nGid:\t5\t6\t7\t8\nGroups:\t27 1000 \n";
        assert_eq!(ids(status), Some((1000, 6, vec![27, 1000])));
        assert_eq!(ids("Uid:\t1\t2\t3\t4\nGid:\t1\t2\t3\t4\nGroups:\t\n"), Some((2, 2, vec![])));
        for bad in
            ["", "Uid:\t1\nGid:\t1\t2\nGroups:\n", "Uid:\t1\t-2\nGid:\t1\t2\nGroups:\n", "Uid:\t1\t2\nGid:\t1\t2\n"]
        {
            assert_eq!(ids(bad), None, "{bad:?}");
        }
    }
}
