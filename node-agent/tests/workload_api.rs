//! The Workload API as a foreign client sees it: the `spiffe` crate, which nobody of this project wrote (issue A, proof 3).

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use ambit_agent::issued::{Issued, Svids};
use ambit_model::{Code, Refusal};
use ambit_proto::v1;
use ambit_proto::workload::spiffe_workload_api_client::SpiffeWorkloadApiClient;
use ambit_proto::workload::{JwtsvidRequest, ValidateJwtsvidRequest, X509svidRequest};
use spiffe::workload_api::WorkloadApiError;
use spiffe::{TrustDomain, WorkloadApiClient};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use support::local::{Folder, Socket, Stage, call, stage, uid};
use tokio_stream::StreamExt;
use tonic::transport::Channel;

#[tokio::test]
async fn the_spiffe_crate_fetches_svid_and_bundles() {
    let Stage { mut west, east, slice } = stage();
    let issued = Issued::default();
    issued.set_view(west.view(slice));
    let svid = west.svid("me");
    let others = west.svid("other");
    issued
        .set_svids(BTreeMap::from([("me".parse().unwrap(), Ok(svid.clone())), ("other".parse().unwrap(), Ok(others))]));
    let socket = Socket::serve("fetch", &issued);
    let client = WorkloadApiClient::connect_to(socket.endpoint()).await.unwrap();

    let context = client.fetch_x509_context().await.unwrap();
    let fetched = context.default_svid().unwrap();
    assert_eq!(fetched.spiffe_id().to_string(), "spiffe://west/me");
    assert_eq!(fetched.cert_chain().len(), 2, "leaf and intermediate");
    assert_eq!(fetched.cert_chain()[0].as_bytes(), svid.chain_der[0].as_slice());
    assert_eq!(context.svids().len(), 1, "another uid's identity is not shown");

    let bundles = client.fetch_x509_bundles().await.unwrap();
    for (td, known) in [("west", Some(&west)), ("east", Some(&east)), ("north", None)] {
        let found = bundles.get(&TrustDomain::new(td).unwrap());
        assert_eq!(found.is_some(), known.is_some(), "{td}");
        if let (Some(found), Some(cell)) = (found, known) {
            assert_eq!(found.authorities().len(), 1);
            assert_eq!(found.authorities()[0].as_bytes(), cell.bundle().roots_der[0].as_slice());
        }
    }
}

#[tokio::test]
async fn a_stream_sends_the_full_set_on_every_change_and_ends_with_the_identity() {
    let Stage { mut west, slice, .. } = stage();
    let issued = Issued::default();
    issued.set_view(west.view(slice.clone()));
    let socket = Socket::serve("stream", &issued);
    let client = WorkloadApiClient::connect_to(socket.endpoint()).await.unwrap();
    // Asked before anything is issued: the wish reaches the issuance, the answer comes with the SVID.
    let mut wanted = issued.wanted();
    let (first, stream) = tokio::join!(
        async {
            wanted.wait_for(|w| w.contains(&"me".parse().unwrap())).await.unwrap();
            let svid = west.svid("me");
            issued.set_svids(BTreeMap::from([("me".parse().unwrap(), Ok(svid.clone()))]));
            svid
        },
        client.stream_x509_svids()
    );
    let mut stream = stream.unwrap();
    assert_eq!(stream.next().await.unwrap().unwrap().cert_chain()[0].as_bytes(), first.chain_der[0].as_slice());

    // A change that concerns somebody else is no message; the next one is the renewal.
    issued.set_view(west.view(v1::Slice { revision: 2, ..slice.clone() }));
    let second = west.svid("me");
    issued.set_svids(BTreeMap::from([("me".parse().unwrap(), Ok(second.clone()))]));
    assert_eq!(stream.next().await.unwrap().unwrap().cert_chain()[0].as_bytes(), second.chain_der[0].as_slice());

    issued.set_view(west.view(v1::Slice { revision: 3, entries: vec![], ..slice }));
    let error = stream.next().await.unwrap().unwrap_err();
    assert!(matches!(error, WorkloadApiError::NoIdentityIssued), "{error:?}");
}

