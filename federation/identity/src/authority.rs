//! Roots, intermediates and leaves. `issue` is the only way to a leaf, and it takes a committed issuance.

use crate::csr::Csr;
use crate::keys::{SvidKey, internal};
use crate::leaf::{Leaf, certificate};
use ambit_model::{Code, DnsName, Generation, Lifetime, NodeId, Refusal, SpiffeId, Stamp, TrustDomain};
use ambit_state::committed::ReplicaAdmission;
use ambit_state::{Committed, Issuance};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, Issuer, KeyIdMethod, KeyUsagePurpose,
    SanType, SerialNumber, SigningKey as _, SubjectPublicKeyInfo,
};
use rustls_pki_types::CertificateDer;
use sha2::{Digest, Sha256};
use time::OffsetDateTime;

/// The node a leaf was issued through: SEQUENCE { OCTET STRING node id (32), OCTET STRING generation (8), OCTET STRING
/// epoch (8) }, numbers big-endian, not critical. The arc is private and not registered.
pub const NODE_BINDING_OID: &[u64] = &[1, 3, 6, 1, 4, 1, 61999, 1, 1];
/// As text, for parsers.
pub const NODE_BINDING_OID_TEXT: &str = "1.3.6.1.4.1.61999.1.1";
const ROOT_MS: u64 = 10 * 365 * 24 * 3_600_000;

fn date(stamp: Stamp) -> Result<OffsetDateTime, Refusal> {
    i64::try_from(stamp.0 / 1000)
        .ok()
        .and_then(|s| OffsetDateTime::from_unix_timestamp(s).ok())
        .ok_or_else(|| Refusal::new(Code::Internal, "a time within the calendar", stamp.0.to_string()))
}

fn name(common: &str) -> DistinguishedName {
    let mut dn = DistinguishedName::new();
    dn.push(DnType::OrganizationName, "Ambit");
    dn.push(DnType::CommonName, common);
    dn
}

fn key_id(spki: &[u8]) -> Vec<u8> {
    Sha256::digest(spki).iter().take(20).copied().collect()
}

/// The name of the authority that will have this key: its subject key identifier, hex.
pub fn authority_id(csr: &Csr) -> String {
    hex::encode(key_id(csr.spki()))
}

fn base(lifetime: Lifetime, serial: &[u8; 16]) -> Result<CertificateParams, Refusal> {
    let mut params = CertificateParams::default();
    params.not_before = date(lifetime.not_before)?;
    params.not_after = date(lifetime.not_after)?;
    params.serial_number = Some(SerialNumber::from_slice(serial));
    params.use_authority_key_identifier_extension = true;
    params.distinguished_name = DistinguishedName::new();
    Ok(params)
}

/// A trust domain's root in the form `file`: its key lies in a file of mode 0600 and is shown as unsealed.
pub struct Root {
    key: SvidKey,
    der: CertificateDer<'static>,
    trust_domain: TrustDomain,
}

