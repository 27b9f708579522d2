//! How a change of documents is stored: as it always was, unless it writes egress documents.

use super::DocumentsChange;
use ambit_model::Revision;
use ambit_model::policy::Egress;
use serde::de::{Error as _, SeqAccess, Visitor};
use serde::ser::SerializeStruct as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;

/// `over` begins with a byte: 0 for none, 1 where a revision follows. This is added to it where egress documents follow: a
/// reader of the former form knows no such byte and refuses the command, rather than doing a part of it.
const EGRESS_FOLLOWS: u8 = 16;
const FIELDS: &[&str] = &["policies", "services", "groups", "delete", "by", "note", "over", "revision", "egress"];

impl Serialize for DocumentsChange {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut out = serializer.serialize_struct("DocumentsChange", FIELDS.len())?;
        out.serialize_field("policies", &self.policies)?;
        out.serialize_field("services", &self.services)?;
        out.serialize_field("groups", &self.groups)?;
        out.serialize_field("delete", &self.delete)?;
        out.serialize_field("by", &self.by)?;
        out.serialize_field("note", &self.note)?;
        let follows = if self.egress.is_empty() { 0 } else { EGRESS_FOLLOWS };
        out.serialize_field("over", &(u8::from(self.over.is_some()) + follows))?;
        if let Some(revision) = &self.over {
            out.serialize_field("revision", revision)?;
        }
        if follows != 0 {
            out.serialize_field("egress", &self.egress)?;
        }
        out.end()
    }
}

impl<'de> Deserialize<'de> for DocumentsChange {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_struct("DocumentsChange", FIELDS, Stored)
    }
}

struct Stored;

impl<'de> Visitor<'de> for Stored {
    type Value = DocumentsChange;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a change of documents as it is stored")
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<DocumentsChange, A::Error> {
        let (policies, services, groups) = (next(&mut seq, 0)?, next(&mut seq, 1)?, next(&mut seq, 2)?);
        let (delete, by, note) = (next(&mut seq, 3)?, next(&mut seq, 4)?, next(&mut seq, 5)?);
        let byte = next::<u8, A>(&mut seq, 6)?;
        let follows = byte >= EGRESS_FOLLOWS;
        let over = match if follows { byte - EGRESS_FOLLOWS } else { byte } {
            0 => None,
            1 => Some(next::<Revision, A>(&mut seq, 7)?),
            other => return Err(A::Error::custom(format!("a change over {other}"))),
        };
        let egress = if follows { next::<Vec<Egress>, A>(&mut seq, 8)? } else { Vec::new() };
        if follows && egress.is_empty() {
            return Err(A::Error::custom("a change that says of egress and has none"));
        }
        Ok(DocumentsChange { policies, services, groups, delete, by, note, over, egress })
    }
}

fn next<'de, T: Deserialize<'de>, A: SeqAccess<'de>>(seq: &mut A, at: usize) -> Result<T, A::Error> {
    seq.next_element()?.ok_or_else(|| A::Error::invalid_length(at, &"a change of documents as it is stored"))
}
