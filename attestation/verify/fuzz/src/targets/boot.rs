//! TCG2 boot logs.

use crate::logs::{self, BootLog};
use crate::{SOON, Shape, Target, Verdict, golden};
use ambit_verify::{BOOT_LOG_BYTES_MAX, HashAlg, bootlog, parsers};
use std::collections::BTreeMap;

const LARGEST: usize = BOOT_LOG_BYTES_MAX as usize;

/// Bytes as they come, against the recorded PCRs and against whatever PCRs the log itself leads to.
pub(super) const LOG: Target = Target {
    name: "boot_log",
    len_max: 24 * 1024,
    cpu: SOON,
    heap: |n| 64 * 1024 + 64 * n,
    run: log,
    shapes: &[
        Shape { name: "events of 240 bytes", bytes: LARGEST, make: |n| events(n, 5, 0x8000_0006, 240 - 50) },
        Shape { name: "events without data", bytes: LARGEST, make: |n| events(n, 5, 0x8000_0006, 0) },
        Shape { name: "events without digests", bytes: LARGEST, make: bare },
        Shape { name: "remarks that extend nothing", bytes: LARGEST, make: |n| events(n, 0, 3, 200) },
        Shape { name: "one event", bytes: LARGEST, make: |n| events(n, 5, 0x8000_0006, n - 128) },
        Shape { name: "one command", bytes: LARGEST, make: |n| events(n, 8, 0x0d, n - 128) },
        Shape { name: "many variables", bytes: LARGEST, make: variables },
        Shape { name: "the same variable again and again", bytes: LARGEST, make: same_variable },
        Shape { name: "one dbx of hashes", bytes: LARGEST, make: |n| dbx(n, 48, 1) },
        Shape { name: "one dbx of lists of one hash", bytes: LARGEST, make: |n| dbx(n, 48, 0) },
        Shape { name: "zeros", bytes: LARGEST, make: |n| vec![0; n] },
    ],
};

fn log(input: &[u8]) -> Verdict {
    for hash in [HashAlg::Sha256, HashAlg::Sha384] {
        if let Ok(facts) = parsers::boot_log(input, hash, golden::pcrs(hash))
            && !input.is_empty()
        {
            // The recorded boot and no other: what the quote authenticates cannot be changed by changing the log.
            assert_eq!(facts.secure_boot, Some(true), "{hash}: another Secure Boot state under the same PCRs");
            let same = parsers::boot_log(golden::BOOT_LOG, hash, golden::pcrs(hash)).expect("the recorded log");
            assert_eq!(facts.kernel_cmdline, same.kernel_cmdline, "{hash}: another command line under the same PCRs");
        }
    }
    let parsed = bootlog::BootLog::parse(input);
    if let Ok(log) = &parsed {
        let data: usize = log.events().iter().map(|event| event.data.len()).sum();
        assert!(data <= input.len(), "more event data than input");
        if let Ok(pcrs) = log.replay(HashAlg::Sha256) {
            let other = replay(log);
            let differs = pcrs.iter().find(|(pcr, value)| other.get(pcr) != Some(value));
            assert!(differs.is_none(), "two replays differ: {differs:02x?}");
            let _ = parsers::boot_log(input, HashAlg::Sha256, &policed(&pcrs));
        }
        let _ = log.replay(HashAlg::Sha1);
    }
    Verdict::from(&parsed)
}

fn policed(pcrs: &BTreeMap<u32, Vec<u8>>) -> BTreeMap<u32, Vec<u8>> {
    bootlog::POLICED_PCRS.iter().map(|pcr| (*pcr, pcrs[pcr].clone())).collect()
}

/// The SHA-256 replay by another library. The start of PCR 0 is read here too: the remark is in the log, for PCR 0.
fn replay(log: &bootlog::BootLog<'_>) -> BTreeMap<u32, Vec<u8>> {
    let mut pcrs = BootLog::new().pcrs;
    let remarks = log.events().iter().filter(|event| event.kind == 3 && event.pcr == 0);
    let locality = remarks.filter_map(|event| event.data.strip_prefix(b"StartupLocality\0")).next();
    if let Some([locality]) = locality {
        *pcrs.get_mut(&0).expect("PCR 0").last_mut().expect("32 bytes") = *locality;
    }
    for event in log.events().iter().filter(|event| event.kind != 3) {
        let value = pcrs.get_mut(&event.pcr).expect("a PCR below 24");
        *value = logs::sha256(&[value, event.digest(HashAlg::Sha256).expect("replayed before")]);
    }
    pcrs
}

/// Events as a compact list, made into a log whose digests are right (or not) by a flag: what mutation of raw bytes
/// never reaches, since it would have to find SHA-256 of its own change.
///
/// Each is: PCR, index of the type, flag, length (16 bits, little-endian), data.
pub(super) const EVENTS: Target = Target {
    name: "boot_events",
    len_max: 4096,
    cpu: SOON,
    heap: |n| 64 * 1024 + 128 * n,
    run: events_of,
    shapes: &[],
};

/// Types of PFP 10.4.1 in use, and some of none.
const KINDS: [u32; 28] = [
    0x01,
    0x03,
    0x04,
    0x05,
    0x06,
    0x07,
    0x08,
    0x09,
    0x0a,
    0x0c,
    0x0d,
    0x0f,
    0x10,
    0x12,
    0x8000_0001,
    0x8000_0002,
    0x8000_0003,
    0x8000_0004,
    0x8000_0006,
    0x8000_0007,
    0x8000_0008,
    0x8000_0009,
    0x8000_000a,
    0x8000_000b,
    0x8000_000c,
    0x8000_00e0,
    0x8000_00e1,
    0xffff_ffff,
];

