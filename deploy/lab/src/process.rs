//! Starts processes in a namespace and a cgroup, and knows them again by pid and start time.
#![allow(unsafe_code, reason = "pre_exec is unsafe: between fork and exec the child enters its namespace and cgroup")]

use crate::cgroup::CgroupError;
use crate::net::NetError;
use nix::sched::CloneFlags;
use nix::sys::signal::{Signal, kill, killpg};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Environment variable that marks every process of a lab with the lab's name, for clean-up without a state file.
pub const MARKER: &str = "AMBIT_LAB";

/// What can go wrong with a process.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// Nothing to run.
    #[error("no command given")]
    Empty,
    /// Its log could not be opened.
    #[error("log {path} could not be opened")]
    Log {
        /// The log.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It could not be started.
    #[error("{program} could not be started")]
    Start {
        /// The program.
        program: String,
        /// Why.
        source: std::io::Error,
    },
    /// Its namespace.
    #[error(transparent)]
    Net(#[from] NetError),
    /// Its cgroup.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// It ended before it was ready.
    #[error("{program} ended before it was ready; its log ends:\n{log}")]
    Ended {
        /// The program.
        program: String,
        /// The last lines of its log.
        log: String,
    },
    /// It runs, but is not ready.
    #[error("{program} was not ready after {seconds} s; its log ends:\n{log}")]
    NotReady {
        /// The program.
        program: String,
        /// How long was waited.
        seconds: u64,
        /// The last lines of its log.
        log: String,
    },
    /// It ran longer than allowed and was killed.
    #[error("{program} was killed after {seconds} s")]
    TimedOut {
        /// The program.
        program: String,
        /// How long it was given.
        seconds: u64,
    },
}

/// What to run and where. Kept in the state file, so that a restart runs the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Launch {
    /// Program and arguments.
    pub argv: Vec<String>,
    /// Added to the environment.
    pub env: Vec<(String, String)>,
    /// Network namespace by name; none = the caller's.
    pub netns: Option<String>,
    /// Folder of the cgroup; none = the caller's.
    pub cgroup: Option<PathBuf>,
    /// User and group to run as; none = root.
    pub uid: Option<u32>,
    /// Standard output and error are appended here.
    pub log: PathBuf,
}

/// A process that cannot be mistaken for a later one with the same number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// The number.
    pub pid: i32,
    /// Start time in clock ticks since boot (field 22 of /proc/PID/stat).
    pub start_ticks: u64,
}

impl ProcessId {
    /// The running process of this number.
    pub fn of(pid: i32) -> Option<ProcessId> {
        let (_, start_ticks) = stat(pid)?;
        Some(ProcessId { pid, start_ticks })
    }
    /// Whether it still runs; a zombie does not. Collects it if it was our child.
    pub fn alive(self) -> bool {
        match stat(self.pid) {
            Some((state, start_ticks)) if start_ticks == self.start_ticks => {
                if state == 'Z' {
                    // Not our child: its parent collects it.
                    let _ = waitpid(Pid::from_raw(self.pid), Some(WaitPidFlag::WNOHANG));
                }
                !matches!(state, 'Z' | 'X')
            }
            _ => false,
        }
    }
    /// Sends a signal if it still runs; tells whether it was sent.
    pub fn signal(self, signal: Signal) -> bool {
        self.alive() && kill(Pid::from_raw(self.pid), signal).is_ok()
    }
    /// SIGKILL, and waits until it is gone.
    pub fn kill(self) -> bool {
        let killed = self.signal(Signal::SIGKILL);
        let deadline = Instant::now() + Duration::from_secs(5);
        while self.alive() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(2));
        }
        killed
    }
}

/// State and start time of a process. The name in the second field may hold anything, also `)` and spaces.
fn stat(pid: i32) -> Option<(char, u64)> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = text.get(text.rfind(')')? + 1..)?.split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    Some((state, fields.nth(18)?.parse().ok()?))
}

/// The command of a launch, ready to enter its place between fork and exec.
pub fn command(lab: &str, launch: &Launch) -> Result<Command, ProcessError> {
    let (program, args) = launch.argv.split_first().ok_or(ProcessError::Empty)?;
    let netns = launch.netns.as_deref().map(crate::net::open).transpose()?;
    let cgroup = launch.cgroup.as_deref().map(crate::cgroup::open_procs).transpose()?;
    let uid = launch.uid;
    let mut command = Command::new(program);
    command.args(args).env(MARKER, lab).envs(launch.env.iter().map(|(k, v)| (k, v)));
    // SAFETY: the closure runs in the forked child and makes only async-signal-safe system calls on descriptors that
    // were opened before the fork; it allocates nothing.
    unsafe {
        command.pre_exec(move || enter(cgroup.as_ref(), netns.as_ref(), uid));
    }
    Ok(command)
}

