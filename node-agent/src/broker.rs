//! The SPIFFE Broker API on a Unix socket of its own: a node proxy asks for the SVIDs and roots of a workload that it
//! stands for, which it names by its process.
//!
//! SPIFFE_Broker_Endpoint.md sections 3 and 5: mutual TLS, the header, and a list of brokers that only a configuration
//! writes. A broker of another node, or one that was denied since, is refused although its certificate is good. Never: an
//! answer about a process that this agent did not look at itself (SPIFFE_Broker_API.md section 3.1.1).

use crate::answers::{self, Answer, Identities};
use crate::authority::Lenient;
use crate::cgroup::MeshRoot;
use crate::clock::Clock;
use crate::denials::Lane;
use crate::enrol::Enrolled;
use crate::follow::{Follower, Leave, Stream as Followed, Why, Workload};
use crate::issued::{Issued, Known};
use crate::jwt;
use crate::metrics::METRICS;
use crate::places::Places;
use crate::process::Process;
use crate::tokens::Tokens;
use crate::workload_api::{ANSWER_MAX, REQUEST_BYTES_MAX, ServeError};
use ambit_identity::SharedTrust;
use ambit_identity::tls::{Clients, server_config};
use ambit_model::{Generation, NodeId, Refusal, Selector, SpiffeId};
use ambit_proto::SPIFFE_DESCRIPTORS;
use ambit_proto::broker::api_server::{Api, ApiServer};
use ambit_proto::broker::{
    FetchJwtsvidRequest, FetchJwtsvidResponse, Jwtsvid, SubscribeToJwtBundlesRequest, SubscribeToJwtBundlesResponse,
    SubscribeToX509BundlesRequest, SubscribeToX509BundlesResponse, SubscribeToX509svidRequest,
    SubscribeToX509svidResponse, WorkloadPidReference, WorkloadReference, X509svid,
};
use ambit_proto::xds::google::rpc;
use prost::Message;
use prost_types::Any;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls_pki_types::CertificateDer;
use std::collections::BTreeSet;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::time::{Instant, Sleep};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;
use tonic::{Code as Grpc, Request, Response, Status};

/// Streams open at once: a proxy has two for each workload of its node.
const STREAMS_MAX: usize = 4096;
/// Of these on one connection; a node proxy has but one.
const STREAMS_PER_CONNECTION_MAX: u32 = 2048;
/// Connections open at once, those in their handshake among them; a node has a proxy or two.
const CONNECTIONS_MAX: usize = 64;
/// Connections of those who are not let in, until they were told so; more are closed unheard. They take no place.
const TOLD_MAX: usize = 8;
/// A refusal is asked for and read well within this.
const TOLD_WITHIN: Duration = Duration::from_secs(5);
/// Accepted and not yet taken in.
const ACCEPTED_MAX: usize = 16;
/// Slow handshakes are cut, so that they cannot hold their places.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// The one kind of reference that is understood.
const BY_PID: &str = "type.googleapis.com/spiffe.broker.WorkloadPIDReference";

/// The service.
#[derive(Clone, Debug)]
pub struct Broker {
    /// What it answers from.
    pub issued: Issued,
    /// Where the mesh's cgroups are.
    pub mesh: Arc<MeshRoot>,
    /// Who may ask.
    pub gate: Gate,
    tokens: Tokens,
    streams: Places,
}

/// Who may ask.
#[derive(Clone, Debug)]
pub struct Gate {
    /// These, and nobody else.
    pub brokers: Arc<BTreeSet<SpiffeId>>,
    /// What their certificates are verified against.
    pub trust: SharedTrust,
    /// The time.
    pub clock: Arc<Clock>,
    /// Whom the cell refuses.
    pub denials: Lane,
    /// This node.
    pub node: watch::Receiver<Option<(NodeId, Generation)>>,
}

/// The node's own SVID, as it is at each handshake.
#[derive(Debug)]
pub struct NodeIdentity(pub watch::Receiver<Option<Arc<Enrolled>>>);

impl ResolvesServerCert for NodeIdentity {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.0.borrow().as_ref().map(|enrolled| enrolled.identity.clone())
    }
}

impl Broker {
    /// A service that answers whom `gate` lets in.
    pub fn new(issued: Issued, tokens: Tokens, mesh: Arc<MeshRoot>, gate: Gate) -> Self {
        Self { issued, mesh, gate, tokens, streams: Places::new(STREAMS_MAX, STREAMS_MAX) }
    }

