//! The ways into a pod from outside of the mesh, in the kernel's tables: ranges of callers' addresses, and the verdicts about them.
//!
//! Of every address in a range that policies name they say the same, but where a longer range begins. So ranges of which they say
//! the same share a number. An address that is of the mesh is a range of its own, under a number of which no verdict speaks. What
//! narrows must not be left out, so a table that is too small lets nobody in.

use super::{NOT_OUTSIDE, pair};
use crate::view::{View, Workload};
use ambit_ebpf::{Capacity, Range, Verdict, VerdictKey};
use ambit_model::policy::{CLOSED_RANGES, closed_within};
use ambit_model::{Moment, NumericIdentity, SpiffeId};
use ambit_policy::{PortSet, Prefix};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

/// Of the first range of callers: beyond the numbers of all ranges of egress, of which there are no more than the table takes.
const FIRST: u32 = NumericIdentity::END.0 + (1 << 24);

/// What the kernel shall hold of callers outside of the mesh.
#[derive(Debug, Default)]
pub(super) struct WaysIn {
    pub(super) ranges: Vec<Range>,
    /// By range and target: all of one, or none.
    pub(super) verdicts: Vec<Vec<(VerdictKey, Verdict)>>,
}

impl WaysIn {
    /// For these workloads, on a node that has the addresses `own`.
    pub(super) fn of<'a>(
        capacity: &Capacity,
        view: &View,
        local: impl IntoIterator<Item = &'a Workload>,
        own: &BTreeSet<Ipv4Addr>,
        now: Moment,
    ) -> Self {
        let named: BTreeSet<Prefix> =
            view.rules.prefixes().filter(|(first, bits)| closed_within(*first, *bits).is_none()).collect();
        let (mut targets, mut here) = (BTreeMap::<&SpiffeId, NumericIdentity>::new(), BTreeSet::new());
        for workload in local {
            targets.insert(&workload.entry.spiffe_id, workload.number);
            here.insert(workload.pod.address);
        }
        let mut numbers = BTreeMap::<Vec<(NumericIdentity, PortSet)>, NumericIdentity>::new();
        let (mut ranges, mut verdicts, mut next) = (BTreeMap::<Prefix, NumericIdentity>::new(), Vec::new(), FIRST);
        for prefix in &named {
            let ports = |(id, to): (&&SpiffeId, &NumericIdentity)| {
                let ports = view.rules.ports_unmeshed(*prefix, id, now);
                (!ports.is_empty()).then_some((*to, ports))
            };
            let open: Vec<(NumericIdentity, PortSet)> = targets.iter().filter_map(ports).collect();
            let number = numbers.entry(open).or_insert_with_key(|open| {
                let number = NumericIdentity(next);
                next = next.saturating_add(1);
                verdicts.extend(open.iter().map(|(to, ports)| pair(ports, number, *to)));
                number
            });
            ranges.insert(*prefix, *number);
        }
        if verdicts.is_empty() {
            return Self::default();
        }
        ranges.extend(CLOSED_RANGES.iter().map(|(first, bits, _)| ((*first, *bits), NOT_OUTSIDE)));
        let v4 = |ip: IpAddr| if let IpAddr::V4(ip) = ip { Some(ip) } else { None };
        let services = view.services.iter().filter_map(|service| v4(service.address.ip()));
        let endpoints = view.endpoints.keys().copied().filter_map(v4);
        let known = view.meshed.iter().chain(&view.claimed).chain(own).chain(&here).copied();
        let inside = known.chain(endpoints).chain(services).filter(|address| is_in(&named, *address));
        ranges.extend(inside.map(|address| ((address, 32), NOT_OUTSIDE)));
        if ranges.len() > usize::try_from(capacity.ranges).unwrap_or(usize::MAX) {
            let ranges = ranges.len();
            tracing::warn!(ranges, "more ranges of callers than the kernel's table takes: nobody comes in by address");
            return Self::default();
        }
        let ranges = ranges.into_iter().map(|((first, bits), number)| Range { first, bits, number: number.0 });
        Self { ranges: ranges.collect(), verdicts }
    }

    /// Entries of the table of verdicts.
    pub(super) fn verdicts(&self) -> usize {
        self.verdicts.iter().map(Vec::len).sum()
    }
}

fn is_in(named: &BTreeSet<Prefix>, address: Ipv4Addr) -> bool {
    let masked = |bits: u8| {
        let mask = u32::MAX.checked_shl(32_u32.saturating_sub(u32::from(bits))).unwrap_or(0);
        Ipv4Addr::from_bits(address.to_bits() & mask)
    };
    (0..=32).any(|bits| named.contains(&(masked(bits), bits)))
}

#[cfg(test)]
mod tests {
    use super::super::{Unhealthy, all};
    use super::*;
    use crate::view::tests::{pod, slice, view};
    use ambit_ebpf::Tables;
    use ambit_proto::v1;

    const NOW: Moment = Moment { committed: ambit_model::Stamp(5), latest: ambit_model::Stamp(9) };

