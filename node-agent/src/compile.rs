//! From a view and the workloads that run here to the kernel's tables. Pure; what is not allowed is simply absent.

mod callers;
mod ranges;

pub use ranges::{NOT_OUTSIDE, all};

use crate::balance::{self, Candidate};
use crate::denials::Denials;
use crate::view::{View, Workload};
use ambit_ebpf::{
    Action, Capacity, MAX_SERVICE_ENDPOINTS, Service, ServiceEndpoint, Tables, Tier, Verdict, VerdictKey,
};
use ambit_model::policy::Endpoint;
use ambit_model::{Address, Moment, NodeId, NumericIdentity, SpiffeId, TrustDomain};
use ambit_policy::PortSet;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

pub use crate::outlier::Unhealthy;

/// Stands behind the address of an endpoint whose node is denied. No workload has this number (their first is 256) and
/// no verdict speaks of it, so the kernel refuses; and an operator who reads the refusal's destination knows why.
pub const DENIED_NODE: NumericIdentity = NumericIdentity(1);

/// What the kernel shall hold for these workloads.
pub fn tables<'a>(
    view: &View,
    denials: &Denials,
    local: impl IntoIterator<Item = &'a Workload>,
    unhealthy: &Unhealthy,
    now: Moment,
) -> Tables {
    tables_within(&Capacity::default(), view, denials, local, unhealthy, now)
}

/// The same for a kernel of this capacity. What is of the own trust domain is told whole, and refused by the kernel where it does
/// not fit; of what peers bring each has a like share of the rest. What does not fit is reached by nobody: no peer keeps
/// the others, or what is ours, out of the kernel.
fn tables_within<'a>(
    capacity: &Capacity,
    view: &View,
    denials: &Denials,
    local: impl IntoIterator<Item = &'a Workload>,
    unhealthy: &Unhealthy,
    now: Moment,
) -> Tables {
    let sources: BTreeMap<&SpiffeId, NumericIdentity> =
        local.into_iter().map(|w| (&w.entry.spiffe_id, w.number)).collect();
    let endpoints = fitting(capacity, view);
    let (denied, reachable): (Vec<_>, Vec<_>) = endpoints.into_iter().partition(|(e, _)| denials.denies_endpoint(e));
    let destinations: BTreeMap<&SpiffeId, NumericIdentity> =
        reachable.iter().map(|(e, number)| (&e.spiffe_id, *number)).collect();
    let (ours, theirs): (Vec<_>, Vec<_>) =
        destinations.into_iter().partition(|(destination, _)| destination.trust_domain() == view.trust_domain);
    let mut verdicts = Vec::new();
    for (destination, to) in ours {
        for (source, from) in &sources {
            verdicts.extend(pair(&view.rules.ports(source, destination, now), *from, to));
        }
    }
    let mut room = Room::of(capacity.verdicts, verdicts.len(), view);
    for (destination, to) in theirs {
        let peer = destination.trust_domain();
        for (source, from) in &sources {
            let of_pair = pair(&view.rules.ports(source, destination, now), *from, to);
            if room.take(&peer, of_pair.len()) {
                verdicts.extend(of_pair);
            }
        }
    }
    room.tell("verdicts");
    let denied = denied.iter().map(|(e, _)| (e.address, DENIED_NODE.0));
    let all: Vec<_> = reachable.iter().map(|(e, number)| (e.address, number.0)).chain(denied).collect();
    let (services, services6) = services(view, &reachable, unhealthy);
    Tables {
        verdicts,
        endpoints: all.iter().filter_map(|(at, number)| Some((at.v4()?, *number))).collect(),
        endpoints6: all.iter().filter_map(|(at, number)| Some((at.v6()?, *number))).collect(),
        services,
        services6,
        ranges: Vec::new(),
        callers: Vec::new(),
    }
}

/// How many entries of a table each peer may still take.
struct Room {
    left: BTreeMap<TrustDomain, usize>,
    left_out: BTreeMap<TrustDomain, usize>,
}

