//! One stream per node: what it needs down, acknowledgements and endpoints up.

use super::OrStatus;
use super::rounds::{Rounds, Todo};
use crate::authorise::{Role, actor, is_denied};
use crate::replica::agents::Heard;
use crate::replica::cuts::{Cut, Edition, Feed};
use crate::replica::seen::Flow;
use crate::replica::{Replica, wall_clock};
use ambit_identity::PeerSvid;
use ambit_model::policy::Endpoint;
use ambit_model::{Code, Generation, NodeId, Refusal, SpiffeId, Stamp};
use ambit_proto::convert::address;
use ambit_proto::status::to_status;
use ambit_proto::v1;
use ambit_proto::v1::server_message::Body;
use ambit_state::command::NodeReport;
use ambit_state::objects::NodeState;
use ambit_state::{ENDPOINTS_PER_NODE_MAX, State};
use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::pin::Pin;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

/// Messages not yet taken by the agent; a slow reader is brought to the newest when it comes back.
const QUEUE: usize = 4;
/// Intermediates under which a node shows leaves are a few per replica; bundles as many as a cell has peers.
const HOLDING_MAX: usize = 1_024;
/// A stream that carries nothing else shows that its replica's process lives; an agent leaves after two of these without
/// a word. (That the machine lives is the kernel's to watch.) At 10,000 streams a heartbeat a second costs six times as
/// much as all rounds.
const HEARTBEAT: Duration = Duration::from_secs(8);

/// An agent tells every ten seconds who called whom; what comes sooner is not looked at.
const SEEN_APART: Duration = Duration::from_secs(2);

/// The node's slice comes first, unless this replica has yet to hear of what the agent heard elsewhere.
const FIRST_BEAT: Duration = Duration::from_secs(1);

/// See [`in_company`]: thousands of streams have a dozen milliseconds of work at each of its instants.
const RASTER: Duration = Duration::from_millis(250);

static STREAMS: AtomicU64 = AtomicU64::new(1);

pub(crate) struct Streams(pub(crate) Replica);

type Down = Result<v1::ServerMessage, Status>;

#[tonic::async_trait]
impl v1::agent_stream_server::AgentStream for Streams {
    type SyncStream = Pin<Box<dyn Stream<Item = Down> + Send>>;

    async fn sync(&self, request: Request<Streaming<v1::AgentMessage>>) -> Result<Response<Self::SyncStream>, Status> {
        let actor = actor(&request)?;
        let Role::Node(node, generation) = actor.role else {
            return Err(Refusal::new(Code::PermissionDenied, "a node", actor.name)).or_status();
        };
        let mut up = request.into_inner();
        let subscribe = match up.message().await?.and_then(|m| m.body) {
            Some(v1::agent_message::Body::Subscribe(subscribe)) => subscribe,
            _ => return Err(Refusal::new(Code::BadRequest, "Subscribe first", "another message")).or_status(),
        };
        let address = address(&subscribe.node_address).or_status()?;
        // Before its slice, with which its workloads get SVIDs: whoever they call should have heard by then. And before an
        // older stream ends: a copy of the node's key, used where it was not registered, has to claim the node's address to
        // bring that about, with which no far end takes it.
        if let Err(refusal) = register(&self.0, node, generation, address, actor.svid.as_ref()).await {
            // Counted it is as every refused call.
            if refusal.code == Code::NodeAddressMismatch && self.0.refusals().may_log(wall_clock().0) {
                tracing::warn!(%node, from = %actor.remote, %refusal, "agent stream refused");
            }
            return Err(told(refusal)).or_status();
        }
        let stream = STREAMS.fetch_add(1, Ordering::Relaxed);
        // From here on an older stream of this node ends.
        let heard = self.0.agents().connected(node, subscribe.node_address.clone(), stream, subscribe.finds);
        self.0.board().came();
        let (down, queue) = mpsc::channel::<Down>(QUEUE);
        let rounds = Rounds::new(self.0.clone(), node, generation);
        let feed = Feed::new(&subscribe, self.0.remembered());
        let (replica, until, svid) = (self.0.clone(), actor.until, actor.svid);
        let session = Session { replica, node, generation, address, until, svid, stream, heard, rounds, seen_at: None };
        tokio::spawn(session.run(feed, up, down));
        Ok(Response::new(Box::pin(ReceiverStream::new(queue))))
    }
}

