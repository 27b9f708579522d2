//! Calls to a service whose endpoints are silent, do not answer, or are called too much, between two agents' carrying halves
//! over loopback.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use ambit_agent::inbound::Inbound;
use ambit_agent::metrics::METRICS;
use ambit_agent::netns::NetnsThread;
use ambit_agent::outbound::Captured;
use ambit_proto::v1;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::time::{Duration, Instant};
use support::stage::{SOON, Stage, round_trip};
use tokio::net::TcpListener;
use tokio::time::timeout;

/// West's service of east's `db`, with one more endpoint of it there; the call that the kernel sent to that one.
fn with_another(stage: &mut Stage, other: v1::Endpoint) -> Captured {
    let service = SocketAddrV4::new(Ipv4Addr::new(10, 99, 0, 1), stage.db_at().port());
    let chosen: Ipv4Addr = other.address.parse().unwrap();
    stage.publish(
        |w| {
            w.endpoints.push(other);
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
    Captured { asked: service.into(), endpoint: SocketAddrV4::new(chosen, service.port()).into() }
}

async fn answered(stage: &Stage, captured: Captured) {
    let mut app = stage.call(Some(captured)).await;
    let (mut pod, _) = stage.served().await;
    round_trip(&mut app, &mut pod, 10).await;
}

/// Its kernel takes connections, and nobody says a word: as a node that hangs, or whose packets are lost.
#[tokio::test]
async fn who_is_silent_is_not_waited_for_alone_and_avoided_the_second_time() {
    let mut stage = Stage::set(140).await;
    let silent = Ipv4Addr::new(127, 0, 79, 140);
    let _held =
        TcpListener::bind(SocketAddr::from((Ipv4Addr::new(127, 0, 80, 140), stage.hbone.port()))).await.unwrap();
    let other = v1::Endpoint { address: silent.to_string(), ..stage.endpoint("127.0.80.140") };
    let captured = with_another(&mut stage, other);
    let [failed, tried] = [["failed", "timeout"], ["failed", "broken"]].map(|labels| METRICS.handshakes.value(labels));
    for avoided in [0, 1] {
        let before = METRICS.retries.value(["silent"]);
        let begun = Instant::now();
        answered(&stage, captured).await;
        println!("answered elsewhere after {} ms", begun.elapsed().as_millis());
        assert!(METRICS.retries.value(["silent"]) > before, "another was asked");
        assert_eq!(stage.health.unhealthy().len(), avoided, "once is not twice");
    }
    // Nobody waited until the silent one was found to have failed.
    assert_eq!(
        [["failed", "timeout"], ["failed", "broken"]].map(|labels| METRICS.handshakes.value(labels)),
        [failed, tried]
    );
    assert_eq!(stage.health.unhealthy().into_iter().collect::<Vec<_>>(), [silent]);
    let shown = stage.health.shown();
    let port = captured.asked.port();
    assert_eq!((shown[0].why, shown[0].port, shown[0].spiffe_id.as_str()), ("silent", port, "spiffe://east/db"));
    assert!(!stage.health.avoided().avoids(silent.into(), 1), "of silence nobody knows whose it is");
    let before = METRICS.retries.value(["silent"]);
    answered(&stage, captured).await;
    assert_eq!(METRICS.retries.value(["silent"]), before, "it is not asked first any more");
    // What is avoided and all there is is used: there is nobody to fail over to.
    let mut direct = stage.call(Some(Captured { asked: captured.endpoint, ..captured })).await;
    let read = timeout(SOON, tokio::io::AsyncReadExt::read(&mut direct, &mut [0; 1])).await.expect("an end");
    assert!(read.is_err());
}

/// The tunnel is there, and nothing listens at the port: that is the workload's trouble, not its node's.
#[tokio::test]
async fn a_workload_that_does_not_answer_is_avoided_at_its_port_until_a_probe_gets_through() {
    let mut stage = Stage::set(141).await;
    // Another address of the same pod's namespace, on the node that answers; nobody listens there.
    let deaf = Ipv4Addr::new(127, 0, 79, 141);
    let other = v1::Endpoint { address: deaf.to_string(), ..stage.endpoint(&stage.hbone.ip().to_string()) };
    let captured = with_another(&mut stage, other);
    let entry = stage.db_entry.clone();
    let east = stage.east_plane.borrow().clone().unwrap();
    let also = support::stage::pod(&east.view, &entry, deaf);
    let pods = east.pods.values().cloned().chain([also]).collect();
    let plane =
        support::stage::plane(east.view.clone(), pods, std::slice::from_ref(&stage.db_svid), Ipv4Addr::LOCALHOST);
    stage.east_plane.send_replace(Some(plane));
    for times in 1..=3 {
        answered(&stage, captured).await;
        assert_eq!(stage.health.unhealthy().len(), usize::from(times == 3), "after {times}");
    }
    let shown = stage.health.shown();
    assert_eq!((shown[0].why, shown[0].port), ("turned_away", captured.asked.port()));
    assert!(!stage.health.avoided().avoids(deaf.into(), 1), "at another port it is as good as any");
    // Probes go to the port that is registered.
    let registered = TcpListener::bind((stage.hbone.ip(), ambit_agent::hbone::PORT)).await.unwrap();
    let (east, denials) = (stage.east_plane.subscribe(), stage.east_denials.clone());
    let inbound = Inbound::new(east, denials, NetnsThread::start().unwrap(), stage.east_clock.clone());
    tokio::spawn(inbound.serve(registered));
    let probe = stage.probe();
    tokio::time::sleep(Duration::from_millis(1_200)).await;
    assert_eq!(stage.health.unhealthy().len(), 1, "the tunnel alone does not bring it back");
    let listener = TcpListener::bind((deaf, captured.asked.port())).await.unwrap();
    let (mut probed, _) = timeout(SOON, listener.accept()).await.expect("a probe").unwrap();
    let mut said = Vec::new();
    let _ = timeout(SOON, tokio::io::AsyncReadExt::read_to_end(&mut probed, &mut said)).await.expect("its end");
    assert_eq!(said, b"", "a probe carries nothing");
    stage.healthy().await;
    probe.abort();
}

#[tokio::test]
async fn a_caller_that_opens_too_many_is_told_so_and_what_is_open_goes_on() {
    let mut stage = Stage::set(142).await;
    let (east, denials) = (stage.east_plane.subscribe(), stage.east_denials.clone());
    let inbound = Inbound::new(east, denials, NetnsThread::start().unwrap(), stage.east_clock.clone()).limited_to(1);
    let limited = SocketAddr::from((Ipv4Addr::new(127, 0, 80, 142), stage.hbone.port()));
    tokio::spawn(inbound.serve(TcpListener::bind(limited).await.unwrap()));
    stage.publish(|w| w.endpoints[0].node_address = limited.ip().to_string(), |_| ());
    let before = METRICS.limited.value([]);
    let mut held = stage.call_db().await;
    let (mut pod, _) = stage.served().await;
    round_trip(&mut held, &mut pod, 10).await;
    let apps = futures::future::join_all((0..12).map(|_| stage.call_db())).await;
    let mut served = Vec::new();
    let ends = futures::future::join_all(apps.into_iter().map(async |mut app| {
        let read = timeout(4 * SOON, tokio::io::AsyncReadExt::read(&mut app, &mut [0; 1])).await.expect("an end");
        (read.is_err(), app)
    }));
    let serve = async {
        loop {
            let (mut tcp, _) = stage.db.accept().await.unwrap();
            tokio::io::AsyncWriteExt::write_all(&mut tcp, b"x").await.unwrap();
            served.push(tcp);
        }
    };
    let ends = tokio::select! {
        ends = ends => ends,
        () = serve => panic!("the workload ended"),
    };
    let refused = ends.iter().filter(|(refused, _)| *refused).count();
    println!("{refused} of 12 were turned away");
    assert!(refused > 0 && METRICS.limited.value([]) > before);
    round_trip(&mut held, &mut pod, 10).await;
    // By a service, whose endpoints are judged by what comes of calls: each goes to the other one, and nobody is put out.
    let address = Ipv4Addr::new(127, 0, 79, 142).to_string();
    let other = v1::Endpoint { address, ..stage.endpoint(&limited.ip().to_string()) };
    let captured = with_another(&mut stage, other);
    let (turned_away, retried) = (METRICS.limited.value([]), METRICS.retries.value(["busy"]));
    for _ in 0..8 {
        let app = stage.call(Some(captured)).await;
        tokio::time::sleep(Duration::from_millis(20)).await;
        drop(app);
    }
    let times = METRICS.limited.value([]) - turned_away;
    assert!(times >= 4.0 && METRICS.retries.value(["busy"]) >= retried + times, "turned away {times} times");
    assert!(stage.health.unhealthy().is_empty(), "who is busy is not broken");
}
