//! Backups: written to a stream by a running replica, read whole by `ambitd restore`. The format is `ambit_model::backup`.

use super::Replica;
use super::policies::lists_of;
use crate::raft::rebase::Whole;
use crate::store::snapshot;
use ambit_identity::fingerprint;
use ambit_model::appraisal::AppraisalPolicy;
use ambit_model::backup::{BackupCheck, BackupHeader, BackupSeal, LISTS_MAX};
use ambit_model::{Code, Refusal, TrustDomain};
use ambit_proto::status::to_status;
use ambit_proto::v1;
use ambit_proto::v1::backup_piece::Part;
use ambit_state::State;
use bytes::Bytes;
use sha2::{Digest, Sha256};
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::sync::mpsc;
use tonic::Status;

/// A reader that takes no piece for so long is gone.
const STALL_MAX: Duration = Duration::from_secs(30);
/// Read and sent at once.
const CHUNK_BYTES: usize = 256 * 1024;

/// A backup about to be sent: its snapshot was read back and is the state it says.
pub struct Prepared {
    /// What it is of.
    pub header: BackupHeader,
    /// Allow-lists that policies name and no replica has.
    pub missing: Vec<[u8; 32]>,
    snapshot: Bytes,
    replica: Replica,
}

impl Replica {
    /// A snapshot that holds every write acknowledged before the call, checked as it lies on the disk.
    pub async fn prepare_backup(&self) -> Result<Prepared, Refusal> {
        self.cell().read_barrier().await?;
        let (index, _) = self.cell().snapshot_now().await?;
        let path = self.inner.data_dir.join("snapshot").join("current.snapshot");
        let read = tokio::task::spawn_blocking(move || read_back(&path)).await;
        let read = read.map_err(|e| Refusal::new(Code::Internal, "a snapshot read back", e.to_string()))?;
        let (bytes, whole) = read?;
        if whole.state.applied() < index {
            let found = format!("one of {}", whole.state.applied());
            return Err(Refusal::new(Code::Internal, format!("a snapshot of {index} or later"), found));
        }
        let (mut lists, mut missing) = (Vec::new(), Vec::new());
        for sha256 in lists_named(&whole.state) {
            match self.find_blob(&sha256).await {
                Ok(list) if lists.len() < LISTS_MAX => lists.push((sha256, list.len() as u64)),
                Ok(_) | Err(_) => missing.push(sha256),
            }
        }
        let cell =
            whole.state.cell().ok_or_else(|| Refusal::new(Code::Unavailable, "a founded cell", "an empty one"))?;
        let header = BackupHeader {
            trust_domain: cell.trust_domain.clone(),
            root_sha256: fingerprint(&cell.root_der),
            epoch: cell.epoch,
            index: whole.state.applied().0,
            stamp: whole.state.stamp(),
            digest: whole.state.digest(),
            snapshot_bytes: bytes.len() as u64,
            lists,
        };
        Ok(Prepared { header, missing, snapshot: bytes, replica: self.clone() })
    }
}

fn read_back(path: &Path) -> Result<(Bytes, Whole), Refusal> {
    let damaged = |found: String| Refusal::new(Code::StoreDamaged, "a snapshot that reads back whole", found);
    let bytes = std::fs::read(path).map_err(|e| damaged(e.to_string()))?;
    let whole = snapshot::decode(&bytes).and_then(Whole::of).map_err(|e| damaged(e.to_string()))?;
    Ok((bytes.into(), whole))
}

/// SHA-256 of the allow-lists that policies of this state name, each once.
fn lists_named(s: &State) -> BTreeSet<[u8; 32]> {
    let versions = s.appraisal_policies().flat_map(|(_, r)| [Some(&r.current), r.previous.as_ref()]);
    let policies = versions.flatten().filter_map(|v| AppraisalPolicy::decode(&v.canonical).ok());
    policies.flat_map(|p| lists_of(&p)).collect()
}

type Pieces = mpsc::Sender<Result<v1::BackupPiece, Status>>;

impl Prepared {
    /// Facts, then the file in pieces. Ends with the stream: a reader that went away, or takes nothing, is not waited for.
    pub async fn send(self, pieces: &Pieces) {
        // Whether all of it was taken matters to nobody here: a reader that has not all of it knows by the seal.
        if let Err(refusal) = self.parts(pieces).await {
            drop(pieces.send_timeout(Err(to_status(&refusal)), STALL_MAX).await);
        }
    }

    /// Whether all of it was taken.
    async fn parts(self, pieces: &Pieces) -> Result<bool, Refusal> {
        let facts = v1::BackupFacts {
            index: self.header.index,
            digest: self.header.digest.to_vec(),
            epoch: self.header.epoch,
            stamp_ms: self.header.stamp.0,
            lists: self.header.lists.len() as u32,
            lists_missing: self.missing.len() as u32,
        };
        let mut seal = BackupSeal::default();
        if !give(pieces, Part::Facts(facts)).await
            || !give_all(pieces, self.header.encode()?.into(), &mut seal).await
            || !give_all(pieces, self.snapshot, &mut seal).await
        {
            return Ok(false);
        }
        for (sha256, _) in &self.header.lists {
            // It was here a moment ago; whoever checks the file refuses another length than announced.
            if !give_all(pieces, self.replica.find_blob(sha256).await?.into(), &mut seal).await {
                return Ok(false);
            }
        }
        Ok(give(pieces, Part::Bytes(seal.finish().to_vec())).await)
    }
}

