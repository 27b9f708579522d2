//! Content-addressed objects beside the log: evidence bodies and IMA allow-lists. Raft keeps their SHA-256 only.
//!
//! A blob is a file named by its SHA-256, whole or absent, checked at each read. It is copied to every other replica; one
//! that lacks it asks the others. Evidence is capped per node, by age and in all ([`stock`]); allow-lists stay while a
//! policy names them.

mod stock;

use super::Replica;
use super::evidence::Body;
use ambit_model::{Code, NodeId, Refusal};
use ambit_proto::status::from_status;
use ambit_proto::v1;
use sha2::{Digest as _, Sha256};
use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};
use stock::{Caps, Piece, Stock};
use tokio_stream::StreamExt;
use tonic::transport::Channel;

/// The largest object: an IMA allow-list of a large distribution, or a boot log with an IMA log.
pub const BLOB_BYTES_MAX: usize = 16 * 1024 * 1024;
/// What one replica keeps of a cell's evidence.
const EVIDENCE: Caps =
    Caps { node_bytes: 64 * 1024 * 1024, all_bytes: 2 * 1024 * 1024 * 1024, age: Duration::from_secs(30 * 24 * 3600) };
/// Pieces on the wire.
const CHUNK_BYTES: usize = 256 * 1024;
/// One copy to or from another replica.
const COPY_MAX: Duration = Duration::from_secs(20);

/// What a blob is kept for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// Capped per node, by age and in all.
    Evidence,
    /// While a policy names it.
    AllowList,
}

/// The folder of blobs.
pub struct Blobs {
    folder: PathBuf,
    evidence: Mutex<Stock>,
    /// To the other replicas, by number, with the address they lead to: a handshake costs more than an enrolment.
    channels: Mutex<BTreeMap<u64, (String, Channel)>>,
}

impl Blobs {
    /// Opens (or makes) the folder. What is no whole blob is removed: another replica has it.
    pub fn open(folder: PathBuf) -> Result<Blobs, Refusal> {
        Blobs::within(folder, EVIDENCE)
    }

    fn within(folder: PathBuf, caps: Caps) -> Result<Blobs, Refusal> {
        for kind in [Keep::Evidence, Keep::AllowList] {
            let dir = folder.join(kind.folder());
            std::fs::create_dir_all(&dir).map_err(|e| trouble(&dir, &e))?;
        }
        let blobs = Blobs { folder, evidence: Mutex::new(Stock::new(caps)), channels: Mutex::default() };
        blobs.index()?;
        Ok(blobs)
    }

    /// Stores `bytes` durably; returns their SHA-256.
    pub fn put(&self, keep: Keep, bytes: &[u8]) -> Result<[u8; 32], Refusal> {
        if bytes.len() > BLOB_BYTES_MAX {
            let expected = format!("an object of at most {BLOB_BYTES_MAX} bytes");
            return Err(Refusal::new(Code::EvidenceTooLarge, expected, bytes.len().to_string()));
        }
        // Before anything is written: evidence of nobody would be under no cap.
        let node = (keep == Keep::Evidence).then(|| Body::node_of(bytes)).transpose()?;
        let sha256: [u8; 32] = Sha256::digest(bytes).into();
        let path = self.path(keep, &sha256);
        if path.exists() {
            return Ok(sha256);
        }
        let unfinished = path.with_extension(format!("new{}", hex::encode(super::random::<8>()?)));
        let written = || -> std::io::Result<()> {
            let mut file = std::fs::File::create(&unfinished)?;
            file.write_all(bytes)?;
            // Evidence lost in a crash is lost evidence of the past, on one replica; a list is needed to judge with.
            if keep == Keep::AllowList {
                file.sync_all()?;
            }
            std::fs::rename(&unfinished, &path)
        };
        written().map_err(|e| trouble(&path, &e))?;
        if let Some(node) = node {
            self.note(node, Piece { sha256, bytes: bytes.len() as u64, since: SystemTime::now() });
        }
        Ok(sha256)
    }

