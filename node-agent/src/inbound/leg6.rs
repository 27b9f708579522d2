//! The last leg to a pod by IPv6. A source address proves nothing there, as 127/8 does for IPv4: the kernel is told of each socket
//! of the agent's before it connects, and of nothing else.

use super::Inbound;
use super::judge::Call;
use crate::kernel::Leg;
use crate::plane::LocalPod;
use ambit_ebpf::{AGENT_NET, netns_cookie};
use ambit_model::SpiffeId;
use std::io;
use std::net::{Ipv6Addr, SocketAddr, SocketAddrV6};
use std::time::Duration;
use tokio::net::TcpStream;

/// With SYN cookies the listener is looked for again when the handshake's last packet comes, which may be after connect() returned.
const LINGER: Duration = Duration::from_secs(1);

impl Inbound {
    pub(super) async fn last_leg6(&self, pod: &LocalPod, called: SocketAddrV6, call: &Call) -> io::Result<TcpStream> {
        let kernel = self.kernel.as_ref().ok_or_else(|| io::Error::other("no kernel side"))?;
        let source = SocketAddrV6::new(spread(call.peer.id(), called), 0, 0, 0);
        let (socket, source) = self.netns.socket6(&pod.netns, source).await?;
        let cookie = netns_cookie(&socket)?;
        let leg = kernel.leg(cookie, source, called).map_err(|refusal| io::Error::other(refusal.to_string()))?;
        let tcp = socket.connect(SocketAddr::V6(called)).await?;
        tokio::spawn(over(leg));
        Ok(tcp)
    }
}

async fn over(leg: Leg) {
    tokio::time::sleep(LINGER).await;
    drop(leg);
}

/// One of the agent's addresses in a pod by hash, not of those to which connections are captured.
fn spread(caller: &SpiffeId, to: SocketAddrV6) -> Ipv6Addr {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let mut h = DefaultHasher::new();
    (caller, to).hash(&mut h);
    let host = u64::from(u32::MAX) << 32 | h.finish() & u64::from(u32::MAX);
    Ipv6Addr::from_bits(AGENT_NET.to_bits() | u128::from(host))
}
