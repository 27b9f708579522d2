//! A replica proves by its TPM what it booted, and that the TPM holds the key to which the cell wraps: the exchange of
//! design.md section 3, in the cluster of replicas. The judge is another replica, or this one while it is alone.

use super::Replica;
use crate::config::Config;
use ambit_identity::{SvidKey, fingerprint};
use ambit_model::{Code, Refusal};
use ambit_proto::status::from_status;
use ambit_proto::v1::node_attestation_client::NodeAttestationClient;
use ambit_proto::v1::{
    BeginRequest, Challenge, Denied, EvidenceHeader, EvidenceRequest, PcrValue, begin_response, evidence_request,
    evidence_response,
};
use ambit_state::sealing::{REPLICAS, replicas_cluster};
use ambit_tpm::{Attester, Bank, TpmWrapKey};
use ambit_verify::transcript::{Binding, Transcript, qualifying_data};
use ambit_verify::{BOOT_LOG_BYTES_MAX, IMA_LOG_BYTES_MAX, KeyHome, LogExtent, Public};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tonic::transport::Channel;

/// A call takes a Raft commit, and Evidence a replay of the logs.
const CALL_MAX: Duration = Duration::from_secs(20);
/// Between attempts: an operator who writes the policy sees the replica attested soon after.
const RETRY: Duration = Duration::from_secs(3);
/// As the agent sends logs.
const CHUNK_BYTES: usize = 256 * 1024;

/// What is attested with.
pub struct Prover<'a> {
    /// The TPM.
    pub attester: &'a Attester,
    /// The key to which the cell wraps.
    pub wrap_key: &'a TpmWrapKey,
    /// The replica's TLS key, which the quote is bound to.
    pub tls: &'a SvidKey,
    /// The machine's logs.
    pub boot_log: &'a Path,
    /// See `boot_log`.
    pub ima_log: &'a Path,
    /// The token that a replica is to join with; empty for a replica of the cell.
    pub token: &'a str,
}

/// The machine's logs, for as long as the replica runs.
#[derive(Clone, Debug)]
pub struct Logs {
    boot: PathBuf,
    ima: PathBuf,
}

impl Logs {
    /// As configured.
    pub fn of(config: &Config) -> Logs {
        Logs { boot: config.boot_log.clone(), ima: config.ima_log.clone() }
    }
}

fn tpm(e: ambit_tpm::TpmError) -> Refusal {
    super::keyring::unanswered(&e)
}

fn malformed(expected: &str) -> Refusal {
    Refusal::new(Code::Internal, expected, "another answer")
}

fn silence() -> Refusal {
    Refusal::new(Code::Unavailable, "an answer", format!("none in {CALL_MAX:?}"))
}

fn refused(denied: &Denied) -> Refusal {
    let code = Code::from_text(&denied.code).unwrap_or(Code::PermissionDenied);
    let diverged = if denied.diverged.is_empty() { "the cell's audit record says why" } else { &denied.diverged };
    Refusal::new(
        code,
        format!("a machine that the policy {REPLICAS} accepts, on the allow-list of its cluster"),
        diverged,
    )
}

impl Prover<'_> {
    /// Both round trips. The EK's id, which an operator puts on the allow-list, is in the refusal where it is not there.
    ///
    /// # Errors
    /// What kept it from being judged; inside, what the judge said no for.
    pub async fn prove(&self, channel: Channel) -> Result<Result<(), Refusal>, Refusal> {
        let mut client = NodeAttestationClient::new(channel);
        let me = self.attester.identity().await.map_err(tpm)?;
        let agent_nonce = super::random::<32>()?;
        let begin = BeginRequest {
            cluster: REPLICAS.to_owned(),
            ek_certificate: me.ek_certificate.clone().unwrap_or_default(),
            ek_intermediates: vec![],
            ek_public: me.ek_public.clone(),
            ak_public: me.ak_public.clone(),
            agent_nonce: agent_nonce.to_vec(),
            join_token: String::new(),
        };
        let answer = tokio::time::timeout(CALL_MAX, client.begin(begin)).await.map_err(|_| silence())?;
        let challenge = match answer.map_err(|s| from_status(&s))?.into_inner().result {
            Some(begin_response::Result::Challenge(challenge)) => challenge,
            Some(begin_response::Result::Denied(denied)) => {
                let ek = ambit_verify::node_id(&me.ek_public).map(|id| id.to_string()).unwrap_or_default();
                return Ok(Err(Refusal { found: format!("EK {ek}"), ..refused(&denied) }));
            }
            None => return Err(malformed("a challenge or a denial")),
        };
        let (header, boot_log, ima_log) = self.evidence(me, &agent_nonce, challenge).await?;
        let chunks = boot_log.chunks(CHUNK_BYTES).chain(ima_log.chunks(CHUNK_BYTES)).map(<[u8]>::to_vec);
        let parts: Vec<EvidenceRequest> = std::iter::once(evidence_request::Part::Header(header))
            .chain(chunks.map(evidence_request::Part::Chunk))
            .map(|part| EvidenceRequest { part: Some(part) })
            .collect();
        let sent = tokio::time::timeout(CALL_MAX, client.evidence(tokio_stream::iter(parts)));
        match sent.await.map_err(|_| silence())?.map_err(|s| from_status(&s))?.into_inner().result {
            Some(evidence_response::Result::Verdict(_)) => Ok(Ok(())),
            Some(evidence_response::Result::Denied(denied)) => Ok(Err(refused(&denied))),
            None => Err(malformed("a verdict or a denial")),
        }
    }

    async fn evidence(
        &self,
        me: ambit_tpm::TpmIdentity,
        agent_nonce: &[u8; 32],
        challenge: Challenge,
    ) -> Result<(EvidenceHeader, Vec<u8>, Vec<u8>), Refusal> {
        let csr = self.tls.csr()?;
        let activated = self.attester.activate(challenge.credential_blob.clone(), challenge.encrypted_secret.clone());
        let secret = activated.await.map_err(tpm)?;
        let ticket_sha256 = fingerprint(&challenge.ticket);
        let server_nonce =
            challenge.server_nonce.as_slice().try_into().map_err(|_| malformed("a server nonce of 32 bytes"))?;
        let qualifying = qualifying_data(&Binding {
            agent_nonce,
            server_nonce: &server_nonce,
            ticket_sha256: &ticket_sha256,
            csr_spki: &ambit_verify::csr::p256_spki(&csr)?,
            cluster: &replicas_cluster()?,
            ak_name: &Public::name_of(&me.ak_public)?,
        });
        let bank = Bank::from_text(&challenge.bank).ok_or_else(|| malformed("the bank sha256 or sha384"))?;
        let quote = self.attester.quote(bank, challenge.pcr_mask, qualifying).await.map_err(tpm)?;
        let certified = self.wrap_key.certify(qualifying).await.map_err(tpm)?;
        let certified = (certified.public, certified.attest, certified.signature);
        let svid_key = KeyHome::from_wire(Default::default(), certified.clone())?;
        // After the quote, so that the log holds at least what PCR 10 does.
        let boot_log = read(self.boot_log, BOOT_LOG_BYTES_MAX)?;
        let ima_log = read(self.ima_log, IMA_LOG_BYTES_MAX)?;
        let transcript = Transcript {
            ticket_sha256,
            csr: &csr,
            quote: &quote.attest,
            signature: &quote.signature,
            pcrs: &quote.pcrs,
            boot_log: LogExtent::of(&boot_log),
            ima_log: LogExtent::of(&ima_log),
            svid_key: &svid_key,
        };
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
            join_token: self.token.to_owned(),
            ek_public: me.ek_public,
            ak_public: me.ak_public,
            wrap_public: certified.0,
            wrap_certify: certified.1,
            wrap_certify_signature: certified.2,
            ..Default::default()
        };
        Ok((header, boot_log, ima_log))
    }
}