impl Room {
    fn of(capacity: u32, own: usize, view: &View) -> Room {
        let rest = usize::try_from(capacity).unwrap_or(usize::MAX).saturating_sub(own);
        let domains = view.endpoints.values().map(|e| e.spiffe_id.trust_domain());
        let peers: BTreeSet<TrustDomain> = domains.filter(|td| *td != view.trust_domain).collect();
        let share = rest.checked_div(peers.len()).unwrap_or_default();
        let left = peers.into_iter().map(|peer| (peer, share)).collect();
        Room { left, left_out: BTreeMap::new() }
    }

    /// Whether so many entries still fit.
    fn take(&mut self, peer: &TrustDomain, entries: usize) -> bool {
        let left = self.left.get_mut(peer).and_then(|left| left.checked_sub(entries).map(|rest| *left = rest));
        if left.is_none() && entries > 0 {
            *self.left_out.entry(peer.clone()).or_default() += entries;
        }
        left.is_some()
    }

    fn tell(&self, table: &str) {
        for (peer, entries) in &self.left_out {
            tracing::warn!(table, %peer, entries, "more than the peer's share of the kernel's table: left out, and refused");
        }
    }
}

fn fitting<'a>(capacity: &Capacity, view: &'a View) -> Vec<(&'a Endpoint, NumericIdentity)> {
    let (mut fits, theirs): (Vec<_>, Vec<_>) =
        numbered(view).partition(|(e, _)| e.spiffe_id.trust_domain() == view.trust_domain);
    let mut room = Room::of(capacity.endpoints, fits.len(), view);
    fits.extend(theirs.into_iter().filter(|(e, _)| room.take(&e.spiffe_id.trust_domain(), 1)));
    room.tell("endpoints");
    fits
}

/// Endpoints whose identity has a number: without one the kernel cannot name them, so they stay unknown, hence refused.
fn numbered(view: &View) -> impl Iterator<Item = (&Endpoint, NumericIdentity)> {
    view.endpoints.values().filter_map(|e| Some((e, *view.numbers.get(&e.spiffe_id)?)))
}

/// The verdicts of one pair. Port 0 stands for every port; deny wins where it and an exact port differ.
fn pair(ports: &PortSet, from: NumericIdentity, to: NumericIdentity) -> Vec<(VerdictKey, Verdict)> {
    let verdict = |port, action| (VerdictKey { source: from.0, destination: to.0, port }, Verdict { action, rule: 0 });
    match ports {
        PortSet::All => vec![verdict(0, Action::Allow)],
        PortSet::List(ports) => ports.iter().map(|p| verdict(*p, Action::Allow)).collect(),
        PortSet::AllBut(denied) => {
            std::iter::once(verdict(0, Action::Allow)).chain(denied.iter().map(|p| verdict(*p, Action::Deny))).collect()
        }
    }
}

/// Those with an IPv4 address, and those with an IPv6 one.
fn services(
    view: &View,
    reachable: &[(&Endpoint, NumericIdentity)],
    unhealthy: &Unhealthy,
) -> (Vec<Service>, Vec<Service<SocketAddr>>) {
    let mut taken = BTreeSet::new();
    let (mut of_v4, mut of_v6) = (Vec::new(), Vec::new());
    for service in &view.services {
        let address = service.address.at(service.port);
        // Two services at one address: the first by the cell's order stands, as a map holds one. At a workload's
        // address a service would take the calls meant for the workload.
        if view.endpoints.contains_key(&service.address.ip()) || !taken.insert(address) {
            continue;
        }
        let by_ipv6 = by_ipv6(service.address, reachable.iter().map(|(e, _)| *e));
        let behind = reachable.iter().map(|(e, _)| *e).filter(|e| serves(service.address, e, &by_ipv6));
        let candidates = balance::candidates(view, service, behind);
        let choosable = balance::choosable(&candidates, |e| unhealthy.avoids(e.address.ip(), service.port));
        let endpoints = nearest(service, candidates, &choosable)
            .into_iter()
            .filter_map(|(candidate, healthy)| {
                let first = candidate.level.is_first(service.order);
                Some(ServiceEndpoint {
                    address: candidate.endpoint.address.at(service.port),
                    identity: view.numbers.get(&candidate.endpoint.spiffe_id)?.0,
                    tier: if first { Tier::Local } else { Tier::Remote },
                    healthy,
                })
            })
            .collect::<Vec<_>>();
        match address {
            SocketAddr::V6(_) => of_v6.push(Service { address, endpoints }),
            SocketAddr::V4(address) => {
                let endpoints = endpoints.into_iter().filter_map(v4_endpoint).collect();
                of_v4.push(Service { address, endpoints });
            }
        }
    }
    (of_v4, of_v6)
}

