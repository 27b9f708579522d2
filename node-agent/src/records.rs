//! The record layer of TLS 1.3 (RFC 8446, section 5) for tunnels: rustls shakes hands, verifies and derives every key
//! ([`crate::secure`]); here records are sealed and opened where they lie, in buffers that hold several.
//!
//! Must never choose a key, a peer or an algorithm: all of them come from the handshake.

use aws_lc_rs::aead::{AES_128_GCM, AES_256_GCM, Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use rustls::ConnectionTrafficSecrets;
use std::cell::RefCell;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Content type, version, length.
pub const HEADER_BYTES: usize = 5;
/// Content type and tag, behind the content.
const TRAILER_BYTES: usize = 17;
/// The most that a record carries (section 5.1).
pub const CONTENT_MAX: usize = 16 * 1024;
/// A whole record, as we make them.
pub const RECORD_MAX: usize = HEADER_BYTES + CONTENT_MAX + TRAILER_BYTES;
/// A record of others may be padded: 2^14 + 256 behind its header (section 5.2).
const FOREIGN_MAX: usize = CONTENT_MAX + 256;
/// Records in one buffer: eight make one system call of 128 KiB.
pub const RECORDS: usize = 8;
/// Room of a buffer.
pub const BUFFER_BYTES: usize = RECORDS * RECORD_MAX;
/// Buffers that a thread keeps for the next connection that moves.
const KEPT_MAX: usize = 8;
/// Records under one key; AES-GCM allows 2^24 (rustls' `confidentiality_limit`).
const RECORDS_PER_KEY: u64 = 1 << 23;
/// Key updates and tickets that came without a byte of content between them: nobody honest sends more than one.
const UPDATES_MAX: u32 = 8;
/// Records without content in a row. They are allowed, to mislead who counts (section 5.4); OpenSSL takes 32 as well.
const EMPTY_MAX: u32 = 32;

const ALERT: u8 = 21;
const HANDSHAKE: u8 = 22;
const APPLICATION_DATA: u8 = 23;
const NEW_SESSION_TICKET: u8 = 4;
const KEY_UPDATE: u8 = 24;

thread_local! {
    /// An idle connection holds no buffer: it takes one when it moves and gives it back.
    static KEPT: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
}

/// A buffer of [`BUFFER_BYTES`].
pub fn buffer() -> Vec<u8> {
    KEPT.with_borrow_mut(Vec::pop).unwrap_or_else(|| vec![0; BUFFER_BYTES])
}

/// Gives it back.
pub fn keep(buffer: Vec<u8>) {
    KEPT.with_borrow_mut(|kept| {
        if kept.len() < KEPT_MAX && buffer.len() == BUFFER_BYTES {
            kept.push(buffer);
        }
    });
}

/// Why a record was not taken. The connection is at its end.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// Not a record of TLS 1.3 at this place.
    #[error("a malformed record: {0}")]
    Malformed(&'static str),
    /// It was not made under the peer's key.
    #[error("a record that does not authenticate")]
    Forged,
    /// The peer ended the connection with an alert.
    #[error("the peer ended the connection: alert {0}")]
    Alert(u8),
    /// rustls did not give a next key.
    #[error("no next key")]
    Key(#[source] rustls::Error),
    /// Asked for more after an error: what follows a record that was not taken is nobody's.
    #[error("a record behind one that was not taken")]
    Over,
}

/// Alerts (section 6): the peer may be told why.
pub mod alert {
    /// The connection ends in order.
    pub const CLOSE_NOTIFY: u8 = 0;
    /// A record or message at the wrong place.
    pub const UNEXPECTED_MESSAGE: u8 = 10;
    /// A record does not authenticate.
    pub const BAD_RECORD_MAC: u8 = 20;
    /// Who was proved is not let in.
    pub const ACCESS_DENIED: u8 = 49;
    /// Ours to answer for.
    pub const INTERNAL_ERROR: u8 = 80;
    /// The peer wants no more of the handshake; it goes on to close_notify.
    pub const USER_CANCELED: u8 = 90;
    /// Nobody of that server name is here.
    pub const UNRECOGNIZED_NAME: u8 = 112;
}

impl RecordError {
    /// What the peer is told of it; none where the peer ended it or was told already.
    pub fn alert(&self) -> Option<u8> {
        match self {
            Self::Malformed(_) => Some(alert::UNEXPECTED_MESSAGE),
            Self::Forged => Some(alert::BAD_RECORD_MAC),
            Self::Key(_) => Some(alert::INTERNAL_ERROR),
            Self::Alert(_) | Self::Over => None,
        }
    }
}

/// What makes the next key of either direction: rustls' state of the connection.
pub trait Rekey: Send {
    /// For what we send.
    fn next_tx(&mut self) -> Result<(u64, ConnectionTrafficSecrets), rustls::Error>;
    /// For what the peer sends.
    fn next_rx(&mut self) -> Result<(u64, ConnectionTrafficSecrets), rustls::Error>;
}

/// What both directions share.
pub struct Keys {
    rekey: Mutex<Box<dyn Rekey>>,
    /// The peer asked for a new key of ours (section 4.6.3).
    asked: AtomicBool,
}

impl Keys {
    /// Around the state that rustls left.
    pub fn new(rekey: Box<dyn Rekey>) -> Arc<Self> {
        Arc::new(Self { rekey: Mutex::new(rekey), asked: AtomicBool::new(false) })
    }
}

/// One direction's key and the number of its next record.
struct Protection {
    key: LessSafeKey,
    iv: [u8; NONCE_LEN],
    sequence: u64,
}

impl Protection {
    fn new((sequence, secrets): (u64, ConnectionTrafficSecrets)) -> Result<Self, rustls::Error> {
        let (algorithm, key, iv) = match &secrets {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (&AES_128_GCM, key, iv),
            ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (&AES_256_GCM, key, iv),
            ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => (&CHACHA20_POLY1305, key, iv),
            _ => return Err(rustls::Error::General("a suite that is not known here".into())),
        };
        let broken = || rustls::Error::General("a key or nonce of another length".into());
        let key = UnboundKey::new(algorithm, key.as_ref()).map_err(|_| broken())?;
        let iv = iv.as_ref().try_into().map_err(|_| broken())?;
        Ok(Self { key: LessSafeKey::new(key), iv, sequence })
    }

    /// Section 5.3: the number of the record, over the end of the IV. Each is used once.
    fn nonce(&mut self) -> Nonce {
        let mut nonce = self.iv;
        let number = self.sequence.to_be_bytes();
        nonce.iter_mut().rev().zip(number.iter().rev()).for_each(|(n, s)| *n ^= s);
        // 2^23 records later there is another key.
        self.sequence += 1;
        Nonce::assume_unique_for_key(nonce)
    }
}

/// Seals what we send.
pub struct Sealer {
    protection: Protection,
    keys: Arc<Keys>,
    /// Sealed and not written: little, and rarely anything.
    pending: Vec<u8>,
}

impl std::fmt::Debug for Sealer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Sealer")
    }
}

