//! The agent's stream to its cell: says what it holds, takes what changed since, reports endpoints, acknowledges what is in
//! the kernel.
//!
//! Any replica will do; when one is lost the next is tried. Nothing older than what is held is taken (I7). Denials are
//! in force before anything else is read; rounds of re-attestation are answered while the stream goes on.

use crate::backoff::{Backoff, random};
use crate::clock::Clock;
use crate::control::Outcome;
use crate::denials::{Denials, Lane};
use crate::enrol::Enrolled;
use crate::issued::Issued;
use crate::membership::Told;
use crate::metrics::METRICS;
use crate::outbox::{Fresh, Next, Outbox};
use crate::reattest::{Answer, Asked, Rounds};
use crate::recent::Id;
use crate::seen::Seen;
use crate::takeover::{Heard, Relay, Succession};
use crate::view::View;
use ambit_identity::{Expect, SharedTrust};
use ambit_model::policy::Endpoint;
use ambit_model::{ClusterId, Code, Refusal, Revision, Stamp, TrustDomain};
use ambit_proto::resources::{Held, Taken};
use ambit_proto::status::from_status;
use ambit_proto::v1;
use ambit_proto::v1::agent_message::Body as Up;
use ambit_proto::v1::agent_stream_client::AgentStreamClient;
use ambit_proto::v1::server_message::Body as Down;
use ambit_proto::v1::{
    Ack, AgentMessage, BundleSequence, Delta, EndpointReport, FoundConnection, Holding, Nack, ServerMessage, Slice,
    Subscribe,
};
use ambit_transport::{Dialer, Identity};
use futures::future::{BoxFuture, OptionFuture};
use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

/// The first retry is quick: a lost leader means another replica, not a lost cell.
const RETRY_BASE: Duration = Duration::from_millis(100);
/// Never longer, so that a healed cell has its agents back soon.
const RETRY_CAP: Duration = Duration::from_secs(3);
/// The cell says something at least every eight seconds; without a word for this long the replica's process is taken for
/// hung. A replica that died or was cut off is noticed within five seconds, by the connection.
const SILENCE_MAX: Duration = Duration::from_secs(20);
/// A replica that tells nothing new of its leader for so long is left for another: the cell may go on without it.
const NEWS_MAX: Duration = Duration::from_secs(30);
/// How often it is told who called whom.
const SEEN_EVERY: Duration = Duration::from_secs(10);
/// From a replica of a former release: a slice is a few hundred bytes per entry, policy and endpoint; 10,000 of each fit.
/// Deltas come in parts of a megabyte.
const SLICE_BYTES_MAX: usize = 16 * 1024 * 1024;
/// Messages up in flight; what waits beyond them is in the outbox.
const UP_QUEUE: usize = 8;
/// How often in a row the cell must refuse this node before it is believed: one replica may not have heard yet that the
/// node was let in again.
const TOLD_TIMES: u32 = 2;

/// The stream's parts.
pub struct Session {
    /// Whom to trust.
    pub trust: SharedTrust,
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
    /// Told whom to refuse.
    pub denials: Lane,
    /// Answers rounds.
    pub rounds: Rounds,
    /// Who comes after this agent: once it has a stream this one has none, and hears what it passes on.
    pub succession: Succession,
    /// Who was before this agent, and hears what the cell says for as long as it carries anything.
    pub relay: Option<Relay>,
    /// The wires.
    pub wires: Wires,
}

/// What the stream reads and writes.
#[derive(Clone, Debug)]
pub struct Wires {
    /// This node's admission: with each new one the stream starts anew, under its leaf.
    pub enrolled: watch::Receiver<Option<Arc<Enrolled>>>,
    /// What the cell says of an admission.
    pub told: Arc<watch::Sender<Option<Told>>>,
    /// The newest view.
    pub desired: Arc<watch::Sender<Option<Arc<View>>>>,
    /// What became of it.
    pub outcome: watch::Receiver<Option<Outcome>>,
    /// What to report, once it was said.
    pub endpoints: watch::Receiver<Option<Vec<Endpoint>>>,
    /// What is in force and shown here, which is reported too.
    pub issued: Issued,
    /// Who called whom, which is reported too.
    pub seen: Seen,
    /// A working channel for other calls, while there is one.
    pub channel: Arc<watch::Sender<Option<Channel>>>,
}

impl Wires {
    fn reports(&self) -> bool {
        self.endpoints.borrow().is_some()
    }
}

/// Why a stream ended.
struct Lost {
    refusal: Refusal,
    /// The cell said so; else we found it ourselves.
    said: bool,
}

impl From<Refusal> for Lost {
    fn from(refusal: Refusal) -> Self {
        Self { refusal, said: false }
    }
}

fn said(status: tonic::Status) -> Lost {
    Lost { refusal: from_status(&status), said: true }
}

