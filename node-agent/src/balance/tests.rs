//! Properties of the choice, over drawn clusters, steers, weights and health.

use super::*;
use crate::view::tests::{slice, view};
use ambit_proto::v1;

fn endpoint(last: u8, cluster: &str, id: &str) -> v1::Endpoint {
    v1::Endpoint {
        spiffe_id: format!("spiffe://{id}"),
        address: format!("10.72.101.{last}"),
        cluster: cluster.into(),
        node_address: "10.72.0.21".into(),
        node: "ab".repeat(32),
        generation: 1,
    }
}

fn cluster(td: &str, name: &str, region: &str, drained: bool) -> v1::ClusterOf {
    v1::ClusterOf { trust_domain: td.into(), cluster: name.into(), region: region.into(), drained }
}

fn steer(from: (&str, &str), to: (&str, &str)) -> v1::Steered {
    let [from_trust_domain, from, to_trust_domain, to] = [from.0, from.1, to.0, to.1].map(str::to_owned);
    let (origin, service) = ("west".into(), "shop".into());
    v1::Steered { origin, service, from_trust_domain, from, to_trust_domain, to }
}

/// West has clusters west, near and far; east has cluster east. The caller's is west, in eu-1 as near and east are.
fn world(spoil: impl FnOnce(&mut v1::Slice)) -> View {
    let mut s = slice();
    s.endpoints = vec![
        endpoint(1, "west", "west/a"),
        endpoint(2, "west", "west/b"),
        endpoint(3, "near", "west/a"),
        endpoint(4, "far", "west/a"),
        endpoint(5, "east", "east/a"),
        endpoint(6, "west", "east/a"),
    ];
    s.clusters = vec![
        cluster("west", "west", "eu-1", false),
        cluster("west", "near", "eu-1", false),
        cluster("east", "east", "eu-1", false),
        cluster("west", "far", "us-1", false),
    ];
    s.services = vec![v1::Service {
        origin: "west".into(),
        name: "shop".into(),
        address: "10.99.0.1".into(),
        port: 80,
        backends: ["west/a", "west/b", "east/a"].map(|id| format!("spiffe://{id}")).into(),
        order: "local-first".into(),
        weights: vec![],
    }];
    spoil(&mut s);
    view(s).unwrap()
}

/// Last bytes of the addresses of each level in use.
fn shown(view: &View, avoided: &[u8]) -> Vec<Vec<u8>> {
    let all = candidates(view, &view.services[0], view.endpoints.values());
    let used = levels(&all, |e| avoided.contains(&last(e)));
    used.iter().map(|(_, of)| of.iter().map(|one| last(one.endpoint)).collect()).collect()
}

fn last(e: &Endpoint) -> u8 {
    let IpAddr::V4(ip) = e.address.ip() else { panic!("IPv4") };
    ip.octets()[3]
}

#[test]
fn the_own_cluster_comes_first_then_its_region_then_the_rest() {
    let as_is = world(|_| ());
    assert_eq!(shown(&as_is, &[]), [vec![1, 2], vec![3, 5], vec![4, 6]], "a peer's cluster `west` is not ours");
    assert_eq!(shown(&as_is, &[1]), [vec![2], vec![3, 5], vec![4, 6]]);
    assert_eq!(shown(&as_is, &[1, 2]), [vec![3, 5], vec![4, 6]], "a level without a healthy one is lost");
    assert_eq!(shown(&as_is, &[1, 2, 3, 4, 5, 6]), [vec![1, 2], vec![3, 5], vec![4, 6]], "all is used before nothing");
    // Where nothing is said of regions, none is shared.
    let nowhere = world(|s| s.clusters.clear());
    assert_eq!(shown(&nowhere, &[]), [vec![1, 2], vec![3, 4, 5, 6]]);
    let elsewhere = world(|s| s.clusters.retain(|c| c.cluster != "west"));
    assert_eq!(shown(&elsewhere, &[]), [vec![1, 2], vec![3, 4, 5, 6]]);
    let first = world(|s| s.services[0].order = "first-backend".into());
    assert_eq!(shown(&first, &[]), [vec![1], vec![3], vec![4], vec![2], vec![5], vec![6]]);
}

#[test]
fn drained_clusters_and_backends_of_weight_0_get_nothing_whoever_is_left() {
    let drained = |s: &mut v1::Slice| s.clusters[0].drained = true;
    assert_eq!(shown(&world(drained), &[]), [vec![3, 5], vec![4, 6]]);
    // Also where everything else is avoided.
    assert_eq!(shown(&world(drained), &[3, 4, 5, 6]), [vec![3, 5], vec![4, 6]]);
    let weightless = world(|s| s.services[0].weights = vec![1, 0, 1]);
    assert_eq!(shown(&weightless, &[]), [vec![1], vec![3, 5], vec![4, 6]]);
    assert!(
        shown(&world(|s| s.clusters.iter_mut().for_each(|c| c.drained = true)), &[]) == [vec![6]],
        "of its cluster nothing was said"
    );
}

#[test]
fn a_cluster_that_stands_in_takes_the_place_and_nothing_falls_back() {
    let over = |s: &mut v1::Slice| s.steers = vec![steer(("west", "west"), ("west", "far"))];
    assert_eq!(shown(&world(over), &[]), [vec![4], vec![3, 5], vec![6]]);
    assert_eq!(
        shown(&world(over), &[3, 4, 5, 6]),
        [vec![4], vec![3, 5], vec![6]],
        "calls never come back by themselves"
    );
    // Whose endpoints all went is stood in for all the same.
    let gone = world(|s| {
        over(s);
        s.endpoints.retain(|e| !e.spiffe_id.starts_with("spiffe://west") || e.cluster != "west");
    });
    assert_eq!(shown(&gone, &[]), [vec![4], vec![3, 5], vec![6]]);
    // Callers nearer to another cluster stay there.
    let other = world(|s| s.steers = vec![steer(("east", "east"), ("west", "far"))]);
    assert_eq!(shown(&other, &[]), [vec![1, 2], vec![3, 4], vec![6]]);
    let of_another = world(|s| {
        over(s);
        s.steers[0].service = "db".into();
    });
    assert_eq!(shown(&of_another, &[]).first(), Some(&vec![1, 2]));
}