impl Sealer {
    /// With the first key for application data.
    pub fn new(first: (u64, ConnectionTrafficSecrets), keys: Arc<Keys>) -> Result<Self, rustls::Error> {
        Ok(Self { protection: Protection::new(first)?, keys, pending: Vec::new() })
    }

    /// Seals the content that lies at `record[HEADER_BYTES..][..content]`, and returns the length of the record. `record`
    /// has room for [`RECORD_MAX`].
    pub fn seal(&mut self, record: &mut [u8], content: usize) -> Result<usize, RecordError> {
        self.seal_as(APPLICATION_DATA, record, content)
    }

    fn seal_as(&mut self, kind: u8, record: &mut [u8], content: usize) -> Result<usize, RecordError> {
        let short = || RecordError::Malformed("no room for a record");
        let (inner, length) = (content + 1, content + TRAILER_BYTES);
        if content > CONTENT_MAX {
            return Err(short());
        }
        let [_, _, high, low] = (length as u32).to_be_bytes();
        let header = [APPLICATION_DATA, 3, 3, high, low];
        let (head, body) = record.split_at_mut_checked(HEADER_BYTES).ok_or_else(short)?;
        head.copy_from_slice(&header);
        *body.get_mut(content).ok_or_else(short)? = kind;
        let (plain, rest) = body.split_at_mut_checked(inner).ok_or_else(short)?;
        let tag_room = rest.get_mut(..16).ok_or_else(short)?;
        let nonce = self.protection.nonce();
        let tag = self.protection.key.seal_in_place_separate_tag(nonce, Aad::from(header), plain);
        tag_room.copy_from_slice(tag.map_err(|_| RecordError::Forged)?.as_ref());
        Ok(HEADER_BYTES + length)
    }

