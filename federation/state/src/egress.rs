//! Where workloads may connect to outside of the mesh, as it is told to nodes: documents with their sets resolved, and the addresses
//! in their ranges that are not outside.

use crate::command::{DocumentKind, DocumentsChange};
use crate::objects::EgressRow;
use crate::resolve::Resolver;
use crate::state::{OwnedName, State};
use ambit_model::SpiffeId;
use ambit_model::policy::{Cidr, Egress};
use ambit_policy::EgressSet;
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::ops::Bound;

impl State {
    /// Egress documents, all of this cell.
    pub fn egress(&self) -> impl Iterator<Item = (&OwnedName, &EgressRow)> {
        self.egress.iter()
    }

    /// One of them.
    pub fn egress_of(&self, name: &OwnedName) -> Option<&EgressRow> {
        self.egress.get(name)
    }

    /// As they are written, after a change, by name.
    pub(crate) fn own_egress_after<'a>(
        &'a self,
        change: Option<&'a DocumentsChange>,
    ) -> impl Iterator<Item = &'a Egress> {
        let mut documents: BTreeMap<_, &Egress> = self.egress().map(|((_, name), row)| (name, &row.object)).collect();
        for (kind, name) in change.iter().flat_map(|change| &change.delete) {
            if *kind == DocumentKind::Egress {
                documents.remove(name);
            }
        }
        documents.extend(change.iter().flat_map(|change| &change.egress).map(|egress| (&egress.name, egress)));
        documents.into_values()
    }

    /// As they decide now: sets resolved, and what is over left out.
    pub fn egress_set(&self) -> EgressSet {
        self.resolved_egress(None).into_iter().collect()
    }

    /// The same as it would be after a change.
    pub fn egress_set_after(&self, change: &DocumentsChange) -> EgressSet {
        self.resolved_egress(Some(change)).into_iter().collect()
    }

    /// By name.
    pub(crate) fn resolved_egress(&self, change: Option<&DocumentsChange>) -> Vec<Egress> {
        let (resolver, now) = (Resolver::new(self, change), self.moment());
        let in_force = self.own_egress_after(change).filter(|egress| !egress.is_over(now));
        in_force.filter_map(|egress| resolver.egress(egress)).collect()
    }

    /// Every address that the mesh knows somebody at, of peers too.
    pub(crate) fn meshed_addresses(&self) -> BTreeSet<Ipv4Addr> {
        let endpoints = self.endpoints.iter().map(|((_, address), _)| *address);
        endpoints.chain(self.services().map(|(_, row)| row.object.address)).collect()
    }
}

/// Documents that let one of these identities, which are in order, connect somewhere.
pub(crate) fn concerning<'a>(all: &'a [Egress], local: &'a [SpiffeId]) -> impl Iterator<Item = &'a Egress> {
    let here =
        |egress: &&Egress| egress.from.iter().any(|set| crate::slicing::within(local, |id| id, set).next().is_some());
    all.iter().filter(here)
}

/// Of these addresses those that lie in a range of the documents, in order. A node is told them with the documents: what the mesh
/// knows is never reached as if it were outside, also where no workload of the node may reach it in a tunnel.
pub(crate) fn inside<'a>(
    addresses: &BTreeSet<Ipv4Addr>,
    documents: impl IntoIterator<Item = &'a Egress>,
) -> Vec<Ipv4Addr> {
    let ranges: BTreeSet<Cidr> = documents.into_iter().flat_map(|egress| egress.to.iter().copied()).collect();
    let mut found = BTreeSet::new();
    for (first, bits) in ranges.iter().filter_map(Cidr::v4) {
        let last = Ipv4Addr::from_bits(first.to_bits() | u32::MAX.checked_shr(u32::from(bits)).unwrap_or(0));
        found.extend(addresses.range((Bound::Included(first), Bound::Included(last))).copied());
    }
    found.into_iter().collect()
}
