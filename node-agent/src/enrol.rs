//! Enrolment: proves to the cell what this machine is, and comes back with the node's SVID (design.md section 3).
//!
//! First contact trusts nothing but the trust domain's name and its root's fingerprint, both pinned in the
//! configuration. The node key is made in memory or in the TPM, certified by the quote, and never written down.

use crate::backoff::{Backoff, random};
use crate::clock::Clock;
use crate::config::Config;
use crate::kernel::chain as causes;
use crate::logs;
use crate::metrics::METRICS;
use crate::node_key::NodeKey;
use crate::reattest::{CHUNK_BYTES, Turn};
use ambit_identity::{Expect, SharedTrust, Trust, TrustStore, fingerprint};
use ambit_model::refusal::Class;
use ambit_model::{Bundle, Code, Generation, NodeId, Own, Refusal, Stamp};
use ambit_proto::convert;
use ambit_proto::status::from_status;
use ambit_proto::v1::node_attestation_client::NodeAttestationClient;
use ambit_proto::v1::{
    BeginRequest, Challenge, Denied, EvidenceHeader, EvidenceRequest, PcrValue, Verdict, begin_response,
    evidence_request, evidence_response,
};
use ambit_tpm::{Attester, Bank, TpmError};
use ambit_transport::{Dialer, Identity};
use ambit_verify::transcript::{Binding, Transcript, qualifying_data};
use ambit_verify::{BOOT_LOG_BYTES_MAX, IMA_LOG_BYTES_MAX, LogExtent, Public};
use rustls::sign::CertifiedKey;
use rustls_pki_types::CertificateDer;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tonic::transport::Channel;

/// One call: a Raft commit and, for Evidence, a replay of the logs.
const CALL_MAX: Duration = Duration::from_secs(20);
/// Between attempts while the cell is away.
const RETRY_BASE: Duration = Duration::from_millis(200);
const RETRY_CAP: Duration = Duration::from_secs(5);

/// A node as its cell knows it.
#[derive(Clone, Debug)]
pub struct Enrolled {
    /// SHA-256 of its EK.
    pub node: NodeId,
    /// Which of its admissions.
    pub generation: Generation,
    /// The name of its AK, which every quote is bound to.
    pub ak_name: Vec<u8>,
    /// What it shows on its stream.
    pub identity: Arc<CertifiedKey>,
    /// The own trust domain's roots.
    pub bundle: Bundle<Own>,
    /// The intermediate that signed it (key identifier, hex).
    pub authority: String,
    /// When it was issued, by our clock.
    pub since: Stamp,
    /// When it ends.
    pub not_after: Stamp,
}

/// A refusal together with what diverged, as far as a node is told.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{refusal}{}", if diverged.is_empty() { String::new() } else { format!("; diverged: {diverged}") })]
pub struct NotEnrolled {
    /// Code and remedy.
    pub refusal: Refusal,
    /// The event or PCR where the logs diverged; empty where that is not told.
    pub diverged: String,
}

impl From<Refusal> for NotEnrolled {
    fn from(refusal: Refusal) -> Self {
        Self { refusal, diverged: String::new() }
    }
}

impl NotEnrolled {
    /// Whether the same attempt may succeed later without anybody's doing.
    pub fn is_passing(&self) -> bool {
        self.refusal.code.class() == Class::Unavailable
            || matches!(self.refusal.code, Code::StaleAppraisal | Code::TicketExpired)
    }
}

