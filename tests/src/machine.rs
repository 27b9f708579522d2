//! A machine that enrols as the agent does, step by step, and can lie at each of them.

use crate::cell::{Cell, fresh};
use crate::tpm::{Maker, Tpm};
use ambit_identity::tls::certified;
use ambit_identity::{SvidKey, fingerprint};
use ambit_lab::{ima, tpm};
use ambit_model::{ClusterId, Code, Refusal};
use ambit_proto::status::from_status;
use ambit_proto::v1::appraisal_client::AppraisalClient;
use ambit_proto::v1::node_attestation_client::NodeAttestationClient;
use ambit_proto::v1::{self, begin_response, evidence_request, evidence_response};
use ambit_tpm::{Attester, Bank, TpmIdentity};
use ambit_transport::Identity;
use ambit_verify::transcript::{Binding, Transcript, qualifying_data};
use ambit_verify::{BeginInput, KeptEvidence, KeyHome, LogExtent, PresentedEk, Public};
use anyhow::{Context, Result, bail};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use tonic::Status;
use tonic::transport::Channel;

const CHUNK_BYTES: usize = 64 * 1024;
/// An election, or the first ticket key.
const PATIENCE: Duration = Duration::from_secs(10);

/// A machine: its TPM and its logs.
pub struct Machine {
    // Replaced when another needs the TPM: swtpm serves one connection at a time.
    attester: Mutex<Attester>,
    identity: TpmIdentity,
    node: String,
    logs: Mutex<Logs>,
    // Ends after the attester's last use of it.
    tpm: Tpm,
}

/// What a machine's kernel shows of its boot and of what ran since.
#[derive(Clone, Debug)]
pub struct Logs {
    /// The TCG2 log.
    pub boot: Vec<u8>,
    /// `binary_runtime_measurements`.
    pub ima: Vec<u8>,
}

/// What a machine puts wrong. Everything else stays right: hashes, lengths and the HMAC are of what is sent.
#[derive(Clone, Debug, Default)]
pub struct Lies {
    /// Another boot log.
    pub boot_log: Option<Vec<u8>>,
    /// Another IMA log.
    pub ima_log: Option<Vec<u8>>,
    /// A quote over another session's data.
    pub other_nonce: bool,
    /// A quote over fewer PCRs than asked.
    pub fewer_pcrs: bool,
    /// An HMAC under another secret.
    pub other_secret: bool,
    /// A quote over another bank and other PCRs than asked.
    pub quote_over: Option<(Bank, u32)>,
    /// A change of the header, which the HMAC then covers.
    pub header: Option<fn(&mut v1::EvidenceHeader)>,
}

/// A session begun.
pub struct Begun {
    cluster: ClusterId,
    agent_nonce: [u8; 32],
    join_token: String,
    challenge: v1::Challenge,
}

impl Begun {
    /// The sealed ticket.
    pub fn ticket(&self) -> Vec<u8> {
        self.challenge.ticket.clone()
    }
}

/// Evidence ready to be sent, any number of times.
pub struct Answer {
    /// The frames.
    pub frames: Vec<v1::EvidenceRequest>,
    /// The node's key.
    pub key: SvidKey,
    /// Time that the TPM took.
    pub in_tpm: Duration,
}

impl Machine {
    /// Makes one with a TPM of `maker`.
    pub async fn new(maker: &Maker, name: &str) -> Result<Machine> {
        let made = maker.tpm(name)?;
        let attester = Attester::open(&made.tcti(), &made.state())?;
        let identity = attester.identity().await?;
        let presented = PresentedEk::parse(BeginInput {
            cluster: "any".parse()?,
            ek_certificate: identity.ek_certificate.clone().unwrap_or_default(),
            ek_intermediates: Vec::new(),
            ek_public: identity.ek_public.clone(),
            ak_public: identity.ak_public.clone(),
            agent_nonce: vec![0; 32],
        })?;
        let node = presented.node().to_string();
        let logs = Logs { boot: tpm::BOOT_LOG.to_vec(), ima: tpm::IMA_LOG.to_vec() };
        Ok(Machine { attester: Mutex::new(attester), identity, node, logs: Mutex::new(logs), tpm: made })
    }
    /// Its id: SHA-256 of its EK's SubjectPublicKeyInfo.
    pub fn node(&self) -> String {
        self.node.clone()
    }

    /// Its TPM answers nothing any more, and breaks no connection.
    pub fn hang(&self) -> Result<()> {
        self.tpm.hang()
    }
    /// How to reach its TPM.
    pub fn tcti(&self) -> String {
        self.tpm.tcti()
    }

