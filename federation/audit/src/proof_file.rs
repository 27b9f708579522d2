//! A proof that stands alone: C2SP tlog-proof.

use crate::note::Note;
use crate::tree::Hash;
use ambit_model::{Code, Refusal};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

const HEAD: &str = "c2sp.org/tlog-proof@v1";

/// That the entry at `index` is in the tree of the note.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProofFile {
    /// Which entry.
    pub index: u64,
    /// As of [`crate::inclusion`].
    pub path: Vec<Hash>,
    /// The head.
    pub note: Note,
}

impl ProofFile {
    /// Its text.
    pub fn text(&self) -> String {
        let path: String = self.path.iter().map(|hash| format!("{}\n", STANDARD.encode(hash))).collect();
        format!("{HEAD}\nindex {}\n{path}\n{}", self.index, self.note.text())
    }
    /// Strict: what is printed again is what was read.
    ///
    /// # Errors
    /// [`Code::AuditMismatch`].
    pub fn parse(text: &str) -> Result<Self, Refusal> {
        let bad = |found: &str| Refusal::new(Code::AuditMismatch, "a proof (C2SP tlog-proof)", found);
        let (head, note) = text.split_once("\n\n").ok_or_else(|| bad("no blank line"))?;
        let mut lines = head.lines();
        let index = match (lines.next(), lines.next().and_then(|line| line.strip_prefix("index "))) {
            (Some(HEAD), Some(index)) => index.parse().map_err(|_| bad("another index"))?,
            _ => return Err(bad("another head")),
        };
        let hash = |line: &str| STANDARD.decode(line).ok().and_then(|hash| hash.try_into().ok());
        let path: Option<Vec<Hash>> = lines.map(hash).collect();
        let path = path.filter(|path| path.len() <= 63).ok_or_else(|| bad("lines that are no hashes"))?;
        let file = Self { index, path, note: Note::parse(note)? };
        if file.text() == text { Ok(file) } else { Err(bad("another form")) }
    }
}
