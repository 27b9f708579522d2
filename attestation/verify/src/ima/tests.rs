use super::*;
use crate::testdata::{golden, golden_pcrs};
use crate::wire::Reader;

/// Byte range of each entry.
fn entries(log: &[u8]) -> Vec<std::ops::Range<usize>> {
    let mut r = Reader::new(log);
    let mut out = Vec::new();
    while r.remaining() > 0 {
        let start = r.at();
        entry::RawEntry::read(&mut r).unwrap().unwrap();
        out.push(start..r.at());
    }
    out
}

#[test]
fn the_golden_log_replays_in_every_bank() {
    let log = golden("ima_binary_runtime_measurements");
    for (hash, form) in
        [(HashAlg::Sha1, ImaForm::Native), (HashAlg::Sha256, ImaForm::Native), (HashAlg::Sha384, ImaForm::PaddedSha1)]
    {
        let facts = judge_each(&log, hash, &golden_pcrs(hash)[&10], &mut |_| {}).unwrap();
        assert_eq!((facts.entries, facts.bytes, facts.form), (41, log.len() as u64, form), "{hash}");
    }
}

#[test]
fn a_log_longer_than_the_quote_counts_up_to_the_quote() {
    let log = golden("ima_binary_runtime_measurements");
    let again = entries(&log)[3].clone();
    let longer = [log.as_slice(), &log[again]].concat();
    let facts = judge(&longer, Bank::Sha256, &golden_pcrs(HashAlg::Sha256)[&10]).unwrap();
    assert_eq!((facts.entries, facts.bytes), (41, log.len() as u64));
}

#[test]
fn a_violation_extends_ones_and_is_counted() {
    let log = golden("ima_binary_runtime_measurements");
    let first = entries(&log)[0].clone();
    let mut violation = log[first].to_vec();
    violation[4..24].fill(0);
    let quoted = HashAlg::Sha256.digest(&[&[0; 32], &[0xff; 32]]);
    let facts = judge(&violation, Bank::Sha256, &quoted).unwrap();
    assert_eq!((facts.entries, facts.violations), (1, 1));
}

#[test]
fn a_changed_log_is_refused() {
    let log = golden("ima_binary_runtime_measurements");
    let ranges = entries(&log);
    let (a, b) = (ranges[5].clone(), ranges[6].clone());
    let swapped = [&log[..a.start], &log[b.clone()], &log[a], &log[b.end..]].concat();
    let at = log.windows(12).position(|w| w == b"/bin/busybox").unwrap();
    let mut renamed = log.clone();
    renamed[at + 5] = b'B';
    let entry = ranges.iter().position(|r| r.contains(&at)).unwrap();
    // The same, with the template hash made right again: only the replay can tell.
    let mut rehashed = renamed.clone();
    let data_at = ranges[entry].start + 4 + 20 + 4 + 7 + 4;
    let sha1 = HashAlg::Sha1.digest(&[&rehashed[data_at..ranges[entry].end]]);
    rehashed[ranges[entry].start + 4..ranges[entry].start + 24].copy_from_slice(&sha1);
    let mut other_pcr = log.clone();
    other_pcr[0] = 11;
    let mut huge = log.clone();
    huge[35..39].copy_from_slice(&u32::MAX.to_le_bytes());
    use Code::{ImaLogMalformed as Malformed, ImaLogMismatch as Mismatch};
    let rows: Vec<(&str, Vec<u8>, Code)> = vec![
        ("cut inside an entry", log[..log.len() - 3].to_vec(), Malformed),
        ("last entry cut", log[..ranges[40].start].to_vec(), Mismatch),
        ("first entry cut", log[ranges[1].start..].to_vec(), Mismatch),
        ("empty", vec![], Mismatch),
        ("reordered", swapped, Mismatch),
        ("renamed", renamed, Mismatch),
        ("renamed, hash fixed", rehashed, Mismatch),
        ("other PCR", other_pcr, Malformed),
        ("huge size", huge, Malformed),
        ("garbage", vec![0xff; 1000], Malformed),
    ];
    let quoted = &golden_pcrs(HashAlg::Sha256)[&10];
    for (what, bytes, code) in rows {
        let denial = judge(&bytes, Bank::Sha256, quoted).expect_err(what);
        assert_eq!(denial.refusal.code, code, "{what}: {denial:?}");
    }
    assert_eq!(judge(&[], Bank::Sha256, &[0; 32]).unwrap(), ImaFacts::default(), "IMA off");
    assert!(judge(&log, Bank::Sha256, &[0; 32]).is_err(), "a log, but nothing extended");
}

/// The kernel's own text form of the same log is the oracle of what an entry says.
#[test]
fn entries_read_as_the_kernel_shows_them() {
    let ascii = String::from_utf8(golden("ima_ascii_runtime_measurements")).unwrap();
    let mut shown = Vec::new();
    let log = golden("ima_binary_runtime_measurements");
    let mut each = |e: &ImaEntry<'_>| {
        shown.push(format!("{}:{} {}", e.algorithm, hex::encode(e.digest), e.path_text()));
        assert!(!e.signed && !e.violation);
    };
    judge_each(&log, HashAlg::Sha256, &golden_pcrs(HashAlg::Sha256)[&10], &mut each).unwrap();
    let lines: Vec<&str> = ascii.lines().map(|l| l.splitn(4, ' ').nth(3).unwrap().trim_end()).collect();
    assert_eq!(shown, lines);
}

