//! Why a connection is denied, and what is missing.

use crate::owner::speaks_for;
use crate::set::{PolicySet, RuleRef, Verdict, has_caller, is_target, rule_ref};
use ambit_model::policy::{Action, Cidr, Peers, Policy, Protocol};
use ambit_model::{Moment, SpiffeId, Stamp, TrustDomain, utc};
use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr};

/// In what an allow policy falls short of allowing a connection.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Difference {
    /// It matches, but the deny policy named in the verdict wins.
    Overruled,
    /// It names trust domains that are not known, so it is not in force.
    Unresolved(BTreeSet<TrustDomain>),
    /// It is over since then.
    Over(Stamp),
    /// It is about these ports.
    OtherPort(Vec<u16>),
    /// It is about UDP.
    OtherProtocol,
    /// It is about these callers.
    OtherCaller(Vec<Peers>),
    /// It is about callers in these ranges of addresses.
    OtherRange(Vec<Cidr>),
}

/// The allow policy for the same target that falls short in the least.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nearest {
    /// The policy.
    pub rule: RuleRef,
    /// In what it falls short; never empty.
    pub differs: Vec<Difference>,
}

/// A verdict and what would change it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Explanation {
    /// As [`PolicySet::evaluate`] gives it.
    pub verdict: Verdict,
    /// Where denied: the nearest allow policy for this target, if any is for it.
    pub nearest: Option<Nearest>,
}

impl PolicySet {
    /// The verdict, the policy behind it and, where it is a denial, the nearest policy that would allow.
    pub fn explain(&self, src: &SpiffeId, dst: &SpiffeId, port: u16, now: Moment) -> Explanation {
        let verdict = self.evaluate(src, dst, port, now);
        let other = |policy: &Policy| {
            let here = has_caller(policy, src);
            (!here).then(|| Difference::OtherCaller(policy.from.clone()))
        };
        let nearest = if verdict.allowed { None } else { self.nearest(dst, port, now, |p| !p.from.is_empty(), other) };
        Explanation { verdict, nearest }
    }

    /// The same of who has no identity and comes from this address, of which the mesh knows nobody.
    pub fn explain_unmeshed(&self, from: Ipv4Addr, dst: &SpiffeId, port: u16, now: Moment) -> Explanation {
        let verdict = self.evaluate_unmeshed(IpAddr::V4(from), dst, port, now);
        let other = |policy: &Policy| {
            let here = policy.extras.unmeshed.iter().any(|range| range.contains(IpAddr::V4(from)));
            (!here).then(|| Difference::OtherRange(policy.extras.unmeshed.clone()))
        };
        let speaks = |policy: &Policy| !policy.extras.unmeshed.is_empty();
        let nearest = if verdict.allowed { None } else { self.nearest(dst, port, now, speaks, other) };
        Explanation { verdict, nearest }
    }

    fn nearest(
        &self,
        dst: &SpiffeId,
        port: u16,
        now: Moment,
        speaks: impl Fn(&Policy) -> bool,
        other: impl Fn(&Policy) -> Option<Difference>,
    ) -> Option<Nearest> {
        self.iter()
            .filter(|(origin, p)| p.action == Action::Allow && speaks_for(origin, p) && is_target(p, dst) && speaks(p))
            .map(|(origin, p)| Nearest { rule: rule_ref(origin, p), differs: self.differences(p, other(p), port, now) })
            .min_by_key(|near| near.differs.iter().map(distance).sum::<u32>())
    }

    fn differences(&self, policy: &Policy, other: Option<Difference>, port: u16, now: Moment) -> Vec<Difference> {
        let mut differs = Vec::new();
        let unknown: BTreeSet<_> = policy
            .from
            .iter()
            .chain([&policy.target])
            .map(Peers::trust_domain)
            .filter(|td| !self.known().contains(td))
            .collect();
        if !unknown.is_empty() {
            differs.push(Difference::Unresolved(unknown));
        }
        if policy.is_over(now) {
            differs.push(Difference::Over(policy.extras.expires_at));
        }
        if !policy.extras.protocols.contains(&Protocol::Tcp) {
            differs.push(Difference::OtherProtocol);
        }
        if !policy.ports.is_empty() && !policy.ports.contains(&port) {
            differs.push(Difference::OtherPort(policy.ports.clone()));
        }
        differs.extend(other);
        if differs.is_empty() {
            differs.push(Difference::Overruled);
        }
        differs
    }
}

/// Nearer is what an operator more likely meant: a policy that is overruled, then one for another port, then one
/// that waits for a peer or is over, then one for another caller. Powers of two, so that sums keep that order.
fn distance(difference: &Difference) -> u32 {
    match difference {
        Difference::Overruled => 0,
        Difference::OtherPort(_) | Difference::OtherProtocol => 1,
        Difference::Unresolved(_) | Difference::Over(_) => 2,
        Difference::OtherCaller(_) | Difference::OtherRange(_) => 4,
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Overruled => f.write_str("a deny policy wins over it"),
            Self::Unresolved(domains) => write!(f, "it names trust domains that are not known: {}", list(domains)),
            Self::Over(since) => write!(f, "it is over since {}", utc::text(since.0)),
            Self::OtherProtocol => f.write_str("it is for udp"),
            Self::OtherPort(ports) => write!(f, "it is for ports {}", list(ports)),
            Self::OtherCaller(from) => write!(f, "it is for callers {}", list(from.iter().map(shown))),
            Self::OtherRange(ranges) => write!(f, "it is for addresses in {}", list(ranges)),
        }
    }
}

impl fmt::Display for Nearest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.rule)?;
        for (i, difference) in self.differs.iter().enumerate() {
            write!(f, "{}{difference}", if i == 0 { "" } else { "; " })?;
        }
        Ok(())
    }
}

/// A set, or how many are in it where that is all that a resolved one can say in a line.
fn shown(set: &Peers) -> String {
    match set {
        Peers::Ids(td, ids) => format!("{} of {td} by cluster or labels", ids.len()),
        Peers::Id(_)
        | Peers::Below(..)
        | Peers::Domain(_)
        | Peers::Cluster(..)
        | Peers::Group(..)
        | Peers::Labelled(..) => set.to_string(),
    }
}

fn list<T: fmt::Display>(items: impl IntoIterator<Item = T>) -> String {
    items.into_iter().map(|item| item.to_string()).collect::<Vec<_>>().join(", ")
}
