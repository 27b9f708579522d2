//! YAML text to documents. Strict: an unknown field, kind, or anything beyond identity and port is refused in its place.

use crate::document::Document;
use ambit_model::policy::{Action, Peers, Policy, Service};
use ambit_model::{Code, ObjectName, Refusal};
use serde::de::{DeserializeOwned, Error as _};
use serde::{Deserialize, Deserializer};
use std::collections::BTreeSet;
use std::net::Ipv4Addr;

/// Bytes of one request's YAML: 1 MiB, so that one write stays small beside a Raft entry's limit.
pub const BYTES_MAX: usize = 1 << 20;
/// Documents in one request: all or none take effect, in one Raft entry.
pub const DOCUMENTS_MAX: usize = 1_000;
/// Caller sets in one policy: each is compared at every evaluation.
pub const FROM_MAX: usize = 256;
/// Ports in one policy: each becomes an entry in the kernel, per caller and target.
pub const PORTS_MAX: usize = 64;
/// Backend sets of one service.
pub const BACKENDS_MAX: usize = 64;

/// What people who know HTTP meshes write; Ambit decides on identity and port, so it must not seem to accept these.
const LAYER7_FIELDS: &[&str] = &[
    "authority",
    "cookies",
    "grpc",
    "headers",
    "host",
    "hosts",
    "http",
    "jwt",
    "method",
    "methods",
    "notHosts",
    "notMethods",
    "notPaths",
    "operation",
    "path",
    "paths",
    "query",
    "queryParams",
    "requestPrincipals",
    "rules",
    "uri",
    "url",
    "when",
];

/// The documents of `text`, in order. Empty documents (a trailing `---`, a comment alone) are skipped.
///
/// # Errors
/// [`Code::PolicyLayer7`] for a field about HTTP, else [`Code::PolicyMalformed`]; `found` starts with
/// `line L column C:` wherever the place is known.
pub fn parse(text: &str) -> Result<Vec<Document>, Refusal> {
    if text.len() > BYTES_MAX {
        return Err(malformed(format!("at most {BYTES_MAX} bytes"), format!("{} bytes", text.len())));
    }
    let mut documents = Vec::new();
    let mut seen = BTreeSet::new();
    // The same document is read twice in step: for its kind, then as that kind. One pass over an internally tagged
    // enum would buffer the document and lose every position in it.
    let pairs = serde_norway::Deserializer::from_str(text).zip(serde_norway::Deserializer::from_str(text));
    for (at, (head, body)) in pairs.enumerate() {
        if at == DOCUMENTS_MAX {
            return Err(malformed(format!("at most {DOCUMENTS_MAX} documents"), "more"));
        }
        let Some(document) = document(head, body)? else { continue };
        if !seen.insert((document.kind(), document.name().clone())) {
            let found = format!("{} {} twice", document.kind(), document.name());
            return Err(malformed("each kind and name once in a request", found));
        }
        documents.push(document);
    }
    Ok(documents)
}

fn document<'de, D>(head: D, body: D) -> Result<Option<Document>, Refusal>
where
    D: Deserializer<'de, Error = serde_norway::Error>,
{
    let Some(Head { kind }) = Option::<Head>::deserialize(head).map_err(refusal)? else { return Ok(None) };
    let document = match kind {
        Kind::Policy => Document::Policy(written::<PolicySpec, D>(body)?.into_policy()),
        Kind::Service => Document::Service(written::<ServiceSpec, D>(body)?.into_service()),
    };
    Ok(Some(document))
}

fn written<'de, S: DeserializeOwned, D>(body: D) -> Result<Written<S>, Refusal>
where
    D: Deserializer<'de, Error = serde_norway::Error>,
{
    Written::<S>::deserialize(body).map_err(refusal)
}

fn malformed(expected: impl Into<String>, found: impl Into<String>) -> Refusal {
    Refusal::new(Code::PolicyMalformed, expected, found)
}

fn refusal(error: serde_norway::Error) -> Refusal {
    let text = error.to_string();
    let found = match error.location() {
        Some(place) => format!("line {} column {}: {text}", place.line(), place.column()),
        None => text.clone(),
    };
    // serde's derived code is the only source of this sentence; a test holds it to it.
    let unknown = text.split_once("unknown field `").and_then(|(_, rest)| rest.split_once('`'));
    match unknown {
        Some((field, _)) if LAYER7_FIELDS.contains(&field) => {
            Refusal::new(Code::PolicyLayer7, "a rule on identity and port only", found)
        }
        Some(_) | None => malformed("a document as the policy reference describes it", found),
    }
}