#[tokio::test]
async fn nobody_gets_nothing_and_the_header_is_required() {
    let Stage { west, mut slice, .. } = stage();
    slice.entries.remove(0);
    let issued = Issued::default();
    let socket = Socket::serve("refuse", &issued);
    let mut raw = SpiffeWorkloadApiClient::new(socket.channel().await);
    let with_header = || {
        let mut request = tonic::Request::new(X509svidRequest {});
        request.metadata_mut().insert("workload.spiffe.io", "true".parse().unwrap());
        request
    };
    async fn first(raw: &mut SpiffeWorkloadApiClient<Channel>, r: tonic::Request<X509svidRequest>) -> tonic::Code {
        match raw.fetch_x509svid(r).await {
            Ok(stream) => stream.into_inner().message().await.unwrap_err().code(),
            Err(status) => status.code(),
        }
    }
    assert_eq!(first(&mut raw, tonic::Request::new(X509svidRequest {})).await, tonic::Code::InvalidArgument);
    let mut wrong = with_header();
    wrong.metadata_mut().insert("workload.spiffe.io", "TRUE".parse().unwrap());
    assert_eq!(first(&mut raw, wrong).await, tonic::Code::InvalidArgument);
    assert_eq!(first(&mut raw, with_header()).await, tonic::Code::Unavailable, "no slice yet");

    issued.set_view(west.view(slice));
    assert_eq!(first(&mut raw, with_header()).await, tonic::Code::PermissionDenied, "no entry for this uid");

    let mut jwt = tonic::Request::new(JwtsvidRequest { audience: vec!["a".into()], spiffe_id: String::new() });
    jwt.metadata_mut().insert("workload.spiffe.io", "true".parse().unwrap());
    let refused = raw.fetch_jwtsvid(jwt).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::PermissionDenied, "{refused}");

    let health = tonic_health::pb::health_client::HealthClient::new(socket.channel().await)
        .check(tonic_health::pb::HealthCheckRequest { service: "SpiffeWorkloadAPI".into() })
        .await;
    assert_eq!(health.unwrap().into_inner().status, 1, "serving");
}

/// A program that connects, hands its connection to a child, and ends when told: the child relays for the test.
const HEIR: &str = r#"
import os, socket, sys, threading
up = socket.socket(socket.AF_UNIX); up.connect(sys.argv[1])
here = socket.socket(socket.AF_UNIX); here.bind(sys.argv[2]); here.listen()
if os.fork():
    sys.stdin.read(); os._exit(0)
os.close(0)
down = here.accept()[0]
def relay(a, b):
    while True:
        data = a.recv(65536)
        if not data: os._exit(0)
        b.sendall(data)
threading.Thread(target=relay, args=(down, up)).start()
relay(up, down)
"#;

