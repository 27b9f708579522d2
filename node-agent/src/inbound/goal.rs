//! Where a request wants to go.

use crate::hbone;
use ambit_model::{Address, Code, Refusal};
use h2::RecvStream;
use http::{Method, Request};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

/// Ports that are the agent's in a pod, by Istio's numbers: whoever asks for one of them means no workload, and would be led
/// in a circle.
const OURS: [u16; 3] = [15001, 15006, hbone::PORT];

/// Whether a port is one of these.
pub(crate) fn is_ours(port: u16) -> bool {
    OURS.contains(&port)
}

/// Where nothing was asked for.
pub(super) const NOWHERE: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);

/// Where an HBONE request goes.
pub(super) fn goal(request: &Request<RecvStream>) -> Result<SocketAddr, Refusal> {
    let bad = |found: String| {
        Refusal::new(Code::BadRequest, "CONNECT <IPv4 address>:<port> or [<IPv6 address>]:<port>", found)
    };
    if request.method() != Method::CONNECT {
        return Err(bad(request.method().to_string()));
    }
    let authority = request.uri().authority().map(|a| a.as_str()).unwrap_or_default();
    address(authority).ok_or_else(|| bad(authority.to_owned()))
}

/// An address and a port: of IPv6 in its one form, and only where a workload can have it.
fn address(authority: &str) -> Option<SocketAddr> {
    let to: SocketAddr = authority.parse().ok()?;
    let one = |to: &SocketAddr| to.is_ipv4() || (Address::try_from(to.ip()).is_ok() && to.to_string() == authority);
    Some(to).filter(|to| to.port() > 0).filter(one)
}

#[cfg(test)]
mod tests {
    use super::address;

    #[test]
    fn an_ipv6_goal_has_one_form() {
        for good in ["10.0.0.1:80", "[fd00::1]:80", "[2001:db8::1]:65535"] {
            assert_eq!(address(good).unwrap().to_string(), good);
        }
        for bad in [
            "[fd00::1]:0",
            "fd00::1:80",
            "[fd00::1]",
            "[FD00::1]:80",
            "[fd00::0:1]:80",
            "[::ffff:10.0.0.1]:80",
            "[::1]:80",
            "[fe80::1]:80",
            "[fe80::1%2]:80",
            "[fd00::1]:080",
            "[fd61:6d62:6974::1]:80",
            "[::]:80",
        ] {
            assert_eq!(address(bad), None, "{bad}");
        }
    }
}
