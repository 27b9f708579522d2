//! Every method of every service, called by everybody: who is let in stands here once more, written out by hand.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says that it failed by panicking")]

use ambit_identity::SvidKey;
use ambit_proto::v1;
use ambit_tests::cell::{Cell, Seat, admin_identity, fresh};
use ambit_tests::contexts::Expiring;
use ambit_tests::machine::{Lies, Machine, identity, join_token, node_identity, register_cluster};
use ambit_tests::peering::{administrator, peer, replica_identity, revoke_all};
use ambit_tests::process::Folder;
use ambit_tests::table::row;
use ambit_tests::tpm::Maker;
use ambit_transport::Identity;
use ambitd::authorise::METHODS;
use http::uri::PathAndQuery;
use prost::Message;
use prost_types::FileDescriptorSet;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use tonic::transport::Channel;
use tonic::{Request, Status};

/// What answers at all answers well within this; a method that waits for news was let in.
const ANSWER_MAX: Duration = Duration::from_secs(2);

/// Callers: F federation-admin, C cluster-admin:west, O operator, A auditor, N node, R replica, P replica of an active peer,
/// D issuer of a cluster (an SVID of a downstream entry), `-` without a certificate. A workload's certificate, and an administrator's whose roles were taken away, open nothing.
const EVERYBODY: &str = "-FCOANRPD";