impl Root {
    /// A new self-signed root.
    pub fn create(trust_domain: &TrustDomain, now: Stamp, serial: [u8; 16]) -> Result<Self, Refusal> {
        let key = SvidKey::generate()?;
        let lifetime = Lifetime { not_before: now.minus_ms(60_000), not_after: now.plus_ms(ROOT_MS) };
        let mut params = base(lifetime, &serial)?;
        params.distinguished_name = name(&format!("{trust_domain} root {}", hex::encode(&serial[12..])));
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.subject_alt_names = vec![uri(&format!("spiffe://{trust_domain}"))?];
        params.key_identifier_method = KeyIdMethod::PreSpecified(key_id(&spki_of(&key)));
        let cert = params.self_signed(&key.pair).map_err(|e| internal("a root", e))?;
        Ok(Self { der: cert.der().clone(), key, trust_domain: trust_domain.clone() })
    }
    /// From its files: the certificate must be of this key and of this trust domain.
    pub fn pair(trust_domain: &TrustDomain, der: CertificateDer<'static>, key: SvidKey) -> Result<Self, Refusal> {
        use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};
        let (_, cert) = X509Certificate::from_der(&der).map_err(|e| internal("a readable root", e))?;
        if cert.public_key().raw != spki_of(&key).as_slice() {
            let found = format!("of the root {}", hex::encode(crate::fingerprint(&der)));
            return Err(Refusal::new(Code::AuthorityMismatch, "a root certificate of this key", found));
        }
        let name = format!("spiffe://{trust_domain}");
        let names = cert.subject_alternative_name().ok().flatten();
        let is_of = names.is_some_and(|san| san.value.general_names.iter().any(|n| *n == GeneralName::URI(&name)));
        if !is_of {
            return Err(Refusal::new(Code::AuthorityMismatch, format!("the root of {name}"), "another root"));
        }
        drop(cert);
        Ok(Self { der, key, trust_domain: trust_domain.clone() })
    }
    /// The certificate.
    pub fn der(&self) -> &CertificateDer<'static> {
        &self.der
    }
    /// The key, for its file.
    pub fn key(&self) -> &SvidKey {
        &self.key
    }
    fn issuer(&self) -> Result<Issuer<'_, &rcgen::KeyPair>, Refusal> {
        Issuer::from_ca_cert_der(&self.der, &self.key.pair).map_err(|e| internal("a readable root", e))
    }

    /// A replica's intermediate: pathLen 0, its own subject and key identifier.
    pub fn intermediate(
        &self,
        admission: &Committed<ReplicaAdmission>,
        csr: &Csr,
    ) -> Result<CertificateDer<'static>, Refusal> {
        let a = admission.get();
        if csr.spki_sha256() != a.issuer_key_hash {
            return Err(Refusal::new(Code::AuthorityMismatch, "the issuing key that was admitted", "another"));
        }
        self.sign_intermediate(a.replica.0, csr, a.lifetime, &a.serial)
    }

    /// The first replica's intermediate: there is no log to commit to before it.
    pub fn found(&self, replica: u64, csr: &Csr, lifetime: Lifetime) -> Result<CertificateDer<'static>, Refusal> {
        let mut serial = [0u8; 16];
        serial[0] = 0x7f;
        serial[8..].copy_from_slice(&replica.to_be_bytes());
        self.sign_intermediate(replica, csr, lifetime, &serial)
    }

    fn sign_intermediate(
        &self,
        replica: u64,
        csr: &Csr,
        lifetime: Lifetime,
        serial: &[u8; 16],
    ) -> Result<CertificateDer<'static>, Refusal> {
        let mut params = base(lifetime, serial)?;
        let id = hex::encode(&key_id(csr.spki())[..8]);
        params.distinguished_name = name(&format!("{} replica {replica} {id}", self.trust_domain));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.subject_alt_names = vec![uri(&format!("spiffe://{}", self.trust_domain))?];
        params.key_identifier_method = KeyIdMethod::PreSpecified(key_id(csr.spki()));
        let spki = SubjectPublicKeyInfo::from_der(csr.spki()).map_err(|e| internal("a key", e))?;
        let cert = params.signed_by(&spki, &self.issuer()?).map_err(|e| internal("an intermediate", e))?;
        Ok(cert.der().clone())
    }

    /// Signs a statement (a key set) as the root.
    pub(crate) fn sign(&self, bytes: &[u8]) -> Result<Vec<u8>, Refusal> {
        self.key.pair.sign(bytes).map_err(|e| internal("a signature", e))
    }
}

fn spki_of(key: &SvidKey) -> Vec<u8> {
    use rcgen::PublicKeyData;
    key.pair.subject_public_key_info()
}

fn uri(text: &str) -> Result<SanType, Refusal> {
    Ok(SanType::URI(text.try_into().map_err(|e| internal("an IA5 URI", e))?))
}

/// A replica's issuing key with its intermediate. It never leaves the replica.
pub struct IssuingKey {
    key: SvidKey,
    intermediate: CertificateDer<'static>,
    authority: String,
    not_after: Stamp,
    /// The intermediate's subject, DER.
    subject: Vec<u8>,
    /// The intermediate's key identifier.
    key_id: Vec<u8>,
}

