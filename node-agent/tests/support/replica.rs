//! A replica whose answers the test dictates: real gRPC over real mutual TLS, real leaves, no state but the test's.

use super::Cell;
use ambit_identity::tls::{Clients, fixed, server_config};
use ambit_identity::{SharedTrust, Trust, TrustStore};
use ambit_model::{Code, Refusal};
use ambit_proto::status::to_status;
use ambit_proto::v1;
use ambit_proto::v1::agent_message::Body as Up;
use ambit_proto::v1::agent_stream_server::{AgentStream, AgentStreamServer};
use ambit_proto::v1::node_attestation_server::{NodeAttestation, NodeAttestationServer};
use ambit_proto::v1::server_message::Body as Down;
use ambit_transport::Caller;
use ambit_verify::Public;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

const SOON: Duration = Duration::from_secs(20);

/// One stream of an agent, in the test's hands.
pub(crate) struct Stream {
    down: mpsc::Sender<Result<v1::ServerMessage, Status>>,
    up: Streaming<v1::AgentMessage>,
    /// The generation in the leaf that opened it.
    pub(crate) generation: u64,
    /// What it began with.
    pub(crate) hello: v1::Subscribe,
}

impl Stream {
    pub(crate) async fn send(&self, body: Down) {
        self.down.send(Ok(v1::ServerMessage { body: Some(body) })).await.expect("an open stream");
    }
    pub(crate) async fn beat(&self) {
        let now = super::now().0;
        self.send(Down::Heartbeat(v1::Heartbeat { stamp_ms: now, revision: 0, committed_ms: now })).await;
    }
    pub(crate) async fn end(self, code: Code) {
        self.down.send(Err(to_status(&Refusal::new(code, "", "")))).await.expect("an open stream");
    }
    /// The next message up, with heartbeats down meanwhile.
    pub(crate) async fn next(&mut self) -> Up {
        let until = Instant::now() + SOON;
        while Instant::now() < until {
            match timeout(Duration::from_secs(1), self.up.message()).await {
                Ok(message) => return message.unwrap().expect("an open stream").body.unwrap(),
                Err(_) => self.beat().await,
            }
        }
        panic!("no message of the agent");
    }
    /// The next quote, and what came before it.
    pub(crate) async fn quote(&mut self) -> (v1::QuoteAnswer, Vec<Up>) {
        let mut before = Vec::new();
        loop {
            match self.next().await {
                Up::Quote(quote) => return (quote, before),
                other => before.push(other),
            }
        }
    }
    /// The bytes that follow a quote: nothing may come between.
    pub(crate) async fn logs(&mut self, quote: &v1::QuoteAnswer) -> (Vec<u8>, Vec<u8>) {
        let mut bytes = Vec::new();
        while (bytes.len() as u64) < quote.boot_log_len + quote.ima_log_len {
            match self.next().await {
                Up::LogChunk(chunk) => {
                    assert!(!chunk.is_empty() && chunk.len() <= 64 * 1024);
                    bytes.extend(chunk);
                }
                other => panic!("{other:?} among the log's bytes"),
            }
        }
        let ima = bytes.split_off(usize::try_from(quote.boot_log_len).unwrap());
        (bytes, ima)
    }
}

struct Inner {
    cell: Cell,
    nonce: u8,
    /// What the cell says to whoever comes.
    refuses: Option<Code>,
    /// Calls of Begin, by when they came.
    begun: Vec<Instant>,
}

/// The replica. It ends with the test's runtime.
#[derive(Clone)]
pub(crate) struct Replica {
    pub(crate) address: SocketAddr,
    inner: Arc<Mutex<Inner>>,
    /// For tpm2_makecredential's files.
    dir: PathBuf,
    streams: mpsc::Sender<Stream>,
    /// Evidence waits for its verdict while this is true.
    holds: Arc<watch::Sender<bool>>,
    /// How often evidence came.
    evidence: Arc<watch::Sender<u32>>,
}

