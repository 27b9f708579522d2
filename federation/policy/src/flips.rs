//! What a change of policies changes: pairs of known identities whose ports are others after it.

use crate::ports::PortSet;
use crate::set::PolicySet;
use ambit_model::policy::{Action, Peers, Policy};
use ambit_model::{Moment, SpiffeId, Stamp};
use std::collections::BTreeSet;

/// Comparisons of one pair at one moment: more take seconds, and nobody reads what they give.
pub const PAIRS_MAX: usize = 500_000;

/// One pair whose connections a change opens or closes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Flip {
    /// The caller.
    pub source: SpiffeId,
    /// The target.
    pub destination: SpiffeId,
    /// Ports that would be denied without the change and are allowed.
    pub opened: PortSet,
    /// Ports that would be allowed without the change and are denied.
    pub closed: PortSet,
    /// From when on: none where at once, else when a policy that speaks of the pair ends.
    pub at: Option<Stamp>,
}

/// What a change does to pairs of known identities.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Flips {
    /// Pairs whose ports change, each once, by caller and target.
    pub pairs: Vec<Flip>,
    /// Pairs that were compared: those of which a policy that changes speaks.
    pub compared: usize,
    /// There were more than [`PAIRS_MAX`]: `pairs` is not all.
    pub cut_short: bool,
}

impl Flips {
    /// Of how many pairs ports are opened, and of how many closed.
    pub fn counts(&self) -> (usize, usize) {
        let of = |pick: fn(&Flip) -> &PortSet| self.pairs.iter().filter(|flip| !pick(flip).is_empty()).count();
        (of(|flip| &flip.opened), of(|flip| &flip.closed))
    }
}

/// Compares what two sets allow, over the pairs of `known` identities of which a policy speaks that is not the same in both,
/// as it was or as it is to be. Other pairs are not touched by the change.
///
/// They are compared now and at the end of every policy that speaks of the pair: a change that makes one end soon, or that
/// takes away what would have stayed when another ends, flips connections as one that acts at once.
pub fn flips(before: &PolicySet, after: &PolicySet, known: &BTreeSet<SpiffeId>, now: Moment) -> Flips {
    let changed = changed(before, after);
    let (before, after) = (before.compile(), after.compile());
    let mut found = Flips::default();
    let (mut seen, mut looked) = (BTreeSet::new(), 0);
    for policy in &changed {
        let callers: BTreeSet<_> = policy.from.iter().flat_map(|set| known_in(known, set, policy.action)).collect();
        for destination in known_in(known, &policy.target, policy.action) {
            for source in &callers {
                if looked >= PAIRS_MAX {
                    found.cut_short = true;
                    found.pairs.sort();
                    return found;
                }
                if !seen.insert((*source, destination)) {
                    continue;
                }
                found.compared += 1;
                let ends = |index: &crate::Index| index.ends_between(source, destination, now);
                let ends: BTreeSet<Stamp> = ends(&before).into_iter().chain(ends(&after)).collect();
                let moments = std::iter::once((None, now)).chain(ends.into_iter().map(|at| (Some(at), Moment::at(at))));
                for (at, moment) in moments {
                    looked += 1;
                    let ports = |index: &crate::Index| index.ports(source, destination, moment);
                    let (was, is) = (ports(&before), ports(&after));
                    if was != is {
                        let (opened, closed) = (is.without(&was), was.without(&is));
                        let (source, destination) = ((*source).clone(), destination.clone());
                        found.pairs.push(Flip { source, destination, opened, closed, at });
                        break;
                    }
                }
            }
        }
    }
    found.pairs.sort();
    found
}

/// Those of `known` that a policy of this action means by the set, without a walk over all of them.
pub fn known_in<'a>(
    known: &'a BTreeSet<SpiffeId>,
    set: &Peers,
    action: Action,
) -> Box<dyn Iterator<Item = &'a SpiffeId> + 'a> {
    match set {
        Peers::Id(id) => Box::new(known.get(id).into_iter()),
        Peers::Ids(_, ids) => {
            let found: Vec<_> = ids.iter().filter(|id| set.contains(id)).filter_map(|id| known.get(id)).collect();
            Box::new(found.into_iter())
        }
        Peers::Below(td, path) => below(known, format!("spiffe://{td}{path}")),
        Peers::Domain(td) => below(known, format!("spiffe://{td}/")),
        Peers::Cluster(..) | Peers::Group(..) | Peers::Labelled(..) if action == Action::Allow => {
            Box::new(std::iter::empty())
        }
        Peers::Cluster(td, _) | Peers::Group(td, _) | Peers::Labelled(td, _) => below(known, format!("spiffe://{td}/")),
    }
}

fn below<'a>(known: &'a BTreeSet<SpiffeId>, prefix: String) -> Box<dyn Iterator<Item = &'a SpiffeId> + 'a> {
    // No segment of a path begins with anything less than a dash.
    match format!("{prefix}-").parse::<SpiffeId>() {
        Ok(first) => Box::new(known.range(first..).take_while(move |id| id.as_str().starts_with(&prefix))),
        Err(_) => Box::new(std::iter::empty()),
    }
}

/// Policies of either set that are not the same in the other.
pub(crate) fn changed<'a>(before: &'a PolicySet, after: &'a PolicySet) -> Vec<&'a Policy> {
    let differs = |of: &'a PolicySet, other: &'a PolicySet| {
        of.iter()
            .filter(move |(origin, policy)| other.get(origin, &policy.name) != Some(policy))
            .map(|(_, policy)| policy)
    };
    differs(before, after).chain(differs(after, before)).collect()
}
