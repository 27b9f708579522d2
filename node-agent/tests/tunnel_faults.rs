//! Tunnels when something is slow, dead, malicious or too much: what the applications see, what is counted, and that
//! nobody else suffers.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use ambit_agent::clock::Clock;
use ambit_agent::hbone::{Door, Native};
use ambit_agent::health;
use ambit_agent::inbound::Inbound;
use ambit_agent::native::{self, Answer, Open, Reason};
use ambit_agent::netns::{Netns, NetnsThread};
use ambit_agent::pool::{Key, Lease, Pool, Totals};
use ambit_agent::shown::Now;
use ambit_model::Generation;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use support::Cell;
use support::between::Between;
use support::foreign;
use support::stage::{SOON, Stage, ended, is_reset, round_trip};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::time::timeout;

/// Longer than it takes to find a dead peer.
const PAUSE: Duration = Duration::from_secs(10);
/// What a kernel's buffers hold of a connection that nobody reads, all legs together.
const BUFFERS_MAX: u64 = 64 << 20;

fn byte_at(n: u64) -> u8 {
    (n % 251) as u8
}

/// Writes until told to stop, then ends; how much it was.
async fn write(mut to: impl AsyncWrite + Unpin, stop: Arc<AtomicBool>, written: Arc<AtomicU64>) {
    let chunk: Vec<u8> = (0..251 * 256).map(byte_at).collect();
    while !stop.load(Ordering::Relaxed) {
        to.write_all(&chunk).await.expect("the connection holds");
        let all = written.fetch_add(chunk.len() as u64, Ordering::Relaxed);
        assert!(all < BUFFERS_MAX, "it is held up");
    }
    to.shutdown().await.unwrap();
}

/// Pauses, then reads to the end; how much it was.
async fn read(mut from: impl AsyncRead + Unpin, stop: Arc<AtomicBool>) -> u64 {
    tokio::time::sleep(PAUSE).await;
    stop.store(true, Ordering::Relaxed);
    let (mut all, mut buffer) = (0, vec![0; 64 * 1024]);
    loop {
        let n = timeout(2 * SOON, from.read(&mut buffer)).await.expect("it flows again").expect("the connection holds");
        if n == 0 {
            return all;
        }
        assert!(buffer[..n].iter().all(|byte| {
            all += 1;
            *byte == byte_at(all - 1)
        }));
    }
}

#[tokio::test]
async fn a_reader_that_pauses_for_ten_seconds_loses_no_byte_either_way() {
    let stage = Stage::set(121).await;
    let app = stage.call_db().await;
    let (pod, _) = stage.served().await;
    let (stop, sent): (Arc<AtomicBool>, [Arc<AtomicU64>; 2]) = Default::default();
    let ((app_read, app_write), (pod_read, pod_write)) = (app.into_split(), pod.into_split());
    let up = tokio::spawn(write(app_write, stop.clone(), sent[0].clone()));
    let down = tokio::spawn(write(pod_write, stop.clone(), sent[1].clone()));
    let (there, back) = tokio::join!(read(pod_read, stop.clone()), read(app_read, stop.clone()));
    up.await.unwrap();
    down.await.unwrap();
    assert_eq!([there, back], sent.map(|all| all.load(Ordering::Relaxed)));
}

/// The node is as healthy as before: it was the workload that broke off.
#[tokio::test]
async fn a_workload_that_breaks_off_at_once_is_no_failure_of_its_node() {
    use std::os::fd::AsFd;
    let mut stage = Stage::set(122).await;
    let between = Between::set(&mut stage, 122).await;
    let listener = std::net::TcpListener::from(stage.db.as_fd().try_clone_to_owned().unwrap());
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = stop.clone();
    let pod = std::thread::spawn(move || {
        while !stopped.load(Ordering::Relaxed) {
            match listener.accept() {
                Ok((tcp, _)) => TcpSocket::from_std_stream(tcp).set_zero_linger().unwrap(),
                Err(_) => std::thread::yield_now(),
            }
        }
    });
    for n in 0..30 {
        let mut app = stage.call_db().await;
        app.write_all(b"anybody there?").await.unwrap();
        assert!(is_reset(app).await, "call {n}");
        assert!(stage.health.unhealthy().is_empty(), "call {n}");
    }
    stop.store(true, Ordering::Relaxed);
    pod.join().unwrap();
    let mut app = stage.call_db().await;
    let (mut pod, _) = stage.served().await;
    round_trip(&mut app, &mut pod, 10).await;
    assert!(between.opened() < 30, "tunnels are used again where it is told before they carry: {}", between.opened());
}