    /// The same machine with another AK, as after its state was deleted, or in the hands of whoever drives its TPM.
    pub async fn rekeyed(mut self) -> Result<Machine> {
        // A folder that no AK was kept in before: another AK each time.
        let state = self.tpm.state().join(hex::encode(fresh()));
        std::fs::create_dir_all(&state)?;
        self.attester = Mutex::new(Attester::open(&self.tpm.tcti(), &state)?);
        self.identity = self.attester().identity().await?;
        Ok(self)
    }

    /// The same TPM and the same disk, copied as they are now and started a second time.
    pub async fn copied(&self) -> Result<Machine> {
        let tpm = self.tpm.copied()?;
        let attester = Attester::open(&tpm.tcti(), &tpm.state())?;
        let identity = attester.identity().await?;
        let logs = Mutex::new(self.logs());
        Ok(Machine { attester: Mutex::new(attester), identity, node: self.node(), logs, tpm })
    }

    /// Its kernel measures the execution of a file.
    pub fn runs(&self, sha256: &[u8; 32], path: &str) -> Result<()> {
        let record = ima::Record::ima_ng(sha256, path);
        self.extend(record.pcr, &record.digests())?;
        self.logs.lock().unwrap_or_else(PoisonError::into_inner).ima.extend(record.encode());
        Ok(())
    }

    /// Something extends one of its PCRs, and no log says so.
    pub fn extend(&self, pcr: u32, digests: &ima::Digests) -> Result<()> {
        *self.attester.lock().unwrap_or_else(PoisonError::into_inner) =
            Attester::open(&self.tpm.tcti(), &self.tpm.state())?;
        self.tpm.extend(pcr, digests)
    }

    /// Turned off and on again: the TPM counts a reset, and its PCRs and logs are those of a boot.
    pub fn reboot(&mut self) -> Result<()> {
        self.tpm.reset()?;
        self.attester = Mutex::new(Attester::open(&self.tpm.tcti(), &self.tpm.state())?);
        self.logs = Mutex::new(Logs { boot: tpm::BOOT_LOG.to_vec(), ima: tpm::IMA_LOG.to_vec() });
        Ok(())
    }

