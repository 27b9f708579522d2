//! Reads a TCG2 crypto-agile boot log as far as the lab needs it: which digest went to which PCR
//! (TCG PC Client Platform Firmware Profile 1.05, sections 10.2 and 10.4).

use crate::ima::Digests;

/// Events that were logged but not extended.
const EV_NO_ACTION: u32 = 3;
/// TPM_ALG_ID of the three banks.
const SHA1: u16 = 0x0004;
const SHA256: u16 = 0x000b;
const SHA384: u16 = 0x000c;
/// Size of the header event before its data: PCR, type, SHA-1 digest, data size.
const HEADER_BYTES: usize = 32;

/// The log is not a crypto-agile log with these three banks.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("boot log malformed at byte {at}: {what}")]
pub struct BootLogError {
    /// Offset of the event.
    pub at: usize,
    /// What was wrong.
    pub what: &'static str,
}

/// One extend of the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// The PCR.
    pub pcr: u32,
    /// The digest per bank.
    pub digests: Digests,
}

/// What the firmware extended, in order.
pub fn parse(log: &[u8]) -> Result<Vec<Event>, BootLogError> {
    let fail = |rest: &[u8], what| BootLogError { at: log.len() - rest.len(), what };
    let mut rest = log.get(HEADER_BYTES - 4..).ok_or(fail(log, "no header event"))?;
    let spec = take_sized(&mut rest).ok_or(fail(log, "header event cut short"))?;
    if !spec.starts_with(b"Spec ID Event03\0") {
        return Err(fail(log, "not a crypto-agile log"));
    }
    let mut events = Vec::new();
    while !rest.is_empty() {
        let at = rest;
        events.extend(take_event(&mut rest).map_err(|what| fail(at, what))?);
    }
    Ok(events)
}

fn take_event(rest: &mut &[u8]) -> Result<Option<Event>, &'static str> {
    let pcr = take_u32(rest).ok_or("ends in the PCR index")?;
    let kind = take_u32(rest).ok_or("ends in the event type")?;
    let count = take_u32(rest).ok_or("ends in the digest count")?;
    if count > 8 {
        return Err("more than 8 digests");
    }
    let (mut sha1, mut sha256, mut sha384) = (None, None, None);
    for _ in 0..count {
        match take_u16(rest).ok_or("ends in a digest algorithm")? {
            SHA1 => sha1 = take_array(rest),
            SHA256 => sha256 = take_array(rest),
            SHA384 => sha384 = take_array(rest),
            _ => return Err("a bank that the lab's TPM does not have"),
        }
    }
    take_sized(rest).ok_or("ends in the event data")?;
    if kind == EV_NO_ACTION {
        return Ok(None);
    }
    let missing = "lacks a digest of one of the three banks";
    let digests =
        Digests { sha1: sha1.ok_or(missing)?, sha256: sha256.ok_or(missing)?, sha384: sha384.ok_or(missing)? };
    Ok(Some(Event { pcr, digests }))
}

fn take_array<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (bytes, after) = rest.split_first_chunk::<N>()?;
    *rest = after;
    Some(*bytes)
}

fn take_u16(rest: &mut &[u8]) -> Option<u16> {
    take_array(rest).map(u16::from_le_bytes)
}

fn take_u32(rest: &mut &[u8]) -> Option<u32> {
    take_array(rest).map(u32::from_le_bytes)
}

fn take_sized<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let len = usize::try_from(take_u32(rest)?).ok()?;
    let (data, after) = rest.split_at_checked(len)?;
    *rest = after;
    Some(data)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tpm_wire::Bank;
    use sha2::{Digest, Sha256};

    const GOLDEN: &[u8] = include_bytes!("../golden/binary_bios_measurements");

    #[test]
    fn the_golden_log_replays_to_the_golden_pcrs() {
        let mut pcrs = [[0u8; 32]; 16];
        for event in parse(GOLDEN).unwrap() {
            let pcr = &mut pcrs[event.pcr as usize];
            *pcr = Sha256::new().chain_update(*pcr).chain_update(event.digests.sha256).finalize().into();
        }
        let golden = crate::tpm::golden_pcrs(Bank::Sha256);
        for index in [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 14] {
            assert_eq!(pcrs[index].as_slice(), golden[index], "PCR {index}");
        }
    }

    #[test]
    fn a_cut_log_is_refused() {
        assert!(parse(&GOLDEN[..GOLDEN.len() - 1]).is_err());
        assert!(parse(&GOLDEN[..20]).is_err());
        assert!(parse(b"").is_err());
    }
}
