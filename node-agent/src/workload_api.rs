//! The SPIFFE Workload API on a Unix socket: a workload asks "who am I?" and is answered by what the kernel says of it.
//!
//! SPIFFE_Workload_API.md: the header is required, every message of a stream is the full set, the first comes at once,
//! a caller without identity gets PERMISSION_DENIED. The service is never extended; nothing here is configurable.

use crate::caller::{Caller, Identified, MeshRoot};
use crate::issued::{Interest, Issued, Known};
use crate::metrics::METRICS;
use ambit_model::{Entry, TrustDomain};
use ambit_proto::SPIFFE_DESCRIPTORS;
use ambit_proto::workload::spiffe_workload_api_server::{SpiffeWorkloadApi, SpiffeWorkloadApiServer};
use ambit_proto::workload::{
    JwtBundlesRequest, JwtBundlesResponse, JwtsvidRequest, JwtsvidResponse, ValidateJwtsvidRequest,
    ValidateJwtsvidResponse, X509BundlesRequest, X509BundlesResponse, X509svid, X509svidRequest, X509svidResponse,
};
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::UnixListener;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status};

/// Streams open at once; each holds a task and a queue of one message.
const STREAMS_MAX: usize = 1024;
/// How long a caller waits for an SVID that the cell is issuing just now, before it is told to come back.
const FIRST_WAIT: Duration = Duration::from_secs(10);
const JWT_UNBUILT: &str =
    "JWT-SVIDs are not built yet: this agent issues X.509-SVIDs only (see the limits in README.md)";

/// The service.
#[derive(Clone, Debug)]
pub struct WorkloadApi {
    issued: Issued,
    streams: Arc<Semaphore>,
}

impl WorkloadApi {
    /// A service that answers from `issued`.
    pub fn new(issued: Issued) -> Self {
        Self { issued, streams: Arc::new(Semaphore::new(STREAMS_MAX)) }
    }

    /// Serves on `listener`, with health and reflection, until it fails.
    pub async fn serve(self, listener: UnixListener, mesh: MeshRoot) -> Result<(), tonic::transport::Error> {
        let (health, health_service) = tonic_health::server::health_reporter();
        health.set_serving::<SpiffeWorkloadApiServer<WorkloadApi>>().await;
        let reflection = tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(SPIFFE_DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            .build_v1();
        let mut router = tonic::transport::Server::builder()
            .max_concurrent_streams(64)
            .add_service(SpiffeWorkloadApiServer::new(self))
            .add_service(health_service);
        match reflection {
            Ok(reflection) => router = router.add_service(reflection),
            Err(error) => tracing::error!(%error, "reflection is off"),
        }
        router.serve_with_incoming(connections(listener, mesh)).await
    }
}

fn connections(listener: UnixListener, mesh: MeshRoot) -> impl Stream<Item = std::io::Result<Identified>> {
    tokio_stream::wrappers::UnixListenerStream::new(listener).map(move |s| Ok(Identified::accept(s?, &mesh)))
}

type Streamed<T> = ReceiverStream<Result<T, Status>>;

#[tonic::async_trait]
impl SpiffeWorkloadApi for WorkloadApi {
    type FetchX509SVIDStream = Streamed<X509svidResponse>;
    async fn fetch_x509svid(
        &self,
        request: Request<X509svidRequest>,
    ) -> Result<Response<Self::FetchX509SVIDStream>, Status> {
        self.stream("FetchX509SVID", &request, svids)
    }

    type FetchX509BundlesStream = Streamed<X509BundlesResponse>;
    async fn fetch_x509_bundles(
        &self,
        request: Request<X509BundlesRequest>,
    ) -> Result<Response<Self::FetchX509BundlesStream>, Status> {
        self.stream("FetchX509Bundles", &request, bundles)
    }

    async fn fetch_jwtsvid(&self, request: Request<JwtsvidRequest>) -> Result<Response<JwtsvidResponse>, Status> {
        caller(&request)?;
        Err(Status::unimplemented(JWT_UNBUILT))
    }

    type FetchJWTBundlesStream = Streamed<JwtBundlesResponse>;
    async fn fetch_jwt_bundles(
        &self,
        request: Request<JwtBundlesRequest>,
    ) -> Result<Response<Self::FetchJWTBundlesStream>, Status> {
        caller(&request)?;
        Err(Status::unimplemented(JWT_UNBUILT))
    }

