//! Messages to model types, strictly; model types to messages, totally.

use crate::v1;
use ambit_model::act::{Approval, Approved, SIGNATURE_BYTES};
use ambit_model::bundle::Bundle;
use ambit_model::policy::{
    Action, Cidr, Egress, Endpoint, Group, Labels, NodeAddress, Peers, Policy, PolicyExtras, Service, Transport, label,
};
use ambit_model::{
    Address, Code, DnsName, Entry, EntryExtras, Extras, Generation, JwtAuthority, JwtTtl, NodeId, Refusal, Stamp,
    SvidTtl, TrustDomain,
};
use std::str::FromStr;

fn all<T: FromStr<Err = Refusal>, C: FromIterator<T>>(texts: &[String]) -> Result<C, Refusal> {
    texts.iter().map(|t| t.parse()).collect()
}

fn port(n: u32) -> Result<u16, Refusal> {
    match u16::try_from(n) {
        Ok(p) if p > 0 => Ok(p),
        _ => Err(Refusal::new(Code::BadRequest, "a port of 1-65535", n.to_string())),
    }
}

/// The IPv4 address of a node.
pub fn address(s: &str) -> Result<std::net::Ipv4Addr, Refusal> {
    s.parse().map_err(|_| Refusal::new(Code::BadRequest, "an IPv4 address", s))
}

/// `spiffe://td/path`, `spiffe://td/prefix/*` or `spiffe://td/*`.
pub fn peers(s: &str) -> Result<Peers, Refusal> {
    s.parse()
}

/// The text of a set of identities, as [`peers`] reads it.
pub fn peers_text(p: &Peers) -> String {
    p.to_string()
}

/// A certificate's lifetime; 0 is the default.
pub fn svid_ttl(seconds: u32) -> Result<SvidTtl, Refusal> {
    if seconds == 0 { Ok(SvidTtl::DEFAULT) } else { seconds.try_into() }
}

/// A token's lifetime; 0 is the default.
pub fn jwt_ttl(seconds: u32) -> Result<JwtTtl, Refusal> {
    if seconds == 0 { Ok(JwtTtl::DEFAULT) } else { seconds.try_into() }
}

/// DNS names of one certificate: bounded, each once.
pub fn dns_names(names: &[String]) -> Result<Vec<DnsName>, Refusal> {
    let extras = EntryExtras { dns_names: all(names)?, ..EntryExtras::NONE };
    Ok(Extras::new(extras)?.dns_names.clone())
}

/// Labels as `key=value`, each key once.
fn labels(texts: &[String]) -> Result<Labels, Refusal> {
    let read: Labels = texts.iter().map(|text| label(text)).collect::<Result<_, _>>()?;
    if read.len() == texts.len() {
        return Ok(read);
    }
    Err(Refusal::new(Code::BadRequest, "labels key=value, each key once", texts.join(" ")))
}

/// What approvers signed. None where nothing was: whether that is enough the cell says.
pub fn approved(m: Option<v1::Approved>) -> Result<Option<Approved>, Refusal> {
    let Some(m) = m else { return Ok(None) };
    let bad = |what: &str| Refusal::new(Code::BadRequest, format!("approvals with {what}"), "another length");
    let nonce = m.nonce.as_slice().try_into().map_err(|_| bad("a nonce of 16 bytes"))?;
    let one = |a: v1::Approval| {
        let key = a.key.as_slice().try_into().map_err(|_| bad("keys of 32 bytes"))?;
        let signature = Some(a.signature).filter(|s| s.len() == SIGNATURE_BYTES);
        Ok(Approval { key, signature: signature.ok_or_else(|| bad("signatures of 64 bytes"))? })
    };
    let approvals = m.approvals.into_iter().map(one).collect::<Result<_, Refusal>>()?;
    Ok(Some(Approved { epoch: m.epoch, expires: Stamp(m.expires_ms), nonce, approvals }))
}

