//! The Workload API as a foreign client sees it: the `spiffe` crate, which nobody of this project wrote (issue A, proof 3).

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use ambit_agent::caller::MeshRoot;
use ambit_agent::issued::Issued;
use ambit_agent::workload_api::WorkloadApi;
use ambit_proto::v1;
use ambit_proto::workload::spiffe_workload_api_client::SpiffeWorkloadApiClient;
use ambit_proto::workload::{JwtsvidRequest, X509svidRequest};
use spiffe::workload_api::WorkloadApiError;
use spiffe::{TrustDomain, WorkloadApiClient};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use support::Cell;
use tokio::net::UnixListener;
use tokio_stream::StreamExt;
use tonic::transport::Channel;

/// A served socket that goes away with the test.
struct Socket {
    path: PathBuf,
    task: tokio::task::JoinHandle<()>,
}

impl Socket {
    fn serve(name: &str, issued: &Issued) -> Socket {
        let path = std::env::temp_dir().join(format!("ambit-{name}-{}.sock", std::process::id()));
        let listener = UnixListener::bind(&path).unwrap();
        let mesh = MeshRoot::find(Path::new(&mesh())).unwrap();
        let serving = WorkloadApi::new(issued.clone()).serve(listener, mesh);
        Socket { path, task: tokio::spawn(async move { serving.await.unwrap() }) }
    }
    fn endpoint(&self) -> String {
        format!("unix:{}", self.path.display())
    }
    async fn channel(&self) -> Channel {
        tonic::transport::Endpoint::from_shared(self.endpoint()).unwrap().connect().await.unwrap()
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        self.task.abort();
        let _ = std::fs::remove_file(&self.path);
    }
}

fn mesh() -> String {
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap();
    let mount = mounts.lines().find(|l| l.split(' ').nth(2) == Some("cgroup2")).expect("a cgroup2 mount");
    format!("{}/no-such-mesh", mount.split(' ').nth(1).unwrap())
}

fn uid() -> String {
    format!("unix:uid:{}", nix::unistd::geteuid())
}

/// West, whose workload `me` is this very process, federated with east; north is no peer of `me`.
struct Stage {
    west: Cell,
    east: Cell,
    slice: v1::Slice,
}

fn stage() -> Stage {
    let (mut west, east, north) = (Cell::founded("west", 1), Cell::founded("east", 2), Cell::founded("north", 3));
    let me = west.entry("me", &[&uid()], &["east"]);
    let other = west.entry("other", &["unix:uid:424242"], &[]);
    let mut slice = west.slice(1, &[&east, &north]);
    slice.entries = vec![me, other];
    Stage { west, east, slice }
}

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
    assert_eq!(refused.code(), tonic::Code::Unimplemented);
    assert!(refused.message().contains("not built yet"), "{refused}");

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
    let relay = socket.path.with_extension("relay");
    let mut caller = std::process::Command::new("python3")
        .args(["-c", HEIR])
        .args([&socket.path, &relay])
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
    std::fs::remove_file(&relay).unwrap();
}
