//! A key to which others wrap what only this TPM may open.

use crate::ak_file::{self, WrappedKey};
use crate::error::TpmError;
use crate::svid_key::point;
use crate::{Attester, Certified};
use zeroize::Zeroizing;

const MAGIC: &[u8; 8] = b"ambit-wk";

/// P-256 key inside the TPM that agrees on secrets and does nothing else: fixedTPM, fixedParent, sensitiveDataOrigin,
/// userWithAuth, decrypt, below the EK.
#[derive(Clone, Debug)]
pub struct TpmWrapKey {
    attester: Attester,
    key: WrappedKey,
    point: [u8; 65],
}

impl TpmWrapKey {
    pub(crate) fn new(attester: Attester, key: WrappedKey) -> Result<TpmWrapKey, TpmError> {
        let point = point(&key.public).ok_or(TpmError::Malformed { what: "public area of the wrap key" })?;
        Ok(TpmWrapKey { attester, key, point })
    }

    pub(crate) fn read(attester: Attester, bytes: &[u8]) -> Result<TpmWrapKey, TpmError> {
        let malformed = TpmError::Malformed { what: "saved wrap key" };
        TpmWrapKey::new(attester, ak_file::parse(MAGIC, bytes).ok_or(malformed)?)
    }

    /// For its file: of no use outside of this TPM.
    pub fn saved(&self) -> Result<Vec<u8>, TpmError> {
        self.key.encode(MAGIC)
    }

    /// Uncompressed point: 4, x, y.
    pub fn point(&self) -> &[u8; 65] {
        &self.point
    }

    /// The x coordinate of what this key and `point` agree on.
    pub async fn agree(&self, point: [u8; 65]) -> Result<Zeroizing<Vec<u8>>, TpmError> {
        let key = self.key.clone();
        self.attester.operate("agree on a key", move |tpm, due| tpm.agree(&key, &point, due)).await
    }

    /// TPM2_Certify of this key by the AK: proof that it lives in the AK's TPM.
    pub async fn certify(&self, qualifying: [u8; 32]) -> Result<Certified, TpmError> {
        let key = self.key.clone();
        self.attester.operate("certify the key", move |tpm, due| tpm.certify(&key, qualifying, due)).await
    }
}
