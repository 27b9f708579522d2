//! Takes a lab down: complete, idempotent, and possible after the lab died at any moment, with or without a state file.

use crate::lab::LabError;
use crate::lock::Lock;
use crate::process::{self, ProcessId};
use crate::state::Store;
use crate::topology::{self, RUN_DIR};
use crate::{cgroup, net, preflight};
use ambit_model::{Refusal, refusal::Code};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long killed processes may take to be gone.
const KILL_MAX: Duration = Duration::from_secs(10);

/// Rounds of cleaning before the failure of one is told.
const ROUNDS_MAX: u32 = 5;

/// What was removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    /// Processes killed.
    pub processes: usize,
    /// Namespaces.
    pub namespaces: usize,
    /// Folders: cgroup, pins, files.
    pub folders: usize,
}

impl Removed {
    /// Whether there was anything.
    pub fn any(self) -> bool {
        self != Removed::default()
    }
}

impl std::fmt::Display for Removed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} processes, {} namespaces, {} folders", self.processes, self.namespaces, self.folders)
    }
}

/// Removes every trace of a lab.
pub fn down(name: &str) -> Result<Removed, LabError> {
    preflight::root()?;
    let name = topology::parse_name(name)?;
    if std::env::var(process::MARKER).is_ok_and(|marker| marker == name) {
        let expected = format!("a shell outside lab {name}: `down` ends all that runs inside");
        return Err(Refusal::new(Code::BadRequest, expected, "a shell that the lab started").into());
    }
    let lock = Lock::take(Path::new(RUN_DIR), &name)?;
    let removed = clean(&name)?;
    lock.remove();
    Ok(removed)
}

/// The same, under a lock that the caller holds. A child of a killed lab that had not yet reached its `exec` carries no
/// marker and may still make things: a round that fails, or leaves something, is repeated.
pub(crate) fn clean(lab: &str) -> Result<Removed, LabError> {
    let mut removed = Removed::default();
    for _ in 0..ROUNDS_MAX {
        let round = clean_once(lab, &mut removed);
        if round.is_ok() && net::list(lab).is_empty() && process::marked(lab).is_empty() {
            return Ok(removed);
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    clean_once(lab, &mut removed)?;
    Ok(removed)
}

fn clean_once(lab: &str, removed: &mut Removed) -> Result<(), LabError> {
    let top = cgroup::top(lab)?;
    removed.processes += kill_all(lab, &top)?;
    for namespace in net::list(lab) {
        net::remove(&namespace)?;
        removed.namespaces += 1;
    }
    if top.exists() {
        cgroup::remove(&top)?;
        removed.folders += 1;
    }
    crate::disk::unmount_below(&topology::root(lab))?;
    for folder in [cgroup::pins(lab), topology::root(lab)] {
        removed.folders += usize::from(remove_folder(folder)?);
    }
    Ok(())
}

/// Kills until none is left: a process killed between fork and exec of its child leaves that child.
fn kill_all(lab: &str, top: &Path) -> Result<usize, LabError> {
    let own = i32::try_from(std::process::id()).unwrap_or(0);
    // A state file that a crash cut short is no reason to stop: the marker and the cgroups know the same processes.
    let state = Store::new(&topology::root(lab)).load();
    let recorded: Vec<ProcessId> = state.map(|s| s.processes.iter().map(|p| p.id).collect()).unwrap_or_default();
    let deadline = Instant::now() + KILL_MAX;
    let mut killed = 0;
    loop {
        let mut left = recorded.clone();
        left.extend(process::marked(lab));
        left.extend(cgroup::processes(top));
        left.sort_by_key(|id| (id.pid, id.start_ticks));
        left.dedup();
        left.retain(|id| id.pid != own && id.alive());
        if left.is_empty() {
            return Ok(killed);
        }
        if Instant::now() > deadline {
            let pids: Vec<String> = left.iter().map(|id| id.pid.to_string()).collect();
            let found = format!("still there after SIGKILL: {}", pids.join(" "));
            return Err(Refusal::new(Code::Internal, "no process of the lab left", found).into());
        }
        killed += left.iter().filter(|id| id.signal(nix::sys::signal::Signal::SIGKILL)).count();
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn remove_folder(path: PathBuf) -> Result<bool, LabError> {
    match std::fs::remove_dir_all(&path) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(source) => Err(LabError::Io { path, source }),
    }
}
