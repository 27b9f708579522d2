//! What an HBONE request says beside its goal, in the headers that Istio's agents send each other: the trace that it is part
//! of (W3C Trace Context), facts of the calling workload (W3C Baggage) and where the connection came from (RFC 7239).
//!
//! All of it is the peer's word: it goes to records, and nothing is decided by it. Who calls is proved by the certificate; from
//! where, a workload is shown as far as the peer is believed in it (`inbound/client.rs`).

use crate::native::is_trace;
use crate::plane::LocalPod;
use ambit_model::{ClusterId, SpiffeId};
use http::{HeaderMap, request};
use std::net::{SocketAddr, SocketAddrV4};

/// What is kept of a peer's baggage, in bytes; longer is none. Ours has 150.
const BAGGAGE_BYTES_MAX: usize = 1024;
/// The same of `Forwarded`: one hop with an address and a host name.
const FORWARDED_BYTES_MAX: usize = 512;

const TRACEPARENT: &str = "traceparent";
const BAGGAGE: &str = "baggage";
const FORWARDED: &str = "forwarded";

/// Where a connection begins, as other nodes are told.
#[derive(Clone, Debug)]
pub struct Start {
    /// The traceparent of a new trace: that of the connection, for an application's own is in its bytes.
    pub trace: String,
    /// What the application has for its own address, where that is one of IPv4.
    pub from: Option<SocketAddrV4>,
}

impl Start {
    /// Of a connection to there that was captured from this port. To the application its socket has the pod's address.
    pub fn of(pod: &LocalPod, port: u16, asked: SocketAddr) -> Self {
        let from = asked.is_ipv4().then(|| SocketAddrV4::new(pod.workload.pod.address, port));
        Self { trace: trace(), from }
    }
}

/// The headers; none where there was none that can be used.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Said {
    /// W3C Trace Context, section 3.2.
    pub traceparent: Option<String>,
    /// W3C Baggage, section 3.2, with Istio's keys.
    pub baggage: Option<String>,
    /// RFC 7239, section 4.
    pub forwarded: Option<String>,
}

impl Said {
    /// Of a connection of `source`, of `cluster`.
    pub fn of(source: &SpiffeId, cluster: &ClusterId, start: &Start) -> Self {
        Self {
            traceparent: Some(start.trace.clone()),
            baggage: Some(baggage(source, cluster)),
            forwarded: start.from.map(|from| format!("for=\"{from}\"")),
        }
    }

    /// Of what a peer sent.
    pub fn read(headers: &HeaderMap) -> Self {
        let text = |name: &str, bytes_max: usize| {
            let text = headers.get(name)?.to_str().ok()?;
            (text.len() <= bytes_max).then(|| text.to_owned())
        };
        Self {
            traceparent: text(TRACEPARENT, usize::MAX).filter(|trace| is_trace(trace.as_bytes())),
            baggage: text(BAGGAGE, BAGGAGE_BYTES_MAX),
            forwarded: text(FORWARDED, FORWARDED_BYTES_MAX),
        }
    }

    /// Where the connection begins, by `Forwarded`: the one hop that our agents and Istio's write, with an IPv4 address and port.
    pub fn from(&self) -> Option<SocketAddrV4> {
        let hop = self.forwarded.as_deref()?;
        // Of several hops the peer knows the last one alone.
        let mut pairs = hop.split(';').map(str::trim).filter(|_| !hop.contains(','));
        let named = pairs.find_map(|pair| pair.split_once('=').filter(|(name, _)| name.eq_ignore_ascii_case("for")));
        let (_, value) = named?;
        value.strip_prefix('"').and_then(|value| value.strip_suffix('"')).unwrap_or(value).parse().ok()
    }

    /// Adds them to a request.
    pub(crate) fn write(&self, request: request::Builder) -> request::Builder {
        let said = [(TRACEPARENT, &self.traceparent), (BAGGAGE, &self.baggage), (FORWARDED, &self.forwarded)];
        said.iter()
            .filter_map(|(name, value)| Some((*name, value.as_deref()?)))
            .fold(request, |request, (name, value)| request.header(name, value))
    }
}

