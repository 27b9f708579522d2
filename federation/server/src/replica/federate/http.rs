//! One GET over HTTPS, bounded in size, time and redirects, to the host that was configured and to no other.

use ambit_identity::bundle::DOCUMENT_BYTES_MAX;
use ambit_model::{Code, Refusal};
use axum::body::Body;
use http::{HeaderMap, Request, StatusCode, Uri, header};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::{Connected, Connection};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// From the name to the last byte.
const FETCH_MAX: Duration = Duration::from_secs(10);
/// An endpoint moves for a while; it does not go round.
const REDIRECTS_MAX: usize = 3;

/// Where a bundle is: https, one host and port, no user, no fragment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    uri: Uri,
    host: String,
    port: u16,
}

impl Place {
    /// Reads a URL (SPIFFE_Federation.md section 3: https, no userinfo).
    ///
    /// # Errors
    /// [`Code::BadRequest`].
    pub fn parse(url: &str) -> Result<Place, Refusal> {
        let bad = |why: &str| Refusal::new(Code::BadRequest, format!("a URL https://host/path ({why})"), url);
        let uri: Uri = url.parse().map_err(|_| bad("one that can be read"))?;
        let authority = uri.authority().filter(|_| uri.scheme_str() == Some("https")).ok_or_else(|| bad("https"))?;
        if authority.as_str().contains('@') || url.contains('#') {
            return Err(bad("no user and no fragment"));
        }
        let port = match authority.port() {
            Some(port) => {
                port.as_str().parse().ok().filter(|port| *port != 0).ok_or_else(|| bad("a port of 1-65535"))?
            }
            None => 443,
        };
        let host = authority.host().trim_matches(['[', ']']).to_owned();
        if host.is_empty() || ServerName::try_from(host.clone()).is_err() {
            return Err(bad("a host"));
        }
        Ok(Place { host, port, uri })
    }

    /// Where a redirect leads, if that is on the same host and port: what was configured is that host.
    fn redirected(&self, location: &str) -> Result<Place, Refusal> {
        let refuse =
            |found: String| Refusal::new(Code::EndpointRefused, format!("a redirect within {}", self.host), found);
        let next = match location.starts_with('/') && !location.starts_with("//") {
            true => Place::parse(&format!("https://{}{location}", self.uri.authority().map_or("", |a| a.as_str()))),
            false => Place::parse(location),
        };
        let next = next.map_err(|_| refuse(location.to_owned()))?;
        if (&next.host, next.port) == (&self.host, self.port) { Ok(next) } else { Err(refuse(location.to_owned())) }
    }
}

/// What an endpoint answered.
pub(super) enum Answer {
    /// What the caller has already.
    Same,
    /// A document, and its ETag.
    Document { text: String, etag: Option<String> },
}

/// Fetches, within [`FETCH_MAX`].
pub(super) async fn get(config: ClientConfig, place: &Place, etag: Option<&str>) -> Result<Answer, Refusal> {
    let silence = |_| refused(place, "an answer in time", format!("nothing within {} s", FETCH_MAX.as_secs()));
    tokio::time::timeout(FETCH_MAX, follow(Arc::new(config), place.clone(), etag)).await.map_err(silence)?
}

fn refused(place: &Place, expected: &str, found: impl Into<String>) -> Refusal {
    Refusal::new(Code::EndpointRefused, format!("{expected} from {}", place.uri), found)
}

