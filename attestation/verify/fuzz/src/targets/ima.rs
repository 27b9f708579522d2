//! IMA logs.

use crate::{SOON, Shape, Target, Verdict, golden, logs};
use ambit_verify::ima::{Checkpoint, ImaFacts, ImaForm, Replay};
use ambit_verify::{Bank, HashAlg, IMA_LOG_BYTES_MAX, parsers};

/// An eighth of the limit: as telling for growth, and made in a second.
const LARGEST: usize = IMA_LOG_BYTES_MAX as usize / 8;

/// Bytes as they come, against the recorded PCR 10.
pub(super) const LOG: Target = Target {
    name: "ima_log",
    len_max: 8 * 1024,
    cpu: SOON,
    heap: |n| 16 * 1024 + 16 * n,
    run: log,
    shapes: &[
        Shape { name: "files", bytes: LARGEST, make: files },
        Shape { name: "violations", bytes: LARGEST, make: violations },
        Shape { name: "entries of 15 empty fields", bytes: LARGEST, make: empty_fields },
        Shape { name: "entries of 1 MiB", bytes: LARGEST, make: large_entries },
        Shape { name: "the same file again and again", bytes: LARGEST, make: same_file },
        Shape { name: "an entry that does not end", bytes: LARGEST, make: endless },
        Shape { name: "zeros", bytes: LARGEST, make: |n| vec![0; n] },
    ],
};

fn log(input: &[u8]) -> Verdict {
    let quoted = |hash| golden::pcrs(hash)[&10].as_slice();
    let verdict = parsers::ima_log(input, Bank::Sha256, quoted(HashAlg::Sha256));
    if let Ok(facts) = &verdict {
        let covered = usize::try_from(facts.bytes).expect("a length");
        assert!(covered <= input.len(), "more covered than sent");
        let honest =
            parsers::ima_log(golden::IMA_LOG, Bank::Sha256, quoted(HashAlg::Sha256)).expect("the recorded log");
        assert_eq!((facts.entries, facts.violations), (honest.entries, honest.violations));
        assert_eq!(facts.form, ImaForm::Native);
        // The quote covers a prefix: it alone must give the same.
        assert_eq!(parsers::ima_log(&input[..covered], Bank::Sha256, quoted(HashAlg::Sha256)).as_ref(), Ok(facts));
    }
    let _ = parsers::ima_log(input, Bank::Sha384, quoted(HashAlg::Sha384));
    in_pieces(input, quoted(HashAlg::Sha256), verdict.as_ref().ok());
    Verdict::from(&verdict)
}

/// A log that comes in pieces is judged as the whole is, and shows the same entries.
fn in_pieces(input: &[u8], quoted: &[u8], whole: Option<&ImaFacts>) {
    // Short logs byte by byte, long ones as they come off the wire; both cut entries anywhere.
    let size = if input.len() < 512 { 1 } else { 4093 };
    let mut replay = Replay::resume(HashAlg::Sha256, quoted, Checkpoint::start(HashAlg::Sha256));
    let mut shown = 0;
    let pushed = input.chunks(size).try_for_each(|piece| {
        replay.push(piece, &mut |entry| {
            shown += 1;
            assert_eq!(entry.number, shown, "entries are shown once and in order");
        })
    });
    let ended = pushed.and_then(|()| replay.finish()).ok();
    match (ended, whole) {
        (Some((end, violations)), Some(facts)) => {
            let whole = (facts.bytes, facts.entries as u64, facts.violations);
            assert_eq!((end.offset, end.entries, violations), whole, "in pieces another verdict");
        }
        (None, None) => {}
        (pieces, whole) => panic!("in pieces: {pieces:?}, whole: {whole:?}"),
    }
}

/// Entries as a compact list, made into a log whose template hashes are right (or not) by a flag.
///
/// Each is: flag, length (16 bits, little-endian), template data. The quote covers all but the last `first byte` ones.
pub(super) const ENTRIES: Target =
    Target { name: "ima_entries", len_max: 4096, cpu: SOON, heap: |n| 32 * 1024 + 96 * n, run: entries, shapes: &[] };

struct Made {
    bytes: Vec<u8>,
    /// After each entry: bytes so far, PCR 10, violations.
    steps: Vec<(usize, Vec<u8>, usize)>,
    /// Entries up to the first whose template hash is not of its data.
    good: usize,
}