/// Workloads by the node that runs them.
pub type Placed<'a> = BTreeSet<(&'a SpiffeId, NodeId)>;

/// Those of these endpoints that a service at an IPv6 address reaches by an IPv6 one.
pub fn by_ipv6<'a>(service: Address, endpoints: impl IntoIterator<Item = &'a Endpoint>) -> Placed<'a> {
    let all = endpoints.into_iter().filter(|e| service.v6().is_some() && e.address.v6().is_some());
    all.map(|e| (&e.spiffe_id, e.node)).collect()
}

/// Endpoints that connections to the service may go to, whoever calls: none of a denied node.
pub fn behind<'a>(view: &'a View, denials: &Denials, service: &ambit_model::Service) -> Vec<Candidate<'a>> {
    let reachable: Vec<&Endpoint> = view.endpoints.values().filter(|e| !denials.denies_endpoint(e)).collect();
    let by_ipv6 = by_ipv6(service.address, reachable.iter().copied());
    let serving = reachable.into_iter().filter(|e| serves(service.address, e, &by_ipv6));
    balance::candidates(view, service, serving)
}

/// By which of its addresses a workload serves a service: IPv4 for IPv4; for IPv6 its own, or where it reported none on that node,
/// its IPv4 one, since it is the agents that carry.
pub fn serves(service: Address, endpoint: &Endpoint, by_ipv6: &Placed<'_>) -> bool {
    match (service.ip(), endpoint.address.ip()) {
        (IpAddr::V4(_), IpAddr::V4(_)) | (IpAddr::V6(_), IpAddr::V6(_)) => true,
        (IpAddr::V4(_), IpAddr::V6(_)) => false,
        (IpAddr::V6(_), IpAddr::V4(_)) => !by_ipv6.contains(&(&endpoint.spiffe_id, endpoint.node)),
    }
}

/// Where there are more than the kernel looks at, the nearest that may be chosen are kept; and whether each may.
fn nearest<'a>(
    service: &ambit_model::Service,
    candidates: Vec<Candidate<'a>>,
    choosable: &BTreeSet<IpAddr>,
) -> Vec<(Candidate<'a>, bool)> {
    let healthy = |one: &Candidate<'_>| choosable.contains(&one.endpoint.address.ip());
    let mut kept: Vec<_> = candidates.into_iter().map(|one| (one, healthy(&one))).collect();
    kept.sort_by_key(|(one, healthy)| (!healthy, one.level, one.endpoint.address));
    kept.truncate(MAX_SERVICE_ENDPOINTS);
    kept.sort_by_key(|(one, _)| (!one.level.is_first(service.order), one.endpoint.address));
    kept
}