/// A log that does not exist is an empty one: whether a machine may be without is for the policy to say.
fn read(path: &Path, bytes_max: u64) -> Result<Vec<u8>, Refusal> {
    let unreadable = |e: std::io::Error| {
        Refusal::new(Code::ConfigInvalid, format!("a readable log {}", path.display()), e.to_string())
    };
    let mut bytes = Vec::new();
    match std::fs::File::open(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(bytes),
        file => file.map_err(unreadable)?.take(bytes_max + 1).read_to_end(&mut bytes).map_err(unreadable)?,
    };
    if bytes.len() as u64 > bytes_max {
        return Err(Refusal::new(Code::EvidenceTooLarge, format!("at most {bytes_max} bytes"), "more"));
    }
    Ok(bytes)
}

/// Attests once after each start, since what booted may be another, and again whenever what was proved does not hold: the key
/// is another, or the policy is. Removes the unsealed keys once the cell has sealed the root.
pub(super) async fn run(replica: Replica) {
    let Some((attester, wrap_key)) = replica.keyring().in_tpm() else { return };
    let (mut fresh, mut told) = (true, None);
    loop {
        if due(&replica, wrap_key.point(), fresh) {
            let outcome = attest(&replica, attester, wrap_key).await;
            match &outcome {
                Ok(()) => {
                    fresh = false;
                    tracing::info!("this replica is attested");
                }
                // The same once and not every few seconds.
                Err(refusal) if told.as_ref() != Some(refusal) => {
                    tracing::warn!(%refusal, "this replica is not attested")
                }
                Err(_) => {}
            }
            told = outcome.err();
        }
        if let Err(refusal) = super::seal::forget_unsealed(&replica).await {
            tracing::warn!(%refusal, "keys in files are not removed yet");
        }
        tokio::time::sleep(RETRY).await;
    }
}

fn due(replica: &Replica, point: &[u8; 65], fresh: bool) -> bool {
    let Ok(cluster) = replicas_cluster() else { return false };
    // Until there is a policy for replicas nobody can judge.
    let Ok(governing) = replica.governing(&cluster) else { return false };
    replica.local(|s| {
        let holds =
            |row: &ambit_state::sealing::AttestedReplica| row.wrap_key == point && governing.accepts(&row.policy);
        s.member(replica.id()).is_some() && (fresh || !s.attested_replica(replica.id()).is_some_and(holds))
    })
}

async fn attest(replica: &Replica, attester: &Attester, wrap_key: &TpmWrapKey) -> Result<(), Refusal> {
    let (tls, logs) = (replica.inner.files.tls()?, &replica.inner.logs);
    let prover = Prover { attester, wrap_key, tls: &tls, boot_log: &logs.boot, ima_log: &logs.ima, token: "" };
    let mut judges = replica.known_members();
    if judges.is_empty() {
        judges.push((replica.id(), replica.address().to_owned()));
    }
    let mut last = Refusal::new(Code::Unavailable, "a replica that judges", "none");
    for (id, address) in judges {
        let channel = match replica.dial_replica(id, &address).await {
            Ok(channel) => channel,
            Err(refusal) => {
                last = refusal;
                continue;
            }
        };
        match prover.prove(channel).await {
            // Who was judged is not judged again by another: each denial is an entry of the log.
            Ok(judged) => return judged,
            Err(refusal) => last = refusal,
        }
    }
    Err(last)
}
