//! Whether the machine at the other end of a tunnel is gone, told apart from one whose workload only reads slowly.
//!
//! `TCP_USER_TIMEOUT` cannot tell: it ends a connection whose peer answers every window probe, once its window has been
//! shut for that long. So the kernel is asked what it has heard (`TCP_INFO`, tcp(7)). What is idle needs no question:
//! there keepalive finds out.

use nix::sys::socket::{getsockopt, setsockopt, sockopt};
use nix::{getsockopt_impl, sockopt_impl};
use std::io;
use std::pin::Pin;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep};

/// A peer that is silent this long is asked by TCP whether it is there.
const KEEPALIVE_AFTER_S: u32 = 2;
/// And again this often.
const KEEPALIVE_EVERY_S: u32 = 1;
/// So many questions without an answer: two are lost together too often on a link that loses one packet of a hundred.
const KEEPALIVES: u32 = 3;
/// Not a sign for so long, while something is to be answered, and the machine is gone.
const SILENT_MS: u32 = 4_000;
/// The kernel's own questions without an answer, retransmissions or window probes: the last may be on its way yet.
const UNANSWERED: u8 = 2;
/// And for so long the first of them has none. What was silent before it was asked says nothing, and a link of ours that is down
/// has the kernel ask again and again.
const UNANSWERED_FOR: Duration = Duration::from_secs(3);
/// How often it is looked, while something is to be answered. Gone is who is found so twice in a row.
pub const LOOK_EVERY: Duration = Duration::from_secs(1);

/// The beginning of the kernel's `struct tcp_info` (include/uapi/linux/tcp.h), as long as Linux 4.6 has it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Info {
    state: u8,
    ca_state: u8,
    /// Times the oldest segment was sent again without an answer.
    retransmits: u8,
    /// Window probes without an answer.
    probes: u8,
    backoff: u8,
    options: u8,
    scale: u8,
    limited: u8,
    timeouts_us: [u32; 2],
    mss: [u32; 2],
    /// Segments that were sent and not acknowledged.
    unacked: u32,
    segments: [u32; 4],
    sent_ms: [u32; 2],
    /// Since the peer's last byte.
    data_ms: u32,
    /// Since the peer's last acknowledgement.
    ack_ms: u32,
    path: [u32; 11],
    rates: [u64; 2],
    bytes: [u64; 2],
    counts: [u32; 2],
    /// Bytes that were written and not sent.
    unsent: u32,
    min_rtt_us: u32,
}

sockopt_impl!(
    /// What the kernel knows of a connection. The system call is in nix's macro.
    TcpInfo,
    GetOnly,
    libc::IPPROTO_TCP,
    libc::TCP_INFO,
    Info
);

/// What the kernel says of the peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    /// It owes no answer.
    Quiet,
    /// It owes one, and was not asked a second time.
    Owing,
    /// It was, and has not answered yet.
    Asked,
    /// It gives none.
    Silent,
}

impl Info {
    /// What it says.
    pub fn look(&self) -> Look {
        if self.unacked == 0 && self.unsent == 0 {
            return Look::Quiet;
        }
        // Probes are sent where nothing may be: then nothing is unacknowledged.
        let asked = if self.unacked > 0 { self.retransmits } else { self.probes };
        let silent = self.data_ms.min(self.ack_ms) >= SILENT_MS;
        match asked {
            0 => Look::Owing,
            UNANSWERED.. if silent => Look::Silent,
            _ => Look::Asked,
        }
    }
}

/// What every tunnel's connection has: nothing waits for an acknowledgement of what was sent before, and an idle one whose
/// peer is gone is found out, within 5 s.
pub fn tune(tcp: &TcpStream) -> io::Result<()> {
    tcp.set_nodelay(true)?;
    setsockopt(tcp, sockopt::KeepAlive, &true)?;
    setsockopt(tcp, sockopt::TcpKeepIdle, &KEEPALIVE_AFTER_S)?;
    setsockopt(tcp, sockopt::TcpKeepInterval, &KEEPALIVE_EVERY_S)?;
    setsockopt(tcp, sockopt::TcpKeepCount, &KEEPALIVES)?;
    Ok(())
}

