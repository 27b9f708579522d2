//! The SPIFFE Workload API on a Unix socket: a workload asks "who am I?" and is answered by what the kernel says of it.
//!
//! SPIFFE_Workload_API.md: the header is required, every message of a stream is the full set, the first comes at once,
//! a caller without identity gets PERMISSION_DENIED. The service is never extended; nothing here is configurable.

use crate::answers::{self, Identities, Roots};
use crate::authority::Lenient;
use crate::caller::{Caller, Identified};
use crate::cgroup::MeshRoot;
use crate::follow::{Follower, Leave, Stream as Followed, Why, Workload};
use crate::issued::{Issued, Known};
use crate::jwt::{self, NoToken};
use crate::metrics::METRICS;
use crate::places::{Place, Places};
use crate::sds::Sds;
use crate::tokens::Tokens;
use ambit_model::Selector;
use ambit_proto::workload::spiffe_workload_api_server::{SpiffeWorkloadApi, SpiffeWorkloadApiServer};
use ambit_proto::workload::{
    JwtBundlesRequest, JwtBundlesResponse, Jwtsvid, JwtsvidRequest, JwtsvidResponse, ValidateJwtsvidRequest,
    ValidateJwtsvidResponse, X509BundlesRequest, X509BundlesResponse, X509svid, X509svidRequest, X509svidResponse,
};
use ambit_proto::xds::secret::secret_discovery_service_server::SecretDiscoveryServiceServer;
use ambit_proto::{ENVOY_DESCRIPTORS, SPIFFE_DESCRIPTORS};
use prost::Message;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::UnixListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};
use tonic_health::server::HealthReporter;

/// Streams open at once, those of Envoys among them; each holds a task and a queue of one message.
const STREAMS_MAX: usize = 1024;
/// Of these of one user.
const STREAMS_PER_USER_MAX: usize = 256;
/// Connections open at once; each holds three descriptors.
const CONNECTIONS_MAX: usize = 2048;
/// Of these of one user.
const CONNECTIONS_PER_USER_MAX: usize = 256;
/// Accepted and not yet taken in.
const ACCEPTED_MAX: usize = 16;
/// The largest request: a token of 16 KiB and its audience, or what an Envoy tells of itself. It is in memory before
/// anybody is asked who sent it.
pub(crate) const REQUEST_BYTES_MAX: usize = 64 * 1024;
/// For a request to come whole and its answer to begin. Streams last as long as they like after that.
pub(crate) const ANSWER_MAX: Duration = Duration::from_secs(60);

/// The service.
#[derive(Clone, Debug)]
pub struct WorkloadApi {
    issued: Issued,
    tokens: Tokens,
    streams: Places,
}

impl WorkloadApi {
    /// A service that answers from `issued`, with JWT-SVIDs of `tokens`.
    pub fn new(issued: Issued, tokens: Tokens) -> Self {
        Self { issued, tokens, streams: Places::new(STREAMS_MAX, STREAMS_PER_USER_MAX) }
    }

    /// Serves on `listener`, with health and reflection, until it fails.
    pub async fn serve(self, listener: UnixListener, mesh: MeshRoot) -> Result<(), ServeError> {
        let (health, health_service) = tonic_health::server::health_reporter();
        let telling = tell_health(health, self.issued.clone());
        let course = self.issued.course().clone();
        let sds = Sds::new(self.issued.clone(), self.streams.clone());
        let router = tonic::transport::Server::builder()
            .max_concurrent_streams(64)
            .timeout(ANSWER_MAX)
            .add_service(SpiffeWorkloadApiServer::new(self).max_decoding_message_size(REQUEST_BYTES_MAX))
            .add_service(SecretDiscoveryServiceServer::new(sds).max_decoding_message_size(REQUEST_BYTES_MAX))
            .add_service(health_service.max_decoding_message_size(REQUEST_BYTES_MAX))
            .add_service(reflection().build_v1()?.max_decoding_message_size(REQUEST_BYTES_MAX))
            // What most tools in use still ask.
            .add_service(reflection().build_v1alpha()?.max_decoding_message_size(REQUEST_BYTES_MAX));
        let (ready, accepted) = mpsc::channel(ACCEPTED_MAX);
        tokio::select! {
            // Whoever is connected when it drains is told to connect anew.
            served = router.serve_with_incoming_shutdown(ReceiverStream::new(accepted), course.drained_a_while()) => Ok(served?),
            () = course.while_serving(accept(listener, mesh, ready)) => Ok(()),
            () = telling => Ok(()),
        }
    }
}

