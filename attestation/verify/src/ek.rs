//! EK certificates (TCG EK Credential Profile 2.x): padding, quirks, chain, key usage, who made the TPM, and that the
//! certificate is of this key.
//!
//! Certificates on real TPMs break the standards in many ways. What is only odd is read and told ([`Quirk`]); what a
//! certificate must prove (a chain, its use, that it is no CA, the very key) is never taken more lightly for it.

mod ber;
mod chain;
pub mod deny;
pub mod list;
mod make;
pub(crate) mod roca;

pub use deny::{EkDenyRule, FirmwareMatch, Match};
pub use make::EkMake;
pub(crate) use make::NAME_BYTES_MAX;

use crate::public::{Curve, Key, Public};
use ambit_model::{Code, Refusal, Stamp};
use rustls_pki_types::CertificateDer;
use std::borrow::Cow;
use std::fmt;
use webpki::{EndEntityCert, anchor_from_trusted_cert};
use x509_parser::extensions::ParsedExtension;
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
    /// TPMs that are refused whatever vouches for them.
    pub denied: Vec<EkDenyRule>,
}

/// How a certificate departs from the standards without proving less by it. For the log of whoever judges it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Quirk {
    /// Filled up to the size of its NV index.
    Padded,
    /// Not DER: lengths, truth values or integers in another form of BER.
    NotDer,
    /// A serial number that is zero, negative or longer than 20 octets (RFC 5280, 4.1.2.2).
    OddSerial,
    /// No authority key identifier (RFC 5280, 4.2.1.1).
    NoAuthorityKeyIdentifier,
    /// The key's algorithm names a padding: id-RSAES-OAEP (EK Credential Profile 3.2.11).
    KeyForOaep,
    /// The modulus lacks the zero octet that makes it positive, or has one too many.
    OddModulus,
}

impl fmt::Display for Quirk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Quirk::Padded => "padded",
            Quirk::NotDer => "not DER",
            Quirk::OddSerial => "odd serial number",
            Quirk::NoAuthorityKeyIdentifier => "no authority key identifier",
            Quirk::KeyForOaep => "key for RSAES-OAEP",
            Quirk::OddModulus => "odd modulus",
        })
    }
}

/// What a good EK certificate says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Vouched {
    pub(crate) class: EkClass,
    pub(crate) root_sha256: [u8; 32],
    pub(crate) make: EkMake,
    pub(crate) quirks: Vec<Quirk>,
}

/// Whether `der` can serve as an EK root: for the verb that adds one.
pub fn check_root(der: &[u8]) -> Result<(), Refusal> {
    let der = CertificateDer::from(der);
    anchor_from_trusted_cert(&der)
        .map(|_| ())
        .map_err(|e| Refusal::new(Code::EkMalformed, "an X.509 v3 CA certificate (DER)", format!("{e:?}")))
}

/// What `certificate` vouches for, if it is a good EK certificate of the key in `ek`.
pub(crate) fn judge(
    certificate: &[u8],
    sent: &[Vec<u8>],
    ek: &Public,
    endorsements: &Endorsements,
    now: Stamp,
) -> Result<Vouched, Refusal> {
    let mut quirks = Vec::new();
    let bytes = unpad(certificate, &mut quirks)?;
    let leaf = Leaf::read(bytes, &mut quirks)?;
    let parsed = leaf.parse().ok_or_else(|| malformed("no X.509 certificate"))?;
    let anchor = chain::verify(&leaf.der, leaf.signed().as_ref(), sent, endorsements, now)?;
    let eku = parsed.extended_key_usage().map_err(|_| malformed("two extended key usages"))?;
    let names_ek = eku.is_some_and(|e| e.value.other.iter().any(|oid| oid.as_bytes() == EKU_EK_CERTIFICATE));
    if !names_ek {
        let expected = "extended key usage 2.23.133.8.1 (EK certificate)";
        return Err(Refusal::new(Code::EkChainUntrusted, expected, "a certificate for another use"));
    }
    same_key(&parsed, ek, &mut quirks)?;
    oddities(&parsed, &mut quirks);
    Ok(Vouched { class: anchor.class, root_sha256: anchor.sha256, make: EkMake::of(&parsed), quirks })
}

fn malformed(found: &str) -> Refusal {
    Refusal::new(Code::EkMalformed, "an EK certificate in DER", found)
}

/// NV indices are often larger than the certificate: makers fill up with 0x00 or 0xFF. Cut that off and only that.
fn unpad<'a>(bytes: &'a [u8], quirks: &mut Vec<Quirk>) -> Result<&'a [u8], Refusal> {
    let (certificate, padding) =
        ber::element(bytes).filter(|(e, _)| e.tag == 0x30).ok_or_else(|| malformed("no whole sequence"))?;
    if !padding.is_empty() {
        quirks.push(Quirk::Padded);
    }
    if padding.iter().all(|b| *b == 0) || padding.iter().all(|b| *b == 0xff) {
        Ok(certificate.whole)
    } else {
        Err(malformed("bytes after the certificate that are no padding"))
    }
}