#[test]
fn of_a_level_that_is_mostly_avoided_all_is_used() {
    let many = |s: &mut v1::Slice| s.endpoints = (1..=5).map(|n| endpoint(n, "west", "west/a")).collect();
    assert_eq!(shown(&world(many), &[1, 2]), [vec![3, 4, 5]]);
    assert_eq!(shown(&world(many), &[1, 2, 3]), [vec![1, 2, 3, 4, 5]]);
    let two = |s: &mut v1::Slice| s.endpoints = (1..=2).map(|n| endpoint(n, "west", "west/a")).collect();
    assert_eq!(shown(&world(two), &[1]), [vec![2]], "half is not more than half");
}

/// A generator that anybody can repeat.
fn draws(seed: u64) -> impl FnMut(u64) -> u64 {
    let mut state = seed;
    move |below| {
        assert!(below > 0, "drawn below nothing");
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    }
}

#[test]
fn weights_are_of_backends_however_many_endpoints_each_has() {
    // Nine endpoints of a to one of b.
    let view = world(|s| {
        s.endpoints = (1..=9).map(|n| endpoint(n, "west", "west/a")).chain([endpoint(10, "west", "west/b")]).collect();
        s.services[0].weights = vec![90, 10, 1];
    });
    let service = &view.services[0];
    let (mut draw, mut of_b) = (draws(7), 0);
    for _ in 0..10_000 {
        let all = candidates(&view, service, view.endpoints.values());
        // What the kernel chose means nothing where there are weights.
        let first = Some("10.72.101.10".parse().unwrap());
        let tried = order(service, levels(&all, |_| false), first, 3, &mut draw);
        assert_eq!(tried.len(), 3);
        let addresses: BTreeSet<u8> = tried.iter().map(|(_, one)| last(one.endpoint)).collect();
        assert_eq!(addresses.len(), 3, "each once");
        of_b += u32::from(last(tried[0].1.endpoint) == 10);
    }
    assert!((900..1_100).contains(&of_b), "a tenth of 10,000: {of_b}");
}

#[test]
fn without_weights_the_kernels_choice_stands_where_it_is_among_the_nearest() {
    let view = world(|_| ());
    let service = &view.services[0];
    let all = candidates(&view, service, view.endpoints.values());
    let tried = |first: u8, avoided: &[u8], seed| {
        let levels = levels(&all, |e| avoided.contains(&last(e)));
        let first = format!("10.72.101.{first}").parse().ok();
        let order = order(service, levels, first, 3, draws(seed));
        order.iter().map(|(_, one)| last(one.endpoint)).collect::<Vec<_>>()
    };
    for seed in 0..50 {
        assert_eq!(tried(2, &[], seed)[..2], [2, 1], "and the rest of its level before the next");
        assert_ne!(tried(2, &[2], seed)[0], 2);
        assert!([3, 5].contains(&tried(4, &[1, 2], seed)[0]), "it chose what is farther");
    }
}

/// Whatever is said and avoided: nothing drained, weightless or stood in for is used, each endpoint at most once, and where
/// there is any candidate somebody is tried.
#[test]
fn whatever_is_drawn_the_promises_hold() {
    for seed in 0..2_000 {
        let mut draw = draws(seed);
        let clusters = [("west", "west"), ("west", "near"), ("west", "far"), ("east", "east")];
        let view = world(|s| {
            s.clusters.iter_mut().for_each(|c| c.drained = draw(4) == 0);
            s.services[0].weights =
                if draw(2) == 0 { vec![] } else { vec![1 + draw(3) as u32, draw(3) as u32, draw(3) as u32] };
            let (from, to) = (clusters[draw(4) as usize], clusters[draw(4) as usize]);
            s.steers = if from == to { vec![] } else { vec![steer(from, to)] };
        });
        let avoided: Vec<u8> = (1..=6).filter(|_| draw(2) == 0).collect();
        let service = &view.services[0];
        let all = candidates(&view, service, view.endpoints.values());
        let used = levels(&all, |e| avoided.contains(&last(e)));
        let tried = order(service, used.clone(), None, 6, &mut draw);
        let addresses: BTreeSet<u8> = tried.iter().map(|(_, one)| last(one.endpoint)).collect();
        assert_eq!(addresses.len(), tried.len(), "{seed}: each once");
        assert_eq!(all.is_empty(), tried.is_empty(), "{seed}");
        assert!(tried.is_sorted_by_key(|(_, one)| one.level), "{seed}: nearest first");
        for (why, one) in &tried {
            let place = place_of(one.endpoint);
            assert!(!view.routing.clusters.get(&place).is_some_and(|c| c.drained), "{seed}: drained");
            assert!(!view.routing.steers.keys().any(|(_, from)| *from == place), "{seed}: stood in for");
            assert_ne!(service.weights.get(one.backend), Some(&0), "{seed}: no weight");
            let healthy = !avoided.contains(&last(one.endpoint));
            assert!(healthy || *why != Why::Healthy, "{seed}: avoided, and used as healthy");
        }
    }
}