    fn policy(name: &str, action: v1::Action, ranges: &[&str], ports: &[u32]) -> v1::Policy {
        v1::Policy {
            origin: "west".into(),
            name: name.into(),
            target: "spiffe://west/web".into(),
            action: action as i32,
            unmeshed: ranges.iter().map(|range| (*range).to_owned()).collect(),
            transport: if action == v1::Action::Allow { "passthrough".into() } else { String::new() },
            ports: ports.to_vec(),
            resolved: true,
            ..Default::default()
        }
    }
    fn compiled(policies: Vec<v1::Policy>, spoil: impl FnOnce(&mut v1::Slice), own: &[&str]) -> Tables {
        let mut s = slice();
        s.unmeshed = policies;
        spoil(&mut s);
        let view = view(s).unwrap();
        let local = view.workloads(&[pod("web", 1000, 11)]);
        let own = own.iter().map(|address| address.parse().unwrap()).collect();
        all(&view, &view.denials, local.values(), &Unhealthy::new(), &own, NOW)
    }
    /// As the kernel: the longest range, and its number's verdicts.
    fn lets_in(tables: &Tables, from: &str, port: u16) -> bool {
        let from: Ipv4Addr = from.parse().unwrap();
        let holds =
            |r: &&Range| (r.first.to_bits() ^ from.to_bits()).checked_shr(32 - u32::from(r.bits)).unwrap_or(0) == 0;
        let Some(range) = tables.callers.iter().filter(holds).max_by_key(|r| r.bits) else { return false };
        let found = |port| {
            let key = VerdictKey { source: range.number, destination: 256, port };
            tables.verdicts.iter().find(|(k, _)| *k == key).map(|(_, v)| v.action)
        };
        let both = [found(port), found(0)];
        both.contains(&Some(ambit_ebpf::Action::Allow)) && !both.contains(&Some(ambit_ebpf::Action::Deny))
    }

    #[test]
    fn a_narrower_range_says_what_all_say_of_it_and_alike_ones_share_a_number() {
        let tables = compiled(
            vec![
                policy("a", v1::Action::Allow, &["10.0.0.0/8", "192.0.2.0/24"], &[80]),
                policy("b", v1::Action::Allow, &["10.1.0.0/16"], &[443]),
                policy("c", v1::Action::Deny, &["10.1.2.0/24", "127.0.0.0/8"], &[80]),
                policy("d", v1::Action::Deny, &["10.1.2.3/32"], &[]),
            ],
            |_| (),
            &[],
        );
        for (from, port, open) in [
            ("10.0.0.1", 80, true),
            ("10.0.0.1", 443, false),
            ("192.0.2.9", 80, true),
            ("10.1.0.1", 80, true),
            ("10.1.0.1", 443, true),
            ("10.1.2.1", 80, false),
            ("10.1.2.1", 443, true),
            ("10.1.2.3", 443, false),
            ("11.0.0.1", 80, false),
            ("127.0.0.1", 80, false),
        ] {
            assert_eq!(lets_in(&tables, from, port), open, "{from} {port}");
        }
        let numbers: BTreeSet<u32> = tables.callers.iter().map(|r| r.number).filter(|n| *n >= FIRST).collect();
        assert_eq!(numbers.len(), 4, "10/8 and 192.0.2/24 are alike: {numbers:?}");
    }

    #[test]
    fn what_is_of_the_mesh_or_of_this_node_comes_in_by_no_range() {
        let wide = || vec![policy("a", v1::Action::Allow, &["0.0.0.0/0"], &[80])];
        let tables = compiled(wide(), |s| s.claimed = vec!["10.5.0.1".into()], &["10.9.0.1"]);
        // The pod itself, too.
        for from in ["10.5.0.1", "10.9.0.1", "10.71.101.11", "169.254.1.1", "127.0.0.1", "224.0.0.1"] {
            assert!(!lets_in(&tables, from, 80), "{from}");
        }
        assert!(lets_in(&tables, "10.5.0.2", 80));
        // Without anybody who is let in nothing is different from what it was.
        let none = compiled(vec![policy("d", v1::Action::Deny, &["10.0.0.0/8"], &[])], |_| (), &[]);
        assert!(none.callers.is_empty() && none.verdicts.is_empty());
        let crowd = |s: &mut v1::Slice| {
            s.claimed = (0..70_000_u32).map(|n| Ipv4Addr::from_bits((10 << 24) + n).to_string()).collect();
        };
        let full = compiled(wide(), crowd, &[]);
        assert!(full.callers.is_empty() && full.verdicts.is_empty(), "what narrows is not left out");
    }

    #[test]
    fn an_allow_ends_by_the_own_clock_and_a_deny_by_committed_time() {
        let open = |action, expires_at_ms| {
            let ending = v1::Policy { expires_at_ms, ..policy("a", action, &["10.0.0.0/8"], &[80]) };
            let other = policy("b", v1::Action::Allow, &["10.0.0.0/9"], &[80]);
            lets_in(
                &compiled(vec![ending, other], |_| (), &[]),
                if action == v1::Action::Allow { "10.200.0.1" } else { "10.1.0.1" },
                80,
            )
        };
        let ends = [10, 9, 6, 5];
        assert_eq!(ends.map(|end| open(v1::Action::Allow, end)), [true, false, false, false]);
        assert_eq!(ends.map(|end| open(v1::Action::Deny, end)), [false, false, false, true]);
    }
}
