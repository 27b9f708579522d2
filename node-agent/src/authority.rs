//! Lets in gRPC clients that name the socket they connected to: gRPC's C library (Python, Ruby, C++) and older ones in Go
//! write the path of a Unix socket into `:authority`, plain or percent-encoded. No authority looks so (RFC 3986 section
//! 3.2), and our HTTP/2 library resets the stream (h2 issue 487). On a Unix socket nobody asks for the authority, so its
//! value is replaced on the way in by letters, as many as it has: the tables of both ends stay in step (RFC 7541 section 4).
//!
//! Never: a change of anything else. What is not understood goes on as it came, and the library judges it.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tonic::transport::server::Connected;

/// The client's first bytes (RFC 9113 section 3.4), before its first frame.
const PREFACE_BYTES: usize = 24;
const FRAME_HEADER_BYTES: usize = 9;
/// The largest frame that a client may send unless we told it otherwise (RFC 9113 section 4.2).
const FRAME_BYTES_MAX: usize = 16 * 1024;
/// Read at once.
const READ_BYTES: usize = 4 * 1024;

/// A connection whose requests have a harmless authority.
#[derive(Debug)]
pub struct Lenient<S> {
    stream: S,
    filter: Filter,
}

impl<S> Lenient<S> {
    /// Around a connection that was just accepted.
    pub fn new(stream: S) -> Self {
        Self { stream, filter: Filter::default() }
    }
}

impl<S: Connected> Connected for Lenient<S> {
    type ConnectInfo = S::ConnectInfo;
    fn connect_info(&self) -> Self::ConnectInfo {
        self.stream.connect_info()
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Lenient<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut bytes = [0; READ_BYTES];
        while !self.filter.give(buf) {
            let mut read = ReadBuf::new(&mut bytes);
            ready!(Pin::new(&mut self.stream).poll_read(cx, &mut read))?;
            if read.filled().is_empty() {
                return Poll::Ready(Ok(()));
            }
            self.filter.take(read.filled());
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Lenient<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// What goes through, frame by frame.
#[derive(Debug)]
struct Filter {
    /// Goes on as it comes: so many bytes of the preface or of a frame.
    pass: usize,
    /// The beginning of a frame, and all of one with headers.
    held: Vec<u8>,
    /// May be read.
    out: Vec<u8>,
    /// Of it already read.
    given: usize,
}

impl Default for Filter {
    fn default() -> Self {
        Self { pass: PREFACE_BYTES, held: Vec::new(), out: Vec::new(), given: 0 }
    }
}

impl Filter {
    /// Gives what may be read; false if there is nothing.
    fn give(&mut self, buf: &mut ReadBuf<'_>) -> bool {
        let rest = self.out.get(self.given..).unwrap_or_default();
        let n = rest.len().min(buf.remaining());
        buf.put_slice(rest.get(..n).unwrap_or_default());
        self.given += n;
        if self.given == self.out.len() {
            self.out.clear();
            self.given = 0;
        }
        n > 0
    }

    fn take(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let (now, rest) = if self.pass > 0 {
                let (now, rest) = bytes.split_at(bytes.len().min(self.pass));
                self.out.extend_from_slice(now);
                self.pass -= now.len();
                (now, rest)
            } else {
                let missing = self.missing();
                let (now, rest) = bytes.split_at(bytes.len().min(missing));
                self.held.extend_from_slice(now);
                (now, rest)
            };
            debug_assert!(!now.is_empty(), "each turn takes something");
            bytes = rest;
            if self.pass == 0 {
                self.look();
            }
        }
    }

    /// Bytes until there is something to decide.
    fn missing(&self) -> usize {
        match frame(&self.held) {
            None => FRAME_HEADER_BYTES - self.held.len(),
            Some(frame) => FRAME_HEADER_BYTES + frame.len - self.held.len(),
        }
    }

    /// Decides on what is held.
    fn look(&mut self) {
        let Some(frame) = frame(&self.held) else { return };
        if !frame.has_a_whole_block() || frame.len > FRAME_BYTES_MAX {
            self.out.append(&mut self.held);
            self.pass = frame.len;
        } else if self.held.len() == FRAME_HEADER_BYTES + frame.len {
            match frame.harmless(&self.held) {
                Some(harmless) => self.out.extend(harmless),
                None => self.out.extend_from_slice(&self.held),
            }
            self.held.clear();
        }
    }
}

/// The header of a frame (RFC 9113 section 4.1).
#[derive(Clone, Copy, Debug)]
struct Frame {
    len: usize,
    kind: u8,
    flags: u8,
}

fn frame(held: &[u8]) -> Option<Frame> {
    let [a, b, c, kind, flags, ..] = *held.get(..FRAME_HEADER_BYTES)? else { return None };
    Some(Frame { len: usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c), kind, flags })
}

impl Frame {
    /// HEADERS with END_HEADERS: a block that is split over frames is as rare as it is legal.
    fn has_a_whole_block(self) -> bool {
        self.kind == 1 && self.flags & 0x4 != 0
    }

