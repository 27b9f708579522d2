//! The receiving end of tunnels: proves who calls, decides again, and connects to the pod.
//!
//! The far node is not relied on: its verdict is worth nothing here. What cannot be proved is refused.

mod client;
mod goal;
mod handshake;
mod judge;
mod rates;
mod seats;

use self::client::{Client, client};
pub(crate) use self::goal::is_ours;
use self::goal::{NOWHERE, goal};
use self::judge::{Call, at_home, judge, permitted, trusted};
pub use self::rates::PER_S;
use self::rates::Rates;
use self::seats::Seats;
use crate::carriers::Carriers;
use crate::clock::Clock;
use crate::course::{Course, Flow};
use crate::denials::Lane;
use crate::hbone::{self, Door, NATIVE_IDLE_MAX, POD_CONNECT_MAX};
use crate::kernel::KernelHandle;
use crate::legs::Legs;
use crate::lines::Lines;
use crate::metrics::METRICS;
use crate::native::{self, Begun, Open, Reason};
use crate::netns::NetnsThread;
use crate::plane::{Follow, LocalPod, Plane};
use crate::pump::{self, End};
use crate::recent;
use crate::record::{Judged, Record, flag};
use crate::records::alert;
use crate::said::{self, Said};
use crate::secure::{Bytestream, Secured};
use crate::seen::{self, Seen};
use ambit_model::{Code, Refusal, Revision};
use ambit_policy::Verdict;
use bytes::Bytes;
use h2::RecvStream;
use h2::server::SendResponse;
use http::{Request, Response, StatusCode};
use std::net::{SocketAddr, SocketAddrV4};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::timeout;

/// Handshakes at once with addresses from which nodes are known to call.
const HANDSHAKES_MAX: usize = 1024;
/// And with all others: none of them will be let in, but it is to be found out, and told, why.
const STRANGERS_MAX: usize = 64;
/// Connections at once, over all tunnels.
const FLOWS_MAX: usize = 16 * 1024;
/// From accept to a finished handshake: silence and garbage hold a place no longer than this.
const HANDSHAKE_MAX: Duration = Duration::from_secs(3);

/// The listener's parts. Cloning shares.
#[derive(Clone, Debug)]
pub struct Inbound {
    plane: watch::Receiver<Option<Arc<Plane>>>,
    denials: Lane,
    legs: Legs,
    clock: Arc<Clock>,
    tunnels: Seats,
    /// Whoever proves nothing takes no place of those who did, nor strangers one of the known.
    handshakes: Arc<Semaphore>,
    strangers: Arc<Semaphore>,
    flows: Arc<Semaphore>,
    rates: Rates,
    /// Of connections that an audit policy matched; all of them are counted.
    audited: Arc<Lines>,
    course: Course,
    seen: Seen,
}

/// A connection to a workload that was let through, and by what: whoever carries it follows these.
struct Admitted {
    pod: TcpStream,
    _open: Counted,
    follow: Follow,
}

impl Inbound {
    /// An inbound side that follows `plane` and `denials`.
    pub fn new(
        plane: watch::Receiver<Option<Arc<Plane>>>,
        denials: Lane,
        netns: NetnsThread,
        clock: Arc<Clock>,
    ) -> Self {
        let tunnels = Seats::new();
        let [handshakes, strangers, flows] =
            [HANDSHAKES_MAX, STRANGERS_MAX, FLOWS_MAX].map(|max| Arc::new(Semaphore::new(max)));
        let (audited, course, seen) = (Arc::default(), Course::default(), Seen::default());
        let (legs, rates) = (Legs::new(netns), Rates::of(PER_S));
        Self { plane, denials, legs, clock, tunnels, handshakes, strangers, flows, rates, audited, course, seen }
    }

    /// The same in this course: tunnels are accepted while it serves, and left when it drains; connections count in it.
    pub fn in_course(self, course: Course) -> Self {
        Self { course, ..self }
    }

    /// The same, where each caller may open so many connections a second.
    pub fn limited_to(self, per_s: u32) -> Self {
        Self { rates: Rates::of(per_s), ..self }
    }

    /// The same, by this kernel part, which shows workloads who calls.
    pub fn by_kernel(self, kernel: KernelHandle) -> Self {
        Self { legs: self.legs.told_to(kernel), ..self }
    }

    /// The same, telling there who called whom.
    pub fn seen_by(self, seen: Seen) -> Self {
        Self { seen, ..self }
    }

