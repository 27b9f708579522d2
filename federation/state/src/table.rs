//! Typed tables that remember what changed, so that the same writes go to disk, into snapshots and into the digest.

use ambit_model::{Code, Refusal};
use serde::Serialize;
use serde::de::DeserializeOwned;
use sha2::{Digest as _, Sha256};
use std::collections::BTreeMap;

/// One change of one row, as it is stored: `value` is `None` where the row is gone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableWrite {
    /// Which table.
    pub table: u8,
    /// The row's key, postcard.
    pub key: Vec<u8>,
    /// The row, postcard.
    pub value: Option<Vec<u8>>,
}

/// What all tables of one state share: pending writes and the running digest.
#[derive(Default)]
pub(crate) struct Journal {
    writes: Vec<TableWrite>,
    digest: [u64; 4],
}

impl Journal {
    fn record(&mut self, table: u8, key: Vec<u8>, old: Option<&[u8]>, new: Option<Vec<u8>>) {
        if let Some(old) = old {
            self.mix(table, &key, old, u64::wrapping_sub);
        }
        if let Some(new) = &new {
            self.mix(table, &key, new, u64::wrapping_add);
        }
        self.writes.push(TableWrite { table, key, value: new });
    }

    /// The digest is a sum over rows, so that a change costs one hash and order does not matter.
    fn mix(&mut self, table: u8, key: &[u8], value: &[u8], op: fn(u64, u64) -> u64) {
        let mut h = Sha256::new();
        h.update([table]);
        h.update((key.len() as u64).to_be_bytes());
        h.update(key);
        h.update(value);
        let row: [u8; 32] = h.finalize().into();
        for (lane, chunk) in self.digest.iter_mut().zip(row.chunks_exact(8)) {
            let mut bytes = [0u8; 8];
            bytes.copy_from_slice(chunk);
            *lane = op(*lane, u64::from_be_bytes(bytes));
        }
    }

    pub(crate) fn take(&mut self) -> Vec<TableWrite> {
        std::mem::take(&mut self.writes)
    }

    pub(crate) fn digest(&self) -> [u8; 32] {
        let mut h = Sha256::new();
        for lane in self.digest {
            h.update(lane.to_be_bytes());
        }
        h.finalize().into()
    }
}

/// Rows of one kind, in key order.
pub(crate) struct Table<K, V> {
    id: u8,
    rows: BTreeMap<K, (V, Vec<u8>)>,
}

/// Model types always encode: integers, strings and collections of known length.
#[allow(clippy::panic, reason = "an encoder that fails is a defect; the replica must stop, not keep an empty row")]
fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    postcard::to_stdvec(value).unwrap_or_else(|e| panic!("state row does not encode: {e}"))
}

impl<K: Ord + Clone + Serialize + DeserializeOwned, V: Serialize + DeserializeOwned> Table<K, V> {
    pub(crate) fn new(id: u8) -> Self {
        Self { id, rows: BTreeMap::new() }
    }
    pub(crate) fn get(&self, key: &K) -> Option<&V> {
        self.rows.get(key).map(|(v, _)| v)
    }
    pub(crate) fn contains(&self, key: &K) -> bool {
        self.rows.contains_key(key)
    }
    pub(crate) fn len(&self) -> usize {
        self.rows.len()
    }
    pub(crate) fn iter(&self) -> impl DoubleEndedIterator<Item = (&K, &V)> {
        self.rows.iter().map(|(k, (v, _))| (k, v))
    }
    pub(crate) fn from(&self, key: K) -> impl Iterator<Item = (&K, &V)> {
        self.rows.range(key..).map(|(k, (v, _))| (k, v))
    }
    pub(crate) fn put(&mut self, journal: &mut Journal, key: K, value: V) {
        let bytes = encode(&value);
        let encoded_key = encode(&key);
        let old = self.rows.insert(key, (value, bytes.clone()));
        journal.record(self.id, encoded_key, old.as_ref().map(|(_, b)| b.as_slice()), Some(bytes));
    }
    pub(crate) fn remove(&mut self, journal: &mut Journal, key: &K) -> Option<V> {
        let (value, bytes) = self.rows.remove(key)?;
        journal.record(self.id, encode(key), Some(&bytes), None);
        Some(value)
    }
    /// Removes every row for which `gone` holds.
    pub(crate) fn prune(&mut self, journal: &mut Journal, gone: impl Fn(&K, &V) -> bool) {
        let keys: Vec<K> = self.iter().filter(|(k, v)| gone(k, v)).map(|(k, _)| k.clone()).collect();
        for key in keys {
            self.remove(journal, &key);
        }
    }
    pub(crate) fn export(&self, out: &mut Vec<TableWrite>) {
        for (key, (_, bytes)) in &self.rows {
            out.push(TableWrite { table: self.id, key: encode(key), value: Some(bytes.clone()) });
        }
    }
    pub(crate) fn load(&mut self, journal: &mut Journal, key: &[u8], value: &[u8]) -> Result<(), Refusal> {
        let bad =
            |e: postcard::Error| Refusal::new(Code::Internal, format!("a row of table {}", self.id), e.to_string());
        let key: K = postcard::from_bytes(key).map_err(bad)?;
        let value: V = postcard::from_bytes(value).map_err(bad)?;
        self.put(journal, key, value);
        Ok(())
    }
}