/// Looks after what was sent. A connection on which nothing moves costs nothing.
#[derive(Debug)]
pub struct Watch<'a> {
    next: Pin<&'a mut Sleep>,
    armed: bool,
    /// Since when an answer to a question of the kernel's is seen to be missing.
    asked: Option<Instant>,
    silent: bool,
}

impl<'a> Watch<'a> {
    /// With a timer, which is set anew before it is used.
    pub fn new(timer: Pin<&'a mut Sleep>) -> Self {
        Self { next: timer, armed: false, asked: None, silent: false }
    }

    /// Something was, or will be, sent.
    pub fn arm(&mut self) {
        if !self.armed {
            self.armed = true;
            self.next.as_mut().reset(Instant::now() + LOOK_EVERY);
        }
    }

    /// Returns when it is time to look: never, where nothing was sent. Dropping it loses nothing.
    pub async fn due(&mut self) {
        if self.armed {
            self.next.as_mut().await;
        } else {
            std::future::pending().await
        }
    }

    /// Looks; whether the peer is gone.
    pub fn is_gone(&mut self, tcp: &TcpStream) -> bool {
        let look = getsockopt(tcp, TcpInfo).map_or(Look::Silent, |info| info.look());
        let (again, now) = (self.silent, Instant::now());
        self.silent = look == Look::Silent;
        self.asked = match look {
            Look::Quiet | Look::Owing => None,
            Look::Asked | Look::Silent => self.asked.or(Some(now)),
        };
        self.armed = look != Look::Quiet;
        self.next.as_mut().reset(now + LOOK_EVERY);
        self.silent && again && self.asked.is_some_and(|since| now - since >= UNANSWERED_FOR)
    }

    /// Returns once the peer is gone. Dropping it loses nothing.
    pub async fn gone(&mut self, tcp: &TcpStream) {
        loop {
            self.due().await;
            if self.is_gone(tcp) {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_reader_is_not_gone_and_a_dead_one_is() {
        const { assert!(size_of::<Info>() == 152, "the kernel's offsets") };
        let info = |unacked, unsent, retransmits, probes, data_ms, ack_ms| {
            Info { unacked, unsent, retransmits, probes, data_ms, ack_ms, ..Info::default() }.look()
        };
        for (what, found, expected) in [
            ("idle for a minute", info(0, 0, 0, 0, 60_000, 60_000), Look::Quiet),
            ("just sent, after a minute", info(1, 0, 0, 0, 60_000, 60_000), Look::Owing),
            ("sent once more, after a minute", info(1, 0, 1, 0, 60_000, 60_000), Look::Asked),
            ("not acknowledged", info(3, 90_000, 4, 0, 9_000, 4_200), Look::Silent),
            ("nor for long enough", info(3, 90_000, 4, 0, 9_000, 3_900), Look::Asked),
            ("loses what we send, and speaks", info(3, 0, 4, 0, 100, 9_000), Look::Asked),
            ("shut window, answered just now", info(0, 90_000, 0, 0, 60_000, 10), Look::Owing),
            ("shut window, answered before the last probe", info(0, 90_000, 0, 1, 60_000, 25_000), Look::Asked),
            ("shut window, two probes unanswered", info(0, 90_000, 0, 2, 60_000, 25_000), Look::Silent),
        ] {
            assert_eq!(found, expected, "{what}");
        }
    }

    #[tokio::test]
    async fn the_kernels_answer_is_read_where_it_lies() {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut near = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (mut far, _) = listener.accept().await.unwrap();
        tune(&near).unwrap();
        assert_eq!(getsockopt(&near, TcpInfo).unwrap().look(), Look::Quiet);
        // Until the window is shut: then there are bytes that were not sent.
        let chunk = vec![0; 1 << 20];
        while tokio::time::timeout(Duration::from_millis(300), near.write_all(&chunk)).await.is_ok() {}
        let info = getsockopt(&near, TcpInfo).unwrap();
        assert!(info.look() == Look::Owing && info.unsent > 0 && info.unacked == 0, "{info:?}");
        near.shutdown().await.unwrap();
        far.read_to_end(&mut Vec::new()).await.unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;
        let info = getsockopt(&near, TcpInfo).unwrap();
        assert!(info.look() == Look::Quiet && info.ack_ms < 1_000, "{info:?}");
    }
}
