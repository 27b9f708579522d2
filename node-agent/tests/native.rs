//! The native mode between our own agents: what a connection in it looks like to the applications at both ends, when a
//! tunnel is used again, and what bad peers get. rustls' own connections, of which tunnels use only the handshake, judge
//! our record layer.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use ambit_agent::metrics::METRICS;
use ambit_agent::native::{self, Open, Reason};
use ambit_agent::{health, tls};
use bytes::Bytes;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::Arc;
use std::time::{Duration, Instant};
use support::stage::{SOON, Stage, is_reset, round_trip};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

/// What a kernel's buffers hold of a connection that nobody reads, all legs together.
const BUFFERS_MAX: usize = 64 << 20;

fn handshakes() -> f64 {
    METRICS.handshakes.value(["ok", "none"])
}

async fn ended(stage: &Stage, mut app: TcpStream, mut pod: TcpStream) {
    app.shutdown().await.unwrap();
    assert_eq!(timeout(SOON, pod.read(&mut [0; 1])).await.expect("FIN crosses").unwrap(), 0);
    pod.shutdown().await.unwrap();
    assert_eq!(timeout(SOON, app.read(&mut [0; 1])).await.expect("and back").unwrap(), 0);
    let _ = stage;
    // The agents see the ends a moment later.
    tokio::time::sleep(Duration::from_millis(20)).await;
}

/// One thread, so that the handshakes counted are this test's own: tests of one process share the figures.
#[tokio::test]
async fn connections_follow_each_other_in_one_tunnel_and_never_mix() {
    let stage = Stage::set(101).await;
    for n in 0..30u8 {
        let mut app = stage.call_db().await;
        app.write_all(&[n; 100]).await.unwrap();
        let (mut pod, _) = stage.served().await;
        let mut there = [0; 100];
        timeout(SOON, pod.read_exact(&mut there)).await.expect("first bytes").unwrap();
        assert_eq!(there, [n; 100]);
        // What the pod says after the caller has ended belongs to this connection, and to no later one.
        app.shutdown().await.unwrap();
        pod.write_all(&[n ^ 0xff; 100]).await.unwrap();
        pod.shutdown().await.unwrap();
        let mut back = Vec::new();
        timeout(SOON, app.read_to_end(&mut back)).await.expect("an end").unwrap();
        assert_eq!(back, [n ^ 0xff; 100]);
        tokio::time::sleep(Duration::from_millis(5)).await;
        assert_eq!(stage.outbound.tunnels(), 1, "connection {n}");
    }
}

