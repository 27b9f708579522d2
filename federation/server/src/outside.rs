//! What anybody may fetch: the bundle of the own trust domain, its OIDC documents, and the CRLs of its issuers.
//!
//! HTTPS without client certificates, GET only, small answers with an ETag, few connections at once. Everything here is public
//! and signed, or vouched for by TLS; nothing a stranger sends is acted on.

mod audit;
mod crl;
mod listener;
mod pages;

pub use crl::own_crl;
pub use pages::router;

use crate::config::{EndpointProfile, Outside};
use crate::replica::Replica;
use crate::replica::files::private;
use ambit_identity::SvidKey;
use ambit_identity::keys::certificates_from_pem;
use ambit_identity::tls::{certified, fixed, public_server_config};
use ambit_model::{Code, Refusal};
use ambit_transport::Identity;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use std::path::Path;
use std::sync::Arc;
use tokio::net::TcpListener;

/// The endpoint, listening and not yet serving.
pub struct Endpoint {
    listener: TcpListener,
    tls: rustls::ServerConfig,
    config: Outside,
}

impl Endpoint {
    /// Listens. `own`: what the replica itself presents, leaf first; it is renewed while this serves.
    ///
    /// # Errors
    /// [`Code::ConfigInvalid`] for an address in use, or a certificate and key that are not there or do not fit.
    pub async fn open(config: &Outside, own: &Identity) -> Result<Endpoint, Refusal> {
        let listener = crate::replica::run::listen(config.listen).await?;
        let identity: Arc<dyn ResolvesServerCert> = match &config.profile {
            EndpointProfile::HttpsSpiffe => Arc::new(OwnSvid(own.clone())),
            EndpointProfile::HttpsWeb { certificate, key } => fixed(web_identity(certificate, key)?),
        };
        Ok(Endpoint { listener, tls: public_server_config(identity)?, config: config.clone() })
    }

    /// Serves until the task is ended.
    pub async fn serve(self, replica: Replica) {
        let router = router(replica, self.config);
        listener::serve(self.listener, self.tls, router).await;
    }
}

/// The replica's SVID as it is at that moment, without the roots, which are for those who know only a fingerprint: here the
/// bundle is what is served.
struct OwnSvid(Identity);

impl std::fmt::Debug for OwnSvid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("OwnSvid")
    }
}

impl ResolvesServerCert for OwnSvid {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let svid = self.0.current()?;
        let chain = svid.cert.iter().take(2).cloned().collect();
        Some(Arc::new(CertifiedKey::new(chain, svid.key.clone())))
    }
}

fn web_identity(certificate: &Path, key: &Path) -> Result<Arc<CertifiedKey>, Refusal> {
    let read = |path: &Path| {
        std::fs::read_to_string(path).map_err(|e| {
            Refusal::new(Code::ConfigInvalid, format!("a readable file {}", path.display()), e.to_string())
        })
    };
    let chain = certificates_from_pem(&read(certificate)?)?;
    let text = zeroize::Zeroizing::new(private(key)?);
    let text = std::str::from_utf8(&text)
        .map_err(|_| Refusal::new(Code::ConfigInvalid, format!("a PEM key in {}", key.display()), "other bytes"))?;
    let pair = certified(chain, &SvidKey::from_pem(text)?)?;
    pair.keys_match().map_err(|e| {
        let expected = format!("a certificate in {} of the key in {}", certificate.display(), key.display());
        Refusal::new(Code::ConfigInvalid, expected, e.to_string())
    })?;
    Ok(pair)
}
