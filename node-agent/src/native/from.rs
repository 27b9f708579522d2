//! Where a connection begins, in OPEN: told from `ambit/2` on. Behind the traceparent stands the field's length, 0 or 6, then
//! address and port.

use std::net::{Ipv4Addr, SocketAddrV4};

/// Appends it.
pub(super) fn put(from: Option<SocketAddrV4>, out: &mut Vec<u8>) {
    let Some(from) = from else { return out.push(0) };
    out.push(6);
    out.extend_from_slice(&from.ip().octets());
    out.extend_from_slice(&from.port().to_be_bytes());
}

/// Takes it from the front; what is behind it comes back too. None where it makes no sense.
pub(super) fn take(bytes: &[u8]) -> Option<(Option<SocketAddrV4>, &[u8])> {
    match bytes {
        [0, rest @ ..] => Some((None, rest)),
        [6, a, b, c, d, high, low, rest @ ..] => {
            let (ip, port) = (Ipv4Addr::new(*a, *b, *c, *d), u16::from_be_bytes([*high, *low]));
            Some((Some(SocketAddrV4::new(ip, port)), rest))
        }
        _ => None,
    }
}
