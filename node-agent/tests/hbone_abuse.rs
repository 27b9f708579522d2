//! What a proven caller may try with HTTP/2 frames, and anybody with bytes: each attempt is given up at a bound, and another
//! caller is served meanwhile. Frames by hand (RFC 9113, section 4; RFC 7541, section 6), since no library would send them.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use ambit_agent::hbone::{CALLER_PONG_MAX, REQUESTS_MAX};
use rustls_pki_types::ServerName;
use std::net::SocketAddr;
use std::time::{Duration, Instant};
use support::foreign;
use support::stage::{SOON, Stage, round_trip};
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf, split};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::time::timeout;
use tokio_rustls::client::TlsStream;

const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const CONTINUATION: u8 = 9;
const END_HEADERS: u8 = 4;
/// A frame's content, as the peer takes it by default.
const FRAME_BYTES: usize = 16 * 1024;
/// So that what is taken is what the agent took, and not what buffers on the way hold.
const PAUSE: Duration = Duration::from_millis(2);

fn frame(kind: u8, flags: u8, stream: u32, content: &[u8]) -> Vec<u8> {
    let mut bytes = (content.len() as u32).to_be_bytes()[1..].to_vec();
    bytes.extend([kind, flags]);
    bytes.extend(stream.to_be_bytes());
    bytes.extend(content);
    bytes
}

/// Literals without indexing, of names in the static table.
fn connect_to(authority: &str) -> Vec<u8> {
    [&[2, 7][..], b"CONNECT", &[1, authority.len() as u8], authority.as_bytes()].concat()
}

/// A tunnel in which frames are said.
struct Rude {
    read: ReadHalf<TlsStream<TcpStream>>,
    write: WriteHalf<TlsStream<TcpStream>>,
}

impl Rude {
    async fn open(stage: &Stage) -> Rude {
        let name = ServerName::try_from(ambit_agent::sni::server_name(&stage.db_svid.id)).unwrap();
        let stream = foreign::secured(stage, stage.home, stage.hbone, name).await.unwrap();
        let (read, write) = split(stream);
        Rude { read, write }
    }

    async fn preface(stage: &Stage) -> Rude {
        let mut rude = Self::open(stage).await;
        let preface = [&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..], &frame(SETTINGS, 0, 0, &[])].concat();
        rude.write.write_all(&preface).await.unwrap();
        rude
    }

    /// Writes `frames` one by one until the far end has ended the tunnel; how many it took. None where all were taken and
    /// it did not end.
    async fn say(mut self, pause: Duration, frames: impl Iterator<Item = Vec<u8>>) -> Option<(usize, Vec<u8>)> {
        let reading = tokio::spawn(async move {
            let mut said = Vec::new();
            let _ = self.read.read_to_end(&mut said).await;
            said
        });
        let mut written = 0;
        for frame in frames {
            let done = reading.is_finished() || self.write.write_all(&frame).await.is_err();
            if done || self.write.flush().await.is_err() {
                break;
            }
            written += 1;
            if !pause.is_zero() {
                tokio::time::sleep(pause).await;
            }
        }
        let said = timeout(SOON, reading).await.ok()?.unwrap();
        Some((written, said))
    }
}

/// The kinds of frames in what was said, without the payloads.
fn kinds(mut said: &[u8]) -> Vec<u8> {
    let mut found = Vec::new();
    while let [a, b, c, kind, _, _, _, _, _, rest @ ..] = said {
        found.push(*kind);
        let len = u32::from_be_bytes([0, *a, *b, *c]) as usize;
        said = rest.get(len..).unwrap_or_default();
    }
    found
}

/// Another connection, which waits for nobody.
async fn others_are_served(stage: &Stage) {
    let begun = Instant::now();
    let mut app = stage.call_db().await;
    let (mut pod, _) = stage.served().await;
    round_trip(&mut app, &mut pod, 10).await;
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
}

/// Pod connections that come until none does for a moment.
async fn came(stage: &Stage) -> usize {
    let mut came = Vec::new();
    while let Ok(accepted) = timeout(Duration::from_millis(300), stage.db.accept()).await {
        came.push(accepted.unwrap());
    }
    came.len()
}

