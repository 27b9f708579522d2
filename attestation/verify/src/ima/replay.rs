//! The replay of a log that comes in pieces, from a checkpoint to the quoted value.

use super::ImaForm;
use super::entry::{ImaEntry, RawEntry};
use crate::IMA_LOG_BYTES_MAX;
use crate::chain::Denial;
use crate::hash::HashAlg;
use crate::wire::{Malformed, Reader};
use ambit_model::{Code, Refusal};

/// Bytes added to a cut entry at a time.
const COPY_BYTES: usize = 4096;

/// How far a log was judged, and where its replay stood there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    /// Bytes of the log.
    pub offset: u64,
    /// Entries in those bytes.
    pub entries: u64,
    /// PCR 10 there, in the bank quoted.
    pub pcr: Vec<u8>,
    /// How the entries so far were extended; [`ImaForm::Nothing`] before the first.
    pub form: ImaForm,
}

impl Checkpoint {
    /// The start of a boot's log in the bank of `hash`.
    pub fn start(hash: HashAlg) -> Checkpoint {
        Checkpoint { offset: 0, entries: 0, pcr: vec![0; hash.size()], form: ImaForm::Nothing }
    }
}

/// A running PCR 10 for one form of extending it.
struct Running {
    form: ImaForm,
    value: Vec<u8>,
}

