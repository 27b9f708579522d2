//! A whole slice as resources and back.

use super::{Item, Set};
use crate::v1::{self, ResourceKind as Kind};
use ambit_model::{Code, Refusal};
use prost::Message;
use std::sync::Arc;

impl Item {
    /// See [`Kind::NodeDenial`].
    pub fn node_denial(m: &v1::NodeDenial) -> Item {
        Item::new(Kind::NodeDenial, format!("{}/{}", m.trust_domain, m.node), m.encode_to_vec())
    }
    /// See [`Kind::AuthorityDenial`].
    pub fn authority_denial(m: &v1::AuthorityDenial) -> Item {
        Item::new(Kind::AuthorityDenial, format!("{}/{}", m.trust_domain, m.authority), m.encode_to_vec())
    }
    /// See [`Kind::IdDenial`].
    pub fn id_denial(m: &v1::IdDenial) -> Item {
        Item::new(Kind::IdDenial, m.spiffe_id.clone(), m.encode_to_vec())
    }
    /// See [`Kind::LeafDenial`].
    pub fn leaf_denial(m: &v1::LeafDenial) -> Item {
        let serial = hex::encode(&m.serial);
        Item::new(Kind::LeafDenial, format!("{}/{}/{serial}", m.trust_domain, m.authority), m.encode_to_vec())
    }
    /// See [`Kind::Cell`].
    pub fn cell(trust_domain: &str, cluster: &str) -> Item {
        let body = v1::SliceOf { trust_domain: trust_domain.to_owned(), cluster: cluster.to_owned() };
        Item::new(Kind::Cell, String::new(), body.encode_to_vec())
    }
    /// See [`Kind::Bundle`].
    pub fn bundle(m: &v1::Bundle) -> Item {
        Item::new(Kind::Bundle, m.trust_domain.clone(), m.encode_to_vec())
    }
    /// See [`Kind::Entry`].
    pub fn entry(m: &v1::Entry) -> Item {
        Item::new(Kind::Entry, m.id.clone(), m.encode_to_vec())
    }
    /// See [`Kind::Policy`].
    pub fn policy(m: &v1::Policy) -> Item {
        Item::new(Kind::Policy, format!("{}/{}", m.origin, m.name), m.encode_to_vec())
    }
    /// See [`Kind::Service`].
    pub fn service(m: &v1::Service) -> Item {
        Item::new(Kind::Service, format!("{}/{}", m.origin, m.name), m.encode_to_vec())
    }
    /// See [`Kind::Endpoint`]. A cell has one at an address, and speaks of its own identities only.
    pub fn endpoint(m: &v1::Endpoint) -> Item {
        let rest = m.spiffe_id.strip_prefix("spiffe://").unwrap_or_default();
        let origin = rest.split('/').next().unwrap_or_default();
        Item::new(Kind::Endpoint, format!("{origin}/{}", m.address), m.encode_to_vec())
    }
    /// See [`Kind::Caller`].
    pub fn caller(m: &v1::NodeAddress) -> Item {
        Item::new(Kind::Caller, format!("{}/{}", m.trust_domain, m.node), m.encode_to_vec())
    }
    /// See [`Kind::Egress`].
    pub fn egress(m: &v1::Egress) -> Item {
        Item::new(Kind::Egress, m.name.clone(), m.encode_to_vec())
    }
    /// See [`Kind::Meshed`].
    pub fn meshed(address: &str) -> Item {
        Item::new(Kind::Meshed, address.to_owned(), Vec::new())
    }
    /// See [`Kind::Unmeshed`].
    pub fn unmeshed(m: &v1::Policy) -> Item {
        Item::new(Kind::Unmeshed, format!("{}/{}", m.origin, m.name), m.encode_to_vec())
    }
    /// See [`Kind::Claimed`].
    pub fn claimed(address: &str) -> Item {
        Item::new(Kind::Claimed, address.to_owned(), Vec::new())
    }
    /// See [`Kind::Cluster`].
    pub fn cluster(m: &v1::ClusterOf) -> Item {
        Item::new(Kind::Cluster, format!("{}/{}", m.trust_domain, m.cluster), m.encode_to_vec())
    }
    /// See [`Kind::Steer`].
    pub fn steer(m: &v1::Steered) -> Item {
        let key = format!("{}/{}/{}/{}", m.origin, m.service, m.from_trust_domain, m.from);
        Item::new(Kind::Steer, key, m.encode_to_vec())
    }
    /// See [`Kind::Identity`].
    pub fn identity(spiffe_id: &str, number: u32) -> Item {
        let body = v1::NumericIdentity { spiffe_id: String::new(), number };
        Item::new(Kind::Identity, spiffe_id.to_owned(), body.encode_to_vec())
    }
}

