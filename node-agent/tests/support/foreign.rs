//! An agent of somebody else that speaks HBONE only: rustls' own connection and h2 on it, in the name of `db`.

use super::stage::Stage;
use ambit_agent::tls;
use bytes::Bytes;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::net::TcpListener;

/// Answers what it gets, and counts the connections that it gets it by.
pub(crate) async fn echo(stage: &Stage, listener: TcpListener, connections: Arc<AtomicU64>) {
    let east = stage.east_plane.borrow().clone().unwrap();
    let mut config = tls::server(tls::certified_key(&stage.db_svid).unwrap(), east.trust.clone()).unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    loop {
        let (tcp, _) = listener.accept().await.unwrap();
        connections.fetch_add(1, Ordering::Relaxed);
        let acceptor = acceptor.clone();
        tokio::spawn(async move {
            let Ok(stream) = acceptor.accept(tcp).await else { return };
            let mut streams = h2::server::handshake(stream).await.unwrap();
            while let Some(Ok((request, mut respond))) = streams.accept().await {
                assert!(request.headers().contains_key("traceparent"));
                tokio::spawn(async move {
                    let mut send = respond.send_response(http::Response::new(()), false).unwrap();
                    let mut body = request.into_body();
                    while let Some(Ok(chunk)) = body.data().await {
                        body.flow_control().release_capacity(chunk.len()).unwrap();
                        send.send_data(chunk, false).unwrap();
                    }
                    let _ = send.send_data(Bytes::new(), true);
                });
            }
        });
    }
}
