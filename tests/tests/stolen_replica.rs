//! A thief has the machine of one of three replicas, with all of its keys, and serves in its place: a cell's peers believe no
//! more of it than a majority of the replicas signs.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says that it failed by panicking")]

use ambit_identity::record::Listed;
use ambit_identity::tls::{Clients, server_config};
use ambit_identity::{Expect, RecordKey, SharedTrust, Trust};
use ambit_model::policy::{Action, Peers, Policy};
use ambit_model::record::{Claim, Head, Kind, Record};
use ambit_proto::status::from_status;
use ambit_proto::v1;
use ambit_proto::v1::co_signer_client::CoSignerClient;
use ambit_proto::v1::peer_link_client::PeerLinkClient;
use ambit_proto::v1::peer_link_server::{PeerLink, PeerLinkServer};
use ambit_tests::cell::{Cell, fresh};
use ambit_tests::peering::{peer, replica_identity};
use ambit_transport::{Dialer, Identity};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tonic::{Request, Response, Status};

const PATIENCE: Duration = Duration::from_secs(40);

fn policy(name: &str, port: u16) -> String {
    format!(
        "kind: Policy\nmetadata: {{name: {name}}}\nspec:\n  target: spiffe://west/db\n  action: allow\n  \
         from: [spiffe://east/web]\n  ports: [{port}]\n"
    )
}

