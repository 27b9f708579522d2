//! One xDS stream (Envoy's xDS protocol): what it asks for, what it was told, and what it said to that. Pure.

mod delta;

pub use delta::Increments;

use ambit_proto::xds::core::Node;
use ambit_proto::xds::discovery::{DiscoveryRequest, DiscoveryResponse};
use ambit_proto::xds::google::rpc;
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

/// One secret under its name.
#[derive(Clone, Debug, PartialEq)]
pub struct Named {
    /// As it is asked for.
    pub name: String,
    /// The secret.
    pub secret: Any,
}

/// Which secrets a stream wants.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// All that there are, each under its own name.
    pub all: bool,
    /// These, whether or not they are among all.
    pub named: BTreeSet<String>,
}

impl Wanted {
    /// What one request asks for that is the only one of its stream. One without names asks for all.
    pub fn once(request: &DiscoveryRequest) -> Result<Self, Invalid> {
        is_of_secrets(&request.type_url)?;
        let named: BTreeSet<String> = names(&request.resource_names)?.cloned().collect();
        Ok(Self { all: named.is_empty(), named })
    }

    /// Whether `name` is wanted, which is a secret's own name.
    pub fn wants(&self, name: &str) -> bool {
        self.all || self.named.contains(name)
    }

    fn is_nothing(&self) -> bool {
        !self.all && self.named.is_empty()
    }
}

fn is_of_secrets(type_url: &str) -> Result<(), Invalid> {
    if ["", SECRET].contains(&type_url) {
        return Ok(());
    }
    Err(Invalid("secrets are served here, and nothing else"))
}

/// Names that a request may hold. An empty one is none (SPIRE).
fn names(names: &[String]) -> Result<impl Iterator<Item = &String>, Invalid> {
    if names.len() > NAMES_MAX || names.iter().any(|name| name.len() > NAME_BYTES_MAX) {
        return Err(TOO_MUCH);
    }
    Ok(names.iter().filter(|name| !name.is_empty()))
}

/// A request that makes no sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Invalid(pub &'static str);

const TOO_MUCH: Invalid = Invalid("at most 64 names of at most 2048 bytes");

/// What a request means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Meaning {
    /// It wants something that it did not want before.
    More,
    /// It wants no more than before, and takes what it was told.
    Accepted,
    /// It does not take what it was told, and says why.
    Rejected(String),
    /// It says nothing of the last response: that one came after it was sent.
    Stale,
}

impl Meaning {
    fn of(error: Option<&rpc::Status>) -> Self {
        match error {
            Some(error) => Self::Rejected(error.message.chars().take(ERROR_CHARS_MAX).collect()),
            None => Self::Accepted,
        }
    }
}

/// What is to be told.
#[derive(Clone, Debug, PartialEq)]
pub enum Told<Response> {
    /// This.
    Response(Response),
    /// Nothing: the client has it, or there is nothing of that name yet.
    Nothing,
    /// All is gone, and no response can say so.
    Gone,
}

/// The two forms in which secrets are asked for and told. Pure.
pub trait Variant: Default + Send + 'static {
    /// The method, for the count of calls.
    const METHOD: &'static str;
    /// What an Envoy says.
    type Request: Send + 'static;
    /// What it is told.
    type Response: Send + 'static;

    /// Who the Envoy is, which its first request says.
    fn node(request: &Self::Request) -> Option<&Node>;
    /// What is wanted; none before the first request.
    fn wanted(&self) -> Option<&Wanted>;
    /// Whether anything was told.
    fn was_told(&self) -> bool;
    /// Takes a request.
    ///
    /// # Errors
    /// One that makes no sense ends the stream.
    fn request(&mut self, request: Self::Request) -> Result<Meaning, Invalid>;
    /// What tells that of what is wanted there are `secrets`, each name once, and no others.
    fn respond(&mut self, secrets: Vec<Named>) -> Told<Self::Response>;
}

