//! The native mode between our own agents: a warm TLS connection of one pair of workloads carries one connection at a time,
//! and the next one after that has ended in both directions. Agreed by ALPN; whoever does not know it speaks HBONE.
//!
//! One TLS record is one frame: its first byte is the kind. The caller sends OPEN with the goal and its first bytes, and
//! sends nothing more until OPENED or RESET comes. After OPENED, DATA and one FIN go each way. Whoever has sent FIN and got
//! FIN knows that nothing of this connection is left in the tunnel, by TLS' own order, and so does who got RESET for its
//! OPEN; only then is it used again. Everything else ends the tunnel.
//!
//! Knows nothing of policy: who may open is decided by [`crate::inbound`], as for HBONE.

mod from;

use crate::pump::{self, Carried, End};
use crate::records::{self, CONTENT_MAX, HEADER_BYTES, RECORD_MAX, RECORDS, alert};
use crate::secure::{Secured, broken};
use crate::silence::{LOOK_EVERY, Watch};
use ambit_model::Address;
use http::StatusCode;
use std::future::Future;
use std::io::{self, IoSlice, IoSliceMut};
use std::net::{IpAddr, SocketAddr, SocketAddrV4};
use std::ops::Range;
use std::pin::pin;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::time::{sleep, timeout};

/// The name by which agents agree on it.
pub const ALPN: &[u8] = b"ambit/2";
/// The same of agents whose OPEN does not say where a connection begins.
pub const ALPN_BEFORE: &[u8] = b"ambit/1";
/// First bytes that go with the goal: what is left of a record.
pub const FIRST_MAX: usize = CONTENT_MAX - 128;
/// How long a captured connection's first bytes are waited for: protocols in which the server speaks first send none.
pub const FIRST_WAIT: Duration = Duration::from_millis(1);
/// A traceparent (W3C Trace Context, section 3.2).
const TRACE_BYTES: usize = 55;

const OPEN: u8 = 1;
const OPENED: u8 = 2;
const DATA: u8 = 3;
const FIN: u8 = 4;
const RESET: u8 = 5;

/// OPEN: the caller waits for OPENED with more to send.
const PROMPT: u8 = 1;
/// OPEN: the goal's address is of IPv6.
const V6: u8 = 8;

/// Why the receiving agent did not connect, in whichever mode it was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// OPEN made no sense.
    Malformed,
    /// By policy, or by who asks.
    Denied,
    /// No address of the workload that the tunnel is to.
    Elsewhere,
    /// The workload does not answer.
    Unreachable,
    /// It did not answer in time.
    Timeout,
    /// Too many connections there.
    Busy,
    /// It connected, and the workload broke off before it was told. What was sent may have been read.
    Reset,
}

impl Reason {
    const ALL: [Self; 7] =
        [Self::Malformed, Self::Denied, Self::Unreachable, Self::Timeout, Self::Busy, Self::Reset, Self::Elsewhere];

    fn code(self) -> u8 {
        match self {
            Self::Malformed => 1,
            Self::Denied => 2,
            Self::Unreachable => 3,
            Self::Timeout => 4,
            Self::Busy => 5,
            Self::Reset => 6,
            Self::Elsewhere => 7,
        }
    }
    fn of(code: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|reason| reason.code() == code)
    }
    /// The same in HBONE, as Istio's agents say it (ztunnel, `src/proxy/inbound.rs`).
    pub fn status(self) -> StatusCode {
        match self {
            Self::Malformed | Self::Elsewhere => StatusCode::BAD_REQUEST,
            Self::Denied => StatusCode::UNAUTHORIZED,
            Self::Unreachable | Self::Timeout | Self::Busy | Self::Reset => StatusCode::SERVICE_UNAVAILABLE,
        }
    }
}

/// A request to connect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Open {
    /// Where to.
    pub to: SocketAddr,
    /// The caller waits with more: it is told at once.
    pub prompt: bool,
    /// The caller's traceparent.
    pub trace: Option<String>,
    /// What the application that connects has for its own address, as its agent says; not told in tunnels of [`ALPN_BEFORE`].
    pub from: Option<SocketAddrV4>,
    /// The connection's first bytes.
    pub first: Vec<u8>,
}

