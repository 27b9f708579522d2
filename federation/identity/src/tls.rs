//! TLS 1.3 between SPIFFE identities: no host names, no resumption, no renegotiation of who is who.

use crate::keys::{SvidKey, internal};
use crate::svid::{PeerSvid, TrustStore, Usage, verify_pinned, verify_svid_for};
use ambit_model::{Code, Refusal, SpiffeId, Stamp, TrustDomain};
use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, SignatureScheme};
use std::sync::{Arc, RwLock};

/// What a peer's certificate is verified against, at this moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trust {
    /// Bundles.
    Bundles(TrustStore),
    /// First contact: trust domain and root fingerprint, pinned out of band.
    Pinned(TrustDomain, [u8; 32]),
}

impl Trust {
    /// Verifies a client's chain (leaf first).
    pub fn verify(&self, chain: &[CertificateDer<'_>], now: Stamp) -> Result<PeerSvid, Refusal> {
        self.verify_for(Usage::Client, chain, now)
    }
    /// Verifies a chain (leaf first).
    pub fn verify_for(&self, usage: Usage, chain: &[CertificateDer<'_>], now: Stamp) -> Result<PeerSvid, Refusal> {
        match self {
            Self::Bundles(store) => verify_svid_for(usage, chain, store, now),
            Self::Pinned(td, fingerprint) => verify_pinned(chain, td, fingerprint, now),
        }
    }
}

/// Trust that changes under live configurations: every handshake sees the newest bundles.
#[derive(Clone, Debug)]
pub struct SharedTrust {
    current: Arc<RwLock<Arc<Trust>>>,
}

impl SharedTrust {
    /// Starts with `trust`.
    pub fn new(trust: Trust) -> Self {
        Self { current: Arc::new(RwLock::new(Arc::new(trust))) }
    }
    /// What holds now.
    pub fn current(&self) -> Arc<Trust> {
        self.current.read().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }
    /// Replaces it. What is the same stays the same allocation: by that it is known that nothing has to be verified again.
    pub fn replace(&self, trust: Trust) {
        let mut current = self.current.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        if **current != trust {
            *current = Arc::new(trust);
        }
    }
}

/// Whom a client means to reach. There is no "anybody".
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expect {
    /// Any replica of this trust domain's cell.
    ReplicaOf(TrustDomain),
    /// Exactly this identity.
    Id(SpiffeId),
}

impl Expect {
    fn accepts(&self, id: &SpiffeId) -> bool {
        match self {
            Self::ReplicaOf(td) => id.trust_domain() == *td && id.path().starts_with("/ambit/replica/"),
            Self::Id(want) => id == want,
        }
    }
}

#[derive(Debug)]
struct Verifier {
    trust: SharedTrust,
    expect: Option<Expect>,
    anonymous_clients: bool,
    provider: Arc<CryptoProvider>,
}

impl Verifier {
    fn check(
        &self,
        usage: Usage,
        leaf: &CertificateDer<'_>,
        rest: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), rustls::Error> {
        let chain: Vec<_> = std::iter::once(leaf.clone()).chain(rest.iter().cloned()).collect();
        let now = Stamp(now.as_secs().saturating_mul(1000));
        let peer = self.trust.current().verify_for(usage, &chain, now).map_err(|r| certificate(r.code, r))?;
        match &self.expect {
            Some(expect) if !expect.accepts(peer.id()) => Err(certificate(
                Code::SvidUntrusted,
                Refusal::new(Code::SvidUntrusted, format!("{expect:?}"), peer.id().as_str()),
            )),
            Some(_) | None => Ok(()),
        }
    }
}

fn certificate(code: Code, refusal: Refusal) -> rustls::Error {
    let error = rustls::OtherError(Arc::new(refusal));
    match code {
        Code::TrustDomainUnknown | Code::FingerprintMismatch => CertificateError::UnknownIssuer.into(),
        _ => CertificateError::Other(error).into(),
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.check(Usage::Server, end_entity, intermediates, now).map(|()| ServerCertVerified::assertion())
    }
    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.3 only".into()))
    }
    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }
    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ECDSA_NISTP256_SHA256, SignatureScheme::ECDSA_NISTP384_SHA384]
    }
}