/// Enrols this node with any server of the list. Returns at the first denial; waits out what passes.
/// `trust`: what is pinned at first contact, and from then on what the cell's bundles say: a pinned root is replaced one day.
pub async fn enrol(
    config: &Config,
    attester: &Attester,
    turn: &Turn,
    clock: &Clock,
    trust: &SharedTrust,
) -> Result<Enrolled, NotEnrolled> {
    let mut backoff = Backoff::new(RETRY_BASE, RETRY_CAP);
    let mut at = usize::try_from(random() % 1024).unwrap_or_default();
    loop {
        let Some(server) = config.servers.get(at % config.servers.len().max(1)).copied() else {
            return Err(Refusal::new(Code::ConfigInvalid, "a server", "none").into());
        };
        match once(config, attester, turn, clock, trust, server).await {
            Ok(enrolled) => {
                METRICS.enrolments.inc(["ok"]);
                return Ok(enrolled);
            }
            Err(denied) if denied.is_passing() => {
                METRICS.enrolments.inc([denied.refusal.code.as_str()]);
                at = at.wrapping_add(1);
                let wait = backoff.next(random());
                tracing::warn!(%server, error = %denied, wait_ms = wait.as_millis(), "not enrolled yet");
                tokio::time::sleep(wait).await;
            }
            Err(denied) => {
                METRICS.enrolments.inc([denied.refusal.code.as_str()]);
                return Err(denied);
            }
        }
    }
}

async fn once(
    config: &Config,
    attester: &Attester,
    turn: &Turn,
    clock: &Clock,
    trust: &SharedTrust,
    server: SocketAddr,
) -> Result<Enrolled, NotEnrolled> {
    let dialer = Dialer::new(trust.clone(), Identity::default());
    let channel = dialer.channel(server, Expect::ReplicaOf(config.trust_domain.clone())).await?;
    let mut client = NodeAttestationClient::new(channel);
    let begun = std::time::Instant::now();
    // What the TPM takes is told apart: it is the machine's, not ours.
    let mut in_tpm = std::time::Duration::ZERO;
    let started = std::time::Instant::now();
    let me = attester.identity().await.map_err(tpm)?;
    in_tpm += started.elapsed();
    let agent_nonce = nonce()?;
    let join_token = join_token(config)?;
    let challenge = begin(
        &mut client,
        BeginRequest {
            cluster: config.cluster.to_string(),
            // None is an EK that only an allow-list can know.
            ek_certificate: me.ek_certificate.clone().unwrap_or_default(),
            ek_intermediates: vec![],
            ek_public: me.ek_public.clone(),
            ak_public: me.ak_public.clone(),
            agent_nonce: agent_nonce.to_vec(),
            join_token: join_token.clone(),
        },
    )
    .await?;
    let started = std::time::Instant::now();
    let key = NodeKey::generate(config.node_key, attester).await?;
    let csr = key.csr().await?;
    let activated = attester.activate(challenge.credential_blob.clone(), challenge.encrypted_secret.clone()).await;
    let secret = activated.map_err(tpm)?;
    in_tpm += started.elapsed();
    let ticket_sha256 = fingerprint(&challenge.ticket);
    let server_nonce =
        challenge.server_nonce.as_slice().try_into().map_err(|_| malformed("a server nonce of 32 bytes"))?;
    let ak_name = Public::name_of(&me.ak_public)?;
    let qualifying = qualifying_data(&Binding {
        agent_nonce: &agent_nonce,
        server_nonce: &server_nonce,
        ticket_sha256: &ticket_sha256,
        csr_spki: &ambit_verify::csr::p256_spki(&csr)?,
        cluster: &config.cluster,
        ak_name: &ak_name,
    });
    let bank = Bank::from_text(&challenge.bank).ok_or_else(|| malformed("the bank sha256 or sha384"))?;
    // Until the verdict: no round's quote may overtake this one.
    let _turn = turn.take().await;
    let started = std::time::Instant::now();
    let quote = attester.quote(bank, challenge.pcr_mask, qualifying).await.map_err(tpm)?;
    let svid_key = key.home(qualifying).await?;
    in_tpm += started.elapsed();
    // After the quote, so that the log holds at least what PCR 10 does; the verifier takes the prefix that matches.
    let boot_log = logs::read(&config.boot_log, 0, BOOT_LOG_BYTES_MAX)?;
    let ima_log = logs::read(&config.ima_log, challenge.ima_offset, IMA_LOG_BYTES_MAX)?;
    let transcript = Transcript {
        ticket_sha256,
        csr: &csr,
        quote: &quote.attest,
        signature: &quote.signature,
        pcrs: &quote.pcrs,
        boot_log: extent(&boot_log),
        ima_log: extent(&ima_log),
        svid_key: &svid_key,
    };
    let ((svid_public, svid_certify, svid_certify_signature), _) = svid_key.to_wire();
    let header = EvidenceHeader {
        hmac: transcript.hmac(&secret).to_vec(),
        ticket: challenge.ticket,
        csr: csr.clone(),
        quote: quote.attest.clone(),
        signature: quote.signature.clone(),
        pcrs: quote.pcrs.iter().map(|(index, value)| PcrValue { index: *index, value: value.clone() }).collect(),
        boot_log_len: transcript.boot_log.len,
        boot_log_sha256: transcript.boot_log.sha256.to_vec(),
        ima_log_len: transcript.ima_log.len,
        ima_log_sha256: transcript.ima_log.sha256.to_vec(),
        join_token,
        ek_public: me.ek_public.clone(),
        ak_public: me.ak_public.clone(),
        svid_public,
        svid_certify,
        svid_certify_signature,
        ..Default::default()
    };
    let verdict = evidence(&mut client, header, &boot_log, &ima_log).await?;
    let enrolled = accept(config, &trust.current(), &key, ak_name, verdict, clock.now())?;
    tracing::info!(node = %enrolled.node, generation = enrolled.generation.0, took_ms = begun.elapsed().as_millis() as u64, tpm_ms = in_tpm.as_millis() as u64, "enrolled");
    Ok(enrolled)
}