#[tokio::test]
async fn what_is_refused_costs_no_tunnel() {
    let mut stage = Stage::set(123).await;
    let between = Between::set(&mut stage, 123).await;
    let (mut app, at) = (stage.call_db().await, stage.db_at());
    let (mut pod, _) = stage.served().await;
    round_trip(&mut app, &mut pod, 10).await;
    ended(app, pod).await;
    stage.publish(
        |w| between.west(w),
        |e| {
            between.east(e);
            e.policies.clear();
        },
    );
    for _ in 0..5 {
        assert!(is_reset(stage.call_db().await).await);
    }
    stage.publish(|w| between.west(w), |e| between.east(e));
    let closed = TcpListener::bind((*at.ip(), 0)).await.unwrap().local_addr().unwrap().port();
    let nobody = SocketAddrV4::new(*at.ip(), closed);
    for _ in 0..5 {
        assert!(
            is_reset(
                stage
                    .call(Some(ambit_agent::outbound::Captured { asked: nobody.into(), endpoint: nobody.into() }))
                    .await
            )
            .await
        );
    }
    let mut app = stage.call_db().await;
    let (mut pod, _) = stage.served().await;
    round_trip(&mut app, &mut pod, 10).await;
    assert_eq!(between.opened(), 1);
    assert!(stage.health.unhealthy().is_empty());
}

#[tokio::test]
async fn a_node_that_fell_silent_takes_all_its_warm_tunnels_with_it() {
    let mut stage = Stage::set(124).await;
    let between = Between::set(&mut stage, 124).await;
    let mut open = Vec::new();
    for _ in 0..3 {
        let mut app = stage.call_db().await;
        let (mut pod, _) = stage.served().await;
        round_trip(&mut app, &mut pod, 10).await;
        open.push((app, pod));
    }
    for (app, pod) in open {
        ended(app, pod).await;
    }
    assert_eq!((stage.outbound.tunnels(), between.opened()), (3, 3));
    between.fall_silent();
    assert!(is_reset(stage.call_db().await).await);
    assert_eq!(stage.outbound.tunnels(), 0, "the next connection does not wait for one of them");
}

#[tokio::test]
async fn a_tunnel_is_used_again_only_under_the_bundles_of_now() {
    let mut stage = Stage::set(125).await;
    let stranger = Cell::founded("east", 9);
    let other = stranger.bundle();
    for callers in [true, false] {
        let mut app = stage.call_db().await;
        let (mut pod, _) = stage.served().await;
        round_trip(&mut app, &mut pod, 10).await;
        ended(app, pod).await;
        assert_eq!(stage.outbound.tunnels(), 1);
        // One side believes in another root of the other's name, or in none.
        stage.publish(
            |w| w.bundles[1] = if callers { other.clone() } else { w.bundles[1].clone() },
            |e| e.bundles.truncate(if callers { 2 } else { 1 }),
        );
        assert!(is_reset(stage.call_db().await).await, "callers: {callers}");
        assert!(timeout(Duration::from_millis(100), stage.db.accept()).await.is_err(), "the pod saw nothing");
        stage.publish(|_| (), |_| ());
    }
}

#[tokio::test]
async fn what_is_withdrawn_while_the_pod_is_waited_for_reaches_it_with_no_byte() {
    let mut stage = Stage::set(126).await;
    let netns = NetnsThread::start().unwrap();
    let listener = TcpListener::bind((Ipv4Addr::new(127, 0, 78, 126), 0)).await.unwrap();
    stage.hbone = listener.local_addr().unwrap();
    let (east, denials) = (stage.east_plane.subscribe(), stage.east_denials.clone());
    tokio::spawn(Inbound::new(east, denials, netns.clone(), Arc::new(Clock::default())).serve(listener));
    let mut native = stage.native().await;
    // The thread that makes sockets is busy.
    let own = Netns::open(std::path::Path::new("/proc/self/ns/net")).unwrap();
    let busy = tokio::spawn(async move {
        let wait = || {
            std::thread::sleep(Duration::from_millis(600));
            Ok(())
        };
        netns.run(&own, wait).await.unwrap();
    });
    tokio::time::sleep(Duration::from_millis(50)).await;
    let open = Open { to: stage.db_at().into(), prompt: false, trace: None, from: None, first: b"secret".to_vec() };
    let asking = native::open(&mut native.secured, &open);
    let withdrawn = async {
        tokio::time::sleep(Duration::from_millis(200)).await;
        stage.publish(|_| (), |e| e.policies.clear());
    };
    let (answer, ()) = tokio::join!(timeout(SOON, asking), withdrawn);
    busy.await.unwrap();
    if let Ok(accepted) = timeout(Duration::from_millis(200), stage.db.accept()).await {
        let mut said = Vec::new();
        let _ = timeout(SOON, accepted.unwrap().0.read_to_end(&mut said)).await.expect("an end");
        assert_eq!(said, b"");
    }
    assert_eq!(answer.unwrap().unwrap(), Answer::Refused(Reason::Denied));
}

