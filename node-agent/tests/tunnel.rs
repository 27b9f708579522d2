//! Tunnels between two agents' carrying halves over loopback: real SVIDs of two trust domains, real TLS, real sockets
//! in a namespace entered by setns. What the kernel part would say of a captured connection is an argument.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use ambit_agent::clock::Clock;
use ambit_agent::denials::Denials;
use ambit_agent::hbone::{Dialed, Mode, TunnelError};
use ambit_agent::inbound::Inbound;
use ambit_agent::issued::Svid;
use ambit_agent::metrics::METRICS;
use ambit_agent::netns::NetnsThread;
use ambit_agent::outbound::{Captured, Outbound};
use ambit_agent::said::Said;
use ambit_agent::staleness::Worth;
use ambit_identity::svid::Presented;
use ambit_model::Revision;
use ambit_proto::v1;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::sync::Arc;
use std::time::{Duration, Instant};
use support::stage::{SOON, Stage, is_reset, plane, round_trip};
use support::{Cell, allow};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

#[tokio::test]
async fn an_allowed_call_is_carried_both_ways_with_half_close() {
    let stage = Stage::set(1).await;
    let mut app = stage.call_db().await;
    let (mut pod, from) = stage.served().await;
    let SocketAddr::V4(from) = from else { panic!("IPv4") };
    assert!(from.ip().is_loopback() && from.ip().octets()[1] >= 64, "the last leg comes from 127/8: {from}");
    round_trip(&mut app, &mut pod, 3 * 1024 * 1024).await;
    // The application is done sending; the pod still answers, then ends.
    app.shutdown().await.unwrap();
    assert_eq!(timeout(SOON, pod.read(&mut [0; 16])).await.expect("FIN crosses").unwrap(), 0);
    pod.write_all(b"late").await.unwrap();
    pod.shutdown().await.unwrap();
    let mut rest = Vec::new();
    timeout(SOON, app.read_to_end(&mut rest)).await.unwrap().unwrap();
    assert_eq!(rest, b"late");
    // A second call goes through the same tunnel.
    let mut again = stage.call_db().await;
    let (mut pod, _) = stage.served().await;
    round_trip(&mut again, &mut pod, 10).await;
    assert_eq!(stage.outbound.tunnels(), 1);
    drop(pod);
    assert_eq!(timeout(SOON, again.read(&mut [0; 1])).await.unwrap().unwrap_or(0), 0);
}

#[tokio::test]
async fn the_receiver_decides_again_and_cuts_what_it_no_longer_allows() {
    let mut stage = Stage::set(2).await;
    let mut app = stage.call_db().await;
    let (mut pod, _) = stage.served().await;
    round_trip(&mut app, &mut pod, 10).await;
    // East withdraws its policy; west has not heard of it.
    stage.publish(|_| (), |e| e.policies.clear());
    assert!(is_reset(app).await, "the live connection is cut");
    assert!(is_reset(stage.call_db().await).await, "a new one is refused");
    // The endpoint is as healthy as before: a refusal is no failure.
    assert!(stage.health.unhealthy().is_empty());
    stage.publish(|_| (), |_| ());
    let mut app = stage.call_db().await;
    let (mut pod, _) = stage.served().await;
    round_trip(&mut app, &mut pod, 10).await;
}

#[tokio::test]
async fn leaves_of_a_denied_node_are_refused_until_a_new_generation() {
    let mut stage = Stage::set(3).await;
    let node = stage.west.node().to_string();
    let deny = |td: &str, generation| v1::NodeDenial { node: node.clone(), generation, trust_domain: td.into() };
    let mut app = stage.call_db().await;
    let mut served = stage.served().await;
    // The word of another trust domain about that node id is none about west's node.
    stage.publish(|_| (), |e| e.denials = vec![deny("east", 1)]);
    round_trip(&mut app, &mut served.0, 10).await;
    let mut again = stage.call_db().await;
    let (mut pod, _) = stage.served().await;
    round_trip(&mut again, &mut pod, 10).await;
    stage.publish(|_| (), |e| e.denials = vec![deny("west", 1)]);
    assert!(is_reset(app).await, "the live connection is cut");
    assert!(is_reset(stage.call_db().await).await);
    // A denial of generation 0 does not concern leaves of generation 1.
    stage.publish(|_| (), |e| e.denials = vec![deny("west", 0)]);
    let mut app = stage.call_db().await;
    let (mut pod, _) = stage.served().await;
    round_trip(&mut app, &mut pod, 10).await;
}