fn v4_endpoint(endpoint: ServiceEndpoint<SocketAddr>) -> Option<ServiceEndpoint> {
    let SocketAddr::V4(address) = endpoint.address else { return None };
    let ServiceEndpoint { identity, tier, healthy, .. } = endpoint;
    Some(ServiceEndpoint { address, identity, tier, healthy })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::tests::{pod, slice, view};
    use ambit_proto::v1;

    const NOW: Moment = Moment { committed: ambit_model::Stamp(5), latest: ambit_model::Stamp(9) };

    fn endpoint(id: &str, address: &str, cluster: &str) -> v1::Endpoint {
        v1::Endpoint {
            spiffe_id: id.into(),
            address: address.into(),
            cluster: cluster.into(),
            node_address: "10.72.0.21".into(),
            node: "ab".repeat(32),
            generation: 1,
        }
    }
    fn policy(name: &str, target: &str, action: v1::Action, from: &str, ports: &[u32]) -> v1::Policy {
        v1::Policy {
            origin: target.split('/').nth(2).unwrap().into(),
            name: name.into(),
            target: target.into(),
            action: action as i32,
            from: vec![from.into()],
            ports: ports.to_vec(),
            resolved: true,
            ..Default::default()
        }
    }
    fn compiled(spoil: impl FnOnce(&mut v1::Slice), unhealthy: &[&str]) -> (View, Tables) {
        let mut s = slice();
        s.endpoints = vec![
            endpoint("spiffe://east/db", "10.72.101.11", "east"),
            endpoint("spiffe://west/web-root", "10.71.101.12", "west"),
            endpoint("spiffe://east/unnumbered", "10.72.101.13", "east"),
        ];
        s.policies = vec![policy("a", "spiffe://east/db", v1::Action::Allow, "spiffe://west/*", &[5432])];
        s.services = vec![v1::Service {
            origin: "west".into(),
            name: "db".into(),
            address: "10.99.0.1".into(),
            port: 5432,
            backends: vec!["spiffe://east/db".into(), "spiffe://west/*".into()],
            order: "local-first".into(),
            weights: vec![],
        }];
        spoil(&mut s);
        let view = view(s).unwrap();
        let local = view.workloads(&[pod("web", 1000, 11)]);
        let unhealthy: Unhealthy = unhealthy.iter().map(|a| a.parse::<IpAddr>().unwrap()).collect();
        let tables = tables(&view, &view.denials, local.values(), &unhealthy, NOW);
        (view, tables)
    }
    /// What the kernel's rule makes of the tables: deny wins over allow, nothing is deny.
    fn allows(tables: &Tables, source: u32, destination: u32, port: u16) -> bool {
        let found = |port| {
            let key = VerdictKey { source, destination, port };
            tables.verdicts.iter().find(|(k, _)| *k == key).map(|(_, v)| v.action)
        };
        let both = [found(port), found(0)];
        both.contains(&Some(Action::Allow)) && !both.contains(&Some(Action::Deny))
    }

    #[test]
    fn the_tables_say_what_evaluate_says() {
        let deny = |p: &[u32]| policy("d", "spiffe://east/db", v1::Action::Deny, "spiffe://west/web", p);
        let open = policy("o", "spiffe://east/db", v1::Action::Allow, "spiffe://west/web", &[]);
        for (name, extra) in [
            ("ports", vec![]),
            ("deny one", vec![deny(&[5432])]),
            ("open", vec![open.clone()]),
            ("open but one", vec![open.clone(), deny(&[22])]),
            ("deny all", vec![open, deny(&[])]),
        ] {
            let (view, tables) = compiled(|s| s.policies.extend(extra), &[]);
            let source = "spiffe://west/web".parse().unwrap();
            for destination in ["spiffe://east/db", "spiffe://west/web-root"] {
                let destination = destination.parse().unwrap();
                for port in [22, 80, 5432] {
                    let said = allows(&tables, 256, view.numbers[&destination].0, port);
                    assert_eq!(said, view.policies.evaluate(&source, &destination, port, NOW).allowed, "{name} {port}");
                }
            }
        }
    }

    /// A peer chooses how many endpoints it has, and on how many ports whom may call them.
    #[test]
    fn no_peer_takes_more_than_its_share_of_the_kernel() {
        let ports: Vec<u32> = (1..=10).collect();
        let mut s = slice();
        s.bundles.push(v1::Bundle { trust_domain: "north".into(), sequence: 1, ..v1::Bundle::default() });
        s.endpoints = vec![endpoint("spiffe://west/web-root", "10.71.101.12", "west")];
        for (td, count) in [("east", 50_u8), ("north", 1)] {
            for n in 0..count {
                let id = format!("spiffe://{td}/db{n}");
                s.identities
                    .push(v1::NumericIdentity { spiffe_id: id.clone(), number: 300 + s.identities.len() as u32 });
                s.endpoints.push(endpoint(&id, &format!("10.{}.0.{n}", td.len()), td));
            }
            s.policies.push(policy(td, &format!("spiffe://{td}/*"), v1::Action::Allow, "spiffe://west/web", &ports));
        }
        s.policies.push(policy("own", "spiffe://west/web-root", v1::Action::Allow, "spiffe://west/web", &ports));
        let view = view(s).unwrap();
        let local = view.workloads(&[pod("web", 1000, 11)]);
        let capacity = Capacity { verdicts: 60, endpoints: 41, ..Capacity::default() };
        let tables = tables_within(&capacity, &view, &view.denials, local.values(), &Unhealthy::new(), NOW);
        // 40 places for two peers, and 50 verdicts: two callees of ten ports each, and one of north's.
        assert_eq!(tables.endpoints.len(), 1 + 20 + 1);
        assert_eq!(tables.verdicts.len(), 10 + 20 + 10);
        let number = |id: &str| view.numbers[&id.parse::<SpiffeId>().unwrap()].0;
        for (id, open) in [("west/web-root", true), ("north/db0", true), ("east/db0", true), ("east/db9", false)] {
            assert_eq!(allows(&tables, 256, number(&format!("spiffe://{id}")), 7), open, "{id}");
        }
    }

    #[test]
    fn an_allow_ends_by_the_own_clock_and_a_deny_by_committed_time() {
        let at = |expires_at_ms: u64| {
            let ending = |p: v1::Policy| v1::Policy { expires_at_ms, ..p };
            let allow = policy("b", "spiffe://west/web-root", v1::Action::Allow, "spiffe://west/web", &[80]);
            let deny = policy("d", "spiffe://east/db", v1::Action::Deny, "spiffe://west/web", &[5432]);
            let tables = compiled(|s| s.policies.extend([ending(allow), ending(deny)]), &[]).1;
            (allows(&tables, 256, 257, 80), allows(&tables, 256, 258, 5432))
        };
        // Committed time is 5 here, and the own clock says 9.
        assert_eq!([at(10), at(9), at(6), at(5)], [(true, false), (false, false), (false, false), (false, true)]);
    }

    #[test]
    fn endpoints_of_a_denied_node_are_nobodys_and_serve_no_service() {
        let node = |n: &str| n.repeat(32);
        let deny =
            |td: &str, n: &str, generation| v1::NodeDenial { node: node(n), generation, trust_domain: td.into() };
        let of = |spoil: v1::NodeDenial| {
            compiled(
                |s| {
                    s.endpoints[1].node = node("cd");
                    s.policies.push(policy(
                        "b",
                        "spiffe://west/web-root",
                        v1::Action::Allow,
                        "spiffe://west/*",
                        &[5432],
                    ));
                    s.denials = vec![spoil];
                },
                &[],
            )
            .1
        };
        let behind = |tables: &Tables| tables.endpoints.iter().map(|(_, n)| *n).collect::<BTreeSet<_>>();
        // Another trust domain's word about that node, an earlier generation, a node that runs none of them.
        for none in [deny("west", "ab", 1), deny("east", "ab", 0), deny("east", "cd", 1)] {
            assert_eq!(behind(&of(none)), BTreeSet::from([257, 258]));
        }
        let tables = of(deny("east", "ab", 1));
        assert_eq!(behind(&tables), BTreeSet::from([DENIED_NODE.0, 257]));
        assert!(!allows(&tables, 256, DENIED_NODE.0, 5432) && !allows(&tables, 256, 258, 5432));
        assert!(allows(&tables, 256, 257, 5432), "the other node's endpoint stays");
        let served: Vec<_> = tables.services[0].endpoints.iter().map(|e| e.identity).collect();
        assert_eq!(served, [257]);
    }

    #[test]
    fn unnumbered_endpoints_are_unknown_to_the_kernel() {
        let (_, tables) = compiled(|_| (), &[]);
        assert_eq!(tables.endpoints.len(), 2);
        assert!(!tables.endpoints.iter().any(|(a, _)| *a == std::net::Ipv4Addr::new(10, 72, 101, 13)));
    }

    #[test]
    fn services_prefer_the_own_cluster_and_show_health() {
        let (_, tables) = compiled(|_| (), &["10.71.101.12"]);
        let shown: Vec<_> =
            tables.services[0].endpoints.iter().map(|e| (e.address.to_string(), e.tier, e.healthy)).collect();
        assert_eq!(
            shown,
            [("10.71.101.12:5432".into(), Tier::Local, false), ("10.72.101.11:5432".into(), Tier::Remote, true)]
        );
    }

    #[test]
    fn a_peers_endpoint_is_not_local_whatever_cluster_it_names() {
        let (_, tables) = compiled(|s| s.endpoints[0].cluster = "west".into(), &[]);
        let shown: Vec<_> = tables.services[0].endpoints.iter().map(|e| (e.address.to_string(), e.tier)).collect();
        assert_eq!(shown, [("10.71.101.12:5432".into(), Tier::Local), ("10.72.101.11:5432".into(), Tier::Remote)]);
    }

    #[test]
    fn a_service_at_a_workloads_address_is_left_out() {
        for address in ["10.71.101.12", "10.72.101.13"] {
            let (_, tables) = compiled(|s| s.services[0].address = address.into(), &[]);
            assert_eq!(tables.services, []);
        }
    }

    #[test]
    fn an_endpoint_of_ipv6_has_the_verdicts_of_its_identity_and_serves_services_of_ipv6() {
        let (_, tables) = compiled(
            |s| {
                // The first has both; the second, elsewhere, has no address of IPv6.
                s.endpoints.push(endpoint("spiffe://east/db", "fd72::11", "east"));
                s.endpoints.push(v1::Endpoint {
                    node: "cd".repeat(32),
                    ..endpoint("spiffe://east/db", "10.72.102.14", "east")
                });
                s.endpoints.push(endpoint("spiffe://east/unnumbered", "fd72::13", "east"));
                s.services.push(v1::Service { name: "six".into(), address: "fd99::1".into(), ..s.services[0].clone() });
            },
            &["10.72.102.14"],
        );
        assert_eq!(tables.endpoints6.len(), 1);
        let (address, number) = tables.endpoints6[0];
        assert_eq!(address.to_string(), "fd72::11");
        assert!(allows(&tables, 256, number, 5432) && !allows(&tables, 256, number, 5433));
        let four: Vec<_> = tables.services[0].endpoints.iter().map(|e| (e.address.to_string(), e.healthy)).collect();
        let want = [("10.71.101.12:5432", true), ("10.72.101.11:5432", true), ("10.72.102.14:5432", false)];
        assert_eq!(four, want.map(|(at, healthy)| (at.to_owned(), healthy)));
        let six: Vec<_> = tables.services6[0].endpoints.iter().map(|e| (e.address.to_string(), e.healthy)).collect();
        let want = [("10.71.101.12:5432", true), ("10.72.102.14:5432", false), ("[fd72::11]:5432", true)];
        assert_eq!(six, want.map(|(at, healthy)| (at.to_owned(), healthy)));
    }

    #[test]
    fn no_policy_compiles_to_no_verdict() {
        let (_, tables) = compiled(|s| s.policies.clear(), &[]);
        assert!(tables.verdicts.is_empty());
    }
}