#[tokio::test]
async fn streams_that_are_reset_at_once_end_the_tunnel_and_reach_the_pod_a_few_times() {
    let stage = Stage::set(201).await;
    let to = connect_to(&stage.db_at().to_string());
    let pairs = (0..20_000u32).map(|n| {
        let stream = 2 * n + 1;
        [frame(HEADERS, END_HEADERS, stream, &to), frame(RST_STREAM, 0, stream, &8u32.to_be_bytes())].concat()
    });
    let (said, pods) = tokio::join!(Rude::preface(&stage).await.say(Duration::ZERO, pairs), came(&stage));
    let (taken, said) = said.expect("it ends");
    assert!(taken < 20_000 && kinds(&said).contains(&GOAWAY), "{taken} resets, told {:?}", kinds(&said));
    assert!(pods <= REQUESTS_MAX, "{pods} connections to the pod");
    others_are_served(&stage).await;
}

#[tokio::test]
async fn headers_without_end_end_the_tunnel_at_a_bound() {
    let stage = Stage::set(202).await;
    let to = connect_to(&stage.db_at().to_string());
    // A field of 100 bytes, again and again.
    let field = [&[0, 1, b'a', 96][..], &[b'b'; 96]].concat();
    for (what, content) in [
        ("full frames", field.repeat(FRAME_BYTES / field.len())),
        ("one field a frame", field.clone()),
        ("empty frames", vec![]),
    ] {
        let first = std::iter::once(frame(HEADERS, 0, 1, &to));
        let endless = first.chain(std::iter::repeat_with(|| frame(CONTINUATION, 0, 1, &content)).take(2000));
        let (taken, _) = Rude::preface(&stage).await.say(PAUSE, endless).await.expect("it ends");
        let bytes = taken * (content.len() + 9);
        println!("{what}: {bytes} bytes in {taken} frames");
        assert!(bytes < 512 << 10 && taken < 500, "{what}: {bytes} bytes in {taken} frames");
    }
    // Headers that do end, and are more than a request has.
    let mut large = vec![frame(HEADERS, 0, 1, &to)];
    large.extend((0..3).map(|_| frame(CONTINUATION, 0, 1, &field.repeat(100))));
    large.push(frame(CONTINUATION, END_HEADERS, 1, &[]));
    let (_, pods) = tokio::join!(Rude::preface(&stage).await.say(PAUSE, large.into_iter()), came(&stage));
    assert_eq!(pods, 0, "a request of 30 KB of headers reached the pod");
    others_are_served(&stage).await;
}

#[tokio::test]
async fn no_more_streams_are_served_at_once_than_places() {
    let stage = Stage::set(203).await;
    let to = connect_to(&stage.db_at().to_string());
    let mut rude = Rude::preface(&stage).await;
    let mut many = Vec::new();
    for n in 0..300u32 {
        many.extend(frame(HEADERS, END_HEADERS, 2 * n + 1, &to));
    }
    let _ = rude.write.write_all(&many).await;
    let _ = rude.write.flush().await;
    let pods = came(&stage).await;
    assert!((1..=REQUESTS_MAX).contains(&pods), "{pods} connections to the pod of 300");
    others_are_served(&stage).await;
}

#[tokio::test]
async fn who_says_nothing_or_half_of_it_is_given_up_in_time() {
    let stage = Stage::set(204).await;
    // From the address of a known node, so that it is not for want of a place.
    let tcp = || async {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind(SocketAddr::from((stage.home, 0))).unwrap();
        socket.connect(stage.hbone).await.unwrap()
    };
    // Half of a ClientHello, byte by byte.
    let hello = async {
        let (mut tcp, begun) = (tcp().await, Instant::now());
        for byte in [0x16u8, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3].into_iter().chain([7; 500]) {
            tokio::time::sleep(Duration::from_millis(100)).await;
            if tcp.write_all(&[byte]).await.is_err() || tcp.try_read(&mut [0; 16]).is_ok() {
                break;
            }
        }
        begun.elapsed()
    };
    // A handshake, and then half a preface, none, or half a frame of headers.
    let silent = |said: &'static [u8]| {
        let stage = &stage;
        async move {
            let mut rude = Rude::open(stage).await;
            let begun = Instant::now();
            rude.write.write_all(said).await.unwrap();
            rude.write.flush().await.unwrap();
            let _ = timeout(4 * SOON, rude.read.read_to_end(&mut Vec::new())).await.expect("it ends");
            begun.elapsed()
        }
    };
    let took = tokio::join!(
        hello,
        silent(b""),
        silent(b"PRI * HTTP/2.0\r\n"),
        silent(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0\0\0\x40\x01\x04\0\0\0\x01half")
    );
    let took = [took.0, took.1, took.2, took.3];
    // The last one has proved who it is, and may take its time; a ping that comes in the middle of a frame it cannot answer.
    assert!(took[..3].iter().all(|took| *took < Duration::from_secs(5)), "{took:?}");
    assert!(took[3] < CALLER_PONG_MAX + Duration::from_secs(2), "{took:?}");
    others_are_served(&stage).await;
}

