//! Carrying bytes between a TCP socket and an HTTP/2 stream, both ways, with half-close.
//!
//! FIN becomes END_STREAM and back; RST becomes RST_STREAM and back. Memory per flow is bounded by the stream's window
//! and one read buffer, which an idle flow does not hold.

use bytes::{Bytes, BytesMut};
use futures::FutureExt;
use h2::{Reason, RecvStream, SendStream};
use nix::sys::socket::{setsockopt, sockopt};
use std::future::poll_fn;
use std::io;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};

/// One HTTP/2 frame's worth, and one TLS record's: larger reads win little and cost memory per flow.
const READ_BYTES: usize = 16 * 1024;

/// How a carried connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Both sides closed in order.
    Closed,
    /// The socket on this node broke off; the far side sees a reset.
    Near,
    /// The tunnel or the far side broke off; the socket sees a reset.
    Far,
    /// It may not go on; both sides see a reset.
    Cut,
}

/// What was carried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Carried {
    /// How it ended.
    pub end: End,
    /// Bytes from the socket into the tunnel.
    pub sent: u64,
    /// Bytes from the tunnel into the socket.
    pub received: u64,
}

/// Carries until both directions are closed, one breaks, or `cut` says that the connection may not go on: then stream and
/// socket, which [breaks off unless ended](break_off_unless_ended), are reset. `first` was read from the socket before.
pub async fn carry(
    mut tcp: TcpStream,
    mut send: SendStream<Bytes>,
    mut recv: RecvStream,
    first: Vec<u8>,
    cut: impl Future<Output = ()>,
) -> Carried {
    let (mut sent, mut received) = (0, 0);
    let end = {
        let (mut read, mut write) = tcp.split();
        let up = upward(&mut read, &mut send, first, &mut sent);
        let both = async { tokio::try_join!(up, downward(&mut recv, &mut write, &mut received)) };
        tokio::select! {
            carried = both => carried.map_or_else(|end| end, |_| End::Closed),
            () = cut => End::Cut,
        }
    };
    if end == End::Closed {
        end_in_order(&tcp);
    } else {
        send.send_reset(Reason::CANCEL);
    }
    Carried { end, sent, received }
}

/// Whatever drops the socket before its connection ended in order, the death of this process included, breaks it off: nobody
/// shall take a truncated answer for a whole one.
pub fn break_off_unless_ended(tcp: &TcpStream) -> io::Result<()> {
    tcp.set_zero_linger()
}

/// It ended in order: what was written last still goes its way.
pub fn end_in_order(tcp: &TcpStream) {
    let off = libc::linger { l_onoff: 0, l_linger: 0 };
    // It fails only for what is no socket.
    let _ = setsockopt(tcp, sockopt::Linger, &off);
}

/// One direction between two sockets of this node, whose ends are named: all bytes, then the end. A silent reader holds no buffer.
pub async fn plain(
    read: ReadHalf<'_>,
    mut write: WriteHalf<'_>,
    (from, to): (End, End),
    carried: &mut u64,
) -> Result<(), End> {
    loop {
        read.readable().await.map_err(|_| from)?;
        let mut buffer = BytesMut::with_capacity(READ_BYTES);
        match read.try_read_buf(&mut buffer) {
            Ok(0) => return write.shutdown().await.map_err(|_| to),
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => continue,
            Err(_) => return Err(from),
        }
        write.write_all(&buffer).await.map_err(|_| to)?;
        *carried += buffer.len() as u64;
    }
}

async fn upward(
    read: &mut ReadHalf<'_>,
    send: &mut SendStream<Bytes>,
    first: Vec<u8>,
    sent: &mut u64,
) -> Result<(), End> {
    if !give(send, BytesMut::from(first.as_slice()), sent).await {
        return stopped(send);
    }
    loop {
        // A peer that reset the stream must end this direction even while the socket is silent.
        tokio::select! {
            ready = read.readable() => ready.map_err(|_| End::Near)?,
            _reset = poll_fn(|cx| send.poll_reset(cx)) => return stopped(send),
        }
        let mut buffer = BytesMut::with_capacity(READ_BYTES);
        match read.try_read_buf(&mut buffer) {
            Ok(0) => return send.send_data(Bytes::new(), true).or_else(|_| stopped(send)),
            Ok(_) => {}
            // What was ready is read already, by whoever had the first bytes: nothing is held while the socket is silent.
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => continue,
            Err(_) => return Err(End::Near),
        }
        if !give(send, buffer, sent).await {
            return stopped(send);
        }
    }
}

/// The peer takes no more. Where it says that nothing is wrong, its answer is whole (RFC 9113, section 8.1), as Envoy says it
/// whenever its workload has closed: whether it is, is for the other direction to find.
fn stopped(send: &mut SendStream<Bytes>) -> Result<(), End> {
    match poll_fn(|cx| send.poll_reset(cx)).now_or_never() {
        Some(Ok(Reason::NO_ERROR)) => Ok(()),
        _ => Err(End::Far),
    }
}

/// False where the peer takes no more.
async fn give(send: &mut SendStream<Bytes>, mut buffer: BytesMut, sent: &mut u64) -> bool {
    while !buffer.is_empty() {
        send.reserve_capacity(buffer.len());
        // A reset ends the wait as well.
        let Some(Ok(room)) = poll_fn(|cx| send.poll_capacity(cx)).await else { return false };
        let chunk = buffer.split_to(room.min(buffer.len())).freeze();
        let bytes = chunk.len() as u64;
        if send.send_data(chunk, false).is_err() {
            return false;
        }
        *sent += bytes;
    }
    true
}

async fn downward(recv: &mut RecvStream, write: &mut WriteHalf<'_>, received: &mut u64) -> Result<(), End> {
    while let Some(chunk) = recv.data().await {
        let chunk = chunk.map_err(|_| End::Far)?;
        write.write_all(&chunk).await.map_err(|_| End::Near)?;
        *received += chunk.len() as u64;
        recv.flow_control().release_capacity(chunk.len()).map_err(|_| End::Far)?;
    }
    write.shutdown().await.map_err(|_| End::Near)
}
