//! A relay that counts: what one connection weighs on the wire, TLS and HTTP/2 and all.

use anyhow::Result;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

const BUFFER_BYTES: usize = 64 * 1024;

/// A running relay; it ends with its connection.
pub(super) struct Proxy {
    /// Where to dial.
    pub(super) at: SocketAddr,
    down: Arc<AtomicU64>,
}

impl Proxy {
    /// For one connection to `to`.
    pub(super) async fn start(to: SocketAddr) -> Result<Proxy> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let (at, down) = (listener.local_addr()?, Arc::new(AtomicU64::new(0)));
        let counted = down.clone();
        tokio::spawn(async move {
            let Ok((near, _)) = listener.accept().await else { return };
            let Ok(far) = TcpStream::connect(to).await else { return };
            let _ = (near.set_nodelay(true), far.set_nodelay(true));
            let ((mut near_read, mut near_write), (mut far_read, mut far_write)) =
                (near.into_split(), far.into_split());
            let up = tokio::spawn(async move { tokio::io::copy(&mut near_read, &mut far_write).await });
            let mut buffer = vec![0; BUFFER_BYTES];
            while let Ok(n @ 1..) = far_read.read(&mut buffer).await {
                counted.fetch_add(n as u64, Ordering::Relaxed);
                let Some(read) = buffer.get(..n) else { break };
                if near_write.write_all(read).await.is_err() {
                    break;
                }
            }
            up.abort();
        });
        Ok(Proxy { at, down })
    }

    /// Bytes that came down so far.
    pub(super) fn bytes(&self) -> u64 {
        self.down.load(Ordering::Relaxed)
    }
}
