//! The secret discovery service as a client sees it, message by message.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use ambit_agent::issued::{Issued, Svids};
use ambit_agent::xds::SECRET;
use ambit_proto::v1;
use ambit_proto::xds::core::{BuildVersion, Node, data_source::Specifier, node::UserAgentVersionType};
use ambit_proto::xds::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse};
use ambit_proto::xds::envoy::r#type::v3::SemanticVersion;
use ambit_proto::xds::google::rpc;
use ambit_proto::xds::secret::secret_discovery_service_client::SecretDiscoveryServiceClient;
use ambit_proto::xds::tls::{Secret, SpiffeCertValidatorConfig, secret::Type};
use prost::Message;
use std::time::Duration;
use support::local::{Socket, Stage, stage, uid};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Request, Status, Streaming};

fn request(names: &[&str]) -> DiscoveryRequest {
    let resource_names = names.iter().map(|name| (*name).to_owned()).collect();
    DiscoveryRequest { resource_names, type_url: SECRET.into(), ..Default::default() }
}

/// An open stream of one Envoy.
struct Stream {
    up: mpsc::Sender<DiscoveryRequest>,
    down: Streaming<DiscoveryResponse>,
    last: DiscoveryResponse,
}

impl Stream {
    async fn open(socket: &Socket, first: DiscoveryRequest) -> Stream {
        let (up, queue) = mpsc::channel(8);
        up.send(first).await.unwrap();
        let mut client = SecretDiscoveryServiceClient::new(socket.channel().await);
        let down = client.stream_secrets(ReceiverStream::new(queue)).await.unwrap().into_inner();
        Stream { up, down, last: DiscoveryResponse::default() }
    }
    async fn next(&mut self) -> Result<Vec<String>, Status> {
        let next = tokio::time::timeout(Duration::from_secs(30), self.down.message()).await.expect("a message");
        self.last = next?.expect("no end");
        Ok(names(&self.last))
    }
    async fn is_silent(&mut self) -> bool {
        tokio::time::timeout(Duration::from_millis(300), self.down.message()).await.is_err()
    }
    /// Takes the last response, and asks for these from now on.
    async fn ask(&mut self, names: &[&str]) {
        let (version_info, response_nonce) = (self.last.version_info.clone(), self.last.nonce.clone());
        self.up.send(DiscoveryRequest { version_info, response_nonce, ..request(names) }).await.unwrap();
    }
}

/// An open incremental stream of one Envoy.
struct Delta {
    up: mpsc::Sender<DeltaDiscoveryRequest>,
    down: Streaming<DeltaDiscoveryResponse>,
}

fn list(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

fn delta(more: &[&str], less: &[&str], response_nonce: &str) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        type_url: SECRET.into(),
        resource_names_subscribe: list(more),
        resource_names_unsubscribe: list(less),
        response_nonce: response_nonce.into(),
        ..Default::default()
    }
}

impl Delta {
    async fn open(socket: &Socket, first: DeltaDiscoveryRequest) -> Delta {
        let (up, queue) = mpsc::channel(8);
        up.send(first).await.unwrap();
        let mut client = SecretDiscoveryServiceClient::new(socket.channel().await);
        let down = client.delta_secrets(ReceiverStream::new(queue)).await.unwrap().into_inner();
        Delta { up, down }
    }
    async fn next(&mut self) -> Result<DeltaDiscoveryResponse, Status> {
        let next = tokio::time::timeout(Duration::from_secs(30), self.down.message()).await.expect("a message");
        next.map(|message| message.expect("no end"))
    }
    /// What is there and what is gone, of the next response, which is then taken.
    async fn told(&mut self) -> (Vec<String>, Vec<String>) {
        let next = self.next().await.unwrap();
        // After its last response it is ended.
        let _ = self.up.send(delta(&[], &[], &next.nonce)).await;
        let name = |resource: &ambit_proto::xds::discovery::Resource| {
            let any = resource.resource.as_ref().unwrap();
            assert_eq!(Secret::decode(any.value.as_slice()).unwrap().name, resource.name);
            resource.name.clone()
        };
        (next.resources.iter().map(name).collect(), next.removed_resources)
    }
    async fn is_silent(&mut self) -> bool {
        tokio::time::timeout(Duration::from_millis(300), self.down.message()).await.is_err()
    }
}

