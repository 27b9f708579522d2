//! Appraisal policies as YAML: parsed strictly, written canonically, compared and linted.
//!
//! One document `kind: AppraisalPolicy` a file. An unknown field is refused in its place; an absent rule consumes
//! nothing, so that a document says all that it lets pass.

mod diff;
mod lint;
mod read;
mod write;

pub use diff::{Change, diff};
pub use lint::lint;
pub use write::{to_yaml, to_yaml_with};

use ambit_model::{AppraisalPolicy, Code, Refusal};

/// Bytes of one document: longer lists belong into allow-lists.
pub const APPRAISAL_BYTES_MAX: usize = 1 << 20;

/// The policy that `text` writes.
///
/// # Errors
/// [`Code::AppraisalPolicyMalformed`]; `found` starts with `line L column C:` wherever the place is known.
pub fn parse_appraisal(text: &str) -> Result<AppraisalPolicy, Refusal> {
    let malformed =
        |found: String| Refusal::new(Code::AppraisalPolicyMalformed, "one well-formed AppraisalPolicy document", found);
    if text.len() > APPRAISAL_BYTES_MAX {
        return Err(malformed(format!("{} bytes", text.len())));
    }
    crate::parse::refuse_costly_structure(text).map_err(|r| malformed(r.found))?;
    let mut documents = serde_norway::Deserializer::from_str(text);
    let first = documents.next().ok_or_else(|| malformed("no document".to_owned()))?;
    let policy = read::policy(first).map_err(|e| malformed(crate::parse::placed(&e)))?;
    if documents.next().is_some() {
        return Err(malformed("a second document".to_owned()));
    }
    Ok(policy)
}
