//! The files of one incarnation's log: `entries` (bundles, one after the other), `starts` (where each bundle begins) and
//! `hashes-N` (the tiles of level N, one after the other). `synced` says how many records are on the disk for certain.

use crate::store::{StoreError, io, sync_dir};
use ambit_audit::tile::{self, HEIGHT, LEVELS, WIDTH};
use ambit_audit::tree::{Hash, node_hash};
use ambit_audit::{Record, leaf_hash};
use ambit_state::audit::AuditEntry;
use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Records kept in memory while older ones are missing: what is applied while the last of these are on their way.
const RECENT_MAX: usize = 4_096;
const HASH: u64 = 32;
/// Most bundles are shorter; the longest.
const BUNDLE_BYTES: u64 = 256 * 1024;
const BUNDLE_BYTES_MAX: u64 = WIDTH * (tile::ENTRY_BYTES_MAX as u64 + 2);

/// Open files, for who reads without the lock.
pub(super) struct Files {
    dir: PathBuf,
    entries: File,
    starts: File,
    levels: Vec<File>,
}

impl Files {
    fn open(dir: &Path) -> Result<Self, StoreError> {
        fs::create_dir_all(dir).map_err(io("creating folder", dir))?;
        let open = |name: &str| {
            let path = dir.join(name);
            let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
            file.map_err(io("opening", &path))
        };
        let levels = (0..LEVELS).map(|level| open(&format!("hashes-{level}"))).collect::<Result<_, _>>()?;
        let files = Self { dir: dir.to_owned(), entries: open("entries")?, starts: open("starts")?, levels };
        sync_dir(dir)?;
        Ok(files)
    }
    fn level(&self, level: u32) -> Result<&File, StoreError> {
        let missing = || StoreError::damaged("the audit log", format!("no tiles of level {level}"));
        self.levels.get(level as usize).ok_or_else(missing)
    }
    fn read(&self, file: &File, at: u64, len: u64) -> Result<Vec<u8>, StoreError> {
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(usize::MAX)];
        file.read_exact_at(&mut bytes, at).map_err(io("reading", &self.dir))?;
        Ok(bytes)
    }
    fn write(&self, file: &File, at: u64, bytes: &[u8]) -> Result<(), StoreError> {
        file.write_all_at(bytes, at).map_err(io("writing", &self.dir))
    }
    fn cut(&self, file: &File, len: u64) -> Result<(), StoreError> {
        file.set_len(len).map_err(io("truncating", &self.dir))
    }
    fn len(&self, file: &File) -> Result<u64, StoreError> {
        Ok(file.metadata().map_err(io("reading", &self.dir))?.len())
    }
    pub(super) fn bundle(&self, start: u64, end: u64) -> Result<Vec<u8>, StoreError> {
        self.read(&self.entries, start, end.saturating_sub(start))
    }
    /// `count` hashes of a level of tiles, from `first`.
    pub(super) fn hashes(&self, level: u32, first: u64, count: u64) -> Result<Vec<u8>, StoreError> {
        self.read(self.level(level)?, first * HASH, count * HASH)
    }
    /// The root of 2^`height` entries: a hash of a level of tiles, or over up to 128 of these.
    pub(super) fn node(&self, height: u32, index: u64) -> Result<Hash, StoreError> {
        let (level, above) = (height / HEIGHT, height % HEIGHT);
        self.over(level, index << above, 1 << above)
    }
    /// The root over `count` hashes of a level of tiles, a power of two.
    fn over(&self, level: u32, first: u64, count: u64) -> Result<Hash, StoreError> {
        let bytes = self.hashes(level, first, count)?;
        let mut row: Vec<Hash> = bytes.chunks_exact(32).filter_map(|chunk| chunk.try_into().ok()).collect();
        while row.len() > 1 {
            row =
                row.chunks(2).filter_map(|pair| pair.first().zip(pair.last())).map(|(l, r)| node_hash(l, r)).collect();
        }
        row.pop().ok_or_else(|| StoreError::damaged("the audit log", "no hashes"))
    }
}

pub(super) struct OneLog {
    pub(super) epoch: u64,
    pub(super) files: Arc<Files>,
    /// Records.
    pub(super) size: u64,
    /// Bytes of `entries` that they take.
    end: u64,
    /// Where each bundle begins.
    starts: Vec<u64>,
    synced: u64,
    /// Records that came while older ones were missing, in order; the oldest go.
    recent: VecDeque<AuditEntry>,
}