/// A stream in state-of-the-world form: a request names everything that is wanted, and with the nonce of a response accepts
/// it, or rejects it by an error; one with an older nonce was sent before that response was read, and is passed over.
#[derive(Debug, Default)]
pub struct Subscription {
    wanted: Option<Wanted>,
    /// The last response.
    told: Option<Last>,
    /// Something is wanted anew, so the client may not have it although it was told.
    anew: bool,
    responses: u64,
}

#[derive(Debug)]
struct Last {
    version: String,
    nonce: String,
}

impl Variant for Subscription {
    const METHOD: &'static str = "StreamSecrets";
    type Request = DiscoveryRequest;
    type Response = DiscoveryResponse;

    fn node(request: &DiscoveryRequest) -> Option<&Node> {
        request.node.as_ref()
    }
    fn wanted(&self) -> Option<&Wanted> {
        self.wanted.as_ref()
    }
    fn was_told(&self) -> bool {
        self.told.is_some()
    }

    fn request(&mut self, request: DiscoveryRequest) -> Result<Meaning, Invalid> {
        let mut now = Wanted::once(&request)?;
        let Some(before) = &self.wanted else {
            (self.wanted, self.anew) = (Some(now), true);
            return Ok(Meaning::More);
        };
        if self.told.as_ref().is_some_and(|told| told.nonce != request.response_nonce) {
            return Ok(Meaning::Stale);
        }
        // Only a first request without names means all; a later one wants nothing more, unless it never named any.
        now.all &= before.all;
        let more = !before.all && !now.named.is_subset(&before.named);
        self.wanted = Some(now);
        self.anew |= more;
        Ok(if more { Meaning::More } else { Meaning::of(request.error_detail.as_ref()) })
    }

    fn respond(&mut self, secrets: Vec<Named>) -> Told<DiscoveryResponse> {
        if self.wanted.as_ref().is_none_or(Wanted::is_nothing) {
            return Told::Nothing;
        }
        if secrets.is_empty() {
            // An Envoy rejects an empty response. It waits for what an operator may add, and is not told what is gone.
            return if self.was_told() { Told::Gone } else { Told::Nothing };
        }
        let resources: Vec<Any> = secrets.into_iter().map(|named| named.secret).collect();
        let version = version(&resources);
        if !self.anew && self.told.as_ref().is_some_and(|told| told.version == version) {
            return Told::Nothing;
        }
        self.anew = false;
        self.responses += 1;
        let nonce = self.responses.to_string();
        self.told = Some(Last { version: version.clone(), nonce: nonce.clone() });
        Told::Response(DiscoveryResponse { version_info: version, resources, type_url: SECRET.to_owned(), nonce })
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

    fn secret(byte: u8) -> Named {
        Named { name: byte.to_string(), secret: Any { type_url: SECRET.into(), value: vec![byte] } }
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
        let names =
            |names: &[&str]| Some(Wanted { all: false, named: names.iter().map(|n| (*n).to_owned()).collect() });
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
            (request(&[], "5"), Meaning::Accepted, names(&[]), vec![], false),
            (request(&["a"], "5"), Meaning::More, names(&["a"]), vec![2], true),
        ] {
            let case = format!("{come:?}");
            assert_eq!(stream.request(come), Ok(meaning), "{case}");
            assert_eq!(stream.wanted(), wanted.as_ref(), "{case}");
            match stream.respond(there.into_iter().map(secret).collect()) {
                Told::Response(response) if told => nonces.push(response.nonce),
                other => assert!(other == Told::Nothing && !told, "{case}: {other:?}"),
            }
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
            assert_eq!(Subscription::default().request(request.clone()).is_ok(), good, "{request:?}");
        }
        let mut all = Subscription::default();
        all.request(request(&[], "")).unwrap();
        assert!(all.wanted().unwrap().wants("anything"));
        all.request(request(&[], "")).unwrap();
        assert_eq!(all.wanted(), Some(&Wanted { all: true, named: BTreeSet::new() }));
        all.request(request(&["a"], "")).unwrap();
        assert!(!all.wanted().unwrap().wants("anything"), "from now on by name");
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
