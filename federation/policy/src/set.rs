//! All policies that a cell knows, and the verdict they give.

use crate::owner::speaks_for;
use ambit_model::policy::{Action, Peers, Policy, Protocol, closed_at};
use ambit_model::{Moment, ObjectName, SpiffeId, TrustDomain};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

/// Which policy: its origin and its name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct RuleRef {
    /// The trust domain whose cell wrote it.
    pub origin: TrustDomain,
    /// Its name, unique within the origin.
    pub name: ObjectName,
}

impl fmt::Display for RuleRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.origin, self.name)
    }
}

/// Why a verdict is what it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reason {
    /// An allow policy of the target's trust domain matches and no deny policy does.
    Allowed,
    /// A deny policy matches; it wins over every allow.
    Denied,
    /// No allow policy of the target's trust domain matches: deny by default.
    NoAllow,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Allowed => "allowed by policy",
            Self::Denied => "denied by policy",
            Self::NoAllow => "denied by default: no policy allows it",
        })
    }
}

/// The answer for one connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Whether the connection may pass.
    pub allowed: bool,
    /// The policy that decided; none where the default did.
    pub rule: Option<RuleRef>,
    /// Why.
    pub reason: Reason,
    /// Where it is allowed: the first audit policy that would refuse it, were it a deny. It is to be recorded.
    pub audited: Option<RuleRef>,
}

/// A policy that names trust domains which nobody known vouches for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Unresolved {
    /// The policy.
    pub rule: RuleRef,
    /// The trust domains that are not known; never empty.
    pub trust_domains: BTreeSet<TrustDomain>,
}

/// Policies by origin and name, together with the trust domains that are known (the own one and those of peers).
///
/// An *allow* policy that names an unknown trust domain matches nothing until the peer is registered. A *deny*
/// policy keeps denying the callers it names: losing a peer must never open a door.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PolicySet {
    policies: BTreeMap<(TrustDomain, ObjectName), Policy>,
    known: BTreeSet<TrustDomain>,
}

impl PolicySet {
    /// An empty set. `known`: the own trust domain and those of the peers; on a node, those it has bundles of.
    pub fn new(known: BTreeSet<TrustDomain>) -> Self {
        Self { policies: BTreeMap::new(), known }
    }
    /// Replaces the known trust domains, after a peer was registered or removed.
    pub fn set_known(&mut self, known: BTreeSet<TrustDomain>) {
        self.known = known;
    }
    /// The known trust domains.
    pub fn known(&self) -> &BTreeSet<TrustDomain> {
        &self.known
    }
    /// Adds or replaces a policy of `origin`; returns the one replaced. Call [`crate::check_owner`] first: a policy
    /// that `origin` may not write is kept but decides nothing.
    pub fn insert(&mut self, origin: TrustDomain, policy: Policy) -> Option<Policy> {
        self.policies.insert((origin, policy.name.clone()), policy)
    }
    /// Removes a policy and returns it.
    pub fn remove(&mut self, origin: &TrustDomain, name: &ObjectName) -> Option<Policy> {
        self.policies.remove(&(origin.clone(), name.clone()))
    }
    /// Removes every policy of `origin`, after its peer was removed.
    pub fn remove_origin(&mut self, origin: &TrustDomain) {
        self.policies.retain(|(from, _), _| from != origin);
    }
    /// The policy of that origin and name.
    pub fn get(&self, origin: &TrustDomain, name: &ObjectName) -> Option<&Policy> {
        self.policies.get(&(origin.clone(), name.clone()))
    }
    /// All policies with their origins, in the order of origin and name.
    pub fn iter(&self) -> impl Iterator<Item = (&TrustDomain, &Policy)> {
        self.policies.iter().map(|((origin, _), policy)| (origin, policy))
    }
    /// How many policies there are.
    pub fn len(&self) -> usize {
        self.policies.len()
    }
    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.policies.is_empty()
    }

    /// Whether `src` may connect to the TCP `port` of `dst`: deny wins; then an allow of the target's own trust domain;
    /// else deny. Of several policies that decide alike, the first by origin and name is named.
    pub fn evaluate(&self, src: &SpiffeId, dst: &SpiffeId, port: u16, now: Moment) -> Verdict {
        self.evaluate_over(Protocol::Tcp, src, dst, port, now)
    }

    /// The same of any protocol.
    pub fn evaluate_over(&self, protocol: Protocol, src: &SpiffeId, dst: &SpiffeId, port: u16, now: Moment) -> Verdict {
        self.decide(now, |p| speaks_of(p, src, dst) && has_port(p, protocol, port))
    }

    /// Whether who has no identity may connect from this address to the TCP `port` of `dst`. The caller makes sure that the mesh
    /// knows nobody at `from`: who is in the mesh comes as its identity or not at all.
    pub fn evaluate_unmeshed(&self, from: IpAddr, dst: &SpiffeId, port: u16, now: Moment) -> Verdict {
        self.decide(now, |p| {
            let named = closed_at(from).is_none() && p.extras.unmeshed.iter().any(|range| range.contains(from));
            named && is_target(p, dst) && has_port(p, Protocol::Tcp, port)
        })
    }

    fn decide(&self, now: Moment, matches: impl Fn(&Policy) -> bool) -> Verdict {
        let first = |action| {
            self.in_force(now).find(|(_, p)| p.action == action && matches(p)).map(|(origin, p)| rule_ref(origin, p))
        };
        if let Some(rule) = first(Action::Deny) {
            return Verdict { allowed: false, rule: Some(rule), reason: Reason::Denied, audited: None };
        }
        match first(Action::Allow) {
            Some(rule) => {
                let audited = first(Action::Audit);
                Verdict { allowed: true, rule: Some(rule), reason: Reason::Allowed, audited }
            }
            None => Verdict { allowed: false, rule: None, reason: Reason::NoAllow, audited: None },
        }
    }

    /// The policies in force that speak of TCP connections to `destination`, on this port or on any.
    pub fn speaking_of<'a>(
        &'a self,
        destination: &'a SpiffeId,
        port: Option<u16>,
        now: Moment,
    ) -> impl Iterator<Item = (&'a TrustDomain, &'a Policy)> + 'a {
        let of_port = move |policy: &Policy| match port {
            Some(port) => has_port(policy, Protocol::Tcp, port),
            None => policy.extras.protocols.contains(&Protocol::Tcp),
        };
        self.in_force(now).filter(move |(_, policy)| is_target(policy, destination) && of_port(policy))
    }

    /// Policies that name trust domains outside `known`. Pass [`PolicySet::known`] for those not in force now.
    pub fn unresolved(&self, known: &BTreeSet<TrustDomain>) -> Vec<Unresolved> {
        self.iter()
            .map(|(origin, policy)| Unresolved {
                rule: rule_ref(origin, policy),
                trust_domains: unknown_domains(policy, known),
            })
            .filter(|found| !found.trust_domains.is_empty())
            .collect()
    }

    /// What a node that runs `local` needs: every policy whose target or one of whose callers is local.
    ///
    /// For every connection from or to an identity of `local`, the slice gives the verdict of the whole set, at `now` and
    /// as long as nothing but time changes.
    #[must_use]
    pub fn slice(&self, local: &BTreeSet<SpiffeId>, now: Moment) -> PolicySet {
        let policies = self
            .in_force(now)
            .filter(|(_, policy)| concerns(policy, local))
            .map(|(origin, policy)| ((origin.clone(), policy.name.clone()), policy.clone()))
            .collect();
        PolicySet { policies, known: self.known.clone() }
    }

    /// Policies that can decide: written by one who may, not over, and, for an allow, with every trust domain known.
    pub(crate) fn in_force(&self, now: Moment) -> impl Iterator<Item = (&TrustDomain, &Policy)> {
        self.resolved().filter(move |(_, policy)| !policy.is_over(now))
    }

    /// The same, of a set that is not wanted any more.
    pub fn into_in_force(self, now: Moment) -> Vec<(TrustDomain, Policy)> {
        let Self { policies, known } = self;
        let decides = |origin: &TrustDomain, policy: &Policy| {
            speaks_for(origin, policy) && is_resolved(policy, &known) && !policy.is_over(now)
        };
        let owned = policies.into_iter().map(|((origin, _), policy)| (origin, policy));
        owned.filter(|(origin, policy)| decides(origin, policy)).collect()
    }

    /// The same, as far as time does not matter.
    pub(crate) fn resolved(&self) -> impl Iterator<Item = (&TrustDomain, &Policy)> {
        self.iter().filter(|(origin, policy)| speaks_for(origin, policy) && is_resolved(policy, &self.known))
    }
}