impl Open {
    /// The frame's head: kind, flags, address (4 bytes, or 16 where a flag says so), port, length of the traceparent, traceparent,
    /// and in tunnels that [say](says_from) so, where it begins. The first bytes follow.
    fn head(&self, says_from: bool) -> Vec<u8> {
        let trace = self.trace.as_deref().unwrap_or_default().as_bytes();
        let prompt = if self.prompt { PROMPT } else { 0 };
        let mut head = match self.to.ip() {
            IpAddr::V4(address) => [&[OPEN, prompt], &address.octets()[..]].concat(),
            IpAddr::V6(address) => [&[OPEN, prompt | V6], &address.octets()[..]].concat(),
        };
        head.extend_from_slice(&self.to.port().to_be_bytes());
        head.push(u8::try_from(trace.len()).unwrap_or(0));
        head.extend_from_slice(trace);
        if says_from {
            from::put(self.from, &mut head);
        }
        head
    }

    /// Parses a frame, of a tunnel that says where connections begin or does not. Anything unclear is none.
    pub fn parse(frame: &[u8], says_from: bool) -> Option<Self> {
        let [OPEN, flags, rest @ ..] = frame else { return None };
        let (ip, rest): (IpAddr, _) = match flags & !PROMPT {
            0 => rest.split_first_chunk().map(|(v4, rest): (&[u8; 4], _)| ((*v4).into(), rest))?,
            V6 => rest.split_first_chunk().map(|(v6, rest): (&[u8; 16], _)| ((*v6).into(), rest))?,
            _ => return None,
        };
        // One that a workload can have, and never another way to write an IPv4 one.
        if ip.is_ipv6() && Address::try_from(ip).is_err() {
            return None;
        }
        let [high, low, length, rest @ ..] = rest else { return None };
        let (trace, rest) = rest.split_at_checked(usize::from(*length))?;
        let trace = match trace {
            [] => None,
            trace if is_trace(trace) => Some(String::from_utf8_lossy(trace).into_owned()),
            _ => return None,
        };
        let (from, first) = if says_from { from::take(rest)? } else { (None, rest) };
        let to = SocketAddr::new(ip, u16::from_be_bytes([*high, *low]));
        (to.port() != 0).then(|| Self { to, prompt: flags & PROMPT != 0, trace, from, first: first.to_vec() })
    }
}

/// Whether a name of ALPN is that of this mode.
pub fn is_native(protocol: Option<&[u8]>) -> bool {
    matches!(protocol, Some(ALPN | ALPN_BEFORE))
}

/// Whether OPEN says in this tunnel where a connection begins.
fn says_from(tunnel: &Secured) -> bool {
    tunnel.protocol.as_deref() == Some(ALPN)
}

/// Whether this can be a traceparent: it goes to logs and to other nodes as it is.
pub fn is_trace(text: &[u8]) -> bool {
    text.len() == TRACE_BYTES && text.iter().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f' | b'-'))
}

/// What became of OPEN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The connection is open.
    Opened,
    /// The far agent's reason against it. The tunnel is then as it was before.
    Refused(Reason),
    /// The far agent had ended the tunnel in order, by close_notify, before it read OPEN: nothing of it went anywhere. (One
    /// that breaks, as where the agent dies, ends without.)
    Left,
}

/// Sends OPEN and waits for the answer.
pub async fn open(tunnel: &mut Secured, open: &Open) -> io::Result<Answer> {
    tunnel.sealer.turn_key().map_err(broken)?;
    let head = open.head(says_from(tunnel));
    tunnel.sealer.push(&[&head, &open.first]).map_err(broken)?;
    flush(tunnel).await?;
    let at = match frame(tunnel).await {
        Err(_) if tunnel.opener.ended_in_order() => return Ok(Answer::Left),
        at => at?,
    };
    let answer = match tunnel.opener.bytes().get(at).unwrap_or_default() {
        [OPENED] => Answer::Opened,
        [RESET, code] => {
            Answer::Refused(Reason::of(*code).ok_or_else(|| io::Error::other("a reset without a reason"))?)
        }
        _ => return Err(io::Error::other("neither OPENED nor RESET")),
    };
    tunnel.opener.rest();
    Ok(answer)
}

/// Ends a tunnel that carries nothing, so that whoever has it knows that what it sends now goes nowhere: close_notify, and
/// then all that comes is read and dropped until the far end has closed. Were it not read, a reset would overtake the word.
pub async fn leave(mut tunnel: Secured) -> io::Result<()> {
    tunnel.sealer.alert(alert::CLOSE_NOTIFY).map_err(broken)?;
    flush(&mut tunnel).await?;
    tunnel.tcp.shutdown().await?;
    while tunnel.tcp.read(&mut [0; 512]).await? > 0 {}
    Ok(())
}