fn secrets(response: &DiscoveryResponse) -> Vec<Secret> {
    let secret = |any: &prost_types::Any| {
        assert_eq!(any.type_url, SECRET);
        Secret::decode(any.value.as_slice()).unwrap()
    };
    response.resources.iter().map(secret).collect()
}

fn names(response: &DiscoveryResponse) -> Vec<String> {
    secrets(response).into_iter().map(|secret| secret.name).collect()
}

fn svids(stage: &mut Stage, names: &[&str]) -> Svids {
    names.iter().map(|name| (name.parse().unwrap(), Ok(stage.west.svid(name)))).collect()
}

async fn fetch(socket: &Socket, request: DiscoveryRequest) -> Result<DiscoveryResponse, Status> {
    let mut client = SecretDiscoveryServiceClient::<Channel>::new(socket.channel().await);
    client.fetch_secrets(request).await.map(tonic::Response::into_inner)
}

/// Trust domains and numbers of roots, and whether they stand in the SPIFFE form.
fn roots(secret: &Secret) -> (bool, Vec<(String, usize)>) {
    let Some(Type::ValidationContext(context)) = &secret.r#type else { panic!("{secret:?}") };
    let count = |source: &Option<ambit_proto::xds::core::DataSource>| match &source.as_ref().unwrap().specifier {
        Some(Specifier::InlineBytes(pem)) => String::from_utf8_lossy(pem).matches("BEGIN CERTIFICATE").count(),
        other => panic!("{other:?}"),
    };
    let Some(custom) = &context.custom_validator_config else {
        return (false, vec![(String::new(), count(&context.trusted_ca))]);
    };
    assert_eq!((custom.name.as_str(), &context.trusted_ca), ("envoy.tls.cert_validator.spiffe", &None));
    let config = SpiffeCertValidatorConfig::decode(custom.typed_config.as_ref().unwrap().value.as_slice()).unwrap();
    (true, config.trust_domains.iter().map(|td| (td.name.clone(), count(&td.trust_bundle))).collect())
}

#[tokio::test]
async fn each_name_gives_what_it_gives_in_spire() {
    let mut stage = stage();
    let two = stage.west.entry("two", &[&uid()], &[]);
    stage.slice.entries.push(two);
    let issued = Issued::default();
    issued.set_view(stage.west.view(stage.slice.clone()));
    let held = svids(&mut stage, &["me", "two", "other"]);
    issued.set_svids(held.clone());
    let socket = Socket::serve("names", &issued);
    for (asked, told) in [
        (&["default"][..], &["default"][..]),
        (&["spiffe://west/two"], &["spiffe://west/two"]),
        (&["ROOTCA", "ALL", "default"], &["ALL", "ROOTCA", "default"]),
        (&["spiffe://east"], &["spiffe://east"]),
        (&["spiffe://west"], &["spiffe://west"]),
        (&[""], &["spiffe://east", "spiffe://west", "spiffe://west/me", "spiffe://west/two"]),
        (&[], &["spiffe://east", "spiffe://west", "spiffe://west/me", "spiffe://west/two"]),
        // Of these the caller has one.
        (&["default", "spiffe://west/other", "spiffe://north", "nonsense"], &["default"]),
    ] {
        assert_eq!(names(&fetch(&socket, request(asked)).await.unwrap()), told, "{asked:?}");
    }
    for asked in ["spiffe://west/other", "spiffe://north", "nonsense", "all"] {
        assert_eq!(fetch(&socket, request(&[asked])).await.unwrap_err().code(), Code::PermissionDenied, "{asked}");
    }
    let certificate = secrets(&fetch(&socket, request(&["default"])).await.unwrap()).remove(0);
    let Some(Type::TlsCertificate(certificate)) = certificate.r#type else { panic!() };
    let Some(Specifier::InlineBytes(chain)) = certificate.certificate_chain.unwrap().specifier else { panic!() };
    let chain = ambit_identity::keys::certificates_from_pem(&String::from_utf8(chain).unwrap()).unwrap();
    let issued = held[&"me".parse().unwrap()].as_ref().unwrap();
    assert_eq!(chain.iter().map(|der| der.to_vec()).collect::<Vec<_>>(), issued.chain_der, "leaf and intermediate");
}

