//! Where workloads may connect to outside of the mesh, as it is told to nodes: documents with their sets resolved, and the addresses
//! in their ranges that are not outside.

use crate::command::{DocumentKind, DocumentsChange};
use crate::objects::EgressRow;
use crate::resolve::Resolver;
use crate::state::{OwnedName, State};
use ambit_model::policy::{Action, Cidr, Egress, Policy};
use ambit_model::{Address, SpiffeId, Stamp, TrustDomain};
use ambit_policy::EgressSet;
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::ops::Bound;

/// A pod's address is given to the next one, or to nobody, for about as long as what knew it is good for: leaves last an hour.
const LEFT_MS: u64 = 3_600_000;
/// A machine that was put out is looked at by somebody within a month, or gone.
const PUT_OUT_MS: u64 = 30 * 24 * 3_600_000;
/// As many as the kernel's table of endpoints has places; those whose time is over first go first.
const FORMER_MAX: usize = 65_536;

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

    /// Every address that the mesh knows somebody at, of peers too, or knew a while ago. Of IPv4 alone: no way out is of IPv6.
    pub(crate) fn meshed_addresses(&self) -> BTreeSet<Ipv4Addr> {
        let endpoints = self.endpoints.iter().filter_map(|((_, address), _)| address.v4());
        let services = self.services().filter_map(|(_, row)| row.object.address.v4());
        endpoints.chain(services).chain(self.former.iter().map(|(address, _)| *address)).collect()
    }

    /// The same, and those of nodes: whoever is there is of the mesh, and comes as who it is or not at all. (Egress may be to a node.)
    pub(crate) fn claimed_addresses(&self) -> BTreeSet<Ipv4Addr> {
        let nodes = self.node_addresses.iter().map(|(_, row)| row.address);
        self.meshed_addresses().into_iter().chain(nodes).collect()
    }

    /// Until when an address that somebody of the mesh left is not outside of it; none where nobody has left it. Whoever is
    /// there again is told by endpoints, not by this.
    pub fn left_until(&self, address: Ipv4Addr) -> Option<Stamp> {
        self.former.get(&address).copied()
    }

    /// Addresses whose time is over are outside; whether there was one.
    pub(crate) fn forget_left(&mut self, now: Stamp) -> bool {
        let before = self.former.len();
        self.former.prune(&mut self.journal, |_, until| *until <= now);
        self.former.len() != before
    }

    /// Somebody left these addresses, and nobody may be behind them; or somebody who was put out, and is still there: then what
    /// went to them in a tunnel must not go in clear for that.
    pub(crate) fn leave(&mut self, now: Stamp, addresses: impl IntoIterator<Item = Address>, put_out: bool) {
        let until = now.plus_ms(if put_out { PUT_OUT_MS } else { LEFT_MS });
        for address in addresses.into_iter().filter_map(Address::v4) {
            let until = self.former.get(&address).map_or(until, |known| until.max(*known));
            self.former.put(&mut self.journal, address, until);
        }
        let surplus = self.former.len().saturating_sub(FORMER_MAX);
        if surplus > 0 {
            let mut soonest: Vec<(Stamp, Ipv4Addr)> =
                self.former.iter().map(|(address, until)| (*until, *address)).collect();
            soonest.sort_unstable();
            for (_, address) in soonest.into_iter().take(surplus) {
                self.former.remove(&mut self.journal, &address);
            }
        }
    }
}

/// Documents that let one of these identities, which are in order, connect somewhere.
pub(crate) fn concerning<'a>(all: &'a [Egress], local: &'a [SpiffeId]) -> impl Iterator<Item = &'a Egress> {
    let here =
        |egress: &&Egress| egress.from.iter().any(|set| crate::slicing::within(local, |id| id, set).next().is_some());
    all.iter().filter(here)
}

/// Where these documents let connect to.
pub(crate) fn ranges(documents: &[Egress]) -> BTreeSet<Cidr> {
    documents.iter().flat_map(|egress| egress.to.iter().copied()).collect()
}

/// From where policies let callers in to one of these identities, which are in order, without one of their own.
pub(crate) fn callers<'a>(
    policies: impl IntoIterator<Item = (&'a TrustDomain, &'a Policy)>,
    local: &[SpiffeId],
) -> BTreeSet<Cidr> {
    let lets_in = |policy: &Policy| {
        !policy.extras.unmeshed.is_empty()
            && policy.action == Action::Allow
            && crate::slicing::within(local, |id| id, &policy.target).next().is_some()
    };
    let all = policies.into_iter().filter(|(_, policy)| lets_in(policy));
    all.flat_map(|(_, policy)| policy.extras.unmeshed.iter().copied()).collect()
}

/// Of these addresses those that lie in one of the ranges, in order. A node is told them with the documents that name the ranges:
/// what the mesh knows is never taken for what is outside, also where no workload of the node has to do with it.
pub(crate) fn inside(addresses: &BTreeSet<Ipv4Addr>, ranges: BTreeSet<Cidr>) -> Vec<Ipv4Addr> {
    let mut found = BTreeSet::new();
    for (first, bits) in ranges.iter().filter_map(Cidr::v4) {
        let last = Ipv4Addr::from_bits(first.to_bits() | u32::MAX.checked_shr(u32::from(bits)).unwrap_or(0));
        found.extend(addresses.range((Bound::Included(first), Bound::Included(last))).copied());
    }
    found.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_outside_once_its_time_is_over_and_there_is_room_for_the_newest() {
        let mut s = State::new();
        let (now, at) = (Stamp(1_000_000), |n: u32| Ipv4Addr::from_bits(0x0a00_0000 + n));
        let left = |s: &State| s.meshed_addresses().len();
        s.leave(now, [at(1).into()], false);
        s.leave(now, [at(2).into()], true);
        // Put out, and gone after: it stays as long as it would have.
        s.leave(now, [at(2).into()], false);
        assert!(!s.forget_left(now.plus_ms(LEFT_MS - 1)));
        assert_eq!((left(&s), s.left_until(at(1))), (2, Some(now.plus_ms(LEFT_MS))));
        assert!(s.forget_left(now.plus_ms(LEFT_MS)));
        assert_eq!(s.meshed_addresses().into_iter().collect::<Vec<_>>(), [at(2)]);
        let max = u32::try_from(FORMER_MAX).unwrap();
        s.leave(now.plus_ms(LEFT_MS), (10..10 + max).map(|n| at(n).into()), false);
        assert_eq!(left(&s), FORMER_MAX);
        assert!(s.meshed_addresses().contains(&at(2)), "what would be over first goes first");
        assert!(s.forget_left(now.plus_ms(PUT_OUT_MS)));
        assert_eq!(left(&s), 0);
    }
}
