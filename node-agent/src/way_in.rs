//! The way in from outside of the mesh: a connection in clear text of a caller that nothing but its address names, let in by the
//! kernel where a policy says so, judged again, and carried to the pod as it is.
//!
//! Each of its packets was judged on the pod's wire by the kernel's tables; here the connection is judged by the policies themselves,
//! opened into the pod from within its namespace, as a tunnel's is, and followed: what is not allowed any more ends. Never: a
//! caller from an address that is of the mesh, or bytes before the verdict.

mod places;

use self::places::Places;
use crate::carriers::Carriers;
use crate::clock::Clock;
use crate::course::Course;
use crate::denials::{Denials, Lane};
use crate::egress::{self, relay};
use crate::hbone::POD_CONNECT_MAX;
use crate::inbound::is_ours;
use crate::kernel::KernelHandle;
use crate::legs::Legs;
use crate::lines::Lines;
use crate::metrics::METRICS;
use crate::netns::NetnsThread;
use crate::plane::{Follow, LocalPod, Plane};
use crate::pump::{self, Carried, End};
use crate::record::flag;
use crate::staleness;
use ambit_identity::svid::Presented;
use ambit_model::policy::{Transport, closed_at};
use ambit_model::{Code, Moment, Refusal, SpiffeId};
use ambit_policy::{RuleRef, Verdict};
use rustls::pki_types::CertificateDer;
use std::net::{IpAddr, SocketAddr, SocketAddrV4};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::timeout;

/// The direction in figures and records.
const DIRECTION: &str = "unmeshed";

/// The parts. Cloning shares.
#[derive(Clone, Debug)]
pub struct WayIn {
    plane: watch::Receiver<Option<Arc<Plane>>>,
    denials: Lane,
    legs: Legs,
    clock: Arc<Clock>,
    places: Places,
    /// Of connections that an audit policy matched, and of those that were refused or cut; all of them are counted.
    audited: Arc<Lines>,
    told: Arc<Lines>,
    course: Course,
}

/// Who is called, and the SVID that it had when the connection began.
struct Called {
    pod: Arc<LocalPod>,
    shown: Presented,
}

impl Called {
    /// The pod at the address that was called. A workload that has no good SVID now, or whose own was revoked, is called by nobody,
    /// whichever way.
    fn of(plane: &Plane, to: SocketAddrV4, now: Moment) -> Result<Self, Refusal> {
        let nobody = || Refusal::new(Code::NotFound, "an address of a workload of this node", to.to_string());
        let pod = plane.pods.get(&IpAddr::V4(*to.ip())).cloned().ok_or_else(nobody)?;
        let chain = &plane.credentials_of(pod.id())?.svid().chain_der;
        let chain: Vec<CertificateDer<'_>> = chain.iter().map(|der| CertificateDer::from(der.as_slice())).collect();
        let shown = Presented::of(&chain).filter(|shown| now.latest < shown.not_after);
        let none = || Refusal::new(Code::SvidUntrusted, format!("an SVID of {}", pod.id()), "one that is over");
        let shown = shown.ok_or_else(none)?;
        Ok(Self { pod, shown })
    }

    /// May who is at `from` speak to it now? That its SVID ran out ends nothing that began before.
    fn judge(
        &self,
        plane: &Plane,
        denials: &Denials,
        from: SocketAddrV4,
        to: SocketAddrV4,
        now: Moment,
    ) -> Result<Verdict, Refusal> {
        let unmeshed = |found: String| Refusal::new(Code::PolicyDenied, "a caller outside of the mesh", found);
        if is_ours(to.port()) {
            return Err(Refusal::new(Code::BadRequest, "a port of the workload's, not of its mesh", to.to_string()));
        }
        if plane.view.claims(*from.ip()) || plane.pods.contains_key(&IpAddr::V4(*from.ip())) {
            return Err(unmeshed(format!("{}, which is of the mesh", from.ip())));
        }
        if let Some(why) = closed_at(IpAddr::V4(*from.ip())) {
            return Err(unmeshed(format!("{}, which is {why}", from.ip())));
        }
        if denials.is_out() {
            return Err(Refusal::new(Code::NodeUntrusted, "a trusted node", "this node was put out"));
        }
        if denials.ends_all() {
            return Err(staleness::stale());
        }
        let id = self.pod.id();
        if denials.denies_presented(&self.shown) {
            return Err(Refusal::new(Code::SvidRevoked, "an SVID that was not revoked", id.as_str()));
        }
        if plane.pods.get(&IpAddr::V4(*to.ip())).is_none_or(|pod| pod.id() != id) {
            return Err(Refusal::new(Code::NotFound, format!("{id} at {}", to.ip()), "somebody else, or nobody"));
        }
        let verdict = plane.view.rules.evaluate_unmeshed(*from.ip(), id, to.port(), now);
        if verdict.allowed {
            return Ok(verdict);
        }
        let found = format!("{} to {id} port {}: {}", from.ip(), to.port(), verdict.reason);
        Err(Refusal::new(Code::PolicyDenied, "an allowed connection", found))
    }
}

