//! A root that somebody else keeps, and the authority that the cell holds under it: rows, and how certificates are judged.
//!
//! The same judgement where an import is proposed and where it is applied: pure, with the time as an argument. What it lets
//! through, our own verifier (webpki) and OpenSSL take too.

mod certificate;

use crate::NOT_BEFORE_SLACK_MS;
use crate::authorities::{AuthorityRow, RootId, authority_of, index_of};
use crate::objects::KeySetRow;
use crate::state::State;
use ambit_model::{Approved, Code, Lifetime, Refusal, Stamp, TrustDomain};
use certificate::Certificate;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The authority, and at most two tiers of the outside CA between it and its root: each costs a signature check in every
/// handshake.
pub const CHAIN_MAX: usize = 3;
/// A certificate with an RSA key of 4096 bits has two kilobytes.
pub const CERTIFICATE_BYTES_MAX: usize = 8 * 1024;
/// A week is the longest that a replica's intermediate lasts, which must fit.
pub const LEFT_MS_MIN: u64 = 7 * DAY_MS;
/// 30-90 days are meant (design.md section 4); no CA's policy that we know gives more than this for what is online.
pub const LIFE_MS_MAX: u64 = 398 * DAY_MS;
const DAY_MS: u64 = 24 * 3_600_000;

/// The cell's authority under an external root. The last one of a root signs; those before it are kept while they last.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExternalRow {
    /// Its certificate, then what is between it and the root, which is not in here. DER.
    pub chain: Vec<Vec<u8>>,
    /// SHA-256 of SPKI of its key.
    pub key_hash: [u8; 32],
    /// Within which all of the chain is valid.
    pub lifetime: Lifetime,
    /// When it was imported.
    pub imported: Stamp,
}

impl ExternalRow {
    /// Its name, as of every authority: by its key.
    pub fn authority(&self) -> String {
        authority_of(&self.key_hash)
    }
    /// Whether people should have the next one by now: a third of its life is left.
    pub fn is_due(&self, now: Stamp) -> bool {
        let life = self.lifetime.not_after.0.saturating_sub(self.lifetime.not_before.0);
        self.lifetime.not_after.0.saturating_sub(now.0) < life / 3
    }
}

/// A key that waits for its certificate. A cell has one such at most.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExternalRequest {
    /// PKCS#10, DER: what is to be signed.
    pub csr: Vec<u8>,
    /// SHA-256 of SPKI of the key.
    pub key_hash: [u8; 32],
    /// The key, wrapped to each replica's own key.
    pub wrapped: BTreeMap<u64, Vec<u8>>,
    /// Since when it waits.
    pub made: Stamp,
}

/// What came back from outside.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExternalImport {
    /// As [`ExternalRow::chain`].
    pub chain: Vec<Vec<u8>>,
    /// The root, DER.
    pub root: Vec<u8>,
    /// The requested key, wrapped to the replicas of now.
    pub wrapped: BTreeMap<u64, Vec<u8>>,
    /// The record keys in force, certified by the new authority, where it follows another under the active root; a root that
    /// is merely prepared certifies them when it is activated.
    pub keys: Option<KeySetRow>,
    /// For a root that is new to the trust domain.
    pub approved: Option<Approved>,
    /// The administrator.
    pub by: String,
}

/// An authority whose chain leads to its root: made by [`path`] and [`judge`] only.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Judged {
    key_hash: [u8; 32],
    spki: Vec<u8>,
    lifetime: Lifetime,
}

impl Judged {
    /// SHA-256 of SPKI of its key.
    pub fn key_hash(&self) -> [u8; 32] {
        self.key_hash
    }
    /// SubjectPublicKeyInfo of its key, which is on P-256 as every key of a cell, DER.
    pub fn spki(&self) -> &[u8] {
        &self.spki
    }
    /// Within which all of the chain, and the root, are valid.
    pub fn lifetime(&self) -> Lifetime {
        self.lifetime
    }
}

