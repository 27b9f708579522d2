//! Every method of every service, called by everybody who may not call it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says that it failed by panicking")]

use ambit_identity::SvidKey;
use ambit_proto::v1;
use ambit_tests::cell::{Cell, Seat, admin_identity, fresh};
use ambit_tests::machine::{Lies, Machine, identity, join_token, node_identity, register_cluster};
use ambit_tests::process::Folder;
use ambit_tests::table::row;
use ambit_tests::tpm::Maker;
use ambit_transport::Identity;
use ambitd::authorise::{METHODS, Who};
use http::uri::PathAndQuery;
use prost::Message;
use prost_types::FileDescriptorSet;
use std::collections::BTreeSet;
use std::time::Duration;
use tonic::transport::Channel;
use tonic::{Request, Status};

/// What answers at all answers well within this; a method that waits for news was let in.
const ANSWER_MAX: Duration = Duration::from_secs(2);

/// Path and input type of every method of our own services.
fn methods() -> Vec<(String, String)> {
    let set = FileDescriptorSet::decode(ambit_proto::AMBIT_DESCRIPTORS).unwrap();
    let services = set.file.iter().flat_map(|file| file.service.iter().map(move |s| (file.package(), s)));
    let methods = services.flat_map(|(package, service)| {
        service
            .method
            .iter()
            .map(move |m| (format!("/{package}.{}/{}", service.name(), m.name()), m.input_type().to_owned()))
    });
    methods.collect()
}

/// Calls with one empty message, whatever the method's kind.
async fn call(channel: &Channel, path: &str) -> Result<(), Status> {
    let mut grpc = tonic::client::Grpc::new(channel.clone());
    let path: PathAndQuery = path.parse().unwrap();
    let answer = async {
        grpc.ready().await.map_err(|e| Status::unavailable(e.to_string()))?;
        let codec = tonic_prost::ProstCodec::<(), ()>::default();
        let answer = grpc.streaming(Request::new(tokio_stream::once(())), path, codec).await?;
        answer.into_inner().message().await.map(drop)
    };
    tokio::time::timeout(ANSWER_MAX, answer).await.unwrap_or(Ok(()))
}

/// The code in the trailers; not the gRPC status, which says less.
async fn code(channel: &Channel, path: &str) -> String {
    match call(channel, path).await {
        Ok(()) => "ok".into(),
        Err(status) => match status.metadata().get("ambit-code") {
            Some(code) => code.to_str().unwrap().to_owned(),
            None => format!("no code: {status:?}"),
        },
    }
}

#[test]
fn the_table_holds_every_method_and_no_other() {
    let ours: BTreeSet<String> = methods().into_iter().map(|(path, _)| path).collect();
    assert!(ours.len() > 50, "{}", ours.len());
    let table: BTreeSet<String> = METHODS.iter().map(|(path, _)| (*path).to_owned()).collect();
    assert_eq!(table.len(), METHODS.len(), "a method twice");
    let others: BTreeSet<String> = table.iter().filter(|path| path.starts_with("/grpc.")).cloned().collect();
    let own: BTreeSet<String> = table.difference(&others).cloned().collect();
    assert_eq!(own, ours, "left: the table; right: the protos");
    let known = ["/grpc.health.v1.Health/", "/grpc.reflection.v1.ServerReflection/"];
    assert!(others.iter().all(|path| known.iter().any(|service| path.starts_with(service))), "{others:?}");
}

