//! What one node needs, computed from the state: nothing about workloads it may not run or reach.

use crate::denied::SvidDenials;
use crate::egress;
use crate::objects::RelationshipRow;
use crate::state::State;
use ambit_model::policy::{Egress, Endpoint, NodeAddress, Policy, Service};
use ambit_model::{
    ClusterId, Entry, Generation, JwtAuthority, NodeId, Revision, Routing, SpiffeId, Stamp, TrustDomain,
};
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

/// Bundles by trust domain: sequence and roots, DER.
pub type Bundles = BTreeMap<TrustDomain, (u64, Vec<Vec<u8>>)>;

/// A node's slice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slice {
    /// The cell's revision it was made from.
    pub revision: Revision,
    /// The cell's time.
    pub stamp: Stamp,
    /// The cell's own trust domain.
    pub trust_domain: TrustDomain,
    /// The node's cluster.
    pub cluster: ClusterId,
    /// Roots by trust domain: (sequence, DER certificates).
    pub bundles: BTreeMap<TrustDomain, (u64, Vec<Vec<u8>>)>,
    /// Keys of JWT-SVIDs by trust domain.
    pub jwt_authorities: BTreeMap<TrustDomain, Vec<JwtAuthority>>,
    /// Entries that this node may run.
    pub entries: Vec<Entry>,
    /// Policies that concern them, by origin.
    pub policies: Vec<(TrustDomain, Policy)>,
    /// Services whose backends they may reach, by origin.
    pub services: Vec<(TrustDomain, Service)>,
    /// Endpoints that they may reach.
    pub endpoints: Vec<Endpoint>,
    /// From where tunnels of nodes come that may call them; a node is the trust domain's that says so.
    pub callers: BTreeMap<(TrustDomain, NodeId), NodeAddress>,
    /// Numbers of every identity named above.
    pub identities: BTreeMap<SpiffeId, u32>,
    /// Leaves of these nodes up to the generation are refused; a node is the trust domain's that denied it.
    pub denials: BTreeMap<(TrustDomain, NodeId), Generation>,
    /// SVIDs that are refused.
    pub svid_denials: SvidDenials,
    /// How far each peer was imported.
    pub imported: BTreeMap<TrustDomain, u64>,
    /// Intermediates of the own cell whose leaves are to be issued anew.
    pub tainted: BTreeSet<String>,
    /// JWT authorities of the own cell whose tokens are to be asked for anew.
    pub tainted_jwt: BTreeSet<String>,
    /// Leaves of these intermediates are refused; each is the trust domain's that said so.
    pub authority_denials: BTreeSet<(TrustDomain, String)>,
    /// Where they may connect to outside of the mesh.
    pub egress: Vec<Egress>,
    /// Addresses in the ranges of these that are not outside: none is reached in clear.
    pub meshed: Vec<Ipv4Addr>,
    /// Addresses in the ranges from which policies let callers in that are of the mesh: nobody comes from there without an identity.
    pub claimed: Vec<Ipv4Addr>,
    /// Where connections to services go.
    pub routing: Routing,
}

