//! One xDS stream in state-of-the-world form: what it asks for, what it was told, and what it said to that. Pure.
//!
//! Envoy's xDS protocol: a request names everything that is wanted, and with the nonce of a response accepts it, or rejects
//! it by an error; one with an older nonce was sent before that response was read, and is passed over.

use ambit_proto::xds::discovery::{DiscoveryRequest, DiscoveryResponse};
use aws_lc_rs::digest::{Context, SHA256};
use prost_types::Any;
use std::collections::BTreeSet;

/// The one type that is served.
pub const SECRET: &str = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret";
/// Envoy asks for each secret on a stream of its own; this is for clients that do not.
const NAMES_MAX: usize = 64;
/// A SPIFFE ID has at most 2048 bytes.
const NAME_BYTES_MAX: usize = 2048;
/// What an Envoy says of a response that it rejects is for a log.
const ERROR_CHARS_MAX: usize = 300;

/// Which secrets a stream wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// All that there are: the first request named none.
    All,
    /// These.
    Named(BTreeSet<String>),
}

impl Wanted {
    fn of(names: &[String]) -> Result<BTreeSet<String>, Invalid> {
        if names.len() > NAMES_MAX || names.iter().any(|name| name.len() > NAME_BYTES_MAX) {
            return Err(Invalid("at most 64 names of at most 2048 bytes"));
        }
        // An empty name is none (SPIRE).
        Ok(names.iter().filter(|name| !name.is_empty()).cloned().collect())
    }

    /// What one request asks for that is the only one of its stream.
    pub fn once(request: &DiscoveryRequest) -> Result<Self, Invalid> {
        if !["", SECRET].contains(&request.type_url.as_str()) {
            return Err(Invalid("secrets are served here, and nothing else"));
        }
        let names = Self::of(&request.resource_names)?;
        Ok(if names.is_empty() { Self::All } else { Self::Named(names) })
    }

    /// Whether `name` is wanted.
    pub fn wants(&self, name: &str) -> bool {
        match self {
            Self::All => true,
            Self::Named(names) => names.contains(name),
        }
    }
}

/// A request that makes no sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Invalid(pub &'static str);

/// What a request means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Meaning {
    /// It wants something that it did not want before.
    More,
    /// It wants no more than before, and takes what it was told.
    Accepted,
    /// It does not take what it was told, and says why.
    Rejected(String),
    /// It was overtaken by a response.
    Stale,
}

/// The stream.
#[derive(Debug, Default)]
pub struct Subscription {
    wanted: Option<Wanted>,
    /// The last response.
    told: Option<Told>,
    /// Something is wanted anew, so the client may not have it although it was told.
    anew: bool,
    responses: u64,
}

#[derive(Debug)]
struct Told {
    version: String,
    nonce: String,
}

impl Subscription {
    /// What is wanted; none before the first request.
    pub fn wanted(&self) -> Option<&Wanted> {
        self.wanted.as_ref()
    }
    /// Whether anything was told.
    pub fn was_told(&self) -> bool {
        self.told.is_some()
    }

    /// Takes a request.
    pub fn request(&mut self, request: &DiscoveryRequest) -> Result<Meaning, Invalid> {
        let once = Wanted::once(request)?;
        let Some(before) = &self.wanted else {
            (self.wanted, self.anew) = (Some(once), true);
            return Ok(Meaning::More);
        };
        if self.told.as_ref().is_some_and(|told| told.nonce != request.response_nonce) {
            return Ok(Meaning::Stale);
        }
        // Only a first request without names means all; a later one wants nothing more, unless it never named any.
        let now = match (before, once) {
            (Wanted::Named(_), Wanted::All) => Wanted::Named(BTreeSet::new()),
            (_, once) => once,
        };
        let more = match (before, &now) {
            (Wanted::All, _) => false,
            (_, Wanted::All) => true,
            (Wanted::Named(before), Wanted::Named(now)) => !now.is_subset(before),
        };
        self.wanted = Some(now);
        self.anew |= more;
        Ok(match &request.error_detail {
            _ if more => Meaning::More,
            Some(error) => Meaning::Rejected(error.message.chars().take(ERROR_CHARS_MAX).collect()),
            None => Meaning::Accepted,
        })
    }

    /// The response that tells `secrets`, unless they were told already.
    pub fn respond(&mut self, secrets: Vec<Any>) -> Option<DiscoveryResponse> {
        let version = version(&secrets);
        if !self.anew && self.told.as_ref().is_some_and(|told| told.version == version) {
            return None;
        }
        self.anew = false;
        self.responses += 1;
        let nonce = self.responses.to_string();
        self.told = Some(Told { version: version.clone(), nonce: nonce.clone() });
        Some(DiscoveryResponse { version_info: version, resources: secrets, type_url: SECRET.to_owned(), nonce })
    }
}