impl Replica {
    pub(crate) async fn start(cell: Cell, dir: PathBuf) -> (Replica, mpsc::Receiver<Stream>) {
        let own = cell.view(cell.slice(0, &[])).own.clone();
        let trust = SharedTrust::new(Trust::Bundles(TrustStore::new(&own).unwrap()));
        let config = server_config(trust.clone(), Clients::MayBeAnonymous, fixed(cell.replica()), &[b"h2"]).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (streams, opened) = mpsc::channel(4);
        let inner = Inner { cell, nonce: 10, refuses: None, begun: vec![] };
        let address = listener.local_addr().unwrap();
        let (holds, evidence) = (Arc::new(watch::Sender::new(false)), Arc::new(watch::Sender::new(0)));
        let replica = Replica { address, inner: Arc::new(Mutex::new(inner)), dir, streams, holds, evidence };
        let router = tonic::transport::Server::builder()
            .add_service(AgentStreamServer::new(replica.clone()))
            .add_service(NodeAttestationServer::new(replica.clone()));
        tokio::spawn(ambit_transport::serve(listener, config, trust, router, std::future::pending()));
        (replica, opened)
    }
    /// From now on whoever comes is told this; none lets everybody in.
    pub(crate) fn refuse(&self, code: Option<Code>) {
        self.inner.lock().unwrap().refuses = code;
    }
    pub(crate) fn hold_verdicts(&self, hold: bool) {
        self.holds.send_replace(hold);
    }
    /// Returns once more evidence has come.
    pub(crate) async fn evidence_came(&self) {
        let seen = *self.evidence.borrow();
        let _ = self.evidence.subscribe().wait_for(|n| *n > seen).await;
    }
    pub(crate) fn begun(&self) -> Vec<Instant> {
        self.inner.lock().unwrap().begun.clone()
    }
    pub(crate) fn with_cell<T>(&self, what: impl FnOnce(&mut Cell) -> T) -> T {
        what(&mut self.inner.lock().unwrap().cell)
    }
    fn refused(&self) -> Option<Code> {
        self.inner.lock().unwrap().refuses
    }

    /// A credential for the AK, made by tools that nobody here wrote.
    fn credential(&self, ek_public: &[u8], ak_public: &[u8]) -> (Vec<u8>, Vec<u8>) {
        let sized = |bytes: &[u8]| [&(bytes.len() as u16).to_be_bytes()[..], bytes].concat();
        std::fs::write(self.dir.join("ek.pub"), sized(ek_public)).unwrap();
        std::fs::write(self.dir.join("secret"), [9; 32]).unwrap();
        let name = hex::encode(Public::name_of(ak_public).unwrap());
        let made = Command::new("tpm2_makecredential")
            .args(["-T", "none", "-u", "ek.pub", "-s", "secret", "-n", &name, "-o", "credential"])
            .current_dir(&self.dir)
            .output()
            .unwrap();
        assert!(made.status.success(), "{made:?}");
        // Magic and version of tpm2-tools, then TPM2B_ID_OBJECT and TPM2B_ENCRYPTED_SECRET.
        let file = std::fs::read(self.dir.join("credential")).unwrap();
        let blob = &file[8..];
        let len = 2 + usize::from(u16::from_be_bytes([blob[0], blob[1]]));
        (blob[..len].to_vec(), blob[len..].to_vec())
    }
}

#[tonic::async_trait]
impl AgentStream for Replica {
    type SyncStream = ReceiverStream<Result<v1::ServerMessage, Status>>;
    async fn sync(&self, request: Request<Streaming<v1::AgentMessage>>) -> Result<Response<Self::SyncStream>, Status> {
        if let Some(code) = self.refused() {
            return Err(to_status(&Refusal::new(code, "", "")));
        }
        let caller = request.extensions().get::<Caller>().cloned().unwrap();
        let generation = caller.svid.and_then(|svid| svid.binding()).expect("a node's leaf").generation.0;
        let mut up = request.into_inner();
        let Some(Up::Subscribe(hello)) = up.message().await?.and_then(|m| m.body) else { panic!("Subscribe first") };
        let (down, queue) = mpsc::channel(16);
        drop(self.streams.send(Stream { down, up, generation, hello }).await);
        Ok(Response::new(ReceiverStream::new(queue)))
    }
}

