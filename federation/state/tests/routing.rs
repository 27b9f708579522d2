//! Regions, drains and clusters that stand in for others: whose word counts for whom, and what peers and agents hear of it.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

mod common;

use ambit_model::policy::Endpoint;
use ambit_model::record::{Head, Kind, Record};
use ambit_model::routing::{ClusterTraits, Place, Routing, Steer, Versioned};
use ambit_model::{Act, Code, Generation, Refusal, Stamp, TrustDomain};
use ambit_state::routing::{Route, RouteChange, Services};
use ambit_state::{Command, State};
use common::documents::apply;
use common::{Cell, admission, cluster, code, entry, node};
use std::collections::BTreeSet;

fn td(name: &str) -> TrustDomain {
    name.parse().unwrap()
}

fn place(of: &str, name: &str) -> Place {
    (td(of), cluster(name))
}

/// `west` with clusters `west` and `prod`, nodes in both that run `db`, a service of its own over west and east, and an
/// approved peer `east`, as far as it said so far.
fn west() -> Cell {
    let mut west = Cell::founded("west");
    west.run(Command::RegisterCluster(cluster("prod"), vec![(common::ROOT.to_vec(), "lab".into())], 10_000)).unwrap();
    west.run(Command::AllowEk(cluster("west"), vec![node(1), node(2)])).unwrap();
    for n in [1, 2] {
        let admit = admission(&west, n, n, None);
        west.run(Command::AdmitNode(admit)).unwrap();
    }
    west.run(Command::CreateEntries(vec![entry("db", "west")])).unwrap();
    let endpoint = Endpoint {
        spiffe_id: "spiffe://west/db".parse().unwrap(),
        address: [10, 1, 0, 1].into(),
        cluster: cluster("west"),
        node_address: [10, 1, 1, 1].into(),
        node: node(1),
        generation: Generation(1),
    };
    west.run(Command::ReportEndpoints(node(1), vec![endpoint])).unwrap();
    west.run(Command::PutPeer(td("east"), common::pending(), None)).unwrap();
    west.run(Command::ApprovePeer(td("east"), [7; 32])).unwrap();
    apply(
        &mut west,
        "kind: Service\nmetadata: {name: shop}\nspec: {address: 10.9.9.1, port: 80, backends: [spiffe://west/db, spiffe://east/db]}",
    )
    .unwrap();
    let (row, address) = (common::endpoint_of_east("db", "east", 5), "10.9.0.5".to_owned());
    import(&mut west, vec![said("east", None), (Kind::Endpoint, address, postcard::to_stdvec(&row).unwrap())]);
    west
}

/// A record of a cluster of east, as former releases have it, or with traits.
fn said(name: &str, traits: Option<ClusterTraits>) -> (Kind, String, Vec<u8>) {
    let mut payload = postcard::to_stdvec(&td("east")).unwrap();
    if let Some(traits) = traits {
        payload.extend(postcard::to_stdvec(&Versioned::V1(traits)).unwrap());
    }
    (Kind::Cluster, name.to_owned(), payload)
}

fn import(west: &mut Cell, records: Vec<(Kind, String, Vec<u8>)>) {
    let (_, peer) = west.state.peers().find(|(of, _)| of.as_str() == "east").unwrap();
    let (mut seq, mut prev_hash, mut out) = (peer.seq, peer.hash, Vec::new());
    for (kind, key, payload) in records {
        seq += 1;
        let record = Record { origin: td("east"), epoch: 1, seq, prev_hash, kind, key, payload };
        prev_hash = record.hash();
        out.push(record);
    }
    let head = Head { origin: td("east"), epoch: 1, seq, hash: prev_hash, stamp: Stamp(1), nonce: [0; 16] };
    west.run(Command::Import(head, out)).unwrap();
}

fn route(cell: &mut Cell, route: Route) -> Result<(), Refusal> {
    let change = RouteChange { route, by: "ann".into(), note: "why".into() };
    cell.run(Command::Route(Box::new(change))).map(drop)
}

fn drain(cell: &mut Cell, name: &str, drained: bool) -> Result<(), Refusal> {
    route(cell, Route::Drain(cluster(name), drained))
}

fn fail_over(cell: &mut Cell, services: Services, from: &str, to: &str) -> Result<(), Refusal> {
    route(cell, Route::FailOver { services, from: cluster(from), to: cluster(to) })
}

fn fail_back(cell: &mut Cell, services: Services, from: &str) -> Result<(), Refusal> {
    route(cell, Route::FailBack { services, from: cluster(from) })
}

fn shop() -> Services {
    Services::These(vec![(td("west"), "shop".parse().unwrap())])
}

fn drained(state: &State) -> BTreeSet<Place> {
    let of = state.routing().clusters.into_iter();
    of.filter(|(_, traits)| traits.drained).map(|(place, _)| place).collect()
}

/// What is exported after record `after`, by kind and key.
fn exported(cell: &Cell, after: u64) -> Vec<Record> {
    cell.state.records_after(after).cloned().collect()
}

