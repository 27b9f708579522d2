//! Which endpoint a connection to a service goes to. Pure: health and chance are arguments.
//!
//! Endpoints of a nearer level are used before any of the next: the caller's own cluster, then its region, then elsewhere;
//! or, where the service says so, its first backend before the others. A level is lost where none of it is healthy. Where more
//! than half of it is avoided, all of it is used again: a verdict about so many is more likely wrong than right, and the rest
//! would take the load of all. Where every level is lost, all of them are used.

use crate::view::View;
use ambit_ebpf::MAX_SERVICE_ENDPOINTS;
use ambit_model::policy::{Endpoint, Order, Service};
use ambit_model::routing::Place;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

/// How far away an endpoint is; the lower is used first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Level {
    /// 0 of the first backend where that comes first; else 0 of all.
    rank: u8,
    /// See [`Distance`].
    pub distance: Distance,
}

impl Level {
    /// Of all levels nearest.
    pub const NEAREST: Level = Level { rank: 0, distance: Distance::Cluster };

    /// Whether connections go there before all others, as the service orders them.
    pub fn is_first(self, order: Order) -> bool {
        match order {
            Order::LocalFirst => self == Self::NEAREST,
            Order::FirstBackend => self.rank == 0,
        }
    }
}

/// Between two clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Distance {
    /// The same one.
    Cluster,
    /// Of one region.
    Region,
    /// Any other.
    Remote,
}

impl Distance {
    /// A label for figures.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Cluster => "cluster",
            Self::Region => "region",
            Self::Remote => "remote",
        }
    }
}

/// An endpoint to which connections may go.
#[derive(Clone, Copy, Debug)]
pub struct Candidate<'a> {
    /// Itself.
    pub endpoint: &'a Endpoint,
    /// How far it is, as operators steer calls now.
    pub level: Level,
    /// The first backend that it is of.
    backend: usize,
}

/// The cluster that runs it.
fn place_of(endpoint: &Endpoint) -> Place {
    (endpoint.spiffe_id.trust_domain(), endpoint.cluster.clone())
}

/// How far a cluster is from this node's. Names are not unique over cells: a peer's cluster of the same name is not near.
pub fn distance(view: &View, place: &Place) -> Distance {
    if place.0 == view.trust_domain && place.1 == view.cluster {
        return Distance::Cluster;
    }
    let region = |place: &Place| view.routing.clusters.get(place).and_then(|traits| traits.region.as_ref());
    let own = region(&(view.trust_domain.clone(), view.cluster.clone()));
    if own.is_some() && own == region(place) { Distance::Region } else { Distance::Remote }
}

/// Those of `endpoints` that connections to the service may go to: none of a drained cluster, of a backend of weight 0, or of
/// a cluster for which another stands in.
pub fn candidates<'a>(
    view: &View,
    service: &Service,
    endpoints: impl IntoIterator<Item = &'a Endpoint>,
) -> Vec<Candidate<'a>> {
    let steers = steers(view, service);
    let mut found = Vec::new();
    // Of the clusters that others stand in for, how near they would be.
    let mut vacant: BTreeMap<&Place, Level> = BTreeMap::new();
    for endpoint in endpoints {
        let Some(backend) = service.backends.iter().position(|set| set.contains(&endpoint.spiffe_id)) else { continue };
        let place = place_of(endpoint);
        let rank = u8::from(service.order == Order::FirstBackend && backend > 0);
        let level = Level { rank, distance: distance(view, &place) };
        if let Some((from, _)) = steers.get_key_value(&place) {
            let nearest = vacant.entry(from).or_insert(level);
            *nearest = level.min(*nearest);
            continue;
        }
        let drained = view.routing.clusters.get(&place).is_some_and(|traits| traits.drained);
        if !drained && service.weights.get(backend) != Some(&0) {
            found.push((Candidate { endpoint, level, backend }, place));
        }
    }
    for (from, to) in &steers {
        // Of a cluster of which nothing is left nobody can tell any more, but how far it is.
        let level = vacant.get(from).copied().unwrap_or(Level { rank: 0, distance: distance(view, from) });
        for (candidate, _) in found.iter_mut().filter(|(_, place)| place == to) {
            candidate.level = candidate.level.min(level);
        }
    }
    found.into_iter().map(|(candidate, _)| candidate).collect()
}

