//! Keys for SVIDs that never leave the TPM.

use crate::ak_file::WrappedKey;
use crate::error::TpmError;
use crate::{Attester, Certified};

/// P-256 key of an SVID inside the TPM: fixedTPM, fixedParent, sensitiveDataOrigin, userWithAuth, sign, below the EK.
///
/// Only this handle holds its wrapped half: nothing of it is on disk, and once the handle is gone so is the key. One
/// signature takes a hardware TPM a fifth of a second and more, so this fits a node's few connections to its cell, not
/// the many of its workloads.
#[derive(Clone, Debug)]
pub struct TpmKey {
    attester: Attester,
    key: WrappedKey,
    point: [u8; 65],
}

/// DER of a P-256 SubjectPublicKeyInfo up to its point (RFC 5480 2).
const SPKI_HEAD: [u8; 26] = [
    0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce,
    0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00,
];

impl TpmKey {
    pub(crate) fn new(attester: Attester, key: WrappedKey) -> Result<TpmKey, TpmError> {
        let point = point(&key.public).ok_or(TpmError::Malformed { what: "public area of the new key" })?;
        Ok(TpmKey { attester, key, point })
    }

    /// TPMT_PUBLIC.
    pub fn public(&self) -> &[u8] {
        &self.key.public
    }

    /// Uncompressed point: 4, x, y.
    pub fn point(&self) -> &[u8; 65] {
        &self.point
    }

    /// SubjectPublicKeyInfo (DER).
    pub fn spki_der(&self) -> Vec<u8> {
        [SPKI_HEAD.as_slice(), &self.point].concat()
    }

    /// TPM2_Certify of this key by the AK: proof that it lives in the AK's TPM.
    pub async fn certify(&self, qualifying: [u8; 32]) -> Result<Certified, TpmError> {
        let key = self.key.clone();
        self.attester.operate("certify the key", move |tpm, due| tpm.certify(&key, qualifying, due)).await
    }

    /// ECDSA signature (DER, RFC 3279 2.2.3) over a SHA-256 digest.
    pub async fn sign(&self, digest: [u8; 32]) -> Result<Vec<u8>, TpmError> {
        let key = self.key.clone();
        let (r, s) = self.attester.operate("sign", move |tpm, due| tpm.sign(&key, digest, due)).await?;
        Ok(ecdsa_der(&r, &s))
    }

    /// [`TpmKey::sign`] for code that cannot await, such as a TLS stack's signing hook. It blocks the thread until the
    /// TPM has signed, at most for the operation's deadline: keep it off threads that others wait for.
    pub fn sign_blocking(&self, digest: [u8; 32]) -> Result<Vec<u8>, TpmError> {
        let key = self.key.clone();
        let (r, s) = self.attester.operate_blocking("sign", move |tpm, due| tpm.sign(&key, digest, due))?;
        Ok(ecdsa_der(&r, &s))
    }
}

/// The point at the end of a P-256 TPMT_PUBLIC: x and y, each a TPM2B of at most 32 bytes.
pub(crate) fn point(public: &[u8]) -> Option<[u8; 65]> {
    use tss_esapi::structures::Public;
    use tss_esapi::traits::UnMarshall;
    let Public::Ecc { unique, .. } = Public::unmarshall(public).ok()? else { return None };
    let mut out = [0u8; 65];
    let (tag, coordinates) = out.split_first_mut()?;
    *tag = 4;
    for (place, value) in coordinates.chunks_exact_mut(32).zip([unique.x().value(), unique.y().value()]) {
        // TPMs may strip leading zeros.
        let at = place.len().checked_sub(value.len())?;
        place.get_mut(at..)?.copy_from_slice(value);
    }
    Some(out)
}

/// SEQUENCE of two INTEGERs. All lengths stay below 128 for P-256.
fn ecdsa_der(r: &[u8], s: &[u8]) -> Vec<u8> {
    let mut both = Vec::with_capacity(70);
    for number in [r, s] {
        let digits: Vec<u8> = number.iter().copied().skip_while(|b| *b == 0).collect();
        let sign = digits.first().is_none_or(|b| b & 0x80 != 0);
        let length = digits.len() + usize::from(sign);
        both.extend([0x02, u8::try_from(length).unwrap_or(u8::MAX)]);
        both.extend(sign.then_some(0));
        both.extend(digits);
    }
    let mut out = vec![0x30, u8::try_from(both.len()).unwrap_or(u8::MAX)];
    out.extend(both);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_are_in_their_shortest_form() {
        let check = |r: &[u8], s: &[u8], hex: &str| {
            let text: String = ecdsa_der(r, s).iter().map(|b| format!("{b:02x}")).collect();
            assert_eq!(text, hex);
        };
        check(&[1], &[0x80], "300702010102020080");
        check(&[0, 0, 0x7f], &[0xff, 0], "300802017f020300ff00");
        check(&[0], &[], "3006020100020100");
    }
}
