//! Carrying bytes between a TCP socket and an HTTP/2 stream, both ways, with half-close.
//!
//! FIN becomes END_STREAM and back; RST becomes RST_STREAM and back. Memory per flow is bounded by the stream's window
//! and one read buffer.

use bytes::{Bytes, BytesMut};
use h2::{Reason, RecvStream, SendStream};
use std::future::poll_fn;
use std::io;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};

/// One TLS record's worth: larger reads win little and cost memory per flow.
const READ_BYTES: usize = 16 * 1024;

/// How a carried connection ended.
#[derive(Debug, PartialEq, Eq)]
pub enum End {
    /// Both sides closed in order.
    Closed,
    /// One side broke off, or the connection was cut; both sides see a reset.
    Reset,
}

/// Carries until both directions are closed, one breaks, or `cut` says that the connection may not go on.
pub async fn carry(
    mut tcp: TcpStream,
    mut send: SendStream<Bytes>,
    mut recv: RecvStream,
    cut: impl Future<Output = ()>,
) -> End {
    let (mut read, mut write) = tcp.split();
    let both = async { tokio::try_join!(upward(&mut read, &mut send), downward(&mut recv, &mut write)) };
    let carried = tokio::select! {
        carried = both => carried.is_ok(),
        () = cut => false,
    };
    match carried {
        true => End::Closed,
        false => {
            send.send_reset(Reason::CANCEL);
            // The application must see a reset, not an orderly end of a truncated answer.
            let _ = tcp.set_zero_linger();
            End::Reset
        }
    }
}

async fn upward(read: &mut ReadHalf<'_>, send: &mut SendStream<Bytes>) -> io::Result<()> {
    let mut buffer = BytesMut::new();
    loop {
        // A peer that reset the stream must end this direction even while the socket is silent.
        buffer.reserve(READ_BYTES);
        let n = tokio::select! {
            n = read.read_buf(&mut buffer) => n?,
            reset = poll_fn(|cx| send.poll_reset(cx)) => return Err(broken(reset)),
        };
        if n == 0 {
            return send.send_data(Bytes::new(), true).map_err(io::Error::other);
        }
        while !buffer.is_empty() {
            send.reserve_capacity(buffer.len());
            // A reset ends the wait as well.
            let room = poll_fn(|cx| send.poll_capacity(cx)).await;
            let room = room.ok_or(io::ErrorKind::BrokenPipe)?.map_err(io::Error::other)?;
            let chunk = buffer.split_to(room.min(buffer.len())).freeze();
            send.send_data(chunk, false).map_err(io::Error::other)?;
        }
    }
}

fn broken(reset: Result<Reason, h2::Error>) -> io::Error {
    match reset {
        Ok(reason) => io::Error::other(reason.description()),
        Err(e) => io::Error::other(e),
    }
}

async fn downward(recv: &mut RecvStream, write: &mut WriteHalf<'_>) -> io::Result<()> {
    while let Some(chunk) = recv.data().await {
        let chunk = chunk.map_err(io::Error::other)?;
        write.write_all(&chunk).await?;
        recv.flow_control().release_capacity(chunk.len()).map_err(io::Error::other)?;
    }
    write.shutdown().await
}
