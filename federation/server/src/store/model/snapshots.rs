//! The newest snapshot: replaced by a rename, which a crash may lose.

use super::ModelDisk;
use super::fault::{Part, Target, Written};
use crate::store::snapshot::{self, Snapshot};
use crate::store::{Snapshots, StoreError, Writing};
use bytes::Bytes;
use std::cell::Cell;

/// The snapshot of a [`ModelDisk`].
#[derive(Debug)]
pub struct ModelSnapshots(pub(super) ModelDisk);

/// A snapshot that is written when it is waited for: until then a crash loses it.
#[derive(Debug)]
pub struct ModelWriting {
    disk: ModelDisk,
    bytes: Bytes,
    /// How often it was asked about.
    asked: Cell<u32>,
}

/// Questions until a snapshot is on disk.
const ASKED_MAX: u32 = 3;

impl Writing for ModelWriting {
    fn is_done(&self) -> bool {
        self.asked.set(self.asked.get() + 1);
        self.asked.get() > ASKED_MAX
    }
    fn wait(self) -> Result<(), StoreError> {
        ModelSnapshots(self.disk).write(&self.bytes)
    }
}

impl Snapshots for ModelSnapshots {
    type Writing = ModelWriting;

    fn begin(&self, bytes: Bytes) -> Result<ModelWriting, StoreError> {
        Ok(ModelWriting { disk: self.0.clone(), bytes, asked: Cell::new(0) })
    }

    fn load(&self) -> Result<Option<Snapshot>, StoreError> {
        let disk = self.0.0.borrow();
        if disk.is_damaged(Part::Snapshot) {
            return Err(StoreError::damaged("the snapshot", "a checksum that fails"));
        }
        disk.snapshot.as_deref().map(snapshot::decode).transpose()
    }

    fn write(&self, bytes: &[u8]) -> Result<(), StoreError> {
        let mut disk = self.0.0.borrow_mut();
        // Interrupted, the old one stays: the rename is what replaces it.
        let written = disk.strike(Target::Snapshot, bytes.len())?;
        if written == Written::Renamed {
            disk.renamed = Some(bytes.to_vec());
        } else {
            disk.snapshot = Some(bytes.to_vec());
            disk.repair(Part::Snapshot);
        }
        disk.done(written)
    }
}