struct Session {
    replica: Replica,
    node: NodeId,
    generation: Generation,
    /// Where the node is, as this admission registered.
    address: Ipv4Addr,
    until: Option<Stamp>,
    /// What it showed when the stream began.
    svid: Option<PeerSvid>,
    stream: u64,
    /// Of a newer stream of this node here, and what its agent is to be asked.
    heard: Heard,
    rounds: Rounds,
    /// When it told last who called whom.
    seen_at: Option<Instant>,
}

impl Session {
    async fn run(mut self, feed: Feed, mut up: Streaming<v1::AgentMessage>, down: mpsc::Sender<Down>) {
        if let Some(refusal) = self.serve(feed, &mut up, &down).await {
            tracing::info!(node = %self.node, code = %refusal.code, "agent stream ended");
            let _ = down.send(Err(to_status(&told(refusal)))).await;
        }
        self.replica.agents().gone(&self.node, self.stream);
    }

    /// Until the stream breaks, or the refusal that ends it.
    async fn serve(
        &mut self,
        mut feed: Feed,
        up: &mut Streaming<v1::AgentMessage>,
        down: &mpsc::Sender<Down>,
    ) -> Option<Refusal> {
        let mut newer = self.heard.newer.clone();
        let mut editions = self.replica.board().editions();
        let mut refused = self.replica.board().refused();
        let beat = tokio::time::sleep(FIRST_BEAT);
        tokio::pin!(beat);
        loop {
            let edition = editions.borrow_and_update().clone();
            if let Err(refusal) = self.push(&edition, &mut feed, down).await {
                return Some(refusal);
            }
            tokio::select! {
                message = up.message() => match message {
                    Ok(Some(message)) => {
                        if let Err(refusal) = self.take(message, &mut feed, down).await {
                            return Some(refusal);
                        }
                    }
                    Ok(None) | Err(_) => return None,
                },
                todo = self.rounds.next() => {
                    if let Some(refusal) = self.act(todo, down).await {
                        return Some(refusal);
                    }
                }
                changed = refused.changed() => {
                    if changed.is_err() {
                        return None;
                    }
                    // Whom to refuse does not wait for the rest.
                    let cut = refused.borrow_and_update().clone();
                    if let Err(refusal) = self.push_denials(&cut, &mut feed, down).await {
                        return Some(refusal);
                    }
                }
                changed = editions.changed() => {
                    if changed.is_err() {
                        return None;
                    }
                }
                Some(find) = self.heard.asks.recv() => {
                    // A stream that is full of news answers later than who asks would wait.
                    let _ = down.try_send(Ok(v1::ServerMessage { body: Some(Body::Find(find)) }));
                }
                _ = newer.changed() => return self.newest().err(),
                () = &mut beat => {
                    if let Err(refusal) = self.beat(&feed, down) {
                        return Some(refusal);
                    }
                    beat.as_mut().reset(self.next_beat());
                }
            }
        }
    }

    /// Shows that the stream lives. A stream does not outlive the certificate that opened it.
    fn beat(&self, feed: &Feed, down: &mpsc::Sender<Down>) -> Result<(), Refusal> {
        let now = self.replica.now();
        if self.until.is_none_or(|until| until < now) {
            return Err(Refusal::new(Code::Unauthenticated, "a certificate in time", "one that ended"));
        }
        let committed_ms = self.replica.local(State::stamp).0;
        let beat = v1::Heartbeat { stamp_ms: now.0, revision: feed.holds(), committed_ms };
        let message = v1::ServerMessage { body: Some(v1::server_message::Body::Heartbeat(beat)) };
        match down.try_send(Ok(message)) {
            // A full queue carries newer news than a heartbeat.
            Ok(()) | Err(mpsc::error::TrySendError::Full(_)) => Ok(()),
            Err(mpsc::error::TrySendError::Closed(_)) => {
                Err(Refusal::new(Code::Unavailable, "an open stream", "a closed one"))
            }
        }
    }