    /// Accepts tunnels on threads that carry, each of which has one of `listeners` (they share an address). For ever, unless
    /// one of them cannot be served.
    pub async fn serve_on(
        self,
        carriers: &Carriers,
        door: Door,
        listeners: Vec<std::net::TcpListener>,
    ) -> std::io::Result<()> {
        let serve = |(n, listener): (usize, std::net::TcpListener)| {
            let this = self.clone();
            carriers.handle(n).spawn(async move { this.serve_at(door, TcpListener::from_std(listener)?).await })
        };
        let all: Vec<_> = listeners.into_iter().enumerate().map(serve).collect();
        let (ended, ..) = futures::future::select_all(all).await;
        ended.map_err(std::io::Error::other)?
    }

    /// Accepts tunnels at the node's address until the listener fails.
    pub async fn serve(self, listener: TcpListener) -> std::io::Result<()> {
        self.serve_at(Door::Node, listener).await
    }

    /// Accepts tunnels at this door until the listener fails.
    pub async fn serve_at(self, door: Door, listener: TcpListener) -> std::io::Result<()> {
        let course = self.course.clone();
        course.while_serving(self.accept(door, listener)).await
    }

    /// Tunnels that are open now, or in their handshake.
    pub fn tunnels(&self) -> usize {
        let taken = |max: usize, places: &Semaphore| max.saturating_sub(places.available_permits());
        self.tunnels.taken() + taken(HANDSHAKES_MAX, &self.handshakes) + taken(STRANGERS_MAX, &self.strangers)
    }