/// web's own key and SVID in a tunnel from this address, and the answer to a CONNECT to db: none where the tunnel is refused.
async fn asked_from(stage: &Stage, from: Ipv4Addr) -> Option<http::StatusCode> {
    let Dialed::Hbone(tunnel) = stage.dial(from, Mode::Hbone).await.ok()? else { panic!("it was asked in HBONE") };
    match tunnel.lease()?.open(stage.db_at(), &Said::default()).await {
        Ok(_) => Some(http::StatusCode::OK),
        Err(TunnelError::Refused(code)) => Some(code),
        Err(_) => None,
    }
}

#[tokio::test]
async fn a_key_copied_to_another_node_is_refused_there_and_good_at_home() {
    let mut stage = Stage::set(17).await;
    let (home, elsewhere) = (stage.home, Ipv4Addr::new(127, 0, 75, 17));
    assert_eq!(asked_from(&stage, home).await, Some(http::StatusCode::OK));
    assert_eq!(asked_from(&stage, elsewhere).await, None, "the same SVID and key");
    assert!(METRICS.handshakes.value(["failed", "node_address_mismatch"]) > 0.0, "already in the handshake");
    // Of another node, of another trust domain, of a later admission only, or none: it says nothing of this one.
    let good = stage.caller(1, &home.to_string());
    for wrong in [
        vec![v1::NodeAddress { node: "cd".repeat(32), ..good.clone() }],
        vec![v1::NodeAddress { trust_domain: "east".into(), ..good.clone() }],
        vec![v1::NodeAddress { generation: 2, ..good.clone() }],
        vec![],
    ] {
        stage.publish(|_| (), |e| e.callers.clone_from(&wrong));
        assert_eq!(asked_from(&stage, home).await, None, "{wrong:?}");
    }
    // An earlier admission registered it, and nothing was heard since.
    stage.publish(|_| (), |e| e.callers = vec![v1::NodeAddress { generation: 0, ..good.clone() }]);
    assert_eq!(asked_from(&stage, home).await, Some(http::StatusCode::OK));
}

#[tokio::test]
async fn a_callee_whose_svid_is_of_another_node_or_of_none_is_refused_by_the_caller() {
    let mut stage = Stage::set(20).await;
    let refused = || METRICS.handshakes.value(["failed", "other_node"]);
    let (own, other) = (stage.east.node().to_string(), "cd".repeat(32));
    let (bound, unbound) = (stage.db_svid.clone(), stage.east.unbound_svid("db"));
    // What the slice says of the endpoint's node, against what its agent shows: an SVID of its first admission.
    for (what, node, generation, svid, carried) in [
        ("its own", &own, 1, &bound, true),
        // A pod that started under a later admission is shown by the SVID that was held already.
        ("its own, reported later", &own, 2, &bound, true),
        ("another node's", &other, 1, &bound, false),
        // Of a generation of its own: a tunnel that was opened to the former ones would serve.
        ("no node's", &own, 3, &unbound, false),
    ] {
        stage.db_svid = svid.clone();
        stage.publish(|w| (w.endpoints[0].node, w.endpoints[0].generation) = (node.clone(), generation), |_| ());
        let before = refused();
        let mut app = stage.call_db().await;
        if carried {
            let (mut pod, _) = stage.served().await;
            round_trip(&mut app, &mut pod, 10).await;
        } else {
            assert!(is_reset(app).await, "{what}");
            assert!(
                timeout(Duration::from_millis(200), stage.db.accept()).await.is_err(),
                "{what}: the pod saw nothing"
            );
            assert_eq!(stage.health.unhealthy().into_iter().collect::<Vec<_>>(), [*stage.db_at().ip()], "{what}");
            assert!(refused() > before, "{what}: counted");
        }
    }
    // Nor does a probe take it for healthy.
    let probe = stage.probe();
    tokio::time::sleep(Duration::from_millis(1200)).await;
    assert_eq!(stage.health.unhealthy().len(), 1);
    stage.db_svid = bound;
    stage.publish(|_| (), |_| ());
    stage.healthy().await;
    probe.abort();
}