#[tokio::test]
async fn a_connection_that_broke_off_takes_its_tunnel_with_it() {
    let stage = Stage::set(102).await;
    // The caller breaks off; the pod sees a reset.
    let mut app = stage.call_db().await;
    let (mut pod, _) = stage.served().await;
    round_trip(&mut app, &mut pod, 10).await;
    app.set_zero_linger().unwrap();
    drop(app);
    let read = timeout(SOON, pod.read(&mut [0; 1])).await.expect("an end");
    assert_eq!(read.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
    // The pod breaks off; the caller sees one.
    let mut app = stage.call_db().await;
    let (mut pod, _) = stage.served().await;
    round_trip(&mut app, &mut pod, 10).await;
    pod.set_zero_linger().unwrap();
    drop(pod);
    assert!(is_reset(app).await);
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(stage.outbound.tunnels(), 0, "neither tunnel is used again");
    let mut app = stage.call_db().await;
    let (mut pod, _) = stage.served().await;
    round_trip(&mut app, &mut pod, 10).await;
}

#[tokio::test]
async fn single_bytes_cross_one_by_one_and_a_pod_may_speak_first() {
    let stage = Stage::set(103).await;
    let mut app = stage.call_db().await;
    let (mut pod, _) = stage.served().await;
    let mut byte = [0; 1];
    pod.write_all(b"!").await.unwrap();
    timeout(SOON, app.read_exact(&mut byte)).await.expect("the pod speaks first").unwrap();
    assert_eq!(&byte, b"!");
    for n in 0..=255 {
        app.write_all(&[n]).await.unwrap();
        timeout(SOON, pod.read_exact(&mut byte)).await.expect("a byte").unwrap();
        assert_eq!(byte, [n]);
        pod.write_all(&[n]).await.unwrap();
        timeout(SOON, app.read_exact(&mut byte)).await.expect("a byte back").unwrap();
        assert_eq!(byte, [n]);
    }
    ended(&stage, app, pod).await;
}

#[tokio::test]
async fn who_does_not_read_holds_up_who_writes_and_nothing_is_lost() {
    let stage = Stage::set(104).await;
    let mut app = stage.call_db().await;
    let (mut pod, _) = stage.served().await;
    let chunk: Vec<u8> = (0..64 * 1024).map(|n| (n % 251) as u8).collect();
    let mut sent = 0;
    while timeout(Duration::from_millis(500), app.write_all(&chunk)).await.is_ok() {
        sent += chunk.len();
        assert!(sent < BUFFERS_MAX, "it is held up");
    }
    // A write that was held up may have written a part: all that comes is what was sent, in order.
    app.shutdown().await.unwrap();
    let mut all = Vec::new();
    timeout(4 * SOON, pod.read_to_end(&mut all)).await.expect("it flows again").unwrap();
    assert!((sent..=sent + chunk.len()).contains(&all.len()), "{} of {sent}", all.len());
    assert!(all.iter().zip(chunk.iter().cycle()).all(|(a, b)| a == b));
}

#[tokio::test]
async fn the_receiver_refuses_with_a_reason() {
    let mut stage = Stage::set(105).await;
    let mut answers = Vec::new();
    // A workload that does not listen at that port, somebody else's address, and no policy.
    let at = stage.db_at();
    let closed = TcpListener::bind((*at.ip(), 0)).await.unwrap().local_addr().unwrap().port();
    for to in [at, SocketAddrV4::new(*at.ip(), closed), SocketAddrV4::new(Ipv4Addr::new(127, 0, 99, 1), 80)] {
        let mut native = stage.native().await;
        answers.push(timeout(SOON, native::open(&mut native.secured, &asked(to))).await.unwrap().unwrap());
    }
    stage.publish(|_| (), |e| e.policies.clear());
    let mut native = stage.native().await;
    answers.push(timeout(SOON, native::open(&mut native.secured, &asked(at))).await.unwrap().unwrap());
    assert_eq!(answers, [Ok(()), Err(Reason::Unreachable), Err(Reason::Denied), Err(Reason::Denied)]);
}

fn asked(to: SocketAddrV4) -> Open {
    Open { to, prompt: true, trace: None, first: Vec::new() }
}

#[tokio::test]
async fn malformed_frames_end_the_tunnel_and_reach_no_pod() {
    let stage = Stage::set(106).await;
    let open = |to: SocketAddrV4| {
        let (ip, port) = (to.ip().octets(), to.port().to_be_bytes());
        [&[1, 1][..], &ip, &port, &[0]].concat()
    };
    let good = open(stage.db_at());
    let mut wrong: Vec<Vec<u8>> = vec![
        vec![],
        vec![0],
        vec![3, 1, 2, 3],
        vec![4],
        vec![5, 1],
        vec![2],
        vec![9; 16 * 1024],
        good[..5].to_vec(),
        [&good[..8], &[200]].concat(),
        [&[1, 0x82][..], &good[2..]].concat(),
    ];
    wrong.push([&good[..8], &[55], &[b'\n'; 55][..]].concat());
    for frame in wrong {
        let mut native = stage.native().await;
        native.secured.sealer.push(&[&frame]).unwrap();
        let sealed = native.secured.sealer.take();
        native.secured.tcp.write_all(&sealed).await.unwrap();
        let mut rest = Vec::new();
        let end = timeout(SOON, native.secured.tcp.read_to_end(&mut rest)).await.expect("the tunnel ends in time");
        assert!(end.is_err() || rest.len() < 100, "{frame:?}");
    }
    // In a connection: OPEN again, a kind that is none, an empty DATA, and bytes under no key.
    for (n, frame) in [good.clone(), vec![77], vec![3]].into_iter().chain([vec![0xff; 8]]).enumerate() {
        let mut native = stage.native().await;
        assert_eq!(native::open(&mut native.secured, &asked(stage.db_at())).await.unwrap(), Ok(()));
        let (mut pod, _) = stage.served().await;
        native.secured.sealer.push(&[&frame]).unwrap();
        let mut sealed = native.secured.sealer.take();
        if n == 3 {
            *sealed.last_mut().unwrap() ^= 1;
        }
        native.secured.tcp.write_all(&sealed).await.unwrap();
        let read = timeout(SOON, pod.read(&mut [0; 1])).await.expect("the pod sees an end");
        assert_eq!(read.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset, "case {n}");
    }
    assert!(timeout(Duration::from_millis(100), stage.db.accept()).await.is_err(), "no pod was reached");
    let mut app = stage.call_db().await;
    let (mut pod, _) = stage.served().await;
    round_trip(&mut app, &mut pod, 10).await;
}

#[tokio::test]
async fn who_opens_a_tunnel_and_says_nothing_or_half_a_frame_loses_it() {
    let stage = Stage::set(107).await;
    let (mut silent, mut slow) = (stage.native().await, stage.native().await);
    slow.secured.sealer.push(&[&[1; 100]]).unwrap();
    let sealed = slow.secured.sealer.take();
    slow.secured.tcp.write_all(&sealed[..50]).await.unwrap();
    let begun = Instant::now();
    for native in [&mut silent, &mut slow] {
        let _ = timeout(SOON, native.secured.tcp.read_to_end(&mut Vec::new())).await.expect("it is closed");
    }
    assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
}

/// An agent of somebody else: rustls' own connection and h2 on it, in db's name; it answers what it gets. It asks for new
/// keys of both sides all the time.
async fn foreign(stage: &Stage, listener: TcpListener) {
    let east = stage.east_plane.borrow().clone().unwrap();
    let key = tls::certified_key(&stage.db_svid).unwrap();
    let mut config = tls::server(key, east.trust.clone()).unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    loop {
        let (tcp, _) = listener.accept().await.unwrap();
        let stream = acceptor.accept(tcp).await.unwrap();
        let mut streams = h2::server::handshake(stream).await.unwrap();
        tokio::spawn(async move {
            while let Some(Ok((request, mut respond))) = streams.accept().await {
                assert!(request.headers().contains_key("traceparent"));
                tokio::spawn(async move {
                    let mut send = respond.send_response(http::Response::new(()), false).unwrap();
                    let mut body = request.into_body();
                    while let Some(Ok(chunk)) = body.data().await {
                        body.flow_control().release_capacity(chunk.len()).unwrap();
                        send.send_data(chunk, false).unwrap();
                    }
                    let _ = send.send_data(Bytes::new(), true);
                });
            }
        });
    }
}

#[tokio::test]
async fn a_node_that_speaks_hbone_only_is_called_in_hbone() {
    let mut stage = Stage::set(108).await;
    let before = handshakes();
    // West's agent dials the port of the stage; the foreign one has another address.
    let listener = TcpListener::bind((Ipv4Addr::new(127, 0, 81, 108), stage.hbone.port())).await.unwrap();
    stage.publish(|w| w.endpoints[0].node_address = "127.0.81.108".into(), |_| ());
    let mut apps = Vec::new();
    let serve = foreign(&stage, listener);
    let calls = async {
        for n in 0..5u8 {
            let mut app = stage.call_db().await;
            let sent: Vec<u8> = (0..300_000u32).map(|i| (i % 249) as u8 ^ n).collect();
            let mut back = vec![0; sent.len()];
            let (mut read, mut write) = app.split();
            let (wrote, got) = tokio::join!(write.write_all(&sent), timeout(SOON, read.read_exact(&mut back)));
            wrote.unwrap();
            got.expect("it answers").unwrap();
            assert!(back == sent);
            apps.push(app);
        }
    };
    tokio::select! {
        () = serve => panic!("the foreign agent ended"),
        () = calls => {}
    }
    assert_eq!(stage.outbound.tunnels(), 1, "one tunnel for all");
    assert!(handshakes() >= before + 1.0);
}

/// Keys change in the middle of a connection, on the peer's demand and our own part; rustls' connection judges both.
#[tokio::test]
async fn records_go_on_after_key_updates() {
    let stage = Stage::set(109).await;
    let east = stage.east_plane.borrow().clone().unwrap();
    let key = tls::certified_key(&stage.db_svid).unwrap();
    let config = Arc::new(tls::server(key, east.trust.clone()).unwrap());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    let peer = tokio::spawn(async move {
        let (tcp, _) = listener.accept().await.unwrap();
        let mut stream = tokio_rustls::TlsAcceptor::from(config).accept(tcp).await.unwrap();
        let mut buffer = [0; 5];
        for _ in 0..20 {
            // KeyUpdate with update_requested: we answer with our own before the next record.
            stream.get_mut().1.refresh_traffic_keys().unwrap();
            stream.write_all(b"hello").await.unwrap();
            stream.flush().await.unwrap();
            stream.read_exact(&mut buffer).await.unwrap();
            assert_eq!(&buffer, b"again");
        }
        // An orderly end is told from a broken one.
        assert_eq!(stream.read(&mut buffer).await.unwrap(), 0);
    });
    let plane = stage.west_plane.borrow().clone().unwrap();
    let (name, config) = health::credentials(&plane, stage.web.id(), &stage.east.id("db").parse().unwrap()).unwrap();
    let tcp = TcpStream::connect(at).await.unwrap();
    let secured = ambit_agent::secure::connect(tcp, config, name).await.unwrap();
    let mut stream = ambit_agent::secure::Bytestream::new(secured);
    let mut buffer = [0; 5];
    for _ in 0..20 {
        timeout(SOON, stream.read_exact(&mut buffer)).await.expect("a record").unwrap();
        assert_eq!(&buffer, b"hello");
        stream.write_all(b"again").await.unwrap();
        stream.flush().await.unwrap();
    }
    stream.shutdown().await.unwrap();
    timeout(SOON, peer).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_tunnel_that_dies_takes_the_applications_connection_with_it() {
    let mut stage = Stage::set(110).await;
    // Between the agents: whoever cuts it cuts both legs at once, with resets.
    let between = TcpListener::bind((Ipv4Addr::new(127, 0, 82, 110), stage.hbone.port())).await.unwrap();
    stage.publish(
        |w| w.endpoints[0].node_address = "127.0.82.110".into(),
        |e| e.callers[0].address = "127.0.83.110".into(),
    );
    let (cut, mut cuts) = tokio::sync::mpsc::channel::<()>(1);
    let to = stage.hbone;
    let relay = tokio::spawn(async move {
        let (mut near, _) = between.accept().await.unwrap();
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind("127.0.83.110:0".parse().unwrap()).unwrap();
        let mut far = socket.connect(to).await.unwrap();
        tokio::select! {
            _ = tokio::io::copy_bidirectional(&mut near, &mut far) => {}
            _ = cuts.recv() => {}
        }
        near.set_zero_linger().unwrap();
        far.set_zero_linger().unwrap();
    });
    let mut app = stage.call_db().await;
    let (mut pod, _) = stage.served().await;
    round_trip(&mut app, &mut pod, 10).await;
    cut.send(()).await.unwrap();
    assert!(is_reset(app).await, "the caller");
    let read = timeout(SOON, pod.read(&mut [0; 1])).await.expect("the pod sees an end");
    assert_eq!(read.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
    relay.await.unwrap();
    assert_eq!(stage.outbound.tunnels(), 0);
}
