use super::*;
use crate::testdata::{golden, golden_pcrs};

/// Byte range of each entry.
fn entries(log: &[u8]) -> Vec<std::ops::Range<usize>> {
    let mut r = Reader::new(log);
    let mut out = Vec::new();
    while r.remaining() > 0 {
        let start = r.at();
        read_entry(&mut r).unwrap();
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
        let facts = replay(&log, hash, &golden_pcrs(hash)[&10]).unwrap();
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