#[tokio::test]
async fn a_callee_whose_svid_is_of_a_denied_admission_is_refused_where_its_node_is_in_again() {
    let mut stage = Stage::set(21).await;
    let again = |w: &mut v1::Slice| w.endpoints[0].generation = 2;
    stage.publish(again, |_| ());
    let mut app = stage.call_db().await;
    let (mut pod, _) = stage.served().await;
    round_trip(&mut app, &mut pod, 10).await;
    // The endpoint is of the second admission; whoever shows what was certified under the first is not its agent.
    assert!(stage.west_denials.offer(list(2, "west", &stage.east, 1)));
    round_trip(&mut app, &mut pod, 10).await;
    assert!(stage.west_denials.offer(list(3, "east", &stage.east, 1)));
    assert!(is_reset(app).await, "the live connection is cut");
    no_tunnel(&stage.outbound).await;
    assert!(is_reset(stage.call_db().await).await, "a new one is refused");
    assert!(timeout(Duration::from_millis(200), stage.db.accept()).await.is_err(), "the pod saw nothing");
}

#[tokio::test]
async fn a_service_is_called_elsewhere_where_the_chosen_endpoint_shows_another_nodes_svid() {
    let mut stage = Stage::set(22).await;
    let copied = Ipv4Addr::new(127, 0, 79, 22);
    let service = SocketAddrV4::new(Ipv4Addr::new(10, 99, 0, 1), stage.db_at().port());
    let at = stage.hbone.ip().to_string();
    let bad = v1::Endpoint { address: copied.to_string(), node: "cd".repeat(32), ..stage.endpoint(&at) };
    let found = v1::Service {
        origin: "east".into(),
        name: "db".into(),
        address: service.ip().to_string(),
        port: u32::from(service.port()),
        backends: vec!["spiffe://east/db".into()],
        order: "local-first".into(),
        weights: vec![],
    };
    stage.publish(
        |w| {
            w.endpoints.push(bad);
            w.services = vec![found];
        },
        |_| (),
    );
    let chosen = SocketAddrV4::new(copied, service.port());
    let mut app = stage.call(Some(Captured { asked: service.into(), endpoint: chosen.into() })).await;
    let (mut pod, _) = stage.served().await;
    round_trip(&mut app, &mut pod, 10).await;
    assert_eq!(stage.health.unhealthy().into_iter().collect::<Vec<_>>(), [copied]);
}

#[tokio::test]
async fn a_listener_of_both_families_knows_an_address_by_its_mapped_form() {
    let stage = Stage::set(18).await;
    let both = TcpListener::bind("[::]:0").await.expect("IPv6 on this machine");
    let at = SocketAddr::from((Ipv4Addr::new(127, 0, 78, 18), both.local_addr().unwrap().port()));
    let (clock, netns) = (Arc::new(Clock::default()), NetnsThread::start().unwrap());
    tokio::spawn(Inbound::new(stage.east_plane.subscribe(), stage.east_denials.clone(), netns, clock).serve(both));
    let stage = Stage { hbone: at, ..stage };
    assert_eq!(asked_from(&stage, stage.home).await, Some(http::StatusCode::OK));
    assert_eq!(asked_from(&stage, Ipv4Addr::new(127, 0, 75, 18)).await, None);
}

#[tokio::test]
async fn tunnels_of_a_node_that_moved_or_went_are_cut_and_the_moved_node_gets_through() {
    let mut stage = Stage::set(19).await;
    for moved in [Some(Ipv4Addr::new(127, 0, 75, 19)), None] {
        let mut app = stage.call_db().await;
        let (mut pod, from) = stage.served().await;
        round_trip(&mut app, &mut pod, 10).await;
        assert_eq!(stage.outbound.tunnels(), 1, "{from}");
        let callers: Vec<_> = moved.iter().map(|at| stage.caller(1, &at.to_string())).collect();
        stage.publish(|_| (), |e| e.callers = callers);
        assert!(is_reset(app).await, "the live connection is cut");
        assert!(timeout(SOON, pod.read(&mut [0; 1])).await.expect("the pod sees an end").is_err());
        no_tunnel(&stage.outbound).await;
        assert!(is_reset(stage.call_db().await).await, "and from there none is opened");
        if let Some(at) = moved {
            // As its agent does that starts anew, with the new address.
            stage.home = at;
            stage.publish(|_| (), |_| ());
        }
    }
}