    async fn accept(self, door: Door, listener: TcpListener) -> std::io::Result<()> {
        loop {
            let (tcp, from) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Out of descriptors, say: wait instead of spinning.
                    tracing::warn!(%error, "accept failed");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            };
            let places = if self.knows(from.ip()) { &self.handshakes } else { &self.strangers };
            let Ok(shaking) = places.clone().try_acquire_owned() else {
                METRICS.handshakes.inc(["failed", "busy"]);
                continue;
            };
            let this = self.clone();
            tokio::spawn(async move {
                if let Err(error) = this.tunnel(tcp, door, from, shaking).await {
                    tracing::debug!(%from, %error, "tunnel ended");
                }
            });
        }
    }

    async fn tunnel(
        &self,
        tcp: TcpStream,
        door: Door,
        from: SocketAddr,
        place: OwnedSemaphorePermit,
    ) -> Result<(), Refusal> {
        // In a box: a tunnel that is open shall not hold the room that its handshake took.
        let shaking = Box::pin(self.handshake(tcp, door, from));
        let shaken = timeout(HANDSHAKE_MAX, shaking).await.unwrap_or_else(|_| {
            Err(("timeout", Refusal::new(Code::Unauthenticated, "a handshake within 3 s", "silence")))
        });
        drop(place);
        let (secured, call, _place) = shaken.map_err(|(reason, refusal)| {
            METRICS.handshakes.inc(["failed", reason]);
            refusal
        })?;
        METRICS.handshakes.inc(["ok", "none"]);
        tracing::debug!(%from, caller = %call.peer.id(), called = %call.to, "tunnel open");
        // A node that was put out keeps no tunnel, not even an idle one.
        let denied = self.denials.until(|denials| trusted(denials, &call).is_err());
        // Nor one whose node is elsewhere by now, or nowhere.
        let moved = self.moved(&call);
        let served = async {
            match native::is_native(secured.protocol.as_deref()) {
                true => self.serve_native(secured, &call).await,
                false => self.serve_hbone(secured, &call).await,
            }
        };
        tokio::select! {
            // What is carried ends first, with a reset on both sides, by the same word.
            biased;
            served = served => served,
            () = denied => trusted(&self.denials.now(), &call),
            refusal = moved => Err(refusal),
        }
    }

    async fn serve_hbone(&self, secured: Secured, call: &Call) -> Result<(), Refusal> {
        let http2 = |e: String| Refusal::new(Code::BadRequest, "HTTP/2 within 3 s", e);
        let shaken = timeout(HANDSHAKE_MAX, hbone::accept(Bytestream::new(secured))).await;
        let mut streams = shaken.map_err(|_| http2("silence".into()))?.map_err(|e| http2(e.to_string()))?;
        let quiet = hbone::silence(streams.ping_pong(), hbone::CALLER_PONG_MAX, None);
        tokio::pin!(quiet);
        // A stream that was reset is none for HTTP/2, and its connection to the workload is still being made.
        let places = Arc::new(Semaphore::new(hbone::REQUESTS_MAX));
        // What it carries ends with the tunnel, and that with its connection.
        let mut left = false;
        loop {
            let next = tokio::select! {
                next = streams.accept() => next,
                () = &mut quiet => return Ok(()),
                () = self.course.draining(), if !left => {
                    // GOAWAY: what was asked until it is heard is served, and what is carried ends in its time.
                    left = true;
                    streams.graceful_shutdown();
                    continue;
                }
            };
            let Some(Ok((request, mut respond))) = next else { return Ok(()) };
            let Ok(place) = places.clone().try_acquire_owned() else {
                answer(&mut respond, Reason::Busy.status());
                continue;
            };
            let (this, call) = (self.clone(), call.clone());
            tokio::spawn(async move {
                this.stream(call, request, respond).await;
                drop(place);
            });
        }
    }

    /// One connection after another, as long as each ends in order or is refused.
    async fn serve_native(&self, mut tunnel: Secured, call: &Call) -> Result<(), Refusal> {
        let mut wait = HANDSHAKE_MAX;
        loop {
            let asked = tokio::select! {
                // What was asked before is answered.
                biased;
                asked = timeout(wait, native::asked(&mut tunnel)) => asked,
                () = self.course.draining() => {
                    let _ = native::leave(tunnel).await;
                    return Ok(());
                }
            };
            let Ok(Ok(open)) = asked else {
                // The peer says nothing more, has ended the tunnel, or is to know what was wrong.
                tunnel.tell_failure();
                return Ok(());
            };
            wait = NATIVE_IDLE_MAX;
            let carried = match open {
                Some(open) => self.native(&mut tunnel, call, open).await,
                None => Err(Reason::Malformed),
            };
            match carried {
                Ok(End::Closed) => {}
                Ok(_) => return Ok(()),
                Err(reason) => {
                    let told = timeout(HANDSHAKE_MAX, native::refuse(&mut tunnel, reason)).await;
                    if !matches!(told, Ok(Ok(()))) || reason == Reason::Malformed {
                        tunnel.turn_away(alert::CLOSE_NOTIFY);
                        return Ok(());
                    }
                }
            }
        }
    }

    /// How the connection ended; after a refusal, as after an end in order, the tunnel is free for another.
    async fn native(&self, tunnel: &mut Secured, call: &Call, open: Open) -> Result<End, Reason> {
        let trace = open.trace.clone().unwrap_or_else(said::trace);
        let record = Record::inbound(call.peer.id(), &call.to, open.to, Some(&trace));
        let Open { to, prompt, from, mut first, .. } = open;
        let refused = |reason| {
            record.refused(flag_of(reason));
            reason
        };
        let mut admitted = self.connect(call, Ok(to), from, &record).await.map_err(refused)?;
        // What the workload does not take at once waits, and the caller does not: it may read later.
        let written = match admitted.pod.try_write(&first) {
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => 0,
            written => written.map_err(|_| refused(Reason::Reset))?,
        };
        let down = first.split_off(written);
        let agreed = timeout(HANDSHAKE_MAX, native::agree(tunnel, &mut admitted.pod, prompt)).await;
        // The tunnel is broken, or takes nothing.
        let Ok(Ok(agreed)) = agreed else {
            record.refused(flag::DOWNSTREAM_TERMINATED);
            return Ok(End::Far);
        };
        let begun = Begun { up: Vec::new(), down, sent: agreed.map_err(refused)?, received: written as u64 };
        let Admitted { mut pod, _open, follow } = admitted;
        let cut = self.cut_once(call, to, follow);
        let carried = native::carry(&mut pod, tunnel, begun, cut).await;
        record.ended(&carried);
        Ok(carried.end)
    }

    async fn stream(self, call: Call, request: Request<RecvStream>, mut respond: SendResponse<Bytes>) {
        let to = goal(&request);
        let shown = *to.as_ref().unwrap_or(&NOWHERE);
        let said = Said::read(request.headers());
        let trace = said.traceparent.clone().unwrap_or_else(said::trace);
        let record = Record::inbound(call.peer.id(), &call.to, shown, Some(&trace)).saying(&said);
        let Admitted { pod, _open, follow } = match self.connect(&call, to, said.from(), &record).await {
            Ok(admitted) => admitted,
            Err(reason) => {
                record.refused(flag_of(reason));
                return answer(&mut respond, reason.status());
            }
        };
        let mut ok = Response::new(());
        *ok.status_mut() = StatusCode::OK;
        let Ok(send) = respond.send_response(ok, false) else { return };
        let cut = self.cut_once(&call, shown, follow);
        let carried = pump::carry(pod, send, request.into_body(), Vec::new(), cut).await;
        record.ended(&carried);
    }

    /// Judges and connects: of both modes the one way to a workload. `from` is the other end's word of where the connection
    /// begins. What is returned counts as open.
    async fn connect(
        &self,
        call: &Call,
        to: Result<SocketAddr, Refusal>,
        from: Option<SocketAddrV4>,
        record: &Record<'_>,
    ) -> Result<Admitted, Reason> {
        let flow = self.course.flow();
        let place = self.flows.clone().try_acquire_owned().map_err(|_| Reason::Busy)?;
        if !self.rates.take(call.peer.id()) {
            METRICS.limited.inc([]);
            METRICS.connections.inc(["inbound", "failed"]);
            return Err(Reason::Busy);
        }
        let mut follow = Follow::of(&self.plane, &self.denials);
        let asked = to.as_ref().ok().map(|to| to.port());
        let denied = |refusal: Refusal| {
            METRICS.connections.inc(["inbound", "denied"]);
            tracing::info!(caller = %call.peer.id(), called = %call.to, %refusal, "inbound refused");
            if let (Code::PolicyDenied, Some(port)) = (refusal.code, asked) {
                self.seen.saw(seen::End::Called, call.peer.id(), &call.to, port, false);
            }
            self.note_refused(call, asked, &refusal, record);
            match refusal.code {
                Code::BadRequest => Reason::Malformed,
                Code::NotFound => Reason::Elsewhere,
                // Another node may know more.
                Code::PolicyStale => Reason::Unreachable,
                _ => Reason::Denied,
            }
        };
        let begun = Instant::now();
        let admitted = to.and_then(|to| self.admit(&mut follow, call, to).map(|admitted| (admitted, to)));
        METRICS.authz.observe(begun.elapsed());
        let ((revision, pod, mut verdict), to) = admitted.map_err(denied)?;
        let judged = Judged { at: self.clock.now(), revision, allowed: true, words: recent::words(&verdict) };
        record.judged(self.seen.recent(), to.port(), judged);
        let failed = |reason| {
            METRICS.connections.inc(["inbound", "failed"]);
            reason
        };
        let client = self.client(call, from).shown();
        let tcp = match timeout(POD_CONNECT_MAX, self.legs.connect(&pod, to, call.peer.id(), client)).await {
            Ok(Ok(tcp)) => tcp,
            Ok(Err(error)) => {
                tracing::debug!(%to, %error, "pod does not answer");
                return Err(failed(Reason::Unreachable));
            }
            Err(_) => return Err(failed(Reason::Timeout)),
        };
        // No byte was passed on yet: what was withdrawn while the pod was waited for lets none through.
        if follow.has_changed() {
            (_, _, verdict) = self.admit(&mut follow, call, to).map_err(denied)?;
        }
        if let Some(rule) = verdict.audited {
            METRICS.audited.inc(["inbound"]);
            if let Some(left_out) = self.audited.next(Instant::now()) {
                let (caller, called, port) = (call.peer.id(), &call.to, to.port());
                tracing::info!(%rule, %caller, %called, port, left_out, "audited: a deny would refuse it");
            }
        }
        METRICS.connections.inc(["inbound", "ok"]);
        self.seen.saw(seen::End::Called, call.peer.id(), &call.to, to.port(), true);
        METRICS.open.add(["inbound"], 1.0);
        Ok(Admitted { pod: tcp, _open: Counted { _place: place, _flow: flow }, follow })
    }

    /// By which rule, where one refused it, and by what else otherwise.
    fn note_refused(&self, call: &Call, port: Option<u16>, refusal: &Refusal, record: &Record<'_>) {
        let (plane, port) = (self.plane.borrow().clone(), port.unwrap_or_default());
        let revision = plane.as_ref().map_or(Revision(0), |plane| plane.view.revision);
        let verdict = plane
            .filter(|_| refusal.code == Code::PolicyDenied)
            .map(|plane| plane.view.rules.evaluate(call.peer.id(), &call.to, port, self.clock.moment()));
        let words = verdict.filter(|verdict| !verdict.allowed).map(|verdict| recent::words(&verdict));
        let why = || format!("{}: not {}", refusal.code.as_str(), refusal.expected);
        let words = words.unwrap_or_else(|| (String::new(), why()));
        let judged = Judged { at: self.clock.now(), revision, allowed: false, words };
        record.judged(self.seen.recent(), port, judged);
    }

    /// Returns once the connection may not go on.
    async fn cut_once(&self, call: &Call, to: SocketAddr, follow: Follow) {
        let refusal = self.revoked(call, to, follow).await;
        METRICS.cut.inc(["inbound"]);
        tracing::info!(caller = %call.peer.id(), called = %call.to, %refusal, "live connection cut");
    }

    /// The receiving node's own decision.
    fn admit(
        &self,
        follow: &mut Follow,
        call: &Call,
        to: SocketAddr,
    ) -> Result<(Revision, Arc<LocalPod>, Verdict), Refusal> {
        let (plane, denials) = follow.now();
        let plane = plane.ok_or_else(|| Refusal::new(Code::Unavailable, "a slice", "none yet"))?;
        // Not-here and not-yours look alike from outside.
        let pod = plane.pods.get(&to.ip()).filter(|pod| *pod.id() == call.to && call.at.is(to.ip())).cloned();
        let pod = pod.ok_or_else(|| {
            let expected = format!("an address of {} that the tunnel is to", call.to);
            Refusal::new(Code::NotFound, expected, to.to_string())
        })?;
        if is_ours(to.port()) {
            let found = format!("port {}", to.port());
            return Err(Refusal::new(Code::BadRequest, "a port of the workload's, not of its mesh", found));
        }
        let verdict = judge(&plane, &denials, call, to, self.clock.moment())?;
        Ok((plane.view.revision, pod, verdict))
    }

    /// Returns the refusal once what was admitted would not be admitted any more, by what these say next.
    async fn revoked(&self, call: &Call, to: SocketAddr, mut follow: Follow) -> Refusal {
        while follow.changed().await.is_ok() {
            let (now, denied) = follow.now();
            // An SVID that ran out does not end a connection that it began; being denied does, and so does policy.
            if let Some(Err(refusal)) = now.map(|p| permitted(&p, &denied, call, to, self.clock.moment())) {
                return refusal;
            }
        }
        ending()
    }

    /// Returns the refusal once the caller's node is not where the tunnel comes from.
    async fn moved(&self, call: &Call) -> Refusal {
        let mut plane = self.plane.clone();
        loop {
            let now = plane.borrow_and_update().clone();
            if let Some(Err(refusal)) = now.map(|p| at_home(&p.view, call)) {
                return refusal;
            }
            if plane.changed().await.is_err() {
                return ending();
            }
        }
    }

    /// What its workload is to see for the connection's client.
    fn client(&self, call: &Call, said: Option<SocketAddrV4>) -> Client {
        let plane = self.plane.borrow();
        let client = plane.as_ref().map_or(Client::Unsaid, |plane| client(plane, call, said));
        match client {
            Client::At(_) => {}
            Client::Unsaid => METRICS.clients.inc(["unsaid"]),
            Client::Disbelieved(said) => {
                METRICS.clients.inc(["disbelieved"]);
                tracing::debug!(caller = %call.peer.id(), node = %call.from, %said, "not shown as the client");
            }
        }
        client
    }
}

/// A connection that counts as open until this is dropped.
struct Counted {
    _place: OwnedSemaphorePermit,
    _flow: Flow,
}

impl Drop for Counted {
    fn drop(&mut self) {
        METRICS.open.add(["inbound"], -1.0);
    }
}

fn flag_of(reason: Reason) -> &'static str {
    match reason {
        Reason::Malformed => flag::PROTOCOL_ERROR,
        Reason::Denied => flag::DENIED,
        Reason::Elsewhere => flag::NO_ROUTE,
        Reason::Unreachable | Reason::Timeout => flag::UPSTREAM_FAILED,
        Reason::Busy => flag::OVERFLOW,
        Reason::Reset => flag::UPSTREAM_TERMINATED,
    }
}

fn ending() -> Refusal {
    Refusal::new(Code::Unavailable, "a running agent", "it is ending")
}

fn answer(respond: &mut SendResponse<Bytes>, status: StatusCode) {
    let mut response = Response::new(());
    *response.status_mut() = status;
    // The caller may be gone; then nobody needs the answer.
    let _ = respond.send_response(response, true);
}
