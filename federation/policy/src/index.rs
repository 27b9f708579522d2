//! A policy set compiled so that a decision costs the same whether there are ten policies or a hundred thousand.
//!
//! An identity lies in as many sets as its path has prefixes, and in the sets that name it. Each pair of a target's set and
//! a caller's set that some policy speaks of has one row with what all policies say of that pair. So a decision looks at
//! the sets of both ends and at the rows between them, and never at a policy. It is exact at every moment: the end of a
//! policy stands in the row.

use crate::egress::{Prefix, masked};
use crate::ports::PortSet;
use crate::set::{PolicySet, Reason, RuleRef, Verdict, rule_ref};
use ambit_model::policy::{Action, Cidr, Peers, Protocol, closed_within};
use ambit_model::{Moment, SpiffeId, Stamp};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::Ipv4Addr;

/// What TCP connections a policy set allows, by identity and port.
#[derive(Clone, Debug, Default)]
pub struct Index {
    targets: Sets,
    callers: Sets,
    rows: HashMap<(u32, u32), Row>,
    /// Callers by address: a number for each range that some policy names.
    ranges: BTreeMap<Prefix, u32>,
    /// Rows of a target's set and a range.
    by_range: HashMap<(u32, u32), Row>,
    rules: Vec<RuleRef>,
    /// When something that allows ends, and something that narrows.
    ends: [BTreeSet<Stamp>; 2],
}

/// Numbers of sets, by what an identity shows of belonging to them.
#[derive(Clone, Debug, Default)]
struct Sets {
    numbers: BTreeMap<Peers, u32>,
    /// Sets that name the identity itself.
    named: HashMap<SpiffeId, Vec<u32>>,
    /// `spiffe://td/` and `spiffe://td/prefix/`.
    prefixes: HashMap<String, u32>,
    /// Sets that nobody resolved; what narrows by them means all of their trust domain (see [`crate::set`]).
    unresolved: Vec<(u32, Peers)>,
}

#[derive(Clone, Debug, Default)]
struct Row {
    allow: Rules,
    deny: Rules,
    audit: Rules,
}

/// The policies of one action for one pair of sets, by their numbers, which follow origin and name.
#[derive(Clone, Debug, Default)]
struct Rules {
    every_port: Vec<Rule>,
    /// Sorted by port, then by number.
    by_port: Vec<(u16, Rule)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Rule {
    number: u32,
    ends: Stamp,
}

impl PolicySet {
    /// Compiles the set, for every moment.
    pub fn compile(&self) -> Index {
        let mut index = Index::default();
        for (origin, policy) in self.resolved().filter(|(_, p)| p.extras.protocols.contains(&Protocol::Tcp)) {
            let number = number(index.rules.len());
            index.rules.push(rule_ref(origin, policy));
            let rule = Rule { number, ends: policy.extras.expires_at };
            if rule.ends != Stamp(u64::MAX) {
                let [allow, narrow] = &mut index.ends;
                if policy.action == Action::Allow { allow } else { narrow }.insert(rule.ends);
            }
            let target = index.targets.number(&policy.target);
            for set in &policy.from {
                let caller = index.callers.number(set);
                let row = index.rows.entry((target, caller)).or_default();
                row.of(policy.action).add(rule, &policy.ports);
            }
            for prefix in policy.extras.unmeshed.iter().filter_map(Cidr::v4) {
                let next = self::number(index.ranges.len());
                let range = *index.ranges.entry(prefix).or_insert(next);
                let row = index.by_range.entry((target, range)).or_default();
                row.of(policy.action).add(rule, &policy.ports);
            }
        }
        #[allow(clippy::iter_over_hash_type, reason = "each row is put in order by itself")]
        for row in index.rows.values_mut().chain(index.by_range.values_mut()) {
            [&mut row.allow, &mut row.deny, &mut row.audit].into_iter().for_each(Rules::settle);
        }
        index
    }
}

impl Index {
    /// As [`PolicySet::evaluate`] of the set that it was compiled from.
    pub fn evaluate(&self, src: &SpiffeId, dst: &SpiffeId, port: u16, now: Moment) -> Verdict {
        self.decide(port, now, |see| self.each_row(src, dst, see))
    }

    /// As [`PolicySet::evaluate_unmeshed`] of the set that it was compiled from.
    pub fn evaluate_unmeshed(&self, from: Ipv4Addr, dst: &SpiffeId, port: u16, now: Moment) -> Verdict {
        let open = closed_within(from, 32).is_none();
        self.decide(port, now, |see| {
            if open {
                self.each_row_of((from, 32), dst, see);
            }
        })
    }

