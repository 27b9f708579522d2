//! The state's rows in sled, so that a restart need not replay the whole log. Never the only copy of anything.
//!
//! sled 0.34.7's `flush` is not a disk flush on Linux (it calls sync_file_range: spacejam/sled issues 1452 and 1351), it
//! drops a damaged tail silently and panics on a damaged body. Hence: each value has its own checksum, the digest of the
//! whole state is stored with the applied index in the same transaction, opening happens under `catch_unwind`, and any
//! doubt moves the folder aside; the state is then rebuilt from the snapshot file and the log.

use super::{Membership, Rows, StoreError, caught, io};
use ambit_state::TableWrite;
use serde::{Deserialize, Serialize};
use sled::transaction::{TransactionError, Transactional, TransactionalTree};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

const VALUE_VERSION: u8 = 1;
/// sled's page cache, bytes. The state lives in memory already; the default of 1 GiB would double it.
const CACHE_BYTES: u64 = 8 * 1024 * 1024;
/// Damaged folders kept for a look; the last place is reused.
const ASIDE_MAX: u32 = 4;
const META: &str = "meta";
const META_KEY: &[u8] = b"applied";

/// What the rows are of; stored in the same transaction as they.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Applied {
    /// Applied index.
    pub index: u64,
    /// The cell's members there.
    pub membership: Membership,
    /// `State::digest` there.
    pub digest: [u8; 32],
}

/// All rows and what they are of, as read at open.
pub type Stored = (Applied, Vec<TableWrite>);

/// The open tables.
pub struct Tables {
    dir: PathBuf,
    open: Option<Open>,
}

struct Open {
    db: sled::Db,
    meta: sled::Tree,
    trees: BTreeMap<u8, sled::Tree>,
}

impl Tables {
    /// Opens the folder and reads everything. Whatever is wrong with it, it is moved aside and the answer is `None`:
    /// rebuild. That includes finding nothing where the log says that a state was `expected`: sled drops what it cannot
    /// read without a word. Only a file system that does not even rename is an error.
    pub fn open(data_dir: &Path, expected: bool) -> Result<(Self, Option<Stored>), StoreError> {
        let dir = data_dir.join("tables");
        let expected = expected && dir.exists();
        let first = caught("tables", || {
            let open = Open::at(&dir)?;
            match open.load()? {
                None if expected => Err(StoreError::damaged("tables", "nothing, where a state was stored")),
                rows => Ok((open, rows)),
            }
        });
        match first {
            Ok((open, rows)) => Ok((Self { dir, open: Some(open) }, rows)),
            Err(e) => {
                tracing::warn!(error = %e, "tables damaged: moved aside, rebuilding from snapshot and log");
                let mut tables = Self { dir, open: None };
                tables.move_aside()?;
                Ok((tables, None))
            }
        }
    }

    fn attempt(&mut self, act: impl FnOnce(&mut Open) -> Result<(), StoreError>) {
        let Some(open) = &mut self.open else { return };
        if let Err(e) = caught("tables", || act(open)) {
            tracing::error!(error = %e, "tables failed: running without them, they are rebuilt at the next start");
            self.open = None;
        }
    }

    fn reopen(&mut self) {
        match caught("tables", || Open::at(&self.dir)) {
            Ok(open) => self.open = Some(open),
            Err(e) => tracing::error!(error = %e, "tables do not open: running without them"),
        }
    }
}

impl Rows for Tables {
    fn move_aside(&mut self) -> Result<(), StoreError> {
        self.open = None;
        let aside = (1..ASIDE_MAX)
            .map(|n| self.dir.with_extension(format!("damaged-{n}")))
            .find(|p| !p.exists())
            .unwrap_or_else(|| self.dir.with_extension(format!("damaged-{ASIDE_MAX}")));
        if aside.exists() {
            fs::remove_dir_all(&aside).map_err(io("removing folder", &aside))?;
        }
        if self.dir.exists() {
            fs::rename(&self.dir, &aside).map_err(io("moving tables aside", &aside))?;
        }
        self.reopen();
        Ok(())
    }

    fn replace(&mut self, applied: &Applied, rows: Vec<TableWrite>) {
        self.open = None;
        if let Err(e) = fs::remove_dir_all(&self.dir)
            && e.kind() != std::io::ErrorKind::NotFound
        {
            tracing::error!(error = %e, "tables not removable: running without them");
            return;
        }
        self.reopen();
        let mut rows = rows.into_iter().peekable();
        while rows.peek().is_some() {
            let part: Vec<_> = rows.by_ref().take(4096).collect();
            self.attempt(|open| open.write(None, part));
        }
        self.write(applied, Vec::new());
        // From here on a killed process leaves at least this.
        self.checkpoint();
    }

    fn write(&mut self, applied: &Applied, writes: Vec<TableWrite>) {
        self.attempt(|open| open.write(Some(applied), writes));
    }

    fn checkpoint(&mut self) {
        self.attempt(|open| {
            open.db.flush().map(drop).map_err(|e| StoreError::Tables { what: "flushing tables", source: Box::new(e) })
        });
    }
}

