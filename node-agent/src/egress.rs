//! The way out of the mesh: a captured connection to an address that is outside, judged again, and carried as it is.
//!
//! The pod's own wire lets nothing out. The kernel allowed the connection by a range; here it is judged by the documents themselves,
//! opened from the node's own namespace, and followed: what is not allowed any more ends. What leaves is in clear text as far as
//! the workload wrote it so, and every record says it.

use crate::clock::Clock;
use crate::denials::{Denials, Lane};
use crate::metrics::METRICS;
use crate::plane::{Follow, LocalPod, Plane};
use crate::pump::{self, Carried, End};
use crate::record::flag;
use crate::staleness;
use ambit_identity::svid::Presented;
use ambit_model::policy::{Transport, closed_at};
use ambit_model::{Code, Moment, ObjectName, Refusal};
use nix::sys::socket::{setsockopt, sockopt};
use rustls::pki_types::CertificateDer;
use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::time::timeout;

/// Connections to the outside at once, over all pods: they hold two descriptors each.
const FLOWS_MAX: usize = 16 * 1024;
/// What is outside may be far away; Linux alone would try for two minutes.
const CONNECT_MAX: Duration = Duration::from_secs(10);
/// A server that is silent this long is asked whether it is there, so often, so many times, seconds: who is gone is told
/// after a minute, and a link of the Internet that loses a packet ends nothing.
const KEEPALIVE: (u32, u32, u32) = (30, 10, 3);

/// The parts. Cloning shares.
#[derive(Clone, Debug)]
pub struct WayOut {
    plane: watch::Receiver<Option<Arc<Plane>>>,
    denials: Lane,
    flows: Arc<Semaphore>,
    clock: Arc<Clock>,
    /// On which nodes' agents listen.
    tunnel_port: u16,
}

/// Addresses that this node has now, loopback among them.
pub fn own_addresses() -> BTreeSet<Ipv4Addr> {
    let all = nix::ifaddrs::getifaddrs().inspect_err(|error| tracing::warn!(%error, "addresses of this node not read"));
    let v4 = |found: nix::ifaddrs::InterfaceAddress| Some(found.address?.as_sockaddr_in()?.ip());
    all.into_iter().flatten().filter_map(v4).collect()
}

/// Who asks to go out: a pod that is somebody, and the SVID that it had then.
#[derive(Debug)]
struct Caller<'a> {
    pod: &'a LocalPod,
    shown: Presented,
}

impl<'a> Caller<'a> {
    /// Nobody at the far end proves the caller, so it is done here: who has no good SVID of its own goes nowhere.
    fn of(plane: &Plane, pod: &'a LocalPod, now: Moment) -> Result<Self, Refusal> {
        let chain = &plane.credentials_of(pod.id())?.svid().chain_der;
        let chain: Vec<CertificateDer<'_>> = chain.iter().map(|der| CertificateDer::from(der.as_slice())).collect();
        let shown = Presented::of(&chain).filter(|shown| now.latest < shown.not_after);
        let none = || Refusal::new(Code::SvidUntrusted, format!("an SVID of {}", pod.id()), "one that is over");
        Ok(Self { pod, shown: shown.ok_or_else(none)? })
    }

    /// May it go there now? Gives the document that says so. That its SVID ran out ends nothing that it began.
    fn judge(&self, plane: &Plane, denials: &Denials, to: SocketAddrV4, now: Moment) -> Result<ObjectName, Refusal> {
        let outside = |found: String| Refusal::new(Code::PolicyDenied, "an address outside of the mesh", found);
        if plane.view.knows(*to.ip()) {
            return Err(outside(format!("{to}, which the mesh knows")));
        }
        if let Some(why) = closed_at(IpAddr::V4(*to.ip())) {
            return Err(outside(format!("{to}, which is {why}")));
        }
        let id = self.pod.id();
        if denials.is_out() {
            return Err(Refusal::new(Code::NodeUntrusted, "a trusted node", "this node was put out"));
        }
        if denials.ends_all() {
            return Err(staleness::stale());
        }
        if denials.denies_presented(&self.shown) {
            return Err(Refusal::new(Code::SvidRevoked, "an SVID that was not revoked", id.as_str()));
        }
        let here = plane.pods.get(&IpAddr::V4(self.pod.workload.pod.address)).is_some_and(|pod| pod.id() == id);
        let rule = plane.view.egress.evaluate(id, *to.ip(), to.port(), now).filter(|_| here);
        rule.map(|egress| egress.name.clone()).ok_or_else(|| {
            let found = if here { "no egress allows it" } else { "a pod that is nobody now" };
            Refusal::new(Code::PolicyDenied, "an allowed connection", format!("{id} to {to}: {found}"))
        })
    }
}