    /// When to look again, at the latest just after the certificate ended.
    fn next_beat(&self) -> Instant {
        let left = self.until.map_or(0, |until| until.0.saturating_sub(self.replica.now().0));
        in_company(Instant::now() + HEARTBEAT).min(Instant::now() + Duration::from_millis(left + 1))
    }

    /// Sends what of the node's slice differs from what was sent last. A node that is out is cut off here.
    async fn push(&self, edition: &Edition, feed: &mut Feed, down: &mpsc::Sender<Down>) -> Result<(), Refusal> {
        self.newest()?;
        if edition.revision == feed.holds() {
            return Ok(());
        }
        self.replica.local(|s| self.trusted(s))?;
        // Who came after the edition was made waits for the next.
        let Some(cut) = edition.cut(&self.node) else { return Ok(()) };
        let bodies = feed.all(&cut)?;
        self.send(bodies, feed, down).await?;
        self.note(feed, Some(&cut.imported));
        Ok(())
    }

    /// Sends whom to refuse if it changed since it was sent last.
    async fn push_denials(&self, cut: &Cut, feed: &mut Feed, down: &mpsc::Sender<Down>) -> Result<(), Refusal> {
        self.replica.local(|s| self.trusted(s))?;
        let bodies = feed.denials(cut)?;
        self.send(bodies, feed, down).await
    }

    async fn send(&self, bodies: Vec<Body>, feed: &Feed, down: &mpsc::Sender<Down>) -> Result<(), Refusal> {
        if let Some(sent) = feed.sent().filter(|_| !bodies.is_empty()) {
            self.replica.remembered().note(sent);
        }
        for body in bodies {
            let closed = |_| Refusal::new(Code::Unavailable, "an open stream", "a closed one");
            down.send(Ok(v1::ServerMessage { body: Some(body) })).await.map_err(closed)?;
        }
        Ok(())
    }

    /// The node may still be served.
    fn trusted(&self, s: &State) -> Result<(), Refusal> {
        trusted(s, &self.node, self.generation, self.svid.as_ref())
    }

    /// Tells who asks what the agent has in its kernel.
    fn note(&self, feed: &Feed, imported: Option<&[v1::ImportedSeq]>) {
        let applied = feed.applied();
        let imported = imported.map(|all| all.iter().map(|one| (one.origin.clone(), one.seq)).collect());
        self.replica.agents().update(&self.node, |a| {
            if a.stream == self.stream {
                a.applied = applied;
                a.imported = imported.unwrap_or_else(|| std::mem::take(&mut a.imported));
            }
        });
    }

    /// What the rounds want done; the refusal that ends the stream, if that is it.
    async fn act(&self, todo: Todo, down: &mpsc::Sender<Down>) -> Option<Refusal> {
        match todo {
            Todo::Nothing => None,
            Todo::End(refusal) => Some(refusal),
            Todo::Send(request) => {
                let body = Some(v1::server_message::Body::Quote(request));
                let closed = |_| Refusal::new(Code::Unavailable, "an open stream", "a closed one");
                down.send(Ok(v1::ServerMessage { body })).await.map_err(closed).err()
            }
        }
    }

