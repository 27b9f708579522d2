//! The stream of one simulated agent: it subscribes, takes slices or deltas, checks and acknowledges them, and answers
//! rounds, each with a fresh signature.

use super::machine::{Enrolled, pcrs};
use crate::soft_tpm::SoftTpm;
use ambit_identity::{Expect, SharedTrust, Trust};
use ambit_lab::tpm::{BOOT_LOG, IMA_LOG};
use ambit_model::{ClusterId, Generation, NodeId, TrustDomain};
use ambit_proto::resources::{Held, Taken};
use ambit_proto::v1::agent_message::Body as Up;
use ambit_proto::v1::agent_stream_client::AgentStreamClient;
use ambit_proto::v1::server_message::Body as Down;
use ambit_proto::v1::{self, AgentMessage, EndpointReport, Subscribe};
use ambit_transport::{Dialer, Identity};
use ambit_verify::transcript::round_data;
use anyhow::{Context, Result, bail};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

/// What the fleet did.
#[derive(Default)]
pub(super) struct Counts {
    answers: AtomicU64,
    acks: Mutex<Vec<Acked>>,
}

/// A revision that an agent holds whole, and acknowledged then.
#[derive(Clone, Copy)]
pub(super) struct Acked {
    pub(super) agent: usize,
    pub(super) revision: u64,
    pub(super) at: Instant,
}

impl Counts {
    /// Quotes sent.
    pub(super) fn answers(&self) -> u64 {
        self.answers.load(Ordering::Relaxed)
    }
    /// What was acknowledged since the last call.
    pub(super) fn take_acks(&self) -> Vec<Acked> {
        std::mem::take(&mut *self.acks.lock().unwrap_or_else(PoisonError::into_inner))
    }
    fn acked(&self, agent: usize, revision: u64) {
        let acked = Acked { agent, revision, at: Instant::now() };
        self.acks.lock().unwrap_or_else(PoisonError::into_inner).push(acked);
    }
}

/// An open stream.
pub(super) struct Open {
    number: usize,
    held: Held,
    tpm: Arc<SoftTpm>,
    cluster: ClusterId,
    generation: Generation,
    up: mpsc::Sender<AgentMessage>,
    down: Streaming<v1::ServerMessage>,
}

/// A whole slice, where the replica knows no deltas.
const SLICE_BYTES_MAX: usize = 256 * 1024 * 1024;

/// Connects as the node, the agent of this number, over the transport that agents use, holding what it held before.
pub(super) async fn open(
    (number, node): (usize, Enrolled),
    at: SocketAddr,
    (trust_domain, fingerprint): (TrustDomain, [u8; 32]),
    held: Held,
) -> Result<Open> {
    let trust = SharedTrust::new(Trust::Pinned(trust_domain.clone(), fingerprint));
    let dialer = Dialer::new(trust, Identity::new(Some(node.identity.clone())));
    let channel = dialer.channel(at, Expect::ReplicaOf(trust_domain)).await?;
    let (up, queue) = mpsc::channel(8);
    let (have_revision, have_digest) = (held.revision(), held.digest());
    let (node_address, holds_revision) = ("127.0.0.1".into(), held.holds());
    let hello =
        Subscribe { node_address, have_revision, deltas: true, have_digest, holds_revision, ..Subscribe::default() };
    let hello = Up::Subscribe(hello);
    for body in [hello, Up::Endpoints(EndpointReport { endpoints: Vec::new() })] {
        up.send(AgentMessage { body: Some(body) }).await?;
    }
    let mut client = AgentStreamClient::new(channel).max_decoding_message_size(SLICE_BYTES_MAX);
    let down = client.sync(ReceiverStream::new(queue)).await?.into_inner();
    let cluster = node.cluster.parse()?;
    Ok(Open { number, held, tpm: node.tpm, cluster, generation: Generation(node.generation), up, down })
}

impl Open {
    /// Until the stream ends, which is a failure.
    pub(super) async fn run(mut self, counts: Arc<Counts>) -> Result<()> {
        self.follow(&counts, None).await.map(drop)
    }

    /// The same until everything is held at this revision or a later one; what is held then.
    pub(super) async fn until(mut self, counts: &Counts, revision: u64) -> Result<Held> {
        self.follow(counts, Some(revision)).await
    }

    async fn follow(&mut self, counts: &Counts, until: Option<u64>) -> Result<Held> {
        loop {
            let message = self.down.message().await?.context("the replica ended the stream")?;
            match message.body {
                Some(Down::Slice(slice)) => {
                    self.acknowledge(slice.revision, counts).await?;
                    if until.is_some_and(|until| slice.revision >= until) {
                        return Ok(std::mem::take(&mut self.held));
                    }
                }
                Some(Down::Delta(part)) => {
                    let revision = part.revision;
                    if self.held.take(part)? == Taken::All {
                        self.acknowledge(revision, counts).await?;
                        if until.is_some_and(|until| revision >= until) {
                            return Ok(std::mem::take(&mut self.held));
                        }
                    }
                }
                Some(Down::Quote(question)) => {
                    self.answer(question).await?;
                    counts.answers.fetch_add(1, Ordering::Relaxed);
                }
                Some(Down::Heartbeat(_) | Down::Denials(_) | Down::Find(_)) | None => {}
            }
        }
    }

    async fn acknowledge(&self, revision: u64, counts: &Counts) -> Result<()> {
        let ack = v1::Ack { revision, map_digest: vec![0; 32], imported: Vec::new() };
        self.send(Up::Ack(ack)).await?;
        counts.acked(self.number, revision);
        Ok(())
    }

    async fn answer(&self, question: v1::QuoteRequest) -> Result<()> {
        let nonce: [u8; 32] = question.nonce.as_slice().try_into()?;
        let node = NodeId(self.tpm.node);
        let extra = round_data(&nonce, &node, self.generation, &self.cluster, &self.tpm.ak_name);
        let quoted = self.tpm.quote(&extra)?;
        let Some(ima_log) = IMA_LOG.get(usize::try_from(question.ima_offset)?..) else {
            bail!("asked for an IMA log from {}", question.ima_offset);
        };
        let boot_log = if question.boot_log { BOOT_LOG } else { &[] };
        let answer = v1::QuoteAnswer {
            nonce: question.nonce,
            quote: quoted.attest,
            signature: quoted.signature,
            pcrs: pcrs(),
            boot_log_len: boot_log.len() as u64,
            ima_log_len: ima_log.len() as u64,
            trouble: String::new(),
        };
        self.send(Up::Quote(answer)).await?;
        for log in [boot_log, ima_log] {
            if !log.is_empty() {
                self.send(Up::LogChunk(log.to_vec())).await?;
            }
        }
        Ok(())
    }

    async fn send(&self, body: Up) -> Result<()> {
        self.up.send(AgentMessage { body: Some(body) }).await.context("a closed stream")
    }
}