/// Waits for OPEN; none where the frame is none. An error where the peer ends the tunnel.
pub async fn asked(tunnel: &mut Secured) -> io::Result<Option<Open>> {
    let at = frame(tunnel).await?;
    let says_from = says_from(tunnel);
    let open = tunnel.opener.bytes().get(at).and_then(|frame| Open::parse(frame, says_from));
    tunnel.opener.rest();
    Ok(open)
}

/// Says no, and why: the whole answer to OPEN.
pub async fn refuse(tunnel: &mut Secured, reason: Reason) -> io::Result<()> {
    tunnel.sealer.turn_key().map_err(broken)?;
    tunnel.sealer.push(&[&[RESET, reason.code()]]).map_err(broken)?;
    flush(tunnel).await
}

/// Says yes, unless the workload behind `pod` is found to have broken off. It goes with the first bytes of the answer if these
/// come at once and the caller does not wait for it; how many these were.
pub async fn agree(tunnel: &mut Secured, pod: &mut TcpStream, prompt: bool) -> io::Result<Result<u64, Reason>> {
    tunnel.sealer.turn_key().map_err(broken)?;
    if prompt || timeout(FIRST_WAIT, pod.readable()).await.is_err() {
        tunnel.sealer.push(&[&[OPENED]]).map_err(broken)?;
        flush(tunnel).await?;
        return Ok(Ok(0));
    }
    let mut buffer = records::buffer();
    // What is not there after all, and an end, are found again by whoever carries.
    let n = match fill(&pod.split().0, &mut buffer, false) {
        Ok(n) => n,
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => 0,
        Err(_) => return Ok(Err(Reason::Reset)),
    };
    tunnel.sealer.push(&[&[OPENED]]).map_err(broken)?;
    let sealed = if n > 0 { seal(&mut tunnel.sealer, &mut buffer, n).map_err(broken)? } else { 0 };
    let opened = tunnel.sealer.take();
    let mut slices = [IoSlice::new(&opened), IoSlice::new(buffer.get(..sealed).unwrap_or_default())];
    write_all(&mut tunnel.tcp.split().1, &mut &mut slices[..]).await?;
    records::keep(buffer);
    Ok(Ok(n as u64))
}

async fn flush(tunnel: &mut Secured) -> io::Result<()> {
    let sealed = tunnel.sealer.take();
    tunnel.tcp.write_all(&sealed).await
}

/// The next frame: where it lies.
async fn frame(tunnel: &mut Secured) -> io::Result<Range<usize>> {
    loop {
        if let Some(at) = tunnel.opener.next_record().map_err(broken)? {
            return Ok(at);
        }
        tunnel.opener.rest();
        tunnel.tcp.readable().await?;
        match tunnel.tcp.read(tunnel.opener.room()).await? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            n => tunnel.opener.filled(n),
        }
    }
}

/// What was moved of a connection before it is carried.
#[derive(Debug, Default)]
pub struct Begun {
    /// Read from the socket and not sent.
    pub up: Vec<u8>,
    /// Came by the tunnel and was not written.
    pub down: Vec<u8>,
    /// Bytes that went from the socket into the tunnel.
    pub sent: u64,
    /// Bytes that went from the tunnel into the socket.
    pub received: u64,
}

/// Carries until both directions are closed, one breaks, the far machine is gone, or `cut` says that the connection may not go
/// on. After [`End::Closed`] the tunnel is as it was before; after anything else it is not to be used, and both it and the
/// socket, which [breaks off unless ended](pump::break_off_unless_ended), are reset.
pub async fn carry(tcp: &mut TcpStream, tunnel: &mut Secured, begun: Begun, cut: impl Future<Output = ()>) -> Carried {
    let Begun { up, down, mut sent, mut received } = begun;
    let ended = {
        let (mut read, mut write) = tcp.split();
        let (far_read, far_write) = tunnel.tcp.split();
        let timer = pin!(sleep(LOOK_EVERY));
        let out = Out { far: far_write, watch: Watch::new(timer) };
        let mut up = pin!(upward(&mut read, out, &mut tunnel.sealer, up, &mut sent));
        let mut down = pin!(downward(far_read, &mut write, &mut tunnel.opener, down, &mut received));
        let both = async {
            tokio::select! {
                biased;
                out = &mut up => {
                    let mut out = out?;
                    tokio::select! {
                        biased;
                        ended = &mut down => ended,
                        // What was sent last is still to be acknowledged.
                        () = out.watch.gone(out.far.as_ref()) => Err(End::Far),
                    }
                }
                ended = &mut down => {
                    ended?;
                    up.await.map(drop)
                }
            }
        };
        tokio::select! {
            ended = both => ended.map_or_else(|end| end, |()| End::Closed),
            () = cut => End::Cut,
        }
    };
    if ended == End::Closed {
        pump::end_in_order(tcp);
    } else {
        tunnel.tell_failure();
        let _ = tunnel.tcp.set_zero_linger();
    }
    Carried { end: ended, sent, received }
}

