//! All policies that can decide now, and which of them concern an identity.

use crate::state::State;
use ambit_model::policy::{Action, Egress, Peers, Policy};
use ambit_model::{Moment, SpiffeId, TrustDomain};
use std::collections::{BTreeSet, HashMap};

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Rules {
    /// In the order of origin and name.
    all: Vec<(TrustDomain, Policy)>,
    /// By what an identity shows of belonging to a set: numbers of policies that have it as target or caller.
    named: HashMap<SpiffeId, Vec<u32>>,
    prefixes: HashMap<String, Vec<u32>>,
    /// Those with a set that nobody could resolve, and that narrow: they mean all of its trust domain.
    unresolved: Vec<(TrustDomain, u32)>,
    /// All egress documents that allow somebody something now, by name.
    egress: Vec<Egress>,
    has_named: bool,
}

impl Rules {
    pub(super) fn of(s: &State, now: Moment) -> Rules {
        let named = |policy: &Policy| policy.from.iter().chain([&policy.target]).any(Peers::is_named);
        let mut rules = Rules {
            all: s.policy_set().into_in_force(now),
            egress: s.resolved_egress(None),
            has_named: s.policies().any(|(_, row)| named(&row.object))
                || s.egress().any(|(_, row)| row.object.from.iter().any(Peers::is_named)),
            ..Rules::default()
        };
        for (number, (_, policy)) in (0..).zip(&rules.all) {
            for set in policy.from.iter().chain([&policy.target]) {
                match set {
                    Peers::Id(id) => rules.named.entry(id.clone()).or_default().push(number),
                    Peers::Ids(_, ids) => {
                        let of_its_own = ids.iter().filter(|id| set.contains(id));
                        of_its_own.for_each(|id| rules.named.entry(id.clone()).or_default().push(number));
                    }
                    Peers::Below(td, path) => {
                        rules.prefixes.entry(format!("spiffe://{td}{path}")).or_default().push(number);
                    }
                    Peers::Domain(td) => rules.prefixes.entry(format!("spiffe://{td}/")).or_default().push(number),
                    Peers::Cluster(td, _) | Peers::Group(td, _) | Peers::Labelled(td, _) => {
                        if policy.action != Action::Allow {
                            rules.unresolved.push((td.clone(), number));
                        }
                    }
                }
            }
        }
        rules
    }

    /// Whether a policy speaks of a set by its name.
    pub(super) fn has_named(&self) -> bool {
        self.has_named
    }

    /// Egress documents that speak of one of these identities, which are in order.
    pub(super) fn egress(&self, local: &[SpiffeId]) -> Vec<Egress> {
        crate::egress::concerning(&self.egress, local).cloned().collect()
    }

    /// As [`ambit_policy::concerns`], of identities in order, without a walk over policies.
    pub(super) fn concerning(&self, local: &[SpiffeId]) -> Vec<(TrustDomain, Policy)> {
        let mut numbers = BTreeSet::<u32>::new();
        for id in local {
            numbers.extend(self.named.get(id).into_iter().flatten());
            let text = id.as_str();
            let slashes = text.char_indices().skip("spiffe://".len()).filter(|(_, c)| *c == '/');
            for (at, _) in slashes {
                numbers.extend(text.get(..=at).and_then(|prefix| self.prefixes.get(prefix)).into_iter().flatten());
            }
        }
        let domains: BTreeSet<TrustDomain> = local.iter().map(SpiffeId::trust_domain).collect();
        numbers.extend(self.unresolved.iter().filter(|(td, _)| domains.contains(td)).map(|(_, number)| number));
        numbers.into_iter().filter_map(|number| self.all.get(usize::try_from(number).ok()?)).cloned().collect()
    }
}