impl WayOut {
    /// A way out that follows `plane` and `denials`; other nodes' agents listen on `tunnel_port`.
    pub fn new(plane: watch::Receiver<Option<Arc<Plane>>>, denials: Lane, clock: Arc<Clock>, tunnel_port: u16) -> Self {
        Self { plane, denials, flows: Arc::new(Semaphore::new(FLOWS_MAX)), clock, tunnel_port }
    }

    /// Carries one captured connection of `pod` to `to`, until its end.
    pub async fn carry(&self, pod: &LocalPod, near: TcpStream, to: SocketAddrV4) {
        let told = Told { pod, to, begun: Instant::now() };
        let _ = near.set_nodelay(true);
        let _ = pump::break_off_unless_ended(&near);
        let Ok(_place) = self.flows.clone().try_acquire_owned() else {
            return told.refused("failed", flag::OVERFLOW, None, &"too many connections at once");
        };
        let mut follow = Follow::of(&self.plane, &self.denials);
        let (caller, rule) = match self.begin(&mut follow, pod, to) {
            Ok(begun) => begun,
            Err(refusal) => return told.refused("denied", flag::DENIED, None, &refusal),
        };
        let far = match timeout(CONNECT_MAX, connect(to)).await {
            Ok(Ok(far)) => far,
            Ok(Err(error)) => return told.refused("failed", flag::UPSTREAM_FAILED, Some(&rule), &error),
            Err(_) => return told.refused("failed", flag::UPSTREAM_FAILED, Some(&rule), &"no answer in time"),
        };
        // No byte was passed on yet: what was withdrawn meanwhile lets none through.
        let rule = match self.admit(&mut follow, &caller, to) {
            Ok(rule) => rule,
            Err(refusal) => return told.refused("denied", flag::DENIED, Some(&rule), &refusal),
        };
        METRICS.connections.inc(["egress", "ok"]);
        METRICS.open.add(["egress"], 1.0);
        let cut = async {
            let refusal = self.revoked(follow, &caller, to).await;
            METRICS.cut.inc(["egress"]);
            tracing::info!(caller = %pod.id(), %to, %rule, %refusal, "live connection cut");
        };
        let carried = relay(near, far, cut).await;
        METRICS.open.add(["egress"], -1.0);
        told.ended(&rule, &carried);
    }