/// Which clusters stand in for which, of this service.
fn steers(view: &View, service: &Service) -> BTreeMap<Place, Place> {
    if view.routing.steers.is_empty() {
        return BTreeMap::new();
    }
    let Some(origin) = view.origins.get(&(service.address, service.port)) else { return BTreeMap::new() };
    let name = (origin.clone(), service.name.clone());
    let of_it = view.routing.steers.iter().filter(|((service, _), _)| *service == name);
    of_it.map(|((_, from), to)| (from.clone(), to.clone())).collect()
}

/// Why an endpoint is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Why {
    /// It is healthy.
    Healthy,
    /// More than half of its level is avoided.
    Panic,
    /// Everything is avoided.
    LastResort,
}

impl Why {
    /// A label for figures.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Healthy => "healthy",
            Self::Panic => "panic",
            Self::LastResort => "last_resort",
        }
    }
}

/// Levels that are used now, nearest first: each with those of it that are.
pub fn levels<'a>(
    candidates: &[Candidate<'a>],
    is_avoided: impl Fn(&Endpoint) -> bool,
) -> Vec<(Why, Vec<Candidate<'a>>)> {
    let mut by_level: BTreeMap<Level, Vec<Candidate<'a>>> = BTreeMap::new();
    for candidate in candidates {
        by_level.entry(candidate.level).or_default().push(*candidate);
    }
    let used = |all: &Vec<Candidate<'a>>| {
        let healthy: Vec<_> = all.iter().filter(|one| !is_avoided(one.endpoint)).copied().collect();
        match healthy.len() {
            0 => None,
            left if left * 2 < all.len() => Some((Why::Panic, all.clone())),
            _ => Some((Why::Healthy, healthy)),
        }
    };
    let in_use: Vec<_> = by_level.values().filter_map(used).collect();
    if !in_use.is_empty() {
        return in_use;
    }
    by_level.into_values().map(|all| (Why::LastResort, all)).collect()
}

/// Addresses that the kernel may choose: it asks only whether a connection is allowed at all, and the agent chooses again.
pub fn choosable(candidates: &[Candidate<'_>], is_avoided: impl Fn(&Endpoint) -> bool) -> BTreeSet<IpAddr> {
    let used = levels(candidates, is_avoided);
    used.iter().flat_map(|(_, all)| all).map(|one| one.endpoint.address.ip()).collect()
}

/// Endpoints in the order in which one connection tries them, `most` of them. `draw` draws a number below its argument, which
/// is never 0. Where nothing is weighted, `first`, which the kernel chose, comes first if it is of the nearest level.
pub fn order<'a>(
    service: &Service,
    levels: Vec<(Why, Vec<Candidate<'a>>)>,
    first: Option<IpAddr>,
    most: usize,
    mut draw: impl FnMut(u64) -> u64,
) -> Vec<(Why, Candidate<'a>)> {
    let mut out = Vec::new();
    for (nth, (why, mut left)) in levels.into_iter().enumerate() {
        let is_first = |one: &Candidate<'_>| Some(one.endpoint.address.ip()) == first;
        // Of more than the kernel holds it would choose the same few.
        let as_kernel = nth == 0 && service.weights.is_empty() && left.len() <= MAX_SERVICE_ENDPOINTS;
        if as_kernel && let Some(at) = left.iter().position(is_first) {
            out.push((why, left.swap_remove(at)));
        }
        while !left.is_empty() && out.len() < most {
            let at = drawn(service, &left, &mut draw);
            out.push((why, left.swap_remove(at)));
        }
    }
    out.truncate(most);
    out
}

/// A backend by its weight, of those that have an endpoint here, and one of its endpoints like any other; without weights one
/// endpoint like any other.
fn drawn(service: &Service, left: &[Candidate<'_>], draw: &mut impl FnMut(u64) -> u64) -> usize {
    let weight = |backend: usize| u64::from(service.weights.get(backend).copied().unwrap_or_default());
    let backends: BTreeSet<usize> = left.iter().map(|one| one.backend).collect();
    let all: u64 = backends.iter().map(|backend| weight(*backend)).sum();
    let mut chosen = None;
    if all > 0 {
        let mut at = draw(all);
        chosen = backends.into_iter().find(|backend| {
            let here = at < weight(*backend);
            at = at.saturating_sub(weight(*backend));
            here
        });
    }
    let of_it = || left.iter().enumerate().filter(|(_, one)| chosen.is_none_or(|backend| one.backend == backend));
    let count = u64::try_from(of_it().count()).unwrap_or(1).max(1);
    let nth = usize::try_from(draw(count)).unwrap_or_default();
    of_it().nth(nth).map_or(0, |(at, _)| at)
}

#[cfg(test)]
mod tests;