#[tokio::test]
async fn roots_are_told_by_trust_domain_unless_the_envoy_cannot_read_that() {
    let mut stage = stage();
    let issued = Issued::default();
    issued.set_view(stage.west.view(stage.slice.clone()));
    issued.set_svids(svids(&mut stage, &["me"]));
    let socket = Socket::serve("roots", &issued);
    let by = |version: (u32, u32), disabled: Option<prost_types::value::Kind>| {
        let version = SemanticVersion { major_number: version.0, minor_number: version.1, patch: 0 };
        let version = UserAgentVersionType::UserAgentBuildVersion(BuildVersion { version: Some(version) });
        let key = "disable_spiffe_cert_validation".to_owned();
        let fields = disabled.map(|kind| (key, prost_types::Value { kind: Some(kind) })).into_iter().collect();
        let metadata = Some(prost_types::Struct { fields });
        Some(Node { user_agent_version_type: Some(version), metadata, ..Default::default() })
    };
    use prost_types::value::Kind::{BoolValue, StringValue};
    let (spiffe, plain) = (
        |tds: &[&str]| (true, tds.iter().map(|td| ((*td).to_owned(), 1)).collect()),
        (false, vec![(String::new(), 1)]),
    );
    for (node, name, found) in [
        (None, "ROOTCA", Some(spiffe(&["west"]))),
        (by((1, 18), None), "ALL", Some(spiffe(&["east", "west"]))),
        (by((2, 0), Some(BoolValue(false))), "spiffe://east", Some(spiffe(&["east"]))),
        (by((1, 17), None), "ROOTCA", Some(plain.clone())),
        (by((1, 40), Some(BoolValue(true))), "spiffe://east", Some(plain.clone())),
        (by((1, 40), Some(StringValue("true".into()))), "ROOTCA", Some(plain.clone())),
        // Two trust domains are never one pool.
        (by((1, 17), None), "ALL", None),
    ] {
        let response = fetch(&socket, DiscoveryRequest { node: node.clone(), ..request(&[name]) }).await;
        assert_eq!(response.ok().map(|response| roots(&secrets(&response)[0])), found, "{name} {node:?}");
    }
}