impl Open {
    fn at(dir: &Path) -> Result<Self, StoreError> {
        let failed = |what| move |e| StoreError::Tables { what, source: Box::new(e) };
        let db = sled::Config::new()
            .path(dir)
            .cache_capacity(CACHE_BYTES)
            .flush_every_ms(None)
            .open()
            .map_err(failed("opening tables"))?;
        let meta = db.open_tree(META).map_err(failed("opening tables"))?;
        let mut trees = BTreeMap::new();
        for name in db.tree_names() {
            if let Some(id) =
                std::str::from_utf8(&name).ok().and_then(|n| n.strip_prefix('t')).and_then(|n| n.parse().ok())
            {
                trees.insert(id, db.open_tree(&name).map_err(failed("opening tables"))?);
            }
        }
        Ok(Self { db, meta, trees })
    }

    fn load(&self) -> Result<Option<Stored>, StoreError> {
        let failed = |e| StoreError::Tables { what: "reading tables", source: Box::new(e) };
        let mut rows = Vec::new();
        for (&table, tree) in &self.trees {
            for row in tree.iter() {
                let (key, sealed) = row.map_err(failed)?;
                let value = unseal(table, &key, &sealed)?.to_vec();
                rows.push(TableWrite { table, key: key.to_vec(), value: Some(value) });
            }
        }
        match self.meta.get(META_KEY).map_err(failed)? {
            Some(sealed) => {
                let applied = postcard::from_bytes(unseal(u8::MAX, META_KEY, &sealed)?)
                    .map_err(|e| StoreError::damaged("tables", e.to_string()))?;
                Ok(Some((applied, rows)))
            }
            None if rows.is_empty() => Ok(None),
            None => Err(StoreError::damaged("tables", "rows without a position")),
        }
    }

    fn write(&mut self, applied: Option<&Applied>, writes: Vec<TableWrite>) -> Result<(), StoreError> {
        type SealedRow = (Vec<u8>, Option<Vec<u8>>);
        let mut by_table: BTreeMap<u8, Vec<SealedRow>> = BTreeMap::new();
        for w in writes {
            let sealed = w.value.map(|v| seal(w.table, &w.key, &v));
            by_table.entry(w.table).or_default().push((w.key, sealed));
        }
        for table in by_table.keys() {
            if !self.trees.contains_key(table) {
                let tree = self
                    .db
                    .open_tree(format!("t{table}"))
                    .map_err(|e| StoreError::Tables { what: "opening tables", source: Box::new(e) })?;
                self.trees.insert(*table, tree);
            }
        }
        let position = match applied {
            Some(a) => {
                let body = postcard::to_stdvec(a).map_err(|e| StoreError::damaged("tables", e.to_string()))?;
                Some(seal(u8::MAX, META_KEY, &body))
            }
            None => None,
        };
        let mut involved = vec![&self.meta];
        involved.extend(by_table.keys().filter_map(|t| self.trees.get(t)));
        let done = involved.as_slice().transaction(|views: &Vec<TransactionalTree>| {
            let Some((meta, tables)) = views.split_first() else { return Ok(()) };
            if let Some(position) = &position {
                meta.insert(META_KEY, position.as_slice())?;
            }
            for (tree, rows) in tables.iter().zip(by_table.values()) {
                for (key, sealed) in rows {
                    match sealed {
                        Some(sealed) => tree.insert(key.as_slice(), sealed.as_slice())?,
                        None => tree.remove(key.as_slice())?,
                    };
                }
            }
            Ok(())
        });
        done.map_err(|e: TransactionError<()>| match e {
            TransactionError::Storage(e) => StoreError::Tables { what: "writing tables", source: Box::new(e) },
            TransactionError::Abort(()) => StoreError::damaged("tables", "a transaction that gave up"),
        })
    }
}

/// Version byte, CRC32 over (table, key, bytes), bytes: a value in the wrong place fails too.
fn seal(table: u8, key: &[u8], bytes: &[u8]) -> Vec<u8> {
    let mut out = vec![VALUE_VERSION];
    out.extend(checksum(table, key, bytes).to_le_bytes());
    out.extend(bytes);
    out
}

fn unseal<'a>(table: u8, key: &[u8], sealed: &'a [u8]) -> Result<&'a [u8], StoreError> {
    let bad = |found: &str| StoreError::damaged("tables", format!("table {table}: {found}"));
    let (version, rest) = sealed.split_first().ok_or_else(|| bad("an empty value"))?;
    let (crc, bytes) = rest.split_first_chunk::<4>().ok_or_else(|| bad("a value cut short"))?;
    if *version != VALUE_VERSION {
        return Err(bad("a value of another version"));
    }
    if checksum(table, key, bytes) != u32::from_le_bytes(*crc) {
        return Err(bad("a checksum that fails"));
    }
    Ok(bytes)
}

fn checksum(table: u8, key: &[u8], bytes: &[u8]) -> u32 {
    let mut h = crc32fast::Hasher::new();
    h.update(&[table]);
    h.update(&(key.len() as u64).to_le_bytes());
    h.update(key);
    h.update(bytes);
    h.finalize()
}