/// The characters of names and SPIFFE IDs need no escape there.
fn baggage(source: &SpiffeId, cluster: &ClusterId) -> String {
    let path: Vec<&str> = source.as_str().split('/').skip(3).collect();
    let name = path.last().copied().unwrap_or_default();
    // Istio's form of SPIFFE IDs: /ns/NAMESPACE/sa/ACCOUNT.
    let namespace = match path.as_slice() {
        ["ns", namespace, "sa", _] => format!(",k8s.namespace.name={namespace}"),
        _ => String::new(),
    };
    format!("k8s.cluster.name={}{namespace},service.name={name}", cluster.as_str())
}

/// A traceparent of a new trace (W3C Trace Context, section 3.2).
pub fn trace() -> String {
    let mut random = [0; 24];
    // Without randomness ids repeat; nothing rests on them.
    let _ = aws_lc_rs::rand::fill(&mut random);
    let (trace, span) = random.split_at(16);
    format!("00-{}-{}-00", hex::encode(trace), hex::encode(span))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    #[test]
    fn what_is_written_is_read_again() {
        let cluster = "west".parse().unwrap();
        for (id, baggage) in [
            ("spiffe://west/web", "k8s.cluster.name=west,service.name=web"),
            ("spiffe://west/ns/shop/sa/web", "k8s.cluster.name=west,k8s.namespace.name=shop,service.name=web"),
        ] {
            let start = Start { trace: TRACE.into(), from: Some("10.71.101.11:40000".parse().unwrap()) };
            let said = Said::of(&id.parse().unwrap(), &cluster, &start);
            let request = said.write(http::Request::builder()).body(()).unwrap();
            assert_eq!(Said::read(request.headers()), said);
            assert_eq!(said.baggage.as_deref(), Some(baggage));
            assert_eq!(said.forwarded.as_deref(), Some("for=\"10.71.101.11:40000\""));
        }
    }

    #[test]
    fn where_a_connection_begins_is_read_from_one_hop_to_the_letter() {
        for (forwarded, from) in [
            ("for=\"10.71.101.11:40000\"", Some("10.71.101.11:40000")),
            ("for=\"10.71.101.11:40000\";host=db.shop.svc", Some("10.71.101.11:40000")),
            ("by=10.0.0.1; FOR=10.71.101.11:1", Some("10.71.101.11:1")),
            ("for=\"10.71.101.11:40000\", for=\"10.0.0.9:1\"", None),
            ("for=10.71.101.11", None),
            ("for=\"10.71.101.11:70000\"", None),
            ("for=\"10.71.101.11:40000", None),
            ("for=unknown", None),
            ("for=\"[2001:db8::1]:1\"", None),
            ("host=10.71.101.11:1", None),
            ("", None),
        ] {
            let said = Said { forwarded: Some(forwarded.into()), ..Said::default() };
            assert_eq!(said.from(), from.map(|from| from.parse().unwrap()), "{forwarded}");
        }
        assert_eq!(Said::default().from(), None);
    }

    #[test]
    fn what_is_too_long_or_no_text_is_as_if_it_had_not_been_said() {
        let read = |name: &'static str, value: &[u8]| {
            Said::read(&HeaderMap::from_iter([(http::HeaderName::from_static(name), value.try_into().unwrap())]))
        };
        assert_eq!(read(TRACEPARENT, b"00-zz"), Said::default());
        assert_eq!(read(BAGGAGE, &[b'a'; BAGGAGE_BYTES_MAX + 1]), Said::default());
        assert!(read(BAGGAGE, &[b'a'; BAGGAGE_BYTES_MAX]).baggage.is_some());
        assert_eq!(read(FORWARDED, b"for=\xff"), Said::default());
        assert_eq!(read(FORWARDED, &[b'a'; FORWARDED_BYTES_MAX + 1]), Said::default());
    }
}
