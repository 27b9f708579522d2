//! HBONE with peers that nobody of this project wrote, as far as the wire tells: what they are answered, where they may come
//! from, and how they are called. Their own connections are rustls' and h2's; Envoy's are in `hbone_envoy.rs`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use ambit_agent::hbone::Door;
use ambit_agent::inbound::Inbound;
use ambit_agent::netns::NetnsThread;
use ambit_proto::v1;
use http::Request;
use rustls_pki_types::ServerName;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;
use support::foreign;
use support::stage::{SOON, Stage, is_reset};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::time::timeout;

#[tokio::test]
async fn a_foreign_caller_is_answered_as_istios_agents_answer() {
    let mut stage = Stage::set(29).await;
    let name = ServerName::try_from(ambit_agent::sni::server_name(&stage.db_svid.id)).unwrap();
    let mut caller = foreign::Caller::dial(&stage, stage.home, stage.hbone, name).await.unwrap();
    let (at, ip) = (stage.db_at().to_string(), *stage.db_at().ip());
    let closed = TcpListener::bind((ip, 0)).await.unwrap().local_addr().unwrap();
    for (authority, status) in [
        (at.as_str(), 200),
        ("db.east:80", 400),
        ("[::1]:80", 400),
        // Of another workload, or of nobody.
        (&format!("127.0.83.29:{}", stage.db_at().port()), 400),
        // The agents' own ports.
        (&format!("{ip}:0"), 400),
        (&format!("{ip}:15001"), 400),
        (&format!("{ip}:15006"), 400),
        (&format!("{ip}:15008"), 400),
        (&closed.to_string(), 503),
    ] {
        assert_eq!(caller.connect(authority).await, status, "{authority}");
    }
    let get = Request::builder().uri(format!("https://{at}/")).body(()).unwrap();
    assert_eq!(caller.ask(get).await.unwrap(), 400);
    // What a peer says of itself decides nothing.
    let mut said = foreign::connect(&at);
    for (name, value) in [
        ("traceparent", "no trace"),
        ("baggage", "k8s.cluster.name=east,service.name=admin"),
        ("forwarded", "for=\"10.0.0.1:80\";host=elsewhere"),
    ] {
        said.headers_mut().insert(name, value.parse().unwrap());
    }
    assert_eq!(caller.ask(said.clone()).await.unwrap(), 200);
    stage.publish(|_| (), |e| e.policies.clear());
    assert_eq!(caller.ask(said).await.unwrap(), 401);
    assert_eq!(caller.connect(&at).await, 401);
}

/// What a foreign caller is answered that dials db's own address from this one, asking for no name; none where the
/// handshake is refused.
async fn at_the_pods_door(stage: &Stage, from: Ipv4Addr, at: SocketAddr, authority: &str) -> Option<u16> {
    let name = ServerName::from(at.ip());
    let mut caller = foreign::Caller::dial(stage, from, at, name).await.ok()?;
    caller.ask(foreign::connect(authority)).await.ok().map(|status| status.as_u16())
}

#[tokio::test]
async fn who_dials_a_pods_own_address_needs_no_name_and_gets_that_pod_alone() {
    let mut stage = Stage::set(30).await;
    let (at, to, home) = (stage.open_pod_door().await, stage.db_at().to_string(), stage.home);
    assert_eq!(at_the_pods_door(&stage, home, at, &to).await, Some(200));
    // Another pod of the same workload, which the node's door would lead to.
    let plane = stage.east_plane.borrow().clone().unwrap();
    let other = Ipv4Addr::new(127, 0, 82, 30);
    let pods = [*stage.db_at().ip(), other].map(|address| support::stage::pod(&plane.view, &stage.db_entry, address));
    let svid = std::slice::from_ref(&stage.db_svid);
    let two = support::stage::plane(plane.view.clone(), pods.into(), svid, support::stage::HERE);
    let listening = TcpListener::bind((other, stage.db_at().port())).await.unwrap();
    stage.east_plane.send_replace(Some(two));
    let elsewhere = format!("{other}:{}", stage.db_at().port());
    assert_eq!(at_the_pods_door(&stage, home, at, &elsewhere).await, Some(400));
    let name = ServerName::try_from(ambit_agent::sni::server_name(&stage.db_svid.id)).unwrap();
    let mut caller = foreign::Caller::dial(&stage, home, stage.hbone, name).await.unwrap();
    assert_eq!(caller.connect(&elsewhere).await, 200);
    drop(listening);
    // Nobody's address, whatever name is asked for.
    let stray = SocketAddr::from((Ipv4Addr::new(127, 0, 82, 31), stage.hbone.port()));
    let (plane, denials) = (stage.east_plane.subscribe(), stage.east_denials.clone());
    let inbound = Inbound::new(plane, denials, NetnsThread::start().unwrap(), stage.east_clock.clone());
    tokio::spawn(inbound.serve_at(Door::Pod, TcpListener::bind(stray).await.unwrap()));
    let name = ServerName::try_from(ambit_agent::sni::server_name(&stage.db_svid.id)).unwrap();
    assert!(foreign::Caller::dial(&stage, home, stray, name).await.is_err());
    stage.publish(|_| (), |e| e.policies.clear());
    assert_eq!(at_the_pods_door(&stage, home, at, &to).await, Some(401));
}

