//! The native mode between our own agents: what a connection in it looks like to the applications at both ends, when a
//! tunnel is used again, and what bad peers get. rustls' own connections, of which tunnels use only the handshake, judge
//! our record layer.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use ambit_agent::native::{self, Answer, Open, Reason};
use ambit_agent::secure::{self, Secured};
use ambit_agent::{health, tls};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use support::Cell;
use support::between::Between;
use support::foreign;
use support::stage::{SOON, Stage, ended, is_reset, round_trip};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

/// What a kernel's buffers hold of a connection that nobody reads, all legs together.
const BUFFERS_MAX: usize = 64 << 20;

#[tokio::test]
async fn connections_follow_each_other_in_one_tunnel_and_never_mix() {
    let mut stage = Stage::set(101).await;
    let between = Between::set(&mut stage, 101).await;
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
        assert_eq!((stage.outbound.tunnels(), between.opened()), (1, 1), "connection {n}");
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
    ended(app, pod).await;
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
    let refused = [Reason::Unreachable, Reason::Elsewhere, Reason::Denied].map(Answer::Refused);
    assert_eq!((answers[0], &answers[1..]), (Answer::Opened, &refused[..]));
}

fn asked(to: SocketAddrV4) -> Open {
    Open { to: to.into(), prompt: true, trace: None, from: None, first: Vec::new() }
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
    // An address of IPv6 that no workload can have, and half of one.
    for address in ["::ffff:10.0.0.1", "::1", "::", "fe80::1", "ff02::1", "fd61:6d62:6974::1"] {
        let address: std::net::Ipv6Addr = address.parse().unwrap();
        wrong.push([&[1, 1 | 8], &address.octets()[..], &[0, 80, 0]].concat());
    }
    wrong.push([&[1, 1 | 8], &[0xfd; 14][..]].concat());
    for frame in wrong {
        let mut tunnel = stage.native().await.secured;
        // What comes with the handshake's last flight is rustls' to open, and it leaves out what is empty.
        tokio::time::sleep(Duration::from_millis(20)).await;
        say(&mut tunnel, &[&frame]).await;
        let told = async { [heard(&mut tunnel).await, heard(&mut tunnel).await, heard(&mut tunnel).await] };
        let told = timeout(Duration::from_secs(1), told).await.expect("the tunnel ends at once");
        let closed = "the peer ended the connection: alert 0";
        assert_eq!(told, [Ok(vec![5, 1]), Err(closed.into()), Err(closed.into())], "{frame:?}");
    }
    // In a connection: OPEN again, a kind that is none, an empty DATA, and bytes under no key.
    for (n, frame) in [good.clone(), vec![77], vec![3]].into_iter().chain([vec![0xff; 8]]).enumerate() {
        let mut native = stage.native().await;
        assert_eq!(native::open(&mut native.secured, &asked(stage.db_at())).await.unwrap(), Answer::Opened);
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
    let (mut silent, mut slow) = (stage.native().await.secured, stage.native().await.secured);
    slow.sealer.push(&[&[1; 100]]).unwrap();
    let sealed = slow.sealer.take();
    slow.tcp.write_all(&sealed[..50]).await.unwrap();
    let begun = Instant::now();
    let end = async |tunnel: &mut Secured| {
        let ended = timeout(SOON, heard(tunnel)).await.expect("it is closed").unwrap_err();
        (ended, begun.elapsed())
    };
    // One is given 3 s, and the other does not keep it waiting.
    for (ended, after) in <[_; 2]>::from(tokio::join!(end(&mut silent), end(&mut slow))) {
        assert_eq!(ended, "nothing");
        assert!((Duration::from_millis(2_500)..Duration::from_millis(4_000)).contains(&after), "{after:?}");
    }
}

#[tokio::test]
async fn a_node_that_speaks_hbone_only_is_called_in_hbone() {
    let mut stage = Stage::set(108).await;
    let opened = foreign::Calls::default();
    // West's agent dials the port of the stage; the foreign one has another address.
    let listener = TcpListener::bind((Ipv4Addr::new(127, 0, 81, 108), stage.hbone.port())).await.unwrap();
    stage.publish(|w| w.endpoints[0].node_address = "127.0.81.108".into(), |_| ());
    let mut apps = Vec::new();
    let serve = foreign::echo(&stage, listener, opened.clone());
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
    assert_eq!((stage.outbound.tunnels(), opened.lock().unwrap().len()), (1, 1), "one tunnel for all");
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

/// rustls remembers where messages lie in what it was shown: it panicked when it was asked for its alert and shown nothing.
#[tokio::test]
async fn a_stranger_is_told_why_and_its_handshake_is_an_error() {
    let mut stage = Stage::set(119).await;
    let mut stranger = Cell::founded("west", 9);
    stranger.entry("web", &["cgroup:web"], &[]);
    stage.web_svid = stranger.svid("web");
    stage.publish(|_| (), |_| ());
    let db = stage.east.id("db").parse().unwrap();
    let server = stage.east_plane.borrow().as_ref().unwrap().credentials_of(&db).unwrap().server.clone();
    let west = stage.west_plane.borrow().clone().unwrap();
    let (name, config) = health::credentials(&west, stage.web.id(), &db).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    let served = tokio::spawn(async move {
        let (mut tcp, _) = listener.accept().await.unwrap();
        let (hello, _) = ambit_agent::secure::hello(&mut tcp).await.unwrap();
        ambit_agent::secure::accept(tcp, hello, server).await.map(|_| ())
    });
    let tcp = TcpStream::connect(at).await.unwrap();
    let mut stream = tokio_rustls::TlsConnector::from(config).connect(name, tcp).await.unwrap();
    let told = timeout(SOON, stream.read(&mut [0; 1])).await.expect("a word").unwrap_err().to_string();
    assert!(told.contains("alert"), "{told}");
    timeout(SOON, served).await.unwrap().expect("no panic").unwrap_err();
}

#[tokio::test]
async fn a_tunnel_that_dies_takes_the_applications_connection_with_it() {
    let mut stage = Stage::set(110).await;
    let between = Between::set(&mut stage, 110).await;
    let mut app = stage.call_db().await;
    let (mut pod, _) = stage.served().await;
    round_trip(&mut app, &mut pod, 10).await;
    between.break_off();
    assert!(is_reset(app).await, "the caller");
    let read = timeout(SOON, pod.read(&mut [0; 1])).await.expect("the pod sees an end");
    assert_eq!(read.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
    assert_eq!(stage.outbound.tunnels(), 0);
}

/// Frames, as native.rs has them.
const OPENED: &[u8] = &[2];
const FIN: &[u8] = &[4];

fn data(bytes: &[u8]) -> Vec<u8> {
    [&[3], bytes].concat()
}

async fn say(tunnel: &mut Secured, frames: &[&[u8]]) {
    for frame in frames {
        tunnel.sealer.push(&[frame]).unwrap();
    }
    let sealed = tunnel.sealer.take();
    tunnel.tcp.write_all(&sealed).await.unwrap();
}

/// The next frame, or why there is none.
async fn heard(tunnel: &mut Secured) -> Result<Vec<u8>, String> {
    loop {
        if let Some(at) = tunnel.opener.next_record().map_err(|e| e.to_string())? {
            return Ok(tunnel.opener.bytes()[at].to_vec());
        }
        match tunnel.tcp.read(tunnel.opener.room()).await {
            Ok(0) => return Err("nothing".into()),
            Ok(n) => tunnel.opener.filled(n),
            Err(e) => return Err(e.to_string()),
        }
    }
}

/// An agent of ours gone wrong: behind its FIN it says what belongs to no connection, at once or a little later.
async fn leaking(stage: &Stage, listener: TcpListener, at_once: bool, opened: &AtomicUsize) {
    let east = stage.east_plane.borrow().clone().unwrap();
    let server = east.credentials_of(&stage.db_svid.id).unwrap().server.clone();
    loop {
        let (mut tcp, _) = listener.accept().await.unwrap();
        opened.fetch_add(1, Ordering::Relaxed);
        let server = server.clone();
        tokio::spawn(async move {
            let (hello, _) = secure::hello(&mut tcp).await.unwrap();
            let mut tunnel = secure::accept(tcp, hello, server).await.unwrap();
            assert_eq!(native::asked(&mut tunnel).await.unwrap().unwrap().first, b"hello");
            say(&mut tunnel, &[OPENED, &data(b"own")]).await;
            while heard(&mut tunnel).await.unwrap() != FIN {}
            let stale = data(b"another's");
            if at_once {
                say(&mut tunnel, &[FIN, OPENED, &stale]).await;
            } else {
                say(&mut tunnel, &[FIN]).await;
                tokio::time::sleep(Duration::from_millis(20)).await;
                say(&mut tunnel, &[OPENED, &stale]).await;
            }
            // It stays open, as one does that is used again.
            let _ = heard(&mut tunnel).await;
            std::future::pending::<()>().await;
        });
    }
}

#[tokio::test]
async fn what_comes_behind_the_end_of_a_connection_reaches_no_other() {
    for (n, at_once) in [(113, true), (114, false)] {
        let mut stage = Stage::set(n).await;
        let listener = TcpListener::bind((Ipv4Addr::new(127, 0, 81, n), stage.hbone.port())).await.unwrap();
        stage.publish(|w| w.endpoints[0].node_address = Ipv4Addr::new(127, 0, 81, n).to_string(), |_| ());
        let opened = AtomicUsize::new(0);
        let calls = async {
            for _ in 0..2 {
                let mut app = stage.call_db().await;
                app.write_all(b"hello").await.unwrap();
                app.shutdown().await.unwrap();
                let mut said = Vec::new();
                let end = timeout(SOON, app.read_to_end(&mut said)).await;
                assert_eq!(String::from_utf8_lossy(&said), "own", "at once: {at_once}");
                end.expect("an end").unwrap();
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        tokio::select! {
            () = leaking(&stage, listener, at_once, &opened) => panic!("the agent ended"),
            () = calls => {}
        }
        assert_eq!(opened.load(Ordering::Relaxed), 2);
    }
}

#[tokio::test]
async fn what_a_caller_says_behind_its_end_reaches_no_workload() {
    let stage = Stage::set(115).await;
    let mut tunnel = stage.native().await.secured;
    assert_eq!(native::open(&mut tunnel, &asked(stage.db_at())).await.unwrap(), Answer::Opened);
    let (mut pod, _) = stage.served().await;
    say(&mut tunnel, &[&data(b"mine"), FIN, &data(b"whose?")]).await;
    let mut there = Vec::new();
    timeout(SOON, pod.read_to_end(&mut there)).await.expect("an end").unwrap();
    assert_eq!(there, b"mine");
    pod.shutdown().await.unwrap();
    assert_eq!(heard(&mut tunnel).await.unwrap(), FIN);
    assert_eq!(heard(&mut tunnel).await.unwrap(), [5, 1], "RESET: malformed");
    assert_eq!(heard(&mut tunnel).await.unwrap_err(), "the peer ended the connection: alert 0");
    assert!(timeout(Duration::from_millis(100), stage.db.accept()).await.is_err(), "no other was reached");
}