impl IssuingKey {
    /// Pairs the key with its intermediate, which must certify it.
    pub fn new(key: SvidKey, intermediate: CertificateDer<'static>) -> Result<Self, Refusal> {
        use x509_parser::prelude::{FromDer, ParsedExtension, X509Certificate};
        let (_, cert) = X509Certificate::from_der(&intermediate).map_err(|e| internal("a readable intermediate", e))?;
        let spki = spki_of(&key);
        if cert.public_key().raw != spki.as_slice() {
            return Err(Refusal::new(Code::AuthorityMismatch, "an intermediate of this key", "of another"));
        }
        let not_after = Stamp(u64::try_from(cert.validity().not_after.timestamp()).unwrap_or(0).saturating_mul(1000));
        let own_id = cert.iter_extensions().find_map(|e| match e.parsed_extension() {
            ParsedExtension::SubjectKeyIdentifier(id) => Some(id.0.to_vec()),
            _ => None,
        });
        let (subject, key_id) = (cert.subject().as_raw().to_vec(), own_id.unwrap_or_else(|| key_id(&spki)));
        Ok(Self { authority: hex::encode(&key_id), key, not_after, subject, key_id, intermediate })
    }
    /// Subject key identifier (hex): the name of this authority in every issuance.
    pub fn authority(&self) -> &str {
        &self.authority
    }
    /// When the intermediate ends.
    pub fn not_after(&self) -> Stamp {
        self.not_after
    }
    /// The intermediate, DER.
    pub fn intermediate(&self) -> &CertificateDer<'static> {
        &self.intermediate
    }
    /// The key, for its file.
    pub fn key(&self) -> &SvidKey {
        &self.key
    }

    fn leaf(
        &self,
        id: &SpiffeId,
        dns_names: &[DnsName],
        binding: Option<(NodeId, Generation, u64)>,
        lifetime: Lifetime,
        serial: &[u8; 16],
        csr: &Csr,
    ) -> Result<Vec<CertificateDer<'static>>, Refusal> {
        let leaf = Leaf {
            serial,
            issuer: &self.subject,
            authority_key: &self.key_id,
            lifetime,
            id,
            dns_names,
            spki: csr.spki(),
            subject_key: &key_id(csr.spki()),
            binding,
        };
        let to_be_signed = leaf.to_be_signed()?;
        let signature = self.key.pair.sign(&to_be_signed).map_err(|e| internal("a leaf", e))?;
        let leaf = CertificateDer::from(certificate(&to_be_signed, &signature));
        Ok(vec![leaf, self.intermediate.clone()])
    }

    /// This replica's own TLS leaf, under the admission that gave it the intermediate.
    pub fn replica_leaf(
        &self,
        replica: u64,
        td: &TrustDomain,
        lifetime: Lifetime,
        csr: &Csr,
    ) -> Result<Vec<CertificateDer<'static>>, Refusal> {
        let mut serial = [0u8; 16];
        serial[0] = 0x7e;
        serial[1..9].copy_from_slice(&lifetime.not_before.0.to_be_bytes());
        serial[15] = replica as u8;
        self.leaf(&td.member(&format!("/ambit/replica/{replica}"))?, &[], None, lifetime, &serial, csr)
    }

    /// The founding administrator's leaf; there is no log to commit to before it.
    pub fn founding_admin(
        &self,
        name: &str,
        td: &TrustDomain,
        lifetime: Lifetime,
        csr: &Csr,
    ) -> Result<Vec<CertificateDer<'static>>, Refusal> {
        let mut serial = [0u8; 16];
        serial[0] = 0x7d;
        serial[15] = 1;
        self.leaf(&td.member(&format!("/ambit/admin/{name}"))?, &[], None, lifetime, &serial, csr)
    }
}

/// Signs the leaf that was committed: leaf and intermediate, leaf first. Refuses another authority or another key.
///
/// ```compile_fail,E0308
/// use ambit_identity::{issue, Csr, IssuingKey};
/// fn uncommitted(i: ambit_state::Issuance, csr: &Csr, key: &IssuingKey) { let _ = issue(i, csr, key); }
/// ```
pub fn issue(
    committed: Committed<Issuance>,
    csr: &Csr,
    key: &IssuingKey,
) -> Result<Vec<CertificateDer<'static>>, Refusal> {
    let i = committed.get();
    if i.authority != key.authority {
        return Err(Refusal::new(Code::AuthorityMismatch, key.authority.clone(), i.authority.clone()));
    }
    if csr.spki_sha256() != i.key_hash {
        return Err(Refusal::new(Code::AuthorityMismatch, "the key that was committed", "another"));
    }
    let binding = i.binding.map(|(node, generation)| (node, generation, i.epoch));
    key.leaf(&i.spiffe_id, i.subject.dns_names(), binding, i.lifetime, &i.serial, csr)
}