async fn give_all(pieces: &Pieces, mut bytes: Bytes, seal: &mut BackupSeal) -> bool {
    seal.cover(&bytes);
    while !bytes.is_empty() {
        let piece = bytes.split_to(bytes.len().min(CHUNK_BYTES));
        if !give(pieces, Part::Bytes(piece.to_vec())).await {
            return false;
        }
    }
    true
}

async fn give(pieces: &Pieces, part: Part) -> bool {
    pieces.send_timeout(Ok(v1::BackupPiece { part: Some(part) }), STALL_MAX).await.is_ok()
}

/// A backup as `ambitd restore` reads it: checked from end to end, and of the cell that was pinned.
pub struct Backup {
    /// What it says it is of.
    pub header: BackupHeader,
    /// What is in it.
    pub whole: Whole,
    /// Allow-lists that its policies name and it does not hold.
    pub missing: Vec<[u8; 32]>,
    path: PathBuf,
    lists_begin: u64,
}

impl Backup {
    /// Reads it. Errors: `backup_damaged`; `fingerprint_mismatch` for another cell's.
    pub fn open(path: &Path, td: &TrustDomain, root_sha256: &[u8; 32]) -> Result<Backup, Refusal> {
        let (header, begins) = check(path)?;
        of_cell(&header.trust_domain, &header.root_sha256, td, root_sha256)?;
        let len = usize::try_from(header.snapshot_bytes).unwrap_or(usize::MAX);
        if len > snapshot::SNAPSHOT_BYTES_MAX {
            let expected = format!("a snapshot of at most {} bytes", snapshot::SNAPSHOT_BYTES_MAX);
            return Err(Refusal::new(Code::BackupDamaged, expected, len.to_string()));
        }
        let bytes = part(path, begins, len)?;
        let damaged = |found: String| Refusal::new(Code::BackupDamaged, "a whole snapshot of the state it says", found);
        let whole = snapshot::decode(&bytes).and_then(Whole::of).map_err(|e| damaged(e.to_string()))?;
        if whole.state.digest() != header.digest || whole.state.applied().0 != header.index {
            let (index, digest) = (whole.state.applied(), hex::encode(whole.state.digest()));
            return Err(damaged(format!("index {index}, digest {digest}")));
        }
        // The header is a label; this is what is in it.
        let cell = whole.state.cell().ok_or_else(|| damaged("an empty cell".into()))?;
        of_cell(&cell.trust_domain, &fingerprint(&cell.root_der), td, root_sha256)?;
        let held: BTreeSet<[u8; 32]> = header.lists.iter().map(|(sha256, _)| *sha256).collect();
        let missing = lists_named(&whole.state).difference(&held).copied().collect();
        let lists_begin = begins + header.snapshot_bytes;
        Ok(Backup { header, whole, missing, path: path.to_owned(), lists_begin })
    }

    /// Each allow-list in it, one at a time.
    pub fn lists(&self, mut take: impl FnMut(Vec<u8>) -> Result<(), Refusal>) -> Result<(), Refusal> {
        let mut at = self.lists_begin;
        for (sha256, len) in &self.header.lists {
            let len_here = usize::try_from(*len).unwrap_or(usize::MAX);
            if len_here > super::blobs::BLOB_BYTES_MAX {
                let expected = format!("an allow-list of at most {} bytes", super::blobs::BLOB_BYTES_MAX);
                return Err(Refusal::new(Code::BackupDamaged, expected, len.to_string()));
            }
            let bytes = part(&self.path, at, len_here)?;
            let found: [u8; 32] = Sha256::digest(&bytes).into();
            if found != *sha256 {
                return Err(Refusal::new(Code::BackupDamaged, hex::encode(sha256), hex::encode(found)));
            }
            take(bytes)?;
            at += len;
        }
        Ok(())
    }
}

fn of_cell(td: &TrustDomain, print: &[u8; 32], pinned: &TrustDomain, expected: &[u8; 32]) -> Result<(), Refusal> {
    if (td, print) == (pinned, expected) {
        return Ok(());
    }
    let show = |td: &TrustDomain, print: &[u8; 32]| format!("a backup of {td}, root {}", hex::encode(print));
    Err(Refusal::new(Code::FingerprintMismatch, show(pinned, expected), show(td, print)))
}

fn unreadable(path: &Path, e: &std::io::Error) -> Refusal {
    Refusal::new(Code::ConfigInvalid, format!("a readable file {}", path.display()), e.to_string())
}

fn check(path: &Path) -> Result<(BackupHeader, u64), Refusal> {
    let mut file = File::open(path).map_err(|e| unreadable(path, &e))?;
    let (mut check, mut piece) = (BackupCheck::default(), vec![0; CHUNK_BYTES]);
    loop {
        let read = file.read(&mut piece).map_err(|e| unreadable(path, &e))?;
        match piece.get(..read) {
            Some([]) | None => return check.finish(),
            Some(bytes) => check.take(bytes)?,
        }
    }
}

fn part(path: &Path, from: u64, len: usize) -> Result<Vec<u8>, Refusal> {
    let read = || -> std::io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        file.seek(SeekFrom::Start(from))?;
        let mut bytes = vec![0; len];
        file.read_exact(&mut bytes)?;
        Ok(bytes)
    };
    read().map_err(|e| unreadable(path, &e))
}
