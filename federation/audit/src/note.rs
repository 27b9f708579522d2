//! Signed heads: C2SP signed-note, tlog-checkpoint and tlog-cosignature (v1).

use crate::tree::{Hash, SIZE_MAX};
use ambit_model::{Code, Refusal};
use aws_lc_rs::signature::{ED25519, UnparsedPublicKey};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use sha2::{Digest, Sha256};

/// Bytes of a note: a few lines, and as many signatures as a cell has replicas and peers.
const NOTE_BYTES_MAX: usize = 64 * 1024;
/// Signatures of a note.
const SIGNATURES_MAX: usize = 64;

fn bad(expected: impl Into<String>, found: impl Into<String>) -> Refusal {
    Refusal::new(Code::AuditMismatch, expected, found)
}

/// What kind of signature a line holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Of the log: Ed25519 over the text.
    Log,
    /// Of a witness: a time, and Ed25519 over it and the text.
    Witness,
}

impl Kind {
    fn byte(self) -> u8 {
        match self {
            Self::Log => 0x01,
            Self::Witness => 0x04,
        }
    }
}

/// A public key with the name that it signs under.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verifier {
    /// Without spaces and plus signs.
    pub name: String,
    /// What it signs.
    pub kind: Kind,
    /// Ed25519.
    pub key: [u8; 32],
}

impl Verifier {
    /// First four bytes of SHA-256(name, newline, kind, key).
    pub fn id(&self) -> [u8; 4] {
        let mut h = Sha256::new();
        h.update(self.name.as_bytes());
        h.update([b'\n', self.kind.byte()]);
        h.update(self.key);
        let [a, b, c, d, ..]: Hash = h.finalize().into();
        [a, b, c, d]
    }
    /// As tools take it: `name+id+base64(kind || key)`.
    pub fn vkey(&self) -> String {
        let key = STANDARD.encode([&[self.kind.byte()], self.key.as_slice()].concat());
        format!("{}+{}+{key}", self.name, hex::encode(self.id()))
    }
}

/// The head of a log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    /// Which log.
    pub origin: String,
    /// Entries.
    pub size: u64,
    /// Root of the tree.
    pub root: Hash,
}

impl Checkpoint {
    /// The text that is signed.
    pub fn text(&self) -> String {
        format!("{}\n{}\n{}\n", self.origin, self.size, STANDARD.encode(self.root))
    }
    /// What a witness signs at `seconds` since the Unix epoch.
    pub fn cosigned(&self, seconds: u64) -> Vec<u8> {
        format!("cosignature/v1\ntime {seconds}\n{}", self.text()).into_bytes()
    }
    /// Three lines, and nothing else: this log has no extensions.
    fn parse(text: &str) -> Result<Self, Refusal> {
        let wrong =
            || bad("a checkpoint of three lines: origin, size, root", text.chars().take(200).collect::<String>());
        let lines: Vec<&str> = text.strip_suffix('\n').ok_or_else(wrong)?.split('\n').collect();
        let [origin, size, root] = lines.as_slice() else { return Err(wrong()) };
        let root = STANDARD.decode(root).ok().and_then(|root| Hash::try_from(root).ok()).ok_or_else(wrong)?;
        let size = size.parse().ok().filter(|size| *size <= SIZE_MAX).ok_or_else(wrong)?;
        let found = Self { origin: (*origin).to_owned(), size, root };
        if found.text() == text && !origin.is_empty() { Ok(found) } else { Err(wrong()) }
    }
}

/// One signature line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// Whose key.
    pub name: String,
    /// Of the key.
    pub id: [u8; 4],
    /// What follows the id.
    pub signature: Vec<u8>,
}

impl Line {
    /// The log's own.
    pub fn of_log(by: &Verifier, signature: &[u8]) -> Self {
        Self { name: by.name.clone(), id: by.id(), signature: signature.to_vec() }
    }
    /// A witness's, made at `seconds`.
    pub fn of_witness(by: &Verifier, seconds: u64, signature: &[u8]) -> Self {
        let signature = [seconds.to_be_bytes().as_slice(), signature].concat();
        Self { name: by.name.clone(), id: by.id(), signature }
    }
    /// As it stands in a note, with its newline.
    pub fn text(&self) -> String {
        format!("\u{2014} {} {}\n", self.name, STANDARD.encode([&self.id, self.signature.as_slice()].concat()))
    }
    fn parse(line: &str) -> Option<Self> {
        let (name, encoded) = line.strip_prefix("\u{2014} ")?.split_once(' ')?;
        let bytes = STANDARD.decode(encoded).ok()?;
        let (id, signature) = bytes.split_first_chunk::<4>()?;
        let named = !name.is_empty() && !name.contains(['+', ' ']) && !signature.is_empty();
        named.then(|| Self { name: name.to_owned(), id: *id, signature: signature.to_vec() })
    }
}

/// A checkpoint and its signatures, unverified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    /// What is signed.
    pub checkpoint: Checkpoint,
    /// By whom.
    pub lines: Vec<Line>,
}

impl Note {
    /// The whole note.
    pub fn text(&self) -> String {
        let lines: String = self.lines.iter().map(Line::text).collect();
        format!("{}\n{lines}", self.checkpoint.text())
    }
    /// Strict: what is printed again is what was read.
    ///
    /// # Errors
    /// [`Code::AuditMismatch`].
    pub fn parse(text: &str) -> Result<Self, Refusal> {
        let wrong = |found: &str| bad("a signed checkpoint (C2SP tlog-checkpoint)", found);
        if text.len() > NOTE_BYTES_MAX {
            return Err(wrong("more than 64 KiB"));
        }
        let (head, signatures) = text.split_once("\n\n").ok_or_else(|| wrong("no blank line"))?;
        let checkpoint = Checkpoint::parse(&format!("{head}\n"))?;
        let lines: Option<Vec<Line>> = signatures.lines().map(Line::parse).collect();
        let lines = lines.filter(|lines| !lines.is_empty() && lines.len() <= SIGNATURES_MAX);
        let note = Self { checkpoint, lines: lines.ok_or_else(|| wrong("no signature lines, or others"))? };
        if note.text() == text { Ok(note) } else { Err(wrong("another form")) }
    }
    /// The line of this key, if it signed: none where there is none, or where it is not of this text. The time is a witness's.
    pub fn signed_by(&self, by: &Verifier) -> Option<u64> {
        let lines = self.lines.iter().filter(|line| line.name == by.name && line.id == by.id());
        lines.filter_map(|line| verified(&self.checkpoint, by, &line.signature)).next()
    }
}

fn verified(checkpoint: &Checkpoint, by: &Verifier, signature: &[u8]) -> Option<u64> {
    let (seconds, message, signature) = match by.kind {
        Kind::Log => (0, checkpoint.text().into_bytes(), signature),
        Kind::Witness => {
            let (time, signature) = signature.split_first_chunk::<8>()?;
            let seconds = u64::from_be_bytes(*time);
            (seconds, checkpoint.cosigned(seconds), signature)
        }
    };
    UnparsedPublicKey::new(&ED25519, by.key).verify(&message, signature).ok().map(|()| seconds)
}
