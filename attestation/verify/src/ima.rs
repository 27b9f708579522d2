//! The IMA log: `binary_runtime_measurements` of Linux, replayed to the quoted PCR 10.
//!
//! The log grows while a node attests, so a log longer than the quote is accepted: some prefix of it must lead to the
//! quoted value, and only that prefix counts.

use crate::IMA_PCR;
use crate::chain::Denial;
use crate::hash::{Bank, HashAlg};
use crate::wire::{Malformed, Reader};
use ambit_model::{Code, Refusal};

/// A template's name; the kernel's longest is `ima-sigv2`.
const NAME_BYTES_MAX: usize = 32;
/// One entry's template data: a path, a signature, or a measured buffer such as a key ring.
const DATA_BYTES_MAX: usize = 1024 * 1024;
/// Fields of one template; the kernel's limit is 15.
const FIELDS_MAX: usize = 15;

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

/// One entry.
struct Entry<'a> {
    /// SHA-1 of `data`, or zeros for a violation.
    template_hash: [u8; 20],
    data: &'a [u8],
}

impl Entry<'_> {
    fn violation(&self) -> bool {
        self.template_hash == [0; 20]
    }
}

/// A running PCR 10 for one form of extending it.
struct Running {
    form: ImaForm,
    value: Vec<u8>,
}

impl Running {
    fn extend(&mut self, hash: HashAlg, entry: &Entry<'_>) {
        let digest = if entry.violation() {
            vec![0xff; hash.size()]
        } else if self.form == ImaForm::Native {
            hash.digest(&[entry.data])
        } else {
            let mut padded = entry.template_hash.to_vec();
            padded.resize(hash.size(), 0);
            padded
        };
        self.value = hash.digest(&[&self.value, &digest]);
    }
}

/// Judges a log that begins at the machine's start against the quoted PCR 10 of `bank`.
pub(crate) fn judge(log: &[u8], bank: Bank, quoted: &[u8]) -> Result<ImaFacts, Denial> {
    replay(log, bank.hash(), quoted)
}

fn replay(log: &[u8], hash: HashAlg, quoted: &[u8]) -> Result<ImaFacts, Denial> {
    let start = vec![0; hash.size()];
    if log.is_empty() && quoted == start {
        return Ok(ImaFacts::default());
    }
    let forms: &[ImaForm] = if matches!(hash, HashAlg::Sha1 | HashAlg::Sha256) {
        &[ImaForm::Native]
    } else {
        &[ImaForm::Native, ImaForm::PaddedSha1]
    };
    let mut running: Vec<Running> = forms.iter().map(|form| Running { form: *form, value: start.clone() }).collect();
    let malformed = |e: Malformed| e.refuse(Code::ImaLogMalformed, "IMA binary log");
    let mut r = Reader::new(log);
    let (mut entries, mut violations) = (0usize, 0usize);
    while r.remaining() > 0 {
        let entry = read_entry(&mut r).map_err(malformed)?;
        entries = entries.saturating_add(1);
        if entry.violation() {
            violations = violations.saturating_add(1);
        } else if HashAlg::Sha1.digest(&[entry.data]) != entry.template_hash {
            let place = format!("IMA entry {entries}");
            let expected = format!("{place}: data whose template hash is {}", hex::encode(entry.template_hash));
            let found = hex::encode(HashAlg::Sha1.digest(&[entry.data]));
            return Err(Denial::at(Refusal::new(Code::ImaLogMismatch, expected, found), place));
        }
        for form in &mut running {
            form.extend(hash, &entry);
            if form.value == quoted {
                return Ok(ImaFacts { entries, bytes: r.at() as u64, violations, form: form.form });
            }
        }
    }
    let found = running.first().map(|f| hex::encode(&f.value)).unwrap_or_default();
    let expected = format!("a prefix of the log that leads to PCR 10 {hash} {}", hex::encode(quoted));
    let refusal = Refusal::new(Code::ImaLogMismatch, expected, format!("{entries} entries that lead to {found}"));
    Err(Denial::at(refusal, "PCR 10"))
}

/// Linux `security/integrity/ima/ima_fs.c`, ima_measurements_show: PCR, template hash, name, data; little-endian.
fn read_entry<'a>(r: &mut Reader<'a>) -> Result<Entry<'a>, Malformed> {
    let at = r.at();
    if r.u32_le("IMA entry's PCR")? != IMA_PCR {
        return Err(Malformed::new("IMA entry's PCR", at));
    }
    let template_hash = r.array("IMA template hash")?;
    let name = r.sized_le(NAME_BYTES_MAX, "IMA template name")?;
    // The first template, plain `ima`, gives its data no length: nothing after it could be trusted to be framed.
    if name == b"ima" || name.is_empty() || !name.iter().all(|b| b.is_ascii_graphic()) {
        return Err(Malformed::new("IMA template name", at));
    }
    let data = r.sized_le(DATA_BYTES_MAX, "IMA template data")?;
    let mut fields = Reader::new(data);
    let mut count = 0usize;
    while fields.remaining() > 0 {
        count = count.saturating_add(1);
        if count > FIELDS_MAX || fields.sized_le(DATA_BYTES_MAX, "IMA field").is_err() {
            return Err(Malformed::new("IMA field", at));
        }
    }
    // ima-ng and its kin begin with a digest and a name.
    if count < 2 {
        return Err(Malformed::new("IMA template data: too few fields", at));
    }
    Ok(Entry { template_hash, data })
}

#[cfg(test)]
mod tests;