/// Cgroup first, so that the lab's clean-up sees the process whatever comes after.
fn enter(cgroup: Option<&File>, netns: Option<&File>, uid: Option<u32>) -> std::io::Result<()> {
    if let Some(procs) = cgroup {
        nix::unistd::write(procs, b"0")?;
    }
    if let Some(netns) = netns {
        nix::sched::setns(netns.as_fd(), CloneFlags::CLONE_NEWNET)?;
    }
    if let Some(uid) = uid {
        // SAFETY: plain system calls; a null pointer with length 0 clears the supplementary groups. glibc's wrappers
        // signal other threads, of which the forked child has none.
        let failed =
            unsafe { libc::setgroups(0, std::ptr::null()) != 0 || libc::setgid(uid) != 0 || libc::setuid(uid) != 0 };
        if failed {
            return Err(std::io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Starts it in a process group of its own, detached from the terminal, logging to its file.
pub fn spawn(lab: &str, launch: &Launch) -> Result<ProcessId, ProcessError> {
    let open = OpenOptions::new().create(true).append(true).open(&launch.log);
    let log = open.map_err(|source| ProcessError::Log { path: launch.log.clone(), source })?;
    let program = launch.argv.first().cloned().unwrap_or_default();
    let start = |source| ProcessError::Start { program: program.clone(), source };
    let mut command = command(lab, launch)?;
    let errors = log.try_clone().map_err(start)?;
    let child = command.stdin(Stdio::null()).stdout(log).stderr(errors).process_group(0).spawn().map_err(start)?;
    let pid = i32::try_from(child.id()).unwrap_or(i32::MAX);
    ProcessId::of(pid).ok_or_else(|| start(std::io::Error::other("it vanished at once")))
}

/// Runs it to its end and returns what it wrote. Its log file is not used.
pub fn run(lab: &str, launch: &Launch, limit: Duration) -> Result<Output, ProcessError> {
    let program = launch.argv.first().cloned().unwrap_or_default();
    let start = |source| ProcessError::Start { program: program.clone(), source };
    let mut command = command(lab, launch)?;
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    let child = command.spawn().map_err(start)?;
    let id = ProcessId::of(i32::try_from(child.id()).unwrap_or(i32::MAX));
    let (done, finished) = std::sync::mpsc::sync_channel::<()>(1);
    std::thread::scope(|scope| {
        let watchdog = scope.spawn(move || {
            let late = finished.recv_timeout(limit).is_err();
            if late && let Some(id) = id.filter(|id| id.alive()) {
                // The whole group: a child of its own that kept the pipe open would keep us waiting.
                let _ = killpg(Pid::from_raw(id.pid), Signal::SIGKILL);
            }
            late
        });
        let output = child.wait_with_output().map_err(start);
        // Fails only if the watchdog has ended already.
        let _ = done.try_send(());
        match watchdog.join() {
            Ok(false) => output,
            _ => Err(ProcessError::TimedOut { program: program.clone(), seconds: limit.as_secs() }),
        }
    })
}

/// Waits until `ready` says so, the process ends, or the time is over.
pub fn wait_ready(
    id: ProcessId,
    launch: &Launch,
    limit: Duration,
    mut ready: impl FnMut() -> bool,
) -> Result<(), ProcessError> {
    let deadline = Instant::now() + limit;
    let program = launch.argv.first().cloned().unwrap_or_default();
    loop {
        if ready() {
            return Ok(());
        }
        if !id.alive() {
            return Err(ProcessError::Ended { program, log: log_tail(&launch.log) });
        }
        if Instant::now() > deadline {
            return Err(ProcessError::NotReady { program, seconds: limit.as_secs(), log: log_tail(&launch.log) });
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The last lines of a log.
pub fn log_tail(path: &Path) -> String {
    const LINES: usize = 15;
    let text = std::fs::read(path).map(|b| String::from_utf8_lossy(&b).into_owned()).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines.get(lines.len().saturating_sub(LINES)..).unwrap_or_default().join("\n")
}

/// Every process that carries the lab's marker in its environment.
pub fn marked(lab: &str) -> Vec<ProcessId> {
    let wanted = format!("{MARKER}={lab}");
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.flatten().filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok());
    let ours = |pid: &i32| {
        let environ = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environ.split(|b| *b == 0).any(|variable| variable == wanted.as_bytes())
    };
    pids.filter(ours).filter_map(ProcessId::of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_known_by_number_and_start() {
        let own = ProcessId::of(i32::try_from(std::process::id()).unwrap()).unwrap();
        assert!(own.alive());
        let other = ProcessId { start_ticks: own.start_ticks + 1, ..own };
        assert!(!other.alive());
        assert!(!other.signal(Signal::SIGKILL), "a reused number must not be killed");
    }
}
