use super::*;
use crate::store::AfterFlush;
use raft::{GetEntriesContext, Storage};
use std::fs;
use std::path::PathBuf;

struct Dir(PathBuf);
impl Dir {
    fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("ambit-log-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).unwrap();
        Self(dir)
    }
}
impl Drop for Dir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn entry(index: u64, term: u64) -> Entry {
    let mut e = Entry::default();
    (e.index, e.term) = (index, term);
    e.data = format!("entry {index} of term {term}, long enough to hit with a flipped byte").into_bytes().into();
    e
}

fn hard(term: u64, vote: u64, commit: u64) -> HardState {
    let mut h = HardState::default();
    (h.term, h.vote, h.commit) = (term, vote, commit);
    h
}

fn filled(dir: &Path) -> LogStore {
    LogStore::create(dir, 1).unwrap();
    let mut store = LogStore::open(dir, 1).unwrap();
    for n in 1..=100 {
        let batch =
            Batch { number: n, entries: vec![entry(n, 1)], hard_state: Some(hard(1, 1, n - 1)), must_sync: true };
        store.persist(batch).unwrap();
    }
    store
}

fn log_file(dir: &Path) -> PathBuf {
    fs::read_dir(dir.join("log"))
        .unwrap()
        .map(|e| e.unwrap().path())
        .find(|p| p.to_string_lossy().ends_with(".raftlog"))
        .unwrap()
}

#[test]
fn what_was_synced_comes_back() {
    let dir = Dir::new("back");
    drop(filled(&dir.0));
    let mut store = LogStore::open(&dir.0, 1).unwrap();
    assert_eq!((store.last(), store.incarnation()), (Base { index: 100, term: 1 }, 2));
    let all = store.entries(1, 101, None, GetEntriesContext::empty(false)).unwrap();
    assert_eq!(all, (1..=100).map(|n| entry(n, 1)).collect::<Vec<_>>());
    // A newer leader replaces a tail; the mark accepts that.
    let batch = Batch { number: 1, entries: vec![entry(91, 2)], hard_state: Some(hard(2, 2, 80)), must_sync: true };
    let receipt = store.persist(batch).unwrap();
    assert!(AfterFlush::new((), 1).open(&receipt).is_ok());
    assert_eq!((store.term_at(90), store.term_at(91), store.term_at(92)), (Some(1), Some(2), None));
    drop(store);
    assert_eq!(LogStore::open(&dir.0, 1).unwrap().last(), Base { index: 91, term: 2 });
}

#[test]
fn compaction_and_install_survive_a_restart() {
    let dir = Dir::new("compact");
    let mut store = filled(&dir.0);
    store.compact(60).unwrap();
    drop(store);
    let mut store = LogStore::open(&dir.0, 1).unwrap();
    assert_eq!((store.base(), store.first_index().unwrap()), (Base { index: 60, term: 1 }, 61));
    assert!(store.entries(60, 61, None, GetEntriesContext::empty(false)).is_err());
    assert_eq!(store.entries(61, 62, None, GetEntriesContext::empty(false)).unwrap(), vec![entry(61, 1)]);
    store.install(Base { index: 500, term: 7 }).unwrap();
    let batch = Batch { number: 1, entries: vec![entry(501, 7)], hard_state: None, must_sync: true };
    store.persist(batch).unwrap();
    drop(store);
    let store = LogStore::open(&dir.0, 1).unwrap();
    assert_eq!((store.base(), store.last()), (Base { index: 500, term: 7 }, Base { index: 501, term: 7 }));
    let state = store.initial_state().unwrap();
    assert_eq!((state.hard_state.term, state.hard_state.vote, state.hard_state.commit), (7, 0, 500));
}

#[test]
fn an_absent_or_foreign_store_is_named() {
    let dir = Dir::new("absent");
    assert!(matches!(LogStore::open(&dir.0, 1), Err(StoreError::Missing(_))));
    drop(filled(&dir.0));
    assert!(matches!(LogStore::create(&dir.0, 1), Err(StoreError::Exists(_))));
    assert!(matches!(LogStore::open(&dir.0, 2), Err(StoreError::OtherReplica { expected: 2, found: 1 })));
}

/// A power loss between making a store and syncing its folder's name: there is none, and it can be made again.
#[test]
fn a_store_whose_rename_was_lost_was_never_made() {
    let dir = Dir::new("rename");
    LogStore::create(&dir.0, 1).unwrap();
    fs::rename(dir.0.join("log"), dir.0.join("log.new")).unwrap();
    assert!(matches!(LogStore::open(&dir.0, 1), Err(StoreError::Missing(_))));
    LogStore::create(&dir.0, 7).unwrap();
    assert_eq!(LogStore::open(&dir.0, 7).unwrap().incarnation(), 1);
    assert!(!dir.0.join("log.new").exists());
}

