//! Roots that somebody else keeps: what a cell asks an outside CA for, the authority that comes of it, and the external
//! root's key certified by a root of the cell's own, for those who know only that one.

use crate::authority::{IssuingKey, Named, Root, key_id, spki_of};
use crate::csr::Csr;
use crate::keys::{SvidKey, internal};
use crate::leaf::{certificate, date, extension, integer, tlv};
use crate::svid::{TrustStore, Usage, verify_svid_for};
use ambit_model::bundle::{Bundle, Own};
use ambit_model::{Code, Lifetime, Refusal, Stamp, TrustDomain};
use ambit_state::external::path;
use rcgen::{CertificateParams, CustomExtension, DistinguishedName, DnType, KeyUsagePurpose, SanType};
use rustls_pki_types::CertificateDer;
use x509_parser::extensions::ParsedExtension;
use x509_parser::prelude::X509Certificate;

/// How long what is signed to try an authority is valid, to either side of now.
const TRIED_MS: u64 = 60_000;
const BASIC_CONSTRAINTS_OID: &[u64] = &[2, 5, 29, 19];
/// SEQUENCE { cA TRUE, pathLen 1 }: replicas' intermediates are under it, and nothing under those but leaves.
const CA_PATH_1: &[u8] = &[0x30, 0x06, 0x01, 0x01, 0xff, 0x02, 0x01, 0x01];
const SUBJECT_KEY: &[u8] = &[0x06, 0x03, 0x55, 0x1d, 0x0e];
const AUTHORITY_KEY: &[u8] = &[0x06, 0x03, 0x55, 0x1d, 0x23];
const SAN: &[u8] = &[0x06, 0x03, 0x55, 0x1d, 0x11];
/// KeyUsage, critical: keyCertSign and cRLSign (X509-SVID 4.3).
const KEY_USAGE: &[u8] =
    &[0x30, 0x0e, 0x06, 0x03, 0x55, 0x1d, 0x0f, 0x01, 0x01, 0xff, 0x04, 0x04, 0x03, 0x02, 0x01, 0x06];
/// BasicConstraints, critical: an authority.
const CA: &[u8] =
    &[0x30, 0x0f, 0x06, 0x03, 0x55, 0x1d, 0x13, 0x01, 0x01, 0xff, 0x04, 0x05, 0x30, 0x03, 0x01, 0x01, 0xff];

/// The request that an outside CA signs (PKCS#10, DER): the authority's subject, and what its certificate must say.
pub fn request(td: &TrustDomain, key: &SvidKey) -> Result<Vec<u8>, Refusal> {
    let mut params = CertificateParams::default();
    let mut subject = DistinguishedName::new();
    subject.push(DnType::OrganizationName, "Ambit");
    let id = hex::encode(&key_id(&spki_of(key))[..8]);
    // RFC 5280 allows 64 characters of a common name (upper bounds, A.1).
    let domain: String = td.as_str().chars().take(32).collect();
    subject.push(DnType::CommonName, format!("{domain} authority {id}"));
    params.distinguished_name = subject;
    let uri = format!("spiffe://{td}");
    params.subject_alt_names = vec![SanType::URI(uri.as_str().try_into().map_err(|e| internal("an IA5 URI", e))?)];
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let mut basic = CustomExtension::from_oid_content(BASIC_CONSTRAINTS_OID, CA_PATH_1.to_vec());
    basic.set_criticality(true);
    params.custom_extensions = vec![basic];
    let csr = params.serialize_request(&key.pair).map_err(|e| internal("a CSR", e))?;
    Ok(csr.der().to_vec())
}

impl Root {
    /// The authority of the cell under an external root: its key, its certificate with what leads from it to the root, and
    /// the root.
    ///
    /// # Errors
    /// [`Code::AuthorityMismatch`] for another key, and those of [`path`].
    pub fn under(
        td: &TrustDomain,
        der: CertificateDer<'static>,
        above: Vec<CertificateDer<'static>>,
        key: SvidKey,
    ) -> Result<Self, Refusal> {
        let chain: Vec<Vec<u8>> = above.iter().map(|der| der.to_vec()).collect();
        let judged = path(td, &chain, &der)?;
        if judged.key_hash() != key.spki_sha256() {
            return Err(Refusal::new(Code::AuthorityMismatch, "an authority's certificate of this key", "of another"));
        }
        Ok(Self::of(td, der, above, key))
    }

    /// [`Root::pair`], or [`Root::under`] where something is above the key.
    pub fn standing(
        td: &TrustDomain,
        der: CertificateDer<'static>,
        above: Vec<CertificateDer<'static>>,
        key: SvidKey,
    ) -> Result<Self, Refusal> {
        if above.is_empty() { Self::pair(td, der, key) } else { Self::under(td, der, above, key) }
    }
}