    /// As its kernel would show them now.
    pub fn logs(&self) -> Logs {
        self.logs.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn attester(&self) -> Attester {
        self.attester.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
    pub(crate) fn ak_public(&self) -> &[u8] {
        &self.identity.ak_public
    }

    /// What it sends in the first round trip.
    pub fn begin_request(&self, cluster: &str, token: &str) -> v1::BeginRequest {
        let mut agent_nonce = [0; 32];
        for half in agent_nonce.chunks_mut(16) {
            half.copy_from_slice(&fresh());
        }
        v1::BeginRequest {
            cluster: cluster.to_owned(),
            ek_certificate: self.identity.ek_certificate.clone().unwrap_or_default(),
            ek_intermediates: Vec::new(),
            ek_public: self.identity.ek_public.clone(),
            ak_public: self.identity.ak_public.clone(),
            agent_nonce: agent_nonce.to_vec(),
            join_token: token.to_owned(),
        }
    }

    /// The first round trip.
    pub async fn begin(&self, channel: Channel, cluster: &str, token: &str) -> Result<Result<Begun, v1::Denied>> {
        self.begin_with(channel, self.begin_request(cluster, token)).await
    }

    /// The first round trip, with this request.
    pub async fn begin_with(&self, channel: Channel, request: v1::BeginRequest) -> Result<Result<Begun, v1::Denied>> {
        let agent_nonce = request.agent_nonce.clone().try_into().unwrap_or_default();
        let (cluster, token) = (request.cluster.parse()?, request.join_token.clone());
        let mut client = NodeAttestationClient::new(channel);
        let until = Instant::now() + PATIENCE;
        let answer = loop {
            match client.begin(request.clone()).await {
                // A cell has no ticket key in the second after its founding or a join; agents wait it out too.
                Err(s) if from_status(&s).code == Code::Unavailable && Instant::now() < until => {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
                answer => break answer?.into_inner(),
            }
        };
        match answer.result {
            Some(begin_response::Result::Challenge(challenge)) => {
                Ok(Ok(Begun { cluster, agent_nonce, join_token: token, challenge }))
            }
            Some(begin_response::Result::Denied(denied)) => Ok(Err(denied)),
            None => bail!("neither challenge nor denial"),
        }
    }

    /// Activates the credential, quotes, and puts the evidence together.
    pub async fn answer(&self, begun: &Begun, lies: &Lies) -> Result<Answer> {
        let challenge = &begun.challenge;
        let key = SvidKey::generate()?;
        let csr = key.csr()?;
        let started = Instant::now();
        let mut secret =
            self.attester().activate(challenge.credential_blob.clone(), challenge.encrypted_secret.clone()).await?;
        let mut in_tpm = started.elapsed();
        let ticket_sha256 = fingerprint(&challenge.ticket);
        let mut server_nonce: [u8; 32] = challenge.server_nonce.as_slice().try_into()?;
        if lies.other_nonce {
            server_nonce[0] ^= 1;
        }
        let qualifying = qualifying_data(&Binding {
            agent_nonce: &begun.agent_nonce,
            server_nonce: &server_nonce,
            ticket_sha256: &ticket_sha256,
            csr_spki: &ambit_verify::csr::p256_spki(&csr)?,
            cluster: &begun.cluster,
            ak_name: &Public::name_of(&self.identity.ak_public)?,
        });
        let bank = Bank::from_text(&challenge.bank).context("a bank")?;
        let mask = if lies.fewer_pcrs { challenge.pcr_mask & !(1 << 8) } else { challenge.pcr_mask };
        let (bank, mask) = lies.quote_over.unwrap_or((bank, mask));
        let started = Instant::now();
        let quote = self.attester().quote(bank, mask, qualifying).await?;
        in_tpm += started.elapsed();
        if lies.other_secret {
            secret.iter_mut().for_each(|byte| *byte ^= 1);
        }
        let logs = self.logs();
        let boot_log = lies.boot_log.clone().unwrap_or(logs.boot);
        let ima_log = lies.ima_log.clone().unwrap_or(logs.ima);
        let (boot, ima) = (extent(&boot_log), extent(&ima_log));
        let mut header = v1::EvidenceHeader {
            ticket: challenge.ticket.clone(),
            csr: csr.clone(),
            quote: quote.attest.clone(),
            signature: quote.signature.clone(),
            pcrs: quote
                .pcrs
                .iter()
                .map(|(index, value)| v1::PcrValue { index: *index, value: value.clone() })
                .collect(),
            boot_log_len: boot.len,
            boot_log_sha256: boot.sha256.to_vec(),
            ima_log_len: ima.len,
            ima_log_sha256: ima.sha256.to_vec(),
            join_token: begun.join_token.clone(),
            ek_public: self.identity.ek_public.clone(),
            ak_public: self.identity.ak_public.clone(),
            ..Default::default()
        };
        if let Some(edit) = lies.header {
            edit(&mut header);
        }
        header.hmac = hmac(&header, &secret)?.to_vec();
        let chunks = boot_log.chunks(CHUNK_BYTES).chain(ima_log.chunks(CHUNK_BYTES)).map(<[u8]>::to_vec);
        let frames = std::iter::once(evidence_request::Part::Header(header))
            .chain(chunks.map(evidence_request::Part::Chunk))
            .map(|part| v1::EvidenceRequest { part: Some(part) })
            .collect();
        Ok(Answer { frames, key, in_tpm })
    }

    /// Both round trips through one replica: a verdict, or the denial of either.
    pub async fn enrol(
        &self,
        cell: &Cell,
        replica: usize,
        cluster: &str,
        token: &str,
        lies: &Lies,
    ) -> Result<Result<(v1::Verdict, Answer), v1::Denied>> {
        let begun = match self.begin(cell.anonymous(replica).await?, cluster, token).await? {
            Ok(begun) => begun,
            Err(denied) => return Ok(Err(denied)),
        };
        let answer = self.answer(&begun, lies).await?;
        let judged = evidence(cell.anonymous(replica).await?, &answer.frames).await?;
        Ok(judged.map(|verdict| (verdict, answer)))
    }
}

/// The second round trip.
pub async fn evidence(
    channel: Channel,
    frames: &[v1::EvidenceRequest],
) -> Result<Result<v1::Verdict, v1::Denied>, Status> {
    let frames = tokio_stream::iter(frames.to_vec());
    match NodeAttestationClient::new(channel).evidence(frames).await?.into_inner().result {
        Some(evidence_response::Result::Verdict(verdict)) => Ok(Ok(verdict)),
        Some(evidence_response::Result::Denied(denied)) => Ok(Err(denied)),
        None => Err(Status::internal("neither verdict nor denial")),
    }
}

/// What a node shows after its enrolment.
pub fn node_identity(verdict: &v1::Verdict, key: &SvidKey) -> Result<Identity> {
    identity(&verdict.svid_chain_der, key)
}

/// A chain (leaf first) and its key as a client's identity.
pub fn identity(chain_der: &[Vec<u8>], key: &SvidKey) -> Result<Identity> {
    let chain = chain_der.iter().cloned().map(Into::into).collect();
    Ok(Identity::new(Some(certified(chain, key)?)))
}

/// Registers a cluster whose EKs are of `maker`, class lab, governed by a policy that accepts the golden boot. `maker`
/// has made a TPM before.
pub async fn register_cluster(cell: &Cell, name: &str, maker: &Maker) -> Result<(), Refusal> {
    register_bare_cluster(cell, name, maker).await?;
    let (yaml, list) = golden_policy(name, name)?;
    put_list(cell, &list).await?;
    apply_policy(cell, &yaml, false).await.map(drop)
}

/// A policy learnt from the golden boot, as YAML, and the allow-list that it names.
pub fn golden_policy(name: &str, cluster: &str) -> Result<(String, Vec<u8>), Refusal> {
    let pcrs = tpm::golden_pcrs(ambit_lab::tpm_wire::Bank::Sha256);
    let quoted = (0u32..).zip(pcrs).filter(|(n, _)| 0x47ff >> n & 1 == 1).collect();
    let evidence = KeptEvidence::new("lab", "sha256", quoted, tpm::BOOT_LOG.to_vec(), tpm::IMA_LOG.to_vec())?;
    let learnt = evidence.learn(&name.parse()?, &cluster.parse()?).map_err(|denial| denial.refusal)?;
    Ok((ambit_policy::appraisal::to_yaml(&learnt.policy), learnt.allow_list.unwrap_or_default().into_bytes()))
}

/// Uploads an IMA allow-list.
pub async fn put_list(cell: &Cell, list: &[u8]) -> Result<String, Refusal> {
    let call = |channel| {
        let chunks = vec![v1::BlobChunk { bytes: list.to_vec(), keep: "allow-list".to_owned() }];
        async move { AppraisalClient::new(channel).put_blob(tokio_stream::iter(chunks)).await }
    };
    cell.insist(call).await.map(|answer| answer.sha256)
}

/// Writes an appraisal policy.
pub async fn apply_policy(cell: &Cell, yaml: &str, staged: bool) -> Result<v1::AppraisalPolicyMessage, Refusal> {
    let request = v1::ApplyAppraisalPolicyRequest { request_id: fresh(), yaml: yaml.to_owned(), staged };
    let call = |channel| {
        let request = request.clone();
        async move { AppraisalClient::new(channel).apply_appraisal_policy(request).await }
    };
    cell.insist(call).await
}

/// Registers a cluster that no appraisal policy governs yet.
pub async fn register_bare_cluster(cell: &Cell, name: &str, maker: &Maker) -> Result<(), Refusal> {
    let internal = |e: anyhow::Error| Refusal::new(Code::Internal, "the maker's certificates", e.to_string());
    let roots = maker.roots().map_err(internal)?;
    let request = v1::RegisterClusterRequest {
        request_id: fresh(),
        name: name.to_owned(),
        ek_root_classes: vec!["lab".to_owned(); roots.len()],
        ek_roots_der: roots,
        attest_interval_s: 1,
    };
    let call = |channel| {
        let request = request.clone();
        async move { v1::cluster_registry_client::ClusterRegistryClient::new(channel).register_cluster(request).await }
    };
    cell.insist(call).await.map(drop)
}

/// A join token of a cluster.
pub async fn join_token(cell: &Cell, cluster: &str) -> Result<String, Refusal> {
    let request = v1::CreateJoinTokenRequest { request_id: fresh(), cluster: cluster.to_owned(), ttl_seconds: 600 };
    let call = |channel| {
        let request = request.clone();
        async move { NodeAttestationClient::new(channel).create_join_token(request).await }
    };
    cell.insist(call).await.map(|answer| answer.token)
}

/// What operators are told of a node.
pub async fn explain(cell: &Cell, replica: usize, node: &str) -> Result<v1::ExplainNodeResponse> {
    let request = v1::ExplainNodeRequest { id: node.to_owned() };
    Ok(NodeAttestationClient::new(cell.admin(replica).await?).explain_node(request).await?.into_inner())
}

/// Over all that the header says.
fn hmac(header: &v1::EvidenceHeader, secret: &[u8]) -> Result<[u8; 32]> {
    let pcrs: Vec<(u32, Vec<u8>)> = header.pcrs.iter().map(|p| (p.index, p.value.clone())).collect();
    let extent = |len, sha256: &[u8]| anyhow::Ok(LogExtent { len, sha256: sha256.try_into()? });
    let transcript = Transcript {
        ticket_sha256: fingerprint(&header.ticket),
        csr: &header.csr,
        quote: &header.quote,
        signature: &header.signature,
        pcrs: &pcrs,
        boot_log: extent(header.boot_log_len, &header.boot_log_sha256)?,
        ima_log: extent(header.ima_log_len, &header.ima_log_sha256)?,
        svid_key: &KeyHome::InMemory,
    };
    Ok(transcript.hmac(secret))
}

fn extent(log: &[u8]) -> LogExtent {
    LogExtent { len: log.len() as u64, sha256: fingerprint(log) }
}