/// See [`approved`].
pub fn approved_message(a: &Approved) -> v1::Approved {
    let one = |a: &Approval| v1::Approval { key: a.key.to_vec(), signature: a.signature.clone() };
    let approvals = a.approvals.iter().map(one).collect();
    v1::Approved { epoch: a.epoch, expires_ms: a.expires.0, nonce: a.nonce.to_vec(), approvals }
}

impl TryFrom<&v1::Entry> for Entry {
    type Error = Refusal;
    fn try_from(m: &v1::Entry) -> Result<Self, Refusal> {
        if m.selectors.is_empty() {
            return Err(Refusal::new(Code::BadRequest, "at least one selector", "none"));
        }
        Ok(Entry {
            id: m.id.parse()?,
            spiffe_id: m.spiffe_id.parse()?,
            cluster: m.cluster.parse()?,
            nodes: all(&m.nodes)?,
            selectors: all(&m.selectors)?,
            ttl: svid_ttl(m.ttl_seconds)?,
            federates_with: all(&m.federates_with)?,
            extras: Extras::new(EntryExtras {
                hint: m.hint.clone(),
                dns_names: dns_names(&m.dns_names)?,
                jwt_ttl: jwt_ttl(m.jwt_ttl_seconds)?,
                expires_at: if m.expires_at_ms == 0 { EntryExtras::NONE.expires_at } else { Stamp(m.expires_at_ms) },
                downstream: m.downstream,
                admin: m.admin,
                federates_with_groups: all(&m.federates_with_groups)?,
                labels: labels(&m.labels)?,
            })?,
        })
    }
}

impl From<&Entry> for v1::Entry {
    fn from(e: &Entry) -> Self {
        v1::Entry {
            id: e.id.to_string(),
            spiffe_id: e.spiffe_id.to_string(),
            cluster: e.cluster.to_string(),
            nodes: e.nodes.iter().map(ToString::to_string).collect(),
            selectors: e.selectors.iter().map(ToString::to_string).collect(),
            ttl_seconds: e.ttl.seconds(),
            federates_with: e.federates_with.iter().map(ToString::to_string).collect(),
            revision: 0,
            hint: e.extras.hint.clone(),
            dns_names: e.extras.dns_names.iter().map(ToString::to_string).collect(),
            jwt_ttl_seconds: e.extras.jwt_ttl.seconds(),
            expires_at_ms: if e.extras.expires_at == EntryExtras::NONE.expires_at { 0 } else { e.extras.expires_at.0 },
            downstream: e.extras.downstream,
            admin: e.extras.admin,
            federates_with_groups: e.extras.federates_with_groups.iter().map(ToString::to_string).collect(),
            labels: e.extras.labels.iter().map(|(key, value)| format!("{key}={value}")).collect(),
        }
    }
}

impl TryFrom<&v1::Policy> for Policy {
    type Error = Refusal;
    fn try_from(m: &v1::Policy) -> Result<Self, Refusal> {
        // As cells tell it: a set that this side could not resolve is refused, whatever it would decide.
        let from = m.from.iter().map(|f| Peers::from_wire(f)).collect::<Result<Vec<_>, _>>()?;
        let extras = extras(m)?;
        if from.is_empty() == extras.unmeshed.is_empty() {
            let found = if from.is_empty() { "neither" } else { "both" };
            return Err(Refusal::new(Code::BadRequest, "callers in 'from' or in 'unmeshed'", found));
        }
        let policy = Policy {
            name: m.name.parse()?,
            target: Peers::from_wire(&m.target)?,
            action: match m.action() {
                v1::Action::Allow => Action::Allow,
                v1::Action::Deny => Action::Deny,
                v1::Action::Audit => Action::Audit,
                v1::Action::Unspecified => {
                    return Err(Refusal::new(Code::BadRequest, "action allow, deny or audit", "another"));
                }
            },
            from,
            ports: m.ports.iter().map(|p| port(*p)).collect::<Result<_, _>>()?,
            extras,
        };
        // Clear text is said where it is meant.
        let transport = policy.transport().map(Transport::as_str).unwrap_or_default();
        if m.transport != transport {
            return Err(Refusal::new(Code::BadRequest, format!("transport '{transport}'"), m.transport.as_str()));
        }
        Ok(policy)
    }
}

