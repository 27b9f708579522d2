//! Verification of X.509-SVIDs to the letter of the SPIFFE standard (X509-SVID.md sections 2-5).

use crate::authority::Named;
use crate::profile::{self, Kind};
use ambit_model::bundle::{Bundle, Foreign, Own};
use ambit_model::{Code, Generation, NodeId, Refusal, SpiffeId, Stamp, TrustDomain, serial_number};
use ambit_state::grant::{Fences, LeafFacts};
use rustls_pki_types::{CertificateDer, TrustAnchor, UnixTime};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use x509_parser::extensions::ParsedExtension;
use x509_parser::prelude::X509Certificate;

/// Leaf, intermediate, what is between it and an external root, while a root is replaced its key certified by the former, and
/// for those who know a fingerprint only both roots: nobody needs more, and each costs a signature check.
const CHAIN_MAX: usize = 5 + ambit_state::external::CHAIN_MAX;
/// What may sign: other trust domains' authorities choose, but nothing with SHA-1 and no RSA key below 2048 bits.
static SIGNATURES: &[&dyn rustls_pki_types::SignatureVerificationAlgorithm] = webpki::ALL_VERIFICATION_ALGS;
/// Certificates are a few hundred bytes.
const CERTIFICATE_MAX_BYTES: usize = 8 * 1024;

/// The node that a leaf was issued through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeBinding {
    /// Which node.
    pub node: NodeId,
    /// Which of its admissions.
    pub generation: Generation,
    /// The authority's epoch.
    pub epoch: u64,
}

/// A verified peer: made by [`verify_svid`] only.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerSvid {
    leaf: Leaf,
    authority: String,
    /// Of [`Leaf::above`] those that are no roots.
    above: Vec<String>,
}

/// What a leaf says, in its place in a chain of the right form. It proves nothing yet.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Leaf {
    id: SpiffeId,
    binding: Option<NodeBinding>,
    serial: Vec<u8>,
    issuer: Option<Named>,
    not_before: Stamp,
    not_after: Stamp,
    downstream: bool,
    /// Who holds the authority that signed it, where that is a standby's.
    standby: Option<TrustDomain>,
    /// The names of all that came above it.
    above: Vec<String>,
}

impl PeerSvid {
    /// Who it is.
    pub fn id(&self) -> &SpiffeId {
        &self.leaf.id
    }
    /// Through which node it was issued; foreign authorities carry none.
    pub fn binding(&self) -> Option<NodeBinding> {
        self.leaf.binding
    }
    /// Serial number, as of [`serial_number`].
    pub fn serial(&self) -> &[u8] {
        &self.leaf.serial
    }
    /// Key identifier (hex) of the authority whose key signed it: of the certificate that the verified path goes by,
    /// whatever the leaf says and in whatever order the chain was sent. Never empty.
    pub fn authority(&self) -> &str {
        &self.authority
    }
    /// The names (as of [`PeerSvid::authority`]) of all that came above the leaf but of roots: whoever denies one of them
    /// denies the leaf, also on a connection that is open. What was shown beside the path counts too, as nobody honest
    /// shows what is revoked.
    pub fn above(&self) -> &[String] {
        &self.above
    }
    /// Whose intermediate signed it, as its trust domain's root named it; none where it says nothing of that.
    pub fn issuer(&self) -> Option<Named> {
        self.leaf.issuer
    }
    /// Whether it is under a downstream authority ([`profile::DOWNSTREAM_OID`]): a cluster's own issuer vouches for it.
    pub fn downstream(&self) -> bool {
        self.leaf.downstream
    }
    /// Who vouches for it in the place of its cell, under a grant; none where its own cell does.
    pub fn standby(&self) -> Option<&TrustDomain> {
        self.leaf.standby.as_ref()
    }
    /// Last instant of validity.
    pub fn not_after(&self) -> Stamp {
        self.leaf.not_after
    }
    /// Whether it is good still under these grants, at `now`: for a connection that is open.
    pub fn judge(&self, fences: &Fences, now: Stamp) -> Result<(), Refusal> {
        self.leaf.judge(fences, now)
    }
}

impl Leaf {
    /// I20. The epoch is the root's word, in the name of the intermediate; the leaf's own counts for a standby only.
    fn judge(&self, fences: &Fences, now: Stamp) -> Result<(), Refusal> {
        let facts = LeafFacts {
            id: &self.id,
            epoch: self.issuer.map_or(0, |named| named.epoch),
            bound: self.binding.map(|binding| binding.epoch),
            not_before: self.not_before,
            not_after: self.not_after,
            standby: self.standby.clone(),
        };
        fences.judge(&facts, now)
    }
}

