//! Roots, intermediates and leaves. `issue` is the only way to a leaf, and it takes a committed issuance.

use crate::csr::Csr;
use crate::external::Cross;
use crate::keys::{SvidKey, internal};
use crate::leaf::{Leaf, certificate};
use ambit_model::{Code, DnsName, Generation, Lifetime, NodeId, Refusal, SpiffeId, Stamp, TrustDomain};
use ambit_state::committed::{DownstreamAuthority, PreparedRoot, ReplicaAdmission, ReplicaAuthority, StandbyAuthority};
use ambit_state::{Committed, Issuance, RevokedLeaves};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CustomExtension, DistinguishedName, DnType,
    IsCa, Issuer, KeyIdMethod, KeyUsagePurpose, RevokedCertParams, SanType, SerialNumber, SigningKey as _,
    SubjectPublicKeyInfo,
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

pub(crate) fn key_id(spki: &[u8]) -> Vec<u8> {
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

/// What signs for a trust domain: its root, or the cell's authority under a root that somebody else keeps.
pub struct Root {
    key: SvidKey,
    /// The root's certificate, which is in the bundle.
    der: CertificateDer<'static>,
    /// Under an external root: the certificate of the key, then what leads from it to the root. Else nothing.
    above: Vec<CertificateDer<'static>>,
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
        Ok(Self::of(trust_domain, cert.der().clone(), Vec::new(), key))
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
        Ok(Self::of(trust_domain, der, Vec::new(), key))
    }
    /// Of what was checked.
    pub(crate) fn of(
        td: &TrustDomain,
        der: CertificateDer<'static>,
        above: Vec<CertificateDer<'static>>,
        key: SvidKey,
    ) -> Self {
        Self { key, der, above, trust_domain: td.clone() }
    }
    /// What leads from the key to an external root, nearest first; nothing where the key is the root's own.
    pub fn above(&self) -> &[CertificateDer<'static>] {
        &self.above
    }
    /// Whose root it is.
    pub(crate) fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }
    /// The certificate of the key.
    fn own(&self) -> &CertificateDer<'static> {
        self.above.first().unwrap_or(&self.der)
    }
    /// The root's certificate, which is in the bundle.
    pub fn der(&self) -> &CertificateDer<'static> {
        &self.der
    }
    /// The key, for its file.
    pub fn key(&self) -> &SvidKey {
        &self.key
    }
    fn issuer(&self) -> Result<Issuer<'_, &rcgen::KeyPair>, Refusal> {
        Issuer::from_ca_cert_der(self.own(), &self.key.pair).map_err(|e| internal("a readable root", e))
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
        // A serial number begins with its epoch, below the two bits that keep it positive and of full length.
        let epoch = u64::from(u32::from_be_bytes([a.serial[0], a.serial[1], a.serial[2], a.serial[3]]) & 0x3fff_ffff);
        self.sign_intermediate(Named { replica: a.replica.0, epoch }, csr, a.lifetime, &a.serial)
    }

    /// A replica's next intermediate, from its own committed entry.
    pub fn renewed(
        &self,
        authority: &Committed<ReplicaAuthority>,
        csr: &Csr,
    ) -> Result<CertificateDer<'static>, Refusal> {
        let a = authority.get();
        self.as_committed(csr, &a.key_hash, &a.root)?;
        self.sign_intermediate(Named { replica: a.replica.0, epoch: a.epoch }, csr, a.lifetime, &a.serial)
    }

    /// The request has the key that was committed, and this is the root that was to sign.
    fn as_committed(&self, csr: &Csr, key_hash: &[u8; 32], root: &[u8; 32]) -> Result<(), Refusal> {
        if csr.spki_sha256() != *key_hash {
            return Err(Refusal::new(Code::AuthorityMismatch, "the issuing key that was committed", "another"));
        }
        let own = crate::fingerprint(&self.der);
        if own != *root {
            return Err(Refusal::new(
                Code::AuthorityMismatch,
                format!("the root {}", hex::encode(root)),
                hex::encode(own),
            ));
        }
        Ok(())
    }

    /// The intermediate of a cluster's own issuer, from its committed entry: marked, so that nobody takes what it signs for
    /// our own. It ends before this root.
    pub fn downstream(
        &self,
        authority: &Committed<DownstreamAuthority>,
        csr: &Csr,
    ) -> Result<CertificateDer<'static>, Refusal> {
        let a = authority.get();
        self.as_committed(csr, &a.key_hash, &a.root)?;
        let root = crate::profile::certificate(self.own())?;
        let ends = u64::try_from(root.validity().not_after.timestamp()).unwrap_or(0).saturating_mul(1000);
        if a.lifetime.not_after.0 > ends {
            return Err(Refusal::new(Code::IssuerUnavailable, "a root with time left", "one that ends"));
        }
        let mut params = self.intermediate_params(csr, a.lifetime, &a.serial)?;
        let id = hex::encode(&key_id(csr.spki())[..8]);
        params.distinguished_name = name(&format!("{} downstream {} {id}", self.trust_domain, a.entry));
        let mark = CustomExtension::from_oid_content(crate::profile::DOWNSTREAM_OID, vec![0x05, 0x00]);
        params.custom_extensions = vec![mark];
        self.certify(&params, csr)
    }

    /// The intermediate of a replica of this cell's standby, from its committed entry: marked with who holds it, so that
    /// every verifier of ours asks for a live grant.
    pub fn standby(
        &self,
        authority: &Committed<StandbyAuthority>,
        csr: &Csr,
    ) -> Result<CertificateDer<'static>, Refusal> {
        let a = authority.get();
        self.as_committed(csr, &a.key_hash, &a.root)?;
        let mut params = self.intermediate_params(csr, a.lifetime, &a.serial)?;
        let id = hex::encode(&key_id(csr.spki())[..8]);
        params.distinguished_name = name(&format!("{} standby {} {} {id}", self.trust_domain, a.holder, a.replica));
        let mark = crate::profile::standby_mark(&a.holder)?;
        params.custom_extensions = vec![CustomExtension::from_oid_content(crate::profile::STANDBY_OID, mark)];
        self.certify(&params, csr)
    }

    /// The key of the root that was committed as the next, certified by this one: for those who know only this one
    /// (RFC 4210, 4.4). It ends with this root.
    pub fn cross_sign(
        &self,
        prepared: &Committed<PreparedRoot>,
        next: &CertificateDer<'_>,
    ) -> Result<CertificateDer<'static>, Refusal> {
        use x509_parser::prelude::{FromDer, X509Certificate};
        let p = prepared.get();
        if !self.above.is_empty() {
            let expected = "a root whose own key can certify the next";
            return Err(Refusal::new(Code::ExternalRoot, expected, "an authority under an external root"));
        }
        let (own, theirs) = (crate::fingerprint(&self.der), crate::fingerprint(next));
        if (own, theirs) != (p.active, p.root) {
            let found = format!("{} over {}", hex::encode(own), hex::encode(theirs));
            return Err(Refusal::new(Code::AuthorityMismatch, "the roots that were committed", found));
        }
        let (_, cert) = X509Certificate::from_der(next).map_err(|e| internal("a readable root", e))?;
        let (_, mine) = X509Certificate::from_der(&self.der).map_err(|e| internal("a readable root", e))?;
        let ends = |c: &X509Certificate<'_>| u64::try_from(c.validity().not_after.timestamp()).unwrap_or(0);
        let not_after = Stamp(ends(&cert).min(ends(&mine)).saturating_mul(1000));
        let lifetime = Lifetime { not_before: p.stamp.minus_ms(60_000), not_after };
        let cross = Cross { by: &mine, next: &cert, lifetime, serial: &p.serial, trust_domain: &self.trust_domain };
        Ok(CertificateDer::from(cross.signed(|bytes| self.sign(bytes))?))
    }

    /// The first replica's intermediate: there is no log to commit to before it.
    pub fn found(&self, replica: u64, csr: &Csr, lifetime: Lifetime) -> Result<CertificateDer<'static>, Refusal> {
        let mut serial = [0u8; 16];
        serial[0] = 0x7f;
        serial[8..].copy_from_slice(&replica.to_be_bytes());
        self.sign_intermediate(Named { replica, epoch: 1 }, csr, lifetime, &serial)
    }

    /// The intermediate of a replica that was away until its last one ended: it must speak before anything can be
    /// committed. A short one, under which the next is committed.
    pub fn begin_again(&self, named: Named, csr: &Csr, lifetime: Lifetime) -> Result<CertificateDer<'static>, Refusal> {
        let mut serial = [0u8; 16];
        serial[0] = 0x7c;
        serial[1..9].copy_from_slice(&lifetime.not_before.0.to_be_bytes());
        serial[9..15].copy_from_slice(&key_id(csr.spki())[..6]);
        serial[15] = named.replica as u8;
        self.sign_intermediate(named, csr, lifetime, &serial)
    }

    fn sign_intermediate(
        &self,
        Named { replica, epoch }: Named,
        csr: &Csr,
        lifetime: Lifetime,
        serial: &[u8; 16],
    ) -> Result<CertificateDer<'static>, Refusal> {
        let mut params = self.intermediate_params(csr, lifetime, serial)?;
        let id = hex::encode(&key_id(csr.spki())[..8]);
        params.distinguished_name = name(&format!("{} replica {replica} epoch {epoch} {id}", self.trust_domain));
        self.certify(&params, csr)
    }

    /// What every intermediate has: pathLen 0, and the key identifier by which it is named.
    fn intermediate_params(
        &self,
        csr: &Csr,
        lifetime: Lifetime,
        serial: &[u8; 16],
    ) -> Result<CertificateParams, Refusal> {
        let mut params = base(lifetime, serial)?;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.subject_alt_names = vec![uri(&format!("spiffe://{}", self.trust_domain))?];
        params.key_identifier_method = KeyIdMethod::PreSpecified(key_id(csr.spki()));
        Ok(params)
    }

    fn certify(&self, params: &CertificateParams, csr: &Csr) -> Result<CertificateDer<'static>, Refusal> {
        let spki = SubjectPublicKeyInfo::from_der(csr.spki()).map_err(|e| internal("a key", e))?;
        let cert = params.signed_by(&spki, &self.issuer()?).map_err(|e| internal("an intermediate", e))?;
        // A name that was written anew must be the very same: an outside CA may have chosen it.
        let (made, own) = (crate::profile::certificate(cert.der())?, crate::profile::certificate(self.own())?);
        if made.issuer().as_raw() != own.subject().as_raw() {
            return Err(internal("an authority's name that can be repeated", own.subject()));
        }
        Ok(cert.der().clone())
    }

    /// Signs a statement (a key set) as the root.
    pub(crate) fn sign(&self, bytes: &[u8]) -> Result<Vec<u8>, Refusal> {
        self.key.pair.sign(bytes).map_err(|e| internal("a signature", e))
    }
}

