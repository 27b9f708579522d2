//! What slices are made of, as messages.

use ambit_model::{Generation, IdDenial, JwtAuthority, NodeId, SpiffeId, TrustDomain};
use ambit_proto::v1;
use ambit_state::{Bundles, SvidDenials};
use std::collections::BTreeMap;

pub(super) fn bundles<'a>(
    bundles: &'a Bundles,
    jwt: &'a BTreeMap<TrustDomain, Vec<JwtAuthority>>,
) -> impl Iterator<Item = v1::Bundle> + 'a {
    bundles.iter().map(|(td, (sequence, roots_der))| v1::Bundle {
        trust_domain: td.to_string(),
        sequence: *sequence,
        roots_der: roots_der.clone(),
        jwt_authorities: jwt.get(td).into_iter().flatten().map(Into::into).collect(),
    })
}

pub(super) fn authority_message((td, authority): &(TrustDomain, String)) -> v1::AuthorityDenial {
    v1::AuthorityDenial { trust_domain: td.to_string(), authority: authority.clone() }
}

pub(super) fn denial_message(((td, node), generation): (&(TrustDomain, NodeId), &Generation)) -> v1::NodeDenial {
    v1::NodeDenial { node: node.to_string(), generation: generation.0, trust_domain: td.to_string() }
}

pub(super) fn svid_denials(denials: &SvidDenials) -> (Vec<v1::IdDenial>, Vec<v1::LeafDenial>) {
    let id = |(id, denial): &(SpiffeId, IdDenial)| v1::IdDenial {
        spiffe_id: id.to_string(),
        up_to: denial.up_to.to_vec(),
        barred: denial.barred,
    };
    let leaf = |(td, authority, serial): &(TrustDomain, String, Vec<u8>)| v1::LeafDenial {
        trust_domain: td.to_string(),
        authority: authority.clone(),
        serial: serial.clone(),
    };
    (denials.ids.iter().map(id).collect(), denials.leaves.iter().map(leaf).collect())
}
