//! Envoy's secret discovery service, v3, on the Workload API's socket: an Envoy asks for its certificate and for the roots
//! that it may believe, under the names that SPIRE gives them.
//!
//! `default` is the default identity, a SPIFFE ID that identity; `ROOTCA` are the own roots, `spiffe://<trust domain>` those
//! of one trust domain, `ALL` all of them, each for its own identities only. The caller is recognised as one of the
//! Workload API is. The security header is not asked for, since no Envoy sends it unless told to. Secrets are told in either
//! form of the protocol, state of the world (`api_type: GRPC`) or incremental (`DELTA_GRPC`), and to who asks once.

use crate::answers::{self, Answer, Identity, Roots};
use crate::follow::{Follower, Patience, Step, Why, until_then};
use crate::issued::{Issued, Known};
use crate::metrics::METRICS;
use crate::places::{Place, Places};
use crate::workload_api::{refuse, workload};
use crate::xds::{Increments, Invalid, Meaning, Named, SECRET, Subscription, Told, Variant, Wanted, version};
use ambit_identity::keys::{SvidKey, certificates_to_pem};
use ambit_model::{Selector, TrustDomain};
use ambit_proto::xds::core::{DataSource, Node, TypedExtensionConfig, data_source, node};
use ambit_proto::xds::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse};
use ambit_proto::xds::secret::secret_discovery_service_server::SecretDiscoveryService;
use ambit_proto::xds::tls::spiffe_cert_validator_config::TrustDomain as Trusted;
use ambit_proto::xds::tls::{CertificateValidationContext, Secret, SpiffeCertValidatorConfig, TlsCertificate, secret};
use prost::Message;
use prost_types::{Any, value::Kind};
use std::collections::BTreeSet;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

/// The name of the default identity (SPIRE: `default_svid_name`).
const DEFAULT: &str = "default";
/// The name of the own roots (SPIRE: `default_bundle_name`).
const ROOTCA: &str = "ROOTCA";
/// The name of all roots (SPIRE: `default_all_bundles_name`).
const ALL: &str = "ALL";
const VALIDATOR: &str = "envoy.tls.cert_validator.spiffe";
const VALIDATOR_CONFIG: &str =
    "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.SPIFFECertValidatorConfig";

/// The service.
#[derive(Clone, Debug)]
pub struct Sds {
    issued: Issued,
    streams: Places,
}

impl Sds {
    /// A service that answers from `issued`, with a place of `streams` for each stream.
    pub fn new(issued: Issued, streams: Places) -> Self {
        Self { issued, streams }
    }

    fn follow<T>(&self, method: &'static str, request: &Request<T>) -> Result<(Follower, Place), Status> {
        let header = request.metadata().get("workload.spiffe.io").map(|value| value.to_str());
        if header.is_some_and(|value| value.ok() != Some("true")) {
            METRICS.workload_api.inc([method, "invalid"]);
            return Err(Status::invalid_argument("the metadata 'workload.spiffe.io' is 'true' or absent"));
        }
        let workload = workload(request).ok_or_else(|| refuse(Why::Ended))?;
        let place = self.streams.take(workload.uid()).ok_or_else(|| Status::unavailable("too many streams"))?;
        Ok((Follower::new(&self.issued, workload), place))
    }

    fn stream<V: Variant>(&self, request: Request<Streaming<V::Request>>) -> Answers<V> {
        let (follower, place) = self.follow(V::METHOD, &request)?;
        let (send, receive) = mpsc::channel(1);
        let stream = Stream {
            follower,
            requests: request.into_inner(),
            send,
            asked: V::default(),
            form: Form::Spiffe,
            patience: Patience::default(),
            _place: place,
        };
        tokio::spawn(stream.run());
        Ok(Response::new(ReceiverStream::new(receive)))
    }
}

type Answers<V> = Result<Response<ReceiverStream<Result<<V as Variant>::Response, Status>>>, Status>;