/// What one stream has under way.
struct Stream {
    /// The admission whose leaf it shows.
    me: Arc<Enrolled>,
    outbox: Outbox,
    /// The round being answered.
    answering: Option<BoxFuture<'static, Answer>>,
    /// The newest round that waits for it.
    waiting: Option<Asked>,
    /// When it told last what its leader had just written.
    news: Instant,
}

impl Session {
    /// Runs until the process ends.
    pub async fn run(mut self) {
        let succession = self.succession.clone();
        loop {
            // Its own stream for as long as whoever takes over has none.
            let first = tokio::select! {
                () = self.stream() => return,
                heard = succession.heard() => heard,
            };
            METRICS.component.set(["stream"], 0.0);
            self.wires.channel.send_replace(None);
            tokio::select! {
                () = self.follow(&succession, first) => return,
                () = succession.over() => succession.forget().await,
            }
        }
    }

    /// Hears the cell through the agent that takes over.
    async fn follow(&self, succession: &Succession, first: Heard) {
        // What is refused here, the successor refuses to the cell.
        let mut outbox = Outbox::default();
        let mut heard = first;
        loop {
            self.clock.heard();
            match heard {
                Heard::Cell(down) => match *down {
                    Down::Slice(slice) => self.take_slice(slice, &mut outbox),
                    Down::Denials(list) => self.take_denials(&list),
                    Down::Heartbeat(_) | Down::Delta(_) | Down::Quote(_) | Down::Find(_) => {}
                },
                Heard::Out(out) => self.denials.set_out(out),
            }
            heard = succession.heard().await;
        }
    }

    /// One stream after another.
    async fn stream(&mut self) {
        let mut backoff = Backoff::new(RETRY_BASE, RETRY_CAP);
        // Agents start at different servers, so that one replica does not get them all.
        let mut at = usize::try_from(random() % 1024).unwrap_or_default();
        let mut told = 0;
        let mut held = Held::default();
        loop {
            let me = match self.wires.enrolled.wait_for(Option::is_some).await {
                Ok(me) => me.clone(),
                Err(_) => return,
            };
            let (Some(me), Some(server)) = (me, self.servers.get(at % self.servers.len().max(1)).copied()) else {
                return;
            };
            held.resume();
            let ended = self.once(server, &me, &mut held, &mut backoff, &mut told).await;
            METRICS.component.set(["stream"], 0.0);
            self.wires.channel.send_replace(None);
            let Err(Lost { refusal, said }) = ended else {
                tracing::debug!(%server, "stream starts anew");
                continue;
            };
            at = at.wrapping_add(1);
            told += u32::from(said && Told::concerns(refusal.code));
            if told >= TOLD_TIMES {
                told = 0;
                self.wires.told.send_replace(Some(Told { refusal, generation: me.generation }));
                // Under this leaf the cell will not speak to us again.
                if self.wires.enrolled.changed().await.is_err() {
                    return;
                }
                continue;
            }
            let wait = backoff.next(random());
            tracing::warn!(%server, %refusal, wait_ms = wait.as_millis(), "stream lost");
            tokio::time::sleep(wait).await;
        }
    }

