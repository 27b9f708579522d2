//! Records of the audit log: a crash takes all that was not synced.

use super::ModelDisk;
use crate::store::audit::AuditFiles;
use crate::store::{Bodies, StoreError};
use ambit_audit::Frontier;
use ambit_state::audit::AuditEntry;
use std::collections::BTreeMap;

/// The records of a [`ModelDisk`].
#[derive(Debug)]
pub struct ModelBodies(pub(super) ModelDisk);

#[derive(Clone, Debug, Default)]
pub(super) struct Stored {
    /// By incarnation and place.
    entries: BTreeMap<(u64, u64), AuditEntry>,
    unsynced: Vec<(u64, u64)>,
}

impl Stored {
    pub(super) fn crash(&mut self) {
        for key in std::mem::take(&mut self.unsynced) {
            self.entries.remove(&key);
        }
    }
    /// Without a gap from the first.
    fn size(&self, epoch: u64) -> u64 {
        let there = self.entries.range((epoch, 0)..(epoch + 1, 0)).map(|((_, n), _)| *n);
        (0..).zip(there).take_while(|(n, there)| n == there).count() as u64
    }
}

impl Bodies for ModelBodies {
    fn size(&self, epoch: u64) -> Result<u64, StoreError> {
        Ok(self.0.0.borrow().bodies.size(epoch))
    }
    fn append(&self, entries: Vec<AuditEntry>) -> Result<(), StoreError> {
        let mut disk = self.0.0.borrow_mut();
        for entry in entries {
            let key = (entry.epoch, entry.n);
            if disk.bodies.entries.insert(key, entry).is_none() {
                disk.bodies.unsynced.push(key);
            }
        }
        Ok(())
    }
    fn sync(&self) -> Result<(), StoreError> {
        self.0.0.borrow_mut().bodies.unsynced.clear();
        Ok(())
    }
    fn check(&self, epoch: u64, agreed: &Frontier) -> Result<(), StoreError> {
        let disk = self.0.0.borrow();
        if disk.bodies.size(epoch) < agreed.size() {
            return Ok(());
        }
        let mut found = Frontier::default();
        let first = disk.bodies.entries.range((epoch, 0)..(epoch, agreed.size()));
        first.for_each(|(_, entry)| found.push(entry.leaf));
        if found == *agreed { Ok(()) } else { Err(StoreError::damaged("the audit log", "another tree")) }
    }
    fn files(&self) -> Option<AuditFiles> {
        None
    }
}