    /// The blob of this SHA-256 on this replica, if it is here and whole.
    pub fn get(&self, sha256: &[u8; 32]) -> Option<Vec<u8>> {
        for keep in [Keep::AllowList, Keep::Evidence] {
            let path = self.path(keep, sha256);
            let Ok(bytes) = std::fs::read(&path) else { continue };
            if <[u8; 32]>::from(Sha256::digest(&bytes)) == *sha256 {
                return Some(bytes);
            }
            tracing::error!(path = %path.display(), "a stored object is damaged: removed");
            let _ = std::fs::remove_file(&path);
        }
        None
    }

    /// Whether an allow-list of this SHA-256 is here.
    pub fn is_list(&self, sha256: &[u8; 32]) -> bool {
        self.path(Keep::AllowList, sha256).exists()
    }

    /// Removes evidence that is too old; called now and then.
    pub fn expire(&self) {
        let gone = self.lock().expire(SystemTime::now());
        self.remove(&gone);
    }

    /// Number and bytes of evidence kept.
    pub fn usage(&self) -> (usize, u64) {
        self.lock().usage()
    }

    fn note(&self, node: NodeId, piece: Piece) {
        let gone = self.lock().add(node, piece);
        self.remove(&gone);
    }

    fn remove(&self, gone: &[[u8; 32]]) {
        for sha256 in gone {
            let _ = std::fs::remove_file(self.path(Keep::Evidence, sha256));
        }
    }

    /// Takes stock of what is there, by age.
    fn index(&self) -> Result<(), Refusal> {
        let dir = self.folder.join(Keep::Evidence.folder());
        let mut by_age = BTreeMap::new();
        for entry in std::fs::read_dir(&dir).map_err(|e| trouble(&dir, &e))?.flatten() {
            let mut sha256 = [0u8; 32];
            let name = entry.file_name();
            let whole = name.to_str().is_some_and(|n| hex::decode_to_slice(n, &mut sha256).is_ok());
            let node = whole.then(|| beginning(&entry.path())).flatten();
            let (Some(node), Ok(meta)) = (node, entry.metadata()) else {
                let _ = std::fs::remove_file(entry.path());
                continue;
            };
            let since = meta.modified().unwrap_or(SystemTime::UNIX_EPOCH);
            by_age.insert((since, sha256), (node, meta.len()));
        }
        for ((since, sha256), (node, bytes)) in by_age {
            self.note(node, Piece { sha256, bytes, since });
        }
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Stock> {
        self.evidence.lock().unwrap_or_else(PoisonError::into_inner)
    }
    fn channels(&self) -> std::sync::MutexGuard<'_, BTreeMap<u64, (String, Channel)>> {
        self.channels.lock().unwrap_or_else(PoisonError::into_inner)
    }
    fn path(&self, keep: Keep, sha256: &[u8; 32]) -> PathBuf {
        self.folder.join(keep.folder()).join(hex::encode(sha256))
    }
}

impl Keep {
    fn folder(self) -> &'static str {
        match self {
            Keep::Evidence => "evidence",
            Keep::AllowList => "lists",
        }
    }
    /// As on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Keep::Evidence => "evidence",
            Keep::AllowList => "allow-list",
        }
    }
    /// See [`Keep::as_str`].
    pub fn from_text(text: &str) -> Option<Keep> {
        [Keep::Evidence, Keep::AllowList].into_iter().find(|k| k.as_str() == text)
    }
}

/// Whose evidence this file is.
fn beginning(path: &Path) -> Option<NodeId> {
    let mut first = [0u8; Body::NODE_WITHIN];
    std::fs::File::open(path).and_then(|mut file| file.read_exact(&mut first)).ok()?;
    Body::node_of(&first).ok()
}

fn trouble(path: &Path, e: &std::io::Error) -> Refusal {
    Refusal::new(Code::Unavailable, format!("a writable {}", path.display()), e.to_string())
}

/// The chunks of a blob: the first says what it is kept for.
pub fn chunks(keep: Keep, bytes: &[u8]) -> Vec<v1::BlobChunk> {
    let first = v1::BlobChunk { bytes: Vec::new(), keep: keep.as_str().to_owned() };
    let rest = bytes.chunks(CHUNK_BYTES).map(|c| v1::BlobChunk { bytes: c.to_vec(), keep: String::new() });
    std::iter::once(first).chain(rest).collect()
}

