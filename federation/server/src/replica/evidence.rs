//! Evidence bodies: what a verdict was reached on, kept so that it can be asked again, or under another policy.
//!
//! A body is a blob whose SHA-256 stands in the log. The whole evidence of an enrolment is one body; a round that saw new
//! IMA entries adds a body that names the one before. A round that saw nothing new adds none.

use super::Replica;
use super::blobs::{BLOB_BYTES_MAX, Keep};
use ambit_model::{Code, NodeId, Refusal};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// First byte of every body.
const VERSION: u8 = 1;
/// Bodies that hang together at most: then the logs are asked for whole again.
pub const CHAIN_MAX: u32 = 64;

/// One body.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Body {
    /// Whose.
    pub node: NodeId,
    /// The body that this one adds to.
    pub before: Option<[u8; 32]>,
    /// Endorsement class of the EK.
    pub ek_class: String,
    /// `sha256` or `sha384`.
    pub bank: String,
    /// TPMT_PUBLIC of the AK.
    pub ak_public: Vec<u8>,
    /// TPMS_ATTEST.
    pub quote: Vec<u8>,
    /// TPMT_SIGNATURE.
    pub signature: Vec<u8>,
    /// As quoted.
    pub pcrs: BTreeMap<u32, Vec<u8>>,
    /// The whole boot log; empty in a body that adds to another.
    pub boot_log: Vec<u8>,
    /// Where `ima_log` begins.
    pub ima_offset: u64,
    /// The IMA log from there.
    pub ima_log: Vec<u8>,
}

impl Body {
    /// Bytes at the beginning that say whose it is: the version, and the node as it stands.
    pub const NODE_WITHIN: usize = 33;

    /// Whose evidence these bytes (at least the first [`Body::NODE_WITHIN`]) are.
    pub fn node_of(bytes: &[u8]) -> Result<NodeId, Refusal> {
        let found = match bytes.split_first() {
            Some((&VERSION, rest)) => rest.first_chunk::<32>().ok_or_else(|| format!("{} bytes", bytes.len())),
            Some((v, _)) => Err(format!("version {v}")),
            None => Err("nothing".into()),
        };
        found.map(|id| NodeId(*id)).map_err(|found| Refusal::new(Code::BadRequest, "evidence of a node", found))
    }

    /// Drops what lies beyond byte `end` of the whole IMA log: the quote covers nothing of it.
    pub fn cut(&mut self, end: u64) {
        let covered = usize::try_from(end.saturating_sub(self.ima_offset)).unwrap_or(usize::MAX);
        self.ima_log.truncate(covered);
    }

    /// As bytes to store.
    pub fn encode(&self) -> Result<Vec<u8>, Refusal> {
        postcard::to_extend(self, vec![VERSION])
            .map_err(|e| Refusal::new(Code::Internal, "evidence that encodes", e.to_string()))
    }
    fn decode(bytes: &[u8]) -> Result<Body, Refusal> {
        let bad = |found: String| Refusal::new(Code::BlobMissing, "readable evidence", found);
        match bytes.split_first() {
            Some((&VERSION, rest)) => postcard::from_bytes(rest).map_err(|e| bad(e.to_string())),
            Some((v, _)) => Err(bad(format!("version {v}"))),
            None => Err(bad("nothing".into())),
        }
    }
}

impl Replica {
    /// Stores a body here and, in the background, at the other replicas. Returns its name in any case: what cannot be
    /// kept (too large, no disk) is told, and the verdict stands without it.
    pub async fn keep_evidence(&self, body: &Body) -> Result<[u8; 32], Refusal> {
        use sha2::{Digest as _, Sha256};
        let bytes = body.encode()?;
        let sha256 = Sha256::digest(&bytes).into();
        if bytes.len() > BLOB_BYTES_MAX {
            tracing::warn!(node = %body.node, bytes = bytes.len(), "evidence too large to keep");
            return Ok(sha256);
        }
        let this = self.clone();
        let node = body.node;
        self.background(async move {
            if let Err(refusal) = this.put_blob(Keep::Evidence, bytes).await {
                tracing::warn!(%node, %refusal, "evidence not kept");
            }
        });
        Ok(sha256)
    }

    /// The whole evidence under this name: the last body with boot log and IMA log put together.
    pub async fn evidence(&self, sha256: &[u8; 32]) -> Result<Body, Refusal> {
        let newest = Body::decode(&self.find_blob(sha256).await?)?;
        let (mut logs, mut before) = (vec![(newest.ima_offset, newest.ima_log.clone())], newest.before);
        let mut boot_log = newest.boot_log.clone();
        let broken = || Refusal::new(Code::BlobMissing, "evidence back to the whole logs", "a part that fits nowhere");
        for _ in 0..=CHAIN_MAX {
            let Some(sha256) = before else { break };
            let body = Body::decode(&self.find_blob(&sha256).await?)?;
            if body.node != newest.node {
                return Err(broken());
            }
            boot_log = body.boot_log;
            logs.push((body.ima_offset, body.ima_log));
            before = body.before;
        }
        let mut ima_log: Vec<u8> = Vec::new();
        for (offset, part) in logs.into_iter().rev() {
            // What an earlier body read beyond its quote comes again in the next one.
            let at = usize::try_from(offset).ok().filter(|at| *at <= ima_log.len()).ok_or_else(broken)?;
            ima_log.truncate(at);
            ima_log.extend(part);
        }
        Ok(Body { boot_log, ima_offset: 0, ima_log, before: None, ..newest })
    }
}