#[tokio::test]
async fn a_stream_ends_with_the_process_that_opened_it_not_with_the_socket() {
    let Stage { mut west, slice, .. } = stage();
    let issued = Issued::default();
    issued.set_view(west.view(slice));
    issued.set_svids(BTreeMap::from([("me".parse().unwrap(), Ok(west.svid("me")))]));
    let socket = Socket::serve("heir", &issued);
    let folder = Folder::new("relay");
    let relay = folder.join("relay");
    let mut caller = std::process::Command::new("python3")
        .args(["-c", HEIR])
        .args([&socket.path(), &relay])
        .stdin(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    while !relay.exists() {
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    let endpoint = tonic::transport::Endpoint::from_shared(format!("unix:{}", relay.display())).unwrap();
    let mut raw = SpiffeWorkloadApiClient::new(endpoint.connect().await.unwrap());
    let ask = || {
        let mut request = tonic::Request::new(X509svidRequest {});
        request.metadata_mut().insert("workload.spiffe.io", "true".parse().unwrap());
        request
    };
    let mut stream = raw.fetch_x509svid(ask()).await.unwrap().into_inner();
    assert_eq!(stream.message().await.unwrap().unwrap().svids.len(), 1);

    drop(caller.stdin.take());
    caller.wait().unwrap();
    let soon = std::time::Duration::from_secs(10);
    let ended = tokio::time::timeout(soon, stream.message()).await.expect("the stream ends").unwrap_err();
    assert_eq!(ended.code(), tonic::Code::PermissionDenied, "{ended}");
    // The connection itself lives on, in the child; it is nobody's now.
    issued.set_svids(BTreeMap::from([("me".parse().unwrap(), Ok(west.svid("me")))]));
    let refused = raw.fetch_x509svid(ask()).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::PermissionDenied, "{refused}");
}

/// A program that connects, leaves its connection to a child that relays for the test, and becomes what it is told.
const CHANGED: &str = r#"
import os, socket, sys, threading
up = socket.socket(socket.AF_UNIX); up.connect(sys.argv[1])
here = socket.socket(socket.AF_UNIX); here.bind(sys.argv[2]); here.listen()
if os.fork():
    here.close(); up.close()
    told = sys.stdin.readline().strip()
    if told == "user": os.setresuid(424242, 424242, 424242)
    if told == "group": os.setresgid(424242, 424242, 424242)
    if told == "groups": os.setgroups([424242])
    if told == "same": os.execv(sys.executable, [sys.executable, "-c", "print(flush=True); import sys; sys.stdin.read()"])
    if told == "other": os.execvp("sh", ["sh", "-c", "echo; exec cat"])
    print(flush=True); sys.stdin.read(); os._exit(0)
os.close(0)
down = here.accept()[0]
def relay(a, b):
    try:
        while data := a.recv(65536): b.sendall(data)
    finally: os._exit(0)
threading.Thread(target=relay, args=(down, up)).start()
relay(up, down)
"#;

#[tokio::test]
async fn who_becomes_another_is_told_nothing_more() {
    let Stage { mut west, slice, .. } = stage();
    let issued = Issued::default();
    issued.set_view(west.view(slice));
    let socket = Socket::serve("changed", &issued);
    // What it becomes, whether its stream goes on, and whether a new one on the same connection is answered.
    for (told, goes_on, anew) in [
        ("nothing", true, true),
        ("other", false, true),
        ("same", false, true),
        ("groups", false, true),
        ("user", false, false),
        ("group", false, false),
    ] {
        issued.set_svids(BTreeMap::from([("me".parse().unwrap(), Ok(west.svid("me")))]));
        let folder = Folder::new("relay");
        let relay = folder.join("relay");
        let mut command = std::process::Command::new("python3");
        command.args(["-c", CHANGED]).args([&socket.path(), &relay]);
        command.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
        let mut caller = command.spawn().unwrap();
        while !relay.exists() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let endpoint = tonic::transport::Endpoint::from_shared(format!("unix:{}", relay.display())).unwrap();
        let channel = endpoint.connect().await.unwrap();
        let mut stream = call(channel.clone(), "/SpiffeWorkloadAPI/FetchX509SVID").await.unwrap();
        assert!(stream.message().await.unwrap().is_some());

        let mut stdin = caller.stdin.take().unwrap();
        std::io::Write::write_all(&mut stdin, format!("{told}\n").as_bytes()).unwrap();
        let mut done = [0];
        std::io::Read::read_exact(caller.stdout.as_mut().unwrap(), &mut done).unwrap();
        issued.set_svids(BTreeMap::from([("me".parse().unwrap(), Ok(west.svid("me")))]));
        let next = tokio::time::timeout(Duration::from_secs(10), stream.message()).await.expect("a word");
        let code = next.map(|_| ()).map_err(|status| status.code());
        assert_eq!(code, if goes_on { Ok(()) } else { Err(tonic::Code::PermissionDenied) }, "{told}");
        let again = match call(channel, "/SpiffeWorkloadAPI/FetchX509SVID").await {
            Ok(mut stream) => stream.message().await.map(|_| ()),
            Err(status) => Err(status),
        };
        assert_eq!(again.is_ok(), anew, "{told}: {again:?}");
        drop(stdin);
        caller.wait().unwrap();
    }
}

/// The SVIDs of these entries, as issued now.
fn issue(stage: &mut Stage, names: &[&str]) -> Svids {
    names.iter().map(|name| (name.parse().unwrap(), Ok(stage.west.svid(name)))).collect()
}

/// A stage whose workload is three entries.
fn three() -> Stage {
    let mut stage = stage();
    for name in ["two", "three"] {
        let entry = stage.west.entry(name, &[&uid()], &["north"]);
        stage.slice.entries.push(entry);
    }
    stage
}

async fn next(
    stream: &mut tonic::Streaming<ambit_proto::workload::X509svidResponse>,
) -> Result<Vec<String>, tonic::Status> {
    let message = tokio::time::timeout(Duration::from_secs(30), stream.message()).await.expect("a message")?;
    Ok(message
        .expect("no end")
        .svids
        .iter()
        .map(|svid| svid.spiffe_id.trim_start_matches("spiffe://west/").to_owned())
        .collect())
}

async fn open(socket: &Socket) -> tonic::Streaming<ambit_proto::workload::X509svidResponse> {
    let mut request = tonic::Request::new(X509svidRequest {});
    request.metadata_mut().insert("workload.spiffe.io", "true".parse().unwrap());
    SpiffeWorkloadApiClient::new(socket.channel().await).fetch_x509svid(request).await.unwrap().into_inner()
}

#[tokio::test]
async fn who_connects_again_is_told_the_very_same_bytes() {
    let mut stage = three();
    let issued = Issued::default();
    issued.set_view(stage.west.view(stage.slice.clone()));
    issued.set_svids(issue(&mut stage, &["me", "two", "three"]));
    let socket = Socket::serve("bytes", &issued);
    for method in ["/SpiffeWorkloadAPI/FetchX509SVID", "/SpiffeWorkloadAPI/FetchX509Bundles"] {
        let mut told = Vec::new();
        // Enough for any order by chance to show.
        for _ in 0..20 {
            told.push(call(socket.channel().await, method).await.unwrap().message().await.unwrap().unwrap());
        }
        told.dedup();
        assert_eq!(told.len(), 1, "{method}");
    }
}

#[tokio::test]
async fn what_is_withdrawn_is_missing_from_the_next_message() {
    let mut stage = three();
    let issued = Issued::default();
    let view = |stage: &Stage, names: &[&str], revision| {
        let entries = stage.slice.entries.iter().filter(|entry| names.contains(&entry.id.as_str())).cloned().collect();
        stage.west.view(v1::Slice { entries, revision, ..stage.slice.clone() })
    };
    issued.set_view(view(&stage, &["me", "two", "three"], 1));
    let svids = issue(&mut stage, &["me", "two"]);
    issued.set_svids(svids.clone());
    let socket = Socket::serve("withdrawn", &issued);

    // The cell does not issue the third: what is held comes all the same, before anybody gives up.
    let (began, mut stream) = (Instant::now(), open(&socket).await);
    assert_eq!(next(&mut stream).await.unwrap(), ["me", "two"]);
    assert!(began.elapsed() < Duration::from_secs(9), "{:?}", began.elapsed());
    // An entry is deleted while the third is still awaited.
    issued.set_view(view(&stage, &["me", "three"], 2));
    assert_eq!(next(&mut stream).await.unwrap(), ["me"]);
    // The third arrives, and the first is refused by the cell.
    let (third, refusal) = (issue(&mut stage, &["three"]), Refusal::new(Code::EntryNotOnNode, "", ""));
    issued.set_svids(third.clone().into_iter().chain([("me".parse().unwrap(), Err(refusal))]).collect());
    assert_eq!(next(&mut stream).await.unwrap(), ["three"]);
    issued.set_view(view(&stage, &[], 3));
    assert_eq!(next(&mut stream).await.unwrap_err().code(), tonic::Code::PermissionDenied);
    // And an entry that is made again is told to who comes then.
    issued.set_view(view(&stage, &["three"], 4));
    assert_eq!(next(&mut open(&socket).await).await.unwrap(), ["three"]);
}

#[tokio::test]
async fn the_default_identity_is_the_one_in_the_mesh() {
    let mut stage = three();
    let gid = format!("unix:gid:{}", nix::unistd::getegid());
    let entry = stage.west.entry("most", &[&uid(), &gid], &[]);
    stage.slice.entries.push(entry);
    let issued = Issued::default();
    issued.set_view(stage.west.view(stage.slice.clone()));
    issued.set_svids(issue(&mut stage, &["me", "two", "three", "most"]));
    let socket = Socket::serve("default", &issued);
    assert_eq!(next(&mut open(&socket).await).await.unwrap(), ["most", "me", "three", "two"]);
}

#[tokio::test]
async fn what_the_standard_leaves_open_is_unimplemented_and_health_follows_the_cell() {
    let stage = stage();
    let issued = Issued::default();
    let socket = Socket::serve("wit", &issued);
    for method in ["/SpiffeWorkloadAPI/FetchWITSVID", "/SpiffeWorkloadAPI/FetchWITBundles"] {
        let refused = call(socket.channel().await, method).await.map(|_| ()).unwrap_err();
        assert_eq!(refused.code(), tonic::Code::Unimplemented, "{refused}");
    }
    let mut health = tonic_health::pb::health_client::HealthClient::new(socket.channel().await);
    let services = ["SpiffeWorkloadAPI", "envoy.service.secret.v3.SecretDiscoveryService"];
    let mut statuses = Vec::new();
    for view in [false, true] {
        if view {
            issued.set_view(stage.west.view(stage.slice.clone()));
        }
        for service in services {
            let request = tonic_health::pb::HealthCheckRequest { service: service.into() };
            let mut status = health.check(request.clone()).await.unwrap().into_inner().status;
            let until = Instant::now() + Duration::from_secs(10);
            // 1 is SERVING, 2 is NOT_SERVING (grpc.health.v1).
            while status != if view { 1 } else { 2 } && Instant::now() < until {
                status = health.check(request.clone()).await.unwrap().into_inner().status;
            }
            statuses.push(status);
        }
    }
    assert_eq!(statuses, [2, 2, 1, 1]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_streams_are_told_a_change_and_no_more_are_opened_than_places() {
    const STREAMS: usize = 1000;
    let mut stage = stage();
    let issued = Issued::default();
    issued.set_view(stage.west.view(stage.slice.clone()));
    issued.set_svids(issue(&mut stage, &["me"]));
    let socket = Socket::serve("thousand", &issued);
    let mut streams = Vec::new();
    // A connection carries 64.
    while streams.len() < STREAMS {
        let channel = socket.channel().await;
        for _ in 0..50 {
            let mut stream = call(channel.clone(), "/SpiffeWorkloadAPI/FetchX509SVID").await.unwrap();
            assert!(stream.message().await.unwrap().is_some());
            streams.push(stream);
        }
    }
    let second = issue(&mut stage, &["me"]);
    let leaf = second.values().next().unwrap().as_ref().unwrap().chain_der[0].clone();
    let began = Instant::now();
    issued.set_svids(second);
    for stream in &mut streams {
        let told = tokio::time::timeout(Duration::from_secs(30), stream.message()).await.unwrap().unwrap().unwrap();
        assert!(told.windows(leaf.len()).any(|part| part == leaf));
    }
    // The goal on a quiet machine is 200 ms (issue D); this is a debug build among other tests.
    println!("{STREAMS} streams told in {:?}", began.elapsed());
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());

    let mut more = 0;
    let refused = loop {
        assert!(more < 100, "no bound");
        more += 1;
        match call(socket.channel().await, "/SpiffeWorkloadAPI/FetchX509SVID").await {
            Ok(stream) => streams.push(stream),
            Err(status) => break status,
        }
    };
    assert_eq!(refused.code(), tonic::Code::Unavailable, "{refused}");
    // Places come back with the streams that end.
    streams.truncate(500);
    let until = Instant::now() + Duration::from_secs(10);
    while call(socket.channel().await, "/SpiffeWorkloadAPI/FetchX509SVID").await.is_err() {
        assert!(Instant::now() < until, "no place comes back");
    }
}

#[tokio::test]
async fn a_request_is_as_large_as_a_token_and_no_larger() {
    let Stage { west, slice, .. } = stage();
    let issued = Issued::default();
    issued.set_view(west.view(slice));
    let socket = Socket::serve("large", &issued);
    let channel = socket.channel().await;
    let mut raw = SpiffeWorkloadApiClient::new(channel.clone());
    let mut health = tonic_health::pb::health_client::HealthClient::new(channel);
    for (bytes, code, health_code) in [
        (16 * 1024, tonic::Code::InvalidArgument, tonic::Code::NotFound),
        (1024 * 1024, tonic::Code::OutOfRange, tonic::Code::OutOfRange),
    ] {
        let text = "a".repeat(bytes);
        let mut request = tonic::Request::new(ValidateJwtsvidRequest { audience: "a".into(), svid: text.clone() });
        request.metadata_mut().insert("workload.spiffe.io", "true".parse().unwrap());
        assert_eq!(raw.validate_jwtsvid(request).await.unwrap_err().code(), code, "{bytes}");
        let request = tonic_health::pb::HealthCheckRequest { service: text };
        assert_eq!(health.check(request).await.unwrap_err().code(), health_code, "{bytes}");
    }
}
