//! The last leg to a pod by IPv6. A source address proves nothing there, as 127/8 does for IPv4: the kernel is told of each socket
//! of the agent's before it connects, and of nothing else.

use super::Legs;
use crate::kernel::Leg6;
use crate::plane::LocalPod;
use ambit_ebpf::{AGENT_NET, netns_cookie};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::net::{Ipv6Addr, SocketAddr, SocketAddrV6};
use std::time::Duration;
use tokio::net::TcpStream;

/// With SYN cookies the listener is looked for again when the handshake's last packet comes, which may be after connect() returned.
const LINGER: Duration = Duration::from_secs(1);

impl Legs {
    pub(super) async fn by_ipv6(&self, pod: &LocalPod, called: SocketAddrV6, who: impl Hash) -> io::Result<TcpStream> {
        let kernel = self.kernel.as_ref().ok_or_else(|| io::Error::other("no kernel side"))?;
        let source = SocketAddrV6::new(spread(who, called), 0, 0, 0);
        let (socket, source) = self.netns.socket6(&pod.netns, source).await?;
        let cookie = netns_cookie(&socket)?;
        let leg = kernel.leg6(cookie, source, called).map_err(|refusal| io::Error::other(refusal.to_string()))?;
        let tcp = socket.connect(SocketAddr::V6(called)).await?;
        tokio::spawn(over(leg));
        Ok(tcp)
    }
}

async fn over(leg: Leg6) {
    tokio::time::sleep(LINGER).await;
    drop(leg);
}

/// One of the agent's addresses in a pod by hash, not of those to which connections are captured.
fn spread(caller: impl Hash, to: SocketAddrV6) -> Ipv6Addr {
    let mut h = DefaultHasher::new();
    (caller, to).hash(&mut h);
    let host = u64::from(u32::MAX) << 32 | h.finish() & u64::from(u32::MAX);
    Ipv6Addr::from_bits(AGENT_NET.to_bits() | u128::from(host))
}