#[test]
fn a_region_and_a_drain_of_an_own_cluster_are_told_to_peers_and_nodes_with_who_when_and_why() {
    let mut west = west();
    let before = west.state.cell().unwrap().export_seq;
    route(&mut west, Route::Region(cluster("prod"), Some("eu-1".parse().unwrap()))).unwrap();
    drain(&mut west, "prod", true).unwrap();
    // The same once more is nothing new.
    drain(&mut west, "prod", true).unwrap();
    let records = exported(&west, before);
    assert_eq!(records.iter().map(|r| (r.kind, r.key.as_str())).collect::<Vec<_>>(), [(Kind::Cluster, "prod"); 2]);
    // Former releases read the key; what they may have read begins as it did.
    let (owner, rest) = postcard::take_from_bytes::<TrustDomain>(&records[1].payload).unwrap();
    let told: Versioned<ClusterTraits> = postcard::from_bytes(rest).unwrap();
    assert_eq!(owner, td("west"));
    let traits = told.get();
    assert_eq!((traits.version, traits.drained, traits.region.as_ref().unwrap().as_str()), (2, true, "eu-1"));
    assert_eq!(
        (traits.word.by.as_str(), traits.word.stamp, traits.word.note.as_str()),
        ("ann", Stamp(1_000_000), "why")
    );
    let slice = west.state.slice(&node(1)).unwrap().routing;
    assert!(slice.clusters[&place("west", "prod")].drained && slice == west.state.routing());
    drain(&mut west, "prod", false).unwrap();
    assert!(drained(&west.state).is_empty());
    assert_eq!(west.state.routing().clusters.len(), 1, "the region stays");
    route(&mut west, Route::Region(cluster("prod"), None)).unwrap();
    assert_eq!(west.state.routing(), Routing::default());
    for bad in [Route::Region(cluster("east"), None), Route::Region(cluster("nobody"), None)] {
        let want =
            if matches!(&bad, Route::Region(c, _) if c.as_str() == "east") { Code::NotOwner } else { Code::NotFound };
        assert_eq!(code(route(&mut west, bad)), want);
    }
    let long = RouteChange { route: Route::Drain(cluster("prod"), true), by: "ann".into(), note: "x".repeat(201) };
    assert_eq!(code(west.run(Command::Route(Box::new(long)))), Code::BadRequest);
}

#[test]
fn a_word_about_a_peers_cluster_is_for_the_callers_here_and_the_peers_own_counts_too() {
    let mut west = west();
    let before = west.state.cell().unwrap().export_seq;
    drain(&mut west, "east", true).unwrap();
    assert_eq!(drained(&west.state), [place("east", "east")].into());
    assert_eq!(exported(&west, before), [], "nobody else hears of it");
    let traits =
        ClusterTraits { version: 1, drained: true, region: Some("eu-1".parse().unwrap()), ..Default::default() };
    import(&mut west, vec![said("east", Some(traits.clone()))]);
    drain(&mut west, "east", false).unwrap();
    assert_eq!(drained(&west.state), [place("east", "east")].into(), "its own word stands");
    import(&mut west, vec![said("east", Some(ClusterTraits { version: 2, drained: false, ..traits.clone() }))]);
    assert!(drained(&west.state).is_empty());
    assert_eq!(west.state.routing().clusters[&place("east", "east")].region, traits.region);
    // What it says of a name that is not its own counts for nothing, nor does what no release says yet.
    import(&mut west, vec![said("prod", Some(traits.clone()))]);
    let (kind, key, mut payload) = said("east", Some(traits));
    payload[1 + "east".len()] = 9;
    import(&mut west, vec![(kind, key, payload)]);
    assert!(drained(&west.state).is_empty());
    // A peer that is removed leaves nothing.
    west.run(Command::SuspendPeer(td("east"), "ann".into())).unwrap();
    west.run(Command::Act { act: Act::RemoveTrustDomain(td("east")), approved: None, by: "ann".into() }).unwrap();
    assert_eq!(west.state.routing(), Routing::default());
}