/// Who is let in. A row more, or a letter more, is a decision.
const MATRIX: &[(&str, &str)] = &[
    ("ambit.v1.NodeAttestation/Begin", EVERYBODY),
    ("ambit.v1.NodeAttestation/Evidence", EVERYBODY),
    ("ambit.v1.NodeAttestation/CreateJoinToken", "FC"),
    ("ambit.v1.NodeAttestation/AllowEk", "FC"),
    ("ambit.v1.NodeAttestation/ListNodes", "FCO"),
    ("ambit.v1.NodeAttestation/ExplainNode", "FCO"),
    ("ambit.v1.NodeAttestation/BanNode", "FC"),
    ("ambit.v1.NodeAttestation/UnbanNode", "FC"),
    ("ambit.v1.NodeAttestation/EvictNode", "FC"),
    ("ambit.v1.NodeAttestation/QuarantineNode", "FC"),
    ("ambit.v1.NodeAttestation/ReleaseNode", "FC"),
    ("ambit.v1.NodeAttestation/AttestationAt", "FCO"),
    ("ambit.v1.NodeAttestation/AttestationResult", "FCO"),
    ("ambit.v1.NodeAttestation/PutEkRoots", "F"),
    ("ambit.v1.NodeAttestation/DisallowEk", "FC"),
    ("ambit.v1.NodeAttestation/PutEkDeny", "F"),
    ("ambit.v1.NodeAttestation/ListEndorsements", "FCO"),
    ("ambit.v1.Appraisal/ApplyAppraisalPolicy", "FC"),
    ("ambit.v1.Appraisal/DeleteAppraisalPolicy", "FC"),
    ("ambit.v1.Appraisal/ListAppraisalPolicies", "FCO"),
    ("ambit.v1.Appraisal/PromoteAppraisalPolicy", "FC"),
    ("ambit.v1.Appraisal/TestAppraisalPolicy", "FO"),
    ("ambit.v1.Appraisal/LearnAppraisalPolicy", "FO"),
    ("ambit.v1.Appraisal/PutBlob", "FCR"),
    ("ambit.v1.Appraisal/GetBlob", "FOR"),
    ("ambit.v1.ClusterRegistry/RegisterCluster", "F"),
    ("ambit.v1.ClusterRegistry/ListClusters", "FCOAR"),
    ("ambit.v1.ClusterRegistry/CreateClusterToken", "F"),
    ("ambit.v1.ClusterRegistry/RegisterPeer", "F"),
    ("ambit.v1.ClusterRegistry/ApprovePeer", "F"),
    ("ambit.v1.ClusterRegistry/ListPeers", "FCOAR"),
    ("ambit.v1.ClusterRegistry/SuspendPeer", "F"),
    ("ambit.v1.ClusterRegistry/RemovePeer", "F"),
    ("ambit.v1.ClusterRegistry/ListStandbys", "FCOAR"),
    ("ambit.v1.ClusterRegistry/NameStandby", "F"),
    ("ambit.v1.ClusterRegistry/CommitGrant", "F"),
    ("ambit.v1.ClusterRegistry/ReleaseGrant", "F"),
    ("ambit.v1.ClusterRegistry/TakeBack", "F"),
    ("ambit.v1.ClusterRegistry/JudgeLate", "F"),
    ("ambit.v1.PeerLink/Hello", EVERYBODY),
    ("ambit.v1.PeerLink/Prove", EVERYBODY),
    ("ambit.v1.PeerLink/Pull", "P"),
    ("ambit.v1.PeerLink/RenewLease", "P"),
    ("ambit.v1.PeerLink/CertifyStandby", "P"),
    ("ambit.v1.EntryRegistry/BatchCreateEntry", "FC"),
    ("ambit.v1.EntryRegistry/BatchUpdateEntry", "FC"),
    ("ambit.v1.EntryRegistry/BatchDeleteEntry", "FC"),
    ("ambit.v1.EntryRegistry/ListEntries", "FCO"),
    ("ambit.v1.EntryRegistry/GetEntry", "FCO"),
    ("ambit.v1.Svid/BatchNewX509SVID", "N"),
    ("ambit.v1.Svid/NewJWTSVID", "N"),
    ("ambit.v1.Svid/MintX509SVID", "F"),
    ("ambit.v1.Svid/NewIntermediateCA", "D"),
    ("ambit.v1.Svid/MintJWTSVID", "F"),
    ("ambit.v1.Svid/RenewAdmin", "FCOA"),
    ("ambit.v1.Svid/ListIssued", "FOA"),
    ("ambit.v1.BundleRegistry/GetBundle", "FCOA"),
    ("ambit.v1.BundleRegistry/ListBundles", "FCOA"),
    ("ambit.v1.LocalAuthority/GetX509AuthorityState", "FOR"),
    ("ambit.v1.Membership/RenewAuthority", "R"),
    ("ambit.v1.CoSigner/CoSign", "R"),
    ("ambit.v1.LocalAuthority/PrepareX509Authority", "F"),
    ("ambit.v1.LocalAuthority/ActivateX509Authority", "F"),
    ("ambit.v1.LocalAuthority/TaintX509Authority", "F"),
    ("ambit.v1.LocalAuthority/RevokeX509Authority", "F"),
    ("ambit.v1.LocalAuthority/GetJWTAuthorityState", "FO"),
    ("ambit.v1.LocalAuthority/PrepareJWTAuthority", "F"),
    ("ambit.v1.LocalAuthority/ActivateJWTAuthority", "F"),
    ("ambit.v1.LocalAuthority/TaintJWTAuthority", "F"),
    ("ambit.v1.LocalAuthority/RevokeJWTAuthority", "F"),
    ("ambit.v1.LocalAuthority/ShareRoot", "F"),
    ("ambit.v1.LocalAuthority/SealRoot", "F"),
    ("ambit.v1.LocalAuthority/RequestExternalAuthority", "F"),
    ("ambit.v1.LocalAuthority/WithdrawExternalAuthority", "F"),
    ("ambit.v1.LocalAuthority/ImportExternalAuthority", "F"),
    ("ambit.v1.Membership/RequireAttestedReplicas", "F"),
    ("ambit.v1.TrustDomainRegistry/ListFederationRelationships", "FO"),
    ("ambit.v1.TrustDomainRegistry/CreateFederationGroup", "F"),
    ("ambit.v1.TrustDomainRegistry/PutFederationRelationship", "F"),
    ("ambit.v1.TrustDomainRegistry/DeleteFederationRelationship", "F"),
    ("ambit.v1.TrustDomainRegistry/RefreshBundle", "FR"),
    ("ambit.v1.TrustDomainRegistry/ConfirmBundle", "F"),
    ("ambit.v1.PolicyRegistry/Apply", "FC"),
    ("ambit.v1.PolicyRegistry/Delete", "FC"),
    ("ambit.v1.PolicyRegistry/List", "FCO"),
    ("ambit.v1.PolicyRegistry/Explain", "FCO"),
    ("ambit.v1.PolicyRegistry/Plan", "FCO"),
    ("ambit.v1.PolicyRegistry/WhoCan", "FCO"),
    ("ambit.v1.PolicyRegistry/Unused", "FCO"),
    ("ambit.v1.PolicyRegistry/History", "FCO"),
    ("ambit.v1.PolicyRegistry/Flows", "FOR"),
    ("ambit.v1.PolicyRegistry/Connection", "FOR"),
    ("ambit.v1.PolicyRegistry/Rollback", "F"),
    ("ambit.v1.PolicyRegistry/Status", "FCOR"),
    ("ambit.v1.Watch/Watch", "FO"),
    ("ambit.v1.AgentStream/Sync", "N"),
    ("ambit.v1.Membership/Status", "FCOAR"),
    ("ambit.v1.Membership/CreateReplicaToken", "F"),
    ("ambit.v1.Membership/ReplicaJoin", EVERYBODY),
    ("ambit.v1.Membership/Promote", "FR"),
    ("ambit.v1.Membership/TransferLeader", "F"),
    ("ambit.v1.Membership/RemoveVoter", "F"),
    ("ambit.v1.Membership/Snapshot", "F"),
    ("ambit.v1.Membership/Backup", "F"),
    ("ambit.v1.Raft/Exchange", "R"),
    ("ambit.v1.Raft/Propose", "R"),
    ("ambit.v1.Drill/SealReport", "F"),
    ("ambit.v1.Drill/ListReports", "FOA"),
    ("ambit.v1.Drill/RunDrill", "F"),
    ("ambit.v1.Audit/WatchAudit", "FA"),
    ("ambit.v1.Audit/AuditHead", "FAR"),
    ("ambit.v1.Audit/ReadAudit", "FAR"),
    ("ambit.v1.Audit/ProveAudit", "FA"),
    ("ambit.v1.Audit/BeginAudit", "F"),
    ("ambit.v1.Audit/NoteAuditExport", "FA"),
    ("ambit.v1.PeerLink/CosignAudit", "P"),
    ("ambit.v1.Audit/ListRefusals", "FOA"),
    ("ambit.v1.Administrators/ListAdmins", "FOA"),
    ("ambit.v1.Administrators/ChangeRoles", "F"),
    ("ambit.v1.Administrators/CertifyAdmin", "F"),
    ("ambit.v1.Administrators/ListApprovers", "FOA"),
    ("ambit.v1.Administrators/AddApprover", "F"),
    ("ambit.v1.Administrators/RemoveApprover", "F"),
    ("ambit.v1.Revocation/DenyId", "FC"),
    ("ambit.v1.Revocation/DenySvid", "F"),
    ("ambit.v1.Revocation/ListDenials", "FOA"),
    ("ambit.v1.Revocation/GetCrl", "FOR"),
    ("ambit.v1.Traffic/SetRegion", "FC"),
    ("ambit.v1.Traffic/DrainCluster", "FC"),
    ("ambit.v1.Traffic/UndrainCluster", "FC"),
    ("ambit.v1.Traffic/FailOver", "F"),
    ("ambit.v1.Traffic/FailBack", "F"),
    ("ambit.v1.Traffic/ShowCluster", "FCOA"),
    ("grpc.health.v1.Health/Check", EVERYBODY),
    ("grpc.health.v1.Health/Watch", EVERYBODY),
    ("grpc.reflection.v1.ServerReflection/ServerReflectionInfo", "FCOA"),
];