fn make(mut rest: &[u8]) -> Made {
    let mut made = Made { bytes: vec![], steps: vec![], good: usize::MAX };
    let (mut pcr, mut violations) = (vec![0; 32], 0);
    while let [flag, low, high, tail @ ..] = rest {
        let length = usize::from(u16::from_le_bytes([*low, *high])).min(tail.len());
        let (data, next) = tail.split_at(length);
        let name: &[u8] = match flag >> 4 {
            0 => b"ima-ng",
            1 => b"ima-sig",
            2 => b"ima-buf",
            3 => b"ima",
            _ => b"evm-sig",
        };
        let hash = match flag & 3 {
            0 | 1 => logs::sha1(data),
            2 => vec![0; 20],
            _ => vec![*flag; 20],
        };
        let is_violation = hash == [0; 20];
        let extended = if is_violation { vec![0xff; 32] } else { logs::sha256(&[data]) };
        if !is_violation && hash != logs::sha1(data) {
            made.good = made.good.min(made.steps.len());
        }
        violations += usize::from(is_violation);
        pcr = logs::sha256(&[&pcr, &extended]);
        made.bytes.extend(logs::ima_entry(&hash, name, data));
        made.steps.push((made.bytes.len(), pcr.clone(), violations));
        rest = next;
    }
    made
}

fn entries(input: &[u8]) -> Verdict {
    let Some((uncovered, list)) = input.split_first() else { return Verdict::Refused };
    let made = make(list);
    let covered = made.steps.len().saturating_sub(usize::from(*uncovered));
    let Some((bytes, pcr, violations)) = covered.checked_sub(1).and_then(|last| made.steps.get(last)) else {
        return Verdict::Refused;
    };
    let verdict = parsers::ima_log(&made.bytes, Bank::Sha256, pcr);
    if let Ok(facts) = &verdict {
        assert_eq!((facts.entries, facts.bytes, facts.violations), (covered, *bytes as u64, *violations));
        assert!(covered <= made.good, "an entry whose template hash is not of its data");
        let mut other = pcr.clone();
        other[0] ^= 1;
        assert!(parsers::ima_log(&made.bytes, Bank::Sha256, &other).is_err(), "accepted for another PCR 10 too");
    }
    Verdict::from(&verdict)
}

fn repeat(n: usize, mut next: impl FnMut(usize) -> Vec<u8>) -> Vec<u8> {
    let mut out = Vec::with_capacity(n);
    for number in 0.. {
        let entry = next(number);
        if out.len() + entry.len() > n {
            break;
        }
        out.extend(entry);
    }
    out
}

fn entry_of(data: &[u8]) -> Vec<u8> {
    logs::ima_entry(&logs::sha1(data), b"ima-ng", data)
}

fn file(path: &str) -> Vec<u8> {
    let digest = [b"sha256:\0".as_slice(), &logs::sha256(&[path.as_bytes()])].concat();
    entry_of(&logs::ima_fields(&[&digest, &[path.as_bytes(), &[0]].concat()]))
}

fn files(n: usize) -> Vec<u8> {
    repeat(n, |number| file(&format!("/usr/lib/x86_64-linux-gnu/libexample-{number}.so.1")))
}

fn same_file(n: usize) -> Vec<u8> {
    let one = file("/usr/bin/true");
    repeat(n, |_| one.clone())
}

fn violations(n: usize) -> Vec<u8> {
    let data = logs::ima_fields(&[b"sha256:\0................................", b"/var/log/journal\0"]);
    repeat(n, |_| logs::ima_entry(&[0; 20], b"ima-ng", &data))
}

fn empty_fields(n: usize) -> Vec<u8> {
    let one = entry_of(&logs::ima_fields(&[b"".as_slice(); 15]));
    repeat(n, |_| one.clone())
}

/// Says that 1 MiB of data follows, again and again, which is no entry's form.
fn endless(n: usize) -> Vec<u8> {
    let data = ima_head(1024 * 1024 - 1);
    let mut out = repeat(n, |_| data.clone());
    out.truncate(n.min(1024 * 1024));
    out
}

fn ima_head(length: u32) -> Vec<u8> {
    let mut out = logs::ima_entry(&[7; 20], b"ima-ng", &[]);
    out.truncate(out.len() - 4);
    out.extend(length.to_le_bytes());
    out
}

fn large_entries(n: usize) -> Vec<u8> {
    let one = entry_of(&logs::ima_fields(&[b"sha256:\0", &vec![b'k'; 1024 * 1024 - 64]]));
    repeat(n, |_| one.clone())
}
