//! Calls made steadily from one place to one target, and what became of each.

use crate::lab::{Lab, LabError};
use crate::preflight::own_binary;
use ambit_model::{Refusal, refusal::Code};
use serde::Deserialize;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Calls kept of one probe: far more than a smoke run makes.
const CALLS_MAX: usize = 200_000;
/// Good calls in a row that count as calls that flow again.
const STREAK: usize = 25;

/// The outcome of a call.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq)]
pub(crate) struct Call {
    /// When it was known, in milliseconds since the Unix epoch.
    pub(crate) t_ms: f64,
    /// Whether it was answered.
    pub(crate) ok: bool,
    /// Whether the kernel refused it in `connect()`.
    pub(crate) refused: bool,
}

/// A running probe.
pub(crate) struct Calls {
    child: Child,
    reader: Option<JoinHandle<()>>,
    seen: Arc<Mutex<Vec<Call>>>,
}

impl Calls {
    /// Starts calling from a pod, or a machine, past the mesh.
    pub(crate) fn start(lab: &Lab, from: &str, target: SocketAddr, every: Duration) -> Result<Calls, LabError> {
        let (target, every) = (target.to_string(), every.as_millis().to_string());
        let program = own_binary("ambit-lab")?;
        let mut child = Command::new(&program)
            .args(["probe", "--lab", lab.name(), "--pod", from, "--target", &target, "--interval-ms", &every])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|source| LabError::Io { path: program, source })?;
        let seen = Arc::new(Mutex::new(Vec::new()));
        let reader = child.stdout.take().map(|out| {
            let seen = Arc::clone(&seen);
            std::thread::spawn(move || {
                for line in BufReader::new(out).lines().map_while(Result::ok) {
                    let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
                    match serde_json::from_str(&line) {
                        Ok(call) if seen.len() < CALLS_MAX => seen.push(call),
                        _ => {}
                    }
                }
            })
        });
        Ok(Calls { child, reader, seen })
    }
    /// Calls whose outcome was known between two moments.
    pub(crate) fn between(&self, from_ms: f64, to_ms: f64) -> Vec<Call> {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.iter().filter(|c| (from_ms..to_ms).contains(&c.t_ms)).copied().collect()
    }
    /// Calls so far, and how many of them were answered.
    pub(crate) fn counts(&self) -> (usize, usize) {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        (seen.len(), seen.iter().filter(|c| c.ok).count())
    }
    /// Waits until calls are answered one after the other; the time from `since_ms` to the first of them.
    pub(crate) fn flow(&self, since_ms: f64, limit: Duration, what: &str) -> Result<Duration, LabError> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(first) = streak(&self.between(since_ms, f64::INFINITY)) {
                return Ok(Duration::from_secs_f64((first - since_ms).max(0.0) / 1000.0));
            }
            if Instant::now() > deadline {
                let calls = self.between(since_ms, f64::INFINITY);
                let (made, good) = (calls.len(), calls.iter().filter(|c| c.ok).count());
                let expected = format!("{what} within {} s", limit.as_secs());
                return Err(Refusal::new(Code::Unavailable, expected, format!("{good} of {made} answered")).into());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Calls {
    fn drop(&mut self) {
        // Ours, by its handle; already ended is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Some(reader) = self.reader.take() {
            // It ends with the pipe; it holds nothing that a panic of its own could have broken.
            let _ = reader.join();
        }
    }
}

/// When the last unbroken row of good calls began, if it is long enough.
fn streak(calls: &[Call]) -> Option<f64> {
    row(calls, true)
}

/// When the last unbroken row of failed calls began, if it is long enough: one failed call is no verdict.
pub(crate) fn ebb(calls: &[Call]) -> Option<f64> {
    row(calls, false)
}

fn row(calls: &[Call], ok: bool) -> Option<f64> {
    let alike = calls.iter().rev().take_while(|c| c.ok == ok).count();
    (alike >= STREAK).then(|| calls.get(calls.len() - alike).map(|c| c.t_ms)).flatten()
}

/// Milliseconds since the Unix epoch, as probes count them.
pub(crate) fn epoch_ms() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_millis() as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_flow_from_the_first_of_the_last_good_row() {
        let call = |t: usize, ok| Call { t_ms: t as f64, ok, refused: !ok };
        let mut calls: Vec<Call> = (0..30).map(|t| call(t, true)).collect();
        assert_eq!(streak(&calls), Some(0.0));
        calls.push(call(30, false));
        assert_eq!(streak(&calls), None, "one failure ends the row");
        calls.extend((31..31 + STREAK - 1).map(|t| call(t, true)));
        assert_eq!(streak(&calls), None, "one short");
        calls.push(call(99, true));
        assert_eq!(streak(&calls), Some(31.0));
        calls.extend((100..100 + STREAK - 1).map(|t| call(t, false)));
        assert_eq!(ebb(&calls), None, "one short");
        calls.push(call(999, false));
        assert_eq!((ebb(&calls), streak(&calls)), (Some(100.0), None));
    }
}