/// What a chain says of itself. It proves nothing: for one that a handshake has verified, or that is one's own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Presented {
    /// Who it says that it is.
    pub id: SpiffeId,
    /// The names (as of [`PeerSvid::authority`]) of all that came above the leaf: whose key signed it is among them, or a
    /// root. What the leaf itself names is up to its signer, who may be a thief.
    pub above: Vec<String>,
    /// Serial number, as of [`serial_number`].
    pub serial: Vec<u8>,
    /// Through which node it was issued, where its authority says so.
    pub binding: Option<NodeBinding>,
    /// Last instant of validity.
    pub not_after: Stamp,
}

impl Presented {
    /// Reads a chain, leaf first; none for what is no X.509-SVID.
    pub fn of(chain: &[CertificateDer<'_>]) -> Option<Self> {
        let Leaf { id, serial, binding, above, not_after, .. } = parse_leaf(chain).ok()?;
        Some(Self { id, above, serial, binding, not_after })
    }
}

/// Roots by trust domain. Each vouches for its own domain only: bundles are never pooled.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TrustStore {
    roots: BTreeMap<TrustDomain, Vec<TrustAnchor<'static>>>,
    /// Their names, by trust domain. A root ends with its bundle and not by a denial, of which one would end all at once.
    root_names: BTreeMap<TrustDomain, BTreeSet<String>>,
    /// Intermediates by name, whatever a chain says of them: nothing under these is accepted.
    denied: BTreeSet<(TrustDomain, String)>,
    /// Grants that are known: which epoch's leaves are accepted, and whose.
    fences: Fences,
}

impl TrustStore {
    /// The own bundle; foreign ones are added one by one.
    pub fn new(own: &Bundle<Own>) -> Result<Self, Refusal> {
        let mut store = Self::default();
        store.put(own.trust_domain(), own.roots())?;
        Ok(store)
    }
    /// Adds or replaces the bundle of another trust domain.
    pub fn add_foreign(&mut self, bundle: &Bundle<Foreign>) -> Result<(), Refusal> {
        self.put(bundle.trust_domain(), bundle.roots())
    }
    /// Refuses whatever these intermediates signed: each by trust domain and key identifier (SHA-256 of its SPKI, the
    /// first 20 bytes, hex).
    pub fn deny_authorities(&mut self, denied: impl IntoIterator<Item = (TrustDomain, String)>) {
        self.denied.extend(denied);
    }
    /// Believes a standby's authority under these grants, and no older epoch's leaf that was issued after one.
    pub fn fence(&mut self, fences: Fences) {
        self.fences = fences;
    }
    /// Those of these that are no roots, none of them denied. By its key and not by what a leaf says of it: who stole the
    /// key says what it likes.
    fn judge_above(&self, domain: &TrustDomain, mut above: Vec<String>) -> Result<Vec<String>, Refusal> {
        above.retain(|name| self.root_names.get(domain).is_none_or(|roots| !roots.contains(name)));
        if self.denied.is_empty() {
            return Ok(above);
        }
        match above.iter().find(|name| self.denied.contains(&(domain.clone(), (*name).clone()))) {
            Some(name) => Err(Refusal::new(Code::SvidUntrusted, "an intermediate that is not revoked", name.clone())),
            None => Ok(above),
        }
    }
    fn put(&mut self, td: &TrustDomain, roots: &[Vec<u8>]) -> Result<(), Refusal> {
        let anchors = roots.iter().map(|der| anchor(der)).collect::<Result<_, _>>()?;
        let names = roots.iter().map(|der| name_of(der)).collect::<Result<_, _>>()?;
        self.roots.insert(td.clone(), anchors);
        self.root_names.insert(td.clone(), names);
        Ok(())
    }
    /// The trust domains known.
    pub fn domains(&self) -> impl Iterator<Item = &TrustDomain> {
        self.roots.keys()
    }
}

pub(crate) fn anchor(der: &[u8]) -> Result<TrustAnchor<'static>, Refusal> {
    let der = CertificateDer::from(der);
    webpki::anchor_from_trusted_cert(&der)
        .map(|a| a.to_owned())
        .map_err(|e| Refusal::new(Code::BadRequest, "a root certificate", e.to_string()))
}

/// The end of a connection at which a certificate is presented.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Usage {
    /// By who called.
    Client,
    /// By who was called.
    Server,
}

