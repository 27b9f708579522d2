//! What a replica keeps on disk: the Raft log (synced, never lost silently), the snapshot file (checksummed), and the
//! tables (rebuildable, never trusted).
//!
//! The log and the snapshot are the truth. Damage to the log is found at open and named; it is never served and never
//! voted with (I14). Damage to the tables costs a rebuild and nothing else.

pub mod audit;
mod disk;
#[cfg(test)]
mod fault_tests;
#[cfg(test)]
mod faulty;
mod flush;
pub mod log;
mod mark;
pub mod membership;
pub mod model;
pub mod snapshot;
#[cfg(test)]
mod syscall_tests;
pub mod tables;
mod tail;

pub use disk::{Bodies, Disk, Folder, Log, Rows, Snapshots, Writing};
pub use flush::{AfterFlush, FlushReceipt};
pub use membership::{Change, Membership};

use std::path::{Path, PathBuf};

/// Why a store does not open or does not write.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Nothing was ever founded or joined here.
    #[error("no store in {0}: run init or join first")]
    Missing(PathBuf),
    /// There is a store already.
    #[error(
        "there is a store in {0} already: a replica that lost its data must be removed and join under a new number"
    )]
    Exists(PathBuf),
    /// A store belongs to one process.
    #[error("another process has the store in {0} open")]
    Locked(PathBuf),
    /// Durable data fails its checksums or contradicts itself. The replica must not serve and must not vote (I14).
    #[error(
        "store damaged: {what}: {found}; remove this replica from the cell and join it anew, or, where it is the last, `ambitd restore` a backup"
    )]
    Damaged {
        /// Which part.
        what: &'static str,
        /// What was seen.
        found: String,
    },
    /// A later release wrote it. Nothing was changed.
    #[error("{what} of format {found}, where this release knows up to {known}: start the release that wrote it")]
    Newer {
        /// Which part.
        what: &'static str,
        /// As stored.
        found: u64,
        /// The newest one known.
        known: u64,
    },
    /// The folder belongs to another replica.
    #[error("the store is of replica {found}, not {expected}")]
    OtherReplica {
        /// As configured.
        expected: u64,
        /// As stored.
        found: u64,
    },
    /// The state outgrew what a snapshot may be.
    #[error("a snapshot of {bytes} bytes is above the bound of {max}")]
    TooLarge {
        /// As encoded.
        bytes: usize,
        /// [`snapshot::SNAPSHOT_BYTES_MAX`].
        max: usize,
    },
    /// The file system said no.
    #[error("{what} {path}")]
    Io {
        /// The operation.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The log engine said no.
    #[error("{what}")]
    Engine {
        /// The operation.
        what: &'static str,
        /// Why.
        #[source]
        source: Box<raft_engine::Error>,
    },
    /// The table store said no.
    #[error("{what}")]
    Tables {
        /// The operation.
        what: &'static str,
        /// Why.
        #[source]
        source: Box<sled::Error>,
    },
}

impl StoreError {
    pub(crate) fn damaged(what: &'static str, found: impl Into<String>) -> Self {
        Self::Damaged { what, found: found.into() }
    }
}

pub(crate) fn io<'a>(what: &'static str, path: &'a Path) -> impl FnOnce(std::io::Error) -> StoreError + use<'a> {
    move |source| StoreError::Io { what, path: path.to_owned(), source }
}

/// Runs `open` of an engine that panics on damaged bytes, and names the panic instead.
pub(crate) fn caught<T>(what: &'static str, open: impl FnOnce() -> Result<T, StoreError>) -> Result<T, StoreError> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(open))
        .unwrap_or_else(|panic| Err(StoreError::damaged(what, panic_text(&*panic))))
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned())).unwrap_or_else(|| "no text".to_owned())
}

/// Makes a rename or a new file in `dir` survive power loss.
pub(crate) fn sync_dir(dir: &Path) -> Result<(), StoreError> {
    std::fs::File::open(dir).and_then(|d| d.sync_all()).map_err(io("syncing folder", dir))
}
