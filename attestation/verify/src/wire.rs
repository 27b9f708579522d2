//! A bounded reader over bytes from a stranger. Every read is checked; nothing is allocated by an unchecked length.

use ambit_model::{Code, Refusal};

/// Why bytes could not be read: which field, and where it began.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} at byte {at}")]
pub(crate) struct Malformed {
    pub(crate) what: &'static str,
    pub(crate) at: usize,
}

impl Malformed {
    pub(crate) fn new(what: &'static str, at: usize) -> Self {
        Self { what, at }
    }

    /// This as a refusal of `code`, naming the structure that was being read.
    pub(crate) fn refuse(self, code: Code, structure: &str) -> Refusal {
        Refusal::new(code, format!("a well-formed {structure}"), self.to_string())
    }
}

pub(crate) struct Reader<'a> {
    all: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    pub(crate) fn new(all: &'a [u8]) -> Self {
        Self { all, at: 0 }
    }

    pub(crate) fn at(&self) -> usize {
        self.at
    }

    pub(crate) fn remaining(&self) -> usize {
        self.all.len().saturating_sub(self.at)
    }

    pub(crate) fn take(&mut self, n: usize, what: &'static str) -> Result<&'a [u8], Malformed> {
        let end = self.at.checked_add(n).ok_or(Malformed::new(what, self.at))?;
        let out = self.all.get(self.at..end).ok_or(Malformed::new(what, self.at))?;
        self.at = end;
        Ok(out)
    }

    pub(crate) fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], Malformed> {
        let at = self.at;
        self.take(N, what)?.try_into().map_err(|_| Malformed::new(what, at))
    }

    pub(crate) fn u8(&mut self, what: &'static str) -> Result<u8, Malformed> {
        Ok(u8::from_be_bytes(self.array(what)?))
    }
    pub(crate) fn u16(&mut self, what: &'static str) -> Result<u16, Malformed> {
        Ok(u16::from_be_bytes(self.array(what)?))
    }
    pub(crate) fn u32(&mut self, what: &'static str) -> Result<u32, Malformed> {
        Ok(u32::from_be_bytes(self.array(what)?))
    }
    pub(crate) fn u64(&mut self, what: &'static str) -> Result<u64, Malformed> {
        Ok(u64::from_be_bytes(self.array(what)?))
    }
    /// Little-endian, as in event logs.
    pub(crate) fn u16_le(&mut self, what: &'static str) -> Result<u16, Malformed> {
        Ok(u16::from_le_bytes(self.array(what)?))
    }
    /// Little-endian, as in event logs.
    pub(crate) fn u32_le(&mut self, what: &'static str) -> Result<u32, Malformed> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }
    /// Little-endian, as in event logs.
    pub(crate) fn u64_le(&mut self, what: &'static str) -> Result<u64, Malformed> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    /// A `TPM2B`: a 16-bit size, at most `max`, then that many bytes.
    pub(crate) fn tpm2b(&mut self, max: usize, what: &'static str) -> Result<&'a [u8], Malformed> {
        let at = self.at;
        let n = usize::from(self.u16(what)?);
        if n > max {
            return Err(Malformed::new(what, at));
        }
        self.take(n, what)
    }

    /// A little-endian 32-bit size, at most `max`, then that many bytes.
    pub(crate) fn sized_le(&mut self, max: usize, what: &'static str) -> Result<&'a [u8], Malformed> {
        let at = self.at;
        let n = usize::try_from(self.u32_le(what)?).map_err(|_| Malformed::new(what, at))?;
        if n > max {
            return Err(Malformed::new(what, at));
        }
        self.take(n, what)
    }

    /// Nothing may follow.
    pub(crate) fn end(&self, what: &'static str) -> Result<(), Malformed> {
        if self.remaining() == 0 { Ok(()) } else { Err(Malformed::new(what, self.at)) }
    }
}

/// Appends a `TPM2B`; none if `bytes` does not fit a 16-bit size.
pub(crate) fn put_tpm2b(out: &mut Vec<u8>, bytes: &[u8]) -> Option<()> {
    out.extend_from_slice(&u16::try_from(bytes.len()).ok()?.to_be_bytes());
    out.extend_from_slice(bytes);
    Some(())
}
