//! A maker of software TPMs: a root, an issuing CA under it, and EK certificates as the TCG's profile has them.

use anyhow::Result;
use rcgen::{
    BasicConstraints, CertificateParams, CustomExtension, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384, PKCS_RSA_SHA256, RsaKeySize,
    SubjectPublicKeyInfo,
};

/// Keys of the CAs; makers sign RSA EKs with RSA and elliptic ones with ECDSA.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CaKind {
    Rsa2048,
    P256,
    P384,
}

/// Root and issuing CA.
pub struct Maker {
    pub root: Vec<u8>,
    /// Sent with each EK certificate, as agents send what they find in NV.
    pub intermediate: Vec<u8>,
    issuer: Issuer<'static, KeyPair>,
}

impl Maker {
    pub fn new(kind: CaKind) -> Result<Maker> {
        let key = || match kind {
            CaKind::Rsa2048 => KeyPair::generate_rsa_for(&PKCS_RSA_SHA256, RsaKeySize::_2048),
            CaKind::P256 => KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256),
            CaKind::P384 => KeyPair::generate_for(&PKCS_ECDSA_P384_SHA384),
        };
        let (root_key, issuing_key) = (key()?, key()?);
        let root_params = authority("Ambit bench EK root");
        let root = root_params.self_signed(&root_key)?;
        let issuing_params = authority("Ambit bench EK issuing CA");
        let intermediate = issuing_params.signed_by(&issuing_key, &Issuer::new(root_params, root_key))?;
        let issuer = Issuer::new(issuing_params, issuing_key);
        Ok(Maker { root: root.der().to_vec(), intermediate: intermediate.der().to_vec(), issuer })
    }

    /// An EK certificate (TCG EK Credential Profile 2.5, 3.2): empty subject, maker and model in a critical SAN.
    pub fn certify(&self, spki: &[u8]) -> Result<Vec<u8>> {
        let mut params = CertificateParams::new(vec![])?;
        params.distinguished_name = DistinguishedName::new();
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::Other(vec![2, 23, 133, 8, 1])];
        params.use_authority_key_identifier_extension = true;
        let names = [attribute(1, "id:414D4254"), attribute(2, "bench"), attribute(3, "id:00010000")].concat();
        let san = der(0x30, &der(0xa4, &der(0x30, &names)));
        let mut san = CustomExtension::from_oid_content(&[2, 5, 29, 17], san);
        san.set_criticality(true);
        params.custom_extensions = vec![san];
        Ok(params.signed_by(&SubjectPublicKeyInfo::from_der(spki)?, &self.issuer)?.der().to_vec())
    }
}

fn authority(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

/// One relative name of type 2.23.133.2.`last`.
fn attribute(last: u8, text: &str) -> Vec<u8> {
    let oid = der(0x06, &[0x67, 0x81, 0x05, 0x02, last]);
    der(0x31, &der(0x30, &[oid, der(0x0c, text.as_bytes())].concat()))
}

/// A DER element of less than 128 bytes.
fn der(tag: u8, content: &[u8]) -> Vec<u8> {
    [&[tag, u8::try_from(content.len()).unwrap_or(u8::MAX)][..], content].concat()
}