fn extras(m: &v1::Policy) -> Result<PolicyExtras, Refusal> {
    let none = PolicyExtras::default();
    let expires_at = if m.expires_at_ms == 0 { none.expires_at } else { Stamp(m.expires_at_ms) };
    let protocols = if m.protocols.is_empty() { none.protocols } else { all(&m.protocols)? };
    Ok(PolicyExtras { expires_at, protocols, unmeshed: all(&m.unmeshed)? })
}

/// A policy as a message. `resolved`, `written_by` and `revision` are the caller's to fill.
pub fn policy_message(origin: &TrustDomain, p: &Policy) -> v1::Policy {
    v1::Policy {
        origin: origin.to_string(),
        name: p.name.to_string(),
        target: peers_text(&p.target),
        action: match p.action {
            Action::Allow => v1::Action::Allow,
            Action::Deny => v1::Action::Deny,
            Action::Audit => v1::Action::Audit,
        } as i32,
        from: p.from.iter().map(peers_text).collect(),
        ports: p.ports.iter().map(|p| u32::from(*p)).collect(),
        resolved: true,
        written_by: String::new(),
        revision: 0,
        expires_at_ms: if p.extras.expires_at == Stamp(u64::MAX) { 0 } else { p.extras.expires_at.0 },
        protocols: p.extras.protocols.iter().map(|protocol| protocol.as_str().to_owned()).collect(),
        unmeshed: p.extras.unmeshed.iter().map(ToString::to_string).collect(),
        transport: p.transport().map(|transport| transport.as_str().to_owned()).unwrap_or_default(),
    }
}

impl TryFrom<&v1::Egress> for Egress {
    type Error = Refusal;
    fn try_from(m: &v1::Egress) -> Result<Self, Refusal> {
        let from = m.from.iter().map(|f| Peers::from_wire(f)).collect::<Result<Vec<_>, _>>()?;
        let to = all::<Cidr, Vec<_>>(&m.to)?;
        let (name, protocols) = (m.name.parse()?, all(&m.protocols)?);
        let bad = |expected: &str, found: &str| Refusal::new(Code::BadRequest, expected, found);
        if from.is_empty() || to.is_empty() || m.protocols.is_empty() {
            return Err(bad("callers, ranges and protocols of an egress document", m.name.as_str()));
        }
        if m.transport != Transport::Passthrough.as_str() {
            return Err(bad("transport passthrough", &m.transport));
        }
        let ports = m.ports.iter().map(|p| port(*p)).collect::<Result<_, _>>()?;
        let expires_at = if m.expires_at_ms == 0 { Stamp(u64::MAX) } else { Stamp(m.expires_at_ms) };
        Ok(Egress { name, from, to, ports, protocols, transport: Transport::Passthrough, expires_at })
    }
}

/// An egress document as a message. `written_by` and `revision` are the caller's to fill.
pub fn egress_message(e: &Egress) -> v1::Egress {
    v1::Egress {
        name: e.name.to_string(),
        from: e.from.iter().map(peers_text).collect(),
        to: e.to.iter().map(ToString::to_string).collect(),
        ports: e.ports.iter().map(|p| u32::from(*p)).collect(),
        protocols: e.protocols.iter().map(|protocol| protocol.as_str().to_owned()).collect(),
        transport: e.transport.as_str().to_owned(),
        expires_at_ms: if e.expires_at == Stamp(u64::MAX) { 0 } else { e.expires_at.0 },
        written_by: String::new(),
        revision: 0,
    }
}

/// A group as a message. `written_by` and `revision` are the caller's to fill.
pub fn group_message(origin: &TrustDomain, g: &Group) -> v1::Group {
    v1::Group {
        origin: origin.to_string(),
        name: g.name.to_string(),
        members: g.members.iter().map(peers_text).collect(),
        written_by: String::new(),
        revision: 0,
    }
}

