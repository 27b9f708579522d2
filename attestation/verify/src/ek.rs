//! EK certificates (TCG EK Credential Profile 2.x): padding, chain, key usage, and that the certificate is of this key.

use crate::public::{Curve, Key, Public};
use crate::{INTERMEDIATES_MAX, OBJECT_BYTES_MAX};
use ambit_model::{Code, Refusal, Stamp};
use rustls_pki_types::{CertificateDer, UnixTime};
use std::time::Duration;
use webpki::{ALL_VERIFICATION_ALGS, EndEntityCert, KeyUsage, anchor_from_trusted_cert};
use x509_parser::prelude::{FromDer, X509Certificate};

/// tcg-kp-EKCertificate, 2.23.133.8.1, as DER content octets.
const EKU_EK_CERTIFICATE: &[u8] = &[0x67, 0x81, 0x05, 0x08, 0x01];
/// Most roots one cluster may name: each costs a chain attempt per `Begin`.
pub const ROOTS_MAX: usize = 256;

const OID_RSA_ENCRYPTION: &str = "1.2.840.113549.1.1.1";
/// Some makers write the EK's padding scheme into the key's algorithm (EK Credential Profile 3.2.11).
const OID_RSAES_OAEP: &str = "1.2.840.113549.1.1.7";
const OID_EC_PUBLIC_KEY: &str = "1.2.840.10045.2.1";
const OID_P256: &str = "1.2.840.10045.3.1.7";
const OID_P384: &str = "1.3.132.0.34";

/// What vouches for an EK. Shown in every attestation result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum EkClass {
    /// A maker of physical or firmware TPMs.
    Hardware,
    /// A hypervisor's TPMs.
    Virtual,
    /// A laboratory's software TPMs: proves the protocol, nothing about a machine.
    Lab,
    /// No certificate: the operator listed this very EK by hand.
    Listed,
}

impl EkClass {
    /// `hardware`, `virtual`, `lab` or `listed`.
    pub fn as_str(self) -> &'static str {
        match self {
            EkClass::Hardware => "hardware",
            EkClass::Virtual => "virtual",
            EkClass::Lab => "lab",
            EkClass::Listed => "listed",
        }
    }

    /// The class with this name.
    pub fn from_text(s: &str) -> Option<EkClass> {
        [EkClass::Hardware, EkClass::Virtual, EkClass::Lab, EkClass::Listed].into_iter().find(|c| c.as_str() == s)
    }

    pub(crate) fn wire(self) -> u8 {
        match self {
            EkClass::Hardware => 1,
            EkClass::Virtual => 2,
            EkClass::Lab => 3,
            EkClass::Listed => 4,
        }
    }

    pub(crate) fn from_wire(n: u8) -> Option<EkClass> {
        [EkClass::Hardware, EkClass::Virtual, EkClass::Lab, EkClass::Listed].into_iter().find(|c| c.wire() == n)
    }
}

/// A root (or an intermediate taken as one) that a cluster trusts to vouch for EKs. None is built in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EkRoot {
    /// The certificate, DER.
    pub der: Vec<u8>,
    /// What kind of TPM it vouches for.
    pub class: EkClass,
}

/// What a cluster knows of EKs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Endorsements {
    /// Trusted roots, at most [`ROOTS_MAX`].
    pub roots: Vec<EkRoot>,
    /// Issuing certificates that nodes need not send. Never trusted by themselves.
    pub intermediates: Vec<Vec<u8>>,
}

/// Whether `der` can serve as an EK root: for the verb that adds one.
pub fn check_root(der: &[u8]) -> Result<(), Refusal> {
    let der = CertificateDer::from(der);
    anchor_from_trusted_cert(&der)
        .map(|_| ())
        .map_err(|e| Refusal::new(Code::EkMalformed, "an X.509 v3 CA certificate (DER)", format!("{e:?}")))
}

/// The class of the root that `certificate` chains to, if it is a good EK certificate of the key in `ek`.
pub(crate) fn judge(
    certificate: &[u8],
    sent: &[Vec<u8>],
    ek: &Public,
    endorsements: &Endorsements,
    now: Stamp,
) -> Result<EkClass, Refusal> {
    let leaf = unpad(certificate)?;
    let (rest, parsed) = X509Certificate::from_der(leaf).map_err(|_| malformed("no X.509 certificate"))?;
    if !rest.is_empty() {
        return Err(malformed("bytes after the certificate"));
    }
    let class = chain(leaf, sent, endorsements, now)?;
    let eku = parsed.extended_key_usage().map_err(|_| malformed("two extended key usages"))?;
    let names_ek = eku.is_some_and(|e| e.value.other.iter().any(|oid| oid.as_bytes() == EKU_EK_CERTIFICATE));
    if !names_ek {
        let expected = "extended key usage 2.23.133.8.1 (EK certificate)";
        return Err(Refusal::new(Code::EkChainUntrusted, expected, "a certificate for another use"));
    }
    same_key(&parsed, ek)?;
    Ok(class)
}

