//! From where a captured connection was going to a tunnel: which endpoint, and by which of its doors.

use super::{Captured, Outbound};
use crate::backoff::random;
use crate::balance::{self, Candidate, Why};
use crate::compile;
use crate::hbone::{self, Door, TunnelError};
use crate::health;
use crate::metrics::METRICS;
use crate::native::{self, Answer, Open, Reason};
use crate::outlier::Evidence;
use crate::plane::{LocalPod, Plane};
use crate::pool::{Key, Lease, NativeLease, Pool};
use crate::said::{Said, Start};
use crate::shown::Now;
use ambit_model::policy::{Endpoint, Service};
use bytes::Bytes;
use futures::stream::{FuturesUnordered, StreamExt};
use h2::{RecvStream, SendStream};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::timeout;

/// Tunnels that are tried one after another where each turns out to have been left by the far agent just then.
const LEFT_MAX: usize = 3;
/// Endpoints of a service that one connection tries.
const ATTEMPTS_MAX: usize = 3;
/// An endpoint that has not answered for so long is not waited for alone (RFC 8305, section 8: Connection Attempt Delay).
const NEXT_AFTER: Duration = Duration::from_millis(250);

/// An open connection to an endpoint, and how it is carried.
pub(super) struct Opened {
    pub(super) way: Way,
    pub(super) endpoint: Endpoint,
}

pub(super) enum Way {
    /// `sent`: bytes that went with OPEN.
    Native {
        lease: Box<NativeLease>,
        sent: u64,
    },
    Hbone {
        lease: hbone::Lease,
        send: SendStream<Bytes>,
        recv: RecvStream,
    },
}

/// A connection of a pod that is to be opened, by what is known at this moment.
pub(super) struct Opening<'a> {
    outbound: &'a Outbound,
    pool: &'a Pool,
    plane: Arc<Plane>,
    pod: &'a LocalPod,
    start: &'a Start,
}

impl<'a> Opening<'a> {
    pub(super) fn new(
        outbound: &'a Outbound,
        pool: &'a Pool,
        pod: &'a LocalPod,
        start: &'a Start,
    ) -> Result<Self, TunnelError> {
        let plane = outbound.plane.borrow().clone().ok_or(TunnelError::NoSvid)?;
        Ok(Self { outbound, pool, plane, pod, start })
    }

    /// Connects to the chosen endpoint; for a service, where that fails, to one other. What of `first` is sent with it is
    /// taken out.
    pub(super) async fn open(&self, captured: Captured, first: &mut Vec<u8>) -> Result<Opened, TunnelError> {
        let gone = || TunnelError::Refused(http::StatusCode::NOT_FOUND);
        // What may have reached one endpoint is not sent to another: where there are others, bytes wait for the answer.
        let mut none = Vec::new();
        let first = if captured.asked == captured.endpoint { first } else { &mut none };
        let view = &self.plane.view;
        // A service at a workload's address is no service: whoever asks for the workload gets it.
        let of_service = captured.asked != captured.endpoint;
        let service = view.services.iter().find(|s| of_service && s.address.at(s.port) == captured.asked);
        let Some(service) = service else {
            return match view.endpoints.get(&captured.endpoint.ip()) {
                Some(endpoint) => self.at(endpoint, captured.endpoint.port(), first).await,
                // The endpoint, or the service, left the view between the kernel's choice and now.
                None => Err(gone()),
            };
        };
        self.at_service(service, captured.endpoint.ip()).await
    }

