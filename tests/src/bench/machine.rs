//! One machine of the fleet enrols, over gRPC, as an agent does.

use super::verifier::random;
use crate::cell::Cell;
use crate::machine::evidence;
use crate::soft_tpm::maker::Maker;
use crate::soft_tpm::{PCRS, SoftTpm};
use ambit_identity::tls::{certified, client_config};
use ambit_identity::{Expect, SharedTrust, SvidKey, Trust};
use ambit_lab::tpm::{BOOT_LOG, IMA_LOG};
use ambit_model::Code;
use ambit_proto::status::from_status;
use ambit_proto::v1::node_attestation_client::NodeAttestationClient;
use ambit_proto::v1::{self, begin_response, evidence_request};
use ambit_verify::transcript::{Binding, Transcript, qualifying_data};
use ambit_verify::{KeyHome, LogExtent};
use anyhow::{Context, Result, bail};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use rustls::sign::CertifiedKey;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::net::TcpSocket;
use tokio_rustls::TlsConnector;
use tonic::Status;
use tonic::transport::{Channel, Endpoint, Uri};

/// A replica grants one address 200 calls at once: so many machines come from one address, two calls each, and room.
const MACHINES_PER_DOOR: usize = 80;
/// The budget for strangers answers `busy`; machines come again.
const PATIENCE: Duration = Duration::from_secs(120);
const AGAIN: Duration = Duration::from_millis(250);

/// Connections without a certificate, each from an address of its own.
pub(super) struct Doors {
    all: Vec<Channel>,
}

/// An admitted node, and what it shows.
#[derive(Clone)]
pub(super) struct Enrolled {
    pub(super) tpm: Arc<SoftTpm>,
    pub(super) cluster: String,
    pub(super) generation: u64,
    pub(super) identity: Arc<CertifiedKey>,
}

impl Doors {
    /// As many as `machines` need, spread over the replicas.
    pub(super) async fn open(cell: &Cell, machines: usize) -> Result<Doors> {
        let mut all = Vec::new();
        for n in 0..machines.div_ceil(MACHINES_PER_DOOR).max(cell.size()) {
            // 127.0.0.0/8 is this machine's own.
            let third = u8::try_from(n / 250 + 1)?;
            let source = Ipv4Addr::new(127, 9, third, u8::try_from(n % 250 + 1)?);
            all.push(dial(cell, cell.address(n % cell.size() + 1)?, source).await?);
        }
        Ok(Doors { all })
    }
    fn door(&self, n: usize) -> Result<Channel> {
        self.all.get(n % self.all.len()).cloned().context("a door")
    }
}

async fn dial(cell: &Cell, at: SocketAddr, source: Ipv4Addr) -> Result<Channel> {
    let trust = SharedTrust::new(Trust::Pinned(cell.trust_domain.clone(), cell.fingerprint));
    let config = client_config(trust, Expect::ReplicaOf(cell.trust_domain.clone()), None, &[b"h2"])?;
    let tls = TlsConnector::from(Arc::new(config));
    let connect = move |_: Uri| {
        let tls = tls.clone();
        async move {
            let socket = TcpSocket::new_v4()?;
            socket.bind((source, 0).into())?;
            let tcp = socket.connect(at).await?;
            tcp.set_nodelay(true)?;
            let stream = tls.connect(ServerName::IpAddress(at.ip().into()), tcp).await?;
            Ok::<_, std::io::Error>(TokioIo::new(stream))
        }
    };
    Ok(Endpoint::from_shared(format!("http://{at}"))?.connect_with_connector(tower::service_fn(connect)).await?)
}

/// Calls until the answer is not `busy` nor anything else that passes.
async fn insist<T, F: Future<Output = Result<T, Status>>>(mut call: impl FnMut() -> F) -> Result<T> {
    let until = Instant::now() + PATIENCE;
    loop {
        match call().await {
            Err(s) if Instant::now() < until && matches!(from_status(&s).code, Code::Busy | Code::Unavailable) => {
                tokio::time::sleep(AGAIN).await;
            }
            answer => return Ok(answer?),
        }
    }
}

