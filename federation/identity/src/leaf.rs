//! A leaf as DER, written out: of what is in it only names, numbers, times and keys differ from one to the next, and a
//! general builder that takes its issuer's certificate apart each time costs half as much as the signature.
//!
//! The fields are those of X509-SVID.md and RFC 5280 4.1 in the order in which rcgen writes them; a test compares the two.

use ambit_model::{Code, DnsName, Generation, Lifetime, NodeId, Refusal, SpiffeId, Stamp, serial_number};
use time::OffsetDateTime;

const SEQUENCE: u8 = 0x30;
const INTEGER: u8 = 0x02;
const OCTETS: u8 = 0x04;
/// ecdsa-with-SHA256 (RFC 5758 3.2), as an AlgorithmIdentifier.
pub(crate) const ECDSA_SHA256: &[u8] = &[0x30, 0x0a, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x02];
/// Version 3.
const VERSION: &[u8] = &[0xa0, 0x03, 0x02, 0x01, 0x02];
/// An empty name: the identity is the SPIFFE ID (X509-SVID 2).
const NO_NAME: &[u8] = &[0x30, 0x00];
/// KeyUsage, critical: digitalSignature (X509-SVID 4.3).
const KEY_USAGE: &[u8] =
    &[0x30, 0x0e, 0x06, 0x03, 0x55, 0x1d, 0x0f, 0x01, 0x01, 0xff, 0x04, 0x04, 0x03, 0x02, 0x07, 0x80];
/// ExtendedKeyUsage: serverAuth and clientAuth (X509-SVID 4.4).
const EXTENDED_KEY_USAGE: &[u8] = &[
    0x30, 0x1d, 0x06, 0x03, 0x55, 0x1d, 0x25, 0x04, 0x16, 0x30, 0x14, 0x06, 0x08, 0x2b, 0x06, 0x01, 0x05, 0x05, 0x07,
    0x03, 0x01, 0x06, 0x08, 0x2b, 0x06, 0x01, 0x05, 0x05, 0x07, 0x03, 0x02,
];
/// BasicConstraints, critical: no authority.
const NO_CA: &[u8] = &[0x30, 0x0c, 0x06, 0x03, 0x55, 0x1d, 0x13, 0x01, 0x01, 0xff, 0x04, 0x02, 0x30, 0x00];
/// SubjectAltName, critical because the subject is empty (RFC 5280 4.2.1.6).
const SAN: &[u8] = &[0x06, 0x03, 0x55, 0x1d, 0x11, 0x01, 0x01, 0xff];
const AUTHORITY_KEY: &[u8] = &[0x06, 0x03, 0x55, 0x1d, 0x23];
const SUBJECT_KEY: &[u8] = &[0x06, 0x03, 0x55, 0x1d, 0x0e];
/// [`crate::authority::NODE_BINDING_OID`], DER.
const NODE_BINDING: &[u8] = &[0x06, 0x0a, 0x2b, 0x06, 0x01, 0x04, 0x01, 0x83, 0xe4, 0x2f, 0x01, 0x01];

/// What is in a leaf.
pub(crate) struct Leaf<'a> {
    pub(crate) serial: &'a [u8; 16],
    /// The issuer's subject, DER.
    pub(crate) issuer: &'a [u8],
    /// The issuer's key identifier.
    pub(crate) authority_key: &'a [u8],
    pub(crate) lifetime: Lifetime,
    pub(crate) id: &'a SpiffeId,
    pub(crate) dns_names: &'a [DnsName],
    /// SubjectPublicKeyInfo, DER.
    pub(crate) spki: &'a [u8],
    /// Its key identifier.
    pub(crate) subject_key: &'a [u8],
    pub(crate) binding: Option<(NodeId, Generation, u64)>,
}