/// Names a content: the same secrets have the same version on every stream.
pub fn version(secrets: &[Any]) -> String {
    let mut context = Context::new(&SHA256);
    for secret in secrets {
        context.update(&(secret.value.len() as u64).to_be_bytes());
        context.update(&secret.value);
    }
    let digest = context.finish();
    hex::encode(digest.as_ref().iter().take(8).copied().collect::<Vec<u8>>())
}

#[cfg(test)]
mod tests {
    use super::*;
    use ambit_proto::xds::google::rpc::Status;

    fn secret(byte: u8) -> Any {
        Any { type_url: SECRET.into(), value: vec![byte] }
    }
    fn request(names: &[&str], nonce: &str) -> DiscoveryRequest {
        let resource_names = names.iter().map(|name| (*name).to_owned()).collect();
        DiscoveryRequest { resource_names, response_nonce: nonce.into(), ..Default::default() }
    }
    fn error(request: DiscoveryRequest, message: &str) -> DiscoveryRequest {
        DiscoveryRequest { error_detail: Some(Status { code: 3, message: message.into(), details: vec![] }), ..request }
    }

    /// One stream from beginning to end: what comes, what it means, what is there, and whether it is told.
    #[test]
    fn a_stream_is_told_what_changed_once_and_again_what_it_wants_anew() {
        let mut stream = Subscription::default();
        let mut nonces = Vec::new();
        let names = |names: &[&str]| Some(Wanted::Named(names.iter().map(|n| (*n).to_owned()).collect()));
        for (come, meaning, wanted, there, told) in [
            (request(&["a"], ""), Meaning::More, names(&["a"]), vec![1], true),
            (request(&["a"], "1"), Meaning::Accepted, names(&["a"]), vec![1], false),
            (request(&["a"], "1"), Meaning::Accepted, names(&["a"]), vec![2], true),
            // Sent before that response was read.
            (request(&["b"], "1"), Meaning::Stale, names(&["a"]), vec![2], false),
            (error(request(&["a"], "2"), "bad"), Meaning::Rejected("bad".into()), names(&["a"]), vec![2], false),
            (request(&["a", "b"], "2"), Meaning::More, names(&["a", "b"]), vec![2, 3], true),
            (request(&["a"], "3"), Meaning::Accepted, names(&["a"]), vec![2], true),
            // It may have dropped what it is told again.
            (error(request(&["a", "b"], "4"), "bad"), Meaning::More, names(&["a", "b"]), vec![2], true),
            (request(&[], "5"), Meaning::Accepted, names(&[]), vec![2], false),
            (request(&["a"], "5"), Meaning::More, names(&["a"]), vec![2], true),
        ] {
            let case = format!("{come:?}");
            assert_eq!(stream.request(&come), Ok(meaning), "{case}");
            assert_eq!(stream.wanted(), wanted.as_ref(), "{case}");
            let response = stream.respond(there.into_iter().map(secret).collect());
            assert_eq!(response.is_some(), told, "{case}");
            nonces.extend(response.map(|response| response.nonce));
        }
        assert_eq!(nonces, ["1", "2", "3", "4", "5", "6"]);
    }

    #[test]
    fn names_are_bounded_and_no_other_type_is_served() {
        let other = DiscoveryRequest { type_url: "type.googleapis.com/x.Cluster".into(), ..request(&["a"], "") };
        let secrets = DiscoveryRequest { type_url: SECRET.into(), ..request(&["a"], "") };
        for (request, good) in [
            (request(&["a"; 64], ""), true),
            (request(&["a"; 65], ""), false),
            (request(&[&"a".repeat(2048)], ""), true),
            (request(&[&"a".repeat(2049)], ""), false),
            (secrets, true),
            (other, false),
        ] {
            assert_eq!(Subscription::default().request(&request).is_ok(), good, "{request:?}");
        }
        let mut all = Subscription::default();
        all.request(&request(&[], "")).unwrap();
        assert!(all.wanted().unwrap().wants("anything"));
        all.request(&request(&[], "")).unwrap();
        assert_eq!(all.wanted(), Some(&Wanted::All));
    }

    #[test]
    fn a_version_names_a_content() {
        let any = |value: &[u8]| Any { type_url: SECRET.into(), value: value.to_vec() };
        assert_eq!(version(&[any(b"ab"), any(b"c")]), version(&[any(b"ab"), any(b"c")]));
        for other in [vec![], vec![any(b"abc")], vec![any(b"a"), any(b"bc")], vec![any(b"c"), any(b"ab")]] {
            assert_ne!(version(&[any(b"ab"), any(b"c")]), version(&other));
        }
    }
}