/// What a digest is of.
fn digest(flag: u8, data: &[u8]) -> Vec<u8> {
    let after = |n: usize| logs::sha256(&[data.get(n..).unwrap_or_default()]);
    match flag {
        0 => after(0),
        // The prefixes `grub_cmd: `, `kernel_cmdline: `, and a tagged event's header.
        1 => after(10),
        2 => after(16),
        3 => after(8),
        // Without a terminating zero, of one byte or of two.
        4 => logs::sha256(&[data.strip_suffix(&[0]).unwrap_or(data)]),
        5 => logs::sha256(&[data.strip_suffix(&[0, 0]).unwrap_or(data)]),
        6 => logs::sha256(&[data.strip_suffix(&[0]).unwrap_or(data).get(16..).unwrap_or_default()]),
        7 => variable_value(data).map_or_else(|| after(32), |value| logs::sha256(&[value])),
        _ => vec![flag; 32],
    }
}

/// The value in a UEFI_VARIABLE_DATA, which some firmware measures alone: after GUID, two lengths and the name.
fn variable_value(data: &[u8]) -> Option<&[u8]> {
    let units = u64::from_le_bytes(data.get(16..24)?.try_into().ok()?);
    data.get(usize::try_from(units).ok()?.checked_mul(2)?.checked_add(32)?..)
}

fn events_of(input: &[u8]) -> Verdict {
    let mut log = BootLog::new();
    let mut secure_boot = false;
    let mut rest = input;
    while let [pcr, kind, flag, low, high, tail @ ..] = rest {
        let length = usize::from(u16::from_le_bytes([*low, *high])).min(tail.len());
        let (data, next) = tail.split_at(length);
        let (pcr, kind) = (u32::from(pcr % 24), KINDS[usize::from(*kind) % KINDS.len()]);
        let digest = digest(*flag, data);
        log.event(pcr, kind, &digest, data);
        secure_boot |= pcr == 7 && kind != 3 && digest == logs::sha256(&[data]) && data.ends_with(&[1]);
        rest = next;
    }
    let verdict = parsers::boot_log(&log.bytes, HashAlg::Sha256, &log.policed());
    match &verdict {
        Err(denial) => {
            let code = denial.refusal.code;
            let sees_locality = input.windows(15).any(|window| window == b"StartupLocality");
            assert!(code != ambit_model::Code::BootLogPcrMismatch || sees_locality, "two replays differ: {denial:?}");
        }
        Ok(facts) => {
            assert!(facts.secure_boot != Some(true) || secure_boot, "Secure Boot that no authenticated event shows");
            let mut other = log.policed();
            other.values_mut().for_each(|value| value[31] ^= 1);
            assert!(parsers::boot_log(&log.bytes, HashAlg::Sha256, &other).is_err(), "accepted for other PCRs too");
        }
    }
    Verdict::from(&verdict)
}

/// Events of one kind, each with `data` bytes of data, about `n` bytes in all.
fn events(n: usize, pcr: u32, kind: u32, data: usize) -> Vec<u8> {
    let mut log = BootLog::new();
    let data = vec![b'a'; data];
    let digest = logs::sha256(&[&data]);
    while log.bytes.len() + data.len() + 50 <= n {
        log.event(pcr, kind, &digest, &data);
    }
    log.bytes
}

/// Events of a log that names no digest: 16 bytes each.
fn bare(n: usize) -> Vec<u8> {
    let mut bytes = BootLog::new().bytes;
    while bytes.len() + 16 <= n {
        for word in [5u32, 0x8000_0006, 0, 0] {
            bytes.extend(word.to_le_bytes());
        }
    }
    bytes
}

fn variables(n: usize) -> Vec<u8> {
    let mut log = BootLog::new();
    for number in 0.. {
        let data = logs::variable(&logs::GLOBAL, &format!("Variable{number:06}"), &[7; 200]);
        if log.bytes.len() + data.len() + 50 > n {
            break;
        }
        log.of_data(7, 0x8000_0001, &data);
    }
    log.bytes
}

fn same_variable(n: usize) -> Vec<u8> {
    let mut log = BootLog::new();
    let data = logs::variable(&logs::DATABASE, "dbx", &[7; 200]);
    while log.bytes.len() + data.len() + 50 <= n {
        log.of_data(7, 0x8000_0001, &data);
    }
    log.bytes
}

/// EFI_SIGNATURE_LISTs of EFI_CERT_SHA256 (UEFI 2.10, 32.4.1): one list of all, or one for each.
fn dbx(n: usize, entry: usize, lists: usize) -> Vec<u8> {
    const SHA256: [u8; 16] =
        [0x26, 0x16, 0xc4, 0xc1, 0x4c, 0x50, 0x92, 0x40, 0xac, 0xa9, 0x41, 0xf9, 0x36, 0x93, 0x43, 0x28];
    let room = n.saturating_sub(256);
    let entries = if lists == 1 { room / entry } else { room / (entry + 28) };
    let mut value = Vec::with_capacity(n);
    let header = |value: &mut Vec<u8>, entries: usize| {
        value.extend(SHA256);
        for word in [28 + entries * entry, 0, entry] {
            value.extend(u32::try_from(word).expect("short").to_le_bytes());
        }
    };
    if lists == 1 {
        header(&mut value, entries);
    }
    for number in 0..entries as u64 {
        if lists == 0 {
            header(&mut value, 1);
        }
        value.extend([9; 16]);
        value.extend(number.to_le_bytes());
        value.extend([0; 24]);
    }
    let mut log = BootLog::new();
    log.of_data(7, 0x8000_0001, &logs::variable(&logs::GLOBAL, "SecureBoot", &[1]));
    log.of_data(7, 0x8000_0001, &logs::variable(&logs::DATABASE, "dbx", &value));
    log.bytes
}