    /// Serves on `listener`, showing what `identity` resolves to, with reflection, until it fails.
    pub async fn serve(self, listener: UnixListener, identity: Arc<dyn ResolvesServerCert>) -> Result<(), ServeError> {
        let config = server_config(self.gate.trust.clone(), Clients::Certified, identity, &[b"h2"])?;
        let reflection = || {
            tonic_reflection::server::Builder::configure()
                .register_encoded_file_descriptor_set(SPIFFE_DESCRIPTORS)
                .with_service_name("spiffe.broker.API")
        };
        let (ready, accepted) = mpsc::channel(ACCEPTED_MAX);
        let (gate, course) = (self.gate.clone(), self.issued.course().clone());
        let router = tonic::transport::Server::builder()
            .max_concurrent_streams(STREAMS_PER_CONNECTION_MAX)
            .timeout(ANSWER_MAX)
            .add_service(ApiServer::new(self).max_decoding_message_size(REQUEST_BYTES_MAX))
            .add_service(reflection().build_v1()?.max_decoding_message_size(REQUEST_BYTES_MAX))
            .add_service(reflection().build_v1alpha()?.max_decoding_message_size(REQUEST_BYTES_MAX));
        tokio::select! {
            served = router.serve_with_incoming_shutdown(ReceiverStream::new(accepted), course.drained_a_while()) => Ok(served?),
            () = course.while_serving(accept(listener, TlsAcceptor::from(Arc::new(config)), gate, ready)) => Ok(()),
        }
    }
}

async fn accept(
    listener: UnixListener,
    acceptor: TlsAcceptor,
    gate: Gate,
    ready: mpsc::Sender<std::io::Result<Lenient<Accepted>>>,
) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let told = Arc::new(Semaphore::new(TOLD_MAX));
    // Those who find no place wait in the listener's backlog.
    while let Ok(place) = places.clone().acquire_owned().await {
        let Ok((stream, _)) = listener.accept().await else {
            // Out of descriptors, most likely: wait for some to close.
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        let (acceptor, gate, told, ready) = (acceptor.clone(), gate.clone(), told.clone(), ready.clone());
        tokio::spawn(async move {
            match tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)).await {
                Ok(Ok(stream)) => {
                    let stay = match gate.lets_in(&shown(&stream)) {
                        Ok(_) => Stay::Placed(place),
                        Err(_) => {
                            drop(place);
                            let Ok(turn) = told.try_acquire_owned() else { return };
                            Stay::Told(turn, Box::pin(tokio::time::sleep(TOLD_WITHIN)))
                        }
                    };
                    drop(ready.send(Ok(Lenient::new(Accepted(stream, stay)))).await);
                }
                Ok(Err(error)) => tracing::debug!(%error, "broker's handshake refused"),
                Err(_) => tracing::debug!("broker's handshake too slow"),
            }
        });
    }
}

/// A connection with a certificate that was good when it was made, and how long it may stay.
struct Accepted(TlsStream<UnixStream>, Stay);

