//! What the store asks of the kernel, seen by strace: not what our code says that it syncs, but what it does.
//!
//! The test runs itself under strace as the process that writes.

use super::fault_tests::Dir;
use super::log::{Batch, LogStore, Sizes};
use super::snapshot::SnapshotDir;
use super::tables::{Applied, Tables};
use super::{Log, Membership, Rows, Snapshots};
use ambit_state::TableWrite;
use raft::eraftpb::{Entry, HardState};
use raft_engine::ReadableSize;
use raft_engine::env::DefaultFileSystem;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

const DIR: &str = "AMBIT_TEST_SYSCALLS_DIR";
const APPENDS: u64 = 50;
const SNAPSHOTS: usize = 3;
const CHECKPOINTS: u64 = 4;

/// One call that succeeded: its name, and the files that it named.
#[derive(Debug)]
struct Call {
    name: String,
    files: Vec<String>,
}

impl Call {
    fn is(&self, names: &[&str], file: &str) -> bool {
        names.contains(&self.name.as_str()) && self.files.iter().any(|path| path.ends_with(file))
    }
}

/// Runs `test` of this program under strace, with `DIR` set, and gives the calls in their order.
fn traced(test: &str, dir: &Path) -> Vec<Call> {
    let out = dir.join("strace");
    let status = Command::new("strace")
        .args(["--follow-forks", "--decode-fds=path", "--successful-only", "--signal=none", "--quiet=all", "--output"])
        .arg(&out)
        .arg("--trace=fsync,fdatasync,sync_file_range,rename,renameat,renameat2")
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", test, "--test-threads=1"])
        .env(DIR, dir)
        .stdout(Stdio::null())
        .status()
        .expect("strace, which `cargo xtask deps` installs");
    assert!(status.success(), "{status}");
    std::fs::read_to_string(out).unwrap().lines().filter_map(parse).collect()
}

/// `PID name(3</a/path>, "/another", ...) = 0`. Asked for successful calls only, strace writes each when it is done, and whole.
fn parse(line: &str) -> Option<Call> {
    let (name, rest) = line.split_once(' ')?.1.trim_start().split_once('(')?;
    let quoted = rest.split('"').skip(1).step_by(2);
    let decoded = rest.split('<').skip(1).filter_map(|part| part.split('>').next());
    Some(Call { name: name.to_owned(), files: quoted.chain(decoded).map(str::to_owned).collect() })
}

fn write_all_parts(dir: &Path) {
    let sizes = Sizes { file: ReadableSize::kb(8), purge: ReadableSize::kb(24) };
    let files = || Arc::new(DefaultFileSystem);
    LogStore::create_on(files(), sizes, dir, 1).unwrap();
    let mut log = LogStore::open_on(files(), sizes, dir, 1).unwrap();
    for index in 1..=APPENDS {
        let (mut entry, mut hard) = (Entry::default(), HardState::default());
        (entry.index, entry.term, hard.term) = (index, 1, 1);
        entry.data = vec![7; 500].into();
        let batch = Batch { number: index, entries: vec![entry], hard_state: Some(hard), must_sync: true };
        log.persist(batch).unwrap();
    }
    drop(log);
    let snapshots = SnapshotDir::open(dir).unwrap();
    (0..SNAPSHOTS).for_each(|_| snapshots.write(b"what it holds is of no matter here").unwrap());
    let (mut tables, _) = Tables::open(dir, false).unwrap();
    for index in 1..=CHECKPOINTS {
        let applied = Applied { index, membership: Membership::of_founder(1), digest: [0; 32] };
        let rows = (0..100_u8).map(|key| TableWrite { table: 1, key: vec![key], value: Some(vec![index as u8; 300]) });
        if index == CHECKPOINTS {
            tables.replace(&applied, rows);
        } else {
            tables.write(&applied, rows.collect());
            tables.close();
        }
    }
}

/// Every append is one disk flush; a new log file's name and a snapshot's are flushed before they count; and what sled
/// leaves to `sync_file_range`, which is none, is flushed behind it.
#[test]
fn what_is_called_durable_was_flushed() {
    if let Ok(dir) = std::env::var(DIR) {
        return write_all_parts(Path::new(&dir));
    }
    let dir = Dir::new();
    let calls = traced("store::syscall_tests::what_is_called_durable_was_flushed", &dir.0);
    let sync = ["fsync", "fdatasync"];
    let count = |names: &[&str], file: &str| calls.iter().filter(|call| call.is(names, file)).count();

    // The log: one flush an append, beside those of creating, opening, and beginning new files.
    let appends = count(&["fdatasync"], ".raftlog") as u64;
    assert!((APPENDS..APPENDS + 20).contains(&appends), "{appends} flushes for {APPENDS} appends");
    // The folder is flushed between a new file's header and its first record.
    let newest = calls.iter().rposition(|call| call.is(&["fdatasync"], ".raftlog")).unwrap();
    let newest = calls[newest].files[0].clone();
    assert!(!newest.ends_with("0000000000000001.raftlog"), "one log file only");
    let of_newest: Vec<_> = (0..calls.len()).filter(|at| calls[*at].is(&sync, &newest)).collect();
    assert!(calls[of_newest[0]..of_newest[1]].iter().any(|call| call.is(&["fsync"], "/log")), "{of_newest:?}");

    // A snapshot: the file, the rename, the folder.
    let renames: Vec<_> = (0..calls.len()).filter(|at| calls[*at].is(&RENAMES, "current.snapshot")).collect();
    assert_eq!(renames.len(), SNAPSHOTS);
    for at in renames {
        assert!(calls[at - 1].is(&["fsync"], "next.tmp"), "{:?}", calls[at - 1]);
        assert!(calls[at + 1].is(&["fsync"], "/snapshot"), "{:?}", calls[at + 1]);
    }

    // The tables: sled's own flush is none. If that changes, the dealing with it can go.
    let ranges = count(&["sync_file_range"], "/tables/db") as u64;
    assert!(ranges >= CHECKPOINTS, "{ranges} calls of sync_file_range");
    assert!(count(&["fsync"], "/tables/db") as u64 >= CHECKPOINTS);
    assert!(count(&["fsync"], "/tables") as u64 >= CHECKPOINTS);
    let last_range = calls.iter().rposition(|call| call.is(&["sync_file_range"], "/tables/db")).unwrap();
    let behind = &calls[last_range..];
    assert!(behind.iter().any(|call| call.is(&["fsync"], "/tables/db")), "{behind:?}");
    assert!(behind.iter().any(|call| call.is(&["fsync"], "/tables")), "{behind:?}");
}

const RENAMES: [&str; 3] = ["rename", "renameat", "renameat2"];