#[derive(Deserialize)]
struct Head {
    kind: Kind,
}

#[derive(Deserialize)]
enum Kind {
    Policy,
    Service,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Written<Spec> {
    #[serde(rename = "kind")]
    _kind: Kind,
    metadata: Metadata,
    spec: Spec,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Metadata {
    #[serde(deserialize_with = "from_text")]
    name: ObjectName,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PolicySpec {
    #[serde(deserialize_with = "from_text")]
    target: Peers,
    action: WrittenAction,
    #[serde(deserialize_with = "callers")]
    from: Vec<Peers>,
    #[serde(default, deserialize_with = "ports")]
    ports: Vec<u16>,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum WrittenAction {
    Allow,
    Deny,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ServiceSpec {
    #[serde(deserialize_with = "virtual_address")]
    address: Ipv4Addr,
    #[serde(deserialize_with = "port")]
    port: u16,
    #[serde(deserialize_with = "backends")]
    backends: Vec<Peers>,
}

impl Written<PolicySpec> {
    fn into_policy(self) -> Policy {
        let PolicySpec { target, action, from, ports } = self.spec;
        let action = match action {
            WrittenAction::Allow => Action::Allow,
            WrittenAction::Deny => Action::Deny,
        };
        Policy { name: self.metadata.name, target, action, from, ports }
    }
}

impl Written<ServiceSpec> {
    fn into_service(self) -> Service {
        let ServiceSpec { address, port, backends } = self.spec;
        Service { name: self.metadata.name, address, port, backends }
    }
}

/// A model type from its text, its refusal kept as the message; the YAML reader adds the place.
fn from_text<'de, T, D>(d: D) -> Result<T, D::Error>
where
    T: std::str::FromStr<Err = Refusal>,
    D: Deserializer<'de>,
{
    text(&String::deserialize(d)?)
}

fn text<T: std::str::FromStr<Err = Refusal>, E: serde::de::Error>(s: &str) -> Result<T, E> {
    s.parse().map_err(|r: Refusal| E::custom(format_args!("expected {}, found '{}'", r.expected, r.found)))
}

/// One set of identities in a list, parsed as it is read, so that a bad one is refused in its own line.
#[derive(Deserialize)]
struct WrittenPeers(#[serde(deserialize_with = "from_text")] Peers);

fn callers<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<Peers>, D::Error> {
    sets(d, FROM_MAX)
}

fn backends<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<Peers>, D::Error> {
    sets(d, BACKENDS_MAX)
}

/// Sorted and without repetition, so that equal documents give equal policies.
fn sets<'de, D: Deserializer<'de>>(d: D, max: usize) -> Result<Vec<Peers>, D::Error> {
    let written = Vec::<WrittenPeers>::deserialize(d)?;
    if written.is_empty() || written.len() > max {
        let found = written.len();
        return Err(D::Error::custom(format_args!("expected 1-{max} sets of identities, found {found}")));
    }
    Ok(written.into_iter().map(|w| w.0).collect::<BTreeSet<_>>().into_iter().collect())
}

/// An empty list is refused: it would read as "no port" and mean "every port".
fn ports<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<u16>, D::Error> {
    #[derive(Deserialize)]
    struct Port(#[serde(deserialize_with = "port")] u16);
    let written = Vec::<Port>::deserialize(d)?;
    if written.is_empty() || written.len() > PORTS_MAX {
        let found = written.len();
        let expected = format_args!("expected 1-{PORTS_MAX} ports, or no 'ports' for every port, found {found}");
        return Err(D::Error::custom(expected));
    }
    Ok(written.into_iter().map(|w| w.0).collect::<BTreeSet<_>>().into_iter().collect())
}

fn port<'de, D: Deserializer<'de>>(d: D) -> Result<u16, D::Error> {
    match u16::deserialize(d)? {
        0 => Err(D::Error::custom("expected a port of 1-65535, found 0")),
        n => Ok(n),
    }
}

/// Loopback is where captured connections go, and nobody can be called at the others.
fn virtual_address<'de, D: Deserializer<'de>>(d: D) -> Result<Ipv4Addr, D::Error> {
    let written = String::deserialize(d)?;
    let expected = "expected a unicast IPv4 address that is not loopback";
    let bad = || D::Error::custom(format_args!("{expected}, found '{written}'"));
    let address: Ipv4Addr = written.parse().map_err(|_| bad())?;
    let is_callable =
        !(address.is_unspecified() || address.is_loopback() || address.is_multicast() || address.is_broadcast());
    if is_callable { Ok(address) } else { Err(bad()) }
}
