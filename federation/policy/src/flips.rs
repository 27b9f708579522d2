//! What a change of policies changes: pairs of known identities whose ports are others after it.

use crate::ports::PortSet;
use crate::set::{PolicySet, has_caller, is_target};
use ambit_model::policy::Policy;
use ambit_model::{Moment, SpiffeId};
use std::collections::BTreeSet;

/// Pairs that are compared: more take seconds, and nobody reads what they give.
pub const PAIRS_MAX: usize = 500_000;

/// One pair whose connections a change opens or closes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Flip {
    /// The caller.
    pub source: SpiffeId,
    /// The target.
    pub destination: SpiffeId,
    /// Ports that were denied and are allowed.
    pub opened: PortSet,
    /// Ports that were allowed and are denied.
    pub closed: PortSet,
}

/// What a change does to pairs of known identities.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Flips {
    /// Pairs whose ports change, by caller and target.
    pub pairs: Vec<Flip>,
    /// Pairs that were compared: those of which a policy that changes speaks.
    pub compared: usize,
    /// There were more than [`PAIRS_MAX`]: `pairs` is not all.
    pub cut_short: bool,
}

/// Compares what two sets allow, over the pairs of `known` identities of which a policy speaks that is not the same in both,
/// as it was or as it is to be. Other pairs are not touched by the change.
pub fn flips(before: &PolicySet, after: &PolicySet, known: &BTreeSet<SpiffeId>, now: Moment) -> Flips {
    let changed = changed(before, after);
    let (before, after) = (before.compile(), after.compile());
    let mut found = Flips::default();
    let mut seen = BTreeSet::new();
    for policy in &changed {
        let callers: Vec<_> = known.iter().filter(|id| has_caller(policy, id)).collect();
        for destination in known.iter().filter(|id| is_target(policy, id)) {
            for source in &callers {
                if found.compared >= PAIRS_MAX {
                    found.cut_short = true;
                    found.pairs.sort();
                    return found;
                }
                if !seen.insert((*source, destination)) {
                    continue;
                }
                found.compared += 1;
                let (was, is) = (before.ports(source, destination, now), after.ports(source, destination, now));
                if was != is {
                    let (opened, closed) = (is.without(&was), was.without(&is));
                    let (source, destination) = ((*source).clone(), destination.clone());
                    found.pairs.push(Flip { source, destination, opened, closed });
                }
            }
        }
    }
    found.pairs.sort();
    found
}

/// Policies of either set that are not the same in the other.
fn changed<'a>(before: &'a PolicySet, after: &'a PolicySet) -> Vec<&'a Policy> {
    let differs = |of: &'a PolicySet, other: &'a PolicySet| {
        of.iter()
            .filter(move |(origin, policy)| other.get(origin, &policy.name) != Some(policy))
            .map(|(_, policy)| policy)
    };
    differs(before, after).chain(differs(after, before)).collect()
}
