//! Frames between two agents of one node, one of which takes over from the other, on a Unix socket: bytes, and with some of
//! them a descriptor (unix(7), SCM_RIGHTS).
//!
//! A frame is its length (four bytes, big-endian), its kind (one byte) and its content. Knows nothing of what is said.

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::Mutex;

/// A slice as it is put together of deltas at most, and what surrounds it.
const FRAME_BYTES_MAX: usize = ambit_proto::resources::SET_BYTES_MAX + (1 << 20);
/// Length and kind.
const HEAD: usize = 5;
/// Read or written in one call.
const CHUNK: usize = 64 * 1024;

/// One end. Whoever reads it reads alone; frames of several writers do not mix.
#[derive(Debug)]
pub struct Wire {
    stream: UnixStream,
    writing: Mutex<()>,
    reading: Mutex<()>,
}

/// What came.
#[derive(Debug)]
pub struct Frame {
    /// Its kind.
    pub kind: u8,
    /// Its content.
    pub content: Vec<u8>,
    /// What was handed over with it.
    pub descriptor: Option<OwnedFd>,
}

impl Wire {
    /// Over this socket.
    pub fn new(stream: UnixStream) -> Self {
        Self { stream, writing: Mutex::default(), reading: Mutex::default() }
    }

    /// The process at the other end, and whose it is, as the kernel saw them when it connected.
    pub fn peer(&self) -> io::Result<(u32, Option<i32>)> {
        let peer = self.stream.peer_cred()?;
        Ok((peer.uid(), peer.pid()))
    }

    /// Sends a frame whole.
    ///
    /// # Errors
    /// The other end is gone, or the content too long.
    pub async fn send(&self, kind: u8, content: &[u8], descriptor: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let length = u32::try_from(content.len()).ok().filter(|_| content.len() <= FRAME_BYTES_MAX);
        let length = length.ok_or_else(|| io::Error::other("a frame that is too long"))?;
        let _writing = self.writing.lock().await;
        let mut head = [0; HEAD];
        head[..4].copy_from_slice(&length.to_be_bytes());
        head[4] = kind;
        self.write(&head, descriptor).await?;
        self.write(content, None).await
    }

    async fn write(&self, bytes: &[u8], mut descriptor: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let mut rest = bytes;
        while !rest.is_empty() {
            let part = rest.get(..rest.len().min(CHUNK)).unwrap_or(rest);
            let sent = self.stream.async_io(Interest::WRITABLE, || {
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
                let mut control = SendAncillaryBuffer::new(&mut space);
                let descriptors = descriptor.as_slice();
                if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
                    return Err(io::Error::other("no room for a descriptor"));
                }
                let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
                Ok(sendmsg(self.stream.as_fd(), &[IoSlice::new(part)], &mut control, flags)?)
            });
            let sent = sent.await?;
            descriptor = None;
            rest = rest.get(sent..).unwrap_or_default();
        }
        Ok(())
    }

    /// The next frame; none where the other end has closed in between two.
    ///
    /// # Errors
    /// It ended within one, or says what is none.
    pub async fn next(&self) -> io::Result<Option<Frame>> {
        let _reading = self.reading.lock().await;
        let mut descriptor = None;
        let mut head = [0; HEAD];
        if !self.read(&mut head, &mut descriptor).await? {
            return Ok(None);
        }
        let [a, b, c, d, kind] = head;
        let length = u32::from_be_bytes([a, b, c, d]) as usize;
        if length > FRAME_BYTES_MAX {
            return Err(io::Error::other("a frame that is too long"));
        }
        let mut content = vec![0; length];
        if length > 0 && !self.read(&mut content, &mut descriptor).await? {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(Some(Frame { kind, content, descriptor }))
    }

    /// Fills `into`; false where the other end had closed before the first byte.
    async fn read(&self, into: &mut [u8], descriptor: &mut Option<OwnedFd>) -> io::Result<bool> {
        let mut filled = 0;
        while filled < into.len() {
            let end = into.len().min(filled + CHUNK);
            let room = into.get_mut(filled..end).unwrap_or_default();
            let read = self.stream.async_io(Interest::READABLE, || {
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
                let mut control = RecvAncillaryBuffer::new(&mut space);
                let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
                let read = recvmsg(self.stream.as_fd(), &mut [IoSliceMut::new(room)], &mut control, flags)?;
                for message in control.drain() {
                    if let RecvAncillaryMessage::ScmRights(mut descriptors) = message {
                        *descriptor = descriptors.next().or(descriptor.take());
                    }
                }
                Ok(read.bytes)
            });
            match read.await? {
                0 if filled == 0 => return Ok(false),
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n => filled += n,
            }
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use tokio::io::AsyncWriteExt;

    fn pair() -> (Wire, Wire) {
        let (a, b) = UnixStream::pair().unwrap();
        (Wire::new(a), Wire::new(b))
    }

    #[tokio::test]
    async fn frames_come_whole_in_order_and_each_with_its_descriptor() {
        let (here, there) = pair();
        let large: Vec<u8> = (0..3_000_000).map(|n| (n % 251) as u8).collect();
        let files: Vec<_> = (0..3).map(|_| std::os::unix::net::UnixStream::pair().unwrap()).collect();
        let sending = async {
            here.send(7, b"", None).await.unwrap();
            for (n, (given, _)) in files.iter().enumerate() {
                here.send(n as u8, &[n as u8], Some(given.as_fd())).await.unwrap();
            }
            here.send(9, &large, None).await.unwrap();
            drop(here);
        };
        let reading = async {
            let first = there.next().await.unwrap().unwrap();
            assert_eq!((first.kind, first.content.len(), first.descriptor.is_some()), (7, 0, false));
            for (n, (_, other)) in files.iter().enumerate() {
                let frame = there.next().await.unwrap().unwrap();
                assert_eq!((frame.kind, frame.content), (n as u8, vec![n as u8]));
                let mut given = std::os::unix::net::UnixStream::from(frame.descriptor.expect("a descriptor"));
                given.write_all(&[n as u8]).unwrap();
                let mut said = [9];
                (&*other).read_exact(&mut said).unwrap();
                assert_eq!(said, [n as u8], "the very one");
            }
            let last = there.next().await.unwrap().unwrap();
            assert!(last.kind == 9 && last.content == large && last.descriptor.is_none());
            assert!(there.next().await.unwrap().is_none(), "the end");
        };
        tokio::join!(sending, reading);
    }

    #[tokio::test]
    async fn what_is_no_frame_is_an_error_and_takes_no_memory() {
        for bytes in [&[0xff, 0xff, 0xff, 0xff, 0][..], &[0, 0, 0, 9, 1, 2], &[0, 0]] {
            let (mut raw, other) = UnixStream::pair().unwrap();
            raw.write_all(bytes).await.unwrap();
            drop(raw);
            assert!(Wire::new(other).next().await.is_err(), "{bytes:?}");
        }
        let (here, _there) = pair();
        assert!(here.send(0, &vec![0; FRAME_BYTES_MAX + 1], None).await.is_err());
    }
}
