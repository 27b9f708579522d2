//! Where connections to services go: what is asked, and what counts of what everybody says.
//!
//! A cell's word about its own clusters and services is for everybody: peers import it. Its word about those of others is for
//! its own callers only, whom it can so lead away from a cell that is gone; and there it counts before the other's.

use crate::state::{OwnedName, State};
use ambit_model::policy::Endpoint;
use ambit_model::routing::{ClusterTraits, Place, Routing, ServiceName, Steer, Traits};
use ambit_model::{ClusterId, ObjectName, TrustDomain};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Who says it of which cluster.
pub type TraitsKey = (TrustDomain, Place);
/// Who says it, of which service, and where its calls would go.
pub type SteerKey = (TrustDomain, ServiceName, Place);

/// What an operator says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouteChange {
    /// What.
    pub route: Route,
    /// Who.
    pub by: String,
    /// Why, in a few words.
    pub note: String,
}

/// See [`RouteChange`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Route {
    /// Where a cluster of this cell is; none: nothing is said.
    Region(ClusterId, Option<ObjectName>),
    /// Whether a cluster, of this cell or of a peer, gets no new connections.
    Drain(ClusterId, bool),
    /// Calls that would go to one cluster go to another.
    FailOver {
        /// Of these.
        services: Services,
        /// From there.
        from: ClusterId,
        /// To there.
        to: ClusterId,
    },
    /// Ends it.
    FailBack {
        /// Of these.
        services: Services,
        /// Where calls went first.
        from: ClusterId,
    },
}

/// Of which services.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Services {
    /// Of which it can be said now; not of those that come later.
    All,
    /// Of these, all or none.
    These(Vec<OwnedName>),
}

/// The cluster that runs it.
pub(crate) fn place_of(endpoint: &Endpoint) -> Place {
    (endpoint.spiffe_id.trust_domain(), endpoint.cluster.clone())
}

impl State {
    /// The cluster of this name, and whose it is: this cell's, or the peer's that claimed the name first.
    pub fn place(&self, cluster: &ClusterId) -> Option<Place> {
        let own = self.clusters.contains(cluster).then(|| self.cell().map(|cell| cell.trust_domain.clone()));
        let owner = own.flatten().or_else(|| self.foreign_clusters.get(cluster).map(|row| row.origin.clone()))?;
        Some((owner, cluster.clone()))
    }

    /// What `says` says of a cluster.
    pub fn traits_by(&self, says: &TrustDomain, place: &Place) -> Option<&ClusterTraits> {
        self.traits.get(&(says.clone(), place.clone())).map(|row| row.get())
    }

    /// What everybody says of which cluster stands in for which, those that were taken back too.
    pub fn steers(&self) -> impl Iterator<Item = (&SteerKey, &Steer)> {
        self.steers.iter().map(|(key, row)| (key, row.get()))
    }

    /// What counts.
    pub fn routing(&self) -> Routing {
        let Some(own) = self.cell().map(|cell| &cell.trust_domain) else { return Routing::default() };
        let mut clusters: BTreeMap<Place, Traits> = BTreeMap::new();
        for ((says, place), row) in self.traits.iter() {
            // Whose name it is decides: what was said of a former holder of the name says nothing of this one.
            if self.place(&place.1).as_ref() != Some(place) || (says != own && *says != place.0) {
                continue;
            }
            let known = clusters.entry(place.clone()).or_default();
            known.drained |= row.get().drained;
            if *says == place.0 {
                known.region.clone_from(&row.get().region);
            }
        }
        clusters.retain(|_, traits| *traits != Traits::default());
        Routing { clusters, steers: self.steers_in_force(own) }
    }

    /// The own word first. Of another's nothing is taken that would lead calls round: two operators, cut from each other, may
    /// have sent them in opposite directions.
    fn steers_in_force(&self, own: &TrustDomain) -> BTreeMap<(ServiceName, Place), Place> {
        let in_force = || self.steers.iter().filter_map(|(key, row)| Some((key, row.get().to.as_ref()?)));
        let said_here = in_force().filter(|((says, ..), _)| says == own);
        let mut steers: BTreeMap<(ServiceName, Place), Place> =
            said_here.map(|((_, service, from), to)| ((service.clone(), from.clone()), to.clone())).collect();
        for ((says, service, from), to) in in_force() {
            let key = (service.clone(), from.clone());
            let is_theirs = says != own && *says == service.0;
            if is_theirs && !steers.contains_key(&key) && !leads_back(&steers, service, from, to) {
                steers.insert(key, to.clone());
            }
        }
        steers
    }
}

/// Whether calls that go from `from` to `to` come back to `from`.
fn leads_back(steers: &BTreeMap<(ServiceName, Place), Place>, service: &ServiceName, from: &Place, to: &Place) -> bool {
    let next = |at: &&Place| steers.get(&(service.clone(), (*at).clone()));
    std::iter::successors(Some(to), next).take(steers.len() + 2).any(|at| at == from)
}
