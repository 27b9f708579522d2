//! Two cells of real replicas become peers: what each side refuses, and what crosses once both approved.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says that it failed by panicking")]

use ambit_model::Refusal;
use ambit_proto::status::from_status;
use ambit_proto::v1;
use ambit_proto::v1::cluster_registry_client::ClusterRegistryClient;
use ambit_proto::v1::policy_registry_client::PolicyRegistryClient;
use ambit_tests::cell::{Cell, fresh, refusal};
use ambit_tests::contexts::ambit;
use ambit_tests::machine::{Lies, Machine, join_token, node_identity, register_cluster};
use ambit_tests::operator::create_entry;
use ambit_tests::tpm::Maker;
use std::io::Write;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use tonic::transport::Channel;

const PATIENCE: Duration = Duration::from_secs(15);
/// A policy change reaches the other cell within this (issue A asks for 500 ms to the kernel; this is a debug build).
const IMPORT_MAX: Duration = Duration::from_secs(2);

async fn registry(cell: &Cell) -> ClusterRegistryClient<Channel> {
    ClusterRegistryClient::new(cell.admin(1).await.unwrap())
}

/// A token with which `td`, expected under `fingerprint`, may register at `cell`.
async fn token(cell: &Cell, td: &str, fingerprint: &[u8; 32]) -> String {
    let request = v1::CreateClusterTokenRequest {
        request_id: fresh(),
        trust_domain: td.into(),
        fingerprint: hex::encode(fingerprint),
        ttl_seconds: 60,
    };
    let answer = registry(cell).await.create_cluster_token(request).await.unwrap().into_inner();
    assert_eq!(answer.fingerprint, hex::encode(cell.fingerprint));
    answer.token
}

