//! What one entry of the log says: who did what to what, and what came of it.
//!
//! One event, one record, as JSON of one form (keys in this order, no spaces): what decodes is encoded to the same bytes.
//! Redaction is by construction: names, numbers and hashes are recorded; no token, key, certificate, evidence, document,
//! nor any free text of people (notes of changes are left out, as are what a denial expected and found).

use crate::tile::ENTRY_BYTES_MAX;
use ambit_model::{Code, Refusal};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Characters of an object or a fact; the longest name is a SPIFFE ID (2,048 bytes).
const TEXT_CHARS_MAX: usize = 2_048;
/// Facts of a record.
const FACTS_MAX: usize = 12;

/// One event.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// Of this form: 1.
    pub v: u8,
    /// The cell's incarnation.
    pub epoch: u64,
    /// Index of the entry of the Raft log that caused it.
    pub index: u64,
    /// Position among the records of that entry.
    pub at: u32,
    /// The entry's time, ms since the Unix epoch.
    pub stamp_ms: u64,
    /// Who: a SPIFFE ID; `cell` for what time alone brought about; `sha256:` and the hash of its name for one that the cell
    /// cannot name.
    pub actor: String,
    /// What, as `object.verb`.
    pub act: String,
    /// To what.
    pub object: String,
    /// `done` or `refused`.
    pub outcome: Outcome,
    /// Why it was refused, or what a denial says.
    #[serde(skip_serializing_if = "String::is_empty", default)]
    pub code: String,
    /// Further facts by name.
    #[serde(skip_serializing_if = "BTreeMap::is_empty", default)]
    pub facts: BTreeMap<String, String>,
}

/// What came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// It was done.
    Done,
    /// It was refused, for the code.
    Refused,
}

impl Outcome {
    /// As it is written.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::Refused => "refused",
        }
    }
}

fn cut(text: &mut String) {
    if let Some((end, _)) = text.char_indices().nth(TEXT_CHARS_MAX) {
        text.truncate(end);
    }
}

impl Record {
    /// Its bytes, within bounds: texts are cut, and facts beyond the twelfth left out.
    pub fn encode(mut self) -> Vec<u8> {
        for text in [&mut self.actor, &mut self.act, &mut self.object, &mut self.code] {
            cut(text);
        }
        while self.facts.len() > FACTS_MAX {
            self.facts.pop_last();
        }
        self.facts.values_mut().for_each(cut);
        let mut bytes = Vec::with_capacity(512);
        // Strings, numbers and a map with string keys always encode.
        let _ = serde_json::to_writer(&mut bytes, &self);
        if bytes.len() > ENTRY_BYTES_MAX {
            // Escapes make a byte six at most: only facts can be so many.
            self.facts.clear();
            bytes.clear();
            let _ = serde_json::to_writer(&mut bytes, &self);
        }
        bytes
    }
    /// Strict: the bytes are what [`Record::encode`] makes of it.
    ///
    /// # Errors
    /// [`Code::AuditMismatch`].
    pub fn decode(bytes: &[u8]) -> Result<Self, Refusal> {
        let bad = |found: String| Refusal::new(Code::AuditMismatch, "an audit record of form 1", found);
        let record: Self = serde_json::from_slice(bytes).map_err(|e| bad(e.to_string()))?;
        if record.v != 1 || record.clone().encode() != bytes {
            return Err(bad("another form".to_owned()));
        }
        Ok(record)
    }
}
