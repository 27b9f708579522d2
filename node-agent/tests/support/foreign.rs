//! Agents of somebody else that speak HBONE only: rustls' own connections and h2 on them. One is called in the name of `db`,
//! one calls in that of `web`.

use super::stage::{SOON, Stage};
use ambit_agent::tls;
use bytes::Bytes;
use h2::client::SendRequest;
use http::{Method, Request, StatusCode};
use rustls_pki_types::ServerName;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio_rustls::client::TlsStream;

/// Who called, and the name that was asked for.
pub(crate) type Calls = Arc<Mutex<Vec<(IpAddr, Option<String>)>>>;

fn acceptor(stage: &Stage) -> tokio_rustls::TlsAcceptor {
    let east = stage.east_plane.borrow().clone().unwrap();
    let mut config = tls::server(tls::certified_key(&stage.db_svid).unwrap(), east.trust.clone()).unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    tokio_rustls::TlsAcceptor::from(Arc::new(config))
}

/// One connection, for who says in it what no library would.
pub(crate) async fn accept(stage: &Stage, listener: &TcpListener) -> tokio_rustls::server::TlsStream<TcpStream> {
    acceptor(stage).accept(listener.accept().await.unwrap().0).await.unwrap()
}

/// Answers what it gets, and remembers the connections that it gets it by.
pub(crate) async fn echo(stage: &Stage, listener: TcpListener, calls: Calls) {
    let acceptor = acceptor(stage);
    loop {
        let (tcp, from) = listener.accept().await.unwrap();
        let (acceptor, calls) = (acceptor.clone(), calls.clone());
        let nth = calls.lock().unwrap().len();
        calls.lock().unwrap().push((from.ip(), None));
        tokio::spawn(async move {
            let Ok(stream) = acceptor.accept(tcp).await else { return };
            let name = stream.get_ref().1.server_name().map(str::to_owned);
            calls.lock().unwrap()[nth].1 = name;
            let mut streams = h2::server::handshake(stream).await.unwrap();
            while let Some(Ok((request, mut respond))) = streams.accept().await {
                let said = |name| request.headers()[name].to_str().unwrap();
                assert_eq!(said("traceparent").len(), 55);
                assert_eq!(said("baggage"), "k8s.cluster.name=west,service.name=web");
                assert!(said("forwarded").starts_with("for=\"127.0.74."), "{}", said("forwarded"));
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

/// TLS to `at` from `from`, asking for this name, as `web`.
pub(crate) async fn secured(
    stage: &Stage,
    from: Ipv4Addr,
    at: SocketAddr,
    name: ServerName<'static>,
) -> Result<TlsStream<TcpStream>, std::io::Error> {
    let west = stage.west_plane.borrow().clone().unwrap();
    let key = tls::certified_key(&stage.web_svid).unwrap();
    let mut config = tls::client(key, west.trust.clone(), &stage.db_svid.id).unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind((from, 0).into()).unwrap();
    let tcp = socket.connect(at).await?;
    tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, tcp).await
}

/// An open tunnel of a foreign caller.
pub(crate) struct Caller(SendRequest<Bytes>);

impl Caller {
    /// The same, with HTTP/2 in it.
    pub(crate) async fn dial(
        stage: &Stage,
        from: Ipv4Addr,
        at: SocketAddr,
        name: ServerName<'static>,
    ) -> Result<Caller, std::io::Error> {
        let stream = secured(stage, from, at, name).await?;
        let (requests, connection) = h2::client::handshake(stream).await.map_err(std::io::Error::other)?;
        tokio::spawn(connection);
        Ok(Caller(requests))
    }

    /// Sends it and waits for the answer; the stream ends with this.
    pub(crate) async fn ask(&mut self, request: Request<()>) -> Result<StatusCode, h2::Error> {
        let answer = async {
            self.0 = self.0.clone().ready().await?;
            let (answer, _send) = self.0.send_request(request, false)?;
            Ok(answer.await?.status())
        };
        tokio::time::timeout(SOON, answer).await.expect("an answer in time")
    }

    /// The same of CONNECT.
    pub(crate) async fn connect(&mut self, authority: &str) -> StatusCode {
        self.ask(connect(authority)).await.unwrap()
    }
}

pub(crate) fn connect(authority: &str) -> Request<()> {
    Request::builder().method(Method::CONNECT).uri(authority).body(()).unwrap()
}
