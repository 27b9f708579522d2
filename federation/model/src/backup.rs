//! A backup of a cell: one file that `ambit raft snapshot --out` writes and `ambitd restore` reads.
//!
//! Layout: magic, length of the header (u32 LE), header (postcard), the replica's snapshot as its store keeps it, the IMA
//! allow-lists that policies name (Raft holds their hashes only), and SHA-256 over all of it. No private key is in it.

use crate::{Code, Refusal, Stamp, TrustDomain};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

const MAGIC: &[u8; 8] = b"AMBBAK01";
const PREFIX: usize = MAGIC.len() + 4;
const SHA256: usize = 32;
/// A header names at most this many allow-lists.
pub const LISTS_MAX: usize = 256;
/// 256 lists of some 40 bytes and a trust domain are below this.
const HEADER_BYTES_MAX: usize = 16 * 1024;

/// What a backup says it is of. What it *is* of, the state in it says; whoever restores compares the two.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupHeader {
    /// The cell's trust domain.
    pub trust_domain: TrustDomain,
    /// The root's fingerprint.
    pub root_sha256: [u8; 32],
    /// The cell's incarnation.
    pub epoch: u64,
    /// Applied index.
    pub index: u64,
    /// The cell's time there.
    pub stamp: Stamp,
    /// The state's digest there.
    pub digest: [u8; 32],
    /// Length of the snapshot that follows, bytes.
    pub snapshot_bytes: u64,
    /// SHA-256 and length of each allow-list that follows.
    pub lists: Vec<([u8; 32], u64)>,
}

fn damaged(expected: impl Into<String>, found: impl Into<String>) -> Refusal {
    Refusal::new(Code::BackupDamaged, expected, found)
}

impl BackupHeader {
    /// The file's first bytes.
    pub fn encode(&self) -> Result<Vec<u8>, Refusal> {
        let body = postcard::to_stdvec(self).map_err(|e| damaged("a header that encodes", e.to_string()))?;
        if body.len() > HEADER_BYTES_MAX {
            return Err(damaged(format!("a header of at most {HEADER_BYTES_MAX} bytes"), body.len().to_string()));
        }
        let mut out = MAGIC.to_vec();
        out.extend((body.len() as u32).to_le_bytes());
        out.extend(body);
        Ok(out)
    }

    /// The header and its length in the file; none where more bytes are needed.
    fn decode(bytes: &[u8]) -> Result<Option<(BackupHeader, u64)>, Refusal> {
        let known = bytes.len().min(MAGIC.len());
        if bytes.get(..known) != MAGIC.get(..known) {
            return Err(damaged("a backup of format AMBBAK01", "another file or format"));
        }
        let Some((prefix, rest)) = bytes.split_first_chunk::<PREFIX>() else { return Ok(None) };
        let len = prefix.last_chunk::<4>().map_or(0, |len| u32::from_le_bytes(*len)) as usize;
        if len > HEADER_BYTES_MAX {
            return Err(damaged(format!("a header of at most {HEADER_BYTES_MAX} bytes"), len.to_string()));
        }
        let Some(body) = rest.get(..len) else { return Ok(None) };
        match postcard::take_from_bytes::<BackupHeader>(body) {
            Ok((header, [])) if header.lists.len() <= LISTS_MAX => Ok(Some((header, (PREFIX + len) as u64))),
            Ok(_) => Err(damaged("a header as this version writes it", "another")),
            Err(e) => Err(damaged("a readable header", e.to_string())),
        }
    }

    /// Length of what follows the header, without the SHA-256 at the end.
    fn content_bytes(&self) -> Option<u64> {
        self.lists.iter().try_fold(self.snapshot_bytes, |sum, (_, len)| sum.checked_add(*len))
    }
}

