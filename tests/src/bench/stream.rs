//! The stream of one simulated agent: it subscribes, acknowledges slices and answers rounds, each with a fresh signature.

use super::machine::{Enrolled, pcrs};
use crate::soft_tpm::SoftTpm;
use ambit_identity::{Expect, SharedTrust, Trust};
use ambit_lab::tpm::{BOOT_LOG, IMA_LOG};
use ambit_model::{ClusterId, Generation, NodeId, TrustDomain};
use ambit_proto::v1::agent_message::Body as Up;
use ambit_proto::v1::agent_stream_client::AgentStreamClient;
use ambit_proto::v1::server_message::Body as Down;
use ambit_proto::v1::{self, AgentMessage, EndpointReport, Subscribe};
use ambit_transport::{Dialer, Identity};
use ambit_verify::transcript::round_data;
use anyhow::{Context, Result, bail};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

/// What the fleet did.
#[derive(Default)]
pub(super) struct Counts {
    answers: AtomicU64,
}

impl Counts {
    /// Quotes sent.
    pub(super) fn answers(&self) -> u64 {
        self.answers.load(Ordering::Relaxed)
    }
}

/// An open stream.
pub(super) struct Open {
    tpm: Arc<SoftTpm>,
    cluster: ClusterId,
    generation: Generation,
    up: mpsc::Sender<AgentMessage>,
    down: Streaming<v1::ServerMessage>,
}

/// Connects as the node, over the transport that agents use.
pub(super) async fn open(
    node: Enrolled,
    at: SocketAddr,
    trust_domain: TrustDomain,
    fingerprint: [u8; 32],
) -> Result<Open> {
    let trust = SharedTrust::new(Trust::Pinned(trust_domain.clone(), fingerprint));
    let dialer = Dialer::new(trust, Identity::new(Some(node.identity.clone())));
    let channel = dialer.channel(at, Expect::ReplicaOf(trust_domain)).await?;
    let (up, queue) = mpsc::channel(8);
    let hello = Up::Subscribe(Subscribe { node_address: "127.0.0.1".into(), have_revision: 0 });
    for body in [hello, Up::Endpoints(EndpointReport { endpoints: Vec::new() })] {
        up.send(AgentMessage { body: Some(body) }).await?;
    }
    let down = AgentStreamClient::new(channel).sync(ReceiverStream::new(queue)).await?.into_inner();
    let cluster = node.cluster.parse()?;
    Ok(Open { tpm: node.tpm, cluster, generation: Generation(node.generation), up, down })
}

impl Open {
    /// Until the stream ends, which is a failure.
    pub(super) async fn run(mut self, counts: Arc<Counts>) -> Result<()> {
        loop {
            let message = self.down.message().await?.context("the replica ended the stream")?;
            match message.body {
                Some(Down::Slice(slice)) => {
                    let ack = v1::Ack { revision: slice.revision, map_digest: vec![0; 32], imported: Vec::new() };
                    self.send(Up::Ack(ack)).await?;
                }
                Some(Down::Quote(question)) => {
                    self.answer(question).await?;
                    counts.answers.fetch_add(1, Ordering::Relaxed);
                }
                Some(Down::Heartbeat(_) | Down::Denials(_)) | None => {}
            }
        }
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