/// The certificate in DER, which the strict parsers read; written anew where it was not.
struct Leaf<'a> {
    der: Cow<'a, [u8]>,
    reencoded: Option<ber::Reencoded>,
}

impl<'a> Leaf<'a> {
    fn read(bytes: &'a [u8], quirks: &mut Vec<Quirk>) -> Result<Leaf<'a>, Refusal> {
        let strict = Leaf { der: Cow::Borrowed(bytes), reencoded: None };
        if strict.is_readable() {
            return Ok(strict);
        }
        let reencoded = ber::reencode(bytes).ok_or_else(|| malformed("no X.509 certificate in BER either"))?;
        let leaf = Leaf { der: Cow::Owned(reencoded.der.clone()), reencoded: Some(reencoded) };
        if !leaf.is_readable() {
            return Err(malformed("no X.509 certificate"));
        }
        quirks.push(Quirk::NotDer);
        Ok(leaf)
    }

    fn is_readable(&self) -> bool {
        EndEntityCert::try_from(&CertificateDer::from(&*self.der)).is_ok() && self.parse().is_some()
    }

    fn parse(&self) -> Option<X509Certificate<'_>> {
        let (rest, parsed) = X509Certificate::from_der(&self.der).ok()?;
        rest.is_empty().then_some(parsed)
    }

    fn signed(&self) -> Option<chain::Signed<'_>> {
        self.reencoded.as_ref().map(|r| chain::Signed { tbs_der: &r.tbs_der, tbs_signed: &r.tbs_signed })
    }
}

/// The certificate's key must be the key that the credential will be made for (CVE-2021-3406).
fn same_key(certificate: &X509Certificate<'_>, ek: &Public, quirks: &mut Vec<Quirk>) -> Result<(), Refusal> {
    let spki = &certificate.tbs_certificate.subject_pki;
    let algorithm = spki.algorithm.algorithm.to_id_string();
    let curve = spki.algorithm.parameters.as_ref().and_then(|p| p.as_oid().ok()).map(|oid| oid.to_id_string());
    let kind = match ek.key() {
        Key::Rsa { .. } => algorithm == OID_RSA_ENCRYPTION || algorithm == OID_RSAES_OAEP,
        Key::Ec { curve: Curve::P256, .. } => algorithm == OID_EC_PUBLIC_KEY && curve.as_deref() == Some(OID_P256),
        Key::Ec { curve: Curve::P384, .. } => algorithm == OID_EC_PUBLIC_KEY && curve.as_deref() == Some(OID_P384),
        Key::Ec { .. } => false,
    };
    let bits = spki.subject_public_key.data.as_ref();
    let exactly = bits == ek.key_bits().as_slice();
    if !kind || !(exactly || same_numbers(bits, ek.key())) {
        return Err(Refusal::new(
            Code::EkMismatch,
            "a certificate of the EK public sent",
            "a certificate of another key",
        ));
    }
    if !exactly {
        quirks.push(Quirk::OddModulus);
    }
    if algorithm == OID_RSAES_OAEP {
        quirks.push(Quirk::KeyForOaep);
    }
    Ok(())
}

/// Whether an RSAPublicKey holds the very modulus and exponent, each read as a number without a sign.
fn same_numbers(bits: &[u8], ek: &Key) -> bool {
    let Key::Rsa { modulus, exponent } = ek else { return false };
    let Some((sequence, [])) = ber::element(bits) else { return false };
    let Some(numbers) = ber::children(sequence.content) else { return false };
    let [n, e] = numbers.as_slice() else { return false };
    let unsigned = |bytes: &[u8]| bytes.iter().skip_while(|b| **b == 0).copied().collect::<Vec<_>>();
    (sequence.tag, n.tag, e.tag) == (0x30, 0x02, 0x02)
        && unsigned(n.content) == *modulus
        && unsigned(e.content) == unsigned(&exponent.to_be_bytes())
}

fn oddities(certificate: &X509Certificate<'_>, quirks: &mut Vec<Quirk>) {
    let serial = certificate.raw_serial();
    let positive = serial.first().is_some_and(|b| b & 0x80 == 0) && serial.iter().any(|b| *b != 0);
    if !positive || serial.len() > 20 {
        quirks.push(Quirk::OddSerial);
    }
    let is_aki = |e: &ParsedExtension<'_>| matches!(e, ParsedExtension::AuthorityKeyIdentifier(_));
    if !certificate.extensions().iter().any(|e| is_aki(e.parsed_extension())) {
        quirks.push(Quirk::NoAuthorityKeyIdentifier);
    }
}

#[cfg(test)]
mod tests;