    /// The frame `whole` with a harmless authority; none if there is nothing to replace or to understand.
    fn harmless(self, whole: &[u8]) -> Option<Vec<u8>> {
        let (head, payload) = whole.split_at_checked(FRAME_HEADER_BYTES)?;
        let padded = self.flags & 0x8 != 0;
        let before = usize::from(padded) + if self.flags & 0x20 != 0 { 5 } else { 0 };
        let padding = if padded { usize::from(*payload.first()?) } else { 0 };
        let (fields, rest) = payload.split_at_checked(before)?;
        let (block, padding) = rest.split_at_checked(rest.len().checked_sub(padding)?)?;
        let block = harmless(block)?;
        let len = u32::try_from(fields.len() + block.len() + padding.len()).ok()?.to_be_bytes();
        let fits = fields.len() + block.len() + padding.len() <= FRAME_BYTES_MAX;
        if fits { Some([len.get(1..)?, head.get(3..)?, fields, &block, padding].concat()) } else { None }
    }
}

/// A block of headers (RFC 7541 section 6) with every value of `:authority` replaced.
fn harmless(block: &[u8]) -> Option<Vec<u8>> {
    let (mut rest, mut out, mut replaced) = (block, Vec::with_capacity(block.len() + 64), false);
    while let Some(first) = rest.first() {
        let (prefix, literal) = match first {
            0x80.. => (7, false),
            0x40.. => (6, true),
            0x20.. => (5, false),
            _ => (4, true),
        };
        let (index, mut after) = integer(rest, prefix)?;
        let mut is_authority = index == 1;
        if literal && index == 0 {
            let (name, more) = string(after)?;
            (is_authority, after) = (!name.huffman && name.bytes == b":authority", more);
        }
        if literal {
            let (value, more) = string(after)?;
            if is_authority && !value.bytes.is_empty() {
                out.extend_from_slice(rest.get(..rest.len() - after.len())?);
                write(value.letters()?, &mut out);
                (rest, replaced) = (more, true);
                continue;
            }
            after = more;
        }
        out.extend_from_slice(rest.get(..rest.len() - after.len())?);
        rest = after;
    }
    replaced.then_some(out)
}

/// A string literal (RFC 7541 section 5.2).
struct Text<'a> {
    huffman: bool,
    bytes: &'a [u8],
}

fn string(from: &[u8]) -> Option<(Text<'_>, &[u8])> {
    let huffman = from.first()? & 0x80 != 0;
    let (len, rest) = integer(from, 7)?;
    let (bytes, rest) = rest.split_at_checked(len)?;
    Some((Text { huffman, bytes }, rest))
}