/// Both round trips.
pub(super) async fn enrol(
    doors: &Doors,
    n: usize,
    cluster: &str,
    tpm: Arc<SoftTpm>,
    maker: &Maker,
) -> Result<Enrolled> {
    let until = Instant::now() + PATIENCE;
    loop {
        let channel = doors.door(n)?;
        match once(channel, cluster, &tpm, maker).await? {
            Ok((verdict, key)) => {
                let chain = verdict.svid_chain_der.iter().cloned().map(Into::into).collect();
                let identity = certified(chain, &key)?;
                let cluster = cluster.to_owned();
                return Ok(Enrolled { tpm, cluster, generation: verdict.generation, identity });
            }
            // Judged under roots or policies that changed meanwhile.
            Err(denied) if denied.code == "stale_appraisal" && Instant::now() < until => {}
            Err(denied) => bail!("enrolment denied: {denied:?}"),
        }
    }
}

async fn once(
    channel: Channel,
    cluster: &str,
    tpm: &SoftTpm,
    maker: &Maker,
) -> Result<Result<(v1::Verdict, SvidKey), v1::Denied>> {
    let agent_nonce = random::<32>()?;
    let request = v1::BeginRequest {
        cluster: cluster.to_owned(),
        ek_certificate: tpm.ek_certificate.clone(),
        ek_intermediates: vec![maker.intermediate.clone()],
        ek_public: tpm.ek_public.clone(),
        ak_public: tpm.ak_public.clone(),
        agent_nonce: agent_nonce.to_vec(),
        join_token: String::new(),
    };
    let answer = insist(|| {
        let (mut client, request) = (NodeAttestationClient::new(channel.clone()), request.clone());
        async move { client.begin(request).await }
    });
    let challenge = match answer.await?.into_inner().result {
        Some(begin_response::Result::Challenge(challenge)) => challenge,
        Some(begin_response::Result::Denied(denied)) => return Ok(Err(denied)),
        None => bail!("neither challenge nor denial"),
    };
    let key = SvidKey::generate()?;
    let frames = frames(tpm, cluster, &agent_nonce, &challenge, &key.csr()?)?;
    let judged = insist(|| evidence(channel.clone(), &frames)).await?;
    Ok(judged.map(|verdict| (verdict, key)))
}

/// Activates the credential, quotes, and puts the evidence together.
fn frames(
    tpm: &SoftTpm,
    cluster: &str,
    agent_nonce: &[u8; 32],
    challenge: &v1::Challenge,
    csr: &[u8],
) -> Result<Vec<v1::EvidenceRequest>> {
    let secret = tpm.activate(&challenge.credential_blob, &challenge.encrypted_secret)?;
    let ticket_sha256 = ambit_verify::hash::sha256(&challenge.ticket);
    let quoted = tpm.quote(&qualifying_data(&Binding {
        agent_nonce,
        server_nonce: challenge.server_nonce.as_slice().try_into()?,
        ticket_sha256: &ticket_sha256,
        csr_spki: &ambit_verify::csr::p256_spki(csr)?,
        cluster: &cluster.parse()?,
        ak_name: &tpm.ak_name,
    }))?;
    let transcript = Transcript {
        ticket_sha256,
        csr,
        quote: &quoted.attest,
        signature: &quoted.signature,
        pcrs: &PCRS,
        boot_log: LogExtent::of(BOOT_LOG),
        ima_log: LogExtent::of(IMA_LOG),
        svid_key: &KeyHome::InMemory,
    };
    let header = v1::EvidenceHeader {
        hmac: transcript.hmac(&secret).to_vec(),
        ticket: challenge.ticket.clone(),
        csr: csr.to_vec(),
        quote: quoted.attest.clone(),
        signature: quoted.signature.clone(),
        pcrs: pcrs(),
        boot_log_len: transcript.boot_log.len,
        boot_log_sha256: transcript.boot_log.sha256.to_vec(),
        ima_log_len: transcript.ima_log.len,
        ima_log_sha256: transcript.ima_log.sha256.to_vec(),
        ek_public: tpm.ek_public.clone(),
        ak_public: tpm.ak_public.clone(),
        ..Default::default()
    };
    let logs = [BOOT_LOG, IMA_LOG].map(|log| evidence_request::Part::Chunk(log.to_vec()));
    let parts = std::iter::once(evidence_request::Part::Header(header)).chain(logs);
    Ok(parts.map(|part| v1::EvidenceRequest { part: Some(part) }).collect())
}

/// The quoted PCRs as they travel.
pub(super) fn pcrs() -> Vec<v1::PcrValue> {
    PCRS.iter().map(|(index, value)| v1::PcrValue { index: *index, value: value.clone() }).collect()
}
