//! Where the other replicas are and how to reach them: both come from outside, so that tests need no TLS.

use ambit_model::{Code, Refusal, ReplicaId};
use futures::future::BoxFuture;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::net::TcpStream;
use tonic::transport::Channel;

/// The address of a replica, from replicated state. A joiner's state is empty until its first snapshot: its directory
/// must also know the members it was told when it joined.
pub type PeerDirectory = Arc<dyn Fn(ReplicaId) -> Option<SocketAddr> + Send + Sync>;
/// A connection on which the far end proved to be that replica.
pub type ChannelFactory =
    Arc<dyn Fn(ReplicaId, SocketAddr) -> BoxFuture<'static, Result<Channel, Refusal>> + Send + Sync>;

/// A dead peer must not hold a task longer than an operator waits.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// The way to the other replicas.
#[derive(Clone)]
pub struct Network {
    /// Who is where.
    pub directory: PeerDirectory,
    /// How to connect.
    pub channels: ChannelFactory,
}

/// Open connections, one per peer, shared by Raft's stream and forwarded proposals.
#[derive(Clone)]
pub(super) struct Connections {
    network: Network,
    open: Arc<Mutex<HashMap<ReplicaId, (SocketAddr, Channel)>>>,
}

impl Connections {
    pub(super) fn new(network: Network) -> Self {
        Self { network, open: Arc::default() }
    }

    pub(super) async fn channel(&self, peer: ReplicaId) -> Result<Channel, Refusal> {
        let address = (self.network.directory)(peer).ok_or_else(|| {
            Refusal::new(Code::Unavailable, "a replica with a known address", format!("replica {peer}"))
        })?;
        if let Some((known, channel)) = self.lock().get(&peer)
            && *known == address
        {
            return Ok(channel.clone());
        }
        let channel = tokio::time::timeout(CONNECT_TIMEOUT, (self.network.channels)(peer, address))
            .await
            .map_err(|_| Refusal::new(Code::Unavailable, "a connection", format!("replica {peer} is silent")))??;
        self.lock().insert(peer, (address, channel.clone()));
        Ok(channel)
    }

    /// Whether nothing listens at the peer's address: its process is gone, and its machine says so. Silence says nothing.
    pub(super) async fn is_refused(&self, peer: ReplicaId) -> bool {
        let Some(address) = (self.network.directory)(peer) else { return false };
        let tried = tokio::time::timeout(CONNECT_TIMEOUT, TcpStream::connect(address)).await;
        matches!(tried, Ok(Err(e)) if e.kind() == std::io::ErrorKind::ConnectionRefused)
    }

    /// After an error: the next use connects anew.
    pub(super) fn forget(&self, peer: ReplicaId) {
        self.lock().remove(&peer);
    }

    /// The next use of each connects anew.
    pub(super) fn forget_all(&self) {
        self.lock().clear();
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<ReplicaId, (SocketAddr, Channel)>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