pub(crate) fn wrong(expected: impl Into<String>, found: impl Into<String>) -> Refusal {
    Refusal::new(Code::ExternalCertificate, expected, found)
}

/// Judges a chain on its own, whatever the time: the authority's certificate first, its root apart.
///
/// # Errors
/// [`Code::ExternalCertificate`], with the certificate and the rule.
pub fn path(td: &TrustDomain, chain: &[Vec<u8>], root: &[u8]) -> Result<Judged, Refusal> {
    if !(1..=CHAIN_MAX).contains(&chain.len()) {
        let expected = format!("the authority's certificate and at most {} above it, without the root", CHAIN_MAX - 1);
        return Err(wrong(expected, format!("{} certificates", chain.len())));
    }
    let root = Certificate::read("the root", root)?;
    let mut all = Vec::with_capacity(chain.len());
    for (n, der) in chain.iter().enumerate() {
        let what = if n == 0 { "the authority" } else { "a tier above the authority" };
        let read = Certificate::read(what, der)?;
        // pathLen counts those below but the leaf: the replicas' intermediates, and what is between.
        read.is_authority(td, n + 1)?;
        all.push(read);
    }
    root.is_authority(td, chain.len() + 1)?;
    root.is_signed_by(&root).map_err(|refusal| wrong("a root that signed itself", refusal.found))?;
    for (below, above) in all.iter().zip(all.iter().skip(1).chain([&root])) {
        below.is_signed_by(above)?;
        if below.key_hash() == above.key_hash() {
            return Err(wrong("a key of its own in each certificate", "one key in two of them"));
        }
    }
    let [authority, ..] = all.as_slice() else { return Err(wrong("a certificate", "none")) };
    authority.is_own()?;
    let spans = all.iter().chain([&root]).map(Certificate::lifetime);
    let lifetime = spans.fold(authority.lifetime(), |of, one| Lifetime {
        not_before: of.not_before.max(one.not_before),
        not_after: of.not_after.min(one.not_after),
    });
    if lifetime.not_after < authority.lifetime().not_after {
        return Err(wrong("an authority that ends before what is above it", "one that ends after it"));
    }
    Ok(Judged { key_hash: authority.key_hash(), spki: authority.spki().to_vec(), lifetime })
}

/// Judges what came back for the request with this key.
///
/// # Errors
/// As [`path`].
pub fn judge(
    td: &TrustDomain,
    chain: &[Vec<u8>],
    root: &[u8],
    key_hash: &[u8; 32],
    now: Stamp,
) -> Result<Judged, Refusal> {
    let judged = path(td, chain, root)?;
    if judged.key_hash != *key_hash {
        let expected = format!("a certificate of the requested key {}", authority_of(key_hash));
        return Err(wrong(expected, format!("one of key {}", authority_of(&judged.key_hash))));
    }
    let Lifetime { not_before, not_after } = judged.lifetime;
    if not_before > now {
        let found = format!("{} ms before it begins", not_before.0.saturating_sub(now.0));
        return Err(wrong("certificates that are valid now", found));
    }
    has_time_left(not_after, now)?;
    let life = not_after.0.saturating_sub(not_before.0);
    if life > LIFE_MS_MAX {
        let expected = format!("an authority of at most {} days (30-90 are meant)", LIFE_MS_MAX / DAY_MS);
        return Err(wrong(expected, format!("one of {} days", life / DAY_MS)));
    }
    Ok(judged)
}

/// Whether an authority may sign from now on: for clocks that lag too, and long enough.
///
/// # Errors
/// [`Code::ExternalCertificate`], with how long to wait where it is too young.
pub fn may_sign(lifetime: Lifetime, now: Stamp) -> Result<(), Refusal> {
    let from = lifetime.not_before.plus_ms(NOT_BEFORE_SLACK_MS);
    if from > now {
        let expected = format!("certificates that began {} s ago: what clocks may lag", NOT_BEFORE_SLACK_MS / 1000);
        let wait = from.0.saturating_sub(now.0).div_ceil(1000);
        return Err(wrong(expected, format!("younger ones: wait {wait} s and do the same again")));
    }
    has_time_left(lifetime.not_after, now)
}

