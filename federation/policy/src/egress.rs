//! All documents of `kind: Egress` that concern somebody, and the verdict they give of an address outside of the mesh.
//!
//! They only allow, so nothing decides between them: what one of them allows is allowed. Whether an address is outside of the mesh
//! who asks knows; one that is not is never judged here.

use crate::flips::known_in;
use crate::ports::PortSet;
use ambit_model::policy::{Action, Egress, Protocol};
use ambit_model::{Moment, ObjectName, SpiffeId, Stamp};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

/// A range of IPv4 addresses: its first, and the bits of its prefix.
pub type Prefix = (Ipv4Addr, u8);

/// Comparisons of one caller and one range: more take seconds, and nobody reads what they give.
const COMPARED_MAX: usize = crate::flips::PAIRS_MAX;

/// The documents by name, and by the ranges that they name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EgressSet {
    documents: BTreeMap<ObjectName, Egress>,
    /// Of each range that a document names, who names it.
    ranges: BTreeMap<Prefix, BTreeSet<ObjectName>>,
}

impl FromIterator<Egress> for EgressSet {
    fn from_iter<I: IntoIterator<Item = Egress>>(documents: I) -> Self {
        let documents: BTreeMap<_, _> = documents.into_iter().map(|e| (e.name.clone(), e)).collect();
        let mut ranges = BTreeMap::<Prefix, BTreeSet<ObjectName>>::new();
        for egress in documents.values() {
            for prefix in egress.to.iter().filter_map(|range| range.v4()) {
                ranges.entry(prefix).or_default().insert(egress.name.clone());
            }
        }
        Self { documents, ranges }
    }
}

impl EgressSet {
    /// The first document by name that lets `src` connect to the TCP `port` of `to`; none where it is refused.
    pub fn evaluate(&self, src: &SpiffeId, to: Ipv4Addr, port: u16, now: Moment) -> Option<&Egress> {
        let allows = |egress: &&Egress| egress.allows(src, IpAddr::V4(to), Protocol::Tcp, port, now);
        self.containing((to, 32)).into_iter().find(allows)
    }

    /// The ports of addresses in `prefix` that `src` may connect to, as far as documents say it of the whole of it.
    pub fn ports(&self, src: &SpiffeId, prefix: Prefix, now: Moment) -> PortSet {
        ports_of(self.containing(prefix), src, now)
    }

    /// The documents that name a range which holds all of `prefix`, by name.
    pub fn containing(&self, (address, bits): Prefix) -> Vec<&Egress> {
        let wider = (0..=bits).filter_map(|bits| self.ranges.get(&(masked(address, bits), bits)));
        let names: BTreeSet<&ObjectName> = wider.flatten().collect();
        names.into_iter().filter_map(|name| self.documents.get(name)).collect()
    }

    /// Of a connection that none allows, the document that falls short in the least, and in what.
    pub fn nearest(&self, src: &SpiffeId, to: Ipv4Addr, port: u16) -> Option<(&Egress, String)> {
        let near = |egress: &Egress| {
            let mut differs = Vec::new();
            if !egress.ports.is_empty() && !egress.ports.contains(&port) {
                differs.push((1, format!("it is for ports {}", list(&egress.ports))));
            }
            if !egress.from.iter().any(|set| set.contains(src)) {
                differs.push((2, "it is for other callers".to_owned()));
            }
            if !egress.to.iter().any(|range| range.contains(IpAddr::V4(to))) {
                differs.push((4, format!("it is for {}", list(&egress.to))));
            }
            differs
        };
        let all = self.documents.values().map(|egress| (egress, near(egress)));
        let (egress, differs) = all.min_by_key(|(_, differs)| differs.iter().map(|(far, _)| far).sum::<u32>())?;
        Some((egress, differs.into_iter().map(|(_, text)| text).collect::<Vec<_>>().join("; ")))
    }