fn is_resolved(policy: &Policy, known: &BTreeSet<TrustDomain>) -> bool {
    policy.action != Action::Allow || named(policy).all(|td| known.contains(&td))
}

/// Whether a node that runs `local` needs the policy.
pub fn concerns(policy: &Policy, local: &BTreeSet<SpiffeId>) -> bool {
    local.iter().any(|id| is_target(policy, id) || has_caller(policy, id))
}

pub(crate) fn rule_ref(origin: &TrustDomain, policy: &Policy) -> RuleRef {
    RuleRef { origin: origin.clone(), name: policy.name.clone() }
}

pub(crate) fn speaks_of(policy: &Policy, src: &SpiffeId, dst: &SpiffeId) -> bool {
    is_target(policy, dst) && has_caller(policy, src)
}

pub(crate) fn is_target(policy: &Policy, dst: &SpiffeId) -> bool {
    is_in(&policy.target, policy.action, dst)
}

pub(crate) fn has_caller(policy: &Policy, src: &SpiffeId) -> bool {
    policy.from.iter().any(|set| is_in(set, policy.action, src))
}

/// Of a set that was not resolved an allow means nobody, and what narrows means all of its trust domain: a cell resolves
/// every set, and where it could not, a door stays shut. Not more than that: a peer narrows its own callers only.
fn is_in(set: &Peers, action: Action, id: &SpiffeId) -> bool {
    match set {
        Peers::Cluster(td, _) | Peers::Group(td, _) | Peers::Labelled(td, _) => {
            action != Action::Allow && id.trust_domain() == *td
        }
        Peers::Id(_) | Peers::Below(..) | Peers::Domain(_) | Peers::Ids(..) => set.contains(id),
    }
}

/// No ports in a policy means every port.
pub(crate) fn has_port(policy: &Policy, protocol: Protocol, port: u16) -> bool {
    policy.extras.protocols.contains(&protocol) && (policy.ports.is_empty() || policy.ports.contains(&port))
}

/// Trust domains that the policy names and nobody vouches for: until somebody does, it matches nothing.
#[must_use]
pub fn unknown_domains(policy: &Policy, known: &BTreeSet<TrustDomain>) -> BTreeSet<TrustDomain> {
    named(policy).filter(|td| !known.contains(td)).collect()
}

fn named(policy: &Policy) -> impl Iterator<Item = TrustDomain> {
    policy.from.iter().chain([&policy.target]).map(|set| set.trust_domain())
}
