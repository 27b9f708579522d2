//! A TCP connection under TLS 1.3: rustls shakes hands and verifies the peer, [`crate::records`] carries what follows.
//!
//! rustls' own connections copy each record twice more and read 4 KiB at a time; its `kernel` interface is for those who
//! seal and open themselves, as the kernel would.

use crate::records::{self, Keys, Opener, RECORD_MAX, RecordError, Rekey, Sealer, alert};
use rustls::client::{ClientConnectionData, UnbufferedClientConnection};
use rustls::kernel::KernelConnection;
use rustls::server::{Acceptor, ServerConnectionData, UnbufferedServerConnection};
use rustls::unbuffered::{ConnectionState, EncodeError, UnbufferedStatus};
use rustls::{ClientConfig, CommonState, ConnectionTrafficSecrets, ExtractedSecrets, ServerConfig};
use rustls_pki_types::{CertificateDer, ServerName};
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;

/// What a handshake may bring: two chains of certificates are a tenth of it.
const HANDSHAKE_MAX: usize = 64 * 1024;
/// A ClientHello with a post-quantum key share has 1.8 KiB.
const HELLO_MAX: usize = 16 * 1024;
/// A connection after its handshake.
#[derive(Debug)]
pub struct Secured {
    /// The connection.
    pub tcp: TcpStream,
    /// What is sent.
    pub sealer: Sealer,
    /// What comes.
    pub opener: Opener,
    /// What was agreed to speak; none where the peer did not say.
    pub protocol: Option<Vec<u8>>,
    /// The peer's certificates, leaf first; verified in the handshake. Whoever keeps them takes them out.
    pub chain: Vec<CertificateDer<'static>>,
}

/// As a client: shakes hands with the server behind `tcp`.
pub async fn connect(mut tcp: TcpStream, config: Arc<ClientConfig>, name: ServerName<'static>) -> io::Result<Secured> {
    let connection = UnbufferedClientConnection::new(config, name).map_err(io::Error::other)?;
    let done = shake(&mut tcp, connection, Vec::new()).await?;
    done.over(tcp)
}

/// As a server: shakes hands with the client whose first bytes are `hello`.
pub async fn accept(mut tcp: TcpStream, hello: Vec<u8>, config: Arc<ServerConfig>) -> io::Result<Secured> {
    let connection = UnbufferedServerConnection::new(config).map_err(io::Error::other)?;
    let done = shake(&mut tcp, connection, hello).await?;
    done.over(tcp)
}

/// Reads the ClientHello: the bytes so far, and the name that the client asks for (empty where it asks for none).
pub async fn hello(tcp: &mut TcpStream) -> io::Result<(Vec<u8>, String)> {
    let (mut bytes, mut acceptor) = (Vec::with_capacity(2048), Acceptor::default());
    loop {
        let before = bytes.len();
        if tcp.read_buf(&mut bytes).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if bytes.len() > HELLO_MAX {
            return Err(io::Error::other("a ClientHello of more than 16 KiB"));
        }
        let mut new = bytes.get(before..).unwrap_or_default();
        while !new.is_empty() && acceptor.read_tls(&mut new)? > 0 {
            match acceptor.accept() {
                Ok(None) => {}
                Ok(Some(accepted)) => {
                    let name = accepted.client_hello().server_name().unwrap_or_default().to_owned();
                    return Ok((bytes, name));
                }
                Err((error, mut alert)) => {
                    let mut told = Vec::new();
                    alert.write_all(&mut told)?;
                    tcp.write_all(&told).await?;
                    return Err(io::Error::other(error));
                }
            }
        }
    }
}

impl Secured {
    /// Tells the peer why it ends, if the connection takes it at once: whether it hears of it changes nothing.
    pub fn turn_away(&mut self, alert: u8) {
        if self.sealer.alert(alert).is_ok() {
            let _ = self.tcp.try_write(&self.sealer.take());
        }
    }

    /// The same for what came and was not taken.
    pub fn tell_failure(&mut self) {
        if let Some(alert) = self.opener.alert() {
            self.turn_away(alert);
        }
    }
}

/// Tells a client that nobody here has the name which it asked for; there are no keys yet (RFC 8446, section 6).
pub fn unknown_name(tcp: &TcpStream) {
    const FATAL: u8 = 2;
    let _ = tcp.try_write(&[21, 3, 3, 0, 2, FATAL, alert::UNRECOGNIZED_NAME]);
}

