//! A cell of three listeners in this process: real TLS, real certificates, the real state machine, no Raft. What the
//! replicas would agree on lies behind one lock; files in its folder make it fail on purpose.

#![allow(dead_code, reason = "each test program uses its part")]

use ambit_identity::tls::{Clients, certified, fixed, server_config};
use ambit_identity::{Csr, IssuingKey, KeySet, RecordKey, Root, SharedTrust, SvidKey, Trust, TrustStore};
use ambit_model::{Bundle, ClusterId, Code, Entry, Lifetime, RaftIndex, Refusal, Stamp, TrustDomain};
use ambit_proto::status::to_status;
use ambit_proto::v1;
use ambit_state::objects::{CellRow, KeySetRow, Member};
use ambit_state::{Applied, Command, LogEntry, Reply, State};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};
use tonic::{Request, Response, Status};

const DAY_MS: u64 = 24 * 3600 * 1000;

/// The cell and where it lives. Its folder goes with it.
pub(crate) struct FakeCell {
    pub(crate) folder: PathBuf,
    pub(crate) addresses: Vec<SocketAddr>,
    pub(crate) fingerprint: String,
    pub(crate) shared: Arc<Shared>,
}

impl Drop for FakeCell {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

pub(crate) struct Shared {
    pub(crate) folder: PathBuf,
    state: Mutex<(u64, State)>,
    root: Root,
    record: RecordKey,
    td: TrustDomain,
    pub(crate) replicas_answering: Mutex<Vec<u64>>,
    pub(crate) lose: Mutex<Vec<String>>,
}

fn now() -> Stamp {
    Stamp(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as u64)
}

impl FakeCell {
    /// Starts the cell `west` and writes its administrator's context.
    pub(crate) async fn start(name: &str) -> FakeCell {
        let folder = std::env::temp_dir().join(format!("ambit-cli-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let td: TrustDomain = "west".parse().unwrap();
        let root = Root::create(&td, now(), [9; 16]).unwrap();
        let fingerprint = hex::encode(ambit_identity::fingerprint(root.der()));
        let lifetime = Lifetime { not_before: now().minus_ms(60_000), not_after: now().plus_ms(DAY_MS) };
        let issuer = SvidKey::generate().unwrap();
        let intermediate = root.found(1, &Csr::parse(&issuer.csr().unwrap()).unwrap(), lifetime).unwrap();
        let issuer = IssuingKey::new(issuer, intermediate).unwrap();
        let record = RecordKey::generate().unwrap();
        let state = Mutex::new((1, founded(&td, &root, &record)));
        let answering = Mutex::new(vec![1, 2, 3]);
        let shared = Shared {
            folder: folder.clone(),
            state,
            record,
            td: td.clone(),
            replicas_answering: answering,
            lose: Mutex::default(),
            root,
        };
        let shared = Arc::new(shared);
        let mut addresses = Vec::new();
        for replica in 1..=3 {
            addresses.push(listen(&shared, &issuer, replica, lifetime).await);
        }
        let key = SvidKey::generate().unwrap();
        let chain = issuer.founding_admin("ops", &td, lifetime, &Csr::parse(&key.csr().unwrap()).unwrap()).unwrap();
        let pem = ambit_identity::keys::certificates_to_pem(chain.iter().map(AsRef::as_ref));
        std::fs::write(folder.join("admin.pem"), pem).unwrap();
        std::fs::write(folder.join("admin.key"), key.pem().as_str()).unwrap();
        let root_pem = ambit_identity::keys::certificates_to_pem([shared.root.der().as_ref()]);
        std::fs::write(folder.join("root.pem"), root_pem).unwrap();
        let cell = FakeCell { folder, addresses, fingerprint, shared };
        cell.write_context(&cell.addresses, &cell.fingerprint);
        cell
    }

    pub(crate) fn context(&self) -> PathBuf {
        self.folder.join("context.json")
    }
    pub(crate) fn write_context(&self, addresses: &[SocketAddr], fingerprint: &str) {
        let text = serde_json::json!({"trust_domain": "west", "fingerprint": fingerprint, "addresses": addresses});
        std::fs::write(self.context(), text.to_string()).unwrap();
    }
    pub(crate) fn entries(&self) -> usize {
        self.shared.state.lock().unwrap().1.entries().count()
    }
}

fn founded(td: &TrustDomain, root: &Root, record: &RecordKey) -> State {
    let (statement, signature) = KeySet::certify(root, td, 1, vec![record.public()]).unwrap();
    let row = CellRow::founded(td.clone(), root.der().to_vec());
    let member = Member {
        address: "127.0.0.1:1".into(),
        authority: String::new(),
        authority_not_after: now(),
        wrap_key: vec![],
        record_key: record.public(),
    };
    let west: ClusterId = "west".parse().unwrap();
    let mut state = State::new();
    let found = Command::FoundCell(row, 1, member, KeySetRow { statement, signature });
    for (at, command) in [found, Command::RegisterCluster(west, vec![], 30_000)].into_iter().enumerate() {
        let entry = LogEntry { stamp: now(), client: [0; 32], request: [at as u8 + 1; 16], command };
        state.apply(RaftIndex(at as u64), &entry).outcome.unwrap();
    }
    state
}

async fn listen(shared: &Arc<Shared>, issuer: &IssuingKey, replica: u64, lifetime: Lifetime) -> SocketAddr {
    let key = SvidKey::generate().unwrap();
    let csr = Csr::parse(&key.csr().unwrap()).unwrap();
    let mut chain = issuer.replica_leaf(replica, &shared.td, lifetime, &csr).unwrap();
    chain.push(shared.root.der().clone());
    let own = Bundle::new(shared.td.clone(), 1, vec![shared.root.der().to_vec()]);
    let trust = SharedTrust::new(Trust::Bundles(TrustStore::new(&own).unwrap()));
    let identity = fixed(certified(chain, &key).unwrap());
    let config = server_config(trust.clone(), Clients::Certified, identity, &[b"h2"]).unwrap();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let service = || Replica { shared: shared.clone(), number: replica };
    let router = tonic::transport::Server::builder()
        .add_service(v1::entry_registry_server::EntryRegistryServer::new(service()))
        .add_service(v1::cluster_registry_server::ClusterRegistryServer::new(service()))
        .add_service(v1::membership_server::MembershipServer::new(service()))
        .add_service(v1::drill_server::DrillServer::new(service()));
    tokio::spawn(ambit_transport::serve(listener, config, trust, router, std::future::pending()));
    address
}

struct Replica {
    shared: Arc<Shared>,
    number: u64,
}

impl Replica {
    /// Refuses while this replica, or the cell as a whole, is down on purpose.
    fn up(&self) -> Result<(), Status> {
        let killed = Path::exists(&self.shared.folder.join("killed"));
        if killed || !self.shared.replicas_answering.lock().unwrap().contains(&self.number) {
            return Err(to_status(&Refusal::new(Code::Unavailable, "a leader", "an election")));
        }
        Ok(())
    }
    fn apply(&self, request: &[u8], command: Command) -> Result<Applied, Status> {
        self.up()?;
        let mut held = self.shared.state.lock().unwrap();
        held.0 += 1;
        let request = request.try_into().map_err(|_| Status::invalid_argument("request id"))?;
        let entry = LogEntry { stamp: now(), client: [1; 32], request, command };
        let at = RaftIndex(held.0);
        Ok(held.1.apply(at, &entry))
    }
    fn items(&self, applied: Applied, ids: Vec<String>) -> Result<Response<v1::BatchEntryResponse>, Status> {
        let Reply::Items(items) = applied.outcome.map_err(|r| to_status(&r))? else {
            return Err(Status::internal("items"));
        };
        let status = |(id, result): (String, Result<(), Refusal>)| match result {
            Ok(()) => v1::EntryStatus { id, code: "ok".into(), message: String::new() },
            Err(r) => v1::EntryStatus { id, code: r.code.to_string(), message: r.to_string() },
        };
        let results = ids.into_iter().zip(items).map(status).collect();
        Ok(Response::new(v1::BatchEntryResponse { results, revision: applied.index.0 }))
    }
}

#[tonic::async_trait]
impl v1::entry_registry_server::EntryRegistry for Replica {
    async fn batch_create_entry(
        &self,
        request: Request<v1::BatchCreateEntryRequest>,
    ) -> Result<Response<v1::BatchEntryResponse>, Status> {
        let request = request.into_inner();
        let entries: Result<Vec<Entry>, Refusal> = request.entries.iter().map(TryInto::try_into).collect();
        let entries = entries.map_err(|r| to_status(&r))?;
        let applied = self.apply(&request.request_id, Command::CreateEntries(entries))?;
        self.items(applied, request.entries.into_iter().map(|e| e.id).collect())
    }
    async fn batch_update_entry(
        &self,
        _: Request<v1::BatchUpdateEntryRequest>,
    ) -> Result<Response<v1::BatchEntryResponse>, Status> {
        Err(Status::unimplemented("no test asks"))
    }
    async fn batch_delete_entry(
        &self,
        request: Request<v1::BatchDeleteEntryRequest>,
    ) -> Result<Response<v1::BatchEntryResponse>, Status> {
        let request = request.into_inner();
        let ids: Vec<String> = request.items.into_iter().map(|item| item.id).collect();
        let parsed = ids.iter().map(|id| id.parse().unwrap()).collect();
        let applied = self.apply(&request.request_id, Command::DeleteEntries(parsed))?;
        self.items(applied, ids)
    }
    async fn list_entries(
        &self,
        _: Request<v1::ListEntriesRequest>,
    ) -> Result<Response<v1::ListEntriesResponse>, Status> {
        self.up()?;
        let lose = self.shared.lose.lock().unwrap().clone();
        let held = self.shared.state.lock().unwrap();
        let kept = held.1.entries().filter(|e| !lose.iter().any(|end| e.entry.id.as_str().ends_with(end)));
        Ok(Response::new(v1::ListEntriesResponse {
            entries: kept.map(|e| (&e.entry).into()).collect(),
            next_after_id: String::new(),
        }))
    }
    async fn get_entry(&self, _: Request<v1::GetEntryRequest>) -> Result<Response<v1::Entry>, Status> {
        Err(to_status(&Refusal::new(Code::Unimplemented, "", "")))
    }
}

#[tonic::async_trait]
impl v1::drill_server::Drill for Replica {
    async fn seal_report(
        &self,
        request: Request<v1::SealReportRequest>,
    ) -> Result<Response<v1::SealReportResponse>, Status> {
        let request = request.into_inner();
        let digest = request.report_sha256.as_slice().try_into().map_err(|_| Status::invalid_argument("digest"))?;
        let applied = self.apply(&request.request_id, Command::SealReport(request.drill, digest))?;
        let committed = applied.into_report().map_err(|r| to_status(&r))?;
        let (statement, signature) = self.shared.record.sign_report(&self.shared.td, &committed).unwrap();
        let (keys, by_root) =
            KeySet::certify(&self.shared.root, &self.shared.td, 1, vec![self.shared.record.public()]).unwrap();
        Ok(Response::new(v1::SealReportResponse {
            statement,
            signature,
            key_index: 0,
            key_set: Some(v1::KeySet { statement: keys, signature: by_root }),
            root_der: self.shared.root.der().to_vec(),
        }))
    }
    async fn list_reports(
        &self,
        _: Request<v1::ListReportsRequest>,
    ) -> Result<Response<v1::ListReportsResponse>, Status> {
        Err(to_status(&Refusal::new(Code::Unimplemented, "", "")))
    }
    async fn run_drill(&self, _: Request<v1::DrillUnbuilt>) -> Result<Response<v1::DrillUnbuilt>, Status> {
        Err(to_status(&Refusal::new(Code::Unimplemented, "", "")))
    }
}

/// Methods that no test here needs.
macro_rules! unbuilt {
    ($($method:ident($request:ident) -> $reply:ident;)*) => {$(
        fn $method<'a, 'b>(&'a self, _: Request<v1::$request>) -> std::pin::Pin<Box<
            dyn std::future::Future<Output = Result<Response<v1::$reply>, Status>> + Send + 'b>>
        where 'a: 'b, Self: 'b {
            Box::pin(async { Err(to_status(&Refusal::new(Code::Unimplemented, "", ""))) })
        }
    )*};
}

#[tonic::async_trait]
impl v1::membership_server::Membership for Replica {
    async fn status(&self, _: Request<v1::StatusRequest>) -> Result<Response<v1::StatusResponse>, Status> {
        self.up()?;
        let member = |id| v1::Member { id, voter: true, role: "voter".into(), ..Default::default() };
        Ok(Response::new(v1::StatusResponse {
            trust_domain: "west".into(),
            replica: self.number,
            leader: 1,
            term: 1,
            members: (1..=3).map(member).collect(),
            ..Default::default()
        }))
    }
    type BackupStream = tokio_stream::Empty<Result<v1::BackupPiece, Status>>;
    async fn backup(&self, _: Request<v1::BackupRequest>) -> Result<Response<Self::BackupStream>, Status> {
        Err(to_status(&Refusal::new(Code::Unimplemented, "", "")))
    }
    unbuilt! {
        create_replica_token(CreateReplicaTokenRequest) -> CreateReplicaTokenResponse;
        replica_join(ReplicaJoinRequest) -> ReplicaJoinResponse;
        promote(PromoteRequest) -> StatusResponse;
        transfer_leader(TransferLeaderRequest) -> StatusResponse;
        remove_voter(RemoveVoterRequest) -> StatusResponse;
        snapshot(SnapshotRequest) -> SnapshotResponse;
        renew_authority(RenewAuthorityRequest) -> RenewAuthorityResponse;
        require_attested_replicas(RequireAttestedReplicasRequest) -> StatusResponse;
    }
}

#[tonic::async_trait]
impl v1::cluster_registry_server::ClusterRegistry for Replica {
    async fn list_clusters(
        &self,
        _: Request<v1::ListClustersRequest>,
    ) -> Result<Response<v1::ListClustersResponse>, Status> {
        self.up()?;
        let west = v1::Cluster {
            name: "west".into(),
            trust_domain: "west".into(),
            home: "west".into(),
            state: "active".into(),
            nodes: 2,
            ..Default::default()
        };
        Ok(Response::new(v1::ListClustersResponse { clusters: vec![west] }))
    }
    unbuilt! {
        register_cluster(RegisterClusterRequest) -> Cluster;
        create_cluster_token(CreateClusterTokenRequest) -> CreateClusterTokenResponse;
        register_peer(RegisterPeerRequest) -> Peer;
        approve_peer(ApprovePeerRequest) -> Peer;
        list_peers(ListPeersRequest) -> ListPeersResponse;
        suspend_peer(PeerRef) -> Peer;
        remove_peer(RemovePeerRequest) -> Peer;
        list_standbys(ListStandbysRequest) -> ListStandbysResponse;
        name_standby(NameStandbyRequest) -> ListStandbysResponse;
        commit_grant(CommitGrantRequest) -> ListStandbysResponse;
        release_grant(HomeRequest) -> ListStandbysResponse;
        take_back(HomeRequest) -> ListStandbysResponse;
        judge_late(JudgeLateRequest) -> ListStandbysResponse;
    }
}