    /// At one of its endpoints: the first, and where that is silent or fails another, as long as there is one and the budget
    /// lasts. No byte of the application has been sent yet: trying elsewhere repeats nothing.
    async fn at_service(&self, service: &Service, chosen: IpAddr) -> Result<Opened, TunnelError> {
        let out = self.outbound;
        out.begun();
        let mut left = self.ordered(service, chosen).into_iter();
        let (mut running, mut silent) = (FuturesUnordered::new(), Vec::new());
        let mut failed = TunnelError::Refused(http::StatusCode::NOT_FOUND);
        let mut next = left.next();
        let (mut nth, mut hedging) = (0, true);
        loop {
            if let Some((why, one)) = next.take() {
                METRICS.chosen.inc([one.level.distance.as_str(), why.as_str()]);
                tracing::debug!(
                    caller = %self.pod.id(), service = %service.name, endpoint = %one.endpoint.address,
                    distance = one.level.distance.as_str(), why = why.as_str(), nth, "endpoint chosen"
                );
                let (endpoint, number) = (one.endpoint, nth);
                silent.push((number, endpoint));
                nth += 1;
                running.push(Box::pin(async move {
                    (number, endpoint, self.at(endpoint, service.port, &mut Vec::new()).await)
                }));
            }
            let ended = tokio::select! {
                biased;
                Some(ended) = running.next() => ended,
                () = tokio::time::sleep(NEXT_AFTER), if hedging && left.len() > 0 => {
                    // RFC 8305, section 5: it may still answer, and is not waited for alone.
                    if out.may_retry() {
                        METRICS.retries.inc(["silent"]);
                        next = left.next();
                    } else {
                        // What fails later may still have another.
                        hedging = false;
                    }
                    continue;
                }
                else => return Err(failed),
            };
            let (number, endpoint, opened) = ended;
            silent.retain(|(other, _)| *other != number);
            match opened {
                Ok(opened) => {
                    // Who was asked before, and has said nothing yet.
                    for (_, other) in silent.iter().filter(|(other, _)| *other < number) {
                        out.health.found(&self.plane, other, self.pod.id(), service.port, Evidence::Silent);
                    }
                    return Ok(opened);
                }
                Err(error) if error.is_retryable() || matches!(error, TunnelError::Busy) => {
                    if matches!(error, TunnelError::Refused(http::StatusCode::SERVICE_UNAVAILABLE)) {
                        out.health.found(&self.plane, endpoint, self.pod.id(), service.port, Evidence::TurnedAway);
                    }
                    if left.len() > 0 && out.may_retry() {
                        METRICS.retries.inc([error.reason()]);
                        next = left.next();
                    }
                    if next.is_none() && running.is_empty() {
                        return Err(error);
                    }
                    failed = error;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// At this endpoint; what turns out about its node is told to whoever else would try it.
    async fn at(&self, endpoint: &Endpoint, port: u16, first: &mut Vec<u8>) -> Result<Opened, TunnelError> {
        let out = self.outbound;
        let denials = out.denials.now();
        // The kernel judged at connect(), and its SYN may have come long after (TCP Fast Open).
        if denials.denies_endpoint(endpoint) || denials.is_stale() {
            return Err(TunnelError::NodeDenied);
        }
        let _attempt = out.breaker.attempt(endpoint.address.ip()).ok_or(TunnelError::Busy)?;
        let node = self.key(endpoint, Door::Node)?;
        let to = endpoint.address.at(port);
        let opened = async {
            for _ in 0..LEFT_MAX {
                match self.by_either(endpoint, &node, to, first).await {
                    // Those that ended with it are not tried one by one.
                    Err(TunnelError::Left) => self.pool.doubt(node.node, &TunnelError::Left),
                    other => return other,
                }
            }
            Err(TunnelError::Left)
        }
        .await;
        if let Err(error) = &opened
            && error.is_tunnel()
        {
            if matches!(error, TunnelError::OtherNode { .. }) {
                tracing::warn!(caller = %self.pod.id(), %error, "tunnel refused");
            }
            // What one of its tunnels found out, the idle ones of all threads need not find out one by one.
            out.pools.iter().for_each(|pool| pool.doubt(node.node, error));
            out.health.found(&self.plane, endpoint, self.pod.id(), port, Evidence::NoTunnel);
        }
        if opened.is_ok() {
            out.health.found(&self.plane, endpoint, self.pod.id(), port, Evidence::Good);
        }
        opened.map(|way| Opened { way, endpoint: endpoint.clone() })
    }

    /// By the door of its node, or by its own where no agent of ours is there.
    async fn by_either(
        &self,
        endpoint: &Endpoint,
        at_node: &Key,
        to: SocketAddr,
        first: &mut Vec<u8>,
    ) -> Result<Way, TunnelError> {
        let at_pod = || self.key(endpoint, Door::Pod);
        // Who was found to be no agent of ours is not asked again each time.
        if to.is_ipv6() || !(self.pool.knows_pods() && self.pool.is_open(&at_pod()?)) {
            match self.by(at_node, to, first).await {
                Err(error) if error.is_refused_port() && to.is_ipv4() => {}
                opened => return opened,
            }
        }
        let at_pod = at_pod()?;
        let opened = self.by(&at_pod, to, first).await;
        if let Err(TunnelError::Left) = opened {
            self.pool.doubt(at_pod.node, &TunnelError::Left);
        }
        opened
    }

    /// By this door.
    async fn by(&self, key: &Key, to: SocketAddr, first: &mut Vec<u8>) -> Result<Way, TunnelError> {
        let (out, plane, source) = (self.outbound, &*self.plane, self.pod.id());
        let now = Now { trust: plane.trust.current(), at: out.clock.now() };
        let credentials = || health::credentials(plane, source, &key.destination);
        let lease = self.pool.lease(key, &now, &out.annex, credentials).await?;
        // It may have been dialed before the list came, or by a far end that has nothing newer to show.
        if out.denials.now().denies_presented(&lease.peer().presented) {
            lease.cut();
            return Err(TunnelError::SvidRevoked);
        }
        Ok(match lease {
            Lease::Native(lease) => open_native(lease, to, first, self.start).await?,
            Lease::Hbone(lease) => {
                let said = Said::of(source, &plane.view.cluster, self.start);
                let (send, recv) = lease.open(to, &said).await?;
                Way::Hbone { lease, send, recv }
            }
        })
    }

    fn key(&self, endpoint: &Endpoint, door: Door) -> Result<Key, TunnelError> {
        let (plane, pod) = (&*self.plane, self.pod);
        let own = plane.credentials_of(pod.id()).map_err(|_| TunnelError::NoSvid)?;
        let mut node = health::at(endpoint, door).ok_or(TunnelError::Refused(http::StatusCode::NOT_FOUND))?;
        node.set_port(self.outbound.port);
        let from = match door {
            Door::Node => plane.address,
            Door::Pod => pod.workload.pod.address,
        };
        Ok(Key {
            source: pod.id().clone(),
            destination: endpoint.spiffe_id.clone(),
            door,
            from,
            node,
            holder: (endpoint.node, endpoint.generation),
            credentials: own.svid().since.0,
        })
    }

    /// Endpoints of the service that this caller may reach, in the order in which they are tried. The kernel chose `first` to
    /// ask whether the connection is allowed; what it cannot know is decided here.
    fn ordered(&self, service: &Service, first: IpAddr) -> Vec<(Why, Candidate<'_>)> {
        let (out, view) = (self.outbound, &self.plane.view);
        let (unhealthy, now) = (out.health.avoided(), out.clock.moment());
        let mut reachable = compile::behind(view, &out.denials.now(), service);
        reachable.retain(|one| view.rules.evaluate(self.pod.id(), &one.endpoint.spiffe_id, service.port, now).allowed);
        let levels = balance::levels(&reachable, |e| unhealthy.avoids(e.address.ip(), service.port));
        balance::order(service, levels, Some(first), ATTEMPTS_MAX, |below| random() % below)
    }
}

async fn open_native(
    mut lease: Box<NativeLease>,
    to: SocketAddr,
    first: &mut Vec<u8>,
    start: &Start,
) -> Result<Way, TunnelError> {
    // A first read that filled its room has more behind it; none may mean that the workload speaks first.
    let prompt = first.is_empty() || first.len() == native::FIRST_MAX;
    let sent = first.len() as u64;
    let (trace, from) = (Some(start.trace.clone()), start.from);
    let open = Open { to, prompt, trace, from, first: std::mem::take(first) };
    let answer = timeout(hbone::ANSWER_MAX, native::open(&mut lease.native().secured, &open)).await;
    match answer.map_err(|_| TunnelError::Timeout)?.map_err(TunnelError::Broken)? {
        Answer::Opened => Ok(Way::Native { lease, sent }),
        Answer::Left => {
            *first = open.first;
            Err(TunnelError::Left)
        }
        Answer::Refused(reason) => {
            // The far end closes the tunnel of whoever makes no sense.
            if reason != Reason::Malformed {
                lease.give_back();
            }
            Err(match reason {
                Reason::Reset => TunnelError::Reset,
                // Who takes no more for now is not broken: it says nothing about the workload.
                Reason::Busy => TunnelError::Busy,
                other => TunnelError::Refused(other.status()),
            })
        }
    }
}