    /// Seals `parts`, one after another, as one record that waits to be written.
    pub fn push(&mut self, parts: &[&[u8]]) -> Result<(), RecordError> {
        self.push_as(APPLICATION_DATA, parts)
    }

    fn push_as(&mut self, kind: u8, parts: &[&[u8]]) -> Result<(), RecordError> {
        let content: usize = parts.iter().map(|part| part.len()).sum();
        let mut pending = std::mem::take(&mut self.pending);
        let at = pending.len();
        pending.extend_from_slice(&[0; HEADER_BYTES]);
        parts.iter().for_each(|part| pending.extend_from_slice(part));
        pending.extend_from_slice(&[0; TRAILER_BYTES]);
        let sealed = self.seal_as(kind, pending.get_mut(at..).unwrap_or_default(), content);
        if sealed.is_ok() {
            self.pending = pending;
        }
        sealed.map(drop)
    }

    /// What waits to be written before anything sealed later; the caller writes it.
    pub fn take(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.pending)
    }

    /// Whether something waits.
    pub fn is_pending(&self) -> bool {
        !self.pending.is_empty()
    }

    /// Takes the next key where it is time: to be called before a batch of at most [`RECORDS`] records. What it puts
    /// in line is written first.
    pub fn turn_key(&mut self) -> Result<(), RecordError> {
        let asked = self.keys.asked.load(Ordering::Relaxed);
        if !asked && self.protection.sequence < RECORDS_PER_KEY {
            return Ok(());
        }
        self.keys.asked.store(false, Ordering::Relaxed);
        // KeyUpdate, of one byte: update_not_requested.
        self.push_as(HANDSHAKE, &[&[KEY_UPDATE, 0, 0, 1, 0]])?;
        let mut rekey = self.keys.rekey.lock().unwrap_or_else(PoisonError::into_inner);
        self.protection = rekey.next_tx().and_then(Protection::new).map_err(RecordError::Key)?;
        Ok(())
    }

    /// Puts an alert in line: the last that is sent.
    pub fn alert(&mut self, code: u8) -> Result<(), RecordError> {
        let level = if code == alert::CLOSE_NOTIFY { 1 } else { 2 };
        self.push_as(ALERT, &[&[level, code]])
    }
}

/// Opens what the peer sends.
pub struct Opener {
    protection: Protection,
    keys: Arc<Keys>,
    buffer: Vec<u8>,
    /// What is in the buffer and not opened yet.
    unread: Range<usize>,
    /// Content that rustls opened together with the handshake's last flight, oldest last.
    early: Vec<Vec<u8>>,
    updates: u32,
    empty: u32,
    ended: bool,
    /// The alert for a record that was not taken; after it nothing is.
    failed: Option<Option<u8>>,
}

impl std::fmt::Debug for Opener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Opener")
    }
}