    async fn take(
        &mut self,
        message: v1::AgentMessage,
        feed: &mut Feed,
        down: &mpsc::Sender<Down>,
    ) -> Result<(), Refusal> {
        self.newest()?;
        match message.body {
            Some(v1::agent_message::Body::Ack(ack)) => {
                if let Some(news) = feed.acknowledged(ack.revision) {
                    self.replica.propagation().acknowledged(&news, std::time::Instant::now());
                }
                let digest = ack.map_digest;
                self.replica.agents().update(&self.node, |a| (a.refused, a.map_digest) = (String::new(), digest));
                self.note(feed, None);
                Ok(())
            }
            Some(v1::agent_message::Body::Nack(nack)) => {
                tracing::warn!(node = %self.node, revision = nack.revision, reason = nack.reason, "slice refused by agent");
                self.replica.agents().update(&self.node, |a| a.refused = nack.reason);
                if nack.lost { feed.lost() } else { Ok(()) }
            }
            Some(v1::agent_message::Body::Endpoints(report)) => self.endpoints(report).await,
            Some(v1::agent_message::Body::Quote(answer)) => {
                let todo = self.rounds.answer(answer)?;
                self.act(todo, down).await.map_or(Ok(()), Err)
            }
            Some(v1::agent_message::Body::LogChunk(bytes)) => {
                let todo = self.rounds.chunk(bytes)?;
                self.act(todo, down).await.map_or(Ok(()), Err)
            }
            Some(v1::agent_message::Body::Holding(holding)) => self.holding(holding),
            Some(v1::agent_message::Body::Seen(seen)) => {
                self.seen(seen);
                Ok(())
            }
            Some(v1::agent_message::Body::Found(found)) => {
                self.replica.findings().answered(self.node, found);
                Ok(())
            }
            Some(v1::agent_message::Body::Subscribe(_)) | None => {
                Err(Refusal::new(Code::BadRequest, "endpoints, ack or nack", "another message"))
            }
        }
    }

    /// Who called whom. Nothing is decided by it, so what is wrong with it ends nothing.
    fn seen(&mut self, told: v1::SeenFlows) {
        if self.seen_at.is_some_and(|at| at.elapsed() < SEEN_APART) {
            return;
        }
        self.seen_at = Some(Instant::now());
        let (node, now) = (self.node, self.replica.now());
        let ends: BTreeSet<&str> =
            told.flows.iter().flat_map(|f| [f.source.as_str(), f.destination.as_str()]).collect();
        let own: BTreeSet<SpiffeId> = self.replica.local(|s| {
            let ids = ends.into_iter().filter_map(|id| id.parse().ok());
            ids.filter(|id| s.may_run(id, &node)).collect()
        });
        let may_tell = |flow: &Flow| own.contains(&flow.source) || own.contains(&flow.destination);
        if let Err(refusal) = self.replica.seen().take(node, told, may_tell, now) {
            tracing::warn!(%node, %refusal, "flows not taken");
        }
    }

    /// What the node verifies by and shows: who waits for acknowledgements looks there.
    fn holding(&self, holding: v1::Holding) -> Result<(), Refusal> {
        if holding.authorities.len() > HOLDING_MAX || holding.bundles.len() > HOLDING_MAX {
            let found = format!("{} and {}", holding.authorities.len(), holding.bundles.len());
            return Err(Refusal::new(
                Code::BadRequest,
                format!("at most {HOLDING_MAX} authorities and bundles"),
                found,
            ));
        }
        let own = self.replica.trust_domain().as_str();
        let sequence = holding.bundles.iter().find(|b| b.trust_domain == own).map_or(0, |b| b.sequence);
        self.replica.agents().update(&self.node, |a| {
            if a.stream == self.stream {
                (a.bundle_sequence, a.authorities) = (sequence, holding.authorities);
            }
        });
        Ok(())
    }

    async fn endpoints(&self, report: v1::EndpointReport) -> Result<(), Refusal> {
        let found = report.endpoints.len();
        if found > ENDPOINTS_PER_NODE_MAX {
            tracing::warn!(node = %self.node, found, max = ENDPOINTS_PER_NODE_MAX, "endpoints left out: too many");
        }
        let taken = report.endpoints.iter().take(ENDPOINTS_PER_NODE_MAX);
        let endpoints: Vec<Endpoint> = taken.map(Endpoint::try_from).collect::<Result<_, _>>()?;
        // Callers go where an endpoint says that its node is.
        if let Some(elsewhere) = endpoints.iter().find(|e| e.node_address != self.address) {
            let found = format!("{} at {}", elsewhere.address, elsewhere.node_address);
            tracing::warn!(node = %self.node, registered = %self.address, found, "endpoints refused");
            return Err(Refusal::new(Code::NodeAddressMismatch, format!("endpoints at {}", self.address), found));
        }
        let items = self.replica.reports().put(NodeReport::Endpoints(self.node, endpoints.clone())).await?;
        // An entry may have gone meanwhile, an address may be another's: the rest stands and so does the stream.
        let refused = endpoints.iter().zip(items).filter_map(|(e, item)| Some((e, item.err()?)));
        for (endpoint, refusal) in refused {
            let (id, address) = (&endpoint.spiffe_id, endpoint.address);
            tracing::warn!(node = %self.node, %id, %address, %refusal, "endpoint refused");
        }
        Ok(())
    }