impl Running {
    fn extend(&mut self, hash: HashAlg, entry: &RawEntry<'_>) {
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

/// A replay under way. It ends at the first prefix that leads to the quoted value; what follows is not looked at.
pub struct Replay {
    hash: HashAlg,
    quoted: Vec<u8>,
    from: Checkpoint,
    /// None once the quoted value was reached.
    running: Vec<Running>,
    reached: Option<Checkpoint>,
    /// The beginning of an entry whose end has not come.
    held: Vec<u8>,
    offset: u64,
    entries: u64,
    violations: usize,
}

impl Replay {
    /// A replay from `from` to the quoted PCR 10. A log that has not grown is judged without a byte of it.
    pub fn resume(hash: HashAlg, quoted: &[u8], from: Checkpoint) -> Replay {
        let reached = (from.pcr == quoted).then(|| from.clone());
        // Only a kernel without the bank's hash extends it with padded SHA-1, and every kernel has SHA-256.
        let forms: &[ImaForm] = match (from.form, hash) {
            (ImaForm::Nothing, HashAlg::Sha384 | HashAlg::Sha512) => &[ImaForm::Native, ImaForm::PaddedSha1],
            (ImaForm::PaddedSha1, _) => &[ImaForm::PaddedSha1],
            (ImaForm::Nothing | ImaForm::Native, _) => &[ImaForm::Native],
        };
        let running = forms.iter().map(|form| Running { form: *form, value: from.pcr.clone() }).collect();
        let (offset, entries) = (from.offset, from.entries);
        Replay {
            hash,
            quoted: quoted.to_vec(),
            from,
            running,
            reached,
            held: Vec::new(),
            offset,
            entries,
            violations: 0,
        }
    }

    /// Whether the quoted value was reached: no more bytes are needed.
    pub fn is_reached(&self) -> bool {
        self.reached.is_some()
    }

    /// Takes the next bytes of the log and shows each whole entry to `each`, in order. What was shown counts only after
    /// [`Replay::finish`]: until then nothing proves that it was measured.
    ///
    /// # Errors
    /// [`Code::ImaLogMalformed`]; [`Code::ImaLogMismatch`] for an entry whose own hash is not over its data;
    /// [`Code::EvidenceTooLarge`] beyond 64 MiB after the checkpoint.
    pub fn push(&mut self, mut bytes: &[u8], each: &mut dyn FnMut(&ImaEntry<'_>)) -> Result<(), Denial> {
        // Only an entry that spans pieces is copied.
        while !self.held.is_empty() && !bytes.is_empty() && !self.is_reached() {
            let (now, later) = bytes.split_at_checked(COPY_BYTES).unwrap_or((bytes, &[]));
            let mut held = std::mem::take(&mut self.held);
            held.extend_from_slice(now);
            let used = self.take(&held, each)?;
            if used == 0 {
                // What is held began before these bytes, and no size in it is beyond an entry's: this ends.
                self.held = held;
                bytes = later;
            } else {
                // The entry that was waited for is done; what follows it in these bytes is read where it lies.
                let back = held.len().saturating_sub(used);
                bytes = bytes.get(now.len().saturating_sub(back)..).unwrap_or_default();
            }
        }
        if self.is_reached() {
            self.held.clear();
            return Ok(());
        }
        let used = self.take(bytes, each)?;
        if !self.is_reached() {
            self.held.extend_from_slice(bytes.get(used..).unwrap_or_default());
        }
        Ok(())
    }

    /// The checkpoint that the quote covers, and the violations since the one before.
    ///
    /// # Errors
    /// [`Code::ImaLogMismatch`] if no prefix leads to the quoted value; [`Code::ImaLogMalformed`] if the log ends inside
    /// an entry before that.
    pub fn finish(self) -> Result<(Checkpoint, usize), Denial> {
        if let Some(reached) = self.reached {
            return Ok((reached, self.violations));
        }
        if !self.held.is_empty() {
            let at = usize::try_from(self.offset).unwrap_or(usize::MAX);
            return Err(malformed(self.entries.saturating_add(1), Malformed::new("IMA entry cut short", at)));
        }
        let expected = format!("a prefix of the log that leads to PCR 10 {} {}", self.hash, hex::encode(&self.quoted));
        let led_to = self.running.first().map(|r| hex::encode(&r.value)).unwrap_or_default();
        let since = self.entries.saturating_sub(self.from.entries);
        let found = format!("{since} entries after byte {} that lead to {led_to}", self.from.offset);
        Err(Denial::at(Refusal::new(Code::ImaLogMismatch, expected, found), "PCR 10"))
    }

    /// Replays the whole entries at the beginning of `bytes`; how many bytes they took.
    fn take(&mut self, bytes: &[u8], each: &mut dyn FnMut(&ImaEntry<'_>)) -> Result<usize, Denial> {
        let mut r = Reader::new(bytes);
        let mut used = 0usize;
        while !self.is_reached() && r.remaining() > 0 {
            let at = |e: Malformed| Malformed { at: e.at.saturating_add(self.offset_text(used)), ..e };
            let number = self.entries.saturating_add(1);
            let broken = |e| malformed(number, at(e));
            let Some(entry) = RawEntry::read(&mut r).map_err(broken)? else { break };
            if !entry.whole() {
                let place = format!("IMA entry {number}");
                let expected = format!("{place}: data whose template hash is {}", hex::encode(entry.template_hash));
                let found = hex::encode(HashAlg::Sha1.digest(&[entry.data]));
                return Err(Denial::at(Refusal::new(Code::ImaLogMismatch, expected, found), place));
            }
            let parsed = entry.parse(number).map_err(broken)?;
            for form in &mut self.running {
                form.extend(self.hash, &entry);
            }
            let size = r.at().saturating_sub(used);
            used = r.at();
            self.offset = self.offset.saturating_add(size as u64);
            self.entries = number;
            self.violations = self.violations.saturating_add(usize::from(entry.violation()));
            // Counted from the checkpoint: the log of a node that lives long grows without end.
            if self.offset.saturating_sub(self.from.offset) > IMA_LOG_BYTES_MAX {
                let expected = format!("an IMA log of at most {IMA_LOG_BYTES_MAX} bytes at a time");
                return Err(Refusal::new(Code::EvidenceTooLarge, expected, "more").into());
            }
            each(&parsed);
            if let Some(at) = self.running.iter().find(|r| r.value == self.quoted) {
                let (offset, entries, form) = (self.offset, self.entries, at.form);
                self.reached = Some(Checkpoint { offset, entries, pcr: at.value.clone(), form });
            }
        }
        Ok(used)
    }

    /// Where in the whole log the bytes being read begin, for messages.
    fn offset_text(&self, used: usize) -> usize {
        usize::try_from(self.offset).unwrap_or(usize::MAX).saturating_sub(used)
    }
}

fn malformed(number: u64, e: Malformed) -> Denial {
    Denial::at(e.refuse(Code::ImaLogMalformed, "IMA binary log"), format!("IMA entry {number}"))
}