macro_rules! unasked {
    ($($name:ident($request:ty) -> $response:ty;)*) => {
        #[tonic::async_trait]
        impl NodeAttestation for Replica {
            async fn begin(&self, request: Request<v1::BeginRequest>) -> Result<Response<v1::BeginResponse>, Status> {
                let request = request.into_inner();
                self.inner.lock().unwrap().begun.push(Instant::now());
                let result = match self.refused() {
                    Some(code) => v1::begin_response::Result::Denied(denied(code)),
                    None => {
                        let (credential_blob, encrypted_secret) =
                            self.credential(&request.ek_public, &request.ak_public);
                        v1::begin_response::Result::Challenge(v1::Challenge {
                            ticket: vec![1; 100],
                            server_nonce: vec![2; 32],
                            credential_blob,
                            encrypted_secret,
                            bank: "sha256".into(),
                            pcr_mask: 0x47ff,
                            ..Default::default()
                        })
                    }
                };
                Ok(Response::new(v1::BeginResponse { result: Some(result) }))
            }
            async fn evidence(
                &self,
                request: Request<Streaming<v1::EvidenceRequest>>,
            ) -> Result<Response<v1::EvidenceResponse>, Status> {
                let mut parts = request.into_inner();
                let first = parts.message().await?.and_then(|m| m.part);
                let Some(v1::evidence_request::Part::Header(header)) = first else { panic!("a header first") };
                while parts.message().await?.is_some() {}
                self.evidence.send_modify(|n| *n += 1);
                let _ = self.holds.subscribe().wait_for(|hold| !hold).await;
                let mut inner = self.inner.lock().unwrap();
                inner.nonce += 1;
                let nonce = inner.nonce;
                let (svid_chain_der, generation) = inner.cell.admit_csr(nonce, &header.csr);
                let verdict = v1::Verdict {
                    svid_chain_der,
                    bundle: Some(inner.cell.bundle()),
                    node_id: inner.cell.node().to_string(),
                    generation: generation.0,
                    ..Default::default()
                };
                let result = Some(v1::evidence_response::Result::Verdict(verdict));
                Ok(Response::new(v1::EvidenceResponse { result }))
            }
            $(async fn $name(&self, _: Request<$request>) -> Result<Response<$response>, Status> {
                Err(Status::unimplemented("no agent asks for this"))
            })*
        }
    };
}

unasked! {
    create_join_token(v1::CreateJoinTokenRequest) -> v1::CreateJoinTokenResponse;
    allow_ek(v1::AllowEkRequest) -> v1::AllowEkResponse;
    list_nodes(v1::ListNodesRequest) -> v1::ListNodesResponse;
    explain_node(v1::ExplainNodeRequest) -> v1::ExplainNodeResponse;
    ban_node(v1::NodeSelection) -> v1::ListNodesResponse;
    evict_node(v1::NodeSelection) -> v1::ListNodesResponse;
    unban_node(v1::NodeSelection) -> v1::ListNodesResponse;
    quarantine_node(v1::NodeSelection) -> v1::ListNodesResponse;
    release_node(v1::NodeSelection) -> v1::ListNodesResponse;
    attestation_at(v1::AttestationAtRequest) -> v1::AttestationAtResponse;
    attestation_result(v1::AttestationResultRequest) -> v1::AttestationResultResponse;
    put_ek_roots(v1::PutEkRootsRequest) -> v1::EndorsementsResponse;
    disallow_ek(v1::AllowEkRequest) -> v1::AllowEkResponse;
    put_ek_deny(v1::PutEkDenyRequest) -> v1::EndorsementsResponse;
    list_endorsements(v1::ListEndorsementsRequest) -> v1::EndorsementsResponse;
}

fn denied(code: Code) -> v1::Denied {
    v1::Denied { code: code.as_str().into(), remedy: code.remedy().into(), diverged: String::new() }
}