impl OneLog {
    /// Opens the files and makes good what a process that died left of them.
    pub(super) fn open(dir: &Path, epoch: u64) -> Result<Self, StoreError> {
        let files = Arc::new(Files::open(dir)?);
        let synced = fs::read_to_string(dir.join("synced")).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0);
        let mut log = Self { epoch, files, size: 0, end: 0, starts: Vec::new(), synced, recent: VecDeque::new() };
        log.find_end()?;
        log.synced = log.synced.min(log.size);
        log.hash_from(log.synced)?;
        Ok(log)
    }

    /// Where whole records end: what follows was being written.
    fn find_end(&mut self) -> Result<(), StoreError> {
        let files = self.files.clone();
        let there = files.len(&files.entries)?;
        let known = files.read(&files.starts, 0, files.len(&files.starts)? / 8 * 8)?;
        let starts = known.chunks_exact(8).filter_map(|chunk| chunk.try_into().ok()).map(u64::from_be_bytes);
        let mut starts: Vec<u64> = starts.collect();
        // The file of starts is not synced: only what the synced records need of it is believed.
        starts.truncate(usize::try_from(self.synced / WIDTH).unwrap_or(usize::MAX));
        if starts.first().is_some_and(|first| *first != 0) || !starts.is_sorted() || starts.last() > Some(&there) {
            starts.clear();
        }
        let (mut at, mut n) = match starts.pop() {
            Some(start) => (start, starts.len() as u64 * WIDTH),
            None => (0, 0),
        };
        while at < there {
            starts.push(at);
            let mut found = self.whole_records(&files.bundle(at, there.min(at + BUNDLE_BYTES))?, n);
            if found.0 < WIDTH && at + BUNDLE_BYTES < there {
                found = self.whole_records(&files.bundle(at, there.min(at + BUNDLE_BYTES_MAX))?, n);
            }
            (n, at) = (n + found.0, at + found.1);
            if found.0 < WIDTH {
                break;
            }
        }
        if n % WIDTH == 0 && starts.last() == Some(&at) {
            starts.pop();
        }
        (self.size, self.end, self.starts) = (n, at, starts);
        files.cut(&files.entries, at)?;
        let starts: Vec<u8> = self.starts.iter().flat_map(|start| start.to_be_bytes()).collect();
        files.cut(&files.starts, starts.len() as u64)?;
        files.write(&files.starts, 0, &starts)
    }

    /// How many records there are at the beginning of these bytes, of which the first is number `first`, and their length: at
    /// most a bundle's. What is not synced must be a record.
    fn whole_records(&self, bytes: &[u8], first: u64) -> (u64, u64) {
        let (mut rest, mut count) = (bytes, 0);
        while count < WIDTH {
            match tile::take_entry(rest) {
                Some((entry, after)) if first + count < self.synced || Record::decode(entry).is_ok() => {
                    (rest, count) = (after, count + 1);
                }
                _ => break,
            }
        }
        (count, (bytes.len() - rest.len()) as u64)
    }

    /// Hashes of the first `from` records are kept, the others made from what is there.
    fn hash_from(&mut self, from: u64) -> Result<(), StoreError> {
        let files = self.files.clone();
        let kept = from.min(files.len(files.level(0)?)? / HASH);
        for level in 0..LEVELS {
            let file = files.level(level)?;
            let there = (kept >> (level * HEIGHT)).min(files.len(file)? / HASH);
            files.cut(file, there * HASH)?;
        }
        let mut n = kept;
        while n < self.size {
            let bundle = n / WIDTH;
            let Some((_, start, end)) = self.place(bundle) else { break };
            let bytes = files.bundle(start, end)?;
            let (mut rest, mut hashes) = (bytes.as_slice(), Vec::new());
            let mut at = bundle * WIDTH;
            while let Some((entry, after)) = tile::take_entry(rest) {
                if at >= n {
                    hashes.extend(leaf_hash(entry));
                }
                (rest, at) = (after, at + 1);
            }
            files.write(files.level(0)?, n * HASH, &hashes)?;
            n = at;
        }
        self.raise()
    }

    /// Hashes whole tiles into the level above, as far as that lacks them.
    fn raise(&self) -> Result<(), StoreError> {
        for level in 1..LEVELS {
            let (below, file) = (self.files.level(level - 1)?, self.files.level(level)?);
            let wanted = self.files.len(below)? / HASH / WIDTH;
            for n in self.files.len(file)? / HASH..wanted {
                let hash = self.files.over(level - 1, n * WIDTH, WIDTH)?;
                self.files.write(file, n * HASH, &hash)?;
            }
        }
        Ok(())
    }

    /// Where a bundle lies; none for one without records.
    pub(super) fn place(&self, bundle: u64) -> Option<(Arc<Files>, u64, u64)> {
        let at = usize::try_from(bundle).ok()?;
        let start = *self.starts.get(at)?;
        Some((self.files.clone(), start, self.starts.get(at + 1).copied().unwrap_or(self.end)))
    }

    /// Takes in records in order: those that are here already are compared, those after a gap wait for it to be filled.
    pub(super) fn append(&mut self, entries: Vec<AuditEntry>) -> Result<(), StoreError> {
        let mut run = Vec::new();
        for entry in entries {
            let next = self.size + run.len() as u64;
            if entry.n == next {
                run.push(entry);
            } else if entry.n > next {
                self.recent.push_back(entry);
                if self.recent.len() > RECENT_MAX {
                    self.recent.pop_front();
                }
            } else if entry.n >= self.size || self.files.node(0, entry.n)? != entry.leaf {
                tracing::error!(record = entry.n, "the audit log's files say otherwise than the log of Raft: mended");
                self.cut(entry.n)?;
                run.clear();
                run.push(entry);
            }
        }
        self.push(&run)?;
        self.recent.retain(|entry| entry.n >= self.size);
        while self.recent.front().is_some_and(|entry| entry.n == self.size) {
            let Some(entry) = self.recent.pop_front() else { break };
            self.push(&[entry])?;
        }
        Ok(())
    }

    /// One write to each file, however many there are.
    fn push(&mut self, run: &[AuditEntry]) -> Result<(), StoreError> {
        if run.is_empty() {
            return Ok(());
        }
        let files = self.files.clone();
        let (mut bytes, mut hashes, mut starts) = (Vec::new(), Vec::new(), Vec::new());
        let (mut size, known) = (self.size, self.starts.len() as u64);
        for entry in run {
            if size % WIDTH == 0 {
                starts.push(self.end + bytes.len() as u64);
            }
            let too_long = || StoreError::damaged("an audit record", "more than 65,535 bytes");
            tile::put_entry(&mut bytes, &entry.bytes).ok_or_else(too_long)?;
            hashes.extend(entry.leaf);
            size += 1;
        }
        files.write(&files.entries, self.end, &bytes)?;
        files.write(files.level(0)?, self.size * HASH, &hashes)?;
        if !starts.is_empty() {
            let encoded: Vec<u8> = starts.iter().flat_map(|start| start.to_be_bytes()).collect();
            files.write(&files.starts, known * 8, &encoded)?;
            self.starts.extend(starts);
        }
        let whole = |n: u64| n / WIDTH;
        let raised = whole(size) != whole(self.size);
        (self.size, self.end) = (size, self.end + bytes.len() as u64);
        if raised { self.raise() } else { Ok(()) }
    }

    /// Forgets the records from `size` on.
    fn cut(&mut self, size: u64) -> Result<(), StoreError> {
        if size >= self.size {
            return Ok(());
        }
        let files = self.files.clone();
        let bundle = size / WIDTH;
        let Some((_, start, end)) = self.place(bundle) else { return Ok(()) };
        let bytes = files.bundle(start, end)?;
        let mut rest = bytes.as_slice();
        for _ in 0..size % WIDTH {
            rest = tile::take_entry(rest).map_or(rest, |(_, after)| after);
        }
        self.end = end - rest.len() as u64;
        self.size = size;
        self.synced = self.synced.min(size);
        self.starts.truncate(usize::try_from(size.div_ceil(WIDTH)).unwrap_or(usize::MAX));
        files.cut(&files.entries, self.end)?;
        files.cut(&files.starts, self.starts.len() as u64 * 8)?;
        for level in 0..LEVELS {
            files.cut(files.level(level)?, (size >> (level * HEIGHT)) * HASH)?;
        }
        Ok(())
    }

    pub(super) fn forget_unsynced(&mut self) -> Result<(), StoreError> {
        self.cut(self.synced)
    }

    /// From here on the records survive a loss of power.
    pub(super) fn sync(&mut self) -> Result<(), StoreError> {
        if self.synced == self.size {
            return Ok(());
        }
        self.files.entries.sync_data().map_err(io("syncing", &self.files.dir))?;
        for level in 0..LEVELS {
            self.files.level(level)?.sync_data().map_err(io("syncing", &self.files.dir))?;
        }
        self.files.starts.sync_data().map_err(io("syncing", &self.files.dir))?;
        let (new, path) = (self.files.dir.join("synced.new"), self.files.dir.join("synced"));
        let file = File::create(&new).map_err(io("creating", &new))?;
        file.write_all_at(self.size.to_string().as_bytes(), 0).map_err(io("writing", &new))?;
        file.sync_data().map_err(io("syncing", &new))?;
        fs::rename(&new, &path).map_err(io("renaming", &path))?;
        sync_dir(&self.files.dir)?;
        self.synced = self.size;
        Ok(())
    }
}