/// Reads a backup piece by piece and holds no more of it than its header.
#[derive(Default)]
pub struct BackupCheck {
    head: Vec<u8>,
    header: Option<(BackupHeader, u64)>,
    seen: u64,
    hash: Sha256,
    /// The last bytes so far: at the end they are the file's own SHA-256.
    tail: Vec<u8>,
}

impl BackupCheck {
    /// Takes the next piece.
    pub fn take(&mut self, piece: &[u8]) -> Result<(), Refusal> {
        if self.header.is_none() {
            let room = (PREFIX + HEADER_BYTES_MAX).saturating_sub(self.head.len());
            self.head.extend(piece.iter().take(room));
            self.header = BackupHeader::decode(&self.head)?;
        }
        self.seen += piece.len() as u64;
        self.tail.extend_from_slice(piece);
        let settled = self.tail.len().saturating_sub(SHA256);
        self.hash.update(self.tail.drain(..settled).as_slice());
        Ok(())
    }

    /// What the whole file is of, and where in it the snapshot begins.
    pub fn finish(self) -> Result<(BackupHeader, u64), Refusal> {
        let short = || damaged("a whole backup", format!("a file of {} bytes", self.seen));
        let (header, begins) = self.header.clone().ok_or_else(short)?;
        let bytes = header.content_bytes().and_then(|len| len.checked_add(begins)?.checked_add(SHA256 as u64));
        if bytes != Some(self.seen) {
            let expected = bytes.map_or("sizes that add up".to_owned(), |bytes| format!("{bytes} bytes"));
            return Err(damaged(expected, format!("{} bytes", self.seen)));
        }
        let sha256: [u8; 32] = self.hash.finalize().into();
        if self.tail != sha256 {
            return Err(damaged(format!("SHA-256 {}", hex::encode(&self.tail)), hex::encode(sha256)));
        }
        Ok((header, begins))
    }
}

/// Ends a file: SHA-256 over all that was written before.
#[derive(Default)]
pub struct BackupSeal(Sha256);

impl BackupSeal {
    /// Covers the next piece.
    pub fn cover(&mut self, piece: &[u8]) {
        self.0.update(piece);
    }
    /// The last bytes of the file.
    pub fn finish(self) -> [u8; 32] {
        self.0.finalize().into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> (BackupHeader, Vec<u8>) {
        let header = BackupHeader {
            trust_domain: "west".parse().unwrap(),
            root_sha256: [1; 32],
            epoch: 1,
            index: 77,
            stamp: Stamp(5),
            digest: [2; 32],
            snapshot_bytes: 1000,
            lists: vec![([3; 32], 50), ([4; 32], 0)],
        };
        let mut file = header.encode().unwrap();
        file.extend(vec![9; 1050]);
        let mut seal = BackupSeal::default();
        seal.cover(&file);
        file.extend(seal.finish());
        (header, file)
    }

    fn check(file: &[u8], piece: usize) -> Result<(BackupHeader, u64), Refusal> {
        let mut check = BackupCheck::default();
        for piece in file.chunks(piece) {
            check.take(piece)?;
        }
        check.finish()
    }

    #[test]
    fn a_backup_is_read_in_pieces_of_any_size() {
        let (header, file) = sample();
        for piece in [1, 7, 31, 32, 33, 100, 10_000] {
            let (read, begins) = check(&file, piece).unwrap();
            assert_eq!(read, header);
            assert_eq!(file.len() as u64, begins + 1050 + 32);
        }
    }

    #[test]
    fn every_flipped_byte_every_cut_and_any_more_is_noticed() {
        let (_, file) = sample();
        for at in 0..file.len() {
            let mut bad = file.clone();
            bad[at] ^= 0x04;
            assert_eq!(check(&bad, 64).unwrap_err().code, Code::BackupDamaged, "flip at {at}");
            assert_eq!(check(&file[..at], 64).unwrap_err().code, Code::BackupDamaged, "cut at {at}");
        }
        assert_eq!(check(&[file, vec![0]].concat(), 64).unwrap_err().code, Code::BackupDamaged);
    }
}