/// Content of a DATA frame.
const PAYLOAD_MAX: usize = CONTENT_MAX - 1;
/// Where it lies in a record: behind the header and the kind.
const PAYLOAD_AT: usize = HEADER_BYTES + 1;

/// The way into the tunnel.
struct Out<'a> {
    far: WriteHalf<'a>,
    watch: Watch<'a>,
}

impl Out<'_> {
    async fn send<const N: usize>(&mut self, mut slices: [IoSlice<'_>; N]) -> Result<(), End> {
        let mut rest = &mut slices[..];
        self.watch.arm();
        loop {
            tokio::select! {
                biased;
                done = write_all(&mut self.far, &mut rest) => return done.map_err(|_| End::Far),
                () = self.watch.due() => self.look()?,
            }
        }
    }

    /// Until there is something to read, while the far machine is there.
    async fn wait(&mut self, read: &ReadHalf<'_>) -> Result<(), End> {
        loop {
            tokio::select! {
                biased;
                ready = read.readable() => return ready.map_err(|_| End::Near),
                () = self.watch.due() => self.look()?,
            }
        }
    }

    fn look(&mut self) -> Result<(), End> {
        if self.watch.is_gone(self.far.as_ref()) { Err(End::Far) } else { Ok(()) }
    }
}

async fn upward<'a>(
    read: &mut ReadHalf<'_>,
    mut out: Out<'a>,
    sealer: &mut records::Sealer,
    first: Vec<u8>,
    sent: &mut u64,
) -> Result<Out<'a>, End> {
    let mut many = false;
    if !first.is_empty() {
        sealer.push(&[&[DATA], &first]).map_err(|_| End::Far)?;
        out.send([IoSlice::new(&sealer.take())]).await?;
        *sent += first.len() as u64;
    }
    loop {
        out.wait(read).await?;
        let mut buffer = records::buffer();
        let n = match fill(read, &mut buffer, many) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                records::keep(buffer);
                continue;
            }
            read => read.map_err(|_| End::Near)?,
        };
        // A connection that filled a record may have more to say: all that there is in one call.
        many = n >= PAYLOAD_MAX;
        let sealed = seal(sealer, &mut buffer, n).map_err(|_| End::Far)?;
        let waiting = sealer.take();
        out.send([IoSlice::new(&waiting), IoSlice::new(buffer.get(..sealed).unwrap_or_default())]).await?;
        records::keep(buffer);
        if n == 0 {
            return Ok(out);
        }
        *sent += n as u64;
    }
}

/// Reads into the places that content has in records: they are sealed where they lie.
fn fill(read: &ReadHalf<'_>, buffer: &mut [u8], many: bool) -> io::Result<usize> {
    let mut places = buffer.chunks_mut(RECORD_MAX).filter_map(|r| r.get_mut(PAYLOAD_AT..PAYLOAD_AT + PAYLOAD_MAX));
    if !many {
        // It may be ready for what was read before: the buffer is not to be held until more comes.
        return read.try_read(places.next().unwrap_or_default());
    }
    let mut slices: [IoSliceMut<'_>; RECORDS] =
        std::array::from_fn(|_| IoSliceMut::new(places.next().unwrap_or_default()));
    read.try_read_vectored(&mut slices)
}

/// Seals `n` bytes that [`fill`] read as DATA, or FIN where there are none; the records lie one behind the other.
fn seal(sealer: &mut records::Sealer, buffer: &mut [u8], n: usize) -> Result<usize, records::RecordError> {
    sealer.turn_key()?;
    if n == 0 {
        sealer.push(&[&[FIN]])?;
        return Ok(0);
    }
    let (mut left, mut end) = (n, 0);
    while left > 0 {
        let payload = left.min(PAYLOAD_MAX);
        let record = buffer.get_mut(end..).unwrap_or_default();
        if let Some(kind) = record.get_mut(HEADER_BYTES) {
            *kind = DATA;
        }
        end += sealer.seal(record, payload + 1)?;
        left -= payload;
    }
    Ok(end)
}

/// Writes `rest`, which is what is left of it whenever this is dropped.
async fn write_all(to: &mut WriteHalf<'_>, rest: &mut &mut [IoSlice<'_>]) -> io::Result<()> {
    IoSlice::advance_slices(rest, 0);
    while !rest.is_empty() {
        match to.write_vectored(rest).await? {
            0 => return Err(io::ErrorKind::WriteZero.into()),
            n => IoSlice::advance_slices(rest, n),
        }
    }
    Ok(())
}

