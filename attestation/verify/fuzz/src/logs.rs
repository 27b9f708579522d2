//! Logs made by hand, and replayed by hand: written apart from the parsers, with another library's hashes, so that the
//! two can disagree.

use sha1::Sha1;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;

pub(crate) fn sha256(parts: &[&[u8]]) -> Vec<u8> {
    let mut hash = Sha256::new();
    parts.iter().for_each(|part| hash.update(part));
    hash.finalize().to_vec()
}

pub(crate) fn sha1(bytes: &[u8]) -> Vec<u8> {
    Sha1::digest(bytes).to_vec()
}

/// A crypto-agile log with one bank, SHA-256 (PFP 10.2).
pub(crate) struct BootLog {
    pub(crate) bytes: Vec<u8>,
    /// PCR values so far: all 24, from a start by locality 0.
    pub(crate) pcrs: BTreeMap<u32, Vec<u8>>,
}

impl BootLog {
    pub(crate) fn new() -> BootLog {
        let mut spec = b"Spec ID Event03\0".to_vec();
        spec.extend([0, 0, 0, 0, 0, 2, 0, 2]);
        spec.extend(1u32.to_le_bytes());
        spec.extend([0x0b, 0, 32, 0]);
        spec.push(0);
        let mut bytes = [0u32.to_le_bytes(), 3u32.to_le_bytes()].concat();
        bytes.extend([0; 20]);
        bytes.extend(u32::try_from(spec.len()).expect("short").to_le_bytes());
        bytes.extend(spec);
        let start = |pcr: u32| vec![if (17..=22).contains(&pcr) { 0xff } else { 0 }; 32];
        BootLog { bytes, pcrs: (0..24).map(|pcr| (pcr, start(pcr))).collect() }
    }

    /// Adds an event with this digest and extends its PCR, unless it is one that extends nothing.
    pub(crate) fn event(&mut self, pcr: u32, kind: u32, digest: &[u8], data: &[u8]) {
        for word in [pcr, kind, 1] {
            self.bytes.extend(word.to_le_bytes());
        }
        self.bytes.extend([0x0b, 0]);
        self.bytes.extend(digest);
        self.bytes.extend(u32::try_from(data.len()).expect("short").to_le_bytes());
        self.bytes.extend(data);
        if kind != 3
            && let Some(value) = self.pcrs.get_mut(&pcr)
        {
            *value = sha256(&[value, digest]);
        }
    }

    /// Adds an event whose digest is of its data.
    pub(crate) fn of_data(&mut self, pcr: u32, kind: u32, data: &[u8]) {
        self.event(pcr, kind, &sha256(&[data]), data);
    }

    /// Those that the log explains: 0-9 and 14.
    pub(crate) fn policed(&self) -> BTreeMap<u32, Vec<u8>> {
        let policed = self.pcrs.iter().filter(|(pcr, _)| **pcr <= 9 || **pcr == 14);
        policed.map(|(pcr, value)| (*pcr, value.clone())).collect()
    }
}

/// UEFI_VARIABLE_DATA (PFP 10.2.6).
pub(crate) fn variable(guid: &[u8; 16], name: &str, value: &[u8]) -> Vec<u8> {
    let name: Vec<u8> = name.encode_utf16().flat_map(u16::to_le_bytes).collect();
    let mut out = guid.to_vec();
    out.extend((name.len() as u64 / 2).to_le_bytes());
    out.extend((value.len() as u64).to_le_bytes());
    out.extend(name);
    out.extend(value);
    out
}

/// EFI_GLOBAL_VARIABLE.
pub(crate) const GLOBAL: [u8; 16] =
    [0x61, 0xdf, 0xe4, 0x8b, 0xca, 0x93, 0xd2, 0x11, 0xaa, 0x0d, 0x00, 0xe0, 0x98, 0x03, 0x2b, 0x8c];
/// EFI_IMAGE_SECURITY_DATABASE_GUID.
pub(crate) const DATABASE: [u8; 16] =
    [0xcb, 0xb2, 0x19, 0xd7, 0x3a, 0x3d, 0x96, 0x45, 0xa3, 0xbc, 0xda, 0xd0, 0x0e, 0x67, 0x65, 0x6f];

/// An IMA entry of the template `name`, with its data's fields.
pub(crate) fn ima_entry(template_hash: &[u8], name: &[u8], data: &[u8]) -> Vec<u8> {
    let mut out = 10u32.to_le_bytes().to_vec();
    out.extend(template_hash);
    for part in [name, data] {
        out.extend(u32::try_from(part.len()).expect("short").to_le_bytes());
        out.extend(part);
    }
    out
}

/// Template data: each field after its length.
pub(crate) fn ima_fields(fields: &[&[u8]]) -> Vec<u8> {
    let mut out = Vec::new();
    for field in fields {
        out.extend(u32::try_from(field.len()).expect("short").to_le_bytes());
        out.extend_from_slice(field);
    }
    out
}
