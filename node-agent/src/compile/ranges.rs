//! The ways out of the mesh in the kernel's tables: ranges of addresses, and the verdicts about them.
//!
//! Of each range that a document names, and of each address in it, the same documents speak but where a longer range begins.
//! So ranges of which the same documents speak share a number, and the verdicts about it are what all of them allow. What does not
//! fit is left out from the longest range on: less is open then, never more.

use super::callers::WaysIn;
use super::{Unhealthy, pair, tables_within};
use crate::denials::Denials;
use crate::view::{View, Workload};
use ambit_ebpf::{Capacity, Range, Tables, Verdict, VerdictKey};
use ambit_model::policy::{CLOSED_RANGES, closed_within};
use ambit_model::{Moment, NumericIdentity, ObjectName};
use ambit_policy::Prefix;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

/// Stands behind an address that no document opens: the mesh knows it and nobody here may reach it, or it is of this node. No
/// workload has this number, and no verdict speaks of it.
pub const NOT_OUTSIDE: NumericIdentity = NumericIdentity(2);

/// What the kernel shall hold for these workloads, on a node that has the addresses `own`.
pub fn all<'a>(
    view: &View,
    denials: &Denials,
    local: impl IntoIterator<Item = &'a Workload> + Clone,
    unhealthy: &Unhealthy,
    own: &BTreeSet<Ipv4Addr>,
    now: Moment,
) -> Tables {
    let capacity = Capacity::default();
    let most = usize::try_from(capacity.verdicts).unwrap_or(usize::MAX);
    let mut ways_in = WaysIn::of(&capacity, view, local.clone(), own, now);
    let within = match u32::try_from(ways_in.verdicts()).ok().and_then(|taken| capacity.verdicts.checked_sub(taken)) {
        Some(verdicts) => Capacity { verdicts, ..capacity },
        None => {
            tracing::warn!(
                most,
                "more verdicts about callers' ranges than the kernel's table takes: nobody comes in so"
            );
            ways_in = WaysIn::default();
            capacity
        }
    };
    let mut tables = ways_out_within(within, view, denials, local, unhealthy, own, now);
    if tables.verdicts.len().saturating_add(ways_in.verdicts()) <= most {
        tables.verdicts.extend(ways_in.verdicts.into_iter().flatten());
        tables.callers = ways_in.ranges;
    }
    tables
}

/// The same but for callers outside of the mesh.
fn ways_out_within<'a>(
    capacity: Capacity,
    view: &View,
    denials: &Denials,
    local: impl IntoIterator<Item = &'a Workload> + Clone,
    unhealthy: &Unhealthy,
    own: &BTreeSet<Ipv4Addr>,
    now: Moment,
) -> Tables {
    if view.egress.is_empty() {
        return tables_within(&capacity, view, denials, local, unhealthy, now);
    }
    let services = view.services.iter().filter_map(|service| service.address.v4());
    let endpoints = view.endpoints.values().filter_map(|endpoint| endpoint.address.v4());
    let known = view.meshed.iter().chain(own).copied().chain(endpoints).chain(services);
    let known: BTreeSet<Ipv4Addr> = known.collect();
    // Endpoints have their places in the same table already.
    let beside = known.iter().filter(|address| !view.endpoints.contains_key(&IpAddr::V4(**address))).count();
    let (ranges, verdicts) = ways_out(view, local.clone(), now);
    // What is the cell's own goes before what peers bring, here too.
    let rest = |all: u32, taken: usize| all.saturating_sub(u32::try_from(taken).unwrap_or(u32::MAX));
    let within = Capacity {
        verdicts: rest(capacity.verdicts, verdicts.iter().map(Vec::len).sum()),
        endpoints: rest(capacity.endpoints, beside),
        ..capacity
    };
    let mut tables = tables_within(&within, view, denials, local.clone(), unhealthy, now);
    let there: BTreeSet<Ipv4Addr> = tables.endpoints.iter().map(|(address, _)| *address).collect();
    let rest: Vec<_> = known.difference(&there).map(|address| (*address, NOT_OUTSIDE.0)).collect();
    if tables.endpoints.len() + rest.len() > usize::try_from(capacity.endpoints).unwrap_or(usize::MAX) {
        // Who is not told apart from what is outside would be reached in clear.
        tracing::warn!(
            addresses = known.len(),
            "more addresses of the mesh than the kernel's table takes: no way out is open"
        );
        return tables_within(&capacity, view, denials, local, unhealthy, now);
    }
    tables.endpoints.extend(rest);
    tables.ranges = ranges;
    let mut left = usize::try_from(capacity.verdicts).unwrap_or(usize::MAX).saturating_sub(tables.verdicts.len());
    let mut left_out = 0;
    for rows in verdicts {
        match left.checked_sub(rows.len()) {
            Some(rest) => {
                tables.verdicts.extend(rows);
                left = rest;
            }
            None => left_out += rows.len(),
        }
    }
    if left_out > 0 {
        tracing::warn!(verdicts = left_out, "egress beyond what the kernel's table takes: left out, and refused");
    }
    tables
}