async fn begin(client: &mut NodeAttestationClient<Channel>, request: BeginRequest) -> Result<Challenge, NotEnrolled> {
    let answer = tokio::time::timeout(CALL_MAX, client.begin(request)).await.map_err(|_| silence())?;
    match answer.map_err(|s| from_status(&s))?.into_inner().result {
        Some(begin_response::Result::Challenge(challenge)) => Ok(challenge),
        Some(begin_response::Result::Denied(denied)) => Err(not_enrolled(denied)),
        None => Err(malformed("a challenge or a denial").into()),
    }
}

async fn evidence(
    client: &mut NodeAttestationClient<Channel>,
    header: EvidenceHeader,
    boot_log: &[u8],
    ima_log: &[u8],
) -> Result<Verdict, NotEnrolled> {
    let chunks = boot_log.chunks(CHUNK_BYTES).chain(ima_log.chunks(CHUNK_BYTES)).map(<[u8]>::to_vec);
    let parts: Vec<EvidenceRequest> = std::iter::once(evidence_request::Part::Header(header))
        .chain(chunks.map(evidence_request::Part::Chunk))
        .map(|part| EvidenceRequest { part: Some(part) })
        .collect();
    let answer =
        tokio::time::timeout(CALL_MAX, client.evidence(tokio_stream::iter(parts))).await.map_err(|_| silence())?;
    match answer.map_err(|s| from_status(&s))?.into_inner().result {
        Some(evidence_response::Result::Verdict(verdict)) => Ok(verdict),
        Some(evidence_response::Result::Denied(denied)) => Err(not_enrolled(denied)),
        None => Err(malformed("a verdict or a denial").into()),
    }
}