impl ClientCertVerifier for Verifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }
    fn client_auth_mandatory(&self) -> bool {
        !self.anonymous_clients
    }
    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.check(Usage::Client, end_entity, intermediates, now).map(|()| ClientCertVerified::assertion())
    }
    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.3 only".into()))
    }
    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }
    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ECDSA_NISTP256_SHA256, SignatureScheme::ECDSA_NISTP384_SHA384]
    }
}

fn provider() -> Arc<CryptoProvider> {
    // prefer-post-quantum puts X25519MLKEM768 first.
    Arc::new(aws_lc_rs::default_provider())
}

/// Pairs a chain (leaf first) with its key for rustls.
pub fn certified(chain: Vec<CertificateDer<'static>>, key: &SvidKey) -> Result<Arc<CertifiedKey>, Refusal> {
    let key = provider().key_provider.load_private_key(key.private_der()).map_err(|e| internal("a signing key", e))?;
    Ok(Arc::new(CertifiedKey::new(chain, key)))
}

#[derive(Debug)]
struct Fixed(Arc<CertifiedKey>);

impl rustls::client::ResolvesClientCert for Fixed {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.0.clone())
    }
    fn has_certs(&self) -> bool {
        true
    }
}
impl ResolvesServerCert for Fixed {
    fn resolve(&self, _: rustls::server::ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.clone())
    }
}

/// A resolver that always presents the same identity.
pub fn fixed(identity: Arc<CertifiedKey>) -> Arc<dyn ResolvesServerCert> {
    Arc::new(Fixed(identity))
}

/// A client that presents `identity` (none only before enrolment) and reaches `expect` or fails.
pub fn client_config(
    trust: SharedTrust,
    expect: Expect,
    identity: Option<Arc<CertifiedKey>>,
    alpn: &[&[u8]],
) -> Result<rustls::ClientConfig, Refusal> {
    let provider = provider();
    let verifier = Verifier { trust, expect: Some(expect), anonymous_clients: false, provider: provider.clone() };
    let builder = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|e| internal("TLS 1.3", e))?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier));
    let mut config = match identity {
        Some(identity) => builder.with_client_cert_resolver(Arc::new(Fixed(identity))),
        None => builder.with_no_client_auth(),
    };
    config.resumption = Resumption::disabled();
    config.alpn_protocols = alpn.iter().map(|p| p.to_vec()).collect();
    Ok(config)
}

/// Whether a server talks to clients without a certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clients {
    /// Every client presents an SVID.
    Certified,
    /// A client may come without one; authorisation decides which calls it may make.
    MayBeAnonymous,
}

/// A server that presents what `identity` resolves to and verifies clients against `trust`.
pub fn server_config(
    trust: SharedTrust,
    clients: Clients,
    identity: Arc<dyn ResolvesServerCert>,
    alpn: &[&[u8]],
) -> Result<rustls::ServerConfig, Refusal> {
    let provider = provider();
    let anonymous_clients = clients == Clients::MayBeAnonymous;
    let verifier = Verifier { trust, expect: None, anonymous_clients, provider: provider.clone() };
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|e| internal("TLS 1.3", e))?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_cert_resolver(identity);
    // No resumption anywhere: a resumed session would skip the bundle (SPIRE issue 6715).
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.alpn_protocols = alpn.iter().map(|p| p.to_vec()).collect();
    Ok(config)
}

/// A server for anybody: it asks for no client certificate, ever (SPIFFE_Federation.md section 5.2), and speaks TLS 1.2 too.
pub fn public_server_config(identity: Arc<dyn ResolvesServerCert>) -> Result<rustls::ServerConfig, Refusal> {
    let mut config = rustls::ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(|e| internal("TLS 1.2 and 1.3", e))?
        .with_no_client_auth()
        .with_cert_resolver(identity);
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}

/// A client of the web: the server is verified by these authorities (PEM) and its name. It shows no certificate.
pub fn web_client_config(authorities_pem: &str, alpn: &[&[u8]]) -> Result<rustls::ClientConfig, Refusal> {
    let mut roots = rustls::RootCertStore::empty();
    // Some that a system lists are not to the letter; one that cannot be read vouches for nobody.
    let (_added, _ignored) = roots.add_parsable_certificates(crate::keys::certificates_from_pem(authorities_pem)?);
    let mut config = rustls::ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(|e| internal("TLS 1.2 and 1.3", e))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.resumption = Resumption::disabled();
    config.alpn_protocols = alpn.iter().map(|p| p.to_vec()).collect();
    Ok(config)
}
