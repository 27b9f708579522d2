//! Asking a cell: its replicas are tried in turn, and the same request id goes to each of them.

use crate::context::Context;
use crate::duration::Millis;
use crate::pair::{self, Validity};
use ambit_identity::tls::certified;
use ambit_identity::{Expect, SharedTrust, Trust, TrustStore};
use ambit_model::bundle::{Bundle, Own};
use ambit_model::{Code, Refusal};
use ambit_proto::status::from_status;
use ambit_proto::v1;
use ambit_transport::{Dialer, Identity};
use std::collections::BTreeMap;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tonic::transport::Channel;
use tonic::{Response, Status};

/// A list of all entries or nodes may be long; gRPC's own default of 4 MiB holds about 20 000 entries.
pub const ANSWER_BYTES_MAX: usize = 64 << 20;
/// A replica that accepts and then says nothing must not use up the time of the others.
const TRY_MIN: Duration = Duration::from_secs(1);
/// An election takes a few hundred milliseconds; asking again sooner only adds load.
const PAUSE: Duration = Duration::from_millis(100);

/// A cell as the command line sees it. Cheap to clone.
#[derive(Clone)]
pub struct Cell {
    inner: Arc<Inner>,
}

struct Inner {
    context: Context,
    validity: Validity,
    trust: SharedTrust,
    dialer: Dialer,
    timeout: Duration,
    /// One connection per replica, kept until it fails.
    channels: Mutex<BTreeMap<SocketAddr, Channel>>,
}

/// Sends one request by the client of `$service`, to each replica in turn: `ask!(cell, PolicyRegistry.list(request))`.
#[macro_export]
macro_rules! ask {
    ($cell:expr, $service:ident.$method:ident($request:expr)) => {{
        let request = $request;
        $cell
            .call(|channel| {
                let request = request.clone();
                async move { $crate::client!($service, channel).$method(request).await }
            })
            .await
    }};
}

/// Sends one request to the replica at `$address` only.
#[macro_export]
macro_rules! ask_at {
    ($cell:expr, $address:expr, $service:ident.$method:ident($request:expr)) => {{
        let request = $request;
        $cell
            .call_at($address, |channel| {
                let request = request.clone();
                async move { $crate::client!($service, channel).$method(request).await }
            })
            .await
    }};
}

/// The client of a service over a channel.
#[doc(hidden)]
#[macro_export]
macro_rules! client {
    (ClusterRegistry, $c:expr) => {
        ambit_proto::v1::cluster_registry_client::ClusterRegistryClient::new($c)
    };
    (Traffic, $c:expr) => {
        ambit_proto::v1::traffic_client::TrafficClient::new($c)
    };
    (NodeAttestation, $c:expr) => {
        ambit_proto::v1::node_attestation_client::NodeAttestationClient::new($c)
            .max_decoding_message_size($crate::cell::ANSWER_BYTES_MAX)
    };
    (Appraisal, $c:expr) => {
        ambit_proto::v1::appraisal_client::AppraisalClient::new($c)
            .max_decoding_message_size($crate::cell::ANSWER_BYTES_MAX)
    };
    (EntryRegistry, $c:expr) => {
        ambit_proto::v1::entry_registry_client::EntryRegistryClient::new($c)
            .max_decoding_message_size($crate::cell::ANSWER_BYTES_MAX)
    };
    (Svid, $c:expr) => {
        ambit_proto::v1::svid_client::SvidClient::new($c).max_decoding_message_size($crate::cell::ANSWER_BYTES_MAX)
    };
    (BundleRegistry, $c:expr) => {
        ambit_proto::v1::bundle_registry_client::BundleRegistryClient::new($c)
    };
    (LocalAuthority, $c:expr) => {
        ambit_proto::v1::local_authority_client::LocalAuthorityClient::new($c)
    };
    (PolicyRegistry, $c:expr) => {
        ambit_proto::v1::policy_registry_client::PolicyRegistryClient::new($c)
            .max_decoding_message_size($crate::cell::ANSWER_BYTES_MAX)
    };
    (Membership, $c:expr) => {
        ambit_proto::v1::membership_client::MembershipClient::new($c)
    };
    (Watch, $c:expr) => {
        ambit_proto::v1::watch_client::WatchClient::new($c)
    };
    (Administrators, $c:expr) => {
        ambit_proto::v1::administrators_client::AdministratorsClient::new($c)
    };
    (Revocation, $c:expr) => {
        ambit_proto::v1::revocation_client::RevocationClient::new($c)
            .max_decoding_message_size($crate::cell::ANSWER_BYTES_MAX)
    };
    (TrustDomainRegistry, $c:expr) => {
        ambit_proto::v1::trust_domain_registry_client::TrustDomainRegistryClient::new($c)
            .max_decoding_message_size($crate::cell::ANSWER_BYTES_MAX)
    };
    (Audit, $c:expr) => {
        ambit_proto::v1::audit_client::AuditClient::new($c).max_decoding_message_size($crate::cell::ANSWER_BYTES_MAX)
    };
    (Drill, $c:expr) => {
        ambit_proto::v1::drill_client::DrillClient::new($c)
    };
}

impl Cell {
    /// The cell of a context, with the administrator's certificate beside it. Nothing is sent yet.
    pub fn open(context: Context, timeout: Duration) -> Result<Cell, Refusal> {
        let (chain, key) = pair::read(&context.folder)?;
        let validity = Validity::of(&chain)?;
        let identity = certified(chain, &key)?;
        let trust = SharedTrust::new(Trust::Pinned(context.trust_domain.clone(), context.fingerprint));
        let dialer = Dialer::new(trust.clone(), Identity::new(Some(identity)));
        Ok(Cell { inner: Arc::new(Inner { context, validity, trust, dialer, timeout, channels: Mutex::default() }) })
    }