async fn register(from: &Cell, to: &Cell, td: &str, fingerprint: &[u8; 32], token: &str) -> Result<v1::Peer, Refusal> {
    let request = v1::RegisterPeerRequest {
        request_id: fresh(),
        addresses: vec![to.address(1).unwrap().to_string()],
        trust_domain: td.into(),
        fingerprint: hex::encode(fingerprint),
        token: token.into(),
    };
    let until = Instant::now() + PATIENCE;
    loop {
        let answer = registry(from).await.register_peer(request.clone()).await;
        match answer.map(|a| a.into_inner()).map_err(|s| from_status(&s)) {
            // A cell seals its sessions with a ticket key, which it makes within a second of its founding.
            Err(r) if r.expected.contains("ticket key") && Instant::now() < until => {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            outcome => return outcome,
        }
    }
}

async fn approve(cell: &Cell, td: &str, fingerprint: &[u8; 32]) -> Result<v1::Peer, Refusal> {
    let fingerprint = hex::encode(fingerprint);
    let request = v1::ApprovePeerRequest { request_id: fresh(), trust_domain: td.into(), fingerprint };
    let answer = registry(cell).await.approve_peer(request).await;
    answer.map(|a| a.into_inner()).map_err(|s| from_status(&s))
}

async fn peer(cell: &Cell) -> Option<v1::Peer> {
    registry(cell).await.list_peers(v1::ListPeersRequest {}).await.unwrap().into_inner().peers.pop()
}

async fn apply(cell: &Cell, yaml: &str) -> v1::ApplyResponse {
    let mut policies = PolicyRegistryClient::new(cell.admin(1).await.unwrap());
    let request = v1::ApplyRequest { request_id: fresh(), yaml: yaml.into(), ..Default::default() };
    policies.apply(request).await.unwrap().into_inner()
}

async fn listing(cell: &Cell) -> v1::ListPoliciesResponse {
    let mut policies = PolicyRegistryClient::new(cell.admin(1).await.unwrap());
    policies.list(v1::ListPoliciesRequest {}).await.unwrap().into_inner()
}

async fn until(cell: &Cell, what: &str, good: impl Fn(&v1::ListPoliciesResponse) -> bool) -> Duration {
    let started = Instant::now();
    loop {
        let now = listing(cell).await;
        if good(&now) {
            return started.elapsed();
        }
        assert!(started.elapsed() < PATIENCE, "{what}: {now:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn code<T: std::fmt::Debug>(outcome: Result<T, Refusal>) -> &'static str {
    outcome.unwrap_err().code.as_str()
}

const ALLOW: &str = "kind: Policy\nmetadata: {name: web-to-db}\nspec:\n  target: spiffe://west/db\n  action: allow\n  \
                     from: [spiffe://east/web]\n  ports: [8080]\n";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cells_meet_by_token_and_proof_and_share_only_once_both_approved() {
    let (west, east) = tokio::join!(Cell::start("west", 1), Cell::start("east", 1));
    let (west, east) = (west.unwrap(), east.unwrap());
    // What names an unregistered trust domain is accepted, shown as unresolved, and allows nothing.
    let applied = apply(&west, ALLOW).await;
    assert_eq!(applied.objects[0].unresolved, ["east"]);

    // Registration: east calls west with a token that west made.
    let good = token(&west, "east", &east.fingerprint).await;
    let wrong_print = token(&west, "east", &[7; 32]).await;
    let wrong_domain = token(&west, "north", &east.fingerprint).await;
    let w = &west.fingerprint;
    assert_eq!(code(register(&east, &west, "west", w, "cluster-unknown").await), "cluster_token_invalid");
    assert_eq!(code(register(&east, &west, "west", w, &wrong_print).await), "cluster_token_invalid");
    assert_eq!(code(register(&east, &west, "west", w, &wrong_domain).await), "cluster_token_invalid");
    assert_eq!(code(register(&east, &west, "west", &[9; 32], &good).await), "fingerprint_mismatch");
    let other_name = register(&east, &west, "south", w, &good).await.unwrap_err();
    assert!(other_name.found.contains("an identity of south"), "{other_name}");
    assert!(peer(&west).await.is_none() && peer(&east).await.is_none(), "a refused registration leaves nothing");
    let registered = register(&east, &west, "west", w, &good).await.unwrap();
    assert_eq!((registered.state.as_str(), registered.fingerprint), ("pending", hex::encode(w)));
    assert_eq!(code(register(&east, &west, "west", w, &good).await), "cluster_token_used");

    // Approval, on both sides, of the very fingerprint.
    assert_eq!(code(approve(&west, "east", &[1; 32]).await), "fingerprint_mismatch");
    assert_eq!(code(approve(&west, "north", &east.fingerprint).await), "not_found");
    approve(&east, "west", w).await.unwrap();
    tokio::time::sleep(Duration::from_millis(700)).await;
    assert_eq!(peer(&west).await.unwrap().state, "pending");
    assert!(listing(&east).await.policies.is_empty(), "nothing crosses before both approved");
    approve(&west, "east", &east.fingerprint).await.unwrap();

    // What west wrote before is imported, under west's name, and resolved on both sides now.
    until(&east, "west's policy at east", |l| l.policies.iter().any(|p| p.origin == "west" && p.resolved)).await;
    until(&west, "resolved at west", |l| l.policies.iter().all(|p| p.resolved)).await;
    for cell in [&west, &east] {
        let started = Instant::now();
        while peer(cell).await.unwrap().state != "active" {
            assert!(started.elapsed() < PATIENCE, "{:?}", peer(cell).await);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    peers_administrators_are_nobody(&west, &east).await;
    changes_follow(&west, &east).await;
    endpoints_follow(&west, &east).await;
    trust_ends_and_begins_again(&west, &east).await;
    promtool_accepts(&west);
    promtool_accepts(&east);
}

async fn befriend(west: &Cell, east: &Cell) {
    let token = token(west, "east", &east.fingerprint).await;
    register(east, west, "west", &west.fingerprint, &token).await.unwrap();
    approve(east, "west", &west.fingerprint).await.unwrap();
    approve(west, "east", &east.fingerprint).await.unwrap();
}

/// West's only replica and its folder are gone; it comes back from the backup, in its old place.
fn lose_and_restore(west: &mut Cell, backup: &str, root_key: &str, past_epoch: &str) {
    west.kill(1).unwrap();
    let (seat, admin) = (west.seat_of(1).unwrap(), west.file(&format!("admin-past-{past_epoch}")));
    std::fs::remove_dir_all(&seat.data).unwrap();
    let (print, out) = (hex::encode(west.fingerprint), admin.display().to_string());
    let who = ["--trust-domain", "west", "--fingerprint", &print, "--past-epoch", past_epoch];
    let what = ["--snapshot", backup, "--root-key", root_key, "--admin-out", &out];
    let restored = seat.ambitd("restore", &[&who[..], &what[..]].concat()).unwrap();
    assert!(restored.status.success(), "{}", String::from_utf8_lossy(&restored.stderr));
    west.administered_by(&admin).unwrap();
    west.restart(1).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restored_cell_is_heard_again_and_stopped_where_it_forgot_what_was_imported() {
    let (west, east) = tokio::join!(Cell::start("west", 1), Cell::start("east", 1));
    let (mut west, east) = (west.unwrap(), east.unwrap());
    befriend(&west, &east).await;
    apply(&west, ALLOW).await;
    until(&east, "west's policy", |l| l.policies.iter().any(|p| p.ports == [8080])).await;
    let (backup, root_key) = (west.file("backup").display().to_string(), west.file("kept.key").display().to_string());
    let (ambit, context) = (ambit_tests::process::binary("ambit").unwrap(), west.admin_file("context.json"));
    let (ambit, context) = (ambit.display().to_string(), context.display().to_string());
    ambit_tests::process::must_run(&[&ambit, "--context", &context, "raft", "snapshot", "--out", &backup]).unwrap();
    std::fs::copy(west.seat_of(1).unwrap().data.join("identity/root.key"), &root_key).unwrap();

    lose_and_restore(&mut west, &backup, &root_key, "0");
    west.wait_for_voters().await.unwrap();
    assert_eq!(west.status(1).await.unwrap().epoch, 2);
    apply(&west, &ALLOW.replace("[8080]", "[8081]")).await;
    let took = until(&east, "what west says since", |l| l.policies.iter().any(|p| p.ports == [8081])).await;
    println!("heard again {took:?} after the first write");

    // The same backup once more: it knows nothing of what east has imported since.
    lose_and_restore(&mut west, &backup, &root_key, "2");
    west.wait_for_voters().await.unwrap();
    assert_eq!(west.status(1).await.unwrap().epoch, 3);
    let started = Instant::now();
    let stopped = loop {
        match peer(&east).await {
            Some(p) if p.state == "stopped" => break p,
            other => assert!(started.elapsed() < PATIENCE, "{other:?}"),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    assert!(stopped.trouble.contains("began anew") || stopped.trouble.contains("record_equivocation"), "{stopped:?}");
    println!("stopped: {}", stopped.trouble);
    assert!(listing(&east).await.policies.iter().any(|p| p.ports == [8081]), "what was imported stays");

    // An operator who looked into it begins anew with it.
    said(&east, &["suspend", "west"], 0, &["suspended"]);
    said(&east, &["remove", "west"], 0, &[]);
    befriend(&west, &east).await;
    until(&east, "what west says now", |l| l.policies.iter().any(|p| p.ports == [8080])).await;
}

/// What `ambit peer` says at the cell.
fn said(cell: &Cell, args: &[&str], code: i32, words: &[&str]) {
    let context = cell.admin_file("context.json").display().to_string();
    let out = ambit(&context, &[&["peer"], args].concat());
    let said = String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned();
    println!("$ ambit peer {}\n{said}", args.join(" "));
    assert_eq!(out.status.code(), Some(code), "{args:?}: {said}");
    words.iter().for_each(|word| assert!(said.contains(word), "{args:?}: '{word}' is missing in: {said}"));
}

/// West suspends east: nobody of it gets in or is called, and nothing is told to it. Approved again, or removed and registered
/// anew, it is as before.
async fn trust_ends_and_begins_again(west: &Cell, east: &Cell) {
    apply(west, ALLOW).await;
    until(east, "a policy", |l| l.policies.iter().any(|p| p.ports == [8080])).await;
    let print = hex::encode(east.fingerprint);
    said(west, &["remove", "east"], 5, &["error[peer_active]", "ambit peer suspend"]);
    said(west, &["suspend", "east"], 0, &["suspended by", "approve east --fingerprint", &print]);
    said(west, &["suspend", "north"], 1, &["error[not_found]"]);
    assert!(listing(west).await.policies.iter().all(|p| !p.resolved), "nobody of east is known");
    // Its administrator, whom west knew by its bundle and gave nothing, is not even answered.
    let started = Instant::now();
    loop {
        let foreign = west.channel_as(east.admin_identity().unwrap(), 1).await;
        let Ok(channel) = foreign else { break };
        let listed = ClusterRegistryClient::new(channel).list_peers(v1::ListPeersRequest {}).await.unwrap_err();
        if listed.code() != tonic::Code::PermissionDenied {
            println!("{listed:?}");
            break;
        }
        assert!(started.elapsed() < PATIENCE, "a certificate of a suspended peer is still known: {listed:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    apply(west, &ALLOW.replace("[8080]", "[8082]")).await;
    tokio::time::sleep(IMPORT_MAX).await;
    assert!(listing(east).await.policies.iter().all(|p| p.ports == [8080]), "a suspended peer is told nothing");

    said(west, &["approve", "east", "--fingerprint", &print], 0, &["active"]);
    until(east, "what it missed", |l| l.policies.iter().any(|p| p.ports == [8082])).await;

    for (cell, other) in [(west, "east"), (east, "west")] {
        said(cell, &["suspend", other], 0, &["suspended"]);
        said(cell, &["remove", other], 0, &["suspended"]);
        said(cell, &["list"], 0, &["0 peers"]);
    }
    assert!(listing(east).await.policies.is_empty(), "what a removed peer said is gone");
    befriend(west, east).await;
    until(east, "all that there is", |l| l.policies.iter().any(|p| p.ports == [8082] && p.resolved)).await;
}

/// East's bundle lets its certificates through west's handshake; its administrator may call nothing there.
async fn peers_administrators_are_nobody(west: &Cell, east: &Cell) {
    let foreign = west.channel_as(east.admin_identity().unwrap(), 1).await.unwrap();
    let listed = ClusterRegistryClient::new(foreign.clone()).list_peers(v1::ListPeersRequest {}).await;
    assert_eq!(refusal(listed).unwrap().code.as_str(), "permission_denied");
    let pull = v1::PullRequest { after_seq: 0, nonce: vec![1; 16], limit: 1, ..Default::default() };
    let pulled = v1::peer_link_client::PeerLinkClient::new(foreign).pull(pull).await;
    assert_eq!(refusal(pulled).unwrap().code.as_str(), "permission_denied");
}

async fn changes_follow(west: &Cell, east: &Cell) {
    apply(west, &ALLOW.replace("[8080]", "[8081]")).await;
    let took = until(east, "a changed policy", |l| l.policies.iter().any(|p| p.ports == [8081])).await;
    println!("policy change at west seen at east after {took:?}");
    assert!(took < IMPORT_MAX, "{took:?}");
    let request = v1::DeletePolicyRequest {
        request_id: fresh(),
        kind: "Policy".into(),
        name: "web-to-db".into(),
        ..Default::default()
    };
    PolicyRegistryClient::new(west.admin(1).await.unwrap()).delete(request).await.unwrap();
    until(east, "a deleted policy", |l| l.policies.is_empty()).await;
}

/// A node of west reports an endpoint on its stream; east learns of it.
async fn endpoints_follow(west: &Cell, east: &Cell) {
    let maker = Maker::new().unwrap();
    let machine = Machine::new(&maker, "n1").await.unwrap();
    register_cluster(west, "west", &maker).await.unwrap();
    let join = join_token(west, "west").await.unwrap();
    let (verdict, answer) = machine.enrol(west, 1, "west", &join, &Lies::default()).await.unwrap().unwrap();
    let entry = v1::Entry {
        id: "db".into(),
        spiffe_id: "spiffe://west/db".into(),
        cluster: "west".into(),
        selectors: vec!["unix:uid:1000".into()],
        ..Default::default()
    };
    let mut entries = v1::entry_registry_client::EntryRegistryClient::new(west.admin(1).await.unwrap());
    let request = v1::BatchCreateEntryRequest { request_id: fresh(), entries: vec![entry] };
    assert_eq!(entries.batch_create_entry(request).await.unwrap().into_inner().results[0].code, "ok");

    let node = west.channel_as(node_identity(&verdict, &answer.key).unwrap(), 1).await.unwrap();
    let endpoint = v1::Endpoint {
        spiffe_id: "spiffe://west/db".into(),
        address: "10.9.1.11".into(),
        cluster: "west".into(),
        node_address: "10.9.0.21".into(),
        node: machine.node(),
        generation: verdict.generation,
    };
    use v1::agent_message::Body;
    let subscribe = Body::Subscribe(v1::Subscribe { node_address: "10.9.0.21".into(), ..v1::Subscribe::default() });
    // One that the node may not run is left out; the other and the stream stay.
    let nobody =
        v1::Endpoint { spiffe_id: "spiffe://west/nobody".into(), address: "10.9.1.12".into(), ..endpoint.clone() };
    let report = Body::Endpoints(v1::EndpointReport { endpoints: vec![nobody, endpoint.clone()] });
    let (tell, told) = tokio::sync::mpsc::channel(4);
    for body in [subscribe.clone(), report] {
        tell.send(v1::AgentMessage { body: Some(body) }).await.unwrap();
    }
    let mut stream = v1::agent_stream_client::AgentStreamClient::new(node.clone());
    let mut from_server = stream.sync(tokio_stream::wrappers::ReceiverStream::new(told)).await.unwrap().into_inner();
    let first = from_server.message().await.unwrap().unwrap();
    assert!(matches!(first.body, Some(v1::server_message::Body::Slice(_))), "{first:?}");
    until(east, "west's endpoint at east", |l| l.endpoints == [endpoint.clone()]).await;
    // An empty report takes it back.
    let none = Body::Endpoints(v1::EndpointReport { endpoints: Vec::new() });
    tell.send(v1::AgentMessage { body: Some(none) }).await.unwrap();
    until(east, "the endpoint gone", |l| l.endpoints.is_empty()).await;
    register_cluster(east, "east", &maker).await.unwrap();
    create_entry(east, "db", "east").await.unwrap();
    for cell in [west, east] {
        what_was_left_is_not_outside(cell, "10.9.1.11").await;
    }

    // A newer stream of the node ends this one, within a heartbeat or so; the newer one goes on.
    let (tell, told) = tokio::sync::mpsc::channel(4);
    tell.send(v1::AgentMessage { body: Some(subscribe) }).await.unwrap();
    let mut newer = v1::agent_stream_client::AgentStreamClient::new(node);
    let mut newer = newer.sync(tokio_stream::wrappers::ReceiverStream::new(told)).await.unwrap().into_inner();
    let ended = async { while let Ok(Some(_)) = from_server.message().await {} };
    tokio::time::timeout(Duration::from_secs(5), ended).await.expect("the older stream ends");
    for _ in 0..4 {
        newer.message().await.unwrap().unwrap();
    }
}

/// What went to it in a tunnel does not go in clear text for that, and the cell says so.
async fn what_was_left_is_not_outside(cell: &Cell, left: &str) {
    let td = &cell.trust_domain;
    let yaml = format!(
        "kind: Egress\nmetadata: {{name: out}}\n\
         spec: {{from: ['spiffe://{td}/*'], to: [10.9.0.0/16], transport: passthrough}}\n"
    );
    let mut registry = PolicyRegistryClient::new(cell.admin(1).await.unwrap());
    registry.apply(v1::ApplyRequest { request_id: fresh(), yaml, over: None, unlimited: true }).await.unwrap();
    let source = format!("spiffe://{td}/db");
    for (to, reason) in [("10.9.1.12", "allowed by egress"), (left, "a workload of the mesh had this address")] {
        let request =
            v1::ExplainRequest { source: source.clone(), destination: to.to_owned(), port: 80, ..Default::default() };
        let told = registry.explain(request).await.unwrap().into_inner();
        assert!(told.allowed == (to != left) && told.reason.contains(reason) && told.nearest.is_empty(), "{told:?}");
        let who = registry.who_can(v1::WhoCanRequest { destination: to.to_owned(), port: 80 });
        let who = who.await.unwrap().into_inner();
        assert_eq!(who.callers.iter().any(|caller| caller.spiffe_id == source), to != left, "{who:?}");
    }
}

fn promtool_accepts(cell: &Cell) {
    let page = cell.metrics_page(1).unwrap();
    let propagation = "ambit_policy_propagation_seconds";
    for family in ["ambit_raft_term", "ambit_policy_revision", propagation, "ambit_trust_bundle_age_seconds"] {
        assert!(page.contains(family), "{family} is not in:\n{page}");
    }
    let mut tool = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("promtool is installed (package prometheus; `cargo xtask deps`)");
    tool.stdin.take().unwrap().write_all(page.as_bytes()).unwrap();
    let out = tool.wait_with_output().unwrap();
    let said = [out.stdout, out.stderr].concat();
    assert!(out.status.success() && said.is_empty(), "{}", String::from_utf8_lossy(&said));
}