#[tokio::test]
async fn a_caller_comes_from_its_node_or_from_where_its_node_reported_it() {
    let mut stage = Stage::set(33).await;
    let (at, to, home) = (stage.open_pod_door().await, stage.db_at().to_string(), stage.home);
    let (pod, good) = (stage.web.workload.pod.address, stage.web_endpoint());
    assert_eq!(at_the_pods_door(&stage, pod, at, &to).await, None, "nobody reported it here");
    stage.publish(|_| (), |e| e.endpoints = vec![good.clone()]);
    assert_eq!(at_the_pods_door(&stage, pod, at, &to).await, Some(200));
    assert_eq!(at_the_pods_door(&stage, home, at, &to).await, Some(200));
    assert_eq!(at_the_pods_door(&stage, Ipv4Addr::new(127, 0, 75, 33), at, &to).await, None, "a copied key");
    // Another workload's, another node's; of a node that is not (any more) among those that may call, or is there anew.
    for (endpoint, callers) in [
        (v1::Endpoint { spiffe_id: stage.west.id("api"), ..good.clone() }, vec![stage.caller(1, &home.to_string())]),
        (v1::Endpoint { node: "cd".repeat(32), ..good.clone() }, vec![stage.caller(1, &home.to_string())]),
        (good.clone(), vec![]),
        (good, vec![stage.caller(2, &home.to_string())]),
    ] {
        stage.publish(
            |_| (),
            |e| {
                e.endpoints = vec![endpoint.clone()];
                e.callers = callers;
            },
        );
        assert_eq!(at_the_pods_door(&stage, pod, at, &to).await, None, "{endpoint:?}");
    }
}

#[tokio::test]
async fn where_no_agent_listens_on_its_node_a_workload_is_called_at_its_own_address_from_the_callers() {
    let mut stage = Stage::set(34).await;
    let at = SocketAddr::from((*stage.db_at().ip(), stage.hbone.port()));
    // The node is there, and nothing listens on it; nor at the workload's address, first.
    stage.publish(|w| w.endpoints[0].node_address = "127.0.84.34".into(), |_| ());
    assert!(is_reset(stage.call_db().await).await);
    assert_eq!(stage.health.unhealthy().len(), 1);
    // What probes dial is the registered port.
    let found = foreign::Calls::default();
    let probed = TcpListener::bind((*stage.db_at().ip(), ambit_agent::hbone::PORT)).await.unwrap();
    let probe =
        stage.health.clone().probe(stage.west_plane.subscribe(), stage.west_denials.clone(), stage.annex.clone());
    let healthy = async {
        while !stage.health.unhealthy().is_empty() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::select! {
        () = foreign::echo(&stage, probed, found.clone()) => panic!("the foreign agent ended"),
        () = probe => panic!("probing ended"),
        healthy = timeout(SOON, healthy) => healthy.expect("healthy again"),
    }
    let pod = stage.web.workload.pod.address;
    assert_eq!(*found.lock().unwrap(), [(pod.into(), None)]);

    let listener = TcpListener::bind(at).await.unwrap();
    let calls = foreign::Calls::default();
    let calling = async {
        for _ in 0..3 {
            let mut app = stage.call_db().await;
            app.write_all(b"ping").await.unwrap();
            timeout(SOON, app.read_exact(&mut [0; 4])).await.expect("an answer").unwrap();
        }
    };
    tokio::select! {
        () = foreign::echo(&stage, listener, calls.clone()) => panic!("the foreign agent ended"),
        () = calling => {}
    }
    assert_eq!(*calls.lock().unwrap(), [(pod.into(), None)], "one tunnel, without a name");
    assert!(stage.health.unhealthy().is_empty());
}

/// Each tunnel is a TLS session: one caller holds a share of them.
#[tokio::test]
async fn one_caller_has_no_more_tunnels_than_its_share() {
    let stage = Stage::set(35).await;
    // What is asked makes no sense, so that it costs the workload nothing.
    let (at, to) = (stage.open_pod_door().await, "[::1]:80");
    let mut held = Vec::new();
    for _ in 0..300 {
        // In TLS 1.3 the caller hears of it after its handshake: by the first answer.
        let mut caller = foreign::Caller::dial(&stage, stage.home, at, ServerName::from(at.ip())).await.unwrap();
        match caller.ask(foreign::connect(to)).await {
            Ok(_) => held.push(caller),
            Err(_) => break,
        }
    }
    assert_eq!(held.len(), 256);
    held.pop();
    // Its place comes back.
    let until = std::time::Instant::now() + SOON;
    while at_the_pods_door(&stage, stage.home, at, to).await != Some(400) {
        assert!(std::time::Instant::now() < until);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