fn malformed(found: &str) -> Refusal {
    Refusal::new(Code::EkMalformed, "an EK certificate in DER", found)
}

/// NV indices are often larger than the certificate: makers fill up with 0x00 or 0xFF. Cut that off and only that.
fn unpad(bytes: &[u8]) -> Result<&[u8], Refusal> {
    let header = |n: usize, len: usize| n.checked_add(len);
    let whole = match bytes {
        [0x30, 0x82, high, low, ..] => header(4, usize::from(u16::from_be_bytes([*high, *low]))),
        [0x30, 0x81, n, ..] => header(3, usize::from(*n)),
        _ => None,
    };
    let (der, padding) =
        whole.and_then(|n| bytes.split_at_checked(n)).ok_or_else(|| malformed("no whole DER sequence"))?;
    if padding.iter().all(|b| *b == 0) || padding.iter().all(|b| *b == 0xff) {
        Ok(der)
    } else {
        Err(malformed("bytes after the certificate that are no padding"))
    }
}

fn chain(leaf: &[u8], sent: &[Vec<u8>], endorsements: &Endorsements, now: Stamp) -> Result<EkClass, Refusal> {
    let leaf = CertificateDer::from(leaf);
    let end_entity = EndEntityCert::try_from(&leaf).map_err(|e| malformed(&format!("{e:?}")))?;
    let intermediates: Vec<CertificateDer<'_>> = sent
        .iter()
        .take(INTERMEDIATES_MAX)
        .chain(&endorsements.intermediates)
        .filter(|der| der.len() <= OBJECT_BYTES_MAX)
        .map(|der| CertificateDer::from(der.as_slice()))
        .collect();
    let time = UnixTime::since_unix_epoch(Duration::from_millis(now.0));
    let roots: Vec<(CertificateDer<'_>, EkClass)> = endorsements
        .roots
        .iter()
        .take(ROOTS_MAX)
        .map(|root| (CertificateDer::from(root.der.as_slice()), root.class))
        .collect();
    let (anchors, classes): (Vec<_>, Vec<_>) =
        roots.iter().filter_map(|(der, class)| Some((anchor_from_trusted_cert(der).ok()?, *class))).unzip();
    // One search for all roots: webpki bounds what a search may cost, and one for each root multiplied that bound by the
    // number of roots. CAs carry no extended key usage, hence "if present" here and the leaf's own check in `judge`.
    let usage = KeyUsage::required_if_present(EKU_EK_CERTIFICATE);
    let path = end_entity
        .verify_for_usage(ALL_VERIFICATION_ALGS, &anchors, &intermediates, time, usage, None, None)
        .map_err(|e| untrusted(format!("{e:?}")))?;
    let root = anchors.iter().position(|anchor| anchor == path.anchor());
    root.and_then(|n| classes.get(n).copied()).ok_or_else(|| untrusted("a path to no root".into()))
}

fn untrusted(found: String) -> Refusal {
    Refusal::new(Code::EkChainUntrusted, "a chain to one of the cluster's EK roots", found)
}

/// The certificate's key must be the key that the credential will be made for (CVE-2021-3406).
fn same_key(certificate: &X509Certificate<'_>, ek: &Public) -> Result<(), Refusal> {
    let spki = &certificate.tbs_certificate.subject_pki;
    let algorithm = spki.algorithm.algorithm.to_id_string();
    let curve = spki.algorithm.parameters.as_ref().and_then(|p| p.as_oid().ok()).map(|oid| oid.to_id_string());
    let kind = match ek.key() {
        Key::Rsa { .. } => algorithm == OID_RSA_ENCRYPTION || algorithm == OID_RSAES_OAEP,
        Key::Ec { curve: Curve::P256, .. } => algorithm == OID_EC_PUBLIC_KEY && curve.as_deref() == Some(OID_P256),
        Key::Ec { curve: Curve::P384, .. } => algorithm == OID_EC_PUBLIC_KEY && curve.as_deref() == Some(OID_P384),
        Key::Ec { .. } => false,
    };
    if kind && spki.subject_public_key.data.as_ref() == ek.key_bits().as_slice() {
        Ok(())
    } else {
        Err(Refusal::new(Code::EkMismatch, "a certificate of the EK public sent", "a certificate of another key"))
    }
}