/// Why a local service ended.
pub type ServeError = Box<dyn std::error::Error + Send + Sync>;

fn reflection<'a>() -> tonic_reflection::server::Builder<'a> {
    tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(SPIFFE_DESCRIPTORS)
        .register_encoded_file_descriptor_set(ENVOY_DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .with_service_name("SpiffeWorkloadAPI")
        .with_service_name("envoy.service.secret.v3.SecretDiscoveryService")
        .with_service_name("grpc.health.v1.Health")
}

/// Serving from the first word of the cell on: until then every call is answered UNAVAILABLE.
async fn tell_health(health: HealthReporter, issued: Issued) {
    health.set_not_serving::<SpiffeWorkloadApiServer<WorkloadApi>>().await;
    health.set_not_serving::<SecretDiscoveryServiceServer<Sds>>().await;
    let _ = issued.watch().wait_for(|known| known.view.is_some()).await;
    health.set_serving::<SpiffeWorkloadApiServer<WorkloadApi>>().await;
    health.set_serving::<SecretDiscoveryServiceServer<Sds>>().await;
    std::future::pending().await
}

/// Takes connections in for ever. What goes wrong with one ends none of the others: out of descriptors, most likely, and
/// then some must close.
async fn accept(listener: UnixListener, mesh: MeshRoot, ready: mpsc::Sender<std::io::Result<Lenient<Identified>>>) {
    let (mesh, places) = (Arc::new(mesh), Places::new(CONNECTIONS_MAX, CONNECTIONS_PER_USER_MAX));
    loop {
        let accepted = listener.accept().await.and_then(|(stream, _)| Ok((stream.peer_cred()?.uid(), stream)));
        let Ok((uid, stream)) = accepted.inspect_err(|error| tracing::warn!(%error, "connection not accepted")) else {
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        let Some(place) = places.take(uid) else {
            tracing::debug!(uid, "too many connections");
            continue;
        };
        if ready.send(Ok(Lenient::new(Identified::accept(stream, place, &mesh)))).await.is_err() {
            return;
        }
    }
}

type Streamed<T> = ReceiverStream<Result<T, Status>>;

#[tonic::async_trait]
impl SpiffeWorkloadApi for WorkloadApi {
    type FetchX509SVIDStream = Streamed<X509svidResponse>;
    async fn fetch_x509svid(
        &self,
        request: Request<X509svidRequest>,
    ) -> Result<Response<Self::FetchX509SVIDStream>, Status> {
        self.stream("FetchX509SVID", &request, |known, found| answers::identities(known, found).map(svids))
    }

    type FetchX509BundlesStream = Streamed<X509BundlesResponse>;
    async fn fetch_x509_bundles(
        &self,
        request: Request<X509BundlesRequest>,
    ) -> Result<Response<Self::FetchX509BundlesStream>, Status> {
        self.stream("FetchX509Bundles", &request, |known, found| answers::roots(known, found).map(bundles))
    }

    async fn fetch_jwtsvid(&self, request: Request<JwtsvidRequest>) -> Result<Response<JwtsvidResponse>, Status> {
        let workload = caller(&request).inspect_err(|_| METRICS.workload_api.inc(["FetchJWTSVID", "invalid"]))?;
        let _place = self.place(&workload)?;
        let JwtsvidRequest { audience, spiffe_id } = request.into_inner();
        let fetched = jwt::fetch(&self.issued, &self.tokens, workload, audience, &spiffe_id).await;
        let fetched = fetched.map_err(|none| counted("FetchJWTSVID", none))?;
        METRICS.workload_api.inc(["FetchJWTSVID", "ok"]);
        let svid = |one: jwt::Identity| Jwtsvid { spiffe_id: one.id.to_string(), svid: one.token.0, hint: one.hint };
        Ok(Response::new(JwtsvidResponse { svids: fetched.into_iter().map(svid).collect() }))
    }

    type FetchJWTBundlesStream = Streamed<JwtBundlesResponse>;
    async fn fetch_jwt_bundles(
        &self,
        request: Request<JwtBundlesRequest>,
    ) -> Result<Response<Self::FetchJWTBundlesStream>, Status> {
        let answer = |known: &Known, found: &BTreeSet<Selector>| {
            jwt::documents(known, found).map(|bundles| JwtBundlesResponse { bundles })
        };
        self.stream("FetchJWTBundles", &request, answer)
    }

    async fn validate_jwtsvid(
        &self,
        request: Request<ValidateJwtsvidRequest>,
    ) -> Result<Response<ValidateJwtsvidResponse>, Status> {
        let workload = caller(&request).inspect_err(|_| METRICS.workload_api.inc(["ValidateJWTSVID", "invalid"]))?;
        let _place = self.place(&workload)?;
        let ValidateJwtsvidRequest { audience, svid } = request.into_inner();
        let judged = jwt::validate(&self.issued, &self.tokens, workload, &audience, &svid).await;
        let (id, claims) = judged.map_err(|none| counted("ValidateJWTSVID", none))?;
        METRICS.workload_api.inc(["ValidateJWTSVID", "ok"]);
        Ok(Response::new(ValidateJwtsvidResponse { spiffe_id: id.to_string(), claims: Some(claims) }))
    }
}

fn counted(method: &'static str, none: NoToken) -> Status {
    METRICS.workload_api.inc([method, none.as_str()]);
    none.status(refuse)
}

/// Who asks, once the header is there: it proves that no browser or proxy was tricked into asking (section 5 of the
/// Workload API: SSRF).
fn caller<T>(request: &Request<T>) -> Result<Workload, Status> {
    let header = request.metadata().get("workload.spiffe.io").and_then(|v| v.to_str().ok());
    if header != Some("true") {
        return Err(Status::invalid_argument("the metadata 'workload.spiffe.io: true' is required"));
    }
    workload(request).ok_or_else(|| refuse(Why::Ended))
}

/// The process that opened the connection of `request`, as it is now. None if it has ended or was never identified.
pub(crate) fn workload<T>(request: &Request<T>) -> Option<Workload> {
    let caller: &Caller = request.extensions().get::<Option<Caller>>()?.as_ref()?;
    let facts = caller.facts().inspect_err(|error| tracing::debug!(%error, "caller not recognised")).ok()?;
    Some(Workload::new(caller.process().clone(), facts, caller.mesh()))
}

/// The status codes of SPIFFE_Workload_Endpoint.md section 6.
pub(crate) fn refuse(why: Why) -> Status {
    match why {
        Why::Ended => Status::permission_denied(
            "who opened this has ended, is another program or user now, or was not identified",
        ),
        Why::Starting => Status::unavailable("the agent has no word from its cell yet"),
        Why::Nobody => Status::permission_denied("no identity issued: no entry recognises this process"),
        Why::NotIssued => Status::unavailable("the SVID is not issued yet"),
    }
}

impl WorkloadApi {
    #[allow(clippy::result_large_err, reason = "a status is what the caller answers with")]
    fn place(&self, workload: &Workload) -> Result<Place, Status> {
        self.streams.take(workload.uid()).ok_or_else(|| Status::unavailable("too many streams"))
    }

    fn stream<R, T: Message + 'static>(
        &self,
        method: &'static str,
        request: &Request<R>,
        answer: fn(&Known, &BTreeSet<Selector>) -> answers::Answer<T>,
    ) -> Result<Response<Streamed<T>>, Status> {
        let workload = caller(request).inspect_err(|_| METRICS.workload_api.inc([method, "invalid"]))?;
        let place = self.place(&workload)?;
        let (send, receive) = mpsc::channel(1);
        let stream = Followed {
            method,
            follower: Follower::new(&self.issued, workload),
            answer,
            refuse,
            leave: Leave::Own,
            send,
            place,
        };
        tokio::spawn(stream.run());
        Ok(Response::new(ReceiverStream::new(receive)))
    }
}

fn svids(set: Identities) -> X509svidResponse {
    let own = set.roots.own_der();
    let svids = set.svids.into_iter().map(|identity| X509svid {
        spiffe_id: identity.svid.id.to_string(),
        x509_svid: identity.svid.chain_der.concat(),
        x509_svid_key: identity.svid.key_pkcs8.to_vec(),
        bundle: own.clone(),
        hint: identity.hint,
    });
    X509svidResponse { svids: svids.collect(), crl: vec![], federated_bundles: set.roots.foreign_der() }
}

fn bundles(roots: Roots) -> X509BundlesResponse {
    X509BundlesResponse { crl: vec![], bundles: roots.all_der() }
}
