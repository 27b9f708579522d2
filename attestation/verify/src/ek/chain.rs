//! From an EK certificate to one of a cluster's roots.

use super::{EkClass, Endorsements, ROOTS_MAX};
use crate::hash::sha256;
use crate::{INTERMEDIATES_MAX, OBJECT_BYTES_MAX};
use ambit_model::{Code, Refusal, Stamp};
use rustls_pki_types::{
    AlgorithmIdentifier, CertificateDer, InvalidSignature, SignatureVerificationAlgorithm, UnixTime,
};
use std::time::Duration;
use webpki::{ALL_VERIFICATION_ALGS, EndEntityCert, KeyUsage, anchor_from_trusted_cert};

/// The root that vouches for an EK.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Anchor {
    pub(super) class: EkClass,
    pub(super) sha256: [u8; 32],
}

/// What a maker signed, where that is not the DER of its meaning.
#[derive(Debug)]
pub(super) struct Signed<'a> {
    pub(super) tbs_der: &'a [u8],
    pub(super) tbs_signed: &'a [u8],
}

/// Builds and checks a path (RFC 5280, section 6). `signed` stands in for the leaf's own octets in one signature only.
pub(super) fn verify(
    leaf: &[u8],
    signed: Option<&Signed<'_>>,
    sent: &[Vec<u8>],
    endorsements: &Endorsements,
    now: Stamp,
) -> Result<Anchor, Refusal> {
    let leaf = CertificateDer::from(leaf);
    let end_entity = EndEntityCert::try_from(&leaf).map_err(|e| super::malformed(&format!("{e:?}")))?;
    let intermediates: Vec<CertificateDer<'_>> = sent
        .iter()
        .take(INTERMEDIATES_MAX)
        .chain(&endorsements.intermediates)
        .filter(|der| der.len() <= OBJECT_BYTES_MAX)
        .map(|der| CertificateDer::from(der.as_slice()))
        .collect();
    let standing_in: Vec<OverSigned<'_>> = match signed {
        Some(signed) => ALL_VERIFICATION_ALGS.iter().map(|inner| OverSigned { inner: *inner, signed }).collect(),
        None => vec![],
    };
    let standing_in: Vec<&dyn SignatureVerificationAlgorithm> =
        standing_in.iter().map(|a| a as &dyn SignatureVerificationAlgorithm).collect();
    let algorithms = if signed.is_some() { standing_in.as_slice() } else { ALL_VERIFICATION_ALGS };
    let time = UnixTime::since_unix_epoch(Duration::from_millis(now.0));
    let ders: Vec<CertificateDer<'_>> =
        endorsements.roots.iter().take(ROOTS_MAX).map(|root| CertificateDer::from(root.der.as_slice())).collect();
    let usable = ders.iter().zip(&endorsements.roots);
    let (anchors, roots): (Vec<_>, Vec<_>) =
        usable.filter_map(|(der, root)| Some((anchor_from_trusted_cert(der).ok()?, root))).unzip();
    // One search for all roots: webpki bounds what a search may cost, and one for each root multiplied that bound by the
    // number of roots. CAs carry no extended key usage, hence "if present" here and the leaf's own check in the caller.
    let usage = KeyUsage::required_if_present(super::EKU_EK_CERTIFICATE);
    let untrusted =
        |found: String| Refusal::new(Code::EkChainUntrusted, "a chain to one of the cluster's EK roots", found);
    let path = end_entity
        .verify_for_usage(algorithms, &anchors, &intermediates, time, usage, None, None)
        .map_err(|e| untrusted(format!("{e:?}")))?;
    let at = anchors.iter().position(|anchor| anchor == path.anchor());
    let root = at.and_then(|n| roots.get(n)).ok_or_else(|| untrusted("a path to no root".into()))?;
    Ok(Anchor { class: root.class, sha256: sha256(&root.der) })
}

/// An algorithm that verifies the leaf's signature over what was signed, and every other one as it is.
#[derive(Debug)]
struct OverSigned<'a> {
    inner: &'static dyn SignatureVerificationAlgorithm,
    signed: &'a Signed<'a>,
}

impl SignatureVerificationAlgorithm for OverSigned<'_> {
    fn verify_signature(&self, public_key: &[u8], message: &[u8], signature: &[u8]) -> Result<(), InvalidSignature> {
        let message = if message == self.signed.tbs_der { self.signed.tbs_signed } else { message };
        self.inner.verify_signature(public_key, message, signature)
    }
    fn public_key_alg_id(&self) -> AlgorithmIdentifier {
        self.inner.public_key_alg_id()
    }
    fn signature_alg_id(&self) -> AlgorithmIdentifier {
        self.inner.signature_alg_id()
    }
}