/// Path and input type of every method of our own services, as the protos have them.
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
fn code(status: &Status) -> String {
    match status.metadata().get("ambit-code") {
        Some(code) => code.to_str().unwrap().to_owned(),
        None => format!("no code: {status:?}"),
    }
}

/// The refusal of a caller, if the table did not let him in. A method that refuses by itself names no path.
async fn turned_away(channel: &Channel, path: &str) -> Option<String> {
    let status = call(channel, path).await.err()?;
    let of_table = status.message().contains(path) || status.message().contains("certificate of this trust domain");
    let code = code(&status);
    (of_table && ["unauthenticated", "permission_denied"].contains(&code.as_str())).then_some(code)
}

#[test]
fn the_matrix_and_the_table_hold_every_method_and_no_other() {
    let ours: BTreeSet<String> = methods().into_iter().map(|(path, _)| path).collect();
    assert!(ours.len() > 50, "{}", ours.len());
    for (what, paths) in [
        ("METHODS", METHODS.iter().map(|(path, _)| (*path).to_owned()).collect::<Vec<_>>()),
        ("MATRIX: write its row", MATRIX.iter().map(|(path, _)| format!("/{path}")).collect()),
    ] {
        let table: BTreeSet<String> = paths.iter().cloned().collect();
        assert_eq!(table.len(), paths.len(), "{what}: a method twice");
        let others: BTreeSet<String> = table.iter().filter(|path| path.starts_with("/grpc.")).cloned().collect();
        let own: BTreeSet<String> = table.difference(&others).cloned().collect();
        assert_eq!(own, ours, "left: {what}; right: the protos");
        let known = ["/grpc.health.v1.Health/", "/grpc.reflection.v1.ServerReflection/"];
        assert!(others.iter().all(|path| known.iter().any(|service| path.starts_with(service))), "{others:?}");
    }
    let letters = |text: &str| text.chars().all(|c| EVERYBODY.contains(c));
    assert!(MATRIX.iter().all(|(_, who)| letters(who)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_who_is_in_the_matrix_is_let_in() {
    let (west, east) = tokio::join!(Cell::start("west", 1), Cell::start("east", 1));
    let (cell, east) = (west.unwrap(), east.unwrap());
    let maker = Maker::new().unwrap();
    let machine = Machine::new(&maker, "n1").await.unwrap();
    register_cluster(&cell, "west", &maker).await.unwrap();
    let token = join_token(&cell, "west").await.unwrap();
    let (verdict, answer) = machine.enrol(&cell, 1, "west", &token, &Lies::default()).await.unwrap().unwrap();
    let node = cell.channel_as(node_identity(&verdict, &answer.key).unwrap(), 1).await.unwrap();
    peer(&cell, &east).await.unwrap();

    let by_role = |name: &'static str, role: &'static str| {
        let cell = &cell;
        async move { cell.channel_as(administrator(cell, name, &[role]).await.unwrap(), 1).await.unwrap() }
    };
    let out_of_office = by_role("gone", "federation-admin").await;
    revoke_all(&cell, "gone").await.unwrap();
    let issuer = cell.channel_as(workload(&cell, (&node, &machine.node()), "site", true).await, 1).await.unwrap();
    let workload = cell.channel_as(workload(&cell, (&node, &machine.node()), "web", false).await, 1).await.unwrap();
    let callers: BTreeMap<char, Channel> = BTreeMap::from([
        ('-', cell.anonymous(1).await.unwrap()),
        ('F', by_role("alice", "federation-admin").await),
        ('C', by_role("carol", "cluster-admin:west").await),
        ('O', by_role("olga", "operator").await),
        ('A', by_role("anna", "auditor").await),
        ('N', node),
        ('R', cell.channel_as(replica_identity(&cell, 1).unwrap(), 1).await.unwrap()),
        ('P', cell.channel_as(replica_identity(&east, 1).unwrap(), 1).await.unwrap()),
        ('D', issuer),
    ]);
    assert_eq!(callers.len(), EVERYBODY.len());

    let mut calls = 0;
    for (path, who) in MATRIX {
        let path = format!("/{path}");
        for (letter, channel) in &callers {
            let away = turned_away(channel, &path).await;
            assert_eq!(away.is_none(), who.contains(*letter), "{path} as {letter}: {away:?}");
            let stranger = *letter == '-';
            assert!(away.is_none_or(|code| (code == "unauthenticated") == stranger), "{path} as {letter}");
            calls += 1;
        }
        // Of no role: not even what a stranger may call.
        for (name, channel) in [("a workload", &workload), ("an administrator without roles", &out_of_office)] {
            let status = call(channel, &path).await.expect_err(name);
            assert_eq!(code(&status), "permission_denied", "{path} as {name}");
            calls += 1;
        }
    }
    let closed = MATRIX.iter().filter(|(_, who)| !who.contains('-')).count();
    row(48, &format!("{closed} RPCs without a client certificate, one by one"), "unauthenticated").unwrap();
    row(48, &format!("{} RPCs x 11 roles, {calls} calls by a table written by hand", MATRIX.len()), "as written")
        .unwrap();
    // Not in the table, whoever asks.
    for letter in ['-', 'F'] {
        for path in ["/ambit.v1.Membership/Nonsense", "/nobody.v1.Nothing/Call"] {
            assert_eq!(code(&call(&callers[&letter], path).await.unwrap_err()), "unimplemented");
        }
    }
    refusals_are_kept(&cell, &callers[&'O']).await;
    every_refused_cell_of_the_matrix_is_told(&cell, &callers[&'O']).await;
    so_is_a_stream_that_ends_refused(&cell, &callers[&'O']).await;
    unbuilt_methods_say_so(&callers[&'F'], &callers[&'N']).await;
    foreign_certificates_end_at_the_handshake(&cell).await;
}

/// What was refused stands in a row for each caller, method and code.
async fn refusals_are_kept(cell: &Cell, operator: &Channel) {
    let mut audit = v1::audit_client::AuditClient::new(operator.clone());
    let rows = audit.list_refusals(v1::ListRefusalsRequest {}).await.unwrap().into_inner().refused;
    for (caller, method, code) in [
        ("spiffe://west/ambit/admin/carol", "ClusterRegistry/RegisterCluster", "permission_denied"),
        ("spiffe://west/ambit/admin/gone", "grpc.health.v1.Health/Check", "permission_denied"),
        ("spiffe://west/web", "AgentStream/Sync", "permission_denied"),
        ("spiffe://east/ambit/replica/1", "Raft/Propose", "permission_denied"),
        ("anonymous 127.0.0.1", "Membership/Backup", "unauthenticated"),
    ] {
        let found = rows.iter().find(|r| r.caller == caller && r.method.ends_with(method));
        let found = found.unwrap_or_else(|| panic!("{caller} {method} is not among {} rows", rows.len()));
        assert!(found.code == code && found.count >= 1 && found.first_ms <= found.last_ms, "{found:?}");
    }
    let page = cell.metrics_page(1).unwrap();
    assert!(page.contains("ambit_refusals_total{code=\"permission_denied\"}"), "{page}");
}

/// By who, method and code: a row, and a line of the replica's log.
async fn every_refused_cell_of_the_matrix_is_told(cell: &Cell, operator: &Channel) {
    let mut audit = v1::audit_client::AuditClient::new(operator.clone());
    let kept = audit.list_refusals(v1::ListRefusalsRequest {}).await.unwrap().into_inner();
    assert_eq!(kept.forgotten, 0);
    let rows: BTreeSet<_> = kept.refused.into_iter().map(|r| (r.caller, r.method, r.code)).collect();
    let log = std::fs::read_to_string(&cell.seat_of(1).unwrap().log).unwrap();
    let said = |value: &serde_json::Value, name: &str| value["fields"][name].as_str().unwrap_or_default().to_owned();
    let lines = log.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let lines: BTreeSet<_> = lines
        .filter(|line| said(line, "message") == "call refused")
        .map(|line| (said(&line, "caller"), said(&line, "method"), said(&line, "code")))
        .collect();
    let node = rows.iter().map(|(caller, ..)| caller).find(|caller| caller.starts_with("spiffe://west/ambit/node/"));
    let callers = BTreeMap::from([
        ('-', "anonymous 127.0.0.1".to_owned()),
        ('F', "spiffe://west/ambit/admin/alice".to_owned()),
        ('C', "spiffe://west/ambit/admin/carol".to_owned()),
        ('O', "spiffe://west/ambit/admin/olga".to_owned()),
        ('A', "spiffe://west/ambit/admin/anna".to_owned()),
        ('N', node.unwrap().clone()),
        ('R', "spiffe://west/ambit/replica/1".to_owned()),
        ('P', "spiffe://east/ambit/replica/1".to_owned()),
    ]);
    let mut refused = 0;
    for (method, who) in MATRIX {
        for (letter, caller) in &callers {
            let code = if *letter == '-' { "unauthenticated" } else { "permission_denied" };
            let cell = (caller.clone(), format!("/{method}"), code.to_owned());
            if who.contains(*letter) {
                continue;
            }
            assert!(rows.contains(&cell), "no row: {cell:?}");
            assert!(lines.contains(&cell), "no line: {cell:?}");
            refused += 1;
        }
        for gone in ["spiffe://west/ambit/admin/gone", "spiffe://west/web"] {
            let cell = (gone.to_owned(), format!("/{method}"), "permission_denied".to_owned());
            assert!(rows.contains(&cell) && lines.contains(&cell), "{cell:?}");
            refused += 1;
        }
    }
    row(48, &format!("{refused} refused cells of the matrix in the audit, with who, method and code"), "all").unwrap();
}

/// Its certificate ends while it goes on: what it was refused with stands in the trailers, after messages.
async fn so_is_a_stream_that_ends_refused(cell: &Cell, operator: &Channel) {
    let founder = Expiring::of(cell, 1).unwrap().identity(-1_000, 4_000).unwrap();
    let mut watch = v1::watch_client::WatchClient::new(cell.channel_as(founder, 1).await.unwrap());
    let request = v1::WatchRequest { kinds: vec!["entry".into()], after_revision: 0, stale_ok: false };
    let mut events = watch.watch(request).await.unwrap().into_inner();
    let ended = loop {
        match events.message().await {
            Ok(event) => assert!(event.is_some(), "it ended well"),
            Err(status) => break status,
        }
    };
    assert_eq!(code(&ended), "unauthenticated");
    let mut audit = v1::audit_client::AuditClient::new(operator.clone());
    let rows = audit.list_refusals(v1::ListRefusalsRequest {}).await.unwrap().into_inner().refused;
    let of_watch = |r: &&v1::RefusedCall| r.method.ends_with("v1.Watch/Watch") && r.caller.ends_with("/founder");
    assert_eq!(rows.iter().find(of_watch).map(|r| r.code.as_str()), Some("unauthenticated"));
}

/// A workload's SVID, issued through the node as its agent would ask for it.
async fn workload(cell: &Cell, (node, on): (&Channel, &str), id: &str, downstream: bool) -> Identity {
    let entry = v1::Entry {
        id: id.into(),
        spiffe_id: format!("spiffe://west/{id}"),
        downstream,
        cluster: "west".into(),
        nodes: vec![on.into()],
        selectors: vec!["unix:uid:1000".into()],
        ..Default::default()
    };
    let mut entries = v1::entry_registry_client::EntryRegistryClient::new(cell.admin(1).await.unwrap());
    let request = v1::BatchCreateEntryRequest { request_id: fresh(), entries: vec![entry] };
    assert_eq!(entries.batch_create_entry(request).await.unwrap().into_inner().results[0].code, "ok");
    let key = SvidKey::generate().unwrap();
    let items = vec![v1::NewX509svid { entry_id: id.into(), csr: key.csr().unwrap() }];
    let mut svids = v1::svid_client::SvidClient::new(node.clone());
    let request = v1::BatchNewX509svidRequest { request_id: fresh(), items };
    let issued = svids.batch_new_x509svid(request).await.unwrap().into_inner().results.remove(0);
    assert_eq!(issued.code, "ok", "{}", issued.message);
    identity(&issued.chain_der, &key).unwrap()
}

async fn unbuilt_methods_say_so(admin: &Channel, node: &Channel) {
    let unbuilt: Vec<String> =
        methods().into_iter().filter(|(_, input)| input.ends_with("Unbuilt")).map(|(path, _)| path).collect();
    for path in unbuilt {
        let who = MATRIX.iter().find(|(method, _)| path.ends_with(method)).unwrap().1;
        let channel = if who == "N" { node } else { admin };
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
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let stranger = admin_identity(&folder.path("admin")).unwrap();
    // In TLS 1.3 a client learns of the refusal with its first read.
    if let Ok(channel) = cell.channel_as(stranger, 1).await {
        for path in ["/ambit.v1.Membership/Status", "/ambit.v1.NodeAttestation/Begin", "/grpc.health.v1.Health/Check"] {
            let status = call(&channel, path).await.unwrap_err();
            assert!(status.metadata().get("ambit-code").is_none(), "{path} was answered: {status:?}");
        }
    }
}
