//! Writes that belong together leave together. HTTP/2 writes and flushes a call's headers, body and trailers one by one;
//! under TLS each would be a record, a system call, and a wake-up at the far end, which cost more than what is in them.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// As much as one TLS record carries (RFC 8446 5.1); more is handed on at once.
const HELD_MAX: usize = 16 * 1024;
/// Room kept while nothing is held: a replica has thousands of connections that are idle.
const ROOM_KEPT: usize = 1024;

/// A stream whose flush is put off until its task had another turn, so that whatever is ready by then goes along.
///
/// Only for a task that flushes whenever it is polled, as that of an HTTP/2 connection does: a flush that was put off wakes
/// it, and its next flush writes.
pub(crate) struct Coalesced<S> {
    stream: S,
    held: Vec<u8>,
    written: usize,
    put_off: bool,
}

impl<S: AsyncWrite + Unpin> Coalesced<S> {
    /// Holds nothing yet.
    pub(crate) fn new(stream: S) -> Self {
        Self { stream, held: Vec::new(), written: 0, put_off: false }
    }

    /// Hands on what is held.
    fn drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while let Some(rest) = self.held.get(self.written..).filter(|rest| !rest.is_empty()) {
            match ready!(Pin::new(&mut self.stream).poll_write(cx, rest))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                n => self.written += n,
            }
        }
        (self.written, self.put_off) = (0, false);
        self.held.clear();
        self.held.shrink_to(ROOM_KEPT);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Coalesced<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Coalesced<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if self.held.len() >= HELD_MAX {
            ready!(self.drain(cx))?;
        }
        let taken = buf.len().min(HELD_MAX - self.held.len());
        self.held.extend(buf.iter().take(taken));
        Poll::Ready(Ok(taken))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.held.is_empty() && !self.put_off {
            self.put_off = true;
            cx.waker().wake_by_ref();
            return Poll::Ready(Ok(()));
        }
        ready!(self.drain(cx))?;
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.drain(cx))?;
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::{Wake, Waker};

    /// Takes so many bytes at once, and keeps each write apart.
    struct Wire {
        at_once: usize,
        writes: Vec<Vec<u8>>,
        flushes: usize,
    }

    impl AsyncWrite for Wire {
        fn poll_write(mut self: Pin<&mut Self>, _: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
            let taken = buf.len().min(self.at_once);
            if taken == 0 && !buf.is_empty() {
                return Poll::Pending;
            }
            self.writes.push(buf[..taken].to_vec());
            Poll::Ready(Ok(taken))
        }
        fn poll_flush(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            self.flushes += 1;
            Poll::Ready(Ok(()))
        }
        fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            self.poll_flush(cx)
        }
    }

    #[derive(Default)]
    struct Woken(AtomicUsize);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn over(at_once: usize) -> (Coalesced<Wire>, Arc<Woken>) {
        (Coalesced::new(Wire { at_once, writes: Vec::new(), flushes: 0 }), Arc::default())
    }

    fn write(stream: &mut Coalesced<Wire>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<usize> {
        Pin::new(stream).poll_write(cx, bytes).map(Result::unwrap)
    }

    fn flush(stream: &mut Coalesced<Wire>, cx: &mut Context<'_>) -> bool {
        Pin::new(stream).poll_flush(cx).map(Result::unwrap).is_ready()
    }

    #[test]
    fn what_is_written_before_the_tasks_next_turn_leaves_as_one() {
        let (mut stream, woken) = over(usize::MAX);
        let waker = Waker::from(woken.clone());
        let cx = &mut Context::from_waker(&waker);
        assert_eq!(write(&mut stream, cx, b"headers "), Poll::Ready(8));
        assert!(flush(&mut stream, cx) && stream.stream.writes.is_empty());
        assert_eq!(woken.0.load(Ordering::Relaxed), 1, "whoever puts off comes back");
        assert_eq!(write(&mut stream, cx, b"body"), Poll::Ready(4));
        assert!(flush(&mut stream, cx));
        assert_eq!((&*stream.stream.writes, stream.stream.flushes), (&[b"headers body".to_vec()][..], 1));
        assert!(flush(&mut stream, cx), "nothing held: nothing is put off");
        assert_eq!((woken.0.load(Ordering::Relaxed), stream.stream.flushes), (1, 2));
        assert_eq!(write(&mut stream, cx, b"more"), Poll::Ready(4));
        assert!(flush(&mut stream, cx) && flush(&mut stream, cx));
        assert_eq!((stream.stream.writes.len(), woken.0.load(Ordering::Relaxed)), (2, 2));
    }

    #[test]
    fn no_more_is_held_than_a_record_carries_and_a_full_wire_is_waited_for() {
        let (mut stream, woken) = over(10_000);
        let waker = Waker::from(woken);
        let cx = &mut Context::from_waker(&waker);
        let sent: Vec<u8> = (0..40_000u32).map(|n| n as u8).collect();
        let mut left = &sent[..];
        while let Poll::Ready(taken @ 1..) = write(&mut stream, cx, left) {
            left = &left[taken..];
            assert!(stream.held.len() <= HELD_MAX);
            if left.len() == 40_000 - HELD_MAX * 2 {
                stream.stream.at_once = 0;
            }
        }
        assert_eq!(left.len(), 40_000 - HELD_MAX * 2, "it waits, and takes nothing meanwhile");
        assert!(!Pin::new(&mut stream).poll_shutdown(cx).is_ready(), "nor is anything lost at the end");
        stream.stream.at_once = 7;
        assert_eq!(write(&mut stream, cx, left), Poll::Ready(left.len()));
        assert!(Pin::new(&mut stream).poll_shutdown(cx).is_ready());
        assert_eq!(stream.stream.writes.concat(), sent);
        assert!(stream.held.capacity() <= ROOM_KEPT);
    }
}