    async fn validate_jwtsvid(
        &self,
        request: Request<ValidateJwtsvidRequest>,
    ) -> Result<Response<ValidateJwtsvidResponse>, Status> {
        caller(&request)?;
        Err(Status::unimplemented(JWT_UNBUILT))
    }
}

/// Who asks, once the header is there: it proves that no browser or proxy was tricked into asking (section 5 of the
/// Workload API: SSRF).
fn caller<T>(request: &Request<T>) -> Result<Arc<Caller>, Status> {
    let header = request.metadata().get("workload.spiffe.io").and_then(|v| v.to_str().ok());
    if header != Some("true") {
        return Err(Status::invalid_argument("the metadata 'workload.spiffe.io: true' is required"));
    }
    let caller = request.extensions().get::<Arc<Caller>>().cloned().unwrap_or_default();
    if caller.has_ended() { Err(gone()) } else { Ok(caller) }
}

/// Whoever holds the socket of a process that ended was never identified.
fn gone() -> Status {
    Status::permission_denied("the process that opened this connection has ended, or could not be identified")
}

/// What a caller may be told now.
enum Answer<T> {
    /// The full set.
    Set(T),
    /// It has an identity, but the SVID is on its way.
    Coming,
    /// It has none.
    Nobody,
}

impl WorkloadApi {
    fn stream<R, T: PartialEq + Clone + Send + 'static>(
        &self,
        method: &'static str,
        request: &Request<R>,
        answer: fn(&Known, &Caller) -> Answer<T>,
    ) -> Result<Response<Streamed<T>>, Status> {
        let caller = caller(request).inspect_err(|_| METRICS.workload_api.inc([method, "invalid"]))?;
        let permit = self.streams.clone().try_acquire_owned().map_err(|_| Status::unavailable("too many streams"))?;
        let (send, receive) = mpsc::channel(1);
        tokio::spawn(follow(method, self.issued.clone(), caller, send, answer, permit));
        Ok(Response::new(ReceiverStream::new(receive)))
    }
}

/// Sends the full set at once and after every change that concerns the caller, until it has no identity any more
/// or has ended.
async fn follow<T: PartialEq + Clone + Send + 'static>(
    method: &'static str,
    issued: Issued,
    caller: Arc<Caller>,
    send: mpsc::Sender<Result<T, Status>>,
    answer: fn(&Known, &Caller) -> Answer<T>,
    _permit: OwnedSemaphorePermit,
) {
    let mut changes = issued.watch();
    let mut interest = Interest::none();
    let mut last: Option<T> = None;
    let give_up = tokio::time::Instant::now() + FIRST_WAIT;
    loop {
        let known = changes.borrow_and_update().clone();
        interest = issued.interest(entries(&known, &caller), interest);
        let refusal = match answer(&known, &caller) {
            _ if caller.has_ended() => Some(gone()),
            _ if known.view.is_none() => Some(Status::unavailable("the agent has no word from its cell yet")),
            Answer::Nobody => Some(Status::permission_denied("no identity issued: no entry recognises this process")),
            Answer::Set(set) if last.as_ref() != Some(&set) => {
                METRICS.workload_api.inc([method, "ok"]);
                last = Some(set.clone());
                if send.send(Ok(set)).await.is_err() {
                    return;
                }
                None
            }
            Answer::Set(_) | Answer::Coming => None,
        };
        if let Some(status) = refusal {
            METRICS.workload_api.inc([method, "refused"]);
            let _ = send.send(Err(status)).await;
            return;
        }
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { return },
            () = send.closed() => return,
            () = caller.ended() => {}
            () = tokio::time::sleep_until(give_up), if last.is_none() => {
                METRICS.workload_api.inc([method, "unavailable"]);
                let _ = send.send(Err(Status::unavailable("the SVID is not issued yet"))).await;
                return;
            }
        }
    }
}

fn entries(known: &Known, caller: &Caller) -> BTreeSet<ambit_model::EntryId> {
    let view = known.view.as_ref();
    view.map(|v| v.entries_of(&caller.selectors).map(|e| e.id.clone()).collect()).unwrap_or_default()
}

fn svids(known: &Known, caller: &Caller) -> Answer<X509svidResponse> {
    let Some(view) = &known.view else { return Answer::Coming };
    let mine: Vec<&Entry> = view.entries_of(&caller.selectors).collect();
    let own: Vec<u8> = view.own.roots().concat();
    let mut svids = Vec::new();
    for entry in &mine {
        match known.svids.get(&entry.id) {
            Some(Ok(svid)) => svids.push(X509svid {
                spiffe_id: svid.id.to_string(),
                x509_svid: svid.chain_der.concat(),
                x509_svid_key: svid.key_pkcs8.to_vec(),
                bundle: own.clone(),
                // Unique per response, as an entry has one SVID.
                hint: entry.id.to_string(),
            }),
            Some(Err(_)) => {}
            None => return Answer::Coming,
        }
    }
    if svids.is_empty() {
        return Answer::Nobody;
    }
    Answer::Set(X509svidResponse { svids, crl: vec![], federated_bundles: federated(known, &mine) })
}

fn bundles(known: &Known, caller: &Caller) -> Answer<X509BundlesResponse> {
    let Some(view) = &known.view else { return Answer::Coming };
    let mine: Vec<&Entry> = view.entries_of(&caller.selectors).collect();
    if mine.is_empty() {
        return Answer::Nobody;
    }
    let mut bundles = federated(known, &mine);
    bundles.insert(key(&view.trust_domain), view.own.roots().concat());
    Answer::Set(X509BundlesResponse { crl: vec![], bundles })
}

/// Bundles of the trust domains that the caller's entries federate with; never merged into one pool.
fn federated(known: &Known, entries: &[&Entry]) -> HashMap<String, Vec<u8>> {
    let named: BTreeSet<&TrustDomain> = entries.iter().flat_map(|e| &e.federates_with).collect();
    let foreign = known.view.iter().flat_map(|v| &v.foreign);
    foreign.filter(|b| named.contains(b.trust_domain())).map(|b| (key(b.trust_domain()), b.roots().concat())).collect()
}

/// Maps are keyed by the SPIFFE ID of the trust domain.
fn key(trust_domain: &TrustDomain) -> String {
    format!("spiffe://{trust_domain}")
}