/// As when it is killed: the kernel closes what it had open.
#[test]
fn an_agent_that_ends_breaks_connections_off_rather_than_end_them() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (app, pod) = runtime.block_on(async {
        let stage = Stage::set(127).await;
        let mut app = stage.call_db().await;
        let (mut pod, _) = stage.served().await;
        round_trip(&mut app, &mut pod, 10).await;
        (app.into_std().unwrap(), pod.into_std().unwrap())
    });
    runtime.shutdown_timeout(SOON);
    for (whose, mut tcp) in [("the caller's", app), ("the pod's", pod)] {
        tcp.set_nonblocking(false).unwrap();
        tcp.set_read_timeout(Some(SOON)).unwrap();
        let read = std::io::Read::read(&mut tcp, &mut [0; 1]);
        assert_eq!(read.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset, "{whose}");
    }
}

/// More than all tunnels that there may be.
const SILENT: usize = 4200;

#[tokio::test]
async fn strangers_that_say_nothing_keep_no_node_out() {
    let stage = Stage::set(128).await;
    let mut silent = Vec::new();
    for _ in 0..SILENT {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.75.128:0".parse().unwrap()).unwrap();
        silent.push(socket.connect(stage.hbone).await.unwrap());
    }
    let begun = Instant::now();
    let mut app = stage.call_db().await;
    let (mut pod, _) = timeout(Duration::from_secs(2), stage.db.accept()).await.expect("a place").unwrap();
    round_trip(&mut app, &mut pod, 10).await;
    assert!(begun.elapsed() < Duration::from_secs(2), "before the strangers' time is over");
}

#[tokio::test]
async fn a_burst_of_first_calls_to_a_node_of_hbone_only_opens_one_tunnel() {
    let mut stage = Stage::set(129).await;
    let listener = TcpListener::bind((Ipv4Addr::new(127, 0, 81, 129), stage.hbone.port())).await.unwrap();
    stage.publish(|w| w.endpoints[0].node_address = "127.0.81.129".into(), |_| ());
    let connections = foreign::Calls::default();
    let calls = async {
        let mut apps = futures::future::join_all((0..40).map(|_| stage.call_db())).await;
        for app in &mut apps {
            app.write_all(b"ping").await.unwrap();
        }
        for app in &mut apps {
            timeout(SOON, app.read_exact(&mut [0; 4])).await.expect("an answer").unwrap();
        }
    };
    tokio::select! {
        () = foreign::echo(&stage, listener, connections.clone()) => panic!("the foreign agent ended"),
        () = calls => {}
    }
    assert_eq!(connections.lock().unwrap().len(), 1);
}

/// Says it and reads what comes, to the end.
async fn said(native: &mut Native, sealed: &[u8]) -> String {
    native.secured.tcp.write_all(sealed).await.unwrap();
    let answer = timeout(SOON, async {
        loop {
            match native.secured.opener.next_record() {
                Ok(Some(record)) => panic!("{record:?}"),
                Err(end) => return end.to_string(),
                Ok(None) => {}
            }
            let read = native.secured.tcp.read(native.secured.opener.room()).await;
            match read {
                Ok(0) => return "nothing".into(),
                Err(error) => return error.to_string(),
                Ok(n) => native.secured.opener.filled(n),
            }
        }
    });
    answer.await.expect("an end")
}

