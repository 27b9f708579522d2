//! Whether the far end's machine is there, asked by the kernel: no process wakes for it, on either side. A heartbeat a
//! second and HTTP/2 pings on ten thousand streams cost a fifth of a core; probes of TCP cost next to nothing.
//!
//! A machine that is gone or cut off is noticed this way. A process that hangs is not: its kernel goes on answering, and
//! whoever waits for words of that process bounds the silence itself.

use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::{KeepAlive, TcpKeepCount, TcpKeepIdle, TcpKeepInterval, TcpUserTimeout};
use tokio::net::TcpStream;

/// Silence after which the kernel asks, seconds.
const IDLE_S: u32 = 3;
/// Between its questions, seconds.
const INTERVAL_S: u32 = 1;
/// Questions without an answer.
const COUNT: u32 = 2;
/// What was sent and is not acknowledged by then ends the connection, milliseconds.
const UNACKNOWLEDGED_MS_MAX: u32 = 5_000;

/// Small messages leave at once, and a far end that is gone ends the connection within five seconds.
pub(crate) fn watch(tcp: &TcpStream) -> std::io::Result<()> {
    tcp.set_nodelay(true)?;
    setsockopt(tcp, KeepAlive, &true)?;
    setsockopt(tcp, TcpKeepIdle, &IDLE_S)?;
    setsockopt(tcp, TcpKeepInterval, &INTERVAL_S)?;
    setsockopt(tcp, TcpKeepCount, &COUNT)?;
    setsockopt(tcp, TcpUserTimeout, &UNACKNOWLEDGED_MS_MAX)?;
    Ok(())
}
