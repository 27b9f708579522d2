//! The fault list against the real raft-engine, by the contract of [`super::disk`]: what a receipt was given for is there
//! after any crash, what is on its way is there wholly or not at all, and damage is an error, never other contents (I14).
//!
//! The oracle is a list of steps and a plain vector; it knows nothing of files.

use super::faulty::{Dice, FaultyDisk, Tear};
use super::log::{Base, Batch, LogStore, Sizes};
use super::model::{Fault, ModelDisk, Part};
use super::{Disk, Log, StoreError};
use raft::GetEntriesContext;
use raft::eraftpb::{Entry, HardState};
use raft_engine::ReadableSize;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// So small that a few steps fill, give back and use again several files.
const SIZES: Sizes = Sizes { file: ReadableSize::kb(8), purge: ReadableSize::kb(24) };

pub(super) type Store = LogStore<FaultyDisk>;

#[derive(Clone, Debug)]
pub(super) enum Step {
    Append { entries: Vec<Entry>, hard: HardState },
    Vote(HardState),
    Commit(HardState),
    Compact(u64),
    Install(Base),
}

/// What a log that did the steps holds.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Held {
    pub(super) base: Base,
    pub(super) entries: Vec<Entry>,
    /// Term and vote; the commit index need not be on disk.
    pub(super) elected: (u64, u64),
    pub(super) commit: u64,
}

impl Held {
    pub(super) fn last(&self) -> Base {
        self.entries.last().map_or(self.base, |e| Base { index: e.index, term: e.term })
    }

    pub(super) fn after(&self, step: &Step) -> Held {
        let mut next = self.clone();
        match step {
            Step::Append { entries, hard } => {
                next.entries.retain(|e| e.index < entries[0].index);
                next.entries.extend(entries.iter().cloned());
                (next.elected, next.commit) = ((hard.term, hard.vote), hard.commit);
            }
            Step::Vote(hard) | Step::Commit(hard) => {
                (next.elected, next.commit) = ((hard.term, hard.vote), hard.commit);
            }
            Step::Compact(index) => {
                let term = self.entries.iter().find(|e| e.index == *index).unwrap().term;
                next.base = Base { index: *index, term };
                next.entries.retain(|e| e.index > *index);
            }
            Step::Install(base) => {
                (next.base, next.commit) = (*base, base.index);
                next.entries.clear();
                if next.elected.0 < base.term {
                    next.elected = (base.term, 0);
                }
            }
        }
        next
    }

    pub(super) fn of(store: &impl Log) -> Held {
        let state = store.initial_state().unwrap();
        let (base, last) = (store.base(), store.last());
        let entries = if last.index > base.index {
            store.entries(base.index + 1, last.index + 1, None, GetEntriesContext::empty(false)).unwrap()
        } else {
            Vec::new()
        };
        let hard = state.hard_state;
        Held { base, entries, elected: (hard.term, hard.vote), commit: hard.commit }
    }

    /// Equal but for a commit index that may lag.
    pub(super) fn is_kept_by(&self, found: &Held) -> bool {
        let found_as_here = Held { commit: self.commit, ..found.clone() };
        found_as_here == *self && found.commit <= self.commit
    }
}

fn hard(elected: (u64, u64), commit: u64) -> HardState {
    let mut hard = HardState::default();
    (hard.term, hard.vote, hard.commit) = (elected.0, elected.1, commit);
    hard
}

/// As raft would ask for it: appends, now and then on another tail in a newer term, commits, compactions, one snapshot.
pub(super) fn steps(count: usize, dice: &mut Dice) -> Vec<Step> {
    let (mut held, mut steps) = (Held { elected: (1, 1), ..Held::default() }, vec![Step::Vote(hard((1, 1), 0))]);
    while steps.len() < count {
        let step = match dice.below(20) {
            0 => Step::Vote(hard((held.elected.0 + 1, dice.below(3) + 1), held.commit)),
            1..=5 if held.commit < held.last().index => {
                Step::Commit(hard(held.elected, held.last().index - dice.below(2)))
            }
            6 if held.commit > held.base.index + 1 => Step::Compact(held.commit - 1),
            7 if steps.len() * 3 > count && held.base.index < 1_000 => {
                Step::Install(Base { index: held.last().index + 1_000, term: held.elected.0 })
            }
            _ => {
                let (from, elected) = match dice.below(8) {
                    0 => (held.commit.max(held.base.index) + 1, (held.elected.0 + 1, dice.below(3) + 1)),
                    _ => (held.last().index + 1, held.elected),
                };
                let entries = (from..=from + dice.below(4)).map(|index| entry(index, elected.0, dice)).collect();
                Step::Append { entries, hard: hard(elected, held.commit) }
            }
        };
        if matches!(&step, Step::Commit(h) if h.commit <= held.commit) {
            continue;
        }
        held = held.after(&step);
        steps.push(step);
    }
    steps
}

