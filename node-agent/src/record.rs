//! What is told of each connection that was carried or refused: both identities, bytes, time, how it ended in Istio's
//! response flags (Envoy's access log), and the caller's trace.
//!
//! At debug level, for identities and addresses are in it.

use crate::pump::{Carried, End};
use crate::recent::{Id, Place, Recent, Row};
use crate::said::Said;
use ambit_model::{Revision, SpiffeId, Stamp};
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// Istio's words for how a connection ended.
pub mod flag {
    /// In order.
    pub const NONE: &str = "-";
    /// The caller broke off.
    pub const DOWNSTREAM_TERMINATED: &str = "DC";
    /// The called side broke off.
    pub const UPSTREAM_TERMINATED: &str = "UC";
    /// The called side could not be reached.
    pub const UPSTREAM_FAILED: &str = "UF";
    /// Too many at once.
    pub const OVERFLOW: &str = "UO";
    /// Nobody is at the address.
    pub const NO_ROUTE: &str = "NR";
    /// By policy, or because somebody is no longer trusted.
    pub const DENIED: &str = "UAEX";
    /// The request made no sense.
    pub const PROTOCOL_ERROR: &str = "DPE";
}

/// A connection whose end will be told.
#[derive(Debug)]
pub struct Record<'a> {
    direction: &'static str,
    source: &'a SpiffeId,
    destination: &'a SpiffeId,
    to: SocketAddr,
    trace: Option<&'a str>,
    said: Option<&'a Said>,
    begun: Instant,
    /// What is remembered of it, once it was judged.
    row: OnceLock<Arc<Row>>,
}

/// How a connection was judged.
#[derive(Debug)]
pub struct Judged {
    /// When.
    pub at: Stamp,
    /// By which revision of the slice.
    pub revision: Revision,
    /// Whether it was let through.
    pub allowed: bool,
    /// The policy that decided, where one did, and why.
    pub words: (String, String),
}

impl<'a> Record<'a> {
    /// Of a connection that begins here.
    pub fn outbound(source: &'a SpiffeId, destination: &'a SpiffeId, to: SocketAddr, trace: Option<&'a str>) -> Self {
        Self {
            direction: "outbound",
            source,
            destination,
            to,
            trace,
            said: None,
            begun: Instant::now(),
            row: OnceLock::new(),
        }
    }
    /// Of one that comes from another node.
    pub fn inbound(source: &'a SpiffeId, destination: &'a SpiffeId, to: SocketAddr, trace: Option<&'a str>) -> Self {
        Self {
            direction: "inbound",
            source,
            destination,
            to,
            trace,
            said: None,
            begun: Instant::now(),
            row: OnceLock::new(),
        }
    }
    /// With what the other node says of it.
    pub fn saying(self, said: &'a Said) -> Self {
        Self { said: Some(said), ..self }
    }
    /// It was judged: that is remembered under its trace id, to be asked for. `port` is the workload's.
    pub fn judged(&self, recent: &Recent, port: u16, judged: Judged) {
        let Some(id) = self.trace.and_then(Id::of_trace) else { return };
        let place = if self.direction == "outbound" { Place::Calling } else { Place::Called };
        let Judged { at, revision, allowed, words: (rule, reason) } = judged;
        let (source, destination) = (self.source.clone(), Some(self.destination.clone()));
        let (to, ended) = (self.to, OnceLock::new());
        let row = Row { id, place, at, revision, source, destination, to, port, allowed, rule, reason, ended };
        // A connection is judged again where something changed while its workload was waited for: both are remembered.
        let _ = self.row.set(recent.note(row));
    }
    /// It was not made.
    pub fn refused(&self, flags: &'static str) {
        self.tell(flags, 0, 0);
    }
    /// It ended.
    pub fn ended(&self, carried: &Carried) {
        let outbound = self.direction == "outbound";
        let flags = match carried.end {
            End::Closed => flag::NONE,
            End::Cut => flag::DENIED,
            // On the caller's node the near socket is the caller's, on the other one it is the workload's.
            End::Near if outbound => flag::DOWNSTREAM_TERMINATED,
            End::Far if !outbound => flag::DOWNSTREAM_TERMINATED,
            End::Near | End::Far => flag::UPSTREAM_TERMINATED,
        };
        // From the caller to the workload, and back.
        let (sent, received) =
            if outbound { (carried.sent, carried.received) } else { (carried.received, carried.sent) };
        self.tell(flags, sent, received);
    }

    fn tell(&self, flags: &'static str, sent: u64, received: u64) {
        if let Some(row) = self.row.get() {
            let _ = row.ended.set(flags);
        }
        let duration_us = u64::try_from(self.begun.elapsed().as_micros()).unwrap_or(u64::MAX);
        let trace = self.trace.unwrap_or_default();
        let baggage = self.said.and_then(|said| said.baggage.as_deref()).unwrap_or_default();
        let forwarded = self.said.and_then(|said| said.forwarded.as_deref()).unwrap_or_default();
        tracing::debug!(
            target: "ambit::connection", direction = self.direction, source = %self.source,
            destination = %self.destination, to = %self.to, flags, sent, received, duration_us, trace, baggage, forwarded, "connection"
        );
    }
}

/// Of a connection between two pods of this node that no agent carried, as the kernel tells of it. `bytes`, from the caller and
/// to it, are none where it was cut; in place of a trace there is an id, and one that was broken off says "UC" whoever did it.
pub fn direct(
    id: Id,
    source: &SpiffeId,
    destination: &SpiffeId,
    to: SocketAddr,
    flags: &'static str,
    bytes: Option<(u64, u64)>,
    took: Duration,
) {
    let duration_us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
    let (sent, received) = bytes.unzip();
    tracing::debug!(
        target: "ambit::connection", direction = "direct", source = %source, destination = %destination, to = %to, flags,
        sent, received, duration_us, trace = "", %id, "connection"
    );
}
