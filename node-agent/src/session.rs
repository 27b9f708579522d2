//! The agent's stream to its cell: asks for the slice, reports endpoints, acknowledges what is in the kernel.
//!
//! Any replica will do; when one is lost the next is tried. A slice older than the one held is dropped (I7).

use crate::backoff::{Backoff, random};
use crate::clock::Clock;
use crate::control::Outcome;
use crate::metrics::METRICS;
use crate::view::View;
use ambit_identity::Expect;
use ambit_model::policy::Endpoint;
use ambit_model::{ClusterId, Code, Refusal, Revision, Stamp, TrustDomain};
use ambit_proto::status::from_status;
use ambit_proto::v1::agent_message::Body as Up;
use ambit_proto::v1::agent_stream_client::AgentStreamClient;
use ambit_proto::v1::server_message::Body as Down;
use ambit_proto::v1::{Ack, AgentMessage, EndpointReport, Nack, ServerMessage, Slice, Subscribe};
use ambit_transport::Dialer;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

/// The first retry is quick: a lost leader means another replica, not a lost cell.
const RETRY_BASE: Duration = Duration::from_millis(100);
/// Never longer, so that a healed cell has its agents back soon.
const RETRY_CAP: Duration = Duration::from_secs(3);
/// The cell sends a heartbeat every second; without one for this long the stream is taken for dead.
const SILENCE_MAX: Duration = Duration::from_secs(5);
/// A slice is a few hundred bytes per entry, policy and endpoint; 10,000 of each fit.
const SLICE_BYTES_MAX: usize = 16 * 1024 * 1024;
/// Messages up wait here while the stream is busy; all of them are replaced by newer ones of their kind.
const UP_QUEUE: usize = 8;

/// The stream's parts.
#[derive(Clone)]
pub struct Session {
    /// Presents the node's SVID.
    pub dialer: Dialer,
    /// Which servers.
    pub servers: Vec<SocketAddr>,
    /// Whose.
    pub trust_domain: TrustDomain,
    /// Of which cluster this node is.
    pub cluster: ClusterId,
    /// What it registers.
    pub node_address: Ipv4Addr,
    /// Told of every stamp.
    pub clock: Arc<Clock>,
    /// The wires.
    pub wires: Wires,
}

/// What the stream reads and writes.
#[derive(Clone, Debug)]
pub struct Wires {
    /// Counts enrolments: at each the stream starts anew, as another leaf. 0 is "not enrolled".
    pub enrolled: watch::Receiver<u64>,
    /// The newest view.
    pub desired: Arc<watch::Sender<Option<Arc<View>>>>,
    /// What became of it.
    pub outcome: watch::Receiver<Option<Outcome>>,
    /// What to report.
    pub endpoints: watch::Receiver<Vec<Endpoint>>,
    /// A working channel for other calls, while there is one.
    pub channel: Arc<watch::Sender<Option<Channel>>>,
}

impl Session {
    /// Runs until the process ends.
    pub async fn run(mut self) {
        let mut backoff = Backoff::new(RETRY_BASE, RETRY_CAP);
        // Agents start at different servers, so that one replica does not get them all.
        let mut at = usize::try_from(random() % 1024).unwrap_or_default();
        loop {
            if self.wires.enrolled.wait_for(|n| *n > 0).await.is_err() {
                return;
            }
            let Some(server) = self.servers.get(at % self.servers.len().max(1)).copied() else { return };
            let ended = self.once(server, &mut backoff).await;
            METRICS.component.set(["stream"], 0.0);
            self.wires.channel.send_replace(None);
            match ended {
                Ok(()) => tracing::debug!(%server, "stream starts anew"),
                Err(refusal) => {
                    at = at.wrapping_add(1);
                    let wait = backoff.next(random());
                    tracing::warn!(%server, %refusal, wait_ms = wait.as_millis(), "stream lost");
                    tokio::time::sleep(wait).await;
                }
            }
        }
    }