/// What is held while a connection is open.
enum Stay {
    /// Of who was let in when it was made: a place.
    Placed(#[allow(dead_code, reason = "held")] OwnedSemaphorePermit),
    /// Of who was not: until then it can ask, and hear why not.
    Told(#[allow(dead_code, reason = "held")] OwnedSemaphorePermit, Pin<Box<Sleep>>),
}

/// The chain that was shown in the handshake.
fn shown(stream: &TlsStream<UnixStream>) -> Vec<CertificateDer<'static>> {
    let chain = stream.get_ref().1.peer_certificates().unwrap_or_default();
    chain.iter().map(|der| der.clone().into_owned()).collect()
}

/// Its chain, leaf first: judged anew for each call and each message.
#[derive(Clone, Debug, Default)]
struct Shown(Arc<Vec<CertificateDer<'static>>>);

impl Connected for Accepted {
    type ConnectInfo = Shown;
    fn connect_info(&self) -> Shown {
        Shown(Arc::new(shown(&self.0)))
    }
}
impl AsyncRead for Accepted {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        if let Stay::Told(_, over) = &mut self.1
            && over.as_mut().poll(cx).is_ready()
        {
            // As if the other side had ended it.
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}
impl AsyncWrite for Accepted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

impl Gate {
    /// Whether whoever shows `chain` may ask now; until when, if nothing changes.
    fn lets_in(&self, chain: &[CertificateDer<'_>]) -> Result<Instant, Status> {
        let now = self.clock.now();
        let unknown = |refusal: Refusal| Status::unauthenticated(refusal.for_node().to_string());
        let peer = self.trust.current().verify(chain, now).map_err(unknown)?;
        let listed = self.brokers.contains(peer.id());
        let here = *self.node.borrow();
        let ours = peer.binding().zip(here).is_some_and(|(binding, (node, _))| binding.node == node);
        let denials = self.denials.now();
        let origin = peer.id().trust_domain();
        let denied = peer.binding().is_none_or(|b| denials.is_out() || denials.lists(&origin, &b.node, b.generation))
            || denials.denied_above(&peer).is_some()
            || denials.denies_svid(peer.id(), peer.authority(), peer.serial());
        if !listed || !ours || denied {
            tracing::warn!(broker = %peer.id(), listed, ours, denied, "broker refused");
            return Err(Status::permission_denied("no broker of this node"));
        }
        Ok(Instant::now() + Duration::from_millis(peer.not_after().0.saturating_sub(now.0)))
    }
}

type Streamed<T> = ReceiverStream<Result<T, Status>>;

#[tonic::async_trait]
impl Api for Broker {
    type SubscribeToX509SVIDStream = Streamed<SubscribeToX509svidResponse>;
    async fn subscribe_to_x509svid(
        &self,
        request: Request<SubscribeToX509svidRequest>,
    ) -> Result<Response<Self::SubscribeToX509SVIDStream>, Status> {
        let answer = |known: &Known, found: &BTreeSet<Selector>| answers::identities(known, found).map(svids);
        self.stream("SubscribeToX509SVID", &request, request.get_ref().reference.as_ref(), answer)
    }

    type SubscribeToX509BundlesStream = Streamed<SubscribeToX509BundlesResponse>;
    async fn subscribe_to_x509_bundles(
        &self,
        request: Request<SubscribeToX509BundlesRequest>,
    ) -> Result<Response<Self::SubscribeToX509BundlesStream>, Status> {
        let answer = |known: &Known, found: &BTreeSet<Selector>| {
            let response =
                |roots: answers::Roots| SubscribeToX509BundlesResponse { crl: vec![], bundles: roots.all_der() };
            answers::roots(known, found).map(response)
        };
        self.stream("SubscribeToX509Bundles", &request, request.get_ref().reference.as_ref(), answer)
    }

    async fn fetch_jwtsvid(
        &self,
        request: Request<FetchJwtsvidRequest>,
    ) -> Result<Response<FetchJwtsvidResponse>, Status> {
        let shown = self.caller(&request)?;
        let FetchJwtsvidRequest { reference, audience, spiffe_id } = request.into_inner();
        let workload = self.workload(reference.as_ref())?;
        let _place = self.streams.take(workload.uid()).ok_or_else(|| Status::unavailable("too many streams"))?;
        let fetched = jwt::fetch(&self.issued, &self.tokens, workload, audience, &spiffe_id).await;
        let fetched = fetched.map_err(|none| {
            METRICS.workload_api.inc(["BrokerFetchJWTSVID", none.as_str()]);
            none.status(refuse)
        })?;
        // The broker may have been denied while the cell was asked.
        self.gate.lets_in(&shown.0)?;
        METRICS.workload_api.inc(["BrokerFetchJWTSVID", "ok"]);
        let svid = |one: jwt::Identity| Jwtsvid { spiffe_id: one.id.to_string(), svid: one.token.0, hint: one.hint };
        Ok(Response::new(FetchJwtsvidResponse { svids: fetched.into_iter().map(svid).collect() }))
    }

    type SubscribeToJWTBundlesStream = Streamed<SubscribeToJwtBundlesResponse>;
    async fn subscribe_to_jwt_bundles(
        &self,
        request: Request<SubscribeToJwtBundlesRequest>,
    ) -> Result<Response<Self::SubscribeToJWTBundlesStream>, Status> {
        let answer = |known: &Known, found: &BTreeSet<Selector>| {
            jwt::documents(known, found).map(|bundles| SubscribeToJwtBundlesResponse { bundles })
        };
        self.stream("SubscribeToJWTBundles", &request, request.get_ref().reference.as_ref(), answer)
    }
}

impl Broker {
    /// Who asks, if he may: first the header, then the gate.
    fn caller<T>(&self, request: &Request<T>) -> Result<Shown, Status> {
        let header = request.metadata().get("broker.spiffe.io").and_then(|v| v.to_str().ok());
        if header != Some("true") {
            return Err(Status::invalid_argument("the metadata 'broker.spiffe.io: true' is required"));
        }
        let shown = request.extensions().get::<Shown>().cloned().unwrap_or_default();
        self.gate.lets_in(&shown.0)?;
        Ok(shown)
    }

    fn stream<R, T: Message + 'static>(
        &self,
        method: &'static str,
        request: &Request<R>,
        reference: Option<&WorkloadReference>,
        answer: fn(&Known, &BTreeSet<Selector>) -> Answer<T>,
    ) -> Result<Response<Streamed<T>>, Status> {
        let invalid = |_: &Status| METRICS.workload_api.inc([method, "invalid"]);
        let shown = self.caller(request).inspect_err(invalid)?;
        let workload = self.workload(reference).inspect_err(invalid)?;
        let place = self.streams.take(workload.uid()).ok_or_else(|| Status::unavailable("too many streams"))?;
        let (send, receive) = mpsc::channel(1);
        let gate = self.gate.clone();
        let stream = Followed {
            method,
            follower: Follower::new(&self.issued, workload),
            answer,
            refuse,
            leave: Leave::While { denials: gate.denials.watch(), check: Box::new(move || gate.lets_in(&shown.0)) },
            send,
            place,
        };
        tokio::spawn(stream.run());
        Ok(Response::new(ReceiverStream::new(receive)))
    }

    /// The process that a reference names, as this agent finds it.
    fn workload(&self, reference: Option<&WorkloadReference>) -> Result<Workload, Status> {
        let reference = reference.and_then(|r| r.reference.as_ref()).ok_or_else(|| bad("no reference"))?;
        if reference.type_url != BY_PID {
            return Err(bad("workloads are named by WorkloadPIDReference here"));
        }
        let named =
            WorkloadPidReference::decode(reference.value.as_slice()).map_err(|_| bad("no WorkloadPIDReference"))?;
        if named.pid <= 0 {
            return Err(bad("a process has a positive number"));
        }
        let found = Process::numbered(named.pid).and_then(|process| Ok((process.facts()?, Arc::new(process))));
        let (facts, process) = found.map_err(|error| {
            tracing::debug!(pid = named.pid, %error, "a broker's workload not found");
            refuse(Why::Ended)
        })?;
        Ok(Workload::new(process, facts, &self.mesh))
    }
}

fn bad(what: &str) -> Status {
    status(Grpc::InvalidArgument, what, "WORKLOAD_REFERENCE_INVALID")
}

/// SPIFFE_Broker_API.md section 4.8, SPIFFE_Broker_Endpoint.md section 6.
fn refuse(why: Why) -> Status {
    match why {
        Why::Ended => {
            status(Grpc::NotFound, "no such process, or it ended or became another program", "WORKLOAD_NOT_FOUND")
        }
        Why::Nobody => status(Grpc::PermissionDenied, "no entry recognises this process", "WORKLOAD_NOT_ENTITLED"),
        Why::Starting => Status::unavailable("the agent has no word from its cell yet"),
        Why::NotIssued => Status::unavailable("the SVID is not issued yet"),
    }
}

/// A status that says its reason to programs too (google.rpc.ErrorInfo).
fn status(code: Grpc, message: &str, reason: &str) -> Status {
    let info = rpc::ErrorInfo { reason: reason.to_owned(), domain: "spiffe.io".to_owned(), ..Default::default() };
    let info = Any { type_url: "type.googleapis.com/google.rpc.ErrorInfo".to_owned(), value: info.encode_to_vec() };
    let rich = rpc::Status { code: code as i32, message: message.to_owned(), details: vec![info] };
    Status::with_details(code, message, rich.encode_to_vec().into())
}

fn svids(set: Identities) -> SubscribeToX509svidResponse {
    let own = set.roots.own_der();
    let svids = set.svids.into_iter().map(|identity| X509svid {
        spiffe_id: identity.svid.id.to_string(),
        x509_svid: identity.svid.chain_der.concat(),
        x509_svid_key: identity.svid.key_pkcs8.to_vec(),
        bundle: own.clone(),
        hint: identity.hint,
    });
    SubscribeToX509svidResponse { svids: svids.collect(), crl: vec![], federated_bundles: set.roots.foreign_der() }
}