/// The ranges, and the verdicts of each caller and number.
fn ways_out<'a>(
    view: &View,
    local: impl IntoIterator<Item = &'a Workload>,
    now: Moment,
) -> (Vec<Range>, Vec<Vec<(VerdictKey, Verdict)>>) {
    let sources: BTreeMap<_, _> = local.into_iter().map(|w| (&w.entry.spiffe_id, w.number)).collect();
    let mut ranges: Vec<Range> =
        CLOSED_RANGES.iter().map(|(first, bits, _)| range((*first, *bits), NOT_OUTSIDE)).collect();
    let mut numbers = BTreeMap::<Vec<&ObjectName>, NumericIdentity>::new();
    let (mut next, mut verdicts) = (NumericIdentity::END.0, Vec::new());
    for prefix in view.egress.prefixes().filter(|prefix| !is_closed(*prefix)) {
        let documents: Vec<&ObjectName> = view.egress.containing(prefix).into_iter().map(|e| &e.name).collect();
        let number = *numbers.entry(documents).or_insert_with(|| {
            let number = NumericIdentity(next);
            next += 1;
            let of_pair =
                |(source, from): (&&_, &NumericIdentity)| pair(&view.egress.ports(source, prefix, now), *from, number);
            verdicts.extend(sources.iter().map(of_pair).filter(|rows| !rows.is_empty()));
            number
        });
        ranges.push(range(prefix, number));
    }
    (ranges, verdicts)
}

fn range((first, bits): Prefix, number: NumericIdentity) -> Range {
    Range { first, bits, number: number.0 }
}

/// Whether all of it is closed; no cell takes a document that names it.
fn is_closed((first, bits): Prefix) -> bool {
    closed_within(first, bits).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::tests::{egress, pod, slice, view};
    use ambit_proto::v1;

    const NOW: Moment = Moment { committed: ambit_model::Stamp(5), latest: ambit_model::Stamp(9) };

    fn compiled(spoil: impl FnOnce(&mut v1::Slice), own: &[&str]) -> Tables {
        let mut s = slice();
        spoil(&mut s);
        let view = view(s).unwrap();
        let local = view.workloads(&[pod("web", 1000, 11)]);
        let own = own.iter().map(|address| address.parse().unwrap()).collect();
        all(&view, &view.denials, local.values(), &Unhealthy::new(), &own, NOW)
    }
    fn to(name: &str, ranges: &[&str], ports: &[u32]) -> v1::Egress {
        v1::Egress { to: ranges.iter().map(|r| (*r).to_owned()).collect(), ports: ports.to_vec(), ..egress(name) }
    }
    fn number_of(tables: &Tables, range: &str) -> Option<u32> {
        tables.ranges.iter().find(|r| format!("{}/{}", r.first, r.bits) == range).map(|r| r.number)
    }

    #[test]
    fn ranges_of_the_same_documents_share_a_number_that_no_workload_has() {
        let tables = compiled(
            |s| {
                s.egress = vec![
                    to("a", &["10.0.0.0/8", "192.0.2.0/24"], &[80]),
                    to("b", &["10.1.0.0/16"], &[443]),
                    to("never", &["127.0.0.0/16"], &[]),
                    v1::Egress { from: vec!["spiffe://west/web-root".into()], ..to("c", &["11.0.0.0/8"], &[]) },
                ];
            },
            &[],
        );
        let number = |range| number_of(&tables, range);
        assert_eq!(number("10.0.0.0/8"), number("192.0.2.0/24"));
        assert_eq!(number("127.0.0.0/16"), None);
        for closed in ["0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/4", "240.0.0.0/4"] {
            assert_eq!(number(closed), Some(NOT_OUTSIDE.0));
        }
        let open: BTreeSet<u32> = tables.ranges.iter().map(|r| r.number).filter(|n| *n != NOT_OUTSIDE.0).collect();
        assert!(open.iter().all(|n| *n >= NumericIdentity::END.0) && open.len() == 3, "{open:?}");
        let allowed: BTreeSet<(Option<u32>, u16)> =
            tables.verdicts.iter().map(|(key, _)| (Some(key.destination), key.port)).collect();
        let (wide, narrow) = (number("10.0.0.0/8"), number("10.1.0.0/16"));
        assert_eq!(allowed, [(wide, 80), (narrow, 80), (narrow, 443)].into());
        assert!(tables.verdicts.iter().all(|(key, _)| key.source == 256));
    }

    #[test]
    fn what_the_mesh_or_this_node_has_is_in_no_range() {
        let known = |s: &mut v1::Slice| {
            s.egress = vec![to("all", &["0.0.0.0/0"], &[])];
            s.meshed = vec!["10.5.0.1".into()];
            s.services = vec![v1::Service {
                origin: "west".into(),
                name: "s".into(),
                address: "10.96.0.1".into(),
                port: 80,
                backends: vec!["spiffe://west/*".into()],
                order: "local-first".into(),
                weights: vec![],
            }];
        };
        let tables = compiled(known, &["10.9.0.1"]);
        let found: BTreeMap<String, u32> = tables.endpoints.iter().map(|(a, n)| (a.to_string(), *n)).collect();
        for address in ["10.5.0.1", "10.96.0.1", "10.9.0.1"] {
            assert_eq!(found.get(address), Some(&NOT_OUTSIDE.0), "{address}");
        }
        // Without a document nothing is different from what it was.
        let tables = compiled(|s| (known(s), s.egress.clear()).1, &["10.9.0.1"]);
        assert!(tables.endpoints.is_empty() && tables.ranges.is_empty());
        // Were there more than the kernel can tell apart, none would be open.
        let crowd = |s: &mut v1::Slice| {
            known(s);
            s.meshed = (0..70_000_u32).map(|n| Ipv4Addr::from_bits((10 << 24) + n).to_string()).collect();
        };
        assert!(compiled(crowd, &[]).ranges.is_empty());
    }

    #[test]
    fn it_ends_by_the_own_clock() {
        let open = |expires_at_ms| {
            let ending = v1::Egress { expires_at_ms, ..to("e", &["192.0.2.0/24"], &[80]) };
            !compiled(|s| s.egress = vec![ending], &[]).verdicts.is_empty()
        };
        assert_eq!([open(0), open(10), open(9), open(6)], [true, true, false, false]);
    }
}