/// A small program that does not read while it waits for something else.
#[tokio::test]
async fn a_caller_that_does_not_look_for_a_while_keeps_its_tunnel() {
    let stage = Stage::set(210).await;
    let mut rude = Rude::preface(&stage).await;
    let to = connect_to(&stage.db_at().to_string());
    rude.write.write_all(&frame(HEADERS, END_HEADERS, 1, &to)).await.unwrap();
    rude.write.flush().await.unwrap();
    let (mut pod, _) = stage.served().await;
    tokio::time::sleep(Duration::from_secs(4)).await;
    rude.write.write_all(&frame(0, 0, 1, b"still here")).await.unwrap();
    rude.write.flush().await.unwrap();
    let mut said = [0; 10];
    timeout(SOON, pod.read_exact(&mut said)).await.expect("it is carried").unwrap();
    assert_eq!(&said, b"still here");
}

#[tokio::test]
async fn who_does_not_read_answers_is_held_up_and_given_up() {
    let stage = Stage::set(205).await;
    for (what, one) in [("pings", frame(PING, 0, 0, &[0; 8])), ("settings", frame(SETTINGS, 0, 0, &[0, 4, 0, 1, 0, 0]))]
    {
        let mut rude = Rude::preface(&stage).await;
        let many = one.repeat(1000);
        let mut written = 0;
        // Until it stops taking more, or ends the tunnel.
        while let Ok(Ok(())) = timeout(Duration::from_secs(3), rude.write.write_all(&many)).await {
            written += many.len();
            assert!(written < 64 << 20, "{what}: {written} bytes taken of one who reads nothing");
        }
        println!("{what}: {written} bytes taken");
        others_are_served(&stage).await;
    }
}

/// What the application gets of a peer that answers CONNECT with these frames, all at once.
async fn answered(n: u8, frames: &[Vec<u8>]) -> std::io::Result<Vec<u8>> {
    let mut stage = Stage::set(n).await;
    let listener = TcpListener::bind((std::net::Ipv4Addr::new(127, 0, 81, n), stage.hbone.port())).await.unwrap();
    stage.publish(|w| w.endpoints[0].node_address = listener.local_addr().unwrap().ip().to_string(), |_| ());
    let mut app = stage.call_db().await;
    let peer = async {
        let mut tls = foreign::accept(&stage, &listener).await;
        tls.write_all(&frame(SETTINGS, 0, 0, &[])).await.unwrap();
        let mut said = Vec::new();
        // The preface, then frames.
        while !said.get(24..).is_some_and(|said| kinds(said).contains(&HEADERS)) {
            assert!(tls.read_buf(&mut said).await.unwrap() > 0, "it ended before it asked");
        }
        tls.write_all(&frames.concat()).await.unwrap();
        tls
    };
    let read = async {
        let mut got = Vec::new();
        timeout(SOON, app.read_to_end(&mut got)).await.expect("an end").map(|_| got)
    };
    let (_open, got) = tokio::join!(peer, read);
    got
}

/// Envoy resets a stream whose workload has closed, right behind the end of its answer.
#[tokio::test]
async fn a_whole_answer_is_given_whole_and_a_part_of_one_is_never_taken_for_it() {
    const OK: &[u8] = &[0x88];
    const DATA: u8 = 0;
    const END_STREAM: u8 = 1;
    const NO_ERROR: [u8; 4] = [0; 4];
    const CANCEL: [u8; 4] = [0, 0, 0, 8];
    let ok = frame(HEADERS, END_HEADERS, 1, OK);
    let page = |flags| frame(DATA, flags, 1, b"a page");
    let reset = |why| frame(RST_STREAM, 0, 1, why);
    for (n, frames, whole) in [
        (206, [ok.clone(), page(END_STREAM), reset(&NO_ERROR)], true),
        (207, [ok.clone(), page(0), reset(&NO_ERROR)], false),
        // The workload ended its direction, and broke off later.
        (208, [ok.clone(), page(END_STREAM), reset(&CANCEL)], false),
        (209, [ok, page(0), reset(&CANCEL)], false),
    ] {
        let got = answered(n, &frames).await;
        assert_eq!(got.as_deref().ok(), whole.then_some(&b"a page"[..]), "{n}: {got:?}");
    }
}