impl Opener {
    /// With the first key for application data, what was read behind the handshake, and what rustls opened of it.
    pub fn new(
        first: (u64, ConnectionTrafficSecrets),
        keys: Arc<Keys>,
        unread: &[u8],
        mut early: Vec<Vec<u8>>,
    ) -> Result<Self, rustls::Error> {
        early.reverse();
        let mut buffer = Vec::new();
        if !unread.is_empty() {
            buffer = self::buffer();
            let fits = buffer.get_mut(..unread.len()).map(|room| room.copy_from_slice(unread));
            fits.ok_or_else(|| rustls::Error::General("too much behind the handshake".into()))?;
        }
        let unread = 0..unread.len();
        Ok(Self {
            protection: Protection::new(first)?,
            keys,
            buffer,
            unread,
            early,
            updates: 0,
            empty: 0,
            ended: false,
            failed: None,
        })
    }

    /// Opens the next record of application data that is here whole; its content lies at this range of [`Opener::bytes`].
    /// None: more must be read. An end of the connection, told by close_notify, is `Alert(0)`. Every other error stays.
    pub fn next_record(&mut self) -> Result<Option<Range<usize>>, RecordError> {
        if self.failed.is_some() {
            return Err(RecordError::Over);
        }
        self.take_record().inspect_err(|error| match error {
            RecordError::Alert(alert::CLOSE_NOTIFY) => {}
            error => self.failed = Some(error.alert()),
        })
    }

    /// Whether the peer has ended the connection by close_notify.
    pub fn ended_in_order(&self) -> bool {
        self.ended
    }

    fn take_record(&mut self) -> Result<Option<Range<usize>>, RecordError> {
        if let Some(content) = self.early.pop() {
            return self.put_early(&content).map(Some);
        }
        loop {
            if self.ended {
                return Err(RecordError::Alert(0));
            }
            let Some(&header) = self.here() else { return Ok(None) };
            let [kind, major, minor, high, low] = header;
            let length = usize::from(high) << 8 | usize::from(low);
            let protected = [kind, major, minor] == [APPLICATION_DATA, 3, 3];
            if !protected || !(TRAILER_BYTES..=FOREIGN_MAX).contains(&length) {
                return Err(RecordError::Malformed("not a protected record"));
            }
            if self.unread.len() < HEADER_BYTES + length {
                return Ok(None);
            }
            let begin = self.unread.start + HEADER_BYTES;
            self.unread.start = begin + length;
            let (kind, content) = self.open(header, begin, length)?;
            match kind {
                APPLICATION_DATA => {
                    self.count(content.is_empty())?;
                    return Ok(Some(content));
                }
                HANDSHAKE => self.handshake(content)?,
                ALERT => self.alerted(content)?,
                _ => return Err(RecordError::Malformed("content of another kind")),
            }
        }
    }

    fn count(&mut self, empty: bool) -> Result<(), RecordError> {
        if !empty {
            (self.updates, self.empty) = (0, 0);
            return Ok(());
        }
        self.empty += 1;
        if self.empty > EMPTY_MAX { Err(RecordError::Malformed("empty records without end")) } else { Ok(()) }
    }

    fn here(&self) -> Option<&[u8; HEADER_BYTES]> {
        self.buffer.get(self.unread.clone())?.first_chunk()
    }

    fn open(
        &mut self,
        header: [u8; HEADER_BYTES],
        begin: usize,
        length: usize,
    ) -> Result<(u8, Range<usize>), RecordError> {
        let sealed = self.buffer.get_mut(begin..begin + length).ok_or(RecordError::Malformed("a record"))?;
        let nonce = self.protection.nonce();
        let opened = self.protection.key.open_in_place(nonce, Aad::from(header), sealed);
        let plain = opened.map_err(|_| RecordError::Forged)?;
        // Padding is zeros behind the content type, which is none (section 5.4).
        let last = plain.iter().rposition(|byte| *byte != 0).ok_or(RecordError::Malformed("padding only"))?;
        if last > CONTENT_MAX {
            return Err(RecordError::Malformed("too much content"));
        }
        let kind = plain.get(last).copied().unwrap_or_default();
        Ok((kind, begin..begin + last))
    }

