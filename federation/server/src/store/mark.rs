//! The last synced position, kept beside the log, so that a log which lost its end is noticed.
//!
//! raft-engine cuts its last file at the first record that fails its checksum: right for a torn write, wrong for damage
//! to what was acknowledged. The mark is written after each sync and not synced itself: it may lag behind the log after a
//! power loss, never lead. (last term, last index) only grows, also when a conflicting tail is replaced, so a log below
//! its mark has lost something (I14).

use super::{StoreError, io};
use raft_engine::env::{FileSystem, Handle, Permission};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::Arc;

const LEN: usize = 4 + 4 * 8;

/// What was on disk at the last sync.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Position {
    pub(super) term: u64,
    pub(super) vote: u64,
    pub(super) last_term: u64,
    pub(super) last_index: u64,
}

impl Position {
    /// Whether a log at `self` holds all that `mark` says was synced.
    pub(super) fn covers(&self, mark: &Position) -> bool {
        let log_ok = (self.last_term, self.last_index) >= (mark.last_term, mark.last_index);
        let vote_ok = self.term > mark.term || (self.term == mark.term && (mark.vote == 0 || mark.vote == self.vote));
        log_ok && vote_ok
    }

    fn encode(&self) -> [u8; LEN] {
        let mut out = [0u8; LEN];
        let (crc, body) = out.split_at_mut(4);
        for (slot, value) in body.chunks_exact_mut(8).zip([self.term, self.vote, self.last_term, self.last_index]) {
            slot.copy_from_slice(&value.to_le_bytes());
        }
        crc.copy_from_slice(&crc32fast::hash(body).to_le_bytes());
        out
    }

    fn decode(bytes: &[u8; LEN]) -> Option<Self> {
        let (crc, body) = bytes.split_at(4);
        if crc != crc32fast::hash(body).to_le_bytes() {
            return None;
        }
        let mut values = body.chunks_exact(8).map(|c| c.try_into().map(u64::from_le_bytes).unwrap_or_default());
        Some(Self { term: values.next()?, vote: values.next()?, last_term: values.next()?, last_index: values.next()? })
    }
}

/// The open file.
pub(super) struct MarkFile<F: FileSystem>(F::Writer);

impl<F: FileSystem> MarkFile<F> {
    pub(super) fn create(files: &F, path: &Path) -> Result<(), StoreError> {
        let handle = Arc::new(files.create(path).map_err(io("creating mark", path))?);
        let writer = files.new_writer(handle.clone()).map_err(io("creating mark", path))?;
        Self(writer).write(&Position::default()).map_err(io("writing mark", path))?;
        handle.sync().map_err(io("syncing mark", path))
    }

    pub(super) fn open(files: &F, path: &Path) -> Result<(Self, Position), StoreError> {
        let bad = |found: &str| StoreError::damaged("the log's mark", found);
        // A disk that cannot be read or written just now is not a damaged one.
        let failed = |e: std::io::Error| match e.kind() {
            ErrorKind::NotFound | ErrorKind::UnexpectedEof => bad(&e.to_string()),
            // raft-engine's files keep the kind of an error and say little.
            kind => io("opening mark", path)(std::io::Error::new(kind, format!("{kind}: {e}"))),
        };
        let handle = Arc::new(files.open(path, Permission::ReadWrite).map_err(failed)?);
        let mut bytes = [0u8; LEN];
        files.new_reader(handle.clone()).and_then(|mut file| file.read_exact(&mut bytes)).map_err(failed)?;
        let position = Position::decode(&bytes).ok_or_else(|| bad("a checksum that fails"))?;
        let writer = files.new_writer(handle).map_err(io("opening mark", path))?;
        Ok((Self(writer), position))
    }

    pub(super) fn write(&mut self, position: &Position) -> std::io::Result<()> {
        self.0.seek(SeekFrom::Start(0))?;
        self.0.write_all(&position.encode())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_below_its_mark_is_noticed() {
        let mark = Position { term: 3, vote: 2, last_term: 3, last_index: 100 };
        assert_eq!(Position::decode(&mark.encode()), Some(mark));
        for (position, covers) in [
            (mark, true),
            (Position { last_index: 99, ..mark }, false),
            (Position { last_term: 4, last_index: 90, term: 4, ..mark }, true),
            (Position { vote: 0, ..mark }, false),
            (Position { vote: 1, ..mark }, false),
            (Position { term: 4, vote: 0, ..mark }, true),
            (Position { term: 2, ..mark }, false),
        ] {
            assert_eq!(position.covers(&mark), covers, "{position:?}");
        }
    }
}