    fn begin<'a>(
        &self,
        follow: &mut Follow,
        pod: &'a LocalPod,
        to: SocketAddrV4,
    ) -> Result<(Caller<'a>, ObjectName), Refusal> {
        let plane = self.plane.borrow().clone().ok_or_else(no_slice)?;
        // The kernel judged at connect(), and its SYN may have come long after.
        if self.denials.now().is_stale() {
            return Err(staleness::stale());
        }
        let caller = Caller::of(&plane, pod, self.clock.moment())?;
        let rule = self.admit(follow, &caller, to)?;
        is_elsewhere(*to.ip())?;
        Ok((caller, rule))
    }

    fn admit(&self, follow: &mut Follow, caller: &Caller<'_>, to: SocketAddrV4) -> Result<ObjectName, Refusal> {
        let (plane, denials) = follow.now();
        let plane = plane.ok_or_else(no_slice)?;
        let (view, ip) = (&plane.view, to.ip());
        let node = || {
            let home = view.callers.values().any(|home| home.address == *ip);
            home || view.endpoints.values().any(|endpoint| endpoint.node_address == *ip)
        };
        if to.port() == self.tunnel_port && node() {
            let found = format!("{to}, where a node's agent takes tunnels");
            return Err(Refusal::new(Code::PolicyDenied, "an address outside of the mesh", found));
        }
        caller.judge(&plane, &denials, to, self.clock.moment())
    }

    /// Returns the refusal once what was admitted would not be admitted any more. Each end of a document publishes a plane.
    async fn revoked(&self, mut follow: Follow, caller: &Caller<'_>, to: SocketAddrV4) -> Refusal {
        loop {
            if let Err(refusal) = self.admit(&mut follow, caller, to) {
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

/// Whether the address is none of this node: what can be bound here is here, whatever was known of it a moment ago. A
/// workload would speak to the node's own services as the node. (A node with `net.ipv4.ip_nonlocal_bind` can bind everything: from
/// there nobody goes out.)
pub(crate) fn is_elsewhere(address: Ipv4Addr) -> Result<(), Refusal> {
    let bound = std::net::TcpListener::bind(SocketAddrV4::new(address, 0)).map(drop);
    match bound {
        Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => Ok(()),
        Ok(()) | Err(_) => {
            let found = format!("{address}, which is of this node");
            Err(Refusal::new(Code::PolicyDenied, "an address outside of the mesh", found))
        }
    }
}

async fn connect(to: SocketAddrV4) -> io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    keep_alive(&socket)?;
    let far = socket.connect(SocketAddr::V4(to)).await?;
    far.set_nodelay(true)?;
    pump::break_off_unless_ended(&far)?;
    Ok(far)
}

/// A connection with somebody outside: its death is found out, and nothing waits to be sent.
pub(crate) fn tune(tcp: &TcpStream) -> io::Result<()> {
    keep_alive(tcp)?;
    tcp.set_nodelay(true)
}

fn keep_alive(socket: &impl AsFd) -> io::Result<()> {
    let (after_s, every_s, times) = KEEPALIVE;
    setsockopt(socket, sockopt::KeepAlive, &true)?;
    setsockopt(socket, sockopt::TcpKeepIdle, &after_s)?;
    setsockopt(socket, sockopt::TcpKeepInterval, &every_s)?;
    setsockopt(socket, sockopt::TcpKeepCount, &times)?;
    Ok(())
}

/// Both ways with half-close, until both ended, one broke, or it may not go on: then both are reset.
pub(crate) async fn relay(mut near: TcpStream, mut far: TcpStream, cut: impl Future<Output = ()>) -> Carried {
    let (mut sent, mut received) = (0, 0);
    let end = {
        let ((near_read, near_write), (far_read, far_write)) = (near.split(), far.split());
        let up = pump::plain(near_read, far_write, (End::Near, End::Far), &mut sent);
        let down = pump::plain(far_read, near_write, (End::Far, End::Near), &mut received);
        tokio::select! {
            both = async { tokio::try_join!(up, down) } => both.map_or_else(|end| end, |_| End::Closed),
            () = cut => End::Cut,
        }
    };
    if end == End::Closed {
        pump::end_in_order(&near);
        pump::end_in_order(&far);
    }
    Carried { end, sent, received }
}

/// A connection whose end will be told, at debug level as `record` does: who, where to, and that it is in clear.
struct Told<'a> {
    pod: &'a LocalPod,
    to: SocketAddrV4,
    begun: Instant,
}

impl Told<'_> {
    fn refused(
        &self,
        outcome: &'static str,
        flags: &'static str,
        rule: Option<&ObjectName>,
        why: &dyn std::fmt::Display,
    ) {
        METRICS.connections.inc(["egress", outcome]);
        if outcome == "denied" {
            tracing::info!(caller = %self.pod.id(), to = %self.to, refusal = %why, "egress refused");
        } else {
            tracing::debug!(caller = %self.pod.id(), to = %self.to, error = %why, "egress failed");
        }
        self.tell(rule, flags, 0, 0);
    }

    fn ended(&self, rule: &ObjectName, carried: &Carried) {
        let flags = match carried.end {
            End::Closed => flag::NONE,
            End::Cut => flag::DENIED,
            End::Near => flag::DOWNSTREAM_TERMINATED,
            End::Far => flag::UPSTREAM_TERMINATED,
        };
        self.tell(Some(rule), flags, carried.sent, carried.received);
    }

    fn tell(&self, rule: Option<&ObjectName>, flags: &'static str, sent: u64, received: u64) {
        let duration_us = u64::try_from(self.begun.elapsed().as_micros()).unwrap_or(u64::MAX);
        let rule = rule.map(ObjectName::as_str).unwrap_or_default();
        tracing::debug!(
            target: "ambit::connection", direction = "egress", source = %self.pod.id(), to = %self.to,
            transport = Transport::Passthrough.as_str(), rule, flags, sent, received, duration_us, "connection"
        );
    }
}
