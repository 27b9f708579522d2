//! IMA records: how they are written, read and extended (Linux `security/integrity/ima`, templates ima-ng, ima-sig).

use sha1::{Digest, Sha1};
use sha2::Sha256;

/// The PCR that IMA extends.
pub const PCR: u32 = 10;
/// A log longer than this is refused; the kernel's own has no bound.
const LOG_BYTES_MAX: usize = 64 << 20;
/// Template data of one record: two paths and a signature fit in far less.
const TEMPLATE_BYTES_MAX: usize = 64 << 10;

/// One record of the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// The PCR it was extended to.
    pub pcr: u32,
    /// SHA-1 of the template data; all zero marks a violation.
    pub template_hash: [u8; 20],
    /// `ima-ng` or `ima-sig`.
    pub template: String,
    /// The fields, each with a 32-bit little-endian length before it.
    pub fields: Vec<u8>,
}

/// The value extended per bank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Digests {
    /// SHA-1 bank.
    pub sha1: [u8; 20],
    /// SHA-256 bank.
    pub sha256: [u8; 32],
    /// SHA-384 bank.
    pub sha384: [u8; 48],
}

/// The log ends inside a record, or a record is not one.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("IMA log malformed at byte {at}: {what}")]
pub struct ImaError {
    /// Offset of the record.
    pub at: usize,
    /// What was wrong.
    pub what: &'static str,
}

impl Record {
    /// The ima-ng record of a file with this SHA-256 and path.
    pub fn ima_ng(sha256: &[u8; 32], path: &str) -> Record {
        let mut fields = Vec::with_capacity(64 + path.len());
        let mut field = |parts: &[&[u8]]| {
            let len: usize = parts.iter().map(|p| p.len()).sum();
            fields.extend_from_slice(&u32::try_from(len).unwrap_or(u32::MAX).to_le_bytes());
            parts.iter().for_each(|p| fields.extend_from_slice(p));
        };
        field(&[b"sha256:\0", sha256]);
        field(&[path.as_bytes(), b"\0"]);
        Record { pcr: PCR, template_hash: Sha1::digest(&fields).into(), template: "ima-ng".into(), fields }
    }
    /// As it stands in `binary_runtime_measurements`.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(36 + self.template.len() + self.fields.len());
        out.extend_from_slice(&self.pcr.to_le_bytes());
        out.extend_from_slice(&self.template_hash);
        for part in [self.template.as_bytes(), &self.fields] {
            out.extend_from_slice(&u32::try_from(part.len()).unwrap_or(u32::MAX).to_le_bytes());
            out.extend_from_slice(part);
        }
        out
    }
    /// What the kernel extends: a violation extends ones; a bank for which IMA could not allocate its hash (SHA-384 on
    /// Debian's kernel) gets the SHA-1 zero-padded.
    pub fn digests(&self) -> Digests {
        if self.template_hash == [0; 20] {
            return Digests { sha1: [0xff; 20], sha256: [0xff; 32], sha384: [0xff; 48] };
        }
        let mut sha384 = [0; 48];
        sha384[..20].copy_from_slice(&self.template_hash);
        Digests { sha1: self.template_hash, sha256: Sha256::digest(&self.fields).into(), sha384 }
    }
    /// Digest field and path of the record, if it has them.
    pub fn digest_and_path(&self) -> Option<(&[u8], &str)> {
        let mut rest = self.fields.as_slice();
        let digest = take_field(&mut rest)?;
        let path = take_field(&mut rest)?;
        Some((digest.strip_prefix(b"sha256:\0")?, std::str::from_utf8(path.strip_suffix(b"\0")?).ok()?))
    }
}

/// Every record of a log.
pub fn parse(log: &[u8]) -> Result<Vec<Record>, ImaError> {
    if log.len() > LOG_BYTES_MAX {
        return Err(ImaError { at: 0, what: "longer than 64 MiB" });
    }
    let mut rest = log;
    let mut records = Vec::new();
    while !rest.is_empty() {
        let at = log.len() - rest.len();
        records.push(take_record(&mut rest).map_err(|what| ImaError { at, what })?);
    }
    Ok(records)
}

fn take_record(rest: &mut &[u8]) -> Result<Record, &'static str> {
    let pcr = take_u32(rest).ok_or("ends in the PCR index")?;
    let (hash, after) = rest.split_first_chunk::<20>().ok_or("ends in the template hash")?;
    *rest = after;
    let name = take_field(rest).ok_or("ends in the template name")?;
    let template = std::str::from_utf8(name).map_err(|_| "template name is no text")?.to_owned();
    let fields = take_field(rest).ok_or("ends in the template data")?;
    if fields.len() > TEMPLATE_BYTES_MAX {
        return Err("template data longer than 64 KiB");
    }
    Ok(Record { pcr, template_hash: *hash, template, fields: fields.to_vec() })
}

fn take_u32(rest: &mut &[u8]) -> Option<u32> {
    let (bytes, after) = rest.split_first_chunk::<4>()?;
    *rest = after;
    Some(u32::from_le_bytes(*bytes))
}

fn take_field<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let len = usize::try_from(take_u32(rest)?).ok()?;
    let (field, after) = rest.split_at_checked(len)?;
    *rest = after;
    Some(field)
}

/// SHA-256 value of a PCR after `records`, from zero.
pub fn replay_sha256<'a>(records: impl IntoIterator<Item = &'a Record>) -> [u8; 32] {
    records.into_iter().fold([0; 32], |pcr, record| {
        Sha256::new().chain_update(pcr).chain_update(record.digests().sha256).finalize().into()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOLDEN: &[u8] = include_bytes!("../golden/ima_binary_runtime_measurements");

    #[test]
    fn the_golden_log_round_trips_and_replays_to_pcr_10() {
        let records = parse(GOLDEN).unwrap();
        assert_eq!(records.len(), 41);
        assert_eq!(records.iter().flat_map(Record::encode).collect::<Vec<_>>(), GOLDEN);
        let expected = crate::tpm::golden_pcrs(crate::tpm_wire::Bank::Sha256);
        assert_eq!(replay_sha256(&records).as_slice(), expected[10]);
        let (digest, path) = records[1].digest_and_path().unwrap();
        assert_eq!((hex::encode(digest).get(..8), path), (Some("3b89b4c0"), "/init"));
    }

    #[test]
    fn a_log_cut_anywhere_inside_a_record_is_refused() {
        let first = parse(GOLDEN).unwrap()[0].encode().len();
        for len in 1..first {
            assert!(parse(&GOLDEN[..len]).is_err(), "{len}");
        }
    }

    #[test]
    fn our_record_has_the_template_hash_of_its_data() {
        let record = Record::ima_ng(&[7; 32], "/opt/x");
        assert_eq!(record.fields.len(), 4 + 8 + 32 + 4 + 7);
        assert_eq!(record.template_hash, <[u8; 20]>::from(Sha1::digest(&record.fields)));
        assert_eq!(parse(&record.encode()).unwrap(), [record]);
    }
}
