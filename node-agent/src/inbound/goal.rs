//! Where a request wants to go.

use crate::hbone;
use ambit_model::{Code, Refusal};
use h2::RecvStream;
use http::{Method, Request};
use std::net::{Ipv4Addr, SocketAddrV4};

/// Ports that are the agent's in a pod, by Istio's numbers: whoever asks for one of them means no workload, and would be led
/// in a circle.
const OURS: [u16; 3] = [15001, 15006, hbone::PORT];

/// Whether a port is one of these.
pub(crate) fn is_ours(port: u16) -> bool {
    OURS.contains(&port)
}

/// Where nothing was asked for.
pub(super) const NOWHERE: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0);

/// Where an HBONE request goes.
pub(super) fn goal(request: &Request<RecvStream>) -> Result<SocketAddrV4, Refusal> {
    let bad = |found: String| Refusal::new(Code::BadRequest, "CONNECT <IPv4 address>:<port>", found);
    if request.method() != Method::CONNECT {
        return Err(bad(request.method().to_string()));
    }
    let authority = request.uri().authority().map(|a| a.as_str()).unwrap_or_default();
    let to: Option<SocketAddrV4> = authority.parse().ok();
    to.filter(|to| to.port() > 0).ok_or_else(|| bad(authority.to_owned()))
}
