//! The snapshot file: the whole state as sorted rows in checksummed chunks. Raft ships the very same bytes.
//!
//! Layout: magic, framed header, framed chunks. A frame is length (u32 LE), CRC32 (u32 LE), postcard bytes.

use super::{Membership, Snapshots, StoreError, Writing, io, sync_dir};
use ambit_state::TableWrite;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

/// What every format begins with, then two digits.
const MAGIC: &[u8; 6] = b"AMBSNP";
/// Of header and rows.
const FORMAT_NOW: u64 = 1;
/// A chunk ends once it holds this much: small enough that one bad sector names its place.
const CHUNK_BYTES: usize = 256 * 1024;
/// A larger state is refused: it would not fit a Raft message (bound of the transport) nor a replica's memory goal.
pub const SNAPSHOT_BYTES_MAX: usize = 128 * 1024 * 1024;

/// What a snapshot is of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// Applied index.
    pub index: u64,
    /// Term of the entry there.
    pub term: u64,
    /// The cell's members there.
    pub membership: Membership,
    /// `State::digest` there.
    pub digest: [u8; 32],
    /// Chunks that follow.
    pub chunks: u32,
}

/// A snapshot, parsed: every checksum held.
#[derive(Debug)]
pub struct Snapshot {
    /// Of what.
    pub header: Header,
    /// The rows, sorted.
    pub rows: Vec<TableWrite>,
}

/// Table, key and value. As bytes: a sequence of numbers is the same on disk, and is written number by number.
type Row = (u8, ByteBuf, ByteBuf);

/// The bytes of a snapshot. `header.chunks` is filled in here. Rows without a value are left out: a snapshot has no deletions.
pub fn encode(mut header: Header, rows: impl IntoIterator<Item = TableWrite>) -> Result<Vec<u8>, StoreError> {
    // Chunk by chunk, so that the rows are never in memory all at once.
    let (mut chunks, mut chunk, mut size) = (Vec::new(), Vec::<Row>::new(), 0);
    header.chunks = 0;
    for row in rows {
        let Some(value) = row.value else { continue };
        size += row.key.len() + value.len();
        chunk.push((row.table, row.key.into(), value.into()));
        if size >= CHUNK_BYTES {
            frame(&mut chunks, &chunk)?;
            header.chunks += 1;
            chunk.clear();
            size = 0;
        }
        if chunks.len() > SNAPSHOT_BYTES_MAX {
            return Err(StoreError::TooLarge { bytes: chunks.len(), max: SNAPSHOT_BYTES_MAX });
        }
    }
    if !chunk.is_empty() {
        frame(&mut chunks, &chunk)?;
        header.chunks += 1;
    }
    let mut out = MAGIC.to_vec();
    out.extend(format!("{FORMAT_NOW:02}").bytes());
    frame(&mut out, &header)?;
    out.append(&mut chunks);
    if out.len() > SNAPSHOT_BYTES_MAX {
        return Err(StoreError::TooLarge { bytes: out.len(), max: SNAPSHOT_BYTES_MAX });
    }
    Ok(out)
}

/// Strict: magic, every length, every checksum, the number of chunks, no trailing bytes.
pub fn decode(bytes: &[u8]) -> Result<Snapshot, StoreError> {
    let bad = |found: &str| StoreError::damaged("the snapshot", found);
    let (format, mut rest) =
        bytes.strip_prefix(MAGIC).and_then(<[u8]>::split_first_chunk::<2>).ok_or_else(|| bad("another magic"))?;
    match std::str::from_utf8(format).ok().and_then(|digits| digits.parse().ok()) {
        Some(FORMAT_NOW) => {}
        Some(found) if found > FORMAT_NOW => {
            return Err(StoreError::Newer { what: "the snapshot", found, known: FORMAT_NOW });
        }
        _ => return Err(bad("another magic")),
    }
    let header: Header = unframe(&mut rest)?;
    let mut rows = Vec::new();
    for _ in 0..header.chunks {
        let chunk: Vec<Row> = unframe(&mut rest)?;
        let row = |(table, key, value): Row| TableWrite { table, key: key.into_vec(), value: Some(value.into_vec()) };
        rows.extend(chunk.into_iter().map(row));
    }
    if rest.is_empty() { Ok(Snapshot { header, rows }) } else { Err(bad("trailing bytes")) }
}

fn frame<T: Serialize>(out: &mut Vec<u8>, value: &T) -> Result<(), StoreError> {
    let body = postcard::to_stdvec(value).map_err(|e| StoreError::damaged("a snapshot to write", e.to_string()))?;
    let len = u32::try_from(body.len()).map_err(|e| StoreError::damaged("a snapshot to write", e.to_string()))?;
    out.extend(len.to_le_bytes());
    out.extend(crc32fast::hash(&body).to_le_bytes());
    out.extend(body);
    Ok(())
}