/// An integer with a prefix of so many bits (RFC 7541 section 5.1), of no more than fits a frame.
fn integer(from: &[u8], prefix: u32) -> Option<(usize, &[u8])> {
    let (first, mut rest) = from.split_first()?;
    let full = (1usize << prefix) - 1;
    let mut value = usize::from(*first) & full;
    if value < full {
        return Some((value, rest));
    }
    for shift in [0, 7, 14] {
        let (byte, more) = rest.split_first()?;
        value += usize::from(byte & 0x7f) << shift;
        rest = more;
        if byte & 0x80 == 0 {
            return Some((value, rest));
        }
    }
    None
}

/// So many letters, as a string literal that is not compressed.
fn write(letters: usize, out: &mut Vec<u8>) {
    match u8::try_from(letters) {
        Ok(small @ ..0x7f) => out.push(small),
        _ => {
            let mut more = letters - 0x7f;
            out.push(0x7f);
            while more >= 0x80 {
                out.push((more & 0x7f) as u8 | 0x80);
                more >>= 7;
            }
            out.push(more as u8);
        }
    }
    out.resize(out.len() + letters, b'x');
}

impl Text<'_> {
    /// How many octets it stands for.
    fn letters(&self) -> Option<usize> {
        if self.huffman { symbols(self.bytes) } else { Some(self.bytes.len()) }
    }
}

/// Codes by their length in bits (RFC 7541 appendix B). The code is canonical: those of one length are consecutive, and the
/// lengths alone tell where one ends. The last of 30 bits ends a string and never stands in one.
const CODES: [(u32, u32); 21] = [
    (5, 10),
    (6, 26),
    (7, 32),
    (8, 6),
    (10, 5),
    (11, 3),
    (12, 2),
    (13, 6),
    (14, 2),
    (15, 3),
    (19, 3),
    (20, 8),
    (21, 13),
    (22, 26),
    (23, 29),
    (24, 12),
    (25, 4),
    (26, 15),
    (27, 19),
    (28, 29),
    (30, 3),
];

