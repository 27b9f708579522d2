//! Identifiers. None converts into another: a revision is not an index, a node is not a cluster. Clones share their text:
//! a cell keeps the same identity in several tables.

use crate::refusal::{Code, Refusal};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// A SPIFFE trust domain name (SPIFFE-ID section 2.1): 1-255 bytes of `[a-z0-9.-_]`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TrustDomain(Arc<str>);

impl TrustDomain {
    /// The name, without a scheme.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The identity of a member of this trust domain at `path`, which starts with `/`.
    pub fn member(&self, path: &str) -> Result<SpiffeId, Refusal> {
        format!("spiffe://{}{}", self.0, path).parse()
    }
}

impl FromStr for TrustDomain {
    type Err = Refusal;
    fn from_str(s: &str) -> Result<Self, Refusal> {
        let ok = !s.is_empty()
            && s.len() <= 255
            && s.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'-' | b'_'));
        if ok {
            Ok(Self(s.into()))
        } else {
            Err(Refusal::new(Code::BadRequest, "a trust domain of 1-255 characters from a-z 0-9 . - _", s))
        }
    }
}

/// A SPIFFE ID with a non-root path (SPIFFE-ID sections 2.1-2.3). Never normalised.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpiffeId {
    uri: Arc<str>,
    path_at: usize,
}

impl SpiffeId {
    /// The whole URI.
    pub fn as_str(&self) -> &str {
        &self.uri
    }
    /// The trust domain it belongs to.
    pub fn trust_domain(&self) -> TrustDomain {
        TrustDomain(self.uri.get(9..self.path_at).unwrap_or_default().into())
    }
    /// The path, with its leading `/`.
    pub fn path(&self) -> &str {
        self.uri.get(self.path_at..).unwrap_or_default()
    }
}

impl FromStr for SpiffeId {
    type Err = Refusal;
    fn from_str(s: &str) -> Result<Self, Refusal> {
        let bad = |why: &str| Refusal::new(Code::BadRequest, format!("a SPIFFE ID ({why})"), s.to_owned());
        let rest = s.strip_prefix("spiffe://").ok_or_else(|| bad("spiffe://<trust domain>/<path>"))?;
        if s.len() > 2048 {
            return Err(bad("at most 2048 bytes"));
        }
        let (domain, path) = rest.split_once('/').ok_or_else(|| bad("with a path"))?;
        domain.parse::<TrustDomain>()?;
        path.split('/').try_for_each(segment).map_err(bad)?;
        Ok(Self { uri: s.into(), path_at: 9 + domain.len() })
    }
}

/// One segment of a path, or what is wrong with it.
fn segment(text: &str) -> Result<(), &'static str> {
    if matches!(text, "" | "." | "..") {
        return Err("no empty, '.' or '..' path segment");
    }
    let good = text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'));
    if good { Ok(()) } else { Err("path segments of a-z A-Z 0-9 . - _") }
}

/// Whether identities can lie below `/a/b/`.
pub(crate) fn is_prefix(path: &str) -> bool {
    let inner = path.strip_prefix('/').and_then(|rest| rest.strip_suffix('/'));
    path.len() <= 2048 && inner.is_some_and(|inner| inner.split('/').all(|text| segment(text).is_ok()))
}

/// A name of an operator's object: 1-63 characters of `[a-z0-9-]`, starting with a letter.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectName(Arc<str>);

impl ObjectName {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for ObjectName {
    type Err = Refusal;
    fn from_str(s: &str) -> Result<Self, Refusal> {
        let ok = s.len() <= 63
            && s.starts_with(|c: char| c.is_ascii_lowercase())
            && s.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
        if ok {
            Ok(Self(s.into()))
        } else {
            Err(Refusal::new(Code::BadRequest, "a name of 1-63 characters from a-z 0-9 -, starting with a letter", s))
        }
    }
}

/// A cluster: a set of nodes with one trust domain, served by a home cell. Same grammar as [`ObjectName`].
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClusterId(Arc<str>);

impl ClusterId {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for ClusterId {
    type Err = Refusal;
    fn from_str(s: &str) -> Result<Self, Refusal> {
        Ok(Self(ObjectName::from_str(s)?.0))
    }
}

macro_rules! string_newtype {
    ($($t:ty => $field:tt),*) => {$(
        impl fmt::Display for $t {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result { f.write_str(&self.$field) }
        }
        impl TryFrom<String> for $t {
            type Error = Refusal;
            fn try_from(s: String) -> Result<Self, Refusal> { s.parse() }
        }
        impl From<$t> for String {
            fn from(v: $t) -> String { v.$field.as_ref().to_owned() }
        }
    )*};
}
string_newtype!(TrustDomain => 0, SpiffeId => uri, ObjectName => 0, ClusterId => 0);
crate::text::serde_as_text!(TrustDomain, SpiffeId, ObjectName, ClusterId);

/// SHA-256 of the endorsement key's SubjectPublicKeyInfo (DER).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct NodeId(pub [u8; 32]);

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}
impl fmt::Debug for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NodeId({self})")
    }
}
impl FromStr for NodeId {
    type Err = Refusal;
    fn from_str(s: &str) -> Result<Self, Refusal> {
        let mut out = [0u8; 32];
        hex::decode_to_slice(s, &mut out)
            .map_err(|_| Refusal::new(Code::BadRequest, "a node id of 64 hexadecimal digits", s))?;
        Ok(Self(out))
    }
}

macro_rules! number {
    ($($(#[$m:meta])* $t:ident),*) => {$(
        $(#[$m])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub struct $t(pub u64);
        impl fmt::Display for $t {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result { write!(f, "{}", self.0) }
        }
    )*};
}
number!(
    /// A federation replica inside its cell; 1 or greater.
    ReplicaId,
    /// A cell's applied version of identity and policy. Never compared across cells.
    Revision,
    /// Rises with each admission of a node.
    Generation,
    /// A position in a cell's Raft log.
    RaftIndex
);

/// A workload identity as the kernel knows it: 0 is invalid, below 256 reserved, never reused before every node acked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct NumericIdentity(pub u32);

impl NumericIdentity {
    /// The first number handed to a workload.
    pub const FIRST: NumericIdentity = NumericIdentity(256);
    /// No workload has this number or a higher one: with these agents name what is none, as ranges of addresses.
    pub const END: NumericIdentity = NumericIdentity(1 << 31);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spiffe_ids_are_parsed_to_the_letter() {
        for (text, good) in [
            ("spiffe://west/db", true),
            ("spiffe://west.example/a/b.c_d-E", true),
            ("spiffe://west", false),
            ("spiffe://west/", false),
            ("spiffe://West/db", false),
            ("spiffe://west/../db", false),
            ("spiffe://west/a//b", false),
            ("spiffe://west/a/", false),
            ("spiffe://west:80/a", false),
            ("spiffe://u@west/a", false),
            ("spiffe://west/a?x", false),
            ("spiffe://west/a%2fb", false),
            ("https://west/a", false),
        ] {
            assert_eq!(text.parse::<SpiffeId>().is_ok(), good, "{text}");
        }
        let id: SpiffeId = "spiffe://west/a/b".parse().unwrap();
        assert_eq!((id.trust_domain().as_str(), id.path()), ("west", "/a/b"));
    }
}
