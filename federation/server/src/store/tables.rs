//! The state's rows in sled, so that a restart need not replay the whole log. Never the only copy of anything.
//!
//! Rows are written in blocks, one value each: a block holds rows that changed, and a later one overrides it. sled copies
//! and sorts a page for every key, which with a key for each row took two thirds of a replica's CPU time.
//!
//! sled 0.34.7's `flush` is not a disk flush on Linux (it calls sync_file_range: spacejam/sled issues 1452 and 1351), it
//! drops a damaged tail silently and panics on a damaged body. Hence: each flush is followed by a sync of sled's files and
//! folder, each value has its own checksum, the digest of the whole state is stored with the applied index in the same
//! transaction, opening happens under `catch_unwind`, and any doubt moves the folder aside; the state is then rebuilt from
//! the snapshot file and the log.

use super::{Membership, Rows, StoreError, caught, io, sync_dir};
use ambit_state::TableWrite;
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;
use sled::transaction::{TransactionError, Transactional, TransactionalTree};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

/// 1 had a key for each row.
const VALUE_VERSION: u8 = 2;
/// A block is full once it holds this much. Sixteen of them make a page, which must stay below sled's 128 KiB for one
/// item of its file.
const BLOCK_BYTES: usize = 4 * 1024;
/// Changed rows kept in memory before their blocks are written: one transaction for all of them.
const PENDING_BYTES_MAX: usize = 256 * 1024;
/// Blocks are written anew, without what is overridden, once they hold so many more rows than twice those of the state.
const OVERRIDDEN_ROWS_MAX: usize = 100_000;
/// sled's page cache, bytes. The state lives in memory already, and blocks are read at open only; the default is 1 GiB.
const CACHE_BYTES: u64 = 2 * 1024 * 1024;
/// Damaged folders kept for a look; the last place is reused.
const ASIDE_MAX: u32 = 4;
const META: &str = "meta";
const ROWS: &str = "rows";
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

/// A row's table and key.
type RowKey = (u8, Vec<u8>);
/// A row as it changed; `None` where it is gone.
type Change = (u8, ByteBuf, Option<ByteBuf>);

fn change(table: u8, key: Vec<u8>, value: Option<Vec<u8>>) -> Change {
    (table, ByteBuf::from(key), value.map(ByteBuf::from))
}

/// The open tables.
pub struct Tables {
    dir: PathBuf,
    open: Option<Open>,
    /// Rows that changed since the last block, and what the state is of with them.
    pending: BTreeMap<RowKey, Option<Vec<u8>>>,
    pending_bytes: usize,
    position: Option<Applied>,
}

struct Open {
    dir: PathBuf,
    db: sled::Db,
    meta: sled::Tree,
    rows: sled::Tree,
    /// The number of the next block.
    next: u64,
    /// Rows in all blocks, overridden ones included.
    stored: usize,
    /// A flush on its way, on a thread of its own: Raft does not wait for it.
    flushing: Option<JoinHandle<Result<(), StoreError>>>,
}

impl Tables {
    /// Opens the folder and reads everything. Whatever is wrong with it, it is moved aside and the answer is `None`:
    /// rebuild. That includes finding nothing where the log says that a state was `expected`: sled drops what it cannot
    /// read without a word. Only a file system that does not even rename is an error.
    pub fn open(data_dir: &Path, expected: bool) -> Result<(Self, Option<Stored>), StoreError> {
        let dir = data_dir.join("tables");
        let expected = expected && dir.exists();
        let first = caught("tables", || {
            let mut open = Open::at(&dir)?;
            match open.load()? {
                None if expected => Err(StoreError::damaged("tables", "nothing, where a state was stored")),
                rows => Ok((open, rows)),
            }
        });
        match first {
            Ok((open, rows)) => Ok((Self::of(dir, Some(open)), rows)),
            Err(e) => {
                tracing::warn!(error = %e, "tables damaged: moved aside, rebuilding from snapshot and log");
                let mut tables = Self::of(dir, None);
                tables.move_aside()?;
                Ok((tables, None))
            }
        }
    }

    fn of(dir: PathBuf, open: Option<Open>) -> Self {
        Self { dir, open, pending: BTreeMap::new(), pending_bytes: 0, position: None }
    }

    fn store(&mut self) {
        let Some(position) = self.position.take() else { return };
        self.pending_bytes = 0;
        let changes =
            std::mem::take(&mut self.pending).into_iter().map(|((table, key), value)| change(table, key, value));
        self.attempt(|open| open.write(Some(&position), changes.collect()));
    }