    /// Behind the handshake come tickets, which we neither want nor keep, and new keys. Nobody splits either.
    fn handshake(&mut self, at: Range<usize>) -> Result<(), RecordError> {
        let mut rest = self.buffer.get(at).unwrap_or_default();
        if rest.is_empty() {
            return Err(RecordError::Malformed("an empty handshake record"));
        }
        self.updates += 1;
        if self.updates > UPDATES_MAX {
            return Err(RecordError::Malformed("handshake messages without end"));
        }
        while let [kind, a, b, c, after @ ..] = rest {
            let length = u32::from_be_bytes([0, *a, *b, *c]) as usize;
            let (message, after) =
                after.split_at_checked(length).ok_or(RecordError::Malformed("a split handshake message"))?;
            match (*kind, message) {
                (NEW_SESSION_TICKET, _) => {}
                // A new key begins with a new record.
                (KEY_UPDATE, [asks @ (0 | 1)]) if after.is_empty() => {
                    if *asks == 1 {
                        self.keys.asked.store(true, Ordering::Relaxed);
                    }
                    let mut rekey = self.keys.rekey.lock().unwrap_or_else(PoisonError::into_inner);
                    self.protection = rekey.next_rx().and_then(Protection::new).map_err(RecordError::Key)?;
                }
                _ => return Err(RecordError::Malformed("a handshake message at this point")),
            }
            rest = after;
        }
        if rest.is_empty() { Ok(()) } else { Err(RecordError::Malformed("a split handshake message")) }
    }

    fn alerted(&mut self, at: Range<usize>) -> Result<(), RecordError> {
        match self.buffer.get(at) {
            // Whatever follows is not the peer's.
            Some([_, alert::CLOSE_NOTIFY]) => {
                self.ended = true;
                Ok(())
            }
            Some([_, alert::USER_CANCELED]) => self.count(true),
            Some([_, code]) => Err(RecordError::Alert(*code)),
            _ => Err(RecordError::Malformed("an alert")),
        }
    }

    /// Content that came early is put before what is not opened yet.
    fn put_early(&mut self, content: &[u8]) -> Result<Range<usize>, RecordError> {
        let room = RecordError::Malformed("too much behind the handshake");
        if self.buffer.is_empty() {
            self.buffer = self::buffer();
        }
        let (unread, shift) = (self.unread.clone(), content.len());
        if unread.end + shift > self.buffer.len() {
            return Err(room);
        }
        self.buffer.copy_within(unread.clone(), unread.start + shift);
        let at = unread.start..unread.start + shift;
        self.unread = at.end..unread.end + shift;
        self.buffer.get_mut(at.clone()).ok_or(room)?.copy_from_slice(content);
        Ok(at)
    }

    /// The buffer in which opened content lies until [`Opener::room`] is asked for.
    pub fn bytes(&self) -> &[u8] {
        &self.buffer
    }

    /// Room to read into, behind what is not opened yet; [`Opener::filled`] says how much came. At least a record has room.
    pub fn room(&mut self) -> &mut [u8] {
        if self.buffer.is_empty() {
            self.buffer = self::buffer();
        }
        if self.unread.is_empty() {
            self.unread = 0..0;
        } else if self.unread.start > 0 {
            self.buffer.copy_within(self.unread.clone(), 0);
            self.unread = 0..self.unread.len();
        }
        self.buffer.get_mut(self.unread.end..).unwrap_or_default()
    }

    /// So many bytes came into the room.
    pub fn filled(&mut self, bytes: usize) {
        self.unread.end = (self.unread.end + bytes).min(self.buffer.len());
    }

    /// Gives the buffer back if nothing is in it.
    pub fn rest(&mut self) {
        if self.unread.is_empty() && !self.buffer.is_empty() {
            self.unread = 0..0;
            keep(std::mem::take(&mut self.buffer));
        }
    }

    /// Whether nothing of the peer's is here that was not asked for.
    pub fn is_empty(&self) -> bool {
        self.unread.is_empty() && self.early.is_empty() && !self.ended && self.failed.is_none()
    }

    /// The alert that the peer is to get for a record that was not taken, once.
    pub fn alert(&mut self) -> Option<u8> {
        self.failed.as_mut().and_then(Option::take)
    }
}

#[cfg(test)]
mod tests;
