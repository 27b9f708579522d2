//! The key of the node's own SVID: in memory, or inside the TPM that is attested with it.

use crate::config::NodeKeyHome;
use crate::enrol::tpm;
use ambit_identity::{RemoteKey, SvidKey, remote, tls};
use ambit_model::{Code, Refusal};
use ambit_tpm::{Attester, TpmKey};
use ambit_verify::KeyHome;
use rustls::sign::CertifiedKey;
use rustls_pki_types::CertificateDer;
use std::sync::Arc;
use tokio::runtime::{Handle, RuntimeFlavor};

/// A fresh key for one admission.
pub enum NodeKey {
    /// Here.
    Memory(SvidKey),
    /// There.
    Tpm(Arc<InTpm>),
}

impl NodeKey {
    /// Makes one. In a TPM it takes seconds at worst.
    pub async fn generate(home: NodeKeyHome, attester: &Attester) -> Result<NodeKey, Refusal> {
        Ok(match home {
            NodeKeyHome::Memory => NodeKey::Memory(SvidKey::generate()?),
            NodeKeyHome::Tpm => NodeKey::Tpm(Arc::new(InTpm(attester.create_key().await.map_err(tpm)?))),
        })
    }

    /// A request with this key and nothing else.
    pub async fn csr(&self) -> Result<Vec<u8>, Refusal> {
        match self {
            NodeKey::Memory(key) => key.csr(),
            NodeKey::Tpm(key) => {
                let key = key.clone();
                let made = tokio::task::spawn_blocking(move || remote::csr(key.as_ref())).await;
                made.map_err(|e| Refusal::new(Code::Internal, "a CSR", e.to_string()))?
            }
        }
    }

    /// Where it is; of one in the TPM with the AK's word for it, over `qualifying`.
    pub async fn home(&self, qualifying: [u8; 32]) -> Result<KeyHome, Refusal> {
        let NodeKey::Tpm(key) = self else { return Ok(KeyHome::InMemory) };
        let certified = key.0.certify(qualifying).await.map_err(tpm)?;
        KeyHome::from_wire((certified.public, certified.attest, certified.signature), Default::default())
    }

    /// With its chain (leaf first), as rustls signs with it.
    pub fn certified(&self, chain: Vec<CertificateDer<'static>>) -> Result<Arc<CertifiedKey>, Refusal> {
        match self {
            NodeKey::Memory(key) => tls::certified(chain, key),
            NodeKey::Tpm(key) => Ok(remote::certified(chain, key.clone())),
        }
    }
}

/// The key's handle. It goes with the admission, and the key with it.
#[derive(Debug)]
pub struct InTpm(TpmKey);

impl RemoteKey for InTpm {
    fn point(&self) -> &[u8; 65] {
        self.0.point()
    }

    fn sign(&self, digest: [u8; 32]) -> Result<Vec<u8>, Refusal> {
        let sign = || self.0.sign_blocking(digest).map_err(tpm);
        // rustls asks on a thread of the runtime, which others wait for: they move to another while the TPM signs.
        match Handle::try_current().map(|runtime| runtime.runtime_flavor()) {
            Ok(RuntimeFlavor::MultiThread) => tokio::task::block_in_place(sign),
            _ => sign(),
        }
    }
}