    /// One stream, until it breaks or this node has a new leaf to show.
    async fn once(
        &mut self,
        server: SocketAddr,
        me: &Arc<Enrolled>,
        resources: &mut Held,
        backoff: &mut Backoff,
        told: &mut u32,
    ) -> Result<(), Lost> {
        // Of this admission and no later one: what is quoted on the stream is bound to the leaf that opened it.
        let dialer = Dialer::new(self.trust.clone(), Identity::new(Some(me.identity.clone())));
        let channel = dialer.channel(server, Expect::ReplicaOf(self.trust_domain.clone())).await?;
        let mut client = AgentStreamClient::new(channel.clone()).max_decoding_message_size(SLICE_BYTES_MAX);
        let (up, queue) = mpsc::channel(UP_QUEUE);
        let hello = Subscribe {
            node_address: self.node_address.to_string(),
            have_revision: resources.revision(),
            deltas: true,
            have_digest: resources.digest(),
            holds_revision: resources.holds(),
            finds: true,
        };
        let mut known = self.wires.issued.watch();
        let mut held = self.holding(me);
        // What is here is not known at once after a start, and what was reported before it is so until then.
        let report = self.wires.reports().then(|| self.report());
        for body in [Up::Subscribe(hello), Up::Holding(held.clone())].into_iter().chain(report) {
            up.send(AgentMessage { body: Some(body) }).await.map_err(|_| ended())?;
        }
        let answer = tokio::time::timeout(SILENCE_MAX, client.sync(ReceiverStream::new(queue))).await;
        let mut down = answer.map_err(|_| silence())?.map_err(said)?.into_inner();
        self.wires.channel.send_replace(Some(channel));
        METRICS.component.set(["stream"], 1.0);
        tracing::info!(%server, "stream open");
        let mut tell = tokio::time::interval(SEEN_EVERY);
        tell.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut stream =
            Stream { me: me.clone(), outbox: Outbox::default(), answering: None, waiting: None, news: Instant::now() };
        loop {
            tokio::select! {
                message = tokio::time::timeout(SILENCE_MAX, down.message()) => {
                    let message = message.map_err(|_| silence())?.map_err(said)?;
                    self.take(message.ok_or_else(ended)?, resources, &mut stream);
                    if stream.news.elapsed() >= NEWS_MAX {
                        return Err(no_news().into());
                    }
                    backoff.reset();
                    *told = 0;
                }
                changed = self.wires.endpoints.changed() => {
                    changed.map_err(|_| ended())?;
                    stream.outbox.fresh(Fresh::Endpoints);
                }
                changed = known.changed() => {
                    changed.map_err(|_| ended())?;
                    let now = self.holding(me);
                    if now != held {
                        held = now.clone();
                        stream.outbox.fresh(Fresh::Holding);
                    }
                }
                changed = self.wires.outcome.changed() => {
                    changed.map_err(|_| ended())?;
                    stream.outbox.fresh(Fresh::Outcome);
                }
                _ = tell.tick() => stream.outbox.fresh(Fresh::Seen),
                changed = self.wires.enrolled.changed() => return changed.map_err(|_| ended().into()),
                Some(answer) = OptionFuture::from(stream.answering.as_mut()) => {
                    stream.answering = None;
                    stream.outbox.answer(answer);
                }
                place = stream.outbox.place(&up, SILENCE_MAX), if !stream.outbox.is_empty() => {
                    let place = place.ok_or_else(silence)?;
                    if let Some(body) = self.next(me, &mut stream.outbox) {
                        place.send(AgentMessage { body: Some(body) });
                    }
                    self.begin_round(&mut stream);
                }
            }
        }
    }

    fn take(&mut self, message: ServerMessage, resources: &mut Held, stream: &mut Stream) {
        match message.body {
            Some(Down::Heartbeat(beat)) => {
                self.clock.seen(Stamp(beat.stamp_ms));
                if self.clock.beat(Stamp(beat.committed_ms), Stamp(beat.stamp_ms)) {
                    stream.news = Instant::now();
                }
                resources.confirm(beat.revision);
            }
            Some(Down::Slice(slice)) => self.take_slice(slice, &mut stream.outbox),
            Some(Down::Delta(part)) => self.take_delta(part, resources, &mut stream.outbox),
            Some(Down::Denials(list)) => self.take_denials(&list),
            Some(Down::Quote(request)) => {
                if stream.waiting.replace(Asked { request, at: Instant::now() }).is_some() {
                    METRICS.quotes.inc(["replaced"]);
                }
                self.begin_round(stream);
            }
            Some(Down::Find(find)) => {
                let judged = Id::parse(&find.id).map(|id| self.wires.seen.recent().find(id)).unwrap_or_default();
                stream.outbox.found(FoundConnection { ask: find.ask, judged });
            }
            // A newer server may know more kinds; the stream goes on.
            None => {}
        }
    }

    /// One round at a time: the next begins when the answer to the last is on its way whole.
    fn begin_round(&self, stream: &mut Stream) {
        let idle = !stream.outbox.answers() && stream.answering.is_none();
        if idle && let Some(asked) = stream.waiting.take() {
            stream.answering = Some(Box::pin(self.rounds.clone().answer(stream.me.clone(), asked)));
        }
    }

    /// In force from here on for whoever carries or opens a connection; the kernel follows within milliseconds.
    fn take_denials(&self, list: &v1::Denials) {
        if let Some(relay) = &self.relay {
            relay.denials(list);
        }
        self.clock.seen(Stamp(list.stamp_ms));
        let parsed = Denials::parse(Revision(list.revision), &list.denials, &list.authorities);
        match parsed.and_then(|denials| denials.with_svids(&list.ids, &list.leaves)) {
            Ok(denials) => {
                if !self.denials.offer(denials) {
                    tracing::debug!(revision = list.revision, "older denials dropped");
                }
            }
            // What was refused stays refused, and the slice brings the same list.
            Err(refusal) => tracing::error!(revision = list.revision, %refusal, "denials refused"),
        }
    }