impl Leaf<'_> {
    /// The TBSCertificate, which is signed.
    pub(crate) fn to_be_signed(&self) -> Result<Vec<u8>, Refusal> {
        let mut body = Vec::with_capacity(768);
        body.extend(VERSION);
        integer(&mut body, self.serial);
        body.extend(ECDSA_SHA256);
        body.extend(self.issuer);
        let mut times = Vec::with_capacity(34);
        date(&mut times, self.lifetime.not_before)?;
        date(&mut times, self.lifetime.not_after)?;
        tlv(&mut body, SEQUENCE, &times);
        body.extend(NO_NAME);
        body.extend(self.spki);
        let extensions = self.extensions();
        let mut sequence = Vec::with_capacity(extensions.len() + 4);
        tlv(&mut sequence, SEQUENCE, &extensions);
        tlv(&mut body, 0xa3, &sequence);
        let mut out = Vec::with_capacity(body.len() + 4);
        tlv(&mut out, SEQUENCE, &body);
        Ok(out)
    }

    fn extensions(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(512);
        // AuthorityKeyIdentifier holds the key identifier alone, as [0].
        let mut key = Vec::with_capacity(24);
        tlv(&mut key, 0x80, self.authority_key);
        let mut content = Vec::with_capacity(24);
        tlv(&mut content, SEQUENCE, &key);
        extension(&mut out, AUTHORITY_KEY, &content);
        let mut names = Vec::with_capacity(256);
        tlv(&mut names, 0x86, self.id.as_str().as_bytes());
        for name in self.dns_names {
            tlv(&mut names, 0x82, name.as_str().as_bytes());
        }
        let mut content = Vec::with_capacity(names.len() + 4);
        tlv(&mut content, SEQUENCE, &names);
        extension(&mut out, SAN, &content);
        out.extend(KEY_USAGE);
        out.extend(EXTENDED_KEY_USAGE);
        let mut content = Vec::with_capacity(22);
        tlv(&mut content, OCTETS, self.subject_key);
        extension(&mut out, SUBJECT_KEY, &content);
        out.extend(NO_CA);
        if let Some((node, generation, epoch)) = self.binding {
            let mut parts = Vec::with_capacity(54);
            tlv(&mut parts, OCTETS, &node.0);
            tlv(&mut parts, OCTETS, &generation.0.to_be_bytes());
            tlv(&mut parts, OCTETS, &epoch.to_be_bytes());
            let mut content = Vec::with_capacity(56);
            tlv(&mut content, SEQUENCE, &parts);
            extension(&mut out, NODE_BINDING, &content);
        }
        out
    }
}

/// The certificate of what was signed.
pub(crate) fn certificate(to_be_signed: &[u8], signature: &[u8]) -> Vec<u8> {
    let mut body = Vec::with_capacity(to_be_signed.len() + 96);
    body.extend(to_be_signed);
    body.extend(ECDSA_SHA256);
    let mut bits = Vec::with_capacity(signature.len() + 1);
    bits.push(0);
    bits.extend(signature);
    tlv(&mut body, 0x03, &bits);
    let mut out = Vec::with_capacity(body.len() + 4);
    tlv(&mut out, SEQUENCE, &body);
    out
}

/// One element: tag, length in its shortest form (X.690 10.1), content. No content here is longer than a message.
pub(crate) fn tlv(out: &mut Vec<u8>, tag: u8, content: &[u8]) {
    out.push(tag);
    let length = content.len().to_be_bytes();
    match content.len() {
        short @ 0..=0x7f => out.push(short as u8),
        _ => {
            let bytes = length.iter().skip_while(|byte| **byte == 0);
            out.push(0x80 | bytes.clone().count() as u8);
            out.extend(bytes);
        }
    }
    out.extend(content);
}

/// A number that is not negative, big-endian: in the fewest bytes, with a zero before a first bit that is set (X.690 8.3).
pub(crate) fn integer(out: &mut Vec<u8>, number: &[u8]) {
    let number = serial_number(number);
    let sign = number.first().is_none_or(|first| *first >= 0x80).then_some(0);
    tlv(out, INTEGER, &sign.into_iter().chain(number.iter().copied()).collect::<Vec<_>>());
}

/// `head` is the OID, with `critical` where it is.
pub(crate) fn extension(out: &mut Vec<u8>, head: &[u8], value: &[u8]) {
    let mut content = Vec::with_capacity(head.len() + value.len() + 4);
    content.extend(head);
    tlv(&mut content, OCTETS, value);
    tlv(out, SEQUENCE, &content);
}

