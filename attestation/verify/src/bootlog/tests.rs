use super::*;
use crate::testdata::{golden, golden_pcrs, mutant};

#[test]
fn the_golden_log_replays_in_every_bank() {
    let bytes = golden("binary_bios_measurements");
    let log = BootLog::parse(&bytes).unwrap();
    assert_eq!(log.events().len(), 48);
    for hash in [HashAlg::Sha1, HashAlg::Sha256, HashAlg::Sha384] {
        let (replayed, shown) = (log.replay(hash).unwrap(), golden_pcrs(hash));
        for pcr in POLICED_PCRS {
            assert_eq!(replayed[&pcr], shown[&pcr], "PCR {pcr} {hash}");
        }
        let facts = judge(&bytes, hash, &shown).unwrap();
        assert_eq!(facts.secure_boot, Some(true));
        assert!(facts.kernel_cmdline.unwrap().contains("ima_policy=tcb"));
    }
}

/// Each row: what was done to the log, the code, and where it must be said to diverge.
#[test]
fn a_changed_log_is_refused_with_its_place() {
    let log = golden("binary_bios_measurements");
    let edit = |from: &[u8], to: &[u8]| {
        assert_eq!(from.len(), to.len());
        let at = log.windows(from.len()).position(|w| w == from).expect("text in the log");
        let mut out = log.clone();
        out[at..at + to.len()].copy_from_slice(to);
        out
    };
    let utf16 = |s: &str| s.encode_utf16().flat_map(u16::to_le_bytes).collect::<Vec<u8>>();
    let event = |n: usize| BootLog::parse(&log).unwrap().events()[n - 1].clone().data.to_vec();
    let last = event(48);
    // Header, count of digests and their bytes: pcr 4, type 4, count 4, 3 x (2 + size), size 4.
    let last_len = 12 + 2 + 20 + 2 + 32 + 2 + 48 + 4 + last.len();
    let mut flipped = log.clone();
    let at = log.len() - last_len + 12 + 22 + 2;
    flipped[at] ^= 1;
    let mut retyped_unknown = log.clone();
    let crtm_at = 32 + 41;
    retyped_unknown[crtm_at + 4..crtm_at + 8].copy_from_slice(&0x1234u32.to_le_bytes());
    use Code::{BootLogEventAltered as Altered, BootLogMalformed as Malformed, BootLogMissing, BootLogPcrMismatch};
    let rows: Vec<(&str, Vec<u8>, Code, &str)> = vec![
        ("retyped PCR 7", mutant("retyped-pcr7.bin"), Altered, "event 4 (EV_POST_CODE) of PCR 7"),
        ("truncated", mutant("truncated.bin"), Malformed, ""),
        ("digest count 2^32-1", mutant("digest-count-2e32-1.bin"), Malformed, ""),
        ("empty", vec![], BootLogMissing, ""),
        ("no header", log[1..].to_vec(), Malformed, ""),
        ("garbage", vec![0xff; 4096], Malformed, ""),
        ("trailing byte", [log.as_slice(), &[0]].concat(), Malformed, ""),
        ("last event dropped", log[..log.len() - last_len].to_vec(), BootLogPcrMismatch, "PCR 5"),
        (
            "kernel command line edited",
            edit(b"kernel_cmdline: /vmlinuz console=ttyS0", b"kernel_cmdline: /vmlinuz console=ttyS1"),
            Altered,
            "event 44 (EV_IPL) of PCR 8",
        ),
        ("grub command edited", edit(b"set timeout=0", b"set timeout=9"), Altered, "event 35 (EV_IPL) of PCR 8"),
        (
            "SecureBoot renamed",
            edit(&utf16("SecureBoot"), &utf16("SecureB00t")),
            Altered,
            "event 4 (EV_EFI_VARIABLE_DRIVER_CONFIG) of PCR 7",
        ),
        (
            "action edited",
            edit(b"Exit Boot Services Invoc", b"Exit Boot Services INVOC"),
            Altered,
            "event 47 (EV_EFI_ACTION) of PCR 5",
        ),
        (
            "Boot0001 edited",
            edit(&event(11)[100..], &vec![7; event(11).len() - 100]),
            Altered,
            "event 11 (EV_EFI_VARIABLE_BOOT) of PCR 1",
        ),
        ("digest flipped", flipped, Altered, "event 48 (EV_EFI_ACTION) of PCR 5"),
        ("unknown type", retyped_unknown, Altered, "event 1 (type 0x00001234) of PCR 0"),
    ];
    let pcrs = golden_pcrs(HashAlg::Sha256);
    for (what, bytes, code, place) in rows {
        let denial = judge(&bytes, HashAlg::Sha256, &pcrs).expect_err(what);
        assert_eq!(denial.refusal.code, code, "{what}: {denial:?}");
        assert!(denial.diverged.clone().unwrap_or_default().ends_with(place), "{what}: {denial:?}");
    }
}