#[tokio::test]
async fn a_stream_tells_each_change_once_and_ends_where_nothing_is_left() {
    let mut stage = stage();
    let issued = Issued::default();
    issued.set_view(stage.west.view(stage.slice.clone()));
    issued.set_svids(svids(&mut stage, &["me"]));
    let socket = Socket::serve("changes", &issued);
    let mut stream = Stream::open(&socket, request(&["default"])).await;
    assert_eq!(stream.next().await.unwrap(), ["default"]);
    let first = stream.last.clone();
    stream.ask(&["default"]).await;
    assert!(stream.is_silent().await, "it was taken");
    // The same on another stream has the same version.
    let mut again = Stream::open(&socket, request(&["default"])).await;
    again.next().await.unwrap();
    assert_eq!((&again.last.version_info, &again.last.resources), (&first.version_info, &first.resources));

    issued.set_svids(svids(&mut stage, &["me"]));
    assert_eq!(stream.next().await.unwrap(), ["default"]);
    assert!(stream.last.version_info != first.version_info && stream.last.nonce != first.nonce);
    // A rejection is no reason to tell the same again; the next change is.
    let rejected = DiscoveryRequest {
        version_info: first.version_info.clone(),
        response_nonce: stream.last.nonce.clone(),
        error_detail: Some(rpc::Status { code: 3, message: "no".into(), details: vec![] }),
        ..request(&["default"])
    };
    stream.up.send(rejected).await.unwrap();
    assert!(stream.is_silent().await);
    issued.set_svids(svids(&mut stage, &["me"]));
    assert_eq!(stream.next().await.unwrap(), ["default"]);
    stream.ask(&["default", "ROOTCA"]).await;
    assert_eq!(stream.next().await.unwrap(), ["ROOTCA", "default"]);
    // What an Envoy asked before it read that is passed over.
    let stale = DiscoveryRequest { response_nonce: first.nonce.clone(), ..request(&["ALL"]) };
    stream.up.send(stale).await.unwrap();
    assert!(stream.is_silent().await);

    // A name that nobody has yet waits for it.
    let mut waiting = Stream::open(&socket, request(&["spiffe://west/two"])).await;
    assert!(waiting.is_silent().await);
    let two = stage.west.entry("two", &[&uid()], &[]);
    stage.slice.entries.push(two);
    issued.set_view(stage.west.view(v1::Slice { revision: 2, ..stage.slice.clone() }));
    let both = svids(&mut stage, &["me", "two"]);
    issued.set_svids(both);
    assert_eq!(waiting.next().await.unwrap(), ["spiffe://west/two"]);
    assert_eq!(stream.next().await.unwrap(), ["ROOTCA", "default"]);
    // The second identity is withdrawn, then the first.
    stage.slice.entries.pop();
    issued.set_view(stage.west.view(v1::Slice { revision: 3, ..stage.slice.clone() }));
    assert_eq!(waiting.next().await.unwrap_err().code(), Code::PermissionDenied);
    issued.set_view(stage.west.view(v1::Slice { revision: 4, entries: vec![], ..stage.slice.clone() }));
    assert_eq!(stream.next().await.unwrap_err().code(), Code::PermissionDenied);
}

#[tokio::test]
async fn an_incremental_stream_tells_what_is_new_and_what_is_gone() {
    let mut stage = stage();
    let issued = Issued::default();
    issued.set_view(stage.west.view(stage.slice.clone()));
    issued.set_svids(svids(&mut stage, &["me"]));
    let socket = Socket::serve("increments", &issued);
    let both = |there: &[&str], gone: &[&str]| (list(there), list(gone));
    let mut stream = Delta::open(&socket, delta(&["default", "ROOTCA", "spiffe://west/two"], &[], "")).await;
    assert_eq!(stream.told().await, both(&["ROOTCA", "default"], &["spiffe://west/two"]));
    assert!(stream.is_silent().await, "each once");
    // A new certificate is no reason to tell the roots again.
    issued.set_svids(svids(&mut stage, &["me"]));
    let changed = stream.next().await.unwrap();
    assert_eq!((changed.resources.len(), changed.resources[0].name.as_str()), (1, "default"));
    let rejected = DeltaDiscoveryRequest {
        error_detail: Some(rpc::Status { code: 3, message: "no".into(), details: vec![] }),
        ..delta(&[], &[], &changed.nonce)
    };
    stream.up.send(rejected).await.unwrap();
    assert!(stream.is_silent().await, "a rejection is no reason to tell the same again");
    // Another stream, of one that has this already.
    let known = [("default".to_owned(), changed.resources[0].version.clone()), ("old".to_owned(), "1".to_owned())];
    let first =
        DeltaDiscoveryRequest { initial_resource_versions: known.into(), ..delta(&["default", "old"], &[], "") };
    let mut again = Delta::open(&socket, first).await;
    assert_eq!(again.told().await, both(&[], &["old"]));
    again.up.send(delta(&["ALL"], &["default", "never asked for"], "no such nonce")).await.unwrap();
    assert_eq!(again.told().await, both(&["ALL"], &[]));
    issued.set_svids(svids(&mut stage, &["me"]));
    assert_eq!(stream.told().await, both(&["default"], &[]));
    assert!(again.is_silent().await, "no longer asked for");

    // The second identity comes and goes, then the first.
    let two = stage.west.entry("two", &[&uid()], &[]);
    stage.slice.entries.push(two);
    issued.set_view(stage.west.view(v1::Slice { revision: 2, ..stage.slice.clone() }));
    let held = svids(&mut stage, &["me", "two"]);
    issued.set_svids(held);
    let mut there = stream.told().await;
    if there == both(&["default"], &[]) {
        there = stream.told().await;
    }
    assert!(there.0.contains(&"spiffe://west/two".to_owned()), "{there:?}");
    stage.slice.entries.pop();
    issued.set_view(stage.west.view(v1::Slice { revision: 3, ..stage.slice.clone() }));
    assert_eq!(stream.told().await, both(&[], &["spiffe://west/two"]));
    issued.set_view(stage.west.view(v1::Slice { revision: 4, entries: vec![], ..stage.slice.clone() }));
    assert_eq!(stream.told().await, both(&[], &["ROOTCA", "default"]), "all of it, and then why");
    assert_eq!(stream.next().await.unwrap_err().code(), Code::PermissionDenied);
}