impl State {
    /// The slice of an enrolled node, or `None` where the node is unknown.
    pub fn slice(&self, id: &NodeId) -> Option<Slice> {
        let cell = self.cell()?;
        let node = self.node(id)?;
        let entries: Vec<Entry> = self.entries().filter(|r| self.fits(&r.entry, id)).map(|r| r.entry.clone()).collect();
        let local: BTreeSet<SpiffeId> = entries.iter().map(|e| e.spiffe_id.clone()).collect();
        let (policies, now) = (self.policies_for(&local), self.moment());
        let index = policies.compile();
        let endpoints: Vec<Endpoint> = self
            .endpoints()
            .map(|(origin, row)| (*origin == cell.trust_domain && row.object.node == *id, &row.object))
            .filter(|(here, e)| *here || local.iter().any(|src| !index.ports(src, &e.spiffe_id, now).is_empty()))
            .map(|(_, e)| e.clone())
            .collect();
        let services: Vec<(TrustDomain, Service)> = self
            .told_services()
            .filter(|(_, row)| endpoints.iter().any(|e| row.object.backends.iter().any(|b| b.contains(&e.spiffe_id))))
            .map(|((origin, _), row)| (origin.clone(), row.object.clone()))
            .collect();
        let named = local.iter().chain(endpoints.iter().map(|e| &e.spiffe_id));
        let identities = named.filter_map(|id| self.identities.get(id).map(|n| (id.clone(), *n))).collect();
        let all = self.resolved_egress(None);
        let here: Vec<SpiffeId> = local.iter().cloned().collect();
        let egress: Vec<Egress> = egress::concerning(&all, &here).cloned().collect();
        Some(Slice {
            revision: cell.revision,
            stamp: self.stamp(),
            trust_domain: cell.trust_domain.clone(),
            cluster: node.cluster.clone(),
            bundles: self.bundles_for(&entries),
            jwt_authorities: self.jwt_bundles_for(&entries),
            callers: self.callers(&local, &policies),
            policies: policies.iter().map(|(origin, p)| (origin.clone(), p.clone())).collect(),
            entries,
            services,
            endpoints,
            identities,
            denials: self.node_denials.iter().map(|(key, generation)| (key.clone(), *generation)).collect(),
            svid_denials: self.svid_denials(),
            imported: self.imported(),
            tainted: self.tainted_authorities(),
            tainted_jwt: self.tainted_jwt(),
            authority_denials: self.denied_authorities(),
            meshed: egress::inside(&self.meshed_addresses(), egress::ranges(&egress)),
            claimed: egress::inside(&self.claimed_addresses(), egress::callers(policies.iter(), &here)),
            egress,
            routing: self.routing(),
        })
    }

    /// Own roots and those of peers that are believed. A stopped peer's identities keep verifying: only news from it is refused.
    pub fn bundles(&self) -> Bundles {
        let own = self.cell().zip(self.bundle_record()).map(|(cell, bundle)| {
            let roots = bundle.roots.into_iter().map(|root| root.der).collect();
            (cell.trust_domain.clone(), (bundle.sequence, roots))
        });
        let peers = self
            .peers()
            .filter(|(_, p)| p.state.is_believed())
            .map(|(td, p)| (td.clone(), (p.bundle_sequence, self.peer_roots(td))));
        own.into_iter().chain(peers).collect()
    }

    /// [`State::bundles`], and those of foreign trust domains that are no cells, for entries that federate with them.
    fn bundles_for(&self, entries: &[Entry]) -> Bundles {
        let mut bundles = self.bundles();
        for td in entries.iter().flat_map(|entry| &entry.federates_with) {
            if let Some(bundle) = self.foreign_bundle(td) {
                bundles.entry(td.clone()).or_insert(bundle);
            }
        }
        bundles
    }

    /// [`State::jwt_bundles`] in the same way.
    fn jwt_bundles_for(&self, entries: &[Entry]) -> BTreeMap<TrustDomain, Vec<JwtAuthority>> {
        let mut bundles = self.jwt_bundles();
        let named = entries.iter().flat_map(|entry| &entry.federates_with);
        for td in named.filter(|td| self.relationships.contains(td)) {
            bundles.entry(td.clone()).or_insert_with(|| self.peer_jwt(td).to_vec());
        }
        bundles
    }

    /// The bundle of a foreign trust domain that is no cell, once one is known.
    pub fn foreign_bundle(&self, td: &TrustDomain) -> Option<(u64, Vec<Vec<u8>>)> {
        let row = self.relationships.get(td)?;
        // Nothing known is not the same as an empty bundle, which revokes everything.
        let known = row.taken != Stamp(0) || !row.roots.is_empty();
        known.then(|| (row.sequence.unwrap_or_default(), row.roots.clone()))
    }

    /// Relationships with foreign trust domains that are no cells.
    pub fn relationships(&self) -> impl Iterator<Item = (&TrustDomain, &RelationshipRow)> {
        self.relationships.iter()
    }

    /// How far each peer was imported.
    pub fn imported(&self) -> BTreeMap<TrustDomain, u64> {
        self.peers().map(|(td, p)| (td.clone(), p.seq)).collect()
    }
}