/// Reads a blob from its chunks.
pub async fn collect(
    mut chunks: impl tokio_stream::Stream<Item = Result<v1::BlobChunk, tonic::Status>> + Unpin,
) -> Result<(Keep, Vec<u8>), Refusal> {
    let (mut keep, mut all) = (None, Vec::new());
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk.map_err(|s| from_status(&s))?;
        if all.len() + chunk.bytes.len() > BLOB_BYTES_MAX {
            let expected = format!("an object of at most {BLOB_BYTES_MAX} bytes");
            return Err(Refusal::new(Code::EvidenceTooLarge, expected, "more"));
        }
        keep = keep.or_else(|| Keep::from_text(&chunk.keep));
        if keep.is_none() {
            break;
        }
        all.extend(chunk.bytes);
    }
    let keep =
        keep.ok_or_else(|| Refusal::new(Code::BadRequest, "allow-list or evidence, in the first chunk", "neither"))?;
    Ok((keep, all))
}

impl Replica {
    /// Stores a blob here and copies it to the other replicas. Returns how many replicas have it, this one included.
    pub async fn put_blob(&self, keep: Keep, bytes: Vec<u8>) -> Result<([u8; 32], usize), Refusal> {
        let this = self.clone();
        let stored = tokio::task::spawn_blocking(move || this.blobs().put(keep, &bytes).map(|sha| (sha, bytes))).await;
        let (sha256, bytes) = stored.map_err(|e| Refusal::new(Code::Internal, "a stored object", e.to_string()))??;
        let others = self.others();
        let copies = others.iter().map(|(id, address)| self.copy_to(*id, address, keep, &bytes));
        let copied = futures::future::join_all(copies).await;
        Ok((sha256, 1 + copied.into_iter().filter(|ok| *ok).count()))
    }

    async fn copy_to(&self, id: u64, address: &str, keep: Keep, bytes: &[u8]) -> bool {
        let copy = async {
            let channel = self.blob_channel(id, address).await?;
            let mut client = v1::appraisal_client::AppraisalClient::new(channel);
            let sent = client.put_blob(tokio_stream::iter(chunks(keep, bytes))).await;
            sent.map(drop).map_err(|s| from_status(&s))
        };
        match tokio::time::timeout(COPY_MAX, copy).await {
            Ok(Ok(())) => true,
            Ok(Err(refusal)) => {
                tracing::debug!(replica = id, %refusal, "object not copied");
                self.blobs().channels().remove(&id);
                false
            }
            Err(_) => {
                self.blobs().channels().remove(&id);
                false
            }
        }
    }

    /// A channel that copies share, until one of them fails on it.
    async fn blob_channel(&self, id: u64, address: &str) -> Result<Channel, Refusal> {
        let open = self.blobs().channels().get(&id).filter(|(at, _)| at == address).map(|(_, channel)| channel.clone());
        if let Some(channel) = open {
            return Ok(channel);
        }
        let channel = self.dial_replica(id, address).await?;
        self.blobs().channels().insert(id, (address.to_owned(), channel.clone()));
        Ok(channel)
    }

    /// The blob, from here or from another replica that has it (then it is kept here too).
    pub async fn find_blob(&self, sha256: &[u8; 32]) -> Result<Vec<u8>, Refusal> {
        if let Some(bytes) = self.blobs().get(sha256) {
            return Ok(bytes);
        }
        for (id, address) in self.others() {
            let ask = async {
                let channel = self.dial_replica(id, &address).await?;
                let mut client = v1::appraisal_client::AppraisalClient::new(channel);
                // Nobody asks on: zero bytes says "only what you have yourself".
                let wanted = v1::BlobRef { sha256: hex::encode(sha256), bytes: 0 };
                let answer = client.get_blob(wanted).await.map_err(|s| from_status(&s))?.into_inner();
                collect(answer).await
            };
            if let Ok(Ok((keep, bytes))) = tokio::time::timeout(COPY_MAX, ask).await
                && <[u8; 32]>::from(Sha256::digest(&bytes)) == *sha256
            {
                self.blobs().put(keep, &bytes)?;
                return Ok(bytes);
            }
        }
        Err(Refusal::new(Code::BlobMissing, format!("object {}", hex::encode(sha256)), "on no replica that answers"))
    }