    /// One stream, until it breaks or this node has a new leaf to show.
    async fn once(&mut self, server: SocketAddr, backoff: &mut Backoff) -> Result<(), Refusal> {
        self.wires.enrolled.borrow_and_update();
        let channel = self.dialer.channel(server, Expect::ReplicaOf(self.trust_domain.clone())).await?;
        let mut client = AgentStreamClient::new(channel.clone()).max_decoding_message_size(SLICE_BYTES_MAX);
        let (up, queue) = mpsc::channel(UP_QUEUE);
        let have = self.wires.desired.borrow().as_ref().map_or(Revision(0), |v| v.revision);
        let hello = Subscribe { node_address: self.node_address.to_string(), have_revision: have.0 };
        send(&up, Up::Subscribe(hello)).await?;
        send(&up, self.report()).await?;
        let answer = tokio::time::timeout(SILENCE_MAX, client.sync(ReceiverStream::new(queue))).await;
        let mut down = answer.map_err(|_| silence())?.map_err(|s| from_status(&s))?.into_inner();
        self.wires.channel.send_replace(Some(channel));
        METRICS.component.set(["stream"], 1.0);
        tracing::info!(%server, "stream open");
        loop {
            tokio::select! {
                message = tokio::time::timeout(SILENCE_MAX, down.message()) => {
                    let message = message.map_err(|_| silence())?.map_err(|s| from_status(&s))?;
                    backoff.reset();
                    self.take(message.ok_or_else(ended)?, &up).await?;
                }
                changed = self.wires.endpoints.changed() => {
                    changed.map_err(|_| ended())?;
                    send(&up, self.report()).await?;
                }
                changed = self.wires.outcome.changed() => {
                    changed.map_err(|_| ended())?;
                    self.tell(&up).await?;
                }
                changed = self.wires.enrolled.changed() => return changed.map_err(|_| ended()),
            }
        }
    }

    async fn take(&mut self, message: ServerMessage, up: &mpsc::Sender<AgentMessage>) -> Result<(), Refusal> {
        match message.body {
            Some(Down::Heartbeat(beat)) => {
                self.clock.seen(Stamp(beat.stamp_ms));
                Ok(())
            }
            Some(Down::Slice(slice)) => self.take_slice(slice, up).await,
            // A newer server may know more kinds; the stream goes on.
            Some(Down::Denials(_) | Down::Quote(_)) | None => Ok(()),
        }
    }

    async fn take_slice(&mut self, slice: Slice, up: &mpsc::Sender<AgentMessage>) -> Result<(), Refusal> {
        self.clock.seen(Stamp(slice.stamp_ms));
        let revision = Revision(slice.revision);
        let held = self.wires.desired.borrow().as_ref().map_or(Revision(0), |v| v.revision);
        if revision < held {
            tracing::debug!(revision = revision.0, held = held.0, "older slice dropped");
            return Ok(());
        }
        METRICS.revision.set(["desired"], revision.0 as f64);
        match View::parse(slice, &self.trust_domain, &self.cluster) {
            Ok(view) => {
                self.wires.desired.send_replace(Some(Arc::new(view)));
                Ok(())
            }
            Err(refusal) => {
                METRICS.apply.inc(["failed", refusal.code.as_str()]);
                tracing::error!(revision = revision.0, %refusal, "slice refused");
                send(up, Up::Nack(Nack { revision: revision.0, reason: refusal.to_string() })).await
            }
        }
    }

    /// Acknowledges what is in the kernel, or says why it is not.
    async fn tell(&mut self, up: &mpsc::Sender<AgentMessage>) -> Result<(), Refusal> {
        let Some(outcome) = self.wires.outcome.borrow_and_update().clone() else { return Ok(()) };
        let revision = outcome.revision.0;
        let message = match outcome.result {
            Ok(digest) => {
                let view = self.wires.desired.borrow().clone().filter(|v| v.revision == outcome.revision);
                let imported = view.map(|v| v.imported.clone()).unwrap_or_default();
                Up::Ack(Ack { revision, map_digest: digest.to_vec(), imported })
            }
            Err(refusal) => Up::Nack(Nack { revision, reason: refusal.to_string() }),
        };
        send(up, message).await
    }

    fn report(&mut self) -> Up {
        let endpoints = self.wires.endpoints.borrow_and_update().iter().map(Into::into).collect();
        Up::Endpoints(EndpointReport { endpoints })
    }
}

/// Waits for room; a stream that takes nothing for so long is dead.
async fn send(up: &mpsc::Sender<AgentMessage>, body: Up) -> Result<(), Refusal> {
    let sent = tokio::time::timeout(SILENCE_MAX, up.send(AgentMessage { body: Some(body) })).await;
    sent.map_err(|_| silence())?.map_err(|_| ended())
}

fn silence() -> Refusal {
    Refusal::new(Code::Unavailable, "a word from the server every second", format!("none for {SILENCE_MAX:?}"))
}

fn ended() -> Refusal {
    Refusal::new(Code::Unavailable, "an open stream", "its end")
}