    /// One stream a node: of two, only the newer is heard and served, whoever holds the other.
    fn newest(&self) -> Result<(), Refusal> {
        match self.heard.newer.has_changed() {
            Ok(_) => Ok(()),
            Err(_) => Err(Refusal::new(Code::Unavailable, "the node's newest stream", "an older one")),
        }
    }
}

/// Commits where the node's tunnels come from, once per admission. What a replica that lags behind knows of this admission
/// is so everywhere; what it knows of a former one is not asked.
async fn register(
    replica: &Replica,
    node: NodeId,
    generation: Generation,
    address: Ipv4Addr,
    svid: Option<&PeerSvid>,
) -> Result<(), Refusal> {
    let done = replica.local(|s| {
        trusted(s, &node, generation, svid)?;
        s.has_registered(&node, generation, address)
    })?;
    if done {
        return Ok(());
    }
    replica.reports().put(NodeReport::Address(node, generation, address)).await.map(drop)
}

/// The node is in, and what its certificate stands for was not denied.
fn trusted(s: &State, node: &NodeId, generation: Generation, svid: Option<&PeerSvid>) -> Result<(), Refusal> {
    if svid.is_some_and(|svid| is_denied(s, svid)) {
        return Err(Refusal::new(Code::SvidRevoked, "an SVID that was not revoked", Code::SvidRevoked.as_str()));
    }
    let row = s.node(node).ok_or_else(|| Refusal::new(Code::NodeUnknown, "an enrolled node", "none"))?;
    if let Some(code) = row.state.bars_trust() {
        let found = match row.state {
            NodeState::Untrusted(why) => why.as_str(),
            other => other.as_str(),
        };
        return Err(Refusal::new(code, "an admitted node", found));
    }
    if row.generation < generation || s.denied(node).is_some_and(|g| generation <= g) {
        return Err(Refusal::new(Code::NodeUntrusted, "a generation in force", generation.to_string()));
    }
    // Whoever enrolled since has the newer leaf. Another who still shows the older one must enrol: that tells a copied
    // TPM from a lost answer.
    if row.generation != generation {
        let expected = format!("the leaf of generation {}", row.generation);
        return Err(Refusal::new(Code::SvidUntrusted, expected, generation.to_string()));
    }
    Ok(())
}

/// What the node may know of a refusal: no details, but the code of what made it untrusted.
fn told(refusal: Refusal) -> Refusal {
    let why = Code::from_text(&refusal.found).map(Code::as_str).unwrap_or_default();
    Refusal { found: why.to_owned(), ..refusal.for_node() }
}

/// The next instant of a raster that all streams share, so that what many of them do by the clock wakes a thread once and
/// finds its caches warm: a thread's sleep and waking cost more than a heartbeat.
pub(super) fn in_company(at: Instant) -> Instant {
    static ORIGIN: LazyLock<Instant> = LazyLock::new(Instant::now);
    let since = at.saturating_duration_since(*ORIGIN).as_millis();
    let raster = RASTER.as_millis();
    *ORIGIN + RASTER * u32::try_from(since.div_ceil(raster)).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_due_together_is_done_at_one_instant_and_never_early() {
        let now = Instant::now();
        let mut instants = std::collections::BTreeSet::new();
        for ms in 0..1_000 {
            let at = now + Duration::from_millis(ms);
            let then = in_company(at);
            // The raster is laid in whole milliseconds.
            assert!(then + Duration::from_millis(1) > at && then < at + RASTER + Duration::from_millis(1), "{ms}");
            instants.insert(then);
        }
        assert!((4..=5).contains(&instants.len()), "{}", instants.len());
    }
}