fn unframe<T: for<'a> Deserialize<'a>>(rest: &mut &[u8]) -> Result<T, StoreError> {
    let bad = |found: &str| StoreError::damaged("the snapshot", found);
    let (len, after) = rest.split_first_chunk::<4>().ok_or_else(|| bad("a frame cut short"))?;
    let (crc, after) = after.split_first_chunk::<4>().ok_or_else(|| bad("a frame cut short"))?;
    let len = u32::from_le_bytes(*len) as usize;
    let body = after.get(..len).ok_or_else(|| bad("a frame cut short"))?;
    if crc32fast::hash(body) != u32::from_le_bytes(*crc) {
        return Err(bad("a checksum that fails"));
    }
    *rest = after.get(len..).unwrap_or_default();
    match postcard::take_from_bytes(body) {
        Ok((value, [])) => Ok(value),
        Ok(_) => Err(bad("trailing bytes in a frame")),
        Err(e) => Err(bad(&e.to_string())),
    }
}

/// The folder that holds the newest snapshot.
#[derive(Clone, Debug)]
pub struct SnapshotDir {
    dir: PathBuf,
}

impl SnapshotDir {
    /// Makes the folder where it is missing.
    pub fn open(data_dir: &Path) -> Result<Self, StoreError> {
        let dir = data_dir.join("snapshot");
        fs::create_dir_all(&dir).map_err(io("creating folder", &dir))?;
        Ok(Self { dir })
    }

    fn current(&self) -> PathBuf {
        self.dir.join("current.snapshot")
    }
}

/// A thread that writes.
#[derive(Debug)]
pub struct WritingFile(JoinHandle<Result<(), StoreError>>);

impl Writing for WritingFile {
    fn is_done(&self) -> bool {
        self.0.is_finished()
    }
    fn wait(self) -> Result<(), StoreError> {
        let panicked = |_| StoreError::damaged("a snapshot to write", "its writer panicked");
        self.0.join().map_err(panicked)?
    }
}

impl Snapshots for SnapshotDir {
    type Writing = WritingFile;

    fn begin(&self, bytes: Bytes) -> Result<WritingFile, StoreError> {
        let folder = self.clone();
        let spawned = std::thread::Builder::new().name("snapshot".to_owned()).spawn(move || folder.write(&bytes));
        spawned.map(WritingFile).map_err(io("starting the writer of", &self.dir))
    }

    fn load(&self) -> Result<Option<Snapshot>, StoreError> {
        let path = self.current();
        match fs::read(&path) {
            Ok(bytes) => decode(&bytes).map(Some),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(StoreError::Io { what: "reading snapshot", path, source }),
        }
    }

    fn write(&self, bytes: &[u8]) -> Result<(), StoreError> {
        let (temp, path) = (self.dir.join("next.tmp"), self.current());
        let mut file = fs::File::create(&temp).map_err(io("creating snapshot", &temp))?;
        file.write_all(bytes).map_err(io("writing snapshot", &temp))?;
        file.sync_all().map_err(io("syncing snapshot", &temp))?;
        fs::rename(&temp, &path).map_err(io("renaming snapshot", &path))?;
        sync_dir(&self.dir)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Vec<u8> {
        let rows = (0..3000u32).map(|n| TableWrite {
            table: (n % 7) as u8,
            key: n.to_be_bytes().to_vec(),
            value: Some(vec![7; 200]),
        });
        let header = Header { index: 9, term: 2, membership: Membership::of_founder(1), digest: [5; 32], chunks: 0 };
        encode(header, rows).unwrap()
    }

    #[test]
    fn a_snapshot_comes_back_whole() {
        let parsed = decode(&sample()).unwrap();
        assert_eq!((parsed.header.index, parsed.header.term, parsed.rows.len()), (9, 2, 3000));
        assert!(parsed.header.chunks > 1);
    }

    /// A power loss before the rename, or one that the folder's missing sync let the disk forget: the former snapshot.
    #[test]
    fn a_snapshot_whose_rename_was_lost_leaves_the_former() {
        let dir = std::env::temp_dir().join(format!("ambit-snapshot-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        let snapshots = SnapshotDir::open(&dir).unwrap();
        assert!(snapshots.load().unwrap().is_none());
        snapshots.write(&sample()).unwrap();
        let half = sample();
        fs::write(dir.join("snapshot/next.tmp"), &half[..half.len() / 2]).unwrap();
        assert_eq!(snapshots.load().unwrap().unwrap().header.index, 9);
        snapshots.write(&sample()).unwrap();
        assert!(snapshots.load().unwrap().is_some() && !dir.join("snapshot/next.tmp").exists());
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn a_later_format_is_no_damage() {
        let mut later = sample();
        later[7] = b'2';
        assert!(matches!(decode(&later), Err(StoreError::Newer { found: 2, known: 1, .. })));
    }

    #[test]
    fn any_flipped_byte_and_any_cut_is_noticed() {
        let good = sample();
        for at in (0..good.len()).step_by(4099) {
            let mut bad = good.clone();
            bad[at] ^= 0x10;
            assert!(decode(&bad).is_err(), "flip at {at}");
            assert!(decode(&good[..at]).is_err(), "cut at {at}");
        }
        let mut longer = good;
        longer.push(0);
        assert!(decode(&longer).is_err());
    }
}