#[tonic::async_trait]
impl SecretDiscoveryService for Sds {
    type DeltaSecretsStream = ReceiverStream<Result<DeltaDiscoveryResponse, Status>>;
    async fn delta_secrets(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaSecretsStream>, Status> {
        self.stream::<Increments>(request)
    }

    type StreamSecretsStream = ReceiverStream<Result<DiscoveryResponse, Status>>;
    async fn stream_secrets(
        &self,
        request: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamSecretsStream>, Status> {
        self.stream::<Subscription>(request)
    }

    async fn fetch_secrets(&self, request: Request<DiscoveryRequest>) -> Result<Response<DiscoveryResponse>, Status> {
        let (mut follower, _place) = self.follow("FetchSecrets", &request)?;
        let request = request.into_inner();
        let wanted = Wanted::once(&request).map_err(|what| invalid("FetchSecrets", what))?;
        let form = Form::of(request.node.as_ref());
        let mut patience = Patience::default();
        loop {
            let answer = follower.look(|known, found| secrets(known, found, &wanted, form)).await;
            let step = match answer {
                Ok(answer) => patience.step(answer, false, Instant::now()),
                Err(why) => Step::End(why),
            };
            let until = match step {
                Step::Send(secrets) if !secrets.is_empty() => {
                    METRICS.workload_api.inc(["FetchSecrets", "ok"]);
                    let resources: Vec<Any> = secrets.into_iter().map(|named| named.secret).collect();
                    let (version_info, type_url) = (version(&resources), SECRET.to_owned());
                    let nonce = String::new();
                    return Ok(Response::new(DiscoveryResponse { version_info, resources, type_url, nonce }));
                }
                Step::Send(_) => return Err(ended("FetchSecrets", Why::Nobody)),
                Step::End(why) => return Err(ended("FetchSecrets", why)),
                Step::Wait(until) => until,
            };
            tokio::select! {
                more = follower.changed() => if !more { return Err(ended("FetchSecrets", Why::Starting)) },
                () = until_then(until) => {}
            }
        }
    }
}

fn ended(method: &'static str, why: Why) -> Status {
    METRICS.workload_api.inc([method, why.as_str()]);
    refuse(why)
}

fn invalid(method: &'static str, invalid: Invalid) -> Status {
    METRICS.workload_api.inc([method, "invalid"]);
    Status::invalid_argument(invalid.to_string())
}

/// One stream of an Envoy.
struct Stream<V: Variant> {
    follower: Follower,
    requests: Streaming<V::Request>,
    send: mpsc::Sender<Result<V::Response, Status>>,
    asked: V,
    form: Form,
    patience: Patience,
    _place: Place,
}

impl<V: Variant> Stream<V> {
    async fn run(mut self) {
        if let Err(status) = self.until_end().await {
            let _ = self.send.send(Err(status)).await;
        }
    }

    /// Ends well where the Envoy ended it.
    async fn until_end(&mut self) -> Result<(), Status> {
        let mut until = None;
        loop {
            let look = tokio::select! {
                request = self.requests.message() => match request {
                    Ok(Some(request)) => self.take(request)?,
                    Ok(None) => return Ok(()),
                    // What could not be read, for who is still there to hear it.
                    Err(status) => return Err(status),
                },
                more = self.follower.changed(), if self.asked.wanted().is_some() => match more {
                    true => true,
                    false => return Ok(()),
                },
                () = until_then(until) => true,
                () = self.send.closed() => return Ok(()),
            };
            if look {
                until = self.tell().await?;
            }
        }
    }

    /// Whether something is wanted that may not have been told.
    fn take(&mut self, request: V::Request) -> Result<bool, Status> {
        if self.asked.wanted().is_none() {
            self.form = Form::of(V::node(&request));
        }
        match self.asked.request(request).map_err(|what| invalid(V::METHOD, what))? {
            Meaning::More => return Ok(true),
            Meaning::Accepted => METRICS.workload_api.inc([V::METHOD, "accepted"]),
            Meaning::Rejected(error) => {
                METRICS.workload_api.inc([V::METHOD, "rejected"]);
                tracing::warn!(?error, "an Envoy rejected its secrets");
            }
            Meaning::Stale => {}
        }
        Ok(false)
    }

    /// Tells what is there of what is wanted; returns when to look again if nothing changes.
    async fn tell(&mut self) -> Result<Option<Instant>, Status> {
        let Self { follower, asked, form, patience, .. } = self;
        let Some(wanted) = asked.wanted() else { return Ok(None) };
        let answer = follower.look(|known, found| secrets(known, found, wanted, *form)).await;
        let step = answer.map(|answer| patience.step(answer, asked.was_told(), Instant::now()));
        let why = match step {
            Ok(Step::Wait(until)) => return Ok(until),
            Ok(Step::Send(secrets)) => return self.say(secrets).await.map(|()| None),
            Ok(Step::End(why)) | Err(why) => why,
        };
        // Who has no identity any more is told that all is gone, where that can be told, and then why.
        if why == Why::Nobody && self.asked.was_told() {
            self.say(Vec::new()).await?;
        }
        Err(ended(V::METHOD, why))
    }

    async fn say(&mut self, secrets: Vec<Named>) -> Result<(), Status> {
        match self.asked.respond(secrets) {
            Told::Response(response) => {
                METRICS.workload_api.inc([V::METHOD, "ok"]);
                // A closed stream is noticed by the loop.
                let _ = self.send.send(Ok(response)).await;
                Ok(())
            }
            Told::Nothing => Ok(()),
            Told::Gone => Err(ended(V::METHOD, Why::Nobody)),
        }
    }
}

/// How roots are given to an Envoy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// By trust domain, for its SPIFFE validator.
    Spiffe,
    /// One trust domain's alone, for its plain validator: it checks no identity against the trust domain.
    Plain,
}

impl Form {
    /// What this Envoy can read, and whether it says that it wants the plain form, as it would to SPIRE.
    fn of(node: Option<&Node>) -> Self {
        let metadata = node.and_then(|node| node.metadata.as_ref());
        let disabled = metadata.and_then(|m| m.fields.get("disable_spiffe_cert_validation")?.kind.as_ref());
        let disabled = match disabled {
            Some(Kind::BoolValue(disabled)) => *disabled,
            Some(Kind::StringValue(text)) => text == "true",
            Some(Kind::NullValue(_) | Kind::NumberValue(_) | Kind::StructValue(_) | Kind::ListValue(_)) | None => false,
        };
        // Envoys before 1.18 have no such validator.
        let old = match node.and_then(|node| node.user_agent_version_type.as_ref()) {
            Some(node::UserAgentVersionType::UserAgentBuildVersion(build)) => {
                build.version.as_ref().is_some_and(|v| (v.major_number, v.minor_number) < (1, 18))
            }
            Some(node::UserAgentVersionType::UserAgentVersion(_)) | None => false,
        };
        if disabled || old { Self::Plain } else { Self::Spiffe }
    }
}

/// What there is of what is wanted. Sorted, so that the same secrets are the same bytes.
fn secrets(known: &Known, found: &BTreeSet<Selector>, wanted: &Wanted, form: Form) -> Answer<Vec<Named>> {
    if !wanted.all && wanted.named.iter().all(|name| is_of_roots(name)) {
        return answers::roots(known, found).map(|roots| packed(validations(&roots, wanted, form)));
    }
    answers::identities(known, found).map(|set| {
        let certificates = certificates(&set.svids, wanted);
        packed(certificates.into_iter().chain(validations(&set.roots, wanted, form)).collect())
    })
}

fn is_of_roots(name: &str) -> bool {
    let of_domain = name.strip_prefix("spiffe://").is_some_and(|td| td.parse::<TrustDomain>().is_ok());
    of_domain || [ROOTCA, ALL].contains(&name)
}

fn packed(mut secrets: Vec<Secret>) -> Vec<Named> {
    secrets.sort_by(|a, b| a.name.cmp(&b.name));
    // One name is one secret: two entries may give the same SPIFFE ID, and the first of them stands.
    secrets.dedup_by(|b, a| a.name == b.name);
    let any = |secret: &Secret| Any { type_url: SECRET.to_owned(), value: secret.encode_to_vec() };
    secrets.into_iter().map(|secret| Named { secret: any(&secret), name: secret.name }).collect()
}

fn certificates(svids: &[Identity], wanted: &Wanted) -> Vec<Secret> {
    let default = svids.first().map(|first| (DEFAULT.to_owned(), first));
    let named = svids.iter().map(|one| (one.svid.id.to_string(), one));
    // Who asks for all gets each under its own name only.
    let default = default.filter(|(name, _)| wanted.named.contains(name));
    let all = default.into_iter().chain(named.filter(|(name, _)| wanted.wants(name)));
    all.filter_map(|(name, identity)| {
        let key = SvidKey::from_pkcs8(&identity.svid.key_pkcs8).ok()?.pem();
        let chain = certificates_to_pem(identity.svid.chain_der.iter().map(Vec::as_slice));
        let certificate = TlsCertificate {
            certificate_chain: inline(chain.into_bytes()),
            private_key: inline(key.as_bytes().to_vec()),
        };
        Some(Secret { name, r#type: Some(secret::Type::TlsCertificate(certificate)) })
    })
    .collect()
}

fn validations(roots: &Roots, wanted: &Wanted, form: Form) -> Vec<Secret> {
    let named = roots.all.keys().map(|td| (answers::id(td), vec![td]));
    let own = (ROOTCA.to_owned(), vec![&roots.own]);
    let all = (ALL.to_owned(), roots.all.keys().collect());
    let extra = [own, all].into_iter().filter(|(name, _)| wanted.named.contains(name));
    named
        .filter(|(name, _)| wanted.wants(name))
        .chain(extra)
        .filter_map(|(name, domains)| {
            let context = validation(roots, &domains, form)?;
            Some(Secret { name, r#type: Some(secret::Type::ValidationContext(context)) })
        })
        .collect()
}

/// None where the form cannot tell it: several trust domains are never one pool, and an Envoy takes no empty list of roots.
fn validation(roots: &Roots, domains: &[&TrustDomain], form: Form) -> Option<CertificateValidationContext> {
    let pem = |td: &TrustDomain| {
        let ders = roots.all.get(td).filter(|ders| !ders.is_empty())?;
        Some(certificates_to_pem(ders.iter().map(Vec::as_slice)).into_bytes())
    };
    match (form, domains) {
        (Form::Plain, [one]) => {
            Some(CertificateValidationContext { trusted_ca: inline(pem(one)?), custom_validator_config: None })
        }
        (Form::Plain, _) => None,
        (Form::Spiffe, domains) => {
            let of = |td: &&TrustDomain| Some(Trusted { name: td.to_string(), trust_bundle: inline(pem(td)?) });
            // A trust domain without roots is left out: nobody of it is believed then.
            let trust_domains: Vec<Trusted> = domains.iter().filter_map(of).collect();
            if trust_domains.is_empty() {
                return None;
            }
            let config = SpiffeCertValidatorConfig { trust_domains };
            let typed = Any { type_url: VALIDATOR_CONFIG.to_owned(), value: config.encode_to_vec() };
            let validator = TypedExtensionConfig { name: VALIDATOR.to_owned(), typed_config: Some(typed) };
            Some(CertificateValidationContext { trusted_ca: None, custom_validator_config: Some(validator) })
        }
    }
}

fn inline(bytes: Vec<u8>) -> Option<DataSource> {
    Some(DataSource { specifier: Some(data_source::Specifier::InlineBytes(bytes)) })
}