/// A rustls connection of either side.
trait Shaking {
    type Data;
    fn turn<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data>;
    fn state(&self) -> &CommonState;
    fn into_secrets(self) -> Result<(ExtractedSecrets, Box<dyn Rekey>), rustls::Error>;
}

/// What both have, rustls gives no name to.
macro_rules! shaking {
    ($connection:ty, $data:ty) => {
        impl Shaking for $connection {
            type Data = $data;
            fn turn<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, $data> {
                self.process_tls_records(incoming)
            }
            fn state(&self) -> &CommonState {
                self
            }
            fn into_secrets(self) -> Result<(ExtractedSecrets, Box<dyn Rekey>), rustls::Error> {
                self.dangerous_into_kernel_connection()
                    .map(|(secrets, rest)| (secrets, Box::new(rest) as Box<dyn Rekey>))
            }
        }
    };
}

shaking!(UnbufferedClientConnection, ClientConnectionData);
shaking!(UnbufferedServerConnection, ServerConnectionData);

impl<Data: Send> Rekey for KernelConnection<Data> {
    fn next_tx(&mut self) -> Result<(u64, ConnectionTrafficSecrets), rustls::Error> {
        self.update_tx_secret()
    }
    fn next_rx(&mut self) -> Result<(u64, ConnectionTrafficSecrets), rustls::Error> {
        self.update_rx_secret()
    }
}

/// A finished handshake.
struct Shaken<C> {
    connection: C,
    unread: Vec<u8>,
    early: Vec<Vec<u8>>,
}

impl<C: Shaking> Shaken<C> {
    fn over(self, tcp: TcpStream) -> io::Result<Secured> {
        let state = self.connection.state();
        let protocol = state.alpn_protocol().map(<[u8]>::to_vec);
        let chain = state.peer_certificates().unwrap_or_default().iter().map(|c| c.clone().into_owned()).collect();
        let (secrets, rekey) = self.connection.into_secrets().map_err(io::Error::other)?;
        let keys = Keys::new(rekey);
        let sealer = Sealer::new(secrets.tx, keys.clone()).map_err(io::Error::other)?;
        let opener = Opener::new(secrets.rx, keys, &self.unread, self.early).map_err(io::Error::other)?;
        Ok(Secured { tcp, sealer, opener, protocol, chain })
    }
}

/// What to do next.
enum Step {
    Go,
    Read,
    Write,
    Done,
    Fail(io::Error),
}

async fn shake<C: Shaking>(tcp: &mut TcpStream, mut connection: C, mut unread: Vec<u8>) -> io::Result<Shaken<C>> {
    let (mut outgoing, mut early) = (Vec::new(), Vec::new());
    loop {
        let UnbufferedStatus { discard, state } = connection.turn(&mut unread);
        let mut step = match state {
            Ok(ConnectionState::EncodeTlsData(mut record)) => encode(&mut outgoing, |room| record.encode(room)),
            Ok(ConnectionState::TransmitTlsData(sent)) => {
                sent.done();
                Step::Write
            }
            Ok(ConnectionState::BlockedHandshake) => Step::Read,
            Ok(ConnectionState::WriteTraffic(_)) => Step::Done,
            Ok(ConnectionState::ReadTraffic(mut records)) => {
                while let Some(record) = records.next_record() {
                    early.push(record.map_err(io::Error::other)?.payload.to_vec());
                }
                Step::Go
            }
            Ok(_) => Step::Fail(io::ErrorKind::UnexpectedEof.into()),
            Err(error) => Step::Fail(io::Error::other(error)),
        };
        unread.drain(..discard);
        if matches!(step, Step::Done) && connection.state().is_handshaking() {
            // A server may send already; the client has not answered yet.
            step = Step::Read;
        }
        match step {
            Step::Go => {}
            Step::Write => tcp.write_all(&std::mem::take(&mut outgoing)).await?,
            Step::Read => {
                if unread.len() >= HANDSHAKE_MAX {
                    return Err(io::Error::other("a handshake of more than 64 KiB"));
                }
                if tcp.read_buf(&mut unread).await? == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
            }
            Step::Done => return Ok(Shaken { connection, unread, early }),
            Step::Fail(error) => {
                // The peer is to know why; whether it hears of it changes nothing. rustls remembers where messages lie in what it
                // was shown, so it is shown what is left of that, and not nothing.
                loop {
                    let UnbufferedStatus { discard, state } = connection.turn(&mut unread);
                    let Ok(ConnectionState::EncodeTlsData(mut record)) = state else { break };
                    let _ = encode(&mut outgoing, |room| record.encode(room));
                    unread.drain(..discard);
                }
                let _ = tcp.write_all(&outgoing).await;
                return Err(error);
            }
        }
    }
}

