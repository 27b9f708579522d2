//! Who calls: proved by a handshake, or turned away.

use super::Inbound;
use super::judge::{At, Call, at_home, binding, trusted};
use super::seats::Seat;
use crate::hbone::Door;
use crate::records::alert;
use crate::secure::{self, Secured};
use crate::shown::Shown;
use crate::{silence, tls};
use ambit_identity::Usage;
use ambit_model::{Code, Refusal};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use tokio::net::TcpStream;

impl Inbound {
    /// Whether a node whose workloads may call here is there, or a workload that this node knows.
    pub(super) fn knows(&self, from: IpAddr) -> bool {
        let (plane, from) = (self.plane.borrow(), from.to_canonical());
        plane.as_ref().is_some_and(|plane| {
            let is_endpoint = plane.view.endpoints.contains_key(&from);
            is_endpoint || plane.view.callers.values().any(|home| IpAddr::V4(home.address) == from)
        })
    }

    /// The proven caller, and its place among them.
    pub(super) async fn handshake(
        &self,
        mut tcp: TcpStream,
        door: Door,
        from: SocketAddr,
    ) -> Result<(Secured, Call, Seat), (&'static str, Refusal)> {
        let broken = |e: std::io::Error| ("tls", Refusal::new(Code::Unauthenticated, "a TLS handshake", e.to_string()));
        silence::tune(&tcp).map_err(broken)?;
        let (hello, name) = secure::hello(&mut tcp).await.map_err(broken)?;
        let plane = self.plane.borrow().clone();
        let at = At::of(door, &tcp).map_err(broken)?;
        let called = plane.as_ref().and_then(|plane| at.called(plane, &name)).cloned().ok_or_else(|| {
            secure::unknown_name(&tcp);
            ("unknown_name", Refusal::new(Code::NotFound, "a workload of this node", format!("{at:?}, name '{name}'")))
        })?;
        let mut secured = secure::accept(tcp, hello, called.server.clone()).await.map_err(broken)?;
        let chain = std::mem::take(&mut secured.chain);
        let Some(plane) = plane.filter(|_| !chain.is_empty()) else {
            return Err(("svid", Refusal::new(Code::Unauthenticated, "an X.509-SVID", "none")));
        };
        let proved = || {
            // Asked first: were it replaced now, what is shown would be verified again.
            let trust = plane.trust.current();
            let peer = tls::peer(&chain, &plane.trust, self.clock.now()).map_err(|r| ("svid", r))?;
            let shown = Shown::new(chain.clone(), Usage::Client, peer.not_after(), &trust);
            let (from, from_port) = (from.ip(), from.port());
            let call =
                Call { peer: Arc::new(peer), shown: Arc::new(shown), from, from_port, at, to: called.id.clone() };
            trusted(&self.denials.now(), &call).map_err(|r| (r.code.as_str(), r))?;
            at_home(&plane.view, &call).map_err(|r| {
                tracing::warn!(caller = %call.peer.id(), called = %call.to, refusal = %r, "tunnel refused");
                (r.code.as_str(), r)
            })?;
            let node = binding(&call).map_err(|r| (r.code.as_str(), r))?.node;
            let pair = (call.peer.id().clone(), node, call.to.clone());
            let seat = self.tunnels.take(pair).map_err(|r| ("busy", r))?;
            Ok((call, seat))
        };
        match proved() {
            Ok((call, place)) => Ok((secured, call, place)),
            Err(refused) => {
                secured.turn_away(alert::ACCESS_DENIED);
                Err(refused)
            }
        }
    }
}