#[test]
fn an_unauthenticated_digest_change_is_a_pcr_mismatch() {
    // Event 2 (firmware blob): its digest is of code that is not in the log, so only the PCR can tell.
    let log = golden("binary_bios_measurements");
    let digest = BootLog::parse(&log).unwrap().events()[1].digest(HashAlg::Sha256).unwrap().to_vec();
    let at = log.windows(32).position(|w| w == digest).unwrap();
    let mut changed = log.clone();
    changed[at] ^= 0x80;
    let denial = judge(&changed, HashAlg::Sha256, &golden_pcrs(HashAlg::Sha256)).unwrap_err();
    assert_eq!((denial.refusal.code, denial.diverged.as_deref()), (Code::BootLogPcrMismatch, Some("PCR 0")));
}

#[test]
fn startup_locality_sets_the_start_of_pcr_0() {
    let log = golden("binary_bios_measurements");
    let header_len = 32 + 41;
    let no_action = |data: &[u8]| {
        let mut out = [0u32.to_le_bytes(), 3u32.to_le_bytes(), 0u32.to_le_bytes()].concat();
        out.extend((data.len() as u32).to_le_bytes());
        out.extend(data);
        out
    };
    let with = |events: &[Vec<u8>], at: usize| [&log[..at], &events.concat(), &log[at..]].concat();
    for (what, bytes, good) in [
        ("locality 0", with(&[no_action(b"StartupLocality\0\0")], header_len), true),
        ("locality 3", with(&[no_action(b"StartupLocality\0\x03")], header_len), false),
        ("another remark", with(&[no_action(b"anything")], header_len), true),
    ] {
        let verdict = judge(&bytes, HashAlg::Sha256, &golden_pcrs(HashAlg::Sha256));
        assert_eq!(verdict.is_ok(), good, "{what}: {verdict:?}");
    }
    let three = with(&[no_action(b"StartupLocality\0\x03")], header_len);
    let replayed = BootLog::parse(&three).unwrap().replay(HashAlg::Sha256).unwrap();
    assert_ne!(replayed[&0], golden_pcrs(HashAlg::Sha256)[&0]);
    for (what, bytes) in [
        ("locality 1", with(&[no_action(b"StartupLocality\0\x01")], header_len)),
        ("twice", with(&[no_action(b"StartupLocality\0\x03"), no_action(b"StartupLocality\0\x03")], header_len)),
        ("late", [log.as_slice(), &no_action(b"StartupLocality\0\x03")].concat()),
    ] {
        assert_eq!(BootLog::parse(&bytes).expect_err(what).refusal.code, Code::BootLogMalformed, "{what}");
    }
}

/// No prefix and no single corrupted byte of a real log makes the parser do anything but answer.
#[test]
fn no_corruption_panics() {
    let log = golden("binary_bios_measurements");
    let pcrs = golden_pcrs(HashAlg::Sha256);
    for n in 0..log.len() {
        let _ = BootLog::parse(&log[..n]);
    }
    let mut accepted = Vec::new();
    for n in (0..log.len()).step_by(3) {
        let mut bytes = log.clone();
        bytes[n] ^= 0xa5;
        if judge(&bytes, HashAlg::Sha256, &pcrs).is_ok() {
            accepted.push(n);
        }
    }
    // What may differ unseen: the digests of other banks (48 x 72 bytes of 17236), labels of files and device paths.
    let share = accepted.len() * 3 * 100 / log.len();
    println!("{share} % of the log may change unseen");
    assert!(share < 30, "{share} %");
}