    /// The other replicas of the cell: number and address.
    pub fn others(&self) -> Vec<(u64, String)> {
        let me = self.id();
        self.local(|s| s.members().filter(|(id, _)| *id != me).map(|(id, m)| (id, m.address.clone())).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(node: u8, ima_log: usize) -> Body {
        Body {
            node: NodeId([node; 32]),
            before: None,
            ek_class: "lab".into(),
            bank: "sha256".into(),
            ak_public: vec![],
            quote: vec![],
            signature: vec![],
            pcrs: BTreeMap::new(),
            boot_log: vec![],
            ima_offset: 0,
            ima_log: vec![0; ima_log],
        }
    }

    #[test]
    fn a_blob_is_whole_or_absent_and_evidence_is_somebodys() {
        let dir = std::env::temp_dir().join(format!("ambit-blobs-{}", std::process::id()));
        let blobs = Blobs::open(dir.clone()).unwrap();
        let bytes = body(7, 100).encode().unwrap();
        let a = blobs.put(Keep::Evidence, &bytes).unwrap();
        let b = blobs.put(Keep::Evidence, &body(8, 100).encode().unwrap()).unwrap();
        let list = blobs.put(Keep::AllowList, b"list").unwrap();
        assert_eq!(blobs.get(&a).unwrap(), bytes);
        assert_eq!(blobs.put(Keep::Evidence, &bytes).unwrap(), a);
        assert_eq!(blobs.usage(), (2, 2 * bytes.len() as u64));
        assert!(blobs.put(Keep::Evidence, &vec![0; BLOB_BYTES_MAX + 1]).is_err());
        assert!(blobs.put(Keep::Evidence, b"nobody's").is_err());
        // Damage is noticed, not served.
        std::fs::write(dir.join("evidence").join(hex::encode(a)), &bytes[1..]).unwrap();
        assert_eq!(blobs.get(&a), None);
        std::fs::write(dir.join("evidence").join("half.new"), b"x").unwrap();
        std::fs::write(dir.join("evidence").join(hex::encode([9; 32])), b"x").unwrap();
        let again = Blobs::open(dir.clone()).unwrap();
        assert_eq!(again.get(&list).unwrap(), b"list");
        assert_eq!(std::fs::read_dir(dir.join("evidence")).unwrap().count(), 1);
        assert_eq!(again.usage(), (1, bytes.len() as u64));
        assert!(again.get(&b).is_some());
        std::fs::remove_dir_all(dir).unwrap();
    }

    /// The node that writes without end loses its own, whoever wrote first, and after a restart it is the same.
    #[test]
    fn no_node_pushes_out_anothers_evidence() {
        let dir = std::env::temp_dir().join(format!("ambit-blobs-cap-{}", std::process::id()));
        let caps = Caps { node_bytes: 64_000, ..EVIDENCE };
        let open = || Blobs::within(dir.clone(), caps).unwrap();
        let blobs = open();
        let quiet = blobs.put(Keep::Evidence, &body(1, 1000).encode().unwrap()).unwrap();
        let loud = |n: usize| blobs.put(Keep::Evidence, &body(2, 15_000 + n).encode().unwrap()).unwrap();
        let loud: Vec<[u8; 32]> = (0..6).map(loud).collect();
        for blobs in [open(), blobs] {
            assert!(blobs.get(&quiet).is_some());
            let kept: Vec<bool> = loud.iter().map(|sha256| blobs.get(sha256).is_some()).collect();
            assert_eq!(kept, [false, false, true, true, true, true], "64,000 bytes hold four of 15,000");
        }
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[tokio::test]
    async fn chunks_carry_kind_and_bytes() {
        for n in [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, 3 * CHUNK_BYTES] {
            let bytes = vec![7u8; n];
            let sent = chunks(Keep::AllowList, &bytes);
            let got = collect(tokio_stream::iter(sent.into_iter().map(Ok))).await.unwrap();
            assert_eq!(got, (Keep::AllowList, bytes));
        }
        assert!(collect(tokio_stream::iter(Vec::new())).await.is_err());
    }
}