impl WayIn {
    /// A way in that follows `plane` and `denials`.
    pub fn new(
        plane: watch::Receiver<Option<Arc<Plane>>>,
        denials: Lane,
        netns: NetnsThread,
        clock: Arc<Clock>,
    ) -> Self {
        let (audited, told, course) = (Arc::default(), Arc::default(), Course::default());
        let (legs, places) = (Legs::new(netns), Places::default());
        Self { plane, denials, legs, clock, places, audited, told, course }
    }

    /// The same in this course: connections are taken while it serves, and count in it while they are carried.
    pub fn in_course(self, course: Course) -> Self {
        Self { course, ..self }
    }

    /// The same, by this kernel part, which shows workloads who calls.
    pub fn by_kernel(self, kernel: KernelHandle) -> Self {
        Self { legs: self.legs.told_to(kernel), ..self }
    }

    /// Accepts on threads that carry, each of which has one of `listeners` (they share an address). For ever, unless one of them
    /// cannot be served.
    pub async fn serve_on(self, carriers: &Carriers, listeners: Vec<std::net::TcpListener>) -> std::io::Result<()> {
        let serve = |(n, listener): (usize, std::net::TcpListener)| {
            let this = self.clone();
            carriers.handle(n).spawn(async move { this.serve(TcpListener::from_std(listener)?).await })
        };
        let all: Vec<_> = listeners.into_iter().enumerate().map(serve).collect();
        let (ended, ..) = futures::future::select_all(all).await;
        ended.map_err(std::io::Error::other)?
    }

    /// Accepts until the listener fails.
    pub async fn serve(self, listener: TcpListener) -> std::io::Result<()> {
        let course = self.course.clone();
        course.while_serving(self.accept(listener)).await
    }

