//! The IMA log: `binary_runtime_measurements` of Linux, replayed to the quoted PCR 10.
//!
//! The log grows while a node attests, so a log longer than the quote is accepted: some prefix of it must lead to the
//! quoted value, and only that prefix counts. [`Replay`] takes the log in pieces and holds one entry at a time.

mod entry;
mod replay;

pub use entry::ImaEntry;
pub use replay::{Checkpoint, Replay};

use crate::chain::Denial;
use crate::hash::{Bank, HashAlg};
use ambit_model::{Code, Refusal};

/// How the kernel extended PCR 10 in the bank quoted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ImaForm {
    /// Nothing was measured, or PCR 10 was not quoted.
    #[default]
    Nothing,
    /// With the bank's own digest of the template data.
    Native,
    /// With the SHA-1 template hash, zero-padded: the kernel had no such hash then. As weak as SHA-1.
    PaddedSha1,
}

impl ImaForm {
    /// `nothing`, `native` or `padded_sha1`.
    pub fn as_str(self) -> &'static str {
        match self {
            ImaForm::Nothing => "nothing",
            ImaForm::Native => "native",
            ImaForm::PaddedSha1 => "padded_sha1",
        }
    }

    /// The form with this name.
    pub fn from_text(s: &str) -> Option<ImaForm> {
        [ImaForm::Nothing, ImaForm::Native, ImaForm::PaddedSha1].into_iter().find(|f| f.as_str() == s)
    }
}

/// What the part of the IMA log that the quote covers says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImaFacts {
    /// Entries that the quote covers.
    pub entries: usize,
    /// Bytes of the log that the quote covers.
    pub bytes: u64,
    /// Entries of those that record a violation (a file opened for writing while measured).
    pub violations: usize,
    /// How they were extended.
    pub form: ImaForm,
}

/// Judges a log that begins at the machine's start against the quoted PCR 10 of `bank`.
pub(crate) fn judge(log: &[u8], bank: Bank, quoted: &[u8]) -> Result<ImaFacts, Denial> {
    judge_each(log, bank.hash(), quoted, &mut |_| {})
}

/// The same, showing each entry that the quote covers.
pub(crate) fn judge_each(
    log: &[u8],
    hash: HashAlg,
    quoted: &[u8],
    each: &mut dyn FnMut(&ImaEntry<'_>),
) -> Result<ImaFacts, Denial> {
    let start = Checkpoint::start(hash);
    // A log of which nothing was ever extended is not explained by the empty prefix.
    if !log.is_empty() && quoted == start.pcr {
        let expected = "a PCR 10 that the log leads to";
        return Err(Denial::at(Refusal::new(Code::ImaLogMismatch, expected, "PCR 10 never extended"), "PCR 10"));
    }
    let mut replay = Replay::resume(hash, quoted, start);
    replay.push(log, each)?;
    let (end, violations) = replay.finish()?;
    Ok(ImaFacts {
        entries: usize::try_from(end.entries).unwrap_or(usize::MAX),
        bytes: end.offset,
        violations,
        form: end.form,
    })
}

#[cfg(test)]
mod tests;