    fn attempt(&mut self, act: impl FnOnce(&mut Open) -> Result<(), StoreError>) {
        let Some(open) = &mut self.open else { return };
        if let Err(e) = caught("tables", || act(open)) {
            tracing::error!(error = %e, "tables failed: running without them, they are rebuilt at the next start");
            self.open = None;
        }
    }

    /// Lets go of the folder: no clone of the database outlives this.
    fn release(&mut self) {
        self.attempt(Open::flushed);
        self.open = None;
    }

    fn reopen(&mut self) {
        (self.position, self.pending_bytes) = (None, 0);
        self.pending.clear();
        match caught("tables", || Open::at(&self.dir)) {
            Ok(open) => self.open = Some(open),
            Err(e) => tracing::error!(error = %e, "tables do not open: running without them"),
        }
    }
}

impl Rows for Tables {
    fn move_aside(&mut self) -> Result<(), StoreError> {
        self.release();
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

    fn replace(&mut self, applied: &Applied, rows: impl IntoIterator<Item = TableWrite>) {
        self.release();
        if let Err(e) = fs::remove_dir_all(&self.dir)
            && e.kind() != std::io::ErrorKind::NotFound
        {
            tracing::error!(error = %e, "tables not removable: running without them");
            return;
        }
        self.reopen();
        let mut rows = rows.into_iter().map(|row| change(row.table, row.key, row.value)).peekable();
        while rows.peek().is_some() {
            let part: Vec<_> = rows.by_ref().take(4096).collect();
            self.attempt(|open| open.write(None, part));
        }
        self.position = Some(applied.clone());
        // From here on a killed process leaves at least this.
        self.store();
        self.attempt(Open::flush_whole);
    }

    fn write(&mut self, applied: &Applied, writes: Vec<TableWrite>) {
        if self.open.is_none() {
            return;
        }
        for w in writes {
            self.pending_bytes += w.key.len() + w.value.as_ref().map_or(0, Vec::len);
            // The last write of a row is the one that counts; some rows change with every entry.
            if let Some(Some(old)) = self.pending.insert((w.table, w.key), w.value) {
                self.pending_bytes = self.pending_bytes.saturating_sub(old.len());
            }
        }
        self.position = Some(applied.clone());
        if self.pending_bytes >= PENDING_BYTES_MAX {
            self.store();
        }
    }

    fn checkpoint(&mut self) {
        self.store();
        self.attempt(Open::flush);
    }

    fn close(&mut self) {
        self.store();
        self.attempt(Open::flush_whole);
    }

    fn is_bloated(&self, rows: usize) -> bool {
        self.open.as_ref().is_some_and(|open| open.stored > 2 * rows + OVERRIDDEN_ROWS_MAX)
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
        let rows = db.open_tree(ROWS).map_err(failed("opening tables"))?;
        dir.parent().map(sync_dir).transpose()?;
        Ok(Self { dir: dir.to_owned(), db, meta, rows, next: 0, stored: 0, flushing: None })
    }

    /// All blocks in their order, the later ones over the earlier.
    fn load(&mut self) -> Result<Option<Stored>, StoreError> {
        let failed = |e| StoreError::Tables { what: "reading tables", source: Box::new(e) };
        let mut rows: BTreeMap<RowKey, Vec<u8>> = BTreeMap::new();
        for block in self.rows.iter() {
            let (key, sealed) = block.map_err(failed)?;
            let number = <[u8; 8]>::try_from(key.as_ref()).map_err(|_| damaged("a block without a number"))?;
            self.next = u64::from_be_bytes(number) + 1;
            let bytes = unseal(&key, &sealed)?;
            let changes: Vec<Change> = postcard::from_bytes(bytes).map_err(|e| damaged(&e.to_string()))?;
            self.stored += changes.len();
            for (table, key, value) in changes {
                match value {
                    Some(value) => rows.insert((table, key.into_vec()), value.into_vec()),
                    None => rows.remove(&(table, key.into_vec())),
                };
            }
        }
        let rows: Vec<_> =
            rows.into_iter().map(|((table, key), value)| TableWrite { table, key, value: Some(value) }).collect();
        match self.meta.get(META_KEY).map_err(failed)? {
            Some(sealed) => {
                let applied = postcard::from_bytes(unseal(META_KEY, &sealed)?).map_err(|e| damaged(&e.to_string()))?;
                Ok(Some((applied, rows)))
            }
            None if rows.is_empty() => Ok(None),
            None => Err(damaged("rows without a position")),
        }
    }

    fn write(&mut self, applied: Option<&Applied>, changes: Vec<Change>) -> Result<(), StoreError> {
        let (mut blocks, mut block, mut size) = (Vec::new(), Vec::new(), 0);
        for change in changes {
            size += change.1.len() + change.2.as_ref().map_or(0, |value| value.len());
            block.push(change);
            if size >= BLOCK_BYTES {
                blocks.push(self.seal_block(&std::mem::take(&mut block))?);
                size = 0;
            }
        }
        if !block.is_empty() {
            blocks.push(self.seal_block(&block)?);
        }
        let position = match applied {
            Some(a) => Some(seal(META_KEY, &postcard::to_stdvec(a).map_err(|e| damaged(&e.to_string()))?)),
            None => None,
        };
        let done = [&self.meta, &self.rows].as_slice().transaction(|views: &Vec<TransactionalTree>| {
            let [meta, rows] = views.as_slice() else { return Ok(()) };
            if let Some(position) = &position {
                meta.insert(META_KEY, position.as_slice())?;
            }
            for (key, sealed) in &blocks {
                rows.insert(key, sealed.as_slice())?;
            }
            Ok(())
        });
        done.map_err(|e: TransactionError<()>| match e {
            TransactionError::Storage(e) => StoreError::Tables { what: "writing tables", source: Box::new(e) },
            TransactionError::Abort(()) => damaged("a transaction that gave up"),
        })
    }

    /// One at a time: where the last takes that long, the next checkpoint comes soon enough.
    fn flush(&mut self) -> Result<(), StoreError> {
        if self.flushing.as_ref().is_some_and(|flush| !flush.is_finished()) {
            return Ok(());
        }
        self.flushed()?;
        let (db, dir) = (self.db.clone(), self.dir.clone());
        let flush = move || {
            db.flush().map_err(|e| StoreError::Tables { what: "flushing tables", source: Box::new(e) })?;
            sync_files(&dir)
        };
        let spawned = std::thread::Builder::new().name("tables-flush".into()).spawn(flush);
        self.flushing = Some(spawned.map_err(|e| damaged(&e.to_string()))?);
        Ok(())
    }

    /// A flush of all that was written before this call; it returns when that is done.
    fn flush_whole(&mut self) -> Result<(), StoreError> {
        self.flushed()?;
        self.flush()?;
        self.flushed()
    }

    /// Waits for the flush on its way.
    fn flushed(&mut self) -> Result<(), StoreError> {
        match self.flushing.take().map(JoinHandle::join) {
            None => Ok(()),
            Some(Ok(done)) => done,
            Some(Err(_)) => Err(damaged("a flush that panicked")),
        }
    }

    fn seal_block(&mut self, block: &[Change]) -> Result<([u8; 8], Vec<u8>), StoreError> {
        let room = Vec::with_capacity(2 * BLOCK_BYTES);
        let bytes = postcard::to_extend(block, room).map_err(|e| damaged(&e.to_string()))?;
        let key = self.next.to_be_bytes();
        self.next += 1;
        self.stored += block.len();
        Ok((key, seal(&key, &bytes)))
    }
}

/// What sled's own flush leaves to chance: a disk flush of every file, and of the names.
fn sync_files(dir: &Path) -> Result<(), StoreError> {
    for file in fs::read_dir(dir).map_err(io("listing tables", dir))? {
        let path = file.map_err(io("listing tables", dir))?.path();
        if path.is_dir() {
            sync_files(&path)?;
        } else if let Err(e) = fs::File::open(&path).and_then(|file| file.sync_all())
            // sled replaces its smaller files by a rename.
            && e.kind() != std::io::ErrorKind::NotFound
        {
            return Err(io("syncing tables", &path)(e));
        }
    }
    sync_dir(dir)
}

fn damaged(found: &str) -> StoreError {
    StoreError::damaged("tables", found)
}

/// Version byte, CRC32 over (key, bytes), bytes: a value in the wrong place fails too.
fn seal(key: &[u8], bytes: &[u8]) -> Vec<u8> {
    let mut out = vec![VALUE_VERSION];
    out.extend(checksum(key, bytes).to_le_bytes());
    out.extend(bytes);
    out
}

fn unseal<'a>(key: &[u8], sealed: &'a [u8]) -> Result<&'a [u8], StoreError> {
    let (version, rest) = sealed.split_first().ok_or_else(|| damaged("an empty value"))?;
    let (crc, bytes) = rest.split_first_chunk::<4>().ok_or_else(|| damaged("a value cut short"))?;
    if *version != VALUE_VERSION {
        return Err(damaged("a value of another version"));
    }
    if checksum(key, bytes) != u32::from_le_bytes(*crc) {
        return Err(damaged("a checksum that fails"));
    }
    Ok(bytes)
}

fn checksum(key: &[u8], bytes: &[u8]) -> u32 {
    let mut h = crc32fast::Hasher::new();
    h.update(&(key.len() as u64).to_le_bytes());
    h.update(key);
    h.update(bytes);
    h.finalize()
}