    fn decide(&self, port: u16, now: Moment, each: impl FnOnce(&mut dyn FnMut(&Row, bool))) -> Verdict {
        let (mut allow, mut deny, mut audit) = (None, None, None);
        each(&mut |row, may_allow| {
            if may_allow {
                allow = first(allow, row.allow.first(port, now.latest));
            }
            deny = first(deny, row.deny.first(port, now.committed));
            audit = first(audit, row.audit.first(port, now.committed));
        });
        let rule = |number: u32| self.rules.get(usize::try_from(number).unwrap_or(usize::MAX)).cloned();
        match (deny, allow) {
            (Some(deny), _) => Verdict { allowed: false, rule: rule(deny), reason: Reason::Denied, audited: None },
            (None, Some(allow)) => {
                let audited = audit.and_then(rule);
                Verdict { allowed: true, rule: rule(allow), reason: Reason::Allowed, audited }
            }
            (None, None) => Verdict { allowed: false, rule: None, reason: Reason::NoAllow, audited: None },
        }
    }

    /// As [`PolicySet::ports`] of the set that it was compiled from.
    pub fn ports(&self, src: &SpiffeId, dst: &SpiffeId, now: Moment) -> PortSet {
        Self::ports_of(now, |see| self.each_row(src, dst, see))
    }

    /// The ports of `dst` that addresses in `prefix` may connect to, as far as policies say it of the whole of it.
    pub fn ports_unmeshed(&self, prefix: Prefix, dst: &SpiffeId, now: Moment) -> PortSet {
        Self::ports_of(now, |see| self.each_row_of(prefix, dst, see))
    }

    /// Each range that a policy names as callers, once.
    pub fn prefixes(&self) -> impl Iterator<Item = Prefix> {
        self.ranges.keys().copied()
    }

    fn ports_of(now: Moment, each: impl FnOnce(&mut dyn FnMut(&Row, bool))) -> PortSet {
        let (mut allowed, mut denied) = (Some(BTreeSet::new()), Some(BTreeSet::new()));
        each(&mut |row, may_allow| {
            if may_allow {
                row.allow.union(&mut allowed, now.latest);
            }
            row.deny.union(&mut denied, now.committed);
        });
        let set = |ports: Option<BTreeSet<u16>>| ports.map_or(PortSet::All, PortSet::List);
        PortSet::left_of(set(allowed), set(denied))
    }

    /// Whether time alone changes a verdict between the two moments.
    pub fn changes_between(&self, before: Moment, after: Moment) -> bool {
        let [allow, narrow] = &self.ends;
        let ended = |ends: &BTreeSet<Stamp>, before: Stamp, after: Stamp| {
            before < after
                && ends.range((std::ops::Bound::Excluded(before), std::ops::Bound::Included(after))).next().is_some()
        };
        ended(allow, before.latest, after.latest) || ended(narrow, before.committed, after.committed)
    }

    /// When, after `now`, something ends that speaks of the pair.
    pub(crate) fn ends_between(&self, src: &SpiffeId, dst: &SpiffeId, now: Moment) -> BTreeSet<Stamp> {
        Self::ends_of(now, |see| self.each_row(src, dst, see))
    }

    /// The same of a range and a target.
    pub(crate) fn ends_between_unmeshed(&self, prefix: Prefix, dst: &SpiffeId, now: Moment) -> BTreeSet<Stamp> {
        Self::ends_of(now, |see| self.each_row_of(prefix, dst, see))
    }

    fn ends_of(now: Moment, each: impl FnOnce(&mut dyn FnMut(&Row, bool))) -> BTreeSet<Stamp> {
        let mut ends = BTreeSet::new();
        each(&mut |row, _| {
            for rules in [&row.allow, &row.deny] {
                let all = rules.every_port.iter().chain(rules.by_port.iter().map(|(_, rule)| rule));
                ends.extend(all.map(|rule| rule.ends).filter(|end| *end != Stamp(u64::MAX) && *end > now.committed));
            }
        });
        ends
    }

    /// How many policies it was compiled from.
    pub fn len(&self) -> usize {
        self.rules.len()
    }
    /// Whether it was compiled from none.
    pub fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    /// Rows between a set of the target and one of the caller, and whether both are resolved.
    fn each_row(&self, src: &SpiffeId, dst: &SpiffeId, see: &mut dyn FnMut(&Row, bool)) {
        let callers = self.callers.of(src);
        if callers.is_empty() {
            return;
        }
        for (target, known) in self.targets.of(dst) {
            for (caller, also_known) in &callers {
                if let Some(row) = self.rows.get(&(target, *caller)) {
                    see(row, known && *also_known);
                }
            }
        }
    }