    /// What changed. It is in effect whole, or not at all.
    fn take_delta(&self, part: Delta, resources: &mut Held, outbox: &mut Outbox) {
        self.clock.seen(Stamp(part.stamp_ms));
        let (revision, stamp_ms) = (part.revision, part.stamp_ms);
        let taken = resources.take(part);
        let lost = taken.is_err();
        let read = taken.and_then(|taken| {
            match taken {
                Taken::All => self.take_slice(resources.set().slice(revision, stamp_ms)?, outbox),
                Taken::Denials => {
                    let s = resources.set().denials(revision, stamp_ms)?;
                    let (denials, authorities) = (s.denials, s.authority_denials);
                    let (ids, leaves) = (s.id_denials, s.leaf_denials);
                    self.take_denials(&v1::Denials { revision, stamp_ms, denials, authorities, ids, leaves });
                }
                Taken::Part => {}
                Taken::Dropped => tracing::debug!(revision, held = resources.revision(), "a delta dropped"),
            }
            Ok(())
        });
        if let Err(refusal) = read {
            METRICS.apply.inc(["failed", refusal.code.as_str()]);
            tracing::error!(revision, lost, %refusal, "delta refused");
            outbox.nack(Nack { revision, reason: refusal.to_string(), lost });
        }
    }

    fn take_slice(&self, slice: Slice, outbox: &mut Outbox) {
        if let Some(relay) = &self.relay {
            relay.slice(&slice);
        }
        self.clock.seen(Stamp(slice.stamp_ms));
        let revision = Revision(slice.revision);
        let held = self.wires.desired.borrow().as_ref().map_or(Revision(0), |v| v.revision);
        if revision < held {
            tracing::debug!(revision = revision.0, held = held.0, "older slice dropped");
            return;
        }
        METRICS.revision.set(["desired"], revision.0 as f64);
        match View::parse(slice, &self.trust_domain, &self.cluster) {
            Ok(view) => {
                // The first one is of a node that the cell has just admitted; later ones may be of a replica that is behind.
                if held == Revision(0) {
                    self.clock.heard();
                }
                self.denials.offer(view.denials.clone());
                self.wires.desired.send_replace(Some(Arc::new(view)));
            }
            Err(refusal) => {
                METRICS.apply.inc(["failed", refusal.code.as_str()]);
                tracing::error!(revision = revision.0, %refusal, "slice refused");
                outbox.nack(Nack { revision: revision.0, reason: refusal.to_string(), lost: false });
            }
        }
    }

    /// The next message up, as of now.
    fn next(&mut self, me: &Enrolled, outbox: &mut Outbox) -> Option<Up> {
        match outbox.take()? {
            Next::Message(body) => Some(body),
            Next::Look(Fresh::Endpoints) => Some(self.report()),
            Next::Look(Fresh::Outcome) => self.outcome(),
            Next::Look(Fresh::Holding) => Some(Up::Holding(self.holding(me))),
            Next::Look(Fresh::Seen) => self.wires.seen.take().map(Up::Seen),
        }
    }

    /// Acknowledges what is in the kernel, or says why it is not.
    fn outcome(&mut self) -> Option<Up> {
        let outcome = self.wires.outcome.borrow_and_update().clone()?;
        let revision = outcome.revision.0;
        Some(match outcome.result {
            Ok(digest) => {
                let view = self.wires.desired.borrow().clone().filter(|v| v.revision == outcome.revision);
                let imported = view.map(|v| v.imported.clone()).unwrap_or_default();
                Up::Ack(Ack { revision, map_digest: digest.to_vec(), imported })
            }
            Err(refusal) => Up::Nack(Nack { revision, reason: refusal.to_string(), lost: false }),
        })
    }

    /// By which bundles this node verifies, and under which intermediates it shows leaves.
    fn holding(&self, me: &Enrolled) -> Holding {
        let known = self.wires.issued.now();
        let shown = known.svids.values().filter_map(|svid| svid.as_ref().ok()).map(|svid| svid.authority.clone());
        let authorities: BTreeSet<String> = shown.chain([me.authority.clone()]).collect();
        let bundle = |td: &TrustDomain, sequence| BundleSequence { trust_domain: td.to_string(), sequence };
        let bundles = known.view.iter().flat_map(|view| {
            let foreign = view.foreign.iter().map(|b| bundle(b.trust_domain(), b.sequence()));
            foreign.chain([bundle(view.own.trust_domain(), view.own.sequence())]).collect::<Vec<_>>()
        });
        Holding { bundles: bundles.collect(), authorities: authorities.into_iter().collect() }
    }

    fn report(&mut self) -> Up {
        let endpoints = self.wires.endpoints.borrow_and_update().iter().flatten().map(Into::into).collect();
        Up::Endpoints(EndpointReport { endpoints })
    }
}

fn no_news() -> Refusal {
    let expected = format!("a replica that heard its leader within {} s", NEWS_MAX.as_secs());
    Refusal::new(Code::Unavailable, expected, "one that goes on speaking and tells nothing new")
}

fn silence() -> Refusal {
    Refusal::new(Code::Unavailable, "a word from the server every eight seconds", format!("none for {SILENCE_MAX:?}"))
}

fn ended() -> Refusal {
    Refusal::new(Code::Unavailable, "an open stream", "its end")
}
