//! The Broker API as a foreign client sees it: the `spiffe` crate, over mutual TLS, from a node proxy.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use ambit_agent::broker::{Broker, Gate};
use ambit_agent::clock::Clock;
use ambit_agent::denials::{Denials, Lane};
use ambit_agent::issued::{Issued, Svid};
use ambit_agent::tokens::Tokens;
use ambit_identity::svid::Presented;
use ambit_identity::tls::{certified, client_config, fixed};
use ambit_identity::{Expect, SharedTrust, SvidKey, Trust, TrustStore};
use ambit_model::{Generation, NodeId, Revision};
use ambit_proto::v1;
use ambit_proto::xds::google::rpc;
use hyper_util::rt::TokioIo;
use prost::Message;
use rustls::sign::CertifiedKey;
use rustls_pki_types::CertificateDer;
use spiffe::broker_api::SecurityHeader;
use spiffe::broker_api::pb::spiffe::broker::api_client::ApiClient;
use spiffe::broker_api::pb::spiffe::broker::{
    FetchJwtsvidRequest, KubernetesObjectReference, SubscribeToJwtBundlesRequest, SubscribeToX509BundlesRequest,
    SubscribeToX509svidRequest, SubscribeToX509svidResponse, WorkloadPidReference, WorkloadReference,
};
use std::collections::BTreeSet;
use std::process::{Child, Command};
use std::sync::Arc;
use std::time::Duration;
use support::Cell;
use support::issuer::{Issuer, Served};
use support::local::{Folder, mesh};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};

/// Nobody else on this machine runs as these.
const WORKLOAD: u32 = 424_242;
const STRANGER: u32 = 424_243;

