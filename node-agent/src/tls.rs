//! TLS of tunnels: TLS 1.3, a workload's SVID on either side, no resumption (all of it `ambit-identity`'s rules).

use crate::issued::Svid;
use ambit_identity::tls::{Clients, certified, client_config, fixed, server_config};
use ambit_identity::{Expect, PeerSvid, SharedTrust};
use ambit_model::{Refusal, SpiffeId, Stamp};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, ServerConfig};
use rustls_pki_types::CertificateDer;
use std::sync::Arc;

/// HBONE inside TLS.
pub const HBONE: &[u8] = b"h2";
/// What both sides speak inside TLS, the preferred first.
const ALPN: &[&[u8]] = &[crate::native::ALPN, crate::native::ALPN_BEFORE, HBONE];

/// `svid` in the form that rustls signs with.
pub fn certified_key(svid: &Svid) -> Result<Arc<CertifiedKey>, Refusal> {
    let key = ambit_identity::SvidKey::from_pkcs8(&svid.key_pkcs8)?;
    certified(svid.chain_der.iter().map(|der| CertificateDer::from(der.clone())).collect(), &key)
}

/// A server that shows `key` and demands an SVID of a known trust domain.
pub fn server(key: Arc<CertifiedKey>, trust: SharedTrust) -> Result<ServerConfig, Refusal> {
    let mut config = server_config(trust, Clients::Certified, fixed(key), ALPN)?;
    // For the record layer of `crate::records`; the keys never leave the process.
    config.enable_secret_extraction = true;
    Ok(config)
}

/// A client that shows `key` and accepts `expected` only.
pub fn client(key: Arc<CertifiedKey>, trust: SharedTrust, expected: &SpiffeId) -> Result<ClientConfig, Refusal> {
    let mut config = client_config(trust, Expect::Id(expected.clone()), Some(key), ALPN)?;
    config.enable_secret_extraction = true;
    Ok(config)
}

/// Who the other side proved to be, by the bundles of now and this node's own clock.
pub fn peer(chain: &[CertificateDer<'_>], trust: &SharedTrust, now: Stamp) -> Result<PeerSvid, Refusal> {
    trust.current().verify(chain, now)
}
