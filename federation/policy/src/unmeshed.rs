//! What a change of policies changes for callers outside of the mesh: ranges of addresses, and the workloads that they may call.

use crate::egress::Prefix;
use crate::flips::{PAIRS_MAX, changed, known_in};
use crate::ports::PortSet;
use crate::set::PolicySet;
use ambit_model::policy::Cidr;
use ambit_model::{Moment, SpiffeId, Stamp};
use std::collections::BTreeSet;

/// One range and one workload whose ports a change opens or closes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct UnmeshedFlip {
    /// The range.
    pub range: Prefix,
    /// The target.
    pub destination: SpiffeId,
    /// Ports that would be denied without the change and are open.
    pub opened: PortSet,
    /// Ports that would be open without the change and are denied.
    pub closed: PortSet,
    /// From when on: none where at once, else when a policy that speaks of the range ends.
    pub at: Option<Stamp>,
}

/// What a change does, over the ranges and targets that policies name which change.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UnmeshedFlips {
    /// Ranges and targets whose ports change, each once.
    pub pairs: Vec<UnmeshedFlip>,
    /// How many were compared.
    pub compared: usize,
    /// There were more than [`PAIRS_MAX`]: `pairs` is not all.
    pub cut_short: bool,
}

/// As [`crate::flips`], of ranges and known targets.
pub fn unmeshed_flips(before: &PolicySet, after: &PolicySet, known: &BTreeSet<SpiffeId>, now: Moment) -> UnmeshedFlips {
    let changed: Vec<_> = changed(before, after).into_iter().filter(|p| !p.extras.unmeshed.is_empty()).collect();
    let mut found = UnmeshedFlips::default();
    if changed.is_empty() {
        return found;
    }
    let (before, after) = (before.compile(), after.compile());
    let (mut seen, mut looked) = (BTreeSet::new(), 0);
    for policy in changed {
        for destination in known_in(known, &policy.target, policy.action) {
            for range in policy.extras.unmeshed.iter().filter_map(Cidr::v4) {
                if looked >= PAIRS_MAX {
                    found.cut_short = true;
                    found.pairs.sort();
                    return found;
                }
                if !seen.insert((range, destination)) {
                    continue;
                }
                found.compared += 1;
                let ends = |index: &crate::Index| index.ends_between_unmeshed(range, destination, now);
                let ends: BTreeSet<Stamp> = ends(&before).into_iter().chain(ends(&after)).collect();
                let moments = std::iter::once((None, now)).chain(ends.into_iter().map(|at| (Some(at), Moment::at(at))));
                for (at, moment) in moments {
                    looked += 1;
                    let ports = |index: &crate::Index| index.ports_unmeshed(range, destination, moment);
                    let (was, is) = (ports(&before), ports(&after));
                    if was != is {
                        let (opened, closed) = (is.without(&was), was.without(&is));
                        let destination = destination.clone();
                        found.pairs.push(UnmeshedFlip { range, destination, opened, closed, at });
                        break;
                    }
                }
            }
        }
    }
    found.pairs.sort();
    found
}