impl TryFrom<&v1::Service> for Service {
    type Error = Refusal;
    fn try_from(m: &v1::Service) -> Result<Self, Refusal> {
        let service = Service {
            name: m.name.parse()?,
            address: m.address.parse::<Address>()?,
            port: port(m.port)?,
            backends: m.backends.iter().map(|b| peers(b)).collect::<Result<_, _>>()?,
            order: m.order.parse()?,
            weights: m.weights.clone(),
        };
        let bad = || Refusal::new(Code::BadRequest, "a weight of each backend, not all 0", format!("{:?}", m.weights));
        if service.is_weighted_well() { Ok(service) } else { Err(bad()) }
    }
}

/// A service as a message.
pub fn service_message(origin: &TrustDomain, s: &Service) -> v1::Service {
    v1::Service {
        origin: origin.to_string(),
        name: s.name.to_string(),
        address: s.address.to_string(),
        port: u32::from(s.port),
        backends: s.backends.iter().map(peers_text).collect(),
        order: s.order.as_str().to_owned(),
        weights: s.weights.clone(),
    }
}

impl TryFrom<&v1::Endpoint> for Endpoint {
    type Error = Refusal;
    fn try_from(m: &v1::Endpoint) -> Result<Self, Refusal> {
        Ok(Endpoint {
            spiffe_id: m.spiffe_id.parse()?,
            address: m.address.parse::<Address>()?,
            cluster: m.cluster.parse()?,
            node_address: address(&m.node_address)?,
            node: m.node.parse()?,
            generation: Generation(m.generation),
        })
    }
}

impl From<&Endpoint> for v1::Endpoint {
    fn from(e: &Endpoint) -> Self {
        v1::Endpoint {
            spiffe_id: e.spiffe_id.to_string(),
            address: e.address.to_string(),
            cluster: e.cluster.to_string(),
            node_address: e.node_address.to_string(),
            node: e.node.to_string(),
            generation: e.generation.0,
        }
    }
}

/// Of which node of which trust domain, and from where its tunnels come.
pub fn node_address(m: &v1::NodeAddress) -> Result<((TrustDomain, NodeId), NodeAddress), Refusal> {
    let row = NodeAddress { address: address(&m.address)?, since: Generation(m.generation) };
    Ok(((m.trust_domain.parse()?, m.node.parse()?), row))
}

/// The same as a message.
pub fn node_address_message(((td, node), row): (&(TrustDomain, NodeId), &NodeAddress)) -> v1::NodeAddress {
    let (trust_domain, node) = (td.to_string(), node.to_string());
    v1::NodeAddress { trust_domain, node, generation: row.since.0, address: row.address.to_string() }
}

/// A bundle from its message. The caller says whose it is by the type it asks for.
pub fn bundle<Whose>(m: &v1::Bundle) -> Result<Bundle<Whose>, Refusal> {
    let jwt = m.jwt_authorities.iter().map(JwtAuthority::from).collect();
    Ok(Bundle::new(m.trust_domain.parse()?, m.sequence, m.roots_der.clone()).with_jwt_authorities(jwt))
}

impl From<&v1::JwtAuthority> for JwtAuthority {
    fn from(m: &v1::JwtAuthority) -> Self {
        JwtAuthority { kid: m.kid.clone(), spki_der: m.spki_der.clone(), not_after: Stamp(m.not_after_ms) }
    }
}

impl From<&JwtAuthority> for v1::JwtAuthority {
    fn from(a: &JwtAuthority) -> Self {
        let (kid, spki_der, state) = (a.kid.clone(), a.spki_der.clone(), String::new());
        v1::JwtAuthority { kid, spki_der, not_after_ms: a.not_after.0, state }
    }
}

/// A bundle as a message.
pub fn bundle_message<Whose>(b: &Bundle<Whose>) -> v1::Bundle {
    v1::Bundle {
        trust_domain: b.trust_domain().to_string(),
        sequence: b.sequence(),
        roots_der: b.roots().to_vec(),
        jwt_authorities: b.jwt_authorities().iter().map(Into::into).collect(),
    }
}