#[test]
fn two_on_one_folder_are_refused_and_it_is_not_called_damaged() {
    let dir = Dir::new("locked");
    let store = filled(&dir.0);
    assert!(matches!(LogStore::open(&dir.0, 1), Err(StoreError::Locked(_))));
    drop(store);
    LogStore::open(&dir.0, 1).unwrap();
}

/// A program that was just started has a copy of the descriptor of whoever started it, until it is the other program.
#[test]
fn a_lock_that_outlives_its_store_for_a_moment_is_waited_for() {
    let dir = Dir::new("outlived");
    drop(filled(&dir.0));
    let copy = std::fs::File::open(&dir.0).unwrap();
    copy.try_lock().unwrap();
    let ends = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(200));
        drop(copy);
    });
    LogStore::open(&dir.0, 1).unwrap();
    ends.join().unwrap();
}

/// A log of a later release, ours or raft-engine's, is named as one, and it is as it was.
#[test]
fn a_later_format_is_refused_and_left_alone() {
    let dir = Dir::new("later");
    let mut store = filled(&dir.0);
    let mut batch = LogBatch::default();
    put_u64(&mut batch, FORMAT, FORMAT_NOW + 1).unwrap();
    store.write(&mut batch).unwrap();
    drop(store);
    let before = fs::read(log_file(&dir.0)).unwrap();
    let refused = LogStore::open(&dir.0, 1).err().unwrap();
    assert!(matches!(refused, StoreError::Newer { found: 2, known: 1, .. }), "{refused}");
    assert_eq!(fs::read(log_file(&dir.0)).unwrap(), before);

    let dir = Dir::new("later-engine");
    drop(filled(&dir.0));
    let file = log_file(&dir.0);
    let mut bytes = fs::read(&file).unwrap();
    // Behind the magic comes the version, eight bytes.
    bytes[60] = 3;
    fs::write(&file, &bytes).unwrap();
    let refused = LogStore::open(&dir.0, 1).err().unwrap();
    assert!(matches!(refused, StoreError::Newer { found: 3, known: 2, .. }), "{refused}");
    assert_eq!(fs::read(&file).unwrap(), bytes);
}

/// I14: every place of the file, also the very last record, which raft-engine would cut off as a torn write.
#[test]
fn damage_anywhere_is_refused_and_never_a_panic() {
    let dir = Dir::new("damage");
    drop(filled(&dir.0));
    let file = log_file(&dir.0);
    let good = fs::read(&file).unwrap();
    let end = good.iter().rposition(|b| *b != 0).unwrap();
    for at in (0..=end).step_by(211).chain([end - 60, end - 8, end]) {
        let mut bad = good.clone();
        bad[at] ^= 0x40;
        fs::write(&file, &bad).unwrap();
        match LogStore::open(&dir.0, 1) {
            Err(StoreError::Damaged { .. }) => {}
            Err(other) => panic!("flip at {at} of {end}: {other}"),
            Ok(store) => panic!("flip at {at} of {end}: opened, last {:?}", store.last()),
        }
        restore(&dir.0, &file, &good);
    }
    for keep in [0, end / 2, end - 1] {
        fs::write(&file, &good[..keep]).unwrap();
        assert!(matches!(LogStore::open(&dir.0, 1), Err(StoreError::Damaged { .. })), "cut at {keep}");
        restore(&dir.0, &file, &good);
    }
    LogStore::open(&dir.0, 1).unwrap();
}

#[test]
fn a_torn_write_after_the_last_sync_is_cut() {
    let dir = Dir::new("torn");
    drop(filled(&dir.0));
    let file = log_file(&dir.0);
    let mut torn = fs::read(&file).unwrap();
    torn.truncate(torn.iter().rposition(|b| *b != 0).unwrap() + 1);
    torn.extend([0x00, 0x00, 0x00, 0x00, 0x01, 0x22, 0x33]);
    fs::write(&file, &torn).unwrap();
    assert_eq!(LogStore::open(&dir.0, 1).unwrap().last(), Base { index: 100, term: 1 });
}

/// Undoes what an attempt to open may have cut or added.
fn restore(dir: &Path, file: &Path, good: &[u8]) {
    for other in fs::read_dir(dir.join("log")).unwrap().map(|e| e.unwrap().path()) {
        let _ = fs::remove_file(other);
    }
    fs::write(file, good).unwrap();
}