#[tokio::test]
async fn who_is_turned_away_or_forges_is_told_by_an_alert() {
    let mut stage = Stage::set(130).await;
    let mut native = stage.native().await;
    // What comes with the handshake's last flight is rustls' to judge.
    tokio::time::sleep(Duration::from_millis(50)).await;
    native.secured.sealer.push(&[&[1; 20]]).unwrap();
    let mut sealed = native.secured.sealer.take();
    *sealed.last_mut().unwrap() ^= 1;
    assert_eq!(said(&mut native, &sealed).await, "the peer ended the connection: alert 20", "bad_record_mac");
    // Of a node that may not call from here: the handshake is over before that is known.
    let elsewhere = stage.caller(1, "127.0.75.130");
    stage.publish(|_| (), |e| e.callers = vec![elsewhere]);
    let mut native = stage.native().await;
    assert_eq!(said(&mut native, &[]).await, "the peer ended the connection: alert 49", "access_denied");
    // A name of nobody here.
    stage.publish(|_| (), |_| ());
    let plane = stage.west_plane.borrow().clone().unwrap();
    let (_, config) = health::credentials(&plane, stage.web.id(), &stage.east.id("db").parse().unwrap()).unwrap();
    let tcp = TcpStream::connect(stage.hbone).await.unwrap();
    let error =
        ambit_agent::secure::connect(tcp, config, "nobody.ambit.internal".try_into().unwrap()).await.unwrap_err();
    assert!(error.to_string().contains("UnrecognisedName"), "{error}");
}

fn key(stage: &Stage, node: SocketAddr) -> Key {
    Key {
        source: stage.web.id().clone(),
        destination: stage.db_svid.id.clone(),
        door: Door::Node,
        from: stage.home,
        node,
        holder: (stage.east.node(), Generation(1)),
        credentials: 1,
    }
}

fn now(stage: &Stage) -> Now {
    let plane = stage.west_plane.borrow().clone().unwrap();
    Now { trust: plane.trust.current(), at: stage.east_clock.now() }
}

async fn lease(stage: &Stage, pool: &Pool, now: &Now, made: &AtomicU64) -> Lease {
    let plane = stage.west_plane.borrow().clone().unwrap();
    let config = || {
        made.fetch_add(1, Ordering::Relaxed);
        health::credentials(&plane, stage.web.id(), &stage.db_svid.id)
    };
    timeout(2 * SOON, pool.lease(&key(stage, stage.hbone), now, &stage.annex, config)).await.unwrap().unwrap()
}

#[tokio::test]
async fn threads_share_what_they_may_have_of_a_peer() {
    let stage = Stage::set(131).await;
    let (totals, made, now) = (Totals::default(), AtomicU64::new(0), now(&stage));
    let pools = [Pool::new(totals.clone()), Pool::new(totals)];
    let mut leases = futures::future::join_all((0..80).map(|n| lease(&stage, &pools[n % 2], &now, &made))).await;
    let natives = |all: &[Lease]| all.iter().filter(|lease| matches!(lease, Lease::Native(_))).count();
    assert_eq!(natives(&leases), 64);
    // The others share, of which no thread shares with another; and no lease of a tunnel that is there makes a configuration.
    assert_eq!(made.load(Ordering::Relaxed), 64 + 2);
    assert_eq!(pools.iter().map(Pool::open).sum::<usize>(), 64 + 2);
    // What comes back is warm, and counts still.
    for lease in leases.drain(..) {
        if let Lease::Native(lease) = lease {
            lease.give_back();
        }
    }
    let again = futures::future::join_all((0..80).map(|n| lease(&stage, &pools[n % 2], &now, &made))).await;
    assert_eq!(natives(&again), 64);
}

#[tokio::test]
async fn no_connection_begins_in_a_tunnel_whose_far_ends_svid_ended() {
    let mut stage = Stage::set(132).await;
    let (pool, made, now) = (Pool::new(Totals::default()), AtomicU64::new(0), now(&stage));
    let later = Now { at: stage.db_svid.not_after.plus_ms(1), ..now.clone() };
    for (at, dialed) in [(&now, 1), (&now, 1), (&later, 2)] {
        let Lease::Native(lease) = lease(&stage, &pool, at, &made).await else { panic!("native") };
        lease.give_back();
        assert_eq!(made.load(Ordering::Relaxed), dialed);
    }
    // Nor in one that is shared.
    let connections = foreign::Calls::default();
    let listener = TcpListener::bind((Ipv4Addr::new(127, 0, 81, 132), 0)).await.unwrap();
    stage.hbone = listener.local_addr().unwrap();
    let made = AtomicU64::new(0);
    let calls = async {
        for (at, dialed) in [(&now, 1), (&now, 1), (&later, 2)] {
            assert!(matches!(lease(&stage, &pool, at, &made).await, Lease::Hbone(_)));
            assert_eq!(made.load(Ordering::Relaxed), dialed);
        }
    };
    tokio::select! {
        () = foreign::echo(&stage, listener, connections.clone()) => panic!("the foreign agent ended"),
        () = calls => {}
    }
    assert_eq!(connections.lock().unwrap().len(), 2);
}