/// Takes the verdict only if it is of a root that is trusted already, of this key and of this node.
fn accept(
    config: &Config,
    trust: &Trust,
    key: &NodeKey,
    ak_name: Vec<u8>,
    verdict: Verdict,
    now: Stamp,
) -> Result<Enrolled, Refusal> {
    let bundle: Bundle<Own> = convert::bundle(verdict.bundle.as_ref().ok_or_else(|| malformed("a bundle"))?)?;
    if *bundle.trust_domain() != config.trust_domain {
        return Err(Refusal::new(
            Code::TrustDomainUnknown,
            config.trust_domain.as_str(),
            bundle.trust_domain().as_str(),
        ));
    }
    // Later on the bundle comes from a replica that the former bundle vouched for, and the pinned root may be gone.
    if let Trust::Pinned(_, pinned) = trust
        && !bundle.roots().iter().any(|root| fingerprint(root) == *pinned)
    {
        let found = format!("{} other roots", bundle.roots().len());
        return Err(Refusal::new(Code::FingerprintMismatch, hex::encode(pinned), found));
    }
    let node: NodeId = verdict.node_id.parse()?;
    let chain: Vec<CertificateDer<'static>> = verdict.svid_chain_der.into_iter().map(CertificateDer::from).collect();
    let peer = Trust::Bundles(TrustStore::new(&bundle)?).verify(&chain, now)?;
    let expected = config.trust_domain.member(&format!("/ambit/node/{node}"))?;
    if *peer.id() != expected {
        return Err(Refusal::new(Code::SvidUntrusted, expected.as_str(), peer.id().as_str()));
    }
    Ok(Enrolled {
        node,
        generation: Generation(verdict.generation),
        ak_name,
        identity: key.certified(chain)?,
        bundle,
        authority: peer.authority().to_owned(),
        since: now,
        not_after: peer.not_after(),
    })
}

fn not_enrolled(denied: Denied) -> NotEnrolled {
    let known = Code::from_text(&denied.code);
    let code = known.unwrap_or(Code::PermissionDenied);
    let found = if known.is_none() { format!("{}: {}", denied.code, denied.remedy) } else { String::new() };
    NotEnrolled { refusal: Refusal::new(code, "", found), diverged: denied.diverged }
}

fn join_token(config: &Config) -> Result<String, Refusal> {
    let Some(path) = &config.join_token_file else { return Ok(String::new()) };
    match std::fs::read_to_string(path) {
        Ok(token) => Ok(token.trim().to_owned()),
        // It may be removed once it was used.
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(String::new()),
        Err(e) => Err(Refusal::new(Code::ConfigInvalid, format!("a join token in {}", path.display()), e.to_string())),
    }
}

fn extent(log: &[u8]) -> LogExtent {
    LogExtent { len: log.len() as u64, sha256: fingerprint(log) }
}

fn nonce() -> Result<[u8; 32], Refusal> {
    let mut bytes = [0u8; 32];
    aws_lc_rs::rand::fill(&mut bytes).map_err(|_| Refusal::new(Code::Internal, "32 random bytes", "none"))?;
    Ok(bytes)
}

/// A TPM that does not answer now may answer later; nothing about the node is decided by it.
pub(crate) fn tpm(error: TpmError) -> Refusal {
    Refusal::new(Code::Unavailable, "an answer of the TPM", causes(&error))
}

fn malformed(expected: &str) -> Refusal {
    Refusal::new(Code::Internal, expected, "another message from the server")
}

fn silence() -> Refusal {
    Refusal::new(Code::Unavailable, "an answer", format!("none in {CALL_MAX:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_denial_keeps_its_code_and_what_diverged() {
        let denied = |code: &str| {
            not_enrolled(Denied { code: code.into(), remedy: "do this".into(), diverged: "event 7 of PCR 4".into() })
        };
        let altered = denied("boot_log_event_altered");
        assert_eq!(altered.refusal.code, Code::BootLogEventAltered);
        let text = altered.to_string();
        assert!(text.starts_with("boot_log_event_altered") && text.contains("event 7 of PCR 4"), "{text}");
        assert!(!altered.is_passing());
        assert!(denied("unavailable").is_passing() && denied("busy").is_passing());
        // A code of a newer server is a denial, and shown.
        let unknown = denied("from_the_future");
        assert!(!unknown.is_passing() && unknown.to_string().contains("from_the_future"));
    }
}