/// Frames that go to the application in one call.
const AT_ONCE: usize = 16;

async fn downward(
    mut far: ReadHalf<'_>,
    write: &mut WriteHalf<'_>,
    opener: &mut records::Opener,
    first: Vec<u8>,
    received: &mut u64,
) -> Result<(), End> {
    write.write_all(&first).await.map_err(|_| End::Near)?;
    *received += first.len() as u64;
    loop {
        let (places, count, fin) = gather(opener).map_err(|_| End::Far)?;
        if count > 0 {
            let bytes = opener.bytes();
            let mut slices: [IoSlice<'_>; AT_ONCE] = std::array::from_fn(|n| {
                let place = places.get(n).filter(|_| n < count).cloned().unwrap_or_default();
                IoSlice::new(bytes.get(place).unwrap_or_default())
            });
            *received += slices.iter().map(|s| s.len() as u64).sum::<u64>();
            write_all(write, &mut &mut slices[..]).await.map_err(|_| End::Near)?;
        }
        if fin {
            opener.rest();
            return write.shutdown().await.map_err(|_| End::Near);
        }
        if count == AT_ONCE {
            continue;
        }
        opener.rest();
        far.readable().await.map_err(|_| End::Far)?;
        match far.read(opener.room()).await {
            Ok(n) if n > 0 => opener.filled(n),
            // Without FIN it is no orderly end.
            Ok(_) | Err(_) => return Err(End::Far),
        }
    }
}

/// DATA frames that are here whole, how many, and whether FIN follows them.
fn gather(opener: &mut records::Opener) -> io::Result<([Range<usize>; AT_ONCE], usize, bool)> {
    let mut places: [Range<usize>; AT_ONCE] = std::array::from_fn(|_| 0..0);
    let mut count = 0;
    for place in &mut places {
        let Some(at) = opener.next_record().map_err(broken)? else { break };
        match opener.bytes().get(at.clone()).unwrap_or_default() {
            [DATA, _, ..] => *place = at.start + 1..at.end,
            [FIN] => return Ok((places, count, true)),
            _ => return Err(io::Error::other("neither DATA nor FIN")),
        }
        count += 1;
    }
    Ok((places, count, false))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_for_is_parsed_to_the_letter() {
        let open = Open {
            to: "10.72.101.11:8080".parse().unwrap(),
            prompt: true,
            trace: Some(format!("00-{}-{}-01", "ab".repeat(16), "cd".repeat(8))),
            from: Some("10.71.101.11:40000".parse().unwrap()),
            first: b"first".to_vec(),
        };
        let frame = [open.head(true), open.first.clone()].concat();
        assert_eq!(Open::parse(&frame, true), Some(open.clone()));
        let bare = Open { prompt: false, trace: None, from: None, first: vec![], ..open.clone() };
        assert_eq!(Open::parse(&bare.head(true), true), Some(bare.clone()));
        // As those say and hear it who do not know the field.
        let before = [open.head(false), open.first.clone()].concat();
        assert_eq!(Open::parse(&before, false), Some(Open { from: None, ..open }));
        assert_eq!(Open::parse(&bare.head(false), false), Some(bare.clone()));
        for length in [1, 5, 7, 12, 255] {
            let frame = [&bare.head(false)[..], &[length], &[7; 12]].concat();
            assert_eq!(Open::parse(&frame, true), None, "a beginning of {length} bytes");
        }
        assert_eq!(Open::parse(&bare.head(false), true), None);
        let changed = |at: usize, to: u8| {
            let mut frame = frame.clone();
            frame[at] = to;
            Open::parse(&frame, true)
        };
        for (at, to) in [(0, DATA), (1, 2), (8, 54), (8, 200), (9, b'G'), (9, b'\n')] {
            assert_eq!(changed(at, to), None, "byte {at} = {to}");
        }
        for short in 0..9 {
            assert_eq!(Open::parse(&frame[..short], true), None, "{short} bytes");
        }
        let mut nowhere = bare.head(true);
        (nowhere[6], nowhere[7]) = (0, 0);
        assert_eq!(Open::parse(&nowhere, true), None, "port 0");
    }

    #[test]
    fn every_reason_is_told_and_understood() {
        for code in 0..=u8::MAX {
            let reason = Reason::of(code);
            assert_eq!(reason.is_some(), (1..=7).contains(&code));
            assert!(reason.is_none_or(|reason| reason.code() == code));
        }
    }
}