pub(crate) fn spki_of(key: &SvidKey) -> Vec<u8> {
    use rcgen::PublicKeyData;
    key.pair.subject_public_key_info()
}

fn uri(text: &str) -> Result<SanType, Refusal> {
    Ok(SanType::URI(text.try_into().map_err(|e| internal("an IA5 URI", e))?))
}

/// Whose an intermediate is, as its subject says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Named {
    /// The replica's number.
    pub replica: u64,
    /// The cell's epoch.
    pub epoch: u64,
}

impl Named {
    /// Reads the common name of an intermediate of `td`; none of another form.
    pub(crate) fn read(common: &str, td: &TrustDomain) -> Option<Named> {
        let mut words = common.strip_prefix(td.as_str())?.strip_prefix(" replica ")?.split(' ');
        let named = match (words.next(), words.next(), words.next(), words.next(), words.next()) {
            (Some(replica), Some("epoch"), Some(epoch), Some(_), None) => {
                Named { replica: replica.parse().ok()?, epoch: epoch.parse().ok()? }
            }
            _ => return None,
        };
        Some(named)
    }
}

/// A replica's issuing key with its intermediate. It never leaves the replica.
pub struct IssuingKey {
    key: SvidKey,
    intermediate: CertificateDer<'static>,
    /// What leads from the intermediate to its root, where that is external; and from the root to the one before it, while
    /// that one is relied on.
    above: Vec<CertificateDer<'static>>,
    authority: String,
    lifetime: Lifetime,
    /// The intermediate's subject, DER.
    subject: Vec<u8>,
    /// The intermediate's key identifier.
    key_id: Vec<u8>,
}