    /// Each range that a document names, once.
    pub fn prefixes(&self) -> impl Iterator<Item = Prefix> {
        self.ranges.keys().copied()
    }

    /// The documents, by name.
    pub fn iter(&self) -> impl Iterator<Item = &Egress> {
        self.documents.values()
    }
    /// The document of that name.
    pub fn get(&self, name: &ObjectName) -> Option<&Egress> {
        self.documents.get(name)
    }
    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.documents.is_empty()
    }

    /// Whether time alone changes a verdict between the two moments.
    pub fn changes_between(&self, before: Moment, after: Moment) -> bool {
        let ended = |egress: &Egress| !egress.is_over(before) && egress.is_over(after);
        self.documents.values().any(ended)
    }
}

fn list<T: ToString>(items: &[T]) -> String {
    items.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// What these documents let `src` connect to, as ports.
pub(crate) fn ports_of<'a>(documents: impl IntoIterator<Item = &'a Egress>, src: &SpiffeId, now: Moment) -> PortSet {
    let mut ports = BTreeSet::new();
    for egress in documents {
        let speaks = !egress.is_over(now) && egress.protocols.contains(&Protocol::Tcp);
        if !speaks || !egress.from.iter().any(|set| set.contains(src)) {
            continue;
        }
        if egress.ports.is_empty() {
            return PortSet::All;
        }
        ports.extend(egress.ports.iter().copied());
    }
    PortSet::List(ports)
}

/// The first address of the range of so many bits that it lies in.
pub(crate) fn masked(address: Ipv4Addr, bits: u8) -> Ipv4Addr {
    let mask = u32::MAX.checked_shl(32_u32.saturating_sub(u32::from(bits))).unwrap_or(0);
    Ipv4Addr::from_bits(address.to_bits() & mask)
}

/// One caller and one range whose ports a change opens or closes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct EgressFlip {
    /// The caller.
    pub source: SpiffeId,
    /// The range.
    pub range: Prefix,
    /// Ports that would be refused without the change and are open.
    pub opened: PortSet,
    /// Ports that would be open without the change and are refused.
    pub closed: PortSet,
    /// From when on: none where at once, else when a document that speaks of the range ends.
    pub at: Option<Stamp>,
}

/// What a change does to known callers, over the ranges that documents name which change.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EgressFlips {
    /// Callers and ranges whose ports change, each once.
    pub pairs: Vec<EgressFlip>,
    /// How many were compared.
    pub compared: usize,
    /// There were more than are compared: `pairs` is not all.
    pub cut_short: bool,
}