async fn follow(config: Arc<ClientConfig>, mut place: Place, etag: Option<&str>) -> Result<Answer, Refusal> {
    for _ in 0..=REDIRECTS_MAX {
        let (status, headers, body) = once(config.clone(), &place, etag).await?;
        let text = |name| headers.get(name).and_then(|value: &http::HeaderValue| value.to_str().ok());
        match status {
            StatusCode::OK => {
                let bytes = axum::body::to_bytes(body, DOCUMENT_BYTES_MAX)
                    .await
                    .map_err(|e| refused(&place, &format!("at most {DOCUMENT_BYTES_MAX} bytes"), e.to_string()))?;
                let etag = text(header::ETAG).map(str::to_owned);
                let text = String::from_utf8(bytes.into())
                    .map_err(|_| Refusal::new(Code::BundleMalformed, "a JSON document", "bytes that are no text"))?;
                return Ok(Answer::Document { text, etag });
            }
            StatusCode::NOT_MODIFIED if etag.is_some() => return Ok(Answer::Same),
            // Temporary ones only: what moved for good is for an operator to write (SPIFFE_Federation.md section 5.2).
            StatusCode::FOUND | StatusCode::SEE_OTHER | StatusCode::TEMPORARY_REDIRECT => {
                place = place.redirected(text(header::LOCATION).unwrap_or_default())?;
            }
            other => return Err(refused(&place, "200", other.to_string())),
        }
    }
    Err(refused(&place, &format!("at most {REDIRECTS_MAX} redirects"), "more"))
}

async fn once(
    config: Arc<ClientConfig>,
    place: &Place,
    etag: Option<&str>,
) -> Result<(StatusCode, HeaderMap, Body), Refusal> {
    let (host, port) = (place.host.clone(), place.port);
    let connect = tower::service_fn(move |_: Uri| {
        let (config, host) = (config.clone(), host.clone());
        Box::pin(async move {
            let tcp = TcpStream::connect((host.as_str(), port)).await?;
            let name = ServerName::try_from(host).map_err(io::Error::other)?;
            let stream = TlsConnector::from(config).connect(name, tcp).await?;
            Ok::<_, io::Error>(TokioIo::new(Tls(stream)))
        })
    });
    // A connection for one request: nothing is kept that could be stale next time.
    let client: Client<_, Body> = Client::builder(TokioExecutor::new()).pool_max_idle_per_host(0).build(connect);
    let mut request = Request::get(place.uri.clone()).header(header::ACCEPT, "application/json");
    if let Some(etag) = etag {
        request = request.header(header::IF_NONE_MATCH, etag);
    }
    let request = request.body(Body::empty()).map_err(|e| refused(place, "a request", e.to_string()))?;
    let answer = client.request(request).await.map_err(|e| refused(place, "an answer", chain(&e)))?;
    let (head, body) = answer.into_parts();
    Ok((head.status, head.headers, Body::new(body)))
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut out = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        out = format!("{out}: {cause}");
        source = cause.source();
    }
    out
}

/// TLS as the client wants it.
struct Tls(TlsStream<TcpStream>);

impl Connection for Tls {
    fn connected(&self) -> Connected {
        Connected::new()
    }
}
impl AsyncRead for Tls {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}
impl AsyncWrite for Tls {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_https_and_redirects_stay_on_their_host() {
        for (url, good) in [
            ("https://bundle.example.org/west", true),
            ("https://bundle.example.org", true),
            ("https://127.0.0.1:8443/", true),
            ("https://[::1]:8443/b?x=1", true),
            ("http://bundle.example.org/", false),
            ("https://user@bundle.example.org/", false),
            ("https://bundle.example.org/#x", false),
            ("https://bundle.example.org:0/", false),
            ("https:///x", false),
            ("/x", false),
            ("ftp://bundle.example.org/", false),
            ("", false),
        ] {
            assert_eq!(Place::parse(url).is_ok(), good, "{url}");
        }
        let place = Place::parse("https://bundle.example.org:8443/a").unwrap();
        for (location, good) in [
            ("/b", true),
            ("https://bundle.example.org:8443/b", true),
            ("https://bundle.example.org/b", false),
            ("https://other.example.org:8443/b", false),
            ("https://169.254.169.254/latest", false),
            ("http://bundle.example.org:8443/b", false),
            ("//other.example.org/b", false),
            ("https://bundle.example.org:8443@other.example.org/", false),
            ("", false),
        ] {
            assert_eq!(place.redirected(location).is_ok(), good, "{location}");
        }
    }
}
