//! YAML text to documents. Strict: an unknown field, kind, or anything beyond identity and port is refused in its place.

use crate::backend::Backend;
use crate::document::Document;
use crate::normal::normalised;
use crate::scalar::{Caller, Instant, Listed, Member, Port, Text, UnicastAddress};
use ambit_model::policy::{
    Action, Cidr, Egress, Group, Order, Peers, Policy, PolicyExtras, Protocol, Service, Transport,
};
use ambit_model::{Code, ObjectName, Refusal, Stamp};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer};
use std::collections::BTreeSet;

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

/// Sets in one group.
pub const MEMBERS_MAX: usize = 256;
/// Ranges of one `kind: Egress`.
pub const RANGES_MAX: usize = 64;

/// Brackets open at once. Documents need three; the YAML scanner's time grows with the square of the depth.
const NESTING_MAX: usize = 64;

/// Values, keys and lines in one request, counted by what stands before each. The reader holds up to 1.4 KiB for each
/// before any of it is judged, and two bytes suffice for one: unbounded, 1 MiB of dashes took 700 MiB.
const NODES_MAX: usize = 1 << 16;

/// Characters of a refusal's `found`: the reader quotes what it met, which may be the whole text.
const FOUND_MAX: usize = 300;

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
    refuse_costly_structure(text)?;
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

/// Counts brackets and separators wherever they stand, comments and quoted text included: no document has a use for so
/// many, or for unbalanced brackets, there.
pub(crate) fn refuse_costly_structure(text: &str) -> Result<(), Refusal> {
    let mut depth = 0_usize;
    let mut line = 1_usize;
    let mut nodes = 0_usize;
    let mut next = text.chars().skip(1);
    for character in text.chars() {
        let blank_follows = next.next().is_none_or(char::is_whitespace);
        match character {
            '[' | '{' => {
                depth += 1;
                nodes += 1;
            }
            ']' | '}' => depth = depth.saturating_sub(1),
            '\n' => {
                line += 1;
                nodes += 1;
            }
            // What else ends a line in YAML 1.1 (5.4).
            ',' | '\r' | '\u{85}' | '\u{2028}' | '\u{2029}' => nodes += 1,
            '-' | '?' if blank_follows => nodes += 1,
            _ => {}
        }
        if depth > NESTING_MAX {
            return Err(malformed(
                format!("at most {NESTING_MAX} brackets open at once"),
                format!("line {line}: more"),
            ));
        }
        if nodes > NODES_MAX {
            return Err(malformed(
                format!("at most {NODES_MAX} lines and values in one request"),
                format!("line {line}: more"),
            ));
        }
    }
    Ok(())
}

