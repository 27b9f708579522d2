//! JWT-SVIDs' words (SPIFFE JWT-SVID.md): the keys that sign them, who they are for, how long they last.

use crate::refusal::{Code, Refusal};
use crate::time::Stamp;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// A key that signs JWT-SVIDs of one trust domain, as its bundle publishes it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct JwtAuthority {
    /// Its name in the header of every token that it signs (SPIFFE Trust Domain and Bundle 4.2.2: `kid` must be there).
    pub kid: String,
    /// SubjectPublicKeyInfo, DER.
    pub spki_der: Vec<u8>,
    /// No token of it is valid after.
    pub not_after: Stamp,
}

/// The name that our own authorities have: the first half of the SHA-256 of the SubjectPublicKeyInfo, hexadecimal.
pub fn kid_of(spki_der: &[u8]) -> String {
    hex::encode(Sha256::digest(spki_der).iter().take(16).copied().collect::<Vec<u8>>())
}

/// For whom a token is: at least one recipient, each once (JWT-SVID 3.2). A token without an audience could be used
/// anywhere, so there is none.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Audience(Vec<String>);

impl Audience {
    /// A token is for a few recipients; each of them could use it at the others.
    pub const RECIPIENTS_MAX: usize = 16;
    /// Bytes of one recipient's name: a URL or a SPIFFE ID.
    pub const RECIPIENT_BYTES_MAX: usize = 512;

    /// From what a workload or an administrator asks for.
    ///
    /// # Errors
    /// [`Code::BadRequest`] for none or too many, an empty or long one, one with control characters, or one given twice.
    pub fn new(recipients: Vec<String>) -> Result<Audience, Refusal> {
        let bad = |found: String| {
            let (most, bytes) = (Self::RECIPIENTS_MAX, Self::RECIPIENT_BYTES_MAX);
            let expected = format!("an audience of 1-{most} recipients, each once, of 1-{bytes} bytes");
            Err(Refusal::new(Code::BadRequest, expected, found))
        };
        if recipients.is_empty() || recipients.len() > Self::RECIPIENTS_MAX {
            return bad(format!("{} recipients", recipients.len()));
        }
        for (n, one) in recipients.iter().enumerate() {
            if one.is_empty() || one.len() > Self::RECIPIENT_BYTES_MAX || one.chars().any(char::is_control) {
                return bad(format!("recipient {n} of {} bytes", one.len()));
            }
            if recipients.iter().take(n).any(|other| other == one) {
                return bad(format!("recipient {n} again"));
            }
        }
        Ok(Audience(recipients))
    }
    /// The recipients, in the order given.
    pub fn recipients(&self) -> &[String] {
        &self.0
    }
    /// What a committed issuance holds of it: SHA-256 over the recipients, each length-prefixed.
    pub fn sha256(&self) -> [u8; 32] {
        let mut h = Sha256::new();
        h.update(b"ambit/audience/v1");
        for one in &self.0 {
            h.update((one.len() as u64).to_be_bytes());
            h.update(one.as_bytes());
        }
        h.finalize().into()
    }
}

/// How long a token lasts, in seconds. A token is a bearer's: whoever sees it can use it until it ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct JwtTtl(u32);

impl JwtTtl {
    /// The longest.
    pub const CEILING_S: u32 = 3_600;
    /// The shortest that clocks of two machines still agree on.
    pub const FLOOR_S: u32 = 30;
    /// Where an entry names none.
    pub const DEFAULT: JwtTtl = JwtTtl(300);

    /// Seconds.
    pub fn seconds(self) -> u32 {
        self.0
    }
    /// Milliseconds.
    pub fn ms(self) -> u64 {
        u64::from(self.0) * 1000
    }
}

impl TryFrom<u32> for JwtTtl {
    type Error = Refusal;
    fn try_from(s: u32) -> Result<Self, Refusal> {
        if (Self::FLOOR_S..=Self::CEILING_S).contains(&s) {
            return Ok(Self(s));
        }
        let expected = format!("a JWT TTL of {}-{} seconds", Self::FLOOR_S, Self::CEILING_S);
        Err(Refusal::new(Code::BadRequest, expected, s.to_string()))
    }
}
impl From<JwtTtl> for u32 {
    fn from(t: JwtTtl) -> u32 {
        t.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_audience_names_somebody_and_each_once() {
        let of = |all: &[&str]| Audience::new(all.iter().map(|one| (*one).to_owned()).collect());
        let long = "a".repeat(Audience::RECIPIENT_BYTES_MAX + 1);
        let many: Vec<String> = (0..=Audience::RECIPIENTS_MAX).map(|n| n.to_string()).collect();
        for bad in [&[][..], &[""], &["a", ""], &["a", "b", "a"], &["a\n"], &[&long]] {
            assert_eq!(of(bad).unwrap_err().code, Code::BadRequest, "{bad:?}");
        }
        assert!(Audience::new(many).is_err());
        // The hash tells apart what only joins to the same text.
        assert_ne!(of(&["ab", "c"]).unwrap().sha256(), of(&["a", "bc"]).unwrap().sha256());
        assert_ne!(of(&["a", "b"]).unwrap().sha256(), of(&["b", "a"]).unwrap().sha256());
    }

    #[test]
    fn a_token_lasts_half_a_minute_to_an_hour() {
        for (seconds, good) in [(0, false), (29, false), (30, true), (3_600, true), (3_601, false)] {
            assert_eq!(JwtTtl::try_from(seconds).is_ok(), good, "{seconds}");
        }
    }
}
