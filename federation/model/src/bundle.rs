//! Trust bundles. A foreign bundle vouches for its own trust domain and for nothing else.

use crate::id::{SpiffeId, TrustDomain};
use crate::refusal::{Code, Refusal};
use serde::{Deserialize, Serialize};
use std::marker::PhantomData;

/// Marks the bundle of a cell's own trust domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Own {}
/// Marks the bundle of another trust domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Foreign {}

/// Where a root stands with its own trust domain. Only ever further down this list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum RootState {
    /// In the bundle, so that everybody knows it before anything is signed under it.
    Prepared,
    /// What intermediates are signed under.
    Active,
    /// Replaced; what is under it is valid still.
    Old,
    /// Not to be relied on much longer: whatever is under it is issued anew.
    Tainted,
    /// Out of the bundle, for ever.
    Revoked,
}

impl RootState {
    /// As operators and the wire have it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Prepared => "prepared",
            Self::Active => "active",
            Self::Old => "old",
            Self::Tainted => "tainted",
            Self::Revoked => "revoked",
        }
    }
}

/// One root of a bundle as its trust domain's cell tells it to peers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RootEntry {
    /// The certificate, DER.
    pub der: Vec<u8>,
    /// Where it stands.
    pub state: RootState,
}

/// What a record of a bundle says: its sequence and every root in it, the active one first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BundleRecord {
    /// `epoch << 40 | counter`.
    pub sequence: u64,
    /// None revoked.
    pub roots: Vec<RootEntry>,
}

/// The roots of one trust domain.
///
/// ```compile_fail,E0308
/// use ambit_model::bundle::{Bundle, Foreign, Own};
/// fn issue_under(_: &Bundle<Own>) {}
/// fn wrong(peer: &Bundle<Foreign>) { issue_under(peer) }
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(bound = "")]
pub struct Bundle<Whose> {
    trust_domain: TrustDomain,
    /// `epoch << 40 | counter`, of that trust domain, never a cell's index (SPIFFE bundle `spiffe_sequence`).
    sequence: u64,
    /// Root certificates, DER.
    roots: Vec<Vec<u8>>,
    #[serde(skip)]
    whose: PhantomData<fn() -> Whose>,
}

impl<Whose> Bundle<Whose> {
    /// A bundle of `roots` (DER). An empty bundle is legal and means that everything is revoked.
    pub fn new(trust_domain: TrustDomain, sequence: u64, roots: Vec<Vec<u8>>) -> Self {
        Self { trust_domain, sequence, roots, whose: PhantomData }
    }
    /// The trust domain that these roots vouch for.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }
    /// See the field's source.
    pub fn sequence(&self) -> u64 {
        self.sequence
    }
    /// Roots that may vouch for `id`, or a refusal where `id` lies in another trust domain.
    pub fn roots_for(&self, id: &SpiffeId) -> Result<&[Vec<u8>], Refusal> {
        if id.trust_domain() == self.trust_domain {
            Ok(&self.roots)
        } else {
            Err(Refusal::new(Code::TrustDomainUnknown, format!("an identity of {}", self.trust_domain), id.as_str()))
        }
    }
    /// All roots, DER, for publication.
    pub fn roots(&self) -> &[Vec<u8>] {
        &self.roots
    }
}