fn entry(index: u64, term: u64, dice: &mut Dice) -> Entry {
    let mut entry = Entry::default();
    (entry.index, entry.term) = (index, term);
    // Now and then so much that raft-engine compresses the batch.
    let length = if dice.below(16) == 0 { 9_000 } else { 20 + dice.below(700) };
    entry.data = (0..length).map(|at| (at * index + dice.below(16)) as u8).collect::<Vec<_>>().into();
    entry
}

/// An error means that the process ends.
pub(super) fn perform(store: &mut impl Log, number: u64, step: &Step) -> Result<(), StoreError> {
    let batch = |entries: &[Entry], hard: &HardState, must_sync| Batch {
        number,
        entries: entries.to_vec(),
        hard_state: Some(hard.clone()),
        must_sync,
    };
    let receipt = match step {
        Step::Append { entries, hard } => store.persist(batch(entries, hard, true))?,
        Step::Vote(hard) => store.persist(batch(&[], hard, true))?,
        Step::Commit(hard) => store.persist(batch(&[], hard, false))?,
        Step::Compact(index) => return store.compact(*index),
        Step::Install(base) => return store.install(*base),
    };
    assert_eq!(receipt.batch(), number);
    Ok(())
}

/// A folder in memory: only names are in it.
pub(super) struct Dir(pub(super) PathBuf);

