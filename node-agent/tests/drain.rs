//! An agent that drains: callers go on to who comes after it, and what it carries ends in its own time.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use ambit_agent::course::Course;
use ambit_agent::hbone::{Dialed, Mode};
use ambit_agent::inbound::Inbound;
use ambit_agent::native::{self, Answer, Open};
use ambit_agent::netns::NetnsThread;
use ambit_agent::said::Said;
use std::time::Duration;
use support::stage::{SOON, Stage, ended, round_trip};
use tokio::net::TcpListener;
use tokio::time::timeout;

/// East's agent drains; once it has let go of its port, another one serves there.
async fn succeed(stage: &Stage) -> Course {
    stage.east_course.drain();
    let listener = timeout(SOON, async {
        loop {
            match TcpListener::bind(stage.hbone).await {
                Ok(listener) => break listener,
                Err(_) => tokio::time::sleep(Duration::from_millis(2)).await,
            }
        }
    });
    let listener = listener.await.expect("the port is let go");
    let (plane, denials) = (stage.east_plane.subscribe(), stage.east_denials.clone());
    let inbound = Inbound::new(plane, denials, NetnsThread::start().unwrap(), stage.east_clock.clone());
    let course = Course::default();
    tokio::spawn(inbound.in_course(course.clone()).serve(listener));
    course
}

#[tokio::test]
async fn callers_go_on_to_the_successor_and_what_is_carried_goes_on() {
    let stage = Stage::set(131).await;
    // One that lasts, and two whose tunnels are warm.
    let mut lasting = stage.call_db().await;
    let (mut kept, _) = stage.served().await;
    round_trip(&mut lasting, &mut kept, 10).await;
    for _ in 0..2 {
        let mut app = stage.call_db().await;
        let (mut pod, _) = stage.served().await;
        round_trip(&mut app, &mut pod, 10).await;
        ended(app, pod).await;
    }
    let successor = succeed(&stage).await;
    for _ in 0..3 {
        let mut app = stage.call_db().await;
        let (mut pod, _) = stage.served().await;
        round_trip(&mut app, &mut pod, 10).await;
        assert_eq!(successor.flows(), 1, "by the successor");
        ended(app, pod).await;
    }
    assert!(stage.health.unhealthy().is_empty(), "an agent that drains is no broken endpoint");
    round_trip(&mut lasting, &mut kept, 100_000).await;
    assert_eq!(stage.east_course.flows(), 1);
    ended(lasting, kept).await;
    timeout(SOON, stage.east_course.idle()).await.expect("the last one has ended");
}

#[tokio::test]
async fn what_is_asked_of_an_agent_that_leaves_is_known_to_have_gone_nowhere() {
    let stage = Stage::set(132).await;
    let open = Open { to: stage.db_at().into(), prompt: true, trace: None, from: None, first: b"once".to_vec() };
    let mut idle = stage.native().await;
    let mut used = stage.native().await;
    let answer = native::open(&mut used.secured, &open).await.unwrap();
    assert_eq!(answer, Answer::Opened);
    stage.served().await;
    stage.east_course.drain();
    // The word is on its way, or not yet, when OPEN is sent.
    for wait in [0, 50] {
        tokio::time::sleep(Duration::from_millis(wait)).await;
        let asked = timeout(SOON, native::open(&mut idle.secured, &open)).await.expect("an answer");
        match (wait, asked) {
            (_, Ok(answer)) => assert_eq!(answer, Answer::Left),
            (wait, Err(error)) => panic!("after {wait} ms: {error}"),
        }
    }
    assert!(timeout(Duration::from_millis(100), stage.db.accept()).await.is_err(), "no workload was reached");
    // One that breaks says nothing of the kind.
    drop(used);
}

#[tokio::test]
async fn a_shared_tunnel_takes_no_more_and_carries_on() {
    let stage = Stage::set(133).await;
    let Ok(Dialed::Hbone(tunnel)) = stage.dial(stage.home, Mode::Hbone).await else { panic!("HBONE was asked for") };
    let lease = tunnel.lease().unwrap();
    let (mut send, mut recv) = lease.open(stage.db_at(), &Said::default()).await.unwrap();
    let (mut pod, _) = stage.served().await;
    stage.east_course.drain();
    timeout(SOON, async {
        while tunnel.lease().is_some() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await
    .expect("GOAWAY");
    assert!(tunnel.is_open());
    send.send_data(bytes::Bytes::from_static(b"late"), true).unwrap();
    let mut there = Vec::new();
    timeout(SOON, tokio::io::AsyncReadExt::read_to_end(&mut pod, &mut there)).await.unwrap().unwrap();
    assert_eq!(there, b"late");
    tokio::io::AsyncWriteExt::write_all(&mut pod, b"too").await.unwrap();
    drop(pod);
    assert_eq!(timeout(SOON, recv.data()).await.unwrap().unwrap().unwrap().as_ref(), b"too");
    timeout(SOON, stage.east_course.idle()).await.expect("the last one has ended");
}

#[tokio::test]
async fn a_caller_that_drains_lets_go_of_warm_tunnels_only() {
    let stage = Stage::set(134).await;
    let mut lasting = stage.call_db().await;
    let (mut kept, _) = stage.served().await;
    let app = stage.call_db().await;
    let (pod, _) = stage.served().await;
    ended(app, pod).await;
    stage.west_course.drain();
    timeout(SOON, async {
        while stage.outbound.tunnels() > 1 {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await
    .expect("the warm one is closed");
    round_trip(&mut lasting, &mut kept, 1000).await;
    assert_eq!(stage.west_course.flows(), 1);
    ended(lasting, kept).await;
    timeout(SOON, stage.west_course.idle()).await.expect("nothing is carried");
}