#[tokio::test]
async fn what_makes_no_sense_is_refused() {
    let stage = stage();
    let issued = Issued::default();
    let socket = Socket::serve("nonsense", &issued);
    assert_eq!(fetch(&socket, request(&["default"])).await.unwrap_err().code(), Code::Unavailable, "no slice yet");
    issued.set_view(stage.west.view(v1::Slice { entries: vec![], ..stage.slice.clone() }));
    assert_eq!(fetch(&socket, request(&["default"])).await.unwrap_err().code(), Code::PermissionDenied, "nobody");
    issued.set_view(stage.west.view(v1::Slice { revision: 2, ..stage.slice }));

    let other = DiscoveryRequest { type_url: "type.googleapis.com/x.Cluster".into(), ..request(&[]) };
    let many = request(&["a"; 65]);
    for bad in [other, many] {
        assert_eq!(fetch(&socket, bad.clone()).await.unwrap_err().code(), Code::InvalidArgument);
        assert_eq!(Stream::open(&socket, bad).await.next().await.unwrap_err().code(), Code::InvalidArgument);
    }
    let mut client = SecretDiscoveryServiceClient::new(socket.channel().await);
    let mut tricked = Request::new(request(&["ROOTCA"]));
    tricked.metadata_mut().insert("workload.spiffe.io", "yes".parse().unwrap());
    assert_eq!(client.fetch_secrets(tricked).await.unwrap_err().code(), Code::InvalidArgument);
    let other = DeltaDiscoveryRequest { type_url: "type.googleapis.com/x.Cluster".into(), ..delta(&[], &[], "") };
    let many: Vec<String> = (0..65).map(|n| format!("n{n}")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    let (huge, long) = ("a".repeat(1 << 20), "a".repeat(2049));
    let too_large = Delta::open(&socket, delta(&[&huge], &[], "")).await.next().await.unwrap_err();
    assert_eq!(too_large.code(), Code::OutOfRange, "no message is that large");
    for bad in [other, delta(&many, &[], ""), delta(&[], &many, ""), delta(&[&long], &[], "")] {
        let mut stream = Delta::open(&socket, bad).await;
        assert_eq!(stream.next().await.unwrap_err().code(), Code::InvalidArgument);
    }
    // What was known comes first or not at all.
    let mut stream = Delta::open(&socket, delta(&["ROOTCA"], &[], "")).await;
    assert_eq!(stream.told().await.0, ["ROOTCA"]);
    let late =
        DeltaDiscoveryRequest { initial_resource_versions: [("a".into(), "1".into())].into(), ..delta(&[], &[], "") };
    stream.up.send(late).await.unwrap();
    assert_eq!(stream.next().await.unwrap_err().code(), Code::InvalidArgument);
}
