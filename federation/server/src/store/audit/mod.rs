//! Records of the audit log, beside the state that agrees on their tree: append-only files, a folder for each incarnation.
//!
//! The Raft log is what makes a record durable: until a snapshot covers it, a record that these files lost is made again
//! where its entry is applied again. So they are synced before a snapshot is written, and at no other time; what is not
//! synced is judged again at open. A replica that began with a leader's snapshot lacks what came before it: it is behind,
//! and takes it from another replica ([`AuditFiles::fill`]).

mod one;

use super::{Bodies, StoreError};
use ambit_audit::tile::{self, Tile};
use ambit_audit::{Frontier, Hash, Nodes};
use ambit_state::audit::AuditEntry;
use one::{Files, OneLog};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The audit log's files of one replica. Cheap to clone.
#[derive(Clone)]
pub struct AuditFiles(Arc<Inner>);

struct Inner {
    folder: PathBuf,
    /// The present incarnation's; none before it has a record.
    log: Mutex<Option<OneLog>>,
}

/// What a reader holds: the bytes below its size change no more.
pub struct View {
    files: Arc<Files>,
    /// Records there are.
    pub size: u64,
}

impl AuditFiles {
    /// The files below `data_dir`; nothing is opened yet.
    pub fn at(data_dir: &Path) -> Self {
        Self(Arc::new(Inner { folder: data_dir.join("audit"), log: Mutex::new(None) }))
    }
    fn lock(&self) -> MutexGuard<'_, Option<OneLog>> {
        self.0.log.lock().unwrap_or_else(PoisonError::into_inner)
    }
    /// Runs `f` on the log of `epoch`, opened if it was not.
    fn with<T>(&self, epoch: u64, f: impl FnOnce(&mut OneLog) -> Result<T, StoreError>) -> Result<T, StoreError> {
        let mut log = self.lock();
        if log.as_ref().is_none_or(|log| log.epoch != epoch) {
            *log = Some(OneLog::open(&self.0.folder.join(epoch.to_string()), epoch)?);
        }
        match log.as_mut() {
            Some(log) => f(log),
            None => Err(StoreError::damaged("the audit log", "none")),
        }
    }
    /// What there is of the log of `epoch`.
    pub fn view(&self, epoch: u64) -> Result<View, StoreError> {
        self.with(epoch, |log| Ok(View { files: log.files.clone(), size: log.size }))
    }
    /// Records of `[from, to)`, in order: as many as fit `bytes_max`, and at least one, as they are stored.
    pub fn read(&self, epoch: u64, from: u64, to: u64, bytes_max: usize) -> Result<Vec<Vec<u8>>, StoreError> {
        let mut out: Vec<Vec<u8>> = Vec::new();
        let (mut n, mut bytes) = (from, 0);
        while n < to {
            let bundle = n / tile::WIDTH;
            // The lock is held to look the place up, not to read.
            let Some((files, start, end)) = self.with(epoch, |log| Ok(log.place(bundle)))? else { break };
            let read = files.bundle(start, end)?;
            let mut rest = read.as_slice();
            let mut at = bundle * tile::WIDTH;
            while let Some((entry, after)) = tile::take_entry(rest) {
                if at >= n && at < to {
                    bytes += entry.len();
                    if bytes > bytes_max && !out.is_empty() {
                        return Ok(out);
                    }
                    out.push(entry.to_vec());
                }
                (rest, at) = (after, at + 1);
            }
            if at <= n {
                break;
            }
            n = at;
        }
        Ok(out)
    }
    /// Takes records from another replica that this one lacks, in order; the caller verified them. Where these files end
    /// afterwards.
    pub fn fill(&self, epoch: u64, from: u64, entries: Vec<Vec<u8>>) -> Result<u64, StoreError> {
        self.with(epoch, |log| {
            let numbered = (from..).zip(entries);
            let entries = numbered
                .map(|(n, bytes)| AuditEntry { epoch, n, leaf: ambit_audit::leaf_hash(&bytes), bytes })
                .collect();
            log.append(entries)?;
            Ok(log.size)
        })
    }
    /// The right edge of the first `size` records, by the hashes kept.
    pub fn frontier(&self, epoch: u64, size: u64) -> Result<Frontier, StoreError> {
        let view = self.view(epoch)?;
        let (mut peaks, mut from) = (Vec::new(), 0u64);
        for level in (0..64).rev().filter(|level| size >> level & 1 == 1) {
            peaks.push(view.node(level, from >> level)?);
            from += 1 << level;
        }
        Frontier::new(size, peaks).ok_or_else(|| StoreError::damaged("the audit log", "a size beyond the bound"))
    }
}

impl View {
    /// A tile of the tree of the first `size` records.
    pub fn tile(&self, asked: Tile, size: u64) -> Option<Result<Vec<u8>, StoreError>> {
        match asked {
            Tile::Hashes(level, n, width) if level < tile::LEVELS => {
                let there = size.min(self.size) >> (level * tile::HEIGHT);
                let end = n.checked_mul(tile::WIDTH)?.checked_add(width)?;
                (end <= there).then(|| self.files.hashes(level, n * tile::WIDTH, width))
            }
            // Who did what is not for everybody: entries are had from the replica's own service.
            Tile::Hashes(..) | Tile::Entries(..) => None,
        }
    }
    /// Leaf hashes of `[from, from + count)`.
    pub fn leaves(&self, from: u64, count: u64) -> Result<Vec<u8>, StoreError> {
        self.files.hashes(0, from, count)
    }
}

impl Nodes for View {
    type Error = StoreError;
    fn node(&self, level: u32, index: u64) -> Result<Hash, StoreError> {
        let end = index.checked_add(1).and_then(|end| end.checked_shl(level));
        if end.is_none_or(|end| end > self.size) {
            let found = format!("{} records, where the subtree {index} of height {level} was asked for", self.size);
            return Err(StoreError::damaged("the audit log", found));
        }
        self.files.node(level, index)
    }
}

impl Bodies for AuditFiles {
    fn size(&self, epoch: u64) -> Result<u64, StoreError> {
        self.with(epoch, |log| Ok(log.size))
    }
    fn append(&self, entries: Vec<AuditEntry>) -> Result<(), StoreError> {
        let Some(epoch) = entries.first().map(|entry| entry.epoch) else { return Ok(()) };
        // An incarnation begins between two starts of a process: all are of one.
        self.with(epoch, |log| log.append(entries))
    }
    fn sync(&self) -> Result<(), StoreError> {
        self.lock().as_mut().map_or(Ok(()), OneLog::sync)
    }
    fn check(&self, epoch: u64, agreed: &Frontier) -> Result<(), StoreError> {
        let size = agreed.size();
        let is_it = || -> Result<bool, StoreError> { Ok(self.frontier(epoch, size)? == *agreed) };
        if size > self.size(epoch)? || is_it()? {
            return Ok(());
        }
        // What was not synced is whatever the disk made of it; the log of Raft makes it again.
        self.with(epoch, OneLog::forget_unsynced)?;
        if size > self.size(epoch)? || is_it()? {
            return Ok(());
        }
        Err(StoreError::damaged("the audit log", format!("another tree of {size} records than the cell agreed on")))
    }
    fn files(&self) -> Option<AuditFiles> {
        Some(self.clone())
    }
}

#[cfg(test)]
mod tests;