impl IssuingKey {
    /// Pairs the key with its intermediate, which must certify it, and under the name that verifiers derive from the key:
    /// under another one it could not be revoked.
    pub fn new(key: SvidKey, intermediate: CertificateDer<'static>) -> Result<Self, Refusal> {
        use x509_parser::prelude::{FromDer, ParsedExtension, X509Certificate};
        let (_, cert) = X509Certificate::from_der(&intermediate).map_err(|e| internal("a readable intermediate", e))?;
        let spki = spki_of(&key);
        if cert.public_key().raw != spki.as_slice() {
            return Err(Refusal::new(Code::AuthorityMismatch, "an intermediate of this key", "of another"));
        }
        let key_id = key_id(&spki);
        for extension in cert.iter_extensions() {
            if let ParsedExtension::SubjectKeyIdentifier(id) = extension.parsed_extension()
                && id.0 != key_id
            {
                let expected = format!("an intermediate with the key identifier {}", hex::encode(&key_id));
                return Err(Refusal::new(Code::AuthorityMismatch, expected, hex::encode(id.0)));
            }
        }
        let subject = cert.subject().as_raw().to_vec();
        let stamp = |t: x509_parser::time::ASN1Time| Stamp(u64::try_from(t.timestamp()).unwrap_or(0) * 1000);
        let validity = cert.validity();
        let lifetime = Lifetime { not_before: stamp(validity.not_before), not_after: stamp(validity.not_after) };
        Ok(Self { authority: hex::encode(&key_id), key, lifetime, subject, key_id, above: Vec::new(), intermediate })
    }
    /// The same, presenting what is above it: the authority under an external root, and the certificate of its root's key by
    /// the root before it, so that those verify it too who have not heard of the new root yet.
    #[must_use]
    pub fn under(self, above: Vec<CertificateDer<'static>>) -> Self {
        Self { above, ..self }
    }
    /// What it presents above its leaves.
    pub fn upper(&self) -> Vec<CertificateDer<'static>> {
        std::iter::once(self.intermediate.clone()).chain(self.above.iter().cloned()).collect()
    }
    /// Subject key identifier (hex): the name of this authority in every issuance.
    pub fn authority(&self) -> &str {
        &self.authority
    }
    /// When the intermediate ends.
    pub fn not_after(&self) -> Stamp {
        self.lifetime.not_after
    }
    /// From when to when the intermediate is valid.
    pub fn lifetime(&self) -> Lifetime {
        self.lifetime
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
        Ok(std::iter::once(leaf).chain(self.upper()).collect())
    }

    /// The CRL of this authority (RFC 5280 section 5), from what the cell committed about it. Refuses another authority's.
    pub fn crl(&self, revoked: &Committed<RevokedLeaves>, valid_ms: u64) -> Result<Vec<u8>, Refusal> {
        let list = revoked.get();
        if list.authority != self.authority {
            return Err(Refusal::new(Code::AuthorityMismatch, self.authority.clone(), list.authority.clone()));
        }
        let leaf = |(serial, since): &(Vec<u8>, Stamp)| {
            Ok(RevokedCertParams {
                serial_number: SerialNumber::from_slice(serial),
                revocation_time: date(*since)?,
                reason_code: None,
                invalidity_date: None,
            })
        };
        let params = CertificateRevocationListParams {
            this_update: date(list.stamp)?,
            next_update: date(list.stamp.plus_ms(valid_ms).min(self.not_after()))?,
            // Grows with every change (section 5.2.3).
            crl_number: SerialNumber::from(list.revision.0.max(1)),
            issuing_distribution_point: None,
            revoked_certs: list.leaves.iter().map(leaf).collect::<Result<_, Refusal>>()?,
            key_identifier_method: KeyIdMethod::PreSpecified(key_id(&spki_of(&self.key))),
        };
        let issuer =
            Issuer::from_ca_cert_der(&self.intermediate, &self.key.pair).map_err(|e| internal("an issuer", e))?;
        Ok(params.signed_by(&issuer).map_err(|e| internal("a CRL", e))?.der().to_vec())
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