/// Said once more, apart from the table: who else than administrators may call what. A row more here is a decision.
#[test]
fn few_methods_are_for_others_than_administrators() {
    let of =
        |who: Who| METHODS.iter().filter(move |(_, w)| *w == who).map(|(path, _)| path.rsplit_once('.').unwrap().1);
    let anyone = [
        "NodeAttestation/Begin",
        "NodeAttestation/Evidence",
        "PeerLink/Hello",
        "PeerLink/Prove",
        "Membership/ReplicaJoin",
        "Health/Check",
        "Health/Watch",
    ];
    assert_eq!(of(Who::Anyone).collect::<Vec<_>>(), anyone);
    let node = ["Svid/BatchNewX509SVID", "Svid/NewJWTSVID", "AgentStream/Sync"];
    assert_eq!(of(Who::Node).collect::<Vec<_>>(), node);
    assert_eq!(of(Who::Replica).collect::<Vec<_>>(), ["Membership/RenewAuthority", "Raft/Exchange", "Raft/Propose"]);
    assert_eq!(of(Who::Peer).collect::<Vec<_>>(), ["PeerLink/Pull"]);
    // Reads (also of who holds which root, at each replica), the joiner's own promotion, and objects that replicas copy to each other under their SHA-256.
    for path in of(Who::AdminOrReplica) {
        let method = path.split_once('/').unwrap().1;
        let few = ["ListClusters", "ListPeers", "Status", "Promote", "PutBlob", "GetBlob", "GetX509AuthorityState"];
        assert!(few.contains(&method), "{path}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_the_table_lets_anybody_in() {
    let cell = Cell::start("west", 1).await.unwrap();
    let maker = Maker::new().unwrap();
    let machine = Machine::new(&maker, "n1").await.unwrap();
    register_cluster(&cell, "west", &maker).await.unwrap();
    let token = join_token(&cell, "west").await.unwrap();
    let (verdict, answer) = machine.enrol(&cell, 1, "west", &token, &Lies::default()).await.unwrap().unwrap();
    let node = cell.channel_as(node_identity(&verdict, &answer.key).unwrap(), 1).await.unwrap();
    let workload = cell.channel_as(workload(&cell, &node).await, 1).await.unwrap();
    let anonymous = cell.anonymous(1).await.unwrap();
    let admin = cell.admin(1).await.unwrap();

    for (path, who) in METHODS {
        let anyone = *who == Who::Anyone;
        let refused = |code: &str| ["unauthenticated", "permission_denied"].contains(&code);
        let found = code(&anonymous, path).await;
        assert_eq!(found == "unauthenticated", !anyone, "{path} without a certificate: {found}");
        assert!(anyone || refused(&found), "{path}: {found}");
        // A workload's certificate is of no role: it opens nothing, not even what a stranger may call.
        assert_eq!(code(&workload, path).await, "permission_denied", "{path} as a workload");
        let found = code(&node, path).await;
        assert_eq!(found == "permission_denied", !matches!(who, Who::Anyone | Who::Node), "{path} as a node: {found}");
        if !matches!(who, Who::Anyone | Who::Admin | Who::AdminOrReplica) {
            assert_eq!(code(&admin, path).await, "permission_denied", "{path} as an administrator");
        }
    }
    let closed = METHODS.iter().filter(|(_, who)| *who != Who::Anyone).count();
    row(48, &format!("{closed} RPCs without a client certificate, one by one"), "unauthenticated").unwrap();
    // Not in the table, whoever asks.
    for channel in [&anonymous, &admin] {
        assert_eq!(code(channel, "/ambit.v1.Membership/Nonsense").await, "unimplemented");
        assert_eq!(code(channel, "/nobody.v1.Nothing/Call").await, "unimplemented");
    }
    unbuilt_methods_say_so(&admin, &node).await;
    foreign_certificates_end_at_the_handshake(&cell).await;
}

/// A workload's SVID, issued through the node as its agent would ask for it.
async fn workload(cell: &Cell, node: &Channel) -> Identity {
    let entry = v1::Entry {
        id: "web".into(),
        spiffe_id: "spiffe://west/web".into(),
        cluster: "west".into(),
        selectors: vec!["unix:uid:1000".into()],
        ..Default::default()
    };
    let mut entries = v1::entry_registry_client::EntryRegistryClient::new(cell.admin(1).await.unwrap());
    let request = v1::BatchCreateEntryRequest { request_id: fresh(), entries: vec![entry] };
    assert_eq!(entries.batch_create_entry(request).await.unwrap().into_inner().results[0].code, "ok");
    let key = SvidKey::generate().unwrap();
    let items = vec![v1::NewX509svid { entry_id: "web".into(), csr: key.csr().unwrap() }];
    let mut svids = v1::svid_client::SvidClient::new(node.clone());
    let request = v1::BatchNewX509svidRequest { request_id: fresh(), items };
    let issued = svids.batch_new_x509svid(request).await.unwrap().into_inner().results.remove(0);
    assert_eq!(issued.code, "ok", "{}", issued.message);
    identity(&issued.chain_der, &key).unwrap()
}

async fn unbuilt_methods_say_so(admin: &Channel, node: &Channel) {
    let further = ["/ambit.v1.ClusterRegistry/SuspendPeer", "/ambit.v1.ClusterRegistry/RemovePeer"];
    let unbuilt: Vec<String> = methods()
        .into_iter()
        .filter(|(path, input)| input.ends_with("Unbuilt") || further.contains(&path.as_str()))
        .map(|(path, _)| path)
        .collect();
    assert!(unbuilt.len() >= 9, "{unbuilt:?}");
    for path in unbuilt {
        let who = METHODS.iter().find(|(method, _)| *method == path).unwrap().1;
        let channel = if who == Who::Node { node } else { admin };
        let status = call(channel, &path).await.unwrap_err();
        assert_eq!(status.code(), tonic::Code::Unimplemented, "{path}");
        assert_eq!(status.metadata().get("ambit-code").unwrap(), "unimplemented", "{path}");
        assert!(status.message().contains("try: "), "{path}: {}", status.message());
    }
}

/// An administrator of a trust domain that nobody vouches for.
async fn foreign_certificates_end_at_the_handshake(cell: &Cell) {
    let folder = Folder::new().unwrap();
    let seat = Seat::new(&folder, "foreign", "").unwrap();
    let out = folder.path("admin").display().to_string();
    let made = seat.ambitd("init", &["--trust-domain", "west", "--admin-out", &out]).unwrap();
    assert!(made.status.success());
    let stranger = admin_identity(&folder.path("admin")).unwrap();
    // In TLS 1.3 a client learns of the refusal with its first read.
    if let Ok(channel) = cell.channel_as(stranger, 1).await {
        for path in ["/ambit.v1.Membership/Status", "/ambit.v1.NodeAttestation/Begin", "/grpc.health.v1.Health/Check"] {
            let status = call(&channel, path).await.unwrap_err();
            assert!(status.metadata().get("ambit-code").is_none(), "{path} was answered: {status:?}");
        }
    }
}