    async fn accept(self, listener: TcpListener) -> std::io::Result<()> {
        loop {
            let (near, from) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Out of descriptors, say: wait instead of spinning.
                    tracing::warn!(%error, "accept failed");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            };
            // Whatever ends it before its end breaks it off, the death of this process included.
            let ends = pump::break_off_unless_ended(&near).and_then(|()| near.local_addr());
            let (SocketAddr::V4(from), Ok(SocketAddr::V4(to))) = (from, ends) else { continue };
            let told = Told { from, to, begun: Instant::now(), lines: self.told.clone() };
            let Some(place) = self.places.take(*from.ip()) else {
                told.refused(None, "failed", flag::OVERFLOW, None, &"too many connections at once");
                continue;
            };
            let this = self.clone();
            tokio::spawn(async move {
                this.carry(near, told).await;
                drop(place);
            });
        }
    }

    /// Carries one connection, until its end.
    async fn carry(&self, near: TcpStream, told: Told) {
        let _flow = self.course.flow();
        let (from, to) = (told.from, told.to);
        if let Err(error) = egress::tune(&near) {
            return told.refused(None, "failed", flag::DOWNSTREAM_TERMINATED, None, &error);
        }
        let mut follow = Follow::of(&self.plane, &self.denials);
        let (called, verdict) = match self.begin(&mut follow, from, to) {
            Ok(begun) => begun,
            Err(refusal) => return told.refused(None, "denied", flag::DENIED, None, &refusal),
        };
        let (id, rule) = (called.pod.id(), verdict.rule);
        let far =
            match timeout(POD_CONNECT_MAX, self.legs.connect(&called.pod, to.into(), from.ip(), Some(from.into())))
                .await
            {
                Ok(Ok(far)) => far,
                Ok(Err(error)) => {
                    return told.refused(Some(id), "failed", flag::UPSTREAM_FAILED, rule.as_ref(), &error);
                }
                Err(_) => {
                    return told.refused(
                        Some(id),
                        "failed",
                        flag::UPSTREAM_FAILED,
                        rule.as_ref(),
                        &"no answer in time",
                    );
                }
            };
        // No byte was passed on yet: what was withdrawn meanwhile lets none through.
        let Verdict { rule, audited, .. } = match self.admit(&mut follow, &called, from, to) {
            Ok(verdict) => verdict,
            Err(refusal) => return told.refused(Some(id), "denied", flag::DENIED, rule.as_ref(), &refusal),
        };
        if let Some(audit) = audited {
            METRICS.audited.inc([DIRECTION]);
            if let Some(left_out) = self.audited.next(Instant::now()) {
                let port = to.port();
                tracing::info!(rule = %audit, caller = %from.ip(), called = %id, port, left_out, "audited: a deny would refuse it");
            }
        }
        METRICS.connections.inc([DIRECTION, "ok"]);
        METRICS.open.add([DIRECTION], 1.0);
        let cut = async {
            let refusal = self.revoked(follow, &called, from, to).await;
            METRICS.cut.inc([DIRECTION]);
            if let Some(left_out) = told.lines.next(Instant::now()) {
                tracing::info!(caller = %from, called = %id, %refusal, left_out, "live connection cut");
            }
        };
        let carried = relay(near, far, cut).await;
        METRICS.open.add([DIRECTION], -1.0);
        told.ended(id, rule.as_ref(), &carried);
    }

    fn begin(&self, follow: &mut Follow, from: SocketAddrV4, to: SocketAddrV4) -> Result<(Called, Verdict), Refusal> {
        // The kernel let in a packet, and the connection may have waited since.
        if self.denials.now().is_stale() {
            return Err(staleness::stale());
        }
        let plane = self.plane.borrow().clone().ok_or_else(no_slice)?;
        let called = Called::of(&plane, to, self.clock.moment())?;
        let verdict = self.admit(follow, &called, from, to)?;
        // Since the tables were made it may have become one of this node's own.
        egress::is_elsewhere(*from.ip())?;
        Ok((called, verdict))
    }

    fn admit(
        &self,
        follow: &mut Follow,
        called: &Called,
        from: SocketAddrV4,
        to: SocketAddrV4,
    ) -> Result<Verdict, Refusal> {
        let (plane, denials) = follow.now();
        called.judge(&*plane.ok_or_else(no_slice)?, &denials, from, to, self.clock.moment())
    }

    /// Returns the refusal once what was admitted would not be admitted any more. Each end of a policy publishes a plane.
    async fn revoked(&self, mut follow: Follow, called: &Called, from: SocketAddrV4, to: SocketAddrV4) -> Refusal {
        loop {
            if let Err(refusal) = self.admit(&mut follow, called, from, to) {
                return refusal;
            }
            if follow.changed().await.is_err() {
                return Refusal::new(Code::Unavailable, "a running agent", "it is ending");
            }
        }
    }
}

fn no_slice() -> Refusal {
    Refusal::new(Code::Unavailable, "a slice", "none yet")
}

/// A connection whose end will be told, at debug level as `record` does: from which address, to whom, and that it is in clear.
struct Told {
    from: SocketAddrV4,
    to: SocketAddrV4,
    begun: Instant,
    lines: Arc<Lines>,
}

impl Told {
    fn refused(
        &self,
        id: Option<&SpiffeId>,
        outcome: &'static str,
        flags: &'static str,
        rule: Option<&RuleRef>,
        why: &dyn std::fmt::Display,
    ) {
        METRICS.connections.inc([DIRECTION, outcome]);
        if outcome == "denied" {
            // Who is outside brings it about at will.
            if let Some(left_out) = self.lines.next(Instant::now()) {
                tracing::info!(caller = %self.from, to = %self.to, refusal = %why, left_out, "caller by address refused");
            }
        } else {
            tracing::debug!(caller = %self.from, to = %self.to, error = %why, "caller by address not carried");
        }
        self.tell(id, rule, flags, 0, 0);
    }

    fn ended(&self, id: &SpiffeId, rule: Option<&RuleRef>, carried: &Carried) {
        let flags = match carried.end {
            End::Closed => flag::NONE,
            End::Cut => flag::DENIED,
            End::Near => flag::DOWNSTREAM_TERMINATED,
            End::Far => flag::UPSTREAM_TERMINATED,
        };
        self.tell(Some(id), rule, flags, carried.sent, carried.received);
    }

    fn tell(&self, id: Option<&SpiffeId>, rule: Option<&RuleRef>, flags: &'static str, sent: u64, received: u64) {
        let duration_us = u64::try_from(self.begun.elapsed().as_micros()).unwrap_or(u64::MAX);
        let destination = id.map(SpiffeId::as_str).unwrap_or_default();
        let rule = rule.map(ToString::to_string).unwrap_or_default();
        tracing::debug!(
            target: "ambit::connection", direction = DIRECTION, source = %self.from, destination, to = %self.to,
            transport = Transport::Passthrough.as_str(), rule, flags, sent, received, duration_us, "connection"
        );
    }
}
