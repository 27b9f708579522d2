//! The last leg: from the agent to a workload, by a socket in the workload's namespace that comes from 127.0.0.0/8, which only the
//! agent can send from there. Its goal is the pod's own address, so that services bound to loopback stay private. Where
//! it is known who calls, the workload sees that address for its client (`client.h` of the kernel side), else the leg's own. To a
//! pod's IPv6 address the kernel is told of each leg (`ipv6.rs`), and the workload sees the leg's own.

mod ipv6;

use crate::kernel::KernelHandle;
use crate::metrics::METRICS;
use crate::netns::NetnsThread;
use crate::plane::LocalPod;
use crate::pump;
use ambit_ebpf::Leg;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use tokio::net::TcpStream;

/// What makes them. Cloning shares.
#[derive(Clone, Debug)]
pub struct Legs {
    netns: NetnsThread,
    /// Tells workloads who calls; none where no kernel part runs, as in tests of tunnels alone.
    kernel: Option<KernelHandle>,
}

impl Legs {
    /// By this thread, whose workloads all see the legs' own addresses.
    pub fn new(netns: NetnsThread) -> Self {
        Self { netns, kernel: None }
    }

    /// The same, whose workloads see who calls.
    pub fn told_to(self, kernel: KernelHandle) -> Self {
        Self { kernel: Some(kernel), ..self }
    }

    /// Connects to a port of `pod`. `who` stands for the caller in the leg's address; `client` is what the workload is to see
    /// for its client: only what was proved, or may be believed.
    ///
    /// # Errors
    /// The workload does not answer. That there was no room to tell it of its client is none.
    pub async fn connect(
        &self,
        pod: &LocalPod,
        to: SocketAddr,
        who: impl Hash,
        client: Option<SocketAddr>,
    ) -> io::Result<TcpStream> {
        let tcp = match (to, client, &self.kernel) {
            (SocketAddr::V6(to), ..) => self.by_ipv6(pod, to, who).await?,
            (SocketAddr::V4(to), Some(client), Some(kernel)) => match self.told(kernel, pod, to, client).await {
                // Of this one client there are more than there are ports: better nameless than not at all.
                Err(e) if e.kind() == io::ErrorKind::AddrInUse => self.bare(pod, to, who).await?,
                told => told?,
            },
            (SocketAddr::V4(to), ..) => self.bare(pod, to, who).await?,
        };
        tcp.set_nodelay(true)?;
        pump::break_off_unless_ended(&tcp)?;
        Ok(tcp)
    }

    async fn bare(&self, pod: &LocalPod, to: SocketAddrV4, who: impl Hash) -> io::Result<TcpStream> {
        let source = SocketAddrV4::new(spread((who, to), BARE), 0);
        self.netns.socket(&pod.netns, source).await?.connect(SocketAddr::V4(to)).await
    }

    /// The leg has its port before it connects, under which the kernel is told. Its address is of the client's, not the
    /// caller's: ports stay taken for a minute after a connection.
    async fn told(
        &self,
        kernel: &KernelHandle,
        pod: &LocalPod,
        to: SocketAddrV4,
        client: SocketAddr,
    ) -> io::Result<TcpStream> {
        let (socket, netns) = self.netns.bound_socket(&pod.netns, spread((client, to), TOLD)).await?;
        let leg = Leg { netns, from: socket.local_addr()?, port: to.port() };
        let told = kernel.tell_client(&leg, client);
        METRICS.clients.inc([if told { "shown" } else { "no_room" }]);
        let connected = socket.connect(SocketAddr::V4(to)).await;
        if connected.is_err() && told {
            kernel.forget_client(&leg);
        }
        connected
    }
}

/// Second places of legs of which the kernel is told, and of the others: what was told and not taken is of no bare one.
const TOLD: u8 = 64;
const BARE: u8 = 96;

/// One of 127.64.0.0/11, or 127.96.0.0/11, by hash: one address alone would have 28,000 ports for all callers of a pod.
fn spread(by: impl Hash, second: u8) -> Ipv4Addr {
    let mut h = DefaultHasher::new();
    by.hash(&mut h);
    let [_, _, _, _, _, a, b, c] = h.finish().to_be_bytes();
    // Neither .0 nor .255, and at least 64 in the second place: away from what applications use on loopback.
    Ipv4Addr::new(127, second + (a & 0x1f), b, 1 + c % 254)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn legs_that_are_told_of_share_no_address_with_others() {
        let all = |second| (0..10_000).map(move |n: u32| spread(n, second).octets()).collect::<Vec<_>>();
        assert!(all(TOLD).iter().all(|a| a[0] == 127 && (64..96).contains(&a[1]) && (1..255).contains(&a[3])));
        assert!(all(BARE).iter().all(|a| a[0] == 127 && (96..128).contains(&a[1]) && (1..255).contains(&a[3])));
    }
}