fn has_time_left(not_after: Stamp, now: Stamp) -> Result<(), Refusal> {
    if not_after >= now.plus_ms(LEFT_MS_MIN) {
        return Ok(());
    }
    let found = match not_after.0.checked_sub(now.0) {
        Some(left) => format!("{left} ms left"),
        None => "one that ended".to_owned(),
    };
    Err(wrong(format!("an authority with {} days left", LEFT_MS_MIN / DAY_MS), found))
}

impl State {
    /// The authority under this root that signs now; none where the root's own key is in the cell.
    pub fn external(&self, root: &RootId) -> Option<&ExternalRow> {
        self.externals_of(root).last().map(|(_, row)| row)
    }
    /// All authorities under this root that are remembered, by where they were imported: the last one signs.
    pub fn externals_of(&self, root: &RootId) -> impl Iterator<Item = (u64, &ExternalRow)> {
        let root = *root;
        self.externals.from((root, 0)).take_while(move |((of, _), _)| *of == root).map(|((_, n), row)| (*n, row))
    }
    /// The key that waits for its certificate.
    pub fn external_request(&self) -> Option<&ExternalRequest> {
        self.external_requests.get(&0)
    }
    /// An authority under an external root by its name, with its root, and whether it signs. The row of its last certificate to
    /// end, where it has several.
    pub fn external_named(&self, id: &str) -> Option<(RootId, &ExternalRow, bool)> {
        let ((root, _), row) = self
            .externals
            .iter()
            .filter(|(_, row)| row.authority() == id)
            .max_by_key(|(_, row)| row.lifetime.not_after)?;
        let signs = self.external(root).is_some_and(|last| last.key_hash == row.key_hash);
        Some((*root, row, signs))
    }
    /// Whether the cell has a row of an intermediate, a downstream authority or one under an external root with this name.
    pub fn has_row_of(&self, id: &str) -> bool {
        self.authority(id).is_some() || self.downstream(id).is_some() || self.external_named(id).is_some()
    }
    /// Whether this names a key that the cell has a row of, or that stands in the chains of all: of a root in the bundle, or of
    /// what is between an external one and its authority.
    pub fn names_authority(&self, id: &str) -> bool {
        let is = |der: &[u8]| Certificate::read("a certificate", der).is_ok_and(|c| authority_of(&c.key_hash()) == id);
        self.has_row_of(id)
            || self.roots().values().any(|row| is(&row.der))
            || self.externals.iter().any(|(_, row)| row.chain.iter().any(|der| is(der)))
    }
    /// Whether an intermediate is under the authority that signs now for its root.
    pub fn is_under_last(&self, row: &AuthorityRow) -> bool {
        !self.is_replaced(&row.root, &row.serial)
    }
    /// Whether what has this serial number under this root is under an authority that another replaced.
    pub fn is_replaced(&self, root: &RootId, serial: &[u8; 16]) -> bool {
        let last = self.externals_of(root).last();
        last.is_some_and(|(imported, _)| index_of(serial).0 < imported)
    }
    /// The authority under an external root that signed what has this serial number; none where the root's own key did, or
    /// the authority is forgotten.
    pub fn external_over(&self, root: &RootId, serial: &[u8; 16]) -> Option<&ExternalRow> {
        let then = self.externals_of(root).take_while(|(imported, _)| *imported <= index_of(serial).0);
        then.last().map(|(_, row)| row)
    }
    /// When the authority ends that the active root signs by; none where that is its own key.
    pub fn authority_ends(&self) -> Option<Stamp> {
        let (active, _) = self.active_root()?;
        self.external(&active).map(|row| row.lifetime.not_after)
    }
}
