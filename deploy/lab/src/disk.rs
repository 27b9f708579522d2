//! A small disk for one replica: a tmpfs in its folder, which can be filled to the last byte and emptied again.

use crate::lab::{LabError, make_folder};
use ambit_model::{Refusal, refusal::Code};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use std::fs::File;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

/// What fills a disk, beside the replica's own files.
const BALLAST: &str = "ballast";
/// A disk larger than this is nobody's to fill.
const BYTES_MAX: u64 = 1 << 30;
/// Written at once: first large, then what is left in pages.
const BLOCKS: [usize; 2] = [1 << 20, 4096];

/// Mounts a tmpfs of so many MiB.
pub(crate) fn make(folder: &Path, mib: u64) -> Result<(), LabError> {
    make_folder(folder)?;
    let size = format!("size={mib}m,mode=0700");
    let made = mount(Some("tmpfs"), folder, Some("tmpfs"), MsFlags::empty(), Some(size.as_str()));
    made.map_err(|e| failed(folder, e.into()))
}

/// Refuses what is no small disk.
pub(crate) fn is_small(folder: &Path) -> Result<(), Refusal> {
    let mounted = mounts_below(folder).iter().any(|mount| mount == folder);
    let bytes = nix::sys::statvfs::statvfs(folder).map_or(u64::MAX, |disk| disk.blocks() * disk.fragment_size());
    if mounted && bytes <= BYTES_MAX {
        return Ok(());
    }
    let expected = format!("a disk of its own of at most {BYTES_MAX} bytes");
    Err(Refusal::new(Code::NotFound, expected, folder.display().to_string()))
}

/// Fills it: nothing more can be written until [`empty`].
pub(crate) fn fill(folder: &Path) -> Result<(), LabError> {
    let path = folder.join(BALLAST);
    let mut file = File::create(&path).map_err(|e| failed(&path, e))?;
    for block in BLOCKS.map(|size| vec![0; size]) {
        loop {
            match file.write_all(&block) {
                Ok(()) => {}
                Err(e) if e.kind() == ErrorKind::StorageFull => break,
                Err(e) => return Err(failed(&path, e)),
            }
        }
    }
    Ok(())
}

/// Gives the space back; fine where it was not taken.
pub(crate) fn empty(folder: &Path) -> Result<(), LabError> {
    let path = folder.join(BALLAST);
    match std::fs::remove_file(&path) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(failed(&path, e)),
        _ => Ok(()),
    }
}

/// Unmounts all that is mounted in a folder or on it.
pub(crate) fn unmount_below(folder: &Path) -> Result<(), LabError> {
    // What was mounted last lies on top.
    for path in mounts_below(folder).iter().rev() {
        umount2(path, MntFlags::MNT_DETACH).map_err(|e| failed(path, e.into()))?;
    }
    Ok(())
}

/// Mount points, from proc(5) `mountinfo`; the lab's own paths hold nothing that it would escape.
fn mounts_below(folder: &Path) -> Vec<PathBuf> {
    let text = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let points = text.lines().filter_map(|line| line.split(' ').nth(4).map(PathBuf::from));
    points.filter(|point| point.starts_with(folder)).collect()
}

fn failed(path: &Path, source: std::io::Error) -> LabError {
    LabError::Io { path: path.into(), source }
}
