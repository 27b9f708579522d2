//! The outside probe of a drill: calls a service from inside a pod at a fixed rate and tells the outcome of each call.
//!
//! It runs in the pod's namespace and cgroup and as its user, so the mesh treats it as it treats the pod's own program.

use serde::Serialize;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddrV4, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// A call that has no answer by then failed.
const CALL_MAX: Duration = Duration::from_secs(1);
/// Calls in flight; beyond it a call counts as failed without being made. 10 ms apart and 1 s long make 100.
const CALLS_MAX: usize = 128;
/// A call's thread holds a socket and a line.
const STACK_BYTES: usize = 128 << 10;
/// The most that is read of an answer.
const ANSWER_BYTES_MAX: u64 = 64 << 10;
/// Who answered is a name.
const BY_CHARS_MAX: usize = 64;

/// One call's outcome, a line of JSON on standard output.
#[derive(Serialize)]
struct Line {
    /// When the outcome was known, in milliseconds since the Unix epoch.
    t_ms: u128,
    ok: bool,
    /// First line of the answer's body.
    by: Option<String>,
    /// Whether the kernel refused the call in `connect()` (EPERM), before anything was sent.
    refused: bool,
    /// Why there was no answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

/// Calls `target` every `interval` until standard output is closed or the process is killed.
pub fn run(target: SocketAddrV4, interval: Duration) -> std::io::Result<()> {
    let in_flight = Arc::new(AtomicUsize::new(0));
    let mut next = Instant::now();
    loop {
        if in_flight.fetch_add(1, Ordering::AcqRel) >= CALLS_MAX {
            in_flight.fetch_sub(1, Ordering::AcqRel);
            tell(Err(std::io::ErrorKind::WouldBlock.into()))?;
        } else {
            let done = Arc::clone(&in_flight);
            let call = move || {
                // Standard output closed: the loop finds out by itself.
                let _ = tell(call(target));
                done.fetch_sub(1, Ordering::AcqRel);
            };
            std::thread::Builder::new().stack_size(STACK_BYTES).spawn(call)?;
        }
        next += interval;
        let now = Instant::now();
        // Late by more than a second: this machine stood still; no burst to catch up.
        next = if next + CALL_MAX < now { now } else { next };
        std::thread::sleep(next.saturating_duration_since(now));
    }
}

fn tell(outcome: std::io::Result<String>) -> std::io::Result<()> {
    let refused = outcome.as_ref().is_err_and(|e| e.kind() == std::io::ErrorKind::PermissionDenied);
    let error = outcome.as_ref().err().map(ToString::to_string);
    let by = outcome.ok();
    let t_ms = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
    let mut text = serde_json::to_string(&Line { t_ms, ok: by.is_some(), by, refused, error }).unwrap_or_default();
    text.push('\n');
    // One write per line, so that lines of several threads do not mix.
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// One call: who answered, if it was answered with 200.
fn call(target: SocketAddrV4) -> std::io::Result<String> {
    let bad = |what: &str| std::io::Error::new(std::io::ErrorKind::InvalidData, what.to_owned());
    let mut stream = TcpStream::connect_timeout(&target.into(), CALL_MAX)?;
    stream.set_read_timeout(Some(CALL_MAX))?;
    write!(stream, "GET / HTTP/1.1\r\nHost: {target}\r\nConnection: close\r\n\r\n")?;
    let mut lines = BufReader::new(stream.take(ANSWER_BYTES_MAX)).lines();
    let status = lines.next().ok_or_else(|| bad("no answer"))??;
    if status.split(' ').nth(1) != Some("200") {
        return Err(bad("not 200"));
    }
    for line in lines.by_ref() {
        if line?.is_empty() {
            return Ok(lines.next().transpose()?.unwrap_or_default().trim().chars().take(BY_CHARS_MAX).collect());
        }
    }
    Err(bad("cut short"))
}