    /// From here on the roots in the cell's bundle are trusted, as who is trusted already tells it: the pinned one, and the
    /// one that takes its place.
    pub async fn trust_bundle(&self) -> Result<(), Refusal> {
        let trust_domain = self.inner.context.trust_domain.clone();
        let request = v1::GetBundleRequest { trust_domain: trust_domain.to_string() };
        let bundle = ask!(self, BundleRegistry.get_bundle(request))?;
        let bundle: Bundle<Own> = Bundle::new(trust_domain, bundle.sequence, bundle.roots_der);
        self.inner.trust.replace(Trust::Bundles(TrustStore::new(&bundle)?));
        Ok(())
    }

    /// Which cell, and where.
    pub fn context(&self) -> &Context {
        &self.inner.context
    }

    /// When the administrator's certificate is valid.
    pub fn validity(&self) -> Validity {
        self.inner.validity
    }

    /// Asks the replicas in turn. While one at least answers `busy` or `unavailable` (an election, say) the round is
    /// repeated until the time is up; where none can be reached at all, one round is enough.
    pub async fn call<T, F>(&self, ask: impl Fn(Channel) -> F) -> Result<T, Refusal>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let deadline = Instant::now() + self.inner.timeout;
        let addresses = &self.inner.context.addresses;
        let share = self.inner.timeout / u32::try_from(addresses.len()).unwrap_or(1).max(1);
        loop {
            let mut last = None;
            let mut answered = false;
            for address in addresses {
                let until = (Instant::now() + share.max(TRY_MIN)).min(deadline);
                match timeout_at(until, self.attempt(*address, &ask)).await {
                    Ok(Ok(reply)) => return Ok(reply),
                    Ok(Err(Attempt::Refused(refusal))) => return Err(refusal),
                    Ok(Err(Attempt::Later(refusal))) => {
                        answered = true;
                        last = Some(refusal);
                    }
                    Ok(Err(Attempt::Unreachable(refusal))) => last = last.or(Some(refusal)),
                    Err(_elapsed) => last = last.or(Some(no_answer(*address))),
                }
            }
            if !answered || Instant::now() + PAUSE >= deadline {
                return Err(last.unwrap_or_else(|| Refusal::new(Code::Unavailable, "a replica that answers", "none")));
            }
            sleep(PAUSE).await;
        }
    }

    /// Asks one replica, once.
    pub async fn call_at<T, F>(&self, address: SocketAddr, ask: impl Fn(Channel) -> F) -> Result<T, Refusal>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        match timeout(self.inner.timeout, self.attempt(address, &ask)).await {
            Ok(Ok(reply)) => Ok(reply),
            Ok(Err(Attempt::Refused(r) | Attempt::Later(r) | Attempt::Unreachable(r))) => Err(r),
            Err(_elapsed) => Err(no_answer(address)),
        }
    }

    async fn attempt<T, F>(&self, address: SocketAddr, ask: &impl Fn(Channel) -> F) -> Result<T, Attempt>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let channel = self.channel(address).await?;
        let status = match ask(channel).await {
            Ok(reply) => return Ok(reply.into_inner()),
            Err(status) => status,
        };
        let refusal = from_status(&status);
        match refusal.code {
            Code::Busy | Code::Unavailable | Code::Internal | Code::IssuerUnavailable => {
                // Only a server's own refusal carries a code in its trailers; the rest is a connection that broke.
                let from_server = status.metadata().contains_key("ambit-code");
                if from_server {
                    Err(Attempt::Later(refusal))
                } else {
                    self.channels().remove(&address);
                    let found = format!("{} from {address}", refusal.found);
                    Err(Attempt::Unreachable(Refusal::new(refusal.code, refusal.expected, found)))
                }
            }
            _ => Err(Attempt::Refused(refusal)),
        }
    }

    async fn channel(&self, address: SocketAddr) -> Result<Channel, Attempt> {
        if let Some(channel) = self.channels().get(&address) {
            return Ok(channel.clone());
        }
        let expect = Expect::ReplicaOf(self.inner.context.trust_domain.clone());
        let channel = self.inner.dialer.channel(address, expect).await.map_err(|refusal| match refusal.code {
            Code::Unavailable | Code::Busy => Attempt::Unreachable(refusal),
            // Another cell, or no cell, answers at that address: never passed over in silence.
            _ => Attempt::Refused(refusal),
        })?;
        self.channels().insert(address, channel.clone());
        Ok(channel)
    }

    fn channels(&self) -> std::sync::MutexGuard<'_, BTreeMap<SocketAddr, Channel>> {
        self.inner.channels.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

enum Attempt {
    /// The cell's answer is no.
    Refused(Refusal),
    /// This replica cannot at the moment.
    Later(Refusal),
    /// Nobody there.
    Unreachable(Refusal),
}

fn no_answer(address: SocketAddr) -> Refusal {
    Refusal::new(Code::Unavailable, format!("an answer from {address} in time"), "none")
}

/// A fresh request id.
pub fn request_id() -> Result<Vec<u8>, Refusal> {
    let mut id = vec![0u8; 16];
    aws_lc_rs::rand::fill(&mut id).map_err(|_| Refusal::new(Code::Internal, "random bytes", "none"))?;
    Ok(id)
}

/// A time as the wire has it: whole seconds, at least one.
pub fn seconds(time: Millis) -> Result<u32, Refusal> {
    match u32::try_from(time.0 / 1000) {
        Ok(s) if s > 0 && time.0.is_multiple_of(1000) => Ok(s),
        _ => Err(Refusal::new(Code::BadRequest, "a time in whole seconds", time.to_string())),
    }
}