/// A served Broker API, gone with the test, on a node of west.
struct Stage {
    served: Served,
    slice: v1::Slice,
    issued: Issued,
    trust: SharedTrust,
    denials: Lane,
    here: watch::Sender<Option<(NodeId, Generation)>>,
    folder: Folder,
    /// The SPIFFE ID that the agent must show.
    agent: ambit_model::SpiffeId,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn stage() -> Stage {
    let (mut west, mut east) = (Cell::founded("west", 1), Cell::founded("east", 2));
    for cell in [&mut west, &mut east] {
        cell.jwt_authority();
    }
    let web = west.entry("web", &[&format!("unix:uid:{WORKLOAD}")], &["east"]);
    for proxy in ["proxy", "other"] {
        west.entry(proxy, &["unix:uid:0"], &[]);
    }
    let mut slice = west.slice(1, &[&east]);
    slice.entries = vec![web];
    let issued = Issued::default();
    issued.set_view(west.view(slice.clone()));
    issued.set_svids([("web".parse().unwrap(), Ok(west.svid("web")))].into());

    let trust = SharedTrust::new(Trust::Bundles(TrustStore::new(&west.view(slice.clone()).own).unwrap()));
    let key = SvidKey::generate().unwrap();
    let (chain, _) = west.admit_csr(9, &key.csr().unwrap());
    let agent = format!("spiffe://west/ambit/node/{}", west.node()).parse().unwrap();
    let identity = certified(chain.into_iter().map(CertificateDer::from).collect(), &key).unwrap();
    let (here, node) = watch::channel(Some((west.node(), Generation(2))));
    let (folder, denials) = (Folder::new("broker"), Lane::default());
    let gate = Gate {
        brokers: Arc::new(BTreeSet::from(["spiffe://west/proxy".parse().unwrap()])),
        trust: trust.clone(),
        clock: Arc::new(Clock::default()),
        denials: denials.clone(),
        node,
    };
    let listener = UnixListener::bind(folder.join("socket")).unwrap();
    let served = Issuer::serve(west).await;
    let (_, channel) = watch::channel(Some(served.channel.clone()));
    let tokens = Tokens::new(channel, Arc::default());
    let broker = Broker::new(issued.clone(), tokens, Arc::new(mesh()), gate);
    let serving = broker.serve(listener, fixed(identity));
    let task = tokio::spawn(async move { serving.await.unwrap() });
    Stage { served, slice, issued, trust, denials, here, folder, agent, task }
}

impl Stage {
    fn svid(&self, entry: &str) -> Arc<Svid> {
        self.served.issuer.with(|west| west.svid(entry))
    }
    async fn connect(&self, me: Option<Arc<CertifiedKey>>, expect: Expect) -> Result<Channel, tonic::transport::Error> {
        let config = client_config(self.trust.clone(), expect, me, &[b"h2"]).unwrap();
        let (connector, path) = (tokio_rustls::TlsConnector::from(Arc::new(config)), self.folder.join("socket"));
        let dial = move |_: tonic::transport::Uri| {
            let (connector, path) = (connector.clone(), path.clone());
            async move {
                let name = "broker.invalid".try_into().unwrap();
                connector.connect(name, UnixStream::connect(path).await?).await.map(TokioIo::new)
            }
        };
        let endpoint = tonic::transport::Endpoint::from_static("http://broker");
        endpoint.connect_with_connector(tower::service_fn(dial)).await
    }
    /// The connection of the broker with this SVID.
    async fn of(&self, svid: &Svid) -> Channel {
        self.connect(Some(shown(svid)), Expect::Id(self.agent.clone())).await.unwrap()
    }
}

fn shown(svid: &Svid) -> Arc<CertifiedKey> {
    let chain = svid.chain_der.iter().map(|der| CertificateDer::from(der.clone())).collect();
    certified(chain, &SvidKey::from_pkcs8(&svid.key_pkcs8).unwrap()).unwrap()
}

/// A process that ends with the test.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// One that runs as `uid` until the test ends it.
fn process(uid: u32) -> Process {
    let id = uid.to_string();
    let mut command = Command::new("setpriv");
    command.args(["--reuid", &id, "--regid", &id, "--clear-groups", "sleep", "300"]);
    let child = command.spawn().unwrap();
    let status = format!("/proc/{}/status", child.id());
    // Until then it is setpriv, as somebody else or as this user: whoever is told of it then would see it become another program.
    let is_there = |text: String| text.starts_with("Name:\tsleep\n") && text.contains(&format!("Uid:\t{id}\t{id}"));
    while !is_there(std::fs::read_to_string(&status).unwrap()) {
        std::thread::sleep(Duration::from_millis(5));
    }
    Process(child)
}

fn pid(pid: i32) -> Option<WorkloadReference> {
    Some(WorkloadReference::from(WorkloadPidReference { pid }))
}

fn number(process: &Process) -> i32 {
    process.0.id().try_into().unwrap()
}

async fn next(stream: &mut Streaming<SubscribeToX509svidResponse>) -> Result<SubscribeToX509svidResponse, Status> {
    let message = tokio::time::timeout(Duration::from_secs(30), stream.message()).await.expect("a message")?;
    Ok(message.expect("no end"))
}

async fn subscribe(
    channel: Channel,
    reference: Option<WorkloadReference>,
) -> Result<Streaming<SubscribeToX509svidResponse>, Status> {
    let mut client = ApiClient::with_interceptor(channel, SecurityHeader::new());
    Ok(client.subscribe_to_x509svid(SubscribeToX509svidRequest { reference }).await?.into_inner())
}

/// The code, and the reason that a program reads.
async fn refusal(channel: Channel, reference: Option<WorkloadReference>) -> (Code, String) {
    let status = match subscribe(channel, reference).await {
        Err(status) => status,
        Ok(mut stream) => next(&mut stream).await.unwrap_err(),
    };
    let rich = rpc::Status::decode(status.details()).unwrap();
    let info = rich.details.first().map(|any| rpc::ErrorInfo::decode(any.value.as_slice()).unwrap());
    assert!(info.as_ref().is_none_or(|info| info.domain == "spiffe.io"), "{info:?}");
    (status.code(), info.map(|info| info.reason).unwrap_or_default())
}

#[tokio::test]
async fn a_proxy_gets_what_the_workload_would_get_for_as_long_as_it_lives() {
    let stage = stage().await;
    let proxy = stage.svid("proxy");
    let channel = stage.of(&proxy).await;
    let workload = process(WORKLOAD);
    let held = stage.issued.now().svids[&"web".parse().unwrap()].clone().unwrap();

    let mut stream = subscribe(channel.clone(), pid(number(&workload))).await.unwrap();
    let told = next(&mut stream).await.unwrap();
    assert_eq!(told.svids.len(), 1);
    assert_eq!(told.svids[0].spiffe_id, "spiffe://west/web");
    assert_eq!(told.svids[0].x509_svid, held.chain_der.concat());
    assert_eq!(told.svids[0].x509_svid_key, held.key_pkcs8.to_vec());
    assert_eq!(told.svids[0].bundle, stage.served.issuer.with(|west| west.bundle()).roots_der.concat());
    assert_eq!(told.federated_bundles.keys().collect::<Vec<_>>(), ["spiffe://east"]);

    let mut client = ApiClient::with_interceptor(channel.clone(), SecurityHeader::new());
    let request = SubscribeToX509BundlesRequest { reference: pid(number(&workload)) };
    let mut bundles = client.subscribe_to_x509_bundles(request).await.unwrap().into_inner();
    let mut known: Vec<String> = bundles.message().await.unwrap().unwrap().bundles.into_keys().collect();
    known.sort();
    assert_eq!(known, ["spiffe://east", "spiffe://west"]);

    let jwt =
        FetchJwtsvidRequest { reference: pid(number(&workload)), audience: vec!["a".into()], ..Default::default() };
    let token = client.fetch_jwtsvid(jwt.clone()).await.unwrap().into_inner().svids.remove(0);
    assert_eq!(token.spiffe_id, "spiffe://west/web");
    assert_eq!(token.svid.split('.').count(), 3);
    let mine = FetchJwtsvidRequest { spiffe_id: "spiffe://west/proxy".into(), ..jwt.clone() };
    assert_eq!(client.fetch_jwtsvid(mine).await.unwrap_err().code(), Code::PermissionDenied);
    let nobody = FetchJwtsvidRequest { reference: pid(i32::MAX), ..jwt.clone() };
    assert_eq!(client.fetch_jwtsvid(nobody).await.unwrap_err().code(), Code::NotFound);
    let none = FetchJwtsvidRequest { audience: vec![], ..jwt };
    assert_eq!(client.fetch_jwtsvid(none).await.unwrap_err().code(), Code::InvalidArgument);
    let keys = SubscribeToJwtBundlesRequest { reference: pid(number(&workload)) };
    let keys = client.subscribe_to_jwt_bundles(keys).await.unwrap().into_inner().message().await.unwrap().unwrap();
    let mut known: Vec<String> = keys.bundles.into_keys().collect();
    known.sort();
    assert_eq!(known, ["spiffe://east", "spiffe://west"]);

    let renewed = stage.svid("web");
    stage.issued.set_svids([("web".parse().unwrap(), Ok(renewed.clone()))].into());
    assert_eq!(next(&mut stream).await.unwrap().svids[0].x509_svid, renewed.chain_der.concat());
    // Another process of the same kind goes on when this one ends, and so does the connection.
    let twin = process(WORKLOAD);
    let mut second = subscribe(channel.clone(), pid(number(&twin))).await.unwrap();
    next(&mut second).await.unwrap();
    drop(workload);
    assert_eq!(next(&mut stream).await.unwrap_err().code(), Code::NotFound);
    let nobody = v1::Slice { revision: 2, entries: vec![], ..stage.slice.clone() };
    stage.issued.set_view(stage.served.issuer.with(|west| west.view(nobody)));
    assert_eq!(next(&mut second).await.unwrap_err().code(), Code::PermissionDenied);
    drop(twin);
}

#[tokio::test]
async fn a_reference_is_checked_and_says_what_is_wrong_with_it() {
    let stage = stage().await;
    let proxy = stage.svid("proxy");
    let channel = stage.of(&proxy).await;
    let (stranger, gone) = (process(STRANGER), process(WORKLOAD));
    let ended = number(&gone);
    drop(gone);
    let kubernetes = Some(WorkloadReference::from(KubernetesObjectReference::default()));
    let any = |type_url: &str, value: &[u8]| {
        let reference = Some(prost_types::Any { type_url: type_url.into(), value: value.to_vec() });
        Some(WorkloadReference { reference })
    };
    let by_pid = "type.googleapis.com/spiffe.broker.WorkloadPIDReference";
    for (case, reference, code, reason) in [
        ("none", None, Code::InvalidArgument, "WORKLOAD_REFERENCE_INVALID"),
        ("empty", Some(WorkloadReference::default()), Code::InvalidArgument, "WORKLOAD_REFERENCE_INVALID"),
        ("another kind", kubernetes, Code::InvalidArgument, "WORKLOAD_REFERENCE_INVALID"),
        ("a lie about its kind", any(by_pid, b"\xff\xff"), Code::InvalidArgument, "WORKLOAD_REFERENCE_INVALID"),
        ("without a number", pid(0), Code::InvalidArgument, "WORKLOAD_REFERENCE_INVALID"),
        ("negative", pid(-1), Code::InvalidArgument, "WORKLOAD_REFERENCE_INVALID"),
        ("nobody's", pid(i32::MAX), Code::NotFound, "WORKLOAD_NOT_FOUND"),
        ("ended", pid(ended), Code::NotFound, "WORKLOAD_NOT_FOUND"),
        ("not entitled", pid(number(&stranger)), Code::PermissionDenied, "WORKLOAD_NOT_ENTITLED"),
    ] {
        assert_eq!(refusal(channel.clone(), reference).await, (code, reason.to_owned()), "{case}");
    }
    drop(stranger);
}

#[tokio::test]
async fn only_a_broker_of_this_node_that_is_listed_and_not_denied_is_answered() {
    let stage = stage().await;
    let (proxy, other, workload) = (stage.svid("proxy"), stage.svid("other"), process(WORKLOAD));
    let reference = || pid(number(&workload));
    let denied = (Code::PermissionDenied, String::new());
    let id = Expect::Id(stage.agent.clone());

    // Without a certificate, or with one of another trust domain, nothing is said at all.
    let foreign = {
        let mut east = Cell::founded("east", 2);
        east.entry("proxy", &["unix:uid:0"], &[]);
        shown(&east.svid("proxy"))
    };
    for identity in [None, Some(foreign)] {
        let call = match stage.connect(identity, id.clone()).await {
            Ok(channel) => subscribe(channel, reference()).await.map(|_| ()),
            Err(_) => continue,
        };
        // With TLS 1.3 the client hears of it when it reads.
        assert!(matches!(call.unwrap_err().code(), Code::Unavailable | Code::Unknown));
    }
    // And the proxy knows whom it asks.
    let wrong = Expect::Id("spiffe://west/ambit/node/other".parse().unwrap());
    assert!(stage.connect(Some(shown(&proxy)), wrong).await.is_err());

    assert_eq!(refusal(stage.of(&other).await, reference()).await, denied, "not listed");
    let channel = stage.of(&proxy).await;
    let mut plain = ApiClient::new(channel.clone());
    let request = SubscribeToX509svidRequest { reference: reference() };
    let without = plain.subscribe_to_x509svid(request.clone()).await.unwrap_err();
    assert_eq!(without.code(), Code::InvalidArgument, "no header");
    let mut wrong = tonic::Request::new(request);
    wrong.metadata_mut().insert("broker.spiffe.io", "True".parse().unwrap());
    assert_eq!(plain.subscribe_to_x509svid(wrong).await.unwrap_err().code(), Code::InvalidArgument);

    // Its SVID is of another node than this one.
    stage.here.send_replace(Some((NodeId([8; 32]), Generation(1))));
    assert_eq!(refusal(channel.clone(), reference()).await, denied);
    stage.here.send_replace(None);
    assert_eq!(refusal(channel.clone(), reference()).await, denied);
    stage.here.send_replace(Some((stage.served.issuer.with(|west| west.node()), Generation(2))));

    // A live stream ends with the denial of its broker: of its node, its identity, its SVID or what signed that.
    let node = stage.served.issuer.with(|west| west.node()).to_string();
    let node = v1::NodeDenial { node, generation: 2, trust_domain: "west".into() };
    let (authority, trust_domain) = (proxy.authority.clone(), "west".to_owned());
    let serial = Presented::of(&[proxy.chain_der[0].as_slice().into()]).unwrap().serial;
    let up_to = v1::IdDenial { spiffe_id: proxy.id.to_string(), up_to: serial.clone(), barred: false };
    let barred = v1::IdDenial { up_to: vec![0; 16], barred: true, ..up_to.clone() };
    let leaf = v1::LeafDenial { trust_domain: trust_domain.clone(), authority: authority.clone(), serial };
    let elsewhere = v1::LeafDenial { trust_domain: "east".into(), ..leaf.clone() };
    let whole = v1::AuthorityDenial { trust_domain, authority };
    let lists = [
        ("its node", vec![node], vec![], vec![], vec![], true),
        ("its identity so far", vec![], vec![], vec![up_to], vec![], true),
        ("its identity", vec![], vec![], vec![barred], vec![], true),
        ("its SVID", vec![], vec![], vec![], vec![leaf], true),
        ("what signed it", vec![], vec![whole], vec![], vec![], true),
        ("an SVID of another trust domain", vec![], vec![], vec![], vec![elsewhere], false),
    ];
    for (n, (what, nodes, authorities, ids, leaves, refused)) in (1..).zip(lists) {
        let mut stream = subscribe(channel.clone(), reference()).await.unwrap();
        next(&mut stream).await.unwrap();
        let list = Denials::parse(Revision(2 * n), &nodes, &authorities).unwrap();
        assert!(stage.denials.offer(list.with_svids(&ids, &leaves).unwrap()), "{what}");
        if refused {
            assert_eq!(next(&mut stream).await.unwrap_err().code(), Code::PermissionDenied, "{what}");
            assert_eq!(refusal(channel.clone(), reference()).await, denied, "{what}");
        } else {
            next(&mut subscribe(channel.clone(), reference()).await.unwrap()).await.unwrap();
        }
        assert!(stage.denials.offer(Denials::parse(Revision(2 * n + 1), &[], &[]).unwrap()));
    }
    drop(workload);
}

#[tokio::test]
async fn a_broker_under_an_authority_that_is_revoked_further_up_is_let_in_no_more() {
    let stage = stage().await;
    let (mut thief, stolen) = stage.served.issuer.with(|west| west.thief());
    thief.entry("proxy", &["unix:uid:0"], &[]);
    let channel = stage.of(&thief.svid("proxy")).await;
    let workload = process(WORKLOAD);
    let mut stream = subscribe(channel.clone(), pid(number(&workload))).await.unwrap();
    next(&mut stream).await.unwrap();
    let whole = v1::AuthorityDenial { trust_domain: "west".into(), authority: stolen };
    assert!(stage.denials.offer(Denials::parse(Revision(2), &[], &[whole]).unwrap()));
    assert_eq!(next(&mut stream).await.unwrap_err().code(), Code::PermissionDenied);
    assert_eq!(refusal(channel, pid(number(&workload))).await.0, Code::PermissionDenied);
    drop(workload);
}

#[tokio::test]
async fn no_more_connections_are_open_than_places_and_places_come_back() {
    const PLACES: usize = 64;
    let stage = stage().await;
    let proxy = stage.svid("proxy");
    let workload = process(WORKLOAD);
    let mut open = Vec::new();
    for _ in 0..PLACES {
        let channel = stage.of(&proxy).await;
        let mut stream = subscribe(channel, pid(number(&workload))).await.unwrap();
        next(&mut stream).await.unwrap();
        open.push(stream);
    }
    let soon = Duration::from_secs(2);
    let one_more = stage.of(&proxy);
    tokio::pin!(one_more);
    assert!(tokio::time::timeout(soon, &mut one_more).await.is_err(), "no place");
    open.pop();
    let channel = tokio::time::timeout(Duration::from_secs(10), one_more).await.expect("a place");
    next(&mut subscribe(channel, pid(number(&workload))).await.unwrap()).await.unwrap();
    drop(workload);
}

#[tokio::test]
async fn who_is_not_let_in_takes_no_place() {
    let stage = stage().await;
    let (proxy, other, workload) = (stage.svid("proxy"), stage.svid("other"), process(WORKLOAD));
    let mut idle = Vec::new();
    for _ in 0..70 {
        let id = Expect::Id(stage.agent.clone());
        let connected = stage.connect(Some(shown(&other)), id);
        // One that is closed at once may look like either.
        idle.push(tokio::time::timeout(Duration::from_secs(2), connected).await.ok());
    }
    let let_in = async {
        let mut stream = subscribe(stage.of(&proxy).await, pid(number(&workload))).await.unwrap();
        next(&mut stream).await.unwrap();
    };
    tokio::time::timeout(Duration::from_secs(4), let_in).await.expect("a place");
    drop((idle, workload));
}
