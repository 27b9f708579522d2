//! Which nodes callers of local workloads may be on, and from where tunnels of these come.

use crate::state::State;
use ambit_model::policy::{Action, NodeAddress, Peers};
use ambit_model::{ClusterId, Entry, NodeId, Selector, SpiffeId, TrustDomain};
use ambit_policy::PolicySet;
use std::collections::{BTreeMap, BTreeSet};

/// What decides where an entry fits: entries that are alike in it fit the same nodes.
type Shape<'a> = (&'a ClusterId, &'a BTreeSet<NodeId>, Vec<&'a Selector>);

impl State {
    /// Of the own cell the nodes that may run an identity which `policies` let call one of `local`; of a peer all nodes,
    /// where they let one of its identities: which node runs which the peer does not say before a workload is there.
    pub(crate) fn callers(
        &self,
        local: &BTreeSet<SpiffeId>,
        policies: &PolicySet,
    ) -> BTreeMap<(TrustDomain, NodeId), NodeAddress> {
        let Some(own) = self.cell().map(|cell| &cell.trust_domain) else { return BTreeMap::new() };
        let allows = policies.iter().map(|(_, policy)| policy).filter(|policy| policy.action == Action::Allow);
        let allows = allows.filter(|policy| local.iter().any(|id| policy.target.contains(id)));
        let from: BTreeSet<&Peers> = allows.flat_map(|policy| &policy.from).collect();
        let domains: BTreeSet<TrustDomain> = from.iter().map(|set| set.trust_domain()).collect();
        let ours = self.nodes_that_may_run(own, &from);
        let theirs = domains.iter().filter(|td| *td != own).flat_map(|td| self.addresses_of(td));
        let ours = self.addresses_of(own).filter(|((_, node), _)| ours.contains(node));
        ours.chain(theirs).map(|(key, row)| (key.clone(), *row)).collect()
    }

    pub(crate) fn addresses_of(
        &self,
        td: &TrustDomain,
    ) -> impl Iterator<Item = (&(TrustDomain, NodeId), &NodeAddress)> {
        let of = td.clone();
        self.node_addresses.from((td.clone(), NodeId([0; 32]))).take_while(move |((origin, _), _)| *origin == of)
    }

    /// Nodes with an address that may run an identity of one of these sets.
    fn nodes_that_may_run(&self, own: &TrustDomain, sets: &BTreeSet<&Peers>) -> BTreeSet<NodeId> {
        let (mut on, mut seen) = (BTreeSet::new(), BTreeSet::<Shape<'_>>::new());
        let entries = sets.iter().flat_map(|set| self.entries_in(set)).filter(|entry| self.is_given(entry));
        for entry in entries {
            if !seen.insert((&entry.cluster, &entry.nodes, entry.node_selectors().collect())) {
                continue;
            }
            match named_by(entry) {
                Some(named) => on.extend(named.into_iter().filter(|node| self.fits(entry, node))),
                None => on.extend(self.addresses_of(own).map(|((_, n), _)| *n).filter(|node| self.fits(entry, node))),
            }
        }
        on
    }

    fn entries_in<'a>(&'a self, set: &'a Peers) -> Box<dyn Iterator<Item = &'a Entry> + 'a> {
        match set {
            Peers::Id(id) => Box::new(self.entries_of(id).map(|row| &row.entry)),
            Peers::Ids(_, ids) => Box::new(ids.iter().flat_map(|id| self.entries_of(id)).map(|row| &row.entry)),
            // Those that were not resolved allow nobody.
            Peers::Cluster(..) | Peers::Group(..) | Peers::Labelled(..) => Box::new(std::iter::empty()),
            Peers::Below(..) | Peers::Domain(_) => {
                let ids = self.giving.keys().filter(|id| set.contains(id));
                Box::new(ids.flat_map(|id| self.entries_of(id)).map(|row| &row.entry))
            }
        }
    }
}

/// The nodes that an entry names one by one: a walk over all nodes for each entry of one node would be long.
pub(crate) fn named_by(entry: &Entry) -> Option<BTreeSet<NodeId>> {
    let one = entry.node_selectors().find_map(|selector| match selector {
        Selector::TpmEkHash(node) => Some(BTreeSet::from([*node])),
        _ => None,
    });
    one.or_else(|| (!entry.nodes.is_empty()).then(|| entry.nodes.clone()))
}