async fn no_tunnel(outbound: &Outbound) {
    let gone = async {
        while outbound.tunnels() > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(Duration::from_secs(1), gone).await.expect("tunnels end");
}

/// One denial, as the cell's list of this revision.
fn list(revision: u64, td: &str, cell: &Cell, generation: u64) -> Denials {
    let denial = v1::NodeDenial { node: cell.node().to_string(), generation, trust_domain: td.into() };
    Denials::parse(Revision(revision), &[denial], &[]).unwrap()
}

#[tokio::test]
async fn the_receiver_cuts_a_denied_caller_at_once_and_gives_it_no_tunnel() {
    let stage = Stage::set(8).await;
    let mut app = stage.call_db().await;
    let (mut pod, _) = stage.served().await;
    round_trip(&mut app, &mut pod, 10).await;
    assert_eq!(stage.outbound.tunnels(), 1);
    // The list alone: no slice, no new plane.
    let begun = Instant::now();
    assert!(stage.east_denials.offer(list(2, "west", &stage.west, 1)));
    assert!(is_reset(app).await && begun.elapsed() < Duration::from_millis(500), "{:?}", begun.elapsed());
    assert!(timeout(SOON, pod.read(&mut [0; 1])).await.expect("the pod sees an end").is_err());
    // An idle tunnel of a denied node is ended too.
    no_tunnel(&stage.outbound).await;
    assert!(is_reset(stage.call_db().await).await, "a new one is refused");
    assert!(METRICS.handshakes.value(["failed", "node_untrusted"]) > 0.0, "already in the handshake");
    assert!(!stage.east_denials.offer(list(1, "west", &stage.west, 0)), "an older list");
    assert!(is_reset(stage.call_db().await).await);
    assert!(timeout(Duration::from_millis(200), stage.db.accept()).await.is_err(), "the pod saw nothing");
    assert!(stage.east_denials.offer(list(3, "west", &stage.west, 0)));
    let mut app = stage.call_db().await;
    let (mut pod, _) = stage.served().await;
    round_trip(&mut app, &mut pod, 10).await;
}

#[tokio::test]
async fn the_caller_cuts_and_opens_nothing_to_a_denied_node() {
    let stage = Stage::set(9).await;
    let mut app = stage.call_db().await;
    let mut served = stage.served().await;
    round_trip(&mut app, &mut served.0, 10).await;
    // The word of another trust domain about that node id is none about east's node.
    assert!(stage.west_denials.offer(list(2, "west", &stage.east, 1)));
    round_trip(&mut app, &mut served.0, 10).await;
    assert!(stage.west_denials.offer(list(3, "east", &stage.east, 1)));
    assert!(is_reset(app).await, "the live connection is cut");
    no_tunnel(&stage.outbound).await;
    assert!(is_reset(stage.call_db().await).await, "a new one is refused");
    assert!(timeout(Duration::from_millis(200), stage.db.accept()).await.is_err(), "the pod saw nothing");
    assert!(stage.health.unhealthy().is_empty(), "a denied node is not a broken tunnel");
    assert!(stage.west_denials.offer(list(4, "east", &stage.east, 0)));
    let mut app = stage.call_db().await;
    let (mut pod, _) = stage.served().await;
    round_trip(&mut app, &mut pod, 10).await;
    // This node itself is put out: nothing of its own goes on either.
    stage.west_denials.set_out(true);
    assert!(is_reset(app).await);
    assert!(is_reset(stage.call_db().await).await);
    stage.west_denials.set_out(false);
    let mut app = stage.call_db().await;
    let (mut pod, _) = stage.served().await;
    round_trip(&mut app, &mut pod, 10).await;
}

/// Both ends tell who called whom, and what came of it.
#[tokio::test]
async fn both_nodes_tell_who_called_whom() {
    let mut stage = Stage::set(24).await;
    for _ in 0..2 {
        let mut app = stage.call_db().await;
        let (mut pod, _) = stage.served().await;
        round_trip(&mut app, &mut pod, 10).await;
    }
    let told = |stage: &Stage| {
        stage.seen.each_ref().map(|seen| {
            let flows = seen.take().map(|told| told.flows).unwrap_or_default();
            let row = |f: &v1::SeenFlow| {
                assert_eq!((f.source.as_str(), f.destination.as_str()), ("spiffe://west/web", "spiffe://east/db"));
                (f.port, f.allowed, f.times)
            };
            flows.iter().map(row).collect::<Vec<_>>()
        })
    };
    let port = u32::from(stage.db_at().port());
    assert_eq!(told(&stage), [vec![(port, true, 2)], vec![(port, true, 2)]]);
    stage.publish(|_| (), |slice| slice.policies.clear());
    assert!(is_reset(stage.call_db().await).await);
    // The caller's node has refused nothing: why the other one did it does not know.
    assert_eq!(told(&stage), [vec![], vec![(port, false, 1)]]);
}

/// A node that did not hear its cell for too long takes no connection more; where it is strict, none goes on.
#[tokio::test]
async fn a_stale_node_takes_no_new_connection_and_a_strict_one_ends_the_open_ones() {
    let stage = Stage::set(23).await;
    let mut app = stage.call_db().await;
    let mut served = stage.served().await;
    round_trip(&mut app, &mut served.0, 10).await;
    assert!(stage.east_denials.set_worth(Worth::Open) && !stage.east_denials.set_worth(Worth::Open));
    round_trip(&mut app, &mut served.0, 10).await;
    assert!(is_reset(stage.call_db().await).await, "a new one is refused");
    assert!(timeout(Duration::from_millis(200), stage.db.accept()).await.is_err(), "the pod saw nothing");
    // Of the caller's node, new ones are refused by the kernel; but a SYN may come long after its connect().
    stage.east_denials.set_worth(Worth::All);
    stage.west_denials.set_worth(Worth::Open);
    round_trip(&mut app, &mut served.0, 10).await;
    assert!(is_reset(stage.call_db().await).await);
    for (end, other) in [(&stage.west_denials, &stage.east_denials), (&stage.east_denials, &stage.west_denials)] {
        other.set_worth(Worth::All);
        end.set_worth(Worth::Nothing);
        assert!(is_reset(app).await, "the open one ends");
        assert!(is_reset(stage.call_db().await).await);
        // A list from the cell does not make it hear more.
        assert!(end.offer(list(2, "west", &stage.east, 0)) && end.now().ends_all());
        end.set_worth(Worth::All);
        app = stage.call_db().await;
        served = stage.served().await;
        round_trip(&mut app, &mut served.0, 10).await;
    }
}

/// Everything issued to this identity so far, up to this SVID.
fn revoked(svid: &Svid) -> v1::IdDenial {
    let leaf = Presented::of(&[svid.chain_der[0].as_slice().into()]).unwrap();
    v1::IdDenial { spiffe_id: svid.id.to_string(), up_to: leaf.serial, barred: false }
}

fn ids(denials: &[v1::IdDenial]) -> Denials {
    Denials::parse(Revision(1), &[], &[]).unwrap().with_svids(denials, &[]).unwrap()
}

#[tokio::test]
async fn a_caller_that_is_revoked_is_cut_by_the_receiver_until_it_has_a_new_svid() {
    let mut stage = Stage::set(12).await;
    let mut app = stage.call_db().await;
    let (mut pod, _) = stage.served().await;
    round_trip(&mut app, &mut pod, 10).await;
    // Another identity's revocation is none of this one's.
    let other = v1::IdDenial { spiffe_id: "spiffe://west/other".into(), ..revoked(&stage.web_svid) };
    assert!(stage.east_denials.offer(ids(&[other])));
    round_trip(&mut app, &mut pod, 10).await;
    let (begun, web) = (Instant::now(), revoked(&stage.web_svid));
    assert!(stage.east_denials.offer(ids(std::slice::from_ref(&web))));
    assert!(is_reset(app).await && begun.elapsed() < Duration::from_millis(500), "{:?}", begun.elapsed());
    assert!(timeout(SOON, pod.read(&mut [0; 1])).await.expect("the pod sees an end").is_err());
    no_tunnel(&stage.outbound).await;
    assert!(is_reset(stage.call_db().await).await, "a new one is refused");
    assert!(METRICS.handshakes.value(["failed", "svid_revoked"]) > 0.0, "already in the handshake");
    // What is issued after it is good.
    stage.web_svid = stage.west.svid("web");
    stage.publish(|_| (), |e| e.id_denials = vec![web.clone()]);
    let mut app = stage.call_db().await;
    let (mut pod, _) = stage.served().await;
    round_trip(&mut app, &mut pod, 10).await;
    // And barred, nothing is.
    assert!(stage.east_denials.offer(ids(&[v1::IdDenial { barred: true, ..web.clone() }])));
    assert!(is_reset(app).await && is_reset(stage.call_db().await).await);
}

#[tokio::test]
async fn a_callee_that_is_revoked_is_cut_by_the_caller_until_it_has_a_new_svid() {
    let mut stage = Stage::set(13).await;
    let mut app = stage.call_db().await;
    let (mut pod, _) = stage.served().await;
    round_trip(&mut app, &mut pod, 10).await;
    let db = revoked(&stage.db_svid);
    assert!(stage.west_denials.offer(ids(std::slice::from_ref(&db))));
    assert!(is_reset(app).await, "the live connection is cut");
    no_tunnel(&stage.outbound).await;
    assert!(is_reset(stage.call_db().await).await, "a new one is refused");
    assert!(timeout(Duration::from_millis(200), stage.db.accept()).await.is_err(), "the pod saw nothing");
    assert!(stage.health.unhealthy().is_empty(), "a revoked SVID is not a broken tunnel");
    stage.db_svid = stage.east.svid("db");
    stage.publish(|w| w.id_denials = vec![db], |_| ());
    let mut app = stage.call_db().await;
    let (mut pod, _) = stage.served().await;
    round_trip(&mut app, &mut pod, 10).await;
}

#[tokio::test]
async fn a_connection_that_outlives_its_svid_is_still_judged_by_policy() {
    let mut stage = Stage::set(15).await;
    let mut app = stage.call_db().await;
    let (mut pod, _) = stage.served().await;
    round_trip(&mut app, &mut pod, 10).await;
    stage.east_clock.seen(stage.web_svid.not_after.plus_ms(60_000));
    // A change that wakes whoever judges, and withdraws nothing.
    stage.publish(|_| (), |e| e.policies.push(allow("more", "spiffe://east/db", "spiffe://west/web", &[1])));
    round_trip(&mut app, &mut pod, 10).await;
    assert!(is_reset(stage.call_db().await).await, "but it begins no other");
    stage.publish(|_| (), |e| e.policies.clear());
    assert!(is_reset(app).await, "the live connection is cut");
    assert!(timeout(SOON, pod.read(&mut [0; 1])).await.expect("the pod sees an end").is_err());
}

#[tokio::test]
async fn a_caller_whose_intermediate_is_revoked_is_cut_and_told_apart_from_a_stranger() {
    let stage = Stage::set(16).await;
    let mut app = stage.call_db().await;
    let (mut pod, _) = stage.served().await;
    round_trip(&mut app, &mut pod, 10).await;
    assert!(stage.east_denials.offer(authority(2, "east", &stage.web_svid)));
    round_trip(&mut app, &mut pod, 10).await;
    assert!(stage.east_denials.offer(authority(3, "west", &stage.web_svid)));
    assert!(is_reset(app).await, "the live connection is cut");
    no_tunnel(&stage.outbound).await;
    assert!(is_reset(stage.call_db().await).await, "a new one is refused");
    // By its own code: whoever looks for an SVID in time must not be sent looking at clocks.
    assert!(METRICS.handshakes.value(["failed", "svid_revoked"]) > 0.0);
    assert_eq!(METRICS.handshakes.value(["failed", "svid_untrusted"]), 0.0);
}

#[tokio::test]
async fn a_caller_under_an_authority_that_is_revoked_further_up_is_cut() {
    let mut stage = Stage::set(118).await;
    let (mut thief, stolen) = stage.west.thief();
    thief.entry("web", &["cgroup:web"], &[]);
    stage.web_svid = thief.svid("web");
    stage.publish(|_| (), |_| ());
    let mut app = stage.call_db().await;
    let (mut pod, _) = stage.served().await;
    round_trip(&mut app, &mut pod, 10).await;
    let list = |revision, td: &str| {
        let denial = v1::AuthorityDenial { trust_domain: td.into(), authority: stolen.clone() };
        Denials::parse(Revision(revision), &[], &[denial]).unwrap()
    };
    assert!(stage.east_denials.offer(list(2, "east")));
    round_trip(&mut app, &mut pod, 10).await;
    assert!(stage.east_denials.offer(list(3, "west")));
    assert!(is_reset(app).await, "the live connection is cut");
    assert!(is_reset(stage.call_db().await).await, "a new one is refused");
}

#[tokio::test]
async fn a_caller_under_a_downstream_authority_that_forges_a_node_is_refused() {
    let mut stage = Stage::set(17).await;
    let mut app = stage.call_db().await;
    let (mut pod, _) = stage.served().await;
    round_trip(&mut app, &mut pod, 10).await;
    // The same identity, bound to the same node: nothing differs but who signed.
    let mut pretender = stage.west.pretender();
    pretender.entry("web", &["cgroup:web"], &[]);
    stage.web_svid = pretender.svid("web");
    stage.publish(|_| (), |_| ());
    assert!(is_reset(stage.call_db().await).await, "refused");
    assert!(timeout(Duration::from_millis(200), stage.db.accept()).await.is_err(), "the pod saw nothing");
    stage.web_svid = stage.west.svid("web");
    stage.publish(|_| (), |_| ());
    let mut app = stage.call_db().await;
    let (mut pod, _) = stage.served().await;
    round_trip(&mut app, &mut pod, 10).await;
}

/// The word of `td` on the intermediate that signed this SVID.
fn authority(revision: u64, td: &str, svid: &Svid) -> Denials {
    let denial = v1::AuthorityDenial { trust_domain: td.into(), authority: svid.authority.clone() };
    Denials::parse(Revision(revision), &[], &[denial]).unwrap()
}

#[tokio::test]
async fn a_callee_whose_intermediate_is_revoked_is_cut_by_the_caller() {
    let stage = Stage::set(14).await;
    let mut app = stage.call_db().await;
    let (mut pod, _) = stage.served().await;
    round_trip(&mut app, &mut pod, 10).await;
    // The word of another trust domain about that name is none about east's intermediate; nor is one about another's.
    assert!(stage.west_denials.offer(authority(2, "west", &stage.db_svid)));
    assert!(stage.west_denials.offer(authority(3, "east", &stage.web_svid)));
    round_trip(&mut app, &mut pod, 10).await;
    assert_eq!(stage.outbound.tunnels(), 1);
    // The list alone: no slice, no new plane, and a far end that still shows what it has.
    assert!(stage.west_denials.offer(authority(4, "east", &stage.db_svid)));
    assert!(is_reset(app).await, "the live connection is cut");
    no_tunnel(&stage.outbound).await;
    assert!(is_reset(stage.call_db().await).await, "a new one is refused");
    assert!(timeout(Duration::from_millis(200), stage.db.accept()).await.is_err(), "the pod saw nothing");
    assert!(stage.health.unhealthy().is_empty(), "a revoked intermediate is not a broken tunnel");
    assert!(stage.west_denials.offer(Denials::parse(Revision(5), &[], &[]).unwrap()));
    let mut app = stage.call_db().await;
    let (mut pod, _) = stage.served().await;
    round_trip(&mut app, &mut pod, 10).await;
}

#[tokio::test]
async fn a_service_leaves_out_the_endpoint_of_a_denied_node() {
    let mut stage = Stage::set(10).await;
    // Another node's endpoint of the same service, which the kernel chose a moment before the denial.
    let denied = Ipv4Addr::new(127, 0, 79, 10);
    let service = SocketAddrV4::new(Ipv4Addr::new(10, 99, 0, 1), stage.db_at().port());
    let bad = v1::Endpoint { address: denied.to_string(), node: "cd".repeat(32), ..stage.endpoint("127.0.80.10") };
    stage.publish(
        |w| {
            w.endpoints.push(bad.clone());
            w.denials = vec![v1::NodeDenial { node: bad.node.clone(), generation: 1, trust_domain: "east".into() }];
            w.services = vec![v1::Service {
                origin: "east".into(),
                name: "db".into(),
                address: service.ip().to_string(),
                port: u32::from(service.port()),
                backends: vec!["spiffe://east/db".into()],
                order: "local-first".into(),
                weights: vec![],
            }];
        },
        |_| (),
    );
    let chosen = Captured { asked: service.into(), endpoint: SocketAddrV4::new(denied, service.port()).into() };
    let mut app = stage.call(Some(chosen)).await;
    let (mut pod, _) = stage.served().await;
    round_trip(&mut app, &mut pod, 10).await;
    assert!(is_reset(stage.call(Some(Captured { asked: chosen.endpoint, ..chosen })).await).await, "by its address");
    assert!(stage.health.unhealthy().is_empty());
}

#[tokio::test]
async fn without_a_record_or_an_svid_the_application_is_reset() {
    let mut stage = Stage::set(4).await;
    assert!(is_reset(stage.call(None).await).await, "no record");
    let nowhere = SocketAddrV4::new(Ipv4Addr::new(127, 0, 99, 99), 80);
    assert!(
        is_reset(stage.call(Some(Captured { asked: nowhere.into(), endpoint: nowhere.into() })).await).await,
        "no endpoint"
    );
    let view = stage.west_plane.borrow().as_ref().unwrap().view.clone();
    stage.west_plane.send_replace(Some(plane(view, vec![stage.web.clone()], &[], stage.home)));
    assert!(is_reset(stage.call_db().await).await, "no SVID");
    // A trust domain that east has no bundle of is refused in the handshake.
    let mut stranger = Cell::founded("west", 9);
    stranger.entry("web", &["cgroup:web"], &[]);
    stage.web_svid = stranger.svid("web");
    stage.publish(|_| (), |_| ());
    assert!(is_reset(stage.call_db().await).await, "another root of the same name");
}

#[tokio::test]
async fn nobody_else_answers_in_the_endpoints_name() {
    let mut stage = Stage::set(5).await;
    // The node answers as db, but the view says that cache lives at that address.
    stage.publish(
        |w| {
            w.endpoints[0].spiffe_id = "spiffe://east/cache".into();
            w.policies.push(allow("cache", "spiffe://east/cache", "spiffe://west/web", &[]));
        },
        |_| (),
    );
    assert!(is_reset(stage.call_db().await).await);
    assert!(timeout(Duration::from_millis(200), stage.db.accept()).await.is_err(), "the pod saw nothing");
}

#[tokio::test]
async fn a_service_fails_over_before_first_bytes_and_back() {
    let mut stage = Stage::set(6).await;
    // A second endpoint of the service, on a node where nobody listens.
    let dead = Ipv4Addr::new(127, 0, 79, 6);
    let service = SocketAddrV4::new(Ipv4Addr::new(10, 99, 0, 1), stage.db_at().port());
    let dead_endpoint = v1::Endpoint { address: dead.to_string(), ..stage.endpoint("127.0.80.6") };
    let on_service = |w: &mut v1::Slice| {
        w.endpoints.push(dead_endpoint.clone());
        w.services = vec![v1::Service {
            origin: "east".into(),
            name: "db".into(),
            address: service.ip().to_string(),
            port: u32::from(service.port()),
            backends: vec!["spiffe://east/db".into()],
            order: "local-first".into(),
            weights: vec![],
        }];
    };
    stage.publish(on_service, |_| ());
    let to_dead = Captured { asked: service.into(), endpoint: SocketAddrV4::new(dead, service.port()).into() };
    let mut app = stage.call(Some(to_dead)).await;
    let (mut pod, _) = stage.served().await;
    round_trip(&mut app, &mut pod, 10).await;
    assert_eq!(stage.health.unhealthy().into_iter().collect::<Vec<_>>(), [dead]);
    // Asked for by its own address there is nothing to fail over to.
    let direct = Captured { asked: to_dead.endpoint, endpoint: to_dead.endpoint };
    assert!(is_reset(stage.call(Some(direct)).await).await);

    // The probe finds the node again once something proves to be db there.
    let probe = stage.probe();
    tokio::time::sleep(Duration::from_millis(700)).await;
    assert_eq!(stage.health.unhealthy().len(), 1, "still dead");
    let revived = TcpListener::bind(("127.0.80.6", ambit_agent::hbone::PORT)).await.unwrap();
    let (clock, netns) = (Arc::new(Clock::default()), NetnsThread::start().unwrap());
    let inbound = Inbound::new(stage.east_plane.subscribe(), stage.east_denials.clone(), netns, clock);
    tokio::spawn(inbound.serve(revived));
    stage.healthy().await;
    probe.abort();
}

#[tokio::test]
async fn garbage_on_the_hbone_port_harms_nobody() {
    let stage = Stage::set(7).await;
    for garbage in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0x16, 3, 1, 0xff, 0xff, 1, 2, 3], &[0; 4096]] {
        let mut tcp = TcpStream::connect(stage.hbone).await.unwrap();
        tcp.write_all(garbage).await.unwrap();
        tcp.shutdown().await.unwrap();
        let mut rest = Vec::new();
        let _ = timeout(SOON, tcp.read_to_end(&mut rest)).await.expect("closed in time");
    }
    let mut app = stage.call_db().await;
    let (mut pod, _) = stage.served().await;
    round_trip(&mut app, &mut pod, 10).await;
}

#[tokio::test]
async fn an_allow_ends_without_a_word_from_the_cell_and_an_audit_only_counts() {
    let mut stage = Stage::set(28).await;
    let now = stage.east_clock.now();
    let ends = now.plus_ms(5_000);
    let brief = |slice: &mut v1::Slice| {
        slice.policies[0].expires_at_ms = ends.0;
        let watch = allow("watch", "spiffe://east/db", "spiffe://west/web", &[]);
        slice.policies.push(v1::Policy { action: v1::Action::Audit as i32, ..watch });
    };
    stage.publish(brief, brief);
    let before = METRICS.audited.value(["inbound"]);
    let mut app = stage.call_db().await;
    let (mut pod, _) = stage.served().await;
    round_trip(&mut app, &mut pod, 100).await;
    assert!(METRICS.audited.value(["inbound"]) > before, "an audit policy matched");
    // The SVIDs are good for long after; nothing but the policy is over now, and no plane was published.
    stage.east_clock.seen(ends);
    assert!(is_reset(stage.call_db().await).await, "it is over");
}