/// How many symbols a string in Huffman's code has; none if it ends in the middle of one.
fn symbols(bytes: &[u8]) -> Option<usize> {
    let bits: Vec<u32> = bytes.iter().flat_map(|byte| (0..8).rev().map(move |n| u32::from(byte >> n & 1))).collect();
    let (mut rest, mut count) = (bits.as_slice(), 0);
    'symbol: while !rest.is_empty() {
        let (mut code, mut read, mut first) = (0, 0, 0);
        for (len, codes) in CODES {
            while read < len {
                let Some(bit) = rest.get(read as usize) else {
                    // Padding is less than an octet, all ones.
                    return (rest.len() < 8 && rest.iter().all(|bit| *bit == 1)).then_some(count);
                };
                (code, read, first) = (code << 1 | bit, read + 1, first << 1);
            }
            if code - first < codes {
                (rest, count) = (rest.get(len as usize..)?, count + 1);
                continue 'symbol;
            }
            first += codes;
        }
        return None;
    }
    Some(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(text: &str) -> Vec<u8> {
        hex::decode(text.replace(' ', "")).unwrap()
    }

    /// RFC 7541 appendices C.4 and C.6.
    #[test]
    fn compressed_strings_have_the_lengths_that_the_standard_says() {
        for (bytes, text) in [
            ("f1e3 c2e5 f23a 6ba0 ab90 f4ff", "www.example.com"),
            ("a8eb 1064 9cbf", "no-cache"),
            ("25a8 49e9 5ba9 7d7f", "custom-key"),
            ("25a8 49e9 5bb8 e8b4 bf", "custom-value"),
            ("6402", "302"),
            ("aec3 771a 4b", "private"),
            ("d07a be94 1054 d444 a820 0595 040b 8166 e082 a62d 1bff", "Mon, 21 Oct 2013 20:13:21 GMT"),
            ("9d29 ad17 1863 c78f 0b97 c8e9 ae82 ae43 d3", "https://www.example.com"),
            (
                "94e7 821d d7f2 e6c7 b335 dfdf cd5b 3960 d5af 2708 7f36 72c1 ab27 0fb5 291f 9587 3160 65c0 03ed 4ee5 \
                 b106 3d50 07",
                "foo=ASDJKHQKBZXOQWEOPIUAXQWEOIU; max-age=3600; version=1",
            ),
            ("", ""),
        ] {
            assert_eq!(symbols(&hex(bytes)), Some(text.len()), "{text}");
        }
        // Padding of an octet; the end-of-string symbol; padding that is not ones.
        for bad in ["ff", "ffff ffff", "64"] {
            assert_eq!(symbols(&hex(bad)), None, "{bad}");
        }
    }

    #[test]
    fn nothing_but_the_authority_is_replaced_and_its_length_stays() {
        let long = "2f".repeat(300);
        let path = "2f746d702f78";
        for (block, found) in [
            // C.4.1: compressed, between indexed fields.
            ("8286 84 41 8c f1e3c2e5f23a6ba0ab90f4ff".to_owned(), Some(format!("8286 84 41 0f {}", "78".repeat(15)))),
            // A path, in each representation; and what follows.
            (format!("41 06 {path} 82"), Some(format!("41 06 {} 82", "78".repeat(6)))),
            (format!("01 06 {path} 82"), Some(format!("01 06 {} 82", "78".repeat(6)))),
            (format!("11 06 {path} 82"), Some(format!("11 06 {} 82", "78".repeat(6)))),
            (
                format!("40 0a 3a617574686f72697479 06 {path}"),
                Some(format!("40 0a 3a617574686f72697479 06 {}", "78".repeat(6))),
            ),
            (format!("41 7f ad01 {long}"), Some(format!("41 7f ad01 {}", "78".repeat(300)))),
            // :path, another literal, an update of the table's size.
            (format!("3f e1 1f 44 06 {path} 40 01 61 06 {path}"), None),
            ("41 00".to_owned(), None),
            (format!("41 07 {path}"), None),
            (format!("41 ff ff ff ff 7f {path}"), None),
            ("41".to_owned(), None),
            ("ff".to_owned(), None),
        ] {
            assert_eq!(harmless(&hex(&block)), found.map(|found| hex(&found)), "{block}");
        }
    }

    fn frame_of(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let len = u32::try_from(payload.len()).unwrap().to_be_bytes();
        [&len[1..], &[kind, flags, 0, 0, 0, 1], payload].concat()
    }

    /// However the bytes arrive, the same goes through.
    #[test]
    fn frames_go_through_in_any_pieces() {
        let path = hex("2f746d702f78");
        let block = |value: &[u8]| [&[0x82, 0x41, 6], value, &[0x84]].concat();
        let padded = |value: &[u8]| [&[2, 0, 0, 0, 0, 9], block(value).as_slice(), &[0, 0]].concat();
        let stream = |value: &[u8]| {
            let mut all = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
            all.extend(frame_of(4, 0, &[0; 18]));
            all.extend(frame_of(1, 0x5, &block(value)));
            all.extend(frame_of(0, 1, &vec![0x41; 20_000]));
            all.extend(frame_of(1, 0x2c, &padded(value)));
            // Not whole: as it came.
            all.extend(frame_of(1, 0, &block(&path)));
            all.extend(frame_of(9, 4, &[0x82]));
            all.extend(frame_of(1, 4, &[9; 17_000]));
            all.extend(frame_of(1, 4, &[]));
            all
        };
        let (come, goes) = (stream(&path), stream(b"xxxxxx"));
        for piece in [1, 2, 7, 9, 24, 25, 1000, come.len()] {
            let (mut filter, mut out) = (Filter::default(), Vec::new());
            for bytes in come.chunks(piece) {
                filter.take(bytes);
                let mut bytes = [0; 500];
                loop {
                    let mut buf = ReadBuf::new(&mut bytes);
                    if !filter.give(&mut buf) {
                        break;
                    }
                    out.extend_from_slice(buf.filled());
                }
            }
            assert!(out == goes, "in pieces of {piece}");
            assert!(filter.held.is_empty() && filter.out.is_empty());
        }
    }
}
