//! What goes wrong with a disk, and when.

use super::{Inner, place};
use crate::store::StoreError;
use std::io::ErrorKind;

/// What happens at the next write of the log, or of the snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The process dies before anything reached the disk.
    DieBefore,
    /// The process dies after all of it reached the disk and before anyone knows.
    DieAfter,
    /// The power goes during the write. Each sector is there or not, as its bit of `kept` says; the checksum over all of
    /// them decides.
    Torn {
        /// Bytes that a disk writes at once: 512 or 4,096.
        sector: u32,
        /// One bit a sector.
        kept: u64,
    },
    /// The process dies after it renamed a snapshot into its place and before the folder is synced: chance decides which
    /// of the two is there. Waits for the next snapshot.
    LostRename,
    /// The sync fails; what is on disk is in doubt.
    SyncError,
    /// No room, from now on until [`super::ModelDisk::make_good`].
    Full,
}

/// What may be wrong with a part of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Checksums of the log fail.
    Log,
    /// Checksums of the snapshot fail.
    Snapshot,
    /// Checksums of the rows fail.
    Rows,
}

/// Where a write goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Target {
    Log,
    Snapshot,
}

/// What became of a write that was not refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Written {
    Well,
    /// It is on disk and the process dies all the same.
    AndDead,
    /// It is in its place until a crash, which may take it back.
    Renamed,
}

pub(super) fn io_error(what: &'static str, kind: ErrorKind) -> StoreError {
    StoreError::Io { what, path: place(), source: kind.into() }
}

impl Inner {
    /// What becomes of a write of so many bytes.
    pub(super) fn strike(&mut self, target: Target, bytes: usize) -> Result<Written, StoreError> {
        let died = || io_error("the process died writing", ErrorKind::Interrupted);
        if self.dead {
            return Err(died());
        }
        let is_now = |fault: &mut Fault| *fault != Fault::LostRename || target == Target::Snapshot;
        let fault = self.fault.take_if(is_now);
        self.full |= fault == Some(Fault::Full);
        if self.full {
            self.dead = true;
            return Err(io_error("writing", ErrorKind::StorageFull));
        }
        let written = match fault {
            None | Some(Fault::Full) => return Ok(Written::Well),
            Some(Fault::DieBefore) => Err(died()),
            Some(Fault::SyncError) => Err(io_error("syncing", ErrorKind::Other)),
            Some(Fault::DieAfter) => return Ok(Written::AndDead),
            Some(Fault::LostRename) => return Ok(Written::Renamed),
            Some(Fault::Torn { sector, kept }) => {
                let sectors = u32::try_from(bytes).unwrap_or(u32::MAX).div_ceil(sector.max(1));
                let is_whole = (0..sectors).all(|n| kept.rotate_right(n) & 1 == 1);
                // What is torn of a snapshot is torn beside the one in place.
                if is_whole && target == Target::Log { return Ok(Written::AndDead) } else { Err(died()) }
            }
        };
        self.dead = true;
        written
    }

    /// A write is on disk.
    pub(super) fn done(&mut self, written: Written) -> Result<(), StoreError> {
        self.syncs += 1;
        if written == Written::Well {
            return Ok(());
        }
        self.dead = true;
        Err(io_error("the process died after writing", ErrorKind::Interrupted))
    }
}