impl From<&v1::Slice> for Set {
    /// Revision, time and import positions are of no resource.
    fn from(s: &v1::Slice) -> Set {
        let named = |kind: Kind| move |name: &String| Item::new(kind, name.clone(), Vec::new());
        std::iter::once(Item::cell(&s.trust_domain, &s.cluster))
            .chain(s.denials.iter().map(Item::node_denial))
            .chain(s.authority_denials.iter().map(Item::authority_denial))
            .chain(s.id_denials.iter().map(Item::id_denial))
            .chain(s.leaf_denials.iter().map(Item::leaf_denial))
            .chain(s.bundles.iter().map(Item::bundle))
            .chain(s.tainted_authorities.iter().map(named(Kind::TaintedAuthority)))
            .chain(s.tainted_jwt_authorities.iter().map(named(Kind::TaintedJwt)))
            .chain(s.entries.iter().map(Item::entry))
            .chain(s.policies.iter().map(Item::policy))
            .chain(s.services.iter().map(Item::service))
            .chain(s.endpoints.iter().map(Item::endpoint))
            .chain(s.callers.iter().map(Item::caller))
            .chain(s.identities.iter().map(|m| Item::identity(&m.spiffe_id, m.number)))
            .chain(s.egress.iter().map(Item::egress))
            .chain(s.meshed.iter().map(|address| Item::meshed(address)))
            .chain(s.unmeshed.iter().map(Item::unmeshed))
            .chain(s.claimed.iter().map(|address| Item::claimed(address)))
            .chain(s.clusters.iter().map(Item::cluster))
            .chain(s.steers.iter().map(Item::steer))
            .map(Arc::new)
            .collect()
    }
}

impl Set {
    /// The slice that these resources are, of this revision and time.
    ///
    /// # Errors
    /// [`Code::BadRequest`] where a resource of a kind that is known does not decode.
    pub fn slice(&self, revision: u64, stamp_ms: u64) -> Result<v1::Slice, Refusal> {
        let mut s = v1::Slice { revision, stamp_ms, ..v1::Slice::default() };
        for item in self.items() {
            item.add_to(&mut s).map_err(|e| {
                Refusal::new(
                    Code::BadRequest,
                    format!("a resource of kind {}", item.kind),
                    format!("{}: {e}", item.key),
                )
            })?;
        }
        Ok(s)
    }

    /// The same, of denials only.
    ///
    /// # Errors
    /// As [`Set::slice`].
    pub fn denials(&self, revision: u64, stamp_ms: u64) -> Result<v1::Slice, Refusal> {
        self.items().iter().take_while(|item| item.is_denial()).cloned().collect::<Set>().slice(revision, stamp_ms)
    }
}

impl Item {
    fn add_to(&self, s: &mut v1::Slice) -> Result<(), prost::DecodeError> {
        let body = self.body.as_slice();
        match Kind::try_from(self.kind) {
            Ok(Kind::NodeDenial) => s.denials.push(Message::decode(body)?),
            Ok(Kind::AuthorityDenial) => s.authority_denials.push(Message::decode(body)?),
            Ok(Kind::IdDenial) => s.id_denials.push(Message::decode(body)?),
            Ok(Kind::LeafDenial) => s.leaf_denials.push(Message::decode(body)?),
            Ok(Kind::Cell) => {
                let of = v1::SliceOf::decode(body)?;
                (s.trust_domain, s.cluster) = (of.trust_domain, of.cluster);
            }
            Ok(Kind::Bundle) => s.bundles.push(Message::decode(body)?),
            Ok(Kind::TaintedAuthority) => s.tainted_authorities.push(self.key.clone()),
            Ok(Kind::TaintedJwt) => s.tainted_jwt_authorities.push(self.key.clone()),
            Ok(Kind::Entry) => s.entries.push(Message::decode(body)?),
            Ok(Kind::Policy) => s.policies.push(Message::decode(body)?),
            Ok(Kind::Service) => s.services.push(Message::decode(body)?),
            Ok(Kind::Endpoint) => s.endpoints.push(Message::decode(body)?),
            Ok(Kind::Caller) => s.callers.push(Message::decode(body)?),
            Ok(Kind::Identity) => {
                let number = v1::NumericIdentity::decode(body)?;
                s.identities.push(v1::NumericIdentity { spiffe_id: self.key.clone(), ..number });
            }
            Ok(Kind::Egress) => s.egress.push(Message::decode(body)?),
            Ok(Kind::Meshed) => s.meshed.push(self.key.clone()),
            Ok(Kind::Unmeshed) => s.unmeshed.push(Message::decode(body)?),
            Ok(Kind::Claimed) => s.claimed.push(self.key.clone()),
            Ok(Kind::Cluster) => s.clusters.push(Message::decode(body)?),
            Ok(Kind::Steer) => s.steers.push(Message::decode(body)?),
            // A newer server's.
            Ok(Kind::Unspecified) | Err(_) => {}
        }
        Ok(())
    }
}
