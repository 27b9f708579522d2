//! Files with the faults of real disks, under the real raft-engine: contents in memory, names in a real folder.
//!
//! A sync makes one file's contents durable. Names (made, renamed, removed) become durable in their order, at the latest with
//! the first write after a sync that followed them: raft-engine's own sync of the folder goes past this trait, so that it
//! happens at all is for the test that counts system calls.

use raft_engine::env::{FileSystem, Handle, Permission, WriteExt};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::io::{Error, ErrorKind, Read, Result, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

/// What a power loss leaves of writes that were not synced.
#[derive(Clone, Copy, Debug)]
pub(super) enum Tear {
    Nothing,
    Everything,
    /// Of each sector of so many bytes chance says how much of it got there.
    Sectors(usize),
}

/// Chance, reproducible.
#[derive(Clone, Debug)]
pub(super) struct Dice(pub(super) u64);

impl Dice {
    pub(super) fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

#[derive(Clone, Debug)]
enum Op {
    Write(usize, Vec<u8>),
    Length(usize),
}

#[derive(Clone, Debug, Default)]
struct Contents {
    now: Vec<u8>,
    durable: Vec<u8>,
    unsynced: Vec<Op>,
}

#[derive(Clone, Debug)]
enum Named {
    Made(OsString),
    Moved(OsString, OsString, Option<usize>),
    Removed(OsString, usize),
}

#[derive(Debug, Default)]
struct Inner {
    dir: PathBuf,
    names: BTreeMap<OsString, usize>,
    contents: Vec<Contents>,
    unsettled: Vec<Named>,
    moves: u64,
    settles: bool,
    /// Steps until the power goes.
    fuse: Option<u64>,
    steps: u64,
    off: Option<BTreeMap<OsString, usize>>,
    fails_sync: bool,
    /// Bytes that still fit.
    room: Option<usize>,
    read_only: bool,
}

/// One disk; clones are the same.
#[derive(Clone, Debug, Default)]
pub(super) struct FaultyDisk(Arc<Mutex<Inner>>);

fn name_of(path: &Path) -> OsString {
    path.file_name().unwrap_or_default().to_owned()
}

fn apply(contents: &mut Vec<u8>, op: &Op) {
    match op {
        Op::Write(at, bytes) => {
            contents.resize(contents.len().max(at + bytes.len()), 0);
            contents[*at..at + bytes.len()].copy_from_slice(bytes);
        }
        Op::Length(length) => contents.resize(*length, 0),
    }
}

impl Inner {
    /// One step towards a disk. Whether the power is still on after it.
    fn step(&mut self) -> bool {
        self.steps += 1;
        if std::mem::take(&mut self.settles) {
            self.unsettled.clear();
        }
        if self.fuse.is_some_and(|fuse| self.steps > fuse) && self.off.is_none() {
            self.off = Some(self.names.clone());
        }
        self.off.is_none()
    }

    fn change(&mut self, file: usize, op: Op) {
        // The last step before the power goes may have got to the disk in part.
        let on = self.off.is_none();
        self.step();
        let contents = &mut self.contents[file];
        let before = contents.now.len();
        apply(&mut contents.now, &op);
        if let Some(room) = &mut self.room {
            *room = (*room + before).saturating_sub(contents.now.len());
        }
        if on {
            contents.unsynced.push(op);
        }
    }

    fn real(&self, name: &OsString) -> PathBuf {
        self.dir.join(name)
    }
}

impl FaultyDisk {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap()
    }

    /// From now on the files are in `dir`, and what was done is durable.
    pub(super) fn settle_in(&self, dir: &Path) {
        let mut disk = self.inner();
        disk.dir = dir.to_owned();
        disk.unsettled.clear();
        for contents in &mut disk.contents {
            contents.durable = contents.now.clone();
            contents.unsynced.clear();
        }
        (disk.steps, disk.settles) = (0, false);
    }

    /// The power goes after so many more steps.
    pub(super) fn cut_after(&self, steps: u64) {
        let mut disk = self.inner();
        disk.fuse = Some(disk.steps + steps);
    }

    pub(super) fn is_off(&self) -> bool {
        self.inner().off.is_some()
    }

    pub(super) fn steps(&self) -> u64 {
        self.inner().steps
    }

    /// Files that got another name.
    pub(super) fn moves(&self) -> u64 {
        self.inner().moves
    }

    /// The next sync fails, and as on Linux the pages are then clean and lost.
    pub(super) fn fail_sync(&self) {
        self.inner().fails_sync = true;
    }

    pub(super) fn set_room(&self, bytes: Option<usize>) {
        self.inner().room = bytes;
    }

    pub(super) fn set_read_only(&self, read_only: bool) {
        self.inner().read_only = read_only;
    }

    /// The machine stops and starts again.
    pub(super) fn power_cycle(&self, tear: Tear, dice: &mut Dice) {
        let mut disk = self.inner();
        if let Some(names) = disk.off.take() {
            disk.names = names;
        }
        let kept = match tear {
            Tear::Nothing => 0,
            Tear::Everything => disk.unsettled.len(),
            Tear::Sectors(_) => dice.below(disk.unsettled.len() as u64 + 1) as usize,
        };
        for named in std::mem::take(&mut disk.unsettled).drain(kept..).rev() {
            disk.undo(named);
        }
        for contents in &mut disk.contents {
            let image = torn(contents, tear, dice);
            *contents = Contents { now: image.clone(), durable: image, unsynced: Vec::new() };
        }
        (disk.fuse, disk.settles, disk.fails_sync) = (None, false, false);
    }

    /// The names of its files, and how long each is.
    pub(super) fn files(&self) -> Vec<(OsString, usize)> {
        let disk = self.inner();
        disk.names.iter().map(|(name, file)| (name.clone(), disk.contents[*file].now.len())).collect()
    }

    /// What is in a file, as it would be after a restart.
    pub(super) fn contents(&self, name: &OsString) -> Vec<u8> {
        let disk = self.inner();
        disk.contents[disk.names[name]].now.clone()
    }

    /// Other contents, durable.
    pub(super) fn put(&self, name: &OsString, bytes: Vec<u8>) {
        let mut disk = self.inner();
        let file = disk.names[name];
        disk.contents[file] = Contents { now: bytes.clone(), durable: bytes, unsynced: Vec::new() };
    }

    /// The same disk again, with its real names in another folder.
    pub(super) fn copied_to(&self, dir: &Path) -> FaultyDisk {
        let disk = self.inner();
        for name in disk.names.keys() {
            fs::write(dir.join(name), []).unwrap();
        }
        FaultyDisk(Arc::new(Mutex::new(Inner {
            dir: dir.to_owned(),
            names: disk.names.clone(),
            contents: disk.contents.clone(),
            unsettled: disk.unsettled.clone(),
            ..Inner::default()
        })))
    }

    /// One file is gone.
    pub(super) fn lose(&self, name: &OsString) {
        let mut disk = self.inner();
        disk.names.remove(name).unwrap();
        let _ = fs::remove_file(disk.real(name));
    }
}

/// What is on the disk of a file whose writes were not synced. A sector is written from memory as a whole, at some moment:
/// chance says after which of the writes. The length is one thing more that is as old as it may be.
fn torn(contents: &Contents, tear: Tear, dice: &mut Dice) -> Vec<u8> {
    let mut versions = vec![contents.durable.clone()];
    for op in &contents.unsynced {
        let mut next = versions.last().cloned().unwrap_or_default();
        apply(&mut next, op);
        versions.push(next);
    }
    let size = match tear {
        Tear::Nothing => return versions.swap_remove(0),
        Tear::Everything => return versions.pop().unwrap_or_default(),
        Tear::Sectors(size) => size,
    };
    let chosen = |dice: &mut Dice| dice.below(versions.len() as u64) as usize;
    let mut image = vec![0; versions[chosen(dice)].len()];
    for (number, sector) in image.chunks_mut(size).enumerate() {
        let version = &versions[chosen(dice)];
        let there = version.get(number * size..).unwrap_or_default();
        let length = there.len().min(sector.len());
        sector[..length].copy_from_slice(&there[..length]);
    }
    image
}

impl Inner {
    fn undo(&mut self, named: Named) {
        match named {
            Named::Made(name) => {
                self.names.remove(&name);
                let _ = fs::remove_file(self.real(&name));
            }
            Named::Moved(from, to, replaced) => {
                if let Some(file) = self.names.remove(&to) {
                    self.names.insert(from.clone(), file);
                    fs::rename(self.real(&to), self.real(&from)).unwrap();
                }
                if let Some(file) = replaced {
                    self.names.insert(to.clone(), file);
                    fs::write(self.real(&to), []).unwrap();
                }
            }
            Named::Removed(name, file) => {
                self.names.insert(name.clone(), file);
                fs::write(self.real(&name), []).unwrap();
            }
        }
    }
}

/// An open file and where it is read or written next.
pub(super) struct File {
    disk: FaultyDisk,
    file: usize,
    at: usize,
}

impl FileSystem for FaultyDisk {
    type Handle = File;
    type Reader = File;
    type Writer = File;

    fn create<P: AsRef<Path>>(&self, path: P) -> Result<File> {
        let mut disk = self.inner();
        if disk.read_only {
            return Err(ErrorKind::ReadOnlyFilesystem.into());
        }
        let on = disk.step();
        let name = name_of(path.as_ref());
        let file = match disk.names.get(&name) {
            Some(file) => *file,
            None => {
                disk.contents.push(Contents::default());
                let file = disk.contents.len() - 1;
                disk.names.insert(name.clone(), file);
                if on {
                    fs::write(path.as_ref(), [])?;
                    disk.unsettled.push(Named::Made(name));
                }
                file
            }
        };
        Ok(File { disk: self.clone(), file, at: 0 })
    }

    fn open<P: AsRef<Path>>(&self, path: P, permission: Permission) -> Result<File> {
        let disk = self.inner();
        if disk.read_only && permission == Permission::ReadWrite {
            return Err(ErrorKind::ReadOnlyFilesystem.into());
        }
        let file = *disk.names.get(&name_of(path.as_ref())).ok_or(ErrorKind::NotFound)?;
        Ok(File { disk: self.clone(), file, at: 0 })
    }

    fn delete<P: AsRef<Path>>(&self, path: P) -> Result<()> {
        let mut disk = self.inner();
        let on = disk.step();
        let name = name_of(path.as_ref());
        let file = disk.names.remove(&name).ok_or(ErrorKind::NotFound)?;
        if on {
            fs::remove_file(path.as_ref())?;
            disk.unsettled.push(Named::Removed(name, file));
        }
        Ok(())
    }

    fn rename<P: AsRef<Path>>(&self, from: P, to: P) -> Result<()> {
        let mut disk = self.inner();
        let on = disk.step();
        let (old, new) = (name_of(from.as_ref()), name_of(to.as_ref()));
        let file = disk.names.remove(&old).ok_or(ErrorKind::NotFound)?;
        let replaced = disk.names.insert(new.clone(), file);
        if on {
            fs::rename(from.as_ref(), to.as_ref())?;
            disk.unsettled.push(Named::Moved(old, new, replaced));
            disk.moves += 1;
        }
        Ok(())
    }

    fn new_reader(&self, handle: Arc<File>) -> Result<File> {
        Ok(File { disk: self.clone(), file: handle.file, at: 0 })
    }

    fn new_writer(&self, handle: Arc<File>) -> Result<File> {
        Ok(File { disk: self.clone(), file: handle.file, at: 0 })
    }
}

impl Handle for File {
    fn truncate(&self, length: usize) -> Result<()> {
        self.disk.inner().change(self.file, Op::Length(length));
        Ok(())
    }

    fn file_size(&self) -> Result<usize> {
        Ok(self.disk.inner().contents[self.file].now.len())
    }

    fn sync(&self) -> Result<()> {
        let mut disk = self.disk.inner();
        if disk.step() {
            let fails = std::mem::take(&mut disk.fails_sync);
            let contents = &mut disk.contents[self.file];
            let unsynced = std::mem::take(&mut contents.unsynced);
            if fails {
                return Err(Error::other("fdatasync"));
            }
            unsynced.iter().for_each(|op| apply(&mut contents.durable, op));
            disk.settles = true;
        }
        Ok(())
    }
}

impl Read for File {
    fn read(&mut self, out: &mut [u8]) -> Result<usize> {
        let disk = self.disk.inner();
        let rest = disk.contents[self.file].now.get(self.at..).unwrap_or_default();
        let read = rest.len().min(out.len());
        out[..read].copy_from_slice(&rest[..read]);
        self.at += read;
        Ok(read)
    }
}

impl Write for File {
    fn write(&mut self, bytes: &[u8]) -> Result<usize> {
        let mut disk = self.disk.inner();
        if disk.read_only {
            return Err(ErrorKind::ReadOnlyFilesystem.into());
        }
        let grows = (self.at + bytes.len()).saturating_sub(disk.contents[self.file].now.len());
        let fits = match disk.room {
            Some(room) if grows > room => bytes.len() - (grows - room),
            Some(_) | None => bytes.len(),
        };
        if fits > 0 {
            disk.change(self.file, Op::Write(self.at, bytes[..fits].to_vec()));
        }
        if fits < bytes.len() {
            // The text by which raft-engine knows it.
            return Err(Error::new(ErrorKind::StorageFull, "nospace"));
        }
        self.at += fits;
        Ok(fits)
    }

    fn flush(&mut self) -> Result<()> {
        Ok(())
    }
}

impl Seek for File {
    fn seek(&mut self, to: SeekFrom) -> Result<u64> {
        self.at = match to {
            SeekFrom::Start(at) => at as usize,
            SeekFrom::Current(by) => (self.at as i64 + by) as usize,
            SeekFrom::End(by) => (self.file_size()? as i64 + by) as usize,
        };
        Ok(self.at as u64)
    }
}

impl WriteExt for File {
    fn truncate(&mut self, length: usize) -> Result<()> {
        Handle::truncate(self, length)?;
        self.at = length;
        Ok(())
    }

    fn allocate(&mut self, at: usize, size: usize) -> Result<()> {
        let mut disk = self.disk.inner();
        let length = disk.contents[self.file].now.len().max(at + size);
        if disk.room.is_some_and(|room| room < length - disk.contents[self.file].now.len()) {
            return Err(Error::new(ErrorKind::StorageFull, "fallocate"));
        }
        disk.change(self.file, Op::Length(length));
        Ok(())
    }
}