/// [`verify_svid_for`] a client.
pub fn verify_svid(chain: &[CertificateDer<'_>], trust: &TrustStore, now: Stamp) -> Result<PeerSvid, Refusal> {
    verify_svid_for(Usage::Client, chain, trust, now)
}

/// Verifies a chain (leaf first) at `now`. The leaf must be fit for both ends (X509-SVID 4.4); `usage` decides what the
/// certificates above it must allow.
///
/// # Errors
/// [`Code::SvidMalformed`], [`Code::TrustDomainUnknown`], [`Code::SvidUntrusted`].
pub fn verify_svid_for(
    usage: Usage,
    chain: &[CertificateDer<'_>],
    trust: &TrustStore,
    now: Stamp,
) -> Result<PeerSvid, Refusal> {
    let mut leaf = parse_leaf(chain)?;
    let domain = leaf.id.trust_domain();
    let Some(anchors) = trust.roots.get(&domain) else {
        return Err(Refusal::new(Code::TrustDomainUnknown, "a trust domain with a bundle here", domain.to_string()));
    };
    let authority = verify_path(usage, chain, anchors, now)?;
    let above = trust.judge_above(&domain, std::mem::take(&mut leaf.above))?;
    leaf.judge(&trust.fences, now)?;
    Ok(PeerSvid { leaf, authority, above })
}

/// Verifies a chain with the root of this fingerprint above its leaf: first contact, pinned out of band. While a root is
/// replaced, a chain has both, so that either may be pinned.
pub fn verify_pinned(
    chain: &[CertificateDer<'_>],
    td: &TrustDomain,
    fingerprint: &[u8; 32],
    now: Stamp,
) -> Result<PeerSvid, Refusal> {
    let mut leaf = parse_leaf(chain)?;
    let root = chain.iter().skip(1).find(|der| crate::keys::fingerprint(der) == *fingerprint);
    let Some(root) = root else {
        let found = chain.last().map(|der| hex::encode(crate::keys::fingerprint(der))).unwrap_or_default();
        return Err(Refusal::new(Code::FingerprintMismatch, hex::encode(fingerprint), found));
    };
    if leaf.id.trust_domain() != *td {
        return Err(Refusal::new(Code::SvidUntrusted, format!("an identity of {td}"), leaf.id.as_str()));
    }
    let authority = verify_path(Usage::Server, chain, &[anchor(root)?], now)?;
    let (pinned, mut above) = (name_of(root)?, std::mem::take(&mut leaf.above));
    above.retain(|name| *name != pinned);
    // At first contact no grant is known.
    leaf.judge(&Fences::default(), now)?;
    Ok(PeerSvid { leaf, authority, above })
}

/// The name of the authority next above the leaf in the path that was verified. A path is built by names and signatures,
/// in whatever order the certificates were sent: their places in the chain say nothing.
fn verify_path(
    usage: Usage,
    chain: &[CertificateDer<'_>],
    anchors: &[TrustAnchor<'static>],
    now: Stamp,
) -> Result<String, Refusal> {
    let untrusted =
        |e: webpki::Error| Refusal::new(Code::SvidUntrusted, "a chain to the bundle, in time", e.to_string());
    let [leaf, rest @ ..] = chain else {
        return Err(Refusal::new(Code::SvidMalformed, "a certificate", "none"));
    };
    let leaf = webpki::EndEntityCert::try_from(leaf).map_err(untrusted)?;
    let usage = match usage {
        Usage::Client => webpki::KeyUsage::client_auth(),
        Usage::Server => webpki::KeyUsage::server_auth(),
    };
    let at = UnixTime::since_unix_epoch(Duration::from_millis(now.0));
    let path = leaf.verify_for_usage(SIGNATURES, anchors, rest, at, usage, None, None).map_err(untrusted)?;
    Ok(key_name(&path.issuer_spki()))
}

fn parse_leaf(chain: &[CertificateDer<'_>]) -> Result<Leaf, Refusal> {
    let bad = |expected: &str, found: String| Refusal::new(Code::SvidMalformed, expected, found);
    if chain.len() > CHAIN_MAX || chain.iter().any(|c| c.len() > CERTIFICATE_MAX_BYTES) {
        return Err(bad("a short chain of small certificates", format!("{} certificates", chain.len())));
    }
    let leaf = chain.first().ok_or_else(|| bad("a certificate", "none".into()))?;
    let cert = profile::parse(leaf).map_err(|found| bad("a certificate", found))?;
    must(&cert, Kind::Leaf)?;
    let id = profile::leaf_id(&cert).ok_or_else(|| bad("a SPIFFE ID", "none".into()))?;
    let (mut downstream, mut standby, mut above) = (false, None, Vec::with_capacity(chain.len()));
    for der in chain.iter().skip(1) {
        let cert = profile::parse(der).map_err(|found| bad("a certificate", found))?;
        must(&cert, Kind::Authority)?;
        downstream |= profile::is_downstream(&cert);
        match profile::standby_of(&cert).map_err(|found| bad("one standby mark at most, a trust domain", found))? {
            Some(_) if standby.is_some() => return Err(bad("one standby's authority", "two".into())),
            Some(holder) => standby = Some(holder),
            None => {}
        }
        above.push(key_name(cert.public_key().raw));
    }
    // Whichever of them signed: nobody honest shows one that did not.
    if let Some(broken) = profile::beyond(&cert).filter(|_| downstream) {
        return Err(Refusal::new(Code::SvidUntrusted, broken.expected, broken.found));
    }
    let td = id.trust_domain();
    Ok(Leaf {
        id,
        binding: binding(&cert)?,
        serial: serial_number(cert.raw_serial()).to_vec(),
        // The path is built by names and signatures: an issuer of this name is an intermediate of this name.
        issuer: issuer(&cert, &td),
        not_before: stamp(cert.validity().not_before),
        not_after: stamp(cert.validity().not_after),
        downstream,
        standby,
        above,
    })
}

fn stamp(at: x509_parser::time::ASN1Time) -> Stamp {
    Stamp(u64::try_from(at.timestamp()).unwrap_or(0).saturating_mul(1000))
}

/// No rule broken that must hold.
fn must(cert: &X509Certificate<'_>, kind: Kind) -> Result<(), Refusal> {
    match profile::judge(cert, kind).into_iter().find(|finding| finding.must) {
        None => Ok(()),
        Some(broken) => {
            let expected = format!("{} ({kind}, {})", broken.expected, broken.section);
            Err(Refusal::new(Code::SvidMalformed, expected, broken.found))
        }
    }
}

/// The name of a certificate's key, by which an intermediate is revoked: SHA-256 of its SPKI, the first 20 bytes, hex.
///
/// # Errors
/// [`Code::BadRequest`] for what is no certificate.
pub fn name_of(der: &[u8]) -> Result<String, Refusal> {
    let cert = profile::parse(der).map_err(|e| Refusal::new(Code::BadRequest, "a certificate", e))?;
    Ok(key_name(cert.public_key().raw))
}

/// An authority's name by its key (SubjectPublicKeyInfo, DER).
fn key_name(spki: &[u8]) -> String {
    hex::encode(&Sha256::digest(spki)[..20])
}

fn issuer(cert: &X509Certificate<'_>, td: &TrustDomain) -> Option<Named> {
    let mut names = cert.issuer().iter_common_name();
    match (names.next(), names.next()) {
        (Some(one), None) => Named::read(one.as_str().ok()?, td),
        _ => None,
    }
}

fn binding(cert: &X509Certificate<'_>) -> Result<Option<NodeBinding>, Refusal> {
    let mut found = None;
    for ext in cert.extensions() {
        if ext.oid.to_id_string() != crate::authority::NODE_BINDING_OID_TEXT {
            continue;
        }
        debug_assert!(matches!(ext.parsed_extension(), ParsedExtension::UnsupportedExtension { .. }));
        let parsed = parse_binding(ext.value);
        match parsed {
            Some(b) if found.is_none() => found = Some(b),
            _ => return Err(Refusal::new(Code::SvidMalformed, "one well-formed node binding", "another")),
        }
    }
    Ok(found)
}

fn parse_binding(der: &[u8]) -> Option<NodeBinding> {
    let rest = der.strip_prefix(&[0x30, 54, 0x04, 32])?;
    let (node, rest) = rest.split_first_chunk::<32>()?;
    let (generation, rest) = rest.strip_prefix(&[0x04, 8])?.split_first_chunk::<8>()?;
    let (epoch, rest) = rest.strip_prefix(&[0x04, 8])?.split_first_chunk::<8>()?;
    rest.is_empty().then(|| NodeBinding {
        node: NodeId(*node),
        generation: Generation(u64::from_be_bytes(*generation)),
        epoch: u64::from_be_bytes(*epoch),
    })
}
