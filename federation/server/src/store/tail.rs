//! Whether what raft-engine would cut off the end of the log is a torn write, or damage before a later write.
//!
//! raft-engine cuts its last file at the first record that fails its checksum. Every record is synced before the next is
//! written (see [`super::log`]), so a bad record with a complete one behind it was on disk once: that is damage (I14), also
//! where a power loss left the mark behind. The format is raft-engine's: a file is a header and records; a record is
//! `u56 length, u8 compression, u64 footer's place, [entries, crc32], footer, crc32 ^ the file's number`.

use super::{StoreError, io};
use raft_engine::env::{FileSystem, Handle, Permission};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const MAGIC: &[u8] = b"RAFT-LOG-FILE-HEADER-9986AB3E47F320B394C8E84916EB0ED5";
/// Its records have the file's number in their checksums: those of a file that was used before do not fit.
const VERSION_SIGNED: u64 = 2;
/// raft-engine falls back on it where it finds a file without a header.
const VERSION_UNSIGNED: u64 = 1;
const LATER: u64 = VERSION_SIGNED + 1;
/// No release will have counted further: above it, the number is damage.
const LATER_MAX: u64 = 15;
/// None and LZ4.
const COMPRESSION_MAX: u8 = 1;
const RECORD_HEADER: usize = 16;
const CRC: usize = 4;
/// Searched for a complete record, all candidates together. Far above what chance makes of a torn write.
const CHECKED_BYTES_MAX: usize = 1 << 30;

/// Refuses a log whose last file has a complete record behind one that is not.
pub(super) fn check<F: FileSystem>(files: &F, dir: &Path) -> Result<(), StoreError> {
    let Some((number, path)) = last_file(dir)? else { return Ok(()) };
    let handle = Arc::new(files.open(&path, Permission::ReadOnly).map_err(io("opening", &path))?);
    let mut bytes = vec![0; handle.file_size().map_err(io("reading", &path))?];
    let mut reader = files.new_reader(handle).map_err(io("reading", &path))?;
    reader.read_exact(&mut bytes).map_err(io("reading", &path))?;
    // raft-engine empties a last file whose header it does not know.
    if let Some(found @ LATER..=LATER_MAX) = version(&bytes) {
        return Err(StoreError::Newer { what: "the log's files", found, known: VERSION_SIGNED });
    }
    match damage(&bytes, number) {
        Some(found) => Err(StoreError::damaged("the log", found)),
        None => Ok(()),
    }
}

fn last_file(dir: &Path) -> Result<Option<(u64, PathBuf)>, StoreError> {
    let mut last = None;
    for file in std::fs::read_dir(dir).map_err(io("listing", dir))? {
        let path = file.map_err(io("listing", dir))?.path();
        let name = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.strip_suffix(".raftlog"));
        if let Some(number) = name.and_then(|name| name.parse().ok()) {
            last = last.max(Some((number, path)));
        }
    }
    Ok(last)
}

fn version(file: &[u8]) -> Option<u64> {
    file.strip_prefix(MAGIC)?.first_chunk().map(|version| u64::from_be_bytes(*version))
}

fn damage(file: &[u8], number: u64) -> Option<String> {
    let signed = number as u32;
    let (mut at, signatures) = match version(file) {
        Some(VERSION_SIGNED) => (MAGIC.len() + 16, [signed, signed]),
        Some(VERSION_UNSIGNED) => (MAGIC.len() + 8, [0, 0]),
        _ => (0, [signed, 0]),
    };
    let complete = |at: usize, checked: &mut usize| {
        let rest = file.get(at..)?;
        signatures.into_iter().find_map(|signature| record(rest, signature, checked))
    };
    while let Some(length) = complete(at, &mut 0) {
        at += length;
    }
    let (bad, mut checked) = (at, 0);
    // Space set aside is zeros, and a length's first byte is zero.
    let end = file.iter().rposition(|byte| *byte != 0).unwrap_or(0);
    for at in bad + 1..end {
        if file.get(at) == Some(&0) && complete(at, &mut checked).is_some() {
            return Some(format!("byte {bad} begins no complete record, and byte {at} behind it does"));
        }
        if checked > CHECKED_BYTES_MAX {
            return Some(format!("more that looks like records after byte {bad} than can be checked"));
        }
    }
    None
}

/// The length of the record that `bytes` begin with, if it is complete. `checked` grows by what was read for that.
fn record(bytes: &[u8], signature: u32, checked: &mut usize) -> Option<usize> {
    let (first, rest) = bytes.split_first_chunk::<8>()?;
    let length = usize::try_from(u64::from_be_bytes(*first) >> 8).ok()?;
    // No checksum covers the compression; raft-engine cuts at one that it does not know.
    if first[7] > COMPRESSION_MAX {
        return None;
    }
    let footer = usize::try_from(u64::from_be_bytes(*rest.first_chunk()?)).ok()?;
    let whole = bytes.get(..length)?;
    let (entries, footer) = (whole.get(RECORD_HEADER..footer)?, whole.get(footer..)?);
    *checked += footer.len();
    if !holds(footer, signature) {
        return None;
    }
    *checked += entries.len();
    (entries.is_empty() || holds(entries, 0)).then_some(length)
}

fn holds(bytes: &[u8], signature: u32) -> bool {
    match bytes.split_last_chunk::<CRC>() {
        Some((body, crc)) => !body.is_empty() && crc32fast::hash(body) == u32::from_le_bytes(*crc) ^ signature,
        None => false,
    }
}