impl Root {
    /// Signs what a replica has and what it shows, under a key that is thrown away, and verifies it as those do who know only
    /// the root: for either end of a handshake.
    ///
    /// # Errors
    /// [`Code::ExternalCertificate`], with what was wrong with it.
    pub fn tried(&self, now: Stamp) -> Result<(), Refusal> {
        let tried = || {
            let (key, shown, td) = (SvidKey::generate()?, SvidKey::generate()?, self.trust_domain());
            let lifetime = Lifetime { not_before: now.minus_ms(TRIED_MS), not_after: now.plus_ms(TRIED_MS) };
            let named = Named { replica: 1, epoch: 1 };
            let intermediate = self.begin_again(named, &Csr::parse(&key.csr()?)?, lifetime)?;
            let issuer = IssuingKey::new(key, intermediate)?.under(self.above().to_vec());
            let chain = issuer.replica_leaf(1, td, lifetime, &Csr::parse(&shown.csr()?)?)?;
            let trust = TrustStore::new(&Bundle::<Own>::new(td.clone(), 1, vec![self.der().to_vec()]))?;
            let mut ends = [Usage::Server, Usage::Client].into_iter();
            ends.try_for_each(|usage| verify_svid_for(usage, &chain, &trust, now).map(drop))
        };
        tried().map_err(|refusal: Refusal| {
            let expected = "certificates under which what the cell signs is taken";
            Refusal::new(Code::ExternalCertificate, expected, format!("{}, not {}", refusal.found, refusal.expected))
        })
    }
}

/// What a root certifies of the one after it.
pub(crate) struct Cross<'a> {
    pub(crate) by: &'a X509Certificate<'a>,
    pub(crate) next: &'a X509Certificate<'a>,
    pub(crate) lifetime: Lifetime,
    pub(crate) serial: &'a [u8; 16],
    pub(crate) trust_domain: &'a TrustDomain,
}

impl Cross<'_> {
    /// The TBSCertificate, which is signed. The next root's name and key byte for byte, whoever made them: chains lead to
    /// either.
    pub(crate) fn to_be_signed(&self) -> Result<Vec<u8>, Refusal> {
        let mut body = vec![0xa0, 0x03, 0x02, 0x01, 0x02];
        integer(&mut body, self.serial);
        body.extend(crate::leaf::ECDSA_SHA256);
        body.extend(self.by.subject().as_raw());
        let mut times = Vec::new();
        date(&mut times, self.lifetime.not_before)?;
        date(&mut times, self.lifetime.not_after)?;
        tlv(&mut body, 0x30, &times);
        body.extend(self.next.subject().as_raw());
        body.extend(self.next.public_key().raw);
        let mut sequence = Vec::new();
        tlv(&mut sequence, 0x30, &self.extensions());
        tlv(&mut body, 0xa3, &sequence);
        let mut out = Vec::new();
        tlv(&mut out, 0x30, &body);
        Ok(out)
    }

    fn extensions(&self) -> Vec<u8> {
        let (mut out, mut key, mut content) = (Vec::new(), Vec::new(), Vec::new());
        tlv(&mut key, 0x80, &named_key(self.by));
        tlv(&mut content, 0x30, &key);
        extension(&mut out, AUTHORITY_KEY, &content);
        let (mut name, mut content) = (Vec::new(), Vec::new());
        tlv(&mut name, 0x86, format!("spiffe://{}", self.trust_domain).as_bytes());
        tlv(&mut content, 0x30, &name);
        extension(&mut out, SAN, &content);
        out.extend(KEY_USAGE);
        let mut content = Vec::new();
        tlv(&mut content, 0x04, &named_key(self.next));
        extension(&mut out, SUBJECT_KEY, &content);
        out.extend(CA);
        out
    }

    /// With its signature by the root's key, which is on P-256.
    pub(crate) fn signed(&self, sign: impl Fn(&[u8]) -> Result<Vec<u8>, Refusal>) -> Result<Vec<u8>, Refusal> {
        let to_be_signed = self.to_be_signed()?;
        Ok(certificate(&to_be_signed, &sign(&to_be_signed)?))
    }
}

/// The key identifier that a certificate gives itself, by which what is under it names it; that of our own where it has none.
fn named_key(cert: &X509Certificate<'_>) -> Vec<u8> {
    let mut all = cert.extensions().iter().map(|e| e.parsed_extension());
    let named = all.find_map(|e| if let ParsedExtension::SubjectKeyIdentifier(id) = e { Some(id.0) } else { None });
    named.map_or_else(|| key_id(cert.public_key().raw), <[u8]>::to_vec)
}