/// As [`crate::flips`], of callers and ranges.
pub fn egress_flips(before: &EgressSet, after: &EgressSet, known: &BTreeSet<SpiffeId>, now: Moment) -> EgressFlips {
    let differs = |of: &EgressSet, other: &EgressSet| -> Vec<Egress> {
        of.iter().filter(|egress| other.get(&egress.name) != Some(egress)).cloned().collect()
    };
    let (mut found, mut seen, mut looked) = (EgressFlips::default(), BTreeSet::new(), 0);
    for egress in differs(before, after).into_iter().chain(differs(after, before)) {
        let callers: BTreeSet<_> = egress.from.iter().flat_map(|set| known_in(known, set, Action::Allow)).collect();
        for range in egress.to.iter().filter_map(|range| range.v4()) {
            let (was, is) = (before.containing(range), after.containing(range));
            let ends: BTreeSet<Stamp> = was.iter().chain(&is).map(|e| e.expires_at).collect();
            let ends = ends.into_iter().filter(|end| *end != Stamp(u64::MAX) && *end > now.committed);
            let moments: Vec<_> =
                std::iter::once((None, now)).chain(ends.map(|at| (Some(at), Moment::at(at)))).collect();
            for source in &callers {
                if looked >= COMPARED_MAX {
                    found.cut_short = true;
                    found.pairs.sort();
                    return found;
                }
                if !seen.insert((*source, range)) {
                    continue;
                }
                found.compared += 1;
                for (at, moment) in &moments {
                    looked += 1;
                    let ports = |of: &Vec<&Egress>| ports_of(of.iter().copied(), source, *moment);
                    let (was, is) = (ports(&was), ports(&is));
                    if was != is {
                        let (opened, closed) = (is.without(&was), was.without(&is));
                        found.pairs.push(EgressFlip { source: (*source).clone(), range, opened, closed, at: *at });
                        break;
                    }
                }
            }
        }
    }
    found.pairs.sort();
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Document, parse};

    fn set(text: &str) -> EgressSet {
        let egress = |document| match document {
            Document::Egress(egress) => egress,
            other => panic!("{other:?}"),
        };
        parse(text).unwrap().into_iter().map(egress).collect()
    }
    fn document(name: &str, from: &str, to: &str, rest: &str) -> String {
        format!(
            "---\nkind: Egress\nmetadata: {{name: {name}}}\nspec: {{from: ['{from}'], to: [{to}], transport: passthrough{rest}}}\n"
        )
    }

    #[test]
    fn overlapping_ranges_add_up() {
        let all = set(&[
            document("a", "spiffe://west/web", "10.0.0.0/8", ", ports: [80]"),
            document("b", "spiffe://west/*", "10.1.0.0/16", ", ports: [443]"),
            document("c", "spiffe://west/db", "0.0.0.0/0", ""),
        ]
        .concat());
        let now = Moment::at(Stamp(1));
        let list = |ports: &[u16]| PortSet::List(ports.iter().copied().collect());
        for (src, to, bits, ports) in [
            ("web", "10.0.0.0", 8, list(&[80])),
            ("web", "10.1.0.0", 16, list(&[80, 443])),
            ("web", "10.1.2.3", 32, list(&[80, 443])),
            ("web", "11.0.0.0", 8, list(&[])),
            ("db", "10.1.0.0", 16, PortSet::All),
            ("other", "10.1.0.0", 16, list(&[443])),
            ("other", "10.0.0.0", 8, list(&[])),
        ] {
            let id = format!("spiffe://west/{src}").parse().unwrap();
            assert_eq!(all.ports(&id, (to.parse().unwrap(), bits), now), ports, "{src} {to}/{bits}");
        }
        let web = "spiffe://west/web".parse().unwrap();
        let rule = |to: &str, port| all.evaluate(&web, to.parse().unwrap(), port, now).map(|e| e.name.as_str());
        assert_eq!([rule("10.1.2.3", 80), rule("10.1.2.3", 443), rule("10.2.2.3", 443)], [Some("a"), Some("b"), None]);
    }

    #[test]
    fn a_change_is_told_by_caller_and_range() {
        let known = ["web", "db"].map(|id| format!("spiffe://west/{id}").parse().unwrap()).into();
        let before = set(&document("a", "spiffe://west/web", "10.0.0.0/8", ", ports: [80]"));
        let after =
            set(&document("a", "spiffe://west/*", "10.0.0.0/8", ", ports: [80, 81], expires: 2030-01-01T00:00:00Z"));
        let found = egress_flips(&before, &after, &known, Moment::at(Stamp(1)));
        let told: Vec<_> =
            found.pairs.iter().map(|f| format!("{} {} {}", f.source.path(), f.opened, f.closed)).collect();
        assert_eq!((told, found.compared), (vec!["/db 80, 81 none".into(), "/web 81 none".into()], 2));
        // That it ends is a change as well.
        let ends =
            set(&document("a", "spiffe://west/web", "10.0.0.0/8", ", ports: [80], expires: 2030-01-01T00:00:00Z"));
        let found = egress_flips(&before, &ends, &known, Moment::at(Stamp(1)));
        assert!(matches!(found.pairs.as_slice(), [f] if f.closed.contains(80) && f.at.is_some()), "{found:?}");
    }
}