fn document<'de, D>(head: D, body: D) -> Result<Option<Document>, Refusal>
where
    D: Deserializer<'de, Error = serde_norway::Error>,
{
    let Some(Head { kind }) = Option::<Head>::deserialize(head).map_err(refusal)? else { return Ok(None) };
    let document = match kind {
        Kind::Policy => Document::Policy(written::<PolicySpec, D>(body)?.into_policy()),
        Kind::Service => Document::Service(written::<ServiceSpec, D>(body)?.into_service()),
        Kind::Group => Document::Group(written::<GroupSpec, D>(body)?.into_group()),
        Kind::Egress => Document::Egress(written::<EgressSpec, D>(body)?.into_egress()),
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

/// What an error says, its place first, bounded.
pub(crate) fn placed(error: &serde_norway::Error) -> String {
    let text = error.to_string();
    let found = match error.location() {
        Some(place) => {
            let text = text.rsplit_once(" at line ").map_or(text.as_str(), |(message, _)| message);
            format!("line {} column {}: {text}", place.line(), place.column())
        }
        None => text,
    };
    found.chars().take(FOUND_MAX).collect()
}

fn refusal(error: serde_norway::Error) -> Refusal {
    let text = error.to_string();
    let found = placed(&error);
    // serde's derived code is the only source of this sentence; a test holds it to it.
    let unknown = text.split_once("unknown field `").and_then(|(_, rest)| rest.split_once('`'));
    match unknown {
        Some((field, _)) if LAYER7_FIELDS.contains(&field) => {
            Refusal::new(Code::PolicyLayer7, "a rule on identity and port only", found)
        }
        Some(_) | None => malformed("a well-formed Policy, Service, Group or Egress document", found),
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
    Group,
    Egress,
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
    name: Text<ObjectName>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenPolicy {
    target: Text<Member>,
    action: WrittenAction,
    from: Listed<Text<Caller>, FROM_MAX>,
    /// An empty list is refused: it would read as "no port" and mean "every port".
    ports: Option<Listed<Port, PORTS_MAX>>,
    protocols: Option<Listed<Text<Protocol>, 2>>,
    transport: Option<WrittenTransport>,
    expires: Option<Text<Instant>>,
}

/// With what goes together only, so that a refusal still says where it stands.
#[derive(Deserialize)]
#[serde(try_from = "WrittenPolicy")]
struct PolicySpec {
    written: WrittenPolicy,
    callers: Vec<Peers>,
    unmeshed: Vec<Cidr>,
}

impl TryFrom<WrittenPolicy> for PolicySpec {
    type Error = &'static str;
    /// Who reads a policy sees whether it lets in clear text, and from whom: it speaks of identities or of ranges, never of both.
    fn try_from(mut written: WrittenPolicy) -> Result<Self, Self::Error> {
        let (mut callers, mut unmeshed) = (Vec::new(), Vec::new());
        for caller in std::mem::take(&mut written.from.0) {
            match caller.0 {
                Caller::Meshed(set) => callers.push(set),
                Caller::Unmeshed(range) => unmeshed.push(range),
            }
        }
        if !callers.is_empty() && !unmeshed.is_empty() {
            return Err("identities and ranges of addresses as callers of one policy: expected one policy for each");
        }
        let clear = matches!(written.action, WrittenAction::Allow) && !unmeshed.is_empty();
        match (clear, written.transport.is_some()) {
            (true, false) => {
                Err("callers by address come in clear text: expected 'transport: passthrough', found none")
            }
            (false, true) => Err("'transport' of a policy that lets nobody in by address: expected none"),
            _ => Ok(Self { written, callers, unmeshed }),
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum WrittenAction {
    Allow,
    Deny,
    Audit,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum WrittenOrder {
    #[default]
    LocalFirst,
    FirstBackend,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenService {
    address: UnicastAddress,
    port: Port,
    backends: Listed<Backend, BACKENDS_MAX>,
    #[serde(default)]
    order: WrittenOrder,
}

/// With weights that go together only, so that a refusal still says where it stands.
#[derive(Deserialize)]
#[serde(try_from = "WrittenService")]
struct ServiceSpec {
    written: WrittenService,
    weights: Vec<u32>,
}

impl TryFrom<WrittenService> for ServiceSpec {
    type Error = &'static str;
    fn try_from(written: WrittenService) -> Result<Self, Self::Error> {
        let weights = crate::backend::weights(&written.backends.0)?;
        Ok(Self { written, weights })
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct GroupSpec {
    members: Listed<Text<Member>, MEMBERS_MAX>,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum WrittenTransport {
    Passthrough,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct EgressSpec {
    from: Listed<Text<Peers>, FROM_MAX>,
    to: Listed<Text<Cidr>, RANGES_MAX>,
    ports: Option<Listed<Port, PORTS_MAX>>,
    protocols: Option<Listed<Text<Protocol>, 2>>,
    /// Not by default: who reads the document sees that it speaks of clear text.
    transport: WrittenTransport,
    expires: Option<Text<Instant>>,
}

fn sorted_ports(ports: Option<Listed<Port, PORTS_MAX>>) -> Vec<u16> {
    let mut ports: Vec<u16> = ports.into_iter().flat_map(|list| list.0).map(|port| port.0).collect();
    ports.sort_unstable();
    ports
}

fn protocols_of(protocols: Option<Listed<Text<Protocol>, 2>>) -> BTreeSet<Protocol> {
    protocols.map_or_else(|| [Protocol::Tcp].into(), |list| list.0.into_iter().map(|text| text.0).collect())
}

fn end_of(expires: Option<Text<Instant>>) -> Stamp {
    expires.map_or(Stamp(u64::MAX), |at| at.0.0)
}

impl Written<PolicySpec> {
    fn into_policy(self) -> Policy {
        let PolicySpec { written, callers, unmeshed } = self.spec;
        let WrittenPolicy { target, action, ports, protocols, expires, .. } = written;
        let action = match action {
            WrittenAction::Allow => Action::Allow,
            WrittenAction::Deny => Action::Deny,
            WrittenAction::Audit => Action::Audit,
        };
        let extras = PolicyExtras { expires_at: end_of(expires), protocols: protocols_of(protocols), unmeshed };
        let (name, target, ports) = (self.metadata.name.0, target.0.0, sorted_ports(ports));
        normalised(Policy { name, target, action, from: callers, ports, extras })
    }
}

impl Written<GroupSpec> {
    fn into_group(self) -> Group {
        let mut members: Vec<Peers> = self.spec.members.0.into_iter().map(|member| member.0.0).collect();
        members.sort();
        Group { name: self.metadata.name.0, members }
    }
}

impl Written<EgressSpec> {
    fn into_egress(self) -> Egress {
        let EgressSpec { from, to, ports, protocols, transport: WrittenTransport::Passthrough, expires } = self.spec;
        let mut from: Vec<Peers> = from.0.into_iter().map(|set| set.0).collect();
        let mut to: Vec<Cidr> = to.0.into_iter().map(|range| range.0).collect();
        from.sort();
        to.sort();
        let (ports, protocols, expires_at) = (sorted_ports(ports), protocols_of(protocols), end_of(expires));
        let transport = Transport::Passthrough;
        Egress { name: self.metadata.name.0, from, to, ports, protocols, transport, expires_at }
    }
}

impl Written<ServiceSpec> {
    fn into_service(self) -> Service {
        let ServiceSpec { written: WrittenService { address, port, backends, order }, weights } = self.spec;
        let order = match order {
            WrittenOrder::LocalFirst => Order::LocalFirst,
            WrittenOrder::FirstBackend => Order::FirstBackend,
        };
        let backends = backends.0.into_iter().map(|backend| backend.set).collect();
        Service { name: self.metadata.name.0, address: address.0, port: port.0, backends, order, weights }
    }
}
