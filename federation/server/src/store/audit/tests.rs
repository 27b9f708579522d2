//! Whatever is cut off or spoilt of the files: what they say is what was appended, or less.

use super::{AuditFiles, Bodies};
use ambit_audit::record::Outcome;
use ambit_audit::tile::Tile;
use ambit_audit::{Frontier, Nodes, Record, leaf_hash};
use ambit_state::audit::AuditEntry;
use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

struct Folder(PathBuf);
impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("ambit-audit-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }
    fn file(&self, name: &str) -> PathBuf {
        self.0.join("audit/1").join(name)
    }
}
impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn entry(n: u64) -> AuditEntry {
    let record = Record {
        v: 1,
        epoch: 1,
        index: n + 10,
        at: 0,
        stamp_ms: 1,
        actor: "cell".into(),
        act: "test.write".into(),
        object: "x".repeat(n as usize % 90),
        outcome: Outcome::Done,
        code: String::new(),
        facts: Default::default(),
    };
    let bytes = record.encode();
    AuditEntry { epoch: 1, n, leaf: leaf_hash(&bytes), bytes }
}

fn frontier(size: u64) -> Frontier {
    let mut frontier = Frontier::default();
    (0..size).for_each(|n| frontier.push(entry(n).leaf));
    frontier
}

/// The files hold the first `size` records and their tree.
fn holds(files: &AuditFiles, size: u64) {
    assert_eq!(files.size(1).unwrap(), size);
    assert_eq!(files.frontier(1, size).unwrap(), frontier(size));
    files.check(1, &frontier(size)).unwrap();
    let read = files.read(1, 0, size, usize::MAX).unwrap();
    assert_eq!(read.len() as u64, size);
    for (n, bytes) in (0..).zip(read) {
        assert_eq!(bytes, entry(n).bytes, "record {n}");
    }
}

#[test]
fn what_was_appended_is_there_again() {
    let folder = Folder::new("again");
    for size in [1u64, 255, 256, 257, 700, 66_000] {
        let files = AuditFiles::at(&folder.0);
        let from = files.size(1).unwrap();
        files.append((from..size).map(entry).collect()).unwrap();
        holds(&files, size);
        if size == 700 {
            files.sync().unwrap();
        }
        holds(&AuditFiles::at(&folder.0), size);
    }
    let view = AuditFiles::at(&folder.0).view(1).unwrap();
    let root = view.node(16, 0).unwrap();
    assert_eq!(view.tile(Tile::Hashes(2, 0, 1), 66_000).unwrap().unwrap(), root);
    assert_eq!(view.tile(Tile::Hashes(1, 1, 1), 66_000).unwrap().unwrap(), view.node(8, 256).unwrap());
    assert!(view.tile(Tile::Hashes(1, 1, 1), 65_700).is_none(), "not of a smaller tree");
    assert!(view.tile(Tile::Hashes(0, 0, 256), 255).is_none());
    assert!(view.tile(Tile::Entries(0, 256), 66_000).is_none());
}

/// A process that died while it wrote: at each byte of the last records.
#[test]
fn a_torn_tail_is_cut() {
    let folder = Folder::new("torn");
    let files = AuditFiles::at(&folder.0);
    files.append((0..300).map(entry).collect()).unwrap();
    let whole = std::fs::metadata(folder.file("entries")).unwrap().len();
    drop(files);
    for cut in 1..400 {
        OpenOptions::new().write(true).open(folder.file("entries")).unwrap().set_len(whole - cut).unwrap();
        let files = AuditFiles::at(&folder.0);
        let size = files.size(1).unwrap();
        assert!((296..300).contains(&size), "{size}");
        holds(&files, size);
        files.append((size..300).map(entry).collect()).unwrap();
        holds(&files, 300);
    }
}

/// After a loss of power what was not synced may be anything.
#[test]
fn what_was_not_synced_is_judged_again() {
    let folder = Folder::new("power");
    let files = AuditFiles::at(&folder.0);
    files.append((0..400).map(entry).collect()).unwrap();
    files.sync().unwrap();
    files.append((400..900).map(entry).collect()).unwrap();
    drop(files);
    let zero = |name: &str, at: u64, len: usize| {
        OpenOptions::new().write(true).open(folder.file(name)).unwrap().write_all_at(&vec![0; len], at).unwrap();
    };
    zero("hashes-0", 32 * 500, 32 * 400);
    zero("hashes-1", 32 * 2, 32);
    zero("starts", 16, 16);
    holds(&AuditFiles::at(&folder.0), 900);
    // A record of the tail is another one, well formed: the cell's tree tells.
    let bytes = std::fs::read(folder.file("entries")).unwrap();
    let needle = br#""index":810,"#;
    let at = bytes.windows(needle.len()).position(|w| w == needle).unwrap();
    let file = OpenOptions::new().write(true).open(folder.file("entries")).unwrap();
    file.write_all_at(br#""index":811,"#, at as u64).unwrap();
    let files = AuditFiles::at(&folder.0);
    files.check(1, &frontier(900)).unwrap();
    holds(&files, 400);
    files.append((400..900).map(entry).collect()).unwrap();
    holds(&files, 900);
    // Of what was synced no more is believed, and nothing mended in silence.
    files.sync().unwrap();
    let file = OpenOptions::new().write(true).open(folder.file("hashes-0")).unwrap();
    file.write_all_at(&[1; 32], 32 * 899).unwrap();
    let files = AuditFiles::at(&folder.0);
    assert!(files.check(1, &frontier(900)).is_err());
}

/// Applied again after a start, and applied while older ones are missing.
#[test]
fn records_come_again_and_late() {
    let folder = Folder::new("late");
    let files = AuditFiles::at(&folder.0);
    files.append((0..10).map(entry).collect()).unwrap();
    files.append((5..12).map(entry).collect()).unwrap();
    holds(&files, 12);
    files.append((20..30).map(entry).collect()).unwrap();
    assert_eq!(files.size(1).unwrap(), 12);
    assert_eq!(files.fill(1, 12, (12..20).map(|n| entry(n).bytes).collect()).unwrap(), 30);
    holds(&files, 30);
    // What the log of Raft makes is what the cell agreed on.
    let other = |n| AuditEntry { n, ..entry(n + 1_000) };
    files.append((25..27).map(other).collect()).unwrap();
    assert_eq!(files.size(1).unwrap(), 27);
    assert_eq!(files.read(1, 25, 26, 1).unwrap(), [entry(1_025).bytes]);
}
