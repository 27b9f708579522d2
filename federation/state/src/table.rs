//! Typed tables that remember what changed, so that the same writes go to disk, into snapshots and into the digest.

use ambit_model::{Code, Refusal};
use serde::Serialize;
use serde::de::DeserializeOwned;
use sha2::{Digest as _, Sha256};
use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::ops::{Bound, Deref};
use std::sync::Arc;

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
    /// Which state this is: versions of tables of another one say nothing of this one's.
    pub(crate) origin: Arc<()>,
}

/// SHA-256 of one row, in lanes: what it adds to the digest, and takes away when it goes.
type Share = [u64; 4];

fn share(table: u8, key: &[u8], value: &[u8]) -> Share {
    let mut h = Sha256::new();
    h.update([table]);
    h.update((key.len() as u64).to_be_bytes());
    h.update(key);
    h.update(value);
    let row: [u8; 32] = h.finalize().into();
    let mut lanes = Share::default();
    for (lane, chunk) in lanes.iter_mut().zip(row.chunks_exact(8)) {
        let mut bytes = [0u8; 8];
        bytes.copy_from_slice(chunk);
        *lane = u64::from_be_bytes(bytes);
    }
    lanes
}

impl Journal {
    /// The digest is a sum over rows, so that a change costs one hash and order does not matter.
    fn record(&mut self, write: TableWrite, gone: Option<&Share>, come: Option<&Share>) {
        for (share, op) in [(gone, u64::wrapping_sub as fn(u64, u64) -> u64), (come, u64::wrapping_add)] {
            for (lane, part) in self.digest.iter_mut().zip(share.into_iter().flatten()) {
                *lane = op(*lane, *part);
            }
        }
        self.writes.push(write);
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

/// Rows of one kind, in key order. Of its encoded form a row keeps the digest only: a snapshot encodes it again. Rows are
/// on the heap, since the nodes of a tree that grows at its end are about half empty; and shared with who looks at them later.
pub(crate) struct Table<K, V> {
    id: u8,
    rows: BTreeMap<K, Row<V>>,
    /// Rises with each change.
    version: u64,
}

/// A row that others may share; whoever changes it puts another in its place.
#[derive(Debug)]
pub struct Row<V>(Arc<(V, Share)>);

impl<V> Clone for Row<V> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<V> Deref for Row<V> {
    type Target = V;
    fn deref(&self) -> &V {
        &self.0.0
    }
}

/// Most rows fit: a vector that grows byte by byte is moved half a dozen times on the way.
const ROW_BYTES: usize = 256;

/// Model types always encode: integers, strings and collections of known length.
#[allow(clippy::panic, reason = "an encoder that fails is a defect; the replica must stop, not keep an empty row")]
fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    let room = Vec::with_capacity(ROW_BYTES);
    let mut bytes = postcard::to_extend(value, room).unwrap_or_else(|e| panic!("state row does not encode: {e}"));
    // Writes wait in memory for a block's worth of others.
    bytes.shrink_to_fit();
    bytes
}

impl<K: Ord + Clone + Serialize + DeserializeOwned, V: Clone + Serialize + DeserializeOwned> Table<K, V> {
    pub(crate) fn new(id: u8) -> Self {
        Self { id, rows: BTreeMap::new(), version: 0 }
    }
    /// Takes the rows of another table in place of its own, sharing them; false where there was no change since.
    pub(crate) fn follow(&mut self, other: &Self, same_state: bool) -> bool {
        let moved = !same_state || self.version != other.version;
        if moved {
            (self.rows, self.version) = (other.rows.clone(), other.version);
        }
        moved
    }
    pub(crate) fn version(&self) -> u64 {
        self.version
    }
    pub(crate) fn shared(&self) -> impl Iterator<Item = &Row<V>> {
        self.rows.values()
    }
    pub(crate) fn get(&self, key: &K) -> Option<&V> {
        self.rows.get(key).map(|row| &**row)
    }
    pub(crate) fn contains(&self, key: &K) -> bool {
        self.rows.contains_key(key)
    }
    pub(crate) fn len(&self) -> usize {
        self.rows.len()
    }
    pub(crate) fn iter(&self) -> impl DoubleEndedIterator<Item = (&K, &V)> {
        self.rows.iter().map(|(k, row)| (k, &**row))
    }
    pub(crate) fn from(&self, key: K) -> impl Iterator<Item = (&K, &V)> {
        self.rows.range(key..).map(|(k, row)| (k, &**row))
    }
    pub(crate) fn range(&self, range: (Bound<K>, Bound<K>)) -> impl Iterator<Item = (&K, &V)> {
        self.rows.range(range).map(|(k, row)| (k, &**row))
    }
    /// The first `limit` keys of a range.
    pub(crate) fn keys(&self, range: (Bound<K>, Bound<K>), limit: usize) -> impl Iterator<Item = K> {
        self.rows.range(range).take(limit).map(|(k, _)| k.clone())
    }
    /// The key of a write to this table.
    pub(crate) fn key_of(&self, write: &TableWrite) -> Option<K> {
        (write.table == self.id).then(|| postcard::from_bytes(&write.key).ok()).flatten()
    }
    pub(crate) fn put(&mut self, journal: &mut Journal, key: K, value: V) {
        let (bytes, encoded_key) = (encode(&value), encode(&key));
        let come = share(self.id, &encoded_key, &bytes);
        let old = self.rows.insert(key, Row(Arc::new((value, come))));
        self.version += 1;
        let write = TableWrite { table: self.id, key: encoded_key, value: Some(bytes) };
        journal.record(write, old.as_ref().map(|row| &row.0.1), Some(&come));
    }
    pub(crate) fn remove(&mut self, journal: &mut Journal, key: &K) -> Option<V> {
        let row = self.rows.remove(key)?;
        self.version += 1;
        let (value, gone) = Arc::unwrap_or_clone(row.0);
        journal.record(TableWrite { table: self.id, key: encode(key), value: None }, Some(&gone), None);
        Some(value)
    }
    /// Removes every row for which `gone` holds.
    pub(crate) fn prune(&mut self, journal: &mut Journal, gone: impl Fn(&K, &V) -> bool) {
        let keys: Vec<K> = self.iter().filter(|(k, v)| gone(k, v)).map(|(k, _)| k.clone()).collect();
        for key in keys {
            self.remove(journal, &key);
        }
    }
    /// All rows as they are stored, encoded one at a time.
    pub(crate) fn export(&self) -> impl Iterator<Item = TableWrite> {
        self.rows.iter().map(|(key, row)| TableWrite { table: self.id, key: encode(key), value: Some(encode(&**row)) })
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

/// Rows that are many and seldom asked for: kept as they are stored, and read when asked for. Same ids, digest and
/// stored form as a [`Table`].
pub(crate) struct Packed<K, V> {
    id: u8,
    rows: BTreeMap<K, Box<[u8]>>,
    row: PhantomData<V>,
}

impl<K: Ord + Clone + Serialize + DeserializeOwned, V: Serialize + DeserializeOwned> Packed<K, V> {
    pub(crate) fn new(id: u8) -> Self {
        Self { id, rows: BTreeMap::new(), row: PhantomData }
    }
    pub(crate) fn len(&self) -> usize {
        self.rows.len()
    }
    pub(crate) fn get(&self, key: &K) -> Option<V> {
        self.rows.get(key).map(|bytes| self.decode(bytes))
    }
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&K, V)> {
        self.rows.iter().map(|(key, bytes)| (key, self.decode(bytes)))
    }
    pub(crate) fn put(&mut self, journal: &mut Journal, key: K, value: &V) {
        let (bytes, encoded_key) = (encode(value), encode(&key));
        let come = share(self.id, &encoded_key, &bytes);
        let gone = self.rows.insert(key, bytes.clone().into()).map(|old| share(self.id, &encoded_key, &old));
        journal.record(TableWrite { table: self.id, key: encoded_key, value: Some(bytes) }, gone.as_ref(), Some(&come));
    }
    pub(crate) fn remove(&mut self, journal: &mut Journal, key: &K) {
        if let Some(old) = self.rows.remove(key) {
            let encoded_key = encode(key);
            let gone = share(self.id, &encoded_key, &old);
            journal.record(TableWrite { table: self.id, key: encoded_key, value: None }, Some(&gone), None);
        }
    }
    pub(crate) fn export(&self) -> impl Iterator<Item = TableWrite> {
        self.rows.iter().map(|(key, value)| TableWrite {
            table: self.id,
            key: encode(key),
            value: Some(value.to_vec()),
        })
    }
    pub(crate) fn load(&mut self, journal: &mut Journal, key: &[u8], value: &[u8]) -> Result<(), Refusal> {
        let bad =
            |e: postcard::Error| Refusal::new(Code::Internal, format!("a row of table {}", self.id), e.to_string());
        let key: K = postcard::from_bytes(key).map_err(bad)?;
        let value: V = postcard::from_bytes(value).map_err(bad)?;
        self.put(journal, key, &value);
        Ok(())
    }
    #[allow(clippy::panic, reason = "only what encoded here, or decoded at load, is in the table")]
    fn decode(&self, bytes: &[u8]) -> V {
        postcard::from_bytes(bytes).unwrap_or_else(|e| panic!("row of table {} does not decode: {e}", self.id))
    }
}