    /// Rows between a set of the target and a range that holds all of the prefix, and whether the set is resolved.
    fn each_row_of(&self, (address, bits): Prefix, dst: &SpiffeId, see: &mut dyn FnMut(&Row, bool)) {
        if self.ranges.is_empty() {
            return;
        }
        let wider = (0..=bits).filter_map(|bits| self.ranges.get(&(masked(address, bits), bits)));
        let wider: Vec<u32> = wider.copied().collect();
        for (target, known) in self.targets.of(dst) {
            for range in &wider {
                if let Some(row) = self.by_range.get(&(target, *range)) {
                    see(row, known);
                }
            }
        }
    }
}

impl Row {
    fn of(&mut self, action: Action) -> &mut Rules {
        match action {
            Action::Allow => &mut self.allow,
            Action::Deny => &mut self.deny,
            Action::Audit => &mut self.audit,
        }
    }
}

fn number(count: usize) -> u32 {
    // A cell holds 50,000 policies of its own, each with 257 sets at most.
    u32::try_from(count).unwrap_or(u32::MAX)
}

/// The lower of two numbers, if any.
fn first(one: Option<u32>, other: Option<u32>) -> Option<u32> {
    one.into_iter().chain(other).min()
}

impl Sets {
    fn number(&mut self, set: &Peers) -> u32 {
        if let Some(number) = self.numbers.get(set) {
            return *number;
        }
        let new = number(self.numbers.len());
        self.numbers.insert(set.clone(), new);
        match set {
            Peers::Id(id) => self.named.entry(id.clone()).or_default().push(new),
            Peers::Ids(_, ids) => {
                let of_its_own = ids.iter().filter(|id| set.contains(id));
                of_its_own.for_each(|id| self.named.entry(id.clone()).or_default().push(new));
            }
            Peers::Below(td, path) => drop(self.prefixes.insert(format!("spiffe://{td}{path}"), new)),
            Peers::Domain(td) => drop(self.prefixes.insert(format!("spiffe://{td}/"), new)),
            Peers::Cluster(..) | Peers::Group(..) | Peers::Labelled(..) => self.unresolved.push((new, set.clone())),
        }
        new
    }

    /// The sets that the identity is in, and whether it is for sure.
    fn of(&self, id: &SpiffeId) -> Vec<(u32, bool)> {
        let named = self.named.get(id).into_iter().flatten().copied();
        let text = id.as_str();
        let slashes = text.char_indices().skip("spiffe://".len()).filter(|(_, c)| *c == '/');
        let prefixes = slashes.filter_map(|(at, _)| self.prefixes.get(text.get(..=at)?).copied());
        let could = |set: &Peers| set.trust_domain() == id.trust_domain();
        let unresolved = self.unresolved.iter().filter(|(_, set)| could(set)).map(|(number, _)| (*number, false));
        named.chain(prefixes).map(|number| (number, true)).chain(unresolved).collect()
    }
}

impl Rules {
    fn add(&mut self, rule: Rule, ports: &[u16]) {
        if ports.is_empty() {
            self.every_port.push(rule);
        }
        self.by_port.extend(ports.iter().map(|port| (*port, rule)));
    }

    /// Sorts, and leaves out what never decides: whatever follows a rule without end for the same port.
    fn settle(&mut self) {
        self.every_port.sort_unstable();
        self.every_port.dedup();
        if let Some(at) = self.every_port.iter().position(|rule| rule.ends == Stamp(u64::MAX)) {
            self.every_port.truncate(at + 1);
        }
        self.by_port.sort_unstable();
        self.by_port.dedup();
        let mut decided = None;
        self.by_port.retain(|(port, rule)| {
            let over = decided == Some(*port);
            if rule.ends == Stamp(u64::MAX) {
                decided = Some(*port);
            }
            !over
        });
        self.every_port.shrink_to_fit();
        self.by_port.shrink_to_fit();
    }

    /// The first rule for the port that is not over.
    fn first(&self, port: u16, now: Stamp) -> Option<u32> {
        let begin = self.by_port.partition_point(|(p, _)| *p < port);
        let of_port = self.by_port.get(begin..).unwrap_or_default().iter().take_while(|(p, _)| *p == port);
        let exact = of_port.map(|(_, rule)| rule).find(|rule| rule.ends > now);
        let any = self.every_port.iter().find(|rule| rule.ends > now);
        exact.into_iter().chain(any).map(|rule| rule.number).min()
    }

    /// Adds the ports; none is left to list where it is every port.
    fn union(&self, ports: &mut Option<BTreeSet<u16>>, now: Stamp) {
        if self.every_port.iter().any(|rule| rule.ends > now) {
            *ports = None;
        }
        if let Some(ports) = ports {
            ports.extend(self.by_port.iter().filter(|(_, rule)| rule.ends > now).map(|(port, _)| *port));
        }
    }
}
