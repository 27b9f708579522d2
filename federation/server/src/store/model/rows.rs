//! The state's rows: what survives of them is chance's.

use super::{ModelDisk, StoredRows};
use crate::store::tables::Applied;
use crate::store::{Rows, StoreError};
use ambit_state::TableWrite;
use std::collections::BTreeMap;

/// The rows of a [`ModelDisk`].
#[derive(Debug)]
pub struct ModelRows(pub(super) ModelDisk);

impl Rows for ModelRows {
    fn move_aside(&mut self) -> Result<(), StoreError> {
        self.0.0.borrow_mut().forget_rows();
        Ok(())
    }

    fn replace(&mut self, applied: &Applied, rows: impl IntoIterator<Item = TableWrite>) {
        self.0.0.borrow_mut().forget_rows();
        self.write(applied, rows.into_iter().collect());
        self.checkpoint();
    }

    fn close(&mut self) {
        self.checkpoint();
    }

    fn is_bloated(&self, _rows: usize) -> bool {
        false
    }

    fn write(&mut self, applied: &Applied, writes: Vec<TableWrite>) {
        self.0.0.borrow_mut().rows_since.push((applied.clone(), writes));
    }

    fn checkpoint(&mut self) {
        let mut disk = self.0.0.borrow_mut();
        let since = std::mem::take(&mut disk.rows_since);
        disk.rows = StoredRows::after(disk.rows.take(), since);
    }
}

impl StoredRows {
    /// With what was written since.
    pub(super) fn after(
        rows: Option<StoredRows>,
        since: impl IntoIterator<Item = (Applied, Vec<TableWrite>)>,
    ) -> Option<StoredRows> {
        let mut stored = rows;
        for (applied, writes) in since {
            let stored = stored.get_or_insert_with(|| StoredRows { applied: applied.clone(), rows: BTreeMap::new() });
            stored.applied = applied;
            for write in writes {
                match write.value {
                    Some(value) => stored.rows.insert((write.table, write.key), value),
                    None => stored.rows.remove(&(write.table, write.key)),
                };
            }
        }
        stored
    }
}
