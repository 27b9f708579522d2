//! CPU time: what an operation costs whatever else the machine does meanwhile.

use anyhow::{Context, Result};
use nix::time::{ClockId, clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;
use std::time::Duration;

/// CPU time of this thread so far.
pub(super) fn of_thread() -> Result<Duration> {
    read(ClockId::CLOCK_THREAD_CPUTIME_ID)
}

/// CPU time of all threads of a process so far.
pub(super) fn of_process(pid: u32) -> Result<Duration> {
    read(clock_getcpuclockid(Pid::from_raw(i32::try_from(pid)?))?)
}

fn read(clock: ClockId) -> Result<Duration> {
    let t = clock_gettime(clock)?;
    Ok(Duration::new(u64::try_from(t.tv_sec())?, u32::try_from(t.tv_nsec())?))
}

/// A sum of CPU time over parts of a loop: preparing the input is not counted.
#[derive(Default)]
pub(super) struct Meter {
    spent: Duration,
    count: u32,
}

impl Meter {
    /// Counts `f` as one operation, or as a part of the operation that [`Meter::also`] belongs to.
    pub(super) fn once<T>(&mut self, f: impl FnOnce() -> Result<T>) -> Result<T> {
        self.count += 1;
        self.also(f)
    }
    /// Counts the time of `f` towards the operation before.
    pub(super) fn also<T>(&mut self, f: impl FnOnce() -> Result<T>) -> Result<T> {
        let before = of_thread()?;
        let out = f();
        self.spent += of_thread()?.saturating_sub(before);
        out
    }
    /// Microseconds of one operation.
    pub(super) fn micros(&self) -> f64 {
        self.spent.as_secs_f64() * 1e6 / f64::from(self.count.max(1))
    }
    /// Operations a second that one core could do.
    pub(super) fn per_second(&self) -> f64 {
        1e6 / self.micros().max(f64::MIN_POSITIVE)
    }
}

/// The load average: the figures are CPU time, but a crowded cache slows them too.
pub(super) fn load() -> Result<String> {
    let text = std::fs::read_to_string("/proc/loadavg").context("the load average")?;
    Ok(text.split(' ').take(3).collect::<Vec<_>>().join(" "))
}