#[test]
fn a_service_is_failed_over_and_back_by_verbs_alone() {
    let mut west = west();
    let before = west.state.cell().unwrap().export_seq;
    for (services, from, to, want) in [
        (shop(), "west", "west", Code::BadRequest),
        (shop(), "west", "nobody", Code::NotFound),
        // Nobody of it runs there.
        (shop(), "west", "prod", Code::NotFound),
        (Services::These(vec![(td("west"), "none".parse().unwrap())]), "west", "east", Code::NotFound),
        (Services::These(vec![]), "west", "east", Code::BadRequest),
        (Services::All, "west", "prod", Code::NotFound),
    ] {
        assert_eq!(code(fail_over(&mut west, services, from, to)), want, "{from} to {to}");
    }
    assert_eq!(code(fail_back(&mut west, Services::All, "west")), Code::NotFound);
    fail_over(&mut west, Services::All, "west", "east").unwrap();
    let steered = |cell: &Cell| cell.state.routing().steers.into_iter().collect::<Vec<_>>();
    let name = (td("west"), "shop".parse().unwrap());
    assert_eq!(steered(&west), [((name.clone(), place("west", "west")), place("east", "east"))]);
    assert_eq!(west.state.slice(&node(2)).unwrap().routing, west.state.routing());
    // In a circle nobody would be left.
    let circle = fail_over(&mut west, shop(), "east", "west").unwrap_err();
    assert!(circle.found.contains("east -> west -> east"), "{circle}");
    // Nothing but the verb takes it back: not that there is nothing left to go to.
    import(&mut west, vec![(Kind::Endpoint, "10.9.0.5".into(), vec![])]);
    assert_eq!(steered(&west).len(), 1);
    fail_back(&mut west, shop(), "west").unwrap();
    assert_eq!(steered(&west), []);
    assert_eq!(code(fail_back(&mut west, shop(), "west")), Code::NotFound);
    let records = exported(&west, before);
    assert_eq!(
        records.iter().map(|r| (r.kind, r.key.as_str())).collect::<Vec<_>>(),
        [(Kind::Steer, "shop/west/west"); 2]
    );
    let versions = records.iter().map(|r| postcard::from_bytes::<Versioned<Steer>>(&r.payload).unwrap().get().version);
    assert_eq!(versions.collect::<Vec<_>>(), [1, 2]);
}

#[test]
fn of_two_words_about_a_peers_service_the_own_counts_for_the_callers_here() {
    let mut west = west();
    let steer = |to: &str, version| Steer { version, to: Some(place("east", to)), word: Default::default() };
    let record = |steer: &Steer| {
        (Kind::Steer, "web/east/east".to_owned(), postcard::to_stdvec(&Versioned::V1(steer.clone())).unwrap())
    };
    let service = ambit_policy::parse(
        "kind: Service\nmetadata: {name: web}\nspec: {address: 10.9.9.2, port: 80, backends: [spiffe://west/db, spiffe://east/db]}",
    );
    let ambit_policy::Document::Service(service) = service.unwrap().remove(0) else { panic!("a service") };
    import(
        &mut west,
        vec![(Kind::Service, "web".into(), postcard::to_stdvec(&service).unwrap()), record(&steer("standby", 1))],
    );
    let to = |cell: &Cell| cell.state.routing().steers.into_values().collect::<Vec<_>>();
    assert_eq!(to(&west), [place("east", "standby")]);
    let before = west.state.cell().unwrap().export_seq;
    let web = || Services::These(vec![(td("east"), "web".parse().unwrap())]);
    fail_over(&mut west, web(), "east", "west").unwrap();
    assert_eq!(to(&west), [place("west", "west")]);
    fail_back(&mut west, web(), "east").unwrap();
    assert_eq!(to(&west), [place("east", "standby")], "its own word stands");
    assert_eq!(exported(&west, before), [], "nobody else hears of it");
    let back = Steer { to: None, ..steer("standby", 2) };
    import(&mut west, vec![record(&back)]);
    assert_eq!(to(&west), []);
    assert_eq!(west.state.steers().count(), 2, "who said it last stays known");
}

#[test]
fn rows_come_back_from_a_snapshot() {
    let mut west = west();
    drain(&mut west, "prod", true).unwrap();
    fail_over(&mut west, Services::All, "west", "east").unwrap();
    let again = State::import(west.state.export()).unwrap();
    assert_eq!((again.routing(), again.digest()), (west.state.routing(), west.state.digest()));
    assert_ne!(again.routing(), Routing::default());
}

/// Two operators who are cut from each other send calls in opposite directions: calls still go somewhere.
#[test]
fn what_a_peer_says_never_leads_calls_round() {
    let mut west = west();
    fail_over(&mut west, shop(), "west", "east").unwrap();
    let own: Vec<_> = west.state.routing().steers.into_iter().collect();
    assert_eq!(own.len(), 1);
    // East's word is about east's own services only; west's shop is not: so here a service of east's, and west's word on it.
    let service = || Services::These(vec![(td("east"), "shop".parse().unwrap())]);
    let shop = ambit_model::policy::Service {
        name: "shop".parse().unwrap(),
        address: std::net::Ipv4Addr::new(10, 9, 9, 2).into(),
        port: 80,
        backends: vec!["spiffe://west/db".parse().unwrap(), "spiffe://east/db".parse().unwrap()],
        order: Default::default(),
        weights: Vec::new(),
    };
    let steer = Steer { version: 1, to: Some(place("east", "east")), word: Default::default() };
    import(&mut west, vec![(Kind::Service, "shop".into(), postcard::to_stdvec(&shop).unwrap())]);
    fail_over(&mut west, service(), "east", "west").unwrap();
    let key = "shop/west/west".to_owned();
    import(&mut west, vec![(Kind::Steer, key, postcard::to_stdvec(&Versioned::V1(steer)).unwrap())]);
    let of_easts = west.state.routing().steers.into_iter().filter(|((service, _), _)| service.0 == td("east"));
    let of_easts: Vec<_> = of_easts.map(|((_, from), to)| (from, to)).collect();
    assert_eq!(of_easts, [(place("east", "east"), place("west", "west"))], "the own word, and not the other way round");
}