/// UTCTime to 2049, GeneralizedTime from 2050 on (RFC 5280 4.1.2.5), in whole seconds.
pub(crate) fn date(out: &mut Vec<u8>, stamp: Stamp) -> Result<(), Refusal> {
    let bad = || Refusal::new(Code::Internal, "a time of this calendar", stamp.0.to_string());
    let seconds = i64::try_from(stamp.0 / 1000).map_err(|_| bad())?;
    let at = OffsetDateTime::from_unix_timestamp(seconds).map_err(|_| bad())?;
    let (tag, year) = match at.year() {
        year @ 1950..=2049 => (0x17, format!("{:02}", year % 100)),
        year @ 2050..=9999 => (0x18, format!("{year:04}")),
        _ => return Err(bad()),
    };
    let (month, day) = (u8::from(at.month()), at.day());
    let text = format!("{year}{month:02}{day:02}{:02}{:02}{:02}Z", at.hour(), at.minute(), at.second());
    tlv(out, tag, text.as_bytes());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{
        CertificateParams, CustomExtension, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
        KeyIdMethod, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType, SerialNumber,
    };
    use x509_parser::prelude::{FromDer, X509Certificate};

    /// What rcgen makes of the same.
    fn theirs(leaf: &Leaf<'_>, key: &KeyPair, issuer: &Issuer<'_, KeyPair>) -> Vec<u8> {
        let mut params = CertificateParams::default();
        let date = |stamp: Stamp| OffsetDateTime::from_unix_timestamp((stamp.0 / 1000) as i64).unwrap();
        (params.not_before, params.not_after) = (date(leaf.lifetime.not_before), date(leaf.lifetime.not_after));
        params.serial_number = Some(SerialNumber::from_slice(leaf.serial));
        params.use_authority_key_identifier_extension = true;
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(leaf.id.as_str().try_into().unwrap())];
        let names = leaf.dns_names.iter().map(|name| SanType::DnsName(name.as_str().try_into().unwrap()));
        params.subject_alt_names.extend(names);
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.key_identifier_method = KeyIdMethod::PreSpecified(leaf.subject_key.to_vec());
        if let Some((node, generation, epoch)) = leaf.binding {
            let mut parts = vec![0x30, 54, 0x04, 32];
            parts.extend(node.0);
            parts.extend([0x04, 8]);
            parts.extend(generation.0.to_be_bytes());
            parts.extend([0x04, 8]);
            parts.extend(epoch.to_be_bytes());
            let oid = crate::authority::NODE_BINDING_OID;
            params.custom_extensions.push(CustomExtension::from_oid_content(oid, parts));
        }
        params.signed_by(key, issuer).unwrap().der().to_vec()
    }

    fn issuer() -> (Issuer<'static, KeyPair>, Vec<u8>) {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "west replica 1");
        params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Constrained(0));
        params.key_identifier_method = KeyIdMethod::PreSpecified(vec![9; 20]);
        let cert = params.self_signed(&key).unwrap();
        let (_, read) = X509Certificate::from_der(cert.der()).unwrap();
        let name = read.subject().as_raw().to_vec();
        (Issuer::from_ca_cert_der(cert.der(), key).unwrap(), name)
    }

    #[test]
    fn a_leaf_is_byte_for_byte_what_another_builder_makes_of_it() {
        let (issuer, name) = issuer();
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        let spki = key.subject_public_key_info();
        let long = format!("spiffe://west/{}", "a/".repeat(900) + "a");
        let names: Vec<DnsName> = ["web.example", "*.web.example"].map(|name| name.parse().unwrap()).to_vec();
        let many: Vec<DnsName> = (0..16).map(|n| format!("name-{n}.example").parse().unwrap()).collect();
        let years = [1_800_000_000u64, 2_524_607_999, 2_524_608_000, 4_102_444_800];
        for (n, end) in years.into_iter().enumerate() {
            for id in ["spiffe://west/a", long.as_str()] {
                for dns_names in [&[][..], &names, &many] {
                    for binding in [None, Some((NodeId([n as u8; 32]), Generation(n as u64), u64::MAX))] {
                        let mut serial = [0xff; 16];
                        serial[0] = [0x40, 0x80, 0xff, 0x00][n];
                        let not_after = Stamp(end * 1000);
                        let leaf = Leaf {
                            serial: &serial,
                            issuer: &name,
                            authority_key: &[9; 20],
                            lifetime: Lifetime { not_before: not_after.minus_ms(1_000), not_after },
                            id: &id.parse().unwrap(),
                            dns_names,
                            spki: &spki,
                            subject_key: &[3; 20],
                            binding,
                        };
                        let theirs = theirs(&leaf, &key, &issuer);
                        let (_, read) = X509Certificate::from_der(&theirs).unwrap();
                        let ours = leaf.to_be_signed().unwrap();
                        assert!(ours == read.tbs_certificate.as_ref(), "{id} {end}");
                        assert!(certificate(&ours, &read.signature_value.data) == theirs);
                    }
                }
            }
        }
    }
}