impl Dir {
    pub(super) fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let shm = Path::new("/dev/shm");
        let parent = if shm.is_dir() { shm.to_owned() } else { std::env::temp_dir() };
        let dir = parent.join(format!("ambit-faults-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed)));
        std::fs::create_dir_all(&dir).unwrap();
        Self(dir)
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

struct Lab {
    dir: Dir,
    disk: FaultyDisk,
}

impl Lab {
    /// A new store, durable.
    fn new() -> Self {
        let (dir, disk) = (Dir::new(), FaultyDisk::default());
        Store::create_on(Arc::new(disk.clone()), SIZES, &dir.0, 1).unwrap();
        disk.settle_in(&dir.0.join("log"));
        Self { dir, disk }
    }

    fn open(&self) -> Result<Store, StoreError> {
        Store::open_on(Arc::new(self.disk.clone()), SIZES, &self.dir.0, 1)
    }

    /// Another one with the same files, as a process that was started again finds them: the store of one that failed keeps
    /// its lock until its process ends.
    fn copied(&self) -> Self {
        let dir = Dir::new();
        std::fs::create_dir(dir.0.join("log")).unwrap();
        let disk = self.disk.copied_to(&dir.0.join("log"));
        Self { dir, disk }
    }
}

/// What was promised, and what may be there beside it.
struct Run {
    acknowledged: Held,
    under_way: Held,
}

/// Does the steps until the power goes or one fails.
fn run(lab: &Lab, store: &mut Store, from: Held, steps: &[Step]) -> (Run, Option<StoreError>) {
    let mut held = from;
    for (number, step) in steps.iter().enumerate() {
        let next = held.after(step);
        let outcome = perform(store, number as u64 + 1, step);
        if lab.disk.is_off() || outcome.is_err() {
            return (Run { acknowledged: held, under_way: next }, outcome.err());
        }
        held = next;
    }
    (Run { acknowledged: held.clone(), under_way: held }, None)
}

/// A store that failed touches its files no more.
fn end(lab: &Lab, store: Store, failed: bool) {
    let before = lab.disk.steps();
    drop(store);
    assert_eq!(lab.disk.steps() == before, failed);
}

fn must_keep(run: &Run, found: &Held, what: &str) {
    let kept = run.acknowledged.is_kept_by(found) || run.under_way.is_kept_by(found);
    assert!(kept, "{what}: acknowledged {:?}, under way {:?}, found {found:?}", run.acknowledged, run.under_way);
}

/// Unsynced loss and torn writes at 512 B and 4 KiB, with the power going at every single step towards the disk, also in
/// the middle of recovering from the last time. Renames and new files of raft-engine that were not followed by a sync of
/// the folder are lost too.
#[test]
fn whenever_the_power_goes_what_was_acknowledged_is_there_and_the_rest_wholly_or_not() {
    let (mut crashes, mut moves) = (0, 0);
    for seed in 1..=3 {
        let script = steps(60, &mut Dice(seed));
        let whole = Lab::new();
        let mut store = whole.open().unwrap();
        let (_, failed) = run(&whole, &mut store, Held::default(), &script);
        assert!(failed.is_none(), "{failed:?}");
        moves += whole.disk.moves();
        let files = whole.disk.files().len();
        assert!(files >= 4, "seed {seed} rotates too little: {files} files");
        drop(store);
        for cut in 0..whole.disk.steps() {
            let tears = [Tear::Nothing, Tear::Everything, Tear::Sectors(512), Tear::Sectors(4096)];
            let tear = tears[(cut + seed) as usize % tears.len()];
            crash_once(&script, cut, tear, seed);
            crashes += 1;
        }
    }
    println!("{crashes} power losses; without any, {moves} files were used again under another name");
    assert!(crashes > 500 && moves > 0, "{crashes} power losses, {moves} renames");
}

fn crash_once(script: &[Step], cut: u64, tear: Tear, seed: u64) {
    let what = format!("power cut after {cut} steps, {tear:?}, seed {seed}");
    let (lab, mut dice) = (Lab::new(), Dice(seed * 1_000 + cut));
    lab.disk.cut_after(cut);
    let mut store = lab.open().unwrap();
    let opened = if lab.disk.is_off() { 0 } else { store.incarnation() };
    let (done, _) = run(&lab, &mut store, Held::default(), script);
    drop(store);
    lab.disk.power_cycle(tear, &mut dice);
    // Once more, while it recovers.
    lab.disk.cut_after(dice.below(12));
    let reopened = lab.open();
    let known = reopened.as_ref().map_or(opened, |store| if lab.disk.is_off() { opened } else { store.incarnation() });
    drop(reopened);
    lab.disk.power_cycle(tear, &mut dice);
    let mut store = lab.open().unwrap_or_else(|e| panic!("{what}: {e}"));
    assert!(store.incarnation() > known, "{what}: incarnation {} after {known}", store.incarnation());
    let found = Held::of(&store);
    must_keep(&done, &found, &what);
    // And it goes on from there.
    let step = Step::Append {
        entries: vec![entry(found.last().index + 1, found.elected.0.max(1), &mut dice)],
        hard: hard((found.elected.0.max(1), found.elected.1), found.commit),
    };
    perform(&mut store, 1, &step).unwrap();
    drop(store);
    assert!(found.after(&step).is_kept_by(&Held::of(&lab.open().unwrap())), "{what}: after going on");
}

/// Linux gives an error of fsync once and then calls the pages clean. There is no receipt, also not for what comes after in
/// the same process, and after a restart nothing that was acknowledged is missing.
#[test]
fn a_failed_sync_acknowledges_nothing() {
    let script = steps(60, &mut Dice(7));
    std::panic::set_hook(Box::new(|_| {}));
    for at in 1..script.len() {
        for tear in [Tear::Nothing, Tear::Everything] {
            let lab = Lab::new();
            let mut store = lab.open().unwrap();
            let (before, failed) = run(&lab, &mut store, Held::default(), &script[..at]);
            assert!(failed.is_none());
            lab.disk.fail_sync();
            let (after, failed) = run(&lab, &mut store, before.acknowledged, &script[at..]);
            // The steps from there on may all be commits, which are not written.
            let syncs = script[at..].iter().any(|step| !matches!(step, Step::Commit(_)));
            assert_eq!(matches!(failed, Some(StoreError::Io { .. })), syncs, "at {at}: {failed:?}");
            end(&lab, store, failed.is_some());
            let lab = lab.copied();
            lab.disk.power_cycle(tear, &mut Dice(1));
            must_keep(&after, &Held::of(&lab.open().unwrap()), &format!("sync failed at {at}, {tear:?}"));
        }
    }
    let _ = std::panic::take_hook();
}

/// However much room is left: an error, no acknowledgement, no panic; while it is full the store does not open and is not
/// called damaged; with room again everything is there.
#[test]
fn a_full_disk_costs_the_process_and_nothing_else() {
    let script = steps(60, &mut Dice(11));
    let mut full = 0;
    for room in (0..40_000).step_by(487) {
        let lab = Lab::new();
        let mut store = lab.open().unwrap();
        lab.disk.set_room(Some(room));
        let (done, failed) = run(&lab, &mut store, Held::default(), &script);
        match failed {
            Some(StoreError::Engine { .. } | StoreError::Io { .. }) => full += 1,
            Some(other) => panic!("{room} bytes of room: {other:?}"),
            None => continue,
        }
        end(&lab, store, true);
        let lab = lab.copied();
        lab.disk.set_room(Some(0));
        match lab.open() {
            // raft-engine cut what did not fit: that made room for the few bytes of opening.
            Ok(store) => must_keep(&done, &Held::of(&store), "full"),
            Err(StoreError::Engine { .. } | StoreError::Io { .. }) => {}
            Err(other) => panic!("{room} bytes of room, opening while full: {other:?}"),
        }
        let lab = lab.copied();
        must_keep(&done, &Held::of(&lab.open().unwrap()), &format!("{room} bytes of room"));
    }
    assert!(full > 20, "{full} runs of the disk's end");
}

/// Nothing is written, nothing is called damaged, and once it can be written again everything is there.
#[test]
fn a_read_only_disk_does_not_open_and_is_not_called_damaged() {
    let lab = Lab::new();
    let mut store = lab.open().unwrap();
    let (before, _) = run(&lab, &mut store, Held::default(), &steps(30, &mut Dice(5)));
    lab.disk.set_read_only(true);
    let step = Step::Vote(hard((before.acknowledged.elected.0 + 1, 3), before.acknowledged.commit));
    assert!(perform(&mut store, 99, &step).is_err());
    drop(store);
    let lab = lab.copied();
    lab.disk.set_read_only(true);
    match lab.open() {
        Err(StoreError::Engine { .. } | StoreError::Io { .. }) => {}
        Err(other) => panic!("{other:?}"),
        Ok(_) => panic!("opened a disk that takes no write"),
    }
    lab.disk.set_read_only(false);
    assert!(before.acknowledged.is_kept_by(&Held::of(&lab.open().unwrap())));
}

fn newest(lab: &Lab) -> OsString {
    let logs = lab.disk.files().into_iter().map(|(name, _)| name);
    logs.filter(|name| name.to_string_lossy().ends_with(".raftlog")).max().unwrap()
}

/// A full log with its mark, and the same after a power loss that the mark's page did not survive.
fn filled() -> (Lab, Held) {
    let lab = Lab::new();
    let mut store = lab.open().unwrap();
    let script = steps(70, &mut Dice(3));
    let (mut done, failed) = run(&lab, &mut store, Held::default(), &script);
    assert!(failed.is_none());
    // Several records in the newest file, the last of them with an entry.
    let (mut file, mut records) = (newest(&lab), 0);
    while records < 6 {
        let mut small = Entry::default();
        (small.index, small.term) = (done.acknowledged.last().index + 1, done.acknowledged.elected.0);
        small.data = vec![7; 100].into();
        let hard = hard(done.acknowledged.elected, done.acknowledged.commit);
        let step = Step::Append { entries: vec![small], hard };
        perform(&mut store, 1, &step).unwrap();
        done.acknowledged = done.acknowledged.after(&step);
        records = if newest(&lab) == file { records + 1 } else { 0 };
        file = newest(&lab);
    }
    drop(store);
    (lab, done.acknowledged)
}

/// Bit flips and cuts in every file of the log, the mark being whole: refused, or of no consequence (a file that holds
/// nothing any more), never other contents.
#[test]
fn a_flipped_bit_below_the_mark_is_refused() {
    let (lab, held) = filled();
    let (mut refused, mut harmless) = (0, 0);
    for (name, length) in lab.disk.files() {
        for at in (0..length).step_by(61).chain(length.checked_sub(1)) {
            let copy = lab.copied();
            let mut bytes = copy.disk.contents(&name);
            bytes[at] ^= 1 << (at % 8);
            copy.disk.put(&name, bytes);
            match copy.open() {
                Err(StoreError::Damaged { .. }) => refused += 1,
                Err(other) => panic!("{name:?} flipped at {at}: {other:?}"),
                Ok(store) => {
                    assert!(held.is_kept_by(&Held::of(&store)), "{name:?} flipped at {at}: {:?}", Held::of(&store));
                    harmless += 1;
                }
            }
        }
    }
    println!("{refused} flips refused, {harmless} in entries that were compacted away");
    assert!(refused > 100, "{refused} refused, {harmless} of no consequence");
}

/// The mark is not synced, so a power loss may leave an old one. Then damage to the very last record cannot be told from a
/// torn write, and is cut like one; damage to any other must be refused all the same.
#[test]
fn a_flipped_bit_before_a_later_record_is_refused_also_without_the_mark() {
    let (lab, held) = filled();
    lab.disk.power_cycle(Tear::Nothing, &mut Dice(1));
    let newest = newest(&lab);
    let good = lab.disk.contents(&newest);
    let before_last = Held { entries: held.entries[..held.entries.len() - 1].to_vec(), ..held.clone() };
    let (mut refused, mut harmless, mut cut) = (0, 0, Vec::new());
    for at in 0..good.len() {
        let copy = lab.copied();
        let mut bytes = good.clone();
        bytes[at] ^= 1 << (at % 8);
        copy.disk.put(&newest, bytes);
        match copy.open() {
            Err(StoreError::Damaged { .. }) => refused += 1,
            Err(other) => panic!("flipped at {at}: {other:?}"),
            Ok(store) => {
                let found = Held::of(&store);
                if held.is_kept_by(&found) {
                    // Of the file's header, eight bytes say nothing to this version.
                    harmless += 1;
                    continue;
                }
                assert!(before_last.is_kept_by(&found), "flipped at {at} of {}: {:?}", good.len(), found.last());
                cut.push(at);
            }
        }
    }
    for (name, length) in lab.disk.files().into_iter().filter(|(name, _)| *name != newest) {
        for at in (0..length).step_by(37) {
            let copy = lab.copied();
            let mut bytes = copy.disk.contents(&name);
            bytes[at] ^= 1 << (at % 8);
            copy.disk.put(&name, bytes);
            match copy.open() {
                Err(StoreError::Damaged { .. } | StoreError::Newer { .. }) => {}
                Err(other) => panic!("{name:?} flipped at {at}: {other:?}"),
                Ok(store) => assert!(held.is_kept_by(&Held::of(&store)), "{name:?} flipped at {at}"),
            }
        }
    }
    // One run of bytes up to the end of the file: the last record.
    let from = *cut.first().unwrap();
    assert_eq!(cut, (from..good.len()).collect::<Vec<_>>(), "{refused} refused");
    assert!(from > good.len() / 2 && refused > good.len() / 2, "{refused} refused, the last record begins at {from}");
    assert!(harmless <= 8, "{harmless}");
}

/// The simulator's disk answers the same steps and faults by the same contract. (It may also lose a commit index that it
/// wrote without a sync; the real log writes none.)
#[test]
fn the_model_keeps_the_same_contract() {
    let script = steps(60, &mut Dice(7));
    for at in 1..script.len() {
        for fault in [Fault::DieBefore, Fault::DieAfter, Fault::SyncError, Fault::Full] {
            let (disk, mut dice) = (ModelDisk::default(), Dice(at as u64));
            disk.create_log(1).unwrap();
            let mut store = disk.open_log(1).unwrap();
            let (mut held, mut under_way) = (Held::default(), Held::default());
            for (number, step) in script.iter().enumerate() {
                if number == at {
                    disk.arm(fault);
                }
                under_way = held.after(step);
                if perform(&mut store, number as u64 + 1, step).is_err() {
                    break;
                }
                held = under_way.clone();
            }
            assert!(disk.is_dead(), "{fault:?} at {at}");
            if fault == Fault::Full {
                assert!(matches!(disk.open_log(1), Err(StoreError::Io { .. })));
                disk.make_good();
            }
            disk.crash(&mut |below| dice.below(below));
            let found = Held::of(&disk.open_log(1).unwrap());
            must_keep(&Run { acknowledged: held, under_way }, &found, &format!("{fault:?} at {at}"));
        }
    }
    let disk = ModelDisk::default();
    disk.create_log(1).unwrap();
    assert!(disk.damage(Part::Log));
    assert!(matches!(disk.open_log(1), Err(StoreError::Damaged { .. })));
}

/// A file of the log, its mark, or all of it.
#[test]
fn a_lost_file_or_folder_is_named() {
    let (lab, held) = filled();
    let mut refused = 0;
    for (name, _) in lab.disk.files() {
        let copy = lab.copied();
        copy.disk.lose(&name);
        match copy.open() {
            Err(StoreError::Damaged { .. }) => refused += 1,
            Err(other) => panic!("without {name:?}: {other:?}"),
            Ok(store) => assert!(held.is_kept_by(&Held::of(&store)), "without {name:?}"),
        }
    }
    assert!(refused >= 3, "{refused}");
    std::fs::remove_dir_all(lab.dir.0.join("log")).unwrap();
    assert!(matches!(lab.open(), Err(StoreError::Missing(_))));
}