/// Any cut into pieces leads to the same checkpoint, and any entry is a place to go on from.
#[test]
fn a_replay_takes_pieces_and_resumes() {
    let log = golden("ima_binary_runtime_measurements");
    let hash = HashAlg::Sha256;
    let quoted = &golden_pcrs(hash)[&10];
    let mut whole = Replay::resume(hash, quoted, Checkpoint::start(hash));
    whole.push(&log, &mut |_| {}).unwrap();
    let (end, _) = whole.finish().unwrap();
    for size in [1, 7, 63, 200, 5000] {
        let mut paths = Vec::new();
        let mut replay = Replay::resume(hash, quoted, Checkpoint::start(hash));
        for piece in log.chunks(size) {
            replay.push(piece, &mut |e| paths.push(e.number)).unwrap();
        }
        assert_eq!(replay.finish().unwrap().0, end, "pieces of {size}");
        assert_eq!(paths, (1..=41).collect::<Vec<u64>>(), "pieces of {size}");
    }
    let mut pcr = vec![0; 32];
    for (n, range) in entries(&log).into_iter().enumerate() {
        let at = Checkpoint { offset: range.start as u64, entries: n as u64, pcr: pcr.clone(), form: ImaForm::Native };
        let mut replay = Replay::resume(hash, quoted, at.clone());
        replay.push(&log[range.start..], &mut |_| {}).unwrap();
        assert_eq!(replay.finish().unwrap().0, end, "from entry {n}");
        // The same delta after another value, or none of it, leads nowhere.
        let short = Replay::resume(hash, quoted, at).finish().unwrap_err();
        assert_eq!(short.refusal.code, Code::ImaLogMismatch);
        let data = range.start + 4 + 20 + 4 + 7 + 4;
        pcr = hash.digest(&[&pcr, &hash.digest(&[&log[data..range.end]])]);
    }
    let mut unchanged = Replay::resume(hash, quoted, end.clone());
    assert!(unchanged.is_reached());
    unchanged.push(b"what follows the quote is not looked at", &mut |_| panic!("not shown")).unwrap();
    assert_eq!(unchanged.finish().unwrap(), (end, 0));
}

#[test]
fn templates_are_read_by_their_own_definition() {
    let field = |body: &[u8]| [(body.len() as u32).to_le_bytes().as_slice(), body].concat();
    let log = |name: &str, fields: &[&[u8]]| {
        let data = fields.iter().flat_map(|f| field(f)).collect::<Vec<u8>>();
        let hash = HashAlg::Sha1.digest(&[&data]);
        [&10u32.to_le_bytes(), hash.as_slice(), &field(name.as_bytes()), &field(&data)].concat()
    };
    let d = [b"sha256:\0".as_slice(), &[7; 32]].concat();
    let d2 = [b"ima:".as_slice(), &d].concat();
    let verity = [b"verity:".as_slice(), &d].concat();
    let read = |log: &[u8]| {
        let mut out = None;
        let mut replay = Replay::resume(HashAlg::Sha256, &[1; 32], Checkpoint::start(HashAlg::Sha256));
        replay.push(log, &mut |e| out = Some((e.algorithm.to_owned(), e.path_text(), e.signed)))?;
        Ok::<_, Denial>(out)
    };
    for (log, algorithm, path, signed) in [
        (log("ima-ng", &[&d, b"/a\0"]), "sha256", "/a", false),
        (log("ima-sig", &[&d, b"/a b\0", b"\x03sig"]), "sha256", "/a b", true),
        (log("ima-sigv2", &[&d2, b"/a\0", b""]), "sha256", "/a", false),
        (log("ima-ngv2", &[&verity, b"/a\0"]), "verity:sha256", "/a", false),
        (log("ima-buf", &[&d, b"kexec-cmdline\0", b"quiet"]), "sha256", "kexec-cmdline", false),
        (log("d-ng|n-ng|imode", &[&d, b"/\xff\n\0", b"xx"]), "sha256", "/\\xff\\n", false),
    ] {
        assert_eq!(read(&log).unwrap(), Some((algorithm.to_owned(), path.to_owned(), signed)));
    }
    for (what, log) in [
        ("unknown template", log("mine", &[&d, b"/a\0"])),
        ("unknown field", log("d-ng|n-ng|mine", &[&d, b"/a\0", b""])),
        ("field missing", log("ima-sig", &[&d, b"/a\0"])),
        ("field too many", log("ima-ng", &[&d, b"/a\0", b""])),
        ("path without its end", log("ima-ng", &[&d, b"/a"])),
        ("zero in a path", log("ima-ng", &[&d, b"/a\0b\0"])),
        ("digest of another length", log("ima-ng", &[&d[..39], b"/a\0"])),
        ("unknown hash", log("ima-ng", &[b"crc32:\0xxxx", b"/a\0"])),
        ("no name", log("d-ng", &[&d])),
        // Which field is the digest must not depend on the template's name, which nobody measured.
        ("digest after other fields", log("buf|n-ng|sig|d-ng", &[b"evil", b"/a\0", b"", &d])),
        ("digest of the modsig field", log("d-modsig|n-ng|sig|d-ng|modsig", &[&d, b"/a\0", b"", &d, b""])),
        ("two digests", log("d-ng|n-ng|d-ng", &[&d, b"/a\0", &d])),
        ("name that is not the second field", log("d-ng|buf|n-ng", &[&d, b"x", b"/a\0"])),
    ] {
        assert_eq!(read(&log).expect_err(what).refusal.code, Code::ImaLogMalformed, "{what}");
    }
}