async fn apply(cell: &Cell, number: usize, yaml: &str) {
    let until = Instant::now() + PATIENCE;
    let request = v1::ApplyRequest { request_id: fresh(), yaml: yaml.into(), ..Default::default() };
    loop {
        let mut policies = v1::policy_registry_client::PolicyRegistryClient::new(cell.admin(number).await.unwrap());
        match policies.apply(request.clone()).await {
            Ok(_) => return,
            Err(status) => assert!(Instant::now() < until, "{status:?}"),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn names(cell: &Cell) -> Vec<String> {
    let mut policies = v1::policy_registry_client::PolicyRegistryClient::new(cell.admin(1).await.unwrap());
    let all = policies.list(v1::ListPoliciesRequest {}).await.unwrap().into_inner().policies;
    all.into_iter().map(|policy| policy.name).collect()
}

async fn west_at(east: &Cell) -> v1::Peer {
    let mut registry = v1::cluster_registry_client::ClusterRegistryClient::new(east.admin(1).await.unwrap());
    registry.list_peers(v1::ListPeersRequest {}).await.unwrap().into_inner().peers.pop().unwrap()
}

/// East suspends west and approves it again: it begins with the first address that it was told.
async fn asked_anew(east: &Cell, west: &Cell) {
    let mut registry = v1::cluster_registry_client::ClusterRegistryClient::new(east.admin(1).await.unwrap());
    let west_there = || west.trust_domain.to_string();
    registry.suspend_peer(v1::PeerRef { request_id: fresh(), trust_domain: west_there() }).await.unwrap();
    tokio::time::sleep(Duration::from_millis(500)).await;
    let fingerprint = hex::encode(west.fingerprint);
    let approve = v1::ApprovePeerRequest { request_id: fresh(), trust_domain: west_there(), fingerprint };
    registry.approve_peer(approve).await.unwrap();
}

async fn until(what: &str, mut good: impl AsyncFnMut() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !good().await {
        assert!(Instant::now() < until, "{what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// What the thief has, and how often it told its story.
#[derive(Clone)]
struct Thief {
    key: Arc<RecordKey>,
    honest: tonic::transport::Channel,
    told: Arc<AtomicUsize>,
}

/// The true answer and one record more, under a claim to be the end.
fn longer(mut answer: v1::PullResponse, nonce: &[u8]) -> (v1::PullResponse, Claim) {
    let claim: Claim = postcard::from_bytes(&answer.claim).unwrap();
    let forged = Policy {
        name: "forged".parse().unwrap(),
        target: Peers::Id("spiffe://west/db".parse().unwrap()),
        action: Action::Allow,
        from: vec![Peers::Domain("east".parse().unwrap())],
        ports: vec![1],
        extras: Default::default(),
    };
    let record = Record {
        origin: claim.head.origin.clone(),
        epoch: claim.head.epoch,
        seq: claim.head.seq + 1,
        prev_hash: claim.head.hash,
        kind: Kind::Policy,
        key: "forged".into(),
        payload: postcard::to_stdvec(&forged).unwrap(),
    };
    answer.records.push(postcard::to_stdvec(&record).unwrap());
    let nonce = nonce.try_into().unwrap();
    let head = Head { seq: record.seq, hash: record.hash(), nonce, ..claim.head };
    answer.head = postcard::to_stdvec(&head).unwrap();
    let claim = Claim { head, is_the_end: true };
    answer.claim = postcard::to_stdvec(&claim).unwrap();
    (answer, claim)
}

#[tonic::async_trait]
impl PeerLink for Thief {
    async fn hello(&self, _: Request<v1::HelloRequest>) -> Result<Response<v1::HelloResponse>, Status> {
        Err(Status::unimplemented("a thief"))
    }
    async fn prove(&self, _: Request<v1::ProveRequest>) -> Result<Response<v1::ProveResponse>, Status> {
        Err(Status::unimplemented("a thief"))
    }
    async fn cosign_audit(
        &self,
        _: Request<v1::CosignAuditRequest>,
    ) -> Result<Response<v1::CosignAuditResponse>, Status> {
        Err(Status::unimplemented("a thief"))
    }
    async fn renew_lease(&self, _: Request<v1::RenewLeaseRequest>) -> Result<Response<v1::RenewLeaseResponse>, Status> {
        Err(Status::unimplemented("a thief"))
    }
    async fn certify_standby(
        &self,
        _: Request<v1::CertifyStandbyRequest>,
    ) -> Result<Response<v1::CertifyStandbyResponse>, Status> {
        Err(Status::unimplemented("a thief"))
    }
    async fn pull(&self, request: Request<v1::PullRequest>) -> Result<Response<v1::PullResponse>, Status> {
        let request = request.into_inner();
        let answer = PeerLinkClient::new(self.honest.clone()).pull(request.clone()).await?.into_inner();
        let (mut answer, claim) = longer(answer, &request.nonce);
        // Its one key, under whatever place: as its own, as the others', and alone as releases before did.
        let sign = |at| v1::CoSignature { key_index: at, signature: self.key.sign_claim(&claim) };
        answer.cosignatures = (0..3).map(sign).collect();
        answer.signature = self.key.sign_head(&claim.head);
        self.told.fetch_add(1, Ordering::Relaxed);
        Ok(Response::new(answer))
    }
}

async fn dial(cell: &Cell, identity: Identity, number: usize) -> tonic::transport::Channel {
    let trust = SharedTrust::new(Trust::Pinned(cell.trust_domain.clone(), cell.fingerprint));
    let dialer = Dialer::new(trust, identity);
    dialer.channel(cell.address(number).unwrap(), Expect::ReplicaOf(cell.trust_domain.clone())).await.unwrap()
}

async fn steal(west: &Cell, east: &Cell, at: SocketAddr) -> (Thief, tokio::task::JoinHandle<()>) {
    let der = std::fs::read(west.seat_of(1).unwrap().data.join("identity/record.key")).unwrap();
    let honest = dial(west, replica_identity(east, 1).unwrap(), 2).await;
    let key = Arc::new(RecordKey::from_pkcs8(&der).unwrap());
    let thief = Thief { key, honest, told: Arc::default() };
    let trust = SharedTrust::new(Trust::Pinned(east.trust_domain.clone(), east.fingerprint));
    let resolver = replica_identity(west, 1).unwrap().resolver();
    let config = server_config(trust.clone(), Clients::MayBeAnonymous, resolver, &[b"h2"]).unwrap();
    let listener = tokio::net::TcpListener::bind(at).await.unwrap();
    let router = tonic::transport::Server::builder().add_service(PeerLinkServer::new(thief.clone()));
    let task = tokio::spawn(async move {
        ambit_transport::serve(listener, config, trust, router, std::future::pending()).await.unwrap();
    });
    (thief, task)
}

/// An honest pull through the second replica, as east.
async fn pulled(west: &Cell, east: &Cell) -> v1::PullResponse {
    let channel = dial(west, replica_identity(east, 1).unwrap(), 2).await;
    let pull = v1::PullRequest { after_seq: 0, nonce: vec![7; 16], limit: 1_000, ..Default::default() };
    PeerLinkClient::new(channel).pull(pull).await.map_err(|s| from_status(&s)).unwrap().into_inner()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_stolen_replica_of_three_forges_nothing_and_stops_nothing() {
    let (west, east) = tokio::join!(Cell::start("west", 3), Cell::start("east", 1));
    let (mut west, east) = (west.unwrap(), east.unwrap());
    until("the key set says who votes", async || {
        let set = pulled_set(&west).await;
        set.is_some_and(|listed| (listed.voters.len(), listed.others.len()) == (3, 0))
    })
    .await;
    peer(&west, &east).await.unwrap();
    apply(&west, 2, &policy("before", 8080)).await;
    until("what west wrote", async || names(&east).await.contains(&"before".into())).await;
    voters_sign_nothing_that_nobody_decided(&west, &east).await;

    // From here on the first replica, which east was told of first, is the thief's.
    west.kill(1).unwrap();
    let (thief, task) = steal(&west, &east, west.address(1).unwrap()).await;
    asked_anew(&east, &west).await;
    until("the thief told its story", async || thief.told.load(Ordering::Relaxed) > 0).await;
    apply(&west, 2, &policy("after", 8081)).await;
    until("what the others signed since", async || names(&east).await.contains(&"after".into())).await;
    let told = thief.told.load(Ordering::Relaxed);
    until("the honest replicas are heard", async || west_at(&east).await.age_ms < 2_500).await;
    let west_there = west_at(&east).await;
    assert_eq!((west_there.state.as_str(), west_there.trouble.as_str()), ("active", ""), "{west_there:?}");
    assert!(!names(&east).await.contains(&"forged".into()));
    let log = std::fs::read_to_string(&east.seat_of(1).unwrap().log).unwrap();
    assert!(log.contains("record_signature") && log.contains("signatures of 2 of its 3 voters"), "{log}");
    println!("the thief told its story {told} times");

    // A majority that is away signs nothing: what is known of west grows old, and no older history is told.
    west.kill(3).unwrap();
    until("west ages", async || west_at(&east).await.age_ms > 4_000).await;
    assert!(!names(&east).await.contains(&"forged".into()));
    task.abort();
}

/// Who votes, as the second replica tells it.
async fn pulled_set(west: &Cell) -> Option<Listed> {
    let channel = west.admin(2).await.ok()?;
    let request = v1::SealReportRequest { request_id: fresh(), drill: "who votes".into(), report_sha256: vec![1; 32] };
    let sealed = v1::drill_client::DrillClient::new(channel).seal_report(request).await.ok()?.into_inner();
    Listed::read(&sealed.key_set?.statement)
}

/// The thief asks the others, as the replica that it stole, to sign its story: neither does. Of what is true both sign.
async fn voters_sign_nothing_that_nobody_decided(west: &Cell, east: &Cell) {
    let honest = pulled(west, east).await;
    let truth: Claim = postcard::from_bytes(&honest.claim).unwrap();
    let (_, forged) = longer(honest.clone(), &[7; 16]);
    let short = |is_the_end| {
        let last: Record = postcard::from_bytes(&honest.records[honest.records.len() - 2]).unwrap();
        // A pull of its own: nobody heard of it before.
        let nonce = [if is_the_end { 9 } else { 8 }; 16];
        Claim { head: Head { seq: last.seq, hash: last.hash(), nonce, ..truth.head.clone() }, is_the_end }
    };
    let moved = Claim { head: Head { epoch: 9, ..truth.head.clone() }, ..truth.clone() };
    for number in [2, 3] {
        let ask = async |claim: &Claim| {
            let channel = dial(west, replica_identity(west, 1).unwrap(), number).await;
            let claim = postcard::to_stdvec(claim).unwrap();
            let answer = CoSignerClient::new(channel).co_sign(v1::CoSignRequest { claim }).await;
            answer.map(Response::into_inner).map_err(|status| from_status(&status).code.as_str())
        };
        assert_eq!(ask(&truth).await.unwrap().floor, 0);
        assert!(!ask(&truth).await.unwrap().signature.is_empty());
        assert!(!ask(&short(false)).await.unwrap().signature.is_empty(), "a part is signed as a part");
        let hidden = ask(&short(true)).await.unwrap();
        assert_eq!((hidden.signature, hidden.floor), (Vec::new(), truth.head.seq), "a part is no end");
        assert_eq!(ask(&forged).await.unwrap_err(), "unavailable", "beyond what is applied");
        assert_eq!(ask(&moved).await.unwrap_err(), "record_signature");
        let other = Claim { head: Head { hash: [9; 32], ..truth.head.clone() }, ..truth.clone() };
        assert_eq!(ask(&other).await.unwrap_err(), "record_signature");
    }
    // Nobody but a replica of the cell is answered at all.
    let foreign = dial(west, replica_identity(east, 1).unwrap(), 2).await;
    let claim = postcard::to_stdvec(&truth).unwrap();
    let refused = CoSignerClient::new(foreign).co_sign(v1::CoSignRequest { claim }).await.unwrap_err();
    assert_eq!(from_status(&refused).code.as_str(), "permission_denied");
}