fn encode(outgoing: &mut Vec<u8>, mut into: impl FnMut(&mut [u8]) -> Result<usize, EncodeError>) -> Step {
    let at = outgoing.len();
    let needed = match into(&mut []) {
        Err(EncodeError::InsufficientSize(size)) => size.required_size,
        Err(error) => return Step::Fail(io::Error::other(error)),
        Ok(_) => return Step::Go,
    };
    outgoing.resize(at + needed, 0);
    match into(outgoing.get_mut(at..).unwrap_or_default()) {
        Ok(written) => {
            outgoing.truncate(at + written);
            Step::Go
        }
        Err(error) => Step::Fail(io::Error::other(error)),
    }
}

pub(crate) fn broken(error: RecordError) -> io::Error {
    match error {
        RecordError::Alert(alert::CLOSE_NOTIFY) => io::ErrorKind::UnexpectedEof.into(),
        other => io::Error::other(other),
    }
}

/// A secured connection as a stream of bytes, for HTTP/2.
#[derive(Debug)]
pub struct Bytestream {
    secured: Secured,
    /// Opened and not taken yet.
    open: std::ops::Range<usize>,
    /// Sealed and not written yet.
    sealed: Vec<u8>,
    written: usize,
    closing: bool,
}

impl Bytestream {
    /// Around `secured`.
    pub fn new(secured: Secured) -> Self {
        Self { secured, open: 0..0, sealed: Vec::new(), written: 0, closing: false }
    }

    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.written < self.sealed.len() {
            let rest = self.sealed.get(self.written..).unwrap_or_default();
            match ready!(Pin::new(&mut self.secured.tcp).poll_write(cx, rest))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                n => self.written += n,
            }
        }
        if !self.sealed.is_empty() {
            records::keep(std::mem::take(&mut self.sealed));
            self.written = 0;
        }
        if self.secured.sealer.is_pending() {
            self.sealed = self.secured.sealer.take();
            return self.poll_drain(cx);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncRead for Bytestream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        while this.open.is_empty() {
            match this.secured.opener.next_record() {
                Ok(Some(content)) => this.open = content,
                Ok(None) => {
                    // An idle connection holds no buffer.
                    this.secured.opener.rest();
                    ready!(this.secured.tcp.poll_read_ready(cx))?;
                    let mut room = ReadBuf::new(this.secured.opener.room());
                    ready!(Pin::new(&mut this.secured.tcp).poll_read(cx, &mut room))?;
                    match room.filled().len() {
                        0 => return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into())),
                        n => this.secured.opener.filled(n),
                    }
                }
                Err(RecordError::Alert(alert::CLOSE_NOTIFY)) => return Poll::Ready(Ok(())),
                Err(error) => {
                    // Not into the middle of a record.
                    if this.sealed.is_empty() {
                        this.secured.tell_failure();
                    }
                    return Poll::Ready(Err(broken(error)));
                }
            }
        }
        let bytes = this.secured.opener.bytes().get(this.open.clone()).unwrap_or_default();
        let taken = bytes.len().min(into.remaining());
        into.put_slice(bytes.get(..taken).unwrap_or_default());
        this.open.start += taken;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Bytestream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        ready!(this.poll_drain(cx))?;
        this.secured.sealer.turn_key().map_err(broken)?;
        // Behind the news of another key, which is rare, comes nothing else at once.
        if this.secured.sealer.is_pending() {
            ready!(this.poll_drain(cx))?;
        }
        let (mut room, mut taken, mut sealed) = (records::buffer(), 0, 0);
        for content in bytes.chunks(records::CONTENT_MAX).take(records::RECORDS) {
            let record = room.get_mut(sealed..sealed + RECORD_MAX).unwrap_or_default();
            if let Some(at) = record.get_mut(records::HEADER_BYTES..records::HEADER_BYTES + content.len()) {
                at.copy_from_slice(content);
            }
            sealed += this.secured.sealer.seal(record, content.len()).map_err(broken)?;
            taken += content.len();
        }
        let mut written = 0;
        // What the socket does not take now waits in the buffer; the caller's bytes count as written.
        while written < sealed {
            match Pin::new(&mut this.secured.tcp).poll_write(cx, room.get(written..sealed).unwrap_or_default()) {
                Poll::Ready(n) => written += n?,
                Poll::Pending => break,
            }
        }
        if written < sealed {
            this.sealed = room.get(written..sealed).unwrap_or_default().to_vec();
            this.written = 0;
        }
        records::keep(room);
        Poll::Ready(Ok(taken))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_drain(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        ready!(this.poll_drain(cx))?;
        if !std::mem::replace(&mut this.closing, true) {
            this.secured.sealer.alert(alert::CLOSE_NOTIFY).map_err(broken)?;
        }
        ready!(this.poll_drain(cx))?;
        Pin::new(&mut this.secured.tcp).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use tokio::net::TcpListener;
    use tokio::time::timeout;

    fn config() -> Arc<ClientConfig> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder = ClientConfig::builder_with_provider(provider).with_protocol_versions(&[&rustls::version::TLS13]);
        Arc::new(builder.unwrap().with_root_certificates(rustls::RootCertStore::empty()).with_no_client_auth())
    }

    async fn two() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (near, far) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
        (near.unwrap(), far.unwrap().0)
    }

    async fn heard(bytes: &[u8]) -> (io::Result<(Vec<u8>, String)>, Vec<u8>) {
        let (mut client, mut server) = two().await;
        let asking = async {
            // In pieces, as a network may cut them. The server may have had enough.
            for piece in bytes.chunks(700) {
                let _ = client.write_all(piece).await;
                tokio::task::yield_now().await;
            }
            let _ = client.shutdown().await;
            let mut told = Vec::new();
            let _ = client.read_to_end(&mut told).await;
            told
        };
        let hearing = async move { hello(&mut server).await };
        let (told, heard) = timeout(Duration::from_secs(5), async { tokio::join!(asking, hearing) }).await.unwrap();
        (heard, told)
    }

    #[tokio::test]
    async fn a_hello_is_read_whole_and_no_further_than_it_may_be() {
        let name = "name.ambit.internal".to_owned();
        let server_name = ServerName::try_from(name.clone()).unwrap();
        let mut connection = UnbufferedClientConnection::new(config(), server_name).unwrap();
        let mut good = Vec::new();
        if let Ok(ConnectionState::EncodeTlsData(mut record)) = connection.turn(&mut []).state {
            encode(&mut good, |room| record.encode(room));
        }
        assert!(good.len() > 1400, "a post-quantum share");
        assert_eq!(heard(&good).await.0.unwrap(), (good.clone(), name));
        assert_eq!(heard(&good[..good.len() - 1]).await.0.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        // A ClientHello that says it has 64 KiB - 1, in records of 16 KiB.
        let record = |content: &[u8]| [&[22, 3, 1, 0x3f, 0xff][..], content].concat();
        let long = [record(&[&[1, 0, 0xff, 0xff][..], &[0; 0x3ffb]].concat()), record(&[0; 0x3fff])].concat();
        let (refused, _) = heard(&long).await;
        assert!(refused.unwrap_err().to_string().contains("16 KiB"));
        let (refused, told) = heard(b"GET / HTTP/1.1\r\n\r\n").await;
        assert!(refused.is_err() && told.starts_with(&[21, 3]), "an alert: {told:?}");
    }

    #[tokio::test]
    async fn a_server_that_never_finishes_is_heard_64_kib_of() {
        let (client, mut server) = two().await;
        let endless = async move {
            // A handshake message of 16 MiB.
            let mut sent = 0;
            let mut content = [&[11, 0xff, 0xff, 0xff][..], &[0; 0x3ffb]].concat();
            while sent < 8 << 20 && server.write_all(&[&[22, 3, 3, 0x3f, 0xff][..], &content].concat()).await.is_ok() {
                sent += content.len();
                content.fill(0);
            }
            sent
        };
        let connecting = connect(client, config(), ServerName::try_from("name.ambit.internal").unwrap());
        let both = async { tokio::join!(connecting, endless) };
        let (connected, sent) = timeout(Duration::from_secs(5), both).await.unwrap();
        assert!(connected.is_err() && sent < 8 << 20, "{sent} bytes");
    }
}
